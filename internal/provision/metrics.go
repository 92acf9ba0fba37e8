package provision

import (
	"github.com/prometheus/client_golang/prometheus"
)

// Metrics are what the engine measures of itself.
type Metrics struct {
	jobs         *prometheus.CounterVec
	buildSeconds prometheus.Histogram
	tenants      *prometheus.GaugeVec
}

// NewMetrics makes the metrics and registers them.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	m := &Metrics{
		jobs: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tenantry_jobs_total", Help: "Looks of workers at a row, by kind and outcome.",
		}, []string{"kind", "outcome"}),
		buildSeconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "tenantry_build_duration_seconds", Help: "The last, successful try of a build, its upstream calls included.",
			Buckets: []float64{.05, .1, .2, .3, .5, .75, 1, 1.5, 2, 3, 5, 10, 15},
		}),
		tenants: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "tenantry_tenants", Help: "Tenants by state, counted every 15 seconds.",
		}, []string{"state"}),
	}
	reg.MustRegister(m.jobs, m.buildSeconds, m.tenants)
	return m
}

func (m *Metrics) job(kind string, o outcome) { m.jobs.WithLabelValues(kind, string(o)).Inc() }
