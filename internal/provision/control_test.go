package provision_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// keepingControl runs KeepControl of an idle replica until the test ends.
func keepingControl(t *testing.T, r *provisiontest.Replica) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan error, 1)
	go func() { ended <- r.KeepControl(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// The control record is renewed before unknown keys are checked, and again between two of them: with
// many keys and a slow Clarifai the watch of a copy would end otherwise. All due keys are checked
// without a pause.
func TestControlRecordGoesBeforeUnknownKeys(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(control(provisiontest.Options{Idle: true, Adjust: func(c *provision.Config) { c.SweepEvery = time.Hour }}))
	t.Cleanup(func() { // the next test has the same database
		ctx := context.WithoutCancel(t.Context())
		if _, err := pgtest.Conn(t, w.URL).Exec(ctx, `DROP FUNCTION test_always_due CASCADE`); err != nil {
			t.Error(err)
		}
	})
	exec(t, w, `
		CREATE FUNCTION test_always_due() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.control_due_at = '-infinity'; RETURN NEW; END $$;
		CREATE TRIGGER test_always_due BEFORE UPDATE ON current_incarnation FOR EACH ROW EXECUTE FUNCTION test_always_due()`)
	for i := range 3 {
		beginQuarantine(t, w, r, tenant.NewSecret(fmt.Sprint("unknown-key-", i)))
	}
	keepingControl(t, r)
	if _, err := r.Quarantine(t.Context(), tenant.NewSecret("the-last-unknown-key"), long, admin); !errors.Is(err, tenant.NotFound) {
		t.Errorf("quarantine of the last key: %v; want it not found", err)
	}
	var order []string
	for _, c := range w.Sim.Calls() {
		if c.Call == "MyScopes" || c.Call == "GetApp" {
			order = append(order, c.Call)
		}
	}
	if want := slices.Repeat([]string{"GetApp", "MyScopes"}, 4); len(order) < len(want) || !slices.Equal(order[:len(want)], want) {
		t.Errorf("the order of calls is %v; want %v", order, want)
	}
}

// beginQuarantine records a leaked key without waiting for a worker.
func beginQuarantine(t *testing.T, w *provisiontest.World, r *provisiontest.Replica, secret tenant.Secret) {
	t.Helper()
	if err := r.DB.BeginQuarantine(t.Context(), sealedAs(t, w, uuid.Must(uuid.NewV7()), secret), admin); err != nil {
		t.Fatal(err)
	}
}

func sealedAs(t *testing.T, w *provisiontest.World, id uuid.UUID, secret tenant.Secret) tenant.SealedKey {
	t.Helper()
	ciphertext, err := w.Keys.Seal(id, secret)
	if err != nil {
		t.Fatal(err)
	}
	return tenant.SealedKey{ID: id, Ciphertext: ciphertext, Fingerprint: w.Keys.Fingerprint(secret), Hint: w.Keys.Hint(secret)}
}

// A check of an unknown key that fails in the database is retried with backoff, like any other.
func TestFailedCheckOfUnknownKeyBacksOff(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{Idle: true})
	app, leaked := leakedByHand(t, w, r)
	beginQuarantine(t, w, r, leaked)
	exec(t, w, `ALTER TABLE keys ADD CONSTRAINT none CHECK (end_reason <> 'quarantined') NOT VALID`)
	for attempts := 1; attempts <= 2; attempts++ {
		exec(t, w, `UPDATE quarantines SET next_attempt_at = now()`)
		if err := r.ControlOnce(t.Context()); err == nil {
			t.Fatal("the check does not fail")
		}
		if got, want := column(t, w, `SELECT concat_ws(' ', state, problem->>'code', attempts) FROM quarantines`), fmt.Sprint("checking internal ", attempts); !slices.Equal(got, []string{want}) {
			t.Errorf("the quarantine is %q; want %q", got, want)
		}
	}
	exec(t, w, `ALTER TABLE keys DROP CONSTRAINT none; UPDATE quarantines SET next_attempt_at = now()`)
	if err := r.ControlOnce(t.Context()); err != nil && !errors.Is(err, tenant.NotFound) {
		t.Fatal(err)
	}
	if got := column(t, w, `SELECT state || app_id FROM keys WHERE end_reason = 'quarantined'`); !slices.Equal(got, []string{"revoking" + string(app)}) {
		t.Errorf("the ended keys are %q", got)
	}
}

// leakedByHand signs user_1 up by another replica, and creates a key of the app without a row.
func leakedByHand(t *testing.T, w *provisiontest.World, r *provisiontest.Replica) (tenant.AppID, tenant.Secret) {
	t.Helper()
	working := w.Start(provisiontest.Options{})
	app := signUp(t, working, "user_1").AppID
	rest(t, w)
	working.Stop()
	makeKeyByHand(t, w, app, tenant.KeyMarker{Deployment: r.Deployment.ID, KeyID: strayKey}.String())
	return app, leakedKey(&scene{t: t, w: w})
}

// A leaked key that works, but may not name its app, is not reported as one that needs no revocation.
func TestQuarantineOfKeyThatMayNotNameItsApp(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	app := signUp(t, r, "user_1").AppID
	makeKeyByHand(t, w, app, tenant.KeyMarker{Deployment: r.Deployment.ID, KeyID: strayKey}.String())
	leaked := leakedKey(&scene{t: t, w: w})
	lacking := map[string]any{"call": "MyScopes", "status": 11007}
	w.Faults(lacking)
	quarantine := func() *tenant.Error {
		t.Helper()
		_, err := r.Quarantine(t.Context(), leaked, 0, admin)
		e, ok := errors.AsType[*tenant.Error](err)
		if !ok {
			t.Fatalf("the quarantine of a key that may not name its app ends with %v", err)
		}
		return e
	}
	provisiontest.Eventually(t, "the response says what to do", func() bool {
		e := quarantine()
		if e.Kind != tenant.Unavailable || e.Code != "quarantine_pending" {
			t.Fatalf("the quarantine ends with %+v", e)
		}
		return strings.Contains(e.Detail, "revoke it in Clarifai")
	})
	if got := column(t, w, `SELECT state || ' ' || (problem->>'code') FROM quarantines`); !slices.Equal(got, []string{"checking key_app_unknown"}) {
		t.Errorf("the quarantine is %q", got)
	}
	// A key that is not the operator's is nothing that Tenantry could revoke.
	w.Faults(lacking, map[string]any{"call": "GetKey", "status": 11101})
	provisiontest.Eventually(t, "a foreign key is refused", func() bool { return quarantine().Kind == tenant.NotFound })
	w.Faults()
	if q, err := r.Quarantine(t.Context(), leaked, long, admin); err != nil || q.TenantID != "user_1" || q.Key.State != tenant.KeyRevoked {
		t.Errorf("once the key names its app: %+v, %v", q, err)
	}
}

// If an unknown key gets a row during its quarantine, the row is ended, too, and the tenant gets a
// successor of the key.
func TestQuarantinedKeyGetsRow(t *testing.T) {
	t.Parallel()
	const adopted = `
		WITH ended AS (UPDATE keys SET state = 'revoked', revoked_at = now(), ciphertext = NULL WHERE state = 'active' RETURNING app_id, name, scopes, ciphertext)
		INSERT INTO keys (id, app_id, name, scopes, state, ciphertext, fingerprint, hint, activated_at)
		SELECT $1, app_id, name, scopes, 'active', $2, $3, $4, now() FROM ended`
	const inDoubt = `
		WITH ended AS (UPDATE keys SET state = 'revoked', revoked_at = now(), ciphertext = NULL WHERE state = 'active' RETURNING app_id, name, scopes)
		INSERT INTO keys (id, app_id, name, scopes, state, in_doubt_since) SELECT $1, app_id, name, scopes, 'creating', now() FROM ended`
	for name, c := range map[string]struct {
		id      uuid.UUID
		doubted bool
	}{
		"adopted with its id": {strayKey, false}, "adopted with another id": {uuid.Must(uuid.NewV7()), false}, "in doubt": {strayKey, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := provisiontest.New(t)
			r := w.Start(provisiontest.Options{Idle: true})
			app, leaked := leakedByHand(t, w, r)
			beginQuarantine(t, w, r, leaked)
			if c.doubted {
				exec(t, w, inDoubt, c.id)
			} else {
				k := sealedAs(t, w, c.id, leaked)
				exec(t, w, adopted, k.ID, k.Ciphertext, k.Fingerprint, k.Hint)
			}
			working := w.Start(provisiontest.Options{})
			rest(t, w)
			if keyOpens(t, w, leaked, app) {
				t.Error("the quarantine is done, and the key works")
			}
			if got := column(t, w, `SELECT state || ' ' || end_reason FROM keys WHERE id = $1`, c.id); !slices.Equal(got, []string{"revoked quarantined"}) {
				t.Errorf("the row of the key is %q", got)
			}
			if key, secret := keyOf(t, working, "user_1"); key.State != tenant.KeyActive || !keyOpens(t, w, secret, app) {
				t.Errorf("the successor is %+v", key)
			}
		})
	}
}

// A quarantine whose key gets a row at the last moment is not done.
func TestQuarantineIsNotDoneWithoutRevocation(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{Idle: true})
	app, leaked := leakedByHand(t, w, r)
	beginQuarantine(t, w, r, leaked)
	k, err := r.DB.LeaseQuarantine(t.Context(), long)
	if err != nil {
		t.Fatal(err)
	}
	found := tenant.AdoptedKey{SealedKey: sealedAs(t, w, strayKey, leaked), Scopes: []string{"All"}}
	exec(t, w, `INSERT INTO keys (id, app_id, name, scopes, state, ciphertext, fingerprint, hint, activated_at) VALUES ($1, $2, 'adopted', '{All}', 'active', $3, $4, $5, now())`,
		found.ID, app, found.Ciphertext, found.Fingerprint, found.Hint)
	if err := r.DB.EndQuarantine(t.Context(), k, found, app, nil); err == nil {
		t.Error("the quarantine is done, and the key is active")
	}
	if got := column(t, w, `SELECT state FROM quarantines`); !slices.Equal(got, []string{"checking"}) {
		t.Errorf("the quarantine is %q", got)
	}
}

// controlNow takes a turn at the control record, and returns recovery mode afterwards.
func controlNow(t *testing.T, w *provisiontest.World, r *provisiontest.Replica, faults ...map[string]any) tenant.Recovery {
	t.Helper()
	w.Faults(faults...)
	exec(t, w, `
		UPDATE upstream_budget SET paused_until = now(), probe_until = 'epoch', pauses = 0;
		UPDATE current_incarnation SET control_due_at = '-infinity', written_by = pg_current_xact_id()::xid`)
	if err := r.ControlOnce(t.Context()); err == nil != (len(faults) == 0) && !errors.Is(err, tenant.NotFound) {
		t.Fatalf("a turn with the faults %v: %v", faults, err)
	}
	is, err := r.DB.Recovery(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return is
}

func problemCode(p *tenant.Problem) string {
	if p == nil {
		return ""
	}
	return p.Code
}

// A control record that cannot be read is a problem for everyone to see, until it is read.
func TestUnreadableControlRecord(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(control(provisiontest.Options{Idle: true}))
	if is := controlNow(t, w, r); is.ControlSeenAt.IsZero() || is.ControlProblem != nil {
		t.Fatalf("after the first turn: %+v", is)
	}
	for _, state := range []tenant.RecoveryState{tenant.NotRecovering, tenant.Recovering, tenant.Watching, tenant.Stopped} {
		exec(t, w, provisiontest.SetRecovery(state))
		forbidden := controlNow(t, w, r, map[string]any{"call": "GetApp", "status": 11007}).ControlProblem
		if problemCode(forbidden) != "upstream_forbidden" {
			t.Errorf("%q: a read that is forbidden is recorded as %+v", state, forbidden)
			continue
		}
		if again := controlNow(t, w, r, map[string]any{"call": "GetApp", "status": 11007}).ControlProblem; again == nil || !again.Since.Equal(forbidden.Since) {
			t.Errorf("%q: the same problem again is %+v; want it since %s", state, again, forbidden.Since)
		}
		if down := controlNow(t, w, r, map[string]any{"call": "GetApp", "http": 503}).ControlProblem; problemCode(down) != "upstream_unavailable" {
			t.Errorf("%q: a read that fails is recorded as %+v", state, down)
		}
		is := controlNow(t, w, r)
		if is.ControlProblem != nil || is.State != state {
			t.Errorf("%q: after a read the state is %q with the problem %+v", state, is.State, is.ControlProblem)
		}
	}
	// Upstream work may be paused because of other calls.
	w.Faults()
	exec(t, w, `UPDATE upstream_budget SET paused_until = now() + interval '1 hour', pauses = 1;
		UPDATE current_incarnation SET control_due_at = '-infinity', written_by = pg_current_xact_id()::xid`)
	_ = r.ControlOnce(t.Context())
	if is, err := r.DB.Recovery(t.Context()); err != nil || problemCode(is.ControlProblem) != "upstream_paused" {
		t.Errorf("while upstream work is paused the problem is %+v, %v", is.ControlProblem, err)
	}
}

// The first build waits for the control record, unless the record can only be created after somebody
// has acted.
func TestFirstControlRecord(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		fault map[string]any
		code  string
	}{
		"read, down":       {map[string]any{"call": "GetApp", "http": 503}, ""},
		"read, throttled":  {map[string]any{"call": "GetApp", "status": 11005}, ""},
		"read, forbidden":  {map[string]any{"call": "GetApp", "status": 11007}, "upstream_forbidden"},
		"read, refused":    {map[string]any{"call": "GetApp", "status": 11100}, "upstream_refused"},
		"write, down":      {map[string]any{"call": "PostApps", "http": 503}, ""},
		"write, throttled": {map[string]any{"call": "PostApps", "status": 11005}, ""},
		"write, quota":     {map[string]any{"call": "PostApps", "status": 11006}, "upstream_quota"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := provisiontest.New(t)
			r := w.Start(control(provisiontest.Options{Idle: true}))
			if is := controlNow(t, w, r, c.fault); problemCode(is.ControlProblem) != c.code || !is.ControlSeenAt.IsZero() {
				t.Errorf("the problem is %+v, and the record was seen at %s; want the problem %q", is.ControlProblem, is.ControlSeenAt, c.code)
			}
			if is := controlNow(t, w, r); is.ControlProblem != nil || is.ControlSeenAt.IsZero() {
				t.Errorf("after the fault the problem is %+v, and the record was seen at %s", is.ControlProblem, is.ControlSeenAt)
			}
		})
	}
}

// An app of another deployment with the id of the control record is a problem that a person must
// solve. Sign-ups continue.
func TestControlRecordOfAnotherDeployment(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	id := tenant.ControlID("t", w.Keys.DeploymentID(provisiontest.Operator))
	w.AppByHand(provisiontest.PAT, id, map[string]any{"tenantry": map[string]any{"deployment": "another", "app": id}})
	r := w.Start(control(provisiontest.Options{}))
	signUp(t, r, "user_1")
	is, err := r.DB.Recovery(t.Context())
	if err != nil || problemCode(is.ControlProblem) != "control_record_taken" || !strings.Contains(is.ControlProblem.Detail, "another app prefix") {
		t.Errorf("the problem is %+v, %v", is.ControlProblem, err)
	}
}

// A first build that was not begun before the control record existed is due as soon as it exists.
func TestFirstBuildsGoOn(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(control(provisiontest.Options{Idle: true}))
	if _, _, err := r.SignUp(t.Context(), "user_1", tenant.SignUp{}, 0, caller); err != nil {
		t.Fatal(err)
	}
	r.WorkApp(t.Context(), tenant.AppID(column(t, w, `SELECT id FROM apps`)[0]))
	if n := w.State().Calls["PostApps"]; n != 0 {
		t.Fatalf("%d apps were made before the control record", n)
	}
	turn, err := r.DB.LeaseControl(t.Context(), true)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.DB.ControlWritten(t.Context(), turn, nil); err != nil {
		t.Fatal(err)
	}
	if due, err := r.DB.DueWork(t.Context(), tenant.AppWork, [tenant.Priorities]int{1, 1, 1, 1}); err != nil || len(due) != 1 {
		t.Errorf("due is %v, %v; want the build", due, err)
	}
}
