package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/sync/errgroup"
)

// A figure is what there is a target for.
type figure struct {
	what   string
	value  float64
	unit   string
	digits int
	target float64
	least  bool // the target is the least it may be, and not the most
}

func (f figure) reached() bool {
	return f.least && f.value >= f.target || !f.least && f.value <= f.target
}

// printFigures prints the figures beside their targets, and returns that text.
func (b *bench) printFigures() []byte {
	var text bytes.Buffer
	w := tabwriter.NewWriter(&text, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintf(w, "at %d connections\tmeasured\ttarget\t\n", targetAt)
	for _, f := range b.figures {
		sign, verdict := "≤", "not reached"
		if f.least {
			sign = "≥"
		}
		if f.reached() {
			verdict = "reached"
		}
		if f.target == 0 {
			_, _ = fmt.Fprintf(w, "%s\t%.*f%s\t–\t\n", f.what, f.digits, f.value, f.unit)
			continue
		}
		_, _ = fmt.Fprintf(w, "%s\t%.*f%s\t%s %.*f%s\t%s\n", f.what, f.digits, f.value, f.unit, sign, f.digits, f.target, f.unit, verdict)
	}
	_ = w.Flush()
	b.say("\n%s", text.Bytes())
	return text.Bytes()
}

// finish prints the figures, and writes all files.
func (b *bench) finish(taken samples, rows []row) error {
	text := b.printFigures()
	if err := taken.writeFiles(b.results, b.tool.String(), rows); err != nil {
		return err
	}
	if err := os.WriteFile(b.results+".txt", text, 0o644); err != nil {
		return err
	}
	b.say("written: %s.csv, .svg and .txt", b.results)
	return nil
}

// measureStart measures how long serve takes from its execution until it is ready, on a
// database that is migrated and filled, and what memory it then takes.
func (b *bench) measureStart(ctx context.Context, r *replica) error {
	starts, idle := 5, 5*time.Second
	if b.short {
		starts, idle = 3, 3*time.Second
	}
	var took []time.Duration
	for range starts {
		r.end()
		began := time.Now()
		if err := r.start(ctx, startPause); err != nil {
			return err
		}
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	b.figures = append(b.figures, figure{what: fmt.Sprintf("start of serve to ready, median of %d", starts), value: took[(starts-1)/2].Seconds(), unit: " s", digits: 2, target: 0.5})
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(idle):
	}
	return b.noteMemory(r, fmt.Sprintf("resident memory, idle for %s", idle), 60)
}

// noteMemory notes the resident memory of a replica, in MB of a million bytes.
func (b *bench) noteMemory(r *replica, what string, target float64) error {
	bytes, err := residentBytes(r.cmd.Process.Pid)
	if err != nil {
		b.say("the memory cannot be measured here: %v", err)
		return nil
	}
	b.figures = append(b.figures, figure{what: what, value: float64(bytes) / 1e6, unit: " MB", digits: 0, target: target})
	return nil
}

// residentBytes is the resident memory of a process.
func residentBytes(pid int) (int64, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	_, line, _ := strings.Cut(string(status), "VmRSS:")
	line, _, _ = strings.Cut(strings.TrimSpace(line), " ")
	kilobytes, err := strconv.ParseInt(line, 10, 64)
	return 1024 * kilobytes, err
}

const million = 1_000_000

// measureMemory measures what memory a Tenantry takes that has looked a million tenants up.
func (b *bench) measureMemory(ctx context.Context, main *replica) error {
	b.say("filling a database with a million tenants, and looking each of them up")
	clarifai, err := b.stage.clarifai(ctx, "clarifaisim-million", latency) // an empty one, which is compared soon
	if err != nil {
		return err
	}
	r, err := b.stage.replica(ctx, "million", clarifai, fmt.Sprint("TENANTRY_CACHE_ENTRIES=", million))
	if err != nil {
		return err
	}
	r.end()
	main.pause() // it would go on with its background work
	defer main.goOn()
	if err := r.populate(ctx, million); err != nil {
		return err
	}
	if err := r.start(ctx, answerPause); err != nil {
		return err
	}
	if err := r.readAll(ctx, million); err != nil {
		return err
	}
	if err := b.noteMemory(r, "resident memory, with a million mappings cached", 1000); err != nil {
		return err
	}
	r.end()
	return nil
}

// readers is how many connections readAll takes.
const readers = 16

// readAll looks each of the first n tenants up once.
func (r *replica) readAll(ctx context.Context, n int) error {
	group, ctx := errgroup.WithContext(ctx)
	for k := range readers {
		group.Go(func() error {
			conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", strings.TrimPrefix(r.url, "http://"))
			if err != nil {
				return err
			}
			defer func() { _ = conn.Close() }()
			stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
			defer stop()
			in := bufio.NewReader(conn)
			for i := k; i < n; i += readers {
				if _, err := fmt.Fprintf(conn, "GET /v1/tenants/%s%s HTTP/1.1\r\nHost: tenantry\r\nAuthorization: Bearer %s\r\n\r\n", tenantPrefix, numbered(i), r.token); err != nil {
					return errors.Join(ctx.Err(), err)
				}
				resp, err := http.ReadResponse(in, nil)
				if err != nil {
					return errors.Join(ctx.Err(), err)
				}
				if _, err := io.Copy(io.Discard, resp.Body); err != nil {
					return err
				}
				if resp.StatusCode != http.StatusOK {
					return fmt.Errorf("tenant %d: GET answers %s", i, resp.Status)
				}
			}
			return nil
		})
	}
	return group.Wait()
}

// measureThrottled measures sign-ups that find a ready app, while Clarifai takes 300 ms for a
// call and allows 15 a second.
func (b *bench) measureThrottled(ctx context.Context, r *replica) error {
	const slow, calls = 300 * time.Millisecond, 15
	measured := b.signUps(r, "pooled sign-up, Clarifai slow and throttled")
	fill := measured.before
	measured.before = func(ctx context.Context, during time.Duration) error {
		// The apps are made at a Clarifai that is not.
		if err := errors.Join(r.clarifaiSettings(ctx, latency, 0), fill(ctx, during)); err != nil {
			return err
		}
		return r.clarifaiSettings(ctx, slow, calls)
	}
	var taken samples
	before, err := r.upstreamCalls(ctx)
	if err != nil {
		return err
	}
	began := time.Now()
	for range b.rounds() {
		got, err := b.measure(ctx, measured, targetAt, b.during(targetAt))
		if err != nil {
			return err
		}
		taken = append(taken, got)
	}
	after, err := r.upstreamCalls(ctx)
	if err != nil {
		return err
	}
	signedUp := 0
	for _, s := range taken {
		signedUp += s.requests
	}
	b.say("\nwhile Clarifai takes %s for a call and allows %d a second: %d sign-ups, p50 %.1f ms, p99 %.1f ms; all had their app in the transaction that made them;\n"+
		"Clarifai was called %d times in these %.0f s, in the background", slow, calls, signedUp, taken.median(p50), taken.median(p99), after-before, time.Since(began).Seconds())
	b.figures = append(b.figures, figure{what: "pooled sign-up while Clarifai is slow and throttled, p99 to p50", target: 10, digits: 1,
		value: taken.median(func(s sample) float64 { return p99(s) / p50(s) })})
	return r.clarifaiSettings(ctx, latency, 0)
}

// clarifaiSettings sets how slow the simulated Clarifai is, and how many calls a second it
// allows.
func (r *replica) clarifaiSettings(ctx context.Context, latency time.Duration, rate int) error {
	body := fmt.Sprintf(`{"latency_ms":%d,"rate_limit":%d}`, latency.Milliseconds(), rate)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, r.clarifai.url+"/_sim/settings", strings.NewReader(body))
	if err != nil {
		return err
	}
	_, err = answerOf(req)
	return err
}

// upstreamCalls is how often the simulated Clarifai was called by Tenantry.
func (r *replica) upstreamCalls(ctx context.Context) (calls int, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.clarifai.url+"/_sim/state", nil)
	if err != nil {
		return 0, err
	}
	answer, err := answerOf(req)
	if err != nil {
		return 0, err
	}
	var state struct{ Calls map[string]int }
	err = json.Unmarshal(answer, &state)
	for _, n := range state.Calls {
		calls += n
	}
	return calls, err
}
