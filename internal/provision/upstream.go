package provision

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/tenant"
)

// deferred says that a call was not made, and when to ask again: the budget had
// no place for it, or upstream work is paused.
type deferred struct{ wait time.Duration }

func (d *deferred) Error() string { return fmt.Sprintf("no upstream call is free for %s", d.wait) }

// maxDefer bounds how long a row stays away though nothing is wrong with it:
// what it waits for may be over sooner than it was said.
const maxDefer = 5 * time.Second

func (d *deferred) bounded() time.Duration { return min(d.wait, maxDefer) }

const (
	incident    = tenant.Incident
	interactive = tenant.Interactive
	bulk        = tenant.Bulk
	background  = tenant.Background
)

// A turn is the permission to make one upstream call.
type turn struct {
	tenant.Slot
	due       time.Time
	priority  tenant.Priority
	pat       []byte // fingerprint of the PAT in use when it was given
	checksPAT bool
	control   bool // a stopped database makes this call, too
	removes   bool
	// interrupts says that other calls wait for this check of the PAT.
	interrupts bool
}

// call makes one upstream call within the budget. It returns *deferred if the
// call was not made. A call that makes something has its intent written down
// between its turn and its sending: one that still waits for its turn when the
// process dies leaves nothing in doubt.
func (s *Service) call(ctx context.Context, p tenant.Priority, f func(context.Context) error) error {
	t, err := s.turn(ctx, p)
	if err != nil {
		return err
	}
	return s.send(ctx, t, f)
}

// turn waits until an upstream call may be made with a PAT that is verified.
func (s *Service) turn(ctx context.Context, p tenant.Priority) (turn, error) {
	return s.turnTo(ctx, p, false)
}

// turnTo is turn, for a call that removes an app if removes is set.
func (s *Service) turnTo(ctx context.Context, p tenant.Priority, removes bool) (turn, error) {
	_, fingerprint, verified := s.PAT.current()
	if !verified {
		if err := s.verifyPAT(ctx); err != nil {
			return turn{}, err
		}
		_, fingerprint, _ = s.PAT.current()
	}
	return s.takeSlot(ctx, p, tenant.SlotRequest{PAT: fingerprint, Removes: removes})
}

// patience is how long a call may wait for its slot and still have its time.
func (s *Service) patience(ctx context.Context) time.Duration {
	if deadline, ok := ctx.Deadline(); ok {
		return time.Until(deadline) - s.CallTimeout
	}
	return s.CallTimeout
}

// A callTurn is who waits for slots one after the other.
type callTurn struct {
	priority tenant.Priority
	share    string
}

type shareOfCalls struct{}

// withShare says of the calls that are made with ctx with whom they take turns.
func withShare(ctx context.Context, share string) context.Context {
	return context.WithValue(ctx, shareOfCalls{}, share)
}

// takeSlot waits for the next upstream call that a priority may reserve. It returns
// *deferred if none is in time.
func (s *Service) takeSlot(ctx context.Context, p tenant.Priority, r tenant.SlotRequest) (turn, error) {
	// A slot that leaves no time for the call would be wasted.
	end := time.Now().Add(s.patience(ctx))
	r.PerSecond, r.ProbeTimeout = s.Rate, 2*s.CallTimeout
	if p != incident {
		// One of this replica's calls of a share at a time waits for its slot: the shares of a
		// priority get one after the other, however many calls each has.
		share, _ := ctx.Value(shareOfCalls{}).(string)
		turns, _ := s.calls.LoadOrStore(callTurn{p, share}, make(chan struct{}, 1))
		alone := turns.(chan struct{})
		select {
		case alone <- struct{}{}:
			defer func() { <-alone }()
		case <-ctx.Done():
			return turn{}, &deferred{}
		case <-time.After(time.Until(end)):
			return turn{}, &deferred{}
		}
	}
	for {
		patience := time.Until(end)
		if patience < 0 {
			return turn{}, &deferred{}
		}
		r.Patience = min(patience, p.Reach())
		slot, due, err := reserve(ctx, s.Store, r)
		if err != nil {
			return turn{}, err
		}
		if !due.IsZero() {
			return turn{Slot: slot, due: due, priority: p, pat: r.PAT, checksPAT: r.ChecksPAT, control: r.Control, removes: r.Removes}, nil
		}
		if slot.PATRefused {
			s.PAT.found(r.PAT, PATRefused)
		}
		// A slot that came too late is asked for again, and so is one that is still out of reach.
		again := slot.Granted || !slot.PATRefused && slot.Wait < time.Until(end)
		if !again || !sleep(ctx, slot.Wait) {
			return turn{}, &deferred{wait: slot.Wait}
		}
	}
}

// From which wait on a pause in between is looked for.
const lookForStop = 50 * time.Millisecond

// late reports whether a call's slot has passed: calls that were held up must not
// be sent all at once, nor run into those whose slots are now.
func late(due time.Time, perSecond float64) bool {
	return time.Since(due) > max(25*time.Millisecond, time.Duration(float64(time.Second)/perSecond/2))
}

// reserve takes one slot, waits for it and returns when it was due. That is zero
// if the call must not be made: no slot was granted, or the slot was granted and
// is void, because of a pause since then or because it has passed.
func reserve(ctx context.Context, store Store, r tenant.SlotRequest) (slot tenant.Slot, due time.Time, err error) {
	asked := time.Now()
	slot, err = store.ReserveSlot(ctx, r)
	if err != nil || !slot.Granted {
		return slot, due, err
	}
	if !sleep(ctx, slot.Wait) {
		return tenant.Slot{}, due, nil
	}
	if slot.Wait > lookForStop {
		holds, err := store.SlotHolds(ctx, slot.Epoch)
		if err != nil || !holds {
			return tenant.Slot{Granted: true}, due, err
		}
	}
	if due = asked.Add(slot.ServerTime + slot.Wait); late(due, r.PerSecond) {
		return tenant.Slot{Granted: true}, time.Time{}, nil
	}
	return slot, due, nil
}

// sleep waits, and reports false if ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	wait := time.NewTimer(d)
	defer wait.Stop()
	select {
	case <-wait.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// send makes a call whose turn has come, and records what it says of Clarifai and
// of the PAT. A turn that has passed, because what was written down in between took
// long, is taken anew.
func (s *Service) send(ctx context.Context, t turn, f func(context.Context) error) error {
	if late(t.due, s.Rate) {
		var err error
		if t, err = s.takeSlot(ctx, t.priority, tenant.SlotRequest{PAT: t.pat, ChecksPAT: t.checksPAT, Control: t.control, Removes: t.removes}); err != nil {
			return err
		}
	}
	limited, cancel := context.WithTimeout(ctx, s.CallTimeout)
	defer cancel()
	err := f(limited)
	if ctx.Err() != nil {
		return err // we gave up: Clarifai did nothing wrong
	}
	up := asUpstream(err)
	rejected := up != nil && up.Class == tenant.UpstreamPAT
	switch {
	case up != nil && (up.Class == tenant.UpstreamDown || up.Class == tenant.UpstreamThrottled):
		return s.upstreamFailed(ctx, t, up)
	case t.Probe || t.Shaky:
		resumed, failed := s.Store.UpstreamWorks(ctx, t.Epoch)
		if failed != nil {
			s.Log.Warn("record that Clarifai works", zap.Error(failed))
		}
		if resumed && !rejected && !t.interrupts {
			s.logAnswers()
		}
	}
	if rejected && !t.checksPAT {
		return s.confirmRefusal(ctx, t, up)
	}
	return err
}

// upstreamFailed counts a failure for the fleet. A Retry-After starts a pause, and is its length.
func (s *Service) upstreamFailed(ctx context.Context, t turn, up *tenant.UpstreamError) error {
	throttled := up.Class == tenant.UpstreamThrottled
	pause, err := s.Store.UpstreamFailed(ctx, tenant.UpstreamFailure{Epoch: t.Epoch, Problem: problemOf(up, nil),
		Pauses: throttled || t.Probe || up.RetryAfter > 0, TripAfter: s.TripAfter, PauseBase: s.PauseBase, PauseCap: s.PauseCap, Pause: up.RetryAfter})
	if err != nil { // the call's own outcome is worth more
		s.Log.Warn("record that Clarifai failed", zap.Error(err))
	}
	if pause > 0 {
		s.Log.Warn("upstream work is paused", zap.Duration("for", pause), zap.Error(up))
	}
	return up
}

// problems says what a failed call means to a person: the code of the problem,
// the sentence, and whether trying again soon is of use.
var problems = map[tenant.UpstreamClass]struct {
	code, detail string
	soon         bool
}{
	tenant.UpstreamNotFound:  {"upstream_inconsistent", "Clarifai does not know what it just made", true},
	tenant.UpstreamDuplicate: {"upstream_inconsistent", "Clarifai has an app of this id and does not show it", true},
	tenant.UpstreamThrottled: {"upstream_throttled", "Clarifai gets too many requests from this account", true},
	tenant.UpstreamDown:      {"upstream_unavailable", "Clarifai cannot be reached or fails", true},
	tenant.UpstreamQuota:     {"upstream_quota", "a limit of the Clarifai account is reached; it goes on by itself once the limit is raised", false},
	tenant.UpstreamPAT:       {"upstream_pat_refused", "Clarifai refuses the operator's PAT", false},
	tenant.UpstreamForbidden: {"upstream_forbidden", "the operator's PAT lacks a permission", false},
	tenant.UpstreamRefused:   {"upstream_refused", "Clarifai refuses the request", false},
	tenant.UpstreamAccount:   {"upstream_account", "the Clarifai account is blocked or unpaid", false},
}

// problemOf says to a person what up means. Before is the problem that stands.
func problemOf(up *tenant.UpstreamError, before *tenant.Problem) tenant.Problem {
	p, ok := problems[up.Class]
	if !ok {
		p.code, p.detail = "upstream_failed", "Clarifai failed"
	}
	problem := tenant.Problem{Code: p.code, Detail: p.detail + ": " + up.Detail, UpstreamCode: up.Code,
		UpstreamRequestID: up.RequestID, Since: time.Now().UTC()}
	if before != nil && before.Code == problem.Code {
		problem.Since = before.Since
	}
	return problem
}

// setback says what to write down for a try that failed with up, after attempts
// earlier ones. Before is the problem that stands.
func (s *Service) setback(up *tenant.UpstreamError, attempts int, before *tenant.Problem) tenant.Setback {
	base, most := s.BackoffBase, s.BackoffCap
	switch {
	case up.Class == tenant.UpstreamThrottled: // the pause of the fleet is the back-off
		attempts = 0
	case !problems[up.Class].soon: // somebody must act first
		base, most = 4*base, 4*most
	}
	return tenant.Setback{Problem: problemOf(up, before), Delay: backoff(base, most, attempts),
		Counts: up.Class != tenant.UpstreamThrottled}
}

// backoff doubles from base up to most, less up to a quarter, so that rows that
// failed together do not come back together.
func backoff(base, most time.Duration, attempts int) time.Duration {
	d := most
	if attempts < 30 && base<<attempts < most {
		d = base << attempts
	}
	return d - rand.N(d/4+1)
}

// asUpstream returns the upstream failure in err, or nil.
func asUpstream(err error) *tenant.UpstreamError {
	up, _ := errors.AsType[*tenant.UpstreamError](err)
	return up
}
