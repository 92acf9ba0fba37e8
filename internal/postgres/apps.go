package postgres

import (
	"context"
	"errors"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/tenantry/tenantry/internal/tenant"
)

// dueApp selects the apps that there is work on. Apps of earlier incarnations are worked on only
// if they have a tenant, and in recovery mode no app is removed unless a person named it. The
// first build waits until the control record exists.
const dueApp = `leased_until < now() AND next_attempt_at <= now() AND NOT ` + workPaused + ` AND CASE state
	WHEN 'building' THEN incarnation = ` + currentIncarnation + ` AND EXISTS (SELECT FROM current_incarnation
		WHERE control_seen_at IS NOT NULL OR control_problem IS NOT NULL OR recovery IS NOT NULL)
	WHEN 'purging' THEN ` + mayRemove + `
	WHEN 'held' THEN pending AND NOT (end_unknown_keys AND ` + watching + `)
	WHEN 'retained' THEN (pending OR ` + untagged + `) AND NOT (end_unknown_keys AND ` + watching + `) OR ` + duePurge + `
	WHEN 'ready' THEN incarnation = ` + currentIncarnation + ` AND coalesce(proven_at, ready_at) < now() - ` + poolAge + `
	ELSE false END`

// mayRemove says of an app that is to be removed that the removal may start now.
const mayRemove = `NOT ` + removalsPaused + ` AND CASE WHEN incarnation = ` + currentIncarnation + ` THEN true
	WHEN tenant_id IS NULL THEN false
	ELSE EXISTS (SELECT FROM current_incarnation WHERE (recovery IS NULL OR recovery = 'recovering' AND removal_confirmed) AND ` + sameDatabase + `) END`

// untagged says of a retained app that its ownership tag does not have the time of the removal yet.
const untagged = `(user_id IS NULL AND (tagging OR tagged_purge_after IS DISTINCT FROM purge_after))`

// duePurge says of a retained app that its retention has ended, and that its ownership tag has
// the time of the removal: the removal begins with a check of both.
const duePurge = `(purge_after <= now() AND (removal_confirmed OR NOT ` + untagged + `) AND ` + mayRemove + `)`

// LeaseApps leases those of the apps that there is work on, for at most lease.
func (db *DB) LeaseApps(ctx context.Context, ids []tenant.AppID, lease time.Duration) ([]tenant.App, error) {
	rows, _ := db.pool.Query(ctx, `
		WITH leased AS (
			UPDATE apps SET leased_until = now() + $2, leased_by = $3
			WHERE id = ANY (ARRAY(SELECT due.id FROM unnest($1::text[]) AS asked (id),
				LATERAL (SELECT id FROM apps WHERE id = asked.id AND `+dueApp+` FOR UPDATE SKIP LOCKED) due))
			RETURNING *
		)
		SELECT l.id, l.profile, l.profile_revision, l.state, l.attempts, l.problem, l.leased_until, l.made_at IS NOT NULL, l.in_doubt_since IS NOT NULL,
			-- ORDER BY selects tenants_waiting: with another index Postgres might read all importing tenants.
			(SELECT true FROM tenants WHERE `+waits+` AND profile = l.profile ORDER BY state_since LIMIT 1) IS TRUE,
			(SELECT true FROM tenants WHERE `+imports+` AND profile = l.profile ORDER BY state_since LIMIT 1) IS TRUE,
			coalesce(l.tenant_id, ''), coalesce(l.tenant_generation, 0), coalesce(l.user_id, ''), l.marked_at IS NOT NULL, l.extra_keys_at IS NOT NULL,
			l.purge_after, l.tagged_purge_after, l.tagging, l.tagging_purge_after, l.end_unknown_keys, l.removal_confirmed,
			l.for_pool, coalesce((SELECT revision FROM pools WHERE profile = l.profile AND l.for_pool), ''), (l.state = 'held' AND l.extra_keys_at IS NULL AND l.incarnation = `+currentIncarnation+` AND coalesce(l.proven_at, l.ready_at) < now() - `+claimedAge+`) IS TRUE,
			k.id, k.in_doubt_since IS NOT NULL
		FROM leased l LEFT JOIN LATERAL (SELECT * FROM keys WHERE app_id = l.id AND state = 'creating' AND l.state = 'building' LIMIT 1) k ON true`,
		ids, lease, db.replica)
	apps, err := pgx.CollectRows(rows, scanLeasedApp)
	return apps, translate("lease apps", err)
}

func scanLeasedApp(row pgx.CollectableRow) (tenant.App, error) {
	var a tenant.App
	var keyID *uuid.UUID
	var keyInDoubt *bool
	var purge, tagged, tagging *time.Time
	err := row.Scan(&a.ID, &a.Profile, &a.Revision, &a.State, &a.Attempts, &a.Problem, &a.LeasedUntil, &a.Made, &a.InDoubt, &a.Wanted, &a.WantedLater,
		&a.Tenant, &a.Generation, &a.UserID, &a.Marked, &a.HasExtraKeys,
		&purge, &tagged, &a.Tagging, &tagging, &a.EndUnknownKeys, &a.RemovalConfirmed,
		&a.ForPool, &a.PoolRevision, &a.Unproven,
		&keyID, &keyInDoubt)
	if keyID != nil {
		a.Creating = tenant.CreatingKey{ID: *keyID, InDoubt: *keyInDoubt}
	}
	a.PurgeAfter, a.TaggedPurgeAfter, a.TaggingPurgeAfter = orZero(purge), orZero(tagged), orZero(tagging)
	return a, err
}

// BeginApp records the intent to make the app of a leased build: from here on,
// until the outcome is recorded, it may exist upstream.
func (db *DB) BeginApp(ctx context.Context, a tenant.App) error {
	tag, err := db.pool.Exec(ctx, `
		UPDATE apps SET in_doubt_since = coalesce(in_doubt_since, now()), updated_at = now()
		WHERE id = $1 AND leased_until = $2 AND state = 'building' AND made_at IS NULL`,
		a.ID, a.LeasedUntil)
	return oneRow("record intent to make app", tag, err)
}

// AppMade records that the app of a leased build exists upstream, and of which
// revision of its profile it was made.
func (db *DB) AppMade(ctx context.Context, a tenant.App) error {
	tag, err := db.pool.Exec(ctx, `
		UPDATE apps SET made_at = coalesce(made_at, now()), profile_revision = $3, in_doubt_since = NULL, updated_at = now()
		WHERE id = $1 AND leased_until = $2 AND state = 'building'`,
		a.ID, a.LeasedUntil, a.Revision)
	return oneRow("record app as made", tag, err)
}

// BeginKey records the intent to make the key of a leased build: from here on,
// until the outcome is recorded, it may exist upstream. A key that is being made
// already keeps its row; the id of the row that stands is returned.
func (db *DB) BeginKey(ctx context.Context, a tenant.App, key tenant.NewKeyRow) (uuid.UUID, error) {
	var id uuid.UUID
	err := db.pool.QueryRow(ctx, `
		INSERT INTO keys AS k (id, app_id, name, scopes, in_doubt_since)
		SELECT $3, id, $4, $5, now() FROM apps
		WHERE id = $1 AND leased_until = $2 AND state = 'building' AND made_at IS NOT NULL
		ON CONFLICT (app_id, name) WHERE state = 'creating' DO UPDATE
		SET in_doubt_since = now(), scopes = excluded.scopes, updated_at = now()
		RETURNING k.id`,
		a.ID, a.LeasedUntil, key.ID, key.Name, key.Scopes).Scan(&id)
	if errors.Is(err, pgx.ErrNoRows) {
		return id, tenant.ErrLeaseLost
	}
	return id, translate("record intent to make key", err)
}

// GiveUpKey turns the key that is being made for a leased build, and that could
// not be found upstream, into one to be revoked: it may still land there.
func (db *DB) GiveUpKey(ctx context.Context, a tenant.App) error {
	tag, err := db.pool.Exec(ctx, `
		UPDATE keys SET state = 'revoking', priority = 2, end_reason = 'unclear', next_attempt_at = now(), updated_at = now()
		WHERE id = $1 AND state = 'creating'
			AND EXISTS (SELECT FROM apps WHERE id = $2 AND leased_until = $3 AND state = 'building')`,
		a.Creating.ID, a.ID, a.LeasedUntil)
	return oneRow("give up key", tag, err)
}

// FinishBuild stores the key of a leased build, makes the app ready, gives it to
// the tenant that waited longest and wakes who waits for that: all or nothing. An app of an
// earlier incarnation is retired instead. Then the next build begins, if one is needed.
func (db *DB) FinishBuild(ctx context.Context, a tenant.App, end tenant.BuildEnd, actor tenant.Actor) error {
	err := db.inTx(ctx, func(tx pgx.Tx) error {
		batch := &pgx.Batch{}
		var ready, active int64
		batch.Queue(`
			UPDATE keys
			SET state = 'active', ciphertext = $2, fingerprint = $3, hint = $4, in_doubt_since = NULL, attempts = 0,
				problem = NULL, activated_at = now(), updated_at = now()
			WHERE id = $1 AND app_id = $5 AND state = 'creating'`,
			end.Key.ID, end.Key.Ciphertext, end.Key.Fingerprint, end.Key.Hint, a.ID,
		).Exec(func(tag pgconn.CommandTag) error { active = tag.RowsAffected(); return nil })
		batch.Queue(`
			UPDATE apps
			SET state = CASE WHEN incarnation = `+currentIncarnation+` THEN 'ready' ELSE 'retired' END, ready_at = now(), attempts = 0,
				problem = NULL, leased_until = '-infinity', updated_at = now()
			WHERE id = $1 AND leased_until = $2 AND state = 'building'`,
			a.ID, a.LeasedUntil,
		).Exec(func(tag pgconn.CommandTag) error { ready = tag.RowsAffected(); return nil })
		batch.Queue(claimAndWakeSQL, end.Next.Profile.Name, actor.Name, actor.RequestID, actor.UpstreamRequestID)
		if err := tx.SendBatch(ctx, batch).Close(); err != nil {
			return err
		}
		if ready != 1 || active != 1 {
			return tenant.ErrLeaseLost
		}
		return nil
	})
	if err != nil {
		return translate("finish build", err)
	}
	db.wakeFollowers() // it may have been given to a tenant
	db.wakeWorkers(tenant.AppWork, tenant.KeyWork)
	db.startBuildsAfter(ctx, end.Next)
	return nil
}

// BeginTag records the intent to write the time of the removal into the ownership tag of a
// leased app. Until AppMarked the tag may have the new time or the previous one.
func (db *DB) BeginTag(ctx context.Context, a tenant.App) error {
	tag, err := db.pool.Exec(ctx, `
		UPDATE apps SET tagged_purge_after = $3, tagging = true, tagging_purge_after = $4, updated_at = now()
		WHERE id = $1 AND leased_until = $2 AND state IN ('held', 'retained')`,
		a.ID, a.LeasedUntil, nullTime(a.TaggedPurgeAfter), nullTime(a.TaggingPurgeAfter))
	return oneRow("begin to tag app", tag, err)
}

// AppMarked records that the ownership tag of a leased app names its tenant and the time of
// the removal, or that no tag is needed.
func (db *DB) AppMarked(ctx context.Context, a tenant.App) error {
	if a.Attempts > 0 { // the app may have been contested
		if _, err := db.pool.Exec(ctx, `
			WITH ended AS (
				UPDATE tenants t SET problem = NULL, version = version + 1, updated_at = now()
				FROM apps a
				WHERE t.id = $1 AND t.app_id = $2 AND t.problem->>'code' = '`+tenant.AppContested+`' AND a.id = $2 AND a.leased_until = $3
				RETURNING t.id, t.app_id)
			INSERT INTO audit_events (actor, action, tenant_id, app_id, detail)
			SELECT 'worker', 'app.contest_ended', id, app_id, '{}' FROM ended`, a.Tenant, a.ID, a.LeasedUntil); err != nil {
			return translate("end contest of app", err)
		}
	}
	tag, err := db.pool.Exec(ctx, `
		UPDATE apps
		SET marked_at = now(), attempts = 0, problem = NULL, leased_until = '-infinity',
			marker_key_id = coalesce($3, marker_key_id, CASE WHEN NOT $4 THEN -1 END),
			tagged_purge_after = $5, tagging = false, tagging_purge_after = NULL, pending = purge_after IS DISTINCT FROM $5 OR end_unknown_keys
		WHERE id = $1 AND leased_until = $2 AND state IN ('held', 'retained')
		`,
		a.ID, a.LeasedUntil, a.MarkerKey, a.Marked, nullTime(a.TaggedPurgeAfter))
	if err := oneRow("record app as marked", tag, err); err != nil {
		return err
	}
	db.wakeWorkers(tenant.AppWork, tenant.KeyWork) // keys of a restored tenant wait for the tag
	return nil
}

// AbandonApp gives up a leased build for good, and begins another in its place if one is needed: all or
// nothing. An app that is ours is purged, one that is not ours is left alone upstream.
func (db *DB) AbandonApp(ctx context.Context, a tenant.App, ours bool, reason string, next tenant.NextBuilds, actor tenant.Actor) error {
	state := tenant.AppPurging
	if !ours {
		state = tenant.AppDeleted
	}
	var begun bool
	err := db.inTx(ctx, func(tx pgx.Tx) error {
		batch := &pgx.Batch{}
		var abandoned int64
		batch.Queue(`
		WITH abandoned AS (
			UPDATE apps
			SET state = $3, attempts = 0, problem = NULL, in_doubt_since = NULL, next_attempt_at = now(),
				leased_until = '-infinity', updated_at = now()
			WHERE id = $1 AND leased_until = $2 AND state = 'building'
			RETURNING id)
		INSERT INTO audit_events (actor, upstream_request_id, action, app_id, detail)
		SELECT $4, nullif($6, ''), 'app.abandoned', id, jsonb_build_object('reason', $5::text) FROM abandoned`,
			a.ID, a.LeasedUntil, state, actor.Name, reason, actor.UpstreamRequestID).
			Exec(func(tag pgconn.CommandTag) error { abandoned = tag.RowsAffected(); return nil })
		if len(next.IDs) > 0 {
			queueBuilds(batch, next, &begun)
		}
		if err := tx.SendBatch(ctx, batch).Close(); err != nil {
			return err
		}
		if abandoned != 1 {
			return tenant.ErrLeaseLost
		}
		return nil
	})
	if err != nil {
		return translate("abandon app", err)
	}
	if begun {
		db.wakeWorkers(tenant.AppWork, tenant.KeyWork)
	}
	return nil
}

// RetireApp marks a leased app without a tenant, which is being built or removed, as retired.
func (db *DB) RetireApp(ctx context.Context, a tenant.App, reason string, actor tenant.Actor) error {
	tag, err := db.pool.Exec(ctx, `
		WITH retired AS (
			UPDATE apps SET state = 'retired', made_at = coalesce(made_at, now()), removal_confirmed = false, attempts = 0, problem = NULL, in_doubt_since = NULL,
				leased_until = '-infinity', updated_at = now()
			WHERE id = $1 AND leased_until = $2 AND state IN ('building', 'purging') AND tenant_id IS NULL
			RETURNING id)
		INSERT INTO audit_events (actor, upstream_request_id, action, app_id, detail)
		SELECT $3, nullif($5, ''), 'app.retired', id, jsonb_build_object('reason', $4::text) FROM retired`,
		a.ID, a.LeasedUntil, actor.Name, reason, actor.UpstreamRequestID)
	return oneRow("retire app", tag, err)
}

// UnknownKeys returns the keys, of those found at an app, that have no row.
func (db *DB) UnknownKeys(ctx context.Context, app tenant.AppID, found []uuid.UUID) ([]uuid.UUID, error) {
	rows, _ := db.pool.Query(ctx, `
		SELECT f.id FROM unnest($2::uuid[]) AS f (id) WHERE NOT EXISTS (SELECT FROM keys k WHERE k.id = f.id AND k.app_id = $1)`, app, found)
	ids, err := pgx.CollectRows(rows, pgx.RowTo[uuid.UUID])
	return ids, translate("look for unknown keys", err)
}

// AppDeleted records that a leased app that was purging is gone upstream, and
// its keys with it. One that is shared with the operator is let go instead, and of its
// keys those that are not known to be dead may live on.
func (db *DB) AppDeleted(ctx context.Context, a tenant.App, actor tenant.Actor) error {
	tag, err := db.pool.Exec(ctx, `
		WITH gone AS (
			UPDATE apps
			SET state = 'deleted', attempts = 0, problem = NULL, leased_until = '-infinity', updated_at = now()
			WHERE id = $1 AND leased_until = $2 AND state = 'purging'
			RETURNING id, tenant_id, user_id
		), tenant_gone AS (
			UPDATE tenants t
			SET state = 'deleted', state_since = now(), app_id = NULL, app_user_id = NULL, problem = NULL, version = version + 1, updated_at = now()
			FROM gone WHERE t.app_id = gone.id AND t.state = 'purging'
			RETURNING t.id, gone.id AS app_id
		), keys_gone AS (
			UPDATE keys k
			SET state = CASE WHEN gone.user_id IS NULL THEN 'revoked' ELSE 'lost' END,
				revoked_at = CASE WHEN gone.user_id IS NULL THEN now() END, ciphertext = NULL, in_doubt_since = NULL,
				problem = CASE WHEN gone.user_id IS NOT NULL THEN k.problem END, updated_at = now()
			FROM gone WHERE k.app_id = gone.id AND k.state <> 'revoked'
			RETURNING k.id, k.app_id, k.state, gone.tenant_id
		), audited AS (
			INSERT INTO audit_events (actor, upstream_request_id, action, tenant_id, app_id, key_id)
			SELECT $3, nullif($4, ''), CASE WHEN user_id IS NULL THEN 'app.deleted' ELSE 'app.let_go' END, tenant_id, id, NULL::uuid FROM gone
			UNION ALL SELECT $3, nullif($4, ''), 'key.' || state, tenant_id, app_id, id FROM keys_gone
			UNION ALL SELECT $3, nullif($4, ''), 'tenant.deleted', id, app_id, NULL FROM tenant_gone
		), woken AS (
			SELECT pg_notify('`+tenantChannel+`', id) FROM tenant_gone
		)
		SELECT FROM gone LEFT JOIN woken ON true`,
		a.ID, a.LeasedUntil, actor.Name, actor.UpstreamRequestID)
	db.changed(a.Tenant, "")
	return oneRow("record app as deleted", tag, err)
}

func oneRow(act string, tag pgconn.CommandTag, err error) error {
	if err != nil {
		return translate(act, err)
	}
	if tag.RowsAffected() != 1 {
		return tenant.ErrLeaseLost
	}
	return nil
}

func count(b bool) int {
	if b {
		return 1
	}
	return 0
}
