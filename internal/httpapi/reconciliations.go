package httpapi

import (
	"net/http"
	"strconv"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/tenant"
)

type reconciliationBody struct {
	ID          uuid.UUID                   `json:"id"`
	Kind        tenant.ReconciliationKind   `json:"kind"`
	State       string                      `json:"state"`
	Phase       tenant.ReconciliationPhase  `json:"phase"`
	Decisions   bool                        `json:"decisions"`
	ReportID    *uuid.UUID                  `json:"report_id,omitempty"`
	RequestedBy string                      `json:"requested_by"`
	CreatedAt   time.Time                   `json:"created_at"`
	FinishedAt  time.Time                   `json:"finished_at,omitzero"`
	Progress    progressBody                `json:"progress"`
	Counts      map[string]int              `json:"counts"`
	Outcomes    map[tenant.FindingState]int `json:"outcomes"`
	Token       string                      `json:"token,omitempty"`
	Problem     *tenant.Problem             `json:"problem,omitempty"`
	Items       []findingBody               `json:"items,omitempty"`
	NextCursor  string                      `json:"next_cursor,omitempty"`
}

type progressBody struct {
	AppsSeen int `json:"apps_seen"`
	KeysSeen int `json:"keys_seen"`
}

type findingBody struct {
	Kind     tenant.FindingKind  `json:"kind"`
	Action   tenant.RepairAction `json:"action,omitempty"`
	AppID    tenant.AppID        `json:"app_id,omitempty"`
	KeyID    *uuid.UUID          `json:"key_id,omitempty"`
	TenantID tenant.ID           `json:"tenant_id,omitempty"`
	Detail   string              `json:"detail,omitempty"`
	State    tenant.FindingState `json:"state"`
	Note     string              `json:"note,omitempty"`
}

// appForeign is counted with the findings: an app of the account that is not ours.
const appForeign = "app_foreign"

func (s *server) reconciliationBody(r *http.Request, rec tenant.Reconciliation) (reconciliationBody, error) {
	b := reconciliationBody{ID: rec.ID, Kind: rec.Kind, State: "running", Phase: rec.Phase, Decisions: rec.Decisions,
		RequestedBy: rec.RequestedBy, CreatedAt: rec.CreatedAt.UTC(), FinishedAt: rec.FinishedAt.UTC(),
		Progress: progressBody{rec.AppsSeen, rec.KeysSeen}, Token: rec.Token, Problem: rec.Problem,
		Counts: map[string]int{appForeign: rec.ForeignApps}, Outcomes: map[tenant.FindingState]int{}}
	if rec.Done {
		b.State = "done"
	}
	if rec.ReportID != uuid.Nil {
		b.ReportID = &rec.ReportID
	}
	kinds, states, err := s.DB.CountFindings(r.Context(), rec)
	if err != nil {
		b.Counts = map[string]int{} // unknown
		return b, err
	}
	for _, kind := range tenant.FindingKinds {
		b.Counts[string(kind)] = kinds[kind]
	}
	for _, state := range tenant.FindingStates {
		b.Outcomes[state] = states[state]
	}
	return b, nil
}

type reconcileBody struct {
	Repair *string `json:"repair"`
}

func (s *server) postReconciliation(w http.ResponseWriter, r *http.Request) error {
	if _, err := params(r); err != nil {
		return err
	}
	var body reconcileBody
	if err := decodeBody(w, r, &body, mayBeEmpty, "repair"); err != nil {
		return err
	}
	var rec tenant.Reconciliation
	var err error
	if body.Repair == nil {
		rec, err = s.Service.StartReport(r.Context(), actorOf(r))
	} else {
		if n := len(*body.Repair); n == 0 || n > 64 {
			return invalid("repair", "must be the token of a report, 1 to 64 characters, and has %d", n)
		}
		rec, err = s.Service.StartRepair(r.Context(), *body.Repair, actorOf(r))
	}
	if err != nil {
		return err
	}
	b, err := s.reconciliationBody(r, rec)
	if err != nil { // it has begun: that it cannot be read any more is no failure
		s.Log.Warn("reconciliation started, and its findings cannot be counted", zap.Error(err))
	}
	w.Header().Set("Location", "/v1/reconciliations/"+rec.ID.String())
	setRetryAfter(w, retryProvisioning)
	return respond(w, http.StatusAccepted, b)
}

func (s *server) getReconciliation(w http.ResponseWriter, r *http.Request) error {
	text, err := pathParam(r, "reconciliation_id")
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
	var after int64
	if cursor := q.Get("cursor"); cursor != "" {
		if after, err = strconv.ParseInt(cursor, 10, 64); err != nil || after < 0 {
			return invalid("cursor", "is not a next_cursor of this list")
		}
	}
	id, err := uuid.Parse(text)
	if err != nil {
		return tenant.Errorf(tenant.NotFound, "reconciliation_not_found", "there is no such reconciliation")
	}
	rec, err := s.DB.Reconciliation(r.Context(), id)
	if err != nil {
		return err
	}
	b, err := s.reconciliationBody(r, rec)
	if err != nil {
		return err
	}
	found, err := s.DB.Findings(r.Context(), rec, after, limit+1)
	if err != nil {
		return err
	}
	if len(found) > limit {
		found = found[:limit]
		b.NextCursor = strconv.FormatInt(found[limit-1].Number, 10)
	}
	for _, f := range found {
		b.Items = append(b.Items, bodyOfFinding(f))
	}
	return respond(w, http.StatusOK, b)
}

func bodyOfFinding(f tenant.Finding) findingBody {
	b := findingBody{Kind: f.Kind, Action: f.Action, AppID: f.AppID, TenantID: f.TenantID, Detail: f.Detail, State: f.State, Note: f.Note}
	if f.KeyID != uuid.Nil {
		b.KeyID = &f.KeyID
	}
	return b
}

type reconciliationListBody struct {
	Reconciliations []reconciliationBody `json:"reconciliations"`
}

func (s *server) listReconciliations(w http.ResponseWriter, r *http.Request) error {
	q, err := params(r, "limit")
	if err != nil {
		return err
	}
	limit, err := limitParam(q, 20, 100)
	if err != nil {
		return err
	}
	recs, err := s.DB.Reconciliations(r.Context(), limit)
	if err != nil {
		return err
	}
	body := reconciliationListBody{Reconciliations: []reconciliationBody{}}
	for _, rec := range recs {
		b, err := s.reconciliationBody(r, rec)
		if err != nil {
			return err
		}
		body.Reconciliations = append(body.Reconciliations, b)
	}
	return respond(w, http.StatusOK, body)
}
