package main

import (
	"encoding/json"
	"maps"
	"net/http"
	"strings"
	"testing"

	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
)

// The first token is made on the database, and all others through the API.
func TestCallerCommands(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	vars, serve, addrFile := settings(t, pgtest.URL(t).Reveal(), w.Clarifai)
	first := strings.TrimSpace(must(t, vars, "token", "create", "--name", "root", "--role", "admin"))
	p := start(t, vars, serve...)
	p.listening(addrFile)
	p.ready()
	with := maps.Clone(vars)
	with["TENANTRY_TOKEN"] = first
	caller := func(args ...string) []string { return append(append([]string{"caller"}, args...), "--url", p.url) }

	token := strings.TrimSpace(must(t, with, caller("create", "--name", "product a", "--role", "provisioner",
		"--label", "product=a", "--label", "tags=x;y,z", "--rate-limit", "50", "--expires-in", "2160h")...))
	if !strings.HasPrefix(token, "tnty_") || strings.ContainsAny(token, "\n ") {
		t.Fatalf("caller create prints %q; want a token and nothing else", token)
	}
	if status, body := p.request(http.MethodPut, p.url+"/v1/tenants/user_1", token, "Prefer", "wait=30"); status != http.StatusCreated || !strings.Contains(body, `"product":"a"`) {
		t.Errorf("a sign-up with it answers %d %s", status, body)
	}
	id := strings.Split(token, "_")[1]
	for _, args := range [][]string{caller("list"), caller("show", id), caller("show", token), {"token", "list"}} {
		out := must(t, with, args...)
		if !strings.Contains(out, id) || !strings.Contains(out, "product=a,tags=x;y,z") || !strings.Contains(out, "50/s") || strings.Contains(out, token) {
			t.Errorf("tenantry %v prints\n%s", args, out)
		}
	}
	type shown struct {
		ID         string            `json:"id"`
		Token      string            `json:"token"`
		Labels     map[string]string `json:"labels"`
		ReplacedBy string            `json:"replaced_by"`
		RevokedAt  string            `json:"revoked_at"`
	}
	read := func(v any, args ...string) {
		t.Helper()
		if err := json.Unmarshal([]byte(must(t, with, append(caller(args...), "--output", "json")...)), v); err != nil {
			t.Errorf("tenantry caller %v prints no JSON: %v", args, err)
		}
	}
	var next, old, made shown
	read(&next, "rotate", id, "--overlap", "30m")
	read(&old, "show", id)
	if next.Token == "" || next.Labels["product"] != "a" || old.ReplacedBy != next.ID || old.RevokedAt != "" {
		t.Errorf("rotate prints %+v, and show %+v", next, old)
	}
	read(&made, "create", "--name", "ops", "--role", "viewer")
	if made.Token == "" || len(made.Labels) != 0 {
		t.Errorf("create prints %+v", made)
	}
	out := must(t, with, caller("rotate", made.ID)...)
	if !strings.HasPrefix(out, "tnty_") {
		t.Errorf("rotate prints %q", out)
	}
	read(&next, "revoke", next.Token)
	if next.RevokedAt == "" {
		t.Errorf("revoke prints %+v", next)
	}
	if out := must(t, with, caller("revoke", id)...); !strings.Contains(out, id) {
		t.Errorf("revoke prints %q", out)
	}
	if status, _ := p.request(http.MethodGet, p.url+"/v1/tenants/user_1", token); status != http.StatusUnauthorized {
		t.Errorf("a revoked token is answered %d", status)
	}
	var all []shown
	read(&all, "list")
	if len(all) != 5 || all[1].ID != id {
		t.Errorf("the list holds %+v; want 5 callers", all)
	}

	own := strings.Split(first, "_")[1]
	fails(t, with, caller("revoke", own), "last_admin")
	fails(t, with, caller("rotate", own, "--overlap", "0s"), "overlap: must not be 0")
	fails(t, with, caller("rotate", own, "--overlap", "721h"), "overlap: ", "720h")
	fails(t, with, caller("rotate", made.ID), "caller_rotated")
	fails(t, with, caller("show", "nobody"), "caller_not_found")
	fails(t, with, caller("create", "--name", "x", "--role", "root"), "--role")
	for flag, says := range map[string]string{"--label=product": "must read key=value", "--label==a": "must read key=value", "--label=a b=c": "--label key",
		"--rate-limit=-1": "--rate-limit must be", "--expires-in=-1s": "--expires-in must not be negative"} {
		fails(t, with, caller("create", "--name", "x", "--role", "viewer", flag), says)
		fails(t, with, []string{"token", "create", "--name", "x", "--role", "viewer", flag}, says)
	}
	fails(t, with, caller("create", "--name", "x", "--role", "viewer", "--label=a=1", "--label=a=2"), "--label a is given twice")
	with["TENANTRY_TOKEN"] = strings.TrimSpace(must(t, vars, "token", "create", "--name", "limited", "--role", "admin", "--label", "product=a", "--rate-limit", "5"))
	fails(t, with, caller("list"), "caller_limited")
	p.stop()
	if exit := <-p.exit; exit != 0 {
		t.Errorf("serve exits with %d: %s", exit, p.stderr.String())
	}
}
