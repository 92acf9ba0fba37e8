// Package localpg runs a private Postgres cluster, for the sandbox and the tests.
//
// The server is a child of this process, listens on a free port of 127.0.0.1
// behind a random password, and dies with this process, also with kill -9. No
// other cluster of the machine is touched.
package localpg

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
)

// A Config says what cluster to run.
type Config struct {
	// Dir is where the cluster is kept, with its log; it is made if need be. If the
	// user that runs Postgres may not enter it, the data is kept elsewhere and Dir
	// holds a link to it.
	Dir string
	// Throwaway gives durability up for speed: for tests.
	Throwaway bool
	// Settings are further ones of the server, as name=value. They overrule ours.
	Settings []string
	// Say is told what takes long, such as an installation. It may be nil.
	Say func(string)
}

// A Cluster is a Postgres cluster. Its methods may be called at once, but for
// Start, Stop and Kill, which are one another's turn.
type Cluster struct {
	bin      Binaries
	data     string // PGDATA
	log      string // the server's output
	password string
	port     int
	account  *account // nil: as ourselves
	settings []string

	mu   sync.Mutex
	done <-chan struct{} // closed when the server has ended; nil before the first start
	proc *os.Process
}

// superuser is the name of the cluster's owner.
const superuser = "postgres"

// Open finds Postgres, makes the cluster in Dir if there is none, takes over from
// an earlier run that was killed, and starts the server.
func Open(ctx context.Context, cfg Config) (*Cluster, error) {
	if cfg.Say == nil {
		cfg.Say = func(string) {}
	}
	bin, err := FindOrFetch(ctx, cfg.Say)
	if err != nil {
		return nil, err
	}
	dir, err := filepath.Abs(cfg.Dir)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make the folder of the cluster: %w", err)
	}
	c := &Cluster{bin: bin, log: filepath.Join(dir, "postgres.log")}
	if c.account, err = unprivileged(); err != nil {
		return nil, err
	}
	if c.data, err = c.home(dir); err != nil {
		return nil, err
	}
	if err := c.ensure(ctx, filepath.Join(dir, "password")); err != nil {
		return nil, err
	}
	c.settings = []string{"listen_addresses=127.0.0.1", "unix_socket_directories=", "max_connections=100", "shared_buffers=64MB",
		"logging_collector=off", "log_destination=stderr", "timezone=UTC", "log_timezone=UTC"}
	if cfg.Throwaway {
		c.settings = append(c.settings, "fsync=off", "synchronous_commit=off", "full_page_writes=off", "max_connections=500")
	}
	c.settings = append(c.settings, cfg.Settings...)
	if err := c.takeOver(ctx); err != nil {
		return nil, err
	}
	return c, c.Start(ctx)
}

// home returns where the data is kept: below dir, or where the link in dir leads.
func (c *Cluster) home(dir string) (string, error) {
	data := filepath.Join(dir, "pgdata")
	if target, err := os.Readlink(data); err == nil {
		if _, err := os.Stat(target); err == nil {
			return target, nil
		}
		if err := os.Remove(data); err != nil { // the data is gone: begin anew
			return "", err
		}
	}
	if _, err := os.Lstat(data); err == nil || c.account == nil || c.account.mayEnter(dir) {
		return data, nil
	}
	// Postgres refuses root, and its account may not enter dir, as with /root or a
	// private temporary folder.
	for _, base := range []string{"/var/lib", "/var/tmp", "/tmp"} {
		if !c.account.mayEnter(base) {
			continue
		}
		parent := filepath.Join(base, "tenantry-sandbox")
		if os.MkdirAll(parent, 0o755) != nil || os.Chmod(parent, 0o755) != nil {
			continue
		}
		target := filepath.Join(parent, randomText(8))
		if err := os.Mkdir(target, 0o755); err != nil {
			continue
		}
		target = filepath.Join(target, "pgdata")
		return target, os.Symlink(target, data)
	}
	return "", fmt.Errorf("the user %s, who runs Postgres, may not enter %s, and neither /var/lib, /var/tmp nor /tmp can be used instead",
		c.account.name, dir)
}

// ensure makes the cluster if there is none. A cluster appears in one piece: a
// run that is cut off leaves none.
func (c *Cluster) ensure(ctx context.Context, passwordFile string) error {
	if raw, err := os.ReadFile(filepath.Join(c.data, "PG_VERSION")); err == nil {
		version := strings.TrimSpace(string(raw))
		if version != strconv.Itoa(c.bin.Major) {
			return fmt.Errorf("the cluster in %s is of Postgres %s, and the binaries found, in %s, are of %d: set PG_BINDIR, or remove the folder to begin anew",
				c.data, version, c.bin.Dir, c.bin.Major)
		}
		password, err := os.ReadFile(passwordFile)
		if err != nil {
			return fmt.Errorf("the password of the cluster in %s is gone: remove the folder to begin anew: %w", c.data, err)
		}
		c.password = strings.TrimSpace(string(password))
		return nil
	}
	if entries, err := os.ReadDir(c.data); err == nil && len(entries) > 0 {
		return fmt.Errorf("%s is no Postgres cluster (it has no PG_VERSION): remove the folder to begin anew", c.data)
	}
	c.password = randomText(16)
	if err := os.WriteFile(passwordFile, []byte(c.password+"\n"), 0o600); err != nil {
		return fmt.Errorf("write the password of the cluster: %w", err)
	}
	half := c.data + ".half"
	if err := os.RemoveAll(half); err != nil {
		return err
	}
	if err := os.Mkdir(half, 0o700); err != nil {
		return err
	}
	if err := c.account.give(half); err != nil {
		return err
	}
	forInitdb := c.data + ".password" // the account may not read passwordFile
	defer func() { _ = os.Remove(forInitdb) }()
	if err := os.WriteFile(forInitdb, []byte(c.password+"\n"), 0o600); err != nil {
		return err
	}
	if err := c.account.give(forInitdb); err != nil {
		return err
	}
	cmd := c.command(ctx, "initdb", "--pgdata", half, "--username", superuser, "--pwfile", forInitdb, "--auth", "scram-sha-256",
		"--encoding", "UTF8", "--locale", "C", "--no-sync", "--no-instructions")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("initdb fails: %w\n%s", err, tail(out))
	}
	_ = os.Remove(c.data) // an empty folder may be there
	if err := os.Rename(half, c.data); err != nil {
		return fmt.Errorf("put the new cluster in its place: %w", err)
	}
	return nil
}

func (c *Cluster) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(c.bin.Dir, name), args...)
	cmd.Dir = "/"
	// Nothing of our environment: PG* variables would lead the tools astray.
	cmd.Env = []string{"LC_ALL=C", "TZ=UTC", "PATH=" + os.Getenv("PATH")}
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	c.account.use(cmd.SysProcAttr)
	return cmd
}

// takeOver stops a server that an earlier run left on this very data.
func (c *Cluster) takeOver(ctx context.Context) error {
	raw, err := os.ReadFile(filepath.Join(c.data, "postmaster.pid"))
	if err != nil {
		return nil
	}
	first, _, _ := strings.Cut(string(raw), "\n")
	pid, err := strconv.Atoi(strings.TrimSpace(first))
	if err != nil || !isPostmasterOf(pid, c.data) {
		return nil // stale: the server clears it away
	}
	if err := syscall.Kill(pid, syscall.SIGQUIT); err != nil {
		return nil
	}
	ticker := time.NewTicker(20 * time.Millisecond)
	defer ticker.Stop()
	for syscall.Kill(pid, 0) == nil {
		select {
		case <-ctx.Done():
			return fmt.Errorf("the server of an earlier run, process %d, does not end: %w", pid, ctx.Err())
		case <-ticker.C:
		}
	}
	return nil
}

// Start starts the server and waits until it answers. After a Stop or a Kill it
// listens where it did before.
func (c *Cluster) Start(ctx context.Context) error {
	for try := 1; ; try++ {
		port := c.port
		if port == 0 {
			var err error
			if port, err = freePort(); err != nil {
				return err
			}
		}
		err := c.startOn(ctx, port)
		if err == nil {
			if c.port == 0 { // otherwise URL may be reading it
				c.port = port
			}
			return nil
		}
		switch {
		case c.port == 0 && try < 5 && strings.Contains(err.Error(), "already in use"):
			// Another process took the port before Postgres did.
		case strings.Contains(err.Error(), "block") && strings.Contains(err.Error(), "still in use"):
			// After kill -9, backends may hold the shared memory of the old server until they exit.
			select {
			case <-ctx.Done():
				return err
			case <-time.After(20 * time.Millisecond):
			}
		default:
			return err
		}
	}
}

func (c *Cluster) startOn(ctx context.Context, port int) error {
	log, err := os.OpenFile(c.log, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("open the log of Postgres: %w", err)
	}
	defer func() { _ = log.Close() }()
	args := []string{"-D", c.data, "-p", strconv.Itoa(port)}
	for _, s := range c.settings {
		args = append(args, "-c", s)
	}
	cmd := c.command(context.WithoutCancel(ctx), "postgres", args...)
	cmd.Stdout, cmd.Stderr = log, log
	done, err := StartChild(cmd)
	if err != nil {
		return fmt.Errorf("start Postgres: %w", err)
	}
	c.mu.Lock()
	c.proc, c.done = cmd.Process, done
	c.mu.Unlock()

	ticker := time.NewTicker(10 * time.Millisecond)
	defer ticker.Stop()
	for {
		conn, err := pgx.Connect(ctx, c.urlOn(port, "postgres"))
		if err == nil {
			return conn.Close(ctx)
		}
		select {
		case <-done:
			out, _ := os.ReadFile(c.log)
			return fmt.Errorf("the server does not start on %s; its log %s ends:\n%s", c.data, c.log, tail(out))
		case <-ctx.Done():
			_ = c.Kill()
			return fmt.Errorf("the server does not answer (%w); its log is %s", errors.Join(ctx.Err(), err), c.log)
		case <-ticker.C:
		}
	}
}

// Stop shuts the server down: connections are ended, transactions that are open
// roll back, what was committed is written. If ctx ends first the server is
// killed, and recovers at its next start.
func (c *Cluster) Stop(ctx context.Context) error { return c.end(ctx, syscall.SIGINT) }

// Kill ends the server at once, as a crash does.
func (c *Cluster) Kill() error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return c.end(ctx, syscall.SIGQUIT)
}

func (c *Cluster) end(ctx context.Context, how syscall.Signal) error {
	c.mu.Lock()
	proc, done := c.proc, c.done
	c.mu.Unlock()
	if proc == nil {
		return nil
	}
	_ = proc.Signal(how) // it may have ended by itself
	select {
	case <-done:
		return nil
	case <-ctx.Done():
	}
	_ = proc.Signal(syscall.SIGQUIT)
	select {
	case <-done:
	case <-time.After(5 * time.Second):
		_ = proc.Kill()
		<-done
	}
	return nil
}

// Done is closed when the server that runs now has ended, for whatever reason.
func (c *Cluster) Done() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.done
}

// PID is the process of the server that was started last.
func (c *Cluster) PID() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.proc.Pid
}

// Log is the file with the server's output.
func (c *Cluster) Log() string { return c.log }

// URL is the connection string of a database of the cluster, with the password.
func (c *Cluster) URL(database string) string { return c.urlOn(c.port, database) }

func (c *Cluster) urlOn(port int, database string) string {
	u := url.URL{Scheme: "postgres", User: url.UserPassword(superuser, c.password), Host: net.JoinHostPort("127.0.0.1", strconv.Itoa(port)),
		Path: "/" + database, RawQuery: "sslmode=disable"}
	return u.String()
}

// CreateDatabase makes a database, unless it is there.
func (c *Cluster) CreateDatabase(ctx context.Context, name string) error {
	conn, err := pgx.Connect(ctx, c.URL("postgres"))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(ctx) }()
	var there bool
	if err := conn.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)`, name).Scan(&there); err != nil || there {
		return err
	}
	_, err = conn.Exec(ctx, `CREATE DATABASE `+pgx.Identifier{name}.Sanitize())
	return err
}

// Dump returns the output of pg_dump, by default SQL that re-creates the database. It needs
// pg_dump, which a downloaded Postgres lacks.
func (c *Cluster) Dump(ctx context.Context, database string, options ...string) (string, error) {
	out, err := c.command(ctx, "pg_dump", append([]string{"--no-owner", "--dbname", c.URL(database)}, options...)...).Output()
	if err != nil {
		return "", fmt.Errorf("pg_dump: %w", err)
	}
	return string(out), nil
}

// ForTests runs a cluster in a temporary folder until stop is called, or this
// process ends. It reports ErrNoPostgres where there is none and none can be had.
func ForTests(ctx context.Context) (c *Cluster, stop func(), err error) {
	dir, err := os.MkdirTemp("", "tenantry-test-")
	if err != nil {
		return nil, nil, err
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return nil, nil, err
	}
	c, err = Open(ctx, Config{Dir: dir, Throwaway: true, Say: func(s string) { fmt.Fprintln(os.Stderr, s) },
		// The connections of a test live for seconds. Planning each statement several times took about a
		// fifth of the CPU time of the tests.
		Settings: []string{"plan_cache_mode=force_generic_plan"}})
	if err != nil {
		_ = os.RemoveAll(dir)
		return nil, nil, err
	}
	return c, func() {
		_ = c.Kill()
		_ = c.Remove()
		_ = os.RemoveAll(dir)
	}, nil
}

// Remove removes the data of a cluster that has ended.
func (c *Cluster) Remove() error {
	if parent := filepath.Dir(c.data); filepath.Base(filepath.Dir(parent)) == "tenantry-sandbox" {
		return os.RemoveAll(parent)
	}
	return os.RemoveAll(c.data)
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, fmt.Errorf("find a free port: %w", err)
	}
	defer func() { _ = l.Close() }()
	return l.Addr().(*net.TCPAddr).Port, nil
}

func randomText(bytes int) string {
	b := make([]byte, bytes)
	_, _ = rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// tail is the end of a program's output, for an error.
func tail(out []byte) string {
	lines := bytes.Split(bytes.TrimSpace(out), []byte("\n"))
	return string(bytes.Join(lines[max(0, len(lines)-10):], []byte("\n")))
}
