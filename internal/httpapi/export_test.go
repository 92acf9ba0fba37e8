package httpapi

import (
	"context"
	"encoding/json"
	"maps"
	"net/http"
	"net/http/httptest"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-chi/chi/v5/middleware"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/tenant"
)

// What parses strangers' bytes, for the fuzz tests.
var (
	ParseCursor  = parseCursor
	FormatCursor = formatCursor
	CheckJSON    = func(body []byte) error { return checkJSON(body, mayBeEmpty) }
	Matches      = matches
	StatusOf     = statusOf
)

// NewPanicking serves one route, whose handler panics, and returns where.
func NewPanicking(t *testing.T, log *zap.Logger) string {
	s := &server{Config: Config{Log: log, Metrics: NewMetrics(prometheus.NewRegistry())}}
	r := chi.NewRouter()
	r.Use(s.observe, routeByEscapedPath)
	r.Get("/panic", func(http.ResponseWriter, *http.Request) { panic("the secret word") })
	srv := httptest.NewServer(r)
	t.Cleanup(srv.Close)
	return srv.URL
}

// Position is what a cursor holds.
type Position = postgres.Position

// ParsePrefer returns how long a caller wants to wait, and what is answered of it.
func ParsePrefer(headers []string) (wait time.Duration, applied string) {
	p := parsePrefer(headers, defaultWait)
	return p.wait, p.applied
}

// ParseAuditCursor reads a cursor of the audit log.
var ParseAuditCursor = parseAuditCursor

// OpenToLimited lists the routes without a tenant that limited callers may use.
func OpenToLimited() []string { return slices.Sorted(maps.Keys(openToLimited)) }

// Limiters are the rates of callers.
type Limiters struct{ limiters limiters }

// NewLimiters returns limiters that know of nobody.
func NewLimiters() *Limiters { return &Limiters{} }

// Take counts a request.
func (l *Limiters) Take(c tenant.Caller, now time.Time) error {
	return l.limiters.take(httptest.NewRecorder(), c, now)
}

// Len is how many callers are remembered.
func (l *Limiters) Len() int { return len(l.limiters.byToken) }

// Layers are what a look-up passes through before it is authorised, and after it is
// found, each on top of those before.
var Layers = []string{"routing", "observing, no log", "log", "failures", "encoding"}

// Peeled returns a handler of look-ups that has the first layers only: it knows its
// answer.
func Peeled(layers int, log *zap.Logger, t tenant.Tenant) http.Handler {
	s := &server{Config: Config{Service: &provision.Service{}, Log: log, Metrics: NewMetrics(prometheus.NewRegistry())}}
	if layers < 3 {
		s.Log = zap.NewNop()
	}
	constant := httptest.NewRecorder()
	_ = respond(constant, http.StatusOK, s.tenantBody(t))
	answer := constant.Body.Bytes()
	plain := func(w http.ResponseWriter, _ *http.Request) error {
		w.Header().Set("Content-Type", "application/json")
		_, err := w.Write(answer)
		return err
	}
	r := chi.NewRouter()
	if layers >= 2 {
		r.Use(s.observe)
	}
	r.Use(routeByEscapedPath, middleware.GetHead)
	switch {
	case layers >= 5:
		r.Get("/v1/tenants/{tenant_id}", s.handle(func(w http.ResponseWriter, req *http.Request) error {
			if _, err := pathTenantID(req); err != nil {
				return err
			}
			if _, err := params(req, "wait"); err != nil {
				return err
			}
			return s.respondTenant(w, req, t)
		}))
	case layers == 4:
		r.Get("/v1/tenants/{tenant_id}", s.handle(plain))
	default:
		r.Get("/v1/tenants/{tenant_id}", func(w http.ResponseWriter, req *http.Request) { _ = plain(w, req) })
	}
	return r
}

// TenantFields is how many fields the body of a tenant has.
var TenantFields = reflect.TypeFor[tenantBody]().NumField()

// Encoded returns the body of a list of tenants with next, and of the first of them, as they are
// written, and as encoding/json writes them. Quick says whether they are appended.
func Encoded(t []tenant.Tenant, next string) (got, want []string, quick []bool) {
	s := &server{Config: Config{Service: &provision.Service{}}}
	list := tenantListBody{Tenants: []tenantBody{}, NextCursor: next}
	for _, t := range t {
		list.Tenants = append(list.Tenants, s.tenantBody(t))
	}
	bodies := []appender{list}
	if len(t) > 0 {
		bodies = append(bodies, list.Tenants[0])
	}
	for _, body := range bodies {
		written := httptest.NewRecorder()
		writeJSON(written, http.StatusOK, "application/json", body)
		var text strings.Builder
		enc := json.NewEncoder(&text)
		enc.SetEscapeHTML(false)
		_ = enc.Encode(body) // what it cannot write leaves nothing, which is compared, too
		_, ok := body.appendJSON(nil)
		got, want, quick = append(got, written.Body.String()), append(want, text.String()), append(quick, ok)
	}
	return got, want, quick
}

// WorkTimeout is how long a request may work.
const WorkTimeout = workTimeout

// Limited returns the context of a request, and what ends it.
func Limited(ctx context.Context) (limit context.Context, done func()) {
	l := &limited{info: requestInfo{Context: ctx}, end: time.Now().Add(workTimeout)}
	return l, l.done
}
