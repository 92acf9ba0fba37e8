package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/tenantry/tenantry/internal/localpg"
	"github.com/tenantry/tenantry/internal/tenant"
)

// ReplicaOptions are the settings of one replica.
type ReplicaOptions struct {
	Proxy *Proxy // to its database; default: Cluster.Proxy
	// Env are additional settings. They override those of the cluster; an empty value
	// unsets one.
	Env map[string]string
}

// A Replica is a `tenantry serve` process.
type Replica struct {
	Name  string
	Proxy *Proxy // to its database
	// URL is the address of the API, InternalURL that of /readyz and /metrics. Each
	// start changes both.
	URL, InternalURL string

	c    *Cluster
	env  map[string]string
	log  string // file
	addr string // file
	cmd  *exec.Cmd
	done <-chan struct{}
}

// NewReplica adds a replica without starting it.
func (c *Cluster) NewReplica(o ReplicaOptions) *Replica {
	if o.Proxy == nil {
		o.Proxy = c.Proxy
	}
	name := fmt.Sprint("replica", len(c.Replicas)+1)
	r := &Replica{Name: name, Proxy: o.Proxy, c: c, log: filepath.Join(c.dir, name+".log"), addr: filepath.Join(c.dir, name+".addr")}
	r.env = maps.Clone(c.env)
	maps.Copy(r.env, map[string]string{"DATABASE_URL": o.Proxy.URL(Database), "TENANTRY_ADDR_FILE": r.addr})
	maps.Copy(r.env, o.Env)
	c.Replicas = append(c.Replicas, r)
	return r
}

// StartReplica adds a replica, starts it and waits until it is ready.
func (c *Cluster) StartReplica(o ReplicaOptions) *Replica {
	c.t.Helper()
	r := c.NewReplica(o)
	r.Start()
	return r
}

// Start starts a replica that is not running and waits until it is ready.
func (r *Replica) Start() {
	r.c.t.Helper()
	r.Launch()
	r.WaitReady()
}

// Launch starts a replica that is not running and waits until it listens or has
// exited. A replica without a database listens and is not ready.
func (r *Replica) Launch() {
	r.c.t.Helper()
	if r.Running() {
		r.c.t.Fatalf("%s is running already", r.Name)
	}
	_ = os.Remove(r.addr)
	log, err := os.OpenFile(r.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	r.c.must("open the log of "+r.Name, err)
	defer func() { _ = log.Close() }()
	cmd := exec.Command(binary.path, "serve")
	cmd.Env, cmd.Stdout, cmd.Stderr = environ(r.env), log, log
	done, err := localpg.StartChild(cmd)
	r.c.must("start "+r.Name, err)
	r.cmd, r.done = cmd, done
	r.c.Eventually(r.Name+" listens", func() bool {
		raw, err := os.ReadFile(r.addr)
		for line := range strings.Lines(string(raw)) {
			switch name, value, _ := strings.Cut(strings.TrimSpace(line), "="); name {
			case "TENANTRY_URL":
				r.URL = value
			case "TENANTRY_INTERNAL_URL":
				r.InternalURL = value
			}
		}
		return err == nil || !r.Running()
	})
}

// WaitReady waits until /readyz returns 200. The test fails if the process exits.
func (r *Replica) WaitReady() {
	r.c.t.Helper()
	r.c.Eventually(r.Name+" is ready", func() bool {
		if !r.Running() {
			r.c.t.Fatalf("%s has exited with code %d", r.Name, r.ExitCode())
		}
		return r.Ready()
	})
}

// Ready reports whether /readyz returns 200.
func (r *Replica) Ready() bool {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	resp, err := r.c.request(ctx, http.MethodGet, r.InternalURL+"/readyz", nil, "")
	return err == nil && resp.Status == http.StatusOK
}

// Running reports whether the process exists, frozen or not.
func (r *Replica) Running() bool {
	if r.done == nil {
		return false
	}
	select {
	case <-r.done:
		return false
	default:
		return true
	}
}

// ExitCode is the exit code of the ended process, -1 after a signal.
func (r *Replica) ExitCode() int { return r.cmd.ProcessState.ExitCode() }

// Stop sends SIGTERM and waits until the process has exited.
func (r *Replica) Stop() {
	r.c.t.Helper()
	r.Thaw()
	_ = r.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-r.done:
	case <-time.After(limit):
		r.c.t.Fatalf("%s does not exit after SIGTERM", r.Name)
	}
}

// Kill kills the process with kill -9.
func (r *Replica) Kill() {
	_ = r.cmd.Process.Kill()
	<-r.done
}

// Freeze stops the process with SIGSTOP.
func (r *Replica) Freeze() {
	r.c.t.Helper()
	r.signal(syscall.SIGSTOP)
}

// Thaw ends Freeze.
func (r *Replica) Thaw() {
	r.c.t.Helper()
	r.signal(syscall.SIGCONT)
}

func (r *Replica) signal(sig syscall.Signal) {
	r.c.t.Helper()
	if !r.Running() {
		r.c.t.Fatalf("%s is not running", r.Name)
	}
	ctx, cancel := timeout()
	defer cancel()
	r.c.must("signal "+r.Name, localpg.SignalTree(ctx, r.cmd.Process.Pid, sig))
}

// LogLines returns the log lines that contain a text, from all starts of the replica.
func (r *Replica) LogLines(text string) []string {
	raw, _ := os.ReadFile(r.log)
	var lines []string
	for line := range strings.Lines(string(raw)) {
		if strings.Contains(line, text) {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	return lines
}

// WaitLog waits until at least n log lines contain a text.
func (r *Replica) WaitLog(text string, n int) {
	r.c.t.Helper()
	r.c.Eventually(fmt.Sprintf("%s logs %q", r.Name, text), func() bool { return len(r.LogLines(text)) >= n })
}

// A Response is a response of the API.
type Response struct {
	Status int
	Header http.Header
	Raw    []byte
	JSON   map[string]any // nil if the body is not a JSON object
}

// Text returns the value of a path in the JSON body, such as "app", "id". If the path
// does not exist it returns "".
func (r Response) Text(path ...string) string {
	var v any = r.JSON
	for _, name := range path {
		object, _ := v.(map[string]any)
		v = object[name]
	}
	if v == nil {
		return ""
	}
	return fmt.Sprint(v)
}

// Call sends a request with the token of a role. The body is encoded as JSON unless it
// is nil.
func (r *Replica) Call(method, path string, body any, role tenant.Role) Response {
	r.c.t.Helper()
	ctx, cancel := timeout()
	defer cancel()
	resp, err := r.TryCall(ctx, method, path, body, role)
	r.c.must(fmt.Sprintf("%s: %s %s", r.Name, method, path), err)
	return resp
}

// TryCall is Call with an error result: for a replica that may not respond, and for
// other goroutines.
func (r *Replica) TryCall(ctx context.Context, method, path string, body any, role tenant.Role) (Response, error) {
	return r.c.request(ctx, method, r.URL+path, body, r.c.Tokens[role])
}

func (c *Cluster) request(ctx context.Context, method, url string, body any, token string) (Response, error) {
	var raw []byte
	if body != nil {
		var err error
		if raw, err = json.Marshal(body); err != nil {
			return Response{}, err
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(raw))
	if err != nil {
		return Response{}, err
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return Response{}, err
	}
	defer func() { _ = resp.Body.Close() }()
	got := Response{Status: resp.StatusCode, Header: resp.Header}
	if got.Raw, err = io.ReadAll(resp.Body); err != nil {
		return Response{}, err
	}
	_ = json.Unmarshal(got.Raw, &got.JSON) // not every body is an object
	return got, nil
}

// SignUp signs a tenant up and returns its app and key; an existing tenant is no error.
// After 202 and 503 it retries.
func (r *Replica) SignUp(id string) (appID, key string) {
	r.c.t.Helper()
	var last Response
	r.c.Eventually("sign-up of "+id, func() bool {
		last = r.Call(http.MethodPut, "/v1/tenants/"+url.PathEscape(id), nil, tenant.Provisioner)
		switch last.Status {
		case http.StatusAccepted, http.StatusServiceUnavailable:
			return false
		case http.StatusOK, http.StatusCreated:
			return true
		}
		r.c.t.Fatalf("sign-up of %s: %d %s", id, last.Status, last.Raw)
		return false
	})
	return last.Text("app", "id"), last.Text("credentials", "key")
}

// RunCLI runs a tenantry command against the replica: with an admin token and with the
// replica's settings, DATABASE_URL among them.
func (r *Replica) RunCLI(stdin string, args ...string) Result {
	r.c.t.Helper()
	env := maps.Clone(r.env)
	maps.Copy(env, map[string]string{"TENANTRY_URL": r.URL, "TENANTRY_TOKEN": r.c.Tokens[tenant.Admin]})
	return r.c.RunCLI(env, stdin, args...)
}

// A Result is the output and the exit code of a command.
type Result struct {
	Stdout, Stderr string
	Code           int
}

// RunCLI runs a tenantry command with the cluster's settings and additional ones, such
// as DATABASE_URL.
func (c *Cluster) RunCLI(env map[string]string, stdin string, args ...string) Result {
	c.t.Helper()
	res, err := c.tryCLI(env, stdin, args...)
	c.must("tenantry "+strings.Join(args, " "), err)
	return res
}

func (c *Cluster) tryCLI(env map[string]string, stdin string, args ...string) (Result, error) {
	ctx, cancel := timeout()
	defer cancel()
	cmd := exec.CommandContext(ctx, binary.path, args...)
	all := maps.Clone(c.env)
	maps.Copy(all, env)
	var stdout, stderr strings.Builder
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = environ(all), strings.NewReader(stdin), &stdout, &stderr
	err := cmd.Run()
	if cmd.ProcessState == nil || ctx.Err() != nil {
		return Result{}, fmt.Errorf("%w: %s", err, stderr.String())
	}
	return Result{Stdout: stdout.String(), Stderr: stderr.String(), Code: cmd.ProcessState.ExitCode()}, nil
}

// environ returns the whole environment of a process. Empty variables are left out.
func environ(vars map[string]string) []string {
	env := []string{"PATH=" + os.Getenv("PATH")}
	for name, value := range vars {
		if value != "" {
			env = append(env, name+"="+value)
		}
	}
	return env
}
