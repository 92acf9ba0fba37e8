package clarifaisim_test

import (
	"net/http"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tenantry/tenantry/internal/clarifaisim"
)

const unknownKey = "0123456789abcdef0123456789abcdef"

func TestHeader(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	for _, tt := range []struct {
		name, header string
		code         int
		details      string
	}{
		{"none", "", 11102, "Empty or malformed authorization header. Please provide an API key or session token."},
		{"no key", "Key ", 11102, "Empty or malformed authorization header. Please provide an API key or session token."},
		{"lower case", "key " + acmePAT, 11102, "Empty or malformed authorization header. Please provide an API key or session token."},
		{"bearer", "Bearer " + acmePAT, 11102, "Empty or malformed authorization header. Please provide an API key or session token."},
		{"of another form", "Key nonsense", 11008, "Invalid format of key."},
		{"unknown", "Key " + unknownKey, 11008, ""},
		{"right", "Key " + acmePAT, 10000, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := f.in(t)
			req, _ := http.NewRequestWithContext(t.Context(), "GET", f.url+"/v2/users/me", nil)
			if tt.header != "" {
				req.Header.Set("Authorization", tt.header)
			}
			r, err := f.send(req)
			if err != nil {
				t.Fatal(err)
			}
			if r.Status.Code != tt.code || r.Status.Details != tt.details {
				t.Errorf("Authorization %q: got %d %q, want %d %q", tt.header, r.Status.Code, r.Status.Details, tt.code, tt.details)
			}
		})
	}
}

// TestWhoMay walks all calls as everybody.
func TestWhoMay(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.makeApp("app-a")
	f.makeApp("app-b")
	keyA := f.makeKey("app-a")
	f.makeKey("app-b")
	who := map[string]string{"nobody": "", "acme": acmePAT, "other": otherPAT, "key A": keyA, "stranger": unknownKey}

	const (
		ok, malformed, invalid, notFound = 10000, 11102, 11008, 11101
	)
	input := `{"inputs":[{"data":{"text":{"raw":"x"}}}]}`
	patOnly := map[string]int{"nobody": malformed, "acme": ok, "other": notFound, "key A": invalid, "stranger": invalid}
	bothKinds := map[string]int{"nobody": malformed, "acme": ok, "other": notFound, "key A": ok, "stranger": invalid}
	ofAppB := map[string]int{"nobody": malformed, "acme": ok, "other": notFound, "key A": invalid, "stranger": invalid}
	keyOnly := map[string]int{"nobody": malformed, "acme": invalid, "other": invalid, "key A": ok, "stranger": invalid}
	own := map[string]int{"nobody": malformed, "acme": ok, "other": ok, "key A": invalid, "stranger": invalid}
	all := map[string]int{"nobody": ok, "acme": ok, "other": ok, "key A": ok, "stranger": ok}
	for _, tt := range []struct {
		method, path, body string
		want               map[string]int
	}{
		{"GET", "/v2/users/me", "", own},
		{"GET", "/v2/users/acme", "", patOnly},
		{"GET", "/v2/myscopes", "", keyOnly},
		{"GET", "/v2/my_scopes", "", keyOnly},
		{"GET", "/v2/myscopesroot", "", own},
		{"GET", "/v2/users/acme/myscopes", "", patOnly},
		{"GET", "/v2/users/acme/apps/app-a/myscopes", "", bothKinds},
		{"GET", "/v2/users/acme/apps/app-b/myscopes", "", ofAppB},
		{"GET", "/v2/users/acme/apps", "", patOnly},
		{"GET", "/v2/apps", "", own},
		{"GET", "/v2/app", "", keyOnly},
		{"GET", "/v2/users/acme/apps/app-a", "", bothKinds},
		{"GET", "/v2/users/acme/apps/app-b", "", ofAppB},
		{"PATCH", "/v2/users/acme/apps/app-a", `{"app":{"notes":"n"},"action":"overwrite"}`, patOnly},
		{"PATCH", "/v2/users/acme/apps", `{"apps":[{"id":"app-a","notes":"n"}],"action":"overwrite"}`, patOnly},
		{"GET", "/v2/users/acme/keys", "", patOnly},
		{"GET", "/v2/users/acme/apps/app-a/keys", "", patOnly},
		{"GET", "/v2/users/acme/keys/" + keyA, "", patOnly},
		{"POST", "/v2/users/acme/keys", keyBody("app-a", "All"), patOnly},
		{"POST", "/v2/users/acme/apps/app-a/inputs", input, bothKinds},
		{"POST", "/v2/users/acme/apps/app-b/inputs", input, ofAppB},
		{"GET", "/v2/users/acme/apps/app-a/inputs", "", bothKinds},
		{"GET", "/v2/users/acme/apps/app-b/inputs", "", ofAppB},
		{"GET", "/v2/inputs", "", keyOnly},
		{"POST", "/v2/models/m/outputs", input, keyOnly},
		{"POST", "/v2/users/acme/apps/app-a/models/m/outputs", input, bothKinds},
		{"POST", "/v2/users/acme/apps/app-b/models/m/outputs", input, ofAppB},
		{"GET", "/v2/status_codes", "", all},
	} {
		got := make(map[string]int)
		for name, secret := range who {
			got[name] = f.do(secret, tt.method, tt.path, tt.body).Status.Code
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s %s: codes (-want +got):\n%s", tt.method, tt.path, diff)
		}
	}
}

func TestKeyFindsItsApp(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.makeApp("app-a")
	key := f.makeKey("app-a", "Predict", "Apps:Get", "Workflows_Get")
	if r := f.wantAs(key, 10000, "GET", "/v2/app", ""); r.App.ID != "app-a" {
		t.Errorf("GET /v2/app: got app %q, want app-a", r.App.ID)
	}
	r := f.wantAs(key, 10000, "GET", "/v2/myscopes", "")
	if diff := cmp.Diff([]string{"Predict", "Apps:Get", "Workflows_Get"}, r.Scopes); diff != "" || r.App.ID != "app-a" {
		t.Errorf("GET /v2/myscopes: app %q, scopes (-want +got):\n%s", r.App.ID, diff)
	}
	// The user of the path may be "me" for a key, too, and nobody else.
	f.wantAs(key, 10000, "GET", "/v2/users/me/apps/app-a", "")
	f.wantAs(key, 11008, "GET", "/v2/users/other/apps/app-a", "")
	if r := f.want(11008, "GET", "/v2/app", ""); r.Status.Details != "Must provide app external ID in API authorizer" {
		t.Errorf("GET /v2/app with a PAT: details %q", r.Status.Details)
	}
}

func TestScopesOfKeys(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.makeApp("app-a")
	input := `{"inputs":[{"data":{"text":{"raw":"x"}}}]}`
	predict := []string{"Predict", "Apps_Get", "Models_Get", "Concepts_Get"}
	for _, tt := range []struct {
		name               string
		scopes             []string
		method, path, body string
		code               int
	}{
		{"all opens all", []string{"All"}, "POST", "/v2/inputs", input, 10000},
		{"predict predicts", predict, "POST", "/v2/models/m/outputs", input, 10000},
		{"predict does not store", predict, "POST", "/v2/inputs", input, 11007},
		{"predict does not list", predict, "GET", "/v2/inputs", "", 11007},
		{"predict does not read the app", predict, "GET", "/v2/app", "", 11007},
		{"other spelling", []string{"Apps:Get", "Workflows:Get"}, "GET", "/v2/app", "", 10000},
		{"half is not enough", []string{"Apps:Get"}, "GET", "/v2/app", "", 11007},
		{"its scopes need no scope", []string{"Search"}, "GET", "/v2/myscopes", "", 10000},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := f.in(t)
			r := f.wantAs(f.makeKey("app-a", tt.scopes...), tt.code, tt.method, tt.path, tt.body)
			if tt.code == 11007 && (r.http != 403 || !strings.HasPrefix(r.Status.Details, "missing scopes: ")) {
				t.Errorf("got HTTP %d, details %q", r.http, r.Status.Details)
			}
		})
	}

	f.want(10000, "POST", "/v2/users/acme/keys", `{"keys":[{"scopes":["Search"],"endpoints":["/clarifai.api.V2/GetApp"],"apps":[{"id":"app-a"}]}]}`)
	keys := f.Keys()
	byEndpoint := keys[len(keys)-1].ID
	f.wantAs(byEndpoint, 10000, "GET", "/v2/app", "")
	f.wantAs(byEndpoint, 11007, "GET", "/v2/inputs", "")
}

func TestScopesOfPATs(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	const appsOnly = "33333333333333333333333333333333"
	if err := f.AddPAT(clarifaisim.PAT{Token: appsOnly, UserID: "acme", Scopes: []string{"Apps_Get", "Workflows_Get"}}); err != nil {
		t.Fatal(err)
	}
	f.wantAs(appsOnly, 10000, "GET", "/v2/users/me", "")
	f.wantAs(appsOnly, 10000, "GET", "/v2/users/acme/apps", "")
	f.wantAs(appsOnly, 11007, "POST", "/v2/users/acme/apps", `{"apps":[{"id":"a"}]}`)
	f.wantAs(appsOnly, 11007, "GET", "/v2/users/acme/keys", "")
}

func TestPATsComeAndGo(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.makeApp("app-a")
	key := f.makeKey("app-a")
	f.control(200, "POST", "settings", `{"add_pats":[{"token":"newcomer","user_id":"acme"}],"remove_pats":["`+acmePAT+`"]}`, nil)
	f.want(11008, "GET", "/v2/users/me", "")
	if r := f.wantAs("newcomer", 10000, "GET", "/v2/users/me", ""); r.User.ID != "acme" {
		t.Errorf("users/me: got %q, want acme", r.User.ID)
	}
	f.wantAs("newcomer", 10000, "GET", "/v2/users/acme/apps/app-a", "")
	f.wantAs(key, 10000, "GET", "/v2/app", "") // keys do not hang on a PAT
	for _, bad := range []string{`{"add_pats":[{"token":"x"}]}`, `{"add_pats":[{"token":" ","user_id":"u"}]}`, `{"add_pats":[{"token":"x","user_id":"me"}]}`} {
		f.control(400, "POST", "settings", bad, nil)
	}
}

func TestDeletedAppsAndKeysOpenNothing(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.makeApp("app-a")
	one, two := f.makeKey("app-a"), f.makeKey("app-a")
	f.want(10000, "DELETE", "/v2/users/acme/keys/"+one, "")
	f.wantAs(one, 11008, "GET", "/v2/app", "")
	f.want(11101, "GET", "/v2/users/acme/keys/"+one, "")
	f.want(11101, "DELETE", "/v2/users/acme/keys/"+one, "")
	f.wantAs(two, 10000, "GET", "/v2/app", "")

	f.wantAs(otherPAT, 11101, "DELETE", "/v2/users/other/keys/"+two, "") // acme's
	f.wantAs(two, 10000, "GET", "/v2/app", "")

	f.want(10000, "DELETE", "/v2/users/acme/apps/app-a", "")
	f.wantAs(two, 11008, "GET", "/v2/app", "")
	f.want(11101, "GET", "/v2/users/acme/apps/app-a", "")
	f.want(11101, "DELETE", "/v2/users/acme/apps/app-a", "")
	if st := f.State(); st.Apps != 0 || st.Keys != 0 {
		t.Errorf("state: got %d apps, %d keys, want none", st.Apps, st.Keys)
	}
	// A new app of that id has nothing of the old one.
	f.makeApp("app-a")
	f.wantAs(two, 11008, "GET", "/v2/app", "")
	if n := len(f.want(10000, "GET", "/v2/users/acme/apps/app-a/keys", "").Keys); n != 0 {
		t.Errorf("keys of a new app: got %d, want 0", n)
	}
}

// A collaborator may look at an app that is shared with it, and what it holds; its keys
// and its fields are the owner's.
func TestCollaborator(t *testing.T) {
	t.Parallel()
	for _, code := range []int{11101, 11007} {
		f := newFixture(t)
		f.makeApp("app-a")
		f.makeApp("app-b")
		key := f.makeKey("app-a")
		f.update(func(s *clarifaisim.Settings) {
			s.Shares = []clarifaisim.Share{{UserID: "acme", AppID: "app-a", With: "other"}}
			s.CollaboratorCode = code
		})
		for _, tt := range []struct {
			method, path, body string
			code               int
		}{
			{"GET", "/v2/users/acme/apps/app-a", "", 10000},
			{"GET", "/v2/users/acme/apps/app-a/inputs", "", 10000},
			{"GET", "/v2/users/acme/apps/app-b", "", 11101},
			{"GET", "/v2/users/other/apps/app-a", "", 11101},
			{"GET", "/v2/users/acme/apps/app-a/keys", "", code},
			{"PATCH", "/v2/users/acme/apps/app-a", `{"app":{"notes":"n"},"action":"overwrite"}`, code},
			{"DELETE", "/v2/users/acme/apps/app-a", "", code},
			{"POST", "/v2/users/other/keys", `{"keys":[{"scopes":["All"],"apps":[{"id":"app-a","user_id":"acme"}]}]}`, code},
			{"GET", "/v2/users/other/keys/" + key, "", code},
			{"DELETE", "/v2/users/other/keys/" + key, "", code},
			{"GET", "/v2/users/acme/apps", "", 11101},
		} {
			if got := f.do(otherPAT, tt.method, tt.path, tt.body).Status.Code; got != tt.code {
				t.Errorf("%s %.40s as a collaborator: got %d, want %d", tt.method, tt.path, got, tt.code)
			}
		}
		f.wantAs(key, 10000, "GET", "/v2/myscopes", "")
	}
	if err := newFixture(t).Update(func(s *clarifaisim.Settings) { s.CollaboratorCode = 10000 }); err == nil {
		t.Error("a collaborator_code that is none is taken")
	}
}
