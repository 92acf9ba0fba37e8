package postgres_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/tenant"
)

var allSlots = [tenant.Priorities]int{4, 8, 4, 4}

// A caller who requests much gets no more turns than others, and lower priorities none of a higher one.
func TestTurns(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	conn, db := pgtest.Conn(t, url), pgtest.OpenURL(t, url)
	pgtest.KnowControl(t, url)
	readyApps(t, conn, 1)
	run(t, conn, `
		UPDATE apps SET state = 'retired';
		CREATE FUNCTION revoking(caller text, priority integer, n integer, ago interval) RETURNS void LANGUAGE sql AS $$
			INSERT INTO keys (id, app_id, name, scopes, state, priority, requested_by, next_attempt_at)
			SELECT gen_random_uuid(), 'ready-0001', 'k', '{All}', 'revoking', priority, caller, now() - ago + i * interval '1 ms' FROM generate_series(1, n) i $$;
		SELECT revoking('a', 2, 1000, '1 hour'), revoking('b', 2, 3, '1 minute'), revoking('a', 1, 1000, '1 hour'), revoking('c', 1, 2, '1 minute'),
			revoking('d', 0, 1, '1 second'), revoking('a', 0, 5, '-1 hour'), revoking('a', 3, 5, '1 hour');
		INSERT INTO apps (id, profile, profile_revision, state, incarnation)
		SELECT 'building-' || i, 'default', 'x', 'building', id FROM current_incarnation, generate_series(1, 30) i;
		INSERT INTO apps (id, profile, profile_revision, state, incarnation, made_at, ready_at, tenant_id, tenant_generation, tagging, pending)
		SELECT 'held-' || i, 'default', 'x', 'held', id, now(), now(), 'u' || i, 1, true, true FROM current_incarnation, generate_series(1, 30) i`)
	due := func(slots [tenant.Priorities]int) (is []string) {
		t.Helper()
		rows, err := db.DueWork(t.Context(), tenant.KeyWork, slots)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range rows {
			var caller string
			if err := conn.QueryRow(t.Context(), `SELECT requested_by FROM keys WHERE id = $1`, r.ID).Scan(&caller); err != nil {
				t.Fatal(err)
			}
			is = append(is, fmt.Sprint(r.Priority, " ", caller))
		}
		return is
	}
	got := due(allSlots)
	for _, turn := range [][]string{got[1:3], got[3:5], got[9:11], got[11:13]} {
		slices.Sort(turn)
	}
	want := []string{"0 d", "1 a", "1 c", "1 a", "1 c", "1 a", "1 a", "1 a", "1 a", "2 a", "2 b", "2 a", "2 b", "3 a", "3 a", "3 a", "3 a"}
	if !slices.Equal(got, want) {
		t.Errorf("due are\n%q; want\n%q", got, want)
	}
	apps, err := db.DueWork(t.Context(), tenant.AppWork, allSlots)
	if err != nil {
		t.Fatal(err)
	}
	sorts := map[string]int{}
	for _, a := range apps {
		sorts[a.Share]++
	}
	if len(apps) != 8 || len(sorts) != 2 || sorts[apps[0].Share] != 4 {
		t.Errorf("due are %+v; want four builds for tenants and four tags", apps)
	}
	seen := map[string]bool{}
	for range 100 {
		seen[due([tenant.Priorities]int{0, 0, 1, 0})[0]] = true
	}
	if !seen["2 a"] || !seen["2 b"] {
		t.Errorf("the only free slot goes to %v alone", seen)
	}

	// What is leased is not due, until its lease has ended.
	var id uuid.UUID
	if err := conn.QueryRow(t.Context(), `SELECT id FROM keys WHERE requested_by = 'd'`).Scan(&id); err != nil {
		t.Fatal(err)
	}
	k, err := one(db.LeaseKeys(t.Context(), []uuid.UUID{id}, time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := one(db.LeaseKeys(t.Context(), []uuid.UUID{id}, time.Minute)); err == nil {
		t.Error("a leased key was leased again")
	}
	if got := due([tenant.Priorities]int{4, 0, 0, 0}); len(got) != 0 {
		t.Errorf("a leased key is due: %q", got)
	}
	if err := db.Release(t.Context(), k.Lease(), 0); err != nil {
		t.Fatal(err)
	}
	if got := due([tenant.Priorities]int{4, 0, 0, 0}); !slices.Equal(got, []string{"0 d"}) {
		t.Errorf("due are %q; want the released key", got)
	}
}

// The first keys of a caller are interactive, the further ones bulk. A key that leaked goes first.
func TestPrioritiesOfKeys(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	conn, db := pgtest.Conn(t, url), pgtest.OpenURL(t, url)
	const n = tenant.MostInteractive + 6
	readyApps(t, conn, n)
	run(t, conn, `INSERT INTO keys (id, app_id, name, state, scopes, ciphertext, fingerprint, activated_at)
		SELECT gen_random_uuid(), id, 'default', 'active', '{All}', 'c', id::bytea, now() FROM apps`)
	ids := make([]tenant.ID, n)
	for i := range ids {
		ids[i] = tenant.ID(fmt.Sprintf("user_%02d", i))
		if got, err := db.SignUp(t.Context(), newTenant(ids[i]), actor); err != nil || got.Tenant.State != tenant.Active {
			t.Fatalf("%+v, %v", got.Tenant, err)
		}
	}
	counts := func() [tenant.Priorities]int {
		t.Helper()
		var is [tenant.Priorities]int
		for p := range is {
			is[p] = count(t, conn, fmt.Sprintf(`keys WHERE state IN ('creating', 'revoking') AND priority = %d`, p))
		}
		return is
	}
	other, third := tenant.Actor{Name: "caller:other"}, tenant.Actor{Name: "caller:third"}
	for _, id := range ids[:n-3] {
		if _, err := db.Suspend(t.Context(), id, actor); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := counts(), [tenant.Priorities]int{0, tenant.MostInteractive, 3, 0}; got != want {
		t.Fatalf("of one caller's keys by priority %v; want %v", got, want)
	}
	if _, _, err := db.AddKey(t.Context(), ids[n-1], tenant.KeySpec{Name: "more"}, func(tenant.Tenant) (tenant.NewKeyRow, error) {
		return tenant.NewKeyRow{ID: uuid.New(), Name: "more", Scopes: []string{"All"}}, nil
	}, actor); err != nil {
		t.Fatal(err)
	}
	if _, err := db.Suspend(t.Context(), ids[n-3], other); err != nil {
		t.Fatal(err)
	}
	if got, want := counts(), [tenant.Priorities]int{0, tenant.MostInteractive + 1, 4, 0}; got != want {
		t.Errorf("with another caller's %v; want %v", got, want)
	}

	// It may be one that is being revoked, and that a worker has.
	for _, id := range []tenant.ID{ids[n-2], ids[n-4]} {
		var key uuid.UUID
		var fingerprint []byte
		if err := conn.QueryRow(t.Context(), `SELECT k.id, k.fingerprint FROM keys k JOIN tenants t ON t.app_id = k.app_id WHERE t.id = $1`, id).Scan(&key, &fingerprint); err != nil {
			t.Fatal(err)
		}
		run(t, conn, `UPDATE keys SET leased_until = now() + interval '1 hour' WHERE state = 'revoking'`)
		if _, err := db.Quarantine(t.Context(), fingerprint, uuid.New(), third); err != nil {
			t.Fatal(err)
		}
		if got := count(t, conn, fmt.Sprintf(`keys WHERE id = '%s' AND state = 'revoking' AND priority = 0 AND leased_until < now()`, key)); got != 1 {
			t.Errorf("the key of %s is not revoked first", id)
		}
	}
	if got := counts()[tenant.Incident]; got != 3 { // two leaked keys and one successor
		t.Errorf("%d keys are an incident; want 3", got)
	}
}
