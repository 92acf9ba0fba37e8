package provision

import (
	"bytes"
	"context"
	"fmt"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/tenant"
)

// workKey makes a leased key work, or work no longer, as its row says. Afterwards k is the row that was
// worked on last.
func (s *Service) workKey(ctx context.Context, k *tenant.LeasedKey) error {
	if k.State == tenant.KeyCreating {
		return s.makeHeldKey(ctx, k)
	}
	return s.revoke(ctx, *k)
}

// makeHeldKey makes a key for an app that a tenant holds. Afterwards k is the row
// of that key.
func (s *Service) makeHeldKey(ctx context.Context, k *tenant.LeasedKey) error {
	var secret tenant.Secret
	if k.InDoubt {
		key, found, err := s.findKey(ctx, k.Priority, k.AppID, k.ID)
		if err != nil {
			return err
		}
		if found && key.Secret.IsSet() {
			secret = key.Secret
		} else {
			// The lost call may still land, or has made a key that cannot be addressed: its
			// row goes on to be looked for and revoked.
			next, err := s.Store.ReplaceLeasedKey(ctx, *k, newRowID())
			if err != nil {
				return err
			}
			*k = next
		}
	}
	if k.Replaces != uuid.Nil && k.ByCampaign && !k.Current {
		// lost transactions may have suspended the tenant.
		dead, err := s.keyDead(ctx, k.AppID, k.Replaces)
		if err != nil {
			return err
		}
		if dead {
			return s.Store.KeyNotReplaced(ctx, *k, workerOf(ctx))
		}
	}
	if !secret.IsSet() {
		t, err := s.turn(ctx, k.Priority)
		if err != nil {
			return err
		}
		if err := s.Store.BeginLeasedKey(ctx, *k); err != nil {
			return err
		}
		if secret, err = s.createKey(ctx, t, s.newKey(k.AppID, k.ID, k.Scopes)); err != nil {
			return err
		}
	}
	sealed, err := s.sealed(k.ID, secret)
	if err != nil {
		return err
	}
	return s.Store.FinishLeasedKey(ctx, *k, sealed, workerOf(ctx))
}

// keyDead reports whether a key that is live by its row is dead at Clarifai.
func (s *Service) keyDead(ctx context.Context, app tenant.AppID, id uuid.UUID) (bool, error) {
	known, err := s.Store.KeysOfApp(ctx, app)
	if err != nil {
		return false, err
	}
	for _, k := range known {
		if k.ID == id {
			alive, err := s.keyOpens(ctx, k, app)
			return !alive, err
		}
	}
	return false, nil
}

// revoke ends a key. Its end is recorded only once it is certain that the key opens nothing.
func (s *Service) revoke(ctx context.Context, k tenant.LeasedKey) error {
	if k.Ciphertext != nil {
		secret, err := s.Keyring.Open(k.ID, k.Ciphertext)
		if err != nil {
			return s.revokeUnreadable(ctx, k, err)
		}
		return s.deleteKey(ctx, k, secret)
	}
	if !k.InDoubt { // it was never made
		return s.Store.KeyEnded(ctx, k, nil, workerOf(ctx))
	}
	// The answer of the call that made it was lost, if it made it at all.
	key, found, err := s.findKey(ctx, max(interactive, k.Priority), k.AppID, k.ID)
	switch {
	case tenant.ClassOf(err) == tenant.UpstreamNotFound: // the app is gone, and its keys with it
		return s.notListed(ctx, k)
	case err != nil:
		return err
	case found && key.Secret.IsSet():
		return s.deleteKey(ctx, k, key.Secret)
	case found:
		s.Log.Error("a key may work upstream and cannot be addressed: an operator must remove it",
			zap.Stringer("key", k.ID), zap.String("app", string(k.AppID)))
		return s.Store.KeyEnded(ctx, k, &tenant.Problem{Code: "key_lost", Since: time.Now().UTC(),
			Detail: "the key's secret was never learnt and Clarifai's listing hides it: remove the key described as " +
				tenant.KeyMarker{Deployment: s.Deployment.ID, KeyID: k.ID}.String() + " in Clarifai's portal"}, workerOf(ctx))
	}
	return s.notListed(ctx, k)
}

// revokeUnreadable ends a key whose ciphertext cannot be decrypted. The list of the app's keys has its
// secret. If the list hides secrets, it returns why, the error of the decryption.
func (s *Service) revokeUnreadable(ctx context.Context, k tenant.LeasedKey, why error) error {
	want := tenant.KeyMarker{Deployment: s.Deployment.ID, KeyID: k.ID}
	var secret tenant.Secret
	hidden := false
	err := s.eachKey(ctx, k.Priority, k.AppID, func(listed tenant.UpstreamKey) error {
		if !listed.Secret.IsSet() {
			hidden = true
			return nil
		}
		m, ok := tenant.ParseKeyMarker(listed.Description)
		if ok && m == want || bytes.Equal(s.Keyring.Fingerprint(listed.Secret), k.Fingerprint) {
			secret = listed.Secret
			return errStop
		}
		return nil
	})
	switch {
	case tenant.ClassOf(err) == tenant.UpstreamNotFound: // the app is gone, and its keys with it
	case err != nil:
		return err
	case secret.IsSet():
		return s.deleteKey(ctx, k, secret)
	case hidden: // the key may be one of these
		return why
	}
	return s.notListed(ctx, k)
}

// notListed ends a key without a known secret if it was not listed twice, a settle time apart: a call
// that makes it may still be carried out, and a new key may be hidden.
func (s *Service) notListed(ctx context.Context, k tenant.LeasedKey) error {
	return s.confirmEnd(ctx, k, s.Settle-k.UnconfirmedFor)
}

// confirmEnd ends a key, or checks it again after wait if that is more than 0.
func (s *Service) confirmEnd(ctx context.Context, k tenant.LeasedKey, wait time.Duration) error {
	if wait > 0 {
		return s.Store.KeyEndUnconfirmed(ctx, k, wait)
	}
	return s.Store.KeyEnded(ctx, k, nil, workerOf(ctx))
}

// deleteKey deletes a key, and asks the key itself whether it is dead. That Clarifai says so is not
// enough: it may not know a new key yet, it may hide a key that the PAT has lost access to, and it may
// not have carried the deletion out.
func (s *Service) deleteKey(ctx context.Context, k tenant.LeasedKey, secret tenant.Secret) error {
	deleted := s.call(ctx, k.Priority, func(ctx context.Context) error { return s.Upstream.DeleteKey(ctx, secret) })
	switch tenant.ClassOf(deleted) {
	case tenant.UpstreamNotFound, tenant.UpstreamForbidden, tenant.UpstreamRefused: // it may be dead for another reason
	default:
		if deleted != nil {
			return deleted
		}
	}
	_, err := s.opens(ctx, k.Priority, secret)
	if up := asUpstream(err); up != nil && up.Class == tenant.UpstreamNotFound {
		if up.Code == codeDoesNotExist { // this concerns the app, which is gone or may be hidden
			return s.confirmEnd(ctx, k, s.Settle-k.UnconfirmedFor)
		}
		// A new key may be refused because Clarifai does not know it yet, unless it was known when it was
		// deleted, now or by a call whose response was lost.
		if lost := k.Problem != nil && k.Problem.Code == problems[tenant.UpstreamDown].code; deleted != nil && !lost {
			return s.confirmEnd(ctx, k, s.Settle-k.Age)
		}
		return s.confirmEnd(ctx, k, 0)
	}
	if err != nil && tenant.ClassOf(err) != tenant.UpstreamForbidden { // forbidden: it works, and may not say what it opens
		return err
	}
	switch {
	case k.AppUserID != "":
		return &standing{tenant.Problem{Code: "key_not_ours", Since: time.Now().UTC(), Detail: fmt.Sprintf(
			"the key works on: the app belongs to the Clarifai user %s, and Clarifai lets only %s delete its keys; ask for it, Tenantry looks now and then whether it is done",
			k.AppUserID, k.AppUserID)}}
	case deleted != nil && tenant.ClassOf(deleted) != tenant.UpstreamNotFound:
		return deleted
	case k.UnconfirmedFor < s.Settle:
		return s.Store.KeyEndUnconfirmed(ctx, k, backoff(s.BackoffBase, s.BackoffCap, k.Attempts))
	}
	if k.Problem == nil || k.Problem.Code != keyOutlivesRemoval {
		s.Log.Error("a key works after its removal; Tenantry repeats the removal", zap.Stringer("key", k.ID), zap.String("app", string(k.AppID)))
	}
	return &standing{tenant.Problem{Code: keyOutlivesRemoval, Since: time.Now().UTC(),
		Detail: "Clarifai reports the key as removed or unknown, and the key works: Tenantry repeats the removal; check the app and its keys in Clarifai's portal"}}
}

// keyOutlivesRemoval is the code of the problem of a key that works although Clarifai reports it as removed.
const keyOutlivesRemoval = "key_outlives_removal"

// codeDoesNotExist is Clarifai's status code for an app or key that it does not know.
const codeDoesNotExist = 11101
