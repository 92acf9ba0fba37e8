package postgres

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// AuditColumnNames are the columns that seals cover.
var AuditColumnNames = auditColumnNames

// Traced returns cfg with a tracer of what is sent to its URL.
func (cfg Config) Traced(by pgx.QueryTracer) Config {
	cfg.tracer = by
	return cfg
}

// Forward has the cache see a machine that was suspended for d: the wall clock goes on meanwhile, and the
// monotonic clock stops.
func (db *DB) Forward(d time.Duration) { db.cache.clock.suspend(d) }

func (c *clock) suspend(d time.Duration) {
	c.ahead.Add(int64(d))
	c.anchor.Load().compared.Store(never)
}

// The statements that tests look at the plans of.
const (
	ClaimSQL             = claimAndWakeSQL
	StartBuildsSQL       = startBuildsSQL
	ClaimInBackgroundSQL = claimInBackgroundSQL
)

// HoldsCaller reports whether a caller is held in memory.
func (db *DB) HoldsCaller(tokenID string) bool {
	e, found := db.cache.peek(cacheKey{cachedCaller, tokenID})
	return found && e.epoch == db.cache.epochs.Load().current
}

// Poll reads the change log as a follower does.
func (db *DB) Poll(ctx context.Context, from int64, gaps []int64) error {
	_, err := db.pool.Exec(ctx, newEventsSQL, from, gaps, mostEvents)
	return err
}

// DirectPool is the pool of sessions.
func (db *DB) DirectPool() *pgxpool.Pool { return db.direct }

// InTx runs f in a transaction.
func (db *DB) InTx(ctx context.Context, f func(tx pgx.Tx) error) error { return db.inTx(ctx, f) }

// FirstAuditGap looks for an id that is missing in the audit log.
func (db *DB) FirstAuditGap(ctx context.Context, after, last int64) (int64, error) {
	return db.firstAuditGap(ctx, after, last)
}
