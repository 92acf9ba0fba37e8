package postgres

import (
	"context"
	"errors"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/tenant"
)

// Findings that wait for a decision, and carrying decisions out.

// findingsReport selects the report whose findings are shown and decided: in recovery mode the
// newest one that began in it, also while it is running; otherwise the newest finished one.
const findingsReport = `(
	SELECT r.id FROM reconciliations r, (SELECT recovery, recovery_since FROM current_incarnation LIMIT 1) c
	WHERE r.kind = 'report' AND CASE WHEN c.recovery IS NULL THEN r.state = 'done' ELSE r.created_at >= c.recovery_since END
	ORDER BY r.created_at DESC LIMIT 1)`

// addFinding adds a finding of a worker to the newest report, unless the report has it. If there
// is no report, the next report finds it.
func addFinding(ctx context.Context, tx pgx.Tx, f tenant.Finding) error {
	_, err := tx.Exec(ctx, `
		INSERT INTO reconciliation_items (reconciliation_id, kind, action, app_id, key_id, tenant_id, detail, state)
		SELECT r.id, $1, 'decide', $2, nullif($3, '00000000-0000-0000-0000-000000000000'::uuid), nullif($4, ''), $5, 'open'
		FROM `+findingsReport+` r
		WHERE NOT EXISTS (SELECT FROM reconciliation_items i WHERE i.reconciliation_id = r.id AND i.kind = $1 AND i.app_id = $2)`,
		f.Kind, f.AppID, f.KeyID, f.TenantID, f.Detail)
	return err
}

// Undecided lists up to limit findings that wait for a decision or were decided, newest apps
// first, after the finding that after names.
func (db *DB) Undecided(ctx context.Context, kind tenant.FindingKind, after tenant.Finding, limit int) ([]tenant.Finding, error) {
	rows, _ := db.pool.Query(ctx, `
		SELECT `+findingColumns+` FROM reconciliation_items
		WHERE reconciliation_id = `+findingsReport+`
			AND (action = 'decide' AND state = 'open' OR decided_by IS NOT NULL) AND ($1 = '' OR kind = $1)
			AND ($2 = 0 OR (coalesce(app_id, ''), number) < ($3, $2))
		ORDER BY coalesce(app_id, '') DESC, number DESC LIMIT $4`, kind, after.Number, string(after.AppID), limit)
	found, err := pgx.CollectRows(rows, scanFinding)
	return found, translate("list findings", err)
}

// Finding reads a finding by its number. It reports tenant.NotFound for an unknown one.
func (db *DB) Finding(ctx context.Context, number int64) (tenant.Finding, error) {
	rows, _ := db.pool.Query(ctx, `SELECT `+findingColumns+` FROM reconciliation_items WHERE number = $1`, number)
	f, err := pgx.CollectExactlyOneRow(rows, scanFinding)
	if errors.Is(err, pgx.ErrNoRows) {
		return f, errNotFound("finding")
	}
	return f, translate("read finding", err)
}

// Decide records a decision about findings of the newest report: the finding with a number, or all
// of a kind. A worker carries it out. It returns the number of decided findings; findings that do
// not wait for a decision are left out.
func (db *DB) Decide(ctx context.Context, number int64, kind tenant.FindingKind, choice tenant.RepairAction, actor tenant.Actor) (int, error) {
	var n int
	err := db.inTx(ctx, func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, `
			UPDATE reconciliation_items
			SET action = $3, decided_by = $4, state = CASE WHEN $3 = 'keep' THEN 'done' ELSE 'decided' END,
				ended_at = CASE WHEN $3 = 'keep' THEN now() END, note = CASE WHEN $3 = 'keep' THEN 'kept' ELSE '' END
			WHERE reconciliation_id = `+findingsReport+`
				AND (action = 'decide' AND state = 'open' OR decided_by IS NOT NULL AND state IN ('failed', 'skipped'))
				AND kind = $2 AND CASE WHEN $1 > 0 THEN number = $1 ELSE decided_by IS NULL END`,
			number, kind, choice, actor.Name)
		if err != nil || tag.RowsAffected() == 0 {
			return err
		}
		n = int(tag.RowsAffected())
		return audit(ctx, tx, actor, event{action: "recovery.decided", detail: map[string]any{"finding": number, "kind": kind, "choice": choice, "count": n}})
	})
	return n, translate("decide", err)
}

// StartDueDecisions starts a repair that carries out decisions, if there are any and no other
// reconciliation runs. It reports whether it did.
func (db *DB) StartDueDecisions(ctx context.Context, id uuid.UUID) (bool, error) {
	var report uuid.UUID
	err := db.pool.QueryRow(ctx, `
		SELECT reconciliation_id FROM reconciliation_items WHERE state = 'decided'
			AND NOT EXISTS (SELECT FROM reconciliations WHERE state = 'running')
			AND EXISTS (SELECT FROM current_incarnation WHERE recovery IS NULL OR recovery = 'recovering') LIMIT 1`).Scan(&report)
	if errors.Is(err, pgx.ErrNoRows) {
		return false, nil
	}
	if err != nil {
		return false, translate("look for decisions", err)
	}
	_, err = db.startReconciliation(ctx, tenant.Actor{Name: "worker"}, `
		INSERT INTO reconciliations AS r (id, kind, phase, report_id, decisions, requested_by)
		VALUES ($1, 'repair', 'repair', $2, true, 'worker')`, id, report)
	if errors.Is(err, tenant.Conflict) { // another replica was first
		return false, nil
	}
	return err == nil, err
}

// AdoptApp records an app that Clarifai has and the database does not: the app, the tenant
// that its ownership tag names, and its keys. A tenant without a live key is suspended, or
// deleting if the tag has a time of removal. Existing rows stay as they are. It reports
// tenant.Conflict if rows contradict the adoption.
func (db *DB) AdoptApp(ctx context.Context, r tenant.Reconciliation, f tenant.Finding, a tenant.AdoptedApp) error {
	defer db.changed(a.Owner.Tenant, a.ID)
	return db.underLease(ctx, "adopt app", r, func(tx pgx.Tx) error {
		t, err := adoptTenant(ctx, tx, a)
		if err != nil {
			return err
		}
		if err := adoptApp(ctx, tx, a, t); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `
			INSERT INTO tenants AS t (id, generation, profile, state, app_id, attributes_hash) VALUES ($1, $2, $3, $4, $5, $6)
			ON CONFLICT (id) DO UPDATE SET state = excluded.state, state_since = now(), generation = excluded.generation, profile = excluded.profile,
				app_id = excluded.app_id, background = false, problem = NULL, version = t.version + 1, updated_at = now()`,
			a.Owner.Tenant, a.Owner.Generation, a.Owner.Profile, t, a.ID, unknownAttributes); err != nil {
			return err
		}
		f.TenantID = a.Owner.Tenant
		if err := adoptKeys(ctx, tx, r, f, a); err != nil {
			return err
		}
		if err := auditRepair(ctx, tx, r, f, "app.adopted"); err != nil {
			return err
		}
		if err := wakeTenant(ctx, tx, a.Owner.Tenant); err != nil {
			return err
		}
		return endFinding(ctx, tx, r, f, tenant.FindingDone, "")
	})
}

// adoptTenant locks the tenant of an adopted app and returns the new state of the tenant.
func adoptTenant(ctx context.Context, tx pgx.Tx, a tenant.AdoptedApp) (tenant.State, error) {
	to := tenant.Suspended
	switch {
	case a.HasLiveKey():
		to = tenant.Active
	case !a.PurgeAfter.IsZero():
		to = tenant.Deleting
	}
	var state tenant.State
	var generation int
	var app tenant.AppID
	err := tx.QueryRow(ctx, `SELECT state, generation, coalesce(app_id, '') FROM tenants WHERE id = $1 FOR UPDATE`, a.Owner.Tenant).
		Scan(&state, &generation, &app)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return to, nil
	case err != nil:
		return to, err
	case state == tenant.Provisioning && generation <= a.Owner.Generation, state == tenant.Deleted && generation < a.Owner.Generation:
		return to, nil
	case state == tenant.Active && app == a.ID && generation == a.Owner.Generation: // only the table apps was restored
		return to, nil
	case app != "" && app != a.ID:
		return to, contradicts("the tenant %s holds the app %s: find out which of the two apps the tenant uses, and remove the other app in Clarifai", a.Owner.Tenant, app)
	}
	return to, contradicts("the tenant %s is %s in generation %d, and the app is of generation %d", a.Owner.Tenant, state, generation, a.Owner.Generation)
}

func adoptApp(ctx context.Context, tx pgx.Tx, a tenant.AdoptedApp, to tenant.State) error {
	state := tenant.AppHeld
	if to == tenant.Deleting {
		state = tenant.AppRetained
	}
	tag, err := tx.Exec(ctx, `
		INSERT INTO apps AS a (id, profile, profile_revision, state, tenant_id, tenant_generation, made_at, ready_at, purge_after, tagged_purge_after, pending)
		VALUES ($1, $2, 'adopted', $3, $4, $5, now(), now(), $6, $7, true)
		ON CONFLICT (id) DO UPDATE
		SET state = excluded.state, profile = excluded.profile, tenant_id = excluded.tenant_id, tenant_generation = excluded.tenant_generation,
			made_at = coalesce(a.made_at, now()), ready_at = coalesce(a.ready_at, now()), in_doubt_since = NULL,
			purge_after = excluded.purge_after, tagged_purge_after = excluded.tagged_purge_after, tagging = false, tagging_purge_after = NULL, pending = true,
			removal_confirmed = false, attempts = 0, problem = NULL, next_attempt_at = now(), leased_until = '-infinity', updated_at = now()
		WHERE a.tenant_id IS NULL AND (a.state = 'retired' OR a.state IN ('building', 'ready', 'purging') AND a.incarnation <> stored_incarnation())`,
		a.ID, a.Profile, state, a.Owner.Tenant, a.Owner.Generation, onlyIf(to == tenant.Deleting, nullTime(a.PurgeAfter)), nullTime(a.PurgeAfter))
	if err != nil || tag.RowsAffected() == 1 {
		return err
	}
	return contradicts("the row of the app has a tenant, or says that it was removed or begun in this incarnation")
}

func onlyIf[T any](ok bool, v *T) *T {
	if ok {
		return v
	}
	return nil
}

// adoptKeys records the keys of an adopted app. A tenant without a live key can resume with a
// new key.
func adoptKeys(ctx context.Context, tx pgx.Tx, r tenant.Reconciliation, f tenant.Finding, a tenant.AdoptedApp) error {
	// A key in the rows works only if it was found at Clarifai.
	if _, err := tx.Exec(ctx, `
		UPDATE keys SET state = 'revoked', revoked_at = now(), ciphertext = NULL, in_doubt_since = NULL, updated_at = now()
		WHERE app_id = $1 AND state IN ('active', 'retiring') AND id <> ALL ($2)`, a.ID, liveKeys(a.Keys)); err != nil {
		return err
	}
	for _, k := range a.Keys {
		if err := adoptKeyFound(ctx, tx, r, f, k); err != nil {
			return err
		}
	}
	_, err := tx.Exec(ctx, `
		INSERT INTO keys (id, app_id, name, scopes, state, revoked_at, remake)
		SELECT $2, $1, $3, $4, 'revoked', now(), true WHERE NOT EXISTS (SELECT FROM keys WHERE app_id = $1 AND state IN ('active', 'creating'))`,
		a.ID, a.NewKey.ID, a.NewKey.Name, a.NewKey.Scopes)
	return err
}

func liveKeys(keys []tenant.AdoptedKey) []uuid.UUID {
	ids := []uuid.UUID{}
	for _, k := range keys {
		if k.Ciphertext != nil {
			ids = append(ids, k.ID)
		}
	}
	return ids
}

// adoptKeyFound records a key that was found at Clarifai: as active, under the default name if
// no other key has that name, or as lost if its secret is hidden.
func adoptKeyFound(ctx context.Context, tx pgx.Tx, r tenant.Reconciliation, f tenant.Finding, k tenant.AdoptedKey) error {
	var name string
	if err := tx.QueryRow(ctx, `
		SELECT CASE WHEN EXISTS (SELECT FROM keys WHERE app_id = $1 AND name = $2 AND state = 'active' AND id <> $3)
			THEN 'adopted-' || right($3::uuid::text, 12) ELSE $2 END`, f.AppID, tenant.DefaultKey, k.ID).Scan(&name); err != nil {
		return err
	}
	sql := `
		INSERT INTO keys AS k (id, app_id, name, scopes, state, ciphertext, fingerprint, hint, activated_at)
		VALUES ($1, $2, $3, $4, 'active', $5, $6, $7, now())
		ON CONFLICT (id) DO UPDATE
		SET state = 'active', ciphertext = excluded.ciphertext, fingerprint = excluded.fingerprint, hint = excluded.hint,
			revoked_at = NULL, in_doubt_since = NULL, problem = NULL, activated_at = now(), updated_at = now()
		WHERE k.state IN ('creating', 'lost', 'revoked')`
	args := []any{k.ID, f.AppID, name, k.Scopes, k.Ciphertext, k.Fingerprint, k.Hint}
	if k.Ciphertext == nil {
		sql = `
			INSERT INTO keys AS k (id, app_id, name, scopes, state, problem)
			VALUES ($1, $2, $3, $4, 'lost', $5) ON CONFLICT (id) DO UPDATE
			SET state = 'lost', problem = excluded.problem, updated_at = now() WHERE k.state = 'creating'`
		args = []any{k.ID, f.AppID, name, k.Scopes, lostKey(k.ID)}
	}
	tag, err := tx.Exec(ctx, sql, args...)
	if err != nil || tag.RowsAffected() == 0 {
		return err
	}
	f.KeyID = k.ID
	return auditRepair(ctx, tx, r, f, "key.adopted")
}

// AdoptFoundKey makes an unknown key a key of its tenant. The keys in dead are known to be dead.
// A tenant that is suspended, deleting or purging in the rows becomes active again.
func (db *DB) AdoptFoundKey(ctx context.Context, r tenant.Reconciliation, f tenant.Finding, k tenant.AdoptedKey, dead []uuid.UUID) error {
	return db.repair(ctx, r, f, "key.found", func(tx pgx.Tx, t tenant.Tenant) (bool, error) {
		worker := tenant.Actor{Name: r.RequestedBy}
		if t.ID == "" {
			return false, nil
		}
		if _, err := tx.Exec(ctx, `
			UPDATE keys SET state = 'revoked', revoked_at = now(), ciphertext = NULL, updated_at = now()
			WHERE app_id = $1 AND id = ANY ($2) AND state IN ('active', 'retiring')`, f.AppID, dead); err != nil {
			return false, err
		}
		if err := adoptKeyFound(ctx, tx, r, f, k); err != nil {
			return false, err
		}
		if t.State == tenant.Active {
			return true, nil
		}
		tag, err := tx.Exec(ctx, `
			UPDATE apps SET state = 'held', purge_after = NULL, purging_since = NULL, removal_confirmed = false, pending = true, end_unknown_keys = false, background = false,
				next_attempt_at = now(), leased_until = '-infinity', problem = NULL, updated_at = now()
			WHERE id = $1 AND state IN ('held', 'retained', 'purging')`, f.AppID)
		if err != nil || tag.RowsAffected() == 0 {
			return false, err
		}
		if _, err := tx.Exec(ctx, `UPDATE keys SET remake = false WHERE app_id = $1 AND remake`, f.AppID); err != nil {
			return false, err
		}
		if err := move(ctx, tx, t, tenant.Active, worker, map[string]any{"decided": true}); err != nil {
			return false, err
		}
		return true, wakeTenant(ctx, tx, t.ID)
	})
}

// EndFoundKey gives an unknown key to the workers that revoke keys.
func (db *DB) EndFoundKey(ctx context.Context, r tenant.Reconciliation, f tenant.Finding, k tenant.AdoptedKey) error {
	return db.repair(ctx, r, f, "key.revoking", func(tx pgx.Tx, t tenant.Tenant) (bool, error) {
		ended, err := endFound(ctx, tx, f.AppID, []tenant.AdoptedKey{k}, tenant.EndRevoked, tenant.Actor{Name: r.RequestedBy})
		if err == nil && len(ended) > 0 && t.State == tenant.Suspended { // not suspended while a key may work
			err = move(ctx, tx, t, tenant.Suspending, tenant.Actor{Name: r.RequestedBy}, nil)
		}
		return err == nil, err
	})
}

// endFound records keys that were found at Clarifai as revoking: keys without a row, and keys
// whose rows say that they are dead. A key without its secret is lost. It returns the revoking keys.
func endFound(ctx context.Context, tx pgx.Tx, app tenant.AppID, found []tenant.AdoptedKey, reason tenant.EndReason, actor tenant.Actor) ([]uuid.UUID, error) {
	var ended []uuid.UUID
	priority := tenant.Interactive
	if reason == tenant.EndQuarantined {
		priority = tenant.Incident
	}
	for _, k := range found {
		state, problem := tenant.KeyRevoking, (*tenant.Problem)(nil)
		if k.Ciphertext == nil {
			p := lostKey(k.ID)
			state, problem = tenant.KeyLost, &p
		}
		rows, _ := tx.Query(ctx, `
			INSERT INTO keys AS k (id, app_id, name, scopes, state, ciphertext, fingerprint, hint, problem, end_reason, priority, requested_by)
			VALUES ($1::uuid, $2, 'found-' || right($1::uuid::text, 12), $3, $4, $5, $6, $7, $8, $9, $10, $11)
			ON CONFLICT (id) DO UPDATE
			SET state = excluded.state, revoked_at = NULL, ciphertext = excluded.ciphertext, fingerprint = coalesce(excluded.fingerprint, k.fingerprint),
				hint = excluded.hint, problem = excluded.problem, end_reason = excluded.end_reason, priority = excluded.priority, requested_by = excluded.requested_by, attempts = 0,
				next_attempt_at = now(), updated_at = now()
			WHERE k.state IN ('revoked', 'lost') AND k.app_id = excluded.app_id
			RETURNING id`, k.ID, app, k.Scopes, state, k.Ciphertext, k.Fingerprint, k.Hint, problem, reason, priority, actor.Name)
		one, err := pgx.CollectRows(rows, pgx.RowTo[uuid.UUID])
		if err != nil {
			return nil, err
		}
		if state == tenant.KeyRevoking {
			ended = append(ended, one...)
		}
	}
	return ended, nil
}

// KeysListed records that the keys of a leased app were listed because a command ended them.
// Workers revoke the listed keys that have no row.
func (db *DB) KeysListed(ctx context.Context, a tenant.App, found []tenant.AdoptedKey, actor tenant.Actor) error {
	err := db.inTx(ctx, func(tx pgx.Tx) error {
		owner, err := lockOwner(ctx, tx, a.ID)
		if err != nil {
			return err
		}
		tag, err := tx.Exec(ctx, `
			UPDATE apps SET end_unknown_keys = false, keys_listed_in = stored_incarnation(), attempts = 0, problem = NULL
			WHERE id = $1 AND leased_until = $2 AND end_unknown_keys`, a.ID, a.LeasedUntil)
		if err := oneRow("record listed keys", tag, err); err != nil {
			return err
		}
		ended, err := endFound(ctx, tx, a.ID, found, tenant.EndSuspended, actor)
		if err != nil {
			return err
		}
		for _, key := range ended {
			if err := audit(ctx, tx, actor, event{action: "key.found", tenant: owner, app: a.ID, key: key, detail: map[string]any{"to": tenant.KeyRevoking}}); err != nil {
				return err
			}
		}
		return settle(ctx, tx, owner, actor)
	})
	db.changed(a.Tenant, "")
	if err != nil {
		return translate("record listed keys", err)
	}
	db.wakeWorkers(tenant.AppWork, tenant.KeyWork)
	return nil
}

// KeysOfApp lists the live keys of an app, by the rows, with their encrypted secrets.
func (db *DB) KeysOfApp(ctx context.Context, app tenant.AppID) ([]tenant.SealedKey, error) {
	rows, _ := db.pool.Query(ctx, `SELECT id, ciphertext, fingerprint, hint FROM keys WHERE app_id = $1 AND state IN ('active', 'retiring')`, app)
	keys, err := pgx.CollectRows(rows, pgx.RowToStructByPos[tenant.SealedKey])
	return keys, translate("list keys of app", err)
}

// SuspendDecided suspends the tenant of a finding.
func (db *DB) SuspendDecided(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error {
	return db.repair(ctx, r, f, "tenant.suspend_decided", func(tx pgx.Tx, t tenant.Tenant) (bool, error) {
		if t.State != tenant.Active && t.State != tenant.Resuming {
			return false, nil
		}
		return true, suspend(ctx, tx, t, tenant.Actor{Name: r.RequestedBy})
	})
}

// RestoreDecided cancels the removal of an app: its tenant becomes suspended, and keys without a
// row are ended.
func (db *DB) RestoreDecided(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error {
	return db.repair(ctx, r, f, "tenant.restore_decided", func(tx pgx.Tx, t tenant.Tenant) (bool, error) {
		if t.State != tenant.Deleting && t.State != tenant.Purging {
			return false, nil
		}
		if _, err := tx.Exec(ctx, `
			UPDATE apps SET state = 'held', purge_after = NULL, purging_since = NULL, removal_confirmed = false, pending = true, end_unknown_keys = user_id IS NULL,
				background = false,
				next_attempt_at = now(), leased_until = '-infinity', problem = NULL, updated_at = now()
			WHERE id = $1 AND state IN ('retained', 'purging')`, f.AppID); err != nil {
			return false, err
		}
		worker := tenant.Actor{Name: r.RequestedBy}
		if err := move(ctx, tx, t, tenant.Suspending, worker, map[string]any{"decided": true}); err != nil {
			return false, err
		}
		return true, settle(ctx, tx, t.ID, worker)
	})
}

// RemovalDecided lets the removal of a contested app go on.
func (db *DB) RemovalDecided(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error {
	return db.act(ctx, r, f, "app.removal_decided", `
		UPDATE apps SET removal_confirmed = true, purge_after = CASE WHEN state = 'retained' THEN least(purge_after, now()) ELSE purge_after END,
			attempts = 0, problem = NULL, next_attempt_at = now(), updated_at = now()
		WHERE id = $1 AND state IN ('retained', 'purging')`, f.AppID)
}

// OwnerDecided records that the ownership tag of an app was overwritten with the tenant of the row.
func (db *DB) OwnerDecided(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error {
	return db.repair(ctx, r, f, "app.owner_decided", func(tx pgx.Tx, t tenant.Tenant) (bool, error) {
		if t.ID == "" {
			return false, nil
		}
		if _, err := tx.Exec(ctx, `
			UPDATE apps SET marked_at = now(), problem = NULL, tagged_purge_after = NULL, tagging = false, tagging_purge_after = NULL,
				pending = purge_after IS NOT NULL OR end_unknown_keys, updated_at = now()
			WHERE id = $1`, f.AppID); err != nil {
			return false, err
		}
		_, err := tx.Exec(ctx, `UPDATE tenants SET problem = NULL, version = version + 1, updated_at = now() WHERE id = $1`, t.ID)
		return true, err
	})
}

// Contested records why a worker stops work on a leased app: its ownership tag or an unknown key
// shows that the rows may be out of date. A person must decide. Until then the key of a held app
// is not shown.
func (db *DB) Contested(ctx context.Context, a tenant.App, f tenant.Finding, problem tenant.Problem, retry tenant.Setback) error {
	err := db.inTx(ctx, func(tx pgx.Tx) error {
		owner, err := lockOwner(ctx, tx, a.ID)
		if err != nil {
			return err
		}
		tag, err := tx.Exec(ctx, `
			UPDATE apps SET problem = $3::jsonb || jsonb_build_object('next_attempt_at', now() + $4::interval), next_attempt_at = now() + $4::interval,
				attempts = attempts + 1, leased_until = '-infinity', updated_at = now()
			WHERE id = $1 AND leased_until = $2`, a.ID, a.LeasedUntil, problem, retry.Delay)
		if err := oneRow("record contested app", tag, err); err != nil {
			return err
		}
		if f.Kind == tenant.FoundAppDiffers {
			tag, err := tx.Exec(ctx, `
				UPDATE tenants SET problem = $2, version = version + 1, updated_at = now() WHERE id = $1 AND problem IS NULL`, owner, problem)
			if err != nil {
				return err
			}
			if tag.RowsAffected() > 0 {
				if err := audit(ctx, tx, tenant.Actor{Name: "worker"}, event{action: "app.contested", tenant: owner, app: a.ID}); err != nil {
					return err
				}
			}
		}
		f.AppID, f.TenantID = a.ID, owner
		return addFinding(ctx, tx, f)
	})
	db.changed(a.Tenant, "")
	return translate("record contested app", err)
}

// Retired lists up to limit retired apps, newest first, after the app that after names.
func (db *DB) Retired(ctx context.Context, after tenant.RetiredApp, limit int) ([]tenant.RetiredApp, error) {
	rows, _ := db.pool.Query(ctx, `
		SELECT a.id, a.profile, a.incarnation, a.created_at, EXISTS (SELECT FROM keys k WHERE k.app_id = a.id AND k.state = 'active'), a.inputs
		FROM apps a WHERE a.state = 'retired' AND ($1 = '' OR (a.created_at, a.id) < ($2, $1))
		ORDER BY a.created_at DESC, a.id DESC LIMIT $3`, string(after.ID), after.CreatedAt, limit)
	apps, err := pgx.CollectRows(rows, pgx.RowToStructByPos[tenant.RetiredApp])
	return apps, translate("list retired apps", err)
}

// CountRetired counts the retired apps that a filter selects.
func (db *DB) CountRetired(ctx context.Context, f tenant.RetiredFilter) (tenant.RetiredCount, error) {
	var c tenant.RetiredCount
	var oldest, newest *time.Time
	err := db.pool.QueryRow(ctx, `
		SELECT count(*), min(created_at), max(created_at) FROM apps WHERE state = 'retired' AND ($1::timestamptz IS NULL OR created_at < $1)`,
		nullTime(f.Before)).Scan(&c.Count, &oldest, &newest)
	c.Oldest, c.Newest = orZero(oldest), orZero(newest)
	return c, translate("count retired apps", err)
}

// RemoveRetired gives retired apps to the workers that remove apps: the app that the filter names,
// or all apps that the filter selects. If these are not count apps, or if it is not known whether
// another database is in use, it changes nothing and reports tenant.Conflict.
func (db *DB) RemoveRetired(ctx context.Context, f tenant.RetiredFilter, count int, actor tenant.Actor) error {
	if err := db.ensureIncarnation(ctx); err != nil {
		return err
	}
	return translate("remove retired apps", db.inTx(ctx, func(tx pgx.Tx) error {
		is, err := scanRecovery(tx.QueryRow(ctx, `SELECT `+recoveryColumns+` FROM current_incarnation`))
		switch {
		case err != nil:
			return err
		case is.State == tenant.Watching:
			return errWatching(is)
		}
		// The apps get the incarnation that was just read: if the next one begins meanwhile, they are retired again.
		rows, _ := tx.Query(ctx, `
			WITH removing AS (
				UPDATE apps SET state = 'purging', incarnation = $5, removal_confirmed = $3 <> '', attempts = 0, problem = NULL,
					next_attempt_at = now(), updated_at = now()
				WHERE state = 'retired' AND CASE WHEN $3 <> '' THEN id = $3 ELSE created_at < $4 END
				RETURNING id
			), audited AS (
				INSERT INTO audit_events (actor, request_id, action, app_id, detail)
				SELECT $1, nullif($2, ''), 'app.removing', id, '{"reason": "retired"}' FROM removing
			)
			SELECT id FROM removing`, actor.Name, actor.RequestID, string(f.AppID), nullTime(f.Before), is.Incarnation)
		removed, err := pgx.CollectRows(rows, pgx.RowTo[tenant.AppID])
		switch {
		case err != nil:
			return err
		case len(removed) == 0 && f.AppID != "":
			return errNotRetired(ctx, tx, f.AppID)
		case len(removed) != count:
			return tenant.Errorf(tenant.Conflict, "count_differs", "%d retired apps are selected, not %d: nothing was changed", len(removed), count)
		}
		return nil
	}))
}

// errNotRetired says why an app cannot be removed. Its code is not that of an unknown app, which in
// recovery mode would mean that the app may be lost.
func errNotRetired(ctx context.Context, tx pgx.Tx, app tenant.AppID) error {
	var state string
	err := tx.QueryRow(ctx, `SELECT state FROM apps WHERE id = $1`, app).Scan(&state)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return tenant.Errorf(tenant.NotFound, "app_not_retired", "there is no retired app with this id")
	case err != nil:
		return err
	}
	return tenant.Errorf(tenant.Conflict, "app_not_retired", "the app is %s: only a retired app can be removed", state)
}
