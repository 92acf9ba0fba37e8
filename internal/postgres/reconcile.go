package postgres

import (
	"context"
	"crypto/rand"
	"errors"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/tenantry/tenantry/internal/tenant"
)

const reconciliationColumns = `r.id, r.kind, r.decisions, r.report_id, r.requested_by, r.state = 'done', r.phase, r.page, r.per_page,
	r.apps_seen, r.keys_seen, r.foreign_apps, coalesce(r.token, ''), r.attempts,
	coalesce(CASE WHEN r.state = 'running' THEN coalesce(` + upstreamHalted + `) END, r.problem), r.created_at, r.finished_at, r.leased_until`

func scanReconciliation(row pgx.CollectableRow) (tenant.Reconciliation, error) {
	var r tenant.Reconciliation
	var report *uuid.UUID
	var finished *time.Time
	var leased any // may be -infinity
	err := row.Scan(&r.ID, &r.Kind, &r.Decisions, &report, &r.RequestedBy, &r.Done, &r.Phase, &r.Page, &r.PerPage,
		&r.AppsSeen, &r.KeysSeen, &r.ForeignApps, &r.Token, &r.Attempts, &r.Problem, &r.CreatedAt, &finished, &leased)
	if report != nil {
		r.ReportID = *report
	}
	r.FinishedAt = orZero(finished)
	r.LeasedUntil, _ = leased.(time.Time)
	return r, err
}

func (db *DB) oneReconciliation(ctx context.Context, act, sql string, args ...any) (tenant.Reconciliation, error) {
	rows, _ := db.pool.Query(ctx, sql, args...)
	r, err := pgx.CollectExactlyOneRow(rows, scanReconciliation)
	if errors.Is(err, pgx.ErrNoRows) {
		return r, errNotFound("reconciliation")
	}
	return r, translate(act, err)
}

// tokenLife is how long a report may be acted upon: what it found is looked at
// anew in any case.
const tokenLife = 24 * time.Hour

// StartReport begins a report. It reports tenant.Conflict while a reconciliation
// runs.
func (db *DB) StartReport(ctx context.Context, id uuid.UUID, actor tenant.Actor) (tenant.Reconciliation, error) {
	return db.startReconciliation(ctx, actor, `
		INSERT INTO reconciliations AS r (id, kind, phase, requested_by) VALUES ($1, 'report', 'apps', $2)`,
		id, actor.Name)
}

// StartRepair begins to carry out the report that a token names. It reports
// tenant.Conflict, and changes nothing, if the token is no report's, if something
// was reconciled since or the report is old, and while a reconciliation runs.
func (db *DB) StartRepair(ctx context.Context, id uuid.UUID, token string, actor tenant.Actor) (tenant.Reconciliation, error) {
	if err := db.ensureIncarnation(ctx); err != nil {
		return tenant.Reconciliation{}, err
	}
	recovery, err := db.Recovery(ctx)
	if err != nil {
		return tenant.Reconciliation{}, err
	}
	if recovery.Active() {
		return tenant.Reconciliation{}, tenant.Errorf(tenant.Conflict, "recovery",
			"no repairs in recovery mode; `tenantry recover show` lists the findings that wait for a decision")
	}
	r, err := db.startReconciliation(ctx, actor, `
		INSERT INTO reconciliations AS r (id, kind, phase, report_id, requested_by)
		SELECT $1, 'repair', 'repair', p.id, $2 FROM reconciliations p
		WHERE p.token = $3 AND p.finished_at > now() - $4::interval
			AND NOT EXISTS (SELECT FROM reconciliations later WHERE later.created_at > p.created_at)`,
		id, actor.Name, token, tokenLife)
	if !errors.Is(err, tenant.NotFound) {
		return r, err
	}
	var known bool
	if err := db.pool.QueryRow(ctx, `SELECT EXISTS (SELECT FROM reconciliations WHERE token = $1)`, token).Scan(&known); err != nil {
		return r, translate("look for report", err)
	}
	if known {
		return r, tenant.Errorf(tenant.Conflict, "reconciliation_token_stale",
			"the report is older than %s, or something was reconciled since: make a new report and use its token", tokenLife)
	}
	return r, tenant.Errorf(tenant.Conflict, "reconciliation_token_unknown", "there is no report of this token")
}

func (db *DB) startReconciliation(ctx context.Context, actor tenant.Actor, insert string, args ...any) (tenant.Reconciliation, error) {
	args = append(args, actor.RequestID)
	var r tenant.Reconciliation
	err := db.inTx(ctx, func(tx pgx.Tx) error {
		rows, _ := tx.Query(ctx, insert+` RETURNING `+reconciliationColumns, args[:len(args)-1]...)
		var err error
		if r, err = pgx.CollectExactlyOneRow(rows, scanReconciliation); err != nil {
			return err
		}
		_, err = tx.Exec(ctx, `
			INSERT INTO audit_events (actor, request_id, action, detail)
			VALUES ($1, nullif($2, ''), 'reconciliation.started', jsonb_build_object('id', $3::uuid, 'kind', $4::text, 'decisions', $5::bool))`,
			actor.Name, actor.RequestID, r.ID, r.Kind, r.Decisions)
		return err
	})
	if pg, ok := errors.AsType[*pgconn.PgError](err); ok && pg.ConstraintName == "reconciliations_one_running" {
		var running uuid.UUID
		if err := db.pool.QueryRow(ctx, `SELECT id FROM reconciliations WHERE state = 'running'`).Scan(&running); err != nil {
			running = uuid.Nil // it has just ended
		}
		return r, tenant.Errorf(tenant.Conflict, "reconciliation_running", "the reconciliation %s runs; there is one at a time", running)
	}
	if errors.Is(err, pgx.ErrNoRows) {
		return r, errNotFound("reconciliation")
	}
	if err != nil {
		return r, translate("start reconciliation", err)
	}
	db.wakeWorkers(tenant.ReconciliationWork)
	return r, nil
}

// StartDueReport begins a report if the last report is older than every. While the database is
// recovering, it also begins one if there was none since the loss, or if no finding of the last one
// waits for a decision. It reports whether it began one.
func (db *DB) StartDueReport(ctx context.Context, id uuid.UUID, every time.Duration, actor tenant.Actor) (bool, error) {
	var due bool
	if err := db.pool.QueryRow(ctx, `
		SELECT coalesce(
			NOT EXISTS (SELECT FROM reconciliations WHERE state = 'running')
			AND coalesce(c.recovery, '') NOT IN ('watching', 'stopped')
			AND (greatest(d.created_at, last.created_at) < now() - $1::interval
				OR c.recovery = 'recovering' AND (last.created_at IS NULL OR last.created_at < c.recovery_since
					OR last.state = 'done' AND NOT EXISTS (
						SELECT FROM reconciliation_items WHERE reconciliation_id = last.id AND (action = 'decide' AND state = 'open' OR state = 'decided')))), false)
		FROM (SELECT recovery, recovery_since FROM current_incarnation LIMIT 1) c, (SELECT created_at FROM deployment LIMIT 1) d LEFT JOIN LATERAL (
			SELECT id, created_at, state FROM reconciliations WHERE kind = 'report' ORDER BY created_at DESC LIMIT 1) last ON true`,
		every).Scan(&due); err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return false, translate("look for a due report", err)
	}
	if !due {
		return false, nil
	}
	_, err := db.StartReport(ctx, id, actor)
	if errors.Is(err, tenant.Conflict) { // another replica was first
		return false, nil
	}
	return err == nil, err
}

// Reconciliation reads a reconciliation. It reports tenant.NotFound if there is
// none of that id.
func (db *DB) Reconciliation(ctx context.Context, id uuid.UUID) (tenant.Reconciliation, error) {
	return db.oneReconciliation(ctx, "read reconciliation", `SELECT `+reconciliationColumns+` FROM reconciliations r WHERE id = $1`, id)
}

// Reconciliations lists up to limit reconciliations, newest first.
func (db *DB) Reconciliations(ctx context.Context, limit int) ([]tenant.Reconciliation, error) {
	rows, _ := db.pool.Query(ctx, `SELECT `+reconciliationColumns+` FROM reconciliations r ORDER BY created_at DESC LIMIT $1`, limit)
	found, err := pgx.CollectRows(rows, scanReconciliation)
	return found, translate("list reconciliations", err)
}

// LastReport reads the newest report that is done. It reports tenant.NotFound if
// there is none.
func (db *DB) LastReport(ctx context.Context) (tenant.Reconciliation, error) {
	return db.oneReconciliation(ctx, "read last report", `
		SELECT `+reconciliationColumns+` FROM reconciliations r WHERE kind = 'report' AND state = 'done'
		ORDER BY created_at DESC LIMIT 1`)
}

// findingsOf selects the findings of a report.
const findingsOf = `reconciliation_id = $1 AND state <> 'doubted'`

// reportOf returns the report whose findings a reconciliation makes or works on.
func reportOf(r tenant.Reconciliation) uuid.UUID {
	if r.Kind == tenant.Repair {
		return r.ReportID
	}
	return r.ID
}

// Findings lists up to limit findings after a number. Those of a repair are its
// report's.
func (db *DB) Findings(ctx context.Context, r tenant.Reconciliation, after int64, limit int) ([]tenant.Finding, error) {
	rows, _ := db.pool.Query(ctx, `SELECT `+findingColumns+` FROM reconciliation_items
		WHERE `+findingsOf+` AND number > $2 ORDER BY number LIMIT $3`, reportOf(r), after, limit)
	found, err := pgx.CollectRows(rows, scanFinding)
	return found, translate("list findings", err)
}

const findingColumns = `number, kind, action, coalesce(app_id, ''), key_id, coalesce(tenant_id, ''), detail, state, note`

func scanFinding(row pgx.CollectableRow) (tenant.Finding, error) {
	var f tenant.Finding
	var key *uuid.UUID
	err := row.Scan(&f.Number, &f.Kind, &f.Action, &f.AppID, &key, &f.TenantID, &f.Detail, &f.State, &f.Note)
	if key != nil {
		f.KeyID = *key
	}
	return f, err
}

// CountFindings counts findings by kind and by state.
func (db *DB) CountFindings(ctx context.Context, r tenant.Reconciliation) (map[tenant.FindingKind]int, map[tenant.FindingState]int, error) {
	kinds, states := map[tenant.FindingKind]int{}, map[tenant.FindingState]int{}
	err := db.countFindings(ctx, r, findingsOf, func(kind tenant.FindingKind, state tenant.FindingState, n int) {
		kinds[kind] += n
		states[state] += n
	})
	return kinds, states, err
}

// CountOpenFindings counts the findings that no repair has ended, by kind.
func (db *DB) CountOpenFindings(ctx context.Context, r tenant.Reconciliation) (map[tenant.FindingKind]int, error) {
	kinds := map[tenant.FindingKind]int{}
	err := db.countFindings(ctx, r, `reconciliation_id = $1 AND state IN ('open', 'failed')`, func(kind tenant.FindingKind, _ tenant.FindingState, n int) {
		kinds[kind] += n
	})
	return kinds, err
}

func (db *DB) countFindings(ctx context.Context, r tenant.Reconciliation, where string, add func(tenant.FindingKind, tenant.FindingState, int)) error {
	rows, _ := db.pool.Query(ctx, `SELECT kind, state, count(*) FROM reconciliation_items WHERE `+where+` GROUP BY kind, state`, reportOf(r))
	var kind tenant.FindingKind
	var state tenant.FindingState
	var n int
	_, err := pgx.ForEachRow(rows, []any{&kind, &state, &n}, func() error { add(kind, state, n); return nil })
	return translate("count findings", err)
}

// dueReconciliation selects the reconciliations that there is work on.
const dueReconciliation = `state = 'running' AND leased_until < now() AND next_attempt_at <= now() AND NOT ` + workPaused

// LeaseReconciliations leases those of the reconciliations that there is work on, for at most lease.
func (db *DB) LeaseReconciliations(ctx context.Context, ids []uuid.UUID, lease time.Duration) ([]tenant.Reconciliation, error) {
	rows, _ := db.pool.Query(ctx, `
		UPDATE reconciliations r SET leased_until = now() + $2, leased_by = $3
		WHERE id = ANY (ARRAY(SELECT id FROM reconciliations WHERE id = ANY ($1) AND `+dueReconciliation+` FOR UPDATE SKIP LOCKED))
		RETURNING `+reconciliationColumns, ids, lease, db.replica)
	leased, err := pgx.CollectRows(rows, scanReconciliation)
	return leased, translate("lease reconciliations", err)
}

// underLease runs act in a transaction that holds the leased reconciliation.
func (db *DB) underLease(ctx context.Context, what string, r tenant.Reconciliation, act func(pgx.Tx) error) error {
	return translate(what, db.inTx(ctx, func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, `
			UPDATE reconciliations SET attempts = 0, problem = NULL WHERE id = $1 AND leased_until = $2 AND state = 'running'`,
			r.ID, r.LeasedUntil)
		if err != nil {
			return err
		}
		if tag.RowsAffected() != 1 {
			return tenant.ErrLeaseLost
		}
		return act(tx)
	}))
}

// SawApps saves a page of the list of apps, compares it with the rows and moves on to the next
// page, or after the last page to the keys. The newest apps come first, and their findings show
// before the report is done.
func (db *DB) SawApps(ctx context.Context, r tenant.Reconciliation, apps []tenant.ListedApp, last bool) error {
	return db.underLease(ctx, "keep list of apps", r, func(tx pgx.Tx) error {
		batch := &pgx.Batch{}
		ids := make([]tenant.AppID, len(apps))
		for i, a := range apps {
			ids[i] = a.ID
			batch.Queue(`
				INSERT INTO reconciliation_apps (reconciliation_id, app_id, marker_app, tenant_id, tenant_generation)
				VALUES ($1, $2, $3, nullif($4, ''), nullif($5, 0)) ON CONFLICT DO NOTHING`,
				r.ID, a.ID, a.Marker, a.Owner.Tenant, a.Owner.Generation)
			if a.Inputs != nil {
				batch.Queue(`UPDATE apps SET inputs = $2 WHERE id = $1 AND state = 'retired' AND inputs IS DISTINCT FROM $2`, a.ID, *a.Inputs)
			}
		}
		// A tag is written after the hand-out: the rows have lost the hand-out.
		batch.Queue(`
			WITH retired AS (
				UPDATE apps a SET state = 'retired', made_at = coalesce(made_at, now()), attempts = 0, problem = NULL, in_doubt_since = NULL,
					leased_until = '-infinity', updated_at = now()
				FROM reconciliation_apps s
				WHERE s.reconciliation_id = $1 AND s.app_id = ANY ($2) AND s.marker_app = s.app_id AND s.tenant_id IS NOT NULL
					AND a.id = s.app_id AND a.state IN ('ready', 'building')
				RETURNING a.id)
			INSERT INTO audit_events (actor, action, app_id, detail)
			SELECT $3, 'app.retired', id, '{"reason": "its ownership tag names a tenant"}' FROM retired`, r.ID, ids, r.RequestedBy)
		batch.Queue(listedAppsSQL, r.ID, r.CreatedAt, ids)
		// By R4 an app of ours has a row: if it has none, the row was lost. An app without a tenant in
		// its tag may belong to any tenant, and is kept.
		batch.Queue(`
			INSERT INTO apps (id, profile, profile_revision, state, made_at)
			SELECT s.app_id, $3, 'adopted', 'retired', now() FROM reconciliation_apps s
			WHERE s.reconciliation_id = $1 AND s.app_id = ANY ($2) AND s.marker_app = s.app_id AND s.tenant_id IS NULL
			ON CONFLICT (id) DO NOTHING`, r.ID, ids, tenant.DefaultProfile)
		batch.Queue(`
			UPDATE reconciliations
			SET apps_seen = apps_seen + $2, page = CASE WHEN $3 THEN 1 ELSE page + 1 END,
				phase = CASE WHEN $3 THEN 'keys' ELSE phase END
			WHERE id = $1`, r.ID, len(apps), last)
		return tx.SendBatch(ctx, batch).Close()
	})
}

// listedAppsSQL finds the differences of the listed apps $3. $1 is the reconciliation, $2 its
// start time.
const listedAppsSQL = `
	INSERT INTO reconciliation_items (reconciliation_id, kind, action, app_id, tenant_id, detail, state)
	SELECT $1,
		CASE
			WHEN s.marker_app <> s.app_id THEN 'app_renamed'
			WHEN a.id IS NULL THEN 'app_unknown'
			WHEN a.state = 'deleted' THEN 'app_alive'
			WHEN a.tenant_id IS NULL THEN 'app_forgotten'
			ELSE 'app_differs' END,
		CASE
			WHEN s.marker_app <> s.app_id THEN ''
			WHEN a.state = 'deleted' THEN 'remove'
			ELSE 'decide' END,
		s.app_id, coalesce(a.tenant_id, s.tenant_id),
		CASE
			WHEN s.marker_app <> s.app_id THEN 'it was made as ' || s.marker_app || ': give it that id again in Clarifai'
			WHEN a.tenant_id IS NOT NULL AND a.state <> 'deleted' THEN 'its ownership tag names another tenant or generation'
			ELSE '' END,
		CASE WHEN a.state = 'deleted' AND s.marker_app = s.app_id THEN 'doubted' ELSE 'open' END
	FROM reconciliation_apps s LEFT JOIN apps a ON a.id = s.app_id
	WHERE s.reconciliation_id = $1 AND s.app_id = ANY ($3) AND s.marker_app <> '' AND (
		s.marker_app <> s.app_id
		OR a.id IS NULL AND s.tenant_id IS NOT NULL
		OR a.state = 'deleted' AND a.updated_at < $2
		OR s.tenant_id IS NOT NULL AND (a.tenant_id, a.tenant_generation) IS DISTINCT FROM (s.tenant_id, s.tenant_generation)
			AND a.state <> 'deleted')
		AND NOT EXISTS (SELECT FROM reconciliation_items i WHERE i.reconciliation_id = $1 AND i.app_id = s.app_id AND i.key_id IS NULL)`

// SawKeys keeps a page of the list of keys, as SawApps does.
func (db *DB) SawKeys(ctx context.Context, r tenant.Reconciliation, keys []tenant.ListedKey) error {
	return db.underLease(ctx, "keep list of keys", r, func(tx pgx.Tx) error {
		batch := &pgx.Batch{}
		for _, k := range keys {
			batch.Queue(`
				INSERT INTO reconciliation_keys (reconciliation_id, app_id, key_id, fingerprint, scopes)
				VALUES ($1, $2, nullif($3, '00000000-0000-0000-0000-000000000000'::uuid), $4, $5)`,
				r.ID, k.AppID, k.KeyID, k.Fingerprint, k.Scopes)
		}
		batch.Queue(`
			UPDATE reconciliations
			SET keys_seen = keys_seen + $2, page = CASE WHEN $2 = 0 THEN 1 ELSE page + 1 END,
				phase = CASE WHEN $2 = 0 THEN 'compare' ELSE phase END
			WHERE id = $1`, r.ID, len(keys))
		return tx.SendBatch(ctx, batch).Close()
	})
}

// longDoubt is how long a call's outcome may be unknown before a report names it.
const longDoubt = 10 * time.Minute

// compareWindow is how many apps are compared at once, as they are listed and as the
// rows have them: a comparison of millions must neither outlast its lease nor hold a
// snapshot for long. dropAtOnce is how many entries of the lists are dropped then.
const (
	compareWindow = 5_000
	dropAtOnce    = 50_000
)

// pastApps is past every app's id.
const pastApps = tenant.AppID("\U0010FFFF")

// compareSQL finds the differences among apps after $3 and up to $4. $1 is the
// reconciliation, $2 when it began: rows that changed since are passed over, for the
// listing may be older.
var compareSQL = []string{
	// Apps that are not listed, or not as ours. Those of other accounts are never listed, and
	// one that was made by hand gets its marker once it is held, or when it is removed.
	`SELECT CASE WHEN s.app_id IS NULL THEN 'app_gone' ELSE 'app_unmarked' END,
		CASE WHEN s.app_id IS NOT NULL THEN CASE WHEN a.state = 'held' THEN 'mark' ELSE '' END
			WHEN a.state = 'held' THEN CASE WHEN a.incarnation = ` + currentIncarnation + ` THEN 'rebuild' ELSE 'decide' END
			WHEN a.state IN ('ready', 'retired') THEN 'forget' ELSE '' END,
		a.id, NULL::uuid, a.tenant_id, '', CASE WHEN s.app_id IS NULL THEN 'doubted' ELSE 'open' END
	FROM apps a LEFT JOIN reconciliation_apps s ON s.reconciliation_id = $1 AND s.app_id = a.id AND s.app_id > $3 AND s.app_id <= $4
	WHERE a.id > $3 AND a.id <= $4 AND a.state IN ('ready', 'held', 'retained', 'retired') AND coalesce(a.ready_at, a.made_at) < $2 AND (s.app_id IS NULL OR s.marker_app = '')
		AND a.user_id IS NULL AND NOT (s.app_id IS NOT NULL AND a.marked_at IS NULL AND a.profile_revision = 'adopted')
		AND NOT EXISTS (SELECT FROM reconciliation_apps moved WHERE moved.reconciliation_id = $1 AND moved.marker_app = a.id
			AND moved.marker_app <> '' AND moved.marker_app <> moved.app_id)`,
	// Keys that are listed.
	`SELECT
		CASE WHEN s.key_id IS NULL THEN 'key_unmanaged'
			WHEN k.id IS NULL AND t.state IN ('suspending', 'suspended', 'deleting', 'purging') THEN 'key_contested'
			WHEN k.id IS NULL THEN 'key_unknown'
			WHEN s.fingerprint IS NULL AND k.state = 'lost' THEN 'key_lost'
			ELSE 'key_alive' END,
		CASE WHEN s.key_id IS NULL THEN ''
			WHEN k.id IS NULL THEN 'decide'
			WHEN s.fingerprint IS NULL THEN ''
			ELSE 'revoke' END,
		s.app_id, s.key_id, a.tenant_id, '', 'open'
	FROM reconciliation_keys s
	JOIN apps a ON a.id = s.app_id AND a.state IN ('ready', 'held', 'retained', 'purging') AND a.user_id IS NULL
	LEFT JOIN tenants t ON t.app_id = a.id
	LEFT JOIN keys k ON k.id = s.key_id
	WHERE s.reconciliation_id = $1 AND s.app_id > $3 AND s.app_id <= $4
		AND (k.id IS NULL OR k.state IN ('revoked', 'lost') AND k.updated_at < $2)
		AND (s.key_id IS NOT NULL OR s.fingerprint IS NULL OR NOT EXISTS (SELECT FROM keys known WHERE known.fingerprint = s.fingerprint))`,
	// Keys that are not listed though their app is.
	`SELECT 'key_gone', CASE WHEN a.state = 'ready' THEN 'forget' WHEN a.state <> 'held' THEN ''
			WHEN a.incarnation = ` + currentIncarnation + ` THEN 'remake' ELSE 'decide' END,
		a.id, k.id, a.tenant_id, '', 'doubted'
	FROM keys k JOIN apps a ON a.id = k.app_id AND a.state IN ('ready', 'held', 'retained') AND a.user_id IS NULL
	JOIN reconciliation_apps s ON s.reconciliation_id = $1 AND s.app_id = a.id
	WHERE a.id > $3 AND a.id <= $4 AND k.state IN ('active', 'retiring') AND k.activated_at < $2
		AND NOT EXISTS (SELECT FROM reconciliation_keys l WHERE l.reconciliation_id = $1 AND (l.key_id = k.id OR l.fingerprint = k.fingerprint))`,
	// Keys that were requested before a loss, which may have been suspensions, too.
	`SELECT 'key_pending', 'decide', a.id, k.id, a.tenant_id, '', 'open'
	FROM keys k JOIN apps a ON a.id = k.app_id AND a.state = 'held' AND a.user_id IS NULL
	JOIN reconciliation_apps s ON s.reconciliation_id = $1 AND s.app_id = a.id
	WHERE a.id > $3 AND a.id <= $4 AND k.state = 'creating' AND ` + inRecovery + `
		AND a.incarnation <> ` + currentIncarnation + ` AND k.incarnation <> ` + currentIncarnation + `
		AND NOT EXISTS (SELECT FROM keys live JOIN reconciliation_keys l ON l.reconciliation_id = $1 AND (l.key_id = live.id OR l.fingerprint = live.fingerprint)
			WHERE live.app_id = a.id AND live.state IN ('active', 'retiring'))`,
	`SELECT 'key_drifted', 'rescope', a.id, k.id, a.tenant_id,
		'Clarifai has ' || array_to_string(s.scopes, ', ') || ', the row ' || array_to_string(k.scopes, ', '), 'open'
	FROM reconciliation_keys s JOIN keys k ON k.id = s.key_id JOIN apps a ON a.id = k.app_id
	WHERE s.reconciliation_id = $1 AND s.app_id > $3 AND s.app_id <= $4 AND k.state IN ('active', 'retiring') AND k.updated_at < $2
		AND (SELECT array_agg(DISTINCT replace(x, ':', '_') ORDER BY replace(x, ':', '_')) FROM unnest(s.scopes) x) IS DISTINCT FROM
			(SELECT array_agg(DISTINCT replace(x, ':', '_') ORDER BY replace(x, ':', '_')) FROM unnest(k.scopes) x)`,
}

// stateSQL finds what the rows themselves say is amiss, and reads no more of them than
// there is work on. $1 is the reconciliation, $2 how long a doubt may be.
var stateSQL = []string{
	`SELECT 'purge_contested', 'decide', id, NULL::uuid, tenant_id, problem->>'detail', 'open'
	FROM apps a WHERE state IN ('retained', 'purging') AND problem->>'code' = 'purge_contested'`,
	`SELECT 'in_doubt', '', a.id, NULL::uuid, a.tenant_id, 'since ' || a.in_doubt_since, 'open'
	FROM apps a WHERE a.state IN ('building', 'purging') AND a.in_doubt_since < now() - $2::interval`,
	`SELECT 'in_doubt', '', a.id, k.id, a.tenant_id, 'since ' || k.in_doubt_since, 'open'
	FROM keys k JOIN apps a ON a.id = k.app_id AND a.state <> 'retired'
	WHERE k.state IN ('creating', 'revoking') AND k.in_doubt_since < now() - $2::interval`,
}

// Compare writes down the differences between the lists and the rows, of some apps at a
// time: it is called until the phase is another. It also records which apps of the pool
// were seen with their keys.
func (db *DB) Compare(ctx context.Context, r tenant.Reconciliation) error {
	if err := db.knowLists(ctx, r); err != nil {
		return translate("look what was listed", err)
	}
	var from, to tenant.AppID
	if err := db.pool.QueryRow(ctx, `
		SELECT compared, least(
			coalesce((SELECT app_id FROM reconciliation_apps WHERE reconciliation_id = $1 AND app_id > compared ORDER BY app_id OFFSET $2 LIMIT 1), $3),
			coalesce((SELECT id FROM apps WHERE id > compared ORDER BY id OFFSET $2 LIMIT 1), $3))
		FROM reconciliations WHERE id = $1`, r.ID, compareWindow-1, pastApps).Scan(&from, &to); err != nil {
		return translate("look what to compare", err)
	}
	if from == "" {
		// Not in a transaction below, which take long: no sign-up could be given one of
		// these apps meanwhile.
		if _, err := db.pool.Exec(ctx, `
			UPDATE apps SET proven_at = greatest(proven_at, $2) WHERE state = 'ready' AND id IN (
				SELECT k.app_id FROM keys k
				JOIN apps a ON a.id = k.app_id AND a.state = 'ready'
				JOIN reconciliation_apps s ON s.reconciliation_id = $1 AND s.app_id = a.id AND s.marker_app = a.id
				WHERE k.state = 'active' AND k.name = $3 AND EXISTS (SELECT FROM reconciliation_keys l
					WHERE l.reconciliation_id = $1 AND (l.key_id = k.id OR l.fingerprint = k.fingerprint)))`,
			r.ID, r.CreatedAt, tenant.DefaultKey); err != nil {
			return translate("record apps of the pool as seen", err)
		}
	}
	return db.underLease(ctx, "compare", r, func(tx pgx.Tx) error {
		if from < pastApps {
			if err := compare(ctx, tx, r, from, to); err != nil {
				return err
			}
		}
		if to < pastApps {
			return nil
		}
		return dropLists(ctx, tx, r)
	})
}

// knowLists has Postgres look at the lists before they are compared: a moment ago they
// may have been empty, and are planned for as such.
func (db *DB) knowLists(ctx context.Context, r tenant.Reconciliation) error {
	var begins bool
	err := db.pool.QueryRow(ctx, `SELECT compared = '' FROM reconciliations WHERE id = $1`, r.ID).Scan(&begins)
	if err == nil && begins {
		_, err = db.pool.Exec(ctx, `ANALYZE reconciliation_apps, reconciliation_keys`)
	}
	return err
}

func compare(ctx context.Context, tx pgx.Tx, r tenant.Reconciliation, from, to tenant.AppID) error {
	// A parameter that a statement does not use must have a type all the same.
	find := func(given, sql string, args ...any) error {
		_, err := tx.Exec(ctx, `
			WITH given AS (`+given+`)
			INSERT INTO reconciliation_items (reconciliation_id, kind, action, app_id, key_id, tenant_id, detail, state)
			SELECT $1, found.* FROM (`+sql+`) AS found`, append([]any{planForValues, r.ID}, args...)...)
		return err
	}
	for _, sql := range compareSQL {
		if err := find(`SELECT $1::uuid, $2::timestamptz, $3::text, $4::text`, sql, r.CreatedAt, from, to); err != nil {
			return err
		}
	}
	if to == pastApps {
		for _, sql := range stateSQL {
			if err := find(`SELECT $1::uuid, $2::interval`, sql, longDoubt); err != nil {
				return err
			}
		}
	}
	_, err := tx.Exec(ctx, `
		UPDATE reconciliations SET compared = $3, foreign_apps = foreign_apps + (
			SELECT count(*) FROM reconciliation_apps s WHERE s.reconciliation_id = $1 AND s.app_id > $2 AND s.app_id <= $3
				AND s.marker_app = '' AND NOT EXISTS (SELECT FROM apps a WHERE a.id = s.app_id))
		WHERE id = $1`, planForValues, r.ID, from, to)
	return err
}

// dropLists drops a part of what was listed, and turns to the next phase with the last.
func dropLists(ctx context.Context, tx pgx.Tx, r tenant.Reconciliation) error {
	batch := &pgx.Batch{}
	for _, table := range []string{"reconciliation_keys", "reconciliation_apps"} {
		batch.Queue(`
			DELETE FROM `+table+` WHERE ctid = ANY (ARRAY(
				SELECT ctid FROM `+table+` WHERE reconciliation_id = $1 LIMIT $2))`, r.ID, dropAtOnce)
	}
	batch.Queue(`
		UPDATE reconciliations SET phase = 'confirm'
		WHERE id = $1 AND NOT EXISTS (SELECT FROM reconciliation_keys WHERE reconciliation_id = $1)
			AND NOT EXISTS (SELECT FROM reconciliation_apps WHERE reconciliation_id = $1)`, r.ID)
	return tx.SendBatch(ctx, batch).Close()
}

// NextFinding returns the next finding in a state; a repair's that has an action.
// It reports tenant.NotFound when there is none.
func (db *DB) NextFinding(ctx context.Context, r tenant.Reconciliation, state tenant.FindingState) (tenant.Finding, error) {
	rows, _ := db.pool.Query(ctx, `
		SELECT `+findingColumns+` FROM reconciliation_items
		WHERE reconciliation_id = $1 AND state = $2 AND (NOT $3 OR action <> '' AND action <> 'decide')
		ORDER BY number LIMIT 1`, reportOf(r), state, r.Kind == tenant.Repair)
	f, err := pgx.CollectExactlyOneRow(rows, scanFinding)
	if errors.Is(err, pgx.ErrNoRows) {
		return f, errNotFound("finding")
	}
	return f, translate("read finding", err)
}

// DropFinding takes back a finding that turned out to be none.
func (db *DB) DropFinding(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error {
	return db.underLease(ctx, "drop finding", r, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, `DELETE FROM reconciliation_items WHERE reconciliation_id = $1 AND number = $2`, r.ID, f.Number)
		return err
	})
}

// ConfirmFinding keeps a doubted finding, as what it turned out to be.
func (db *DB) ConfirmFinding(ctx context.Context, r tenant.Reconciliation, f tenant.Finding) error {
	return db.underLease(ctx, "confirm finding", r, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, `
			UPDATE reconciliation_items SET state = 'open', kind = $3, action = $4, detail = $5
			WHERE reconciliation_id = $1 AND number = $2`, r.ID, f.Number, f.Kind, f.Action, f.Detail)
		return err
	})
}

// TurnTo begins another phase of a leased reconciliation.
func (db *DB) TurnTo(ctx context.Context, r tenant.Reconciliation, phase tenant.ReconciliationPhase) error {
	return db.underLease(ctx, "begin phase", r, func(tx pgx.Tx) error {
		_, err := tx.Exec(ctx, `UPDATE reconciliations SET phase = $2 WHERE id = $1`, r.ID, phase)
		return err
	})
}

// SmallerPages sets a smaller page size for the rest of a list, since the current page of a leased
// reconciliation was too slow or too large. Each size divides the size before it, so that no entry
// is skipped. It reports false at the smallest size.
func (db *DB) SmallerPages(ctx context.Context, r tenant.Reconciliation) (bool, error) {
	sizes := []int{1000, 500, 250, 125, 25, 5, 1}
	i := slices.Index(sizes, r.PerPage)
	if i < 0 || i == len(sizes)-1 {
		return false, nil
	}
	tag, err := db.pool.Exec(ctx, `
		UPDATE reconciliations SET per_page = $3, page = (page - 1) * per_page / $3 + 1 WHERE id = $1 AND leased_until = $2 AND per_page = $4`,
		r.ID, r.LeasedUntil, sizes[i+1], r.PerPage)
	return true, oneRow("read smaller pages", tag, err)
}

// EndReconciliation ends a leased reconciliation. A report gets its token. If a report began in
// recovery mode and none of its findings waits for a decision, recovery mode ends. It returns
// the recovery mode before and after.
func (db *DB) EndReconciliation(ctx context.Context, r tenant.Reconciliation) (was, is tenant.Recovery, err error) {
	err = db.underLease(ctx, "end reconciliation", r, func(tx pgx.Tx) error {
		if was, err = scanRecovery(tx.QueryRow(ctx, `SELECT `+recoveryColumns+` FROM current_incarnation FOR UPDATE`)); err != nil {
			return err
		}
		is = was
		var token *string
		if r.Kind == tenant.Report {
			text := "rec_" + rand.Text()
			token = &text
			if _, err := tx.Exec(ctx, `
				UPDATE reconciliation_items i SET state = 'done', action = 'keep', note = 'kept before', ended_at = now()
				WHERE i.reconciliation_id = $1 AND i.action = 'decide' AND i.state = 'open' AND EXISTS (
					SELECT FROM reconciliation_items k WHERE k.app_id = i.app_id AND k.action = 'keep' AND k.decided_by IS NOT NULL
						AND k.kind = i.kind AND k.key_id IS NOT DISTINCT FROM i.key_id)`, r.ID); err != nil {
				return err
			}
			if was.State == tenant.Recovering && r.CreatedAt.After(was.Since) {
				var undecided bool
				if err := tx.QueryRow(ctx, `
					SELECT EXISTS (SELECT FROM reconciliation_items WHERE reconciliation_id = $1 AND action = 'decide' AND state = 'open')`, r.ID).
					Scan(&undecided); err != nil {
					return err
				}
				if !undecided {
					if is, err = moveRecovery(ctx, tx, was, tenant.NotRecovering, tenant.Actor{Name: "worker"},
						"a report found nothing that waits for a decision"); err != nil {
						return err
					}
				}
			}
		}
		_, err = tx.Exec(ctx, `
			UPDATE reconciliations SET state = 'done', phase = 'end', finished_at = now(), token = $2, leased_until = '-infinity' WHERE id = $1`,
			r.ID, token)
		return err
	})
	return was, is, err
}
