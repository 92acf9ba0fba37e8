package clarifai

import (
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/tenantry/tenantry/internal/tenant"
)

// Every code of the table is unique, has a class that there is, and is understood
// by number and by name. The rules hold that callers build on.
func TestCodes(t *testing.T) {
	t.Parallel()
	numbers, names := map[int]bool{}, map[string]bool{}
	for _, c := range codes {
		if numbers[c.code] || names[c.name] {
			t.Errorf("%d %s stands twice", c.code, c.name)
		}
		numbers[c.code], names[c.name] = true, true
		if !slices.Contains(tenant.UpstreamClasses, c.class) {
			t.Errorf("%d %s has the class %q, which there is not", c.code, c.name, c.class)
		}
		if c.unclear && c.class != tenant.UpstreamDown {
			t.Errorf("%d %s is %s and unclear: an answer that says why is a clear one", c.code, c.name, c.class)
		}
		for _, httpStatus := range []int{200, 404, 429, 503} { // which the code overrides
			if got := meaningOf(c.code, httpStatus); got != c.meaning {
				t.Errorf("%d with HTTP %d means %v, want %v", c.code, httpStatus, got, c.meaning)
			}
		}
		for _, raw := range []string{`"` + c.name + `"`, strconv.Itoa(c.code), `"` + strconv.Itoa(c.code) + `"`} {
			if got, _ := parseCode([]byte(raw)); got != c.code {
				t.Errorf("code %s is read as %d, want %d", raw, got, c.code)
			}
		}
	}
	// Spelt out, since rows and keys are forgotten or given up by them.
	for class, want := range map[tenant.UpstreamClass][]int{
		tenant.UpstreamNotFound:  {11101},
		tenant.UpstreamDuplicate: {40010},
		tenant.UpstreamPAT:       {11001, 11002, 11008, 11009, 11200, 65000},
		tenant.UpstreamQuota:     {11004, 11006},
		tenant.UpstreamThrottled: {11003, 11005},
		tenant.UpstreamForbidden: {11007},
		tenant.UpstreamAccount:   {11000, 11104, 46006, 62002, 69000, 69001},
	} {
		var got []int
		for _, c := range codes {
			if c.class == class {
				got = append(got, c.code)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: codes %v, want %v", class, got, want)
		}
	}
}

func TestUnknownCodes(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		code, http int
		want       meaning
	}{
		{77777, 200, meaning{tenant.UpstreamDown, true}},
		{77777, 307, meaning{tenant.UpstreamDown, true}},
		{77777, 400, meaning{tenant.UpstreamRefused, false}},
		{77777, 401, meaning{tenant.UpstreamPAT, false}},
		{77777, 402, meaning{tenant.UpstreamAccount, false}},
		{77777, 403, meaning{tenant.UpstreamForbidden, false}},
		{77777, 404, meaning{tenant.UpstreamRefused, false}},
		{77777, 409, meaning{tenant.UpstreamRefused, false}},
		{77777, 429, meaning{tenant.UpstreamThrottled, false}},
		{77777, 500, meaning{tenant.UpstreamDown, true}},
		{0, 404, meaning{tenant.UpstreamRefused, false}},
		{98021, 200, meaning{tenant.UpstreamDown, true}},
		{98010, 400, meaning{tenant.UpstreamDown, true}},
		{99005, 404, meaning{tenant.UpstreamDown, true}},
	} {
		if got := meaningOf(test.code, test.http); got != test.want {
			t.Errorf("%d with HTTP %d means %v, want %v", test.code, test.http, got, test.want)
		}
	}
}

func TestClean(t *testing.T) {
	t.Parallel()
	secrets := []tenant.Secret{{}, tenant.NewSecret(""), tenant.NewSecret("s/e cret")}
	for in, want := range map[string]string{
		"":                                    "",
		" two\r\nlines\t\x00\x1b[31m ":        "two lines [31m",
		"bad \xff byte":                       "bad \uFFFD byte",
		"turned \u202eround":                  "turned round",
		"s/e cret, s%2Fe%20cret, s%2Fe+cret!": "[redacted], [redacted], [redacted]!",
		strings.Repeat("é", 300):              strings.Repeat("é", 300),
		strings.Repeat("é", 301):              strings.Repeat("é", 299) + "…",
		strings.Repeat("x", 295) + "s/e cret": strings.Repeat("x", 295) + "[red…",
	} {
		if got := clean(in, secrets); got != want {
			t.Errorf("clean(%q) = %q, want %q", in, got, want)
		}
	}
}

// FuzzEnvelope feeds the parser what a stranger may send: it must not panic, and
// what it makes of it must be fit to act on, to store and to show.
func FuzzEnvelope(f *testing.F) {
	const secret = "0123456789abcdef"
	for _, body := range []string{
		`{"status":{"code":10000,"description":"Ok","req_id":"r"},"apps":[]}`,
		`{"status":{"code":"CONN_THROTTLED","details":"exceeded limit of 15 requests per second"}}`,
		`{"status":{"code":10050,"redirect_info":{"url":"u","new_resource_id":"n"}}}`,
		`{"status":{"code":11102,"description":"a\u0000b","details":"` + secret + `"}}`,
		`{"status":{"code":1e4}}`, `{"status":null}`, `[]`, `<html>`, ``, `{"status":{"code":"ODD"}}`, "\xff",
	} {
		f.Add(body, 200, "application/json", "id")
		f.Add(body, 502, "text/html", secret)
	}
	f.Fuzz(func(t *testing.T, body string, httpStatus int, contentType, requestID string) {
		header := http.Header{"Content-Type": {contentType}, "X-Clarifai-Request-Id": {requestID}}
		secrets := []tenant.Secret{tenant.NewSecret(secret)}
		for _, call := range []string{"PostApps", "GetApp"} {
			a := parseAnswer(httpStatus, header, []byte(body))
			e := a.failure(call, 0)
			if e == nil {
				if a.status == nil || a.status.code != codeSuccess {
					t.Fatalf("taken for a success: %q", body)
				}
				readMarker(a.body)
				continue
			}
			if !slices.Contains(tenant.UpstreamClasses, e.Class) {
				t.Errorf("class %q", e.Class)
			}
			if a.status == nil && (e.Code != 0 || e.Class != tenant.UpstreamDown && e.Class != tenant.UpstreamThrottled) {
				t.Errorf("no envelope, and yet %#v", e)
			}
			if e.Class == tenant.UpstreamNotFound && e.Code != 11101 {
				t.Errorf("not found, and yet %#v", e)
			}
			detail, id := clean(e.Detail, secrets), cleanRequestID(e.RequestID, secrets)
			if !utf8.ValidString(detail) || utf8.RuneCountInString(detail) > maxDetail || strings.ContainsFunc(detail, unicode.IsControl) {
				t.Errorf("detail %q", detail)
			}
			if len(id) > 128 || !printable(id) {
				t.Errorf("request id %q", id)
			}
			if strings.Contains(detail, secret) || strings.Contains(id, secret) {
				t.Errorf("a secret in %q, %q", detail, id)
			}
		}
	})
}

func TestRetryAfter(t *testing.T) {
	t.Parallel()
	const date, twoHours = "Mon, 02 Nov 2026 10:00:00 GMT", "Mon, 02 Nov 2026 12:00:00 GMT"
	for _, tt := range []struct {
		value, date string
		want        time.Duration
	}{
		{"", date, 0}, {"0", date, 0}, {"15", date, 15 * time.Second}, {" 15 ", date, 15 * time.Second}, {"-1", date, 0}, {"1.5", date, 0}, {"soon", date, 0},
		{"3600", date, time.Hour}, {"3601", date, time.Hour}, {"99999999999999999999", date, time.Hour}, {"9223372036854775807", date, time.Hour},
		{"Mon, 02 Nov 2026 10:00:30 GMT", date, 30 * time.Second}, {date, twoHours, 0}, {twoHours, date, time.Hour},
		{"Monday, 02-Nov-26 10:00:30 GMT", date, 30 * time.Second}, {"Mon Nov  2 10:00:30 2026", date, 30 * time.Second},
		{time.Now().Add(30 * time.Minute).UTC().Format(http.TimeFormat), "", 30 * time.Minute},
	} {
		header := http.Header{}
		header.Set("Retry-After", tt.value)
		header.Set("Date", tt.date)
		for _, body := range []string{`{"status":{"code":11005}}`, "<html>"} {
			got := parseAnswer(429, header, []byte(body)).failure("PostApps", 0).RetryAfter
			if got.Round(10*time.Second) != tt.want.Round(10*time.Second) {
				t.Errorf("Retry-After %q at %q: got %s, want %s", tt.value, tt.date, got, tt.want)
			}
		}
	}
}
