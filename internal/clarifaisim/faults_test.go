package clarifaisim_test

import (
	"context"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tenantry/tenantry/internal/clarifaisim"
)

const postAppA = `{"apps":[{"id":"app-a"}]}`

// TestFaults sends PostApps into each fault, and looks at what is answered and at
// whether the app was made.
func TestFaults(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		fault clarifaisim.Fault
		cut   bool
		code  int
		http  int
		made  bool
		text  string // in the answer
	}{
		{"status", clarifaisim.Fault{Status: 39997}, false, 39997, 503, false, `"apps":[]`},
		{"throttled", clarifaisim.Fault{Status: 11005}, false, 11005, 429, false, "exceeded limit"},
		{"throttled for a while", clarifaisim.Fault{Status: 11005, RetryAfter: "15"}, false, 11005, 429, false, ""},
		{"http for a while", clarifaisim.Fault{HTTP: 503, RetryAfter: "15"}, false, 0, 503, false, ""},
		{"unknown status", clarifaisim.Fault{Status: 54321}, false, 54321, 500, false, ""},
		{"status after", clarifaisim.Fault{Status: 98004, After: true}, false, 98004, 500, true, ""},
		{"mixed", clarifaisim.Fault{Status: 10010, After: true}, false, 10010, 207, true, `"id":"app-a"`},
		{"http", clarifaisim.Fault{HTTP: 502}, false, 0, 502, false, "<h1>502 Bad Gateway</h1>"},
		{"http after", clarifaisim.Fault{HTTP: 504, After: true}, false, 0, 504, true, "<html>"},
		{"drop before", clarifaisim.Fault{DropBefore: true}, true, 0, 0, false, ""},
		{"drop after", clarifaisim.Fault{DropAfter: true}, true, 0, 0, true, ""},
		{"delay", clarifaisim.Fault{DelayMS: 1}, false, 10000, 200, true, ""},
		{"delay after", clarifaisim.Fault{DelayMS: 1, After: true}, false, 10000, 200, true, `"id":"app-a"`},
		{"slow drop", clarifaisim.Fault{DelayMS: 1, DropAfter: true}, true, 0, 0, true, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t)
			tt.fault.Call, tt.fault.Count = "PostApps", 1
			f.faults(tt.fault)
			f.want(10000, "GET", "/v2/users/me", "") // another call
			r, err := f.try(acmePAT, "POST", "/v2/users/acme/apps", postAppA)
			if (err != nil) != tt.cut {
				t.Fatalf("got %s, error %v; want the connection cut: %v", r.text, err, tt.cut)
			}
			if r.Status.Code != tt.code || r.http != tt.http || !strings.Contains(r.text, tt.text) {
				t.Errorf("got code %d, HTTP %d, %s; want %d, %d and %q", r.Status.Code, r.http, r.text, tt.code, tt.http, tt.text)
			}
			if got := r.header.Get("Retry-After"); got != tt.fault.RetryAfter {
				t.Errorf("got Retry-After %q, want %q", got, tt.fault.RetryAfter)
			}
			if made := len(f.Apps()) == 1; made != tt.made {
				t.Errorf("app made: %v, want %v", made, tt.made)
			}
			calls := f.Calls()
			if last := calls[len(calls)-1]; last.Fault == "" || last.Status != tt.code || last.HTTP != tt.http {
				t.Errorf("log: %+v, want a fault, status %d and HTTP %d", last, tt.code, tt.http)
			}
			// Used up.
			f.want(map[bool]int{true: 40010, false: 10000}[tt.made], "POST", "/v2/users/acme/apps", postAppA)
		})
	}
}

func TestHang(t *testing.T) {
	t.Parallel()
	for _, after := range []bool{false, true} {
		f := newFixture(t)
		f.faults(clarifaisim.Fault{Call: "PostApps", Hang: true, After: after})
		ctx, giveUp := context.WithCancel(t.Context())
		req, _ := http.NewRequestWithContext(ctx, "POST", f.url+"/v2/users/acme/apps", strings.NewReader(postAppA))
		req.Header.Set("Authorization", "Key "+acmePAT)
		done := make(chan error)
		go func() {
			_, err := f.send(req)
			done <- err
		}()
		if after {
			eventually(t, "the app made while the call hangs", func() bool { return len(f.Apps()) == 1 })
		} else {
			eventually(t, "the call come in", func() bool { return f.State().Calls["PostApps"] == 1 })
		}
		select {
		case err := <-done:
			t.Fatalf("the call did not hang: %v", err)
		default:
		}
		giveUp()
		if err := <-done; err == nil {
			t.Error("a call that was given up has an answer")
		}
		if n := len(f.Apps()); (n == 1) != after {
			t.Errorf("after=%v: %d apps", after, n)
		}
	}
}

func TestCloseEndsWhatHangs(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.faults(clarifaisim.Fault{Call: "*", Hang: true})
	done := make(chan error)
	go func() {
		_, err := f.try(acmePAT, "GET", "/v2/users/me", "")
		done <- err
	}()
	eventually(t, "the call come in", func() bool { return f.State().Calls["GetUser"] == 1 })
	for range 2 {
		if err := f.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	}
	if err := <-done; err == nil {
		t.Error("a hanging call has an answer")
	}
	if _, err := f.try(acmePAT, "GET", "/v2/users/me", ""); err == nil {
		t.Error("a call after Close has an answer")
	}
}

func TestLateChanges(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		fault clarifaisim.Fault
		http  int // 0: cut
	}{
		{"alone", clarifaisim.Fault{}, 0},
		{"with drop_before", clarifaisim.Fault{DropBefore: true}, 0},
		{"with drop_after", clarifaisim.Fault{DropAfter: true}, 0},
		{"with http", clarifaisim.Fault{HTTP: 504}, 504},
		{"with status", clarifaisim.Fault{Status: 40032}, 504},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t)
			tt.fault.Call, tt.fault.LateMS = "PostApps", 20
			f.faults(tt.fault)
			r, err := f.try(acmePAT, "POST", "/v2/users/acme/apps", postAppA)
			if (err != nil) != (tt.http == 0) || r.http != tt.http {
				t.Fatalf("got HTTP %d, error %v, want HTTP %d", r.http, err, tt.http)
			}
			eventually(t, "the change landed", func() bool { return len(f.Apps()) == 1 })
		})
	}
	t.Run("not after a reset", func(t *testing.T) {
		t.Parallel()
		f := newFixture(t)
		// The two land in the order in which they were sent.
		f.faults(clarifaisim.Fault{Call: "PostApps", LateMS: 30})
		_, _ = f.try(acmePAT, "POST", "/v2/users/acme/apps", postAppA)
		if err := f.Reset(); err != nil {
			t.Fatal(err)
		}
		f.faults(clarifaisim.Fault{Call: "PostApps", LateMS: 60})
		_, _ = f.try(acmePAT, "POST", "/v2/users/acme/apps", `{"apps":[{"id":"app-b"}]}`)
		eventually(t, "the second landed", func() bool { return len(f.Apps()) > 0 })
		if got := f.Apps(); len(got) != 1 || got[0].ID != "app-b" {
			t.Errorf("apps: %+v, want app-b alone", got)
		}
	})
	t.Run("not after Close", func(t *testing.T) {
		t.Parallel()
		f := newFixture(t)
		f.faults(clarifaisim.Fault{Call: "PostApps", LateMS: 3_600_000})
		_, _ = f.try(acmePAT, "POST", "/v2/users/acme/apps", postAppA)
		if err := f.Close(); err != nil { // and it does not wait an hour
			t.Errorf("Close: %v", err)
		}
	})
}

// eventually waits for what another goroutine does and gives no sign of.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for limit := time.After(10 * time.Second); !done(); {
		select {
		case <-limit:
			t.Fatalf("waited in vain for %s", what)
		case <-tick.C:
		}
	}
}

func TestMoved(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.faults(clarifaisim.Fault{Call: "ListAppKeys", Status: 10050, MovedTo: "new"})
	r := f.want(10050, "GET", "/v2/users/acme/apps/old/keys", "")
	if loc := r.header.Get("Location"); r.http != 307 || loc != "/v2/users/acme/apps/new/keys" || r.Status.RedirectInfo.NewResourceID != "new" {
		t.Errorf("HTTP %d, Location %q, redirect_info %+v", r.http, loc, r.Status.RedirectInfo)
	}
}

func TestWhichFaultFires(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	f.faults(
		clarifaisim.Fault{Call: "GetUser", Count: 2, Status: 98004},
		clarifaisim.Fault{Call: "*", Count: 1, Status: 10030},
		clarifaisim.Fault{Call: "ListApps", Probability: 1, Status: 40031},
	)
	f.want(98004, "GET", "/v2/users/me", "")
	f.want(10030, "GET", "/v2/apps", "")
	if left := f.Faults(); len(left) != 2 || left[0].Count != 1 {
		t.Errorf("faults left: %+v", left)
	}
	f.want(98004, "GET", "/v2/users/me", "")
	f.want(10000, "GET", "/v2/users/me", "")
	f.want(40031, "GET", "/v2/apps", "")
	f.want(40031, "GET", "/v2/apps", "")

	// Paths that there are not are met by "*"; a throttled call meets nothing.
	f.faults(clarifaisim.Fault{Call: "*", Count: 2, Status: 10030})
	f.want(10030, "GET", "/v2/nothing", "")
	f.update(func(s *clarifaisim.Settings) { s.RateLimit = 1 })
	f.want(10030, "GET", "/v2/users/me", "")
	f.faults(clarifaisim.Fault{Call: "*", Status: 10030})
	f.want(11005, "GET", "/v2/users/me", "")
	f.faults()
	f.update(func(s *clarifaisim.Settings) { s.RateLimit = 0 })

	f.faults(clarifaisim.Fault{Call: "GetUser", Probability: 0.5, Status: 98004})
	met := 0
	for range 200 {
		if f.do(acmePAT, "GET", "/v2/users/me", "").Status.Code == 98004 {
			met++
		}
	}
	if met == 0 || met == 200 {
		t.Errorf("probability 0.5: met by %d of 200", met)
	}
}

func TestFaultsControl(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	var got []clarifaisim.Fault
	f.control(200, "POST", "faults", `{"faults":[{"call":"PostKeys","count":1,"drop_after":true},{"call":"*","probability":0.1,"delay_ms":5}]}`, &got)
	want := []clarifaisim.Fault{{Call: "PostKeys", Count: 1, DropAfter: true}, {Call: "*", Probability: 0.1, DelayMS: 5}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("faults (-want +got):\n%s", diff)
	}
	for _, tt := range []struct{ body, message string }{
		{``, "give a list"},
		{`{"fault":[]}`, "unknown field"},
		{`[{"call":"GetApp","status":11005,"bla":1}]`, "unknown field"},
		{`[{"call":"GetApp","status":11005},{"call":"GetApps","status":11005}]`, `fault 2: there is no call \"GetApps\"`},
		{`[{"status":11005}]`, "call is missing"},
		{`[{"call":"GetApp"}]`, "does nothing"},
		{`[{"call":"GetApp","status":429}]`, "has to be a Clarifai code"},
		{`[{"call":"GetApp","http":11005}]`, "200 to 599"},
		{`[{"call":"GetApp","http":502,"hang":true}]`, "give one of"},
		{`[{"call":"GetApp","hang":true,"count":1,"probability":0.5}]`, "not both"},
		{`[{"call":"GetApp","hang":true,"probability":0}]`, "leave it out"},
		{`[{"call":"GetApp","hang":true,"probability":1.5}]`, "at most 1"},
		{`[{"call":"GetApp","hang":true,"count":-1}]`, "count is -1"},
		{`[{"call":"GetApp","delay_ms":-1}]`, "0 or more"},
		{`[{"call":"GetApp","late_ms":5,"after":true}]`, "not both"},
		{`[{"call":"GetApp","drop_before":true,"after":true}]`, "drop_after"},
		{`[{"call":"GetApp","status":11005,"moved_to":"x"}]`, "moved_to"},
		{`[{"call":"GetApp","hang":true,"retry_after":"15"}]`, "retry_after"},
	} {
		if text := f.control(400, "POST", "faults", tt.body, nil); !strings.Contains(text, tt.message) {
			t.Errorf("faults %s: got %s, want it to say %s", tt.body, text, tt.message)
		}
	}
	f.control(200, "GET", "faults", "", &got)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("faults after refused lists (-want +got):\n%s", diff)
	}
	if text := f.control(200, "POST", "faults", `[]`, nil); text != "[]\n" {
		t.Errorf("no faults: got %s, want []", text)
	}
}
