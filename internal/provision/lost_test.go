package provision_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tenantry/tenantry/internal/clarifaisim"
	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// A change at Clarifai whose answer is lost.
type lostCall struct {
	call         string // as the simulator names it
	method, path string // of its request; path is a part
	// prepare makes the world as it is before, and act has the engine make the
	// change and waits until it has got over the loss.
	prepare, act func(s *scene)
	// lost is how many keys may be left that nobody can address: those whose making
	// was answered to nobody, on an app that a tenant holds, while listings are
	// masked. Of a build, only a key that lands late is left.
	lost      func(late bool) int
	newcomers []tenant.ID
}

var lostCalls = map[string]lostCall{
	"create app": {
		call: "PostApps", method: "POST", path: "/apps",
		prepare: first, act: signUpSecond, newcomers: []tenant.ID{"user_2"},
	},
	"create key": {
		call: "PostKeys", method: "POST", path: "/keys",
		prepare: first, act: signUpSecond, newcomers: []tenant.ID{"user_2"},
		lost: func(late bool) int {
			if late {
				return 1
			}
			return 0
		},
	},
	"create key of a held app": {
		call: "PostKeys", method: "POST", path: "/keys",
		prepare: func(s *scene) { first(s); removeKey(s) },
		act: func(s *scene) {
			before, _ := keyOf(s.t, s.r, "user_1")
			done, _ := report(s.t, s.r)
			repair(s.t, s.r, done.Token)
			provisiontest.Eventually(s.t, "another key is made", func() bool {
				key, _, err := s.r.Reveal(s.t.Context(), "user_1", tenant.DefaultKey, caller)
				return err == nil && key.ID != before.ID
			})
		},
		lost: func(late bool) int {
			if late {
				return 1
			}
			return lostAnswers
		},
	},
	"delete app": {
		call: "DeleteApp", method: "DELETE", path: "/apps/t-stray",
		prepare: func(s *scene) {
			first(s)
			s.r.Stop()
			makeMarkedApp(s, "")
			exec(s.t, s.w, `INSERT INTO apps (id, profile, profile_revision, state) VALUES ('t-stray', 'default', 'x', 'purging')`)
		},
		act: func(s *scene) { rest(s.t, s.w) },
	},
	"delete key": {
		call: "DeleteKey", method: "DELETE", path: "/keys/",
		prepare: revoking(true, true),
		act:     func(s *scene) { rest(s.t, s.w) },
	},
	"mark app": {
		call: "PatchApp", method: "PATCH", path: "/apps/",
		prepare: first, newcomers: []tenant.ID{"user_2"},
		act: func(s *scene) { signUpSecond(s); rest(s.t, s.w) },
	},
	"rescope key": {
		call: "PatchKeys", method: "PATCH", path: "/keys",
		prepare: func(s *scene) { first(s); rescopeKey(s) },
		act: func(s *scene) {
			done, _ := report(s.t, s.r)
			repair(s.t, s.r, done.Token)
		},
	},
}

// lostAnswers is how many calls in a row lose their answers.
const lostAnswers = 2

// Whatever becomes of the answer to a change, and however late the change is made,
// the tenants have one app and one key that works each, and nothing else is left
// that is not said to be.
func TestLostAnswers(t *testing.T) {
	t.Parallel()
	ways := map[string]map[string]any{
		"cut":        {"drop_after": true},
		"never came": {"hang": true, "after": true},
		"proxy page": {"http": 502, "after": true},
		"late":       nil,
	}
	for name, c := range lostCalls {
		for way, fault := range ways {
			for _, masked := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/%s/masked=%v", name, way, masked), func(t *testing.T) {
					t.Parallel()
					loseAnswer(t, c, fault, masked)
				})
			}
		}
	}
}

// loseAnswer meets a change with a fault; without one, with a delay until the
// engine has made it again.
func loseAnswer(t *testing.T, c lostCall, fault map[string]any, masked bool) {
	s := &scene{t: t, w: provisiontest.New(t), holds: map[tenant.ID]tenant.AppID{}}
	s.w.Settings(map[string]any{"masked_keys": masked})
	s.r = s.w.Start(provisiontest.Options{})
	c.prepare(s)
	s.r.Stop()
	before := len(s.w.Sim.Calls())

	// What may land late is waited for until dueNow.
	o := provisiontest.Options{Adjust: func(c *provision.Config) { c.Settle = time.Hour }}
	var hold *detour
	if fault == nil {
		hold = newDetour(t, s.w.Clarifai, c.method, c.path)
		o.Clarifai = hold.url
	} else {
		rule := map[string]any{"call": c.call, "count": lostAnswers}
		for k, v := range fault {
			rule[k] = v
		}
		s.w.Faults(rule)
	}
	s.r = s.w.Start(o)
	c.act(s)
	if hold != nil {
		looked(t, s.w)
		hold.land(t)
	} else if !slices.ContainsFunc(s.w.Sim.Calls()[before:], func(call clarifaisim.Call) bool { return call.Call == c.call && call.Fault != "" }) {
		t.Fatalf("no %s has lost its answer", c.call)
	}
	dueNow(t, s.w)

	lost := 0
	if masked && c.lost != nil {
		lost = c.lost(fault == nil)
	}
	sound(s, crashScenario{newcomers: c.newcomers, lost: lost})
	var said int
	if err := connOf(t, s.w).QueryRow(t.Context(), `SELECT count(*) FROM keys WHERE state = 'lost' AND problem ->> 'code' = 'key_lost'`).
		Scan(&said); err != nil || said != lost {
		t.Errorf("%d keys are said to be lost, %v; want %d", said, err, lost)
	}
	_, found := report(t, s.r)
	if len(found) != lost || slices.ContainsFunc(found, func(f tenant.Finding) bool { return f.Kind != tenant.FoundKeyLost }) {
		t.Errorf("a report finds %+v; want the %d keys that are lost", found, lost)
	}
}

// looked waits until keys that may land late have been looked for in vain.
func looked(t *testing.T, w *provisiontest.World) {
	t.Helper()
	conn := pgtest.Conn(t, w.URL)
	provisiontest.Eventually(t, "keys in doubt are looked for", func() bool {
		var open int
		err := conn.QueryRow(t.Context(), `
			SELECT count(*) FROM keys WHERE state = 'revoking' AND (next_attempt_at <= now() OR leased_until > now())`).Scan(&open)
		return err == nil && open == 0
	})
}

// dueNow makes what waits for its time, because something may land late, due.
func dueNow(t *testing.T, w *provisiontest.World) {
	t.Helper()
	exec(t, w, `UPDATE keys SET next_attempt_at = now() WHERE state = 'revoking' AND leased_until < now()`)
}

// A detour stands between an engine and Clarifai. It holds the first request of a
// kind back until it is told to let it go, when whoever sent it has long given up.
type detour struct {
	url          string
	to           string
	method, path string

	mu   sync.Mutex
	held *http.Request // guarded by mu
}

func newDetour(t *testing.T, to, method, path string) *detour {
	d := &detour{to: to, method: method, path: path}
	srv := httptest.NewServer(d)
	t.Cleanup(func() { srv.CloseClientConnections(); srv.Close() })
	d.url = srv.URL
	return d
}

func (d *detour) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	on, err := http.NewRequestWithContext(context.WithoutCancel(r.Context()), r.Method, d.to+r.URL.RequestURI(), bytes.NewReader(body))
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	on.Header = r.Header.Clone()
	if d.hold(on) {
		panic(http.ErrAbortHandler)
	}
	resp, err := http.DefaultClient.Do(on)
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	defer func() { _ = resp.Body.Close() }()
	w.Header().Set("Content-Type", resp.Header.Get("Content-Type"))
	w.WriteHeader(resp.StatusCode)
	_, _ = io.Copy(w, resp.Body)
}

func (d *detour) hold(r *http.Request) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.held != nil || r.Method != d.method || !strings.Contains(r.URL.Path, d.path) {
		return false
	}
	d.held = r
	return true
}

// land lets the request go that was held back.
func (d *detour) land(t *testing.T) {
	t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.held == nil {
		t.Fatalf("no %s %s was held back", d.method, d.path)
	}
	resp, err := http.DefaultClient.Do(d.held)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
}
