package provision_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"pgregory.net/rapid"

	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// How many random sequences are tried in each of so many worlds, and of how many
// steps, unless -rapid.checks and -rapid.steps say otherwise.
const (
	sequences      = 50
	manySequences  = 200 // with CHECK_FULL=1
	steps          = 12
	propertyWorlds = 4
)

// Whatever requests, jobs, sweeps, crashes, lost answers and reconciliations come
// in whatever order: what was acknowledged stays, nothing is made without a row,
// and in the end every tenant has one app and one key, and nobody else has any.
func TestAnyOrder(t *testing.T) {
	t.Parallel()
	checks := sequences
	if os.Getenv("CHECK_FULL") == "1" {
		checks = manySequences
	}
	for name, value := range map[string]any{"rapid.checks": checks, "rapid.steps": steps, "rapid.nofailfile": true} {
		given := false
		flag.Visit(func(f *flag.Flag) { given = given || f.Name == name })
		if given {
			continue
		}
		if err := flag.Set(name, fmt.Sprint(value)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range propertyWorlds {
		t.Run(fmt.Sprint("world ", i+1), func(t *testing.T) {
			t.Parallel()
			// Where the listing hides keys, a lost one is given up with its app.
			masked := i%2 == 1
			l := newLab(t, masked)
			rapid.Check(t, func(rt *rapid.T) {
				if l.spoilt { // by a sequence that failed: rapid looks for a shorter one
					l = newLab(t, masked)
				}
				l.spoilt = true
				m := l.begin(rt)
				rt.Repeat(map[string]func(*rapid.T){
					"sign up":     m.signUp,
					"import":      m.importSome,
					"look up":     m.lookUp,
					"try now":     m.tryNow,
					"work":        m.work,
					"sweep":       m.sweep,
					"time passes": func(*rapid.T) { m.timePasses() },
					"fault":       m.fault,
					"crash soon":  m.crashSoon,
					"report":      m.report,
					"repair":      m.repair,
					"":            m.invariants,
				})
				m.rest()
				l.spoilt = false
			})
		})
	}
}

// A lab is a world with one replica whose work is done step by step.
type lab struct {
	t      *testing.T
	w      *provisiontest.World
	r      *provisiontest.Replica
	conn   *pgx.Conn
	masked bool         // key listings hide the keys
	fuse   atomic.Int64 // calls of the engine until it dies; 0 or less: it lives
	n      int          // sequences begun

	spoilt bool // what a sequence has left is not known

	apps, keys int // at Clarifai, of the sequences before
}

// died is what a replica's death looks like to those who run it.
type died struct{}

func newLab(t *testing.T, masked bool) *lab {
	l := &lab{t: t, w: provisiontest.New(t), masked: masked}
	l.w.Settings(map[string]any{"masked_keys": masked})
	burn := func() {
		if l.fuse.Add(-1) == 0 {
			panic(died{})
		}
	}
	l.r = l.w.Start(provisiontest.Options{Idle: true,
		Store:    func(s provision.Store) provision.Store { return watchedStore{s, burn} },
		Upstream: func(u provision.Upstream) provision.Upstream { return watchedUpstream{u, burn} },
		Adjust:   func(c *provision.Config) { c.ReportEvery, c.TripAfter = 1000*time.Hour, 3 },
	})
	l.conn = pgtest.Conn(t, l.w.URL)
	return l
}

// A model is what is known of the tenants of one sequence.
type model struct {
	*lab
	rt     *rapid.T
	prefix string
	names  map[tenant.ID]string // tenants that were taken, by the name they were signed up with
	told   map[tenant.ID]account
	token  string // of the last report

	emptyList bool // a list of keys may have been shown without them
}

func (l *lab) begin(rt *rapid.T) *model {
	l.n++
	return &model{lab: l, rt: rt, prefix: fmt.Sprintf("s%d-", l.n), names: map[tenant.ID]string{}, told: map[tenant.ID]account{}}
}

// run does something that may die on the way, and reports whether it lived.
func (m *model) run(f func(ctx context.Context)) (lived bool) {
	defer func() {
		if v := recover(); v != nil {
			if _, ok := v.(died); !ok {
				panic(v)
			}
			lived = false
		}
		m.fuse.Store(0)
	}()
	f(m.t.Context())
	return true
}

func (m *model) exec(sql string, args ...any) {
	if _, err := m.conn.Exec(m.t.Context(), sql, args...); err != nil {
		m.rt.Fatal(err)
	}
}

func query[T any](m *model, sql string, args ...any) []T {
	rows, _ := m.conn.Query(m.t.Context(), sql, args...)
	found, err := pgx.CollectRows(rows, pgx.RowTo[T])
	if err != nil {
		m.rt.Fatal(err)
	}
	return found
}

func (m *model) tenant(rt *rapid.T) tenant.ID {
	return tenant.ID(m.prefix + rapid.SampledFrom([]string{"a", "b", "c"}).Draw(rt, "tenant"))
}

func (m *model) signUp(rt *rapid.T) {
	id, name := m.tenant(rt), rapid.SampledFrom([]string{"Ada", "Ada", "Bob"}).Draw(rt, "name")
	was, known := m.names[id]
	var got tenant.Tenant
	var created bool
	var err error
	lived := m.run(func(ctx context.Context) {
		got, created, err = m.r.SignUp(ctx, id, tenant.SignUp{DisplayName: &name}, 0, caller)
	})
	switch {
	case !lived:
		// Whether it was taken only Postgres knows.
		if taken := query[string](m, `SELECT display_name FROM tenants WHERE id = $1`, id); len(taken) == 1 {
			m.names[id] = taken[0]
		}
	case known && was != name:
		if !errors.Is(err, tenant.Conflict) {
			rt.Fatalf("%s was signed up as %s, and as %s gives %v; want a conflict", id, was, name, err)
		}
	case err != nil:
		rt.Fatalf("sign up %s: %v", id, err)
	case created == known:
		rt.Fatalf("%s was made anew: %v, and was known: %v", id, created, known)
	default:
		m.names[id] = name
		m.saw(rt, got)
	}
}

// importSome signs tenants up in the background.
func (m *model) importSome(rt *rapid.T) {
	name := rapid.SampledFrom([]string{"Ada", "Ada", "Bob"}).Draw(rt, "name")
	ups := make([]provision.BatchSignUp, rapid.IntRange(1, 3).Draw(rt, "how many"))
	for i := range ups {
		ups[i] = provision.BatchSignUp{ID: tenant.ID(m.prefix + rapid.SampledFrom([]string{"a", "b", "i", "j"}).Draw(rt, "imported")), SignUp: tenant.SignUp{DisplayName: &name}}
	}
	var ends []provision.BatchEnd
	lived := m.run(func(ctx context.Context) {
		var err error
		if ends, err = m.r.SignUpMany(ctx, ups, provision.BatchRule{}, caller); err != nil {
			rt.Fatalf("import %v: %v", ups, err)
		}
	})
	for i, up := range ups {
		was, known := m.names[up.ID]
		switch {
		case !lived:
			if taken := query[string](m, `SELECT display_name FROM tenants WHERE id = $1`, up.ID); len(taken) == 1 {
				m.names[up.ID] = taken[0]
			}
		case known && was != name:
			if !errors.Is(ends[i].Err, tenant.Conflict) {
				rt.Fatalf("%s was signed up as %s, and in a batch as %s ends with %v; want a conflict", up.ID, was, name, ends[i].Err)
			}
		case ends[i].Err != nil || ends[i].Created == known:
			rt.Fatalf("%s in a batch ends as %+v, and was known: %v", up.ID, ends[i], known)
		default:
			m.names[up.ID] = name
			m.saw(rt, ends[i].Tenant)
		}
	}
}

func (m *model) lookUp(rt *rapid.T) {
	id := m.tenant(rt)
	got, err := m.r.DB.Tenant(m.t.Context(), id)
	if _, known := m.names[id]; !known {
		if !errors.Is(err, tenant.NotFound) {
			rt.Fatalf("a tenant that nobody signed up is %+v, %v", got, err)
		}
		return
	}
	if err != nil {
		rt.Fatal(err)
	}
	m.saw(rt, got)
}

// saw holds what is shown of a tenant against what was shown before.
func (m *model) saw(rt *rapid.T, got tenant.Tenant) {
	was, told := m.told[got.ID]
	if told && (got.State != tenant.Active || got.AppID != was.app) {
		rt.Fatalf("%s had the app %s and is %+v", got.ID, was.app, got)
	}
	if got.State != tenant.Active {
		return
	}
	_, sealed, err := m.r.DB.Reveal(m.t.Context(), got.ID, tenant.DefaultKey, caller)
	if err != nil {
		rt.Fatalf("reveal the key of %s: %v", got.ID, err)
	}
	keys := query[uuid.UUID](m, `SELECT id FROM keys WHERE app_id = $1 AND state = 'active'`, got.AppID)
	if len(keys) != 1 {
		rt.Fatalf("%s has the active keys %v", got.ID, keys)
	}
	secret, err := m.w.Keys.Open(keys[0], sealed)
	if err != nil {
		rt.Fatal(err)
	}
	if told && secret.Reveal() != was.secret {
		rt.Fatalf("the key of %s has changed", got.ID)
	}
	m.told[got.ID] = account{got.AppID, secret.Reveal()}
}

func (m *model) tryNow(rt *rapid.T) {
	id := m.tenant(rt)
	m.run(func(ctx context.Context) {
		_, err := m.r.Retry(ctx, id, admin)
		if _, known := m.names[id]; known != (err == nil) {
			rt.Fatalf("try %s now: %v", id, err)
		}
	})
}

const workSQL = `SELECT id FROM apps WHERE state IN ('building', 'purging') OR state = 'held' AND pending ORDER BY id`

// work runs a job, for a row that may be due or not.
func (m *model) work(rt *rapid.T) {
	apps := query[tenant.AppID](m, workSQL)
	keys := query[uuid.UUID](m, `SELECT id FROM keys WHERE state = 'revoking' ORDER BY id`)
	if len(apps)+len(keys) == 0 {
		return
	}
	n := rapid.IntRange(0, len(apps)+len(keys)-1).Draw(rt, "row")
	m.run(func(ctx context.Context) {
		if n < len(apps) {
			m.r.WorkApp(ctx, apps[n])
		} else {
			m.r.WorkKey(ctx, keys[n-len(apps)])
		}
	})
}

func (m *model) sweep(rt *rapid.T) {
	m.run(func(ctx context.Context) {
		if err := m.r.SweepOnce(ctx); err != nil {
			rt.Fatal(err)
		}
	})
}

// timePasses ends leases, pauses and waits, and the time in which a call may land.
func (m *model) timePasses() {
	m.exec(`UPDATE apps SET leased_until = '-infinity', next_attempt_at = now(), in_doubt_since = in_doubt_since - interval '2 s'
		WHERE state <> 'deleted'`)
	m.exec(`UPDATE keys SET leased_until = '-infinity', next_attempt_at = now(), in_doubt_since = in_doubt_since - interval '2 s',
			end_unconfirmed_since = end_unconfirmed_since - interval '2 s'
		WHERE state IN ('creating', 'revoking')`)
	m.exec(`UPDATE reconciliations SET leased_until = '-infinity', next_attempt_at = now() WHERE state = 'running'`)
	m.exec(`UPDATE upstream_budget SET paused_until = now(), probe_until = 'epoch'`)
	m.exec(`UPDATE refused_pats SET next_check_at = now()`)
}

// fault lets the next call of a kind go wrong: before it is made, or after.
func (m *model) fault(rt *rapid.T) {
	rule := map[string]any{"count": 1,
		"call": rapid.SampledFrom([]string{"PostApps", "PostKeys", "GetApp", "ListAppKeys", "ListKeys", "DeleteApp", "DeleteKey", "PatchApp"}).Draw(rt, "call")}
	switch rapid.SampledFrom([]string{"lost", "cut", "proxy", "proxy after", "failed", "failed after", "empty", "throttled", "quota", "refused", "PAT"}).Draw(rt, "what") {
	case "lost":
		rule["drop_after"] = true
	case "cut":
		rule["drop_before"] = true
	case "proxy":
		rule["http"] = 502
	case "proxy after":
		rule["http"], rule["after"] = 502, true
	case "failed":
		rule["status"] = 98004
	case "failed after":
		rule["status"], rule["after"] = 98004, true
	case "empty": // a success that shows nothing
		rule["status"] = 10000
		m.emptyList = m.emptyList || rule["call"] == "ListAppKeys"
	case "throttled":
		rule["status"] = 11005
	case "quota":
		rule["status"] = 11006
	case "refused":
		rule["status"] = 11102
	case "PAT":
		rule["status"] = 11009
	}
	m.w.Faults(rule)
}

// crashSoon lets the replica die in what it does next, after so many calls to
// Postgres and Clarifai.
func (m *model) crashSoon(rt *rapid.T) { m.fuse.Store(rapid.Int64Range(1, 12).Draw(rt, "calls")) }

func (m *model) report(rt *rapid.T) {
	m.run(func(ctx context.Context) {
		began, err := m.r.StartReport(ctx, admin)
		if errors.Is(err, tenant.Conflict) {
			m.reconcile(ctx)
			return
		}
		if err != nil {
			rt.Fatal(err)
		}
		m.r.WorkReconciliation(ctx, began.ID)
		if done, err := m.r.DB.Reconciliation(ctx, began.ID); err == nil && done.Done {
			m.token = done.Token
		}
	})
}

func (m *model) repair(rt *rapid.T) {
	m.run(func(ctx context.Context) {
		_, err := m.r.StartRepair(ctx, m.token, admin)
		if err != nil && !errors.Is(err, tenant.Conflict) {
			rt.Fatal(err)
		}
		m.reconcile(ctx)
	})
}

// reconcile goes on with the reconciliation that runs, if one does.
func (m *model) reconcile(ctx context.Context) {
	for _, id := range query[uuid.UUID](m, `SELECT id FROM reconciliations WHERE state = 'running'`) {
		m.r.WorkReconciliation(ctx, id)
	}
}

// invariants hold at any time.
func (m *model) invariants(rt *rapid.T) {
	apps, keys := m.made()
	var ids []uuid.UUID
	for _, k := range keys {
		marker, _ := tenant.ParseKeyMarker(k.Description)
		ids = append(ids, marker.KeyID)
	}
	if without := query[string](m, `
		SELECT made FROM unnest($1::text[]) made WHERE NOT EXISTS (SELECT FROM apps WHERE id = made)
		UNION ALL SELECT made::text FROM unnest($2::uuid[]) made WHERE NOT EXISTS (SELECT FROM keys WHERE id = made)`, apps, ids); len(without) > 0 {
		rt.Fatalf("these are at Clarifai and have no row: %v", without)
	}
	if twice := query[tenant.ID](m, `SELECT tenant_id FROM apps WHERE state = 'held' AND starts_with(tenant_id, $1) GROUP BY tenant_id HAVING count(*) > 1`, m.prefix); len(twice) > 0 {
		rt.Fatalf("the tenants %v hold more than one app", twice)
	}
}

// made returns what this sequence has made at Clarifai.
func (m *model) made() (apps []string, keys []provisiontest.SimKey) {
	for _, a := range m.w.Sim.Apps()[m.lab.apps:] {
		apps = append(apps, a.ID)
	}
	for _, k := range m.w.Sim.Keys()[m.lab.keys:] {
		keys = append(keys, provisiontest.SimKey{ID: k.ID, AppID: k.AppID, Description: k.Description})
	}
	return apps, keys
}

// rest ends the faults, lets everything that is due be done, and counts.
func (m *model) rest() {
	rt := m.rt
	m.fuse.Store(0)
	m.w.Faults()
	for round := 0; ; round++ {
		if round == 30 {
			rt.Fatalf("no rest after %d rounds: keys %v, reconciliations %v, apps %v, tenants %v", round,
				query[string](m, `SELECT concat_ws(' ', id, app_id, end_reason, attempts, now(), next_attempt_at, leased_until, in_doubt_since, problem) FROM keys WHERE state = 'revoking'`),
				query[string](m, `SELECT concat_ws(' ', id, kind, phase, attempts, now(), next_attempt_at, leased_until, problem) FROM reconciliations WHERE state = 'running'`),
				query[string](m, `SELECT id || ' ' || state || coalesce(' ' || problem::text, '') FROM apps WHERE state IN ('building', 'purging') OR pending AND state = 'held'`),
				query[string](m, `SELECT id || ' ' || state FROM tenants WHERE state <> 'active'`))
		}
		m.timePasses()
		m.sweep(rt)
		m.reconcile(m.t.Context())
		apps := query[tenant.AppID](m, workSQL)
		keys := query[uuid.UUID](m, `SELECT id FROM keys WHERE state = 'revoking'`)
		waiting := query[tenant.ID](m, `SELECT id FROM tenants WHERE state <> 'active'`)
		running := query[uuid.UUID](m, `SELECT id FROM reconciliations WHERE state = 'running'`)
		if len(apps)+len(keys)+len(waiting)+len(running) == 0 {
			break
		}
		for _, id := range apps {
			m.r.WorkApp(m.t.Context(), id)
		}
		for _, id := range keys {
			m.r.WorkKey(m.t.Context(), id)
		}
	}
	m.invariants(rt)
	for _, id := range slices.Sorted(maps.Keys(m.names)) {
		got, err := m.r.DB.Tenant(m.t.Context(), id)
		if err != nil {
			rt.Fatal(err)
		}
		m.saw(rt, got)
		if _, told := m.told[id]; !told {
			rt.Fatalf("%s is not active in the end but %+v", id, got)
		}
	}
	apps, keys := m.made()
	// A key that was made, and is not in the list when it is looked for, is revoked
	// when it shows. Where listings hide it it stays, and is counted.
	lost := query[int](m, `SELECT count(*) FROM keys JOIN apps ON app_id = apps.id WHERE keys.state = 'lost' AND apps.state <> 'deleted' AND app_id = ANY ($1)`, apps)[0]
	if lost > 0 && !(m.masked && m.emptyList) {
		rt.Fatalf("%d keys were lost, though they were listed", lost)
	}
	if len(apps) != len(m.told) || len(keys) != len(m.told)+lost {
		rt.Fatalf("Clarifai has the apps %v and the keys %v for %d tenants; the rows say %v", apps, keys, len(m.told),
			query[string](m, `SELECT a.id || ' ' || a.state || ' ' || coalesce(k.id || ' ' || k.state, 'no key') FROM apps a LEFT JOIN keys k ON k.app_id = a.id WHERE a.id = ANY ($1)`, apps))
	}
	for _, a := range m.told {
		if !slices.Contains(apps, string(a.app)) || !slices.ContainsFunc(keys, func(k provisiontest.SimKey) bool { return k.ID == a.secret && k.AppID == string(a.app) }) {
			rt.Fatalf("the app %s or its key is not at Clarifai", a.app)
		}
	}
	m.lab.apps += len(apps)
	m.lab.keys += len(keys)
}
