package httpapi

import (
	"encoding/base64"
	"encoding/json"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/tenant"
)

type auditEventBody struct {
	ID                int64           `json:"id"`
	At                time.Time       `json:"at"`
	Actor             string          `json:"actor"`
	Action            string          `json:"action"`
	TenantID          tenant.ID       `json:"tenant_id,omitempty"`
	AppID             tenant.AppID    `json:"app_id,omitempty"`
	KeyID             *uuid.UUID      `json:"key_id,omitempty"`
	RequestID         string          `json:"request_id,omitempty"`
	UpstreamRequestID string          `json:"upstream_request_id,omitempty"`
	Detail            json.RawMessage `json:"detail"`
}

func auditEventBodyOf(e tenant.AuditEvent) auditEventBody {
	b := auditEventBody{ID: e.ID, At: e.At.UTC(), Actor: e.Actor, Action: e.Action, TenantID: e.TenantID, AppID: e.AppID,
		RequestID: e.RequestID, UpstreamRequestID: e.UpstreamRequestID, Detail: e.Detail}
	if e.KeyID != uuid.Nil {
		b.KeyID = &e.KeyID
	}
	return b
}

type auditListBody struct {
	Events     []auditEventBody `json:"events"`
	NextCursor string           `json:"next_cursor,omitempty"`
}

// auditQuery is what a list of events asks for.
type auditQuery struct {
	filter      postgres.AuditFilter
	from        postgres.AuditPosition
	oldestFirst bool
	limit       int
}

func parseAuditQuery(r *http.Request) (auditQuery, error) {
	var a auditQuery
	q, err := params(r, "tenant", "app", "key_id", "actor", "action", "request_id", "after", "before", "order", "limit", "cursor")
	if err != nil {
		return a, err
	}
	for name := range q {
		if q.Get(name) == "" { // which would select everything
			return a, invalid(name, "is empty: give a value, or leave it out")
		}
	}
	a.filter = postgres.AuditFilter{TenantID: tenant.ID(q.Get("tenant")), AppID: tenant.AppID(q.Get("app")), Actor: q.Get("actor"),
		Action: q.Get("action"), RequestID: q.Get("request_id")}
	if text := q.Get("key_id"); text != "" {
		if a.filter.KeyID, err = uuid.Parse(text); err != nil || a.filter.KeyID == uuid.Nil {
			return a, invalid("key_id", "must be a UUID, as lists of keys show it")
		}
	}
	for name, field := range map[string]*time.Time{"after": &a.filter.After, "before": &a.filter.Before} {
		if text := q.Get(name); text != "" {
			if *field, err = time.Parse(time.RFC3339, text); err != nil {
				return a, invalid(name, "must be a time such as 2026-01-31T12:00:00Z")
			}
		}
	}
	switch order := q.Get("order"); order {
	case "", "desc":
	case "asc":
		a.oldestFirst = true
	default:
		return a, invalid("order", "must be asc or desc")
	}
	if a.limit, err = limitParam(q, defaultLimit, maxLimit); err != nil {
		return a, err
	}
	if text := q.Get("cursor"); text != "" {
		a.from, err = parseAuditCursor(text)
	}
	return a, err
}

func formatAuditCursor(p postgres.AuditPosition) string {
	return base64.RawURLEncoding.EncodeToString([]byte(p.At.UTC().Format(cursorTime) + " " + strconv.FormatInt(p.ID, 10)))
}

func parseAuditCursor(text string) (postgres.AuditPosition, error) {
	bad := invalid("cursor", "is not a next_cursor of this list")
	raw, err := base64.RawURLEncoding.DecodeString(text)
	if err != nil {
		return postgres.AuditPosition{}, bad
	}
	at, number, _ := strings.Cut(string(raw), " ")
	t, err := time.Parse(cursorTime, at)
	if err != nil || t.Year() < 1 || t.Year() > 9999 {
		return postgres.AuditPosition{}, bad
	}
	id, err := strconv.ParseInt(number, 10, 64)
	if err != nil {
		return postgres.AuditPosition{}, bad
	}
	return postgres.AuditPosition{At: t, ID: id}, nil
}

func (s *server) listAudit(w http.ResponseWriter, r *http.Request) error {
	a, err := parseAuditQuery(r)
	if err != nil {
		return err
	}
	// One more than is asked for tells whether there is another page.
	events, err := s.DB.AuditEvents(r.Context(), a.filter, a.from, a.oldestFirst, a.limit+1)
	if err != nil {
		return err
	}
	body := auditListBody{Events: []auditEventBody{}}
	if len(events) > a.limit {
		events = events[:a.limit]
		last := events[a.limit-1]
		body.NextCursor = formatAuditCursor(postgres.AuditPosition{At: last.At, ID: last.ID})
	}
	for _, e := range events {
		body.Events = append(body.Events, auditEventBodyOf(e))
	}
	return respond(w, http.StatusOK, body)
}
