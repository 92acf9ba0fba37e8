package postgres

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/tenantry/tenantry/internal/tenant"
)

// An incarnation is one uninterrupted life of the database. After a restart, failover,
// restore or copy, rows may say `ready` for apps that have a tenant by now. Nothing can
// prove that such an app is still free, so each statement that hands out or begins an app
// uses only the current incarnation. It does not depend on the memory of a replica.

// sameDatabase compares the fingerprint of the row of current_incarnation with the live
// values. xmin differs from written_by if the row was loaded by a data-only restore.
const sameDatabase = `server_started_at = pg_postmaster_start_time() AND apps_file = pg_relation_filepath('apps') AND xmin = written_by`

// currentIncarnation is the current incarnation; null if the fingerprint of the database has
// changed since it began, or if the database was stopped because another one is in use.
const currentIncarnation = `(SELECT id FROM current_incarnation WHERE ` + sameDatabase + ` AND recovery IS DISTINCT FROM 'stopped')`

// handOut is the CTE `incarnation` of a statement that hands out apps. A crash of one backend
// restarts the server and keeps its fingerprint, so a hand-out must be on disk when it is
// acknowledged. The CTE raises synchronous_commit from off to local.
const handOut = `incarnation AS MATERIALIZED (
		SELECT id, CASE WHEN current_setting('synchronous_commit') = 'off' THEN set_config('synchronous_commit', 'local', true) END AS durable
		FROM current_incarnation WHERE ` + sameDatabase + ` AND recovery IS DISTINCT FROM 'stopped'
	)`

// inRecovery says that the database is in recovery mode; watching says that it is not known
// yet whether another database is in use. Both hold, too, before anybody has noticed that the
// fingerprint has changed.
const (
	inRecovery = `EXISTS (SELECT FROM current_incarnation WHERE recovery IS NOT NULL OR NOT (` + sameDatabase + `))`
	watching   = `EXISTS (SELECT FROM current_incarnation WHERE recovery = 'watching' OR NOT (` + sameDatabase + `))`
)

// written stamps a row version of current_incarnation. Every update of the table must set it.
const written = `written_by = pg_current_xact_id()::xid`

// recoveryProblem is the problem of work that waits for the end of recovery mode; null
// outside recovery mode.
const recoveryProblem = `(SELECT jsonb_build_object('code', 'recovery', 'since', recovery_since, 'detail', CASE recovery
		WHEN 'watching' THEN 'the database is another than before; until it is known whether the other one is still in use, this waits'
		WHEN 'stopped' THEN 'another database of this deployment is in use, and this one does no work at Clarifai'
		ELSE 'the database is in recovery mode: what was lost must be decided first; see tenantry recover show' END)
	FROM current_incarnation WHERE recovery IS NOT NULL)`

// eventJump is how far the ids of audit events jump at the beginning of an incarnation, so
// that clients which follow the log by id notice.
const eventJump = 1_000_000

type querier interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

const recoveryColumns = `id, began_at, coalesce(recovery, ''), recovery_since, recovery_reason, lost, watch_until, record, control_seen_at, control_problem`

func scanRecovery(row pgx.Row, also ...any) (tenant.Recovery, error) {
	var r tenant.Recovery
	var since, until, seen *time.Time
	var record *tenant.ControlRecord
	err := row.Scan(append([]any{&r.Incarnation, &r.BeganAt, &r.State, &since, &r.Reason, &r.Lost, &until, &record, &seen, &r.ControlProblem}, also...)...)
	r.Since, r.WatchUntil, r.ControlSeenAt = orZero(since), orZero(until), orZero(seen)
	if record != nil {
		r.Record = *record
	}
	return r, err
}

// Recovery reads the current incarnation and its recovery mode.
func (db *DB) Recovery(ctx context.Context) (tenant.Recovery, error) {
	r, err := scanRecovery(db.pool.QueryRow(ctx, `SELECT `+recoveryColumns+` FROM current_incarnation`))
	return r, translate("read recovery mode", err)
}

// A Health says what the database can be used for.
type Health struct {
	Recovery tenant.Recovery
	Pause    tenant.UpstreamPause // by an operator
	ReadOnly bool                 // it takes no change
}

// Health reads the health of the database over a connection as requests use it.
func (db *DB) Health(ctx context.Context) (Health, error) {
	var h Health
	var err error
	var pause *tenant.UpstreamPause
	h.Recovery, err = scanRecovery(db.pool.QueryRow(ctx, `
		SELECT `+recoveryColumns+`, current_setting('transaction_read_only')::boolean, `+manualPause+` FROM current_incarnation`), &h.ReadOnly, &pause)
	if pause != nil {
		h.Pause = *pause
	}
	if err == nil && h.ReadOnly && !db.sessions.standby {
		// A session stays read-only when the database is not any more. Without writes, which fail, no
		// statement would replace it.
		db.pool.Reset()
	}
	return h, translate("check database", err)
}

// ensureIncarnation starts the next incarnation if the fingerprint of the database has
// changed. It reports tenant.ErrAnotherDatabase if this database was stopped.
func (db *DB) ensureIncarnation(ctx context.Context) error {
	var same, stopped bool
	err := db.pool.QueryRow(ctx, `SELECT `+sameDatabase+`, recovery IS NOT DISTINCT FROM 'stopped' FROM current_incarnation`).Scan(&same, &stopped)
	switch {
	case err != nil:
		return translate("compare incarnation", err)
	case !same:
		_, _, err := db.nextIncarnation(ctx, cause{})
		return err
	case stopped:
		return tenant.ErrAnotherDatabase
	}
	return nil
}

// A cause is why the next incarnation starts. The zero cause is a new fingerprint.
type cause struct {
	of     uuid.UUID // the incarnation that ends; if it has ended already, nothing happens without a new fingerprint
	reason string
	lost   string // what shows that transactions were lost; empty if nothing does
	event  int64  // the highest id of an audit event that is known; 0 for none
	actor  tenant.Actor
}

// restored is the reason of an incarnation that began because the table apps has another file.
const restored = "the database, or its table apps, was restored, copied or rewritten"

// nextIncarnation starts the next incarnation, in recovery mode, and returns it. It reports false if another
// replica was first. Without a new fingerprint it waits for hand-outs in flight.
func (db *DB) nextIncarnation(ctx context.Context, c cause) (next tenant.Recovery, began bool, err error) {
	start := func(tx pgx.Tx) error {
		began = false
		if c.of != uuid.Nil {
			// Sign-ups queue behind this lock, for the lock timeout at most.
			if _, err := tx.Exec(ctx, `LOCK TABLE apps IN SHARE ROW EXCLUSIVE MODE`); err != nil {
				return err
			}
		}
		var same bool
		var was uuid.UUID
		var server, file bool
		if err := tx.QueryRow(ctx, `
			SELECT id, `+sameDatabase+`, server_started_at <> pg_postmaster_start_time(), apps_file <> pg_relation_filepath('apps')
			FROM current_incarnation FOR UPDATE`).Scan(&was, &same, &server, &file); err != nil {
			return err
		}
		if same && c.of != was {
			return nil
		}
		reason := c.reason
		switch {
		case same:
		case server:
			reason = "the database server was restarted, failed over or replaced"
		case file:
			reason = restored
		default:
			reason = "the rows of the database were loaded again or changed by hand"
		}
		began = true
		next, err = db.startIncarnation(ctx, tx, was, reason, c)
		return err
	}
	for {
		err = db.inTx(ctx, start)
		pg, ok := errors.AsType[*pgconn.PgError](err)
		if !ok || pg.Code != "55P03" || ctx.Err() != nil { // lock_not_available: let waiting transactions continue, and retry
			break
		}
	}
	if began && err == nil {
		db.wakeFollowers()
	}
	return next, began && err == nil, translate("start incarnation", err)
}

func (db *DB) startIncarnation(ctx context.Context, tx pgx.Tx, was uuid.UUID, reason string, c cause) (next tenant.Recovery, err error) {
	if c.actor.Name == "" {
		c.actor.Name = "worker"
	}
	if _, err := tx.Exec(ctx, `
		SELECT setval('audit_events_id_seq', greatest((SELECT last_value FROM audit_events_id_seq),
			coalesce((SELECT id FROM audit_events ORDER BY id DESC LIMIT 1), 0), $1) + $2)`, c.event, eventJump); err != nil {
		return next, err
	}
	if next, err = scanRecovery(tx.QueryRow(ctx, `
		WITH next AS (INSERT INTO incarnations (reason) VALUES ($1) RETURNING id AS next)
		UPDATE current_incarnation c
		SET id = next, server_started_at = pg_postmaster_start_time(), apps_file = pg_relation_filepath('apps'), `+written+`,
			began_at = now(), retiring = true, recovery = 'watching', recovery_since = now(), recovery_reason = $1, lost = CASE WHEN $2 = '' THEN c.lost ELSE $2 END,
			watch_until = now() + $3::interval, record = NULL, record_renewals = 0, claim_record = false, control_due_at = '-infinity'
		FROM next RETURNING `+recoveryColumns, reason, c.lost, db.recoveryWatch)); err != nil {
		return next, err
	}
	// The clock of the server before may have been ahead: its pauses must not delay calls.
	if _, err := tx.Exec(ctx, `
		UPDATE upstream_budget SET paused_until = least(paused_until, clock_timestamp() + interval '30 seconds'),
			probe_until = least(probe_until, clock_timestamp() + interval '30 seconds')`); err != nil {
		return next, err
	}
	// A decision about the rows of an earlier incarnation may be wrong now: the next report asks again.
	if _, err := tx.Exec(ctx, `
		UPDATE reconciliation_items SET state = 'skipped', ended_at = now(), note = 'the next incarnation of the database began first'
		WHERE state = 'decided'`); err != nil {
		return next, err
	}
	return next, audit(ctx, tx, c.actor, event{action: "incarnation.began", detail: map[string]any{"id": next.Incarnation, "after": was, "reason": reason, "lost": c.lost}})
}

// reportLoss records that transactions which a replica has seen are missing. If they were
// seen in the current incarnation, it starts the next one.
func (db *DB) reportLoss(ctx context.Context, seenIn uuid.UUID, event int64) error {
	lost := fmt.Sprintf("audit event %d was read by a replica and is not in the database", event)
	_, began, err := db.nextIncarnation(ctx, cause{of: seenIn, reason: "the database was rolled back", lost: lost, event: event})
	if err != nil || began {
		return err
	}
	_, err = db.pool.Exec(ctx, `
		WITH lost AS (
			UPDATE current_incarnation SET `+written+`, lost = $1, recovery = coalesce(recovery, 'recovering'), recovery_since = coalesce(recovery_since, now())
			WHERE lost = '' AND `+sameDatabase+` RETURNING id, recovery
		)
		INSERT INTO audit_events (actor, action, detail)
		SELECT 'worker', 'recovery.' || recovery, jsonb_build_object('incarnation', id, 'reason', $1::text) FROM lost`, lost)
	return translate("record lost transactions", err)
}

// RetireApps marks the unassigned apps of earlier incarnations as retired: they are never
// handed out, and removed only if a person names them. It skips an app that a worker has
// leased: that worker retires it. It returns the number of marked apps.
func (db *DB) RetireApps(ctx context.Context) (int, error) {
	var n int
	err := db.inTx(ctx, func(tx pgx.Tx) error {
		if err := tx.QueryRow(ctx, `
			WITH old AS (
				SELECT id FROM apps WHERE (state = 'ready' OR state = 'building' OR state = 'purging') AND tenant_id IS NULL
					AND incarnation <> `+currentIncarnation+` AND (state = 'ready' OR leased_until < now())
				LIMIT 1000 FOR UPDATE SKIP LOCKED
			), retired AS (
				UPDATE apps a
				SET state = 'retired', removal_confirmed = false, attempts = 0, problem = NULL, leased_until = '-infinity', updated_at = now()
				FROM old WHERE a.id = old.id RETURNING a.id
			), audited AS (
				INSERT INTO audit_events (actor, action, detail)
				SELECT 'worker', 'apps.retired', jsonb_build_object('count', count(*), 'apps', jsonb_agg(id)) FROM retired HAVING count(*) > 0
			)
			SELECT count(*) FROM retired`).Scan(&n); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, `
			UPDATE current_incarnation c SET retiring = false, `+written+` WHERE retiring AND `+sameDatabase+` AND NOT EXISTS (
				SELECT FROM apps WHERE (state = 'ready' OR state = 'building' OR state = 'purging') AND tenant_id IS NULL AND incarnation <> c.id)`)
		return err
	})
	return n, translate("retire apps", err)
}
