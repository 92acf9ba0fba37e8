// Command chaos shows whether Tenantry keeps its rules while everything around it
// fails: two replicas, Postgres and the simulated Clarifai as real processes on
// loopback, a load of sign-ups, and faults of every kind. It ends with a table of
// what was injected and of what was lost, doubled or left behind.
//
// CHAOS_SECONDS (180) is how long faults are injected, CHAOS_SEED repeats a run as
// far as that is possible, CHAOS_DIR keeps what it makes. It exits with 0 if every
// figure is zero, with 1 if one is not, and with 2 if one could not be taken.
//
// With the argument "measure" it measures, without other faults, how long it takes
// until the work of a killed replica is taken up, how near several replicas come to
// the rate of calls that they share, how soon a suspension takes effect, how soon
// one replica shows what another has changed, and, alone with `measure priorities`, what waits behind
// CHAOS_REVOCATIONS (1000) revocations.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:], os.Getenv, os.Stdout))
}

// settle is how long what is under way may take once the faults have ended: work
// of a dead replica is leased for 20 s, and a call whose outcome is unknown is
// looked for a minute after it.
const settle = 4 * time.Minute

func run(ctx context.Context, args []string, getenv func(string) string, out io.Writer) int {
	failed := func(err error) int {
		_, _ = fmt.Fprintln(out, "chaos:", err)
		return 2
	}
	seconds, err := strconv.Atoi(cmp.Or(getenv("CHAOS_SECONDS"), "180"))
	if err != nil || seconds < 5 || seconds > 24*3600 {
		return failed(fmt.Errorf("CHAOS_SECONDS: %q must be a whole number from 5 to 86400", getenv("CHAOS_SECONDS")))
	}
	seed := rand.Uint64()
	if text := getenv("CHAOS_SEED"); text != "" {
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			return failed(fmt.Errorf("CHAOS_SEED: %q must be a whole number", text))
		}
	}
	dir := getenv("CHAOS_DIR")
	if dir == "" {
		if dir, err = os.MkdirTemp("", "tenantry-chaos-"); err != nil {
			return failed(err)
		}
		if err := os.Chmod(dir, 0o755); err != nil { // Postgres may run as another user
			return failed(err)
		}
	} else if dir, err = filepath.Abs(dir); err != nil {
		return failed(err)
	}
	say := func(format string, args ...any) { _, _ = fmt.Fprintf(out, format+"\n", args...) }
	if len(args) > 0 {
		onlyPriorities := slices.Equal(args, []string{"measure", "priorities"})
		if !onlyPriorities && !slices.Equal(args, []string{"measure"}) {
			return failed(fmt.Errorf("%q: the arguments can be `measure` or `measure priorities`", args))
		}
		if err := measure(ctx, dir, onlyPriorities, say); err != nil {
			return failed(err)
		}
		return 0
	}
	say("chaos for %d s, seed %d, logs in %s", seconds, seed, dir)

	s, err := raise(ctx, dir, setting{replicas: 2, throttle: rate + 1, connections: 16, pool: 5, items: 10})
	if err != nil {
		return failed(err)
	}
	figures, err := s.play(ctx, time.Duration(seconds)*time.Second, seed, say)
	if err == nil {
		figures.print(out)
	}
	err = errors.Join(err, s.strike())
	switch {
	case err != nil:
		return failed(err)
	case !figures.allZero():
		say("\nFAILED: seed %d, logs in %s", seed, dir)
		return 1
	}
	say("\nall zero")
	if getenv("CHAOS_DIR") == "" {
		_ = os.RemoveAll(dir)
	}
	return 0
}

// play injects faults under load, lets things settle, and takes the figures.
func (s *stage) play(ctx context.Context, during time.Duration, seed uint64, say func(string, ...any)) (*figures, error) {
	if err := s.makeByHand(ctx); err != nil {
		return nil, fmt.Errorf("make apps by hand: %w", err)
	}
	load := newLoad(s, seed)
	loadEnd, stopLoad := context.WithCancel(ctx)
	defer stopLoad()
	loadDone := make(chan struct{})
	go func() { defer close(loadDone); load.run(loadEnd) }()

	injected, err := s.inject(ctx, during, rand.New(rand.NewPCG(seed, 1)), say)
	if err != nil {
		return nil, fmt.Errorf("inject faults: %w", err)
	}
	say("faults end; no new sign-ups; settling")
	settling, cancel := context.WithTimeout(ctx, settle)
	defer cancel()
	load.noMore()
	select {
	case <-loadDone:
	case <-settling.Done():
		stopLoad()
		<-loadDone
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	return s.verify(settling, load, injected, say)
}
