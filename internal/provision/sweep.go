package provision

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/tenant"
)

// How often a step of the sweep is done that need not be done at each turn.
const (
	measureEvery   = 15 * time.Second
	forgetEvery    = time.Minute
	partitionEvery = 6 * time.Hour
)

// stepTimeout limits one turn of a step.
const stepTimeout = 30 * time.Second

// A step is a part of the sweep. Each step has its own turns, limit and failures: one that fails or is
// slow stops no other.
type step struct {
	name  string
	every time.Duration // 0 means SweepEvery
	do    func(ctx context.Context) error
}

// steps are the parts of the sweep: they do what a crash or a lost wake-up left undone, and what becomes due with time.
func (s *Service) steps() []step {
	return []step{
		{"beat", 0, s.beat},
		{"claim apps", 0, s.eachProfile(func(ctx context.Context, p tenant.Profile) error {
			_, err := s.Store.Claim(ctx, p.Name, worker)
			return err
		})},
		{"keep pools", 0, s.keepPools},
		{"claim apps in the background", 0, s.eachProfile(func(ctx context.Context, p tenant.Profile) error {
			return s.Store.ClaimInBackground(ctx, p, worker)
		})},
		{"start builds", 0, s.eachProfile(func(ctx context.Context, p tenant.Profile) error {
			return s.Store.StartBuilds(ctx, s.nextBuilds(p, s.MaxBuilds+s.importBuilds(s.ItemsPerCall)))
		})},
		{"start reports", 0, s.startDueReports},
		{"end keys", 0, func(ctx context.Context) error { return s.Store.EndDueKeys(ctx, worker) }},
		{"settle tenants", 0, func(ctx context.Context) error { return s.Store.SettleTenants(ctx, worker) }},
		{"note profiles", partitionEvery, func(ctx context.Context) error { return s.Store.NoteProfiles(ctx, s.Profiles) }},
		{"rotate by age", s.AgeEvery, s.rotateAged},
		{"add up tenant counts", measureEvery, func(ctx context.Context) error { return s.Store.FoldTenantCounts(ctx) }},
		{"measure", measureEvery, s.measure},
		{"forget adoptions", forgetEvery, func(ctx context.Context) error { return s.Store.ForgetAdoptions(ctx) }},
		{"make audit partitions", partitionEvery, func(ctx context.Context) error { return s.Store.MakeAuditPartitions(ctx) }},
	}
}

// eachProfile does something for each profile, also after it failed for another.
func (s *Service) eachProfile(do func(context.Context, tenant.Profile) error) func(context.Context) error {
	return func(ctx context.Context) error {
		var failures []error
		for _, p := range s.Profiles {
			if err := do(ctx, p); err != nil {
				failures = append(failures, fmt.Errorf("profile %s: %w", p.Name, err))
			}
		}
		return errors.Join(failures...)
	}
}

// Sweep repeats the steps of the sweep until ctx ends. Every replica sweeps.
func (s *Service) Sweep(ctx context.Context) error {
	var loops sync.WaitGroup
	for _, st := range s.steps() {
		loops.Go(func() { s.repeat(ctx, st) })
	}
	loops.Wait()
	return nil
}

// repeat does a step again and again until ctx ends.
func (s *Service) repeat(ctx context.Context, st step) {
	failures := 0 // in a row
	for {
		err := s.turnOf(ctx, st)
		if ctx.Err() != nil {
			return
		}
		field := zap.String("step", st.name)
		switch {
		case err != nil && failures == 0:
			s.Log.Warn("step of the sweep failed; retrying", field, zap.Error(err))
		case err == nil && failures > 0:
			s.Log.Info("step of the sweep works again", field)
		}
		if failures++; err == nil {
			failures = 0
		}
		every := s.pauseAfter(st, failures)
		select {
		case <-ctx.Done():
			return
		// Replicas that started together must not sweep together.
		case <-time.After(every*3/4 + rand.N(every/2)):
		}
	}
}

// pauseAfter returns the time until the next turn of a step, after so many failures in a row. A rare step is
// retried sooner than it is due, but less and less often: each turn may read much or lock a table.
func (s *Service) pauseAfter(st step, failures int) time.Duration {
	every := max(s.SweepEvery, st.every)
	if failures == 0 {
		return every
	}
	return min(every, max(s.SweepEvery, st.every/60)<<min(failures-1, 6))
}

func (s *Service) turnOf(ctx context.Context, st step) error {
	limited, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	err := st.do(limited)
	if err != nil && ctx.Err() == nil {
		s.Metrics.sweepFailures.WithLabelValues(st.name).Inc()
	}
	return err
}
