package cluster_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/tenantry/tenantry/internal/clarifaisim"
	"github.com/tenantry/tenantry/internal/tenant"
	"github.com/tenantry/tenantry/test/cluster"
)

func TestMain(m *testing.M) { cluster.Main(m) }

func wantTenants(t *testing.T, s *cluster.Server, want string) {
	t.Helper()
	if got := s.Text(`SELECT string_agg(id, ' ' ORDER BY id) FROM tenants`); got != want {
		t.Errorf("%s has the tenants %q, want %q", s.Name, got, want)
	}
}

// A failover to a standby that was cut off loses a tenant.
func TestFailover(t *testing.T) {
	t.Parallel()
	c := cluster.New(t, cluster.Options{Standbys: 1, Replicas: 2})
	primary, standby := c.Primary, c.Standbys[0]
	first, second := c.Replicas[0], c.Replicas[1]
	app, key := first.SignUp("kept")
	if app == "" || key == "" {
		t.Fatalf("the tenant has the app %q and the key %q", app, key)
	}
	standby.WaitCaughtUp()
	wantTenants(t, standby, "kept")

	// Paused, a standby receives WAL and does not show it.
	standby.PauseReplay()
	second.SignUp("late")
	wantTenants(t, standby, "kept")
	standby.ResumeReplay()
	standby.WaitCaughtUp()
	wantTenants(t, standby, "kept late")

	standby.CutReplication()
	second.SignUp("lost")
	primary.Kill()
	standby.Promote()
	c.Proxy.Switch(standby)
	wantTenants(t, standby, "kept late")
	if again, _ := second.SignUp("kept"); again != app {
		t.Errorf("after the failover the tenant has the app %s, had %s", again, app)
	}
	c.Eventually("the lost tenant is unknown", func() bool {
		return first.Call(http.MethodGet, "/v1/tenants/lost", nil, tenant.Viewer).Text("app", "id") == ""
	})

	// The old primary comes back as it was, and then as a standby.
	primary.Start()
	wantTenants(t, primary, "kept late lost")
	own := c.NewProxy(primary)
	split := c.StartReplica(cluster.ReplicaOptions{Proxy: own})
	if got := split.Call(http.MethodGet, "/v1/tenants/lost", nil, tenant.Viewer).Text("id"); got != "lost" {
		t.Errorf("a replica of the old primary shows the tenant %q", got)
	}
	split.Stop()
	primary.Stop()
	primary.StartAsStandbyOf(standby)
	primary.WaitCaughtUp()
	wantTenants(t, primary, "kept late")

	// Commits wait for a synchronous standby.
	standby.SetSynchronous(primary)
	primary.Freeze()
	committed := make(chan error, 1)
	go func() {
		_, err := standby.TryText(`SELECT pg_logical_emit_message(true, 'test', '')`)
		committed <- err
	}()
	select {
	case err := <-committed:
		t.Errorf("a commit does not wait for the standby, %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	primary.Thaw()
	if err := <-committed; err != nil {
		t.Error(err)
	}
	standby.SetSynchronous()
}

// Files are copied, put back and started as a second server.
func TestSnapshots(t *testing.T) {
	t.Parallel()
	c := cluster.New(t, cluster.Options{Replicas: 1})
	r := c.Replicas[0]
	r.SignUp("one")
	running := c.Primary.Snapshot()
	r.SignUp("two")
	c.Primary.Kill()
	killed := c.Primary.Snapshot()
	c.Primary.Restore(running)
	c.Primary.Start()
	wantTenants(t, c.Primary, "one")
	other := c.StartCopy(killed)
	wantTenants(t, other, "one two")
	if other.Addr() == c.Primary.Addr() {
		t.Error("the copy has the address of the original")
	}
	c.Primary.Exec(`CREATE TABLE here ()`)
	if got := other.Text(`SELECT to_regclass('here')`); got != "" {
		t.Error("the copy gets the changes of the original")
	}
	c.Primary.Stop()
	c.Primary.Restore(killed)
	c.Primary.Start()
	wantTenants(t, c.Primary, "one two")
}

// Databases are dumped, restored, renamed and dropped while a replica runs. Then a
// backend crashes.
func TestDatabases(t *testing.T) {
	t.Parallel()
	c := cluster.New(t, cluster.Options{Replicas: 1})
	r := c.Replicas[0]
	r.SignUp("one")
	dump := c.Primary.Dump(cluster.Database)
	data := c.Primary.Dump(cluster.Database, "--data-only")
	r.SignUp("two")
	c.Primary.CreateDatabase("restored")
	c.Primary.Load("restored", dump)
	c.Primary.RenameDatabase(cluster.Database, "old")
	c.Primary.RenameDatabase("restored", cluster.Database)
	wantTenants(t, c.Primary, "one")
	c.Primary.DropDatabase("old")
	c.Primary.Exec(`UPDATE tenants SET display_name = 'new'`)

	file := c.Primary.Text(`SELECT pg_relation_filenode('apps')`)
	c.Primary.LoadData(cluster.Database, data)
	if got := c.Primary.Text(`SELECT display_name FROM tenants WHERE id = 'one'`); got != "" {
		t.Errorf("after restoring data the tenant has the display name %q", got)
	}
	if got := c.Primary.Text(`SELECT pg_relation_filenode('apps')`); got != file {
		t.Error("restoring data changes the file of a table")
	}

	since := c.Primary.Text(`SELECT pg_postmaster_start_time()`)
	c.Primary.CrashRestart()
	if got := c.Primary.Text(`SELECT pg_postmaster_start_time()`); got != since {
		t.Errorf("the crash restart changes the start time of the postmaster from %s to %s", since, got)
	}
	if !strings.Contains(c.Primary.Log(), "was terminated by signal 9") {
		t.Error("the log has no killed backend")
	}
	wantTenants(t, c.Primary, "one")
}

// Replicas are stopped, killed, frozen and started again; commands and faults work.
func TestReplicas(t *testing.T) {
	t.Parallel()
	c := cluster.New(t, cluster.Options{Replicas: 1, Env: map[string]string{"TENANTRY_POOL_MAX": "0"}})
	r := c.Replicas[0]
	c.Faults(clarifaisim.Fault{Call: "PostKeys", Count: 1, DelayMS: 1})
	c.Settings(func(s *clarifaisim.Settings) { s.LatencyMS = 1 })
	app, key := r.SignUp("one")
	if apps, keys := c.Sim.Apps(), c.Sim.Keys(); len(apps) == 0 || len(keys) == 0 || len(c.Sim.Faults()) > 0 {
		t.Errorf("Clarifai has the apps %v, %d keys and the faults %v", apps, len(keys), c.Sim.Faults())
	}

	shown := r.RunCLI("", "tenant", "show", "one", "--output", "json")
	var got struct{ App struct{ ID string } }
	if err := json.Unmarshal([]byte(shown.Stdout), &got); err != nil || shown.Code != 0 || got.App.ID != app {
		t.Errorf("tenant show exits with %d and prints %s %s", shown.Code, shown.Stdout, shown.Stderr)
	}
	if res := r.RunCLI(key, "key", "identify"); res.Code != 0 || !strings.Contains(res.Stdout, "one") {
		t.Errorf("key identify exits with %d and prints %s %s", res.Code, res.Stdout, res.Stderr)
	}
	if res := r.RunCLI("", "tenant", "show", "nobody"); res.Code != 4 || res.Stderr == "" {
		t.Errorf("tenant show of an unknown tenant exits with %d: %s", res.Code, res.Stderr)
	}

	r.Freeze()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if resp, err := r.TryCall(ctx, http.MethodGet, "/v1/tenants/one", nil, tenant.Viewer); err == nil {
		t.Errorf("a frozen replica responds with %d", resp.Status)
	}
	r.Thaw()
	if resp := r.Call(http.MethodGet, "/v1/tenants/one", nil, tenant.Viewer); resp.Status != http.StatusOK {
		t.Errorf("after Thaw the replica responds with %d", resp.Status)
	}

	r.Stop()
	r.WaitLog(`"stopped"`, 1)
	if code := r.ExitCode(); code != 0 {
		t.Errorf("after SIGTERM the replica exits with %d", code)
	}
	c.Proxy.Refuse()
	r.Launch()
	if r.Ready() {
		t.Error("a replica is ready without its database")
	}
	c.Proxy.Forward()
	r.WaitReady()
	r.WaitLog(`"ready"`, 2)
	r.Kill()
	if r.Running() || r.ExitCode() != -1 {
		t.Errorf("after kill -9 the replica runs: %v, exit code %d", r.Running(), r.ExitCode())
	}

	testProxy(t, c.NewProxy(c.Primary))

	broken := c.NewReplica(cluster.ReplicaOptions{Env: map[string]string{"DATABASE_URL": ""}})
	broken.Launch()
	if broken.Running() || broken.ExitCode() == 0 || len(broken.LogLines("DATABASE_URL")) == 0 {
		t.Errorf("a replica without DATABASE_URL runs: %v", broken.Running())
	}
}

// testProxy cuts and refuses connections and holds back data.
func testProxy(t *testing.T, p *cluster.Proxy) {
	t.Helper()
	_, rest, _ := strings.Cut(p.URL(""), "@")
	addr, _, _ := strings.Cut(rest, "/")
	dial := func() (net.Conn, error) {
		conn, err := net.Dial("tcp", addr)
		if err == nil {
			t.Cleanup(func() { _ = conn.Close() })
			// An SSLRequest; this server responds with N.
			_, err = conn.Write([]byte{0, 0, 0, 8, 4, 210, 22, 47})
		}
		return conn, err
	}
	receive := func(conn net.Conn, within time.Duration) (string, error) {
		_ = conn.SetReadDeadline(time.Now().Add(within))
		b := make([]byte, 1)
		n, err := io.ReadFull(conn, b)
		return string(b[:n]), err
	}
	conn, err := dial()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := receive(conn, time.Minute); got != "N" {
		t.Fatalf("Postgres responds %q, %v", got, err)
	}
	p.Cut()
	if _, err := receive(conn, time.Minute); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a cut connection ends with %v", err)
	}

	p.Refuse()
	conn, err = dial() // the reset may come this early
	if err == nil {
		_, err = receive(conn, time.Minute)
	}
	if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a refused connection ends with %v", err)
	}
	p.Forward()

	p.BlackHole()
	if conn, err = dial(); err != nil {
		t.Fatal(err)
	}
	if got, err := receive(conn, 100*time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a black hole responds %q, %v", got, err)
	}
	p.Forward()
	if got, err := receive(conn, time.Minute); got != "N" {
		t.Errorf("after a black hole Postgres responds %q, %v", got, err)
	}
}
