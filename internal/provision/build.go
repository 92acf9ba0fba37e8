package provision

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/tenant"
)

// CallsPerBuild is how many upstream calls a build takes that meets no trouble.
const CallsPerBuild = 2

// How often an upstream that contradicts itself is asked again before a build is
// given up: what was just made may take a moment to show.
const maxContradictions = 5

// workApp does what the row of a leased app says is next.
func (s *Service) workApp(ctx context.Context, a *tenant.App) error {
	switch a.State {
	case tenant.AppPurging:
		return s.purge(ctx, *a)
	case tenant.AppRetained:
		if a.EndUnknownKeys || !a.RemovalConfirmed && a.UserID == "" && (a.Tagging || !a.TaggedPurgeAfter.Equal(a.PurgeAfter)) {
			return s.tend(ctx, a)
		}
		return s.purge(ctx, *a)
	case tenant.AppHeld:
		return s.tend(ctx, a)
	case tenant.AppReady:
		return s.prove(ctx, *a)
	}
	return s.build(ctx, a)
}

// Clarifai's names of the calls that make something.
const (
	callCreateApp = "PostApps"
	callCreateKey = "PostKeys"
)

// build takes an app from where it stands to ready. It may be repeated from any
// point: an earlier try may have made the app or the key and died before it could
// say so.
func (s *Service) build(ctx context.Context, a *tenant.App) error {
	began := time.Now()
	profile, ok := s.profiles[a.Profile]
	switch {
	case !ok && (a.Wanted || a.WantedLater): // it is known to replicas that were started with another file
		return &deferred{wait: s.BackoffBase}
	case !ok:
		return s.abandon(ctx, *a, true, "its profile is gone")
	}
	if a.ForPool && !a.Made && profile.Pools() && a.PoolRevision != "" && a.PoolRevision != profile.Revision() {
		// It is for replicas that were started with another file: made here, it would be
		// one that the pool does not want.
		return &deferred{wait: s.BackoffBase}
	}
	if !a.Made {
		if !a.InDoubt { // or it may have been made of what the profile was
			a.Revision = profile.Revision()
		}
		if err := s.makeApp(ctx, a, profile); err != nil {
			return err
		}
		if err := s.Store.AppMade(ctx, *a); err != nil {
			return err
		}
	}
	secret, err := s.makeKey(ctx, a, profile)
	if err != nil {
		return err
	}
	sealed, err := s.sealed(a.Creating.ID, secret)
	if err != nil {
		return err
	}
	err = s.Store.FinishBuild(ctx, *a, tenant.BuildEnd{
		Key:  sealed,
		Next: s.nextBuilds(profile, 1),
	}, workerOf(ctx))
	if err == nil {
		s.Metrics.buildSeconds.Observe(time.Since(began).Seconds())
	}
	return err
}

// makeApp makes sure that the app exists upstream and is ours.
func (s *Service) makeApp(ctx context.Context, a *tenant.App, profile tenant.Profile) error {
	if a.InDoubt {
		if err := s.isMade(ctx, a); tenant.ClassOf(err) != tenant.UpstreamNotFound {
			return err
		}
	}
	app := newApp(profile, s.markerOf(*a))
	begin := func() error { return s.Store.BeginApp(ctx, *a) }
	var err error
	if s.apps.takes(*a) {
		_, err = s.apps.make(ctx, func() (tenant.NewApp, error) { return app, begin() })
	} else {
		err = s.createApp(ctx, priorityOf(*a), app, begin)
	}
	if tenant.ClassOf(err) != tenant.UpstreamDuplicate {
		return err
	}
	// An earlier call landed after all, or the id is somebody else's.
	err = s.isMade(ctx, a)
	if tenant.ClassOf(err) == tenant.UpstreamNotFound && a.Attempts >= maxContradictions {
		return s.abandon(ctx, *a, true, "Clarifai says that the id is taken, and does not show the app")
	}
	return err
}

// createApp makes an app, once begin has written down the intent.
func (s *Service) createApp(ctx context.Context, p tenant.Priority, app tenant.NewApp, begin func() error) error {
	t, err := s.turn(ctx, p)
	if err != nil {
		return err
	}
	if err := begin(); err != nil {
		return err
	}
	return s.send(ctx, t, func(ctx context.Context) error { return s.Upstream.CreateApp(ctx, app) })
}

// isMade looks whether the app of a build is there, and gives the build up if it is
// somebody else's.
func (s *Service) isMade(ctx context.Context, a *tenant.App) error {
	app, err := s.lookAt(ctx, priorityOf(*a), a.ID)
	switch {
	case err != nil:
		return err
	case !app.Marker.Owns(s.Deployment.ID, a.ID):
		return s.abandon(ctx, *a, false, "the id is taken by an app that is not ours")
	case app.Marker.Tenant != "":
		return s.retire(ctx, *a, "its ownership tag names a tenant")
	}
	return nil
}

// retire marks a leased app without a tenant as retired, since a tenant may have it.
func (s *Service) retire(ctx context.Context, a tenant.App, why string) error {
	s.Log.Error("app retired: it may be in use", zap.String("app", string(a.ID)), zap.String("reason", why))
	if err := s.Store.RetireApp(ctx, a, why, workerOf(ctx)); err != nil {
		return err
	}
	return errGivenUp
}

// priorityOf is the priority of a build's calls: lower once the tenant that it was begun for has
// another app.
func priorityOf(a tenant.App) tenant.Priority {
	switch {
	case a.ForPool:
		return background
	case a.Wanted:
		return interactive
	}
	return bulk
}

// look asks Clarifai whether an app exists, and reports whether its marker is
// ours.
func (s *Service) look(ctx context.Context, p tenant.Priority, id tenant.AppID) (ours bool, err error) {
	app, err := s.lookAt(ctx, p, id)
	return app.Marker.Owns(s.Deployment.ID, id), err
}

func (s *Service) lookAt(ctx context.Context, p tenant.Priority, id tenant.AppID) (app tenant.UpstreamApp, err error) {
	err = s.call(ctx, p, func(ctx context.Context) (err error) {
		app, err = s.Upstream.App(ctx, id)
		return err
	})
	return app, err
}

// makeKey makes sure that the app of a build has a key whose secret we know, and
// returns it. Afterwards a.Creating is the row of that key.
func (s *Service) makeKey(ctx context.Context, a *tenant.App, profile tenant.Profile) (tenant.Secret, error) {
	shares := s.keys.takes(*a)
	if a.Creating.InDoubt {
		key, found, err := s.findKey(ctx, priorityOf(*a), a.ID, a.Creating.ID)
		switch {
		case tenant.ClassOf(err) == tenant.UpstreamNotFound && a.Attempts >= maxContradictions:
			return tenant.Secret{}, s.abandon(ctx, *a, true, "the app is gone upstream")
		case err != nil:
			return tenant.Secret{}, err
		case found && key.Secret.IsSet():
			return key.Secret, nil
		case found:
			// No tenant has had this app: to begin anew is safe, and leaves no key
			// that nobody knows.
			return tenant.Secret{}, s.abandon(ctx, *a, true, "a key was made, its answer was lost, and listings are masked")
		}
		// The lost call may still land. The row goes on to be looked for and revoked; a
		// key row of its own is made below.
		if err := s.Store.GiveUpKey(ctx, *a); err != nil {
			return tenant.Secret{}, err
		}
		a.Creating = tenant.CreatingKey{}
	}
	begin := func() (tenant.NewKey, error) {
		id, err := uuid.NewV7()
		if err != nil {
			return tenant.NewKey{}, err
		}
		if id, err = s.Store.BeginKey(ctx, *a, tenant.NewKeyRow{ID: id, Name: tenant.DefaultKey, Scopes: profile.KeyScopes}); err != nil {
			return tenant.NewKey{}, err
		}
		a.Creating.ID = id
		return s.newKey(a.ID, id, profile.KeyScopes), nil
	}
	if shares {
		return s.keys.make(ctx, begin)
	}
	t, err := s.turn(ctx, priorityOf(*a))
	if err != nil {
		return tenant.Secret{}, err
	}
	key, err := begin()
	if err != nil {
		return tenant.Secret{}, err
	}
	secret, err := s.createKey(ctx, t, key)
	if tenant.ClassOf(err) == tenant.UpstreamNotFound && a.Attempts >= maxContradictions {
		return secret, s.abandon(ctx, *a, true, "the app is gone upstream")
	}
	return secret, err
}

// newKey is the key of a row.
func (s *Service) newKey(app tenant.AppID, id uuid.UUID, scopes []string) tenant.NewKey {
	return tenant.NewKey{AppID: app, Scopes: scopes, Marker: tenant.KeyMarker{Deployment: s.Deployment.ID, KeyID: id}}
}

// createKey makes a key whose intent is written down.
func (s *Service) createKey(ctx context.Context, t turn, key tenant.NewKey) (secret tenant.Secret, err error) {
	err = s.send(ctx, t, func(ctx context.Context) (err error) {
		secret, err = s.Upstream.CreateKey(ctx, key)
		return err
	})
	return secret, err
}

// findKey looks for the key of a row among the app's keys upstream.
func (s *Service) findKey(ctx context.Context, p tenant.Priority, app tenant.AppID, id uuid.UUID) (key tenant.UpstreamKey, found bool, err error) {
	want := tenant.KeyMarker{Deployment: s.Deployment.ID, KeyID: id}
	err = s.eachKey(ctx, p, app, func(k tenant.UpstreamKey) error {
		if m, ok := tenant.ParseKeyMarker(k.Description); ok && m == want {
			key, found = k, true
			return errStop
		}
		return nil
	})
	return key, found, err
}

// errStop ends a walk early.
var errStop = errors.New("stop")

// eachKey calls f for each key of an app upstream, until f returns an error.
func (s *Service) eachKey(ctx context.Context, p tenant.Priority, app tenant.AppID, f func(tenant.UpstreamKey) error) error {
	// Clarifai gives no total: the last page is the one that comes back empty.
	for page := 1; ; page++ {
		var keys []tenant.UpstreamKey
		err := s.call(ctx, p, func(ctx context.Context) (err error) {
			keys, err = s.Upstream.AppKeys(ctx, app, page)
			return err
		})
		if err != nil || len(keys) == 0 {
			return err
		}
		for _, k := range keys {
			if err := f(k); errors.Is(err, errStop) {
				return nil
			} else if err != nil {
				return err
			}
		}
	}
}

// abandon gives a build up and begins another. It returns errGivenUp, or why it
// could not.
func (s *Service) abandon(ctx context.Context, a tenant.App, ours bool, reason string) error {
	s.Log.Warn("build given up", zap.String("app", string(a.ID)), zap.String("reason", reason))
	var next tenant.NextBuilds
	if p, ok := s.profiles[a.Profile]; ok {
		next = s.nextBuilds(p, 1)
	}
	if err := s.Store.AbandonApp(ctx, a, ours, reason, next, workerOf(ctx)); err != nil {
		return err
	}
	return errGivenUp
}

// nextBuilds lets up to n builds of a profile begin, if they are needed.
func (s *Service) nextBuilds(p tenant.Profile, n int) tenant.NextBuilds {
	return tenant.NextBuilds{Profile: p, IDs: s.newAppIDs(n), Limits: s.buildLimits()}
}

func (s *Service) buildLimits() tenant.BuildLimits {
	return tenant.BuildLimits{Waiting: s.MaxBuilds, Pool: poolBuilds, Import: s.importBuilds(1), SharedImport: s.importBuilds(s.ItemsPerCall)}
}

// purge removes an app at Clarifai. A removal needs proof: a leased row that says so, our ownership
// tag, read again and equal to the row, and no key of ours without a row. An app that is shared with
// the operator was never tagged, and is only released.
func (s *Service) purge(ctx context.Context, a tenant.App) error {
	if a.State == tenant.AppRetained { // at the cap, make no call
		if wait, err := s.Store.PurgeWait(ctx, s.RemovalCap); err != nil || wait > 0 {
			return errors.Join(err, s.removalCap(ctx, a, wait))
		}
	}
	if a.UserID != "" {
		if err := s.beginPurge(ctx, &a); err != nil {
			return err
		}
		return s.letGo(ctx, a)
	}
	app, err := s.lookAt(ctx, background, a.ID)
	gone := tenant.ClassOf(err) == tenant.UpstreamNotFound
	switch {
	case gone:
	case err != nil:
		return err
	case !app.Marker.Owns(s.Deployment.ID, a.ID):
		return &tenant.UpstreamError{Call: "GetApp", Class: tenant.UpstreamRefused,
			Detail: "the app lacks our ownership tag and is not removed"}
	case !a.RemovalConfirmed:
		why, err := s.inUse(ctx, a, app)
		if err != nil {
			return err
		}
		switch {
		case why != "" && a.Tenant == "":
			return s.retire(ctx, a, why)
		case why != "":
			return s.contestedPurge(ctx, a, why)
		}
	}
	if err := s.beginPurge(ctx, &a); err != nil {
		return err
	}
	if gone {
		return s.Store.AppDeleted(ctx, a, workerOf(ctx))
	}
	t, err := s.turnTo(ctx, background, true)
	if err != nil {
		return err
	}
	if err := s.send(ctx, t, func(ctx context.Context) error { return s.Upstream.DeleteApp(ctx, a.ID) }); err != nil {
		return err
	}
	// Clarifai may accept a removal and carry it out later: only a look that
	// finds nothing ends the purge.
	return &deferred{wait: s.BackoffBase}
}

// inUse says why an app may be in use and must not be removed; empty if nothing shows that.
func (s *Service) inUse(ctx context.Context, a tenant.App, app tenant.UpstreamApp) (string, error) {
	if owner := s.otherOwner(a, app); owner != "" {
		return "its ownership tag names " + owner, nil
	}
	switch {
	case a.Tenant == "" && app.Marker.Tenant != "":
		return "its ownership tag names a tenant", nil
	case a.Tenant == "" && app.Inputs != nil && *app.Inputs > 0:
		return fmt.Sprintf("it has %d inputs", *app.Inputs), nil
	case a.Tenant != "" && app.Marker.PurgeAfter != tenant.PurgeTag(a.PurgeAfter):
		return "its ownership tag does not have the time of this removal, " + tenant.PurgeTag(a.PurgeAfter), nil
	}
	found, err := s.foundKeys(ctx, background, a.ID)
	if err != nil {
		return "", err
	}
	ids := make([]uuid.UUID, len(found))
	for i, k := range found {
		ids[i] = k.ID
	}
	unknown, err := s.Store.UnknownKeys(ctx, a.ID, ids)
	if err != nil || len(unknown) == 0 {
		return "", err
	}
	return fmt.Sprintf("it has a key with our ownership tag that no row knows (%s)", unknown[0]), nil
}

// beginPurge starts the removal of a retained app, unless the maximum number of tenants' apps was
// removed within the last hour.
func (s *Service) beginPurge(ctx context.Context, a *tenant.App) error {
	if a.State != tenant.AppRetained {
		return nil
	}
	wait, err := s.Store.BeginPurge(ctx, *a, s.RemovalCap, worker)
	if err != nil {
		return err
	}
	if wait > 0 {
		return s.removalCap(ctx, *a, wait)
	}
	a.State = tenant.AppPurging
	return nil
}

// removalCap defers the removal of an app, since the maximum per hour is reached.
func (s *Service) removalCap(ctx context.Context, a tenant.App, wait time.Duration) error {
	if wait <= 0 {
		return nil
	}
	set := tenant.Setback{Delay: min(wait, s.BackoffCap), Problem: tenant.Problem{Code: "removal_cap", Since: time.Now().UTC(),
		Detail: fmt.Sprintf("up to %d apps of tenants are removed in an hour, and this number is reached: this app waits", s.RemovalCap)}}
	if a.Problem != nil && a.Problem.Code == set.Problem.Code {
		set.Problem.Since = a.Problem.Since
	}
	if err := s.Store.SetBack(ctx, a.Lease(), set); err != nil {
		return err
	}
	return errGivenUp
}
