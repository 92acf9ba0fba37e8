package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/tenantry/tenantry/internal/localpg"
)

// A sample is one measurement.
type sample struct {
	row         row
	connections int
	round       int

	requests  int
	perSecond float64
	p50, p99  time.Duration // 0 where the tool does not say
	// How long the processors worked for it.
	toolCPU, tenantryCPU, postgresCPU time.Duration
}

// requests are what a load tool sends: GETs of the numbers below of, at random, or
// PUTs of one after the other.
type requests struct {
	url, token string
	put        bool
	head, tail string // of the path, around the number
	of         int    // 0: the path has no number
}

// A loader is a load tool. It keeps connections busy for a while, with the next
// request of each when the answer before has come.
type loader interface {
	fmt.Stringer
	load(ctx context.Context, dir string, shape requests, connections int, during time.Duration) (sample, error)
}

// loadTool finds the load tool that is asked for. wrk goes first: of two cores vegeta
// takes more than Tenantry does.
func loadTool(ctx context.Context, name string) (loader, error) {
	path, err := exec.LookPath("wrk")
	if name == "wrk" || name == "" && err == nil {
		if err != nil {
			return nil, errors.New("there is no wrk on PATH: install it (Debian: apt install wrk), or set BENCH_TOOL=vegeta")
		}
		return wrk(path), nil
	}
	if name != "" && name != "vegeta" {
		return nil, fmt.Errorf("BENCH_TOOL: %q must be wrk or vegeta", name)
	}
	// With -n it is built, and where it is is said.
	out, err := exec.CommandContext(ctx, "go", "tool", "-n", "-modfile=tools.mod", "vegeta").Output()
	if err != nil {
		return nil, fmt.Errorf("build vegeta: %w: install wrk, or run this in the repository", err)
	}
	return vegeta(strings.TrimSpace(string(out))), nil
}

// output runs a tool, and says how much of the processors it took.
func output(cmd *exec.Cmd) (string, time.Duration, error) {
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", 0, fmt.Errorf("%s: %w: %s", filepath.Base(cmd.Path), err, lastLine(stderr.String()+string(out)))
	}
	return string(out), cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(), nil
}

type wrk string

func (wrk) String() string { return "wrk" }

// wrkScript is completed with the request before and after the number.
const wrkScript = `
local head, tail, of, inOrder = %q, %q, %d, %t
local i = 0
math.randomseed(%d)
function request()
	if of == 0 then return head .. tail end
	if inOrder then i = i + 1 else i = math.random(0, of - 1) end
	return head .. string.format("%%06d", i) .. tail
end
function done(summary, latency)
	local e = summary.errors
	print(string.format("measured %%d %%d %%d %%d %%d", summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
		e.connect + e.read + e.write + e.status + e.timeout))
end
`

func (w wrk) load(ctx context.Context, dir string, shape requests, connections int, during time.Duration) (got sample, err error) {
	u, err := url.Parse(shape.url)
	if err != nil {
		return got, err
	}
	method, end := "GET ", "\r\n\r\n"
	if shape.put {
		method, end = "PUT ", "\r\nContent-Length: 0\r\n\r\n"
	}
	script := filepath.Join(dir, "load.lua")
	text := fmt.Sprintf(wrkScript, method+shape.head, shape.tail+" HTTP/1.1\r\nHost: "+u.Host+"\r\nAuthorization: Bearer "+shape.token+end,
		shape.of, shape.put, rand.Int32())
	if err := os.WriteFile(script, []byte(text), 0o600); err != nil {
		return got, err
	}
	// One thread of it loads two cores.
	out, cpu, err := output(exec.CommandContext(ctx, string(w), "-t1", fmt.Sprint("-c", connections), fmt.Sprintf("-d%ds", int(during.Seconds())),
		"--timeout", "10s", "-s", script, shape.url))
	if err != nil {
		return got, err
	}
	got.toolCPU = cpu
	return got, got.readWrk(out)
}

func (s *sample) readWrk(out string) error {
	_, line, _ := strings.Cut(out, "measured ")
	var took, p50, p99, failed int64 // the first three in microseconds
	if _, err := fmt.Sscan(line, &s.requests, &took, &p50, &p99, &failed); err != nil {
		return fmt.Errorf("wrk ends with %q", lastLine(out))
	}
	if failed > 0 || s.requests == 0 {
		return fmt.Errorf("%d requests failed, of %d", failed, s.requests)
	}
	s.perSecond = float64(s.requests) / (time.Duration(took) * time.Microsecond).Seconds()
	s.p50, s.p99 = time.Duration(p50)*time.Microsecond, time.Duration(p99)*time.Microsecond
	return nil
}

type vegeta string

func (vegeta) String() string { return "vegeta" }

func (v vegeta) load(ctx context.Context, dir string, shape requests, connections int, during time.Duration) (got sample, err error) {
	method, order := "GET", rand.Perm(max(1, shape.of))
	if shape.put {
		method = "PUT"
	}
	var text bytes.Buffer
	for i, number := range order {
		path := shape.head + shape.tail
		if shape.put {
			number = i
		}
		if shape.of > 0 {
			path = shape.head + numbered(number) + shape.tail
		}
		fmt.Fprintf(&text, "%s %s%s\nAuthorization: Bearer %s\n\n", method, shape.url, path, shape.token)
	}
	targets, results := filepath.Join(dir, "targets"), filepath.Join(dir, "results")
	if err := os.WriteFile(targets, text.Bytes(), 0o600); err != nil {
		return got, err
	}
	n := strconv.Itoa(connections)
	_, cpu, err := output(exec.CommandContext(ctx, string(v), "attack", "-targets", targets, "-output", results, "-rate", "0", "-workers", n,
		"-max-workers", n, "-connections", n, "-keepalive", "-max-body", "0", "-timeout", "10s", "-duration", during.String()))
	if err != nil {
		return got, err
	}
	out, _, err := output(exec.CommandContext(ctx, string(v), "report", "-type=json", results))
	if err != nil {
		return got, err
	}
	got.toolCPU = cpu
	return got, got.readVegeta(out, shape.put)
}

func (s *sample) readVegeta(out string, put bool) error {
	var report struct {
		Requests  int
		Rate      float64
		Latencies struct {
			P50 time.Duration `json:"50th"`
			P99 time.Duration `json:"99th"`
		}
		StatusCodes map[string]int `json:"status_codes"`
		Errors      []string
	}
	if err := json.Unmarshal([]byte(out), &report); err != nil {
		return err
	}
	expected := "200"
	if put {
		expected = "201"
	}
	if good := report.StatusCodes[expected]; good == 0 || good != report.Requests {
		return fmt.Errorf("of %d requests %d were answered %s: %v %v", report.Requests, good, expected, report.StatusCodes, report.Errors)
	}
	s.requests, s.perSecond = report.Requests, report.Rate
	s.p50, s.p99 = report.Latencies.P50, report.Latencies.P99
	return nil
}

// findPgbench finds the pgbench of the Postgres that is measured, or any other.
func findPgbench(ctx context.Context) (string, error) {
	bin, err := localpg.FindOrFetch(ctx, func(s string) { fmt.Fprintln(os.Stderr, s) })
	if err != nil {
		return "", err
	}
	if path, err := exec.LookPath(filepath.Join(bin.Dir, "pgbench")); err == nil {
		return path, nil
	}
	if path, err := exec.LookPath("pgbench"); err == nil {
		return path, nil
	}
	return "", fmt.Errorf("there is no pgbench in %s, nor on PATH: install the Postgres server (Debian: apt install postgresql; elsewhere it may be in postgresql-contrib), and set PG_BINDIR if it is not found",
		bin.Dir)
}

// runPgbench runs pgbench over TCP, as Tenantry reaches its database.
func (s *stage) runPgbench(ctx context.Context, path string, args ...string) (got sample, err error) {
	u, err := url.Parse(s.cluster.URL("pgbench"))
	if err != nil {
		return got, err
	}
	password, _ := u.User.Password()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = []string{"LC_ALL=C", "PGHOST=" + u.Hostname(), "PGPORT=" + u.Port(), "PGUSER=" + u.User.Username(), "PGPASSWORD=" + password,
		"PGDATABASE=pgbench", "PGSSLMODE=disable"}
	out, cpu, err := output(cmd)
	if err != nil || args[0] == "-i" {
		return got, err
	}
	got.toolCPU = cpu
	return got, got.readPgbench(out)
}

func (s *stage) pgbench(ctx context.Context, path, mode string, clients int, during time.Duration) (sample, error) {
	return s.runPgbench(ctx, path, mode, "-n", "-M", "prepared", "-c", strconv.Itoa(clients), "-j", strconv.Itoa(min(clients, runtime.NumCPU())),
		"-T", strconv.Itoa(int(during.Seconds())))
}

var (
	pgbenchDone   = regexp.MustCompile(`(?m)^number of transactions actually processed: (\d+)`)
	pgbenchRate   = regexp.MustCompile(`(?m)^tps = ([0-9.]+) \(without initial connection time\)|^tps = ([0-9.]+) \(excluding`)
	pgbenchFailed = regexp.MustCompile(`(?m)^number of failed transactions: ([1-9]\d*)`)
)

func (s *sample) readPgbench(out string) error {
	done, rate := pgbenchDone.FindStringSubmatch(out), pgbenchRate.FindStringSubmatch(out)
	if done == nil || rate == nil || pgbenchFailed.MatchString(out) {
		return fmt.Errorf("pgbench ends with %q", lastLine(out))
	}
	var err, fault error
	s.requests, err = strconv.Atoi(done[1])
	s.perSecond, fault = strconv.ParseFloat(cmp.Or(rate[1], rate[2]), 64)
	return errors.Join(err, fault)
}
