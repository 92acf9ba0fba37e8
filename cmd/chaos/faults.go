package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
)

// upstreamFaults are what goes wrong at Clarifai: of a hundred calls ten.
var upstreamFaults = func() []map[string]any {
	kinds := []map[string]any{
		{"drop_before": true},             // cut before it was made
		{"drop_after": true},              // made, and the answer lost
		{"http": 502},                     // a proxy's page, nothing made
		{"http": 502, "after": true},      // a proxy's page, though it was made
		{"status": 10020},                 // Clarifai says that it failed
		{"status": 10020, "after": true},  // and it was made
		{"status": 11005},                 // throttled
		{"hang": true},                    // no answer
		{"late_ms": 7000},                 // cut, and carried out after the retry
		{"delay_ms": 6000, "after": true}, // made, and answered after the time limit
	}
	// The first that fires is used alone: the later ones are likelier for it.
	const each = 0.01
	left := 1.0
	for _, k := range kinds {
		k["call"], k["probability"] = "*", each/left
		left -= each
	}
	// Calls about one key are refused as if the PAT were invalid, or the key unknown.
	for _, call := range []string{"GetKey", "DeleteKey"} {
		for _, status := range []int{11009, 11101} {
			kinds = append(kinds, map[string]any{"call": call, "status": status, "probability": 0.03})
		}
	}
	return kinds
}()

// An injector injects faults into the stage.
type injector struct {
	*stage
	rand   *rand.Rand
	during time.Duration
	say    func(string, ...any)
	counts map[string]int // of what was injected
	locks  sync.WaitGroup
	locked atomic.Bool
}

// An injection is a fault of the stage. Its do ends with all programs up, and returns what it has done; nothing
// if it did nothing.
type injection struct {
	name   string
	weight int // how often it is chosen, relative to the others
	do     func(*injector, context.Context) (what string, err error)
}

var injections = []injection{
	{"replicas killed with kill -9", 8, (*injector).killReplica},
	{"replicas told to end and started again", 4, (*injector).roll},
	{"Clarifai restarted", 2, (*injector).restartClarifai},
	{"Clarifai killed", 2, (*injector).killClarifai},
	{"Postgres crashed", 4, (*injector).crashPostgres},
	{"tables locked", 3, (*injector).lockTable},
	{"periods in which Postgres was read-only", 2, (*injector).readOnly},
	{"periods in which Postgres refused connections", 2, (*injector).refuseConnections},
	{"PATs replaced by a restart", 1, (*injector).replacePAT},
}

// keysetRotated is a step of the operator rather than a fault.
const keysetRotated = "keyset rotations"

// inject does something to the stage every few seconds, and ends with all up and
// no faults. It returns how often it did what.
func (s *stage) inject(ctx context.Context, during time.Duration, r *rand.Rand, say func(string, ...any)) (map[string]int, error) {
	n := &injector{stage: s, rand: r, during: during, say: say, counts: map[string]int{keysetRotated: 0}}
	defer n.locks.Wait()
	all := 0
	for _, i := range injections {
		n.counts[i.name] = 0
		all += i.weight
	}
	began := time.Now()
	if err := s.faults(ctx, upstreamFaults); err != nil {
		return nil, err
	}
	// A new key of the keyset is added, and a third of the time later it seals.
	rekeying := [][]string{{"keyset", "rotate", "--prepare"}, {"keyset", "rotate"}}
	for {
		if step := len(rekeying); step > 0 && time.Since(began) > during*time.Duration(3-step)/3 {
			say("%8s  tenantry %s", time.Since(began).Round(100*time.Millisecond), strings.Join(rekeying[0], " "))
			if _, err := s.command(ctx, rekeying[0]...); err != nil {
				return nil, err
			}
			n.counts[keysetRotated] = 1
			rekeying = rekeying[1:]
		}
		pause := 2*time.Second + time.Duration(r.Int64N(int64(4*time.Second)))
		if time.Since(began)+pause > during {
			return n.counts, s.faults(ctx, []map[string]any{})
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(pause):
		}
		place := r.IntN(all)
		for _, i := range injections {
			if place -= i.weight; place >= 0 {
				continue
			}
			at := time.Since(began).Round(100 * time.Millisecond)
			what, err := i.do(n, ctx)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", what, err)
			}
			if what != "" {
				say("%8s  %s", at, what)
				n.counts[i.name]++
			}
			break
		}
	}
}

// away is how long something is away.
func (n *injector) away() time.Duration {
	return time.Duration(n.rand.Int64N(int64(3 * time.Second))).Round(time.Millisecond)
}

func (n *injector) replica() *program { return n.running[n.rand.IntN(len(n.running))] }

func (n *injector) killReplica(ctx context.Context) (string, error) {
	which, down := n.replica(), n.away()
	which.kill()
	time.Sleep(down)
	return fmt.Sprintf("kill -9 %s, away for %s", which.name, down), n.startReplica(ctx, which)
}

func (n *injector) roll(ctx context.Context) (string, error) {
	which := n.replica()
	what := fmt.Sprintf("SIGTERM %s, and start it again", which.name)
	if err := which.term(); err != nil {
		return what, err
	}
	return what, n.startReplica(ctx, which)
}

func (n *injector) restartClarifai(ctx context.Context) (string, error) {
	return n.clarifaiAway(ctx, n.clarifai.term)
}

func (n *injector) killClarifai(ctx context.Context) (string, error) {
	return n.clarifaiAway(ctx, func() error { n.clarifai.kill(); return nil })
}

func (n *injector) clarifaiAway(ctx context.Context, end func() error) (string, error) {
	down := n.away()
	what := fmt.Sprintf("restart Clarifai, away for %s", down)
	n.keepCalls(ctx)
	if err := end(); err != nil {
		return what, err
	}
	time.Sleep(down)
	if err := n.clarifai.start(); err != nil {
		return what, err
	}
	if err := n.clarifai.up(ctx, "/_sim/state"); err != nil {
		return what, err
	}
	return what, n.faults(ctx, upstreamFaults)
}

func (n *injector) crashPostgres(ctx context.Context) (string, error) {
	down := n.away()
	what := fmt.Sprintf("crash Postgres, away for %s", down)
	if err := n.cluster.Kill(); err != nil {
		return what, err
	}
	time.Sleep(down)
	starting, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return what, n.cluster.Start(starting)
}

// lockTable locks a table against readers or writers for up to a minute, while other faults go on. A crash of
// Postgres ends the lock. One table is locked at a time.
func (n *injector) lockTable(ctx context.Context) (string, error) {
	tables := []string{"tenants", "apps", "keys", "audit_events", "upstream_budget", "pools", "campaigns", "adoptions", "replicas", "reconciliations", "callers"}
	table := tables[n.rand.IntN(len(tables))]
	mode := []string{"ACCESS EXCLUSIVE", "SHARE"}[n.rand.IntN(2)]
	longest := min(time.Minute, n.during/4)
	held := (longest/4 + time.Duration(n.rand.Int64N(int64(longest)*3/4))).Round(time.Millisecond)
	if n.locked.Load() {
		return "", nil
	}
	what := fmt.Sprintf("lock %s in mode %s for %s", table, mode, held)
	conn, err := pgx.Connect(ctx, n.cluster.URL("tenantry"))
	if err != nil {
		return what, err
	}
	if _, err := conn.Exec(ctx, "BEGIN; LOCK TABLE "+table+" IN "+mode+" MODE"); err != nil {
		return what, errors.Join(err, conn.Close(ctx))
	}
	n.locked.Store(true)
	n.locks.Go(func() {
		defer n.locked.Store(false)
		select {
		case <-ctx.Done():
		case <-time.After(held):
		}
		_ = conn.Close(context.WithoutCancel(ctx))
	})
	return what, nil
}

// asSuperuser runs statements as the superuser, in another database than Tenantry's.
func (n *injector) asSuperuser(ctx context.Context, statements ...string) error {
	conn, err := pgx.Connect(ctx, n.cluster.URL("postgres"))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(ctx) }()
	for _, sql := range statements {
		if _, err := conn.Exec(ctx, sql); err != nil {
			return err
		}
	}
	return nil
}

func (n *injector) readOnly(ctx context.Context) (string, error) {
	down := 2 * n.away()
	what := fmt.Sprintf("Postgres is read-only for %s", down)
	if err := n.asSuperuser(ctx, `ALTER SYSTEM SET default_transaction_read_only = on`, `SELECT pg_reload_conf()`); err != nil {
		return what, err
	}
	time.Sleep(down)
	return what, n.asSuperuser(ctx, `ALTER SYSTEM RESET default_transaction_read_only`, `SELECT pg_reload_conf()`)
}

func (n *injector) refuseConnections(ctx context.Context) (string, error) {
	down := 2 * n.away()
	what := fmt.Sprintf("Postgres refuses connections for %s", down)
	if err := n.asSuperuser(ctx, `ALTER DATABASE tenantry ALLOW_CONNECTIONS false`,
		`SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'tenantry'`); err != nil {
		return what, err
	}
	time.Sleep(down)
	return what, n.asSuperuser(ctx, `ALTER DATABASE tenantry ALLOW_CONNECTIONS true`)
}

// replacePAT gives the replicas another PAT, one after the other. The old one is invalid before the last of
// them has the new one.
func (n *injector) replacePAT(ctx context.Context) (string, error) {
	const what = "replace the PAT, and restart the replicas with it"
	was := n.pat
	n.newPAT()
	if err := n.sim(ctx, http.MethodPost, "settings", map[string]any{"add_pats": []map[string]any{{"token": n.pat, "user_id": operator}}}, &struct{}{}); err != nil {
		return what, err
	}
	replace := func(env []string) []string {
		env = slices.Clone(env)
		for i, v := range env {
			env[i] = strings.Replace(v, was, n.pat, 1)
		}
		return env
	}
	n.env, n.clarifai.env = replace(n.env), replace(n.clarifai.env)
	for i, p := range n.running {
		if err := p.term(); err != nil {
			return what, err
		}
		p.env = replace(p.env)
		if err := n.startReplica(ctx, p); err != nil {
			return what, err
		}
		if i == 0 {
			if err := n.sim(ctx, http.MethodPost, "settings", map[string]any{"remove_pats": []string{was}}, &struct{}{}); err != nil {
				return what, err
			}
		}
	}
	return what, nil
}

// startReplica starts a replica without waiting for it: Postgres may be away.
func (s *stage) startReplica(ctx context.Context, p *program) error {
	if err := p.start(); err != nil {
		return err
	}
	select {
	case <-p.done:
		return fmt.Errorf("%s has ended (%s); its log is %s", p.name, p.cmd.ProcessState, p.log)
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(100 * time.Millisecond):
		return nil
	}
}

func (s *stage) faults(ctx context.Context, rules []map[string]any) error {
	var now []map[string]any
	return s.sim(ctx, http.MethodPost, "faults", rules, &now)
}
