package postgres

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/golang-migrate/migrate/v4"
	migratepgx "github.com/golang-migrate/migrate/v4/database/pgx/v5"
	"github.com/golang-migrate/migrate/v4/source/iofs"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"

	"github.com/tenantry/tenantry/internal/tenant"
	"github.com/tenantry/tenantry/migrations"
)

// migrationLock keeps several replicas that migrate at once apart.
const migrationLock = 0x74656e616e747279 // "tenantry"

const migrationLockPoll = 100 * time.Millisecond

// A SchemaStatus says how the database's schema stands to this binary.
type SchemaStatus struct {
	Version    int  // the schema's version; 0 means none
	Known      int  // the version this binary was built for
	Dirty      bool // a migration was cut off
	OldestCode int  // the lowest Known that still runs on the schema
}

// Err returns nil if this binary can serve on the schema, or else an error that
// says what to do.
func (s SchemaStatus) Err() error {
	switch {
	case s.Dirty:
		return fmt.Errorf("migration %d was cut off: look whether its statements took effect (each file is one transaction), "+
			"then set schema_migrations to version %d, or to %d if they did not, with dirty = false", s.Version, s.Version, s.Version-1)
	case s.Version == 0:
		return errors.New("the database has no schema: run `tenantry migrate up`")
	case s.Version < s.Known:
		return fmt.Errorf("the schema is at version %d and this binary needs %d: run `tenantry migrate up`", s.Version, s.Known)
	case s.OldestCode > s.Known:
		return fmt.Errorf("the schema is at version %d, which needs a binary built for version %d or newer, and this one knows %d: "+
			"run a newer tenantry, or `tenantry migrate down` with the newer one", s.Version, s.OldestCode, s.Known)
	}
	return nil
}

// KnownSchema returns the schema version this binary was built for.
func KnownSchema() int {
	newest := 0
	for _, m := range PendingMigrations(0) {
		newest = max(newest, m.Version)
	}
	return newest
}

// A Migration is one step of the schema.
type Migration struct {
	Version int
	Name    string
	File    string
	Locks   []TableLock // of tables that may be in use, by name
}

// A TableLock is a lock that a migration holds until it ends. It blocks writes.
type TableLock struct {
	Table string
	Reads bool // it blocks reads, too
}

// lockStatement matches the statements with which a migration takes its locks before the first change.
var lockStatement = regexp.MustCompile(`LOCK TABLE ([a-z_, ]+) IN ([A-Z ]+) MODE`)

// PendingMigrations returns the migrations after a version, in their order.
func PendingMigrations(version int) []Migration {
	entries, err := migrations.FS.ReadDir(".") // by name
	if err != nil {
		panic(err) // embedded: cannot fail
	}
	var pending []Migration
	for _, e := range entries {
		base, up := strings.CutSuffix(e.Name(), ".up.sql")
		number, name, _ := strings.Cut(base, "_")
		m := Migration{Name: name, File: e.Name()}
		if m.Version, err = strconv.Atoi(number); err != nil || !up || m.Version <= version {
			continue
		}
		sql, err := migrations.FS.ReadFile(m.File)
		if err != nil {
			panic(err)
		}
		for _, lock := range lockStatement.FindAllSubmatch(sql, -1) {
			for table := range strings.SplitSeq(string(lock[1]), ",") {
				m.Locks = append(m.Locks, TableLock{strings.TrimSpace(table), string(lock[2]) == "ACCESS EXCLUSIVE"})
			}
		}
		slices.SortFunc(m.Locks, func(a, b TableLock) int { return strings.Compare(a.Table, b.Table) })
		pending = append(pending, m)
	}
	return pending
}

// firstWithLocks is the first migration whose LOCK TABLE statements name all that it locks. Older ones
// are run only while no replica serves: see migration 9.
const firstWithLocks = 10

// Announce says what pending migrations block, a line for each.
func Announce(version int, pending []Migration) []string {
	if version == 0 {
		return []string{"migrate up creates the schema; it blocks nothing that is in use"}
	}
	var lines []string
	for _, m := range pending {
		line := fmt.Sprintf("migration %d (%s) blocks ", m.Version, m.Name)
		var all, writes []string
		for _, l := range m.Locks {
			if l.Reads {
				all = append(all, l.Table)
			} else {
				writes = append(writes, l.Table)
			}
		}
		switch {
		case m.Version < firstWithLocks:
			line += "reads and writes of the tables that it changes, until it ends"
		case len(m.Locks) == 0:
			line += "nothing"
		case len(all) == 0:
			line += "writes of " + strings.Join(writes, ", ") + ", until it ends"
		default:
			line += "reads and writes of " + strings.Join(all, ", ")
			if len(writes) > 0 {
				line += "; and writes of " + strings.Join(writes, ", ")
			}
			line += ", until it ends"
		}
		lines = append(lines, line)
	}
	return lines
}

// Schema reads how the schema stands. It works on an empty database.
func (db *DB) Schema(ctx context.Context) (SchemaStatus, error) {
	s := SchemaStatus{Known: KnownSchema()}
	err := db.pool.QueryRow(ctx, `SELECT version, dirty FROM schema_migrations`).Scan(&s.Version, &s.Dirty)
	if isUndefined(err) || errors.Is(err, pgx.ErrNoRows) {
		return s, nil
	}
	if err != nil {
		return s, translate("read schema version", err)
	}
	if s.Dirty {
		return s, nil
	}
	if err := db.pool.QueryRow(ctx, `SELECT tenantry_oldest_code()`).Scan(&s.OldestCode); err != nil {
		return s, translate("read oldest code of the schema", err)
	}
	return s, nil
}

// isUndefined reports whether err says that a table or function does not exist.
func isUndefined(err error) bool {
	pg, ok := errors.AsType[*pgconn.PgError](err)
	return ok && (pg.Code == "42P01" || pg.Code == "42883")
}

// MigrateUp is MigrateUpAndReport without reports.
func MigrateUp(ctx context.Context, direct tenant.Secret) error {
	return MigrateUpAndReport(ctx, direct, func(string) {})
}

// MigrateUpAndReport brings the schema to the version this binary was built for, and reports before each
// step what it blocks. Several processes may call it at once: one works, the others wait and find it done. It
// leaves a newer schema as it is, and returns an error if this binary cannot serve on it.
func MigrateUpAndReport(ctx context.Context, direct tenant.Secret, report func(line string)) error {
	return underMigrationLock(ctx, direct, func(db *DB, m *migrate.Migrate) error {
		s, err := db.Schema(ctx)
		if err != nil {
			return err
		}
		if s.Dirty || s.Version > s.Known {
			if err := s.Err(); err != nil {
				return err
			}
			report(fmt.Sprintf("the schema is at version %d, which is newer than this binary's %d; this binary can serve on it, so nothing is changed", s.Version, s.Known))
			return nil
		}
		for _, line := range Announce(s.Version, PendingMigrations(s.Version)) {
			report(line)
		}
		if err := m.Up(); err != nil && !errors.Is(err, migrate.ErrNoChange) {
			return explainDirty(err)
		}
		if err := db.finishMigrations(ctx, report); err != nil {
			return err
		}
		report(fmt.Sprintf("the schema is at version %d", s.Known))
		return nil
	})
}

// MigrateDown takes back the newest steps migrations. It loses what their tables hold.
func MigrateDown(ctx context.Context, direct tenant.Secret, steps int) error {
	return underMigrationLock(ctx, direct, func(db *DB, m *migrate.Migrate) error {
		version, dirty, err := m.Version()
		if errors.Is(err, migrate.ErrNilVersion) {
			return errors.New("the database has no schema: there is nothing to take back")
		}
		if err != nil {
			return fmt.Errorf("read schema version: %w", err)
		}
		if dirty {
			return explainDirty(migrate.ErrDirty{Version: int(version)})
		}
		if known := KnownSchema(); int(version) > known {
			return fmt.Errorf("the schema is at version %d, and this binary knows %d: run `tenantry migrate down` with the newer one", version, known)
		}
		if steps >= int(version) {
			return m.Down()
		}
		return m.Steps(-steps)
	})
}

func explainDirty(err error) error {
	if dirty, ok := errors.AsType[migrate.ErrDirty](err); ok {
		return SchemaStatus{Version: dirty.Version, Dirty: true}.Err()
	}
	return fmt.Errorf("migrate: %w", err)
}

func underMigrationLock(ctx context.Context, direct tenant.Secret, act func(*DB, *migrate.Migrate) error) error {
	db, err := Open(ctx, Config{URL: direct, MaxConns: 4})
	if err != nil {
		return err
	}
	defer db.Close()
	conn, err := db.direct.Acquire(ctx)
	if err != nil {
		return translate("connect", err)
	}
	// Closing the session releases the lock, also when this process is killed.
	defer func() { _ = conn.Conn().Close(context.WithoutCancel(ctx)); conn.Release() }()
	if _, err := conn.Exec(ctx, `SET lock_timeout = 0; SET statement_timeout = 0`); err != nil { // another process may migrate for long
		return translate("connect", err)
	}
	// Not in a statement that waits for the lock: it would have a snapshot, and indexes that are built
	// concurrently wait for the end of older snapshots.
	for locked := false; !locked; {
		if err := conn.QueryRow(ctx, `SELECT pg_try_advisory_lock($1)`, int64(migrationLock)).Scan(&locked); err != nil {
			return translate("wait for the migration lock", err)
		}
		if locked {
			break
		}
		select {
		case <-ctx.Done():
			return translate("wait for the migration lock", ctx.Err())
		case <-time.After(migrationLockPoll):
		}
	}

	source, err := iofs.New(migrations.FS, ".")
	if err != nil {
		return fmt.Errorf("read embedded migrations: %w", err)
	}
	sqlDB := stdlib.OpenDB(*db.direct.Config().ConnConfig)
	driver, err := migratepgx.WithInstance(sqlDB, &migratepgx.Config{})
	if err != nil {
		_ = sqlDB.Close()
		return translate("open migrations", err)
	}
	m, err := migrate.NewWithInstance("iofs", source, "pgx5", driver)
	if err != nil {
		return fmt.Errorf("open migrations: %w", err)
	}
	defer func() { _, _ = m.Close() }() // closes sqlDB too
	return act(db, m)
}
