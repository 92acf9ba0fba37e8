package httpapi_test

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// While an operator has paused all work, what needs a call is accepted and waits, says why, and has no time
// at which it goes on. What needs none goes on.
func TestPauseAll(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	s := newSiteOn(t, w, w.Start(provisiontest.Options{}))
	s.signUp("before")
	for _, c := range []struct{ body, field string }{
		{`{}`, "reason"}, {`{"reason":" "}`, "reason"}, {`{"reason":"x","scope":"some"}`, "scope"}, {`{"reason":"x","scope":""}`, "scope"}, {`{"reason":"x","why":1}`, "why"},
	} {
		if got := s.call(tenant.Admin, "POST", "/v1/upstream/pause", c.body); got.status != http.StatusBadRequest || got.at(t, "field") != c.field {
			t.Errorf("pause with %s answers %d %s; want a fault of %s", c.body, got.status, got.body, c.field)
		}
	}
	if got := s.call(tenant.Provisioner, "POST", "/v1/upstream/pause", `{"reason":"x"}`); got.status != http.StatusForbidden {
		t.Errorf("a provisioner's pause answers %d", got.status)
	}
	got := s.call(tenant.Admin, "POST", "/v1/upstream/pause", `{"reason":"Clarifai asked us to stop"}`)
	if got.status != http.StatusOK || got.at(t, "changed") != true || got.at(t, "pause", "scope") != "all" {
		t.Fatalf("pause answers %d %s", got.status, got.body)
	}
	if got = s.call(tenant.Admin, "POST", "/v1/upstream/pause", `{"scope":"all","reason":"Clarifai asked us to stop"}`); got.at(t, "changed") != false {
		t.Errorf("the same pause again answers %s", got.body)
	}
	before := len(w.Sim.Calls())

	if got = s.call(tenant.Provisioner, "PUT", "/v1/tenants/waits", "", "Prefer", "wait=1"); got.status != http.StatusAccepted || got.at(t, "problem", "code") != "upstream_paused" ||
		!strings.Contains(string(got.body), "Clarifai asked us to stop") || got.at(t, "problem", "next_attempt_at") != nil {
		t.Errorf("a sign-up answers %d %s", got.status, got.body)
	}
	if got = s.call(tenant.Provisioner, "POST", "/v1/tenants/before/suspend", "", "Prefer", "wait=1"); got.status != http.StatusAccepted || got.at(t, "problem", "code") != "upstream_paused" {
		t.Errorf("a suspension answers %d %s", got.status, got.body)
	}
	up := s.call(tenant.Viewer, "GET", "/v1/upstream", "")
	if up.at(t, "pause", "reason") != "Clarifai asked us to stop" || up.at(t, "problem", "code") != "upstream_paused" || up.at(t, "queue", "waiting_tenants") != 1.0 {
		t.Errorf("GET /v1/upstream answers %s", up.body)
	}
	for _, of := range [][]string{{"queue", "eta_seconds"}, {"queue", "import_eta_seconds"}, {"budget", "next_slot_in_seconds"}} {
		if at := up.at(t, of...); at != nil {
			t.Errorf("%v is %v while no work is done", of, at)
		}
	}
	for _, c := range w.Sim.Calls()[before:] {
		if c.Call != "GetApp" && c.Call != "PatchApps" && c.Call != "Whoami" { // of the control record
			t.Errorf("%s was called during the pause", c.Call)
		}
	}

	// The pause outlasts a restart.
	s = newSiteOn(t, w, w.Start(provisiontest.Options{}))
	if up = s.call(tenant.Viewer, "GET", "/v1/upstream", ""); up.at(t, "problem", "code") != "upstream_paused" {
		t.Errorf("after a restart GET /v1/upstream answers %s", up.body)
	}
	got = s.call(tenant.Admin, "POST", "/v1/upstream/resume", "")
	if got.at(t, "changed") != true || got.at(t, "ended", "scope") != "all" {
		t.Errorf("resume answers %d %s", got.status, got.body)
	}
	if got = s.call(tenant.Admin, "POST", "/v1/upstream/resume", ""); got.status != http.StatusOK || got.at(t, "changed") != false {
		t.Errorf("resume again answers %d %s", got.status, got.body)
	}
	if got = s.call(tenant.Viewer, "GET", "/v1/tenants/waits?wait=30", ""); got.at(t, "state") != "active" {
		t.Errorf("after the pause the sign-up is %s", got.body)
	}
	s.until(tenant.Provisioner, "POST", "/v1/tenants/before/suspend")
	up = s.call(tenant.Viewer, "GET", "/v1/upstream", "")
	if up.at(t, "pause") != nil || up.at(t, "problem") != nil || up.at(t, "queue", "eta_seconds") != 0.0 {
		t.Errorf("after the pause GET /v1/upstream answers %s", up.body)
	}
	var events int
	if err := pgtest.Conn(t, w.URL).QueryRow(t.Context(), `SELECT count(*) FROM audit_events
		WHERE action IN ('upstream.paused', 'upstream.resumed') AND actor LIKE 'caller:%' AND detail ->> 'reason' = 'Clarifai asked us to stop'`).Scan(&events); err != nil || events != 2 {
		t.Errorf("the audit log has %d events, %v; want a pause and its end", events, err)
	}
}

// While removals are paused no app is removed; keys end, and sign-ups are served.
func TestPauseRemovals(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	s := newSiteOn(t, w, w.Start(provisiontest.Options{}))
	app := s.signUp("user_1").at(t, "app", "id")
	if got := s.call(tenant.Admin, "POST", "/v1/upstream/pause", `{"scope":"removals","reason":"apps of live customers were deleted"}`); got.status != http.StatusOK {
		t.Fatalf("pause answers %d %s", got.status, got.body)
	}
	provisiontest.Eventually(t, "the keys have ended", func() bool {
		got := s.call(tenant.Admin, "DELETE", "/v1/tenants/user_1?purge=now", "")
		return got.at(t, "problem", "code") == "removals_paused" && w.State().Keys == 0
	})
	s.signUp("user_2")
	if up := s.call(tenant.Viewer, "GET", "/v1/upstream", ""); up.at(t, "pause", "scope") != "removals" || up.at(t, "problem") != nil && up.at(t, "problem", "code") != "removals_paused" ||
		up.at(t, "queue", "eta_seconds") == nil {
		t.Errorf("GET /v1/upstream answers %s", up.body)
	}
	if n := w.State().Calls["DeleteApp"]; n != 0 {
		t.Errorf("%d apps were removed during the pause of removals", n)
	}
	s.call(tenant.Admin, "POST", "/v1/upstream/resume", "")
	provisiontest.Eventually(t, "the app is removed", func() bool {
		return s.call(tenant.Viewer, "GET", "/v1/tenants/user_1", "").at(t, "state") == "deleted"
	})
	if got := s.call(tenant.Viewer, "GET", "/v1/apps/"+app.(string), ""); got.at(t, "state") != "deleted" {
		t.Errorf("the app is %s", got.body)
	}
}

// Whatever holds up upstream work, GET /v1/upstream names one cause, promises no end of the work, and no
// attempt in the past.
func TestUpstreamSaysOneThing(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		fault map[string]any
		code  string
	}{
		"down":        {map[string]any{"call": "*", "drop_before": true}, "upstream_unavailable"},
		"throttled":   {map[string]any{"call": "*", "status": 11005}, "upstream_throttled"},
		"PAT refused": {map[string]any{"call": "*", "probability": 1, "status": 11009}, "upstream_pat_refused"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := provisiontest.New(t)
			s := newSiteOn(t, w, w.Start(provisiontest.Options{}))
			s.signUp("before")
			w.Faults(c.fault)
			s.call(tenant.Provisioner, "PUT", "/v1/tenants/waits", "", "Prefer", "wait=0")
			provisiontest.Eventually(t, "the problem shows", func() bool {
				return s.call(tenant.Viewer, "GET", "/v1/upstream", "").at(t, "problem", "code") == c.code
			})
			for range 50 {
				asked := time.Now()
				up := s.call(tenant.Viewer, "GET", "/v1/upstream", "")
				if up.at(t, "problem") == nil { // a probe is under way
					continue
				}
				if code := up.at(t, "problem", "code"); code != c.code {
					t.Errorf("the problem is %s", up.body)
				}
				if up.at(t, "breaker", "state") != "closed" && up.at(t, "queue", "eta_seconds") != nil {
					t.Errorf("an end of the work is promised: %s", up.body)
				}
				if reason := up.at(t, "breaker", "reason"); reason != nil && up.at(t, "breaker", "reason", "code") != c.code {
					t.Errorf("two causes: %s", up.body)
				}
				for _, of := range [][]string{{"problem", "next_attempt_at"}, {"breaker", "paused_until"}, {"breaker", "reason", "next_attempt_at"}} {
					text, _ := up.at(t, of...).(string)
					if at, err := time.Parse(time.RFC3339, text); text != "" && (err != nil || at.Before(asked.Add(-time.Second))) {
						t.Errorf("%v is in the past at %s: %s", of, asked, up.body)
					}
				}
				got := s.call(tenant.Viewer, "GET", "/v1/tenants/waits", "")
				text, _ := got.at(t, "problem", "next_attempt_at").(string)
				if at, err := time.Parse(time.RFC3339, text); text != "" && (err != nil || at.Before(asked.Add(-time.Second))) {
					t.Errorf("the tenant's next attempt is in the past at %s: %s", asked, got.body)
				}
			}
			w.Faults()
			if got := s.call(tenant.Viewer, "GET", "/v1/tenants/waits?wait=30", ""); got.at(t, "state") != "active" {
				t.Errorf("it does not go on: %s", got.body)
			}
		})
	}
}
