package provision_test

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// batchOf are sign-ups of n tenants that say nothing of themselves.
func batchOf(prefix string, n int) []provision.BatchSignUp {
	ups := make([]provision.BatchSignUp, n)
	for i := range ups {
		ups[i].ID = tenant.ID(fmt.Sprintf("%s_%04d", prefix, i))
	}
	return ups
}

// importAll signs tenants up in the background, and returns how many it made.
func importAll(t *testing.T, r *provisiontest.Replica, ups []provision.BatchSignUp) (made int) {
	t.Helper()
	ends, err := r.SignUpMany(t.Context(), ups, provision.BatchRule{}, caller)
	if err != nil {
		t.Fatalf("SignUpMany: %v", err)
	}
	for i, end := range ends {
		if end.Err != nil {
			t.Fatalf("sign-up %d of %d: %v", i, len(ups), end.Err)
		}
		if end.Created {
			made++
		}
	}
	return made
}

// served are the tenants in the order in which they got their apps.
func served(t *testing.T, conn *pgx.Conn) []tenant.ID {
	t.Helper()
	rows, _ := conn.Query(t.Context(), `SELECT tenant_id FROM audit_events WHERE action = 'tenant.activated' ORDER BY id`)
	ids, err := pgx.CollectRows(rows, pgx.RowTo[tenant.ID])
	if err != nil {
		t.Fatal(err)
	}
	return ids
}

// An import ends, with one app for each tenant, where no pool is kept; the same again
// makes nothing.
func TestImportEnds(t *testing.T) {
	t.Parallel()
	const n = 260 // more than a chunk
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	w.Start(provisiontest.Options{})
	conn := pgtest.Conn(t, w.URL)
	ups := batchOf("user", n)
	if made := importAll(t, r, ups); made != n {
		t.Errorf("%d tenants were made; want %d", made, n)
	}
	slices.Reverse(ups)
	if made := importAll(t, r, ups); made != 0 {
		t.Errorf("the same again makes %d tenants", made)
	}
	provisiontest.Eventually(t, "all are active", func() bool { return countOf(t, conn, `tenants WHERE state = 'active'`) == n })
	provisiontest.Eventually(t, "all apps are marked", func() bool { return countOf(t, conn, `apps WHERE state = 'held' AND pending`) == 0 })
	if s := w.State(); s.Apps != n || s.Keys != n {
		t.Errorf("Clarifai has %d apps and %d keys; want %d of each", s.Apps, s.Keys, n)
	}
	for action, want := range map[string]int{"tenant.created": n, "tenant.activated": n} {
		if got := countOf(t, conn, fmt.Sprintf(`audit_events WHERE action = '%s'`, action)); got != want {
			t.Errorf("%d events %s; want %d", got, action, want)
		}
	}
	if _, secret := keyOf(t, r, "user_0007"); !secret.IsSet() {
		t.Error("an imported tenant has no key")
	}
}

// Apps on their way to who is imported are no surplus of the pool, and in the end the pool
// has what it had.
func TestImportBesideAPool(t *testing.T) {
	t.Parallel()
	const n = 60
	w := filled(t, 2)
	r := w.Start(provisiontest.Options{Adjust: func(c *provision.Config) {
		pool(2, 2)(c)
		c.PoolEvery, c.PoolPatience = time.Millisecond, time.Nanosecond
	}})
	conn := pgtest.Conn(t, w.URL)
	importAll(t, r, batchOf("user", n))
	provisiontest.Eventually(t, "all are active", func() bool { return countOf(t, conn, `tenants WHERE state = 'active'`) == n })
	poolIs(t, w, 2)
	if drained := countOf(t, conn, `audit_events WHERE action = 'app.drained'`); drained != 0 || w.State().Apps != n+2 {
		t.Errorf("%d apps were taken out of the pool, and Clarifai has %d; want none, and %d", drained, w.State().Apps, n+2)
	}
}

// While many wait from an import, who signs up finds the pool full and has an app at
// once; the pool gets what is built first, and is kept for no more because of the import.
func TestSignUpsDuringAnImport(t *testing.T) {
	t.Parallel()
	const inPool, imported = 4, 2000
	w := filled(t, inPool)
	idle := w.Start(provisiontest.Options{Idle: true, Adjust: pool(inPool, 50)})
	conn := pgtest.Conn(t, w.URL)
	importAll(t, idle, batchOf("imported", imported))
	for i := range inPool {
		got, created, err := idle.SignUp(t.Context(), tenant.ID(fmt.Sprint("user_", i)), tenant.SignUp{}, 0, caller)
		if err != nil || !created || got.State != tenant.Active {
			t.Fatalf("SignUp = %+v, %v, %v; want an app at once", got, created, err)
		}
	}
	for i := range 3 { // who finds none is served before who waits from the import
		got, _, err := idle.SignUp(t.Context(), tenant.ID(fmt.Sprint("late_", i)), tenant.SignUp{}, 0, caller)
		if err != nil || got.State != tenant.Provisioning {
			t.Fatalf("SignUp = %+v, %v", got, err)
		}
	}
	w.Start(provisiontest.Options{Workers: 4, Adjust: pool(inPool, 50)})
	provisiontest.Eventually(t, "the import goes on", func() bool { return countOf(t, conn, `tenants WHERE state = 'active' AND background`) > 0 })
	if got := served(t, conn)[:3]; !slices.Equal(slices.Sorted(slices.Values(got)), []tenant.ID{"late_0", "late_1", "late_2"}) {
		t.Errorf("the first that were served are %v; want who signed up", got)
	}
	var target int
	provisiontest.Eventually(t, "the pool is full", func() bool {
		if err := conn.QueryRow(t.Context(), `SELECT target FROM pools WHERE profile = 'default'`).Scan(&target); err != nil {
			t.Fatal(err)
		}
		return countOf(t, conn, `apps WHERE state = 'ready'`) >= target
	})
	if target > 20 {
		t.Errorf("the pool shall have %d apps: the import counts as demand", target)
	}
	u, _, err := idle.UpstreamStatus(t.Context())
	if err != nil || u.Waiting != 0 || u.Importing == 0 {
		t.Errorf("UpstreamStatus = %+v, %v; want many that wait in the background, and nobody else", u, err)
	}
}

// Apps that the pool needs are not for an import.
func TestImportTakesWhatThePoolDoesNotNeed(t *testing.T) {
	t.Parallel()
	w := filled(t, 5)
	r := w.Start(provisiontest.Options{Idle: true, Adjust: pool(5, 5)})
	conn := pgtest.Conn(t, w.URL)
	importAll(t, r, batchOf("imported", 10))
	claim := func(wantActive int) {
		t.Helper()
		if err := r.DB.ClaimInBackground(t.Context(), r.Profiles[0], caller); err != nil {
			t.Fatal(err)
		}
		if n := countOf(t, conn, `tenants WHERE state = 'active'`); n != wantActive {
			t.Errorf("%d imported tenants are active; want %d", n, wantActive)
		}
	}
	claim(0)
	exec(t, w, `UPDATE pools SET target = 3`)
	exec(t, w, provisiontest.SetRecovery(tenant.Stopped))
	claim(0)
	exec(t, w, provisiontest.SetRecovery(tenant.NotRecovering))
	exec(t, w, `UPDATE tenants SET background = false WHERE id = 'imported_0009'`)
	claim(0) // another waits
	exec(t, w, `UPDATE tenants SET background = true WHERE id = 'imported_0009'`)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() { _ = r.DB.ClaimInBackground(t.Context(), r.Profiles[0], caller) })
	}
	wg.Wait()
	claim(2)
	if got := served(t, conn); !slices.Equal(got, []tenant.ID{"imported_0000", "imported_0001"}) {
		t.Errorf("%v were served; want who waited longest", got)
	}
	if n := countOf(t, conn, `apps a JOIN tenants t ON t.id = a.tenant_id AND t.app_id = a.id WHERE a.state = 'held'`); n != 2 {
		t.Errorf("%d apps and tenants name each other; want 2", n)
	}
}

// Builds for an import are begun when the pool has what it shall have or is getting it,
// and no more at once than there are calls.
func TestBuildsForAnImport(t *testing.T) {
	t.Parallel()
	w := filled(t, 2)
	r := w.Start(provisiontest.Options{Idle: true, Adjust: func(c *provision.Config) {
		pool(2, 2)(c)
		c.Rate = 14
	}})
	conn := pgtest.Conn(t, w.URL)
	importAll(t, r, batchOf("imported", 5))
	sweep := func(wantBuilding int) {
		t.Helper()
		if err := r.SweepOnce(t.Context()); err != nil {
			t.Fatal(err)
		}
		if n, others := countOf(t, conn, `apps WHERE state = 'building' AND for_pool`), countOf(t, conn, `apps WHERE state = 'building' AND NOT for_pool`); n != wantBuilding || others != 0 {
			t.Errorf("%d apps are built in the background, and %d others; want %d and none", n, others, wantBuilding)
		}
	}
	sweep(5)
	sweep(5)
	importAll(t, r, batchOf("more", 100))
	sweep(14)
	sweep(14)
}

// Who signs up before their turn in an import waits no longer for it.
func TestSignUpOfWhoIsImported(t *testing.T) {
	t.Parallel()
	w := filled(t, 2)
	r := w.Start(provisiontest.Options{Idle: true, Adjust: pool(2, 2)})
	conn := pgtest.Conn(t, w.URL)
	importAll(t, r, batchOf("user", 10))
	for i, want := range []tenant.State{tenant.Active, tenant.Active, tenant.Provisioning} {
		id := tenant.ID(fmt.Sprintf("user_%04d", 9-i))
		got, created, err := r.SignUp(t.Context(), id, tenant.SignUp{}, 0, caller)
		if err != nil || created || got.State != want {
			t.Errorf("SignUp of %s = %+v, %v, %v; want it found and %s", id, got, created, err, want)
		}
	}
	if n := countOf(t, conn, `tenants WHERE state = 'provisioning' AND NOT background AND id = 'user_0007'`); n != 1 {
		t.Error("who has come for an app still waits in the background")
	}
	if n := countOf(t, conn, `apps WHERE state = 'building' AND NOT for_pool`); n != 1 {
		t.Errorf("%d builds were begun for who has come; want 1", n)
	}
	name := "another"
	if _, _, err := r.SignUp(t.Context(), "user_0001", tenant.SignUp{DisplayName: &name}, 0, caller); !errors.Is(err, tenant.Conflict) {
		t.Errorf("another sign-up of the id: %v; want a conflict", err)
	}
}

// Who signs up while an app is built for their import gets that build, and no other is begun.
func TestSignUpWhileAnImportBuilds(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{Idle: true})
	conn := pgtest.Conn(t, w.URL)
	importAll(t, r, batchOf("user", 5))
	if err := r.SweepOnce(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		id            tenant.ID
		urgent, other int
	}{{"user_0001", 1, 4}, {"user_0004", 2, 3}, {"another", 3, 3}} {
		if _, _, err := r.SignUp(t.Context(), c.id, tenant.SignUp{}, 0, caller); err != nil {
			t.Fatal(err)
		}
		if urgent, other := countOf(t, conn, `apps WHERE state = 'building' AND NOT for_pool`), countOf(t, conn, `apps WHERE state = 'building' AND for_pool`); urgent != c.urgent || other != c.other {
			t.Errorf("after the sign-up of %s %d builds run for waiting tenants and %d others; want %d and %d", c.id, urgent, other, c.urgent, c.other)
		}
	}
}

// While tenants sign up, are imported and sign up before their turn, and builds end and are given up, in two
// replicas: no more apps are built than tenants, the pool at its maximum and the builds that were given up.
func TestNoAppTooMany(t *testing.T) {
	t.Parallel()
	for name, most := range map[string]int{"without pool": 0, "pool": 4} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const n = 40
			w := provisiontest.New(t)
			w.Settings(map[string]any{"masked_keys": true, "latency_ms": 100})
			w.Faults(map[string]any{"call": "PostKeys", "probability": 0.2, "drop_after": true})
			conn := pgtest.Conn(t, w.URL)
			var replicas []*provisiontest.Replica
			for range 2 {
				replicas = append(replicas, w.Start(provisiontest.Options{Adjust: func(c *provision.Config) {
					pool(0, most)(c)
					c.PoolPatience = time.Hour
				}}))
			}
			importAll(t, replicas[0], batchOf("imported", n))
			provisiontest.Eventually(t, "builds run for the import", func() bool { return countOf(t, conn, `apps WHERE state = 'building' AND for_pool`) > n/2 })
			var wg sync.WaitGroup
			for i := range n {
				for _, id := range []string{"user_%04d", "imported_%04d"}[:1+i%2] {
					wg.Go(func() {
						if _, _, err := replicas[i%2].SignUp(t.Context(), tenant.ID(fmt.Sprintf(id, i)), tenant.SignUp{}, 0, caller); err != nil {
							t.Error(err)
						}
					})
				}
			}
			wg.Wait()
			provisiontest.Eventually(t, "all are active", func() bool { return countOf(t, conn, `tenants WHERE state = 'active'`) == 2*n })
			w.Faults()
			rest(t, w)
			made, abandoned := countOf(t, conn, `apps`), countOf(t, conn, `audit_events WHERE action = 'app.abandoned'`)
			if spare := made - abandoned - 2*n; abandoned == 0 || spare < 0 || spare > most {
				t.Errorf("%d apps were begun and %d given up for %d tenants; want up to %d more", made, abandoned, 2*n, most)
			}
		})
	}
}

// Each sign-up of a batch ends as it would alone.
func TestBatchRefuses(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{Idle: true})
	importAll(t, r, []provision.BatchSignUp{{ID: "there", SignUp: tenant.SignUp{Labels: map[string]string{"plan": "pro"}}}, {ID: "theirs", SignUp: tenant.SignUp{Labels: map[string]string{"team": "b"}}}, {ID: "gone"}, {ID: "going"}, {ID: "theirs gone", SignUp: tenant.SignUp{Labels: map[string]string{"team": "b"}}}})
	exec(t, w, `UPDATE tenants SET state = 'deleted' WHERE id LIKE '%gone'`)
	exec(t, w, `UPDATE tenants SET labels = '{"team":"a"}' WHERE id = 'gone'`)
	none, narrow, ada, bob := "none", "narrow", "Ada", "Bob"
	batch := func() []provision.BatchSignUp {
		return []provision.BatchSignUp{
			{ID: "new", SignUp: tenant.SignUp{DisplayName: &ada}},
			{ID: "new", SignUp: tenant.SignUp{DisplayName: &ada}},
			{ID: "new", SignUp: tenant.SignUp{DisplayName: &bob}},
			{ID: "new", SignUp: tenant.SignUp{Profile: &narrow}},
			{ID: "broken", Fault: tenant.Errorf(tenant.Invalid, "invalid_x", "is broken")},
			{ID: "broken", SignUp: tenant.SignUp{Profile: &none}},
			{ID: "broken", SignUp: tenant.SignUp{Labels: map[string]string{"-": ""}}},
			{ID: "broken", SignUp: tenant.SignUp{Labels: map[string]string{"team": "b"}}},
			{ID: "theirs"},
			{ID: "gone"},
			{ID: "theirs gone"},
		}
	}
	codes := func(ends []provision.BatchEnd, err error) (codes []string) {
		t.Helper()
		if err != nil {
			t.Fatalf("SignUpMany: %v", err)
		}
		for _, end := range ends {
			code := string(end.Tenant.State)
			if end.Created {
				code = "created"
			}
			if e, ok := errors.AsType[*tenant.Error](end.Err); ok {
				code = e.Code
			}
			codes = append(codes, code)
		}
		return codes
	}
	limited := caller
	limited.Within = tenant.Scope{"team": "a"}
	if got := codes(r.SignUpMany(t.Context(), []provision.BatchSignUp{{ID: "gone"}}, provision.BatchRule{LeaveDeleted: true}, caller)); !slices.Equal(got, []string{"tenant_deleting"}) {
		t.Errorf("of who was deleted and shall not begin again came %v", got)
	}
	refusals := []string{"invalid_x", "profile_unknown", "invalid_labels", "label_forbidden", "tenant_not_found", "created", "tenant_not_found"}
	for _, dry := range []bool{true, false} {
		want := append([]string{"created", "provisioning", "attributes_differ", "attributes_differ"}, refusals...)
		if dry {
			want = append([]string{"created", "created", "created", "created"}, refusals...)
		}
		if got := codes(r.SignUpMany(t.Context(), batch(), provision.BatchRule{DryRun: dry}, limited)); !slices.Equal(got, want) {
			t.Errorf("of a batch (dry run: %v) came %v; want %v", dry, got, want)
		}
		if n, want := countOf(t, pgtest.Conn(t, w.URL), `tenants`), map[bool]int{true: 5, false: 6}[dry]; n != want {
			t.Errorf("there are %d tenants (dry run: %v); want %d", n, dry, want)
		}
	}
	var generation int
	var labels map[string]string
	if err := connOf(t, w).QueryRow(t.Context(), `SELECT generation, labels FROM tenants WHERE id = 'gone' AND background AND state = 'provisioning'`).Scan(&generation, &labels); err != nil || generation != 2 || labels["team"] != "a" {
		t.Errorf("who was deleted is in generation %d with the labels %v, %v; want the next generation", generation, labels, err)
	}
}

// Batches that name the same tenants in other orders do not stand in each other's way.
func TestBatchesAtOnce(t *testing.T) {
	t.Parallel()
	const n = 200
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{Idle: true})
	importAll(t, r, batchOf("deleted", n))
	exec(t, w, `UPDATE tenants SET state = 'deleted'`)
	var wg sync.WaitGroup
	var mu sync.Mutex
	made := 0
	for i := range 8 {
		wg.Go(func() {
			ups := append(batchOf("user", n), batchOf("deleted", n)...)
			if i%2 == 1 {
				slices.Reverse(ups)
			}
			ends, err := r.SignUpMany(t.Context(), ups, provision.BatchRule{}, caller)
			if err != nil {
				t.Errorf("SignUpMany: %v", err)
			}
			mu.Lock()
			defer mu.Unlock()
			for _, end := range ends {
				if end.Created {
					made++
				}
			}
		})
	}
	wg.Wait()
	if made != 2*n {
		t.Errorf("%d tenants were made; want %d", made, 2*n)
	}
}
