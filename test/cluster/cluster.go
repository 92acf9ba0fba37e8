// Package cluster starts a whole deployment for tests: Tenantry replicas as real
// processes, a TCP proxy in front of the database, a real Postgres primary with
// standbys, and a simulated Clarifai. Tests fail over, kill, freeze, copy and restore
// its parts.
//
// TestMain of a package calls Main. Methods without an error result end the test on an
// error, so call them on the test's goroutine only. Every wait has a deadline.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/tenantry/tenantry/internal/clarifaisim"
	"github.com/tenantry/tenantry/internal/localpg"
	"github.com/tenantry/tenantry/internal/tenant"
)

const (
	// Database is the name of Tenantry's database.
	Database = "tenantry"
	// PAT is the operator's Personal Access Token at the simulator, Operator its user.
	PAT      = "0123456789abcdef0123456789abcdef"
	Operator = "acme"
)

// limit is the maximum duration of one step. A busy machine needs it long.
const limit = time.Minute

func timeout() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), limit)
}

// binary is the tenantry executable of this test process.
var binary struct {
	once sync.Once
	dir  string // set by Main
	path string
	err  error
}

// Main runs the tests of a package and fails if they leave goroutines behind.
func Main(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "tenantry-build-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	binary.dir = dir
	if code := m.Run(); code != 0 {
		return code
	}
	if err := goleak.Find(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// build builds tenantry once per test process.
func build() error {
	binary.once.Do(func() {
		if binary.dir == "" {
			binary.err = errors.New("TestMain must call cluster.Main")
			return
		}
		binary.path = filepath.Join(binary.dir, "tenantry")
		if binary.err = statSources(); binary.err != nil {
			return
		}
		// Without debug information linking takes half the time.
		out, err := exec.Command("go", "build", "-buildvcs=false", "-ldflags=-s -w", "-o", binary.path, "github.com/tenantry/tenantry/cmd/tenantry").CombinedOutput()
		if err != nil {
			binary.err = fmt.Errorf("build tenantry: %w\n%s", err, out)
		}
	})
	return binary.err
}

// statSources makes the results of `go test` depend on the source of tenantry. Go caches
// them by the files that a test process itself has touched, and `go build` is another.
func statSources() error {
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return fmt.Errorf("find the module: %w", err)
	}
	root := filepath.Dir(strings.TrimSpace(string(out)))
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != root && strings.HasPrefix(d.Name(), "."):
			return filepath.SkipDir
		case d.IsDir() || slices.Contains([]string{".go", ".mod", ".sql", ".yaml"}, filepath.Ext(path)):
			_, _ = os.Stat(path)
		}
		return nil
	})
}

// SkipUnlessFull skips a slow scenario unless CHECK_FULL=1 is set.
func SkipUnlessFull(t testing.TB) {
	t.Helper()
	if os.Getenv("CHECK_FULL") != "1" {
		t.Skip("slow; CHECK_FULL=1 runs it")
	}
}

// Options define what New starts. The zero value is a primary with a migrated
// database, and no replica.
type Options struct {
	Standbys int // asynchronous standbys of the primary
	Replicas int // Tenantry replicas, all connected through Cluster.Proxy
	// Env are additional settings of all replicas and commands.
	Env map[string]string
	// PostgresSettings are additional settings of all servers, as name=value.
	PostgresSettings []string
}

// A Cluster belongs to one test. A failover changes no field: Primary stays the server
// that New started as the primary.
type Cluster struct {
	Primary  *Server
	Standbys []*Server // that Options asked for
	Proxy    *Proxy    // the replicas' way to the database; New targets Primary
	Replicas []*Replica
	Sim      *clarifaisim.Sim // in this process, without a rate limit
	SimURL   string
	Tokens   map[tenant.Role]string // one API token per role

	t       testing.TB
	options Options
	dir     string
	env     map[string]string // of all Tenantry processes
	http    *http.Client
	endSim  func()
	servers []*Server
	proxies []*Proxy

	standbys, copies int // number of names used
}

// New starts a cluster and stops it at the end of the test. If Postgres is missing and
// cannot be installed, the test is skipped, or fails if CI is set.
func New(t testing.TB, o Options) *Cluster {
	t.Helper()
	c := &Cluster{t: t, options: o, http: &http.Client{Transport: &http.Transport{}}, Tokens: map[tenant.Role]string{}}
	built := make(chan error, 1)
	go func() { built <- build() }()
	t.Cleanup(func() { <-built; c.end() })
	var err error
	c.dir, err = os.MkdirTemp("", "tenantry-cluster-")
	c.must("make the directory of the cluster", err)
	c.must("make the directory of the cluster", os.Chmod(c.dir, 0o755)) // Postgres runs as another user
	c.Primary = c.open("primary")
	c.startSim()
	c.env = map[string]string{"TENANTRY_ADDR": "127.0.0.1:0", "TENANTRY_INTERNAL_ADDR": "127.0.0.1:0",
		"TENANTRY_KEYSET_FILE": filepath.Join(c.dir, "keyset.json"), "TENANTRY_UPSTREAM_RATE": "1000",
		"CLARIFAI_PAT": PAT, "CLARIFAI_API_BASE": c.SimURL}
	maps.Copy(c.env, o.Env)
	c.Primary.CreateDatabase(Database)
	err = <-built
	built <- nil
	c.must("build", err)
	c.prepare()
	for range o.Standbys {
		c.Standbys = append(c.Standbys, c.AddStandby(c.Primary))
	}
	c.Proxy = c.NewProxy(c.Primary)
	for range o.Replicas {
		c.NewReplica(ReplicaOptions{}).Launch()
	}
	for _, r := range c.Replicas {
		r.WaitReady()
	}
	return c
}

func (c *Cluster) startSim() {
	c.t.Helper()
	settings := clarifaisim.DefaultSettings()
	settings.RateLimit = 0
	sim, err := clarifaisim.New(clarifaisim.Config{PATs: []clarifaisim.PAT{{Token: PAT, UserID: Operator}}, Settings: &settings})
	c.must("start the simulator", err)
	c.Sim = sim
	srv := httptest.NewServer(sim)
	c.SimURL = srv.URL
	c.endSim = func() { _ = sim.Close(); srv.CloseClientConnections(); srv.Close() }
}

// prepare creates the keyset, the schema and the tokens.
func (c *Cluster) prepare() {
	c.t.Helper()
	env := map[string]string{"DATABASE_URL": c.Primary.URL(Database)}
	command := func(args ...string) (string, error) {
		res, err := c.tryCLI(env, "", args...)
		if err == nil && res.Code != 0 {
			err = fmt.Errorf("exit code %d: %s", res.Code, res.Stderr)
		}
		return strings.TrimSpace(res.Stdout), err
	}
	for _, args := range [][]string{{"keyset", "create"}, {"migrate", "up"}} {
		_, err := command(args...)
		c.must("tenantry "+args[0], err)
	}
	var wg sync.WaitGroup
	tokens, errs := make([]string, len(tenant.Roles)), make([]error, len(tenant.Roles))
	for i, role := range tenant.Roles {
		wg.Go(func() { tokens[i], errs[i] = command("token", "create", "--name", "test", "--role", string(role)) })
	}
	wg.Wait()
	c.must("tenantry token create", errors.Join(errs...))
	for i, role := range tenant.Roles {
		c.Tokens[role] = tokens[i]
	}
}

// NewProxy starts a proxy to a server, for replicas that must not share Cluster.Proxy.
func (c *Cluster) NewProxy(target *Server) *Proxy {
	c.t.Helper()
	p, err := newProxy(target)
	c.must("start a proxy", err)
	c.proxies = append(c.proxies, p)
	return p
}

// Faults replaces the fault rules of the simulator.
func (c *Cluster) Faults(rules ...clarifaisim.Fault) {
	c.t.Helper()
	c.must("set faults", c.Sim.SetFaults(rules))
}

// Settings changes settings of the simulator.
func (c *Cluster) Settings(edit func(*clarifaisim.Settings)) {
	c.t.Helper()
	c.must("set settings", c.Sim.Update(edit))
}

// Eventually polls ok until it returns true. After a minute the test fails.
func (c *Cluster) Eventually(what string, ok func() bool) {
	c.t.Helper()
	deadline := time.NewTimer(limit)
	defer deadline.Stop()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-deadline.C:
			c.t.Fatalf("timed out after %s: %s", limit, what)
		case <-tick.C:
		}
	}
}

func (c *Cluster) must(what string, err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatalf("%s: %v", what, err)
	}
}

// mustTool is must for pg_dump and psql. A downloaded Postgres lacks them: the test is
// skipped, or fails if CI is set.
func (c *Cluster) mustTool(what string, err error) {
	c.t.Helper()
	if errors.Is(err, os.ErrNotExist) && os.Getenv("CI") == "" {
		c.t.Skipf("%s: %v", what, err)
	}
	c.must(what, err)
}

// end ends every process by its own id and removes all files. Replicas are killed: a
// test of the shutdown calls Stop.
func (c *Cluster) end() {
	for _, r := range c.Replicas {
		if r.Running() {
			r.Kill()
		}
	}
	for _, p := range c.proxies {
		p.close()
	}
	for _, s := range c.servers {
		if s.running() {
			ctx, cancel := timeout()
			_ = localpg.SignalTree(ctx, s.pg.PID(), syscall.SIGCONT) // it may be frozen, or partly
			cancel()
			_ = s.pg.Kill()
		}
		if err := s.pg.Remove(); err != nil {
			c.t.Errorf("remove %s: %v", s.Name, err)
		}
	}
	if c.endSim != nil {
		c.endSim()
	}
	c.http.CloseIdleConnections()
	if c.t.Failed() {
		for _, r := range c.Replicas {
			c.t.Logf("%s, last lines of its log:\n%s", r.Name, lastLines(strings.Join(r.LogLines(""), "\n")))
		}
		for _, s := range c.servers {
			c.t.Logf("%s, last lines of its log:\n%s", s.Name, lastLines(s.Log()))
		}
	}
	if err := os.RemoveAll(c.dir); err != nil {
		c.t.Errorf("remove the files of the cluster: %v", err)
	}
}

func lastLines(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-30):], "\n")
}
