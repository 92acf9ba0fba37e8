package postgres

import (
	"context"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/riverqueue/river"
	"go.uber.org/zap"

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

func (db *DB) enqueueApps(ctx context.Context, queue string, ids []tenant.AppID) {
	db.enqueue(ctx, appJobs(queue, 1, ids))
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

// enqueueTimeout limits the insertion of jobs after a commit.
const enqueueTimeout = 3 * time.Second

// enqueue inserts jobs. What they are for is committed already, so a failure is no failure of the
// caller: the sweep finds the rows.
func (db *DB) enqueue(ctx context.Context, jobs []river.InsertManyParams) {
	if len(jobs) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), enqueueTimeout)
	defer cancel()
	if err := db.insertJobs(ctx, jobs); err != nil {
		db.log.Warn("jobs not inserted; the sweep inserts them", zap.Int("jobs", len(jobs)), zap.Error(err))
	}
}

func (db *DB) insertJobs(ctx context.Context, jobs []river.InsertManyParams) error {
	inserted, err := db.jobs.InsertMany(ctx, jobs)
	if err != nil {
		return err
	}
	ids := make([]int64, len(inserted))
	for i, j := range inserted {
		ids[i] = j.Job.ID
	}
	// River inserts them with the time of this process: if the clock of the database is behind, they
	// would wait for as long.
	_, err = db.pool.Exec(ctx, `UPDATE river_job SET scheduled_at = now() WHERE id = ANY ($1) AND state = 'available' AND scheduled_at > now()`, ids)
	return err
}

// Enqueue inserts jobs for the rows of a kind that are due, unleased and not in the queue:
// those whose job was lost with a crash, and those whose next attempt is due. It
// returns how many it inserted. Of what can wait it keeps the queue short.
func (db *DB) Enqueue(ctx context.Context, kind tenant.WorkKind) (int, error) {
	const most, mostBackground = 100, 50
	const notQueued = `enqueued_at < now() - $1::interval`
	var jobs []river.InsertManyParams
	var err error
	// rows marks the due rows of a table as enqueued.
	rows := func(table, where, order string) string {
		return `UPDATE ` + table + ` SET enqueued_at = now()
			WHERE id = ANY (ARRAY(
				SELECT id FROM ` + table + ` k WHERE ` + where + ` AND ` + notQueued + `
				ORDER BY ` + order + ` LIMIT $2 FOR UPDATE SKIP LOCKED))
			RETURNING id`
	}
	switch kind {
	case tenant.BuildWork:
		var ids []tenant.AppID
		ids, err = due[tenant.AppID](ctx, db, rows("apps", `state = 'building' AND NOT for_pool AND `+dueApp, "next_attempt_at"), requeueAfter, most)
		jobs = appJobs(tenant.QueueInteractive, 1, ids)
	case tenant.TagWork:
		// A caller waits for keys to be ended, and for the ownership tag, which precedes new keys.
		var ids []tenant.AppID
		ids, err = due[tenant.AppID](ctx, db, rows("apps", `state IN ('held', 'retained') AND pending AND NOT background
			AND (end_unknown_keys OR state = 'held' AND (tagging OR tagged_purge_after IS NOT NULL)) AND `+dueApp, "next_attempt_at"), requeueAfter, most)
		jobs = appJobs(tenant.QueueInteractive, 1, ids)
	case tenant.KeyWork:
		var keys []keyInLane
		found, _ := db.pool.Query(ctx, rows("keys", dueKey, "lane, next_attempt_at")+`, lane`, requeueAfter, most)
		keys, err = pgx.CollectRows(found, pgx.RowToStructByPos[keyInLane])
		jobs = keyJobs(keys)
	case tenant.ReconciliationWork:
		var ids []uuid.UUID
		ids, err = due[uuid.UUID](ctx, db, rows("reconciliations", `state = 'running' AND next_attempt_at <= now() AND leased_until < now()`, "next_attempt_at"), requeueAfter, most)
		for _, id := range ids {
			jobs = append(jobs, river.InsertManyParams{Args: tenant.ReconciliationJob{ReconciliationID: id},
				InsertOpts: &river.InsertOpts{Queue: tenant.QueueBackground, Priority: priorityReport}})
		}
	case tenant.AdoptionWork:
		if err := db.forgetAdoptions(ctx); err != nil {
			return 0, err
		}
		var ids []uuid.UUID
		ids, err = due[uuid.UUID](ctx, db, rows("adoptions", dueAdoption, "next_attempt_at"), requeueAfter, most)
		for _, id := range ids {
			jobs = append(jobs, adoptionJob(id))
		}
	case tenant.CampaignWork:
		var ids []uuid.UUID
		ids, err = due[uuid.UUID](ctx, db, rows("campaigns", dueCampaign, "next_attempt_at"), requeueAfter, most)
		for _, id := range ids {
			jobs = append(jobs, campaignJob(id))
		}
	case tenant.BackgroundWork:
		jobs, err = db.dueInBackground(ctx, mostBackground, notQueued)
	}
	if err != nil {
		return 0, translate("find rows that are due", err)
	}
	db.enqueue(ctx, jobs)
	return len(jobs), nil
}

// due returns the ids of the rows that a statement marks as enqueued.
func due[T any](ctx context.Context, db *DB, sql string, args ...any) ([]T, error) {
	rows, _ := db.pool.Query(ctx, sql, args...)
	return pgx.CollectRows(rows, pgx.RowTo[T])
}

// dueInBackground returns jobs for apps that can wait.
func (db *DB) dueInBackground(ctx context.Context, most int, notQueued string) ([]river.InsertManyParams, error) {
	var later, marks []tenant.AppID
	batch := &pgx.Batch{}
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
			RETURNING id`, requeueAfter, most, tenant.QueueBackground, w.priority)
	}
	// Without BEGIN, the statements of a batch are one transaction.
	err := db.pool.SendBatch(ctx, batch).Close()
	return append(appJobs(tenant.QueueBackground, priorityOther, later), appJobs(tenant.QueueBackground, priorityLast, marks)...), err
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
	db.enqueueApps(ctx, tenant.QueueInteractive, began)
	return nil
}

// MakeAuditPartitions makes the partitions of the audit log for the months ahead.
func (db *DB) MakeAuditPartitions(ctx context.Context) error {
	_, err := db.pool.Exec(ctx, `SELECT audit_events_make_partitions(3)`)
	return translate("make audit partitions", err)
}
