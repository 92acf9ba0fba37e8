package postgres_test

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/tenant"
)

var update = flag.Bool("update", false, "write the plan shapes anew")

// plansOf is the Postgres whose plan shapes are checked in. What the rules say holds
// for all; a shape may well be another on another.
const plansOf = 15

// A statement is one that the code has sent.
type statement struct {
	sql  string
	args []any
}

// A recorder keeps each statement that is sent while it records.
type recorder struct {
	mu   sync.Mutex
	sent []statement // guarded by mu
}

func (r *recorder) add(sql string, args []any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.sent = append(r.sent, statement{sql, slices.Clone(args)})
}

func (r *recorder) take() []statement {
	r.mu.Lock()
	defer r.mu.Unlock()
	sent := r.sent
	r.sent = nil
	return sent
}

func (r *recorder) TraceQueryStart(ctx context.Context, _ *pgx.Conn, data pgx.TraceQueryStartData) context.Context {
	r.add(data.SQL, data.Args)
	return ctx
}

func (r *recorder) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

func (r *recorder) TraceBatchStart(ctx context.Context, _ *pgx.Conn, data pgx.TraceBatchStartData) context.Context {
	for _, q := range data.Batch.QueuedQueries {
		r.add(q.SQL, q.Arguments)
	}
	return ctx
}

func (r *recorder) TraceBatchQuery(context.Context, *pgx.Conn, pgx.TraceBatchQueryData) {}
func (r *recorder) TraceBatchEnd(context.Context, *pgx.Conn, pgx.TraceBatchEndData)     {}

// growing are the tables that may grow with the tenants.
var growing = []string{"tenants", "apps", "keys", "audit_events"}

// few is how many rows a statement may read of such a table: what changes now, or one
// page of an answer.
const few = 3000

// A hotPath is what is done for a request, or at each turn of the loops.
type hotPath struct {
	name string
	do   func(ctx context.Context, db *postgres.DB) error
	// grows says of a statement that breaks the rule, by words that it has, why that is
	// borne.
	grows map[string]string
}

func at(i int) (tenant.ID, tenant.AppID, uuid.UUID) {
	return tenant.ID(fmt.Sprintf("user_%08d", i)), tenant.AppID(fmt.Sprintf("tny-%022d", i)),
		uuid.MustParse(fmt.Sprintf("%08x-0000-7000-8000-000000000002", i))
}

func ignore[T any](_ T, err error) error { return err }

func expect(err error, kind tenant.Kind) error {
	if errors.Is(err, kind) {
		return nil
	}
	return fmt.Errorf("it reports %v; want %v", err, kind)
}

func hotPaths(n int) []hotPath {
	id, app, key := at(n / 2 / 100 * 100)
	id2, _, _ := at(n/2/100*100 + 10)
	unknown := tenant.ID("nobody")
	deep := postgres.Position{CreatedAt: time.Now().Add(-100 * 24 * time.Hour), ID: id}
	profiles := []tenant.Profile{{Name: "default", BaseWorkflow: "Empty", KeyScopes: []string{"All"}, PoolMin: 2, PoolMax: 20}}
	list := func(f postgres.TenantFilter, after postgres.Position) func(context.Context, *postgres.DB) error {
		return func(ctx context.Context, db *postgres.DB) error { return ignore(db.Tenants(ctx, f, after, 100)) }
	}
	audit := func(f postgres.AuditFilter, from int64, oldestFirst bool) func(context.Context, *postgres.DB) error {
		return func(ctx context.Context, db *postgres.DB) error {
			return ignore(db.AuditEvents(ctx, f, from, oldestFirst, 100))
		}
	}
	yes, no := true, false
	return []hotPath{
		{name: "authenticate", do: func(ctx context.Context, db *postgres.DB) error {
			_, _, err := db.Authenticate(ctx, tenant.Token{ID: "token7", Hash: []byte("no such")})
			return expect(err, tenant.Unauthenticated)
		}},
		{name: "tenant", do: func(ctx context.Context, db *postgres.DB) error { return ignore(db.Tenant(ctx, id)) }},
		{name: "tenant_of_app", do: func(ctx context.Context, db *postgres.DB) error { return ignore(db.TenantOfApp(ctx, app)) }},
		{name: "tenant_labels", do: func(ctx context.Context, db *postgres.DB) error { return ignore(db.TenantLabels(ctx, id)) }},
		{name: "keys", do: func(ctx context.Context, db *postgres.DB) error { return ignore(db.Keys(ctx, id)) }},
		{name: "key", do: func(ctx context.Context, db *postgres.DB) error { return ignore(db.Key(ctx, id, "default")) }},
		{name: "reveal", do: func(ctx context.Context, db *postgres.DB) error {
			_, _, err := db.Reveal(ctx, id, "default", actor)
			return err
		}},
		{name: "reveal_key", do: func(ctx context.Context, db *postgres.DB) error {
			_, _, err := db.RevealKey(ctx, id, key, actor)
			return err
		}},
		{name: "reveal_unknown", do: func(ctx context.Context, db *postgres.DB) error {
			_, _, err := db.Reveal(ctx, unknown, "default", actor)
			return expect(err, tenant.NotFound)
		}},
		{name: "identify_key", do: func(ctx context.Context, db *postgres.DB) error {
			_, err := db.Identify(ctx, tenant.Suspect{Fingerprint: []byte("no such")}, actor)
			return expect(err, tenant.NotFound)
		}},
		{name: "identify_app", do: func(ctx context.Context, db *postgres.DB) error {
			return ignore(db.Identify(ctx, tenant.Suspect{AppID: app}, actor))
		}},

		{name: "list_first", do: list(postgres.TenantFilter{}, postgres.Position{})},
		{name: "list_deep", do: list(postgres.TenantFilter{}, deep)},
		{name: "list_state_first", do: list(postgres.TenantFilter{State: tenant.Suspended}, postgres.Position{})},
		{name: "list_state_deep", do: list(postgres.TenantFilter{State: tenant.Suspended}, deep)},
		{name: "list_profile", do: list(postgres.TenantFilter{Profile: "pro"}, deep)},
		{name: "list_label", do: list(postgres.TenantFilter{Labels: map[string]string{"org": "org_7"}}, deep)},
		{name: "list_common_label", do: list(postgres.TenantFilter{Labels: map[string]string{"plan": "free"}}, deep)},
		{name: "list_within", do: list(postgres.TenantFilter{Within: tenant.Scope{"org": "org_7"}}, postgres.Position{})},
		{name: "list_prefix", do: list(postgres.TenantFilter{IDPrefix: "user_000012"}, deep)},
		{name: "list_created", do: list(postgres.TenantFilter{CreatedAfter: time.Now().Add(-48 * time.Hour), CreatedBefore: time.Now()}, postgres.Position{})},
		{name: "list_problem", do: list(postgres.TenantFilter{HasProblem: &yes}, postgres.Position{})},
		{name: "list_no_problem", do: list(postgres.TenantFilter{HasProblem: &no}, deep)},
		{name: "audit_newest", do: audit(postgres.AuditFilter{}, 0, false)},
		{name: "audit_deep", do: audit(postgres.AuditFilter{}, 1000, true)},
		{name: "audit_follow", do: func(ctx context.Context, db *postgres.DB) error {
			return errors.Join(audit(postgres.AuditFilter{}, int64(2*n-10), true)(ctx, db), ignore(db.FirstAuditGap(ctx, int64(2*n-10), int64(2*n))))
		}},
		{name: "audit_tenant", do: audit(postgres.AuditFilter{TenantID: id}, 0, false)},
		{name: "audit_app", do: audit(postgres.AuditFilter{AppID: app}, 0, false)},
		{name: "audit_actor", do: audit(postgres.AuditFilter{Actor: "caller:token7"}, 0, false)},
		{name: "audit_key", do: audit(postgres.AuditFilter{KeyID: key}, 1000, true)},
		{name: "audit_action", do: audit(postgres.AuditFilter{Action: "key.revealed"}, 0, false)},
		{name: "audit_request", do: audit(postgres.AuditFilter{RequestID: "request-7"}, 0, false)},

		{name: "sign_up_hit", do: func(ctx context.Context, db *postgres.DB) error {
			n := newTenant("new_1")
			n.Profile.PoolMax = 20
			s, err := db.SignUp(ctx, n, actor)
			if err == nil && s.Revealed == nil {
				err = errors.New("it found no app")
			}
			return err
		}},
		{name: "sign_up_there", do: func(ctx context.Context, db *postgres.DB) error {
			n := newTenant("new_1")
			n.Profile.PoolMax = 20
			return ignore(db.SignUp(ctx, n, actor))
		}},
		{name: "sign_up_again", do: func(ctx context.Context, db *postgres.DB) error {
			deleted, _, _ := at(2)
			n := newTenant(deleted)
			n.Again = true
			return ignore(db.SignUp(ctx, n, actor))
		}},
		{name: "claim", do: func(ctx context.Context, db *postgres.DB) error { return ignore(db.Claim(ctx, "default", actor)) }},
		{name: "change_tenant", do: func(ctx context.Context, db *postgres.DB) error {
			name := "Ada"
			return ignore(db.UpdateTenant(ctx, id, tenant.Patch{DisplayName: &name}, func(tenant.Tenant) bool { return true }, actor))
		}},
		{name: "rotate", do: func(ctx context.Context, db *postgres.DB) error {
			return ignore(db.StartRotation(ctx, id, tenant.NewRotation{ID: "r1", KeyName: "default", KeyID: uuid.Must(uuid.NewV7())}, actor))
		}},
		{name: "rotation", do: func(ctx context.Context, db *postgres.DB) error {
			return ignore(db.Rotation(ctx, id, "default", "r1"))
		}},
		{name: "suspend", do: func(ctx context.Context, db *postgres.DB) error { return ignore(db.Suspend(ctx, id, actor)) }},
		{name: "delete", do: func(ctx context.Context, db *postgres.DB) error {
			return ignore(db.Delete(ctx, id2, false, func(string) time.Duration { return time.Hour }, actor))
		}},
		{name: "retry", do: func(ctx context.Context, db *postgres.DB) error { return ignore(db.Retry(ctx, id, actor)) }},

		{name: "build", do: func(ctx context.Context, db *postgres.DB) error {
			a, err := one(db.LeaseApps(ctx, []tenant.AppID{"pool-default22"}, time.Minute))
			if err != nil {
				return err
			}
			k := tenant.NewKeyRow{ID: uuid.Must(uuid.NewV7()), Name: "default", Scopes: []string{"All"}}
			sealed := tenant.SealedKey{ID: k.ID, Ciphertext: []byte("c"), Fingerprint: []byte("f"), Hint: "cdef"}
			return errors.Join(db.BeginApp(ctx, a), db.AppMade(ctx, a), ignore(db.BeginKey(ctx, a, k)),
				db.FinishBuild(ctx, a, tenant.BuildEnd{Key: sealed, Next: next(1)}, actor))
		}},
		{name: "key_work", do: func(ctx context.Context, db *postgres.DB) error {
			_, _, revoking := at(4)
			k, err := one(db.LeaseKeys(ctx, []uuid.UUID{revoking}, time.Minute))
			if err != nil {
				return err
			}
			return db.KeyEnded(ctx, k, nil, actor)
		}},
		{name: "reserve_slot", do: func(ctx context.Context, db *postgres.DB) error {
			_, err := db.ReserveSlot(ctx, tenant.SlotRequest{PerSecond: 14, Patience: time.Second, PAT: []byte("pat"), ProbeTimeout: time.Second})
			return errors.Join(err, ignore(db.SlotHolds(ctx, 0)))
		}},

		{name: "upstream_resumes", do: func(ctx context.Context, db *postgres.DB) error {
			_, err := db.UpstreamFailed(ctx, tenant.UpstreamFailure{Pauses: true, PauseBase: time.Second, PauseCap: time.Second})
			return errors.Join(err, ignore(db.UpstreamWorks(ctx, 1)))
		}},

		{name: "sweep_start_builds", do: func(ctx context.Context, db *postgres.DB) error {
			n := next(2)
			n.Profile = profiles[0]
			return db.StartBuilds(ctx, n)
		}},
		{name: "sweep_pools", do: func(ctx context.Context, db *postgres.DB) error {
			return db.PlanPools(ctx, profiles, tenant.PoolPlan{Every: 0, Patience: time.Minute, Drain: 5, Beat: 5 * time.Second, Beats: 720,
				Target: func(tenant.Profile, []int) int { return 3 }}, actor)
		}},
		{name: "sweep_due_keys", do: func(ctx context.Context, db *postgres.DB) error { return db.EndDueKeys(ctx, actor) }},
		{name: "sweep_rotation", do: func(ctx context.Context, db *postgres.DB) error {
			return ignore(db.StartDueRotation(ctx, tenant.NewCampaign{ID: uuid.New(), Kind: tenant.RotateKeys, Overlap: time.Hour,
				Filter: tenant.KeyFilter{Profile: "pro", OlderThan: 100 * 365 * 24 * time.Hour}}, actor))
		}},
		{name: "sweep_settle", do: func(ctx context.Context, db *postgres.DB) error { return db.SettleTenants(ctx, actor) }},
		{name: "sweep_beat", do: func(ctx context.Context, db *postgres.DB) error {
			_, err := db.Beat(ctx, []byte("pat"))
			return errors.Join(err, ignore(db.RetireApps(ctx)), ignore(db.Recovery(ctx)))
		}},
		{name: "due_work", do: func(ctx context.Context, db *postgres.DB) error {
			slots := [tenant.Priorities]int{4, 32, 8, 8}
			err := db.ForgetAdoptions(ctx)
			for _, kind := range tenant.WorkKinds {
				err = errors.Join(err, ignore(db.DueWork(ctx, kind, slots)))
			}
			return err
		}},
		{name: "sweep_reports", do: func(ctx context.Context, db *postgres.DB) error {
			return errors.Join(ignore(db.StartDueDecisions(ctx, uuid.New())), ignore(db.StartDueReport(ctx, uuid.New(), 1000*time.Hour, actor)))
		}},
		{name: "sweep_seal_audit", do: func(ctx context.Context, db *postgres.DB) error {
			return ignore(db.SealAudit(ctx, time.Second))
		}},
		{name: "sweep_reseal", do: func(ctx context.Context, db *postgres.DB) error {
			_, err := db.Sealed(ctx)
			return errors.Join(err, ignore(db.Reseal(ctx, 7, uuid.Nil, 100, func(uuid.UUID, []byte) []byte { return nil })),
				ignore(db.MarkAnew(ctx, []tenant.SealKeyID{7}, 50)))
		}},
		{name: "measure", do: func(ctx context.Context, db *postgres.DB) error {
			_, _, err := db.Pools(ctx, []string{"default", "pro"})
			return errors.Join(err, ignore(db.TenantCounts(ctx)), db.FoldTenantCounts(ctx), ignore(db.RecoveryStatus(ctx)), ignore(db.Upstream(ctx, []byte("pat"))),
				ignore(db.CountCampaigns(ctx)), ignore(db.LiveProfiles(ctx)))
		}},
		{name: "follow", do: func(ctx context.Context, db *postgres.DB) error {
			return db.Poll(ctx, int64(2*n-10), []int64{7, int64(n)})
		}},
	}
}

// Each statement on the hot paths is planned as it was when somebody last looked, and
// none reads more with more tenants. `make plans` writes the shapes anew.
//
// TENANTRY_PLAN_TENANTS=2000000 plans at that size, to see that the shapes are the same.
func TestPlans(t *testing.T) {
	t.Parallel()
	n := 30_000
	if s := os.Getenv("TENANTRY_PLAN_TENANTS"); s != "" {
		if _, err := fmt.Sscan(s, &n); err != nil {
			t.Fatal(err)
		}
	}
	url := loaded(t, n)
	conn := pgtest.Conn(t, url)
	var version int
	var settings string
	if err := conn.QueryRow(t.Context(), `SELECT current_setting('server_version_num')::int / 10000, set_config('jit', 'off', false)`).
		Scan(&version, &settings); err != nil {
		t.Fatal(err)
	}
	shaper := newShaper(t, conn)
	var seen recorder
	db, err := postgres.Open(t.Context(), postgres.Config{URL: url, MaxConns: 4}.Traced(&seen))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	for _, path := range hotPaths(n) {
		t.Run(path.name, func(t *testing.T) {
			if err := path.do(t.Context(), db); err != nil {
				t.Fatal(err)
			}
			var got strings.Builder
			planned := map[string]bool{}
			for _, s := range seen.take() {
				if planned[s.sql] || !plannable(s.sql) {
					continue
				}
				planned[s.sql] = true
				generic, custom := shaper.plans(t, s)
				if len(s.args) > 0 && s.args[0] == any(pgx.QueryExecModeCacheDescribe) {
					generic = custom // it is never planned for all values
				}
				for _, p := range []plan{generic, custom} {
					for _, fault := range p.faults() {
						if !excused(path.grows, s.sql, fault) {
							t.Errorf("a statement's cost grows with the tenants: %s\n%s\n%s", fault, s.sql, p.shape())
						}
					}
				}
				fmt.Fprintf(&got, "-- %s\n", head(s.sql))
				if generic.shape() == custom.shape() {
					fmt.Fprintf(&got, "%s\n", generic.shape())
				} else {
					fmt.Fprintf(&got, "generic:\n%s\ncustom:\n%s\n", generic.shape(), custom.shape())
				}
			}
			file := filepath.Join("testdata", "plans", path.name+".txt")
			switch {
			case *update:
				if err := os.WriteFile(file, []byte(got.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			case version != plansOf:
				t.Skipf("the shapes that are checked in are of Postgres %d, this is %d; what the rules say was checked", plansOf, version)
			default:
				want, err := os.ReadFile(file)
				if err != nil {
					t.Fatalf("%v: run `make plans`", err)
				}
				if got.String() != string(want) {
					t.Errorf("the plans have changed: if that is meant, run `make plans` and commit %s\ngot:\n%s\nwant:\n%s", file, got.String(), want)
				}
			}
		})
	}
}

// loaded makes a database with n tenants, as the planner finds one that is in use.
func loaded(t *testing.T, n int) tenant.Secret {
	t.Helper()
	url := pgtest.EmptyURL(t)
	if err := postgres.MigrateUp(t.Context(), url); err != nil {
		t.Fatal(err)
	}
	sql, err := os.ReadFile(filepath.Join("testdata", "plans", "load.sql"))
	if err != nil {
		t.Fatal(err)
	}
	conn := pgtest.Conn(t, url)
	// Nothing but this looks at the tables, at so large a sample that every run sees the
	// same.
	for _, sql := range []string{`
		DO $$ DECLARE name text; BEGIN
			FOR name IN SELECT oid::regclass FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' LOOP
				EXECUTE 'ALTER TABLE ' || name || ' SET (autovacuum_enabled = false)';
			END LOOP;
		END $$`,
		strings.ReplaceAll(string(sql), ":n", fmt.Sprint(n)), `SET default_statistics_target = 400`, `VACUUM (ANALYZE)`} {
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	return url
}

// plannable reports whether a statement has a plan.
func plannable(sql string) bool {
	word, _, _ := strings.Cut(strings.ToUpper(strings.TrimLeft(sql, " \t\n(")), " ")
	word, _, _ = strings.Cut(word, "\n")
	return slices.Contains([]string{"SELECT", "INSERT", "UPDATE", "DELETE", "WITH"}, word)
}

func head(sql string) string {
	words := strings.Join(strings.Fields(sql), " ")
	if len(words) > 100 {
		words = words[:100] + "…"
	}
	return words
}

func excused(grows map[string]string, sql, fault string) bool {
	for words, reason := range grows {
		if reason != "" && (strings.Contains(sql, words) || strings.Contains(fault, words)) {
			return true
		}
	}
	return false
}

// A plan is a node of one, as EXPLAIN says it.
type plan struct {
	Node         string  `json:"Node Type"`
	Relation     string  `json:"Relation Name"`
	Index        string  `json:"Index Name"`
	Operation    string  `json:"Operation"`
	Join         string  `json:"Join Type"`
	Strategy     string  `json:"Strategy"`
	Direction    string  `json:"Scan Direction"`
	Relationship string  `json:"Parent Relationship"`
	Subplan      string  `json:"Subplan Name"`
	CTE          string  `json:"CTE Name"`
	Function     string  `json:"Function Name"`
	IndexCond    string  `json:"Index Cond"`
	Filter       string  `json:"Filter"`
	Rows         float64 `json:"Plan Rows"`
	Plans        []plan  `json:"Plans"`

	partial bool
}

// A shaper has statements planned.
type shaper struct {
	conn *pgx.Conn
	// Partitions and their indexes go by the name of what they are parts of: which
	// there are depends on the date.
	parents map[string]string
	partial map[string]bool // indexes of some of the rows only
}

func newShaper(t *testing.T, conn *pgx.Conn) shaper {
	t.Helper()
	s := shaper{conn, map[string]string{}, map[string]bool{}}
	var child, parent string
	rows, _ := conn.Query(t.Context(), `SELECT c.relname, p.relname FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid JOIN pg_class p ON p.oid = i.inhparent`)
	if _, err := pgx.ForEachRow(rows, []any{&child, &parent}, func() error { s.parents[child] = parent; return nil }); err != nil {
		t.Fatal(err)
	}
	rows, _ = conn.Query(t.Context(), `SELECT indexrelid::regclass::text FROM pg_index WHERE indpred IS NOT NULL`)
	if _, err := pgx.ForEachRow(rows, []any{&child}, func() error { s.partial[child] = true; return nil }); err != nil {
		t.Fatal(err)
	}
	return s
}

// plans returns the plan of a statement for all parameters, which Postgres may take from
// the sixth time on, and that for those it was sent with.
func (s shaper) plans(t *testing.T, st statement) (generic, custom plan) {
	t.Helper()
	tx, err := s.conn.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tx.Rollback(context.WithoutCancel(t.Context())) }()
	var params int
	if _, err := tx.Exec(t.Context(), `DEALLOCATE ALL; SET LOCAL plan_cache_mode = force_generic_plan; PREPARE planned AS `+st.sql); err != nil {
		t.Fatalf("prepare: %v\n%s", err, st.sql)
	}
	if err := tx.QueryRow(t.Context(), `SELECT cardinality(parameter_types) FROM pg_prepared_statements WHERE name = 'planned'`,
		pgx.QueryExecModeExec).Scan(&params); err != nil {
		t.Fatal(err)
	}
	nulls := ""
	if params > 0 {
		nulls = `(` + strings.TrimSuffix(strings.Repeat("NULL, ", params), ", ") + `)`
	}
	generic = s.explain(t, tx, `EXPLAIN (FORMAT JSON) EXECUTE planned`+nulls, pgx.QueryExecModeSimpleProtocol)
	custom = s.explain(t, tx, `EXPLAIN (FORMAT JSON) `+st.sql, append([]any{pgx.QueryExecModeDescribeExec}, st.args...)...)
	return generic, custom
}

func (s shaper) explain(t *testing.T, tx pgx.Tx, sql string, args ...any) plan {
	t.Helper()
	var text []byte
	if err := tx.QueryRow(t.Context(), sql, args...).Scan(&text); err != nil {
		t.Fatalf("%v\n%s", err, sql)
	}
	var out []struct{ Plan plan }
	if err := json.Unmarshal(text, &out); err != nil {
		t.Fatal(err)
	}
	s.rename(&out[0].Plan)
	return out[0].Plan
}

func (s shaper) rename(p *plan) {
	if parent, ok := s.parents[p.Relation]; ok {
		p.Relation = parent
	}
	p.partial = s.partial[p.Index]
	if parent, ok := s.parents[p.Index]; ok {
		p.Index = parent
	}
	for i := range p.Plans {
		s.rename(&p.Plans[i])
	}
}

var numbered = regexp.MustCompile(`^(Init|Sub)Plan.*`)

// line is a node without what depends on how much there is.
func (p plan) line() string {
	line := p.Node
	switch p.Node {
	case "ModifyTable":
		line = p.Operation
	case "Aggregate":
		line = p.Strategy + " " + p.Node
	case "Nested Loop", "Hash Join", "Merge Join":
		line += " " + p.Join
	}
	if p.Index != "" {
		line += " using " + p.Index
		if p.IndexCond == "" {
			line += ", all of it"
		}
		if p.Direction == "Backward" {
			line += ", backward"
		}
	}
	switch {
	case p.Relation != "":
		line += " on " + p.Relation
	case p.CTE != "":
		line += " on " + p.CTE
	case p.Function != "":
		line += " on " + p.Function
	}
	if p.Subplan != "" {
		line = numbered.ReplaceAllString(p.Subplan, "$1") + ": " + line
	}
	return line
}

// shape prints the nodes, of alike ones that follow each other only one.
func (p plan) shape() string {
	parts := p.parts("  ")
	return strings.Join(parts, "\n")
}

func (p plan) parts(indent string) []string {
	lines := []string{indent + p.line()}
	var before []string
	for _, c := range p.Plans {
		below := c.parts(indent + "  ")
		if !slices.Equal(below, before) {
			lines = append(lines, below...)
		}
		before = below
	}
	return lines
}

// faults says what of a plan grows with the tenants.
func (p plan) faults() []string { return p.faultsIn(false) }

// faultsIn takes whether somebody above stops after a few rows.
func (p plan) faultsIn(stops bool) []string {
	var faults []string
	grows := slices.Contains(growing, p.Relation)
	switch {
	case strings.Contains(p.Filter, "hashed SubPlan"):
		faults = append(faults, "it reads all that a subquery could find, for a few rows")
	case p.Node == "Seq Scan" && grows:
		faults = append(faults, "it reads the table "+p.Relation)
	case p.Relation != "" && !grows: // as few as ever
	case p.Index != "" && p.IndexCond == "" && !p.partial && !stops:
		faults = append(faults, "it reads all of the index "+p.Index)
	case (grows || p.Index != "") && p.Rows > few && !stops:
		faults = append(faults, fmt.Sprintf("it reads about %.0f rows of %s by %s", p.Rows, p.Relation, p.Index))
	case p.Index != "" && p.Filter != "" && grows && stops && !p.partial && p.IndexCond == "":
		faults = append(faults, "it reads the index "+p.Index+" until it has found enough that pass its filter")
	}
	below := stops
	switch p.Node {
	case "Limit":
		below = true
	case "Sort", "Aggregate", "Hash", "HashAggregate", "Bitmap Heap Scan", "BitmapAnd", "WindowAgg", "Materialize":
		below = false
	}
	for _, c := range p.Plans {
		in := below
		if c.Relationship == "InitPlan" || c.Relationship == "SubPlan" {
			in = false
		}
		// Whether there is one is known at the first.
		if strings.HasPrefix(c.Subplan, "SubPlan") && !strings.Contains(c.Node, "Aggregate") || strings.HasPrefix(c.Subplan, "InitPlan") && !strings.Contains(c.Node, "Aggregate") {
			in = true
		}
		faults = append(faults, c.faultsIn(in)...)
	}
	return faults
}
