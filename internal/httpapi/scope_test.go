package httpapi_test

import (
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/go-chi/chi/v5"
	gocmp "github.com/google/go-cmp/cmp"

	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// A tenant whose labels change after a limited caller's request has begun, and before the request takes
// effect, is neither changed nor revealed. It is answered for like a tenant that does not exist.
func TestLabelsChangeDuringRequests(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	const product, admin = "product a", "admin of a"
	s.caller(product, tenant.NewCaller{Role: tenant.Provisioner, Scope: tenant.Scope{"product": "a"}})
	s.caller(admin, tenant.NewCaller{Role: tenant.Admin, Scope: tenant.Scope{"product": "a"}})
	prepare := func(method, path, body, wait string) answer {
		t.Helper()
		a := s.call(tenant.Provisioner, method, "/v1/tenants/"+path, body, "Prefer", wait)
		if a.status >= 300 {
			t.Fatalf("%s %s answers %d %s", method, path, a.status, a.body)
		}
		return a
	}
	const labels, now, async = `{"labels":{"product":"a"}}`, "wait=30", "respond-async"
	active := prepare("PUT", "active", labels, now)
	prepare("PUT", "active/keys/default/rotations/first", "", now)
	prepare("PUT", "suspended", labels, now)
	prepare("POST", "suspended/suspend", "", now)
	prepare("PUT", "deleting", labels, now)
	prepare("DELETE", "deleting", "", now)
	s.replica.Stop()
	prepare("PUT", "deleted", labels, async)
	prepare("DELETE", "deleted", "", now)
	prepare("PUT", "restored", labels, async)
	prepare("POST", "batch", `{"tenants":[{"id":"importing","labels":{"product":"a"}}]}`, now)

	conn := pgtest.Conn(t, s.world.URL)
	exec := func(sql string) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	rows := func() (text string) {
		t.Helper()
		if err := conn.QueryRow(t.Context(), `SELECT concat_ws(E'\n',
			(SELECT string_agg((to_jsonb(t) - 'labels')::text, E'\n' ORDER BY id) FROM tenants t), (SELECT string_agg(k::text, E'\n' ORDER BY id) FROM keys k),
			(SELECT string_agg(a::text, E'\n' ORDER BY id) FROM apps a WHERE state <> 'building'), (SELECT string_agg(e::text, E'\n' ORDER BY id) FROM audit_events e))`).Scan(&text); err != nil {
			t.Fatal(err)
		}
		return text
	}
	// As of a tenant that a report has found at Clarifai: the next PUT counts as its sign-up.
	exec(`UPDATE tenants SET attributes_hash = repeat('\000', 64)::bytea WHERE id = 'restored'`)

	var tested []string
	for _, c := range []struct {
		caller             tenant.Role
		method, path, body string
		code               string
	}{
		{product, "PUT", "importing", "", "tenant_not_found"},
		{product, "PUT", "deleted", "", "tenant_not_found"},
		{product, "PUT", "restored", `{"display_name":"Eve"}`, "tenant_not_found"},
		{product, "PUT", "deleting?on_deleting=replace", "", "tenant_not_found"},
		{product, "PATCH", "active", `{"display_name":"Eve"}`, "tenant_not_found"},
		{product, "DELETE", "active", "", "tenant_not_found"},
		{admin, "DELETE", "active?purge=now", "", "tenant_not_found"},
		{product, "POST", "active/suspend", "", "tenant_not_found"},
		{product, "POST", "suspended/resume", "", "tenant_not_found"},
		{product, "POST", "deleting/restore", "", "tenant_not_found"},
		{admin, "POST", "active/retry", "", "tenant_not_found"},
		{product, "PUT", "active/keys/search", "", "tenant_not_found"},
		{product, "PUT", "active/keys/search", `{"scopes":["Nonsense"]}`, "tenant_not_found"},
		{product, "DELETE", "active/keys/default", "", "tenant_not_found"},
		{product, "PUT", "active/keys/default/rotations/second", "", "tenant_not_found"},
		{product, "PUT", "active/keys/default/rotations/first", "", "tenant_not_found"},
		{product, "POST", "active/keys/default/rotations/first/confirm", "", "tenant_not_found"},
		{product, "GET", "active/keys/default/secret", "", "tenant_not_found"},
		{product, "POST", "../keys/identify", `{"app_id":"` + active.at(t, "app", "id").(string) + `"}`, "app_not_found"},
		{product, "POST", "batch", `{"tenants":[{"id":"deleted"},{"id":"restored"}]}`, "tenant_not_found"},
	} {
		path := strings.Replace("/v1/tenants/"+c.path, "tenants/../", "", 1)
		var headers []string
		if c.method == http.MethodPatch {
			headers = []string{"Content-Type", "application/merge-patch+json"}
		}
		before := rows()
		// The request waits for the row of the tenant, or for the audit log, until the labels have changed.
		exec(`BEGIN; UPDATE tenants SET labels = '{"product": "b"}'; LOCK TABLE audit_events IN EXCLUSIVE MODE`)
		answered := make(chan answer, 1)
		go func() { answered <- s.call(c.caller, c.method, path, c.body, headers...) }()
		provisiontest.Eventually(t, c.method+" "+path+" waits", func() (waits bool) {
			if err := conn.QueryRow(t.Context(), `SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock')`).
				Scan(&waits); err != nil {
				t.Fatal(err)
			}
			return waits || len(answered) > 0
		})
		exec(`COMMIT`)
		a := <-answered
		if c.path == "batch" {
			for _, result := range a.at(t, "results").([]any) {
				if problem, _ := result.(map[string]any)["problem"].(map[string]any); problem["code"] != c.code {
					t.Errorf("%s %s answers %d %s", c.method, path, a.status, a.body)
				}
			}
		} else if a.status != http.StatusNotFound || a.at(t, "code") != c.code {
			t.Errorf("%s %s of a tenant that is another's by now answers %d %s", c.method, path, a.status, a.body)
		}
		exec(`UPDATE tenants SET labels = '{"product": "a"}'`)
		if diff := gocmp.Diff(strings.Split(before, "\n"), strings.Split(rows(), "\n")); diff != "" {
			t.Errorf("%s %s changes rows: %s", c.method, path, diff)
		}
		route := chi.NewRouteContext()
		path, _, _ = strings.Cut(path, "?")
		s.handler.(chi.Routes).Match(route, c.method, path)
		tested = append(tested, c.method+" "+route.RoutePattern())
	}
	if err := chi.Walk(s.handler.(chi.Routes), func(method, route string, _ http.Handler, _ ...func(http.Handler) http.Handler) error {
		command := method != http.MethodGet || strings.HasSuffix(route, "/secret")
		if command && strings.Contains(route, "{tenant_id}") && !slices.Contains(tested, method+" "+route) {
			t.Errorf("%s %s is not tried here", method, route)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}
