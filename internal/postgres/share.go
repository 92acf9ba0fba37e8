package postgres

import (
	"cmp"
	"context"
	"fmt"
	"runtime/debug"
	"sync"
	"time"
)

// Of statements that many requests share.
const (
	sharedAtOnce  = 3  // under way at a time, unless atOnce says otherwise
	sharedMost    = 64 // requests of one
	sharedTimeout = 5 * time.Second
)

// A shared runs calls that come at the same time as one. A call that finds fewer than
// atOnce under way runs at once, so that sharing makes nobody wait who is alone;
// the others wait, and all that wait go together when one has returned.
type shared[In, Out any] struct {
	// run makes several calls one, and returns their answers in the order given. It
	// fails for all or for none.
	run    func(ctx context.Context, calls []In) ([]Out, error)
	atOnce int // 0 means sharedAtOnce

	mu      sync.Mutex
	running int                    // guarded by mu
	waiting []*sharedCall[In, Out] // guarded by mu
}

type sharedCall[In, Out any] struct {
	ctx  context.Context
	in   In
	out  Out
	err  error
	done chan struct{}
}

// do runs one call, together with others if there are any. One whose context ends
// before its turn is not run.
func (s *shared[In, Out]) do(ctx context.Context, in In) (Out, error) {
	c := &sharedCall[In, Out]{ctx: ctx, in: in, done: make(chan struct{})}
	s.mu.Lock()
	if s.running < cmp.Or(s.atOnce, sharedAtOnce) {
		s.running++
		s.mu.Unlock()
		s.runAll([]*sharedCall[In, Out]{c})
		if next := s.next(); next != nil {
			go func() {
				for ; next != nil; next = s.next() {
					s.runAll(next)
				}
			}()
		}
		return c.out, c.err
	}
	s.waiting = append(s.waiting, c)
	s.mu.Unlock()
	select {
	case <-c.done:
		return c.out, c.err
	case <-ctx.Done():
		return c.out, ctx.Err()
	}
}

// next returns those who wait and may go now, or nil if nobody waits.
func (s *shared[In, Out]) next() []*sharedCall[In, Out] {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.waiting) > 0 {
		n := min(len(s.waiting), sharedMost)
		var calls []*sharedCall[In, Out]
		for _, c := range s.waiting[:n] {
			if c.ctx.Err() == nil {
				calls = append(calls, c)
			}
		}
		s.waiting = append(s.waiting[:0:0], s.waiting[n:]...)
		if len(calls) > 0 {
			return calls
		}
	}
	s.running--
	return nil
}

func (s *shared[In, Out]) runAll(calls []*sharedCall[In, Out]) {
	// Of none of the callers: one that goes away must not end the call of the others.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(calls[0].ctx), sharedTimeout)
	defer cancel()
	ins := make([]In, len(calls))
	for i, c := range calls {
		ins[i] = c.in
	}
	outs, err := s.runOnce(ctx, ins)
	for i, c := range calls {
		if c.err = err; err == nil {
			c.out = outs[i]
		}
		close(c.done)
	}
}

// runOnce turns a panic into an error, and results that are too few, or the place of the call would be
// taken forever.
func (s *shared[In, Out]) runOnce(ctx context.Context, ins []In) (outs []Out, err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("panic: %v\n%s", v, debug.Stack())
		}
	}()
	if outs, err = s.run(ctx, ins); err == nil && len(outs) != len(ins) {
		err = fmt.Errorf("%d results for %d calls", len(outs), len(ins))
	}
	return outs, err
}
