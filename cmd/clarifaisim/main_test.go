package main

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

// asProgram makes the test binary the program itself, so that tests can kill it.
const asProgram = "CLARIFAISIM_TEST_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

const pat = "11111111111111111111111111111111"

func getenv(name string) string {
	if name == "CLARIFAISIM_PAT" {
		return pat
	}
	return ""
}

func call(t *testing.T, method, url, body string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Key "+pat)
	req.Close = true
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	data, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res.StatusCode, string(data)
}

// start runs the simulator until stop is called, and returns its base URL.
func start(t *testing.T, args ...string) (url string, stop func() error) {
	t.Helper()
	addrFile := filepath.Join(t.TempDir(), "addr")
	ctx, cancel := context.WithCancel(t.Context())
	out, in := io.Pipe()
	ended := make(chan error, 1)
	go func() {
		err := run(ctx, append([]string{"--addr=127.0.0.1:0", "--addr-file=" + addrFile}, args...), getenv, in)
		_ = in.Close()
		ended <- err
	}()
	stop = func() error { cancel(); err := <-ended; ended <- err; return err }
	t.Cleanup(func() { _ = stop() })
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("no line was printed: %v, %v", err, stop())
	}
	data, err := os.ReadFile(addrFile)
	if err != nil {
		t.Fatal(err)
	}
	url = strings.TrimSpace(string(data))
	if !strings.Contains(line, "ready at "+url+" ") {
		t.Errorf("printed %q: want it to say ready at %s", line, url)
	}
	return url, stop
}

func TestRun(t *testing.T) {
	t.Parallel()
	url, stop := start(t, "--user-id=ada", "--rate-limit=7", "--latency=1ms")
	if _, text := call(t, "GET", url+"/v2/users/me", ""); !strings.Contains(text, `"user":{"id":"ada"}`) {
		t.Errorf("users/me: %s", text)
	}
	if _, text := call(t, "GET", url+"/_sim/settings", ""); !strings.Contains(text, `"rate_limit":7,"latency_ms":1,`) {
		t.Errorf("settings: %s", text)
	}
	if err := stop(); err != nil {
		t.Errorf("stopped: %v", err)
	}
	resp, err := http.Get(url + "/_sim/settings")
	if err != nil {
		return
	}
	defer func() { _ = resp.Body.Close() }()
	if text, _ := io.ReadAll(resp.Body); strings.Contains(string(text), `"rate_limit":7,`) { // another test may have taken the port
		t.Error("it listens after it was stopped")
	}
}

func TestStopEndsWhatHangs(t *testing.T) {
	t.Parallel()
	url, stop := start(t)
	call(t, "POST", url+"/_sim/faults", `[{"call":"GetUser","hang":true}]`)
	conn, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "GET /v2/users/me HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if err := stop(); err != nil {
		t.Errorf("stopped: %v", err)
	}
}

func TestStateOutlivesARestart(t *testing.T) {
	t.Parallel()
	state := filepath.Join(t.TempDir(), "state")
	url, stop := start(t, "--state-file="+state)
	if code, text := call(t, "POST", url+"/v2/users/acme/apps", `{"apps":[{"id":"app-a"}]}`); code != 200 {
		t.Fatal(text)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	url, _ = start(t, "--state-file="+state)
	if code, text := call(t, "GET", url+"/v2/users/acme/apps/app-a", ""); code != 200 {
		t.Errorf("after a restart: %s", text)
	}
}

// TestKill kills the program behind each answer, and starts it again.
func TestKill(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for i, id := range []string{"app-a", "app-b", "app-c"} {
		cmd := exec.CommandContext(t.Context(), os.Args[0], "--addr=127.0.0.1:0", "--state-file="+filepath.Join(dir, "state"))
		cmd.Env = append(os.Environ(), asProgram+"=1", "CLARIFAISIM_PAT="+pat)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		line, err := bufio.NewReader(out).ReadString('\n')
		if err != nil {
			t.Fatalf("no line was printed: %v", err)
		}
		url := strings.Fields(strings.SplitAfter(line, "ready at ")[1])[0]
		_, text := call(t, "GET", url+"/_sim/apps", "")
		if n := strings.Count(text, `"id"`); n != i {
			t.Errorf("after %d kills: apps %s, want %d", i, text, i)
		}
		if code, text := call(t, "POST", url+"/v2/users/acme/apps", `{"apps":[{"id":"`+id+`"}]}`); code != 200 {
			t.Error(text)
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
}

func TestWrongStarts(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	dir := t.TempDir()
	empty := filepath.Join(dir, "empty")
	if err := os.WriteFile(empty, []byte("\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	nothing := func(string) string { return "" }
	for _, tt := range []struct {
		name    string
		getenv  func(string) string
		args    []string
		message string
	}{
		{"port in use", getenv, []string{"--addr", listener.Addr().String()}, "is in use by another program"},
		{"no such address", getenv, []string{"--addr", "nonsense"}, "listen"},
		{"no token", nothing, nil, "CLARIFAISIM_PAT"},
		{"empty token file", getenv, []string{"--pat-file", empty}, "no token"},
		{"no token file", getenv, []string{"--pat-file", filepath.Join(dir, "nope")}, "read the token"},
		{"unknown flag", getenv, []string{"--pat", pat}, "--help"},
		{"rate limit", getenv, []string{"--addr=127.0.0.1:0", "--rate-limit=-1"}, "rate_limit is -1"},
		{"user", getenv, []string{"--addr=127.0.0.1:0", "--user-id=me"}, "user_id"},
		{"state file", getenv, []string{"--addr=127.0.0.1:0", "--state-file", empty}, "not the state of a simulator"},
		{"address file", getenv, []string{"--addr=127.0.0.1:0", "--addr-file", filepath.Join(dir, "no", "dir")}, "write the address"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithCancel(t.Context())
			err := run(ctx, tt.args, tt.getenv, onWrite(cancel)) // should it start after all, it ends at once
			if err == nil || !strings.Contains(err.Error(), tt.message) {
				t.Errorf("run %q: error %v, want one that says %q", tt.args, err, tt.message)
			}
			if err != nil && strings.Contains(err.Error(), pat) {
				t.Errorf("run %q: the error holds the token: %v", tt.args, err)
			}
		})
	}
}

// onWrite is a writer that calls itself.
type onWrite func()

func (f onWrite) Write(p []byte) (int, error) { f(); return len(p), nil }

func TestHelp(t *testing.T) {
	t.Parallel()
	var out strings.Builder
	if err := run(t.Context(), []string{"--help"}, getenv, &out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"--addr", "--addr-file", "--pat-file", "--user-id", "--state-file", "--rate-limit", "--latency", "/_sim/faults"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("help does not name %s:\n%s", want, out.String())
		}
	}
}
