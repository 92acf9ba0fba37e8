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
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/keyring"
	"github.com/tenantry/tenantry/internal/localpg"
	"github.com/tenantry/tenantry/internal/tenant"
)

const (
	operator = "acme"
	patience = time.Minute // with what should take a second or two
)

// A stage is everything that runs.
type stage struct {
	dir, bin string
	cluster  *localpg.Cluster
	programs []*program // that were started
	pat      string
	keyset   string // its file
	keys     *keyring.Keyring
	replicas int // so far
}

// A replica is a Tenantry with a database of its own.
type replica struct {
	*program
	stage    *stage
	name     string
	internal string // URL of its internal listener
	settings []string
	token    string // of a provisioner
	conn     *pgx.Conn
	clarifai *program
	number   int // among all
	made     int // ready apps so far
	turns    int // of sign-ups so far
}

// A program is one of the others.
type program struct {
	url  string
	log  string
	cmd  *exec.Cmd
	done <-chan struct{}
}

// freeAddr is an address of this machine that nobody listens on.
func freeAddr() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// run starts a program of ours, which need not answer yet.
func (s *stage) run(name, log string, env []string, args ...string) (*program, error) {
	addr, err := freeAddr()
	if err != nil {
		return nil, err
	}
	p := &program{url: "http://" + addr, log: filepath.Join(s.dir, log+".log"), cmd: exec.Command(filepath.Join(s.bin, name), append(args, "--addr", addr)...)}
	out, err := os.OpenFile(p.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() { _ = out.Close() }()
	p.cmd.Env, p.cmd.Stdout, p.cmd.Stderr = env, out, out
	if p.done, err = localpg.StartChild(p.cmd); err != nil {
		return nil, fmt.Errorf("%w (`make build` puts the programs beside this one)", err)
	}
	s.programs = append(s.programs, p)
	return p, nil
}

// answers waits until the program answers at url.
func (p *program) answers(ctx context.Context, url string, pause time.Duration) error {
	return await(ctx, url+" answers; the log is "+p.log, pause, patience, func() (bool, error) {
		select {
		case <-p.done:
			return false, fmt.Errorf("it has ended: %s", p.cmd.ProcessState)
		default:
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return false, err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return false, err
		}
		_ = resp.Body.Close()
		return resp.StatusCode == http.StatusOK, nil
	})
}

// end stops a program as an operator does.
func (p *program) end() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(patience):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

// await waits until ok, and says what it last heard if it waits in vain.
func await(ctx context.Context, what string, pause, patience time.Duration, ok func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		done, err := ok()
		if done {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("waited in vain: %s", what), err)
		case <-time.After(pause):
		}
	}
}

// raise starts Postgres, with the databases of pgbench and nothing else. What it returns is
// to be struck also where it fails.
func raise(ctx context.Context, dir string, settings ...string) (*stage, error) {
	s := &stage{dir: dir, keyset: filepath.Join(dir, "keyset.json")}
	self, err := os.Executable()
	if err != nil {
		return s, err
	}
	s.bin = filepath.Dir(self)
	secret := make([]byte, 16)
	_, _ = rand.Read(secret) // never fails
	s.pat = hex.EncodeToString(secret)
	if err := s.openCluster(ctx, settings...); err != nil {
		return s, err
	}
	if _, err := s.command(ctx, []string{"TENANTRY_KEYSET_FILE=" + s.keyset}, "keyset", "create"); err != nil {
		return s, err
	}
	s.keys, err = keyring.Load(s.keyset)
	return s, err
}

// openCluster starts Postgres with settings. It is no throwaway unless they say so: a sign-up
// that is answered is on disk.
func (s *stage) openCluster(ctx context.Context, settings ...string) (err error) {
	s.cluster, err = localpg.Open(ctx, localpg.Config{Dir: filepath.Join(s.dir, "postgres"), Settings: append([]string{"max_connections=250"}, settings...)})
	return err
}

// command runs a command of tenantry.
func (s *stage) command(ctx context.Context, env []string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(s.bin, "tenantry"), args...)
	var stderr bytes.Buffer
	cmd.Env, cmd.Stderr = env, &stderr
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("tenantry %s: %w: %s", args[0], err, stderr.Bytes())
	}
	return strings.TrimSpace(string(out)), err
}

// clarifai starts a simulated Clarifai that takes so long for each call.
func (s *stage) clarifai(ctx context.Context, log string, latency time.Duration) (*program, error) {
	p, err := s.run("clarifaisim", log, []string{"CLARIFAISIM_PAT=" + s.pat}, "--user-id", operator, "--rate-limit", "0", "--latency", latency.String())
	if err != nil {
		return nil, err
	}
	return p, p.answers(ctx, p.url+"/_sim/state", answerPause)
}

const (
	answerPause = 50 * time.Millisecond // between looks whether a program answers
	startPause  = 2 * time.Millisecond  // where the time until then is measured
)

// replica makes a database with a token, and starts a Tenantry on it with settings besides
// its own.
func (s *stage) replica(ctx context.Context, name string, clarifai *program, settings ...string) (*replica, error) {
	s.replicas++
	r := &replica{stage: s, name: name, clarifai: clarifai, settings: settings, number: s.replicas}
	if err := s.cluster.CreateDatabase(ctx, name); err != nil {
		return r, err
	}
	if _, err := s.command(ctx, r.env(), "migrate", "up"); err != nil {
		return r, err
	}
	var err error
	if r.token, err = s.command(ctx, r.env(), "token", "create", "--name", "bench", "--role", "provisioner"); err != nil {
		return r, err
	}
	if r.conn, err = pgx.Connect(ctx, s.cluster.URL(name)); err != nil {
		return r, err
	}
	if err := r.start(ctx, answerPause); err != nil {
		return r, err
	}
	return r, r.settled(ctx)
}

func (r *replica) env() []string {
	return append([]string{"DATABASE_URL=" + r.stage.cluster.URL(r.name), "CLARIFAI_PAT=" + r.stage.pat, "CLARIFAI_API_BASE=" + r.clarifai.url,
		// Databases with the same keyset, account and prefix would count as copies of each other.
		"TENANTRY_KEYSET_FILE=" + r.stage.keyset, "TENANTRY_PPROF=true", "TENANTRY_SHUTDOWN_DELAY=0s", fmt.Sprint("TENANTRY_APP_PREFIX=b", r.number)}, r.settings...)
}

// start starts its Tenantry, and waits until it is ready, of which it asks with pauses.
func (r *replica) start(ctx context.Context, pause time.Duration) error {
	internal, err := freeAddr()
	if err != nil {
		return err
	}
	r.internal = "http://" + internal
	if r.program, err = r.stage.run("tenantry", r.name, r.env(), "serve", "--internal-addr", internal); err != nil {
		return err
	}
	return r.answers(ctx, r.internal+"/readyz", pause)
}

// settled waits until apps can be built and pools are planned.
func (r *replica) settled(ctx context.Context) error {
	return await(ctx, "the control record is written, and the pool is planned; the log is "+r.log, answerPause, patience, func() (bool, error) {
		var is struct {
			State           string
			Control_Seen_At *time.Time
		}
		answer, err := r.get(ctx, "/v1/recovery")
		if err == nil {
			err = json.Unmarshal(answer, &is)
		}
		if err != nil || is.State != "none" || is.Control_Seen_At == nil {
			return false, err
		}
		var planned bool
		err = r.conn.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pools WHERE profile = $1)`, tenant.DefaultProfile).Scan(&planned)
		return planned || slices.Contains(r.settings, noPool), err
	})
}

// noPool is the setting of a Tenantry that keeps no app ready.
const noPool = "TENANTRY_POOL_MAX=0"

// Paused, a replica takes nothing of the processors: the others are measured.
func (r *replica) pause() { _ = r.cmd.Process.Signal(syscall.SIGSTOP) }

func (r *replica) goOn() { _ = r.cmd.Process.Signal(syscall.SIGCONT) }

// strike stops everything.
func (s *stage) strike() error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for _, p := range slices.Backward(s.programs) {
		_ = p.cmd.Process.Kill()
		<-p.done
	}
	if s.cluster == nil {
		return nil
	}
	return errors.Join(s.cluster.Stop(ctx), s.cluster.Remove())
}

func (r *replica) get(ctx context.Context, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.url+path, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+r.token)
	return answerOf(req)
}

func answerOf(req *http.Request) ([]byte, error) {
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode >= 300 {
		err = fmt.Errorf("%s %s answers %s: %s", req.Method, req.URL.Path, resp.Status, body)
	}
	return body, err
}

// withCPU adds to a measurement what Tenantry and Postgres used of the processors
// meanwhile. A nil replica used nothing, besides what measure has noted.
func (s *stage) withCPU(r *replica, measure func() (sample, error)) (sample, error) {
	tenantry := func() time.Duration {
		if r == nil {
			return 0
		}
		return cpuOf(r.cmd.Process.Pid)
	}
	tenantryBefore, postgresBefore := tenantry(), cpuOf(s.cluster.PID())
	got, err := measure()
	got.tenantryCPU += tenantry() - tenantryBefore
	got.postgresCPU = cpuOf(s.cluster.PID()) - postgresBefore
	return got, err
}

// cpuOf is how long a process and its children have run, also those that have ended,
// or 0 where there is no /proc to say so.
func cpuOf(pid int) time.Duration {
	files, _ := filepath.Glob("/proc/[0-9]*/stat") // the pattern is in order
	ticks := 0
	for _, file := range files {
		raw, err := os.ReadFile(file)
		if err != nil { // it has just ended, and counts for its parent
			continue
		}
		head, rest, _ := strings.Cut(string(raw), " (")
		rest = rest[strings.LastIndex(rest, ")")+1:] // the name before may hold anything
		fields := strings.Fields(rest)
		own := head == strconv.Itoa(pid)
		if len(fields) < 15 || !own && fields[1] != strconv.Itoa(pid) {
			continue
		}
		times := fields[11:13] // in user and kernel mode
		if own {
			times = fields[11:15] // and of children that were waited for
		}
		for _, text := range times {
			n, _ := strconv.Atoi(text)
			ticks += n
		}
	}
	return time.Duration(ticks) * 10 * time.Millisecond // a hundred a second, on every Linux that Go runs on
}

// ownCPU is how long this process has run, its children not counted.
func ownCPU() time.Duration {
	var used syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &used); err != nil {
		return 0
	}
	return time.Duration(used.Utime.Nano() + used.Stime.Nano())
}
