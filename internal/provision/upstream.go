package provision

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/tenantry/tenantry/internal/tenant"
)

// A PATState is what is known of the operator's PAT.
type PATState string

// The states of a PAT.
const (
	PATUnknown PATState = "unknown" // not checked since the start
	PATWorks   PATState = "ok"
	PATRefused PATState = "refused"
	PATForeign PATState = "other_operator" // it works, and is another operator's: it is not used
)

// A PATHealth is how this replica last found the PAT.
type PATHealth struct {
	State     PATState
	Since     time.Time // of the state
	CheckedAt time.Time // of the last answer that showed it; zero means never
}

type patHealth struct {
	verify sync.Mutex // held while the operator is being verified

	mu       sync.Mutex
	health   PATHealth // guarded by mu
	verified bool      // guarded by mu
}

func (p *patHealth) set(state PATState) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if p.health.State != state {
		p.health.State, p.health.Since = state, now
	}
	p.health.CheckedAt = now
	p.verified = p.verified || state == PATWorks
}

func (p *patHealth) isVerified() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.verified
}

// PAT returns how this replica last found the PAT.
func (s *Service) PAT() PATHealth {
	s.pat.mu.Lock()
	defer s.pat.mu.Unlock()
	h := s.pat.health
	if h.State == "" {
		h.State = PATUnknown
	}
	return h
}

// deferred says that a call was not made: the budget had no place for it.
type deferred struct{ wait time.Duration }

func (d *deferred) Error() string { return fmt.Sprintf("no upstream call is free for %s", d.wait) }

// call makes one upstream call within the budget. It returns *deferred if the
// call was not made. A call that makes something has its intent written down
// between its turn and its sending: one that still waits for its turn when the
// process dies leaves nothing in doubt.
func (s *Service) call(ctx context.Context, f func(context.Context) error) error {
	if err := s.turn(ctx); err != nil {
		return err
	}
	return s.send(ctx, f)
}

// turn waits until an upstream call may be made.
func (s *Service) turn(ctx context.Context) error {
	if err := s.verifyOperator(ctx); err != nil {
		return err
	}
	return s.takeSlot(ctx)
}

// verifyOperator makes sure, once, that the PAT is the deployment's operator's:
// with another's, every app would be made in the wrong account.
func (s *Service) verifyOperator(ctx context.Context) error {
	if s.pat.isVerified() {
		return nil
	}
	if !s.pat.verify.TryLock() {
		return &deferred{wait: s.BackoffBase} // another job is at it
	}
	defer s.pat.verify.Unlock()
	if s.pat.isVerified() {
		return nil
	}
	if err := s.takeSlot(ctx); err != nil {
		return err
	}
	return s.send(ctx, func(ctx context.Context) error {
		operator, err := s.Upstream.Whoami(ctx)
		if err != nil {
			return err
		}
		if err := checkOperator(s.Deployment, operator); err != nil {
			s.pat.set(PATForeign)
			return &tenant.UpstreamError{Call: "GetUser", Class: tenant.UpstreamPAT, Detail: err.Error()}
		}
		return nil
	})
}

// MarkPATVerified notes that Pin found the PAT to be the operator's.
func (s *Service) MarkPATVerified() { s.pat.set(PATWorks) }

// takeSlot waits for the next upstream call that is free. It returns *deferred if
// none is within patience.
func takeSlot(ctx context.Context, store Store, rate float64, patience time.Duration) error {
	if patience < 0 {
		return &deferred{}
	}
	slot, err := store.ReserveSlot(ctx, rate, patience)
	if err != nil {
		return err
	}
	if !slot.Granted {
		return &deferred{wait: slot.Wait}
	}
	wait := time.NewTimer(slot.Wait)
	defer wait.Stop()
	select {
	case <-wait.C:
		return nil
	case <-ctx.Done():
		return &deferred{}
	}
}

func (s *Service) takeSlot(ctx context.Context) error {
	// A slot that leaves no time for the call would be wasted.
	patience := s.CallTimeout
	if end, ok := ctx.Deadline(); ok {
		patience = time.Until(end) - s.CallTimeout
	}
	return takeSlot(ctx, s.Store, s.Rate, patience)
}

// send makes a call whose turn has come, and notes what it says of the PAT.
func (s *Service) send(ctx context.Context, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, s.CallTimeout)
	defer cancel()
	err := f(ctx)
	switch class := tenant.ClassOf(err); {
	case class == tenant.UpstreamPAT && s.PAT().State != PATForeign:
		s.pat.set(PATRefused)
	case err == nil && s.PAT().State != PATForeign:
		s.pat.set(PATWorks)
	}
	return err
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

// setback says what to write down for a try that failed with up, after attempts
// earlier ones. Before is the problem that stands.
func (s *Service) setback(up *tenant.UpstreamError, attempts int, before *tenant.Problem) tenant.Setback {
	p, ok := problems[up.Class]
	if !ok {
		p.code, p.detail = "upstream_failed", "Clarifai failed"
	}
	problem := tenant.Problem{Code: p.code, Detail: p.detail + ": " + up.Detail, UpstreamCode: up.Code,
		UpstreamRequestID: up.RequestID, Since: time.Now().UTC()}
	if before != nil && before.Code == problem.Code {
		problem.Since = before.Since
	}
	base, most := s.BackoffBase, s.BackoffCap
	if !p.soon { // somebody must act first
		base, most = 4*base, 4*most
	}
	return tenant.Setback{Problem: problem, Delay: backoff(base, most, attempts), Counts: true}
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
