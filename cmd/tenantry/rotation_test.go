package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"strings"
	"testing"

	"github.com/tenantry/tenantry/internal/provision/provisiontest"
)

// Keys are rotated and a changed profile is applied from the command line.
func TestCampaignsByCommand(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	vars, serve, addrFile := settings(t, w.URL.Reveal(), w.Clarifai)
	saas := strings.TrimSpace(must(t, vars, "token", "create", "--name", "saas", "--role", "provisioner"))
	admin, viewer := maps.Clone(vars), maps.Clone(vars)
	admin["TENANTRY_TOKEN"] = strings.TrimSpace(must(t, vars, "token", "create", "--name", "root", "--role", "admin"))
	viewer["TENANTRY_TOKEN"] = strings.TrimSpace(must(t, vars, "token", "create", "--name", "ops", "--role", "viewer"))
	p := start(t, vars, append(serve, "--key-scopes", "All", "--base-workflow", "Empty")...)
	p.listening(addrFile)
	p.ready()
	for i := range 3 {
		if status, body := p.request(http.MethodPut, p.url+fmt.Sprint("/v1/tenants/user_", i), saas, "Prefer", "wait=30"); status != http.StatusCreated {
			t.Fatalf("sign-up answers %d %s", status, body)
		}
	}
	at := func(args ...string) []string { return append(args, "--url", p.url) }
	fails(t, admin, at("rotation", "start"), "all: is missing")
	fails(t, admin, at("rotation", "start", "--label", "x"), "must read key=value")
	fails(t, viewer, at("rotation", "start", "--all"), "role_forbidden")
	if out := must(t, admin, at("rotation", "start", "--key-name", "default", "--dry-run")...); out != "keys that would be rotated: 3\n" {
		t.Errorf("a dry run prints %q", out)
	}
	if out := must(t, admin, at("rotation", "start", "--label", "plan=pro", "--older-than", "90d", "--dry-run", "--output", "json")...); !strings.Contains(out, `"keys": 0`) {
		t.Errorf("a dry run as JSON prints %q", out)
	}
	exit, out, log := command(t, admin, at("rotation", "start", "--all", "--overlap", "7d", "--watch")...)
	if exit != 0 || !strings.Contains(out, "rotate  done   all") || !strings.Contains(log, "done: 3 of 3 done") {
		t.Errorf("rotation start exits with %d and prints\n%s%s", exit, out, log)
	}
	exit, out, _ = command(t, admin, at("rotation", "start", "--profile", "default", "--watch")...)
	if exit != 3 || strings.Count(out, "rotation_under_way: ") != 3 {
		t.Errorf("a rotation of what is being rotated exits with %d and prints\n%s", exit, out)
	}
	var list []struct {
		ID             string `json:"id"`
		OverlapSeconds int    `json:"overlap_seconds"`
	}
	if err := json.Unmarshal([]byte(must(t, viewer, at("rotation", "list", "--output", "json")...)), &list); err != nil || len(list) != 2 || list[1].OverlapSeconds != 7*24*60*60 {
		t.Fatalf("rotation list prints %+v, %v", list, err)
	}
	if out := must(t, viewer, at("rotation", "list", "--limit", "1")...); strings.Count(out, "\n") != 2 || !strings.Contains(out, "profile=default") {
		t.Errorf("rotation list prints\n%s", out)
	}
	if out := must(t, viewer, at("rotation", "show", list[0].ID)...); strings.Count(out, "user_") != 3 {
		t.Errorf("rotation show prints\n%s", out)
	}
	for _, change := range []string{"pause", "resume", "stop"} {
		fails(t, admin, at("rotation", change, list[0].ID), "campaign_state_forbids")
	}
	p.stop()
	<-p.exit

	p = start(t, vars, append(serve, "--key-scopes", "Predict,Apps_Get", "--base-workflow", "General")...)
	p.listening(addrFile)
	p.ready()
	fails(t, admin, at("profile", "apply", "none"), "profile_not_found")
	fails(t, viewer, at("profile", "apply", "default"), "nothing was changed: to change 3 tenants, give --yes")
	fails(t, viewer, at("profile", "apply", "default", "--yes"), "role_forbidden")
	exit, out, log = command(t, viewer, at("profile", "apply", "default", "--dry-run")...)
	if exit != 0 || strings.Count(out, "\n") != 7 || !strings.Contains(out, "Predict, Apps_Get") || !strings.Contains(log, "tenants that would change: 3, skipped: 0") {
		t.Errorf("a dry run exits with %d and prints\n%s%s", exit, out, log)
	}
	exit, out, _ = command(t, admin, at("profile", "apply", "default", "--yes", "--watch")...)
	if exit != 0 || !strings.Contains(out, "conform  done") {
		t.Errorf("profile apply exits with %d and prints\n%s", exit, out)
	}
	if out := must(t, admin, at("profile", "apply", "default", "--output", "json")...); out != "[]\n" {
		t.Errorf("what is left to apply is %q", out)
	}
}
