package postgres

import (
	"context"
	"encoding/json"

	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/tenant"
)

// SignUpMany makes the tenants of a batch, in one transaction, and leaves them to wait in
// the background. One that is there already is returned as it stands; one that is deleted
// begins its next generation, unless they are left. What it returns is in the order of the batch.
func (db *DB) SignUpMany(ctx context.Context, n tenant.NewBatch, actor tenant.Actor) ([]tenant.SignedUp, error) {
	ids, profiles, names, labels := make([]tenant.ID, len(n.Tenants)), make([]string, len(n.Tenants)), make([]string, len(n.Tenants)), make([]string, len(n.Tenants))
	hashes, place := make([][]byte, len(n.Tenants)), make(map[tenant.ID]int, len(n.Tenants))
	for i, t := range n.Tenants {
		ids[i], profiles[i], names[i], hashes[i] = t.ID, t.Profile.Name, t.Attributes.DisplayName, t.Attributes.Hash()
		text, err := json.Marshal(t.Attributes.Labels)
		if err != nil {
			return nil, err
		}
		labels[i] = string(text)
		place[t.ID] = i
	}
	if !n.DryRun {
		if err := db.ensureIncarnation(ctx); err != nil {
			return nil, err
		}
	}
	batch := &pgx.Batch{}
	made := map[tenant.ID]bool{}
	// In the order of the ids, here and below: two batches that name the same tenants must
	// not wait for each other.
	args := []any{ids, profiles, names, labels, hashes, actor.Name, actor.RequestID}
	for _, statement := range []struct {
		made  string
		args  []any
		again bool
	}{{`
		WITH made AS (
			INSERT INTO tenants (id, profile, display_name, labels, attributes_hash, background)
			SELECT id, profile, display_name, labels::jsonb, attributes_hash, true
			FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bytea[]) AS m (id, profile, display_name, labels, attributes_hash)
			ORDER BY id COLLATE "C"
			ON CONFLICT (id) DO NOTHING
			RETURNING id, generation, profile`, args, false}, {`
		WITH gone AS MATERIALIZED (
			SELECT id FROM tenants WHERE id = ANY ($1) AND state = 'deleted' AND labels @> $8
			ORDER BY id FOR UPDATE
		), made AS (
			UPDATE tenants t
			SET generation = generation + 1, profile = m.profile, display_name = m.display_name, labels = m.labels::jsonb,
				attributes_hash = m.attributes_hash, state = 'provisioning', state_since = now(), app_id = NULL, app_user_id = NULL,
				problem = NULL, deletion_protection = false, background = true, version = version + 1, updated_at = now()
			FROM gone JOIN unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bytea[]) AS m (id, profile, display_name, labels, attributes_hash)
				ON m.id = gone.id
			WHERE t.id = gone.id AND t.state = 'deleted'
			RETURNING t.id, t.generation, t.profile`, append(args, scopeSQL(actor)), true},
	} {
		if n.DryRun || n.LeaveDeleted && statement.again {
			break
		}
		batch.Queue(statement.made+`
		)
		INSERT INTO audit_events (actor, request_id, action, tenant_id, detail)
		SELECT $6, nullif($7, ''), 'tenant.created', id, jsonb_build_object('generation', generation, 'profile', profile, 'background', true)
		FROM made
		RETURNING tenant_id`, statement.args...).
			Query(func(rows pgx.Rows) error {
				found, err := pgx.CollectRows(rows, pgx.RowTo[tenant.ID])
				for _, id := range found {
					made[id] = true
				}
				return err
			})
	}
	ups := make([]tenant.SignedUp, len(n.Tenants))
	for i := range ups {
		ups[i].Created = n.DryRun
	}
	batch.Queue(`SELECT `+tenantColumns+`, t.attributes_hash FROM tenants t WHERE t.id = ANY ($1)`, ids).
		Query(func(rows pgx.Rows) error {
			for rows.Next() {
				var up tenant.SignedUp
				fields, done := tenantFields(&up.Tenant)
				err := rows.Scan(append(fields, &up.FirstHash)...)
				done()
				if err != nil {
					return err
				}
				up.Created = made[up.Tenant.ID] ||
					n.DryRun && up.Tenant.State == tenant.Deleted && !n.LeaveDeleted && actor.Within.Covers(up.Tenant.Labels)
				ups[place[up.Tenant.ID]] = up
			}
			return rows.Err()
		})
	// Without BEGIN, the statements of a batch are one transaction.
	err := db.pool.SendBatch(ctx, batch).Close()
	for _, id := range ids {
		db.changed(id, "")
	}
	return ups, translate("sign up many", err)
}

// hurry takes a tenant out of the background, since somebody has come for it: it then waits
// as if it had signed up now.
func (db *DB) hurry(ctx context.Context, n tenant.NewTenant, actor tenant.Actor) (tenant.Tenant, error) {
	var t tenant.Tenant
	batch := &pgx.Batch{}
	batch.Queue(`
		UPDATE tenants SET background = false, state_since = now(), updated_at = now()
		WHERE id = $1 AND state = 'provisioning' AND background AND labels @> $2`, n.ID, scopeSQL(actor))
	batch.Queue(claimAndWakeSQL, n.Profile.Name, actor.Name, actor.RequestID, actor.UpstreamRequestID)
	batch.Queue(`SELECT `+tenantColumns+` FROM tenants t WHERE t.id = $1`, n.ID).
		QueryRow(func(row pgx.Row) error {
			fields, done := tenantFields(&t)
			defer done()
			return row.Scan(fields...)
		})
	err := db.pool.SendBatch(ctx, batch).Close()
	db.changed(n.ID, t.AppID)
	if err != nil {
		return t, translate("sign up", err)
	}
	db.wakeWorkers(tenant.AppWork, tenant.KeyWork)
	if t.State == tenant.Provisioning {
		db.startBuildsAfter(ctx, nextBuild(n))
	}
	return t, nil
}

// claimInBackgroundSQL gives ready apps that the pool of a profile does not need to the
// tenants in the background that waited longest, unless another tenant waits. It takes the
// apps that sign-ups would take last. $1 is the profile, $2 the actor, $3 the revision that a pool
// is kept of: where none is kept, an app of any revision does. $4 bounds how many are given.
const claimInBackgroundSQL = `
	WITH ` + handOut + `, surplus AS (
		SELECT CASE WHEN EXISTS (SELECT FROM tenants WHERE ` + waits + ` AND profile = $1 AND ` + waitingSince + `) THEN 0 ELSE
			(SELECT count(*) FROM (
				SELECT FROM apps WHERE state = 'ready' AND profile = $1 AND incarnation = (SELECT id FROM incarnation) AND ` + readySince + ` AND $3 IN (profile_revision, '')
				ORDER BY ready_at LIMIT kept.n + $4) few) - kept.n END AS n
		FROM (SELECT coalesce((SELECT target FROM pools WHERE profile = $1 AND revision = $3), 0) AS n) kept
	), waiter AS MATERIALIZED (
		SELECT id, generation, state_since FROM tenants
		WHERE ` + imports + ` AND profile = $1 AND ` + importingSince + `
		ORDER BY state_since, id LIMIT greatest(0, (SELECT n FROM surplus)) FOR UPDATE SKIP LOCKED
	), picked AS MATERIALIZED (
		SELECT id, ready_at FROM apps
		WHERE state = 'ready' AND profile = $1 AND incarnation = (SELECT id FROM incarnation) AND ` + readySince + ` AND $3 IN (profile_revision, '')
		ORDER BY ready_at DESC, id DESC LIMIT (SELECT count(*) FROM waiter) FOR UPDATE SKIP LOCKED
	), paired AS (
		SELECT w.id, w.generation, p.id AS app_id
		FROM (SELECT *, row_number() OVER (ORDER BY state_since, id) AS place FROM waiter) w
		JOIN (SELECT *, row_number() OVER (ORDER BY ready_at, id) AS place FROM picked) p USING (place)
	), given AS (
		UPDATE apps a
		SET state = 'held', tenant_id = w.id, tenant_generation = w.generation, pending = true, background = true, next_attempt_at = now(),
			updated_at = now()
		FROM paired w WHERE a.id = w.app_id AND a.state = 'ready'
		RETURNING a.id, a.tenant_id, a.tenant_generation
	), activated AS (
		UPDATE tenants t
		SET state = 'active', state_since = now(), app_id = g.id, problem = NULL,
			version = version + 1, updated_at = now()
		FROM given g WHERE t.id = g.tenant_id
		RETURNING t.id, t.generation, t.app_id
	), audited AS (
		INSERT INTO audit_events (actor, action, tenant_id, app_id, detail)
		SELECT $2, 'tenant.activated', id, app_id, jsonb_build_object('generation', generation)
		FROM activated
	)
	SELECT pg_notify('` + tenantChannel + `', id) FROM activated`

// mostInBackground bounds how many apps are given in one transaction.
const mostInBackground = 100

// ClaimInBackground gives the ready apps of a profile that are more than its pool needs to
// tenants that wait in the background, the oldest first, and wakes who waits for them.
func (db *DB) ClaimInBackground(ctx context.Context, p tenant.Profile, actor tenant.Actor) error {
	var waiting bool
	err := db.pool.QueryRow(ctx, `SELECT `+oldestImport+` IS NOT NULL`, p.Name).
		Scan(&waiting)
	if err != nil || !waiting {
		return translate("look who waits in the background", err)
	}
	defer db.wakeFollowers()
	return translate("claim in the background", db.inTx(ctx, func(tx pgx.Tx) error {
		// Two at once would each see the same surplus, and together take more.
		var alone bool
		if err := tx.QueryRow(ctx, `SELECT pg_try_advisory_xact_lock(hashtext('claim in background'), hashtext($1))`, p.Name).
			Scan(&alone); err != nil || !alone {
			return err
		}
		_, err := tx.Exec(ctx, claimInBackgroundSQL, p.Name, actor.Name, poolRevision(p), mostInBackground)
		return err
	}))
}
