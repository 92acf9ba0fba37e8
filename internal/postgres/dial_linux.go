package postgres

import (
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// dieUnacknowledged makes a TCP connection end when the server has not acknowledged data for
// deadAfter. Keepalives alone do not end it while data is on the way.
func dieUnacknowledged(network, _ string, raw syscall.RawConn) error {
	if !strings.HasPrefix(network, "tcp") {
		return nil
	}
	var failed error
	if err := raw.Control(func(fd uintptr) {
		failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(deadAfter.Milliseconds()))
	}); err != nil {
		return err
	}
	return failed
}
