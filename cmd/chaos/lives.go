package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// How often a life begins, and how many changes it is asked for. Every adoptEvery-th
// tenant takes over an app that was made by hand; rotatedTenants have their keys rotated
// by one campaign after the other; suspendedTenants are suspended at once, massEvery after they have
// gone on.
const (
	lifeEvery        = 3 * time.Second
	mostChanges      = 8
	adoptEvery       = 3
	appsByHand       = 12
	rotatedTenants   = 4
	suspendedTenants = 20
	massEvery        = 20 * time.Second
)

// A life is a tenant that one caller takes through changes, one after the other, each
// repeated until it is acknowledged.
type life struct {
	l  *load
	r  *rand.Rand
	id string

	takesOver account // an app that was made by hand, and the key that there is; or none
	state     string  // that was acknowledged last
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
	campaigns := rand.New(rand.NewPCG(r.Uint64(), 6))
	all.Go(func() { l.rotateMany(ctx, campaigns) })
	suspensions := rand.New(rand.NewPCG(r.Uint64(), 8))
	all.Go(func() { l.suspendMany(ctx, suspensions) })
	batches := rand.New(rand.NewPCG(r.Uint64(), 7))
	all.Go(func() { l.importMany(ctx, batches) })
	ticker := time.NewTicker(lifeEvery)
	defer ticker.Stop()
	byHand := l.s.byHand
	for n := 1; ; n++ {
		one := l.begin(r, fmt.Sprintf("life_%05d", n))
		if n%adoptEvery == 0 && len(byHand) > 0 {
			one.takesOver, byHand = byHand[0], byHand[1:]
		}
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

// begin adds a life to those that are counted.
func (l *load) begin(r *rand.Rand, id string) *life {
	one := &life{l: l, r: rand.New(rand.NewPCG(r.Uint64(), 4)), id: id}
	l.mu.Lock()
	l.asked[id] = false
	l.mu.Unlock()
	l.lives.mu.Lock()
	l.lives.all = append(l.lives.all, one)
	l.lives.mu.Unlock()
	return one
}

// arrives notes that the tenant is active.
func (f *life) arrives() {
	f.l.mu.Lock()
	defer f.l.mu.Unlock()
	f.l.asked[f.id] = true
}

func (l *load) count(change string) {
	l.lives.mu.Lock()
	defer l.lives.mu.Unlock()
	l.lives.counts[change]++
}

func (f *life) run(ctx context.Context) {
	if f.takesOver.app != "" {
		if !f.adopt(ctx) {
			return
		}
		f.l.count("adoptions")
	} else if !f.signUp(ctx, "") {
		return
	}
	f.arrives()
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
		f.l.count(name)
	}
}

// makeByHand makes apps at Clarifai as somebody does who has no Tenantry yet, every other
// one with a key to hand over.
func (s *stage) makeByHand(ctx context.Context) error {
	for i := range appsByHand {
		a := account{app: fmt.Sprintf("by-hand-%02d", i)}
		if _, err := s.byOperator(ctx, "/apps", map[string]any{"apps": []any{map[string]any{"id": a.app}}}); err != nil {
			return err
		}
		if i%2 == 0 {
			var err error
			if a.key, err = s.byOperator(ctx, "/keys", map[string]any{"keys": []any{map[string]any{"description": "by hand", "scopes": []string{"All"},
				"apps": []any{map[string]any{"id": a.app}}}}}); err != nil {
				return err
			}
		}
		s.byHand = append(s.byHand, a)
	}
	return nil
}

// byOperator calls Clarifai with the PAT, slowly enough for its limit, and returns the id
// of the key that it answers, if any.
func (s *stage) byOperator(ctx context.Context, path string, body any) (string, error) {
	time.Sleep(time.Second / rate)
	raw, err := json.Marshal(body)
	if err != nil {
		return "", err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.clarifai.url+"/v2/users/"+operator+path, bytes.NewReader(raw))
	if err != nil {
		return "", err
	}
	req.Header.Set("Authorization", "Key "+s.pat)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }()
	var made struct{ Keys []struct{ ID string } }
	if err := json.NewDecoder(resp.Body).Decode(&made); err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("POST %s by hand answers %s", path, resp.Status)
	}
	if len(made.Keys) == 0 {
		return "", nil
	}
	return made.Keys[0].ID, nil
}

// leftByHand reports whether an app was made by hand and is nobody's.
func (s *stage) leftByHand(app string, rowState string) bool {
	return rowState == "" && slices.ContainsFunc(s.byHand, func(a account) bool { return a.app == app })
}

// adopt signs the tenant up with an app that was made by hand.
func (f *life) adopt(ctx context.Context) bool {
	what := map[string]string{"app_id": f.takesOver.app}
	if f.takesOver.key != "" {
		what["key"] = f.takesOver.key
	}
	body, err := json.Marshal(map[string]any{"adopt": what})
	if err != nil {
		return false
	}
	return f.until(ctx, f.l.s.token, http.MethodPut, f.path(), string(body), func(a lifeAnswer) bool {
		if a.State != "active" || a.Credentials.Key == "" {
			return false
		}
		if a.App.ID != f.takesOver.app || f.takesOver.key != "" && a.Credentials.Key != f.takesOver.key {
			f.l.contradict("%s took over %s and has %s, or another key", f.id, f.takesOver.app, a.App.ID)
		}
		f.state, f.account = "active", account{a.App.ID, a.Credentials.Key}
		return true
	})
}

// rotateMany lets one campaign after the other rotate the keys of some tenants.
func (l *load) rotateMany(ctx context.Context, r *rand.Rand) {
	var rotated []*life
	for i := range rotatedTenants {
		one := l.begin(r, fmt.Sprintf("rotated_%02d", i))
		if !one.put(ctx, "", `{"labels":{"rotated":"yes"}}`) {
			return
		}
		one.arrives()
		rotated = append(rotated, one)
	}
	asks := rotated[0]
	for {
		select {
		case <-ctx.Done():
			return
		case <-l.stop:
			return
		default:
		}
		var id string
		if !asks.until(ctx, l.s.admin, http.MethodPost, "/v1/rotations", `{"labels":{"rotated":"yes"},"overlap":"0s"}`, func(a lifeAnswer) bool {
			id = a.ID
			return true
		}) {
			return
		}
		var end lifeAnswer
		if !asks.until(ctx, l.s.admin, http.MethodGet, "/v1/campaigns/"+id, "", func(a lifeAnswer) bool {
			end = a
			return a.State == "done"
		}) {
			return
		}
		if end.Counts.Skipped+end.Counts.Failed > 0 { // what was given up goes on: it is not known when the key changes
			for _, one := range rotated {
				one.key = ""
			}
			return
		}
		for _, one := range rotated {
			was := one.account
			one.key = ""
			if !one.put(ctx, "", "") {
				return
			}
			if one.key == was.key {
				l.contradict("%s has the key that it had before a campaign that is done", one.id)
			}
			one.dead = append(one.dead, was)
		}
		l.count("campaigns of rotations")
	}
}

// suspendMany suspends many tenants at once again and again, quarantines the key of another in the middle of
// it, and lets all go on.
func (l *load) suspendMany(ctx context.Context, r *rand.Rand) {
	many := make([]*life, suspendedTenants)
	for i := range many {
		many[i] = l.begin(r, fmt.Sprintf("suspended_%02d", i))
	}
	each := func(change func(i int, one *life) bool) bool {
		var all sync.WaitGroup
		var failed atomic.Bool
		for i, one := range many {
			all.Go(func() {
				if !change(i, one) {
					failed.Store(true)
				}
			})
		}
		all.Wait()
		return !failed.Load()
	}
	if !each(func(_ int, one *life) bool {
		if !one.signUp(ctx, "") {
			return false
		}
		one.arrives()
		return true
	}) {
		return
	}
	for {
		if !each(func(i int, one *life) bool {
			if i == len(many)/2 {
				return one.quarantine(ctx)
			}
			return one.suspend(ctx)
		}) {
			return
		}
		l.count("mass suspensions with a quarantine")
		select {
		case <-ctx.Done():
			return
		case <-l.stop:
			return
		case <-time.After(massEvery):
		}
	}
}

// An answer is as much of the API's answers as a life looks at.
type lifeAnswer struct {
	ID, State, Code, Detail string
	Counts                  struct{ Skipped, Failed int }
	App                     struct{ ID string }
	Deletion                struct {
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
		case a.Code == "campaign_open": // the answer to what began it was lost
			_, rest, _ := strings.Cut(a.Detail, "the campaign ")
			a.ID, _, _ = strings.Cut(rest, " ")
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
func (f *life) signUp(ctx context.Context, query string) bool { return f.put(ctx, query, "") }

func (f *life) put(ctx context.Context, query, body string) bool {
	return f.until(ctx, f.l.s.token, http.MethodPut, f.path()+query, body, func(a lifeAnswer) bool {
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
	f.l.reads.ends(f.path())
	f.rests(ctx)
	f.l.reads.begins(f.path())
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
	f.l.reads.ends(f.path())
	f.rests(ctx)
	f.l.reads.begins(f.path())
	return f.until(ctx, f.l.s.token, http.MethodPost, f.path()+"/restore", "", f.is("active")) && f.signUp(ctx, "")
}

func (f *life) purge(ctx context.Context) bool {
	if !f.until(ctx, f.l.s.admin, http.MethodDelete, f.path()+"?purge=now", "", f.is("deleted")) {
		return false
	}
	f.gone = append(f.gone, f.app)
	f.dies(ctx)
	f.l.reads.ends(f.path())
	f.rests(ctx)
	f.l.reads.begins(f.path())
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
	f.l.reads.begins(f.path() + "/keys/more")
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
	f.l.reads.ends(f.path() + "/keys/more")
	f.rests(ctx)
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
