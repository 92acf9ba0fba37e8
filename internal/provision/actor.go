package provision

import (
	"context"

	"github.com/tenantry/tenantry/internal/tenant"
)

// workerOf is worker with the upstream call that the change comes of.
func workerOf(ctx context.Context) tenant.Actor {
	of := worker
	of.UpstreamRequestID = tenant.LastUpstreamRequest(ctx)
	return of
}
