package provision

import (
	"context"
	"errors"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/tenant"
)

// HasProblem reports whether a class of upstream failure has words of its own.
func HasProblem(c tenant.UpstreamClass) bool { return problems[c].detail != "" }

// Backoff is backoff, for its test.
var Backoff = backoff

// Work on one row if it is due, and one turn of the sweep, for tests that say when each runs.
func (s *Service) WorkApp(ctx context.Context, id tenant.AppID) {
	s.workRow(ctx, tenant.AppWork, string(id))
}
func (s *Service) WorkKey(ctx context.Context, id uuid.UUID) {
	s.workRow(ctx, tenant.KeyWork, id.String())
}
func (s *Service) WorkReconciliation(ctx context.Context, id uuid.UUID) {
	s.workRow(ctx, tenant.ReconciliationWork, id.String())
}
func (s *Service) WorkCampaign(ctx context.Context, id uuid.UUID) {
	s.workRow(ctx, tenant.CampaignWork, id.String())
}
func (s *Service) workRow(ctx context.Context, kind tenant.WorkKind, id string) {
	rows, err := s.lease(ctx, kind, []tenant.DueWork{{ID: id}})
	if err != nil {
		s.Log.Error("lease row", zap.Error(err))
	}
	for _, row := range rows {
		s.work(ctx, row)
	}
}
func (s *Service) RotateAged(ctx context.Context) error { return s.rotateAged(ctx) }
func (s *Service) ControlOnce(ctx context.Context) error {
	err := s.control(ctx)
	_, failed := s.askUnknownKey(ctx)
	return errors.Join(err, failed)
}

// SendLate makes a call for the control record whose permit is so old that it must be replaced.
func (s *Service) SendLate(ctx context.Context, f func(context.Context) error) error {
	_, fingerprint, _ := s.PAT.current()
	t, err := s.takeSlot(ctx, incident, tenant.SlotRequest{PAT: fingerprint, Control: true})
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

// PauseAfter is the pause after a turn of a step that is due every so often, after so many failures.
func (s *Service) PauseAfter(every time.Duration, failures int) time.Duration {
	return s.pauseAfter(step{every: every}, failures)
}
