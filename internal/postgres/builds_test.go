package postgres_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"pgregory.net/rapid"

	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// gate stops each transaction that inserts apps at its commit, while a session holds its lock.
const gate = `
	CREATE FUNCTION test_gate() RETURNS trigger LANGUAGE plpgsql AS $$
	BEGIN
		PERFORM pg_advisory_xact_lock_shared(7);
		RETURN NULL;
	END $$;
	CREATE CONSTRAINT TRIGGER test_gate AFTER INSERT ON apps DEFERRABLE INITIALLY DEFERRED
		FOR EACH ROW EXECUTE FUNCTION test_gate();
	SELECT pg_advisory_lock(7)`

func next(n int) tenant.NextBuilds {
	return tenant.NextBuilds{Profile: profile, IDs: appIDs(n), Limits: limits}
}

func appIDs(n int) []tenant.AppID {
	ids := make([]tenant.AppID, n)
	for i := range ids {
		ids[i] = tenant.AppID("t-" + uuid.NewString()[:20])
	}
	return ids
}

// leased leases a build, up to the creation of its key, and returns what ends it.
func leased(ctx context.Context, db *postgres.DB, id tenant.AppID) (tenant.App, tenant.SealedKey, error) {
	key := uuid.Must(uuid.NewV7())
	sealed := tenant.SealedKey{ID: key, Ciphertext: []byte("c"), Fingerprint: []byte(key.String()), Hint: "cdef"}
	apps, err := db.LeaseApps(ctx, []tenant.AppID{id}, time.Minute)
	if err != nil || len(apps) == 0 {
		return tenant.App{}, sealed, errors.Join(err, tenant.ErrLeaseLost)
	}
	a := apps[0]
	if err := db.AppMade(ctx, a); err != nil {
		return a, sealed, err
	}
	_, err = db.BeginKey(ctx, a, tenant.NewKeyRow{ID: key, Name: "default", Scopes: []string{"All"}})
	return a, sealed, err
}

func builds(t *testing.T, conn *pgx.Conn) []tenant.AppID {
	t.Helper()
	rows, _ := conn.Query(t.Context(), `SELECT id FROM apps WHERE state = 'building' ORDER BY id`)
	ids, err := pgx.CollectRows(rows, pgx.RowTo[tenant.AppID])
	if err != nil {
		t.Fatal(err)
	}
	return ids
}

// Whatever begins builds at once, in however many replicas: no more begin than tenants wait.
func TestBuildsBegunAtOnce(t *testing.T) {
	t.Parallel()
	const lost, finished, abandoned, signedUp = 8, 4, 3, 2
	url := pgtest.URL(t)
	conn := pgtest.Conn(t, url)
	pgtest.KnowControl(t, url)
	db := pgtest.OpenURL(t, url)
	for i := range lost + finished + abandoned {
		if _, err := db.SignUp(t.Context(), newTenant(tenant.ID(fmt.Sprintf("user_%02d", i))), actor); err != nil {
			t.Fatal(err)
		}
	}
	began := builds(t, conn)
	if len(began) != lost+finished+abandoned {
		t.Fatalf("%d builds run; want one for each tenant", len(began))
	}
	if _, err := conn.Exec(t.Context(), `UPDATE apps SET state = 'deleted' WHERE id = ANY ($1)`, began[:lost]); err != nil {
		t.Fatal(err)
	}
	var writers []func(db *postgres.DB) error
	for _, id := range began[lost:][:finished] {
		a, key, err := leased(t.Context(), db, id)
		if err != nil {
			t.Fatal(err)
		}
		writers = append(writers, func(db *postgres.DB) error {
			return db.FinishBuild(t.Context(), a, tenant.BuildEnd{Key: key, Next: next(1)}, actor)
		})
	}
	for _, id := range began[lost+finished:] {
		a, _, err := leased(t.Context(), db, id)
		if err != nil {
			t.Fatal(err)
		}
		writers = append(writers, func(db *postgres.DB) error {
			return db.AbandonApp(t.Context(), a, true, "test", next(1), actor)
		})
	}
	for i := range signedUp {
		writers = append(writers, func(db *postgres.DB) error {
			_, err := db.SignUp(t.Context(), newTenant(tenant.ID(fmt.Sprint("late_", i))), actor)
			return err
		})
	}
	writers = append(writers, func(db *postgres.DB) error { return db.StartBuilds(t.Context(), next(64)) })

	if _, err := conn.Exec(t.Context(), gate); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var ended atomic.Int64
	for _, write := range writers {
		db := pgtest.OpenURL(t, url)
		wg.Go(func() {
			if err := write(db); err != nil {
				t.Error(err)
			}
			ended.Add(1)
		})
	}
	until(t, "all have ended or wait for a lock", func() bool {
		return int(ended.Load())+count(t, conn, `pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`) >= len(writers)
	})
	if _, err := conn.Exec(t.Context(), `SELECT pg_advisory_unlock(7)`); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	if waiting, building := count(t, conn, `tenants WHERE state = 'provisioning'`), len(builds(t, conn)); waiting != lost+abandoned+signedUp || building != waiting {
		t.Errorf("%d tenants wait, and %d builds run; want %d of each", waiting, building, lost+abandoned+signedUp)
	}
}

// Whatever sign-ups, imports, ends of builds and sweeps of two replicas come at once, in whatever order: there
// are never more apps without a tenant than tenants that need one and the pool's target, and in the end there
// are as many.
func TestBuildsFollowDemand(t *testing.T) {
	t.Parallel()
	const mostTarget = 3
	for name, value := range map[string]string{"rapid.checks": "30", "rapid.steps": "12", "rapid.nofailfile": "true"} {
		given := false
		flag.Visit(func(f *flag.Flag) { given = given || f.Name == name })
		if !given {
			if err := flag.Set(name, value); err != nil {
				t.Fatal(err)
			}
		}
	}
	url := pgtest.URL(t)
	conn := pgtest.Conn(t, url)
	pgtest.KnowControl(t, url)
	replicas := []*postgres.DB{pgtest.OpenURL(t, url), pgtest.OpenURL(t, url)}
	sequence := 0
	rapid.Check(t, func(rt *rapid.T) {
		sequence++
		p := tenant.Profile{Name: fmt.Sprint("p", sequence), BaseWorkflow: "Empty", KeyScopes: []string{"All"}}
		if rapid.Bool().Draw(rt, "pool") {
			p.PoolMax = mostTarget
		}
		exec := func(sql string, args ...any) {
			if _, err := conn.Exec(t.Context(), sql, args...); err != nil {
				rt.Fatal(err)
			}
		}
		number := func(sql string) (n int) {
			if err := conn.QueryRow(t.Context(), `SELECT count(*) FROM `+sql+` AND profile = $1`, p.Name).Scan(&n); err != nil {
				rt.Fatal(err)
			}
			return n
		}
		found := func(sql string) []string {
			rows, _ := conn.Query(t.Context(), sql, p.Name)
			ids, err := pgx.CollectRows(rows, pgx.RowTo[string])
			if err != nil {
				rt.Fatal(err)
			}
			return ids
		}
		target := 0
		plan := func(to int) {
			if p.Pools() {
				target = to
				exec(`INSERT INTO pools (profile, revision, target, planned_at, sign_ups, hits, misses) VALUES ($1, $2, $3, now(), 0, 0, 0)
					ON CONFLICT (profile) DO UPDATE SET target = $3`, p.Name, p.Revision(), to)
			}
		}
		plan(mostTarget)
		next := func(n int) tenant.NextBuilds { return tenant.NextBuilds{Profile: p, IDs: appIDs(n), Limits: limits} }
		up := func(id string) tenant.NewTenant {
			n := newTenant(tenant.ID(id))
			n.Profile = p
			return n
		}
		end := func(db *postgres.DB, id string, done bool) error {
			a, key, err := leased(t.Context(), db, tenant.AppID(id))
			switch {
			case errors.Is(err, tenant.ErrLeaseLost):
				return nil // it has ended
			case err != nil:
				return err
			case done:
				return db.FinishBuild(t.Context(), a, tenant.BuildEnd{Key: key, Next: next(1)}, actor)
			}
			return db.AbandonApp(t.Context(), a, true, "test", next(1), actor)
		}
		sweep := func(db *postgres.DB) error {
			_, err := db.Claim(t.Context(), p.Name, actor)
			return errors.Join(err, db.ClaimInBackground(t.Context(), p, actor), db.StartBuilds(t.Context(), next(100)))
		}
		made := 0
		fresh := func() string { made++; return fmt.Sprint(p.Name, "_", made) }
		one := func(ids []string) string { return rapid.SampledFrom(ids).Draw(rt, "which") }
		step := func(rt *rapid.T) {
			building, importing := found(`SELECT id FROM apps WHERE state = 'building' AND profile = $1 ORDER BY id`),
				found(`SELECT id FROM tenants WHERE state = 'provisioning' AND background AND profile = $1 ORDER BY id`)
			var wg sync.WaitGroup
			for range rapid.IntRange(1, 8).Draw(rt, "at once") {
				db := rapid.SampledFrom(replicas).Draw(rt, "replica")
				var do func() error
				switch what := rapid.SampledFrom([]string{"sign up", "import", "sign up who is imported", "finish", "abandon", "sweep"}).Draw(rt, "what"); {
				case what == "import":
					batch := tenant.NewBatch{Tenants: []tenant.NewTenant{up(fresh()), up(fresh())}}
					do = func() error { _, err := db.SignUpMany(t.Context(), batch, actor); return err }
				case what == "sign up who is imported" && len(importing) > 0:
					n := up(one(importing))
					do = func() error { _, err := db.SignUp(t.Context(), n, actor); return err }
				case (what == "finish" || what == "abandon") && len(building) > 0:
					id := one(building)
					do = func() error { return end(db, id, what == "finish") }
				case what == "sweep":
					do = func() error { return sweep(db) }
				default:
					n := up(fresh())
					do = func() error { _, err := db.SignUp(t.Context(), n, actor); return err }
				}
				wg.Go(func() {
					if err := do(); err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
		}
		rt.Repeat(map[string]func(*rapid.T){
			"at once": step,
			"target":  func(rt *rapid.T) { plan(rapid.IntRange(0, mostTarget).Draw(rt, "target")) },
			"": func(rt *rapid.T) {
				apps, tenants, most := number(`apps WHERE state IN ('building', 'ready')`), number(`tenants WHERE state = 'provisioning'`), 0
				if p.Pools() {
					most = mostTarget
				}
				if apps > tenants+most {
					rt.Fatalf("%d apps are ready or being built for %d tenants and a pool of at most %d", apps, tenants, most)
				}
			},
		})
		for round := 0; ; round++ {
			if err := sweep(replicas[0]); err != nil {
				rt.Fatal(err)
			}
			building := found(`SELECT id FROM apps WHERE state = 'building' AND profile = $1`)
			waiting := number(`tenants WHERE state = 'provisioning'`)
			if len(building)+waiting == 0 {
				break
			}
			if round == 100 {
				rt.Fatalf("%d tenants wait in the end, and the builds %v run", waiting, building)
			}
			for _, id := range building {
				if err := end(replicas[0], id, true); err != nil {
					rt.Fatal(err)
				}
			}
		}
		if ready := number(`apps WHERE state = 'ready'`); ready < target || ready > mostTarget {
			rt.Fatalf("%d apps are ready in the end; want %d to %d", ready, target, mostTarget)
		}
	})
}
