package httpapi

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"mime"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/tenant"
)

// invalid says what is wrong with one part of a request.
func invalid(field, format string, args ...any) error {
	return &tenant.Error{Kind: tenant.Invalid, Code: "invalid_request", Field: field, Detail: fmt.Sprintf(format, args...)}
}

// A bodyRule says what is special about a request's body.
type bodyRule int

const (
	mayBeEmpty  bodyRule = iota // a body that is missing or empty leaves the fields unset
	holdsSecret                 // not even the names of unknown fields are repeated
	holdsItems                  // may not be empty
	mergePatch                  // RFC 7396: a field that is null is to be removed
)

// decodeBody reads a JSON object into v. Fields are named exactly, and no others
// than known are taken. Values are not repeated in errors: they may be secrets.
func decodeBody(w http.ResponseWriter, r *http.Request, v any, rule bodyRule, known ...string) error {
	body, err := readBody(w, r, rule, MaxBodyBytes)
	if err != nil || body == nil {
		return err
	}
	return decodeObject(body, v, rule, known...)
}

// readBody reads a body of at most so many bytes, in UTF-8. It returns nil for one that is
// empty and may be.
func readBody(w http.ResponseWriter, r *http.Request, rule bodyRule, most int64) ([]byte, error) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, most))
	if _, tooLarge := errors.AsType[*http.MaxBytesError](err); tooLarge {
		return nil, tenant.Errorf(tenant.TooLarge, "body_too_large", "the body may have %d bytes at most", most)
	}
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, invalid("body", "was not sent in full within %s", ReadTimeout)
	case errors.Is(err, io.ErrUnexpectedEOF):
		return nil, invalid("body", "ended early: it is shorter than its Content-Length, or its last chunk is missing")
	case err != nil:
		return nil, invalid("body", "was not sent as HTTP demands, or the connection broke")
	}
	if len(bytes.TrimSpace(body)) == 0 {
		if rule == mayBeEmpty {
			return nil, nil
		}
		return nil, invalid("body", "is empty: it must be a JSON object")
	}
	if err := checkBodyHeaders(w, r, rule); err != nil {
		return nil, err
	}
	if !utf8.Valid(body) {
		return nil, invalid("body", "is not valid UTF-8")
	}
	return body, nil
}

// decodeObject is decodeBody of a JSON object that was read.
func decodeObject(body []byte, v any, rule bodyRule, known ...string) error {
	// encoding/json takes a field in any spelling of upper and lower case, and null
	// for an object.
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(body, &fields); err != nil {
		return bodyFault(err)
	}
	if fields == nil {
		return invalid("body", "is null, and must be an object")
	}
	for name := range fields {
		if slices.Contains(known, name) {
			continue
		}
		if rule == holdsSecret {
			name = "" // no name is printed
		}
		return unknown(name, "body", "a field", known)
	}
	if err := checkJSON(body, rule); err != nil {
		return err
	}
	if err := json.Unmarshal(body, v); err != nil {
		return bodyFault(err)
	}
	return nil
}

// checkBodyHeaders refuses a body that is encoded in another way than it is read.
func checkBodyHeaders(w http.ResponseWriter, r *http.Request, rule bodyRule) error {
	for _, coding := range strings.Split(strings.Join(r.Header.Values("Content-Encoding"), ","), ",") {
		if coding = strings.TrimSpace(coding); coding != "" && !strings.EqualFold(coding, "identity") {
			w.Header().Set("Accept-Encoding", "identity")
			return unsupported("Content-Encoding", "content_encoding_unsupported", "must be identity, or left out: bodies are not taken compressed")
		}
	}
	ct := r.Header.Get("Content-Type")
	if ct == "" {
		return nil
	}
	mt, params, err := mime.ParseMediaType(ct)
	if patch := rule == mergePatch && mt == "application/merge-patch+json"; err != nil || mt != "application/json" && !patch {
		return unsupported("Content-Type", "content_type_unsupported", "must be application/json")
	}
	if charset, ok := params["charset"]; ok && !strings.EqualFold(charset, "utf-8") {
		return unsupported("Content-Type", "content_type_unsupported", "must be application/json in the charset utf-8")
	}
	return nil
}

func unsupported(header, code, detail string) error {
	return &statusError{http.StatusUnsupportedMediaType, &tenant.Error{Kind: tenant.Invalid, Code: code, Field: header, Detail: detail}}
}

// checkJSON refuses what encoding/json passes over in an object that it has found
// valid and whose fields are all known: of a name that is repeated it takes the
// last, null it takes for a field that was left out, and half of a surrogate pair
// it replaces by U+FFFD.
func checkJSON(body []byte, rule bodyRule) error {
	if i := loneSurrogate(body); i >= 0 {
		return invalid("body", "has at byte %d a \\u escape that is half of a surrogate pair", i)
	}
	var field string // the field of the request that is being read
	d := json.NewDecoder(bytes.NewReader(body))
	d.UseNumber()
	type level struct {
		names map[string]bool // nil in an array
		value bool            // the next token of an object is a value
	}
	var levels []level
	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return bodyFault(err)
		}
		if token == json.Delim('}') || token == json.Delim(']') {
			levels = levels[:len(levels)-1]
			continue
		}
		if n := len(levels) - 1; n >= 0 && levels[n].names != nil {
			top := &levels[n]
			if top.value = !top.value; top.value {
				name := token.(string)
				if n == 0 {
					field = name
				}
				if top.names[name] {
					if n == 0 {
						return invalid(field, "is given twice")
					}
					return invalid(field, "holds an object that gives one name twice")
				}
				top.names[name] = true
				continue
			}
		}
		switch token {
		case nil:
			if rule == mergePatch {
				continue
			}
			if len(levels) == 1 {
				return invalid(field, "is null: give a value, or leave it out")
			}
			return invalid(field, "holds a null at byte %d: give a value, or leave it out", d.InputOffset()-int64(len("null")))
		case json.Delim('{'):
			levels = append(levels, level{names: map[string]bool{}})
		case json.Delim('['):
			levels = append(levels, level{})
		}
	}
}

// loneSurrogate returns where in a valid JSON text a \u escape is half of a pair
// without the other, or -1.
func loneSurrogate(text []byte) int {
	for i := 0; i < len(text); i++ {
		if text[i] != '\\' { // occurs in strings only
			continue
		}
		r, ok := escapedRune(text[i:])
		switch {
		case !ok:
			i++ // the escaped character may be a backslash itself
		case !utf16.IsSurrogate(r):
			i += len(`u0000`)
		default:
			low, _ := escapedRune(text[i+len(`\u0000`):])
			if utf16.DecodeRune(r, low) == utf8.RuneError {
				return i
			}
			i += len(`u0000\u0000`)
		}
	}
	return -1
}

// escapedRune reads the \u escape that text begins with, if it does.
func escapedRune(text []byte) (rune, bool) {
	if len(text) < len(`\u0000`) || text[0] != '\\' || text[1] != 'u' {
		return 0, false
	}
	n, err := strconv.ParseUint(string(text[2:6]), 16, 16)
	return rune(n), err == nil
}

func bodyFault(err error) error {
	if e, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		field := "body"
		if e.Field != "" {
			field = e.Field
		}
		return invalid(field, "is a JSON %s at byte %d, and must be %s", e.Value, e.Offset, jsonKind(e.Type.Kind().String()))
	}
	if e, ok := errors.AsType[*json.SyntaxError](err); ok {
		return invalid("body", "is not one valid JSON object: the fault is at byte %d", e.Offset)
	}
	return invalid("body", "is not valid JSON")
}

func jsonKind(goKind string) string {
	switch goKind {
	case "struct", "map":
		return "an object"
	case "slice":
		return "an array"
	case "string":
		return "a string"
	case "bool":
		return "true or false"
	}
	return "a number"
}

// repeatable are the query parameters that the contract allows several times.
var repeatable = []string{"label"}

// maxParam bounds a query parameter's value, in bytes.
const maxParam = 1024

// params reads the query. It refuses what it cannot read, and parameters that are
// repeated or not known: r.URL.Query drops a pair with a mistake, and a filter that
// is dropped selects everything.
func params(r *http.Request, known ...string) (url.Values, error) {
	if r.URL.RawQuery == "" {
		return nil, nil
	}
	q, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, invalid("query", "is not made of name=value pairs, percent-encoded, with & between them (a %% is %%25, a ; is %%3B)")
	}
	for _, name := range slices.Sorted(maps.Keys(q)) {
		values := q[name]
		switch {
		case !slices.Contains(known, name):
			return nil, unknown(name, "query", "a parameter", known)
		case len(values) > 1 && !slices.Contains(repeatable, name):
			return nil, invalid(name, "is given %d times", len(values))
		}
		for _, v := range values {
			if strings.ContainsRune(v, 0) || len(v) > maxParam || !utf8.ValidString(v) {
				return nil, invalid(name, "holds a zero byte, is not valid UTF-8 or is longer than %d bytes", maxParam)
			}
		}
	}
	return q, nil
}

// unknown says that a part of a request has a name that is not known. The name is
// repeated only where it is short and printable: it is a stranger's text.
func unknown(name, part, what string, known []string) error {
	if name == "" || len(name) > 64 || strings.ContainsFunc(name, func(r rune) bool { return !unicode.IsPrint(r) || r == utf8.RuneError }) || isTokenLike(name) {
		return invalid(part, "has %s that this request does not know; there are: %s", what, orNone(known))
	}
	return invalid(name, "is not %s of this request; there are: %s", what, orNone(known))
}

func orNone(names []string) string {
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}

// waitParam reads ?wait=N, in seconds.
func waitParam(q url.Values) (time.Duration, error) {
	text := q.Get("wait")
	if text == "" {
		return 0, nil
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 0 || n > int(maxWait/time.Second) {
		return 0, invalid("wait", "must be a whole number of seconds from 0 to %d", int(maxWait/time.Second))
	}
	return time.Duration(n) * time.Second, nil
}

// limitParam reads ?limit=N, the length of a page.
func limitParam(q url.Values, otherwise, most int) (int, error) {
	text := q.Get("limit")
	if text == "" {
		return otherwise, nil
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 || n > most {
		return 0, invalid("limit", "must be a whole number from 1 to %d", most)
	}
	return n, nil
}

// A preference is what a caller prefers of RFC 7240, as far as it is honoured.
type preference struct {
	wait    time.Duration
	applied string // for Preference-Applied; empty when nothing was preferred
}

// parsePrefer reads the Prefer headers of a request that waits for otherwise if they
// do not say how long. What it does not know or cannot read it passes over, as the RFC
// demands; of a preference that is repeated the first counts.
func parsePrefer(headers []string, otherwise time.Duration) preference {
	p := preference{wait: otherwise}
	var async, waits bool
	for _, header := range headers {
		for _, item := range splitQuoted(header, ',') {
			parts := splitQuoted(item, ';')
			if len(parts) == 0 {
				continue
			}
			name, value, _ := strings.Cut(parts[0], "=") // parameters mean nothing to us
			switch name = strings.ToLower(strings.TrimSpace(name)); {
			case name == "respond-async" && !async:
				async = true
			case name == "wait" && !waits:
				n, ok := seconds(value)
				if !ok {
					continue
				}
				waits = true
				p.wait = min(n, maxWait)
			}
		}
	}
	switch {
	case waits:
		p.applied = "wait=" + strconv.Itoa(int(p.wait/time.Second))
	case async:
		p.wait, p.applied = 0, "respond-async"
	}
	return p
}

// seconds reads a number of seconds, quoted or not. What is too large for a number
// is more than anybody waits.
func seconds(text string) (time.Duration, bool) {
	text = strings.TrimSpace(text)
	if len(text) >= 2 && text[0] == '"' && text[len(text)-1] == '"' {
		text = text[1 : len(text)-1]
	}
	n, err := strconv.ParseUint(text, 10, 31)
	if errors.Is(err, strconv.ErrRange) {
		return math.MaxInt64, true
	}
	return time.Duration(n) * time.Second, err == nil
}

// splitQuoted splits a header at sep, but not within quotes. A last item whose
// quotes are not closed is left out: where it would end cannot be known.
func splitQuoted(header string, sep byte) []string {
	var items []string
	start, quoted := 0, false
	for i := 0; i < len(header); i++ {
		switch {
		case header[i] == '"':
			quoted = !quoted
		case header[i] == '\\' && quoted:
			i++
		case header[i] == sep && !quoted:
			items = append(items, header[start:i])
			start = i + 1
		}
	}
	if quoted {
		return items
	}
	return append(items, header[start:])
}

// durationField reads a duration in a body: a number of seconds, or text such as 90m,
// 24h or 7d. Nil is one that was left out.
func durationField(name string, raw json.RawMessage) (*time.Duration, error) {
	if len(raw) == 0 {
		return nil, nil
	}
	bad := invalid(name, `must be a number of seconds, or text such as "90m", "24h" or "7d"`)
	var seconds float64
	if json.Unmarshal(raw, &seconds) == nil {
		if math.Abs(seconds) > float64(math.MaxInt64/int64(time.Second)) {
			return nil, bad
		}
		d := time.Duration(seconds * float64(time.Second))
		return &d, nil
	}
	var text string
	if json.Unmarshal(raw, &text) != nil {
		return nil, bad
	}
	if days, ok := strings.CutSuffix(text, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 16)
		if err != nil {
			return nil, bad
		}
		d := time.Duration(n) * 24 * time.Hour
		return &d, nil
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		return nil, bad
	}
	return &d, nil
}

// listQuery is what a list asks for.
type listQuery struct {
	filter postgres.TenantFilter
	after  postgres.Position
	limit  int
}

const defaultLimit, maxLimit = 100, 1000

func parseListQuery(r *http.Request) (listQuery, error) {
	var l listQuery
	q, err := params(r, "state", "profile", "label", "id_prefix", "created_after", "created_before", "problem", "limit", "cursor")
	if err != nil {
		return l, err
	}
	l.filter = postgres.TenantFilter{State: tenant.State(q.Get("state")), Profile: q.Get("profile"), IDPrefix: q.Get("id_prefix")}
	if s := l.filter.State; s != "" && !slices.Contains(tenant.States, s) {
		return l, invalid("state", "must be one of %v", tenant.States)
	}
	for _, text := range q["label"] {
		key, value, ok := strings.Cut(text, "=")
		if !ok || key == "" {
			return l, invalid("label", "must read key=value")
		}
		if l.filter.Labels == nil {
			l.filter.Labels = map[string]string{}
		}
		if was, ok := l.filter.Labels[key]; ok && was != value {
			return l, invalid("label", "asks for two values of one key, which no tenant has")
		}
		l.filter.Labels[key] = value
	}
	for name, field := range map[string]*time.Time{"created_after": &l.filter.CreatedAfter, "created_before": &l.filter.CreatedBefore} {
		if text := q.Get(name); text != "" {
			t, err := time.Parse(time.RFC3339, text)
			if err != nil {
				return l, invalid(name, "must be a time such as 2026-01-31T12:00:00Z")
			}
			*field = t
		}
	}
	if text := q.Get("problem"); text != "" {
		b, err := strconv.ParseBool(text)
		if err != nil {
			return l, invalid("problem", "must be true or false")
		}
		l.filter.HasProblem = &b
	}
	if l.limit, err = limitParam(q, defaultLimit, maxLimit); err != nil {
		return l, err
	}
	if text := q.Get("cursor"); text != "" {
		if l.after, err = parseCursor(text); err != nil {
			return l, err
		}
	}
	return l, nil
}

// formatCursor turns a position into text that callers pass back unread.
func formatCursor(p postgres.Position) string {
	return base64.RawURLEncoding.EncodeToString([]byte(p.CreatedAt.UTC().Format(cursorTime) + " " + string(p.ID)))
}

// cursorTime is as exact as Postgres.
const cursorTime = "2006-01-02T15:04:05.000000Z"

func parseCursor(text string) (postgres.Position, error) {
	bad := invalid("cursor", "is not a next_cursor of this list")
	raw, err := base64.RawURLEncoding.DecodeString(text)
	if err != nil {
		return postgres.Position{}, bad
	}
	at, id, ok := strings.Cut(string(raw), " ")
	if !ok {
		return postgres.Position{}, bad
	}
	t, err := time.Parse(cursorTime, at)
	if err != nil || t.Year() < 1 || t.Year() > 9999 {
		return postgres.Position{}, bad
	}
	tenantID, err := tenant.ParseID(id)
	if err != nil {
		return postgres.Position{}, bad
	}
	return postgres.Position{CreatedAt: t, ID: tenantID}, nil
}
