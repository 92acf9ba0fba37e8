package provision_test

import (
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// lives goes through what is done for tenants, for many at once.
func lives(t *testing.T, r *provisiontest.Replica, n int) {
	t.Helper()
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() {
			id := tenant.ID(fmt.Sprint("user_", i))
			up := tenant.SignUp{Labels: map[string]string{"n": fmt.Sprint(i)}}
			err := retried(t, func() error {
				got, _, err := r.SignUp(t.Context(), id, up, 20*time.Second, caller)
				if err == nil && got.State != tenant.Active {
					err = fmt.Errorf("it is %s", got.State)
				}
				return err
			})
			if err != nil {
				t.Errorf("sign-up of %s: %v", id, err)
				return
			}
			for what, do := range map[string]func() error{
				"look-up": func() error { _, err := r.DB.Tenant(t.Context(), id); return err },
				"list": func() error {
					_, err := r.DB.TenantLabels(t.Context(), id)
					return err
				},
				"reveal": func() error { _, _, err := r.Reveal(t.Context(), id, "default", caller); return err },
				"keys":   func() error { _, err := r.DB.Keys(t.Context(), id); return err },
				"rotation": func() error {
					overlap := time.Duration(0)
					_, _, err := r.Rotate(t.Context(), id, tenant.NewRotation{ID: "first", KeyName: "default", Overlap: &overlap}, 20*time.Second, caller)
					return err
				},
			} {
				if err := retried(t, do); err != nil {
					t.Errorf("%s of %s: %v", what, id, err)
				}
			}
			if i%2 == 0 {
				if err := retried(t, func() error { _, err := r.Suspend(t.Context(), id, 20*time.Second, caller); return err }); err != nil {
					t.Errorf("suspension of %s: %v", id, err)
				}
			}
		})
	}
	all.Wait()
}

// retried does again what the answer says to do again.
func retried(t *testing.T, do func() error) error {
	for range 50 {
		err := do()
		if !errors.Is(err, tenant.Unavailable) {
			return err
		}
		t.Log(err)
	}
	return do()
}

// The engine works by a PgBouncer in transaction mode, and its statements are prepared
// once for each of the few connections and used again by all.
func TestBehindPgBouncer(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	through := pgtest.Bouncer(t, w.URL, 200)
	r := w.Start(provisiontest.Options{Adjust: pool(5, 5), Through: through})
	poolIs(t, w, 5)
	lives(t, r, 20)

	conn := pgtest.Conn(t, through)
	rows, _ := conn.Query(t.Context(), `SELECT count(*), coalesce(sum(generic_plans + custom_plans), 0)::bigint FROM pg_prepared_statements
		WHERE statement LIKE '%attributes_hash FROM tenants%'`, pgx.QueryExecModeSimpleProtocol)
	var statements, runs int
	if _, err := pgx.ForEachRow(rows, []any{&statements, &runs}, func() error { return nil }); err != nil {
		t.Fatal(err)
	}
	if statements == 0 || runs <= statements {
		t.Errorf("a connection of PgBouncer's has the sign-up's last statement prepared %d times, and ran it %d times; want it prepared, and run again", statements, runs)
	}
}

// Where the pooler keeps no prepared statements, Tenantry notices and does without.
func TestBehindPgBouncerWithoutPrepared(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	through := pgtest.Bouncer(t, w.URL, 0)
	r := w.Start(provisiontest.Options{Adjust: pool(5, 5), Through: through})
	poolIs(t, w, 5)
	lives(t, r, 20)
	if r.Logs.FilterMessageSnippet("loses prepared statements").Len() != 1 {
		t.Error("it does not say once that the pooler loses prepared statements")
	}
}
