package localpg

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"
)

// A process is an entry of the process table.
type process struct {
	parent int
	state  byte // as ps shows it: T is stopped, Z has ended and was not reaped
}

// SignalTree sends SIGSTOP, SIGCONT or SIGKILL to a process and its children, and
// waits until they have stopped or ended. Postgres needs that: a signal to the
// server alone leaves its backends running. The process itself must be reaped by
// the caller. A process that has ended is no error.
func SignalTree(ctx context.Context, pid int, sig syscall.Signal) error {
	if sig == syscall.SIGKILL || sig == syscall.SIGSTOP {
		// A stopped process starts no more children.
		if err := signalAll(ctx, []int{pid}, syscall.SIGSTOP); err != nil {
			return err
		}
	}
	all, err := processes()
	if err != nil {
		return fmt.Errorf("read the process table: %w", err)
	}
	var children []int
	for child, p := range all {
		if p.parent == pid {
			children = append(children, child)
		}
	}
	if err := signalAll(ctx, children, sig); err != nil {
		return err
	}
	return signalAll(ctx, []int{pid}, sig)
}

func signalAll(ctx context.Context, pids []int, sig syscall.Signal) error {
	for _, pid := range pids {
		if err := syscall.Kill(pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("signal process %d: %w", pid, err)
		}
	}
	if sig != syscall.SIGSTOP && sig != syscall.SIGKILL {
		return nil
	}
	ticker := time.NewTicker(time.Millisecond)
	defer ticker.Stop()
	for {
		all, err := processes()
		if err != nil {
			return fmt.Errorf("read the process table: %w", err)
		}
		busy := 0
		for _, pid := range pids {
			if p, found := all[pid]; found && p.state != 'Z' && (sig == syscall.SIGKILL || p.state != 'T') {
				busy = pid
			}
		}
		if busy == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("process %d does not react to %s: %w", busy, sig, ctx.Err())
		case <-ticker.C:
		}
	}
}
