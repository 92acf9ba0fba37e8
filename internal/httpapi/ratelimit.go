package httpapi

import (
	"fmt"
	"math"
	"net/http"
	"sync"
	"time"

	"golang.org/x/time/rate"

	"github.com/tenantry/tenantry/internal/tenant"
)

// limiters hold the rates of callers that have a limit, in this replica. The zero
// limiters are ready for use.
type limiters struct {
	mu sync.Mutex
	// of which the idle ones are dropped when there are sweepAt: a caller that
	// made no request for a second has its whole quota, as a new one has.
	byToken map[string]*rate.Limiter
	sweepAt int
}

const minSweep = 1024

// take counts a request of the caller, and reports tenant.TooMany if it is one too
// many. It tells the caller in the header how it stands, as
// draft-ietf-httpapi-ratelimit-headers-11 has it.
func (l *limiters) take(w http.ResponseWriter, c tenant.Caller, now time.Time) error {
	if c.RateLimit <= 0 {
		return nil
	}
	limiter := l.of(c, now)
	allowed := limiter.AllowN(now, 1)
	left := max(0, limiter.TokensAt(now))
	w.Header().Set("RateLimit-Policy", fmt.Sprintf(`"caller";q=%d;w=1`, c.RateLimit))
	w.Header().Set("RateLimit", fmt.Sprintf(`"caller";r=%d;t=1`, int(left)))
	if allowed {
		return nil
	}
	missing := time.Duration(math.Ceil((1 - left) / float64(c.RateLimit) * float64(time.Second)))
	return &tenant.Error{Kind: tenant.TooMany, Code: "rate_limited", RetryAfter: missing,
		Detail: fmt.Sprintf("the limit of the token is %d a second, and is reached", c.RateLimit)}
}

func (l *limiters) of(c tenant.Caller, now time.Time) *rate.Limiter {
	l.mu.Lock()
	defer l.mu.Unlock()
	limiter := l.byToken[c.TokenID]
	if limiter != nil && limiter.Burst() == c.RateLimit {
		return limiter
	}
	if len(l.byToken) >= max(l.sweepAt, minSweep) {
		for id, idle := range l.byToken {
			if idle.TokensAt(now) >= float64(idle.Burst()) {
				delete(l.byToken, id)
			}
		}
		l.sweepAt = 2 * len(l.byToken)
	}
	if l.byToken == nil {
		l.byToken = map[string]*rate.Limiter{}
	}
	limiter = rate.NewLimiter(rate.Limit(c.RateLimit), c.RateLimit)
	l.byToken[c.TokenID] = limiter
	return limiter
}
