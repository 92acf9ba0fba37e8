package provision

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/tenant"
)

// Workers work on rows that are due. They lease the rows, run a step after another, and record what came
// of it: what failed stands in the row, which is due again later.
type Workers struct {
	s      *Service
	stop   context.CancelFunc // of the search for work
	cancel context.CancelFunc // of the work
	rows   sync.WaitGroup
	found  chan struct{} // closed when the search has ended
	wake   chan struct{} // holds one while there may be work for a free slot

	mu    sync.Mutex
	slots [tenant.Priorities]int  // that are free
	more  [tenant.Priorities]bool // more rows were due than there were free slots
}

// How often workers look for due rows: while they have work, often, since other replicas make work due,
// too. A search follows the last one after searchGap, or after as long as the last one took.
const (
	searchGap        = 5 * time.Millisecond
	searchesPerSweep = 4
	idleSweeps       = 2
)

// StartWork starts the workers of this replica: slots for that many interactive rows at once, an eighth of
// it for incidents, and a quarter each for bulk and background, or, where calls are shared, as many for background as fit into
// two calls. End them with Stop; ctx must not end before.
func (s *Service) StartWork(ctx context.Context, slots int) *Workers {
	search, stop := context.WithCancel(ctx)
	work, cancel := context.WithCancel(ctx)
	w := &Workers{s: s, stop: stop, cancel: cancel, found: make(chan struct{}), wake: make(chan struct{}, 1)}
	w.slots = [tenant.Priorities]int{max(1, slots/8), slots, max(1, slots/4), max(1, slots/4, min(slots, s.sharing()))}
	go w.search(search, work)
	return w
}

// Stop lets the workers end the rows that they have until ctx ends, then cancels them. It returns
// ctx's error if it had to.
func (w *Workers) Stop(ctx context.Context) error {
	w.stop()
	<-w.found
	ended := make(chan struct{})
	go func() { w.rows.Wait(); close(ended) }()
	select {
	case <-ended:
		w.cancel()
		return nil
	case <-ctx.Done():
		w.cancel()
		<-ended
		return context.Cause(ctx)
	}
}

// search looks for due rows until ctx ends, and starts work on them.
func (w *Workers) search(ctx, work context.Context) {
	defer close(w.found)
	failing := false
	for {
		began := time.Now()
		busy, err := w.start(ctx, work)
		if ctx.Err() != nil {
			return
		}
		switch {
		case err != nil && !failing:
			w.s.Log.Warn("search for due work failed; retrying", zap.Error(err))
		case err == nil && failing:
			w.s.Log.Info("search for due work succeeds again")
		}
		next := idleSweeps * w.s.SweepEvery
		if failing = err != nil; failing {
			next = w.s.SweepEvery
		} else if busy {
			next = w.s.SweepEvery / searchesPerSweep
		}
		if !sleep(ctx, max(searchGap, time.Since(began))) {
			return
		}
		timer := time.NewTimer(next)
		select {
		case <-timer.C:
		case <-w.s.Store.WorkDue():
		case <-w.wake:
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

// start leases due rows for the free slots, and starts work on them. It reports whether there is work.
func (w *Workers) start(ctx, work context.Context) (busy bool, err error) {
	w.mu.Lock()
	free, size := w.slots, 0
	for p, n := range free {
		w.more[p] = n == 0
		size += n
	}
	w.mu.Unlock()
	if size == 0 {
		return true, nil
	}
	searching, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	due, err := w.s.Store.DueWork(searching, free)
	if err != nil || len(due) == 0 {
		return false, err
	}
	leased, err := w.s.lease(searching, due) // some, if it failed
	w.mu.Lock()
	for _, d := range due {
		free[d.Priority]--
	}
	for _, row := range leased {
		w.slots[row.priority]--
	}
	for p, n := range free {
		w.more[p] = w.more[p] || n == 0
	}
	w.mu.Unlock()
	for _, row := range leased {
		w.rows.Go(func() { w.run(work, row) })
	}
	return true, err
}

func (w *Workers) run(ctx context.Context, row *leasedRow) {
	again, due := w.s.work(ctx, row)
	if due {
		time.AfterFunc(again, w.look)
	}
	w.mu.Lock()
	w.slots[row.priority]++
	more := w.more[row.priority]
	w.mu.Unlock()
	if more {
		w.look()
	}
}

// look makes the workers look for due rows soon.
func (w *Workers) look() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// A leasedRow is a row that a worker has, and what the worker does with it.
type leasedRow struct {
	tenant.Lease
	priority tenant.Priority
	share    string
	attempts int             // that failed
	problem  *tenant.Problem // the one that stands
	do       func(ctx context.Context, row *leasedRow) error
}

// lease leases rows. Of some, another worker may have been first. It returns those that it has leased,
// also if it fails.
func (s *Service) lease(ctx context.Context, due []tenant.DueWork) ([]*leasedRow, error) {
	of := map[string]tenant.DueWork{}
	ids := map[tenant.WorkKind][]uuid.UUID{}
	var apps []tenant.AppID
	for _, d := range due {
		of[d.ID] = d
		if d.Kind == tenant.AppWork {
			apps = append(apps, tenant.AppID(d.ID))
		} else {
			ids[d.Kind] = append(ids[d.Kind], uuid.MustParse(d.ID))
		}
	}
	var rows []*leasedRow
	var failures []error
	if len(apps) > 0 {
		leased, err := s.Store.LeaseApps(ctx, apps, s.Lease)
		failures = append(failures, err)
		for _, a := range leased {
			rows = append(rows, &leasedRow{Lease: a.Lease(), attempts: a.Attempts, problem: a.Problem,
				do: func(ctx context.Context, _ *leasedRow) error { return s.workApp(ctx, &a) }})
		}
	}
	if ids := ids[tenant.KeyWork]; len(ids) > 0 {
		leased, err := s.Store.LeaseKeys(ctx, ids, s.Lease)
		failures = append(failures, err)
		for _, k := range leased {
			rows = append(rows, &leasedRow{Lease: k.Lease(), attempts: k.Attempts, problem: k.Problem,
				do: func(ctx context.Context, row *leasedRow) error {
					defer func() { row.Lease = k.Lease() }() // another row may have taken its place
					return s.workKey(ctx, &k)
				}})
		}
	}
	if ids := ids[tenant.AdoptionWork]; len(ids) > 0 {
		leased, err := s.Store.LeaseAdoptions(ctx, ids, s.Lease)
		failures = append(failures, err)
		for _, a := range leased {
			rows = append(rows, &leasedRow{Lease: a.Lease(), attempts: a.Attempts, problem: a.Problem,
				do: func(ctx context.Context, _ *leasedRow) error { return s.workAdoption(ctx, a) }})
		}
	}
	if ids := ids[tenant.ReconciliationWork]; len(ids) > 0 {
		leased, err := s.Store.LeaseReconciliations(ctx, ids, s.Lease)
		failures = append(failures, err)
		for _, r := range leased {
			rows = append(rows, &leasedRow{Lease: r.Lease(), do: func(ctx context.Context, row *leasedRow) error {
				defer func() { row.attempts, row.problem = r.Attempts, r.Problem }()
				return s.workReconciliation(ctx, &r)
			}})
		}
	}
	if ids := ids[tenant.CampaignWork]; len(ids) > 0 {
		leased, err := s.Store.LeaseCampaigns(ctx, ids, s.Lease)
		failures = append(failures, err)
		for _, c := range leased {
			rows = append(rows, &leasedRow{Lease: c.Lease(), do: func(ctx context.Context, row *leasedRow) error {
				defer func() { row.attempts, row.problem = c.Attempts, c.Problem }()
				return s.workCampaign(ctx, &c)
			}})
		}
	}
	for _, row := range rows {
		row.priority, row.share = of[row.ID].Priority, of[row.ID].Share
	}
	return rows, errors.Join(failures...)
}

// An outcome is how the work on a row ended, for the metrics.
type outcome string

const (
	outcomeDone     outcome = "done"
	outcomeLost     outcome = "lost" // another worker has the row
	outcomeDeferred outcome = "deferred"
	outcomeSetback  outcome = "setback"
	outcomeGivenUp  outcome = "given_up"
	outcomeFailed   outcome = "failed" // a fault of ours or of the database
)

// recordTimeout limits the recording of how an attempt ended, also while the process stops.
const recordTimeout = 3 * time.Second

// errGivenUp ends the work on a row of which everything is recorded.
var errGivenUp = errors.New("given up")

// work works on a leased row and records how the attempt ended. It reports whether the row is due again,
// and after which time.
func (s *Service) work(ctx context.Context, row *leasedRow) (again time.Duration, due bool) {
	limited, cancel := context.WithTimeout(withShare(tenant.WithUpstreamTrace(ctx), row.share), s.JobTimeout)
	defer cancel()
	err := s.protected(limited, row)
	stopped, late := ctx.Err() != nil, limited.Err() != nil
	ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), recordTimeout)
	defer cancel()
	out, again := s.end(ctx, row, err, stopped, late)
	s.Metrics.worked(row.Kind, out)
	return again, out == outcomeDeferred || out == outcomeSetback
}

// protected works on a row. A panic is an error: it concerns this row only.
func (s *Service) protected(ctx context.Context, row *leasedRow) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return row.do(ctx, row)
}

// end records how an attempt ended, and when the row is due again. Stopped says that the process stops,
// and late that the attempt took too long.
func (s *Service) end(ctx context.Context, row *leasedRow, err error, stopped, late bool) (outcome, time.Duration) {
	field := zap.String(string(row.Kind), row.ID)
	d, isDeferred := errors.AsType[*deferred](err)
	stands, isStanding := errors.AsType[*standing](err)
	up := asUpstream(err)
	var set tenant.Setback
	switch {
	case err == nil:
		return outcomeDone, 0
	case errors.Is(err, errGivenUp):
		return outcomeGivenUp, 0
	case errors.Is(err, tenant.ErrLeaseLost): // perhaps only its state has moved on
		return s.release(ctx, row, 0, field)
	case isDeferred:
		return s.release(ctx, row, d.bounded(), field)
	case stopped || late && up != nil: // Clarifai did nothing wrong
		return s.release(ctx, row, 0, field)
	case isStanding:
		set = tenant.Setback{Problem: stands.problem, Delay: backoff(4*s.BackoffBase, 4*s.BackoffCap, row.attempts), Counts: true}
	case up != nil:
		set = s.setback(up, row.attempts, row.problem)
		set.Settled = !up.Unclear && (up.Call == callCreateApp || up.Call == callCreateKey)
		s.Log.Warn("work set back", field, zap.String("problem", set.Problem.Code), zap.Duration("again_in", set.Delay), zap.Error(up))
	default:
		set = tenant.Setback{Delay: backoff(s.BackoffBase, s.BackoffCap, row.attempts), Counts: true, Problem: tenant.Problem{
			Code: "internal", Detail: "Tenantry or its database failed; the log of its replicas says how", Since: time.Now().UTC()}}
		s.Log.Error("work failed", field, zap.Duration("again_in", set.Delay), zap.Error(err))
	}
	if row.problem != nil && row.problem.Code == set.Problem.Code {
		set.Problem.Since = row.problem.Since
	}
	if err := s.Store.SetBack(ctx, row.Lease, set); err != nil {
		return s.unrecorded(err, field)
	}
	return outcomeSetback, set.Delay
}

func (s *Service) release(ctx context.Context, row *leasedRow, delay time.Duration, field zap.Field) (outcome, time.Duration) {
	if err := s.Store.Release(ctx, row.Lease, delay); err != nil {
		return s.unrecorded(err, field)
	}
	return outcomeDeferred, delay
}

// unrecorded is the outcome of an attempt that could not be recorded: the row is due again once its lease
// has ended.
func (s *Service) unrecorded(err error, field zap.Field) (outcome, time.Duration) {
	if errors.Is(err, tenant.ErrLeaseLost) {
		return outcomeLost, 0
	}
	s.Log.Warn("end of work not recorded", field, zap.Error(err))
	return outcomeFailed, 0
}
