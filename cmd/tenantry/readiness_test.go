package main

import (
	"context"
	"errors"
	"sync"
	"testing"

	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/tenant"
)

// Each state of the database, and of the process, says which requests can be served.
func TestReadinessOf(t *testing.T) {
	t.Parallel()
	away := errors.New("the database cannot be reached")
	in := func(state tenant.RecoveryState) postgres.Health {
		return postgres.Health{Recovery: tenant.Recovery{State: state, Reason: "a test"}}
	}
	for name, c := range map[string]struct {
		database                  *databaseState
		starting, ending, reading bool
		writes, lookups           bool
		check, text               string // of what is not ok
	}{
		"well":                       {database: &databaseState{}, writes: true, lookups: true},
		"not checked":                {check: "database", text: "not checked yet"},
		"unreachable":                {database: &databaseState{err: away}, check: "database", text: away.Error()},
		"unreachable, with a cache":  {database: &databaseState{err: away, cached: true}, lookups: true, check: "database", text: away.Error() + "; lookups are served from the cache"},
		"read-only database":         {database: &databaseState{Health: postgres.Health{ReadOnly: true}}, lookups: true, check: "database", text: "the database is read-only"},
		"read-only service":          {database: &databaseState{}, reading: true, lookups: true, check: "serving", text: "read-only: lookups only, since TENANTRY_READ_ONLY is set"},
		"read-only service, standby": {database: &databaseState{Health: postgres.Health{ReadOnly: true}}, reading: true, lookups: true, check: "serving", text: "read-only: lookups only, since TENANTRY_READ_ONLY is set"},
		"recovering":                 {database: &databaseState{Health: in(tenant.Recovering)}, writes: true, lookups: true, check: "recovery", text: "recovering: a test"},
		"stopped": {database: &databaseState{Health: in(tenant.Stopped)}, lookups: true, check: "recovery",
			text: "stopped: another database of this deployment is in use; run a copy with TENANTRY_READ_ONLY=true"},
		"starting":      {database: &databaseState{}, starting: true, check: "started", text: "starting: the database, its schema, the keyset and the PAT are being checked"},
		"shutting down": {database: &databaseState{}, ending: true, check: "serving", text: "shutting down"},
		"paused": {database: &databaseState{Health: postgres.Health{Pause: tenant.UpstreamPause{Scope: tenant.PauseAll, Reason: "a test"}}}, writes: true, lookups: true,
			check: "upstream", text: "paused by an operator (all): a test"},
	} {
		s := &service{}
		s.ReadOnly = c.reading
		s.started.Store(!c.starting)
		s.ending.Store(c.ending)
		got := s.readinessOf(c.database)
		if got.Writes != c.writes || got.Lookups != c.lookups {
			t.Errorf("%s: writes %v, lookups %v; want %v, %v", name, got.Writes, got.Lookups, c.writes, c.lookups)
		}
		for check, text := range got.Checks {
			want := "ok"
			if check == c.check {
				want = c.text
			}
			if text != want {
				t.Errorf("%s: the check %s is %q; want %q", name, check, text, want)
			}
		}
		if len(got.Checks) != 5 {
			t.Errorf("%s: the checks are %v", name, got.Checks)
		}
	}
}

// While a check of the database hangs, readiness returns the last known state.
func TestReadinessWhileTheDatabaseHangs(t *testing.T) {
	t.Parallel()
	s := &service{}
	s.started.Store(true)
	hangs := false
	began := make(chan struct{})
	s.database.check = func(ctx context.Context) databaseState {
		if hangs {
			close(began)
			<-ctx.Done()
			return databaseState{err: ctx.Err()}
		}
		return databaseState{}
	}
	s.database.look(t.Context())
	hangs = true
	ctx, cancel := context.WithCancel(t.Context())
	var looking sync.WaitGroup
	looking.Go(func() { s.database.look(ctx) })
	<-began
	if got := s.readiness(); !got.Writes || !got.Lookups {
		t.Errorf("while a check hangs, the readiness is %+v", got)
	}
	cancel()
	looking.Wait()
	if got := s.readiness(); !got.Writes || !got.Lookups {
		t.Errorf("after a check that the end of the process has cut off, the readiness is %+v", got)
	}
}
