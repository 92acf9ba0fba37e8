package postgres

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/tenant"
)

// maxRenewEvery is how often the control record is renewed. While an incarnation watches, it
// reads the record twice as often. A shorter watch shortens both.
const maxRenewEvery = time.Minute

// renewEvery leaves two renewals in a watch, and a margin.
func (db *DB) renewEvery() time.Duration { return min(maxRenewEvery, db.recoveryWatch*2/5) }

// controlDue says that a turn is due: its time has come, or the replica that wrote the control
// record has registered here, which ends a watch.
const controlDue = `(control_due_at <= now() OR coalesce(recovery, '') IN ('watching', 'stopped') AND EXISTS (
	SELECT FROM replicas r WHERE r.id::text = record->>'replica' AND r.incarnation = current_incarnation.id))`

// LeaseControl acquires the turn to read and write the control record, and raises its
// sequence number unless this database only watches. It reports tenant.NotFound if no turn is
// due, unless force is set. After a turn that is neither used nor deferred, the next turn is due
// at its normal time.
func (db *DB) LeaseControl(ctx context.Context, force bool) (tenant.ControlTurn, error) {
	var t tenant.ControlTurn
	var err error
	t.Recovery, err = scanRecovery(db.pool.QueryRow(ctx, `
		UPDATE current_incarnation
		SET seq = CASE WHEN recovery IN ('watching', 'stopped') THEN seq ELSE seq + 1 END, `+written+`,
			control_due_at = now() + CASE WHEN recovery = 'watching' THEN $1::interval / 4 ELSE $1::interval END
		WHERE (`+controlDue+` OR $2) AND `+sameDatabase+`
		RETURNING `+recoveryColumns+`, seq, coalesce((SELECT id FROM audit_events ORDER BY id DESC LIMIT 1), 0)`, db.renewEvery(), force), &t.Seq, &t.Event)
	if errors.Is(err, pgx.ErrNoRows) {
		return t, errNotFound("turn")
	}
	t.Replica = db.replica
	return t, translate("acquire control turn", err)
}

// ExamineControl compares the control record, as read in a turn, with the rows, and reports
// whether the record must be written in this turn. Record is nil if there is none. It changes
// recovery mode accordingly, and starts the next incarnation if these rows cannot have written
// the record.
func (db *DB) ExamineControl(ctx context.Context, t tenant.ControlTurn, record *tenant.ControlRecord) (is tenant.Recovery, write bool, err error) {
	var behind string
	err = db.inTx(ctx, func(tx pgx.Tx) (err error) {
		write, behind = false, ""
		w := watch{record: record}
		if w.was, err = scanRecovery(tx.QueryRow(ctx, `
			SELECT `+recoveryColumns+`, seq, record_renewals, claim_record, coalesce(watch_until <= now(), false), record IS NOT NULL FROM current_incarnation FOR UPDATE`),
			&w.seq, &w.renewals, &w.claim, &w.over, &w.read); err != nil {
			return err
		}
		if is = w.was; w.was.Incarnation != t.Incarnation { // the next incarnation has begun
			return nil
		}
		if (is.State == tenant.Watching || is.State == tenant.Stopped) && is.ControlProblem != nil {
			// These states only read the record, and it has been read.
			if w.was, err = scanRecovery(tx.QueryRow(ctx, `UPDATE current_incarnation SET control_problem = NULL, `+written+` RETURNING `+recoveryColumns)); err != nil {
				return err
			}
			is = w.was
		}
		if record != nil {
			if err := w.compare(ctx, tx); err != nil {
				return err
			}
		}
		switch {
		case w.was.State == tenant.Watching:
			is, err = db.watched(ctx, tx, w)
			return err
		case w.was.State == tenant.Stopped:
			if w.registered {
				is, err = moveRecovery(ctx, tx, w.was, tenant.Recovering, tenant.Actor{Name: "worker"},
					"the replica that renewed the control record of the other database has moved here")
			}
			return err
		case w.unknown != "" && !w.claim:
			behind = w.unknown
			return nil
		}
		write = true
		return nil
	})
	if err != nil {
		return is, false, translate("compare control record", err)
	}
	if behind != "" {
		if _, _, err := db.nextIncarnation(ctx, cause{of: t.Incarnation, reason: "the control record was written by another database, or before a rollback of this database",
			lost: behind, event: record.EventID()}); err != nil {
			return is, false, err
		}
		is, err = db.Recovery(ctx)
		return is, false, err
	}
	return is, write, nil
}

// A watch has what an incarnation knows about the control record.
type watch struct {
	was      tenant.Recovery
	record   *tenant.ControlRecord // as it is now; nil if there is none
	seq      int64                 // of the rows
	renewals int                   // by another database
	claim    bool
	over     bool // the record was not renewed during the whole watch
	read     bool // before

	unknown    string // why these rows cannot have written the record; empty if they can
	missing    bool   // the event that the record names is not in the database
	registered bool   // the replica that wrote the record serves this database in this incarnation
}

// compare compares the record with the rows.
func (w *watch) compare(ctx context.Context, tx pgx.Tx) error {
	var known bool
	err := tx.QueryRow(ctx, `
		SELECT EXISTS (SELECT FROM incarnations WHERE id::text = $1),
			EXISTS (SELECT FROM replicas WHERE id::text = $2 AND incarnation = $3),
			$4::bigint > 0 AND NOT EXISTS (SELECT FROM audit_events WHERE id = $4)`,
		w.record.Incarnation, w.record.Replica, w.was.Incarnation, w.record.EventID()).Scan(&known, &w.registered, &w.missing)
	switch {
	case err != nil:
		return err
	case !known:
		w.unknown = fmt.Sprintf("the control record names the incarnation %.36q, which is not in the database", w.record.Incarnation)
	case w.record.Incarnation == w.was.Incarnation.String() && w.record.SeqNumber() > w.seq:
		w.unknown = fmt.Sprintf("the control record has the sequence number %d, but the database has %d", w.record.SeqNumber(), w.seq)
	}
	return nil
}

// watched decides about recovery mode after one read of the record during a watch.
func (db *DB) watched(ctx context.Context, tx pgx.Tx, w watch) (tenant.Recovery, error) {
	lost := w.was.Lost
	switch {
	case lost != "":
	case w.unknown != "":
		lost = w.unknown
	case w.missing:
		lost = fmt.Sprintf("the control record names the audit event %d, which is not in the database", w.record.EventID())
	case w.over && !w.registered && w.was.Reason == restored && (w.record == nil || w.record.Stopped != "true"):
		lost = "the database was restored or copied, and no replica that ran before is left to report what is missing"
	}
	renewed := w.read && w.record != nil && *w.record != w.was.Record
	if renewed {
		w.renewals++
	}
	row, err := scanRecovery(tx.QueryRow(ctx, `
		UPDATE current_incarnation
		SET record = $1, record_renewals = $2, lost = $3, `+written+`,
			watch_until = CASE WHEN $4 THEN now() + $5::interval ELSE watch_until END
		RETURNING `+recoveryColumns, w.record, w.renewals, lost, renewed || !w.read && w.record != nil, db.recoveryWatch))
	if err != nil {
		return row, err
	}
	if w.record != nil && w.record.EventID() > 0 { // or a follower of the other database would not notice
		if _, err := tx.Exec(ctx, `SELECT setval('audit_events_id_seq', $1::bigint + $2::bigint) FROM audit_events_id_seq WHERE last_value <= $1`,
			w.record.EventID(), eventJump); err != nil {
			return row, err
		}
	}
	stopped := w.record != nil && w.record.Stopped == "true"
	worker := tenant.Actor{Name: "worker"}
	switch {
	case w.renewals >= 2:
		return moveRecovery(ctx, tx, row, tenant.Stopped, worker, "another database renews the control record")
	case renewed || !w.registered && !stopped && !w.over:
		return row, nil
	case lost != "":
		return moveRecovery(ctx, tx, row, tenant.Recovering, worker, lost)
	}
	return moveRecovery(ctx, tx, row, tenant.NotRecovering, worker, "no transaction is known to be lost")
}

// moveRecovery moves recovery mode to another state. Once it is no longer watching or
// stopped, this database owns the control record and writes it at once.
func moveRecovery(ctx context.Context, tx pgx.Tx, was tenant.Recovery, to tenant.RecoveryState, actor tenant.Actor, why string) (tenant.Recovery, error) {
	is, err := scanRecovery(tx.QueryRow(ctx, `
		UPDATE current_incarnation
		SET recovery = nullif($1, ''), recovery_since = CASE WHEN $1 <> '' THEN coalesce(recovery_since, now()) END, `+written+`,
			lost = CASE WHEN $1 = '' THEN '' WHEN lost = '' AND $1 <> 'stopped' THEN $2 ELSE lost END, record_renewals = 0,
			watch_until = NULL, claim_record = $1 <> 'stopped' AND (claim_record OR recovery IN ('watching', 'stopped')),
			control_due_at = CASE WHEN $1 = 'stopped' THEN control_due_at ELSE '-infinity' END
		RETURNING `+recoveryColumns, to, why))
	if err != nil {
		return is, err
	}
	action := "recovery." + string(to)
	if to == tenant.NotRecovering {
		action = "recovery.ended"
	}
	return is, audit(ctx, tx, actor, event{action: action, detail: map[string]any{"incarnation": is.Incarnation, "from": was.State, "reason": why}})
}

// DeferControl makes the next turn due after delay at the latest, since this turn failed.
func (db *DB) DeferControl(ctx context.Context, t tenant.ControlTurn, delay time.Duration) error {
	_, err := db.pool.Exec(ctx, `
		UPDATE current_incarnation SET control_due_at = least(control_due_at, now() + $2::interval), `+written+`
		WHERE id = $1 AND `+sameDatabase, t.Incarnation, delay)
	return translate("defer control turn", err)
}

// ControlWritten records that the control record was written in a turn. If it could not be read or
// written, problem says why.
func (db *DB) ControlWritten(ctx context.Context, t tenant.ControlTurn, problem *tenant.Problem) error {
	_, err := db.pool.Exec(ctx, `
		UPDATE current_incarnation
		SET control_seen_at = CASE WHEN $2::jsonb IS NULL THEN now() ELSE control_seen_at END, control_problem = $2,
			claim_record = claim_record AND $2 IS NOT NULL, `+written+`
		WHERE id = $1 AND `+sameDatabase, t.Incarnation, problem)
	db.wakeWorkers(tenant.WorkKinds...) // the first builds wait for this
	return translate("record that the control record was written", err)
}

// BeginRecovery starts the next incarnation because a person says that the database was
// rolled back. It waits for hand-outs in flight.
func (db *DB) BeginRecovery(ctx context.Context, reason string, actor tenant.Actor) (tenant.Recovery, error) {
	if err := db.ensureIncarnation(ctx); err != nil && !errors.Is(err, tenant.ErrAnotherDatabase) {
		return tenant.Recovery{}, err
	}
	was, err := db.Recovery(ctx)
	if err != nil {
		return was, err
	}
	is, began, err := db.nextIncarnation(ctx, cause{of: was.Incarnation, reason: "begun by hand: " + reason, lost: reason, actor: actor})
	if err != nil {
		return was, err
	}
	if !began {
		return was, tenant.Errorf(tenant.Conflict, "incarnation_changed", "the next incarnation has just begun for another reason; run `tenantry recover show` before another attempt")
	}
	return is, nil
}

// errWatching is the error of a command that must not run in a copy.
func errWatching(is tenant.Recovery) error {
	return tenant.Errorf(tenant.Conflict, "recovery_watching", "it is not known until %s whether another database is in use; see docs/recovery.md",
		is.WatchUntil.UTC().Format(time.RFC3339))
}

// EndRecovery ends recovery mode. It reports tenant.Conflict while it is not known whether
// another database is in use.
func (db *DB) EndRecovery(ctx context.Context, actor tenant.Actor) (tenant.Recovery, error) {
	return db.changeRecovery(ctx, "end recovery", func(tx pgx.Tx, was tenant.Recovery) (tenant.Recovery, error) {
		switch was.State {
		case tenant.NotRecovering:
			return was, nil
		case tenant.Watching:
			return was, errWatching(was)
		case tenant.Stopped:
			return was, tenant.Errorf(tenant.Conflict, "another_database", "another database of this deployment is in use; see docs/recovery.md")
		}
		return moveRecovery(ctx, tx, was, tenant.NotRecovering, actor, "ended by hand")
	})
}

// TakeOver makes this database the one in use, in recovery mode.
func (db *DB) TakeOver(ctx context.Context, actor tenant.Actor) (tenant.Recovery, error) {
	return db.changeRecovery(ctx, "take over", func(tx pgx.Tx, was tenant.Recovery) (tenant.Recovery, error) {
		if was.State != tenant.Stopped && was.State != tenant.Watching {
			return was, tenant.Errorf(tenant.Conflict, "not_stopped", "this database is in use already: there is nothing to take over")
		}
		return moveRecovery(ctx, tx, was, tenant.Recovering, actor, "taken over by hand from another database")
	})
}

func (db *DB) changeRecovery(ctx context.Context, what string, change func(pgx.Tx, tenant.Recovery) (tenant.Recovery, error)) (is tenant.Recovery, err error) {
	if err := db.ensureIncarnation(ctx); err != nil && !errors.Is(err, tenant.ErrAnotherDatabase) {
		return is, err
	}
	err = db.inTx(ctx, func(tx pgx.Tx) error {
		was, err := scanRecovery(tx.QueryRow(ctx, `SELECT `+recoveryColumns+` FROM current_incarnation FOR UPDATE`))
		if err != nil {
			return err
		}
		is, err = change(tx, was)
		return err
	})
	db.wakeFollowers()
	return is, translate(what, err)
}

// RecoveryStatus is Recovery, with counts of the work that waits for its end. Outside recovery mode no
// work waits, and none is counted.
func (db *DB) RecoveryStatus(ctx context.Context) (tenant.Recovery, error) {
	var report *uuid.UUID
	var undecided, removals, campaigns, keys int
	var done bool
	r, err := scanRecovery(db.pool.QueryRow(ctx, `
		WITH report AS `+findingsReport+`
		SELECT `+recoveryColumns+`, (SELECT report.id FROM report),
			EXISTS (SELECT FROM report JOIN reconciliations USING (id) WHERE state = 'done'),
			(SELECT count(*) FROM reconciliation_items i JOIN report ON report.id = i.reconciliation_id WHERE i.action = 'decide' AND i.state = 'open'),
			CASE WHEN recovery IS NULL THEN 0 ELSE (SELECT count(*) FROM apps a WHERE a.state = 'retained' AND a.purge_after <= now())
				+ (SELECT count(*) FROM apps a WHERE a.state = 'purging' AND a.tenant_id IS NOT NULL) END,
			CASE WHEN recovery IS NULL THEN 0 ELSE (SELECT count(*) FROM campaigns WHERE ended_at IS NULL) END,
			CASE WHEN recovery IS NULL THEN 0 ELSE (SELECT count(*) FROM keys k JOIN apps a ON a.id = k.app_id
				WHERE k.state = 'creating' AND k.incarnation <> current_incarnation.id AND a.state = 'held') END
		FROM current_incarnation`), &report, &done, &undecided, &removals, &campaigns, &keys)
	if report != nil {
		r.Report = *report
	}
	r.ReportDone, r.Undecided = done, undecided
	r.Waiting = tenant.RecoveryWaiting{Removals: removals, Campaigns: campaigns, Keys: keys}
	return r, translate("read recovery mode", err)
}
