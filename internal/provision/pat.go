package provision

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/keyring"
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

// A PAT is the operator's Personal Access Token in use, and how it was last
// found. It may be replaced while it is in use. It is safe for use by many
// goroutines.
type PAT struct {
	checking sync.Mutex // held while the PAT is being checked

	mu          sync.Mutex
	secret      tenant.Secret // guarded by mu, as all below
	fingerprint []byte
	health      PATHealth
	verified    bool // it is the operator's: calls may be made with it
}

// NewPAT returns a PAT that is not verified yet.
func NewPAT(secret tenant.Secret, keys *keyring.Keyring) *PAT {
	return &PAT{secret: secret, fingerprint: keys.PATFingerprint(secret), health: PATHealth{State: PATUnknown}}
}

// Secret returns the PAT in use.
func (p *PAT) Secret() tenant.Secret {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.secret
}

// Health returns how the PAT was last found.
func (p *PAT) Health() PATHealth {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.health
}

func (p *PAT) current() (secret tenant.Secret, fingerprint []byte, verified bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.secret, p.fingerprint, p.verified
}

// found notes how the PAT of that fingerprint was found; one that has been
// replaced since is nobody's business any more.
func (p *PAT) found(fingerprint []byte, state PATState) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !bytes.Equal(p.fingerprint, fingerprint) {
		return
	}
	now := time.Now()
	if p.health.State != state {
		p.health.State, p.health.Since = state, now
	}
	p.health.CheckedAt = now
	p.verified = state == PATWorks
}

func (p *PAT) replace(secret tenant.Secret, fingerprint []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	p.secret, p.fingerprint, p.verified = secret, fingerprint, true
	p.health = PATHealth{State: PATWorks, Since: now, CheckedAt: now}
}

// verifyPAT makes sure that the PAT is the deployment's operator's: with
// another's, every app would be made in the wrong account. It returns *deferred
// while the PAT cannot be used.
func (s *Service) verifyPAT(ctx context.Context) error {
	if !s.PAT.checking.TryLock() {
		return &deferred{wait: s.BackoffBase} // another worker does
	}
	defer s.PAT.checking.Unlock()
	secret, fingerprint, verified := s.PAT.current()
	if verified {
		return nil
	}
	free, wait, err := s.Store.ClaimPATCheck(ctx, fingerprint, s.WorkTimeout)
	if err != nil {
		return err
	}
	if !free {
		s.PAT.found(fingerprint, PATRefused)
		return &deferred{wait: wait}
	}
	t, err := s.takeSlot(ctx, incident, tenant.SlotRequest{PAT: fingerprint, ChecksPAT: true, Control: true})
	if err != nil {
		return err
	}
	return s.checkPAT(ctx, t, secret)
}

// checkPAT asks Clarifai whose a PAT is, and records the answer for all replicas
// that have it.
func (s *Service) checkPAT(ctx context.Context, t turn, secret tenant.Secret) error {
	refused := false
	err := s.send(ctx, t, func(ctx context.Context) error {
		operator, err := s.Upstream.Whoami(ctx, secret)
		up, state := asUpstream(err), PATRefused
		if err == nil {
			if err := checkOperator(s.Deployment, operator); err != nil {
				up, state = &tenant.UpstreamError{Call: "GetUser", Class: tenant.UpstreamPAT, Detail: err.Error()}, PATForeign
			}
		}
		if refused = up != nil && up.Class == tenant.UpstreamPAT; refused {
			// Before send lets the next call go.
			if err := s.refusePAT(ctx, t.pat, state, up); err != nil {
				return err
			}
		}
		return err
	})
	switch {
	case refused:
		return &deferred{wait: s.PATCheckBase}
	case err != nil:
		return err
	}
	news, err := s.Store.PATWorks(ctx, t.pat)
	if err != nil {
		return err
	}
	if news {
		s.Log.Info("the PAT works again; upstream work goes on")
	}
	s.PAT.found(t.pat, PATWorks)
	return nil
}

// refusePAT pauses the upstream work of every replica that has this PAT. Of all
// the calls that were refused, one is logged.
func (s *Service) refusePAT(ctx context.Context, fingerprint []byte, state PATState, up *tenant.UpstreamError) error {
	s.PAT.found(fingerprint, state)
	news, err := s.Store.RefusePAT(ctx, fingerprint, problemOf(up, nil), s.PATCheckBase, s.PATCheckCap)
	if err != nil {
		return err
	}
	if news {
		s.Log.Error("the PAT cannot be used; upstream work is paused until it is replaced or accepted again, look-ups go on", zap.Error(up))
	}
	return nil
}

// confirmRefusal finds out whether Clarifai refused the credential of a call because of the PAT, or
// because of the app or key that the call is about. It returns what the refusal means if the PAT
// works, or why the call must not be made now. Refusals of many calls cause one check of the PAT, and
// the result is trusted for a while.
func (s *Service) confirmRefusal(ctx context.Context, used turn, refusal *tenant.UpstreamError) error {
	secret, fingerprint, _ := s.PAT.current()
	if !bytes.Equal(fingerprint, used.pat) { // replaced meanwhile
		return &deferred{}
	}
	trust := s.PATTrust
	if aboutAccount[refusal.Call] {
		trust /= 4
	}
	works, check, err := s.Store.BeginPATCheck(ctx, fingerprint, trust, 2*s.CallTimeout)
	switch {
	case err != nil:
		return err
	case works:
		return refusedThough(refusal)
	case !check: // another call was refused too, and is being looked into
		return &deferred{wait: s.BackoffBase}
	}
	t, err := s.checkTurn(ctx, used, fingerprint, refusal)
	if err != nil {
		return err
	}
	if err := s.checkPAT(ctx, t, secret); err != nil && !s.lacksGetUser(ctx, err, fingerprint) {
		return err
	}
	if used.Probe {
		s.logAnswers()
	}
	return refusedThough(refusal)
}

// aboutAccount has the calls that name no existing app or key: what Clarifai refuses there it refuses the
// PAT.
var aboutAccount = map[string]bool{"GetUser": true, "ListApps": true, "ListKeys": true, callCreateApp: true}

// checkTurn returns the turn of the call that checks the PAT. A refusal of a call that is about no
// single app or key suggests that the PAT is rejected: no other call is made until the check is done.
func (s *Service) checkTurn(ctx context.Context, used turn, fingerprint []byte, refusal *tenant.UpstreamError) (turn, error) {
	if !aboutAccount[refusal.Call] {
		return s.takeSlot(ctx, incident, tenant.SlotRequest{PAT: fingerprint, ChecksPAT: true, Control: used.control})
	}
	slot, err := s.Store.Interrupt(ctx, used.Epoch, s.Rate, 2*s.CallTimeout, problemOf(refusal, nil))
	if err != nil {
		return turn{}, err
	}
	if !slot.Granted { // a pause has begun meanwhile
		return turn{}, &deferred{wait: s.BackoffBase}
	}
	if !sleep(ctx, slot.Wait) {
		return turn{}, &deferred{}
	}
	return turn{Slot: slot, due: time.Now(), pat: fingerprint, checksPAT: true, control: used.control, interrupts: true}, nil
}

// lacksGetUser reports whether a check of the PAT failed since the PAT, which Clarifai accepts, does
// not have the endpoint GetUser.
func (s *Service) lacksGetUser(ctx context.Context, err error, fingerprint []byte) bool {
	if tenant.ClassOf(err) != tenant.UpstreamForbidden {
		return false
	}
	if _, err := s.Store.PATWorks(ctx, fingerprint); err != nil {
		s.Log.Warn("record that the PAT works", zap.Error(err))
	}
	return true
}

// refusedThough is the refusal of a call whose PAT works.
func refusedThough(refusal *tenant.UpstreamError) error {
	of := *refusal
	of.Class, of.Detail = tenant.UpstreamRefused, "the credential is refused for this, though the PAT works: "+of.Detail
	return &of
}

// WatchPAT reads the PAT anew every interval until ctx ends. A new one takes over
// once Clarifai says that it is the same operator's; until then, and if it cannot
// be read, the one in use stays. Each fault is logged once.
func (s *Service) WatchPAT(ctx context.Context, read func() (tenant.Secret, error), interval time.Duration) {
	var said string // of the fault that stands
	once := func(text, key string, err error) {
		if key != said {
			said = key
			s.Log.Error(text, zap.Error(err))
		}
	}
	var refused []byte // the candidate that was refused last, and when to try it again
	var again time.Time
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		secret, err := read()
		if err != nil {
			once("the PAT cannot be read; the one in use stays", err.Error(), err)
			continue
		}
		candidate := s.Keyring.PATFingerprint(secret)
		_, inUse, _ := s.PAT.current()
		if bytes.Equal(candidate, inUse) {
			said, refused = "", nil
			continue
		}
		if bytes.Equal(candidate, refused) && time.Now().Before(again) {
			continue
		}
		switch err := s.takeOver(ctx, secret, candidate); {
		case err == nil:
			said, refused = "", nil
			s.Log.Info("a new PAT of the same operator is in use")
		case tenant.ClassOf(err) == tenant.UpstreamPAT:
			refused, again = candidate, time.Now().Add(s.PATCheckBase)
			once("the new PAT is refused; the one in use stays", "refused"+string(candidate), err)
		case ctx.Err() == nil:
			if d, ok := errors.AsType[*deferred](err); !ok || d.wait > s.BackoffCap {
				once("the new PAT cannot be checked yet; the one in use stays", "unchecked"+string(candidate), err)
			}
		}
	}
}

// takeOver puts a PAT in the place of the one in use, if it is the operator's.
func (s *Service) takeOver(ctx context.Context, secret tenant.Secret, candidate []byte) error {
	ctx, cancel := context.WithTimeout(ctx, s.WorkTimeout)
	defer cancel()
	t, err := s.takeSlot(ctx, incident, tenant.SlotRequest{PAT: candidate, ChecksPAT: true})
	if err != nil {
		return err
	}
	var operator tenant.UserID
	err = s.send(ctx, t, func(ctx context.Context) (err error) {
		operator, err = s.Upstream.Whoami(ctx, secret)
		return err
	})
	if err != nil {
		return err
	}
	if err := checkOperator(s.Deployment, operator); err != nil {
		return &tenant.UpstreamError{Call: "GetUser", Class: tenant.UpstreamPAT, Detail: err.Error()}
	}
	if _, err := s.Store.PATWorks(ctx, candidate); err != nil { // it may have been tried too early
		return err
	}
	s.PAT.replace(secret, candidate)
	return nil
}
