package httpapi_test

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/tenantry/tenantry/internal/httpapi"
)

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
