package clarifaisim_test

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tenantry/tenantry/internal/clarifaisim"
)

func TestControlShowsWhatThereIs(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	for _, path := range []string{"apps", "keys", "calls", "faults"} {
		if text := f.control(200, "GET", path, "", nil); text != "[]\n" {
			t.Errorf("%s of nothing: got %s, want []", path, text)
		}
	}
	f.want(10000, "POST", "/v2/users/acme/apps", `{"apps":[{"id":"app-a","metadata":{"tenantry":{"app":"x"}}}]}`)
	f.makeApp("app-b")
	key := f.makeKey("app-a", "Predict")

	want := `[{"id":"app-a","user_id":"acme","metadata":{"tenantry":{"app":"x"}}},{"id":"app-b","user_id":"acme","metadata":{}}]` + "\n"
	if diff := cmp.Diff(want, f.control(200, "GET", "apps", "", nil)); diff != "" {
		t.Errorf("apps (-want +got):\n%s", diff)
	}
	want = fmt.Sprintf(`[{"id":%q,"app_id":"app-a","user_id":"acme","type":"app_specific_key","scopes":["Predict"],"description":"d"}]`+"\n", key)
	if diff := cmp.Diff(want, f.control(200, "GET", "keys/", "", nil)); diff != "" {
		t.Errorf("keys (-want +got):\n%s", diff)
	}
	want = `{"apps":2,"keys":1,"calls":{"PostApps":2,"PostKeys":1}}` + "\n"
	if diff := cmp.Diff(want, f.control(200, "GET", "state", "", nil)); diff != "" {
		t.Errorf("state (-want +got):\n%s", diff)
	}
	f.control(404, "GET", "nothing", "", nil)
	f.control(405, "POST", "state", "", nil)
}

func TestReset(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.makeApp("app-a")
	key := f.makeKey("app-a")
	f.update(func(s *clarifaisim.Settings) { s.MaskedKeys = true; s.HTTPCodes[11005] = 503 })
	f.faults(clarifaisim.Fault{Call: "GetApp", Status: 98004})
	var st clarifaisim.State
	f.control(200, "POST", "reset", "", &st)
	if diff := cmp.Diff(clarifaisim.State{Calls: map[string]int{}}, st); diff != "" {
		t.Errorf("state after a reset (-want +got):\n%s", diff)
	}
	want := clarifaisim.DefaultSettings()
	want.RateLimit = 0
	if diff := cmp.Diff(want, f.Settings()); diff != "" || len(f.Faults())+len(f.Calls()) > 0 {
		t.Errorf("faults %v, calls %v, settings (-want +got):\n%s", f.Faults(), f.Calls(), diff)
	}
	f.wantAs(key, 11008, "GET", "/v2/app", "")
	f.want(10000, "GET", "/v2/users/me", "")
}

func TestCallLog(t *testing.T) {
	t.Parallel()
	var clk clock
	f := newFixture(t, clk.use)
	f.makeApp("app-a")
	key := f.makeKey("app-a")
	if err := f.Reset(); err != nil {
		t.Fatal(err)
	}
	f.makeApp("app-a")
	clk.forward(time.Second)
	key2 := f.makeKey("app-a")
	f.want(10000, "GET", "/v2/users/acme/keys/"+key2, "")
	f.wantAs(key2, 10000, "GET", "/v2/app", "")
	f.wantAs(key, 11008, "GET", "/v2/app", "")
	f.want(11101, "GET", "/v2/nothing/"+key2, "")
	start := time.Unix(1_800_000_000, 0).UTC()
	later := start.Add(time.Second)
	want := []clarifaisim.Call{
		{At: start, Call: "PostApps", UserID: "acme", AppID: "app-a", Status: 10000, HTTP: 200},
		{At: later, Call: "PostKeys", UserID: "acme", AppID: "app-a", Status: 10000, HTTP: 200},
		{At: later, Call: "GetKey", UserID: "acme", AppID: "app-a", Status: 10000, HTTP: 200},
		{At: later, Call: "GetApp", UserID: "acme", AppID: "app-a", Status: 10000, HTTP: 200},
		{At: later, Call: "GetApp", Status: 11008, HTTP: 401},
		{At: later, Call: "Unknown", UserID: "acme", Status: 11101, HTTP: 404},
	}
	if diff := cmp.Diff(want, f.Calls()); diff != "" {
		t.Errorf("calls (-want +got):\n%s", diff)
	}
	text := f.control(200, "GET", "calls", "", nil)
	for _, secret := range []string{acmePAT, key, key2} {
		if strings.Contains(text, secret) {
			t.Errorf("the log holds a secret: %s", text)
		}
	}
	if !strings.Contains(text, `"at":"2027-01-15T08:00:01Z"`) {
		t.Errorf("calls: %s: want times as RFC 3339", text)
	}
}

func TestCallLogIsBounded(t *testing.T) {
	t.Parallel()
	f := newFixture(t, func(cfg *clarifaisim.Config) { cfg.MaxCalls = 3 })
	for i := range 5 {
		f.want(11101, "GET", fmt.Sprintf("/v2/users/acme/apps/a%d", i), "")
		var got []string
		for _, c := range f.Calls() {
			got = append(got, c.AppID)
		}
		var want []string
		for n := max(0, i-2); n <= i; n++ {
			want = append(want, fmt.Sprintf("a%d", n))
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("after %d calls (-want +got):\n%s", i+1, diff)
		}
	}
	if n := f.State().Calls["GetApp"]; n != 5 {
		t.Errorf("count: got %d, want 5", n)
	}
}

// TestAtOnce has many clients want the same ids: one wins each.
func TestAtOnce(t *testing.T) {
	t.Parallel()
	f := newFixture(t, func(cfg *clarifaisim.Config) { cfg.StateFile = t.TempDir() + "/state" })
	const clients, apps = 8, 10
	won := make(chan string, clients*apps)
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			for i := range apps {
				id := fmt.Sprintf("app-%d", i)
				r, err := f.try(acmePAT, "POST", "/v2/users/acme/apps", fmt.Sprintf(`{"apps":[{"id":%q}]}`, id))
				switch {
				case err != nil:
					t.Errorf("PostApps: %v", err)
				case r.Status.Code == 10000:
					won <- id
				case r.Status.Code != 40010:
					t.Errorf("PostApps: %s", r.text)
				}
				_, _ = f.try(acmePAT, "POST", "/v2/users/acme/keys", keyBody(id, "All"))
				_, _ = f.try(acmePAT, "PATCH", "/v2/users/acme/apps/"+id, `{"app":{"metadata":{"n":1}},"action":"overwrite"}`)
				_, _ = f.try(acmePAT, "GET", "/v2/users/acme/keys", "")
				_ = f.Update(func(s *clarifaisim.Settings) { s.HTTPCodes[11009] = 401 })
				_, _, _, _ = f.State(), f.Apps(), f.Keys(), f.Calls()
			}
		})
	}
	wg.Wait()
	close(won)
	seen := make(map[string]int)
	for id := range won {
		seen[id]++
	}
	for id, n := range seen {
		if n != 1 {
			t.Errorf("%s was made %d times", id, n)
		}
	}
	if st := f.State(); st.Apps != apps || st.Keys != clients*apps {
		t.Errorf("got %d apps, %d keys, want %d, %d", st.Apps, st.Keys, apps, clients*apps)
	}
}
