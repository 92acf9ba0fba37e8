package postgres_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// counted returns what TenantCounts must return, by reading all tenants.
func counted(t *testing.T, conn *pgx.Conn) []tenant.TenantCount {
	t.Helper()
	rows, _ := conn.Query(t.Context(), `
		SELECT t.profile, coalesce(a.profile_revision, ''), t.state, t.background, count(*)
		FROM tenants t LEFT JOIN apps a ON a.id = t.app_id GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4`)
	counts, err := pgx.CollectRows(rows, pgx.RowToStructByPos[tenant.TenantCount])
	if err != nil {
		t.Fatal(err)
	}
	return counts
}

// The number of tenants is exact after each change, whoever makes it and whatever happens at the same time.
func TestTenantCounts(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	conn, db := pgtest.Conn(t, url), pgtest.OpenURL(t, url)
	check := func(after string) {
		t.Helper()
		counts, err := db.TenantCounts(t.Context())
		if diff := cmp.Diff(counted(t, conn), counts, cmpopts.EquateEmpty()); err != nil || diff != "" {
			t.Errorf("after %s: %v, (- counted, + got):\n%s", after, err, diff)
		}
	}
	exec := func(sql string) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatalf("%v: %s", err, sql)
		}
	}
	check("nothing")
	readyApps(t, conn, 3)
	pooled := newTenant("pooled")
	pooled.Profile.PoolMax = 20
	exec(`INSERT INTO pools (profile, revision, target, planned_at, sign_ups, hits, misses) VALUES ('default', 'x', 3, now(), 0, 0, 0)`)
	for name, do := range map[string]func() error{
		"a sign-up from the pool": func() error { return ignore(db.SignUp(t.Context(), pooled, actor)) },
		"a sign-up":               func() error { return ignore(db.SignUp(t.Context(), newTenant("alone"), actor)) },
		"an import": func() error {
			batch := tenant.NewBatch{Tenants: []tenant.NewTenant{newTenant("import-1"), newTenant("import-2"), newTenant("pooled")}}
			return ignore(db.SignUpMany(t.Context(), batch, actor))
		},
	} {
		if err := do(); err != nil {
			t.Fatal(err)
		}
		check(name)
	}
	for _, sql := range []string{
		`UPDATE tenants SET background = NOT background WHERE id LIKE 'import-%'`,
		`UPDATE apps SET profile_revision = 'y' WHERE tenant_id = 'pooled'`,
		`UPDATE tenants SET state = 'suspending' WHERE id = 'pooled'`,
		`UPDATE tenants SET state = 'deleted', app_id = NULL WHERE id = 'pooled'`,
		`UPDATE tenants SET profile = 'narrow', display_name = 'x'`,
		`DELETE FROM tenants WHERE id = 'import-1'`,
	} {
		exec(sql)
		check(sql)
	}

	// What several callers do at once, while the changes are added up and all tenants are counted again.
	const tenants = 20
	for i := range tenants {
		changing(t, conn, tenant.ID(fmt.Sprint("busy-", i)), tenant.Active)
	}
	var working sync.WaitGroup
	for range 4 {
		working.Go(func() {
			for range 150 {
				n := rand.IntN(tenants)
				if err := db.InTx(t.Context(), func(tx pgx.Tx) error {
					if _, err := tx.Exec(t.Context(), `SELECT FROM tenants WHERE id = $1 FOR UPDATE`, fmt.Sprint("busy-", n)); err != nil {
						return err
					}
					if _, err := tx.Exec(t.Context(), `UPDATE apps SET profile_revision = $2 WHERE tenant_id = $1`, fmt.Sprint("busy-", n), fmt.Sprint(rand.IntN(3))); err != nil {
						return err
					}
					_, err := tx.Exec(t.Context(), `UPDATE tenants SET state = $2 WHERE id = $1`, fmt.Sprint("busy-", n),
						[]tenant.State{tenant.Active, tenant.Suspending, tenant.Suspended}[rand.IntN(3)])
					return err
				}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	done := make(chan struct{})
	go func() { defer close(done); working.Wait() }()
	for working := true; working; {
		select {
		case <-done:
			working = false
		default:
		}
		if err := db.FoldTenantCounts(t.Context()); err != nil {
			t.Error(err)
		}
		exec(`DELETE FROM tenant_counts WHERE state = ''`)
		if err := postgres.MigrateUp(t.Context(), url); err != nil {
			t.Error(err)
		}
	}
	check("many changes at once")
	if n := count(t, conn, `tenant_counts`); n > 600 {
		t.Errorf("the changes are %d rows: they were not added up", n)
	}
}

// Tenants from before the table are counted by `migrate up`, and until then no number is told.
func TestCountOfExistingTenants(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	conn, db := pgtest.Conn(t, url), pgtest.OpenURL(t, url)
	changing(t, conn, "old", tenant.Active)
	if _, err := conn.Exec(t.Context(), `TRUNCATE tenant_counts`); err != nil {
		t.Fatal(err)
	}
	changing(t, conn, "new", tenant.Suspended)
	if counts, err := db.TenantCounts(t.Context()); !isCounting(err) {
		t.Errorf("before the count the counts are %v, %v", counts, err)
	}
	// The count has its snapshot, and waits for a lock, while another tenant signs up.
	lock, err := pgtest.Conn(t, url).Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lock.Exec(t.Context(), `SELECT FROM tenant_counts FOR UPDATE`); err != nil {
		t.Fatal(err)
	}
	migrated := make(chan error, 1)
	go func() { migrated <- postgres.MigrateUp(t.Context(), url) }()
	for count(t, conn, `pg_stat_activity WHERE datname = current_database() AND wait_event = 'transactionid'`) == 0 {
		select {
		case err := <-migrated:
			t.Fatalf("migrate up does not wait: %v", err)
		default:
		}
	}
	changing(t, conn, "during", tenant.Active)
	if err := errors.Join(lock.Rollback(t.Context()), <-migrated); err != nil {
		t.Fatal(err)
	}
	counts, err := db.TenantCounts(t.Context())
	if diff := cmp.Diff(counted(t, conn), counts); err != nil || diff != "" || len(counts) != 2 {
		t.Errorf("after migrate up: %v, (- counted, + got):\n%s", err, diff)
	}
}

func isCounting(err error) bool {
	e, ok := err.(*tenant.Error)
	return ok && e.Kind == tenant.Unavailable && e.Code == "counting" && e.RetryAfter > time.Second
}

// What is counted for requests, for the metrics and with each end of a build does not grow with how many wait.
func TestWaitingTenantsAreCountedUpToALimit(t *testing.T) {
	t.Parallel()
	const importing, waiting = 30_000, 3
	url := pgtest.URL(t)
	conn := pgtest.Conn(t, url)
	for _, sql := range []string{
		`INSERT INTO tenants (id, profile, attributes_hash, background) SELECT 'u' || i, 'default', decode(repeat('00', 64), 'hex'), i > $2 FROM generate_series(1, $1::int + $2::int) i`,
		`INSERT INTO tenants (id, profile, attributes_hash, background) SELECT 'o' || i, 'other', decode(repeat('00', 64), 'hex'), i > $2 FROM generate_series(1, $1::int / 10000 + $2::int) i`,
	} {
		if _, err := conn.Exec(t.Context(), sql, importing, waiting); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := conn.Exec(t.Context(), `VACUUM (ANALYZE) tenants`); err != nil {
		t.Fatal(err)
	}
	var seen recorder
	db, err := postgres.Open(t.Context(), postgres.Config{URL: url, MaxConns: 4}.Traced(&seen))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)

	u, err := db.Upstream(t.Context(), []byte("pat"))
	if err != nil || u.Waiting != 2*waiting || u.OldestSince.IsZero() || u.Importing < 27_000 || u.Importing > 33_000 {
		t.Errorf("Upstream = %+v, %v; want %d that wait, and about %d in the background", u, err, 2*waiting, importing)
	}
	pools, _, err := db.Pools(t.Context(), []string{"default", "other", "none"})
	if err != nil || pools[0].Waiting != waiting || pools[0].Importing != 10_000 || pools[1].Waiting != waiting || pools[1].Importing != 3 || pools[2].Waiting+pools[2].Importing != 0 {
		t.Errorf("Pools = %+v, %v", pools, err)
	}
	every := tenant.PoolPlan{Patience: time.Minute, Drain: 5, Beat: 5 * time.Second, Beats: 720, Target: func(tenant.Profile, []int) int { return 3 }}
	if err := errors.Join(db.PlanPools(t.Context(), []tenant.Profile{profile}, every, actor), db.ClaimInBackground(t.Context(), profile, actor),
		db.StartBuilds(t.Context(), next(100))); err != nil {
		t.Fatal(err)
	}
	if n := count(t, conn, `apps WHERE state = 'building'`); n != waiting+limits.Import {
		t.Errorf("%d builds run; want %d", n, waiting+limits.Import)
	}
	shaper := newShaper(t, conn)
	for _, s := range seen.take() {
		if !plannable(s.sql) || strings.Contains(s.sql, "created_at > now()") { // sign-ups of the last hour
			continue
		}
		generic, custom := shaper.plans(t, s)
		for _, p := range []struct {
			plan
			name string
		}{{generic, "generic"}, {custom, "custom"}} {
			for _, fault := range p.faults() {
				if strings.Contains(fault, "tenants") {
					t.Errorf("the %s plan's cost grows: %s\n%s\n%s", p.name, fault, s.sql, p.shape())
				}
			}
		}
	}
}
