package postgres

import (
	"context"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
)

// backfill writes what rows from before a migration lack.
func backfill(ctx context.Context, conn *pgx.Conn, report func(line string)) error {
	if built, _, err := indexState(ctx, conn, keysByAge.name); err != nil {
		return err
	} else if !built {
		report("writing the profiles of keys; this blocks nothing")
		if err := fillProfiles(ctx, conn); err != nil {
			return translate("write profiles of keys", err)
		}
	}
	return translate("count tenants", countExisting(ctx, conn, report))
}

// filledAtOnce is how many keys one transaction of fillProfiles reads.
const filledAtOnce = 5_000

// lacksProfile selects the keys k, of the apps a, whose profile was not written.
const lacksProfile = `k.profile IS NULL AND k.state IN ('creating', 'active') AND a.state <> 'retired' AND a.user_id IS NULL`

// fillProfiles writes the profiles of the keys that are or will be active.
func fillProfiles(ctx context.Context, conn *pgx.Conn) error {
	for left := true; left; { // another transaction had locked some
		for after := new(uuid.UUID); after != nil; {
			var err error
			if after, err = fillSome(ctx, conn, *after); err != nil {
				return err
			}
		}
		if err := conn.QueryRow(ctx, `SELECT EXISTS (SELECT FROM keys k JOIN apps a ON a.id = k.app_id WHERE `+lacksProfile+`)`).Scan(&left); err != nil {
			return err
		}
	}
	return nil
}

// fillSome writes the profiles of the next keys after a key, and returns the last of them; nil if there are
// no more.
func fillSome(ctx context.Context, conn *pgx.Conn, after uuid.UUID) (last *uuid.UUID, err error) {
	err = conn.QueryRow(ctx, `SELECT (SELECT id FROM keys WHERE id > $1 ORDER BY id OFFSET $2 LIMIT 1)`, after, filledAtOnce-1).Scan(&last)
	if err != nil {
		return nil, err
	}
	return last, pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		// Locked keys are skipped: other transactions lock the keys of a tenant in any order.
		rows, _ := tx.Query(ctx, `
			SELECT k.id, coalesce(t.profile, a.profile) FROM keys k JOIN apps a ON a.id = k.app_id LEFT JOIN tenants t ON t.app_id = a.id
			WHERE k.id > $1 AND ($2::uuid IS NULL OR k.id <= $2) AND `+lacksProfile+` FOR NO KEY UPDATE OF k SKIP LOCKED`, planForValues, after, last)
		var ids []uuid.UUID
		var profiles []string
		var id uuid.UUID
		var profile string
		if _, err := pgx.ForEachRow(rows, []any{&id, &profile}, func() error {
			ids, profiles = append(ids, id), append(profiles, profile)
			return nil
		}); err != nil || len(ids) == 0 {
			return err
		}
		_, err := tx.Exec(ctx, `UPDATE keys k SET profile = f.profile FROM unnest($1::uuid[], $2::text[]) AS f (id, profile) WHERE k.id = f.id`, ids, profiles)
		return err
	})
}

// countExisting counts the tenants from before tenant_counts, unless they are counted.
func countExisting(ctx context.Context, conn *pgx.Conn, report func(line string)) error {
	var counted bool
	if err := conn.QueryRow(ctx, `SELECT `+tenantsCounted).Scan(&counted); err != nil || counted {
		return err
	}
	report("counting tenants; this blocks nothing")
	// Before the transaction, whose snapshot must not be older than the end of FoldTenantCounts.
	if _, err := conn.Exec(ctx, `SELECT pg_advisory_lock(`+tenantCountsLock+`)`); err != nil {
		return err
	}
	err := pgx.BeginTxFunc(ctx, conn, pgx.TxOptions{IsoLevel: pgx.RepeatableRead}, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, `SELECT tenant_counts_recount()`)
		return err
	})
	if _, unlocked := conn.Exec(ctx, `SELECT pg_advisory_unlock(`+tenantCountsLock+`)`); err == nil {
		err = unlocked
	}
	return err
}
