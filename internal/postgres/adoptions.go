package postgres

import (
	"cmp"
	"context"
	"errors"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/tenantry/tenantry/internal/tenant"
)

// dueAdoption selects the adoptions that there is work on. Adoptions wait until it is known that
// no other database is in use.
const dueAdoption = `state = 'checking' AND leased_until < now() AND next_attempt_at <= now() AND NOT ` + watching + ` AND NOT ` + workPaused

const adoptionColumns = `a.id, a.tenant_id, a.app_id, coalesce(a.app_user_id, ''), a.dry_run, a.state, a.created_at,
	coalesce(CASE WHEN a.state = 'checking' THEN coalesce(
		(SELECT ` + recoveryProblem + ` WHERE ` + watching + `),
		` + upstreamHalted + `) END, a.problem)`

func adoptionFields(a *tenant.Adoption) []any {
	return []any{&a.ID, &a.TenantID, &a.AppID, &a.AppUserID, &a.DryRun, &a.State, &a.CreatedAt, &a.Problem}
}

// errAppeared undoes a transaction that a tenant came in between.
var errAppeared = errors.New("the tenant is there by now")

// BeginAdoption writes down that an app is to be taken over, or finds the same adoption
// under way, or ended and told to nobody yet. Another adoption of the tenant that is
// under way is replaced. A tenant that is there is returned as it stands, with no
// adoption, unless agrees refuses it or a key is given that takes the place of its own. It
// reports tenant.Conflict for an app that the database knows.
func (db *DB) BeginAdoption(ctx context.Context, n tenant.NewAdoption, agrees func(t tenant.Tenant, first []byte) error, actor tenant.Actor) (tenant.BegunAdoption, error) {
	var b tenant.BegunAdoption
	var began bool
	if err := db.ensureIncarnation(ctx); err != nil {
		return b, err
	}
	begin := func(tx pgx.Tx) error {
		b, began = tenant.BegunAdoption{}, false
		// The app before the tenant: who gets the app has it in one commit with its tenant.
		claimed := unclaimed(ctx, tx, n.AppID, n.TenantID)
		if claimed != nil && !errors.Is(claimed, tenant.Conflict) {
			return claimed
		}
		fields, done := tenantFields(&b.Tenant)
		var first []byte
		err := tx.QueryRow(ctx, `SELECT `+tenantColumns+`, t.attributes_hash FROM tenants t WHERE t.id = $1 AND t.state <> 'deleted'`, n.TenantID).
			Scan(append(fields, &first)...)
		done()
		switch {
		case errors.Is(err, pgx.ErrNoRows):
			if claimed != nil {
				return claimed
			}
		case err != nil:
			return err
		default:
			if err := agrees(b.Tenant, first); err != nil {
				return err
			}
			if replaces, err := replacesKey(ctx, tx, n.Key, b.Tenant); err != nil || !replaces {
				return err
			}
		}
		tag, err := tx.Exec(ctx, `
			INSERT INTO adoptions AS a (id, tenant_id, dry_run, app_id, app_user_id, profile, display_name, labels, attributes_hash,
				ciphertext, fingerprint, requested_by, request_id, by_admin)
			VALUES ($1, $2, $3, $4, nullif($5, ''), $6, $7, $8, $9, $10, $11, $12, nullif($13, ''), $14)
			ON CONFLICT (tenant_id, dry_run) DO UPDATE
			SET id = excluded.id, app_id = excluded.app_id, app_user_id = excluded.app_user_id, profile = excluded.profile,
				display_name = excluded.display_name, labels = excluded.labels, attributes_hash = excluded.attributes_hash,
				ciphertext = excluded.ciphertext, fingerprint = excluded.fingerprint, state = 'checking', told = false, reserved = false,
				requested_by = excluded.requested_by, by_admin = excluded.by_admin, request_id = excluded.request_id, leased_until = '-infinity',
				next_attempt_at = now(), attempts = 0, problem = NULL, created_at = now(), updated_at = now()
			WHERE a.state <> 'checking' AND a.told
				OR (a.app_id, a.app_user_id, a.profile, a.attributes_hash, a.fingerprint, a.by_admin) IS DISTINCT FROM
					(excluded.app_id, excluded.app_user_id, excluded.profile, excluded.attributes_hash, excluded.fingerprint, excluded.by_admin)`,
			n.ID, n.TenantID, n.DryRun, n.AppID, n.AppUserID, n.Profile, n.Attributes.DisplayName, n.Attributes.Labels, n.Attributes.Hash(),
			n.Key.Ciphertext, n.Key.Fingerprint, actor.Name, actor.RequestID, n.ByAdmin)
		if err != nil {
			return err
		}
		if began = tag.RowsAffected() == 1; began && b.Tenant.ID == "" {
			// Where the same adoption was carried out since the look for the tenant, its row
			// was gone by now, and this one began it anew.
			var appeared bool
			if err := tx.QueryRow(ctx, `SELECT EXISTS (SELECT FROM tenants WHERE id = $1 AND state <> 'deleted')`, n.TenantID).
				Scan(&appeared); err != nil {
				return err
			}
			if appeared {
				return errAppeared
			}
		}
		if began {
			if err := audit(ctx, tx, actor, event{action: "app.adopting", tenant: n.TenantID, app: n.AppID,
				detail: map[string]any{"dry_run": n.DryRun, "with_key": n.Key.Ciphertext != nil}}); err != nil {
				return err
			}
		}
		return tx.QueryRow(ctx, `SELECT `+adoptionColumns+` FROM adoptions a WHERE tenant_id = $1 AND dry_run = $2`, n.TenantID, n.DryRun).
			Scan(adoptionFields(&b.Adoption)...)
	}
	err := db.inTx(ctx, begin)
	if errors.Is(err, errAppeared) {
		err = db.inTx(ctx, begin)
	}
	if err != nil {
		return b, translate("begin adoption", err)
	}
	if began {
		db.wakeWorkers(tenant.AdoptionWork)
	}
	return b, nil
}

// replacesKey reports whether key takes the place of the one that a tenant has. Only that of an app that is shared with the operator is replaced so; Tenantry
// replaces others itself. One that the tenant had is never taken again.
func replacesKey(ctx context.Context, tx pgx.Tx, key tenant.SealedKey, t tenant.Tenant) (bool, error) {
	if t.AppUserID == "" || key.Ciphertext == nil || !takesKey(t.State) {
		return false, nil
	}
	var known bool
	err := tx.QueryRow(ctx, `SELECT EXISTS (SELECT FROM keys WHERE fingerprint = $1)`, key.Fingerprint).Scan(&known)
	return !known, err
}

// takesKey reports whether a tenant of a shared app can be given another key. One whose
// keys are dead, or dying, is active again with it.
func takesKey(s tenant.State) bool {
	return s == tenant.Active || s == tenant.Suspending || s == tenant.Suspended
}

// unclaimed reports tenant.Conflict for an app that the database knows, unless it is retired: by R1
// no app is given to a second tenant.
func unclaimed(ctx context.Context, tx pgx.Tx, id tenant.AppID, by tenant.ID) error {
	var state tenant.AppState
	var owner tenant.ID
	err := tx.QueryRow(ctx, `SELECT state, coalesce(tenant_id, '') FROM apps WHERE id = $1`, id).Scan(&state, &owner)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil
	}
	if err != nil || state == tenant.AppRetired {
		return err
	}
	return claimedBy(state, owner, by)
}

func claimedBy(state tenant.AppState, owner, by tenant.ID) error {
	const again = "an app is never given to a second tenant, nor to another generation of the same"
	switch {
	case owner == "":
		return tenant.Errorf(tenant.Conflict, "adopt_app_claimed", "Tenantry made an app of this id itself, which is %s: it cannot be adopted", state)
	case state == tenant.AppHeld && owner != by:
		return tenant.Errorf(tenant.Conflict, "adopt_app_claimed", "the tenant %s holds the app", owner)
	}
	return tenant.Errorf(tenant.Conflict, "adopt_app_claimed", "the app was the tenant %s's, and is %s: %s", owner, state, again)
}

// Adoption reads an adoption; one that has ended counts as told from then on. It reports
// tenant.NotFound for one that was carried out or replaced.
func (db *DB) Adoption(ctx context.Context, id uuid.UUID) (tenant.Adoption, error) {
	var a tenant.Adoption
	err := db.pool.QueryRow(ctx, `
		WITH told AS (UPDATE adoptions SET told = true WHERE id = $1 AND state <> 'checking' AND NOT told)
		SELECT `+adoptionColumns+` FROM adoptions a WHERE a.id = $1`, id).Scan(adoptionFields(&a)...)
	if errors.Is(err, pgx.ErrNoRows) {
		return a, errNotFound("adoption")
	}
	return a, translate("read adoption", err)
}

// HasAdoption reports whether there is an adoption by a tenant that was not carried out.
func (db *DB) HasAdoption(ctx context.Context, id tenant.ID, dryRun bool) (bool, error) {
	var has bool
	err := db.pool.QueryRow(ctx, `SELECT EXISTS (SELECT FROM adoptions WHERE tenant_id = $1 AND dry_run = $2)`, id, dryRun).Scan(&has)
	return has, translate("look up adoption", err)
}

// LeaseAdoptions leases those of the adoptions that there is work on, for at most lease.
func (db *DB) LeaseAdoptions(ctx context.Context, ids []uuid.UUID, lease time.Duration) ([]tenant.LeasedAdoption, error) {
	rows, _ := db.pool.Query(ctx, `
		UPDATE adoptions a SET leased_until = now() + $2, leased_by = $3
		WHERE id = ANY (ARRAY(SELECT id FROM adoptions WHERE id = ANY ($1) AND `+dueAdoption+` FOR UPDATE SKIP LOCKED))
		RETURNING `+adoptionColumns+`, a.profile, a.ciphertext, a.requested_by, coalesce(a.request_id, ''), a.by_admin, a.reserved, a.attempts, a.leased_until`, ids, lease, db.replica)
	leased, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (tenant.LeasedAdoption, error) {
		var a tenant.LeasedAdoption
		err := row.Scan(append(adoptionFields(&a.Adoption), &a.Profile, &a.Ciphertext, &a.RequestedBy.Name, &a.RequestedBy.RequestID, &a.ByAdmin, &a.Reserved, &a.Attempts, &a.LeasedUntil)...)
		return a, err
	})
	return leased, translate("lease adoptions", err)
}

// ReserveAdoption reserves the app of a leased adoption. Until that adoption ends, no other
// adoption may write the app's ownership tag. It reports false if another one has the reservation.
func (db *DB) ReserveAdoption(ctx context.Context, a tenant.LeasedAdoption) (bool, error) {
	tag, err := db.pool.Exec(ctx, `
		UPDATE adoptions SET reserved = true, updated_at = now() WHERE id = $1 AND leased_until = $2 AND state = 'checking'`, a.ID, a.LeasedUntil)
	if pg, ok := errors.AsType[*pgconn.PgError](err); ok && pg.ConstraintName == "adoptions_one_reserved" {
		return false, nil
	}
	return true, oneRow("reserve app for adoption", tag, err)
}

// HoldAdopted carries a leased adoption out: the tenant has the app from here on, and
// the key, which is made if key has no secret. A tenant that has the app already gets the
// key in the place of its own. All or nothing. It reports
// tenant.Conflict if the app, the tenant's id or the key were taken meanwhile.
func (db *DB) HoldAdopted(ctx context.Context, a tenant.LeasedAdoption, key tenant.SealedKey, scopes []string, actor tenant.Actor) error {
	err := db.inTx(ctx, func(tx pgx.Tx) error {
		generation, there, err := lockAdopter(ctx, tx, a)
		if err != nil {
			return err
		}
		if there.ID != "" {
			replaces, err := replacesKey(ctx, tx, key, there)
			if err != nil {
				return err
			}
			if !replaces { // it was carried out between the look for the tenant and the writing of this
				return adoptionDone(ctx, tx, a)
			}
			return giveKey(ctx, tx, a, there, key, scopes, actor)
		}
		tag, err := tx.Exec(ctx, `
			INSERT INTO apps AS a (id, user_id, profile, profile_revision, state, tenant_id, tenant_generation, made_at, ready_at, pending)
			VALUES ($1, nullif($2, ''), $3, $4, 'held', $5, $6, now(), now(), true)
			ON CONFLICT (id) DO UPDATE
			SET state = 'held', profile = excluded.profile, tenant_id = excluded.tenant_id, tenant_generation = excluded.tenant_generation, made_at = coalesce(a.made_at, now()),
				ready_at = coalesce(a.ready_at, now()), in_doubt_since = NULL, pending = true, attempts = 0, problem = NULL, next_attempt_at = now(), updated_at = now()
			WHERE a.state = 'retired'`,
			a.AppID, a.AppUserID, a.Profile, tenant.AdoptedRevision, a.TenantID, generation)
		if err != nil {
			return err
		}
		if tag.RowsAffected() == 0 {
			return cmp.Or(unclaimed(ctx, tx, a.AppID, a.TenantID), tenant.ErrLeaseLost)
		}
		if err := holdTenant(ctx, tx, a, generation, key.Ciphertext != nil); err != nil {
			return err
		}
		if err := audit(ctx, tx, actor, event{action: "tenant.created", tenant: a.TenantID,
			detail: map[string]any{"generation": generation, "profile": a.Profile, "adopted": true}}); err != nil {
			return err
		}
		detail := map[string]any{}
		if a.AppUserID != "" {
			detail["user_id"] = a.AppUserID
		}
		if err := audit(ctx, tx, actor, event{action: "app.adopted", tenant: a.TenantID, app: a.AppID, detail: detail}); err != nil {
			return err
		}
		if err := audit(ctx, tx, actor, event{action: "tenant.activated", tenant: a.TenantID, app: a.AppID,
			detail: map[string]any{"generation": generation}}); err != nil {
			return err
		}
		if err = adoptKey(ctx, tx, a, key, scopes, actor); err != nil {
			return err
		}
		return adoptionDone(ctx, tx, a)
	})
	if err != nil {
		return translate("hold adopted app", err)
	}
	db.changed(a.TenantID, a.AppID)
	db.wakeWorkers(tenant.AppWork, tenant.KeyWork)
	return nil
}

// adoptionDone forgets an adoption that was carried out, and dry runs of it, and wakes who
// waits for it.
func adoptionDone(ctx context.Context, tx pgx.Tx, a tenant.LeasedAdoption) error {
	if _, err := tx.Exec(ctx, `DELETE FROM adoptions WHERE tenant_id = $1`, a.TenantID); err != nil {
		return err
	}
	return wakeTenant(ctx, tx, a.TenantID)
}

// giveKey puts the key of an adoption in the place of that which a tenant of a shared app
// has.
func giveKey(ctx context.Context, tx pgx.Tx, a tenant.LeasedAdoption, t tenant.Tenant, key tenant.SealedKey, scopes []string, actor tenant.Actor) error {
	if _, err := endKeys(ctx, tx, actor, tenant.EndRotated, tenant.Interactive, false, `k.app_id = $6 AND k.name = $7`, a.AppID, tenant.DefaultKey); err != nil {
		return err
	}
	if err := adoptKey(ctx, tx, a, key, scopes, actor); err != nil {
		return err
	}
	if t.State != tenant.Active {
		if err := move(ctx, tx, t, tenant.Active, actor, nil); err != nil {
			return err
		}
	}
	return adoptionDone(ctx, tx, a)
}

// lockAdopter locks the adoption and its tenant, if there is one, and returns the
// generation that begins, or the tenant that has the app.
func lockAdopter(ctx context.Context, tx pgx.Tx, a tenant.LeasedAdoption) (generation int, there tenant.Tenant, err error) {
	rows, _ := tx.Query(ctx, `SELECT `+tenantColumns+` FROM tenants t WHERE t.id = $1 FOR UPDATE OF t`, a.TenantID)
	t, err := oneTenant(rows)
	if err != nil && !errors.Is(err, tenant.NotFound) {
		return 0, there, err
	}
	switch {
	case err != nil || t.State == tenant.Deleted:
	case t.AppID == a.AppID && t.AppUserID == a.AppUserID:
		there = t
	default:
		return 0, there, tenant.ErrTenantTaken(a.TenantID, t.AppID, t.State)
	}
	var up bool
	err = tx.QueryRow(ctx, `
		SELECT `+watching+` FROM adoptions WHERE id = $1 AND leased_until = $2 AND state = 'checking' AND NOT dry_run FOR UPDATE`,
		a.ID, a.LeasedUntil).Scan(&up)
	if errors.Is(err, pgx.ErrNoRows) || err == nil && up { // it is not due
		return 0, there, tenant.ErrLeaseLost
	}
	return t.Generation + 1, there, err
}

// holdTenant makes the tenant of an adoption. Without a key that works it resumes: it is
// active with the first that does.
func holdTenant(ctx context.Context, tx pgx.Tx, a tenant.LeasedAdoption, generation int, works bool) error {
	state := tenant.Resuming
	if works {
		state = tenant.Active
	}
	tag, err := tx.Exec(ctx, `
		INSERT INTO tenants AS t (id, generation, profile, state, app_id, app_user_id, display_name, labels, attributes_hash)
		SELECT tenant_id, $3, profile, $4, app_id, app_user_id, display_name, labels, attributes_hash
		FROM adoptions WHERE id = $1 AND leased_until = $2
		ON CONFLICT (id) DO UPDATE
		SET generation = excluded.generation, profile = excluded.profile, state = excluded.state, state_since = now(), app_id = excluded.app_id,
			app_user_id = excluded.app_user_id, display_name = excluded.display_name, labels = excluded.labels,
			attributes_hash = excluded.attributes_hash, problem = NULL, deletion_protection = false, version = t.version + 1, updated_at = now()
		WHERE t.state = 'deleted' AND t.generation = excluded.generation - 1`,
		a.ID, a.LeasedUntil, generation, state)
	if err == nil && tag.RowsAffected() == 0 { // it signed up since it was looked for
		return tenant.ErrTenantTaken(a.TenantID, "", tenant.Provisioning)
	}
	return err
}

// adoptKey writes down the key that was given, or that one is to be made.
func adoptKey(ctx context.Context, tx pgx.Tx, a tenant.LeasedAdoption, key tenant.SealedKey, scopes []string, actor tenant.Actor) error {
	e := event{action: "key.adopted", tenant: a.TenantID, app: a.AppID, key: a.ID, detail: map[string]any{"name": tenant.DefaultKey, "scopes": scopes}}
	if key.Ciphertext == nil {
		e.action = "key.creating"
		_, err := tx.Exec(ctx, `
			INSERT INTO keys (id, app_id, name, scopes, priority, requested_by, request_id) VALUES ($1, $2, $3, $4, 1, $6, nullif($5, ''))`,
			a.ID, a.AppID, tenant.DefaultKey, scopes, actor.RequestID, actor.Name)
		if err != nil {
			return err
		}
		return audit(ctx, tx, actor, e)
	}
	e.key = key.ID
	// A retired app may have rows of this key already, and of other keys that may be dead.
	if _, err := tx.Exec(ctx, `
		UPDATE keys SET state = 'retiring', retires_at = now(), end_reason = 'rotated', updated_at = now()
		WHERE app_id = $1 AND name = $2 AND state = 'active' AND fingerprint <> $3`, a.AppID, tenant.DefaultKey, key.Fingerprint); err != nil {
		return err
	}
	_, err := endKeys(ctx, tx, actor, tenant.EndRotated, tenant.Interactive, false, `k.app_id = $6 AND k.name = $7 AND k.state = 'creating' AND k.id <> $8`,
		a.AppID, tenant.DefaultKey, key.ID)
	if err != nil {
		return err
	}
	// A key that was being created when the rows were copied has been created since.
	tag, err := tx.Exec(ctx, `
		UPDATE keys SET name = $3, scopes = $4, state = 'active', ciphertext = $5, fingerprint = $6, hint = $7, activated_at = now(), problem = NULL,
			in_doubt_since = NULL, attempts = 0, leased_until = '-infinity', updated_at = now()
		WHERE id = $1 AND app_id = $2 AND state IN ('creating', 'lost') AND fingerprint IS NULL`,
		key.ID, a.AppID, tenant.DefaultKey, scopes, key.Ciphertext, key.Fingerprint, key.Hint)
	if err != nil {
		return err
	}
	if tag.RowsAffected() == 1 {
		return audit(ctx, tx, actor, e)
	}
	tag, err = tx.Exec(ctx, `
		INSERT INTO keys AS k (id, app_id, name, scopes, state, ciphertext, fingerprint, hint, activated_at)
		VALUES ($1, $2, $3, $4, 'active', $5, $6, $7, now())
		ON CONFLICT (fingerprint) WHERE fingerprint IS NOT NULL DO UPDATE SET updated_at = now() WHERE k.app_id = excluded.app_id AND k.state = 'active'`,
		key.ID, a.AppID, tenant.DefaultKey, scopes, key.Ciphertext, key.Fingerprint, key.Hint)
	if pg, ok := errors.AsType[*pgconn.PgError](err); err != nil && (!ok || pg.ConstraintName != "keys_pkey") {
		return err
	}
	if err != nil || tag.RowsAffected() == 0 {
		return tenant.Errorf(tenant.Conflict, "adopt_key_known", "Tenantry has this key already, for another app, or has ended it")
	}
	return audit(ctx, tx, actor, e)
}

// EndAdoption ends a leased adoption without carrying it out. Of what was given it keeps
// what tells the same adoption, and nothing that is a secret or says who somebody is.
func (db *DB) EndAdoption(ctx context.Context, a tenant.LeasedAdoption, state tenant.AdoptionState, problem *tenant.Problem, actor tenant.Actor) error {
	return translate("end adoption", db.inTx(ctx, func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, `
			UPDATE adoptions
			SET state = $3, problem = $4, ciphertext = NULL, reserved = false, display_name = '', labels = '{}', leased_until = '-infinity', updated_at = now()
			WHERE id = $1 AND leased_until = $2 AND state = 'checking'`, a.ID, a.LeasedUntil, state, problem)
		if err := oneRow("end adoption", tag, err); err != nil {
			return err
		}
		detail := map[string]any{"dry_run": a.DryRun, "state": state}
		if problem != nil {
			detail["code"] = problem.Code
		}
		if err := audit(ctx, tx, actor, event{action: "app.adoption_ended", tenant: a.TenantID, app: a.AppID, detail: detail}); err != nil {
			return err
		}
		return wakeTenant(ctx, tx, a.TenantID)
	}))
}

// adoptionMemory is how long it is known how an adoption ended that was not carried out.
const adoptionMemory = 24 * time.Hour

// ForgetAdoptions deletes adoptions that ended long ago.
func (db *DB) ForgetAdoptions(ctx context.Context) error {
	_, err := db.pool.Exec(ctx, `
		DELETE FROM adoptions WHERE id IN (
			SELECT id FROM adoptions WHERE state <> 'checking' AND updated_at < now() - $1::interval LIMIT 100)`, adoptionMemory)
	return translate("forget adoptions", err)
}

// notOurs reports tenant.Conflict for a tenant whose app is shared with the operator.
func notOurs(t tenant.Tenant) error {
	if t.AppUserID == "" {
		return nil
	}
	return tenant.ErrNotOurs(t.AppUserID)
}
