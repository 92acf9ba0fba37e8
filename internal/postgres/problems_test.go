package postgres_test

import (
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// The list of tenants with a problem has every tenant that shows one, and no other, whatever the problem is
// of and whatever filters it is combined with.
func TestListOfProblems(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	conn, db := pgtest.Conn(t, url), pgtest.OpenURL(t, url)
	exec := func(sql string) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatalf("%v: %s", err, sql)
		}
	}
	// Of each state: a tenant without a problem, with one of its own, and with one of its app, of each kind
	// of key, and of an app of an earlier incarnation.
	for _, state := range tenant.States {
		for _, of := range []string{"none", "tenant", "app", "creating", "revoking", "lost", "revoked", "earlier"} {
			id := tenant.ID(fmt.Sprintf("%s-%s", state, of))
			if state == tenant.Provisioning || state == tenant.Deleted {
				exec(fmt.Sprintf(`INSERT INTO tenants (id, profile, state, attributes_hash) VALUES ('%s', '%s', '%s', repeat('x', 64)::bytea)`,
					id, map[string]string{"app": "pro"}[of]+"default", state))
			} else {
				changing(t, conn, id, state, tenant.KeyRevoking)
			}
			exec(fmt.Sprintf(map[string]string{
				"none":     `SELECT '%s'`,
				"tenant":   `UPDATE tenants SET problem = '{"code": "x"}' WHERE id = '%s'`,
				"app":      `UPDATE apps SET problem = '{"code": "x"}' WHERE tenant_id = '%s'`,
				"creating": `UPDATE keys SET problem = '{"code": "x"}', state = 'creating', ciphertext = NULL WHERE app_id = 'app-%s'`,
				"revoking": `UPDATE keys SET problem = '{"code": "x"}' WHERE app_id = 'app-%s'`,
				"lost":     `UPDATE keys SET problem = '{"code": "x"}', state = 'lost', ciphertext = NULL WHERE app_id = 'app-%s'`,
				"revoked":  `UPDATE keys SET problem = '{"code": "x"}', state = 'revoked', ciphertext = NULL, revoked_at = now() WHERE app_id = 'app-%s'`,
				"earlier":  `UPDATE apps SET incarnation = gen_random_uuid() WHERE tenant_id = '%s'`,
			}[of], id))
		}
	}
	yes, no := true, false
	list := func(f postgres.TenantFilter) (ids []string) {
		t.Helper()
		for after := (postgres.Position{}); ; {
			page, err := db.Tenants(t.Context(), f, after, 5)
			if err != nil {
				t.Fatal(err)
			}
			for _, is := range page {
				after = postgres.Position{CreatedAt: is.CreatedAt, ID: is.ID}
				if f.HasProblem != nil || is.Problem != nil {
					ids = append(ids, string(is.ID))
				}
			}
			if len(page) < 5 {
				return ids
			}
		}
	}
	for name, sql := range map[string]string{
		"nothing":         `SELECT`,
		"a failing build": `INSERT INTO apps (id, profile, profile_revision, problem) VALUES ('building', 'prodefault', 'x', '{"code": "x"}')`,
		"a pause":         `UPDATE upstream_budget SET pauses = 1, pause_reason = '{"code": "x"}'`,
		"paused work":     `INSERT INTO manual_pause (scope, reason, paused_by) VALUES ('all', 'x', 'x')`,
		"paused removals": `INSERT INTO manual_pause (scope, reason, paused_by) VALUES ('removals', 'x', 'x')`,
		"a watch":         `UPDATE current_incarnation SET recovery = 'watching', recovery_since = now(), written_by = pg_current_xact_id()::xid`,
		"a recovery":      `UPDATE current_incarnation SET recovery = 'recovering', recovery_since = now(), written_by = pg_current_xact_id()::xid`,
		"a stop":          `UPDATE current_incarnation SET recovery = 'stopped', recovery_since = now(), written_by = pg_current_xact_id()::xid`,
	} {
		exec(sql)
		for _, f := range []postgres.TenantFilter{{}, {State: tenant.Suspended}, {State: tenant.Provisioning}, {Profile: "prodefault"}, {IDPrefix: "deleting-"}} {
			want := list(f)
			f.HasProblem = &yes
			if diff := cmp.Diff(want, list(f)); diff != "" {
				t.Errorf("with %s, the filter %+v (- tenants that show a problem, + got):\n%s", name, f, diff)
			}
			all, without := f, f
			all.HasProblem, without.HasProblem = nil, &no
			if n := len(list(without)) + len(want); n != countAll(t, db, all) {
				t.Errorf("with %s, the filter %+v: those with and those without a problem are %d; want %d", name, f, n, countAll(t, db, all))
			}
		}
		exec(`UPDATE upstream_budget SET pauses = 0, pause_reason = NULL; DELETE FROM manual_pause; UPDATE apps SET problem = NULL WHERE id = 'building'`)
		exec(`UPDATE current_incarnation SET recovery = NULL, recovery_since = NULL, written_by = pg_current_xact_id()::xid`)
	}
}

func countAll(t *testing.T, db *postgres.DB, f postgres.TenantFilter) int {
	t.Helper()
	all, err := db.Tenants(t.Context(), f, postgres.Position{}, 1000)
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}
