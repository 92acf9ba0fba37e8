package cluster_test

import (
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tenantry/tenantry/internal/clarifaisim"
	"github.com/tenantry/tenantry/internal/tenant"
	"github.com/tenantry/tenantry/test/cluster"
)

// A standby that lacks the last sign-ups is promoted. Recovery mode begins without a command,
// and the lost tenants get their apps and keys back.
func TestPromotionWithLoss(t *testing.T) {
	for _, tags := range []bool{true, false} {
		t.Run(fmt.Sprint("tags=", tags), func(t *testing.T) {
			t.Parallel()
			if !tags {
				cluster.SkipUnlessFull(t)
			}
			d := deploy(t, cluster.Options{Standbys: 1, Replicas: 2, Env: map[string]string{"TENANTRY_MARK_TENANTS": fmt.Sprint(tags)}})
			standby, first, second := d.Standbys[0], d.Replicas[0], d.Replicas[1]
			kept, lost := names("kept", 2), names("lost", 5)
			d.signUp(first, kept...)
			d.poolFull(d.Primary)
			standby.WaitCaughtUp()
			standby.CutReplication()
			d.signUp(first, lost[:3]...)
			d.signUp(second, lost[3:]...)
			if tags {
				d.tagged(lost...)
			}
			stop := d.load("during", 100*time.Millisecond, first, second)
			d.Primary.Kill()
			standby.Promote()
			promoted := time.Now()
			d.Proxy.Switch(standby)
			d.lossNoted(standby)
			var found []string
			if tags { // without them a report finds nothing, and recovery mode ends
				found = d.findings(first)
				d.waitRecovery(second, "recovering")
			}
			recovering := time.Since(promoted)
			d.signUp(second, "later")
			times := stop()
			t.Logf("after the promotion: first sign-up after %s, recovery mode and report after %s, findings %v",
				after(promoted, times), recovering.Round(10*time.Millisecond), found)
			d.signUp(first, kept...)
			d.check(standby)
			if resp := first.Call(http.MethodGet, "/v1/tenants/lost_1", nil, tenant.Viewer); tags && resp.Status != http.StatusConflict || resp.Text("code") != "recovery_unknown" {
				t.Errorf("a lost tenant is %d %s", resp.Status, resp.Raw)
			}
			if tags {
				for _, kind := range []string{"app_forgotten", "app_unknown"} {
					if slices.Contains(found, kind) {
						d.decide(first, kind, "adopt")
					}
				}
			} else {
				d.waitRecovery(first, "none")
				for _, id := range lost {
					a := d.accounts[id]
					d.adopt(first, id, map[string]any{"app_id": a.app, "key": a.key})
				}
			}
			d.waitRecovery(first, "none")
			d.signUp(second, lost...)
			d.check(standby)
		})
	}
}

// A synchronous standby is promoted: nothing is lost, and recovery mode ends at once.
func TestPromotionWithoutLoss(t *testing.T) {
	t.Parallel()
	d := deploy(t, cluster.Options{Standbys: 1, Replicas: 2, Env: map[string]string{"TENANTRY_UPSTREAM_RATE": "14", "TENANTRY_RECOVERY_WATCH": "150s"}})
	standby, r := d.Standbys[0], d.Replicas[0]
	d.poolFull(d.Primary)
	d.Primary.SetSynchronous(standby)
	tenants := names("before", 4)
	d.signUp(r, tenants...)
	stop := d.load("during", 300*time.Millisecond, d.Replicas...)
	d.Primary.Kill()
	standby.Promote()
	promoted := time.Now()
	d.Proxy.Switch(standby)
	d.signUp(r, "first")
	first := time.Since(promoted)
	d.Eventually("the next incarnation begins", func() bool { return standby.Text(`SELECT count(*) FROM incarnations`) == "2" })
	d.waitRecovery(r, "none")
	ended := time.Since(promoted)
	stop()
	d.poolFull(standby)
	t.Logf("after the promotion: first sign-up after %s, recovery mode ends after %s, pool full after %s",
		first.Round(10*time.Millisecond), ended.Round(10*time.Millisecond), time.Since(promoted).Round(10*time.Millisecond))
	d.signUp(r, tenants...)
	d.signUp(r, names("after", 4)...)
	d.neverRecovering(standby)
	d.check(standby)
}

// Restarts of everything, planned or not, lose nothing.
func TestRestarts(t *testing.T) {
	t.Parallel()
	d := deploy(t, cluster.Options{Replicas: 2})
	each := func(do func(*cluster.Replica)) {
		for _, r := range d.Replicas {
			do(r)
		}
	}
	for n, restart := range []struct {
		name string
		do   func()
	}{
		{"planned restart of the primary", func() { d.Primary.Stop(); d.Primary.Start() }},
		{"clean stop of everything", func() {
			each((*cluster.Replica).Stop)
			d.Primary.Stop()
			d.Primary.Start()
			each((*cluster.Replica).Start)
		}},
		{"kill -9 of everything", func() {
			each((*cluster.Replica).Kill)
			d.Primary.Kill()
			d.Primary.Start()
			each((*cluster.Replica).Start)
		}},
	} {
		d.poolFull(d.Primary)
		d.signUp(d.Replicas[0], fmt.Sprint("before_", n))
		restart.do()
		began := time.Now()
		d.signUp(d.Replicas[1], fmt.Sprint("after_", n))
		signedUp := time.Since(began)
		d.Eventually("the next incarnation begins", func() bool { return d.Primary.Text(`SELECT count(*) FROM incarnations`) == fmt.Sprint(n+2) })
		d.waitRecovery(d.Replicas[0], "none")
		t.Logf("%s: first sign-up after %s, recovery mode ends after %s", restart.name, signedUp.Round(10*time.Millisecond), time.Since(began).Round(10*time.Millisecond))
		d.signUp(d.Replicas[0], slices.Collect(maps.Keys(d.accounts))...)
		d.neverRecovering(d.Primary)
		d.check(d.Primary)
	}
	each(func(r *cluster.Replica) {
		if lines := r.LogLines("control record not updated"); len(lines) > 0 {
			t.Errorf("a clean stop of everything must be in the control record: %v", lines)
		}
	})
}

// The database, or a part of it, is set back to an earlier state. A pool that the rows still
// call ready was handed out since, partly without ownership tags.
func TestRestores(t *testing.T) {
	for _, restore := range []struct {
		name    string
		full    bool
		options cluster.Options
		// backup takes a backup, and returns what restores it after more sign-ups.
		backup func(d *deployment) (restore func())
		lost   bool // transactions are lost
		noted  bool // and Tenantry notices
	}{
		{"files", false, cluster.Options{}, backupFiles, true, true},
		{"dump under a live service", true, cluster.Options{}, func(d *deployment) func() {
			dump := d.Primary.Dump(cluster.Database)
			return func() { replaceDatabase(d, dump) }
		}, true, true},
		{"dump after a stop", true, cluster.Options{}, func(d *deployment) func() {
			dump := d.Primary.Dump(cluster.Database)
			return func() {
				d.Replicas[0].Stop()
				replaceDatabase(d, dump)
				d.Replicas[0].Start()
			}
		}, true, true},
		{"table apps", true, cluster.Options{}, func(d *deployment) func() {
			d.Primary.Exec(`CREATE TABLE backup AS SELECT * FROM apps`)
			return func() {
				d.Primary.Exec(`
					SET session_replication_role = replica;
					ALTER TABLE tenants DROP CONSTRAINT tenants_app_is_theirs;
					ALTER TABLE keys DROP CONSTRAINT keys_app;
					TRUNCATE apps;
					INSERT INTO apps SELECT * FROM backup;
					ALTER TABLE tenants ADD CONSTRAINT tenants_app_is_theirs FOREIGN KEY (app_id, id, generation)
						REFERENCES apps (id, tenant_id, tenant_generation) NOT VALID;
					ALTER TABLE keys ADD CONSTRAINT keys_app FOREIGN KEY (app_id) REFERENCES apps (id) NOT VALID`)
			}
		}, true, false},
		{"rows under a live service", true, cluster.Options{}, func(d *deployment) func() {
			data := d.Primary.Dump(cluster.Database, "--data-only")
			return func() { d.Primary.LoadData(cluster.Database, data) }
		}, true, true},
		{"asynchronous commits and a crash", true, cluster.Options{PostgresSettings: []string{"synchronous_commit=off", "wal_writer_delay=10s"}},
			func(d *deployment) func() { return d.Primary.CrashRestart }, false, false},
		{"renamed away and back", true, cluster.Options{}, func(d *deployment) func() {
			return func() {
				d.Primary.RenameDatabase(cluster.Database, "away")
				d.Primary.RenameDatabase("away", cluster.Database)
			}
		}, false, false},
		{"renamed away, replaced, and back", true, cluster.Options{}, func(d *deployment) func() {
			dump := d.Primary.Dump(cluster.Database)
			return func() {
				replaceDatabase(d, dump)
				d.waitRecovery(d.Replicas[0], "recovering")
				d.signUp(d.Replicas[0], "replaced_1", "replaced_2")
				d.tagged("replaced_1", "replaced_2")
				d.Primary.RenameDatabase(cluster.Database, "other")
				d.Primary.RenameDatabase("old", cluster.Database)
			}
		}, true, true},
	} {
		t.Run(restore.name, func(t *testing.T) {
			t.Parallel()
			if restore.full {
				cluster.SkipUnlessFull(t)
			}
			restore.options.Replicas = 1
			d := deploy(t, restore.options)
			r := d.Replicas[0]
			d.signUp(r, "kept_1", "kept_2")
			d.poolFull(d.Primary)
			d.tagged("kept_1", "kept_2")
			put := restore.backup(d)
			// At Clarifai a tag may be late: the last sign-up is not waited for.
			lost := names("lost", 5)
			d.signUp(r, lost[:3]...)
			d.tagged(lost[:3]...)
			d.signUp(r, lost[3:]...)
			put()
			d.signUp(r, names("next", 7)...) // more than the pool
			d.signUp(r, "kept_1", "kept_2")
			d.check(d.Primary)
			if !restore.lost {
				d.waitRecovery(r, "none")
				d.neverRecovering(d.Primary)
				d.signUp(r, lost...)
				d.check(d.Primary)
				return
			}
			if !restore.noted {
				d.waitRecovery(r, "none")
				d.command(r, http.MethodPost, "/v1/recovery/begin", map[string]any{"reason": "restored by hand"})
			}
			found := d.findings(r)
			t.Logf("findings %v, %s retired apps", found, d.Primary.Text(`SELECT count(*) FROM apps WHERE state = 'retired'`))
			for _, kind := range slices.Compact(found) {
				d.decide(r, kind, "adopt")
			}
			d.waitRecovery(r, "none")
			d.check(d.Primary)
			for _, id := range lost {
				a := d.accounts[id]
				if r.Call(http.MethodGet, "/v1/tenants/"+id, nil, tenant.Viewer).Status == http.StatusNotFound { // without a tag, its key is the proof
					d.adopt(r, id, map[string]any{"app_id": a.app, "key": a.key})
				}
			}
			d.signUp(r, slices.Collect(maps.Keys(d.accounts))...)
			d.check(d.Primary)
		})
	}
}

func backupFiles(d *deployment) func() {
	files := d.Primary.Snapshot()
	return func() {
		d.Replicas[0].Stop()
		d.Primary.Stop()
		d.Primary.Restore(files)
		d.Primary.Start()
		d.Replicas[0].Start()
	}
}

// replaceDatabase restores a dump into a new database, renames the old one to "old" and the
// new one to its name.
func replaceDatabase(d *deployment, dump string) {
	d.Primary.CreateDatabase("restored")
	d.Primary.Load("restored", dump)
	d.Primary.RenameDatabase(cluster.Database, "old")
	d.Primary.RenameDatabase("restored", cluster.Database)
}

// The primary hangs, a standby is promoted, and the primary comes back while a replica still
// uses it. One of the two databases stops. Then both replicas move to the other one.
func TestHungPrimary(t *testing.T) {
	for _, hang := range []struct {
		name  string
		watch time.Duration
		time  time.Duration
		full  bool
		back  bool // the hung primary gets its role back
	}{
		{"30 s", 150 * time.Second, 30 * time.Second, true, false},
		{"200 s", 150 * time.Second, 200 * time.Second, true, false},
		{"6 s", watch, 6 * time.Second, true, false},
		{"6 s, then primary again", watch, 6 * time.Second, true, true},
	} {
		t.Run(hang.name, func(t *testing.T) {
			t.Parallel()
			if hang.full {
				cluster.SkipUnlessFull(t)
			}
			d := deploy(t, cluster.Options{Standbys: 1, Replicas: 1, Env: map[string]string{"TENANTRY_RECOVERY_WATCH": hang.watch.String()}})
			standby, moved := d.Standbys[0], d.Replicas[0]
			left := d.StartReplica(cluster.ReplicaOptions{Proxy: d.NewProxy(d.Primary)})
			d.signUp(moved, names("before", 3)...)
			d.poolFull(d.Primary)
			standby.WaitCaughtUp()
			stop := d.load("during", 200*time.Millisecond, moved, left)
			hung := time.Now()
			d.Primary.Freeze()
			standby.CutReplication()
			standby.Promote()
			promoted := time.Now()
			d.Proxy.Switch(standby)
			d.within(hang.time+time.Minute, "the hang ends", func() bool { return time.Since(hung) > hang.time })
			d.Primary.Thaw()
			thawed := time.Now()
			if hang.back {
				d.Proxy.Switch(d.Primary)
				d.lossNoted(d.Primary)
			} else {
				var states []string
				d.within(2*hang.watch+time.Minute, "one of the two databases stops", func() bool {
					states = []string{recovery(moved), recovery(left)}
					return slices.Contains(states, "stopped")
				})
				t.Logf("%s after the return of the primary: recovery mode is %s, and %s at the old primary", time.Since(thawed).Round(time.Second), states[0], states[1])
				if slices.Index(states, "stopped") == 0 {
					d.Proxy.Switch(d.Primary)
				} else {
					left.Proxy.Switch(standby)
				}
			}
			signedUp := time.Now()
			d.signUp(moved, "moved")
			d.signUp(left, "left")
			t.Logf("first sign-up %s after the promotion; sign-ups %s after the role is clear", after(promoted, stop()), time.Since(signedUp).Round(10*time.Millisecond))
			d.check(d.Primary, standby)
		})
	}
}

// Nothing comes from Postgres for 30 s, or its role moves meanwhile: nothing is lost. Prints how soon sign-ups
// that need a build go on.
func TestBlackHole(t *testing.T) {
	cluster.SkipUnlessFull(t)
	for _, promoted := range []bool{false, true} {
		t.Run(fmt.Sprint("promoted=", promoted), func(t *testing.T) {
			d := deploy(t, cluster.Options{Standbys: 1, Replicas: 2, Env: map[string]string{"TENANTRY_UPSTREAM_RATE": "14", "TENANTRY_POOL_MIN": "0", "TENANTRY_POOL_MAX": "0"}})
			standby, database := d.Standbys[0], d.Primary
			var stops []func() []time.Time
			for i := range 4 {
				stops = append(stops, d.load(fmt.Sprint("during_", i), 50*time.Millisecond, d.Replicas...))
			}
			began := time.Now()
			d.within(time.Minute, "sign-ups are under way", func() bool { return d.Primary.Text(`SELECT count(*) > 20 FROM tenants WHERE state = 'active'`) == "t" })
			if promoted {
				d.Primary.SetSynchronous(standby)
			}
			d.Proxy.BlackHole()
			hole := time.Now()
			d.within(time.Minute, "the black hole lasts", func() bool { return time.Since(hole) > 30*time.Second })
			if promoted {
				d.Primary.Kill()
				standby.Promote()
				d.Proxy.SetTarget(standby)
				database = standby
			}
			d.Proxy.Forward()
			over := time.Now()
			// The callers from before may still wait for responses that never come: these are new ones.
			var callers sync.WaitGroup
			took := make([]time.Duration, 75)
			for i := range took {
				callers.Go(func() {
					id, r := fmt.Sprint("after_", i), d.Replicas[i%2]
					time.Sleep(time.Until(over.Add(time.Duration(i) * 200 * time.Millisecond)))
					for key := ""; key == "" && time.Since(over) < time.Minute; {
						resp, _ := r.TryCall(t.Context(), http.MethodPut, "/v1/tenants/"+id, nil, tenant.Provisioner)
						if key = resp.Text("credentials", "key"); key == "" {
							time.Sleep(100 * time.Millisecond)
							continue
						}
						d.tell(id, resp.Text("app", "id"), key)
					}
					took[i] = time.Since(over).Round(10 * time.Millisecond)
				})
			}
			callers.Wait()
			before := 0
			for _, stop := range stops {
				for _, at := range stop() {
					if at.Before(hole) {
						before++
					}
				}
			}
			slices.Sort(took)
			t.Logf("%.1f sign-ups a second before; after the black hole, of one caller each 0.2 s, the first is signed up after %s, the tenth after %s, the last after %s",
				float64(before)/hole.Sub(began).Seconds(), took[0], took[9], took[len(took)-1])
			d.waitRecovery(d.Replicas[0], "none")
			d.check(database)
		})
	}
}

// A copy of production with a campaign, a rotation by age and a removal due, and with commands
// of its own, stops. Production goes on.
func TestCopy(t *testing.T) {
	t.Parallel()
	profiles := filepath.Join(t.TempDir(), "profiles.yaml")
	if err := os.WriteFile(profiles, []byte("profiles:\n  default: {key_scopes: [All], max_key_age: 1h, pool: {min: 3, max: 3}}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	d := deploy(t, cluster.Options{Replicas: 1, Env: map[string]string{"TENANTRY_PROFILES_FILE": profiles, "TENANTRY_POOL_MIN": "", "TENANTRY_POOL_MAX": ""}})
	production := d.Replicas[0]
	d.signUp(production, "aged", "rotated", "suspended", "deleted", "purged")
	d.tagged("aged", "rotated", "suspended", "deleted", "purged")
	d.ends(production, http.MethodDelete, "/v1/tenants/purged", "purged", nil)
	d.Eventually("the deletion is done", func() bool {
		return d.Primary.Text(`SELECT count(*) FROM apps WHERE state = 'retained' AND NOT pending AND tagged_purge_after IS NOT NULL`) == "1"
	})
	d.poolFull(d.Primary)
	c := d.StartCopy(d.Primary.Snapshot())
	c.Exec(`UPDATE apps SET purge_after = now(), next_attempt_at = now() WHERE state = 'retained'`)
	c.Exec(`UPDATE keys SET activated_at = now() - interval '1 day' WHERE state = 'active'`)
	calls := d.Sim.State().Calls
	staging := d.StartReplica(cluster.ReplicaOptions{Proxy: d.NewProxy(c)})
	for _, command := range []struct {
		method, path string
		body         any
	}{
		{http.MethodPost, "/v1/tenants/suspended/suspend", nil},
		{http.MethodDelete, "/v1/tenants/deleted?purge=now", nil},
		{http.MethodPost, "/v1/rotations", map[string]any{"all": true, "overlap": "0s"}},
	} {
		if resp := staging.Call(command.method, command.path, command.body, tenant.Admin); resp.Status >= 500 && resp.Text("code") != "another_database" {
			t.Errorf("the copy responds to %s: %d %s", command.path, resp.Status, resp.Raw)
		}
	}
	d.waitRecovery(staging, "stopped")
	if resp := staging.Call(http.MethodPut, "/v1/tenants/new", nil, tenant.Provisioner); resp.Text("code") != "another_database" {
		t.Errorf("the copy responds to a sign-up: %d %s", resp.Status, resp.Raw)
	}
	if resp := staging.Call(http.MethodGet, "/v1/tenants/aged", nil, tenant.Viewer); resp.Text("app", "id") != d.accounts["aged"].app {
		t.Errorf("the copy responds to a lookup: %d %s", resp.Status, resp.Raw)
	}
	d.signUp(production, names("new", 5)...)
	for _, call := range []string{"DeleteApp", "DeleteKey"} {
		if n := d.Sim.State().Calls[call] - calls[call]; n > 0 {
			t.Errorf("the copy made %d calls %s", n, call)
		}
	}
	if state := recovery(production); state != "none" {
		t.Errorf("recovery mode of production is %q", state)
	}
	d.neverRecovering(d.Primary)
	d.check(d.Primary, c)
}

// Production is silent for longer than the watch, and its copy starts to work. When production is
// back, one of the two stops.
func TestSilentProduction(t *testing.T) {
	for _, silence := range []struct{ watch, time time.Duration }{{watch, 2 * watch}, {150 * time.Second, 180 * time.Second}} {
		t.Run(silence.time.String(), func(t *testing.T) {
			t.Parallel()
			cluster.SkipUnlessFull(t)
			d := deploy(t, cluster.Options{Replicas: 1, Env: map[string]string{"TENANTRY_RECOVERY_WATCH": silence.watch.String()}})
			production := d.Replicas[0]
			d.signUp(production, "undone", "kept", "late")
			d.tagged("undone", "kept", "late")
			d.ends(production, http.MethodDelete, "/v1/tenants/undone", "undone", nil)
			d.Eventually("the deletion is done", func() bool {
				return d.Primary.Text(`SELECT count(*) FROM apps WHERE state = 'retained' AND NOT pending AND tagged_purge_after IS NOT NULL`) == "1"
			})
			d.poolFull(d.Primary)
			c := d.StartCopy(d.Primary.Snapshot())
			// What the copy does not know: a deletion is undone, and a tenant signs up.
			d.command(production, http.MethodPost, "/v1/tenants/undone/restore", nil)
			d.inState(production, "undone", "active")
			d.signUp(production, "unknown_to_the_copy")
			app, key := production.SignUp("undone")
			d.tell("undone", app, key)
			production.Freeze()
			began := time.Now()
			c.Exec(`UPDATE apps SET purge_after = now(), tagged_purge_after = now(), next_attempt_at = now() WHERE state = 'retained'`)
			staging := d.StartReplica(cluster.ReplicaOptions{Proxy: d.NewProxy(c)})
			took := d.within(silence.time+time.Minute, "the watch of the copy ends", func() bool { return slices.Contains([]string{"none", "recovering"}, recovery(staging)) })
			t.Logf("the copy goes to work after %s: %s", took.Round(time.Second), recovery(staging))
			d.signUp(staging, names("staging", 5)...)
			d.within(silence.time+time.Minute, "the silence ends", func() bool { return time.Since(began) > silence.time })
			production.Thaw()
			stop := d.load("back", 200*time.Millisecond, production)
			took = d.within(2*silence.watch+time.Minute, "one of the two databases stops", func() bool {
				return recovery(staging) == "stopped" || recovery(production) == "stopped"
			})
			stop()
			t.Logf("one side stops after %s: the copy is %s, production is %s", took.Round(time.Second), recovery(staging), recovery(production))
			d.check(d.Primary, c)
			if recovery(production) == "stopped" {
				staging.Stop()
				d.command(production, http.MethodPost, "/v1/recovery/take-over",
					map[string]any{"confirm": production.Call(http.MethodGet, "/v1/recovery", nil, tenant.Admin).Text("deployment")})
			}
			d.signUp(production, names("back", 5)...)
			d.check(d.Primary, c)
		})
	}
}

// A promoted standby works at once, even if its clock differs from that of the old primary.
func TestClocks(t *testing.T) {
	cluster.SkipUnlessFull(t)
	libraries, _ := filepath.Glob("/usr/lib/*/faketime/libfaketime.so.1")
	servers, _ := filepath.Glob("/usr/lib/postgresql/*/bin")
	if len(libraries) == 0 || len(servers) == 0 {
		t.Skip("needs libfaketime and the Postgres of Debian: apt-get install libfaketime postgresql")
	}
	for _, offset := range []string{"-60s", "+60s"} {
		t.Run(offset, func(t *testing.T) {
			d := deploy(t, cluster.Options{Replicas: 2})
			d.signUp(d.Replicas[0], "before")
			d.poolFull(d.Primary)
			t.Setenv("PG_BINDIR", otherClock(t, servers[len(servers)-1], libraries[0], offset))
			standby := d.AddStandby(d.Primary)
			standby.WaitCaughtUp()
			t.Logf("the clock of the standby is %s s off", standby.Text(`SELECT round(extract(epoch FROM clock_timestamp()) - $1)`, time.Now().Unix()))
			stop := d.load("during", 200*time.Millisecond, d.Replicas...)
			d.Primary.Stop()
			standby.Promote()
			promoted := time.Now()
			d.Proxy.Switch(standby)
			d.signUp(d.Replicas[0], "first")
			first := time.Since(promoted)
			d.Eventually("the next incarnation begins", func() bool { return standby.Text(`SELECT count(*) FROM incarnations`) == "2" })
			d.waitRecovery(d.Replicas[1], "none")
			ended := time.Since(promoted)
			stop()
			d.poolFull(standby)
			t.Logf("first sign-up %s after the promotion, recovery mode ends after %s, the pool is full after %s",
				first.Round(10*time.Millisecond), ended.Round(10*time.Millisecond), time.Since(promoted).Round(10*time.Millisecond))
			d.signUp(d.Replicas[0], names("after", 5)...)
			d.ends(d.Replicas[1], http.MethodPost, "/v1/tenants/before/suspend", "before", nil)
			d.inState(d.Replicas[0], "before", "suspended")
			d.check(standby)
		})
	}
}

// otherClock makes a directory with the programs of Postgres, in which the server has another clock.
func otherClock(t *testing.T, programs, library, offset string) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "tenantry-clock-") // unlike that of t.TempDir, Postgres's user may enter it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	script := fmt.Sprintf("#!/bin/sh\nLD_PRELOAD=%s FAKETIME=%s DONT_FAKE_MONOTONIC=1 exec %s/postgres \"$@\"\n", library, offset, programs)
	for _, err := range []error{os.Chmod(dir, 0o755), os.Symlink(filepath.Join(programs, "initdb"), filepath.Join(dir, "initdb")),
		os.WriteFile(filepath.Join(dir, "postgres"), []byte(script), 0o755)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// Ten failovers in an hour retire ten pools: after the first one the pools have their minimum
// size, and the account's quota of apps holds.
func TestTenFailovers(t *testing.T) {
	t.Parallel()
	cluster.SkipUnlessFull(t)
	d := deploy(t, cluster.Options{Standbys: 1, Replicas: 2, Env: map[string]string{"TENANTRY_POOL_MIN": "2", "TENANTRY_POOL_MAX": "20"}})
	quota := 2*20 + 9*2 + 48 + 10 + 1 // two large pools, nine small ones, the tenants, apps being built, the control record
	d.Settings(func(s *clarifaisim.Settings) { s.AppQuota = quota })
	primary, standby := d.Primary, d.Standbys[0]
	ready := func(n int) {
		t.Helper()
		d.Eventually(fmt.Sprint("the pool has ", n, " apps"), func() bool {
			return primary.Text(`SELECT count(*) >= $1 FROM apps WHERE state = 'ready' AND incarnation = stored_incarnation()`, n) == "t"
		})
	}
	d.signUp(d.Replicas[0], names("first", 15)...)
	ready(5) // demand has made the pool larger
	for n := range 10 {
		standby.WaitCaughtUp()
		primary.Kill()
		standby.Promote()
		d.Proxy.Switch(standby)
		d.signUp(d.Replicas[n%2], names(fmt.Sprint("after_", n), 3)...)
		d.waitRecovery(d.Replicas[0], "none")
		primary.StartAsStandbyOf(standby)
		primary, standby = standby, primary
		ready(2)
		t.Logf("failover %d: %s; %d of %d apps at Clarifai", n+1,
			primary.Text(`SELECT string_agg(n || ' ' || state, ', ') FROM (SELECT state, count(*) AS n FROM apps GROUP BY state) s`), len(d.Sim.Apps()), quota)
	}
	if n := len(d.Sim.Apps()); n > quota {
		t.Errorf("%d apps are more than the quota of %d", n, quota)
	}
	d.signUp(d.Replicas[0], names("last", 3)...)
	d.check(primary)
}

// A person begins recovery mode while apps of the pool are handed out: no app of an earlier
// incarnation is handed out afterwards.
func TestBeginDuringHandOuts(t *testing.T) {
	t.Parallel()
	cluster.SkipUnlessFull(t)
	d := deploy(t, cluster.Options{Replicas: 2, Env: map[string]string{"TENANTRY_POOL_MIN": "20", "TENANTRY_POOL_MAX": "20"}})
	r := d.Replicas[0]
	stop := d.load("during", 5*time.Millisecond, r, d.Replicas[1], r, d.Replicas[1])
	for n := range 15 {
		d.Eventually("the pool is in use", func() bool {
			return d.Primary.Text(`SELECT count(*) > 3 FROM apps WHERE state = 'ready' AND incarnation = stored_incarnation()`) == "t"
		})
		d.command(r, http.MethodPost, "/v1/recovery/begin", map[string]any{"reason": fmt.Sprint("test ", n)})
	}
	times := stop()
	d.waitRecovery(r, "none")
	t.Logf("%d sign-ups, %s incarnations, %s retired apps", len(times), d.Primary.Text(`SELECT count(*) FROM incarnations`),
		d.Primary.Text(`SELECT count(*) FROM apps WHERE state = 'retired'`))
	d.check(d.Primary)
}

// Commands that a restore lost are repeated, or other commands and decisions follow. A key that a
// caller has ended since is dead, and no dead key works again without a command.
func TestLostCommands(t *testing.T) {
	t.Parallel()
	cluster.SkipUnlessFull(t)
	d := deploy(t, cluster.Options{Replicas: 1})
	r := d.Replicas[0]
	post := func(id, change string) {
		t.Helper()
		d.command(r, http.MethodPost, "/v1/tenants/"+id+"/"+change, nil)
	}
	remove := func(id string) { t.Helper(); d.command(r, http.MethodDelete, "/v1/tenants/"+id, nil) }
	settled := func(id, state string) {
		t.Helper()
		d.within(3*time.Minute, id+" is "+state, func() bool {
			return r.Call(http.MethodGet, "/v1/tenants/"+id, nil, tenant.Viewer).Text("state") == state
		})
	}
	keysOf := func(id string) (keys []string) {
		for key, app := range d.keys() {
			if app == d.accounts[id].app {
				keys = append(keys, key)
			}
		}
		return keys
	}
	nothing := func(string) {}
	suspend := func(id string) { post(id, "suspend"); settled(id, "suspended") }
	resume := func(id string) { post(id, "resume"); settled(id, "active") }
	rotate := func(id string) {
		d.within(time.Minute, id+" is rotated", func() bool {
			resp := r.Call(http.MethodPut, "/v1/tenants/"+id+"/keys/default/rotations/1", map[string]any{"overlap": "0s"}, tenant.Provisioner)
			keys := keysOf(id)
			return resp.Status < 300 && len(keys) == 1 && keys[0] != d.accounts[id].key
		})
	}
	decide := func(choice string) func(string) {
		return func(id string) {
			t.Helper()
			d.Eventually(choice+" is decided about "+id, func() bool { // each report has new numbers
				list, _ := r.Call(http.MethodGet, "/v1/recovery/findings?limit=100", nil, tenant.Admin).JSON["findings"].([]any)
				for _, f := range list {
					if f := f.(map[string]any); f["tenant_id"] == id {
						return r.Call(http.MethodPost, "/v1/recovery/decisions", map[string]any{"finding": f["number"], "choice": choice}, tenant.Admin).Status < 300
					}
				}
				return false
			})
		}
	}
	cases := []struct {
		id                  string
		before, after, then func(id string)
		state               string // at the end
		keys                int    // that work at the end
	}{
		{"kept", nothing, nothing, nothing, "active", 1},
		{"suspended_campaign", nothing, suspend, nothing, "active", 0},
		{"suspended_resumed", nothing, suspend, func(id string) { resume(id); suspend(id); resume(id) }, "active", 1},
		{"suspended_suspended", nothing, suspend, suspend, "suspended", 0},
		{"suspended_decided", nothing, suspend, func(id string) { decide("suspend")(id); settled(id, "suspended") }, "suspended", 0},
		{"suspended_adopted", nil, suspend, func(id string) { decide("adopt")(id); settled(id, "suspended") }, "suspended", 0},
		{"undone", remove, func(id string) { post(id, "restore"); settled(id, "active") }, nothing, "deleting", 1},
		{"undone_suspended", remove, func(id string) { post(id, "restore"); settled(id, "active") }, func(id string) { post(id, "suspend") }, "deleting", 0},
		{"deleted_suspended", nothing, remove, suspend, "suspended", 0},
		{"rotated_suspended", nothing, rotate, suspend, "suspended", 0},
		{"rotated_quarantined", nothing, rotate, func(id string) {
			d.command(r, http.MethodPost, "/v1/keys/quarantine", map[string]any{"key": keysOf(id)[0]})
		}, "active", -1},
		{"rotated_deleted", nothing, rotate, remove, "deleting", 0},
	}
	signUp := func(id string) {
		resp := cluster.Response{}
		d.Eventually("sign-up of "+id, func() bool {
			resp = r.Call(http.MethodPut, "/v1/tenants/"+id, map[string]any{"labels": map[string]string{"test": id}}, tenant.Provisioner)
			return resp.Text("credentials", "key") != ""
		})
		d.tell(id, resp.Text("app", "id"), resp.Text("credentials", "key"))
	}
	for _, c := range cases {
		if c.before != nil {
			signUp(c.id)
			c.before(c.id)
		}
	}
	d.Eventually("all tags are written", func() bool {
		return d.Primary.Text(`SELECT count(*) FROM apps WHERE state IN ('held', 'retained') AND (pending OR marked_at IS NULL)`) == "0"
	})
	d.poolFull(d.Primary)
	files := d.Primary.Snapshot()
	leaked := map[string]string{}
	for _, c := range cases {
		if c.before == nil {
			signUp(c.id)
			d.tagged(c.id)
		}
		c.after(c.id)
		if strings.HasPrefix(c.id, "rotated") {
			leaked[c.id] = keysOf(c.id)[0]
		}
	}
	d.recorded(d.Primary)
	working := map[string][]string{}
	for _, c := range cases {
		working[c.id] = keysOf(c.id)
	}
	r.Kill()
	d.Primary.Kill()
	d.Primary.Restore(files)
	d.Primary.Start()
	r.Start()
	t.Logf("findings %v", d.findings(r))
	campaign := d.command(r, http.MethodPost, "/v1/rotations", map[string]any{"labels": map[string]string{"test": "suspended_campaign"}}).Text("id")
	for _, c := range cases {
		if !strings.HasSuffix(c.id, "resumed") { // that waits for the end of recovery mode
			c.then(c.id)
		}
	}
	for _, c := range cases {
		if c.keys == 0 {
			d.within(3*time.Minute, "no key of "+c.id+" works", func() bool { return len(keysOf(c.id)) == 0 })
		}
	}
	d.command(r, http.MethodPost, "/v1/recovery/end",
		map[string]any{"confirm": r.Call(http.MethodGet, "/v1/recovery", nil, tenant.Admin).Text("deployment")})
	d.Primary.Exec(`UPDATE apps SET purge_after = now(), next_attempt_at = now() WHERE state = 'retained' AND tenant_id LIKE 'undone%'`)
	for _, c := range cases {
		if strings.HasSuffix(c.id, "resumed") {
			c.then(c.id)
		}
	}
	d.within(time.Minute, "the campaign ends", func() bool {
		c := r.Call(http.MethodGet, "/v1/campaigns/"+campaign, nil, tenant.Admin)
		return c.Text("ended_at") != "" || c.Text("counts", "failed") == "1" || c.Text("problem") != ""
	})
	t.Logf("the campaign is %s", r.Call(http.MethodGet, "/v1/campaigns/"+campaign, nil, tenant.Admin).Raw)
	d.Eventually("removals of undone deletions are contested", func() bool {
		return d.Primary.Text(`SELECT count(*) FROM apps WHERE tenant_id LIKE 'undone%' AND problem->>'code' = 'purge_contested'`) == "2"
	})
	for _, c := range cases {
		got := r.Call(http.MethodGet, "/v1/tenants/"+c.id, nil, tenant.Viewer)
		keys := keysOf(c.id)
		if got.Text("state") != c.state || c.keys >= 0 && len(keys) != c.keys {
			t.Errorf("%s is %s with %d keys that work, want %s with %d: %s", c.id, got.Text("state"), len(keys), c.state, c.keys, got.Raw)
		}
		if leaked := leaked[c.id]; leaked != "" && slices.Contains(keys, leaked) {
			t.Errorf("the key of %s, which the restore lost, works", c.id)
		}
		if c.keys == 0 || c.state == "suspended" || strings.HasPrefix(c.id, "rotated") || strings.HasPrefix(c.id, "undone") || strings.HasSuffix(c.id, "resumed") {
			d.dead[d.accounts[c.id].key] = true
		}
	}
	for id, keys := range working {
		for _, key := range keys {
			if id == "kept" || id == "undone" {
				if d.keys()[key] == "" {
					t.Errorf("the key of %s, which no command ended, is dead", id)
				}
			}
		}
	}
	d.check(d.Primary)
}
