package provision

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
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

// How often the sweep does what need not be done at every turn.
const (
	measureEvery   = 15 * time.Second
	partitionEvery = 6 * time.Hour
)

// Sweep makes good what a crash, a lost job or a lost wake-up left undone, turn
// by turn until ctx ends: it gives ready apps to waiting tenants, begins the
// builds they want for, and enqueues the rows that are due. Every replica sweeps.
func (s *Service) Sweep(ctx context.Context) error {
	var measured, partitioned, aged time.Time
	failing, noted := false, false
	for {
		err := s.sweep(ctx)
		if err == nil && time.Since(measured) >= measureEvery {
			if err = s.measure(ctx); err == nil {
				measured = time.Now()
			}
		}
		if err == nil && time.Since(partitioned) >= partitionEvery {
			if err = s.Store.MakeAuditPartitions(ctx); err == nil {
				partitioned = time.Now()
			}
		}
		if err == nil && !noted {
			err = s.Store.NoteProfiles(ctx, s.Profiles)
			noted = err == nil
		}
		if err == nil && time.Since(aged) >= s.AgeEvery {
			if err = s.rotateAged(ctx); err == nil {
				aged = time.Now()
			}
		}
		if ctx.Err() != nil {
			return nil
		}
		switch {
		case err != nil && !failing:
			s.Log.Warn("the sweep fails and is tried again at every turn", zap.Error(err))
		case err == nil && failing:
			s.Log.Info("the sweep works again")
		}
		failing = err != nil
		select {
		case <-ctx.Done():
			return nil
		// Replicas that started together must not sweep together.
		case <-time.After(s.SweepEvery*3/4 + rand.N(s.SweepEvery/2)):
		}
	}
}

func (s *Service) sweep(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := s.beat(ctx); err != nil {
		return fmt.Errorf("sweep: %w", err)
	}
	for _, p := range s.Profiles {
		if _, err := s.Store.Claim(ctx, p.Name, worker); err != nil {
			return fmt.Errorf("sweep: %w", err)
		}
		if err := s.Store.StartBuilds(ctx, p, s.newAppIDs(s.MaxBuilds)); err != nil {
			return fmt.Errorf("sweep: %w", err)
		}
	}
	if err := s.keepPools(ctx); err != nil {
		return fmt.Errorf("sweep: %w", err)
	}
	if err := s.startDueReports(ctx); err != nil {
		return fmt.Errorf("sweep: %w", err)
	}
	if err := s.Store.EndDueKeys(ctx, worker); err != nil {
		return fmt.Errorf("sweep: %w", err)
	}
	if err := s.Store.SettleTenants(ctx, worker); err != nil {
		return fmt.Errorf("sweep: %w", err)
	}
	if _, err := s.Store.Enqueue(ctx); err != nil {
		return fmt.Errorf("sweep: %w", err)
	}
	return nil
}
