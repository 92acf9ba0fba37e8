package postgres

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/tenantry/tenantry/internal/tenant"
)

// problemSQL is what holds a tenant up. One that waits has no app whose problem could
// be its own: it shows why all upstream work stands still, or the problem of a build
// that could serve it. One that changes shows what stands in the way of its keys and
// its app.
var problemSQL = `coalesce(t.problem, CASE
	WHEN t.state IN ('active', 'deleted') THEN NULL
	WHEN t.state = 'provisioning' THEN coalesce(
		(SELECT ` + recoveryProblem + ` FROM current_incarnation WHERE recovery = 'stopped'),
		` + upstreamHalted + `,
		(SELECT a.problem FROM apps a
		WHERE a.state = 'building' AND a.profile = t.profile AND ` + ofRow("a") + `
		ORDER BY a.next_attempt_at LIMIT 1))
	ELSE coalesce(
		CASE WHEN ` + waitsForRecovery + ` THEN ` + recoveryProblem + ` END,
		CASE WHEN t.state IN ('suspending', 'resuming', 'purging') OR t.state = 'deleting' AND (` + waitsForPurge + ` OR NOT ` + keysDead + `)
			THEN coalesce(` + upstreamHalted + `) END,
		CASE WHEN t.state = 'purging' OR t.state = 'deleting' AND ` + waitsForPurge + ` THEN ` + pauseProblem + ` END,
		(SELECT CASE WHEN ` + ofRow("a") + ` THEN a.problem END FROM apps a WHERE a.id = t.app_id),
		(SELECT k.problem FROM keys k
		WHERE k.app_id = t.app_id AND k.state IN ('creating', 'revoking', 'lost') AND ` + ofRow("k") + `
		ORDER BY k.next_attempt_at LIMIT 1)) END)`

// ofRow says that a row has a problem of its own. That the PAT is rejected is none: upstreamHalted says so for
// as long as it is true.
func ofRow(row string) string { return row + `.problem->>'code' <> 'upstream_pat_refused'` }

// waitsForPurge says of the tenant t, which is deleting, that the removal of its app is due.
const waitsForPurge = `(SELECT a.purge_after <= now() FROM apps a WHERE a.id = t.app_id)`

// waitsForRecovery says of the tenant t that its change in progress waits for the end of
// recovery mode, or of the watch.
const waitsForRecovery = `(t.state IN ('purging', 'resuming') AND ` + inRecovery + ` OR t.state IN ('suspending', 'deleting') AND ` + watching + ` AND NOT ` + keysDead + `)
	AND (SELECT a.incarnation <> (SELECT id FROM current_incarnation) FROM apps a WHERE a.id = t.app_id)`

// upstreamHalted is why no upstream work is done at all; null while it is. A rejected PAT halts it if no
// live replica uses another one.
const upstreamHalted = workProblem + `,
	(SELECT problem FROM refused_pats r
		WHERE EXISTS (SELECT FROM replicas p WHERE p.pat = r.fingerprint AND ` + liveReplica + `)
			AND NOT EXISTS (SELECT FROM replicas p LEFT JOIN refused_pats o ON o.fingerprint = p.pat
				WHERE ` + liveReplica + ` AND p.pat IS NOT NULL AND o.fingerprint IS NULL)
		ORDER BY next_check_at DESC LIMIT 1),
	(SELECT pause_reason FROM upstream_budget WHERE pauses > 0)`

// keysDead says of the tenant t that none of its keys works, as far as is known. Not by
// NOT EXISTS: for a page of tenants the planner would rather read all keys there are
// once than those of each.
const keysDead = `((SELECT true FROM keys k WHERE k.app_id = t.app_id AND k.state IN ('creating', 'active', 'retiring', 'revoking') LIMIT 1) IS NULL
	AND (SELECT end_unknown_keys FROM apps WHERE id = t.app_id) IS NOT TRUE)`

var tenantColumns = `t.id, t.generation, t.state, t.profile, coalesce(t.app_id, ''), coalesce(t.app_user_id, ''), t.display_name, t.labels,
	t.deletion_protection, CASE WHEN t.state = 'deleting' THEN (SELECT a.purge_after FROM apps a WHERE a.id = t.app_id) END,
	t.state = 'deleting' AND ` + keysDead + `, ` + problemSQL + `, t.version, t.created_at, t.updated_at`

func scanTenant(row pgx.CollectableRow) (tenant.Tenant, error) {
	var t tenant.Tenant
	fields, done := tenantFields(&t)
	err := row.Scan(fields...)
	done()
	return t, err
}

func tenantFields(t *tenant.Tenant) ([]any, func()) {
	var purge *time.Time
	return []any{&t.ID, &t.Generation, &t.State, &t.Profile, &t.AppID, &t.AppUserID, &t.DisplayName, &t.Labels,
			&t.DeletionProtection, &purge, &t.KeysDead, &t.Problem, &t.Version, &t.CreatedAt, &t.UpdatedAt},
		func() { t.PurgeAfter = orZero(purge) }
}

func oneTenant(rows pgx.Rows) (tenant.Tenant, error) {
	t, err := pgx.CollectExactlyOneRow(rows, scanTenant)
	if errors.Is(err, pgx.ErrNoRows) {
		return t, errNotFound("tenant")
	}
	return t, translate("read tenant", err)
}

// A TenantFilter selects tenants. Zero fields select all.
type TenantFilter struct {
	State         tenant.State
	Profile       string
	Labels        map[string]string // all of them
	Within        tenant.Scope
	IDPrefix      string
	CreatedAfter  time.Time // inclusive
	CreatedBefore time.Time // exclusive
	HasProblem    *bool
}

// A Position is a place in the order of tenants: after the tenant it names. The
// zero Position is before the first.
type Position struct {
	CreatedAt time.Time
	ID        tenant.ID
}

// planForValues has a statement planned each time for the values that it is sent with.
// Which index finds a page of a list soonest depends on how many rows a filter selects,
// and Postgres would by and by take one plan for all.
const planForValues = pgx.QueryExecModeCacheDescribe

// mayHaveProblem selects the tenants of which problemSQL may return a problem: those with a problem of their
// own, those that wait for something while all work or their builds have a problem, and those whose app or
// key has one. Other tenants are not read.
var mayHaveProblem = func() string {
	const halted = `coalesce(` + upstreamHalted + `) IS NOT NULL OR ` + inRecovery
	selects := []string{
		`SELECT * FROM tenants WHERE problem IS NOT NULL`,
		`SELECT * FROM tenants WHERE problem IS NULL AND state = 'provisioning'
			AND ((` + halted + `) OR profile = ANY (ARRAY(SELECT profile FROM apps WHERE state = 'building' AND problem IS NOT NULL)))`,
	}
	for _, s := range []tenant.State{tenant.Suspending, tenant.Resuming, tenant.Deleting, tenant.Purging} {
		waits := halted
		if s == tenant.Deleting || s == tenant.Purging {
			waits += ` OR ` + removalsPaused
		}
		selects = append(selects, `SELECT * FROM tenants WHERE problem IS NULL AND state = '`+string(s)+`' AND (`+waits+`)`)
	}
	selects = append(selects, `
		SELECT * FROM tenants WHERE problem IS NULL AND (state = 'suspended' OR state IN ('suspending', 'resuming') AND NOT (`+halted+`)
				OR state IN ('deleting', 'purging') AND NOT (`+halted+` OR `+removalsPaused+`))
			AND app_id IN (
				SELECT id FROM apps WHERE problem IS NOT NULL AND tenant_id IS NOT NULL
				UNION SELECT app_id FROM keys WHERE problem IS NOT NULL AND state IN ('creating', 'revoking', 'lost'))`)
	return strings.Join(selects, ` UNION ALL `)
}()

// Tenants lists up to limit tenants that f selects, oldest first, after a
// position. Its cost does not grow with the position.
func (db *DB) Tenants(ctx context.Context, f TenantFilter, after Position, limit int) ([]tenant.Tenant, error) {
	var where []string
	var args []any
	add := func(condition string, values ...any) {
		for _, v := range values {
			args = append(args, v)
			condition = strings.Replace(condition, "?", fmt.Sprintf("$%d", len(args)), 1)
		}
		where = append(where, condition)
	}
	if f.State != "" {
		add("t.state = ?", f.State)
	}
	if f.Profile != "" {
		add("t.profile = ?", f.Profile)
	}
	if len(f.Labels) > 0 {
		add("t.labels @> ?", f.Labels)
	}
	if f.Within.Limited() {
		add("t.labels @> ?", f.Within)
	}
	if f.IDPrefix != "" {
		add("starts_with(t.id, ?)", f.IDPrefix)
	}
	if !f.CreatedAfter.IsZero() {
		add("t.created_at >= ?", f.CreatedAfter)
	}
	if !f.CreatedBefore.IsZero() {
		add("t.created_at < ?", f.CreatedBefore)
	}
	from := `tenants t`
	switch {
	case f.HasProblem == nil:
	case *f.HasProblem:
		from = `(` + mayHaveProblem + `) t`
		add(problemSQL + ` IS NOT NULL`)
	default:
		add(problemSQL + ` IS NULL`)
	}
	if after != (Position{}) {
		add("(t.created_at, t.id) > (?, ?)", after.CreatedAt, after.ID)
	}
	sql := `SELECT ` + tenantColumns + ` FROM ` + from
	if len(where) > 0 {
		sql += ` WHERE ` + strings.Join(where, " AND ")
	}
	args = append(args, limit)
	sql += fmt.Sprintf(` ORDER BY t.created_at, t.id LIMIT $%d`, len(args))
	read := func(q querier) (tenants []tenant.Tenant, err error) {
		rows, _ := q.Query(ctx, sql, append([]any{planForValues}, args...)...)
		return pgx.CollectRows(rows, scanTenant)
	}
	var tenants []tenant.Tenant
	var err error
	if f.HasProblem == nil {
		tenants, err = read(db.pool)
	} else {
		// Behind a pooler, only a transaction keeps Postgres from compiling it.
		err = db.inTx(ctx, func(tx pgx.Tx) error {
			tenants, err = read(tx)
			return err
		})
	}
	return tenants, translate("list tenants", err)
}

// mostCounted is how many rows are counted; more are left at that.
const mostCounted = 10_000

// countUpTo counts the rows that from selects, up to mostCounted.
func countUpTo(from string) string {
	return fmt.Sprintf(`(SELECT count(*) FROM (SELECT FROM %s LIMIT %d) few)`, from, mostCounted)
}

// claimSQL gives the ready app that waited longest to the tenant of the profile
// that waited longest; this and claimInBackgroundSQL are the only ways to an app that is
// held, and this one leaves out who waits in the background. Tenants and
// apps that another transaction is at are passed over: whoever holds them
// finishes them. $1 is the profile, $2 the actor, $3 the request id, $4 the upstream
// request id.
//
// An app of another revision of the profile than the pool is kept of is better than
// none, and taken only if there is no other.
//
// No tenant is locked unless there is an app for it: a build that ends at that
// moment would pass the tenant over. No app is locked unless a tenant waits.
const claimSQL = `
	WITH ` + handOut + `, current AS (
		SELECT id FROM apps
		WHERE ` + claimable + ` AND profile_revision = (SELECT revision FROM pools WHERE profile = $1)
		ORDER BY ready_at, id LIMIT 1 FOR UPDATE SKIP LOCKED
	), other AS (
		SELECT id FROM apps
		WHERE ` + claimable + ` AND NOT EXISTS (SELECT FROM current)
		ORDER BY ready_at, id LIMIT 1 FOR UPDATE SKIP LOCKED
	), picked AS (
		SELECT id FROM current UNION ALL SELECT id FROM other
	), waiter AS (
		SELECT id, generation FROM tenants
		WHERE ` + waits + ` AND profile = $1 AND ` + waitingSince + ` AND EXISTS (SELECT FROM picked)
		ORDER BY state_since, id LIMIT 1 FOR UPDATE SKIP LOCKED
	), given AS (
		UPDATE apps a
		SET state = 'held', tenant_id = w.id, tenant_generation = w.generation, pending = true, next_attempt_at = now(),
			updated_at = now()
		FROM waiter w, picked p WHERE a.id = p.id
		RETURNING a.id, a.tenant_id, a.tenant_generation
	), activated AS (
		UPDATE tenants t
		SET state = 'active', state_since = now(), app_id = g.id, problem = NULL,
			version = version + 1, updated_at = now()
		FROM given g WHERE t.id = g.tenant_id
		RETURNING t.id, t.generation, t.app_id
	), audited AS (
		INSERT INTO audit_events (actor, request_id, upstream_request_id, action, tenant_id, app_id, detail)
		SELECT $2, nullif($3, ''), nullif($4, ''), 'tenant.activated', id, app_id, jsonb_build_object('generation', generation)
		FROM activated
	)`

const claimable = `state = 'ready' AND profile = $1 AND incarnation = (SELECT id FROM incarnation) AND ` + readySince + `
			AND EXISTS (SELECT FROM tenants WHERE ` + waits + ` AND profile = $1 AND ` + waitingSince + `)`

// waits says of a tenant that it waits for an app, and not in the background; imports, that it waits in the
// background.
const (
	waits   = `state = 'provisioning' AND NOT background`
	imports = `state = 'provisioning' AND background`
)

// claimAndWakeSQL claims and wakes the requests that wait for the tenant, on
// every replica.
const claimAndWakeSQL = claimSQL + ` SELECT pg_notify('` + tenantChannel + `', id) FROM activated`

// signUpFromPoolSQL makes tenants of one profile that are new, gives each a ready app
// and reveals its key, and passes over those for whom there is no app: all of them
// while a tenant waits, who comes first. It does not notify. The apps are
// those that waited longest, of the revision that the pool is kept of. $1 is the
// profile; of each tenant, $2 to $7 are the id, the display name, the labels, the hash
// of the attributes, the actor and the request id.
//
// A tenant that another transaction is making is waited for, in the order of the ids, so
// that no two wait for each other.
const signUpFromPoolSQL = `
	WITH ` + handOut + `, asked AS MATERIALIZED (
		SELECT n.*, row_number() OVER (ORDER BY id) AS place
		FROM unnest($2::text[], $3::text[], $4::text[], $5::bytea[], $6::text[], $7::text[])
			AS n (id, display_name, labels, attributes_hash, actor, request_id)
		WHERE NOT EXISTS (SELECT FROM tenants t WHERE t.id = n.id)
	), picked AS MATERIALIZED (
		SELECT id FROM apps
		WHERE state = 'ready' AND profile = $1 AND incarnation = (SELECT id FROM incarnation)
			AND ` + readySince + ` AND profile_revision = (SELECT revision FROM pools WHERE profile = $1)
			AND NOT EXISTS (SELECT FROM tenants WHERE ` + waits + ` AND profile = $1 AND ` + waitingSince + `)
		ORDER BY ready_at, id LIMIT (SELECT count(*) FROM asked) FOR UPDATE SKIP LOCKED
	), app AS (
		SELECT id, row_number() OVER () AS place FROM picked
	), made AS (
		INSERT INTO tenants (id, profile, state, app_id, display_name, labels, attributes_hash)
		SELECT asked.id, $1, 'active', app.id, display_name, labels::jsonb, attributes_hash FROM asked JOIN app USING (place)
		ORDER BY asked.id COLLATE "C"
		ON CONFLICT (id) DO NOTHING
		RETURNING id, app_id, generation, version, created_at
	), given AS (
		UPDATE apps a
		SET state = 'held', tenant_id = m.id, tenant_generation = m.generation, pending = true, next_attempt_at = now(),
			updated_at = now()
		FROM made m WHERE a.id = m.app_id
	), revealed AS (
		SELECT m.id AS tenant_id, k.* FROM made m JOIN keys k ON k.app_id = m.app_id
		WHERE k.name = '` + tenant.DefaultKey + `' AND k.state = 'active'
	), audited AS (
		INSERT INTO audit_events (actor, request_id, action, tenant_id, app_id, key_id, detail)
		SELECT actor, nullif(asked.request_id, ''), 'tenant.created', m.id, m.app_id, NULL::uuid,
			jsonb_build_object('generation', generation, 'profile', $1::text, 'state', 'active')
		FROM made m JOIN asked USING (id)
		UNION ALL
		SELECT actor, nullif(asked.request_id, ''), 'key.revealed', r.tenant_id, r.app_id, r.id, jsonb_build_object('name', name)
		FROM revealed r JOIN asked ON asked.id = r.tenant_id
	)
	SELECT m.id, m.app_id, m.generation, m.version, m.created_at, ` + activeKeyColumns + `, k.ciphertext
	FROM made m JOIN revealed k ON k.tenant_id = m.id`

// readySince and waitingSince say of apps that are ready, or of tenants that wait, that
// they have been so since there was one of their profile at all. It leaves nothing out:
// older entries of the indexes are of apps and tenants that are so no longer, and without
// the bound each claim walks over all of them that the last vacuum has left.
const (
	readySince   = `ready_at >= coalesce((SELECT ready_from FROM pools WHERE profile = $1), '-infinity')`
	waitingSince = `state_since >= coalesce((SELECT waiting_from FROM pools WHERE profile = $1), '-infinity')`

	importingSince = `state_since >= coalesce((SELECT importing_from FROM pools WHERE profile = $1), '-infinity')` // in the background

	// Not by EXISTS: after an import the planner would still read the table for one that waits.
	oldestImport = `(SELECT min(state_since) FROM tenants WHERE ` + imports + ` AND profile = $1 AND ` + importingSince + `)`
)

// A signUp is a sign-up that may find a ready app.
type signUp struct {
	n     tenant.NewTenant
	actor tenant.Actor
}

// signUpFromPool runs sign-ups of one profile. It answers nil for those that it passed
// over: the tenant is there, or there is no app for it.
func (db *DB) signUpFromPool(ctx context.Context, ups []signUp) ([]*tenant.SignedUp, error) {
	var ids, names, labels, actors, requests []string
	var hashes [][]byte
	place := map[tenant.ID]int{}
	for i, up := range ups {
		if _, twice := place[up.n.ID]; twice {
			continue // it finds the tenant there
		}
		place[up.n.ID] = i
		text, err := json.Marshal(up.n.Attributes.Labels)
		if err != nil {
			return nil, err
		}
		ids, names, labels = append(ids, string(up.n.ID)), append(names, up.n.Attributes.DisplayName), append(labels, string(text))
		hashes, actors, requests = append(hashes, up.n.Attributes.Hash()), append(actors, up.actor.Name), append(requests, up.actor.RequestID)
	}
	rows, _ := db.pool.Query(ctx, signUpFromPoolSQL, ups[0].n.Profile.Name, ids, names, labels, hashes, actors, requests)
	signedUp := make([]*tenant.SignedUp, len(ups))
	t, r := tenant.Tenant{State: tenant.Active}, tenant.RevealedKey{}
	keyInto, keyDone := keyFields(&r.Key)
	into := append([]any{&t.ID, &t.AppID, &t.Generation, &t.Version, &t.CreatedAt}, append(keyInto, &r.Ciphertext)...)
	_, err := pgx.ForEachRow(rows, into, func() error {
		keyDone()
		up, t, r := ups[place[t.ID]].n, t, r
		t.Profile, t.DisplayName, t.Labels, t.UpdatedAt = up.Profile.Name, up.Attributes.DisplayName, up.Attributes.Labels, t.CreatedAt
		signedUp[place[t.ID]] = &tenant.SignedUp{Tenant: t, Created: true, FirstHash: up.Attributes.Hash(), Revealed: &r}
		return nil
	})
	for i, up := range ups { // also after a failure: what has become of the commit is not known
		var app tenant.AppID
		if s := signedUp[i]; s != nil {
			app = s.Tenant.AppID
		}
		db.changed(up.n.ID, app)
	}
	return signedUp, translate("sign up", err)
}

// SignUp makes a tenant, gives it a ready app if there is one and reveals its key: one
// round trip and one statement, which sign-ups that come at the same time share, and
// which does not notify. If there is none it begins a build. A tenant
// that is there already is returned as it stands; with n.Again one that is deleted, or
// being deleted, begins its next generation.
func (db *DB) SignUp(ctx context.Context, n tenant.NewTenant, actor tenant.Actor) (tenant.SignedUp, error) {
	if _, most := n.Profile.PoolBounds(); most > 0 && !n.Again {
		found, ok := db.signUps.Load(n.Profile.Name)
		if !ok {
			found, _ = db.signUps.LoadOrStore(n.Profile.Name, &shared[signUp, *tenant.SignedUp]{run: db.signUpFromPool})
		}
		s, err := found.(*shared[signUp, *tenant.SignedUp]).do(ctx, signUp{n, actor})
		switch {
		case err != nil:
			return tenant.SignedUp{}, translate("sign up", err)
		case s != nil:
			return *s, nil
		}
	}
	return db.signUpAlone(ctx, n, actor)
}

// signUpAlone is the sign-up of a tenant that is there, or for which no app was ready.
// What has changed since is seen: it is one transaction of its own.
func (db *DB) signUpAlone(ctx context.Context, n tenant.NewTenant, actor tenant.Actor) (tenant.SignedUp, error) {
	// A new incarnation may begin meanwhile, but not each time.
	for tries := 3; ; tries-- {
		s, current, err := db.trySignUpAlone(ctx, n, actor)
		if err != nil || current {
			return s, err
		}
		if err := db.ensureIncarnation(ctx); err != nil {
			return s, err
		}
		if tries == 0 {
			return s, &tenant.Error{Kind: tenant.Unavailable, Code: "database_unavailable", RetryAfter: 2 * time.Second,
				Detail: "the database is being replaced repeatedly; try again"}
		}
	}
}

// trySignUpAlone is one attempt of signUpAlone. It reports false if the incarnation of the database was
// not current, or stopped: then the attempt can be repeated.
func (db *DB) trySignUpAlone(ctx context.Context, n tenant.NewTenant, actor tenant.Actor) (s tenant.SignedUp, current bool, err error) {
	batch := &pgx.Batch{}
	args := []any{n.ID, n.Profile.Name, n.Attributes.DisplayName, n.Attributes.Labels, n.Attributes.Hash(), actor.Name, actor.RequestID}
	made := `
			INSERT INTO tenants (id, profile, display_name, labels, attributes_hash)
			SELECT $1, $2, $3, $4, $5 WHERE ` + currentIncarnation + ` IS NOT NULL
			ON CONFLICT (id) DO NOTHING`
	if n.Again {
		// Not ON CONFLICT DO UPDATE: that would lock the row of each tenant that is there.
		made = `
			UPDATE tenants
			SET generation = generation + 1, profile = $2, display_name = $3, labels = $4, attributes_hash = $5, state = 'provisioning',
				state_since = now(), app_id = NULL, app_user_id = NULL, problem = NULL, deletion_protection = false, background = false,
				version = version + 1, updated_at = now()
			WHERE id = $1 AND state IN ('deleting', 'purging', 'deleted') AND labels @> $8 AND ` + currentIncarnation + ` IS NOT NULL`
		args = append(args, scopeSQL(actor))
	}
	batch.Queue(`
		WITH made AS (`+made+`
			RETURNING id, generation)
		INSERT INTO audit_events (actor, request_id, action, tenant_id, detail)
		SELECT $6, nullif($7, ''), 'tenant.created', id, jsonb_build_object('generation', generation, 'profile', $2::text)
		FROM made`, args...,
	).Exec(func(tag pgconn.CommandTag) error { s.Created = tag.RowsAffected() == 1; return nil })
	batch.Queue(claimSQL+` SELECT FROM activated`, n.Profile.Name, actor.Name, actor.RequestID, actor.UpstreamRequestID)
	var background bool
	batch.Queue(`SELECT `+tenantColumns+`, t.attributes_hash, t.background, `+currentIncarnation+` IS NOT NULL FROM tenants t WHERE t.id = $1`, n.ID).
		QueryRow(func(row pgx.Row) error {
			fields, done := tenantFields(&s.Tenant)
			defer done()
			err := row.Scan(append(fields, &s.FirstHash, &background, &current)...)
			if errors.Is(err, pgx.ErrNoRows) { // it was not inserted
				return nil
			}
			return err
		})
	// Without BEGIN, the statements of a batch are one transaction.
	if err := db.pool.SendBatch(ctx, batch).Close(); err != nil || !current {
		return s, current, translate("sign up", err)
	}
	db.changed(s.Tenant.ID, s.Tenant.AppID)
	if background && s.Tenant.State == tenant.Provisioning && s.Tenant.Profile == n.Profile.Name {
		s.Tenant, err = db.hurry(ctx, n, actor)
		return s, true, err
	}
	if s.Created && s.Tenant.State == tenant.Provisioning {
		db.startBuildsAfter(ctx, nextBuild(n))
	}
	return s, true, nil
}

// nextBuild is the build that a sign-up may need. The decision about it comes after the commit, so that
// sign-ups without an app do not hold up each other.
func nextBuild(n tenant.NewTenant) tenant.NextBuilds {
	return tenant.NextBuilds{Profile: n.Profile, IDs: []tenant.AppID{n.BuildID}, Limits: n.Limits}
}

// Retry makes due now what a tenant waits for and whose next try is due later, and
// what a pause of all upstream work has held up with it: one call tries whether it
// can go on. It reports tenant.NotFound for an id that never signed up.
func (db *DB) Retry(ctx context.Context, id tenant.ID, actor tenant.Actor) (tenant.Tenant, error) {
	var t tenant.Tenant
	err := db.inTx(ctx, func(tx pgx.Tx) error {
		rows, _ := tx.Query(ctx, `SELECT `+tenantColumns+` FROM tenants t WHERE t.id = $1 FOR UPDATE OF t`, id)
		var err error
		if t, err = oneTenant(rows); err != nil {
			return err
		}
		if !actor.Within.Covers(t.Labels) {
			return tenant.ErrOutside
		}
		batch := &pgx.Batch{}
		batch.Queue(`
			UPDATE apps SET next_attempt_at = now()
			WHERE id IN (SELECT id FROM apps
				WHERE next_attempt_at > now() AND (tenant_id = $1 OR state = 'building' AND profile = $2 AND $3)
				FOR UPDATE SKIP LOCKED)`, id, t.Profile, t.State == tenant.Provisioning)
		batch.Queue(`
			UPDATE keys SET next_attempt_at = now()
			WHERE id IN (SELECT k.id FROM keys k JOIN apps a ON a.id = k.app_id
				WHERE a.tenant_id = $1 AND k.state IN ('creating', 'revoking') AND k.next_attempt_at > now()
				FOR UPDATE OF k SKIP LOCKED)`, id)
		batch.Queue(`UPDATE upstream_budget SET paused_until = clock_timestamp() WHERE paused_until > clock_timestamp()`)
		batch.Queue(`UPDATE refused_pats SET next_check_at = now() WHERE next_check_at > now()`)
		batch.Queue(`
			INSERT INTO audit_events (actor, request_id, action, tenant_id, app_id)
			VALUES ($1, nullif($2, ''), 'tenant.retried', $3, nullif($4, ''))`, actor.Name, actor.RequestID, id, t.AppID)
		return tx.SendBatch(ctx, batch).Close()
	})
	db.wakeWorkers(tenant.AppWork, tenant.KeyWork)
	return t, translate("retry", err)
}

// Claim gives ready apps of a profile to waiting tenants, until either runs
// out, and wakes who waits for them. It returns how many it gave.
func (db *DB) Claim(ctx context.Context, profile string, actor tenant.Actor) (int, error) {
	for given := 0; ; given++ {
		tag, err := db.pool.Exec(ctx, claimAndWakeSQL, profile, actor.Name, actor.RequestID, actor.UpstreamRequestID)
		if err != nil {
			return given, translate("claim", err)
		}
		if tag.RowsAffected() == 0 {
			return given, nil
		}
		db.wakeFollowers()
	}
}
