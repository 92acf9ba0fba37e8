package postgres_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// A comparison of more apps than are compared at once finds what one of all at once
// would, each once, and leaves no lists behind.
func TestCompareInParts(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	conn, db := pgtest.Conn(t, url), pgtest.OpenURL(t, url)
	id := uuid.Must(uuid.NewV7())
	if _, err := db.StartReport(t.Context(), id, actor); err != nil {
		t.Fatal(err)
	}
	// 12,000 apps with a key each. Four are gone, four lack their key, four are not
	// marked, and four were renamed to an id that comes far before or after their own, which the
	// listing has found; beside
	// them there are foreign apps.
	if _, err := conn.Exec(t.Context(), `
		SET session_replication_role = replica;
		INSERT INTO apps (id, profile, profile_revision, state, tenant_id, tenant_generation, made_at, ready_at, marked_at)
		SELECT 'm-' || lpad(i::text, 6, '0'), 'default', 'x', 'held', 'u' || i, 1, now() - interval '1 day', now() - interval '1 day', now()
		FROM generate_series(1, 12000) i;
		INSERT INTO keys (id, app_id, name, state, scopes, ciphertext, fingerprint, activated_at, created_at, updated_at)
		SELECT md5(id)::uuid, id, 'default', 'active', '{All}', 'c', id::bytea, now() - interval '1 day', now() - interval '1 day', now() - interval '1 day' FROM apps;
		UPDATE reconciliations SET phase = 'compare';
		INSERT INTO reconciliation_apps (reconciliation_id, app_id, marker_app, tenant_id, tenant_generation)
		SELECT r.id, CASE right(a.id, 4)::int % 4000 WHEN 11 THEN CASE WHEN a.id < 'm-006000' THEN 'z-' ELSE 'a-' END || a.id ELSE a.id END,
			CASE WHEN right(a.id, 4)::int % 4000 = 12 THEN '' ELSE a.id END,
			CASE WHEN right(a.id, 4)::int % 4000 <> 12 THEN a.tenant_id END, CASE WHEN right(a.id, 4)::int % 4000 <> 12 THEN 1 END
		FROM reconciliations r, apps a WHERE right(a.id, 4)::int % 4000 <> 10;
		INSERT INTO reconciliation_apps (reconciliation_id, app_id)
		SELECT r.id, f || i FROM reconciliations r, unnest(ARRAY['a-foreign', 'z-foreign']) f, generate_series(1, 3000) i;
		INSERT INTO reconciliation_keys (reconciliation_id, app_id, key_id, fingerprint, scopes)
		SELECT r.id, a.id, md5(a.id)::uuid, a.id::bytea, '{All}'
		FROM reconciliations r, apps a WHERE right(a.id, 4)::int % 4000 NOT IN (10, 13);
		RESET session_replication_role`); err != nil {
		t.Fatal(err)
	}
	want := map[string]int{
		"app_gone":     count(t, conn, `apps WHERE right(id, 4)::int % 4000 = 10`),
		"app_unmarked": count(t, conn, `apps WHERE right(id, 4)::int % 4000 = 12`),
		"key_gone":     count(t, conn, `apps WHERE right(id, 4)::int % 4000 = 13`),
	}
	r, err := one(db.LeaseReconciliations(t.Context(), []uuid.UUID{id}, time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	parts := 0
	for r.Phase == tenant.Comparing {
		if parts++; parts > 20 {
			t.Fatal("the comparison does not end")
		}
		if err := db.Compare(t.Context(), r); err != nil {
			t.Fatal(err)
		}
		leased := r.LeasedUntil
		if r, err = db.Reconciliation(t.Context(), id); err != nil || !r.LeasedUntil.Equal(leased) {
			t.Fatalf("the reconciliation is %+v, %v", r, err)
		}
	}
	if parts < 4 {
		t.Errorf("18,000 apps were compared in %d parts; want some more", parts)
	}
	rows, _ := conn.Query(t.Context(), `SELECT kind, app_id FROM reconciliation_items`)
	var kind, app string
	got, seen := map[string]int{}, []string{}
	if _, err := pgx.ForEachRow(rows, []any{&kind, &app}, func() error {
		got[kind]++
		seen = append(seen, app)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(got) != fmt.Sprint(want) || want["app_gone"] != 4 {
		t.Errorf("it finds %v; want %v, four each", got, want)
	}
	slices.Sort(seen)
	if all := len(seen); len(slices.Compact(seen)) != all {
		t.Error("something is found twice")
	}
	if r.ForeignApps != 6000 {
		t.Errorf("it counts %d foreign apps; want 6000", r.ForeignApps)
	}
	if n := count(t, conn, `reconciliation_apps`) + count(t, conn, `reconciliation_keys`); n != 0 {
		t.Errorf("%d entries of the lists are left", n)
	}
}
