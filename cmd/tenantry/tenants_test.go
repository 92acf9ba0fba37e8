package main

import (
	"bytes"
	"encoding/json"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
)

// An operator is someone at the command line of a running service.
type operatorAt struct {
	t     *testing.T
	vars  map[string]string
	url   string
	stdin string
	// person is whether stdin and stderr are a terminal.
	person bool
}

// can returns the operator with a token of a role.
func (o operatorAt) can(role string) operatorAt {
	o.vars = maps.Clone(o.vars)
	o.vars["TENANTRY_TOKEN"] = strings.TrimSpace(must(o.t, o.vars, "token", "create", "--name", role, "--role", role))
	return o
}

func (o operatorAt) types(stdin string) operatorAt { o.stdin = stdin; return o }

func (o operatorAt) atTerminal() operatorAt { o.person = true; return o }

func (o operatorAt) run(args ...string) (exit int, stdout, stderr string) {
	o.t.Helper()
	var out, log bytes.Buffer
	exit = run(o.t.Context(), env{args: append(args, "--url", o.url), get: func(k string) string { return o.vars[k] }, stdin: strings.NewReader(o.stdin),
		stdout: &out, stderr: &log, terminal: func(stream any) bool { return o.person && stream != io.Writer(&out) }})
	for _, line := range strings.Split(o.stdin, "\n") {
		if line = strings.TrimPrefix(strings.TrimSpace(line), "Key "); len(line) == 32 && strings.Contains(out.String()+log.String(), line) {
			o.t.Errorf("tenantry %v shows the key that was typed", args)
		}
	}
	return exit, out.String(), log.String()
}

// exits runs a command that must exit with a code, and print each of the texts.
func (o operatorAt) exits(want int, args []string, says ...string) (stdout, stderr string) {
	o.t.Helper()
	exit, stdout, stderr := o.run(args...)
	if exit != want {
		o.t.Fatalf("tenantry %v exits with %d and prints\n%s%s\nwant %d", args, exit, stdout, stderr, want)
	}
	for _, s := range says {
		if !strings.Contains(stdout+stderr, s) {
			o.t.Errorf("tenantry %v prints\n%s%s\nwant %q", args, stdout, stderr, s)
		}
	}
	return stdout, stderr
}

// read runs a command with --output json.
func (o operatorAt) read(v any, args ...string) {
	o.t.Helper()
	out, _ := o.exits(0, append(args, "--output", "json"))
	if err := json.Unmarshal([]byte(out), v); err != nil {
		o.t.Fatalf("tenantry %v prints no JSON: %v\n%s", args, err, out)
	}
}

// serving starts a service and returns an operator who has no token yet.
func serving(t *testing.T) (*provisiontest.World, operatorAt, *process) {
	t.Helper()
	w := provisiontest.New(t)
	vars, serve, addrFile := settings(t, pgtest.URL(t).Reveal(), w.Clarifai)
	p := start(t, vars, serve...)
	p.listening(addrFile)
	p.ready()
	return w, operatorAt{t: t, vars: vars, url: p.url}, p
}

func words(text string) []string { return strings.Fields(text) }

type shownTenant struct {
	ID          string            `json:"id"`
	State       string            `json:"state"`
	DisplayName string            `json:"display_name"`
	Labels      map[string]string `json:"labels"`
	Protected   bool              `json:"deletion_protection"`
	App         struct{ ID string }
	Credentials *struct{ Key string }
	CreatedAt   string `json:"created_at"`
}

// The life of a tenant, from the command line.
func TestTenantCommands(t *testing.T) {
	t.Parallel()
	w, o, p := serving(t)
	saas, ops, admin := o.can("provisioner"), o.can("viewer"), o.can("admin")

	out, log := saas.exits(0, append(words("tenant create user_1 --label plan=pro --label a=b=c --display-name"), "Ada L"),
		"active", "a=b=c,plan=pro", "Ada L", "tenantry key reveal user_1 default")
	key := w.AppKeys()[0].ID
	if strings.Contains(out+log, key) {
		t.Errorf("create prints\n%s%s", out, log)
	}
	var is shownTenant
	saas.read(&is, "tenant", "create", "user_1")
	if is.State != "active" || is.Credentials == nil || is.Credentials.Key != key || !regexp.MustCompile(`^\d{4}-\d\d-\d\dT.*Z$`).MatchString(is.CreatedAt) {
		t.Errorf("create as JSON prints %+v", is)
	}
	saas.exits(2, words("tenant create user_1 --profile other"), "profile_unknown")
	saas.exits(5, words("tenant create user_1 --label plan=free"), "attributes_differ")
	saas.exits(2, words("tenant create user_1 --label x"), "--label")
	saas.exits(2, words("tenant create user_1 --wait -1s"), "--wait")
	saas.exits(2, words("tenant create a/b"), "request ")
	saas.exits(2, words("tenant create"))
	ops.exits(5, words("tenant create user_2"), "role_forbidden", "request ")
	ops.exits(4, words("tenant show nobody"), "tenant_not_found", "request ")
	ops.exits(0, []string{"app", is.App.ID}, "user_1")
	ops.exits(4, words("app tny-0"), "app_not_found")
	ops.exits(0, words("upstream"), "acme", "closed", "1000 calls a second")
	var up struct{ Operator string }
	ops.read(&up, "upstream")

	admin.exits(2, words("upstream pause"), "--reason")
	admin.exits(2, words("upstream pause some --reason x"), "all", "removals")
	ops.exits(5, words("upstream pause --reason x"), "role_forbidden")
	_, log = admin.exits(0, words("upstream pause --reason incident-7"))
	if !strings.Contains(log, "incident-7") || !strings.Contains(log, "work until the pause ends") {
		t.Errorf("pause says %q", log)
	}
	ops.exits(0, words("upstream"), "paused by an operator", "all work", "incident-7", "unknown: no work is in progress at Clarifai")
	admin.exits(0, words("upstream pause removals --reason incident-7"))
	ops.exits(0, words("upstream"), "removals since")
	admin.exits(0, words("upstream resume"))
	if out, _ := ops.exits(0, words("upstream")); strings.Contains(out, "incident-7") {
		t.Errorf("after resume, upstream shows\n%s", out)
	}

	saas.exits(0, words("tenant create user_2"))
	if out, log := ops.exits(0, words("tenant list --limit 1")); strings.Count(out, "\n") != 2 || !strings.Contains(out, "user_1") || !strings.Contains(log, "there are more") {
		t.Errorf("list --limit 1 prints\n%s%s", out, log)
	}
	ids := func(args string) []string {
		t.Helper()
		var list []shownTenant
		ops.read(&list, words("tenant list "+args)...)
		ids := []string{}
		for _, t := range list {
			ids = append(ids, t.ID)
		}
		return ids
	}
	for args, want := range map[string][]string{"--limit 0": {"user_1", "user_2"}, "--label plan=pro --label a=b=c": {"user_1"}, "--prefix user_2": {"user_2"},
		"--state suspended": {}, "--state active --profile default": {"user_1", "user_2"}, "--problem": {}, "--no-problem": {"user_1", "user_2"},
		"--before 2001-01-01T00:00:00Z": {}, "--after 2001-01-01T00:00:00Z": {"user_1", "user_2"}} {
		if got := ids(args); !slices.Equal(got, want) {
			t.Errorf("tenant list %s prints %v; want %v", args, got, want)
		}
	}
	ops.exits(2, words("tenant list --state asleep"), "--state")
	ops.exits(2, words("tenant list --limit -1"), "--limit")

	is = shownTenant{}
	saas.read(&is, append(words("tenant update user_1 --label plan=free --remove-label a --deletion-protection --display-name"), "")...)
	if is.DisplayName != "" || len(is.Labels) != 1 || is.Labels["plan"] != "free" || !is.Protected {
		t.Errorf("update makes it %+v", is)
	}
	saas.exits(2, words("tenant update user_1"), "nothing to change")
	saas.exits(2, words("tenant update user_1 --label a=b --remove-label a"), "both")
	saas.exits(5, words("tenant delete user_1"), "deletion_protected")
	saas.exits(0, words("tenant update user_1 --no-deletion-protection --force"), "deletion protection", "no")

	saas.exits(0, words("tenant suspend user_1"), "suspended")
	if n := len(w.AppKeys()); n != 1 {
		t.Errorf("suspend has come to its end, and %d keys work; want that of user_2", n)
	}
	saas.exits(0, words("tenant resume user_1"), "active")
	saas.exits(0, words("tenant delete user_1"), "none of its keys works", "app is removed")
	if n := len(w.AppKeys()); n != 1 {
		t.Errorf("delete has come to its end, and %d keys work; want that of user_2", n)
	}
	saas.exits(5, words("tenant create user_1"), "tenant_deleting")
	saas.exits(0, words("tenant restore user_1"), "active")
	saas.exits(0, words("tenant delete user_2 --no-wait"), "delet")

	// Nobody is purged by mistake.
	apps := w.State().Apps
	admin.exits(2, words("tenant delete user_1 --purge"), "tenant user_1", "--yes")
	admin.atTerminal().types("no\n").exits(1, words("tenant delete user_1 --purge"), "tenant user_1", "nothing was changed")
	ops.exits(0, words("tenant show user_1"), "active")
	saas.exits(5, words("tenant delete user_1 --purge --yes"), "role_forbidden")
	admin.atTerminal().exits(0, words("tenant delete user_1 --purge --yes"), "deleted")
	if n := w.State().Apps; n != apps-1 {
		t.Errorf("purge has come to its end, and there are %d apps; want %d", n, apps-1)
	}
	saas.exits(0, words("tenant create user_3"))
	admin.atTerminal().types("user_3\n").exits(0, words("tenant delete user_3 --purge"), "Type user_3 to go on", "deleted")
	if _, log := admin.atTerminal().exits(0, words("reconcile"), "differences: 0"); !regexp.MustCompile(`\r\x1b\[K\w+: \d+ apps, `).MatchString(log) || strings.Contains(log, "\n  ") {
		t.Errorf("reconcile shows on a terminal %q", log)
	}
	p.stop()
	<-p.exit
	saas.exits(6, words("tenant show user_1"), "does not answer")
	saas.exits(6, words("tenant create user_1"), "does not answer")
}

// What Clarifai holds up is said, and is not done in time.
func TestWaitByCommand(t *testing.T) {
	t.Parallel()
	w, o, _ := serving(t)
	saas, admin := o.can("provisioner"), o.can("admin")
	w.Faults(map[string]any{"call": "PostApps", "status": 11006})
	saas.exits(0, words("tenant create user_1 --no-wait"), "provisioning")
	saas.exits(6, words("tenant create user_1 --wait 2s"), "still being built", "goes on without this command", "provisioning")
	admin.exits(6, words("tenant retry user_1 --wait 1s"), "is still provisioning", "upstream_quota")
	var list []shownTenant
	saas.read(&list, words("tenant list --problem")...)
	if len(list) != 1 || list[0].ID != "user_1" {
		t.Errorf("list --problem prints %+v", list)
	}
	// Whoever leaves is told that it goes on.
	left := start(t, saas.vars, append(words("tenant create user_2 --wait 1h --url"), o.url)...)
	provisiontest.Eventually(t, "the sign-up is written down", func() bool {
		exit, _, _ := saas.run("tenant", "show", "user_2")
		return exit == 0
	})
	left.stop()
	if exit := <-left.exit; exit != 1 || !strings.Contains(left.stderr.String(), "go on") && !strings.Contains(left.stderr.String(), "goes on") {
		t.Errorf("a command that is interrupted exits with %d and says %s", exit, left.stderr.String())
	}
	if _, log := admin.atTerminal().exits(6, words("tenant retry user_1 --wait 1s")); !strings.Contains(log, "\r\x1b[Ktenant user_1 is still provisioning") {
		t.Errorf("nothing is seen of the waiting on a terminal: %q", log)
	}
	w.Faults()
	if _, log := admin.exits(0, words("tenant retry user_1"), "active"); log != "" {
		t.Errorf("retry says %q", log)
	}

	// A key that is held up, and one that cannot be removed.
	w.Faults(map[string]any{"call": "PostKeys", "status": 11006})
	out, _ := saas.exits(6, words("key rotate user_1 default --id r1 --wait 1s"), "rotation r1 is still being made", "the old one works")
	if out != "" {
		t.Errorf("a rotation that has no key yet prints %q", out)
	}
	if out, _ := saas.exits(6, words("key add user_1 more --wait 1s"), "still being made"); out != "" {
		t.Errorf("a key that is not made yet prints %q", out)
	}
	w.Faults()
	admin.exits(0, words("tenant retry user_1"))
	out, _ = saas.exits(0, words("key rotate user_1 default --id r1"))
	if !slices.ContainsFunc(w.AppKeys(), func(k provisiontest.SimKey) bool { return k.ID+"\n" == out }) {
		t.Errorf("the rotation prints %q", out)
	}
	saas.exits(0, words("key add user_1 more")) // one that was never made is revoked at once
	w.Faults(map[string]any{"call": "DeleteKey", "http": 502})
	saas.exits(6, words("key revoke user_1 more --wait 1s"), "still being revoked")
	saas.exits(6, words("tenant suspend user_1 --wait 1s"), "is still suspending", "suspending")
	w.Faults()
	saas.exits(0, words("tenant resume user_1"), "active")
}

// Keys, from the command line.
func TestKeyCommands(t *testing.T) {
	t.Parallel()
	w, o, p := serving(t)
	saas, ops, admin := o.can("provisioner"), o.can("viewer"), o.can("admin")
	saas.exits(0, words("tenant create user_1"))
	first := w.AppKeys()[0].ID
	if out, log := saas.exits(0, words("key reveal user_1 default")); out != first+"\n" || log != "" {
		t.Errorf("reveal prints %q, %q; want the key and nothing else", out, log)
	}
	var credentials struct{ Key string }
	if saas.read(&credentials, words("key reveal user_1 default")...); credentials.Key != first {
		t.Errorf("reveal as JSON has not the key")
	}
	ops.exits(5, words("key reveal user_1 default"), "role_forbidden")
	saas.exits(4, words("key reveal user_1 nothing"), "key_not_found")
	wrong := saas
	wrong.vars = maps.Clone(saas.vars)
	wrong.vars["TENANTRY_TOKEN"] = strings.Repeat("x", 8)
	if _, log := wrong.exits(5, words("key reveal user_1 default"), "token_invalid", "request "); strings.Count(log, "\n") != 1 {
		t.Errorf("a wrong token is answered with\n%s", log)
	}
	delete(wrong.vars, "TENANTRY_TOKEN")
	wrong.exits(2, words("key reveal user_1 default"), "tenantry token create")

	second, log := saas.exits(0, words("key add user_1 search --scope Search --scope Inputs_Get --expires-in 48h"))
	if second = strings.TrimSpace(second); !strings.Contains(log, "Search,Inputs_Get") || !strings.Contains(log, "(in 47h)") || strings.Contains(log, second) {
		t.Errorf("add says %q", log)
	}
	saas.exits(2, words("key add user_1 x --expires-in 1h --expires-at 2999-01-01T00:00:00Z"), "together")
	saas.exits(2, words("key add user_1 x --expires-at tomorrow"))
	saas.exits(5, words("key add user_1 search --scope Predict"), "key_differs")
	if out, _ := ops.exits(0, words("key list user_1"), "search", "Search,Inputs_Get", second[len(second)-4:]); strings.Contains(out, second) || strings.Contains(out, first) {
		t.Errorf("the list shows a key")
	}
	var keys []struct{ Name, State, Fingerprint string }
	if ops.read(&keys, words("key list user_1")...); len(keys) != 2 || keys[1].Name != "search" || len(keys[1].Fingerprint) != 64 {
		t.Errorf("the list as JSON is %+v", keys)
	}

	// Whose key is this? It comes from stdin only, and is not shown again.
	ops.types("  Key "+second+"\nmore\n").exits(0, words("key identify"), "user_1", "search …"+second[len(second)-4:])
	ops.exits(0, []string{"key", "identify", "--fingerprint", keys[1].Fingerprint}, "user_1", "search")
	var found struct {
		AppID string `json:"app_id"`
		Keys  []any
	}
	ops.types(second).read(&found, words("key identify")...)
	ops.read(&found, "key", "identify", "--app", found.AppID)
	if len(found.Keys) != 2 {
		t.Errorf("identify --app prints %+v", found)
	}
	ops.types("0123456789abcdef0123456789abcdef").exits(4, words("key identify"), "key_not_found")
	ops.exits(2, words("key identify"), "stdin")
	if exit, _, log := ops.run("key", "identify", second); exit != 2 || strings.Contains(log, second) {
		t.Errorf("identify with the key as an argument exits with %d and says %q", exit, log)
	}

	out, log := saas.exits(0, words("key rotate user_1 default --overlap 2h"))
	id := regexp.MustCompile(`rotation ([-0-9a-f]{36}): .*\(in 1h\), or with (tenantry key confirm user_1 default .*)\n`).FindStringSubmatch(log)
	if id == nil || len(strings.TrimSpace(out)) != 32 || strings.TrimSpace(out) == first {
		t.Fatalf("rotate prints %q, %q", out, log)
	}
	if again, _ := saas.exits(0, append(words("key rotate user_1 default --overlap 2h --id"), id[1])); again != out {
		t.Errorf("the same rotation prints %q after %q", again, out)
	}
	saas.exits(5, words("key rotate user_1 default"), "rotation_under_way")
	saas.exits(0, words(id[2])[1:], "default", "active", first[len(first)-4:])
	provisiontest.Eventually(t, "the old key is revoked", func() bool {
		return !slices.ContainsFunc(w.AppKeys(), func(k provisiontest.SimKey) bool { return k.ID == first })
	})
	saas.exits(4, words("key confirm user_1 default none"), "rotation_not_found")
	saas.exits(0, words("key revoke user_1 search"), "search", "revoked")
	ops.exits(5, words("key revoke user_1 search"), "role_forbidden")

	// A key leaks.
	leaked := strings.TrimSpace(out)
	admin.types(leaked).exits(2, words("key quarantine"), "--yes")
	admin.types("").exits(2, words("key quarantine --yes"), "stdin")
	admin.atTerminal().types(leaked+"\nno\n").exits(1, words("key quarantine"), "the key default of tenant user_1", "nothing was changed")
	admin.atTerminal().types(leaked+"\nuser_1\n").exits(0, words("key quarantine"), "quarantined", "active")
	// The row of an unknown key may be lost, so Clarifai is asked for the app of the key.
	unknown := strings.Repeat("ab", 16)
	admin.atTerminal().types(unknown+"\nno\n").exits(1, words("key quarantine"), "the database does not know this key", "nothing was changed")
	admin.atTerminal().types(unknown+"\nquarantine\n").exits(4, words("key quarantine"), "Clarifai does not accept the key")
	if slices.ContainsFunc(w.AppKeys(), func(k provisiontest.SimKey) bool { return k.ID == leaked }) || len(w.AppKeys()) != 1 {
		t.Errorf("the keys are %v", w.AppKeys())
	}
	var q struct{ Successor *struct{ State string } }
	admin.types(w.AppKeys()[0].ID).read(&q, words("key quarantine --yes")...)
	if q.Successor == nil || q.Successor.State != "active" {
		t.Errorf("quarantine prints %+v", q)
	}
	p.stop()
	<-p.exit
	for _, secret := range []string{first, second, leaked} {
		if strings.Contains(p.stderr.String(), secret) {
			t.Errorf("a key is in the log")
		}
	}
}

// What is not Tenantry's, busy or cut off is told apart by the exit code.
func TestExitCodes(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		answer http.HandlerFunc
		exit   int
		says   string
	}{
		{func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTooManyRequests) }, 6, "429"},
		{func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) }, 6, "502"},
		{func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) }, 1, "418"},
		{func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "<html>") }, 1, "no answer of Tenantry's"},
		{func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, 6, "does not answer"},
		{func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "99")
			_, _ = io.WriteString(w, "{")
		}, 6, "does not answer"},
		{func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			_, _ = io.WriteString(w, "[")
		}, 1, "cannot be read"},
	} {
		s := httptest.NewServer(c.answer)
		o := operatorAt{t: t, url: s.URL, vars: map[string]string{"TENANTRY_TOKEN": "tnty_x"}}
		o.exits(c.exit, words("tenant show user_1"), c.says)
		s.Close()
	}
}
