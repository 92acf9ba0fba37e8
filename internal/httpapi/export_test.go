package httpapi

import (
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/postgres"
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

// What a cursor of the audit log holds.
var (
	ParseAuditCursor  = parseAuditCursor
	FormatAuditCursor = formatAuditCursor
)

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
