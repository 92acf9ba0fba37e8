package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/tenantry/tenantry/internal/localpg"
	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/migrations"
)

// A rolling update needs older code to serve during a migration, and afterwards on the new schema
// next to the new code. A migration may bar older code: then the older code is stopped before the
// migration and does not start on the new schema, and the new code must keep all its tenants.
func TestOldCodeOnNewSchema(t *testing.T) {
	if testing.Short() {
		t.Skip("it builds older versions")
	}
	for n := 2; n <= postgres.KnownSchema(); n++ {
		t.Run(fmt.Sprint("migration ", n), func(t *testing.T) {
			t.Parallel()
			old := buildBefore(t, n)
			w := provisiontest.New(t)
			url := pgtest.EmptyURL(t)
			vars, serve, addrFile := settings(t, url.Reveal(), w.Clarifai)
			runOld(t, old, vars, "migrate", "up")
			token := strings.TrimSpace(runOld(t, old, vars, "token", "create", "--name", "saas", "--role", "provisioner"))
			p := &process{t: t}
			end := startOld(t, old, vars, serve)
			p.listening(addrFile)
			p.ready()

			// Sign-ups go on throughout, and none of them fails.
			var signedUp atomic.Int64
			barred := false
			ctx, stop := context.WithCancel(t.Context())
			done := make(chan struct{})
			go func() {
				defer close(done)
				for i := 0; ctx.Err() == nil; i++ {
					status, body := p.request(http.MethodPut, fmt.Sprintf("%s/v1/tenants/user_%d", p.url, i), token, "Prefer", "wait=30")
					if status != http.StatusCreated {
						t.Errorf("the old code answers a sign-up with %d %s", status, body)
						return
					}
					signedUp.Add(1)
				}
			}()
			goesOn := func(when string) {
				t.Helper()
				before := signedUp.Load()
				provisiontest.Eventually(t, "sign-ups go on "+when, func() bool { return signedUp.Load() >= before+3 || t.Failed() })
			}
			goesOn("before the migration")
			conn := pgtest.Conn(t, url)
			var known int // which may be less than n-1: branches come together
			if err := conn.QueryRow(t.Context(), `SELECT version FROM schema_migrations`).Scan(&known); err != nil {
				t.Fatal(err)
			}
			for step := known + 1; step <= postgres.KnownSchema(); step++ {
				sql, err := migrations.FS.ReadFile(fileOf(t, step))
				if err != nil {
					t.Fatal(err)
				}
				if oldestOf(t, sql) > known {
					barred = true
					stop()
					<-done
					end()
				}
				// What golang-migrate does, a step at a time.
				if _, err := conn.Exec(t.Context(), string(sql)+fmt.Sprintf(";UPDATE schema_migrations SET version = %d", step)); err != nil {
					t.Fatalf("migration %d beside the old code: %v", step, err)
				}
				if !barred {
					goesOn(fmt.Sprint("after migration ", step))
				}
			}

			must(t, vars, "migrate", "up")
			if barred {
				if out, err := oldCommand(old, vars, serve...).CombinedOutput(); err == nil || !barredMessage.Match(out) {
					t.Errorf("the old code starts on a schema that bars it: %v %s", err, out)
				}
			}
			newServe := append([]string{}, serve...)
			newAddrFile := filepath.Join(t.TempDir(), "addr")
			newServe = append(newServe, "--addr-file", newAddrFile)
			next := start(t, vars, newServe...)
			next.listening(newAddrFile)
			next.ready()
			if !barred {
				goesOn("beside the new code")
			}
			stop()
			<-done
			for i := range signedUp.Load() {
				status, body := next.request(http.MethodPut, fmt.Sprintf("%s/v1/tenants/user_%d", next.url, i), token)
				var got struct{ State string }
				if err := json.Unmarshal([]byte(body), &got); err != nil || status != http.StatusOK || got.State != "active" {
					t.Errorf("the new code answers %d %s for a tenant of the old", status, body)
				}
			}
			next.stop()
			<-next.exit
			var held, others int // which are the pool's
			if err := conn.QueryRow(t.Context(), `SELECT count(*) FILTER (WHERE state = 'held'), count(*) FILTER (WHERE state IN ('ready', 'building')) FROM apps`).
				Scan(&held, &others); err != nil {
				t.Fatal(err)
			}
			if s := w.State(); held != int(signedUp.Load()) || s.Apps < held || s.Apps > held+others+1 { // and the control record
				t.Errorf("Clarifai has %d apps; %d tenants have one, of %d, and %d more are ready or begun", s.Apps, held, signedUp.Load(), others)
			}
		})
	}
}

// barredMessage is the error of code that is too old. Code before migration 11 looks for its job tables first.
var barredMessage = regexp.MustCompile(`schema|job tables`)

// oldestCode matches the statement that bars older code.
var oldestCode = regexp.MustCompile(`(?s)REPLACE FUNCTION tenantry_oldest_code\(\).{0,80}?SELECT (\d+)'`)

func fileOf(t *testing.T, migration int) string {
	t.Helper()
	entries, err := migrations.FS.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), fmt.Sprintf("%06d_", migration)) && strings.HasSuffix(e.Name(), ".up.sql") {
			return e.Name()
		}
	}
	t.Fatalf("there is no migration %d", migration)
	return ""
}

// buildBefore builds the last version that did not know a migration yet, and knew those
// before it as they are now: while one was being written, versions had parts of it.
// Without the history, as in an archive of the source, the test is skipped.
func buildBefore(t *testing.T, migration int) string {
	t.Helper()
	dir := t.TempDir()
	sh := func(script string, args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "sh", append([]string{"-euc", script, "sh"}, args...)...)
		cmd.Dir = "../.."
		var stderr strings.Builder
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s: %v: %s", script, err, stderr.String())
		}
		return strings.TrimSpace(string(out))
	}
	if exec.Command("git", "-C", "../..", "rev-parse", "HEAD").Run() != nil {
		t.Skip("there is no git history here")
	}
	steps := func(tree string, below int) (blobs []string) {
		for line := range strings.Lines(sh(`git ls-tree "$1"`, tree)) {
			blob, name, _ := strings.Cut(strings.TrimSpace(line), "\t")
			number, err := strconv.Atoi(strings.SplitN(name, "_", 2)[0])
			if err == nil && number < below && strings.HasSuffix(name, ".up.sql") {
				blobs = append(blobs, blob)
			}
		}
		return blobs
	}
	want := steps("HEAD:migrations", migration)
	seen := map[string]bool{}
	commits := sh(`git rev-list --topo-order HEAD -- | while read -r c; do echo "$c $(git rev-parse --verify --quiet "$c:migrations" || true)"; done`)
	for line := range strings.Lines(commits) {
		commit, tree, _ := strings.Cut(strings.TrimSpace(line), " ")
		if tree == "" || seen[tree] {
			continue
		}
		seen[tree] = true
		if slices.Equal(steps(tree, math.MaxInt), want) {
			sh(`mkdir "$2/src" && git archive "$1" | tar -x -C "$2/src" && cd "$2/src" && go build -o "$2/tenantry" ./cmd/tenantry`, commit, dir)
			return filepath.Join(dir, "tenantry")
		}
	}
	t.Skipf("in the history that is here, no version stopped before migration %d", migration)
	return ""
}

func oldCommand(old string, vars map[string]string, args ...string) *exec.Cmd {
	cmd := exec.Command(old, args...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	for k, v := range vars {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	return cmd
}

func runOld(t *testing.T, old string, vars map[string]string, args ...string) string {
	t.Helper()
	out, err := oldCommand(old, vars, args...).Output()
	if err != nil {
		t.Fatalf("the old tenantry %v: %v", args, err)
	}
	return string(out)
}

func startOld(t *testing.T, old string, vars map[string]string, args []string) (end func()) {
	t.Helper()
	cmd := oldCommand(old, vars, args...)
	done, err := localpg.StartChild(cmd)
	if err != nil {
		t.Fatal(err)
	}
	end = func() { _ = cmd.Process.Kill(); <-done }
	t.Cleanup(end)
	return end
}

// oldestOf returns the lowest version of the code that a migration says can run on its schema; 0 if it
// says nothing.
func oldestOf(t *testing.T, sql []byte) int {
	t.Helper()
	m := oldestCode.FindSubmatch(sql)
	if m == nil {
		return 0
	}
	oldest, err := strconv.Atoi(string(m[1]))
	if err != nil {
		t.Fatal(err)
	}
	return oldest
}
