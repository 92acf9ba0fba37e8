package localpg_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/localpg"
)

// TestMain runs a cluster and waits to be killed, where a test asks for that.
func TestMain(m *testing.M) {
	if dir := os.Getenv("LOCALPG_TEST_RUN"); dir != "" {
		c, err := localpg.Open(context.Background(), localpg.Config{Dir: dir})
		if err != nil {
			fmt.Println("FAILED", err)
			os.Exit(1)
		}
		fmt.Println(c.URL("postgres"))
		select {}
	}
	os.Exit(m.Run())
}

func open(t *testing.T, dir string) *localpg.Cluster {
	t.Helper()
	c, err := localpg.Open(t.Context(), localpg.Config{Dir: dir})
	if errors.Is(err, localpg.ErrNoPostgres) && os.Getenv("CI") == "" {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Kill(); _ = c.Remove() })
	return c
}

// folder returns a folder that every user may enter, as t.TempDir does not.
func folder(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "localpg-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func query(t *testing.T, url, sql string) string {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.Background()) }()
	var text string
	if err := conn.QueryRow(t.Context(), sql).Scan(&text); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return text
}

func TestDataSurvives(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	c := open(t, dir)
	for range 2 { // the second time it is there
		if err := c.CreateDatabase(t.Context(), "a-b"); err != nil {
			t.Fatal(err)
		}
	}
	url := c.URL("a-b")
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec(t.Context(), `CREATE TABLE kept AS SELECT 'still here'::text AS word`); err != nil {
		t.Fatal(err)
	}
	_ = conn.Close(t.Context())
	for name, end := range map[string]func() error{"stop": func() error { return c.Stop(t.Context()) }, "kill": c.Kill} {
		if err := end(); err != nil {
			t.Fatal(err)
		}
		select {
		case <-c.Done():
		default:
			t.Errorf("%s returns before the server has ended", name)
		}
		if err := c.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := query(t, url, `SELECT word FROM kept`); got != "still here" || c.URL("a-b") != url {
			t.Errorf("after a %s the table holds %q, at %s", name, got, c.URL("a-b"))
		}
	}
	if err := c.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	again := open(t, dir)
	if got := query(t, again.URL("a-b"), `SELECT word FROM kept`); got != "still here" {
		t.Errorf("the next run finds %q", got)
	}
}

// Another user of the machine must not get in.
func TestPasswordIsNeeded(t *testing.T) {
	t.Parallel()
	c := open(t, folder(t))
	url := c.URL("postgres")
	_, after, _ := strings.Cut(url, "@")
	if conn, err := pgx.Connect(t.Context(), "postgres://postgres:wrong@"+after); err == nil {
		_ = conn.Close(t.Context())
		t.Error("a wrong password opens the cluster")
	}
	if got := query(t, url, `SELECT current_setting('listen_addresses') || current_setting('unix_socket_directories')`); got != "127.0.0.1" {
		t.Errorf("the server listens on %q", got)
	}
}

// A server whose process was killed with -9 dies with it, and the next run goes on
// with its data.
func TestDiesWithItsParent(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "LOCALPG_TEST_RUN="+dir)
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 1000)
	n, _ := stdout.Read(line)
	url := strings.TrimSpace(string(line[:n]))
	if !strings.HasPrefix(url, "postgres://") {
		t.Fatalf("the run says %s", url)
	}
	query(t, url, `SELECT 'it runs'`)
	if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	deadline := time.Now().Add(20 * time.Second)
	for {
		conn, err := pgx.Connect(t.Context(), url)
		if err != nil {
			break
		}
		_ = conn.Close(t.Context())
		if time.Now().After(deadline) {
			t.Fatal("the server outlives its parent")
		}
	}
	open(t, dir)
}

// A server that an earlier run left on the same data is taken over from; any other
// is left alone.
func TestTakesOver(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	first, other := open(t, dir), open(t, folder(t))
	second := open(t, dir)
	select {
	case <-first.Done():
	default:
		t.Error("two servers run on one folder")
	}
	query(t, second.URL("postgres"), `SELECT 'it runs'`)
	query(t, other.URL("postgres"), `SELECT 'it runs'`)
}

// Postgres runs as another user than root, also below a folder that only root may
// enter; and a folder that was removed begins anew.
func TestBelowAPrivateFolder(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("only root has another user run Postgres")
	}
	private := t.TempDir()
	if err := os.Chmod(private, 0o700); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(private, "sandbox")
	c := open(t, dir)
	query(t, c.URL("postgres"), `SELECT 'it runs'`)
	if err := c.CreateDatabase(t.Context(), "mark"); err != nil {
		t.Fatal(err)
	}
	if err := c.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	again := open(t, dir)
	if got := query(t, again.URL("postgres"), `SELECT count(*)::text FROM pg_database WHERE datname = 'mark'`); got != "1" {
		t.Error("the next run does not find the data")
	}
	if err := again.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	fresh := open(t, dir)
	if got := query(t, fresh.URL("postgres"), `SELECT count(*)::text FROM pg_database WHERE datname = 'mark'`); got != "0" {
		t.Error("a folder that was removed does not begin anew")
	}
}

// What cannot be used is said, with what to do.
func TestBrokenFolders(t *testing.T) {
	t.Parallel()
	fails := func(what, dir, says string) {
		t.Helper()
		c, err := localpg.Open(t.Context(), localpg.Config{Dir: dir})
		if err == nil {
			_ = c.Kill()
		}
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: Open fails with %v; want an error that says %q", what, err, says)
		}
	}
	dir := folder(t)
	c := open(t, dir)
	if err := c.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	data := filepath.Join(dir, "pgdata")
	put := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(data, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	version, err := os.ReadFile(filepath.Join(data, "PG_VERSION"))
	if err != nil {
		t.Fatal(err)
	}
	put("PG_VERSION", "9\n")
	fails("another version", dir, "is of Postgres 9")
	put("PG_VERSION", string(version))
	put("postgresql.conf", "nonsense = 1\n")
	fails("a broken configuration", dir, "nonsense")
	if err := os.Remove(filepath.Join(dir, "password")); err != nil {
		t.Fatal(err)
	}
	fails("no password", dir, "password of the cluster")
	if err := os.Remove(filepath.Join(data, "PG_VERSION")); err != nil {
		t.Fatal(err)
	}
	fails("no cluster", dir, "remove the folder to begin anew")

	// A run that was cut off in initdb leaves nothing that is in the way.
	half := folder(t)
	if err := os.MkdirAll(filepath.Join(half, "pgdata.half", "base"), 0o700); err != nil {
		t.Fatal(err)
	}
	open(t, half)
}

func TestPGBINDIR(t *testing.T) {
	t.Setenv("PG_BINDIR", t.TempDir())
	if _, err := localpg.Find(t.Context()); err == nil || !strings.Contains(err.Error(), "PG_BINDIR") {
		t.Errorf("Find with an empty PG_BINDIR fails with %v", err)
	}
}
