package postgres

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/tenant"
)

// wakeWorkers tells the workers of this replica that a commit has made work of some kinds due. Other
// replicas find it when they look next.
func (db *DB) wakeWorkers(kinds ...tenant.WorkKind) {
	for _, kind := range kinds {
		select {
		case db.workDue[kind] <- struct{}{}:
		default: // they will look
		}
	}
}

// WorkDue receives a value after this replica has made work of a kind due.
func (db *DB) WorkDue(kind tenant.WorkKind) <-chan struct{} { return db.workDue[kind] }

// share is the priority of keys that a caller requests: want, or Bulk if MostInteractive keys of the
// caller are Interactive already.
func share(want, caller string) string {
	return fmt.Sprintf(`CASE WHEN %[1]s::smallint = %[2]d AND (SELECT count(*) FROM (
		SELECT FROM keys p WHERE p.state IN ('creating', 'revoking') AND p.priority = %[2]d AND p.requested_by = %[3]s::text LIMIT %[4]d) few) >= %[4]d
		THEN %[5]d ELSE %[1]s::smallint END`, want, tenant.Interactive, caller, tenant.MostInteractive, tenant.Bulk)
}

// awaited says of an app that a caller waits for it: for the end of unknown keys, or for the ownership
// tag, which precedes new keys.
const awaited = `state IN ('held', 'retained') AND pending AND NOT background
	AND (end_unknown_keys OR state = 'held' AND (tagging OR tagged_purge_after IS NOT NULL))`

// shares are the work of all kinds but keys, each with an index of the rows that is. A share that is last has
// only the turns that no other needs: ownership tags of imports are needed only after a disaster, and may wait.
var shares = []struct {
	kind     tenant.WorkKind
	priority tenant.Priority
	is       string // an index has the rows
	due      string
	order    string
	last     bool
}{
	{kind: tenant.AppWork, priority: tenant.Interactive, is: `state = 'building' AND NOT for_pool`, due: dueApp},
	{kind: tenant.AppWork, priority: tenant.Interactive, is: awaited, due: dueApp},
	{kind: tenant.AdoptionWork, priority: tenant.Interactive, is: `state = 'checking'`, due: dueAdoption},
	{kind: tenant.CampaignWork, priority: tenant.Bulk, is: `ended_at IS NULL`, due: dueCampaign},
	{kind: tenant.ReconciliationWork, priority: tenant.Background, is: `state = 'running'`, due: dueReconciliation},
	{kind: tenant.AppWork, priority: tenant.Background, is: `state = 'building' AND for_pool`, due: dueApp},
	{kind: tenant.AppWork, priority: tenant.Background, is: `state = 'purging'`, due: dueApp},
	{kind: tenant.AppWork, priority: tenant.Background, is: `state IN ('held', 'retained') AND pending AND NOT background`, due: dueApp + ` AND NOT (` + awaited + `)`},
	{kind: tenant.AppWork, priority: tenant.Background, is: `state IN ('held', 'retained') AND pending AND background`, due: dueApp, last: true},
	{kind: tenant.AppWork, priority: tenant.Background, is: `state = 'retained' AND NOT pending`, due: dueApp + ` AND ` + purgeDueAt + ` <= now()`, order: purgeDueAt},
	{kind: tenant.AppWork, priority: tenant.Background, is: `state = 'ready'`, due: dueApp, order: `coalesce(proven_at, ready_at)`},
}

// purgeDueAt is when the removal of a retained app is due.
const purgeDueAt = `greatest(purge_after, next_attempt_at)`

// dueWorkSQL are the statements of DueWork. The cost of one follows the rows that are due, and the callers
// that have keys in work.
var dueWorkSQL = func() map[tenant.WorkKind]string {
	due := map[tenant.WorkKind][]string{tenant.KeyWork: {`
		SELECT k.id::text, c.priority::int, c.requested_by, false, k.next_attempt_at
		FROM callers c, LATERAL (
			SELECT id, next_attempt_at FROM keys k
			WHERE k.state IN ('creating', 'revoking') AND k.priority = c.priority AND k.requested_by = c.requested_by AND ` + dueKey + `
			ORDER BY next_attempt_at LIMIT ($1::int[])[c.priority + 1]) k
		WHERE ($1::int[])[c.priority + 1] > 0`}}
	for i, s := range shares {
		order := s.order
		if order == "" {
			order = "next_attempt_at"
		}
		due[s.kind] = append(due[s.kind], fmt.Sprintf(`
		(SELECT id::text, %[1]d, '%[2]d', %[3]t, %[4]s AS due_at FROM %[5]ss
			WHERE ($1::int[])[%[6]d] > 0 AND %[7]s AND %[8]s ORDER BY %[4]s LIMIT ($1::int[])[%[6]d])`,
			s.priority, i, s.last, order, s.kind, int(s.priority)+1, s.is, s.due))
	}
	statements := map[tenant.WorkKind]string{}
	for kind, parts := range due {
		with := `
	WITH `
		if kind == tenant.KeyWork {
			with = `
	WITH RECURSIVE callers AS (
		(SELECT priority, requested_by FROM keys WHERE state IN ('creating', 'revoking') ORDER BY priority, requested_by LIMIT 1)
		UNION ALL
		SELECT next.* FROM callers c, LATERAL (
			SELECT priority, requested_by FROM keys k
			WHERE state IN ('creating', 'revoking') AND (k.priority, k.requested_by) > (c.priority, c.requested_by)
			ORDER BY priority, requested_by LIMIT 1) next
	), `
		}
		statements[kind] = with + `due (id, priority, share, last, due_at) AS (` + strings.Join(parts, " UNION ALL ") + `
	), turns AS (
		SELECT *, row_number() OVER (PARTITION BY priority, share ORDER BY due_at) AS turn FROM due
	), places AS (
		-- By chance: if one slot is free at a time, the share of the oldest row would have all.
		SELECT *, row_number() OVER (PARTITION BY priority ORDER BY last, turn, random()) AS place FROM turns
	)
	SELECT id, priority, share FROM places WHERE place <= ($1::int[])[priority + 1] ORDER BY priority, place`
	}
	return statements
}()

// DueWork lists rows of a kind that are due, by priority: at most as many of each as slots says. Among
// the rows of a priority, its shares take turns: each caller's keys, and each other sort of work. Each kind
// has a statement of its own, so that a locked table stops no other kind.
func (db *DB) DueWork(ctx context.Context, kind tenant.WorkKind, slots [tenant.Priorities]int) ([]tenant.DueWork, error) {
	rows, _ := db.pool.Query(ctx, dueWorkSQL[kind], slots[:])
	due, err := pgx.CollectRows(rows, pgx.RowToStructByPos[tenant.DueWork])
	return due, translate("find "+string(kind)+"s that are due", err)
}

// inWork says of a row of a kind that its lease may be released or its attempt recorded.
var inWork = map[tenant.WorkKind]string{
	tenant.AppWork:            `state IN ('building', 'purging', 'held', 'retained', 'ready')`,
	tenant.KeyWork:            `state IN ('creating', 'revoking')`,
	tenant.AdoptionWork:       `state = 'checking'`,
	tenant.ReconciliationWork: `state = 'running'`,
	tenant.CampaignWork:       `true`,
}

// SetBack records a failed attempt on a leased row, and releases the lease.
func (db *DB) SetBack(ctx context.Context, l tenant.Lease, s tenant.Setback) error {
	const setBack = `
		SET problem = $3::jsonb || jsonb_build_object('next_attempt_at', now() + $4::interval),
			next_attempt_at = now() + $4::interval, attempts = attempts + $5::int, leased_until = '-infinity'`
	sql := `UPDATE ` + string(l.Kind) + `s` + setBack
	args := []any{l.ID, l.Until, s.Problem, s.Delay, count(s.Counts)}
	const where = ` WHERE id = $1 AND leased_until = $2 AND `
	switch l.Kind {
	case tenant.AppWork: // and the key that is being created with it
		sql = `
			WITH key AS (
				UPDATE keys SET in_doubt_since = NULL, updated_at = now()
				FROM apps WHERE $6 AND apps.id = $1 AND apps.leased_until = $2 AND keys.app_id = $1 AND keys.state = 'creating'
			)` + sql + `, in_doubt_since = CASE WHEN $6 THEN NULL ELSE in_doubt_since END, updated_at = now()`
		args = append(args, s.Settled)
	case tenant.KeyWork:
		sql += `, in_doubt_since = CASE WHEN $6 THEN NULL ELSE in_doubt_since END, updated_at = now()`
		args = append(args, s.Settled)
	}
	tag, err := db.pool.Exec(ctx, sql+where+inWork[l.Kind], args...)
	return oneRow("record failed attempt on "+string(l.Kind), tag, err)
}

// Release releases the lease of a row, which is due again after delay. Nothing has failed.
func (db *DB) Release(ctx context.Context, l tenant.Lease, delay time.Duration) error {
	tag, err := db.pool.Exec(ctx, `
		UPDATE `+string(l.Kind)+`s SET next_attempt_at = now() + $3, leased_until = '-infinity' WHERE id = $1 AND leased_until = $2`,
		l.ID, l.Until, delay)
	return oneRow("release "+string(l.Kind), tag, err)
}

// MakeAuditPartitions makes the partitions of the audit log for the months ahead.
func (db *DB) MakeAuditPartitions(ctx context.Context) error {
	_, err := db.pool.Exec(ctx, `SELECT audit_events_make_partitions(3)`)
	return translate("make audit partitions", err)
}
