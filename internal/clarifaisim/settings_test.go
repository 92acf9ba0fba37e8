package clarifaisim_test

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tenantry/tenantry/internal/clarifaisim"
)

func TestSwitches(t *testing.T) {
	t.Parallel()

	t.Run("http_codes", func(t *testing.T) {
		t.Parallel()
		f := newFixture(t)
		f.control(200, "POST", "settings", `{"http_codes":{"11101":410,"11102":422}}`, nil)
		f.control(200, "POST", "settings", `{"http_codes":{"11102":0}}`, nil)
		if r := f.want(11101, "GET", "/v2/users/acme/apps/a", ""); r.http != 410 || r.Status.HTTPStatusCode != 410 {
			t.Errorf("11101: HTTP %d, http_status_code %d, want 410", r.http, r.Status.HTTPStatusCode)
		}
		if r := f.want(11102, "POST", "/v2/users/acme/apps", "{}"); r.http != 400 {
			t.Errorf("11102: HTTP %d, want 400 again", r.http)
		}
	})
	t.Run("pat_only_code", func(t *testing.T) {
		t.Parallel()
		f := newFixture(t)
		f.makeApp("a")
		key := f.makeKey("a")
		f.update(func(s *clarifaisim.Settings) { s.PATOnlyCode = 11007 })
		f.wantAs(key, 11007, "GET", "/v2/users/acme/apps", "")
	})
	t.Run("unknown_key_code", func(t *testing.T) {
		t.Parallel()
		f := newFixture(t)
		f.update(func(s *clarifaisim.Settings) { s.UnknownKeyCode = 11009 })
		if r := f.wantAs("None", 11009, "GET", "/v2/users/me", ""); r.Status.Details != "invalid key(None)" {
			t.Errorf("details %q", r.Status.Details)
		}
	})
	t.Run("first_key", func(t *testing.T) {
		t.Parallel()
		f := newFixture(t)
		f.update(func(s *clarifaisim.Settings) { s.FirstKey = true })
		f.makeApp("a")
		keys := f.Keys()
		if len(keys) != 1 || keys[0].AppID != "a" {
			t.Fatalf("keys of a new app: %+v, want one", keys)
		}
		f.wantAs(keys[0].ID, 10000, "GET", "/v2/app", "")
	})
	t.Run("max_id_length", func(t *testing.T) {
		t.Parallel()
		f := newFixture(t)
		f.update(func(s *clarifaisim.Settings) { s.MaxIDLength = 4 })
		f.makeApp("abcd")
		f.want(11102, "POST", "/v2/users/acme/apps", `{"apps":[{"id":"abcde"}]}`)
		f.want(10000, "POST", "/v2/users/acme/apps", `{"apps":[{}]}`)
	})
	t.Run("quotas", func(t *testing.T) {
		t.Parallel()
		f := newFixture(t)
		f.update(func(s *clarifaisim.Settings) { s.AppQuota, s.KeyQuota = 2, 1 })
		f.makeApp("a")
		f.want(11006, "POST", "/v2/users/acme/apps", `{"apps":[{"id":"b"},{"id":"c"}]}`)
		f.makeApp("b")
		if r := f.want(11006, "POST", "/v2/users/acme/apps", `{"apps":[{"id":"c"}]}`); r.http != 402 {
			t.Errorf("HTTP %d, want 402", r.http)
		}
		f.wantAs(otherPAT, 10000, "POST", "/v2/users/other/apps", `{"apps":[{"id":"c"}]}`)
		f.makeKey("a")
		f.want(11006, "POST", "/v2/users/acme/keys", keyBody("a"))
		f.makeKey("b")
		f.want(10000, "DELETE", "/v2/users/acme/apps/a", "")
		f.makeApp("c")
	})
	t.Run("several_items", func(t *testing.T) {
		t.Parallel()
		for mode, want := range map[string]struct {
			code int
			made string // of the items a, b and c, of which b fails
		}{"all": {98004, ""}, "first": {98004, "a"}, "partial": {10010, "ac"}, "refused": {11102, ""}} {
			f := newFixture(t)
			for _, id := range []string{"x", "y", "z"} {
				f.makeApp(id)
			}
			f.update(func(s *clarifaisim.Settings) { s.SeveralItems, s.FailingItem = mode, 2 })
			f.want(want.code, "POST", "/v2/users/acme/apps", `{"apps":[{"id":"a"},{"id":"b"},{"id":"c"}]}`)
			for _, id := range []string{"a", "b", "c"} {
				code := 11101
				if strings.Contains(want.made, id) {
					code = 10000
				}
				f.want(code, "GET", "/v2/users/acme/apps/"+id, "")
			}
			key := func(app string) string { return `{"scopes":["All"],"apps":[{"id":"` + app + `"}]}` }
			before := len(f.Keys())
			f.want(want.code, "POST", "/v2/users/acme/keys", `{"keys":[`+key("x")+`,`+key("y")+`,`+key("z")+`]}`)
			if n := len(f.Keys()) - before; n != len(want.made) {
				t.Errorf("%s: %d keys were made; want %d", mode, n, len(want.made))
			}
			f.makeApp("d") // one alone meets none of that
			f.update(func(s *clarifaisim.Settings) { s.FailingItem, s.SeveralItems = 0, "all" })
			f.want(10000, "POST", "/v2/users/acme/apps", `{"apps":[{"id":"e"},{"id":"f"}]}`)
		}
		f := newFixture(t)
		if err := f.Update(func(s *clarifaisim.Settings) { s.SeveralItems = "some" }); err == nil {
			t.Error("a way that there is not was taken")
		}
	})
	t.Run("async_delete_ms", func(t *testing.T) {
		t.Parallel()
		var clk clock
		f := newFixture(t, clk.use)
		f.makeApp("a")
		key := f.makeKey("a")
		f.update(func(s *clarifaisim.Settings) { s.AsyncDeleteMS = 1000 })
		for range 2 {
			if r := f.want(10070, "DELETE", "/v2/users/acme/apps/a", ""); r.http != 202 {
				t.Errorf("HTTP %d, want 202", r.http)
			}
			clk.forward(999 * time.Millisecond / 2)
		}
		f.wantAs(key, 11008, "GET", "/v2/app", "")
		f.want(10000, "GET", "/v2/users/acme/apps/a", "")
		f.want(11101, "POST", "/v2/users/acme/keys", keyBody("a"))
		f.want(40010, "POST", "/v2/users/acme/apps", `{"apps":[{"id":"a"}]}`)
		clk.forward(2 * time.Millisecond)
		f.want(11101, "GET", "/v2/users/acme/apps/a", "")
		f.makeApp("a")
	})
	t.Run("consistency_delay_ms", func(t *testing.T) {
		t.Parallel()
		var clk clock
		f := newFixture(t, clk.use)
		f.update(func(s *clarifaisim.Settings) { s.ConsistencyDelayMS = 1000 })
		f.makeApp("a")
		key := f.makeKey("a")
		see := func(code, apps, keys int) {
			t.Helper()
			f.want(code, "GET", "/v2/users/acme/apps/a", "")
			f.want(code, "GET", "/v2/users/acme/keys/"+key, "")
			f.want(code, "GET", "/v2/users/acme/apps/a/keys", "")
			if n := len(f.want(10000, "GET", "/v2/users/acme/apps", "").Apps); n != apps {
				t.Errorf("ListApps: got %d, want %d", n, apps)
			}
			if n := len(f.want(10000, "GET", "/v2/users/acme/keys", "").Keys); n != keys {
				t.Errorf("ListKeys: got %d, want %d", n, keys)
			}
		}
		see(11101, 0, 0)
		f.wantAs(key, 10000, "POST", "/v2/inputs", `{"inputs":[{}]}`)
		f.want(40010, "POST", "/v2/users/acme/apps", `{"apps":[{"id":"a"}]}`)
		clk.forward(time.Second)
		see(10000, 1, 1)
	})
	t.Run("consistency_for_changes", func(t *testing.T) {
		t.Parallel()
		var clk clock
		f := newFixture(t, clk.use)
		f.update(func(s *clarifaisim.Settings) { s.ConsistencyDelayMS, s.ConsistencyForChanges = 1000, true })
		f.makeApp("a")
		clk.forward(time.Second)
		key := f.makeKey("a")
		f.want(11101, "DELETE", "/v2/users/acme/keys/"+key, "")
		f.want(11101, "PATCH", "/v2/users/acme/keys", `{"action":"overwrite","keys":[{"id":"`+key+`","scopes":["Predict"]}]}`)
		f.wantAs(key, 10000, "GET", "/v2/myscopes", "")
		clk.forward(time.Second)
		f.want(10000, "DELETE", "/v2/users/acme/keys/"+key, "")
		f.wantAs(key, 11008, "GET", "/v2/myscopes", "")
	})
}

func TestThrottle(t *testing.T) {
	t.Parallel()
	var clk clock
	f := newFixture(t, clk.use)
	f.makeApp("a")
	key := f.makeKey("a")
	f.update(func(s *clarifaisim.Settings) { s.RateLimit = 3 })
	me := func(secret string, code int) {
		t.Helper()
		r := f.wantAs(secret, code, "GET", "/v2/users/acme/apps/a", "")
		if code == 11005 && (r.http != 429 || r.Status.Details != "exceeded limit of 3 requests per second") {
			t.Errorf("HTTP %d, details %q", r.http, r.Status.Details)
		}
	}
	me(acmePAT, 10000)
	clk.forward(400 * time.Millisecond)
	me(acmePAT, 10000)
	me(key, 10000) // the account's limit, not the credential's
	me(acmePAT, 11005)
	me(key, 11005)
	f.wantAs(otherPAT, 10000, "GET", "/v2/users/me", "")
	if r := f.do("", "GET", "/v2/status_codes", ""); r.http != 200 {
		t.Errorf("status_codes: HTTP %d, want 200", r.http)
	}
	clk.forward(599 * time.Millisecond)
	me(acmePAT, 11005)
	clk.forward(time.Millisecond) // the first is a second old; refused ones do not count
	me(acmePAT, 10000)
	me(acmePAT, 11005)
	f.control(200, "POST", "settings", `{"rate_limit":0}`, nil)
	for range 10 {
		me(acmePAT, 10000)
	}
}

func TestDefaultSettings(t *testing.T) {
	t.Parallel()
	f := newFixture(t, func(cfg *clarifaisim.Config) { cfg.Settings = nil })
	if diff := cmp.Diff(clarifaisim.DefaultSettings(), f.Settings()); diff != "" {
		t.Errorf("settings (-want +got):\n%s", diff)
	}
	if got := f.Settings().RateLimit; got != 15 {
		t.Errorf("rate limit: got %d, want 15", got)
	}
}

func TestSettingsControl(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	var got clarifaisim.Settings
	f.control(200, "POST", "settings", `{"latency_ms":1,"masked_keys":true}`, &got)
	want := clarifaisim.DefaultSettings()
	want.RateLimit, want.LatencyMS, want.MaskedKeys = 0, 1, true
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("settings after a partial update (-want +got):\n%s", diff)
	}
	f.control(200, "GET", "settings", "", &got)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("GET settings (-want +got):\n%s", diff)
	}
	for _, tt := range []struct{ body, message string }{
		{``, "empty"},
		{`{"rate":1}`, `unknown field \"rate\"`},
		{`{"rate_limit":-1}`, "rate_limit is -1"},
		{`{"rate_limit":"1"}`, "rate_limit"},
		{`{"duplicate_code":1}`, "has to be 40010 or 11102"},
		{`{"unknown_key_code":1}`, "has to be 11008 or 11009"},
		{`{"pat_only_code":10000}`, "code of a failure"},
		{`{"max_id_length":0}`, "1 or more"},
		{`{"http_codes":{"11005":99}}`, "200 to 599"},
		{`{} {}`, "something behind"},
	} {
		if text := f.control(400, "POST", "settings", tt.body, nil); !strings.Contains(text, tt.message) {
			t.Errorf("settings %s: got %s, want it to say %s", tt.body, text, tt.message)
		}
	}
	if diff := cmp.Diff(want, f.Settings()); diff != "" {
		t.Errorf("settings after refused updates (-want +got):\n%s", diff)
	}
}
