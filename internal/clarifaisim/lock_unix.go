//go:build unix

package clarifaisim

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"
)

// lockState keeps a second simulator from a state file. The lock goes with the
// process, however it ends; the file of the lock stays. The lock of a simulator that has just ended is
// waited for: a process that it was starting holds it a moment longer.
func lockState(path string) (*os.File, error) {
	file, err := os.OpenFile(path+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock state: %w", err)
	}
	for until := time.Now().Add(time.Second); ; time.Sleep(10 * time.Millisecond) {
		err = syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if !errors.Is(err, syscall.EWOULDBLOCK) || time.Now().After(until) {
			break
		}
	}
	if err != nil {
		_ = file.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("state file %s is in use by another simulator", path)
		}
		return nil, fmt.Errorf("lock state: %w", err)
	}
	return file, nil
}
