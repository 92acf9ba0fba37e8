package postgres_test

import (
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/postgres/pgtest"
)

// However many tenants wait in the background, a claim for those who do not passes by none
// of them, and one in the background begins with the oldest.
func TestClaimsPassByTheBackground(t *testing.T) {
	t.Parallel()
	conn := pgtest.Conn(t, pgtest.URL(t))
	for _, sql := range []string{
		`INSERT INTO tenants (id, profile, attributes_hash, background) SELECT 'user_' || i, 'default', sha256('') || sha256(''), true FROM generate_series(1, 20000) i`,
		`INSERT INTO apps (id, profile, profile_revision, state, made_at, ready_at) SELECT 'ready-' || i, 'default', 'x', 'ready', now(), now() FROM generate_series(1, 20) i`,
		`ANALYZE tenants, apps`,
	} {
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		sql  string
		args []any
		cond string
	}{
		"claim":               {postgres.ClaimSQL, []any{"default", "x", "", ""}, "(background = false)"},
		"builds":              {postgres.StartBuildsSQL, []any{"default", []string{"a"}, "x", "x", 8, 8, 8, 8}, "(background = false)"},
		"claim in background": {postgres.ClaimInBackgroundSQL, []any{"default", "x", "x", 100}, "(background = true)"},
	} {
		rows, _ := conn.Query(t.Context(), `EXPLAIN (COSTS OFF) `+c.sql, c.args...)
		lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
		plan := strings.Join(lines, "\n")
		if err != nil || strings.Contains(plan, "Seq Scan on tenants") || !strings.Contains(plan, c.cond) || strings.Contains(plan, "Sort Key: tenants") {
			t.Errorf("the plan of a %s is %v\n%s", name, err, plan)
		}
	}
}
