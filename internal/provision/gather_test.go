package provision_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// gathers is a replica whose builds in the background share calls. Marks would take slots.
func gathers(perSecond float64) provisiontest.Options {
	return provisiontest.Options{Workers: 16, Adjust: func(c *provision.Config) {
		c.Rate, c.ItemsPerCall, c.SkipMarks = perSecond, 10, true
	}}
}

// allImported waits until n tenants have their apps.
func allImported(t *testing.T, w *provisiontest.World, n int) {
	t.Helper()
	conn := pgtest.Conn(t, w.URL)
	provisiontest.Eventually(t, "all are active", func() bool { return countOf(t, conn, `tenants WHERE state = 'active'`) == n })
}

// shared returns how many calls a replica has made for several at once.
func shared(t *testing.T, r *provisiontest.Replica, call string) (n uint64) {
	t.Helper()
	families, err := r.Reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range families {
		if family.GetName() != "tenantry_upstream_call_items" {
			continue
		}
		for _, m := range family.GetMetric() {
			if m.GetLabel()[0].GetValue() == call {
				n += m.GetHistogram().GetSampleCount() - m.GetHistogram().GetBucket()[0].GetCumulativeCount()
			}
		}
	}
	return n
}

// Builds of an import that wait for the same slot have their apps, and their keys, made by
// one call; who signs up has calls of their own.
func TestImportSharesCalls(t *testing.T) {
	t.Parallel()
	const n = 60
	w := provisiontest.New(t)
	r := w.Start(gathers(10))
	importAll(t, r, batchOf("user", n))
	allImported(t, w, n)
	s := w.State()
	if s.Apps != n || s.Keys != n {
		t.Errorf("Clarifai has %d apps and %d keys; want %d of each", s.Apps, s.Keys, n)
	}
	if s.Calls["PostApps"] > n/2 || s.Calls["PostKeys"] > n/2 {
		t.Errorf("Clarifai was called %d times for apps and %d times for keys", s.Calls["PostApps"], s.Calls["PostKeys"])
	}
	if s.Calls["GetApp"] > 0 || s.Calls["ListAppKeys"] > 0 {
		t.Errorf("it was looked for what was certain: %v", s.Calls)
	}
	before := shared(t, r, "PostApps") + shared(t, r, "PostKeys")
	signUp(t, r, "late")
	if got := shared(t, r, "PostApps") + shared(t, r, "PostKeys"); got != before {
		t.Errorf("a sign-up took part in %d calls for several", got-before)
	}
}

// Without the setting each has calls of its own.
func TestImportSharesNoCalls(t *testing.T) {
	t.Parallel()
	const n = 12
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{Adjust: func(c *provision.Config) { c.Rate = 100 }})
	importAll(t, r, batchOf("user", n))
	allImported(t, w, n)
	if s := w.State(); s.Calls["PostApps"] != n || s.Calls["PostKeys"] != n {
		t.Errorf("Clarifai was called %v; want %d apps and %d keys", s.Calls, n, n)
	}
}

// However a call for several fails, all of them get what they wait for, nothing is made
// twice, and nothing is left that nobody knows.
func TestSharedCallsThatFail(t *testing.T) {
	t.Parallel()
	const n = 25
	type way struct {
		settings map[string]any
		fault    map[string]any // of the first call
		apps     bool           // of that for apps only: of one item it would say that nothing was made
	}
	ways := map[string]way{
		"refused":           {settings: map[string]any{"several_items": "refused"}},
		"all or none":       {settings: map[string]any{"several_items": "all", "failing_item": 2}},
		"those before":      {settings: map[string]any{"several_items": "first", "failing_item": 2}},
		"all but one":       {settings: map[string]any{"several_items": "partial", "failing_item": 2}},
		"cut":               {fault: map[string]any{"drop_after": true}},
		"cut before":        {fault: map[string]any{"drop_before": true}},
		"late":              {fault: map[string]any{"late_ms": 100}},
		"never came":        {fault: map[string]any{"hang": true, "after": true}},
		"proxy page":        {fault: map[string]any{"http": 502, "after": true}},
		"mixed, and is not": {fault: map[string]any{"status": 10010, "after": true}},
		"quota, and is not": {fault: map[string]any{"status": 11006, "after": true}, apps: true},
		"scope, and is not": {fault: map[string]any{"status": 11007, "after": true}, apps: true},
	}
	for name, c := range ways {
		for _, masked := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/masked=%v", name, masked), func(t *testing.T) {
				t.Parallel()
				s := &scene{t: t, w: provisiontest.New(t), holds: map[tenant.ID]tenant.AppID{}}
				settings := map[string]any{"masked_keys": masked}
				maps.Copy(settings, c.settings)
				s.w.Settings(settings)
				s.r = s.w.Start(gathers(50))
				exec(t, s.w, pgtest.NextSlotIn(300*time.Millisecond))
				if c.fault != nil {
					var rules []map[string]any
					for _, call := range []string{"PostApps", "PostKeys"} {
						if c.apps && call == "PostKeys" {
							continue
						}
						rule := map[string]any{"call": call, "count": 1}
						maps.Copy(rule, c.fault)
						rules = append(rules, rule)
					}
					s.w.Faults(rules...)
				}
				importAll(t, s.r, batchOf("user", n))
				allImported(t, s.w, n)
				if got := shared(t, s.r, "PostApps"); got == 0 || got > 3 && c.fault == nil {
					t.Errorf("%d calls were made for several apps; want some that failed, and no more", got)
				}
				if s.r.Logs.FilterMessageSnippet("was not carried out in full").Len() == 0 {
					t.Error("the log does not say why each goes alone")
				}
				sc := crashScenario{unmarked: true}
				for _, up := range batchOf("user", n) {
					sc.newcomers = append(sc.newcomers, up.ID)
				}
				sound(s, sc)
			})
		}
	}
}

// What Clarifai throttles is not made, and nothing is in doubt: the next calls are for
// several again.
func TestSharedCallsThatAreThrottled(t *testing.T) {
	t.Parallel()
	const n = 40
	w := provisiontest.New(t)
	r := w.Start(gathers(20))
	exec(t, w, pgtest.NextSlotIn(300*time.Millisecond))
	w.Faults(map[string]any{"call": "PostApps", "count": 2, "status": 11005}, map[string]any{"call": "PostKeys", "count": 1, "status": 11005})
	importAll(t, r, batchOf("user", n))
	allImported(t, w, n)
	s := w.State()
	if s.Apps != n || s.Keys != n || s.Calls["GetApp"] > 0 || s.Calls["ListAppKeys"] > 0 {
		t.Errorf("Clarifai has %d apps and %d keys, and was called %v; want %d of each, and no look", s.Apps, s.Keys, s.Calls, n)
	}
	if s.Calls["PostApps"] > n/2 || shared(t, r, "PostApps") < 3 {
		t.Errorf("of %d calls for apps %d were for several", s.Calls["PostApps"], shared(t, r, "PostApps"))
	}
}

// failsIntents is a store that cannot write down one intent.
type failsIntents struct {
	provision.Store
	failed *atomic.Bool
}

var errIntent = errors.New("the intent cannot be written")

func (s failsIntents) BeginApp(ctx context.Context, a tenant.App) error {
	if s.failed.CompareAndSwap(false, true) {
		return errIntent
	}
	return s.Store.BeginApp(ctx, a)
}

// Whose intent cannot be written drops out; the others have their call.
func TestSharedCallWithoutAnIntent(t *testing.T) {
	t.Parallel()
	const n = 8
	w := provisiontest.New(t)
	o := gathers(20)
	o.Store = func(s provision.Store) provision.Store { return failsIntents{s, new(atomic.Bool)} }
	r := w.Start(o)
	exec(t, w, pgtest.NextSlotIn(500*time.Millisecond))
	importAll(t, r, batchOf("user", n))
	allImported(t, w, n)
	if s := w.State(); s.Apps != n || s.Keys != n || shared(t, r, "PostApps") == 0 || s.Calls["GetApp"] > 0 {
		t.Errorf("Clarifai has %d apps and %d keys, and was called %v; want %d of each, made together", s.Apps, s.Keys, s.Calls, n)
	}
}

// While upstream work is paused for longer than a build may wait, each comes back later,
// and nothing is in doubt.
func TestSharedCallsInAPause(t *testing.T) {
	t.Parallel()
	const n = 8
	w := provisiontest.New(t)
	r := w.Start(gathers(20))
	importAll(t, r, batchOf("user", n/2))
	exec(t, w, `UPDATE upstream_budget SET paused_until = now() + interval '6 s', pauses = 1, epoch = epoch + 1`)
	importAll(t, r, batchOf("more", n/2))
	allImported(t, w, n)
	if s := w.State(); s.Apps != n || s.Keys != n {
		t.Errorf("Clarifai has %d apps and %d keys; want %d of each", s.Apps, s.Keys, n)
	}
}
