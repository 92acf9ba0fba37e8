package provision

import (
	"context"
	"errors"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/tenant"
)

// workKey looks at a key and makes it work, or work no longer, as its row says.
func (s *Service) workKey(ctx context.Context, id uuid.UUID) outcome {
	field := zap.Stringer("key", id)
	ctx = tenant.WithUpstreamTrace(ctx)
	k, err := s.Store.LeaseKey(ctx, id, s.Lease)
	if errors.Is(err, tenant.NotFound) {
		return outcomeNothing
	}
	if err != nil {
		return s.failed("lease key", err, field)
	}
	if k.State == tenant.KeyCreating {
		err = s.makeHeldKey(ctx, &k)
	} else {
		err = s.revoke(ctx, k)
	}
	if err == nil {
		return outcomeDone
	}
	interrupted := ctx.Err() != nil
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), recordTimeout)
	defer cancel()
	if errors.Is(err, tenant.ErrLeaseLost) { // as in endApp
		err = &deferred{}
	}
	up := asUpstream(err)
	d, isDeferred := errors.AsType[*deferred](err)
	stands, isStanding := errors.AsType[*standing](err)
	switch {
	case isDeferred:
		err = s.Store.DeferKey(ctx, k, d.bounded())
	case isStanding:
		return s.stand(ctx, k, stands.problem)
	case up == nil:
		return s.fault("work on key", err, interrupted, k.Attempts, k.Problem, func(set tenant.Setback) error { return s.Store.KeySetback(ctx, k, set) }, field)
	case interrupted:
		err = s.Store.DeferKey(ctx, k, 0)
	default:
		set := s.setback(up, k.Attempts, k.Problem)
		set.Settled = !up.Unclear && up.Call == callCreateKey
		s.Log.Warn("key set back", field, zap.String("problem", set.Problem.Code), zap.Duration("again_in", set.Delay), zap.Error(up))
		if err := s.Store.KeySetback(ctx, k, set); err != nil {
			return s.failed("record setback", err, field)
		}
		return outcomeSetback
	}
	if err != nil {
		return s.failed("defer key", err, field)
	}
	return outcomeDeferred
}

// makeHeldKey makes a key for an app that a tenant holds. Afterwards k is the row
// of that key.
func (s *Service) makeHeldKey(ctx context.Context, k *tenant.LeasedKey) error {
	var secret tenant.Secret
	if k.InDoubt {
		key, found, err := s.findKey(ctx, k.Lane, k.AppID, k.ID)
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
	if k.Replaces != uuid.Nil && k.Lane == background && !k.Current {
		// No caller asked for this key, and lost transactions may have suspended the tenant.
		dead, err := s.keyDead(ctx, k.AppID, k.Replaces)
		if err != nil {
			return err
		}
		if dead {
			return s.Store.KeyNotReplaced(ctx, *k, workerOf(ctx))
		}
	}
	if !secret.IsSet() {
		t, err := s.turn(ctx, k.Lane)
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

func (s *Service) revoke(ctx context.Context, k tenant.LeasedKey) error {
	if k.Ciphertext != nil {
		secret, err := s.Keyring.Open(k.ID, k.Ciphertext)
		if err != nil {
			return err
		}
		return s.deleteKey(ctx, k, secret)
	}
	if !k.InDoubt { // it was never made
		return s.Store.KeyEnded(ctx, k, nil, workerOf(ctx))
	}
	// The answer of the call that made it was lost, if it made it at all.
	key, found, err := s.findKey(ctx, max(normal, k.Lane), k.AppID, k.ID)
	switch {
	case tenant.ClassOf(err) == tenant.UpstreamNotFound: // the app is gone, and its keys with it
		return s.Store.KeyEnded(ctx, k, nil, workerOf(ctx))
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
	case k.InDoubtFor < s.Settle: // it may still land
		return &deferred{wait: s.Settle - k.InDoubtFor}
	}
	return s.Store.KeyEnded(ctx, k, nil, workerOf(ctx))
}

func (s *Service) deleteKey(ctx context.Context, k tenant.LeasedKey, secret tenant.Secret) error {
	if k.AppUserID != "" {
		return s.deleteTheirKey(ctx, k, secret)
	}
	err := s.call(ctx, k.Lane, func(ctx context.Context) error { return s.Upstream.DeleteKey(ctx, secret) })
	if err != nil && tenant.ClassOf(err) != tenant.UpstreamNotFound {
		return err
	}
	return s.Store.KeyEnded(ctx, k, nil, workerOf(ctx))
}
