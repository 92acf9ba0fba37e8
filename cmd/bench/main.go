// Command bench measures Tenantry against what the same machine can do at the same
// moment: look-ups, reveals, lists and sign-ups, beside pgbench on the same cluster
// and a bare handler that always answers the same. It starts a private Postgres that
// keeps what it commits, the simulated Clarifai and Tenantry, loads them with wrk, or
// with vegeta where there is no wrk, and prints tables and how far it is to the targets.
//
//	bench           the tables
//	bench growth    the same with BENCH_TENANTS tenants (10000000) beside ten thousand
//
// BENCH_SHORT=1 measures once, and ends within 3 minutes. BENCH_ROWS, a regular expression,
// chooses rows. BENCH_TOOL (wrk or vegeta) chooses the load tool. BENCH_DIR (bench) is where the CSV and the plot go, and with
// BENCH_PROFILE=1 the profiles of Tenantry for each row at 32 connections.
//
// It exits with 2 if something could not be measured.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	if err := run(ctx, os.Args[1:], os.Getenv, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(2)
	}
}

// connections are how many clients there are at once.
var connections = []int{1, 8, 32, 128}

const (
	// targetAt is at how many connections the targets are.
	targetAt = 32
	// there are so many tenants that are looked up, where not their number is the question.
	there = 20_000
)

// A bench is one run: how it measures, and what.
type bench struct {
	short    bool
	tool     loader
	pgbench  string
	results  string // how the files are named that it writes
	profile  bool
	only     *regexp.Regexp // the rows that are measured, besides the baselines
	out      io.Writer
	stage    *stage
	figures  []figure
	failures []error // of rows
}

// failed reports a row that failed. The run goes on, unless it was stopped: then failed returns err.
func (b *bench) failed(ctx context.Context, what string, err error) error {
	err = fmt.Errorf("%s: %w", what, err)
	if ctx.Err() != nil {
		return err
	}
	b.say("FAILED: %v", err)
	b.failures = append(b.failures, err)
	return nil
}

func (b *bench) say(format string, args ...any) { _, _ = fmt.Fprintf(b.out, format+"\n", args...) }

// during is how long a row is measured at so many connections. The tools count in seconds.
func (b *bench) during(connections int) time.Duration {
	switch {
	case !b.short:
		return 3 * time.Second
	case connections < targetAt:
		return time.Second
	default:
		return 2 * time.Second
	}
}

// rounds is how often each row is measured at each number of connections.
func (b *bench) rounds() int {
	if b.short {
		return 1
	}
	return 3
}

func run(ctx context.Context, args []string, getenv func(string) string, out io.Writer) (err error) {
	set := func(name string) bool { s := getenv(name); return s != "" && s != "0" && s != "false" }
	b := &bench{short: set("BENCH_SHORT"), profile: set("BENCH_PROFILE"), out: out}
	if b.only, err = regexp.Compile(getenv("BENCH_ROWS")); err != nil {
		return fmt.Errorf("BENCH_ROWS: %w", err)
	}
	many, err := strconv.Atoi(cmp.Or(getenv("BENCH_TENANTS"), "10000000"))
	if err != nil || many < few || many > 90_000_000 {
		return fmt.Errorf("BENCH_TENANTS: %q must be a number from %d to 90000000", getenv("BENCH_TENANTS"), few)
	}
	var measure func(context.Context) error
	settings := []string{"shared_buffers=512MB"} // all that is read fits, of Tenantry as of pgbench
	switch {
	case len(args) == 0:
		measure = b.measureRows
	case len(args) == 1 && args[0] == "growth":
		measure, settings = func(ctx context.Context) error { return b.measureGrowth(ctx, many) }, loading
	default:
		return fmt.Errorf("there is no %q: bench, or bench growth", strings.Join(args, " "))
	}
	if b.tool, err = loadTool(ctx, getenv("BENCH_TOOL")); err != nil {
		return err
	}
	if b.pgbench, err = findPgbench(ctx); err != nil {
		return err
	}
	results, err := filepath.Abs(cmp.Or(getenv("BENCH_DIR"), "bench"))
	if err != nil {
		return err
	}
	if err := os.MkdirAll(results, 0o755); err != nil {
		return err
	}
	b.results = filepath.Join(results, time.Now().UTC().Format("20060102-150405"))
	dir, err := os.MkdirTemp("", "tenantry-bench-")
	if err != nil {
		return err
	}
	if err := os.Chmod(dir, 0o755); err != nil { // Postgres may run as another user
		return err
	}
	b.say("starting Postgres, the simulated Clarifai and Tenantry; logs in %s", dir)
	b.stage, err = raise(ctx, dir, settings...)
	defer func() {
		// The logs are kept for whoever has to find out what went wrong.
		if err = errors.Join(err, b.stage.strike()); err == nil || ctx.Err() != nil {
			_ = os.RemoveAll(dir)
		}
	}()
	if err != nil {
		return err
	}
	err = measure(ctx)
	return errors.Join(append(b.failures, err)...)
}

// lastLine is where programs say what went wrong.
func lastLine(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return lines[len(lines)-1]
}
