package httpapi

import (
	"maps"
	"slices"
	"strconv"
	"time"
)

// An appender is a body that can append itself to b as encoding/json would write it, in less time
// and without garbage. What has a part that it does not know how to write it refuses, and
// encoding/json writes it.
type appender interface {
	appendJSON(b []byte) (_ []byte, ok bool)
}

func (t tenantBody) appendJSON(b []byte) ([]byte, bool) {
	if t.Problem != nil || t.Credentials != nil || t.Adoption != nil || t.Deletion != nil || t.Labels == nil {
		return b, false
	}
	ok := true
	text := func(name, value string) {
		ok = ok && isPlain(value)
		b = append(append(append(append(append(b, `,"`...), name...), `":"`...), value...), '"')
	}
	instant := func(name string, at time.Time) {
		ok = ok && at.Location() == time.UTC && at.Year() >= 0 && at.Year() <= 9999
		b = append(at.AppendFormat(append(append(append(b, `,"`...), name...), `":"`...), time.RFC3339Nano), '"')
	}
	start := len(b)
	text("id", string(t.ID))
	b[start] = '{'
	text("state", string(t.State))
	text("profile", t.Profile)
	if t.App != nil {
		b = append(b, `,"app":`...)
		start = len(b)
		text("id", string(t.App.ID))
		b[start] = '{'
		text("user_id", string(t.App.UserID))
		b = append(b, '}')
	}
	text("display_name", t.DisplayName)
	b = append(b, `,"labels":{`...)
	switch len(t.Labels) {
	case 0:
	case 1: // as with most: there is nothing to sort
		for name, value := range t.Labels {
			b, ok = appendLabel(b, name, value, ok)
		}
	default:
		for i, name := range slices.Sorted(maps.Keys(t.Labels)) {
			if i > 0 {
				b = append(b, ',')
			}
			b, ok = appendLabel(b, name, t.Labels[name], ok)
		}
	}
	b = strconv.AppendBool(append(b, `},"deletion_protection":`...), t.DeletionProtection)
	b = strconv.AppendInt(append(b, `,"generation":`...), int64(t.Generation), 10)
	instant("created_at", t.CreatedAt)
	instant("updated_at", t.UpdatedAt)
	return append(b, '}'), ok
}

func appendLabel(b []byte, name, value string, ok bool) ([]byte, bool) {
	b = append(append(append(append(append(b, '"'), name...), `":"`...), value...), '"')
	return b, ok && isPlain(name) && isPlain(value)
}

func (l tenantListBody) appendJSON(b []byte) ([]byte, bool) {
	if l.Tenants == nil || !isPlain(l.NextCursor) {
		return b, false
	}
	b = append(b, `{"tenants":[`...)
	for i, t := range l.Tenants {
		if i > 0 {
			b = append(b, ',')
		}
		var ok bool
		if b, ok = t.appendJSON(b); !ok {
			return b, false
		}
	}
	b = append(b, ']')
	if l.NextCursor != "" {
		b = append(append(append(b, `,"next_cursor":"`...), l.NextCursor...), '"')
	}
	return append(b, '}'), true
}

// isPlain reports whether a text stands in JSON as it is.
func isPlain(s string) bool {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '"' || c == '\\' {
			return false
		}
	}
	return true
}
