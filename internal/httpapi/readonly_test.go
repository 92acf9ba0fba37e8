package httpapi_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/go-chi/chi/v5"
	gocmp "github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/httpapi"
	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// A read-only service has neither a PAT nor a keyset. It serves lookups, and refuses all other
// requests before they have an effect.
func TestReadOnly(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	s := newSiteOn(t, w, r)
	app := fmt.Sprint(s.signUp("u").at(t, "app", "id"))
	r.Stop()
	bare := &provision.Service{Config: provision.Config{Store: r.DB, Deployment: r.Deployment}.WithDefaults()}
	handler := httpapi.New(httpapi.Config{Service: bare, DB: r.DB, Log: zap.NewNop(), Metrics: httpapi.NewMetrics(prometheus.NewRegistry()), ReadOnly: true})
	srv := httptest.NewServer(handler)
	t.Cleanup(srv.Close)
	s.url = srv.URL
	calls := w.State().Calls

	open := []string{"/v1/apps/{app_id}", "/v1/audit", "/v1/callers", "/v1/callers/{caller_id}", "/v1/tenants", "/v1/tenants/{tenant_id}",
		"/v1/tenants/{tenant_id}/keys", "/v1/tenants/{tenant_id}/keys/{key_name}"}
	caller, _, _ := strings.Cut(strings.TrimPrefix(s.tokens[tenant.Admin], "tnty_"), "_")
	values := map[string]string{"{tenant_id}": "u", "{key_name}": "default", "{app_id}": app, "{caller_id}": caller}
	var found []string
	err := chi.Walk(handler.(chi.Routes), func(method, route string, _ http.Handler, _ ...func(http.Handler) http.Handler) error {
		path := regexp.MustCompile(`\{\w+\}`).ReplaceAllStringFunc(route, func(name string) string {
			if v, ok := values[name]; ok {
				return v
			}
			return "1"
		})
		for _, role := range tenant.Roles {
			a := s.call(role, method, path, "")
			switch {
			case route == "/openapi.yaml" && a.status == http.StatusOK:
			case a.status == http.StatusOK && method == http.MethodGet:
				found = append(found, route)
				if strings.Contains(string(a.body), `"credentials"`) {
					t.Errorf("%s %s shows a key: %s", method, path, a.body)
				}
			case a.status != http.StatusForbidden || a.at(t, "code") != "read_only" && a.at(t, "code") != "role_forbidden":
				t.Errorf("%s %s as %s returns %d %s", method, path, role, a.status, a.body)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(found)
	if diff := gocmp.Diff(open, slices.Compact(found)); diff != "" {
		t.Errorf("a read-only service serves other routes (- want, + got):\n%s", diff)
	}
	if a := s.call(tenant.Viewer, "GET", "/v1/tenants/nobody?wait=1", ""); a.status != http.StatusNotFound {
		t.Errorf("a lookup that waits returns %d %s", a.status, a.body)
	}
	if after := w.State().Calls; !gocmp.Equal(after, calls) {
		t.Errorf("calls to Clarifai: %v, before %v", after, calls)
	}
}
