package postgres

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/tenant"
)

const activeKeyColumns = `k.id, k.app_id, k.name, k.state, k.hint, k.scopes, k.created_at, k.activated_at, k.revoked_at, k.expires_at,
	CASE WHEN k.state = 'retiring' THEN k.retires_at END, k.fingerprint, coalesce(k.end_reason, ''), k.problem`

// keyColumns are activeKeyColumns of a key in any state. One that is being created or revoked shows why
// all upstream work stands still.
var keyColumns = strings.TrimSuffix(activeKeyColumns, `k.problem`) + `CASE WHEN k.state IN ('creating', 'revoking')
	THEN coalesce(` + upstreamHalted + `, CASE WHEN ` + ofRow("k") + ` THEN k.problem END) ELSE k.problem END`

func keyFields(k *tenant.Key) ([]any, func()) {
	var activated, revoked, expires, retires *time.Time
	return []any{&k.ID, &k.AppID, &k.Name, &k.State, &k.Hint, &k.Scopes, &k.CreatedAt, &activated, &revoked, &expires,
			&retires, &k.Fingerprint, &k.EndReason, &k.Problem},
		func() {
			k.ActivatedAt, k.RevokedAt, k.ExpiresAt, k.RetiresAt = orZero(activated), orZero(revoked), orZero(expires), orZero(retires)
		}
}

func scanKey(row pgx.CollectableRow) (tenant.Key, error) {
	var k tenant.Key
	fields, done := keyFields(&k)
	err := row.Scan(fields...)
	done()
	return k, err
}

// Keys lists the keys of a tenant's app, by name and age. It reports
// tenant.NotFound for an id that never signed up.
func (db *DB) Keys(ctx context.Context, id tenant.ID) ([]tenant.Key, error) {
	rows, _ := db.pool.Query(ctx, `
		SELECT `+keyColumns+` FROM tenants t JOIN keys k ON k.app_id = t.app_id
		WHERE t.id = $1 ORDER BY k.name, k.created_at, k.id`, id)
	keys, err := pgx.CollectRows(rows, scanKey)
	if err != nil {
		return nil, translate("list keys", err)
	}
	if len(keys) == 0 {
		if _, err := db.Tenant(ctx, id); err != nil {
			return nil, err
		}
	}
	return keys, nil
}

// Reveal reads the sealed secret of a tenant's active key and writes that it
// was asked for, in one transaction: no secret leaves without an event. It
// reports tenant.NotFound for an unknown tenant and for a name that has no
// active key, and tenant.Conflict while the tenant's app is contested.
func (db *DB) Reveal(ctx context.Context, id tenant.ID, name string, actor tenant.Actor) (tenant.Key, []byte, error) {
	return db.reveal(ctx, id, `k.name = $2`, name, actor)
}

func (db *DB) reveal(ctx context.Context, id tenant.ID, which string, arg any, actor tenant.Actor) (tenant.Key, []byte, error) {
	var k tenant.Key
	var ciphertext []byte
	fields, done := keyFields(&k)
	err := db.pool.QueryRow(ctx, `
		WITH key AS (
			SELECT k.* FROM tenants t JOIN keys k ON k.app_id = t.app_id
			WHERE t.id = $1 AND `+which+` AND k.state = 'active' AND t.labels @> $5 AND t.problem->>'code' IS DISTINCT FROM '`+tenant.AppContested+`'
		), audited AS (
			INSERT INTO audit_events (actor, request_id, action, tenant_id, app_id, key_id, detail)
			SELECT $3, nullif($4, ''), 'key.revealed', $1, app_id, id, jsonb_build_object('name', name) FROM key
		)
		SELECT `+activeKeyColumns+`, k.ciphertext FROM key k`,
		id, arg, actor.Name, actor.RequestID, scopeSQL(actor)).Scan(append(fields, &ciphertext)...)
	done()
	if errors.Is(err, pgx.ErrNoRows) {
		t, err := db.Tenant(ctx, id)
		switch {
		case err != nil:
		case !actor.Within.Covers(t.Labels):
			err = tenant.ErrOutside
		default:
			err = contested(t)
		}
		if err != nil {
			return k, nil, err
		}
		return k, nil, errNotFound("key")
	}
	return k, ciphertext, translate("reveal key", err)
}

// Identify finds the key of a fingerprint, or the keys of an app, and writes that it
// was asked for. It reports tenant.NotFound if Tenantry never held such a key or app, or if it is of no tenant
// that actor may change.
func (db *DB) Identify(ctx context.Context, what tenant.Suspect, actor tenant.Actor) (tenant.Identified, error) {
	var found tenant.Identified
	which, arg := `k.fingerprint = $1`, any(what.Fingerprint)
	if what.AppID != "" {
		which, arg = `a.id = $1`, what.AppID
	}
	err := db.inTx(ctx, func(tx pgx.Tx) error {
		err := tx.QueryRow(ctx, `
			SELECT a.id, a.state, coalesce(a.tenant_id, ''), now() FROM apps a WHERE a.id = (
				SELECT a.id FROM apps a LEFT JOIN keys k ON k.app_id = a.id WHERE `+which+` LIMIT 1)
			AND ($2::jsonb = '{}' OR EXISTS (SELECT FROM tenants t WHERE t.id = a.tenant_id AND t.labels @> $2 FOR SHARE))`, arg, scopeSQL(actor)).
			Scan(&found.AppID, &found.AppState, &found.TenantID, &found.At)
		if errors.Is(err, pgx.ErrNoRows) {
			if what.AppID != "" {
				return errNotFound("app")
			}
			return errNotFound("key")
		}
		if err != nil {
			return err
		}
		rows, _ := tx.Query(ctx, `SELECT `+keyColumns+` FROM keys k JOIN apps a ON a.id = k.app_id WHERE `+which+`
			ORDER BY k.name, k.created_at, k.id`, arg)
		if found.Keys, err = pgx.CollectRows(rows, scanKey); err != nil {
			return err
		}
		e := event{action: "app.identified", tenant: found.TenantID, app: found.AppID}
		if what.AppID == "" {
			e.action, e.key, e.detail = "key.identified", found.Keys[0].ID, map[string]any{"name": found.Keys[0].Name}
		}
		return audit(ctx, tx, actor, e)
	})
	return found, translate("identify", err)
}

// dueKey selects the keys k that there is work on. A build creates the key of its own app. For an
// app of an earlier incarnation:
//   - Revocations continue, except those that a command requested during the watch.
//   - A key that a command requested in this incarnation is created after the watch, any other key
//     after recovery mode.
//
// No key is created before the app's ownership tag says that the app is not to be removed.
const dueKey = `k.leased_until < now() AND k.next_attempt_at <= now() AND NOT ` + workPaused + ` AND (
	k.state = 'revoking' AND (NOT ` + watching + ` OR k.incarnation <> (SELECT id FROM current_incarnation) OR k.end_reason IS NULL
		OR k.end_reason NOT IN ('suspended', 'deleted', 'revoked')
		OR (SELECT a.incarnation = ` + currentIncarnation + ` FROM apps a WHERE a.id = k.app_id))
	OR k.state = 'creating' AND ` + mayCreate + `)`

// mayCreate says of a key that it may be created: see dueKey.
const mayCreate = `(SELECT a.state = 'held' AND a.tagged_purge_after IS NULL AND NOT a.tagging AND (a.incarnation = ` + currentIncarnation + `
			OR NOT ` + inRecovery + ` OR k.incarnation = (SELECT id FROM current_incarnation) AND NOT ` + watching + `)
		FROM apps a WHERE a.id = k.app_id)`

const leasedKeyColumns = `k.id, k.app_id, coalesce((SELECT a.user_id FROM apps a WHERE a.id = k.app_id), ''), k.name, k.state, k.scopes, k.priority, k.ciphertext, k.in_doubt_since IS NOT NULL,
	(SELECT a.incarnation = ` + currentIncarnation + ` FROM apps a WHERE a.id = k.app_id) IS TRUE, k.replaces, coalesce(starts_with(k.rotation_id, '` + campaignRotation + `'), false),
	coalesce(now() - k.in_doubt_since, '0'), k.fingerprint, now() - coalesce(k.activated_at, k.created_at),
	coalesce(now() - k.end_unconfirmed_since, '0'), k.attempts, k.problem, k.leased_until`

func scanLeasedKey(row pgx.CollectableRow) (tenant.LeasedKey, error) {
	var k tenant.LeasedKey
	var replaces *uuid.UUID
	err := row.Scan(&k.ID, &k.AppID, &k.AppUserID, &k.Name, &k.State, &k.Scopes, &k.Priority, &k.Ciphertext, &k.InDoubt, &k.Current, &replaces, &k.ByCampaign, &k.InDoubtFor,
		&k.Fingerprint, &k.Age, &k.UnconfirmedFor, &k.Attempts, &k.Problem, &k.LeasedUntil)
	if replaces != nil {
		k.Replaces = *replaces
	}
	return k, err
}

// LeaseKeys leases those of the keys that there is work on, for at most lease.
func (db *DB) LeaseKeys(ctx context.Context, ids []uuid.UUID, lease time.Duration) ([]tenant.LeasedKey, error) {
	rows, _ := db.pool.Query(ctx, `
		UPDATE keys k SET leased_until = now() + $2, leased_by = $3
		WHERE id = ANY (ARRAY(SELECT due.id FROM unnest($1::uuid[]) AS asked (id),
			LATERAL (SELECT id FROM keys k WHERE k.id = asked.id AND `+dueKey+` FOR UPDATE SKIP LOCKED) due))
		RETURNING `+leasedKeyColumns, ids, lease, db.replica)
	keys, err := pgx.CollectRows(rows, scanLeasedKey)
	return keys, translate("lease keys", err)
}

// BeginLeasedKey records the intent to make a leased key: from here on, until the
// outcome is recorded, it may exist upstream.
func (db *DB) BeginLeasedKey(ctx context.Context, k tenant.LeasedKey) error {
	tag, err := db.pool.Exec(ctx, `
		UPDATE keys k SET in_doubt_since = coalesce(in_doubt_since, now()), updated_at = now()
		WHERE id = $1 AND leased_until = $2 AND state = 'creating' AND `+mayCreate, k.ID, k.LeasedUntil)
	return oneRow("record intent to make key", tag, err)
}

// ReplaceLeasedKey gives up a leased key whose making has an unknown outcome, and that
// could not be found upstream: it may still land there, and goes on to be revoked.
// Another row takes its place, leased as it was.
func (db *DB) ReplaceLeasedKey(ctx context.Context, k tenant.LeasedKey, id uuid.UUID) (tenant.LeasedKey, error) {
	var next tenant.LeasedKey
	var owner tenant.ID
	err := db.inTx(ctx, func(tx pgx.Tx) (err error) {
		if owner, err = lockOwner(ctx, tx, k.AppID); err != nil {
			return err
		}
		// The row is changed first: one key of a name is creating at a time, and one
		// row has the rotation.
		var rotation *string
		actor := tenant.Actor{Name: "worker", UpstreamRequestID: tenant.LastUpstreamRequest(ctx)}
		err = tx.QueryRow(ctx, `
			WITH was AS (
				SELECT id, rotation_id FROM keys WHERE id = $1 AND leased_until = $2 AND state = 'creating' FOR UPDATE
			)
			UPDATE keys k
			SET state = 'revoking', end_reason = 'unclear', rotation_id = NULL, leased_until = '-infinity', next_attempt_at = now(),
				attempts = 0, updated_at = now()
			FROM was WHERE k.id = was.id
			RETURNING was.rotation_id, coalesce(k.request_id, '')`, k.ID, k.LeasedUntil).Scan(&rotation, &actor.RequestID)
		if errors.Is(err, pgx.ErrNoRows) {
			return tenant.ErrLeaseLost
		}
		if err != nil {
			return err
		}
		rows, _ := tx.Query(ctx, `
			INSERT INTO keys AS k (id, app_id, name, scopes, expires_at, priority, requested_by, rotation_id, replaces, overlap, request_id, attempts, leased_until, leased_by, created_at, incarnation)
			SELECT $2, app_id, name, scopes, expires_at, priority, requested_by, $5, replaces, overlap, request_id, $4, $3, leased_by, created_at, incarnation FROM keys WHERE id = $1
			RETURNING `+leasedKeyColumns, k.ID, id, k.LeasedUntil, k.Attempts, rotation)
		if next, err = pgx.CollectExactlyOneRow(rows, scanLeasedKey); err != nil {
			return err
		}
		return audit(ctx, tx, actor, event{action: "key.revoking", tenant: owner, app: k.AppID, key: k.ID,
			detail: map[string]any{"name": k.Name, "reason": tenant.EndUnclear, "from": tenant.KeyCreating, "to": tenant.KeyRevoking, "replaced_by": id}})
	})
	db.changed(owner, "")
	return next, translate("replace key", err)
}

// FinishLeasedKey stores the secret of a leased key, which works from now on. The key
// that it replaces works on for the overlap. A tenant that resumes is active again
// with the last of its keys. A key that is not wanted any more keeps its secret only
// to be revoked.
func (db *DB) FinishLeasedKey(ctx context.Context, k tenant.LeasedKey, key tenant.SealedKey, actor tenant.Actor) error {
	var owner tenant.ID
	err := db.inTx(ctx, func(tx pgx.Tx) (err error) {
		if owner, err = lockOwner(ctx, tx, k.AppID); err != nil {
			return err
		}
		var state tenant.KeyState
		var replaces *uuid.UUID
		var rotation string
		err = tx.QueryRow(ctx, `
			SELECT state, replaces, coalesce(rotation_id, ''), coalesce(request_id, '') FROM keys
			WHERE id = $1 AND leased_until = $2 AND state IN ('creating', 'revoking') FOR UPDATE`,
			k.ID, k.LeasedUntil).Scan(&state, &replaces, &rotation, &actor.RequestID)
		if errors.Is(err, pgx.ErrNoRows) {
			return tenant.ErrLeaseLost
		}
		if err != nil {
			return err
		}
		if state == tenant.KeyRevoking {
			_, err := tx.Exec(ctx, `
				UPDATE keys
				SET ciphertext = $2, fingerprint = $3, hint = $4, in_doubt_since = NULL, leased_until = '-infinity',
					next_attempt_at = now(), updated_at = now()
				WHERE id = $1`, k.ID, key.Ciphertext, key.Fingerprint, key.Hint)
			return err
		}
		if replaces != nil {
			// Before the new key is active: there is one of a name at a time.
			if err = retireKey(ctx, tx, *replaces, k.ID, owner, actor); err != nil {
				return err
			}
		}
		if _, err := tx.Exec(ctx, `
			UPDATE keys
			SET state = 'active', ciphertext = $2, fingerprint = $3, hint = $4, in_doubt_since = NULL, attempts = 0, problem = NULL,
				leased_until = '-infinity', activated_at = now(), updated_at = now()
			WHERE id = $1`, k.ID, key.Ciphertext, key.Fingerprint, key.Hint); err != nil {
			return err
		}
		detail := map[string]any{"name": k.Name, "scopes": k.Scopes}
		if replaces != nil {
			detail["replaces"], detail["rotation_id"] = replaces, rotation
		}
		if err := audit(ctx, tx, actor, event{action: "key.created", tenant: owner, app: k.AppID, key: k.ID, detail: detail}); err != nil {
			return err
		}
		return settle(ctx, tx, owner, actor)
	})
	if err != nil {
		return translate("finish key", err)
	}
	db.changed(owner, "")
	db.wakeWorkers(tenant.AppWork, tenant.KeyWork)
	return nil
}

// retireKey lets a key that next replaces work on for next's overlap.
func retireKey(ctx context.Context, tx pgx.Tx, id, next uuid.UUID, owner tenant.ID, actor tenant.Actor) error {
	var state tenant.KeyState
	var app tenant.AppID
	var name string
	var retires *time.Time
	err := tx.QueryRow(ctx, `
		UPDATE keys k
		SET state = CASE WHEN n.overlap > '0' THEN 'retiring' ELSE 'revoking' END,
			retires_at = now() + n.overlap, end_reason = 'rotated', priority = n.priority, requested_by = n.requested_by, request_id = n.request_id,
			attempts = 0, next_attempt_at = now(), updated_at = now()
		FROM keys n WHERE k.id = $1 AND k.state = 'active' AND n.id = $2
		RETURNING k.state, k.app_id, k.name, k.retires_at`, id, next).Scan(&state, &app, &name, &retires)
	if errors.Is(err, pgx.ErrNoRows) { // it was revoked meanwhile
		return nil
	}
	if err != nil {
		return err
	}
	return audit(ctx, tx, actor, event{action: "key." + string(state), tenant: owner, app: app, key: id,
		detail: map[string]any{"name": name, "reason": tenant.EndRotated, "replaced_by": next, "retires_at": retires}})
}

// KeyEnded records that a leased key works no longer upstream, or, if lost,
// that it may work there and cannot be addressed. Its secret is erased. A tenant
// that is being suspended is suspended with the last of its keys.
func (db *DB) KeyEnded(ctx context.Context, k tenant.LeasedKey, lost *tenant.Problem, actor tenant.Actor) error {
	state, action := tenant.KeyRevoked, "key.revoked"
	if lost != nil {
		state, action = tenant.KeyLost, "key.lost"
	}
	var owner tenant.ID
	err := db.inTx(ctx, func(tx pgx.Tx) (err error) {
		if owner, err = lockOwner(ctx, tx, k.AppID); err != nil {
			return err
		}
		var reason tenant.EndReason
		err = tx.QueryRow(ctx, `
			UPDATE keys
			SET state = $3, revoked_at = CASE WHEN $3 = 'revoked' THEN now() END, ciphertext = NULL,
				in_doubt_since = CASE WHEN $3 = 'lost' THEN in_doubt_since END, problem = $4, attempts = 0,
				leased_until = '-infinity', updated_at = now()
			WHERE id = $1 AND leased_until = $2 AND state = 'revoking'
			RETURNING coalesce(end_reason, ''), coalesce(request_id, '')`,
			k.ID, k.LeasedUntil, state, lost).Scan(&reason, &actor.RequestID)
		if errors.Is(err, pgx.ErrNoRows) {
			return tenant.ErrLeaseLost
		}
		if err != nil {
			return err
		}
		detail := map[string]any{"name": k.Name}
		if reason != "" {
			detail["reason"] = reason
		}
		if err := audit(ctx, tx, actor, event{action: action, tenant: owner, app: k.AppID, key: k.ID, detail: detail}); err != nil {
			return err
		}
		return settle(ctx, tx, owner, actor)
	})
	db.changed(owner, "")
	return translate("record end of key", err)
}

// KeyNotReplaced cancels the rotation that a leased key belongs to, since the key to be replaced is
// dead: a person must decide.
func (db *DB) KeyNotReplaced(ctx context.Context, k tenant.LeasedKey, actor tenant.Actor) error {
	var owner tenant.ID
	err := db.inTx(ctx, func(tx pgx.Tx) (err error) {
		if owner, err = lockOwner(ctx, tx, k.AppID); err != nil {
			return err
		}
		tag, err := tx.Exec(ctx, `
			UPDATE keys SET state = 'revoked', revoked_at = now(), end_reason = $3, problem = NULL, leased_until = '-infinity', updated_at = now()
			WHERE id = $1 AND leased_until = $2 AND state = 'creating'`, k.ID, k.LeasedUntil, tenant.EndDead)
		if err := oneRow("cancel rotation", tag, err); err != nil {
			return err
		}
		if err := audit(ctx, tx, actor, event{action: "key.revoked", tenant: owner, app: k.AppID, key: k.ID,
			detail: map[string]any{"name": k.Name, "reason": tenant.EndDead}}); err != nil {
			return err
		}
		if err := settle(ctx, tx, owner, actor); err != nil {
			return err
		}
		return addFinding(ctx, tx, tenant.Finding{Kind: tenant.FoundKeyGone, AppID: k.AppID, KeyID: k.Replaces, TenantID: owner})
	})
	db.changed(owner, "")
	return translate("cancel rotation", err)
}

// KeyEndUnconfirmed records that a leased key should have ended and may work: it keeps its secret, and is
// due again after delay.
func (db *DB) KeyEndUnconfirmed(ctx context.Context, k tenant.LeasedKey, delay time.Duration) error {
	tag, err := db.pool.Exec(ctx, `
		UPDATE keys
		SET end_unconfirmed_since = coalesce(end_unconfirmed_since, now()), next_attempt_at = now() + $3, attempts = attempts + 1, problem = NULL,
			leased_until = '-infinity', updated_at = now()
		WHERE id = $1 AND leased_until = $2 AND state = 'revoking'`, k.ID, k.LeasedUntil, delay)
	return oneRow("record unconfirmed end of key", tag, err)
}
