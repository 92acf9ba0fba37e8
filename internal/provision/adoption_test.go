package provision_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tenantry/tenantry/internal/clarifaisim"
	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

func adopt(t testing.TB, r *provisiontest.Replica, id tenant.ID, what tenant.AdoptRequest) (provision.Adopted, error) {
	t.Helper()
	return r.Adopt(t.Context(), id, what, tenant.SignUp{}, wait, caller)
}

func mustAdopt(t testing.TB, r *provisiontest.Replica, id tenant.ID, what tenant.AdoptRequest) provision.Adopted {
	t.Helper()
	a, err := adopt(t, r, id, what)
	if err != nil || !a.Done || a.Tenant.State != tenant.Active || a.Tenant.AppID != what.AppID {
		t.Fatalf("adopt %s for %s: %+v, %v", what.AppID, id, a, err)
	}
	return a
}

func refusedAs(t testing.TB, err error, code, says string) {
	t.Helper()
	e, ok := errors.AsType[*tenant.Error](err)
	if !ok || e.Code != code || !strings.Contains(e.Detail, says) {
		t.Errorf("the adoption ends with %v; want %s that says %q", err, code, says)
	}
}

// An app and its key are taken over as they are: Clarifai makes nothing, what the app's
// maker wrote stays, and the marker comes to it.
func TestAdoptWithKey(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	key := w.AppByHand(provisiontest.PAT, "hand-made", map[string]any{"mine": map[string]any{"n": 1}})
	before := w.State().Calls
	name := "Ada"
	up := tenant.SignUp{DisplayName: &name, Labels: map[string]string{"plan": "pro"}}
	what := tenant.AdoptRequest{AppID: "hand-made", Key: key}
	a, err := r.Adopt(t.Context(), "user_1", what, up, wait, caller)
	if err != nil || !a.Done || !a.Created || a.Tenant.State != tenant.Active || a.Tenant.DisplayName != "Ada" || a.Tenant.Labels["plan"] != "pro" || a.Tenant.AppUserID != "" {
		t.Fatalf("adopt: %+v, %v", a, err)
	}
	if got := secretOf(t, r, "user_1", "default"); got.Reveal() != key.Reveal() {
		t.Error("the tenant's key is not the one that was given")
	}
	rest(t, w)
	after := w.State().Calls
	if after["PostApps"] != before["PostApps"] || after["PostKeys"] != before["PostKeys"] {
		t.Errorf("the adoption made %d apps and %d keys", after["PostApps"]-before["PostApps"], after["PostKeys"]-before["PostKeys"])
	}
	app := w.Sim.Apps()[0]
	if ownerAt(w, app) != "user_1" || fmt.Sprint(app.Metadata["mine"]) != "map[n:1]" {
		t.Errorf("the app's metadata is %v", app.Metadata)
	}
	mendedWithout(t, r)

	// To say it again changes nothing, with and without the key.
	for _, again := range []tenant.AdoptRequest{what, {AppID: "hand-made"}, {AppID: "hand-made", UserID: provisiontest.Operator}} {
		b, err := r.Adopt(t.Context(), "user_1", again, up, wait, caller)
		if err != nil || b.Created || b.Tenant.Version != a.Tenant.Version {
			t.Errorf("adopted again: %+v, %v", b, err)
		}
	}
	other := "Bob"
	_, err = r.Adopt(t.Context(), "user_1", what, tenant.SignUp{DisplayName: &other}, wait, caller)
	refusedAs(t, err, "attributes_differ", "display_name")
	_, err = adopt(t, r, "user_2", what)
	refusedAs(t, err, "adopt_app_claimed", "user_1")
	conn := pgtest.Conn(t, w.URL)
	for _, action := range []string{"tenant.created", "tenant.activated", "app.adopted", "key.adopted"} {
		if n := countOf(t, conn, `audit_events WHERE tenant_id = 'user_1' AND action = '`+action+`'`); n != 1 {
			t.Errorf("%d events say %s; want one", n, action)
		}
	}
	if n := countOf(t, conn, `adoptions`); n != 0 {
		t.Errorf("%d adoptions are left", n)
	}
	if n := countOf(t, conn, `audit_events WHERE action = 'tenant.created' AND actor = '`+caller.Name+`' AND upstream_request_id IS NOT NULL`); n != 1 {
		t.Error("the adoption is not written to whom asked for it, with the call that allowed it")
	}

	// It lives on like any other.
	is, err := r.Suspend(t.Context(), "user_1", wait, caller)
	stateOf(t, is, err, tenant.Suspended)
	if len(w.AppKeys()) != 0 {
		t.Error("a suspended tenant's key is there")
	}
	is, err = r.Resume(t.Context(), "user_1", wait, caller)
	stateOf(t, is, err, tenant.Active)
	is, err = r.Delete(t.Context(), "user_1", true, wait, admin)
	stateOf(t, is, err, tenant.Deleted)
	if w.State().Apps != 0 {
		t.Error("the purged app is there")
	}
	w.AppByHand(provisiontest.PAT, "hand-made", nil)
	_, err = adopt(t, r, "user_1", tenant.AdoptRequest{AppID: "hand-made"})
	refusedAs(t, err, "adopt_app_claimed", "another generation")
	w.AppByHand(provisiontest.PAT, "another", nil)
	if a := mustAdopt(t, r, "user_1", tenant.AdoptRequest{AppID: "another"}); a.Tenant.Generation != 2 {
		t.Errorf("the tenant that was deleted adopts in generation %d", a.Tenant.Generation)
	}
}

// Without a key one is made, of the profile's scopes; until it works the tenant resumes.
func TestAdoptWithoutKey(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	key := w.AppByHand(provisiontest.PAT, "hand-made", nil)
	w.Ask(provisiontest.PAT, "DELETE", "/keys/"+key.Reveal(), nil)
	w.Faults(map[string]any{"call": "PostKeys", "status": 11006})
	narrow := "narrow"
	up := tenant.SignUp{Profile: &narrow}
	what := tenant.AdoptRequest{AppID: "hand-made"}
	if _, err := r.Adopt(t.Context(), "user_1", what, up, 0, caller); err != nil {
		t.Fatal(err)
	}
	provisiontest.Eventually(t, "the problem shows", func() bool {
		a, err := r.Adopt(t.Context(), "user_1", what, up, 0, caller)
		return err == nil && a.Done && a.Tenant.State == tenant.Resuming && a.Tenant.Problem != nil && a.Tenant.Problem.Code == "upstream_quota"
	})
	w.Faults()
	a, err := r.Adopt(t.Context(), "user_1", what, up, wait, caller)
	if err != nil || a.Tenant.State != tenant.Active {
		t.Fatalf("adopt: %+v, %v", a, err)
	}
	k, err := r.DB.Key(t.Context(), "user_1", "default")
	if err != nil || !tenant.SameScopes(k.Scopes, []string{"Predict", "Apps_Get"}) {
		t.Errorf("the key is %+v, %v", k, err)
	}
	rest(t, w)
	settledReport(t, r)
}

// What may not be adopted is refused with the reason, leaves nothing, and is tried again
// by the next request.
func TestAdoptRefused(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	marked := func(id tenant.AppID, deployment string) {
		w.AppByHand(provisiontest.PAT, id, map[string]any{"tenantry": tenant.Marker{Deployment: deployment, App: id}})
	}
	key := w.AppByHand(provisiontest.PAT, "one", nil)
	two := w.AppByHand(provisiontest.PAT, "two", nil)
	marked("foreign", "fedcba9876543210")
	dead := tenant.NewSecret(strings.Repeat("d", 32))
	theirs := w.Shared("theirs")
	built := signUp(t, r, "builder")
	for _, c := range []struct {
		what       tenant.AdoptRequest
		code, says string
	}{
		{tenant.AdoptRequest{AppID: "none"}, "adopt_app_unknown", "operator's account"},
		{tenant.AdoptRequest{AppID: "none", UserID: "bob", Key: key}, "adopt_app_unknown", "bob"},
		{tenant.AdoptRequest{AppID: "foreign"}, "adopt_foreign_marker", "fedcba9876543210"},
		{tenant.AdoptRequest{AppID: built.AppID}, "adopt_app_claimed", "builder"},
		{tenant.AdoptRequest{AppID: "one", Key: two}, "adopt_key_wrong_app", "opens the app two"},
		{tenant.AdoptRequest{AppID: "one", Key: theirs}, "adopt_key_wrong_app", "of bob"},
		{tenant.AdoptRequest{AppID: "theirs", UserID: "bob", Key: key}, "adopt_key_wrong_app", "opens the app one"},
		{tenant.AdoptRequest{AppID: "one", Key: dead}, "adopt_key_refused", ""},
		{tenant.AdoptRequest{AppID: "one", Key: tenant.NewSecret(provisiontest.PAT)}, "adopt_key_refused", ""},
		{tenant.AdoptRequest{AppID: "theirs", UserID: "bob"}, "adopt_key_required", "only the owner"},
		{tenant.AdoptRequest{AppID: ""}, "invalid_adopt", "missing"},
		{tenant.AdoptRequest{AppID: "a/b"}, "invalid_adopt", "slash"},
		{tenant.AdoptRequest{AppID: "one", UserID: "me"}, "invalid_adopt", "alias"},
		{tenant.AdoptRequest{AppID: "one", Key: tenant.NewSecret("a b")}, "invalid_adopt", "white space"},
		{tenant.AdoptRequest{AppID: "one", Key: tenant.NewSecret("****1234")}, "invalid_adopt", "masks"},
	} {
		_, err := adopt(t, r, "user_1", c.what)
		refusedAs(t, err, c.code, c.says)
	}
	if _, err := r.DB.Tenant(t.Context(), "user_1"); !errors.Is(err, tenant.NotFound) {
		t.Errorf("a refused adoption left a tenant: %v", err)
	}
	conn := pgtest.Conn(t, w.URL)
	if n := countOf(t, conn, `adoptions WHERE ciphertext IS NOT NULL OR state = 'checking'`); n != 0 {
		t.Errorf("%d adoptions keep a key or go on", n)
	}
	w.Faults(map[string]any{"call": "GetKey", "count": 2, "status": 11101})
	_, err := adopt(t, r, "user_1", tenant.AdoptRequest{AppID: "one", Key: key})
	refusedAs(t, err, "adopt_key_not_ours", "never revoke")
	w.Faults()
	// Who asked without waiting is told once, and then it is tried again.
	for range 2 {
		if a, err := r.Adopt(t.Context(), "user_1", tenant.AdoptRequest{AppID: "none"}, tenant.SignUp{}, 0, caller); err == nil && a.Adoption.State != tenant.AdoptionChecking {
			t.Errorf("asked without waiting: %+v, %v", a, err)
		}
		provisiontest.Eventually(t, "the refusal is told", func() bool {
			_, err := r.Adopt(t.Context(), "user_1", tenant.AdoptRequest{AppID: "none"}, tenant.SignUp{}, 0, caller)
			return errors.Is(err, tenant.Conflict)
		})
	}
	_, err = adopt(t, r, "builder", tenant.AdoptRequest{AppID: "one"})
	refusedAs(t, err, "adopt_tenant_taken", string(built.AppID))
	mustAdopt(t, r, "user_1", tenant.AdoptRequest{AppID: "one", Key: key})
}

// A dry run makes all checks, says the same, and changes nothing.
// An app or key that Clarifai does not know once may be young: the next response counts.
func TestAdoptionAsksTwice(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	for i, call := range []string{"GetApp", "ListApps", "GetKey"} {
		id := tenant.AppID(fmt.Sprint("made-", i))
		key := w.AppByHand(provisiontest.PAT, id, nil)
		w.Faults(map[string]any{"call": call, "count": 1, "status": 11101})
		if a, err := adopt(t, r, tenant.ID(fmt.Sprint("user_", i)), tenant.AdoptRequest{AppID: id, Key: key}); err != nil || a.Tenant.State != tenant.Active {
			t.Errorf("after one 11101 of %s the adoption is %+v, %v", call, a.Adoption, err)
		}
	}
}

func TestAdoptDryRun(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	key := w.AppByHand(provisiontest.PAT, "one", nil)
	two := w.AppByHand(provisiontest.PAT, "two", nil)
	try := func(id tenant.ID, what tenant.AdoptRequest, state tenant.AdoptionState, code string) {
		t.Helper()
		what.DryRun = true
		a, err := adopt(t, r, id, what)
		if err != nil || a.Done || a.Adoption.State != state || code != "" && (a.Adoption.Problem == nil || a.Adoption.Problem.Code != code) {
			t.Errorf("dry run of %s for %s: %+v, %v; want %s %s", what.AppID, id, a, err, state, code)
		}
	}
	try("user_1", tenant.AdoptRequest{AppID: "one", Key: key}, tenant.AdoptionPossible, "")
	try("user_1", tenant.AdoptRequest{AppID: "one"}, tenant.AdoptionPossible, "")
	try("user_1", tenant.AdoptRequest{AppID: "one", Key: two}, tenant.AdoptionRefused, "adopt_key_wrong_app")
	try("user_1", tenant.AdoptRequest{AppID: "none"}, tenant.AdoptionRefused, "adopt_app_unknown")
	for _, c := range w.Sim.Calls() {
		if strings.HasPrefix(c.Call, "Patch") || strings.HasPrefix(c.Call, "Delete") {
			t.Errorf("a dry run called %s", c.Call)
		}
	}
	if _, err := r.DB.Tenant(t.Context(), "user_1"); !errors.Is(err, tenant.NotFound) {
		t.Errorf("a dry run left a tenant: %v", err)
	}
	mustAdopt(t, r, "user_1", tenant.AdoptRequest{AppID: "one", Key: key})
	try("user_2", tenant.AdoptRequest{AppID: "one"}, tenant.AdoptionRefused, "adopt_app_claimed")
	try("user_1", tenant.AdoptRequest{AppID: "two"}, tenant.AdoptionRefused, "adopt_tenant_taken")
	if a, err := adopt(t, r, "user_1", tenant.AdoptRequest{AppID: "one", DryRun: true}); err != nil || !a.Done {
		t.Errorf("dry run of what is done: %+v, %v", a, err)
	}
}

// Of many that want one app, one gets it; a tenant that wants several gets one.
func TestAdoptAtOnce(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	w.AppByHand(provisiontest.PAT, "one", nil)
	w.AppByHand(provisiontest.PAT, "two", nil)
	ends := make(chan error)
	for i := range 8 {
		go func() {
			_, err := r.Adopt(t.Context(), tenant.ID(fmt.Sprint("user_", i)), tenant.AdoptRequest{AppID: "one"}, tenant.SignUp{}, wait, caller)
			ends <- err
		}()
	}
	for range 2 {
		go func() {
			_, _, err := r.SignUp(t.Context(), "both", tenant.SignUp{}, wait, caller)
			ends <- err
		}()
		go func() {
			_, err := r.Adopt(t.Context(), "both", tenant.AdoptRequest{AppID: "two"}, tenant.SignUp{}, wait, caller)
			ends <- err
		}()
	}
	for range 12 {
		if err := <-ends; err != nil && !errors.Is(err, tenant.Conflict) {
			t.Error(err)
		}
	}
	rest(t, w)
	conn := pgtest.Conn(t, w.URL)
	if n := countOf(t, conn, `tenants WHERE app_id = 'one'`); n != 1 {
		t.Errorf("%d tenants have the app", n)
	}
	if n := countOf(t, conn, `apps WHERE tenant_id = 'both' AND state = 'held'`); n != 1 {
		t.Errorf("the tenant has %d apps", n)
	}
	if n := countOf(t, conn, `(SELECT FROM tenants t WHERE (SELECT count(*) FROM audit_events e WHERE e.tenant_id = t.id AND e.action = 'tenant.activated') <> 1) x`); n != 0 {
		t.Errorf("%d tenants were activated otherwise than once", n)
	}
}

// An app that is shared with the operator is used with its owner's key and otherwise left
// alone: nothing is believed of the key but what Clarifai says with it.
func TestAdoptShared(t *testing.T) {
	t.Parallel()
	for _, code := range []int{11101, 11007} {
		t.Run(fmt.Sprint(code), func(t *testing.T) {
			t.Parallel()
			w := provisiontest.New(t)
			w.Settings(map[string]any{"collaborator_code": code})
			r := w.Start(provisiontest.Options{})
			key := w.Shared("theirs")
			a := mustAdopt(t, r, "user_1", tenant.AdoptRequest{AppID: "theirs", UserID: "bob", Key: key})
			if a.Tenant.AppUserID != "bob" || secretOf(t, r, "user_1", "default").Reveal() != key.Reveal() {
				t.Errorf("adopted: %+v", a)
			}
			rest(t, w)
			mendedWithout(t, r)
			_, _, err := r.Rotate(t.Context(), "user_1", tenant.NewRotation{ID: "r1", KeyName: "default"}, wait, caller)
			refusedAs(t, err, "key_not_ours", "bob")
			_, _, err = r.AddKey(t.Context(), "user_1", tenant.KeySpec{Name: "more"}, wait, caller)
			refusedAs(t, err, "key_not_ours", "bob")
			if q, err := r.Quarantine(t.Context(), key, 0, admin); err != nil || q.Key.State != tenant.KeyRevoking || q.Successor.State != "" {
				t.Errorf("quarantine: %+v, %v", q, err)
			}

			// As long as the key works nobody is told that it does not.
			if _, err := r.Suspend(t.Context(), "user_1", 0, caller); err != nil {
				t.Fatal(err)
			}
			provisiontest.Eventually(t, "the problem shows", func() bool {
				is, err := r.DB.Tenant(t.Context(), "user_1")
				return err == nil && is.State == tenant.Suspending && is.Problem != nil && is.Problem.Code == "key_not_ours"
			})
			w.Ask(provisiontest.TheirPAT, "DELETE", "/keys/"+key.Reveal(), nil)
			is, err := r.Suspend(t.Context(), "user_1", wait, caller)
			stateOf(t, is, err, tenant.Suspended)
			_, err = r.Resume(t.Context(), "user_1", wait, caller)
			refusedAs(t, err, "key_not_ours", "bob")

			// Its owner makes another key, and the tenant is given it.
			again, err := adopt(t, r, "user_1", tenant.AdoptRequest{AppID: "theirs", UserID: "bob", Key: key})
			stateOf(t, again.Tenant, err, tenant.Suspended)
			for range 2 {
				was, old := key, a
				key = w.KeyByHand(provisiontest.TheirPAT, "theirs")
				a = mustAdopt(t, r, "user_1", tenant.AdoptRequest{AppID: "theirs", UserID: "bob", Key: key})
				if a.Created || a.Tenant.Generation != 1 || secretOf(t, r, "user_1", "default").Reveal() != key.Reveal() {
					t.Errorf("with another key: %+v", a)
				}
				if b := mustAdopt(t, r, "user_1", tenant.AdoptRequest{AppID: "theirs", UserID: "bob", Key: was}); b.Tenant.Version != a.Tenant.Version {
					t.Errorf("the key of before was taken again: %+v after %+v", b, old)
				}
			}
			keys, err := r.DB.Keys(t.Context(), "user_1")
			if err != nil || len(keys) != 3 {
				t.Errorf("the tenant has the keys %+v, %v", keys, err)
			}
			mendedWithout(t, r)

			// A deletion that is taken back leaves it suspended, until there is a key.
			if _, err := r.Delete(t.Context(), "user_1", false, 0, caller); err != nil {
				t.Fatal(err)
			}
			for _, k := range w.AppKeys() { // that which was replaced works on, too
				w.Ask(provisiontest.TheirPAT, "DELETE", "/keys/"+k.ID, nil)
			}
			is, err = r.Restore(t.Context(), "user_1", wait, caller)
			stateOf(t, is, err, tenant.Suspended)
			mustAdopt(t, r, "user_1", tenant.AdoptRequest{AppID: "theirs", UserID: "bob", Key: w.KeyByHand(provisiontest.TheirPAT, "theirs")})

			is, err = r.Delete(t.Context(), "user_1", true, wait, admin)
			stateOf(t, is, err, tenant.Deleted)
			if i := slices.IndexFunc(w.Sim.Calls(), func(c clarifaisim.Call) bool { return c.Call == "DeleteApp" || c.Call == "PatchApp" }); i >= 0 {
				t.Error("an app of somebody else was changed, or it was tried")
			}
			if w.State().Apps != 1 {
				t.Error("an app of somebody else is gone")
			}
			mendedWithout(t, r)
		})
	}
}

// A tenant of a shared app can be purged though the key works on, and the key is then said
// to do so.
func TestPurgeShared(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	key := w.Shared("theirs")
	mustAdopt(t, r, "user_1", tenant.AdoptRequest{AppID: "theirs", UserID: "bob", Key: key})
	is, err := r.Delete(t.Context(), "user_1", true, wait, admin)
	stateOf(t, is, err, tenant.Deleted)
	conn := pgtest.Conn(t, w.URL)
	if n := countOf(t, conn, `keys WHERE state = 'lost' AND ciphertext IS NULL`); n != 1 || w.State().Apps != 1 {
		t.Errorf("%d keys are lost, and Clarifai has %d apps", n, w.State().Apps)
	}
}

// Nothing is adopted until it is known whether another database is in use.
func TestAdoptDuringWatch(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	w.AppByHand(provisiontest.PAT, "one", nil)
	exec(t, w, provisiontest.SetRecovery(tenant.Watching))
	a, err := r.Adopt(t.Context(), "user_1", tenant.AdoptRequest{AppID: "one"}, tenant.SignUp{}, 0, caller)
	if err != nil || a.Done || a.Adoption.Problem == nil || a.Adoption.Problem.Code != "recovery" {
		t.Errorf("during the watch: %+v, %v", a, err)
	}
	exec(t, w, provisiontest.SetRecovery(tenant.NotRecovering))
	mustAdopt(t, r, "user_1", tenant.AdoptRequest{AppID: "one"})
}

// What was adopted comes back from its marker when the database has forgotten it.
func TestAdoptedIsRebuilt(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{Adjust: func(c *provision.Config) { c.ReportEvery = time.Hour }})
	w.AppByHand(provisiontest.PAT, "one", nil)
	mustAdopt(t, r, "user_1", tenant.AdoptRequest{AppID: "one"})
	rest(t, w)
	if app := w.Sim.Apps()[0]; ownerAt(w, app) != "user_1" {
		t.Fatalf("the marker is %v", app.Metadata)
	}
	exec(t, w, `
		BEGIN;
		SET LOCAL session_replication_role = replica;
		DELETE FROM keys; DELETE FROM tenants; DELETE FROM apps;
		COMMIT`)
	_, err := adopt(t, r, "user_2", tenant.AdoptRequest{AppID: "one"})
	refusedAs(t, err, "adopt_app_contested", "recover show")
	if _, found := report(t, r); !slices.Equal(kindsOf(found), []string{"app_unknown"}) {
		t.Fatalf("the report found %v", kindsOf(found))
	}
	decide(t, r, tenant.FoundAppUnknown, tenant.Adopt)
	a, err := adopt(t, r, "user_1", tenant.AdoptRequest{AppID: "one"})
	stateOf(t, a.Tenant, err, tenant.Active)
	if a.Created || !keyWorks(t, w, r, a.Tenant) {
		t.Errorf("rebuilt: %+v", a)
	}
}

// An adopted app whose tenant is deleted before it has its marker is no difference, and
// can be restored and purged.
func TestDeleteAdoptedUnmarked(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	key := w.AppByHand(provisiontest.PAT, "one", nil)
	mustAdopt(t, r, "user_1", tenant.AdoptRequest{AppID: "one", Key: key})
	w.Faults(map[string]any{"call": "PatchApp", "status": 98004})
	is, err := r.Delete(t.Context(), "user_1", false, wait, caller)
	stateOf(t, is, err, tenant.Deleting)
	mendedWithout(t, r)
	w.Faults() // no key is created while the ownership tag may name a removal
	is, err = r.Restore(t.Context(), "user_1", wait, caller)
	stateOf(t, is, err, tenant.Active)
	w.Faults(map[string]any{"call": "PatchApp", "status": 98004})
	if _, err := r.Delete(t.Context(), "user_1", true, 0, admin); err != nil {
		t.Fatal(err)
	}
	w.Faults()
	is, err = r.Delete(t.Context(), "user_1", true, wait, admin)
	stateOf(t, is, err, tenant.Deleted)
	if w.State().Apps != 0 {
		t.Error("the app is there though it was purged")
	}
}

// A key that an adoption holds keeps the key of the keyset that sealed it.
func TestAdoptionNeedsItsSealKey(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{Idle: true})
	key := w.AppByHand(provisiontest.PAT, "one", nil)
	if _, err := r.Adopt(t.Context(), "user_1", tenant.AdoptRequest{AppID: "one", Key: key}, tenant.SignUp{}, 0, caller); err != nil {
		t.Fatal(err)
	}
	was := primaryOf(t, w.Keys)
	rotateKeyset(t, w.Keyset, false)
	w.Keys.OnUnknown(func() {})
	if err := w.Keys.Replace(loadKeyset(t, w.Keyset)); err != nil {
		t.Fatal(err)
	}
	if counts, err := r.DB.CountSealed(t.Context()); err != nil || counts.By[was].Keys != 1 {
		t.Errorf("the old key sealed %+v, %v", counts.By[was], err)
	}
	w.Start(provisiontest.Options{})
	mustAdopt(t, r, "user_1", tenant.AdoptRequest{AppID: "one", Key: key})
	rekeyed(t, r.DB, primaryOf(t, w.Keys))
}
