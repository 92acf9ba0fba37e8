package postgres

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/tenant"
)

// An AuditFilter selects events. Zero fields select all.
type AuditFilter struct {
	TenantID  tenant.ID
	AppID     tenant.AppID
	KeyID     uuid.UUID
	Actor     string
	Action    string
	RequestID string
	After     time.Time // inclusive
	Before    time.Time // exclusive
}

// auditPatience is the maximum time that a list waits for open transactions that may own a missing id.
const auditPatience = time.Second

// AuditEvents lists up to limit events that f selects, ordered by id. It starts after the event with
// the id from, in the direction of the list; 0 starts at the first event of that direction. The cost
// does not grow with from.
//
// Newest first, it lists all committed events. Oldest first, it lists an event only when no event with
// a lower id can appear, so that a caller that continues from the last event gets each event exactly once.
func (db *DB) AuditEvents(ctx context.Context, f AuditFilter, from int64, oldestFirst bool, limit int) ([]tenant.AuditEvent, error) {
	if !oldestFirst {
		if from == 0 {
			from = math.MaxInt64
		}
		events, err := db.auditEvents(ctx, f, "id < ?", []any{from}, "DESC", limit)
		return events, translate("list audit events", err)
	}
	events, err := db.finalAuditEvents(ctx, f, from, limit)
	return events, translate("list audit events", err)
}

// finalAuditEvents lists final events, oldest first. Sealed events are final without a further check.
func (db *DB) finalAuditEvents(ctx context.Context, f AuditFilter, after int64, limit int) ([]tenant.AuditEvent, error) {
	var sealed int64
	if err := db.pool.QueryRow(ctx, `SELECT `+lastSealed).Scan(&sealed); err != nil {
		return nil, err
	}
	between := func(after, last int64, limit int) ([]tenant.AuditEvent, error) {
		if after >= last {
			return nil, nil
		}
		return db.auditEvents(ctx, f, "id > ? AND id <= ?", []any{after, last}, "ASC", limit)
	}
	events, err := between(after, sealed, limit)
	if err != nil || len(events) == limit {
		return events, err
	}
	after = max(after, sealed)
	final, err := db.lastFinalAudit(ctx, after)
	if err != nil {
		return nil, err
	}
	newer, err := between(after, final, limit-len(events))
	return append(events, newer...), err
}

// lastFinalAudit returns the last event such that no transaction can add an event between it and the
// event after. It returns after if there is no such event.
func (db *DB) lastFinalAudit(ctx context.Context, after int64) (int64, error) {
	newest, final, err := db.newestAudit(ctx, after, 0)
	if err != nil || final {
		return newest, err
	}
	// An open transaction may own a missing id. If no id is missing, all events are final.
	gap, err := db.firstAuditGap(ctx, after, newest)
	if err != nil || gap == newest {
		return newest, err
	}
	newer, final, err := db.newestAudit(ctx, after, auditPatience)
	if err != nil || final {
		return newer, err
	}
	return db.firstAuditGap(ctx, after, newest)
}

// firstAuditGap returns the id before the first missing id between the events after and last. It returns
// last if no id is missing.
func (db *DB) firstAuditGap(ctx context.Context, after, last int64) (int64, error) {
	gap := last
	err := db.pool.QueryRow(ctx, `
		SELECT before FROM (
			SELECT id, lag(id, 1, $1) OVER (ORDER BY id) AS before FROM audit_events WHERE id > $1 AND id <= $2) ids
		WHERE id > before + 1 ORDER BY id LIMIT 1`, after, last).Scan(&gap)
	if errors.Is(err, pgx.ErrNoRows) {
		err = nil
	}
	return gap, err
}

// auditEvents lists the events that f selects within a range of ids.
func (db *DB) auditEvents(ctx context.Context, f AuditFilter, ids string, bounds []any, direction string, limit int) ([]tenant.AuditEvent, error) {
	var where []string
	var args []any
	add := func(condition string, values ...any) {
		for _, v := range values {
			args = append(args, v)
			condition = strings.Replace(condition, "?", fmt.Sprintf("$%d", len(args)), 1)
		}
		where = append(where, condition)
	}
	add(ids, bounds...)
	if f.TenantID != "" {
		add("tenant_id = ?", f.TenantID)
	}
	if f.AppID != "" {
		add("app_id = ?", f.AppID)
	}
	if f.KeyID != uuid.Nil {
		add("key_id = ?", f.KeyID)
	}
	if f.Actor != "" {
		add("actor = ?", f.Actor)
	}
	if f.Action != "" {
		add("action = ?", f.Action)
	}
	if f.RequestID != "" {
		add(`request_id COLLATE "C" = ?`, f.RequestID) // as the index has it
	}
	if !f.After.IsZero() {
		add("at >= ?", f.After)
	}
	if !f.Before.IsZero() {
		add("at < ?", f.Before)
	}
	sql := `
		SELECT id, at, actor, action, coalesce(tenant_id, ''), coalesce(app_id, ''),
			coalesce(key_id, '00000000-0000-0000-0000-000000000000'), coalesce(request_id, ''), coalesce(upstream_request_id, ''), detail
		FROM audit_events WHERE ` + strings.Join(where, " AND ")
	args = append(args, limit)
	sql += fmt.Sprintf(` ORDER BY id %s LIMIT $%d`, direction, len(args))
	rows, _ := db.pool.Query(ctx, sql, append([]any{planForValues}, args...)...)
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (tenant.AuditEvent, error) {
		var e tenant.AuditEvent
		err := row.Scan(&e.ID, &e.At, &e.Actor, &e.Action, &e.TenantID, &e.AppID, &e.KeyID, &e.RequestID, &e.UpstreamRequestID, &e.Detail)
		return e, err
	})
}
