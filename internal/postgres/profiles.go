package postgres

import (
	"context"
	"time"

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

// tenantsCounted says that tenant_counts has the tenants from before the table, too. tenantCountsLock is the
// advisory lock of who adds up its rows.
const (
	tenantsCounted   = `EXISTS (SELECT FROM tenant_counts WHERE state = '')`
	tenantCountsLock = `hashtext('tenant counts')`
)

// TenantCounts returns the number of tenants by profile, revision of their apps and state. It reports
// tenant.Unavailable until the first count after a migration is finished.
func (db *DB) TenantCounts(ctx context.Context) ([]tenant.TenantCount, error) {
	rows, _ := db.pool.Query(ctx, `
		SELECT profile, revision, state, background, sum(n) FROM tenant_counts GROUP BY 1, 2, 3, 4 HAVING sum(n) <> 0 OR state = ''
		ORDER BY 1, 2, 3, 4`)
	counts, err := pgx.CollectRows(rows, pgx.RowToStructByPos[tenant.TenantCount])
	if err != nil {
		return nil, translate("count tenants", err)
	}
	if len(counts) == 0 || counts[0].State != "" {
		return nil, &tenant.Error{Kind: tenant.Unavailable, Code: "counting", RetryAfter: 10 * time.Second,
			Detail: "the tenants are not counted yet; `tenantry migrate up` counts them"}
	}
	return counts[1:], nil
}

// foldedFrom is how many more rows than counts make FoldTenantCounts add them up.
const foldedFrom = 500

// FoldTenantCounts adds up the changes of the number of tenants, so that TenantCounts reads few rows.
func (db *DB) FoldTenantCounts(ctx context.Context) error {
	var folds bool
	if err := db.pool.QueryRow(ctx, `
		SELECT count(*) - count(DISTINCT (profile, revision, state, background)) > $1 FROM tenant_counts`, foldedFrom).Scan(&folds); err != nil || !folds {
		return translate("look for changes of the number of tenants", err)
	}
	return translate("add up the number of tenants", db.inTx(ctx, func(tx pgx.Tx) error {
		var alone bool
		if err := tx.QueryRow(ctx, `SELECT pg_try_advisory_xact_lock(`+tenantCountsLock+`)`).Scan(&alone); err != nil || !alone {
			return err
		}
		_, err := tx.Exec(ctx, `
			WITH folded AS (DELETE FROM tenant_counts WHERE state <> '' RETURNING *)
			INSERT INTO tenant_counts (profile, revision, state, background, n)
			SELECT profile, revision, state, background, sum(n) FROM folded GROUP BY 1, 2, 3, 4 HAVING sum(n) <> 0`)
		return err
	}))
}
