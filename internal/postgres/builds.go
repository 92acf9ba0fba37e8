package postgres

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/tenant"
)

// startBuildsSQL decides which builds of a profile begin: for waiting tenants, for the pool and for importing
// tenants. Nothing else begins builds. It runs in a transaction that has taken buildsLock in an earlier
// statement: its snapshot then has what the previous decision has begun. It counts no more rows than its
// limits need, in the order of an index: the planner does not know the limits, and would rather read a table.
//
// The builds of a profile never become more than its waiting and importing tenants and the target of the
// pool, less the ready apps. A waiting tenant gets a build of its own, since those for the pool and for
// imports take only calls that no other work wants. If more of these run than the pool and the imports need
// (an importing tenant has signed up; the target has fallen), they become builds for waiting tenants first.
//
// Apps of another revision than the pool's serve waiting tenants, and do not count for the pool. Without a
// pool they serve importing tenants, too. No build for the pool or an import begins while upstream work is
// halted, nor for a revision that the pool is not kept of.
//
// $1 is the profile, $2 the ids, $3 the revision, $4 the revision that a pool is kept of, and $5 to $8 the
// limits: for waiting tenants, for the pool, for imports, and for imports that share calls. It returns the
// builds that have begun, or that tenants wait for now.
const startBuildsSQL = `
	WITH running AS MATERIALIZED (
		SELECT count(*) FILTER (WHERE NOT for_pool) AS urgent, count(*) FILTER (WHERE for_pool) AS idle
		FROM apps WHERE ` + buildsOfProfile + `
	), demand AS MATERIALIZED (
		SELECT urgent, idle,
			(SELECT count(*) FROM (SELECT FROM tenants WHERE ` + waits + ` AND profile = $1 AND ` + waitingSince + ` ORDER BY state_since LIMIT $5) few) AS waiting,
			(SELECT count(*) FROM (SELECT FROM tenants WHERE ` + imports + ` AND profile = $1 AND ` + importingSince + ` ORDER BY state_since LIMIT greatest($8, idle)) few) AS importing,
			CASE WHEN $4 = '' THEN 0 ELSE coalesce((SELECT target FROM pools WHERE profile = $1), 0) END AS target,
			coalesce(` + upstreamHalted + `) IS NULL
				AND ($4 = '' OR EXISTS (SELECT FROM pools WHERE profile = $1 AND revision = $4 AND planned_at >= ` + incarnationBegan + `)) AS fills
		FROM running
	), wanted AS MATERIALIZED (
		SELECT d.*, least(w.n, greatest(0, idle - target - importing)) AS moves, w.n
		FROM demand d, LATERAL (SELECT greatest(0, waiting - urgent - CASE WHEN waiting = 0 THEN 0 ELSE
			(SELECT count(*) FROM (SELECT FROM apps WHERE ` + readyOfProfile + ` ORDER BY ready_at LIMIT d.waiting) few) END) AS n) w
	), fill AS MATERIALIZED (
		SELECT w.n - moves AS own, CASE WHEN fills THEN greatest(0, least(target + importing + waiting - urgent - idle - (w.n - moves)
				- (SELECT count(*) FROM (SELECT FROM apps WHERE ` + readyOfProfile + ` AND $4 IN (profile_revision, '')
					ORDER BY ready_at LIMIT w.target + w.importing + w.waiting) few),
			CASE WHEN importing > 0 THEN greatest($7, least(importing, $8)) ELSE $6 END - (idle - moves))) ELSE 0 END AS n
		FROM wanted w
	), moved AS (
		UPDATE apps SET for_pool = false, updated_at = now()
		WHERE id = ANY (ARRAY(
			SELECT id FROM apps WHERE ` + buildsOfProfile + ` AND for_pool
			ORDER BY leased_until > now(), attempts, next_attempt_at
			LIMIT (SELECT moves FROM wanted) FOR UPDATE SKIP LOCKED))
		RETURNING id
	), begun AS (
		INSERT INTO apps (id, profile, profile_revision, incarnation, for_pool)
		SELECT id, $1, $3, ` + currentIncarnation + `, place > own
		FROM fill, unnest($2::text[]) WITH ORDINALITY AS new (id, place)
		WHERE place <= own + n AND ` + currentIncarnation + ` IS NOT NULL
		RETURNING id
	)
	SELECT id FROM moved UNION ALL SELECT id FROM begun`

// buildsOfProfile and readyOfProfile are the builds of profile $1, and its ready apps.
const (
	buildsOfProfile = `state = 'building' AND profile = $1 AND incarnation = ` + currentIncarnation
	readyOfProfile  = `state = 'ready' AND profile = $1 AND incarnation = ` + currentIncarnation + ` AND ` + readySince
)

// buildsLock makes the decisions about the builds of a profile wait for each other. It is the last lock of a
// transaction, so that no two wait for each other.
const buildsLock = `SELECT pg_advisory_xact_lock(hashtext('start builds'), hashtext($1))`

// queueBuilds decides which builds begin, as the last part of a transaction. begun says whether any have
// work now: then the workers are to be woken after the commit.
func queueBuilds(batch *pgx.Batch, n tenant.NextBuilds, begun *bool) {
	batch.Queue(buildsLock, n.Profile.Name)
	batch.Queue(startBuildsSQL, n.Profile.Name, n.IDs, n.Profile.Revision(), poolRevision(n.Profile),
		n.Limits.Waiting, n.Limits.Pool, n.Limits.Import, n.Limits.SharedImport).
		Exec(func(tag pgconn.CommandTag) error { *begun = tag.RowsAffected() > 0; return nil })
}

// StartBuilds begins the builds that a profile lacks, with the given ids. Calls for one profile at the same
// time share a decision, so that up to one of each replica waits for buildsLock.
func (db *DB) StartBuilds(ctx context.Context, n tenant.NextBuilds) error {
	found, ok := db.builds.Load(n.Profile.Name)
	if !ok {
		found, _ = db.builds.LoadOrStore(n.Profile.Name, &shared[tenant.NextBuilds, struct{}]{run: db.startBuilds, atOnce: 1})
	}
	_, err := found.(*shared[tenant.NextBuilds, struct{}]).do(ctx, n)
	return translate("start builds", err)
}

func (db *DB) startBuilds(ctx context.Context, calls []tenant.NextBuilds) ([]struct{}, error) {
	n := calls[0]
	for _, other := range calls[1:] {
		n.IDs = append(n.IDs[:len(n.IDs):len(n.IDs)], other.IDs...)
	}
	// The others wait for this one, whose caller may have more time than they have.
	ctx, cancel := context.WithTimeout(ctx, afterCommit)
	defer cancel()
	var begun bool
	batch := &pgx.Batch{}
	queueBuilds(batch, n, &begun)
	// Without BEGIN, the statements of a batch are one transaction.
	if err := db.pool.SendBatch(ctx, batch).Close(); err != nil {
		return nil, err
	}
	if begun {
		db.wakeWorkers(tenant.AppWork, tenant.KeyWork)
	}
	return make([]struct{}, len(calls)), nil
}

// afterCommit limits the decision about builds, which may follow a change that is committed.
const afterCommit = 3 * time.Second

// startBuildsAfter is StartBuilds after the commit of a change that may need builds. The change is done, so a
// failure is no failure of the caller.
func (db *DB) startBuildsAfter(ctx context.Context, n tenant.NextBuilds) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), afterCommit)
	defer cancel()
	if err := db.StartBuilds(ctx, n); err != nil {
		db.log.Warn("builds not started; the sweep starts them", zap.String("profile", n.Profile.Name), zap.Error(err))
	}
}
