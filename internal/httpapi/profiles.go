package httpapi

import (
	"cmp"
	"net/http"
	"time"

	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/tenant"
)

type profileListBody struct {
	Profiles  []profileBody `json:"profiles"`
	CountedAt time.Time     `json:"counted_at"`
}

type profileBody struct {
	Name             string             `json:"name"`
	Revision         string             `json:"revision"`
	BaseWorkflow     string             `json:"base_workflow"`
	Language         string             `json:"language,omitempty"`
	AppDescription   string             `json:"app_description"`
	KeyScopes        []string           `json:"key_scopes"`
	ExtraKeys        []extraKeyBody     `json:"extra_keys"`
	AllowedScopes    []string           `json:"allowed_scopes,omitempty"`
	ShowTenant       tenant.ShowTenant  `json:"show_tenant"`
	RetentionSeconds int64              `json:"retention_seconds"`
	MaxKeyAgeSeconds int64              `json:"max_key_age_seconds,omitempty"`
	Pool             poolBoundsBody     `json:"pool"`
	Tenants          profileTenantsBody `json:"tenants"`
}

type extraKeyBody struct {
	Name   string   `json:"name"`
	Scopes []string `json:"scopes"`
}

type poolBoundsBody struct {
	Min int `json:"min"`
	Max int `json:"max"`
}

type profileTenantsBody struct {
	Total   int                 `json:"total"`
	Waiting int                 `json:"waiting"`
	Current int                 `json:"current"`
	Older   []olderRevisionBody `json:"older"`
}

type olderRevisionBody struct {
	Revision string `json:"revision"`
	Tenants  int    `json:"tenants"`
}

func (s *server) listProfiles(w http.ResponseWriter, r *http.Request) error {
	if _, err := params(r); err != nil {
		return err
	}
	uses, at, err := s.Service.ProfileUses(r.Context())
	if err != nil {
		return err
	}
	body := profileListBody{Profiles: []profileBody{}, CountedAt: at.UTC()}
	for _, u := range uses {
		body.Profiles = append(body.Profiles, profileBodyOf(u))
	}
	return respond(w, http.StatusOK, body)
}

// showNone is how the contract spells tenant.ShowNothing.
const showNone tenant.ShowTenant = "none"

func profileBodyOf(u provision.ProfileUse) profileBody {
	b := profileBody{Name: u.Name, Revision: u.Revision(), BaseWorkflow: u.BaseWorkflow, Language: u.Language, AppDescription: u.Description(""),
		KeyScopes: u.KeyScopes, ExtraKeys: []extraKeyBody{}, AllowedScopes: u.AllowedScopes,
		ShowTenant:       cmp.Or(u.ShowTenant, showNone),
		RetentionSeconds: int64(cmp.Or(u.Retention, tenant.DefaultRetention) / time.Second),
		MaxKeyAgeSeconds: int64(u.MaxKeyAge / time.Second),
		Pool:             poolBoundsBody{u.PoolMin, max(u.PoolMin, u.PoolMax)},
		Tenants:          profileTenantsBody{Total: u.Waiting + u.Current, Waiting: u.Waiting, Current: u.Current, Older: []olderRevisionBody{}}}
	for _, k := range u.ExtraKeys {
		b.ExtraKeys = append(b.ExtraKeys, extraKeyBody(k))
	}
	for _, o := range u.Older {
		b.Tenants.Total += o.Tenants
		b.Tenants.Older = append(b.Tenants.Older, olderRevisionBody{o.Revision, o.Tenants})
	}
	return b
}
