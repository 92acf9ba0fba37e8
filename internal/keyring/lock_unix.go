//go:build unix

package keyring

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

// lockFile opens a file and locks it against others who would replace it. The lock
// goes with the process, however it ends.
func lockFile(path string) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("keyset file: %w", err)
	}
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if err == nil {
		// What is locked must be what is there: it may just have been replaced.
		var locked, there os.FileInfo
		if locked, err = f.Stat(); err == nil {
			if there, err = os.Stat(path); err == nil && !os.SameFile(locked, there) {
				err = syscall.EWOULDBLOCK
			}
		}
	}
	if err != nil {
		_ = f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			err = fmt.Errorf("%s is being changed by another command: try again", path)
		}
		return nil, fmt.Errorf("keyset file: %w", err)
	}
	return f, nil
}

// keepOwner gives f the owner that the file had which it replaces: the service may
// run as another user than this command.
func keepOwner(f *os.File, had os.FileInfo) error {
	is, err := f.Stat()
	if err != nil {
		return err
	}
	want, ok := had.Sys().(*syscall.Stat_t)
	have, ok2 := is.Sys().(*syscall.Stat_t)
	if !ok || !ok2 || want.Uid == have.Uid && want.Gid == have.Gid {
		return nil
	}
	if err := f.Chown(int(want.Uid), int(want.Gid)); err != nil {
		return fmt.Errorf("the file belongs to user %d, group %d: run this as that user (%w)", want.Uid, want.Gid, err)
	}
	return nil
}
