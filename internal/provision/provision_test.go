package provision_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

func TestMain(m *testing.M) {
	if os.Getenv(dieAtVar) != "" { // a process that is to die has its database from who started it
		os.Exit(m.Run())
	}
	pgtest.Main(m)
}

var caller = tenant.Actor{Name: "caller:test", RequestID: "req-1"}

const long = 30 * time.Second // a wait that only a defect lasts out

// signUp signs a tenant up and waits until it is active.
func signUp(t *testing.T, r *provisiontest.Replica, id tenant.ID) tenant.Tenant {
	t.Helper()
	got, _, err := r.SignUp(t.Context(), id, tenant.SignUp{}, long, caller)
	if err != nil {
		t.Fatalf("sign up %s: %v", id, err)
	}
	if got.State != tenant.Active {
		t.Fatalf("tenant %s is %s after %s, problem %+v", id, got.State, long, got.Problem)
	}
	return got
}

// keyWorks reports whether the tenant's revealed key opens the tenant's app at
// Clarifai.
func keyWorks(t *testing.T, w *provisiontest.World, r *provisiontest.Replica, got tenant.Tenant) bool {
	t.Helper()
	_, secret, err := r.Reveal(t.Context(), got.ID, tenant.DefaultKey, caller)
	if err != nil {
		t.Fatalf("reveal the key of %s: %v", got.ID, err)
	}
	return keyOpens(t, w, secret, got.AppID)
}

func keyOpens(t *testing.T, w *provisiontest.World, secret tenant.Secret, app tenant.AppID) bool {
	t.Helper()
	url := fmt.Sprintf("%s/v2/users/me/apps/%s/inputs", w.Clarifai, app) // its owner may be another
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url,
		bytes.NewReader([]byte(`{"inputs":[{"data":{"text":{"raw":"hello"}}}]}`)))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Key "+secret.Reveal())
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	return resp.StatusCode == http.StatusOK
}

func TestSignUp(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	name := "Ada"
	up := tenant.SignUp{DisplayName: &name, Labels: map[string]string{"plan": "pro"}}
	got, created, err := r.SignUp(t.Context(), "user_42", up, long, caller)
	if err != nil || !created {
		t.Fatalf("SignUp = %+v, %v, %v; want a new tenant", got, created, err)
	}
	if got.State != tenant.Active || got.AppID == "" || got.Generation != 1 || got.DisplayName != "Ada" || got.Labels["plan"] != "pro" {
		t.Errorf("the tenant is %+v", got)
	}
	if !keyWorks(t, w, r, got) {
		t.Error("the tenant's key does not open its app")
	}

	again, created, err := r.SignUp(t.Context(), "user_42", up, long, caller)
	if err != nil || created || again.AppID != got.AppID {
		t.Errorf("the same sign-up again = %+v, %v, %v; want the same tenant", again, created, err)
	}
	other := signUp(t, r, "user_43")
	if other.AppID == got.AppID {
		t.Error("two tenants share an app")
	}
	_, secret, err := r.Reveal(t.Context(), "user_43", tenant.DefaultKey, caller)
	if err != nil {
		t.Fatal(err)
	}
	if keyOpens(t, w, secret, got.AppID) {
		t.Error("one tenant's key opens the other's app")
	}
	if s := w.State(); s.Apps != 2 || s.Calls["PostApps"] != 2 || s.Calls["PostKeys"] != 2 {
		t.Errorf("the simulator holds %+v; want two apps, each made with two calls", s)
	}
}

func TestSignUpRefuses(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	signUp(t, r, "user_42")
	bob, nowhere, narrow := "Bob", "nowhere", "narrow"
	for _, c := range []struct {
		up   tenant.SignUp
		kind tenant.Kind
		says string
	}{
		{tenant.SignUp{Profile: &nowhere}, tenant.Invalid, "there are: default, narrow"},
		{tenant.SignUp{Labels: map[string]string{"": ""}}, tenant.Invalid, "labels"},
		{tenant.SignUp{DisplayName: &bob}, tenant.Conflict, "another display_name"},
		{tenant.SignUp{DisplayName: &bob, Profile: &narrow}, tenant.Conflict, "another profile and display_name"},
	} {
		_, _, err := r.SignUp(t.Context(), "user_42", c.up, 0, caller)
		if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("SignUp(%+v) fails with %v; want %s that says %q", c.up, err, c.kind, c.says)
		}
	}
	if s := w.State(); s.Apps != 1 {
		t.Errorf("refused sign-ups left %d apps; want 1", s.Apps)
	}
}

// A hundred sign-ups of one tenant at once, at two replicas, are one tenant, one
// app and one key, and every answer says the same.
func TestSignUpOfOneTenantAtOnce(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	replicas := []*provisiontest.Replica{w.Start(provisiontest.Options{}), w.Start(provisiontest.Options{})}
	var wg sync.WaitGroup
	apps := make(chan tenant.AppID, 100)
	made := make(chan bool, 100)
	for i := range 100 {
		wg.Go(func() {
			got, created, err := replicas[i%2].SignUp(t.Context(), "user_42", tenant.SignUp{}, long, caller)
			if err != nil || got.State != tenant.Active {
				t.Errorf("sign-up %d = %+v, %v", i, got, err)
			}
			apps <- got.AppID
			made <- created
		})
	}
	wg.Wait()
	close(apps)
	close(made)
	distinct := map[tenant.AppID]bool{}
	for a := range apps {
		distinct[a] = true
	}
	created := 0
	for m := range made {
		if m {
			created++
		}
	}
	if len(distinct) != 1 || created != 1 {
		t.Errorf("answers name %d apps and %d of them made the tenant; want 1 and 1", len(distinct), created)
	}
	if s := w.State(); s.Apps != 1 || len(w.AppKeys()) != 1 {
		t.Errorf("the simulator holds %d apps and %d keys; want 1 and 1", s.Apps, len(w.AppKeys()))
	}
}

// A request that waits at one replica is woken by the work of another.
func TestWokenByAnotherReplica(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	// It does not look by itself.
	idle := w.Start(provisiontest.Options{Idle: true, Adjust: func(c *provision.Config) { c.LookAgain = time.Hour }})
	done := make(chan tenant.Tenant, 1)
	go func() {
		got, _, err := idle.SignUp(t.Context(), "user_42", tenant.SignUp{}, time.Hour, caller)
		if err != nil {
			t.Error(err)
		}
		done <- got
	}()
	provisiontest.Eventually(t, "the sign-up is written", func() bool {
		_, err := idle.DB.Tenant(t.Context(), "user_42")
		return err == nil
	})
	w.Start(provisiontest.Options{})
	provisiontest.Eventually(t, "the request is woken", func() bool { return len(done) > 0 })
	if got := <-done; got.State != tenant.Active {
		t.Errorf("the tenant is %s", got.State)
	}
}

// The caller may go away: the build goes on.
func TestCallerGoesAway(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	w.Faults(map[string]any{"call": "PostApps", "count": 1, "delay_ms": 200})
	r := w.Start(provisiontest.Options{})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		provisiontest.Eventually(t, "the app is being made", func() bool { return w.State().Calls["PostApps"] > 0 })
		cancel()
	}()
	if _, _, err := r.SignUp(ctx, "user_42", tenant.SignUp{}, long, caller); !errors.Is(err, context.Canceled) {
		t.Errorf("SignUp of a caller that went away fails with %v", err)
	}
	signUp(t, r, "user_42")
	if s := w.State(); s.Apps != 1 {
		t.Errorf("the simulator holds %d apps; want 1", s.Apps)
	}
}

// Whatever happens to one call of a build, the tenant ends up with one app and
// one key that works, and nothing else is left upstream. TestLostAnswers has the
// calls that are carried out and whose answer does not come.
func TestBuildSurvivesFaults(t *testing.T) {
	t.Parallel()
	faults := map[string]map[string]any{
		"lost request":        {"drop_before": true},
		"proxy page":          {"http": 502},
		"hang":                {"hang": true},
		"throttled":           {"status": 11005},
		"try again":           {"status": 10030},
		"try again, done":     {"status": 10030, "after": true},
		"internal":            {"status": 98004},
		"internal, done":      {"status": 98004, "after": true},
		"maintenance":         {"status": 39997},
		"mixed":               {"status": 10010},
		"mixed, done":         {"status": 10010, "after": true},
		"quota":               {"status": 11006},
		"refused PAT":         {"status": 11008},
		"bad request":         {"status": 11102},
		"account":             {"status": 11000},
		"insufficient scopes": {"status": 11007},
		"gone":                {"status": 11101},
		"moved":               {"status": 10050},
		"unknown code":        {"status": 12345},
	}
	for name, fault := range faults {
		for _, call := range []string{"PostApps", "PostKeys"} {
			for _, masked := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/%s/masked=%v", call, name, masked), func(t *testing.T) {
					t.Parallel()
					w := provisiontest.New(t)
					w.Settings(map[string]any{"masked_keys": masked})
					rule := map[string]any{"call": call, "count": 2}
					for k, v := range fault {
						rule[k] = v
					}
					w.Faults(rule)
					r := w.Start(provisiontest.Options{})
					got := signUp(t, r, "user_42")
					if !keyWorks(t, w, r, got) {
						t.Error("the tenant's key does not open its app")
					}
					settled(t, w, r, got)
				})
			}
		}
	}
}

// settled waits until nothing is in the works, and checks that the tenant's app
// and key are all there is upstream.
func settled(t *testing.T, w *provisiontest.World, r *provisiontest.Replica, got tenant.Tenant) {
	t.Helper()
	conn := pgtest.Conn(t, w.URL)
	provisiontest.Eventually(t, "every row is settled", func() bool {
		var open int
		err := conn.QueryRow(t.Context(), `
			SELECT (SELECT count(*) FROM apps WHERE state IN ('building', 'purging'))
				+ (SELECT count(*) FROM keys WHERE state IN ('creating', 'revoking'))`).Scan(&open)
		return err == nil && open == 0
	})
	keys := w.AppKeys()
	if s := w.State(); s.Apps != 1 || len(keys) != 1 || tenant.AppID(keys[0].AppID) != got.AppID {
		t.Errorf("upstream has %d apps and the keys %+v; want the tenant's app %s and its one key", s.Apps, keys, got.AppID)
	}
	var lost int
	if err := conn.QueryRow(t.Context(), `SELECT count(*) FROM keys WHERE state = 'lost'`).Scan(&lost); err != nil || lost != 0 {
		t.Errorf("%d keys are lost, %v; want none", lost, err)
	}
}

// Quota: the tenant shows why it waits, and gets its app without anyone's help
// once the quota is raised.
func TestQuota(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	w.Settings(map[string]any{"app_quota": 1})
	r := w.Start(provisiontest.Options{})
	signUp(t, r, "user_1")
	if got, _, err := r.SignUp(t.Context(), "user_2", tenant.SignUp{}, 0, caller); err != nil || got.State != tenant.Provisioning {
		t.Fatalf("SignUp = %+v, %v; want it under way", got, err)
	}
	provisiontest.Eventually(t, "the problem shows", func() bool {
		got, err := r.DB.Tenant(t.Context(), "user_2")
		return err == nil && got.Problem != nil && got.Problem.Code == "upstream_quota" &&
			got.Problem.UpstreamCode == 11006 && got.Problem.UpstreamRequestID != "" && !got.Problem.NextAttemptAt.IsZero()
	})
	problem := true
	listed, err := r.DB.Tenants(t.Context(), postgres.TenantFilter{HasProblem: &problem}, postgres.Position{}, 10)
	if err != nil || len(listed) != 1 || listed[0].ID != "user_2" {
		t.Errorf("tenants with a problem = %+v, %v; want user_2", listed, err)
	}
	w.Settings(map[string]any{"app_quota": 0})
	if got := signUp(t, r, "user_2"); got.Problem != nil {
		t.Errorf("the active tenant has the problem %+v", got.Problem)
	}
}

// A refused PAT holds up builds and nothing else.
func TestPATRefused(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	first := signUp(t, r, "user_1")
	w.Faults(map[string]any{"call": "*", "status": 11008})
	if _, _, err := r.SignUp(t.Context(), "user_2", tenant.SignUp{}, 0, caller); err != nil {
		t.Fatal(err)
	}
	provisiontest.Eventually(t, "the problem shows", func() bool {
		got, err := r.DB.Tenant(t.Context(), "user_2")
		return err == nil && got.Problem != nil && got.Problem.Code == "upstream_pat_refused" && r.PAT.Health().State == provision.PATRefused
	})
	if _, _, err := r.Reveal(t.Context(), first.ID, tenant.DefaultKey, caller); err != nil {
		t.Errorf("a key cannot be read meanwhile: %v", err)
	}
	if n := r.Logs.FilterMessage("Clarifai answers again; upstream work goes on").Len(); n != 0 {
		t.Errorf("while the PAT was rejected it was logged %d times that upstream work goes on", n)
	}
	w.Faults()
	signUp(t, r, "user_2")
	if got := r.PAT.Health().State; got != provision.PATWorks {
		t.Errorf("the PAT is %s; want ok", got)
	}
}

func TestClarifaiDown(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	w.Faults(map[string]any{"call": "*", "drop_before": true})
	got, created, err := r.SignUp(t.Context(), "user_1", tenant.SignUp{}, 0, caller)
	if err != nil || !created || got.State != tenant.Provisioning {
		t.Fatalf("SignUp while Clarifai is down = %+v, %v, %v; want it under way", got, created, err)
	}
	provisiontest.Eventually(t, "the problem shows", func() bool {
		got, err := r.DB.Tenant(t.Context(), "user_1")
		return err == nil && got.Problem != nil && got.Problem.Code == "upstream_unavailable"
	})
	w.Faults()
	settled(t, w, r, signUp(t, r, "user_1"))
}

// A job that was lost with its process is found by the sweep, and so is the
// lease of a worker that died.
func TestWorkOfADeadReplicaIsTakenUp(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	idle := w.Start(provisiontest.Options{Idle: true})
	if _, _, err := idle.SignUp(t.Context(), "user_1", tenant.SignUp{}, 0, caller); err != nil {
		t.Fatal(err)
	}
	conn := pgtest.Conn(t, w.URL)
	var app tenant.AppID
	if err := conn.QueryRow(t.Context(), `SELECT id FROM apps`).Scan(&app); err != nil {
		t.Fatal(err)
	}
	if _, err := idle.DB.LeaseApps(t.Context(), []tenant.AppID{app}, 200*time.Millisecond); err != nil {
		t.Fatalf("lease as the worker that dies: %v", err)
	}
	r := w.Start(provisiontest.Options{})
	got := signUp(t, r, "user_1")
	if got.AppID != app {
		t.Errorf("the tenant got %s; want the app %s that the dead worker had begun", got.AppID, app)
	}
}

// An id that is taken by an app of somebody else's is left alone, and the tenant
// gets another.
func TestForeignAppIsLeftAlone(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	idle := w.Start(provisiontest.Options{Idle: true})
	if _, _, err := idle.SignUp(t.Context(), "user_1", tenant.SignUp{}, 0, caller); err != nil {
		t.Fatal(err)
	}
	var app string
	if err := connOf(t, w).QueryRow(t.Context(), `SELECT id FROM apps`).Scan(&app); err != nil {
		t.Fatal(err)
	}
	makeForeignApp(t, w, app)
	r := w.Start(provisiontest.Options{})
	// Looked up and not signed up again, which may begin a build beside the one that follows.
	got, err := r.Tenant(t.Context(), "user_1", wait)
	stateOf(t, got, err, tenant.Active)
	if string(got.AppID) == app {
		t.Fatalf("the tenant got the foreign app %s", app)
	}
	if s := w.State(); s.Apps != 2 || s.Calls["DeleteApp"] != 0 {
		t.Errorf("the simulator holds %d apps after %d removals; want the foreign app and the tenant's", s.Apps, s.Calls["DeleteApp"])
	}
}

func makeForeignApp(t *testing.T, w *provisiontest.World, id string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost,
		fmt.Sprintf("%s/v2/users/%s/apps", w.Clarifai, provisiontest.Operator), strings.NewReader(`{"apps":[{"id":"`+id+`"}]}`))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Key "+provisiontest.PAT)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("make a foreign app: %s", resp.Status)
	}
}

func TestIdentify(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	got := signUp(t, r, "user_1")
	_, secret, err := r.Reveal(t.Context(), got.ID, tenant.DefaultKey, caller)
	if err != nil {
		t.Fatal(err)
	}
	found, err := r.Identify(t.Context(), secret, tenant.Suspect{}, caller)
	if err != nil || found.TenantID != "user_1" || found.Keys[0].AppID != got.AppID || found.Keys[0].Name != tenant.DefaultKey {
		t.Errorf("Identify = %+v, %v; want the default key of user_1", found, err)
	}
	if _, err := r.Identify(t.Context(), tenant.NewSecret("no such key"), tenant.Suspect{}, caller); !errors.Is(err, tenant.NotFound) {
		t.Errorf("Identify of a foreign string fails with %v; want NotFound", err)
	}
}

// Waiting tenants are served oldest first. One worker serves one after the other;
// of several that serve at the same moment it cannot be said who was first.
func TestOldestWaiterFirst(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	idle := w.Start(provisiontest.Options{Idle: true})
	for i := range 10 {
		if _, _, err := idle.SignUp(t.Context(), tenant.ID(fmt.Sprint("user_", i)), tenant.SignUp{}, 0, caller); err != nil {
			t.Fatal(err)
		}
	}
	r := w.Start(provisiontest.Options{Workers: 1})
	signUp(t, r, "user_9")
	rows, err := connOf(t, w).Query(t.Context(), `SELECT tenant_id FROM audit_events WHERE action = 'tenant.activated' ORDER BY id`)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	for i := 0; rows.Next(); i++ {
		var id string
		if err := rows.Scan(&id); err != nil {
			t.Fatal(err)
		}
		if want := fmt.Sprint("user_", i); id != want {
			t.Errorf("served as number %d: %s; want %s", i, id, want)
		}
	}
}

// Where Postgres fails a worker and can still be written to, whoever waits is told,
// and what was begun goes on once Postgres does its part again.
func TestFaultShows(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	conn := pgtest.Conn(t, w.URL)
	exec := func(sql string, args ...any) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), sql, args...); err != nil {
			t.Fatal(err)
		}
	}
	isInternal := func(p *tenant.Problem) bool {
		return p != nil && p.Code == "internal" && !p.NextAttemptAt.IsZero()
	}

	exec(`ALTER TABLE keys ADD CONSTRAINT none_active CHECK (state <> 'active') NOT VALID`)
	if _, _, err := r.SignUp(t.Context(), "user_1", tenant.SignUp{}, 0, caller); err != nil {
		t.Fatal(err)
	}
	provisiontest.Eventually(t, "the tenant shows the fault", func() bool {
		got, err := r.DB.Tenant(t.Context(), "user_1")
		return err == nil && isInternal(got.Problem)
	})
	exec(`ALTER TABLE keys DROP CONSTRAINT none_active`)
	got := signUp(t, r, "user_1")
	settled(t, w, r, got)

	exec(`ALTER TABLE reconciliation_apps ADD CONSTRAINT none CHECK (false) NOT VALID`)
	began, err := r.StartReport(t.Context(), admin)
	if err != nil {
		t.Fatal(err)
	}
	provisiontest.Eventually(t, "the report shows the fault", func() bool {
		got, err := r.DB.Reconciliation(t.Context(), began.ID)
		return err == nil && isInternal(got.Problem)
	})
	exec(`ALTER TABLE reconciliation_apps DROP CONSTRAINT none`)
	if done, found := reconciled(t, r, began); done.Problem != nil || len(found) != 0 {
		t.Errorf("the report ended with %+v, %+v", done, found)
	}

	exec(`ALTER TABLE keys ADD CONSTRAINT none_revoked CHECK (state <> 'revoked') NOT VALID`)
	exec(`UPDATE keys SET state = 'revoking' WHERE app_id = $1`, got.AppID)
	var problem *tenant.Problem
	provisiontest.Eventually(t, "the key shows the fault", func() bool {
		err := conn.QueryRow(t.Context(), `SELECT problem FROM keys WHERE app_id = $1`, got.AppID).Scan(&problem)
		return err == nil && isInternal(problem)
	})
	exec(`ALTER TABLE keys DROP CONSTRAINT none_revoked`)
	provisiontest.Eventually(t, "the key is revoked", func() bool {
		var state string
		err := conn.QueryRow(t.Context(), `SELECT state FROM keys WHERE app_id = $1`, got.AppID).Scan(&state)
		return err == nil && state == "revoked"
	})
}
