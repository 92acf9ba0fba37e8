package httpapi

import (
	"context"
	"encoding/json"
	"errors"
	"math"
	"net/http"
	"strconv"
	"time"

	"github.com/google/uuid"

	"github.com/tenantry/tenantry/internal/tenant"
)

// problemDetails is RFC 9457.
type problemDetails struct {
	Type      string `json:"type"`
	Title     string `json:"title"`
	Status    int    `json:"status"`
	Detail    string `json:"detail"`
	Code      string `json:"code"`
	RequestID string `json:"request_id"`
	Field     string `json:"field,omitempty"`
	// Of a change that the tenant's state does not allow.
	State   tenant.State    `json:"state,omitempty"`
	Allowed []tenant.Change `json:"allowed_changes,omitempty"`
}

// statusClientGone is logged for a caller that went away: nobody reads it.
const statusClientGone = 499

// A statusError answers with a status that its kind does not have.
type statusError struct {
	status int
	err    *tenant.Error
}

func (e *statusError) Error() string { return e.err.Error() }
func (e *statusError) Unwrap() error { return e.err }

// statusOf maps a kind of failure to its HTTP status; false means that the kind
// is unknown.
func statusOf(kind tenant.Kind) (int, bool) {
	switch kind {
	case tenant.Invalid:
		return http.StatusBadRequest, true
	case tenant.Unauthenticated:
		return http.StatusUnauthorized, true
	case tenant.Forbidden:
		return http.StatusForbidden, true
	case tenant.NotFound:
		return http.StatusNotFound, true
	case tenant.Conflict:
		return http.StatusConflict, true
	case tenant.Precondition:
		return http.StatusPreconditionFailed, true
	case tenant.TooLarge:
		return http.StatusRequestEntityTooLarge, true
	case tenant.TooMany:
		return http.StatusTooManyRequests, true
	case tenant.Unavailable:
		return http.StatusServiceUnavailable, true
	}
	return http.StatusInternalServerError, false
}

// writeProblem answers with the problem document of err. What is no
// *tenant.Error is a fault of ours: it is logged, and answered without its text.
func (s *server) writeProblem(w http.ResponseWriter, r *http.Request, err error) {
	info := infoOf(r)
	info.err = err
	if isGone(r, err) {
		w.WriteHeader(statusClientGone)
		return
	}
	err = s.unknownInRecovery(w, r, err)
	p, retryAfter := problemOf(err, info.id)
	if p.Status == http.StatusUnauthorized {
		w.Header().Set("WWW-Authenticate", `Bearer realm="tenantry"`)
	}
	if p.Status >= 500 || p.Status == http.StatusTooManyRequests {
		setRetryAfter(w, max(retryAfter, time.Second))
	}
	w.Header().Del("ETag")
	writeJSON(w, p.Status, "application/problem+json", p)
}

// unknownInRecovery replaces "not found" of a tenant or app by ErrRecoveryUnknown while the database
// is in recovery mode, since its row may be lost. A stale response stays as it is.
func (s *server) unknownInRecovery(w http.ResponseWriter, r *http.Request, err error) error {
	e, ok := errors.AsType[*tenant.Error](err)
	if !ok || e.Kind != tenant.NotFound || e.Code != "tenant_not_found" && e.Code != "app_not_found" || w.Header().Get(staleHeader) != "" {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), time.Second) // the database may hang
	defer cancel()
	if recovery, failed := s.DB.Recovery(ctx); failed != nil || !recovery.Active() {
		return err
	}
	return tenant.ErrRecoveryUnknown
}

// problemOf is the problem document of err, and when to try again, if that is known.
func problemOf(err error, requestID string) (p problemDetails, retryAfter time.Duration) {
	p = problemDetails{Type: "about:blank", RequestID: requestID, Status: http.StatusInternalServerError, Code: "internal",
		Detail: "Tenantry failed; its log says why, under this request_id"}
	if e, ok := errors.AsType[*tenant.Error](err); ok {
		if status, known := statusOf(e.Kind); known {
			p.Status, p.Code, p.Detail, p.Field, p.State, p.Allowed = status, e.Code, e.Detail, e.Field, e.State, e.Allowed
			retryAfter = e.RetryAfter
			if p.Code == "" {
				p.Code = string(e.Kind)
			}
		}
	}
	if e, ok := errors.AsType[*statusError](err); ok {
		p.Status = e.status
	}
	p.Title = http.StatusText(p.Status)
	return p, retryAfter
}

func setRetryAfter(w http.ResponseWriter, d time.Duration) {
	w.Header().Set("Retry-After", strconv.Itoa(max(1, int(math.Ceil(d.Seconds())))))
}

func writeJSON(w http.ResponseWriter, status int, contentType string, body any) {
	w.Header().Set("Content-Type", contentType)
	w.WriteHeader(status)
	if a, ok := body.(appender); ok {
		if text, ok := a.appendJSON(make([]byte, 0, 512)); ok {
			_, _ = w.Write(append(text, '\n')) // the caller went away: nobody is left to tell
			return
		}
	}
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(body) // the caller went away: nobody is left to tell
}

func respond(w http.ResponseWriter, status int, body any) error {
	writeJSON(w, status, "application/json", body)
	return nil
}

// NotStarted answers a request that comes before the service has started.
func NotStarted(w http.ResponseWriter) {
	id := uuid.NewString()
	w.Header().Set("X-Request-Id", id)
	setRetryAfter(w, 2*time.Second)
	writeJSON(w, http.StatusServiceUnavailable, "application/problem+json", problemDetails{Type: "about:blank",
		Title: http.StatusText(http.StatusServiceUnavailable), Status: http.StatusServiceUnavailable, Code: "starting",
		Detail: "the service is starting, or waits for its database; try again", RequestID: id})
}
