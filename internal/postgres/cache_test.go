package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/localpg"
	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// follow makes db follow the change log until the test ends, or the func that it
// returns is called.
func follow(t *testing.T, db *postgres.DB) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var done sync.WaitGroup
	done.Go(func() { _ = db.Follow(ctx, zap.NewNop()) })
	stop = sync.OnceFunc(func() { cancel(); done.Wait() })
	t.Cleanup(stop)
	until(t, "the log is followed", func() bool { return db.CacheStats().Trusted })
	return stop
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.NewTimer(30 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-deadline.C:
			t.Fatalf("waited in vain: %s", what)
		case <-tick.C:
		}
	}
}

// replica is another replica, which follows the log.
func replica(t *testing.T, url tenant.Secret) *postgres.DB {
	t.Helper()
	db := pgtest.OpenURL(t, url)
	follow(t, db)
	return db
}

// signUp signs a tenant up that gets an app at once.
func signUp(t *testing.T, url tenant.Secret, db *postgres.DB, id tenant.ID) tenant.Tenant {
	t.Helper()
	app := "t-" + string(id)
	if _, err := pgtest.Conn(t, url).Exec(t.Context(), `
		INSERT INTO apps (id, profile, profile_revision, state, made_at, ready_at) VALUES ($1, 'default', 'x', 'ready', now(), now())`, app); err != nil {
		t.Fatal(err)
	}
	if _, err := pgtest.Conn(t, url).Exec(t.Context(), `
		INSERT INTO keys (id, app_id, name, state, scopes, ciphertext, fingerprint, activated_at)
		VALUES (gen_random_uuid(), $1::text, 'default', 'active', '{All}', '\x00', sha256(convert_to($1, 'UTF8')), now())`, app); err != nil {
		t.Fatal(err)
	}
	got, err := db.SignUp(t.Context(), newTenant(id), actor)
	if err != nil || got.Tenant.State != tenant.Active {
		t.Fatalf("SignUp = %+v, %v", got, err)
	}
	return got.Tenant
}

// caughtUp waits until all events that are there have been acted on.
func caughtUp(t *testing.T, db *postgres.DB) {
	t.Helper()
	began := time.Now()
	until(t, "the log is read to its end", func() bool {
		behind := db.CacheStats().Behind
		return behind >= 0 && behind < time.Since(began)
	})
}

// held looks a tenant up until that is answered from memory, from where no event that is
// there takes it any more.
func held(t *testing.T, db *postgres.DB, id tenant.ID) tenant.Tenant {
	t.Helper()
	caughtUp(t, db)
	var got tenant.Tenant
	until(t, "the look-up is answered from memory", func() bool {
		before := db.CacheStats().Hits
		var err error
		if got, _, err = db.LookUpTenant(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		return db.CacheStats().Hits > before
	})
	return got
}

// heldCaller waits until a token is held in memory.
func heldCaller(t *testing.T, db *postgres.DB, token tenant.Token) {
	t.Helper()
	caughtUp(t, db)
	until(t, "the token is held in memory", func() bool { // which it is once it was asked for while memory was trusted
		if _, _, err := db.Authenticate(t.Context(), token); err != nil {
			t.Fatal(err)
		}
		return db.HoldsCaller(token.ID)
	})
}

func rename(t *testing.T, db *postgres.DB, id tenant.ID, name string) {
	t.Helper()
	if _, err := db.UpdateTenant(t.Context(), id, tenant.Patch{DisplayName: &name}, func(tenant.Tenant) bool { return true }, actor); err != nil {
		t.Fatal(err)
	}
}

func nameOf(t *testing.T, db *postgres.DB, id tenant.ID) string {
	t.Helper()
	got, fresh, err := db.LookUpTenant(t.Context(), id)
	if err != nil || fresh.Stale() {
		t.Fatalf("LookUpTenant = %v, %v", fresh, err)
	}
	return got.DisplayName
}

// What one replica changes is seen on another, whatever was looked up there before.
func TestChangesAreSeen(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	a, b := replica(t, url), replica(t, url)
	if _, _, err := b.LookUpTenant(t.Context(), "user_1"); !errors.Is(err, tenant.NotFound) {
		t.Fatal(err)
	}
	if _, _, err := b.LookUpTenantOfApp(t.Context(), "t-user_1"); !errors.Is(err, tenant.NotFound) {
		t.Fatal(err)
	}
	if _, _, err := b.LookUpKeys(t.Context(), "user_1"); !errors.Is(err, tenant.NotFound) {
		t.Fatal(err)
	}
	want := signUp(t, url, a, "user_1")
	until(t, "the new tenant is seen", func() bool { _, _, err := b.LookUpTenant(t.Context(), "user_1"); return err == nil })
	until(t, "the tenant of the app is seen", func() bool { _, _, err := b.LookUpTenantOfApp(t.Context(), want.AppID); return err == nil })
	until(t, "the keys are seen", func() bool {
		keys, _, err := b.LookUpKeys(t.Context(), "user_1")
		return err == nil && len(keys) == 1
	})
	plain, err := b.Tenant(t.Context(), "user_1")
	if err != nil {
		t.Fatal(err)
	}
	if len(plain.Labels) == 0 { // none is told from an empty map nowhere
		plain.Labels = nil
	}
	if diff := cmp.Diff(plain, held(t, b, "user_1")); diff != "" {
		t.Errorf("what is held differs from what is read (-read +held):\n%s", diff)
	}
	read, err := b.Keys(t.Context(), "user_1")
	if err != nil {
		t.Fatal(err)
	}
	keys, _, err := b.LookUpKeys(t.Context(), "user_1")
	if diff := cmp.Diff(read, keys); diff != "" || err != nil {
		t.Errorf("the keys that are held differ from those that are read (-read +held):\n%s%v", diff, err)
	}

	rename(t, a, "user_1", "Ada")
	until(t, "the new name is seen", func() bool { return nameOf(t, b, "user_1") == "Ada" })
	held(t, b, "user_1")
	if _, err := a.Suspend(t.Context(), "user_1", actor); err != nil {
		t.Fatal(err)
	}
	until(t, "the suspension is seen", func() bool {
		got, _, err := b.LookUpTenant(t.Context(), "user_1")
		return err == nil && got.State == tenant.Suspending
	})
	until(t, "the end of the key is seen", func() bool {
		keys, _, err := b.LookUpKeys(t.Context(), "user_1")
		return err == nil && keys[0].State == tenant.KeyRevoking
	})
}

// A replica that no wake-up reaches sees changes all the same; here a change that was
// made by something that sends none.
func TestLostWakeUp(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	silent, b := pgtest.OpenURL(t, url), replica(t, url)
	signUp(t, url, silent, "user_1")
	held(t, b, "user_1")
	rename(t, silent, "user_1", "Ada")
	until(t, "the change is seen", func() bool { return nameOf(t, b, "user_1") == "Ada" })
}

// A transaction that commits after others which drew their events' ids later is seen,
// and one that comes to nothing is not waited for.
func TestGaps(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	a, b := replica(t, url), replica(t, url)
	for _, id := range []tenant.ID{"user_1", "user_2", "user_3"} {
		signUp(t, url, a, id)
		held(t, b, id)
	}
	conn := pgtest.Conn(t, url)
	for _, end := range []string{"COMMIT", "ROLLBACK"} {
		if _, err := conn.Exec(t.Context(), `BEGIN;
			UPDATE tenants SET display_name = 'late' || version, version = version + 1 WHERE id = 'user_1';
			INSERT INTO audit_events (actor, action, tenant_id) VALUES ('test', 'tenant.changed', 'user_1')`); err != nil {
			t.Fatal(err)
		}
		// Somebody else's event is acted on although one before it is missing.
		rename(t, a, "user_2", "after "+end)
		until(t, "the later event is seen", func() bool { return nameOf(t, b, "user_2") == "after "+end })
		until(t, "the gap is noticed", func() bool { return b.CacheStats().Gaps == 1 })
		before := held(t, b, "user_1").DisplayName
		if _, err := conn.Exec(t.Context(), end); err != nil {
			t.Fatal(err)
		}
		if end == "COMMIT" {
			until(t, "the late change is seen", func() bool { return nameOf(t, b, "user_1") != before })
		}
		until(t, "the gap is closed", func() bool { return b.CacheStats().Gaps == 0 })
	}
}

// Of two transactions, one has the lower transaction id and the other the lower event id. The event
// that is missing after the first commit is still awaited.
func TestGapOfLaterTransaction(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	a, b := replica(t, url), replica(t, url)
	for _, id := range []tenant.ID{"user_1", "user_2"} {
		signUp(t, url, a, id)
		held(t, b, id)
	}
	slow, quick := pgtest.Conn(t, url), pgtest.Conn(t, url)
	run(t, quick, `BEGIN; UPDATE tenants SET display_name = 'quick', version = version + 1 WHERE id = 'user_2'`)
	run(t, slow, `BEGIN; UPDATE tenants SET display_name = 'slow', version = version + 1 WHERE id = 'user_1';
		INSERT INTO audit_events (actor, action, tenant_id) VALUES ('test', 'tenant.changed', 'user_1')`)
	run(t, quick, `INSERT INTO audit_events (actor, action, tenant_id) VALUES ('test', 'tenant.changed', 'user_2'); COMMIT`)
	until(t, "the later event is seen", func() bool { return nameOf(t, b, "user_2") == "quick" })
	for i := range 5 { // each change is one more read of the log
		name := fmt.Sprint("read ", i)
		rename(t, a, "user_2", name)
		until(t, "the log is read", func() bool { return nameOf(t, b, "user_2") == name })
	}
	held(t, b, "user_1")
	run(t, slow, `COMMIT`)
	until(t, "the late change is seen", func() bool { return nameOf(t, b, "user_1") == "slow" })
	until(t, "the gap is closed", func() bool { return b.CacheStats().Gaps == 0 })
}

// A replica that begins to follow while an event is under way waits for it.
func TestBeginWhileAnEventIsUnderWay(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	a, b := replica(t, url), pgtest.OpenURL(t, url)
	signUp(t, url, a, "user_1")
	conn := pgtest.Conn(t, url)
	if _, err := conn.Exec(t.Context(), `BEGIN;
		UPDATE tenants SET display_name = 'late' WHERE id = 'user_1';
		INSERT INTO audit_events (actor, action, tenant_id) VALUES ('test', 'tenant.changed', 'user_1')`); err != nil {
		t.Fatal(err)
	}
	signUp(t, url, a, "user_2") // an event after it
	ctx, cancel := context.WithCancel(t.Context())
	var done sync.WaitGroup
	done.Go(func() { _ = b.Follow(ctx, zap.NewNop()) })
	t.Cleanup(func() { cancel(); done.Wait() })
	looking := pgtest.Conn(t, url)
	until(t, "it looks whether the transaction still runs", func() bool {
		return count(t, looking, `pg_stat_activity WHERE query LIKE '%virtualtransaction = ANY%' AND datname = current_database() AND pid <> pg_backend_pid()`) > 0
	})
	if b.CacheStats().Trusted || nameOf(t, b, "user_1") != "" || b.CacheStats().Entries != 0 {
		t.Errorf("while an event is under way whose id is passed over: %+v", b.CacheStats())
	}
	if _, err := conn.Exec(t.Context(), `COMMIT`); err != nil {
		t.Fatal(err)
	}
	until(t, "it is trusted", func() bool { return b.CacheStats().Trusted })
	if got := nameOf(t, b, "user_1"); got != "late" {
		t.Errorf("then the name is %q", got)
	}
}

// An entry that was not read for a minute is read again before it is served as fresh, so that a change without
// an event is seen. The minute includes the time for which the machine was suspended.
func TestUnconfirmedEntriesAreRead(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	a, b := pgtest.OpenURL(t, url), replica(t, url)
	conn := pgtest.Conn(t, url)
	of := signUp(t, url, a, "user_1")
	run(t, conn, `INSERT INTO apps (id, profile, profile_revision, state) VALUES ('later', 'default', 'x', 'building')`)
	token, _ := addCaller(t, a, tenant.NewCaller{Name: "saas", Role: tenant.Viewer})
	say := func(what any, fresh postgres.Freshness, err error) string {
		switch {
		case err == nil && !fresh.Stale():
			return fmt.Sprint(what)
		case errors.Is(err, tenant.NotFound), errors.Is(err, tenant.Unauthenticated):
			return "none"
		}
		return fmt.Sprint(what, fresh, err)
	}
	tenantOf := func(id tenant.ID) func() string {
		return func() string {
			got, fresh, err := b.LookUpTenant(t.Context(), id)
			return say(string(got.ID)+" "+got.DisplayName, fresh, err)
		}
	}
	ownerOf := func(app tenant.AppID) func() string {
		return func() string {
			got, fresh, err := b.LookUpTenantOfApp(t.Context(), app)
			return say(string(got.ID)+" "+got.DisplayName, fresh, err)
		}
	}
	keysOf := func(id tenant.ID) func() string {
		return func() string {
			keys, fresh, err := b.LookUpKeys(t.Context(), id)
			return say(len(keys), fresh, err)
		}
	}
	entries := []struct {
		name          string
		look          func() string
		before, after string
	}{
		{"caller", func() string {
			caller, fresh, err := b.Authenticate(t.Context(), token)
			return say(caller.Name, fresh, err)
		}, "saas", "none"},
		{"tenant", tenantOf("user_1"), "user_1 ", "user_1 by hand"},
		{"tenant of app", ownerOf(of.AppID), "user_1 ", "user_1 by hand"},
		{"keys", keysOf("user_1"), "1", "0"},
		{"unknown tenant", tenantOf("user_2"), "none", "user_2 "},
		{"tenant of unknown app", ownerOf("later"), "none", "user_2 "},
		{"keys of unknown tenant", keysOf("user_2"), "none", "0"},
	}
	caughtUp(t, b)
	for _, e := range entries {
		if got := e.look(); got != e.before {
			t.Fatalf("%s: before the change: %q; want %q", e.name, got, e.before)
		}
	}
	run(t, conn, `
		UPDATE callers SET revoked_at = now();
		UPDATE tenants SET display_name = 'by hand' WHERE id = 'user_1';
		DELETE FROM keys;
		UPDATE apps SET state = 'held', tenant_id = 'user_2', tenant_generation = 1, made_at = now(), ready_at = now() WHERE id = 'later';
		INSERT INTO tenants (id, state, profile, app_id, attributes_hash) VALUES ('user_2', 'active', 'default', 'later', decode(repeat('00', 64), 'hex'))`)
	b.Forward(time.Minute)
	until(t, "it is trusted", func() bool { return b.CacheStats().Trusted })
	for _, e := range entries {
		if got := e.look(); got != e.after {
			t.Errorf("%s: a minute after a change without an event: %q; want %q", e.name, got, e.after)
		}
	}
}

// While the log cannot be read, each look-up asks Postgres: nobody need notice, but the
// clock.
func TestUnfollowedIsNotTrusted(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	a, b := pgtest.OpenURL(t, url), replica(t, url)
	signUp(t, url, a, "user_1")
	token, _ := addCaller(t, a, tenant.NewCaller{Name: "saas", Role: tenant.Viewer})
	held(t, b, "user_1")
	if _, _, err := b.Authenticate(t.Context(), token); err != nil {
		t.Fatal(err)
	}
	conn, lock := pgtest.Conn(t, url), pgtest.Conn(t, url)
	if _, err := lock.Exec(t.Context(), `BEGIN; LOCK TABLE audit_events IN ACCESS EXCLUSIVE MODE`); err != nil {
		t.Fatal(err)
	}
	until(t, "it is not trusted", func() bool { return !b.CacheStats().Trusted })
	// No event tells of it.
	if _, err := conn.Exec(t.Context(), `UPDATE tenants SET display_name = 'unseen' WHERE id = 'user_1'`); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec(t.Context(), `UPDATE callers SET revoked_at = now()`); err != nil {
		t.Fatal(err)
	}
	if got := nameOf(t, b, "user_1"); got != "unseen" {
		t.Errorf("while the log cannot be read, a look-up finds the name %q", got)
	}
	if _, _, err := b.Authenticate(t.Context(), token); !errors.Is(err, tenant.Unauthenticated) {
		t.Errorf("while the log cannot be read, a revoked token is answered %v", err)
	}
	if _, err := lock.Exec(t.Context(), `ROLLBACK`); err != nil {
		t.Fatal(err)
	}
	until(t, "it is trusted again", func() bool { return b.CacheStats().Trusted })
}

// A token that is revoked, rotated or expired is refused, on each replica; a forged one
// is not taken for the one that is held; and its use is noted by the minute.
func TestCallersHeld(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	a, b := replica(t, url), replica(t, url)
	conn := pgtest.Conn(t, url)
	good, _ := addCaller(t, a, tenant.NewCaller{Name: "saas", Role: tenant.Viewer})
	other, _ := addCaller(t, a, tenant.NewCaller{Name: "other", Role: tenant.Viewer, Scope: tenant.Scope{"plan": "pro"}})
	use := func(db *postgres.DB, token tenant.Token) error {
		_, _, err := db.Authenticate(t.Context(), token)
		return err
	}
	for _, token := range []tenant.Token{good, other, good, other} {
		if err := use(b, token); err != nil {
			t.Fatal(err)
		}
	}
	if err := use(b, tenant.Token{ID: good.ID, Hash: other.Hash}); !errors.Is(err, tenant.Unauthenticated) {
		t.Errorf("a forged token is answered %v", err)
	}
	heldCaller(t, b, good)
	until(t, "a token that was used a moment ago is not looked up anew", func() bool { // while memory is trusted
		if _, err := conn.Exec(t.Context(), `UPDATE callers SET last_used_at = NULL`); err != nil {
			t.Fatal(err)
		}
		return use(b, good) == nil && count(t, conn, `callers WHERE last_used_at IS NOT NULL`) == 0
	})
	b.Forward(time.Minute)
	until(t, "it is trusted", func() bool { return b.CacheStats().Trusted })
	if err := use(b, good); err != nil || count(t, conn, `callers WHERE last_used_at IS NOT NULL`) != 1 {
		t.Errorf("the use of a token is not noted after a minute (%v)", err)
	}
	if _, err := a.RevokeCaller(t.Context(), good.ID, actor); err != nil {
		t.Fatal(err)
	}
	if err := use(a, good); !errors.Is(err, tenant.Unauthenticated) {
		t.Errorf("the replica that revoked a token answers it %v", err)
	}
	until(t, "the other replica refuses it", func() bool { return errors.Is(use(b, good), tenant.Unauthenticated) })
	next, _ := tenant.NewToken()
	if _, err := a.RotateCaller(t.Context(), other.ID, next, tenant.TokenRotation{}, actor); err != nil {
		t.Fatal(err)
	}
	until(t, "the other replica refuses the rotated one", func() bool { return errors.Is(use(b, other), tenant.Unauthenticated) })
	if err := use(b, next); err != nil {
		t.Errorf("the new token is answered %v", err)
	}
}

// Look-ups of the same tenant that nobody holds share one statement, and look-ups of many
// share few.
func TestStatementsAreShared(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	db := replica(t, url)
	for i := range 20 {
		signUp(t, url, db, tenant.ID(fmt.Sprint("user_", i)))
	}
	held(t, db, "user_1")
	db.Forward(time.Minute)
	until(t, "it is trusted", func() bool { return db.CacheStats().Trusted })
	lock, conn := pgtest.Conn(t, url), pgtest.Conn(t, url)
	const waiting = `pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '%FROM tenants t WHERE t.id%'`
	for name, c := range map[string]struct {
		look        func(i int) (tenant.Tenant, error)
		least, most int
	}{
		"a tenant that must be confirmed": {func(int) (tenant.Tenant, error) { t1, _, err := db.LookUpTenant(t.Context(), "user_1"); return t1, err }, 1, 1},
		"one tenant":                      {func(int) (tenant.Tenant, error) { t1, _, err := db.LookUpTenant(t.Context(), "user_0"); return t1, err }, 1, 1},
		// One that hangs does not hold up those who come after it.
		"many": {func(i int) (tenant.Tenant, error) {
			return db.Tenant(t.Context(), tenant.ID(fmt.Sprint("user_", i%20)))
		}, 2, 4},
	} {
		if _, err := lock.Exec(t.Context(), `BEGIN; LOCK TABLE tenants IN ACCESS EXCLUSIVE MODE`); err != nil {
			t.Fatal(err)
		}
		var all sync.WaitGroup
		for half := range 2 { // on a slow machine all who come at once share one statement
			for i := range 50 {
				all.Go(func() {
					if _, err := c.look(50*half + i); err != nil {
						t.Error(err)
					}
				})
			}
			until(t, "statements wait", func() bool { return count(t, conn, waiting) >= min(half+1, c.least) })
		}
		if n := count(t, conn, waiting); n > c.most {
			t.Errorf("%s: %d statements for 100 look-ups", name, n)
		}
		if _, err := lock.Exec(t.Context(), `ROLLBACK`); err != nil {
			t.Fatal(err)
		}
		all.Wait()
	}
	// Each gets its own, and what is not there is not found.
	var all sync.WaitGroup
	for i := range 200 {
		all.Go(func() {
			id := tenant.ID(fmt.Sprint("user_", i%25))
			got, err := db.Tenant(t.Context(), id)
			if i%25 < 20 && (err != nil || got.ID != id || got.AppID != tenant.AppID("t-"+id)) || i%25 >= 20 && !errors.Is(err, tenant.NotFound) {
				t.Errorf("Tenant(%s) = %+v, %v", id, got, err)
			}
		})
	}
	all.Wait()
}

// While Postgres is away, what is held is answered with its age, up to the limit, and
// all else is not; when it is back nothing stale is.
func TestPostgresAway(t *testing.T) {
	t.Parallel()
	cluster, url := privateCluster(t)
	db := replica(t, url)
	signUp(t, url, db, "user_1")
	signUp(t, url, db, "user_2")
	token, _ := addCaller(t, db, tenant.NewCaller{Name: "saas", Role: tenant.Viewer})
	held(t, db, "user_1")
	heldCaller(t, db, token)
	// Also entries that were not confirmed for long: the log was followed.
	db.Forward(time.Hour)
	until(t, "it is trusted again", func() bool { return db.CacheStats().Trusted })
	if err := cluster.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	until(t, "it is not trusted", func() bool { return !db.CacheStats().Trusted })
	got, fresh, err := db.LookUpTenant(t.Context(), "user_1")
	if err != nil || !fresh.Stale() || got.AppID != "t-user_1" {
		t.Errorf("while Postgres is away, LookUpTenant = %+v, %+v, %v", got, fresh, err)
	}
	if _, _, err := db.Authenticate(t.Context(), token); err != nil {
		t.Errorf("while Postgres is away, a token that was held is answered %v", err)
	}
	for what, err := range map[string]error{
		"one that is not held": errorOf(db.LookUpTenant(t.Context(), "user_2")),
		"no-cache":             errorOf2(db.Tenant(t.Context(), "user_1")),
		"an unknown token":     errorOf(db.Authenticate(t.Context(), tenant.Token{ID: "x"})),
	} {
		if !errors.Is(err, tenant.Unavailable) {
			t.Errorf("while Postgres is away, %s is answered %v", what, err)
		}
	}
	// The limit is reckoned from when it was last known to be right.
	stale := db.CacheStats().Stale
	db.Forward(time.Minute)
	if _, _, err := db.LookUpTenant(t.Context(), "user_1"); !errors.Is(err, tenant.Unavailable) || db.CacheStats().Stale != stale {
		t.Errorf("beyond the limit, what is held is answered %v", err)
	}
	if err := cluster.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	until(t, "it is trusted again", func() bool { return db.CacheStats().Trusted })
	if got := nameOf(t, db, "user_1"); got != "" {
		t.Errorf("the name is %q", got)
	}
}

// What was cached before a failover is served as stale in the next one: with its age since before the
// first failover, up to the limit, and unless the database has returned something else since.
func TestSecondFailOver(t *testing.T) {
	t.Parallel()
	cluster, url := privateCluster(t)
	db := replica(t, url)
	for _, id := range []tenant.ID{"kept", "changed", "suspended"} {
		signUp(t, url, db, id)
	}
	kept, _ := addCaller(t, db, tenant.NewCaller{Name: "kept", Role: tenant.Viewer})
	revoked, _ := addCaller(t, db, tenant.NewCaller{Name: "revoked", Role: tenant.Viewer})
	for _, id := range []tenant.ID{"kept", "changed", "suspended"} {
		held(t, db, id)
	}
	heldCaller(t, db, kept)
	heldCaller(t, db, revoked)
	stop := func() time.Time {
		t.Helper()
		if err := cluster.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		stopped := time.Now()
		until(t, "it is not trusted", func() bool { return !db.CacheStats().Trusted })
		return stopped
	}
	first := stop()
	if err := cluster.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	until(t, "it is trusted again", func() bool { return db.CacheStats().Trusted })
	// No event says so.
	for _, sql := range []string{
		`UPDATE tenants SET display_name = 'unseen' WHERE id = 'changed'`,
		`UPDATE tenants SET state = 'suspending' WHERE id = 'suspended'`,
		`UPDATE callers SET revoked_at = now() WHERE name = 'revoked'`,
	} {
		if _, err := pgtest.Conn(t, url).Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	until(t, "look-ups are answered again", func() bool { // by none of the connections that the restart has cut
		got, fresh, err := db.LookUpTenant(t.Context(), "changed")
		return err == nil && !fresh.Stale() && got.DisplayName == "unseen"
	})
	held(t, db, "changed")
	if got, fresh, err := db.LookUpTenant(t.Context(), "suspended"); err != nil || fresh.Stale() || got.State != tenant.Suspending {
		t.Fatalf("LookUpTenant = %+v, %+v, %v", got, fresh, err)
	}
	if _, _, err := db.Authenticate(t.Context(), revoked); !errors.Is(err, tenant.Unauthenticated) {
		t.Fatalf("a revoked token is answered %v", err)
	}

	stop()
	got, fresh, err := db.LookUpTenant(t.Context(), "kept")
	if err != nil || fresh.Age < time.Since(first) || got.AppID != "t-kept" {
		t.Errorf("in the second failover, LookUpTenant = %+v, %+v, %v; the first was %s ago", got, fresh, err, time.Since(first))
	}
	if _, fresh, err := db.Authenticate(t.Context(), kept); err != nil || fresh.Age < time.Since(first) {
		t.Errorf("in the second failover, Authenticate = %+v, %v", fresh, err)
	}
	if got, fresh, err := db.LookUpTenant(t.Context(), "changed"); err != nil || !fresh.Stale() || fresh.Age > time.Since(first) || got.DisplayName != "unseen" {
		t.Errorf("in the second failover, LookUpTenant of what was read between = %+v, %+v, %v", got, fresh, err)
	}
	for what, err := range map[string]error{
		"a tenant that was read as suspending": errorOf(db.LookUpTenant(t.Context(), "suspended")),
		"a token that was read as revoked":     errorOf(db.Authenticate(t.Context(), revoked)),
	} {
		if !errors.Is(err, tenant.Unavailable) {
			t.Errorf("in the second failover, %s is answered %v", what, err)
		}
	}
	if !db.AnswersAlone() {
		t.Error("it is said to answer nothing")
	}
	db.Forward(time.Minute)
	if _, _, err := db.LookUpTenant(t.Context(), "kept"); !errors.Is(err, tenant.Unavailable) || db.AnswersAlone() {
		t.Errorf("beyond the limit, what was cached is answered %v", err)
	}
}

// Statements that hang do not hold up what can be answered from memory.
func TestPostgresHangs(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	db := replica(t, url)
	signUp(t, url, db, "user_1")
	token, _ := addCaller(t, db, tenant.NewCaller{Name: "saas", Role: tenant.Viewer})
	held(t, db, "user_1")
	heldCaller(t, db, token)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	lock := pgtest.Conn(t, url)
	if _, err := lock.Exec(t.Context(), `BEGIN; LOCK TABLE audit_events, tenants, callers IN ACCESS EXCLUSIVE MODE`); err != nil {
		t.Fatal(err)
	}
	until(t, "it is not trusted", func() bool { return !db.CacheStats().Trusted })
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			if _, _, err := db.Authenticate(ctx, token); err != nil {
				t.Errorf("Authenticate: %v", err)
			}
			if _, fresh, err := db.LookUpTenant(ctx, "user_1"); err != nil || !fresh.Stale() {
				t.Errorf("LookUpTenant = %v, %v", fresh, err)
			}
		})
	}
	all.Wait() // which is before the statements time out, since then they would fail the look-ups
	if _, err := lock.Exec(t.Context(), `ROLLBACK`); err != nil {
		t.Fatal(err)
	}
	until(t, "it is trusted again", func() bool { return db.CacheStats().Trusted })
}

// While statements hang and the log can be read, entries that must be confirmed are served as stale, and few
// lookups wait for a statement.
func TestConfirmationHangs(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	var sent recorder
	db, err := postgres.Open(t.Context(), postgres.Config{URL: url, MaxConns: 8, CacheEntries: 10_000, MaxStale: time.Minute}.Traced(&sent))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	follow(t, db)
	const n = 12
	for i := range n {
		signUp(t, url, db, tenant.ID(fmt.Sprint("user_", i)))
	}
	caughtUp(t, db)
	for i := range n {
		if _, _, err := db.LookUpKeys(t.Context(), tenant.ID(fmt.Sprint("user_", i))); err != nil {
			t.Fatal(err)
		}
	}
	db.Forward(time.Minute)
	lock := pgtest.Conn(t, url)
	run(t, lock, `BEGIN; LOCK TABLE keys IN ACCESS EXCLUSIVE MODE`)
	sent.take()
	for i := range n {
		caughtUp(t, db)
		if keys, fresh, err := db.LookUpKeys(t.Context(), tenant.ID(fmt.Sprint("user_", i))); err != nil || !fresh.Stale() || len(keys) != 1 {
			t.Errorf("user_%d: LookUpKeys = %v, %v, %v", i, keys, fresh, err)
		}
	}
	asked := 0
	for _, statement := range sent.take() {
		if strings.Contains(statement.sql, "JOIN keys k") {
			asked++
		}
	}
	if asked < 1 || asked > n*3/4 { // a second passes between two that ask
		t.Errorf("%d of %d look-ups, one after another, asked Postgres", asked, n)
	}
	run(t, lock, `ROLLBACK`)
	until(t, "look-ups are confirmed", func() bool {
		_, fresh, err := db.LookUpKeys(t.Context(), "user_0")
		return err == nil && !fresh.Stale()
	})
}

// A database that has lost transactions, or is another one, is not taken for the one
// that was followed.
func TestFailOverForgets(t *testing.T) {
	t.Parallel()
	for name, promoted := range map[string]bool{"on another timeline": true, "on the same": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cluster, url := privateCluster(t)
			db := replica(t, url)
			signUp(t, url, db, "user_1")
			signUp(t, url, db, "user_2")
			rename(t, db, "user_1", "kept")
			data, err := os.MkdirTemp("", "tenantry-test-")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = os.RemoveAll(data) })
			var dir string
			if err := pgtest.Conn(t, url).QueryRow(t.Context(), `SELECT current_setting('data_directory')`).Scan(&dir); err != nil {
				t.Fatal(err)
			}
			run := func(command string, args ...string) {
				t.Helper()
				if out, err := exec.CommandContext(t.Context(), command, args...).CombinedOutput(); err != nil {
					t.Fatalf("%s %v: %v: %s", command, args, err, out)
				}
			}
			stop, start := func() {
				t.Helper()
				if err := cluster.Stop(t.Context()); err != nil {
					t.Fatal(err)
				}
			}, func() {
				t.Helper()
				if err := cluster.Start(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			stop()
			run("cp", "-a", dir, data+"/kept")
			start()
			until(t, "it is trusted", func() bool { return db.CacheStats().Trusted })
			until(t, "changes are taken again", func() bool { // by none of the connections that the restart has cut
				name := "lost"
				_, err := db.UpdateTenant(t.Context(), "user_1", tenant.Patch{DisplayName: &name}, func(tenant.Tenant) bool { return true }, actor)
				return err == nil
			})
			if got := held(t, db, "user_1").DisplayName; got != "lost" {
				t.Fatalf("the name is %q", got)
			}
			rename(t, db, "user_2", "lost")
			held(t, db, "user_2")
			stop()
			before := time.Now()
			run("rm", "-rf", dir)
			run("cp", "-a", data+"/kept", dir)
			if promoted { // an archive recovery ends on a timeline of its own
				run("touch", dir+"/recovery.signal")
				run("chown", "--reference="+dir, dir+"/recovery.signal")
				run("sh", "-c", "echo \"restore_command = 'false'\" >> "+dir+"/postgresql.auto.conf")
			}
			start()
			if promoted { // the ids go on to where they were
				until(t, "the recovery has ended", func() bool {
					_, err := pgtest.Conn(t, url).Exec(t.Context(), `INSERT INTO audit_events (actor, action) SELECT 'test', 'test' FROM generate_series(1, 100)`)
					return err == nil
				})
			}
			until(t, "it is trusted again", func() bool { return db.CacheStats().Trusted })
			until(t, "look-ups are answered again", func() bool {
				return errorOf2(db.Tenant(t.Context(), "user_1")) == nil && errorOf(db.LookUpTenant(t.Context(), "user_1")) == nil
			})
			if got := nameOf(t, db, "user_1"); got != "kept" {
				t.Errorf("after a fail-over that has lost a change, the name is %q", got)
			}
			held(t, db, "user_1")
			// What was not read since is stale: its age counts from before the loss.
			stop()
			until(t, "it is not trusted", func() bool { return !db.CacheStats().Trusted })
			if got, fresh, err := db.LookUpTenant(t.Context(), "user_2"); err != nil || fresh.Age < time.Since(before) || got.DisplayName != "lost" {
				t.Errorf("in the next outage, what was lost is answered %+v, %+v, %v", got, fresh, err)
			}
			if got, fresh, err := db.LookUpTenant(t.Context(), "user_1"); err != nil || !fresh.Stale() || got.DisplayName != "kept" {
				t.Errorf("in the next outage, what was read since is answered %+v, %+v, %v", got, fresh, err)
			}
		})
	}
}

func errorOf[T any](_ T, _ postgres.Freshness, err error) error { return err }
func errorOf2[T any](_ T, err error) error                      { return err }

// privateCluster is a cluster that a test may stop, with a migrated database.
func privateCluster(t *testing.T) (*localpg.Cluster, tenant.Secret) {
	t.Helper()
	pgtest.Cluster(t)
	cluster, stop, err := localpg.ForTests(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	if err := cluster.CreateDatabase(t.Context(), "tenantry"); err != nil {
		t.Fatal(err)
	}
	url := tenant.NewSecret(cluster.URL("tenantry"))
	if err := postgres.MigrateUp(t.Context(), url); err != nil {
		t.Fatal(err)
	}
	return cluster, url
}
