package httpapi_test

import (
	"context"
	"net/http"
	"testing"

	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// A request whose change is committed does not fail if its response cannot be complete: it is answered
// 202, and the same request again is complete.
func TestResponsesAfterTheCommit(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	conn := pgtest.Conn(t, s.world.URL)
	exec := func(ctx context.Context, sql string) {
		t.Helper()
		if _, err := conn.Exec(ctx, sql); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { // other tests use the database
		s.replica.Stop()
		exec(context.WithoutCancel(t.Context()), `DROP TRIGGER IF EXISTS no_reveals ON audit_events; DROP FUNCTION IF EXISTS no_reveals`)
	})
	reveals := func(body string) {
		t.Helper()
		exec(t.Context(), `CREATE OR REPLACE FUNCTION no_reveals() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN `+body+` END $$`)
	}
	reveals(`RAISE 'a statement timeout' USING ERRCODE = '57014';`)
	exec(t.Context(), `
		CREATE TRIGGER no_reveals BEFORE INSERT ON audit_events FOR EACH ROW WHEN (NEW.action = 'key.revealed') EXECUTE FUNCTION no_reveals()`)
	paths := []string{"/v1/tenants/user_1", "/v1/tenants/user_1/keys/search", "/v1/tenants/user_1/keys/search/rotations/first"}
	for _, path := range paths {
		a := s.call(tenant.Provisioner, "PUT", path, "", "Prefer", "wait=30")
		if a.status != http.StatusAccepted || a.header.Get("Location") != path || a.header.Get("Retry-After") == "" || a.at(t, "credentials") != nil {
			t.Errorf("PUT %s whose key cannot be revealed answers %d %v %s", path, a.status, a.header, a.body)
		}
	}
	reveals(`RETURN NEW;`)
	for _, path := range paths {
		if a := s.call(tenant.Provisioner, "PUT", path, ""); a.status != http.StatusOK || a.at(t, "credentials", "key") == nil {
			t.Errorf("PUT %s again answers %d %s", path, a.status, a.body)
		}
	}
}

// Commands of an admin that change something once for each request report no failure after the commit.
func TestCommandsAfterTheCommit(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	s := newSiteOn(t, w, w.Start(provisiontest.Options{Idle: true}))
	for _, c := range []struct{ path, body, unreadable, counts string }{
		{"/v1/reconciliations", "", "reconciliation_items", "reconciliations"},
		{"/v1/recovery/begin", `{"reason":"a drill"}`, "campaigns", "incarnations"},
	} {
		conn := pgtest.Conn(t, w.URL)
		count := func() (n int) {
			t.Helper()
			if err := conn.QueryRow(t.Context(), `SELECT count(*) FROM `+c.counts).Scan(&n); err != nil {
				t.Fatal(err)
			}
			return n
		}
		before := count()
		if _, err := conn.Exec(t.Context(), `BEGIN; LOCK TABLE `+c.unreadable+` IN ACCESS EXCLUSIVE MODE`); err != nil {
			t.Fatal(err)
		}
		a := s.call(tenant.Admin, "POST", c.path, c.body)
		if done := count() - before; a.status >= 500 && done > 0 || a.status < 300 && done != 1 {
			t.Errorf("POST %s answers %d %s, and is carried out %d times", c.path, a.status, a.body, done)
		}
		if _, err := conn.Exec(t.Context(), `ROLLBACK`); err != nil {
			t.Fatal(err)
		}
	}
}
