package provision_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

var noOverlap = new(time.Duration)

func startRotation(t *testing.T, r *provisiontest.Replica, f tenant.KeyFilter) tenant.Campaign {
	t.Helper()
	c, err := r.StartRotation(t.Context(), f, noOverlap, admin)
	if err != nil {
		t.Fatalf("start rotation of %+v: %v", f, err)
	}
	return c
}

// ended waits until nothing of a campaign is done any more.
func ended(t *testing.T, r *provisiontest.Replica, c tenant.Campaign) tenant.Campaign {
	t.Helper()
	return campaignWhen(t, r, c, "has ended", tenant.Campaign.Ended)
}

func campaignWhen(t *testing.T, r *provisiontest.Replica, c tenant.Campaign, what string, ok func(tenant.Campaign) bool) tenant.Campaign {
	t.Helper()
	provisiontest.Eventually(t, "the campaign "+what, func() bool {
		var err error
		if c, err = r.DB.Campaign(t.Context(), c.ID); err != nil {
			t.Fatal(err)
		}
		return ok(c)
	})
	return c
}

// counts are those of a campaign in the order total, done, skipped, failed, under way.
func counts(c tenant.Campaign) string {
	return fmt.Sprint(c.State, " ", []int{c.Total, c.Done, c.Skipped, c.Failed, c.UnderWay})
}

func wantCounts(t *testing.T, c tenant.Campaign, want string) {
	t.Helper()
	if got := counts(c); got != want {
		t.Errorf("the campaign is %s; want %s", got, want)
	}
}

// items are those of a campaign, as "tenant key state code".
func items(t *testing.T, r *provisiontest.Replica, c tenant.Campaign) []string {
	t.Helper()
	found, err := r.DB.CampaignItems(t.Context(), c.ID, 0, 1000)
	if err != nil {
		t.Fatal(err)
	}
	texts := []string{}
	for _, i := range found {
		text := fmt.Sprint(i.TenantID, " ", i.KeyName, " ", i.State)
		if i.Problem != nil {
			text += " " + i.Problem.Code
		}
		texts = append(texts, text)
	}
	return texts
}

// rotatedKeys lists the keys that the campaigns of rotations have made, as
// "tenant key", in order.
func rotatedKeys(t *testing.T, w *provisiontest.World) []string {
	t.Helper()
	return column(t, w, `SELECT a.tenant_id || ' ' || k.name FROM keys k JOIN apps a ON a.id = k.app_id
		WHERE k.rotation_id LIKE 'campaign-%' ORDER BY 1`)
}

func column(t *testing.T, w *provisiontest.World, sql string, args ...any) []string {
	t.Helper()
	texts := []string{}
	if err := connOf(t, w).QueryRow(t.Context(), `SELECT array(`+sql+`)`, args...).Scan(&texts); err != nil {
		t.Fatal(err)
	}
	return texts
}

// conns has one connection for each test and database. One for each poll would reach the limit of
// the server.
var conns sync.Map

func connOf(t testing.TB, w *provisiontest.World) *pgx.Conn {
	t.Helper()
	key := [2]string{t.Name(), w.URL.Reveal()}
	if c, ok := conns.Load(key); ok && !c.(*pgx.Conn).IsClosed() {
		return c.(*pgx.Conn)
	}
	c := pgtest.Conn(t, w.URL)
	conns.Store(key, c)
	t.Cleanup(func() { conns.Delete(key) })
	return c
}

// A campaign rotates what its filter selects and nothing else, once.
func TestRotateByFilter(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	narrow := "narrow"
	for id, up := range map[tenant.ID]tenant.SignUp{
		"ann":  {Labels: map[string]string{"plan": "pro", "region": "eu"}},
		"ben":  {Labels: map[string]string{"plan": "pro"}},
		"cleo": {Profile: &narrow},
	} {
		got, _, err := r.SignUp(t.Context(), id, up, long, caller)
		stateOf(t, got, err, tenant.Active)
	}
	if _, _, err := r.AddKey(t.Context(), "ann", tenant.KeySpec{Name: "reports"}, wait, caller); err != nil {
		t.Fatal(err)
	}
	exec(t, w, `UPDATE keys k SET activated_at = now() - interval '100 days' FROM apps a WHERE a.id = k.app_id AND a.tenant_id = 'ben'`)
	rest(t, w)
	for _, tt := range []struct {
		filter tenant.KeyFilter
		want   []string
	}{
		{tenant.KeyFilter{Profile: "narrow"}, []string{"cleo default"}},
		{tenant.KeyFilter{Labels: map[string]string{"plan": "pro"}, KeyName: "default"}, []string{"ann default", "ben default"}},
		{tenant.KeyFilter{Labels: map[string]string{"plan": "pro", "region": "eu"}}, []string{"ann default", "ann reports"}},
		{tenant.KeyFilter{Labels: map[string]string{"plan": "free"}}, []string{}},
		{tenant.KeyFilter{OlderThan: 90 * 24 * time.Hour}, []string{"ben default"}},
		{tenant.KeyFilter{KeyName: "reports"}, []string{"ann reports"}},
		{tenant.KeyFilter{All: true}, []string{"ann default", "ann reports", "ben default", "cleo default"}},
	} {
		old := column(t, w, `SELECT activated_at::text FROM keys WHERE state = 'active'`)
		n, err := r.CountRotation(t.Context(), tt.filter, nil)
		if err != nil || n != len(tt.want) {
			t.Errorf("a dry run of %+v counts %d, %v; want %d", tt.filter, n, err, len(tt.want))
		}
		if after := column(t, w, `SELECT activated_at::text FROM keys WHERE state = 'active'`); !cmp.Equal(old, after) {
			t.Errorf("a dry run of %+v has changed keys", tt.filter)
		}
		before := w.State().Calls["PostKeys"]
		c := ended(t, r, startRotation(t, r, tt.filter))
		wantCounts(t, c, fmt.Sprint("done ", []int{len(tt.want), len(tt.want), 0, 0, 0}))
		if got := rotatedKeys(t, w); !cmp.Equal(got, tt.want) {
			t.Errorf("%+v rotates %v; want %v", tt.filter, got, tt.want)
		}
		if made := w.State().Calls["PostKeys"] - before; made != len(tt.want) {
			t.Errorf("%+v makes %d keys; want %d", tt.filter, made, len(tt.want))
		}
		rest(t, w)
		// As the next case expects it, with the age that it had.
		exec(t, w, `UPDATE keys SET rotation_id = NULL WHERE rotation_id IS NOT NULL`)
		if tt.filter.KeyName == "default" {
			exec(t, w, `UPDATE keys k SET activated_at = now() - interval '100 days' FROM apps a WHERE a.id = k.app_id AND a.tenant_id = 'ben'`)
		}
	}
	if n := len(w.AppKeys()); n != 4 {
		t.Errorf("Clarifai has %d keys; want 4", n)
	}
	mendedWithout(t, r)
}

func TestRotationRefused(t *testing.T) {
	t.Parallel()
	r := provisiontest.New(t).Start(provisiontest.Options{Idle: true})
	for name, tt := range map[string]struct {
		filter  tenant.KeyFilter
		overlap time.Duration
		field   string
	}{
		"no filter":        {tenant.KeyFilter{}, 0, "all"},
		"all and more":     {tenant.KeyFilter{All: true, KeyName: "default"}, 0, "all"},
		"negative age":     {tenant.KeyFilter{OlderThan: -1}, 0, "older_than"},
		"name":             {tenant.KeyFilter{KeyName: "Not a name"}, 0, "key_name"},
		"profile":          {tenant.KeyFilter{Profile: "none"}, 0, "profile"},
		"long overlap":     {tenant.KeyFilter{All: true}, 31 * 24 * time.Hour, "overlap"},
		"negative overlap": {tenant.KeyFilter{All: true}, -1, "overlap"},
	} {
		_, err := r.StartRotation(t.Context(), tt.filter, &tt.overlap, admin)
		_, counted := r.CountRotation(t.Context(), tt.filter, &tt.overlap)
		for _, err := range []error{err, counted} {
			if e, ok := errors.AsType[*tenant.Error](err); !ok || e.Kind != tenant.Invalid || e.Field != tt.field {
				t.Errorf("%s: %v; want a fault of %s", name, err, tt.field)
			}
		}
	}
	if _, err := r.ApplyProfile(t.Context(), "none", admin); !errors.Is(err, tenant.NotFound) {
		t.Errorf("an unknown profile is applied: %v", err)
	}
	if _, err := r.ProfileChanges(t.Context(), "none", "", 10); !errors.Is(err, tenant.NotFound) {
		t.Errorf("changes of an unknown profile: %v", err)
	}
	c := startRotation(t, r, tenant.KeyFilter{Labels: map[string]string{"a": "1", "b": "2"}})
	_, err := r.StartRotation(t.Context(), tenant.KeyFilter{Labels: map[string]string{"b": "2", "a": "1"}}, nil, admin)
	if e, ok := errors.AsType[*tenant.Error](err); !ok || e.Kind != tenant.Conflict || !strings.Contains(e.Detail, c.ID.String()) {
		t.Errorf("a second campaign of the same filter: %v; want a conflict that names the first", err)
	}
	startRotation(t, r, tenant.KeyFilter{All: true})
	if _, err := r.ChangeCampaign(t.Context(), c.ID, tenant.StopCampaign, admin); err != nil {
		t.Fatal(err)
	}
	startRotation(t, r, tenant.KeyFilter{Labels: map[string]string{"a": "1", "b": "2"}})
}

// Keys that cannot be rotated are left as they are and named with the reason.
func TestRotationSkips(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	for _, id := range []tenant.ID{"busy", "fine", "gone", "resuming", "suspended"} {
		signUp(t, r, id)
	}
	hour := time.Hour
	if _, _, err := r.Rotate(t.Context(), "busy", tenant.NewRotation{ID: "r1", KeyName: "default", Overlap: &hour}, wait, caller); err != nil {
		t.Fatal(err)
	}
	is, err := r.Suspend(t.Context(), "suspended", wait, caller)
	stateOf(t, is, err, tenant.Suspended)
	if _, err := r.RevokeKey(t.Context(), "gone", "default", wait, caller); err != nil {
		t.Fatal(err)
	}
	r.Stop() // or its sweep would settle the tenant
	exec(t, w, `UPDATE tenants SET state = 'resuming' WHERE id = 'resuming'`)
	r = w.Start(provisiontest.Options{Idle: true})
	c := startRotation(t, r, tenant.KeyFilter{All: true})
	r.WorkCampaign(t.Context(), c.ID)
	if got, want := items(t, r, c), []string{"busy default skipped rotation_under_way", "fine default under_way", "resuming default skipped state_forbids"}; !cmp.Equal(sorted(got), want) {
		t.Errorf("items are %q; want %q", got, want)
	}
	c = campaignWhen(t, r, c, "has been worked on", func(c tenant.Campaign) bool { return c.UnderWay == 1 })
	wantCounts(t, c, "running [3 0 2 0 1]")

	// A rotation that is cancelled is skipped; one whose key has failed by itself again
	// and again is failed, and one that meets the account's problem waits.
	if _, err := r.DB.Suspend(t.Context(), "fine", admin); err != nil {
		t.Fatal(err)
	}
	timePasses(t, w)
	r.WorkCampaign(t.Context(), c.ID)
	c = ended(t, r, c)
	wantCounts(t, c, "done [3 0 3 0 0]")
	if got := items(t, r, c); !slices.Contains(got, "fine default skipped rotation_cancelled") {
		t.Errorf("items are %q", got)
	}
}

func sorted(texts []string) []string { return slices.Sorted(slices.Values(texts)) }

func TestRotationFails(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	signUp(t, r, "user_1")
	rest(t, w)
	w.Faults(map[string]any{"call": "PostKeys", "status": 11006}) // the account's limit
	c := startRotation(t, r, tenant.KeyFilter{All: true})
	c = campaignWhen(t, r, c, "shows the problem", func(c tenant.Campaign) bool { return c.Problem != nil })
	if c.Problem.Code != "upstream_quota" {
		t.Errorf("the problem is %+v", c.Problem)
	}
	provisiontest.Eventually(t, "the key was tried often", func() bool {
		return column(t, w, `SELECT attempts::text FROM keys WHERE state = 'creating' AND attempts > 4`) != nil &&
			len(column(t, w, `SELECT 'x' FROM keys WHERE state = 'creating' AND attempts > 4`)) == 1
	})
	c = campaignWhen(t, r, c, "waits", func(tenant.Campaign) bool { return true })
	wantCounts(t, c, "running [1 0 0 0 1]")
	w.Faults(map[string]any{"call": "PostKeys", "status": 11102}) // this request is refused
	c = ended(t, r, c)
	wantCounts(t, c, "done [1 0 0 1 0]")
	if got, want := items(t, r, c), []string{"user_1 default failed upstream_refused"}; !cmp.Equal(got, want) {
		t.Errorf("items are %q; want %q", got, want)
	}
}

// A campaign that is paused or stopped finishes what it has begun and begins nothing
// more; another replica goes on where it was.
func TestPauseResumeStop(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	few := provisiontest.Options{Adjust: func(c *provision.Config) { c.MaxRotations = 2 }}
	r := w.Start(few)
	const n = 6
	for i := range n {
		signUp(t, r, tenant.ID(fmt.Sprint("user_", i)))
	}
	rest(t, w)
	w.Faults(map[string]any{"call": "PostKeys", "status": 11006})
	c := startRotation(t, r, tenant.KeyFilter{All: true})
	campaignWhen(t, r, c, "has two under way", func(c tenant.Campaign) bool { return c.UnderWay == 2 })
	change := func(r *provisiontest.Replica, what tenant.CampaignChange, want tenant.CampaignState) {
		t.Helper()
		for range 2 { // the second changes nothing
			is, err := r.ChangeCampaign(t.Context(), c.ID, what, admin)
			if err != nil || is.State != want {
				t.Fatalf("%s: %s, %v", what, is.State, err)
			}
		}
	}
	change(r, tenant.PauseCampaign, tenant.CampaignPaused)
	w.Faults()
	c = campaignWhen(t, r, c, "has finished what it began", func(c tenant.Campaign) bool { return c.UnderWay == 0 })
	wantCounts(t, c, "paused [6 2 0 0 0]")
	r.Stop()
	r = w.Start(few)
	if got := rotatedKeys(t, w); len(got) != 2 {
		t.Errorf("while it was paused %v were rotated; want two", got)
	}
	w.Faults(map[string]any{"call": "PostKeys", "status": 11006})
	change(r, tenant.ResumeCampaign, tenant.CampaignRunning)
	campaignWhen(t, r, c, "has two under way", func(c tenant.Campaign) bool { return c.UnderWay == 2 })
	change(r, tenant.StopCampaign, tenant.CampaignStopped)
	if is := campaignWhen(t, r, c, "is stopped", func(tenant.Campaign) bool { return true }); is.Ended() {
		t.Error("a campaign with rotations under way has ended")
	}
	w.Faults()
	c = ended(t, r, c)
	wantCounts(t, c, "stopped [6 4 0 0 0]")
	for _, what := range []tenant.CampaignChange{tenant.PauseCampaign, tenant.ResumeCampaign} {
		if _, err := r.ChangeCampaign(t.Context(), c.ID, what, admin); !errors.Is(err, tenant.Conflict) {
			t.Errorf("%s of a stopped campaign: %v", what, err)
		}
	}
	change(r, tenant.StopCampaign, tenant.CampaignStopped)
	if got, want := column(t, w, `SELECT action || ' ' || actor FROM audit_events WHERE action LIKE 'campaign.%' ORDER BY id`),
		[]string{"campaign.started caller:admin", "campaign.paused caller:admin", "campaign.resumed caller:admin",
			"campaign.stopped caller:admin", "campaign.ended worker"}; !cmp.Equal(got, want) {
		t.Errorf("audited are %q; want %q", got, want)
	}

	// The rest, by another campaign and by another replica than the one that began it.
	next := startRotation(t, r, tenant.KeyFilter{All: true})
	r.Stop()
	timePasses(t, w)
	r = w.Start(few)
	wantCounts(t, ended(t, r, next), "done [6 6 0 0 0]")
	rest(t, w)
	if got := len(w.AppKeys()); got != n {
		t.Errorf("Clarifai has %d keys; want %d", got, n)
	}
	mendedWithout(t, r)
}

// Keys that are older than their profile allows are rotated by themselves, once, and
// those of tenants that cannot have new ones are left alone.
func TestMaxKeyAge(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	plain := tenant.Profile{Name: tenant.DefaultProfile, BaseWorkflow: "Empty", KeyScopes: []string{"All"}}
	strict := tenant.Profile{Name: "strict", BaseWorkflow: "Empty", KeyScopes: []string{"All"}, MaxKeyAge: 90 * 24 * time.Hour}
	adjust := func(c *provision.Config) { with(plain, strict)(c); c.AgeEvery = time.Millisecond }
	r := w.Start(provisiontest.Options{Adjust: adjust})
	signUp(t, r, "user_1")
	for _, id := range []tenant.ID{"new", "old", "suspended"} {
		signUpTo(t, r, id, "strict")
	}
	is, err := r.Suspend(t.Context(), "suspended", wait, caller)
	stateOf(t, is, err, tenant.Suspended)
	rest(t, w)
	if n := len(column(t, w, `SELECT id::text FROM campaigns`)); n != 0 {
		t.Fatalf("there are %d campaigns while no key is old", n)
	}
	exec(t, w, `UPDATE keys k SET activated_at = now() - interval '91 days' FROM apps a WHERE a.id = k.app_id AND a.tenant_id <> 'new'`)
	provisiontest.Eventually(t, "the old key is rotated", func() bool { return len(rotatedKeys(t, w)) > 0 })
	rest(t, w)
	// The old secret works on for a day: that is no reason to begin again.
	c, err := r.DB.Campaigns(t.Context(), [16]byte{}, 10)
	if err != nil || len(c) != 1 || c[0].CreatedBy != "worker" || c[0].Filter.Profile != "strict" || c[0].Overlap != tenant.DefaultOverlap {
		t.Fatalf("campaigns are %+v, %v", c, err)
	}
	wantCounts(t, c[0], "done [1 1 0 0 0]")
	if got, want := rotatedKeys(t, w), []string{"old default"}; !cmp.Equal(got, want) {
		t.Errorf("%v were rotated; want %v", got, want)
	}

	// Once the new key is old too, while the old one works on, it waits for that to end.
	exec(t, w, `UPDATE keys k SET activated_at = now() - interval '91 days' FROM apps a WHERE a.id = k.app_id AND a.tenant_id = 'old'`)
	if err := r.RotateAged(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := len(column(t, w, `SELECT id::text FROM campaigns`)); n != 1 {
		t.Errorf("there are %d campaigns; want one", n)
	}
	exec(t, w, `UPDATE keys SET retires_at = now() WHERE state = 'retiring'`)
	provisiontest.Eventually(t, "the key is rotated again", func() bool { return len(rotatedKeys(t, w)) == 2 })
	rest(t, w)
	r.Stop()

	// Nor is that of a tenant that changes a reason.
	exec(t, w, `UPDATE tenants SET state = 'resuming' WHERE id = 'new'`)
	exec(t, w, `UPDATE keys k SET activated_at = now() - interval '91 days' FROM apps a WHERE a.id = k.app_id AND a.tenant_id = 'new'`)
	r = w.Start(provisiontest.Options{Idle: true, Adjust: adjust})
	if err := r.RotateAged(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := len(column(t, w, `SELECT id::text FROM campaigns`)); n != 2 {
		t.Errorf("there are %d campaigns; want two", n)
	}
}

func TestApplyProfile(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	was := tenant.Profile{Name: tenant.DefaultProfile, BaseWorkflow: "Empty", KeyScopes: []string{"All"}, AllowedScopes: []string{"All"},
		ExtraKeys: []tenant.KeyTemplate{{Name: "gone", Scopes: []string{"All"}}, {Name: "search", Scopes: []string{"Search"}}}}
	other := tenant.Profile{Name: "other", BaseWorkflow: "Empty", KeyScopes: []string{"All"}}
	r := w.Start(provisiontest.Options{Adjust: with(was, other)})
	one := signUp(t, r, "user_1")
	signUp(t, r, "user_2")
	signUpTo(t, r, "user_3", "other")
	signUp(t, r, "user_4")
	marked(t, w)
	rest(t, w)
	if _, _, err := r.AddKey(t.Context(), "user_1", tenant.KeySpec{Name: "own", Scopes: []string{"Predict"}}, wait, caller); err != nil {
		t.Fatal(err)
	}
	hour := time.Hour
	if _, _, err := r.Rotate(t.Context(), "user_1", tenant.NewRotation{ID: "r1", KeyName: "default", Overlap: &hour}, wait, caller); err != nil {
		t.Fatal(err)
	}
	if _, err := r.RevokeKey(t.Context(), "user_2", "gone", wait, caller); err != nil {
		t.Fatal(err)
	}
	is, err := r.Suspend(t.Context(), "user_4", wait, caller)
	stateOf(t, is, err, tenant.Suspended)
	r.Stop()

	next := was
	next.BaseWorkflow, next.Language, next.ShowTenant, next.KeyScopes = "General", "en", tenant.ShowTenantID, []string{"Predict", "Apps_Get"}
	next.ExtraKeys = []tenant.KeyTemplate{{Name: "gone", Scopes: []string{"All"}}, {Name: "search", Scopes: []string{"Search"}}, {Name: "train", Scopes: []string{"All"}}}
	r = w.Start(provisiontest.Options{Adjust: with(next, other)})
	listed, err := r.ProfileChanges(t.Context(), "default", "", 10)
	if err != nil {
		t.Fatal(err)
	}
	shape := []tenant.ShapeChange{{What: "base_workflow", From: "Empty", To: "General"}, {What: "language", To: "en"},
		{What: "app_description", From: "Managed by Tenantry", To: "Managed by Tenantry (tenant by id)"},
		{What: "key_scopes", KeyName: "default", From: "All", To: "Predict, Apps_Get"}, {What: "key_added", KeyName: "train", To: "All"}}
	if len(listed) != 3 || listed[0].TenantID != "user_1" || listed[0].Blocked != nil || listed[2].TenantID != "user_4" || listed[2].Blocked == nil {
		t.Fatalf("a dry run lists %+v", listed)
	}
	for _, l := range listed[:2] {
		if diff := cmp.Diff(shape, l.Changes); diff != "" {
			t.Errorf("changes of %s (- want, + got):\n%s", l.TenantID, diff)
		}
	}
	if page, err := r.ProfileChanges(t.Context(), "default", listed[0].AppID, 1); err != nil || len(page) != 1 || page[0].TenantID != "user_2" {
		t.Errorf("the second page is %+v, %v", page, err)
	}

	c, err := r.ApplyProfile(t.Context(), "default", admin)
	if err != nil {
		t.Fatal(err)
	}
	c = ended(t, r, c)
	wantCounts(t, c, "done [3 2 1 0 0]")
	if got, want := items(t, r, c), []string{"user_4  skipped state_forbids"}; !cmp.Equal(got, want) {
		t.Errorf("items are %q; want %q", got, want)
	}
	rest(t, w)
	var app struct {
		App struct {
			Description     string
			DefaultLanguage string                     `json:"default_language"`
			DefaultWorkflow struct{ ID string }        `json:"default_workflow"`
			Metadata        map[string]json.RawMessage `json:"metadata"`
		}
	}
	if err := json.Unmarshal(askClarifai(t, w, "GET", "/apps/"+string(one.AppID), nil), &app); err != nil {
		t.Fatal(err)
	}
	if a := app.App; a.Description != "Managed by Tenantry (tenant user_1)" || a.DefaultLanguage != "en" || a.DefaultWorkflow.ID != "General" || a.Metadata["tenantry"] == nil {
		t.Errorf("the app is %+v", a)
	}
	keys := column(t, w, `SELECT a.tenant_id || ' ' || k.name || ' ' || k.state || ' ' || k.scopes::text FROM keys k JOIN apps a ON a.id = k.app_id
		WHERE a.tenant_id IN ('user_1', 'user_2') AND k.state IN ('active', 'retiring') ORDER BY 1`)
	if diff := cmp.Diff([]string{
		"user_1 default active {Predict,Apps_Get}", "user_1 default retiring {Predict,Apps_Get}", "user_1 gone active {All}",
		"user_1 own active {Predict}", "user_1 search active {Search}", "user_1 train active {All}",
		"user_2 default active {Predict,Apps_Get}", "user_2 search active {Search}", "user_2 train active {All}"}, keys); diff != "" {
		t.Errorf("keys (- want, + got):\n%s", diff)
	}
	if got := column(t, w, `SELECT tenant_id || ' ' || (detail->>'from') || ' ' || (detail->>'to') FROM audit_events WHERE action = 'key.rescoped' ORDER BY id`); len(got) != 3 ||
		got[0] != `user_1 ["All"] ["Predict", "Apps_Get"]` {
		t.Errorf("audited rescopings are %q", got)
	}
	if got := column(t, w, `SELECT tenant_id || ' ' || (detail->>'to') FROM audit_events WHERE action = 'app.conformed' ORDER BY id`); !cmp.Equal(got,
		[]string{"user_1 " + next.Revision(), "user_2 " + next.Revision()}) {
		t.Errorf("audited apps are %q", got)
	}
	mendedWithout(t, r)

	// Who has resumed since is taken by the next, and nothing else is called.
	is, err = r.Resume(t.Context(), "user_4", wait, caller)
	stateOf(t, is, err, tenant.Active)
	rest(t, w)
	before := w.State().Calls
	if c, err = r.ApplyProfile(t.Context(), "default", admin); err != nil {
		t.Fatal(err)
	}
	wantCounts(t, ended(t, r, c), "done [1 1 0 0 0]")
	after := w.State().Calls
	if n, m := after["PatchKeys"]-before["PatchKeys"], after["PatchApp"]-before["PatchApp"]; n != 1 || m != 1 {
		t.Errorf("the second campaign made %d PatchKeys and %d PatchApp; want one each", n, m)
	}
	if listed, err := r.ProfileChanges(t.Context(), "default", "", 10); err != nil || len(listed) != 0 {
		t.Errorf("a dry run after it lists %+v, %v", listed, err)
	}
}

// What Clarifai refuses of one tenant is written down, and does not hold up the
// others; what is wrong with the account holds up all.
func TestApplyProfileFails(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	was := tenant.Profile{Name: tenant.DefaultProfile, BaseWorkflow: "Empty", KeyScopes: []string{"All"}}
	r := w.Start(provisiontest.Options{Adjust: with(was)})
	for i := range 3 {
		signUp(t, r, tenant.ID(fmt.Sprint("user_", i)))
	}
	marked(t, w)
	rest(t, w)
	r.Stop()
	next := was
	next.KeyScopes = []string{"Predict"}
	r = w.Start(provisiontest.Options{Adjust: with(next)})
	w.Faults(map[string]any{"call": "PatchKeys", "count": 1, "status": 11102}, map[string]any{"call": "PatchKeys", "count": 2, "status": 11006})
	c, err := r.ApplyProfile(t.Context(), "default", admin)
	if err != nil {
		t.Fatal(err)
	}
	c = ended(t, r, c)
	wantCounts(t, c, "done [3 2 0 1 0]")
	if got, want := items(t, r, c), []string{"user_0  failed upstream_refused"}; !cmp.Equal(got, want) {
		t.Errorf("items are %q; want %q", got, want)
	}
	if c, err = r.ApplyProfile(t.Context(), "default", admin); err != nil {
		t.Fatal(err)
	}
	wantCounts(t, ended(t, r, c), "done [1 1 0 0 0]")
	mendedWithout(t, r)
}

// meddlingStore does something before an app is said to be of a revision.
type meddlingStore struct {
	provision.Store
	meddle func()
}

func (s meddlingStore) Conformed(ctx context.Context, c tenant.Campaign, m tenant.Misfit, ids []uuid.UUID, actor tenant.Actor) (bool, error) {
	s.meddle()
	return s.Store.Conformed(ctx, c, m, ids, actor)
}

// A tenant whose keys change while the profile is applied to it is looked at anew, and
// left alone if that does not end.
func TestApplyProfileWhileKeysChange(t *testing.T) {
	t.Parallel()
	for times, want := range map[int32]string{1: "done [1 1 0 0 0]", 100: "done [1 0 1 0 0]"} {
		t.Run(fmt.Sprint(times), func(t *testing.T) {
			t.Parallel()
			w := provisiontest.New(t)
			r := w.Start(provisiontest.Options{})
			signUp(t, r, "user_1")
			marked(t, w)
			rest(t, w)
			r.Stop()
			var left atomic.Int32
			left.Store(times)
			r = w.Start(provisiontest.Options{
				Adjust: with(tenant.Profile{Name: tenant.DefaultProfile, BaseWorkflow: "Empty", KeyScopes: []string{"Predict"}}),
				Store: func(s provision.Store) provision.Store {
					return meddlingStore{s, func() {
						if left.Add(-1) >= 0 {
							exec(t, w, `UPDATE keys SET scopes = '{All}'`)
						}
					}}
				},
			})
			c, err := r.ApplyProfile(t.Context(), tenant.DefaultProfile, admin)
			if err != nil {
				t.Fatal(err)
			}
			wantCounts(t, ended(t, r, c), want)
			current := column(t, w, `SELECT k.scopes::text FROM keys k JOIN apps a ON a.id = k.app_id WHERE a.profile_revision = $1`, c.Revision)
			if done := times == 1; done != (len(current) == 1) || done && current[0] != "{Predict}" {
				t.Errorf("of the new revision are keys of %q", current)
			}
		})
	}
}

// Apps that are shared with the operator are left to their owners.
func TestCampaignsLeaveSharedApps(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	aged := tenant.Profile{Name: tenant.DefaultProfile, BaseWorkflow: "Empty", KeyScopes: []string{"All"}, MaxKeyAge: time.Hour}
	r := w.Start(provisiontest.Options{Adjust: func(c *provision.Config) { with(aged)(c); c.AgeEvery = time.Hour }})
	mustAdopt(t, r, "user_1", tenant.AdoptRequest{AppID: "theirs", UserID: "bob", Key: w.Shared("theirs")})
	exec(t, w, `UPDATE keys SET activated_at = now() - interval '2 hours'`)
	if err := r.RotateAged(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := len(column(t, w, `SELECT id::text FROM campaigns`)); n != 0 {
		t.Errorf("%d campaigns began for the age of a key that is somebody else's to replace", n)
	}
	c := ended(t, r, startRotation(t, r, tenant.KeyFilter{All: true}))
	wantCounts(t, c, "done [1 0 1 0 0]")
	if got, want := items(t, r, c), []string{"user_1 default skipped key_not_ours"}; !cmp.Equal(got, want) {
		t.Errorf("items are %v; want %v", got, want)
	}
	if listed, err := r.ProfileChanges(t.Context(), "default", "", 10); err != nil || len(listed) != 0 {
		t.Errorf("a dry run lists %+v, %v", listed, err)
	}
}
