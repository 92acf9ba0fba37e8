// Package pgtest gives tests migrated databases of a real Postgres.
//
// A package's TestMain calls Main. The cluster is private to the test process
// and dies with it; databases are emptied and used again, since that costs
// milliseconds where making one costs hundreds.
package pgtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/goleak"

	"github.com/tenantry/tenantry/internal/localpg"
	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/tenant"
)

// server is the cluster of this test process.
var server struct {
	cluster *localpg.Cluster
	stop    func()
	skip    error // why there is none

	mu   sync.Mutex
	made int             // guarded by mu
	free []tenant.Secret // databases to be used again; guarded by mu
}

// Main runs the tests of a package with a cluster of their own, and fails if
// they leave goroutines behind. Where there is no Postgres and none can be had,
// tests that need one are skipped, or fail if CI is set.
func Main(m *testing.M) {
	os.Exit(run(m))
}

func run(m *testing.M) int {
	cluster, stop, err := localpg.ForTests(context.Background())
	switch {
	case errors.Is(err, localpg.ErrNoPostgres) && os.Getenv("CI") == "":
		server.skip = err
	case err != nil:
		fmt.Fprintln(os.Stderr, "start Postgres for the tests:", err)
		return 1
	default:
		defer stop()
		server.cluster, server.stop = cluster, stop
	}
	// What the cluster itself runs is there before the tests are.
	already := goleak.IgnoreCurrent()
	if code := m.Run(); code != 0 {
		return code
	}
	if err := goleak.Find(already); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// Cluster returns the cluster of this test process, to stop and restart it. Only
// a test that does not run in parallel may do that.
func Cluster(t testing.TB) *localpg.Cluster {
	t.Helper()
	if server.cluster == nil {
		t.Skip(server.skip)
	}
	return server.cluster
}

// URL returns an empty, migrated database that is the test's alone until it
// ends.
func URL(t testing.TB) tenant.Secret {
	t.Helper()
	cluster := Cluster(t)
	server.mu.Lock()
	defer server.mu.Unlock()
	var url tenant.Secret
	if n := len(server.free); n > 0 {
		url, server.free = server.free[n-1], server.free[:n-1]
	} else {
		server.made++
		name := fmt.Sprintf("test_%d", server.made)
		if err := cluster.CreateDatabase(t.Context(), name); err != nil {
			t.Fatalf("create database: %v", err)
		}
		url = tenant.NewSecret(cluster.URL(name))
		if err := postgres.MigrateUp(t.Context(), url); err != nil {
			t.Fatalf("migrate: %v", err)
		}
	}
	t.Cleanup(func() {
		if err := empty(url); err != nil {
			t.Errorf("empty the database: %v", err)
			return
		}
		server.mu.Lock()
		defer server.mu.Unlock()
		server.free = append(server.free, url)
	})
	return url
}

// EmptyURL returns a database without a schema.
func EmptyURL(t testing.TB) tenant.Secret {
	t.Helper()
	cluster := Cluster(t)
	server.mu.Lock()
	defer server.mu.Unlock()
	server.made++
	name := fmt.Sprintf("empty_%d", server.made)
	if err := cluster.CreateDatabase(t.Context(), name); err != nil {
		t.Fatalf("create database: %v", err)
	}
	return tenant.NewSecret(cluster.URL(name))
}

// Dump returns a database as the SQL that makes it anew. Where Postgres came
// without pg_dump the test is skipped.
func Dump(t testing.TB, url tenant.Secret) string {
	t.Helper()
	cfg, err := pgx.ParseConfig(url.Reveal())
	if err != nil {
		t.Fatal(err)
	}
	sql, err := Cluster(t).Dump(t.Context(), cfg.Database)
	if errors.Is(err, os.ErrNotExist) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return sql
}

// Restore makes a new database of a dump.
func Restore(t testing.TB, dump string) tenant.Secret {
	t.Helper()
	url := EmptyURL(t)
	// pg_dump's own commands for psql are not SQL.
	var sql strings.Builder
	rest := dump
	conn := Conn(t, url)
	exec := func() {
		if _, err := conn.Exec(t.Context(), sql.String()); err != nil {
			t.Fatalf("restore: %v", err)
		}
		sql.Reset()
	}
	for rest != "" {
		line, after, _ := strings.Cut(rest, "\n")
		rest = after
		switch {
		case strings.HasPrefix(line, "\\"): // \restrict and the like
		case strings.HasPrefix(line, "COPY "):
			exec()
			data, after, _ := strings.Cut(rest, "\\.\n")
			rest = after
			if _, err := conn.PgConn().CopyFrom(t.Context(), strings.NewReader(data), line); err != nil {
				t.Fatalf("restore: %v", err)
			}
		default:
			sql.WriteString(line + "\n")
		}
	}
	exec()
	return url
}

// Open returns a DB on an empty, migrated database.
func Open(t testing.TB) *postgres.DB {
	t.Helper()
	url := URL(t)
	KnowControl(t, url)
	return OpenURL(t, url)
}

// KnowControl makes a database regard the control record as known and not due, until the next
// incarnation.
func KnowControl(t testing.TB, url tenant.Secret) {
	t.Helper()
	if _, err := Conn(t, url).Exec(context.WithoutCancel(t.Context()), `
		UPDATE current_incarnation SET control_seen_at = now(), control_due_at = 'infinity', written_by = pg_current_xact_id()::xid
		WHERE recovery IS NULL AND xmin = written_by`); err != nil {
		t.Fatalf("take the control record for known: %v", err)
	}
}

// Watch is how long an incarnation of a test's database watches the control record.
const Watch = time.Second

// OpenURL returns another DB on a database, as another replica has.
func OpenURL(t testing.TB, url tenant.Secret) *postgres.DB {
	t.Helper()
	db, err := postgres.Open(context.WithoutCancel(t.Context()), postgres.Config{URL: url, MaxConns: 8, CacheEntries: 10_000, MaxStale: time.Minute, RecoveryWatch: Watch})
	if err != nil {
		t.Fatalf("open database: %v", err)
	}
	t.Cleanup(db.Close)
	return db
}

// NextSlotIn is the statement after which the next upstream call may begin once d has passed.
func NextSlotIn(d time.Duration) string {
	return fmt.Sprintf(`SELECT setval('upstream_slots', (extract(epoch FROM clock_timestamp()) * 1000000)::bigint + %d)`, d.Microseconds())
}

// Conn returns a connection for what the store has no method for.
func Conn(t testing.TB, url tenant.Secret) *pgx.Conn {
	t.Helper()
	ctx := context.WithoutCancel(t.Context())
	conn, err := pgx.Connect(ctx, url.Reveal())
	if err != nil {
		t.Fatalf("connect: %v", err)
	}
	t.Cleanup(func() { _ = conn.Close(ctx) })
	return conn
}

// empty takes every row away, past the triggers that forbid it.
func empty(url tenant.Secret) error {
	ctx := context.Background()
	conn, err := pgx.Connect(ctx, url.Reveal())
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(ctx) }()
	rows, _ := conn.Query(ctx, `
		SELECT c.oid::regclass::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE n.nspname = 'public' AND c.relkind IN ('r', 'p') AND NOT c.relispartition
			AND c.relname <> 'schema_migrations'`)
	tables, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	_, err = conn.Exec(ctx, `SET session_replication_role = replica;
		TRUNCATE `+strings.Join(tables, ", ")+` RESTART IDENTITY CASCADE;
		INSERT INTO upstream_budget DEFAULT VALUES;
		INSERT INTO tenant_counts VALUES ('', '', '', false, 0);
		WITH first AS (INSERT INTO incarnations (reason) VALUES ('first start') RETURNING id)
		INSERT INTO current_incarnation (id) SELECT id FROM first`)
	return err
}
