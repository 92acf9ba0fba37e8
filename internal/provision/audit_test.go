package provision_test

import (
	"slices"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// What workers write down has Clarifai's id of the call that it comes of, be it one
// that succeeded or one that found nothing.
func TestEventsNameUpstreamRequests(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	idle := w.Start(provisiontest.Options{Idle: true})
	if _, _, err := idle.SignUp(t.Context(), "user_1", tenant.SignUp{}, 0, caller); err != nil {
		t.Fatal(err)
	}
	conn := pgtest.Conn(t, w.URL)
	var foreign string
	if err := conn.QueryRow(t.Context(), `SELECT id FROM apps`).Scan(&foreign); err != nil {
		t.Fatal(err)
	}
	makeForeignApp(t, w, foreign)
	r := w.Start(provisiontest.Options{})
	signUp(t, r, "user_1") // after app.abandoned: tenant.activated
	marked(t, w)
	askClarifai(t, w, "DELETE", "/keys/"+w.AppKeys()[0].ID, nil)
	done, _ := report(t, r)
	repair(t, r, done.Token) // key.gone, key.created
	provisiontest.Eventually(t, "the key is made again", func() bool {
		return countOf(t, conn, `keys WHERE state = 'active'`) == 1
	})
	exec(t, w, `UPDATE keys SET state = 'revoking' WHERE state = 'active'`)
	exec(t, w, `INSERT INTO apps (id, profile, profile_revision, state) VALUES ('t-never-made', 'default', 'x', 'purging')`)
	provisiontest.Eventually(t, "all is removed", func() bool {
		return countOf(t, conn, `audit_events WHERE action IN ('app.deleted', 'key.revoked')`) == 2
	})

	rows, _ := conn.Query(t.Context(), `SELECT action FROM audit_events WHERE upstream_request_id LIKE 'tenantry%' ORDER BY action`)
	got, err := pgx.CollectRows(rows, pgx.RowTo[string])
	want := []string{"app.abandoned", "app.deleted", "key.created", "key.gone", "key.revoked", "tenant.activated"}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("events with an upstream request are %q, %v; want %q", got, err, want)
	}
	if n := countOf(t, conn, `audit_events WHERE upstream_request_id IS NOT NULL AND action IN ('tenant.created', 'reconciliation.started')`); n != 0 {
		t.Errorf("%d events of API requests have an upstream request", n)
	}
}

func countOf(t *testing.T, conn *pgx.Conn, of string) int {
	t.Helper()
	var n int
	if err := conn.QueryRow(t.Context(), `SELECT count(*) FROM `+of).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

// A service seals its audit log by itself, and says up to when.
func TestAuditIsSealed(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	signUp(t, r, "user_1")
	conn := pgtest.Conn(t, w.URL)
	sealed := func() bool {
		return countOf(t, conn, `audit_events WHERE id > coalesce((SELECT max(last_id) FROM audit_seals), 0)`) == 0
	}
	provisiontest.Eventually(t, "the log is sealed", sealed)
	signUp(t, r, "user_2")
	provisiontest.Eventually(t, "the log is sealed again", sealed)
	check, err := r.DB.VerifyAudit(t.Context(), 0, func(f tenant.AuditFinding) { t.Errorf("found %+v", f) })
	if err != nil || check.Seals < 2 {
		t.Errorf("VerifyAudit = %+v, %v; want no fault in several seals", check, err)
	}

	// It goes on after a failure, which is logged once.
	exec(t, w, `ALTER TABLE audit_seals RENAME TO audit_seals_away`)
	defer func() { exec(t, w, `ALTER TABLE IF EXISTS audit_seals_away RENAME TO audit_seals`) }()
	provisiontest.Eventually(t, "the failure is logged", func() bool {
		return r.Logs.FilterMessage("the audit log cannot be sealed; it is tried again at every turn").Len() == 1
	})
	exec(t, w, `ALTER TABLE audit_seals_away RENAME TO audit_seals`)
	provisiontest.Eventually(t, "it is sealed again", func() bool {
		return r.Logs.FilterMessage("the audit log is sealed again").Len() == 1
	})
}
