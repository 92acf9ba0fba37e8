package clarifaisim

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"
)

// keyFields are the fields of a key in requests and answers.
type keyFields struct {
	ID          string    `json:"id,omitempty"`
	Description string    `json:"description,omitempty"`
	Scopes      []string  `json:"scopes,omitempty"`
	Apps        []appRef  `json:"apps,omitempty"`
	CreatedAt   time.Time `json:"created_at,omitzero"`
	ExpiresAt   time.Time `json:"expires_at,omitzero"`
	Endpoints   []string  `json:"endpoints,omitempty"`
	Type        string    `json:"type,omitempty"`
}

func (k *key) answered(masked bool) keyFields {
	f := keyFields{
		ID: k.ID, Description: k.Description, Scopes: k.Scopes, Apps: []appRef{k.ref()},
		CreatedAt: k.CreatedAt, ExpiresAt: k.ExpiresAt, Endpoints: k.Endpoints, Type: typeAppKey,
	}
	if masked {
		f.ID = strings.Repeat("*", len(k.ID)-4) + k.ID[len(k.ID)-4:]
	}
	return f
}

// postKeys makes the keys of the request.
func (s *Sim) postKeys(c *call) answer {
	var req struct {
		Keys []*keyFields `json:"keys"`
	}
	if refusal, refused := c.decode(&req); refused {
		return refusal
	}
	if len(req.Keys) == 0 || slices.Contains(req.Keys, nil) {
		return refuse(codeInvalidRequest, "there is no key in the request")
	}
	perApp := make(map[*app]int)
	return postSeveral(s, "keys", req.Keys, func(f *keyFields) (made keyFields, _ []change, refusal answer, refused bool) {
		a, refusal, refused := s.appOfNewKey(c, f)
		if refused {
			return made, nil, refusal, true
		}
		if perApp[a]++; s.settings.KeyQuota > 0 && len(a.keys)+perApp[a] > s.settings.KeyQuota {
			return made, nil, refuse(codeExceedsLimits, "an app may have %d keys", s.settings.KeyQuota), true
		}
		k := &key{
			ID: newSecret(), UserID: c.user, AppID: a.App.ID, Description: f.Description, Scopes: f.Scopes, Endpoints: f.Endpoints,
			CreatedAt: c.now, ExpiresAt: f.ExpiresAt, VisibleAt: s.visibleFrom(c.now),
		}
		return k.answered(false), []change{{PutKey: k}}, answer{}, false
	})
}

// appOfNewKey checks a key that is to be made, and returns the app it is for.
func (s *Sim) appOfNewKey(c *call, f *keyFields) (_ *app, refusal answer, refused bool) {
	if t := cmp.Or(f.Type, typeAppKey); t != typeAppKey {
		return nil, refuse(codeInvalidRequest, "the simulator makes keys of type %s only", typeAppKey), true
	}
	if len(f.Apps) != 1 || f.Apps[0].ID == "" {
		return nil, refuse(codeInvalidRequest, "an app-specific key has to name exactly one app"), true
	}
	named := f.Apps[0]
	c.log.AppID = named.ID
	if err := checkScopes(f.Scopes); err != nil {
		return nil, refuse(codeInvalidRequest, "%v", err), true
	}
	if named.UserID != "" && named.UserID != "me" && named.UserID != c.user {
		if s.collaborates(c, named) {
			return nil, s.ownerOnly(), true
		}
		return nil, noApp(named.ID), true
	}
	a, ok := s.world.apps[appRef{c.user, named.ID}]
	if !ok || a.beingDeleted() {
		return nil, noApp(named.ID), true
	}
	return a, answer{}, false
}

func checkScopes(scopes []string) error {
	for _, scope := range scopes {
		if !knownScope(scope) {
			return fmt.Errorf("there is no scope '%.64s'", scope)
		}
	}
	return nil
}

// listKeys answers ListKeys and ListAppKeys, oldest key first. PATs are never
// listed.
func (s *Sim) listKeys(c *call) answer {
	p, err := c.page()
	if err != nil {
		return refuse(codeInvalidRequest, "%v", err)
	}
	keep, err := c.keyFilter()
	if err != nil {
		return refuse(codeInvalidRequest, "%v", err)
	}
	keys := s.world.keys
	if c.app != nil {
		keys = c.app.keys
	}
	var visible []*key
	for _, k := range sortedKeys(keys) {
		if k.UserID == c.user && k.visible(c.now) && keep(k) {
			visible = append(visible, k)
		}
	}
	found := make([]keyFields, 0, p.size)
	for _, k := range cutPage(visible, p) {
		found = append(found, k.answered(s.settings.MaskedKeys))
	}
	return ok(member{"keys", found})
}

// keyFilter reads the filters of ListKeys; ListAppKeys is not known to have any,
// and has them too.
func (c *call) keyFilter() (func(*key) bool, error) {
	notExpired, err := c.flag("not_expired")
	if err != nil {
		return nil, err
	}
	scopes, endpoints := c.values("scopes"), c.values("endpoints")
	kind := cmp.Or(c.query.Get("type"), typeAppKey)
	return func(k *key) bool {
		return kind == typeAppKey && !(notExpired && k.expired(c.now)) && hasAll(k.Scopes, scopes) && hasAll(k.Endpoints, endpoints)
	}, nil
}

// values reads a parameter that may be repeated, or hold several values with commas.
func (c *call) values(name string) []string {
	var values []string
	for _, v := range c.query[name] {
		values = append(values, strings.Split(v, ",")...)
	}
	return values
}

func hasAll(have, want []string) bool {
	for _, w := range want {
		if !slices.ContainsFunc(have, func(h string) bool { return sameScope(h) == sameScope(w) }) {
			return false
		}
	}
	return true
}

// keyOf finds a key of the caller. No answer repeats the id: it is a secret. A key may be hidden from
// changes for the consistency delay.
func (s *Sim) keyOf(c *call, id string) (_ *key, refusal answer, refused bool) {
	k, ok := s.world.keys[id]
	if ok && k.UserID != c.user && s.collaborates(c, k.ref()) {
		return nil, s.ownerOnly(), true
	}
	if !ok || k.UserID != c.user || s.settings.ConsistencyForChanges && !k.visible(c.now) {
		return nil, refuse(codeDoesNotExist, "key not found. Check the url of your request."), true
	}
	return k, answer{}, false
}

func (s *Sim) getKey(c *call) answer {
	k, refusal, refused := s.keyOf(c, c.params["key"])
	if refused {
		return refusal
	}
	c.log.AppID = k.AppID
	if !k.visible(c.now) {
		return refuse(codeDoesNotExist, "key not found. Check the url of your request.")
	}
	return ok(member{"key", k.answered(s.settings.MaskedKeys)})
}

func (s *Sim) deleteKey(c *call) answer {
	k, refusal, refused := s.keyOf(c, c.params["key"])
	if refused {
		return refusal
	}
	c.log.AppID = k.AppID
	if s.commit(change{DropKey: k.ID}) != nil {
		return s.saveFailed()
	}
	return ok()
}

// patchKeys changes description, scopes, endpoints and expiry, where they are
// given, of all keys or of none.
func (s *Sim) patchKeys(c *call) answer {
	var req struct {
		Keys   []*keyFields `json:"keys"`
		Action string       `json:"action"`
	}
	if refusal, refused := c.decode(&req); refused {
		return refusal
	}
	if len(req.Keys) == 0 || slices.Contains(req.Keys, nil) || req.Action != "overwrite" {
		return refuse(codeInvalidRequest, "there has to be a key in the request, and the action has to be overwrite")
	}
	var changes []change
	var patched []keyFields
	for _, f := range req.Keys {
		k, refusal, refused := s.keyOf(c, f.ID)
		if refused {
			return refusal
		}
		if err := checkScopes(f.Scopes); err != nil {
			return refuse(codeInvalidRequest, "%v", err)
		}
		c.log.AppID = k.AppID
		next := *k
		next.Description = cmp.Or(f.Description, k.Description)
		if len(f.Scopes) > 0 {
			next.Scopes = f.Scopes
		}
		if len(f.Endpoints) > 0 {
			next.Endpoints = f.Endpoints
		}
		if !f.ExpiresAt.IsZero() {
			next.ExpiresAt = f.ExpiresAt
		}
		changes = append(changes, change{PutKey: &next})
		patched = append(patched, next.answered(s.settings.MaskedKeys))
	}
	if s.commit(changes...) != nil {
		return s.saveFailed()
	}
	return ok(member{"keys", patched})
}
