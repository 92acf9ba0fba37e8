package httpapi

import (
	"cmp"
	"net/http"
	"slices"
	"time"

	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/tenant"
)

type upstreamBody struct {
	Operator tenant.UserID         `json:"operator"`
	PAT      patBody               `json:"pat"`
	Budget   budgetBody            `json:"budget"`
	Pause    *tenant.UpstreamPause `json:"pause,omitempty"`
	Breaker  breakerBody           `json:"breaker"`
	Queue    queueBody             `json:"queue"`
	Recovery *recoveryState        `json:"recovery,omitempty"`
	Problem  *tenant.Problem       `json:"problem,omitempty"`
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
	RequestsPerSecond float64  `json:"requests_per_second"`
	NextSlotInSeconds *float64 `json:"next_slot_in_seconds,omitempty"` // as the ETAs, nil while no work is done
	ItemsPerCall      int      `json:"items_per_call"`
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
	ETASeconds         *float64  `json:"eta_seconds,omitempty"`
	ImportETASeconds   *float64  `json:"import_eta_seconds,omitempty"`
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
		Budget:   budgetBody{RequestsPerSecond: rate, ItemsPerCall: s.Service.ItemsPerCall},
		Breaker:  breakerOf(u),
		Queue: queueBody{WaitingTenants: u.Waiting, OldestWaitingSince: u.OldestSince.UTC(), ImportingTenants: u.Importing,
			BuildingApps: u.Building, RevokingKeys: u.Revoking, PurgingApps: u.Purging},
		Problem: cmp.Or(u.Halted, u.LastProblem),
	}
	if u.Pause.Scope != "" {
		u.Pause.Since = u.Pause.Since.UTC()
		body.Pause = &u.Pause
	}
	if u.Halted == nil && pat.State != provision.PATForeign {
		slot, waiting, importing := u.NextSlotIn.Seconds(), float64(u.Waiting*provision.CallsPerBuild)/rate, float64(u.Importing*provision.CallsPerBuild)/rate
		importing += waiting
		body.Budget.NextSlotInSeconds, body.Queue.ETASeconds, body.Queue.ImportETASeconds = &slot, &waiting, &importing
	}
	if recovery.Active() {
		body.Recovery = &recoveryState{recovery.State, recovery.Since.UTC(), recovery.Reason}
	}
	return respond(w, http.StatusOK, body)
}

// breakerOf is the circuit breaker. While something else holds up all work, too, it does not say when calls
// are made again; and while that is the PAT, which has the last word on Clarifai, nothing of Clarifai.
func breakerOf(u tenant.UpstreamStatus) breakerBody {
	if u.Pauses == 0 {
		return breakerBody{State: "closed"}
	}
	b := breakerBody{State: "half_open", Reason: u.PauseReason}
	if u.PausedUntil.After(u.DatabaseTime) {
		b.State, b.PausedUntil = "open", u.PausedUntil.UTC()
	}
	if u.PauseReason == nil || u.Halted == nil || u.Halted.Code == u.PauseReason.Code {
		return b
	}
	b.PausedUntil, b.Reason.NextAttemptAt = time.Time{}, time.Time{}
	if u.PATRefused != nil {
		b.Reason = nil
	}
	return b
}

type pauseRequest struct {
	Scope  *tenant.PauseScope `json:"scope"`
	Reason string             `json:"reason"`
}

// pauseChange is what came of a request to pause or resume.
type pauseChange struct {
	Changed bool                  `json:"changed"`
	Pause   *tenant.UpstreamPause `json:"pause,omitempty"` // in effect
	Ended   *tenant.UpstreamPause `json:"ended,omitempty"`
}

func (s *server) pauseUpstream(w http.ResponseWriter, r *http.Request) error {
	if _, err := params(r); err != nil {
		return err
	}
	var body pauseRequest
	if err := decodeBody(w, r, &body, mayBeEmpty, "scope", "reason"); err != nil {
		return err
	}
	scope := tenant.PauseAll
	if body.Scope != nil {
		scope = *body.Scope
	}
	if !slices.Contains(tenant.PauseScopes, scope) {
		return invalid("scope", "must be all or removals")
	}
	reason, err := reasonField(body.Reason, "why work is paused")
	if err != nil {
		return err
	}
	p, changed, err := s.DB.PauseUpstream(r.Context(), scope, reason, actorOf(r))
	if err != nil {
		return err
	}
	p.Since = p.Since.UTC()
	return respond(w, http.StatusOK, pauseChange{Changed: changed, Pause: &p})
}

func (s *server) resumeUpstream(w http.ResponseWriter, r *http.Request) error {
	if _, err := params(r); err != nil {
		return err
	}
	if err := decodeBody(w, r, &struct{}{}, mayBeEmpty); err != nil {
		return err
	}
	was, err := s.DB.ResumeUpstream(r.Context(), actorOf(r))
	if err != nil {
		return err
	}
	change := pauseChange{}
	if was.Scope != "" {
		was.Since = was.Since.UTC()
		change = pauseChange{Changed: true, Ended: &was}
	}
	return respond(w, http.StatusOK, change)
}
