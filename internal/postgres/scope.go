package postgres

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/tenant"
)

// scopeSQL is the parameter of a condition `labels @>`, which keeps a statement to the tenants that an actor may
// change.
func scopeSQL(actor tenant.Actor) tenant.Scope {
	if actor.Within == nil { // which would be the JSON null
		return tenant.Scope{}
	}
	return actor.Within
}

// TenantLabels reads the labels of a tenant and nothing else. It reports
// tenant.NotFound for an id that never signed up.
func (db *DB) TenantLabels(ctx context.Context, id tenant.ID) (map[string]string, error) {
	var labels map[string]string
	err := db.pool.QueryRow(ctx, `SELECT labels FROM tenants WHERE id = $1`, id).Scan(&labels)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, errNotFound("tenant")
	}
	return labels, translate("read labels of tenant", err)
}
