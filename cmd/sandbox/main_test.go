package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// bin has the programs, built from the sources under test.
var bin string

func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "sandbox-test-")
	if err != nil {
		panic(err)
	}
	bin = dir
	out, err := exec.Command("go", "build", "-o", dir, "github.com/tenantry/tenantry/cmd/...").CombinedOutput()
	if err != nil {
		fmt.Fprintf(os.Stderr, "build the programs: %v\n%s", err, out)
		os.Exit(1)
	}
	code := m.Run()
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

type buffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}
func (b *buffer) String() string { b.mu.Lock(); defer b.mu.Unlock(); return b.buf.String() }

// A running is a sandbox that runs as a process of its own.
type running struct {
	t    *testing.T
	dir  string
	cmd  *exec.Cmd
	out  *buffer
	done chan struct{}
	env  map[string]string
}

func launch(t *testing.T, dir string, vars ...string) *running {
	t.Helper()
	r := &running{t: t, dir: dir, out: &buffer{}, done: make(chan struct{})}
	r.cmd = exec.Command(filepath.Join(bin, "sandbox"))
	for _, line := range os.Environ() {
		name, _, _ := strings.Cut(line, "=")
		if name != "DATABASE_URL" && !strings.HasPrefix(name, "CLARIFAI_") && !strings.HasPrefix(name, "TENANTRY_") {
			r.cmd.Env = append(r.cmd.Env, line)
		}
	}
	r.cmd.Env = append(append(r.cmd.Env, "SANDBOX_DIR="+dir, "SANDBOX_ADDR=127.0.0.1:0"), vars...)
	r.cmd.Stdout, r.cmd.Stderr = r.out, r.out
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { _ = r.cmd.Wait(); close(r.done) }()
	t.Cleanup(func() { _ = r.cmd.Process.Kill(); <-r.done })
	return r
}

func (r *running) ready() *running {
	r.t.Helper()
	deadline := time.After(60 * time.Second)
	for !strings.Contains(r.out.String(), "Ctrl-C stops everything") {
		select {
		case <-r.done:
			r.t.Fatalf("the sandbox has ended:\n%s", r.out)
		case <-deadline:
			r.t.Fatalf("the sandbox is not ready:\n%s", r.out)
		case <-time.After(20 * time.Millisecond):
		}
	}
	// As a script does it.
	out, err := exec.Command("sh", "-c", `set -a; . "$1/env"; env`, "sh", r.dir).Output()
	if err != nil {
		r.t.Fatalf("source the environment: %v", err)
	}
	r.env = map[string]string{}
	for line := range strings.SplitSeq(string(out), "\n") {
		name, value, _ := strings.Cut(line, "=")
		r.env[name] = value
	}
	for _, name := range []string{"TENANTRY_URL", "TENANTRY_INTERNAL_URL", "TENANTRY_TOKEN", "TENANTRY_VIEWER_TOKEN", "TENANTRY_ADMIN_TOKEN",
		"CLARIFAI_API_BASE", "CLARIFAI_PAT", "DATABASE_URL"} {
		if r.env[name] == "" {
			r.t.Errorf("the environment lacks %s", name)
		}
	}
	// As a person does it, who may well run the next sandbox in the same shell.
	person := exec.Command("sh", "-c", `. "$1/env"; env`, "sh", r.dir)
	person.Env = []string{"PATH=" + os.Getenv("PATH")}
	out, err = person.Output()
	if err != nil || !strings.Contains(string(out), "TENANTRY_TOKEN=") || strings.Contains(string(out), "CLARIFAI_PAT=") {
		r.t.Errorf("programs of a shell that sourced the environment have\n%s(%v)", out, err)
	}
	return r
}

func (r *running) interrupt() {
	r.t.Helper()
	if err := r.cmd.Process.Signal(syscall.SIGINT); err != nil {
		r.t.Fatal(err)
	}
	select {
	case <-r.done:
	case <-time.After(60 * time.Second):
		r.t.Fatalf("the sandbox does not stop:\n%s", r.out)
	}
	if code := r.cmd.ProcessState.ExitCode(); code != 0 {
		r.t.Errorf("the sandbox exits with %d:\n%s", code, r.out)
	}
	for _, name := range []string{"TENANTRY_URL", "CLARIFAI_API_BASE"} {
		if conn, err := net.Dial("tcp", strings.TrimPrefix(r.env[name], "http://")); err == nil {
			_ = conn.Close()
			r.t.Errorf("%s is still served", name)
		}
	}
}

// get returns the id of the app that a tenant holds.
func (r *running) app(id string) string {
	r.t.Helper()
	status, body, err := call(r.t.Context(), http.MethodGet, r.env["TENANTRY_URL"]+"/v1/tenants/"+id, r.env["TENANTRY_VIEWER_TOKEN"], "")
	if err != nil || status != http.StatusOK {
		r.t.Fatalf("look %s up: %d %s %v", id, status, body, err)
	}
	_, rest, _ := strings.Cut(string(body), `"app":{"id":"`)
	app, _, _ := strings.Cut(rest, `"`)
	return app
}

func refused(t *testing.T, dir, says string, vars ...string) {
	t.Helper()
	r := launch(t, dir, vars...)
	select {
	case <-r.done:
	case <-time.After(60 * time.Second):
		t.Fatalf("the sandbox runs:\n%s", r.out)
	}
	if r.cmd.ProcessState.ExitCode() == 0 || !strings.Contains(r.out.String(), says) {
		t.Errorf("the sandbox exits with %d and says\n%s\nwant a failure that says %q", r.cmd.ProcessState.ExitCode(), r.out, says)
	}
}

// Two sandboxes run side by side; each keeps its data over a stop and over a kill.
func TestSandbox(t *testing.T) {
	t.Parallel()
	dirs := []string{filepath.Join(t.TempDir(), "one"), filepath.Join(t.TempDir(), "with space")}
	one := launch(t, dirs[0])
	two := launch(t, dirs[1])
	one.ready()
	two.ready()
	app := one.app("user_42")
	if app == "" || app == two.app("user_42") {
		t.Errorf("the sandboxes hold the apps %q and %q; want two", app, two.app("user_42"))
	}
	if key := strings.Count(one.out.String(), `"key": "…`); key != 1 {
		t.Errorf("the first tenant is not printed, or its key in full:\n%s", one.out)
	}
	refused(t, dirs[0], "another sandbox runs in")
	refused(t, filepath.Join(t.TempDir(), "three"), "is in use", "SANDBOX_ADDR="+strings.TrimPrefix(one.env["TENANTRY_URL"], "http://"))
	refused(t, filepath.Join(t.TempDir(), "three"), "host:port", "SANDBOX_ADDR=nowhere")

	one.interrupt()
	again := launch(t, dirs[0]).ready()
	if got := again.app("user_42"); got != app {
		t.Errorf("after a stop the tenant holds %q; want %q", got, app)
	}
	if again.env["TENANTRY_TOKEN"] != one.env["TENANTRY_TOKEN"] {
		t.Error("the token is another")
	}
	if err := again.cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-again.done
	last := launch(t, dirs[0]).ready()
	if got := last.app("user_42"); got != app {
		t.Errorf("after a kill the tenant holds %q; want %q", got, app)
	}

	// A part that ends takes the rest with it, and is named.
	if runtime.GOOS == "linux" {
		last.killSimulator()
		select {
		case <-last.done:
		case <-time.After(60 * time.Second):
			t.Fatal("the sandbox goes on without the simulator")
		}
		if last.cmd.ProcessState.ExitCode() == 0 || !strings.Contains(last.out.String(), "clarifaisim has ended") {
			t.Errorf("the sandbox says\n%s", last.out)
		}
	}
	two.interrupt()

	if err := os.WriteFile(filepath.Join(dirs[1], "clarifai.jsonl"), []byte("nonsense\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	refused(t, dirs[1], "clarifaisim has ended")
}

// killSimulator kills this sandbox's simulator, and no other.
func (r *running) killSimulator() {
	r.t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		r.t.Fatal(err)
	}
	for _, f := range files {
		args, _ := os.ReadFile(f)
		if name, _, _ := strings.Cut(string(args), "\x00"); filepath.Base(name) != "clarifaisim" || !strings.Contains(string(args), r.dir) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(f)))
		if err != nil {
			r.t.Fatal(err)
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			r.t.Fatal(err)
		}
		return
	}
	r.t.Fatal("the simulator is not found")
}

// With CLARIFAI_PAT set there is no simulator of the sandbox's own; here another
// sandbox's plays the real one.
func TestAgainstAnotherClarifai(t *testing.T) {
	t.Parallel()
	other := launch(t, filepath.Join(t.TempDir(), "other")).ready()
	patFile := filepath.Join(t.TempDir(), "pat")
	if err := os.WriteFile(patFile, []byte(other.env["CLARIFAI_PAT"]+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, pat := range []string{"CLARIFAI_PAT=" + other.env["CLARIFAI_PAT"], "CLARIFAI_PAT_FILE=" + patFile} {
		r := launch(t, filepath.Join(t.TempDir(), "this"), pat, "CLARIFAI_API_BASE="+other.env["CLARIFAI_API_BASE"]).ready()
		if r.env["CLARIFAI_API_BASE"] != other.env["CLARIFAI_API_BASE"] || strings.Contains(r.out.String(), "simulated") {
			t.Errorf("it works against %s:\n%s", r.env["CLARIFAI_API_BASE"], r.out)
		}
		if err := r.cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		<-r.done
	}
	refused(t, filepath.Join(t.TempDir(), "refused"), "whose PAT this is", "CLARIFAI_PAT=00000000000000000000000000000000",
		"CLARIFAI_API_BASE="+other.env["CLARIFAI_API_BASE"])
}

func TestQuoted(t *testing.T) {
	t.Parallel()
	for _, value := range []string{"", "plain", "http://h:1/a?b=c", "a b", "it's", "$HOME", "`x`", "a\nb", `"`, "&;|<>"} {
		out, err := exec.CommandContext(context.Background(), "sh", "-c", "V="+quoted(value)+`; printf %s "$V"`).Output()
		if err != nil || string(out) != value {
			t.Errorf("a shell reads %s as %q, %v; want %q", quoted(value), out, err, value)
		}
	}
}
