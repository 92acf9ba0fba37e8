package clarifai_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/tenantry/tenantry/internal/clarifai"
	"github.com/tenantry/tenantry/internal/clarifaisim"
	"github.com/tenantry/tenantry/internal/tenant"
)

// A simulated is a simulated Clarifai, served over HTTP, without a throttle.
type simulated struct {
	*clarifaisim.Sim
	url string
}

func simulate(t *testing.T) simulated {
	t.Helper()
	sim, err := clarifaisim.New(clarifaisim.Config{PATs: []clarifaisim.PAT{{Token: patText, UserID: string(operator)}}})
	if err != nil {
		t.Fatal(err)
	}
	s := simulated{sim, ""}
	s.set(t, func(s *clarifaisim.Settings) { s.RateLimit = 0 })
	server := httptest.NewServer(sim)
	t.Cleanup(server.Close)
	t.Cleanup(func() { _ = sim.Close() }) // first: it lets go of what hangs
	s.url = server.URL
	return s
}

func (s simulated) set(t *testing.T, edit func(*clarifaisim.Settings)) {
	t.Helper()
	if err := s.Update(edit); err != nil {
		t.Fatal(err)
	}
}

// fault replaces the fault rules, as scripts do.
func (s simulated) fault(t *testing.T, rules ...map[string]any) {
	t.Helper()
	if rules == nil {
		rules = []map[string]any{}
	}
	text, err := json.Marshal(rules)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.Post(s.url+"/_sim/faults", "application/json", strings.NewReader(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	http.DefaultClient.CloseIdleConnections()
	if resp.StatusCode >= 300 {
		t.Fatalf("the simulator refuses the faults %s: %s", text, resp.Status)
	}
}

func (s simulated) client(t *testing.T) *clarifai.Client {
	t.Helper()
	return newClient(t, clarifai.Config{BaseURL: s.url})
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantClass(t *testing.T, call string, err error, want tenant.UpstreamClass, unclear bool) {
	t.Helper()
	if up := asUpstream(t, callNamed(t, call), err); up.Class != want || up.Unclear != unclear {
		t.Errorf("%s gave %#v, want %s, unclear %t", call, up, want, unclear)
	}
}

var newApp = tenant.NewApp{ID: appID, BaseWorkflow: "Empty", Marker: appMarker}

func newKey(id uuid.UUID) tenant.NewKey {
	return tenant.NewKey{AppID: appID, Scopes: []string{"All"}, Marker: tenant.KeyMarker{Deployment: appMarker.Deployment, KeyID: id}}
}

// findKey returns the key with the marker of id, as a caller looks for it.
func findKey(t *testing.T, c *clarifai.Client, id uuid.UUID) (tenant.UpstreamKey, bool) {
	t.Helper()
	keys, err := c.AppKeys(t.Context(), appID, 1)
	must(t, err)
	for _, k := range keys {
		if m, ok := tenant.ParseKeyMarker(k.Description); ok && m == newKey(id).Marker {
			return k, true
		}
	}
	return tenant.UpstreamKey{}, false
}

func TestLifeOfAnApp(t *testing.T) {
	t.Parallel()
	ctx, sim := t.Context(), simulate(t)
	c := sim.client(t)
	who, err := c.Whoami(ctx, tenant.Secret{})
	must(t, err)
	if who != operator {
		t.Errorf("Whoami is %q, want %q", who, operator)
	}
	_, err = c.App(ctx, appID)
	wantClass(t, "GetApp", err, tenant.UpstreamNotFound, false)
	_, err = c.CreateKey(ctx, newKey(keyID))
	if up := asUpstream(t, callNamed(t, "PostKeys"), err); up.Unclear {
		t.Errorf("a key for no app: %#v", up)
	}

	must(t, c.CreateApp(ctx, newApp))
	app, err := c.App(ctx, appID)
	must(t, err)
	if app.ID != appID || app.UserID != operator || app.Marker == nil || *app.Marker != appMarker {
		t.Errorf("App is %+v", app)
	}
	secret, err := c.CreateKey(ctx, newKey(keyID))
	must(t, err)
	if keys := sim.Keys(); len(keys) != 1 || keys[0].ID != secret.Reveal() || keys[0].AppID != string(appID) ||
		keys[0].Description != newKey(keyID).Marker.String() || strings.Join(keys[0].Scopes, ",") != "All" {
		t.Errorf("the key upstream is %v", keys)
	}
	if k, found := findKey(t, c, keyID); !found || k.Secret.Reveal() != secret.Reveal() {
		t.Errorf("the listing shows the key: %t", found)
	}
	if keys, err := c.AppKeys(ctx, appID, 2); err != nil || len(keys) != 0 {
		t.Errorf("the second page is %v, %v", keys, err)
	}

	must(t, c.DeleteKey(ctx, secret))
	wantClass(t, "DeleteKey", c.DeleteKey(ctx, secret), tenant.UpstreamNotFound, false)
	must(t, c.DeleteApp(ctx, appID))
	wantClass(t, "DeleteApp", c.DeleteApp(ctx, appID), tenant.UpstreamNotFound, false)
	_, err = c.AppKeys(ctx, appID, 1)
	wantClass(t, "ListAppKeys", err, tenant.UpstreamNotFound, false)
	if state := sim.State(); state.Apps != 0 || state.Keys != 0 {
		t.Errorf("left upstream: %+v", state)
	}
}

// Each fault on each call: how it is understood, and that the simulator saw one
// request of it.
func TestSimulatedFaults(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name    string
		rule    map[string]any
		class   tenant.UpstreamClass
		unclear bool
	}{
		{"throttled", map[string]any{"status": 11005}, tenant.UpstreamThrottled, false},
		{"quota", map[string]any{"status": 11006}, tenant.UpstreamQuota, false},
		{"PAT refused", map[string]any{"status": 11008}, tenant.UpstreamPAT, false},
		{"their fault", map[string]any{"status": 98004}, tenant.UpstreamDown, true},
		{"maintenance", map[string]any{"status": 39997}, tenant.UpstreamDown, false},
		{"HTML", map[string]any{"http": 502}, tenant.UpstreamDown, true},
		{"hanging", map[string]any{"hang": true}, tenant.UpstreamDown, true},
		{"cut before", map[string]any{"drop_before": true}, tenant.UpstreamDown, true},
		{"answer lost", map[string]any{"drop_after": true}, tenant.UpstreamDown, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			sim := simulate(t)
			c := sim.client(t)
			for _, call := range calls {
				before := sim.State().Calls
				test.rule["call"], test.rule["count"] = call.name, 1
				sim.fault(t, test.rule)
				ctx, cancel := context.WithCancel(t.Context())
				if test.name == "hanging" {
					go func() { // gives up once the simulator has the call
						for sim.State().Calls[call.name] == before[call.name] && ctx.Err() == nil {
							time.Sleep(time.Millisecond)
						}
						cancel()
					}()
				}
				_, err := call.run(ctx, c)
				cancel()
				wantClass(t, call.name, err, test.class, test.unclear && call.changes)
				after := sim.State().Calls
				for name, n := range after {
					want := before[name]
					if name == call.name {
						want++
					}
					if n != want {
						t.Errorf("%s: the simulator saw %d of %s, want %d", call.name, n, name, want)
					}
				}
				if after[call.name] == before[call.name] {
					t.Errorf("%s did not arrive", call.name)
				}
			}
		})
	}
}

// What was made and whose answer was lost is found by its marker.
func TestLookAfterLostAnswer(t *testing.T) {
	t.Parallel()
	for _, duplicate := range []int{40010, 11102} {
		for _, masked := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d/masked=%t", duplicate, masked), func(t *testing.T) {
				t.Parallel()
				ctx, sim := t.Context(), simulate(t)
				sim.set(t, func(s *clarifaisim.Settings) { s.DuplicateCode, s.MaskedKeys, s.FirstKey = duplicate, masked, true })
				c := sim.client(t)
				sim.fault(t, map[string]any{"call": "PostApps", "count": 1, "drop_after": true},
					map[string]any{"call": "PostKeys", "count": 1, "drop_after": true})
				wantClass(t, "PostApps", c.CreateApp(ctx, newApp), tenant.UpstreamDown, true)
				wantClass(t, "PostApps", c.CreateApp(ctx, newApp), tenant.UpstreamDuplicate, false)
				app, err := c.App(ctx, appID)
				must(t, err)
				if app.Marker == nil || *app.Marker != appMarker {
					t.Errorf("App is %+v", app)
				}
				if _, found := findKey(t, c, keyID); found {
					t.Error("the key that comes with an app was taken for ours")
				}
				_, err = c.CreateKey(ctx, newKey(keyID))
				wantClass(t, "PostKeys", err, tenant.UpstreamDown, true)
				k, found := findKey(t, c, keyID)
				if !found || k.Secret.IsSet() == masked {
					t.Fatalf("found %t, readable %t", found, k.Secret.IsSet())
				}
				if !masked {
					must(t, c.DeleteKey(ctx, k.Secret))
					if _, found := findKey(t, c, keyID); found {
						t.Error("the key is still there")
					}
				}
			})
		}
	}
}

// Of a call for several only what is certain counts: that all were made, or none.
func TestSeveralItems(t *testing.T) {
	t.Parallel()
	ctx, sim := t.Context(), simulate(t)
	c := sim.client(t)
	made := 0
	call := func() (appsErr, keysErr error) {
		t.Helper()
		var apps []tenant.NewApp
		var keys []tenant.NewKey
		for range 3 {
			made++
			id := tenant.AppID(fmt.Sprint("several-", made))
			must(t, c.CreateApp(ctx, tenant.NewApp{ID: id, BaseWorkflow: "Empty"}))
			apps = append(apps, tenant.NewApp{ID: id + "-b", BaseWorkflow: "Empty", Marker: tenant.Marker{Deployment: "d", App: id + "-b"}})
			keys = append(keys, tenant.NewKey{AppID: id, Scopes: []string{"Apps_Get"}, Marker: tenant.KeyMarker{Deployment: "d", KeyID: uuid.New()}})
		}
		secrets, keysErr := c.CreateKeys(ctx, keys)
		if keysErr != nil && secrets != nil {
			t.Error("secrets came with an error")
		}
		for i, secret := range secrets {
			opened, err := c.Opens(ctx, secret)
			if must(t, err); opened.AppID != keys[i].AppID {
				t.Errorf("key %d opens %s; want %s", i, opened.AppID, keys[i].AppID)
			}
		}
		return c.CreateApps(ctx, apps), keysErr
	}
	appsErr, keysErr := call()
	must(t, appsErr)
	must(t, keysErr)
	for mode, want := range map[string]tenant.UpstreamClass{"all": tenant.UpstreamDown, "first": tenant.UpstreamDown, "partial": tenant.UpstreamDown, "refused": tenant.UpstreamRefused} {
		sim.set(t, func(s *clarifaisim.Settings) { s.SeveralItems, s.FailingItem = mode, 2 })
		appsErr, keysErr := call()
		wantClass(t, "PostApps", appsErr, want, true)
		wantClass(t, "PostKeys", keysErr, want, true)
	}
	sim.fault(t, map[string]any{"call": "PostKeys", "count": 1, "status": 11005})
	_, keysErr = call()
	wantClass(t, "PostKeys", keysErr, tenant.UpstreamThrottled, false)
	sim.fault(t, map[string]any{"call": "PostKeys", "count": 1, "status": 11008})
	_, keysErr = call()
	wantClass(t, "PostKeys", keysErr, tenant.UpstreamPAT, true)
	sim.fault(t, map[string]any{"call": "PostKeys", "count": 1, "drop_before": true})
	_, keysErr = call()
	wantClass(t, "PostKeys", keysErr, tenant.UpstreamDown, true)
}

// Keys of one call are told by their markers and apps, in whatever order they come; an
// answer that leaves a doubt of one is believed of none.
func TestKeysOfOneCall(t *testing.T) {
	t.Parallel()
	keys := []tenant.NewKey{{AppID: "app-a", Marker: tenant.KeyMarker{Deployment: "d", KeyID: uuid.New()}},
		{AppID: "app-b", Marker: tenant.KeyMarker{Deployment: "d", KeyID: uuid.New()}}}
	key := func(id string, of int, app string) string {
		return `{"id":"` + id + `","description":"` + keys[of].Marker.String() + `","apps":[` + app + `]}`
	}
	const a, b = `{"id":"app-a"}`, `{"id":"app-b"}`
	for name, answer := range map[string]string{
		"good":          key("secret-of-b", 1, b) + "," + key("secret-of-a", 0, a),
		"one is absent": key("secret-of-a", 0, a),
		"one twice":     key("secret-of-a", 0, a) + "," + key("secret-of-a", 0, a),
		"one too many":  key("secret-of-a", 0, a) + "," + key("secret-of-b", 1, b) + "," + key("secret-of-c", 1, b),
		"apps swapped":  key("secret-of-a", 0, b) + "," + key("secret-of-b", 1, a),
		"no app":        key("secret-of-a", 0, "") + "," + key("secret-of-b", 1, b),
		"no marker":     `{"id":"secret-of-a","apps":[` + a + `]},` + key("secret-of-b", 1, b),
		"masked":        key("*****************ofa", 0, a) + "," + key("secret-of-b", 1, b),
	} {
		up := serve(t, page(200, "application/json", `{`+okStatus+`,"keys":[`+answer+`]}`))
		secrets, err := newClient(t, clarifai.Config{BaseURL: up.URL}).CreateKeys(t.Context(), keys)
		if name != "good" {
			wantClass(t, "PostKeys", err, tenant.UpstreamDown, true)
			continue
		}
		if err != nil || secrets[0].Reveal() != "secret-of-a" || secrets[1].Reveal() != "secret-of-b" {
			t.Errorf("CreateKeys = %v, %v; want both, in the order that was asked for", secrets, err)
		}
	}
}

// An app that somebody renamed is not gone: to forget it would forget its keys.
func TestRenamedApp(t *testing.T) {
	t.Parallel()
	ctx, sim := t.Context(), simulate(t)
	c := sim.client(t)
	must(t, c.CreateApp(ctx, newApp))
	sim.fault(t, map[string]any{"call": "*", "status": 10050, "moved_to": "renamed"})
	_, err := c.App(ctx, appID)
	wantClass(t, "GetApp", err, tenant.UpstreamRefused, false)
	_, err = c.AppKeys(ctx, appID, 1)
	wantClass(t, "ListAppKeys", err, tenant.UpstreamRefused, false)
	wantClass(t, "DeleteApp", c.DeleteApp(ctx, appID), tenant.UpstreamRefused, false)
}

func TestSimulatedLimits(t *testing.T) {
	t.Parallel()
	ctx, sim := t.Context(), simulate(t)
	c := sim.client(t)

	sim.set(t, func(s *clarifaisim.Settings) { s.RateLimit = 1 })
	var err error
	for range 2 {
		if err == nil {
			_, err = c.Whoami(ctx, tenant.Secret{})
		}
	}
	wantClass(t, "GetUser", err, tenant.UpstreamThrottled, false)
	sim.set(t, func(s *clarifaisim.Settings) { s.RateLimit, s.AppQuota, s.KeyQuota = 0, 1, 1 })

	must(t, c.CreateApp(ctx, newApp))
	other := newApp
	other.ID += "2"
	wantClass(t, "PostApps", c.CreateApp(ctx, other), tenant.UpstreamQuota, false)
	_, err = c.CreateKey(ctx, newKey(keyID))
	must(t, err)
	_, err = c.CreateKey(ctx, newKey(uuid.New()))
	wantClass(t, "PostKeys", err, tenant.UpstreamQuota, false)
	sim.set(t, func(s *clarifaisim.Settings) { s.AppQuota = 2 })
	must(t, c.CreateApp(ctx, other))

	sim.set(t, func(s *clarifaisim.Settings) { s.AsyncDeleteMS = 60_000 })
	must(t, c.DeleteApp(ctx, appID))
	if _, err := c.App(ctx, appID); err != nil {
		t.Errorf("an app whose removal was only accepted: %v", err)
	}
}

// A PAT that is refused, in each form Clarifai has for it. One of them repeats the
// PAT.
func TestSimulatedPATs(t *testing.T) {
	t.Parallel()
	ctx, sim := t.Context(), simulate(t)
	pat := tenant.NewSecret(patText)
	c := newClient(t, clarifai.Config{BaseURL: sim.url, PAT: func() tenant.Secret { return pat }})
	must(t, c.CreateApp(ctx, newApp))
	key, err := c.CreateKey(ctx, newKey(keyID))
	must(t, err)

	const unknown = "MARKEDunknown0123456789abcdef0123"
	for _, code := range []int{11008, 11009} {
		sim.set(t, func(s *clarifaisim.Settings) { s.UnknownKeyCode = code })
		pat = tenant.NewSecret(unknown)
		for _, call := range calls {
			_, err := call.run(ctx, c)
			wantClass(t, call.name, err, tenant.UpstreamPAT, false)
		}
	}
	pat = key // an app's key in place of the PAT
	_, err = c.Whoami(ctx, tenant.Secret{})
	wantClass(t, "GetUser", err, tenant.UpstreamPAT, false)

	must(t, sim.AddPAT(clarifaisim.PAT{Token: unknown, UserID: string(operator), Scopes: []string{"Apps_Get"}}))
	pat = tenant.NewSecret(unknown)
	wantClass(t, "PostApps", c.CreateApp(ctx, newApp), tenant.UpstreamForbidden, false)
}

func TestManyAtOnce(t *testing.T) {
	t.Parallel()
	sim := simulate(t)
	c := sim.client(t)
	must(t, c.CreateApp(t.Context(), newApp))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	const many = 60
	var mu sync.Mutex
	seen := map[string]bool{}
	var wg sync.WaitGroup
	for range many {
		wg.Go(func() {
			secret, err := c.CreateKey(ctx, newKey(uuid.New()))
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			seen[secret.Reveal()] = true
		})
	}
	wg.Wait()
	if n := sim.State().Calls["PostKeys"]; n != many || len(seen) != many || len(sim.Keys()) != many {
		t.Errorf("%d requests, %d keys learnt, %d upstream; want %d", n, len(seen), len(sim.Keys()), many)
	}
}

// A key says which app it opens. That it is dead is never taken for a fault of the PAT.
func TestOpens(t *testing.T) {
	t.Parallel()
	ctx, sim := t.Context(), simulate(t)
	c := sim.client(t)
	must(t, c.CreateApp(ctx, newApp))
	secret, err := c.CreateKey(ctx, newKey(keyID))
	must(t, err)
	opened, err := c.Opens(ctx, secret)
	must(t, err)
	if opened.AppID != appID || opened.UserID != operator || strings.Join(opened.Scopes, ",") != "All" {
		t.Errorf("the key opens %+v", opened)
	}
	class := func(key tenant.Secret, want tenant.UpstreamClass) {
		t.Helper()
		_, err := c.Opens(ctx, key)
		up := asUpstream(t, testCall{name: "MyScopes"}, err)
		if up.Class != want || key.IsSet() && strings.Contains(up.Error(), key.Reveal()) {
			t.Errorf("Opens gave %#v, want %s and not the key", up, want)
		}
	}
	for _, unknown := range []int{11008, 11009} { // the second repeats the key
		sim.set(t, func(s *clarifaisim.Settings) { s.UnknownKeyCode = unknown })
		class(tenant.NewSecret(strings.Repeat("d", 32)), tenant.UpstreamNotFound)
		class(tenant.NewSecret("of another form"+strings.Repeat("d", 32)), tenant.UpstreamForbidden)
	}
	class(tenant.NewSecret(patText), tenant.UpstreamNotFound)
	class(tenant.Secret{}, tenant.UpstreamRefused)
	for code, want := range map[int]tenant.UpstreamClass{11200: tenant.UpstreamForbidden, 11005: tenant.UpstreamThrottled, 98004: tenant.UpstreamDown} {
		sim.fault(t, map[string]any{"call": "MyScopes", "count": 1, "status": code})
		class(secret, want)
	}
	must(t, c.DeleteKey(ctx, secret))
	class(secret, tenant.UpstreamNotFound)
}

func TestAppOfAnother(t *testing.T) {
	t.Parallel()
	ctx, sim := t.Context(), simulate(t)
	c := sim.client(t)
	const theirPAT = "b0bb0bb0bb0bb0bb0bb0bb0bb0bb0bb0"
	must(t, sim.AddPAT(clarifaisim.PAT{Token: theirPAT, UserID: "bob"}))
	theirs := newClient(t, clarifai.Config{BaseURL: sim.url, PAT: func() tenant.Secret { return tenant.NewSecret(theirPAT) }}).As("bob")
	must(t, theirs.CreateApp(ctx, newApp))
	_, err := c.AppOf(ctx, "bob", appID)
	wantClass(t, "GetApp", err, tenant.UpstreamNotFound, false)
	sim.set(t, func(s *clarifaisim.Settings) {
		s.Shares = []clarifaisim.Share{{UserID: "bob", AppID: string(appID), With: string(operator)}}
	})
	app, err := c.AppOf(ctx, "bob", appID)
	must(t, err)
	if app.ID != appID || app.UserID != "bob" {
		t.Errorf("AppOf is %+v", app)
	}
	_, err = c.AppOf(ctx, "", appID) // the operator's own
	wantClass(t, "GetApp", err, tenant.UpstreamNotFound, false)
}
