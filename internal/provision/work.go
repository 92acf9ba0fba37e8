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
// of it: what failed stands in the row, which is due again later. Each kind of work has a search of its own, so that
// a locked table stops no other kind.
type Workers struct {
	s        *Service
	stop     context.CancelFunc // of the searches for work
	cancel   context.CancelFunc // of the work
	searches sync.WaitGroup
	rows     sync.WaitGroup
	wake     map[tenant.WorkKind]chan struct{} // each holds one while there may be work for a free slot
	size     [tenant.Priorities]int            // of slots

	mu     sync.Mutex
	free   [tenant.Priorities]int                      // slots
	atWork map[callTurn]int                            // rows of each share
	more   map[tenant.WorkKind][tenant.Priorities]bool // rows that are due may wait for a slot
}

// How often workers look for due rows: while they have work, often, since other replicas make work due,
// too. A search follows the last one of its kind after searchGap, or after as long as the last one took. Without
// searchTimeout, a search on a dead connection would outlast the outage.
const (
	searchGap        = 5 * time.Millisecond
	searchTimeout    = 3 * time.Second
	searchesPerSweep = 4
	idleSweeps       = 2
)

// StartWork starts the workers of this replica: slots for that many interactive rows at once, an eighth of
// it for incidents, and a quarter each for bulk and background, or, where calls are shared, as many for background as fit into
// two calls. End them with Stop; ctx must not end before.
func (s *Service) StartWork(ctx context.Context, slots int) *Workers {
	search, stop := context.WithCancel(ctx)
	work, cancel := context.WithCancel(ctx)
	w := &Workers{s: s, stop: stop, cancel: cancel, wake: map[tenant.WorkKind]chan struct{}{}, atWork: map[callTurn]int{},
		more: map[tenant.WorkKind][tenant.Priorities]bool{}}
	w.size = [tenant.Priorities]int{max(1, slots/8), slots, max(1, slots/4), max(1, slots/4, min(slots, s.sharing()))}
	w.free = w.size
	for _, kind := range tenant.WorkKinds {
		w.wake[kind] = make(chan struct{}, 1)
	}
	for _, kind := range tenant.WorkKinds {
		w.searches.Go(func() { w.search(search, work, kind) })
	}
	return w
}

// Stop lets the workers end the rows that they have until ctx ends, then cancels them. It returns
// ctx's error if it had to.
func (w *Workers) Stop(ctx context.Context) error {
	w.stop()
	w.searches.Wait()
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

// search looks for due rows of a kind until ctx ends, and starts work on them.
func (w *Workers) search(ctx, work context.Context, kind tenant.WorkKind) {
	failing := false
	for {
		began := time.Now()
		busy, err := w.start(ctx, work, kind)
		if ctx.Err() != nil {
			return
		}
		field := zap.String("kind", string(kind))
		switch {
		case err != nil && !failing:
			w.s.Log.Warn("search for due work failed; retrying", field, zap.Error(err))
		case err == nil && failing:
			w.s.Log.Info("search for due work succeeds again", field)
		}
		gap, next := max(searchGap, time.Since(began)), idleSweeps*w.s.SweepEvery
		if failing = err != nil; failing {
			gap, next = searchGap, w.s.SweepEvery
		} else if busy {
			next = w.s.SweepEvery / searchesPerSweep
		}
		if !sleep(ctx, gap) {
			return
		}
		timer := time.NewTimer(next)
		select {
		case <-timer.C:
		case <-w.s.Store.WorkDue(kind):
		case <-w.wake[kind]:
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

// start leases due rows of a kind for the free slots, and starts work on them. It reports whether there is
// work.
func (w *Workers) start(ctx, work context.Context, kind tenant.WorkKind) (busy bool, err error) {
	w.mu.Lock()
	free := w.free
	w.mu.Unlock()
	if free == [tenant.Priorities]int{} {
		w.take(kind, free, nil)
		return true, nil
	}
	searching, cancel := context.WithTimeout(ctx, searchTimeout)
	defer cancel()
	due, err := w.s.Store.DueWork(searching, kind, free)
	if err != nil {
		return false, err
	}
	taken := w.take(kind, free, due)
	if len(taken) == 0 {
		return len(due) > 0, nil
	}
	leased, err := w.s.lease(searching, kind, taken)
	rows := map[string]*leasedRow{}
	for _, row := range leased {
		rows[row.ID] = row
	}
	for _, d := range taken {
		row := rows[d.ID]
		if row == nil {
			w.giveBack(d)
			continue
		}
		w.rows.Go(func() {
			again, due := w.s.work(work, row)
			if due {
				time.AfterFunc(again, func() { w.look(kind) })
			}
			w.giveBack(d)
		})
	}
	return true, err
}

// take takes slots for due rows of a kind, and returns the rows that it has slots for. Found is how many
// slots of each priority were free before the search. A share that has rows in progress leaves a quarter of the
// slots free for other shares: slow calls for one share must not occupy all slots.
func (w *Workers) take(kind tenant.WorkKind, found [tenant.Priorities]int, due []tenant.DueWork) (taken []tenant.DueWork) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var more [tenant.Priorities]bool
	for p := range found {
		more[p] = found[p] == 0
	}
	for _, d := range due {
		p, turn := d.Priority, callTurn{d.Priority, d.Share}
		found[p]--
		left := w.free[p]
		if w.atWork[turn] > 0 {
			left -= w.size[p] / 4
		}
		if more[p] = more[p] || found[p] == 0 || left <= 0; left <= 0 {
			continue
		}
		w.free[p]--
		w.atWork[turn]++
		taken = append(taken, d)
	}
	w.more[kind] = more
	return taken
}

// giveBack gives back the slot of a row.
func (w *Workers) giveBack(d tenant.DueWork) {
	w.mu.Lock()
	defer w.mu.Unlock()
	turn := callTurn{d.Priority, d.Share}
	w.free[d.Priority]++
	if w.atWork[turn]--; w.atWork[turn] == 0 {
		delete(w.atWork, turn)
	}
	for kind, more := range w.more {
		if more[d.Priority] {
			w.look(kind)
		}
	}
}

// look makes the workers look for due rows of a kind soon.
func (w *Workers) look(kind tenant.WorkKind) {
	select {
	case w.wake[kind] <- struct{}{}:
	default:
	}
}

// A leasedRow is a row that a worker has, and what the worker does with it.
type leasedRow struct {
	tenant.Lease
	share    string
	attempts int             // that failed
	problem  *tenant.Problem // the one that stands
	do       func(ctx context.Context, row *leasedRow) error
}

// lease leases due rows of a kind. Of some, another worker may have been first.
func (s *Service) lease(ctx context.Context, kind tenant.WorkKind, due []tenant.DueWork) (rows []*leasedRow, err error) {
	var apps []tenant.AppID
	var ids []uuid.UUID
	shares := map[string]string{}
	for _, d := range due {
		shares[d.ID] = d.Share
		if kind == tenant.AppWork {
			apps = append(apps, tenant.AppID(d.ID))
		} else {
			ids = append(ids, uuid.MustParse(d.ID))
		}
	}
	add := func(row *leasedRow) {
		row.share = shares[row.ID]
		rows = append(rows, row)
	}
	switch kind {
	case tenant.AppWork:
		leased, err := s.Store.LeaseApps(ctx, apps, s.Lease)
		for _, a := range leased {
			add(&leasedRow{Lease: a.Lease(), attempts: a.Attempts, problem: a.Problem,
				do: func(ctx context.Context, _ *leasedRow) error { return s.workApp(ctx, &a) }})
		}
		return rows, err
	case tenant.KeyWork:
		leased, err := s.Store.LeaseKeys(ctx, ids, s.Lease)
		for _, k := range leased {
			add(&leasedRow{Lease: k.Lease(), attempts: k.Attempts, problem: k.Problem,
				do: func(ctx context.Context, row *leasedRow) error {
					defer func() { row.Lease = k.Lease() }() // another row may have taken its place
					return s.workKey(ctx, &k)
				}})
		}
		return rows, err
	case tenant.AdoptionWork:
		leased, err := s.Store.LeaseAdoptions(ctx, ids, s.Lease)
		for _, a := range leased {
			add(&leasedRow{Lease: a.Lease(), attempts: a.Attempts, problem: a.Problem,
				do: func(ctx context.Context, _ *leasedRow) error { return s.workAdoption(ctx, a) }})
		}
		return rows, err
	case tenant.ReconciliationWork:
		leased, err := s.Store.LeaseReconciliations(ctx, ids, s.Lease)
		for _, r := range leased {
			add(&leasedRow{Lease: r.Lease(), do: func(ctx context.Context, row *leasedRow) error {
				defer func() { row.attempts, row.problem = r.Attempts, r.Problem }()
				return s.workReconciliation(ctx, &r)
			}})
		}
		return rows, err
	default:
		leased, err := s.Store.LeaseCampaigns(ctx, ids, s.Lease)
		for _, c := range leased {
			add(&leasedRow{Lease: c.Lease(), do: func(ctx context.Context, row *leasedRow) error {
				defer func() { row.attempts, row.problem = c.Attempts, c.Problem }()
				return s.workCampaign(ctx, &c)
			}})
		}
		return rows, err
	}
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
	limited, cancel := context.WithTimeout(withShare(tenant.WithUpstreamTrace(ctx), row.share), s.WorkTimeout)
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
