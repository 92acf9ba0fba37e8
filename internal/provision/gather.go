package provision

import (
	"context"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/tenant"
)

// Gathered calls. Builds that nobody waits for may have their apps, or their keys, made
// by one call: those that are about to make it join while the first of them waits for the
// slot. Nobody waits longer for that. Each has a row, an intent and an outcome of its own,
// and whoever was left in doubt, or has failed before, is looked for and goes on alone.

// A gatherer makes the calls of one kind for several builds at once.
type gatherer[I, R any] struct {
	s    *Service
	call string // Clarifai's name of it
	post func(context.Context, []I) ([]R, error)

	mu      sync.Mutex
	open    *gathering[I, R] // that can be joined; nil for none; guarded by mu, as all below
	alone   time.Time        // until when nothing is gathered
	refused int              // calls for several in a row that were not carried out in full
}

// A gathering is one call that is yet to be made, or is being made.
type gathering[I, R any] struct {
	lead    chan struct{} // holds one token: who has it waits for the slot
	closed  chan struct{} // closed with the slot there; from then on items stay
	ended   chan struct{} // closed after the call
	items   []*gathered[I, R]
	intents sync.WaitGroup // that are being written
	request string         // Clarifai's id of the call; set before ended, as err
	err     error
}

// A gathered is what one build wants made.
type gathered[I, R any] struct {
	ctx   context.Context // of the build
	what  I
	begun bool // the intent is written
	made  R
	done  bool // made holds what was made
}

// After a call for several that was not carried out in full, each goes alone for gatherAgain,
// and for twice as long after the next, up to gatherAgainCap: where Clarifai does not take
// several, few have to be looked for.
const (
	gatherAgain    = time.Minute
	gatherAgainCap = time.Hour
)

// sharing is how many builds it takes to fill the calls that they share; 0 if they share none.
func (s *Service) sharing() int {
	if s.ItemsPerCall < 2 {
		return 0
	}
	return 2 * s.ItemsPerCall
}

// takes reports whether a build may have something made together with others: if it is in
// no hurry, and nothing of it is in doubt or has failed.
func (g *gatherer[I, R]) takes(a tenant.App) bool {
	if g.s.ItemsPerCall < 2 || priorityOf(a) != background || a.Attempts > 0 || a.InDoubt || a.Creating.InDoubt {
		return false
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return time.Now().After(g.alone)
}

// make makes what begin returns, once that has written the intent. As with turn and send,
// *deferred means that no call was made, or that it is not known what became of it: the
// row says whether it is in doubt.
func (g *gatherer[I, R]) make(ctx context.Context, begin func() (I, error)) (R, error) {
	var none R
	it := &gathered[I, R]{ctx: ctx}
	b := g.join(it)
	var t turn
	leads := false
	enough := time.NewTimer(g.s.patience(ctx))
	defer enough.Stop()
	select {
	case <-b.lead:
		var err error
		if t, err = g.s.turn(ctx, background); err != nil {
			g.leave(b, it)
			b.lead <- struct{}{}
			return none, err
		}
		leads = true
		g.close(b)
	case <-b.closed:
	case <-ctx.Done():
	case <-enough.C:
	}
	if g.leave(b, it) {
		return none, &deferred{}
	}
	err := it.begin(b, begin)
	if leads {
		b.intents.Wait()
		g.send(ctx, b, t)
	}
	if err != nil {
		return none, err
	}
	select {
	case <-b.ended:
		tenant.NoteUpstreamRequest(ctx, b.request)
		if b.err == nil && !it.done {
			return none, &deferred{}
		}
		return it.made, b.err
	case <-ctx.Done():
		return none, &deferred{} // the others go on
	}
}

func (it *gathered[I, R]) begin(b *gathering[I, R], begin func() (I, error)) (err error) {
	defer b.intents.Done()
	it.what, err = begin()
	it.begun = err == nil
	return err
}

// join has an item made by the call that gathers, or by one that gathers from now on.
func (g *gatherer[I, R]) join(it *gathered[I, R]) *gathering[I, R] {
	g.mu.Lock()
	defer g.mu.Unlock()
	b := g.open
	if b == nil {
		b = &gathering[I, R]{lead: make(chan struct{}, 1), closed: make(chan struct{}), ended: make(chan struct{})}
		b.lead <- struct{}{}
		g.open = b
	}
	if b.items = append(b.items, it); len(b.items) >= g.s.ItemsPerCall {
		g.open = nil
	}
	return b
}

// leave takes an item back, and reports false if the gathering is closed.
func (g *gatherer[I, R]) leave(b *gathering[I, R], it *gathered[I, R]) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	select {
	case <-b.closed:
		return false
	default:
	}
	for i, other := range b.items {
		if other == it {
			b.items = append(b.items[:i], b.items[i+1:]...)
			break
		}
	}
	return true
}

func (g *gatherer[I, R]) close(b *gathering[I, R]) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.open == b {
		g.open = nil
	}
	b.intents.Add(len(b.items))
	close(b.closed)
}

// send makes the call of a gathering for those whose intents are written.
func (g *gatherer[I, R]) send(ctx context.Context, b *gathering[I, R], t turn) {
	defer close(b.ended)
	if !slices.ContainsFunc(b.items, func(it *gathered[I, R]) bool { return it.begun }) {
		return
	}
	var asked []*gathered[I, R]
	var made []R
	b.err = g.s.send(ctx, t, func(ctx context.Context) (err error) {
		var what []I
		for _, it := range b.items {
			// Who has given up while another slot was waited for is looked for by now: what is
			// made later could be missed.
			if it.begun && it.ctx.Err() == nil {
				asked, what = append(asked, it), append(what, it.what)
			}
		}
		if len(asked) == 0 {
			return &deferred{}
		}
		g.s.Metrics.gathered(g.call, len(asked))
		made, err = g.post(ctx, what)
		return err
	})
	b.request = tenant.LastUpstreamRequest(ctx)
	if len(asked) > 1 {
		b.err = g.learn(ctx, len(asked), b.err)
	}
	if b.err != nil {
		return
	}
	for i, it := range asked {
		it.made, it.done = made[i], true
	}
}

// learn takes note of how a call for n items ended, and returns what that means to each
// of them.
func (g *gatherer[I, R]) learn(ctx context.Context, n int, err error) error {
	up := asUpstream(err)
	g.mu.Lock()
	defer g.mu.Unlock()
	if err == nil {
		g.refused = 0
	}
	if up == nil || !up.Unclear || ctx.Err() != nil {
		return err
	}
	pause := min(gatherAgainCap, gatherAgain<<min(g.refused, 10))
	g.alone = time.Now().Add(pause)
	g.refused++
	g.s.Log.Warn("a call for several was not carried out in full: each is looked for, and goes alone for a while",
		zap.String("call", g.call), zap.Int("items", n), zap.Duration("for", pause), zap.Error(up))
	switch up.Class {
	case tenant.UpstreamRefused, tenant.UpstreamDuplicate, tenant.UpstreamNotFound, tenant.UpstreamQuota:
		// That is said of some of them, or of there being several: no row has failed yet.
		return &deferred{}
	}
	return err
}

// postApps and postKeys make what was gathered.
func (s *Service) postApps(ctx context.Context, apps []tenant.NewApp) ([]struct{}, error) {
	return make([]struct{}, len(apps)), s.Upstream.CreateApps(ctx, apps)
}

func (s *Service) postKeys(ctx context.Context, keys []tenant.NewKey) ([]tenant.Secret, error) {
	return s.Upstream.CreateKeys(ctx, keys)
}
