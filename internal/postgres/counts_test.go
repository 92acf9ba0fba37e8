package postgres_test

import (
	"testing"

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
