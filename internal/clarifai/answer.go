package clarifai

import (
	"encoding/json"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/tenantry/tenantry/internal/tenant"
)

// An answer is what Clarifai, or something on the way to it, sent.
type answer struct {
	http      int
	mediaType string
	requestID string // as sent: see cleanRequestID
	body      []byte
	// retryAfter is for how long the sender asks not to be called; 0 if it does not.
	retryAfter time.Duration
	status     *status // nil: the answer is no envelope of Clarifai's
}

// A status is the part of an envelope that says how a call went.
type status struct {
	code    int    // 0 for a name that we do not know
	name    string // where the code was sent by name
	detail  string // as sent: see clean
	movedTo string
}

func parseAnswer(httpStatus int, header http.Header, body []byte) answer {
	a := answer{http: httpStatus, body: body, requestID: header.Get("X-Clarifai-Request-Id"), retryAfter: parseRetryAfter(header)}
	a.mediaType, _, _ = mime.ParseMediaType(header.Get("Content-Type"))
	var envelope struct {
		Status map[string]json.RawMessage `json:"status"`
	}
	if json.Unmarshal(body, &envelope) != nil {
		return a
	}
	var s status
	if s.code, s.name = parseCode(envelope.Status["code"]); s.code == 0 && s.name == "" {
		return a
	}
	// What is optional may be of another type than we think without hiding how the
	// call went.
	text := func(fields map[string]json.RawMessage, name string) string {
		var t string
		_ = json.Unmarshal(fields[name], &t)
		return t
	}
	s.detail = text(envelope.Status, "description")
	if details := text(envelope.Status, "details"); details != "" && details != s.detail {
		s.detail = strings.TrimPrefix(s.detail+": "+details, ": ")
	}
	var redirect map[string]json.RawMessage
	_ = json.Unmarshal(envelope.Status["redirect_info"], &redirect)
	s.movedTo = text(redirect, "new_resource_id")
	if id := text(envelope.Status, "req_id"); id != "" {
		a.requestID = id
	}
	a.status = &s
	return a
}

// maxRetryAfter bounds what is believed of a Retry-After.
const maxRetryAfter = time.Hour

// parseRetryAfter reads the header Retry-After: seconds or a date. A date is compared with the sender's
// own clock if the response has it.
func parseRetryAfter(header http.Header) time.Duration {
	value := strings.TrimSpace(header.Get("Retry-After"))
	if seconds, err := strconv.Atoi(value); err == nil || errors.Is(err, strconv.ErrRange) {
		return time.Duration(min(max(seconds, 0), int(maxRetryAfter/time.Second))) * time.Second
	}
	at, err := http.ParseTime(value)
	if err != nil {
		return 0
	}
	now, err := http.ParseTime(header.Get("Date"))
	if err != nil {
		now = time.Now()
	}
	return min(max(at.Sub(now), 0), maxRetryAfter)
}

// parseCode reads a status code, which Clarifai sends as a number and, on one of
// its pages, as a name.
func parseCode(raw json.RawMessage) (code int, name string) {
	if json.Unmarshal(raw, &code) == nil {
		return code, ""
	}
	if json.Unmarshal(raw, &name) != nil {
		return 0, ""
	}
	if n, err := strconv.Atoi(name); err == nil {
		return n, ""
	}
	return codesByName[name], name
}

// decode reads the answer's own part of the body.
func (a answer) decode(into any) bool { return json.Unmarshal(a.body, into) == nil }

// failure says what an answer that is no success means, or returns nil. Unclear is
// set as for a call that changes something.
func (a answer) failure(call string, also int) *tenant.UpstreamError {
	if a.status == nil {
		return a.strange()
	}
	s := a.status
	if s.code == codeSuccess || s.code != 0 && s.code == also {
		return nil
	}
	e := &tenant.UpstreamError{Code: s.code, HTTP: a.http, Detail: s.detail, RequestID: a.requestID, RetryAfter: a.retryAfter}
	m := meaningOf(s.code, a.http)
	e.Class, e.Unclear, e.TooMuch = m.class, m.unclear, slices.Contains(tooMuchCodes, s.code)
	switch lower := strings.ToLower(s.detail); {
	case s.code == codeInvalidRequest && call == callPostApps && (strings.Contains(lower, "exist") || strings.Contains(lower, "duplicate")):
		e.Class = tenant.UpstreamDuplicate // the documented code is 40010; this one was heard of
	case s.code == codeInvalidRequest && strings.Contains(lower, "authorization header"):
		e.Class = tenant.UpstreamPAT // a PAT of an impossible form, or a proxy that took it out
	case s.code == codeMoved:
		e.Moved = true
		if s.movedTo != "" {
			e.Detail = "moved to " + s.movedTo + ": " + s.detail
		}
	case s.code == 0:
		e.Detail = strings.TrimSuffix(s.name+": "+s.detail, ": ")
	}
	if e.Detail == "" {
		e.Detail = fmt.Sprintf("HTTP %d without a description", a.http)
	}
	return e
}

// strange says what an answer means that is not Clarifai's: a proxy, a load
// balancer or a captive portal spoke. Whatever its HTTP status, it says nothing
// about the PAT or about what exists: a 401 must not stop the fleet until a new
// PAT comes, and a 404 must not count as "removed". It is tried again like any
// outage.
func (a answer) strange() *tenant.UpstreamError {
	e := &tenant.UpstreamError{Class: tenant.UpstreamDown, HTTP: a.http, RequestID: a.requestID, Unclear: true, RetryAfter: a.retryAfter}
	what := a.mediaType
	if len(a.body) == 0 {
		what = "an empty body"
	} else if what == "" {
		what = "a body of no type"
	}
	e.Detail = fmt.Sprintf("HTTP %d with %s instead of Clarifai's answer", a.http, what)
	switch {
	case a.http == http.StatusTooManyRequests:
		// A limiter refuses before it passes a request on.
		e.Class, e.Unclear = tenant.UpstreamThrottled, false
	case a.http == http.StatusGatewayTimeout:
		e.TooMuch = true
	case a.http >= 300 && a.http < 400:
		e.Detail = fmt.Sprintf("HTTP %d, a redirect, which is not followed: is the base URL right?", a.http)
	}
	return e
}

const maxDetail = 300 // characters

// clean makes what a stranger wrote fit to be stored, shown and logged: one line of
// valid text, shortened, without the secrets, which Clarifai may echo.
func clean(text string, secrets []tenant.Secret) string {
	text = scrub(text, secrets)
	text = strings.ToValidUTF8(text, "\uFFFD")
	text = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) { // control characters, line ends, marks that turn the writing
			return ' '
		}
		return r
	}, text)
	text = strings.Join(strings.Fields(text), " ")
	if r := []rune(text); len(r) > maxDetail {
		text = string(r[:maxDetail-1]) + "…"
	}
	return text
}

func scrub(text string, secrets []tenant.Secret) string {
	for _, s := range secrets {
		if !s.IsSet() || s.Reveal() == "" {
			continue
		}
		for _, form := range []string{s.Reveal(), url.PathEscape(s.Reveal()), url.QueryEscape(s.Reveal())} {
			text = strings.ReplaceAll(text, form, tenant.Secret{}.String())
		}
	}
	return text
}

// cleanRequestID returns id, or "" for what cannot be one.
func cleanRequestID(id string, secrets []tenant.Secret) string {
	if len(id) > 128 || !printable(id) || scrub(id, secrets) != id {
		return ""
	}
	return id
}
