package postgres

import (
	"cmp"
	"context"
	"errors"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/tenant"
)

const (
	// replicaTimeout is how long a replica may be alive after it was last seen.
	replicaTimeout = 15 * time.Second
	// leaseTimeout is when the leases of a replica are free that was not seen since. If it is alive
	// after all, two workers may do the same work, which is harmless.
	leaseTimeout = 4 * time.Second
	// beatEvery is how old the last registration is at least before the next.
	beatEvery = 500 * time.Millisecond
	// A clock of the database that is behind by less is not corrected.
	maxClockStep = 2 * time.Second
)

// liveReplica says of the replica p that it is alive. The interval is replicaTimeout.
const liveReplica = `p.last_seen_at > now() - interval '15 seconds'`

// leasedWork are the rows that workers lease, by the indexes of what there is work on.
var leasedWork = []struct{ table, is string }{
	{"apps", `state = 'building'`},
	{"apps", `state = 'purging'`},
	{"apps", `state IN ('held', 'retained') AND pending`},
	{"keys", `state IN ('creating', 'revoking')`},
	{"adoptions", `state = 'checking'`},
	{"reconciliations", `state = 'running'`},
	{"campaigns", `ended_at IS NULL`},
}

// Beat registers this replica with the fingerprint of its PAT, starts the next incarnation if the
// fingerprint of the database has changed, frees the leases of replicas that have died, removes
// rejected PATs that no live replica uses, and returns the state of recovery.
func (db *DB) Beat(ctx context.Context, pat []byte) (tenant.Beat, error) {
	if err := db.ensureIncarnation(ctx); err != nil && !errors.Is(err, tenant.ErrAnotherDatabase) {
		return tenant.Beat{}, err
	}
	var b tenant.Beat
	var err error
	if b.ClockStep, err = db.correctClock(ctx); err != nil {
		return b, err
	}
	// A replica that registers here after a failover ends the watch, so first its follower must have
	// looked for the events that it had read.
	var compared *uuid.UUID
	if db.follows.Load() {
		compared = cmp.Or(db.compared.Load(), &uuid.Nil)
	}
	var died []uuid.UUID
	var pause *tenant.UpstreamPause
	b.Recovery, err = scanRecovery(db.pool.QueryRow(ctx, `
		WITH seen AS (
			INSERT INTO replicas AS r (id, incarnation, pat)
			SELECT $1, CASE WHEN coalesce($3, id) = id THEN id ELSE coalesce((SELECT incarnation FROM replicas WHERE id = $1), $3) END, $5 FROM current_incarnation
			ON CONFLICT (id) DO UPDATE SET incarnation = excluded.incarnation, pat = excluded.pat, last_seen_at = now(), leases_freed = false
			WHERE r.incarnation <> excluded.incarnation OR r.pat IS DISTINCT FROM excluded.pat OR r.last_seen_at < now() - $2::interval
		), unused AS (
			DELETE FROM refused_pats r WHERE since < now() - $6::interval
				AND NOT EXISTS (SELECT FROM replicas p WHERE p.pat = r.fingerprint AND `+liveReplica+`)
		)
		SELECT `+recoveryColumns+`, `+controlDue+`, retiring,
			ARRAY(SELECT id FROM replicas WHERE NOT leases_freed AND last_seen_at < now() - $4::interval AND id <> $1), `+manualPause+`
		FROM current_incarnation`, db.replica, beatEvery, compared, leaseTimeout, pat, replicaTimeout),
		&b.ControlDue, &b.Retiring, &died, &pause)
	if pause != nil {
		b.Pause = *pause
	}
	if err == nil && len(died) > 0 {
		err = db.freeLeases(ctx, died)
	}
	return b, translate("register replica", err)
}

// freeLeases ends the leases of replicas that have died.
func (db *DB) freeLeases(ctx context.Context, died []uuid.UUID) error {
	defer db.wakeWorkers(tenant.WorkKinds...)
	return db.inTx(ctx, func(tx pgx.Tx) error {
		for _, work := range leasedWork {
			if _, err := tx.Exec(ctx, `
				UPDATE `+work.table+` SET leased_until = '-infinity'
				WHERE id = ANY (ARRAY(
					SELECT id FROM `+work.table+` WHERE `+work.is+` AND leased_until > now() AND leased_by = ANY ($1) FOR UPDATE SKIP LOCKED))`, died); err != nil {
				return err
			}
		}
		_, err := tx.Exec(ctx, `UPDATE replicas SET leases_freed = true WHERE id = ANY ($1)`, died)
		return err
	})
}

// correctClock corrects the times of all work if the clock of the database was set back, or if a
// server whose clock is behind has taken over. Otherwise no work would be due until the clock has
// caught up. It returns by how much the clock was set back.
func (db *DB) correctClock(ctx context.Context) (step time.Duration, err error) {
	const ahead = `SELECT coalesce(max(last_seen_at) - now(), '0') FROM replicas`
	if err := db.pool.QueryRow(ctx, ahead).Scan(&step); err != nil || step < maxClockStep {
		return 0, translate("compare clocks", err)
	}
	defer db.wakeWorkers(tenant.WorkKinds...)
	err = db.inTx(ctx, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock(hashtext('correct clock'))`); err != nil {
			return err
		}
		if err := tx.QueryRow(ctx, ahead).Scan(&step); err != nil || step < maxClockStep { // another replica was first
			step = 0
			return err
		}
		for _, work := range leasedWork {
			if _, err := tx.Exec(ctx, `
				UPDATE `+work.table+` SET next_attempt_at = next_attempt_at - $1::interval, leased_until = leased_until - $1::interval
				WHERE id = ANY (ARRAY(
					SELECT id FROM `+work.table+` WHERE `+work.is+` AND (next_attempt_at > now() OR leased_until > now()) FOR UPDATE SKIP LOCKED))`, step); err != nil {
				return err
			}
		}
		for _, sql := range []string{
			`UPDATE quarantines SET next_attempt_at = next_attempt_at - $1::interval, leased_until = leased_until - $1::interval WHERE state = 'checking'`,
			`UPDATE upstream_budget SET paused_until = paused_until - $1::interval, probe_until = probe_until - $1::interval`,
			`UPDATE refused_pats SET next_check_at = next_check_at - $1::interval`,
			`UPDATE pat_checks SET checking_until = checking_until - $1::interval, works_at = works_at - $1::interval`,
			`UPDATE pools SET planned_at = planned_at - $1::interval`,
			`UPDATE current_incarnation SET control_due_at = control_due_at - $1::interval, watch_until = watch_until - $1::interval, ` + written + ` WHERE ` + sameDatabase,
			`UPDATE replicas SET last_seen_at = last_seen_at - $1::interval`,
		} {
			if _, err := tx.Exec(ctx, sql, step); err != nil {
				return err
			}
		}
		return nil
	})
	return step, translate("correct times after a step of the clock", err)
}

// Leave removes the registration of this replica, and reports whether no other is alive.
func (db *DB) Leave(ctx context.Context) (last bool, err error) {
	err = db.pool.QueryRow(ctx, `
		WITH gone AS (DELETE FROM replicas WHERE id = $1 OR last_seen_at < now() - interval '1 day')
		SELECT NOT EXISTS (SELECT FROM replicas WHERE id <> $1 AND last_seen_at > now() - $2::interval)`, db.replica, replicaTimeout).Scan(&last)
	return last, translate("remove registration of replica", err)
}
