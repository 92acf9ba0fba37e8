package postgres

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/tenant"
)

// Deployment reads what the database belongs to. It reports tenant.NotFound on
// a database that no service has started on yet.
func (db *DB) Deployment(ctx context.Context) (tenant.Deployment, error) {
	var d tenant.Deployment
	err := db.pool.QueryRow(ctx, `SELECT id, operator_user_id, keyset_probe FROM deployment`).
		Scan(&d.ID, &d.Operator, &d.KeysetProbe)
	if errors.Is(err, pgx.ErrNoRows) {
		return d, errNotFound("deployment")
	}
	return d, translate("read deployment", err)
}

// PinDeployment writes d if the database belongs to none yet, and returns what
// stands there: of several first starts at once, one wins.
func (db *DB) PinDeployment(ctx context.Context, d tenant.Deployment) (tenant.Deployment, error) {
	_, err := db.pool.Exec(ctx, `
		WITH pinned AS (
			INSERT INTO deployment (id, operator_user_id, keyset_probe) VALUES ($1, $2, $3)
			ON CONFLICT (only_row) DO NOTHING
			RETURNING id)
		INSERT INTO audit_events (actor, action, detail)
		SELECT 'operator', 'deployment.pinned', jsonb_build_object('deployment', id, 'operator_user_id', $2::text) FROM pinned`,
		d.ID, d.Operator, d.KeysetProbe)
	if err != nil {
		return d, translate("pin deployment", err)
	}
	return db.Deployment(ctx)
}
