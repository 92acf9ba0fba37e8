package provision

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/riverqueue/river"
	"github.com/riverqueue/river/riverdriver/riverpgxv5"
	"go.uber.org/zap"
	"go.uber.org/zap/exp/zapslog"
	"go.uber.org/zap/zapcore"

	"github.com/tenantry/tenantry/internal/tenant"
)

// StartJobs starts the workers of the job queue: that many builds at once, a quarter
// of it of keys in the urgent lane, and a quarter of other work, or, where calls are
// shared, twice as many as fit into one: while some make their apps others make their keys. Stop the client that it returns before closing
// direct, whose connections are sessions.
//
// Workers never fail a job: what went wrong stands in the row, and the sweep
// comes back to it.
func (s *Service) StartJobs(ctx context.Context, direct *pgxpool.Pool, workers int) (*river.Client[pgx.Tx], error) {
	w := river.NewWorkers()
	river.AddWorker(w, &appWorker{s: s})
	river.AddWorker(w, &keyWorker{s: s})
	river.AddWorker(w, &adoptionWorker{s: s})
	river.AddWorker(w, &reconciliationWorker{s: s})
	river.AddWorker(w, &campaignWorker{s: s})
	// The queue's own news are of no use to operators.
	quiet, err := zapcore.NewIncreaseLevelCore(s.Log.Named("river").Core(), zapcore.WarnLevel)
	if err != nil { // the log is quieter than that already
		quiet = s.Log.Core()
	}
	client, err := river.NewClient(riverpgxv5.New(direct), &river.Config{
		Workers: w,
		Queues: map[string]river.QueueConfig{
			tenant.QueueUrgent:      {MaxWorkers: max(1, workers/4), FetchCooldown: tenant.InteractiveCooldown, FetchPollInterval: 50 * time.Millisecond},
			tenant.QueueInteractive: {MaxWorkers: workers, FetchCooldown: tenant.InteractiveCooldown, FetchPollInterval: 50 * time.Millisecond},
			tenant.QueueBackground:  {MaxWorkers: max(1, workers/4, min(workers, s.sharing()))},
		},
		JobTimeout:                  s.JobTimeout,
		RescueStuckJobsAfter:        s.Lease,
		CompletedJobRetentionPeriod: 10 * time.Minute,
		Logger:                      slog.New(zapslog.NewHandler(quiet)),
	})
	if err != nil {
		return nil, fmt.Errorf("prepare jobs: %w", err)
	}
	if err := client.Start(ctx); err != nil {
		return nil, fmt.Errorf("start jobs: %w", err)
	}
	return client, nil
}

type appWorker struct {
	river.WorkerDefaults[tenant.AppJob]
	s *Service
}

func (w *appWorker) Timeout(*river.Job[tenant.AppJob]) time.Duration { return w.s.JobTimeout }

func (w *appWorker) Work(ctx context.Context, job *river.Job[tenant.AppJob]) error {
	w.s.Metrics.job(job.Kind, w.s.workApp(ctx, job.Args.AppID))
	return nil
}

type keyWorker struct {
	river.WorkerDefaults[tenant.KeyJob]
	s *Service
}

func (w *keyWorker) Timeout(*river.Job[tenant.KeyJob]) time.Duration { return w.s.JobTimeout }

func (w *keyWorker) Work(ctx context.Context, job *river.Job[tenant.KeyJob]) error {
	w.s.Metrics.job(job.Kind, w.s.workKey(ctx, job.Args.KeyID))
	return nil
}

type adoptionWorker struct {
	river.WorkerDefaults[tenant.AdoptionJob]
	s *Service
}

func (w *adoptionWorker) Timeout(*river.Job[tenant.AdoptionJob]) time.Duration { return w.s.JobTimeout }

func (w *adoptionWorker) Work(ctx context.Context, job *river.Job[tenant.AdoptionJob]) error {
	w.s.Metrics.job(job.Kind, w.s.workAdoption(ctx, job.Args.AdoptionID))
	return nil
}

type reconciliationWorker struct {
	river.WorkerDefaults[tenant.ReconciliationJob]
	s *Service
}

func (w *reconciliationWorker) Timeout(*river.Job[tenant.ReconciliationJob]) time.Duration {
	return w.s.JobTimeout
}

func (w *reconciliationWorker) Work(ctx context.Context, job *river.Job[tenant.ReconciliationJob]) error {
	w.s.Metrics.job(job.Kind, w.s.workReconciliation(ctx, job.Args.ReconciliationID))
	return nil
}

type campaignWorker struct {
	river.WorkerDefaults[tenant.CampaignJob]
	s *Service
}

func (w *campaignWorker) Timeout(*river.Job[tenant.CampaignJob]) time.Duration { return w.s.JobTimeout }

func (w *campaignWorker) Work(ctx context.Context, job *river.Job[tenant.CampaignJob]) error {
	w.s.Metrics.job(job.Kind, w.s.workCampaign(ctx, job.Args.CampaignID))
	return nil
}

// How often a step of the sweep is done that need not be done at each turn.
const (
	measureEvery   = 15 * time.Second
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

// steps are the parts of the sweep: they do what a crash, a lost job or a lost wake-up left undone.
func (s *Service) steps() []step {
	steps := []step{
		{"beat", 0, s.beat},
		{"claim apps", 0, s.eachProfile(func(ctx context.Context, p tenant.Profile) error {
			_, err := s.Store.Claim(ctx, p.Name, worker)
			return err
		})},
		{"start builds", 0, s.eachProfile(func(ctx context.Context, p tenant.Profile) error {
			return s.Store.StartBuilds(ctx, p, s.newAppIDs(s.MaxBuilds))
		})},
		{"keep pools", 0, s.keepPools},
		{"start reports", 0, s.startDueReports},
		{"end keys", 0, func(ctx context.Context) error { return s.Store.EndDueKeys(ctx, worker) }},
		{"settle tenants", 0, func(ctx context.Context) error { return s.Store.SettleTenants(ctx, worker) }},
		{"note profiles", partitionEvery, func(ctx context.Context) error { return s.Store.NoteProfiles(ctx, s.Profiles) }},
		{"rotate by age", s.AgeEvery, s.rotateAged},
		{"measure", measureEvery, s.measure},
		{"make audit partitions", partitionEvery, func(ctx context.Context) error { return s.Store.MakeAuditPartitions(ctx) }},
	}
	for _, kind := range tenant.WorkKinds {
		steps = append(steps, step{"enqueue " + string(kind), 0, func(ctx context.Context) error {
			_, err := s.Store.Enqueue(ctx, kind)
			return err
		}})
	}
	return steps
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
	failing := false
	for {
		err := s.turnOf(ctx, st)
		if ctx.Err() != nil {
			return
		}
		field := zap.String("step", st.name)
		switch {
		case err != nil && !failing:
			s.Log.Warn("step of the sweep failed; retrying", field, zap.Error(err))
		case err == nil && failing:
			s.Log.Info("step of the sweep works again", field)
		}
		failing = err != nil
		every := max(s.SweepEvery, st.every)
		if failing { // a rare step is repeated sooner, but not at each turn: it may lock a table
			every = max(s.SweepEvery, st.every/60)
		}
		select {
		case <-ctx.Done():
			return
		// Replicas that started together must not sweep together.
		case <-time.After(every*3/4 + rand.N(every/2)):
		}
	}
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
