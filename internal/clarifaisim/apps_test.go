package clarifaisim_test

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tenantry/tenantry/internal/clarifaisim"
)

func TestEnvelope(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.makeApp("there")
	for _, tt := range []struct {
		name, method, path, body string
		code, http               int
		list                     string
	}{
		{"success", "GET", "/v2/users/me", "", 10000, 200, ""},
		{"empty list", "GET", "/v2/users/acme/keys", "", 10000, 200, "keys"},
		{"list on failure", "GET", "/v2/users/nobody/apps", "", 11101, 404, "apps"},
		{"trailing slash", "POST", "/v2/users/acme/apps/", `{"apps":[{"id":"slash"}]}`, 10000, 200, ""},
		{"unknown path", "GET", "/v2/nothing", "", 11101, 404, ""},
		{"unknown root", "GET", "/", "", 11101, 404, ""},
		{"wrong method", "PUT", "/v2/users/acme/apps", "", 11103, 405, ""},
		{"wrong method on a fixed path", "DELETE", "/v2/users/acme/apps/ids/", "", 11101, 404, ""},
		{"broken JSON", "POST", "/v2/users/acme/apps", `{"apps":`, 11100, 400, "apps"},
		{"no body", "POST", "/v2/users/acme/keys", "", 11100, 400, "keys"},
		{"wrong type", "POST", "/v2/users/acme/apps", `{"apps":[{"id":7}]}`, 11100, 400, "apps"},
		{"no app", "POST", "/v2/users/acme/apps", `{}`, 11102, 400, "apps"},
		{"null app", "POST", "/v2/users/acme/apps", `{"apps":[null]}`, 11102, 400, "apps"},
		{"metadata that is no object", "POST", "/v2/users/acme/apps", `{"apps":[{"id":"m","metadata":[1]}]}`, 11102, 400, "apps"},
		{"unknown fields are ignored", "POST", "/v2/users/acme/apps", `{"apps":[{"id":"u","nonsense":1}],"more":2}`, 10000, 200, ""},
		{"too large", "POST", "/v2/users/acme/apps", strings.Repeat(" ", 4<<20+1), 40033, 413, "apps"},
		{"duplicate", "POST", "/v2/users/acme/apps", `{"apps":[{"id":"there"}]}`, 40010, 400, "apps"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := f.in(t)
			r := f.want(tt.code, tt.method, tt.path, tt.body)
			if r.http != tt.http || r.Status.HTTPStatusCode != tt.http {
				t.Errorf("got HTTP %d, http_status_code %d, want %d", r.http, r.Status.HTTPStatusCode, tt.http)
			}
			if id := r.header.Get("X-Clarifai-Request-Id"); id != r.Status.ReqID || len(id) != 32 {
				t.Errorf("x-clarifai-request-id %q, req_id %q: want the same 32 characters", id, r.Status.ReqID)
			}
			if ct := r.header.Get("Content-Type"); ct != "application/json; charset=UTF-8" {
				t.Errorf("content type %q", ct)
			}
			if tt.list != "" && !strings.Contains(r.text, fmt.Sprintf("%q:[]", tt.list)) {
				t.Errorf("answer %s: want an empty list %s", r.text, tt.list)
			}
			if !strings.Contains(r.text, fmt.Sprintf(`"code":%d,`, tt.code)) {
				t.Errorf("answer %s: want a numeric code", r.text)
			}
		})
	}
}

func TestRequestIDPrefix(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	req, _ := http.NewRequestWithContext(t.Context(), "GET", f.url+"/v2/status_codes/10000", nil)
	req.Header.Set("X-Clarifai-Request-Id-Prefix", "tenantry-1")
	r, err := f.send(req)
	if err != nil {
		t.Fatal(err)
	}
	if id := r.header.Get("X-Clarifai-Request-Id"); !strings.HasPrefix(id, "tenantry-1-") || r.Status.ReqID != id {
		t.Errorf("x-clarifai-request-id %q, req_id %q: want the same, beginning with tenantry-1-", id, r.Status.ReqID)
	}
}

func TestAppIDs(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	for _, tt := range []struct {
		id   string
		code int
	}{
		{"a", 10000},
		{"tny-01jd2k3m4n5p6q7r8s9t0v1w2x", 10000},
		{"A_b-C", 10000},
		{strings.Repeat("a", 32), 10000},
		{strings.Repeat("a", 33), 11102},
		{"-a", 11102}, {"a-", 11102}, {"a--b", 11102}, {"a_-b", 11102},
		{"a b", 11102}, {"a.b", 11102}, {"ä", 11102}, {"a/b", 11102}, {"a\n", 11102},
	} {
		f.want(tt.code, "POST", "/v2/users/acme/apps", fmt.Sprintf(`{"apps":[{"id":%q}]}`, tt.id))
	}
	// Without an id the server makes one.
	r := f.want(10000, "POST", "/v2/users/me/apps", `{"apps":[{"name":"x","user_id":"somebody","created_at":"2001-01-01T00:00:00Z"}]}`)
	if len(r.Apps) != 1 || len(r.Apps[0].ID) != 32 || strings.Contains(r.text, "somebody") || strings.Contains(r.text, "2001") {
		t.Errorf("answer %s: want one app with an id, the owner and the times from the server", r.text)
	}
	if got := r.Apps[0]; got.Visibility.Gettable != 10 || got.DefaultWorkflow.ID != "Universal" {
		t.Errorf("new app: got visibility %d, workflow %q, want 10, Universal", got.Visibility.Gettable, got.DefaultWorkflow.ID)
	}
}

func TestAppIDsAreUniquePerOwner(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.makeApp("app-a")
	f.wantAs(otherPAT, 10000, "POST", "/v2/users/other/apps", `{"apps":[{"id":"app-a"}]}`)
	f.want(40010, "POST", "/v2/users/acme/apps", `{"apps":[{"id":"app-a","metadata":{"new":true}}]}`)
	// All or nothing.
	f.want(40010, "POST", "/v2/users/acme/apps", `{"apps":[{"id":"app-b"},{"id":"app-a"}]}`)
	f.want(40010, "POST", "/v2/users/acme/apps", `{"apps":[{"id":"app-b"},{"id":"app-b"}]}`)
	f.want(11101, "GET", "/v2/users/acme/apps/app-b", "")
	if r := f.want(10000, "GET", "/v2/users/acme/apps/app-a", ""); r.App.Metadata != nil {
		t.Errorf("metadata of the first app: got %s, want none", r.App.Metadata)
	}
	f.update(func(s *clarifaisim.Settings) { s.DuplicateCode = 11102 })
	if r := f.want(11102, "POST", "/v2/users/acme/apps", `{"apps":[{"id":"app-a"}]}`); !strings.Contains(r.Status.Details, "already exist") {
		t.Errorf("details %q: want them to say already exist", r.Status.Details)
	}
}

// clock is a clock that tests set.
type clock struct{ nanos atomic.Int64 }

func (c *clock) now() time.Time              { return time.Unix(1_800_000_000, c.nanos.Load()) }
func (c *clock) forward(d time.Duration)     { c.nanos.Add(int64(d)) }
func (c *clock) use(cfg *clarifaisim.Config) { cfg.Now = c.now }

func TestListApps(t *testing.T) {
	t.Parallel()
	var clk clock
	f := newFixture(t, clk.use)
	for _, app := range []string{
		`{"id":"a1","name":"zeta","description":"green apples"}`,
		`{"id":"a2","name":"beta","visibility":{"gettable":"ORG"}}`,
		`{"id":"a3","name":"alpha","is_template":true}`,
	} {
		f.want(10000, "POST", "/v2/users/acme/apps", `{"apps":[`+app+`]}`)
		clk.forward(time.Second)
	}
	f.want(10000, "PATCH", "/v2/users/acme/apps/a1", `{"app":{"notes":"red pears"},"action":"overwrite"}`)
	f.wantAs(otherPAT, 10000, "POST", "/v2/users/other/apps", `{"apps":[{"id":"a9"}]}`)
	for _, tt := range []struct {
		query string
		want  []string
	}{
		{"", []string{"a1", "a3", "a2"}},
		{"sort_ascending=true", []string{"a2", "a3", "a1"}},
		{"sort_by_created_at=true", []string{"a3", "a2", "a1"}},
		{"sort_by_created_at=true&sort_ascending=true", []string{"a1", "a2", "a3"}},
		{"sort_by_name=true&sort_ascending=true", []string{"a3", "a2", "a1"}},
		{"sort_by_id=true", []string{"a3", "a2", "a1"}},
		{"sort_by_id=true&sort_ascending=true&per_page=2", []string{"a1", "a2"}},
		{"sort_by_id=true&sort_ascending=true&per_page=2&page=2", []string{"a3"}},
		{"sort_by_id=true&sort_ascending=true&per_page=2&page=3", []string{}},
		{"page=1000000", []string{}},
		{"search=APPL", []string{"a1"}},
		{"search=pear", []string{"a1"}},
		{"search=pple", []string{}},
		{"name=beta", []string{"a2"}},
		{"id=a3", []string{"a3"}},
		{"template_only=true", []string{"a3"}},
		{"starred_only=true", []string{}},
		{"visibility.gettable=ORG", []string{"a2"}},
		{"visibility.gettable=30", []string{"a2"}},
		{"search=a&sort_by_relevance=true&sort_ascending=true", []string{"a1", "a2", "a3"}},
	} {
		r := f.want(10000, "GET", "/v2/users/acme/apps?"+tt.query, "")
		if diff := cmp.Diff(tt.want, appIDs(r.Apps)); diff != "" {
			t.Errorf("ListApps %s (-want +got):\n%s", tt.query, diff)
		}
	}
	for _, query := range []string{
		"page=x", "page=-1", "per_page=1001", "sort_ascending=maybe", "sort_by_relevance=true",
		"sort_by_id=true&sort_by_name=true", "visibility.gettable=7",
	} {
		f.want(11102, "GET", "/v2/users/acme/apps?"+query, "")
	}
}

func TestPagesHoldAll(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	var list []string
	for i := range 300 {
		list = append(list, fmt.Sprintf(`{"id":"app-%03d"}`, i))
	}
	f.want(10000, "POST", "/v2/users/acme/apps", `{"apps":[`+strings.Join(list, ",")+`]}`)
	var got []string
	for page := 1; ; page++ {
		r := f.want(10000, "GET", fmt.Sprintf("/v2/users/acme/apps?page=%d&sort_by_created_at=true&sort_ascending=true", page), "")
		if len(r.Apps) == 0 {
			break
		}
		if page == 1 && len(r.Apps) != 128 {
			t.Errorf("first page: got %d apps, want 128", len(r.Apps))
		}
		got = append(got, appIDs(r.Apps)...)
	}
	if len(got) != 300 || !slices.IsSorted(got) || len(slices.Compact(got)) != 300 {
		t.Errorf("all pages: got %d apps, sorted %v", len(got), slices.IsSorted(got))
	}
	if r := f.want(10000, "GET", "/v2/users/acme/apps?per_page=1000", ""); len(r.Apps) != 300 {
		t.Errorf("per_page=1000: got %d apps, want 300", len(r.Apps))
	}
}

func TestPatchApp(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	for _, tt := range []struct{ name, patch, want string }{
		{"overwrite", `"app":{"metadata":{"new":1}}`, `{"new":1}`},
		{"other fields leave it", `"app":{"description":"d"}`, `{"old":{"a":1}}`},
		{"merge", `"app":{"metadata":{"old":{"b":2}}},"metadata_action":{"op":"merge"}`, `{"old":{"a":1,"b":2}}`},
		{"merge wins", `"app":{"metadata":{"old":{"a":2}}},"metadata_action":{"op":"merge"}`, `{"old":{"a":2}}`},
		{"merge keeps", `"app":{"metadata":{"old":{"a":2}}},"metadata_action":{"op":"merge","merge_conflict_resolution":"do_nothing"}`, `{"old":{"a":1}}`},
		{"overwrite at a path", `"app":{"metadata":{"b":2}},"metadata_action":{"op":"overwrite","path":"old.c"}`, `{"old":{"a":1,"c":{"b":2}}}`},
		{"delete at a path", `"app":{},"metadata_action":{"op":"delete","path":"old.a"}`, `{"old":{}}`},
		{"delete", `"app":{},"metadata_action":{"op":"delete"}`, ``},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := f.in(t)
			f.want(10000, "POST", "/v2/users/acme/apps", `{"apps":[{"id":"app","notes":"n","metadata":{"old":{"a":1}}}]}`)
			f.want(10000, "PATCH", "/v2/users/acme/apps/app", `{"action":"overwrite",`+tt.patch+`}`)
			got := f.want(10000, "GET", "/v2/users/acme/apps/app", "")
			if string(got.App.Metadata) != tt.want || got.App.Notes != "n" {
				t.Errorf("after the patch: metadata %s, notes %q; want %s, n", got.App.Metadata, got.App.Notes, tt.want)
			}
			f.want(10000, "DELETE", "/v2/users/acme/apps/app", "")
		})
	}
	f.makeApp("app")
	for _, bad := range []string{`{"app":{}}`, `{"action":"overwrite"}`, `{"app":{},"action":"remove"}`, `{"app":{"metadata":{}},"action":"overwrite","metadata_action":{"op":"x"}}`} {
		f.want(11102, "PATCH", "/v2/users/acme/apps/app", bad)
	}
	f.want(11101, "PATCH", "/v2/users/acme/apps/nope", `{"app":{},"action":"overwrite"}`)
	// All or nothing.
	f.want(11101, "PATCH", "/v2/users/acme/apps", `{"action":"overwrite","apps":[{"id":"app","notes":"x"},{"id":"nope"}]}`)
	if r := f.want(10000, "GET", "/v2/users/acme/apps/app", ""); r.App.Notes != "" {
		t.Errorf("notes after a refused patch: %q", r.App.Notes)
	}
}

func TestPatchAppsIDs(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.makeApp("old")
	f.makeApp("taken")
	key := f.makeKey("old")
	rename := func(code int, body string) { t.Helper(); f.want(code, "PATCH", "/v2/users/acme/apps/ids", body) }
	rename(11102, `{"ids":[],"action":"overwrite"}`)
	rename(11102, `{"ids":[{"id":"old","new_id":"a"},{"id":"taken","new_id":"b"}],"action":"overwrite"}`)
	rename(11102, `{"ids":[{"id":"old","new_id":"new"}]}`)
	rename(11102, `{"ids":[{"id":"old","new_id":"not valid"}],"action":"overwrite"}`)
	rename(11101, `{"ids":[{"id":"nope","new_id":"new"}],"action":"overwrite"}`)
	rename(40010, `{"ids":[{"id":"old","new_id":"taken"}],"action":"overwrite"}`)
	rename(10000, `{"ids":[{"id":"old","new_id":"new"}],"action":"overwrite"}`)
	f.want(11101, "GET", "/v2/users/acme/apps/old", "")
	if r := f.wantAs(key, 10000, "GET", "/v2/app", ""); r.App.ID != "new" {
		t.Errorf("the key opens %q, want new", r.App.ID)
	}
	// "ids" is an id like others where no PATCH is meant.
	f.want(11101, "GET", "/v2/users/acme/apps/ids", "")
}

func TestInputsStayInTheirApp(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.makeApp("app-a")
	f.makeApp("app-b")
	a, b := f.makeKey("app-a"), f.makeKey("app-b")
	f.wantAs(a, 10000, "POST", "/v2/users/acme/apps/app-a/inputs", `{"inputs":[{"id":"one","data":{"text":{"raw":"hello"}}},{"data":{}}]}`)
	f.wantAs(a, 40010, "POST", "/v2/inputs", `{"inputs":[{"id":"one"}]}`)
	f.wantAs(a, 11102, "POST", "/v2/inputs", `{"inputs":[]}`)
	if r := f.wantAs(a, 10000, "GET", "/v2/inputs?per_page=1", ""); len(r.Inputs) != 1 || r.Inputs[0].ID != "one" || !strings.Contains(r.text, "hello") {
		t.Errorf("inputs of app-a: %s", r.text)
	}
	if r := f.wantAs(b, 10000, "GET", "/v2/inputs", ""); len(r.Inputs) != 0 {
		t.Errorf("inputs of app-b: %s", r.text)
	}
	r := f.want(10000, "GET", "/v2/users/acme/apps/app-a?additional_fields=counts", "")
	if r.App.ExtraInfo.Counts.Inputs != 2 {
		t.Errorf("counts: got %d inputs, want 2", r.App.ExtraInfo.Counts.Inputs)
	}
	r = f.wantAs(b, 10000, "POST", "/v2/models/any/outputs", `{"inputs":[{"data":{"text":{"raw":"hello"}}}]}`)
	if !strings.Contains(r.text, `"raw":"simulated by clarifaisim: no model was run"`) || !strings.Contains(r.text, `"app_id":"app-b"`) {
		t.Errorf("outputs %s: want them labelled as simulated, in app-b", r.text)
	}
}

func TestStatusCodes(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	r := f.do("", "GET", "/v2/status_codes", "")
	if r.Status.Code != 10000 || !strings.Contains(r.text, `"code":40010`) {
		t.Errorf("status_codes: %s", r.text)
	}
	if r := f.do("", "GET", "/v2/status_codes/11005", ""); r.http != 200 || r.Status.Code != 11005 || r.Status.HTTPStatusCode != 429 {
		t.Errorf("status_codes/11005: HTTP %d, %s", r.http, r.text)
	}
	if r := f.do("", "GET", "/v2/status_codes/1", ""); r.Status.Code != 11101 {
		t.Errorf("status_codes/1: %s", r.text)
	}
}
