package postgres

import (
	"context"

	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/tenant"
)

// LiveProfiles lists the profiles that tenants are on who are not deleted, by name.
// It reads an index once for each profile, however many tenants there are.
func (db *DB) LiveProfiles(ctx context.Context) ([]string, error) {
	rows, _ := db.pool.Query(ctx, `
		WITH RECURSIVE live AS (
			(SELECT profile FROM tenants WHERE state <> 'deleted' ORDER BY profile LIMIT 1)
			UNION ALL
			SELECT (SELECT t.profile FROM tenants t WHERE t.state <> 'deleted' AND t.profile > live.profile
				ORDER BY t.profile LIMIT 1)
			FROM live WHERE live.profile IS NOT NULL
		)
		SELECT profile FROM live WHERE profile IS NOT NULL`)
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	return names, translate("list profiles in use", err)
}

// CountByRevision counts the tenants that are not deleted by their profile and by the
// revision of it that their app was made of. It reads all of them.
func (db *DB) CountByRevision(ctx context.Context) ([]tenant.RevisionCount, error) {
	rows, _ := db.pool.Query(ctx, `
		SELECT t.profile, coalesce(a.profile_revision, ''), count(*)
		FROM tenants t LEFT JOIN apps a ON a.id = t.app_id
		WHERE t.state <> 'deleted'
		GROUP BY 1, 2 ORDER BY 1, 2`)
	counts, err := pgx.CollectRows(rows, pgx.RowToStructByPos[tenant.RevisionCount])
	return counts, translate("count tenants by revision", err)
}
