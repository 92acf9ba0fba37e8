package clarifaisim_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tenantry/tenantry/internal/clarifaisim"
)

// keptIn returns a fixture whose state is kept in a file.
func keptIn(t *testing.T, path string) *fixture {
	t.Helper()
	return newFixture(t, func(cfg *clarifaisim.Config) { cfg.StateFile = path })
}

// afterKill returns a fixture on a copy of the file as it is now, without the
// first simulator being closed: what a kill would leave.
func afterKill(t *testing.T, path string, edit func([]byte) []byte) *fixture {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if edit != nil {
		data = edit(bytes.Clone(data))
	}
	copied := filepath.Join(t.TempDir(), "state")
	if err := os.WriteFile(copied, data, 0o644); err != nil {
		t.Fatal(err)
	}
	return keptIn(t, copied)
}

func TestStateOutlivesAKill(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "state")
	f := keptIn(t, path)
	f.want(10000, "POST", "/v2/users/acme/apps", `{"apps":[{"id":"app-a","metadata":{"tenantry":{"app":"x"}}}]}`)
	for _, id := range []string{"app-b", "app-c", "app-d"} {
		f.makeApp(id)
	}
	a, b, d := f.makeKey("app-a"), f.makeKey("app-b"), f.makeKey("app-d")
	gone := f.makeKey("app-a")
	f.wantAs(a, 10000, "POST", "/v2/inputs", `{"inputs":[{"id":"one","data":{"text":{"raw":"hello"}}}]}`)
	f.want(10000, "DELETE", "/v2/users/acme/keys/"+gone, "")
	f.want(10000, "DELETE", "/v2/users/acme/apps/app-b", "")
	f.want(10000, "PATCH", "/v2/users/acme/apps/app-c", `{"app":{"notes":"patched"},"action":"overwrite"}`)
	f.want(10000, "PATCH", "/v2/users/acme/apps/ids", `{"ids":[{"id":"app-d","new_id":"app-e"}],"action":"overwrite"}`)

	check := func(g *fixture) {
		t.Helper()
		if diff := cmp.Diff(f.Apps(), g.Apps()); diff != "" {
			t.Errorf("apps after a kill (-before +after):\n%s", diff)
		}
		if diff := cmp.Diff(f.Keys(), g.Keys()); diff != "" {
			t.Errorf("keys after a kill (-before +after):\n%s", diff)
		}
		before, after := f.want(10000, "GET", "/v2/users/acme/apps", ""), g.want(10000, "GET", "/v2/users/acme/apps", "")
		if diff := cmp.Diff(before.Apps, after.Apps); diff != "" {
			t.Errorf("ListApps after a kill (-before +after):\n%s", diff)
		}
		if r := g.wantAs(a, 10000, "GET", "/v2/inputs", ""); len(r.Inputs) != 1 || !strings.Contains(r.text, "hello") {
			t.Errorf("inputs after a kill: %s", r.text)
		}
		g.wantAs(gone, 11008, "GET", "/v2/app", "")
		g.wantAs(b, 11008, "GET", "/v2/app", "")
		if r := g.wantAs(d, 10000, "GET", "/v2/app", ""); r.App.ID != "app-e" {
			t.Errorf("the key of a renamed app opens %q", r.App.ID)
		}
		g.want(40010, "POST", "/v2/users/acme/apps", `{"apps":[{"id":"app-a"}]}`)
	}
	check(afterKill(t, path, nil))
	for _, torn := range []string{`[`, `[{"put_app":{"app":{"id":"torn","us`, `[{"drop_app":{"user_id":"acme","id":"app-a"}`, "\x00\x00\x00"} {
		check(afterKill(t, path, func(data []byte) []byte { return append(data, torn...) }))
	}

	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("state file: mode %v, error %v; want mode 0600", info.Mode(), err)
	}
	if err := f.Reset(); err != nil {
		t.Fatal(err)
	}
	if g := afterKill(t, path, nil); g.State().Apps != 0 {
		t.Errorf("after a reset and a kill: %d apps", g.State().Apps)
	}
}

// TestTornLastChange kills in the middle of a write: all of the change is gone, and
// nothing else.
func TestTornLastChange(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "state")
	f := keptIn(t, path)
	f.makeApp("app-a")
	f.want(10000, "POST", "/v2/users/acme/apps", `{"apps":[{"id":"app-b"},{"id":"app-c"}]}`)
	g := afterKill(t, path, func(data []byte) []byte { return data[:len(data)-4] })
	if got := g.Apps(); len(got) != 1 || got[0].ID != "app-a" {
		t.Errorf("apps: %+v, want app-a alone", got)
	}
	g.makeApp("app-b")
}

func TestDamagedStateIsRefusedAndKept(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ name, content, message string }{
		{"another file", "hello\n", "not the state of a simulator"},
		{"damage in the middle", "{\"clarifaisim\":1}\n[{\"put_app\nnull\n", "line 2 is damaged"},
	} {
		path := filepath.Join(t.TempDir(), "state")
		if err := os.WriteFile(path, []byte(tt.content), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := clarifaisim.New(clarifaisim.Config{StateFile: path})
		if err == nil || !strings.Contains(err.Error(), tt.message) {
			t.Errorf("%s: error %v, want one that says %q", tt.name, err, tt.message)
		}
		if data, _ := os.ReadFile(path); string(data) != tt.content {
			t.Errorf("%s: the file was changed to %q", tt.name, data)
		}
	}
	if _, err := clarifaisim.New(clarifaisim.Config{StateFile: filepath.Join(t.TempDir(), "no", "dir")}); err == nil {
		t.Error("a state file in no directory is no error")
	}
}

func TestOneSimulatorPerStateFile(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "state")
	f := keptIn(t, path)
	if _, err := clarifaisim.New(clarifaisim.Config{StateFile: path}); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("second simulator: error %v, want one that says in use", err)
	}
	f.makeApp("app-a")
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if got := keptIn(t, path).State().Apps; got != 1 {
		t.Errorf("apps after a restart: got %d, want 1", got)
	}
}

// TestCompaction writes far more changes than there are things.
func TestCompaction(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "state")
	f := keptIn(t, path)
	f.makeApp("app-a")
	key := f.makeKey("app-a")
	for range 12_000 {
		if err := f.Reset(); err != nil {
			t.Fatal(err)
		}
	}
	f.makeApp("app-b")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(data, []byte("\n")); n > 3000 {
		t.Errorf("state file: %d lines after 12,000 changes, want it compacted", n)
	}
	if bytes.Contains(data, []byte(key)) {
		t.Error("a key that is gone is still in the state file")
	}
	if got := afterKill(t, path, nil).Apps(); len(got) != 1 || got[0].ID != "app-b" {
		t.Errorf("apps after compaction and a kill: %+v, want app-b", got)
	}
}

// TestUnsavedIsUnmade takes the state file away from under a simulator.
func TestUnsavedIsUnmade(t *testing.T) {
	t.Parallel()
	f := keptIn(t, filepath.Join(t.TempDir(), "state"))
	f.makeApp("app-a")
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := f.Reset(); err == nil {
		t.Error("a change that cannot be saved is no error")
	}
	if n := f.State().Apps; n != 1 {
		t.Errorf("apps: got %d, want the 1 that was saved", n)
	}
}
