package postgres

import (
	"context"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/riverqueue/river"

	"github.com/tenantry/tenantry/internal/tenant"
)

// requeueAfter is how long a job may wait in the queue before the sweep adds
// another for the same row.
const requeueAfter = 10 * time.Second

func (db *DB) enqueueApps(ctx context.Context, queue string, ids []tenant.AppID) error {
	jobs := make([]river.InsertManyParams, 0, len(ids))
	for _, id := range ids {
		jobs = append(jobs, river.InsertManyParams{Args: tenant.AppJob{AppID: id}, InsertOpts: &river.InsertOpts{Queue: queue}})
	}
	return db.enqueue(ctx, jobs)
}

func (db *DB) enqueue(ctx context.Context, jobs []river.InsertManyParams) error {
	if len(jobs) == 0 {
		return nil
	}
	_, err := db.jobs.InsertManyFast(ctx, jobs)
	return translate("insert jobs", err)
}

// Enqueue inserts jobs for the rows that are due, unleased and not in the queue:
// those whose job was lost with a crash, and those whose next try has come. It
// returns how many it inserted.
func (db *DB) Enqueue(ctx context.Context) (int, error) {
	const most = 100 // a turn
	var building, purging []tenant.AppID
	rows, _ := db.pool.Query(ctx, `
		UPDATE apps SET enqueued_at = now()
		WHERE id IN (
			SELECT id FROM apps
			WHERE state IN ('building', 'purging') AND next_attempt_at <= now() AND leased_until < now()
				AND enqueued_at < now() - $1::interval
			ORDER BY next_attempt_at LIMIT $2 FOR UPDATE SKIP LOCKED)
		RETURNING id, state`, requeueAfter, most)
	var id tenant.AppID
	var state tenant.AppState
	_, err := pgx.ForEachRow(rows, []any{&id, &state}, func() error {
		if state == tenant.AppBuilding {
			building = append(building, id)
		} else {
			purging = append(purging, id)
		}
		return nil
	})
	if err != nil {
		return 0, translate("find apps that are due", err)
	}
	rows, _ = db.pool.Query(ctx, `
		UPDATE keys SET enqueued_at = now()
		WHERE id IN (
			SELECT id FROM keys
			WHERE state = 'revoking' AND next_attempt_at <= now() AND leased_until < now()
				AND enqueued_at < now() - $1::interval
			ORDER BY next_attempt_at LIMIT $2 FOR UPDATE SKIP LOCKED)
		RETURNING id`, requeueAfter, most)
	keys, err := pgx.CollectRows(rows, pgx.RowTo[uuid.UUID])
	if err != nil {
		return 0, translate("find keys that are due", err)
	}
	if err := db.enqueueApps(ctx, tenant.QueueInteractive, building); err != nil {
		return 0, err
	}
	if err := db.enqueueApps(ctx, tenant.QueueBackground, purging); err != nil {
		return 0, err
	}
	jobs := make([]river.InsertManyParams, 0, len(keys))
	for _, id := range keys {
		jobs = append(jobs, river.InsertManyParams{Args: tenant.KeyJob{KeyID: id}, InsertOpts: &river.InsertOpts{Queue: tenant.QueueBackground}})
	}
	return len(building) + len(purging) + len(keys), db.enqueue(ctx, jobs)
}

// StartBuilds begins builds for the tenants of a profile that wait and that no
// build runs for, with the given ids, at most as many as there are ids at once.
func (db *DB) StartBuilds(ctx context.Context, p tenant.Profile, ids []tenant.AppID) error {
	var began []tenant.AppID
	err := pgx.BeginFunc(ctx, db.pool, func(tx pgx.Tx) error {
		// Two sweeps at once would each see the same want and build for it twice.
		var alone bool
		if err := tx.QueryRow(ctx, `SELECT pg_try_advisory_xact_lock(hashtext('start builds'), hashtext($1))`, p.Name).
			Scan(&alone); err != nil || !alone {
			return err
		}
		rows, _ := tx.Query(ctx, startBuildsSQL, ids, p.Name, p.Revision(), len(ids))
		var err error
		began, err = pgx.CollectRows(rows, pgx.RowTo[tenant.AppID])
		return err
	})
	if err != nil {
		return translate("start builds", err)
	}
	return db.enqueueApps(ctx, tenant.QueueInteractive, began)
}

// MakeAuditPartitions makes the partitions of the audit log for the months ahead.
func (db *DB) MakeAuditPartitions(ctx context.Context) error {
	_, err := db.pool.Exec(ctx, `SELECT audit_events_make_partitions(3)`)
	return translate("make audit partitions", err)
}
