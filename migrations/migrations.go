// Package migrations holds the schema as SQL, embedded. Files are numbered and
// never edited once released; each up has its down.
package migrations

import "embed"

// FS holds NNNNNN_name.up.sql and NNNNNN_name.down.sql.
//
//go:embed *.sql
var FS embed.FS
