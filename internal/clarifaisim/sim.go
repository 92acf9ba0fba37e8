// Package clarifaisim is a simulated Clarifai: users, apps, app-specific keys and
// a little data inside the apps, over REST, with state, faults on demand and a log
// of the calls.
//
// It keeps to what is publicly known of Clarifai's API. What is not known is a
// field of [Settings], so that a client can be tried against each possibility.
// Next to Clarifai's own paths, below /v2, a control side below /_sim sets faults
// and settings and shows what is there; it asks for no credential and shows
// secrets, so a simulator belongs on a loopback address or a test network.
package clarifaisim

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/go-chi/chi/v5"
)

// A Config says what a simulator starts with. Its zero value is a Clarifai that
// nobody has an account at.
type Config struct {
	// PATs are the Personal Access Tokens that work, and with them the users that
	// exist.
	PATs []PAT
	// Settings are what Reset goes back to. Nil means DefaultSettings.
	Settings *Settings
	// StateFile is where apps, keys and inputs outlive the simulator; "" means
	// nowhere. It holds keys, which are secrets, and is made with mode 0600. PATs,
	// settings, faults and the log of calls are not in it. A second simulator is
	// refused it until the first is closed or its process ends; next to it a file
	// with .lock behind the name is left for that.
	StateFile string
	// MaxCalls is how many calls the log remembers; 0 means 100,000. When it is
	// full, the oldest go. State counts on.
	MaxCalls int
	// Now is the clock of the throttle, of the log and of all times that are
	// stored; nil means time.Now. Delays are waited for on the real clock.
	Now func() time.Time
}

// A PAT is a Personal Access Token.
type PAT struct {
	Token  string `json:"token"`
	UserID string `json:"user_id"`
	// Scopes limit what the token may do. Empty means All.
	Scopes []string `json:"scopes,omitempty"`
}

// String leaves the token out.
func (p PAT) String() string { return "PAT of " + p.UserID }

// GoString leaves the token out.
func (p PAT) GoString() string { return p.String() }

func (p PAT) check() error {
	switch {
	case strings.TrimSpace(p.Token) != p.Token || p.Token == "":
		return fmt.Errorf("a PAT has to have a token, without white space around it")
	case p.UserID == "" || p.UserID == "me" || strings.ContainsAny(p.UserID, "/ "):
		return fmt.Errorf("a PAT has to have a user_id, which is not %q", p.UserID)
	}
	return nil
}

// A Sim is a simulated Clarifai. All its methods may be called at once with each
// other. It is an http.Handler for HTTP/1 servers: cutting a connection without an
// answer needs one of its own.
type Sim struct {
	router   *chi.Mux
	now      func() time.Time
	initial  Settings
	calls    callLog
	closing  context.Context // done when Close begins
	close    context.CancelFunc
	lateWork sync.WaitGroup

	mu       sync.Mutex
	world    world
	journal  *journal // nil: state is not kept
	pats     map[string]PAT
	settings Settings
	faults   []Fault
	accepted map[string][]time.Time // by user: calls of the last second, for the throttle
	epoch    int                    // counts resets
}

// New returns a simulator with the state of cfg.StateFile, if there is one. The
// caller has to call Close.
func New(cfg Config) (*Sim, error) {
	s := &Sim{
		now:      cfg.Now,
		initial:  DefaultSettings(),
		calls:    callLog{max: cfg.MaxCalls},
		pats:     make(map[string]PAT),
		accepted: make(map[string][]time.Time),
		world:    newWorld(),
	}
	if s.now == nil {
		s.now = time.Now
	}
	if s.calls.max == 0 {
		s.calls.max = 100_000
	}
	if cfg.Settings != nil {
		s.initial = cfg.Settings.clone()
	}
	if err := s.initial.check(); err != nil {
		return nil, fmt.Errorf("settings: %w", err)
	}
	s.settings = s.initial.clone()
	for _, p := range cfg.PATs {
		if err := s.AddPAT(p); err != nil {
			return nil, err
		}
	}
	if cfg.StateFile != "" {
		var err error
		if s.journal, err = openJournal(cfg.StateFile, &s.world); err != nil {
			return nil, err
		}
	}
	s.closing, s.close = context.WithCancel(context.Background())
	s.router = s.routes()
	return s, nil
}

// Close ends what hangs and what is delayed, forgets changes that were still to
// land late, and lets go of the state file. Requests that come later are cut off.
// Call it before the Close or Shutdown of the server, which waits for hanging
// requests. It may be called more than once.
func (s *Sim) Close() error {
	s.mu.Lock()
	s.close() // under mu, so that no late work begins after the wait for it
	s.mu.Unlock()
	s.lateWork.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.journal.close()
}

// ServeHTTP answers a request to Clarifai or to the control side.
func (s *Sim) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if s.closing.Err() != nil {
		panic(http.ErrAbortHandler)
	}
	// Clarifai takes a trailing slash. The path stays escaped until it is cut into
	// its elements, so that an id may hold an escaped slash and be told from a path.
	path := r.URL.EscapedPath()
	if len(path) > 1 {
		path = strings.TrimSuffix(path, "/")
	}
	route := chi.NewRouteContext()
	route.RoutePath = path
	s.router.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), chi.RouteCtxKey, route)))
}

// AddPAT makes a token work. A token that works already is changed.
func (s *Sim) AddPAT(p PAT) error {
	if err := p.check(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pats[p.Token] = p
	return nil
}

// RemovePAT makes a token unknown. The apps and keys of its user stay.
func (s *Sim) RemovePAT(token string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.pats, token)
}

// Reset goes back to the settings of the start and drops all apps, keys, inputs,
// faults, calls and what was still to land late. PATs stay as they are.
func (s *Sim) Reset() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.commit(change{Clear: true}); err != nil {
		return err
	}
	s.epoch++
	s.settings = s.initial.clone()
	s.faults = nil
	clear(s.accepted)
	s.calls.reset()
	return nil
}

// An AppInfo is an app, as the control side shows it.
type AppInfo struct {
	ID       string         `json:"id"`
	UserID   string         `json:"user_id"`
	Metadata map[string]any `json:"metadata"` // never nil
}

// A KeyInfo is an app-specific key, as the control side shows it.
type KeyInfo struct {
	ID          string   `json:"id"` // the secret
	AppID       string   `json:"app_id"`
	UserID      string   `json:"user_id"`
	Type        string   `json:"type"`
	Scopes      []string `json:"scopes"` // never nil
	Description string   `json:"description"`
}

// A State says how much there is, and how often each call came.
type State struct {
	Apps int `json:"apps"`
	// Keys counts the keys that work.
	Keys int `json:"keys"`
	// Calls counts calls since the start or the last reset by name, whatever came
	// of them. Unknown stands for paths and methods that Clarifai does not have.
	Calls map[string]int `json:"calls"`
}

// State returns what there is, at once and whatever the settings make invisible.
func (s *Sim) State() State {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.tick()
	st := State{Apps: s.world.countApps(), Calls: s.calls.counts()}
	for _, k := range s.world.keys {
		if s.works(k, now) {
			st.Keys++
		}
	}
	return st
}

// Apps returns all apps of all users, oldest first.
func (s *Sim) Apps() []AppInfo {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tick()
	apps := s.world.sortedApps()
	infos := make([]AppInfo, len(apps))
	for i, a := range apps {
		infos[i] = AppInfo{ID: a.App.ID, UserID: a.App.UserID, Metadata: a.App.metadata()}
	}
	return infos
}

// Keys returns all app-specific keys with their secrets, oldest first.
func (s *Sim) Keys() []KeyInfo {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.tick()
	keys := sortedKeys(s.world.keys)
	infos := make([]KeyInfo, len(keys))
	for i, k := range keys {
		infos[i] = KeyInfo{
			ID: k.ID, AppID: k.AppID, UserID: k.UserID, Type: typeAppKey,
			Scopes: append([]string{}, k.Scopes...), Description: k.Description,
		}
	}
	return infos
}

// Calls returns the calls that the log remembers, in the order in which they came.
func (s *Sim) Calls() []Call { return s.calls.all() }

// tick brings the state to the present and returns the time. The caller holds mu.
func (s *Sim) tick() time.Time {
	now := s.now().UTC()
	for a := range s.world.deleting {
		if !now.Before(a.DeleteAt) {
			// If it cannot be written down, it is tried again at the next tick.
			_ = s.commit(change{DropApp: &appRef{a.App.UserID, a.App.ID}})
		}
	}
	return now
}

// commit writes changes down, all or none, and makes them. The caller holds mu.
func (s *Sim) commit(changes ...change) error {
	if err := s.journal.write(changes, &s.world); err != nil {
		return err
	}
	for _, c := range changes {
		s.world.apply(c)
	}
	return nil
}

// works reports whether a key opens its app.
func (s *Sim) works(k *key, now time.Time) bool {
	return !s.settings.HonourExpiresAt || !k.expired(now)
}
