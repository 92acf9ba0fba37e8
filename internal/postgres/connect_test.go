package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// as is the connection string of a database for another role.
func as(t *testing.T, of tenant.Secret, role, password string) tenant.Secret {
	t.Helper()
	u, err := url.Parse(of.Reveal())
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.UserPassword(role, password)
	return tenant.NewSecret(u.String())
}

func run(t *testing.T, conn *pgx.Conn, sql string) {
	t.Helper()
	if _, err := conn.Exec(t.Context(), sql); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

// migratedCluster is a cluster of the test's own with a migrated database. It returns that database for
// a role without ownership, and connections of the owner to another database and to this one.
func migratedCluster(t *testing.T) (app tenant.Secret, owner *pgx.Conn, tables func() *pgx.Conn) {
	t.Helper()
	cluster, of := privateCluster(t)
	run(t, pgtest.Conn(t, of), `CREATE ROLE app LOGIN PASSWORD 'first'; GRANT USAGE ON SCHEMA public TO app; GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO app;
		GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO app; GRANT pg_monitor TO app`)
	return as(t, of, "app", "first"), pgtest.Conn(t, tenant.NewSecret(cluster.URL("postgres"))), func() *pgx.Conn { return pgtest.Conn(t, of) }
}

func opened(t *testing.T, cfg postgres.Config) *postgres.DB {
	t.Helper()
	db, err := postgres.Open(context.WithoutCancel(t.Context()), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	return db
}

// unavailable checks that err is an error which the caller may repeat, and that it says why.
func unavailable(t *testing.T, what string, err error, says string) {
	t.Helper()
	var e *tenant.Error
	if !errors.As(err, &e) || e.Kind != tenant.Unavailable || e.RetryAfter == 0 || !strings.Contains(e.Detail, says) {
		t.Errorf("%s: %v; want an unavailable database, with %q", what, err, says)
	}
}

// Each error while connecting, and each state in which a database takes no statements, means that the
// database is unavailable now, not that Tenantry is wrong.
func TestUnavailableDatabases(t *testing.T) {
	t.Parallel()
	app, owner, tables := migratedCluster(t)
	const name = "tenantry"
	for _, c := range []struct{ what, sql, undo, says string }{
		{"replaced password", `ALTER ROLE app PASSWORD 'second'`, `ALTER ROLE app PASSWORD 'first'`, "refuses the login"},
		{"locked role", `ALTER ROLE app NOLOGIN`, `ALTER ROLE app LOGIN`, "refuses the login"},
		{"closed database", `ALTER DATABASE ` + name + ` ALLOW_CONNECTIONS false`, `ALTER DATABASE ` + name + ` ALLOW_CONNECTIONS true`, "accepts no connections"},
		{"full database", `ALTER DATABASE ` + name + ` CONNECTION LIMIT 0`, `ALTER DATABASE ` + name + ` CONNECTION LIMIT -1`, "no free connection"},
		{"full role", `ALTER ROLE app CONNECTION LIMIT 0`, `ALTER ROLE app CONNECTION LIMIT -1`, "no free connection"},
		{"renamed database", `ALTER DATABASE ` + name + ` RENAME TO elsewhere`, `ALTER DATABASE elsewhere RENAME TO ` + name, "does not exist"},
	} {
		run(t, owner, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '`+name+`'`)
		until(t, "nobody is connected", func() bool { return count(t, owner, `pg_stat_activity WHERE datname = '`+name+`'`) == 0 })
		run(t, owner, c.sql)
		db := opened(t, postgres.Config{URL: app})
		_, err := db.Tenant(t.Context(), "user_1")
		unavailable(t, c.what, err, c.says)
		_, err = db.SignUp(t.Context(), newTenant("user_1"), actor)
		unavailable(t, c.what, err, c.says)
		unavailable(t, c.what, db.Ping(t.Context()), c.says)
		run(t, owner, c.undo)
		if err := db.Ping(t.Context()); err != nil {
			t.Errorf("%s, undone: %v", c.what, err)
		}
		db.Close()
	}
	conn := tables()
	for _, c := range []struct{ what, sql, undo, says string }{
		{"tables not restored yet", `ALTER TABLE tenants RENAME TO away`, `ALTER TABLE away RENAME TO tenants`, "being restored"},
		{"privileges not restored yet", `REVOKE ALL ON tenants FROM app`, `GRANT SELECT, INSERT, UPDATE, DELETE ON tenants TO app`, "refuses a privilege"},
	} {
		db := opened(t, postgres.Config{URL: app})
		run(t, conn, c.sql)
		_, err := db.Tenant(t.Context(), "user_1")
		unavailable(t, c.what, err, c.says)
		run(t, conn, c.undo)
	}
}

// The connection string is read for each new connection. While it cannot be read, the last one is used.
func TestURLIsReadAgain(t *testing.T) {
	t.Parallel()
	app, owner, _ := migratedCluster(t)
	var mu sync.Mutex
	now, failed := app, error(nil)
	db := opened(t, postgres.Config{URL: app, RereadURL: func() (tenant.Secret, error) {
		mu.Lock()
		defer mu.Unlock()
		return now, failed
	}})
	if err := db.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	const disconnect = `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'`
	run(t, owner, `ALTER ROLE app PASSWORD 'second'`)
	run(t, owner, disconnect)
	mu.Lock()
	now = as(t, app, "app", "second")
	mu.Unlock()
	until(t, "the new password is used", func() bool { return db.Ping(t.Context()) == nil })
	mu.Lock()
	failed = errors.New("the file is being replaced")
	mu.Unlock()
	run(t, owner, disconnect)
	until(t, "the new password is still used", func() bool { return db.Ping(t.Context()) == nil })
}

// Sessions that turned read-only are closed: when the database is writable again, so is Tenantry.
func TestReadOnlySessions(t *testing.T) {
	t.Parallel()
	app, owner, _ := migratedCluster(t)
	run(t, owner, `ALTER ROLE app SET default_transaction_read_only = on`)
	db := opened(t, postgres.Config{URL: app, MaxConns: 8})
	pool := db.DirectPool()
	held := make([]interface{ Release() }, 8)
	for i := range held {
		c, err := pool.Acquire(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		held[i] = c
	}
	for _, c := range held {
		c.Release()
	}
	_, err := db.SignUp(t.Context(), newTenant("user_1"), actor)
	unavailable(t, "read-only", err, "read-only")
	if _, err := db.Callers(t.Context(), "", 10); err != nil {
		t.Errorf("read-only, a lookup: %v", err)
	}
	run(t, owner, `ALTER ROLE app SET default_transaction_read_only = off`)
	failures := 0
	until(t, "a sign-up works", func() bool {
		_, err := db.SignUp(t.Context(), newTenant("user_1"), actor)
		if err != nil {
			failures++
		}
		return err == nil
	})
	if failures > 2 {
		t.Errorf("%d sign-ups failed after the database was writable again", failures)
	}
}

// A transaction of a replica that is cut off ends by itself, behind a pooler, too.
func TestSessionLimits(t *testing.T) {
	t.Parallel()
	of := pgtest.URL(t)
	for what, cfg := range map[string]postgres.Config{
		"direct": {URL: of},
		"pooler": {URL: pgtest.Bouncer(t, of, 200), DirectURL: of},
	} {
		db := opened(t, cfg)
		for name, want := range map[string]string{"statement_timeout": "1min", "lock_timeout": "2s", "idle_in_transaction_session_timeout": "10s"} {
			var inTx, session string
			if err := db.InTx(t.Context(), func(tx pgx.Tx) error { return tx.QueryRow(t.Context(), `SELECT current_setting($1)`, name).Scan(&inTx) }); err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			if err := db.DirectPool().QueryRow(t.Context(), `SELECT current_setting($1)`, name).Scan(&session); err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			if inTx != want || session != want {
				t.Errorf("%s: %s is %s in a transaction and %s in a session; want %s", what, name, inTx, session, want)
			}
		}
	}
}

// A locked table affects only the work that needs it.
func TestLockedTable(t *testing.T) {
	t.Parallel()
	of := pgtest.URL(t)
	db := opened(t, postgres.Config{URL: of})
	locks := pgtest.Conn(t, of)
	run(t, locks, `BEGIN; LOCK TABLE tenants IN ACCESS EXCLUSIVE MODE`)
	_, err := db.SignUp(t.Context(), newTenant("user_1"), actor)
	unavailable(t, "sign-up", err, "holds a lock")
	_, err = db.Suspend(t.Context(), "user_1", actor)
	unavailable(t, "suspend", err, "holds a lock")
	if _, err := db.Callers(t.Context(), "", 10); err != nil {
		t.Errorf("callers: %v", err)
	}
	run(t, locks, `ROLLBACK`)
	if _, err := db.SignUp(t.Context(), newTenant("user_1"), actor); err != nil {
		t.Error(err)
	}
}

// Postgres reports a commit as done, with a warning, if somebody cancels its wait for the synchronous
// standby. Tenantry does not: a failover would lose it.
func TestCancelledWaitForStandby(t *testing.T) {
	t.Parallel()
	app, owner, _ := migratedCluster(t)
	before := opened(t, postgres.Config{URL: app})
	if _, err := before.SignUp(t.Context(), newTenant("before"), actor); err != nil {
		t.Fatal(err)
	}
	db := opened(t, postgres.Config{URL: app})
	run(t, owner, `ALTER ROLE app SET synchronous_commit = on`)
	run(t, owner, `ALTER SYSTEM SET synchronous_standby_names = 'nobody'`)
	run(t, owner, `SELECT pg_reload_conf()`)
	calls := 0
	for what, call := range map[string]func() error{
		"one statement": func() error {
			_, err := db.SignUp(t.Context(), newTenant(tenant.ID(fmt.Sprint("user_", calls))), actor)
			return err
		},
		"transaction": func() error { _, err := db.Retry(t.Context(), "before", actor); return err },
	} {
		result := make(chan error, 1)
		send := func() { calls++; go func() { result <- call() }() }
		send()
		until(t, what+" waits", func() bool {
			select {
			case err := <-result: // the server has not read its settings yet
				if err != nil {
					t.Fatal(err)
				}
				send()
			default:
			}
			return count(t, owner, `(SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE usename = 'app' AND wait_event = 'SyncRep') AS cancelled`) > 0
		})
		unavailable(t, what, <-result, "")
	}
}

// While a dump holds its locks, new partitions are not made and nothing waits for them.
func TestPartitionsBesideADump(t *testing.T) {
	t.Parallel()
	app, _, tables := migratedCluster(t)
	owner := tables()
	var newest string
	if err := owner.QueryRow(t.Context(), `SELECT max(inhrelid::regclass::text) FROM pg_inherits
		WHERE inhparent = 'audit_events'::regclass AND inhrelid::regclass::text <> 'audit_events_other'`).Scan(&newest); err != nil {
		t.Fatal(err)
	}
	run(t, owner, `DROP TABLE `+newest)
	db := opened(t, postgres.Config{URL: app})
	dump := pgtest.Conn(t, app)
	run(t, dump, `BEGIN; SELECT count(*) FROM audit_events`)
	unavailable(t, "beside a dump", db.MakeAuditPartitions(t.Context()), "holds a lock")
	if _, err := db.SignUp(t.Context(), newTenant("user_1"), actor); err != nil {
		t.Errorf("beside a dump, a sign-up: %v", err)
	}
	run(t, dump, `ROLLBACK`)
	// The role of the service owns no table.
	if err := db.MakeAuditPartitions(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := count(t, owner, fmt.Sprintf(`pg_inherits WHERE inhrelid = to_regclass('%s')`, newest)); n != 1 {
		t.Errorf("the partition %s is missing", newest)
	}
	if n := count(t, owner, fmt.Sprintf(`pg_trigger WHERE tgrelid = to_regclass('%s')`, newest)); n < 2 {
		t.Errorf("%d triggers guard the partition %s", n, newest)
	}
}
