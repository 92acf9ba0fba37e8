package provision_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// pool has the default profile keep a pool, and be impatient about it.
func pool(fewest, most int) func(*provision.Config) {
	return func(c *provision.Config) {
		c.Profiles[0].PoolMin, c.Profiles[0].PoolMax = fewest, most
		c.PoolEvery, c.PoolPatience = 50*time.Millisecond, 100*time.Millisecond
	}
}

// appsIn counts the apps of the default profile in a state.
func appsIn(t *testing.T, w *provisiontest.World, state tenant.AppState) int {
	t.Helper()
	return countOf(t, pgtest.Conn(t, w.URL), fmt.Sprintf(`apps WHERE state = '%s' AND profile = 'default'`, state))
}

func poolIs(t *testing.T, w *provisiontest.World, ready int) {
	t.Helper()
	conn := pgtest.Conn(t, w.URL)
	provisiontest.Eventually(t, fmt.Sprint(ready, " apps are ready, and nothing else in the works"), func() bool {
		return countOf(t, conn, `apps WHERE state = 'ready'`) == ready && countOf(t, conn, `apps WHERE state IN ('building', 'purging')`) == 0
	})
}

// filled is a world whose pool has been filled, by a replica that is stopped.
func filled(t *testing.T, n int) *provisiontest.World {
	t.Helper()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{Adjust: pool(n, n)})
	poolIs(t, w, n)
	r.Stop()
	return w
}

func TestPoolFills(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{Adjust: pool(3, 5)})
	poolIs(t, w, 3)
	r2 := w.Start(provisiontest.Options{Adjust: pool(3, 5)})
	pools, err := r.Pools(t.Context())
	if err != nil || len(pools) != 2 || pools[0].Ready != 3 || pools[0].Target != 3 || pools[0].Reason != nil {
		t.Errorf("Pools = %+v, %v; want one with all that it shall have, and one that is off", pools, err)
	}
	if s := w.State(); s.Apps != 3 || s.Calls["PostApps"] != 3 || s.Calls["PostKeys"] != 3 {
		t.Errorf("the simulator holds %+v; want three apps, each made with two calls", s)
	}
	// Sign-ups raise the target, up to the most.
	for i := range 8 {
		signUp(t, r, tenant.ID(fmt.Sprint("user_", i)))
	}
	poolIs(t, w, 5)
	// And when there have been none for long, it falls again.
	exec(t, w, `UPDATE tenants SET created_at = now() - interval '2 hours', state_since = now() - interval '2 hours'`)
	poolIs(t, w, 3)
	if n := countOf(t, pgtest.Conn(t, w.URL), `audit_events WHERE action = 'app.drained' AND detail ->> 'reason' = 'surplus'`); n != 2 {
		t.Errorf("%d apps were taken out; want 2", n)
	}
	r2.Stop()
}

// A pool that is turned off, or whose profile is gone, keeps what it has until nobody keeps it any more.
func TestPoolIsClosed(t *testing.T) {
	t.Parallel()
	for name, gone := range map[string]bool{"turned off": false, "profile gone": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := filled(t, 3)
			if gone {
				exec(t, w, `UPDATE pools SET profile = 'gone' WHERE profile = 'default'`)
				exec(t, w, `UPDATE apps SET profile = 'gone'`)
			}
			r := w.Start(provisiontest.Options{Idle: true, Adjust: pool(0, 0)})
			for range 3 {
				if err := r.SweepOnce(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			poolIs(t, w, 3)
			exec(t, w, `UPDATE pools SET planned_at = now() - interval '2 hours' WHERE target > 0`)
			w.Start(provisiontest.Options{Adjust: pool(0, 0)})
			poolIs(t, w, 0)
			provisiontest.Eventually(t, "no pool has a target", func() bool {
				return countOf(t, pgtest.Conn(t, w.URL), `pools WHERE target > 0 OR profile = 'gone'`) == 0
			})
		})
	}
}

// An app that no tenant needs any more is removed also where no pool is kept, by a replica that knows its
// profile or, later, by another.
func TestSpareAppWithoutPool(t *testing.T) {
	t.Parallel()
	for name, gone := range map[string]bool{"known profile": false, "profile gone": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := provisiontest.New(t)
			idle := w.Start(provisiontest.Options{Idle: true})
			if _, _, err := idle.SignUp(t.Context(), "user_1", tenant.SignUp{}, 0, caller); err != nil {
				t.Fatal(err)
			}
			if _, err := idle.Delete(t.Context(), "user_1", false, 0, caller); err != nil {
				t.Fatal(err)
			}
			builder := w.Start(provisiontest.Options{})
			poolIs(t, w, 1)
			builder.Stop()
			exec(t, w, `DELETE FROM pools`) // as if an older version had left the app
			if gone {
				exec(t, w, `UPDATE apps SET profile = 'gone'`)
			}
			r := w.Start(provisiontest.Options{Adjust: pool(0, 0)})
			if gone {
				provisiontest.Eventually(t, "the pool of the unknown profile has a row", func() bool {
					return countOf(t, pgtest.Conn(t, w.URL), `pools WHERE profile = 'gone'`) == 1
				})
				exec(t, w, `UPDATE pools SET planned_at = now() - interval '2 hours' WHERE profile = 'gone'`)
			}
			poolIs(t, w, 0)
			if s := w.State(); s.Apps != 0 {
				t.Errorf("Clarifai has %d apps; want none", s.Apps)
			}
			if got := signUp(t, r, "user_2"); !keyWorks(t, w, r, got) {
				t.Error("the key of a later tenant does not work")
			}
		})
	}
}

// What no tenant needs is given to one that comes, before it is removed.
func TestSpareAppIsGiven(t *testing.T) {
	t.Parallel()
	w := filled(t, 2)
	r := w.Start(provisiontest.Options{Idle: true})
	importAll(t, r, batchOf("imported", 1))
	if got, _, err := r.SignUp(t.Context(), "user_1", tenant.SignUp{}, 0, caller); err != nil || got.State != tenant.Active {
		t.Fatalf("SignUp = %+v, %v; want an app that is ready", got, err)
	}
	if err := r.SweepOnce(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := countOf(t, pgtest.Conn(t, w.URL), `tenants WHERE state = 'active'`); n != 2 {
		t.Errorf("%d tenants are active; want 2", n)
	}
}

// A build that is given up is replaced in the same transaction.
func TestGivenUpBuildIsReplaced(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	w.Settings(map[string]any{"masked_keys": true})
	w.Faults(map[string]any{"call": "PostKeys", "count": 1, "drop_after": true})
	r := w.Start(provisiontest.Options{Idle: true, Store: func(s provision.Store) provision.Store { return unstarted{s} }})
	conn := pgtest.Conn(t, w.URL)
	if _, _, err := r.SignUp(t.Context(), "user_1", tenant.SignUp{}, 0, caller); err != nil {
		t.Fatal(err)
	}
	first := column(t, w, `SELECT id FROM apps`)[0]
	provisiontest.Eventually(t, "the build is given up", func() bool {
		exec(t, w, `UPDATE apps SET next_attempt_at = now(), in_doubt_since = in_doubt_since - interval '2 s'`)
		r.WorkApp(t.Context(), tenant.AppID(first))
		return countOf(t, conn, `apps WHERE state = 'purging'`) == 1
	})
	if n := countOf(t, conn, `apps WHERE state = 'building' AND NOT for_pool`); n != 1 {
		t.Errorf("%d builds run for a tenant whose build was given up; want 1", n)
	}
}

// An unstarted store begins no builds by itself.
type unstarted struct{ provision.Store }

func (unstarted) StartBuilds(context.Context, tenant.NextBuilds) error { return errors.New("test") }

func TestSignUpFromThePoolCallsNobody(t *testing.T) {
	t.Parallel()
	w := filled(t, 1)
	r := w.Start(provisiontest.Options{Idle: true, Adjust: pool(1, 1)})
	before := len(w.Sim.Calls())
	got, created, err := r.SignUp(t.Context(), "user_1", tenant.SignUp{}, 0, caller)
	if err != nil || !created || got.State != tenant.Active || !keyWorks(t, w, r, got) {
		t.Fatalf("SignUp = %+v, %v, %v; want an active tenant at once", got, created, err)
	}
	for _, c := range w.Sim.Calls()[before:] {
		if c.Call != "PostInputs" { // keyWorks
			t.Errorf("the sign-up called %s", c.Call)
		}
	}
	if _, _, err := r.SignUp(t.Context(), "user_1", tenant.SignUp{}, 0, caller); err != nil { // which is no other sign-up
		t.Fatal(err)
	}
	for i := range 2 {
		if _, _, err := r.SignUp(t.Context(), tenant.ID(fmt.Sprint("late_", i)), tenant.SignUp{}, 0, caller); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]float64{"tenantry_pool_hits_total": 1, "tenantry_pool_misses_total": 2} {
		if got := sumOf(t, r, name); got != want {
			t.Errorf("%s is %v; want %v", name, got, want)
		}
	}
}

// sumOf adds up what a metric has for all its labels.
func sumOf(t *testing.T, r *provisiontest.Replica, name string) float64 {
	t.Helper()
	families, err := r.Reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		if f.GetName() == name {
			for _, m := range f.GetMetric() {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return sum
}

// Of a hundred sign-ups at once as many as there are apps get one, and the others wait
// and are served as they came.
// Who makes a tenant that has an app at once is shown its key in the same transaction,
// and nobody else is.
func TestSignUpFromThePoolReveals(t *testing.T) {
	t.Parallel()
	w := filled(t, 1)
	r := w.Start(provisiontest.Options{Idle: true, Adjust: pool(1, 1)})
	conn := pgtest.Conn(t, w.URL)
	revealed := func() int {
		return countOf(t, conn, `audit_events e JOIN keys k ON k.id = e.key_id JOIN apps a ON a.id = k.app_id
			WHERE e.action = 'key.revealed' AND e.tenant_id = 'user_1' AND e.app_id = a.id AND e.actor = '`+caller.Name+`'`)
	}
	got, err := r.Service.SignUp(t.Context(), "user_1", tenant.SignUp{}, 0, caller)
	if err != nil || !got.Created || !got.Secret.IsSet() || got.Key.Name != tenant.DefaultKey || len(got.Key.Scopes) == 0 {
		t.Fatalf("SignUp = %+v, %v; want a tenant with its key", got, err)
	}
	if keys := w.AppKeys(); len(keys) != 1 || keys[0].ID != got.Secret.Reveal() || keys[0].AppID != string(got.Tenant.AppID) {
		t.Error("the key that was shown is not that of the tenant's app")
	}
	if n := revealed(); n != 1 {
		t.Errorf("%d events say that the key was shown; want 1", n)
	}
	if again, err := r.Service.SignUp(t.Context(), "user_1", tenant.SignUp{}, 0, caller); err != nil || again.Created || again.Secret.IsSet() {
		t.Errorf("the same sign-up again: %+v, %v; want a tenant that was found", again, err)
	}
	name := "another"
	if other, err := r.Service.SignUp(t.Context(), "user_1", tenant.SignUp{DisplayName: &name}, 0, caller); !errors.Is(err, tenant.Conflict) || other.Secret.IsSet() {
		t.Errorf("another sign-up of the id: %+v, %v; want a conflict", other, err)
	}
	if n := revealed(); n != 1 {
		t.Errorf("%d events say that the key was shown; want 1", n)
	}
}

func TestHundredSignUpsOnAPool(t *testing.T) {
	t.Parallel()
	const k, all = 5, 100
	w := filled(t, k)
	idle := w.Start(provisiontest.Options{Idle: true})
	var at atomic.Int64
	var wg sync.WaitGroup
	for i := range all {
		wg.Go(func() {
			got, _, err := idle.SignUp(t.Context(), tenant.ID(fmt.Sprintf("user_%02d", i)), tenant.SignUp{}, 0, caller)
			if err != nil {
				t.Errorf("sign-up %d: %v", i, err)
			}
			if got.State == tenant.Active {
				at.Add(1)
			}
		})
	}
	wg.Wait()
	conn := pgtest.Conn(t, w.URL)
	if had := countOf(t, conn, `tenants WHERE state = 'active'`); had != k || at.Load() > k {
		t.Errorf("%d tenants had an app at once, and %d were told so; want %d", had, at.Load(), k)
	}
	var waiting []tenant.ID
	rows, _ := conn.Query(t.Context(), `SELECT id FROM tenants WHERE state = 'provisioning' ORDER BY state_since, id`)
	waiting, err := pgx.CollectRows(rows, pgx.RowTo[tenant.ID])
	if err != nil {
		t.Fatal(err)
	}
	w.Start(provisiontest.Options{Workers: 1})
	provisiontest.Eventually(t, "all are active", func() bool { return countOf(t, conn, `tenants WHERE state = 'active'`) == all })
	rows, _ = conn.Query(t.Context(), `SELECT tenant_id FROM audit_events WHERE action = 'tenant.activated' ORDER BY id OFFSET $1`, k)
	served, err := pgx.CollectRows(rows, pgx.RowTo[tenant.ID])
	if err != nil || !slices.Equal(served, waiting) {
		t.Errorf("tenants waited in the order %v and were served in the order %v, %v", waiting, served, err)
	}
	if n := countOf(t, conn, `(SELECT FROM apps WHERE tenant_id IS NOT NULL GROUP BY tenant_id HAVING count(*) > 1) twice`); n != 0 {
		t.Errorf("%d tenants have two apps", n)
	}
}

// Who comes later takes no app from who waits, however many come.
func TestNobodyStarves(t *testing.T) {
	t.Parallel()
	const n = 10
	w := filled(t, n)
	r := w.Start(provisiontest.Options{Idle: true})
	exec(t, w, `UPDATE apps SET incarnation = gen_random_uuid() WHERE state = 'ready'`)
	for i := range n {
		if got, _, err := r.SignUp(t.Context(), tenant.ID(fmt.Sprint("early_", i)), tenant.SignUp{}, 0, caller); err != nil || got.State != tenant.Provisioning {
			t.Fatalf("SignUp = %+v, %v", got, err)
		}
	}
	exec(t, w, `UPDATE apps SET incarnation = stored_incarnation()`)
	for i := range n {
		if got, _, err := r.SignUp(t.Context(), tenant.ID(fmt.Sprint("late_", i)), tenant.SignUp{}, 0, caller); err != nil || got.State != tenant.Provisioning {
			t.Errorf("SignUp = %+v, %v; want the app given to who waited", got, err)
		}
		if got, err := r.Tenant(t.Context(), tenant.ID(fmt.Sprint("early_", i)), 0); err != nil || got.State != tenant.Active {
			t.Errorf("who came first is %+v, %v after %d apps were given", got, err, i+1)
		}
	}
}

// A pool goes over to another revision of its profile and never has fewer apps for it;
// an app of the older revision is better than none.
func TestPoolChangesRevision(t *testing.T) {
	t.Parallel()
	const n = 4
	w := filled(t, n)
	changed := func(c *provision.Config) {
		pool(n, n)(c)
		c.Profiles[0].Language = "en"
	}
	r := w.Start(provisiontest.Options{Adjust: changed})
	conn := pgtest.Conn(t, w.URL)
	revision := r.Profiles[0].Revision()
	provisiontest.Eventually(t, "the pool is of the other revision", func() bool {
		if ready := countOf(t, conn, `apps WHERE state = 'ready'`); ready < n {
			t.Fatalf("%d apps are ready; want no fewer than %d", ready, n)
		}
		return countOf(t, conn, fmt.Sprintf(`apps WHERE state = 'ready' AND profile_revision = '%s'`, revision)) == n
	})
	poolIs(t, w, n)
	if s := w.State(); s.Apps != n {
		t.Errorf("Clarifai has %d apps; want %d", s.Apps, n)
	}
	r.Stop()

	exec(t, w, `UPDATE apps SET profile_revision = 'older' WHERE id = (SELECT id FROM apps WHERE state = 'ready' ORDER BY ready_at LIMIT 1)`)
	r = w.Start(provisiontest.Options{Idle: true, Adjust: changed})
	for i := range n {
		got, _, err := r.SignUp(t.Context(), tenant.ID(fmt.Sprint("user_", i)), tenant.SignUp{}, 0, caller)
		if err != nil || got.State != tenant.Active {
			t.Fatalf("SignUp = %+v, %v", got, err)
		}
		var of string
		if err := conn.QueryRow(t.Context(), `SELECT profile_revision FROM apps WHERE id = $1`, got.AppID).Scan(&of); err != nil {
			t.Fatal(err)
		}
		if (of == "older") != (i == n-1) {
			t.Errorf("sign-up %d got an app of the revision %q", i, of)
		}
	}
}

// A turnCounter counts turns at the pools.
type turnCounter struct {
	provision.Store
	turns *atomic.Int64
}

func (c turnCounter) StartBuilds(ctx context.Context, n tenant.NextBuilds) error {
	err := c.Store.StartBuilds(ctx, n)
	c.turns.Add(1)
	return err
}

// Replicas that were started with different files do not remove each other's apps.
func TestReplicasOfTwoRevisions(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	var turns [2]atomic.Int64
	for i, language := range []string{"", "en"} {
		w.Start(provisiontest.Options{
			Adjust: func(c *provision.Config) {
				pool(2, 2)(c)
				c.PoolEvery = 500 * time.Millisecond // longer than a turn may be late
				c.Profiles[0].Language = language
			},
			Store: func(s provision.Store) provision.Store { return turnCounter{s, &turns[i]} },
		})
	}
	poolIs(t, w, 2)
	began := [2]int64{turns[0].Load(), turns[1].Load()}
	provisiontest.Eventually(t, "both have had many turns", func() bool { return turns[0].Load() > began[0]+60 && turns[1].Load() > began[1]+60 })
	if s := w.State(); s.Calls["PostApps"] != 2 || s.Calls["DeleteApp"] != 0 {
		t.Errorf("the simulator was asked %v; want no more than two apps to be made", s.Calls)
	}
}

// aDayAgo makes the apps of the pool old, as if no report had proven them.
func aDayAgo(t *testing.T, w *provisiontest.World) {
	t.Helper()
	exec(t, w, `UPDATE apps SET ready_at = now() - interval '2 days', proven_at = NULL WHERE state = 'ready'`)
	exec(t, w, `UPDATE pools SET ready_from = '-infinity'`)
}

// loseKeyOf removes the key of a ready app at Clarifai, and returns the app.
func loseKeyOf(t *testing.T, w *provisiontest.World) tenant.AppID {
	t.Helper()
	var app tenant.AppID
	if err := connOf(t, w).QueryRow(t.Context(), `SELECT id FROM apps WHERE state = 'ready' ORDER BY ready_at, id LIMIT 1`).Scan(&app); err != nil {
		t.Fatal(err)
	}
	for _, k := range w.AppKeys() {
		if k.AppID == string(app) {
			askClarifai(t, w, "DELETE", "/keys/"+k.ID, nil)
		}
	}
	return app
}

func TestDeadMemberIsReplaced(t *testing.T) {
	t.Parallel()
	w := filled(t, 3)
	dead := loseKeyOf(t, w)
	aDayAgo(t, w)
	r := w.Start(provisiontest.Options{Adjust: pool(3, 3)})
	conn := pgtest.Conn(t, w.URL)
	provisiontest.Eventually(t, "the dead app is retired", func() bool {
		return countOf(t, conn, fmt.Sprintf(`apps WHERE id = '%s' AND state = 'retired'`, dead)) == 1
	})
	poolIs(t, w, 3)
	provisiontest.Eventually(t, "the others are proven", func() bool { return countOf(t, conn, `apps WHERE proven_at IS NOT NULL AND state = 'ready'`) == 2 })
	if n := countOf(t, conn, `audit_events WHERE action = 'app.retired' AND detail ->> 'reason' = 'dead'`); n != 1 {
		t.Errorf("%d events tell of it; want one", n)
	}
	for i := range 3 {
		if got := signUp(t, r, tenant.ID(fmt.Sprint("user_", i))); got.AppID == dead || !keyWorks(t, w, r, got) {
			t.Errorf("a tenant was given %+v", got)
		}
	}
}

// That Clarifai refuses a key for a while is no reason to remove an app.
func TestRefusedMemberIsKept(t *testing.T) {
	t.Parallel()
	w := filled(t, 2)
	aDayAgo(t, w)
	w.Faults(map[string]any{"call": "MyScopes", "status": 11008})
	w.Start(provisiontest.Options{Adjust: pool(2, 2)})
	conn := pgtest.Conn(t, w.URL)
	provisiontest.Eventually(t, "both were looked at again", func() bool { return countOf(t, conn, `apps WHERE state = 'ready' AND attempts >= 2`) == 2 })
	w.Faults()
	provisiontest.Eventually(t, "both are proven", func() bool { return countOf(t, conn, `apps WHERE state = 'ready' AND proven_at IS NOT NULL`) == 2 })
	if s := w.State(); s.Calls["DeleteApp"] != 0 || s.Apps != 2 {
		t.Errorf("the simulator was asked %v", s.Calls)
	}
	var refused bool
	if err := conn.QueryRow(t.Context(), `SELECT EXISTS (SELECT FROM refused_pats)`).Scan(&refused); err != nil || refused {
		t.Errorf("the PAT counts as refused: %v, %v", refused, err)
	}
}

// A key that was dead when its tenant got it is noticed and made anew.
func TestDeadKeyThatWasHandedOut(t *testing.T) {
	t.Parallel()
	w := filled(t, 1)
	loseKeyOf(t, w)
	aDayAgo(t, w)
	idle := w.Start(provisiontest.Options{Idle: true})
	got, _, err := idle.SignUp(t.Context(), "user_1", tenant.SignUp{}, 0, caller)
	if err != nil || got.State != tenant.Active || keyWorks(t, w, idle, got) {
		t.Fatalf("SignUp = %+v, %v; want a tenant with a dead key", got, err)
	}
	r := w.Start(provisiontest.Options{})
	marked(t, w)
	rest(t, w)
	if !keyWorks(t, w, r, got) {
		t.Error("the key does not open the app")
	}
	conn := pgtest.Conn(t, w.URL)
	if n := countOf(t, conn, `audit_events WHERE action = 'key.gone' AND tenant_id = 'user_1'`); n != 1 {
		t.Errorf("%d events tell of it; want one", n)
	}
	if after, err := r.Tenant(t.Context(), "user_1", 0); err != nil || after.AppID != got.AppID || after.State != tenant.Active {
		t.Errorf("the tenant is %+v, %v", after, err)
	}
	// One that was in the pool for a moment is not looked at.
	before := w.State().Calls["MyScopes"]
	signUp(t, r, "user_2")
	rest(t, w)
	if n := w.State().Calls["MyScopes"]; n != before {
		t.Errorf("a new app was looked at %d times", n-before)
	}
}

// A report that has seen an app with its key proves it.
func TestReportProvesThePool(t *testing.T) {
	t.Parallel()
	w := filled(t, 3)
	dead := loseKeyOf(t, w)
	aDayAgo(t, w)
	r := w.Start(provisiontest.Options{Idle: true})
	began, err := r.StartReport(t.Context(), admin)
	if errors.Is(err, tenant.Conflict) {
		t.Fatal("a report runs")
	}
	if err != nil {
		t.Fatal(err)
	}
	provisiontest.Eventually(t, "the report is done", func() bool {
		r.WorkReconciliation(t.Context(), began.ID)
		is, err := r.DB.Reconciliation(t.Context(), began.ID)
		return err == nil && is.Done
	})
	rows, _ := connOf(t, w).Query(t.Context(), `SELECT id FROM apps WHERE state = 'ready' AND proven_at IS NULL`)
	unproven, err := pgx.CollectRows(rows, pgx.RowTo[tenant.AppID])
	if err != nil || !slices.Equal(unproven, []tenant.AppID{dead}) {
		t.Errorf("%v are not proven, %v; want %s, whose key is gone", unproven, err, dead)
	}
}

// An app that a tenant gets while it is looked at stays the tenant's.
func TestMemberIsClaimedWhileItIsLookedAt(t *testing.T) {
	t.Parallel()
	w := filled(t, 1)
	app := loseKeyOf(t, w)
	aDayAgo(t, w)
	var r *provisiontest.Replica
	var once sync.Once
	r = w.Start(provisiontest.Options{Idle: true, Store: func(s provision.Store) provision.Store {
		return claimingStore{s, func() {
			once.Do(func() {
				if got, _, err := r.SignUp(t.Context(), "user_1", tenant.SignUp{}, 0, caller); err != nil || got.AppID != app {
					t.Errorf("SignUp = %+v, %v; want the app that is looked at", got, err)
				}
			})
		}}
	}})
	r.WorkApp(t.Context(), app)
	if n := appsIn(t, w, tenant.AppHeld); n != 1 {
		t.Fatalf("%d apps are held; want the one that was claimed", n)
	}
	w.Start(provisiontest.Options{})
	marked(t, w)
	rest(t, w)
	if got, err := r.Tenant(t.Context(), "user_1", 0); err != nil || !keyWorks(t, w, r, got) {
		t.Errorf("the tenant is %+v, %v, and its key does not work", got, err)
	}
}

// A claimingStore does something before a dead app is taken out of the pool.
type claimingStore struct {
	provision.Store
	before func()
}

func (s claimingStore) MemberDead(ctx context.Context, a tenant.App, actor tenant.Actor) error {
	s.before()
	return s.Store.MemberDead(ctx, a, actor)
}

// Builds for the pool take what calls nobody else wants: who waits has a build of its
// own.
func TestWaiterDoesNotWaitForThePool(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{Idle: true, Adjust: pool(20, 20)})
	if err := r.SweepOnce(t.Context()); err != nil {
		t.Fatal(err)
	}
	conn := pgtest.Conn(t, w.URL)
	if n := countOf(t, conn, `apps WHERE state = 'building' AND for_pool`); n != provision.PoolBuilds {
		t.Errorf("%d apps are built for the pool at once; want %d", n, provision.PoolBuilds)
	}
	for i := range 2 {
		if _, _, err := r.SignUp(t.Context(), tenant.ID(fmt.Sprint("user_", i)), tenant.SignUp{}, 0, caller); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.SweepOnce(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := countOf(t, conn, `apps WHERE state = 'building' AND NOT for_pool`); n != 2 {
		t.Errorf("%d apps are built for two tenants that wait", n)
	}
}

func TestPoolIsNotFilledWhileNothingMoves(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{Idle: true, Adjust: pool(2, 2)})
	conn := pgtest.Conn(t, w.URL)
	building := func(why string, want int) {
		t.Helper()
		if err := r.SweepOnce(t.Context()); err != nil {
			t.Fatal(err)
		}
		if n := countOf(t, conn, `apps WHERE state = 'building'`); n != want {
			t.Errorf("%s: %d apps are being built; want %d", why, n, want)
		}
	}
	exec(t, w, provisiontest.SetRecovery(tenant.Stopped))
	building("while another database is in use", 0)
	exec(t, w, provisiontest.SetRecovery(tenant.NotRecovering)+`
		UPDATE upstream_budget SET pauses = 1, pause_reason = '{"code": "upstream_unavailable"}'`)
	building("in a pause", 0)
	exec(t, w, `UPDATE upstream_budget SET pauses = 0, pause_reason = NULL;
		INSERT INTO refused_pats (fingerprint, problem, next_check_at) SELECT pat, '{"code": "upstream_pat_refused"}', now() FROM replicas`)
	building("without a PAT", 0)
	exec(t, w, `DELETE FROM refused_pats`)
	building("when all is well", 2)
}

// An app that is nobody's by its row and a tenant's by its marker is not removed.
func TestDrainedAppOfATenantIsKept(t *testing.T) {
	t.Parallel()
	w := filled(t, 1)
	app := tenant.AppID(w.Sim.Apps()[0].ID)
	r := w.Start(provisiontest.Options{Idle: true})
	sealed, err := w.Keys.SealOwner(app, tenant.AppOwner{Tenant: "user_1", Generation: 1, Profile: tenant.DefaultProfile})
	if err != nil {
		t.Fatal(err)
	}
	marker := tenant.Marker{Deployment: r.Deployment.ID, App: app, Profile: tenant.DefaultProfile, Tenant: sealed}
	askClarifai(t, w, "PATCH", "/apps/"+string(app), map[string]any{"action": "overwrite",
		"app": map[string]any{"metadata": map[string]any{"tenantry": marker}}, "metadata_action": map[string]any{"op": "merge"}})
	exec(t, w, `UPDATE apps SET state = 'purging', next_attempt_at = now() WHERE id = $1`, app)
	r.WorkApp(t.Context(), app)
	if got := column(t, w, `SELECT state FROM apps`); !slices.Equal(got, []string{"retired"}) {
		t.Errorf("the app is %q", got)
	}
	if s := w.State(); s.Apps != 1 || s.Calls["DeleteApp"] != 0 {
		t.Errorf("the app of a tenant was removed: %v", s.Calls)
	}
}

// A step of the sweep that fails or waits stops no other.
func TestSweepStepsAreIndependent(t *testing.T) {
	t.Parallel()
	// One keeps readers out, the other, which an index is built with, writers alone.
	for _, mode := range []string{"ACCESS EXCLUSIVE", "SHARE"} {
		t.Run(mode, func(t *testing.T) { t.Parallel(); testLockedTables(t, mode) })
	}
}

func testLockedTables(t *testing.T, mode string) {
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	signUp(t, r, "user_1")
	eventuallyActive(t, r, 1)
	locks := pgtest.Conn(t, w.URL)
	for _, sql := range []string{
		`INSERT INTO reconciliations (id, kind, phase, requested_by) VALUES (gen_random_uuid(), 'report', 'apps', 'operator')`,
		`BEGIN; LOCK TABLE pools, campaigns, adoptions, reconciliations IN ` + mode + ` MODE`,
	} {
		if _, err := locks.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	expires := time.Now().Add(time.Second)
	if _, _, err := r.AddKey(t.Context(), "user_1", tenant.KeySpec{Name: "short", ExpiresAt: expires}, long, caller); err != nil {
		t.Fatal(err)
	}
	provisiontest.Eventually(t, "the key has ended", func() bool {
		return column(t, w, `SELECT state FROM keys WHERE name = 'short'`)[0] == "revoked"
	})
	if mode == "SHARE" { // which most steps do not meet
		return
	}
	provisiontest.Eventually(t, "a failure is counted", func() bool {
		families, err := r.Reg.Gather()
		for _, f := range families {
			if err == nil && f.GetName() == "tenantry_sweep_failures_total" {
				return true
			}
		}
		return false
	})
}

// hangingStore never responds to the first search of each kind of work.
type hangingStore struct {
	provision.Store
	hung *sync.Map
}

func (s hangingStore) DueWork(ctx context.Context, kind tenant.WorkKind, slots [tenant.Priorities]int) ([]tenant.DueWork, error) {
	if _, again := s.hung.LoadOrStore(kind, true); !again {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return s.Store.DueWork(ctx, kind, slots)
}

// A search that an outage has left without a response does not hold up work for long after the outage.
func TestSearchThatHangs(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{Store: func(s provision.Store) provision.Store { return hangingStore{s, &sync.Map{}} }})
	signUp(t, r, "user_1")
}

// A rare step that fails is retried soon, and then less and less often; a frequent one at its next turn.
func TestFailedStepsBackOff(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{Idle: true, Adjust: func(c *provision.Config) { c.SweepEvery = time.Second }})
	for failures, want := range []time.Duration{10 * time.Minute, 10 * time.Second, 20 * time.Second, 40 * time.Second, 80 * time.Second,
		160 * time.Second, 320 * time.Second, 10 * time.Minute, 10 * time.Minute} {
		if got := r.PauseAfter(10*time.Minute, failures); got != want {
			t.Errorf("after %d failures a step that is due every 10 minutes pauses for %s; want %s", failures, got, want)
		}
		if got := r.PauseAfter(0, failures); got != time.Second {
			t.Errorf("after %d failures a step of each turn pauses for %s; want 1s", failures, got)
		}
	}
}
