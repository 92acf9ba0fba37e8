package cluster

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/localpg"
)

// A Server is a Postgres server: a primary, a standby or a copy. Its address never
// changes. The SQL methods use Database.
type Server struct {
	Name string
	// Replication is the proxy between a standby and its primary, nil if the server
	// never was a standby.
	Replication *Proxy

	c      *Cluster
	pg     *localpg.Cluster
	data   string // PGDATA
	frozen bool
}

// settings make Postgres fast. fsync=off does not lose writes after kill -9: the kernel
// has them.
var settings = []string{"fsync=off", "shared_buffers=16MB", "wal_level=replica", "max_wal_senders=10", "wal_retrieve_retry_interval=100ms"}

// open starts a server on the files in the directory of that name, or on new files.
func (c *Cluster) open(name string) *Server {
	c.t.Helper()
	ctx, cancel := timeout()
	defer cancel()
	pg, err := localpg.Open(ctx, localpg.Config{Dir: filepath.Join(c.dir, name),
		Settings: append(slices.Clone(settings), c.options.PostgresSettings...), Say: func(s string) { c.t.Log(s) }})
	if errors.Is(err, localpg.ErrNoPostgres) && os.Getenv("CI") == "" {
		c.t.Skip(err)
	}
	c.must("start "+name, err)
	s := &Server{Name: name, c: c, pg: pg, data: filepath.Join(c.dir, name, "pgdata")}
	c.servers = append(c.servers, s)
	if info, err := os.Lstat(s.data); err != nil || !info.IsDir() {
		c.t.Fatalf("TMPDIR must be a directory that the user who runs Postgres may enter")
	}
	return s
}

// AddStandby starts an asynchronous standby of a running server.
func (c *Cluster) AddStandby(of *Server) *Server {
	c.t.Helper()
	c.standbys++
	name := fmt.Sprint("standby", c.standbys)
	replication := of.base(name, name)
	s := c.open(name)
	s.Replication = replication
	return s
}

// base copies the files of s to a directory, for a standby, and starts the replication
// proxy.
func (s *Server) base(dir, standby string) *Proxy {
	s.c.t.Helper()
	s.copyTo(dir)
	replication := s.c.NewProxy(s)
	data := filepath.Join(s.c.dir, dir, "pgdata")
	info, err := os.Stat(data)
	s.c.must("make a standby", err)
	owner := info.Sys().(*syscall.Stat_t)
	for name, text := range map[string]string{
		"standby.signal": "",
		// Without the primary's synchronous_standby_names, or a promoted standby waits.
		"postgresql.auto.conf": fmt.Sprintf("primary_conninfo = '%s&application_name=%s'\n", replication.URL(""), standby),
	} {
		path := filepath.Join(data, name)
		s.c.must("make a standby", os.WriteFile(path, []byte(text), 0o600))
		s.c.must("make a standby", os.Chown(path, int(owner.Uid), int(owner.Gid)))
	}
	return replication
}

// copyTo copies the files to a directory of the cluster. A running server is frozen
// during the copy.
func (s *Server) copyTo(dir string) {
	s.c.t.Helper()
	if s.running() && !s.frozen {
		s.Freeze()
		defer s.Thaw()
	}
	ctx, cancel := timeout()
	defer cancel()
	s.c.must("copy the files of "+s.Name, s.pg.Copy(ctx, filepath.Join(s.c.dir, dir)))
}

// Addr is the server's host and port.
func (s *Server) Addr() string {
	u, err := url.Parse(s.URL(""))
	if err != nil {
		panic(err) // localpg made it
	}
	return u.Host
}

// URL is the connection string of a database, past all proxies.
func (s *Server) URL(database string) string { return s.pg.URL(database) }

// Log returns the server's log since its last start.
func (s *Server) Log() string {
	raw, _ := os.ReadFile(s.pg.Log())
	return string(raw)
}

// Connect opens a connection to a database. It is closed at the end of the test.
func (s *Server) Connect(database string) *pgx.Conn {
	s.c.t.Helper()
	ctx, cancel := timeout()
	defer cancel()
	conn, err := pgx.Connect(ctx, s.URL(database))
	s.c.must("connect to "+s.Name, err)
	s.c.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second) // the server may be frozen
		defer cancel()
		_ = conn.Close(ctx)
	})
	return conn
}

// Exec runs SQL. Without arguments it may be more than one statement.
func (s *Server) Exec(sql string, args ...any) {
	s.c.t.Helper()
	s.exec(Database, sql, args...)
}

// Text returns the single value of a query as text, "" for NULL.
func (s *Server) Text(sql string, args ...any) string {
	s.c.t.Helper()
	text, err := s.TryText(sql, args...)
	s.c.must(fmt.Sprintf("%s: %s", s.Name, sql), err)
	return text
}

// TryText is Text with an error result: for a server that may be unreachable, and for
// other goroutines.
func (s *Server) TryText(sql string, args ...any) (string, error) {
	var text *string
	err := s.with(Database, func(ctx context.Context, conn *pgx.Conn) error {
		return conn.QueryRow(ctx, sql, append([]any{pgx.QueryExecModeSimpleProtocol}, args...)...).Scan(&text)
	})
	if err != nil || text == nil {
		return "", err
	}
	return *text, nil
}

func (s *Server) exec(database, sql string, args ...any) {
	s.c.t.Helper()
	s.c.must(fmt.Sprintf("%s: %s", s.Name, sql), s.with(database, func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, sql, args...)
		return err
	}))
}

func (s *Server) with(database string, do func(context.Context, *pgx.Conn) error) error {
	ctx, cancel := timeout()
	defer cancel()
	conn, err := pgx.Connect(ctx, s.URL(database))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(ctx) }()
	return do(ctx, conn)
}

// Stop shuts the server down in fast mode. A connected standby receives all WAL first.
func (s *Server) Stop() {
	s.c.t.Helper()
	s.Thaw()
	ctx, cancel := timeout()
	defer cancel()
	s.c.must("stop "+s.Name, s.pg.Stop(ctx))
}

// Kill kills all processes of the server with kill -9.
func (s *Server) Kill() {
	s.c.t.Helper()
	s.signal(syscall.SIGKILL)
	<-s.pg.Done()
	s.frozen = false
}

// Freeze stops all processes of the server with SIGSTOP. Connections stay open and get
// no response.
func (s *Server) Freeze() {
	s.c.t.Helper()
	s.signal(syscall.SIGSTOP)
	s.frozen = true
}

// Thaw ends Freeze. It is a no-op if the server is not frozen.
func (s *Server) Thaw() {
	s.c.t.Helper()
	if s.frozen {
		s.signal(syscall.SIGCONT)
		s.frozen = false
	}
}

func (s *Server) signal(sig syscall.Signal) {
	s.c.t.Helper()
	if !s.running() {
		s.c.t.Fatalf("%s is not running", s.Name)
	}
	ctx, cancel := timeout()
	defer cancel()
	s.c.must("signal "+s.Name, localpg.SignalTree(ctx, s.pg.PID(), sig))
}

func (s *Server) running() bool {
	select {
	case <-s.pg.Done():
		return false
	default:
		return true
	}
}

// Start starts a server after Stop or Kill, in the role that it had, and waits until it
// accepts connections.
func (s *Server) Start() {
	s.c.t.Helper()
	s.ended("Start")
	ctx, cancel := timeout()
	defer cancel()
	s.c.must("start "+s.Name, s.pg.Start(ctx))
}

func (s *Server) ended(method string) {
	s.c.t.Helper()
	if s.running() {
		s.c.t.Fatalf("%s of %s: stop or kill it first", method, s.Name)
	}
}

// StartAsStandbyOf starts a server after Stop or Kill as a standby of another server.
// A copy of the primary's files replaces its own.
func (s *Server) StartAsStandbyOf(primary *Server) {
	s.c.t.Helper()
	s.ended("StartAsStandbyOf")
	s.c.must("remove the files of "+s.Name, os.RemoveAll(s.data))
	s.c.copies++
	dir := fmt.Sprint("base", s.c.copies)
	s.Replication = primary.base(dir, s.Name)
	s.c.must("make "+s.Name+" a standby", os.Rename(filepath.Join(s.c.dir, dir, "pgdata"), s.data))
	s.Start()
}

// Promote makes a standby a primary. The standby first replays all WAL that it has
// received, even if replay is paused.
func (s *Server) Promote() {
	s.c.t.Helper()
	if s.Text(`SELECT pg_promote(true, 60)`) != "t" {
		s.c.t.Fatalf("promote %s: it is still in recovery", s.Name)
	}
}

// WaitCaughtUp waits until a standby has replayed all transactions that its primary
// has committed.
func (s *Server) WaitCaughtUp() {
	s.c.t.Helper()
	primary := s.Replication.Target()
	// A synchronous commit flushes the asynchronous ones before it.
	primary.Exec(`BEGIN; SET LOCAL synchronous_commit = local; SELECT pg_logical_emit_message(true, 'cluster', ''); COMMIT`)
	lsn := primary.Text(`SELECT pg_current_wal_flush_lsn()`)
	s.c.Eventually(s.Name+" has caught up", func() bool {
		done, err := s.TryText(`SELECT pg_last_wal_replay_lsn() >= $1::text::pg_lsn`, lsn)
		return err == nil && done == "t"
	})
}

// CutReplication stops a standby from receiving WAL until Replication.Forward. If the
// standby is promoted, later transactions of the primary are lost.
func (s *Server) CutReplication() {
	s.c.t.Helper()
	s.Replication.Refuse()
	s.c.Eventually(s.Name+" receives no WAL", func() bool { return s.Text(`SELECT count(*) FROM pg_stat_wal_receiver`) == "0" })
}

// PauseReplay stops a standby from replaying WAL: its queries return old data. It still
// receives WAL and loses nothing if it is promoted.
func (s *Server) PauseReplay() {
	s.c.t.Helper()
	s.Exec(`SELECT pg_wal_replay_pause()`)
	s.c.Eventually("replay is paused", func() bool { return s.Text(`SELECT pg_get_wal_replay_pause_state()`) == "paused" })
}

// ResumeReplay ends PauseReplay.
func (s *Server) ResumeReplay() {
	s.c.t.Helper()
	s.Exec(`SELECT pg_wal_replay_resume()`)
}

// SetSynchronous makes commits of a primary wait for all of these standbys. Without
// standbys, replication is asynchronous.
func (s *Server) SetSynchronous(standbys ...*Server) {
	s.c.t.Helper()
	names := ""
	if len(standbys) > 0 {
		var list []string
		for _, standby := range standbys {
			list = append(list, standby.Name)
		}
		names = fmt.Sprintf("FIRST %d (%s)", len(list), strings.Join(list, ", "))
	}
	s.Exec(fmt.Sprintf(`ALTER SYSTEM SET synchronous_standby_names = '%s'`, names))
	s.Exec(`SELECT pg_reload_conf()`)
	want := fmt.Sprint(len(standbys))
	s.c.Eventually("synchronous replication is as set", func() bool {
		return s.Text(`SELECT current_setting('synchronous_standby_names')`) == names &&
			s.Text(`SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'`) == want
	})
}

// CrashRestart kills one backend with kill -9. Postgres then ends all other backends and
// recovers. The postmaster process stays, and with it pg_postmaster_start_time.
func (s *Server) CrashRestart() {
	s.c.t.Helper()
	victim, witness := s.Connect(Database), s.Connect(Database)
	s.c.must("kill a backend", syscall.Kill(int(victim.PgConn().PID()), syscall.SIGKILL))
	s.c.Eventually("the other backends end", func() bool {
		ctx, cancel := timeout()
		defer cancel()
		return witness.Ping(ctx) != nil
	})
	s.c.Eventually(s.Name+" is back", func() bool { _, err := s.TryText(`SELECT 1`); return err == nil })
}

// A Snapshot is a copy of a server's files.
type Snapshot struct{ dir string }

// Snapshot copies the server's files. A running server is frozen during the copy, so
// that the snapshot is what a crash would leave.
func (s *Server) Snapshot() *Snapshot {
	s.c.t.Helper()
	s.c.copies++
	dir := fmt.Sprint("snapshot", s.c.copies)
	s.copyTo(dir)
	return &Snapshot{filepath.Join(s.c.dir, dir)}
}

// Restore replaces the files of a server after Stop or Kill with those of a snapshot.
// Start starts it.
func (s *Server) Restore(from *Snapshot) {
	s.c.t.Helper()
	s.ended("Restore")
	s.c.must("remove the files of "+s.Name, os.RemoveAll(s.data))
	s.c.copyFiles(filepath.Join(from.dir, "pgdata"), s.data)
}

// StartCopy starts a copy of a snapshot as a separate server: a cold copy.
func (c *Cluster) StartCopy(of *Snapshot) *Server {
	c.t.Helper()
	c.copies++
	name := fmt.Sprint("copy", c.copies)
	c.copyFiles(of.dir, filepath.Join(c.dir, name))
	return c.open(name)
}

func (c *Cluster) copyFiles(from, to string) {
	c.t.Helper()
	out, err := exec.Command("cp", "-pPR", from, to).CombinedOutput()
	c.must("copy files: "+string(out), err)
}

// CreateDatabase creates an empty database.
func (s *Server) CreateDatabase(name string) {
	s.c.t.Helper()
	s.exec("postgres", `CREATE DATABASE `+pgx.Identifier{name}.Sanitize())
}

// DropDatabase drops a database and ends the connections to it.
func (s *Server) DropDatabase(name string) {
	s.c.t.Helper()
	s.exec("postgres", `DROP DATABASE `+pgx.Identifier{name}.Sanitize()+` WITH (FORCE)`)
}

// RenameDatabase renames a database and ends the connections to it.
func (s *Server) RenameDatabase(from, to string) {
	s.c.t.Helper()
	old, renamed := pgx.Identifier{from}.Sanitize(), pgx.Identifier{to}.Sanitize()
	s.exec("postgres", `ALTER DATABASE `+old+` ALLOW_CONNECTIONS false`) // or replicas reconnect at once
	s.exec("postgres", `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1`, from)
	s.exec("postgres", `ALTER DATABASE `+old+` RENAME TO `+renamed)
	s.exec("postgres", `ALTER DATABASE `+renamed+` ALLOW_CONNECTIONS true`)
}

// Dump returns the output of pg_dump in its plain format, with options such as
// "--data-only". If pg_dump is missing the test is skipped, or fails if CI is set.
func (s *Server) Dump(database string, options ...string) string {
	s.c.t.Helper()
	ctx, cancel := timeout()
	defer cancel()
	sql, err := s.pg.Dump(ctx, database, options...)
	s.c.mustTool("dump "+database, err)
	return sql
}

// Load restores a dump into an empty database with psql, in one transaction.
func (s *Server) Load(database, dump string) {
	s.c.t.Helper()
	ctx, cancel := timeout()
	defer cancel()
	s.c.mustTool("restore "+database, s.pg.Load(ctx, database, dump))
}

// LoadData restores a data-only dump into a database that has the schema, in one
// transaction and without triggers. It deletes the existing rows with DELETE: unlike
// TRUNCATE, that keeps relfilenode.
func (s *Server) LoadData(database, dump string) {
	s.c.t.Helper()
	s.Load(database, `
		SET session_replication_role = replica;
		DO $$
		DECLARE
			t regclass;
		BEGIN
			FOR t IN SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
				WHERE n.nspname = 'public' AND c.relkind IN ('r', 'p') AND NOT c.relispartition LOOP
				EXECUTE format('DELETE FROM %s', t);
			END LOOP;
		END $$;
		`+dump)
}
