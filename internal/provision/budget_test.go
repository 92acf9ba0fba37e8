package provision_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tenantry/tenantry/internal/clarifaisim"
	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// highestSecond counts the calls of the busiest second.
func highestSecond(calls []clarifaisim.Call) int {
	most := 0
	for i, from := 0, 0; i < len(calls); i++ {
		for calls[i].At.Sub(calls[from].At) >= time.Second {
			from++
		}
		most = max(most, i-from+1)
	}
	return most
}

// signUpMany signs up n tenants without waiting.
func signUpMany(t testing.TB, r *provisiontest.Replica, n int) {
	t.Helper()
	for i := range n {
		if _, _, err := r.SignUp(t.Context(), tenant.ID(fmt.Sprint("user_", i)), tenant.SignUp{}, 0, caller); err != nil {
			t.Fatal(err)
		}
	}
}

func contextOf(t *testing.T) (context.Context, context.CancelFunc) {
	t.Helper()
	return context.WithCancel(t.Context())
}

func eventuallyActive(t testing.TB, r *provisiontest.Replica, n int) {
	t.Helper()
	eventuallyIn(t, r, tenant.Active, n)
}

// eventuallyIn waits until n tenants are in a state.
func eventuallyIn(t testing.TB, r *provisiontest.Replica, state tenant.State, n int) {
	t.Helper()
	provisiontest.Eventually(t, fmt.Sprintf("%d tenants are %s", n, state), func() bool {
		counts, err := r.DB.TenantCounts(t.Context())
		is := 0
		for _, c := range counts {
			if c.State == state {
				is += c.Tenants
			}
		}
		return err == nil && is == n
	})
}

// However many replicas there are, no second sees more calls than the rate, but
// for one that arrives early or late.
func TestRateIsKept(t *testing.T) {
	t.Parallel()
	for _, replicas := range []int{1, 2, 8} {
		t.Run(fmt.Sprint(replicas), func(t *testing.T) {
			t.Parallel()
			w := provisiontest.New(t)
			const rate, n = 14, 30
			var r *provisiontest.Replica
			for range replicas {
				r = w.Start(provisiontest.Options{Adjust: func(c *provision.Config) { c.Rate = rate }})
			}
			signUpMany(t, r, n)
			eventuallyActive(t, r, n)
			if got := highestSecond(w.Sim.Calls()); got > rate+1 {
				t.Errorf("the busiest second had %d calls; the rate is %d", got, rate)
			}
		})
	}
}

// Background work of any amount delays a sign-up by no more than a slot for each
// of its calls.
func TestBackgroundWorkGivesWay(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	// So slow that a sign-up is written within one slot, also on a busy machine.
	slow := func(c *provision.Config) { c.Rate = 8 }
	replicas := []*provisiontest.Replica{w.Start(provisiontest.Options{Adjust: slow}), w.Start(provisiontest.Options{Adjust: slow})}
	if _, err := connOf(t, w).Exec(t.Context(), `
		INSERT INTO apps (id, profile, profile_revision, state) SELECT 'gone-' || i, 'default', 'x', 'purging' FROM generate_series(1, 3000) i`); err != nil {
		t.Fatal(err)
	}
	provisiontest.Eventually(t, "the background is busy", func() bool { return w.State().Calls["GetApp"] > 20 })
	for i := range 5 {
		before := len(w.Sim.Calls())
		signUp(t, replicas[i%2], tenant.ID(fmt.Sprint("user_", i)))
		others := 0
		for _, c := range w.Sim.Calls()[before:] {
			if c.Call == "PostKeys" {
				break
			}
			if c.Call == "GetApp" {
				others++
			}
		}
		// One that was on its way at the sign-up, and one before each of its calls.
		if others > 3 {
			t.Errorf("%d calls of the background came between the sign-up %d and its end", others, i)
		}
	}
}

// However many sign-ups wait, a key that shall die has few calls before it.
func TestRevocationsGoFirst(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	const n, workers = 5, 32
	// So slow that a busy machine takes part in little of it.
	r := w.Start(provisiontest.Options{Workers: workers, Adjust: func(c *provision.Config) { c.Rate = 8 }})
	signUpMany(t, r, n)
	eventuallyActive(t, r, n)
	for i := range 200 {
		if _, _, err := r.SignUp(t.Context(), tenant.ID(fmt.Sprint("waiting_", i)), tenant.SignUp{}, 0, caller); err != nil {
			t.Fatal(err)
		}
	}
	// All that work at once have a turn to wait for.
	provisiontest.Eventually(t, "the sign-ups are at work", func() bool { return w.State().Calls["PostApps"] > n+2 })
	for i := range n {
		before := len(w.Sim.Calls())
		is, err := r.Suspend(t.Context(), tenant.ID(fmt.Sprint("user_", i)), wait, caller)
		stateOf(t, is, err, tenant.Suspended)
		others := 0
		for _, c := range w.Sim.Calls()[before:] {
			if c.Call == "DeleteKey" {
				break
			}
			others++
		}
		// Some slots stay free, and the calls take turns: not one for each sign-up that is at work.
		if others > 6 {
			t.Errorf("%d calls for sign-ups came between the suspension %d and its end", others, i)
		}
	}
}

// An hour is a pause that no test lasts out.
func patient(c *provision.Config) {
	c.Rate = 50
	c.PauseBase, c.PauseCap = time.Hour, time.Hour
	c.PATCheckBase, c.PATCheckCap = time.Hour, time.Hour
}

// liftPause makes a pause end now.
func liftPause(t *testing.T, w *provisiontest.World) {
	t.Helper()
	if _, err := connOf(t, w).Exec(t.Context(), `
		WITH budget AS (UPDATE upstream_budget SET paused_until = 'epoch')
		UPDATE refused_pats SET next_check_at = now()`); err != nil {
		t.Fatal(err)
	}
}

// When Clarifai throttles or is down, all replicas stop together after few calls,
// tenants that wait are told why, and it goes on by itself after one probe.
func TestFleetPauses(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		fault map[string]any
		code  string
		most  int // calls that may fail: what stops the fleet, and one on its way at each replica
	}{
		"throttled": {map[string]any{"call": "*", "status": 11005}, "upstream_throttled", 1 + 2},
		"down":      {map[string]any{"call": "*", "drop_before": true}, "upstream_unavailable", 5 + 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := provisiontest.New(t)
			// So slow that a call has ended when the next is sent, also on a busy machine.
			slow := func(c *provision.Config) { patient(c); c.Rate = 8 }
			replicas := []*provisiontest.Replica{w.Start(provisiontest.Options{Adjust: slow}), w.Start(provisiontest.Options{Adjust: slow})}
			w.Faults(c.fault)
			const n = 20
			before := len(w.Sim.Calls())
			signUpMany(t, replicas[0], n)
			provisiontest.Eventually(t, "every build has been held up", func() bool {
				u, _, err := replicas[1].UpstreamStatus(t.Context())
				return err == nil && u.Pauses == 1 && deferred(t, w, n)
			})
			if got := len(w.Sim.Calls()) - before; got > c.most {
				t.Errorf("%d calls were made to a Clarifai that fails them all; want %d at most", got, c.most)
			}
			got, _, err := replicas[1].SignUp(t.Context(), "user_0", tenant.SignUp{}, 0, caller)
			if err != nil || got.Problem == nil || got.Problem.Code != c.code || time.Until(got.Problem.NextAttemptAt) < 30*time.Minute {
				t.Errorf("a tenant that waits shows %+v, %v; want %s and when it goes on", got.Problem, err, c.code)
			}
			if logged := logLines(replicas, "upstream work is paused"); logged != 1 {
				t.Errorf("the pause was logged %d times; want once", logged)
			}

			// The probe is alone until it is answered.
			w.Faults(map[string]any{"call": "*", "count": 1, "delay_ms": 300})
			probe := len(w.Sim.Calls())
			liftPause(t, w)
			eventuallyActive(t, replicas[0], n)
			if calls := w.Sim.Calls(); calls[probe+1].At.Sub(calls[probe].At) < 300*time.Millisecond {
				t.Errorf("another call came %s after the probe, before its answer", calls[probe+1].At.Sub(calls[probe].At))
			}
			if u, _, err := replicas[0].UpstreamStatus(t.Context()); err != nil || u.Pauses != 0 || u.PauseReason != nil {
				t.Errorf("after the pause the status is %+v, %v", u, err)
			}
		})
	}
}

// deferred reports whether each of n builds has had its turn and none is at work.
func deferred(t *testing.T, w *provisiontest.World, n int) bool {
	t.Helper()
	var waiting int
	if err := connOf(t, w).QueryRow(t.Context(), `
		SELECT count(*) FROM apps WHERE state = 'building' AND leased_until = '-infinity' AND next_attempt_at > created_at`).
		Scan(&waiting); err != nil {
		t.Fatal(err)
	}
	return waiting == n
}

func logLines(replicas []*provisiontest.Replica, message string) int {
	n := 0
	for _, r := range replicas {
		n += r.Logs.FilterMessage(message).Len()
	}
	return n
}

// A call that fails now and then does not stop the others.
func TestScatteredFailuresDoNotPause(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{Adjust: patient})
	for i := range 12 {
		w.Faults(map[string]any{"call": "PostKeys", "count": 2, "drop_before": true})
		signUp(t, r, tenant.ID(fmt.Sprint("user_", i)))
	}
}

// A PAT that Clarifai refuses stops the fleet at once, once confirmed, and is said
// once; look-ups go on.
func TestRefusedPATPausesTheFleet(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	replicas := []*provisiontest.Replica{w.Start(provisiontest.Options{Adjust: patient}), w.Start(provisiontest.Options{Adjust: patient})}
	first := signUp(t, replicas[0], "first")
	w.Settings(map[string]any{"remove_pats": []string{provisiontest.PAT}})
	before := len(w.Sim.Calls())
	const n = 20
	signUpMany(t, replicas[0], n)
	provisiontest.Eventually(t, "every replica knows", func() bool {
		for _, r := range replicas {
			u, health, err := r.UpstreamStatus(t.Context())
			if err != nil || health.State != provision.PATRefused || u.PATRefused == nil {
				return false
			}
		}
		return deferred(t, w, n)
	})
	if got := len(w.Sim.Calls()) - before; got > 6 {
		t.Errorf("%d calls were made with a refused PAT; want the refused ones on their way and their confirmation", got)
	}
	if logged := logLines(replicas, "the PAT cannot be used; upstream work is paused until it is replaced or accepted again, look-ups go on"); logged != 1 {
		t.Errorf("the refusal was logged %d times; want once", logged)
	}
	got, err := replicas[1].Tenant(t.Context(), "user_0", 0)
	if err != nil || got.Problem == nil || got.Problem.Code != "upstream_pat_refused" {
		t.Errorf("a tenant that waits shows %+v, %v", got.Problem, err)
	}
	if _, _, err := replicas[1].Reveal(t.Context(), first.ID, tenant.DefaultKey, caller); err != nil {
		t.Errorf("a key cannot be read meanwhile: %v", err)
	}

	w.AddPAT(provisiontest.PAT, string(provisiontest.Operator))
	liftPause(t, w)
	eventuallyActive(t, replicas[0], n+1)
}

// A refusal that is not about the PAT holds up one row and not the fleet.
func TestRefusalThatIsNotThePATs(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{Adjust: patient})
	w.Faults(map[string]any{"call": "PostKeys", "count": 2, "status": 11009})
	signUp(t, r, "user_1")
	if health := r.PAT.Health(); health.State != provision.PATWorks {
		t.Errorf("the PAT is %s; want ok", health.State)
	}
}

// suspending signs up n tenants, lets Clarifai refuse the credential of each call of that name, and
// begins to suspend the tenants.
func suspending(t *testing.T, w *provisiontest.World, r *provisiontest.Replica, n int, fault map[string]any) {
	t.Helper()
	signUpMany(t, r, n)
	eventuallyActive(t, r, n)
	w.Faults(fault)
	for i := range n {
		if _, err := r.Suspend(t.Context(), tenant.ID(fmt.Sprint("user_", i)), 0, caller); err != nil {
			t.Fatal(err)
		}
	}
}

// A credential that Clarifai refuses for single keys costs one check of the PAT. It interrupts nothing,
// however often it is refused.
func TestRefusalsOfSingleKeysInterruptNothing(t *testing.T) {
	t.Parallel()
	for _, code := range []int{11008, 11009, 65000} {
		t.Run(fmt.Sprint(code), func(t *testing.T) {
			t.Parallel()
			w := provisiontest.New(t)
			trusting := func(c *provision.Config) { c.PATTrust = time.Hour }
			replicas := []*provisiontest.Replica{w.Start(provisiontest.Options{Adjust: trusting}), w.Start(provisiontest.Options{Adjust: trusting})}
			const n = 12
			before := w.State().Calls["GetUser"]
			suspending(t, w, replicas[0], n, map[string]any{"call": "DeleteKey", "status": code})
			provisiontest.Eventually(t, "each key was refused several times", func() bool {
				return countOf(t, connOf(t, w), `keys WHERE state = 'revoking' AND attempts >= 3 AND problem ->> 'code' = 'upstream_refused'`) == n
			})
			signUp(t, replicas[1], "another")
			if got := column(t, w, `SELECT epoch::text FROM upstream_budget`); !slices.Equal(got, []string{"0"}) {
				t.Errorf("upstream work was interrupted or paused %s times", got)
			}
			if got := w.State().Calls["GetUser"] - before; got > 1 {
				t.Errorf("the PAT was checked %d times; want at most once", got)
			}
			for _, r := range replicas {
				if _, health, err := r.UpstreamStatus(t.Context()); err != nil || health.State != provision.PATWorks {
					t.Errorf("the PAT is %s, %v; want ok", health.State, err)
				}
			}
			w.Faults()
			eventuallyIn(t, replicas[0], tenant.Suspended, n)
		})
	}
}

// A PAT that Clarifai stops accepting pauses the fleet, also if only calls about single keys are made
// and the PAT passed a check before.
func TestRefusedPATIsNoticedBySingleKeys(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{Adjust: func(c *provision.Config) { c.PATTrust = 200 * time.Millisecond }})
	const n = 5
	suspending(t, w, r, n, map[string]any{"call": "DeleteKey", "status": 11009})
	provisiontest.Eventually(t, "the PAT was checked", func() bool {
		return countOf(t, connOf(t, w), `keys WHERE problem ->> 'code' = 'upstream_refused'`) > 0
	})
	w.Settings(map[string]any{"remove_pats": []string{provisiontest.PAT}})
	w.Faults()
	provisiontest.Eventually(t, "the PAT is refused", func() bool {
		_, health, err := r.UpstreamStatus(t.Context())
		return err == nil && health.State == provision.PATRefused
	})
	w.AddPAT(provisiontest.PAT, string(provisiontest.Operator))
	eventuallyIn(t, r, tenant.Suspended, n)
}

// A new PAT of the same operator takes over without a call that fails; all else
// that may stand in its place changes nothing and is said once.
func TestNewPATTakesOver(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	const foreign, next = "fedcba9876543210fedcba9876543210", "00112233445566778899aabbccddeeff"
	w.AddPAT(foreign, "umbrella")
	var mu sync.Mutex
	var text string
	var fault error
	reads := 0
	put := func(s string, err error) {
		mu.Lock()
		defer mu.Unlock()
		text, fault, reads = s, err, 0
	}
	put(provisiontest.PAT, nil)
	readTimes := func(n int) bool {
		mu.Lock()
		defer mu.Unlock()
		return reads >= n
	}
	var watch sync.WaitGroup
	defer watch.Wait()
	ctx, stop := contextOf(t)
	defer stop()
	watch.Go(func() {
		r.WatchPAT(ctx, func() (tenant.Secret, error) {
			mu.Lock()
			defer mu.Unlock()
			reads++
			return tenant.NewSecret(text), fault
		}, 5*time.Millisecond)
	})

	for name, c := range map[string]struct {
		text string
		err  error
		says string
	}{
		"unreadable":        {"", errors.New("it is a directory"), "the PAT cannot be read; the one in use stays"},
		"another operator":  {foreign, nil, "the new PAT is refused; the one in use stays"},
		"unknown":           {strings.Repeat("9", 32), nil, "the new PAT is refused; the one in use stays"},
		"not a PAT at all":  {"two words", nil, "the new PAT is refused; the one in use stays"},
		"refused once more": {strings.Repeat("8", 32), nil, "the new PAT is refused; the one in use stays"},
	} {
		before := r.Logs.FilterMessage(c.says).Len()
		put(c.text, c.err)
		provisiontest.Eventually(t, name+" is read some times", func() bool { return readTimes(30) })
		if logged := r.Logs.FilterMessage(c.says).Len() - before; logged != 1 {
			t.Errorf("%s: %q was logged %d times; want once", name, c.says, logged)
		}
		if got := r.PAT.Secret().Reveal(); got != provisiontest.PAT {
			t.Fatalf("%s: the PAT in use was replaced", name)
		}
	}
	signUp(t, r, "user_1")

	w.AddPAT(next, string(provisiontest.Operator))
	put(next, nil)
	provisiontest.Eventually(t, "the new PAT is in use", func() bool { return r.PAT.Secret().Reveal() == next })
	w.Settings(map[string]any{"remove_pats": []string{provisiontest.PAT}})
	before := len(w.Sim.Calls())
	signUp(t, r, "user_2")
	for _, c := range w.Sim.Calls()[before:] {
		if c.Status != 10000 {
			t.Errorf("after the take-over %s was answered %d", c.Call, c.Status)
		}
	}
}

// A new PAT ends the pause that the refused one began.
func TestNewPATEndsThePause(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{Adjust: patient})
	w.Settings(map[string]any{"remove_pats": []string{provisiontest.PAT}})
	signUpMany(t, r, 3)
	provisiontest.Eventually(t, "the PAT is refused", func() bool { return r.PAT.Health().State == provision.PATRefused })
	const next = "00112233445566778899aabbccddeeff"
	w.AddPAT(next, string(provisiontest.Operator))
	ctx, stop := contextOf(t)
	defer stop()
	go r.WatchPAT(ctx, func() (tenant.Secret, error) { return tenant.NewSecret(next), nil }, 5*time.Millisecond)
	eventuallyActive(t, r, 3)
}

// A PAT that was rejected and then replaced by another configuration and a restart holds up nothing: not
// if its replica was killed, and not while its replica is still alive during a rollout.
func TestReplacedPATHoldsUpNothing(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(*provisiontest.Replica){
		"stopped": (*provisiontest.Replica).Stop,
		"killed":  (*provisiontest.Replica).Kill,
		"running": func(*provisiontest.Replica) {},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := provisiontest.New(t)
			old := w.Start(provisiontest.Options{Control: true, Adjust: patient})
			signUp(t, old, "user_1")
			w.Settings(map[string]any{"remove_pats": []string{provisiontest.PAT}})
			signUpMany(t, old, 1)
			provisiontest.Eventually(t, "the PAT is refused", func() bool {
				u, _, err := old.UpstreamStatus(t.Context())
				return err == nil && u.PATRefused != nil && u.Pauses == 0
			})
			if got, err := old.Tenant(t.Context(), "user_0", 0); err != nil || got.Problem == nil || got.Problem.Code != "upstream_pat_refused" {
				t.Errorf("before the replacement a waiting tenant shows %+v, %v", got.Problem, err)
			}
			end(old)
			// It may have ended while it checked its PAT for the control record: a call of any replica would end
			// that pause, and the one below makes none.
			exec(t, w, `UPDATE upstream_budget SET pauses = 0`)

			const next = "00112233445566778899aabbccddeeff"
			w.AddPAT(next, string(provisiontest.Operator))
			r := w.Start(provisiontest.Options{PAT: next, Idle: true, Adjust: pool(2, 2)})
			provisiontest.Eventually(t, "the waiting tenant has no problem, and the pool is built", func() bool {
				if err := r.SweepOnce(t.Context()); err != nil {
					t.Fatal(err)
				}
				got, err := r.Tenant(t.Context(), "user_0", 0)
				return err == nil && got.Problem == nil && countOf(t, connOf(t, w), `apps WHERE state = 'building' AND for_pool`) == 2
			})
		})
	}
}

// A rejected PAT counts while replicas use it, and is forgotten afterwards.
func TestOnlyPATsInUseCount(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{Idle: true, Adjust: pool(2, 2)})
	exec(t, w, `INSERT INTO refused_pats (fingerprint, problem, since, next_check_at)
		VALUES ('old', '{"code": "upstream_pat_refused"}', now(), now() + interval '1 hour')`)
	halted := func(why string, want bool) {
		t.Helper()
		if err := r.SweepOnce(t.Context()); err != nil {
			t.Fatal(err)
		}
		if built := countOf(t, connOf(t, w), `apps WHERE state = 'building' AND for_pool`) > 0; built == want {
			t.Errorf("%s: apps are built for the pool: %v", why, built)
		}
		exec(t, w, `UPDATE apps SET state = 'deleted'`)
	}
	halted("no replica uses the rejected PAT", false)
	exec(t, w, `INSERT INTO replicas (id, incarnation, pat) SELECT gen_random_uuid(), id, 'old' FROM current_incarnation`)
	halted("one of two replicas uses it", false)
	exec(t, w, `INSERT INTO refused_pats (fingerprint, problem, next_check_at)
		SELECT pat, '{"code": "upstream_pat_refused"}', now() + interval '1 hour' FROM replicas WHERE pat <> 'old'`)
	halted("each replica uses a rejected PAT", true)
	exec(t, w, `UPDATE replicas SET last_seen_at = now() - interval '1 hour' WHERE pat = 'old'; DELETE FROM refused_pats WHERE fingerprint <> 'old'`)
	halted("its replica is dead", false)
	exec(t, w, `UPDATE refused_pats SET since = now() - interval '1 hour'`)
	halted("it was rejected long ago", false)
	if n := countOf(t, connOf(t, w), `refused_pats`); n != 0 {
		t.Errorf("%d PATs that no replica uses are still kept as rejected", n)
	}
}

// Clarifai's Retry-After, in seconds or as a date, is the length of the pause.
func TestRetryAfterIsThePause(t *testing.T) {
	t.Parallel()
	date := time.Now().Add(30 * time.Minute).UTC().Format(http.TimeFormat)
	for name, fault := range map[string]map[string]any{
		"throttled, seconds":     {"status": 11005, "retry_after": "1800"},
		"throttled, date":        {"status": 11005, "retry_after": date},
		"maintenance, seconds":   {"status": 39997, "retry_after": "1800"},
		"proxy, 429, seconds":    {"http": 429, "retry_after": "1800"},
		"proxy, 503, date":       {"http": 503, "retry_after": date},
		"longer than is allowed": {"status": 11005, "retry_after": "31536000"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := provisiontest.New(t)
			r := w.Start(provisiontest.Options{})
			signUp(t, r, "first")
			fault["call"] = "*"
			w.Faults(fault)
			signUpMany(t, r, 1)
			var pause time.Duration
			provisiontest.Eventually(t, "upstream work is paused", func() bool {
				u, _, err := r.UpstreamStatus(t.Context())
				pause = u.PausedUntil.Sub(u.DatabaseTime)
				return err == nil && u.Pauses > 0
			})
			if pause < 20*time.Minute || pause > time.Hour {
				t.Errorf("the pause is %s; want what Clarifai asks for", pause)
			}
		})
	}
}
