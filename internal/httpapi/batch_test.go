package httpapi_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/tenantry/tenantry/internal/httpapi"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// A batchResult is how an item ended, as a test looks at it.
type batchResult struct {
	ID      string
	Status  int
	Created bool
	Tenant  *struct{ State string }
	Problem *struct{ Code, Field, Detail string }
}

func (r batchResult) String() string {
	text := fmt.Sprintf("%s %d", r.ID, r.Status)
	if r.Created {
		text += " created"
	}
	if r.Tenant != nil {
		text += " " + r.Tenant.State
	}
	if r.Problem != nil {
		text += " " + r.Problem.Code + " " + r.Problem.Field
	}
	return text
}

func (s *site) batch(role tenant.Role, body string) []batchResult {
	s.t.Helper()
	a := s.call(role, "POST", "/v1/tenants/batch", body)
	var answer struct{ Results []batchResult }
	if err := json.Unmarshal(a.body, &answer); err != nil || a.status != http.StatusOK {
		s.t.Fatalf("a batch answers %d %s", a.status, a.body)
	}
	return answer.Results
}

func TestBatch(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	s := newSiteOn(t, w, w.Start(provisiontest.Options{Idle: true}))
	const limited = tenant.Role("limited")
	s.caller(limited, tenant.NewCaller{Role: tenant.Provisioner, Scope: tenant.Scope{"product": "a"}})
	items := []struct{ item, want string }{
		{`{"id":"user_1","display_name":"Ada","labels":{"plan":"pro"}}`, "user_1 202 created provisioning"},
		{`{"id":"user_1"}`, "user_1 202 provisioning"},
		{`{"id":"user_1","display_name":"Bob"}`, "user_1 409 attributes_differ tenants[2]"},
		{`{"id":"user 2"}`, " 400 invalid_tenant_id tenants[3].id"},
		{`{"id":""}`, " 400 invalid_tenant_id tenants[4].id"},
		{`{}`, " 400 invalid_request tenants[5].id"},
		{`{"id":7}`, " 400 invalid_request tenants[6].id"},
		{`{"id":null}`, " 400 invalid_request tenants[7].id"},
		{`{"id":"a","id":"b"}`, " 400 invalid_request tenants[8].id"},
		{`"user_3"`, " 400 invalid_request tenants[9]"},
		{`null`, " 400 invalid_request tenants[10]"},
		{`{"id":"user_3","credentials":true}`, " 400 invalid_request tenants[11].credentials"},
		{`{"id":"user_3","ID":"user_4"}`, " 400 invalid_request tenants[12].ID"},
		{`{"id":"user_3","profile":"none"}`, "user_3 400 profile_unknown tenants[13].profile"},
		{`{"id":"user_3","labels":{"-":"x"}}`, "user_3 400 invalid_labels tenants[14].labels"},
		{`{"id":"user_3","labels":{"plan":"` + strings.Repeat("x", 257) + `"}}`, "user_3 400 invalid_labels tenants[15].labels.plan"},
		{`{"id":"user_3","display_name":"\ud800"}`, " 400 invalid_request tenants[16]"},
		{`{"id":"batch","profile":"narrow"}`, "batch 202 created provisioning"},
	}
	var texts []string
	for _, i := range items {
		texts = append(texts, i.item)
	}
	body := `{"tenants":[` + strings.Join(texts, ",") + `]}`
	for _, dry := range []bool{true, false} {
		text := body
		if dry {
			text = strings.TrimSuffix(body, "}") + `,"dry_run":true}`
		}
		for i, got := range s.batch(tenant.Provisioner, text) {
			want := items[i].want
			if dry && i < 3 {
				want = "user_1 202 created"
			}
			if dry {
				want = strings.TrimSuffix(want, " provisioning")
			}
			if got.String() != want {
				t.Errorf("%s (dry run: %v) ends as %q; want %q", items[i].item, dry, got, want)
			}
		}
	}
	if got := s.call(tenant.Viewer, "GET", "/v1/tenants", ""); len(got.at(t, "tenants").([]any)) != 2 {
		t.Errorf("the batch left %s", got.body)
	}
	if got := s.call(tenant.Viewer, "GET", "/v1/upstream", ""); got.at(t, "queue", "importing_tenants") != 2.0 || got.at(t, "queue", "waiting_tenants") != 0.0 {
		t.Errorf("GET /v1/upstream answers %s", got.body)
	}

	// Of a limited caller all are within its limits.
	for i, want := range []string{"user_1 404 tenant_not_found tenants[0]", "mine 202 created provisioning", "other 403 label_forbidden tenants[2].labels.product"} {
		if got := s.batch(limited, `{"tenants":[{"id":"user_1"},{"id":"mine"},{"id":"other","labels":{"product":"b"}}]}`)[i]; strings.Replace(got.String(), "mine 202 prov", "mine 202 created prov", 1) != want {
			t.Errorf("item %d of a limited caller ends as %q; want %q", i, got, want)
		}
	}
	if got := s.call(limited, "GET", "/v1/tenants/mine", ""); got.at(t, "labels", "product") != "a" {
		t.Errorf("a limited caller's tenant is %s", got.body)
	}

	s.call(tenant.Provisioner, "DELETE", "/v1/tenants/user_1", "")
	if got := s.batch(tenant.Provisioner, `{"tenants":[{"id":"user_1"}],"on_deleted":"refuse"}`)[0]; got.String() != "user_1 409 tenant_deleting tenants[0]" {
		t.Errorf("who was deleted ends as %q", got)
	}
	if got := s.batch(tenant.Provisioner, `{"tenants":[{"id":"user_1"}]}`)[0]; got.String() != "user_1 202 created provisioning" {
		t.Errorf("who was deleted begins again as %q", got)
	}

	// The path is no tenant's: one of that name is reached as any other.
	if got := s.call(tenant.Viewer, "GET", "/v1/tenants/batch", ""); got.status != http.StatusOK || got.at(t, "profile") != "narrow" {
		t.Errorf("the tenant named batch is answered %d %s", got.status, got.body)
	}
	if got := s.call(tenant.Provisioner, "PUT", "/v1/tenants/batch", `{"profile":"narrow"}`, "Prefer", "respond-async"); got.status != http.StatusAccepted {
		t.Errorf("PUT of the tenant named batch answers %d %s", got.status, got.body)
	}
}

func TestBatchesThatAreNone(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	s := newSiteOn(t, w, w.Start(provisiontest.Options{Idle: true}))
	list := func(n int) string {
		return `{"tenants":[` + strings.TrimSuffix(strings.Repeat(`{"id":"u"},`, n), ",") + `]}`
	}
	for body, want := range map[string]string{
		"":                                  "body",
		`[{"id":"u"}]`:                      "body",
		`null`:                              "body",
		`{"tenants":[{"id":"u"}`:            "body",
		`{}`:                                "tenants",
		`{"tenants":null}`:                  "tenants",
		`{"tenants":{"id":"u"}}`:            "tenants",
		`{"tenants":[]}`:                    "tenants",
		`{"tenants":[{"id":"u"}],"dry":1}`:  "dry",
		`{"tenants":[],"tenants":[]}`:       "body",
		`{"tenants":[{}],"dry_run":"true"}`: "dry_run",
		`{"tenants":[{}],"dry_run":null}`:   "dry_run",
		`{"tenants":[{}],"on_deleted":"x"}`: "on_deleted",
		list(httpapi.MaxBatch + 1):          "tenants",
	} {
		got := s.call(tenant.Provisioner, "POST", "/v1/tenants/batch", body)
		if got.status != http.StatusBadRequest || got.at(t, "field") != want {
			t.Errorf("%.60s answers %d %s; want 400 for %s", body, got.status, got.body, want)
		}
	}
	if got := s.call(tenant.Provisioner, "POST", "/v1/tenants/batch", `{"tenants":[{"id":"`+strings.Repeat("x", httpapi.MaxBatchBytes)+`"}]}`); got.status != http.StatusRequestEntityTooLarge {
		t.Errorf("a batch that is too large answers %d %s", got.status, got.body)
	}
	for _, role := range []tenant.Role{tenant.Viewer, tenant.Admin} {
		if got := s.call(role, "POST", "/v1/tenants/batch", list(1)); got.status != http.StatusForbidden {
			t.Errorf("a batch of the role %s answers %d", role, got.status)
		}
	}
	if got := s.batch(tenant.Provisioner, list(httpapi.MaxBatch)); len(got) != httpapi.MaxBatch || !got[0].Created || got[999].Created {
		t.Errorf("the largest batch has %d results", len(got))
	}
	// Of ids as long as they may be.
	var ids []string
	for i := range httpapi.MaxBatch {
		ids = append(ids, fmt.Sprintf(`{"id":"%s%04d","display_name":"%s"}`, strings.Repeat("ü", 124), i, strings.Repeat("ü", 256)))
	}
	for i, got := range s.batch(tenant.Provisioner, `{"tenants":[`+strings.Join(ids, ",")+`]}`) {
		if !got.Created {
			t.Fatalf("item %d ends as %q", i, got)
		}
	}
}
