package provision

import (
	"context"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/keyring"
	"github.com/tenantry/tenantry/internal/tenant"
)

// tend does what a held app lacks: a key that works, if it was in the pool for long, the
// further keys of its profile, and its tenant in its marker, from which the mapping can
// be rebuilt if the database is lost. One that is shared with the operator gets none of
// that: its owner alone may make keys of it, and change it.
func (s *Service) tend(ctx context.Context, a *tenant.App) error {
	if a.UserID != "" {
		return s.leaveUnmarked(ctx, *a)
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
	if a.Marked || s.SkipMarks && description == "" && !adopted {
		return s.Store.AppMarked(ctx, *a)
	}
	marker := s.markerOf(*a)
	if !s.SkipMarks {
		sealed, err := s.Keyring.SealOwner(a.ID, tenant.AppOwner{Tenant: a.Tenant, Generation: a.Generation, Profile: a.Profile})
		if err != nil {
			return err
		}
		marker.Tenant, a.MarkerKey = sealed, keyring.SealedOwnerBy(sealed)
	}
	if err := s.call(ctx, background, func(ctx context.Context) error { return s.Upstream.MarkApp(ctx, a.ID, marker, description) }); err != nil {
		return err
	}
	return s.Store.AppMarked(ctx, *a)
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
	return tenant.Marker{Deployment: s.Deployment.ID, App: a.ID, Profile: a.Profile}
}

// behind raises the restore fence because of an app that the database knows less of
// than Clarifai.
func (s *Service) behind(ctx context.Context, id tenant.AppID) error {
	reason := "the app " + string(id) + " was given to a tenant, and the database does not know of it"
	if err := s.Store.RaiseFence(ctx, reason); err != nil {
		return err
	}
	s.logFence(tenant.Fence{}, tenant.Fence{Since: time.Now(), Reason: reason})
	return errGivenUp
}

// watchForRestore raises the fence if the database turns out to be another than
// before.
func (s *Service) watchForRestore(ctx context.Context) error {
	was, err := s.Store.Fence(ctx)
	if err != nil {
		return err
	}
	is, err := s.Store.CheckRestored(ctx)
	if err != nil {
		return err
	}
	s.logFence(was, is)
	id, err := uuid.NewV7()
	if err != nil {
		return err
	}
	began, err := s.Store.StartDueReport(ctx, id, s.ReportEvery, worker)
	if began {
		s.Log.Info("a report was due and has begun", zap.Stringer("reconciliation", id))
	}
	return err
}
