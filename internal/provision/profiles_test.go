package provision_test

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// with makes a replica have these profiles.
func with(profiles ...tenant.Profile) func(*provision.Config) {
	return func(c *provision.Config) { c.Profiles = profiles }
}

func signUpTo(t *testing.T, r *provisiontest.Replica, id tenant.ID, profile string) tenant.Tenant {
	t.Helper()
	got, _, err := r.SignUp(t.Context(), id, tenant.SignUp{Profile: &profile}, long, caller)
	if err != nil || got.State != tenant.Active {
		t.Fatalf("sign up %s to %s: %v, %+v", id, profile, err, got)
	}
	return got
}

// What a profile says of an app is what is made, and its description shows of the
// tenant what the profile says.
func TestProfileShapesApps(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	plain := tenant.Profile{Name: tenant.DefaultProfile, BaseWorkflow: "Empty", KeyScopes: []string{"All"}}
	shows, hashes := plain, plain
	shows.Name, shows.BaseWorkflow, shows.Language, shows.AppDescription, shows.ShowTenant = "shows", "General", "de", "Acme's", tenant.ShowTenantID
	hashes.Name, hashes.ShowTenant = "hashes", tenant.ShowTenantHash
	r := w.Start(provisiontest.Options{Adjust: with(plain, shows, hashes)})
	type app struct {
		Description     string `json:"description"`
		DefaultLanguage string `json:"default_language"`
		DefaultWorkflow struct {
			ID string `json:"id"`
		} `json:"default_workflow"`
		Metadata struct {
			Tenantry tenant.Marker `json:"tenantry"`
		} `json:"metadata"`
	}
	of := func(id tenant.AppID) app {
		var answer struct{ App app }
		if err := json.Unmarshal(askClarifai(t, w, "GET", "/apps/"+string(id), nil), &answer); err != nil {
			t.Fatal(err)
		}
		return answer.App
	}
	check := func(got tenant.Tenant, description, language, workflow string, marks bool) {
		t.Helper()
		provisiontest.Eventually(t, "the app of "+string(got.ID)+" is described as "+description, func() bool {
			a := of(got.AppID)
			return a.Description == description && a.DefaultLanguage == language && a.DefaultWorkflow.ID == workflow &&
				(a.Metadata.Tenantry.Tenant != "") == marks
		})
	}
	hash := w.Keys.TenantHash("user_3")
	if len(hash) != 16 || strings.Contains(hash, "user") {
		t.Errorf("the hash of a tenant is %q", hash)
	}
	check(signUpTo(t, r, "user_1", "default"), "Managed by Tenantry", "", "Empty", true)
	check(signUpTo(t, r, "user_2", "shows"), "Acme's (tenant user_2)", "de", "General", true)
	check(signUpTo(t, r, "user_3", "hashes"), "Managed by Tenantry (tenant "+hash+")", "", "Empty", true)
	marked(t, w)
	r.Stop()

	r = w.Start(provisiontest.Options{Adjust: func(c *provision.Config) { with(plain, shows)(c); c.SkipMarks = true }})
	check(signUpTo(t, r, "user_4", "default"), "Managed by Tenantry", "", "Empty", false)
	check(signUpTo(t, r, "user_5", "shows"), "Acme's (tenant user_5)", "de", "General", false)
	if n := w.State().Calls["PatchApp"]; n != 4 {
		t.Errorf("%d apps were patched; want 4", n)
	}
}

// Tenants are counted by the revision that their app was made of; a profile that
// changes changes new tenants, and the same revision in another file is the same.
func TestProfileUses(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	old := tenant.Profile{Name: tenant.DefaultProfile, BaseWorkflow: "Empty", KeyScopes: []string{"All"}}
	pro := tenant.Profile{Name: "a-pro", BaseWorkflow: "Empty", KeyScopes: []string{"Predict"}}
	r := w.Start(provisiontest.Options{Adjust: with(old, pro)})
	type use struct {
		Name                   string
		Waiting, Current, Rest int
	}
	check := func(r *provisiontest.Replica, want ...use) []provision.ProfileUse {
		t.Helper()
		uses, at, err := r.ProfileUses(t.Context())
		if err != nil || at.IsZero() {
			t.Fatalf("ProfileUses: %v at %v", err, at)
		}
		var got []use
		for _, u := range uses {
			g := use{u.Name, u.Waiting, u.Current, 0}
			for _, o := range u.Older {
				g.Rest += o.Tenants
			}
			got = append(got, g)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("profiles (- want, + got):\n%s", diff)
		}
		return uses
	}
	signUp(t, r, "user_1")
	signUp(t, r, "user_2")
	r.Stop()
	if _, _, err := r.SignUp(t.Context(), "user_3", tenant.SignUp{}, 0, caller); err != nil {
		t.Fatal(err)
	}
	check(r, use{"a-pro", 0, 0, 0}, use{"default", 1, 2, 0})

	// The build of user_3 was begun of the old revision, and is made of the new one.
	changed := old
	changed.Language = "en"
	r = w.Start(provisiontest.Options{Adjust: with(changed, pro)})
	signUp(t, r, "user_3")
	signUp(t, r, "user_4")
	signUpTo(t, r, "user_5", "a-pro")
	uses := check(r, use{"a-pro", 0, 1, 0}, use{"default", 0, 2, 2})
	want := []tenant.RevisionCount{{Revision: old.Revision(), Tenants: 2}}
	if diff := cmp.Diff(want, uses[1].Older); diff != "" {
		t.Errorf("older revisions (- want, + got):\n%s", diff)
	}
	r.Stop()

	exec(t, w, `UPDATE apps SET profile_revision = 'other' WHERE tenant_id = 'user_1'`)
	r = w.Start(provisiontest.Options{Adjust: with(old)})
	uses = check(r, use{"default", 0, 1, 3})
	if o := uses[0].Older; len(o) != 2 || o[0].Tenants != 2 || o[1].Tenants != 1 {
		t.Errorf("older revisions are %v; want that of two tenants first", o)
	}
	if live, err := r.DB.LiveProfiles(t.Context()); err != nil || !cmp.Equal(live, []string{"a-pro", "default"}) {
		t.Errorf("live profiles are %v, %v", live, err)
	}
	if missing := provision.MissingProfiles([]string{"a-pro", "default"}, r.Profiles); !cmp.Equal(missing, []string{"a-pro"}) {
		t.Errorf("missing profiles are %v", missing)
	}
}

// A replica whose file lacks a profile leaves the work for its tenants to those that
// know it.
func TestProfileOfOtherReplicas(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	plain := tenant.Profile{Name: tenant.DefaultProfile, BaseWorkflow: "Empty", KeyScopes: []string{"All"}}
	pro := tenant.Profile{Name: "pro", BaseWorkflow: "Empty", KeyScopes: []string{"Predict"}, ShowTenant: tenant.ShowTenantID}
	knows := w.Start(provisiontest.Options{Idle: true, Adjust: with(plain, pro)})
	lacks := w.Start(provisiontest.Options{Idle: true, Adjust: with(plain)})
	name := "pro"
	if _, _, err := knows.SignUp(t.Context(), "user_1", tenant.SignUp{Profile: &name}, 0, caller); err != nil {
		t.Fatal(err)
	}
	var app tenant.AppID
	var state tenant.AppState
	var pending bool
	look := func() {
		t.Helper()
		if err := connOf(t, w).QueryRow(t.Context(), `SELECT id, state, pending FROM apps`).Scan(&app, &state, &pending); err != nil {
			t.Fatal(err)
		}
	}
	due := func() { exec(t, w, `UPDATE apps SET next_attempt_at = now()`) }
	look()
	lacks.WorkApp(t.Context(), app)
	if look(); state != tenant.AppBuilding || w.State().Apps != 0 {
		t.Fatalf("the app is %s; want it building still", state)
	}
	due()
	knows.WorkApp(t.Context(), app)
	if look(); state != tenant.AppHeld || !pending {
		t.Fatalf("the app is %s, pending %v; want it held", state, pending)
	}
	lacks.WorkApp(t.Context(), app)
	if look(); !pending || w.State().Calls["PatchApp"] != 0 {
		t.Errorf("who lacks the profile has marked the app")
	}
	due()
	knows.WorkApp(t.Context(), app)
	if look(); pending || w.State().Calls["PatchApp"] != 1 {
		t.Errorf("who knows the profile has not marked the app")
	}
}
