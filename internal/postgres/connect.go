package postgres

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/tenant"
)

const (
	// connectTimeout limits one attempt to connect, so that a request learns in time that the
	// database is unavailable.
	connectTimeout = 3 * time.Second
	// A connection to a lost server is dead after this time, whether data or an answer is missing.
	deadAfter = 4 * time.Second
	// resetEvery limits how often all connections are replaced because one is useless.
	resetEvery = time.Second
)

// Limits at the server. Without them, a replica that is cut off within a transaction keeps its locks
// for hours, and stops the work of all replicas. Just-in-time compilation is off: it takes 20 ms to seconds, longer
// than the statements.
var (
	limits = []string{`statement_timeout = '60s'`, `lock_timeout = '2s'`, `idle_in_transaction_session_timeout = '10s'`, `jit = off`}
	// sessionLimits are those of a session.
	sessionLimits = `SET ` + strings.Join(append(slices.Clone(limits),
		`tcp_keepalives_idle = 10`, `tcp_keepalives_interval = 5`, `tcp_keepalives_count = 3`, `tcp_user_timeout = 15000`), `; SET `)
	// beginLimited begins a transaction with limits of its own: behind a pooler in transaction mode, only
	// these apply.
	beginLimited = `BEGIN; SET LOCAL ` + strings.Join(limits, `; SET LOCAL `)
)

// inTx runs f in a transaction.
func (db *DB) inTx(ctx context.Context, f func(tx pgx.Tx) error) error {
	return pgx.BeginTxFunc(ctx, db.pool, pgx.TxOptions{BeginQuery: beginLimited}, f)
}

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
	cfg.PingTimeout = time.Second
	if cfg.ConnConfig.ConnectTimeout <= 0 || cfg.ConnConfig.ConnectTimeout > connectTimeout {
		cfg.ConnConfig.ConnectTimeout = connectTimeout
	}
	if cfg.ConnConfig.RuntimeParams["application_name"] == "" {
		cfg.ConnConfig.RuntimeParams["application_name"] = "tenantry"
	}
	cfg.ConnConfig.DialFunc = (&net.Dialer{Timeout: connectTimeout, Control: dieUnacknowledged,
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: deadAfter / 2, Interval: deadAfter / 4, Count: 2}}).DialContext
	return cfg, nil
}

// A connector opens the connections of one pool, and closes those that have become useless.
type connector struct {
	log     *zap.Logger
	standby bool // a standby will do
	pooled  bool // the URL leads through a pooler
	// url reads the connection string for each new connection; nil if it cannot change.
	url func() (tenant.Secret, error)

	pool      atomic.Pointer[pgxpool.Pool] // set once it exists
	config    *pgxpool.Config
	lastRead  atomic.Pointer[pgx.ConnConfig] // of the connection string as url last returned it
	unprepare atomic.Bool                    // a pooler loses prepared statements
	resetAt   atomic.Int64                   // the time of the last reset in Unix nanoseconds
}

// open returns the pool. It does not connect.
func (c *connector) open(ctx context.Context, url tenant.Secret, maxConns int32, tracer pgx.QueryTracer) (*pgxpool.Pool, error) {
	cfg, err := poolConfig(url, maxConns)
	if err != nil {
		return nil, err
	}
	cfg.ConnConfig.Tracer = tracer
	cfg.BeforeConnect = c.beforeConnect
	if !c.pooled {
		cfg.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
			_, err := conn.Exec(ctx, sessionLimits)
			return err
		}
	}
	if !c.standby {
		cfg.ConnConfig.ValidateConnect = notStandby(cfg.ConnConfig.ValidateConnect)
	}
	keeps := cfg.ConnConfig.OnPgError
	cfg.ConnConfig.OnPgError = func(conn *pgconn.PgConn, err *pgconn.PgError) bool { return c.keeps(err) && keeps(conn, err) }
	cfg.ConnConfig.OnNotice = closeUnreplicated
	c.config = cfg
	pool, err := pgxpool.NewWithConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("open pool: %w", err)
	}
	c.pool.Store(pool)
	return pool, nil
}

// connect opens a connection outside the pool.
func (c *connector) connect(ctx context.Context) (*pgx.Conn, error) {
	cfg := c.config.ConnConfig.Copy()
	if err := c.beforeConnect(ctx, cfg); err != nil {
		return nil, err
	}
	return pgx.ConnectConfig(ctx, cfg)
}

// beforeConnect reads the URL again, since its password may have been replaced.
func (c *connector) beforeConnect(_ context.Context, cfg *pgx.ConnConfig) error {
	if c.url != nil {
		if err := c.reread(cfg); err != nil {
			c.log.Warn("connection string of the database cannot be read again; the last one stays in use", zap.Error(err))
		}
	}
	if c.unprepare.Load() && cfg.DefaultQueryExecMode == pgx.QueryExecModeCacheStatement {
		cfg.DefaultQueryExecMode = pgx.QueryExecModeCacheDescribe
	}
	return nil
}

func (c *connector) reread(cfg *pgx.ConnConfig) error {
	is, err := c.read()
	if err == nil {
		c.lastRead.Store(is)
	} else if is = c.lastRead.Load(); is == nil {
		return err
	}
	cfg.Host, cfg.Port, cfg.User, cfg.Password, cfg.Database = is.Host, is.Port, is.User, is.Password, is.Database
	cfg.TLSConfig, cfg.Fallbacks, cfg.RuntimeParams = is.TLSConfig, is.Fallbacks, is.RuntimeParams
	return err
}

func (c *connector) read() (*pgx.ConnConfig, error) {
	url, err := c.url()
	if err != nil {
		return nil, err
	}
	cfg, err := poolConfig(url, 0)
	if err != nil {
		return nil, err
	}
	return cfg.ConnConfig, nil
}

// errStandby is the error of a connection to a server that would return old data and take no change.
var errStandby = errors.New("the server is a standby")

// notStandby refuses standbys, and then does what the connection string asks for.
func notStandby(then pgconn.ValidateConnectFunc) pgconn.ValidateConnectFunc {
	return func(ctx context.Context, conn *pgconn.PgConn) error {
		if conn.ParameterStatus("in_hot_standby") == "on" {
			return errStandby
		}
		if then == nil {
			return nil
		}
		return then(ctx, conn)
	}
}

// keeps reports whether a connection can be used after an error.
func (c *connector) keeps(err *pgconn.PgError) bool {
	switch {
	case statementLost(err):
		if c.unprepare.CompareAndSwap(false, true) {
			if !c.pooled {
				c.log.Error("a pooler in transaction mode is in front of the database: set DATABASE_DIRECT_URL to a connection string that leads past it, " +
					"since listening, jobs and migrations need sessions")
			}
			c.log.Warn("the pooler in front of the database loses prepared statements, and Tenantry does without them, which costs time: " +
				"set PgBouncer's max_prepared_statements to 200, or pool by session")
			c.reset()
		}
		return false
	case err.Code == "25006": // the others may be read-only, too, and stay so when the database is not
		c.reset()
		return false
	case planStale(err), err.Code == "25P02": // in an aborted transaction
		return false
	}
	return true
}

// reset replaces all connections of the pool.
func (c *connector) reset() {
	pool, last, now := c.pool.Load(), c.resetAt.Load(), time.Now().UnixNano()
	if pool != nil && time.Duration(now-last) >= resetEvery && c.resetAt.CompareAndSwap(last, now) {
		pool.Reset()
	}
}

// closeUnreplicated makes a commit fail whose wait for the synchronous standby was cancelled. The
// server reports that with a warning only, and a failover would lose what was acknowledged.
func closeUnreplicated(conn *pgconn.PgConn, n *pgconn.Notice) {
	if n.Routine != "SyncRepWaitForLSN" {
		return
	}
	ended, cancel := context.WithCancel(context.Background())
	cancel()
	_ = conn.Close(ended)
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

// whyUnavailable says why the database cannot be used now; empty if err says that a statement is
// wrong. Any error while connecting counts.
func whyUnavailable(err error) string {
	pg, answered := errors.AsType[*pgconn.PgError](err)
	_, connecting := errors.AsType[*pgconn.ConnectError](err)
	if answered {
		why := map[string]string{
			"25006": "the database is read-only",
			"28000": "the database refuses the login of this service", "28P01": "the database refuses the login of this service",
			"3D000": "the database does not exist", "55000": "the database accepts no connections",
			"53100": "the disk of the database is full", "53300": "the database has no free connection",
			"55P03": "another transaction holds a lock for too long", "57014": "the database did not finish in time",
			"57P03": "the database is starting or stopping",
			// While a dump is restored, the schema is incomplete.
			"3F000": schemaMissing, "42P01": schemaMissing, "42703": schemaMissing, "42883": schemaMissing,
			"42501": "the database refuses a privilege to this service",
		}[pg.Code]
		switch {
		case connecting:
			return cmp.Or(why, "the database cannot be reached")
		case pg.Code == "55000" || pg.Code == "3D000":
		case why != "":
			return why
		case statementLost(pg), planStale(pg), pg.Code == "25P02", pg.Code == "25P03":
			return "the connection to the database cannot be used any more"
		}
		switch pg.Code[:2] {
		case "08", "57", "58":
			return "the database cannot be reached"
		case "53":
			return "the database lacks a resource"
		case "40":
			return "the statement conflicted with another transaction"
		}
		return ""
	}
	if connecting {
		return "the database cannot be reached"
	}
	if _, ok := errors.AsType[net.Error](err); ok || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, net.ErrClosed) ||
		errors.Is(err, io.ErrUnexpectedEOF) || pgconn.SafeToRetry(err) {
		return "the database cannot be reached"
	}
	return ""
}

const schemaMissing = "the schema of the database is incomplete: it may be being restored"
