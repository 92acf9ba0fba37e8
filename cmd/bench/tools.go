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
	tenants     int // in the database, where that is the question

	requests  int
	perSecond float64
	p50, p99  time.Duration // 0 where the tool does not say
	// How long the processors worked for it.
	toolCPU, tenantryCPU, postgresCPU time.Duration
}

// requests are what a load tool sends: each is about one number, or about several in a
// row, which stands where slot is, and that is in one place.
type requests struct {
	url, token string
	method     string // GET if it is empty
	path       string
	header     string // one more, such as Cache-Control: no-cache
	body       string
	item       string // what stands in the body, by comma, instead of slots: once for each of items numbers
	items      int    // of one request; 0 is one number, outside of slots
	of         int    // the numbers are below; 0: there is none in the request
	inOrder    bool   // one after the other from 0, and not at random
	created    bool   // 201 is expected, and not 200
}

const (
	slot  = "{n}"     // where a number goes
	slots = "{items}" // where items go
	// digits are the length of all numbers, so that requests are of one length.
	digits = 8
)

// numbered is how ids are told apart: of one length, as ids are.
func numbered(i int) string { return fmt.Sprintf("%0*d", digits, i) }

// with fills numbers in, which begin with first.
func (r requests) with(text string, first int) string {
	if r.items > 0 {
		list := make([]string, r.items)
		for i := range list {
			list[i] = strings.ReplaceAll(r.item, slot, numbered(first+i))
		}
		return strings.Replace(text, slots, strings.Join(list, ","), 1)
	}
	return strings.ReplaceAll(text, slot, numbered(first))
}

// numbers is how many numbers a request takes.
func (r requests) numbers() int { return max(1, r.items) }

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

// wrkScript is completed with what is before and after the numbers of a request, and around
// each.
const wrkScript = `
local before, head, tail, after = %q, %q, %q, %q
local of, items, inOrder = %d, %d, %t
local i = -1
math.randomseed(%d)
local function one()
	if inOrder then i = i + 1 else i = math.random(0, of - 1) end
	return head .. string.format("%%0%dd", i) .. tail
end
function request()
	if of == 0 then return before .. after end
	if items == 1 then return one() end
	local list = {}
	for k = 1, items do list[k] = one() end
	return before .. table.concat(list, ",") .. after
end
function done(summary, latency)
	local e = summary.errors
	print(string.format("measured %%d %%d %%d %%d %%d", summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
		e.connect + e.read + e.write + e.status + e.timeout))
end
`

// script is what wrk sends.
func (r requests) script(host string, seed int32) string {
	text := cmp.Or(r.method, "GET") + " " + r.path + " HTTP/1.1\r\nHost: " + host + "\r\nAuthorization: Bearer " + r.token + "\r\n"
	if r.header != "" {
		text += r.header + "\r\n"
	}
	if r.body != "" {
		text += "Content-Type: application/json\r\n"
	}
	if r.method != "" {
		text += fmt.Sprintf("Content-Length: %d\r\n", len(r.with(r.body, 0)))
	}
	text += "\r\n" + r.body
	var before, head, tail, after string
	switch {
	case r.items > 0:
		before, after, _ = strings.Cut(text, slots)
		head, tail, _ = strings.Cut(r.item, slot)
	case r.of > 0:
		head, tail, _ = strings.Cut(text, slot)
	default:
		before = text
	}
	return fmt.Sprintf(wrkScript, before, head, tail, after, r.of, r.numbers(), r.inOrder, seed, digits)
}

func (w wrk) load(ctx context.Context, dir string, shape requests, connections int, during time.Duration) (got sample, err error) {
	u, err := url.Parse(shape.url)
	if err != nil {
		return got, err
	}
	script := filepath.Join(dir, "load.lua")
	if err := os.WriteFile(script, []byte(shape.script(u.Host, rand.Int32())), 0o600); err != nil {
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

// mostTargets is how many requests vegeta is given: it begins again with the first.
const mostTargets = 50_000

func (v vegeta) load(ctx context.Context, dir string, shape requests, connections int, during time.Duration) (got sample, err error) {
	var text bytes.Buffer
	encoder := json.NewEncoder(&text)
	for i := range max(1, min(shape.of/shape.numbers(), mostTargets)) {
		first := i * shape.numbers()
		if shape.of > 0 && !shape.inOrder {
			first = rand.IntN(shape.of)
		}
		target := struct {
			Method string              `json:"method"`
			URL    string              `json:"url"`
			Body   []byte              `json:"body,omitempty"`
			Header map[string][]string `json:"header"`
		}{cmp.Or(shape.method, "GET"), shape.url + shape.with(shape.path, first), []byte(shape.with(shape.body, first)),
			map[string][]string{"Authorization": {"Bearer " + shape.token}}}
		if shape.body != "" {
			target.Header["Content-Type"] = []string{"application/json"}
		}
		if name, value, ok := strings.Cut(shape.header, ": "); ok {
			target.Header[name] = []string{value}
		}
		if err := encoder.Encode(target); err != nil {
			return got, err
		}
	}
	targets, results := filepath.Join(dir, "targets"), filepath.Join(dir, "results")
	if err := os.WriteFile(targets, text.Bytes(), 0o600); err != nil {
		return got, err
	}
	n := strconv.Itoa(connections)
	_, cpu, err := output(exec.CommandContext(ctx, string(v), "attack", "-format", "json", "-targets", targets, "-output", results, "-rate", "0", "-workers", n,
		"-max-workers", n, "-connections", n, "-keepalive", "-max-body", "0", "-timeout", "10s", "-duration", during.String()))
	if err != nil {
		return got, err
	}
	out, _, err := output(exec.CommandContext(ctx, string(v), "report", "-type=json", results))
	if err != nil {
		return got, err
	}
	got.toolCPU = cpu
	return got, got.readVegeta(out, shape.created)
}

func (s *sample) readVegeta(out string, created bool) error {
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
	if created {
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

// runPgbenchMode measures one of the transactions that pgbench has, prepared. Where the time is
// over before all clients are connected, as with many on a slow machine, it takes longer.
func (s *stage) runPgbenchMode(ctx context.Context, path, mode string, clients int, during time.Duration) (got sample, err error) {
	if clients > targetAt { // to connect all of them is a good part of a second
		during += time.Second
	}
	for range 3 {
		got, err = s.runPgbench(ctx, path, mode, "-n", "-M", "prepared", "-c", strconv.Itoa(clients), "-j", strconv.Itoa(min(clients, runtime.NumCPU())),
			"-T", strconv.Itoa(int(during.Seconds())))
		if !errors.Is(err, errNothingDone) {
			break
		}
		during *= 2
	}
	return got, err
}

var errNothingDone = errors.New("pgbench has done nothing")

var (
	pgbenchDone   = regexp.MustCompile(`(?m)^number of transactions actually processed: (\d+)`)
	pgbenchRate   = regexp.MustCompile(`(?m)^tps = ([0-9.]+) \(without initial connection time\)|^tps = ([0-9.]+) \(excluding`)
	pgbenchFailed = regexp.MustCompile(`(?m)^number of failed transactions: ([1-9]\d*)`)
)

func (s *sample) readPgbench(out string) error {
	done, rate := pgbenchDone.FindStringSubmatch(out), pgbenchRate.FindStringSubmatch(out)
	if done != nil && done[1] == "0" {
		return errNothingDone
	}
	if done == nil || rate == nil || pgbenchFailed.MatchString(out) {
		return fmt.Errorf("pgbench ends with %q", lastLine(out))
	}
	var err, fault error
	s.requests, err = strconv.Atoi(done[1])
	s.perSecond, fault = strconv.ParseFloat(cmp.Or(rate[1], rate[2]), 64)
	return errors.Join(err, fault)
}
