package httpapi

import (
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/go-chi/chi/v5"

	"github.com/tenantry/tenantry/internal/postgres"
)

// refusesCached reports whether a request asks for an answer of Postgres itself, by
// Cache-Control: no-cache.
func refusesCached(r *http.Request) bool {
	for _, header := range r.Header.Values("Cache-Control") {
		for directive := range strings.SplitSeq(header, ",") {
			name, _, _ := strings.Cut(directive, "=")
			if strings.EqualFold(strings.TrimSpace(name), "no-cache") {
				return true
			}
		}
	}
	return false
}

// cachedRoutes are those that are answered from memory.
var cachedRoutes = map[string]bool{
	"/v1/tenants/{tenant_id}":                 true,
	"/v1/tenants/{tenant_id}/keys":            true,
	"/v1/tenants/{tenant_id}/keys/{key_name}": true,
	"/v1/apps/{app_id}":                       true,
}

// mayBeCached reports whether a request is answered from memory where that can be.
func mayBeCached(r *http.Request) bool {
	return (r.Method == http.MethodGet || r.Method == http.MethodHead) && cachedRoutes[chi.RouteContext(r.Context()).RoutePattern()] &&
		!refusesCached(r)
}

// staleHeader says why an answer may be wrong.
const staleHeader = "Tenantry-Stale"

// tellAge says of an answer that may be wrong that it may, and for how long that is not
// known.
func tellAge(w http.ResponseWriter, f postgres.Freshness) {
	if !f.Stale() {
		return
	}
	w.Header().Set("Age", strconv.FormatInt(int64(f.Age/time.Second), 10))
	w.Header().Set(staleHeader, "database_unavailable")
}
