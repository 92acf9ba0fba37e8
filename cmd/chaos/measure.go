package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/tenantry/tenantry/internal/clarifaisim"
)

// measure prints what recovery takes, and what share of the rate is reached.
func measure(ctx context.Context, dir string, say func(string, ...any)) error {
	for _, leads := range []bool{false, true} {
		took, err := recovery(ctx, filepath.Join(dir, fmt.Sprint("recovery-", leads)), leads)
		if err != nil {
			return fmt.Errorf("measure recovery: %w", err)
		}
		whose := "a replica"
		if leads {
			whose = "the replica that leads the job queue"
		}
		say("kill -9 of %s in mid-build: the tenant is active %.1f s later", whose, took.Seconds())
	}
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

// recovery kills a replica that has a call under way, and returns how long it
// takes until another has finished its work.
func recovery(ctx context.Context, dir string, leads bool) (took time.Duration, err error) {
	s, err := raise(ctx, dir, setting{replicas: 1, connections: 16})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, s.strike()) }()
	first := s.running[0] // which leads the job queue, as it was alone
	second, err := s.addReplica(ctx)
	if err != nil {
		return 0, err
	}
	dies, other := second, first
	if leads {
		dies, other = first, second
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
