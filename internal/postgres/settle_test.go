package postgres_test

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// changing inserts a tenant in a state, with a key in each of the given states.
func changing(t *testing.T, conn *pgx.Conn, id tenant.ID, state tenant.State, keys ...tenant.KeyState) []uuid.UUID {
	t.Helper()
	if _, err := conn.Exec(t.Context(), `
		INSERT INTO apps (id, profile, profile_revision, state, made_at, ready_at, marked_at, tenant_id, tenant_generation)
		VALUES ($1, 'default', 'x', 'held', now(), now(), now(), $2, 1)`, "app-"+id, id); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec(t.Context(), `
		INSERT INTO tenants (id, profile, state, app_id, attributes_hash) VALUES ($1, 'default', $2, $3, repeat('x', 64)::bytea)`,
		id, state, "app-"+id); err != nil {
		t.Fatal(err)
	}
	ids := make([]uuid.UUID, len(keys))
	for i, key := range keys {
		ids[i] = uuid.Must(uuid.NewV7())
		if _, err := conn.Exec(t.Context(), `
			INSERT INTO keys (id, app_id, name, state, scopes, ciphertext, fingerprint)
			VALUES ($1::uuid, $2, $3, $4::text, '{All}', CASE WHEN $4 <> 'creating' THEN 'c'::bytea END, CASE WHEN $4 <> 'creating' THEN sha256($1::text::bytea) END)`,
			ids[i], "app-"+id, fmt.Sprint("key-", i), key); err != nil {
			t.Fatal(err)
		}
	}
	return ids
}

// Each transaction that ends or makes the last key that a tenant waits for settles the tenant.
func TestLastKeySettlesTenant(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	conn, db := pgtest.Conn(t, url), pgtest.OpenURL(t, url)
	leased := func(id uuid.UUID) tenant.LeasedKey {
		t.Helper()
		k, err := one(db.LeaseKeys(t.Context(), []uuid.UUID{id}, time.Minute))
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	expire := func(key uuid.UUID) error {
		if _, err := conn.Exec(t.Context(), `UPDATE keys SET expires_at = now() WHERE id = $1`, key); err != nil {
			return err
		}
		return db.EndDueKeys(t.Context(), actor)
	}
	for name, c := range map[string]struct {
		from, to tenant.State
		key      tenant.KeyState
		end      func(key uuid.UUID) error
	}{
		"the key is revoked": {tenant.Suspending, tenant.Suspended, tenant.KeyRevoking, func(key uuid.UUID) error {
			return db.KeyEnded(t.Context(), leased(key), nil, actor)
		}},
		"the key is lost": {tenant.Suspending, tenant.Suspended, tenant.KeyRevoking, func(key uuid.UUID) error {
			return db.KeyEnded(t.Context(), leased(key), &tenant.Problem{Code: "key_lost"}, actor)
		}},
		"the key works": {tenant.Resuming, tenant.Active, tenant.KeyCreating, func(key uuid.UUID) error {
			return db.FinishLeasedKey(t.Context(), leased(key), tenant.SealedKey{Ciphertext: []byte("c"), Fingerprint: []byte("f")}, actor)
		}},
		"the key expires before its call": {tenant.Resuming, tenant.Active, tenant.KeyCreating, expire},
		"the key expires during its call": {tenant.Resuming, tenant.Active, tenant.KeyCreating, func(key uuid.UUID) error {
			if _, err := conn.Exec(t.Context(), `UPDATE keys SET in_doubt_since = now() WHERE id = $1`, key); err != nil {
				return err
			}
			return expire(key)
		}},
		"the key is not replaced": {tenant.Resuming, tenant.Active, tenant.KeyCreating, func(key uuid.UUID) error {
			return db.KeyNotReplaced(t.Context(), leased(key), actor)
		}},
	} {
		id := tenant.ID(uuid.NewString())
		key := changing(t, conn, id, c.from, c.key)[0]
		if err := c.end(key); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if is, err := db.Tenant(t.Context(), id); err != nil || is.State != c.to {
			t.Errorf("%s: the tenant is %s, %v; want %s", name, is.State, err, c.to)
		}
		if n := count(t, conn, `audit_events WHERE tenant_id = $1 AND action = 'tenant.' || $2`, id, c.to); n != 1 {
			t.Errorf("%s: %d events say that the tenant is %s; want 1", name, n, c.to)
		}
	}
}

// Of two transactions that end the last two keys at once, one settles the tenant.
func TestLastKeysAtOnce(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	conn, db := pgtest.Conn(t, url), pgtest.OpenURL(t, url)
	stateOf := func(id tenant.ID) tenant.State {
		t.Helper()
		is, err := db.Tenant(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		return is.State
	}

	for i := range 20 {
		id := tenant.ID(fmt.Sprint("both-", i))
		keys := changing(t, conn, id, tenant.Suspending, tenant.KeyRevoking, tenant.KeyRevoking)
		var ending sync.WaitGroup
		for _, key := range keys {
			ending.Go(func() {
				k, err := one(db.LeaseKeys(t.Context(), []uuid.UUID{key}, time.Minute))
				if err == nil {
					err = db.KeyEnded(t.Context(), k, nil, actor)
				}
				if err != nil {
					t.Error(err)
				}
			})
		}
		ending.Wait()
		if is := stateOf(id); is != tenant.Suspended {
			t.Errorf("after the ends of both keys the tenant is %s", is)
		}
	}

	// A transaction that makes the one key, and has not seen the end of the other.
	key := changing(t, conn, "expiry", tenant.Resuming, tenant.KeyCreating)[0]
	if _, err := conn.Exec(t.Context(), `UPDATE keys SET expires_at = now() WHERE id = $1`, key); err != nil {
		t.Fatal(err)
	}
	tx, err := conn.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(t.Context(), `SELECT FROM tenants WHERE id = 'expiry' FOR UPDATE`); err != nil {
		t.Fatal(err)
	}
	if err := db.EndDueKeys(t.Context(), actor); err != nil {
		t.Fatal(err)
	}
	if k, err := db.Key(t.Context(), "expiry", "key-0"); err != nil || k.State != tenant.KeyCreating {
		t.Errorf("while another transaction has the lock of the tenant the key becomes %s, %v: nobody may settle the tenant", k.State, err)
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := db.EndDueKeys(t.Context(), actor); err != nil {
		t.Fatal(err)
	}
	if is := stateOf("expiry"); is != tenant.Active {
		t.Errorf("after the expiry of its key the tenant is %s", is)
	}
}

// A tenant whose keys were changed by hand is settled by the sweep, which reads few tenants at a time.
func TestSettleTenants(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	conn, db := pgtest.Conn(t, url), pgtest.OpenURL(t, url)
	const others = 350
	for i := range others {
		changing(t, conn, tenant.ID(fmt.Sprint("other-", i)), []tenant.State{tenant.Suspending, tenant.Resuming}[i%2],
			[]tenant.KeyState{tenant.KeyRevoking, tenant.KeyCreating}[i%2])
	}
	for turn, id := range []tenant.ID{"first", "second"} { // the second when all have been read
		changing(t, conn, id, tenant.Suspending)
		changing(t, conn, id+"-resuming", tenant.Resuming)
		for calls := 0; ; calls++ {
			is, err := db.Tenant(t.Context(), id)
			if err != nil {
				t.Fatal(err)
			}
			other, err := db.Tenant(t.Context(), id+"-resuming")
			if err != nil {
				t.Fatal(err)
			}
			if is.State == tenant.Suspended && other.State == tenant.Active {
				break
			}
			if calls == 4 {
				t.Fatalf("after %d calls of turn %d the tenants are %s and %s", calls, turn, is.State, other.State)
			}
			if err := db.SettleTenants(t.Context(), actor); err != nil {
				t.Fatal(err)
			}
		}
	}
	if n := count(t, conn, `tenants WHERE state IN ('suspending', 'resuming')`); n != others {
		t.Errorf("%d tenants wait for their keys; want %d", n, others)
	}
}
