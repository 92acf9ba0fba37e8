// Package postgres holds every SQL statement of Tenantry: the rows, the claims
// and leases, the budget, the migrations, and listening for changes. Jobs are
// inserted here too, so that the rest never sees the database.
//
// Every method may be called by any number of goroutines at once. Failures a
// caller can act on are *tenant.Error; a database that cannot be reached is
// tenant.Unavailable.
package postgres

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/tenant"
)

// A DB is Tenantry's database. It is safe for use by many goroutines.
type DB struct {
	pool   *pgxpool.Pool
	direct *pgxpool.Pool
	// sessions opens connections to the database itself, outside the pools.
	sessions *connector
	hub      *hub
	log      *zap.Logger

	signUps sync.Map // by profile, a *shared[signUp, *tenant.SignedUp]
	builds  sync.Map // by profile, a *shared[tenant.NextBuilds, struct{}]
	cache   *cache
	lookups *lookups
	unsent  chan struct{}                     // holds one while other replicas are to be woken
	workDue map[tenant.WorkKind]chan struct{} // each holds one while workers of this replica are to be woken

	settled struct {
		mu sync.Mutex
		up map[tenant.State]Position // to which SettleTenants has read; guarded by mu
	}

	replica       uuid.UUID                 // of this process
	follows       atomic.Bool               // a follower reads the change log
	compared      atomic.Pointer[uuid.UUID] // the last incarnation in which the follower found all events that it had read
	recoveryWatch time.Duration
}

// Config says how to reach the database.
type Config struct {
	// URL may lead through a pooler in transaction mode.
	URL tenant.Secret
	// DirectURL must give sessions: listening and migrations need them.
	// Unset means URL.
	DirectURL tenant.Secret
	// RereadURL and RereadDirectURL read them again for each new connection. Unset means that they
	// cannot change.
	RereadURL, RereadDirectURL func() (tenant.Secret, error)
	// Standby allows connections to a standby, which returns old data and takes no change.
	Standby bool
	// MaxConns bounds each of the two pools. Zero means 16.
	MaxConns int32
	Log      *zap.Logger // nil logs nothing

	// CacheEntries is how many rows are held in memory at most; 0 holds none. They are
	// used only while Follow runs.
	CacheEntries int
	// MaxStale is for how long what is held is answered while the database cannot be
	// reached; 0 means not at all.
	MaxStale time.Duration

	// RecoveryWatch is how long an incarnation of the database watches the control record
	// for renewals by another database. Zero means 150 s.
	RecoveryWatch time.Duration

	tracer pgx.QueryTracer // sees each statement, in tests
}

// Open prepares a DB. It does not connect: see Ping.
func Open(ctx context.Context, cfg Config) (*DB, error) {
	log := cmp.Or(cfg.Log, zap.NewNop())
	pooled := cfg.DirectURL.IsSet() && cfg.DirectURL.Reveal() != cfg.URL.Reveal()
	requests := &connector{log: log, standby: cfg.Standby, pooled: pooled, url: cfg.RereadURL}
	sessions := requests
	pool, err := requests.open(ctx, cfg.URL, cfg.MaxConns, cfg.tracer)
	if err != nil {
		return nil, err
	}
	direct := pool
	if pooled {
		sessions = &connector{log: log, standby: cfg.Standby, url: cfg.RereadDirectURL}
		if direct, err = sessions.open(ctx, cfg.DirectURL, cfg.MaxConns, nil); err != nil {
			pool.Close()
			return nil, fmt.Errorf("direct connection: %w", err)
		}
	}
	db := &DB{log: log, pool: pool, direct: direct, sessions: sessions, hub: newHub(), cache: newCache(cfg.CacheEntries, cfg.MaxStale),
		unsent: make(chan struct{}, 1), workDue: map[tenant.WorkKind]chan struct{}{}, replica: uuid.New(), recoveryWatch: cmp.Or(cfg.RecoveryWatch, 150*time.Second)}
	db.lookups = &lookups{db: db}
	for _, kind := range tenant.WorkKinds {
		db.workDue[kind] = make(chan struct{}, 1)
	}
	db.settled.up = map[tenant.State]Position{}
	return db, nil
}

// Close closes every connection; it waits for those in use to be handed back.
func (db *DB) Close() {
	if db.direct != db.pool {
		db.direct.Close()
	}
	db.pool.Close()
	db.lookups.group.Wait()
}

// Ping reports whether the database answers.
func (db *DB) Ping(ctx context.Context) error {
	return translate("ping", db.pool.Ping(ctx))
}

// orZero turns a null time into the zero time.
func orZero(t *time.Time) time.Time {
	if t == nil {
		return time.Time{}
	}
	return *t
}

// nullTime turns the zero time into null.
func nullTime(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

// errNotFound is answered for what is not there.
func errNotFound(what string) error {
	return &tenant.Error{Kind: tenant.NotFound, Code: what + "_not_found", Detail: "there is no such " + what}
}

// translate turns a driver's error into one a caller can act on, where there is
// such a one; act says what failed. A nil error stays nil.
func translate(act string, err error) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*tenant.Error](err); ok {
		return err
	}
	if why := whyUnavailable(err); why != "" {
		return &tenant.Error{
			Kind:       tenant.Unavailable,
			Code:       "database_unavailable",
			Detail:     why + "; try again",
			RetryAfter: 2 * time.Second,
			Err:        fmt.Errorf("%s: %w", act, err),
		}
	}
	return fmt.Errorf("%s: %w", act, err)
}
