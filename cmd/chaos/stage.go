package main

import (
	"bytes"
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
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/tenantry/tenantry/internal/clarifaisim"
	"github.com/tenantry/tenantry/internal/localpg"
)

const (
	operator = "acme"
	rate     = 14 // of Tenantry, below what the simulator allows
)

// A setting says what a stage is to be.
type setting struct {
	replicas    int
	throttle    int  // calls a second that Clarifai allows; 0 means any number
	connections int  // of a replica to Postgres
	pool        int  // apps that are kept ready at most; 0 means none
	items       int  // that one call may make for builds of the first replica; 0 means one
	fast        bool // at no particular rate of calls, until replicas are started with another environment
}

// A stage is everything that runs.
type stage struct {
	setting
	dir      string
	bin      string // where the other programs are
	cluster  *localpg.Cluster
	clarifai *program
	running  []*program // replicas
	pat      string
	pats     []string // all that there were
	token    string   // of a provisioner
	env      []string // of Tenantry
	admin    string
	byHand   []account // apps that were made before there was Tenantry
	control  string    // the app whose metadata is the control record

	callsMu sync.Mutex
	calls   []clarifaisim.Call // of simulators that have ended
	missed  int                // logs of a simulator that could not be read
}

// A program is one of the others, which is stopped, killed and started again at
// the same address.
type program struct {
	name, addr string
	url        string
	args, env  []string
	log        string
	cmd        *exec.Cmd
	done       <-chan struct{}
	// terms and kills count how often it was told to end, and made to.
	terms, kills atomic.Int64
}

func (p *program) start() error {
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	p.cmd = exec.Command(p.args[0], p.args[1:]...)
	p.cmd.Env, p.cmd.Stdout, p.cmd.Stderr = p.env, log, log
	p.done, err = localpg.StartChild(p.cmd)
	return err
}

// kill ends a program at once, term as it is asked to.
func (p *program) kill() {
	p.kills.Add(1)
	_ = p.cmd.Process.Kill()
	<-p.done
}

func (p *program) term() error {
	p.terms.Add(1)
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
		return nil
	case <-time.After(40 * time.Second):
		p.kill()
		return fmt.Errorf("%s did not end within 40 s of SIGTERM; its log is %s", p.name, p.log)
	}
}

// up waits until a program answers, at the path that says so.
func (p *program) up(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		resp, err := getURL(ctx, p.url+path)
		if err == nil {
			_ = resp.Body.Close()
			if resp.StatusCode == http.StatusOK || resp.StatusCode == http.StatusUnauthorized {
				return nil
			}
		}
		select {
		case <-p.done:
			return fmt.Errorf("%s has ended (%s); its log is %s", p.name, p.cmd.ProcessState, p.log)
		case <-ctx.Done():
			return fmt.Errorf("%s does not answer; its log is %s", p.name, p.log)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func getURL(ctx context.Context, url string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	return http.DefaultClient.Do(req)
}

// raise starts everything, and waits until apps can be built.
func raise(ctx context.Context, dir string, set setting) (s *stage, err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	s = &stage{setting: set, dir: dir, bin: filepath.Dir(self)}
	s.newPAT()
	defer func() {
		if err != nil {
			err = errors.Join(err, s.strike())
		}
	}()
	// Not a throwaway: what it has committed it must keep when it crashes.
	if s.cluster, err = localpg.Open(ctx, localpg.Config{Dir: filepath.Join(dir, "postgres")}); err != nil {
		return s, err
	}
	if err := s.cluster.CreateDatabase(ctx, "tenantry"); err != nil {
		return s, err
	}
	if err := s.startClarifai(ctx); err != nil {
		return s, err
	}
	return s, s.startTenantry(ctx)
}

// newPAT makes another PAT.
func (s *stage) newPAT() {
	secret := make([]byte, 16)
	_, _ = rand.Read(secret) // never fails
	s.pat = hex.EncodeToString(secret)
	s.pats = append(s.pats, s.pat)
}

func (s *stage) file(name string) string { return filepath.Join(s.dir, name) }

func (s *stage) startClarifai(ctx context.Context) error {
	addr, err := freeAddr()
	if err != nil {
		return err
	}
	s.clarifai = &program{name: "clarifaisim", addr: addr, url: "http://" + addr, log: s.file("clarifaisim.log"),
		args: []string{filepath.Join(s.bin, "clarifaisim"), "--addr", addr, "--user-id", operator, "--rate-limit", fmt.Sprint(s.throttle),
			"--latency", "50ms", "--state-file", s.file("clarifai.jsonl")},
		env: []string{"CLARIFAISIM_PAT=" + s.pat}}
	if err := s.clarifai.start(); err != nil {
		return fmt.Errorf("%w (`make build` puts the programs beside this one)", err)
	}
	return s.clarifai.up(ctx, "/_sim/state")
}

func (s *stage) startTenantry(ctx context.Context) error {
	s.env = []string{"DATABASE_URL=" + s.cluster.URL("tenantry"), "CLARIFAI_PAT=" + s.pat, "CLARIFAI_API_BASE=" + s.clarifai.url,
		"TENANTRY_KEYSET_FILE=" + s.file("keyset.json"), fmt.Sprint("TENANTRY_UPSTREAM_RATE=", rate),
		fmt.Sprint("TENANTRY_DATABASE_MAX_CONNS=", s.connections), fmt.Sprint("TENANTRY_POOL_MAX=", s.pool),
		// Each crash of Postgres starts a watch. A shorter watch renews the control record more often.
		"TENANTRY_RECOVERY_WATCH=10s", "TENANTRY_SHUTDOWN_DELAY=1s"}
	if s.fast {
		s.env = append(s.env, "TENANTRY_UPSTREAM_RATE=1000")
	}
	for _, args := range [][]string{{"keyset", "create"}, {"migrate", "up"}} {
		if _, err := s.command(ctx, args...); err != nil {
			return err
		}
	}
	var err error
	if s.token, err = s.command(ctx, "token", "create", "--name", "chaos", "--role", "provisioner"); err != nil {
		return err
	}
	if s.admin, err = s.command(ctx, "token", "create", "--name", "chaos", "--role", "admin"); err != nil {
		return err
	}
	for range s.replicas {
		if _, err := s.addReplica(ctx); err != nil {
			return err
		}
	}
	return await(ctx, time.Minute, "the control record is written", func() (bool, error) {
		var is struct {
			Control_Seen_At *time.Time
			Control_App     string
		}
		err := s.ask(ctx, http.MethodGet, "/v1/recovery", nil, &is)
		s.control = is.Control_App
		return err == nil && is.Control_Seen_At != nil, err
	})
}

// command runs tenantry as an operator does, and returns what it prints.
func (s *stage) command(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(s.bin, "tenantry"), args...)
	var stderr bytes.Buffer
	cmd.Env, cmd.Stderr = s.env, &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("tenantry %s: %w: %s", args[0], err, stderr.Bytes())
	}
	return strings.TrimSpace(string(out)), err
}

// addReplica starts one more replica.
func (s *stage) addReplica(ctx context.Context) (*program, error) {
	addr, err := freeAddr()
	if err != nil {
		return nil, err
	}
	name := fmt.Sprint("tenantry-", len(s.running)+1)
	p := &program{name: name, addr: addr, url: "http://" + addr, log: s.file(name + ".log"),
		args: []string{filepath.Join(s.bin, "tenantry"), "serve", "--addr", addr, "--internal-addr", "127.0.0.1:0"}, env: s.env}
	if len(s.running) == 0 && s.items > 1 {
		p.env = append(slices.Clone(s.env), fmt.Sprint("TENANTRY_ITEMS_PER_CALL=", s.items))
	}
	if err := p.start(); err != nil {
		return nil, err
	}
	s.running = append(s.running, p)
	return p, p.up(ctx, "/v1/upstream")
}

// strike stops everything.
func (s *stage) strike() error {
	var faults []error
	for _, p := range append(s.running, s.clarifai) {
		if p != nil && p.cmd != nil && p.done != nil {
			p.kill()
		}
	}
	if s.cluster != nil {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		faults = append(faults, s.cluster.Stop(ctx), s.cluster.Remove())
	}
	return errors.Join(faults...)
}

func freeAddr() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer func() { _ = l.Close() }()
	return l.Addr().String(), nil
}

// await waits until ok, and says what it last heard if it waits in vain.
func await(ctx context.Context, limit time.Duration, what string, ok func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var last error
	for {
		done, err := ok()
		if done {
			return nil
		}
		if ctx.Err() == nil { // or else err is about the end of the wait
			last = err
		}
		select {
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("waited in vain: %s", what), last)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// ask asks any replica as admin, and decodes what it answers.
func (s *stage) ask(ctx context.Context, method, path string, body, answer any) error {
	return s.as(ctx, s.admin, method, path, body, answer)
}

// as is ask for another caller, with headers.
func (s *stage) as(ctx context.Context, token, method, path string, body, answer any, headers ...string) error {
	var last error
	for _, p := range s.running {
		raw, err := json.Marshal(body)
		if err != nil {
			return err
		}
		if body == nil {
			raw = nil
		}
		req, err := http.NewRequestWithContext(ctx, method, p.url+path, bytes.NewReader(raw))
		if err != nil {
			return err
		}
		req.Header.Set("Authorization", "Bearer "+token)
		for i := 0; i+1 < len(headers); i += 2 {
			req.Header.Set(headers[i], headers[i+1])
		}
		if last = decode(req, answer); last == nil {
			return nil
		}
	}
	return last
}

// sim asks the control side of the simulator.
func (s *stage) sim(ctx context.Context, method, path string, body, answer any) error {
	raw, err := json.Marshal(body)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, method, s.clarifai.url+"/_sim/"+path, bytes.NewReader(raw))
	if err != nil {
		return err
	}
	return decode(req, answer)
}

func decode(req *http.Request, answer any) error {
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	if resp.StatusCode >= 300 {
		return fmt.Errorf("%s %s answers %s: %s", req.Method, req.URL.Path, resp.Status, raw)
	}
	if answer == nil {
		return nil
	}
	return json.Unmarshal(raw, answer)
}

// keepCalls keeps the simulator's log of calls, which ends with it.
func (s *stage) keepCalls(ctx context.Context) {
	var calls []clarifaisim.Call
	err := s.sim(ctx, http.MethodGet, "calls", nil, &calls)
	s.callsMu.Lock()
	defer s.callsMu.Unlock()
	if err != nil {
		s.missed++
		return
	}
	s.calls = append(s.calls, calls...)
}
