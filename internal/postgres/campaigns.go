package postgres

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/tenantry/tenantry/internal/tenant"
)

const campaignColumns = `c.id, c.kind, c.state, c.filter, coalesce(c.overlap, '0'), coalesce(c.revision, ''),
	(SELECT shape FROM profile_revisions r WHERE r.revision = c.revision), c.created_by, c.created_at, c.ended_at,
	c.counted, c.total, c.done, c.skipped, c.failed, c.under_way, c.walked, c.attempts, c.problem, c.leased_until,
	CASE WHEN c.ended_at IS NULL AND c.state = 'running' THEN coalesce(` + recoveryProblem + `, ` + upstreamHalted + `) END`

func scanCampaign(row pgx.CollectableRow) (tenant.Campaign, error) {
	var c tenant.Campaign
	var shape *tenant.Shape
	var ended *time.Time
	var leased any // may be -infinity
	var halted *tenant.Problem
	err := row.Scan(&c.ID, &c.Kind, &c.State, &c.Filter, &c.Overlap, &c.Revision, &shape, &c.CreatedBy, &c.CreatedAt, &ended,
		&c.Counted, &c.Total, &c.Done, &c.Skipped, &c.Failed, &c.UnderWay, &c.Walked, &c.Attempts, &c.Problem, &leased, &halted)
	if halted != nil {
		c.Problem, c.Halted = halted, true
	}
	if shape != nil {
		c.Shape = *shape
	}
	c.EndedAt = orZero(ended)
	c.LeasedUntil, _ = leased.(time.Time)
	return c, err
}

func oneCampaign(rows pgx.Rows) (tenant.Campaign, error) {
	c, err := pgx.CollectExactlyOneRow(rows, scanCampaign)
	if errors.Is(err, pgx.ErrNoRows) {
		return c, errNotFound("campaign")
	}
	return c, err
}

// NoteProfiles writes down what the revisions of profiles make, unless that is known.
func (db *DB) NoteProfiles(ctx context.Context, profiles []tenant.Profile) error {
	for _, p := range profiles {
		if _, err := db.pool.Exec(ctx, `
			INSERT INTO profile_revisions (revision, shape) VALUES ($1, $2) ON CONFLICT DO NOTHING`, p.Revision(), p.Shape()); err != nil {
			return translate("note profile", err)
		}
	}
	return nil
}

// StartCampaign begins a campaign. It reports tenant.Conflict while one of the same
// filter is running or paused.
func (db *DB) StartCampaign(ctx context.Context, n tenant.NewCampaign, actor tenant.Actor) (tenant.Campaign, error) {
	var c tenant.Campaign
	err := db.inTx(ctx, func(tx pgx.Tx) error {
		var err error
		c, err = insertCampaign(ctx, tx, n, actor, `true`)
		return err
	})
	if pg, ok := errors.AsType[*pgconn.PgError](err); ok && pg.ConstraintName == "campaigns_one_open" {
		var other uuid.UUID
		if err := db.pool.QueryRow(ctx, `
			SELECT id FROM campaigns WHERE kind = $1 AND filter = $2 AND state IN ('running', 'paused')`, n.Kind, n.Filter).Scan(&other); err != nil {
			other = uuid.Nil // it has just ended
		}
		return c, tenant.Errorf(tenant.Conflict, "campaign_open", "the campaign %s does this already, and has not ended: stop it first, or let it go on", other)
	}
	if err != nil {
		return c, translate("start campaign", err)
	}
	db.wakeWorkers(tenant.CampaignWork)
	return c, nil
}

// insertCampaign writes a campaign down if condition holds, whose parameters are $9
// and up.
func insertCampaign(ctx context.Context, tx pgx.Tx, n tenant.NewCampaign, actor tenant.Actor, condition string, args ...any) (tenant.Campaign, error) {
	var overlap *time.Duration
	if n.Kind == tenant.RotateKeys {
		overlap = &n.Overlap
	}
	rows, _ := tx.Query(ctx, `
		WITH inserted AS (
			INSERT INTO campaigns AS c (id, kind, filter, overlap, revision, created_by)
			SELECT $1::uuid, $2::text, $3::jsonb, $4::interval, nullif($5, ''), $6::text WHERE `+condition+`
			RETURNING `+campaignColumns+`
		), audited AS (
			INSERT INTO audit_events (actor, request_id, action, detail)
			SELECT $6::text, nullif($7, ''), 'campaign.started', jsonb_build_object('id', $1::uuid, 'kind', $2::text, 'filter', $8::jsonb)
				|| jsonb_strip_nulls(jsonb_build_object('overlap_seconds', extract(epoch FROM $4::interval), 'revision', nullif($5, '')))
			FROM inserted
		)
		SELECT * FROM inserted`,
		append([]any{planForValues, n.ID, n.Kind, n.Filter, overlap, n.Revision, actor.Name, actor.RequestID, n.Filter.Fields()}, args...)...)
	return oneCampaign(rows)
}

// rotationRetry is how long a key that is too old is left alone after its rotation came to nothing.
const rotationRetry = 24 * time.Hour

// sweeper is who creates the campaigns of StartDueRotation.
const sweeper = "worker"

// StartDueRotation begins a rotation of the keys that are too old, unless there is
// none or such a campaign is open. It reports whether it did. It reads no keys of other profiles.
func (db *DB) StartDueRotation(ctx context.Context, n tenant.NewCampaign, actor tenant.Actor) (bool, error) {
	err := db.inTx(ctx, func(tx pgx.Tx) error {
		_, err := insertCampaign(ctx, tx, n, actor, `
			NOT `+inRecovery+` AND NOT EXISTS (SELECT FROM campaigns WHERE kind = $2::text AND filter = $3::jsonb AND state IN ('running', 'paused'))
			AND EXISTS (
				-- ORDER BY selects the index by age, so that only old keys are read.
				SELECT FROM (SELECT * FROM keys WHERE state = 'active' AND profile = $10 AND activated_at <= now() - $9::interval ORDER BY activated_at, id) k
					JOIN tenants t ON t.app_id = k.app_id
				WHERE t.profile = $10 AND t.state = 'active'
					AND NOT EXISTS (SELECT FROM keys o WHERE o.app_id = k.app_id AND o.name = k.name AND (o.state IN ('creating', 'retiring')
						OR o.replaces = k.id AND o.updated_at > now() - $11::interval)))`,
			n.Filter.OlderThan, n.Filter.Profile, rotationRetry)
		return err
	})
	if errors.Is(err, tenant.NotFound) {
		return false, nil
	}
	if pg, ok := errors.AsType[*pgconn.PgError](err); ok && pg.ConstraintName == "campaigns_one_open" { // another replica was first
		return false, nil
	}
	if err != nil {
		return false, translate("rotate keys that are too old", err)
	}
	db.wakeWorkers(tenant.CampaignWork)
	return true, nil
}

// Campaign reads a campaign. It reports tenant.NotFound if there is none of that id.
func (db *DB) Campaign(ctx context.Context, id uuid.UUID) (tenant.Campaign, error) {
	rows, _ := db.pool.Query(ctx, `SELECT `+campaignColumns+` FROM campaigns c WHERE id = $1`, id)
	c, err := oneCampaign(rows)
	return c, translate("read campaign", err)
}

// Campaigns lists up to limit campaigns, newest first, after the one that after
// names; uuid.Nil is before the first.
func (db *DB) Campaigns(ctx context.Context, after uuid.UUID, limit int) ([]tenant.Campaign, error) {
	rows, _ := db.pool.Query(ctx, `
		SELECT `+campaignColumns+` FROM campaigns c
		WHERE $1 = '00000000-0000-0000-0000-000000000000'::uuid OR (created_at, id) < (SELECT created_at, id FROM campaigns WHERE id = $1)
		ORDER BY created_at DESC, id DESC LIMIT $2`, after, limit)
	cs, err := pgx.CollectRows(rows, scanCampaign)
	return cs, translate("list campaigns", err)
}

// CampaignItems lists up to limit items of a campaign, after the one of a number.
func (db *DB) CampaignItems(ctx context.Context, id uuid.UUID, after int64, limit int) ([]tenant.CampaignItem, error) {
	rows, _ := db.pool.Query(ctx, `
		SELECT i.number, i.tenant_id, i.app_id, i.key_name, i.state, coalesce(i.problem, CASE WHEN i.state = 'under_way' THEN
			(SELECT k.problem FROM keys k WHERE k.app_id = i.app_id AND k.name = i.key_name AND k.rotation_id = $4) END)
		FROM campaign_items i WHERE i.campaign_id = $1 AND i.number > $2 ORDER BY i.number LIMIT $3`, id, after, limit, rotationOf(id))
	items, err := pgx.CollectRows(rows, pgx.RowToStructByPos[tenant.CampaignItem])
	return items, translate("list items of campaign", err)
}

// rotationOf names the rotations of a campaign.
func rotationOf(id uuid.UUID) string { return campaignRotation + id.String() }

// campaignRotation begins the ids of the rotations of campaigns.
const campaignRotation = "campaign-"

// CountCampaigns counts the campaigns that have not ended, by kind and state.
func (db *DB) CountCampaigns(ctx context.Context) (map[tenant.CampaignKind]map[tenant.CampaignState]int, error) {
	counts := map[tenant.CampaignKind]map[tenant.CampaignState]int{tenant.RotateKeys: {}, tenant.ConformApps: {}}
	rows, _ := db.pool.Query(ctx, `SELECT kind, state, count(*) FROM campaigns WHERE ended_at IS NULL GROUP BY 1, 2`)
	var kind tenant.CampaignKind
	var state tenant.CampaignState
	var n int
	_, err := pgx.ForEachRow(rows, []any{&kind, &state, &n}, func() error {
		counts[kind][state] = n
		return nil
	})
	return counts, translate("count campaigns", err)
}

// ChangeCampaign pauses, resumes or stops a campaign. It reports tenant.Conflict if
// its state does not allow that, and changes nothing if it is so already.
func (db *DB) ChangeCampaign(ctx context.Context, id uuid.UUID, change tenant.CampaignChange, actor tenant.Actor) (c tenant.Campaign, changed bool, err error) {
	err = db.inTx(ctx, func(tx pgx.Tx) error {
		rows, _ := tx.Query(ctx, `SELECT `+campaignColumns+` FROM campaigns c WHERE id = $1 FOR UPDATE OF c`, id)
		if c, err = oneCampaign(rows); err != nil {
			return err
		}
		was := c.State
		to, err := change.Check(was)
		if err != nil || to == was {
			return err
		}
		changed = true
		rows, _ = tx.Query(ctx, `
			UPDATE campaigns c
			SET state = $2, ended_at = CASE WHEN $2 = 'stopped' AND under_way = 0 THEN now() END, attempts = 0, problem = NULL,
				next_attempt_at = now()
			WHERE id = $1 RETURNING `+campaignColumns, id, to)
		if c, err = oneCampaign(rows); err != nil {
			return err
		}
		return audit(ctx, tx, actor, event{action: "campaign." + map[tenant.CampaignState]string{tenant.CampaignRunning: "resumed",
			tenant.CampaignPaused: "paused", tenant.CampaignStopped: "stopped"}[to], detail: map[string]any{"id": id, "from": was, "to": to}})
	})
	if err != nil || !changed || c.Ended() {
		return c, changed, translate("change campaign", err)
	}
	db.wakeWorkers(tenant.CampaignWork)
	return c, changed, nil
}

// dueCampaign selects the campaigns that there is work on. In recovery mode campaigns wait.
const dueCampaign = `ended_at IS NULL AND (state = 'running' OR under_way > 0 OR state = 'stopped') AND next_attempt_at <= now() AND leased_until < now()
	AND NOT ` + inRecovery + ` AND NOT ` + workPaused

// LeaseCampaigns leases those of the campaigns that there is work on, for at most lease.
func (db *DB) LeaseCampaigns(ctx context.Context, ids []uuid.UUID, lease time.Duration) ([]tenant.Campaign, error) {
	rows, _ := db.pool.Query(ctx, `
		UPDATE campaigns c SET leased_until = now() + $2, leased_by = $3
		WHERE id = ANY (ARRAY(SELECT id FROM campaigns WHERE id = ANY ($1) AND `+dueCampaign+` FOR UPDATE SKIP LOCKED))
		RETURNING `+campaignColumns, ids, lease, db.replica)
	leased, err := pgx.CollectRows(rows, scanCampaign)
	return leased, translate("lease campaigns", err)
}

// walkWindow is how many keys are read at once while a campaign looks for its own:
// no statement takes long, however few a filter selects.
const walkWindow = 5000

// A window is a part of the keys, by their ids: those that a filter selects.
type window struct {
	keys  []walkedKey
	count int    // of the keys that the filter selects, however many were asked for
	last  string // id of the last key that was read; empty at the end of all keys
}

type walkedKey struct {
	ID    uuid.UUID
	AppID tenant.AppID
	Name  string
}

// walk reads up to limit keys of the window after a key. Keys that were activated
// after before are not selected. If due is set, the filter is that of StartDueRotation: walk reads only keys
// of that profile and age, the oldest first.
func (db *DB) walk(ctx context.Context, f tenant.KeyFilter, due bool, before time.Time, after string, limit int) (w window, err error) {
	labels := f.Labels
	if labels == nil {
		labels = map[string]string{}
	}
	const last = `coalesce(nullif($1, '')::uuid, '00000000-0000-0000-0000-000000000000')`
	where, order := `id > `+last, `id`
	if due {
		order = `activated_at, id`
		where = `state = 'active' AND profile = $6 AND activated_at <= $3::timestamptz - $4::interval
			AND (activated_at, id) > (coalesce((SELECT activated_at FROM keys WHERE id = nullif($1, '')::uuid), '-infinity'), ` + last + `)`
	}
	rows, _ := db.pool.Query(ctx, `
		WITH seen AS MATERIALIZED (
			SELECT id, app_id, name, state, activated_at FROM keys WHERE `+where+` ORDER BY `+order+` LIMIT $2
		), selected AS (
			SELECT s.* FROM seen s JOIN tenants t ON t.app_id = s.app_id
			WHERE s.state = 'active' AND s.activated_at <= $3::timestamptz - $4::interval AND ($5 = '' OR s.name = $5)
				AND ($6 = '' OR t.profile = $6) AND t.labels @> $7::jsonb
		)
		SELECT coalesce((SELECT id::text FROM seen ORDER BY `+strings.ReplaceAll(order, ",", " DESC,")+` DESC LIMIT 1), ''), (SELECT count(*) FROM selected),
			few.id, few.app_id, few.name
		FROM (SELECT) one LEFT JOIN (SELECT * FROM selected ORDER BY `+order+` LIMIT $8) few ON true ORDER BY `+order,
		planForValues, after, walkWindow, before, f.OlderThan, f.KeyName, f.Profile, labels, limit)
	var id *uuid.UUID
	var app *tenant.AppID
	var name *string
	_, err = pgx.ForEachRow(rows, []any{&w.last, &w.count, &id, &app, &name}, func() error {
		if id != nil {
			w.keys = append(w.keys, walkedKey{*id, *app, *name})
		}
		return nil
	})
	return w, translate("walk over keys", err)
}

// CountKeys counts the keys that a rotation would take now.
func (db *DB) CountKeys(ctx context.Context, f tenant.KeyFilter) (int, error) {
	var now time.Time
	if err := db.pool.QueryRow(ctx, `SELECT now()`).Scan(&now); err != nil {
		return 0, translate("read the time", err)
	}
	total := 0
	for after := ""; ; {
		w, err := db.walk(ctx, f, false, now, after, 0)
		if err != nil || w.last == "" {
			return total, err
		}
		total += w.count
		after = w.last
	}
}

// CountCampaign counts a part of what a leased campaign will take, or all of it.
func (db *DB) CountCampaign(ctx context.Context, c tenant.Campaign) (tenant.Campaign, error) {
	var after string
	err := db.pool.QueryRow(ctx, `SELECT count_cursor FROM campaigns WHERE id = $1`, c.ID).Scan(&after)
	if err != nil {
		return c, translate("read campaign", err)
	}
	var w window
	if c.Kind == tenant.RotateKeys {
		if w, err = db.walk(ctx, c.Filter, c.CreatedBy == sweeper, c.CreatedAt, after, 0); err != nil {
			return c, err
		}
	} else if err := db.pool.QueryRow(ctx, `
		WITH seen AS MATERIALIZED (
			SELECT * FROM apps WHERE id > $4 ORDER BY id LIMIT $5
		)
		SELECT (SELECT count(*) FROM seen a JOIN tenants t ON t.app_id = a.id WHERE `+campaignMisfit+`),
			coalesce((SELECT id FROM seen ORDER BY id DESC LIMIT 1), '')`,
		c.Filter.Profile, c.Revision, c.CreatedAt, after, walkWindow).Scan(&w.count, &w.last); err != nil {
		return c, translate("count apps", err)
	}
	return db.leasedCampaign(ctx, "count what a campaign takes", c, `
		UPDATE campaigns c SET total = total + $3, count_cursor = $4, counted = $4 = ''
		WHERE id = $1 AND leased_until = $2 RETURNING `+campaignColumns, w.count, w.last)
}

// leasedCampaign runs a statement on a leased campaign, which is $1 and $2.
func (db *DB) leasedCampaign(ctx context.Context, act string, c tenant.Campaign, sql string, args ...any) (tenant.Campaign, error) {
	rows, _ := db.pool.Query(ctx, sql, append([]any{c.ID, c.LeasedUntil}, args...)...)
	next, err := pgx.CollectExactlyOneRow(rows, scanCampaign)
	if errors.Is(err, pgx.ErrNoRows) {
		return c, tenant.ErrLeaseLost
	}
	return next, translate(act, err)
}

// A campaign's item is given up after so many failed tries if its problem is its own.
const maxItemAttempts = 3

// sharedProblems are those of the account: nothing is gained by going on without the
// key that meets one.
var sharedProblems = []string{"upstream_throttled", "upstream_unavailable", "upstream_quota", "upstream_pat_refused", "upstream_forbidden", "upstream_account"}

// SettleCampaign counts the rotations of a leased campaign whose end is known, and
// ends the campaign if nothing is left of it.
func (db *DB) SettleCampaign(ctx context.Context, c tenant.Campaign, actor tenant.Actor) (s tenant.Settling, err error) {
	err = db.inTx(ctx, func(tx pgx.Tx) error {
		var problem *tenant.Problem
		err := tx.QueryRow(ctx, `
			WITH looked AS (
				SELECT i.number, k.problem, k.end_reason, CASE
					WHEN k.activated_at IS NOT NULL THEN 'done'
					WHEN k.state IN ('revoking', 'revoked', 'lost') THEN 'skipped'
					WHEN k.attempts >= $2 AND NOT k.problem->>'code' = ANY ($3) THEN 'failed'
					ELSE 'under_way' END AS state
				FROM campaign_items i JOIN keys k ON k.app_id = i.app_id AND k.name = i.key_name AND k.rotation_id = $4
				WHERE i.campaign_id = $1 AND i.state = 'under_way'
			), gone AS (
				DELETE FROM campaign_items i USING looked l WHERE i.campaign_id = $1 AND i.number = l.number AND l.state = 'done'
			), ended AS (
				UPDATE campaign_items i
				SET state = l.state, problem = CASE l.state WHEN 'failed' THEN l.problem ELSE jsonb_build_object('code', 'rotation_cancelled',
					'since', now(), 'detail', 'the new key was revoked before it worked: ' || coalesce(l.end_reason, 'unknown')) END
				FROM looked l WHERE i.campaign_id = $1 AND i.number = l.number AND l.state IN ('skipped', 'failed')
			)
			SELECT count(*) FILTER (WHERE state = 'done'), count(*) FILTER (WHERE state = 'skipped'), count(*) FILTER (WHERE state = 'failed'),
				(array_agg(problem) FILTER (WHERE state = 'under_way' AND problem IS NOT NULL))[1]
			FROM looked`, c.ID, maxItemAttempts, sharedProblems, rotationOf(c.ID)).Scan(&s.Done, &s.Skipped, &s.Failed, &problem)
		if err != nil {
			return err
		}
		rows, _ := tx.Query(ctx, `
			UPDATE campaigns c
			SET done = done + $3, skipped = skipped + $4, failed = failed + $5, under_way = under_way - $3 - $4 - $5,
				problem = CASE WHEN kind = 'rotate' THEN $6::jsonb ELSE problem END
			WHERE id = $1 AND leased_until = $2 RETURNING `+campaignColumns, c.ID, c.LeasedUntil, s.Done, s.Skipped, s.Failed, problem)
		if s.Campaign, err = pgx.CollectExactlyOneRow(rows, scanCampaign); errors.Is(err, pgx.ErrNoRows) {
			return tenant.ErrLeaseLost
		}
		if err != nil {
			return err
		}
		rows, _ = tx.Query(ctx, `
			UPDATE campaigns c
			SET state = CASE state WHEN 'running' THEN 'done' ELSE state END, ended_at = now(), problem = NULL, leased_until = '-infinity',
				total = CASE state WHEN 'running' THEN done + skipped + failed ELSE total END
			WHERE id = $1 AND under_way = 0 AND ended_at IS NULL AND (state = 'running' AND counted AND walked OR state = 'stopped') RETURNING `+campaignColumns, c.ID)
		end, err := pgx.CollectExactlyOneRow(rows, scanCampaign)
		if errors.Is(err, pgx.ErrNoRows) {
			return nil
		}
		if err != nil {
			return err
		}
		s.Campaign = end
		return audit(ctx, tx, actor, event{action: "campaign.ended", detail: map[string]any{"id": c.ID, "kind": end.Kind, "state": end.State,
			"done": end.Done, "skipped": end.Skipped, "failed": end.Failed}})
	})
	return s, translate("settle campaign", err)
}

// RotateSome begins rotations of a leased campaign as the rows ids, in the order of
// the keys, or skips keys that cannot be rotated. It stops early once the campaign is
// paused or stopped, and after a window of keys that are not selected.
func (db *DB) RotateSome(ctx context.Context, c tenant.Campaign, ids []uuid.UUID, actor tenant.Actor) (tenant.Campaign, error) {
	var after string
	if err := db.pool.QueryRow(ctx, `SELECT cursor FROM campaigns WHERE id = $1`, c.ID).Scan(&after); err != nil {
		return c, translate("read campaign", err)
	}
	w, err := db.walk(ctx, c.Filter, c.CreatedBy == sweeper, c.CreatedAt, after, len(ids))
	if err != nil {
		return c, err
	}
	defer db.wakeWorkers(tenant.KeyWork)
	for i, k := range w.keys {
		goesOn, err := db.rotateNext(ctx, c, k, ids[i], actor)
		if err != nil {
			return c, translate("rotate key of campaign", err)
		}
		if !goesOn {
			w.count = len(w.keys) + 1 // the rest is for later
			break
		}
	}
	if w.count > len(w.keys) {
		rows, _ := db.pool.Query(ctx, `SELECT `+campaignColumns+` FROM campaigns c WHERE id = $1`, c.ID)
		c, err := oneCampaign(rows)
		return c, translate("read campaign", err)
	}
	return db.leasedCampaign(ctx, "pass over keys", c, `
		UPDATE campaigns c SET cursor = CASE $3 WHEN '' THEN cursor ELSE $3 END, walked = $3 = ''
		WHERE id = $1 AND leased_until = $2 RETURNING `+campaignColumns, w.last)
}

// rotateNext begins one rotation of a leased campaign, or skips the key. It reports
// whether the campaign goes on.
func (db *DB) rotateNext(ctx context.Context, c tenant.Campaign, k walkedKey, id uuid.UUID, actor tenant.Actor) (goesOn bool, err error) {
	err = db.inTx(ctx, func(tx pgx.Tx) error {
		if goesOn, err = holdCampaign(ctx, tx, c); err != nil || !goesOn {
			return err
		}
		item := tenant.CampaignItem{AppID: k.AppID, KeyName: k.Name, State: tenant.ItemUnderWay}
		rows, _ := tx.Query(ctx, `SELECT `+tenantColumns+` FROM tenants t WHERE t.app_id = $1 FOR UPDATE OF t`, k.AppID)
		t, err := oneTenant(rows)
		if errors.Is(err, tenant.NotFound) { // it was deleted since
			_, err := tx.Exec(ctx, `UPDATE campaigns SET cursor = $2 WHERE id = $1`, c.ID, k.ID.String())
			return err
		}
		if err != nil {
			return err
		}
		item.TenantID = t.ID
		refused := rotateForCampaign(ctx, tx, t, k, tenant.NewRotation{ID: rotationOf(c.ID), KeyName: k.Name, KeyID: id, Overlap: &c.Overlap,
			Priority: tenant.Bulk}, actor)
		if e, ok := errors.AsType[*tenant.Error](refused); ok && (e.Kind == tenant.Conflict || e.Kind == tenant.NotFound) {
			item.State, item.Problem = tenant.ItemSkipped, &tenant.Problem{Code: e.Code, Detail: e.Detail, Since: time.Now().UTC()}
		} else if refused != nil {
			return refused
		}
		return endItem(ctx, tx, c, item, k.ID.String())
	})
	db.wakeFollowers()
	return goesOn, err
}

func rotateForCampaign(ctx context.Context, tx pgx.Tx, t tenant.Tenant, k walkedKey, n tenant.NewRotation, actor tenant.Actor) error {
	if _, err := tenant.ChangeKey.Check(t.State); err != nil {
		return tenant.Errorf(tenant.Conflict, "state_forbids", "the tenant is %s", t.State)
	}
	// Before the rotation that may be replacing the key is complained of: it may be one
	// that the caller has named so.
	if _, err := rotationIn(ctx, tx, t, k.Name, n.ID); !errors.Is(err, tenant.NotFound) {
		if err != nil {
			return err
		}
		return tenant.Errorf(tenant.Conflict, "rotation_under_way", "there is a rotation %q of this key", n.ID)
	}
	if err := noOtherRotation(ctx, tx, k.AppID, k.Name); err != nil {
		return err
	}
	old, err := oneKey(ctx, tx, `k.id = $1 AND k.state = 'active'`, k.ID)
	if errors.Is(err, tenant.NotFound) {
		return tenant.Errorf(tenant.Conflict, "key_not_active", "the key has been replaced or revoked since")
	}
	if err != nil {
		return err
	}
	return insertRotation(ctx, tx, t, old, n, actor)
}

// holdCampaign locks a leased campaign, before anything else is locked, and reports
// whether it goes on: who pauses it waits until what is begun now is written.
func holdCampaign(ctx context.Context, tx pgx.Tx, c tenant.Campaign) (goesOn bool, err error) {
	err = tx.QueryRow(ctx, `SELECT state = 'running' FROM campaigns WHERE id = $1 AND leased_until = $2 FOR UPDATE`, c.ID, c.LeasedUntil).Scan(&goesOn)
	if errors.Is(err, pgx.ErrNoRows) {
		return false, tenant.ErrLeaseLost
	}
	return goesOn, err
}

// endItem writes down what came of a key or an app of a campaign that is locked, whose
// cursor moves on to it. The zero state is of one that is done.
func endItem(ctx context.Context, tx pgx.Tx, c tenant.Campaign, i tenant.CampaignItem, cursor string) error {
	counter := string(i.State)
	if i.State == "" {
		counter = "done"
	} else if _, err := tx.Exec(ctx, `
		INSERT INTO campaign_items (campaign_id, tenant_id, app_id, key_name, state, problem) VALUES ($1, $2, $3, $4, $5, $6)`,
		c.ID, i.TenantID, i.AppID, i.KeyName, i.State, i.Problem); err != nil {
		return err
	}
	_, err := tx.Exec(ctx, `
		UPDATE campaigns SET cursor = $2, `+counter+` = `+counter+` + 1, attempts = 0, problem = NULL WHERE id = $1`, c.ID, cursor)
	return err
}

// misfit selects the apps a of the profile $1 that are of another revision than $2, and
// campaignMisfit those of them that are no newer than $3. Apps that are shared with the
// operator are only their owners' to change, and one that was adopted is marked first.
const (
	misfit = `a.state = 'held' AND a.profile = $1 AND a.profile_revision <> $2 AND a.user_id IS NULL
		AND NOT (a.profile_revision = 'adopted' AND a.marked_at IS NULL)`
	campaignMisfit = misfit + ` AND a.created_at <= $3`
)

// Misfits lists up to limit apps of a profile that are not of a revision, after the
// one that after names.
func (db *DB) Misfits(ctx context.Context, profile, revision string, after tenant.AppID, limit int) ([]tenant.Misfit, error) {
	return db.misfits(ctx, db.pool, misfit+` AND a.id > $3 ORDER BY a.id LIMIT $4`, profile, revision, after, limit)
}

func (db *DB) misfits(ctx context.Context, q querier, where string, args ...any) ([]tenant.Misfit, error) {
	rows, _ := q.Query(ctx, `
		SELECT t.id, t.state, a.id, a.profile_revision, (SELECT shape FROM profile_revisions r WHERE r.revision = a.profile_revision)
		FROM apps a JOIN tenants t ON t.app_id = a.id WHERE `+where, args...)
	found, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (tenant.Misfit, error) {
		var m tenant.Misfit
		err := row.Scan(&m.TenantID, &m.State, &m.AppID, &m.Revision, &m.Was)
		return m, err
	})
	if err != nil {
		return nil, translate("list apps of other revisions", err)
	}
	at := map[tenant.AppID]int{}
	var ids []tenant.AppID
	for i, m := range found {
		at[m.AppID] = i
		ids = append(ids, m.AppID)
	}
	rows, _ = q.Query(ctx, `SELECT app_id, id, name, state, scopes, ciphertext FROM keys WHERE app_id = ANY ($1) ORDER BY app_id, name, created_at, id`, ids)
	var app tenant.AppID
	var k tenant.MisfitKey
	_, err = pgx.ForEachRow(rows, []any{&app, &k.ID, &k.Name, &k.State, &k.Scopes, &k.Ciphertext}, func() error {
		m := &found[at[app]]
		m.Keys = append(m.Keys, k)
		k = tenant.MisfitKey{}
		return nil
	})
	return found, translate("list keys of apps", err)
}

// NextMisfit reads the next app that a leased campaign is to bring to its revision. It
// reports tenant.NotFound, and writes it down, if there is none.
func (db *DB) NextMisfit(ctx context.Context, c tenant.Campaign) (tenant.Misfit, error) {
	var after tenant.AppID
	if err := db.pool.QueryRow(ctx, `SELECT cursor FROM campaigns WHERE id = $1`, c.ID).Scan(&after); err != nil {
		return tenant.Misfit{}, translate("read campaign", err)
	}
	for after < pastApps {
		to := pastApps
		if err := db.pool.QueryRow(ctx, `SELECT coalesce((SELECT id FROM apps WHERE id > $1 ORDER BY id OFFSET $2 LIMIT 1), $3)`,
			after, walkWindow-1, pastApps).Scan(&to); err != nil {
			return tenant.Misfit{}, translate("walk over apps", err)
		}
		found, err := db.misfits(ctx, db.pool, campaignMisfit+` AND a.id > $4 AND a.id <= $5 ORDER BY a.id LIMIT 1`,
			planForValues, c.Filter.Profile, c.Revision, c.CreatedAt, after, to)
		if err != nil {
			return tenant.Misfit{}, err
		}
		if len(found) > 0 {
			return found[0], nil
		}
		if after = to; after < pastApps { // what was looked at is not looked at again
			if _, err := db.leasedCampaign(ctx, "walk over apps", c, `
				UPDATE campaigns c SET cursor = $3 WHERE id = $1 AND leased_until = $2 RETURNING `+campaignColumns, after); err != nil {
				return tenant.Misfit{}, err
			}
		}
	}
	if _, err := db.leasedCampaign(ctx, "end the walk of a campaign", c, `
		UPDATE campaigns c SET walked = true WHERE id = $1 AND leased_until = $2 RETURNING `+campaignColumns); err != nil {
		return tenant.Misfit{}, err
	}
	return tenant.Misfit{}, errNotFound("app")
}

// KeyRescopedTo writes down the scopes that a key of an app got at Clarifai for a
// campaign.
func (db *DB) KeyRescopedTo(ctx context.Context, c tenant.Campaign, m tenant.Misfit, k tenant.MisfitKey, scopes []string, actor tenant.Actor) error {
	err := db.inTx(ctx, func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, `
			UPDATE keys SET scopes = $2, updated_at = now() WHERE id = $1 AND state IN ('active', 'retiring')`, k.ID, scopes)
		if err != nil || tag.RowsAffected() == 0 { // it is being revoked
			return err
		}
		return audit(ctx, tx, actor, event{action: "key.rescoped", tenant: m.TenantID, app: m.AppID, key: k.ID,
			detail: map[string]any{"name": k.Name, "from": k.Scopes, "to": scopes, "campaign": c.ID}})
	})
	db.changed(m.TenantID, "")
	return translate("record scopes of key", err)
}

// Conformed ends an app of a leased campaign: it is of the campaign's revision, and
// gets the keys that it lacks, as the rows ids. It reports false, and changes nothing,
// if the app's keys or its tenant have changed since m was read.
func (db *DB) Conformed(ctx context.Context, c tenant.Campaign, m tenant.Misfit, ids []uuid.UUID, actor tenant.Actor) (ok bool, err error) {
	added := 0
	err = db.inTx(ctx, func(tx pgx.Tx) error {
		ok, added = false, 0
		// Finished also if it was paused meanwhile.
		if _, err := holdCampaign(ctx, tx, c); err != nil {
			return err
		}
		if _, err := lockOwner(ctx, tx, m.AppID); err != nil {
			return err
		}
		now, err := db.misfits(ctx, tx, campaignMisfit+` AND a.id = $4`, c.Filter.Profile, c.Revision, c.CreatedAt, m.AppID)
		if err != nil || len(now) == 0 || now[0].TenantID != m.TenantID || now[0].Blocked(c.Shape) != nil {
			return err
		}
		var changed []map[string]any
		for _, change := range now[0].Changes(c.Shape) {
			switch change.What {
			case tenant.ChangesScopes:
				return nil
			case tenant.AddsKey:
			default:
				changed = append(changed, map[string]any{"what": change.What, "from": change.From, "to": change.To})
				continue
			}
			for _, t := range c.Shape.Keys {
				if t.Name != change.KeyName {
					continue
				}
				if _, err := tx.Exec(ctx, `
					INSERT INTO keys (id, app_id, name, scopes, priority, requested_by, request_id) VALUES ($1, $2, $3, $4, 2, $6, nullif($5, ''))`,
					ids[added], m.AppID, t.Name, t.Scopes, actor.RequestID, actor.Name); err != nil {
					return err
				}
				if err := audit(ctx, tx, actor, event{action: "key.creating", tenant: m.TenantID, app: m.AppID, key: ids[added],
					detail: map[string]any{"name": t.Name, "scopes": t.Scopes, "campaign": c.ID}}); err != nil {
					return err
				}
				added++
			}
		}
		if _, err := tx.Exec(ctx, `
			UPDATE apps SET profile_revision = $2, extra_keys_at = coalesce(extra_keys_at, now()), updated_at = now() WHERE id = $1`, m.AppID, c.Revision); err != nil {
			return err
		}
		if err := audit(ctx, tx, actor, event{action: "app.conformed", tenant: m.TenantID, app: m.AppID,
			detail: map[string]any{"from": m.Revision, "to": c.Revision, "campaign": c.ID, "changed": changed}}); err != nil {
			return err
		}
		ok = true
		return endItem(ctx, tx, c, tenant.CampaignItem{}, string(m.AppID))
	})
	if err != nil {
		return false, translate("bring app to a revision", err)
	}
	db.changed(m.TenantID, "")
	db.wakeWorkers(tenant.AppWork, tenant.KeyWork)
	return ok, nil
}

// LeaveMisfit ends an app of a leased campaign that was skipped or has failed.
func (db *DB) LeaveMisfit(ctx context.Context, c tenant.Campaign, m tenant.Misfit, state tenant.CampaignItemState, problem tenant.Problem) error {
	return translate("leave app as it is", db.inTx(ctx, func(tx pgx.Tx) error {
		if _, err := holdCampaign(ctx, tx, c); err != nil {
			return err
		}
		return endItem(ctx, tx, c, tenant.CampaignItem{TenantID: m.TenantID, AppID: m.AppID, State: state, Problem: &problem}, string(m.AppID))
	}))
}
