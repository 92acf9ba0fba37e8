package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	signUpsPerSecond = 2
	mostAtOnce       = 60 // more wait for a later turn, so that what waits at the end fits into settle
	lookers          = 4
)

// An account is what a tenant was told in an answer that said active.
type account struct{ app, key string }

// A load is callers that sign tenants up and look them up, and remember what they
// were told.
type load struct {
	s    *stage
	to   []*program // any of which gets a request
	rand *rand.Rand // of the one goroutine that begins sign-ups
	stop chan struct{}
	http *http.Client

	requests, retries, answered atomic.Int64 // answered: with credentials
	cutOff                      atomic.Int64 // requests that a replica dropped that was told to end

	mu       sync.Mutex
	asked    map[string]bool // tenants by whether they are done
	accounts map[string]account
	ids      []string // of accounts
	changed  []string // answers that contradict an earlier one
	refused  []string // answers that no caller should get
	waits    []time.Duration

	lives lives
	reads reads
}

func newLoad(s *stage, seed uint64) *load {
	return &load{s: s, to: s.running, rand: rand.New(rand.NewPCG(seed, 2)), stop: make(chan struct{}), asked: map[string]bool{}, accounts: map[string]account{},
		lives: lives{counts: map[string]int{}},
		http:  &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: mostAtOnce}}}
}

// noMore begins no further sign-ups; those that were begun go on.
func (l *load) noMore() { close(l.stop) }

// run begins sign-ups until noMore, and returns when all have ended or ctx has.
func (l *load) run(ctx context.Context) {
	var callers sync.WaitGroup
	slots := make(chan struct{}, mostAtOnce)
	looking, stopLooking := context.WithCancel(ctx)
	defer stopLooking()
	for i := range lookers {
		r := rand.New(rand.NewPCG(l.rand.Uint64(), uint64(i)))
		callers.Go(func() { l.look(looking, r) })
	}
	for i := range readers {
		r := rand.New(rand.NewPCG(l.rand.Uint64(), uint64(10+i)))
		callers.Go(func() { l.watch(looking, r) })
	}
	ticker := time.NewTicker(time.Second / signUpsPerSecond)
	defer ticker.Stop()
	var signUps sync.WaitGroup
	changes := rand.New(rand.NewPCG(l.rand.Uint64(), 5))
	signUps.Go(func() { l.live(ctx, changes) })
begin:
	for n := 1; ; n++ {
		select {
		case <-ctx.Done():
			break begin
		case <-l.stop:
			break begin
		case <-ticker.C:
		}
		id := fmt.Sprintf("user_%05d", n)
		l.mu.Lock()
		l.asked[id] = false
		l.mu.Unlock()
		// Every tenth tenant is signed up by two callers at once.
		callersOfOne := 1
		if n%10 == 0 {
			callersOfOne = 2
		}
		for range callersOfOne {
			seed := l.rand.Uint64()
			select {
			case slots <- struct{}{}:
			case <-ctx.Done():
				break begin
			}
			signUps.Go(func() {
				defer func() { <-slots }()
				l.signUp(ctx, id, rand.New(rand.NewPCG(seed, 3)))
			})
		}
	}
	signUps.Wait()
	stopLooking()
	callers.Wait()
}

// signUp repeats a sign-up until it has the credentials, as the README says.
func (l *load) signUp(ctx context.Context, id string, r *rand.Rand) {
	began := time.Now()
	for try := 0; ; try++ {
		if try > 0 {
			l.retries.Add(1)
		}
		wait := r.IntN(8)
		status, body, err := l.request(ctx, r, http.MethodPut, "/v1/tenants/"+id, "Prefer", fmt.Sprint("wait=", wait))
		switch {
		case err != nil || status >= 500 || status == http.StatusAccepted:
		case status == http.StatusOK || status == http.StatusCreated:
			if l.told(id, body) {
				l.mu.Lock()
				if !l.asked[id] {
					l.asked[id] = true
					l.waits = append(l.waits, time.Since(began))
				}
				l.mu.Unlock()
				return
			}
		default:
			l.refuse("PUT %s answers %d %s", id, status, body)
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(200*time.Millisecond + time.Duration(r.Int64N(int64(800*time.Millisecond)))):
		}
	}
}

// told remembers what an answer says. It reports whether it has credentials.
func (l *load) told(id string, body []byte) bool {
	var t struct {
		ID, State   string
		App         struct{ ID string }
		Credentials struct{ Key string }
	}
	if err := json.Unmarshal(body, &t); err != nil || t.ID != id || t.State != "active" || t.App.ID == "" {
		l.refuse("%s is told %s", id, body)
		return false
	}
	if t.Credentials.Key != "" {
		l.answered.Add(1)
	}
	is := account{t.App.ID, t.Credentials.Key}
	l.mu.Lock()
	defer l.mu.Unlock()
	was, known := l.accounts[id]
	switch {
	case !known && is.key != "":
		l.accounts[id] = is
		l.ids = append(l.ids, id)
	case known && (was.app != is.app || is.key != "" && was.key != is.key):
		l.changed = append(l.changed, fmt.Sprintf("%s had %s and has %s, the same key: %v", id, was.app, is.app, was.key == is.key))
	}
	return is.key != ""
}

func (l *load) refuse(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.refused = append(l.refused, fmt.Sprintf(format, args...))
}

// look looks tenants up that are known, and sees that they are what they were.
func (l *load) look(ctx context.Context, r *rand.Rand) {
	for ctx.Err() == nil {
		l.mu.Lock()
		id := ""
		if len(l.ids) > 0 {
			id = l.ids[r.IntN(len(l.ids))]
		}
		l.mu.Unlock()
		if id != "" {
			status, body, err := l.request(ctx, r, http.MethodGet, "/v1/tenants/"+id)
			switch {
			case err != nil || status >= 500:
			case status == http.StatusOK:
				l.told(id, body)
			default:
				l.refuse("GET %s answers %d %s", id, status, body)
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// request sends a request to any replica.
func (l *load) request(ctx context.Context, r *rand.Rand, method, path string, headers ...string) (int, []byte, error) {
	p := l.to[r.IntN(len(l.to))]
	l.requests.Add(1)
	req, err := http.NewRequestWithContext(ctx, method, p.url+path, nil)
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("Authorization", "Bearer "+l.s.token)
	for i := 0; i+1 < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	terms, kills := p.terms.Load(), p.kills.Load()
	status, body, err := l.send(req)
	// Connections that are refused show a caller that nothing was begun.
	if err != nil && ctx.Err() == nil && p.terms.Load() > terms && p.kills.Load() == kills && !errors.Is(err, syscall.ECONNREFUSED) {
		l.cutOff.Add(1)
	}
	return status, body, err
}

func (l *load) send(req *http.Request) (int, []byte, error) {
	resp, err := l.http.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	return resp.StatusCode, body, err
}
