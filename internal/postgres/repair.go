package postgres

import (
	"context"
	"errors"
	"fmt"
	"time"

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

// act carries out a finding with one statement, which must change a row, and writes
// the event. A statement that finds nothing to change skips the finding.
func (db *DB) act(ctx context.Context, r tenant.Reconciliation, f tenant.Finding, action, sql string, args ...any) error {
	defer db.changed(f.TenantID, f.AppID)
	return db.underLease(ctx, action, r, func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, sql, args...)
		if err != nil {
			return err
		}
		if tag.RowsAffected() == 0 {
			return endFinding(ctx, tx, r, f, tenant.FindingSkipped, "the row has moved on since the report")
		}
		if err := auditRepair(ctx, tx, r, f, action); err != nil {
			return err
		}
		return endFinding(ctx, tx, r, f, tenant.FindingDone, "")
	})
}

func auditRepair(ctx context.Context, tx pgx.Tx, r tenant.Reconciliation, f tenant.Finding, action string) error {
	_, err := tx.Exec(ctx, `
		INSERT INTO audit_events (actor, upstream_request_id, action, tenant_id, app_id, key_id, detail)
		VALUES ($1, nullif($8, ''), $2, nullif($3, ''), nullif($4, ''), nullif($5, '00000000-0000-0000-0000-000000000000'::uuid),
			jsonb_build_object('reconciliation', $6::uuid, 'finding', $7::text))`,
		r.RequestedBy, action, f.TenantID, f.AppID, f.KeyID, r.ID, f.Kind, tenant.LastUpstreamRequest(ctx))
	return err
}

// RemoveApp gives an app whose row says that it is gone to the workers that remove
// apps. They look at it once more.
func (db *DB) RemoveApp(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error {
	return db.act(ctx, r, f, "app.removing", `
		UPDATE apps SET state = 'purging', next_attempt_at = now(), attempts = 0, enqueued_at = '-infinity', updated_at = now()
		WHERE id = $1 AND state = 'deleted'`, f.AppID)
}

// RevokeKey gives a key whose row says that it works no longer to the workers that
// revoke keys.
func (db *DB) RevokeKey(ctx context.Context, r tenant.Reconciliation, f tenant.Finding, key tenant.SealedKey) error {
	return db.act(ctx, r, f, "key.revoking", `
		UPDATE keys
		SET state = 'revoking', revoked_at = NULL, ciphertext = $2, fingerprint = $3, hint = $4, problem = NULL,
			next_attempt_at = now(), attempts = 0, enqueued_at = '-infinity', updated_at = now()
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
		WHERE id = $1 AND state IN ('ready', 'held')
			AND (state = 'ready' OR EXISTS (SELECT FROM tenants t WHERE t.app_id = apps.id AND t.state IN ('active', 'resuming')))`, f.AppID)
}

// DiscardApp gives an app of the pool whose key is gone to the workers that remove
// apps.
func (db *DB) DiscardApp(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error {
	return db.act(ctx, r, f, "app.discarded", `
		UPDATE apps SET state = 'purging', next_attempt_at = now(), attempts = 0, enqueued_at = '-infinity', updated_at = now()
		WHERE id = $1 AND state = 'ready'`, f.AppID)
}

// RemakeKey writes down that a key of a held app is gone upstream, and that another
// is to be made.
func (db *DB) RemakeKey(ctx context.Context, r tenant.Reconciliation, f tenant.Finding, key tenant.NewKeyRow) error {
	return db.act(ctx, r, f, "key.gone", `
		WITH gone AS (
			UPDATE keys SET state = 'revoked', revoked_at = now(), ciphertext = NULL, updated_at = now()
			WHERE id = $1 AND state IN ('active', 'retiring')
			RETURNING app_id, name, scopes, expires_at, state
		), made AS (
			INSERT INTO keys (id, app_id, name, scopes, expires_at) SELECT $2, app_id, name, scopes, expires_at FROM gone
			WHERE NOT EXISTS (SELECT FROM keys other WHERE other.app_id = gone.app_id AND other.name = gone.name
				AND other.id <> $1 AND other.state IN ('active', 'creating'))
		)
		UPDATE apps SET updated_at = now() WHERE id IN (SELECT app_id FROM gone) AND state = 'held'`, f.KeyID, key.ID)
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
		UPDATE apps SET pending = true, marked_at = NULL, next_attempt_at = now(), enqueued_at = '-infinity'
		WHERE id = $1 AND state = 'held'`, f.AppID)
}

// ReleaseApp lets an app that was held back be handed out.
func (db *DB) ReleaseApp(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error {
	return db.act(ctx, r, f, "app.released", `
		UPDATE apps SET suspect = false, next_attempt_at = now() WHERE id = $1 AND suspect AND state IN ('building', 'ready')`, f.AppID)
}

// RemovalsInLastHour counts what repairs have removed, and says when the first of
// it is an hour ago.
func (db *DB) RemovalsInLastHour(ctx context.Context) (n int, until time.Duration, err error) {
	err = db.pool.QueryRow(ctx, `
		SELECT count(*), coalesce(min(ended_at) + interval '1 hour' - now(), '0') FROM reconciliation_items
		WHERE state = 'done' AND action IN ('remove', 'revoke') AND ended_at > now() - interval '1 hour'`).Scan(&n, &until)
	return n, until, translate("count removals", err)
}

// AdoptApp takes in what is upstream and not in the database: an app, the tenant
// that its marker names, and its keys. What the database knows already stays as it
// is. It reports tenant.Conflict if rows contradict what is to be adopted.
func (db *DB) AdoptApp(ctx context.Context, r tenant.Reconciliation, f tenant.Finding, a tenant.AdoptedApp) error {
	defer db.changed(a.Owner.Tenant, a.ID)
	return db.underLease(ctx, "adopt app", r, func(tx pgx.Tx) error {
		if err := adoptApp(ctx, tx, a); err != nil {
			return err
		}
		if a.Owner.Tenant != "" {
			if err := adoptTenant(ctx, tx, a); err != nil {
				return err
			}
		}
		if err := adoptKeys(ctx, tx, r, f, a); err != nil {
			return err
		}
		f.TenantID = a.Owner.Tenant
		if err := auditRepair(ctx, tx, r, f, "app.adopted"); err != nil {
			return err
		}
		return endFinding(ctx, tx, r, f, tenant.FindingDone, "")
	})
}

func contradicts(format string, args ...any) error {
	return tenant.Errorf(tenant.Conflict, "adoption_contradicts", format, args...)
}

func adoptApp(ctx context.Context, tx pgx.Tx, a tenant.AdoptedApp) error {
	// Before the row is written: the schema refuses it without saying why.
	var other tenant.AppID
	err := tx.QueryRow(ctx, `SELECT id FROM apps WHERE tenant_id = $1 AND state = 'held' AND id <> $2`, a.Owner.Tenant, a.ID).Scan(&other)
	if err == nil {
		return contradicts("the tenant %s holds the app %s: find out which of the two it uses, and remove the other in Clarifai", a.Owner.Tenant, other)
	}
	if !errors.Is(err, pgx.ErrNoRows) {
		return err
	}
	var state tenant.AppState
	var owner tenant.ID
	var generation int
	err = tx.QueryRow(ctx, `SELECT state, coalesce(tenant_id, ''), coalesce(tenant_generation, 0) FROM apps WHERE id = $1 FOR UPDATE`, a.ID).
		Scan(&state, &owner, &generation)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		// Without a tenant it may be anybody's: it is held back. Without a key it is
		// not ready.
		_, err = tx.Exec(ctx, `
			INSERT INTO apps (id, profile, profile_revision, state, tenant_id, tenant_generation, made_at, ready_at, suspect, pending)
			VALUES ($1, $2, 'adopted', $3, nullif($4, ''), nullif($5, 0), now(), now(), $4 = '', $4 <> '')`,
			a.ID, a.Profile, adoptedState(a), a.Owner.Tenant, a.Owner.Generation)
		return err
	case err != nil:
		return err
	case owner != "" && a.Owner.Tenant != "" && (owner != a.Owner.Tenant || generation != a.Owner.Generation):
		return contradicts("the row says that the app is the tenant %s's, its marker %s's", owner, a.Owner.Tenant)
	case state == tenant.AppPurging || state == tenant.AppDeleted:
		return contradicts("the row says that the app is %s", state)
	case a.Owner.Tenant == "" || owner != "":
		return nil // only its keys are news
	}
	_, err = tx.Exec(ctx, `
		UPDATE apps
		SET state = 'held', tenant_id = $2, tenant_generation = $3, made_at = coalesce(made_at, now()), ready_at = coalesce(ready_at, now()),
			in_doubt_since = NULL, suspect = false, pending = true, attempts = 0, problem = NULL, next_attempt_at = now(),
			leased_until = '-infinity', enqueued_at = '-infinity', updated_at = now()
		WHERE id = $1`, a.ID, a.Owner.Tenant, a.Owner.Generation)
	return err
}

func adoptedState(a tenant.AdoptedApp) tenant.AppState {
	if a.Owner.Tenant != "" {
		return tenant.AppHeld
	}
	for _, k := range a.Keys {
		if k.Ciphertext != nil {
			return tenant.AppReady
		}
	}
	return tenant.AppBuilding
}

// unknownAttributes is the hash of a tenant whose sign-up is not known: the next one
// is taken for it.
var unknownAttributes = make([]byte, tenant.AttributesHashSize)

func adoptTenant(ctx context.Context, tx pgx.Tx, a tenant.AdoptedApp) error {
	var state tenant.State
	var generation int
	var app tenant.AppID
	err := tx.QueryRow(ctx, `SELECT state, generation, coalesce(app_id, '') FROM tenants WHERE id = $1 FOR UPDATE`, a.Owner.Tenant).
		Scan(&state, &generation, &app)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		_, err = tx.Exec(ctx, `
			INSERT INTO tenants (id, generation, profile, state, app_id, attributes_hash) VALUES ($1, $2, $3, 'active', $4, $5)`,
			a.Owner.Tenant, a.Owner.Generation, a.Owner.Profile, a.ID, unknownAttributes)
	case err != nil:
		return err
	case app == a.ID:
		return nil
	case state == tenant.Provisioning && generation <= a.Owner.Generation:
		_, err = tx.Exec(ctx, `
			UPDATE tenants
			SET state = 'active', state_since = now(), generation = $2, app_id = $3, problem = NULL, version = version + 1, updated_at = now()
			WHERE id = $1`, a.Owner.Tenant, a.Owner.Generation, a.ID)
	case app != "":
		return contradicts("the tenant %s holds the app %s: find out which of the two it uses, and remove the other in Clarifai", a.Owner.Tenant, app)
	default:
		return contradicts("the tenant %s is %s in generation %d, and the app is of generation %d", a.Owner.Tenant, state, generation, a.Owner.Generation)
	}
	if err != nil {
		return err
	}
	_, err = tx.Exec(ctx, `SELECT pg_notify('`+tenantChannel+`', $1)`, string(a.Owner.Tenant))
	return err
}

func adoptKeys(ctx context.Context, tx pgx.Tx, r tenant.Reconciliation, f tenant.Finding, a tenant.AdoptedApp) error {
	for _, k := range a.Keys {
		var name string
		err := tx.QueryRow(ctx, `
			SELECT CASE WHEN EXISTS (SELECT FROM keys WHERE app_id = $1 AND name = $2 AND state = 'active' AND id <> $3)
				THEN 'adopted-' || right($3::uuid::text, 12) ELSE $2 END`, a.ID, tenant.DefaultKey, k.ID).Scan(&name)
		if err != nil {
			return err
		}
		sql := `
			INSERT INTO keys AS k (id, app_id, name, scopes, state, ciphertext, fingerprint, hint, activated_at)
			VALUES ($1, $2, $3, $4, 'active', $5, $6, $7, now())
			ON CONFLICT (id) DO UPDATE
			SET state = 'active', ciphertext = excluded.ciphertext, fingerprint = excluded.fingerprint, hint = excluded.hint,
				in_doubt_since = NULL, problem = NULL, activated_at = now(), updated_at = now()
			WHERE k.state = 'creating'`
		args := []any{k.ID, a.ID, name, k.Scopes, k.Ciphertext, k.Fingerprint, k.Hint}
		if k.Ciphertext == nil {
			sql = `
				INSERT INTO keys AS k (id, app_id, name, scopes, state, problem)
				VALUES ($1, $2, $3, $4, 'lost', $5) ON CONFLICT (id) DO UPDATE
				SET state = 'lost', problem = excluded.problem, updated_at = now() WHERE k.state = 'creating'`
			args = []any{k.ID, a.ID, name, k.Scopes, tenant.Problem{Code: "key_lost", Since: time.Now().UTC(),
				Detail: fmt.Sprintf("the key was adopted without its secret, which Clarifai's listing hides: its marker names %s", k.ID)}}
		}
		tag, err := tx.Exec(ctx, sql, args...)
		if err != nil {
			return err
		}
		if tag.RowsAffected() > 0 {
			of := f
			of.KeyID, of.TenantID = k.ID, a.Owner.Tenant
			if err := auditRepair(ctx, tx, r, of, "key.adopted"); err != nil {
				return err
			}
		}
	}
	// A tenant's app that has no key that can be used gets a new one.
	_, err := tx.Exec(ctx, `
		INSERT INTO keys (id, app_id, name, scopes)
		SELECT $2, id, $3, $4 FROM apps WHERE id = $1 AND state = 'held'
			AND NOT EXISTS (SELECT FROM keys WHERE app_id = $1 AND name = $3 AND state IN ('active', 'creating'))`,
		a.ID, a.NewKey.ID, a.NewKey.Name, a.NewKey.Scopes)
	return err
}

// SetFirstAttributes takes a sign-up's attributes for those of a tenant that was
// adopted without any.
func (db *DB) SetFirstAttributes(ctx context.Context, id tenant.ID, a tenant.Attributes, actor tenant.Actor) (tenant.Tenant, error) {
	_, err := db.pool.Exec(ctx, `
		WITH changed AS (
			UPDATE tenants SET display_name = $2, labels = $3, attributes_hash = $4, version = version + 1, updated_at = now()
			WHERE id = $1 AND attributes_hash = $5
			RETURNING id, app_id
		)
		INSERT INTO audit_events (actor, request_id, action, tenant_id, app_id, detail)
		SELECT $6, nullif($7, ''), 'tenant.changed', id, app_id, '{"fields": ["display_name", "labels"], "first": true}' FROM changed`,
		id, a.DisplayName, a.Labels, a.Hash(), unknownAttributes, actor.Name, actor.RequestID)
	if err != nil {
		return tenant.Tenant{}, translate("set first attributes", err)
	}
	db.changed(id, "")
	return db.Tenant(ctx, id)
}
