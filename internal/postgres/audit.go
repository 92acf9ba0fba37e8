package postgres

import (
	"context"
	"fmt"
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

// An AuditPosition is a place in the order of events: beyond the event it names,
// in the direction of the list. The zero AuditPosition is before the first.
type AuditPosition struct {
	At time.Time
	ID int64
}

// AuditEvents lists up to limit events that f selects, from a position on, oldest
// first or newest first. Its cost does not grow with the position.
func (db *DB) AuditEvents(ctx context.Context, f AuditFilter, from AuditPosition, oldestFirst bool, limit int) ([]tenant.AuditEvent, error) {
	var where []string
	var args []any
	add := func(condition string, values ...any) {
		for _, v := range values {
			args = append(args, v)
			condition = strings.Replace(condition, "?", fmt.Sprintf("$%d", len(args)), 1)
		}
		where = append(where, condition)
	}
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
		add("request_id = ?", f.RequestID)
	}
	if !f.After.IsZero() {
		add("at >= ?", f.After)
	}
	if !f.Before.IsZero() {
		add("at < ?", f.Before)
	}
	beyond, direction := "<", "DESC"
	if oldestFirst {
		beyond, direction = ">", "ASC"
	}
	if from != (AuditPosition{}) {
		// The first condition says nothing new; it tells which partitions to leave out.
		add("at "+beyond+"= ? AND (at, id) "+beyond+" (?, ?)", from.At, from.At, from.ID)
	}
	sql := `
		SELECT id, at, actor, action, coalesce(tenant_id, ''), coalesce(app_id, ''),
			coalesce(key_id, '00000000-0000-0000-0000-000000000000'), coalesce(request_id, ''), coalesce(upstream_request_id, ''), detail
		FROM audit_events`
	if len(where) > 0 {
		sql += ` WHERE ` + strings.Join(where, " AND ")
	}
	args = append(args, limit)
	sql += fmt.Sprintf(` ORDER BY at %s, id %s LIMIT $%d`, direction, direction, len(args))
	rows, _ := db.pool.Query(ctx, sql, append([]any{planForValues}, args...)...)
	events, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (tenant.AuditEvent, error) {
		var e tenant.AuditEvent
		err := row.Scan(&e.ID, &e.At, &e.Actor, &e.Action, &e.TenantID, &e.AppID, &e.KeyID, &e.RequestID, &e.UpstreamRequestID, &e.Detail)
		return e, err
	})
	return events, translate("list audit events", err)
}
