package postgres

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/tenant"
)

// Values that change with each call are in sequences: a sequence has one version, whatever snapshots are held.
// A sequence is not transactional: each change takes effect at once, even if its transaction is rolled back. So
// slots only go forward, and a reservation that is rolled back wastes its slot. A statement that changes a
// sequence first locks the row of upstream_budget, and then reads the sequence. It must not read the sequence in
// the SELECT that locks: the columns of that SELECT are evaluated before it has the lock.
const (
	// nextSlot is the time of the next slot, and failedInARow how many calls in a row Clarifai has failed. The
	// statement may add a condition to them.
	nextSlot     = `SELECT 'epoch'::timestamptz + last_value * interval '1 microsecond' FROM upstream_slots`
	failedInARow = `SELECT last_value FROM upstream_failures`
)

// slotAt is the value of the sequence for a time.
func slotAt(time string) string { return `(extract(epoch FROM ` + time + `) * 1000000)::bigint` }

// maxPatience is how far ahead a slot may be. If the next slot is further ahead, then the clock of the database was
// set back.
const maxPatience = 5 * time.Second

// ReserveSlot reserves the next upstream call, if it can begin within the
// request's patience, which is maxPatience at most. Slots follow one another at the rate; unused ones are not
// saved up, so that there is never a burst. After a pause one call at a time
// tries whether Clarifai is back. No answer means no call. A database that was stopped,
// since another one is in use, makes calls only for the control record. While an operator has paused all
// work, calls are made for the control record and to check a PAT.
func (db *DB) ReserveSlot(ctx context.Context, r tenant.SlotRequest) (tenant.Slot, error) {
	// clock_timestamp and not now: a caller that waited for the row must not
	// reserve in the past. After a step of the clock, the next slot is after all that are reserved.
	const impossible = ` > clock_timestamp() + $7::interval + $1::interval`
	var s tenant.Slot
	err := db.pool.QueryRow(ctx, `
		WITH refused AS (
			SELECT next_check_at FROM refused_pats WHERE fingerprint = $3 AND NOT $4
		), paused AS (
			SELECT FROM manual_pause WHERE (scope = 'all' OR $8) AND NOT $4 AND NOT $6
		), budget AS MATERIALIZED (
			SELECT epoch, pauses FROM upstream_budget
			WHERE ((`+nextSlot+`) <= clock_timestamp() + $2::interval OR (`+nextSlot+`)`+impossible+`)
				AND paused_until <= clock_timestamp()
				AND (pauses = 0 OR probe_until <= clock_timestamp())
				AND NOT EXISTS (SELECT FROM refused)
				AND ($6 OR NOT EXISTS (SELECT FROM current_incarnation WHERE recovery = 'stopped'))
				AND NOT EXISTS (SELECT FROM paused)
			FOR UPDATE
		), slot AS MATERIALIZED (
			SELECT epoch, pauses, greatest((`+nextSlot+` WHERE budget.epoch IS NOT NULL), clock_timestamp()) AS at FROM budget
		), granted AS MATERIALIZED (
			SELECT epoch, pauses, at, setval('upstream_slots', `+slotAt(`at + $1::interval`)+`) FROM slot WHERE at <= clock_timestamp() + $2::interval
		), corrected AS MATERIALIZED (
			SELECT setval('upstream_slots', `+slotAt(`clock_timestamp() + $7::interval`)+`) FROM slot WHERE at`+impossible+`
		), probe AS (
			UPDATE upstream_budget SET probe_until = clock_timestamp() + $5::interval FROM granted WHERE granted.pauses > 0
		)
		SELECT true, greatest(at - clock_timestamp(), '0'), clock_timestamp() - statement_timestamp(), epoch, pauses > 0, (`+failedInARow+`) > 0, false
		FROM granted
		UNION ALL
		SELECT false, greatest(paused_until - clock_timestamp(),
				CASE WHEN pauses > 0 THEN least(probe_until - clock_timestamp(), '250ms') END,
				CASE WHEN NOT EXISTS (SELECT FROM corrected) THEN (`+nextSlot+`) - clock_timestamp() - $2::interval END,
				(SELECT next_check_at - clock_timestamp() FROM refused),
				(SELECT interval '5 seconds' FROM current_incarnation WHERE recovery = 'stopped' AND NOT $6),
				(SELECT interval '1 second' FROM paused),
				'1ms'),
			'0', epoch, false, false, EXISTS (SELECT FROM refused)
		FROM upstream_budget WHERE NOT EXISTS (SELECT FROM granted)`,
		slotEvery(r.PerSecond), min(r.Patience, maxPatience), r.PAT, r.ChecksPAT, r.ProbeTimeout, r.Control, maxPatience, r.Removes).
		Scan(&s.Granted, &s.Wait, &s.ServerTime, &s.Epoch, &s.Probe, &s.Shaky, &s.PATRefused)
	return s, translate("reserve an upstream call", err)
}

// slotEvery is the time from one slot to the next.
func slotEvery(perSecond float64) time.Duration {
	return time.Duration(float64(time.Second) / perSecond)
}

// SlotHolds reports whether a slot that was reserved in epoch still holds: a
// pause since then has voided it.
func (db *DB) SlotHolds(ctx context.Context, epoch int64) (bool, error) {
	var holds bool
	err := db.pool.QueryRow(ctx, `SELECT epoch = $1 FROM upstream_budget`, epoch).Scan(&holds)
	return holds, translate("look whether upstream work is paused", err)
}

// UpstreamFailed records a call that Clarifai failed, and pauses the work of all
// replicas if it says so, if it was a probe, or if it is the last straw. It
// returns how long the pause is; 0 means that there is none, or that another
// call has begun it already.
func (db *DB) UpstreamFailed(ctx context.Context, f tenant.UpstreamFailure) (time.Duration, error) {
	var pause time.Duration
	rows, _ := db.pool.Query(ctx, `
		WITH was AS MATERIALIZED (
			SELECT pauses FROM upstream_budget WHERE epoch = $1 FOR UPDATE
		), failed AS MATERIALIZED (
			SELECT setval('upstream_failures', (`+failedInARow+` WHERE was.pauses IS NOT NULL) + 1) AS in_a_row,
				CASE WHEN $7::interval > '0' THEN $7::interval
					ELSE least($5::interval, $4::interval * 2 ^ least(pauses, 20)) * (0.75 + random() / 4) END AS pause
			FROM was
		)
		UPDATE upstream_budget
		SET epoch = epoch + 1, pauses = pauses + 1, paused_until = clock_timestamp() + pause, probe_until = 'epoch',
			pause_reason = $6::jsonb || jsonb_build_object('next_attempt_at', clock_timestamp() + pause,
				'since', coalesce(pause_reason -> 'since', $6::jsonb -> 'since'))
		FROM failed WHERE $2 OR in_a_row >= $3
		RETURNING pause`,
		f.Epoch, f.Pauses, f.TripAfter, f.PauseBase, f.PauseCap, f.Problem, f.Pause)
	_, err := pgx.ForEachRow(rows, []any{&pause}, func() error { return nil })
	return pause, translate("record upstream failure", err)
}

// UpstreamWorks records that Clarifai answers: failures are forgotten, a pause
// ends, and what waited because of it is tried now. It reports whether a pause
// ended.
func (db *DB) UpstreamWorks(ctx context.Context, epoch int64) (resumed bool, err error) {
	err = db.inTx(ctx, func(tx pgx.Tx) error {
		rows, _ := tx.Query(ctx, `
			WITH was AS MATERIALIZED (SELECT pauses FROM upstream_budget WHERE epoch = $1 FOR UPDATE)
			SELECT pauses > 0, CASE WHEN (`+failedInARow+` WHERE was.pauses IS NOT NULL) > 0 THEN setval('upstream_failures', 0) END FROM was`, epoch)
		if _, err := pgx.ForEachRow(rows, []any{&resumed, nil}, func() error { return nil }); err != nil || !resumed {
			return err
		}
		if _, err := tx.Exec(ctx, `UPDATE upstream_budget SET pauses = 0, paused_until = 'epoch', pause_reason = NULL, probe_until = 'epoch'`); err != nil {
			return err
		}
		// By the indexes of what there is work on: every call waits until this is committed.
		for _, work := range []struct{ table, is string }{
			{"apps", `state = 'building' OR state = 'purging' OR state = 'held' AND pending OR state = 'ready'`},
			{"keys", `state IN ('creating', 'revoking')`},
		} {
			if _, err := tx.Exec(ctx, `
				UPDATE `+work.table+` SET next_attempt_at = now()
				WHERE id = ANY (ARRAY(SELECT id FROM `+work.table+`
					WHERE (`+work.is+`) AND next_attempt_at > now() AND problem ->> 'code' IN ('upstream_unavailable', 'upstream_throttled')
					FOR UPDATE SKIP LOCKED))`); err != nil {
				return err
			}
		}
		return nil
	})
	if resumed {
		db.wakeWorkers(tenant.WorkKinds...)
	}
	return resumed, translate("resume upstream work", err)
}

// Interrupt voids every slot that was reserved in epoch and grants the next one,
// as the only call until its outcome is known. It grants none if another call did
// so first.
func (db *DB) Interrupt(ctx context.Context, epoch int64, perSecond float64, probeTimeout time.Duration, reason tenant.Problem) (tenant.Slot, error) {
	s := tenant.Slot{Probe: true}
	rows, _ := db.pool.Query(ctx, `
		WITH interrupted AS (
			UPDATE upstream_budget
			SET epoch = epoch + 1, pauses = pauses + 1, paused_until = clock_timestamp(), pause_reason = $4,
				probe_until = clock_timestamp() + $3::interval
			WHERE epoch = $1 RETURNING epoch
		)
		SELECT setval('upstream_slots', greatest((SELECT last_value FROM upstream_slots WHERE interrupted.epoch IS NOT NULL),
			`+slotAt(`clock_timestamp() + 2 * $2::interval`)+`)) > 0, $2::interval, epoch FROM interrupted`,
		epoch, slotEvery(perSecond), probeTimeout, reason)
	_, err := pgx.ForEachRow(rows, []any{&s.Granted, &s.Wait, &s.Epoch}, func() error { return nil })
	return s, translate("interrupt upstream work", err)
}

// RefusePAT records that Clarifai refuses a PAT: replicas that have it make no
// calls, but one now and then that asks again, after base, doubling up to most. It
// reports whether that is news.
func (db *DB) RefusePAT(ctx context.Context, fingerprint []byte, problem tenant.Problem, base, most time.Duration) (news bool, err error) {
	err = db.pool.QueryRow(ctx, `
		WITH checked AS (DELETE FROM pat_checks WHERE fingerprint = $1)
		INSERT INTO refused_pats AS r (fingerprint, problem, next_check_at)
		VALUES ($1, $2::jsonb || jsonb_build_object('next_attempt_at', now() + $3::interval), now() + $3::interval)
		ON CONFLICT (fingerprint) DO UPDATE
		SET checks = r.checks + 1, next_check_at = now() + least($4::interval, $3::interval * 2 ^ least(r.checks + 1, 20)),
			problem = excluded.problem || jsonb_build_object('since', r.problem -> 'since',
				'next_attempt_at', now() + least($4::interval, $3::interval * 2 ^ least(r.checks + 1, 20)))
		RETURNING checks = 0`, fingerprint, problem, base, most).Scan(&news)
	return news, translate("record refused PAT", err)
}

// PATWorks records that a PAT is refused no longer. It reports whether that is
// news. It completes a check that BeginPATCheck began.
func (db *DB) PATWorks(ctx context.Context, fingerprint []byte) (news bool, err error) {
	err = db.pool.QueryRow(ctx, `
		WITH checked AS (
			UPDATE pat_checks SET works_at = clock_timestamp(), checking_until = '-infinity'
			WHERE fingerprint = $1 AND checking_until > '-infinity'
		), gone AS (DELETE FROM refused_pats WHERE fingerprint = $1 RETURNING 1)
		SELECT EXISTS (SELECT FROM gone)`, fingerprint).Scan(&news)
	return news, translate("record working PAT", err)
}

// BeginPATCheck reports whether a PAT passed a check within trust. If not, one caller at a time may
// check it now, for at most limit; PATWorks or RefusePAT records the result.
func (db *DB) BeginPATCheck(ctx context.Context, fingerprint []byte, trust, limit time.Duration) (works, check bool, err error) {
	// A time that is further ahead than it can be is of a clock that was set back.
	const trusted = `c.works_at BETWEEN clock_timestamp() - $2::interval AND clock_timestamp() + interval '5 seconds'`
	err = db.pool.QueryRow(ctx, `
		WITH begun AS (
			INSERT INTO pat_checks AS c (fingerprint, checking_until) VALUES ($1, clock_timestamp() + $3::interval)
			ON CONFLICT (fingerprint) DO UPDATE SET checking_until = excluded.checking_until
			WHERE NOT (`+trusted+`) AND c.checking_until NOT BETWEEN clock_timestamp() AND clock_timestamp() + $3::interval
			RETURNING 1
		)
		SELECT EXISTS (SELECT FROM pat_checks c WHERE fingerprint = $1 AND `+trusted+`), EXISTS (SELECT FROM begun)`,
		fingerprint, trust, limit).Scan(&works, &check)
	return works, check, translate("begin check of the PAT", err)
}

// ClaimPATCheck reports whether a PAT may be checked now: it is not known to be
// refused, or its next check is due. Of several replicas one gets a due check,
// and the others wait for as long as it is given, in.
func (db *DB) ClaimPATCheck(ctx context.Context, fingerprint []byte, in time.Duration) (free bool, wait time.Duration, err error) {
	err = db.pool.QueryRow(ctx, `
		WITH claimed AS (
			UPDATE refused_pats SET next_check_at = now() + $2::interval
			WHERE fingerprint = $1 AND next_check_at <= now()
			RETURNING 1)
		SELECT EXISTS (SELECT FROM claimed) OR NOT EXISTS (SELECT FROM refused_pats WHERE fingerprint = $1),
			greatest('0', (SELECT next_check_at - now() FROM refused_pats WHERE fingerprint = $1))`,
		fingerprint, in).Scan(&free, &wait)
	return free, wait, translate("claim check of the PAT", err)
}

// Upstream reads the budget and what is queued for it, as a replica with the PAT
// of that fingerprint sees it. It counts up to mostCounted of each: of tenants, in each profile. If more
// tenants wait in the background, their number is that of tenant_counts.
func (db *DB) Upstream(ctx context.Context, pat []byte) (tenant.UpstreamStatus, error) {
	var s tenant.UpstreamStatus
	var paused, oldest *time.Time
	var pause *tenant.UpstreamPause
	err := db.pool.QueryRow(ctx, `
		WITH RECURSIVE profiles AS (
			(SELECT profile FROM tenants WHERE state = 'provisioning' ORDER BY profile LIMIT 1)
			UNION ALL
			SELECT (SELECT profile FROM tenants WHERE state = 'provisioning' AND profile > p.profile ORDER BY profile LIMIT 1)
			FROM profiles p WHERE profile IS NOT NULL
		), counted AS (
			SELECT `+countUpTo(`tenants t WHERE `+waits+` AND t.profile = p.profile ORDER BY state_since`)+` AS waiting,
				(SELECT min(state_since) FROM tenants t WHERE `+waits+` AND t.profile = p.profile) AS oldest,
				`+countUpTo(`tenants t WHERE `+imports+` AND t.profile = p.profile ORDER BY state_since`)+` AS importing
			FROM profiles p WHERE profile IS NOT NULL
		), queue AS (
			SELECT coalesce(sum(waiting), 0)::bigint AS waiting, min(oldest) AS oldest, coalesce(sum(importing), 0)::bigint AS importing,
				max(importing) >= $2 AS more
			FROM counted
		)
		SELECT greatest((`+nextSlot+`) - clock_timestamp(), '0'),
			b.pauses, CASE WHEN b.pauses > 0 THEN b.paused_until END, b.pause_reason,
			refused.problem, coalesce(`+workProblem+`, (SELECT `+recoveryProblem+` FROM current_incarnation WHERE recovery = 'stopped'),
				refused.problem, CASE WHEN b.pauses > 0 THEN b.pause_reason END),
			q.waiting, q.oldest,
			CASE WHEN q.more THEN greatest(q.importing, (SELECT sum(n) FROM tenant_counts WHERE state = 'provisioning' AND background))
				ELSE q.importing END::bigint,
			`+countUpTo(`apps WHERE state = 'building'`)+`,
			`+countUpTo(`keys WHERE state = 'revoking'`)+`,
			`+countUpTo(`apps WHERE state = 'purging'`)+`,
			-- Of the account speak the pause and the PAT: what a row says of it may have passed.
			(SELECT problem FROM apps WHERE state IN ('building', 'purging') AND problem->>'code' <> 'upstream_pat_refused'
				AND ((`+failedInARow+`) > 0 OR problem->>'code' NOT IN ('upstream_unavailable', 'upstream_throttled'))
				ORDER BY next_attempt_at DESC LIMIT 1),
			`+manualPause+`, clock_timestamp()
		FROM queue q, upstream_budget b LEFT JOIN (
			-- It is checked again once a pause allows calls.
			SELECT problem || jsonb_build_object('next_attempt_at', greatest(next_check_at, (SELECT paused_until FROM upstream_budget WHERE pauses > 0)))
			FROM refused_pats WHERE fingerprint = $1) refused (problem) ON true`, pat, mostCounted).
		Scan(&s.NextSlotIn, &s.Pauses, &paused, &s.PauseReason, &s.PATRefused, &s.Halted, &s.Waiting, &oldest, &s.Importing, &s.Building, &s.Revoking,
			&s.Purging, &s.LastProblem, &pause, &s.DatabaseTime)
	s.PausedUntil, s.OldestSince = orZero(paused), orZero(oldest)
	if pause != nil {
		s.Pause = *pause
	}
	return s, translate("read upstream status", err)
}
