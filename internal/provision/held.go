package provision

import (
	"context"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/keyring"
	"github.com/tenantry/tenantry/internal/tenant"
)

// tend does what a held app lacks: a key that is to be made, and its tenant in its
// marker, from which the mapping can be rebuilt if the database is lost.
func (s *Service) tend(ctx context.Context, a *tenant.App) error {
	if a.Creating.ID != uuid.Nil {
		scopes := []string{"All"}
		if p, ok := s.profiles[a.Profile]; ok {
			scopes = p.KeyScopes
		}
		secret, err := s.makeKey(ctx, a, scopes)
		if err != nil {
			return err
		}
		sealed, err := s.sealed(a.Creating.ID, secret)
		if err != nil {
			return err
		}
		return s.Store.FinishKey(ctx, *a, sealed, worker)
	}
	if a.Marked || s.SkipMarks {
		return s.Store.AppMarked(ctx, *a)
	}
	sealed, err := s.Keyring.SealOwner(a.ID, tenant.AppOwner{Tenant: a.Tenant, Generation: a.Generation, Profile: a.Profile})
	if err != nil {
		return err
	}
	marker := s.markerOf(*a)
	marker.Tenant, a.MarkerKey = sealed, keyring.SealedOwnerBy(sealed)
	if err := s.call(ctx, background, func(ctx context.Context) error { return s.Upstream.MarkApp(ctx, a.ID, marker) }); err != nil {
		return err
	}
	return s.Store.AppMarked(ctx, *a)
}

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
