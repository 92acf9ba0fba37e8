package postgres

// AuditColumnNames are the columns that seals cover.
var AuditColumnNames = auditColumnNames
