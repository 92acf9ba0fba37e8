package httpapi

import (
	"encoding/json"
	"net/http"
	"strconv"
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
	from        int64 // the id of the event before; 0 means none
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

// parseAuditCursor reads the id of an event, in the form that strconv.FormatInt writes.
func parseAuditCursor(text string) (int64, error) {
	id, err := strconv.ParseInt(text, 10, 64)
	if err != nil || id < 1 || strconv.FormatInt(id, 10) != text {
		return 0, invalid("cursor", "must be a next_cursor of this list, or the id of an event")
	}
	return id, nil
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
		body.NextCursor = strconv.FormatInt(events[a.limit-1].ID, 10)
	}
	for _, e := range events {
		body.Events = append(body.Events, auditEventBodyOf(e))
	}
	return respond(w, http.StatusOK, body)
}
