package postgres

import "time"

// AuditColumnNames are the columns that seals cover.
var AuditColumnNames = auditColumnNames

// Forward moves the clock of what is held in memory.
func (db *DB) Forward(d time.Duration) { db.cache.ahead.Add(int64(d)) }
