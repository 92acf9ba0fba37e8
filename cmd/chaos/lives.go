package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// How often a life begins, and how many changes it is asked for.
const (
	lifeEvery   = 3 * time.Second
	mostChanges = 8
)

// A life is a tenant that one caller takes through changes, one after the other, each
// repeated until it is acknowledged.
type life struct {
	l  *load
	r  *rand.Rand
	id string

	state string // that was acknowledged last
	account
	dead []account // keys that shall work no longer
	gone []string  // apps that shall be gone
}

// lives is what the load knows of them.
type lives struct {
	mu     sync.Mutex
	all    []*life
	counts map[string]int // changes that were acknowledged
	early  []string       // keys that worked though they were acknowledged as dead
}

func (l *load) live(ctx context.Context, r *rand.Rand) {
	var all sync.WaitGroup
	defer all.Wait()
	ticker := time.NewTicker(lifeEvery)
	defer ticker.Stop()
	for n := 1; ; n++ {
		one := &life{l: l, r: rand.New(rand.NewPCG(r.Uint64(), 4)), id: fmt.Sprintf("life_%05d", n)}
		l.mu.Lock()
		l.asked[one.id] = false
		l.mu.Unlock()
		l.lives.mu.Lock()
		l.lives.all = append(l.lives.all, one)
		l.lives.mu.Unlock()
		all.Go(func() { one.run(ctx) })
		select {
		case <-ctx.Done():
			return
		case <-l.stop:
			return
		case <-ticker.C:
		}
	}
}

func (f *life) run(ctx context.Context) {
	if !f.signUp(ctx, "") {
		return
	}
	f.l.mu.Lock()
	f.l.asked[f.id] = true
	f.l.mu.Unlock()
	changes := map[string]func(context.Context) bool{"rotations": f.rotate, "suspensions": f.suspend, "quarantines": f.quarantine,
		"deletions taken back": f.restore, "purges": f.purge, "replacements": f.replace, "further keys": f.further}
	names := []string{"rotations", "rotations", "suspensions", "quarantines", "deletions taken back", "purges", "replacements", "further keys"}
	for range mostChanges {
		select {
		case <-f.l.stop:
			return
		default:
		}
		name := names[f.r.IntN(len(names))]
		if !changes[name](ctx) {
			return
		}
		f.l.lives.mu.Lock()
		f.l.lives.counts[name]++
		f.l.lives.mu.Unlock()
	}
}

// An answer is as much of the API's answers as a life looks at.
type lifeAnswer struct {
	State, Code string
	App         struct{ ID string }
	Deletion    struct {
		KeysRevoked bool `json:"keys_revoked"`
	}
	Credentials struct{ Key string }
}

// until sends a request until done takes an answer of success. It reports false if ctx
// ended before, or if the answer is one that no caller should get.
func (f *life) until(ctx context.Context, token, method, path, body string, done func(lifeAnswer) bool) bool {
	for {
		req, err := http.NewRequestWithContext(ctx, method, f.l.to[f.r.IntN(len(f.l.to))].url+path, strings.NewReader(body))
		if err != nil {
			f.l.refuse("%s: %v", f.id, err)
			return false
		}
		req.Header.Set("Authorization", "Bearer "+token)
		req.Header.Set("Prefer", fmt.Sprint("wait=", f.r.IntN(8)))
		f.l.requests.Add(1)
		status, raw, err := f.l.send(req)
		var a lifeAnswer
		switch {
		case err != nil || status >= 500:
		case json.Unmarshal(raw, &a) != nil:
			f.l.refuse("%s %s answers %d %.200s", method, path, status, raw)
			return false
		case status < 300:
			if a.Credentials.Key != "" {
				f.l.answered.Add(1)
			}
			if done(a) {
				return true
			}
		case a.Code != "rotation_under_way" && a.Code != "key_creating":
			f.l.refuse("%s %s answers %d %.300s", method, path, status, raw)
			return false
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(200*time.Millisecond + time.Duration(f.r.Int64N(int64(800*time.Millisecond)))):
		}
	}
}

func (f *life) path() string { return "/v1/tenants/" + f.id }

// signUp signs the tenant up, or learns its key anew.
func (f *life) signUp(ctx context.Context, query string) bool {
	return f.until(ctx, f.l.s.token, http.MethodPut, f.path()+query, "", func(a lifeAnswer) bool {
		if a.State != "active" || a.Credentials.Key == "" {
			return false
		}
		switch {
		case f.app != "" && f.app != a.App.ID:
			f.l.contradict("%s had the app %s and has %s", f.id, f.app, a.App.ID)
		case f.key != "" && f.key != a.Credentials.Key:
			f.l.contradict("%s has another key of the app %s", f.id, f.app)
		}
		f.state, f.account = "active", account{a.App.ID, a.Credentials.Key}
		return true
	})
}

func (l *load) contradict(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.changed = append(l.changed, fmt.Sprintf(format, args...))
}

// dies notes that the tenant's key shall work no longer, and looks whether it does.
func (f *life) dies(ctx context.Context) {
	f.dead = append(f.dead, f.account)
	if status, err := f.l.s.upload(ctx, f.app, f.key); err == nil && status == http.StatusOK {
		f.l.lives.mu.Lock()
		f.l.lives.early = append(f.l.lives.early, f.id)
		f.l.lives.mu.Unlock()
	}
	f.key = ""
}

func (f *life) rotate(ctx context.Context) bool {
	overlap, was := []string{`{"overlap":0}`, `{"overlap":"2s"}`}[f.r.IntN(2)], f.account
	path := fmt.Sprintf("%s/keys/default/rotations/r-%d", f.path(), f.r.Uint32())
	if !f.until(ctx, f.l.s.token, http.MethodPut, path, overlap, func(a lifeAnswer) bool {
		if a.State == "creating" || a.Credentials.Key == "" {
			return false
		}
		f.key = a.Credentials.Key
		return true
	}) {
		return false
	}
	f.dead = append(f.dead, was)
	// The same rotation again has the same new key.
	return f.until(ctx, f.l.s.token, http.MethodPut, path, overlap, func(a lifeAnswer) bool {
		if a.Credentials.Key != f.key {
			f.l.contradict("the same rotation of %s has another key", f.id)
		}
		return true
	})
}

func (f *life) is(state string) func(lifeAnswer) bool {
	return func(a lifeAnswer) bool {
		if a.State == state {
			f.state = state
		}
		return a.State == state
	}
}

func (f *life) suspend(ctx context.Context) bool {
	if !f.until(ctx, f.l.s.token, http.MethodPost, f.path()+"/suspend", "", f.is("suspended")) {
		return false
	}
	f.dies(ctx)
	return f.until(ctx, f.l.s.token, http.MethodPost, f.path()+"/resume", "", f.is("active")) && f.signUp(ctx, "")
}

func (f *life) quarantine(ctx context.Context) bool {
	body, err := json.Marshal(map[string]string{"key": f.key})
	if err != nil {
		return false
	}
	if !f.until(ctx, f.l.s.admin, http.MethodPost, "/v1/keys/quarantine", string(body), func(lifeAnswer) bool { return true }) {
		return false
	}
	f.dead = append(f.dead, f.account)
	f.key = ""
	return f.signUp(ctx, "")
}

func (f *life) deleted(a lifeAnswer) bool {
	if a.State == "deleting" && a.Deletion.KeysRevoked {
		f.state = a.State
		return true
	}
	return false
}

func (f *life) restore(ctx context.Context) bool {
	if !f.until(ctx, f.l.s.token, http.MethodDelete, f.path(), "", f.deleted) {
		return false
	}
	f.dies(ctx)
	return f.until(ctx, f.l.s.token, http.MethodPost, f.path()+"/restore", "", f.is("active")) && f.signUp(ctx, "")
}

func (f *life) purge(ctx context.Context) bool {
	if !f.until(ctx, f.l.s.admin, http.MethodDelete, f.path()+"?purge=now", "", f.is("deleted")) {
		return false
	}
	f.gone = append(f.gone, f.app)
	f.dies(ctx)
	f.account = account{}
	return f.signUp(ctx, "")
}

func (f *life) replace(ctx context.Context) bool {
	if !f.until(ctx, f.l.s.token, http.MethodDelete, f.path(), "", f.deleted) {
		return false
	}
	f.dies(ctx)
	f.account = account{}
	return f.signUp(ctx, "?on_deleting=replace")
}

func (f *life) further(ctx context.Context) bool {
	var key string
	if !f.until(ctx, f.l.s.token, http.MethodPut, f.path()+"/keys/more", "", func(a lifeAnswer) bool {
		key = a.Credentials.Key
		return key != ""
	}) {
		return false
	}
	if !f.until(ctx, f.l.s.token, http.MethodDelete, f.path()+"/keys/more", "", func(a lifeAnswer) bool { return a.State == "revoked" }) {
		return false
	}
	f.dead = append(f.dead, account{f.app, key})
	return true
}

// verifyLives compares Clarifai with what was acknowledged of lives.
func (s *stage) verifyLives(ctx context.Context, f *figures, l *load, apps []string) error {
	var alive, there, wrong []string
	for _, one := range l.lives.all {
		if one.state == "" { // it counts among those that never became active
			continue
		}
		for _, a := range one.dead {
			status, err := s.upload(ctx, a.app, a.key)
			if err != nil {
				return err
			}
			if status == http.StatusOK {
				alive = append(alive, one.id)
			}
		}
		for _, app := range one.gone {
			if slices.Contains(apps, app) {
				there = append(there, one.id+": "+app)
			}
		}
		if one.key == "" {
			continue // its last change was not acknowledged
		}
		if status, err := s.upload(ctx, one.app, one.key); err != nil || status != http.StatusOK {
			if err != nil {
				return err
			}
			wrong = append(wrong, fmt.Sprintf("%s: Clarifai answers %d", one.id, status))
		}
	}
	f.must("R2  keys of changed tenants that do not open their app", wrong...)
	f.must("    keys that work though their end was acknowledged", append(alive, l.lives.early...)...)
	f.must("    apps that are there though their purge was acknowledged", there...)
	return nil
}
