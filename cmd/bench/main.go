// Command bench measures Tenantry against what the same machine can do at the same
// moment: look-ups, reveals, lists and sign-ups, beside pgbench on the same cluster
// and a bare handler that always answers the same. It starts a private Postgres that
// keeps what it commits, the simulated Clarifai and Tenantry, loads them with wrk, or
// with vegeta where there is no wrk, and prints one table.
//
// BENCH_SHORT=1 measures once, and ends within 3 minutes. BENCH_TOOL (wrk or vegeta)
// chooses the load tool. BENCH_DIR (bench) is where the CSV and the plot go.
//
// It exits with 2 if something could not be measured.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/go-chi/chi/v5"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	if err := run(ctx, os.Getenv, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(2)
	}
}

// connections are how many clients there are at once.
var connections = []int{1, 8, 32, 128}

const (
	tenants  = 20_000 // that are looked up
	listSize = 100
	// mostSignUps is how many sign-ups a second the pool is filled for.
	mostSignUps = 4000
)

// A row is what is measured: one line of the table.
type row struct {
	name string
	// against is the baseline that does what the database has to do at least for it:
	// read, or commit. Of a baseline it is empty.
	against string
	// target is where the ratio to against is to be at 32 connections; 0 is anywhere.
	target  float64
	measure func(ctx context.Context, connections int, during time.Duration) (sample, error)
}

const (
	pgRead  = "pgbench -S"
	pgWrite = "pgbench -N"
	bare    = "bare handler"
)

func run(ctx context.Context, getenv func(string) string, out io.Writer) (err error) {
	say := func(format string, args ...any) { _, _ = fmt.Fprintf(out, format+"\n", args...) }
	rounds, during := 3, 4*time.Second
	if s := getenv("BENCH_SHORT"); s != "" && s != "0" {
		rounds, during = 1, 2*time.Second
	}
	tool, err := loadTool(ctx, getenv("BENCH_TOOL"))
	if err != nil {
		return err
	}
	pgbench, err := findPgbench(ctx)
	if err != nil {
		return err
	}
	results, err := filepath.Abs(cmp.Or(getenv("BENCH_DIR"), "bench"))
	if err != nil {
		return err
	}
	if err := os.MkdirAll(results, 0o755); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "tenantry-bench-")
	if err != nil {
		return err
	}
	if err := os.Chmod(dir, 0o755); err != nil { // Postgres may run as another user
		return err
	}
	say("starting Postgres, the simulated Clarifai and Tenantry; logs in %s", dir)
	s, err := raise(ctx, dir)
	defer func() {
		// The logs are kept for whoever has to find out what went wrong.
		if err = errors.Join(err, s.strike()); err == nil || ctx.Err() != nil {
			_ = os.RemoveAll(dir)
		}
	}()
	if err != nil {
		return err
	}
	if err := s.fill(ctx, pgbench); err != nil {
		return fmt.Errorf("fill the database: %w", err)
	}
	rows, closeBare, err := s.rows(ctx, tool, pgbench)
	if err != nil {
		return err
	}
	defer closeBare()

	say("%d cores, shared with the load: %s and pgbench; %d round(s) of %s each", runtime.NumCPU(), tool, rounds, during)
	for _, r := range rows { // once unseen: connections are opened, statements prepared, pages read
		if _, err := r.measure(ctx, 8, time.Second); err != nil {
			return fmt.Errorf("%s: %w", r.name, err)
		}
	}
	var taken samples
	began := time.Now()
	for _, n := range connections {
		for round := range rounds {
			for _, r := range rows {
				got, err := r.measure(ctx, n, during)
				if err != nil {
					return fmt.Errorf("%s at %d connections: %w", r.name, n, err)
				}
				got.row, got.connections, got.round = r, n, round+1
				taken = append(taken, got)
			}
		}
		taken.table(out, rows, n)
	}
	name := filepath.Join(results, began.UTC().Format("20060102-150405"))
	if err := taken.writeFiles(name, tool.String(), rows); err != nil {
		return err
	}
	say("\nwritten: %s.csv and .svg", name)
	return nil
}

// rows are what is measured, in the order in which it is: what is compared stands
// near its baseline.
func (s *stage) rows(ctx context.Context, tool loader, pgbench string) (rows []row, closeBare func(), err error) {
	load := func(url string, shape requests) func(context.Context, int, time.Duration) (sample, error) {
		shape.url, shape.token = url, s.token
		return func(ctx context.Context, n int, during time.Duration) (sample, error) {
			return s.withCPU(func() (sample, error) { return tool.load(ctx, s.dir, shape, n, during) })
		}
	}
	pg := func(mode string) func(context.Context, int, time.Duration) (sample, error) {
		return func(ctx context.Context, n int, during time.Duration) (sample, error) {
			return s.withCPU(func() (sample, error) { return s.pgbench(ctx, pgbench, mode, n, during) })
		}
	}
	tenantry := s.tenantry.url
	answer, err := s.get(ctx, "/v1/tenants/"+tenantID(0))
	if err != nil {
		return nil, nil, err
	}
	constant, closeBare, err := serveConstant(answer)
	if err != nil {
		return nil, nil, err
	}
	perTenant := requests{head: "/v1/tenants/" + tenantPrefix, of: tenants}
	reveal := perTenant
	reveal.tail = "/keys/default/secret"
	return []row{
		{name: pgRead, measure: pg("-S")},
		{name: bare, measure: load(constant, perTenant)},
		{name: "look-up by tenant", against: pgRead, target: 0.45, measure: load(tenantry, perTenant)},
		{name: "look-up by app", against: pgRead, measure: load(tenantry, requests{head: "/v1/apps/" + appPrefix, of: tenants})},
		{name: "list of 100", against: pgRead, measure: load(tenantry, requests{head: fmt.Sprint("/v1/tenants?limit=", listSize)})},
		{name: pgWrite, measure: pg("-N")},
		{name: "secret reveal", against: pgWrite, measure: load(tenantry, reveal)},
		{name: "pooled sign-up", against: pgWrite, target: 0.60, measure: s.signUps(tenantry, tool)},
	}, closeBare, nil
}

// signUps measures sign-ups that find a ready app, each of a tenant that is new.
func (s *stage) signUps(url string, tool loader) func(context.Context, int, time.Duration) (sample, error) {
	turn := 0
	return func(ctx context.Context, n int, during time.Duration) (got sample, err error) {
		ready := int(during.Seconds() * mostSignUps)
		if err := s.fillPool(ctx, ready); err != nil {
			return got, err
		}
		turn++
		shape := requests{url: url, token: s.token, put: true, head: fmt.Sprintf("/v1/tenants/new_%d_", turn), of: ready}
		if got, err = s.withCPU(func() (sample, error) { return tool.load(ctx, s.dir, shape, n, during) }); err != nil {
			return got, err
		}
		return got, s.allPooled(ctx)
	}
}

// serveConstant serves a constant answer, as chi does it without anything of ours.
func serveConstant(answer []byte) (url string, stop func(), err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", nil, err
	}
	r := chi.NewRouter()
	r.Get("/v1/tenants/{tenant_id}", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(answer)
	})
	srv := &http.Server{Handler: r, ReadHeaderTimeout: 5 * time.Second}
	done := make(chan struct{})
	go func() { defer close(done); _ = srv.Serve(l) }()
	return "http://" + l.Addr().String(), func() { _ = srv.Close(); <-done }, nil
}

// tenantID is one of those that are there from the beginning.
func tenantID(i int) string { return tenantPrefix + numbered(i) }

const (
	tenantPrefix = "there_"
	appPrefix    = "there-"
)

// numbered is how ids are told apart: of one length, as ids are.
func numbered(i int) string { return fmt.Sprintf("%06d", i) }

// lastLine is where programs say what went wrong.
func lastLine(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return lines[len(lines)-1]
}
