package main

import (
	"context"
	"fmt"
	"time"

	"github.com/tenantry/tenantry/api/client"
)

type upstreamCmd struct {
	Show   upstreamShowCmd   `cmd:"" default:"withargs" help:"Show how Clarifai and the work for it stand. Roles: all."`
	Pause  upstreamPauseCmd  `cmd:"" help:"Pause all work at Clarifai, or only removals, until it is resumed. Lookups and sign-ups from the pool go on. Role: admin."`
	Resume upstreamResumeCmd `cmd:"" help:"End the pause. Role: admin."`
}

type upstreamShowCmd struct {
	apiFlags
	outputFlags
}

func (c upstreamShowCmd) Run(ctx context.Context, e env) error {
	api, err := c.client(e)
	if err != nil {
		return err
	}
	got, err := answer[client.Upstream](api.GetUpstream(ctx))
	if err != nil {
		return err
	}
	if c.json() {
		return printBody(e.stdout, got.body)
	}
	now := time.Now()
	u := got.value
	w := newTable(e.stdout)
	w.row("operator", u.Operator)
	w.row("PAT", since(string(u.Pat.State), u.Pat.Since, now))
	if u.Pause != nil {
		w.row("paused by an operator", shownPause(*u.Pause, now))
	}
	budget := fmt.Sprintf("%g calls a second", u.Budget.RequestsPerSecond)
	if u.Budget.NextSlotInSeconds != nil {
		budget += fmt.Sprintf(", the next in %gs", *u.Budget.NextSlotInSeconds)
	}
	w.row("budget", budget)
	breaker := string(u.Breaker.State)
	if u.Breaker.PausedUntil != nil {
		breaker += " until " + exactly(u.Breaker.PausedUntil, now)
	}
	if u.Breaker.Reason != nil {
		breaker += ": " + shownProblem(u.Breaker.Reason, now)
	}
	w.row("breaker", breaker)
	w.row("tenants that wait", since(fmt.Sprint(u.Queue.WaitingTenants), u.Queue.OldestWaitingSince, now))
	w.row("until they are served", shownETA(u.Queue.EtaSeconds))
	if n := u.Queue.ImportingTenants; n > 0 {
		w.row("tenants of imports that wait", n)
		w.row("until they are served", shownETA(u.Queue.ImportEtaSeconds))
	}
	w.row("apps being built", u.Queue.BuildingApps)
	w.row("keys being revoked", u.Queue.RevokingKeys)
	w.row("apps being removed", u.Queue.PurgingApps)
	if u.Recovery != nil {
		w.row("recovery mode", since(string(u.Recovery.State)+": "+u.Recovery.Reason, &u.Recovery.Since, now)+"; see tenantry recover show")
	}
	if u.Problem != nil {
		w.row("problem", shownProblem(u.Problem, now))
	}
	return w.flush()
}

// shownETA is how long work takes; it is not known while no work is done.
func shownETA(seconds *float32) string {
	if seconds == nil {
		return "unknown: no work is in progress at Clarifai"
	}
	return span(time.Duration(float64(*seconds) * float64(time.Second)))
}

// shownScope says what a pause stops.
func shownScope(s client.UpstreamPauseScope) string {
	if s == client.PauseRemovals {
		return "removals"
	}
	return "all work"
}

func shownPause(p client.UpstreamPause, now time.Time) string {
	return fmt.Sprintf("%s since %s by %s: %s; tenantry upstream resume ends it", shownScope(p.Scope), exactly(&p.Since, now), p.PausedBy, p.Reason)
}

type upstreamPauseCmd struct {
	apiFlags
	outputFlags
	Scope  pauseScope `arg:"" optional:"" default:"all" help:"What to pause: all or removals. Removals are those of apps; keys still end."`
	Reason string     `required:"" placeholder:"TEXT" help:"Why; shown wherever work waits, and kept in the audit log."`
}

// A pauseScope refuses what is none: the parser takes the default for an argument that is in no enum.
type pauseScope client.UpstreamPauseScope

func (s *pauseScope) UnmarshalText(text []byte) error {
	if *s = pauseScope(text); !client.UpstreamPauseScope(*s).Valid() {
		return fmt.Errorf("%q is not all or removals", text)
	}
	return nil
}

func (upstreamPauseCmd) Help() string {
	return `The pause survives restarts, and nothing but tenantry upstream resume ends it. The same command again changes its scope and reason.

With "all", no key is created or revoked either: suspensions, deletions and quarantines are accepted and wait, and leaked keys go on working. Only the control record is renewed and a replaced PAT is checked. With "removals", no app is removed and no retention ends; all else goes on, also the end of keys.`
}

func (c upstreamPauseCmd) Run(ctx context.Context, e env) error {
	api, err := c.client(e)
	if err != nil {
		return err
	}
	got, err := answer[client.UpstreamPauseChange](api.PauseUpstream(ctx, client.UpstreamPauseRequest{Scope: new(client.UpstreamPauseScope(c.Scope)), Reason: c.Reason}))
	if err != nil {
		return err
	}
	if c.json() {
		return printBody(e.stdout, got.body)
	}
	if p := got.value.Pause; p != nil {
		_, _ = fmt.Fprintln(e.stderr, "paused: "+plain(shownPause(*p, time.Now())))
		if p.Scope == client.PauseAll {
			_, _ = fmt.Fprintln(e.stderr, "keys that are revoked or quarantined now, and keys of tenants that are suspended now, work until the pause ends")
		}
	}
	return nil
}

type upstreamResumeCmd struct {
	apiFlags
	outputFlags
}

func (c upstreamResumeCmd) Run(ctx context.Context, e env) error {
	api, err := c.client(e)
	if err != nil {
		return err
	}
	got, err := answer[client.UpstreamPauseChange](api.ResumeUpstream(ctx))
	if err != nil {
		return err
	}
	if c.json() {
		return printBody(e.stdout, got.body)
	}
	text := "no operator had paused work"
	if was := got.value.Ended; was != nil {
		text = fmt.Sprintf("resumed: %s, paused since %s: %s", shownScope(was.Scope), exactly(&was.Since, time.Now()), plain(was.Reason))
	}
	_, _ = fmt.Fprintln(e.stderr, text)
	return nil
}
