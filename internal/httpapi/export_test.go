package httpapi

import (
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/postgres"
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
	s := &server{Config{Log: log, Metrics: NewMetrics(prometheus.NewRegistry())}}
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
