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
// stands there: of several first starts at once, one wins. The fence is up from
// then on until Clarifai was seen to hold nothing that the database does not know.
func (db *DB) PinDeployment(ctx context.Context, d tenant.Deployment) (tenant.Deployment, error) {
	_, err := db.pool.Exec(ctx, `
		WITH pinned AS (
			INSERT INTO deployment (id, operator_user_id, keyset_probe, system_identifier, timeline, fence_since, fence_reason)
			SELECT $1, $2, $3, s.system_identifier, c.timeline_id, now(),
				'the database is new, and Clarifai is searched for what an earlier one may have made'
			FROM pg_control_system() s, pg_control_checkpoint() c
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
