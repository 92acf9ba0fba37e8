package httpapi_test

import (
	"cmp"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	gocmp "github.com/google/go-cmp/cmp"
	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/httpapi"
	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// caller makes a caller on the database; with is its name in call.
func (s *site) caller(with tenant.Role, c tenant.NewCaller) string {
	s.t.Helper()
	token, text := tenant.NewToken()
	c.Name = cmp.Or(c.Name, string(with))
	if _, err := s.replica.DB.AddCaller(s.t.Context(), token, c, tenant.Actor{Name: "test"}); err != nil {
		s.t.Fatal(err)
	}
	s.tokens[with] = text.Reveal()
	return token.ID
}

func TestManageCallers(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	expires := time.Now().Add(time.Hour).UTC().Format(time.RFC3339)
	made := s.call(tenant.Admin, "POST", "/v1/callers",
		`{"name":"product a","role":"provisioner","expires_at":"`+expires+`","labels":{"product":"a"},"rate_limit":500}`)
	id, token := fmt.Sprint(made.at(t, "id")), fmt.Sprint(made.at(t, "token"))
	if made.status != http.StatusCreated || made.header.Get("Cache-Control") != "no-store" || made.header.Get("Location") != "/v1/callers/"+id ||
		!strings.HasPrefix(token, "tnty_"+id+"_") || made.at(t, "expires_at") != expires || made.at(t, "rate_limit") != 500.0 || made.at(t, "labels", "product") != "a" {
		t.Fatalf("POST answers %d %v %s", made.status, made.header, made.body)
	}
	s.tokens["new"] = token
	if a := s.call("new", "PUT", "/v1/tenants/user_1", "", "Prefer", "wait=30"); a.status != http.StatusCreated || a.at(t, "labels", "product") != "a" {
		t.Errorf("a sign-up with the new token answers %d %s", a.status, a.body)
	}
	shown := s.call(tenant.Admin, "GET", "/v1/callers/"+id, "")
	want := made.decode(t)
	delete(want, "token")
	want["last_used_at"] = shown.at(t, "last_used_at")
	if diff := gocmp.Diff(want, shown.decode(t)); diff != "" || want["last_used_at"] == nil {
		t.Errorf("the caller is shown otherwise than it was made: %s", diff)
	}

	// A page at a time.
	var ids []string
	path := "/v1/callers?limit=2"
	for path != "" {
		page := s.call(tenant.Admin, "GET", path, "")
		for _, c := range page.at(t, "callers").([]any) {
			ids = append(ids, fmt.Sprint(c.(map[string]any)["id"]))
		}
		next, ok := page.at(t, "next_cursor").(string)
		path = "/v1/callers?limit=2&cursor=" + url.QueryEscape(next)
		if !ok {
			path = ""
		}
	}
	if len(ids) != 4 || ids[3] != id {
		t.Errorf("the pages hold %v; want 4 callers and %s last", ids, id)
	}

	rotated := s.call(tenant.Admin, "POST", "/v1/callers/"+id+"/rotations", `{"overlap":"1h"}`)
	if rotated.status != http.StatusCreated || rotated.header.Get("Cache-Control") != "no-store" || rotated.at(t, "name") != "product a" ||
		rotated.at(t, "labels", "product") != "a" || rotated.at(t, "rate_limit") != 500.0 || rotated.at(t, "id") == id {
		t.Fatalf("a rotation answers %d %s", rotated.status, rotated.body)
	}
	s.tokens["newer"] = fmt.Sprint(rotated.at(t, "token"))
	for _, role := range []tenant.Role{"new", "newer"} {
		if a := s.call(role, "GET", "/v1/tenants/user_1", ""); a.status != http.StatusOK {
			t.Errorf("in the overlap, the %s token is answered %d %s", role, a.status, a.body)
		}
	}
	again := s.call(tenant.Admin, "POST", "/v1/callers/"+id+"/rotations", "")
	if again.at(t, "code") != "caller_rotated" || !strings.Contains(fmt.Sprint(again.at(t, "detail")), fmt.Sprint(rotated.at(t, "id"))) {
		t.Errorf("a second rotation answers %s; want a conflict that names the new token", again.body)
	}
	newest := s.call(tenant.Admin, "POST", rotated.header.Get("Location")+"/rotations", `{"overlap":"0s"}`)
	if newest.status != http.StatusCreated {
		t.Errorf("a rotation without overlap answers %d %s", newest.status, newest.body)
	}
	if a := s.call("newer", "GET", "/v1/tenants/user_1", ""); a.status != http.StatusUnauthorized {
		t.Errorf("after a rotation without overlap, the old token is answered %d", a.status)
	}

	// Another replica knows of it at the next request.
	other := s.world.Start(provisiontest.Options{Idle: true})
	srv := httptest.NewServer(httpapi.New(httpapi.Config{Service: other.Service, DB: other.DB, Log: zap.NewNop(), Metrics: httpapi.NewMetrics(other.Reg)}))
	defer srv.Close()
	first := s.url
	s.url, s.tokens["newest"] = srv.URL, fmt.Sprint(newest.at(t, "token"))
	if a := s.call("newest", "GET", "/v1/tenants/user_1", ""); a.status != http.StatusOK {
		t.Errorf("another replica answers %d", a.status)
	}
	s.url = first
	var revokedAt any
	for range 2 {
		a := s.call(tenant.Admin, "DELETE", newest.header.Get("Location"), "")
		if a.status != http.StatusOK || a.at(t, "revoked_at") == nil || revokedAt != nil && a.at(t, "revoked_at") != revokedAt {
			t.Errorf("DELETE answers %d %s", a.status, a.body)
		}
		revokedAt = a.at(t, "revoked_at")
	}
	s.url = srv.URL
	if a := s.call("newest", "GET", "/v1/tenants/user_1", ""); a.status != http.StatusUnauthorized {
		t.Errorf("another replica answers %d to a revoked token", a.status)
	}
	s.url = first

	own := strings.Split(s.tokens[tenant.Admin], "_")[1]
	if a := s.call(tenant.Admin, "DELETE", "/v1/callers/"+own, ""); a.status != http.StatusConflict || a.at(t, "code") != "last_admin" {
		t.Errorf("revoking the last admin answers %d %s", a.status, a.body)
	}
	if a := s.call(tenant.Admin, "POST", "/v1/callers/"+own+"/rotations", `{"overlap":"0s"}`); a.status != http.StatusBadRequest || a.at(t, "field") != "overlap" {
		t.Errorf("rotating one's own token without overlap answers %d %s", a.status, a.body)
	}
	if a := s.call(tenant.Admin, "POST", "/v1/callers/"+own+"/rotations", ""); a.status != http.StatusCreated {
		t.Errorf("rotating one's own token answers %d %s", a.status, a.body)
	}
	if a := s.call(tenant.Admin, "DELETE", "/v1/callers/"+own, ""); a.status != http.StatusOK {
		t.Errorf("revoking one's own token beside another's answers %d %s", a.status, a.body)
	}
	for _, line := range s.logs.All() {
		if text := line.Message + fmt.Sprint(line.ContextMap()); strings.Contains(text, token[22:]) {
			t.Errorf("a token is in the log: %s", text)
		}
	}
	// Every command has its event, and who asked; no event has a secret.
	var created, ofAPI, rotations, revoked, leaks int
	if err := pgtest.Conn(t, s.world.URL).QueryRow(t.Context(), `SELECT
		count(*) FILTER (WHERE action = 'token.created' AND actor LIKE 'caller:%' AND NOT detail ? 'replaces'),
		count(*) FILTER (WHERE action = 'token.created' AND actor LIKE 'caller:%' AND detail ? 'replaces'),
		count(*) FILTER (WHERE action = 'token.rotated' AND actor = 'caller:' || $1 AND request_id IS NOT NULL),
		count(*) FILTER (WHERE action = 'token.revoked' AND actor = 'caller:' || $1),
		count(*) FILTER (WHERE detail::text LIKE '%sha256%' OR detail::text LIKE '%' || $2 || '%')
		FROM audit_events`, own, token[22:]).Scan(&created, &ofAPI, &rotations, &revoked, &leaks); err != nil {
		t.Fatal(err)
	}
	if created != 1 || ofAPI != 3 || rotations != 3 || revoked != 2 || leaks != 0 {
		t.Errorf("there are %d, %d, %d, %d events and %d leaks; want 1, 3, 3, 2 and none", created, ofAPI, rotations, revoked, leaks)
	}
}

func TestCallersRefused(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	s := newSiteOn(t, w, w.Start(provisiontest.Options{Idle: true}))
	viewer := strings.Split(s.tokens[tenant.Viewer], "_")[1]
	with := func(field, value string) string {
		fields := map[string]string{"name": `"n"`, "role": `"viewer"`}
		fields[field] = value
		var parts []string
		for k, v := range fields {
			if v != "" {
				parts = append(parts, `"`+k+`":`+v)
			}
		}
		return "{" + strings.Join(parts, ",") + "}"
	}
	rotations := "/" + viewer + "/rotations"
	for _, c := range []struct {
		role               tenant.Role
		method, path, body string
		status             int
		code, says         string
	}{
		{tenant.Viewer, "POST", "", "", 403, "role_forbidden", "admin"},
		{tenant.Provisioner, "GET", "", "", 403, "role_forbidden", "admin"},
		{tenant.Provisioner, "GET", "/" + viewer, "", 403, "role_forbidden", "admin"},
		{tenant.Viewer, "DELETE", "/" + viewer, "", 403, "role_forbidden", "admin"},
		{tenant.Viewer, "POST", rotations, "", 403, "role_forbidden", "admin"},
		{tenant.Admin, "POST", "", "", 400, "invalid_name", "name is empty"},
		{tenant.Admin, "POST", "", with("name", ""), 400, "invalid_name", "name is empty"},
		{tenant.Admin, "POST", "", with("name", `"a\u202eb"`), 400, "invalid_name", "cannot be printed"},
		{tenant.Admin, "POST", "", with("role", ""), 400, "invalid_role", "role must be viewer, provisioner or admin"},
		{tenant.Admin, "POST", "", with("role", `"root"`), 400, "invalid_role", "role must be viewer, provisioner or admin"},
		{tenant.Admin, "POST", "", with("expires_at", `"2020-01-01T00:00:00Z"`), 400, "invalid_expires_at", "has passed"},
		{tenant.Admin, "POST", "", with("expires_at", `"9999-12-31T23:59:59-01:00"`), 400, "invalid_expires_at", "9999"},
		{tenant.Admin, "POST", "", with("expires_at", `"tomorrow"`), 400, "invalid_request", "expires_at must be a time"},
		{tenant.Admin, "POST", "", with("expires_at", `""`), 400, "invalid_request", "expires_at must be a time"},
		{tenant.Admin, "POST", "", with("expires_at", `"0001-01-01T00:00:00Z"`), 400, "invalid_request", "expires_at"},
		{tenant.Admin, "POST", "", with("expires_at", `null`), 400, "invalid_request", "expires_at is null"},
		{tenant.Admin, "POST", "", with("labels", `{"a b":"c"}`), 400, "invalid_labels", "labels"},
		{tenant.Admin, "POST", "", with("labels", `{"a":1}`), 400, "invalid_request", "labels"},
		{tenant.Admin, "POST", "", with("rate_limit", `0`), 400, "invalid_request", "rate_limit must be a whole number"},
		{tenant.Admin, "POST", "", with("rate_limit", `1.5`), 400, "invalid_request", "rate_limit must be a whole number"},
		{tenant.Admin, "POST", "", with("rate_limit", `10001`), 400, "invalid_request", "from 1 to 10000"},
		{tenant.Admin, "POST", "", with("rate_limit", `1e400`), 400, "invalid_request", "rate_limit"},
		{tenant.Admin, "POST", "", with("token", `"x"`), 400, "invalid_request", "token is not a field"},
		{tenant.Admin, "GET", "?limit=0", "", 400, "invalid_request", "from 1 to 1000"},
		{tenant.Admin, "GET", "?cursor=nobody", "", 400, "invalid_request", "next_cursor"},
		{tenant.Admin, "GET", "/nobody", "", 404, "caller_not_found", ""},
		{tenant.Admin, "GET", "/" + s.tokens[tenant.Viewer], "", 404, "caller_not_found", ""},
		{tenant.Admin, "DELETE", "/nobody", "", 404, "caller_not_found", ""},
		{tenant.Admin, "DELETE", "/" + viewer, `{"force":true}`, 400, "invalid_request", "force"},
		{tenant.Admin, "POST", "/nobody/rotations", "", 404, "caller_not_found", ""},
		{tenant.Admin, "POST", rotations, `{"overlap":"-1s"}`, 400, "invalid_overlap", "from 0s to 720h"},
		{tenant.Admin, "POST", rotations, `{"overlap":"721h"}`, 400, "invalid_overlap", "from 0s to 720h"},
		{tenant.Admin, "POST", rotations, `{"overlap":"a day"}`, 400, "invalid_request", "overlap must be a duration"},
		{tenant.Admin, "POST", rotations, `{"overlap":3600}`, 400, "invalid_request", "overlap"},
		{tenant.Admin, "POST", rotations, `{"expires_at":"2020-01-01T00:00:00Z"}`, 400, "invalid_expires_at", "has passed"},
		{tenant.Admin, "POST", rotations, `{"role":"admin"}`, 400, "invalid_request", "role is not a field"},
	} {
		a := s.call(c.role, c.method, "/v1/callers"+c.path, c.body)
		if text := fmt.Sprint(a.at(t, "field"), " ", a.at(t, "detail")); a.status != c.status || a.at(t, "code") != c.code || !strings.Contains(text, c.says) {
			t.Errorf("%s %s %s answers %d %s; want %d %s that says %q", c.method, c.path, c.body, a.status, a.body, c.status, c.code, c.says)
		}
	}
	if list := s.call(tenant.Admin, "GET", "/v1/callers", ""); len(list.at(t, "callers").([]any)) != 3 {
		t.Errorf("bad requests left %s", list.body)
	}
}

// A limited caller is answered on every route for a tenant that is not its own as
// for one that does not exist, and may do nothing that is not about its tenants.
func TestLimitedCallerOnEveryRoute(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.call(tenant.Provisioner, "PUT", "/v1/tenants/theirs", `{"labels":{"product":"b"}}`, "Prefer", "wait=30")
	limited := map[tenant.Role]tenant.Role{}
	for _, role := range tenant.Roles {
		limited[role] = "limited " + role
		s.caller(limited[role], tenant.NewCaller{Role: role, Scope: tenant.Scope{"product": "a"}})
	}
	open := []string{"GET /v1/apps/{app_id}", "GET /v1/tenants", "GET /v1/upstream", "POST /v1/keys/identify", "POST /v1/tenants/batch"}
	if diff := gocmp.Diff(open, httpapi.OpenToLimited()); diff != "" {
		t.Errorf("the routes that are open to limited callers differ: does the new one keep to scopeOf? %s", diff)
	}
	open = append(open, "GET /openapi.yaml")
	walked := map[string]bool{}
	err := chi.Walk(httpapi.New(httpapi.Config{}).(chi.Routes), func(method, route string, _ http.Handler, _ ...func(http.Handler) http.Handler) error {
		walked[method+" "+route] = true
		path := func(tenantID string) string {
			path := strings.ReplaceAll(route, "{tenant_id}", tenantID)
			return regexp.MustCompile(`\{\w+\}`).ReplaceAllString(path, "default")
		}
		if !strings.Contains(route, "{tenant_id}") {
			if slices.Contains(open, method+" "+route) {
				return nil
			}
			for _, role := range tenant.Roles {
				if a := s.call(limited[role], method, path(""), ""); a.status != http.StatusForbidden {
					t.Errorf("%s %s is open to limited callers with the role %s: %d %s", method, route, role, a.status, a.body)
				}
			}
			if a := s.call(limited[tenant.Admin], method, path(""), ""); a.at(t, "code") != "caller_limited" && a.at(t, "code") != "role_forbidden" {
				t.Errorf("%s %s answers %s", method, route, a.body)
			}
			return nil
		}
		notFound := 0
		for _, role := range tenant.Roles {
			theirs := s.call(limited[role], method, path("theirs"), "")
			switch theirs.status {
			case http.StatusForbidden:
				if theirs.at(t, "code") != "role_forbidden" {
					t.Errorf("%s %s answers %s", method, route, theirs.body)
				}
				continue
			case http.StatusNotFound:
				notFound++
			default:
				t.Errorf("%s %s of another's tenant answers a limited %s with %d %s; want 404", method, route, role, theirs.status, theirs.body)
			}
			if method+" "+route == "PUT /v1/tenants/{tenant_id}" {
				continue // signs an unknown one up
			}
			nobody := s.call(limited[role], method, path("nobody"), "")
			a, b := theirs.decode(t), nobody.decode(t)
			delete(a, "request_id")
			delete(b, "request_id")
			if diff := gocmp.Diff(b, a); diff != "" || a["code"] != "tenant_not_found" {
				t.Errorf("%s %s tells another's tenant from one that does not exist: %s", method, route, diff)
			}
		}
		if notFound == 0 {
			t.Errorf("%s %s is open to no role", method, route)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(walked) < 18 {
		t.Errorf("only %d routes were walked", len(walked))
	}
	for _, route := range open {
		if !walked[route] {
			t.Errorf("%s is open to limited callers and not served", route)
		}
	}
}

func TestLimitedCaller(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	theirs := s.call(tenant.Provisioner, "PUT", "/v1/tenants/theirs", `{"labels":{"product":"b","plan":"pro"}}`, "Prefer", "wait=30")
	s.call(tenant.Provisioner, "PUT", "/v1/tenants/unlabelled", "", "Prefer", "wait=30")
	const a, viewer, admin = "product a", "viewer of a", "admin of a"
	scope := tenant.Scope{"product": "a"}
	s.caller(a, tenant.NewCaller{Role: tenant.Provisioner, Scope: scope})
	s.caller(viewer, tenant.NewCaller{Role: tenant.Viewer, Scope: scope})
	s.caller(admin, tenant.NewCaller{Role: tenant.Admin, Scope: scope})

	mine := s.call(a, "PUT", "/v1/tenants/mine", `{"labels":{"plan":"pro"}}`, "Prefer", "wait=30")
	if mine.status != http.StatusCreated || mine.at(t, "labels", "product") != "a" || mine.at(t, "labels", "plan") != "pro" {
		t.Fatalf("a sign-up answers %d %s", mine.status, mine.body)
	}
	for body, want := range map[string]int{"": 200, `{"labels":{"plan":"pro"}}`: 200, `{"labels":{"plan":"pro","product":"a"}}`: 200,
		`{"labels":{"plan":"free"}}`: 409, `{"labels":{"plan":"pro","product":"b"}}`: 403} {
		if got := s.call(a, "PUT", "/v1/tenants/mine", body); got.status != want {
			t.Errorf("PUT %s answers %d %s; want %d", body, got.status, got.body, want)
		}
	}
	contradicts := s.call(a, "PUT", "/v1/tenants/new", `{"labels":{"product":"b"}}`)
	if contradicts.status != http.StatusForbidden || contradicts.at(t, "code") != "label_forbidden" || contradicts.at(t, "field") != "labels.product" {
		t.Errorf("a label that contradicts answers %d %s", contradicts.status, contradicts.body)
	}
	for _, id := range []string{"theirs", "unlabelled"} {
		if got := s.call(a, "PUT", "/v1/tenants/"+id, `{"labels":{"product":"a"}}`); got.status != http.StatusNotFound {
			t.Errorf("signing another's tenant up answers %d %s", got.status, got.body)
		}
	}
	if got := s.call(a, "PUT", "/v1/tenants/a%20b", ""); got.status != http.StatusBadRequest {
		t.Errorf("an id that cannot be answers %d %s", got.status, got.body)
	}

	// What is its own works as ever.
	app, key := fmt.Sprint(mine.at(t, "app", "id")), fmt.Sprint(mine.at(t, "credentials", "key"))
	for path, role := range map[string]tenant.Role{"/v1/tenants/mine": viewer, "/v1/tenants/mine?wait=1": viewer, "/v1/tenants/mine/keys": viewer, "/v1/tenants/mine/keys/default/secret": a, "/v1/apps/" + app: viewer, "/v1/upstream": viewer} {
		if got := s.call(role, "GET", path, ""); got.status != http.StatusOK {
			t.Errorf("GET %s answers %d %s", path, got.status, got.body)
		}
		if got := s.call(role, "HEAD", path, ""); got.status != http.StatusOK {
			t.Errorf("HEAD %s answers %d", path, got.status)
		}
	}
	if got := s.call(admin, "POST", "/v1/tenants/mine/retry", ""); got.status != http.StatusAccepted {
		t.Errorf("retry answers %d %s", got.status, got.body)
	}
	if got := s.call(viewer, "POST", "/v1/keys/identify", `{"key":"`+key+`"}`); got.at(t, "tenant_id") != "mine" {
		t.Errorf("identify answers %d %s", got.status, got.body)
	}

	// What is another's is not there, however it is asked for.
	same := func(name string, got, unknown answer) {
		t.Helper()
		x, y := got.decode(t), unknown.decode(t)
		delete(x, "request_id")
		delete(y, "request_id")
		if diff := gocmp.Diff(y, x); diff != "" || got.status != http.StatusNotFound {
			t.Errorf("%s answers %d, and otherwise than what does not exist: %s", name, got.status, diff)
		}
	}
	theirKey := fmt.Sprint(theirs.at(t, "credentials", "key"))
	same("app", s.call(viewer, "GET", fmt.Sprint("/v1/apps/", theirs.at(t, "app", "id")), ""), s.call(viewer, "GET", "/v1/apps/nothing", ""))
	same("key", s.call(viewer, "POST", "/v1/keys/identify", `{"key":"`+theirKey+`"}`), s.call(viewer, "POST", "/v1/keys/identify", `{"key":"x"}`))
	for query, want := range map[string]string{"": "mine", "?label=plan%3Dpro": "mine", "?label=product%3Db": "", "?id_prefix=th": "", "?limit=1": "mine"} {
		list := s.call(viewer, "GET", "/v1/tenants"+query, "")
		var ids []string
		for _, item := range list.at(t, "tenants").([]any) {
			ids = append(ids, fmt.Sprint(item.(map[string]any)["id"]))
		}
		if got := strings.Join(ids, " "); got != want || list.at(t, "next_cursor") != nil {
			t.Errorf("the list%s holds %q, and %v; want %q", query, got, list.at(t, "next_cursor"), want)
		}
	}
	if got := s.call(viewer, "HEAD", "/v1/tenants/theirs", ""); got.status != http.StatusNotFound {
		t.Errorf("HEAD of another's tenant answers %d", got.status)
	}

	// Nor can a tenant be taken out of what the caller is limited to, on the route that
	// changes labels.
	if _, ok := contractDoc(t).Paths.Value("/v1/tenants/{tenant_id}").Operations()[http.MethodPatch]; ok {
		for _, labels := range []string{`null`, `{"product":null}`, `{"product":"b"}`} {
			got := s.call(a, "PATCH", "/v1/tenants/mine", `{"labels":`+labels+`}`, "Content-Type", "application/merge-patch+json")
			if after := s.call(tenant.Viewer, "GET", "/v1/tenants/mine", ""); got.status < 400 || after.at(t, "labels", "product") != "a" {
				t.Errorf("PATCH with the labels %s answers %d %s, and leaves %s", labels, got.status, got.body, after.body)
			}
		}
	}
}

// A caller that is limited in its rate is told how it stands, and refused when it
// sends more; others are not.
func TestRateLimit(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	s := newSiteOn(t, w, w.Start(provisiontest.Options{Idle: true}))
	s.caller("slow", tenant.NewCaller{Role: tenant.Viewer, RateLimit: 1})
	s.caller("fast", tenant.NewCaller{Role: tenant.Viewer, RateLimit: 10000})
	first := s.call("slow", "GET", "/v1/tenants", "")
	if first.status != http.StatusOK || first.header.Get("RateLimit-Policy") != `"caller";q=1;w=1` || first.header.Get("RateLimit") != `"caller";r=0;t=1` {
		t.Errorf("the first request is answered %d %v", first.status, first.header)
	}
	// On a machine that is slow, a second passes between two requests.
	provisiontest.Eventually(t, "a request is refused", func() bool {
		refused := s.call("slow", "PUT", "/v1/tenants/u", "") // counts, also where the role is wrong
		if refused.status == http.StatusForbidden {
			return false
		}
		after, _ := strconv.Atoi(refused.header.Get("Retry-After"))
		if refused.status != http.StatusTooManyRequests || refused.at(t, "code") != "rate_limited" || after != 1 ||
			refused.header.Get("RateLimit") != `"caller";r=0;t=1` || refused.header.Get("RateLimit-Policy") == "" {
			t.Errorf("a request too many is answered %d %v %s", refused.status, refused.header, refused.body)
		}
		return true
	})
	for range 20 {
		if a := s.call("fast", "GET", "/v1/tenants", ""); a.status != http.StatusOK || a.header.Get("RateLimit-Policy") != `"caller";q=10000;w=1` {
			t.Errorf("a request within the limit is answered %d %v", a.status, a.header)
		}
		if a := s.call(tenant.Viewer, "GET", "/v1/tenants", ""); a.status != http.StatusOK || a.header.Get("RateLimit") != "" || a.header.Get("RateLimit-Policy") != "" {
			t.Errorf("a caller without a limit is answered %d %v", a.status, a.header)
		}
	}
	provisiontest.Eventually(t, "it may call again", func() bool { return s.call("slow", "GET", "/v1/tenants", "").status == http.StatusOK })
}

// The limiters count each caller apart, and forget those that are idle.
func TestLimiters(t *testing.T) {
	t.Parallel()
	l := httpapi.NewLimiters()
	now := time.Now()
	take := func(id string, limit int, at time.Time) bool {
		return l.Take(tenant.Caller{TokenID: id, RateLimit: limit}, at) == nil
	}
	for i := range 4 {
		if got := take("a", 3, now); got != (i < 3) {
			t.Errorf("request %d of 3 a second is allowed: %v", i+1, got)
		}
	}
	if !take("b", 3, now) {
		t.Error("one caller's requests count for another")
	}
	if take("a", 3, now.Add(333*time.Millisecond)) || !take("a", 3, now.Add(334*time.Millisecond)) {
		t.Error("a third of a second does not give one request")
	}
	if !take("a", 4, now) {
		t.Error("a limit that was changed is not taken up")
	}
	for i := range 20000 {
		take(strconv.Itoa(i), 1, now.Add(time.Duration(i)*time.Millisecond))
	}
	if n := l.Len(); n > 3000 {
		t.Errorf("%d limiters are kept of callers of which 1000 are active", n)
	}
	if take("19999", 1, now.Add(20*time.Second)) {
		t.Error("a limiter in use was forgotten")
	}
}

// Each operation that takes a token can be answered 429.
func TestContractHasRateLimits(t *testing.T) {
	t.Parallel()
	for path, item := range contractDoc(t).Paths.Map() {
		for method, op := range item.Operations() {
			takesToken := op.Responses.Status(http.StatusUnauthorized) != nil
			if (op.Responses.Status(http.StatusTooManyRequests) != nil) != takesToken {
				t.Errorf("%s %s: it takes a token: %v; the contract must have 429 if so", method, path, takesToken)
			}
		}
	}
}
