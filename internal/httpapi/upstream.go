package httpapi

import (
	"net/http"
	"time"

	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/tenant"
)

type upstreamBody struct {
	Operator tenant.UserID   `json:"operator"`
	PAT      patBody         `json:"pat"`
	Budget   budgetBody      `json:"budget"`
	Breaker  breakerBody     `json:"breaker"`
	Queue    queueBody       `json:"queue"`
	Recovery *recoveryState  `json:"recovery,omitempty"`
	Problem  *tenant.Problem `json:"problem,omitempty"`
}

type recoveryState struct {
	State  tenant.RecoveryState `json:"state"`
	Since  time.Time            `json:"since"`
	Reason string               `json:"reason"`
}

type patBody struct {
	State     provision.PATState `json:"state"`
	Since     time.Time          `json:"since,omitzero"`
	CheckedAt time.Time          `json:"checked_at,omitzero"`
}

type budgetBody struct {
	RequestsPerSecond float64 `json:"requests_per_second"`
	NextSlotInSeconds float64 `json:"next_slot_in_seconds"`
	ItemsPerCall      int     `json:"items_per_call"`
}

type breakerBody struct {
	State       string          `json:"state"`
	PausedUntil time.Time       `json:"paused_until,omitzero"`
	Reason      *tenant.Problem `json:"reason,omitempty"`
}

type queueBody struct {
	WaitingTenants     int       `json:"waiting_tenants"`
	OldestWaitingSince time.Time `json:"oldest_waiting_since,omitzero"`
	ImportingTenants   int       `json:"importing_tenants"`
	BuildingApps       int       `json:"building_apps"`
	RevokingKeys       int       `json:"revoking_keys"`
	PurgingApps        int       `json:"purging_apps"`
	ETASeconds         float64   `json:"eta_seconds"`
	ImportETASeconds   float64   `json:"import_eta_seconds"`
}

func (s *server) getUpstream(w http.ResponseWriter, r *http.Request) error {
	if _, err := params(r); err != nil {
		return err
	}
	u, pat, err := s.Service.UpstreamStatus(r.Context())
	if err != nil {
		return err
	}
	recovery, err := s.DB.Recovery(r.Context())
	if err != nil {
		return err
	}
	rate := s.Service.Rate
	body := upstreamBody{
		Operator: s.Service.Deployment.Operator,
		PAT:      patBody{State: pat.State, Since: pat.Since.UTC(), CheckedAt: pat.CheckedAt.UTC()},
		Budget:   budgetBody{RequestsPerSecond: rate, NextSlotInSeconds: u.NextSlotIn.Seconds(), ItemsPerCall: s.Service.ItemsPerCall},
		Breaker:  breakerBody{State: "closed"},
		Queue: queueBody{WaitingTenants: u.Waiting, OldestWaitingSince: u.OldestSince.UTC(), BuildingApps: u.Building,
			RevokingKeys: u.Revoking, PurgingApps: u.Purging,
			ImportingTenants: u.Importing, ETASeconds: float64(u.Waiting*provision.CallsPerBuild) / rate,
			ImportETASeconds: float64((u.Waiting+u.Importing)*provision.CallsPerBuild) / rate},
		Problem: u.LastProblem,
	}
	if recovery.Active() {
		body.Recovery = &recoveryState{recovery.State, recovery.Since.UTC(), recovery.Reason}
	}
	if u.Pauses > 0 {
		body.Breaker = breakerBody{State: "open", PausedUntil: u.PausedUntil.UTC(), Reason: u.PauseReason}
		if !u.PausedUntil.After(u.DatabaseTime) {
			body.Breaker.State = "half_open"
		}
	}
	if u.PATRefused != nil {
		body.Problem = u.PATRefused
	}
	return respond(w, http.StatusOK, body)
}
