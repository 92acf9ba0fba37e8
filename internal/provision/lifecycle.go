package provision

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/tenantry/tenantry/internal/tenant"
)

// changed runs a change of a tenant that actor asks for, and waits for wait until it has taken effect.
func (s *Service) changed(ctx context.Context, id tenant.ID, wait time.Duration, actor tenant.Actor, change func() (tenant.Tenant, error)) (tenant.Tenant, error) {
	changed, stop := s.Store.Watch(id)
	defer stop()
	t, err := change()
	if err != nil || wait <= 0 {
		return t, err
	}
	return s.awaitWritten(ctx, t, wait, changed, actor.Within)
}

// Suspend begins to revoke every key of a tenant, and waits for wait until none works
// upstream. It reports tenant.Conflict, as all of these do, for a tenant whose state
// does not allow it.
func (s *Service) Suspend(ctx context.Context, id tenant.ID, wait time.Duration, actor tenant.Actor) (tenant.Tenant, error) {
	return s.changed(ctx, id, wait, actor, func() (tenant.Tenant, error) { return s.Store.Suspend(ctx, id, actor) })
}

// Resume begins to make the keys anew that a tenant had when it was suspended, and
// waits for wait until they work.
func (s *Service) Resume(ctx context.Context, id tenant.ID, wait time.Duration, actor tenant.Actor) (tenant.Tenant, error) {
	return s.changed(ctx, id, wait, actor, func() (tenant.Tenant, error) { return s.Store.Resume(ctx, id, newKeyIDs(), actor) })
}

// Delete begins to revoke every key of a tenant, and retains its app for as long as
// its profile says, or purges it now. It waits for wait until no key works, or until
// the app is gone.
func (s *Service) Delete(ctx context.Context, id tenant.ID, purgeNow bool, wait time.Duration, actor tenant.Actor) (tenant.Tenant, error) {
	return s.changed(ctx, id, wait, actor, func() (tenant.Tenant, error) { return s.Store.Delete(ctx, id, purgeNow, s.retention, actor) })
}

// retention is how long the app of a deleted tenant of a profile is kept.
func (s *Service) retention(profile string) time.Duration {
	return cmp.Or(s.profiles[profile].Retention, tenant.DefaultRetention)
}

// Restore takes a deletion back while the app is there, and waits for wait until the
// tenant's keys, made anew, work.
func (s *Service) Restore(ctx context.Context, id tenant.ID, wait time.Duration, actor tenant.Actor) (tenant.Tenant, error) {
	return s.changed(ctx, id, wait, actor, func() (tenant.Tenant, error) { return s.Store.Restore(ctx, id, newKeyIDs(), actor) })
}

// newKeyIDs names rows for as many keys as a tenant can have.
func newKeyIDs() []uuid.UUID {
	ids := make([]uuid.UUID, tenant.MaxKeys)
	for i := range ids {
		ids[i] = newRowID()
	}
	return ids
}

// Update changes attributes of a tenant. It reports tenant.Precondition, and changes
// nothing, unless current takes the tenant as it stands.
func (s *Service) Update(ctx context.Context, id tenant.ID, p tenant.Patch, current func(tenant.Tenant) bool, actor tenant.Actor) (tenant.Tenant, error) {
	p.Within = actor.Within
	return s.Store.UpdateTenant(ctx, id, p, current, actor)
}

// AddKey makes a further key for a tenant, or finds it, and waits for wait until it
// works. It reports tenant.Invalid for scopes that the tenant's profile forbids.
func (s *Service) AddKey(ctx context.Context, id tenant.ID, spec tenant.KeySpec, wait time.Duration, actor tenant.Actor) (key tenant.Key, created bool, err error) {
	if err := spec.Validate(time.Now()); err != nil {
		return key, false, err
	}
	changed, stop := s.Store.Watch(id)
	defer stop()
	row := func(t tenant.Tenant) (tenant.NewKeyRow, error) { return s.keyRow(t, spec) }
	if key, created, err = s.Store.AddKey(ctx, id, spec, row, actor); err != nil {
		return key, false, err
	}
	began := key.CreatedAt // a key that takes the place of this one has the same time
	err = s.awaitThat(ctx, wait, changed, func() (bool, error) {
		if key.State != tenant.KeyCreating {
			return true, nil
		}
		is, err := s.Store.Key(ctx, id, spec.Name)
		switch {
		case err != nil:
			return false, lostIfNotFound(err)
		case is.CreatedAt.Before(began):
			return false, errLost
		}
		key = is
		return key.State != tenant.KeyCreating, nil
	})
	return key, created, s.committed(ctx, err)
}

// keyRow is the row of a key that is asked for, if the tenant's profile allows it.
func (s *Service) keyRow(t tenant.Tenant, spec tenant.KeySpec) (tenant.NewKeyRow, error) {
	row := tenant.NewKeyRow{ID: newRowID(), Name: spec.Name, Scopes: spec.Scopes}
	profile, ok := s.profiles[t.Profile]
	if !ok {
		return row, tenant.Errorf(tenant.Conflict, "profile_unknown", "the tenant's profile %q is not configured any more", t.Profile)
	}
	for _, scope := range row.Scopes {
		if may, allowed := profile.MayHave(scope); !may {
			return row, &tenant.Error{Kind: tenant.Invalid, Code: "scope_forbidden", Field: "scopes",
				Detail: fmt.Sprintf("the profile %q does not allow %q; it allows: %s", profile.Name, scope, strings.Join(allowed, ", "))}
		}
	}
	if row.Scopes == nil {
		row.Scopes = profile.KeyScopes
		for _, k := range profile.ExtraKeys {
			if k.Name == row.Name {
				row.Scopes = k.Scopes
			}
		}
	}
	return row, nil
}

// RevokeKey ends every key of a name that a tenant has, and waits for wait until none
// of them works upstream.
func (s *Service) RevokeKey(ctx context.Context, id tenant.ID, name string, wait time.Duration, actor tenant.Actor) (tenant.Key, error) {
	changed, stop := s.Store.Watch(id)
	defer stop()
	key, err := s.Store.RevokeKeyNamed(ctx, id, name, actor)
	if err != nil {
		return key, err
	}
	revoked := key.ID
	err = s.awaitThat(ctx, wait, changed, func() (bool, error) {
		if key.State != tenant.KeyRevoking {
			return true, nil
		}
		is, err := s.Store.Key(ctx, id, name)
		switch {
		case err != nil:
			return false, lostIfNotFound(err)
		case is.ID == revoked && isLive(is.State):
			return false, errLost
		}
		key = is
		return key.State != tenant.KeyRevoking, nil
	})
	return key, s.committed(ctx, err)
}

// isLive reports whether a key works or is to work: no key that was revoked is live again.
func isLive(s tenant.KeyState) bool {
	return s == tenant.KeyCreating || s == tenant.KeyActive || s == tenant.KeyRetiring
}

// Rotate begins to replace a key, or finds the rotation of that id, and waits for wait
// until the new key works. It reports tenant.Conflict while another rotation of the
// key is under way.
func (s *Service) Rotate(ctx context.Context, id tenant.ID, n tenant.NewRotation, wait time.Duration, actor tenant.Actor) (r tenant.Rotation, created bool, err error) {
	if err := n.Validate(); err != nil {
		return r, false, err
	}
	n.KeyID = newRowID()
	changed, stop := s.Store.Watch(id)
	defer stop()
	if r, err = s.Store.StartRotation(ctx, id, n, actor); err != nil {
		return r, false, err
	}
	created = r.New.ID == n.KeyID
	err = s.awaitRotation(ctx, &r, wait, changed)
	return r, created, s.committed(ctx, lostIfNotFound(err))
}

// Rotation reads a rotation, and waits for wait until its new key works.
func (s *Service) Rotation(ctx context.Context, id tenant.ID, name, rotation string, wait time.Duration) (tenant.Rotation, error) {
	changed, stop := s.Store.Watch(id)
	defer stop()
	r, err := s.Store.Rotation(ctx, id, name, rotation)
	if err != nil {
		return r, err
	}
	err = s.awaitRotation(ctx, &r, wait, changed)
	return r, err
}

func (s *Service) awaitRotation(ctx context.Context, r *tenant.Rotation, wait time.Duration, changed <-chan struct{}) error {
	return s.awaitThat(ctx, wait, changed, func() (bool, error) {
		if r.State != tenant.RotationCreating {
			return true, nil
		}
		is, err := s.Store.Rotation(ctx, r.TenantID, r.KeyName, r.ID)
		if err == nil {
			*r = is
		}
		return r.State != tenant.RotationCreating, err
	})
}

// ConfirmRotation ends the overlap of a rotation now.
func (s *Service) ConfirmRotation(ctx context.Context, id tenant.ID, name, rotation string, actor tenant.Actor) (tenant.Rotation, error) {
	return s.Store.ConfirmRotation(ctx, id, name, rotation, actor)
}

// Quarantine ends the key that leaked at once and makes its successor, and waits for
// wait until the leaked key is dead and its successor works. For a key without a row, which a
// tenant may have after a restore, Clarifai is asked which app it opens. It reports tenant.NotFound
// for a key that is not ours, and tenant.Unavailable while that is not known.
func (s *Service) Quarantine(ctx context.Context, leaked tenant.Secret, wait time.Duration, actor tenant.Actor) (tenant.Quarantine, error) {
	fingerprint := s.Keyring.Fingerprint(leaked)
	end := time.Now().Add(wait)
	q, err := s.Store.Quarantine(ctx, fingerprint, newRowID(), actor)
	if errors.Is(err, tenant.NotFound) {
		if err := s.quarantineUnknown(ctx, leaked, fingerprint, wait, actor); err != nil {
			return q, err
		}
		q, err = s.Store.Quarantine(ctx, fingerprint, newRowID(), actor)
		err = lostIfNotFound(err) // a worker has written its row
	}
	if err != nil || q.TenantID == "" {
		return q, err
	}
	changed, stop := s.Store.Watch(q.TenantID)
	defer stop()
	err = s.awaitThat(ctx, time.Until(end), changed, func() (bool, error) {
		keys, err := s.Store.Keys(ctx, q.TenantID)
		if err != nil {
			return false, lostIfNotFound(err)
		}
		var found, foundSuccessor bool
		for _, k := range keys {
			switch k.ID {
			case q.Key.ID:
				q.Key, found = k, true
			case q.Successor.ID:
				q.Successor, foundSuccessor = k, true
			}
		}
		if isLive(q.Key.State) || found && !foundSuccessor && q.Successor.ID != uuid.Nil {
			return false, errLost
		}
		return q.Key.State != tenant.KeyRevoking && q.Successor.State != tenant.KeyCreating, nil
	})
	return q, s.committed(ctx, err)
}

// quarantineUnknown lets a worker ask Clarifai which app an unknown key opens, and waits for the
// result. Afterwards the key has a row, or the error is tenant.NotFound.
func (s *Service) quarantineUnknown(ctx context.Context, leaked tenant.Secret, fingerprint []byte, wait time.Duration, actor tenant.Actor) error {
	sealed, err := s.sealed(newRowID(), leaked)
	if err != nil {
		return err
	}
	if err := s.Store.BeginQuarantine(ctx, sealed, actor); err != nil {
		return err
	}
	changed, stop := s.Store.Watch(tenant.UnknownKeyChannel(fingerprint))
	defer stop()
	s.wakeControl()
	var is tenant.UnknownKey
	if err := s.awaitThat(ctx, max(wait, s.CallTimeout), changed, func() (bool, error) {
		is, err = s.Store.QuarantineState(ctx, fingerprint)
		return is.State != tenant.UnknownChecking, lostIfNotFound(err)
	}); err != nil {
		return err
	}
	switch is.State {
	case tenant.UnknownDone:
		return nil
	case tenant.UnknownRefused:
		return tenant.Errorf(tenant.NotFound, "key_not_found", "Tenantry has no such key: %s", is.Problem.Detail)
	}
	detail := "the database does not know this key, and Clarifai has not answered yet which app the key opens; repeat the request"
	if is.Problem != nil && is.Problem.Code == keyAppUnknown {
		detail = is.Problem.Detail
	}
	return &tenant.Error{Kind: tenant.Unavailable, Code: "quarantine_pending", RetryAfter: 5 * time.Second, Detail: detail}
}

// RevealNew opens the secret of a key that has just been made, and writes that it was
// asked for. It reports false for a key that is not active.
func (s *Service) RevealNew(ctx context.Context, id tenant.ID, key tenant.Key, actor tenant.Actor) (secret tenant.Secret, ok bool, err error) {
	if key.State != tenant.KeyActive {
		return secret, false, nil
	}
	key, ciphertext, err := s.Store.RevealKey(ctx, id, key.ID, actor)
	if errors.Is(err, tenant.NotFound) { // it has just been replaced or revoked
		return secret, false, nil
	}
	if err != nil {
		return secret, false, err
	}
	secret, err = s.open(key.ID, ciphertext)
	return secret, err == nil, err
}
