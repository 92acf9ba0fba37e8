package postgres_test

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/tenant"
)

func addCaller(t *testing.T, db *postgres.DB, c tenant.NewCaller) (tenant.Token, tenant.Caller) {
	t.Helper()
	token, _ := tenant.NewToken()
	made, err := db.AddCaller(t.Context(), token, c, actor)
	if err != nil {
		t.Fatal(err)
	}
	return token, made
}

func detail(t *testing.T, url tenant.Secret, action, tokenID string) map[string]any {
	t.Helper()
	var d map[string]any
	if err := pgtest.Conn(t, url).QueryRow(t.Context(), `SELECT detail FROM audit_events WHERE action = $1 AND detail->>'token_id' = $2`,
		action, tokenID).Scan(&d); err != nil {
		t.Fatalf("the event %s of %s: %v", action, tokenID, err)
	}
	return d
}

// A token that is limited is none to code that does not know of limits.
func TestLimitedCallerOnOldCode(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	conn, db := pgtest.Conn(t, url), pgtest.OpenURL(t, url)
	scope := tenant.Scope{"product": "a", "stage": "live"}
	limited, made := addCaller(t, db, tenant.NewCaller{Name: "a", Role: tenant.Provisioner, Scope: scope, RateLimit: 7})
	open, _ := addCaller(t, db, tenant.NewCaller{Name: "all", Role: tenant.Provisioner})
	next, _ := tenant.NewToken()
	if _, err := db.RotateCaller(t.Context(), limited.ID, next, tenant.TokenRotation{Overlap: time.Hour}, actor); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		token tenant.Token
		scope tenant.Scope
		old   int
	}{"limited": {limited, scope, 0}, "rotated": {next, scope, 0}, "open": {open, tenant.Scope{}, 1}} {
		got, _, err := db.Authenticate(t.Context(), c.token)
		if diff := cmp.Diff(c.scope, got.Scope); err != nil || diff != "" {
			t.Errorf("%s: Authenticate fails with %v, or with another scope: %s", name, err, diff)
		}
		if n := count(t, conn, `callers WHERE token_id = $1 AND secret_sha256 = $2 AND revoked_at IS NULL`, c.token.ID, c.token.Hash); n != c.old {
			t.Errorf("%s: code that does not know of limits finds %d tokens; want %d", name, n, c.old)
		}
	}
	if made.RateLimit != 7 || made.Name != "a" || made.TokenID != limited.ID {
		t.Errorf("AddCaller = %+v", made)
	}
	want := map[string]any{"token_id": limited.ID, "name": "a", "role": "provisioner", "expires_at": nil,
		"labels": map[string]any{"product": "a", "stage": "live"}, "rate_limit": 7.0}
	if diff := cmp.Diff(want, detail(t, url, "token.created", limited.ID)); diff != "" {
		t.Errorf("the event of a new caller differs: %s", diff)
	}
}

func TestRotateCaller(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	db := pgtest.OpenURL(t, url)
	rotate := func(id string, r tenant.TokenRotation) (tenant.Token, tenant.Caller, error) {
		next, _ := tenant.NewToken()
		c, err := db.RotateCaller(t.Context(), id, next, r, actor)
		return next, c, err
	}
	refused := func(id, code string) {
		t.Helper()
		_, _, err := rotate(id, tenant.TokenRotation{Overlap: time.Hour})
		if e, ok := errors.AsType[*tenant.Error](err); !ok || e.Code != code {
			t.Errorf("rotating %s fails with %v; want %s", id, err, code)
		}
	}
	works := func(token tenant.Token, want bool) {
		t.Helper()
		if _, _, err := db.Authenticate(t.Context(), token); (err == nil) != want {
			t.Errorf("Authenticate fails with %v; want success: %v", err, want)
		}
	}
	about := func(got, want time.Time) {
		t.Helper()
		if d := got.Sub(want); d < -time.Minute || d > time.Minute {
			t.Errorf("the time is %v; want about %v", got, want)
		}
	}
	now := time.Now()

	// The overlap ends the old token, and the new one lives as long as the old was to.
	long, _ := addCaller(t, db, tenant.NewCaller{Name: "long", Role: tenant.Admin, ExpiresAt: now.Add(90 * time.Hour), RateLimit: 5})
	next, c, err := rotate(long.ID, tenant.TokenRotation{Overlap: time.Hour})
	if err != nil || c.TokenID != next.ID || c.Name != "long" || c.Role != tenant.Admin || c.RateLimit != 5 {
		t.Fatalf("RotateCaller = %+v, %v", c, err)
	}
	about(c.ExpiresAt, now.Add(90*time.Hour))
	old, err := db.Caller(t.Context(), long.ID)
	if err != nil || old.ReplacedBy != next.ID || !old.RevokedAt.IsZero() {
		t.Errorf("the old caller is %+v, %v", old, err)
	}
	about(old.ExpiresAt, now.Add(time.Hour))
	works(long, true)
	works(next, true)
	d := detail(t, url, "token.rotated", long.ID)
	before, after := d["before"].(map[string]any), d["after"].(map[string]any)
	if d["replaced_by"] != next.ID || before["expires_at"] == after["expires_at"] || before["expires_at"] == nil {
		t.Errorf("the event of the rotation is %v", d)
	}
	if d := detail(t, url, "token.created", next.ID); d["replaces"] != long.ID || d["name"] != "long" {
		t.Errorf("the event of the new token is %v", d)
	}

	// An overlap never lengthens a life.
	short, _ := addCaller(t, db, tenant.NewCaller{Name: "short", Role: tenant.Viewer, ExpiresAt: now.Add(time.Hour)})
	if _, _, err := rotate(short.ID, tenant.TokenRotation{Overlap: 48 * time.Hour, ExpiresAt: now.Add(200 * time.Hour)}); err != nil {
		t.Fatal(err)
	}
	old, err = db.Caller(t.Context(), short.ID)
	if err != nil {
		t.Fatal(err)
	}
	about(old.ExpiresAt, now.Add(time.Hour))
	if next, err := db.Caller(t.Context(), old.ReplacedBy); err != nil {
		t.Error(err)
	} else {
		about(next.ExpiresAt, now.Add(200*time.Hour))
	}

	// Without an overlap, the old token works no longer.
	plain, _ := addCaller(t, db, tenant.NewCaller{Name: "plain", Role: tenant.Viewer})
	next, c, err = rotate(plain.ID, tenant.TokenRotation{})
	if err != nil || !c.ExpiresAt.IsZero() {
		t.Errorf("RotateCaller = %+v, %v; want a token that does not expire", c, err)
	}
	works(plain, false)
	works(next, true)

	refused(plain.ID, "caller_rotated")
	refused(long.ID, "caller_rotated")
	refused("nobody", "caller_not_found")
	expired, _ := addCaller(t, db, tenant.NewCaller{Name: "expired", Role: tenant.Viewer, ExpiresAt: now.Add(-time.Hour)})
	refused(expired.ID, "caller_expired")
	revoked, _ := addCaller(t, db, tenant.NewCaller{Name: "revoked", Role: tenant.Viewer})
	if _, err := db.RevokeCaller(t.Context(), revoked.ID, actor); err != nil {
		t.Fatal(err)
	}
	refused(revoked.ID, "caller_revoked")

	// Of many at once, one rotates. All are held up until all have begun.
	many, _ := addCaller(t, db, tenant.NewCaller{Name: "many", Role: tenant.Viewer})
	conn := pgtest.Conn(t, url)
	hold, err := pgtest.Conn(t, url).Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := hold.Exec(t.Context(), `SELECT FROM callers WHERE token_id = $1 FOR UPDATE`, many.ID); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	failed := make(chan error, 4)
	for range cap(failed) {
		wg.Go(func() {
			_, _, err := rotate(many.ID, tenant.TokenRotation{Overlap: time.Hour})
			failed <- err
		})
	}
	deadline := time.After(time.Minute)
	for count(t, conn, `pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`) < cap(failed) {
		select {
		case <-deadline:
			t.Fatal("the rotations do not wait for the caller's row")
		case <-time.After(20 * time.Millisecond):
		}
	}
	if err := hold.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	close(failed)
	done := 0
	for err := range failed {
		if err == nil {
			done++
		} else if !errors.Is(err, tenant.Conflict) {
			t.Errorf("a rotation beside others fails with %v", err)
		}
	}
	if n := count(t, conn, `callers WHERE name = 'many'`); done != 1 || n != 2 {
		t.Errorf("%d of many rotations are done, and there are %d tokens; want 1 and 2", done, n)
	}
}

// However many revoke at once, one token is left that can manage callers.
func TestLastAdmin(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	db := pgtest.OpenURL(t, url)
	var admins []string
	for i := range 6 {
		token, _ := addCaller(t, db, tenant.NewCaller{Name: fmt.Sprint("admin ", i), Role: tenant.Admin})
		admins = append(admins, token.ID)
	}
	others := []tenant.NewCaller{
		{Name: "limited", Role: tenant.Admin, Scope: tenant.Scope{"product": "a"}},
		{Name: "expired", Role: tenant.Admin, ExpiresAt: time.Now().Add(-time.Hour)},
		{Name: "viewer", Role: tenant.Viewer},
	}
	var rest []string
	for _, c := range others {
		token, _ := addCaller(t, db, c)
		rest = append(rest, token.ID)
	}
	var wg sync.WaitGroup
	for _, id := range admins {
		wg.Go(func() {
			_, err := db.RevokeCallerUnlessLast(t.Context(), id, actor)
			if e, ok := errors.AsType[*tenant.Error](err); err != nil && (!ok || e.Code != "last_admin") {
				t.Errorf("RevokeCallerUnlessLast fails with %v", err)
			}
		})
	}
	wg.Wait()
	conn := pgtest.Conn(t, url)
	const left = `callers WHERE name LIKE 'admin %' AND revoked_at IS NULL`
	if n := count(t, conn, left); n != 1 {
		t.Errorf("%d admins are left; want 1", n)
	}
	for _, id := range rest {
		for range 2 {
			if c, err := db.RevokeCallerUnlessLast(t.Context(), id, actor); err != nil || c.RevokedAt.IsZero() {
				t.Errorf("revoking another caller = %+v, %v", c, err)
			}
		}
	}
	if _, err := db.RevokeCallerUnlessLast(t.Context(), "nobody", actor); !errors.Is(err, tenant.NotFound) {
		t.Errorf("revoking nobody fails with %v", err)
	}
	for _, id := range admins { // on the database, all can be revoked
		if _, err := db.RevokeCaller(t.Context(), id, actor); err != nil {
			t.Error(err)
		}
	}
	if n := count(t, conn, left); n != 0 {
		t.Errorf("%d admins are left; want none", n)
	}
}

func TestCallersPages(t *testing.T) {
	t.Parallel()
	db := pgtest.OpenURL(t, pgtest.URL(t))
	var want, got []string
	for i := range 5 {
		token, _ := addCaller(t, db, tenant.NewCaller{Name: fmt.Sprint(i), Role: tenant.Viewer})
		want = append(want, token.ID)
	}
	after := ""
	for {
		page, err := db.Callers(t.Context(), after, 2)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range page {
			got = append(got, c.TokenID)
		}
		if len(page) < 2 {
			break
		}
		after = page[1].TokenID
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the pages differ: %s", diff)
	}
}

// The scope of a list is beside its filter and not merged with it.
func TestTenantsWithin(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	conn, db := pgtest.Conn(t, url), pgtest.OpenURL(t, url)
	for id, labels := range map[string]string{"a1": `{"product":"a","plan":"pro"}`, "a2": `{"product":"a"}`, "b": `{"product":"b","plan":"pro"}`, "none": `{}`} {
		if _, err := conn.Exec(t.Context(), `INSERT INTO tenants (id, profile, labels, attributes_hash) VALUES ($1, 'default', $2, $3)`,
			id, labels, tenant.Attributes{}.Hash()); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		within, labels tenant.Scope
		want           string
	}{
		{nil, nil, "a1 a2 b none"},
		{tenant.Scope{"product": "a"}, nil, "a1 a2"},
		{tenant.Scope{"product": "a"}, tenant.Scope{"plan": "pro"}, "a1"},
		{tenant.Scope{"product": "a"}, tenant.Scope{"product": "b"}, ""},
		{tenant.Scope{"product": "a", "plan": "free"}, nil, ""},
	} {
		got, err := db.Tenants(t.Context(), postgres.TenantFilter{Labels: c.labels, Within: c.within}, postgres.Position{}, 10)
		if err != nil {
			t.Fatal(err)
		}
		ids := map[string]bool{}
		for _, tt := range got {
			ids[string(tt.ID)] = true
		}
		want := map[string]bool{}
		for _, id := range strings.Fields(c.want) {
			want[id] = true
		}
		if diff := cmp.Diff(want, ids); diff != "" {
			t.Errorf("%v within %v: %s", c.labels, c.within, diff)
		}
	}
	if labels, err := db.TenantLabels(t.Context(), "a1"); err != nil || !cmp.Equal(labels, map[string]string{"product": "a", "plan": "pro"}) {
		t.Errorf("TenantLabels = %v, %v", labels, err)
	}
	if _, err := db.TenantLabels(t.Context(), "nobody"); !errors.Is(err, tenant.NotFound) {
		t.Errorf("TenantLabels of nobody fails with %v", err)
	}
}
