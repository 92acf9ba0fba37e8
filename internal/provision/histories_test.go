package provision_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// How long TestHistories runs, and how many steps a history has. HISTORIES=2000 runs 2,000 histories
// instead, HISTORY=17 runs the history with seed 17, and both together run 2,000 from seed 17.
const (
	historiesFor = 60 * time.Second
	historySteps = 30
)

// Restores, snapshots, copies and failovers, in any order with sign-ups, suspensions,
// deletions and repairs, never give one tenant's app or key to another, never remove an app
// that may be in use, never make a dead tenant's key work without a command, and never stop a
// revocation that is requested afterwards.
func TestHistories(t *testing.T) {
	t.Parallel()
	first, n := uint64(time.Now().UnixNano())%1_000_000, 0
	if s := os.Getenv("HISTORY"); s != "" {
		first, n = number(t, s), 1
	}
	if s := os.Getenv("HISTORIES"); s != "" {
		n = int(number(t, s))
	}
	template := migrated(t)
	began := time.Now()
	tried := 0
	for ; n == 0 && time.Since(began) < historiesFor || tried < n; tried++ {
		seed := first + uint64(tried)
		if !t.Run(fmt.Sprint(seed), func(t *testing.T) { play(t, template, seed) }) {
			break
		}
	}
	t.Logf("%d histories in %s", tried, time.Since(began).Round(time.Second))
}

func number(t *testing.T, s string) uint64 {
	t.Helper()
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// migrated makes the database that each history copies at its beginning.
func migrated(t *testing.T) string {
	t.Helper()
	url := pgtest.URL(t)
	cfg, err := pgx.ParseConfig(url.Reveal())
	if err != nil {
		t.Fatal(err)
	}
	return cfg.Database
}

// A history is one random sequence of what may happen to a database and its copies.
type history struct {
	t     *testing.T
	w     *provisiontest.World
	rng   *rand.Rand
	admin *pgx.Conn
	conns map[string]*pgx.Conn
	step  int
	last  tenant.ID
	log   []string

	name     string // of the database in use
	replicas []*provisiontest.Replica
	copied   []*provisiontest.Replica // of a copy that runs next to the database in use
	backups  []string                 // databases without connections
	made     []string                 // all databases
	tags     bool
	follows  map[*provisiontest.Replica]func() // stops the follower of a replica

	owner     map[string]tenant.ID // of each app that a tenant was told of
	told      map[string]tenant.ID // of each key
	removable map[string]bool      // apps whose removal was asked for
	restored  map[tenant.ID]bool   // deleted tenants whose restoration was asked for
	asked     map[tenant.ID]bool   // tenants whose keys must be dead, since the last loss
	dead      map[string]tenant.ID // apps without a live key, until a command for the tenant
}

func play(t *testing.T, template string, seed uint64) {
	ctx := context.WithoutCancel(t.Context())
	admin, err := pgx.Connect(ctx, pgtest.Cluster(t).URL("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(seed, 1))
	h := &history{t: t, rng: rng, admin: admin, conns: map[string]*pgx.Conn{}, follows: map[*provisiontest.Replica]func(){}, tags: rng.IntN(4) > 0, owner: map[string]tenant.ID{}, told: map[string]tenant.ID{},
		removable: map[string]bool{}, restored: map[tenant.ID]bool{}, asked: map[tenant.ID]bool{}, dead: map[string]tenant.ID{}}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("HISTORY=%d, tags %v:\n%s", seed, h.tags, strings.Join(h.log, "\n"))
		}
		for _, r := range slices.Concat(h.replicas, h.copied) {
			h.end(r)
		}
		for _, name := range h.made {
			h.disconnect(name)
			_, _ = admin.Exec(ctx, `DROP DATABASE IF EXISTS `+name+` WITH (FORCE)`)
		}
		_ = admin.Close(ctx)
	})
	h.name = h.copyOf(template)
	h.w = provisiontest.NewOn(t, h.url(h.name))
	h.exec(h.name, `TRUNCATE incarnations, current_incarnation;
		WITH first AS (INSERT INTO incarnations (reason) VALUES ('first start') RETURNING id) INSERT INTO current_incarnation (id) SELECT id FROM first`)
	h.replicas = []*provisiontest.Replica{h.start(h.name), h.start(h.name)}
	h.work(h.replicas)
	for h.step = 1; h.step <= historySteps && !t.Failed(); h.step++ {
		h.next()
		h.check()
	}
	h.rest()
}

// next does something at random.
func (h *history) next() {
	type act struct {
		weight int
		name   string
		do     func()
	}
	acts := []act{
		{8, "sign up", h.signUp}, {4, "suspend", h.suspend}, {4, "resume", h.resume}, {3, "rotate", h.rotate}, {2, "quarantine", h.quarantine},
		{4, "delete", h.delete}, {4, "restore tenant", h.restoreTenant}, {3, "purge", h.purge}, {2, "import", h.importSome}, {1, "campaign", h.campaign},
		{12, "work", func() { h.workSome(h.replicas) }}, {6, "work all", func() { h.work(h.replicas) }}, {4, "time passes", func() { h.timePasses(h.name) }},
		{5, "backup", h.backup}, {4, "restore", h.restore}, {3, "fail over", h.failOver}, {2, "kill", h.kill}, {1, "stop", h.stop},
		{2, "copy", h.copy}, {4, "work in the copy", h.workInCopy}, {2, "late tags", h.lateTags}, {2, "report", h.report},
		{2, "decide", h.decide}, {1, "end recovery", h.endRecovery}, {1, "begin recovery", h.beginRecovery}, {1, "remove retired", h.removeRetired},
	}
	total := 0
	for _, a := range acts {
		total += a.weight
	}
	n := h.rng.IntN(total)
	for _, a := range acts {
		if n -= a.weight; n < 0 {
			h.log = append(h.log, fmt.Sprintf("%2d %s", h.step, a.name))
			a.do()
			return
		}
	}
}

func (h *history) note(format string, args ...any) {
	h.log = append(h.log, "     "+fmt.Sprintf(format, args...))
}

func (h *history) url(name string) tenant.Secret {
	return tenant.NewSecret(pgtest.Cluster(h.t).URL(name))
}

// conn is the history's own connection to a database.
func (h *history) conn(name string) *pgx.Conn {
	h.t.Helper()
	c := h.conns[name]
	if c == nil || c.IsClosed() {
		var err error
		if c, err = pgx.Connect(context.WithoutCancel(h.t.Context()), h.url(name).Reveal()); err != nil {
			h.t.Fatal(err)
		}
		h.conns[name] = c
	}
	return c
}

func (h *history) exec(name, sql string) {
	h.t.Helper()
	if _, err := h.conn(name).Exec(h.t.Context(), sql); err != nil {
		h.t.Fatalf("%s: %v", sql, err)
	}
}

func rowsOf[T any](h *history, name, sql string) []T {
	h.t.Helper()
	rows, _ := h.conn(name).Query(h.t.Context(), sql)
	found, err := pgx.CollectRows(rows, pgx.RowTo[T])
	if err != nil {
		h.t.Fatalf("%s: %v", sql, err)
	}
	return found
}

func (h *history) disconnect(name string) {
	if c := h.conns[name]; c != nil {
		_ = c.Close(context.WithoutCancel(h.t.Context()))
		delete(h.conns, name)
	}
}

// alone runs a statement about a database that has no connections.
func (h *history) alone(name, sql string) {
	h.t.Helper()
	h.disconnect(name)
	if _, err := h.admin.Exec(h.t.Context(), `ALTER DATABASE `+name+` ALLOW_CONNECTIONS false`); err != nil {
		h.t.Fatal(err)
	}
	provisiontest.Eventually(h.t, "nobody is connected to "+name, func() bool {
		var n int // connections that were about to open
		err := h.admin.QueryRow(h.t.Context(), `SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = $1`, name).Scan(&n)
		return err == nil && n == 0
	})
	// Connections that are being refused count as users of the database, too, and one that was let in
	// before the statement above may show only now.
	provisiontest.Eventually(h.t, sql, func() bool {
		_, _ = h.admin.Exec(h.t.Context(), `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1`, name)
		_, err := h.admin.Exec(h.t.Context(), sql)
		if pgErr, ok := errors.AsType[*pgconn.PgError](err); err != nil && (!ok || pgErr.Code != "55006") {
			h.t.Fatalf("%s: %v", sql, err)
		}
		return err == nil
	})
}

func (h *history) open(name string) {
	if _, err := h.admin.Exec(h.t.Context(), `ALTER DATABASE `+name+` ALLOW_CONNECTIONS true`); err != nil {
		h.t.Fatal(err)
	}
}

// copyOf copies a database like a snapshot of its files: the copy has its own fingerprint and the
// rows of the original.
func (h *history) copyOf(name string) string {
	h.t.Helper()
	to := fmt.Sprintf("h%s", strings.ReplaceAll(uuid.NewString()[:13], "-", ""))
	h.alone(name, `CREATE DATABASE `+to+` TEMPLATE `+name)
	h.open(name)
	h.made = append(h.made, to)
	return to
}

func (h *history) start(name string) *provisiontest.Replica {
	h.t.Helper()
	w := *h.w
	w.URL = h.url(name)
	r := w.Start(provisiontest.Options{Idle: true, Control: true, Adjust: func(c *provision.Config) {
		c.ReportEvery, c.TripAfter, c.SkipMarks = 1000*time.Hour, 1<<20, !h.tags
		c.Settle = 10 * time.Millisecond
		c.Profiles = []tenant.Profile{{Name: tenant.DefaultProfile, BaseWorkflow: "Empty", KeyScopes: []string{"All"}, PoolMin: 2, PoolMax: 2, Retention: 300 * time.Millisecond}}
	}})
	ctx, cancel := context.WithCancel(context.WithoutCancel(h.t.Context()))
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = r.DB.Follow(ctx, zap.NewNop())
	}()
	h.follows[r] = func() { cancel(); <-done }
	return r
}

// end kills a replica.
func (h *history) end(r *provisiontest.Replica) {
	h.follows[r]()
	r.Kill()
	r.DB.Close()
}

func (h *history) replica() *provisiontest.Replica { return h.replicas[h.rng.IntN(len(h.replicas))] }

// tenant often returns the previous tenant: many failures take several steps with one tenant.
func (h *history) tenant() tenant.ID {
	if h.last == "" || h.rng.IntN(3) == 0 {
		h.last = tenant.ID(fmt.Sprintf("t%d", h.rng.IntN(6)))
	}
	return h.last
}

// ask runs a command, and retries it while the connections to the database are new.
func (h *history) ask(do func(ctx context.Context) error) error {
	h.t.Helper()
	var err error
	for range 20 {
		if err = do(h.t.Context()); !errors.Is(err, tenant.Unavailable) || errors.Is(err, tenant.ErrAnotherDatabase) {
			break
		}
		if e, ok := errors.AsType[*tenant.Error](err); ok && (e.Code == tenant.ErrAnotherDatabase.Code || e.Code == "quarantine_pending") {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	if err != nil {
		h.note("%v", err)
	}
	if e, ok := errors.AsType[*tenant.Error](err); err != nil && !ok {
		h.t.Fatalf("step %d: %v", h.step, err)
	} else if ok && e.Kind == tenant.Unavailable && e.Code == "database_unavailable" {
		h.t.Fatalf("step %d: %v", h.step, err)
	}
	return err
}

// commanded records a command for a tenant: the keys of the tenant may work again.
func (h *history) commanded(id tenant.ID) {
	delete(h.asked, id)
	maps.DeleteFunc(h.dead, func(_ string, of tenant.ID) bool { return of == id })
}

// saw compares the shown tenant with what was shown before.
func (h *history) saw(r *provisiontest.Replica, t tenant.Tenant) {
	h.t.Helper()
	if t.State != tenant.Active || t.AppID == "" {
		return
	}
	if of, known := h.owner[string(t.AppID)]; known && of != t.ID {
		h.t.Fatalf("step %d: the app %s was %s's and is %s's", h.step, t.AppID, of, t.ID)
	}
	h.owner[string(t.AppID)] = t.ID
	var secret tenant.Secret
	if h.ask(func(ctx context.Context) (err error) {
		_, secret, err = r.Reveal(ctx, t.ID, tenant.DefaultKey, caller)
		return err
	}) != nil {
		return
	}
	if of, known := h.told[secret.Reveal()]; known && of != t.ID {
		h.t.Fatalf("step %d: a key of %s was shown to %s", h.step, of, t.ID)
	}
	h.told[secret.Reveal()] = t.ID
}

func (h *history) signUp() {
	r, id, again := h.replica(), h.tenant(), h.rng.IntN(3) == 0
	var got tenant.Tenant
	err := h.ask(func(ctx context.Context) (err error) {
		var made bool
		got, made, err = r.SignUp(ctx, id, tenant.SignUp{Replace: again}, 0, caller)
		if made {
			h.commanded(id)
		}
		return err
	})
	h.note("%s: %s %s", id, got.State, got.AppID)
	if err == nil {
		h.saw(r, got)
	}
}

func (h *history) change(what string, do func(ctx context.Context, r *provisiontest.Replica, id tenant.ID) (tenant.Tenant, error)) (tenant.ID, tenant.Tenant, error) {
	r, id := h.replica(), h.tenant()
	var got tenant.Tenant
	err := h.ask(func(ctx context.Context) (err error) { got, err = do(ctx, r, id); return err })
	h.note("%s %s: %s %s %v", what, id, got.State, got.AppID, err)
	return id, got, err
}

func (h *history) suspend() {
	id, got, err := h.change("suspend", func(ctx context.Context, r *provisiontest.Replica, id tenant.ID) (tenant.Tenant, error) {
		return r.Suspend(ctx, id, 0, caller)
	})
	if err == nil && got.AppID != "" {
		h.asked[id] = true
	}
}

func (h *history) resume() {
	id, _, err := h.change("resume", func(ctx context.Context, r *provisiontest.Replica, id tenant.ID) (tenant.Tenant, error) {
		return r.Resume(ctx, id, 0, caller)
	})
	if err == nil {
		h.commanded(id)
	}
}

func (h *history) rotate() {
	overlap := time.Duration(h.rng.IntN(2)) * time.Hour
	id, _, err := h.change("rotate", func(ctx context.Context, r *provisiontest.Replica, id tenant.ID) (t tenant.Tenant, err error) {
		_, _, err = r.Rotate(ctx, id, tenant.NewRotation{ID: fmt.Sprint("r", h.step), KeyName: tenant.DefaultKey, Overlap: &overlap}, 0, caller)
		return t, err
	})
	if err == nil {
		h.commanded(id)
	}
}

func (h *history) delete() {
	id, got, err := h.change("delete", func(ctx context.Context, r *provisiontest.Replica, id tenant.ID) (tenant.Tenant, error) {
		return r.Delete(ctx, id, h.rng.IntN(3) == 0, 0, caller)
	})
	if err == nil {
		h.asked[id] = got.AppID != ""
		h.removable[string(got.AppID)] = true
		delete(h.restored, id)
	}
}

func (h *history) restoreTenant() {
	id, _, err := h.change("restore", func(ctx context.Context, r *provisiontest.Replica, id tenant.ID) (tenant.Tenant, error) {
		return r.Service.Restore(ctx, id, 0, caller)
	})
	if err == nil {
		h.commanded(id)
		h.restored[id] = true
	}
}

// purge lets the retention of deleted tenants end. It waits, since the ownership tags have the time of
// the removal, too.
func (h *history) purge() {
	provisiontest.Eventually(h.t, "each retention has ended", func() bool {
		for _, r := range h.replicas {
			if rowsOf[bool](h, h.nameOf(r), `SELECT EXISTS (SELECT FROM apps WHERE purge_after > now())`)[0] {
				return false
			}
		}
		return true
	})
	h.work(h.replicas)
}

func (h *history) quarantine() {
	if len(h.told) == 0 {
		return
	}
	secrets := slices.Sorted(maps.Keys(h.told))
	secret := secrets[h.rng.IntN(len(secrets))]
	r := h.replica()
	done := make(chan error, 1)
	go func() {
		done <- h.ask(func(ctx context.Context) error {
			_, err := r.Quarantine(ctx, tenant.NewSecret(secret), 0, admin)
			return err
		})
	}()
	for {
		select {
		case err := <-done:
			id := h.told[secret]
			h.note("quarantine a key of %s: %v", id, err)
			if err == nil && !h.asked[id] { // like a rotation, it asks for a new key
				h.commanded(id)
			}
			return
		case <-time.After(10 * time.Millisecond):
			_ = r.ControlOnce(h.t.Context())
		}
	}
}

func (h *history) importSome() {
	r := h.replica()
	ups := []provision.BatchSignUp{{ID: h.tenant()}, {ID: h.tenant()}}
	_ = h.ask(func(ctx context.Context) error {
		ends, err := r.SignUpMany(ctx, ups, provision.BatchRule{LeaveDeleted: true}, caller)
		for i, e := range ends {
			if e.Err == nil && e.Created {
				h.commanded(ups[i].ID)
			}
		}
		return err
	})
}

func (h *history) campaign() {
	_ = h.ask(func(ctx context.Context) error {
		_, err := h.replica().StartRotation(ctx, tenant.KeyFilter{All: true}, noOverlap, admin)
		return err
	})
}

// backup copies the database: a dump, a snapshot, or a standby as it is then.
func (h *history) backup() { h.backups = append(h.backups, h.copyOf(h.name)) }

func (h *history) aBackup() (string, bool) {
	if len(h.backups) == 0 {
		return "", false
	}
	return h.copyOf(h.backups[h.rng.IntN(len(h.backups))]), true
}

// lost forgets the requests to the lost database.
func (h *history) lost() { h.asked = map[tenant.ID]bool{} }

// restore replaces the database by a backup, and starts the replicas on it.
func (h *history) restore() {
	name, ok := h.aBackup()
	if !ok {
		return
	}
	h.lost()
	if h.rng.IntN(2) == 0 {
		h.stop()
	}
	h.kill()
	h.name = name
	for i, r := range h.replicas {
		h.end(r)
		h.replicas[i] = h.start(name)
	}
}

// failOver replaces the database by a backup under the running replicas.
func (h *history) failOver() {
	name, ok := h.aBackup()
	if !ok {
		return
	}
	h.lost()
	// What a replica has not read of the log yet is lost unnoticed.
	began := time.Now()
	for _, r := range h.replicas {
		provisiontest.Eventually(h.t, "the log has been read", func() bool {
			behind := r.DB.CacheStats().Behind
			return behind >= 0 && behind < time.Since(began)
		})
	}
	old := fmt.Sprintf("%sx%d", h.name, h.step)
	h.made = append(h.made, old)
	h.alone(h.name, `ALTER DATABASE `+h.name+` RENAME TO `+old)
	h.alone(name, `ALTER DATABASE `+name+` RENAME TO `+h.name)
	h.open(h.name)
	if h.rng.IntN(3) == 0 { // and back: a primary that hung is the primary again
		h.note("and back")
		h.workSome(h.replicas)
		h.alone(h.name, `ALTER DATABASE `+h.name+` RENAME TO `+name)
		h.alone(old, `ALTER DATABASE `+old+` RENAME TO `+h.name)
		h.open(h.name)
		h.lost()
	}
}

// kill restarts the replicas without a clean stop.
func (h *history) kill() {
	for i, r := range h.replicas {
		h.end(r)
		h.replicas[i] = h.start(h.name)
	}
}

// stop restarts the replicas after a clean stop.
func (h *history) stop() {
	for _, r := range h.replicas {
		if err := r.LeaveControl(h.t.Context()); err != nil {
			h.note("leave: %v", err)
		}
	}
	h.kill()
}

// copy starts a replica on a copy of the database.
func (h *history) copy() {
	for _, r := range h.copied {
		h.end(r)
	}
	name := h.copyOf(h.name)
	h.copied = []*provisiontest.Replica{h.start(name)}
}

// workInCopy lets the copy work, with commands, while the database in use renews the control
// record.
func (h *history) workInCopy() {
	if len(h.copied) == 0 {
		return
	}
	c := h.copied[0]
	name := rowsOf[string](h, h.name, `SELECT current_database()`)[0]
	cfg, err := pgx.ParseConfig(c.URL.Reveal())
	if err != nil {
		h.t.Fatal(err)
	}
	id := h.tenant()
	switch h.rng.IntN(4) {
	case 0:
		_, _ = c.Suspend(h.t.Context(), id, 0, caller)
	case 1:
		_, _ = c.Delete(h.t.Context(), id, false, 0, caller)
	case 2:
		if got, _, err := c.SignUp(h.t.Context(), id, tenant.SignUp{}, 0, caller); err == nil {
			h.saw(c, got)
		}
	}
	for range 3 {
		h.turn(cfg.Database)
		_ = c.ControlOnce(h.t.Context())
		h.turn(name)
		_ = h.replica().ControlOnce(h.t.Context())
	}
	h.workSome(h.copied)
	is, err := c.DB.Recovery(h.t.Context())
	h.note("the copy is %q, %v", is.State, err)
}

// turn makes a turn at the control record due, and nothing else.
func (h *history) turn(name string) {
	h.exec(name, `UPDATE current_incarnation SET control_due_at = '-infinity', watch_until = watch_until + interval '1 hour',
		written_by = pg_current_xact_id()::xid WHERE xmin = written_by`)
}

// timePasses ends leases, waits and the watch.
func (h *history) timePasses(name string) {
	h.exec(name, `
		UPDATE apps SET leased_until = '-infinity', next_attempt_at = now(), in_doubt_since = in_doubt_since - interval '2 s' WHERE state <> 'deleted';
		UPDATE keys SET leased_until = '-infinity', next_attempt_at = now(), in_doubt_since = in_doubt_since - interval '2 s'
			WHERE state IN ('creating', 'revoking');
		UPDATE reconciliations SET leased_until = '-infinity', next_attempt_at = now() WHERE state = 'running';
		UPDATE campaigns SET leased_until = '-infinity', next_attempt_at = now() WHERE ended_at IS NULL;
		UPDATE quarantines SET leased_until = '-infinity', next_attempt_at = now();
		UPDATE upstream_budget SET paused_until = now(), probe_until = 'epoch';
		UPDATE pools SET planned_at = planned_at - interval '1 minute';
		UPDATE current_incarnation SET control_due_at = '-infinity', watch_until = watch_until - interval '1 hour', written_by = pg_current_xact_id()::xid
			WHERE xmin = written_by`)
}

func (h *history) lateTags() {
	if h.rng.IntN(2) == 0 {
		h.w.Faults(map[string]any{"call": "PatchApp", "probability": 1, "http": 503})
	} else {
		h.w.Faults()
	}
}

func (h *history) report() {
	_ = h.ask(func(ctx context.Context) error {
		_, err := h.replica().StartReport(ctx, admin)
		return err
	})
}

// decide decides about a finding at random.
func (h *history) decide() {
	r := h.replica()
	var found []tenant.Finding
	if h.ask(func(ctx context.Context) (err error) {
		found, err = r.DB.Undecided(ctx, "", tenant.Finding{}, 100)
		return err
	}) != nil || len(found) == 0 {
		return
	}
	f := found[h.rng.IntN(len(found))]
	choices := f.Kind.Choices()
	c := choices[h.rng.IntN(len(choices))]
	if f.State != tenant.FindingOpen {
		return
	}
	confirm := string(f.TenantID)
	if confirm == "" {
		confirm = string(f.AppID)
	}
	err := h.ask(func(ctx context.Context) error {
		_, err := r.Decide(ctx, f.Number, "", c.Name, confirm, admin)
		return err
	})
	h.note("%s of %s %s %s: %v", c.Name, f.Kind, f.AppID, f.TenantID, err)
	if err != nil {
		return
	}
	h.commanded(f.TenantID)
	if of, known := h.owner[string(f.AppID)]; known { // its owner by its tag
		h.commanded(of)
	}
	switch c.Name {
	case tenant.RemoveContested:
		h.removable[string(f.AppID)] = true
	}
}

func (h *history) endRecovery() {
	_ = h.ask(func(ctx context.Context) error { _, err := h.replica().DB.EndRecovery(ctx, admin); return err })
}

func (h *history) beginRecovery() {
	_ = h.ask(func(ctx context.Context) error {
		_, err := h.replica().DB.BeginRecovery(ctx, "a test", admin)
		return err
	})
}

// removeRetired removes all retired apps that are empty and have no tenant in their tags; the
// account shows no more than that. A person who reads the tag would not remove a tenant's app.
func (h *history) removeRetired() {
	var apps []tenant.RetiredApp
	if h.ask(func(ctx context.Context) (err error) {
		apps, err = h.replica().DB.Retired(ctx, tenant.RetiredApp{}, 100)
		return err
	}) != nil {
		return
	}
	for _, a := range apps {
		if _, told := h.owner[string(a.ID)]; told {
			continue
		}
		_ = h.ask(func(ctx context.Context) error {
			return h.replica().RemoveRetired(ctx, tenant.RetiredFilter{AppID: a.ID}, string(a.ID), admin)
		})
	}
}

// workSome does some of the work that is due.
func (h *history) workSome(replicas []*provisiontest.Replica) {
	for range 1 + h.rng.IntN(3) {
		h.round(replicas[h.rng.IntN(len(replicas))], 2)
	}
}

// work does all the work that is due, as time passes.
func (h *history) work(replicas []*provisiontest.Replica) {
	for range 6 {
		for _, r := range replicas {
			h.timePasses(h.nameOf(r))
			h.round(r, 100)
		}
	}
}

func (h *history) nameOf(r *provisiontest.Replica) string {
	cfg, err := pgx.ParseConfig(r.URL.Reveal())
	if err != nil {
		h.t.Fatal(err)
	}
	return cfg.Database
}

// round does one round of a replica's background work.
func (h *history) round(r *provisiontest.Replica, most int) {
	h.t.Helper()
	ctx, name := h.t.Context(), h.nameOf(r)
	if err := r.ControlOnce(ctx); err != nil && !errors.Is(err, tenant.NotFound) && !errors.Is(err, tenant.Unavailable) {
		h.note("control: %v", err)
	}
	if err := h.ask(r.SweepOnce); err != nil {
		h.note("sweep: %v", err)
	}
	some := func(ids []string, work func(id string)) {
		for _, i := range h.rng.Perm(len(ids))[:min(most, len(ids))] {
			work(ids[i])
		}
	}
	some(rowsOf[string](h, name, `SELECT id FROM apps WHERE state IN ('building', 'purging', 'retained') OR state = 'held' AND pending ORDER BY id`),
		func(id string) { r.WorkApp(ctx, tenant.AppID(id)) })
	some(rowsOf[string](h, name, `SELECT id::text FROM keys WHERE state IN ('creating', 'revoking') ORDER BY id`), func(id string) { r.WorkKey(ctx, uuid.MustParse(id)) })
	some(rowsOf[string](h, name, `SELECT id::text FROM reconciliations WHERE state = 'running'`), func(id string) { r.WorkReconciliation(ctx, uuid.MustParse(id)) })
	some(rowsOf[string](h, name, `SELECT id::text FROM campaigns WHERE ended_at IS NULL`), func(id string) { r.WorkCampaign(ctx, uuid.MustParse(id)) })
}

// keysAt counts the keys of each app at Clarifai.
func (h *history) keysAt() map[string]int {
	n := map[string]int{}
	for _, k := range h.w.Sim.Keys() {
		n[k.AppID]++
	}
	return n
}

// check holds after each step.
func (h *history) check() {
	h.t.Helper()
	there := map[string]bool{}
	for _, a := range h.w.Sim.Apps() {
		there[a.ID] = true
	}
	// A restored tenant keeps its app from the moment that it is active. Before, nothing at Clarifai
	// shows that its deletion was undone.
	for _, app := range rowsOf[string](h, h.name, `SELECT app_id FROM tenants WHERE state = 'active'`) {
		if there[app] && h.restored[h.owner[app]] {
			delete(h.removable, app)
		}
	}
	for app, id := range h.owner {
		if !there[app] && !h.removable[app] {
			h.t.Fatalf("step %d: the app %s of %s was removed, and nobody asked for it", h.step, app, id)
		}
	}
	keys := h.keysAt()
	for app, id := range h.dead {
		if keys[app] > 0 {
			h.t.Fatalf("step %d: no key of %s worked, and %d do now without a command (app %s)", h.step, id, keys[app], app)
		}
	}
	for app, id := range h.owner {
		if keys[app] == 0 && h.asked[id] {
			h.dead[app] = id
		}
	}
}

// rest ends the faults and the copy, does all work, and checks the state of the tenants.
func (h *history) rest() {
	h.t.Helper()
	h.w.Faults()
	for _, r := range h.copied {
		h.end(r)
	}
	h.copied = nil
	h.step = historySteps + 1
	r := h.replicas[0]
	provisiontest.Eventually(h.t, "the tenants come to rest", func() bool {
		h.work(h.replicas)
		h.check()
		unrest := rowsOf[string](h, h.name, `SELECT id || ' ' || state FROM tenants WHERE state NOT IN ('active', 'suspended', 'deleted', 'deleting')`)
		for _, u := range unrest {
			id, _, _ := strings.Cut(u, " ")
			got, err := r.DB.Tenant(h.t.Context(), tenant.ID(id))
			if err != nil || got.Problem == nil || !slices.Contains([]string{"recovery", "app_contested", "purge_contested"}, got.Problem.Code) {
				h.note("no rest: %s %+v %v", u, got.Problem, err)
				return false
			}
		}
		return true
	})
	keys := h.keysAt()
	for id := range h.asked {
		if !h.asked[id] {
			continue
		}
		got, err := r.DB.Tenant(h.t.Context(), id)
		if err != nil {
			h.t.Fatal(err)
		}
		if n := keys[string(got.AppID)]; got.AppID != "" && n > 0 {
			h.t.Errorf("%s was to be suspended or deleted, is %s, and %d keys of its app %s work; rows: %v", id, got.State, n, got.AppID,
				rowsOf[string](h, h.name, `SELECT concat_ws(' ', id, name, state, end_reason, problem->>'code') FROM keys WHERE app_id = '`+string(got.AppID)+`'`))
		}
	}
	for _, id := range rowsOf[string](h, h.name, `SELECT id FROM tenants WHERE state = 'active'`) {
		got, err := r.DB.Tenant(h.t.Context(), tenant.ID(id))
		if err != nil {
			h.t.Fatal(err)
		}
		h.saw(r, got)
	}
}
