package postgres

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/tenant"
)

// Fence reads the restore fence.
func (db *DB) Fence(ctx context.Context) (tenant.Fence, error) {
	f, err := readFence(ctx, db.pool)
	return f, translate("read fence", err)
}

type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

func readFence(ctx context.Context, q querier) (tenant.Fence, error) {
	var f tenant.Fence
	err := q.QueryRow(ctx, `SELECT coalesce(fence_since, '0001-01-01 00:00:00Z'), fence_reason, fence_behind FROM deployment`).
		Scan(&f.Since, &f.Reason, &f.Behind)
	if errors.Is(err, pgx.ErrNoRows) {
		return f, nil
	}
	return f, err
}

// raiseFence raises the fence, unless it is up. What was built before may have been
// given to tenants that the database has forgotten.
func raiseFence(ctx context.Context, tx pgx.Tx, reason string) error {
	_, err := tx.Exec(ctx, `
		WITH raised AS (
			UPDATE deployment SET fence_since = now(), fence_reason = $1, fence_behind = false WHERE fence_since IS NULL
			RETURNING 1
		), suspect AS (
			UPDATE apps SET suspect = true WHERE (state = 'building' OR state = 'ready') AND EXISTS (SELECT FROM raised)
		)
		INSERT INTO audit_events (actor, action, detail)
		SELECT 'worker', 'fence.raised', jsonb_build_object('reason', $1::text) FROM raised`, reason)
	return err
}

func lowerFence(ctx context.Context, tx pgx.Tx, release bool) error {
	_, err := tx.Exec(ctx, `
		WITH lowered AS (
			UPDATE deployment SET fence_since = NULL, fence_reason = '', fence_behind = false WHERE fence_since IS NOT NULL
			RETURNING 1
		), released AS (
			UPDATE apps SET suspect = false WHERE suspect AND $1 AND EXISTS (SELECT FROM lowered)
		)
		INSERT INTO audit_events (actor, action) SELECT 'worker', 'fence.lowered' FROM lowered`, release)
	return err
}

// RaiseFence raises the restore fence for a reason, unless it is up.
func (db *DB) RaiseFence(ctx context.Context, reason string) error {
	return translate("raise fence", pgx.BeginFunc(ctx, db.pool, func(tx pgx.Tx) error { return raiseFence(ctx, tx, reason) }))
}

// CheckRestored raises the fence if the database is not the one that it was when it
// was last looked at: another cluster, another timeline of the cluster, or tables
// that were made anew.
func (db *DB) CheckRestored(ctx context.Context) (tenant.Fence, error) {
	const nowIs = `(SELECT s.system_identifier, c.timeline_id AS timeline, 'deployment'::regclass::oid AS table_oid
		FROM pg_control_system() s, pg_control_checkpoint() c)`
	var same bool
	err := db.pool.QueryRow(ctx, `
		SELECT NOT EXISTS (SELECT FROM deployment d, `+nowIs+` n
			WHERE (d.system_identifier, d.timeline, d.table_oid) IS DISTINCT FROM (n.system_identifier, n.timeline, n.table_oid))`).Scan(&same)
	if err != nil {
		return tenant.Fence{}, translate("look whether the database was restored", err)
	}
	if same {
		return db.Fence(ctx)
	}
	var f tenant.Fence
	err = pgx.BeginFunc(ctx, db.pool, func(tx pgx.Tx) error {
		var changed string
		err := tx.QueryRow(ctx, `
			WITH now_is AS `+nowIs+`, was AS (SELECT * FROM deployment FOR UPDATE)
			UPDATE deployment d
			SET system_identifier = n.system_identifier, timeline = n.timeline, table_oid = n.table_oid
			FROM now_is n, was
			WHERE (was.system_identifier, was.timeline, was.table_oid) IS DISTINCT FROM (n.system_identifier, n.timeline, n.table_oid)
			RETURNING CASE
				WHEN was.system_identifier <> n.system_identifier THEN 'the database is on another cluster than before'
				WHEN was.timeline <> n.timeline THEN 'the database is on another timeline than before: it was restored or failed over'
				ELSE 'the database''s tables were made anew: it was restored' END`).Scan(&changed)
		if err != nil && !errors.Is(err, pgx.ErrNoRows) {
			return err
		}
		if err == nil {
			if err := raiseFence(ctx, tx, changed); err != nil {
				return err
			}
		}
		f, err = readFence(ctx, tx)
		return err
	})
	return f, translate("look whether the database was restored", err)
}
