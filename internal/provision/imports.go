package provision

import (
	"context"
	"errors"

	"github.com/tenantry/tenantry/internal/tenant"
)

// importChunk is how many tenants are signed up in one transaction, at most.
const importChunk = 250

// A BatchSignUp is one of many sign-ups.
type BatchSignUp struct {
	ID tenant.ID
	tenant.SignUp
	// Fault, unless nil, is what is wrong with it: nothing else of it is set.
	Fault error
}

// A BatchEnd is what came of one of many sign-ups.
type BatchEnd struct {
	SignedUp
	// Err is why nothing was done for it: a *tenant.Error. Nil where something was.
	Err error
}

// A BatchRule says what is special about a batch.
type BatchRule struct {
	LeaveDeleted bool // refuse a tenant that is deleted, as one that is being deleted
	DryRun       bool // change nothing: Created says what would be made
}

// SignUpMany signs tenants up and does not wait for their apps, which are built when no
// other tenant waits and the pools are full. Each ends as it would by SignUp, in their
// order, whatever comes of the others, but that Replace is not honoured.
//
// An error means that it is not known how far it came; the same again does no harm.
func (s *Service) SignUpMany(ctx context.Context, ups []BatchSignUp, rule BatchRule, actor tenant.Actor) ([]BatchEnd, error) {
	ends := make([]BatchEnd, len(ups))
	for at := 0; at < len(ups); at += importChunk {
		to := min(at+importChunk, len(ups))
		if err := s.signUpChunk(ctx, ups[at:to], ends[at:to], rule, actor); err != nil {
			return nil, err
		}
	}
	return ends, nil
}

func (s *Service) signUpChunk(ctx context.Context, ups []BatchSignUp, ends []BatchEnd, rule BatchRule, actor tenant.Actor) error {
	batch := tenant.NewBatch{LeaveDeleted: rule.LeaveDeleted, DryRun: rule.DryRun}
	place := map[tenant.ID]int{} // in the batch, of the first good sign-up of an id
	for i := range ups {
		up := &ups[i]
		up.Within = actor.Within
		if ends[i].Err = up.Fault; up.Fault == nil {
			ends[i].Err = up.Validate()
		}
		if ends[i].Err != nil {
			continue
		}
		profile, err := s.profileOf(up.SignUp)
		if ends[i].Err = err; err != nil {
			continue
		}
		if _, twice := place[up.ID]; !twice {
			place[up.ID] = len(batch.Tenants)
			batch.Tenants = append(batch.Tenants, tenant.NewTenant{ID: up.ID, Profile: profile, Attributes: up.Attributes()})
		}
	}
	if len(batch.Tenants) == 0 {
		return nil
	}
	got, err := s.Store.SignUpMany(ctx, batch, actor)
	if err != nil {
		return err
	}
	for i, up := range ups {
		if ends[i].Err != nil {
			continue
		}
		first := &got[place[up.ID]]
		if rule.DryRun && first.Created { // what stands there would not be what the next sees
			ends[i].Created = true
			continue
		}
		if ends[i], err = s.endSignUp(ctx, up, first, rule.DryRun, actor); err != nil {
			return err
		}
	}
	return nil
}

// endSignUp says how one sign-up of a batch ended, by how its tenant stands. Of those of
// one id the first has made it.
func (s *Service) endSignUp(ctx context.Context, up BatchSignUp, got *tenant.SignedUp, dryRun bool, actor tenant.Actor) (BatchEnd, error) {
	if !up.Within.Covers(got.Tenant.Labels) {
		return BatchEnd{Err: tenant.ErrOutside}, nil
	}
	end := BatchEnd{SignedUp: SignedUp{Tenant: got.Tenant, Created: got.Created}}
	switch {
	case got.Created:
		got.Created = false
		return end, nil
	case got.FirstUnknown() && dryRun:
		return end, nil
	case got.FirstUnknown():
		t, err := s.Store.SetFirstAttributes(ctx, up.ID, up.Attributes(), actor)
		if errors.Is(err, tenant.ErrOutside) {
			return BatchEnd{Err: tenant.ErrOutside}, nil
		}
		if err != nil {
			return end, err
		}
		end.Tenant, got.Tenant, got.FirstHash = t, t, up.Attributes().Hash()
		return end, nil
	}
	err := agrees(up.SignUp, got.Tenant, got.FirstHash)
	if known, ok := errors.AsType[*tenant.Error](err); ok {
		return BatchEnd{Err: known}, nil
	}
	return end, err
}
