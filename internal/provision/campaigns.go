package provision

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/tenant"
)

// StartRotation begins to rotate every key that f selects and that works already. The
// old secrets work on for the overlap; nil takes the default. It reports
// tenant.Invalid for a filter or an overlap that cannot be, tenant.Conflict while a
// campaign of the same filter is open.
func (s *Service) StartRotation(ctx context.Context, f tenant.KeyFilter, overlap *time.Duration, actor tenant.Actor) (tenant.Campaign, error) {
	n := tenant.NewCampaign{ID: newRowID(), Kind: tenant.RotateKeys, Filter: f, Overlap: tenant.DefaultOverlap}
	if overlap != nil {
		n.Overlap = *overlap
	}
	if err := s.checkRotation(f, n.Overlap); err != nil {
		return tenant.Campaign{}, err
	}
	c, err := s.Store.StartCampaign(ctx, n, actor)
	if err == nil {
		s.logCampaign("a campaign has begun", c)
	}
	return c, err
}

// CountRotation counts the keys that StartRotation would rotate.
func (s *Service) CountRotation(ctx context.Context, f tenant.KeyFilter, overlap *time.Duration) (int, error) {
	of := tenant.DefaultOverlap
	if overlap != nil {
		of = *overlap
	}
	if err := s.checkRotation(f, of); err != nil {
		return 0, err
	}
	return s.Store.CountKeys(ctx, f)
}

func (s *Service) checkRotation(f tenant.KeyFilter, overlap time.Duration) error {
	if err := f.Validate(); err != nil {
		return err
	}
	if err := tenant.ValidOverlap(overlap); err != nil {
		return err
	}
	if _, ok := s.profiles[f.Profile]; f.Profile != "" && !ok {
		return &tenant.Error{Kind: tenant.Invalid, Code: "profile_unknown", Field: "profile",
			Detail: "there is no such profile; there are: " + strings.Join(s.profileNames(), ", ")}
	}
	return nil
}

// ApplyProfile begins to bring the apps of a profile to its current revision. It
// reports tenant.NotFound for a profile that there is not, and tenant.Conflict while
// the profile is being applied.
func (s *Service) ApplyProfile(ctx context.Context, profile string, actor tenant.Actor) (tenant.Campaign, error) {
	p, err := s.profile(profile)
	if err != nil {
		return tenant.Campaign{}, err
	}
	if err := s.Store.NoteProfiles(ctx, []tenant.Profile{p}); err != nil {
		return tenant.Campaign{}, err
	}
	c, err := s.Store.StartCampaign(ctx, tenant.NewCampaign{ID: newRowID(), Kind: tenant.ConformApps,
		Filter: tenant.KeyFilter{Profile: p.Name}, Revision: p.Revision()}, actor)
	if err == nil {
		s.logCampaign("a campaign has begun", c)
	}
	return c, err
}

func (s *Service) profile(name string) (tenant.Profile, error) {
	p, ok := s.profiles[name]
	if !ok {
		return p, tenant.Errorf(tenant.NotFound, "profile_not_found", "there is no such profile; there are: %s", strings.Join(s.profileNames(), ", "))
	}
	return p, nil
}

// A ProfileChange is what ApplyProfile would change of one tenant.
type ProfileChange struct {
	TenantID tenant.ID
	AppID    tenant.AppID
	Changes  []tenant.ShapeChange
	Blocked  *tenant.Error // why nothing would be; nil if it would
}

// ProfileChanges lists what ApplyProfile would change, of up to limit tenants in the
// order of their apps, after the app that after names.
func (s *Service) ProfileChanges(ctx context.Context, profile string, after tenant.AppID, limit int) ([]ProfileChange, error) {
	p, err := s.profile(profile)
	if err != nil {
		return nil, err
	}
	misfits, err := s.Store.Misfits(ctx, p.Name, p.Revision(), after, limit)
	changes := make([]ProfileChange, 0, len(misfits))
	for _, m := range misfits {
		changes = append(changes, ProfileChange{TenantID: m.TenantID, AppID: m.AppID, Changes: m.Changes(p.Shape()), Blocked: m.Blocked(p.Shape())})
	}
	return changes, err
}

// ChangeCampaign pauses, resumes or stops a campaign. It reports tenant.Conflict if
// its state does not allow that.
func (s *Service) ChangeCampaign(ctx context.Context, id uuid.UUID, change tenant.CampaignChange, actor tenant.Actor) (tenant.Campaign, error) {
	c, changed, err := s.Store.ChangeCampaign(ctx, id, change, actor)
	if err == nil && changed {
		s.logCampaign("a campaign is "+string(c.State), c)
	}
	return c, err
}

// CampaignETA is how long a campaign takes at the configured rate if Clarifai gets no
// other calls: a rotation makes two, and an app one and one for each of its keys.
func (s *Service) CampaignETA(c tenant.Campaign) time.Duration {
	calls := 2
	if c.Kind == tenant.ConformApps {
		calls = 1 + len(c.Shape.Keys)
	}
	return time.Duration(float64(c.Left()*calls) / s.Rate * float64(time.Second)).Round(time.Second)
}

func (s *Service) logCampaign(what string, c tenant.Campaign) {
	s.Log.Info(what, zap.Stringer("campaign", c.ID), zap.String("kind", string(c.Kind)), zap.String("state", string(c.State)),
		zap.Any("filter", c.Filter.Fields()), zap.String("revision", c.Revision), zap.String("by", c.CreatedBy),
		zap.Int("done", c.Done), zap.Int("skipped", c.Skipped), zap.Int("failed", c.Failed))
}

// rotateAged begins campaigns for the keys that are older than their profiles allow.
func (s *Service) rotateAged(ctx context.Context) error {
	return s.eachProfile(func(ctx context.Context, p tenant.Profile) error {
		if p.MaxKeyAge <= 0 {
			return nil
		}
		began, err := s.Store.StartDueRotation(ctx, tenant.NewCampaign{ID: newRowID(), Kind: tenant.RotateKeys,
			Overlap: min(tenant.DefaultOverlap, p.MaxKeyAge), // or the old key would outlast the new one
			Filter:  tenant.KeyFilter{Profile: p.Name, OlderThan: p.MaxKeyAge}}, worker)
		if began {
			s.Log.Info("keys are older than their profile allows, and are rotated", zap.String("profile", p.Name), zap.Duration("max_key_age", p.MaxKeyAge))
		}
		return err
	})(ctx)
}

// actorOfCampaign is who changes what c changes.
func actorOfCampaign(ctx context.Context, c tenant.Campaign) tenant.Actor {
	return tenant.Actor{Name: c.CreatedBy, UpstreamRequestID: tenant.LastUpstreamRequest(ctx)}
}

// workCampaign takes a leased campaign as far as the time allows. Each step is recorded, so that any
// replica can take the next.
func (s *Service) workCampaign(ctx context.Context, c *tenant.Campaign) error {
	for !c.Ended() {
		if s.patience(ctx) < s.CallTimeout {
			return &deferred{}
		}
		var err error
		if *c, err = s.campaignStep(ctx, *c); err != nil {
			return err
		}
	}
	return nil
}

// campaignStep takes one step, and returns the campaign as it stands then. It returns
// *deferred when nothing can be done but wait.
func (s *Service) campaignStep(ctx context.Context, c tenant.Campaign) (tenant.Campaign, error) {
	settled, err := s.Store.SettleCampaign(ctx, c, worker)
	if err != nil {
		return c, err
	}
	c = settled.Campaign
	s.Metrics.campaignItems.WithLabelValues(string(c.Kind), "done").Add(float64(settled.Done))
	s.Metrics.campaignItems.WithLabelValues(string(c.Kind), string(tenant.ItemSkipped)).Add(float64(settled.Skipped))
	s.Metrics.campaignItems.WithLabelValues(string(c.Kind), string(tenant.ItemFailed)).Add(float64(settled.Failed))
	switch {
	case c.Ended():
		s.logCampaign("a campaign has ended", c)
		return c, nil
	case c.State != tenant.CampaignRunning:
		return c, &deferred{wait: s.SweepEvery}
	case !c.Counted:
		return s.Store.CountCampaign(ctx, c)
	case c.Kind == tenant.ConformApps:
		return c, s.conformNext(ctx, c)
	}
	room := s.MaxRotations - c.UnderWay
	// Not one by one: each step costs a look at all that is under way.
	if room <= 0 || c.UnderWay > 0 && room < s.MaxRotations/4 {
		return c, &deferred{wait: s.SweepEvery}
	}
	ids := make([]uuid.UUID, room)
	for i := range ids {
		ids[i] = newRowID()
	}
	next, err := s.Store.RotateSome(ctx, c, ids, tenant.Actor{Name: c.CreatedBy})
	if err != nil {
		return c, err
	}
	s.Metrics.campaignItems.WithLabelValues(string(c.Kind), string(tenant.ItemSkipped)).Add(float64(next.Skipped - c.Skipped))
	if next.Walked && next.UnderWay > 0 {
		return next, &deferred{wait: s.SweepEvery}
	}
	return next, nil
}

// maxUnsettled is how often an app is read anew whose keys change while a campaign is
// at it.
const maxUnsettled = 3

// maxConformAttempts is how often a campaign tries an app that Clarifai fails over and
// over, before it goes on without it.
const maxConformAttempts = 10

// conformNext brings the next app of a campaign to its revision, or leaves it as it is
// with the reason.
func (s *Service) conformNext(ctx context.Context, c tenant.Campaign) error {
	ctx = tenant.WithUpstreamTrace(ctx)
	for tries := 1; ; tries++ {
		m, err := s.Store.NextMisfit(ctx, c)
		if errors.Is(err, tenant.NotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		if blocked := m.Blocked(c.Shape); blocked != nil {
			return s.leaveMisfit(ctx, c, m, tenant.ItemSkipped, tenant.Problem{Code: blocked.Code, Detail: blocked.Detail})
		}
		if tries > maxUnsettled {
			return s.leaveMisfit(ctx, c, m, tenant.ItemSkipped, tenant.Problem{Code: "tenant_changing",
				Detail: "the tenant or its keys changed again and again meanwhile: apply the profile again"})
		}
		err = s.conform(ctx, c, &m)
		up := asUpstream(err)
		switch {
		case errors.Is(err, errUnopened):
			return s.leaveMisfit(ctx, c, m, tenant.ItemFailed, tenant.Problem{Code: "key_unreadable", Detail: err.Error()})
		case up != nil && (up.Class == tenant.UpstreamNotFound || up.Class == tenant.UpstreamRefused ||
			up.Class == tenant.UpstreamDown && c.Attempts >= maxConformAttempts):
			return s.leaveMisfit(ctx, c, m, tenant.ItemFailed, problemOf(up, nil))
		case err != nil:
			return err
		}
		ok, err := s.Store.Conformed(ctx, c, m, newKeyIDs(), actorOfCampaign(ctx, c))
		if err == nil && ok {
			s.Metrics.campaignItems.WithLabelValues(string(c.Kind), "done").Inc()
		}
		if err != nil || ok {
			return err
		}
	}
}

func (s *Service) leaveMisfit(ctx context.Context, c tenant.Campaign, m tenant.Misfit, state tenant.CampaignItemState, p tenant.Problem) error {
	if p.Since.IsZero() {
		p.Since = time.Now().UTC()
	}
	s.Metrics.campaignItems.WithLabelValues(string(c.Kind), string(state)).Inc()
	return s.Store.LeaveMisfit(ctx, c, m, state, p)
}

var errUnopened = errors.New("the sealed key cannot be opened")

// conform makes m at Clarifai what the campaign's revision makes of it, but for the
// keys that it lacks. It may be repeated: every call sets what is to be.
func (s *Service) conform(ctx context.Context, c tenant.Campaign, m *tenant.Misfit) error {
	for {
		k, scopes, ok := m.ToRescope(c.Shape)
		if !ok {
			break
		}
		secret, err := s.Keyring.Open(k.ID, k.Ciphertext)
		if err != nil {
			return fmt.Errorf("%w: %s of %s", errUnopened, k.Name, m.AppID)
		}
		if err := s.call(ctx, bulk, func(ctx context.Context) error { return s.Upstream.SetKeyScopes(ctx, secret, scopes) }); err != nil {
			return err
		}
		if err := s.Store.KeyRescopedTo(ctx, c, *m, k, scopes, actorOfCampaign(ctx, c)); err != nil {
			return err
		}
		m.Rescoped(k.ID, scopes)
	}
	change := s.appChange(*m, c.Shape)
	if change == (tenant.AppChange{}) {
		return nil
	}
	return s.call(ctx, bulk, func(ctx context.Context) error { return s.Upstream.ChangeApp(ctx, m.AppID, change) })
}

// appChange is what has to change of an app itself.
func (s *Service) appChange(m tenant.Misfit, to tenant.Shape) tenant.AppChange {
	var change tenant.AppChange
	for _, c := range m.Changes(to) {
		switch c.What {
		case tenant.ChangesWorkflow:
			change.BaseWorkflow = to.BaseWorkflow
		case tenant.ChangesLanguage:
			change.Language = to.Language
		case tenant.ChangesDescription:
			shown := ""
			switch to.ShowTenant {
			case tenant.ShowTenantID:
				shown = string(m.TenantID)
			case tenant.ShowTenantHash:
				shown = s.Keyring.TenantHash(m.TenantID)
			}
			change.Description = tenant.Profile{AppDescription: to.AppDescription}.Description(shown)
		}
	}
	return change
}
