package localpg_test

import (
	"path/filepath"
	"syscall"
	"testing"

	"github.com/tenantry/tenantry/internal/localpg"
)

// A copy of the files of a server that is stopped by SIGSTOP runs as another cluster, and
// the server continues.
func TestCopy(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	c := open(t, filepath.Join(dir, "original"))
	if err := c.CreateDatabase(t.Context(), "kept"); err != nil {
		t.Fatal(err)
	}
	if err := localpg.SignalTree(t.Context(), c.PID(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := c.Copy(t.Context(), filepath.Join(dir, "copy")); err != nil {
		t.Fatal(err)
	}
	other := open(t, filepath.Join(dir, "copy"))
	query(t, other.URL("kept"), `SELECT 'it runs'`)
	if err := localpg.SignalTree(t.Context(), c.PID(), syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	query(t, c.URL("kept"), `SELECT 'it runs'`)

	if err := localpg.SignalTree(t.Context(), c.PID(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-c.Done()
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	query(t, c.URL("kept"), `SELECT 'it runs'`)
}
