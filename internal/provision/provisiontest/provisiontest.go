// Package provisiontest runs the engine for tests: a real database, the
// simulated Clarifai over HTTP, and replicas that work as in production but are
// less patient.
package provisiontest

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/tenantry/tenantry/internal/clarifai"
	"github.com/tenantry/tenantry/internal/clarifaisim"
	"github.com/tenantry/tenantry/internal/keyring"
	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/tenant"
)

// PAT is the operator's Personal Access Token at the simulator, and Operator
// whose it is.
const (
	PAT      = "0123456789abcdef0123456789abcdef"
	Operator = tenant.UserID("acme")
)

// A World is a database and a Clarifai of one test's own.
type World struct {
	t    testing.TB
	URL  tenant.Secret // of the database
	Keys *keyring.Keyring
	// Keyset is the file that Keys is of.
	Keyset string
	Sim    *clarifaisim.Sim // nil in a World that was joined
	// Clarifai is where the simulator is.
	Clarifai string
}

// New makes a World. The simulator does not throttle and answers at once.
func New(t testing.TB) *World {
	t.Helper()
	url := pgtest.URL(t)
	if err := installWatch(t.Context(), url); err != nil {
		t.Fatal(err)
	}
	return NewOn(t, url)
}

// NewOn makes a World on a database that the test has made.
func NewOn(t testing.TB, url tenant.Secret) *World {
	t.Helper()
	w := &World{t: t, URL: url}
	w.Keyset, w.Keys = keyset(t)
	sim, err := clarifaisim.New(clarifaisim.Config{PATs: []clarifaisim.PAT{{Token: PAT, UserID: string(Operator)}}})
	if err != nil {
		t.Fatal(err)
	}
	w.Sim = sim
	srv := httptest.NewServer(w.Sim)
	t.Cleanup(func() { _ = w.Sim.Close(); srv.CloseClientConnections(); srv.Close() })
	w.Clarifai = srv.URL
	w.Settings(map[string]any{"rate_limit": 0})
	return w
}

// Join returns the World of another process, which has made it.
func Join(t testing.TB, url tenant.Secret, keyset, clarifai string) *World {
	t.Helper()
	keys, err := keyring.Load(keyset)
	if err != nil {
		t.Fatal(err)
	}
	return &World{t: t, URL: url, Keys: keys, Keyset: keyset, Clarifai: clarifai}
}

// Keyring makes a keyring of its own.
func Keyring(t testing.TB) *keyring.Keyring {
	t.Helper()
	_, keys := keyset(t)
	return keys
}

func keyset(t testing.TB) (path string, keys *keyring.Keyring) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "keyset.json")
	if err := keyring.Create(path); err != nil {
		t.Fatal(err)
	}
	keys, err := keyring.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	return path, keys
}

// AddPAT makes a PAT of another operator known to the simulator.
func (w *World) AddPAT(token, user string) {
	w.t.Helper()
	if err := w.Sim.AddPAT(clarifaisim.PAT{Token: token, UserID: user}); err != nil {
		w.t.Fatal(err)
	}
}

// Faults replaces the simulator's fault rules.
func (w *World) Faults(rules ...map[string]any) {
	w.t.Helper()
	if rules == nil {
		rules = []map[string]any{}
	}
	w.control("faults", rules)
}

// Settings changes settings of the simulator.
func (w *World) Settings(settings map[string]any) {
	w.t.Helper()
	w.control("settings", settings)
}

func (w *World) control(path string, body any) {
	w.t.Helper()
	raw, err := json.Marshal(body)
	if err != nil {
		w.t.Fatal(err)
	}
	resp, err := http.Post(w.Clarifai+"/_sim/"+path, "application/json", bytes.NewReader(raw))
	if err != nil {
		w.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusNoContent {
		text, _ := io.ReadAll(resp.Body)
		w.t.Fatalf("simulator's %s: %s: %s", path, resp.Status, text)
	}
}

// State is what the simulator holds and what it was asked.
type State struct {
	Apps  int            `json:"apps"`
	Keys  int            `json:"keys"`
	Calls map[string]int `json:"calls"`
}

// State reads what the simulator holds.
func (w *World) State() State {
	w.t.Helper()
	var s State
	w.read("state", &s)
	return s
}

// A SimKey is a key as the simulator holds it; its ID is its secret.
type SimKey struct {
	ID          string `json:"id"`
	AppID       string `json:"app_id"`
	Type        string `json:"type"`
	Description string `json:"description"`
}

// AppKeys lists the keys that the simulator holds for apps.
func (w *World) AppKeys() []SimKey {
	w.t.Helper()
	var all, keys []SimKey
	w.read("keys", &all)
	for _, k := range all {
		if k.AppID != "" {
			keys = append(keys, k)
		}
	}
	return keys
}

func (w *World) read(path string, v any) {
	w.t.Helper()
	resp, err := http.Get(w.Clarifai + "/_sim/" + path)
	if err != nil {
		w.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	if err := json.NewDecoder(resp.Body).Decode(v); err != nil {
		w.t.Fatal(err)
	}
}

// A Replica is one running engine.
type Replica struct {
	*provision.Service
	URL  tenant.Secret // of its database
	DB   *postgres.DB
	Reg  *prometheus.Registry
	Logs *observer.ObservedLogs
	stop func(leave bool)
}

// Options change how a replica runs.
type Options struct {
	PAT      string // default: PAT
	Adjust   func(*provision.Config)
	Clarifai string // default: the world's
	// Idle leaves out workers and sweep: another replica does the work.
	Idle bool
	// Control keeps the control record as in production. Otherwise the record of a new database
	// counts as known and not due.
	Control bool
	// Keyset is the file of a keyring of the replica's own, which it watches; default:
	// it shares the world's.
	Keyset string
	// Unwatched leaves the watching out: the file is read again only when something
	// cannot be opened.
	Unwatched bool
	// Through leads to the world's database by a pooler; unset means straight.
	Through tenant.Secret
	// Workers is how many builds run at once; 0 means 8.
	Workers int
	// Store and Upstream, unless nil, come between the engine and what it uses.
	Store    func(provision.Store) provision.Store
	Upstream func(provision.Upstream) provision.Upstream
}

// Start runs a replica until the test ends, or Stop.
func (w *World) Start(o Options) *Replica {
	w.t.Helper()
	r, err := w.TryStart(o)
	if err != nil {
		w.t.Fatalf("start replica: %v", err)
	}
	return r
}

// TryStart is Start for a test that expects a failure.
func (w *World) TryStart(o Options) (*Replica, error) {
	w.t.Helper()
	ctx := context.WithoutCancel(w.t.Context())
	keys, source, err := w.keysOf(o)
	if err != nil {
		return nil, err
	}
	core, logs := observer.New(zapcore.DebugLevel)
	log := zap.New(core)
	db := pgtest.OpenURL(w.t, w.URL)
	if o.Through.IsSet() {
		if db, err = postgres.Open(ctx, postgres.Config{URL: o.Through, DirectURL: w.URL, MaxConns: 8, Log: log}); err != nil {
			return nil, err
		}
		w.t.Cleanup(db.Close)
	}
	r := &Replica{URL: w.URL, DB: db, Reg: prometheus.NewRegistry(), Logs: logs}
	pat := provision.NewPAT(tenant.NewSecret(cmp.Or(o.PAT, PAT)), keys)
	if o.Clarifai == "" {
		o.Clarifai = w.Clarifai
	}
	if o.Store == nil {
		o.Store = func(s provision.Store) provision.Store { return s }
	}
	if o.Upstream == nil {
		o.Upstream = func(u provision.Upstream) provision.Upstream { return u }
	}
	cfg := provision.Config{
		Store: o.Store(r.DB), Keyring: keys, KeysetSource: source, Log: log, Metrics: provision.NewMetrics(r.Reg),
		Profiles: []tenant.Profile{
			{Name: tenant.DefaultProfile, BaseWorkflow: "Empty", KeyScopes: []string{"All"}},
			{Name: "narrow", BaseWorkflow: "Empty", KeyScopes: []string{"Predict", "Apps_Get"}},
		},
		AppPrefix: "t", Rate: 10000,
		CallTimeout: 500 * time.Millisecond, JobTimeout: 5 * time.Second, Lease: 6 * time.Second,
		Settle: 300 * time.Millisecond, SweepEvery: 50 * time.Millisecond, SealEvery: 50 * time.Millisecond,
		BackoffBase: 20 * time.Millisecond, BackoffCap: 200 * time.Millisecond,
		PauseBase: 20 * time.Millisecond, PauseCap: 200 * time.Millisecond,
		PATCheckBase: 50 * time.Millisecond, PATCheckCap: 200 * time.Millisecond, PATTrust: 100 * time.Millisecond,
	}
	if o.Adjust != nil {
		o.Adjust(&cfg)
	}
	client, err := clarifai.New(clarifai.Config{BaseURL: o.Clarifai, PAT: pat.Secret, Timeout: cfg.CallTimeout})
	if err != nil {
		return nil, err
	}
	w.t.Cleanup(client.Close)
	deployment, err := provision.Pin(ctx, o.Store(r.DB), o.Upstream(client), pat, cfg.Rate, keys, log)
	if err != nil {
		return nil, err
	}
	if !o.Control {
		pgtest.KnowControl(w.t, w.URL)
	}
	cfg.Deployment, cfg.Upstream, cfg.PAT = deployment, o.Upstream(client.As(deployment.Operator)), pat
	if r.Service, err = provision.New(cfg); err != nil {
		return nil, err
	}
	if err := r.work(ctx, log, o); err != nil {
		return nil, err
	}
	w.t.Cleanup(r.Stop)
	return r, nil
}

func (w *World) keysOf(o Options) (*keyring.Keyring, *keyring.Source, error) {
	if o.Keyset == "" {
		return w.Keys, nil, nil
	}
	source := &keyring.Source{Path: o.Keyset}
	keys, err := source.Load(w.t.Context())
	return keys, source, err
}

// SetRecovery is a statement that sets the state of recovery mode, or ends it.
func SetRecovery(state tenant.RecoveryState) string {
	return `UPDATE current_incarnation SET recovery = nullif('` + string(state) + `', ''), recovery_since = CASE WHEN '` + string(state) + `' <> '' THEN now() END,
		recovery_reason = 'a test', watch_until = now() + interval '1 day', control_due_at = 'infinity', written_by = pg_current_xact_id()::xid;`
}

// keysetWatchInterval is short: tests wait for it.
const keysetWatchInterval = 50 * time.Millisecond

func (r *Replica) work(ctx context.Context, log *zap.Logger, o Options) error {
	ctx, cancel := context.WithCancel(ctx)
	var loops sync.WaitGroup
	stopWork := func() {}
	if !o.Idle {
		workers := r.StartWork(ctx, cmp.Or(o.Workers, 8))
		stopWork = func() {
			now, cancel := context.WithCancel(context.WithoutCancel(ctx))
			cancel()
			_ = workers.Stop(now)
		}
		loops.Go(func() { _ = r.Sweep(ctx) })
		loops.Go(func() { _ = r.KeepControl(ctx) })
		loops.Go(func() { _ = r.SealAudit(ctx) })
		loops.Go(func() { _ = r.Reseal(ctx) })
	}
	if o.Keyset != "" && !o.Unwatched {
		loops.Go(func() { r.WatchKeyset(ctx, keysetWatchInterval) })
	}
	loops.Go(func() { _ = r.DB.Listen(ctx, log) })
	loops.Go(func() { _ = r.DB.Follow(ctx, log) })
	var once sync.Once
	r.stop = func(leave bool) {
		once.Do(func() {
			r.Drain()
			stopWork()
			cancel()
			loops.Wait()
			if o.Control && !o.Idle && leave {
				leaving, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
				defer cancel()
				if err := r.LeaveControl(leaving); err != nil {
					log.Warn("leave", zap.Error(err))
				}
			}
		})
	}
	return nil
}

// SignUp signs a tenant up and says whether that made it.
func (r *Replica) SignUp(ctx context.Context, id tenant.ID, up tenant.SignUp, wait time.Duration, actor tenant.Actor) (tenant.Tenant, bool, error) {
	got, err := r.Service.SignUp(ctx, id, up, wait, actor)
	return got.Tenant, got.Created, err
}

// Stop ends what the replica does in the background.
func (r *Replica) Stop() { r.stop(true) }

// Kill is Stop for a replica that cannot say that it has stopped.
func (r *Replica) Kill() { r.stop(false) }

// Eventually waits until ok is true, and fails the test if it takes too long.
func Eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.NewTimer(30 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-deadline.C:
			t.Fatalf("waited in vain: %s", what)
		case <-tick.C:
		}
	}
}
