package httpapi_test

import (
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// campaign waits until the campaign that an answer began has ended.
func (s *site) campaign(began answer) answer {
	s.t.Helper()
	if began.status != http.StatusAccepted || began.header.Get("Retry-After") == "" {
		s.t.Fatalf("the campaign is begun with %d: %s", began.status, began.body)
	}
	var is answer
	provisiontest.Eventually(s.t, "the campaign has ended", func() bool {
		is = s.call(tenant.Viewer, "GET", began.header.Get("Location"), "")
		return is.at(s.t, "ended_at") != nil
	})
	return is
}

func TestRotations(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	for i := range 3 {
		s.call(tenant.Provisioner, "PUT", fmt.Sprint("/v1/tenants/user_", i), fmt.Sprintf(`{"labels":{"n":"%d"}}`, i), "Prefer", "wait=30")
	}
	for body, want := range map[string]float64{
		`{"all":true,"dry_run":true}`:                                     3,
		`{"labels":{"n":"1"},"dry_run":true}`:                             1,
		`{"key_name":"default","profile":"default","dry_run":true}`:       3,
		`{"older_than":"90d","overlap":0,"dry_run":true}`:                 0,
		`{"older_than":3600,"labels":{"n":"1","m":"2"},"dry_run":true}`:   0,
		`{"profile":"narrow","key_name":"x","all":false,"dry_run":true} `: 0,
	} {
		if got := s.call(tenant.Admin, "POST", "/v1/rotations", body); got.status != http.StatusOK || got.at(t, "keys") != want {
			t.Errorf("POST %s answers %d %s; want %v keys", body, got.status, got.body, want)
		}
	}
	if got := s.call(tenant.Viewer, "GET", "/v1/campaigns", ""); len(got.at(t, "campaigns").([]any)) != 0 {
		t.Errorf("dry runs have begun %s", got.body)
	}
	began := s.call(tenant.Admin, "POST", "/v1/rotations", `{"labels":{"n":"2"},"overlap":"2h"}`)
	if began.at(t, "kind") != "rotate" || began.at(t, "filter", "labels", "n") != "2" || began.at(t, "overlap_seconds") != 7200.0 {
		t.Errorf("the campaign begins as %s", began.body)
	}
	done := s.campaign(began)
	if done.at(t, "state") != "done" || done.at(t, "counts", "total") != 1.0 || done.at(t, "counts", "done") != 1.0 || done.at(t, "items") != nil {
		t.Errorf("the campaign ends as %s", done.body)
	}
	// The overlap of user_2 goes on.
	done = s.campaign(s.call(tenant.Admin, "POST", "/v1/rotations", `{"all":true}`))
	if done.at(t, "overlap_seconds") != 86400.0 || done.at(t, "counts", "skipped") != 1.0 || done.at(t, "counts", "done") != 2.0 {
		t.Errorf("the second campaign ends as %s", done.body)
	}
	item := done.at(t, "items").([]any)[0].(map[string]any)
	if item["tenant_id"] != "user_2" || item["key_name"] != "default" || item["state"] != "skipped" || item["problem"].(map[string]any)["code"] != "rotation_under_way" {
		t.Errorf("the item is %v", item)
	}
	// All are in their overlaps.
	done = s.campaign(s.call(tenant.Admin, "POST", "/v1/rotations", `{"key_name":"default"}`))
	path := fmt.Sprint("/v1/campaigns/", done.at(t, "id"))
	first := s.call(tenant.Viewer, "GET", path+"?limit=2", "")
	rest := s.call(tenant.Viewer, "GET", fmt.Sprint(path, "?limit=2&cursor=", first.at(t, "next_cursor")), "")
	if len(first.at(t, "items").([]any)) != 2 || len(rest.at(t, "items").([]any)) != 1 || rest.at(t, "next_cursor") != nil {
		t.Errorf("pages of 2 items are %s and %s", first.body, rest.body)
	}
	list := s.call(tenant.Viewer, "GET", "/v1/campaigns?limit=2", "")
	last := s.call(tenant.Viewer, "GET", fmt.Sprint("/v1/campaigns?cursor=", list.at(t, "next_cursor")), "")
	if c := list.at(t, "campaigns").([]any); len(c) != 2 || c[0].(map[string]any)["id"] != done.at(t, "id") {
		t.Errorf("the newest two are %s", list.body)
	}
	if c := last.at(t, "campaigns").([]any); len(c) != 1 || c[0].(map[string]any)["id"] != began.at(t, "id") || last.at(t, "next_cursor") != nil {
		t.Errorf("the last page is %s", last.body)
	}
	if got := s.call(tenant.Admin, "POST", path+"/pause", ""); got.status != http.StatusConflict || got.at(t, "code") != "campaign_state_forbids" {
		t.Errorf("to pause a campaign that is done answers %d %s", got.status, got.body)
	}
}

func TestCampaignsRefused(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	s := newSiteOn(t, w, w.Start(provisiontest.Options{Idle: true}))
	for body, field := range map[string]string{
		``:                                     "all",
		`{}`:                                   "all",
		`{"all":false}`:                        "all",
		`{"all":true,"profile":"default"}`:     "all",
		`{"profile":"none"}`:                   "profile",
		`{"profile":""}`:                       "profile",
		`{"profile":"","key_name":"default"}`:  "profile",
		`{"profile":"default","key_name":""}`:  "key_name",
		`{"profile":"default","labels":{}}`:    "labels",
		`{"labels":{"":"x"}}`:                  "labels",
		`{"labels":{"x":"\u0000"}}`:            "labels",
		`{"key_name":"No name"}`:               "key_name",
		`{"older_than":"0s"}`:                  "older_than",
		`{"older_than":"-1h"}`:                 "older_than",
		`{"older_than":"long"}`:                "older_than",
		`{"all":true,"overlap":"31d"}`:         "overlap",
		`{"all":true,"overlap":"-1s"}`:         "overlap",
		`{"all":true,"overlap":true}`:          "overlap",
		`{"all":true,"id":"x"}`:                "id",
		`{"all":true,"dry_run":true,"x":true}`: "x",
	} {
		got := s.call(tenant.Admin, "POST", "/v1/rotations", body)
		if at := fmt.Sprint(got.at(t, "field")); got.status != http.StatusBadRequest || at != field && at != "labels.x" {
			t.Errorf("POST %s answers %d %s; want a fault of %s", body, got.status, got.body, field)
		}
	}
	const none = "/v1/campaigns/00000000-0000-0000-0000-000000000001"
	for _, tt := range []struct {
		method, path string
		status       int
	}{
		{"POST", "/v1/profiles/none/applications", http.StatusNotFound},
		{"GET", "/v1/profiles/none/changes", http.StatusNotFound},
		{"GET", "/v1/profiles/default/changes?cursor=%20", http.StatusBadRequest},
		{"GET", "/v1/profiles/default/changes?limit=0", http.StatusBadRequest},
		{"GET", "/v1/campaigns?cursor=x", http.StatusBadRequest},
		{"GET", none, http.StatusNotFound},
		{"GET", "/v1/campaigns/x", http.StatusNotFound},
		{"GET", none + "?cursor=x", http.StatusBadRequest},
		{"POST", none + "/pause", http.StatusNotFound},
		{"POST", none + "/resume", http.StatusNotFound},
		{"POST", none + "/stop", http.StatusNotFound},
	} {
		if got := s.call(tenant.Admin, tt.method, tt.path, ""); got.status != tt.status {
			t.Errorf("%s %s answers %d %s; want %d", tt.method, tt.path, got.status, got.body, tt.status)
		}
	}
	began := s.call(tenant.Admin, "POST", "/v1/rotations", `{"all":true}`)
	if got := s.call(tenant.Admin, "POST", "/v1/rotations", `{"all":true,"overlap":0}`); got.status != http.StatusConflict || got.at(t, "code") != "campaign_open" {
		t.Errorf("a second campaign answers %d %s", got.status, got.body)
	}
	path := fmt.Sprint("/v1/campaigns/", began.at(t, "id"))
	for _, tt := range []struct{ change, state string }{{"pause", "paused"}, {"pause", "paused"}, {"resume", "running"}, {"stop", "stopped"}, {"stop", "stopped"}} {
		if got := s.call(tenant.Admin, "POST", path+"/"+tt.change, ""); got.status != http.StatusOK || got.at(t, "state") != tt.state {
			t.Errorf("%s answers %d %s", tt.change, got.status, got.body)
		}
	}
	if got := s.call(tenant.Admin, "POST", path+"/resume", ""); got.status != http.StatusConflict {
		t.Errorf("to resume a stopped campaign answers %d %s", got.status, got.body)
	}
}

func TestApplyProfileOverHTTP(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	was := tenant.Profile{Name: tenant.DefaultProfile, BaseWorkflow: "Empty", KeyScopes: []string{"All"}}
	r := w.Start(provisiontest.Options{Adjust: func(c *provision.Config) { c.Profiles = []tenant.Profile{was} }})
	s := newSiteOn(t, w, r)
	for i := range 2 {
		s.call(tenant.Provisioner, "PUT", fmt.Sprint("/v1/tenants/user_", i), "", "Prefer", "wait=30")
	}
	s.call(tenant.Provisioner, "POST", "/v1/tenants/user_1/suspend", "", "Prefer", "wait=30")
	r.Stop()
	next := was
	next.KeyScopes, next.BaseWorkflow, next.MaxKeyAge = []string{"Predict"}, "General", time.Hour
	r = w.Start(provisiontest.Options{Adjust: func(c *provision.Config) { c.Profiles = []tenant.Profile{next} }})
	s = newSiteOn(t, w, r)
	page := s.call(tenant.Viewer, "GET", "/v1/profiles/default/changes?limit=1", "")
	one := page.at(t, "tenants").([]any)[0].(map[string]any)
	if want := "[map[from:Empty to:General what:base_workflow] map[from:All key_name:default to:Predict what:key_scopes]]"; one["tenant_id"] != "user_0" ||
		one["skipped"] != nil || fmt.Sprint(one["changes"]) != want {
		t.Errorf("the dry run lists %s", page.body)
	}
	page = s.call(tenant.Admin, "GET", fmt.Sprint("/v1/profiles/default/changes?cursor=", page.at(t, "next_cursor")), "")
	if two := page.at(t, "tenants").([]any)[0].(map[string]any); two["tenant_id"] != "user_1" || two["skipped"] != "the tenant is suspended" || page.at(t, "next_cursor") != nil {
		t.Errorf("the second page lists %s", page.body)
	}
	done := s.campaign(s.call(tenant.Admin, "POST", "/v1/profiles/default/applications", ""))
	if done.at(t, "kind") != "conform" || done.at(t, "revision") != next.Revision() || done.at(t, "counts", "done") != 1.0 || done.at(t, "counts", "skipped") != 1.0 ||
		done.at(t, "overlap_seconds") != nil {
		t.Errorf("the campaign ends as %s", done.body)
	}
	if keys := s.call(tenant.Viewer, "GET", "/v1/tenants/user_0/keys", ""); fmt.Sprint(keys.at(t, "keys").([]any)[0].(map[string]any)["scopes"]) != "[Predict]" {
		t.Errorf("the keys are %s", keys.body)
	}
}
