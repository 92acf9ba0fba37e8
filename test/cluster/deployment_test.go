package cluster_test

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tenantry/tenantry/internal/clarifaisim"
	"github.com/tenantry/tenantry/internal/tenant"
	"github.com/tenantry/tenantry/test/cluster"
)

// A deployment is a cluster with a record of the apps and keys that callers were told. check
// compares the two. No scenario ends a retention, so no app of a tenant may be removed.
type deployment struct {
	*cluster.Cluster
	t *testing.T

	mu       sync.Mutex
	accounts map[string]account // what each tenant was told last
	owners   map[string]string  // of each app and each key, its tenant
	dead     map[string]bool    // keys that a caller asked to end
}

type account struct{ app, key string }

// watch is TENANTRY_RECOVERY_WATCH of the scenarios that do not test the default of 150 s.
const watch = 4 * time.Second

// deploy starts a cluster with a pool of 3 and waits until the control record exists.
func deploy(t *testing.T, o cluster.Options) *deployment {
	t.Helper()
	env := map[string]string{"TENANTRY_RECOVERY_WATCH": watch.String(), "TENANTRY_SHUTDOWN_DELAY": "0s", "TENANTRY_LOG_LEVEL": "warn",
		"TENANTRY_POOL_MIN": "3", "TENANTRY_POOL_MAX": "3"}
	maps.Copy(env, o.Env)
	o.Env = env
	d := &deployment{Cluster: cluster.New(t, o), t: t, accounts: map[string]account{}, owners: map[string]string{}, dead: map[string]bool{}}
	d.Eventually("the control record exists", func() bool {
		return d.Replicas[0].Call(http.MethodGet, "/v1/recovery", nil, tenant.Viewer).Text("control_seen_at") != ""
	})
	return d
}

// within is Eventually with another deadline.
func (d *deployment) within(limit time.Duration, what string, ok func() bool) time.Duration {
	d.t.Helper()
	began := time.Now()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Since(began) > limit {
			d.t.Fatalf("timed out after %s: %s", limit, what)
		}
		<-tick.C
	}
	return time.Since(began)
}

// tell records the app and the key that a response shows to a tenant.
func (d *deployment) tell(id, app, key string) {
	d.t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, what := range []string{app, key} {
		if of := d.owners[what]; of != "" && of != id {
			d.t.Errorf("R1: %s was told the app %s, and the app or the key is %s's", id, app, of)
		}
		if what != "" {
			d.owners[what] = id
		}
	}
	d.accounts[id] = account{app, key}
}

// signUp signs tenants up. Existing tenants must have the account that they were told.
func (d *deployment) signUp(r *cluster.Replica, ids ...string) {
	d.t.Helper()
	for _, id := range ids {
		d.mu.Lock()
		was, known := d.accounts[id]
		d.mu.Unlock()
		app, key := r.SignUp(id)
		if known && (account{app, key}) != was {
			d.t.Errorf("%s had the app %s and has the app %s, with the same key: %v", id, was.app, app, key == was.key)
		}
		d.tell(id, app, key)
	}
}

// load signs tenants up at a rate until stop, which returns the times of the sign-ups. After
// an error it repeats the request for the same tenant.
func (d *deployment) load(prefix string, every time.Duration, replicas ...*cluster.Replica) (stop func() []time.Time) {
	ctx, cancel := context.WithCancel(d.t.Context())
	told := make([][]time.Time, len(replicas))
	var wg sync.WaitGroup
	for i, r := range replicas {
		wg.Go(func() {
			tick := time.NewTicker(every)
			defer tick.Stop()
			for n := 0; ; {
				id := fmt.Sprintf("%s_%d_%d", prefix, i, n)
				calling, end := context.WithTimeout(ctx, 15*time.Second)
				resp, err := r.TryCall(calling, http.MethodPut, "/v1/tenants/"+id, nil, tenant.Provisioner)
				end()
				if key := resp.Text("credentials", "key"); err == nil && key != "" {
					d.tell(id, resp.Text("app", "id"), key)
					told[i] = append(told[i], time.Now())
					n++
				}
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
				}
			}
		})
	}
	return func() []time.Time {
		cancel()
		wg.Wait()
		all := slices.Concat(told...)
		slices.SortFunc(all, time.Time.Compare)
		return all
	}
}

// after returns the time from began to the first of times after it, -1 without one.
func after(began time.Time, times []time.Time) time.Duration {
	for _, t := range times {
		if t.After(began) {
			return t.Sub(began).Round(10 * time.Millisecond)
		}
	}
	return -1
}

// command sends a command about a tenant or to /v1/recovery, and waits for a final response.
func (d *deployment) command(r *cluster.Replica, method, path string, body any) cluster.Response {
	d.t.Helper()
	var resp cluster.Response
	d.Eventually(method+" "+path, func() bool {
		resp = r.Call(method, path, body, tenant.Admin)
		return resp.Status < 500
	})
	if resp.Status >= 300 {
		d.t.Fatalf("%s %s: %d %s", method, path, resp.Status, resp.Raw)
	}
	return resp
}

// inState waits until a tenant is in a state.
func (d *deployment) inState(r *cluster.Replica, id, state string) {
	d.t.Helper()
	d.Eventually(id+" is "+state, func() bool {
		return r.Call(http.MethodGet, "/v1/tenants/"+id, nil, tenant.Viewer).Text("state") == state
	})
}

// ends records that all keys of a tenant must stop working, and sends the command.
func (d *deployment) ends(r *cluster.Replica, method, path, id string, body any) {
	d.t.Helper()
	for what, of := range d.owners {
		if of == id && !isApp(what) {
			d.dead[what] = true
		}
	}
	d.command(r, method, path, body)
}

// isApp tells an app from a key.
func isApp(s string) bool { return strings.HasPrefix(s, "tny-") }

// recovery returns the state of recovery mode, "" if the replica does not respond.
func recovery(r *cluster.Replica) string {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	resp, _ := r.TryCall(ctx, http.MethodGet, "/v1/recovery", nil, tenant.Admin)
	return resp.Text("state")
}

// waitRecovery waits until recovery mode is in a state.
func (d *deployment) waitRecovery(r *cluster.Replica, state string) {
	d.t.Helper()
	d.Eventually(r.Name+": recovery mode is "+state, func() bool { return recovery(r) == state })
}

// lossNoted waits until a database knows that it lacks transactions.
func (d *deployment) lossNoted(s *cluster.Server) {
	d.t.Helper()
	d.Eventually("the loss is noted", func() bool {
		return s.Text(`SELECT lost <> '' OR EXISTS (SELECT FROM audit_events WHERE action = 'recovery.recovering') FROM current_incarnation`) == "t"
	})
}

// findings waits for the report of recovery mode and returns the kinds of what must be decided.
func (d *deployment) findings(r *cluster.Replica) []string {
	d.t.Helper()
	d.waitRecovery(r, "recovering")
	d.Eventually("the report is done", func() bool {
		return r.Proxy.Target().Text(`SELECT count(*) FROM reconciliations, current_incarnation
			WHERE kind = 'report' AND state = 'done' AND created_at > recovery_since`) != "0"
	})
	var kinds []string
	list, _ := r.Call(http.MethodGet, "/v1/recovery/findings", nil, tenant.Admin).JSON["findings"].([]any)
	for _, f := range list {
		kinds = append(kinds, f.(map[string]any)["kind"].(string))
	}
	slices.Sort(kinds)
	return kinds
}

// decide makes one choice for all findings of a kind, and waits until it is carried out.
func (d *deployment) decide(r *cluster.Replica, kind, choice string) {
	d.t.Helper()
	d.command(r, http.MethodPost, "/v1/recovery/decisions", map[string]any{"kind": kind, "choice": choice})
	d.Eventually("the decision is carried out", func() bool {
		return r.Proxy.Target().Text(`SELECT count(*) FROM reconciliation_items WHERE state = 'decided'`) == "0"
	})
}

// tagged waits until the apps of tenants are tagged with their tenants.
func (d *deployment) tagged(ids ...string) {
	d.t.Helper()
	d.Eventually("apps are tagged", func() bool {
		n := 0
		for _, app := range d.Sim.Apps() {
			tag, _ := app.Metadata["tenantry"].(map[string]any)
			if slices.Contains(ids, d.owners[app.ID]) && tag["tenant"] != nil {
				n++
			}
		}
		return n == len(ids)
	})
}

// poolFull waits until the pool of the current incarnation is full.
func (d *deployment) poolFull(s *cluster.Server) time.Duration {
	d.t.Helper()
	return d.within(time.Minute, "the pool is full", func() bool {
		n, err := s.TryText(`SELECT count(*) FROM apps WHERE state = 'ready' AND incarnation = stored_incarnation()`)
		return err == nil && n == "3"
	})
}

// recorded waits until the control record names an event after all sign-ups so far: it
// shows a loss of them even if no replica remembers them.
func (d *deployment) recorded(s *cluster.Server) {
	d.t.Helper()
	newest := s.Text(`SELECT max(id) FROM audit_events`)
	d.Eventually("the control record is renewed", func() bool {
		return slices.ContainsFunc(d.Sim.Apps(), func(a clarifaisim.AppInfo) bool {
			tag, _ := a.Metadata["tenantry"].(map[string]any)
			control, _ := tag["control"].(map[string]any)
			event, _ := control["event"].(string)
			return len(event) > len(newest) || len(event) == len(newest) && event >= newest
		})
	})
}

// keys returns the app of each key that works.
func (d *deployment) keys() map[string]string {
	keys := map[string]string{}
	for _, k := range d.Sim.Keys() {
		keys[k.ID] = k.AppID
	}
	return keys
}

// check compares what callers were told with Clarifai and with the databases in use.
func (d *deployment) check(databases ...*cluster.Server) {
	d.t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.Eventually("no dead key works", func() bool {
		keys := d.keys()
		return !slices.ContainsFunc(slices.Collect(maps.Keys(d.dead)), func(k string) bool { return keys[k] != "" })
	})
	keys := d.keys()
	apps := map[string]bool{}
	for _, a := range d.Sim.Apps() {
		apps[a.ID] = true
	}
	for app, id := range d.owners {
		if isApp(app) && !apps[app] {
			d.t.Errorf("R3: the app %s of %s is gone", app, id)
		}
	}
	for id, a := range d.accounts {
		if keys[a.key] != a.app && !d.dead[a.key] {
			d.t.Errorf("R2: the key of %s opens the app %q, want %s", id, keys[a.key], a.app)
		}
	}
	for _, s := range databases {
		for line := range strings.Lines(s.Text(`SELECT coalesce(string_agg(id || ' ' || tenant_id, E'\n'), '') FROM apps WHERE tenant_id IS NOT NULL`)) {
			app, id, _ := strings.Cut(strings.TrimSpace(line), " ")
			if of := d.owners[app]; of != "" && of != id {
				d.t.Errorf("R1: %s has given the app %s of %s to %s", s.Name, app, of, id)
			}
		}
		if bad := s.Text(`SELECT string_agg(e.app_id, ' ') FROM audit_events e JOIN apps a ON a.id = e.app_id
				JOIN audit_events b ON b.action = 'incarnation.began' AND b.detail->>'after' = a.incarnation::text
			WHERE e.action = 'tenant.created' AND e.id > b.id`); bad != "" {
			d.t.Errorf("R1: %s has handed out apps of an earlier incarnation: %s", s.Name, bad)
		}
	}
}

// neverRecovering checks that a database was in recovery mode only to watch.
func (d *deployment) neverRecovering(s *cluster.Server) {
	d.t.Helper()
	if got := s.Text(`SELECT string_agg(detail->>'reason', '; ') FROM audit_events WHERE action IN ('recovery.recovering', 'recovery.stopped')`); got != "" {
		d.t.Errorf("nothing was lost, and recovery mode began: %s", got)
	}
}

func names(prefix string, n int) []string {
	var ids []string
	for i := range n {
		ids = append(ids, fmt.Sprint(prefix, "_", i+1))
	}
	return ids
}

// adopt takes an app over for a tenant.
func (d *deployment) adopt(r *cluster.Replica, id string, what map[string]any) {
	d.t.Helper()
	d.Eventually("adoption for "+id, func() bool {
		resp := r.Call(http.MethodPut, "/v1/tenants/"+id, map[string]any{"adopt": what}, tenant.Provisioner)
		if resp.Status >= 400 && resp.Status < 500 {
			d.t.Fatalf("adoption for %s: %d %s", id, resp.Status, resp.Raw)
		}
		return resp.Status < 300 && resp.Status != http.StatusAccepted
	})
}
