package postgres

import (
	"context"
	"errors"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/tenant"
)

// Who locks a tenant and its keys locks the tenant first.

// An event is one of the audit log; zero fields stand for nothing.
type event struct {
	action string
	tenant tenant.ID
	app    tenant.AppID
	key    uuid.UUID
	detail map[string]any
}

func audit(ctx context.Context, tx pgx.Tx, actor tenant.Actor, e event) error {
	if e.detail == nil {
		e.detail = map[string]any{}
	}
	_, err := tx.Exec(ctx, `
		INSERT INTO audit_events (actor, request_id, upstream_request_id, action, tenant_id, app_id, key_id, detail)
		VALUES ($1, nullif($2, ''), nullif($3, ''), $4, nullif($5, ''), nullif($6, ''), nullif($7, '00000000-0000-0000-0000-000000000000'::uuid), $8)`,
		actor.Name, actor.RequestID, actor.UpstreamRequestID, e.action, e.tenant, e.app, e.key, e.detail)
	return err
}

// lockOwner locks the tenant that has an app now, and returns its id; "" for an app
// that no tenant has.
func lockOwner(ctx context.Context, tx pgx.Tx, app tenant.AppID) (tenant.ID, error) {
	var id tenant.ID
	err := tx.QueryRow(ctx, `SELECT id FROM tenants WHERE app_id = $1 FOR UPDATE`, app).Scan(&id)
	if errors.Is(err, pgx.ErrNoRows) {
		return "", nil
	}
	return id, err
}

// change runs act on a tenant that it holds locked, and returns the tenant as it stands afterwards. It
// reports tenant.ErrOutside for a tenant that actor may not change.
func (db *DB) change(ctx context.Context, what string, id tenant.ID, actor tenant.Actor, act func(pgx.Tx, tenant.Tenant) error) (tenant.Tenant, error) {
	var t tenant.Tenant
	if err := db.ensureIncarnation(ctx); err != nil {
		return t, err
	}
	err := db.inTx(ctx, func(tx pgx.Tx) error {
		rows, _ := tx.Query(ctx, `SELECT `+tenantColumns+` FROM tenants t WHERE t.id = $1 FOR UPDATE OF t`, id)
		var err error
		if t, err = oneTenant(rows); err != nil {
			return err
		}
		if !actor.Within.Covers(t.Labels) {
			return tenant.ErrOutside
		}
		if err = act(tx, t); err != nil {
			return err
		}
		rows, _ = tx.Query(ctx, `SELECT `+tenantColumns+` FROM tenants t WHERE t.id = $1`, id)
		t, err = oneTenant(rows)
		return err
	})
	if err != nil {
		return t, translate(what, err)
	}
	db.changed(id, "")
	db.wakeWorkers(tenant.AppWork, tenant.KeyWork)
	return t, nil
}

// move takes a tenant that is locked to another state, with the event that tells of
// it.
func move(ctx context.Context, tx pgx.Tx, t tenant.Tenant, to tenant.State, actor tenant.Actor, detail map[string]any) error {
	if detail == nil {
		detail = map[string]any{}
	}
	detail["from"], detail["to"] = t.State, to
	if _, err := tx.Exec(ctx, `
		UPDATE tenants SET state = $2, state_since = now(), problem = `+lastingProblem+`, version = version + 1, updated_at = now() WHERE id = $1`,
		t.ID, to); err != nil {
		return err
	}
	return audit(ctx, tx, actor, event{action: "tenant." + string(to), tenant: t.ID, app: t.AppID, detail: detail})
}

// lastingProblem keeps the problem of a tenant with a contested app when the state of the tenant
// changes: the key must stay hidden.
const lastingProblem = `CASE WHEN problem->>'code' = '` + tenant.AppContested + `' THEN problem END`

// noneCreating says of the tenant t that none of its keys is being made.
const noneCreating = `(SELECT true FROM keys k WHERE k.app_id = t.app_id AND k.state = 'creating' LIMIT 1) IS NULL`

// settle ends the change of a tenant that its keys were waited for, and wakes who
// waits for it. The tenant is locked; "" is none.
func settle(ctx context.Context, tx pgx.Tx, id tenant.ID, actor tenant.Actor) error {
	if id == "" {
		return nil
	}
	_, err := tx.Exec(ctx, `
		WITH woken AS (
			SELECT pg_notify('`+tenantChannel+`', $1)
		), was AS (
			SELECT id, state FROM tenants t WHERE id = $1 AND (
				state = 'suspending' AND `+keysDead+`
				OR state = 'resuming' AND `+noneCreating+`)
		), settled AS (
			UPDATE tenants t
			SET state = CASE was.state WHEN 'suspending' THEN 'suspended' ELSE 'active' END, state_since = now(), problem = `+lastingProblem+`,
				version = version + 1, updated_at = now()
			FROM was WHERE t.id = was.id
			RETURNING t.id, t.app_id, was.state AS before, t.state
		), audited AS (
			INSERT INTO audit_events (actor, request_id, action, tenant_id, app_id, detail)
			SELECT $2, nullif($3, ''), 'tenant.' || state, id, app_id, jsonb_build_object('from', before, 'to', state) FROM settled
		)
		SELECT FROM woken`, string(id), actor.Name, actor.RequestID)
	return err
}

// maxSettled limits how many tenants of a state one call of SettleTenants reads.
const maxSettled = 100

// SettleTenants settles tenants that the transactions of their last keys have not settled, such as those
// whose keys were changed by hand. Each call reads up to maxSettled tenants of each state, where the call
// before has stopped: its cost does not grow with the tenants that wait for their keys.
func (db *DB) SettleTenants(ctx context.Context, actor tenant.Actor) error {
	var failures []error
	for _, state := range []tenant.State{tenant.Suspending, tenant.Resuming} {
		ids, err := db.unsettled(ctx, state)
		if err != nil {
			failures = append(failures, translate("find tenants to settle", err))
		}
		for _, id := range ids {
			err := db.inTx(ctx, func(tx pgx.Tx) error {
				if _, err := tx.Exec(ctx, `SELECT FROM tenants WHERE id = $1 FOR UPDATE`, id); err != nil {
					return err
				}
				return settle(ctx, tx, id, actor)
			})
			if err != nil {
				failures = append(failures, translate("settle tenant "+string(id), err))
			}
			db.changed(id, "")
		}
	}
	return errors.Join(failures...)
}

// unsettled returns the tenants in a state that can leave it, of the next maxSettled.
func (db *DB) unsettled(ctx context.Context, state tenant.State) (ids []tenant.ID, err error) {
	db.settled.mu.Lock()
	defer db.settled.mu.Unlock()
	at := db.settled.up[state]
	rows, _ := db.pool.Query(ctx, `
		SELECT t.id, t.created_at, CASE WHEN t.state = 'suspending' THEN `+keysDead+` ELSE `+noneCreating+` END
		FROM (SELECT * FROM tenants WHERE state = $1 AND (created_at, id) > ($2, $3) ORDER BY created_at, id LIMIT $4) t
		ORDER BY t.created_at, t.id`, state, at.CreatedAt, at.ID, maxSettled)
	var ends bool
	tag, err := pgx.ForEachRow(rows, []any{&at.ID, &at.CreatedAt, &ends}, func() error {
		if ends {
			ids = append(ids, at.ID)
		}
		return nil
	})
	switch {
	case err != nil:
		return nil, err
	case tag.RowsAffected() < maxSettled:
		at = Position{}
	}
	db.settled.up[state] = at
	return ids, nil
}

// endKeys ends keys that work or are being made: those of k that where selects, whose
// parameters are $6 and up. With remake they are made anew when the tenant resumes. It returns how many
// keys it ended.
func endKeys(ctx context.Context, tx pgx.Tx, actor tenant.Actor, reason tenant.EndReason, priority tenant.Priority, remake bool, where string, args ...any) (int64, error) {
	// What was never begun to be made needs no call; who is about to begin finds the
	// row changed.
	tag, err := tx.Exec(ctx, `
		WITH live AS (
			SELECT k.id, k.state AS was, k.state = 'creating' AND k.in_doubt_since IS NULL AS unmade, a.tenant_id
			FROM keys k JOIN apps a ON a.id = k.app_id
			WHERE k.state IN ('creating', 'active', 'retiring') AND `+where+`
			FOR UPDATE OF k
		), ended AS (
			UPDATE keys k
			SET state = CASE WHEN unmade THEN 'revoked' ELSE 'revoking' END, revoked_at = CASE WHEN unmade THEN now() END,
				remake = $5 AND (was = 'active' OR was = 'creating'
					AND NOT EXISTS (SELECT FROM keys o WHERE o.app_id = k.app_id AND o.name = k.name AND o.state = 'active')),
				end_reason = $3, priority = `+share(`$4`, `$1`)+`, requested_by = $1, request_id = nullif($2, ''), problem = NULL, attempts = 0,
				incarnation = stored_incarnation(),
				next_attempt_at = now(), updated_at = now()
			FROM live WHERE k.id = live.id
			RETURNING k.id, k.name, k.app_id, k.state, was, tenant_id
		), audited AS (
			INSERT INTO audit_events (actor, request_id, action, tenant_id, app_id, key_id, detail)
			SELECT $1, nullif($2, ''), 'key.' || state, tenant_id, app_id, id,
				jsonb_build_object('name', name, 'reason', $3::text, 'from', was, 'to', state) FROM ended
		)
		SELECT FROM ended`, append([]any{actor.Name, actor.RequestID, reason, priority, remake}, args...)...)
	return tag.RowsAffected(), err
}

// endUnknownKeys requests the end of keys that Clarifai lists for an app, with our ownership
// tag and without a row. Only an app of an earlier incarnation can have such keys; for other
// apps it does nothing and reports false. It does so once in an incarnation, or a caller who
// repeats the request would never see it done.
func endUnknownKeys(ctx context.Context, tx pgx.Tx, app tenant.AppID) (bool, error) {
	tag, err := tx.Exec(ctx, `
		UPDATE apps SET end_unknown_keys = true, pending = true, background = false, next_attempt_at = now(), updated_at = now()
		WHERE id = $1 AND state IN ('held', 'retained') AND user_id IS NULL AND incarnation <> stored_incarnation()
			AND keys_listed_in IS DISTINCT FROM stored_incarnation() AND NOT end_unknown_keys`, app)
	return tag.RowsAffected() > 0, err
}

// Suspend begins to revoke every key of a tenant: SettleTenants and KeyEnded end it.
// It reports tenant.Conflict for a tenant whose state does not allow it. If the app is of an
// earlier incarnation, the keys of a suspended tenant, or in recovery mode of a deleting tenant,
// are ended again: the rows may be out of date.
func (db *DB) Suspend(ctx context.Context, id tenant.ID, actor tenant.Actor) (tenant.Tenant, error) {
	return db.change(ctx, "suspend tenant", id, actor, func(tx pgx.Tx, t tenant.Tenant) error {
		return suspend(ctx, tx, t, actor)
	})
}

func suspend(ctx context.Context, tx pgx.Tx, t tenant.Tenant, actor tenant.Actor) error {
	done, err := tenant.Suspend.Check(t.State)
	if err != nil && t.State == tenant.Deleting {
		var recovering bool
		if err := tx.QueryRow(ctx, `SELECT `+inRecovery).Scan(&recovering); err != nil {
			return err
		}
		done = recovering
	}
	if err != nil && !done {
		return err
	}
	again, err := endUnknownKeys(ctx, tx, t.AppID)
	if err != nil || done && !again {
		return err
	}
	if !done {
		if _, err = endKeys(ctx, tx, actor, tenant.EndSuspended, tenant.Interactive, true, `k.app_id = $6`, t.AppID); err != nil {
			return err
		}
	}
	switch t.State {
	case tenant.Deleting:
		return audit(ctx, tx, actor, event{action: "tenant.suspend_requested", tenant: t.ID, app: t.AppID})
	case tenant.Suspending:
		return nil
	}
	if err := move(ctx, tx, t, tenant.Suspending, actor, nil); err != nil {
		return err
	}
	return settle(ctx, tx, t.ID, actor)
}

// contested returns tenant.Conflict for a tenant whose app may be another tenant's.
func contested(t tenant.Tenant) error {
	if t.Problem == nil || t.Problem.Code != tenant.AppContested {
		return nil
	}
	return tenant.Errorf(tenant.Conflict, t.Problem.Code, "%s", t.Problem.Detail)
}

// Resume begins to make the keys anew that a tenant had when it was suspended, as the
// rows ids. It reports tenant.Conflict for a tenant whose state does not allow it.
func (db *DB) Resume(ctx context.Context, id tenant.ID, ids []uuid.UUID, actor tenant.Actor) (tenant.Tenant, error) {
	return db.change(ctx, "resume tenant", id, actor, func(tx pgx.Tx, t tenant.Tenant) error {
		done, err := tenant.Resume.Check(t.State)
		if err != nil || done {
			return err
		}
		return resume(ctx, tx, t, ids, actor)
	})
}

func resume(ctx context.Context, tx pgx.Tx, t tenant.Tenant, ids []uuid.UUID, actor tenant.Actor) error {
	if err := notOurs(t); err != nil {
		return err
	}
	if err := contested(t); err != nil {
		return err
	}
	if _, err := tx.Exec(ctx, `
		WITH wanted AS (
			SELECT DISTINCT ON (name) name, scopes, expires_at FROM keys
			WHERE app_id = $1 AND remake AND (expires_at IS NULL OR expires_at > now())
			ORDER BY name, created_at DESC, id DESC
		), numbered AS (
			SELECT *, row_number() OVER (ORDER BY name) AS n FROM wanted
		), made AS (
			INSERT INTO keys (id, app_id, name, scopes, expires_at, priority, requested_by, request_id)
			SELECT i.id, $1, name, scopes, expires_at, `+share(`1`, `$4`)+`, $4, nullif($3, '')
			FROM numbered JOIN unnest($2::uuid[]) WITH ORDINALITY AS i (id, n) USING (n)
		)
		UPDATE keys SET remake = false WHERE app_id = $1 AND remake`, t.AppID, ids, actor.RequestID, actor.Name); err != nil {
		return err
	}
	if _, err := tx.Exec(ctx, `
		UPDATE apps SET pending = true, next_attempt_at = now()
		WHERE id = $1 AND state = 'held' AND (marked_at IS NULL OR extra_keys_at IS NULL)`, t.AppID); err != nil {
		return err
	}
	if err := move(ctx, tx, t, tenant.Resuming, actor, nil); err != nil {
		return err
	}
	return settle(ctx, tx, t.ID, actor)
}

// Delete begins to revoke every key of a tenant and retains its app for the time that
// retention returns for its profile, or purges it now. A tenant that waits for an app is deleted at once. It
// reports tenant.Conflict for a tenant that is protected.
func (db *DB) Delete(ctx context.Context, id tenant.ID, purgeNow bool, retention func(profile string) time.Duration, actor tenant.Actor) (tenant.Tenant, error) {
	return db.change(ctx, "delete tenant", id, actor, func(tx pgx.Tx, t tenant.Tenant) error {
		change, retained := tenant.Delete, retention(t.Profile)
		if purgeNow {
			change, retained = tenant.Purge, 0
		}
		done, err := change.Check(t.State)
		switch {
		case err == nil && done && t.State == tenant.Deleting:
			_, err := endUnknownKeys(ctx, tx, t.AppID)
			return err
		case err != nil || done:
			return err
		case t.DeletionProtection:
			return tenant.Errorf(tenant.Conflict, "deletion_protected",
				"the tenant is protected from deletion; set its deletion_protection to false first")
		case t.State == tenant.Provisioning:
			return move(ctx, tx, t, tenant.Deleted, actor, nil)
		case t.State == tenant.Deleting: // only the date changes
			tag, err := tx.Exec(ctx, `
				UPDATE apps SET purge_after = now(), pending = true, background = false, next_attempt_at = now(), updated_at = now()
				WHERE id = $1 AND state = 'retained' AND purge_after > now()`, t.AppID)
			if err != nil || tag.RowsAffected() == 0 { // a repeated request must not move the time, or the tag would never have the current one
				return err
			}
			return audit(ctx, tx, actor, event{action: "tenant.purge_requested", tenant: id, app: t.AppID})
		}
		if _, err := endKeys(ctx, tx, actor, tenant.EndDeleted, tenant.Interactive, true, `k.app_id = $6`, t.AppID); err != nil {
			return err
		}
		var purgeAfter time.Time
		if err := tx.QueryRow(ctx, `
			UPDATE apps SET state = 'retained', purge_after = now() + $2::interval, pending = true, background = false, next_attempt_at = now(),
				problem = NULL, attempts = 0, updated_at = now()
			WHERE id = $1 AND state = 'held' RETURNING purge_after`, t.AppID, retained).Scan(&purgeAfter); err != nil {
			return err
		}
		if _, err := endUnknownKeys(ctx, tx, t.AppID); err != nil {
			return err
		}
		if err := move(ctx, tx, t, tenant.Deleting, actor, map[string]any{"purge_after": purgeAfter}); err != nil {
			return err
		}
		return settle(ctx, tx, id, actor)
	})
}

// Restore takes a deletion back while the app is there: the tenant resumes, with keys
// made anew as the rows ids. Of an app that is shared with the operator it is suspended.
// It reports tenant.Conflict once the app is being removed.
func (db *DB) Restore(ctx context.Context, id tenant.ID, ids []uuid.UUID, actor tenant.Actor) (tenant.Tenant, error) {
	return db.change(ctx, "restore tenant", id, actor, func(tx pgx.Tx, t tenant.Tenant) error {
		done, err := tenant.Restore.Check(t.State)
		if err != nil || done {
			return err
		}
		if _, err := tx.Exec(ctx, `
			UPDATE apps SET state = 'held', purge_after = NULL, removal_confirmed = false, pending = true, background = false, next_attempt_at = now(), attempts = 0,
				problem = NULL, updated_at = now()
			WHERE id = $1 AND state = 'retained'`,
			t.AppID); err != nil {
			return err
		}
		if t.AppUserID != "" { // no key can be made of it: it waits for one of its owner's
			if err := move(ctx, tx, t, tenant.Suspending, actor, nil); err != nil {
				return err
			}
			return settle(ctx, tx, id, actor)
		}
		return resume(ctx, tx, t, ids, actor)
	})
}

// UpdateTenant changes attributes of a tenant. It reports tenant.Precondition, and
// changes nothing, unless current takes the tenant as it stands.
func (db *DB) UpdateTenant(ctx context.Context, id tenant.ID, p tenant.Patch, current func(tenant.Tenant) bool, actor tenant.Actor) (tenant.Tenant, error) {
	return db.change(ctx, "change tenant", id, actor, func(tx pgx.Tx, t tenant.Tenant) error {
		if !current(t) {
			return tenant.Errorf(tenant.Precondition, "tenant_changed", "the tenant was changed since you read it: read it again")
		}
		a, err := p.Apply(t)
		if err != nil {
			return err
		}
		tag, err := tx.Exec(ctx, `
			UPDATE tenants
			SET display_name = $2, labels = $3, deletion_protection = coalesce($4, deletion_protection), version = version + 1, updated_at = now()
			WHERE id = $1 AND (display_name, labels, deletion_protection) IS DISTINCT FROM ($2, $3::jsonb, coalesce($4, deletion_protection))`,
			id, a.DisplayName, a.Labels, p.DeletionProtection)
		if err != nil || tag.RowsAffected() == 0 {
			return err
		}
		return audit(ctx, tx, actor, event{action: "tenant.changed", tenant: id, app: t.AppID, detail: map[string]any{"fields": p.Fields()}})
	})
}

// PurgeWait is the time until another app of a tenant may be removed, if perHour apps were removed
// in the last hour; else 0.
func (db *DB) PurgeWait(ctx context.Context, perHour int) (time.Duration, error) {
	wait, err := purgeWait(ctx, db.pool, perHour)
	return wait, translate("count removals", err)
}

func purgeWait(ctx context.Context, q querier, perHour int) (wait time.Duration, err error) {
	err = q.QueryRow(ctx, `
		SELECT CASE WHEN count(*) < $1 THEN '0'::interval ELSE greatest(min(purging_since) + interval '1 hour' - now(), '1 second') END
		FROM apps WHERE purging_since > now() - interval '1 hour'`, perHour).Scan(&wait)
	return wait, err
}

// BeginPurge starts the removal of a leased app whose retention has ended, and keeps the lease.
// After that the tenant cannot be restored. Up to perHour apps of tenants are removed in an hour;
// at that limit it changes nothing and returns how long to wait.
func (db *DB) BeginPurge(ctx context.Context, a tenant.App, perHour int, actor tenant.Actor) (wait time.Duration, err error) {
	err = db.inTx(ctx, func(tx pgx.Tx) error {
		// Two at once would each count what the other is about to remove for nothing.
		if _, err := tx.Exec(ctx, noRemoval); err != nil {
			return err
		}
		if wait, err = purgeWait(ctx, tx, perHour); err != nil || wait > 0 {
			return err
		}
		if _, err := lockOwner(ctx, tx, a.ID); err != nil { // a restore may be in progress
			return err
		}
		tag, err := tx.Exec(ctx, `
			WITH purging AS (
				UPDATE apps SET state = 'purging', purging_since = now(), problem = NULL, attempts = 0, updated_at = now()
				WHERE id = $1 AND leased_until = $2 AND state = 'retained' AND `+duePurge+`
				RETURNING id, tenant_id
			), moved AS (
				UPDATE tenants t SET state = 'purging', state_since = now(), version = version + 1, updated_at = now()
				FROM purging p WHERE t.app_id = p.id AND t.state = 'deleting'
				RETURNING t.id, p.id AS app_id
			), audited AS (
				INSERT INTO audit_events (actor, action, tenant_id, app_id, detail)
				SELECT $3, 'app.purging', tenant_id, id, '{}'::jsonb FROM purging
				UNION ALL SELECT $3, 'tenant.purging', id, app_id, '{"from": "deleting", "to": "purging"}' FROM moved
			)
			SELECT FROM purging`, a.ID, a.LeasedUntil, actor.Name)
		return oneRow("begin to remove app", tag, err)
	})
	db.changed(a.Tenant, "")
	return wait, translate("begin to remove app", err)
}

// maxDueKeys limits how many keys one call of EndDueKeys ends for each reason.
const maxDueKeys = 200

// EndDueKeys ends the keys whose overlap is over and those that have expired.
func (db *DB) EndDueKeys(ctx context.Context, actor tenant.Actor) error {
	var ended int64
	var settled []tenant.ID
	err := db.inTx(ctx, func(tx pgx.Tx) error {
		ended, settled = 0, nil
		for _, due := range []struct {
			reason tenant.EndReason
			where  string
		}{
			{tenant.EndExpired, `state IN ('creating', 'active', 'retiring') AND expires_at <= now() ORDER BY expires_at`},
			{tenant.EndRotated, `state = 'retiring' AND retires_at <= now() ORDER BY retires_at`},
		} {
			ids, owners, err := lockDueKeys(ctx, tx, due.where)
			if err != nil {
				return err
			}
			if len(ids) == 0 {
				continue
			}
			n, err := endKeys(ctx, tx, actor, due.reason, tenant.Bulk, false, `k.id = ANY ($6)`, ids)
			if err != nil {
				return err
			}
			ended += n
			for _, id := range owners {
				if err := settle(ctx, tx, id, actor); err != nil {
					return err
				}
			}
			settled = append(settled, owners...)
		}
		return nil
	})
	if err != nil {
		return translate("end keys that are due", err)
	}
	for _, id := range settled {
		db.changed(id, "")
	}
	if ended > 0 {
		db.wakeFollowers()
		db.wakeWorkers(tenant.AppWork, tenant.KeyWork)
	}
	return nil
}

// lockDueKeys locks up to maxDueKeys keys that where selects and orders. A resuming tenant waits for the keys
// that are being created: such a key is returned only if its tenant could be locked too, which must be
// settled in the transaction that ends the key. Otherwise the other transaction settles the tenant, or a
// later call ends the key. It waits for no lock, and so may lock keys before tenants.
func lockDueKeys(ctx context.Context, tx pgx.Tx, where string) (ids []uuid.UUID, owners []tenant.ID, err error) {
	rows, _ := tx.Query(ctx, `
		SELECT id, app_id, state = 'creating' AND EXISTS (SELECT FROM tenants t WHERE t.app_id = keys.app_id)
		FROM keys WHERE `+where+` LIMIT $1 FOR UPDATE SKIP LOCKED`, maxDueKeys)
	creating := map[tenant.AppID][]uuid.UUID{}
	var apps []tenant.AppID
	var id uuid.UUID
	var app tenant.AppID
	var waitedFor bool
	if _, err := pgx.ForEachRow(rows, []any{&id, &app, &waitedFor}, func() error {
		if waitedFor {
			creating[app], apps = append(creating[app], id), append(apps, app)
		} else {
			ids = append(ids, id)
		}
		return nil
	}); err != nil || len(apps) == 0 {
		return ids, nil, err
	}
	rows, _ = tx.Query(ctx, `SELECT id, app_id FROM tenants WHERE app_id = ANY ($1) ORDER BY id FOR UPDATE SKIP LOCKED`, apps)
	var owner tenant.ID
	_, err = pgx.ForEachRow(rows, []any{&owner, &app}, func() error {
		ids, owners = append(ids, creating[app]...), append(owners, owner)
		return nil
	})
	return ids, owners, err
}

// AddExtraKeys writes down the further keys that the profile of a leased app's tenant
// has. A tenant that is not active gets them when it resumes.
func (db *DB) AddExtraKeys(ctx context.Context, a tenant.App, keys []tenant.NewKeyRow, actor tenant.Actor) error {
	added := false
	err := db.inTx(ctx, func(tx pgx.Tx) error {
		var owner tenant.ID
		err := tx.QueryRow(ctx, `SELECT id FROM tenants WHERE app_id = $1 AND state = 'active' FOR UPDATE`, a.ID).Scan(&owner)
		if errors.Is(err, pgx.ErrNoRows) {
			return nil
		}
		if err != nil {
			return err
		}
		tag, err := tx.Exec(ctx, `
			UPDATE apps SET extra_keys_at = now() WHERE id = $1 AND leased_until = $2 AND state = 'held' AND extra_keys_at IS NULL`,
			a.ID, a.LeasedUntil)
		if err := oneRow("add keys of the profile", tag, err); err != nil {
			return err
		}
		for _, k := range keys {
			tag, err := tx.Exec(ctx, `
				INSERT INTO keys (id, app_id, name, scopes, priority, requested_by)
				SELECT $1, $2, $3, $4, `+share(`1`, `$5`)+`, $5 WHERE NOT EXISTS (SELECT FROM keys WHERE app_id = $2 AND name = $3)`,
				k.ID, a.ID, k.Name, k.Scopes, actor.Name)
			if err != nil {
				return err
			}
			if tag.RowsAffected() == 0 {
				continue
			}
			added = true
			if err := audit(ctx, tx, actor, event{action: "key.creating", tenant: owner, app: a.ID, key: k.ID,
				detail: map[string]any{"name": k.Name, "scopes": k.Scopes}}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return translate("add keys of the profile", err)
	}
	if added {
		db.changed(a.Tenant, "")
		db.wakeWorkers(tenant.AppWork, tenant.KeyWork)
	}
	return nil
}
