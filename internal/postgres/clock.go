package postgres

import (
	"sync/atomic"
	"time"
)

// A clock measures the time since it was created. Unlike the monotonic clock, which stops while the machine is
// suspended, it goes on then; unlike the wall clock, it never goes back. If somebody sets the wall clock forward,
// that counts as a suspension. A clock is safe for concurrent use.
type clock struct {
	anchor atomic.Pointer[anchor]
	ahead  atomic.Int64 // by how much a test has moved the wall clock
}

// An anchor is one time on all clocks.
type anchor struct {
	total time.Duration // of this clock
	at    time.Time     // the monotonic clock
	wall  int64         // in nanoseconds
	// compared is when the clocks were last compared, in nanoseconds since at.
	compared atomic.Int64
}

const (
	// maxApart is by how much the wall clock and the monotonic clock may come apart before that counts as a
	// suspension or a step. It is small against trustFor.
	maxApart = 20 * time.Millisecond
	// compareEvery bounds for how long after a suspension it may go unnoticed. To read both clocks takes twice as
	// long as to read one.
	compareEvery = 100 * time.Microsecond
)

func newClock() *clock {
	c := &clock{}
	now := time.Now()
	c.anchor.Store(&anchor{at: now, wall: now.UnixNano()})
	return c
}

func (c *clock) now() time.Duration {
	a := c.anchor.Load()
	if awake := time.Since(a.at); int64(awake)-a.compared.Load() < int64(compareEvery) {
		return a.total + awake
	}
	for ; ; a = c.anchor.Load() {
		now := time.Now()
		wall, awake := now.UnixNano()+c.ahead.Load(), now.Sub(a.at)
		suspended := time.Duration(wall-a.wall) - awake
		if -maxApart < suspended && suspended < maxApart {
			a.compared.Store(int64(awake))
			return a.total + awake
		}
		// A step back of the wall clock must not hide the next suspension.
		c.anchor.CompareAndSwap(a, &anchor{total: a.total + awake + max(0, suspended), at: now, wall: wall})
	}
}
