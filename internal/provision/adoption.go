package provision

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"time"

	"github.com/google/uuid"

	"github.com/tenantry/tenantry/internal/tenant"
)

// An Adopted is what came of an adoption. Once it is carried out, or if it was before,
// Tenant is the tenant that has the app; until then only Adoption says how it stands.
type Adopted struct {
	Adoption tenant.Adoption
	Done     bool
	Tenant   tenant.Tenant
	// Created says that the tenant was not there before.
	Created bool
}

// Adopt takes over an app that was made by hand, for a tenant that is made with it, and
// waits for wait until the tenant is active. There is no tenant until a worker has looked
// at the app; one that has the app already is found, and gets the key if the app is
// another's and the key a new one. An adoption that was refused is tried again.
//
// It reports tenant.Invalid for what cannot be, and tenant.Conflict, with the reason for
// its code, for what is refused. Of a dry run it returns that as an adoption that is
// refused.
func (s *Service) Adopt(ctx context.Context, id tenant.ID, what tenant.AdoptRequest, up tenant.SignUp, wait time.Duration, actor tenant.Actor) (Adopted, error) {
	n, err := s.newAdoption(id, what, up)
	if err != nil {
		return Adopted{}, err
	}
	// Watch before writing, so that no wake-up falls between.
	changed, stop := s.Store.Watch(id)
	defer stop()
	a, err := s.adoptNow(ctx, n, up, wait, changed, actor)
	if e, ok := errors.AsType[*tenant.Error](err); ok && e.Kind == tenant.Conflict && n.DryRun {
		a.Done = false
		a.Adoption = tenant.Adoption{TenantID: id, AppID: n.AppID, AppUserID: n.AppUserID, DryRun: true, State: tenant.AdoptionRefused,
			CreatedAt: time.Now(), Problem: &tenant.Problem{Code: e.Code, Detail: e.Detail, Since: time.Now().UTC()}}
		return a, nil
	}
	return a, err
}

// newAdoption checks what is asked for and seals the key.
func (s *Service) newAdoption(id tenant.ID, what tenant.AdoptRequest, up tenant.SignUp) (tenant.NewAdoption, error) {
	n := tenant.NewAdoption{ID: newRowID(), TenantID: id, AppID: what.AppID, AppUserID: what.UserID, Attributes: up.Attributes(), DryRun: what.DryRun,
		ByAdmin: what.ByAdmin}
	if err := what.Validate(); err != nil {
		return n, err
	}
	if err := up.Validate(); err != nil {
		return n, err
	}
	profile, err := s.profileOf(up)
	if err != nil {
		return n, err
	}
	n.Profile = profile.Name
	if n.AppUserID == s.Deployment.Operator {
		n.AppUserID = ""
	}
	if n.AppUserID != "" && !what.Key.IsSet() {
		return n, &tenant.Error{Kind: tenant.Invalid, Code: "adopt_key_required", Field: "adopt.key",
			Detail: "is missing: the app belongs to another Clarifai user than the operator, and Clarifai lets only the owner of an app make keys of it; give one that the owner has made"}
	}
	if what.Key.IsSet() {
		n.Key, err = s.sealed(n.ID, what.Key)
	}
	return n, err
}

func (s *Service) adoptNow(ctx context.Context, n tenant.NewAdoption, up tenant.SignUp, wait time.Duration, changed <-chan struct{}, actor tenant.Actor) (Adopted, error) {
	var a Adopted
	b, err := s.Store.BeginAdoption(ctx, n, func(t tenant.Tenant, first []byte) error { return adoptionAgrees(n, up, t, first) }, actor)
	if err != nil {
		return a, err
	}
	a.Adoption, a.Done = b.Adoption, b.Adoption.ID == uuid.Nil
	err = s.awaitThat(ctx, max(wait, 1), changed, func() (bool, error) { // looks at least once
		if !a.Done {
			is, err := s.Store.Adoption(ctx, b.Adoption.ID)
			if !errors.Is(err, tenant.NotFound) {
				if err == nil {
					a.Adoption = is
				}
				return a.Adoption.State != tenant.AdoptionChecking, err
			}
			a.Done, a.Created = true, b.Tenant.ID == "" // or it was replaced by another
		}
		a.Tenant, err = s.Store.Tenant(ctx, n.TenantID)
		return err == nil && (n.DryRun || a.Tenant.Settled()), err
	})
	switch {
	case errors.Is(err, tenant.NotFound):
		if replaced, err := s.Store.HasAdoption(ctx, n.TenantID, n.DryRun); err != nil || !replaced {
			return a, cmp.Or(err, error(errLost))
		}
		return a, tenant.Errorf(tenant.Conflict, "adoption_replaced", "another adoption by this tenant was asked for meanwhile: say which is meant")
	case err != nil && b.Adoption.ID != uuid.Nil: // it has begun
		return Adopted{Adoption: b.Adoption}, s.committed(ctx, err)
	case err != nil:
		return a, err
	case a.Done && (a.Tenant.AppID != n.AppID || a.Tenant.AppUserID != n.AppUserID):
		return a, tenant.ErrTenantTaken(n.TenantID, a.Tenant.AppID, a.Tenant.State)
	case a.Done:
		return a, nil
	case a.Adoption.State == tenant.AdoptionRefused && !n.DryRun:
		return a, tenant.Errorf(tenant.Conflict, a.Adoption.Problem.Code, "%s", a.Adoption.Problem.Detail)
	}
	return a, nil
}

// adoptionAgrees reports tenant.Conflict if the tenant that is there has another app
// than the one to be adopted, or other attributes.
func adoptionAgrees(n tenant.NewAdoption, up tenant.SignUp, t tenant.Tenant, first []byte) error {
	if t.AppID != n.AppID || t.AppUserID != n.AppUserID {
		return tenant.ErrTenantTaken(n.TenantID, t.AppID, t.State)
	}
	return agrees(up, t, first)
}

// workAdoption looks at an app that is to be taken over, and carries the adoption out if nothing
// speaks against it.
func (s *Service) workAdoption(ctx context.Context, a tenant.LeasedAdoption) error {
	err := s.carryOut(ctx, a)
	refusal, ok := errors.AsType[*tenant.Error](err)
	if !ok || refusal.Kind != tenant.Conflict {
		return err
	}
	problem := &tenant.Problem{Code: refusal.Code, Detail: refusal.Detail, Since: time.Now().UTC()}
	if up := asUpstream(refusal.Err); up != nil {
		problem.UpstreamCode, problem.UpstreamRequestID = up.Code, up.RequestID
	}
	return cmp.Or(s.Store.EndAdoption(ctx, a, tenant.AdoptionRefused, problem, requesterOf(ctx, a)), errGivenUp)
}

// requesterOf is who asked for an adoption, with the upstream call that ended it.
func requesterOf(ctx context.Context, a tenant.LeasedAdoption) tenant.Actor {
	of := a.RequestedBy
	of.UpstreamRequestID = tenant.LastUpstreamRequest(ctx)
	return of
}

// refuse is why an adoption is not carried out; up is the answer that says so, or nil.
func refuse(up error, code, format string, args ...any) error {
	e := tenant.Errorf(tenant.Conflict, code, format, args...)
	e.Err = up
	return e
}

// carryOut checks a leased adoption and, unless it is a dry run, gives the app to the
// tenant. It asks Clarifai and changes nothing there: the marker and the key follow once
// the rows say whose the app is. A refusal is a tenant.Conflict.
func (s *Service) carryOut(ctx context.Context, a tenant.LeasedAdoption) error {
	profile, ok := s.profiles[a.Profile]
	if !ok { // it is known to replicas that were started with another file
		return &deferred{wait: s.BackoffBase}
	}
	marker, err := s.checkAdoptable(ctx, a)
	if err != nil {
		return err
	}
	if a.AppUserID != "" && !a.ByAdmin {
		recovery, err := s.Store.Recovery(ctx)
		if err != nil {
			return err
		}
		if recovery.Active() {
			return refuse(nil, "adopt_admin_required",
				"the database is in recovery mode, and an app that is shared with the operator has no ownership tag: an admin must adopt it")
		}
	}
	key, scopes := tenant.SealedKey{}, profile.KeyScopes
	if a.Ciphertext != nil {
		if key, scopes, err = s.checkGivenKey(ctx, a, marker != nil); err != nil {
			return err
		}
	}
	if a.DryRun {
		return s.Store.EndAdoption(ctx, a, tenant.AdoptionPossible, nil, requesterOf(ctx, a))
	}
	if a.AppUserID == "" {
		if free, err := s.Store.ReserveAdoption(ctx, a); err != nil {
			return err
		} else if !free {
			return &deferred{wait: s.BackoffBase}
		}
		// Another adoption may have written its own tag before the reservation.
		if marker, err = s.checkAdoptable(ctx, a); err != nil {
			return err
		}
		if err := s.tagAdopted(ctx, a, marker); err != nil {
			return err
		}
	}
	return s.Store.HoldAdopted(ctx, a, key, scopes, requesterOf(ctx, a))
}

// tagAdopted writes the ownership tag of an app before the tenant gets the app: if the rows are lost
// afterwards, the tag names the tenant.
func (s *Service) tagAdopted(ctx context.Context, a tenant.LeasedAdoption, was *tenant.Marker) error {
	generation := 1
	t, err := s.Store.Tenant(ctx, a.TenantID)
	switch {
	case err == nil && t.State == tenant.Deleted:
		generation = t.Generation + 1
	case err == nil && t.AppID == a.AppID:
		generation = t.Generation
	case err != nil && !errors.Is(err, tenant.NotFound):
		return err
	}
	marker := s.markerOf(tenant.App{ID: a.AppID, Profile: a.Profile})
	if was != nil {
		marker.Tenant = was.Tenant
	}
	if !s.SkipMarks {
		if marker.Tenant, err = s.Keyring.SealOwner(a.AppID, tenant.AppOwner{Tenant: a.TenantID, Generation: generation, Profile: a.Profile}); err != nil {
			return err
		}
	}
	return s.call(ctx, interactive, func(ctx context.Context) error { return s.Upstream.MarkApp(ctx, a.AppID, marker, "") })
}

// checkAdoptable checks that the app exists and belongs to no other tenant, and returns its ownership
// tag. An app of this deployment needs its key as a proof, or an admin.
func (s *Service) checkAdoptable(ctx context.Context, a tenant.LeasedAdoption) (*tenant.Marker, error) {
	app, err := s.lookAtAdoptable(ctx, a)
	if err != nil || app.Marker == nil || a.AppUserID != "" {
		return nil, err
	}
	switch owner := s.ownerOf(*app.Marker); {
	case app.Marker.Tenant != "" && owner.Tenant != a.TenantID:
		return nil, refuse(nil, "adopt_app_contested", "the ownership tag of the app names another tenant: see `tenantry recover show`")
	case a.Ciphertext == nil && !a.ByAdmin && !a.Reserved: // or this adoption wrote the tag
		return nil, refuse(nil, "adopt_proof_required",
			"Tenantry created the app, and another tenant may have had it: send the app's key as a proof, or let an admin adopt the app")
	}
	return app.Marker, nil
}

func (s *Service) lookAtAdoptable(ctx context.Context, a tenant.LeasedAdoption) (tenant.UpstreamApp, error) {
	var app tenant.UpstreamApp
	err := s.call(ctx, interactive, func(ctx context.Context) (err error) {
		app, err = s.Upstream.AppOf(ctx, a.AppUserID, a.AppID)
		return err
	})
	up, marker := asUpstream(err), app.Marker
	switch {
	case err == nil && (marker == nil || marker.Deployment == s.Deployment.ID && marker.Control == nil):
		return app, nil
	case err == nil:
		return app, refuse(nil, "adopt_foreign_marker",
			"the app has the ownership tag of another Tenantry deployment (%.32q), and belongs or belonged to one of its tenants", marker.Deployment)
	case up == nil:
		return app, err
	case up.Class == tenant.UpstreamNotFound && a.Attempts == 0:
		return app, err // one response is not enough: the app may be young
	case up.Class == tenant.UpstreamNotFound && a.AppUserID != "":
		return app, refuse(err, "adopt_app_unknown", "Clarifai has no app %s of the user %s, or it is not shared with the operator: %s", a.AppID, a.AppUserID, up.Detail)
	case up.Class == tenant.UpstreamNotFound:
		return app, refuse(err, "adopt_app_unknown", "Clarifai has no app %s in the operator's account: %s", a.AppID, up.Detail)
	case up.Moved || up.Class == tenant.UpstreamRefused:
		return app, refuse(err, "adopt_app_unknown", "Clarifai does not show the app %s: %s", a.AppID, up.Detail)
	case up.Class == tenant.UpstreamForbidden && a.AppUserID != "":
		return app, refuse(err, "adopt_app_forbidden", "the app %s is not shared in a way that lets the operator's PAT read it: %s", a.AppID, up.Detail)
	}
	return app, err
}

// checkGivenKey asks Clarifai which app the key of an adoption opens, and seals it anew:
// the keyset may have changed since.
//
// If the app is ours, the key may be too: it keeps the id that its description names.
func (s *Service) checkGivenKey(ctx context.Context, a tenant.LeasedAdoption, ours bool) (key tenant.SealedKey, scopes []string, err error) {
	secret, err := s.Keyring.Open(a.ID, a.Ciphertext)
	if err != nil {
		return key, nil, err
	}
	opened, err := s.opens(ctx, interactive, secret)
	up := asUpstream(err)
	owner := a.AppUserID
	if owner == "" {
		owner = s.Deployment.Operator
	}
	switch {
	case up != nil && up.Class == tenant.UpstreamNotFound && a.Attempts == 0:
		return key, nil, err
	case up != nil && up.Class == tenant.UpstreamNotFound:
		return key, nil, refuse(err, "adopt_key_refused", "Clarifai does not take the key: %s", up.Detail)
	case up != nil && (up.Class == tenant.UpstreamRefused || up.Class == tenant.UpstreamForbidden):
		return key, nil, refuse(err, "adopt_key_refused", "Clarifai does not say what the key opens: %s", up.Detail)
	case err != nil:
		return key, nil, err
	case opened.AppID == "":
		return key, nil, refuse(nil, "adopt_key_wrong_app", "what was given for a key opens no single app: it is no app-specific key")
	case opened.AppID != a.AppID || opened.UserID != "" && opened.UserID != owner:
		return key, nil, refuse(nil, "adopt_key_wrong_app", "the key opens the app %s of %s, not %s of %s", opened.AppID, opened.UserID, a.AppID, owner)
	}
	if a.AppUserID == "" {
		// A key that somebody else's account made of the operator's app can be neither
		// listed nor deleted with the operator's PAT.
		err = s.call(ctx, interactive, func(ctx context.Context) error { return s.Upstream.KeyExists(ctx, secret) })
		if tenant.ClassOf(err) == tenant.UpstreamNotFound && a.Attempts > 0 {
			return key, nil, refuse(err, "adopt_key_not_ours",
				"the key works, and is not among the operator's: Tenantry could never revoke it; leave it out, and one is made")
		}
		if err != nil {
			return key, nil, err
		}
	}
	if key, err = s.sealed(a.ID, secret); err != nil || !ours {
		return key, opened.Scopes, err
	}
	found, err := s.foundKeys(ctx, interactive, a.AppID)
	for _, k := range found {
		if bytes.Equal(k.Fingerprint, key.Fingerprint) {
			key = k.SealedKey
		}
	}
	return key, opened.Scopes, err
}

// opens asks Clarifai which app a key opens. The error is tenant.UpstreamNotFound for a
// key that is dead.
func (s *Service) opens(ctx context.Context, p tenant.Priority, key tenant.Secret) (opened tenant.OpenedApp, err error) {
	err = s.call(ctx, p, func(ctx context.Context) (err error) {
		opened, err = s.Upstream.Opens(ctx, key)
		return err
	})
	return opened, err
}

// letGo ends the purge of an app that is shared with the operator.
func (s *Service) letGo(ctx context.Context, a tenant.App) error {
	return s.Store.AppDeleted(ctx, a, workerOf(ctx))
}

// leaveUnmarked ends the tending of an app that is shared with the operator.
func (s *Service) leaveUnmarked(ctx context.Context, a tenant.App) error {
	return s.Store.AppMarked(ctx, a)
}

// A standing is a problem that only somebody else can remove.
type standing struct{ problem tenant.Problem }

func (e *standing) Error() string { return e.problem.Detail }
