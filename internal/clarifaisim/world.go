package clarifaisim

import (
	"cmp"
	"encoding/json"
	"slices"
	"time"
)

// typeAppKey is what Clarifai calls an app-specific key.
const typeAppKey = "app_specific_key"

// A world is what is stored. It changes by apply alone, so that a journal of
// changes is a world.
type world struct {
	apps     map[appRef]*app
	perUser  map[string]int // number of apps
	keys     map[string]*key
	deleting map[*app]struct{} // apps that go at their DeleteAt
}

func newWorld() world {
	return world{
		apps:     make(map[appRef]*app),
		perUser:  make(map[string]int),
		keys:     make(map[string]*key),
		deleting: make(map[*app]struct{}),
	}
}

// An appRef addresses an app: ids are unique per owner only.
type appRef struct {
	UserID string `json:"user_id"`
	ID     string `json:"id"`
}

// An app is an app with what is in it. What has a JSON name is written to the
// journal.
type app struct {
	App       appFields `json:"app"`
	VisibleAt time.Time `json:"visible_at,omitzero"` // not to be seen by reading calls before
	DeleteAt  time.Time `json:"delete_at,omitzero"`  // zero: not being deleted

	keys     map[string]*key
	inputs   []*input
	inputIDs map[string]struct{}
}

func (a *app) ref() appRef              { return appRef{a.App.UserID, a.App.ID} }
func (a *app) visible(t time.Time) bool { return !t.Before(a.VisibleAt) }
func (a *app) beingDeleted() bool       { return !a.DeleteAt.IsZero() }

// A key is an app-specific key. A stored key is never changed, but replaced.
type key struct {
	ID          string    `json:"id"`
	UserID      string    `json:"user_id"`
	AppID       string    `json:"app_id"`
	Description string    `json:"description,omitempty"`
	Scopes      []string  `json:"scopes,omitempty"`
	Endpoints   []string  `json:"endpoints,omitempty"`
	CreatedAt   time.Time `json:"created_at"`
	ExpiresAt   time.Time `json:"expires_at,omitzero"`
	VisibleAt   time.Time `json:"visible_at,omitzero"`
}

func (k *key) ref() appRef              { return appRef{k.UserID, k.AppID} }
func (k *key) visible(t time.Time) bool { return !t.Before(k.VisibleAt) }
func (k *key) expired(t time.Time) bool { return !k.ExpiresAt.IsZero() && !t.Before(k.ExpiresAt) }

// An input is a piece of data in an app. It is never changed.
type input struct {
	ID        string          `json:"id"`
	Data      json.RawMessage `json:"data,omitempty"`
	CreatedAt time.Time       `json:"created_at"`
}

// A change is one step from a world to the next. One of its fields is set.
type change struct {
	PutApp    *app       `json:"put_app,omitempty"` // makes an app, or replaces its fields and not what is in it
	DropApp   *appRef    `json:"drop_app,omitempty"`
	RenameApp *appRename `json:"rename_app,omitempty"`
	PutKey    *key       `json:"put_key,omitempty"`
	DropKey   string     `json:"drop_key,omitempty"`
	PutInput  *newInput  `json:"put_input,omitempty"`
	Clear     bool       `json:"clear,omitempty"`
}

type appRename struct {
	appRef
	NewID string    `json:"new_id"`
	At    time.Time `json:"at"`
}

type newInput struct {
	App   appRef `json:"app"`
	Input *input `json:"input"`
}

// apply makes a change. Changes to what is not there have no effect.
func (w *world) apply(c change) {
	switch {
	case c.PutApp != nil:
		w.putApp(c.PutApp)
	case c.DropApp != nil:
		w.dropApp(*c.DropApp)
	case c.RenameApp != nil:
		w.renameApp(*c.RenameApp)
	case c.PutKey != nil:
		if a, ok := w.apps[c.PutKey.ref()]; ok {
			a.keys[c.PutKey.ID] = c.PutKey
			w.keys[c.PutKey.ID] = c.PutKey
		}
	case c.DropKey != "":
		if k, ok := w.keys[c.DropKey]; ok {
			delete(w.apps[k.ref()].keys, k.ID)
			delete(w.keys, k.ID)
		}
	case c.PutInput != nil:
		if a, ok := w.apps[c.PutInput.App]; ok {
			a.inputs = append(a.inputs, c.PutInput.Input)
			a.inputIDs[c.PutInput.Input.ID] = struct{}{}
		}
	case c.Clear:
		*w = newWorld()
	}
}

func (w *world) putApp(put *app) {
	a, ok := w.apps[put.ref()]
	if ok {
		a.App, a.VisibleAt, a.DeleteAt = put.App, put.VisibleAt, put.DeleteAt
	} else {
		a = put
		a.keys = make(map[string]*key)
		a.inputIDs = make(map[string]struct{})
		w.apps[a.ref()] = a
		w.perUser[a.App.UserID]++
	}
	if a.beingDeleted() {
		w.deleting[a] = struct{}{}
	}
}

func (w *world) dropApp(ref appRef) {
	a, ok := w.apps[ref]
	if !ok {
		return
	}
	for id := range a.keys {
		delete(w.keys, id)
	}
	delete(w.apps, ref)
	delete(w.deleting, a)
	w.perUser[ref.UserID]--
}

func (w *world) renameApp(r appRename) {
	a, ok := w.apps[r.appRef]
	if !ok {
		return
	}
	delete(w.apps, r.appRef)
	a.App.ID, a.App.ModifiedAt = r.NewID, r.At
	w.apps[a.ref()] = a
	for id, old := range a.keys {
		k := *old
		k.AppID = r.NewID
		a.keys[id], w.keys[id] = &k, &k
	}
}

// snapshot calls yield with the changes that make the world out of nothing, an app
// at a time.
func (w *world) snapshot(yield func([]change) error) error {
	for _, a := range w.sortedApps() {
		changes := []change{{PutApp: a}}
		for _, k := range sortedKeys(a.keys) {
			changes = append(changes, change{PutKey: k})
		}
		for _, in := range a.inputs {
			changes = append(changes, change{PutInput: &newInput{App: a.ref(), Input: in}})
		}
		if err := yield(changes); err != nil {
			return err
		}
	}
	return nil
}

func (w *world) countApps() int { return len(w.apps) }

func (w *world) sortedApps() []*app {
	apps := make([]*app, 0, len(w.apps))
	for _, a := range w.apps {
		apps = append(apps, a)
	}
	slices.SortFunc(apps, byCreation)
	return apps
}

func byCreation(a, b *app) int {
	return cmp.Or(a.App.CreatedAt.Compare(b.App.CreatedAt), cmp.Compare(a.App.ID, b.App.ID), cmp.Compare(a.App.UserID, b.App.UserID))
}

// sortedKeys returns keys, oldest first.
func sortedKeys(keys map[string]*key) []*key {
	sorted := make([]*key, 0, len(keys))
	for _, k := range keys {
		sorted = append(sorted, k)
	}
	slices.SortFunc(sorted, func(a, b *key) int {
		return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), cmp.Compare(a.ID, b.ID))
	})
	return sorted
}
