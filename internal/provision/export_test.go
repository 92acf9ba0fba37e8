package provision

import "github.com/tenantry/tenantry/internal/tenant"

// HasProblem reports whether a class of upstream failure has words of its own.
func HasProblem(c tenant.UpstreamClass) bool { return problems[c].detail != "" }

// Backoff is backoff, for its test.
var Backoff = backoff
