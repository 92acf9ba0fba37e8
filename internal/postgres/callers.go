package postgres

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/tenant"
)

const callerColumns = `token_id, name, role, created_at, expires_at, revoked_at, last_used_at, labels, coalesce(rate_limit, 0),
	coalesce(replaced_by, '')`

func callerOf(row pgx.CollectableRow) (tenant.Caller, error) { return scanCaller(row) }

// scanCaller reads callerColumns and what else the row has.
func scanCaller(row pgx.CollectableRow, more ...any) (tenant.Caller, error) {
	var c tenant.Caller
	var expires, revoked, used *time.Time
	err := row.Scan(append([]any{&c.TokenID, &c.Name, &c.Role, &c.CreatedAt, &expires, &revoked, &used, &c.Scope, &c.RateLimit, &c.ReplacedBy}, more...)...)
	c.ExpiresAt, c.RevokedAt, c.LastUsedAt = orZero(expires), orZero(revoked), orZero(used)
	return c, err
}

func oneCaller(rows pgx.Rows) (tenant.Caller, error) {
	c, err := pgx.CollectExactlyOneRow(rows, callerOf)
	if errors.Is(err, pgx.ErrNoRows) {
		return c, errNotFound("caller")
	}
	return c, translate("read caller", err)
}

// orNull turns the zero time into null.
func orNull(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

// validSQL selects the caller whose token has the id $1 and the hash $2.
const validSQL = `token_id = $1 AND secret_sha256 = CASE WHEN labels = '{}' THEN $2::bytea ELSE sha256($2::bytea) END
	AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())`

// noteEvery is how old the noted use of a token is at least before the next use is noted. It is the minimum of
// confirmAt: each read that replaces a cached caller notes.
const noteEvery = confirmFor * 3 / 4

var errToken = tenant.Errorf(tenant.Unauthenticated, "token_invalid", "the token is unknown, revoked or expired")

// authenticate asks Postgres which caller holds token: see Authenticate.
func (db *DB) authenticate(ctx context.Context, token tenant.Token) (tenant.Caller, error) {
	c, _, err := db.readCaller(ctx, token)
	return c, err
}

// readCaller returns the caller that holds token, notes that it is used, and says for
// how long that had not been noted before, unless it has been now.
func (db *DB) readCaller(ctx context.Context, token tenant.Token) (c tenant.Caller, unnoted time.Duration, err error) {
	// Reading and noting are one round trip; most reads note nothing.
	rows, _ := db.pool.Query(ctx, `
		WITH used AS (
			UPDATE callers SET last_used_at = now()
			WHERE `+validSQL+` AND (last_used_at IS NULL OR last_used_at < now() - $3::interval))
		SELECT `+callerColumns+`, CASE WHEN last_used_at >= now() - $3::interval THEN greatest(now() - last_used_at, '0') ELSE '0' END
		FROM callers WHERE `+validSQL,
		token.ID, token.Hash, noteEvery)
	c, err = pgx.CollectExactlyOneRow(rows, func(row pgx.CollectableRow) (tenant.Caller, error) { return scanCaller(row, &unnoted) })
	if errors.Is(err, pgx.ErrNoRows) {
		return c, 0, errToken
	}
	return c, unnoted, translate("authenticate caller", err)
}

// AddCaller stores a caller and the hash of its token.
func (db *DB) AddCaller(ctx context.Context, token tenant.Token, c tenant.NewCaller, actor tenant.Actor) (tenant.Caller, error) {
	if c.Scope == nil {
		c.Scope = tenant.Scope{}
	}
	rows, _ := db.pool.Query(ctx, `
		WITH added AS (
			INSERT INTO callers (token_id, secret_sha256, name, role, expires_at, labels, rate_limit)
			VALUES ($1, CASE WHEN $6::jsonb = '{}' THEN $2::bytea ELSE sha256($2::bytea) END, $3, $4, $5, $6::jsonb, nullif($7::integer, 0))
			RETURNING *
		), audited AS (
			INSERT INTO audit_events (actor, request_id, action, detail)
			SELECT $8, nullif($9, ''), 'token.created', `+callerDetail+` FROM added)
		SELECT `+callerColumns+` FROM added`,
		token.ID, token.Hash, c.Name, c.Role, orNull(c.ExpiresAt), c.Scope, c.RateLimit, actor.Name, actor.RequestID)
	added, err := oneCaller(rows)
	if err == nil {
		db.changedCallers(token.ID)
	}
	return added, err
}

// callerDetail is what an audit event tells of a caller that was made.
const callerDetail = `jsonb_build_object('token_id', token_id, 'name', name, 'role', role, 'expires_at', expires_at,
	'labels', labels, 'rate_limit', rate_limit)`

// Callers lists up to limit callers, oldest first, after the one of a token id. An
// empty id is before the first, and a limit of 0 is none.
func (db *DB) Callers(ctx context.Context, after string, limit int) ([]tenant.Caller, error) {
	rows, _ := db.pool.Query(ctx, `
		SELECT `+callerColumns+` FROM callers
		WHERE $1 = '' OR (created_at, token_id) > (SELECT created_at, token_id FROM callers WHERE token_id = $1)
		ORDER BY created_at, token_id LIMIT nullif($2, 0)`, after, limit)
	callers, err := pgx.CollectRows(rows, callerOf)
	return callers, translate("list callers", err)
}

// Caller reads the caller of a token id. It reports tenant.NotFound for an id that no
// token has.
func (db *DB) Caller(ctx context.Context, tokenID string) (tenant.Caller, error) {
	rows, _ := db.pool.Query(ctx, `SELECT `+callerColumns+` FROM callers WHERE token_id = $1`, tokenID)
	return oneCaller(rows)
}

// RevokeCaller makes a token invalid at once. To revoke it again changes nothing.
// It reports tenant.NotFound for an id that no token has.
func (db *DB) RevokeCaller(ctx context.Context, tokenID string, actor tenant.Actor) (tenant.Caller, error) {
	var c tenant.Caller
	err := db.inTx(ctx, func(tx pgx.Tx) (err error) {
		c, err = revokeCaller(ctx, tx, tokenID, actor)
		return err
	})
	db.changedCallers(tokenID) // also after a failure: what has become of the commit is not known
	return c, translate("revoke caller", err)
}

func revokeCaller(ctx context.Context, tx pgx.Tx, tokenID string, actor tenant.Actor) (tenant.Caller, error) {
	if _, err := tx.Exec(ctx, `
		WITH revoked AS (
			UPDATE callers SET revoked_at = now() WHERE token_id = $1 AND revoked_at IS NULL
			RETURNING token_id, name, role, revoked_at)
		INSERT INTO audit_events (actor, request_id, action, detail)
		SELECT $2, nullif($3, ''), 'token.revoked', to_jsonb(revoked) FROM revoked`,
		tokenID, actor.Name, actor.RequestID); err != nil {
		return tenant.Caller{}, err
	}
	rows, _ := tx.Query(ctx, `SELECT `+callerColumns+` FROM callers WHERE token_id = $1`, tokenID)
	return oneCaller(rows)
}

// RevokeCallerUnlessLast is RevokeCaller, but reports tenant.Conflict for the last
// token that can manage callers: without one, only who has the database could.
func (db *DB) RevokeCallerUnlessLast(ctx context.Context, tokenID string, actor tenant.Actor) (tenant.Caller, error) {
	var c tenant.Caller
	err := db.inTx(ctx, func(tx pgx.Tx) (err error) {
		// Locked, in one order, so that two admins do not revoke each other at once.
		rows, _ := tx.Query(ctx, `
			SELECT token_id FROM callers
			WHERE role = 'admin' AND labels = '{}' AND revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now())
			ORDER BY token_id FOR UPDATE`)
		admins, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			return err
		}
		if len(admins) == 1 && admins[0] == tokenID {
			return tenant.Errorf(tenant.Conflict, "last_admin", "this is the last token of an admin that is not limited by labels: "+
				"make another first, or revoke it on the database with `tenantry token revoke`")
		}
		c, err = revokeCaller(ctx, tx, tokenID, actor)
		return err
	})
	db.changedCallers(tokenID)
	return c, translate("revoke caller", err)
}

// RotateCaller makes next a token of the same name, role, scope and rate limit as
// that of a token id, and ends the old one when the overlap is over; never later than
// it would have ended. It returns the new one. It reports tenant.NotFound for an id
// that no token has, and tenant.Conflict for one that works no longer or was rotated
// before.
func (db *DB) RotateCaller(ctx context.Context, tokenID string, next tenant.Token, r tenant.TokenRotation, actor tenant.Actor) (tenant.Caller, error) {
	var c tenant.Caller
	err := db.inTx(ctx, func(tx pgx.Tx) error {
		rows, _ := tx.Query(ctx, `SELECT `+callerColumns+` FROM callers WHERE token_id = $1 FOR UPDATE`, tokenID)
		old, err := oneCaller(rows)
		if err != nil {
			return err
		}
		var now time.Time
		if err := tx.QueryRow(ctx, `SELECT now()`).Scan(&now); err != nil {
			return err
		}
		switch {
		case old.ReplacedBy != "":
			return tenant.Errorf(tenant.Conflict, "caller_rotated",
				"was rotated already: its new token is %s; if that one's text was lost, rotate it in turn", old.ReplacedBy)
		case !old.RevokedAt.IsZero():
			return tenant.Errorf(tenant.Conflict, "caller_revoked", "is revoked: make a new caller instead")
		case !old.ExpiresAt.IsZero() && !old.ExpiresAt.After(now):
			return tenant.Errorf(tenant.Conflict, "caller_expired", "has expired: make a new caller instead")
		}
		rows, _ = tx.Query(ctx, `
			WITH next AS (
				INSERT INTO callers (token_id, secret_sha256, name, role, expires_at, labels, rate_limit)
				SELECT $2, CASE WHEN labels = '{}' THEN $3::bytea ELSE sha256($3::bytea) END, name, role,
					coalesce($4, now() + (expires_at - created_at)), labels, rate_limit
				FROM callers WHERE token_id = $1
				RETURNING *
			), old AS (
				UPDATE callers
				SET replaced_by = $2, expires_at = CASE WHEN $5 > '0'::interval THEN least(expires_at, now() + $5) ELSE expires_at END,
					revoked_at = CASE WHEN $5 = '0'::interval THEN now() END
				WHERE token_id = $1
				RETURNING *
			), audited AS (
				INSERT INTO audit_events (actor, request_id, action, detail)
				SELECT $6, nullif($7, ''), 'token.created', `+callerDetail+` || jsonb_build_object('replaces', $1::text) FROM next
				UNION ALL
				SELECT $6, nullif($7, ''), 'token.rotated', jsonb_build_object('token_id', token_id, 'name', name, 'replaced_by', replaced_by,
					'before', jsonb_build_object('expires_at', $8::timestamptz, 'revoked_at', NULL),
					'after', jsonb_build_object('expires_at', expires_at, 'revoked_at', revoked_at)) FROM old)
			SELECT `+callerColumns+` FROM next`,
			tokenID, next.ID, next.Hash, orNull(r.ExpiresAt), r.Overlap, actor.Name, actor.RequestID, orNull(old.ExpiresAt))
		c, err = oneCaller(rows)
		return err
	})
	db.changedCallers(tokenID, next.ID)
	return c, translate("rotate caller", err)
}
