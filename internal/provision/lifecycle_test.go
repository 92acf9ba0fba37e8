package provision_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

const wait = 20 * time.Second

// keysOpening counts the keys at Clarifai that open an app.
func keysOpening(t *testing.T, w *provisiontest.World, app tenant.AppID) int {
	t.Helper()
	n := 0
	for _, k := range w.AppKeys() {
		if k.AppID == string(app) && keyOpens(t, w, tenant.NewSecret(k.ID), app) {
			n++
		}
	}
	return n
}

func stateOf(t *testing.T, got tenant.Tenant, err error, want tenant.State) tenant.Tenant {
	t.Helper()
	if err != nil || got.State != want {
		t.Fatalf("the tenant is %s, %v; want %s", got.State, err, want)
	}
	return got
}

func secretOf(t *testing.T, r *provisiontest.Replica, id tenant.ID, name string) tenant.Secret {
	t.Helper()
	_, secret, err := r.Reveal(t.Context(), id, name, caller)
	if err != nil {
		t.Fatalf("reveal %s of %s: %v", name, id, err)
	}
	return secret
}

// Suspension revokes every key upstream and keeps the app; resumption gives keys of
// the same names and scopes, all of them new.
func TestSuspendAndResume(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	got := signUp(t, r, "user_1")
	first := secretOf(t, r, "user_1", "default")
	if _, _, err := r.AddKey(t.Context(), "user_1", tenant.KeySpec{Name: "reports", Scopes: []string{"Predict"}}, wait, caller); err != nil {
		t.Fatal(err)
	}
	if n := keysOpening(t, w, got.AppID); n != 1 { // one of them only predicts
		t.Fatalf("%d keys open the app", n)
	}
	is, err := r.Suspend(t.Context(), "user_1", wait, caller)
	stateOf(t, is, err, tenant.Suspended)
	if is.AppID != got.AppID || len(w.AppKeys()) != 0 || w.State().Apps != 1 {
		t.Errorf("suspended, the tenant has the app %s, and Clarifai %d keys and %d apps", is.AppID, len(w.AppKeys()), w.State().Apps)
	}
	is, err = r.Suspend(t.Context(), "user_1", 0, caller)
	stateOf(t, is, err, tenant.Suspended)
	if _, _, err := r.Reveal(t.Context(), "user_1", "default", caller); !errors.Is(err, tenant.NotFound) {
		t.Errorf("the key of a suspended tenant is revealed: %v", err)
	}
	is, err = r.Resume(t.Context(), "user_1", wait, caller)
	stateOf(t, is, err, tenant.Active)
	if is.AppID != got.AppID || !keyWorks(t, w, r, is) || secretOf(t, r, "user_1", "default").Reveal() == first.Reveal() {
		t.Error("after the resumption the key is the old one or does not open the app")
	}
	reports, err := r.DB.Key(t.Context(), "user_1", "reports")
	if err != nil || reports.State != tenant.KeyActive || fmt.Sprint(reports.Scopes) != "[Predict]" {
		t.Errorf("after the resumption the further key is %+v, %v", reports, err)
	}
	mendedWithout(t, r)
}

// mendedWithout fails the test unless a report finds nothing.
func mendedWithout(t *testing.T, r *provisiontest.Replica) {
	t.Helper()
	if _, found := report(t, r); len(found) > 0 {
		t.Errorf("a report finds %+v", found)
	}
}

// A suspension takes effect also while a key is being made, and while its answer is
// lost.
func TestSuspendWhileAKeyIsMade(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]map[string]any{
		"slow":           {"call": "PostKeys", "count": 1, "delay_ms": 200},
		"lost":           {"call": "PostKeys", "count": 1, "drop_after": true},
		"not made":       {"call": "PostKeys", "count": 1, "drop_before": true},
		"refused":        {"call": "PostKeys", "count": 1, "status": 11006},
		"slow and there": {"call": "PostKeys", "count": 1, "delay_ms": 50},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := provisiontest.New(t)
			r := w.Start(provisiontest.Options{})
			got := signUp(t, r, "user_1")
			before := w.State().Calls["PostKeys"]
			w.Faults(fault)
			if _, _, err := r.AddKey(t.Context(), "user_1", tenant.KeySpec{Name: "more"}, 0, caller); err != nil {
				t.Fatal(err)
			}
			provisiontest.Eventually(t, "the key is being made", func() bool { return w.State().Calls["PostKeys"] > before })
			is, err := r.Suspend(t.Context(), "user_1", wait, caller)
			stateOf(t, is, err, tenant.Suspended)
			if n := len(w.AppKeys()); n != 0 {
				t.Errorf("Clarifai has %d keys of a suspended tenant", n)
			}
			is, err = r.Resume(t.Context(), "user_1", wait, caller)
			stateOf(t, is, err, tenant.Active)
			if n := len(w.AppKeys()); n != 2 || is.AppID != got.AppID {
				t.Errorf("after the resumption Clarifai has %d keys; want 2", n)
			}
			mendedWithout(t, r)
		})
	}
}

// Every change is refused in the states that do not allow it, with what they do.
func TestChangesAreRefused(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	ctx := t.Context()
	refused := func(what string, err error, state tenant.State) {
		t.Helper()
		e, ok := errors.AsType[*tenant.Error](err)
		if !ok || e.Kind != tenant.Conflict || e.State != state || len(e.Allowed) == 0 {
			t.Errorf("%s of a tenant that is %s: %v; want a conflict that names the state and what it allows", what, state, err)
		}
	}
	unknown := func(what string, err error) {
		t.Helper()
		if !errors.Is(err, tenant.NotFound) {
			t.Errorf("%s of nobody: %v", what, err)
		}
	}
	_, err := r.Suspend(ctx, "nobody", 0, caller)
	unknown("suspend", err)
	_, err = r.Delete(ctx, "nobody", false, 0, caller)
	unknown("delete", err)
	_, _, err = r.AddKey(ctx, "nobody", tenant.KeySpec{Name: "more"}, 0, caller)
	unknown("add key", err)

	signUp(t, r, "user_1")
	_, _, err = r.Rotate(ctx, "user_1", tenant.NewRotation{ID: "r", KeyName: "other"}, 0, caller)
	if !errors.Is(err, tenant.NotFound) {
		t.Errorf("rotate a key that is not there: %v", err)
	}
	_, err = r.Suspend(ctx, "user_1", wait, caller)
	if err != nil {
		t.Fatal(err)
	}
	_, err = r.Restore(ctx, "user_1", 0, caller)
	refused("restore", err, tenant.Suspended)
	_, _, err = r.AddKey(ctx, "user_1", tenant.KeySpec{Name: "more"}, 0, caller)
	refused("add key", err, tenant.Suspended)
	_, _, err = r.Rotate(ctx, "user_1", tenant.NewRotation{ID: "r", KeyName: "default"}, 0, caller)
	refused("rotate", err, tenant.Suspended)

	is, err := r.Delete(ctx, "user_1", false, wait, caller)
	stateOf(t, is, err, tenant.Deleting)
	_, err = r.Suspend(ctx, "user_1", 0, caller)
	refused("suspend", err, tenant.Deleting)
	_, err = r.Resume(ctx, "user_1", 0, caller)
	refused("resume", err, tenant.Deleting)
	_, _, err = r.SignUp(ctx, "user_1", tenant.SignUp{}, 0, caller)
	refused("sign up", err, tenant.Deleting)
	is, err = r.Delete(ctx, "user_1", true, wait, caller)
	stateOf(t, is, err, tenant.Deleted)
	_, err = r.Restore(ctx, "user_1", 0, caller)
	refused("restore", err, tenant.Deleted)
}

// A deletion revokes the keys at once and retains the app; it can be taken back until
// the app is purged.
func TestDeleteRestorePurge(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	got := signUp(t, r, "user_1")
	is, err := r.Delete(t.Context(), "user_1", false, wait, caller)
	stateOf(t, is, err, tenant.Deleting)
	if !is.KeysDead || len(w.AppKeys()) != 0 || w.State().Apps != 1 || time.Until(is.PurgeAfter) < 6*24*time.Hour {
		t.Errorf("deleted: %+v, with %d keys and %d apps at Clarifai", is, len(w.AppKeys()), w.State().Apps)
	}
	is, err = r.Restore(t.Context(), "user_1", wait, caller)
	stateOf(t, is, err, tenant.Active)
	if is.AppID != got.AppID || !keyWorks(t, w, r, is) {
		t.Errorf("restored, the tenant has %s with a key that does not open it; it had %s", is.AppID, got.AppID)
	}
	protect := true
	if _, err := r.Update(t.Context(), "user_1", tenant.Patch{DeletionProtection: &protect}, anyVersion, caller); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Delete(t.Context(), "user_1", true, 0, caller); !errors.Is(err, tenant.Conflict) {
		t.Errorf("a protected tenant is deleted: %v", err)
	}
	protect = false
	if _, err := r.Update(t.Context(), "user_1", tenant.Patch{DeletionProtection: &protect}, anyVersion, caller); err != nil {
		t.Fatal(err)
	}
	is, err = r.Delete(t.Context(), "user_1", true, wait, caller)
	stateOf(t, is, err, tenant.Deleted)
	if is.AppID != "" || w.State().Apps != 0 {
		t.Errorf("purged, the tenant has the app %q and Clarifai %d apps", is.AppID, w.State().Apps)
	}
	is, created, err := r.SignUp(t.Context(), "user_1", tenant.SignUp{}, wait, caller)
	stateOf(t, is, err, tenant.Active)
	if !created || is.Generation != 2 || is.AppID == got.AppID || !keyWorks(t, w, r, is) {
		t.Errorf("signed up again: %+v, created %v; want generation 2 with another app", is, created)
	}
	mendedWithout(t, r)
}

// What a row has become while a worker held it goes on when that worker is done, and
// not when its lease would have run out.
func TestPurgeWhileTheAppIsMarked(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{Adjust: func(c *provision.Config) { c.Lease = time.Hour }})
	w.Faults(map[string]any{"call": "PatchApp", "count": 1, "delay_ms": 300})
	signUp(t, r, "user_1")
	provisiontest.Eventually(t, "the app is being marked", func() bool { return w.State().Calls["PatchApp"] > 0 })
	is, err := r.Delete(t.Context(), "user_1", true, wait, caller)
	stateOf(t, is, err, tenant.Deleted)
	mendedWithout(t, r)
}

func anyVersion(tenant.Tenant) bool { return true }

// A tenant that is being deleted can be replaced: the new generation has an app of its
// own, and the old one goes at its own date.
func TestReplace(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	got := signUp(t, r, "user_1")
	if _, err := r.Delete(t.Context(), "user_1", false, wait, caller); err != nil {
		t.Fatal(err)
	}
	is, created, err := r.SignUp(t.Context(), "user_1", tenant.SignUp{Replace: true}, wait, caller)
	stateOf(t, is, err, tenant.Active)
	if !created || is.Generation != 2 || is.AppID == got.AppID || w.State().Apps != 2 {
		t.Errorf("replaced: %+v, created %v, %d apps at Clarifai", is, created, w.State().Apps)
	}
	again, created, err := r.SignUp(t.Context(), "user_1", tenant.SignUp{Replace: true}, wait, caller)
	if err != nil || created || again.AppID != is.AppID {
		t.Errorf("replaced again: %+v, %v, %v; want the same", again, created, err)
	}
	exec(t, w, `UPDATE apps SET purge_after = now() WHERE state = 'retained'`)
	provisiontest.Eventually(t, "the old app is removed", func() bool { return w.State().Apps == 1 })
	is, err = r.Service.Tenant(t.Context(), "user_1", 0)
	stateOf(t, is, err, tenant.Active)
	if !keyWorks(t, w, r, is) {
		t.Error("the key of the new generation works no longer")
	}
	settledReport(t, r)
}

func settledReport(t *testing.T, r *provisiontest.Replica) {
	t.Helper()
	provisiontest.Eventually(t, "no app is being removed", func() bool {
		s, _, err := r.UpstreamStatus(t.Context())
		return err == nil && s.Purging == 0
	})
	mendedWithout(t, r)
}

// No more apps of tenants are removed in an hour than is allowed; the others wait and
// say so.
func TestPurgeCap(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{Adjust: func(c *provision.Config) { c.RemovalCap = 2 }})
	for i := range 4 {
		id := tenant.ID(fmt.Sprint("user_", i))
		signUp(t, r, id)
		if _, err := r.Delete(t.Context(), id, true, 0, caller); err != nil {
			t.Fatal(err)
		}
	}
	count := func() (deleted, capped int) {
		for i := range 4 {
			is, err := r.DB.Tenant(t.Context(), tenant.ID(fmt.Sprint("user_", i)))
			if err != nil {
				t.Fatal(err)
			}
			switch {
			case is.State == tenant.Deleted:
				deleted++
			case is.Problem != nil && is.Problem.Code == "removal_cap":
				capped++
			}
		}
		return deleted, capped
	}
	provisiontest.Eventually(t, "two are removed and two wait", func() bool {
		deleted, capped := count()
		return deleted == 2 && capped == 2
	})
	if n := w.State().Apps; n != 2 {
		t.Errorf("Clarifai has %d apps; want 2", n)
	}
	exec(t, w, `UPDATE apps SET purging_since = purging_since - interval '61 minutes' WHERE purging_since IS NOT NULL`)
	provisiontest.Eventually(t, "all are removed", func() bool { deleted, _ := count(); return deleted == 4 })
}

// A rotation's new key works before the answer, the old one until the overlap ends;
// the same rotation asked for again gives the same key.
func TestRotate(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	got := signUp(t, r, "user_1")
	old := secretOf(t, r, "user_1", "default")
	hour := time.Hour
	rot, created, err := r.Rotate(t.Context(), "user_1", tenant.NewRotation{ID: "r1", KeyName: "default", Overlap: &hour}, wait, caller)
	if err != nil || !created || rot.State != tenant.RotationOverlapping || rot.New.State != tenant.KeyActive || rot.Old.State != tenant.KeyRetiring {
		t.Fatalf("rotate: %+v, %v, %v", rot, created, err)
	}
	next := secretOf(t, r, "user_1", "default")
	if next.Reveal() == old.Reveal() || !keyOpens(t, w, old, got.AppID) || !keyOpens(t, w, next, got.AppID) {
		t.Error("in the overlap one of the two keys does not work, or they are one")
	}
	again, created, err := r.Rotate(t.Context(), "user_1", tenant.NewRotation{ID: "r1", KeyName: "default"}, wait, caller)
	if err != nil || created || again.New.ID != rot.New.ID {
		t.Errorf("the same rotation again: %+v, %v, %v", again, created, err)
	}
	if _, _, err := r.Rotate(t.Context(), "user_1", tenant.NewRotation{ID: "r1", KeyName: "default", Overlap: new(time.Duration)}, 0, caller); !errors.Is(err, tenant.Conflict) {
		t.Errorf("the same rotation with another overlap: %v", err)
	}
	if _, _, err := r.Rotate(t.Context(), "user_1", tenant.NewRotation{ID: "r2", KeyName: "default"}, 0, caller); !errors.Is(err, tenant.Conflict) {
		t.Errorf("another rotation meanwhile: %v", err)
	}
	if rot, err = r.ConfirmRotation(t.Context(), "user_1", "default", "r1", caller); err != nil || rot.State != tenant.RotationDone {
		t.Fatalf("confirm: %+v, %v", rot, err)
	}
	provisiontest.Eventually(t, "the old key works no longer", func() bool { return !keyOpens(t, w, old, got.AppID) })
	if !keyOpens(t, w, next, got.AppID) {
		t.Error("the new key works no longer")
	}
	// Without an overlap, and with one that runs out.
	if rot, _, err = r.Rotate(t.Context(), "user_1", tenant.NewRotation{ID: "r2", KeyName: "default", Overlap: new(time.Duration)}, wait, caller); err != nil || rot.State != tenant.RotationDone {
		t.Fatalf("rotate without an overlap: %+v, %v", rot, err)
	}
	provisiontest.Eventually(t, "the replaced key works no longer", func() bool { return !keyOpens(t, w, next, got.AppID) })
	if rot, _, err = r.Rotate(t.Context(), "user_1", tenant.NewRotation{ID: "r3", KeyName: "default", Overlap: &hour}, wait, caller); err != nil {
		t.Fatal(err)
	}
	exec(t, w, `UPDATE keys SET retires_at = now() WHERE state = 'retiring'`)
	provisiontest.Eventually(t, "the overlap ends", func() bool {
		is, err := r.Rotation(t.Context(), "user_1", "default", "r3", 0)
		return err == nil && is.Old.State == tenant.KeyRevoked && len(w.AppKeys()) == 1
	})
	var kept int
	if err := connOf(t, w).QueryRow(t.Context(), `SELECT count(*) FROM keys WHERE state = 'revoked' AND ciphertext IS NOT NULL`).Scan(&kept); err != nil || kept != 0 {
		t.Errorf("%d revoked keys have kept their secrets, %v", kept, err)
	}
	mendedWithout(t, r)
}

// A rotation whose answers are lost leaves one new key.
func TestRotateSurvivesFaults(t *testing.T) {
	t.Parallel()
	for _, masked := range []bool{false, true} {
		for name, fault := range map[string]map[string]any{
			"lost":      {"call": "PostKeys", "count": 1, "drop_after": true},
			"not made":  {"call": "PostKeys", "count": 1, "drop_before": true},
			"throttled": {"call": "PostKeys", "count": 2, "status": 11005},
			"refused":   {"call": "PostKeys", "count": 1, "status": 11006},
		} {
			t.Run(fmt.Sprintf("%s, masked %t", name, masked), func(t *testing.T) {
				t.Parallel()
				w := provisiontest.New(t)
				w.Settings(map[string]any{"masked_keys": masked})
				r := w.Start(provisiontest.Options{})
				got := signUp(t, r, "user_1")
				w.Faults(fault)
				rot, _, err := r.Rotate(t.Context(), "user_1", tenant.NewRotation{ID: "r1", KeyName: "default", Overlap: new(time.Duration)}, wait, caller)
				if err != nil || rot.State != tenant.RotationDone {
					t.Fatalf("rotate: %+v, %v", rot, err)
				}
				if !keyOpens(t, w, secretOf(t, r, "user_1", "default"), got.AppID) {
					t.Error("the new key does not open the app")
				}
				again, created, err := r.Rotate(t.Context(), "user_1", tenant.NewRotation{ID: "r1", KeyName: "default"}, wait, caller)
				if err != nil || created || again.New.ID != rot.New.ID {
					t.Errorf("the same rotation again: %+v, %v, %v; want %s", again, created, err, rot.New.ID)
				}
				left := 1
				if masked && name == "lost" {
					left = 2 // the lost one cannot be addressed
				}
				provisiontest.Eventually(t, "one new key is left", func() bool { return len(w.AppKeys()) == left })
				rest(t, w)
				keysClaimed(t, w, left-1)
			})
		}
	}
}

// A key that expires is revoked by us, and stays so over a resumption.
func TestExpiry(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	signUp(t, r, "user_1")
	soon := time.Now().Add(time.Hour)
	key, created, err := r.AddKey(t.Context(), "user_1", tenant.KeySpec{Name: "short", ExpiresAt: soon}, wait, caller)
	if err != nil || !created || key.State != tenant.KeyActive {
		t.Fatalf("add key: %+v, %v, %v", key, created, err)
	}
	again, created, err := r.AddKey(t.Context(), "user_1", tenant.KeySpec{Name: "short", ExpiresAt: soon}, wait, caller)
	if err != nil || created || again.ID != key.ID {
		t.Errorf("the same key again: %+v, %v, %v", again, created, err)
	}
	if _, _, err := r.AddKey(t.Context(), "user_1", tenant.KeySpec{Name: "short", Scopes: []string{"Predict"}}, 0, caller); !errors.Is(err, tenant.Conflict) {
		t.Errorf("the key with other scopes: %v", err)
	}
	if _, _, err := r.AddKey(t.Context(), "user_1", tenant.KeySpec{Name: "late", ExpiresAt: time.Now().Add(-time.Second)}, 0, caller); !errors.Is(err, tenant.Invalid) {
		t.Errorf("a key that has expired: %v", err)
	}
	exec(t, w, `UPDATE keys SET expires_at = now() WHERE name = 'short'`)
	provisiontest.Eventually(t, "the key has expired", func() bool {
		key, err = r.DB.Key(t.Context(), "user_1", "short")
		return err == nil && key.State == tenant.KeyRevoked
	})
	if key.EndReason != tenant.EndExpired || len(w.AppKeys()) != 1 {
		t.Errorf("the key ended as %s, and Clarifai has %d keys", key.EndReason, len(w.AppKeys()))
	}
	if _, err := r.Suspend(t.Context(), "user_1", wait, caller); err != nil {
		t.Fatal(err)
	}
	is, err := r.Resume(t.Context(), "user_1", wait, caller)
	stateOf(t, is, err, tenant.Active)
	if n := len(w.AppKeys()); n != 1 {
		t.Errorf("after the resumption Clarifai has %d keys; want the default one", n)
	}
}

// Further keys have the scopes that the profile allows, and no others.
func TestScopesOfFurtherKeys(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	narrow := "narrow"
	if _, _, err := r.SignUp(t.Context(), "user_1", tenant.SignUp{Profile: &narrow}, wait, caller); err != nil {
		t.Fatal(err)
	}
	for _, scopes := range [][]string{{"All"}, {"Predict", "Inputs_Add"}, {}, {""}, {"Predict", "Predict"}, {"a b"}} {
		if _, _, err := r.AddKey(t.Context(), "user_1", tenant.KeySpec{Name: "more", Scopes: scopes}, 0, caller); !errors.Is(err, tenant.Invalid) {
			t.Errorf("a key with the scopes %q: %v; want Invalid", scopes, err)
		}
	}
	key, _, err := r.AddKey(t.Context(), "user_1", tenant.KeySpec{Name: "more", Scopes: []string{"Apps:Get"}}, wait, caller)
	if err != nil || key.State != tenant.KeyActive {
		t.Errorf("a key with an allowed scope: %+v, %v", key, err)
	}
	for i := range tenant.MaxKeys - 2 {
		if _, _, err := r.AddKey(t.Context(), "user_1", tenant.KeySpec{Name: fmt.Sprint("k", i)}, 0, caller); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := r.AddKey(t.Context(), "user_1", tenant.KeySpec{Name: "one-more"}, 0, caller); !errors.Is(err, tenant.Conflict) {
		t.Errorf("key %d of a tenant: %v", tenant.MaxKeys+1, err)
	}
}

// A profile's further keys are made for each tenant, once.
func TestExtraKeys(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{Adjust: func(c *provision.Config) {
		c.Profiles[0].ExtraKeys = []tenant.KeyTemplate{{Name: "reader", Scopes: []string{"Predict"}}}
	}})
	signUp(t, r, "user_1")
	provisiontest.Eventually(t, "the further key works", func() bool {
		k, err := r.DB.Key(t.Context(), "user_1", "reader")
		return err == nil && k.State == tenant.KeyActive
	})
	marked(t, w)
	if _, err := r.RevokeKey(t.Context(), "user_1", "reader", wait, caller); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Suspend(t.Context(), "user_1", wait, caller); err != nil {
		t.Fatal(err)
	}
	is, err := r.Resume(t.Context(), "user_1", wait, caller)
	stateOf(t, is, err, tenant.Active)
	rest(t, w)
	if n := len(w.AppKeys()); n != 1 {
		t.Errorf("Clarifai has %d keys; the further one was revoked for good", n)
	}
	mendedWithout(t, r)
}

// A leaked key is dead at once and has a successor; so is one that was replaced.
func TestQuarantine(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	got := signUp(t, r, "user_1")
	leaked := secretOf(t, r, "user_1", "default")
	q, err := r.Quarantine(t.Context(), leaked, wait, admin)
	if err != nil || q.TenantID != "user_1" || q.Key.State != tenant.KeyRevoked || q.Key.EndReason != tenant.EndQuarantined || q.Successor.State != tenant.KeyActive {
		t.Fatalf("quarantine: %+v, %v", q, err)
	}
	if keyOpens(t, w, leaked, got.AppID) || !keyWorks(t, w, r, got) {
		t.Error("the leaked key works, or its successor does not")
	}
	again, err := r.Quarantine(t.Context(), leaked, wait, admin)
	if err != nil || again.Key.State != tenant.KeyRevoked || again.Successor.ID != q.Successor.ID {
		t.Errorf("quarantine again: %+v, %v", again, err)
	}
	if _, err := r.Quarantine(t.Context(), tenant.NewSecret("nobody's"), 0, admin); !errors.Is(err, tenant.NotFound) {
		t.Errorf("quarantine of a foreign string: %v", err)
	}
	// One that a rotation has replaced: the successor is there.
	current := secretOf(t, r, "user_1", "default")
	rot, _, err := r.Rotate(t.Context(), "user_1", tenant.NewRotation{ID: "r1", KeyName: "default"}, wait, caller)
	if err != nil {
		t.Fatal(err)
	}
	if q, err = r.Quarantine(t.Context(), current, wait, admin); err != nil || q.Key.State != tenant.KeyRevoked || q.Successor.ID != rot.New.ID {
		t.Errorf("quarantine in an overlap: %+v, %v; want the successor %s", q, err, rot.New.ID)
	}
	// One of the pool: the app goes too.
	exec(t, w, `INSERT INTO apps (id, profile, profile_revision) VALUES ('t-pool', 'default', 'x')`)
	provisiontest.Eventually(t, "an app is in the pool", func() bool { return w.State().Apps == 2 && len(w.AppKeys()) == 2 })
	var ciphertext []byte
	var id uuid.UUID
	provisiontest.Eventually(t, "its key is known", func() bool {
		return connOf(t, w).QueryRow(t.Context(), `SELECT id, ciphertext FROM keys WHERE app_id = 't-pool' AND state = 'active'`).Scan(&id, &ciphertext) == nil
	})
	pooled, err := w.Keys.Open(id, ciphertext)
	if err != nil {
		t.Fatal(err)
	}
	if q, err = r.Quarantine(t.Context(), pooled, wait, admin); err != nil || q.TenantID != "" {
		t.Fatalf("quarantine of a key of the pool: %+v, %v", q, err)
	}
	provisiontest.Eventually(t, "the app is removed", func() bool { return w.State().Apps == 1 })
	settledReport(t, r)
}

// What is asked for at once is done one after the other, and ends as the last one says.
func TestChangesAtOnce(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r, other := w.Start(provisiontest.Options{}), w.Start(provisiontest.Options{})
	signUp(t, r, "user_1")
	done := make(chan error)
	for i := range 12 {
		replica := []*provisiontest.Replica{r, other}[i%2]
		go func() {
			var err error
			switch i % 4 {
			case 0:
				_, err = replica.Suspend(t.Context(), "user_1", 0, caller)
			case 1:
				_, err = replica.Resume(t.Context(), "user_1", 0, caller)
			case 2:
				_, _, err = replica.Rotate(t.Context(), "user_1", tenant.NewRotation{ID: fmt.Sprint("r", i), KeyName: "default"}, 0, caller)
			case 3:
				_, _, err = replica.AddKey(t.Context(), "user_1", tenant.KeySpec{Name: "more"}, 0, caller)
			}
			done <- err
		}()
	}
	for range 12 {
		if err := <-done; err != nil && !errors.Is(err, tenant.Conflict) && !errors.Is(err, tenant.NotFound) {
			t.Error(err)
		}
	}
	is, err := r.Resume(t.Context(), "user_1", wait, caller)
	stateOf(t, is, err, tenant.Active)
	is, err = r.Suspend(t.Context(), "user_1", wait, caller)
	stateOf(t, is, err, tenant.Suspended)
	if n := len(w.AppKeys()); n != 0 {
		t.Errorf("Clarifai has %d keys of a suspended tenant", n)
	}
	is, err = r.Resume(t.Context(), "user_1", wait, caller)
	stateOf(t, is, err, tenant.Active)
	if !keyWorks(t, w, r, is) {
		t.Error("the key does not open the app")
	}
	rest(t, w)
	mendedWithout(t, r)
}

// A restore that races with the purge ends in one of the two, never in between.
func TestRestoreRacesWithPurge(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	restored := 0
	for i := range 10 {
		id := tenant.ID(fmt.Sprint("user_", i))
		got := signUp(t, r, id)
		if _, err := r.Delete(t.Context(), id, false, wait, caller); err != nil {
			t.Fatal(err)
		}
		exec(t, w, `UPDATE apps SET purge_after = now() WHERE id = $1`, got.AppID)
		is, err := r.Restore(context.WithoutCancel(t.Context()), id, wait, caller)
		switch {
		case err == nil && is.State == tenant.Active:
			restored++
			if !keyWorks(t, w, r, is) || is.AppID != got.AppID {
				t.Errorf("%s was restored, and its key does not open %s", id, got.AppID)
			}
		case errors.Is(err, tenant.Conflict):
			provisiontest.Eventually(t, "the tenant is deleted", func() bool {
				is, err := r.DB.Tenant(t.Context(), id)
				return err == nil && is.State == tenant.Deleted
			})
		default:
			t.Errorf("restore %s: %+v, %v", id, is, err)
		}
	}
	if n := w.State().Apps; n != restored {
		t.Errorf("Clarifai has %d apps, and %d tenants were restored", n, restored)
	}
	mendedWithout(t, r)
}

// If a table was restored alone, an app may be held although no tenant has it.
func TestQuarantineOfAppWithoutTenant(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	signUp(t, r, "user_1")
	key := secretOf(t, r, "user_1", "default")
	conn := pgtest.Conn(t, w.URL)
	if _, err := conn.Exec(t.Context(), `SET session_replication_role = replica; DELETE FROM tenants`); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second) // for a failure: no endless loop
	defer cancel()
	_, err := r.Quarantine(ctx, key, 0, admin)
	if e, ok := errors.AsType[*tenant.Error](err); !ok || e.Kind != tenant.Conflict || e.Code != "app_without_tenant" {
		t.Errorf("quarantine returns %v", err)
	}
}
