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
// another for the same row. A job that has taken its row has left the queue.
const requeueAfter = 10 * time.Second

// Which jobs of the background queue go first. The apps of an import are tended last, and
// may wait for as long as it takes: their markers are needed only after a disaster.
const (
	priorityPool   = 1
	priorityReport = 2
	priorityOther  = 3 // of an import, too
	priorityLast   = 4
)

func (db *DB) enqueueApps(ctx context.Context, queue string, ids []tenant.AppID) error {
	return db.enqueue(ctx, appJobs(queue, 1, ids))
}

func appJobs(queue string, priority int, ids []tenant.AppID) []river.InsertManyParams {
	jobs := make([]river.InsertManyParams, 0, len(ids))
	for _, id := range ids {
		jobs = append(jobs, river.InsertManyParams{Args: tenant.AppJob{AppID: id}, InsertOpts: &river.InsertOpts{Queue: queue, Priority: priority}})
	}
	return jobs
}

// A keyInLane is a key that there is work on.
type keyInLane struct {
	ID   uuid.UUID
	Lane tenant.Lane
}

func keyJobs(keys []keyInLane) []river.InsertManyParams {
	jobs := make([]river.InsertManyParams, len(keys))
	for i, k := range keys {
		opts := &river.InsertOpts{Queue: tenant.QueueBackground, Priority: 1 + int(k.Lane)}
		if k.Lane == tenant.Urgent {
			opts.Queue = tenant.QueueUrgent
		}
		jobs[i] = river.InsertManyParams{Args: tenant.KeyJob{KeyID: k.ID}, InsertOpts: opts}
	}
	return jobs
}

func (db *DB) enqueue(ctx context.Context, jobs []river.InsertManyParams) error {
	if len(jobs) == 0 {
		return nil
	}
	inserted, err := db.jobs.InsertMany(ctx, jobs)
	if err != nil {
		return translate("insert jobs", err)
	}
	ids := make([]int64, len(inserted))
	for i, j := range inserted {
		ids[i] = j.Job.ID
	}
	// River inserts them with the time of this process: if the clock of the database is behind, they
	// would wait for as long.
	_, err = db.pool.Exec(ctx, `UPDATE river_job SET scheduled_at = now() WHERE id = ANY ($1) AND state = 'available' AND scheduled_at > now()`, ids)
	return translate("insert jobs", err)
}

// Enqueue inserts jobs for the rows that are due, unleased and not in the queue:
// those whose job was lost with a crash, and those whose next try has come. It
// returns how many it inserted. Of what can wait it keeps the queue short.
func (db *DB) Enqueue(ctx context.Context) (int, error) {
	const most, mostBackground = 100, 50
	var jobs []river.InsertManyParams
	add := func(queue string, priority int, args river.JobArgs) {
		jobs = append(jobs, river.InsertManyParams{Args: args, InsertOpts: &river.InsertOpts{Queue: queue, Priority: priority}})
	}
	var building, later, marks []tenant.AppID // those in building are urgent
	var reconciliations, adoptions, campaigns []uuid.UUID
	var keys []keyInLane
	const notQueued = `enqueued_at < now() - $1::interval`
	batch := &pgx.Batch{}
	collect(batch, &building, `
		UPDATE apps SET enqueued_at = now()
		WHERE id = ANY (ARRAY(
			SELECT id FROM apps WHERE state = 'building' AND NOT for_pool AND `+dueApp+` AND `+notQueued+`
			ORDER BY next_attempt_at LIMIT $2 FOR UPDATE SKIP LOCKED))
		RETURNING id`, requeueAfter, most)
	// A caller waits for keys to be ended, and for the ownership tag, which precedes new keys.
	collect(batch, &building, `
		UPDATE apps SET enqueued_at = now()
		WHERE id = ANY (ARRAY(
			SELECT id FROM apps WHERE state IN ('held', 'retained') AND pending AND NOT background
				AND (end_unknown_keys OR state = 'held' AND (tagging OR tagged_purge_after IS NOT NULL)) AND `+dueApp+` AND `+notQueued+`
			ORDER BY next_attempt_at LIMIT $2 FOR UPDATE SKIP LOCKED))
		RETURNING id`, requeueAfter, most)
	batch.Queue(`
		UPDATE keys SET enqueued_at = now()
		WHERE id = ANY (ARRAY(
			SELECT id FROM keys k WHERE `+dueKey+` AND `+notQueued+`
			ORDER BY lane, next_attempt_at LIMIT $2 FOR UPDATE SKIP LOCKED))
		RETURNING id, lane`, requeueAfter, most).Query(func(rows pgx.Rows) (err error) {
		keys, err = pgx.CollectRows(rows, pgx.RowToStructByPos[keyInLane])
		return err
	})
	collect(batch, &reconciliations, `
		UPDATE reconciliations SET enqueued_at = now()
		WHERE state = 'running' AND next_attempt_at <= now() AND leased_until < now() AND `+notQueued+`
		RETURNING id`, requeueAfter)
	collect(batch, &adoptions, `
		UPDATE adoptions SET enqueued_at = now()
		WHERE id = ANY (ARRAY(
			SELECT id FROM adoptions WHERE `+dueAdoption+` AND `+notQueued+`
			ORDER BY next_attempt_at LIMIT $2 FOR UPDATE SKIP LOCKED))
		RETURNING id`, requeueAfter, most)
	forgetAdoptions(batch)
	collect(batch, &campaigns, `
		UPDATE campaigns SET enqueued_at = now() WHERE `+dueCampaign+` AND `+notQueued+` RETURNING id`, requeueAfter)
	// The conditions that go beyond dueApp are those of an index.
	for _, w := range []struct {
		which    string
		ids      *[]tenant.AppID
		priority int
	}{
		{"state = 'building' AND for_pool", &later, priorityOther}, {"state = 'purging'", &later, priorityOther},
		{"state IN ('held', 'retained') AND pending AND NOT background", &later, priorityOther},
		{"state IN ('held', 'retained') AND pending AND background", &marks, priorityLast},
		{"state = 'retained' AND purge_after <= now()", &later, priorityOther},
		{"state = 'ready' AND coalesce(proven_at, ready_at) < now() - " + poolAge, &later, priorityOther},
	} {
		collect(batch, w.ids, `
			UPDATE apps SET enqueued_at = now()
			WHERE id = ANY (ARRAY(
				SELECT id FROM apps WHERE `+w.which+` AND `+dueApp+` AND `+notQueued+`
				ORDER BY next_attempt_at
				LIMIT greatest(0, $2 - (SELECT count(*) FROM river_job WHERE state = 'available' AND queue = $3 AND priority <= $4))
				FOR UPDATE SKIP LOCKED))
			RETURNING id`, requeueAfter, mostBackground, tenant.QueueBackground, w.priority)
	}
	// Without BEGIN, the statements of a batch are one transaction.
	if err := db.pool.SendBatch(ctx, batch).Close(); err != nil {
		return 0, translate("find rows that are due", err)
	}
	for _, id := range building {
		add(tenant.QueueInteractive, 1, tenant.AppJob{AppID: id})
	}
	jobs = append(jobs, keyJobs(keys)...)
	for _, id := range adoptions {
		jobs = append(jobs, adoptionJob(id))
	}
	for _, id := range reconciliations {
		add(tenant.QueueBackground, priorityReport, tenant.ReconciliationJob{ReconciliationID: id})
	}
	for _, id := range campaigns {
		jobs = append(jobs, campaignJob(id))
	}
	jobs = append(jobs, appJobs(tenant.QueueBackground, priorityOther, later)...)
	jobs = append(jobs, appJobs(tenant.QueueBackground, priorityLast, marks)...)
	return len(jobs), db.enqueue(ctx, jobs)
}

// collect queues a statement whose rows are appended to ids.
func collect[T any](batch *pgx.Batch, ids *[]T, sql string, args ...any) {
	batch.Queue(sql, args...).Query(func(rows pgx.Rows) error {
		found, err := pgx.CollectRows(rows, pgx.RowTo[T])
		*ids = append(*ids, found...)
		return err
	})
}

// StartBuilds begins builds for the tenants of a profile that wait and that no
// build runs for, with the given ids, at most as many as there are ids at once.
func (db *DB) StartBuilds(ctx context.Context, p tenant.Profile, ids []tenant.AppID) error {
	var began []tenant.AppID
	err := db.inTx(ctx, func(tx pgx.Tx) error {
		// Two sweeps at once would each see the same want and build for it twice.
		var alone bool
		if err := tx.QueryRow(ctx, `SELECT pg_try_advisory_xact_lock(hashtext('start builds'), hashtext($1))`, p.Name).
			Scan(&alone); err != nil || !alone {
			return err
		}
		rows, _ := tx.Query(ctx, startBuildsSQL, p.Name, ids, p.Revision(), len(ids))
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
