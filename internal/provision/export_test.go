package provision

import (
	"context"
	"errors"
	"time"

	"github.com/google/uuid"

	"github.com/tenantry/tenantry/internal/tenant"
)

// HasProblem reports whether a class of upstream failure has words of its own.
func HasProblem(c tenant.UpstreamClass) bool { return problems[c].detail != "" }

// Backoff is backoff, for its test.
var Backoff = backoff

// The jobs and one turn of the sweep, for tests that say when each runs.
func (s *Service) WorkApp(ctx context.Context, id tenant.AppID) { s.workApp(ctx, id) }
func (s *Service) WorkKey(ctx context.Context, id uuid.UUID)    { s.workKey(ctx, id) }
func (s *Service) WorkReconciliation(ctx context.Context, id uuid.UUID) {
	s.workReconciliation(ctx, id)
}
func (s *Service) WorkCampaign(ctx context.Context, id uuid.UUID) { s.workCampaign(ctx, id) }
func (s *Service) RotateAged(ctx context.Context) error           { return s.rotateAged(ctx) }
func (s *Service) ControlOnce(ctx context.Context) error {
	err := s.control(ctx)
	_, failed := s.askUnknownKey(ctx)
	return errors.Join(err, failed)
}

// SendLate makes a call for the control record whose permit is so old that it must be replaced.
func (s *Service) SendLate(ctx context.Context, f func(context.Context) error) error {
	_, fingerprint, _ := s.PAT.current()
	t, err := s.takeSlot(ctx, urgent, tenant.SlotRequest{PAT: fingerprint, Control: true})
	if err != nil {
		return err
	}
	t.due = t.due.Add(-time.Minute)
	return s.send(ctx, t, f)
}

func (s *Service) SweepOnce(ctx context.Context) error {
	var failures []error
	for _, st := range s.steps() {
		if st.every == 0 {
			failures = append(failures, s.turnOf(ctx, st))
		}
	}
	return errors.Join(failures...)
}

// How demand is measured, for the tests of the pool.
const (
	PoolBeat   = poolBeat
	PoolBeats  = poolBeats
	PoolBuilds = poolBuilds
	PoolDrain  = poolDrain

	CallsPerSignUp = callsPerSignUp
)

// PoolTarget is poolTarget.
var PoolTarget = poolTarget
