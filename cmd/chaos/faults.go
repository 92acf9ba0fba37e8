package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"time"
)

// injected counts what was done to the stage.
type injected struct {
	kills, rolls, clarifaiRestarts, clarifaiKills, postgresCrashes, rekeys int
}

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
	return kinds
}()

// inject does something to the stage every few seconds, and ends with all up and
// no faults.
func (s *stage) inject(ctx context.Context, during time.Duration, r *rand.Rand, say func(string, ...any)) (injected, error) {
	var n injected
	began := time.Now()
	if err := s.faults(ctx, upstreamFaults); err != nil {
		return n, err
	}
	// A new key of the keyset is added, and a third of the time later it seals.
	rekeying := [][]string{{"keyset", "rotate", "--prepare"}, {"keyset", "rotate"}}
	for {
		if step := len(rekeying); step > 0 && time.Since(began) > during*time.Duration(3-step)/3 {
			say("%8s  tenantry %s", time.Since(began).Round(100*time.Millisecond), strings.Join(rekeying[0], " "))
			if _, err := s.command(ctx, rekeying[0]...); err != nil {
				return n, err
			}
			n.rekeys = 1
			rekeying = rekeying[1:]
		}
		pause := 2*time.Second + time.Duration(r.Int64N(int64(4*time.Second)))
		what := r.IntN(10)
		which := s.running[r.IntN(len(s.running))]
		down := time.Duration(r.Int64N(int64(3 * time.Second)))
		if time.Since(began)+pause > during {
			break
		}
		select {
		case <-ctx.Done():
			return n, ctx.Err()
		case <-time.After(pause):
		}
		at := time.Since(began).Round(100 * time.Millisecond)
		var err error
		switch {
		case what < 4:
			say("%8s  kill -9 %s, away for %s", at, which.name, down.Round(time.Millisecond))
			n.kills++
			which.kill()
			time.Sleep(down)
			err = s.startReplica(ctx, which)
		case what < 6:
			say("%8s  SIGTERM %s, and start it again", at, which.name)
			n.rolls++
			if err = which.term(); err == nil {
				err = s.startReplica(ctx, which)
			}
		case what < 8:
			say("%8s  restart Clarifai, away for %s", at, down.Round(time.Millisecond))
			s.keepCalls(ctx)
			if what == 6 {
				n.clarifaiKills++
				s.clarifai.kill()
			} else {
				n.clarifaiRestarts++
				err = s.clarifai.term()
			}
			if err == nil {
				time.Sleep(down)
				err = s.clarifai.start()
			}
			if err == nil {
				err = s.clarifai.up(ctx, "/_sim/state")
			}
			if err == nil {
				err = s.faults(ctx, upstreamFaults)
			}
		default:
			say("%8s  crash Postgres, away for %s", at, down.Round(time.Millisecond))
			n.postgresCrashes++
			if err = s.cluster.Kill(); err == nil {
				time.Sleep(down)
				starting, cancel := context.WithTimeout(ctx, time.Minute)
				err = s.cluster.Start(starting)
				cancel()
			}
		}
		if err != nil {
			return n, err
		}
	}
	return n, s.faults(ctx, []map[string]any{})
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
