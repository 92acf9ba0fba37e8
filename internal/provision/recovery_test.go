package provision_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// account is what a tenant was told when it signed up.
type account struct {
	app    tenant.AppID
	secret string
}

func accountOf(t *testing.T, r *provisiontest.Replica, id tenant.ID) account {
	t.Helper()
	_, secret := keyOf(t, r, id)
	return account{signUp(t, r, id).AppID, secret.Reveal()}
}

// on returns the same world with another database.
func on(w *provisiontest.World, url tenant.Secret) *provisiontest.World {
	other := *w
	other.URL = url
	return &other
}

// fenceIs waits until the fence is up or down, and behind or not.
func fenceIs(t *testing.T, r *provisiontest.Replica, up, behind bool) {
	t.Helper()
	provisiontest.Eventually(t, fmt.Sprintf("the fence is up: %v, the database is behind: %v", up, behind), func() bool {
		f, err := r.DB.Fence(t.Context())
		return err == nil && f.Up() == up && f.Behind == behind
	})
}

// autoReport waits for the report that begins by itself behind the fence, and
// after each repair there.
func autoReport(t *testing.T, r *provisiontest.Replica) (tenant.Reconciliation, []tenant.Finding) {
	t.Helper()
	var last tenant.Reconciliation
	provisiontest.Eventually(t, "a report is made behind the fence", func() bool {
		newest, err := r.DB.Reconciliations(t.Context(), 1)
		if err != nil || len(newest) == 0 {
			return false
		}
		last = newest[0]
		return last.Kind == tenant.Report && last.Done
	})
	found, err := r.DB.Findings(t.Context(), last, 0, 1000)
	if err != nil {
		t.Fatal(err)
	}
	return last, found
}

func kindsOf(found []tenant.Finding) []string {
	var kinds []string
	for _, f := range found {
		kinds = append(kinds, string(f.Kind))
	}
	slices.Sort(kinds)
	return kinds
}

// newAppWaits signs a tenant up that cannot be given an app yet.
func newAppWaits(t *testing.T, r *provisiontest.Replica, id tenant.ID) {
	t.Helper()
	got, _, err := r.SignUp(t.Context(), id, tenant.SignUp{}, 0, caller)
	if err != nil || got.State != tenant.Provisioning || got.Problem == nil || got.Problem.Code != "restore_fence" {
		t.Fatalf("a sign-up behind the fence gives %+v, %v; want one that waits for the fence", got, err)
	}
}

// A database that is restored from a dump knows nothing of what came after it.
// Nothing of that is lost, removed or given to somebody else, and it is taken in
// again: tenants with the apps and the keys they had.
func TestRestoredDatabase(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	accounts := map[tenant.ID]account{}
	for _, id := range []tenant.ID{"before_1", "before_2"} {
		signUp(t, r, id)
		accounts[id] = accountOf(t, r, id)
	}
	// An app that nobody has yet, and that is claimed after the dump.
	exec(t, w, `INSERT INTO apps (id, profile, profile_revision) VALUES ('t-pooled', 'default', '')`)
	provisiontest.Eventually(t, "an app is ready", func() bool {
		var ready bool
		err := pgtest.Conn(t, w.URL).QueryRow(t.Context(), `SELECT state = 'ready' FROM apps WHERE id = 't-pooled'`).Scan(&ready)
		return err == nil && ready
	})
	marked(t, w)
	dump := pgtest.Dump(t, w.URL)

	for _, id := range []tenant.ID{"after_claim", "after_1", "after_2"} {
		signUp(t, r, id)
		accounts[id] = accountOf(t, r, id)
	}
	if accounts["after_claim"].app != "t-pooled" {
		t.Fatalf("the ready app was not claimed, but %s", accounts["after_claim"].app)
	}
	marked(t, w)
	r.Stop()
	keysBefore := w.AppKeys()

	w = on(w, pgtest.Restore(t, dump))
	r = w.Start(provisiontest.Options{Fenced: true})
	fenceIs(t, r, true, true)
	for _, id := range []tenant.ID{"before_1", "before_2"} {
		if got := accountOf(t, r, id); got != accounts[id] {
			t.Errorf("behind the fence %s has %v; want %v", id, got.app, accounts[id].app)
		}
	}
	newAppWaits(t, r, "newcomer")
	last, found := autoReport(t, r)
	if got, want := kindsOf(found), []string{"app_forgotten", "app_unknown", "app_unknown"}; !slices.Equal(got, want) {
		t.Errorf("the report found %v; want %v", got, want)
	}
	if got := w.AppKeys(); !slices.Equal(got, keysBefore) {
		t.Errorf("behind the fence the keys at Clarifai changed from %v to %v", keysBefore, got)
	}

	for _, f := range repair(t, r, last.Token, true) {
		if f.State != tenant.FindingDone {
			t.Errorf("the adoption ended with %+v", f)
		}
	}
	if _, found := autoReport(t, r); len(found) != 0 {
		t.Errorf("after the adoption a report finds %+v", found)
	}
	fenceIs(t, r, false, false)
	for id, want := range accounts {
		if got := accountOf(t, r, id); got != want {
			t.Errorf("after the adoption %s has the app %s, its key is the same: %v; want %s", id, got.app, got.secret == want.secret, want.app)
		}
	}
	newcomer := signUp(t, r, "newcomer")
	for id, a := range accounts {
		if a.app == newcomer.AppID {
			t.Errorf("the newcomer was given the app of %s", id)
		}
	}
	marked(t, w)
	rest(t, w)
	// The newcomer's build may have been started twice, by its own sign-up and the sweep.
	var spare int
	if err := pgtest.Conn(t, w.URL).QueryRow(t.Context(), `SELECT count(*) FROM apps WHERE state = 'ready'`).Scan(&spare); err != nil {
		t.Fatal(err)
	}
	if s := w.State(); s.Apps != 6+spare || len(w.AppKeys()) != 6+spare || spare > 1 {
		t.Errorf("Clarifai has %d apps and %d keys, %d of them spare; want 6 of each beside one spare at most", s.Apps, len(w.AppKeys()), spare)
	}
}

// What a restored database still believes to be under way is not removed behind
// the fence.
func TestNothingIsRemovedBehindTheFence(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	signUp(t, r, "user_1")
	want := accountOf(t, r, "user_1")
	key, _ := keyOf(t, r, "user_1")
	keyID := key.ID
	marked(t, w)
	r.Stop()
	// The backup is of when the app was about to be removed, and its key with it.
	exec(t, w, `UPDATE tenants SET state = 'deleted', app_id = NULL;
		UPDATE keys SET state = 'revoking', leased_until = '-infinity', next_attempt_at = now(), enqueued_at = '-infinity';
		UPDATE apps SET state = 'purging', leased_until = '-infinity', next_attempt_at = now(), enqueued_at = '-infinity'`)
	w = on(w, pgtest.Restore(t, pgtest.Dump(t, w.URL)))
	r = w.Start(provisiontest.Options{Fenced: true, Idle: true})
	if _, err := r.DB.CheckRestored(t.Context()); err != nil {
		t.Fatal(err)
	}
	fenceIs(t, r, true, false)
	lease := func() (app, key error) {
		_, app = r.DB.LeaseApp(t.Context(), want.app, time.Minute)
		_, key = r.DB.LeaseKey(t.Context(), keyID, time.Minute)
		return app, key
	}
	if app, key := lease(); !errors.Is(app, tenant.NotFound) || !errors.Is(key, tenant.NotFound) {
		t.Errorf("behind the fence a removal may begin: of the app %v, of the key %v", app, key)
	}
	if n, err := r.DB.Enqueue(t.Context()); err != nil || n != 0 {
		t.Errorf("behind the fence %d removals are enqueued, %v", n, err)
	}
	exec(t, w, `UPDATE deployment SET fence_since = NULL`)
	if n, err := r.DB.Enqueue(t.Context()); err != nil || n != 2 {
		t.Errorf("without it %d removals are enqueued, %v; want that of the app and that of the key", n, err)
	}
	if app, key := lease(); app != nil || key != nil {
		t.Errorf("without it no removal may begin: of the app %v, of the key %v", app, key)
	}
}

// The keyset and the operator's account are enough to rebuild the mapping from
// nothing. Where Clarifai's listing hides keys, tenants get new ones and the old
// are on record.
func TestRebuiltFromNothing(t *testing.T) {
	t.Parallel()
	for _, masked := range []bool{false, true} {
		t.Run(fmt.Sprint("masked=", masked), func(t *testing.T) {
			t.Parallel()
			w := provisiontest.New(t)
			w.Settings(map[string]any{"masked_keys": masked})
			r := w.Start(provisiontest.Options{})
			accounts := map[tenant.ID]account{}
			for i := range 5 {
				id := tenant.ID(fmt.Sprint("user_", i))
				signUp(t, r, id)
				accounts[id] = accountOf(t, r, id)
			}
			narrow := "narrow"
			if _, _, err := r.SignUp(t.Context(), "other", tenant.SignUp{Profile: &narrow}, long, caller); err != nil {
				t.Fatal(err)
			}
			accounts["other"] = account{}
			_, secret := keyOf(t, r, "other")
			got, err := r.Tenant(t.Context(), "other", 0)
			if err != nil {
				t.Fatal(err)
			}
			accounts["other"] = account{got.AppID, secret.Reveal()}
			makeForeignApp(t, w, "not-ours")
			marked(t, w)
			deployment := r.Deployment.ID
			r.Stop()

			w = on(w, pgtest.URL(t))
			r = w.Start(provisiontest.Options{Fenced: true})
			if r.Deployment.ID != deployment {
				t.Fatalf("the deployment is %s after the loss, and was %s: its markers would not be ours", r.Deployment.ID, deployment)
			}
			fenceIs(t, r, true, true)
			newAppWaits(t, r, "user_3") // who signed up long ago
			last, found := autoReport(t, r)
			if n := len(found); n != len(accounts) {
				t.Errorf("the report found %v; want %d unknown apps", kindsOf(found), len(accounts))
			}
			for _, f := range repair(t, r, last.Token, true) {
				if f.State != tenant.FindingDone {
					t.Errorf("the adoption ended with %+v", f)
				}
			}
			_, left := autoReport(t, r)
			fenceIs(t, r, false, false)
			for id, want := range accounts {
				up := tenant.SignUp{}
				if id == "other" {
					up.Profile = &narrow
				}
				got, created, err := r.SignUp(t.Context(), id, up, long, caller)
				if err != nil || created || got.AppID != want.app {
					t.Errorf("%s is %+v, made anew: %v, %v; want its app %s", id, got, created, err, want.app)
				}
				provisiontest.Eventually(t, "there is a key", func() bool {
					_, _, err := r.Reveal(t.Context(), id, tenant.DefaultKey, caller)
					return err == nil
				})
				if _, secret := keyOf(t, r, id); (secret.Reveal() == want.secret) == masked {
					t.Errorf("%s has its old key: %v", id, secret.Reveal() == want.secret)
				}
				if id != "other" && !keyWorks(t, w, r, got) { // whose scopes are too narrow to look
					t.Errorf("the key of %s does not open its app", id)
				}
			}
			wantLeft, wantKeys := 0, len(accounts)
			if masked {
				wantLeft, wantKeys = len(accounts), 2*len(accounts)
			}
			if n := len(w.AppKeys()); n != wantKeys {
				t.Errorf("Clarifai has %d keys of ours; want %d", n, wantKeys)
			}
			if lost := slices.DeleteFunc(kindsOf(left), func(k string) bool { return k != "key_lost" }); len(lost) != wantLeft {
				t.Errorf("the last report found %v; want %d lost keys", kindsOf(left), wantLeft)
			}
		})
	}
}

// A tenant that was taken in from its app's marker has no attributes: those of its
// next sign-up are taken, once.
func TestAdoptedTenantTakesAttributes(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	name, other := "Ada", "Bob"
	up := tenant.SignUp{DisplayName: &name, Labels: map[string]string{"plan": "pro"}}
	if _, _, err := r.SignUp(t.Context(), "user_1", up, long, caller); err != nil {
		t.Fatal(err)
	}
	marked(t, w)
	r.Stop()
	w = on(w, pgtest.URL(t))
	r = w.Start(provisiontest.Options{Fenced: true})
	fenceIs(t, r, true, true)
	last, _ := autoReport(t, r)
	repair(t, r, last.Token, true)
	got, created, err := r.SignUp(t.Context(), "user_1", up, long, caller)
	if err != nil || created || got.DisplayName != name || got.Labels["plan"] != "pro" {
		t.Errorf("the sign-up of an adopted tenant gives %+v, made: %v, %v", got, created, err)
	}
	if _, _, err := r.SignUp(t.Context(), "user_1", tenant.SignUp{DisplayName: &other}, long, caller); !errors.Is(err, tenant.Conflict) {
		t.Errorf("a second sign-up with other attributes gives %v; want a conflict", err)
	}
}

// Where tenants are left out of the markers, the apps are found again all the
// same, and held back from everybody.
func TestRebuiltWithoutMarks(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	skip := func(c *provision.Config) { c.SkipMarks = true }
	r := w.Start(provisiontest.Options{Adjust: skip})
	app := signUp(t, r, "user_1").AppID
	r.Stop()
	w = on(w, pgtest.URL(t))
	r = w.Start(provisiontest.Options{Fenced: true, Adjust: skip})
	fenceIs(t, r, true, true)
	last, _ := autoReport(t, r)
	repair(t, r, last.Token, true)
	fenceIs(t, r, false, false)
	if got := signUp(t, r, "user_2"); got.AppID == app {
		t.Errorf("another tenant was given the app of user_1")
	}
	if _, err := r.DB.Tenant(context.WithoutCancel(t.Context()), "user_1"); !errors.Is(err, tenant.NotFound) {
		t.Errorf("user_1 is known again: %v", err)
	}
}
