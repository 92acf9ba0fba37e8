// Package migrations holds the schema as SQL, embedded. Files are numbered and
// never edited once released; each up has its down.
//
// An up begins with LOCK TABLE statements for all existing tables that it locks, as 000010 does: one that
// waits for a lock then has changed nothing, and `tenantry migrate up` reports what they block.
package migrations

import "embed"

// FS holds NNNNNN_name.up.sql and NNNNNN_name.down.sql.
//
//go:embed *.sql
var FS embed.FS
