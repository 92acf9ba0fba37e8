package main

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

type shownFinding struct {
	Number                    int64
	Kind, Action, State, Note string
	App                       string `json:"app_id"`
	Tenant                    string `json:"tenant_id"`
	Choices                   []struct{ Choice, Confirm string }
}

type shownRecovery struct {
	Recovery struct {
		State, Reason, Deployment string
		ReportDone                bool                `json:"report_done"`
		Undecided                 int                 `json:"undecided_findings"`
		ControlSeenAt             string              `json:"control_seen_at"`
		Retired                   struct{ Count int } `json:"retired_apps"`
	}
	Findings []shownFinding
	Apps     []struct{ ID string }
}

// sees reads recovery mode until ok.
func (o operatorAt) sees(what string, ok func(shownRecovery) bool) (is shownRecovery) {
	o.t.Helper()
	provisiontest.Eventually(o.t, what, func() bool {
		is = shownRecovery{}
		o.read(&is, "recover", "show")
		return ok(is)
	})
	return is
}

// reported waits for a report in recovery mode that found n findings.
func (o operatorAt) reported(n int) shownRecovery {
	o.t.Helper()
	return o.sees(fmt.Sprintf("the report of the recovery found %d", n), func(is shownRecovery) bool {
		return is.Recovery.State == "recovering" && is.Recovery.ReportDone && is.Recovery.Undecided == n && len(is.Findings) == n
	})
}

// An operator restores a dump that is older than two tenants, and gives them their apps back.
func TestRecoverCommands(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	url := pgtest.URL(t)
	vars, serve, addrFile := settings(t, url.Reveal(), w.Clarifai)
	serve = append(serve, "--recovery-watch", "1s", "--pool-min", "1", "--pool-max", "1")
	o := operatorAt{t: t, vars: vars}
	saas, ops, admin := o.can("provisioner"), o.can("viewer"), o.can("admin")
	p := start(t, vars, serve...)
	up := func() {
		t.Helper()
		p.listening(addrFile)
		p.ready()
		saas.url, ops.url, admin.url = p.url, p.url, p.url
	}
	up()
	poolIsFull := func() {
		t.Helper()
		provisiontest.Eventually(t, "the pool is full", func() bool {
			var pools []struct{ Ready int }
			ops.read(&pools, "pool")
			return pools[0].Ready == 1
		})
	}
	tagged := func() {
		t.Helper()
		conn := pgtest.Conn(t, tenant.NewSecret(vars["DATABASE_URL"]))
		provisiontest.Eventually(t, "each app has its ownership tag", func() bool {
			var n int
			err := conn.QueryRow(t.Context(), `SELECT count(*) FROM apps WHERE state = 'held' AND pending`).Scan(&n)
			return err == nil && n == 0
		})
	}
	admin.sees("the control record is written", func(is shownRecovery) bool { return is.Recovery.State == "none" && is.Recovery.ControlSeenAt != "" })
	saas.exits(0, words("tenant create before"))
	tagged()
	poolIsFull()
	dump := pgtest.Dump(t, url)
	var pooled, built shownTenant
	saas.read(&pooled, words("tenant create pooled")...)
	saas.exits(0, words("tenant create built"))
	saas.read(&built, words("tenant create built")...)
	tagged()
	poolIsFull() // with an app that the dump lacks
	out, log := admin.exits(0, words("recover show"), "none", "first start", "no finding waits for a decision")
	if strings.Contains(out+log, "ends when") {
		t.Errorf("outside recovery mode, show prints\n%s%s", out, log)
	}
	p.stop()
	<-p.exit

	vars["DATABASE_URL"] = pgtest.Restore(t, dump).Reveal()
	p = start(t, vars, serve...)
	up()
	is := admin.reported(2)
	found := map[string]shownFinding{}
	for _, f := range is.Findings {
		found[f.Kind] = f
	}
	forgotten, unknown := found["app_forgotten"], found["app_unknown"]
	if forgotten.Tenant != "pooled" || forgotten.App != pooled.App.ID || unknown.Tenant != "built" || unknown.App != built.App.ID {
		t.Fatalf("the findings are %+v; want one of pooled and one of built", is.Findings)
	}
	ops.exits(5, words("tenant show built"), "recovery_unknown", "tenantry recover show")
	ops.exits(0, words("upstream"), "recovering: ", "tenantry recover show")
	ops.exits(5, words("recover show"), "role_forbidden", "recovering")
	out, log = admin.exits(0, words("recover show"), "recovering, since ", "restored, copied or rewritten", "an admin ends it", "app_forgotten  adopt",
		"The tenant that the ownership tag names gets the app back", "pooled", "built", ", the oldest begun or found ")
	harmless(t, out+log)
	if !strings.Contains(log, "tenantry recover decide") || strings.Count(out, "app_unknown") != 3 {
		t.Errorf("recover show prints\n%s%s\nwant the finding and each of its choices once", out, log)
	}
	if out, _ := admin.exits(0, words("recover show --kind app_unknown")); strings.Contains(out, "app_forgotten") {
		t.Errorf("recover show --kind prints\n%s", out)
	}
	admin.exits(0, words("recover show --limit 1"), "there are more")
	out, log = admin.exits(3, words("reconcile"), "decide", "2 of them wait for a decision")
	harmless(t, out+log)
	admin.exits(5, words("reconcile --repair rec_1"), "recovery mode", "tenantry recover show")

	is = admin.reported(2) // the report that reconcile has begun is the newest
	for _, f := range is.Findings {
		found[f.Kind] = f
	}
	forgotten, unknown = found["app_forgotten"], found["app_unknown"]
	admin.exits(2, words("recover decide x keep"), "not the number of a finding")
	admin.exits(2, words(fmt.Sprint("recover decide ", unknown.Number)), "the choice is missing")
	admin.exits(2, words(fmt.Sprint("recover decide ", unknown.Number, " new-key")), "the choices are: adopt, keep")
	admin.exits(2, words(fmt.Sprint("recover decide --kind app_unknown ", unknown.Number, " adopt")), "not both")
	admin.exits(2, words("recover decide --kind in_doubt keep"), "--kind")
	admin.exits(4, words("recover decide 1000000 keep"), "finding_not_found")
	admin.exits(0, words(fmt.Sprint("recover decide ", unknown.Number, " adopt")), "done (adopt)", "built")
	admin.exits(5, words(fmt.Sprint("recover decide ", unknown.Number, " keep")), "finding_decided")
	admin.exits(0, words("recover decide --kind app_forgotten adopt"), "decided now: 1", "done: 1, skipped: 0, failed: 0")
	admin.exits(0, words("recover decide --kind key_unknown adopt"), "decided now: 0")
	admin.sees("recovery mode ends by itself", func(is shownRecovery) bool { return is.Recovery.State == "none" })
	for id, want := range map[string]shownTenant{"pooled": pooled, "built": built} {
		var got shownTenant
		saas.read(&got, "tenant", "create", id)
		if got.App.ID != want.App.ID || want.Credentials == nil || got.Credentials == nil || got.Credentials.Key != want.Credentials.Key {
			t.Errorf("after the adoption %s is %+v; want %+v", id, got, want)
		}
	}
	testRetired(t, admin, ops, poolIsFull)
	testTyped(t, w, admin, saas)
	testEnd(t, pgtest.Conn(t, tenant.NewSecret(vars["DATABASE_URL"])), admin)
}

// testRetired retires a pool by hand, and removes its apps.
func testRetired(t *testing.T, admin, ops operatorAt, poolIsFull func()) {
	t.Helper()
	poolIsFull()
	admin.exits(2, words("recover begin"), "--reason")
	admin.exits(0, append(words("recover begin --reason"), "a test of the pool"), "watching", "begun by hand: a test of the pool", "watches until")
	admin.exits(5, words("recover end"), "recovery_watching")
	poolIsFull()
	is := admin.sees("the report leaves nothing to decide", func(is shownRecovery) bool { return is.Recovery.State == "none" && is.Recovery.Retired.Count > 1 })
	retired := is.Recovery.Retired.Count
	ops.exits(0, words("pool"), "RETIRED", "this is normal")
	out, log := admin.exits(0, words("recover show --retired"), "KEY  INPUTS", "yes", "adoption with the app's key")
	harmless(t, out+log)
	admin.read(&is, words("recover show --retired --limit 1")...)
	if len(is.Apps) != 1 {
		t.Fatalf("recover show --retired --limit 1 prints %+v", is)
	}
	app := is.Apps[0].ID
	admin.exits(2, words("recover remove"), "--before")
	admin.exits(2, words("recover remove "+app+" --before 2026-01-31"), "not both")
	admin.exits(2, words("recover remove --before yesterday"), "2026-01-31")
	admin.exits(2, words("recover remove "+app+" --yes"), "--yes")
	for _, typed := range []string{"", "\n", "yes\n", "0\n"} {
		admin.types(typed).exits(1, words("recover remove "+app), "Type "+app+" to go on", "nothing was changed")
		admin.types(typed).exits(1, words("recover remove --before 2100-01-01"), fmt.Sprint("Type ", retired, " to go on"), "nothing was changed")
	}
	admin.exits(0, words("recover remove --before 2001-01-01"), "no retired app was begun or found before 2001-01-01T00:00:00Z")
	admin.types("t-x\n").exits(4, words("recover remove t-x"), "app_not_retired")
	admin.types(app+"\n").exits(0, words("recover remove "+app), "with its data and all its keys", "the removal has begun")
	admin.types(fmt.Sprint(retired-1, "\n")).exits(0, words("recover remove --before 2100-01-01"), "retired apps", "oldest begun or found", "inputs unknown", "the removal has begun")
	admin.sees("both are removed", func(is shownRecovery) bool { return is.Recovery.Retired.Count == 0 })
}

// testTyped makes a choice that can do harm, for a tenant whose key is gone.
func testTyped(t *testing.T, w *provisiontest.World, admin, saas operatorAt) {
	t.Helper()
	var before shownTenant
	saas.read(&before, words("tenant create before")...)
	removeByHand(t, w, "/keys/"+before.Credentials.Key)
	admin.exits(0, append(words("recover begin --reason"), "a test of keys"))
	f := admin.reported(1).Findings[0]
	if i := slices.IndexFunc(f.Choices, func(c struct{ Choice, Confirm string }) bool { return c.Choice == "new-key" }); f.Kind != "key_gone" || i < 0 || f.Choices[i].Confirm != "before" {
		t.Fatalf("the finding is %+v", f)
	}
	admin.exits(2, words("recover decide --kind key_gone new-key"), "invalid_finding")
	admin.types("yes\n").exits(1, words("recover end"), "report              done", "undecided findings  1", "to go on", "nothing was changed")
	decide := words(fmt.Sprint("recover decide ", f.Number, " new-key"))
	admin.types("yes\n").exits(1, decide, "If the tenant had been suspended, it has access again", "Type before to go on", "nothing was changed")
	admin.atTerminal().types("before\n").exits(0, decide, "done (new-key)")
	admin.sees("recovery mode ends by itself", func(is shownRecovery) bool { return is.Recovery.State == "none" })
	provisiontest.Eventually(t, "the tenant has another key", func() bool {
		var after shownTenant
		saas.read(&after, words("tenant create before")...)
		return after.Credentials != nil && after.Credentials.Key != before.Credentials.Key
	})

	var is shownRecovery
	admin.read(&is, "recover", "show")
	admin.types("yes\n").exits(1, words("recover take-over"), "Type "+is.Recovery.Deployment+" to go on", "nothing was changed")
	admin.types(is.Recovery.Deployment+"\n").exits(5, words("recover take-over"), "not_stopped")
	admin.exits(0, words("recover end"), "none")
}

// testEnd ends recovery mode before its report is done.
func testEnd(t *testing.T, conn *pgx.Conn, admin operatorAt) {
	t.Helper()
	// The report stays as it is: a worker holds its lease.
	if _, err := conn.Exec(t.Context(), `DELETE FROM reconciliations WHERE state = 'running'; `+provisiontest.SetRecovery(tenant.Recovering)+`
		INSERT INTO reconciliations (id, kind, phase, requested_by, apps_seen, leased_until) VALUES (gen_random_uuid(), 'report', 'apps', 'worker', 7, 'infinity')`); err != nil {
		t.Fatal(err)
	}
	out, log := admin.exits(0, words("recover show"), "recovering, since ", "the report is running, and more findings may follow (apps: 7 apps")
	if strings.Contains(out+log, "no finding waits") {
		t.Errorf("before a report is done, show prints\n%s%s", out, log)
	}
	var is shownRecovery
	admin.read(&is, "recover", "show")
	deployment := is.Recovery.Deployment
	admin.types("yes\n").exits(1, words("recover end"), "the report is running", "waiting work", "removals: 0, campaigns: 0, keys to be created: 0",
		"Type "+deployment+" to go on", "nothing was changed")
	out, _ = admin.types(deployment+"\n").exits(0, words("recover end -o json"))
	var ended struct{ State string }
	if err := json.Unmarshal([]byte(out), &ended); err != nil || ended.State != "none" {
		t.Errorf("recover end prints %s", out)
	}
}

// harmless fails if output suggests a command that can lose data or show a key.
func harmless(t *testing.T, output string) {
	t.Helper()
	for _, bad := range []string{"--repair", "recover remove", "recover end", "take-over", "recover decide ", "purge", "--yes"} {
		for line := range strings.Lines(output) {
			if strings.Contains(line, bad) && !strings.Contains(line, "recover decide NUMBER CHOICE") {
				t.Errorf("the output suggests %q: %s", bad, line)
			}
		}
	}
}
