package tenant

import "time"

// The pool of a profile that says nothing else.
const (
	DefaultPoolMin = 2
	DefaultPoolMax = 20
)

// PoolBounds are the fewest and the most apps of p that are kept ready. A most of 0
// turns the pool off.
func (p Profile) PoolBounds() (fewest, most int) {
	return p.PoolMin, max(p.PoolMin, p.PoolMax)
}

// Pools reports whether apps of p are kept ready.
func (p Profile) Pools() bool {
	_, most := p.PoolBounds()
	return most > 0
}

// PoolBoundsOf are the bounds of a pool of which those given are set, nil being none.
// What is left out is the default, as far as what is given allows it.
func PoolBoundsOf(fewest, most *int) (PoolMin, PoolMax int) {
	PoolMin, PoolMax = DefaultPoolMin, DefaultPoolMax
	if fewest != nil {
		PoolMin = *fewest
	}
	if most != nil {
		PoolMax = *most
	}
	switch {
	case most == nil:
		PoolMax = max(PoolMin, PoolMax)
	case fewest == nil:
		PoolMin = max(0, min(PoolMin, PoolMax))
	}
	return PoolMin, PoolMax
}

// A PoolPlan says how pools are planned.
type PoolPlan struct {
	Every    time.Duration // how often
	Patience time.Duration // how long a pool may have more apps than its target before some are removed
	Drain    int           // apps of a pool that are removed at once, at most
	// Target is how many apps shall be ready, by how many tenants signed up in each of
	// the last Beats beats of time, the last of which ends now.
	Target func(p Profile, signUps []int) int
	Beat   time.Duration
	Beats  int
}

// A Pool is how the pool of a profile stands.
type Pool struct {
	Profile   string
	Revision  string    // that it is kept of; empty before its first plan
	Target    int       // apps that shall be ready
	PlannedAt time.Time // zero before its first plan
	Ready     int       // apps of that revision that are
	Outdated  int       // ready apps of other revisions: they are handed out when there is no other
	Retired   int       // apps of earlier incarnations that no tenant is known to hold, counted up to 1,000
	Building  int
	Waiting   int      // tenants that have no app yet, counted up to 10,000
	Importing int      // tenants beside those that have none yet and wait in the background, counted up to 10,000
	SignUps   int      // in the hour before PlannedAt
	Hits      int      // of those, tenants that had their app at once
	Misses    int      // and those that had to wait for it
	Problem   *Problem // of the build that is tried again last; nil if none has one
}

// A PoolLoad is what else the upstream calls of the pools are wanted for, beside what an UpstreamStatus has.
type PoolLoad struct {
	Keys    int // that are made or revoked
	Marking int // apps of tenants that wait for their marker
	Reports int // reconciliations under way
}

// PoolEnd is why an app was taken out of the pool.
type PoolEnd string

// Why apps are taken out of the pool.
const (
	PoolSurplus  PoolEnd = "surplus"  // more are ready than are needed
	PoolOutdated PoolEnd = "outdated" // its profile has another revision now
	PoolClosed   PoolEnd = "closed"   // no replica keeps the pool of its profile
	PoolDead     PoolEnd = "dead"     // its key is gone at Clarifai
)
