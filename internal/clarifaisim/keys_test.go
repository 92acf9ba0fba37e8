package clarifaisim_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tenantry/tenantry/internal/clarifaisim"
)

func TestPostKeys(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.makeApp("app-a")
	f.wantAs(otherPAT, 10000, "POST", "/v2/users/other/apps", `{"apps":[{"id":"theirs"}]}`)
	for _, tt := range []struct {
		name, key string
		code      int
	}{
		{"plain", `{"scopes":["All"],"apps":[{"id":"app-a","user_id":"acme"}]}`, 10000},
		{"without user", `{"scopes":["All"],"apps":[{"id":"app-a"}]}`, 10000},
		{"with type", `{"type":"app_specific_key","apps":[{"id":"app-a"}]}`, 10000},
		{"both spellings", `{"scopes":["Models:Get","Models_Get"],"apps":[{"id":"app-a"}]}`, 10000},
		{"a PAT", `{"type":"personal_access_token","apps":[{"id":"app-a"}]}`, 11102},
		{"no app", `{"scopes":["All"]}`, 11102},
		{"two apps", `{"scopes":["All"],"apps":[{"id":"app-a"},{"id":"app-a"}]}`, 11102},
		{"unknown scope", `{"scopes":["Models.Get"],"apps":[{"id":"app-a"}]}`, 11102},
		{"unknown verb", `{"scopes":["Models_Sell"],"apps":[{"id":"app-a"}]}`, 11102},
		{"unknown app", `{"scopes":["All"],"apps":[{"id":"nope"}]}`, 11101},
		{"somebody else's app", `{"scopes":["All"],"apps":[{"id":"theirs","user_id":"other"}]}`, 11101},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := f.in(t)
			before := f.State().Keys
			f.want(tt.code, "POST", "/v2/users/acme/keys", `{"keys":[`+tt.key+`]}`)
			if made := f.State().Keys - before; (made == 1) != (tt.code == 10000) {
				t.Errorf("%d keys made", made)
			}
		})
	}
	// All or nothing.
	before := f.State().Keys
	f.want(11101, "POST", "/v2/users/acme/keys", `{"keys":[{"apps":[{"id":"app-a"}]},{"apps":[{"id":"nope"}]}]}`)
	if n := f.State().Keys; n != before {
		t.Errorf("a refused request made %d keys", n-before)
	}
}

func TestListKeys(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.makeApp("app-a")
	f.makeApp("app-b")
	post := func(fields string) {
		t.Helper()
		f.want(10000, "POST", "/v2/users/acme/keys", `{"keys":[{`+fields+`}]}`)
	}
	post(`"description":"one","scopes":["All"],"apps":[{"id":"app-a"}]`)
	post(`"description":"two","scopes":["Models:Get","Search"],"apps":[{"id":"app-b"}]`)
	post(`"description":"three","endpoints":["/clarifai.api.V2/GetApp"],"apps":[{"id":"app-a"}],"expires_at":"2001-01-01T00:00:00Z"`)
	for _, tt := range []struct {
		path string
		want []string
	}{
		{"keys", []string{"one", "two", "three"}},
		{"keys?per_page=2&page=2", []string{"three"}},
		{"keys?per_page=2&page=3", nil},
		{"keys?not_expired=true", []string{"one", "two"}},
		{"keys?scopes=Models_Get", []string{"two"}},
		{"keys?scopes=Models_Get,Search", []string{"two"}},
		{"keys?scopes=Models_Get&scopes=Predict", nil},
		{"keys?endpoints=/clarifai.api.V2/GetApp", []string{"three"}},
		{"keys?type=personal_access_token", nil},
		{"apps/app-a/keys", []string{"one", "three"}},
		{"apps/app-b/keys/", []string{"two"}},
	} {
		r := f.want(10000, "GET", "/v2/users/acme/"+tt.path, "")
		var got []string
		for _, k := range r.Keys {
			got = append(got, k.Description)
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.path, diff)
		}
	}
	f.want(11101, "GET", "/v2/users/acme/apps/nope/keys", "")
	if r := f.wantAs(otherPAT, 10000, "GET", "/v2/users/other/keys", ""); len(r.Keys) != 0 {
		t.Errorf("keys of another user: got %d, want 0", len(r.Keys))
	}
}

func TestPatchKeys(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.makeApp("app-a")
	key := f.makeKey("app-a")
	patch := func(code int, fields string) {
		t.Helper()
		f.want(code, "PATCH", "/v2/users/acme/keys", fmt.Sprintf(`{"action":"overwrite","keys":[{"id":%q,%s}]}`, key, fields))
	}
	patch(10000, `"scopes":["Search"]`)
	f.wantAs(key, 11007, "GET", "/v2/app", "")
	patch(10000, `"description":"new"`)
	patch(11102, `"scopes":["Nonsense"]`)
	f.want(11101, "PATCH", "/v2/users/acme/keys", `{"action":"overwrite","keys":[{"id":"nope"}]}`)
	f.want(11102, "PATCH", "/v2/users/acme/keys", fmt.Sprintf(`{"keys":[{"id":%q}]}`, key))
	got := f.want(10000, "GET", "/v2/users/acme/keys/"+key, "").Key
	if got.Description != "new" || !cmp.Equal(got.Scopes, []string{"Search"}) || got.Type != "app_specific_key" || got.Apps[0].ID != "app-a" {
		t.Errorf("key after patches: %+v", got)
	}
}

func TestMaskedKeys(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.makeApp("app-a")
	f.update(func(s *clarifaisim.Settings) { s.MaskedKeys = true })
	key := f.makeKey("app-a")
	if len(key) != 32 || strings.Contains(key, "*") {
		t.Fatalf("PostKeys: got %q, want the whole key", key)
	}
	masked := strings.Repeat("*", 28) + key[28:]
	for _, path := range []string{"/v2/users/acme/keys", "/v2/users/acme/apps/app-a/keys"} {
		if got := f.want(10000, "GET", path, "").Keys[0].ID; got != masked {
			t.Errorf("%s: got %q, want %q", path, got, masked)
		}
	}
	if got := f.want(10000, "GET", "/v2/users/acme/keys/"+key, "").Key.ID; got != masked {
		t.Errorf("GetKey: got %q, want %q", got, masked)
	}
	f.want(11101, "DELETE", "/v2/users/acme/keys/"+strings.ReplaceAll(masked, "*", "%2A"), "")
	f.want(10000, "DELETE", "/v2/users/acme/keys/"+key, "")
}

func TestExpiry(t *testing.T) {
	t.Parallel()
	var clk clock
	f := newFixture(t, clk.use)
	f.makeApp("app-a")
	until := clk.now().Add(time.Minute).UTC().Format(time.RFC3339Nano)
	f.want(10000, "POST", "/v2/users/acme/keys", `{"keys":[{"scopes":["All"],"apps":[{"id":"app-a"}],"expires_at":"`+until+`"}]}`)
	key := f.Keys()[0].ID
	clk.forward(time.Minute - 1)
	f.wantAs(key, 10000, "GET", "/v2/app", "")
	clk.forward(1)
	f.wantAs(key, 11008, "GET", "/v2/app", "")
	if n := f.State().Keys; n != 0 {
		t.Errorf("live keys: got %d, want 0", n)
	}
	f.update(func(s *clarifaisim.Settings) { s.HonourExpiresAt = false })
	f.wantAs(key, 10000, "GET", "/v2/app", "")
}
