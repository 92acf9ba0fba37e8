package provision

import (
	"context"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/keyring"
	"github.com/tenantry/tenantry/internal/tenant"
)

// tend adds what a held app lacks: a live key, if the app was in the pool for long, the further keys
// of its profile, and its tenant in its ownership tag, from which the mapping can be rebuilt if the
// database is lost. The ownership tag of a retained app says when the app is
// removed. An app that is shared with the operator gets none of that: only its owner may create
// its keys and change it.
func (s *Service) tend(ctx context.Context, a *tenant.App) error {
	if a.EndUnknownKeys {
		found, err := s.foundKeys(ctx, interactive, a.ID)
		if err != nil && tenant.ClassOf(err) != tenant.UpstreamNotFound {
			return err
		}
		if err := s.Store.KeysListed(ctx, *a, found, workerOf(ctx)); err != nil {
			return err
		}
	}
	if a.UserID != "" {
		return s.leaveUnmarked(ctx, *a)
	}
	if a.State == tenant.AppRetained {
		return s.tag(ctx, a, "")
	}
	if _, ok := s.profiles[a.Profile]; !ok { // it is known to replicas that were started with another file
		return &deferred{wait: s.BackoffBase}
	}
	if a.Unproven {
		if err := s.proveHeld(ctx, *a); err != nil {
			return err
		}
	}
	if !a.HasExtraKeys {
		if err := s.Store.AddExtraKeys(ctx, *a, s.extraKeys(a.Profile), worker); err != nil {
			return err
		}
	}
	description, adopted := s.descriptionOf(*a), a.Revision == tenant.AdoptedRevision
	if adopted { // it has the one that its maker gave it, and no marker yet
		description = ""
	}
	if a.TaggedPurgeAfter.IsZero() && !a.Tagging && (a.Marked || s.SkipMarks && description == "" && !adopted) {
		return s.Store.AppMarked(ctx, *a)
	}
	return s.tag(ctx, a, description)
}

// tag writes the ownership tag of an app that has a tenant. A tag that names another tenant
// is the only evidence that the rows are wrong, and is never overwritten.
func (s *Service) tag(ctx context.Context, a *tenant.App, description string) error {
	p := background
	if a.State == tenant.AppHeld && (a.Tagging || !a.TaggedPurgeAfter.IsZero()) {
		p = interactive // a caller may wait for keys, which are created once the tag names no removal
	}
	app, err := s.lookAt(ctx, p, a.ID)
	if a.State == tenant.AppRetained && tenant.ClassOf(err) == tenant.UpstreamNotFound { // the removal checks again that the app is gone
		a.TaggedPurgeAfter = a.PurgeAfter
		return s.Store.AppMarked(ctx, *a)
	}
	if err != nil {
		return err
	}
	if a.State == tenant.AppRetained && !app.Marker.Owns(s.Deployment.ID, a.ID) {
		return s.contestedPurge(ctx, *a, "it lacks our ownership tag")
	}
	if owner := s.otherOwner(*a, app); owner != "" {
		return s.contested(ctx, *a, tenant.Finding{Kind: tenant.FoundAppDiffers, Detail: "its ownership tag names " + owner}, tenant.AppContested,
			"the ownership tag of the app at Clarifai names "+owner+": the database may have been rolled back; see `tenantry recover show`")
	}
	marker := s.markerOf(*a)
	if app.Marker != nil {
		marker.Tenant = app.Marker.Tenant
		switch tagged := app.Marker.PurgeAfter; {
		case a.Tagging && tagged == tenant.PurgeTag(a.TaggingPurgeAfter):
			a.TaggedPurgeAfter = a.TaggingPurgeAfter
		case a.State == tenant.AppRetained && !a.TaggedPurgeAfter.IsZero() && !a.RemovalConfirmed &&
			tagged != tenant.PurgeTag(a.TaggedPurgeAfter) && tagged != tenant.PurgeTag(a.PurgeAfter):
			return s.contestedPurge(ctx, *a, "its ownership tag has changed since this database wrote it: the tenant may have been restored")
		}
	}
	if !s.SkipMarks && !a.Marked {
		sealed, err := s.Keyring.SealOwner(a.ID, tenant.AppOwner{Tenant: a.Tenant, Generation: a.Generation, Profile: a.Profile})
		if err != nil {
			return err
		}
		marker.Tenant, a.MarkerKey = sealed, keyring.SealedOwnerBy(sealed)
	}
	marker.PurgeAfter = tenant.PurgeTag(a.PurgeAfter)
	if a.Tagging || !a.TaggedPurgeAfter.Equal(a.PurgeAfter) {
		a.TaggingPurgeAfter = a.PurgeAfter
		if err := s.Store.BeginTag(ctx, *a); err != nil {
			return err
		}
	}
	if err := s.call(ctx, p, func(ctx context.Context) error { return s.Upstream.MarkApp(ctx, a.ID, marker, description) }); err != nil {
		return err
	}
	a.TaggedPurgeAfter = a.PurgeAfter
	return s.Store.AppMarked(ctx, *a)
}

// otherOwner describes the owner in an app's ownership tag if it differs from the tenant of the row;
// empty if it does not, or if the tag names no tenant.
func (s *Service) otherOwner(a tenant.App, app tenant.UpstreamApp) string {
	if app.Marker == nil || app.Marker.Deployment == s.Deployment.ID && app.Marker.Tenant == "" {
		return ""
	}
	if app.Marker.Deployment != s.Deployment.ID {
		return "another Tenantry deployment"
	}
	owner := s.ownerOf(*app.Marker)
	switch {
	case owner.Tenant == "": // it cannot be decrypted, since the keyset has changed: trust the row
		return ""
	case owner.Tenant != a.Tenant:
		return "another tenant"
	case owner.Generation != a.Generation:
		return "another generation of the tenant"
	}
	return ""
}

// contestedPurge stops the removal of an app until a person decides.
func (s *Service) contestedPurge(ctx context.Context, a tenant.App, why string) error {
	return s.contested(ctx, a, tenant.Finding{Kind: tenant.FoundPurge, Detail: why}, "purge_contested",
		"the app is not removed, since it may be in use: "+why+"; see `tenantry recover show`")
}

// contested stops work on an app whose ownership tag or keys contradict the rows, until a person
// decides.
func (s *Service) contested(ctx context.Context, a tenant.App, f tenant.Finding, code, detail string) error {
	if a.Problem == nil || a.Problem.Code != code {
		s.Log.Error("app contested: database and Clarifai disagree; run `tenantry recover show`",
			zap.String("app", string(a.ID)), zap.String("tenant", string(a.Tenant)), zap.String("problem", code), zap.String("detail", f.Detail))
	}
	problem := tenant.Problem{Code: code, Detail: detail, Since: time.Now().UTC()}
	if a.Problem != nil && a.Problem.Code == code {
		problem.Since = a.Problem.Since
	}
	if err := s.Store.Contested(ctx, a, f, problem, tenant.Setback{Delay: backoff(8*s.BackoffBase, 20*s.BackoffCap, a.Attempts)}); err != nil {
		return err
	}
	return errGivenUp
}

// extraKeys names rows for the further keys of a profile.
func (s *Service) extraKeys(profile string) []tenant.NewKeyRow {
	var rows []tenant.NewKeyRow
	for _, k := range s.profiles[profile].ExtraKeys {
		rows = append(rows, tenant.NewKeyRow{ID: newRowID(), Name: k.Name, Scopes: k.Scopes})
	}
	return rows
}

// newRowID makes the id of a row: rows sort by it as they were made.
func newRowID() uuid.UUID { return uuid.Must(uuid.NewV7()) }

func (s *Service) markerOf(a tenant.App) tenant.Marker {
	return tenant.Marker{Deployment: s.Deployment.ID, App: a.ID, Profile: a.Profile, Incarnation: s.incarnation()}
}

// startDueReports starts a due report, or a repair for decisions that are not carried out yet.
func (s *Service) startDueReports(ctx context.Context) error {
	if _, err := s.Store.StartDueDecisions(ctx, newRowID()); err != nil {
		return err
	}
	id := newRowID()
	began, err := s.Store.StartDueReport(ctx, id, s.ReportEvery, worker)
	if began {
		s.Log.Info("report started", zap.Stringer("reconciliation", id))
	}
	return err
}
