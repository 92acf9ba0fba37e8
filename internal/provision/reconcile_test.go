package provision_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

var admin = tenant.Actor{Name: "caller:admin", RequestID: "req-2"}

// report runs a report once no other reconciliation runs, and returns its findings.
func report(t *testing.T, r *provisiontest.Replica) (tenant.Reconciliation, []tenant.Finding) {
	t.Helper()
	var began tenant.Reconciliation
	var err error
	provisiontest.Eventually(t, "a report can begin", func() bool {
		began, err = r.StartReport(t.Context(), admin)
		return !errors.Is(err, tenant.Conflict)
	})
	if err != nil {
		t.Fatalf("start report: %v", err)
	}
	return reconciled(t, r, began)
}

// repair carries a report out, and returns how its findings ended.
func repair(t *testing.T, r *provisiontest.Replica, token string) []tenant.Finding {
	t.Helper()
	began, err := r.StartRepair(t.Context(), token, admin)
	if err != nil {
		t.Fatalf("start repair: %v", err)
	}
	_, found := reconciled(t, r, began)
	return found
}

func reconciled(t *testing.T, r *provisiontest.Replica, began tenant.Reconciliation) (tenant.Reconciliation, []tenant.Finding) {
	t.Helper()
	var done tenant.Reconciliation
	provisiontest.Eventually(t, "the reconciliation is done", func() bool {
		var err error
		done, err = r.DB.Reconciliation(t.Context(), began.ID)
		return err == nil && done.Done
	})
	found, err := r.DB.Findings(t.Context(), done, 0, 1000)
	if err != nil {
		t.Fatal(err)
	}
	return done, found
}

// askClarifai makes a call as the operator does by hand.
func askClarifai(t *testing.T, w *provisiontest.World, method, path string, body any) []byte {
	t.Helper()
	raw, err := json.Marshal(body)
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), method, w.Clarifai+"/v2/users/"+string(provisiontest.Operator)+path, bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Key "+provisiontest.PAT)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	answer, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s %s: %s %s %v", method, path, resp.Status, answer, err)
	}
	return answer
}

// marked waits until the apps of all tenants have them in their markers.
func marked(t *testing.T, w *provisiontest.World) {
	t.Helper()
	conn := pgtest.Conn(t, w.URL)
	provisiontest.Eventually(t, "held apps are marked", func() bool {
		var pending int
		err := conn.QueryRow(t.Context(), `SELECT count(*) FROM apps WHERE state = 'held' AND pending`).Scan(&pending)
		return err == nil && pending == 0
	})
}

func exec(t *testing.T, w *provisiontest.World, sql string, args ...any) {
	t.Helper()
	if _, err := connOf(t, w).Exec(t.Context(), sql, args...); err != nil {
		t.Fatal(err)
	}
}

func keyOf(t *testing.T, r *provisiontest.Replica, id tenant.ID) (tenant.Key, tenant.Secret) {
	t.Helper()
	key, secret, err := r.Reveal(t.Context(), id, tenant.DefaultKey, caller)
	if err != nil {
		t.Fatalf("reveal the key of %s: %v", id, err)
	}
	return key, secret
}

func makeKeyByHand(t *testing.T, w *provisiontest.World, app tenant.AppID, description string) {
	t.Helper()
	askClarifai(t, w, "POST", "/keys", map[string]any{"keys": []any{map[string]any{"description": description, "scopes": []string{"All"},
		"apps": []any{map[string]any{"id": app, "user_id": provisiontest.Operator}}}}})
}

// Where nothing differs a report finds nothing, changes nothing and takes a few
// calls, however the listing shows keys.
func TestReportOfAgreement(t *testing.T) {
	t.Parallel()
	for _, masked := range []bool{false, true} {
		t.Run(fmt.Sprint("masked=", masked), func(t *testing.T) {
			t.Parallel()
			w := provisiontest.New(t)
			w.Settings(map[string]any{"masked_keys": masked})
			r := w.Start(provisiontest.Options{})
			for i := range 5 {
				signUp(t, r, tenant.ID(fmt.Sprint("user_", i)))
			}
			makeForeignApp(t, w, "not-ours")
			marked(t, w)
			before := len(w.Sim.Calls())
			done, found := report(t, r)
			if len(found) != 0 || done.AppsSeen != 6 || done.KeysSeen != 5 || done.ForeignApps != 1 || done.Token == "" {
				t.Errorf("the report is %+v with the findings %+v; want 6 apps, one of them foreign, 5 keys and no finding", done, found)
			}
			var calls []string
			for _, c := range w.Sim.Calls()[before:] {
				calls = append(calls, c.Call)
			}
			if want := []string{"ListApps", "ListApps", "ListKeys", "ListKeys"}; !slices.Equal(calls, want) {
				t.Errorf("the report called %v; want %v", calls, want)
			}
		})
	}
}

// Each way in which Clarifai and Postgres can differ is found, and is gone after a
// repair; what a person has to decide is left alone.
func TestReconcile(t *testing.T) {
	t.Parallel()
	type scene struct {
		w   *provisiontest.World
		r   *provisiontest.Replica
		app tenant.AppID
		key tenant.Key
	}
	marker := func(s scene, id uuid.UUID) string {
		return tenant.KeyMarker{Deployment: s.r.Deployment.ID, KeyID: id}.String()
	}
	stray := uuid.MustParse("0190a000-0000-7000-8000-000000000001")
	for name, c := range map[string]struct {
		differ func(t *testing.T, s scene)
		kind   tenant.FindingKind
		action tenant.RepairAction
		check  func(t *testing.T, s scene) // after the repair; nil for the checks that all share
	}{
		"a tenant's app is gone": {
			func(t *testing.T, s scene) { askClarifai(t, s.w, "DELETE", "/apps/"+string(s.app), nil) },
			tenant.FoundAppGone, tenant.Rebuild,
			func(t *testing.T, s scene) {
				if got := signUp(t, s.r, "user_1"); got.AppID == s.app {
					t.Errorf("the tenant still has the app %s", s.app)
				}
			},
		},
		"a tenant's key is gone": {
			func(t *testing.T, s scene) {
				_, secret := keyOf(t, s.r, "user_1")
				askClarifai(t, s.w, "DELETE", "/keys/"+secret.Reveal(), nil)
			},
			tenant.FoundKeyGone, tenant.Remake,
			func(t *testing.T, s scene) {
				provisiontest.Eventually(t, "another key is made", func() bool {
					key, _, err := s.r.Reveal(t.Context(), "user_1", tenant.DefaultKey, caller)
					return err == nil && key.ID != s.key.ID
				})
			},
		},
		"scopes have drifted": {
			func(t *testing.T, s scene) {
				_, secret := keyOf(t, s.r, "user_1")
				askClarifai(t, s.w, "PATCH", "/keys", map[string]any{"action": "overwrite",
					"keys": []any{map[string]any{"id": secret.Reveal(), "scopes": []string{"Predict"}}}})
			},
			tenant.FoundKeyDrifted, tenant.Rescope, nil,
		},
		"an app has lost its marker": {
			func(t *testing.T, s scene) {
				askClarifai(t, s.w, "PATCH", "/apps/"+string(s.app), map[string]any{"action": "overwrite",
					"app": map[string]any{"metadata": map[string]any{"mine": 1}}, "metadata_action": map[string]any{"op": "overwrite"}})
			},
			tenant.FoundAppUnmarked, tenant.Mark, nil,
		},
		"a revoked key lives": {
			func(t *testing.T, s scene) {
				exec(t, s.w, `INSERT INTO keys (id, app_id, name, scopes, state, revoked_at, updated_at)
					VALUES ($1, $2, 'old', '{All}', 'revoked', now() - interval '1 day', now() - interval '1 day')`, stray, s.app)
				makeKeyByHand(t, s.w, s.app, marker(s, stray))
			},
			tenant.FoundKeyAlive, tenant.Revoke,
			func(t *testing.T, s scene) {
				provisiontest.Eventually(t, "the key is gone", func() bool { return len(s.w.AppKeys()) == 1 })
			},
		},
		"a lost key can be addressed": {
			func(t *testing.T, s scene) {
				exec(t, s.w, `INSERT INTO keys (id, app_id, name, scopes, state, updated_at)
					VALUES ($1, $2, 'old', '{All}', 'lost', now() - interval '1 day')`, stray, s.app)
				makeKeyByHand(t, s.w, s.app, marker(s, stray))
			},
			tenant.FoundKeyAlive, tenant.Revoke,
			func(t *testing.T, s scene) {
				provisiontest.Eventually(t, "the key is gone", func() bool { return len(s.w.AppKeys()) == 1 })
			},
		},
		"a removed app lives": {
			func(t *testing.T, s scene) {
				exec(t, s.w, `INSERT INTO apps (id, profile, profile_revision, state, updated_at)
					VALUES ('t-zombie', 'default', 'x', 'deleted', now() - interval '1 day')`)
				askClarifai(t, s.w, "POST", "/apps", map[string]any{"apps": []any{map[string]any{"id": "t-zombie",
					"metadata": map[string]any{"tenantry": tenant.Marker{Deployment: s.r.Deployment.ID, App: "t-zombie"}}}}})
			},
			tenant.FoundAppAlive, tenant.Remove,
			func(t *testing.T, s scene) {
				provisiontest.Eventually(t, "the app is gone", func() bool { return s.w.State().Apps == 1 })
			},
		},
		"an app was renamed": {
			func(t *testing.T, s scene) {
				askClarifai(t, s.w, "PATCH", "/apps/ids", map[string]any{"action": "overwrite", "ids": []any{map[string]any{"id": s.app, "new_id": "renamed"}}})
			},
			tenant.FoundAppRenamed, "", nil,
		},
		"a key of somebody else's": {
			func(t *testing.T, s scene) { makeKeyByHand(t, s.w, s.app, "mine") },
			tenant.FoundKeyUnmanaged, "", nil,
		},
		"a doubt that lasts": {
			func(t *testing.T, s scene) {
				exec(t, s.w, `INSERT INTO apps (id, profile, profile_revision, in_doubt_since, next_attempt_at)
					VALUES ('t-doubt', 'default', 'x', now() - interval '1 hour', 'infinity')`)
			},
			tenant.FoundInDoubt, "", nil,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := provisiontest.New(t)
			s := scene{w: w, r: w.Start(provisiontest.Options{})}
			s.app = signUp(t, s.r, "user_1").AppID
			s.key, _ = keyOf(t, s.r, "user_1")
			marked(t, w)
			c.differ(t, s)
			before := w.State()

			done, found := report(t, s.r)
			if len(found) != 1 || found[0].Kind != c.kind || found[0].Action != c.action {
				t.Fatalf("the report found %+v; want one %s with the action %q", found, c.kind, c.action)
			}
			if after := w.State(); after.Apps != before.Apps || after.Keys != before.Keys {
				t.Errorf("the report changed Clarifai from %+v to %+v", before, after)
			}
			if c.action == "" {
				if ended := repair(t, s.r, done.Token); ended[0].State != tenant.FindingOpen {
					t.Errorf("a finding for people ended as %+v", ended)
				}
				return
			}
			if ended := repair(t, s.r, done.Token); ended[0].State != tenant.FindingDone {
				t.Fatalf("the repair ended with %+v", ended)
			}
			if c.check != nil {
				c.check(t, s)
			}
			marked(t, w)
			if got := signUp(t, s.r, "user_1"); !keyWorks(t, w, s.r, got) {
				t.Error("the tenant's key does not open its app")
			}
			provisiontest.Eventually(t, "nothing is in the works", func() bool {
				var open int
				err := connOf(t, w).QueryRow(t.Context(), `
					SELECT (SELECT count(*) FROM apps WHERE state IN ('building', 'purging')) + (SELECT count(*) FROM keys WHERE state = 'revoking')`).Scan(&open)
				return err == nil && open == 0
			})
			if _, found := report(t, s.r); len(found) != 0 {
				t.Errorf("after the repair a report finds %+v", found)
			}
			var events int
			if err := connOf(t, w).QueryRow(t.Context(),
				`SELECT count(*) FROM audit_events WHERE actor = $1 AND detail ? 'finding'`, admin.Name).Scan(&events); err != nil || events != 1 {
				t.Errorf("the repair wrote %d events, %v; want 1", events, err)
			}
		})
	}
}

// A repair looks again before it acts: what has mended itself since the report is
// left alone.
func TestRepairLooksAgain(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	app := signUp(t, r, "user_1").AppID
	marked(t, w)
	w.Faults(map[string]any{"call": "ListApps", "status": 10000}, map[string]any{"call": "GetApp", "count": 1, "status": 11101})
	done, found := report(t, r)
	if len(found) != 1 || found[0].Kind != tenant.FoundAppGone {
		t.Fatalf("found %+v; want the app to seem gone", found)
	}
	w.Faults()
	if ended := repair(t, r, done.Token); ended[0].State != tenant.FindingSkipped {
		t.Errorf("the repair ended with %+v; want the finding skipped", ended)
	}
	if got := signUp(t, r, "user_1"); got.AppID != app {
		t.Errorf("the tenant lost its app %s", app)
	}
}

// Repairs remove no more in an hour than they may.
func TestRemovalCap(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{Adjust: func(c *provision.Config) { c.RemovalCap = 2 }})
	app := signUp(t, r, "user_1").AppID
	marked(t, w)
	for i := range 4 {
		id := uuid.Must(uuid.NewV7())
		exec(t, w, `INSERT INTO keys (id, app_id, name, scopes, state, revoked_at, updated_at)
			VALUES ($1, $2, $3, '{All}', 'revoked', now() - interval '1 day', now() - interval '1 day')`, id, app, fmt.Sprint("old-", i))
		makeKeyByHand(t, w, app, tenant.KeyMarker{Deployment: r.Deployment.ID, KeyID: id}.String())
	}
	done, found := report(t, r)
	if len(found) != 4 {
		t.Fatalf("found %+v; want 4 keys that live", found)
	}
	began, err := r.StartRepair(t.Context(), done.Token, admin)
	if err != nil {
		t.Fatal(err)
	}
	provisiontest.Eventually(t, "the cap is reached", func() bool {
		got, err := r.DB.Reconciliation(t.Context(), began.ID)
		return err == nil && got.Problem != nil && got.Problem.Code == "removal_cap" && len(w.AppKeys()) == 3
	})
	exec(t, w, `UPDATE reconciliation_items SET ended_at = ended_at - interval '1 hour' WHERE state = 'done';
		UPDATE reconciliations SET next_attempt_at = now() WHERE state = 'running'`)
	if _, ended := reconciled(t, r, began); slices.ContainsFunc(ended, func(f tenant.Finding) bool { return f.State != tenant.FindingDone }) {
		t.Errorf("an hour later the repair ended with %+v", ended)
	}
}

// A listing that Clarifai sends too slowly continues in smaller pages, from the same entry. In an
// outage, where no page size helps, pages stay as large as they are: they never grow again.
func TestSlowListing(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{Idle: true, Adjust: func(c *provision.Config) { c.TripAfter = 1000 }})
	for i := range 8 {
		w.AppByHand(provisiontest.PAT, tenant.AppID(fmt.Sprintf("by-hand-%d", i)), nil)
	}
	began, err := r.StartReport(t.Context(), admin)
	if err != nil {
		t.Fatal(err)
	}
	turn := func(faults ...map[string]any) tenant.Reconciliation {
		t.Helper()
		w.Faults(faults...)
		exec(t, w, `UPDATE reconciliations SET next_attempt_at = now(), leased_until = '-infinity';
			UPDATE upstream_budget SET paused_until = now(), probe_until = 'epoch'`)
		r.WorkReconciliation(t.Context(), began.ID)
		got, err := r.DB.Reconciliation(t.Context(), began.ID)
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	for _, outage := range []map[string]any{{"http": 503}, {"status": 39997}, {"status": 98004}, {"status": 11005}, {"drop_before": true}} {
		outage["call"] = "ListApps"
		if got := turn(outage); got.Problem == nil || got.PerPage != 1000 {
			t.Fatalf("after %v it reads pages of %d entries, and has the problem %v; want pages of 1000 and a problem", outage, got.PerPage, got.Problem)
		}
	}
	slow := []map[string]any{{"hang": true}, {"http": 504}, {"status": 40011}, {"status": 40032}, {"status": 40033}, {"status": 98009}}
	for _, fault := range slow {
		fault["call"] = "ListApps"
	}
	for i, size := range []int{500, 250, 125, 25, 5} {
		if got := turn(slow[i]); got.Page != 1 || got.PerPage != size {
			t.Fatalf("after %v at page 1 it is at page %d of %d entries; want page 1 of %d", slow[i], got.Page, got.PerPage, size)
		}
	}
	exec(t, w, `UPDATE reconciliations SET page = 2, apps_seen = 5`) // as after the first five
	if got := turn(slow[5]); got.Page != 6 || got.PerPage != 1 {
		t.Fatalf("after a failure at page 2 of 5 it is at page %d of %d entries; want page 6 of 1", got.Page, got.PerPage)
	}
	if got := turn(); !got.Done || got.AppsSeen != 8 {
		t.Errorf("after %d apps it is at %+v; want 8 apps", got.AppsSeen, got)
	}
}

// Tokens are of the newest report, and one reconciliation runs at a time.
func TestReconciliationsRefused(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	first, _ := report(t, r)
	second, _ := report(t, r)
	code := func(err error) string {
		e, ok := errors.AsType[*tenant.Error](err)
		if !ok || e.Kind != tenant.Conflict {
			t.Errorf("the error is %v; want a conflict", err)
			return ""
		}
		return e.Code
	}
	if _, err := r.StartRepair(t.Context(), first.Token, admin); code(err) != "reconciliation_token_stale" {
		t.Errorf("a stale token is refused with %v", err)
	}
	if _, err := r.StartRepair(t.Context(), "rec_nonsense", admin); code(err) != "reconciliation_token_unknown" {
		t.Errorf("a foreign token is refused with %v", err)
	}
	repair(t, r, second.Token)
	if _, err := r.StartRepair(t.Context(), second.Token, admin); code(err) != "reconciliation_token_stale" {
		t.Errorf("a token that was used is refused with %v", err)
	}
	w.Faults(map[string]any{"call": "ListApps", "status": 98004})
	running, err := r.StartReport(t.Context(), admin)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.StartReport(t.Context(), admin); code(err) != "reconciliation_running" || !strings.Contains(err.Error(), running.ID.String()) {
		t.Errorf("a second report is refused with %v; want it to name %s", err, running.ID)
	}
}

// A report goes on where it was when its worker died, and takes every page.
func TestReportIsTakenUp(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	signUp(t, r, "user_1")
	marked(t, w)
	w.Faults(map[string]any{"call": "ListKeys", "hang": true})
	began, err := r.StartReport(t.Context(), admin)
	if err != nil {
		t.Fatal(err)
	}
	provisiontest.Eventually(t, "it lists keys", func() bool { return w.State().Calls["ListKeys"] > 0 })
	r.Stop()
	w.Faults()
	lists := w.State().Calls["ListApps"]
	_, found := reconciled(t, w.Start(provisiontest.Options{}), began)
	if len(found) != 0 {
		t.Errorf("found %+v", found)
	}
	if got := w.State().Calls["ListApps"]; got != lists {
		t.Errorf("the apps were listed again, with %d more calls", got-lists)
	}
}

// Of two apps whose markers name the same tenant, the one that the database knows
// stays; the other is for a person to look at, and holds nothing up.
func TestSecondAppOfATenantIsNotAdopted(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	s := &scene{t: t, w: w, r: w.Start(provisiontest.Options{}), holds: map[tenant.ID]tenant.AppID{}}
	crashScenarios["repair: adopt a second app of a tenant"].prepare(s)
	if n, err := s.r.Decide(t.Context(), 0, tenant.FoundAppUnknown, tenant.Adopt, "", admin); err != nil || n != 1 {
		t.Fatalf("decide: %d, %v", n, err)
	}
	conn := pgtest.Conn(t, w.URL)
	provisiontest.Eventually(t, "the repair says that it cannot be", func() bool {
		var failed int
		err := conn.QueryRow(t.Context(), `SELECT count(*) FROM reconciliation_items WHERE state = 'failed' AND strpos(note, $1) > 0`,
			s.holds["user_1"]).Scan(&failed)
		return err == nil && failed == 1
	})
	if got := signUp(t, s.r, "user_1"); got.AppID != s.holds["user_1"] || !keyWorks(t, w, s.r, got) {
		t.Errorf("the tenant's app is %s, or its key does not open it; want %s as before", got.AppID, s.holds["user_1"])
	}
}
