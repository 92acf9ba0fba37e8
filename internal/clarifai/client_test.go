package clarifai_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"go.uber.org/goleak"

	"github.com/tenantry/tenantry/internal/clarifai"
	"github.com/tenantry/tenantry/internal/tenant"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	patText  = "MARKEDpat0123456789abcdef01234567"
	keyText  = "MARKEDkey0123456789abcdef01234567"
	operator = tenant.UserID("acme")
	appID    = tenant.AppID("tny-01jd0000000000000000000000")
)

var (
	keyID     = uuid.MustParse("0190a000-0000-7000-8000-000000000001")
	appMarker = tenant.Marker{Deployment: "6zbsym8t7ysrgw5y", App: appID}
	// ownedMarker is the marker of an app that was given to a tenant.
	ownedMarker = tenant.Marker{Deployment: "6zbsym8t7ysrgw5y", App: appID, Profile: "default", Tenant: "sealed"}
	keyMarker   = tenant.KeyMarker{Deployment: "6zbsym8t7ysrgw5y", KeyID: keyID}
)

const okStatus = `"status":{"code":10000,"description":"Ok","req_id":"r1"}`

// A testCall is one call with the request it must send and a good answer to it.
type testCall struct {
	name    string // Clarifai's
	method  string
	uri     string
	body    string // JSON; empty for none
	answer  string
	changes bool
	run     func(context.Context, *clarifai.Client) (any, error)
	want    any
}

var calls = []testCall{
	{
		name: "GetUser", method: "GET", uri: "/v2/users/me",
		answer: `{` + okStatus + `,"user":{"id":"acme","first_name":"A"}}`,
		run:    func(ctx context.Context, c *clarifai.Client) (any, error) { return c.Whoami(ctx, tenant.Secret{}) },
		want:   operator,
	},
	{
		name: "PostApps", method: "POST", uri: "/v2/users/acme/apps", changes: true,
		body: `{"apps":[{"id":"` + string(appID) + `","default_language":"en","description":"Managed by Tenantry",
			"default_workflow":{"id":"Empty","user_id":"clarifai","app_id":"main"},
			"metadata":{"tenantry":{"deployment":"6zbsym8t7ysrgw5y","app":"` + string(appID) + `","purge_after":""}}}]}`,
		answer: `{` + okStatus + `,"apps":[{"id":"` + string(appID) + `","user_id":"acme"}]}`,
		run: func(ctx context.Context, c *clarifai.Client) (any, error) {
			return nil, c.CreateApp(ctx, tenant.NewApp{ID: appID, BaseWorkflow: "Empty", Language: "en", Description: "Managed by Tenantry", Marker: appMarker})
		},
	},
	{
		name: "GetApp", method: "GET", uri: "/v2/users/acme/apps/" + string(appID) + "?additional_fields=counts",
		answer: `{` + okStatus + `,"app":{"id":"` + string(appID) + `","user_id":"acme",
			"metadata":{"other":1,"tenantry":{"deployment":"6zbsym8t7ysrgw5y","app":"` + string(appID) + `","profile":"default","tenant":"sealed"}}}}`,
		run:  func(ctx context.Context, c *clarifai.Client) (any, error) { return c.App(ctx, appID) },
		want: tenant.UpstreamApp{ID: appID, UserID: operator, Marker: &ownedMarker},
	},
	{
		name: "DeleteApp", method: "DELETE", uri: "/v2/users/acme/apps/" + string(appID), changes: true,
		answer: `{` + okStatus + `}`,
		run:    func(ctx context.Context, c *clarifai.Client) (any, error) { return nil, c.DeleteApp(ctx, appID) },
	},
	{
		name: "PostKeys", method: "POST", uri: "/v2/users/acme/keys", changes: true,
		body: `{"keys":[{"description":"` + keyMarker.String() + `","scopes":["Predict","Models_Get"],
			"apps":[{"id":"` + string(appID) + `","user_id":"acme"}]}]}`,
		answer: `{` + okStatus + `,"keys":[{"id":"` + keyText + `","description":"` + keyMarker.String() + `","apps":[{"id":"` + string(appID) + `"}]}]}`,
		run: func(ctx context.Context, c *clarifai.Client) (any, error) {
			secret, err := c.CreateKey(ctx, tenant.NewKey{AppID: appID, Scopes: []string{"Predict", "Models_Get"}, Marker: keyMarker})
			if err != nil {
				if secret.IsSet() {
					return nil, errors.New("a failed CreateKey returned a secret")
				}
				return nil, err
			}
			return secret.Reveal(), nil
		},
		want: keyText,
	},
	{
		name: "ListAppKeys", method: "GET", uri: "/v2/users/acme/apps/" + string(appID) + "/keys?page=2&per_page=1000",
		answer: `{` + okStatus + `,"keys":[{"id":"` + keyText + `","description":"a","scopes":["All"]}]}`,
		run: func(ctx context.Context, c *clarifai.Client) (any, error) {
			keys, err := c.AppKeys(ctx, appID, 2)
			if err != nil {
				return nil, err
			}
			return revealed(keys), nil
		},
		want: []string{keyText + " a [All]"},
	},
	{
		name: "ListApps", method: "GET", uri: "/v2/users/acme/apps?page=2&per_page=1000&sort_ascending=false&sort_by_created_at=true",
		answer: `{` + okStatus + `,"apps":[{"id":"other","user_id":"acme","metadata":{"a":1}},{"id":"` + string(appID) + `","user_id":"acme",
			"metadata":{"tenantry":{"deployment":"6zbsym8t7ysrgw5y","app":"` + string(appID) + `"}}}]}`,
		run: func(ctx context.Context, c *clarifai.Client) (any, error) {
			return orNil(c.Apps(ctx, tenant.Page{Number: 2, Size: 1000}))
		},
		want: []tenant.UpstreamApp{{ID: "other", UserID: operator}, {ID: appID, UserID: operator, Marker: &appMarker}},
	},
	{
		name: "PatchApp", method: "PATCH", uri: "/v2/users/acme/apps/" + string(appID), changes: true,
		body: `{"app":{"id":"` + string(appID) + `","description":"Of user_1","metadata":{"tenantry":{"deployment":"6zbsym8t7ysrgw5y","app":"` + string(appID) + `",
			"profile":"default","tenant":"sealed","purge_after":""}}},"action":"overwrite","metadata_action":{"op":"merge"}}`,
		answer: `{` + okStatus + `,"app":{"id":"` + string(appID) + `"}}`,
		run: func(ctx context.Context, c *clarifai.Client) (any, error) {
			return nil, c.MarkApp(ctx, appID, ownedMarker, "Of user_1")
		},
	},
	{
		name: "PatchApp", method: "PATCH", uri: "/v2/users/acme/apps/" + string(appID), changes: true,
		body: `{"app":{"id":"` + string(appID) + `","default_language":"en","description":"Acme's",
			"default_workflow":{"id":"General","user_id":"clarifai","app_id":"main"}},"action":"overwrite"}`,
		answer: `{` + okStatus + `,"app":{"id":"` + string(appID) + `"}}`,
		run: func(ctx context.Context, c *clarifai.Client) (any, error) {
			return nil, c.ChangeApp(ctx, appID, tenant.AppChange{BaseWorkflow: "General", Language: "en", Description: "Acme's"})
		},
	},
	{
		name: "PatchApp", method: "PATCH", uri: "/v2/users/acme/apps/" + string(appID), changes: true,
		body:   `{"app":{"id":"` + string(appID) + `","description":"Acme's"},"action":"overwrite"}`,
		answer: `{` + okStatus + `,"app":{"id":"` + string(appID) + `"}}`,
		run: func(ctx context.Context, c *clarifai.Client) (any, error) {
			return nil, c.ChangeApp(ctx, appID, tenant.AppChange{Description: "Acme's"})
		},
	},
	{
		name: "ListKeys", method: "GET", uri: "/v2/users/acme/keys?page=1&per_page=1000&type=app_specific_key",
		answer: `{` + okStatus + `,"keys":[{"id":"` + keyText + `","description":"a","scopes":["All"],"apps":[{"id":"` + string(appID) + `"}]}]}`,
		run: func(ctx context.Context, c *clarifai.Client) (any, error) {
			keys, err := c.Keys(ctx, tenant.Page{Number: 1, Size: 1000})
			if err != nil {
				return nil, err
			}
			return fmt.Sprint(revealed(keys), keys[0].AppID), nil
		},
		want: "[" + keyText + " a [All]]" + string(appID),
	},
	{
		name: "GetKey", method: "GET", uri: "/v2/users/acme/keys/" + keyText,
		answer: `{` + okStatus + `,"key":{"id":"` + keyText + `"}}`,
		run: func(ctx context.Context, c *clarifai.Client) (any, error) {
			return nil, c.KeyExists(ctx, tenant.NewSecret(keyText))
		},
	},
	{
		name: "PatchKeys", method: "PATCH", uri: "/v2/users/acme/keys", changes: true,
		body:   `{"keys":[{"id":"` + keyText + `","scopes":["Predict"]}],"action":"overwrite"}`,
		answer: `{` + okStatus + `,"keys":[{"id":"` + keyText + `"}]}`,
		run: func(ctx context.Context, c *clarifai.Client) (any, error) {
			return nil, c.SetKeyScopes(ctx, tenant.NewSecret(keyText), []string{"Predict"})
		},
	},
	{
		name: "DeleteKey", method: "DELETE", uri: "/v2/users/acme/keys/" + keyText, changes: true,
		answer: `{` + okStatus + `}`,
		run: func(ctx context.Context, c *clarifai.Client) (any, error) {
			return nil, c.DeleteKey(ctx, tenant.NewSecret(keyText))
		},
	},
}

func orNil[T any](got []T, err error) (any, error) {
	if err != nil {
		return nil, err
	}
	return got, nil
}

func revealed(keys []tenant.UpstreamKey) []string {
	var out []string
	for _, k := range keys {
		id := "(unset)"
		if k.Secret.IsSet() {
			id = k.Secret.Reveal()
		}
		out = append(out, fmt.Sprint(id, " ", k.Description, " ", k.Scopes))
	}
	return out
}

// callNamed returns a copy of the call of that name.
func callNamed(t *testing.T, name string) testCall {
	t.Helper()
	for _, c := range calls {
		if c.name == name {
			return c
		}
	}
	t.Fatalf("no call is named %s", name)
	return testCall{}
}

// An upstream is a server that counts its requests and connections.
type upstream struct {
	*httptest.Server
	requests, connections atomic.Int64
}

func serve(t *testing.T, h http.HandlerFunc) *upstream {
	t.Helper()
	u := &upstream{}
	u.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		u.requests.Add(1)
		h(w, r)
	}))
	u.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			u.connections.Add(1)
		}
	}
	u.Start()
	t.Cleanup(u.Close)
	return u
}

func newClient(t *testing.T, cfg clarifai.Config) *clarifai.Client {
	t.Helper()
	if cfg.PAT == nil {
		cfg.PAT = func() tenant.Secret { return tenant.NewSecret(patText) }
	}
	c, err := clarifai.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c.As(operator)
}

// asUpstream checks what holds for every error of the client, and returns it.
func asUpstream(t *testing.T, call testCall, err error) *tenant.UpstreamError {
	t.Helper()
	if err == nil {
		t.Fatal("the call succeeded")
	}
	up, ok := errors.AsType[*tenant.UpstreamError](err)
	if !ok {
		t.Fatalf("the error is %T: %v", err, err)
	}
	if up.Call != call.name {
		t.Errorf("the error names the call %q, want %q", up.Call, call.name)
	}
	if up.Class == "" || up.Detail == "" {
		t.Errorf("the error has class %q and detail %q", up.Class, up.Detail)
	}
	if up.Unclear && !call.changes {
		t.Errorf("a call that changes nothing is unclear: %v", err)
	}
	noSecret(t, err)
	return up
}

func noSecret(t *testing.T, err error) {
	t.Helper()
	for _, format := range []string{"%v", "%+v", "%#v", "%q"} {
		if text := fmt.Sprintf(format, err); strings.Contains(text, "MARKED") {
			t.Errorf("%s holds a secret: %s", format, text)
		}
	}
	if text, jsonErr := json.Marshal(err); jsonErr != nil || bytes.Contains(text, []byte("MARKED")) {
		t.Errorf("JSON holds a secret: %s, %v", text, jsonErr)
	}
}

func TestCalls(t *testing.T) {
	t.Parallel()
	for _, call := range calls {
		t.Run(call.name, func(t *testing.T) {
			t.Parallel()
			u := serve(t, func(w http.ResponseWriter, r *http.Request) {
				if r.Method != call.method || r.RequestURI != call.uri {
					t.Errorf("request is %s %s, want %s %s", r.Method, r.RequestURI, call.method, call.uri)
				}
				for name, want := range map[string]string{"Authorization": "Key " + patText, "User-Agent": "tenantry/test",
					"Accept": "application/json", "X-Clarifai-Request-Id-Prefix": "tenantry"} {
					if got := r.Header.Get(name); got != want {
						t.Errorf("%s is %q, want %q", name, got, want)
					}
				}
				body, err := io.ReadAll(r.Body)
				if err != nil {
					t.Error(err)
				}
				if r.TransferEncoding != nil || r.ContentLength != int64(len(body)) {
					t.Errorf("body is sent as %v with length %d", r.TransferEncoding, r.ContentLength)
				}
				if (r.Header.Get("Content-Type") == "application/json") != (call.body != "") {
					t.Errorf("Content-Type is %q", r.Header.Get("Content-Type"))
				}
				if diff := cmp.Diff(decode(t, call.body), decode(t, string(body))); diff != "" {
					t.Errorf("body (-want +got):\n%s", diff)
				}
				fmt.Fprint(w, call.answer)
			})
			var seen []string
			c := newClient(t, clarifai.Config{BaseURL: u.URL, UserAgent: "tenantry/test",
				Observe: func(call, outcome string, _ time.Duration) { seen = append(seen, call+" "+outcome) }})
			for range 3 {
				got, err := call.run(t.Context(), c)
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(call.want, got); diff != "" {
					t.Errorf("result (-want +got):\n%s", diff)
				}
			}
			if diff := cmp.Diff([]string{call.name + " ok", call.name + " ok", call.name + " ok"}, seen); diff != "" {
				t.Errorf("observed (-want +got):\n%s", diff)
			}
			if n := u.requests.Load(); n != 3 {
				t.Errorf("3 calls made %d requests", n)
			}
			if n := u.connections.Load(); n != 1 {
				t.Errorf("3 calls in a row used %d connections", n)
			}
		})
	}
}

func decode(t *testing.T, text string) any {
	t.Helper()
	if text == "" {
		return nil
	}
	var v any
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Errorf("%q is not JSON: %v", text, err)
	}
	return v
}

func envelope(httpStatus, code int, description, details string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json; charset=UTF-8")
		w.WriteHeader(httpStatus)
		_ = json.NewEncoder(w).Encode(map[string]any{"status": map[string]any{
			"code": code, "description": description, "details": details, "req_id": "req-1"}})
	}
}

func page(httpStatus int, contentType, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", contentType)
		w.WriteHeader(httpStatus)
		fmt.Fprint(w, body)
	}
}

// raw answers with bytes that need not be HTTP, and hangs up.
func raw(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			panic(err)
		}
		_, _ = io.WriteString(conn, text)
		_ = conn.Close()
	}
}

// Every call, in every way it can fail, on a new connection and on a kept one:
// what the error says, that one request was made, and that nothing leaks.
func TestFailures(t *testing.T) {
	t.Parallel()
	const html = "<html>MARKED</html>"
	echo := func(w http.ResponseWriter, r *http.Request) {
		text := r.Header.Get("Authorization") + " " + r.RequestURI
		envelope(400, 11100, text, text+"!")(w, r)
	}
	endless := func(w http.ResponseWriter, _ *http.Request) {
		_, err := io.WriteString(w, `{"status":{"code":10000,"details":"`)
		for x := strings.Repeat("x", 1<<16); err == nil; {
			_, err = io.WriteString(w, x)
		}
	}
	elsewhere := serve(t, func(http.ResponseWriter, *http.Request) { t.Error("a redirect was followed") })
	tooMuch := []string{"their time limit", "a gateway's 504", "endless"}
	for _, test := range []struct {
		name    string
		h       http.HandlerFunc
		class   tenant.UpstreamClass
		code    int
		http    int
		unclear bool // of a call that changes something
		detail  string
	}{
		{"throttled", envelope(429, 11005, "Making too many requests", "exceeded limit of 15 requests per second"), tenant.UpstreamThrottled, 11005, 429, false,
			"Making too many requests: exceeded limit of 15 requests per second"},
		{"PAT refused", envelope(401, 11008, "Invalid API key", "Invalid format of key."), tenant.UpstreamPAT, 11008, 401, false, "Invalid format of key."},
		{"PAT malformed", envelope(400, 11102, "Invalid request", "Empty or malformed authorization header. Please provide an API key or session token."),
			tenant.UpstreamPAT, 11102, 400, false, "malformed authorization header"},
		{"quota", envelope(403, 11006, "Account limits exceeded", ""), tenant.UpstreamQuota, 11006, 403, false, "Account limits exceeded"},
		{"code before HTTP status", envelope(500, 11006, "Account limits exceeded", ""), tenant.UpstreamQuota, 11006, 500, false, ""},
		{"failure with HTTP 200", envelope(200, 98004, "Internal", ""), tenant.UpstreamDown, 98004, 200, true, "Internal"},
		{"their fault", envelope(500, 98004, "Internal", ""), tenant.UpstreamDown, 98004, 500, true, "Internal"},
		{"their time limit", envelope(504, 40032, "Request timeout", ""), tenant.UpstreamDown, 40032, 504, true, "Request timeout"},
		{"maintenance", envelope(503, 39997, "Disabled", ""), tenant.UpstreamDown, 39997, 503, false, "Disabled"},
		{"mixed", envelope(207, 10010, "Mixed Success", ""), tenant.UpstreamDown, 10010, 207, true, "Mixed Success"},
		{"not there", envelope(404, 11101, "Resource does not exist", "no app"), tenant.UpstreamNotFound, 11101, 404, false, "no app"},
		{"unknown code, theirs", envelope(503, 77777, "Odd", ""), tenant.UpstreamDown, 77777, 503, true, "Odd"},
		{"unknown code, ours", envelope(404, 77777, "Odd", ""), tenant.UpstreamRefused, 77777, 404, false, "Odd"},
		{"unknown name", page(400, "application/json", `{"status":{"code":"ODD_CODE","description":"Odd"}}`), tenant.UpstreamRefused, 0, 400, false, "ODD_CODE: Odd"},
		{"code by name", page(429, "application/json", `{"status":{"code":"CONN_THROTTLED"}}`), tenant.UpstreamThrottled, 11005, 429, false, "HTTP 429 without a description"},
		{"code by digits", page(429, "application/json", `{"status":{"code":"11005"}}`), tenant.UpstreamThrottled, 11005, 429, false, ""},
		{"moved", page(307, "application/json", `{"status":{"code":10050,"description":"Resource moved","redirect_info":{"new_resource_id":"new-id"}}}`),
			tenant.UpstreamRefused, 10050, 307, false, "moved to new-id: Resource moved"},
		{"fields of odd types", page(404, "application/json", `{"status":{"code":11101,"description":["x"],"details":{"MARKED":1},"req_id":7,"redirect_info":[]}}`),
			tenant.UpstreamNotFound, 11101, 404, false, "HTTP 404 without a description"},
		{"echoed secrets", echo, tenant.UpstreamRefused, 11100, 400, false, "Key [redacted] /v2/users/"},
		{"echoed in the request id", page(400, "application/json", `{"status":{"code":11100,"req_id":"`+patText+`"}}`), tenant.UpstreamRefused, 11100, 400, false, ""},

		{"HTML 502", page(502, "text/html", html), tenant.UpstreamDown, 0, 502, true, "HTTP 502 with text/html instead of Clarifai's answer"},
		{"a gateway's 504", page(504, "text/html", html), tenant.UpstreamDown, 0, 504, true, ""},
		{"HTML 200", page(200, "text/html", html), tenant.UpstreamDown, 0, 200, true, "HTTP 200 with text/html"},
		{"a proxy's 401", page(401, "text/html", html), tenant.UpstreamDown, 0, 401, true, ""},
		{"a proxy's 404", page(404, "text/plain; charset=utf-8", "404 page not found"), tenant.UpstreamDown, 0, 404, true, "HTTP 404 with text/plain instead"},
		{"a proxy's 429", page(429, "text/html", html), tenant.UpstreamThrottled, 0, 429, false, ""},
		{"an odd content type", page(502, patText+"/"+keyText, html), tenant.UpstreamDown, 0, 502, true, ""},
		{"empty", page(200, "application/json", ""), tenant.UpstreamDown, 0, 200, true, "HTTP 200 with an empty body"},
		{"other JSON", page(200, "application/json", `{"status":"ok"}`), tenant.UpstreamDown, 0, 200, true, ""},
		{"a status without a code", page(200, "application/json", `{"status":{}}`), tenant.UpstreamDown, 0, 200, true, ""},
		{"broken JSON", page(200, "application/json", `{"status":{"code":10000},"user":{"id":"ac`), tenant.UpstreamDown, 0, 200, true, ""},
		{"endless", endless, tenant.UpstreamDown, 0, 200, true, "the answer has more than"},

		{"cut before the answer", raw(""), tenant.UpstreamDown, 0, 0, true, ""},
		{"cut in the answer", raw("HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{\"status\":"), tenant.UpstreamDown, 0, 200, true, "closed before the answer was complete"},
		{"not HTTP", raw("MARKED " + patText + "\r\n\r\n"), tenant.UpstreamDown, 0, 0, true, "what came was not HTTP"},
		{"a header too long", raw("HTTP/1.1 200 OK\r\nX: " + strings.Repeat("MARKED", 20_000) + "\r\n\r\n"), tenant.UpstreamDown, 0, 0, true, ""},
		{"redirect", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere.URL+r.URL.Path, http.StatusTemporaryRedirect)
		}, tenant.UpstreamDown, 0, 307, true, "a redirect, which is not followed"},
		{"redirect to nonsense", func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", "://"+r.URL.Path)
			w.WriteHeader(http.StatusFound)
		}, tenant.UpstreamDown, 0, 302, true, ""},
	} {
		for _, call := range calls {
			for _, kept := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/%s/kept=%t", test.name, call.name, kept), func(t *testing.T) {
					t.Parallel()
					var fail atomic.Bool
					u := serve(t, func(w http.ResponseWriter, r *http.Request) {
						if fail.Load() {
							test.h(w, r)
							return
						}
						fmt.Fprint(w, call.answer)
					})
					var seen []string
					c := newClient(t, clarifai.Config{BaseURL: u.URL, Timeout: time.Minute, // no fault here is a time limit
						Observe: func(call, outcome string, _ time.Duration) { seen = append(seen, call+" "+outcome) }})
					if kept {
						if _, err := call.run(t.Context(), c); err != nil {
							t.Fatal(err)
						}
						seen = nil
						u.requests.Store(0)
					}
					fail.Store(true)
					_, err := call.run(t.Context(), c)
					up := asUpstream(t, call, err)
					if up.Class != test.class || up.Code != test.code || up.HTTP != test.http {
						t.Errorf("class %s, code %d, HTTP %d; want %s, %d, %d", up.Class, up.Code, up.HTTP, test.class, test.code, test.http)
					}
					if want := test.unclear && call.changes; up.Unclear != want {
						t.Errorf("unclear is %t, want %t", up.Unclear, want)
					}
					if want := slices.Contains(tooMuch, test.name); up.TooMuch != want {
						t.Errorf("too much is %t, want %t", up.TooMuch, want)
					}
					if !strings.Contains(up.Detail, test.detail) {
						t.Errorf("detail is %q, want %q in it", up.Detail, test.detail)
					}
					if n := u.requests.Load(); n != 1 {
						t.Errorf("one call made %d requests", n)
					}
					if diff := cmp.Diff([]string{call.name + " " + string(test.class)}, seen); diff != "" {
						t.Errorf("observed (-want +got):\n%s", diff)
					}
				})
			}
		}
	}
}

// A call that did not get as far as sending has changed nothing, for certain.
func TestUnreachable(t *testing.T) {
	t.Parallel()
	plain := serve(t, func(http.ResponseWriter, *http.Request) {})
	gone := serve(t, func(http.ResponseWriter, *http.Request) {})
	gone.Close()
	selfSigned := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("an unknown certificate was trusted") }))
	selfSigned.Config.ErrorLog = log.New(io.Discard, "", 0)
	selfSigned.StartTLS()
	t.Cleanup(selfSigned.Close)
	// Accepts connections and never answers the handshake.
	silent, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = silent.Close() })

	for _, test := range []struct{ name, base, detail string }{
		{"nobody listens", gone.URL, "connection refused"},
		{"no such host", "http://clarifai.invalid", "no answer"},
		{"no TLS", strings.Replace(plain.URL, "http:", "https:", 1), ""},
		{"an unknown certificate", selfSigned.URL, "certificate"},
		{"a handshake that hangs", "https://" + silent.Addr().String(), "no answer within the time limit"},
	} {
		for _, call := range calls {
			t.Run(test.name+"/"+call.name, func(t *testing.T) {
				t.Parallel()
				cfg := clarifai.Config{BaseURL: test.base}
				if strings.Contains(test.name, "hangs") {
					cfg.Timeout = 50 * time.Millisecond
				}
				_, err := call.run(t.Context(), newClient(t, cfg))
				up := asUpstream(t, call, err)
				if up.Class != tenant.UpstreamDown || up.Unclear || up.TooMuch || !strings.Contains(up.Detail, test.detail) {
					t.Errorf("got %#v, want down, not unclear and not too much, with %q", up, test.detail)
				}
			})
		}
	}
}

func TestHanging(t *testing.T) {
	t.Parallel()
	for _, call := range calls {
		for _, test := range []struct {
			name       string
			half, gone bool // half an answer comes; the caller goes away
			detail     string
		}{
			{"no answer", false, false, "no answer within the time limit"},
			{"half an answer", true, false, "no answer within the time limit"},
			{"the caller goes away", false, true, "the caller gave up waiting for the answer"},
		} {
			t.Run(call.name+"/"+test.name, func(t *testing.T) {
				t.Parallel()
				var hang atomic.Bool
				came, release := make(chan struct{}), make(chan struct{})
				u := serve(t, func(w http.ResponseWriter, r *http.Request) {
					if !hang.Load() {
						fmt.Fprint(w, call.answer)
						return
					}
					if test.half {
						w.Header().Set("Content-Length", "100")
						fmt.Fprint(w, `{"status":`)
						_ = http.NewResponseController(w).Flush()
					}
					close(came)
					<-release
				})
				t.Cleanup(func() { close(release) }) // before the server closes
				cfg := clarifai.Config{BaseURL: u.URL}
				if !test.gone {
					cfg.Timeout = 200 * time.Millisecond
				}
				c := newClient(t, cfg)
				// With a connection at hand, a slow machine is not taken for a slow dial.
				if _, err := call.run(t.Context(), c); err != nil {
					t.Fatal(err)
				}
				hang.Store(true)
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				if test.gone {
					go func() { <-came; cancel() }()
				}
				_, err := call.run(ctx, c)
				up := asUpstream(t, call, err)
				if up.Class != tenant.UpstreamDown || up.Unclear != call.changes || up.TooMuch == test.gone || up.Detail != test.detail {
					t.Errorf("got %#v", up)
				}
			})
		}
	}
}

// Calls that cannot be right are not made.
func TestNotCalled(t *testing.T) {
	t.Parallel()
	u := serve(t, func(_ http.ResponseWriter, r *http.Request) { t.Errorf("called: %s %s", r.Method, r.URL) })
	observe := func(call, outcome string, _ time.Duration) { t.Errorf("observed %s %s", call, outcome) }
	for name, pat := range map[string]tenant.Secret{
		"no PAT":          {},
		"an empty PAT":    tenant.NewSecret(""),
		"a PAT of lines":  tenant.NewSecret(patText + "\nX-Other: 1"),
		"a PAT not ASCII": tenant.NewSecret(patText + "é"),
	} {
		c := newClient(t, clarifai.Config{BaseURL: u.URL, Observe: observe, PAT: func() tenant.Secret { return pat }})
		for _, call := range calls {
			_, err := call.run(t.Context(), c)
			if up := asUpstream(t, call, err); up.Class != tenant.UpstreamPAT || up.Unclear {
				t.Errorf("%s: %s gave %#v", name, call.name, up)
			}
		}
	}

	c := newClient(t, clarifai.Config{BaseURL: u.URL, Observe: observe})
	deleteKey := callNamed(t, "DeleteKey")
	for _, key := range []tenant.Secret{{}, tenant.NewSecret(""), tenant.NewSecret("."), tenant.NewSecret("..")} {
		if up := asUpstream(t, deleteKey, c.DeleteKey(t.Context(), key)); up.Class != tenant.UpstreamRefused || up.Unclear {
			t.Errorf("DeleteKey of an impossible key gave %#v", up)
		}
	}
	for _, call := range calls {
		if call.name == "GetUser" {
			continue
		}
		_, err := call.run(t.Context(), c.As(""))
		if up := asUpstream(t, call, err); up.Class != tenant.UpstreamRefused || up.Unclear {
			t.Errorf("%s without an operator gave %#v", call.name, up)
		}
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	for _, call := range calls {
		_, err := call.run(gone, c)
		if up := asUpstream(t, call, err); up.Class != tenant.UpstreamDown || up.Unclear {
			t.Errorf("%s for a caller who is gone gave %#v", call.name, up)
		}
	}
}

func TestPATIsReadAtEachCall(t *testing.T) {
	t.Parallel()
	var got []string
	u := serve(t, func(w http.ResponseWriter, r *http.Request) {
		got = append(got, r.Header.Get("Authorization"))
		fmt.Fprint(w, `{`+okStatus+`,"user":{"id":"acme"}}`)
	})
	pats := []string{"first", "second"}
	c := newClient(t, clarifai.Config{BaseURL: u.URL, PAT: func() tenant.Secret {
		pat := tenant.NewSecret(pats[0])
		pats = pats[1:]
		return pat
	}})
	for range 2 {
		if _, err := c.Whoami(t.Context(), tenant.Secret{}); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff([]string{"Key first", "Key second"}, got); diff != "" {
		t.Errorf("authorization (-want +got):\n%s", diff)
	}
}

// A key is opaque: whatever it is made of, it reaches Clarifai as one path element,
// and no error.
func TestDeleteKeyOfAnyForm(t *testing.T) {
	t.Parallel()
	for _, key := range []string{keyText, "MARKED/../apps/x", "MARKED?a=b#c", "MARKED%2e%2e", "MARKED key+é", "MARKED;a,b@c:d"} {
		u := serve(t, func(w http.ResponseWriter, r *http.Request) {
			if want := "/v2/users/acme/keys/" + url.PathEscape(key); r.RequestURI != want || r.URL.Path != "/v2/users/acme/keys/"+key {
				t.Errorf("request is for %s, want %s", r.RequestURI, want)
			}
			envelope(404, 11101, "no "+r.RequestURI, "no "+r.URL.Path)(w, r)
		})
		err := newClient(t, clarifai.Config{BaseURL: u.URL}).DeleteKey(t.Context(), tenant.NewSecret(key))
		if up := asUpstream(t, callNamed(t, "DeleteKey"), err); up.Class != tenant.UpstreamNotFound {
			t.Errorf("got %#v", up)
		}
		u.Close()
		noSecret(t, newClient(t, clarifai.Config{BaseURL: u.URL}).DeleteKey(t.Context(), tenant.NewSecret(key)))
	}
}

// Success is believed only of answers that hold what was asked for.
func TestUnusableAnswers(t *testing.T) {
	t.Parallel()
	keys := func(s string) string { return `{` + okStatus + `,"keys":[` + s + `]}` }
	key := func(id, description, app string) string {
		return fmt.Sprintf(`{"id":%q,"description":%q,"apps":[{"id":%q}]}`, id, description, app)
	}
	marker := keyMarker.String()
	for _, test := range []struct{ call, name, answer string }{
		{"GetUser", "no user", `{` + okStatus + `}`},
		{"GetUser", "no id", `{` + okStatus + `,"user":{}}`},
		{"GetUser", "an alias", `{` + okStatus + `,"user":{"id":"me"}}`},
		{"GetUser", "a path", `{` + okStatus + `,"user":{"id":"a/b"}}`},
		{"GetUser", "dots", `{` + okStatus + `,"user":{"id":".."}}`},
		{"GetUser", "a line end", `{` + okStatus + `,"user":{"id":"a\nb"}}`},
		{"GetUser", "a number", `{` + okStatus + `,"user":{"id":7}}`},
		{"GetApp", "no app", `{` + okStatus + `}`},
		{"GetApp", "another app", `{` + okStatus + `,"app":{"id":"other"}}`},
		{"PostApps", "no app", `{` + okStatus + `,"apps":[]}`},
		{"PostApps", "another app", `{` + okStatus + `,"apps":[{"id":"other"}]}`},
		{"PostApps", "two apps", `{` + okStatus + `,"apps":[{"id":"` + string(appID) + `"},{"id":"other"}]}`},
		{"PostApps", "accepted", `{"status":{"code":10070},"apps":[{"id":"` + string(appID) + `"}]}`},
		{"PostKeys", "no key", keys("")},
		{"PostKeys", "no id", keys(key("", marker, string(appID)))},
		{"PostKeys", "a masked id", keys(key("MARKED************", marker, string(appID)))},
		{"PostKeys", "an id that cannot be sent", keys(key("MARKED\n0123456789ab", marker, string(appID)))},
		{"PostKeys", "an endless id", keys(key(strings.Repeat("MARKED", 1000), marker, string(appID)))},
		{"PostKeys", "another description", keys(key(keyText, "other", string(appID)))},
		{"PostKeys", "another app", keys(key(keyText, marker, "other"))},
		{"PostKeys", "two keys", keys(key(keyText, marker, string(appID)) + "," + key(keyText, marker, string(appID)))},
		{"ListAppKeys", "no list", `{` + okStatus + `,"keys":{}}`},
		{"ListAppKeys", "more than a page", keys(strings.Repeat("{},", 1000) + "{}")},
		{"DeleteKey", "accepted", `{"status":{"code":10070,"description":"Accepted"}}`},
	} {
		t.Run(test.call+"/"+test.name, func(t *testing.T) {
			t.Parallel()
			u := serve(t, page(200, "application/json", test.answer))
			call := callNamed(t, test.call)
			_, err := call.run(t.Context(), newClient(t, clarifai.Config{BaseURL: u.URL}))
			up := asUpstream(t, call, err)
			if up.Class != tenant.UpstreamDown || up.Unclear != call.changes {
				t.Errorf("got %#v, want down, unclear %t", up, call.changes)
			}
		})
	}
}

func TestDeleteAppAccepted(t *testing.T) {
	t.Parallel()
	u := serve(t, envelope(202, 10070, "Accepted", ""))
	if err := newClient(t, clarifai.Config{BaseURL: u.URL}).DeleteApp(t.Context(), appID); err != nil {
		t.Error(err)
	}
}

// Only PostApps can find that an id is taken; Clarifai's code for it is not certain.
func TestDuplicate(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		call    string
		code    int
		details string
		want    tenant.UpstreamClass
	}{
		{"PostApps", 40010, "another object with same ID already exist", tenant.UpstreamDuplicate},
		{"PostApps", 11102, "An app with this id already exists", tenant.UpstreamDuplicate},
		{"PostApps", 11102, "Duplicate id", tenant.UpstreamDuplicate},
		{"PostApps", 11102, "'id' must consist of alphanumeric strings", tenant.UpstreamRefused},
		{"PostKeys", 11102, "scope does not exist", tenant.UpstreamRefused},
	} {
		u := serve(t, envelope(400, test.code, "Invalid request", test.details))
		call := callNamed(t, test.call)
		_, err := call.run(t.Context(), newClient(t, clarifai.Config{BaseURL: u.URL}))
		if up := asUpstream(t, call, err); up.Class != test.want || up.Unclear {
			t.Errorf("%s %d %q gave %#v, want %s", test.call, test.code, test.details, up, test.want)
		}
	}
}

func TestAppMarker(t *testing.T) {
	t.Parallel()
	for metadata, want := range map[string]*tenant.Marker{
		`{"tenantry":{"deployment":"d","app":"a"}}`: {Deployment: "d", App: "a"},
		`{"tenantry":{"deployment":"","app":"a"}}`:  nil,
		`{"tenantry":{}}`:                           nil,
		`{"tenantry":"yes"}`:                        nil,
		`{"tenantry":null}`:                         nil,
		`{"tenantry":{"deployment":["d"],"app":1}}`: nil,
		`{"other":{"deployment":"d","app":"a"}}`:    nil,
		`{}`:                                        nil,
		`null`:                                      nil,
		`["tenantry"]`:                              nil,
		`{"tenantry":{"deployment":"d","app":"a"},"tenantry2":{}}`: {Deployment: "d", App: "a"},
	} {
		u := serve(t, page(200, "application/json", `{`+okStatus+`,"app":{"id":"`+string(appID)+`","metadata":`+metadata+`}}`))
		app, err := newClient(t, clarifai.Config{BaseURL: u.URL}).App(t.Context(), appID)
		if err != nil {
			t.Errorf("%s: %v", metadata, err)
		}
		if diff := cmp.Diff(want, app.Marker); diff != "" {
			t.Errorf("marker of %s (-want +got):\n%s", metadata, diff)
		}
	}
}

func TestListings(t *testing.T) {
	t.Parallel()
	const good = "0123456789abcdef0123456789abcdef"
	for id, readable := range map[string]bool{
		good:               true,
		"AZaz09_-AZaz09_-": true,
		"":                 false,
		"0123456":          false,
		"0123456789abcde":  false,
		"0123…cdef":        false,
		"************cdef": false,
		"••••••••••••••••": false,
		"0123456789abc...":                 false,
		"xxxxxxxxxxxxxxxxxxxxxxxxxxxxcdef": false,
		"[redacted][redacted]":             false,
		good + "\n":                        false,
		good + " ":                         false,
		strings.Repeat(good, 33):           false,
	} {
		list, err := json.Marshal([]map[string]any{{"id": id, "description": "d"}})
		if err != nil {
			t.Fatal(err)
		}
		u := serve(t, page(200, "application/json", `{`+okStatus+`,"keys":`+string(list)+`}`))
		keys, err := newClient(t, clarifai.Config{BaseURL: u.URL}).AppKeys(t.Context(), appID, 1)
		if err != nil || len(keys) != 1 {
			t.Fatalf("%q: %v, %v", id, keys, err)
		}
		if keys[0].Secret.IsSet() != readable || keys[0].Description != "d" {
			t.Errorf("%q is taken for readable: %t, want %t", id, keys[0].Secret.IsSet(), readable)
		}
		if text := fmt.Sprintf("%v %+v %#v", keys, keys, keys); id == good && strings.Contains(text, good) {
			t.Errorf("a listing prints its keys: %s", text)
		}
	}
	for _, empty := range []string{`,"keys":[]`, `,"keys":null`, ``} {
		u := serve(t, page(200, "application/json", `{`+okStatus+empty+`}`))
		keys, err := newClient(t, clarifai.Config{BaseURL: u.URL}).AppKeys(t.Context(), appID, 1)
		if err != nil || len(keys) != 0 {
			t.Errorf("an empty page gave %v, %v", keys, err)
		}
	}
}

func TestRequestID(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ body, header, want string }{
		{"abc", "def", "abc"},
		{"", "def", "def"},
		{"", "", ""},
		{"a b", "", ""},
		{strings.Repeat("a", 129), "", ""},
		{"", "x" + patText, ""},
	} {
		u := serve(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("x-clarifai-request-id", test.header)
			fmt.Fprintf(w, `{"status":{"code":11100,"req_id":%q}}`, test.body)
		})
		_, err := newClient(t, clarifai.Config{BaseURL: u.URL}).Whoami(t.Context(), tenant.Secret{})
		if up := asUpstream(t, callNamed(t, "GetUser"), err); up.RequestID != test.want {
			t.Errorf("req_id %q and header %q gave %q, want %q", test.body, test.header, up.RequestID, test.want)
		}
	}
	// Where the answer is not Clarifai's, its header may still be.
	u := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("x-clarifai-request-id", "abc")
		w.WriteHeader(http.StatusBadGateway)
	})
	_, err := newClient(t, clarifai.Config{BaseURL: u.URL}).Whoami(t.Context(), tenant.Secret{})
	if up := asUpstream(t, callNamed(t, "GetUser"), err); up.RequestID != "abc" {
		t.Errorf("request id is %q, want abc", up.RequestID)
	}
}

// The trace of a context has the id of the last call that was answered, and none
// that may hold a secret.
func TestUpstreamTrace(t *testing.T) {
	t.Parallel()
	var body atomic.Value
	u := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if body.Load() == "" {
			panic(http.ErrAbortHandler)
		}
		fmt.Fprint(w, body.Load())
	})
	c := newClient(t, clarifai.Config{BaseURL: u.URL})
	ctx := tenant.WithUpstreamTrace(t.Context())
	if got := tenant.LastUpstreamRequest(ctx); got != "" {
		t.Errorf("before any call the trace has %q", got)
	}
	for _, test := range []struct{ body, want string }{
		{`{"status":{"code":10000,"req_id":"first"},"user":{"id":"acme"}}`, "first"},
		{`{"status":{"code":11100,"req_id":"second"}}`, "second"},
		{`{"status":{"code":10000,"req_id":"third"},"user":{}}`, "third"},
		{`{"status":{"code":10000,"req_id":"x` + patText + `"},"user":{"id":"acme"}}`, ""},
		{`{"status":{"code":10000,"req_id":"fourth"},"user":{"id":"acme"}}`, "fourth"},
		{"", ""},
	} {
		body.Store(test.body)
		_, _ = c.Whoami(ctx, tenant.Secret{})
		if got := tenant.LastUpstreamRequest(ctx); got != test.want {
			t.Errorf("after %s the trace has %q; want %q", test.body, got, test.want)
		}
	}
	if got := tenant.LastUpstreamRequest(t.Context()); got != "" {
		t.Errorf("a context without a trace has %q", got)
	}
}

func TestConfig(t *testing.T) {
	t.Parallel()
	pat := func() tenant.Secret { return tenant.NewSecret(patText) }
	for _, base := range []string{"", "api.clarifai.com", "ftp://api.clarifai.com", "https://", "https://:443", "https:///x", "/v2", "https://u:MARKED@h",
		"https://h?a=MARKED", "https://h?", "https://h#MARKED", "https://h/v2", "https://h/v2/", "https://h:MARKED", "https://MARKED\n"} {
		_, err := clarifai.New(clarifai.Config{BaseURL: base, PAT: pat})
		if err == nil {
			t.Errorf("%q was taken", base)
			continue
		}
		noSecret(t, err)
	}
	for _, cfg := range []clarifai.Config{{BaseURL: "https://h"}, {BaseURL: "https://h", PAT: pat, Timeout: -1}} {
		if _, err := clarifai.New(cfg); err == nil {
			t.Errorf("%+v was taken", cfg)
		}
	}
	c, err := clarifai.New(clarifai.Config{BaseURL: "https://api.clarifai.com", PAT: pat})
	if err != nil {
		t.Fatal(err)
	}
	if text := fmt.Sprintf("%v %+v %#v", c, c, c); strings.Contains(text, "MARKED") {
		t.Errorf("a client prints its PAT: %s", text)
	}
}

func TestBaseURLWithPath(t *testing.T) {
	t.Parallel()
	for _, base := range []string{"", "/", "/clarifai", "/clarifai/", "/a%2Fb"} {
		u := serve(t, func(w http.ResponseWriter, r *http.Request) {
			if want := strings.TrimRight(base, "/") + "/v2/users/me"; r.RequestURI != want {
				t.Errorf("base %q: the request is for %s, want %s", base, r.RequestURI, want)
			}
			fmt.Fprint(w, `{`+okStatus+`,"user":{"id":"acme"}}`)
		})
		if _, err := newClient(t, clarifai.Config{BaseURL: u.URL + base}).Whoami(t.Context(), tenant.Secret{}); err != nil {
			t.Error(err)
		}
	}
}
