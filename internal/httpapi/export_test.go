package httpapi

import (
	"time"

	"github.com/tenantry/tenantry/internal/postgres"
)

// What parses strangers' bytes, for the fuzz tests.
var (
	ParseCursor  = parseCursor
	FormatCursor = formatCursor
)

// Position is what a cursor holds.
type Position = postgres.Position

// ParsePrefer returns how long a caller wants to wait, and what is answered of it.
func ParsePrefer(headers []string) (wait time.Duration, applied string) {
	p := parsePrefer(headers)
	return p.wait, p.applied
}
