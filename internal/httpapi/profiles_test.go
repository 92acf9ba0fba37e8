package httpapi_test

import (
	"encoding/json"
	"net/http"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

func TestProfiles(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	plain := tenant.Profile{Name: tenant.DefaultProfile, BaseWorkflow: "Empty", KeyScopes: []string{"All"}}
	pro := tenant.Profile{Name: "a-pro", BaseWorkflow: "General", Language: "en", AppDescription: "Acme's", KeyScopes: []string{"Predict"},
		ExtraKeys:     []tenant.KeyTemplate{{Name: "search", Scopes: []string{"Search", "Inputs:Get"}}},
		AllowedScopes: []string{"All"}, ShowTenant: tenant.ShowTenantHash, Retention: time.Hour, MaxKeyAge: 48 * time.Hour, PoolMax: 3}
	r := w.Start(provisiontest.Options{Adjust: func(c *provision.Config) { c.Profiles = []tenant.Profile{plain, pro} }})
	s := newSiteOn(t, w, r)
	if got := s.call(tenant.Provisioner, "PUT", "/v1/tenants/user_1", "", "Prefer", "wait=30"); got.status != http.StatusCreated {
		t.Fatalf("sign-up answers %d %s", got.status, got.body)
	}
	r.Stop()
	other := plain
	other.Language = "de"
	r = w.Start(provisiontest.Options{Idle: true, Adjust: func(c *provision.Config) { c.Profiles = []tenant.Profile{other, pro} }})
	s = newSiteOn(t, w, r)
	s.call(tenant.Provisioner, "PUT", "/v1/tenants/user_2", "", "Prefer", "respond-async")
	got := s.call(tenant.Viewer, "GET", "/v1/profiles", "")
	var body struct {
		Profiles  []map[string]any
		CountedAt time.Time `json:"counted_at"`
	}
	if err := json.Unmarshal(got.body, &body); err != nil || got.status != http.StatusOK || time.Since(body.CountedAt) > time.Minute {
		t.Fatalf("GET /v1/profiles answers %d %s, %v", got.status, got.body, err)
	}
	none := map[string]any{"total": 0.0, "waiting": 0.0, "current": 0.0, "older": []any{}}
	want := []map[string]any{
		{"name": "a-pro", "revision": pro.Revision(), "base_workflow": "General", "language": "en", "app_description": "Acme's",
			"key_scopes": []any{"Predict"}, "extra_keys": []any{map[string]any{"name": "search", "scopes": []any{"Search", "Inputs:Get"}}},
			"allowed_scopes": []any{"All"}, "show_tenant": "hash", "retention_seconds": 3600.0, "max_key_age_seconds": 172800.0,
			"pool": map[string]any{"min": 0.0, "max": 3.0}, "tenants": none},
		{"name": "default", "revision": other.Revision(), "base_workflow": "Empty", "language": "de", "app_description": "Managed by Tenantry",
			"key_scopes": []any{"All"}, "extra_keys": []any{}, "show_tenant": "none", "retention_seconds": 604800.0,
			"pool": map[string]any{"min": 0.0, "max": 0.0}, "tenants": map[string]any{"total": 2.0, "waiting": 1.0, "current": 0.0,
				"older": []any{map[string]any{"revision": plain.Revision(), "tenants": 1.0}}}},
	}
	if diff := cmp.Diff(want, body.Profiles); diff != "" {
		t.Errorf("profiles (- want, + got):\n%s", diff)
	}
}
