package httpapi_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tenantry/tenantry/internal/httpapi"
)

// /readyz is 503 only if nothing can be served; the paths below it are about one kind of requests.
func TestReadiness(t *testing.T) {
	t.Parallel()
	var is httpapi.Readiness
	handler := httpapi.NewInternal(prometheus.NewRegistry(), func() httpapi.Readiness { return is })
	for _, c := range []struct {
		writes, lookups               bool
		either, forWrites, forLookups int
	}{
		{true, true, 200, 200, 200},
		{false, true, 200, 503, 200},
		{true, false, 200, 200, 503},
		{false, false, 503, 503, 503},
	} {
		is = httpapi.Readiness{Writes: c.writes, Lookups: c.lookups, Checks: map[string]string{"database": "ok"}}
		for path, want := range map[string]int{"/readyz": c.either, "/readyz/writes": c.forWrites, "/readyz/lookups": c.forLookups} {
			got := httptest.NewRecorder()
			handler.ServeHTTP(got, httptest.NewRequestWithContext(t.Context(), http.MethodGet, path, nil))
			body := fmt.Sprintf(`{"ready":%v,"writes":%v,"lookups":%v,"checks":{"database":"ok"}}`, want == 200, c.writes, c.lookups)
			if got.Code != want || strings.TrimSpace(got.Body.String()) != body {
				t.Errorf("GET %s returns %d %s; want %d %s", path, got.Code, got.Body, want, body)
			}
		}
	}
}

func TestProfilesOfTheProcess(t *testing.T) {
	t.Parallel()
	without := httpapi.NewInternal(prometheus.NewRegistry(), nil)
	with := httpapi.WithProfiles(httpapi.NewInternal(prometheus.NewRegistry(), nil))
	for _, c := range []struct {
		name    string
		handler http.Handler
		path    string
		want    int
	}{
		{"off", without, "/debug/pprof/", http.StatusNotFound},
		{"off", without, "/debug/pprof/heap", http.StatusNotFound},
		{"on", with, "/debug/pprof/", http.StatusOK},
		{"on", with, "/debug/pprof/heap", http.StatusOK},
		{"on", with, "/debug/pprof/goroutine?debug=1", http.StatusOK},
		{"on", with, "/debug/pprof/cmdline", http.StatusNotFound},
		{"on", with, "/livez", http.StatusOK},
		{"on", with, "/metrics", http.StatusOK},
	} {
		got := httptest.NewRecorder()
		c.handler.ServeHTTP(got, httptest.NewRequestWithContext(t.Context(), http.MethodGet, c.path, nil))
		if got.Code != c.want {
			t.Errorf("%s: GET %s answers %d, not %d", c.name, c.path, got.Code, c.want)
		}
	}
	got := httptest.NewRecorder()
	with.ServeHTTP(got, httptest.NewRequestWithContext(t.Context(), http.MethodHead, "/livez", nil))
	if got.Code != http.StatusOK {
		t.Errorf("HEAD /livez beside profiles answers %d", got.Code)
	}
}
