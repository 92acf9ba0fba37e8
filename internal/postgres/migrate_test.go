package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/tenant"
	"github.com/tenantry/tenantry/migrations"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// Each number has one up and one down, without gaps.
func TestMigrationsAreNumbered(t *testing.T) {
	t.Parallel()
	name := regexp.MustCompile(`^(\d{6})_[a-z0-9_]+\.(up|down)\.sql$`)
	seen := map[string]int{}
	files, err := fs.Glob(migrations.FS, "*")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		m := name.FindStringSubmatch(f)
		if m == nil {
			t.Errorf("%s is not named NNNNNN_name.up.sql or .down.sql", f)
			continue
		}
		seen[m[1]+m[2]]++
	}
	for n := 1; n <= postgres.KnownSchema(); n++ {
		for _, direction := range []string{"up", "down"} {
			if key := fmt.Sprintf("%06d%s", n, direction); seen[key] != 1 {
				t.Errorf("there are %d migrations %s; want 1", seen[key], key)
			}
		}
	}
}

func TestMigrateUpAndDown(t *testing.T) {
	t.Parallel()
	url := pgtest.EmptyURL(t)
	db := pgtest.OpenURL(t, url)
	says := func(want string) {
		t.Helper()
		s, err := db.Schema(t.Context())
		if err != nil {
			t.Fatalf("read schema: %v", err)
		}
		switch err := s.Err(); {
		case want == "" && err != nil:
			t.Errorf("the schema is not served: %v", err)
		case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
			t.Errorf("the schema's fault is %v; want %q", err, want)
		}
	}
	says("run `tenantry migrate up`")

	// Several replicas may start with the migration at once.
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if err := postgres.MigrateUp(t.Context(), url); err != nil {
				t.Errorf("migrate up: %v", err)
			}
		})
	}
	wg.Wait()
	says("")

	conn := pgtest.Conn(t, url)
	exec := func(sql string) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	exec(`UPDATE schema_migrations SET dirty = true`)
	says("was cut off")
	if err := postgres.MigrateUp(t.Context(), url); err == nil || !strings.Contains(err.Error(), "was cut off") {
		t.Errorf("migrate up on a migration that was cut off fails with %v", err)
	}
	exec(`UPDATE schema_migrations SET dirty = false, version = version + 1`) // a newer release was here
	says("")
	if err := postgres.MigrateUp(t.Context(), url); err != nil {
		t.Errorf("migrate up on a newer schema that this binary may serve: %v", err)
	}
	if err := postgres.MigrateDown(t.Context(), url, 1); err == nil || !strings.Contains(err.Error(), "run `tenantry migrate down` with the newer one") {
		t.Errorf("migrate down on a newer schema fails with %v", err)
	}
	exec(fmt.Sprintf(`CREATE OR REPLACE FUNCTION tenantry_oldest_code() RETURNS integer LANGUAGE sql IMMUTABLE AS 'SELECT %d'`,
		postgres.KnownSchema()+1))
	says("run a newer tenantry")
	if err := postgres.MigrateUp(t.Context(), url); err == nil || !strings.Contains(err.Error(), "run a newer tenantry") {
		t.Errorf("migrate up on a newer schema that bars this binary fails with %v", err)
	}
	exec(`UPDATE schema_migrations SET version = version - 1;
		CREATE OR REPLACE FUNCTION tenantry_oldest_code() RETURNS integer LANGUAGE sql IMMUTABLE AS 'SELECT 1'`)
	exec(`DROP SCHEMA public CASCADE; CREATE SCHEMA public`)
	if err := postgres.MigrateUp(t.Context(), url); err != nil {
		t.Fatal(err)
	}

	// The newest can be taken back and repeated.
	if err := errors.Join(postgres.MigrateDown(t.Context(), url, 1), postgres.MigrateUp(t.Context(), url)); err != nil {
		t.Fatal(err)
	}
	if err := postgres.MigrateDown(t.Context(), url, 1000); err != nil {
		t.Fatalf("migrate down: %v", err)
	}
	says("run `tenantry migrate up`")
	var left string
	err := conn.QueryRow(t.Context(), `
		SELECT coalesce(string_agg(name, ' '), '') FROM (
			SELECT relname AS name FROM pg_class WHERE relnamespace = 'public'::regnamespace
			UNION ALL SELECT proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace
			UNION ALL SELECT typname FROM pg_type WHERE typnamespace = 'public'::regnamespace AND typtype = 'e') everything
		WHERE name NOT IN ('schema_migrations', 'schema_migrations_pkey', 'schema_migrations_version_idx')`).Scan(&left)
	if err != nil || left != "" {
		t.Errorf("migrate down leaves %q, %v; want nothing", left, err)
	}
	if err := postgres.MigrateDown(t.Context(), url, 1); err == nil || !strings.Contains(err.Error(), "nothing to take back") {
		t.Errorf("migrate down without a schema fails with %v", err)
	}
	if err := postgres.MigrateUp(t.Context(), url); err != nil {
		t.Errorf("migrate up again: %v", err)
	}
	says("")
}

// A migration must not rewrite the table apps: that changes the fingerprint, and each upgrade
// would begin recovery mode and retire the pool.
func TestMigrationsKeepFingerprint(t *testing.T) {
	t.Parallel()
	const first = 9 // which makes the fingerprint
	url := pgtest.URL(t)
	for range postgres.KnownSchema() - first {
		if err := postgres.MigrateDown(t.Context(), url, 1); err != nil {
			t.Fatal(err)
		}
	}
	if err := postgres.MigrateUp(t.Context(), url); err != nil {
		t.Fatal(err)
	}
	conn := pgtest.Conn(t, url)
	var same bool
	if err := conn.QueryRow(t.Context(), `SELECT apps_file = pg_relation_filepath('apps') AND xmin = written_by FROM current_incarnation`).Scan(&same); err != nil || !same {
		t.Errorf("after the migrations since %d the fingerprint is the same: %v, %v", first, same, err)
	}
}

// Each migration says what it locks: as many tables, and as strongly, as it does.
func TestMigrationsSayWhatTheyLock(t *testing.T) {
	t.Parallel()
	const described = 10 // older migrations need a service that is stopped
	conn := pgtest.Conn(t, pgtest.EmptyURL(t))
	exec := func(sql string) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	exec(`CREATE TEMP TABLE existing (id oid)`)
	for _, m := range postgres.PendingMigrations(0) {
		sql, err := migrations.FS.ReadFile(m.File)
		if err != nil {
			t.Fatal(err)
		}
		exec(`BEGIN; TRUNCATE existing; INSERT INTO existing SELECT oid FROM pg_class WHERE relnamespace = 'public'::regnamespace`)
		exec(string(sql))
		rows, _ := conn.Query(t.Context(), `
			SELECT c.relname, bool_or(l.mode = 'AccessExclusiveLock')
			FROM pg_locks l JOIN existing e ON e.id = l.relation
				LEFT JOIN pg_inherits h ON h.inhrelid = l.relation JOIN pg_class c ON c.oid = coalesce(h.inhparent, l.relation)
			WHERE l.pid = pg_backend_pid() AND c.relkind IN ('r', 'p') AND l.mode NOT IN ('AccessShareLock', 'RowShareLock', 'RowExclusiveLock', 'ShareUpdateExclusiveLock')
			GROUP BY 1 ORDER BY 1`)
		took, err := pgx.CollectRows(rows, pgx.RowToStructByPos[postgres.TableLock])
		if err != nil {
			t.Fatal(err)
		}
		exec(`COMMIT`)
		if m.Version >= described && !slices.Equal(took, m.Locks) {
			t.Errorf("%s says that it locks %+v, and locks %+v: begin it with LOCK TABLE, as 000010 does", m.File, m.Locks, took)
		}
	}
	for version, want := range map[int][]string{
		0: {"creates the schema"},
		8: {"migration 9 (incarnations) blocks reads and writes of the tables that it changes",
			"migration 10 (fault_isolation) blocks reads and writes of adoptions, apps, campaigns, keys, reconciliations, replicas, tenants; and writes of audit_events"},
	} {
		text := strings.Join(postgres.Announce(version, postgres.PendingMigrations(version)), "\n")
		for _, w := range want {
			if !strings.Contains(text, w) {
				t.Errorf("at version %d, migrate up announces %q; want %q in it", version, text, w)
			}
		}
	}
}

// Indexes of the audit log are built while events are inserted and a dump reads the log. A build that
// was stopped is repeated.
func TestMigrateUpBuildsAuditIndexes(t *testing.T) {
	t.Parallel()
	url := pgtest.EmptyURL(t)
	if err := errors.Join(postgres.MigrateUp(t.Context(), url), postgres.MigrateDown(t.Context(), url, postgres.KnownSchema()-9)); err != nil {
		t.Fatal(err)
	}
	conn := pgtest.Conn(t, url)
	exec := func(sql string) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	holds := func(sql string) (yes bool) {
		t.Helper()
		if err := conn.QueryRow(t.Context(), sql).Scan(&yes); err != nil {
			t.Fatal(err)
		}
		return yes
	}
	exec(`INSERT INTO audit_events (at, actor, action, key_id) SELECT now() + i % 4 * interval '31 days' - interval '31 days', 'a', 'a', gen_random_uuid() FROM generate_series(1, 100) i`)
	dump, err := pgtest.Conn(t, url).BeginTx(t.Context(), pgx.TxOptions{IsoLevel: pgx.RepeatableRead})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := dump.Exec(t.Context(), `SELECT count(*) FROM audit_events`); err != nil {
		t.Fatal(err)
	}
	first, stop := context.WithCancel(t.Context())
	defer stop()
	migrated := make(chan error, 1)
	go func() { migrated <- postgres.MigrateUp(first, url) }()
	exec(`SET lock_timeout = '20s'`) // the dump goes on for longer
	for building := false; !building; {
		select {
		case err := <-migrated:
			t.Fatalf("migrate up ends before the dump: %v", err)
		default:
		}
		exec(`INSERT INTO audit_events (actor, action) VALUES ('a', 'a')`)
		building = holds(`SELECT EXISTS (SELECT FROM pg_stat_progress_create_index WHERE datname = current_database() AND phase LIKE 'waiting%')`)
	}
	exec(`INSERT INTO audit_events (actor, action) VALUES ('a', 'a')`)
	stop()
	if err := <-migrated; err == nil {
		t.Error("migrate up succeeds while an index is being built")
	}
	if !holds(`SELECT EXISTS (SELECT FROM pg_index WHERE NOT indisvalid)`) {
		t.Error("no index is unfinished")
	}
	if err := dump.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := postgres.MigrateUp(t.Context(), url); err != nil {
		t.Fatal(err)
	}
	var bad string
	if err := conn.QueryRow(t.Context(), `
		SELECT coalesce(string_agg(indexrelid::regclass::text || ' on ' || indrelid::regclass, ', '), '') FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
		WHERE NOT indisvalid OR relname IN ('audit_events_tenant', 'audit_events_actor', 'audit_events_action')
			OR relam = (SELECT oid FROM pg_am WHERE amname = 'hash')`).Scan(&bad); err != nil || bad != "" {
		t.Errorf("indexes that are unfinished or replaced: %s, %v; want none", bad, err)
	}
}

func TestUnreachable(t *testing.T) {
	t.Parallel()
	db := pgtest.OpenURL(t, tenant.NewSecret("postgres://u:hunter2@127.0.0.1:1/none"))
	err := db.Ping(t.Context())
	if !errors.Is(err, tenant.Unavailable) || strings.Contains(err.Error(), "hunter2") {
		t.Errorf("Ping of a database that is away fails with %v; want Unavailable, without the password", err)
	}
}

func TestParseURL(t *testing.T) {
	t.Parallel()
	const text = "not a Postgres connection string: it should read like postgres://user:password@host:5432/database, " +
		"with the special characters of the password percent-encoded"
	for _, bad := range []string{"hunter2", "postgres://u:hunter2@h:port/d", "mysql://u:hunter2@h/d", "postgres://u:%zz@h/d", "host=h port=x",
		"postgres://u:12/hunter2@h/d", "postgres://u:12?hunter2@h/d", "postgres://u:12#hunter2@h/d?sslmode=disable"} {
		if err := postgres.ParseURL(tenant.NewSecret(bad)); err == nil || err.Error() != text {
			t.Errorf("ParseURL(%q) = %v; want %s", bad, err, text)
		}
	}
	for _, good := range []string{"postgres://u:p@h/d", "postgres://u:p@h/d@e", "postgres:///d?host=/tmp&user=a@b", "host=h user=a@b", "postgres://h"} {
		if err := postgres.ParseURL(tenant.NewSecret(good)); err != nil {
			t.Errorf("ParseURL(%q) = %v", good, err)
		}
	}
}
