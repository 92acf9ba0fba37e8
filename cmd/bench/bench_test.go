package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/csv"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

func TestReadTools(t *testing.T) {
	t.Parallel()
	const pgbench = `transaction type: <builtin: select only>
number of transactions actually processed: 7331
number of failed transactions: 0 (0.000%)
latency average = 0.268 ms
initial connection time = 4.2 ms
tps = 3731.250000 (without initial connection time)
`
	for name, c := range map[string]struct {
		read   func(s *sample, out string) error
		out    string
		want   sample
		failed bool
	}{
		"wrk": {read: (*sample).readWrk, out: "Running 2s test\n  5 requests in 2s\nmeasured 5000 2000000 310 4200 0\n",
			want: sample{requests: 5000, perSecond: 2500, p50: 310 * time.Microsecond, p99: 4200 * time.Microsecond}},
		"wrk, a request failed": {read: (*sample).readWrk, out: "measured 5000 2000000 310 4200 1\n", failed: true},
		"wrk, without an end":   {read: (*sample).readWrk, out: "unable to connect\n", failed: true},
		"pgbench":               {read: (*sample).readPgbench, out: pgbench, want: sample{requests: 7331, perSecond: 3731.25}},
		"pgbench, some failed":  {read: (*sample).readPgbench, out: strings.Replace(pgbench, "transactions: 0", "transactions: 3", 1), failed: true},
		"pgbench, none done":    {read: (*sample).readPgbench, out: "number of transactions actually processed: 0\nnumber of failed transactions: 0 (NaN%)\n", failed: true},
		"pgbench, without rate": {read: (*sample).readPgbench, out: "pgbench: error\n", failed: true},
		"vegeta": {read: func(s *sample, out string) error { return s.readVegeta(out, true) },
			out:  `{"requests":10,"rate":5.5,"latencies":{"50th":1000,"99th":2000},"status_codes":{"201":10},"errors":[]}`,
			want: sample{requests: 10, perSecond: 5.5, p50: 1000, p99: 2000}},
		"vegeta, one was there": {read: func(s *sample, out string) error { return s.readVegeta(out, true) },
			out: `{"requests":10,"rate":5.5,"latencies":{"50th":1000,"99th":2000},"status_codes":{"201":9,"200":1},"errors":[]}`, failed: true},
	} {
		var got sample
		err := c.read(&got, c.out)
		if (err != nil) != c.failed {
			t.Errorf("%s: %v", name, err)
		}
		if !c.failed && (got.requests != c.want.requests || got.perSecond != c.want.perSecond || got.p50 != c.want.p50 || got.p99 != c.want.p99) {
			t.Errorf("%s: read %+v", name, got)
		}
	}
}

// The ratio is that of the middle round, not of the middles of both.
func TestReport(t *testing.T) {
	t.Parallel()
	rows := []row{{name: pgRead}, {name: bare}, {name: "look-up", against: pgRead, target: 0.5, targetOf: pgRead}}
	var all samples
	for round, rates := range [][]float64{{1000, 4000, 500}, {2000, 4000, 400}, {500, 4000, 450}} {
		for i, r := range rows {
			for _, n := range connections {
				all = append(all, sample{row: r, connections: n, round: round + 1, requests: 100, perSecond: rates[i], p50: time.Millisecond, p99: time.Second})
			}
		}
	}
	var out bytes.Buffer
	all.table(&out, rows, 32)
	line := strings.Join(strings.Fields(lastLine(out.String())), " ")
	if want := "look-up 450 1.00 1000.00 0.50 (-S) 0.11 ≥ 0.50 (-S) – – 0"; line != want {
		t.Errorf("the table says %q, not %q", line, want)
	}

	name := filepath.Join(t.TempDir(), "run")
	if err := all.writeFiles(name, "wrk", rows); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(name + ".csv")
	if err != nil {
		t.Fatal(err)
	}
	lines, err := csv.NewReader(bytes.NewReader(text)).ReadAll()
	if err != nil || len(lines) != 1+len(all) {
		t.Errorf("%d lines of CSV, %v", len(lines), err)
	}
	plot, err := os.ReadFile(name + ".svg")
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(plot, []byte("NaN")) || bytes.Contains(plot, []byte("Inf")) {
		t.Error("the plot has a place that is no number")
	}
	lineCount := 0
	for d := xml.NewDecoder(bytes.NewReader(plot)); ; {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("the plot is no XML: %v", err)
		}
		if e, ok := token.(xml.StartElement); ok && e.Name.Local == "polyline" {
			lineCount++
		}
	}
	if lineCount != 4 { // three rates and one ratio
		t.Errorf("the plot has %d lines", lineCount)
	}
}

// What is sent is one request of the length that it says, whichever tool sends it.
// A failed row is reported, and the run goes on: the files have the other rows.
func TestFailedRow(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	b := &bench{out: &out}
	if err := b.failed(t.Context(), "reveal", io.ErrUnexpectedEOF); err != nil || len(b.failures) != 1 || !strings.Contains(out.String(), "reveal") {
		t.Errorf("a failed row: %v, %v, %q", err, b.failures, out.String())
	}
	stopped, stop := context.WithCancel(t.Context())
	stop()
	if err := b.failed(stopped, "reveal", io.ErrUnexpectedEOF); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a row of a run that was stopped: %v", err)
	}
	rows := []row{{name: bare}, {name: "reveal", against: pgRead, target: 1, targetOf: bare}}
	all := samples{{row: rows[0], connections: targetAt, round: 1, requests: 100, perSecond: 12}}
	all.table(&out, rows, targetAt)
	name := filepath.Join(t.TempDir(), "bench")
	if err := all.writeFiles(name, "wrk", rows); err != nil {
		t.Fatal(err)
	}
	if plot, err := os.ReadFile(name + ".svg"); err != nil || strings.Contains(string(plot), "NaN") {
		t.Errorf("the plot: %v, %s", err, plot)
	}
}

func TestRequests(t *testing.T) {
	t.Parallel()
	for name, r := range map[string]requests{
		"look-up":  {token: "t", path: "/v1/tenants/there_" + slot, header: uncached, of: 10},
		"list":     {token: "t", path: "/v1/tenants?limit=100"},
		"sign-up":  {token: "t", method: http.MethodPut, path: "/v1/tenants/new_" + slot, of: 10, inOrder: true},
		"identify": identify(10),
		"batch": {token: "t", method: http.MethodPost, path: "/v1/tenants/batch", body: `{"tenants":[` + slots + `]}`, item: `{"id":"b_` + slot + `"}`, items: 3,
			of: 100, inOrder: true},
	} {
		text := r.script("host:1", 1)
		if strings.Contains(text, slot) || strings.Contains(text, slots) {
			t.Errorf("%s: a place for a number is left: %s", name, text)
		}
		parts := regexp.MustCompile(`= ("(?:[^"\\]|\\.)*"), ("(?:[^"\\]|\\.)*"), ("(?:[^"\\]|\\.)*"), ("(?:[^"\\]|\\.)*")`).FindStringSubmatch(text)
		if parts == nil {
			t.Fatalf("%s: there are no texts in %s", name, text)
		}
		var p [4]string
		for i := range p {
			var err error
			if p[i], err = strconv.Unquote(parts[i+1]); err != nil {
				t.Fatal(err)
			}
		}
		before, head, tail, after := p[0], p[1], p[2], p[3]
		one := head + numbered(7) + tail
		whole := one
		switch {
		case r.of == 0:
			whole = before + after
		case r.items > 1:
			whole = before + strings.Join([]string{one, one, one}, ",") + after
		}
		in := bufio.NewReader(strings.NewReader(whole))
		req, err := http.ReadRequest(in)
		if err != nil {
			t.Fatalf("%s: %v: %s", name, err, whole)
		}
		body, err := io.ReadAll(req.Body)
		if err != nil || in.Buffered() > 0 || len(body) != len(r.with(r.body, 7)) || (len(body) > 0 && !json.Valid(body)) {
			t.Errorf("%s: %v, %d bytes are left of %s", name, err, in.Buffered(), whole)
		}
		if req.Header.Get("Cache-Control") != strings.TrimPrefix(r.header, "Cache-Control: ") {
			t.Errorf("%s lacks a header: %s", name, whole)
		}
	}
}
