package postgres

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/tenant"
)

const callerColumns = `token_id, name, role, created_at, expires_at, revoked_at, last_used_at`

func scanCaller(row pgx.CollectableRow) (tenant.Caller, error) {
	var c tenant.Caller
	var expires, revoked, used *time.Time
	err := row.Scan(&c.TokenID, &c.Name, &c.Role, &c.CreatedAt, &expires, &revoked, &used)
	c.ExpiresAt, c.RevokedAt, c.LastUsedAt = orZero(expires), orZero(revoked), orZero(used)
	return c, err
}

// Authenticate returns the caller that holds token. It reports
// tenant.Unauthenticated for a token that is unknown, revoked or expired, and
// notes the use, exact to a minute.
func (db *DB) Authenticate(ctx context.Context, token tenant.Token) (tenant.Caller, error) {
	// Reading and noting are one round trip; most reads note nothing.
	rows, _ := db.pool.Query(ctx, `
		WITH used AS (
			UPDATE callers SET last_used_at = now()
			WHERE token_id = $1 AND secret_sha256 = $2 AND revoked_at IS NULL
				AND (expires_at IS NULL OR expires_at > now())
				AND (last_used_at IS NULL OR last_used_at < now() - interval '1 minute'))
		SELECT `+callerColumns+`
		FROM callers
		WHERE token_id = $1 AND secret_sha256 = $2 AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())`,
		token.ID, token.Hash)
	c, err := pgx.CollectExactlyOneRow(rows, scanCaller)
	if errors.Is(err, pgx.ErrNoRows) {
		return c, tenant.Errorf(tenant.Unauthenticated, "token_invalid", "the token is unknown, revoked or expired")
	}
	return c, translate("authenticate caller", err)
}

// AddCaller stores a caller and the hash of its token. A zero expires means
// never.
func (db *DB) AddCaller(ctx context.Context, token tenant.Token, name string, role tenant.Role, expires time.Time, actor tenant.Actor) error {
	var until *time.Time
	if !expires.IsZero() {
		until = &expires
	}
	_, err := db.pool.Exec(ctx, `
		WITH added AS (
			INSERT INTO callers (token_id, name, role, secret_sha256, expires_at) VALUES ($1, $2, $3, $4, $5)
			RETURNING token_id, name, role, expires_at)
		INSERT INTO audit_events (actor, request_id, action, detail)
		SELECT $6, nullif($7, ''), 'token.created', to_jsonb(added) FROM added`,
		token.ID, name, role, token.Hash, until, actor.Name, actor.RequestID)
	return translate("add caller", err)
}

// Callers lists every caller, oldest first.
func (db *DB) Callers(ctx context.Context) ([]tenant.Caller, error) {
	rows, _ := db.pool.Query(ctx, `SELECT `+callerColumns+` FROM callers ORDER BY created_at, token_id`)
	callers, err := pgx.CollectRows(rows, scanCaller)
	return callers, translate("list callers", err)
}

// RevokeCaller makes a token invalid at once. To revoke it again changes nothing.
// It reports tenant.NotFound for an id that no token has.
func (db *DB) RevokeCaller(ctx context.Context, tokenID string, actor tenant.Actor) (tenant.Caller, error) {
	_, err := db.pool.Exec(ctx, `
		WITH revoked AS (
			UPDATE callers SET revoked_at = now() WHERE token_id = $1 AND revoked_at IS NULL
			RETURNING token_id, name)
		INSERT INTO audit_events (actor, request_id, action, detail)
		SELECT $2, nullif($3, ''), 'token.revoked', to_jsonb(revoked) FROM revoked`,
		tokenID, actor.Name, actor.RequestID)
	if err != nil {
		return tenant.Caller{}, translate("revoke caller", err)
	}
	rows, _ := db.pool.Query(ctx, `SELECT `+callerColumns+` FROM callers WHERE token_id = $1`, tokenID)
	c, err := pgx.CollectExactlyOneRow(rows, scanCaller)
	if errors.Is(err, pgx.ErrNoRows) {
		return c, errNotFound("token")
	}
	return c, translate("read caller", err)
}
