package provision_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// rolledBackTables are the tables that a request changes before it waits.
var rolledBackTables = []string{"tenants", "apps", "keys", "adoptions", "quarantines"}

// A waitingRequest changes something, and waits for the effect.
type waitingRequest struct {
	prepare func(r *provisiontest.Replica) error
	request func(r *provisiontest.Replica, leaked tenant.Secret) error
}

const waitingID, waitingKey = "user_1", "reports"

// waitingRequests returns each request that waits for its own change.
func waitingRequests(t *testing.T) map[string]waitingRequest {
	const id, name = waitingID, waitingKey
	ofTenant := func(_ tenant.Tenant, err error) error { return err }
	return map[string]waitingRequest{
		"sign-up": {request: func(r *provisiontest.Replica, _ tenant.Secret) error {
			_, _, err := r.SignUp(t.Context(), "user_2", tenant.SignUp{}, long, caller)
			return err
		}},
		"adoption": {request: func(r *provisiontest.Replica, _ tenant.Secret) error {
			_, err := r.Adopt(t.Context(), "user_2", tenant.AdoptRequest{AppID: "hand-made"}, tenant.SignUp{}, long, caller)
			return err
		}},
		"suspend": {request: func(r *provisiontest.Replica, _ tenant.Secret) error {
			return ofTenant(r.Suspend(t.Context(), id, long, caller))
		}},
		"resume": {
			prepare: func(r *provisiontest.Replica) error { return ofTenant(r.Suspend(t.Context(), id, long, caller)) },
			request: func(r *provisiontest.Replica, _ tenant.Secret) error {
				return ofTenant(r.Resume(t.Context(), id, long, caller))
			},
		},
		"delete": {request: func(r *provisiontest.Replica, _ tenant.Secret) error {
			return ofTenant(r.Delete(t.Context(), id, false, long, caller))
		}},
		"restore": {
			prepare: func(r *provisiontest.Replica) error { return ofTenant(r.Delete(t.Context(), id, false, long, caller)) },
			request: func(r *provisiontest.Replica, _ tenant.Secret) error {
				return ofTenant(r.Restore(t.Context(), id, long, caller))
			},
		},
		"add key": {request: func(r *provisiontest.Replica, _ tenant.Secret) error {
			_, _, err := r.AddKey(t.Context(), id, tenant.KeySpec{Name: "other"}, long, caller)
			return err
		}},
		"add key after one of the same name": {
			prepare: func(r *provisiontest.Replica) error {
				_, err := r.RevokeKey(t.Context(), id, name, long, caller)
				return err
			},
			request: func(r *provisiontest.Replica, _ tenant.Secret) error {
				_, _, err := r.AddKey(t.Context(), id, tenant.KeySpec{Name: name}, long, caller)
				return err
			},
		},
		"revoke key": {request: func(r *provisiontest.Replica, _ tenant.Secret) error {
			_, err := r.RevokeKey(t.Context(), id, name, long, caller)
			return err
		}},
		"rotate": {request: func(r *provisiontest.Replica, _ tenant.Secret) error {
			_, _, err := r.Rotate(t.Context(), id, tenant.NewRotation{ID: "r1", KeyName: name}, long, caller)
			return err
		}},
		"quarantine": {request: func(r *provisiontest.Replica, leaked tenant.Secret) error {
			_, err := r.Quarantine(t.Context(), leaked, long, caller)
			return err
		}},
		"quarantine of an unknown key": {request: func(r *provisiontest.Replica, _ tenant.Secret) error {
			_, err := r.Quarantine(t.Context(), tenant.NewSecret("0123456789abcdef0123456789abcdef"), long, caller)
			return err
		}},
	}
}

// begin starts the request on its own world, without workers, and returns when its change is committed,
// with the rows from before.
func (c waitingRequest) begin(t *testing.T) (w *provisiontest.World, empty, before savedRows, ended chan error) {
	t.Helper()
	w = provisiontest.New(t)
	w.AppByHand(provisiontest.PAT, "hand-made", nil)
	r := w.Start(provisiontest.Options{})
	empty = saveRows(t, w)
	signUp(t, r, waitingID)
	if _, _, err := r.AddKey(t.Context(), waitingID, tenant.KeySpec{Name: waitingKey}, long, caller); err != nil {
		t.Fatal(err)
	}
	_, leaked, err := r.Reveal(t.Context(), waitingID, waitingKey, caller)
	if err == nil && c.prepare != nil {
		err = c.prepare(r)
	}
	if err != nil {
		t.Fatal(err)
	}
	r.Stop()
	r = w.Start(provisiontest.Options{Idle: true, Adjust: func(c *provision.Config) { c.LookAgain = 20 * time.Millisecond }})
	before, ended = saveRows(t, w), make(chan error, 1)
	go func() { ended <- c.request(r, leaked) }()
	provisiontest.Eventually(t, "the change is committed", func() bool { return before.differ(t, w) })
	return w, empty, before, ended
}

const unknownKeyRequest = "quarantine of an unknown key"

// A request that waits for its own change, which a failover then loses, returns
// tenant.Unavailable: neither "not found" nor the state from before the change.
func TestLostWhileWaiting(t *testing.T) {
	t.Parallel()
	for what, c := range waitingRequests(t) {
		for _, all := range []bool{false, true} { // what the request wrote, or the whole tenant
			if all && slices.Contains([]string{"sign-up", "adoption", unknownKeyRequest}, what) {
				continue
			}
			t.Run(what+map[bool]string{true: " and the tenant"}[all], func(t *testing.T) {
				t.Parallel()
				w, empty, before, ended := c.begin(t)
				if all {
					before = empty
				}
				before.restore(t, w)
				err := <-ended
				if e, ok := errors.AsType[*tenant.Error](err); !ok || e.Kind != tenant.Unavailable || e.Code != "database_unavailable" || e.RetryAfter == 0 {
					t.Errorf("after its change was lost, a waiting request returns %v", err)
				}
			})
		}
	}
}

// A request that waits for its own change does not fail if the database cannot be read any more: the
// change is committed, and goes on.
func TestUnreadableWhileWaiting(t *testing.T) {
	t.Parallel()
	for what, c := range waitingRequests(t) {
		if what == unknownKeyRequest { // which has no result until Clarifai has been asked
			continue
		}
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			w, _, _, ended := c.begin(t)
			conn := connOf(t, w)
			if _, err := conn.Exec(t.Context(), `BEGIN; LOCK TABLE `+strings.Join(rolledBackTables, ", ")+` IN ACCESS EXCLUSIVE MODE`); err != nil {
				t.Fatal(err)
			}
			err := <-ended
			if _, rolledBack := conn.Exec(t.Context(), `ROLLBACK`); rolledBack != nil {
				t.Fatal(rolledBack)
			}
			if err != nil {
				t.Errorf("after its change was committed, a waiting request returns %v", err)
			}
		})
	}
}

// Reads that wait return tenant.NotFound, as those that do not.
func TestReadsWhileLost(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{Idle: true, Adjust: func(c *provision.Config) { c.LookAgain = 20 * time.Millisecond }})
	before := saveRows(t, w)
	if _, _, err := r.SignUp(t.Context(), "user_1", tenant.SignUp{}, 0, caller); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { _, err := r.Tenant(t.Context(), "user_1", long); ended <- err }()
	before.restore(t, w)
	if err := <-ended; !errors.Is(err, tenant.NotFound) {
		t.Errorf("a read of a tenant that was lost returns %v", err)
	}
}

// A savedRows is the content of rolledBackTables at one time, in a schema of its own.
type savedRows string

func saveRows(t *testing.T, w *provisiontest.World) savedRows {
	t.Helper()
	var schema string
	if err := connOf(t, w).QueryRow(t.Context(), `SELECT 'saved_' || translate(gen_random_uuid()::text, '-', '')`).Scan(&schema); err != nil {
		t.Fatal(err)
	}
	sql := `BEGIN; CREATE SCHEMA ` + schema
	for _, table := range rolledBackTables {
		sql += `; CREATE TABLE ` + schema + `.` + table + ` AS TABLE public.` + table
	}
	exec(t, w, sql+`; COMMIT`)
	t.Cleanup(func() { // other tests use the database
		if _, err := connOf(t, w).Exec(context.WithoutCancel(t.Context()), `DROP SCHEMA `+schema+` CASCADE`); err != nil {
			t.Error(err)
		}
	})
	return savedRows(schema)
}

// differ reports whether rows that a request writes have changed.
func (s savedRows) differ(t *testing.T, w *provisiontest.World) (differ bool) {
	t.Helper()
	sql := `SELECT false`
	for _, table := range rolledBackTables {
		sql += ` OR EXISTS (TABLE public.` + table + ` EXCEPT TABLE ` + string(s) + `.` + table + `)`
	}
	if err := connOf(t, w).QueryRow(t.Context(), sql).Scan(&differ); err != nil {
		t.Fatal(err)
	}
	return differ
}

// restore does to the rows what a failover does that loses the last transactions.
func (s savedRows) restore(t *testing.T, w *provisiontest.World) {
	t.Helper()
	sql := `BEGIN; SET LOCAL session_replication_role = replica`
	for _, table := range rolledBackTables {
		sql += `; DELETE FROM public.` + table + `; INSERT INTO public.` + table + ` OVERRIDING SYSTEM VALUE TABLE ` + string(s) + `.` + table
	}
	exec(t, w, sql+`; COMMIT`)
}
