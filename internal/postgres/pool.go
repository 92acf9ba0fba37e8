package postgres

import (
	"context"
	"errors"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/tenant"
)

// poolAge is how long a ready app counts as alive without anybody having looked: the
// daily report proves most of them before. claimedAge is the same for one that was
// just given to a tenant, which is looked at once.
const (
	poolAge    = `interval '36 hours'`
	claimedAge = `interval '1 hour'`
)

// A pool that no replica has planned for closedAfter is kept by none: its apps are removed if its profile is
// gone, and a replica that keeps no pool of the profile plans it, with a target of 0.
const closedAfter = time.Hour

// boundsMargin is longer than a transaction that makes an app ready, or lets a tenant
// wait, may take: what it writes bears the time of its beginning.
const boundsMargin = `interval '5 minutes'`

// A revision that no replica has planned for so many turns gives way to another.
// Replicas that were started with different files would remove each other's apps if
// each had its own at once.
const turnsUntilSuccession = 4

// PlanPools plans the pools that are due, one replica at a time: it sets their
// targets and takes out the apps that are not needed any more, of which no tenant can
// have been given any. A profile without a pool has a plan, too: no app stays ready forever.
func (db *DB) PlanPools(ctx context.Context, profiles []tenant.Profile, plan tenant.PoolPlan, actor tenant.Actor) error {
	names, revisions := make([]string, len(profiles)), make([]string, len(profiles))
	for i, p := range profiles {
		names[i], revisions[i] = p.Name, poolRevision(p)
	}
	// A replica that keeps the pool takes precedence over one that does not.
	const due = `
		SELECT m.name FROM unnest($1::text[], $2::text[]) AS m (name, revision) LEFT JOIN pools p ON p.profile = m.name
		WHERE p.profile IS NULL OR p.revision = m.revision AND p.planned_at < ` + incarnationBegan + `
			OR p.planned_at < now() - CASE WHEN p.revision IN (m.revision, '') THEN $3::interval WHEN m.revision <> '' THEN $4 * $3::interval ELSE $5::interval END
		UNION ALL
		SELECT profile FROM pools WHERE planned_at < now() - $5::interval AND profile <> ALL ($1)`
	dueNow := func(q interface {
		Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	}) (map[string]bool, error) {
		rows, _ := q.Query(ctx, due, names, revisions, plan.Every, turnsUntilSuccession, closedAfter)
		found, err := pgx.CollectRows(rows, pgx.RowTo[string])
		is := map[string]bool{}
		for _, name := range found {
			is[name] = true
		}
		return is, err
	}
	if is, err := dueNow(db.pool); err != nil || len(is) == 0 {
		return translate("look for pools to plan", err)
	}
	return translate("plan pools", db.inTx(ctx, func(tx pgx.Tx) error {
		var alone bool
		if err := tx.QueryRow(ctx, `SELECT pg_try_advisory_xact_lock(hashtext('plan pools'))`).Scan(&alone); err != nil || !alone {
			return err
		}
		// Another replica may just have done it.
		is, err := dueNow(tx)
		if err != nil || len(is) == 0 {
			return err
		}
		signUps, counts, err := countSignUps(ctx, tx, plan)
		if err != nil {
			return err
		}
		var careful bool
		if err := tx.QueryRow(ctx, restartsOften).Scan(&careful); err != nil {
			return err
		}
		for _, p := range profiles {
			if !is[p.Name] {
				continue
			}
			delete(is, p.Name)
			if signUps[p.Name] == nil {
				signUps[p.Name] = make([]int, plan.Beats)
			}
			target := plan.Target(p, signUps[p.Name])
			if fewest, _ := p.PoolBounds(); careful {
				target = min(target, fewest)
			}
			if err := planPool(ctx, tx, p, target, counts[p.Name], plan, actor); err != nil {
				return err
			}
		}
		// Of profiles that this replica does not know, another may have plans, or soon will.
		if _, err := tx.Exec(ctx, `
			INSERT INTO pools (profile, revision, target, planned_at, sign_ups, hits, misses)
			SELECT DISTINCT profile, '', 0, now(), 0, 0, 0 FROM apps WHERE state = 'ready' AND incarnation = `+currentIncarnation+`
			ON CONFLICT (profile) DO NOTHING`); err != nil {
			return err
		}
		for name := range is {
			if err := takeOut(ctx, tx, tenant.PoolClosed, plan.Drain, actor, `state = 'ready' AND profile = $1`, name); err != nil {
				return err
			}
			if _, err := tx.Exec(ctx, `
				DELETE FROM pools WHERE profile = $1 AND NOT EXISTS (SELECT FROM apps WHERE state = 'ready' AND profile = $1)`, name); err != nil {
				return err
			}
		}
		return nil
	}))
}

// poolRevision is the revision of a profile that its pool is kept of: empty if no pool is kept.
func poolRevision(p tenant.Profile) string {
	if !p.Pools() {
		return ""
	}
	return p.Revision()
}

// incarnationBegan is compared with the time of a plan: each incarnation plans its pools again,
// instead of starting with the pool sizes of the previous one.
const incarnationBegan = `(SELECT began_at FROM current_incarnation)`

// restartsOften says that the database started a second time within a day, less than an hour
// ago. Each start retires the pools, and retired apps count against the account's quota.
const restartsOften = `
	SELECT count(*) FILTER (WHERE began_at > now() - interval '1 day') >= 2 AND coalesce(max(began_at) > now() - interval '1 hour', false)
	FROM incarnations WHERE reason <> 'first start'`

// signUpCounts are the sign-ups of a profile in the time that is looked at, and how
// many had an app at once or had to wait for one. Tenants that have changed since count
// as neither.
type signUpCounts struct{ all, hits, misses int }

// countSignUps counts by profile. Nothing is written down at a sign-up for it: all
// sign-ups would wait for one another at such a row.
func countSignUps(ctx context.Context, tx pgx.Tx, plan tenant.PoolPlan) (map[string][]int, map[string]signUpCounts, error) {
	signUps, counts := map[string][]int{}, map[string]signUpCounts{}
	rows, _ := tx.Query(ctx, `
		SELECT profile, floor(extract(epoch FROM now() - created_at) / extract(epoch FROM $1::interval))::int AS ago, count(*),
			count(*) FILTER (WHERE state = 'active' AND state_since = created_at),
			count(*) FILTER (WHERE state = 'active' AND state_since > created_at OR state = 'provisioning')
		FROM tenants WHERE created_at > now() - $2 * $1::interval AND created_at <= now() AND NOT background
		GROUP BY profile, ago`, plan.Beat, plan.Beats)
	var profile string
	var ago, n, hits, misses int
	_, err := pgx.ForEachRow(rows, []any{&profile, &ago, &n, &hits, &misses}, func() error {
		if signUps[profile] == nil {
			signUps[profile] = make([]int, plan.Beats)
		}
		signUps[profile][plan.Beats-1-min(ago, plan.Beats-1)] += n
		c := counts[profile]
		counts[profile] = signUpCounts{c.all + n, c.hits + hits, c.misses + misses}
		return nil
	})
	return signUps, counts, err
}

func planPool(ctx context.Context, tx pgx.Tx, p tenant.Profile, target int, n signUpCounts, plan tenant.PoolPlan, actor tenant.Actor) error {
	revision, surplus := poolRevision(p), 0
	err := tx.QueryRow(ctx, `
		WITH pool AS (
			SELECT count(*)::int AS ready FROM apps WHERE `+readyOfProfile+` AND $2 IN (profile_revision, '')
		), importing AS (
			SELECT `+oldestImport+` AS since
		), planned AS (
			INSERT INTO pools AS p (profile, revision, target, planned_at, above_since, sign_ups, hits, misses, ready_from, waiting_from, importing_from)
			-- What is more than the target may be on its way to a tenant in the background.
			SELECT $1, $2, $3, now(), CASE WHEN ready > $3 AND importing.since IS NULL THEN now() END, $4, $5, $6,
				least((SELECT min(ready_at) FROM apps WHERE `+readyOfProfile+`), now() - `+boundsMargin+`),
				least((SELECT min(state_since) FROM tenants WHERE `+waits+` AND profile = $1 AND `+waitingSince+`), now() - `+boundsMargin+`),
				least(importing.since, now() - `+boundsMargin+`)
			FROM pool, importing
			ON CONFLICT (profile) DO UPDATE
			SET revision = excluded.revision, target = excluded.target, planned_at = excluded.planned_at,
				above_since = CASE WHEN excluded.above_since IS NOT NULL THEN coalesce(p.above_since, CASE WHEN $2 = '' THEN p.planned_at ELSE now() END) END,
				sign_ups = excluded.sign_ups, hits = excluded.hits, misses = excluded.misses,
				ready_from = excluded.ready_from, waiting_from = excluded.waiting_from, importing_from = excluded.importing_from
			RETURNING p.above_since
		)
		SELECT CASE WHEN above_since < now() - $7::interval THEN ready - $3 ELSE 0 END FROM planned, pool`,
		p.Name, revision, target, n.all, n.hits, n.misses, plan.Patience).Scan(&surplus)
	if err != nil {
		return err
	}
	if surplus > 0 {
		if err := takeOut(ctx, tx, tenant.PoolSurplus, min(surplus, plan.Drain), actor,
			`state = 'ready' AND profile = $1 AND $2 IN (profile_revision, '')`, p.Name, revision); err != nil {
			return err
		}
	}
	if revision == "" {
		return nil
	}
	// An app of another revision goes when one of this revision is there in its place:
	// until then it is better than none.
	var replaced int
	if err := tx.QueryRow(ctx, `SELECT count(*) - $2 FROM apps WHERE `+readyOfProfile,
		p.Name, target).Scan(&replaced); err != nil {
		return err
	}
	return takeOut(ctx, tx, tenant.PoolOutdated, min(replaced, plan.Drain), actor,
		`state = 'ready' AND profile = $1 AND profile_revision <> $2`, p.Name, revision)
}

// takeOut gives up to most ready apps that where selects to the workers that remove
// apps, the oldest first. It leaves out apps of earlier incarnations.
func takeOut(ctx context.Context, tx pgx.Tx, why tenant.PoolEnd, most int, actor tenant.Actor, where string, args ...any) error {
	if most <= 0 {
		return nil
	}
	n := len(args)
	args = append(args, most, actor.Name, why)
	place := func(i int) string { return "$" + string(rune('0'+n+i)) }
	// Materialized: a subquery that is run again for the rows it is joined with would
	// find as many again each time.
	_, err := tx.Exec(ctx, `
		WITH picked AS MATERIALIZED (
			SELECT id FROM apps WHERE `+where+` AND incarnation = `+currentIncarnation+` AND NOT `+removalsPaused+`
			ORDER BY ready_at, id LIMIT `+place(1)+` FOR UPDATE SKIP LOCKED
		), gone AS (
			UPDATE apps
			SET state = 'purging', attempts = 0, problem = NULL, next_attempt_at = now(), updated_at = now()
			WHERE id IN (SELECT id FROM picked) AND state = 'ready'
			RETURNING id)
		INSERT INTO audit_events (actor, action, app_id, detail)
		SELECT `+place(2)+`, 'app.drained', id, jsonb_build_object('reason', `+place(3)+`::text) FROM gone`, args...)
	return err
}

// DefaultKeyOf reads the key that an app was built with. It reports tenant.NotFound if
// that works no longer.
func (db *DB) DefaultKeyOf(ctx context.Context, app tenant.AppID) (tenant.SealedKey, error) {
	var k tenant.SealedKey
	err := db.pool.QueryRow(ctx, `
		SELECT id, ciphertext, fingerprint, hint FROM keys WHERE app_id = $1 AND name = $2 AND state = 'active'`,
		app, tenant.DefaultKey).Scan(&k.ID, &k.Ciphertext, &k.Fingerprint, &k.Hint)
	if errors.Is(err, pgx.ErrNoRows) {
		return k, errNotFound("key")
	}
	return k, translate("read key", err)
}

// KeyProven records that the key of a leased app works. The lease of one that is in
// the pool ends with it.
func (db *DB) KeyProven(ctx context.Context, a tenant.App) error {
	tag, err := db.pool.Exec(ctx, `
		UPDATE apps
		SET proven_at = now(), attempts = 0, problem = NULL, leased_until = CASE WHEN state = 'ready' THEN '-infinity' ELSE leased_until END
		WHERE id = $1 AND leased_until = $2 AND state = $3`, a.ID, a.LeasedUntil, a.State)
	return oneRow("record key as proven", tag, err)
}

// MemberDead retires a leased app of the pool whose key is gone, since it may have been handed
// out. It reports tenant.ErrLeaseLost if a tenant has it by now.
func (db *DB) MemberDead(ctx context.Context, a tenant.App, actor tenant.Actor) error {
	return translate("take dead app out of the pool", db.inTx(ctx, func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, `
			WITH gone AS (
				UPDATE apps
				SET state = 'retired', attempts = 0, problem = NULL, leased_until = '-infinity', updated_at = now()
				WHERE id = $1 AND leased_until = $2 AND state = 'ready'
				RETURNING id)
			INSERT INTO audit_events (actor, upstream_request_id, action, app_id, detail)
			SELECT $3, nullif($4, ''), 'app.retired', id, jsonb_build_object('reason', $5::text) FROM gone`,
			a.ID, a.LeasedUntil, actor.Name, actor.UpstreamRequestID, tenant.PoolDead)
		return oneRow("take dead app out of the pool", tag, err)
	}))
}

// RemakeHeldKey records that a key of a leased app, which a tenant has got, is gone at
// Clarifai, and that next replaces it. If the key was revoked or the tenant is not active any
// more, the key stays as it is.
func (db *DB) RemakeHeldKey(ctx context.Context, a tenant.App, gone uuid.UUID, next uuid.UUID, actor tenant.Actor) error {
	err := db.inTx(ctx, func(tx pgx.Tx) error {
		owner, err := lockOwner(ctx, tx, a.ID)
		if err != nil {
			return err
		}
		tag, err := tx.Exec(ctx, `
			UPDATE apps SET proven_at = now(), updated_at = now()
			WHERE id = $1 AND leased_until = $2 AND state = 'held' AND incarnation = `+currentIncarnation, a.ID, a.LeasedUntil)
		if err := oneRow("record key as gone", tag, err); err != nil {
			return err
		}
		_, err = tx.Exec(ctx, `
			WITH gone AS (
				UPDATE keys SET state = 'revoked', revoked_at = now(), ciphertext = NULL, updated_at = now()
				WHERE id = $1 AND state = 'active' AND EXISTS (SELECT FROM tenants t WHERE t.id = $5 AND t.state = 'active')
				RETURNING app_id, name, scopes, expires_at
			), audited AS (
				INSERT INTO audit_events (actor, upstream_request_id, action, tenant_id, app_id, key_id, detail)
				SELECT $3, nullif($4, ''), 'key.gone', nullif($5, ''), app_id, $1, jsonb_build_object('name', name, 'replaced_by', $2::uuid) FROM gone
			)
			INSERT INTO keys (id, app_id, name, scopes, expires_at, requested_by)
			SELECT $2, app_id, name, scopes, expires_at, $3 FROM gone
			WHERE NOT EXISTS (SELECT FROM keys other WHERE other.app_id = gone.app_id AND other.name = gone.name AND other.state = 'creating')`, gone, next, actor.Name, actor.UpstreamRequestID, owner)
		return err
	})
	if err != nil {
		return translate("record key as gone", err)
	}
	db.changed(a.Tenant, "")
	db.wakeWorkers(tenant.AppWork, tenant.KeyWork)
	return nil
}

// Pools reads how the pools of the profiles named stand, in the order of the names,
// and what else their upstream calls are wanted for, beside what Upstream reads. It counts up to mostCounted of each.
func (db *DB) Pools(ctx context.Context, names []string) ([]tenant.Pool, tenant.PoolLoad, error) {
	var load tenant.PoolLoad
	rows, _ := db.pool.Query(ctx, `
		SELECT m.name, coalesce(p.revision, ''), coalesce(p.target, 0), coalesce(p.planned_at, '0001-01-01 00:00:00Z'),
			(SELECT count(*) FROM apps a WHERE a.state = 'ready' AND a.profile = m.name AND a.profile_revision = p.revision AND a.incarnation = `+currentIncarnation+`),
			(SELECT count(*) FROM apps a WHERE a.state = 'ready' AND a.profile = m.name AND a.profile_revision IS DISTINCT FROM p.revision AND a.incarnation = `+currentIncarnation+`),
			(SELECT count(*) FROM (SELECT FROM apps a WHERE a.state = 'retired' AND a.profile = m.name LIMIT 1000) few),
			(SELECT count(*) FROM apps a WHERE a.state = 'building' AND a.profile = m.name AND a.incarnation = `+currentIncarnation+`),
			`+countUpTo(`tenants t WHERE `+waits+` AND t.profile = m.name ORDER BY state_since`)+`,
			`+countUpTo(`tenants t WHERE `+imports+` AND t.profile = m.name ORDER BY state_since`)+`,
			coalesce(p.sign_ups, 0), coalesce(p.hits, 0), coalesce(p.misses, 0),
			(SELECT a.problem FROM apps a WHERE a.state = 'building' AND a.profile = m.name AND a.problem IS NOT NULL
				ORDER BY a.next_attempt_at DESC LIMIT 1)
		FROM unnest($1::text[]) WITH ORDINALITY AS m (name, place) LEFT JOIN pools p ON p.profile = m.name
		ORDER BY m.place`, names)
	pools, err := pgx.CollectRows(rows, pgx.RowToStructByPos[tenant.Pool])
	if err != nil {
		return nil, load, translate("read pools", err)
	}
	err = db.pool.QueryRow(ctx, `
		SELECT `+countUpTo(`keys WHERE state IN ('creating', 'revoking')`)+`,
			`+countUpTo(`apps WHERE state = 'held' AND pending`)+`,
			(SELECT count(*) FROM reconciliations WHERE state = 'running')`).
		Scan(&load.Keys, &load.Marking, &load.Reports)
	return pools, load, translate("read pools", err)
}
