package postgres_test

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// ciphertext is something that a key sealed, as far as the database can see.
func ciphertext(by tenant.SealKeyID, text string) []byte {
	return slices.Concat([]byte{1}, by.Bytes(), []byte(text))
}

type execer interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
}

const addKeySQL = `INSERT INTO keys (id, app_id, name, state, scopes, ciphertext, fingerprint, activated_at)
	VALUES ($1, 'ready-0001', 'k-' || right($1::uuid::text, 12), 'active', '{All}', $2, $3, now())`

func addKey(t *testing.T, conn execer, by tenant.SealKeyID) uuid.UUID {
	t.Helper()
	id := uuid.New()
	if _, err := conn.Exec(t.Context(), addKeySQL, id, ciphertext(by, "old"), id[:]); err != nil {
		t.Fatal(err)
	}
	return id
}

func TestReseal(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	db, conn := pgtest.OpenURL(t, url), pgtest.Conn(t, url)
	if s, err := db.Sealed(t.Context()); err != nil || len(s.By) != 0 || s.Probe != nil {
		t.Errorf("an empty database needs the keys %+v, %v", s, err)
	}
	readyApps(t, conn, 1)
	for range 7 {
		addKey(t, conn, 3)
	}
	taken := addKey(t, conn, 3)
	addKey(t, conn, 1<<31+5)
	addKey(t, conn, 9)
	if s, err := db.Sealed(t.Context()); err != nil || !slices.Equal(s.By, []tenant.SealKeyID{3, 9, 1<<31 + 5}) {
		t.Errorf("the database needs the keys %v, %v", s.By, err)
	}

	// One row is taken by another, one is left as it is.
	other := pgtest.Conn(t, url)
	tx, err := other.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(t.Context(), `SELECT FROM keys WHERE id = $1 FOR UPDATE`, taken); err != nil {
		t.Fatal(err)
	}
	var left uuid.UUID
	seal := func(id uuid.UUID, old []byte) []byte {
		if !bytes.Equal(old, ciphertext(3, "old")) {
			t.Errorf("the row %s is sealed as %q", id, old)
		}
		if left == uuid.Nil {
			left = id
		}
		if id == left {
			return nil
		}
		return ciphertext(9, "new")
	}
	var after uuid.UUID
	seen, changed := 0, 0
	for {
		r, err := db.Reseal(t.Context(), 3, after, 3, seal)
		if err != nil {
			t.Fatal(err)
		}
		if r.Seen > 3 {
			t.Errorf("a batch has %d rows; want 3 at most", r.Seen)
		}
		if seen, changed = seen+r.Seen, changed+r.Changed; r.Seen == 0 {
			break
		}
		after = r.Last
	}
	if seen != 7 || changed != 6 {
		t.Errorf("%d rows were seen and %d changed; want 7 and 6", seen, changed)
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n, m := count(t, conn, `keys WHERE ciphertext = $1`, ciphertext(3, "old")), count(t, conn, `keys WHERE ciphertext = $1`, ciphertext(9, "new")); n != 2 || m != 6 {
		t.Errorf("%d rows are as before and %d sealed anew; want 2 and 6", n, m)
	}
}

func TestCountSealed(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	db, conn := pgtest.OpenURL(t, url), pgtest.Conn(t, url)
	readyApps(t, conn, 1)
	addKey(t, conn, 3)
	exec := func(sql string, args ...any) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), sql, args...); err != nil {
			t.Fatal(err)
		}
	}
	exec(`INSERT INTO deployment (id, operator_user_id, keyset_probe) VALUES ('0123456789abcdef', 'acme', $1)`, ciphertext(7, ""))
	exec(`
		INSERT INTO apps (id, profile, profile_revision, state, made_at, ready_at, tenant_id, tenant_generation, marked_at, marker_key_id)
		SELECT 'a' || i, 'default', 'x', s, now(), now(), 'u' || i, 1, m, k FROM (VALUES
			(1, 'held', now(), 3), (2, 'held', NULL, 3), (3, 'held', NULL, NULL), (4, 'held', now(), NULL), (5, 'held', now(), -1),
			(6, 'retained', now(), 3), (7, 'retained', now(), 4294967295), (8, 'purging', now(), 3)) v (i, s, m, k)`)
	got, err := db.CountSealed(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := map[tenant.SealKeyID]tenant.SealedCount{3: {Keys: 1, Held: 2, Retained: 1}, 4294967295: {Retained: 1}, 7: {Probe: true}}
	if len(got.By) != len(want) || got.UnknownMarkers != 1 {
		t.Errorf("the counts are %+v", got)
	}
	for id, c := range want {
		if got.By[id] != c {
			t.Errorf("the key %d sealed %+v; want %+v", id, got.By[id], c)
		}
	}

	// Apps whose markers are old wait for new ones, so many at once.
	exec(`UPDATE apps SET marked_at = now() WHERE id = 'a2'`)
	exec(`UPDATE apps SET pending = true WHERE id = 'a3'`)
	for _, n := range []int{1, 0} {
		if got, err := db.MarkAnew(t.Context(), []tenant.SealKeyID{3}, 2); err != nil || got != n {
			t.Errorf("%d apps are marked anew, %v; want %d", got, err, n)
		}
	}
	if got, err := db.MarkAnew(t.Context(), []tenant.SealKeyID{3}, 10); err != nil || got != 2 {
		t.Errorf("%d apps are marked anew, %v; want the other 2", got, err)
	}
	if n := count(t, conn, `apps WHERE pending AND marked_at IS NULL AND id IN ('a1', 'a2', 'a4')`); n != 3 {
		t.Errorf("%d of 3 apps wait for their markers", n)
	}
}

// It is noted by which key a marker was sealed, and never taken for known what is not.
func TestMarkerKey(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	db, conn := pgtest.OpenURL(t, url), pgtest.Conn(t, url)
	lease := func(marked string) tenant.App {
		t.Helper()
		if _, err := conn.Exec(t.Context(), `
			INSERT INTO apps (id, profile, profile_revision, state, made_at, ready_at, tenant_id, tenant_generation, pending)
			VALUES ('a1', 'default', 'x', 'held', now(), now(), 'u1', 1, true)
			ON CONFLICT (id) DO UPDATE SET pending = true, marker_key_id = NULL, leased_until = '-infinity';
			UPDATE apps SET marked_at = `+marked); err != nil {
			t.Fatal(err)
		}
		a, err := one(db.LeaseApps(t.Context(), []tenant.AppID{"a1"}, time.Minute))
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	end := func(a tenant.App, want int64) {
		t.Helper()
		if err := db.AppMarked(t.Context(), a); err != nil {
			t.Fatal(err)
		}
		var got int64
		if err := conn.QueryRow(t.Context(), `SELECT coalesce(marker_key_id, -2) FROM apps`).Scan(&got); err != nil || got != want {
			t.Errorf("the marker's key is %d, %v; want %d", got, err, want)
		}
	}
	a, by := lease("NULL"), tenant.SealKeyID(1<<31+7)
	a.MarkerKey = &by
	end(a, 1<<31+7)
	end(lease("NULL"), -1)  // markers name no tenants
	end(lease("now()"), -2) // by older code
	a = lease("now()")
	if n, err := db.MarkAnew(t.Context(), []tenant.SealKeyID{3}, 10); err != nil || n != 1 {
		t.Errorf("%d apps are marked anew, %v; want the one whose key is not known", n, err)
	}
	end(a, -2)
}

// A key is removed only if nobody can have sealed by it, and nobody can afterwards.
func TestRemoveSealKey(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	db, conn := pgtest.OpenURL(t, url), pgtest.Conn(t, url)
	readyApps(t, conn, 1)

	// A replica is sealing by the key while it is to be removed.
	writer := pgtest.Conn(t, url)
	tx, err := writer.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	id := addKey(t, tx, 3)
	refused := make(chan tenant.SealedCounts, 1)
	go func() {
		needs, err := db.RemoveSealKey(t.Context(), 3, actor)
		if err != nil {
			t.Error(err)
		}
		refused <- needs
	}()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for count(t, conn, `pg_locks WHERE locktype = 'advisory' AND NOT granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())`) == 0 {
		select {
		case needs := <-refused:
			t.Fatalf("the key is removed, or refused because of %+v, before it is known whether it is needed", needs)
		case <-tick.C:
		}
	}
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if needs := <-refused; needs.By[3].Keys != 1 {
		t.Errorf("the key is needed by %+v; want one key", needs)
	}

	if _, err := conn.Exec(t.Context(), `UPDATE keys SET ciphertext = $1`, ciphertext(4, "x")); err != nil {
		t.Fatal(err)
	}
	for range 2 { // to remove it again changes nothing
		if needs, err := db.RemoveSealKey(t.Context(), 3, actor); err != nil || !needs.By[3].None() {
			t.Errorf("the key is needed by %+v, %v", needs, err)
		}
	}
	if n := count(t, conn, `audit_events WHERE action = 'keyset.key_removed' AND detail->>'key_id' = '3'`); n != 1 {
		t.Errorf("there are %d events of the removal; want one", n)
	}
	_, err = conn.Exec(t.Context(), `UPDATE keys SET ciphertext = $2 WHERE id = $1`, id, ciphertext(3, "late"))
	if pg, ok := errors.AsType[*pgconn.PgError](err); !ok || pg.ConstraintName != "sealed_by_removed_key" {
		t.Errorf("a replica that is behind seals by the removed key: %v", err)
	}
	if _, err := conn.Exec(t.Context(), addKeySQL, uuid.New(), ciphertext(3, "late"), []byte("f")); err == nil {
		t.Error("a new key is sealed by the removed key")
	}
	if _, err := conn.Exec(t.Context(), `UPDATE apps SET marker_key_id = 3`); err == nil {
		t.Error("a marker is sealed by the removed key")
	}
	if _, err := conn.Exec(t.Context(), `UPDATE apps SET marker_key_id = 4`); err != nil {
		t.Error(err)
	}
}
