package httpapi_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/httpapi"
	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// BenchmarkSignUpThatBuilds measures what Tenantry adds to the two upstream calls
// of a sign-up: own-ms is the median of the whole less their latency.
func BenchmarkSignUpThatBuilds(b *testing.B) {
	const latency = 100 * time.Millisecond
	w := provisiontest.New(b)
	w.Settings(map[string]any{"latency_ms": latency.Milliseconds()})
	r := w.Start(provisiontest.Options{Adjust: func(c *provision.Config) { c.SweepEvery = time.Second }})
	srv := httptest.NewServer(httpapi.New(httpapi.Config{Service: r.Service, DB: r.DB, Log: zap.NewNop(), Metrics: httpapi.NewMetrics(r.Reg)}))
	b.Cleanup(srv.Close)
	token, text := tenant.NewToken()
	if _, err := r.DB.AddCaller(b.Context(), token, tenant.NewCaller{Name: "bench", Role: tenant.Provisioner}, tenant.Actor{Name: "bench"}); err != nil {
		b.Fatal(err)
	}
	var own []time.Duration
	for i := 0; b.Loop(); i++ {
		req, err := http.NewRequestWithContext(b.Context(), http.MethodPut, fmt.Sprint(srv.URL, "/v1/tenants/user_", i), strings.NewReader(""))
		if err != nil {
			b.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+text.Reveal())
		began := time.Now()
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			b.Fatal(err)
		}
		_ = resp.Body.Close()
		own = append(own, time.Since(began)-2*latency)
		if resp.StatusCode != http.StatusCreated {
			b.Fatalf("sign-up answers %s", resp.Status)
		}
	}
	slices.Sort(own)
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	b.ReportMetric(ms(own[len(own)/2]), "own-ms")
	b.ReportMetric(ms(own[len(own)*99/100]), "own-p99-ms")
}
