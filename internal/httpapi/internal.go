package httpapi

import (
	"context"
	"errors"
	"net/http"
	"net/http/pprof"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-chi/chi/v5/middleware"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// A Check says why something is not ready, or nil.
type Check func(ctx context.Context) error

// A Notice is what a check has to say of a service that is ready all the same.
type Notice string

func (n Notice) Error() string { return string(n) }

type readyBody struct {
	Ready  bool              `json:"ready"`
	Checks map[string]string `json:"checks"`
}

// readyTimeout bounds all checks of one look, below what probes allow.
const readyTimeout = 2 * time.Second

// NewInternal returns the handler of the internal listener: /livez says that the
// process runs, /readyz whether every check passes, and which do not, /metrics
// what was measured.
func NewInternal(reg *prometheus.Registry, checks map[string]Check) http.Handler {
	r := chi.NewRouter()
	r.Use(middleware.GetHead) // what many probes send
	r.Get("/livez", func(w http.ResponseWriter, _ *http.Request) {
		_ = respond(w, http.StatusOK, map[string]bool{"live": true})
	})
	r.Get("/readyz", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), readyTimeout)
		defer cancel()
		body := readyBody{Ready: true, Checks: map[string]string{}}
		for name, check := range checks {
			body.Checks[name] = "ok"
			if err := check(ctx); err != nil {
				body.Checks[name] = err.Error()
				if _, ok := errors.AsType[Notice](err); !ok {
					body.Ready = false
				}
			}
		}
		status := http.StatusOK
		if !body.Ready {
			status = http.StatusServiceUnavailable
		}
		_ = respond(w, status, body)
	})
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
