package postgres_test

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/tenant"
)

var (
	actor   = tenant.Actor{Name: "caller:test", RequestID: "req-1"}
	profile = tenant.Profile{Name: "default", BaseWorkflow: "Empty", KeyScopes: []string{"All"}}
	limits  = tenant.BuildLimits{Waiting: 64, Pool: 8, Import: 14, SharedImport: 14}
)

func newTenant(id tenant.ID) tenant.NewTenant {
	return tenant.NewTenant{ID: id, Profile: profile, Attributes: tenant.Attributes{Labels: map[string]string{}},
		BuildID: tenant.AppID("t-" + uuid.NewString()[:20]), Limits: limits}
}

// readyApps puts apps that wait for a tenant.
func readyApps(t *testing.T, conn *pgx.Conn, n int) {
	t.Helper()
	_, err := conn.Exec(t.Context(), `
		INSERT INTO apps (id, profile, profile_revision, state, made_at, ready_at)
		SELECT 'ready-' || lpad(i::text, 4, '0'), 'default', 'x', 'ready', now(), now() + i * interval '1 microsecond'
		FROM generate_series(1, $1) i`, n)
	if err != nil {
		t.Fatal(err)
	}
}

func count(t *testing.T, conn *pgx.Conn, sql string, args ...any) int {
	t.Helper()
	var n int
	if err := conn.QueryRow(t.Context(), `SELECT count(*) FROM `+sql, args...).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

// What must never be is refused by the schema itself.
func TestSchemaRefuses(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	conn := pgtest.Conn(t, url)
	if _, err := conn.Exec(t.Context(), `
		INSERT INTO apps (id, profile, profile_revision, state, made_at, ready_at, tenant_id, tenant_generation)
		VALUES ('a1', 'default', 'x', 'held', now(), now(), 'u1', 1), ('a2', 'default', 'x', 'ready', now(), now(), NULL, NULL);
		INSERT INTO tenants (id, profile, state, app_id, attributes_hash) VALUES ('u1', 'default', 'active', 'a1', repeat('x', 64)::bytea);
		INSERT INTO keys (id, app_id, name, state, scopes, ciphertext, fingerprint, activated_at)
		VALUES (gen_random_uuid(), 'a1', 'default', 'active', '{All}', 'c', 'f', now());
		INSERT INTO audit_events (actor, action) VALUES ('a', 'b')`); err != nil {
		t.Fatal(err)
	}
	for constraint, sql := range map[string]string{
		"apps_one_held_a_tenant":       `UPDATE apps SET state = 'held', tenant_id = 'u1', tenant_generation = 1 WHERE id = 'a2'`,
		"apps_tenant_fixed":            `UPDATE apps SET tenant_id = 'u2' WHERE id = 'a1'`,
		"apps_never_deleted":           `DELETE FROM apps WHERE id = 'a2'`,
		"apps_id_fixed":                `UPDATE apps SET id = 'a3' WHERE id = 'a2'`,
		"apps_tenant_by_state":         `UPDATE apps SET state = 'ready' WHERE id = 'a1'`,
		"apps_tenant_whole":            `UPDATE apps SET tenant_id = 'u3', state = 'purging' WHERE id = 'a2'`,
		"apps_state":                   `UPDATE apps SET state = 'elsewhere' WHERE id = 'a2'`,
		"apps_made_at":                 `INSERT INTO apps (id, profile, profile_revision, state, ready_at) VALUES ('a4', 'p', 'x', 'ready', now())`,
		"apps_ready_at":                `INSERT INTO apps (id, profile, profile_revision, state, made_at) VALUES ('a4', 'p', 'x', 'ready', now())`,
		"tenants_app_by_state":         `UPDATE tenants SET app_id = NULL WHERE id = 'u1'`,
		"tenants_app_is_theirs":        `UPDATE tenants SET app_id = 'a2' WHERE id = 'u1'`,
		"tenants_attributes_hash":      `UPDATE tenants SET attributes_hash = 'x' WHERE id = 'u1'`,
		"keys_secret_by_state":         `UPDATE keys SET state = 'revoked', revoked_at = now()`,
		"keys_revoked_at":              `UPDATE keys SET state = 'revoked', ciphertext = NULL`,
		"keys_fingerprint_with_secret": `UPDATE keys SET fingerprint = NULL`,
		"keys_one_active_a_name": `INSERT INTO keys (id, app_id, name, state, scopes, ciphertext, fingerprint, activated_at)
			VALUES (gen_random_uuid(), 'a1', 'default', 'active', '{All}', 'c', 'g', now())`,
		"keys_fingerprint": `INSERT INTO keys (id, app_id, name, state, scopes, ciphertext, fingerprint, activated_at)
			VALUES (gen_random_uuid(), 'a1', 'other', 'active', '{All}', 'c', 'f', now())`,
		"audit_events_append_only": `UPDATE audit_events SET actor = 'c'`,
		"callers_role":             `INSERT INTO callers (token_id, name, role, secret_sha256) VALUES ('t', 'n', 'king', repeat('x', 32)::bytea)`,
	} {
		_, err := conn.Exec(t.Context(), sql)
		pg, ok := errors.AsType[*pgconn.PgError](err)
		if !ok || pg.ConstraintName != constraint {
			t.Errorf("%s\nfails with %v; want constraint %s", sql, err, constraint)
		}
	}
	for _, sql := range []string{`DELETE FROM audit_events`, `TRUNCATE audit_events`, `TRUNCATE audit_events_other`} {
		if _, err := conn.Exec(t.Context(), sql); err == nil {
			t.Errorf("%s is carried out", sql)
		}
	}
}

// Sign-ups at once, of many tenants and of one, never give an app twice and
// leave no app unused while a tenant waits; also where they share statements, since
// there is a pool.
func TestSignUpsAtOnce(t *testing.T) {
	t.Run("with a pool", func(t *testing.T) { testSignUpsAtOnce(t, 10) })
	t.Run("without a pool", func(t *testing.T) { testSignUpsAtOnce(t, 0) })
}

func testSignUpsAtOnce(t *testing.T, poolMax int) {
	t.Parallel()
	url := pgtest.URL(t)
	conn := pgtest.Conn(t, url)
	readyApps(t, conn, 50)
	if poolMax > 0 {
		if _, err := conn.Exec(t.Context(), `
			INSERT INTO pools (profile, revision, target, planned_at, sign_ups, hits, misses) VALUES ('default', 'x', 10, now(), 0, 0, 0);
			INSERT INTO keys (id, app_id, name, state, scopes, ciphertext, fingerprint, activated_at)
			SELECT gen_random_uuid(), id, 'default', 'active', '{All}', '\x01aabbccdd', id::bytea, now() FROM apps`); err != nil {
			t.Fatal(err)
		}
	}
	dbs := []*postgres.DB{pgtest.OpenURL(t, url), pgtest.OpenURL(t, url)}
	var made atomic.Int32
	var wg sync.WaitGroup
	for i := range 200 { // 100 tenants, each twice
		wg.Go(func() {
			n := newTenant(tenant.ID(fmt.Sprint("user_", i/2)))
			n.Profile.PoolMax = poolMax
			n.Attributes.DisplayName, n.Attributes.Labels["i"] = "of "+string(n.ID), fmt.Sprint(i/2)
			s, err := dbs[i%2].SignUp(t.Context(), n, tenant.Actor{Name: "caller:test", RequestID: fmt.Sprint("req-", i/2)})
			if err != nil {
				t.Errorf("sign-up %d: %v", i, err)
				return
			}
			if s.Created {
				made.Add(1)
			}
			if s.Tenant.ID != n.ID || s.Tenant.DisplayName != n.Attributes.DisplayName || s.Tenant.Labels["i"] != fmt.Sprint(i/2) ||
				!bytes.Equal(s.FirstHash, n.Attributes.Hash()) {
				t.Errorf("the sign-up of %s answers %+v", n.ID, s)
			}
			if s.Revealed != nil && (s.Revealed.Key.AppID != s.Tenant.AppID || string(s.Revealed.Key.Fingerprint) != string(s.Tenant.AppID)) {
				t.Errorf("%s got the key of another: %+v", n.ID, s)
			}
		})
	}
	wg.Wait()
	if made.Load() != 100 {
		t.Errorf("%d sign-ups say that they made a tenant; want 100", made.Load())
	}
	if _, err := dbs[0].Claim(t.Context(), "default", actor); err != nil {
		t.Fatal(err)
	}
	if poolMax > 0 && count(t, conn, `audit_events WHERE action = 'key.revealed'`) == 0 {
		t.Error("no sign-up found its app at once")
	}
	for sql, want := range map[string]int{
		`tenants`:                        100,
		`tenants WHERE state = 'active'`: 50,
		`apps WHERE state = 'held'`:      50,
		`apps WHERE state = 'ready'`:     0,
		`tenants JOIN apps ON apps.tenant_id = tenants.id AND apps.id = tenants.app_id`: 50,
		`audit_events e JOIN tenants t ON t.id = e.tenant_id WHERE action = 'tenant.created' AND actor = 'caller:test'
			AND request_id = 'req-' || (t.labels->>'i')`: 100,
		`audit_events WHERE action = 'tenant.activated' OR action = 'tenant.created' AND detail->>'state' = 'active'`: 50,
	} {
		if got := count(t, conn, sql); got != want {
			t.Errorf("there are %d %s; want %d", got, sql, want)
		}
	}
	// Some sign-ups may have found an app locked by another and begun a build
	// for it; never more than there were sign-ups.
	if got := count(t, conn, `apps WHERE state = 'building'`); got < 50 || got > 64 {
		t.Errorf("%d builds were begun for 50 tenants that wait, with at most 64 allowed", got)
	}
}

// one returns the only row of those leased, or errNone.
func one[T any](leased []T, err error) (row T, _ error) {
	switch {
	case err != nil:
		return row, err
	case len(leased) == 0:
		return row, errNone
	}
	return leased[0], nil
}

var errNone = errors.New("no row was leased")

// A sign-up that finds an app begins no build and wakes no worker.
func TestSignUpFromThePoolWakesNobody(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	conn, db := pgtest.Conn(t, url), pgtest.OpenURL(t, url)
	readyApps(t, conn, 1)
	got, err := db.SignUp(t.Context(), newTenant("user_1"), actor)
	if err != nil || !got.Created || got.Tenant.State != tenant.Active || got.Tenant.AppID != "ready-0001" {
		t.Fatalf("SignUp = %+v, %v; want the ready app", got, err)
	}
	if builds := count(t, conn, `apps WHERE state = 'building'`); builds != 0 || len(db.WorkDue(tenant.AppWork)) != 0 {
		t.Errorf("there are %d builds, and %d wake-ups; want none", builds, len(db.WorkDue(tenant.AppWork)))
	}
	if got, err = db.SignUp(t.Context(), newTenant("user_2"), actor); err != nil || got.Tenant.State != tenant.Provisioning {
		t.Fatalf("SignUp = %+v, %v; want it to wait", got, err)
	}
	if builds := count(t, conn, `apps WHERE state = 'building'`); builds != 1 || len(db.WorkDue(tenant.AppWork)) != 1 {
		t.Errorf("there are %d builds, and %d wake-ups; want one of each", builds, len(db.WorkDue(tenant.AppWork)))
	}
}

// The number of builds follows the number of tenants that wait, up to the limit.
func TestBuildsFollowWaiters(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	conn, db := pgtest.Conn(t, url), pgtest.OpenURL(t, url)
	for i := range 10 {
		n := newTenant(tenant.ID(fmt.Sprint("user_", i)))
		n.Limits.Waiting = 4
		if _, err := db.SignUp(t.Context(), n, actor); err != nil {
			t.Fatal(err)
		}
	}
	if got := count(t, conn, `apps WHERE state = 'building'`); got != 4 {
		t.Errorf("%d builds run for 10 tenants with at most 4 allowed", got)
	}
	for _, c := range []struct{ allowed, want int }{{4, 4}, {6, 6}, {20, 10}, {20, 10}} {
		if err := db.StartBuilds(t.Context(), tenant.NextBuilds{Profile: profile, IDs: appIDs(64), Limits: tenant.BuildLimits{Waiting: c.allowed}}); err != nil {
			t.Fatal(err)
		}
		if got := count(t, conn, `apps WHERE state = 'building'`); got != c.want {
			t.Errorf("with %d allowed, %d builds run; want %d", c.allowed, got, c.want)
		}
	}
}

// A worker that lost its lease changes nothing.
func TestLeaseFencesOffTheLate(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	conn, db := pgtest.Conn(t, url), pgtest.OpenURL(t, url)
	pgtest.KnowControl(t, url)
	signed, err := db.SignUp(t.Context(), newTenant("user_1"), actor)
	if err != nil {
		t.Fatal(err)
	}
	var id tenant.AppID
	if err := conn.QueryRow(t.Context(), `SELECT id FROM apps`).Scan(&id); err != nil {
		t.Fatal(err)
	}
	late, err := one(db.LeaseApps(t.Context(), []tenant.AppID{id}, time.Minute))
	if err != nil || late.InDoubt || late.Made {
		t.Fatalf("LeaseApps = %+v, %v; want a fresh app", late, err)
	}
	if err := db.BeginApp(t.Context(), late); err != nil {
		t.Fatal(err)
	}
	if _, err := one(db.LeaseApps(t.Context(), []tenant.AppID{id}, time.Minute)); !errors.Is(err, errNone) {
		t.Fatalf("a second lease: %v; want none", err)
	}
	if _, err := conn.Exec(t.Context(), `UPDATE apps SET leased_until = now() - interval '1 second'`); err != nil {
		t.Fatal(err)
	}
	owner, err := one(db.LeaseApps(t.Context(), []tenant.AppID{id}, time.Minute))
	if err != nil || !owner.InDoubt {
		t.Fatalf("LeaseApps after a lease that ran out = %+v, %v; want the app in doubt", owner, err)
	}
	key := tenant.NewKeyRow{ID: uuid.Must(uuid.NewV7()), Name: "default", Scopes: []string{"All"}}
	if err := db.AppMade(t.Context(), owner); err != nil {
		t.Fatal(err)
	}
	if id, err := db.BeginKey(t.Context(), owner, key); err != nil || id != key.ID {
		t.Fatalf("BeginKey = %v, %v", id, err)
	}
	sealed := tenant.SealedKey{ID: key.ID, Ciphertext: []byte("c"), Fingerprint: []byte("f"), Hint: "cdef"}
	_, lateKey := db.BeginKey(t.Context(), late, tenant.NewKeyRow{ID: uuid.New(), Name: "default", Scopes: []string{"All"}})
	late.Creating.ID = key.ID
	for what, err := range map[string]error{
		"BeginApp":    db.BeginApp(t.Context(), late),
		"AppMade":     db.AppMade(t.Context(), late),
		"BeginKey":    lateKey,
		"FinishBuild": db.FinishBuild(t.Context(), late, tenant.BuildEnd{Key: sealed, Next: tenant.NextBuilds{Profile: profile}}, actor),
		"SetBack":     db.SetBack(t.Context(), late.Lease(), tenant.Setback{}),
		"Release":     db.Release(t.Context(), late.Lease(), 0),
		"AbandonApp":  db.AbandonApp(t.Context(), late, true, "late", next(1), actor),
		"AppDeleted":  db.AppDeleted(t.Context(), late, actor),
		"GiveUpKey":   db.GiveUpKey(t.Context(), late),
	} {
		if !errors.Is(err, tenant.ErrLeaseLost) {
			t.Errorf("%s of a worker that lost its lease fails with %v; want ErrLeaseLost", what, err)
		}
	}
	if err := db.FinishBuild(t.Context(), owner, tenant.BuildEnd{Key: sealed, Next: tenant.NextBuilds{Profile: profile}}, actor); err != nil {
		t.Fatal(err)
	}
	got, err := db.Tenant(t.Context(), signed.Tenant.ID)
	if err != nil || got.State != tenant.Active || got.AppID != id || got.Version <= signed.Tenant.Version {
		t.Errorf("the tenant is %+v, %v; want it active with app %s", got, err, id)
	}
}

// nextSlot is the time of the next slot, in microseconds since 1970.
func nextSlot(t *testing.T, conn *pgx.Conn) (at int64) {
	t.Helper()
	if err := conn.QueryRow(t.Context(), `SELECT last_value FROM upstream_slots`).Scan(&at); err != nil {
		t.Fatal(err)
	}
	return at
}

// Slots follow one another at the rate, for all who ask together, and none is
// given that cannot be used.
func TestBudget(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	conn, lock := pgtest.Conn(t, url), pgtest.Conn(t, url)
	dbs := []*postgres.DB{pgtest.OpenURL(t, url), pgtest.OpenURL(t, url)}
	const perSecond, n = 100, 12
	until(t, "the machine is fast enough that all slots lie ahead", func() bool {
		run(t, lock, `BEGIN; SELECT FROM upstream_budget FOR UPDATE`)
		run(t, conn, pgtest.NextSlotIn(4*time.Second))
		before := nextSlot(t, conn)
		var wg sync.WaitGroup
		var late atomic.Bool
		for i := range n {
			wg.Go(func() {
				slot, err := dbs[i%2].ReserveSlot(t.Context(), tenant.SlotRequest{PerSecond: perSecond, Patience: time.Minute})
				if err != nil || !slot.Granted {
					t.Errorf("ReserveSlot = %+v, %v; want a slot", slot, err)
				}
				if slot.Wait == 0 {
					late.Store(true)
				}
			})
		}
		until(t, "all wait for the same row", func() bool {
			return count(t, conn, `pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`) == n
		})
		run(t, lock, `COMMIT`)
		wg.Wait()
		if got, want := time.Duration(nextSlot(t, conn)-before)*time.Microsecond, n*time.Second/perSecond; got != want && !late.Load() {
			t.Errorf("%d slots took %s of the budget; want %s", n, got, want)
		}
		return !late.Load()
	})
	// Four seconds are more than an impatient caller waits: nothing is reserved.
	run(t, conn, pgtest.NextSlotIn(4*time.Second))
	before := nextSlot(t, conn)
	slot, err := dbs[0].ReserveSlot(t.Context(), tenant.SlotRequest{PerSecond: perSecond, Patience: 100 * time.Millisecond})
	if err != nil || slot.Granted || slot.Wait == 0 || nextSlot(t, conn) != before {
		t.Errorf("ReserveSlot beyond patience = %+v, %v; want none, and a wait", slot, err)
	}
	run(t, conn, `UPDATE upstream_budget SET paused_until = clock_timestamp() + interval '1 hour'; `+pgtest.NextSlotIn(0))
	if slot, err = dbs[0].ReserveSlot(t.Context(), tenant.SlotRequest{PerSecond: perSecond, Patience: 2 * time.Hour}); err != nil || slot.Granted || slot.Wait < 50*time.Minute {
		t.Errorf("ReserveSlot while paused = %+v, %v; want none", slot, err)
	}
	// Slots that nobody took are not saved up.
	run(t, conn, `UPDATE upstream_budget SET paused_until = 'epoch'; SELECT setval('upstream_slots', 0)`)
	for want := range 2 {
		slot, err := dbs[0].ReserveSlot(t.Context(), tenant.SlotRequest{PerSecond: 0.001, Patience: time.Hour})
		if err != nil || slot.Granted != (want == 0) || (slot.Wait > time.Minute) != (want == 1) {
			t.Errorf("slot %d after a rest = %+v, %v", want, slot, err)
		}
	}
}

// If the clock of the database is set back, calls go on after those whose slots are reserved.
func TestSlotsAfterClockSetBack(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	conn, db := pgtest.Conn(t, url), pgtest.OpenURL(t, url)
	reserve := func() tenant.Slot {
		t.Helper()
		slot, err := db.ReserveSlot(t.Context(), tenant.SlotRequest{PerSecond: 100, Patience: time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		return slot
	}
	run(t, conn, pgtest.NextSlotIn(4*time.Second))
	began := time.Now()
	reserved := reserve()
	if !reserved.Granted {
		t.Fatalf("ReserveSlot = %+v; want a slot", reserved)
	}
	run(t, conn, `SELECT setval('upstream_slots', last_value + 3600000000) FROM upstream_slots`)
	var next tenant.Slot
	until(t, "a slot is granted", func() bool { next = reserve(); return next.Granted })
	if after := time.Since(began) + next.Wait; after <= reserved.Wait || next.Wait > 5*time.Second {
		t.Errorf("the slot after the step of the clock is due after %s, and the one before it after %s", after, reserved.Wait)
	}
}

// Reservations and single failures make no row versions: as long as a snapshot is held, every call would read them all.
func TestReservationsMakeNoRowVersions(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	conn, db := pgtest.Conn(t, url), pgtest.OpenURL(t, url)
	dump, err := pgtest.Conn(t, url).BeginTx(t.Context(), pgx.TxOptions{IsoLevel: pgx.RepeatableRead})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := dump.Exec(t.Context(), `SELECT FROM upstream_budget`); err != nil {
		t.Fatal(err)
	}
	version := func() (ctid string) {
		t.Helper()
		if err := conn.QueryRow(t.Context(), `SELECT ctid::text FROM upstream_budget`).Scan(&ctid); err != nil {
			t.Fatal(err)
		}
		return ctid
	}
	before := version()
	failed := tenant.UpstreamFailure{TripAfter: 3, PauseBase: time.Hour, PauseCap: time.Hour}
	for range 10 {
		for failures := range 3 {
			slot, err := db.ReserveSlot(t.Context(), tenant.SlotRequest{PerSecond: 1e6, Patience: time.Second})
			if err != nil || !slot.Granted || slot.Shaky != (failures > 0) {
				t.Fatalf("after %d failures, ReserveSlot = %+v, %v", failures, slot, err)
			}
			if failures == 2 {
				break
			}
			if pause, err := db.UpstreamFailed(t.Context(), failed); err != nil || pause > 0 {
				t.Fatalf("UpstreamFailed = %s, %v; want no pause", pause, err)
			}
		}
		if resumed, err := db.UpstreamWorks(t.Context(), 0); err != nil || resumed {
			t.Fatalf("UpstreamWorks = %v, %v; want no end of a pause", resumed, err)
		}
	}
	if after := version(); after != before {
		t.Errorf("the row of the budget has moved from %s to %s", before, after)
	}
	// The third failure in a row begins a pause.
	for i := range 3 {
		if pause, err := db.UpstreamFailed(t.Context(), failed); err != nil || pause > 0 != (i == 2) {
			t.Errorf("failure %d: the pause is %s, %v", i+1, pause, err)
		}
	}
	if resumed, err := db.UpstreamWorks(t.Context(), 1); err != nil || !resumed {
		t.Errorf("UpstreamWorks = %v, %v; want the end of the pause", resumed, err)
	}
	if slot, err := db.ReserveSlot(t.Context(), tenant.SlotRequest{PerSecond: 1e6, Patience: time.Second}); err != nil || !slot.Granted || slot.Shaky || slot.Probe {
		t.Errorf("after the pause, ReserveSlot = %+v, %v", slot, err)
	}
}

func TestTenantsList(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	conn, db := pgtest.Conn(t, url), pgtest.OpenURL(t, url)
	// Ten tenants, a minute apart, but for the last two, which share a time.
	_, err := conn.Exec(t.Context(), `
		INSERT INTO tenants (id, profile, labels, attributes_hash, created_at)
		SELECT 'user_' || i, CASE WHEN i < 5 THEN 'default' ELSE 'narrow' END,
			jsonb_build_object('plan', CASE WHEN i % 2 = 0 THEN 'pro' ELSE 'free' END, 'n', i::text), repeat('x', 64)::bytea,
			'2026-01-01T00:00:00Z'::timestamptz + least(i, 8) * interval '1 minute'
		FROM generate_series(0, 9) i`)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec(t.Context(), `UPDATE tenants SET problem = '{"code":"x","detail":"y","since":"2026-01-01T00:00:00Z"}' WHERE id = 'user_3'`); err != nil {
		t.Fatal(err)
	}
	at := func(minute int) time.Time { return time.Date(2026, 1, 1, 0, minute, 0, 0, time.UTC) }
	yes, no := true, false
	for name, c := range map[string]struct {
		f    postgres.TenantFilter
		want []int
	}{
		"all":             {postgres.TenantFilter{}, []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}},
		"state":           {postgres.TenantFilter{State: tenant.Active}, nil},
		"profile":         {postgres.TenantFilter{Profile: "narrow"}, []int{5, 6, 7, 8, 9}},
		"label":           {postgres.TenantFilter{Labels: map[string]string{"plan": "pro"}}, []int{0, 2, 4, 6, 8}},
		"labels":          {postgres.TenantFilter{Labels: map[string]string{"plan": "pro", "n": "4"}}, []int{4}},
		"prefix":          {postgres.TenantFilter{IDPrefix: "user_7"}, []int{7}},
		"prefix is plain": {postgres.TenantFilter{IDPrefix: "user%"}, nil},
		"times":           {postgres.TenantFilter{CreatedAfter: at(2), CreatedBefore: at(4)}, []int{2, 3}},
		"problem":         {postgres.TenantFilter{HasProblem: &yes}, []int{3}},
		"no problem":      {postgres.TenantFilter{HasProblem: &no, Profile: "default"}, []int{0, 1, 2, 4}},
		"everything":      {postgres.TenantFilter{State: tenant.Provisioning, Profile: "default", Labels: map[string]string{"plan": "free"}, IDPrefix: "user_", CreatedAfter: at(0), CreatedBefore: at(9), HasProblem: &yes}, []int{3}},
	} {
		var got []int
		var after postgres.Position
		for { // pages of two
			page, err := db.Tenants(t.Context(), c.f, after, 2)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			for _, p := range page {
				var n int
				_, _ = fmt.Sscanf(string(p.ID), "user_%d", &n)
				got = append(got, n)
			}
			if len(page) < 2 {
				break
			}
			after = postgres.Position{CreatedAt: page[1].CreatedAt, ID: page[1].ID}
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s selects %v; want %v", name, got, c.want)
		}
	}
}

func TestCallers(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	conn, db := pgtest.Conn(t, url), pgtest.OpenURL(t, url)
	add := func(name string, expires time.Time) (tenant.Token, tenant.Secret) {
		t.Helper()
		token, text := tenant.NewToken()
		if _, err := db.AddCaller(t.Context(), token, tenant.NewCaller{Name: name, Role: tenant.Viewer, ExpiresAt: expires}, actor); err != nil {
			t.Fatal(err)
		}
		return token, text
	}
	good, text := add("good", time.Time{})
	expired, _ := add("expired", time.Now().Add(-time.Second))
	future, _ := add("future", time.Now().Add(time.Hour))
	forged := tenant.Token{ID: good.ID, Hash: expired.Hash}
	for name, c := range map[string]struct {
		token tenant.Token
		ok    bool
	}{"good": {good, true}, "future": {future, true}, "expired": {expired, false}, "forged": {forged, false}, "unknown": {tenant.Token{ID: "x"}, false}} {
		got, _, err := db.Authenticate(t.Context(), c.token)
		if c.ok && (err != nil || got.Name != name || got.Role != tenant.Viewer) || !c.ok && !errors.Is(err, tenant.Unauthenticated) {
			t.Errorf("Authenticate of the %s token = %+v, %v", name, got, err)
		}
	}
	list, err := db.Callers(t.Context(), "", 0)
	if err != nil || len(list) != 3 || list[0].Name != "good" || list[0].LastUsedAt.IsZero() || !list[1].LastUsedAt.IsZero() {
		t.Errorf("Callers = %+v, %v; want three, of which the first was used and the second was not", list, err)
	}
	for range 2 { // to revoke again changes nothing
		if c, err := db.RevokeCaller(t.Context(), good.ID, actor); err != nil || c.RevokedAt.IsZero() {
			t.Errorf("RevokeCaller = %+v, %v", c, err)
		}
	}
	if _, _, err := db.Authenticate(t.Context(), good); !errors.Is(err, tenant.Unauthenticated) {
		t.Errorf("a revoked token authenticates: %v", err)
	}
	if _, err := db.RevokeCaller(t.Context(), "nobody", actor); !errors.Is(err, tenant.NotFound) {
		t.Errorf("RevokeCaller of an unknown id fails with %v", err)
	}
	if got := count(t, conn, `audit_events WHERE action = 'token.revoked'`); got != 1 {
		t.Errorf("there are %d events of one revocation", got)
	}
	if got := count(t, conn, `callers WHERE to_jsonb(callers)::text LIKE '%' || $1 || '%'`, text.Reveal()[22:]); got != 0 {
		t.Error("a token's secret is stored")
	}
}

// The months ahead have their partitions, and an event that falls outside of all
// is kept.
func TestAuditPartitions(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	conn, db := pgtest.Conn(t, url), pgtest.OpenURL(t, url)
	if err := db.MakeAuditPartitions(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec(t.Context(), `
		INSERT INTO audit_events (at, actor, action) VALUES (now(), 'a', 'now'), (now() + interval '5 years', 'a', 'far')`); err != nil {
		t.Fatal(err)
	}
	if got := count(t, conn, `audit_events_other WHERE action = 'far'`); got != 1 {
		t.Error("an event far ahead is not kept")
	}
	if got := count(t, conn, `audit_events_other WHERE action = 'now'`); got != 0 {
		t.Error("an event of this month is in no month's partition")
	}
	// Even where the default partition holds events of a month to come, nothing fails.
	if _, err := conn.Exec(t.Context(), `SELECT audit_events_make_partitions(70)`); err != nil {
		t.Errorf("make partitions over events that are there: %v", err)
	}
}
