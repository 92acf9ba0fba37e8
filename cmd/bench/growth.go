package main

import (
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"os"
	"text/tabwriter"
	"time"

	"github.com/jackc/pgx/v5"
)

// few is how many tenants it is compared with.
const few = 10_000

var (
	// loading are the settings of Postgres while rows are copied: nothing of that need survive.
	loading = []string{"shared_buffers=1GB", "fsync=off", "synchronous_commit=off", "full_page_writes=off", "wal_level=minimal", "max_wal_senders=0",
		"autovacuum=off", "max_wal_size=8GB"}
	// loaded are those of the measurement. The buffers hold a database of few tenants, and a
	// part of one of many.
	loaded = []string{"shared_buffers=1GB", "max_wal_size=4GB"}
)

// growthAt is at how many connections growth is measured: where nobody waits for another, and
// where the targets are.
var growthAt = []int{1, targetAt}

// A grown is a replica and the tenants in its database.
type grown struct {
	*replica
	tenants int
	rows    []row
}

// measureGrowth measures the same with few tenants and with many, in turns.
func (b *bench) measureGrowth(ctx context.Context, many int) error {
	clarifai, err := b.stage.clarifai(ctx, "clarifaisim", latency)
	if err != nil {
		return err
	}
	sizes := []*grown{{tenants: few}, {tenants: many}}
	for _, g := range sizes {
		name := fmt.Sprint("tenants_", g.tenants)
		if g.replica, err = b.stage.replica(ctx, name, clarifai); err != nil {
			return err
		}
		g.end()
		began := time.Now()
		if err := g.populate(ctx, g.tenants); err != nil {
			return fmt.Errorf("copy %d tenants: %w", g.tenants, err)
		}
		var size string
		if err := g.conn.QueryRow(ctx, `SELECT pg_size_pretty(pg_database_size(current_database()))`).Scan(&size); err != nil {
			return err
		}
		b.say("%d tenants: %s, copied within %s", g.tenants, size, time.Since(began).Round(time.Second))
		_ = g.conn.Close(ctx)
	}
	if err := errors.Join(b.stage.cluster.Stop(ctx), ctx.Err()); err != nil {
		return err
	}
	if err := b.stage.openCluster(ctx, loaded...); err != nil {
		return err
	}
	for _, g := range sizes {
		if err := b.raiseGrown(ctx, g); err != nil {
			return fmt.Errorf("%d tenants: %w", g.tenants, err)
		}
	}
	b.say("%d round(s) of %s each, few and many in turns", b.rounds(), b.during(targetAt))
	var taken samples
	for i := range sizes[0].rows {
		for _, n := range growthAt {
			for round := range b.rounds() {
				for _, g := range sizes {
					got, err := b.measure(ctx, g.rows[i], n, b.during(targetAt))
					if err != nil {
						if err := b.failed(ctx, fmt.Sprintf("%s with %d tenants at %d connections", g.rows[i].name, g.tenants, n), err); err != nil {
							return err
						}
						continue
					}
					got.row, got.connections, got.round, got.tenants = g.rows[i], n, round+1, g.tenants
					taken = append(taken, got)
				}
			}
		}
	}
	for _, n := range growthAt {
		b.growthTable(taken, sizes, n)
	}
	for _, g := range sizes {
		g.goOn()
		if err := b.noteMemory(g.replica, fmt.Sprintf("resident memory after this, %d tenants", g.tenants), 0); err != nil {
			return err
		}
	}
	if err := taken.writeGrowth(b.results + "-growth.csv"); err != nil {
		return err
	}
	b.printFigures()
	b.say("written: %s-growth.csv", b.results)
	return nil
}

// raiseGrown starts a Tenantry on a database that is filled, says how long that takes, and
// waits until it has sealed the events that are there.
func (b *bench) raiseGrown(ctx context.Context, g *grown) (err error) {
	if g.conn, err = pgx.Connect(ctx, b.stage.cluster.URL(g.name)); err != nil {
		return err
	}
	began := time.Now()
	if err := g.start(ctx, startPause); err != nil {
		return err
	}
	b.figures = append(b.figures, figure{what: fmt.Sprintf("start of serve to ready, %d tenants", g.tenants), value: time.Since(began).Seconds(), unit: " s", digits: 2, target: 0.5})
	if err := await(ctx, "the audit log is sealed; the log is "+g.log, answerPause, 10*time.Minute, func() (sealed bool, err error) {
		err = g.conn.QueryRow(ctx, `SELECT coalesce(max(last_id), 0) >= $1 FROM audit_seals`, g.tenants/10).Scan(&sealed)
		return sealed, err
	}); err != nil {
		return err
	}
	deep, err := g.deepList(ctx, g.tenants)
	if err != nil {
		return err
	}
	byTenant := requests{path: "/v1/tenants/" + tenantPrefix + slot, header: uncached, of: g.tenants}
	signUp := b.signUps(g.replica, "pooled sign-up")
	signUp.target = mostGrowth
	lookUp := b.row(g.replica, "look-up by tenant, uncached", pgRead, byTenant)
	lookUp.target = mostGrowth
	g.rows = []row{
		lookUp,
		b.row(g.replica, "look-up by app, uncached", pgRead, requests{path: "/v1/apps/" + appPrefix + slot, header: uncached, of: g.tenants}),
		b.row(g.replica, "identify", pgRead, identify(g.tenants)),
		b.row(g.replica, "list of 100, deep", pgRead, requests{path: deep}),
		b.row(g.replica, "list of 100 of a label", pgRead, requests{path: "/v1/tenants?limit=100&label=cohort%3D" + slot, of: g.tenants / cohort}),
		signUp,
	}
	for i := range g.rows {
		g.rows[i].aside = true
		if _, err := b.measure(ctx, g.rows[i], 8, time.Second); err != nil { // unseen, as for the other rows
			return err
		}
	}
	return nil
}

// mostGrowth is how much longer something may take with many tenants.
const mostGrowth = 1.3

// growthTable prints one number of connections, and notes the figures that have a target.
func (b *bench) growthTable(taken samples, sizes []*grown, connections int) {
	small, large := sizes[0].tenants, sizes[1].tenants
	w := tabwriter.NewWriter(b.out, 0, 0, 2, ' ', tabwriter.AlignRight)
	_, _ = fmt.Fprintf(w, "\n%d connections, tenants:\t%d\t\t\t%d\t\t\tp50 to p50\ttarget\t\n", connections, small, large)
	_, _ = fmt.Fprint(w, "\t/s\tp50 ms\tp99 ms\t/s\tp50 ms\tp99 ms\t\t\t\n")
	for _, r := range sizes[0].rows {
		of := taken.of(r.name, connections)
		a, z := of.with(small), of.with(large)
		grew := z.median(func(s sample) float64 {
			for _, other := range a {
				if other.round == s.round {
					return p50(s) / p50(other)
				}
			}
			return 0
		})
		target := "–"
		if r.target > 0 {
			target = fmt.Sprintf("≤ %.1f", r.target)
			b.figures = append(b.figures, figure{what: fmt.Sprintf("%s, p50 with %d tenants to that with %d, %d connection(s)", r.name, large, small, connections),
				value: grew, digits: 2, target: r.target})
		}
		_, _ = fmt.Fprintf(w, "%s\t%.0f\t%.2f\t%.2f\t%.0f\t%.2f\t%.2f\t%.2f\t%s\t\n", r.name, a.median(perSecond), a.median(p50), a.median(p99),
			z.median(perSecond), z.median(p50), z.median(p99), grew, target)
	}
	_ = w.Flush()
}

// with are the samples of a database of so many tenants.
func (all samples) with(tenants int) samples {
	var of samples
	for _, s := range all {
		if s.tenants == tenants {
			of = append(of, s)
		}
	}
	return of
}

// writeGrowth writes a line for each sample.
func (all samples) writeGrowth(name string) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	w := csv.NewWriter(f)
	_ = w.Write([]string{"tenants", "connections", "round", "row", "requests", "per_second", "p50_ms", "p99_ms", "tenantry_cpu_us", "postgres_cpu_us", "tool_cpu_us"})
	for _, s := range all {
		_ = w.Write([]string{fmt.Sprint(s.tenants), fmt.Sprint(s.connections), fmt.Sprint(s.round), s.row.name, fmt.Sprint(s.requests), fmt.Sprintf("%.1f", s.perSecond),
			fmt.Sprintf("%.3f", p50(s)), fmt.Sprintf("%.3f", p99(s)), fmt.Sprintf("%.1f", tenantryCPU(s)), fmt.Sprintf("%.1f", postgresCPU(s)),
			fmt.Sprintf("%.1f", toolCPU(s))})
	}
	w.Flush()
	return errors.Join(w.Error(), f.Close())
}
