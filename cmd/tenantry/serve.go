package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sync/errgroup"

	"github.com/tenantry/tenantry/internal/clarifai"
	"github.com/tenantry/tenantry/internal/httpapi"
	"github.com/tenantry/tenantry/internal/keyring"
	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/tenant"
)

type serveCmd struct {
	databaseFlags
	Addr            string        `env:"TENANTRY_ADDR" default:":8080" help:"Where the API listens; port 0 takes a free one."`
	InternalAddr    string        `env:"TENANTRY_INTERNAL_ADDR" default:"127.0.0.1:8081" help:"Where /livez, /readyz, /readyz/writes, /readyz/lookups and /metrics listen."`
	Pprof           bool          `env:"TENANTRY_PPROF" help:"Serve profiles of the process at /debug/pprof/ of the internal listener, for go tool pprof."`
	AddrFile        string        `env:"TENANTRY_ADDR_FILE" placeholder:"FILE" help:"File to write the two URLs to once they are listened on."`
	ShutdownDelay   time.Duration `env:"TENANTRY_SHUTDOWN_DELAY" default:"5s" help:"On SIGTERM, how long to continue to serve requests while /readyz returns 503 and each response closes its connection. Clients and load balancers need this time to change to another replica."`
	ShutdownTimeout time.Duration `env:"TENANTRY_SHUTDOWN_TIMEOUT" default:"20s" help:"How long requests and jobs under way may take to end."`

	DatabaseMaxConns int32 `env:"TENANTRY_DATABASE_MAX_CONNS" default:"16" help:"Most connections to the database, and as many direct ones where they differ."`

	CacheEntries int           `env:"TENANTRY_CACHE_ENTRIES" default:"200000" help:"Most rows that look-ups are answered from without asking the database; 0 asks it each time. A tenant takes 1 to 3: itself, its keys and whose its app is."`
	MaxStale     time.Duration `env:"TENANTRY_MAX_STALE" default:"15m" help:"How long look-ups are answered from them while the database cannot be reached; 0s does not."`

	KeysetFile string `env:"TENANTRY_KEYSET_FILE" placeholder:"FILE" help:"File with the keyset. Without it: TENANTRY_KEYSET, the keyset itself."`
	kmsFlags

	PATFile         string        `name:"clarifai-pat-file" env:"CLARIFAI_PAT_FILE" placeholder:"FILE" help:"File with the operator's PAT. Without it: CLARIFAI_PAT."`
	APIBase         string        `name:"clarifai-api-base" env:"CLARIFAI_API_BASE" default:"https://api.clarifai.com" help:"Where Clarifai is."`
	UpstreamRate    float64       `env:"TENANTRY_UPSTREAM_RATE" default:"14" help:"Most calls a second to Clarifai, of all replicas together; Clarifai allows 15 by default. Every replica must have the same."`
	UpstreamTimeout time.Duration `env:"TENANTRY_UPSTREAM_TIMEOUT" default:"5s" help:"Longest call to Clarifai, 7.5s at most."`
	Workers         int           `env:"TENANTRY_WORKERS" default:"32" help:"Builds at once in this replica."`

	ItemsPerCall int `env:"TENANTRY_ITEMS_PER_CALL" default:"1" help:"Most apps, or keys, that one call to Clarifai makes for tenants of an import and for pools, 1 to 100. How Clarifai fails such calls in part is not public: try it before you rely on it."`

	ReadOnly      bool          `env:"TENANTRY_READ_ONLY" help:"Serve lookups only: for a copy of the database, such as staging or a restore drill. Does no work at Clarifai, and needs neither PAT nor keyset: CLARIFAI_PAT must not be set."`
	RecoveryWatch time.Duration `env:"TENANTRY_RECOVERY_WATCH" default:"150s" help:"After a restart, failover, restore or copy of the database, how long to watch whether another database of this deployment is in use. Every replica must have the same."`

	ReportInterval time.Duration `env:"TENANTRY_REPORT_INTERVAL" default:"24h" help:"How often Clarifai is compared with the database; changes nothing."`
	RemovalCap     int           `env:"TENANTRY_REMOVAL_CAP" default:"100" help:"Most apps and keys that repairs remove in an hour."`
	MarkTenants    bool          `env:"TENANTRY_MARK_TENANTS" default:"true" negatable:"" help:"Write the tenant, sealed, into its app's metadata at Clarifai: from it the mapping is rebuilt if the database is lost."`

	AppPrefix    string   `env:"TENANTRY_APP_PREFIX" default:"tny" help:"How the ids of apps begin: 1 to 5 of a-z and 0-9."`
	ProfilesFile string   `env:"TENANTRY_PROFILES_FILE" placeholder:"FILE" help:"File with the profiles; tenantry profile check says what is wrong with one. Without it there is one profile, default, of the next four settings."`
	KeyScopes    []string `env:"TENANTRY_KEY_SCOPES" placeholder:"All" help:"Scopes of the tenants' keys, by comma."`
	BaseWorkflow string   `env:"TENANTRY_BASE_WORKFLOW" placeholder:"Empty" help:"Base workflow of the apps, of clarifai/main."`
	PoolMin      int      `env:"TENANTRY_POOL_MIN" default:"2" help:"Fewest apps that are kept ready ahead of need."`
	PoolMax      int      `env:"TENANTRY_POOL_MAX" default:"20" help:"Most of them; 0 keeps none."`

	LogLevel  string `env:"TENANTRY_LOG_LEVEL" enum:"debug,info,warn,error" default:"info" help:"Least important lines to log: ${enum}."`
	LogFormat string `env:"TENANTRY_LOG_FORMAT" enum:"json,console" default:"json" help:"${enum}."`
}

// A plan is the settings of serve, checked and read.
type plan struct {
	database postgres.Config
	keyset   keyring.Source
	keys     *keyring.Keyring
	upstream *clarifai.Client
	pat      *provision.PAT
	profiles []tenant.Profile
	warnings []string // of the profiles
	workers  int
}

// check reads the settings and reports every fault of theirs at once. Observe is
// told of each call to Clarifai.
func (c serveCmd) check(e env, observe func(call, outcome string, took time.Duration)) (plan, error) {
	var p plan
	var faults []error
	note := func(err error) {
		if err != nil {
			faults = append(faults, err)
		}
	}
	var err error
	p.database.URL, p.database.DirectURL, err = c.urls(e)
	note(err)
	// The files are read for each new connection: a password is replaced without a restart.
	if c.DatabaseURLFile != "" {
		p.database.RereadURL = func() (tenant.Secret, error) { return secretSetting(e, "DATABASE_URL", c.DatabaseURLFile) }
	}
	if c.DatabaseDirectURLFile != "" {
		p.database.RereadDirectURL = func() (tenant.Secret, error) { return secretSetting(e, "DATABASE_DIRECT_URL", c.DatabaseDirectURLFile) }
	}
	p.database.Standby = c.ReadOnly
	p.database.MaxConns = c.DatabaseMaxConns
	if c.DatabaseMaxConns < 2 || c.DatabaseMaxConns > 1000 {
		note(fmt.Errorf("TENANTRY_DATABASE_MAX_CONNS: %d must be from 2 to 1000", c.DatabaseMaxConns))
	}
	p.database.CacheEntries, p.database.MaxStale = c.CacheEntries, c.MaxStale
	if c.CacheEntries < 0 || c.CacheEntries > 100_000_000 {
		note(fmt.Errorf("TENANTRY_CACHE_ENTRIES: %d must be from 0 to 100000000", c.CacheEntries))
	}
	if c.MaxStale < 0 {
		note(fmt.Errorf("TENANTRY_MAX_STALE: %s must not be negative", c.MaxStale))
	}
	note(checkAddr("TENANTRY_ADDR", c.Addr))
	note(checkAddr("TENANTRY_INTERNAL_ADDR", c.InternalAddr))
	if p.database.RecoveryWatch = c.RecoveryWatch; c.RecoveryWatch < time.Second {
		note(fmt.Errorf("TENANTRY_RECOVERY_WATCH: %s must be at least 1s", c.RecoveryWatch))
	}
	pat, err := secretSetting(e, "CLARIFAI_PAT", c.PATFile)
	note(err)
	switch {
	case c.ReadOnly:
		if err != nil || pat.IsSet() {
			note(errors.New("TENANTRY_READ_ONLY: a PAT is set, but a read-only service must not be able to call Clarifai: unset CLARIFAI_PAT and CLARIFAI_PAT_FILE"))
		}
		p.database.CacheEntries = 0 // a cache needs a follower of the change log
	case err == nil && !pat.IsSet():
		note(errors.New("the operator's PAT is missing: set CLARIFAI_PAT or CLARIFAI_PAT_FILE"))
	case err == nil:
		if err := clarifai.CheckPAT(pat); err != nil {
			note(fmt.Errorf("%s: %w", variableOf("CLARIFAI_PAT", c.PATFile), err))
		}
	}
	if !c.ReadOnly {
		p.keyset, p.keys, err = c.keyring(e)
		note(err)
	}
	if pat.IsSet() && p.keys != nil {
		p.pat = provision.NewPAT(pat, p.keys)
	}
	if c.UpstreamTimeout <= 0 {
		note(fmt.Errorf("TENANTRY_UPSTREAM_TIMEOUT: %s must be more than 0", c.UpstreamTimeout))
	} else if p.upstream, err = clarifai.New(clarifai.Config{BaseURL: c.APIBase, PAT: p.pat.Secret,
		Timeout: c.UpstreamTimeout, Observe: observe, UserAgent: "tenantry/" + version()}); err != nil {
		note(fmt.Errorf("CLARIFAI_API_BASE: %w", err))
	}
	if c.Workers < 1 || c.Workers > 1000 {
		note(fmt.Errorf("TENANTRY_WORKERS: %d must be from 1 to 1000", c.Workers))
	}
	p.workers = c.Workers
	if c.ItemsPerCall < 1 || c.ItemsPerCall > 100 {
		note(fmt.Errorf("TENANTRY_ITEMS_PER_CALL: %d must be from 1 to 100", c.ItemsPerCall))
	}
	if c.ReportInterval < time.Minute {
		note(fmt.Errorf("TENANTRY_REPORT_INTERVAL: %s must be at least 1m", c.ReportInterval))
	}
	if c.RemovalCap < 1 {
		note(fmt.Errorf("TENANTRY_REMOVAL_CAP: %d must be at least 1", c.RemovalCap))
	}
	if c.ShutdownDelay < 0 {
		note(fmt.Errorf("TENANTRY_SHUTDOWN_DELAY: %s must not be negative", c.ShutdownDelay))
	}
	if c.ShutdownTimeout <= 0 {
		note(fmt.Errorf("TENANTRY_SHUTDOWN_TIMEOUT: %s must be more than 0", c.ShutdownTimeout))
	}
	note(c.readProfiles(&p))
	note(nameSettings(c.engine(p).WithDefaults().Validate()))
	return p, errors.Join(faults...)
}

// readProfiles sets the profiles of p: those of the file, or the one of the settings.
func (c serveCmd) readProfiles(p *plan) error {
	profile := tenant.Profile{Name: tenant.DefaultProfile, BaseWorkflow: "Empty", KeyScopes: []string{tenant.ScopeAll}}
	profile.PoolMin, profile.PoolMax = c.PoolMin, c.PoolMax
	if c.PoolMin == tenant.DefaultPoolMin { // or it was not given
		profile.PoolMin = max(0, min(c.PoolMin, c.PoolMax))
	}
	var given []string
	if scopes := trimmed(c.KeyScopes); len(scopes) > 0 {
		profile.KeyScopes, given = scopes, append(given, "TENANTRY_KEY_SCOPES")
	}
	if c.BaseWorkflow != "" {
		profile.BaseWorkflow, given = c.BaseWorkflow, append(given, "TENANTRY_BASE_WORKFLOW")
	}
	if c.PoolMin != tenant.DefaultPoolMin {
		given = append(given, "TENANTRY_POOL_MIN")
	}
	if c.PoolMax != tenant.DefaultPoolMax {
		given = append(given, "TENANTRY_POOL_MAX")
	}
	p.profiles = []tenant.Profile{profile}
	if c.ProfilesFile == "" {
		for _, f := range profile.Check() {
			if f.Warning {
				p.warnings = append(p.warnings, f.String())
			}
		}
		return nil
	}
	var faults []error
	for _, name := range given {
		faults = append(faults, fmt.Errorf("both TENANTRY_PROFILES_FILE and %s are given: set it in the file", name))
	}
	file, err := readProfiles(c.ProfilesFile)
	if err != nil {
		return errors.Join(append(faults, fmt.Errorf("TENANTRY_PROFILES_FILE: %w", err))...)
	}
	for _, f := range file.Faults {
		if f.Warning {
			p.warnings = append(p.warnings, f.In(c.ProfilesFile))
		} else {
			faults = append(faults, fmt.Errorf("TENANTRY_PROFILES_FILE: %s", f.In(c.ProfilesFile)))
		}
	}
	// Those of a file with faults would be found wrong once more, without their lines.
	if !file.Faulty() {
		p.profiles = file.Profiles
	}
	return errors.Join(faults...)
}

func (c serveCmd) keyring(e env) (keyring.Source, *keyring.Keyring, error) {
	source := keyring.Source{Path: c.KeysetFile}
	if err := onlyOne(e, "TENANTRY_KEYSET", c.KeysetFile); err != nil {
		return source, nil, err
	}
	ctx := context.Background()
	var err error
	if source.Keeper, err = c.keeper(ctx, e); err != nil {
		return source, nil, err
	}
	if c.KeysetFile == "" {
		if source.Text, err = secretSetting(e, "TENANTRY_KEYSET", ""); err != nil {
			return source, nil, err
		}
		if !source.Text.IsSet() {
			return source, nil, errors.New("the keyset is missing: make one with `tenantry keyset create` and set TENANTRY_KEYSET_FILE")
		}
	}
	keys, err := source.Load(ctx)
	return source, keys, err
}

// engine is the configuration of the engine, as far as the settings say it.
func (c serveCmd) engine(p plan) provision.Config {
	var source *keyring.Source
	if p.keyset.Path != "" {
		source = &p.keyset
	}
	return provision.Config{
		KeysetSource: source,
		Profiles:     p.profiles,
		Keyring:      p.keys,
		AppPrefix:    c.AppPrefix,
		Rate:         c.UpstreamRate,
		CallTimeout:  c.UpstreamTimeout,
		ItemsPerCall: c.ItemsPerCall,
		ReportEvery:  c.ReportInterval,
		RemovalCap:   c.RemovalCap,
		SkipMarks:    !c.MarkTenants,
	}
}

// nameSettings says of the faults of the engine's configuration which variable sets
// what is at fault.
func nameSettings(err error) error {
	list, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return err
	}
	variables := map[string]string{"AppPrefix": "TENANTRY_APP_PREFIX", "Rate": "TENANTRY_UPSTREAM_RATE",
		"CallTimeout": "TENANTRY_UPSTREAM_TIMEOUT", "key_scopes": "TENANTRY_KEY_SCOPES", "base_workflow": "TENANTRY_BASE_WORKFLOW",
		"pool.min": "TENANTRY_POOL_MIN", "pool.max": "TENANTRY_POOL_MAX", "pool": "TENANTRY_POOL_MAX"}
	var faults []error
	for _, fault := range list.Unwrap() {
		if f, ok := errors.AsType[*provision.ConfigError](fault); ok {
			field, _, _ := strings.Cut(f.Field, "[") // of a list one entry
			if v := variables[field]; v != "" {
				fault = fmt.Errorf("%s: %w", v, fault)
			}
		}
		faults = append(faults, fault)
	}
	return errors.Join(faults...)
}

func trimmed(list []string) []string {
	var out []string
	for _, s := range list {
		if s = strings.TrimSpace(s); s != "" {
			out = append(out, s)
		}
	}
	return out
}

// logger returns the log, and what writes the rest of it.
func (c serveCmd) logger(e env) (log *zap.Logger, flush func()) {
	level, _ := zapcore.ParseLevel(c.LogLevel) // kong has checked it
	cfg := zap.NewProductionEncoderConfig()
	cfg.EncodeTime = zapcore.ISO8601TimeEncoder
	cfg.EncodeDuration = zapcore.StringDurationEncoder
	encoder := zapcore.NewJSONEncoder(cfg)
	if c.LogFormat == "console" {
		encoder = zapcore.NewConsoleEncoder(cfg)
	}
	out := &lateWriter{to: e.stderr}
	return zap.New(promptCore{zapcore.NewCore(encoder, out, level), out}), out.flush
}

func (c serveCmd) Run(ctx context.Context, e env) error {
	reg := prometheus.NewRegistry()
	p, err := c.check(e, newUpstreamMetrics(reg))
	if err != nil {
		return err
	}
	defer p.upstream.Close()
	defer closeKeeper(p.keyset.Keeper)
	log, flushLog := c.logger(e)
	defer flushLog()
	if e.get("GOGC") == "" { // or else the operator has said when garbage is collected
		defer tuneCollector()()
	}
	for _, w := range p.warnings {
		log.Warn("the profiles", zap.String("warning", w))
	}

	public, err := listen("TENANTRY_ADDR", c.Addr)
	if err != nil {
		return err
	}
	defer func() { _ = public.Close() }()
	internal, err := listen("TENANTRY_INTERNAL_ADDR", c.InternalAddr)
	if err != nil {
		return err
	}
	defer func() { _ = internal.Close() }()
	if c.AddrFile != "" {
		if err := writeAddrFile(c.AddrFile, urlOf(public), urlOf(internal)); err != nil {
			return err
		}
		defer func() { _ = os.Remove(c.AddrFile) }()
	}
	p.database.Log = log
	db, err := postgres.Open(ctx, p.database)
	if err != nil {
		return err
	}
	defer db.Close()

	s := &service{serveCmd: c, plan: p, env: e, log: log, db: db, reg: reg}
	s.database.check = s.checkDatabase
	if !c.ReadOnly {
		s.metrics = provision.NewMetrics(reg)
	}
	return s.run(ctx, public, internal)
}

func listen(name, addr string) (net.Listener, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return l, nil
}

// urlOf is where a listener is reached from this machine.
func urlOf(l net.Listener) string {
	addr := l.Addr().(*net.TCPAddr)
	host := addr.IP.String()
	if addr.IP.IsUnspecified() {
		host = "127.0.0.1"
	}
	return "http://" + net.JoinHostPort(host, fmt.Sprint(addr.Port))
}

// A service is one running serve.
type service struct {
	serveCmd
	plan
	env env
	log *zap.Logger
	db  *postgres.DB

	reg     *prometheus.Registry
	metrics *provision.Metrics // nil if it is read-only

	database databaseWatch

	api     atomic.Pointer[http.Handler] // of the public listener, once it has started
	started atomic.Bool
	ending  atomic.Bool
}

// patWatchInterval is how often the files of PAT and keyset are read: secrets that are mounted
// change by the swap of a link, which file notifications miss.
const patWatchInterval = 2 * time.Second

func (s *service) readPAT() (tenant.Secret, error) {
	return secretSetting(s.env, "CLARIFAI_PAT", s.PATFile)
}

// run serves until ctx ends, then stops in order: no more requests, those under
// way, the workers, the rest.
func (s *service) run(ctx context.Context, public, internal net.Listener) error {
	registerCacheMetrics(s.reg, s.db.CacheStats)
	s.reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	// Before the database answers there is an API all the same: it says so.
	apiServer := &http.Server{Handler: http.HandlerFunc(s.serveAPI), ErrorLog: zap.NewStdLog(s.log.Named("http"))}
	httpapi.Limit(apiServer)
	internalServer := &http.Server{Handler: httpapi.NewInternal(s.reg, s.readiness), ErrorLog: apiServer.ErrorLog,
		ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second}
	if s.Pprof {
		internalServer.Handler = httpapi.WithProfiles(internalServer.Handler)
		internalServer.WriteTimeout = 5 * time.Minute // of what measures for as long as it is told to
	}

	// What runs in the background must outlive the requests under way.
	background, stopBackground := context.WithCancel(context.WithoutCancel(ctx))
	defer stopBackground()
	serving, fail := context.WithCancelCause(ctx)
	defer fail(nil)

	var group errgroup.Group
	serve := func(srv *http.Server, l net.Listener) {
		group.Go(func() error {
			if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				fail(fmt.Errorf("serve %s: %w", l.Addr(), err))
			}
			return nil
		})
	}
	group.Go(func() error { s.database.run(background); return nil })
	serve(internalServer, internal)
	serve(apiServer, public)
	s.log.Info("listening", zap.String("api", urlOf(public)), zap.String("internal", urlOf(internal)), zap.String("version", version()))

	var engine *provision.Service
	var workers *provision.Workers
	engine, err := s.start(serving)
	if err == nil && !s.ReadOnly {
		workers = engine.StartWork(background, s.Workers)
		s.work(background, &group, engine)
	}
	if err == nil {
		handler := httpapi.New(httpapi.Config{Service: engine, DB: s.db, Log: s.log, Metrics: httpapi.NewMetrics(s.reg), ReadOnly: s.ReadOnly})
		s.api.Store(&handler)
		s.started.Store(true)
		s.database.look(serving)
		s.log.Info("ready", zap.String("operator", string(engine.Deployment.Operator)), zap.String("deployment", engine.Deployment.ID))
		<-serving.Done()
		if ctx.Err() == nil { // no signal: a listener failed
			err = context.Cause(serving)
		}
	}

	s.ending.Store(true)
	if err == nil && s.ShutdownDelay > 0 {
		time.Sleep(s.ShutdownDelay)
	}
	s.log.Info("stopping")
	if workers != nil {
		engine.Drain()
	}
	end, cancel := context.WithTimeout(context.Background(), s.ShutdownTimeout)
	defer cancel()
	if shut := apiServer.Shutdown(end); shut != nil {
		s.log.Warn("requests were cut off", zap.Error(shut))
		_ = apiServer.Close()
	}
	if workers != nil {
		if stop := workers.Stop(end); stop != nil {
			s.log.Warn("work was cut off; it is due again, for another replica too", zap.Error(stop))
		}
	}
	stopBackground()
	_ = internalServer.Close()
	_ = group.Wait()
	if workers != nil {
		s.leave(engine)
	}
	s.log.Info("stopped")
	if errors.Is(err, context.Canceled) && ctx.Err() != nil { // stopped before it was ready
		return nil
	}
	return err
}

// work starts the background work, except for the workers.
func (s *service) work(ctx context.Context, group *errgroup.Group, engine *provision.Service) {
	group.Go(func() error { return s.db.Listen(ctx, s.log) })
	group.Go(func() error { return s.db.Follow(ctx, s.log) })
	group.Go(func() error { return engine.Sweep(ctx) })
	group.Go(func() error { return engine.KeepControl(ctx) })
	group.Go(func() error { return engine.SealAudit(ctx) })
	if s.PATFile != "" {
		group.Go(func() error { engine.WatchPAT(ctx, s.readPAT, patWatchInterval); return nil })
	}
	if s.KeysetFile != "" {
		group.Go(func() error { engine.WatchKeyset(ctx, patWatchInterval); return nil })
	}
	group.Go(func() error { return engine.Reseal(ctx) })
}

// leaveTimeout bounds the last call to Clarifai. The grace period of a deployment must include it.
const leaveTimeout = 5 * time.Second

// leave writes into the control record that the last replica has stopped, if this replica is the
// last. Otherwise the next start of the database is watched.
func (s *service) leave(engine *provision.Service) {
	ctx, cancel := context.WithTimeout(context.Background(), leaveTimeout)
	defer cancel()
	if err := engine.LeaveControl(ctx); err != nil {
		s.log.Warn("control record not updated at shutdown; the next start of the database is watched", zap.Error(err))
	}
}

func (s *service) serveAPI(w http.ResponseWriter, r *http.Request) {
	if s.ending.Load() { // the client's next request goes to another replica
		w.Header().Set("Connection", "close")
	}
	if h := s.api.Load(); h != nil {
		(*h).ServeHTTP(w, r)
		return
	}
	httpapi.NotStarted(w)
}

// restart is how long start waits before it tries again.
const restart = time.Second

// start waits for the database, and at the first start for Clarifai, then makes sure that schema,
// keyset and PAT go with the database.
func (s *service) start(ctx context.Context) (*provision.Service, error) {
	said := ""
	for {
		engine, err := s.tryStart(ctx)
		waits := ""
		switch class := tenant.ClassOf(err); {
		case errors.Is(err, tenant.Unavailable):
			waits = "waiting for the database"
		case class == tenant.UpstreamDown || class == tenant.UpstreamThrottled:
			waits = "waiting for Clarifai"
		default:
			return engine, err
		}
		if waits != said {
			s.log.Warn(waits, zap.Error(err))
			said = waits
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(restart):
		}
	}
}

func (s *service) tryStart(ctx context.Context) (*provision.Service, error) {
	schema, err := s.db.Schema(ctx)
	if err != nil {
		return nil, err
	}
	if err := schema.Err(); err != nil {
		return nil, err
	}
	if s.ReadOnly {
		return s.readOnly(ctx)
	}
	missing, err := missingProfiles(ctx, s.db, s.profiles)
	if err != nil {
		return nil, err
	}
	if len(missing) > 0 {
		return nil, errors.New("TENANTRY_PROFILES_FILE: " + strings.Join(missing, "\nTENANTRY_PROFILES_FILE: "))
	}
	deployment, err := provision.Pin(ctx, s.db, s.upstream, s.pat, s.UpstreamRate, s.keys, s.log)
	if err != nil {
		return nil, err
	}
	cfg := s.engine(s.plan)
	cfg.Store, cfg.Upstream, cfg.PAT, cfg.Deployment = s.db, s.upstream.As(deployment.Operator), s.pat, deployment
	cfg.Log, cfg.Metrics = s.log, s.metrics
	return provision.New(cfg)
}

// readOnly returns an engine for lookups only.
func (s *service) readOnly(ctx context.Context) (*provision.Service, error) {
	deployment, err := s.db.Deployment(ctx)
	if errors.Is(err, tenant.NotFound) {
		return nil, errors.New("TENANTRY_READ_ONLY: no service has run on this database yet: there is nothing to look up")
	}
	if err != nil {
		return nil, err
	}
	cfg := s.engine(s.plan)
	cfg.Store, cfg.Deployment, cfg.Log = s.db, deployment, s.log
	return &provision.Service{Config: cfg.WithDefaults()}, nil // New needs a keyring
}

// registerCacheMetrics registers what is told of the rows that are held in memory.
func registerCacheMetrics(reg prometheus.Registerer, stats func() postgres.CacheStats) {
	counter := func(name, help string, value func(postgres.CacheStats) uint64) {
		reg.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help},
			func() float64 { return float64(value(stats())) }))
	}
	gauge := func(name, help string, value func(postgres.CacheStats) float64) {
		reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, func() float64 { return value(stats()) }))
	}
	counter("tenantry_cache_hits_total", "Look-ups that were answered from memory.", func(s postgres.CacheStats) uint64 { return s.Hits })
	counter("tenantry_cache_misses_total", "Look-ups that might have been answered from memory and asked the database.",
		func(s postgres.CacheStats) uint64 { return s.Misses })
	counter("tenantry_cache_stale_answers_total", "Look-ups that were answered from memory because the database could not be reached.",
		func(s postgres.CacheStats) uint64 { return s.Stale })
	gauge("tenantry_cache_entries", "Rows in memory.", func(s postgres.CacheStats) float64 { return float64(s.Entries) })
	gauge("tenantry_cache_trusted", "1 while the change log is followed: while it is not, each look-up asks the database.",
		func(s postgres.CacheStats) float64 {
			if s.Trusted {
				return 1
			}
			return 0
		})
	gauge("tenantry_cache_behind_seconds", "How long ago the change log was last read to its end; -1 before the first time.",
		func(s postgres.CacheStats) float64 {
			if s.Behind < 0 {
				return -1
			}
			return s.Behind.Seconds()
		})
	gauge("tenantry_cache_gaps", "Events of the change log that may still come before others that have been read.",
		func(s postgres.CacheStats) float64 { return float64(s.Gaps) })
}

// newUpstreamMetrics returns what counts upstream calls.
func newUpstreamMetrics(reg prometheus.Registerer) func(call, outcome string, took time.Duration) {
	calls := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "tenantry_upstream_calls_total", Help: "Calls to Clarifai by call and outcome.",
	}, []string{"call", "outcome"})
	seconds := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "tenantry_upstream_call_duration_seconds", Help: "Calls to Clarifai by call.",
		Buckets: []float64{.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10},
	}, []string{"call"})
	reg.MustRegister(calls, seconds)
	return func(call, outcome string, took time.Duration) {
		calls.WithLabelValues(call, outcome).Inc()
		seconds.WithLabelValues(call).Observe(took.Seconds())
	}
}
