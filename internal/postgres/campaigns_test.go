package postgres_test

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/tenant"
)

var sweep = tenant.Actor{Name: "worker"}

func dueRotation() tenant.NewCampaign {
	return tenant.NewCampaign{ID: uuid.New(), Kind: tenant.RotateKeys, Overlap: time.Hour, Filter: tenant.KeyFilter{Profile: "default", OlderThan: time.Hour}}
}

// A due rotation takes the keys of its profile that are old enough, the oldest first, and each once.
func TestDueRotation(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	conn, db := pgtest.Conn(t, url), pgtest.OpenURL(t, url)
	exec := func(sql string, args ...any) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), sql, args...); err != nil {
			t.Fatalf("%v: %s", err, sql)
		}
	}
	start := func() bool {
		t.Helper()
		began, err := db.StartDueRotation(t.Context(), dueRotation(), sweep)
		if err != nil {
			t.Fatal(err)
		}
		return began
	}
	var want []string
	for i := range 6 {
		id := tenant.ID(fmt.Sprint("user-", i))
		changing(t, conn, id, tenant.Active)
		exec(`INSERT INTO keys (id, app_id, name, state, scopes, ciphertext, fingerprint, activated_at)
			VALUES ($1, $2, 'default', 'active', '{All}', 'c', sha256($2::text::bytea), now() - $3 * interval '50 minutes')`, uuid.Must(uuid.NewV7()), "app-"+id, i)
		if i > 1 {
			want = append([]string{string(id)}, want...) // by age, against the order of the ids
		}
	}
	if !start() {
		t.Fatal("no campaign begins for old keys")
	}
	c, err := db.Campaigns(t.Context(), uuid.Nil, 1)
	if err != nil {
		t.Fatal(err)
	}
	is, err := one(db.LeaseCampaigns(t.Context(), []uuid.UUID{c[0].ID}, time.Minute))
	for !is.Counted && err == nil {
		is, err = db.CountCampaign(t.Context(), is)
	}
	for !is.Walked && err == nil {
		is, err = db.RotateSome(t.Context(), is, []uuid.UUID{uuid.Must(uuid.NewV7())}, sweep)
	}
	if err != nil || is.Total != len(want) {
		t.Errorf("the campaign takes %d keys, %v; want %d", is.Total, err, len(want))
	}
	rows, _ := conn.Query(t.Context(), `SELECT tenant_id FROM audit_events WHERE action = 'key.rotating' ORDER BY id`)
	got, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("rotated keys: %v, (- want, + got):\n%s", err, diff)
	}

	// A rotation that comes to nothing is not repeated at once.
	exec(`UPDATE campaigns SET state = 'done', ended_at = now(), under_way = 0`)
	if start() {
		t.Error("a campaign begins while the keys are being rotated")
	}
	exec(`UPDATE keys SET state = 'revoked', revoked_at = now(), updated_at = now() WHERE state = 'creating'`)
	if start() {
		t.Error("a campaign begins at once for keys whose rotation came to nothing")
	}
	exec(`UPDATE keys SET updated_at = now() - interval '25 hours' WHERE state = 'revoked'`)
	if !start() {
		t.Error("no campaign begins a day after the rotation of old keys came to nothing")
	}
}

// A key has the profile whose maximum age counts for it: none while its app is retired, or belongs to
// another account. `migrate up` writes it for keys from before.
func TestProfilesOfKeys(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	conn := pgtest.Conn(t, url)
	exec := func(sql string) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatalf("%v: %s", err, sql)
		}
	}
	check := func(when string, want ...string) {
		t.Helper()
		rows, _ := conn.Query(t.Context(), `SELECT app_id || ' ' || coalesce(profile, 'none') FROM keys ORDER BY app_id`)
		got, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if diff := cmp.Diff(want, got); err != nil || diff != "" {
			t.Errorf("profiles of keys %s: %v, (- want, + got):\n%s", when, err, diff)
		}
	}
	exec(`INSERT INTO apps (id, profile, profile_revision, state, made_at, ready_at, user_id) VALUES
		('built', 'default', 'x', 'building', NULL, NULL, NULL), ('ready', 'pro', 'x', 'ready', now(), now(), NULL),
		('retired', 'pro', 'x', 'retired', now(), now(), NULL), ('shared', 'pro', 'x', 'ready', now(), now(), 'bob')`)
	exec(`INSERT INTO keys (id, app_id, name, state, scopes, ciphertext, fingerprint, activated_at)
		SELECT gen_random_uuid(), id, 'default', 'active', '{All}', 'c', sha256(id::bytea), now() FROM apps`)
	first := []string{"built default", "ready pro", "retired none", "shared none"}
	check("that were inserted", first...)

	exec(`UPDATE keys SET profile = NULL`)
	exec(`DROP INDEX keys_by_profile_and_age`)
	if err := postgres.MigrateUp(t.Context(), url); err != nil {
		t.Fatal(err)
	}
	check("after migrate up", first...)
	if n := count(t, conn, `pg_indexes WHERE indexname IN ('keys_by_profile_and_age', 'keys_by_age')`); n != 1 {
		t.Errorf("there are %d indexes of keys by age; want one", n)
	}

	exec(`UPDATE apps SET state = 'retired' WHERE id IN ('ready', 'shared')`)
	exec(`UPDATE apps SET state = 'ready', profile = 'default' WHERE id = 'retired'`)
	check("whose apps have changed", "built default", "ready none", "retired default", "shared none")
	exec(`UPDATE apps SET state = 'ready' WHERE id IN ('ready', 'shared')`)
	check("whose apps are in use again", "built default", "ready pro", "retired default", "shared none")
}

// `migrate up` in several processes at once is finished by one, also where it builds indexes.
func TestMigrateUpAtOnce(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	if _, err := pgtest.Conn(t, url).Exec(t.Context(), `DROP INDEX keys_by_profile_and_age`); err != nil {
		t.Fatal(err)
	}
	migrated := make(chan error)
	const processes = 4
	for range processes {
		go func() { migrated <- postgres.MigrateUp(t.Context(), url) }()
	}
	var failures error
	for range processes {
		failures = errors.Join(failures, <-migrated)
	}
	if failures != nil {
		t.Error(failures)
	}
}
