package postgres_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// Few tenants of a state are counted, many are estimated: within a tenth, which is more
// than Postgres's sample is off.
func TestCountTenants(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	conn, db := pgtest.Conn(t, url), pgtest.OpenURL(t, url)
	if counts, err := db.CountTenants(t.Context()); err != nil || len(counts) != 0 {
		t.Errorf("without tenants it counts %v, %v", counts, err)
	}
	add := func(from, to int) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), `
			INSERT INTO tenants (id, profile, state, attributes_hash)
			SELECT 'u' || i, 'default', CASE WHEN i % 20 = 0 THEN 'deleted' ELSE 'provisioning' END, decode(repeat('00', 64), 'hex')
			FROM generate_series($1::int, $2) i`, from, to); err != nil {
			t.Fatal(err)
		}
	}
	add(1, 40_000)
	if _, err := conn.Exec(t.Context(), `ANALYZE tenants`); err != nil {
		t.Fatal(err)
	}
	add(40_001, 60_000) // since Postgres last looked
	counts, err := db.CountTenants(t.Context())
	if err != nil || counts[tenant.Deleted] != 3000 || len(counts) != 2 {
		t.Errorf("it counts %v, %v; want 3000 that are deleted", counts, err)
	}
	if n := counts[tenant.Provisioning]; n < 51_300 || n > 62_700 {
		t.Errorf("of 57000 that wait it estimates %d", n)
	}
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
