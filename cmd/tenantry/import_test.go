package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// readImport reads a file as check does, and tells each row in a line.
func readImport(format, text string) []string {
	in, err := newImportReader(strings.NewReader(text), format)
	if err != nil {
		return []string{err.Error()}
	}
	rows := []string{}
	for {
		row, err := in.next()
		if errors.Is(err, io.EOF) {
			return rows
		}
		if err != nil {
			return append(rows, err.Error())
		}
		if row.Fault != "" {
			rows = append(rows, fmt.Sprintf("%d: %s", row.Line, row.Fault))
			continue
		}
		item, _ := json.Marshal(row.Item)
		rows = append(rows, fmt.Sprintf("%d %s", row.Line, item))
	}
}

func TestReadImportFile(t *testing.T) {
	t.Parallel()
	const wrong = "the header must read " + importHeader + ", separated by commas; "
	long := strings.Repeat("x", maxImportLine+1)
	for name, c := range map[string]struct {
		format, text string
		want         []string
	}{
		"all columns":        {"auto", "id,profile,display_name,labels.plan,labels.Team/a\nu1,narrow,Ada,pro,x\nu2,,,,\nu3,,\"Doe, \"\"J\"\"\",,y\n", []string{`2 {"id":"u1","profile":"narrow","display_name":"Ada","labels":{"Team/a":"x","plan":"pro"}}`, `3 {"id":"u2"}`, `4 {"id":"u3","display_name":"Doe, \"J\"","labels":{"Team/a":"y"}}`}},
		"BOM and CRLF":       {"auto", "\ufeffID , Display_Name\r\nu1,Ada\r\n\r\n  \r\nu2,Bob", []string{`2 {"id":"u1","display_name":"Ada"}`, `5 {"id":"u2","display_name":"Bob"}`}},
		"as adopt has it":    {"csv", "tenant_id\nu1\n", []string{`2 {"id":"u1"}`}},
		"what failed":        {"csv", "id,error,labels.plan\nu1,\"because, so\",pro\n", []string{`2 {"id":"u1","labels":{"plan":"pro"}}`}},
		"bad fields":         {"csv", "id,display_name,labels.plan\n,A,\nu 1,A,\n" + strings.Repeat("u", 129) + ",,\nu4," + strings.Repeat("n", 257) + ",\nu5,,\x01\nu6\nu7,,,\n\xff,,\nu9,,\n", []string{"2: id is empty: it must have 1 to 128 characters", "3: id has white space at byte 1", "4: id has 129 characters: at most 128 are allowed", "5: display_name has 257 characters: at most 256 are allowed", "6: labels.plan has a control character at byte 0", "7: has 1 fields, and the header 3", "8: has 4 fields, and the header 3", "9: is not UTF-8", `10 {"id":"u9"}`}},
		"bad quotes":         {"csv", "id,display_name\nu1,a\"b\"c\nu2,\"a\"b\"\"\nu3,x\n", []string{"2: has a quote where none may stand: put a field with quotes or commas into quotes, and double the quotes in it", "3: has a quote where none may stand: put a field with quotes or commas into quotes, and double the quotes in it", `4 {"id":"u3","display_name":"x"}`}},
		"quote never closed": {"csv", "id,display_name\nu1,\"a\nu2,b\n", []string{"2: opens a quote that no later line closes; what follows was not looked at"}},
		"quote over lines":   {"csv", "id,display_name\nu1,\"a\nb\"\nu2,b\n", []string{"2: display_name has a control character at byte 1", `4 {"id":"u2","display_name":"b"}`}},
		"long line":          {"csv", "id,display_name\nu1," + long + "\nu2,b\n", []string{"2: has more than 262144 bytes", `3 {"id":"u2","display_name":"b"}`}},
		"long object":        {"auto", "{\"id\":\"u1\",\"display_name\":\"" + long + "\"}\n{\"id\":\"u2\"}", []string{"1: has more than 262144 bytes", `2 {"id":"u2"}`}},
		"empty":              {"auto", "", []string{"is empty"}},
		"only a BOM":         {"auto", "\ufeff", []string{"is empty"}},
		"header only":        {"auto", "id\n", []string{}},
		"no header":          {"auto", "u1,narrow\n", []string{"line 1: " + wrong + "its column 1 is none of these"}},
		"semicolons":         {"auto", "id;profile\nu1;a\n", []string{"line 1: " + wrong + "its column 1 is none of these"}},
		"lacks id":           {"auto", "profile,labels.x\n", []string{"line 1: " + wrong + "it lacks id"}},
		"twice":              {"auto", "id,tenant_id\n", []string{"line 1: " + wrong + "its column 2 was there before"}},
		"bad label":          {"auto", "id,labels.-\n", []string{"line 1: " + wrong + "its column 2 names a label that cannot be"}},
		"long header":        {"csv", long + "\nu1\n", []string{"line 1: " + wrong + "it has more than 262144 bytes"}},
		"UTF-16":             {"auto", "\xff\xfei\x00d\x00", []string{"is UTF-16: save it as UTF-8"}},
		"objects":            {"auto", "{\"id\":\"u1\",\"labels\":{\"plan\":\"pro\"},\"error\":\"x: y\"}\r\n\n{\"tenant_id\":\"u2\",\"profile\":null,\"display_name\":\"A, \\\"B\\\"\"}", []string{`1 {"id":"u1","labels":{"plan":"pro"}}`, `3 {"id":"u2","display_name":"A, \"B\""}`}},
		"broken objects":     {"ndjson", "{\"id\":\"u1\"\n[]\nnull\n{\"id\":7}\n{\"id\":\"u\",\"app\":\"a\"}\n{\"id\":\"\xff\"}\n{\"id\":\"u7\"} {}\n{\"id\":\"u8\",\"labels\":{\"a\":1}}\n{}\n{\"id\":\"u9\",\"labels\":[]}", []string{"1: is not one JSON object in UTF-8", "2: is not one JSON object in UTF-8", "3: is not one JSON object in UTF-8", "4: id must be a string", "5: has a field that is none of id, profile, display_name, labels", "6: is not one JSON object in UTF-8", "7: is not one JSON object in UTF-8", "8: labels must be an object of strings", "9: id is empty: it must have 1 to 128 characters", "10: labels must be an object of strings"}},
	} {
		if diff := cmp.Diff(c.want, readImport(c.format, c.text)); diff != "" {
			t.Errorf("%s (- want, + got):\n%s", name, diff)
		}
	}
}

// Whatever the bytes are, the rows come with the numbers of their lines, in order, and
// what is taken for good is good.
func FuzzReadImportFile(f *testing.F) {
	for _, text := range []string{"id,display_name\nu1,Ada\n", "\ufeffid,labels.plan\r\n\"u1\",\"a,\"\"b\"\r\n", "{\"id\":\"u\",\"labels\":{\"a\":\"b\"}}\n", "id\n\"u\n1", "\xff\xfe", "id,error\nu1,\"x\ny\"\nu2,z"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		in, err := newImportReader(strings.NewReader(text), "auto")
		if err != nil {
			return
		}
		last, lines := 0, strings.Count(text, "\n")+1
		for {
			row, err := in.next()
			if errors.Is(err, io.EOF) {
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if row.Line <= last || row.Line > lines {
				t.Fatalf("a row of line %d follows that of line %d; there are %d lines", row.Line, last, lines)
			}
			last = row.Line
			if row.Fault != "" {
				continue
			}
			if _, err := tenant.ParseID(row.Item.ID); err != nil {
				t.Errorf("the row %d is taken: %v", row.Line, err)
			}
			if in.format != "csv" {
				continue
			}
			// What is written of it reads the same.
			var out bytes.Buffer
			w := newCSVWriter(&out, in.columns)
			if err := errors.Join(w.row(in.columns, row.record, "why"), w.flush()); err != nil {
				t.Fatal(err)
			}
			again, err := newImportReader(&out, "csv")
			if err != nil {
				t.Fatalf("what failed cannot be read: %v", err)
			}
			if got, err := again.next(); err != nil || got.Fault != "" || cmp.Diff(row.Item, got.Item) != "" {
				t.Errorf("row %d is written and read as %+v, %v", row.Line, got, err)
			}
		}
	})
}

func TestImportWronglyCalled(t *testing.T) {
	t.Parallel()
	file := writeAdoptFile(t, "users.csv", "id\nu1\n")
	with := map[string]string{"TENANTRY_TOKEN": "tnty_x"}
	fails(t, with, []string{"import", filepath.Join(t.TempDir(), "none.csv")}, "no such file")
	fails(t, with, []string{"import", t.TempDir()}, "is a directory")
	fails(t, with, []string{"import", file, "--concurrency", "0"}, "from 1 to 64")
	fails(t, with, []string{"import", file, "--batch", "1001"}, "from 1 to 1000")
	fails(t, with, []string{"import", file, "--yes", "--dry-run"}, "--yes")
	fails(t, nil, []string{"import", file}, "the token is missing")
	fails(t, with, []string{"import", "-"}, "there is no stdin")
	fails(t, with, []string{"import", writeAdoptFile(t, "users.csv", "id\n\n")}, "names no users")
	fails(t, with, []string{"import", writeAdoptFile(t, "users.csv", "hunter2,id\nu1,a1\n")}, "the header must read id")
	fails(t, with, []string{"import", writeAdoptFile(t, "users.csv", "id\nu1\nu 2\nu1\n"+strings.Repeat("x y\n", 30))},
		"nothing was begun", "line 3: id has white space", `line 4: names the user "u1", as line 2 does`, "and 12 more")
	fails(t, with, []string{"import", file, "--yes", "--url", "http://127.0.0.1:1"}, "the API does not answer")
}

// An imported world: a running service, and a token to import with.
func importing(t *testing.T, flags ...string) (w *provisiontest.World, p *process, with map[string]string) {
	t.Helper()
	w = provisiontest.New(t)
	vars, serve, addrFile := settings(t, pgtest.URL(t).Reveal(), w.Clarifai)
	with = maps.Clone(vars)
	with["TENANTRY_TOKEN"] = strings.TrimSpace(must(t, vars, "token", "create", "--name", "backend", "--role", "provisioner"))
	p = start(t, vars, append(serve, flags...)...)
	p.listening(addrFile)
	p.ready()
	return w, p, with
}

func usersFile(t *testing.T, n int, more string) string {
	t.Helper()
	var text strings.Builder
	text.WriteString("id,display_name,labels.plan\n")
	for i := range n {
		fmt.Fprintf(&text, "user_%d,\"Doe, %d\",pro\n", i, i)
	}
	return writeAdoptFile(t, "users.csv", text.String()+more)
}

// A file of good lines and of some that the service refuses: looked at, imported, and
// the same again; what failed is corrected and imported.
func TestImport(t *testing.T) {
	t.Parallel()
	const n = 60
	w, p, with := importing(t)
	if status, _ := p.request(http.MethodPut, p.url+"/v1/tenants/user_7", with["TENANTRY_TOKEN"]); status != http.StatusCreated {
		t.Fatalf("a sign-up answers %d", status)
	}
	if status, _ := p.request(http.MethodPut, p.url+"/v1/tenants/other", with["TENANTRY_TOKEN"]); status != http.StatusCreated {
		t.Fatalf("a sign-up answers %d", status)
	}
	file := usersFile(t, n, "other,Somebody,\n")
	failed := filepath.Join(t.TempDir(), "failed.csv")
	imports := func(wantExit int, args ...string) (out, log string) {
		t.Helper()
		exit, out, log := command(t, with, append([]string{"import", "--url", p.url, "--batch", "7"}, args...)...)
		if strings.Contains(out+log, with["TENANTRY_TOKEN"]) {
			t.Errorf("import %v shows the token", args)
		}
		if exit != wantExit {
			t.Errorf("import %v exits with %d; want %d:\n%s%s", args, exit, wantExit, out, log)
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
	_, log := imports(exitUsage, file)
	says(log, "61 users; an app and a key each are 2 calls, at 1000 a second: about 1s", "tagging the apps", "say --yes if you mean it")
	// user_7 was signed up without a name, and other with another.
	_, log = imports(exitDiffers, file, "--dry-run")
	says(log, "of 61: 59 would be signed up, 2 would be refused", "nothing was changed", "62", "attributes_differ")
	if status, _ := p.request(http.MethodGet, p.url+"/v1/tenants/user_0", with["TENANTRY_TOKEN"]); status != http.StatusNotFound {
		t.Errorf("after a dry run a tenant is answered %d", status)
	}
	_, log = imports(exitDiffers, file, "--yes", "--failed", failed)
	says(log, "of 61: 59 signed up, 2 failed", "9     user_7", "attributes_differ: the tenant was signed up with another display_name and labels")
	if s := w.State(); s.Apps != n+2 { // with the control record
		t.Errorf("Clarifai has %d apps; want %d: when it ends all have theirs", s.Apps, n+2)
	}
	before := w.State().Calls
	out, _ := imports(exitDiffers, file, "--yes", "-o", "json")
	var shown struct {
		Counts   importCounts
		Failures []importFailure
	}
	if err := json.Unmarshal([]byte(out), &shown); err != nil || shown.Counts != (importCounts{Users: 61, There: 59, Active: 59, Failed: 2}) || len(shown.Failures) != 2 {
		t.Errorf("--output json prints %s, %v", out, err)
	}
	if after := w.State().Calls; after["PostApps"] != before["PostApps"] || after["PostKeys"] != before["PostKeys"] {
		t.Errorf("the same again made calls: %v after %v", after, before)
	}
	raw, err := os.ReadFile(failed)
	if err != nil || !strings.HasPrefix(string(raw), "id,display_name,labels.plan,error\n") || !strings.Contains(string(raw), "\nuser_7,\"Doe, 7\",pro,\"attributes_differ: ") || strings.Count(string(raw), "\n") != 3 {
		t.Fatalf("what failed is written as %s, %v", raw, err)
	}
	corrected := strings.NewReplacer("user_7,", "user_seven,").Replace(string(raw))
	if err := os.WriteFile(failed, []byte(corrected), 0o600); err != nil {
		t.Fatal(err)
	}
	_, log = imports(exitDiffers, failed, "--yes", "--failed", failed)
	says(log, "of 2: 1 signed up, 1 failed")
	if raw, err := os.ReadFile(failed); err != nil || strings.Contains(string(raw), "seven") || !strings.Contains(string(raw), "other,Somebody,") || strings.Count(string(raw), "\n") != 2 {
		t.Errorf("what failed again is written as %s, %v", raw, err)
	}
	if status, body := p.request(http.MethodGet, p.url+"/v1/tenants/user_3", with["TENANTRY_TOKEN"]); status != http.StatusOK || !strings.Contains(body, `"Doe, 3"`) || !strings.Contains(body, `"state":"active"`) || !strings.Contains(body, `"plan":"pro"`) {
		t.Errorf("an imported tenant is answered %d %s", status, body)
	}

	// From stdin, as objects; the profile is for those who name none.
	stdin := func(text string, terminal bool, args ...string) (int, string) {
		var out, log buffer
		e := env{args: append([]string{"import", "-", "--url", p.url}, args...), get: func(k string) string { return with[k] }, stdin: strings.NewReader(text), stdout: &out, stderr: &log}
		if terminal {
			e.terminal = func(any) bool { return true }
		}
		return run(t.Context(), e), log.String()
	}
	exit, log := stdin("{\"id\":\"a\"}\n{\"id\":\"b\",\"profile\":\"nowhere\"}\n", false, "--yes", "--no-wait")
	says(log, "of 2: 1 ", "1 failed", "profile_unknown: profile there is no such profile")
	if exit != exitDiffers {
		t.Errorf("an import from stdin exits with %d", exit)
	}
	if exit, log = stdin("{\"id\":\"c\"}\n", false, "--yes", "--profile", "nowhere"); exit != exitDiffers {
		t.Errorf("an import of a profile that is none exits with %d: %s", exit, log)
	}

	// What every line would meet ends it.
	with["TENANTRY_TOKEN"] = strings.TrimSpace(must(t, with, "token", "create", "--name", "ops", "--role", "viewer"))
	fails(t, with, []string{"import", file, "--url", p.url, "--yes"}, "role_forbidden")
}

// A person is asked, with what is there already and how long the rest takes.
func TestImportAsks(t *testing.T) {
	t.Parallel()
	_, p, with := importing(t)
	file := usersFile(t, 3, "")
	ask := func(answer string) (int, string) {
		var out, log buffer
		exit := run(t.Context(), env{args: []string{"import", file, "--url", p.url}, get: func(k string) string { return with[k] },
			stdin: strings.NewReader(answer), stdout: &out, stderr: &log, terminal: func(any) bool { return true }})
		return exit, log.String()
	}
	if exit, log := ask("no\n"); exit == 0 || !strings.Contains(log, "3 users; an app") || !strings.Contains(log, "nothing was changed") {
		t.Errorf("an import that is not wanted exits with %d: %q", exit, log)
	}
	if exit, log := ask("import\n"); exit != 0 || !strings.Contains(log, "of 3: 3 signed up") {
		t.Errorf("an import that is wanted exits with %d: %q", exit, log)
	}
	if exit, log := ask("import\n"); exit != 0 || !strings.Contains(log, "3 users: 3 are there, 0 would be refused, 0 are new.") || !strings.Contains(log, "of 3: 3 were there") {
		t.Errorf("the same again exits with %d: %q", exit, log)
	}
}

// An import that is interrupted is run again, and makes nothing twice; a service that
// fails or is busy for a while is waited for.
func TestImportGoesOn(t *testing.T) {
	t.Parallel()
	const n = 40
	w, p, with := importing(t)
	target, err := url.Parse(p.url)
	if err != nil {
		t.Fatal(err)
	}
	// A proxy that loses answers, refuses some requests and interrupts the command.
	var batches atomic.Int32
	ctx, interrupt := context.WithCancel(t.Context())
	proxy := httputil.NewSingleHostReverseProxy(target)
	srv := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v1/tenants/batch" {
			switch batches.Add(1) {
			case 2:
				rw.Header().Set("Retry-After", "1")
				rw.Header().Set("Content-Type", "application/problem+json")
				rw.WriteHeader(http.StatusServiceUnavailable)
				_, _ = rw.Write([]byte(`{"status":503,"code":"database_unavailable","detail":"x","title":"x","type":"x","request_id":"x"}`))
				return
			case 4: // it is done, and nobody hears of it
				proxy.ServeHTTP(httptest.NewRecorder(), r)
				panic(http.ErrAbortHandler)
			case 6:
				proxy.ServeHTTP(httptest.NewRecorder(), r)
				interrupt()
				panic(http.ErrAbortHandler)
			}
		}
		proxy.ServeHTTP(rw, r)
	}))
	defer srv.Close()
	file := usersFile(t, n, "")
	args := []string{"import", file, "--yes", "--batch", "7", "--concurrency", "1", "--url", srv.URL}
	var out, log buffer
	exit := run(ctx, env{args: args, get: func(k string) string { return with[k] }, stdout: &out, stderr: &log})
	if exit != exitLater || !strings.Contains(log.String(), "interrupted: ") || !strings.Contains(log.String(), "of 40 users are written down") || !strings.Contains(log.String(), "run it again with the same file") {
		t.Errorf("an import that is interrupted exits with %d: %s", exit, log.String())
	}
	got := must(t, with, append(args, "-o", "json")...)
	var shown struct{ Counts importCounts }
	if err := json.Unmarshal([]byte(got), &shown); err != nil || shown.Counts.There == 0 || shown.Counts.Created == 0 || shown.Counts.Active != n {
		t.Errorf("run again it prints %s, %v", got, err)
	}
	if s := w.State(); s.Apps != n+1 || s.Keys != n { // with the control record
		t.Errorf("Clarifai has %d apps and %d keys; want %d and %d", s.Apps, s.Keys, n+1, n)
	}
}

// Who is deleted while waiting stays so, and is told of.
func TestImportOfWhoIsDeleted(t *testing.T) {
	t.Parallel()
	w, p, with := importing(t)
	w.Faults(map[string]any{"call": "PostApps", "status": 11006})
	file := usersFile(t, 3, "")
	one := start(t, with, "import", file, "--yes", "--url", p.url)
	deleted := func(wantState string) bool {
		_, body := p.request(http.MethodGet, p.url+"/v1/tenants/user_1", with["TENANTRY_TOKEN"])
		return strings.Contains(body, `"state":"`+wantState+`"`)
	}
	provisiontest.Eventually(t, "the users wait", func() bool { return deleted("provisioning") })
	if status, body := p.request(http.MethodDelete, p.url+"/v1/tenants/user_1", with["TENANTRY_TOKEN"]); status != http.StatusOK {
		t.Errorf("a deletion is answered %d %s", status, body)
	}
	w.Faults()
	if exit := <-one.exit; exit != exitDiffers || !strings.Contains(one.stderr.String(), "user_1") || !strings.Contains(one.stderr.String(), "1 failed") {
		t.Errorf("an import of somebody who is deleted exits with %d: %s", exit, one.stderr.String())
	}
	exit, _, log := command(t, with, "import", file, "--yes", "--url", p.url)
	if exit != exitDiffers || !strings.Contains(log, "tenant_deleting") || !deleted("deleted") {
		t.Errorf("run again it exits with %d: %s", exit, log)
	}
	if log := must(t, with, "import", file, "--yes", "--again", "--url", p.url); !deleted("active") {
		t.Errorf("who was deleted is not signed up anew: %s", log)
	}
}

func TestImportSaysHowLong(t *testing.T) {
	t.Parallel()
	for d, want := range map[time.Duration]string{0: "1s", 1600 * time.Millisecond: "2s", 59*time.Second + 400*time.Millisecond: "59s", 90 * time.Second: "2m",
		callsTake(200000, 14): "3h58m", 26 * time.Hour: "26h0m"} {
		if got := roughly(d); got != want {
			t.Errorf("%v is told as %q; want %q", d, got, want)
		}
	}
	for n, want := range map[int]string{0: "0", 999: "999", 1000: "1,000", 100000: "100,000", 1234567: "1,234,567"} {
		if got := grouped(n); got != want {
			t.Errorf("%d is told as %q; want %q", n, got, want)
		}
	}
}
