package postgres

import (
	"context"
	"sync/atomic"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.uber.org/zap"
)

// A preparer sees to it that a pool's connections prepare their statements, and that
// they do without where a pooler loses them.
type preparer struct {
	log  *zap.Logger
	pool atomic.Pointer[pgxpool.Pool] // set once it is there
	lost atomic.Bool                  // a pooler loses statements
}

// watch has the connections of a pool made as p says, and closed when a statement that
// they have prepared is of no use any more: the others may be none either.
func (p *preparer) watch(cfg *pgxpool.Config) {
	cfg.BeforeConnect = func(_ context.Context, conn *pgx.ConnConfig) error {
		if p.lost.Load() && conn.DefaultQueryExecMode == pgx.QueryExecModeCacheStatement {
			conn.DefaultQueryExecMode = pgx.QueryExecModeCacheDescribe
		}
		return nil
	}
	keeps := cfg.ConnConfig.OnPgError
	cfg.ConnConfig.OnPgError = func(conn *pgconn.PgConn, err *pgconn.PgError) bool {
		switch {
		case statementLost(err):
			p.doWithout()
			return false
		case planStale(err):
			return false
		}
		return keeps(conn, err)
	}
}

func (p *preparer) doWithout() {
	if !p.lost.CompareAndSwap(false, true) {
		return
	}
	p.log.Warn("the pooler in front of the database loses prepared statements, and Tenantry does without them, which costs time: " +
		"set PgBouncer's max_prepared_statements to 200, or pool by session")
	if pool := p.pool.Load(); pool != nil {
		pool.Reset()
	}
}

// statementLost reports whether the server does not have a statement that the
// connection has prepared, or has it from somebody else.
func statementLost(err *pgconn.PgError) bool {
	return err.Code == "26000" || err.Code == "42P05"
}

// planStale reports whether a migration has changed the type of what a prepared
// statement answers. The next try prepares it anew.
func planStale(err *pgconn.PgError) bool {
	return err.Code == "0A000" && err.Routine == "RevalidateCachedQuery"
}
