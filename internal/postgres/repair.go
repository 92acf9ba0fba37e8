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

// What a repair does, each in one transaction with the event that tells of it and
// the end of the finding. All take a leased reconciliation.

// EndFinding ends a finding that nothing, or nothing more, was written for.
func (db *DB) EndFinding(ctx context.Context, r tenant.Reconciliation, f tenant.Finding, state tenant.FindingState, note string) error {
	return db.underLease(ctx, "end finding", r, func(tx pgx.Tx) error { return endFinding(ctx, tx, r, f, state, note) })
}

func endFinding(ctx context.Context, tx pgx.Tx, r tenant.Reconciliation, f tenant.Finding, state tenant.FindingState, note string) error {
	_, err := tx.Exec(ctx, `
		UPDATE reconciliation_items SET state = $3, note = $4, ended_at = now() WHERE reconciliation_id = $1 AND number = $2`,
		reportOf(r), f.Number, state, note)
	return err
}

// repair runs act on the app of a finding, whose tenant it holds locked, as everywhere before
// the app and its keys. An act that changes nothing skips the finding.
func (db *DB) repair(ctx context.Context, r tenant.Reconciliation, f tenant.Finding, action string, act func(tx pgx.Tx, t tenant.Tenant) (changed bool, err error)) error {
	var owner tenant.ID
	err := db.underLease(ctx, action, r, func(tx pgx.Tx) error {
		rows, _ := tx.Query(ctx, `SELECT `+tenantColumns+` FROM tenants t WHERE t.app_id = $1 FOR UPDATE OF t`, f.AppID)
		t, err := oneTenant(rows)
		if err != nil && !errors.Is(err, tenant.NotFound) {
			return err
		}
		if owner = t.ID; owner != "" {
			f.TenantID = owner
		}
		changed, err := act(tx, t)
		if err != nil {
			return err
		}
		if err := settle(ctx, tx, owner, tenant.Actor{Name: r.RequestedBy}); err != nil { // act may have ended its last key
			return err
		}
		if !changed {
			return endFinding(ctx, tx, r, f, tenant.FindingSkipped, "the row has moved on since the report")
		}
		if err := auditRepair(ctx, tx, r, f, action); err != nil {
			return err
		}
		return endFinding(ctx, tx, r, f, tenant.FindingDone, "")
	})
	db.changed(owner, f.AppID)
	if err != nil {
		return err
	}
	db.wakeWorkers(tenant.AppWork, tenant.KeyWork)
	return nil
}

// act carries out a finding with one statement.
func (db *DB) act(ctx context.Context, r tenant.Reconciliation, f tenant.Finding, action, sql string, args ...any) error {
	return db.repair(ctx, r, f, action, func(tx pgx.Tx, _ tenant.Tenant) (bool, error) {
		tag, err := tx.Exec(ctx, sql, args...)
		return tag.RowsAffected() > 0, err
	})
}

func auditRepair(ctx context.Context, tx pgx.Tx, r tenant.Reconciliation, f tenant.Finding, action string) error {
	_, err := tx.Exec(ctx, `
		INSERT INTO audit_events (actor, upstream_request_id, action, tenant_id, app_id, key_id, detail)
		VALUES (coalesce((SELECT decided_by FROM reconciliation_items WHERE reconciliation_id = $9 AND number = $10), $1), nullif($8, ''), $2,
			nullif($3, ''), nullif($4, ''), nullif($5, '00000000-0000-0000-0000-000000000000'::uuid),
			jsonb_build_object('reconciliation', $6::uuid, 'finding', $7::text))`,
		r.RequestedBy, action, f.TenantID, f.AppID, f.KeyID, r.ID, f.Kind, tenant.LastUpstreamRequest(ctx), reportOf(r), f.Number)
	return err
}

// RemoveApp gives an app whose row says that it is gone to the workers that remove
// apps. They look at it once more.
func (db *DB) RemoveApp(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error {
	return db.act(ctx, r, f, "app.removing", `
		UPDATE apps SET state = 'purging', incarnation = stored_incarnation(), next_attempt_at = now(), attempts = 0, updated_at = now()
		WHERE id = $1 AND state = 'deleted'`, f.AppID)
}

// RevokeKey gives a key whose row says that it works no longer to the workers that
// revoke keys.
func (db *DB) RevokeKey(ctx context.Context, r tenant.Reconciliation, f tenant.Finding, key tenant.SealedKey) error {
	return db.act(ctx, r, f, "key.revoking", `
		UPDATE keys
		SET state = 'revoking', revoked_at = NULL, ciphertext = $2, fingerprint = $3, hint = $4, problem = NULL,
			next_attempt_at = now(), attempts = 0, updated_at = now()
		WHERE id = $1 AND state IN ('revoked', 'lost')`, f.KeyID, key.Ciphertext, key.Fingerprint, key.Hint)
}

// ForgetApp writes down that an app is gone upstream, and its keys with it. The
// tenant that held it waits for another.
func (db *DB) ForgetApp(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error {
	return db.act(ctx, r, f, "app.gone", `
		WITH freed AS (
			UPDATE tenants SET state = 'provisioning', state_since = now(), app_id = NULL, background = false, version = version + 1, updated_at = now()
			WHERE app_id = $1 AND state IN ('active', 'resuming') RETURNING id
		), keys_gone AS (
			UPDATE keys SET state = 'revoked', revoked_at = now(), ciphertext = NULL, in_doubt_since = NULL, updated_at = now()
			WHERE app_id = $1 AND state <> 'revoked'
		)
		UPDATE apps SET state = 'deleted', pending = false, problem = NULL, updated_at = now()
		WHERE id = $1 AND (state IN ('ready', 'retired')
			OR state = 'held' AND EXISTS (SELECT FROM tenants t WHERE t.app_id = apps.id AND t.state IN ('active', 'resuming')))`, f.AppID)
}

// DiscardApp retires an app of the pool whose key is gone.
func (db *DB) DiscardApp(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error {
	return db.act(ctx, r, f, "app.retired", `
		UPDATE apps SET state = 'retired', attempts = 0, updated_at = now()
		WHERE id = $1 AND state = 'ready'`, f.AppID)
}

// RemakeKey records that a key of an active tenant is dead at Clarifai, and requests another. A
// pending key from before a loss is requested again.
func (db *DB) RemakeKey(ctx context.Context, r tenant.Reconciliation, f tenant.Finding, key tenant.NewKeyRow) error {
	return db.repair(ctx, r, f, "key.gone", func(tx pgx.Tx, t tenant.Tenant) (bool, error) {
		if f.Kind == tenant.FoundKeyPending {
			tag, err := tx.Exec(ctx, `
				UPDATE keys SET incarnation = `+currentIncarnation+`, next_attempt_at = now(), updated_at = now()
				WHERE id = $1 AND state = 'creating' AND `+currentIncarnation+` IS NOT NULL`, f.KeyID)
			return tag.RowsAffected() == 1, err
		}
		if t.State != tenant.Active {
			return false, nil
		}
		tag, err := tx.Exec(ctx, `
			WITH gone AS (
				UPDATE keys SET state = 'revoked', revoked_at = now(), ciphertext = NULL, updated_at = now()
				WHERE id = $1 AND state IN ('active', 'retiring')
				RETURNING app_id, name, scopes, expires_at, state
			), made AS (
				INSERT INTO keys (id, app_id, name, scopes, expires_at) SELECT $2, app_id, name, scopes, expires_at FROM gone
				WHERE NOT EXISTS (SELECT FROM keys other WHERE other.app_id = gone.app_id AND other.name = gone.name
					AND other.id <> $1 AND other.state IN ('active', 'creating'))
			)
			SELECT FROM gone`, f.KeyID, key.ID)
		return tag.RowsAffected() == 1, err
	})
}

// KeyOf reads the sealed secret of a key that works, for a repair.
func (db *DB) KeyOf(ctx context.Context, f tenant.Finding) (sealed tenant.SealedKey, scopes []string, err error) {
	sealed.ID = f.KeyID
	err = db.pool.QueryRow(ctx, `SELECT ciphertext, fingerprint, hint, scopes FROM keys WHERE id = $1 AND state IN ('active', 'retiring')`, f.KeyID).
		Scan(&sealed.Ciphertext, &sealed.Fingerprint, &sealed.Hint, &scopes)
	if errors.Is(err, pgx.ErrNoRows) {
		return sealed, nil, errNotFound("key")
	}
	return sealed, scopes, translate("read key", err)
}

// KeyRescoped writes down that a key got its row's scopes back.
func (db *DB) KeyRescoped(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error {
	return db.act(ctx, r, f, "key.rescoped", `UPDATE keys SET updated_at = now() WHERE id = $1`, f.KeyID)
}

// MarkAgain gives a held app to the workers that write markers.
func (db *DB) MarkAgain(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error {
	return db.act(ctx, r, f, "app.marking", `
		UPDATE apps SET pending = true, marked_at = NULL, next_attempt_at = now()
		WHERE id = $1 AND state = 'held'`, f.AppID)
}

// RemovalsInLastHour counts what repairs have removed, and says when the first of
// it is an hour ago.
func (db *DB) RemovalsInLastHour(ctx context.Context) (n int, until time.Duration, err error) {
	err = db.pool.QueryRow(ctx, `
		SELECT count(*), coalesce(min(ended_at) + interval '1 hour' - now(), '0') FROM reconciliation_items
		WHERE state = 'done' AND action IN ('remove', 'revoke') AND ended_at > now() - interval '1 hour'`).Scan(&n, &until)
	return n, until, translate("count removals", err)
}

// SetFirstAttributes takes a sign-up's attributes for those of a tenant that was
// adopted without any.
func (db *DB) SetFirstAttributes(ctx context.Context, id tenant.ID, a tenant.Attributes, actor tenant.Actor) (tenant.Tenant, error) {
	return db.change(ctx, "set first attributes", id, actor, func(tx pgx.Tx, t tenant.Tenant) error {
		tag, err := tx.Exec(ctx, `
			UPDATE tenants SET display_name = $2, labels = $3, attributes_hash = $4, version = version + 1, updated_at = now()
			WHERE id = $1 AND attributes_hash = $5`, id, a.DisplayName, a.Labels, a.Hash(), unknownAttributes)
		if err != nil || tag.RowsAffected() == 0 {
			return err
		}
		return audit(ctx, tx, actor, event{action: "tenant.changed", tenant: id, app: t.AppID,
			detail: map[string]any{"fields": []string{"display_name", "labels"}, "first": true}})
	})
}

// unknownAttributes is the hash of a tenant whose sign-up is unknown: the next PUT counts as its
// sign-up.
var unknownAttributes = make([]byte, tenant.AttributesHashSize)

func contradicts(format string, args ...any) error {
	return tenant.Errorf(tenant.Conflict, "adoption_contradicts", format, args...)
}

// lostKey is the problem of a key whose secret the listing hides.
func lostKey(id uuid.UUID) tenant.Problem {
	return tenant.Problem{Code: "key_lost", Since: time.Now().UTC(),
		Detail: fmt.Sprintf("the key was found without its secret, which Clarifai's listing hides: its ownership tag names %s; remove it in Clarifai's portal", id)}
}
