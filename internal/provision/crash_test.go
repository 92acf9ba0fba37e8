package provision_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"maps"
	"os"
	osexec "os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/clarifaisim"
	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// A crash point is a place where the engine calls its Store or its Upstream. A
// process that dies there dies right after the call returned: what the call did
// is done, and nothing that follows is. It is named by the function and the
// method, as "makeKey CreateKey", and by a number from the second such place of
// a function on, as "revoke KeyEnded 2".

// crashPoints finds the crash points in the engine's sources, by where they are.
func crashPoints(t testing.TB) map[site]string {
	t.Helper()
	files := token.NewFileSet()
	sources, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	points := map[site]string{}
	seen := map[string]int{}
	for _, source := range sources {
		if strings.HasSuffix(source, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(files, source, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, decl := range file.Decls {
			fn, ok := decl.(*ast.FuncDecl)
			if !ok {
				continue
			}
			ast.Inspect(fn, func(n ast.Node) bool {
				method, ok := engineCall(n)
				if !ok {
					return true
				}
				name := fn.Name.Name + " " + method.Name
				if seen[name]++; seen[name] > 1 {
					name += fmt.Sprint(" ", seen[name])
				}
				at := files.Position(method.Pos())
				points[site{at.Filename, at.Line}] = name
				return true
			})
		}
	}
	return points
}

// engineCall reports whether n calls a method of a Store or an Upstream, held in a
// field, as s.Store, or a parameter, as store.
func engineCall(n ast.Node) (method *ast.Ident, ok bool) {
	call, ok := n.(*ast.CallExpr)
	if !ok {
		return nil, false
	}
	fun, ok := call.Fun.(*ast.SelectorExpr)
	if !ok {
		return nil, false
	}
	of := ""
	switch x := fun.X.(type) {
	case *ast.SelectorExpr:
		of = x.Sel.Name
	case *ast.Ident:
		of = x.Name
	}
	iface, ok := watchedTypes[strings.ToLower(of)]
	if !ok {
		return nil, false
	}
	_, ok = iface.MethodByName(fun.Sel.Name)
	return fun.Sel, ok
}

var watchedTypes = map[string]reflect.Type{
	"store": reflect.TypeFor[provision.Store](), "upstream": reflect.TypeFor[provision.Upstream](),
}

type site struct {
	file string
	line int
}

const enginePackage = "github.com/tenantry/tenantry/internal/provision."

// callSite returns where the engine made the call that is on the stack.
func callSite() site {
	pcs := make([]uintptr, 32)
	frames := runtime.CallersFrames(pcs[:runtime.Callers(2, pcs)])
	for {
		frame, more := frames.Next()
		if strings.HasPrefix(frame.Function, enginePackage) {
			return site{filepath.Base(frame.File), frame.Line}
		}
		if !more {
			return site{}
		}
	}
}

// Every method of the Store and of the Upstream is watched.
func TestEveryCallIsWatched(t *testing.T) {
	t.Parallel()
	for _, iface := range watchedTypes {
		for i := range iface.NumMethod() {
			returned := false
			watch := func() { returned = true }
			watched := reflect.ValueOf(watchedStore{returned: watch})
			if iface.Name() == "Upstream" {
				watched = reflect.ValueOf(watchedUpstream{returned: watch})
			}
			method := watched.MethodByName(iface.Method(i).Name)
			var args []reflect.Value
			for p := range method.Type().Ins() {
				args = append(args, reflect.Zero(p))
			}
			func() {
				defer func() { _ = recover() }() // there is nothing behind it
				method.Call(args)
			}()
			if !returned {
				t.Errorf("%s.%s is not watched", iface.Name(), iface.Method(i).Name)
			}
		}
	}
}

// How a process learns that it is to die, and where.
const (
	dieAtVar    = "TENANTRY_TEST_DIE_AT" // the crash point
	scenarioVar = "TENANTRY_TEST_SCENARIO"
	databaseVar = "TENANTRY_TEST_DATABASE"
	keysetVar   = "TENANTRY_TEST_KEYSET"
	clarifaiVar = "TENANTRY_TEST_CLARIFAI"
)

// A scene is where a scenario plays: a world, and a replica in it.
type scene struct {
	t *testing.T
	w *provisiontest.World
	r *provisiontest.Replica
	// holds are the apps of the tenants that were told so before the crash.
	holds map[tenant.ID]tenant.AppID
	// leaked is a key that was made by hand before the crash.
	leaked tenant.Secret
}

// TestDyingReplica is the process that TestCrash starts to see it die.
func TestDyingReplica(t *testing.T) {
	point := os.Getenv(dieAtVar)
	if point == "" {
		t.Skip("it is a part of TestCrash")
	}
	go func() { // not to outlive who started it
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(1)
	}()
	points := crashPoints(t)
	var dying sync.Mutex
	returned := func() {
		at := callSite()
		name, ok := points[at]
		if !ok {
			fmt.Printf("a call at %v, which is no crash point\n", at)
			os.Exit(1)
		}
		if name == point {
			dying.Lock() // and never unlocked: of two that come by at once, one says so
			fmt.Println("died at", name)
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {}
		}
	}
	sc := crashScenarios[os.Getenv(scenarioVar)]
	s := &scene{t: t, w: provisiontest.Join(t, tenant.NewSecret(os.Getenv(databaseVar)), os.Getenv(keysetVar), os.Getenv(clarifaiVar))}
	o := sc.options
	o.Control = sc.control
	o.Store = func(store provision.Store) provision.Store { return watchedStore{store, returned} }
	o.Upstream = func(up provision.Upstream) provision.Upstream { return watchedUpstream{up, returned} }
	s.r = s.w.Start(o)
	if sc.act != nil {
		sc.act(s)
	}
	select {}
}

// maxCrashes is how many crash points are walked at once. Each waits for its
// database most of the time.
const maxCrashes = 4

// crashReads are calls that change nothing. A replica that dies after such a call leaves the same state
// as one that dies after the call before it, so only the full check includes them.
var crashReads = map[string]bool{
	"Watch": true, "Tenant": true, "Recovery": true, "RecoveryStatus": true, "Key": true, "Keys": true, "KeyOf": true, "KeysOfApp": true,
	"DefaultKeyOf": true, "KeyExists": true, "Whoami": true, "Opens": true, "App": true, "Apps": true, "AppKeys": true, "AppOf": true,
	"Rotation": true, "Sealed": true, "CountSealed": true, "NextFinding": true, "Finding": true, "CountFindings": true, "CountOpenFindings": true,
	"LastReport": true, "Reconciliation": true, "RemovalsInLastHour": true, "Pools": true, "CountCampaign": true, "CountCampaigns": true,
	"TenantCounts": true, "CountKeys": true, "NextMisfit": true, "Misfits": true, "QuarantineState": true,
	"HasAdoption": true, "SlotHolds": true, "Deployment": true, "Upstream": true, "UnknownKeys": true, "PurgeWait": true, "WorkDue": true, "DueWork": true,
}

// Wherever a replica dies, another finishes what it began: who was told of an app
// has it, every tenant has one app and one key, and nothing is upstream that the
// database does not know.
func TestCrash(t *testing.T) {
	t.Parallel()
	pgtest.Cluster(t)
	points := map[string]bool{}
	for _, name := range crashPoints(t) {
		points[name] = true
	}
	// Each scenario at each of its points takes too long for every change.
	full := os.Getenv("CHECK_FULL") != ""
	walked := map[string]bool{}
	type walk struct{ scenario, point string }
	var walks []walk
	for _, name := range slices.Sorted(maps.Keys(crashScenarios)) {
		for _, point := range crashScenarios[name].points {
			_, call, _ := strings.Cut(point, " ")
			call, _, _ = strings.Cut(call, " ")
			if full || !walked[point] && !crashReads[call] {
				walks = append(walks, walk{name, point})
			}
			walked[point] = true
			if !points[point] {
				t.Errorf("scenario %q dies at %q, which the engine does not have", name, point)
			}
		}
	}
	for _, point := range slices.Sorted(maps.Keys(points)) {
		if !walked[point] {
			t.Errorf("no scenario dies at %q: add it to one that comes by", point)
		}
	}
	if t.Failed() {
		return
	}
	// Subtests that are parallel would keep the rest of the suite from running.
	var wg sync.WaitGroup
	free := make(chan struct{}, maxCrashes)
	for _, c := range walks {
		free <- struct{}{}
		wg.Go(func() {
			defer func() { <-free }()
			t.Run(c.scenario+"/"+c.point, func(t *testing.T) { crash(t, c.scenario, c.point) })
		})
	}
	wg.Wait()
}

func crash(t *testing.T, scenario, point string) {
	sc := crashScenarios[scenario]
	s := &scene{t: t, w: provisiontest.New(t), holds: map[tenant.ID]tenant.AppID{}}
	if sc.prepare != nil {
		s.r = s.w.Start(provisiontest.Options{Control: sc.control})
		sc.prepare(s)
		s.r.Stop()
	}
	dieAt(t, s.w, scenario, point)
	intended(t, s.w)
	s.w.Faults()
	if sc.recover != nil {
		sc.recover(s)
	}
	timePasses(t, s.w)
	s.r = s.w.Start(provisiontest.Options{Control: sc.control})
	if sc.settle != nil {
		sc.settle(s)
	}
	sound(s, sc)
}

// dieAt runs a replica in a process of its own until it dies at a crash point.
func dieAt(t *testing.T, w *provisiontest.World, scenario, point string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := osexec.CommandContext(ctx, self, "-test.run=^TestDyingReplica$", "-test.v")
	cmd.Env = append(os.Environ(), dieAtVar+"="+point, scenarioVar+"="+scenario,
		databaseVar+"="+w.URL.Reveal(), keysetVar+"="+w.Keyset, clarifaiVar+"="+w.Clarifai)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = stdin.Close() }()
	err = cmd.Run()
	if !strings.Contains(out.String(), "died at "+point+"\n") {
		t.Fatalf("the replica did not come by %q: %v\n%s", point, err, out.String())
	}
}

// intended checks that what a dead replica was making was written down before: no
// row says of what is at Clarifai that it certainly is not.
func intended(t *testing.T, w *provisiontest.World) {
	t.Helper()
	var apps, keys []string
	for _, a := range w.Sim.Apps() {
		apps = append(apps, a.ID)
	}
	for _, k := range w.AppKeys() {
		if marker, ok := tenant.ParseKeyMarker(k.Description); ok {
			keys = append(keys, marker.KeyID.String())
		}
	}
	var denied []string
	if err := connOf(t, w).QueryRow(t.Context(), `
		SELECT array(SELECT id FROM apps WHERE state = 'building' AND made_at IS NULL AND in_doubt_since IS NULL AND id = ANY ($1)
			UNION ALL SELECT id::text FROM keys WHERE state = 'creating' AND in_doubt_since IS NULL AND id::text = ANY ($2))`,
		apps, keys).Scan(&denied); err != nil {
		t.Fatal(err)
	}
	if len(denied) > 0 {
		t.Errorf("%v exist, and their rows do not say that they may", denied)
	}
}

// timePasses makes leases run out and what waits for its time due: whoever held
// and planned it is dead.
func timePasses(t *testing.T, w *provisiontest.World) {
	t.Helper()
	exec(t, w, `
		WITH a AS (UPDATE apps SET leased_until = '-infinity', next_attempt_at = now() WHERE state <> 'deleted'),
			k AS (UPDATE keys SET leased_until = '-infinity', next_attempt_at = now()),
			d AS (UPDATE adoptions SET leased_until = '-infinity', next_attempt_at = now()),
			r AS (UPDATE reconciliations SET leased_until = '-infinity', next_attempt_at = now()),
			c AS (UPDATE campaigns SET leased_until = '-infinity', next_attempt_at = now()),
			q AS (UPDATE quarantines SET leased_until = '-infinity', next_attempt_at = now()),
			p AS (UPDATE refused_pats SET next_check_at = now())
		UPDATE upstream_budget SET paused_until = 'epoch', probe_until = 'epoch'`)
}

// rest waits until nothing is in the works.
func rest(t *testing.T, w *provisiontest.World) {
	t.Helper()
	conn := pgtest.Conn(t, w.URL)
	provisiontest.Eventually(t, "nothing is in the works", func() bool {
		var open int
		err := conn.QueryRow(t.Context(), `
			SELECT (SELECT count(*) FROM apps WHERE state IN ('building', 'purging') OR state IN ('held', 'retained') AND pending)
				+ (SELECT count(*) FROM keys WHERE state IN ('creating', 'revoking'))
				+ (SELECT count(*) FROM adoptions WHERE state = 'checking')
				+ (SELECT count(*) FROM quarantines WHERE state = 'checking')
				+ (SELECT count(*) FROM reconciliations WHERE state = 'running')
				+ (SELECT count(*) FROM reconciliation_items WHERE state = 'decided')
				+ (SELECT count(*) FROM campaigns WHERE ended_at IS NULL AND state <> 'paused')`).Scan(&open)
		return err == nil && open == 0
	})
}

// mend makes reports, and repairs if it may, until one finds nothing that it could
// repair. Reports that begin by themselves may come between.
func mend(s *scene, repairs bool) {
	s.t.Helper()
	var last []tenant.Finding
	provisiontest.Eventually(s.t, "a report finds nothing to repair", func() bool {
		began, err := s.r.StartReport(s.t.Context(), admin)
		if errors.Is(err, tenant.Conflict) {
			return false
		}
		if err != nil {
			s.t.Fatalf("start report: %v", err)
		}
		done, found := reconciled(s.t, s.r, began)
		last = slices.DeleteFunc(found, func(f tenant.Finding) bool { return f.Action == "" })
		if len(last) == 0 {
			return true
		}
		if !repairs {
			s.t.Fatalf("a report finds %+v", last)
		}
		began, err = s.r.StartRepair(s.t.Context(), done.Token, admin)
		if err == nil {
			reconciled(s.t, s.r, began)
		} else if !errors.Is(err, tenant.Conflict) {
			s.t.Fatalf("start repair: %v", err)
		}
		return false
	})
}

// sound checks what has to hold whatever happened.
func sound(s *scene, sc crashScenario) {
	t, w := s.t, s.w
	t.Helper()
	if sc.differs {
		rest(t, w)
		mend(s, true)
	}
	var tenants []tenant.ID
	for id, app := range s.holds {
		tenants = append(tenants, id)
		if got := signUp(t, s.r, id); got.AppID != app && !sc.moves {
			t.Errorf("%s had the app %s before the crash, and has %s", id, app, got.AppID)
		}
	}
	for _, id := range sc.newcomers { // who got no answer asks again
		tenants = append(tenants, id)
		signUp(t, s.r, id)
	}
	rest(t, w)
	mend(s, false)
	rest(t, w)
	if is, err := s.r.DB.Recovery(t.Context()); err != nil || is.Active() {
		t.Errorf("recovery mode is %+v, %v", is, err)
	}
	control := string(tenant.ControlID("t", s.r.Deployment.ID))
	before := w.Sim.Calls()
	mend(s, false)
	for _, c := range w.Sim.Calls()[len(before):] {
		renews := sc.control && c.Call == "PatchApp" && c.AppID == control
		if !strings.HasPrefix(c.Call, "List") && !strings.HasPrefix(c.Call, "Get") && !renews {
			t.Errorf("a report of what is sound called %s", c.Call)
		}
	}

	conn := pgtest.Conn(t, w.URL)
	rows, _ := conn.Query(t.Context(), `
		SELECT a.id, a.state, coalesce(a.tenant_id, ''), coalesce(t.state, ''), count(k.id)
		FROM apps a LEFT JOIN tenants t ON t.app_id = a.id LEFT JOIN keys k ON k.app_id = a.id AND k.state = 'active'
		WHERE a.state IN ('ready', 'held', 'retained') GROUP BY a.id, t.state`)
	known := map[tenant.AppID]tenant.ID{}
	held := map[tenant.ID]int{}
	pool := 0
	var app tenant.AppID
	var state tenant.AppState
	var of tenant.ID
	var tenantState tenant.State
	var keys int
	if _, err := pgx.ForEachRow(rows, []any{&app, &state, &of, &tenantState, &keys}, func() error {
		known[app] = of
		switch {
		case state == tenant.AppReady:
			pool++
		case state != tenant.AppHeld || tenantState != tenant.Active:
			t.Errorf("the app %s is %s by %s, who is %s", app, state, of, tenantState)
		default:
			held[of]++
		}
		if keys != 1 {
			t.Errorf("the app %s has %d active keys; want one", app, keys)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if pool < sc.pool || pool > sc.pool+sc.spare || len(held) != len(tenants) {
		t.Errorf("%d apps are in the pool and %d tenants hold some; want %d and %d", pool, len(held), sc.pool, len(tenants))
	}
	for _, id := range tenants {
		if held[id] != 1 {
			t.Errorf("%s holds %d apps; want one", id, held[id])
		}
		got, _, err := s.r.SignUp(t.Context(), id, tenant.SignUp{}, 0, caller)
		if err != nil || !keyWorks(t, w, s.r, got) {
			t.Errorf("the key of %s does not open its app, %v", id, err)
		}
	}
	retired := column(t, w, `SELECT id FROM apps WHERE state = 'retired'`)
	outOfUse, foreign, recorded := 0, 0, false
	for _, a := range w.Sim.Apps() {
		of, ok := known[tenant.AppID(a.ID)]
		if a.ID == control {
			recorded = true
		} else if slices.Contains(retired, a.ID) {
			outOfUse++
		} else if !ok {
			foreign++
		} else if got := ownerAt(w, a); got != of && !sc.unmarked {
			t.Errorf("the marker of %s names %q; want %q", a.ID, got, of)
		} else if when := purgeAt(a); when != "" {
			t.Errorf("the marker of %s, which is held, says that it is removed at %s", a.ID, when)
		}
		delete(known, tenant.AppID(a.ID))
	}
	if foreign != sc.foreign || len(known) > 0 {
		t.Errorf("Clarifai has %d apps that no row claims, want %d, and lacks %v", foreign, sc.foreign, known)
	}
	if outOfUse != sc.retired || len(retired) != sc.retired {
		t.Errorf("%d apps are retired, and Clarifai has %d of them; want %d", len(retired), outOfUse, sc.retired)
	}
	if recorded != sc.control {
		t.Errorf("Clarifai has the control record: %v; want %v", recorded, sc.control)
	}
	keysClaimed(t, w, sc.lost)
}

// ownerAt returns the tenant in the marker of an app at Clarifai.
func ownerAt(w *provisiontest.World, a clarifaisim.AppInfo) tenant.ID {
	marker, _ := a.Metadata["tenantry"].(map[string]any)
	sealed, _ := marker["tenant"].(string)
	if sealed == "" {
		return ""
	}
	owner, err := w.Keys.OpenOwner(tenant.AppID(a.ID), sealed)
	if err != nil {
		return tenant.ID(err.Error())
	}
	return owner.Tenant
}

// purgeAt returns the time of removal in the ownership tag of an app.
func purgeAt(a clarifaisim.AppInfo) string {
	marker, _ := a.Metadata["tenantry"].(map[string]any)
	at, _ := marker["purge_after"].(string)
	return at
}

// keysClaimed checks that each key at Clarifai is one that a row knows, or one of
// those that are lost and said to be.
func keysClaimed(t *testing.T, w *provisiontest.World, lost int) {
	t.Helper()
	conn := pgtest.Conn(t, w.URL)
	for _, k := range w.AppKeys() {
		marker, ok := tenant.ParseKeyMarker(k.Description)
		var state tenant.KeyState
		var same bool
		if !ok { // it was adopted
			if err := conn.QueryRow(t.Context(), `SELECT id FROM keys WHERE fingerprint = $1`, w.Keys.Fingerprint(tenant.NewSecret(k.ID))).
				Scan(&marker.KeyID); err != nil {
				t.Errorf("Clarifai has the key %q of the app %s, which has neither marker nor row: %v", k.Description, k.AppID, err)
				continue
			}
		}
		if err := conn.QueryRow(t.Context(), `SELECT state, coalesce(fingerprint = $2, false) FROM keys WHERE id = $1`,
			marker.KeyID, w.Keys.Fingerprint(tenant.NewSecret(k.ID))).Scan(&state, &same); err != nil {
			t.Errorf("Clarifai has the key %s, which has no row: %v", marker.KeyID, err)
			continue
		}
		switch {
		case state == tenant.KeyLost:
			lost--
		case !same || !slices.Contains([]tenant.KeyState{tenant.KeyActive, tenant.KeyRetiring, tenant.KeyRevoking}, state):
			t.Errorf("Clarifai has the key %s, and its row is %s, of the same secret: %v", marker.KeyID, state, same)
		}
	}
	if lost != 0 {
		t.Errorf("%d fewer keys are lost than wanted", lost)
	}
}
