package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/tenant"
)

const (
	readers = 4
	// grace is for how long after its end something may be shown as active.
	grace = time.Second
	// quiet is how long a life leaves be what it has ended, so that it is looked at.
	quiet = 2500 * time.Millisecond
)

// reads are look-ups, mostly from memory, of what has ended.
type reads struct {
	mu    sync.Mutex
	ended map[string]time.Time // paths of what is not active, by when that was acknowledged
	wrong []string
	done  int
	stale int // that said that they may be outdated
}

// ends notes that what is at a path was acknowledged as not active.
func (r *reads) ends(path string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ended == nil {
		r.ended = map[string]time.Time{}
	}
	r.ended[path] = time.Now()
}

// begins notes that what is at a path may be active again.
func (r *reads) begins(path string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.ended, path)
}

// rests leaves be for a while what has ended.
func (f *life) rests(ctx context.Context) {
	select {
	case <-ctx.Done():
	case <-time.After(quiet):
	}
}

// watch looks again and again at what has ended, and at what is there.
func (l *load) watch(ctx context.Context, r *rand.Rand) {
	for ctx.Err() == nil {
		l.reads.mu.Lock()
		var path string
		var since time.Time
		for path, since = range l.reads.ended { // any
			break
		}
		l.reads.mu.Unlock()
		if path == "" || r.IntN(4) == 0 {
			path, since = "", time.Time{}
			l.mu.Lock()
			if len(l.ids) > 0 {
				path = "/v1/tenants/" + l.ids[r.IntN(len(l.ids))] + []string{"", "/keys"}[r.IntN(2)]
			}
			l.mu.Unlock()
		}
		if path != "" {
			l.lookAt(ctx, r, path, since)
		}
		select {
		case <-ctx.Done():
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (l *load) lookAt(ctx context.Context, r *rand.Rand, path string, since time.Time) {
	began := time.Now()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, l.to[r.IntN(len(l.to))].url+path, nil)
	if err != nil {
		return
	}
	req.Header.Set("Authorization", "Bearer "+l.s.token)
	resp, err := l.http.Do(req)
	if err != nil {
		return
	}
	defer func() { _ = resp.Body.Close() }()
	var a struct{ State string }
	if json.NewDecoder(resp.Body).Decode(&a) != nil || resp.StatusCode != http.StatusOK {
		return
	}
	l.reads.mu.Lock()
	defer l.reads.mu.Unlock()
	l.reads.done++
	if resp.Header.Get("Tenantry-Stale") != "" {
		l.reads.stale++
		return
	}
	if is, ok := l.reads.ended[path]; ok && is.Equal(since) && a.State == "active" && began.Sub(since) > grace {
		l.reads.wrong = append(l.reads.wrong, fmt.Sprintf("%s shows active %s after its end", path, began.Sub(since).Round(time.Millisecond)))
	}
}

// verifyReads compares what each replica answers from memory, at the end, with what it
// finds in Postgres.
func (s *stage) verifyReads(ctx context.Context, f *figures, l *load) error {
	f.did("look-ups of what has ended, and of others", l.reads.done)
	f.did("look-ups that said that they may be outdated", l.reads.stale)
	f.must("    look-ups that showed as active what had ended a second before", l.reads.wrong...)
	var differ []string
	get := func(p *program, path, control string) (string, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.url+path, nil)
		if err != nil {
			return "", err
		}
		req.Header.Set("Authorization", "Bearer "+s.token)
		if control != "" {
			req.Header.Set("Cache-Control", control)
		}
		status, body, err := l.send(req)
		var problem struct{ Code string }
		if err == nil && status >= 400 && json.Unmarshal(body, &problem) == nil { // without the id of the request
			body = []byte(problem.Code)
		}
		return fmt.Sprint(status, " ", string(body)), err
	}
	for id := range l.asked {
		for _, path := range []string{"/v1/tenants/" + id, "/v1/tenants/" + id + "/keys"} {
			for _, p := range s.running {
				held, err := get(p, path, "")
				if err != nil {
					return err
				}
				is, err := get(p, path, "no-cache")
				if err != nil {
					return err
				}
				if held != is {
					differ = append(differ, fmt.Sprintf("%s: %s answers %.200s; Postgres has %.200s", path, p.name, held, is))
				}
			}
		}
	}
	f.must("    look-ups at the end that differ from Postgres", differ...)
	return nil
}

// propagation changes a tenant again and again, and returns how long it took until a
// replica showed it that had the tenant in memory, the shortest first. Without
// wake-ups the change is made in Postgres, where nobody is woken.
func propagation(ctx context.Context, dir string, wakes bool) (took []time.Duration, err error) {
	s, err := raise(ctx, dir, setting{replicas: 2, connections: 16})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.strike()) }()
	l := newLoad(s, 0)
	r := rand.New(rand.NewPCG(0, 0))
	const path = "/v1/tenants/user_1"
	if status, body, err := l.request(ctx, r, http.MethodPut, path, "Prefer", "wait=30"); err != nil || status != http.StatusCreated {
		return nil, fmt.Errorf("a sign-up is answered %d %s, %w", status, body, err)
	}
	conn, err := pgx.Connect(ctx, s.cluster.URL("tenantry"))
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	change := func(name string) error {
		if !wakes {
			_, err := conn.Exec(ctx, `
				WITH changed AS (UPDATE tenants SET display_name = $1, version = version + 1 WHERE id = 'user_1' RETURNING id)
				INSERT INTO audit_events (actor, action, tenant_id) SELECT 'operator', 'tenant.changed', id FROM changed`, name)
			return err
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodPatch, s.running[0].url+path, strings.NewReader(`{"display_name":"`+name+`"}`))
		if err != nil {
			return err
		}
		req.Header.Set("Authorization", "Bearer "+s.token)
		req.Header.Set("Content-Type", "application/merge-patch+json")
		var t tenant.Tenant
		return decode(req, &t)
	}
	l.to = s.running[1:]
	for i := range 100 {
		for range 3 { // so that it is in memory
			if _, _, err := l.request(ctx, r, http.MethodGet, path); err != nil {
				return nil, err
			}
		}
		time.Sleep(time.Duration(r.Int64N(int64(120 * time.Millisecond)))) // anywhere between two looks at the log
		name := fmt.Sprint("name-", i)
		if err := change(name); err != nil {
			return nil, err
		}
		began := time.Now()
		for {
			_, body, err := l.request(ctx, r, http.MethodGet, path)
			if err != nil {
				return nil, err
			}
			if bytes.Contains(body, []byte(`"`+name+`"`)) {
				break
			}
			if time.Since(began) > 10*time.Second {
				return nil, fmt.Errorf("a change is not shown for 10 s")
			}
		}
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	return took, nil
}
