package httpapi

import (
	"cmp"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/tenant"
)

type recoveryBody struct {
	State          tenant.RecoveryState `json:"state"` // "none" if the database is not in recovery mode
	Incarnation    uuid.UUID            `json:"incarnation"`
	BeganAt        time.Time            `json:"began_at"`
	Reason         string               `json:"reason"`
	Since          time.Time            `json:"since,omitzero"`
	Lost           string               `json:"lost,omitempty"`
	WatchUntil     time.Time            `json:"watch_until,omitzero"`
	EndsWhen       string               `json:"ends_when,omitempty"`
	ReportID       *uuid.UUID           `json:"report_id,omitempty"`
	ReportDone     bool                 `json:"report_done"`
	Undecided      int                  `json:"undecided_findings"`
	Waiting        recoveryWaitingBody  `json:"waiting"`
	Deployment     string               `json:"deployment"`
	ControlApp     tenant.AppID         `json:"control_app"`
	ControlSeenAt  time.Time            `json:"control_seen_at,omitzero"`
	ControlProblem *tenant.Problem      `json:"control_problem,omitempty"`
	Retired        retiredCountBody     `json:"retired_apps"`
}

type recoveryWaitingBody struct {
	Removals  int `json:"removals"`
	Campaigns int `json:"campaigns"`
	Keys      int `json:"keys"`
}

type retiredCountBody struct {
	Count  int       `json:"count"`
	Oldest time.Time `json:"oldest,omitzero"`
	Newest time.Time `json:"newest,omitzero"`
}

// notRecovering is the state of a database that is not in recovery mode.
const notRecovering tenant.RecoveryState = "none"

// endsWhen says how recovery mode ends.
var endsWhen = map[tenant.RecoveryState]string{
	tenant.Watching:   "the replica that last renewed the control record serves this database, or the record is not renewed until watch_until",
	tenant.Recovering: "a report leaves no finding that waits for a decision, or an admin ends it",
	tenant.Stopped:    "the replica that renews the control record moves to this database, or an admin takes over",
}

func (s *server) recoveryBody(r *http.Request) (recoveryBody, error) {
	is, err := s.DB.RecoveryStatus(r.Context())
	if err != nil {
		return recoveryBody{}, err
	}
	retired, err := s.DB.CountRetired(r.Context(), tenant.RetiredFilter{})
	if err != nil {
		return recoveryBody{}, err
	}
	b := recoveryBody{ReportDone: is.ReportDone, Undecided: is.Undecided, Waiting: recoveryWaitingBody(is.Waiting),
		Deployment: s.Service.Deployment.ID, ControlApp: tenant.ControlID(s.Service.AppPrefix, s.Service.Deployment.ID),
		Retired: retiredCountBody{retired.Count, retired.Oldest.UTC(), retired.Newest.UTC()}}
	b.set(is)
	if is.Report != uuid.Nil {
		b.ReportID = &is.Report
	}
	return b, nil
}

// set sets what is read of the incarnation alone.
func (b *recoveryBody) set(is tenant.Recovery) {
	b.State, b.Incarnation, b.BeganAt, b.Reason, b.Since, b.Lost = is.State, is.Incarnation, is.BeganAt.UTC(), is.Reason, is.Since.UTC(), is.Lost
	b.WatchUntil, b.EndsWhen, b.ControlSeenAt, b.ControlProblem = is.WatchUntil.UTC(), endsWhen[is.State], is.ControlSeenAt.UTC(), is.ControlProblem
	if is.State == tenant.NotRecovering {
		b.State = notRecovering
	}
}

func (s *server) getRecovery(w http.ResponseWriter, r *http.Request) error {
	if _, err := params(r); err != nil {
		return err
	}
	b, err := s.recoveryBody(r)
	if err != nil {
		return err
	}
	return respond(w, http.StatusOK, b)
}

// changeRecovery carries out a command about recovery mode. It reads what it will respond with before,
// too: a read that fails after the commit is no failure of the command, which must not be repeated.
func (s *server) changeRecovery(w http.ResponseWriter, r *http.Request, change func() (tenant.Recovery, error)) error {
	before, err := s.recoveryBody(r)
	if err != nil {
		return err
	}
	is, err := change()
	if err != nil {
		return err
	}
	b, err := s.recoveryBody(r)
	if err != nil {
		s.Log.Warn("recovery mode changed, and its state cannot be read", zap.Error(err))
		b = before
		b.set(is)
	}
	return respond(w, http.StatusOK, b)
}

type beginRecoveryBody struct {
	Reason string `json:"reason"`
}

// maxReason bounds the reason of a command, in bytes.
const maxReason = 500

// reasonField reads the reason of a command, which says what.
func reasonField(text, what string) (string, error) {
	text = strings.TrimSpace(text)
	if text == "" || len(text) > maxReason || strings.ContainsFunc(text, func(c rune) bool { return c < ' ' }) {
		return "", invalid("reason", "must say in 1 to %d bytes %s, without control characters", maxReason, what)
	}
	return text, nil
}

func (s *server) beginRecovery(w http.ResponseWriter, r *http.Request) error {
	if _, err := params(r); err != nil {
		return err
	}
	var body beginRecoveryBody
	if err := decodeBody(w, r, &body, mayBeEmpty, "reason"); err != nil {
		return err
	}
	reason, err := reasonField(body.Reason, "why the database is behind")
	if err != nil {
		return err
	}
	return s.changeRecovery(w, r, func() (tenant.Recovery, error) {
		return s.DB.BeginRecovery(r.Context(), reason, actorOf(r))
	})
}

type confirmBody struct {
	Confirm string `json:"confirm"`
}

func (s *server) endRecovery(w http.ResponseWriter, r *http.Request) error {
	if _, err := params(r); err != nil {
		return err
	}
	var body confirmBody
	if err := decodeBody(w, r, &body, mayBeEmpty, "confirm"); err != nil {
		return err
	}
	return s.changeRecovery(w, r, func() (tenant.Recovery, error) {
		return s.Service.EndRecovery(r.Context(), body.Confirm, actorOf(r))
	})
}

func (s *server) takeOver(w http.ResponseWriter, r *http.Request) error {
	if _, err := params(r); err != nil {
		return err
	}
	var body confirmBody
	if err := decodeBody(w, r, &body, mayBeEmpty, "confirm"); err != nil {
		return err
	}
	return s.changeRecovery(w, r, func() (tenant.Recovery, error) {
		return s.Service.TakeOver(r.Context(), body.Confirm, actorOf(r))
	})
}

type recoveryFindingBody struct {
	Number int64 `json:"number"`
	findingBody
	Choices []choiceBody `json:"choices"`
}

type choiceBody struct {
	Choice  tenant.RepairAction `json:"choice"`
	Effect  string              `json:"effect"`
	Confirm string              `json:"confirm,omitempty"` // the id that must be typed; empty for a choice that can do no harm
}

type recoveryFindingsBody struct {
	Findings   []recoveryFindingBody `json:"findings"`
	NextCursor string                `json:"next_cursor,omitempty"`
}

func (s *server) listRecoveryFindings(w http.ResponseWriter, r *http.Request) error {
	q, err := params(r, "kind", "limit", "cursor")
	if err != nil {
		return err
	}
	limit, err := limitParam(q, defaultLimit, maxLimit)
	if err != nil {
		return err
	}
	kind := tenant.FindingKind(q.Get("kind"))
	if kind != "" && !slices.Contains(tenant.FindingKinds, kind) {
		return invalid("kind", "is not a kind of finding")
	}
	var after tenant.Finding
	if cursor := q.Get("cursor"); cursor != "" {
		number, app, ok := strings.Cut(cursor, " ")
		if after.Number, err = strconv.ParseInt(number, 10, 64); err != nil || !ok || after.Number < 1 {
			return invalid("cursor", "is not a next_cursor of this list")
		}
		after.AppID = tenant.AppID(app)
	}
	found, err := s.DB.Undecided(r.Context(), kind, after, limit+1)
	if err != nil {
		return err
	}
	body := recoveryFindingsBody{Findings: []recoveryFindingBody{}}
	if len(found) > limit {
		found = found[:limit]
		last := found[limit-1]
		body.NextCursor = strconv.FormatInt(last.Number, 10) + " " + string(last.AppID)
	}
	for _, f := range found {
		body.Findings = append(body.Findings, bodyOfRecoveryFinding(f))
	}
	return respond(w, http.StatusOK, body)
}

func bodyOfRecoveryFinding(f tenant.Finding) recoveryFindingBody {
	b := recoveryFindingBody{Number: f.Number, findingBody: bodyOfFinding(f), Choices: []choiceBody{}}
	for _, c := range f.Kind.Choices() {
		choice := choiceBody{Choice: c.Name, Effect: c.Effect}
		if c.Typed {
			choice.Confirm = cmp.Or(string(f.TenantID), string(f.AppID))
		}
		b.Choices = append(b.Choices, choice)
	}
	return b
}

// getRecoveryFinding returns one finding, so that a caller need not list all of them to see how a
// decision ends.
func (s *server) getRecoveryFinding(w http.ResponseWriter, r *http.Request) error {
	text, err := pathParam(r, "finding")
	if err != nil {
		return err
	}
	if _, err := params(r); err != nil {
		return err
	}
	number, err := strconv.ParseInt(text, 10, 64)
	if err != nil || number < 1 {
		return tenant.Errorf(tenant.NotFound, "finding_not_found", "there is no such finding")
	}
	f, err := s.DB.Finding(r.Context(), number)
	if err != nil {
		return err
	}
	return respond(w, http.StatusOK, bodyOfRecoveryFinding(f))
}

type decisionBody struct {
	Finding int64              `json:"finding"`
	Kind    tenant.FindingKind `json:"kind"`
	Choice  string             `json:"choice"`
	Confirm string             `json:"confirm"`
}

type decidedBody struct {
	Decided int `json:"decided"`
}

func (s *server) postDecision(w http.ResponseWriter, r *http.Request) error {
	if _, err := params(r); err != nil {
		return err
	}
	var body decisionBody
	if err := decodeBody(w, r, &body, mayBeEmpty, "finding", "kind", "choice", "confirm"); err != nil {
		return err
	}
	switch {
	case body.Finding < 0 || (body.Finding == 0) == (body.Kind == ""):
		return invalid("finding", "give the number of a finding, or a kind to decide all findings of that kind, and not both")
	case body.Kind != "" && !slices.Contains(tenant.FindingKinds, body.Kind):
		return invalid("kind", "is not a kind of finding")
	}
	n, err := s.Service.Decide(r.Context(), body.Finding, body.Kind, tenant.RepairAction(body.Choice), body.Confirm, actorOf(r))
	if err != nil {
		return err
	}
	setRetryAfter(w, retryProvisioning)
	w.Header().Set("Location", "/v1/recovery/findings?kind="+string(body.Kind))
	if body.Finding > 0 {
		w.Header().Set("Location", fmt.Sprint("/v1/recovery/findings/", body.Finding))
	}
	return respond(w, http.StatusAccepted, decidedBody{n})
}

type retiredAppBody struct {
	ID          tenant.AppID `json:"id"`
	Profile     string       `json:"profile"`
	Incarnation uuid.UUID    `json:"incarnation"`
	CreatedAt   time.Time    `json:"created_at"`
	HasKey      bool         `json:"has_key"`
	Inputs      *int64       `json:"inputs,omitempty"`
}

type retiredAppsBody struct {
	Apps       []retiredAppBody `json:"apps"`
	NextCursor string           `json:"next_cursor,omitempty"`
}

func (s *server) listRetiredApps(w http.ResponseWriter, r *http.Request) error {
	q, err := params(r, "limit", "cursor")
	if err != nil {
		return err
	}
	limit, err := limitParam(q, defaultLimit, maxLimit)
	if err != nil {
		return err
	}
	var after tenant.RetiredApp
	if cursor := q.Get("cursor"); cursor != "" {
		at, id, ok := strings.Cut(cursor, " ")
		if after.CreatedAt, err = time.Parse(cursorTime, at); err != nil || !ok || id == "" {
			return invalid("cursor", "is not a next_cursor of this list")
		}
		after.ID = tenant.AppID(id)
	}
	apps, err := s.DB.Retired(r.Context(), after, limit+1)
	if err != nil {
		return err
	}
	body := retiredAppsBody{Apps: []retiredAppBody{}}
	if len(apps) > limit {
		apps = apps[:limit]
		last := apps[limit-1]
		body.NextCursor = last.CreatedAt.UTC().Format(cursorTime) + " " + string(last.ID)
	}
	for _, a := range apps {
		a.CreatedAt = a.CreatedAt.UTC()
		body.Apps = append(body.Apps, retiredAppBody(a))
	}
	return respond(w, http.StatusOK, body)
}

type removeRetiredBody struct {
	AppID   string `json:"app_id"`
	Before  string `json:"before"`
	Confirm string `json:"confirm"`
}

type removedBody struct {
	retiredCountBody
	Removing bool `json:"removing"`
}

// removeRetired removes retired apps. With before and without confirm it only counts the apps that
// would be removed.
func (s *server) removeRetired(w http.ResponseWriter, r *http.Request) error {
	if _, err := params(r); err != nil {
		return err
	}
	var body removeRetiredBody
	if err := decodeBody(w, r, &body, mayBeEmpty, "app_id", "before", "confirm"); err != nil {
		return err
	}
	if (body.AppID == "") == (body.Before == "") {
		return invalid("app_id", "give the id of a retired app, or in before a time to remove all apps that were begun before that time, and not both")
	}
	f, b := tenant.RetiredFilter{AppID: tenant.AppID(body.AppID)}, removedBody{retiredCountBody: retiredCountBody{Count: 1}}
	if body.Before != "" {
		var err error
		if f.Before, err = time.Parse(time.RFC3339, body.Before); err != nil {
			return invalid("before", "must be a time such as 2026-11-29T00:00:00Z")
		}
		count, err := s.DB.CountRetired(r.Context(), f)
		if err != nil {
			return err
		}
		b.retiredCountBody = retiredCountBody{count.Count, count.Oldest.UTC(), count.Newest.UTC()}
		if body.Confirm == "" {
			return respond(w, http.StatusOK, b)
		}
	}
	if err := s.Service.RemoveRetired(r.Context(), f, body.Confirm, actorOf(r)); err != nil {
		return err
	}
	b.Removing = true
	setRetryAfter(w, retryProvisioning)
	w.Header().Set("Location", "/v1/recovery/apps")
	return respond(w, http.StatusAccepted, b)
}
