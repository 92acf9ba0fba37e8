package httpapi_test

import (
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"github.com/go-chi/chi/v5"

	"github.com/tenantry/tenantry/internal/httpapi"
	"github.com/tenantry/tenantry/internal/localpg"
	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// tellsOfNothingCached are the routes that change things, and nothing that look-ups are
// answered with before they answer.
var tellsOfNothingCached = map[string]bool{
	"POST /v1/keys/identify":                        true,
	"POST /v1/reconciliations":                      true, // works in the background
	"POST /v1/rotations":                            true,
	"POST /v1/profiles/{profile_name}/applications": true,
	"POST /v1/campaigns/{campaign_id}/pause":        true,
	"POST /v1/campaigns/{campaign_id}/resume":       true,
	"POST /v1/campaigns/{campaign_id}/stop":         true,
	"POST /v1/tenants/{tenant_id}/retry":            true,
	"POST /v1/recovery/begin":                       true, // see TestRecoveryStates
	"POST /v1/recovery/end":                         true,
	"POST /v1/recovery/take-over":                   true,
	"POST /v1/recovery/decisions":                   true, // carried out in the background
	"POST /v1/recovery/removals":                    true, // of apps without a tenant
	"POST /v1/callers":                              true, // of a token that nobody has used
	"DELETE /v1/callers/{caller_id}":                true, // see TestCallersReadTheirWrites
	"POST /v1/callers/{caller_id}/rotations":        true,
}

// What a caller has changed it finds changed on the same replica, whatever was held in
// memory before.
func TestCallersReadTheirWrites(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	byHand := s.world.AppByHand(provisiontest.PAT, "hand-made", nil)
	paths := []string{"/v1/tenants/u", "/v1/tenants/u/keys", "/v1/tenants/u/keys/default", "/v1/tenants/u/keys/reports",
		"/v1/tenants/adopted", "/v1/tenants/adopted/keys", "/v1/apps/hand-made", "/v1/tenants/in_a_batch"}
	show := func(a answer) string {
		body := string(a.body)
		if a.status >= 400 {
			body = fmt.Sprint(a.at(t, "code"))
		}
		return fmt.Sprint(a.status, " ", a.header.Get("ETag"), " ", body)
	}
	get := func(path string, headers ...string) string {
		return show(s.call(tenant.Viewer, "GET", path, "", headers...))
	}
	warm := func() {
		t.Helper()
		provisiontest.Eventually(t, "what is held is trusted", func() bool { return s.replica.DB.CacheStats().Trusted })
		for _, p := range paths {
			get(p)
		}
	}
	compare := func(after string) {
		t.Helper()
		held := map[string]string{}
		for _, p := range paths {
			held[p] = get(p)
		}
		for _, p := range paths {
			if is := get(p, "Cache-Control", "max-age=0, No-Cache"); held[p] != is && !strings.Contains(held[p], `"revoking"`) && !strings.Contains(held[p], `"provisioning"`) { // which are never held
				t.Errorf("after %s, GET %s answers %s; Postgres has %s", after, p, held[p], is)
			}
		}
	}
	const tenants, key = "/v1/tenants/{tenant_id}", "/v1/tenants/{tenant_id}/keys/{key_name}"
	done := map[string]bool{}
	var secret string
	for _, step := range []struct {
		route, path, body string
		role              tenant.Role
		status            int
	}{
		{"PUT " + tenants, "/v1/tenants/u", "", tenant.Provisioner, 201},
		{"PATCH " + tenants, "/v1/tenants/u", `{"display_name":"Ada","labels":{"plan":"pro"}}`, tenant.Provisioner, 200},
		{"PUT " + key, "/v1/tenants/u/keys/reports", "", tenant.Provisioner, 201},
		{"DELETE " + key, "/v1/tenants/u/keys/reports", "", tenant.Admin, 200},
		{"PUT " + key + "/rotations/{rotation_id}", "/v1/tenants/u/keys/default/rotations/r1", `{"overlap":"1h"}`, tenant.Provisioner, 201},
		{"POST " + key + "/rotations/{rotation_id}/confirm", "/v1/tenants/u/keys/default/rotations/r1/confirm", "", tenant.Provisioner, 200},
		{"PUT " + key + "/rotations/{rotation_id}", "/v1/tenants/u/keys/default/rotations/r2", `{"overlap":"0s"}`, tenant.Provisioner, 201},
		{"POST /v1/keys/quarantine", "/v1/keys/quarantine", "", tenant.Admin, 200},
		{"POST " + tenants + "/suspend", "/v1/tenants/u/suspend", "", tenant.Admin, 200},
		{"POST " + tenants + "/resume", "/v1/tenants/u/resume", "", tenant.Admin, 200},
		{"DELETE " + tenants, "/v1/tenants/u", "", tenant.Admin, 200},
		{"POST /v1/upstream/pause", "/v1/upstream/pause", `{"scope":"removals","reason":"incident"}`, tenant.Admin, 200},
		{"POST /v1/upstream/resume", "/v1/upstream/resume", "", tenant.Admin, 200},
		{"POST " + tenants + "/restore", "/v1/tenants/u/restore", "", tenant.Admin, 200},
		{"DELETE " + tenants, "/v1/tenants/u?purge=now", "", tenant.Admin, 200},
		{"PUT " + tenants, "/v1/tenants/u?on_deleting=replace", `{"display_name":"Ada","labels":{"plan":"pro"}}`, tenant.Provisioner, 201},
		{"PUT " + tenants, "/v1/tenants/adopted", adoptBody(`"app_id":"hand-made","key":"` + byHand.Reveal() + `"`), tenant.Provisioner, 201},
		{"POST /v1/tenants/batch", "/v1/tenants/batch", `{"tenants":[{"id":"in_a_batch"}]}`, tenant.Provisioner, 200},
	} {
		warm()
		method, _, _ := strings.Cut(step.route, " ")
		if step.path == "/v1/keys/quarantine" {
			step.body = `{"key":"` + secret + `"}`
		}
		got := s.call(step.role, method, step.path, step.body, "Prefer", "wait=30")
		if got.status != step.status {
			t.Fatalf("%s %s answers %d %s", method, step.path, got.status, got.body)
		}
		compare(step.route)
		done[step.route] = true
		if a := s.call(tenant.Provisioner, "GET", "/v1/tenants/u/keys/default/secret", ""); a.status == 200 {
			secret = fmt.Sprint(a.at(t, "key"))
		}
		if app, ok := s.call(tenant.Viewer, "GET", "/v1/tenants/u", "").at(t, "app", "id").(string); ok {
			paths = append(paths[:8:8], "/v1/apps/"+app)
		}
	}
	// The log is read soon: not each time sooner than the next request comes.
	for i := range 30 {
		warm()
		name := fmt.Sprint("name ", i)
		s.call(tenant.Provisioner, "PATCH", "/v1/tenants/u", `{"display_name":"`+name+`"}`)
		if got := s.call(tenant.Viewer, "GET", "/v1/tenants/u", "").at(t, "display_name"); got != name {
			t.Errorf("after a change, GET answers the name %q; want %q", got, name)
		}
	}
	_ = chi.Walk(httpapi.New(httpapi.Config{}).(chi.Routes), func(method, route string, _ http.Handler, _ ...func(http.Handler) http.Handler) error {
		if r := method + " " + route; method != http.MethodGet && !done[r] && !tellsOfNothingCached[r] {
			t.Errorf("%s changes something, and nobody has looked whether look-ups tell of it", r)
		}
		return nil
	})

	made := s.call(tenant.Admin, "POST", "/v1/callers", `{"name":"x","role":"viewer"}`)
	s.tokens["x"] = fmt.Sprint(made.at(t, "token"))
	for range 3 {
		if got := s.call("x", "GET", "/v1/tenants/u", ""); got.status != http.StatusOK {
			t.Fatalf("the new token is answered %d", got.status)
		}
	}
	next := s.call(tenant.Admin, "POST", fmt.Sprint("/v1/callers/", made.at(t, "id"), "/rotations"), `{"overlap":"0s"}`)
	if got := s.call("x", "GET", "/v1/tenants/u", ""); got.status != http.StatusUnauthorized {
		t.Errorf("the rotated token is answered %d", got.status)
	}
	s.tokens["x"] = fmt.Sprint(next.at(t, "token"))
	for range 3 {
		if got := s.call("x", "GET", "/v1/tenants/u", ""); got.status != http.StatusOK {
			t.Fatalf("the next token is answered %d", got.status)
		}
	}
	s.call(tenant.Admin, "DELETE", fmt.Sprint("/v1/callers/", next.at(t, "id")), "")
	if got := s.call("x", "GET", "/v1/tenants/u", ""); got.status != http.StatusUnauthorized {
		t.Errorf("the revoked token is answered %d", got.status)
	}
}

// A caller that is limited finds a tenant that has just come to be one of its own, and
// no longer one that is not.
func TestLimitedCallersReadTheirWrites(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.signUp("u")
	made := s.call(tenant.Admin, "POST", "/v1/callers", `{"name":"x","role":"provisioner","labels":{"product":"a"}}`)
	s.tokens["x"] = fmt.Sprint(made.at(t, "token"))
	for _, c := range []struct {
		labels string
		status int
	}{{`{"product":"a"}`, 200}, {`{"product":"b"}`, 404}, {`{"product":"a"}`, 200}} {
		provisiontest.Eventually(t, "what is held is trusted", func() bool { return s.replica.DB.CacheStats().Trusted })
		s.call("x", "GET", "/v1/tenants/u", "")
		s.call(tenant.Provisioner, "PATCH", "/v1/tenants/u", `{"labels":`+c.labels+`}`, "Content-Type", "application/merge-patch+json")
		for _, path := range []string{"/v1/tenants/u", "/v1/tenants/u/keys"} {
			if got := s.call("x", "GET", path, ""); got.status != c.status {
				t.Errorf("with the labels %s, GET %s answers %d %s", c.labels, path, got.status, got.body)
			}
		}
	}
}

// While Postgres is away, look-ups of what is held are answered and say that they may be
// outdated; all else is 503. When it is back, answers are as before.
func TestLookUpsWhilePostgresIsAway(t *testing.T) {
	t.Parallel()
	pgtest.Cluster(t)
	cluster, stop, err := localpg.ForTests(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	if err := cluster.CreateDatabase(t.Context(), "tenantry"); err != nil {
		t.Fatal(err)
	}
	url := tenant.NewSecret(cluster.URL("tenantry"))
	if err := postgres.MigrateUp(t.Context(), url); err != nil {
		t.Fatal(err)
	}
	w := provisiontest.New(t)
	joined := provisiontest.Join(t, url, w.Keyset, w.Clarifai)
	s := newSiteOn(t, joined, joined.Start(provisiontest.Options{}))
	made := s.signUp("u")
	s.signUp("unheld")
	paths := []string{"/v1/tenants/u", "/v1/tenants/u/keys", "/v1/tenants/u/keys/default", fmt.Sprint("/v1/apps/", made.at(t, "app", "id")), "/v1/tenants/nobody"}
	bodies := map[string]answer{}
	provisiontest.Eventually(t, "all is answered from memory", func() bool {
		before := s.replica.DB.CacheStats().Hits
		for _, p := range paths {
			bodies[p] = s.call(tenant.Viewer, "GET", p, "")
			s.call(tenant.Provisioner, "GET", p, "")
		}
		return s.replica.DB.CacheStats().Hits >= before+uint64(2*len(paths))
	})
	if err := cluster.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	provisiontest.Eventually(t, "answers say that they may be outdated", func() bool {
		return s.call(tenant.Viewer, "GET", paths[0], "").header.Get("Tenantry-Stale") != ""
	})
	for _, p := range paths {
		want := bodies[p]
		got := s.call(tenant.Viewer, "GET", p, "")
		age, err := strconv.Atoi(got.header.Get("Age"))
		if got.status != want.status || got.header.Get("ETag") != want.header.Get("ETag") || err != nil || age < 0 || got.header.Get("Tenantry-Stale") != "database_unavailable" {
			t.Errorf("while Postgres is away, GET %s answers %d %v %s", p, got.status, got.header, got.body)
		}
		if want.status == http.StatusOK && string(got.body) != string(want.body) {
			t.Errorf("while Postgres is away, GET %s answers %s; before it was %s", p, got.body, want.body)
		}
		if head := s.call(tenant.Viewer, "HEAD", p, ""); head.status != want.status || head.header.Get("Tenantry-Stale") == "" {
			t.Errorf("while Postgres is away, HEAD %s answers %d %v", p, head.status, head.header)
		}
	}
	if got := s.call(tenant.Viewer, "GET", paths[0], "", "If-None-Match", bodies[paths[0]].header.Get("ETag")); got.status != http.StatusNotModified || got.header.Get("Age") == "" {
		t.Errorf("while Postgres is away, a GET with the tenant's ETag answers %d %v", got.status, got.header)
	}
	for _, c := range []struct{ method, path, header, value string }{
		{"GET", "/v1/tenants/u", "Cache-Control", "no-cache"},
		{"GET", "/v1/tenants/u?wait=1", "Accept", "*/*"},
		{"GET", "/v1/tenants/unheld", "Accept", "*/*"},
		{"GET", "/v1/tenants", "Accept", "*/*"},
		{"GET", "/v1/tenants/u/keys/default/secret", "Accept", "*/*"},
		{"PUT", "/v1/tenants/u", "Accept", "*/*"},
		{"PUT", "/v1/tenants/new", "Accept", "*/*"},
	} {
		got := s.call(tenant.Provisioner, c.method, c.path, "", c.header, c.value)
		if got.status != http.StatusServiceUnavailable || got.header.Get("Tenantry-Stale") != "" || got.header.Get("Age") != "" {
			t.Errorf("while Postgres is away, %s %s with %s %s answers %d %v %s", c.method, c.path, c.header, c.value, got.status, got.header, got.body)
		}
	}
	if err := cluster.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	provisiontest.Eventually(t, "what is held is trusted again", func() bool { return s.replica.DB.CacheStats().Trusted })
	for _, p := range paths {
		got := s.call(tenant.Viewer, "GET", p, "")
		inRecovery := got.status == http.StatusConflict && got.at(t, "code") == "recovery_unknown" // after each start of Postgres, for a moment
		if got.status != bodies[p].status && !(inRecovery && bodies[p].status == http.StatusNotFound) || got.header.Get("Age") != "" || got.header.Get("Tenantry-Stale") != "" {
			t.Errorf("when Postgres is back, GET %s answers %d %v", p, got.status, got.header)
		}
	}
	if got := s.call(tenant.Provisioner, "PATCH", "/v1/tenants/u", `{"display_name":"Ada"}`, "Content-Type", "application/merge-patch+json"); got.status != http.StatusOK {
		t.Fatalf("when Postgres is back, PATCH answers %d %s", got.status, got.body)
	}
	if got := s.call(tenant.Viewer, "GET", "/v1/tenants/u", ""); got.at(t, "display_name") != "Ada" {
		t.Errorf("after a change, GET answers %s", got.body)
	}
}

// A token that could not be checked may look up what can be in memory, and nothing else,
// whatever else Postgres would answer.
func TestUncheckedTokensOnlyLookUp(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.signUp("u")
	provisiontest.Eventually(t, "what is held is trusted", func() bool { return s.replica.DB.CacheStats().Trusted })
	s.call(tenant.Provisioner, "GET", "/v1/tenants/u", "")
	lock := pgtest.Conn(t, s.world.URL)
	if _, err := lock.Exec(t.Context(), `BEGIN; LOCK TABLE audit_events, callers IN ACCESS EXCLUSIVE MODE`); err != nil {
		t.Fatal(err)
	}
	provisiontest.Eventually(t, "what is held is not trusted", func() bool { return !s.replica.DB.CacheStats().Trusted })
	for path, status := range map[string]int{"/v1/tenants/u": 200, "/v1/tenants": 503, "/v1/tenants/u/keys/default/secret": 503, "/v1/upstream": 503} {
		if got := s.call(tenant.Provisioner, "GET", path, ""); got.status != status {
			t.Errorf("with a token that could not be checked, GET %s answers %d %s", path, got.status, got.body)
		}
	}
	if _, err := lock.Exec(t.Context(), `ROLLBACK`); err != nil {
		t.Fatal(err)
	}
	provisiontest.Eventually(t, "lists are answered again", func() bool { return s.call(tenant.Provisioner, "GET", "/v1/tenants", "").status == 200 })
}
