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

// AddKey begins to make a further key for a tenant, as the row that newRow returns for it, or finds the
// key that is there. It reports the error of newRow, and tenant.Conflict for a tenant that is not active, for a key
// of other scopes or expiry, and beyond tenant.MaxKeys names.
func (db *DB) AddKey(ctx context.Context, id tenant.ID, spec tenant.KeySpec, newRow func(tenant.Tenant) (tenant.NewKeyRow, error), actor tenant.Actor) (key tenant.Key, created bool, err error) {
	_, err = db.change(ctx, "add key", id, actor, func(tx pgx.Tx, t tenant.Tenant) error {
		row, err := newRow(t)
		if err != nil {
			return err
		}
		if _, err := tenant.ChangeKey.Check(t.State); err != nil {
			return err
		}
		key, err = oneKey(ctx, tx, `k.app_id = $1 AND k.name = $2 AND k.state IN ('creating', 'active') ORDER BY k.state LIMIT 1`, t.AppID, spec.Name)
		if err == nil {
			return sameKey(key, spec)
		}
		if !errors.Is(err, tenant.NotFound) {
			return err
		}
		if err := notOurs(t); err != nil {
			return err
		}
		var names int
		if err := tx.QueryRow(ctx, `
			SELECT count(DISTINCT name) FROM keys WHERE app_id = $1 AND state IN ('creating', 'active', 'retiring')`, t.AppID).Scan(&names); err != nil {
			return err
		}
		if names >= tenant.MaxKeys {
			return tenant.Errorf(tenant.Conflict, "too_many_keys", "the tenant has keys of %d names, and can have no more: revoke one first", names)
		}
		var expires *time.Time
		if !spec.ExpiresAt.IsZero() {
			expires = &spec.ExpiresAt
		}
		if _, err := tx.Exec(ctx, `
			INSERT INTO keys (id, app_id, name, scopes, expires_at, priority, requested_by, request_id)
			VALUES ($1, $2, $3, $4, $5, `+share(`1`, `$7`)+`, $7, nullif($6, ''))`,
			row.ID, t.AppID, row.Name, row.Scopes, expires, actor.RequestID, actor.Name); err != nil {
			return err
		}
		created = true
		if key, err = oneKey(ctx, tx, `k.id = $1`, row.ID); err != nil {
			return err
		}
		return audit(ctx, tx, actor, event{action: "key.creating", tenant: id, app: t.AppID, key: row.ID,
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
	_, err = db.change(ctx, "revoke key", id, actor, func(tx pgx.Tx, t tenant.Tenant) error {
		key, err = oneKey(ctx, tx, `k.app_id = $1 AND k.name = $2
			ORDER BY k.state = 'active' DESC, k.state IN ('creating', 'retiring') DESC, k.created_at DESC, k.id DESC LIMIT 1`, t.AppID, name)
		if err != nil {
			return err
		}
		if _, err := endKeys(ctx, tx, actor, tenant.EndRevoked, tenant.Interactive, false, `k.app_id = $6 AND k.name = $7`, t.AppID, name); err != nil {
			return err
		}
		if err := settle(ctx, tx, id, actor); err != nil {
			return err
		}
		key, err = oneKey(ctx, tx, `k.id = $1`, key.ID)
		return err
	})
	return key, err
}

// StartRotation begins to replace the key of a name, or finds the rotation of that id.
// It reports tenant.NotFound if no key of the name works, and tenant.Conflict for a
// tenant that is not active, while another rotation of the name is under way, and for
// a rotation of the same id with another overlap.
func (db *DB) StartRotation(ctx context.Context, id tenant.ID, n tenant.NewRotation, actor tenant.Actor) (r tenant.Rotation, err error) {
	_, err = db.change(ctx, "start rotation", id, actor, func(tx pgx.Tx, t tenant.Tenant) error {
		r, err = rotationIn(ctx, tx, t, n.KeyName, n.ID)
		if err == nil {
			if n.Overlap != nil && *n.Overlap != r.Overlap {
				return tenant.Errorf(tenant.Conflict, "rotation_differs", "the rotation was begun with an overlap of %s", r.Overlap)
			}
			return nil
		}
		if !errors.Is(err, tenant.NotFound) {
			return err
		}
		if _, err := tenant.ChangeKey.Check(t.State); err != nil {
			return err
		}
		if err := noOtherRotation(ctx, tx, t.AppID, n.KeyName); err != nil {
			return err
		}
		old, err := oneKey(ctx, tx, `k.app_id = $1 AND k.name = $2 AND k.state = 'active'`, t.AppID, n.KeyName)
		if err != nil {
			return err
		}
		if err := insertRotation(ctx, tx, t, old, n, actor); err != nil {
			return err
		}
		r, err = rotationIn(ctx, tx, t, n.KeyName, n.ID)
		return err
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
		INSERT INTO keys (id, app_id, name, scopes, expires_at, priority, requested_by, rotation_id, replaces, overlap, request_id)
		SELECT $1, app_id, name, scopes, expires_at, `+share(`$3`, `$7`)+`, $7, $4, id, $5::interval, nullif($6, '') FROM keys WHERE id = $2`,
		n.KeyID, old.ID, n.Priority, n.ID, overlap, actor.RequestID, actor.Name); err != nil {
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
	_, err = db.change(ctx, "confirm rotation", id, actor, func(tx pgx.Tx, t tenant.Tenant) error {
		if r, err = rotationIn(ctx, tx, t, name, rotation); err != nil {
			return err
		}
		switch r.State {
		case tenant.RotationCreating:
			return tenant.Errorf(tenant.Conflict, "rotation_creating", "the new key does not work yet, and the old one is still needed")
		case tenant.RotationCancelled:
			return tenant.Errorf(tenant.Conflict, "rotation_cancelled", "the rotation was cancelled: its new key never worked")
		case tenant.RotationDone:
			return nil
		}
		if err := audit(ctx, tx, actor, event{action: "key.rotation_confirmed", tenant: id, app: t.AppID, key: r.New.ID,
			detail: map[string]any{"name": name, "rotation_id": rotation}}); err != nil {
			return err
		}
		if _, err := endKeys(ctx, tx, actor, tenant.EndRotated, tenant.Interactive, false, `k.id = $6`, r.Old.ID); err != nil {
			return err
		}
		r, err = rotationIn(ctx, tx, t, name, rotation)
		return err
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
	if err := db.ensureIncarnation(ctx); err != nil {
		return q, err
	}
	var app tenant.AppID
	quarantine := func(tx pgx.Tx) error {
		q = tenant.Quarantine{}
		k, err := oneKey(ctx, tx, `k.fingerprint = $1`, fingerprint)
		if err != nil {
			return err
		}
		app = k.AppID
		owner, err := lockOwner(ctx, tx, k.AppID)
		if err != nil {
			return err
		}
		if owner == "" {
			// The app may have been handed out since; a locked app is not handed out.
			var given bool
			if err := tx.QueryRow(ctx, `SELECT state = 'held' FROM apps WHERE id = $1 FOR UPDATE`, k.AppID).Scan(&given); err != nil {
				return err
			}
			if given {
				return errAppeared
			}
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
		if _, err = endKeys(ctx, tx, actor, tenant.EndQuarantined, tenant.Incident, false, `k.id = $6`, k.ID); err != nil {
			return err
		}
		if k.State == tenant.KeyRevoking { // a worker may have it, and wait at a lower priority
			if _, err := tx.Exec(ctx, `UPDATE keys SET priority = 0, end_reason = 'quarantined', next_attempt_at = now(), leased_until = '-infinity' WHERE id = $1`, k.ID); err != nil {
				return err
			}
		}
		if q.Key, err = oneKey(ctx, tx, `k.id = $1`, k.ID); err != nil {
			return err
		}
		if owner == "" {
			// The content of a pool app is not trusted after a leak either. An app of an earlier
			// incarnation may have a tenant.
			_, err := tx.Exec(ctx, `
				WITH discarded AS (
					UPDATE apps SET state = CASE WHEN incarnation = `+currentIncarnation+` THEN 'purging' ELSE 'retired' END,
						next_attempt_at = now(), attempts = 0, updated_at = now()
					WHERE id = $1 AND state = 'ready' RETURNING id
				)
				INSERT INTO audit_events (actor, request_id, action, app_id, detail)
				SELECT $2, nullif($3, ''), 'app.discarded', id, '{"reason": "quarantined"}' FROM discarded`, k.AppID, actor.Name, actor.RequestID)
			return err
		}
		if _, err := endUnknownKeys(ctx, tx, k.AppID); err != nil {
			return err
		}
		if q.Successor, err = successor(ctx, tx, k, owner, next, actor); err != nil {
			return err
		}
		if q.Successor.State == tenant.KeyCreating {
			if _, err := tx.Exec(ctx, `UPDATE keys SET priority = 0, next_attempt_at = now() WHERE id = $1`, q.Successor.ID); err != nil {
				return err
			}
		}
		return wakeTenant(ctx, tx, owner)
	}
	err := db.inTx(ctx, quarantine)
	for range 2 {
		if errors.Is(err, errAppeared) {
			err = db.inTx(ctx, quarantine)
		}
	}
	if errors.Is(err, errAppeared) { // its tenant did not appear: a table was restored alone
		return q, tenant.Errorf(tenant.Conflict, "app_without_tenant",
			"no tenant has the app %s, although it was handed out: revoke the key in Clarifai, and run `tenantry recover begin`", app)
	}
	if err != nil {
		return q, translate("quarantine key", err)
	}
	db.changed(q.TenantID, "")
	db.wakeWorkers(tenant.AppWork, tenant.KeyWork)
	return q, nil
}

// BeginQuarantine records a leaked key that has no row, unless it is recorded already. A worker
// asks Clarifai, with the key itself, which app it opens.
func (db *DB) BeginQuarantine(ctx context.Context, key tenant.SealedKey, actor tenant.Actor) error {
	_, err := db.pool.Exec(ctx, `
		INSERT INTO quarantines AS q (id, ciphertext, fingerprint, requested_by, request_id) VALUES ($1, $2, $3, $4, nullif($5, ''))
		ON CONFLICT (fingerprint) DO UPDATE
		SET id = excluded.id, ciphertext = excluded.ciphertext, state = 'checking', requested_by = excluded.requested_by,
			request_id = excluded.request_id, next_attempt_at = now(), attempts = 0, problem = NULL, updated_at = now()
		WHERE q.state <> 'checking'`, key.ID, key.Ciphertext, key.Fingerprint, actor.Name, actor.RequestID)
	return translate("begin quarantine", err)
}

// QuarantineState reads the state of the quarantine of an unknown key. It reports
// tenant.NotFound for an unknown fingerprint.
func (db *DB) QuarantineState(ctx context.Context, fingerprint []byte) (tenant.UnknownKey, error) {
	var k tenant.UnknownKey
	err := db.pool.QueryRow(ctx, `SELECT state, problem FROM quarantines WHERE fingerprint = $1`, fingerprint).Scan(&k.State, &k.Problem)
	if errors.Is(err, pgx.ErrNoRows) {
		return k, errNotFound("key")
	}
	return k, translate("read quarantine", err)
}

// LeaseQuarantine acquires the unknown key that is due first. It reports tenant.NotFound if
// none is due.
func (db *DB) LeaseQuarantine(ctx context.Context, lease time.Duration) (tenant.UnknownKey, error) {
	var k tenant.UnknownKey
	err := db.pool.QueryRow(ctx, `
		UPDATE quarantines SET leased_until = now() + $1
		WHERE id = (SELECT id FROM quarantines WHERE state = 'checking' AND leased_until < now() AND next_attempt_at <= now() AND NOT `+workPaused+`
			ORDER BY next_attempt_at LIMIT 1 FOR UPDATE SKIP LOCKED)
		RETURNING id, ciphertext, fingerprint, requested_by, coalesce(request_id, ''), attempts, problem, leased_until, state`, lease).
		Scan(&k.ID, &k.Ciphertext, &k.Fingerprint, &k.RequestedBy.Name, &k.RequestedBy.RequestID, &k.Attempts, &k.Problem, &k.LeasedUntil, &k.State)
	if errors.Is(err, pgx.ErrNoRows) {
		return k, errNotFound("key")
	}
	return k, translate("acquire quarantine", err)
}

// EndQuarantine ends a leased quarantine. If the key opens an app that the rows know, it
// becomes a revoking key of that app. If the key has got a row by now that does not say that it is
// dead, EndQuarantine changes nothing and returns an error: the next attempt ends that row.
func (db *DB) EndQuarantine(ctx context.Context, k tenant.UnknownKey, found tenant.AdoptedKey, app tenant.AppID, problem *tenant.Problem) error {
	var owner tenant.ID
	err := db.inTx(ctx, func(tx pgx.Tx) (err error) {
		if app != "" {
			if owner, err = lockOwner(ctx, tx, app); err != nil {
				return err
			}
			ended, err := endFound(ctx, tx, app, []tenant.AdoptedKey{found}, tenant.EndQuarantined, k.RequestedBy)
			if err != nil {
				return err
			}
			if len(ended) == 0 { // or the quarantine would be done, and the key might work
				return fmt.Errorf("the key %s has a row that is not dead", found.ID)
			}
			if err := audit(ctx, tx, k.RequestedBy, event{action: "key.quarantined", tenant: owner, app: app, key: found.ID,
				detail: map[string]any{"found": true}}); err != nil {
				return err
			}
			if _, err := endUnknownKeys(ctx, tx, app); err != nil {
				return err
			}
		}
		tag, err := tx.Exec(ctx, `
			UPDATE quarantines SET state = CASE WHEN $3::jsonb IS NULL THEN 'done' ELSE 'refused' END, ciphertext = NULL, problem = $3,
				leased_until = '-infinity', updated_at = now()
			WHERE id = $1 AND leased_until = $2`, k.ID, k.LeasedUntil, problem)
		if err := oneRow("end quarantine", tag, err); err != nil {
			return err
		}
		return wakeTenant(ctx, tx, tenant.UnknownKeyChannel(k.Fingerprint))
	})
	db.changed(owner, "")
	if err != nil {
		return translate("end quarantine", err)
	}
	db.wakeWorkers(tenant.AppWork, tenant.KeyWork)
	return nil
}

// QuarantineSetback records a failed attempt on a leased quarantine and releases it. Without a
// problem it keeps the earlier one.
func (db *DB) QuarantineSetback(ctx context.Context, k tenant.UnknownKey, s tenant.Setback) error {
	problem := k.Problem
	if s.Problem.Code != "" {
		problem = &s.Problem
	}
	tag, err := db.pool.Exec(ctx, `
		UPDATE quarantines SET problem = $3, next_attempt_at = now() + $4::interval, attempts = attempts + $5::int, leased_until = '-infinity', updated_at = now()
		WHERE id = $1 AND leased_until = $2`, k.ID, k.LeasedUntil, problem, s.Delay, count(s.Counts))
	return oneRow("record setback of quarantine", tag, err)
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
		INSERT INTO keys (id, app_id, name, scopes, expires_at, priority, requested_by, request_id)
		SELECT $2, k.app_id, k.name, k.scopes, k.expires_at, 0, $5, nullif($4, '')
		FROM keys k JOIN tenants t ON t.app_id = k.app_id
		WHERE k.id = $1 AND t.id = $3 AND t.state IN ('active', 'resuming') AND t.app_user_id IS NULL`, k.ID, next, owner, actor.RequestID, actor.Name)
	if err != nil || tag.RowsAffected() == 0 {
		return tenant.Key{}, err
	}
	if err := audit(ctx, tx, actor, event{action: "key.creating", tenant: owner, app: k.AppID, key: next,
		detail: map[string]any{"name": k.Name, "scopes": k.Scopes, "succeeds": k.ID}}); err != nil {
		return tenant.Key{}, err
	}
	return oneKey(ctx, tx, `k.id = $1`, next)
}
