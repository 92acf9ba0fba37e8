package httpapi

import (
	"errors"
	"math"
	"net/http"
	"time"

	"github.com/tenantry/tenantry/internal/tenant"
)

type callerBody struct {
	ID         string       `json:"id"`
	Name       string       `json:"name"`
	Role       tenant.Role  `json:"role"`
	Labels     tenant.Scope `json:"labels"`
	RateLimit  int          `json:"rate_limit,omitempty"`
	CreatedAt  time.Time    `json:"created_at"`
	ExpiresAt  time.Time    `json:"expires_at,omitzero"`
	RevokedAt  time.Time    `json:"revoked_at,omitzero"`
	LastUsedAt time.Time    `json:"last_used_at,omitzero"`
	ReplacedBy string       `json:"replaced_by,omitempty"`
	Token      string       `json:"token,omitempty"` // in the clear, in the one answer that shows it
}

func callerBodyOf(c tenant.Caller) callerBody {
	return callerBody{ID: c.TokenID, Name: c.Name, Role: c.Role, Labels: c.Scope, RateLimit: c.RateLimit, CreatedAt: c.CreatedAt.UTC(),
		ExpiresAt: c.ExpiresAt.UTC(), RevokedAt: c.RevokedAt.UTC(), LastUsedAt: c.LastUsedAt.UTC(), ReplacedBy: c.ReplacedBy}
}

type newCallerBody struct {
	Name      string            `json:"name"`
	Role      tenant.Role       `json:"role"`
	ExpiresAt *string           `json:"expires_at"`
	Labels    map[string]string `json:"labels"`
	RateLimit *float64          `json:"rate_limit"`
}

func (s *server) postCaller(w http.ResponseWriter, r *http.Request) error {
	if _, err := params(r); err != nil {
		return err
	}
	var body newCallerBody
	if err := decodeBody(w, r, &body, mayBeEmpty, "name", "role", "expires_at", "labels", "rate_limit"); err != nil {
		return err
	}
	c := tenant.NewCaller{Name: body.Name, Role: body.Role, Scope: body.Labels}
	var err error
	if c.ExpiresAt, err = timeField("expires_at", body.ExpiresAt); err != nil {
		return err
	}
	if limit := body.RateLimit; limit != nil {
		if *limit != math.Trunc(*limit) || *limit < 1 || *limit > tenant.MaxRateLimit {
			return invalid("rate_limit", "must be a whole number of requests a second from 1 to %d", tenant.MaxRateLimit)
		}
		c.RateLimit = int(*limit)
	}
	if err := c.Validate(time.Now()); err != nil {
		return err
	}
	token, text := tenant.NewToken()
	made, err := s.DB.AddCaller(r.Context(), token, c, actorOf(r))
	if err != nil {
		return err
	}
	return respondToken(w, made, text)
}

// respondToken shows the text of a token: this once.
func respondToken(w http.ResponseWriter, c tenant.Caller, text tenant.Secret) error {
	b := callerBodyOf(c)
	b.Token = text.Reveal()
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("Location", "/v1/callers/"+c.TokenID)
	return respond(w, http.StatusCreated, b)
}

// timeField reads a time in a body; nil is the zero time.
func timeField(field string, text *string) (time.Time, error) {
	if text == nil {
		return time.Time{}, nil
	}
	t, err := time.Parse(time.RFC3339, *text)
	if err != nil || t.IsZero() {
		return time.Time{}, invalid(field, "must be a time such as 2026-01-31T12:00:00Z")
	}
	return t, nil
}

func pathCallerID(r *http.Request) (string, error) {
	id, err := pathParam(r, "caller_id")
	if err == nil && !plausibleName(id) {
		err = tenant.Errorf(tenant.NotFound, "caller_not_found", "there is no such caller")
	}
	return id, err
}

type callerListBody struct {
	Callers    []callerBody `json:"callers"`
	NextCursor string       `json:"next_cursor,omitempty"`
}

func (s *server) listCallers(w http.ResponseWriter, r *http.Request) error {
	q, err := params(r, "limit", "cursor")
	if err != nil {
		return err
	}
	limit, err := limitParam(q, defaultLimit, maxLimit)
	if err != nil {
		return err
	}
	after := q.Get("cursor") // the id of the last caller before
	if after != "" {
		// Of an id that no caller has, a page would be empty.
		_, err := s.DB.Caller(r.Context(), after)
		if errors.Is(err, tenant.NotFound) {
			return invalid("cursor", "is not a next_cursor of this list")
		}
		if err != nil {
			return err
		}
	}
	callers, err := s.DB.Callers(r.Context(), after, limit+1)
	if err != nil {
		return err
	}
	body := callerListBody{Callers: []callerBody{}}
	if len(callers) > limit {
		callers = callers[:limit]
		body.NextCursor = callers[limit-1].TokenID
	}
	for _, c := range callers {
		body.Callers = append(body.Callers, callerBodyOf(c))
	}
	return respond(w, http.StatusOK, body)
}

func (s *server) getCaller(w http.ResponseWriter, r *http.Request) error {
	id, err := pathCallerID(r)
	if err != nil {
		return err
	}
	if _, err := params(r); err != nil {
		return err
	}
	c, err := s.DB.Caller(r.Context(), id)
	if err != nil {
		return err
	}
	return respond(w, http.StatusOK, callerBodyOf(c))
}

func (s *server) deleteCaller(w http.ResponseWriter, r *http.Request) error {
	id, err := pathCallerID(r)
	if err != nil {
		return err
	}
	if _, err := params(r); err != nil {
		return err
	}
	if err := decodeBody(w, r, &struct{}{}, mayBeEmpty); err != nil {
		return err
	}
	c, err := s.DB.RevokeCallerUnlessLast(r.Context(), id, actorOf(r))
	if err != nil {
		return err
	}
	return respond(w, http.StatusOK, callerBodyOf(c))
}

type tokenRotationBody struct {
	Overlap   *string `json:"overlap"`
	ExpiresAt *string `json:"expires_at"`
}

func (s *server) rotateCaller(w http.ResponseWriter, r *http.Request) error {
	id, err := pathCallerID(r)
	if err != nil {
		return err
	}
	if _, err := params(r); err != nil {
		return err
	}
	var body tokenRotationBody
	if err := decodeBody(w, r, &body, mayBeEmpty, "overlap", "expires_at"); err != nil {
		return err
	}
	rotation := tenant.TokenRotation{Overlap: tenant.DefaultTokenOverlap}
	if body.Overlap != nil {
		if rotation.Overlap, err = time.ParseDuration(*body.Overlap); err != nil {
			return invalid("overlap", "must be a duration such as 24h or 30m")
		}
	}
	if rotation.ExpiresAt, err = timeField("expires_at", body.ExpiresAt); err != nil {
		return err
	}
	if err := rotation.Validate(time.Now()); err != nil {
		return err
	}
	if rotation.Overlap == 0 && id == infoOf(r).caller.TokenID {
		return invalid("overlap", "must not be 0 for the token that the request is made with: if the answer were lost, neither token could be used")
	}
	next, text := tenant.NewToken()
	c, err := s.DB.RotateCaller(r.Context(), id, next, rotation, actorOf(r))
	if err != nil {
		return err
	}
	return respondToken(w, c, text)
}
