// Command sandbox runs the whole thing on one machine: a private Postgres, the
// simulated Clarifai and Tenantry, with a first tenant signed up.
//
// SANDBOX_DIR (.sandbox) keeps what it makes between runs, SANDBOX_ADDR
// (127.0.0.1:8080) is where the API listens. With CLARIFAI_PAT or
// CLARIFAI_PAT_FILE it works against real Clarifai, with DATABASE_URL on that
// database. The other settings are Tenantry's own.
package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/tenantry/tenantry/internal/localpg"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// With the first signal the handling ends: a second one ends the process, and
	// what it started with it.
	context.AfterFunc(ctx, stop)
	if err := run(ctx, os.Getenv, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "sandbox:", err)
		os.Exit(1)
	}
}

// How long to wait for what should take a second or two.
const patience = 60 * time.Second

// A sandbox is one run.
type sandbox struct {
	getenv func(string) string
	out    io.Writer
	dir    string
	bin    string // where the other programs are
	addr   string // of the API

	cluster *localpg.Cluster // nil where DATABASE_URL is used
	sim     *child           // nil where real Clarifai is used
	serve   *child

	vars map[string]string // what Tenantry is run with
	env  environment
}

// run runs until ctx ends or something that it runs does.
func run(ctx context.Context, getenv func(string) string, out io.Writer) (err error) {
	s := &sandbox{getenv: getenv, out: out, addr: cmp.Or(getenv("SANDBOX_ADDR"), "127.0.0.1:8080"), vars: map[string]string{}}
	if s.dir, err = filepath.Abs(cmp.Or(getenv("SANDBOX_DIR"), ".sandbox")); err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	s.bin = filepath.Dir(self)
	if err := os.MkdirAll(s.dir, 0o755); err != nil {
		return fmt.Errorf("SANDBOX_DIR: %w", err)
	}
	unlock, err := lock(filepath.Join(s.dir, "lock"))
	if err != nil {
		return err
	}
	defer unlock()
	if err := portIsFree(s.addr); err != nil {
		return err
	}
	_ = os.Remove(s.file("env")) // of an earlier run: scripts wait for it

	defer func() { err = errors.Join(err, s.stop()) }()
	for _, step := range []func(context.Context) error{s.startPostgres, s.startClarifai, s.prepare, s.startTenantry, s.firstTenant} {
		if err := step(ctx); err != nil {
			if ctx.Err() != nil { // stopped before it was ready
				return nil
			}
			return err
		}
	}
	s.printNext()
	return s.watch(ctx)
}

func (s *sandbox) say(format string, args ...any) { _, _ = fmt.Fprintf(s.out, format+"\n", args...) }

func (s *sandbox) file(name string) string { return filepath.Join(s.dir, name) }

func (s *sandbox) startPostgres(ctx context.Context) error {
	if url := s.getenv("DATABASE_URL"); url != "" {
		s.vars["DATABASE_URL"] = url
		s.say("postgres    the one of DATABASE_URL")
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute) // it may have to be installed
	defer cancel()
	cluster, err := localpg.Open(ctx, localpg.Config{Dir: s.file("postgres"), Say: func(what string) { s.say("postgres    %s", what) }})
	if err != nil {
		return err
	}
	s.cluster = cluster
	if err := cluster.CreateDatabase(ctx, "tenantry"); err != nil {
		return fmt.Errorf("create the database: %w", err)
	}
	s.vars["DATABASE_URL"] = cluster.URL("tenantry")
	s.say("postgres    private, in %s", s.file("postgres"))
	return nil
}

func (s *sandbox) startClarifai(ctx context.Context) error {
	pat, patFile := s.getenv("CLARIFAI_PAT"), s.getenv("CLARIFAI_PAT_FILE")
	if pat != "" || patFile != "" {
		if pat == "" {
			raw, err := os.ReadFile(patFile)
			if err != nil {
				return fmt.Errorf("CLARIFAI_PAT_FILE: %w", err)
			}
			pat = strings.TrimSpace(string(raw))
		}
		s.env.pat, s.env.apiBase = pat, cmp.Or(s.getenv("CLARIFAI_API_BASE"), "https://api.clarifai.com")
		s.vars["CLARIFAI_PAT"], s.vars["CLARIFAI_PAT_FILE"], s.vars["CLARIFAI_API_BASE"] = pat, "", s.env.apiBase
		s.say("clarifai    real, at %s", s.env.apiBase)
		return nil
	}
	pat, err := kept(s.file("pat"), newPAT)
	if err != nil {
		return err
	}
	addrFile := s.file("clarifaisim.addr")
	_ = os.Remove(addrFile)
	s.sim, err = s.start("clarifaisim", []string{"--addr", "127.0.0.1:0", "--addr-file", addrFile, "--state-file", s.file("clarifai.jsonl")},
		map[string]string{"CLARIFAISIM_PAT": pat})
	if err != nil {
		return err
	}
	var base string
	err = s.await(ctx, "the simulator listens", s.sim, func() bool {
		raw, err := os.ReadFile(addrFile)
		base = strings.TrimSpace(string(raw))
		return err == nil && base != ""
	})
	if err != nil {
		return err
	}
	s.env.pat, s.env.apiBase = pat, base
	s.vars["CLARIFAI_PAT"], s.vars["CLARIFAI_API_BASE"] = pat, base
	// The simulator serves this database only, so a short watch is enough. Real Clarifai may serve
	// another database of this deployment.
	s.vars["TENANTRY_SHUTDOWN_DELAY"] = cmp.Or(s.getenv("TENANTRY_SHUTDOWN_DELAY"), "0s")
	s.vars["TENANTRY_RECOVERY_WATCH"] = cmp.Or(s.getenv("TENANTRY_RECOVERY_WATCH"), "2s")
	s.say("clarifai    simulated, at %s", base)
	return nil
}

func newPAT() string {
	b := make([]byte, 16)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// kept reads a secret from a file, and makes it first if there is none.
func kept(path string, make func() string) (string, error) {
	raw, err := os.ReadFile(path)
	if text := strings.TrimSpace(string(raw)); err == nil && text != "" {
		return text, nil
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	text := make()
	return text, os.WriteFile(path, []byte(text+"\n"), 0o600)
}

func (s *sandbox) prepare(ctx context.Context) error {
	keyset := s.file("keyset.json")
	s.vars["TENANTRY_KEYSET_FILE"] = keyset
	if _, err := os.Stat(keyset); errors.Is(err, os.ErrNotExist) {
		if _, err := s.tenantry(ctx, "keyset", "create"); err != nil {
			return err
		}
	}
	_, err := s.tenantry(ctx, "migrate", "up")
	return err
}

// tenantry runs a command to its end and returns what it prints.
func (s *sandbox) tenantry(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(s.bin, "tenantry"), args...)
	cmd.Env = s.environ(s.vars)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("tenantry %s: %w\n%s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return strings.TrimSpace(stdout.String()), nil
}

// environ is our environment with vars in place of what it has of them.
func (s *sandbox) environ(vars map[string]string) []string {
	var env []string
	for _, line := range os.Environ() {
		name, _, _ := strings.Cut(line, "=")
		if _, ours := vars[name]; !ours && name != "DATABASE_URL_FILE" {
			env = append(env, line)
		}
	}
	for name, value := range vars {
		if value != "" {
			env = append(env, name+"="+value)
		}
	}
	return env
}

func (s *sandbox) startTenantry(ctx context.Context) (err error) {
	addrFile := s.file("tenantry.addr")
	_ = os.Remove(addrFile)
	s.vars["TENANTRY_ADDR"], s.vars["TENANTRY_INTERNAL_ADDR"], s.vars["TENANTRY_ADDR_FILE"] = s.addr, "127.0.0.1:0", addrFile
	if s.serve, err = s.start("tenantry", []string{"serve"}, s.vars); err != nil {
		return err
	}
	err = s.await(ctx, "Tenantry is ready", s.serve, func() bool {
		raw, err := os.ReadFile(addrFile)
		if err != nil {
			return false
		}
		for line := range strings.SplitSeq(string(raw), "\n") {
			switch name, value, _ := strings.Cut(line, "="); name {
			case "TENANTRY_URL":
				s.env.url = value
			case "TENANTRY_INTERNAL_URL":
				s.env.internalURL = value
			}
		}
		status, _, err := call(ctx, http.MethodGet, s.env.internalURL+"/readyz", "", "")
		return err == nil && status == http.StatusOK
	})
	if err != nil {
		return err
	}
	s.env.databaseURL = s.vars["DATABASE_URL"]
	for _, t := range []struct {
		role  string
		token *string
	}{{"provisioner", &s.env.token}, {"viewer", &s.env.viewerToken}, {"admin", &s.env.adminToken}} {
		if *t.token, err = s.token(ctx, t.role); err != nil {
			return err
		}
	}
	s.say("tenantry    %s", s.env.url)
	return s.env.write(s.file("env"))
}

// token returns the token of a role: the one of an earlier run if it works still.
func (s *sandbox) token(ctx context.Context, role string) (string, error) {
	path := s.file("token-" + role)
	if raw, err := os.ReadFile(path); err == nil {
		token := strings.TrimSpace(string(raw))
		if status, _, err := call(ctx, http.MethodGet, s.env.url+"/v1/upstream", token, ""); err == nil && status == http.StatusOK {
			return token, nil
		}
	}
	token, err := s.tenantry(ctx, "token", "create", "--name", "sandbox-"+role, "--role", role)
	if err != nil {
		return "", err
	}
	return token, os.WriteFile(path, []byte(token+"\n"), 0o600)
}

const firstID = "user_42"

func (s *sandbox) firstTenant(ctx context.Context) error {
	status, body, err := call(ctx, http.MethodPut, s.env.url+"/v1/tenants/"+firstID, s.env.token, `{"display_name":"Ada","labels":{"plan":"pro"}}`)
	if err != nil {
		return fmt.Errorf("sign up the first tenant: %w", err)
	}
	var mapping map[string]any
	if err := json.Unmarshal(body, &mapping); err != nil {
		return fmt.Errorf("sign up the first tenant: the answer %d is not JSON: %w", status, err)
	}
	if c, ok := mapping["credentials"].(map[string]any); ok {
		key := fmt.Sprint(c["key"])
		c["key"] = "…" + key[max(0, len(key)-4):] // terminals are scrolled back, and shared
	}
	shown, err := json.MarshalIndent(mapping, "", "  ")
	if err != nil {
		return err
	}
	s.say("\nPUT /v1/tenants/%s answers %d:\n%s\n", firstID, status, shown)
	if status >= 300 {
		return fmt.Errorf("the first tenant is not signed up: %d; the log is %s", status, s.serve.log)
	}
	return nil
}

func (s *sandbox) printNext() {
	dir := s.dir
	if wd, err := os.Getwd(); err == nil {
		if rel, err := filepath.Rel(wd, s.dir); err == nil && !strings.HasPrefix(rel, "..") {
			dir = rel
		}
	}
	s.say(`Next, in another terminal:

  . %[1]s/env

  # sign up, look up, whose app is it, read the key
  curl -sX PUT -H "Authorization: Bearer $TENANTRY_TOKEN" $TENANTRY_URL/v1/tenants/user_43
  curl -s -H "Authorization: Bearer $TENANTRY_VIEWER_TOKEN" $TENANTRY_URL/v1/tenants/%[2]s
  curl -s -H "Authorization: Bearer $TENANTRY_VIEWER_TOKEN" "$TENANTRY_URL/v1/tenants?label=plan%%3Dpro"
  curl -s -H "Authorization: Bearer $TENANTRY_TOKEN" $TENANTRY_URL/v1/tenants/%[2]s/keys/default/secret

  # how Clarifai and the work for it stand; metrics
  curl -s -H "Authorization: Bearer $TENANTRY_VIEWER_TOKEN" $TENANTRY_URL/v1/upstream
  curl -s $TENANTRY_INTERNAL_URL/metrics | grep ^tenantry_
`, dir, firstID)
	if s.sim != nil {
		s.say(`  # what the simulator holds; make it lose the next answer, then sign up again
  curl -s $CLARIFAI_API_BASE/_sim/state
  curl -s $CLARIFAI_API_BASE/_sim/faults -d '[{"call":"PostKeys","count":1,"drop_after":true}]'
`)
	}
	s.say("Logs are in %s/*.log. Ctrl-C stops everything; the data stays.", dir)
}

// watch waits until ctx ends, or one of those that run does.
func (s *sandbox) watch(ctx context.Context) error {
	var simDone, pgDone <-chan struct{}
	if s.sim != nil {
		simDone = s.sim.done
	}
	if s.cluster != nil {
		pgDone = s.cluster.Done()
	}
	select {
	case <-ctx.Done():
		return nil
	case <-s.serve.done:
		return s.serve.ended()
	case <-simDone:
		return s.sim.ended()
	case <-pgDone:
		return fmt.Errorf("the private Postgres has ended; its log is %s", s.cluster.Log())
	}
}

// stop stops what runs, those first that need the others.
func (s *sandbox) stop() error {
	s.say("stopping")
	for _, c := range []*child{s.serve, s.sim} {
		if c != nil {
			c.stop(30 * time.Second)
		}
	}
	_ = os.Remove(s.file("env"))
	if s.cluster == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	return s.cluster.Stop(ctx)
}

// call sends one request to the API.
func call(ctx context.Context, method, url, token, body string) (int, []byte, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set("Prefer", "wait=50")
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	raw, err := io.ReadAll(resp.Body)
	return resp.StatusCode, raw, err
}

// lock makes sure that no other sandbox runs in the same folder. The lock ends
// with the process, however that ends.
func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("SANDBOX_DIR: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("another sandbox runs in %s: stop it, or set SANDBOX_DIR and SANDBOX_ADDR to run one beside it", filepath.Dir(path))
	}
	return func() { _ = f.Close() }, nil
}

// portIsFree says early, and in words, what would fail late.
func portIsFree(addr string) error {
	l, err := net.Listen("tcp", addr)
	if errors.Is(err, syscall.EADDRINUSE) {
		return fmt.Errorf("SANDBOX_ADDR: %s is in use: stop what listens there, or set SANDBOX_ADDR=127.0.0.1:0 for a free port", addr)
	}
	if err != nil {
		return fmt.Errorf("SANDBOX_ADDR: %q must read host:port, such as 127.0.0.1:8080: %w", addr, err)
	}
	return l.Close()
}
