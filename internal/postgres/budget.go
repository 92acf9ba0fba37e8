package postgres

import (
	"context"
	"time"

	"github.com/tenantry/tenantry/internal/tenant"
)

// ReserveSlot reserves the next upstream call, if it can begin within patience.
// Slots follow one another at perSecond; unused ones are not saved up, so that
// there is never a burst. No answer means no call.
func (db *DB) ReserveSlot(ctx context.Context, perSecond float64, patience time.Duration) (tenant.Slot, error) {
	// clock_timestamp and not now: a caller that waited for the row must not
	// reserve in the past.
	var s tenant.Slot
	err := db.pool.QueryRow(ctx, `
		WITH slot AS (
			UPDATE upstream_budget
			SET next_slot_at = greatest(next_slot_at, clock_timestamp()) + $1::interval
			WHERE greatest(next_slot_at, paused_until) <= clock_timestamp() + $2::interval
				AND paused_until <= clock_timestamp()
			RETURNING next_slot_at - $1::interval AS at)
		SELECT true, greatest(at - clock_timestamp(), '0') FROM slot
		UNION ALL
		SELECT false, greatest(paused_until - clock_timestamp(), next_slot_at - clock_timestamp() - $2::interval, '10ms')
		FROM upstream_budget WHERE NOT EXISTS (SELECT FROM slot)`,
		time.Duration(float64(time.Second)/perSecond), patience).Scan(&s.Granted, &s.Wait)
	return s, translate("reserve an upstream call", err)
}

// An UpstreamStatus is what the database knows of the work upstream.
type UpstreamStatus struct {
	NextSlotIn   time.Duration // until the next free call; 0 means now
	PausedUntil  time.Time     // zero when upstream work is not paused
	PauseReason  *tenant.Problem
	Waiting      int       // tenants that wait for an app
	OldestSince  time.Time // since when the oldest of them waits; zero if none
	Building     int       // apps being built
	Revoking     int       // keys being revoked
	Purging      int       // apps being removed
	LastProblem  *tenant.Problem
	DatabaseTime time.Time
}

// Upstream reads the budget and what is queued for it.
func (db *DB) Upstream(ctx context.Context) (UpstreamStatus, error) {
	var s UpstreamStatus
	var paused, oldest *time.Time
	err := db.pool.QueryRow(ctx, `
		SELECT greatest(b.next_slot_at - clock_timestamp(), '0'),
			CASE WHEN b.paused_until > clock_timestamp() THEN b.paused_until END,
			CASE WHEN b.paused_until > clock_timestamp() THEN b.pause_reason END,
			(SELECT count(*) FROM tenants WHERE state = 'provisioning'),
			(SELECT min(state_since) FROM tenants WHERE state = 'provisioning'),
			(SELECT count(*) FROM apps WHERE state = 'building'),
			(SELECT count(*) FROM keys WHERE state = 'revoking'),
			(SELECT count(*) FROM apps WHERE state = 'purging'),
			(SELECT problem FROM apps WHERE state IN ('building', 'purging') AND problem IS NOT NULL
				ORDER BY next_attempt_at DESC LIMIT 1),
			clock_timestamp()
		FROM upstream_budget b`).
		Scan(&s.NextSlotIn, &paused, &s.PauseReason, &s.Waiting, &oldest, &s.Building, &s.Revoking, &s.Purging,
			&s.LastProblem, &s.DatabaseTime)
	s.PausedUntil, s.OldestSince = orZero(paused), orZero(oldest)
	return s, translate("read upstream status", err)
}
