package main

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/tenantry/tenantry/internal/httpapi"
	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/tenant"
)

const (
	// checkEvery is the time between two checks of the database.
	checkEvery = time.Second
	// checkTimeout limits one check. It is longer than the lock timeout of sessions: statements that wait
	// for a lock and fill the pool must not make every replica unready.
	checkTimeout = 3 * time.Second
)

// A databaseState is the result of one check of the database.
type databaseState struct {
	postgres.Health
	err error // why the database cannot be used
	// cached says that lookups can be served without the database. It is set only with err.
	cached bool
}

// A databaseWatch checks the database in the background, so that probes get a response at once, also
// while the database hangs.
type databaseWatch struct {
	check func(ctx context.Context) databaseState
	last  atomic.Pointer[databaseState] // nil before the first check has ended
}

// run checks the database until ctx ends.
func (w *databaseWatch) run(ctx context.Context) {
	tick := time.NewTicker(checkEvery)
	defer tick.Stop()
	for {
		w.look(ctx)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// look checks the database once.
func (w *databaseWatch) look(ctx context.Context) {
	checking, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	if state := w.check(checking); ctx.Err() == nil {
		w.last.Store(&state)
	}
}

// checkDatabase is the check of the service's databaseWatch.
func (s *service) checkDatabase(ctx context.Context) databaseState {
	var state databaseState
	if s.started.Load() {
		state.Health, state.err = s.db.Health(ctx)
	} else { // the schema may be missing
		state.err = s.db.Ping(ctx)
	}
	state.cached = state.err != nil && s.db.AnswersAlone()
	return state
}

// readiness returns the last known state. It does not wait for the database.
func (s *service) readiness() httpapi.Readiness {
	return s.readinessOf(s.database.last.Load())
}

func (s *service) readinessOf(database *databaseState) httpapi.Readiness {
	r := httpapi.Readiness{Writes: !s.ReadOnly, Lookups: true,
		Checks: map[string]string{"database": "ok", "recovery": "ok", "serving": "ok", "started": "ok", "upstream": "ok"}}
	if s.ReadOnly {
		r.Checks["serving"] = "read-only: lookups only, since TENANTRY_READ_ONLY is set"
	}
	switch {
	case database == nil:
		r.Writes, r.Lookups = false, false
		r.Checks["database"] = "not checked yet"
	case database.err != nil:
		r.Writes, r.Lookups = false, database.cached
		r.Checks["database"] = database.err.Error()
		if database.cached {
			r.Checks["database"] += "; lookups are served from the cache"
		}
	case database.ReadOnly:
		r.Writes = false
		if !s.ReadOnly {
			r.Checks["database"] = "the database is read-only"
		}
	}
	if database != nil {
		switch recovery := database.Recovery; {
		case recovery.State == tenant.Stopped:
			r.Writes = false
			r.Checks["recovery"] = "stopped: another database of this deployment is in use; run a copy with TENANTRY_READ_ONLY=true"
		case recovery.Active():
			r.Checks["recovery"] = string(recovery.State) + ": " + recovery.Reason
		}
		if pause := database.Pause; pause.Scope != "" { // requests are served all the same
			r.Checks["upstream"] = "paused by an operator (" + string(pause.Scope) + "): " + pause.Reason
		}
	}
	if !s.started.Load() {
		r.Writes, r.Lookups = false, false
		r.Checks["started"] = "starting: the database, its schema, the keyset and the PAT are being checked"
	}
	if s.ending.Load() {
		r.Writes, r.Lookups = false, false
		r.Checks["serving"] = "shutting down"
	}
	return r
}
