package postgres

// AuditColumnNames are the columns that seals cover.
var AuditColumnNames = auditColumnNames

// The statements that tests look at the plans of.
const (
	ClaimSQL             = claimAndWakeSQL
	StartBuildsSQL       = startBuildsSQL
	ClaimInBackgroundSQL = claimInBackgroundSQL
)
