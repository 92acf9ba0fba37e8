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

	"github.com/google/go-cmp/cmp"

	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// parsed is what a file reads like: a line each, or what is wrong with the whole.
func parsed(format, text string) []string {
	rows, err := parseAdoptFile(format, []byte(text))
	if err != nil {
		return []string{err.Error()}
	}
	var lines []string
	for _, r := range rows {
		line := fmt.Sprintf("%d %s %s %s %s %s", r.Line, r.ID, r.What.AppID, r.What.UserID, r.Profile, r.Name)
		if r.What.Key.IsSet() {
			line += " key " + r.What.Key.Reveal()
		}
		if r.Fault != "" {
			line = fmt.Sprintf("%d: %s", r.Line, r.Fault)
		}
		lines = append(lines, strings.Join(strings.Fields(line), " "))
	}
	return lines
}

func TestParseAdoptFile(t *testing.T) {
	t.Parallel()
	wrong := "the header must read " + adoptHeader + ", separated by commas"
	for name, c := range map[string]struct {
		format, text string
		want         []string
	}{
		"plain":              {"csv", "tenant_id,app_id\nu1,a1\nu2,a2\n", []string{"2 u1 a1", "3 u2 a2"}},
		"BOM and CRLF":       {"csv", "\ufefftenant_id,app_id,key\r\nu1,a1,k1\r\nu2,a2,\r\n", []string{"2 u1 a1 key k1", "3 u2 a2"}},
		"other order":        {"csv", "App_ID, tenant_id,display_name,profile,user_id\na1, u1 ,\"Lovelace, Ada\",pro,bob\n", []string{"2 u1 a1 bob pro Lovelace, Ada"}},
		"quotes":             {"csv", "tenant_id,app_id,display_name\nu1,a1,\"The \"\"Ada\"\"\"\nu2,a2,x\n", []string{`2 u1 a1 The "Ada"`, "3 u2 a2 x"}},
		"empty lines":        {"csv", "tenant_id,app_id\n\nu1,a1\n   \n\r\nu2,a2", []string{"3 u1 a1", "6 u2 a2"}},
		"empty line first":   {"csv", "\n\ntenant_id,app_id\nu1,a1\n", []string{"4 u1 a1"}},
		"too few fields":     {"csv", "tenant_id,app_id,key\nu1,a1\nu2,a2,k\n", []string{"2: has 2 fields, and the header 3", "3 u2 a2 key k"}},
		"too many fields":    {"csv", "tenant_id,app_id\nu1,a1,k\nu2,a2\n", []string{"2: has 3 fields, and the header 2", "3 u2 a2"}},
		"bare quote":         {"csv", "tenant_id,app_id\nu\"1,a1\nu2,a2\n", []string{"2: a quote stands where none may: put a field with quotes or commas into quotes, and double the quotes in it", "3 u2 a2"}},
		"quote never closed": {"csv", "tenant_id,app_id\nu1,\"a1\nu2,a2\n", []string{"2: a quote stands where none may: put a field with quotes or commas into quotes, and double the quotes in it; the lines up to 3 were taken for a part of it"}},
		"bad ids": {"csv", "tenant_id,app_id\n,a1\na b,a2\nu3,\nu4,a/b\n..,a5\n", []string{"2: tenant_id is empty: it must have 1 to 128 characters", "3: tenant_id has white space at byte 1",
			"4: app_id is missing or empty", "5: app_id has a slash, white space or a character that cannot be printed", `6: tenant_id must not be ".."`}},
		"bad rest": {"csv", "tenant_id,app_id,user_id,key,profile,display_name\nu1,a1,me,,,\nu2,a2,,k*,,\nu3,a3,,,Pro!,\nu4,a4,,,,\"a\tb\"\nu5,a5,,a b,,\n", []string{
			`2: user_id must be the id of a Clarifai user, not the alias "me"`, "3: key has asterisks: it looks like a key as a listing masks it",
			"4: profile has a name that no profile can have", "5: display_name has a control character at byte 1", "6: key has white space or other characters that no key has"}},
		"not UTF-8":        {"csv", "tenant_id,app_id\nu\xff,a1\nu2,a2\n", []string{"2: tenant_id is not valid UTF-8", "3 u2 a2"}},
		"zero byte":        {"csv", "tenant_id,app_id\nu\x00,a1\n", []string{"2: tenant_id has a control character at byte 1"}},
		"no header":        {"csv", "u1,a1\nu2,a2\n", []string{"line 1: " + wrong + "; it names another column"}},
		"wrong header":     {"csv", "tenant,app_id\nu1,a1\n", []string{"line 1: " + wrong + "; it names another column"}},
		"semicolons":       {"csv", "tenant_id;app_id\nu1;a1\n", []string{"line 1: " + wrong + "; it names another column"}},
		"lacks one":        {"csv", "tenant_id,key\nu1,k1\n", []string{"line 1: " + wrong + "; it lacks app_id"}},
		"twice":            {"csv", "tenant_id,app_id,app_id\nu1,a1,a2\n", []string{"line 1: " + wrong + "; it names app_id twice"}},
		"quote in header":  {"csv", "tenant\"_id,app_id\nu1,a1\n", []string{"line 1: " + wrong + "; it lacks tenant_id"}},
		"UTF-16":           {"csv", "\xff\xfet\x00e\x00", []string{"is UTF-16: save it as UTF-8"}},
		"empty":            {"csv", "", []string{"names no apps"}},
		"header only":      {"csv", "tenant_id,app_id\n\n", []string{"names no apps"}},
		"objects":          {"ndjson", "\ufeff{\"tenant_id\":\"u1\",\"app_id\":\"a1\",\"key\":\"k\"}\r\n\n{\"tenant_id\":\"u2\",\"app_id\":\"a2\",\"display_name\":\"A, \\\"B\\\"\",\"user_id\":null}", []string{"1 u1 a1 key k", `3 u2 a2 A, "B"`}},
		"broken objects":   {"ndjson", "{\"tenant_id\":\"u1\"\n[]\nnull\n{\"tenant_id\":7,\"app_id\":\"a\"}\n{\"tenant_id\":\"u\",\"app\":\"a\"}\n{\"tenant_id\":\"u\",\"app_id\":\"\xff\"}\n{\"tenant_id\":\"u7\",\"app_id\":\"a7\"} {}\n{\"tenant_id\":\"u8\",\"app_id\":\"a8\"}", []string{"1: is not one JSON object in UTF-8", "2: is not one JSON object in UTF-8", "3: is not one JSON object in UTF-8", "4: tenant_id must be a string", "5: has a field that is none of tenant_id, app_id, user_id, key, profile, display_name", "6: is not one JSON object in UTF-8", "7: is not one JSON object in UTF-8", "8 u8 a8"}},
		"array of objects": {"ndjson", "[{\"tenant_id\":\"u1\",\"app_id\":\"a1\"}]", []string{"1: is not one JSON object in UTF-8"}},
	} {
		if diff := cmp.Diff(c.want, parsed(c.format, c.text)); diff != "" {
			t.Errorf("%s (- want, + got):\n%s", name, diff)
		}
	}
}

// Whatever the bytes are, each line that holds something is a row with the number of its
// line, in order, and what is taken for good is good.
func FuzzParseAdoptFile(f *testing.F) {
	for _, text := range []string{"tenant_id,app_id\nu1,a1\n", "\ufefftenant_id,app_id,key\r\n\"u,1\",a1,k\r\n", "{\"tenant_id\":\"u\",\"app_id\":\"a\"}\n", "tenant_id,app_id\n\"u\n1\",\"a", "\xff\xfe"} {
		f.Add(text, true)
		f.Add(text, false)
	}
	f.Fuzz(func(t *testing.T, text string, isCSV bool) {
		format := "ndjson"
		if isCSV {
			format = "csv"
		}
		rows, err := parseAdoptFile(format, []byte(text))
		if err != nil {
			return
		}
		last, lines := 0, strings.Count(text, "\n")+1
		for _, r := range rows {
			if r.Line <= last || r.Line > lines {
				t.Fatalf("a row of line %d follows that of line %d; there are %d lines", r.Line, last, lines)
			}
			last = r.Line
			if r.Fault != "" {
				continue
			}
			if err := r.What.Validate(); err != nil || r.ID == "" {
				t.Errorf("the row %d is taken: %v", r.Line, err)
			}
		}
		duplicatesIn(rows)
	})
}

func handMade(n int) tenant.AppID { return tenant.AppID(fmt.Sprintf("hand-made-%d", n)) }

func writeAdoptFile(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestAdoptWronglyCalled(t *testing.T) {
	t.Parallel()
	file := writeAdoptFile(t, "apps.csv", "tenant_id,app_id\nu1,a1\n")
	with := map[string]string{"TENANTRY_TOKEN": "tnty_x"}
	fails(t, with, []string{"adopt", file + "x"}, "give --format csv")
	fails(t, with, []string{"adopt", filepath.Join(t.TempDir(), "none.csv")}, "no such file")
	fails(t, with, []string{"adopt", t.TempDir(), "--format", "csv"}, "is a directory")
	fails(t, with, []string{"adopt", file, "--concurrency", "0"}, "from 1 to 64")
	fails(t, with, []string{"adopt", file, "--timeout", "0s"}, "--timeout")
	fails(t, with, []string{"adopt", file, "--yes", "--dry-run"}, "--yes")
	fails(t, nil, []string{"adopt", file}, "the token is missing")
	fails(t, with, []string{"adopt", writeAdoptFile(t, "apps.csv", "hunter2,app_id\nu1,a1\n")}, "the header must read tenant_id,app_id")
	fails(t, with, []string{"adopt", writeAdoptFile(t, "apps.csv", "tenant_id,app_id\nu1,a1\nu2,a1\nu1,a3\n")},
		"nothing was begun", "lines 2 and 3 name the app a1", "lines 2 and 4 name the tenant u1")
}

// A file of good and bad lines: a dry run, the run, and the same again.
func TestAdoptFile(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	vars, serve, addrFile := settings(t, pgtest.URL(t).Reveal(), w.Clarifai)
	token := strings.TrimSpace(must(t, vars, "token", "create", "--name", "backend", "--role", "provisioner"))
	viewer := strings.TrimSpace(must(t, vars, "token", "create", "--name", "ops", "--role", "viewer"))
	p := start(t, vars, serve...)
	p.listening(addrFile)
	p.ready()
	with := maps.Clone(vars)
	with["TENANTRY_TOKEN"] = token

	var text strings.Builder
	text.WriteString("\ufefftenant_id,app_id,key,display_name,user_id\r\n")
	const good = 10
	var keys []string
	for i := range good {
		key := w.AppByHand(provisiontest.PAT, handMade(i), nil).Reveal()
		keys = append(keys, key)
		if i%2 == 1 {
			key = ""
		}
		fmt.Fprintf(&text, "user_%d,%s,%s,\"Doe, %d\",\r\n", i, handMade(i), key, i)
	}
	theirs := w.Shared("theirs").Reveal()
	keys = append(keys, theirs)
	fmt.Fprintf(&text, "\r\nshared,theirs,%s,,bob\r\n", theirs)
	fmt.Fprintf(&text, "wrong key,none,,,\r\nmissing,none,,,\r\nwrong_key,spare,%s,,\r\n", keys[0])
	w.AppByHand(provisiontest.PAT, "spare", nil)
	file := writeAdoptFile(t, "apps.csv", text.String())

	run := func(wantExit int, args ...string) (out, log string) {
		t.Helper()
		exit, out, log := command(t, with, append([]string{"adopt", file, "--url", p.url}, args...)...)
		for _, k := range append(keys, token) {
			if strings.Contains(out+log, k) {
				t.Errorf("adopt %v shows a key:\n%s%s", args, out, log)
			}
		}
		if exit != wantExit {
			t.Errorf("adopt %v exits with %d; want %d:\n%s%s", args, exit, wantExit, out, log)
		}
		return out, log
	}
	says := func(text string, want ...string) {
		t.Helper()
		for _, s := range want {
			if !strings.Contains(text, s) {
				t.Errorf("it prints\n%s\nwant %q", text, s)
			}
		}
	}
	bad := []string{"14    ", "tenant_id has white space", "15    missing", "adopt_app_unknown", "16    wrong_key", "adopt_key_wrong_app"}
	out, log := run(1)
	says(out, bad...)
	says(log, "of 14: 11 can be adopted, 3 failed", "nothing was changed")
	if status, _ := p.request(http.MethodGet, p.url+"/v1/tenants/user_0", token); status != http.StatusNotFound {
		t.Errorf("after a dry run a tenant is answered %d", status)
	}
	out, log = run(1, "--yes", "--concurrency", "3")
	says(out, bad...)
	says(log, "of 14: 11 adopted, 3 failed")
	before := w.State().Calls
	out, log = run(1, "--yes")
	says(out, bad...)
	says(log, "of 14: 11 were adopted before, 3 failed")
	if after := w.State().Calls; after["PostKeys"] != before["PostKeys"] || after["PostApps"] != before["PostApps"] {
		t.Errorf("the same again made calls: %v after %v", after, before)
	}
	status, body := p.request(http.MethodGet, p.url+"/v1/tenants/user_3", token)
	if status != http.StatusOK || !strings.Contains(body, `"Doe, 3"`) || !strings.Contains(body, `"state":"active"`) {
		t.Errorf("an adopted tenant is answered %d %s", status, body)
	}

	var shown struct {
		Lines  []adoptEnd     `json:"lines"`
		Counts map[string]int `json:"counts"`
	}
	out, _ = run(1, "--output", "json")
	if err := json.Unmarshal([]byte(out), &shown); err != nil || len(shown.Lines) != 14 || shown.Counts[adoptWas] != 11 || shown.Lines[10].Line != 13 {
		t.Errorf("--output json prints %s, %v", out, err)
	}

	// What every line would meet ends the run.
	with["TENANTRY_TOKEN"] = viewer
	fails(t, with, []string{"adopt", file, "--url", p.url, "--yes"}, "role_forbidden")
	file = writeAdoptFile(t, "more.jsonl", `{"tenant_id":"user_0","app_id":"`+string(handMade(0))+`"}`+"\n")
	with["TENANTRY_TOKEN"] = token
	_, log = run(1, "--yes", "--profile", "nowhere")
	says(log, "of 1: 1 failed")
}
