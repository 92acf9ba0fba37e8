package httpapi_test

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

func (s *site) signUp(id string) answer {
	s.t.Helper()
	got := s.call(tenant.Provisioner, "PUT", "/v1/tenants/"+id, "", "Prefer", "wait=30")
	if got.status != http.StatusCreated {
		s.t.Fatalf("sign up %s: %d %s", id, got.status, got.body)
	}
	return got
}

// until repeats a request until it is answered with 200.
func (s *site) until(role tenant.Role, method, path string) answer {
	s.t.Helper()
	var got answer
	provisiontest.Eventually(s.t, method+" "+path+" answers 200", func() bool {
		got = s.call(role, method, path, "")
		if got.status != http.StatusOK && got.status != http.StatusAccepted {
			s.t.Fatalf("%s %s answers %d %s", method, path, got.status, got.body)
		}
		return got.status == http.StatusOK
	})
	return got
}

// A change is answered with 202 until it has taken effect, and with 200 from then on.
func TestChangeTenant(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	made := s.signUp("user_1")
	got := s.call(tenant.Provisioner, "POST", "/v1/tenants/user_1/suspend", "")
	if got.status != http.StatusAccepted || got.at(t, "state") != "suspending" || got.header.Get("Retry-After") == "" || got.header.Get("Location") != "/v1/tenants/user_1" {
		t.Errorf("suspend answers %d %v %s", got.status, got.header, got.body)
	}
	got = s.until(tenant.Provisioner, "POST", "/v1/tenants/user_1/suspend")
	if got.at(t, "state") != "suspended" || got.at(t, "app", "id") != made.at(t, "app", "id") {
		t.Errorf("suspended: %s", got.body)
	}
	if put := s.call(tenant.Provisioner, "PUT", "/v1/tenants/user_1", ""); put.status != http.StatusOK || put.at(t, "credentials") != nil {
		t.Errorf("PUT of a suspended tenant answers %d %s", put.status, put.body)
	}
	got = s.call(tenant.Provisioner, "POST", "/v1/tenants/user_1/restore", "")
	if got.status != http.StatusConflict || got.at(t, "code") != "state_forbids" || got.at(t, "state") != "suspended" || fmt.Sprint(got.at(t, "allowed_changes")) != "[resume delete purge]" {
		t.Errorf("restore of a suspended tenant answers %d %s", got.status, got.body)
	}
	got = s.call(tenant.Admin, "POST", "/v1/tenants/user_1/resume", "", "Prefer", "wait=30")
	if got.status != http.StatusOK || got.at(t, "state") != "active" || got.header.Get("Preference-Applied") != "wait=30" {
		t.Errorf("resume answers %d %s", got.status, got.body)
	}

	if got = s.call(tenant.Provisioner, "DELETE", "/v1/tenants/user_1?purge=now", ""); got.status != http.StatusForbidden {
		t.Errorf("a provisioner's purge answers %d %s", got.status, got.body)
	}
	if got = s.call(tenant.Admin, "DELETE", "/v1/tenants/user_1?purge=soon", ""); got.status != http.StatusBadRequest || got.at(t, "field") != "purge" {
		t.Errorf("a purge that is not now answers %d %s", got.status, got.body)
	}
	got = s.call(tenant.Provisioner, "DELETE", "/v1/tenants/user_1", "")
	if got.status != http.StatusAccepted || got.at(t, "state") != "deleting" {
		t.Errorf("DELETE answers %d %s", got.status, got.body)
	}
	got = s.until(tenant.Provisioner, "DELETE", "/v1/tenants/user_1")
	if got.at(t, "deletion", "keys_revoked") != true || got.at(t, "deletion", "purge_after") == nil {
		t.Errorf("deleted: %s", got.body)
	}
	got = s.call(tenant.Provisioner, "PUT", "/v1/tenants/user_1", "")
	if got.status != http.StatusConflict || got.at(t, "code") != "tenant_deleting" {
		t.Errorf("PUT of a tenant that is deleting answers %d %s", got.status, got.body)
	}
	if got = s.call(tenant.Provisioner, "POST", "/v1/tenants/user_1/restore", "", "Prefer", "wait=30"); got.status != http.StatusOK || got.at(t, "state") != "active" {
		t.Errorf("restore answers %d %s", got.status, got.body)
	}
	s.until(tenant.Provisioner, "DELETE", "/v1/tenants/user_1")
	got = s.call(tenant.Provisioner, "PUT", "/v1/tenants/user_1?on_deleting=replace", "", "Prefer", "wait=30")
	if got.status != http.StatusCreated || got.at(t, "generation") != 2.0 || got.at(t, "app", "id") == made.at(t, "app", "id") {
		t.Errorf("replace answers %d %s", got.status, got.body)
	}
	s.until(tenant.Admin, "DELETE", "/v1/tenants/user_1?purge=now")
	got = s.call(tenant.Viewer, "GET", "/v1/tenants/user_1", "")
	if got.status != http.StatusOK || got.at(t, "state") != "deleted" || got.at(t, "app") != nil {
		t.Errorf("GET of a deleted tenant answers %d %s", got.status, got.body)
	}
	if got = s.call(tenant.Viewer, "GET", "/v1/tenants/user_1/keys", ""); got.status != http.StatusOK {
		t.Errorf("the keys of a deleted tenant are answered with %d %s", got.status, got.body)
	}
}

// A merge patch changes what it names; one against an old version changes nothing.
func TestPatchTenant(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.call(tenant.Provisioner, "PUT", "/v1/tenants/u", `{"display_name":"Ada","labels":{"plan":"pro","team":"a"}}`, "Prefer", "wait=30")
	read := s.call(tenant.Viewer, "GET", "/v1/tenants/u", "")
	etag := read.header.Get("ETag")
	got := s.call(tenant.Provisioner, "PATCH", "/v1/tenants/u", `{"labels":{"plan":"free","team":null,"new":"x"}}`, "If-Match", etag)
	if got.status != http.StatusOK || fmt.Sprint(got.at(t, "labels")) != "map[new:x plan:free]" || got.at(t, "display_name") != "Ada" || got.header.Get("ETag") == etag {
		t.Errorf("PATCH answers %d %s", got.status, got.body)
	}
	lost := s.call(tenant.Provisioner, "PATCH", "/v1/tenants/u", `{"display_name":"Bob"}`, "If-Match", etag)
	if lost.status != http.StatusPreconditionFailed || lost.at(t, "code") != "tenant_changed" {
		t.Errorf("PATCH of an old version answers %d %s", lost.status, lost.body)
	}
	for _, tags := range []string{got.header.Get("ETag"), `"0.0", ` + got.header.Get("ETag"), "*"} {
		if ok := s.call(tenant.Provisioner, "PATCH", "/v1/tenants/u", `{}`, "If-Match", tags); ok.status != http.StatusOK {
			t.Errorf("PATCH with If-Match: %s answers %d %s", tags, ok.status, ok.body)
		}
	}
	for _, tags := range []string{`W/"1.1"`, "nonsense", `"1"`, strings.Trim(got.header.Get("ETag"), `"`)} {
		if no := s.call(tenant.Provisioner, "PATCH", "/v1/tenants/u", `{}`, "If-Match", tags); no.status != http.StatusPreconditionFailed {
			t.Errorf("PATCH with If-Match: %s answers %d %s", tags, no.status, no.body)
		}
	}
	got = s.call(tenant.Provisioner, "PATCH", "/v1/tenants/u", `{"display_name":null,"labels":null,"deletion_protection":true}`, "Content-Type", "application/merge-patch+json")
	if got.status != http.StatusOK || got.at(t, "display_name") != "" || len(got.at(t, "labels").(map[string]any)) != 0 || got.at(t, "deletion_protection") != true {
		t.Errorf("PATCH with nulls answers %d %s", got.status, got.body)
	}
	if got = s.call(tenant.Provisioner, "DELETE", "/v1/tenants/u", ""); got.status != http.StatusConflict || got.at(t, "code") != "deletion_protected" {
		t.Errorf("DELETE of a protected tenant answers %d %s", got.status, got.body)
	}
	if got = s.call(tenant.Provisioner, "PUT", "/v1/tenants/u", `{"display_name":"Ada","labels":{"plan":"pro","team":"a"}}`); got.status != http.StatusOK {
		t.Errorf("the sign-up again, after the patch, answers %d %s", got.status, got.body)
	}
	for body, says := range map[string]string{
		`{"display_name":7}`:                  "display_name must be a string",
		`{"labels":"x"}`:                      "labels must be an object",
		`{"labels":{"a":1}}`:                  "labels must be an object of strings",
		`{"deletion_protection":"yes"}`:       "deletion_protection must be true",
		`{"profile":"x"}`:                     "profile is not a field",
		`null`:                                "must be an object",
		`{"labels":{"a b":"c"}}`:              "key \"a b\"",
		``:                                    "is empty",
		`{"labels":{` + manyLabels(17) + `}}`: "at most 16",
		`{"display_name":"a","display_name":null}`: "display_name is given twice",
	} {
		got := s.call(tenant.Provisioner, "PATCH", "/v1/tenants/u", body)
		if text := fmt.Sprint(got.at(t, "field"), " ", got.at(t, "detail")); got.status != http.StatusBadRequest && body != "" || !strings.Contains(text, says) {
			t.Errorf("PATCH %s answers %d %s; want 400 that says %q", body, got.status, got.body, says)
		}
	}
	if got := s.call(tenant.Provisioner, "PATCH", "/v1/tenants/nobody", `{}`); got.status != http.StatusNotFound {
		t.Errorf("PATCH of nobody answers %d", got.status)
	}
}

func manyLabels(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, `%s"k%d":"v"`, map[bool]string{true: ","}[i > 0], i)
	}
	return b.String()
}

// Further keys: made, found again, differing, revoked; and what they may not be.
func TestKeysOfATenant(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.signUp("u")
	const path = "/v1/tenants/u/keys/reports"
	expires := time.Now().Add(time.Hour).UTC().Format(time.RFC3339)
	got := s.call(tenant.Provisioner, "PUT", path, `{"scopes":["Predict"],"expires_at":"`+expires+`"}`, "Prefer", "wait=30")
	if got.status != http.StatusCreated || got.at(t, "credentials", "key") == nil || got.header.Get("Location") != path || got.header.Get("Cache-Control") != "no-store" {
		t.Fatalf("PUT of a key answers %d %v %s", got.status, got.header, got.body)
	}
	again := s.call(tenant.Provisioner, "PUT", path, "")
	if again.status != http.StatusOK || again.at(t, "credentials", "key") != got.at(t, "credentials", "key") || again.at(t, "expires_at") != expires {
		t.Errorf("PUT of the key again answers %d %s", again.status, again.body)
	}
	if differs := s.call(tenant.Provisioner, "PUT", path, `{"scopes":["All"]}`); differs.status != http.StatusConflict || differs.at(t, "field") != "scopes" {
		t.Errorf("PUT of the key with other scopes answers %d %s", differs.status, differs.body)
	}
	if one := s.call(tenant.Viewer, "GET", path, ""); one.status != http.StatusOK || one.at(t, "state") != "active" || len(fmt.Sprint(one.at(t, "fingerprint"))) != 64 {
		t.Errorf("GET of the key answers %d %s", one.status, one.body)
	}
	if gone := s.call(tenant.Admin, "DELETE", path, "", "Prefer", "wait=30"); gone.status != http.StatusOK || gone.at(t, "state") != "revoked" || gone.at(t, "end_reason") != "revoked" {
		t.Errorf("DELETE of the key answers %d %s", gone.status, gone.body)
	}
	if secret := s.call(tenant.Provisioner, "GET", path+"/secret", ""); secret.status != http.StatusNotFound {
		t.Errorf("the secret of a revoked key is answered with %d", secret.status)
	}
	for _, c := range []struct {
		method, path, body string
		status             int
		field, says        string
	}{
		{"PUT", "/v1/tenants/u/keys/UPPER", "", 400, "key_name", "a-z"},
		{"PUT", "/v1/tenants/u/keys/a%2Fb", "", 400, "key_name", "a-z"},
		{"PUT", path, `{"scopes":[]}`, 400, "scopes", "is empty"},
		{"PUT", path, `{"scopes":["a","a"]}`, 400, "scopes", "twice"},
		{"PUT", path, `{"scopes":"All"}`, 400, "scopes", "an array"},
		{"PUT", path, `{"expires_at":"tomorrow"}`, 400, "expires_at", "2026-01-31T12:00:00Z"},
		{"PUT", path, `{"expires_at":"2020-01-01T00:00:00Z"}`, 400, "expires_at", "in the past"},
		{"PUT", path, `{"expires_at":7}`, 400, "expires_at", "must be a string"},
		{"PUT", "/v1/tenants/nobody/keys/x", "", 404, "", ""},
		{"DELETE", "/v1/tenants/u/keys/never", "", 404, "", "no such key"},
		{"GET", "/v1/tenants/u/keys/never", "", 404, "", "no such key"},
		{"PUT", "/v1/tenants/u/keys/default/rotations/-", "", 400, "rotation_id", "begin with a letter"},
		{"PUT", "/v1/tenants/u/keys/default/rotations/r", `{"overlap":"31d"}`, 400, "overlap", "from 0s to 720h"},
		{"PUT", "/v1/tenants/u/keys/default/rotations/r", `{"overlap":-1}`, 400, "overlap", "from 0s to"},
		{"PUT", "/v1/tenants/u/keys/default/rotations/r", `{"overlap":"a while"}`, 400, "overlap", "24h"},
		{"PUT", "/v1/tenants/u/keys/default/rotations/r", `{"overlap":true}`, 400, "overlap", "24h"},
		{"PUT", "/v1/tenants/u/keys/never/rotations/r", "", 404, "", "no such key"},
		{"GET", "/v1/tenants/u/keys/default/rotations/r", "", 404, "", "no such rotation"},
		{"POST", "/v1/tenants/u/keys/default/rotations/r/confirm", "", 404, "", "no such rotation"},
		{"POST", "/v1/keys/quarantine", `{"key":"nobody's"}`, 404, "", "no such key"},
		{"POST", "/v1/keys/quarantine", `{}`, 400, "key", "1 to 512"},
		{"POST", "/v1/keys/identify", `{"fingerprint":"xyz"}`, 400, "fingerprint", "64 hexadecimal"},
		{"POST", "/v1/keys/identify", `{"app_id":"never"}`, 404, "", "no such app"},
		{"POST", "/v1/keys/identify", `{"app_id":"never","key":"x"}`, 400, "body", "one of key, fingerprint and app_id"},
	} {
		got := s.call(tenant.Provisioner, c.method, c.path, c.body)
		field, _ := got.at(t, "field").(string)
		if got.status != c.status || field != c.field || !strings.Contains(fmt.Sprint(got.at(t, "detail")), c.says) {
			t.Errorf("%s %s %s answers %d %s; want %d at %q that says %q", c.method, c.path, c.body, got.status, got.body, c.status, c.field, c.says)
		}
	}
}

// A rotation over HTTP, and who sees the new key.
func TestRotateOverHTTP(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	made := s.signUp("u")
	const path = "/v1/tenants/u/keys/default/rotations/2026-11"
	got := s.call(tenant.Provisioner, "PUT", path, `{"overlap":"7d"}`, "Prefer", "wait=30")
	if got.status != http.StatusCreated || got.at(t, "state") != "overlapping" || got.at(t, "overlap_seconds") != 7*24*3600.0 || got.header.Get("Location") != path ||
		got.at(t, "credentials", "key") == nil || got.at(t, "credentials", "key") == made.at(t, "credentials", "key") {
		t.Fatalf("PUT of a rotation answers %d %s", got.status, got.body)
	}
	for _, c := range []struct {
		role   tenant.Role
		method string
	}{{tenant.Provisioner, "PUT"}, {tenant.Provisioner, "GET"}} {
		again := s.call(c.role, c.method, path, "")
		if again.status != http.StatusOK || again.at(t, "credentials", "key") != got.at(t, "credentials", "key") {
			t.Errorf("%s of the rotation answers %d %s; want the same new key", c.method, again.status, again.body)
		}
	}
	if seen := s.call(tenant.Viewer, "GET", path, ""); seen.status != http.StatusOK || seen.at(t, "credentials") != nil {
		t.Errorf("a viewer sees %s", seen.body)
	}
	if other := s.call(tenant.Provisioner, "PUT", "/v1/tenants/u/keys/default/rotations/other", ""); other.status != http.StatusConflict || other.at(t, "code") != "rotation_under_way" || !strings.Contains(fmt.Sprint(other.at(t, "detail")), "2026-11") {
		t.Errorf("another rotation meanwhile answers %d %s", other.status, other.body)
	}
	for range 2 {
		if done := s.call(tenant.Provisioner, "POST", path+"/confirm", ""); done.status != http.StatusOK || done.at(t, "state") != "done" {
			t.Errorf("confirm answers %d %s", done.status, done.body)
		}
	}
	// The key leaks: what is said of it, and what is done.
	leaked := fmt.Sprint(got.at(t, "credentials", "key"))
	known := s.call(tenant.Viewer, "POST", "/v1/keys/identify", `{"key":"`+leaked+`"}`)
	if known.status != http.StatusOK || known.at(t, "key", "age_seconds") == nil || known.at(t, "app_state") != "held" {
		t.Errorf("identify answers %d %s", known.status, known.body)
	}
	for _, body := range []string{`{"fingerprint":"` + fmt.Sprint(known.at(t, "key", "fingerprint")) + `"}`, `{"app_id":"` + fmt.Sprint(made.at(t, "app", "id")) + `"}`} {
		if by := s.call(tenant.Viewer, "POST", "/v1/keys/identify", body); by.status != http.StatusOK || by.at(t, "tenant_id") != "u" {
			t.Errorf("identify %s answers %d %s", body, by.status, by.body)
		}
	}
	q := s.call(tenant.Admin, "POST", "/v1/keys/quarantine", `{"key":"Key `+leaked+`"}`, "Prefer", "wait=30")
	if q.status != http.StatusOK || q.at(t, "key", "state") != "revoked" || q.at(t, "successor", "state") != "active" || q.at(t, "tenant_id") != "u" {
		t.Errorf("quarantine answers %d %s", q.status, q.body)
	}
	if slow := s.call(tenant.Provisioner, "PUT", "/v1/tenants/u/keys/default/rotations/later", "", "Prefer", "respond-async"); slow.status != http.StatusAccepted || slow.header.Get("Retry-After") == "" {
		t.Errorf("a rotation that is not waited for answers %d %s", slow.status, slow.body)
	}
	provisiontest.Eventually(t, "the new key works", func() bool {
		return s.call(tenant.Viewer, "GET", "/v1/tenants/u/keys/default/rotations/later?wait=5", "").at(t, "state") == "overlapping"
	})
}
