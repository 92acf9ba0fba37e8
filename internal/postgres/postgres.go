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
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/riverqueue/river"
	"github.com/riverqueue/river/riverdriver/riverpgxv5"
	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/tenant"
)

// A DB is Tenantry's database. It is safe for use by many goroutines.
type DB struct {
	pool   *pgxpool.Pool
	direct *pgxpool.Pool
	jobs   *river.Client[pgx.Tx]
	hub    *hub

	signUps sync.Map // by profile, a *shared[signUp, *tenant.SignedUp]
	cache   *cache
	lookups *lookups
	unsent  chan struct{} // holds one while other replicas are to be woken

	replica       uuid.UUID // of this process
	recoveryWatch time.Duration
}

// Config says how to reach the database.
type Config struct {
	// URL may lead through a pooler in transaction mode.
	URL tenant.Secret
	// DirectURL must give sessions: listening, jobs and migrations need them.
	// Unset means URL.
	DirectURL tenant.Secret
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

// connectTimeout bounds one attempt to connect, so that a request learns in
// time that the database is away.
const connectTimeout = 3 * time.Second

// ParseURL checks a connection string. Its error never repeats the string,
// which holds a password.
func ParseURL(url tenant.Secret) error {
	_, err := poolConfig(url, 0)
	return err
}

// cutPassword reports whether a slash, question mark or hash in a password ends the
// host early, as in postgres://user:12/34@host/db: the rest of the password would be
// the database's name, which errors show.
func cutPassword(url string) bool {
	_, rest, ok := strings.Cut(url, "://")
	if !ok {
		return false
	}
	end := strings.IndexAny(rest, "/?#")
	if end < 0 || strings.Contains(rest[:end], "@") {
		return false
	}
	// An at sign in the value of a parameter is in order, as in ?user=a@b.
	name, _, _ := strings.Cut(rest[end:], "=")
	return strings.Contains(name, "@")
}

func poolConfig(url tenant.Secret, maxConns int32) (*pgxpool.Config, error) {
	cfg, err := pgxpool.ParseConfig(url.Reveal())
	if err != nil || cutPassword(url.Reveal()) {
		return nil, errors.New("not a Postgres connection string: it should read like postgres://user:password@host:5432/database, " +
			"with the special characters of the password percent-encoded")
	}
	if maxConns <= 0 {
		maxConns = 16
	}
	cfg.MaxConns = maxConns
	if cfg.ConnConfig.ConnectTimeout <= 0 || cfg.ConnConfig.ConnectTimeout > connectTimeout {
		cfg.ConnConfig.ConnectTimeout = connectTimeout
	}
	if cfg.ConnConfig.RuntimeParams["application_name"] == "" {
		cfg.ConnConfig.RuntimeParams["application_name"] = "tenantry"
	}
	return cfg, nil
}

// Open prepares a DB. It does not connect: see Ping.
func Open(ctx context.Context, cfg Config) (*DB, error) {
	pc, err := poolConfig(cfg.URL, cfg.MaxConns)
	if err != nil {
		return nil, err
	}
	pc.ConnConfig.Tracer = cfg.tracer
	prepares := preparer{log: cmp.Or(cfg.Log, zap.NewNop())}
	prepares.watch(pc)
	pool, err := pgxpool.NewWithConfig(ctx, pc)
	if err != nil {
		return nil, fmt.Errorf("open pool: %w", err)
	}
	prepares.pool.Store(pool)
	direct := pool
	if cfg.DirectURL.IsSet() && cfg.DirectURL.Reveal() != cfg.URL.Reveal() {
		pc, err := poolConfig(cfg.DirectURL, cfg.MaxConns)
		if err != nil {
			pool.Close()
			return nil, fmt.Errorf("direct connection: %w", err)
		}
		if direct, err = pgxpool.NewWithConfig(ctx, pc); err != nil {
			pool.Close()
			return nil, fmt.Errorf("open direct pool: %w", err)
		}
	}
	// A client without workers only inserts.
	jobs, err := river.NewClient(riverpgxv5.New(pool), &river.Config{
		FetchCooldown: tenant.InteractiveCooldown, // also bounds how often an insert wakes the workers
		Logger:        slog.New(slog.DiscardHandler),
	})
	if err != nil {
		return nil, fmt.Errorf("open job client: %w", err)
	}
	db := &DB{pool: pool, direct: direct, jobs: jobs, hub: newHub(), cache: newCache(cfg.CacheEntries, cfg.MaxStale),
		unsent: make(chan struct{}, 1), replica: uuid.New(), recoveryWatch: cmp.Or(cfg.RecoveryWatch, 150*time.Second)}
	db.lookups = &lookups{db: db}
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

// Direct is the pool of sessions, for the job workers.
func (db *DB) Direct() *pgxpool.Pool { return db.direct }

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
	if away(err) {
		return &tenant.Error{
			Kind:       tenant.Unavailable,
			Code:       "database_unavailable",
			Detail:     "the database cannot be reached; try again",
			RetryAfter: 2 * time.Second,
			Err:        fmt.Errorf("%s: %w", act, err),
		}
	}
	return fmt.Errorf("%s: %w", act, err)
}

// away reports whether err means that the database cannot be used just now,
// rather than that a statement is wrong.
func away(err error) bool {
	if pg, ok := errors.AsType[*pgconn.PgError](err); ok {
		switch pg.Code[:2] {
		case "08", "53", "57", "58": // connection, resources, operator intervention, system
			return true
		}
		switch pg.Code {
		case "25006", "40001", "40P01": // read-only after a fail-over, serialisation, deadlock
			return true
		}
		return statementLost(pg) || planStale(pg)
	}
	if _, ok := errors.AsType[*pgconn.ConnectError](err); ok {
		return true
	}
	if _, ok := errors.AsType[net.Error](err); ok {
		return true
	}
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, net.ErrClosed) || errors.Is(err, io.ErrUnexpectedEOF) ||
		pgconn.SafeToRetry(err)
}
