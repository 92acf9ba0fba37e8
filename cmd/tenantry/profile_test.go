package main

import (
	"encoding/json"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tenantry/tenantry/internal/provision/provisiontest"
)

func writeFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "profiles.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestProfileCheck(t *testing.T) {
	t.Parallel()
	bad := writeFile(t, "profiles:\n  default:\n    key_scopes: [Modles_Get]\n    lang: en\n  pro: {base_workflow: Mine, key_scopes: [All]}\n")
	exit, out, log := command(t, nil, "profile", "check", bad)
	if want := bad + `:3: profile "default": key_scopes[0]: "Modles_Get" is no scope of Clarifai's; they read like Models_Get, or All
` + bad + `:4: profile "default" has no field "lang"; there are base_workflow, language, app_description, key_scopes, extra_keys, allowed_scopes, show_tenant, retention, max_key_age, pool
` + bad + `:5: warning: profile "pro": base_workflow: "Mine" is none of the workflows`; exit != 1 || !strings.HasPrefix(out, want) || log != "" {
		t.Errorf("check exits with %d and prints\n%s%s\nwant\n%s", exit, out, log, want)
	}
	warned := writeFile(t, "profiles:\n  default: {base_workflow: Mine, key_scopes: [All]}\n")
	if exit, out, log := command(t, nil, "profile", "check", warned); exit != 0 || !strings.Contains(out, ":2: warning: ") || !strings.Contains(log, "can be used") {
		t.Errorf("check exits with %d and prints %s%s", exit, out, log)
	}
	good, err := filepath.Glob("../../deployments/profiles.yaml")
	if err != nil || len(good) != 1 {
		t.Fatalf("the example is not there: %v", err)
	}
	if exit, out, log := command(t, nil, "profile", "check", good[0]); exit != 0 || out != "" || !strings.Contains(log, "profiles: default, pro; not compared") {
		t.Errorf("check of the example exits with %d and prints %s%s", exit, out, log)
	}
	fails(t, nil, []string{"profile", "check", bad + "x"}, "no such file")
	fails(t, nil, []string{"profile", "check", t.TempDir()}, "is a directory")
	fails(t, map[string]string{"DATABASE_URL": "postgres://nobody@127.0.0.1:1/none"}, []string{"profile", "check", warned}, "database cannot be reached")
	large := writeFile(t, strings.Repeat("#", maxFile+1))
	fails(t, nil, []string{"profile", "check", large}, "no profiles file")
}

// A profiles file from its settings over the tenants that are on its profiles to the
// file that has lost one of them.
func TestServeProfiles(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	vars, serve, addrFile := settings(t, w.URL.Reveal(), w.Clarifai)
	both := "profiles:\n  default: {base_workflow: Mine, key_scopes: [All]}\n  pro:\n    key_scopes: [Predict]\n    retention: 30d\n    extra_keys: {search: {scopes: [Search]}}\n"
	file := writeFile(t, both)
	bad := writeFile(t, "profiles:\n  default:\n    scopes: [All]\n")
	fails(t, vars, append(serve, "--profiles-file", bad, "--key-scopes", "All", "--base-workflow", "Empty", "--pool-min", "1", "--pool-max", "0"),
		"\n  - both TENANTRY_PROFILES_FILE and TENANTRY_POOL_MIN are given", "\n  - both TENANTRY_PROFILES_FILE and TENANTRY_POOL_MAX are given",
		"\n  - both TENANTRY_PROFILES_FILE and TENANTRY_KEY_SCOPES are given", "\n  - both TENANTRY_PROFILES_FILE and TENANTRY_BASE_WORKFLOW are given",
		"\n  - TENANTRY_PROFILES_FILE: "+bad+`:2: profile "default": key_scopes: is empty`, "\n  - TENANTRY_PROFILES_FILE: "+bad+`:3: profile "default" has no field "scopes"`)
	fails(t, vars, append(serve, "--profiles-file", bad+"x"), "TENANTRY_PROFILES_FILE: ", "no such file")

	token := strings.TrimSpace(must(t, vars, "token", "create", "--name", "saas", "--role", "provisioner"))
	p := start(t, vars, append(serve, "--profiles-file", file)...)
	p.listening(addrFile)
	p.ready()
	if !strings.Contains(p.stderr.String(), file+":2: warning: ") {
		t.Errorf("the log has no warning of the workflow:\n%s", p.stderr.String())
	}
	for id, body := range map[string]string{"user_1": `{}`, "user_2": `{"profile":"pro"}`} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, p.url+"/v1/tenants/"+id, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+token)
		req.Header.Set("Content-Type", "application/json")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode != http.StatusCreated {
			t.Errorf("sign-up of %s answers %s", id, resp.Status)
		}
	}
	with := maps.Clone(vars)
	with["TENANTRY_TOKEN"] = token
	out := must(t, with, "profile", "list", "--url", p.url)
	if lines := strings.Split(strings.TrimSpace(out), "\n"); len(lines) != 3 || !strings.HasPrefix(lines[0], "NAME ") ||
		strings.Join(strings.Fields(lines[2])[2:], " ") != "1 0 - Empty default, search 30d - 2-20" {
		t.Errorf("profile list prints\n%s", out)
	}
	var list struct{ Profiles []struct{ Name string } }
	if err := json.Unmarshal([]byte(must(t, with, "profile", "list", "--url", p.url, "--output", "json")), &list); err != nil || len(list.Profiles) != 2 {
		t.Errorf("profile list prints as JSON %v, %v", list, err)
	}
	fails(t, with, []string{"profile", "list", "--url", p.url + "/nowhere"}, "no such path")
	p.stop()
	<-p.exit

	lacks := writeFile(t, "\n# less\nprofiles:\n  default: {key_scopes: [All]}\n")
	fails(t, vars, append(serve, "--profiles-file", lacks), `TENANTRY_PROFILES_FILE: there is no profile "pro", and tenants are on it: put it back`)
	fails(t, vars, serve, `there is no profile "pro"`)
	exit, out, _ := command(t, vars, "profile", "check", lacks)
	if exit != 1 || !strings.HasPrefix(out, lacks+`:3: there is no profile "pro"`) || strings.Count(out, "\n") != 1 {
		t.Errorf("check exits with %d and prints %s", exit, out)
	}
	if exit, _, log := command(t, vars, "profile", "check", file); exit != 0 || !strings.Contains(log, "every profile that tenants are on is there") {
		t.Errorf("check exits with %d and prints %s", exit, log)
	}
}
