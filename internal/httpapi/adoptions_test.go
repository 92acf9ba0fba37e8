package httpapi_test

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/tenantry/tenantry/api/client"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

func adoptBody(fields string) string { return `{"adopt":{` + fields + `}}` }

func TestAdopt(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	key := s.world.AppByHand(provisiontest.PAT, "hand-made", nil)
	const path = "/v1/tenants/user_1"
	put := func(body string, headers ...string) answer {
		t.Helper()
		return s.call(tenant.Provisioner, "PUT", path, body, headers...)
	}
	dry := put(adoptBody(`"app_id":"hand-made","dry_run":true`), "Prefer", "wait=30")
	if dry.status != http.StatusOK || dry.at(t, "adoption", "state") != "possible" || dry.at(t, "adoption", "dry_run") != true ||
		dry.at(t, "adoption", "app", "user_id") != "acme" || dry.at(t, "id") != nil || dry.header.Get("Preference-Applied") != "wait=30" {
		t.Errorf("a dry run answers %d %s", dry.status, dry.body)
	}
	dry = put(adoptBody(`"app_id":"none","dry_run":true`), "Prefer", "wait=30")
	if dry.status != http.StatusOK || dry.at(t, "adoption", "state") != "refused" || dry.at(t, "adoption", "problem", "code") != "adopt_app_unknown" {
		t.Errorf("a dry run of what is not there answers %d %s", dry.status, dry.body)
	}
	if a := s.call(tenant.Viewer, "GET", path, ""); a.status != http.StatusNotFound {
		t.Errorf("after dry runs the tenant answers %d %s", a.status, a.body)
	}
	refused := put(adoptBody(`"app_id":"none"`), "Prefer", "wait=30")
	if refused.status != http.StatusConflict || refused.at(t, "code") != "adopt_app_unknown" || !strings.Contains(fmt.Sprint(refused.at(t, "detail")), "none") {
		t.Errorf("what is not there answers %d %s", refused.status, refused.body)
	}
	body := `{"display_name":"Ada","adopt":{"app_id":"hand-made","key":"` + key.Reveal() + `"}}`
	made := put(body, "Prefer", "wait=30")
	if made.status != http.StatusCreated || made.at(t, "app", "id") != "hand-made" || made.at(t, "adoption", "state") != "done" ||
		made.at(t, "credentials", "key") != key.Reveal() || made.at(t, "display_name") != "Ada" || made.header.Get("Location") != path ||
		made.header.Get("Cache-Control") != "no-store" {
		t.Fatalf("an adoption answers %d %v %s", made.status, made.header, made.body)
	}
	again := put(body, "Prefer", "wait=30")
	if again.status != http.StatusOK || again.header.Get("ETag") != made.header.Get("ETag") || again.at(t, "credentials", "key") != key.Reveal() {
		t.Errorf("the same again answers %d %s", again.status, again.body)
	}
	if plain := put(`{"display_name":"Ada"}`); plain.status != http.StatusOK || plain.at(t, "app", "id") != "hand-made" {
		t.Errorf("a plain sign-up answers %d %s", plain.status, plain.body)
	}
	if done := put(adoptBody(`"app_id":"hand-made","dry_run":true`)); done.status != http.StatusOK || done.at(t, "adoption", "state") != "done" || done.at(t, "credentials") != nil {
		t.Errorf("a dry run of what is done answers %d %s", done.status, done.body)
	}
	other := s.call(tenant.Provisioner, "PUT", "/v1/tenants/user_2", adoptBody(`"app_id":"hand-made"`), "Prefer", "wait=30")
	if other.status != http.StatusConflict || other.at(t, "code") != "adopt_app_claimed" || !strings.Contains(fmt.Sprint(other.at(t, "detail")), "user_1") {
		t.Errorf("another tenant is answered %d %s", other.status, other.body)
	}
	if a := put(adoptBody(`"app_id":"other"`)); a.status != http.StatusConflict || a.at(t, "code") != "adopt_tenant_taken" {
		t.Errorf("another app is answered %d %s", a.status, a.body)
	}
}

func TestAdoptUnderWay(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.world.AppByHand(provisiontest.PAT, "hand-made", nil)
	s.world.Faults(map[string]any{"call": "GetApp", "status": 98004})
	const path = "/v1/tenants/user_1"
	got := s.call(tenant.Provisioner, "PUT", path, adoptBody(`"app_id":"hand-made"`), "Prefer", "respond-async")
	if got.status != http.StatusAccepted || got.at(t, "adoption", "state") != "checking" || got.header.Get("Retry-After") == "" ||
		got.header.Get("Location") != path || got.header.Get("Preference-Applied") != "respond-async" {
		t.Errorf("an adoption under way answers %d %v %s", got.status, got.header, got.body)
	}
	provisiontest.Eventually(t, "the problem shows", func() bool {
		a := s.call(tenant.Provisioner, "PUT", path, adoptBody(`"app_id":"hand-made"`), "Prefer", "wait=0")
		return a.status == http.StatusAccepted && a.at(t, "adoption", "problem", "code") == "upstream_unavailable"
	})
	s.world.Faults()
	if a := s.call(tenant.Provisioner, "PUT", path, adoptBody(`"app_id":"hand-made"`), "Prefer", "wait=30"); a.status != http.StatusCreated {
		t.Errorf("once Clarifai answers it answers %d %s", a.status, a.body)
	}
}

// The app of another Clarifai user shows whose it is, and what Clarifai does not allow is
// answered as such.
func TestAdoptShared(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	key := s.world.Shared("theirs")
	const path = "/v1/tenants/user_1"
	without := s.call(tenant.Provisioner, "PUT", path, adoptBody(`"app_id":"theirs","user_id":"bob"`))
	if without.status != http.StatusBadRequest || without.at(t, "code") != "adopt_key_required" || without.at(t, "field") != "adopt.key" {
		t.Errorf("without a key it answers %d %s", without.status, without.body)
	}
	made := s.call(tenant.Provisioner, "PUT", path, adoptBody(`"app_id":"theirs","user_id":"bob","key":"`+key.Reveal()+`"`), "Prefer", "wait=30")
	if made.status != http.StatusCreated || made.at(t, "app", "user_id") != "bob" || made.at(t, "adoption", "app", "user_id") != "bob" {
		t.Fatalf("it answers %d %s", made.status, made.body)
	}
	if a := s.call(tenant.Viewer, "GET", path, ""); a.at(t, "app", "user_id") != "bob" {
		t.Errorf("GET answers %s", a.body)
	}
	for _, c := range [][2]string{{"PUT", path + "/keys/default/rotations/r1"}, {"PUT", path + "/keys/more"}} {
		if a := s.call(tenant.Provisioner, c[0], c[1], "{}"); a.status != http.StatusConflict || a.at(t, "code") != "key_not_ours" {
			t.Errorf("%s %s answers %d %s", c[0], c[1], a.status, a.body)
		}
	}
}

func TestAdoptBadRequests(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.caller("limited", tenant.NewCaller{Role: tenant.Provisioner, Scope: tenant.Scope{"product": "a"}})
	secret := strings.Repeat("5ec7e7", 5)
	for _, c := range []struct {
		path, body string
		status     int
		code, says string
	}{
		{"", `{"adopt":null}`, 400, "invalid_request", "adopt is null"},
		{"", `{"adopt":"x"}`, 400, "invalid_request", "adopt must be an object"},
		{"", `{"adopt":["` + secret + `"]}`, 400, "invalid_request", "adopt must be an object"},
		{"", `{"adopt":{}}`, 400, "invalid_adopt", "adopt.app_id is missing"},
		{"", adoptBody(`"app_id":""`), 400, "invalid_request", "adopt.app_id is empty"},
		{"", adoptBody(`"app_id":7`), 400, "invalid_request", "adopt.app_id must be a string"},
		{"", adoptBody(`"app_id":"a","user_id":""`), 400, "invalid_request", "adopt.user_id is empty"},
		{"", adoptBody(`"app_id":"a","user_id":"a b"`), 400, "invalid_adopt", "adopt.user_id has a slash"},
		{"", adoptBody(`"app_id":"..":`), 400, "invalid_request", "valid JSON"},
		{"", adoptBody(`"app_id":".."`), 400, "invalid_adopt", "adopt.app_id must not be"},
		{"", adoptBody(`"app_id":"` + strings.Repeat("x", 65) + `"`), 400, "invalid_adopt", "65 bytes"},
		{"", adoptBody(`"app_id":"a","dry_run":"yes"`), 400, "invalid_request", "adopt.dry_run must be true or false"},
		{"", adoptBody(`"app_id":"a","key":""`), 400, "invalid_adopt", "adopt.key must have 1 to 512"},
		{"", adoptBody(`"app_id":"a","key":5555555555`), 400, "invalid_request", "adopt.key must be a string"},
		{"", adoptBody(`"app_id":"a","key":"` + secret + ` "`), 400, "invalid_adopt", "adopt.key has white space"},
		{"", adoptBody(`"app_id":"a","` + secret + `":"x"`), 400, "invalid_request", "there are: app_id, user_id, key, dry_run"},
		{"", adoptBody(`"app_id":"a","app_id":"b"`), 400, "invalid_request", "gives one name twice"},
		{"", `{"profile":"nowhere","adopt":{"app_id":"a"}}`, 400, "profile_unknown", "default"},
		{"", `{"labels":{"a b":"c"},"adopt":{"app_id":"a"}}`, 400, "invalid_labels", "labels"},
		{"?on_deleting=replace", adoptBody(`"app_id":"a"`), 400, "invalid_request", "cannot be combined with adopt"},
	} {
		got := s.call(tenant.Provisioner, "PUT", "/v1/tenants/u"+c.path, c.body)
		text := fmt.Sprint(got.at(t, "field"), " ", got.at(t, "detail"))
		if got.status != c.status || got.at(t, "code") != c.code || !strings.Contains(text, c.says) || strings.Contains(string(got.body), secret) ||
			strings.Contains(string(got.body), "5555555555") {
			t.Errorf("PUT %.80s answers %d %s; want %d %s that says %q", c.body, got.status, got.body, c.status, c.code, c.says)
		}
	}
	if a := s.call("limited", "PUT", "/v1/tenants/u", adoptBody(`"app_id":"a"`)); a.status != http.StatusForbidden || a.at(t, "code") != "caller_limited" {
		t.Errorf("a limited caller is answered %d %s", a.status, a.body)
	}
}

// The generated client reads both sorts of answer as one type.
func TestGeneratedClientAdopts(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.world.AppByHand(provisiontest.PAT, "hand-made", nil)
	c, err := client.NewClientWithResponses(s.url, client.WithToken(s.tokens[tenant.Provisioner]))
	if err != nil {
		t.Fatal(err)
	}
	dry, wait := true, "wait=30"
	put, err := c.PutTenantWithResponse(t.Context(), "user_1", &client.PutTenantParams{Prefer: &wait},
		client.SignUp{Adopt: &client.Adopt{AppId: "hand-made", DryRun: &dry}})
	if err != nil || put.JSON200 == nil || put.JSON200.Adoption == nil || put.JSON200.Adoption.State != client.AdoptionStatePossible {
		t.Fatalf("PutTenant = %+v, %v", put, err)
	}
}
