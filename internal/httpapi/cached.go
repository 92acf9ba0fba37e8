package httpapi

import (
	"net/http"
	"strconv"
	"strings"
	"time"

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
