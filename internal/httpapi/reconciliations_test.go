package httpapi_test

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// reconcile starts a reconciliation and waits until it is done.
func (s *site) reconcile(body string) answer {
	s.t.Helper()
	began := s.call(tenant.Admin, "POST", "/v1/reconciliations", body)
	if began.status != http.StatusAccepted || began.header.Get("Retry-After") == "" {
		s.t.Fatalf("POST %s answers %d: %s", body, began.status, began.body)
	}
	var done answer
	provisiontest.Eventually(s.t, "the reconciliation is done", func() bool {
		done = s.call(tenant.Admin, "GET", began.header.Get("Location"), "")
		return done.at(s.t, "state") == "done"
	})
	return done
}

func TestReconciliations(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	for i := range 3 {
		s.call(tenant.Provisioner, "PUT", fmt.Sprint("/v1/tenants/user_", i), "", "Prefer", "wait=30")
	}
	if a := s.reconcile(""); a.at(t, "kind") != "report" || a.at(t, "items") != nil || a.at(t, "counts", "key_gone") != 0.0 ||
		a.at(t, "counts", "app_foreign") != 0.0 || a.at(t, "progress", "apps_seen") != 3.0 || a.at(t, "token") == nil {
		t.Errorf("a report of agreement is %s", a.body)
	}

	for _, k := range s.world.AppKeys() {
		removeByHand(t, s.world, "/keys/"+k.ID)
	}
	report := s.reconcile(`{}`)
	if report.at(t, "counts", "key_gone") != 3.0 || report.at(t, "outcomes", "open") != 3.0 {
		t.Errorf("a report of keys that are gone is %s", report.body)
	}
	path := fmt.Sprint("/v1/reconciliations/", report.at(t, "id"))
	first := s.call(tenant.Admin, "GET", path+"?limit=2", "")
	rest := s.call(tenant.Admin, "GET", fmt.Sprint(path, "?cursor=", first.at(t, "next_cursor")), "")
	if n, m := len(first.at(t, "items").([]any)), len(rest.at(t, "items").([]any)); n != 2 || m != 1 || rest.at(t, "next_cursor") != nil {
		t.Errorf("pages of 2 have %d and %d items", n, m)
	}

	token := fmt.Sprintf(`{"repair":%q}`, report.at(t, "token"))
	if a := s.reconcile(token); a.at(t, "kind") != "repair" || a.at(t, "report_id") != report.at(t, "id") || a.at(t, "outcomes", "done") != 3.0 {
		t.Errorf("the repair is %s", a.body)
	}
	if a := s.call(tenant.Admin, "POST", "/v1/reconciliations", token); a.status != http.StatusConflict || a.at(t, "code") != "reconciliation_token_stale" {
		t.Errorf("the same repair again answers %d %s", a.status, a.body)
	}
	list := s.call(tenant.Admin, "GET", "/v1/reconciliations?limit=2", "").at(t, "reconciliations").([]any)
	if len(list) != 2 || list[0].(map[string]any)["kind"] != "repair" || list[1].(map[string]any)["id"] != report.at(t, "id") {
		t.Errorf("the newest two are %v", list)
	}
}

// removeByHand removes something from Clarifai behind Tenantry's back.
func removeByHand(t *testing.T, w *provisiontest.World, path string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), "DELETE", w.Clarifai+"/v2/users/"+string(provisiontest.Operator)+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Key "+provisiontest.PAT)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("DELETE %s answers %s", path, resp.Status)
	}
}

func TestReconciliationsRefused(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	s := newSiteOn(t, w, w.Start(provisiontest.Options{Idle: true}))
	running := fmt.Sprint(s.call(tenant.Admin, "POST", "/v1/reconciliations", "").at(t, "id"))
	for _, c := range []struct {
		role               tenant.Role
		method, path, body string
		status             int
		code, says         string
	}{
		{tenant.Provisioner, "POST", "", "", 403, "role_forbidden", "admin"},
		{tenant.Viewer, "GET", "", "", 403, "role_forbidden", "admin"},
		{tenant.Admin, "POST", "", "", 409, "reconciliation_running", running},
		{tenant.Admin, "POST", "", `{"repair":"rec_1"}`, 409, "reconciliation_token_unknown", "no report"},
		{tenant.Admin, "POST", "", `{"repair":""}`, 400, "invalid_request", "1 to 64"},
		{tenant.Admin, "POST", "", `{"repair":"` + strings.Repeat("x", 65) + `"}`, 400, "invalid_request", "has 65"},
		{tenant.Admin, "POST", "", `{"delete":true}`, 400, "invalid_request", "there are: repair"},
		{tenant.Admin, "POST", "?now=1", "", 400, "invalid_request", "there are: none"},
		{tenant.Admin, "GET", "?limit=101", "", 400, "invalid_request", "from 1 to 100"},
		{tenant.Admin, "GET", "/" + running + "?cursor=x", "", 400, "invalid_request", "next_cursor"},
		{tenant.Admin, "GET", "/" + running + "?limit=0", "", 400, "invalid_request", "from 1 to 1000"},
		{tenant.Admin, "GET", "/not-an-id", "", 404, "reconciliation_not_found", ""},
		{tenant.Admin, "GET", "/01890000-0000-7000-8000-000000000000", "", 404, "reconciliation_not_found", ""},
	} {
		a := s.call(c.role, c.method, "/v1/reconciliations"+c.path, c.body)
		if text := fmt.Sprint(a.at(t, "field"), " ", a.at(t, "detail")); a.status != c.status || a.at(t, "code") != c.code || !strings.Contains(text, c.says) {
			t.Errorf("%s %s %s answers %d %s; want %d %s that says %q", c.method, c.path, c.body, a.status, a.body, c.status, c.code, c.says)
		}
	}
	if a := s.call(tenant.Admin, "GET", "/v1/reconciliations/"+running, ""); a.at(t, "state") != "running" || a.at(t, "phase") != "apps" {
		t.Errorf("the one that runs is %s", a.body)
	}
}
