package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
)

// An audit log as an operator looks after it: it is listed, sealed by the service,
// verified, and held against a seal that was kept.
func TestAuditByCommand(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	conn := pgtest.Conn(t, w.URL)
	vars, serve, addrFile := settings(t, w.URL.Reveal(), w.Clarifai)
	fails(t, vars, []string{"audit", "anchor"}, "nothing is sealed yet")
	if exit, out, log := command(t, vars, "audit", "verify"); exit != 0 || out != "" || !strings.Contains(log, "seals: 0, events: 0, faults: 0, events not sealed yet: 0") {
		t.Errorf("verify of an empty log exits with %d and prints %q, %q", exit, out, log)
	}
	token := strings.TrimSpace(must(t, vars, "token", "create", "--name", "saas", "--role", "provisioner"))
	viewer := maps.Clone(vars)
	viewer["TENANTRY_TOKEN"] = strings.TrimSpace(must(t, vars, "token", "create", "--name", "ops", "--role", "viewer"))

	// Each start of the service seals what is there.
	p := start(t, vars, serve...)
	p.listening(addrFile)
	p.ready()
	if status, body := p.request(http.MethodPut, p.url+"/v1/tenants/user_1", token); status != http.StatusCreated {
		t.Fatalf("sign-up answers %d %s", status, body)
	}
	list := func(args ...string) string {
		return must(t, viewer, append([]string{"audit", "list", "--url", p.url}, args...)...)
	}
	if out := list("--tenant", "user_1"); !strings.HasPrefix(out, "ID ") || strings.Count(out, "\n") != 4 || !strings.Contains(out, "tenant.activated") {
		t.Errorf("audit list prints\n%s", out)
	}
	var events []map[string]any
	out := list("--output", "json", "--order", "asc", "--limit", "0", "--before", "2999-01-01T00:00:00Z")
	if err := json.Unmarshal([]byte(out), &events); err != nil || len(events) < 5 || events[0]["action"] != "token.created" || events[0]["actor"] != "operator" {
		t.Errorf("audit list --output json prints %s", out)
	}
	if out := list("--output", "json", "--action", "none"); out != "[]\n" {
		t.Errorf("an empty list prints %q", out)
	}
	if exit, out, log := command(t, viewer, "audit", "list", "--url", p.url, "--limit", "2"); exit != 0 || strings.Count(out, "\n") != 3 || !strings.Contains(log, "there are more") {
		t.Errorf("audit list --limit 2 exits with %d and prints\n%s%s", exit, out, log)
	}
	with := maps.Clone(viewer)
	with["TENANTRY_TOKEN"] = token
	fails(t, with, []string{"audit", "list", "--url", p.url}, "role_forbidden")
	fails(t, viewer, []string{"audit", "list", "--url", p.url, "--limit", "-1"}, "--limit")
	for _, args := range [][]string{{"--key", "x"}, {"--after", "yesterday"}, {"--order", "up"}} {
		if exit, _, _ := command(t, viewer, append([]string{"audit", "list", "--url", p.url}, args...)...); exit != 2 {
			t.Errorf("audit list %v exits with %d; want 2", args, exit)
		}
	}
	p.stop()
	<-p.exit
	p = start(t, vars, serve...)
	provisiontest.Eventually(t, "the log is sealed", func() bool {
		var unsealed int
		err := conn.QueryRow(t.Context(), `
			SELECT count(*) FROM audit_events WHERE id > (SELECT coalesce(max(last_id), 0) FROM audit_seals)`).Scan(&unsealed)
		return err == nil && unsealed == 0
	})
	p.stop()
	<-p.exit

	dir := t.TempDir()
	keep := func(name string) string {
		t.Helper()
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(must(t, vars, "audit", "anchor")), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	verify := func(exitWant int, says string, args ...string) {
		t.Helper()
		exit, out, log := command(t, vars, append([]string{"audit", "verify"}, args...)...)
		if exit != exitWant || !strings.Contains(out+log, says) || exitWant == 0 && out != "" {
			t.Errorf("audit verify %v exits with %d and prints\n%s%s\nwant %d and %q", args, exit, out, log, exitWant, says)
		}
	}
	forge := func(sql string) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), `SET session_replication_role = replica; `+sql+`; RESET session_replication_role`); err != nil {
			t.Fatal(err)
		}
	}
	kept := keep("anchor")
	verify(0, "faults: 0, events not sealed yet: 0", "--anchor", kept)
	must(t, vars, "token", "create", "--name", "x", "--role", "viewer")
	verify(0, "events not sealed yet: 1", "--anchor", kept)

	var revealed int64
	if err := conn.QueryRow(t.Context(), `SELECT id FROM audit_events WHERE action = 'key.revealed'`).Scan(&revealed); err != nil {
		t.Fatal(err)
	}
	forge(`UPDATE audit_events SET actor = E'nobody\x1b[31m' WHERE action = 'key.revealed'`)
	verify(3, fmt.Sprintf("event_altered   %d  sealed in ", revealed))
	verify(3, `"key.revealed" by "nobody\x1b[31m", tenant "user_1"`)
	forge(`DELETE FROM audit_events WHERE action = 'key.revealed'`)
	verify(3, fmt.Sprintf("event_removed   %d  sealed in ", revealed))
	verify(3, "faults: 1,")

	// With new seals only the anchor tells.
	forge(`DELETE FROM audit_seals`)
	verify(3, "the database has no such seal", "--anchor", kept)
	seal := func() {
		t.Helper()
		if s, err := pgtest.OpenURL(t, w.URL).SealAudit(t.Context(), time.Minute); err != nil || s.Seals != 1 {
			t.Fatalf("SealAudit = %+v, %v; want one seal", s, err)
		}
	}
	seal()
	verify(0, "faults: 0,")
	for range 5 {
		if _, err := conn.Exec(t.Context(), `INSERT INTO audit_events (actor, action) VALUES ('a', 'b')`); err != nil {
			t.Fatal(err)
		}
		seal()
	}
	verify(3, "the database's seal is another", "--anchor", kept)
	verify(0, "faults: 0,", "--anchor", keep("new"), "--from-seal", "3")
	forge(`DELETE FROM audit_seals WHERE number = 4`)
	verify(3, "seal_missing    4  to 4")
	forge(`UPDATE audit_seals SET last_id = last_id + 1 WHERE number = 3`)
	verify(3, "seal_altered    3")
	verify(0, "faults: 0,", "--from-seal", "5")

	fails(t, vars, []string{"audit", "verify", "--from-seal", "0"}, "1 or more")
	fails(t, vars, []string{"audit", "verify", "--from-seal", "1000"}, "there is no seal 1000")
	fails(t, vars, []string{"audit", "verify", "--anchor", filepath.Join(dir, "none")}, "--anchor: ")
	fails(t, vars, []string{"audit", "verify", "--anchor", kept, "--from-seal", "1000"}, "leaves out")
	fails(t, vars, []string{"audit", "verify", "--anchor", fileWith(t, "{}")}, "is not what `tenantry audit anchor` prints")
	text, err := os.ReadFile(kept)
	if err != nil {
		t.Fatal(err)
	}
	other := strings.Replace(string(text), `"deployment": "`, `"deployment": "x`, 1)
	fails(t, vars, []string{"audit", "verify", "--anchor", fileWith(t, other)}, "is of the deployment")
}

// fileWith makes a file with a text.
func fileWith(t *testing.T, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}
