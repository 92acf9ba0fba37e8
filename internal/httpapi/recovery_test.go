package httpapi_test

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// setRecovery puts the database of a site into a state of recovery mode.
func (s *site) setRecovery(state tenant.RecoveryState) {
	s.t.Helper()
	if _, err := pgtest.Conn(s.t, s.world.URL).Exec(s.t.Context(), provisiontest.SetRecovery(state)); err != nil {
		s.t.Fatal(err)
	}
}

// begins begins recovery mode, and waits until it is known that no other database is in use.
func (s *site) begins(reason string) {
	s.t.Helper()
	if a := s.call(tenant.Admin, "POST", "/v1/recovery/begin", fmt.Sprintf(`{"reason":%q}`, reason)); a.status != http.StatusOK || a.at(s.t, "state") != "watching" ||
		a.at(s.t, "reason") != "begun by hand: "+reason || a.at(s.t, "lost") != reason {
		s.t.Fatalf("begin returns %d %s", a.status, a.body)
	}
	provisiontest.Eventually(s.t, "the watch ends", func() bool {
		return s.call(tenant.Viewer, "GET", "/v1/recovery", "").at(s.t, "state") == "recovering"
	})
}

// reported waits for the report of a recovery, and returns its findings.
func (s *site) reported(query string) []map[string]any {
	s.t.Helper()
	provisiontest.Eventually(s.t, "the report of the recovery is done", func() bool {
		r := s.call(tenant.Viewer, "GET", "/v1/recovery", "")
		if r.at(s.t, "report_id") == nil {
			return false
		}
		return s.call(tenant.Admin, "GET", fmt.Sprint("/v1/reconciliations/", r.at(s.t, "report_id")), "").at(s.t, "state") == "done"
	})
	return objects(s.call(tenant.Admin, "GET", "/v1/recovery/findings"+query, "").at(s.t, "findings"))
}

func objects(list any) []map[string]any {
	var found []map[string]any
	for _, one := range list.([]any) {
		found = append(found, one.(map[string]any))
	}
	return found
}

// control keeps the control record, without which recovery mode does not end.
var control = provisiontest.Options{Control: true}

// Each state of recovery mode is shown, and has its effect on requests.
func TestRecoveryStates(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.call(tenant.Provisioner, "PUT", "/v1/tenants/user_1", "", "Prefer", "wait=30")
	// With this tenant undecided, no report ends recovery mode by itself.
	gone := s.call(tenant.Provisioner, "PUT", "/v1/tenants/gone", "", "Prefer", "wait=30")
	removeByHand(t, s.world, fmt.Sprint("/apps/", gone.at(t, "app", "id")))
	normal := s.call(tenant.Viewer, "GET", "/v1/recovery", "")
	if normal.at(t, "state") != "none" || normal.at(t, "since") != nil || normal.at(t, "ends_when") != nil || normal.at(t, "undecided_findings") != 0.0 ||
		normal.at(t, "retired_apps", "count") != 0.0 || normal.at(t, "control_app") != "t-c"+s.replica.Deployment.ID || normal.at(t, "deployment") != s.replica.Deployment.ID {
		t.Errorf("outside recovery mode the recovery is %s", normal.body)
	}
	if a := s.call(tenant.Viewer, "GET", "/v1/upstream", ""); a.at(t, "recovery") != nil {
		t.Errorf("outside recovery mode upstream is %s", a.body)
	}
	if a := s.call(tenant.Admin, "POST", "/v1/recovery/end", ""); a.status != http.StatusOK || a.at(t, "state") != "none" {
		t.Errorf("outside recovery mode, end returns %d %s", a.status, a.body)
	}

	confirmed := fmt.Sprintf(`{"confirm":%q}`, s.replica.Deployment.ID)
	for _, c := range []struct {
		state        tenant.RecoveryState
		endsWhen     string
		end, signUp  int
		endCode      string
		takeOver     int
		takeOverCode string
	}{
		{tenant.Watching, "watch_until", 409, 201, "recovery_watching", 200, ""},
		{tenant.Recovering, "an admin ends it", 200, 201, "", 409, "not_stopped"},
		{tenant.Stopped, "takes over", 409, 503, "another_database", 200, ""},
	} {
		s.setRecovery(c.state)
		is := s.call(tenant.Viewer, "GET", "/v1/recovery", "")
		if is.at(t, "state") != string(c.state) || is.at(t, "reason") != "a test" || is.at(t, "since") == nil || !strings.Contains(fmt.Sprint(is.at(t, "ends_when")), c.endsWhen) {
			t.Errorf("%s: the recovery is %s", c.state, is.body)
		}
		if a := s.call(tenant.Viewer, "GET", "/v1/upstream", ""); a.at(t, "recovery", "state") != string(c.state) || a.at(t, "recovery", "reason") != "a test" {
			t.Errorf("%s: upstream is %s", c.state, a.body)
		}
		for _, path := range []string{"/v1/tenants/nobody", "/v1/tenants/nobody/keys", "/v1/tenants/nobody?wait=0", "/v1/apps/t-unknown"} {
			if a := s.call(tenant.Viewer, "GET", path, ""); a.status != http.StatusConflict || a.at(t, "code") != "recovery_unknown" {
				t.Errorf("%s: GET %s returns %d %s", c.state, path, a.status, a.body)
			}
		}
		if a := s.call(tenant.Viewer, "GET", "/v1/tenants/user_1", ""); a.status != http.StatusOK {
			t.Errorf("%s: a lookup returns %d %s", c.state, a.status, a.body)
		}
		if a := s.call(tenant.Provisioner, "PUT", "/v1/tenants/"+string(c.state), "", "Prefer", "wait=30"); a.status != c.signUp {
			t.Errorf("%s: a sign-up returns %d %s; want %d", c.state, a.status, a.body, c.signUp)
		}
		repair := "recovery"
		if c.state == tenant.Stopped {
			repair = "another_database"
		}
		if a := s.call(tenant.Admin, "POST", "/v1/reconciliations", `{"repair":"rec_1"}`); a.at(t, "code") != repair {
			t.Errorf("%s: a repair returns %d %s", c.state, a.status, a.body)
		}
		for _, wrong := range []string{``, `{"confirm":""}`, `{"confirm":"yes"}`} {
			if a := s.call(tenant.Admin, "POST", "/v1/recovery/take-over", wrong); a.status != http.StatusBadRequest || a.at(t, "code") != "invalid_confirm" {
				t.Errorf("%s: take-over %s returns %d %s", c.state, wrong, a.status, a.body)
			}
		}
		if a := s.call(tenant.Admin, "POST", "/v1/recovery/end", confirmed); a.status != c.end || c.endCode != "" && a.at(t, "code") != c.endCode {
			t.Errorf("%s: end returns %d %s; want %d %s", c.state, a.status, a.body, c.end, c.endCode)
		}
		a := s.call(tenant.Admin, "POST", "/v1/recovery/take-over", confirmed)
		if a.status != c.takeOver || a.status == http.StatusOK && a.at(t, "state") != "recovering" || c.takeOverCode != "" && a.at(t, "code") != c.takeOverCode {
			t.Errorf("%s: take-over returns %d %s; want %d %s", c.state, a.status, a.body, c.takeOver, c.takeOverCode)
		}
		s.setRecovery(tenant.NotRecovering)
	}
}

// Before it is known what was lost and decided, recovery mode ends only with the typed id of the
// deployment.
func TestEndRecovery(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	s := newSiteOn(t, w, w.Start(provisiontest.Options{Idle: true}))
	conn := pgtest.Conn(t, w.URL)
	const report = `INSERT INTO reconciliations (id, kind, phase, requested_by, state, created_at, finished_at) SELECT gen_random_uuid(), 'report', `
	for _, c := range []struct {
		what, setup, says string
		done              bool
		undecided         float64
	}{
		{"without a report", ``, "no report", false, 0},
		{"with a report of the time before", report + `'end', 'x', 'done', recovery_since - interval '1 hour', now() FROM current_incarnation`, "no report", false, 0},
		{"while a report is running", report + `'apps', 'x', 'running', now(), NULL`, "no report", false, 0},
		{"with an undecided finding", report + `'end', 'x', 'done', now(), now();
			INSERT INTO reconciliation_items (reconciliation_id, kind, action, app_id, detail, state)
			SELECT id, 'app_gone', 'decide', 'x', '', 'open' FROM reconciliations ORDER BY created_at DESC LIMIT 1`, "wait for a decision: 1", true, 1},
		{"with a report without findings", report + `'end', 'x', 'done', now(), now()`, "", true, 0},
	} {
		if _, err := conn.Exec(t.Context(), `TRUNCATE reconciliations CASCADE; `+provisiontest.SetRecovery(tenant.Recovering)+c.setup); err != nil {
			t.Fatal(err)
		}
		is := s.call(tenant.Viewer, "GET", "/v1/recovery", "")
		if is.at(t, "state") != "recovering" || is.at(t, "report_done") != c.done || is.at(t, "undecided_findings") != c.undecided {
			t.Errorf("%s: the recovery is %s", c.what, is.body)
		}
		body := ""
		if c.says != "" {
			body = fmt.Sprintf(`{"confirm":%q}`, s.replica.Deployment.ID)
			for _, wrong := range []string{``, `{"confirm":""}`, `{"confirm":"yes"}`} {
				a := s.call(tenant.Admin, "POST", "/v1/recovery/end", wrong)
				if detail := fmt.Sprint(a.at(t, "detail")); a.status != http.StatusBadRequest || a.at(t, "code") != "invalid_confirm" || a.at(t, "field") != "confirm" ||
					!strings.Contains(detail, c.says) || !strings.Contains(detail, s.replica.Deployment.ID) {
					t.Errorf("%s: end %s returns %d %s", c.what, wrong, a.status, a.body)
				}
			}
		}
		if a := s.call(tenant.Admin, "POST", "/v1/recovery/end", body); a.status != http.StatusOK || a.at(t, "state") != "none" {
			t.Errorf("%s: end %s returns %d %s", c.what, body, a.status, a.body)
		}
	}
}

// If a key is gone and its app is from before a loss, a person decides.
func TestRecoveryDecisions(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	s := newSiteOn(t, w, w.Start(control))
	for i := range 3 {
		s.call(tenant.Provisioner, "PUT", fmt.Sprint("/v1/tenants/user_", i), "", "Prefer", "wait=30")
	}
	for _, k := range w.AppKeys() {
		removeByHand(t, w, "/keys/"+k.ID)
	}
	s.begins("the machine was reverted")
	found := s.reported("")
	if len(found) != 3 {
		t.Fatalf("the findings are %v; want 3", found)
	}
	if n := s.call(tenant.Viewer, "GET", "/v1/recovery", "").at(t, "undecided_findings"); n != 3.0 {
		t.Errorf("%v findings wait for a decision; want 3", n)
	}
	first := found[0]
	if first["kind"] != "key_gone" || first["action"] != "decide" || first["state"] != "open" || fmt.Sprint(first["app_id"]) < fmt.Sprint(found[2]["app_id"]) {
		t.Errorf("the findings are %v; want the newest app first", found)
	}
	confirms := map[any]any{}
	for _, c := range objects(first["choices"]) {
		confirms[c["choice"]] = c["confirm"]
	}
	if len(confirms) != 3 || confirms["new-key"] != first["tenant_id"] || confirms["suspend"] != nil || confirms["keep"] != nil {
		t.Errorf("the choices need to be confirmed with %v", confirms)
	}
	page := s.call(tenant.Admin, "GET", "/v1/recovery/findings?limit=2&kind=key_gone", "")
	rest := s.call(tenant.Admin, "GET", "/v1/recovery/findings?kind=key_gone&cursor="+strings.ReplaceAll(fmt.Sprint(page.at(t, "next_cursor")), " ", "%20"), "")
	if n, m := len(objects(page.at(t, "findings"))), len(objects(rest.at(t, "findings"))); n != 2 || m != 1 || rest.at(t, "next_cursor") != nil {
		t.Errorf("pages of 2 have %d and %d findings", n, m)
	}
	if a := s.call(tenant.Admin, "GET", "/v1/recovery/findings?kind=app_gone", ""); len(objects(a.at(t, "findings"))) != 0 {
		t.Errorf("there are findings of another kind: %s", a.body)
	}

	decide := func(body string, args ...any) answer {
		t.Helper()
		return s.call(tenant.Admin, "POST", "/v1/recovery/decisions", fmt.Sprintf(body, args...))
	}
	for _, c := range []struct {
		body   string
		status int
		code   string
	}{
		{`{"finding":%d,"choice":"adopt"}`, 400, "invalid_choice"},
		{`{"finding":%d,"choice":"new-key"}`, 400, "invalid_confirm"},
		{`{"finding":%d,"choice":"new-key","confirm":"yes"}`, 400, "invalid_confirm"},
		{`{"finding":%d,"kind":"key_gone","choice":"keep"}`, 400, "invalid_request"},
		{`{"finding":-%d,"choice":"keep"}`, 400, "invalid_request"},
		{`{"finding":%d1000,"choice":"keep"}`, 404, "finding_not_found"},
		{`{"kind":"key_gone","choice":"new-key","confirm":"x%d"}`, 400, "invalid_finding"},
		{`{"kind":"in_doubt","choice":"keep","confirm":"x%d"}`, 400, "invalid_choice"},
		{`{"kind":"x%d","choice":"keep"}`, 400, "invalid_request"},
	} {
		if a := decide(c.body, int(first["number"].(float64))); a.status != c.status || a.at(t, "code") != c.code {
			t.Errorf("%s returns %d %s; want %d %s", c.body, a.status, a.body, c.status, c.code)
		}
	}
	a := decide(`{"finding":%.0f,"choice":"new-key","confirm":%q}`, first["number"], first["tenant_id"])
	path := a.header.Get("Location")
	if a.status != http.StatusAccepted || a.at(t, "decided") != 1.0 || path != fmt.Sprintf("/v1/recovery/findings/%.0f", first["number"]) || a.header.Get("Retry-After") == "" {
		t.Fatalf("a decision returns %d %v %s", a.status, a.header, a.body)
	}
	provisiontest.Eventually(t, "the decision is carried out", func() bool {
		one := s.call(tenant.Admin, "GET", path, "")
		return one.at(t, "state") == "done" && one.at(t, "action") == "new-key"
	})
	provisiontest.Eventually(t, "the tenant has a key", func() bool {
		return s.call(tenant.Provisioner, "GET", fmt.Sprintf("/v1/tenants/%s/keys/default/secret", first["tenant_id"]), "").status == http.StatusOK
	})
	if a := decide(`{"finding":%.0f,"choice":"keep"}`, first["number"]); a.status != http.StatusConflict || a.at(t, "code") != "finding_decided" {
		t.Errorf("the same finding again returns %d %s", a.status, a.body)
	}
	if a := decide(`{"kind":"key_gone","choice":"suspend"}`); a.status != http.StatusAccepted || a.at(t, "decided") != 2.0 || a.header.Get("Location") != "/v1/recovery/findings?kind=key_gone" {
		t.Errorf("a decision of a kind returns %d %s", a.status, a.body)
	}
	provisiontest.Eventually(t, "two tenants are suspended, and recovery mode ends by itself", func() bool {
		suspended := objects(s.call(tenant.Viewer, "GET", "/v1/tenants?state=suspended", "").at(t, "tenants"))
		return len(suspended) == 2 && s.call(tenant.Viewer, "GET", "/v1/recovery", "").at(t, "state") == "none"
	})
}

// The pool of an earlier incarnation is retired: listed, counted, and removed only by a typed
// id or number.
func TestRetiredApps(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	o := control
	o.Adjust = func(c *provision.Config) { c.Profiles[0].PoolMin, c.Profiles[0].PoolMax = 3, 3 }
	s := newSiteOn(t, w, w.Start(o))
	ready := func() bool {
		return objects(s.call(tenant.Viewer, "GET", "/v1/pool", "").at(t, "pools"))[0]["ready"] == 3.0
	}
	provisiontest.Eventually(t, "the pool is full", ready)
	held := s.call(tenant.Provisioner, "PUT", "/v1/tenants/user_1", "", "Prefer", "wait=30").at(t, "app", "id")
	provisiontest.Eventually(t, "the pool is full again", ready)
	s.begins("a test")
	provisiontest.Eventually(t, "the next pool is full", ready)
	if pool := objects(s.call(tenant.Viewer, "GET", "/v1/pool", "").at(t, "pools"))[0]; pool["retired"] != 3.0 {
		t.Errorf("the pool is %v; want 3 retired apps", pool)
	}
	page := s.call(tenant.Admin, "GET", "/v1/recovery/apps?limit=2", "")
	apps := objects(page.at(t, "apps"))
	rest := s.call(tenant.Admin, "GET", "/v1/recovery/apps?cursor="+strings.ReplaceAll(fmt.Sprint(page.at(t, "next_cursor")), " ", "%20"), "")
	apps = append(apps, objects(rest.at(t, "apps"))...)
	if len(apps) != 3 || apps[0]["has_key"] != true || apps[0]["profile"] != "default" || fmt.Sprint(apps[0]["created_at"]) < fmt.Sprint(apps[2]["created_at"]) {
		t.Fatalf("the retired apps are %v", apps)
	}
	if a := s.call(tenant.Viewer, "GET", "/v1/recovery", ""); a.at(t, "retired_apps", "count") != 3.0 || a.at(t, "retired_apps", "oldest") == nil {
		t.Errorf("the recovery is %s", a.body)
	}
	if a := s.call(tenant.Viewer, "POST", "/v1/keys/identify", fmt.Sprintf(`{"app_id":%q}`, apps[0]["id"])); a.at(t, "app_state") != "retired" {
		t.Errorf("a retired app is identified as %s", a.body)
	}

	remove := func(body string, args ...any) answer {
		t.Helper()
		return s.call(tenant.Admin, "POST", "/v1/recovery/removals", fmt.Sprintf(body, args...))
	}
	const tomorrow = "2100-01-01T00:00:00Z"
	for _, c := range []struct {
		body   string
		status int
		code   string
	}{
		{``, 400, "invalid_request"},
		{`{"app_id":"x","before":"` + tomorrow + `"}`, 400, "invalid_request"},
		{`{"before":"yesterday"}`, 400, "invalid_request"},
		{fmt.Sprintf(`{"app_id":%q}`, apps[0]["id"]), 400, "invalid_confirm"},
		{fmt.Sprintf(`{"app_id":%q,"confirm":"1"}`, apps[0]["id"]), 400, "invalid_confirm"},
		{`{"app_id":"t-unknown","confirm":"t-unknown"}`, 404, "app_not_retired"},
		{fmt.Sprintf(`{"app_id":%q,"confirm":%[1]q}`, held), 409, "app_not_retired"},
		{`{"before":"` + tomorrow + `","confirm":"yes"}`, 400, "invalid_confirm"},
		{`{"before":"` + tomorrow + `","confirm":"2"}`, 409, "count_differs"},
	} {
		if a := remove("%s", c.body); a.status != c.status || a.at(t, "code") != c.code {
			t.Errorf("%s returns %d %s; want %d %s", c.body, a.status, a.body, c.status, c.code)
		}
	}
	retired := func() any { return s.call(tenant.Viewer, "GET", "/v1/recovery", "").at(t, "retired_apps", "count") }
	if a := remove(`{"before":%q}`, tomorrow); a.status != http.StatusOK || a.at(t, "count") != 3.0 || a.at(t, "removing") != false ||
		a.at(t, "oldest") != apps[2]["created_at"] || a.at(t, "newest") != apps[0]["created_at"] || retired() != 3.0 {
		t.Errorf("a removal without its number returns %d %s", a.status, a.body)
	}
	if a := remove(`{"before":%q}`, apps[2]["created_at"]); a.at(t, "count") != 0.0 || a.at(t, "oldest") != nil {
		t.Errorf("before the oldest there are %s", a.body)
	}
	if a := remove(`{"app_id":%q,"confirm":%q}`, apps[0]["id"], apps[0]["id"]); a.status != http.StatusAccepted || a.at(t, "count") != 1.0 || a.at(t, "removing") != true {
		t.Errorf("a removal by id returns %d %s", a.status, a.body)
	}
	if a := remove(`{"before":%q,"confirm":"2"}`, tomorrow); a.status != http.StatusAccepted || a.at(t, "count") != 2.0 || a.header.Get("Location") != "/v1/recovery/apps" {
		t.Errorf("a removal by time returns %d %s", a.status, a.body)
	}
	provisiontest.Eventually(t, "the apps are gone", func() bool { return retired() == 0.0 && w.State().Calls["DeleteApp"] == 3 })
}

func TestRecoveryRefused(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	s := newSiteOn(t, w, w.Start(provisiontest.Options{Idle: true}))
	for _, c := range []struct {
		role               tenant.Role
		method, path, body string
		status             int
		code, says         string
	}{
		{tenant.Provisioner, "GET", "/findings", "", 403, "role_forbidden", "admin"},
		{tenant.Viewer, "GET", "/findings/1", "", 403, "role_forbidden", "admin"},
		{tenant.Viewer, "GET", "/apps", "", 403, "role_forbidden", "admin"},
		{tenant.Provisioner, "POST", "/begin", `{"reason":"x"}`, 403, "role_forbidden", "admin"},
		{tenant.Provisioner, "POST", "/end", "", 403, "role_forbidden", "admin"},
		{tenant.Provisioner, "POST", "/take-over", "", 403, "role_forbidden", "admin"},
		{tenant.Provisioner, "POST", "/decisions", "", 403, "role_forbidden", "admin"},
		{tenant.Provisioner, "POST", "/removals", "", 403, "role_forbidden", "admin"},
		{tenant.Admin, "POST", "/begin", "", 400, "invalid_request", "reason"},
		{tenant.Admin, "POST", "/begin", `{"reason":" \n "}`, 400, "invalid_request", "reason"},
		{tenant.Admin, "POST", "/begin", `{"reason":"a\u0000b"}`, 400, "invalid_request", "control characters"},
		{tenant.Admin, "POST", "/begin", `{"reason":"` + strings.Repeat("x", 501) + `"}`, 400, "invalid_request", "500"},
		{tenant.Admin, "POST", "/end", `{"reason":"x"}`, 400, "invalid_request", "reason"},
		{tenant.Admin, "POST", "/decisions", `{"choice":"keep"}`, 400, "invalid_request", "finding"},
		{tenant.Admin, "GET", "/findings?kind=x", "", 400, "invalid_request", "kind"},
		{tenant.Admin, "GET", "/findings?cursor=1", "", 400, "invalid_request", "next_cursor"},
		{tenant.Admin, "GET", "/findings/x", "", 404, "finding_not_found", ""},
		{tenant.Admin, "GET", "/findings/0", "", 404, "finding_not_found", ""},
		{tenant.Admin, "GET", "/findings/7", "", 404, "finding_not_found", ""},
		{tenant.Admin, "GET", "/apps?cursor=x", "", 400, "invalid_request", "next_cursor"},
		{tenant.Admin, "GET", "/apps?limit=0", "", 400, "invalid_request", "from 1 to 1000"},
	} {
		a := s.call(c.role, c.method, "/v1/recovery"+c.path, c.body)
		if text := fmt.Sprint(a.at(t, "field"), " ", a.at(t, "detail")); a.status != c.status || a.at(t, "code") != c.code || !strings.Contains(text, c.says) {
			t.Errorf("%s %s %s returns %d %s; want %d %s that says %q", c.method, c.path, c.body, a.status, a.body, c.status, c.code, c.says)
		}
	}
}

// An admin adopts with the app's id alone, and sees no key; other sign-ups need a provisioner.
func TestAdminAdopts(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.world.AppByHand(provisiontest.PAT, "hand-made", nil)
	a := s.call(tenant.Admin, "PUT", "/v1/tenants/user_1", adoptBody(`"app_id":"hand-made"`), "Prefer", "wait=30")
	if a.status != http.StatusCreated || a.header.Get("Location") != "/v1/tenants/user_1" || a.at(t, "app", "id") != "hand-made" || a.at(t, "credentials") != nil || a.at(t, "adoption", "state") != "done" {
		t.Errorf("an adoption by an admin returns %d %s", a.status, a.body)
	}
	if a := s.call(tenant.Admin, "PUT", "/v1/tenants/user_1", adoptBody(`"app_id":"hand-made"`)); a.status != http.StatusOK || a.at(t, "credentials") != nil {
		t.Errorf("the same again returns %d %s", a.status, a.body)
	}
	for _, body := range []string{"", `{"display_name":"Ada"}`} {
		if a := s.call(tenant.Admin, "PUT", "/v1/tenants/user_2", body); a.status != http.StatusForbidden || a.at(t, "code") != "role_forbidden" {
			t.Errorf("a sign-up by an admin returns %d %s", a.status, a.body)
		}
	}
}
