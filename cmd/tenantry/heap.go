package main

import (
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync/atomic"
	"time"
)

// Between these is how much garbage may lie about before it is collected, unless half of what is
// alive is more. The least keeps a service small that has nothing to do.
const (
	leastGarbage = 16 << 20
	mostGarbage  = 128 << 20
)

// garbage is how much garbage may lie about in a heap with so much alive: what is allocated in
// a second, and at most twice what it was before, so that a start alone does not make a service
// large. A heap that is small and busy would be collected dozens of times a second if it had to
// be twice as large first, which costs some per cent of the processors; one that is large would
// grow to twice its size for nothing.
func garbage(live, perSecond, before uint64) uint64 {
	least := max(leastGarbage, live/2)
	return max(least, min(perSecond, 2*before, mostGarbage))
}

// A collector sets after each garbage collection when the next one is to be. Whatever it sets,
// GOMEMLIMIT goes first.
type collector struct {
	stopped   atomic.Bool
	at        time.Time // of the last collection
	allocated uint64    // until then
	garbage   uint64    // that may lie about
	percent   int       // that is set
}

// tuneCollector sets when garbage is collected, until stop is called.
func tuneCollector() (stop func()) {
	c := &collector{at: time.Now(), percent: 100}
	c.await()
	return func() {
		c.stopped.Store(true)
		debug.SetGCPercent(100)
	}
}

// await has collected called after the next collection: an object that nobody refers to is gone
// then.
func (c *collector) await() {
	type sentinel struct{ _ *sentinel } // with a pointer it is not put together with others
	runtime.AddCleanup(&sentinel{}, (*collector).collected, c)
}

func (c *collector) collected() {
	if c.stopped.Load() {
		return
	}
	read := []metrics.Sample{{Name: "/gc/heap/live:bytes"}, {Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(read)
	live, allocated := max(1, read[0].Value.Uint64()), read[1].Value.Uint64()
	now := time.Now()
	perSecond := float64(allocated-c.allocated) / max(time.Millisecond, now.Sub(c.at)).Seconds()
	c.at, c.allocated = now, allocated
	c.garbage = garbage(live, uint64(perSecond), c.garbage)
	// To set it stops all goroutines for a moment: not for a trifle.
	if percent := int(c.garbage * 100 / live); percent < c.percent*9/10 || percent > c.percent*11/10 {
		c.percent = percent
		debug.SetGCPercent(percent)
	}
	c.await()
}
