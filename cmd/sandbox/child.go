package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/tenantry/tenantry/internal/localpg"
)

// A child is one of the other programs, running.
type child struct {
	name string
	log  string
	cmd  *exec.Cmd
	done <-chan struct{}
}

// start starts a program that lies beside this one. Its output goes to a log.
func (s *sandbox) start(name string, args []string, vars map[string]string) (*child, error) {
	c := &child{name: name, log: s.file(name + ".log")}
	log, err := os.OpenFile(c.log, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() { _ = log.Close() }()
	c.cmd = exec.Command(filepath.Join(s.bin, name), args...)
	c.cmd.Env = s.environ(vars)
	c.cmd.Stdout, c.cmd.Stderr = log, log
	if c.done, err = localpg.StartChild(c.cmd); err != nil {
		return nil, fmt.Errorf("start %s: %w (`make build` puts it beside the sandbox)", name, err)
	}
	return c, nil
}

// await waits until ok is true. It fails if the child ends first.
func (s *sandbox) await(ctx context.Context, what string, c *child, ok func() bool) error {
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	ticker := time.NewTicker(20 * time.Millisecond)
	defer ticker.Stop()
	for !ok() {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-c.done:
			return c.ended()
		case <-deadline.C:
			return fmt.Errorf("waited %s in vain until %s; the log %s ends:\n%s", patience, what, c.log, c.tail())
		case <-ticker.C:
		}
	}
	return nil
}

// ended says that the child ended by itself, and its last words.
func (c *child) ended() error {
	return fmt.Errorf("%s has ended (%s); its log %s ends:\n%s", c.name, c.cmd.ProcessState, c.log, c.tail())
}

func (c *child) tail() []byte {
	raw, _ := os.ReadFile(c.log)
	lines := bytes.Split(bytes.TrimSpace(raw), []byte("\n"))
	return bytes.Join(lines[max(0, len(lines)-8):], []byte("\n"))
}

// stop asks the child to end, and ends it if it has not by then.
func (c *child) stop(limit time.Duration) {
	_ = c.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-c.done:
	case <-time.After(limit):
		_ = c.cmd.Process.Kill()
		<-c.done
	}
}
