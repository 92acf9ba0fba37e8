package httpapi_test

import (
	"net/http"
	"testing"
	"time"

	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// An admin need not wait for the next attempt, neither of a build nor of a fleet
// that is paused.
func TestRetryTenant(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]map[string]any{
		"a build that waits":       {"call": "PostApps", "status": 11006},
		"a fleet that is paused":   {"call": "*", "status": 11005},
		"a PAT that was refused":   {"call": "*", "status": 11009},
		"a build that was refused": {"call": "PostKeys", "status": 11102},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := provisiontest.New(t)
			s := newSiteOn(t, w, w.Start(provisiontest.Options{Adjust: func(c *provision.Config) {
				c.BackoffBase, c.BackoffCap, c.PauseBase, c.PauseCap, c.PATCheckBase = time.Hour, time.Hour, time.Hour, time.Hour, time.Hour
			}}))
			w.Faults(fault)
			s.call(tenant.Provisioner, "PUT", "/v1/tenants/user_1", "", "Prefer", "respond-async")
			provisiontest.Eventually(t, "it waits for long", func() bool {
				at, _ := s.call(tenant.Viewer, "GET", "/v1/tenants/user_1", "").at(t, "problem", "next_attempt_at").(string)
				next, err := time.Parse(time.RFC3339, at)
				return err == nil && time.Until(next) > 30*time.Minute
			})
			w.Faults()
			if a := s.call(tenant.Admin, "POST", "/v1/tenants/user_1/retry", ""); a.status != http.StatusAccepted ||
				a.header.Get("Location") != "/v1/tenants/user_1" || a.header.Get("Retry-After") == "" || a.at(t, "id") != "user_1" {
				t.Fatalf("retry answers %d %v: %s", a.status, a.header, a.body)
			}
			if a := s.call(tenant.Viewer, "GET", "/v1/tenants/user_1?wait=30", ""); a.at(t, "state") != "active" {
				t.Errorf("after the retry the tenant is %s", a.body)
			}
		})
	}
	t.Run("refuses", func(t *testing.T) {
		t.Parallel()
		s := newSite(t)
		for _, c := range []struct {
			role   tenant.Role
			path   string
			body   string
			status int
		}{
			{tenant.Provisioner, "/v1/tenants/user_1/retry", "", http.StatusForbidden},
			{tenant.Admin, "/v1/tenants/user_1/retry", "", http.StatusNotFound},
			{tenant.Admin, "/v1/tenants/user_1/retry?now=1", "", http.StatusBadRequest},
			{tenant.Admin, "/v1/tenants/user_1/retry", `{"force":true}`, http.StatusBadRequest},
		} {
			if a := s.call(c.role, "POST", c.path, c.body); a.status != c.status {
				t.Errorf("POST %s as %s answers %d: %s", c.path, c.role, a.status, a.body)
			}
		}
	})
}
