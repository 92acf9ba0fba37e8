package pgtest

import (
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/localpg"
	"github.com/tenantry/tenantry/internal/tenant"
)

// Bouncer starts a PgBouncer in transaction mode in front of a database, which keeps
// that many prepared statements for each of few connections, and returns the way
// through it.
func Bouncer(t testing.TB, db tenant.Secret, prepared int) tenant.Secret {
	t.Helper()
	program := os.Getenv("PGBOUNCER")
	if program == "" {
		var err error
		if program, err = exec.LookPath("pgbouncer"); err != nil {
			t.Skip("there is no PgBouncer here: install it, or set PGBOUNCER to a pgbouncer of version 1.21 or newer")
		}
	}
	version, err := exec.Command(program, "--version").Output()
	if err != nil {
		t.Fatal(err)
	}
	var major, minor int
	if _, err := fmt.Sscanf(string(version), "PgBouncer %d.%d", &major, &minor); err != nil {
		t.Fatalf("%q: %v", version, err)
	}
	setting := fmt.Sprintf("max_prepared_statements = %d", prepared)
	if major == 1 && minor < 21 {
		if prepared > 0 {
			t.Skipf("PgBouncer %d.%d keeps no prepared statements: set PGBOUNCER to one of version 1.21 or newer", major, minor)
		}
		setting = "" // it does not know of it
	}
	at, err := url.Parse(db.Reveal())
	if err != nil {
		t.Fatal(err)
	}
	password, _ := at.User.Password()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := l.Addr().(*net.TCPAddr).Port
	_ = l.Close()
	dir, err := os.MkdirTemp("", "tenantry-pgbouncer-") // another user must reach it
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "pgbouncer.ini")
	// Fewer connections than Tenantry has: each statement may go by another one.
	if err := os.WriteFile(file, fmt.Appendf(nil, `[databases]
* = host=127.0.0.1 port=%s user=%s password=%s
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = %d
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 3
%s
`, at.Port(), at.User.Username(), password, port, setting), 0o644); err != nil {
		t.Fatal(err)
	}
	args := []string{"-q", file}
	if os.Getuid() == 0 { // which it does not run as
		args = []string{"-q", "-u", "nobody", file}
	}
	var out strings.Builder
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	done, err := localpg.StartChild(cmd)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM) // at once
		<-done
		if t.Failed() {
			t.Log(out.String())
		}
	})
	at.Host = net.JoinHostPort("127.0.0.1", fmt.Sprint(port))
	for deadline := time.Now().Add(10 * time.Second); ; {
		conn, err := pgx.Connect(t.Context(), at.String())
		if err == nil {
			_ = conn.Close(t.Context())
			return tenant.NewSecret(at.String())
		}
		select {
		case <-done:
			t.Fatalf("PgBouncer has ended: %s", out.String())
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			t.Fatalf("PgBouncer does not answer: %v", err)
		}
	}
}
