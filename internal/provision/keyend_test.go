package provision_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// neverSettles is longer than any test.
func neverSettles(c *provision.Config) { c.Settle = time.Hour }

// keysEnded waits until a tenant is suspended, and checks that none of its keys works.
func keysEnded(t *testing.T, w *provisiontest.World, r *provisiontest.Replica, id tenant.ID) {
	t.Helper()
	provisiontest.Eventually(t, "the tenant is suspended", func() bool {
		got, err := r.Tenant(t.Context(), id, 0)
		return err == nil && got.State == tenant.Suspended
	})
	if n := len(w.AppKeys()); n != 0 {
		t.Errorf("the tenant is suspended and %d of its keys exist at Clarifai", n)
	}
	if n := countOf(t, connOf(t, w), `keys WHERE ciphertext IS NOT NULL`); n != 0 {
		t.Errorf("%d secrets of dead keys are kept", n)
	}
}

// unended checks that the end of a tenant's key is not recorded and that its secret is kept.
func unended(t *testing.T, w *provisiontest.World, r *provisiontest.Replica, id tenant.ID) tenant.Tenant {
	t.Helper()
	got, err := r.Tenant(t.Context(), id, 0)
	stateOf(t, got, err, tenant.Suspending)
	if n := countOf(t, connOf(t, w), `keys WHERE state = 'revoking' AND ciphertext IS NOT NULL`); n != 1 {
		t.Errorf("%d keys are being revoked and have their secret; want 1", n)
	}
	return got
}

// Whatever Clarifai says of the removal of a key, the key's end is recorded only once the key is refused.
func TestEndOfAKeyIsChecked(t *testing.T) {
	t.Parallel()
	for name, faults := range map[string][]map[string]any{
		"success, not carried out":     {{"call": "DeleteKey", "status": 10000}},
		"not found":                    {{"call": "DeleteKey", "status": 11101}},
		"success, check throttled":     {{"call": "DeleteKey", "status": 10000}, {"call": "MyScopes", "status": 11005}},
		"success, check fails":         {{"call": "DeleteKey", "status": 10000}, {"call": "MyScopes", "status": 98004}},
		"not found, check cut":         {{"call": "DeleteKey", "status": 11101}, {"call": "MyScopes", "drop_before": true}},
		"success, check is not ours":   {{"call": "DeleteKey", "status": 10000}, {"call": "MyScopes", "http": 401}},
		"not found, key lacks a scope": {{"call": "DeleteKey", "status": 11101}, {"call": "MyScopes", "status": 11007}},
		"not found, app not visible":   {{"call": "DeleteKey", "status": 11101}, {"call": "MyScopes", "status": 11101}},
		"success, app not visible":     {{"call": "DeleteKey", "status": 10000}, {"call": "MyScopes", "status": 11101}},
		"not found, young key unknown": {{"call": "DeleteKey", "status": 11101}, {"call": "MyScopes", "status": 11008}},
		"refused":                      {{"call": "DeleteKey", "status": 11009}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := provisiontest.New(t)
			r := w.Start(provisiontest.Options{Adjust: neverSettles})
			signUp(t, r, "user_1")
			w.Faults(faults...)
			if _, err := r.Suspend(t.Context(), "user_1", 0, caller); err != nil {
				t.Fatal(err)
			}
			provisiontest.Eventually(t, "an attempt is over", func() bool {
				return countOf(t, connOf(t, w), `keys WHERE state = 'revoking' AND leased_until = '-infinity' AND (attempts > 0 OR problem IS NOT NULL)`) == 1 ||
					countOf(t, connOf(t, w), `keys WHERE state = 'revoked'`) == 1
			})
			unended(t, w, r, "user_1")
			w.Faults()
			exec(t, w, `UPDATE keys SET created_at = created_at - interval '1 day', activated_at = activated_at - interval '1 day', next_attempt_at = now()`)
			keysEnded(t, w, r, "user_1")
		})
	}
}

// A key that works although Clarifai says that it was removed is shown as a problem after the settle time,
// and its removal is attempted until the key is dead.
func TestKeyThatOutlivesItsRemoval(t *testing.T) {
	t.Parallel()
	for _, code := range []int{10000, 11101} {
		t.Run(fmt.Sprint(code), func(t *testing.T) {
			t.Parallel()
			w := provisiontest.New(t)
			r := w.Start(provisiontest.Options{Adjust: func(c *provision.Config) { c.Settle = 100 * time.Millisecond }})
			signUp(t, r, "user_1")
			secret := secretOf(t, r, "user_1", "default")
			w.Faults(map[string]any{"call": "DeleteKey", "status": code})
			if _, err := r.Quarantine(t.Context(), secret, 0, admin); err != nil {
				t.Fatal(err)
			}
			provisiontest.Eventually(t, "the problem is recorded", func() bool {
				return countOf(t, connOf(t, w), `keys WHERE state = 'revoking' AND ciphertext IS NOT NULL AND problem ->> 'code' = 'key_outlives_removal'`) == 1
			})
			w.Faults()
			provisiontest.Eventually(t, "the key is dead", func() bool {
				return countOf(t, connOf(t, w), `keys WHERE state = 'revoked' AND end_reason = 'quarantined' AND problem IS NULL AND ciphertext IS NULL`) == 1
			})
			for _, k := range w.AppKeys() {
				if k.ID == secret.Reveal() {
					t.Error("the quarantined key exists at Clarifai")
				}
			}
		})
	}
}

// Within a consistency delay Clarifai does not know a new key, which works. Its end waits.
func TestSuspensionWithinAConsistencyDelay(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{Adjust: func(c *provision.Config) { c.Settle = time.Second }})
	w.Settings(map[string]any{"consistency_delay_ms": 500, "consistency_for_changes": true})
	signUp(t, r, "user_1")
	if _, err := r.Suspend(t.Context(), "user_1", 0, caller); err != nil {
		t.Fatal(err)
	}
	keysEnded(t, w, r, "user_1")
}

// A key whose ciphertext cannot be decrypted is found in the list of its app's keys: by its ownership tag,
// or, if it was adopted, by its fingerprint.
func TestUnreadableKeyIsRevoked(t *testing.T) {
	t.Parallel()
	for name, hand := range map[string]bool{"made by Tenantry": false, "made by hand": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := provisiontest.New(t)
			r := w.Start(provisiontest.Options{})
			got := signUp(t, r, "user_1")
			if hand {
				secret := secretOf(t, r, "user_1", "default")
				makeKeyByHand(t, w, got.AppID, "by hand")
				for _, k := range w.AppKeys() {
					if k.Description == "by hand" {
						exec(t, w, `UPDATE keys SET fingerprint = $1`, w.Keys.Fingerprint(tenant.NewSecret(k.ID)))
					}
				}
				askClarifai(t, w, "DELETE", "/keys/"+secret.Reveal(), nil)
			}
			exec(t, w, `UPDATE keys SET ciphertext = 'x'`)
			if _, err := r.Suspend(t.Context(), "user_1", 0, caller); err != nil {
				t.Fatal(err)
			}
			keysEnded(t, w, r, "user_1")
		})
	}
}

// A key that can neither be decrypted nor be found may work: its end is not recorded.
func TestUnreadableKeyThatIsHidden(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	w.Settings(map[string]any{"masked_keys": true})
	r := w.Start(provisiontest.Options{})
	signUp(t, r, "user_1")
	exec(t, w, `UPDATE keys SET ciphertext = 'x'`)
	if _, err := r.Suspend(t.Context(), "user_1", 0, caller); err != nil {
		t.Fatal(err)
	}
	provisiontest.Eventually(t, "it was attempted often", func() bool { return countOf(t, connOf(t, w), `keys WHERE attempts >= 5`) == 1 })
	unended(t, w, r, "user_1")
	w.Settings(map[string]any{"masked_keys": false})
	keysEnded(t, w, r, "user_1")
}

// A key whose secret is not known is dead if it is twice not in the list, a settle time apart.
func TestKeyWithoutSecretIsLookedForTwice(t *testing.T) {
	t.Parallel()
	s := &scene{t: t, w: provisiontest.New(t), holds: map[tenant.ID]tenant.AppID{}}
	s.r = s.w.Start(provisiontest.Options{})
	revoking(true, false)(s)
	s.w.Faults(map[string]any{"call": "ListAppKeys", "status": 11101, "count": 1})
	s.r = s.w.Start(provisiontest.Options{})
	rest(t, s.w)
	if n := len(s.w.AppKeys()); n != 1 {
		t.Errorf("Clarifai has %d keys; want the tenant's", n)
	}
}
