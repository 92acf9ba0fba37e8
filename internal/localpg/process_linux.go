package localpg

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
)

// StartChild starts cmd in a process group of its own, so that a terminal's
// Ctrl-C is ours to pass on, and closes done when it has ended. The child ends
// with this process, however that ends.
func StartChild(cmd *exec.Cmd) (done <-chan struct{}, err error) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	// Postgres takes SIGQUIT for the order to end at once.
	cmd.SysProcAttr.Setpgid, cmd.SysProcAttr.Pdeathsig = true, syscall.SIGQUIT
	started, ended := make(chan error), make(chan struct{})
	go func() {
		// The kernel takes the end of the thread that started a child for the end
		// of its parent: that thread is kept for as long as the child lives.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		_ = cmd.Wait() // how it ended stands in cmd.ProcessState
		close(ended)
	}()
	return ended, <-started
}

// isPostmasterOf reports whether a process is a server on data.
func isPostmasterOf(pid int, data string) bool {
	args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return false
	}
	fields := bytes.Split(args, []byte{0})
	for i, f := range fields {
		if string(f) == "-D" && i+1 < len(fields) && string(fields[i+1]) == data {
			return filepath.Base(string(fields[0])) == "postgres"
		}
	}
	return false
}

// processes reads the process table.
func processes() (map[int]process, error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	all := make(map[int]process, len(dirs))
	for _, dir := range dirs {
		raw, err := os.ReadFile(filepath.Join(dir, "stat"))
		if err != nil {
			continue // it has ended
		}
		// The name before the state is in brackets and may contain any character.
		fields := bytes.Fields(raw[bytes.LastIndexByte(raw, ')')+1:])
		pid, pidErr := strconv.Atoi(filepath.Base(dir))
		if pidErr != nil || len(fields) < 2 {
			continue
		}
		parent, err := strconv.Atoi(string(fields[1]))
		if err != nil {
			continue
		}
		all[pid] = process{parent: parent, state: fields[0][0]}
	}
	return all, nil
}
