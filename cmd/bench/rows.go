package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/go-chi/chi/v5"
)

// A row is what is measured: one line of the table.
type row struct {
	name string
	// against is the baseline that does what the database has to do at least for it:
	// read, or commit. Of a baseline it is empty.
	against string
	// target is where the ratio to targetOf is to be at targetAt connections; 0 is anywhere.
	target   float64
	targetOf string
	// upstream is taken off the times: what the calls to Clarifai take by themselves.
	upstream time.Duration
	replica  *replica // that is measured; of a baseline nil
	aside    bool     // paused but for this row

	warm   func(ctx context.Context) error                       // once; may be nil
	before func(ctx context.Context, during time.Duration) error // each time, unmeasured; may be nil
	load   func(ctx context.Context, connections int, during time.Duration) (sample, error)
	after  func(ctx context.Context, got sample) error // whether it was what it should be; may be nil
	settle func(ctx context.Context) error             // waits until it may be paused; may be nil
}

const (
	pgRead  = "pgbench -S"
	pgWrite = "pgbench -N"
	bare    = "bare handler"

	uncached = "Cache-Control: no-cache"
	// latency is of the simulated Clarifai. A built sign-up makes two calls.
	latency = 50 * time.Millisecond

	listSize = 100
)

// measureRows measures all rows, and what else there is a target for.
func (b *bench) measureRows(ctx context.Context) error {
	main, err := b.raiseMain(ctx)
	if err != nil {
		return err
	}
	if err := b.measureStart(ctx, main); err != nil {
		if err := b.failed(ctx, "measure the start", err); err != nil {
			return err
		}
	}
	rows, closeBare, err := b.rows(ctx, main)
	if err != nil {
		return err
	}
	defer closeBare()
	rows = slices.DeleteFunc(rows, func(r row) bool {
		return !b.only.MatchString(r.name) && r.name != bare && r.name != pgRead && r.name != pgWrite
	})

	b.say("%d cores, shared with the load: %s and pgbench; %d round(s) of %s each at %d connections", runtime.NumCPU(), b.tool, b.rounds(), b.during(targetAt), targetAt)
	for _, r := range rows { // once unseen: connections are opened, statements prepared, pages read
		var err error
		if r.warm != nil {
			err = r.warm(ctx)
		}
		if err == nil {
			_, err = b.measure(ctx, r, 8, time.Second)
		}
		if err != nil {
			if err := b.failed(ctx, r.name, err); err != nil {
				return err
			}
		}
	}
	var taken samples
	for _, n := range connections {
		for round := range b.rounds() {
			for _, r := range rows {
				profiled := func() {}
				if n == targetAt && round == 0 {
					profiled = b.profiles(ctx, r, b.during(n))
				}
				got, err := b.measure(ctx, r, n, b.during(n))
				profiled()
				if err != nil {
					if err := b.failed(ctx, fmt.Sprintf("%s at %d connections", r.name, n), err); err != nil {
						return err
					}
					continue
				}
				got.row, got.connections, got.round = r, n, round+1
				taken = append(taken, got)
			}
		}
		taken.table(b.out, rows, n)
	}
	for _, r := range rows {
		if r.target > 0 {
			b.figures = append(b.figures, figure{what: r.name + ", to " + r.targetOf, target: r.target, least: true, digits: 2,
				value: taken.of(r.name, targetAt).median(func(s sample) float64 { return taken.ratio(s, r.targetOf) })})
		}
	}
	if err := b.measureThrottled(ctx, main); err != nil {
		if err := b.failed(ctx, "measure sign-ups while Clarifai is slow", err); err != nil {
			return err
		}
	}
	if !b.short {
		if err := b.measureMemory(ctx, main); err != nil {
			if err := b.failed(ctx, "measure the memory", err); err != nil {
				return err
			}
		}
	}
	return b.finish(taken, rows)
}

// raiseMain starts the Tenantry that most rows are about, and fills its database and that
// of pgbench.
func (b *bench) raiseMain(ctx context.Context) (*replica, error) {
	clarifai, err := b.stage.clarifai(ctx, "clarifaisim", latency)
	if err != nil {
		return nil, err
	}
	main, err := b.stage.replica(ctx, "tenantry", clarifai)
	if err != nil {
		return nil, err
	}
	if err := main.populate(ctx, there); err != nil {
		return nil, fmt.Errorf("fill the database: %w", err)
	}
	if err := b.stage.cluster.CreateDatabase(ctx, "pgbench"); err != nil {
		return nil, err
	}
	_, err = b.stage.runPgbench(ctx, b.pgbench, "-i", "-q", "-s", "5")
	return main, err
}

// measure measures a row once.
func (b *bench) measure(ctx context.Context, r row, n int, during time.Duration) (got sample, err error) {
	if r.aside {
		r.replica.goOn()
		defer func() {
			if err == nil && r.settle != nil {
				err = r.settle(ctx)
			}
			r.replica.pause()
		}()
	}
	if r.before != nil {
		if err := r.before(ctx, during); err != nil {
			return got, err
		}
	}
	if got, err = b.stage.withCPU(r.replica, func() (sample, error) { return r.load(ctx, n, during) }); err != nil {
		return got, err
	}
	got.p50, got.p99 = max(0, got.p50-r.upstream), max(0, got.p99-r.upstream)
	if r.after != nil {
		err = r.after(ctx, got)
	}
	return got, err
}

// rows are what is measured, in the order in which it is: what is compared stands
// near its baseline.
func (b *bench) rows(ctx context.Context, main *replica) (rows []row, closeBare func(), err error) {
	pg := func(mode string) func(context.Context, int, time.Duration) (sample, error) {
		return func(ctx context.Context, n int, during time.Duration) (sample, error) {
			return b.stage.runPgbenchMode(ctx, b.pgbench, mode, n, during)
		}
	}
	answer, err := main.get(ctx, "/v1/tenants/"+tenantPrefix+numbered(0))
	if err != nil {
		return nil, nil, err
	}
	deep, err := main.deepList(ctx, there)
	if err != nil {
		return nil, nil, err
	}
	// Another Clarifai, so that one can be slow and the other not, and Tenantrys that call it:
	// one that builds for each sign-up and is allowed as many calls as it can make, and one
	// whose tenants wait.
	clarifai, err := b.stage.clarifai(ctx, "clarifaisim-aside", latency)
	if err != nil {
		return nil, nil, err
	}
	builder, err := b.stage.replica(ctx, "builder", clarifai, noPool, "TENANTRY_UPSTREAM_RATE=100000", "TENANTRY_WORKERS=128")
	if err != nil {
		return nil, nil, err
	}
	builder.pause()
	batcher, err := b.stage.replica(ctx, "batcher", clarifai, noPool)
	if err != nil {
		return nil, nil, err
	}
	batcher.pause()
	constant, closeBare, err := serveConstant(answer)
	if err != nil {
		return nil, nil, err
	}
	byTenant := requests{path: "/v1/tenants/" + tenantPrefix + slot, of: there}
	fresh, reveal := byTenant, byTenant
	fresh.header = uncached
	reveal.path += "/keys/default/secret"
	baseline := byTenant
	baseline.url, baseline.token = constant, main.token
	cached := b.row(main, "look-up, cached", pgRead, byTenant)
	cached.warm = func(ctx context.Context) error { return main.readAll(ctx, there) }
	cached.target, cached.targetOf = 0.70, bare
	lookUp := b.row(main, "look-up, uncached", pgRead, fresh)
	lookUp.target, lookUp.targetOf = 0.45, pgRead
	signUp := b.signUps(main, "pooled sign-up")
	signUp.target, signUp.targetOf = 0.60, pgWrite
	return []row{
		{name: pgRead, load: pg("-S")},
		{name: bare, load: func(ctx context.Context, n int, during time.Duration) (sample, error) {
			before := ownCPU() // which serves it
			got, err := b.tool.load(ctx, b.stage.dir, baseline, n, during)
			got.tenantryCPU = ownCPU() - before
			return got, err
		}},
		cached,
		lookUp,
		b.row(main, "look-up by app", pgRead, requests{path: "/v1/apps/" + appPrefix + slot, header: uncached, of: there}),
		b.row(main, "list of 100", pgRead, requests{path: fmt.Sprint("/v1/tenants?limit=", listSize)}),
		b.row(main, "list, deep", pgRead, requests{path: deep}),
		{name: pgWrite, load: pg("-N")},
		b.row(main, "secret reveal", pgWrite, reveal),
		b.row(main, "identify", pgWrite, identify(there)),
		signUp,
		b.builtSignUps(builder),
		b.batches(batcher),
	}, closeBare, nil
}

// row is one whose requests go to a replica.
func (b *bench) row(r *replica, name, against string, shape requests) row {
	shape.url, shape.token = r.url, r.token
	return row{name: name, against: against, replica: r, load: func(ctx context.Context, n int, during time.Duration) (sample, error) {
		return b.tool.load(ctx, b.stage.dir, shape, n, during)
	}}
}

// identify asks whose key this is, of one of that many tenants.
func identify(of int) requests {
	return requests{method: http.MethodPost, path: "/v1/keys/identify", header: uncached, body: `{"key":"` + knownSecret + slot + `"}`, of: of}
}

// deepList is the path of a page nine tenths down the order of n tenants.
func (r *replica) deepList(ctx context.Context, n int) (string, error) {
	var at time.Time
	if err := r.conn.QueryRow(ctx, `SELECT created_at FROM tenants WHERE id = $1`, tenantPrefix+numbered(n/10*9)).Scan(&at); err != nil {
		return "", err
	}
	page, err := r.get(ctx, "/v1/tenants?limit=1&created_after="+url.QueryEscape(at.UTC().Format(time.RFC3339Nano)))
	if err != nil {
		return "", err
	}
	_, cursor, ok := strings.Cut(string(page), `"next_cursor":"`)
	cursor, _, ended := strings.Cut(cursor, `"`)
	if !ok || !ended {
		return "", fmt.Errorf("a page deep in the order has no next one: %.200s", page)
	}
	return fmt.Sprintf("/v1/tenants?limit=%d&cursor=%s", listSize, url.QueryEscape(cursor)), nil
}

// signUps are of tenants that are new, each of which finds a ready app. The pool is filled
// for what the fastest measurement so far would take with some to spare.
func (b *bench) signUps(r *replica, name string) row {
	fastest := 2500.0
	var prefix string
	return row{name: name, against: pgWrite, replica: r,
		before: func(ctx context.Context, during time.Duration) error {
			r.turns++
			prefix = fmt.Sprintf("new_%d_%d_", os.Getpid(), r.turns)
			return r.fillPool(ctx, int(during.Seconds()*4*fastest))
		},
		load: func(ctx context.Context, n int, during time.Duration) (sample, error) {
			shape := requests{url: r.url, token: r.token, method: http.MethodPut, path: "/v1/tenants/" + prefix + slot, of: 100_000, inOrder: true, created: true}
			return b.tool.load(ctx, b.stage.dir, shape, n, during)
		},
		after: func(ctx context.Context, got sample) error {
			fastest = max(fastest, got.perSecond)
			return r.allPooled(ctx, prefix)
		}}
}

// builtSignUps are of tenants for each of which an app and a key are made at Clarifai.
func (b *bench) builtSignUps(r *replica) row {
	turn := 0
	return row{name: "built sign-up", replica: r, aside: true, upstream: 2 * latency,
		// The first after a pause is not measured: what had timed out meanwhile is begun anew.
		before: func(ctx context.Context, _ time.Duration) error {
			turn++
			req, err := http.NewRequestWithContext(ctx, http.MethodPut, fmt.Sprintf("%s/v1/tenants/first_%d", r.url, turn), nil)
			if err != nil {
				return err
			}
			req.Header.Set("Authorization", "Bearer "+r.token)
			_, err = answerOf(req)
			return err
		},
		load: func(ctx context.Context, n int, during time.Duration) (sample, error) {
			shape := requests{url: r.url, token: r.token, method: http.MethodPut, path: fmt.Sprintf("/v1/tenants/new_%d_%s", turn, slot), of: 100_000, inOrder: true,
				created: true}
			return b.tool.load(ctx, b.stage.dir, shape, n, during)
		},
		// No call to Clarifai is under way then, which would time out.
		settle: func(ctx context.Context) error {
			return await(ctx, "all apps are built and marked; the log is "+r.log, answerPause, patience, func() (done bool, err error) {
				err = r.conn.QueryRow(ctx, `SELECT NOT EXISTS (SELECT FROM apps WHERE state = 'building' OR state = 'held' AND pending)`).Scan(&done)
				return done, err
			})
		}}
}

// batchSize is how many sign-ups are sent at once.
const batchSize = 100

// batches are of sign-ups that are accepted many at once; what is counted are the sign-ups, and
// the times are of the batches. Their tenants wait: the rate of calls to Clarifai is another
// matter.
func (b *bench) batches(r *replica) row {
	turn := 0
	var prefix string
	return row{name: fmt.Sprintf("sign-up in a batch of %d", batchSize), against: pgWrite, replica: r, aside: true,
		load: func(ctx context.Context, n int, during time.Duration) (sample, error) {
			turn++
			prefix = fmt.Sprintf("batch_%d_", turn)
			got, err := b.tool.load(ctx, b.stage.dir, requests{url: r.url, token: r.token, method: http.MethodPost, path: "/v1/tenants/batch",
				body: `{"tenants":[` + slots + `]}`, item: `{"id":"` + prefix + slot + `","display_name":"A user"}`, items: batchSize,
				of: 1_000_000, inOrder: true}, n, during)
			got.requests *= batchSize
			got.perSecond *= batchSize
			return got, err
		},
		after: func(ctx context.Context, got sample) error {
			var made int
			err := r.conn.QueryRow(ctx, `SELECT count(*) FROM tenants WHERE id >= $1 AND id < $1 || '~'`, prefix).Scan(&made)
			if err == nil && made < got.requests {
				err = fmt.Errorf("of %d sign-ups %d are in the database", got.requests, made)
			}
			return err
		}}
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

// profiles takes profiles of a row's replica while it is measured, if they are asked for.
// The func it returns ends when they are there.
func (b *bench) profiles(ctx context.Context, r row, during time.Duration) (taken func()) {
	if !b.profile || r.replica == nil {
		return func() {}
	}
	done := make(chan struct{})
	name := b.results + "-" + strings.ReplaceAll(strings.ReplaceAll(r.name, ",", ""), " ", "-")
	take := func(path, kind string) {
		if err := r.replica.profile(ctx, path, name+"-"+kind+".pprof"); err != nil {
			b.say("%s: no profile: %v", r.name, err)
		}
	}
	go func() {
		defer close(done)
		take(fmt.Sprintf("/debug/pprof/profile?seconds=%d", int(during.Seconds())), "cpu")
	}()
	return func() {
		if r.aside {
			r.replica.goOn()
			defer r.replica.pause()
		}
		<-done
		take("/debug/pprof/allocs", "allocs")
	}
}

// profile writes one profile to a file.
func (r *replica) profile(ctx context.Context, path, name string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.internal+path, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answers %s", path, resp.Status)
	}
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return err
	}
	return os.WriteFile(name, text, 0o644)
}
