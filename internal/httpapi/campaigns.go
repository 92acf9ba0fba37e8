package httpapi

import (
	"encoding/json"
	"net/http"
	"strconv"
	"time"

	"github.com/google/uuid"

	"github.com/tenantry/tenantry/internal/tenant"
)

type campaignBody struct {
	ID             uuid.UUID            `json:"id"`
	Kind           tenant.CampaignKind  `json:"kind"`
	State          tenant.CampaignState `json:"state"`
	Filter         keyFilterBody        `json:"filter"`
	OverlapSeconds *int64               `json:"overlap_seconds,omitempty"`
	Revision       string               `json:"revision,omitempty"`
	Counts         campaignCountsBody   `json:"counts"`
	ETASeconds     *int64               `json:"eta_seconds,omitempty"`
	Problem        *tenant.Problem      `json:"problem,omitempty"`
	CreatedBy      string               `json:"created_by"`
	CreatedAt      time.Time            `json:"created_at"`
	EndedAt        time.Time            `json:"ended_at,omitzero"`
	Items          []campaignItemBody   `json:"items,omitempty"`
	NextCursor     string               `json:"next_cursor,omitempty"`
}

type keyFilterBody struct {
	Profile          string            `json:"profile,omitempty"`
	Labels           map[string]string `json:"labels,omitempty"`
	KeyName          string            `json:"key_name,omitempty"`
	OlderThanSeconds int64             `json:"older_than_seconds,omitempty"`
	All              bool              `json:"all,omitempty"`
}

type campaignCountsBody struct {
	Total    *int `json:"total,omitempty"`
	Done     int  `json:"done"`
	Skipped  int  `json:"skipped"`
	Failed   int  `json:"failed"`
	UnderWay int  `json:"under_way"`
}

type campaignItemBody struct {
	TenantID tenant.ID                `json:"tenant_id"`
	AppID    tenant.AppID             `json:"app_id"`
	KeyName  string                   `json:"key_name,omitempty"`
	State    tenant.CampaignItemState `json:"state"`
	Problem  *tenant.Problem          `json:"problem,omitempty"`
}

func (s *server) campaignBody(c tenant.Campaign) campaignBody {
	f := c.Filter
	b := campaignBody{ID: c.ID, Kind: c.Kind, State: c.State, Revision: c.Revision, Problem: c.Problem,
		Filter:    keyFilterBody{f.Profile, f.Labels, f.KeyName, int64(f.OlderThan / time.Second), f.All},
		Counts:    campaignCountsBody{Done: c.Done, Skipped: c.Skipped, Failed: c.Failed, UnderWay: c.UnderWay},
		CreatedBy: c.CreatedBy, CreatedAt: c.CreatedAt.UTC(), EndedAt: c.EndedAt.UTC()}
	if c.Kind == tenant.RotateKeys {
		overlap := int64(c.Overlap / time.Second)
		b.OverlapSeconds = &overlap
	}
	if c.Counted {
		b.Counts.Total = &c.Total
		if c.State == tenant.CampaignRunning && !c.Halted {
			eta := int64(s.Service.CampaignETA(c) / time.Second)
			b.ETASeconds = &eta
		}
	}
	return b
}

func (s *server) respondCampaign(w http.ResponseWriter, status int, c tenant.Campaign) error {
	if status == http.StatusAccepted {
		w.Header().Set("Location", "/v1/campaigns/"+c.ID.String())
		setRetryAfter(w, retryProvisioning)
	}
	return respond(w, status, s.campaignBody(c))
}

type rotationsBody struct {
	Profile   *string           `json:"profile"`
	Labels    map[string]string `json:"labels"`
	KeyName   *string           `json:"key_name"`
	OlderThan json.RawMessage   `json:"older_than"`
	All       bool              `json:"all"`
	Overlap   json.RawMessage   `json:"overlap"`
	DryRun    bool              `json:"dry_run"`
}

// filter is which keys are asked for. A condition that is there and empty would
// select every key: it is refused.
func (b rotationsBody) filter() (tenant.KeyFilter, error) {
	f := tenant.KeyFilter{Labels: b.Labels, All: b.All}
	for _, condition := range []struct {
		name string
		text *string
		to   *string
	}{{"profile", b.Profile, &f.Profile}, {"key_name", b.KeyName, &f.KeyName}} {
		if condition.text == nil {
			continue
		}
		if *condition.text == "" {
			return f, invalid(condition.name, "is empty: give a value, or leave it out")
		}
		*condition.to = *condition.text
	}
	if b.Labels != nil && len(b.Labels) == 0 {
		return f, invalid("labels", "is empty: give a label, or leave it out")
	}
	older, err := durationField("older_than", b.OlderThan)
	if err != nil || older == nil {
		return f, err
	}
	if *older <= 0 {
		return f, invalid("older_than", "must be more than 0")
	}
	f.OlderThan = *older
	return f, nil
}

type rotationPlanBody struct {
	Keys int `json:"keys"`
}

func (s *server) postRotations(w http.ResponseWriter, r *http.Request) error {
	if _, err := params(r); err != nil {
		return err
	}
	var body rotationsBody
	if err := decodeBody(w, r, &body, mayBeEmpty, "profile", "labels", "key_name", "older_than", "all", "overlap", "dry_run"); err != nil {
		return err
	}
	overlap, err := durationField("overlap", body.Overlap)
	if err != nil {
		return err
	}
	f, err := body.filter()
	if err != nil {
		return err
	}
	if body.DryRun {
		n, err := s.Service.CountRotation(r.Context(), f, overlap)
		if err != nil {
			return err
		}
		return respond(w, http.StatusOK, rotationPlanBody{n})
	}
	c, err := s.Service.StartRotation(r.Context(), f, overlap, actorOf(r))
	if err != nil {
		return err
	}
	return s.respondCampaign(w, http.StatusAccepted, c)
}

func (s *server) applyProfile(w http.ResponseWriter, r *http.Request) error {
	name, err := pathParam(r, "profile_name")
	if err != nil {
		return err
	}
	if _, err := params(r); err != nil {
		return err
	}
	if err := decodeBody(w, r, &struct{}{}, mayBeEmpty); err != nil {
		return err
	}
	c, err := s.Service.ApplyProfile(r.Context(), name, actorOf(r))
	if err != nil {
		return err
	}
	return s.respondCampaign(w, http.StatusAccepted, c)
}

type profileChangesBody struct {
	Tenants    []tenantChangesBody `json:"tenants"`
	NextCursor string              `json:"next_cursor,omitempty"`
}

type tenantChangesBody struct {
	TenantID tenant.ID         `json:"tenant_id"`
	AppID    tenant.AppID      `json:"app_id"`
	Skipped  string            `json:"skipped,omitempty"`
	Changes  []shapeChangeBody `json:"changes"`
}

type shapeChangeBody struct {
	What    tenant.ShapeChangeKind `json:"what"`
	KeyName string                 `json:"key_name,omitempty"`
	From    string                 `json:"from,omitempty"`
	To      string                 `json:"to"`
}

func (s *server) listProfileChanges(w http.ResponseWriter, r *http.Request) error {
	name, err := pathParam(r, "profile_name")
	if err != nil {
		return err
	}
	q, err := params(r, "limit", "cursor")
	if err != nil {
		return err
	}
	limit, err := limitParam(q, defaultLimit, maxLimit)
	if err != nil {
		return err
	}
	after := q.Get("cursor")
	if q.Has("cursor") && !plausibleName(after) {
		return invalid("cursor", "is not a next_cursor of this list")
	}
	changes, err := s.Service.ProfileChanges(r.Context(), name, tenant.AppID(after), limit+1)
	if err != nil {
		return err
	}
	body := profileChangesBody{Tenants: []tenantChangesBody{}}
	if len(changes) > limit {
		changes = changes[:limit]
		body.NextCursor = string(changes[limit-1].AppID)
	}
	for _, c := range changes {
		b := tenantChangesBody{TenantID: c.TenantID, AppID: c.AppID, Changes: []shapeChangeBody{}}
		if c.Blocked != nil {
			b.Skipped = c.Blocked.Detail
		}
		for _, change := range c.Changes {
			b.Changes = append(b.Changes, shapeChangeBody{change.What, change.KeyName, change.From, change.To})
		}
		body.Tenants = append(body.Tenants, b)
	}
	return respond(w, http.StatusOK, body)
}

type campaignListBody struct {
	Campaigns  []campaignBody `json:"campaigns"`
	NextCursor string         `json:"next_cursor,omitempty"`
}

func (s *server) listCampaigns(w http.ResponseWriter, r *http.Request) error {
	q, err := params(r, "limit", "cursor")
	if err != nil {
		return err
	}
	limit, err := limitParam(q, defaultLimit, maxLimit)
	if err != nil {
		return err
	}
	var after uuid.UUID
	if q.Has("cursor") {
		if after, err = uuid.Parse(q.Get("cursor")); err != nil || after == uuid.Nil {
			return invalid("cursor", "is not a next_cursor of this list")
		}
	}
	campaigns, err := s.DB.Campaigns(r.Context(), after, limit+1)
	if err != nil {
		return err
	}
	body := campaignListBody{Campaigns: []campaignBody{}}
	if len(campaigns) > limit {
		campaigns = campaigns[:limit]
		body.NextCursor = campaigns[limit-1].ID.String()
	}
	for _, c := range campaigns {
		body.Campaigns = append(body.Campaigns, s.campaignBody(c))
	}
	return respond(w, http.StatusOK, body)
}

func pathCampaignID(r *http.Request) (uuid.UUID, error) {
	text, err := pathParam(r, "campaign_id")
	if err != nil {
		return uuid.Nil, err
	}
	id, err := uuid.Parse(text)
	if err != nil {
		return id, tenant.Errorf(tenant.NotFound, "campaign_not_found", "there is no such campaign")
	}
	return id, nil
}

func (s *server) getCampaign(w http.ResponseWriter, r *http.Request) error {
	q, err := params(r, "limit", "cursor")
	if err != nil {
		return err
	}
	limit, err := limitParam(q, defaultLimit, maxLimit)
	if err != nil {
		return err
	}
	var after int64
	if q.Has("cursor") {
		if after, err = strconv.ParseInt(q.Get("cursor"), 10, 64); err != nil || after < 0 {
			return invalid("cursor", "is not a next_cursor of this list")
		}
	}
	id, err := pathCampaignID(r)
	if err != nil {
		return err
	}
	c, err := s.DB.Campaign(r.Context(), id)
	if err != nil {
		return err
	}
	items, err := s.DB.CampaignItems(r.Context(), id, after, limit+1)
	if err != nil {
		return err
	}
	b := s.campaignBody(c)
	if len(items) > limit {
		items = items[:limit]
		b.NextCursor = strconv.FormatInt(items[limit-1].Number, 10)
	}
	for _, i := range items {
		b.Items = append(b.Items, campaignItemBody{i.TenantID, i.AppID, i.KeyName, i.State, i.Problem})
	}
	return respond(w, http.StatusOK, b)
}

// campaignChange serves what changes a campaign.
func (s *server) campaignChange(change tenant.CampaignChange) handler {
	return func(w http.ResponseWriter, r *http.Request) error {
		if _, err := params(r); err != nil {
			return err
		}
		if err := decodeBody(w, r, &struct{}{}, mayBeEmpty); err != nil {
			return err
		}
		id, err := pathCampaignID(r)
		if err != nil {
			return err
		}
		c, err := s.Service.ChangeCampaign(r.Context(), id, change, actorOf(r))
		if err != nil {
			return err
		}
		return s.respondCampaign(w, http.StatusOK, c)
	}
}
