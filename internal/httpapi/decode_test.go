package httpapi_test

import (
	"encoding/json"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/tenantry/tenantry/internal/httpapi"
	"github.com/tenantry/tenantry/internal/tenant"
)

func TestParsePrefer(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		headers []string
		wait    time.Duration
		applied string
	}{
		{nil, 10 * time.Second, ""},
		{[]string{"wait=5"}, 5 * time.Second, "wait=5"},
		{[]string{`Wait="5"; x=y`}, 5 * time.Second, "wait=5"},
		{[]string{"wait=0"}, 0, "wait=0"},
		{[]string{"wait=61"}, time.Minute, "wait=60"},
		{[]string{"wait=99999999999999999999"}, time.Minute, "wait=60"},
		{[]string{"wait=4294967296"}, time.Minute, "wait=60"},
		{[]string{`foo="a, wait=3", wait=4`}, 4 * time.Second, "wait=4"},
		{[]string{`foo="a\", wait=3"`}, 10 * time.Second, ""},
		{[]string{`wait=5; note="a;b,wait=3"`}, 5 * time.Second, "wait=5"},
		{[]string{`wait="5`}, 10 * time.Second, ""},
		{[]string{`wait=5"`}, 10 * time.Second, ""},
		{[]string{`wait=3, foo="bar`}, 3 * time.Second, "wait=3"},
		{[]string{`foo="bar, wait=3`, "wait=4"}, 4 * time.Second, "wait=4"},
		{[]string{"wait=-1"}, 10 * time.Second, ""},
		{[]string{"wait"}, 10 * time.Second, ""},
		{[]string{"respond-async"}, 0, "respond-async"},
		{[]string{"respond-async, wait=3"}, 3 * time.Second, "wait=3"},
		{[]string{"handling=lenient", "wait=3", "wait=9"}, 3 * time.Second, "wait=3"},
	} {
		if wait, applied := httpapi.ParsePrefer(c.headers); wait != c.wait || applied != c.applied {
			t.Errorf("Prefer %q waits %s and applies %q; want %s and %q", c.headers, wait, applied, c.wait, c.applied)
		}
	}
}

func TestIfNoneMatch(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		headers []string
		matches bool
	}{
		{nil, false},
		{[]string{`"1.2"`}, true},
		{[]string{`W/"1.2"`}, true},
		{[]string{`"a,b" ,, "1.2"	,`}, true},
		{[]string{`"1.1"`, `"1.2"`}, true},
		{[]string{" * "}, true},
		{[]string{`"1.1"`}, false},
		{[]string{`1.2`}, false},
		{[]string{`w/"1.2"`}, false},
		{[]string{`"a,"1.2",b"`}, false},
		{[]string{`"1.2", 1.3`}, false},
		{[]string{`"1.1", *`}, false},
		{[]string{`"1.2`}, false},
		{[]string{`"1.2" "1.3"`}, false},
		{[]string{`"1.1,"1.2"`}, false},
	} {
		if got := httpapi.Matches(c.headers, `"1.2"`); got != c.matches {
			t.Errorf("If-None-Match %q matches: %v; want %v", c.headers, got, c.matches)
		}
	}
}

func FuzzPrefer(f *testing.F) {
	for _, s := range []string{"", "wait=10", "respond-async;q=1, wait=\"3\"", "wait=,,=;", "WAIT = 7"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		wait, applied := httpapi.ParsePrefer([]string{s})
		if wait < 0 || wait > time.Minute {
			t.Errorf("Prefer %q waits %s", s, wait)
		}
		if applied != "" && applied != "respond-async" && !strings.HasPrefix(applied, "wait=") {
			t.Errorf("Prefer %q is answered %q", s, applied)
		}
	})
}

// No text of a body that is taken is replaced when it is read.
func FuzzCheckJSON(f *testing.F) {
	for _, s := range []string{`{}`, `{"a":{"b":[{"c":1},{"c":2}]},"b":"\ud83d\ude00"}`, `{"a":"\\ud83d"}`, `{"a":"\ud83dx"}`, `{"a":1,"\u0061":2}`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var fields map[string]any
		if !utf8.ValidString(s) || json.Unmarshal([]byte(s), &fields) != nil || fields == nil || httpapi.CheckJSON([]byte(s)) != nil {
			return
		}
		again, err := json.Marshal(fields)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(s, "\uFFFD") && !strings.Contains(strings.ToLower(s), `\ufffd`) && strings.Contains(string(again), "\uFFFD") {
			t.Errorf("%s was taken, and reads %s", s, again)
		}
	})
}

func FuzzCursor(f *testing.F) {
	f.Add(httpapi.FormatCursor(httpapi.Position{CreatedAt: time.Date(2026, 1, 31, 12, 0, 0, 123456000, time.UTC), ID: "user_42"}))
	f.Add("")
	f.Add("MjAyNg")
	f.Add(strings.Repeat("A", 4096))
	f.Fuzz(func(t *testing.T, s string) {
		p, err := httpapi.ParseCursor(s)
		if err != nil {
			return
		}
		if _, err := tenant.ParseID(string(p.ID)); err != nil {
			t.Errorf("cursor %q names the tenant %q, which cannot be", s, p.ID)
		}
		again, err := httpapi.ParseCursor(httpapi.FormatCursor(p))
		if err != nil || !again.CreatedAt.Equal(p.CreatedAt) || again.ID != p.ID {
			t.Errorf("cursor %q of %v reads back as %v, %v", s, p, again, err)
		}
	})
}
