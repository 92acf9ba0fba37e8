package provision_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/clarifaisim"
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
	app := signUp(t, r, id).AppID
	_, secret := keyOf(t, r, id)
	return account{app, secret.Reveal()}
}

// on returns the same world with another database.
func on(w *provisiontest.World, url tenant.Secret) *provisiontest.World {
	other := *w
	other.URL = url
	return &other
}

func kindsOf(found []tenant.Finding) []string {
	var kinds []string
	for _, f := range found {
		kinds = append(kinds, string(f.Kind))
	}
	slices.Sort(kinds)
	return kinds
}

// inState waits until the database is in a state of recovery mode.
func inState(t *testing.T, r *provisiontest.Replica, want tenant.RecoveryState) tenant.Recovery {
	t.Helper()
	var is tenant.Recovery
	defer func() {
		if t.Failed() {
			t.Logf("it is %+v", is)
			for _, l := range r.Logs.FilterLevelExact(zap.WarnLevel).All() {
				t.Log(l.Message, l.ContextMap())
			}
		}
	}()
	provisiontest.Eventually(t, fmt.Sprintf("recovery mode is %q", want), func() bool {
		var err error
		is, err = r.DB.Recovery(t.Context())
		return err == nil && is.State == want
	})
	return is
}

// undecided waits for the report of a recovery, and returns the findings that wait for a decision.
func undecided(t *testing.T, r *provisiontest.Replica) []tenant.Finding {
	t.Helper()
	is := inState(t, r, tenant.Recovering)
	provisiontest.Eventually(t, "the report of the recovery is done", func() bool {
		last, err := r.DB.LastReport(t.Context())
		return err == nil && last.CreatedAt.After(is.Since)
	})
	found, err := r.DB.Undecided(t.Context(), "", tenant.Finding{}, 1000)
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// decide decides all findings of a kind, and waits until the decisions are carried out.
func decide(t *testing.T, r *provisiontest.Replica, kind tenant.FindingKind, choice tenant.RepairAction) {
	t.Helper()
	n, err := r.Decide(t.Context(), 0, kind, choice, "", admin)
	if err != nil || n == 0 {
		t.Fatalf("decide %s of %s: %d, %v", choice, kind, n, err)
	}
	carriedOut(t, r)
}

func carriedOut(t *testing.T, r *provisiontest.Replica) {
	t.Helper()
	provisiontest.Eventually(t, "decisions are carried out", func() bool {
		found, err := r.DB.Undecided(t.Context(), "", tenant.Finding{}, 1000)
		return err == nil && !slices.ContainsFunc(found, func(f tenant.Finding) bool { return f.State == tenant.FindingDecided })
	})
}

// control keeps the control record, which the tests below are about.
func control(o provisiontest.Options) provisiontest.Options {
	o.Control = true
	return o
}

// controlRecorded waits until the control record is there.
func controlRecorded(t *testing.T, r *provisiontest.Replica) {
	t.Helper()
	provisiontest.Eventually(t, "the control record is written", func() bool {
		is, err := r.DB.Recovery(t.Context())
		return err == nil && !is.ControlSeenAt.IsZero()
	})
}

// A database that is restored from a dump lacks all later tenants. None of their apps is removed
// or given to another tenant, and they get their apps and keys back. Sign-ups continue.
func TestRestoredDatabase(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(control(provisiontest.Options{Adjust: pool(2, 2)}))
	accounts := map[tenant.ID]account{}
	for _, id := range []tenant.ID{"before_1", "before_2"} {
		accounts[id] = accountOf(t, r, id)
	}
	marked(t, w)
	poolIs(t, w, 2)
	controlRecorded(t, r)
	dump := pgtest.Dump(t, w.URL)
	for _, id := range []tenant.ID{"after_1", "after_2", "after_3"} {
		accounts[id] = accountOf(t, r, id)
	}
	marked(t, w)
	r.Stop()

	w = on(w, pgtest.Restore(t, dump))
	r = w.Start(control(provisiontest.Options{Adjust: pool(2, 2)}))
	newcomer := accountOf(t, r, "newcomer") // at once, from a build
	found := undecided(t, r)
	if got, want := kindsOf(found), []string{"app_forgotten", "app_forgotten", "app_unknown"}; !slices.Equal(got, want) {
		t.Errorf("the report found %v; want %v", got, want)
	}
	for id, a := range accounts {
		if a.app == newcomer.app || a.secret == newcomer.secret {
			t.Errorf("the newcomer was given the app or the key of %s", id)
		}
	}
	decide(t, r, tenant.FoundAppForgotten, tenant.Adopt)
	decide(t, r, tenant.FoundAppUnknown, tenant.Adopt)
	inState(t, r, tenant.NotRecovering)
	for id, want := range accounts {
		if got := accountOf(t, r, id); got != want {
			t.Errorf("after the adoption %s has the app %s, its key is the same: %v; want %s", id, got.app, got.secret == want.secret, want.app)
		}
	}
}

// withoutSignUp restores a dump that lacks the sign-up of the tenant lost, and waits for the report.
func withoutSignUp(t *testing.T) (*provisiontest.World, *provisiontest.Replica, account) {
	t.Helper()
	w := provisiontest.New(t)
	r := w.Start(control(provisiontest.Options{}))
	controlRecorded(t, r)
	dump := pgtest.Dump(t, w.URL)
	lost := accountOf(t, r, "lost")
	marked(t, w)
	r.Stop()
	w = on(w, pgtest.Restore(t, dump))
	r = w.Start(control(provisiontest.Options{}))
	if got := kindsOf(undecided(t, r)); !slices.Equal(got, []string{"app_unknown"}) {
		t.Fatalf("the report found %v", got)
	}
	return w, r, lost
}

// Recovery mode ends by itself also when the last decision was to keep a finding.
func TestKeepEndsRecovery(t *testing.T) {
	t.Parallel()
	w, r, lost := withoutSignUp(t)
	decide(t, r, tenant.FoundAppUnknown, tenant.Keep)
	inState(t, r, tenant.NotRecovering)
	if keysOpening(t, w, lost.app) != 1 {
		t.Error("the key of the tenant that was lost works no longer")
	}
}

// A tenant that signed up just before a loss, and whose app is not tagged yet, keeps its app and
// key for itself, whatever is done about the recovery.
func TestUntaggedHandOutIsLost(t *testing.T) {
	t.Parallel()
	w := filled(t, 2)
	dump := pgtest.Dump(t, w.URL)
	r := w.Start(provisiontest.Options{Adjust: pool(2, 2), Idle: true}) // the replica dies before its sweep
	lost := accountOf(t, r, "lost")
	r.Stop()

	w = on(w, pgtest.Restore(t, dump))
	r = w.Start(control(provisiontest.Options{Adjust: pool(2, 2)}))
	for i := range 4 {
		if other := accountOf(t, r, tenant.ID(fmt.Sprint("other_", i))); other.app == lost.app || other.secret == lost.secret {
			t.Fatalf("R1: a second tenant has the app %s", other.app)
		}
		if i == 1 {
			if _, err := r.DB.EndRecovery(t.Context(), admin); err != nil && !errors.Is(err, tenant.Conflict) {
				t.Fatal(err)
			}
			report(t, r)
		}
	}
	if n := len(column(t, w, `SELECT id FROM apps WHERE state = 'retired'`)); n != 2 {
		t.Errorf("%d apps are retired; want the pool of 2", n)
	}
	if !keyOpens(t, w, tenant.NewSecret(lost.secret), lost.app) {
		t.Error("the key of the lost tenant works no longer")
	}
	// Its key is a proof that the app is the tenant's.
	if a, err := adopt(t, r, "lost", tenant.AdoptRequest{AppID: lost.app}); err == nil {
		t.Errorf("without its key the app is adopted: %+v", a)
	}
	mustAdopt(t, r, "lost", tenant.AdoptRequest{AppID: lost.app, Key: tenant.NewSecret(lost.secret)})
	if got := accountOf(t, r, "lost"); got != lost {
		t.Errorf("after the adoption the tenant has %v; want %v", got.app, lost.app)
	}
}

// The keyset and the operator's account are enough to rebuild the mapping from nothing. Where
// Clarifai's listing hides keys, tenants are suspended, and the old keys are on record.
func TestRebuiltFromNothing(t *testing.T) {
	t.Parallel()
	for _, masked := range []bool{false, true} {
		t.Run(fmt.Sprint("masked=", masked), func(t *testing.T) {
			t.Parallel()
			w := provisiontest.New(t)
			w.Settings(map[string]any{"masked_keys": masked})
			r := w.Start(control(provisiontest.Options{}))
			accounts := map[tenant.ID]account{}
			for i := range 3 {
				id := tenant.ID(fmt.Sprint("user_", i))
				accounts[id] = accountOf(t, r, id)
			}
			makeForeignApp(t, w, "not-ours")
			marked(t, w)
			controlRecorded(t, r)
			r.Stop()

			w = on(w, pgtest.URL(t))
			r = w.Start(control(provisiontest.Options{}))
			if found := undecided(t, r); len(found) != 3 {
				t.Errorf("the report found %v; want 3 unknown apps", kindsOf(found))
			}
			if last, err := r.DB.LastReport(t.Context()); err != nil || last.ForeignApps != 1 { // without that of the control record
				t.Errorf("the report counts %d foreign apps, %v; want 1", last.ForeignApps, err)
			}
			decide(t, r, tenant.FoundAppUnknown, tenant.Adopt)
			inState(t, r, tenant.NotRecovering)
			for id, want := range accounts {
				got, err := r.Tenant(t.Context(), id, 0)
				if err != nil || got.AppID != want.app {
					t.Fatalf("%s is %+v, %v; want its app %s", id, got, err, want.app)
				}
				if masked {
					if got.State != tenant.Suspended {
						t.Errorf("%s, whose key is hidden, is %s", id, got.State)
					}
					if got, err = r.Resume(t.Context(), id, long, caller); err != nil || got.State != tenant.Active {
						t.Fatalf("resume %s: %+v, %v", id, got, err)
					}
				}
				if again := accountOf(t, r, id); (again.secret == want.secret) == masked || !keyOpens(t, w, tenant.NewSecret(again.secret), want.app) {
					t.Errorf("%s has its old key: %v, or it does not open its app", id, again.secret == want.secret)
				}
			}
		})
	}
}

// About an unknown key of a suspended tenant a person must decide: the key neither makes the tenant
// active by itself nor blocks it.
func TestUnknownKeyOfSuspended(t *testing.T) {
	t.Parallel()
	for choice, wantKeys := range map[tenant.RepairAction]int{tenant.ResumeTenant: 1, tenant.EndUnknownKey: 0} {
		t.Run(string(choice), func(t *testing.T) {
			t.Parallel()
			w := provisiontest.New(t)
			r := w.Start(provisiontest.Options{})
			app := signUp(t, r, "user_1").AppID
			marked(t, w)
			suspended(t, r, "user_1")
			makeKeyByHand(t, w, app, tenant.KeyMarker{Deployment: r.Deployment.ID, KeyID: uuid.Must(uuid.NewV7())}.String())
			_, found := report(t, r)
			if got := kindsOf(found); !slices.Equal(got, []string{"key_contested"}) {
				t.Fatalf("the report found %v", got)
			}
			decide(t, r, tenant.FoundKeyContested, choice)
			provisiontest.Eventually(t, "the keys are as decided", func() bool { return keysOpening(t, w, app) == wantKeys })
			got, err := r.Tenant(t.Context(), "user_1", long)
			if want := map[bool]tenant.State{true: tenant.Active, false: tenant.Suspended}[wantKeys == 1]; err != nil || got.State != want {
				t.Errorf("the tenant is %s, %v; want %s", got.State, err, want)
			}
			suspended(t, r, "user_1")
			provisiontest.Eventually(t, "no key works", func() bool { return keysOpening(t, w, app) == 0 })
			if got, err = r.Resume(t.Context(), "user_1", long, caller); err != nil || got.State != tenant.Active {
				t.Errorf("resume: %+v, %v", got, err)
			}
		})
	}
}

// A resumption had not ended at the backup, and the tenant may have been suspended since: a person
// decides whether its key is created.
func TestPendingKey(t *testing.T) {
	t.Parallel()
	for choice, wantKeys := range map[tenant.RepairAction]int{tenant.MakeKey: 1, tenant.SuspendTenant: 0} {
		t.Run(string(choice), func(t *testing.T) {
			t.Parallel()
			w := provisiontest.New(t)
			r := w.Start(control(provisiontest.Options{}))
			app := signUp(t, r, "user_1").AppID
			marked(t, w)
			suspended(t, r, "user_1")
			w.Faults(map[string]any{"call": "PostKeys", "http": 503})
			if _, err := r.Resume(t.Context(), "user_1", 0, caller); err != nil {
				t.Fatal(err)
			}
			dump := pgtest.Dump(t, w.URL)
			if _, err := r.Suspend(t.Context(), "user_1", long, caller); err != nil {
				t.Fatal(err)
			}
			r.Kill()
			w = on(w, pgtest.Restore(t, dump))
			w.Faults()
			r = w.Start(control(provisiontest.Options{}))
			inState(t, r, tenant.Recovering)
			found := undecided(t, r)
			if got := kindsOf(found); !slices.Equal(got, []string{"key_pending"}) {
				t.Fatalf("the report found %v", got)
			}
			if n := keysOpening(t, w, app); n != 0 {
				t.Fatalf("before the decision, %d keys work", n)
			}
			if _, err := r.Decide(t.Context(), found[0].Number, "", choice, "user_1", admin); err != nil {
				t.Fatal(err)
			}
			carriedOut(t, r)
			inState(t, r, tenant.NotRecovering)
			got, err := r.Tenant(t.Context(), "user_1", long)
			if want := map[bool]tenant.State{true: tenant.Active, false: tenant.Suspended}[wantKeys == 1]; err != nil || got.State != want || keysOpening(t, w, app) != wantKeys {
				t.Errorf("the tenant is %s with %d keys, %v; want %s with %d", got.State, keysOpening(t, w, app), err, want, wantKeys)
			}
		})
	}
}

func suspended(t *testing.T, r *provisiontest.Replica, id tenant.ID) {
	t.Helper()
	if got, err := r.Suspend(t.Context(), id, long, caller); err != nil || got.State != tenant.Suspended {
		t.Fatalf("suspend %s: %+v, %v", id, got, err)
	}
}

// A tenant was restored after the backup: when the retention in the rows ends, nothing is removed.
func TestForgottenRestoreIsNotPurged(t *testing.T) {
	t.Parallel()
	for name, after := range map[string]func(t *testing.T, r *provisiontest.Replica){
		"active":    func(*testing.T, *provisiontest.Replica) {},
		"suspended": func(t *testing.T, r *provisiontest.Replica) { suspended(t, r, "user_1") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := provisiontest.New(t)
			r := w.Start(control(provisiontest.Options{}))
			app := signUp(t, r, "user_1").AppID
			marked(t, w)
			if _, err := r.Delete(t.Context(), "user_1", false, long, caller); err != nil {
				t.Fatal(err)
			}
			rest(t, w)
			controlRecorded(t, r)
			dump := pgtest.Dump(t, w.URL)
			got, err := r.Service.Restore(t.Context(), "user_1", long, caller)
			if err != nil || got.State != tenant.Active {
				t.Fatal(got, err)
			}
			rest(t, w)
			after(t, r)
			keys := keysOpening(t, w, app)
			r.Stop()

			w = on(w, pgtest.Restore(t, dump))
			r = w.Start(control(provisiontest.Options{}))
			inState(t, r, tenant.Recovering)
			if _, err := r.DB.EndRecovery(t.Context(), admin); err != nil { // undecided
				t.Fatal(err)
			}
			// As if time had passed, also in the tag.
			exec(t, w, `UPDATE apps SET purge_after = now() - interval '1 s', tagged_purge_after = now() - interval '1 s', next_attempt_at = now() WHERE state = 'retained'`)
			provisiontest.Eventually(t, "the removal is contested", func() bool {
				return slices.Equal(column(t, w, `SELECT problem->>'code' FROM apps WHERE state = 'retained' AND problem IS NOT NULL`), []string{"purge_contested"})
			})
			if n := keysOpening(t, w, app); n != keys || w.State().Calls["DeleteApp"] != 0 {
				t.Errorf("%d of %d keys are left, and %d apps were removed", n, keys, w.State().Calls["DeleteApp"])
			}
			if _, found := report(t, r); !slices.Contains(kindsOf(found), "purge_contested") {
				t.Errorf("a report finds %v", kindsOf(found))
			}
		})
	}
}

// Whatever a person sees at the end of a tenant's life, a purge lists the app's keys first.
func TestPurgeIsContestedByAnUnknownKey(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	app := signUp(t, r, "user_1").AppID
	marked(t, w)
	report(t, r)
	makeKeyByHand(t, w, app, tenant.KeyMarker{Deployment: r.Deployment.ID, KeyID: uuid.Must(uuid.NewV7())}.String())
	if _, err := r.Delete(t.Context(), "user_1", true, 0, caller); err != nil {
		t.Fatal(err)
	}
	provisiontest.Eventually(t, "the removal is contested", func() bool {
		return slices.Equal(column(t, w, `SELECT problem->>'code' FROM apps WHERE state = 'retained' AND problem IS NOT NULL`), []string{"purge_contested"})
	})
	found, err := r.DB.Undecided(t.Context(), "", tenant.Finding{}, 10)
	if err != nil || len(found) != 1 || found[0].Kind != tenant.FoundPurge {
		t.Fatalf("what waits for a decision is %+v, %v", found, err)
	}
	if _, err := r.Decide(t.Context(), found[0].Number, "", tenant.RemoveContested, "user_2", admin); !errors.Is(err, tenant.Invalid) {
		t.Errorf("a harmful choice without its id: %v", err)
	}
	if _, err := r.Decide(t.Context(), 0, tenant.FoundPurge, tenant.RemoveContested, "user_1", admin); !errors.Is(err, tenant.Invalid) {
		t.Errorf("a harmful choice for a kind: %v", err)
	}
	if _, err := r.Decide(t.Context(), found[0].Number, "", tenant.RemoveContested, "user_1", admin); err != nil {
		t.Fatal(err)
	}
	provisiontest.Eventually(t, "the app is removed", func() bool { return w.State().Apps == 0 })
	got, err := r.Tenant(t.Context(), "user_1", long)
	if err != nil || got.State != tenant.Deleted {
		t.Errorf("the tenant is %+v, %v", got, err)
	}
}

// An ownership tag that names another tenant is never overwritten, and the key of the app is
// not shown.
func TestContestedApp(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	w.Faults(map[string]any{"call": "PatchApp", "probability": 1, "http": 503})
	r := w.Start(provisiontest.Options{Adjust: func(c *provision.Config) { c.TripAfter = 1 << 20 }})
	app := signUp(t, r, "user_1").AppID
	w.Faults()
	r.Stop()
	tagAs(t, w, r, app, "another")
	exec(t, w, `UPDATE apps SET pending = true, marked_at = NULL, next_attempt_at = now()`)
	r = w.Start(provisiontest.Options{})
	provisiontest.Eventually(t, "the app is contested", func() bool {
		_, _, err := r.Reveal(t.Context(), "user_1", tenant.DefaultKey, caller)
		return codeOf(err) == "app_contested"
	})
	if got := ownerAt(w, w.Sim.Apps()[0]); got != "another" {
		t.Fatalf("the tag names %q", got)
	}
	// A new key would show the data of the other tenant.
	suspended(t, r, "user_1")
	if got, err := r.Resume(t.Context(), "user_1", long, caller); codeOf(err) != "app_contested" {
		t.Errorf("resume: %+v, %v", got, err)
	}
	report(t, r)
	found, err := r.DB.Undecided(t.Context(), tenant.FoundAppDiffers, tenant.Finding{}, 10)
	if err != nil || len(found) != 1 {
		t.Fatalf("what waits for a decision is %+v, %v", found, err)
	}
	if _, err := r.Decide(t.Context(), found[0].Number, "", tenant.OverwriteTag, "user_1", admin); err != nil {
		t.Fatal(err)
	}
	carriedOut(t, r)
	if got, err := r.Resume(t.Context(), "user_1", long, caller); err != nil || got.State != tenant.Active {
		t.Fatalf("resume: %+v, %v", got, err)
	}
	provisiontest.Eventually(t, "the key is shown again", func() bool {
		_, _, err := r.Reveal(t.Context(), "user_1", tenant.DefaultKey, caller)
		return err == nil && ownerAt(w, w.Sim.Apps()[0]) == "user_1"
	})
}

func codeOf(err error) string {
	if e, ok := errors.AsType[*tenant.Error](err); ok {
		return e.Code
	}
	return ""
}

// A contest ends by itself when somebody has corrected the ownership tag at Clarifai.
func TestContestEnds(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	app := signUp(t, r, "user_1").AppID
	marked(t, w)
	tagAs(t, w, r, app, "another")
	exec(t, w, `UPDATE apps SET pending = true, marked_at = NULL, next_attempt_at = now()`)
	reveals := func(code string) func() bool {
		return func() bool {
			_, _, err := r.Reveal(t.Context(), "user_1", tenant.DefaultKey, caller)
			return codeOf(err) == code && (err == nil) == (code == "")
		}
	}
	provisiontest.Eventually(t, "the app is contested", reveals("app_contested"))
	tagAs(t, w, r, app, "user_1")
	exec(t, w, `UPDATE apps SET next_attempt_at = now()`)
	provisiontest.Eventually(t, "the key is shown again", reveals(""))
}

// tagAs overwrites the tenant in the ownership tag of an app.
func tagAs(t *testing.T, w *provisiontest.World, r *provisiontest.Replica, app tenant.AppID, id tenant.ID) {
	t.Helper()
	sealed, err := w.Keys.SealOwner(app, tenant.AppOwner{Tenant: id, Generation: 1, Profile: tenant.DefaultProfile})
	if err != nil {
		t.Fatal(err)
	}
	askClarifai(t, w, "PATCH", "/apps/"+string(app), map[string]any{"action": "overwrite", "metadata_action": map[string]any{"op": "merge"},
		"app": map[string]any{"metadata": map[string]any{"tenantry": tenant.Marker{Deployment: r.Deployment.ID, App: app, Tenant: sealed}}}})
}

// A decision about an app that is gone by now fails, and does not stop the reports.
func TestDecisionAboutAppThatIsGone(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	app := signUp(t, r, "user_1").AppID
	marked(t, w)
	tagAs(t, w, r, app, "another")
	report(t, r)
	found, err := r.DB.Undecided(t.Context(), tenant.FoundAppDiffers, tenant.Finding{}, 10)
	if err != nil || len(found) != 1 {
		t.Fatalf("what waits for a decision is %+v, %v", found, err)
	}
	askClarifai(t, w, "DELETE", "/apps/"+string(app), nil)
	if _, err := r.Decide(t.Context(), found[0].Number, "", tenant.OverwriteTag, "user_1", admin); err != nil {
		t.Fatal(err)
	}
	provisiontest.Eventually(t, "the decision has failed", func() bool {
		f, err := r.DB.Finding(t.Context(), found[0].Number)
		return err == nil && f.State == tenant.FindingFailed
	})
	report(t, r)
}

// A restart of the database does not end a recovery whose findings are not decided.
func TestRestartDuringRecovery(t *testing.T) {
	t.Parallel()
	w, r, want := withoutSignUp(t)
	before := inState(t, r, tenant.Recovering)
	r.Stop()
	w = on(w, pgtest.Restore(t, pgtest.Dump(t, w.URL))) // another fingerprint, and every event
	r = w.Start(control(provisiontest.Options{}))
	provisiontest.Eventually(t, "the next incarnation has begun", func() bool {
		is, err := r.DB.Recovery(t.Context())
		return err == nil && is.Incarnation != before.Incarnation && is.State != tenant.Watching
	})
	if is := inState(t, r, tenant.Recovering); is.Lost != before.Lost {
		t.Errorf("lost: %q; want %q", is.Lost, before.Lost)
	}
	if got := kindsOf(undecided(t, r)); !slices.Equal(got, []string{"app_unknown"}) {
		t.Fatalf("the report found %v", got)
	}
	decide(t, r, tenant.FoundAppUnknown, tenant.Adopt)
	inState(t, r, tenant.NotRecovering)
	if got := accountOf(t, r, "lost"); got != want {
		t.Errorf("the tenant has %v; want %v", got.app, want.app)
	}
}

// retiredPool starts a replica on a database that was restarted: its pool of n apps is retired.
func retiredPool(t *testing.T, n int) (*provisiontest.World, *provisiontest.Replica) {
	t.Helper()
	w := filled(t, n)
	w = on(w, pgtest.Restore(t, pgtest.Dump(t, w.URL))) // another fingerprint, and every event
	r := w.Start(control(provisiontest.Options{}))
	provisiontest.Eventually(t, "the pool is retired", func() bool {
		return len(column(t, w, `SELECT id FROM apps WHERE state = 'retired'`)) == n
	})
	inState(t, r, tenant.NotRecovering)
	return w, r
}

// While this database may be a copy, no retired app is removed: production may have handed it out.
func TestNoRemovalDuringWatch(t *testing.T) {
	t.Parallel()
	w, r := retiredPool(t, 1)
	app := tenant.AppID(column(t, w, `SELECT id FROM apps WHERE state = 'retired'`)[0])
	exec(t, w, provisiontest.SetRecovery(tenant.Watching))
	for _, f := range []tenant.RetiredFilter{{AppID: app}, {Before: aYearOn}} {
		confirm := cmp.Or(string(f.AppID), "1")
		if err := r.RemoveRetired(t.Context(), f, confirm, admin); codeOf(err) != "recovery_watching" {
			t.Errorf("remove %+v: %v", f, err)
		}
	}
	// Nor one that was named before the copy was made.
	exec(t, w, `UPDATE apps SET state = 'purging', removal_confirmed = true WHERE state = 'retired';
		UPDATE current_incarnation SET retiring = true, written_by = pg_current_xact_id()::xid`)
	provisiontest.Eventually(t, "the app is retired again, and the confirmation forgotten", func() bool {
		return len(column(t, w, `SELECT id FROM apps WHERE state = 'retired' AND NOT removal_confirmed`)) == 1
	})
	if n := w.State().Calls["DeleteApp"]; n != 0 {
		t.Errorf("%d apps were removed", n)
	}
}

// An app that turns out to be in use when retired apps are removed by date stays retired: its
// tenant can have it back.
func TestUsedAppStaysRetired(t *testing.T) {
	t.Parallel()
	w, r := retiredPool(t, 2)
	apps := column(t, w, `SELECT id FROM apps WHERE state = 'retired' ORDER BY id`)
	used := tenant.AppID(apps[0])
	makeKeyByHand(t, w, used, tenant.KeyMarker{Deployment: r.Deployment.ID, KeyID: uuid.Must(uuid.NewV7())}.String())
	if err := r.RemoveRetired(t.Context(), tenant.RetiredFilter{Before: aYearOn}, "2", admin); err != nil {
		t.Fatal(err)
	}
	provisiontest.Eventually(t, "the other app is removed", func() bool {
		return slices.Equal(column(t, w, `SELECT id || ' ' || state FROM apps WHERE state <> 'deleted' AND id = ANY ('{`+strings.Join(apps, ",")+`}')`),
			[]string{string(used) + " retired"})
	})
	// Named by its id it goes all the same.
	if err := r.RemoveRetired(t.Context(), tenant.RetiredFilter{AppID: used}, string(used), admin); err != nil {
		t.Fatal(err)
	}
	provisiontest.Eventually(t, "the app is removed", func() bool {
		return len(column(t, w, `SELECT id FROM apps WHERE id = '`+string(used)+`' AND state = 'deleted'`)) == 1
	})
}

// A tenant whose app was removed in Clarifai can be deleted.
func TestDeleteTenantWithoutApp(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	app := signUp(t, r, "user_1").AppID
	marked(t, w)
	askClarifai(t, w, "DELETE", "/apps/"+string(app), nil)
	got, err := r.Delete(t.Context(), "user_1", true, long, caller)
	stateOf(t, got, err, tenant.Deleted)
}

// A tag that was taken off an app is a reason not to remove the app.
func TestAppWithoutTagIsNotPurged(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	app := signUp(t, r, "user_1").AppID
	marked(t, w)
	askClarifai(t, w, "PATCH", "/apps/"+string(app), map[string]any{"action": "overwrite", "metadata_action": map[string]any{"op": "overwrite"},
		"app": map[string]any{"metadata": map[string]any{}}})
	if _, err := r.Delete(t.Context(), "user_1", true, 0, caller); err != nil {
		t.Fatal(err)
	}
	provisiontest.Eventually(t, "the removal is contested", func() bool {
		got, err := r.Tenant(t.Context(), "user_1", 0)
		return err == nil && got.Problem != nil && got.Problem.Code == "purge_contested"
	})
	if n := w.State().Calls["DeleteApp"]; n != 0 {
		t.Errorf("%d apps were removed", n)
	}
}

// Rows that were turned back without another sign of it: the report takes an app out of the pool
// whose ownership tag names a tenant.
func TestReportRetiresAppWithTenant(t *testing.T) {
	t.Parallel()
	w := filled(t, 1)
	r := w.Start(provisiontest.Options{Adjust: pool(1, 1)})
	want := accountOf(t, r, "lost")
	marked(t, w)
	poolIs(t, w, 1)
	exec(t, w, `SET LOCAL session_replication_role = replica; DELETE FROM tenants; UPDATE apps SET state = 'ready', tenant_id = NULL, tenant_generation = NULL, marked_at = NULL, pending = false WHERE state = 'held'`)
	report(t, r)
	if got := column(t, w, `SELECT id FROM apps WHERE state = 'retired'`); !slices.Equal(got, []string{string(want.app)}) {
		t.Fatalf("retired: %v; want %s", got, want.app)
	}
	if other := accountOf(t, r, "other"); other.app == want.app {
		t.Error("R1: a second tenant has the app")
	}
	decide(t, r, tenant.FoundAppForgotten, tenant.Adopt)
	if got := accountOf(t, r, "lost"); got != want {
		t.Errorf("the tenant has %v; want %v", got.app, want.app)
	}
}

// A caller who repeats a request until it is done sees that it is done, also for a tenant of an earlier
// incarnation.
func TestRepeatedRequestsEnd(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	signUp(t, r, "user_1")
	marked(t, w)
	r.Stop()
	w = on(w, pgtest.Restore(t, pgtest.Dump(t, w.URL)))
	r = w.Start(control(provisiontest.Options{}))
	provisiontest.Eventually(t, "the tenant is suspended", func() bool {
		got, err := r.Suspend(t.Context(), "user_1", 0, caller)
		return err == nil && got.State == tenant.Suspended
	})
	provisiontest.Eventually(t, "the tenant is deleted", func() bool {
		got, err := r.Delete(t.Context(), "user_1", true, 0, admin)
		return err == nil && got.State == tenant.Deleted
	})
}

// In recovery mode decisions and creations without a command wait, and everything that ends a key
// continues.
func TestWhatWaitsInRecovery(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	for _, id := range []tenant.ID{"rotated", "suspended", "resumed", "quarantined", "purged", "retiring"} {
		signUp(t, r, id)
	}
	marked(t, w)
	apps := map[tenant.ID]tenant.AppID{}
	for _, id := range []tenant.ID{"rotated", "suspended", "resumed", "quarantined", "purged", "retiring"} {
		apps[id] = signUp(t, r, id).AppID
	}
	suspended(t, r, "resumed")
	if _, err := r.Delete(t.Context(), "purged", false, long, caller); err != nil {
		t.Fatal(err)
	}
	overlap := time.Hour
	if _, _, err := r.Rotate(t.Context(), "retiring", tenant.NewRotation{ID: "1", KeyName: tenant.DefaultKey, Overlap: &overlap}, long, caller); err != nil {
		t.Fatal(err)
	}
	gone := signUp(t, r, "gone").AppID
	rest(t, w)
	// With this tenant undecided, no report ends recovery mode by itself.
	w.Ask(provisiontest.PAT, "DELETE", "/apps/"+string(gone), nil)
	removed := w.State().Calls["DeleteApp"]
	if _, err := r.DB.BeginRecovery(t.Context(), "a test", admin); err != nil {
		t.Fatal(err)
	}
	exec(t, w, provisiontest.SetRecovery(tenant.Recovering))
	// Due now, without a command since the loss: removal, campaign.
	startRotation(t, r, tenant.KeyFilter{All: true})
	exec(t, w, `UPDATE apps SET purge_after = now() - interval '1 hour', tagged_purge_after = now() - interval '1 hour', next_attempt_at = now() WHERE state = 'retained';
		UPDATE keys SET retires_at = now() WHERE state = 'retiring'`)
	// Commands that end or create a key continue.
	suspended(t, r, "suspended")
	if got, err := r.Resume(t.Context(), "resumed", long, caller); err != nil || got.State != tenant.Active {
		t.Errorf("resume: %+v, %v", got, err)
	}
	_, leaked := keyOf(t, r, "quarantined")
	if q, err := r.Quarantine(t.Context(), leaked, long, admin); err != nil || q.Key.State != tenant.KeyRevoked || q.Successor.State != tenant.KeyActive {
		t.Errorf("quarantine: %+v, %v", q, err)
	}
	defer func() {
		if t.Failed() {
			for _, l := range r.Logs.All() {
				t.Log(l.Message, l.ContextMap())
			}
			t.Log(column(t, w, `SELECT concat_ws(' ', app_id, name, state, end_reason, retires_at, problem) FROM keys`))
		}
	}()
	provisiontest.Eventually(t, "the overlap ends", func() bool { return keysOpening(t, w, apps["retiring"]) == 1 })
	for range 5 {
		if err := r.SweepOnce(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if n := keysOpening(t, w, apps["rotated"]); n != 1 || w.State().Calls["DeleteApp"] != removed {
		t.Errorf("%d keys open the app of a tenant that nobody asked to rotate, %d apps were removed", n, w.State().Calls["DeleteApp"]-removed)
	}
	exec(t, w, provisiontest.SetRecovery(tenant.NotRecovering)+` UPDATE campaigns SET next_attempt_at = now();`)
	provisiontest.Eventually(t, "the campaign goes on", func() bool {
		return len(column(t, w, `SELECT id FROM keys WHERE state = 'active' AND rotation_id LIKE 'campaign-%' AND app_id = $1`, apps["rotated"])) == 1
	})
}

// A copy of the database stops by itself, and the database that is in use is not affected.
func TestCopyStops(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(control(provisiontest.Options{Adjust: pool(1, 1)}))
	first := accountOf(t, r, "user_1")
	poolIs(t, w, 1)
	marked(t, w)
	controlRecorded(t, r)
	copied := on(w, pgtest.Restore(t, pgtest.Dump(t, w.URL)))
	c := copied.Start(control(provisiontest.Options{Adjust: pool(1, 1)}))
	if _, err := c.Suspend(t.Context(), "user_1", 0, caller); err != nil { // during the watch it waits
		t.Fatal(err)
	}
	inState(t, c, tenant.Stopped)
	calls := w.State().Calls
	if _, _, err := c.SignUp(t.Context(), "copied", tenant.SignUp{}, 0, caller); !errors.Is(err, tenant.Unavailable) {
		t.Errorf("a sign-up in the copy: %v", err)
	}
	if got, err := c.DB.Tenant(t.Context(), "user_1"); err != nil || got.AppID != first.app {
		t.Errorf("a lookup in the copy: %+v, %v", got, err)
	}
	if !keyOpens(t, w, tenant.NewSecret(first.secret), first.app) {
		t.Error("a command in the copy ended the key of a tenant")
	}
	is, err := r.DB.Recovery(t.Context())
	if err != nil || is.Active() {
		t.Errorf("the database in use is %+v, %v", is, err)
	}
	if after := w.State().Calls; after["DeleteKey"] != calls["DeleteKey"] || after["DeleteApp"] != 0 {
		t.Errorf("the copy removed something: %v", after)
	}
	// After a take-over the copy continues, and the other database stops.
	if _, err := c.TakeOver(t.Context(), "wrong", admin); !errors.Is(err, tenant.Invalid) {
		t.Errorf("take over without the id of the deployment: %v", err)
	}
	if _, err := c.TakeOver(t.Context(), c.Deployment.ID, admin); err != nil {
		t.Fatal(err)
	}
	inState(t, r, tenant.Stopped)
	signUp(t, c, "copied")
	if !provisiontestStops(t, c, "user_1") {
		t.Error("the suspension that waited is not carried out")
	}
}

func provisiontestStops(t *testing.T, r *provisiontest.Replica, id tenant.ID) bool {
	t.Helper()
	got, err := r.Tenant(t.Context(), id, long)
	return err == nil && got.State == tenant.Suspended
}

// A clean stop and start of database and service causes no recovery; a kill causes a watch.
func TestCleanStopIsNoRecovery(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(control(provisiontest.Options{Adjust: pool(1, 1)}))
	poolIs(t, w, 1)
	controlRecorded(t, r)
	r.Stop()
	w = on(w, pgtest.Restore(t, pgtest.Dump(t, w.URL))) // another fingerprint, and every event
	r = w.Start(control(provisiontest.Options{Adjust: pool(1, 1)}))
	provisiontest.Eventually(t, "the next incarnation has begun", func() bool {
		return len(column(t, w, `SELECT reason FROM incarnations`)) == 2
	})
	is := inState(t, r, tenant.NotRecovering)
	if is.Lost != "" {
		t.Errorf("lost: %s", is.Lost)
	}
	poolIs(t, w, 1)
	if n := len(column(t, w, `SELECT id FROM apps WHERE state = 'retired'`)); n != 1 {
		t.Errorf("%d apps are retired; want the pool", n)
	}
}

// Removing the control record by hand is noticed and repaired.
func TestControlRecordIsRepaired(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(control(provisiontest.Options{}))
	controlRecorded(t, r)
	id := tenant.ControlID("t", r.Deployment.ID)
	askClarifai(t, w, "DELETE", "/apps/"+string(id), nil)
	provisiontest.Eventually(t, "the control record is there again", func() bool {
		return slices.ContainsFunc(w.Sim.Apps(), func(a clarifaisim.AppInfo) bool { return a.ID == string(id) })
	})
	if _, found := report(t, r); len(found) != 0 {
		t.Errorf("a report finds %+v", found)
	}
	if is, err := r.DB.Recovery(context.WithoutCancel(t.Context())); err != nil || is.Active() {
		t.Errorf("recovery mode: %+v, %v", is, err)
	}
}

// The work of a replica that was killed does not wait for the end of its leases.
func TestLeasesOfDeadReplica(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	w.Faults(map[string]any{"call": "PostApps", "http": 503})
	if _, _, err := r.SignUp(t.Context(), "user_1", tenant.SignUp{}, 0, caller); err != nil {
		t.Fatal(err)
	}
	const died = `01a22aee-04af-71fd-b43e-80f79835e96d`
	conn := pgtest.Conn(t, w.URL)
	provisiontest.Eventually(t, "the build is leased by the dead replica", func() bool {
		tag, err := conn.Exec(t.Context(), `UPDATE apps SET leased_until = now() + interval '1 hour', leased_by = '`+died+`', next_attempt_at = now()
			WHERE state = 'building' AND leased_until < now()`)
		return err == nil && tag.RowsAffected() == 1
	})
	w.Faults()
	exec(t, w, `INSERT INTO replicas (id, incarnation, last_seen_at) SELECT '`+died+`', id, now() - interval '10 seconds' FROM current_incarnation`)
	if got, err := r.Tenant(t.Context(), "user_1", long); err != nil || got.State != tenant.Active {
		t.Errorf("the tenant is %s, %v", got.State, err)
	}
}

// If the clock of the database is set back, all work goes on.
func TestClockSetBack(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	signUp(t, r, "suspended")
	signUp(t, r, "waits")
	w.Faults(map[string]any{"call": "DeleteKey", "http": 503})
	if _, err := r.Suspend(t.Context(), "waits", 0, caller); err != nil {
		t.Fatal(err)
	}
	// As they are after the clock was set back by an hour.
	exec(t, w, `
		UPDATE apps SET leased_until = now() + interval '1 hour', next_attempt_at = next_attempt_at + interval '1 hour'
			WHERE state = 'building' OR pending;
		UPDATE keys SET leased_until = now() + interval '1 hour', next_attempt_at = next_attempt_at + interval '1 hour'
			WHERE state IN ('creating', 'revoking');
		UPDATE upstream_budget SET paused_until = now() + interval '1 hour', pauses = 0;
		UPDATE replicas SET last_seen_at = now() + interval '1 hour';`+pgtest.NextSlotIn(time.Hour))
	w.Faults()
	suspended(t, r, "suspended")
	suspended(t, r, "waits")
	signUp(t, r, "user_1")
}
