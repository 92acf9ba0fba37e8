package postgres

import (
	"context"
	"errors"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/tenant"
)

const keyColumns = `k.id, k.app_id, k.name, k.state, k.hint, k.scopes, k.created_at, k.activated_at, k.revoked_at, k.expires_at`

func keyFields(k *tenant.Key) ([]any, func()) {
	var activated, revoked, expires *time.Time
	return []any{&k.ID, &k.AppID, &k.Name, &k.State, &k.Hint, &k.Scopes, &k.CreatedAt, &activated, &revoked, &expires},
		func() { k.ActivatedAt, k.RevokedAt, k.ExpiresAt = orZero(activated), orZero(revoked), orZero(expires) }
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
// active key.
func (db *DB) Reveal(ctx context.Context, id tenant.ID, name string, actor tenant.Actor) (tenant.Key, []byte, error) {
	var k tenant.Key
	var ciphertext []byte
	fields, done := keyFields(&k)
	err := db.pool.QueryRow(ctx, `
		WITH key AS (
			SELECT k.* FROM tenants t JOIN keys k ON k.app_id = t.app_id
			WHERE t.id = $1 AND k.name = $2 AND k.state = 'active'
		), audited AS (
			INSERT INTO audit_events (actor, request_id, action, tenant_id, app_id, key_id, detail)
			SELECT $3, nullif($4, ''), 'key.revealed', $1, app_id, id, jsonb_build_object('name', name) FROM key
		)
		SELECT `+keyColumns+`, k.ciphertext FROM key k`,
		id, name, actor.Name, actor.RequestID).Scan(append(fields, &ciphertext)...)
	done()
	if errors.Is(err, pgx.ErrNoRows) {
		if _, err := db.Tenant(ctx, id); err != nil {
			return k, nil, err
		}
		return k, nil, errNotFound("key")
	}
	return k, ciphertext, translate("reveal key", err)
}

// Identify finds the key with a fingerprint and writes that it was asked for.
// It reports tenant.NotFound if Tenantry never held such a key.
func (db *DB) Identify(ctx context.Context, fingerprint []byte, actor tenant.Actor) (tenant.IdentifiedKey, error) {
	var k tenant.IdentifiedKey
	fields, done := keyFields(&k.Key)
	err := db.pool.QueryRow(ctx, `
		WITH key AS (
			SELECT k.*, a.tenant_id FROM keys k JOIN apps a ON a.id = k.app_id WHERE k.fingerprint = $1
		), audited AS (
			INSERT INTO audit_events (actor, request_id, action, tenant_id, app_id, key_id, detail)
			SELECT $2, nullif($3, ''), 'key.identified', tenant_id, app_id, id, jsonb_build_object('name', name) FROM key
		)
		SELECT `+keyColumns+`, coalesce(k.tenant_id, '') FROM key k`,
		fingerprint, actor.Name, actor.RequestID).Scan(append(fields, &k.TenantID)...)
	done()
	if errors.Is(err, pgx.ErrNoRows) {
		return k, errNotFound("key")
	}
	return k, translate("identify key", err)
}

// LeaseKey takes a key that is revoking and due, for at most lease. It reports
// tenant.NotFound if there is nothing to do or another worker does it.
func (db *DB) LeaseKey(ctx context.Context, id uuid.UUID, lease time.Duration) (tenant.RevokingKey, error) {
	var k tenant.RevokingKey
	err := db.pool.QueryRow(ctx, `
		UPDATE keys SET leased_until = now() + $2
		WHERE id = (SELECT id FROM keys
			WHERE id = $1 AND state = 'revoking' AND leased_until < now() AND next_attempt_at <= now() AND NOT `+fenced+`
			FOR UPDATE SKIP LOCKED)
		RETURNING id, app_id, name, ciphertext, coalesce(now() - in_doubt_since, '0'), attempts, problem, leased_until`,
		id, lease).
		Scan(&k.ID, &k.AppID, &k.Name, &k.Ciphertext, &k.InDoubtFor, &k.Attempts, &k.Problem, &k.LeasedUntil)
	if errors.Is(err, pgx.ErrNoRows) {
		return k, errNotFound("key")
	}
	return k, translate("lease key", err)
}

// KeyEnded records that a leased key works no longer upstream, or, if lost,
// that it may work there and cannot be addressed. Its secret is erased.
func (db *DB) KeyEnded(ctx context.Context, k tenant.RevokingKey, lost *tenant.Problem, actor tenant.Actor) error {
	state, action := tenant.KeyRevoked, "key.revoked"
	if lost != nil {
		state, action = tenant.KeyLost, "key.lost"
	}
	tag, err := db.pool.Exec(ctx, `
		WITH ended AS (
			UPDATE keys
			SET state = $3, revoked_at = CASE WHEN $3 = 'revoked' THEN now() END, ciphertext = NULL,
				in_doubt_since = CASE WHEN $3 = 'lost' THEN in_doubt_since END, problem = $4, attempts = 0,
				leased_until = '-infinity', updated_at = now()
			WHERE id = $1 AND leased_until = $2 AND state = 'revoking'
			RETURNING id, app_id, name)
		INSERT INTO audit_events (actor, upstream_request_id, action, tenant_id, app_id, key_id, detail)
		SELECT $5, nullif($7, ''), $6, a.tenant_id, a.id, e.id, jsonb_build_object('name', e.name)
		FROM ended e JOIN apps a ON a.id = e.app_id`,
		k.ID, k.LeasedUntil, state, lost, actor.Name, action, actor.UpstreamRequestID)
	return oneRow("record end of key", tag, err)
}

// KeySetback records a failed try on a leased key, and lets the lease go.
func (db *DB) KeySetback(ctx context.Context, k tenant.RevokingKey, s tenant.Setback) error {
	tag, err := db.pool.Exec(ctx, `
		UPDATE keys
		SET problem = $3::jsonb || jsonb_build_object('next_attempt_at', now() + $4::interval),
			next_attempt_at = now() + $4::interval, attempts = attempts + $5::int,
			leased_until = '-infinity', enqueued_at = '-infinity', updated_at = now()
		WHERE id = $1 AND leased_until = $2 AND state = 'revoking'`,
		k.ID, k.LeasedUntil, s.Problem, s.Delay, count(s.Counts))
	return oneRow("record setback of key", tag, err)
}

// DeferKey lets the lease of a key go, to be looked at again after delay.
func (db *DB) DeferKey(ctx context.Context, k tenant.RevokingKey, delay time.Duration) error {
	tag, err := db.pool.Exec(ctx, `
		UPDATE keys SET next_attempt_at = now() + $3, leased_until = '-infinity', enqueued_at = '-infinity'
		WHERE id = $1 AND leased_until = $2`,
		k.ID, k.LeasedUntil, delay)
	return oneRow("defer key", tag, err)
}
