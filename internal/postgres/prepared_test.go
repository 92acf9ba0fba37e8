package postgres_test

import (
	"errors"
	"fmt"
	"testing"

	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// Statements are prepared before a migration and sent after it. One that adds a column
// is not noticed; one that changes a type, in what a statement answers, fails it once
// on a connection, so that the caller comes again.
func TestMigrationUnderPreparedStatements(t *testing.T) {
	t.Parallel()
	url := pgtest.EmptyURL(t)
	if err := postgres.MigrateUp(t.Context(), url); err != nil {
		t.Fatal(err)
	}
	db, err := postgres.Open(t.Context(), postgres.Config{URL: url, MaxConns: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	conn := pgtest.Conn(t, url)
	n := 0
	calls := map[string]func() error{
		"look-up": func() error { _, err := db.Tenant(t.Context(), "user_1"); return err },
		"sign-up": func() error {
			n++
			_, err := db.SignUp(t.Context(), newTenant(tenant.ID(fmt.Sprint("user_", n))), actor)
			return err
		},
	}
	for range 3 {
		for _, what := range []string{"sign-up", "look-up"} {
			if err := calls[what](); err != nil {
				t.Fatalf("%s: %v", what, err)
			}
		}
	}
	if _, err := conn.Exec(t.Context(), `ALTER TABLE tenants ADD COLUMN added text; ALTER TABLE apps ADD COLUMN added text NOT NULL DEFAULT 'x'`); err != nil {
		t.Fatal(err)
	}
	for what, call := range calls {
		if err := call(); err != nil {
			t.Errorf("%s with a column more: %v", what, err)
		}
	}
	for what, call := range calls {
		for _, to := range []string{"integer", "bigint"} {
			if err := call(); err != nil { // prepares it
				t.Fatalf("%s: %v", what, err)
			}
			if _, err := conn.Exec(t.Context(), `ALTER TABLE tenants ALTER COLUMN version TYPE `+to); err != nil {
				t.Fatal(err)
			}
			var e *tenant.Error
			if err := call(); !errors.As(err, &e) || e.Kind != tenant.Unavailable || e.RetryAfter == 0 {
				t.Errorf("%s with a column of another type reports %v; want that it be tried again", what, err)
			}
			if err := call(); err != nil {
				t.Errorf("%s tried again: %v", what, err)
			}
		}
	}
}
