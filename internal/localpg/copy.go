package localpg

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Copy copies the data directory and the password to dir, which must not exist. Open runs
// dir as another cluster. The server must not write during the copy: it has ended, or
// SignalTree has stopped it. A copy of a stopped server is like its files after a crash.
func (c *Cluster) Copy(ctx context.Context, dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return fmt.Errorf("make the directory of the copy: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "password"), []byte(c.password+"\n"), 0o600); err != nil {
		return fmt.Errorf("write the password of the copy: %w", err)
	}
	data := filepath.Join(dir, "pgdata")
	// With modes and owners, which Postgres checks.
	if out, err := exec.CommandContext(ctx, "cp", "-pPR", c.data, data).CombinedOutput(); err != nil {
		return fmt.Errorf("copy the data directory: %w\n%s", err, tail(out))
	}
	// The lock file belongs to the running server.
	if err := os.Remove(filepath.Join(data, "postmaster.pid")); err != nil && !os.IsNotExist(err) {
		return fmt.Errorf("copy the data directory: %w", err)
	}
	return nil
}

// Load runs a script of pg_dump or other SQL in a database, in one transaction.
// It needs psql, which a downloaded Postgres lacks.
func (c *Cluster) Load(ctx context.Context, database, script string) error {
	cmd := c.command(ctx, "psql", "--no-psqlrc", "--quiet", "--output", os.DevNull, "--set", "ON_ERROR_STOP=1", "--single-transaction",
		"--dbname", c.URL(database))
	cmd.Stdin = strings.NewReader(script)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("psql: %w\n%s", err, tail(out))
	}
	return nil
}
