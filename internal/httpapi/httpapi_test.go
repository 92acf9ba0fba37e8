package httpapi_test

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/tenantry/tenantry/api/client"
	"github.com/tenantry/tenantry/internal/httpapi"
	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// Every route that is served is in the contract, and the other way round.
func TestRoutesAreTheContracts(t *testing.T) {
	t.Parallel()
	var served, described []string
	mux := httpapi.New(httpapi.Config{}).(chi.Routes)
	err := chi.Walk(mux, func(method, route string, _ http.Handler, _ ...func(http.Handler) http.Handler) error {
		served = append(served, method+" "+route)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for path, item := range contractDoc(t).Paths.Map() {
		for method := range item.Operations() {
			described = append(described, method+" "+path)
		}
	}
	slices.Sort(served)
	slices.Sort(described)
	if diff := cmp.Diff(described, served); diff != "" {
		t.Errorf("routes differ (- in the contract only, + served only):\n%s", diff)
	}
}

// The contract has what every operation answers to a parameter that it does not
// know, to If-None-Match and to HEAD: call holds each answer against it.
func TestEveryOperation(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	made := s.call(tenant.Provisioner, "PUT", "/v1/tenants/user_1", "", "Prefer", "wait=30")
	values := map[string]string{"tenant_id": "user_1", "key_name": "default", "app_id": fmt.Sprint(made.at(t, "app", "id"))}
	for pattern, item := range contractDoc(t).Paths.Map() {
		path := regexp.MustCompile(`\{(\w+)\}`).ReplaceAllStringFunc(pattern, func(name string) string {
			if v, ok := values[strings.Trim(name, "{}")]; ok {
				return v
			}
			return "00000000-0000-0000-0000-000000000000"
		})
		for method, op := range item.Operations() {
			refused := 0
			for _, role := range tenant.Roles {
				got := s.call(role, method, path+"?x=1", "")
				switch {
				case got.status == http.StatusBadRequest && got.at(t, "field") == "x":
					refused++
				case got.status != http.StatusForbidden:
					t.Errorf("%s %s?x=1 as %s answers %d %s", method, path, role, got.status, got.body)
				}
				if method != http.MethodGet {
					continue
				}
				plain, head := s.call(role, method, path, ""), s.call(role, http.MethodHead, path, "")
				if head.status != plain.status || len(head.body) != 0 {
					t.Errorf("HEAD %s as %s answers %d and %d bytes; GET answers %d", path, role, head.status, len(head.body), plain.status)
				}
				for _, name := range []string{"Content-Type", "ETag", "Cache-Control"} {
					if got, want := head.header.Get(name), plain.header.Get(name); got != want {
						t.Errorf("HEAD %s answers %s: %q; GET %q", path, name, got, want)
					}
				}
				described := op.Parameters.GetByInAndName("header", "If-None-Match") != nil && op.Responses.Status(http.StatusNotModified) != nil
				fresh := s.call(role, method, path, "", "If-None-Match", "*").status == http.StatusNotModified
				if plain.status == http.StatusOK && fresh != described {
					t.Errorf("GET %s with If-None-Match answers 304: %v; the contract has them: %v", path, fresh, described)
				}
			}
			if refused == 0 {
				t.Errorf("%s %s?x=1 is refused to nobody for the parameter", method, path)
			}
		}
	}
	if got := s.call(tenant.Viewer, http.MethodHead, "/v1/keys/identify", ""); got.status != http.StatusMethodNotAllowed || got.header.Get("Allow") != "POST" {
		t.Errorf("HEAD where there is no GET answers %d %v", got.status, got.header)
	}
	probes := httptest.NewServer(httpapi.NewInternal(prometheus.NewRegistry(), nil))
	defer probes.Close()
	for _, path := range []string{"/livez", "/readyz", "/readyz/writes", "/readyz/lookups"} {
		resp, err := http.Head(probes.URL + path)
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Errorf("HEAD %s answers %v, %v", path, resp, err)
		}
	}
}

func TestPutTenant(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	const body = `{"display_name":"Ada","labels":{"plan":"pro"}}`
	made := s.call(tenant.Provisioner, "PUT", "/v1/tenants/user_42", body, "Prefer", "wait=30")
	if made.status != http.StatusCreated {
		t.Fatalf("PUT answers %d: %s", made.status, made.body)
	}
	for name, want := range map[string]string{"Location": "/v1/tenants/user_42", "Cache-Control": "no-store", "Preference-Applied": "wait=30",
		"Content-Type": "application/json"} {
		if got := made.header.Get(name); got != want {
			t.Errorf("%s: %q; want %q", name, got, want)
		}
	}
	if made.at(t, "state") != "active" || made.at(t, "app", "user_id") != "acme" || made.at(t, "labels", "plan") != "pro" ||
		made.at(t, "credentials", "name") != "default" || made.at(t, "credentials", "key") == nil || made.at(t, "problem") != nil {
		t.Errorf("PUT answers %s", made.body)
	}
	again := s.call(tenant.Provisioner, "PUT", "/v1/tenants/user_42", body)
	if again.status != http.StatusOK || again.header.Get("Preference-Applied") != "" ||
		!cmp.Equal(again.decode(t), made.decode(t)) {
		t.Errorf("the same PUT answers %d %s; want 200 and the same", again.status, again.body)
	}
	if bare := s.call(tenant.Provisioner, "PUT", "/v1/tenants/user_42", ""); bare.status != http.StatusOK {
		t.Errorf("a PUT without a body answers %d", bare.status)
	}
	other := s.call(tenant.Provisioner, "PUT", "/v1/tenants/user_42", `{"display_name":"Bob","labels":{}}`)
	if other.status != http.StatusConflict || other.at(t, "code") != "attributes_differ" ||
		!strings.Contains(fmt.Sprint(other.at(t, "detail")), "display_name and labels") {
		t.Errorf("another PUT answers %d %s; want 409 that names the fields", other.status, other.body)
	}
}

func TestPutTenantUnderWay(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	s := newSiteOn(t, w, w.Start(provisiontest.Options{}))
	w.Faults(map[string]any{"call": "*", "drop_before": true})
	got := s.call(tenant.Provisioner, "PUT", "/v1/tenants/user_1", "", "Prefer", "respond-async")
	if got.status != http.StatusAccepted || got.header.Get("Retry-After") == "" || got.header.Get("Location") != "/v1/tenants/user_1" ||
		got.header.Get("Preference-Applied") != "respond-async" || got.at(t, "credentials") != nil {
		t.Errorf("PUT with respond-async answers %d %v %s", got.status, got.header, got.body)
	}
	provisiontest.Eventually(t, "the problem shows", func() bool {
		a := s.call(tenant.Provisioner, "PUT", "/v1/tenants/user_1", "", "Prefer", "wait=0")
		return a.status == http.StatusAccepted && a.at(t, "problem", "code") == "upstream_unavailable"
	})
	if up := s.call(tenant.Viewer, "GET", "/v1/upstream", ""); up.at(t, "queue", "waiting_tenants") != 1.0 || up.at(t, "problem", "code") != "upstream_unavailable" {
		t.Errorf("GET /v1/upstream answers %s", up.body)
	}
	w.Faults()
	if a := s.call(tenant.Viewer, "GET", "/v1/tenants/user_1?wait=30", ""); a.at(t, "state") != "active" || a.at(t, "credentials") != nil {
		t.Errorf("GET with wait answers %d %s", a.status, a.body)
	}
	if a := s.call(tenant.Provisioner, "PUT", "/v1/tenants/user_1", ""); a.status != http.StatusOK || a.at(t, "credentials", "key") == nil {
		t.Errorf("PUT once it is active answers %d %s", a.status, a.body)
	}
}

// Any id that is valid can be signed up and looked up, percent-encoded, and no
// two ids are one.
func TestTenantIDsInPaths(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	for _, id := range []string{"a@b.example", "Üser-用户", "a%2Fb", "100%", "a?b#c&d=e", "a+b", "é", "e\u0301", "...", "x;y", "a:b", "%41", "A"} {
		path := "/v1/tenants/" + url.PathEscape(id)
		put := s.call(tenant.Provisioner, "PUT", path, "")
		if put.status != http.StatusCreated || put.at(t, "id") != id {
			t.Errorf("PUT %s answers %d %s; want the tenant %q", path, put.status, put.body, id)
			continue
		}
		get := s.call(tenant.Viewer, "GET", put.header.Get("Location"), "")
		if get.status != http.StatusOK || get.at(t, "id") != id {
			t.Errorf("GET %s answers %d %s; want the tenant %q", put.header.Get("Location"), get.status, get.body, id)
		}
	}
}

func TestBadRequests(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	big := `{"display_name":"` + strings.Repeat("x", httpapi.MaxBodyBytes) + `"}`
	for _, c := range []struct {
		method, path, body string
		headers            []string
		status             int
		code, says         string
	}{
		{"PUT", "/v1/tenants/", "", nil, 400, "invalid_tenant_id", "is empty"},
		{"GET", "/v1/tenants//keys", "", nil, 400, "invalid_tenant_id", "is empty"},
		{"PUT", "/v1/tenants/" + strings.Repeat("x", 129), "", nil, 400, "invalid_tenant_id", "129 characters"},
		{"PUT", "/v1/tenants/a%20b", "", nil, 400, "invalid_tenant_id", "white space"},
		{"PUT", "/v1/tenants/a%2Fb", "", nil, 400, "invalid_tenant_id", "slash"},
		{"PUT", "/v1/tenants/a%00b", "", nil, 400, "invalid_tenant_id", "control character"},
		{"PUT", "/v1/tenants/%FF", "", nil, 400, "invalid_tenant_id", "UTF-8"},
		{"PUT", "/v1/tenants/%2E%2E", "", nil, 400, "invalid_tenant_id", `".."`},
		{"GET", "/v1/tenants/a%20b", "", nil, 400, "invalid_tenant_id", "white space"},
		{"PUT", "/v1/tenants/u", `{`, nil, 400, "invalid_request", "body"},
		{"PUT", "/v1/tenants/u", `[]`, nil, 400, "invalid_request", "must be an object"},
		{"PUT", "/v1/tenants/u", `{"display_name":7}`, nil, 400, "invalid_request", "must be a string"},
		{"PUT", "/v1/tenants/u", `{"labels":{"plan":true}}`, nil, 400, "invalid_request", "labels"},
		{"PUT", "/v1/tenants/u", `{"plan":"pro"}`, nil, 400, "invalid_request", "plan"},
		{"PUT", "/v1/tenants/u", `{} {}`, nil, 400, "invalid_request", "not one valid JSON object"},
		{"PUT", "/v1/tenants/u", `null`, nil, 400, "invalid_request", "must be an object"},
		{"PUT", "/v1/tenants/u", `{"Display_Name":"x"}`, nil, 400, "invalid_request", "there are: profile, display_name, labels"},
		{"PUT", "/v1/tenants/u", "{\"display_name\":\"\xff\"}", nil, 400, "invalid_request", "UTF-8"},
		{"PUT", "/v1/tenants/u", `{"display_name":"a\u0000b"}`, nil, 400, "invalid_display_name", "control character"},
		{"PUT", "/v1/tenants/u", `{"labels":{"a b":"c"}}`, nil, 400, "invalid_labels", "labels"},
		{"PUT", "/v1/tenants/u", `{"profile":"nowhere"}`, nil, 400, "profile_unknown", "default, narrow"},
		{"PUT", "/v1/tenants/u", big, nil, 413, "body_too_large", "65536"},
		{"PUT", "/v1/tenants/u", `a=b`, []string{"Content-Type", "application/x-www-form-urlencoded"}, 415, "content_type_unsupported", "application/json"},
		{"PUT", "/v1/tenants/u", `{}`, []string{"Content-Type", "application/json; charset=latin1"}, 415, "content_type_unsupported", "utf-8"},
		{"PUT", "/v1/tenants/u", `{}`, []string{"Content-Encoding", "gzip"}, 415, "content_encoding_unsupported", "identity"},
		{"PUT", "/v1/tenants/u", `{}`, []string{"Content-Encoding", "identity, br"}, 415, "content_encoding_unsupported", "identity"},
		{"POST", "/v1/keys/identify", `{"key":"x"}`, []string{"Content-Encoding", "deflate"}, 415, "content_encoding_unsupported", "identity"},
		{"PUT", "/v1/tenants/u", `{"profile":null}`, nil, 400, "invalid_request", "profile is null"},
		{"PUT", "/v1/tenants/u", `{"labels":null}`, nil, 400, "invalid_request", "labels is null"},
		{"PUT", "/v1/tenants/u", `{"labels":{"plan":null}}`, nil, 400, "invalid_request", "labels holds a null at byte 18"},
		{"POST", "/v1/keys/identify", `{"key":null}`, nil, 400, "invalid_request", "key is null"},
		{"PUT", "/v1/tenants/u", `{"display_name":"a","display_name":"b"}`, nil, 400, "invalid_request", "display_name is given twice"},
		{"PUT", "/v1/tenants/u", `{"display_name":"a","display_\u006eame":"a"}`, nil, 400, "invalid_request", "display_name is given twice"},
		{"PUT", "/v1/tenants/u", `{"labels":{"a":"1","a":"2"}}`, nil, 400, "invalid_request", "labels holds an object that gives one name twice"},
		{"PUT", "/v1/tenants/u", `{"display_name":"\ud83d"}`, nil, 400, "invalid_request", "byte 17 a \\u escape that is half of a surrogate pair"},
		{"PUT", "/v1/tenants/u", `{"display_name":"\ude00\ud83d"}`, nil, 400, "invalid_request", "half of a surrogate pair"},
		{"PUT", "/v1/tenants/u", `{"labels":{"\ud83d":"x"}}`, nil, 400, "invalid_request", "half of a surrogate pair"},
		{"PUT", "/v1/tenants/u?dry=1", "", nil, 400, "invalid_request", "there are: on_deleting"},
		{"PATCH", "/v1/tenants/u?dry=1", "{}", nil, 400, "invalid_request", "there are: none"},
		{"GET", "/v1/tenants/nobody", "", nil, 404, "tenant_not_found", ""},
		{"GET", "/v1/tenants/nobody/keys", "", nil, 404, "tenant_not_found", ""},
		{"GET", "/v1/tenants/nobody/keys/default/secret", "", nil, 404, "tenant_not_found", ""},
		{"GET", "/v1/tenants/nobody/keys/no%20name/secret", "", nil, 404, "key_not_found", ""},
		{"GET", "/v1/apps/nothing", "", nil, 404, "app_not_found", ""},
		{"GET", "/v1/apps/%00", "", nil, 404, "app_not_found", ""},
		{"GET", "/v1/tenants/u?wait=61", "", nil, 400, "invalid_request", "from 0 to 60"},
		{"GET", "/v1/tenants/u?wait=x", "", nil, 400, "invalid_request", "wait"},
		{"GET", "/v1/tenants?stat=active", "", nil, 400, "invalid_request", "there are: state"},
		{"GET", "/v1/tenants?state=happy", "", nil, 400, "invalid_request", "must be one of"},
		{"GET", "/v1/tenants?label=plan", "", nil, 400, "invalid_request", "key=value"},
		{"GET", "/v1/tenants?label=a%3D1&label=a%3D2", "", nil, 400, "invalid_request", "two values"},
		{"GET", "/v1/tenants?limit=0", "", nil, 400, "invalid_request", "from 1 to 1000"},
		{"GET", "/v1/tenants?limit=1001", "", nil, 400, "invalid_request", "from 1 to 1000"},
		{"GET", "/v1/tenants?limit=1&limit=2", "", nil, 400, "invalid_request", "2 times"},
		{"GET", "/v1/tenants?cursor=zzz", "", nil, 400, "invalid_request", "next_cursor"},
		{"GET", "/v1/tenants?created_after=yesterday", "", nil, 400, "invalid_request", "2026-01-31T12:00:00Z"},
		{"GET", "/v1/tenants?problem=maybe", "", nil, 400, "invalid_request", "true or false"},
		{"GET", "/v1/tenants?id_prefix=%00", "", nil, 400, "invalid_request", "zero byte"},
		{"GET", "/v1/tenants?id_prefix=%ff", "", nil, 400, "invalid_request", "UTF-8"},
		{"GET", "/v1/tenants?profile=a%FFb", "", nil, 400, "invalid_request", "UTF-8"},
		{"GET", "/v1/tenants/u?wait=%zz", "", nil, 400, "invalid_request", "percent-encoded"},
		{"GET", "/v1/tenants/u?wait=1;x=2", "", nil, 400, "invalid_request", "percent-encoded"},
		{"GET", "/v1/tenants?state=active&label=%", "", nil, 400, "invalid_request", "percent-encoded"},
		{"PUT", "/v1/tenants/u?%zz", "", nil, 400, "invalid_request", "percent-encoded"},
		{"GET", "/v1/upstream?;", "", nil, 400, "invalid_request", "percent-encoded"},
		{"GET", "/v1/tenants/u?wait=0&wait=5", "", nil, 400, "invalid_request", "wait is given 2 times"},
		{"GET", "/v1/tenants/u?wait=" + strings.Repeat("0", 1025), "", nil, 400, "invalid_request", "longer than 1024"},
		{"GET", "/v1/tenants/u?zz=1&dry=1", "", nil, 400, "invalid_request", "dry is not a parameter of this request; there are: wait"},
		{"GET", "/v1/tenants/u?%0a=1", "", nil, 400, "invalid_request", "query has a parameter that this request does not know; there are: wait"},
		{"GET", "/v1/upstream?%ff=1", "", nil, 400, "invalid_request", "query has a parameter"},
		{"GET", "/v1/upstream?" + strings.Repeat("x", 65), "", nil, 400, "invalid_request", "query has a parameter"},
		{"GET", "/v1/upstream?" + provisiontest.PAT + "=1", "", nil, 400, "invalid_request", "query has a parameter"},
		{"PUT", "/v1/tenants/u", `{"` + provisiontest.PAT + `":1}`, nil, 400, "invalid_request", "body has a field"},
		{"GET", "/openapi.yaml?x=1", "", nil, 400, "invalid_request", "x is not a parameter"},
		{"POST", "/v1/keys/identify", "", nil, 400, "invalid_request", "is empty"},
		{"POST", "/v1/keys/identify", `{"key":""}`, nil, 400, "invalid_request", "1 to 512"},
		{"POST", "/v1/keys/identify", `{"key":" \n"}`, nil, 400, "invalid_request", "1 to 512"},
		{"POST", "/v1/keys/identify", `{"key":"nobody's"}`, nil, 404, "key_not_found", ""},
		{"GET", "/v1/nothing", "", nil, 404, "route_not_found", "openapi.yaml"},
		{"DELETE", "/v1/upstream", "", nil, 405, "method_not_allowed", "takes GET, HEAD"},
	} {
		got := s.call(tenant.Provisioner, c.method, c.path, c.body, c.headers...)
		text := fmt.Sprint(got.at(t, "field"), " ", got.at(t, "detail"))
		if got.status != c.status || got.at(t, "code") != c.code || !strings.Contains(text, c.says) ||
			got.header.Get("Content-Type") != "application/problem+json" || got.at(t, "request_id") != got.header.Get("X-Request-Id") {
			t.Errorf("%s %s %.60s answers %d %s; want %d %s that says %q", c.method, c.path, c.body, got.status, got.body, c.status, c.code, c.says)
		}
	}
	if list := s.call(tenant.Viewer, "GET", "/v1/tenants", ""); string(list.body) != "{\"tenants\":[]}\n" {
		t.Errorf("bad requests left %s", list.body)
	}
}

// What JSON allows in strings is taken, and arrives as it was meant.
func TestBodyText(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	got := s.call(tenant.Provisioner, "PUT", "/v1/tenants/u", `{"display_name":"\ud83D\uDE00 \\ud83d \u00e9 \"","labels":{"display_name":"x"}}`,
		"Content-Type", "application/json; charset=UTF-8", "Content-Encoding", "identity")
	if got.status != http.StatusCreated || got.at(t, "display_name") != `😀 \ud83d é "` {
		t.Errorf("PUT answers %d %s", got.status, got.body)
	}
}

func TestAuthentication(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	revoked, text := tenant.NewToken()
	actor := tenant.Actor{Name: "test"}
	if _, err := s.replica.DB.AddCaller(t.Context(), revoked, tenant.NewCaller{Name: "gone", Role: tenant.Provisioner}, actor); err != nil {
		t.Fatal(err)
	}
	if _, err := s.replica.DB.RevokeCaller(t.Context(), revoked.ID, actor); err != nil {
		t.Fatal(err)
	}
	_, unknown := tenant.NewToken()
	for name, header := range map[string]string{
		"none": "", "basic": "Basic YTpi", "no token": "Bearer", "wrong form": "Bearer tnty_x",
		"unknown": "Bearer " + unknown.Reveal(), "revoked": "Bearer " + text.Reveal(),
	} {
		var headers []string
		if header != "" {
			headers = []string{"Authorization", header}
		}
		got := s.call("", "GET", "/v1/upstream", "", headers...)
		if got.status != http.StatusUnauthorized || !strings.HasPrefix(got.header.Get("WWW-Authenticate"), "Bearer") {
			t.Errorf("%s: answers %d %v", name, got.status, got.header)
		}
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, s.url+"/v1/upstream", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header["Authorization"] = []string{"Bearer " + s.tokens[tenant.Viewer], "Bearer " + s.tokens[tenant.Admin]}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	if body, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != http.StatusUnauthorized || !strings.Contains(string(body), "there are 2 Authorization headers: send one") {
		t.Errorf("two tokens are answered %d %s, %v", resp.StatusCode, body, err)
	}
	if got := s.call("", "GET", "/openapi.yaml", ""); got.status != http.StatusOK || !strings.HasPrefix(string(got.body), "openapi: 3.1") {
		t.Errorf("the contract is answered with %d", got.status)
	}
}

// Who may do what.
func TestRoles(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.call(tenant.Provisioner, "PUT", "/v1/tenants/u", "")
	all := tenant.Roles
	provisioner := []tenant.Role{tenant.Provisioner}
	managers := []tenant.Role{tenant.Provisioner, tenant.Admin}
	for _, c := range []struct {
		method, path, body string
		roles              []tenant.Role
	}{
		{"PUT", "/v1/tenants/u", "", provisioner},
		{"GET", "/v1/tenants/u", "", all},
		{"GET", "/v1/tenants", "", all},
		{"GET", "/v1/tenants/u/keys", "", all},
		{"GET", "/v1/tenants/u/keys/default/secret", "", provisioner},
		{"PATCH", "/v1/tenants/u", `{}`, provisioner},
		{"POST", "/v1/tenants/u/suspend", "", managers},
		{"POST", "/v1/tenants/u/resume", "", managers},
		{"POST", "/v1/tenants/nobody/restore", "", managers},
		{"DELETE", "/v1/tenants/nobody", "", managers},
		{"PUT", "/v1/tenants/u/keys/more", "", provisioner},
		{"GET", "/v1/tenants/u/keys/default", "", all},
		{"DELETE", "/v1/tenants/u/keys/never", "", managers},
		{"PUT", "/v1/tenants/u/keys/never/rotations/r", "", provisioner},
		{"GET", "/v1/tenants/u/keys/never/rotations/r", "", all},
		{"POST", "/v1/tenants/u/keys/never/rotations/r/confirm", "", provisioner},
		{"GET", "/v1/apps/x", "", all},
		{"POST", "/v1/keys/identify", `{"key":"x"}`, all},
		{"POST", "/v1/keys/quarantine", `{"key":"x"}`, managers},
		{"GET", "/v1/upstream", "", all},
		{"POST", "/v1/upstream/pause", "", []tenant.Role{tenant.Admin}},
		{"POST", "/v1/upstream/resume", "", []tenant.Role{tenant.Admin}},
		{"GET", "/v1/profiles", "", all},
		{"GET", "/v1/pool", "", all},
	} {
		for _, role := range tenant.Roles {
			got := s.call(role, c.method, c.path, c.body)
			if allowed := slices.Contains(c.roles, role); allowed == (got.status == http.StatusForbidden) {
				t.Errorf("%s %s as %s answers %d; allowed: %v", c.method, c.path, role, got.status, allowed)
			}
		}
	}
}

func TestLookUps(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	put := s.call(tenant.Provisioner, "PUT", "/v1/tenants/user_42", `{"labels":{"plan":"pro"}}`)
	key := fmt.Sprint(put.at(t, "credentials", "key"))
	app := fmt.Sprint(put.at(t, "app", "id"))

	get := s.call(tenant.Viewer, "GET", "/v1/tenants/user_42", "")
	if get.status != http.StatusOK || strings.Contains(string(get.body), key) || get.header.Get("ETag") != put.header.Get("ETag") {
		t.Errorf("GET answers %d %v %s", get.status, get.header, get.body)
	}
	for tag, want := range map[string]int{get.header.Get("ETag"): 304, "W/" + get.header.Get("ETag"): 304, `"other", ` + get.header.Get("ETag"): 304, "*": 304, `"other"`: 200} {
		if got := s.call(tenant.Viewer, "GET", "/v1/tenants/user_42", "", "If-None-Match", tag); got.status != want {
			t.Errorf("If-None-Match: %s answers %d; want %d", tag, got.status, want)
		}
	}
	byApp := s.call(tenant.Viewer, "GET", "/v1/apps/"+app, "")
	if diff := cmp.Diff(get.decode(t), byApp.decode(t)); diff != "" {
		t.Errorf("the look-up by app differs: %s", diff)
	}
	keys := s.call(tenant.Viewer, "GET", "/v1/tenants/user_42/keys", "")
	list, _ := keys.at(t, "keys").([]any)
	if len(list) != 1 || strings.Contains(string(keys.body), key) || list[0].(map[string]any)["hint"] != key[len(key)-4:] ||
		list[0].(map[string]any)["state"] != "active" {
		t.Errorf("the keys are %s", keys.body)
	}
	secret := s.call(tenant.Provisioner, "GET", "/v1/tenants/user_42/keys/default/secret", "")
	if secret.at(t, "key") != key || secret.header.Get("Cache-Control") != "no-store" {
		t.Errorf("the secret is answered with %d %v", secret.status, secret.header)
	}
	if got := s.call(tenant.Provisioner, "GET", "/v1/tenants/user_42/keys/other/secret", ""); got.status != 404 || got.at(t, "code") != "key_not_found" {
		t.Errorf("an unknown key is answered with %d %s", got.status, got.body)
	}
	leak := s.call(tenant.Viewer, "POST", "/v1/keys/identify", `{"key":"`+key+`"}`)
	if leak.at(t, "tenant_id") != "user_42" || leak.at(t, "app_id") != app || leak.at(t, "key", "name") != "default" || strings.Contains(string(leak.body), key) {
		t.Errorf("identify answers %d %s", leak.status, leak.body)
	}
	for _, text := range []string{" " + key + "\\n", "Key " + key, "\\tkey  " + key + "\\r\\n"} {
		if leak := s.call(tenant.Viewer, "POST", "/v1/keys/identify", `{"key":"`+text+`"}`); leak.at(t, "tenant_id") != "user_42" {
			t.Errorf("identify of a key with more around it answers %d %s", leak.status, leak.body)
		}
	}
	up := s.call(tenant.Viewer, "GET", "/v1/upstream", "")
	if up.at(t, "operator") != "acme" || up.at(t, "pat", "state") != "ok" || up.at(t, "breaker", "state") != "closed" {
		t.Errorf("GET /v1/upstream answers %s", up.body)
	}

	// Every reveal is written down, and who asked.
	var events int
	if err := pgtest.Conn(t, s.world.URL).QueryRow(t.Context(), `SELECT count(*) FROM audit_events
		WHERE action = 'key.revealed' AND tenant_id = 'user_42' AND app_id = $1 AND actor LIKE 'caller:%' AND request_id = $2`,
		app, secret.header.Get("X-Request-Id")).Scan(&events); err != nil || events != 1 {
		t.Errorf("the reveal left %d events, %v; want 1", events, err)
	}
}

func TestListPages(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	var wg sync.WaitGroup
	for i := range 7 {
		wg.Go(func() {
			s.call(tenant.Provisioner, "PUT", fmt.Sprint("/v1/tenants/user_", i), fmt.Sprintf(`{"labels":{"even":"%v"}}`, i%2 == 0))
		})
	}
	wg.Wait()
	var seen []string
	path := "/v1/tenants?limit=3&state=active"
	for pages := 1; ; pages++ {
		page := s.call(tenant.Viewer, "GET", path, "")
		for _, item := range page.at(t, "tenants").([]any) {
			seen = append(seen, fmt.Sprint(item.(map[string]any)["id"]))
		}
		next, _ := page.at(t, "next_cursor").(string)
		if next == "" {
			if pages != 3 {
				t.Errorf("7 tenants are on %d pages of 3", pages)
			}
			break
		}
		path = "/v1/tenants?limit=3&state=active&cursor=" + url.QueryEscape(next)
	}
	slices.Sort(seen)
	if want := []string{"user_0", "user_1", "user_2", "user_3", "user_4", "user_5", "user_6"}; !slices.Equal(seen, want) {
		t.Errorf("the pages hold %v; want each tenant once", seen)
	}
	even := s.call(tenant.Viewer, "GET", "/v1/tenants?label=even%3Dtrue&id_prefix=user_&profile=default&problem=false", "")
	if got := len(even.at(t, "tenants").([]any)); got != 4 {
		t.Errorf("%d tenants have the label; want 4", got)
	}
}

// A request's id is the caller's where it is sane, and stands in the one line
// that is logged, with the route's pattern and not its path.
func TestRequestLog(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	_, token := tenant.NewToken()
	for id, kept := range map[string]bool{"req-7.a:b/c=": true, "": false, "has space": false, strings.Repeat("x", 129): false, "tab\tbed": false, token.Reveal(): false, "a" + token.Reveal(): false,
		provisiontest.PAT: false, "req-" + strings.ToUpper(provisiontest.PAT) + ".7": false, provisiontest.PAT[:31] + "-" + provisiontest.PAT[:31]: true,
		"0191d1c2-7b1a-7b1a-8b1a-0191d1c27b1a": true} {
		s.logs.TakeAll()
		got := s.call(tenant.Viewer, "GET", "/v1/tenants/user_%34", "", "X-Request-Id", id)
		if answered := got.header.Get("X-Request-Id"); answered == "" || (answered == id) != kept {
			t.Errorf("X-Request-Id %q is answered %q; kept: %v", id, answered, kept)
		}
		provisiontest.Eventually(t, "the line is logged", func() bool { return s.logs.Len() > 0 })
		lines := s.logs.TakeAll()
		if len(lines) != 1 {
			t.Fatalf("%d lines are logged for one request", len(lines))
		}
		fields := lines[0].ContextMap()
		if fields["request_id"] != got.header.Get("X-Request-Id") || fields["route"] != "/v1/tenants/{tenant_id}" ||
			fields["status"] != int64(404) || fields["tenant"] != "user_4" || fields["caller_name"] != "viewer" {
			t.Errorf("the line reads %v", fields)
		}
		if !kept && id != "" && strings.Contains(fmt.Sprint(fields), id) {
			t.Errorf("the id %q is in the line %v", id, fields)
		}
		if strings.Contains(fmt.Sprint(fields), "%34") {
			t.Errorf("the path is in the line %v", fields)
		}
	}
}

// A caller that sends slowly, or too much before the body, is not waited for.
func TestSlowAndOversizedRequests(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	if got := s.call(tenant.Viewer, "GET", "/v1/tenants/"+strings.Repeat("x", 8<<10), ""); got.status != http.StatusBadRequest {
		t.Errorf("a path of 8 KiB is answered with %d", got.status)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, s.url+"/v1/upstream", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Large", strings.Repeat("x", 2*httpapi.MaxHeaderBytes))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("a header of %d bytes is answered with %s", 2*httpapi.MaxHeaderBytes, resp.Status)
	}
	var wg sync.WaitGroup
	for name, text := range map[string]string{
		"header": "PUT /v1/tenants/slow HTTP/1.1\r\nHost: x\r\nAuth",
		"body": "PUT /v1/tenants/slow HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + s.tokens[tenant.Provisioner] +
			"\r\nContent-Length: 100\r\n\r\n{",
	} {
		wg.Go(func() {
			conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
			if err != nil {
				t.Error(err)
				return
			}
			defer func() { _ = conn.Close() }()
			if _, err := io.WriteString(conn, text); err != nil {
				t.Error(err)
			}
			// Well above the server's limit: this only ends a test that would hang.
			_ = conn.SetReadDeadline(time.Now().Add(6 * httpapi.ReadTimeout))
			answered, err := io.ReadAll(conn)
			if err != nil {
				t.Errorf("slow %s: the connection is kept open: %v", name, err)
			}
			if name == "body" && (!strings.Contains(string(answered), " 400 ") || !strings.Contains(string(answered), "in full within")) {
				t.Errorf("a body that does not come is answered %q", answered)
			}
		})
	}
	wg.Wait()
}

// A body that cannot be read is refused for what is wrong with it.
func TestBrokenBodies(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	for says, rest := range map[string]string{
		"ended early":               "Content-Length: 100\r\n\r\n{",
		"its last chunk is missing": "Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",
		"was not sent as HTTP":      "Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
	} {
		conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		if _, err := io.WriteString(conn, "PUT /v1/tenants/u HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer "+
			s.tokens[tenant.Provisioner]+"\r\n"+rest); err != nil {
			t.Fatal(err)
		}
		if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		_ = conn.SetReadDeadline(time.Now().Add(httpapi.ReadTimeout))
		answered, err := io.ReadAll(conn)
		if err != nil || !strings.Contains(string(answered), " 400 ") || !strings.Contains(string(answered), says) {
			t.Errorf("%q is answered %q, %v; want 400 that says %q", rest, answered, err, says)
		}
	}
}

// A handler that panics is answered with 500, without its text, and the service
// goes on.
func TestPanic(t *testing.T) {
	t.Parallel()
	core, logs := observer.New(zapcore.DebugLevel)
	resp, err := http.Get(httpapi.NewPanicking(t, zap.New(core)) + "/panic")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusInternalServerError || strings.Contains(string(body), "word") || !strings.Contains(string(body), `"request_id"`) {
		t.Errorf("a panic answers %d %s, %v", resp.StatusCode, body, err)
	}
	if logs.FilterMessage("a handler panicked").Len() != 1 || logs.FilterMessage("request").Len() != 1 {
		t.Errorf("a panic logs %v", logs.All())
	}
}

func TestGeneratedClient(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	c, err := client.NewClientWithResponses(s.url, client.WithToken(s.tokens[tenant.Provisioner]))
	if err != nil {
		t.Fatal(err)
	}
	name, id := "Ada", "a/b?c"
	wait := "wait=30"
	if put, err := c.PutTenantWithResponse(t.Context(), id, &client.PutTenantParams{Prefer: &wait}, client.SignUp{DisplayName: &name}); err != nil || put.ApplicationproblemJSON400 == nil {
		t.Errorf("the client cannot read a refusal: %v", err)
	}
	put, err := c.PutTenantWithResponse(t.Context(), "a?b", &client.PutTenantParams{Prefer: &wait}, client.SignUp{DisplayName: &name})
	if err != nil || put.JSON201 == nil || put.JSON201.Credentials == nil || put.JSON201.App == nil {
		t.Fatalf("PutTenant = %+v, %v", put, err)
	}
	get, err := c.GetTenantWithResponse(t.Context(), "a?b", nil)
	if err != nil || get.JSON200 == nil || get.JSON200.App.Id != put.JSON201.App.Id {
		t.Errorf("GetTenant = %+v, %v", get, err)
	}
}

// Every kind of failure has a status of its own choice.
func TestEveryKindHasAStatus(t *testing.T) {
	t.Parallel()
	for _, kind := range tenant.Kinds {
		if _, ok := httpapi.StatusOf(kind); !ok {
			t.Errorf("the kind %s has no status", kind)
		}
	}
	if _, ok := httpapi.StatusOf("unheard of"); ok {
		t.Error("a kind that does not exist has a status")
	}
}
