package provision

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/tenant"
)

// StartReport begins to compare Clarifai with Postgres. Nothing is changed. It
// reports tenant.Conflict while a reconciliation runs.
func (s *Service) StartReport(ctx context.Context, actor tenant.Actor) (tenant.Reconciliation, error) {
	id, err := uuid.NewV7()
	if err != nil {
		return tenant.Reconciliation{}, err
	}
	return s.Store.StartReport(ctx, id, actor)
}

// StartRepair starts a repair of the report that a token names, without the findings that wait for
// a decision. It reports tenant.Conflict for a stale or unknown token, while a reconciliation runs,
// and in recovery mode.
func (s *Service) StartRepair(ctx context.Context, token string, actor tenant.Actor) (tenant.Reconciliation, error) {
	id, err := uuid.NewV7()
	if err != nil {
		return tenant.Reconciliation{}, err
	}
	return s.Store.StartRepair(ctx, id, token, actor)
}

// workReconciliation takes a leased reconciliation as far as the time allows. Each step is recorded, so
// that any replica can take the next.
func (s *Service) workReconciliation(ctx context.Context, r *tenant.Reconciliation) error {
	for !r.Done {
		if s.patience(ctx) < s.CallTimeout {
			return &deferred{}
		}
		var err error
		if *r, err = s.reconcile(ctx, *r); err != nil {
			return err
		}
	}
	return nil
}

// reconcile takes one step, and returns the reconciliation as it stands then.
func (s *Service) reconcile(ctx context.Context, r tenant.Reconciliation) (tenant.Reconciliation, error) {
	var err error
	switch r.Phase {
	case tenant.ListingApps:
		err = s.listApps(ctx, r)
	case tenant.ListingKeys:
		err = s.listKeys(ctx, r)
	case tenant.Comparing:
		err = s.Store.Compare(ctx, r)
	case tenant.Confirming:
		err = s.confirmNext(ctx, r)
	case tenant.Repairing:
		err = s.repairNext(ctx, r)
	case tenant.Ending:
		return s.endReconciliation(ctx, r)
	default:
		err = fmt.Errorf("reconciliation %s is in the unknown phase %q", r.ID, r.Phase)
	}
	if err != nil {
		return r, err
	}
	next, err := s.Store.Reconciliation(ctx, r.ID)
	if err == nil && !next.LeasedUntil.Equal(r.LeasedUntil) {
		return r, tenant.ErrLeaseLost
	}
	return next, err
}

func (s *Service) listApps(ctx context.Context, r tenant.Reconciliation) error {
	recovery, err := s.Store.Recovery(ctx)
	if err != nil {
		return err
	}
	var apps []tenant.UpstreamApp
	err = s.call(ctx, background, func(ctx context.Context) (err error) {
		apps, err = s.Upstream.Apps(ctx, tenant.Page{Number: r.Page, Size: r.PerPage, Counts: recovery.Active()})
		return err
	})
	if err != nil {
		return s.smallerPages(ctx, r, err)
	}
	listed := make([]tenant.ListedApp, 0, len(apps))
	for _, a := range apps {
		l := tenant.ListedApp{ID: a.ID, Inputs: a.Inputs}
		if a.Marker != nil && a.Marker.Deployment == s.Deployment.ID {
			if a.Marker.Control != nil {
				continue
			}
			l.Marker, l.Owner = a.Marker.App, s.ownerOf(*a.Marker)
		}
		listed = append(listed, l)
	}
	return s.Store.SawApps(ctx, r, listed, len(apps) == 0)
}

// smallerPages continues a list in smaller pages if a page came too late or was too large. It
// returns the failure. After any other failure pages keep their size, since they never grow again.
func (s *Service) smallerPages(ctx context.Context, r tenant.Reconciliation, failed error) error {
	if up := asUpstream(failed); up == nil || !up.TooMuch || ctx.Err() != nil {
		return failed
	}
	recording, cancel := context.WithTimeout(context.WithoutCancel(ctx), recordTimeout)
	defer cancel()
	smaller, err := s.Store.SmallerPages(recording, r)
	if err == nil && smaller {
		s.Log.Warn("listing failed; reading smaller pages", zap.Stringer("reconciliation", r.ID), zap.Int("per_page", r.PerPage), zap.Error(failed))
	}
	return errors.Join(failed, err)
}

// ownerOf opens the tenant in a marker of ours. A seal that cannot be opened names
// nobody: a marker can be edited by whoever holds a PAT.
func (s *Service) ownerOf(m tenant.Marker) tenant.AppOwner {
	if m.Tenant == "" {
		return tenant.AppOwner{}
	}
	owner, err := s.Keyring.OpenOwner(m.App, m.Tenant)
	if err != nil {
		s.Log.Warn("the tenant in an app's marker cannot be read", zap.String("app", string(m.App)), zap.Error(err))
		return tenant.AppOwner{}
	}
	return owner
}

func (s *Service) listKeys(ctx context.Context, r tenant.Reconciliation) error {
	var keys []tenant.UpstreamKey
	err := s.call(ctx, background, func(ctx context.Context) (err error) {
		keys, err = s.Upstream.Keys(ctx, tenant.Page{Number: r.Page, Size: r.PerPage})
		return err
	})
	if err != nil {
		return s.smallerPages(ctx, r, err)
	}
	listed := make([]tenant.ListedKey, len(keys))
	for i, k := range keys {
		listed[i] = tenant.ListedKey{AppID: k.AppID, KeyID: s.keyIDOf(k), Scopes: k.Scopes}
		if k.Scopes == nil {
			listed[i].Scopes = []string{}
		}
		if k.Secret.IsSet() {
			listed[i].Fingerprint = s.Keyring.Fingerprint(k.Secret)
		}
	}
	return s.Store.SawKeys(ctx, r, listed)
}

// keyIDOf returns the row that a key's marker names, or zero if it is not ours.
func (s *Service) keyIDOf(k tenant.UpstreamKey) uuid.UUID {
	if m, ok := tenant.ParseKeyMarker(k.Description); ok && m.Deployment == s.Deployment.ID {
		return m.KeyID
	}
	return uuid.Nil
}

// confirmNext looks for the next thing that was not listed: paging passes entries
// over, and 'gone' is believed only if Clarifai says it of the thing itself.
func (s *Service) confirmNext(ctx context.Context, r tenant.Reconciliation) error {
	f, err := s.Store.NextFinding(ctx, r, tenant.FindingDoubted)
	if errors.Is(err, tenant.NotFound) {
		return s.Store.TurnTo(ctx, r, tenant.Ending)
	}
	if err != nil {
		return err
	}
	exists := false
	if f.Kind == tenant.FoundKeyGone {
		exists, err = s.keyExists(ctx, f)
	} else {
		exists, err = s.lookFor(ctx, &f)
	}
	if err != nil {
		return err
	}
	if exists == (f.Kind == tenant.FoundAppAlive || f.Kind == tenant.FoundAppRenamed) {
		return s.Store.ConfirmFinding(ctx, r, f)
	}
	return s.Store.DropFinding(ctx, r, f)
}

// lookFor looks for a finding's app. One that has moved becomes another finding.
func (s *Service) lookFor(ctx context.Context, f *tenant.Finding) (exists bool, err error) {
	_, err = s.look(ctx, background, f.AppID)
	up := asUpstream(err)
	switch {
	case err == nil:
		return true, nil
	case up == nil:
		return false, err
	case up.Class == tenant.UpstreamNotFound:
		return false, nil
	case up.Moved:
		f.Kind, f.Action, f.Detail = tenant.FoundAppRenamed, "", up.Detail
		return true, nil
	}
	return false, err
}

func (s *Service) keyExists(ctx context.Context, f tenant.Finding) (bool, error) {
	secret, _, err := s.secretOf(ctx, f)
	if errors.Is(err, tenant.NotFound) { // revoked meanwhile
		return true, nil
	}
	if err != nil {
		return false, err
	}
	err = s.call(ctx, background, func(ctx context.Context) error { return s.Upstream.KeyExists(ctx, secret) })
	if tenant.ClassOf(err) != tenant.UpstreamNotFound {
		return err == nil, err
	}
	// The PAT may have lost access to a key that works.
	switch _, err = s.opens(ctx, background, secret); tenant.ClassOf(err) {
	case tenant.UpstreamNotFound:
		return false, nil
	case tenant.UpstreamForbidden:
		return true, nil
	}
	return err == nil, err
}

func (s *Service) secretOf(ctx context.Context, f tenant.Finding) (tenant.Secret, []string, error) {
	sealed, scopes, err := s.Store.KeyOf(ctx, f)
	if err != nil {
		return tenant.Secret{}, nil, err
	}
	secret, err := s.Keyring.Open(sealed.ID, sealed.Ciphertext)
	return secret, scopes, err
}

func (s *Service) endReconciliation(ctx context.Context, r tenant.Reconciliation) (tenant.Reconciliation, error) {
	was, is, err := s.Store.EndReconciliation(ctx, r)
	if err != nil {
		return r, err
	}
	r.Done = true
	if was.State != is.State {
		s.logRecovery(is)
	}
	kinds, states, err := s.Store.CountFindings(ctx, r)
	if err != nil {
		s.Log.Warn("count findings", zap.Error(err))
		return r, nil
	}
	s.Log.Info("reconciliation done", zap.Stringer("reconciliation", r.ID), zap.String("kind", string(r.Kind)),
		zap.Int("apps", r.AppsSeen), zap.Int("keys", r.KeysSeen), zap.Any("findings", kinds), zap.Any("states", states))
	return r, nil
}

// repairNext carries out the next finding of a report, or the next decision, after another check at
// Clarifai. In recovery mode it carries out decisions only.
func (s *Service) repairNext(ctx context.Context, r tenant.Reconciliation) error {
	state := tenant.FindingOpen
	if r.Decisions {
		state = tenant.FindingDecided
	}
	f, err := s.Store.NextFinding(ctx, r, state)
	if errors.Is(err, tenant.NotFound) {
		return s.Store.TurnTo(ctx, r, tenant.Ending)
	}
	if err != nil {
		return err
	}
	if !r.Decisions {
		recovery, err := s.Store.Recovery(ctx)
		if err != nil {
			return err
		}
		if recovery.Active() {
			return s.Store.EndFinding(ctx, r, f, tenant.FindingSkipped, "no repairs in recovery mode")
		}
	}
	switch f.Action {
	case tenant.Remove, tenant.Revoke:
		n, until, err := s.Store.RemovalsInLastHour(ctx)
		if err != nil {
			return err
		}
		if n >= s.RemovalCap {
			return cmp.Or(s.Store.SetBack(ctx, r.Lease(), tenant.Setback{Delay: until, Problem: tenant.Problem{Code: "removal_cap",
				Detail: fmt.Sprintf("%d removals in an hour are allowed, and were made", s.RemovalCap), Since: time.Now().UTC()}}), errGivenUp)
		}
	}
	err = s.repair(tenant.WithUpstreamTrace(ctx), r, f)
	if e, ok := errors.AsType[*tenant.Error](err); ok && e.Kind == tenant.Conflict {
		return s.Store.EndFinding(ctx, r, f, tenant.FindingFailed, e.Detail)
	}
	// Only one reconciliation runs at a time: a finding whose repair always fails would stop all reports.
	up := asUpstream(err)
	_, isDeferred := errors.AsType[*deferred](err)
	why := ""
	switch {
	case up != nil && (up.Class == tenant.UpstreamRefused || up.Class == tenant.UpstreamForbidden || up.Class == tenant.UpstreamNotFound):
		why = up.Error()
	case err == nil || up != nil || isDeferred || errors.Is(err, tenant.ErrLeaseLost) || ctx.Err() != nil || r.Attempts < maxContradictions:
		return err
	default:
		s.Log.Error("repair given up", zap.Int64("finding", f.Number), zap.Error(err))
		why = "Tenantry or its database failed; the log of its replicas says how"
	}
	return s.Store.EndFinding(ctx, r, f, tenant.FindingFailed, why)
}

func (s *Service) repair(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error {
	skip := func(why string) error { return s.Store.EndFinding(ctx, r, f, tenant.FindingSkipped, why) }
	switch f.Action {
	case tenant.Adopt:
		if f.Kind == tenant.FoundKeyUnknown {
			return s.adoptKey(ctx, r, f)
		}
		return s.adopt(ctx, r, f)
	case tenant.ResumeTenant:
		return s.adoptKey(ctx, r, f)
	case tenant.EndUnknownKey:
		key, found, err := s.findUnknown(ctx, f)
		if err != nil || !found {
			return errors.Join(err, s.skipUnless(err, skip, "it is gone"))
		}
		return s.Store.EndFoundKey(ctx, r, f, key)
	case tenant.SuspendTenant:
		return s.Store.SuspendDecided(ctx, r, f)
	case tenant.RestoreTenant:
		return s.Store.RestoreDecided(ctx, r, f)
	case tenant.RemoveContested:
		return s.Store.RemovalDecided(ctx, r, f)
	case tenant.OverwriteTag:
		return s.overwriteTag(ctx, r, f)
	case tenant.Remove:
		ours, err := s.look(ctx, background, f.AppID)
		switch {
		case tenant.ClassOf(err) == tenant.UpstreamNotFound:
			return skip("it is gone")
		case err != nil:
			return err
		case !ours:
			return skip("the app does not have our ownership tag")
		}
		return s.Store.RemoveApp(ctx, r, f)
	case tenant.Revoke:
		key, found, err := s.findKey(ctx, background, f.AppID, f.KeyID)
		switch {
		case err != nil && tenant.ClassOf(err) != tenant.UpstreamNotFound:
			return err
		case !found:
			return skip("it is gone")
		case !key.Secret.IsSet():
			return s.Store.EndFinding(ctx, r, f, tenant.FindingFailed, "the listing hides its secret")
		}
		sealed, err := s.sealed(f.KeyID, key.Secret)
		if err != nil {
			return err
		}
		return s.Store.RevokeKey(ctx, r, f, sealed)
	case tenant.Rebuild, tenant.MakeApp, tenant.Forget:
		if f.Kind == tenant.FoundAppGone {
			if exists, err := s.lookFor(ctx, &f); err != nil || exists {
				return errors.Join(err, s.skipUnless(err, skip, "it is there"))
			}
			return s.Store.ForgetApp(ctx, r, f)
		}
		if exists, err := s.keyExists(ctx, f); err != nil || exists {
			return errors.Join(err, s.skipUnless(err, skip, "it is there"))
		}
		return s.Store.DiscardApp(ctx, r, f)
	case tenant.Remake, tenant.MakeKey:
		if f.Kind == tenant.FoundKeyGone {
			if exists, err := s.keyExists(ctx, f); err != nil || exists {
				return errors.Join(err, s.skipUnless(err, skip, "it is there"))
			}
		}
		id, err := uuid.NewV7()
		if err != nil {
			return err
		}
		return s.Store.RemakeKey(ctx, r, f, tenant.NewKeyRow{ID: id})
	case tenant.Rescope:
		secret, scopes, err := s.secretOf(ctx, f)
		if errors.Is(err, tenant.NotFound) {
			return skip("it works no longer")
		}
		if err != nil {
			return err
		}
		if err := s.call(ctx, background, func(ctx context.Context) error { return s.Upstream.SetKeyScopes(ctx, secret, scopes) }); err != nil {
			return err
		}
		return s.Store.KeyRescoped(ctx, r, f)
	case tenant.Mark:
		return s.Store.MarkAgain(ctx, r, f)
	}
	return fmt.Errorf("finding %d has the unknown action %q", f.Number, f.Action)
}

// skipUnless skips a finding unless it failed.
func (s *Service) skipUnless(failed error, skip func(string) error, why string) error {
	if failed != nil {
		return nil
	}
	return skip(why)
}

func (s *Service) sealed(id uuid.UUID, secret tenant.Secret) (tenant.SealedKey, error) {
	ciphertext, err := s.Keyring.Seal(id, secret)
	return tenant.SealedKey{ID: id, Ciphertext: ciphertext, Fingerprint: s.Keyring.Fingerprint(secret), Hint: s.Keyring.Hint(secret)}, err
}

// adopt records an app that the database does not know, or only in part: with the tenant in its
// ownership tag, and with our live keys.
func (s *Service) adopt(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error {
	app, err := s.lookAt(ctx, background, f.AppID)
	switch {
	case tenant.ClassOf(err) == tenant.UpstreamNotFound:
		return s.Store.EndFinding(ctx, r, f, tenant.FindingSkipped, "it is gone")
	case err != nil:
		return err
	case !app.Marker.Owns(s.Deployment.ID, f.AppID):
		return s.Store.EndFinding(ctx, r, f, tenant.FindingSkipped, "the app does not have our ownership tag")
	}
	a := tenant.AdoptedApp{ID: f.AppID, Owner: s.ownerOf(*app.Marker)}
	if a.Owner.Tenant == "" {
		return s.Store.EndFinding(ctx, r, f, tenant.FindingFailed, "the tenant in the ownership tag cannot be decrypted with this keyset")
	}
	a.Profile = cmp.Or(a.Owner.Profile, app.Marker.Profile, tenant.DefaultProfile)
	a.Owner.Profile = a.Profile
	if app.Marker.PurgeAfter != "" {
		if a.PurgeAfter, err = time.Parse(time.RFC3339Nano, app.Marker.PurgeAfter); err != nil {
			return s.Store.EndFinding(ctx, r, f, tenant.FindingFailed, "the ownership tag does not say when the app is to be removed")
		}
	}
	found, err := s.foundKeys(ctx, background, f.AppID)
	if err != nil {
		return err
	}
	for _, k := range found {
		if k.Ciphertext != nil {
			alive, err := s.keyOpens(ctx, k.SealedKey, f.AppID)
			if err != nil {
				return err
			}
			if !alive {
				continue
			}
		}
		a.Keys = append(a.Keys, k)
	}
	scopes := []string{tenant.ScopeAll}
	if p, ok := s.profiles[a.Profile]; ok {
		scopes = p.KeyScopes
	}
	a.NewKey = tenant.NewKeyRow{ID: newRowID(), Name: tenant.DefaultKey, Scopes: scopes}
	return s.Store.AdoptApp(ctx, r, f, a)
}

// keyOpens asks Clarifai whether a key opens an app.
func (s *Service) keyOpens(ctx context.Context, key tenant.SealedKey, app tenant.AppID) (bool, error) {
	secret, err := s.Keyring.Open(key.ID, key.Ciphertext)
	if err != nil {
		return false, err
	}
	opened, err := s.opens(ctx, background, secret)
	switch tenant.ClassOf(err) {
	case tenant.UpstreamNotFound:
		return false, nil
	case tenant.UpstreamForbidden: // its scopes do not allow it to read its app
		return true, nil
	}
	return err == nil && opened.AppID == app, err
}

// findUnknown finds the key of a finding at Clarifai.
func (s *Service) findUnknown(ctx context.Context, f tenant.Finding) (key tenant.AdoptedKey, found bool, err error) {
	keys, err := s.foundKeys(ctx, background, f.AppID)
	if tenant.ClassOf(err) == tenant.UpstreamNotFound {
		return key, false, nil
	}
	for _, k := range keys {
		if k.ID == f.KeyID {
			return k, true, err
		}
	}
	return key, false, err
}

func (s *Service) adoptKey(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error {
	key, found, err := s.findUnknown(ctx, f)
	switch {
	case err != nil:
		return err
	case !found:
		return s.Store.EndFinding(ctx, r, f, tenant.FindingSkipped, "it is gone")
	case key.Ciphertext == nil:
		return s.Store.EndFinding(ctx, r, f, tenant.FindingFailed, "the listing hides the secret of the key: end this key, and create a new one")
	}
	if alive, err := s.keyOpens(ctx, key.SealedKey, f.AppID); err != nil {
		return err
	} else if !alive {
		return s.Store.EndFinding(ctx, r, f, tenant.FindingSkipped, "the key is dead")
	}
	known, err := s.Store.KeysOfApp(ctx, f.AppID)
	if err != nil {
		return err
	}
	var dead []uuid.UUID
	for _, k := range known {
		alive, err := s.keyOpens(ctx, k, f.AppID)
		if err != nil {
			return err
		}
		if !alive {
			dead = append(dead, k.ID)
		}
	}
	return s.Store.AdoptFoundKey(ctx, r, f, key, dead)
}

// overwriteTag writes the tenant of the row into the ownership tag of a contested app.
func (s *Service) overwriteTag(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error {
	t, err := s.Store.Tenant(ctx, f.TenantID)
	if err != nil {
		return err
	}
	if t.AppID != f.AppID {
		return s.Store.EndFinding(ctx, r, f, tenant.FindingSkipped, "the tenant does not hold the app any more")
	}
	sealed, err := s.Keyring.SealOwner(f.AppID, tenant.AppOwner{Tenant: t.ID, Generation: t.Generation, Profile: t.Profile})
	if err != nil {
		return err
	}
	marker := s.markerOf(tenant.App{ID: f.AppID, Profile: t.Profile})
	marker.Tenant = sealed
	if err := s.call(ctx, background, func(ctx context.Context) error { return s.Upstream.MarkApp(ctx, f.AppID, marker, "") }); err != nil {
		return err
	}
	return s.Store.OwnerDecided(ctx, r, f)
}
