//go:build !linux

package postgres

import "syscall"

// dieUnacknowledged needs an option that only Linux has: elsewhere, the limits of each statement end
// the connection.
func dieUnacknowledged(_, _ string, _ syscall.RawConn) error { return nil }
