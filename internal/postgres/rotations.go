package postgres

import (
	"context"
	"errors"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/tenant"
)

// wake wakes who waits for a tenant, on every replica.
func wakeTenant(ctx context.Context, tx pgx.Tx, id tenant.ID) error {
	_, err := tx.Exec(ctx, `SELECT pg_notify('`+tenantChannel+`', $1)`, string(id))
	return err
}

func oneKey(ctx context.Context, tx pgx.Tx, where string, args ...any) (tenant.Key, error) {
	rows, _ := tx.Query(ctx, `SELECT `+keyColumns+` FROM keys k WHERE `+where, args...)
	k, err := pgx.CollectExactlyOneRow(rows, scanKey)
	if errors.Is(err, pgx.ErrNoRows) {
		return k, errNotFound("key")
	}
	return k, err
}

// Key reads the key of a name that a tenant has or is about to have: the one that
// works, or else the one that is being made, or else the last there was. It reports
// tenant.NotFound for an unknown tenant or name.
func (db *DB) Key(ctx context.Context, id tenant.ID, name string) (tenant.Key, error) {
	rows, _ := db.pool.Query(ctx, `
		SELECT `+keyColumns+` FROM tenants t JOIN keys k ON k.app_id = t.app_id
		WHERE t.id = $1 AND k.name = $2
		ORDER BY k.state = 'active' DESC, k.state = 'creating' DESC, k.created_at DESC, k.id DESC LIMIT 1`, id, name)
	k, err := pgx.CollectExactlyOneRow(rows, scanKey)
	if errors.Is(err, pgx.ErrNoRows) {
		if _, err := db.Tenant(ctx, id); err != nil {
			return k, err
		}
		return k, errNotFound("key")
	}
	return k, translate("read key", err)
}

// AddKey begins to make a further key for a tenant, as the row row, or finds the key
// that is there. It reports tenant.Conflict for a tenant that is not active, for a key
// of other scopes or expiry, and beyond tenant.MaxKeys names.
func (db *DB) AddKey(ctx context.Context, id tenant.ID, row tenant.NewKeyRow, spec tenant.KeySpec, actor tenant.Actor) (key tenant.Key, created bool, err error) {
	_, err = db.change(ctx, "add key", id, func(tx pgx.Tx, t tenant.Tenant) ([]keyInLane, error) {
		if _, err := tenant.ChangeKey.Check(t.State); err != nil {
			return nil, err
		}
		key, err = oneKey(ctx, tx, `k.app_id = $1 AND k.name = $2 AND k.state IN ('creating', 'active') ORDER BY k.state LIMIT 1`, t.AppID, spec.Name)
		if err == nil {
			return nil, sameKey(key, spec)
		}
		if !errors.Is(err, tenant.NotFound) {
			return nil, err
		}
		if err := notOurs(t); err != nil {
			return nil, err
		}
		var names int
		if err := tx.QueryRow(ctx, `
			SELECT count(DISTINCT name) FROM keys WHERE app_id = $1 AND state IN ('creating', 'active', 'retiring')`, t.AppID).Scan(&names); err != nil {
			return nil, err
		}
		if names >= tenant.MaxKeys {
			return nil, tenant.Errorf(tenant.Conflict, "too_many_keys", "the tenant has keys of %d names, and can have no more: revoke one first", names)
		}
		var expires *time.Time
		if !spec.ExpiresAt.IsZero() {
			expires = &spec.ExpiresAt
		}
		if _, err := tx.Exec(ctx, `
			INSERT INTO keys (id, app_id, name, scopes, expires_at, lane, request_id, enqueued_at) VALUES ($1, $2, $3, $4, $5, 0, nullif($6, ''), now())`,
			row.ID, t.AppID, row.Name, row.Scopes, expires, actor.RequestID); err != nil {
			return nil, err
		}
		created = true
		if key, err = oneKey(ctx, tx, `k.id = $1`, row.ID); err != nil {
			return nil, err
		}
		return []keyInLane{{row.ID, tenant.Urgent}}, audit(ctx, tx, actor, event{action: "key.creating", tenant: id, app: t.AppID, key: row.ID,
			detail: map[string]any{"name": row.Name, "scopes": row.Scopes, "expires_at": expires}})
	})
	return key, created, err
}

// sameKey reports tenant.Conflict if spec asks for another key than there is.
func sameKey(k tenant.Key, spec tenant.KeySpec) error {
	differs := ""
	switch {
	case spec.Scopes != nil && !tenant.SameScopes(spec.Scopes, k.Scopes):
		differs = "scopes"
	case !spec.ExpiresAt.IsZero() && !spec.ExpiresAt.Truncate(time.Microsecond).Equal(k.ExpiresAt):
		differs = "expires_at"
	default:
		return nil
	}
	e := tenant.Errorf(tenant.Conflict, "key_differs", "there is a key of this name with another %s; revoke it first, or take another name", differs)
	e.Field = differs
	return e
}

// RevokeKeyNamed ends every key of a name that a tenant has. It returns the one that
// worked, or else the last there was, and reports tenant.NotFound for an unknown
// tenant or name.
func (db *DB) RevokeKeyNamed(ctx context.Context, id tenant.ID, name string, actor tenant.Actor) (key tenant.Key, err error) {
	_, err = db.change(ctx, "revoke key", id, func(tx pgx.Tx, t tenant.Tenant) ([]keyInLane, error) {
		key, err = oneKey(ctx, tx, `k.app_id = $1 AND k.name = $2
			ORDER BY k.state = 'active' DESC, k.state IN ('creating', 'retiring') DESC, k.created_at DESC, k.id DESC LIMIT 1`, t.AppID, name)
		if err != nil {
			return nil, err
		}
		keys, err := endKeys(ctx, tx, actor, tenant.EndRevoked, urgently(), false, `k.app_id = $6 AND k.name = $7`, t.AppID, name)
		if err != nil {
			return nil, err
		}
		if err := settle(ctx, tx, id, actor); err != nil {
			return nil, err
		}
		key, err = oneKey(ctx, tx, `k.id = $1`, key.ID)
		return keys, err
	})
	return key, err
}

// StartRotation begins to replace the key of a name, or finds the rotation of that id.
// It reports tenant.NotFound if no key of the name works, and tenant.Conflict for a
// tenant that is not active, while another rotation of the name is under way, and for
// a rotation of the same id with another overlap.
func (db *DB) StartRotation(ctx context.Context, id tenant.ID, n tenant.NewRotation, actor tenant.Actor) (r tenant.Rotation, err error) {
	_, err = db.change(ctx, "start rotation", id, func(tx pgx.Tx, t tenant.Tenant) ([]keyInLane, error) {
		r, err = rotationIn(ctx, tx, t, n.KeyName, n.ID)
		if err == nil {
			if n.Overlap != nil && *n.Overlap != r.Overlap {
				return nil, tenant.Errorf(tenant.Conflict, "rotation_differs", "the rotation was begun with an overlap of %s", r.Overlap)
			}
			return nil, nil
		}
		if !errors.Is(err, tenant.NotFound) {
			return nil, err
		}
		if _, err := tenant.ChangeKey.Check(t.State); err != nil {
			return nil, err
		}
		if err := noOtherRotation(ctx, tx, t.AppID, n.KeyName); err != nil {
			return nil, err
		}
		old, err := oneKey(ctx, tx, `k.app_id = $1 AND k.name = $2 AND k.state = 'active'`, t.AppID, n.KeyName)
		if err != nil {
			return nil, err
		}
		if err := insertRotation(ctx, tx, t, old, n, actor); err != nil {
			return nil, err
		}
		r, err = rotationIn(ctx, tx, t, n.KeyName, n.ID)
		return []keyInLane{{n.KeyID, n.Lane}}, err
	})
	return r, err
}

func insertRotation(ctx context.Context, tx pgx.Tx, t tenant.Tenant, old tenant.Key, n tenant.NewRotation, actor tenant.Actor) error {
	if err := notOurs(t); err != nil {
		return err
	}
	overlap := tenant.DefaultOverlap
	if n.Overlap != nil {
		overlap = *n.Overlap
	}
	if _, err := tx.Exec(ctx, `
		INSERT INTO keys (id, app_id, name, scopes, expires_at, lane, rotation_id, replaces, overlap, request_id, enqueued_at)
		SELECT $1, app_id, name, scopes, expires_at, $3, $4, id, $5::interval, nullif($6, ''), now() FROM keys WHERE id = $2`,
		n.KeyID, old.ID, n.Lane, n.ID, overlap, actor.RequestID); err != nil {
		return err
	}
	return audit(ctx, tx, actor, event{action: "key.rotating", tenant: t.ID, app: t.AppID, key: n.KeyID,
		detail: map[string]any{"name": n.KeyName, "rotation_id": n.ID, "replaces": old.ID, "overlap_seconds": overlap.Seconds()}})
}

// noOtherRotation reports tenant.Conflict while a key of a name is being made or
// replaced.
func noOtherRotation(ctx context.Context, tx pgx.Tx, app tenant.AppID, name string) error {
	var other, state string
	err := tx.QueryRow(ctx, `
		SELECT coalesce(k.rotation_id, n.rotation_id, ''), k.state FROM keys k LEFT JOIN keys n ON n.replaces = k.id AND n.rotation_id IS NOT NULL
		WHERE k.app_id = $1 AND k.name = $2 AND k.state IN ('creating', 'retiring') ORDER BY k.state LIMIT 1`, app, name).Scan(&other, &state)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return nil
	case err != nil:
		return err
	case other == "":
		return tenant.Errorf(tenant.Conflict, "key_creating", "the key is being made: wait until it works")
	}
	return tenant.Errorf(tenant.Conflict, "rotation_under_way",
		"the rotation %q of this key is under way: wait for its overlap to end, or confirm it", other)
}

// rotationIn reads a rotation of a tenant's key.
func rotationIn(ctx context.Context, q interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}, t tenant.Tenant, name, id string) (tenant.Rotation, error) {
	r := tenant.Rotation{ID: id, TenantID: t.ID, KeyName: name}
	rows, _ := q.Query(ctx, `
		SELECT `+keyColumns+`, n.overlap FROM keys n JOIN keys k ON k.id IN (n.id, n.replaces)
		WHERE n.app_id = $1 AND n.name = $2 AND n.rotation_id = $3 ORDER BY k.id = n.replaces`, t.AppID, name, id)
	keys := []*tenant.Key{&r.New, &r.Old}
	found := 0
	defer rows.Close()
	for rows.Next() && found < len(keys) {
		fields, done := keyFields(keys[found])
		if err := rows.Scan(append(fields, &r.Overlap)...); err != nil {
			return r, err
		}
		done()
		found++
	}
	if err := rows.Err(); err != nil {
		return r, err
	}
	if found < len(keys) {
		return r, errNotFound("rotation")
	}
	r.State = tenant.StateOfRotation(r.New, r.Old)
	return r, nil
}

// Rotation reads a rotation. It reports tenant.NotFound for an unknown tenant, key or
// rotation.
func (db *DB) Rotation(ctx context.Context, id tenant.ID, name, rotation string) (tenant.Rotation, error) {
	t, err := db.Tenant(ctx, id)
	if err != nil {
		return tenant.Rotation{}, err
	}
	r, err := rotationIn(ctx, db.pool, t, name, rotation)
	return r, translate("read rotation", err)
}

// ConfirmRotation ends the overlap of a rotation now. It reports tenant.NotFound for
// an unknown one, and tenant.Conflict while the new key does not work yet.
func (db *DB) ConfirmRotation(ctx context.Context, id tenant.ID, name, rotation string, actor tenant.Actor) (r tenant.Rotation, err error) {
	_, err = db.change(ctx, "confirm rotation", id, func(tx pgx.Tx, t tenant.Tenant) ([]keyInLane, error) {
		if r, err = rotationIn(ctx, tx, t, name, rotation); err != nil {
			return nil, err
		}
		switch r.State {
		case tenant.RotationCreating:
			return nil, tenant.Errorf(tenant.Conflict, "rotation_creating", "the new key does not work yet, and the old one is still needed")
		case tenant.RotationCancelled:
			return nil, tenant.Errorf(tenant.Conflict, "rotation_cancelled", "the rotation was cancelled: its new key never worked")
		case tenant.RotationDone:
			return nil, nil
		}
		if err := audit(ctx, tx, actor, event{action: "key.rotation_confirmed", tenant: id, app: t.AppID, key: r.New.ID,
			detail: map[string]any{"name": name, "rotation_id": rotation}}); err != nil {
			return nil, err
		}
		keys, err := endKeys(ctx, tx, actor, tenant.EndRotated, urgently(), false, `k.id = $6`, r.Old.ID)
		if err != nil {
			return nil, err
		}
		r, err = rotationIn(ctx, tx, t, name, rotation)
		return keys, err
	})
	return r, err
}

// RevealKey is Reveal for one key, which must be active.
func (db *DB) RevealKey(ctx context.Context, id tenant.ID, key uuid.UUID, actor tenant.Actor) (tenant.Key, []byte, error) {
	return db.reveal(ctx, id, `k.id = $2`, key, actor)
}

// Quarantine ends the key of a fingerprint at once, and begins to make its successor
// as the row next, if its tenant is active and has none of the name coming. It reports
// tenant.NotFound if Tenantry never held such a key.
func (db *DB) Quarantine(ctx context.Context, fingerprint []byte, next uuid.UUID, actor tenant.Actor) (tenant.Quarantine, error) {
	var q tenant.Quarantine
	var keys []keyInLane
	var discarded []tenant.AppID
	err := pgx.BeginFunc(ctx, db.pool, func(tx pgx.Tx) error {
		k, err := oneKey(ctx, tx, `k.fingerprint = $1`, fingerprint)
		if err != nil {
			return err
		}
		owner, err := lockOwner(ctx, tx, k.AppID)
		if err != nil {
			return err
		}
		// Anew: what was read before the lock may have changed.
		if k, err = oneKey(ctx, tx, `k.id = $1`, k.ID); err != nil {
			return err
		}
		q.TenantID = owner
		if err := audit(ctx, tx, actor, event{action: "key.quarantined", tenant: owner, app: k.AppID, key: k.ID,
			detail: map[string]any{"name": k.Name, "state": k.State}}); err != nil {
			return err
		}
		if keys, err = endKeys(ctx, tx, actor, tenant.EndQuarantined, urgently(), false, `k.id = $6`, k.ID); err != nil {
			return err
		}
		if k.State == tenant.KeyRevoking { // it is on its way: now
			if _, err := tx.Exec(ctx, `UPDATE keys SET lane = 0, next_attempt_at = now(), enqueued_at = now() WHERE id = $1`, k.ID); err != nil {
				return err
			}
			keys = append(keys, keyInLane{k.ID, tenant.Urgent})
		}
		if q.Key, err = oneKey(ctx, tx, `k.id = $1`, k.ID); err != nil {
			return err
		}
		if owner == "" {
			// Of the pool: what is in the app is not to be trusted either.
			rows, _ := tx.Query(ctx, `
				WITH discarded AS (
					UPDATE apps SET state = 'purging', next_attempt_at = now(), attempts = 0, enqueued_at = now(), updated_at = now()
					WHERE id = $1 AND state = 'ready' RETURNING id
				), audited AS (
					INSERT INTO audit_events (actor, request_id, action, app_id, detail)
					SELECT $2, nullif($3, ''), 'app.discarded', id, '{"reason": "quarantined"}' FROM discarded
				)
				SELECT id FROM discarded`, k.AppID, actor.Name, actor.RequestID)
			discarded, err = pgx.CollectRows(rows, pgx.RowTo[tenant.AppID])
			return err
		}
		if q.Successor, err = successor(ctx, tx, k, owner, next, actor); err != nil {
			return err
		}
		if q.Successor.State == tenant.KeyCreating {
			if _, err := tx.Exec(ctx, `UPDATE keys SET lane = 0, next_attempt_at = now(), enqueued_at = now() WHERE id = $1`, q.Successor.ID); err != nil {
				return err
			}
			keys = append(keys, keyInLane{q.Successor.ID, tenant.Urgent})
		}
		return wakeTenant(ctx, tx, owner)
	})
	if err != nil {
		return q, translate("quarantine key", err)
	}
	db.changed(q.TenantID, "")
	return q, errors.Join(db.enqueue(ctx, keyJobs(keys)), db.enqueueApps(ctx, tenant.QueueBackground, discarded))
}

// successor returns the key that takes the place of k, which has been ended: the one
// that there is, or a new one if k worked and its tenant is active. Its ID is zero for
// none.
func successor(ctx context.Context, tx pgx.Tx, k tenant.Key, owner tenant.ID, next uuid.UUID, actor tenant.Actor) (tenant.Key, error) {
	there, err := oneKey(ctx, tx, `k.app_id = $1 AND k.name = $2 AND k.state IN ('creating', 'active') ORDER BY k.state LIMIT 1`, k.AppID, k.Name)
	if err == nil || !errors.Is(err, tenant.NotFound) {
		return there, err
	}
	if k.State != tenant.KeyActive && k.State != tenant.KeyRetiring {
		return tenant.Key{}, nil
	}
	tag, err := tx.Exec(ctx, `
		INSERT INTO keys (id, app_id, name, scopes, expires_at, lane, request_id)
		SELECT $2, k.app_id, k.name, k.scopes, k.expires_at, 0, nullif($4, '')
		FROM keys k JOIN tenants t ON t.app_id = k.app_id
		WHERE k.id = $1 AND t.id = $3 AND t.state IN ('active', 'resuming') AND t.app_user_id IS NULL`, k.ID, next, owner, actor.RequestID)
	if err != nil || tag.RowsAffected() == 0 {
		return tenant.Key{}, err
	}
	if err := audit(ctx, tx, actor, event{action: "key.creating", tenant: owner, app: k.AppID, key: next,
		detail: map[string]any{"name": k.Name, "scopes": k.Scopes, "succeeds": k.ID}}); err != nil {
		return tenant.Key{}, err
	}
	return oneKey(ctx, tx, `k.id = $1`, next)
}
