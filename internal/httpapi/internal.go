package httpapi

import (
	"net/http"
	"net/http/pprof"

	"github.com/go-chi/chi/v5"
	"github.com/go-chi/chi/v5/middleware"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// A Readiness says which requests a replica can serve.
type Readiness struct {
	Writes, Lookups bool
	Checks          map[string]string // by name: "ok", or the problem
}

type readyBody struct {
	Ready   bool              `json:"ready"`
	Writes  bool              `json:"writes"`
	Lookups bool              `json:"lookups"`
	Checks  map[string]string `json:"checks"`
}

// NewInternal returns the handler of the internal listener. /livez says that the process runs. The
// others return 503 unless the replica can serve writes (/readyz/writes), lookups (/readyz/lookups), or
// either of them (/readyz). /metrics has what was measured.
//
// readiness returns the last known state and must not wait for anything: a probe that gets no response
// in time would make every replica unready while the database hangs. Nil means always ready.
func NewInternal(reg *prometheus.Registry, readiness func() Readiness) http.Handler {
	if readiness == nil {
		readiness = func() Readiness { return Readiness{Writes: true, Lookups: true, Checks: map[string]string{}} }
	}
	r := chi.NewRouter()
	r.Use(middleware.GetHead) // what many probes send
	r.Get("/livez", func(w http.ResponseWriter, _ *http.Request) {
		_ = respond(w, http.StatusOK, map[string]bool{"live": true})
	})
	for path, ready := range map[string]func(Readiness) bool{
		"/readyz":         func(is Readiness) bool { return is.Writes || is.Lookups },
		"/readyz/writes":  func(is Readiness) bool { return is.Writes },
		"/readyz/lookups": func(is Readiness) bool { return is.Lookups },
	} {
		r.Get(path, func(w http.ResponseWriter, _ *http.Request) {
			is := readiness()
			status := http.StatusOK
			if !ready(is) {
				status = http.StatusServiceUnavailable
			}
			_ = respond(w, status, readyBody{status == http.StatusOK, is.Writes, is.Lookups, is.Checks})
		})
	}
	r.Handle("/metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{Registry: reg}))
	return r
}

// WithProfiles adds the profiles of the running process to the internal listener's
// handler, as `go tool pprof` reads them. They hold the names of functions, counts and
// sizes, and nothing of what is in memory; the command line is left out, since the
// handler of it would show what somebody may have put there.
func WithProfiles(internal http.Handler) http.Handler {
	r := chi.NewRouter()
	r.Get("/debug/pprof/", pprof.Index)
	r.Get("/debug/pprof/profile", pprof.Profile)
	r.Get("/debug/pprof/trace", pprof.Trace)
	r.Get("/debug/pprof/symbol", pprof.Symbol)
	r.Post("/debug/pprof/symbol", pprof.Symbol)
	for _, name := range []string{"allocs", "block", "goroutine", "heap", "mutex", "threadcreate"} {
		r.Handle("/debug/pprof/"+name, pprof.Handler(name))
	}
	r.Mount("/", internal)
	return r
}
