package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"

	"github.com/tenantry/tenantry/internal/clarifaisim"
)

// measure prints how long things take, and what share of the rate is reached. With onlyPriorities it
// measures only those.
func measure(ctx context.Context, dir string, onlyPriorities bool, say func(string, ...any)) error {
	if err := priorities(ctx, filepath.Join(dir, "priorities"), say); err != nil {
		return fmt.Errorf("measure priorities: %w", err)
	}
	if onlyPriorities {
		return nil
	}
	recovered, err := recovery(ctx, filepath.Join(dir, "recovery"))
	if err != nil {
		return fmt.Errorf("measure recovery: %w", err)
	}
	say("kill -9 of a replica in mid-build: the tenant is active %.1f s later", recovered.Seconds())
	for _, n := range []int{1, 2, 8} {
		most, share, err := reached(ctx, filepath.Join(dir, fmt.Sprint("rate-", n)), n)
		if err != nil {
			return fmt.Errorf("measure the rate: %w", err)
		}
		say("%d replicas at %d calls a second: %d in the busiest second, %.1f %% of the rate reached", n, rate, most, 100*share)
	}
	took, err := suspensions(ctx, filepath.Join(dir, "suspensions"))
	if err != nil {
		return fmt.Errorf("measure suspensions: %w", err)
	}
	say("%d suspensions, one after the other, while sign-ups use up the rate: no key works after %.2f s in the median, %.2f s at worst",
		len(took), took[len(took)/2].Seconds(), took[len(took)-1].Seconds())
	for _, wakes := range []bool{true, false} {
		took, err := propagation(ctx, filepath.Join(dir, fmt.Sprint("propagation-", wakes)), wakes)
		if err != nil {
			return fmt.Errorf("measure how changes spread: %w", err)
		}
		how := "with wake-ups"
		if !wakes {
			how = "with every wake-up lost"
		}
		say("%d changes of a tenant that another replica has in memory, %s: shown there after %d ms in the median, %d ms at worst",
			len(took), how, took[len(took)/2].Milliseconds(), took[len(took)-1].Milliseconds())
	}
	return nil
}

// suspensions suspends tenants while more sign-ups wait than the rate allows. It
// returns how long each took from the request to the answer that no key works, the
// shortest first.
func suspensions(ctx context.Context, dir string) (took []time.Duration, err error) {
	s, err := raise(ctx, dir, setting{replicas: 2, connections: 16})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.strike()) }()
	const suspended, waiting = 30, 1000
	l := newLoad(s, 0)
	r := rand.New(rand.NewPCG(0, 0))
	signUp := func(kind string, n int) error {
		for i := range n {
			if _, _, err := l.request(ctx, r, http.MethodPut, fmt.Sprint("/v1/tenants/", kind, i), "Prefer", "respond-async"); err != nil {
				return err
			}
		}
		return nil
	}
	if err := signUp("suspended_", suspended); err != nil {
		return nil, err
	}
	keys := func() (int, error) {
		var state clarifaisim.State
		err := s.sim(ctx, http.MethodGet, "state", nil, &state)
		return state.Keys, err
	}
	if err := await(ctx, 2*time.Minute, "the tenants are active", func() (bool, error) {
		n, err := keys()
		return n == suspended, err
	}); err != nil {
		return nil, err
	}
	if err := signUp("waiting_", waiting); err != nil {
		return nil, err
	}
	for i := range suspended {
		began := time.Now()
		status, body, err := l.request(ctx, r, http.MethodPost, fmt.Sprintf("/v1/tenants/suspended_%d/suspend", i), "Prefer", "wait=60")
		if err == nil && status != http.StatusOK {
			err = fmt.Errorf("a suspension is answered %d %s", status, body)
		}
		if err != nil {
			return nil, err
		}
		took = append(took, time.Since(began))
	}
	if n, err := keys(); err != nil || n >= waiting {
		return nil, errors.Join(err, fmt.Errorf("%d keys: the sign-ups were over before the last suspension", n))
	}
	slices.Sort(took)
	return took, nil
}

// priorities revokes the keys of CHAOS_REVOCATIONS (1,000) tenants at once, lets another caller request
// 900 keys, and prints how long quarantines, and sign-ups without a pool, take meanwhile. It also prints
// what an idle service costs Postgres.
func priorities(ctx context.Context, dir string, say func(string, ...any)) (err error) {
	n, err := strconv.Atoi(cmp.Or(os.Getenv("CHAOS_REVOCATIONS"), "1000"))
	if err != nil || n < 100 {
		return fmt.Errorf("CHAOS_REVOCATIONS: %q must be a number of at least 100", os.Getenv("CHAOS_REVOCATIONS"))
	}
	s, err := raise(ctx, dir, setting{replicas: 2, connections: 16, fast: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.strike()) }()
	if err := s.sim(ctx, http.MethodPost, "settings", map[string]any{"latency_ms": 0}, &map[string]any{}); err != nil {
		return err
	}
	const many, keysEach, probes = 60, 15, 10
	revoked := func(i int) string { return fmt.Sprint("/v1/tenants/revoked_", i) }
	leaked := make([]string, probes)
	if err := each(n+many+probes, func(i int) error {
		var is struct{ Credentials struct{ Key string } }
		path := revoked(i)
		if i >= n {
			path = fmt.Sprint("/v1/tenants/kept_", i-n)
		}
		err := s.as(ctx, s.token, http.MethodPut, path, nil, &is)
		if at := i - n - many; at >= 0 {
			leaked[at] = is.Credentials.Key
		}
		return err
	}); err != nil {
		return err
	}
	// From here on at the rate, and with the usual latency.
	s.env = append(s.env, fmt.Sprint("TENANTRY_UPSTREAM_RATE=", rate))
	for _, p := range s.running {
		p.env = s.env
		if err := errors.Join(p.term(), p.start(), p.up(ctx, "/v1/upstream")); err != nil {
			return err
		}
	}
	if err := s.sim(ctx, http.MethodPost, "settings", map[string]any{"latency_ms": 50}, &map[string]any{}); err != nil {
		return err
	}
	idle, err := s.transactions(ctx, 20*time.Second)
	if err != nil {
		return err
	}
	say("idle, with 2 replicas and %d tenants: %.1f transactions a second", n, idle)

	began := time.Now()
	if err := each(n, func(i int) error {
		return s.as(ctx, s.token, http.MethodPost, revoked(i)+"/suspend", nil, nil, "Prefer", "respond-async")
	}); err != nil {
		return err
	}
	other, err := s.command(ctx, "token", "create", "--name", "other", "--role", "provisioner")
	if err != nil {
		return err
	}
	if err := each(many*keysEach, func(i int) error {
		path := fmt.Sprintf("/v1/tenants/kept_%d/keys/key-%d", i/keysEach, i%keysEach)
		return s.as(ctx, other, http.MethodPut, path, map[string]any{}, nil, "Prefer", "respond-async")
	}); err != nil {
		return err
	}
	say("%d suspensions and %d new keys are requested after %.1f s", n, many*keysEach, time.Since(began).Seconds())
	var dead, active []time.Duration
	for i, key := range leaked {
		began := time.Now()
		var q struct{ Key, Successor struct{ State string } }
		if err := s.as(ctx, s.admin, http.MethodPost, "/v1/keys/quarantine", map[string]string{"key": key}, &q, "Prefer", "wait=60"); err != nil {
			return err
		}
		if q.Key.State != "revoked" || q.Successor.State != "active" {
			return fmt.Errorf("after a quarantine the key is %q, its successor %q", q.Key.State, q.Successor.State)
		}
		dead = append(dead, time.Since(began))
		began = time.Now()
		var is struct{ State string }
		if err := s.as(ctx, s.token, http.MethodPut, fmt.Sprint("/v1/tenants/new_", i), nil, &is, "Prefer", "wait=60"); err != nil {
			return err
		}
		if is.State != "active" {
			return fmt.Errorf("a sign-up is %s after a minute", is.State)
		}
		active = append(active, time.Since(began))
	}
	slices.Sort(dead)
	slices.Sort(active)
	say("meanwhile a leaked key is dead and its successor works after %.1f s in the median, %.1f s at worst; a sign-up without a pool takes %.1f s, %.1f s at worst",
		dead[probes/2].Seconds(), dead[probes-1].Seconds(), active[probes/2].Seconds(), active[probes-1].Seconds())
	var left int
	if err := await(ctx, time.Duration(4*(n+many*keysEach)/rate)*time.Second+5*time.Minute, "every key is as requested", func() (bool, error) {
		err := s.query(ctx, `SELECT count(*) FROM keys WHERE state IN ('creating', 'revoking')`, &left)
		return left == 0, err
	}); err != nil {
		return fmt.Errorf("%w; %d keys are left", err, left)
	}
	say("the last key is as requested %.0f s after the first request", time.Since(began).Seconds())
	if idle, err = s.transactions(ctx, 20*time.Second); err == nil {
		say("right after that: %.1f transactions a second", idle)
	}
	return err
}

// each calls f for 0 to n-1, several at once.
func each(n int, f func(int) error) error {
	var group errgroup.Group
	group.SetLimit(16)
	for i := range n {
		group.Go(func() error { return f(i) })
	}
	return group.Wait()
}

// query reads one value from the database.
func (s *stage) query(ctx context.Context, sql string, value any) error {
	conn, err := pgx.Connect(ctx, s.cluster.URL("tenantry"))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(ctx) }()
	return conn.QueryRow(ctx, sql).Scan(value)
}

// transactions returns how many transactions a second the database has.
func (s *stage) transactions(ctx context.Context, during time.Duration) (float64, error) {
	const count = `SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = 'tenantry'`
	var before, after int64
	time.Sleep(3 * time.Second) // statistics come late
	if err := s.query(ctx, count, &before); err != nil {
		return 0, err
	}
	time.Sleep(during)
	err := s.query(ctx, count, &after)
	return float64(after-before) / during.Seconds(), err
}

// recovery kills a replica that has a call under way, and returns how long it
// takes until another has finished its work.
func recovery(ctx context.Context, dir string) (took time.Duration, err error) {
	s, err := raise(ctx, dir, setting{replicas: 1, connections: 16})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, s.strike()) }()
	dies := s.running[0]
	other, err := s.addReplica(ctx)
	if err != nil {
		return 0, err
	}
	// The other must not take the work: it stands still until the call is under way.
	if err := other.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		return 0, err
	}
	if err := s.faults(ctx, []map[string]any{{"call": "PostKeys", "hang": true, "count": 1}}); err != nil {
		return 0, err
	}
	l := newLoad(s, 0)
	l.to = []*program{dies}
	r := rand.New(rand.NewPCG(0, 0))
	if _, _, err := l.request(ctx, r, http.MethodPut, "/v1/tenants/user_1", "Prefer", "respond-async"); err != nil {
		return 0, err
	}
	if err := await(ctx, time.Minute, "a key is being made", func() (bool, error) {
		var state clarifaisim.State
		err := s.sim(ctx, http.MethodGet, "state", nil, &state)
		return state.Calls["PostKeys"] > 0, err
	}); err != nil {
		return 0, err
	}
	if err := other.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		return 0, err
	}
	dies.kill()
	began := time.Now()
	l.to = []*program{other}
	err = await(ctx, 3*time.Minute, "the tenant is active", func() (bool, error) {
		status, body, err := l.request(ctx, r, http.MethodPut, "/v1/tenants/user_1", "Prefer", "wait=1")
		if err == nil && status >= 300 {
			err = fmt.Errorf("a caller that asks again is answered %d %s", status, body)
		}
		return status == http.StatusOK, err
	})
	return time.Since(began), err
}

// reached lets replicas do more than the rate allows, and returns the most calls
// in a second and the share of the rate that was used.
func reached(ctx context.Context, dir string, replicas int) (most int, share float64, err error) {
	s, err := raise(ctx, dir, setting{replicas: replicas, connections: 6})
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, s.strike()) }()
	const tenants = 150
	l := newLoad(s, 0)
	r := rand.New(rand.NewPCG(0, 0))
	for i := range tenants {
		if _, _, err := l.request(ctx, r, http.MethodPut, fmt.Sprint("/v1/tenants/user_", i), "Prefer", "respond-async"); err != nil {
			return 0, 0, err
		}
	}
	err = await(ctx, 5*time.Minute, "all tenants are active", func() (bool, error) {
		var state clarifaisim.State
		err := s.sim(ctx, http.MethodGet, "state", nil, &state)
		return state.Apps == tenants+1 && state.Keys == tenants, err // with the control record
	})
	if err != nil {
		return 0, 0, err
	}
	s.keepCalls(ctx)
	// From the first build to the last; the marking of apps fills the gaps.
	builds := slices.DeleteFunc(slices.Clone(s.calls), func(c clarifaisim.Call) bool { return c.Call != "PostApps" && c.Call != "PostKeys" })
	from, to := builds[0].At, builds[len(builds)-1].At
	n := 0
	for _, c := range s.calls {
		if !c.At.Before(from) && c.At.Before(to) {
			n++
		}
	}
	return busiest(s.calls), float64(n) / (to.Sub(from).Seconds() * rate), nil
}
