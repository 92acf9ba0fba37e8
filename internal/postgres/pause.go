package postgres

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/tenant"
)

// manualPause is the pause by an operator, as tenant.UpstreamPause has it in JSON; null if there is none.
const manualPause = `(SELECT to_jsonb(p) - 'one' FROM manual_pause p)`

// workPaused says that an operator has paused all work at Clarifai, and removalsPaused that an operator has
// paused removals, or all work.
const (
	workPaused     = `EXISTS (SELECT FROM manual_pause WHERE scope = 'all')`
	removalsPaused = `EXISTS (SELECT FROM manual_pause)`
)

// pauseProblem is the problem of removals that an operator has paused, alone or with all other work; null
// if they are not paused.
const pauseProblem = `(SELECT jsonb_build_object('code', CASE scope WHEN 'all' THEN '` + tenant.WorkPaused + `' ELSE '` + tenant.RemovalsPaused + `' END, 'since', since, 'detail',
		CASE scope WHEN 'all' THEN 'an operator has paused all work at Clarifai' ELSE 'an operator has paused removals' END
		|| ' until tenantry upstream resume: ' || reason) FROM manual_pause)`

// workProblem is pauseProblem of all other work.
const workProblem = `(SELECT problem FROM ` + pauseProblem + ` AS paused (problem) WHERE ` + workPaused + `)`

// noRemoval is the key of the advisory lock that the beginning of a removal holds. With it, no removal of a tenant's app begins
// after PauseUpstream has returned.
const noRemoval = `SELECT pg_advisory_xact_lock(hashtext('purge apps'))`

// PauseUpstream pauses work at Clarifai until ResumeUpstream, or changes the pause that there is. Calls
// that have their permit are still made. It returns the pause, and reports whether that is news.
func (db *DB) PauseUpstream(ctx context.Context, scope tenant.PauseScope, reason string, actor tenant.Actor) (p tenant.UpstreamPause, changed bool, err error) {
	err = db.inTx(ctx, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, noRemoval); err != nil {
			return err
		}
		was, err := pauseOf(ctx, tx)
		if err != nil {
			return err
		}
		if p = was; was.Scope == scope && was.Reason == reason {
			return nil
		}
		changed = true
		if err := tx.QueryRow(ctx, `
			INSERT INTO manual_pause AS p (scope, reason, paused_by) VALUES ($1, $2, $3)
			ON CONFLICT (one) DO UPDATE SET scope = excluded.scope, reason = excluded.reason, paused_by = excluded.paused_by,
				since = CASE WHEN p.scope = excluded.scope THEN p.since ELSE now() END
			RETURNING to_jsonb(p) - 'one'`, scope, reason, actor.Name).Scan(&p); err != nil {
			return err
		}
		// Permits that were reserved are void.
		if _, err := tx.Exec(ctx, `UPDATE upstream_budget SET epoch = epoch + 1 WHERE $1::text = 'all'`, scope); err != nil {
			return err
		}
		return audit(ctx, tx, actor, event{action: "upstream.paused", detail: map[string]any{"scope": scope, "reason": reason}})
	})
	return p, changed, translate("pause upstream work", err)
}

// ResumeUpstream ends the pause of an operator. It returns the pause; its Scope is empty if there was none.
func (db *DB) ResumeUpstream(ctx context.Context, actor tenant.Actor) (was tenant.UpstreamPause, err error) {
	err = db.inTx(ctx, func(tx pgx.Tx) error {
		if was, err = pauseOf(ctx, tx); err != nil || was.Scope == "" {
			return err
		}
		if _, err := tx.Exec(ctx, `DELETE FROM manual_pause`); err != nil {
			return err
		}
		return audit(ctx, tx, actor, event{action: "upstream.resumed",
			detail: map[string]any{"scope": was.Scope, "reason": was.Reason, "paused_by": was.By, "paused_at": was.Since}})
	})
	if err == nil {
		db.wakeWorkers(tenant.WorkKinds...)
	}
	return was, translate("resume upstream work", err)
}

// pauseOf reads the pause of an operator, and locks it.
func pauseOf(ctx context.Context, tx pgx.Tx) (p tenant.UpstreamPause, err error) {
	err = tx.QueryRow(ctx, `SELECT to_jsonb(p) - 'one' FROM manual_pause p FOR UPDATE`).Scan(&p)
	if errors.Is(err, pgx.ErrNoRows) {
		return p, nil
	}
	return p, err
}
