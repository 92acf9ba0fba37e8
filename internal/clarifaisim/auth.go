package clarifaisim

import (
	"net/http"
	"slices"
	"strings"
)

// authKind is what a call asks for.
type authKind int

const (
	noAuth  authKind = iota // nothing
	keyAuth                 // a PAT or an app-specific key
	patAuth                 // a PAT
)

// secretOf returns the credential of a request, or "" if the header is missing or
// malformed. The word Key counts with its case.
func secretOf(r *http.Request) string {
	secret, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Key ")
	if !ok {
		return ""
	}
	return strings.TrimSpace(secret)
}

// authorise finds out who is calling and what about, and refuses what he may not.
// The caller holds mu.
func (s *Sim) authorise(c *call) (refusal answer, refused bool) {
	if c.auth == noAuth {
		return answer{}, false
	}
	if c.secret == "" {
		return refuse(codeInvalidRequest, "Empty or malformed authorization header. Please provide an API key or session token."), true
	}
	c.app, c.key, c.pat = nil, nil, PAT{}
	if pat, ok := s.pats[c.secret]; ok {
		c.pat = pat
		return s.authorisePAT(c)
	}
	if k, ok := s.world.keys[c.secret]; ok && s.works(k, c.now) {
		c.key = k
		return s.authoriseKey(c)
	}
	switch {
	case s.settings.UnknownKeyCode == codeKeyNotFound:
		return refuse(codeKeyNotFound, "invalid key(%s)", c.secret), true
	case !wellFormedKey(c.secret):
		return refuse(codeKeyInvalid, "Invalid format of key."), true
	}
	return refuse(codeKeyInvalid, ""), true
}

func wellFormedKey(secret string) bool {
	return len(secret) == 32 && !strings.ContainsFunc(secret, func(r rune) bool { return !strings.ContainsRune("0123456789abcdef", r) })
}

func (s *Sim) authorisePAT(c *call) (answer, bool) {
	named, hasUser := c.params["user"]
	c.user = c.pat.UserID
	switch {
	case !hasUser && c.auth == keyAuth:
		// With a PAT the path has to say which app is meant.
		return refuse(codeKeyInvalid, "Must provide app external ID in API authorizer"), true
	case hasUser && s.collaborates(c, appRef{named, c.params["app"]}):
		if c.auth == patAuth {
			return s.ownerOnly(), true
		}
		c.user = named
	case hasUser && named != "me" && named != c.pat.UserID:
		return refuse(codeDoesNotExist, "user_id '%s' not found. Check the url of your request.", named), true
	}
	have := c.pat.Scopes
	if len(have) == 0 {
		have = []string{"All"}
	}
	if missing := missingScopes(have, c.scopes); len(missing) > 0 {
		return lacking(missing), true
	}
	if id, ok := c.params["app"]; ok {
		return s.findApp(c, id)
	}
	return answer{}, false
}

// collaborates reports whether an app is another's, who has shared it with who is calling.
func (s *Sim) collaborates(c *call, a appRef) bool {
	return a.UserID != c.pat.UserID && slices.Contains(s.settings.Shares, Share{UserID: a.UserID, AppID: a.ID, With: c.pat.UserID})
}

// ownerOnly answers a collaborator at a call that is the owner's.
func (s *Sim) ownerOnly() answer {
	return refuse(s.settings.CollaboratorCode, "only the owner of the app may do this")
}

// authoriseKey lets an app-specific key at its own app only.
func (s *Sim) authoriseKey(c *call) (answer, bool) {
	if c.auth == patAuth {
		return refuse(s.settings.PATOnlyCode, "an app-specific key cannot be used for this call"), true
	}
	c.user = c.key.UserID
	if named, ok := c.params["user"]; ok && named != "me" && named != c.user {
		return refuse(codeKeyInvalid, ""), true
	}
	if id, ok := c.params["app"]; ok && id != c.key.AppID {
		return refuse(codeKeyInvalid, ""), true
	}
	missing := missingScopes(c.key.Scopes, c.scopes)
	if len(missing) > 0 && !slices.Contains(c.key.Endpoints, "/clarifai.api.V2/"+c.name) {
		return lacking(missing), true
	}
	return s.findApp(c, c.key.AppID)
}

func lacking(scopes []string) answer {
	return refuse(codeScopes, "missing scopes: %s", strings.Join(scopes, ", "))
}

// findApp sets the app of a call.
func (s *Sim) findApp(c *call, id string) (answer, bool) {
	a, ok := s.world.apps[appRef{c.user, id}]
	if !ok || c.method == http.MethodGet && !a.visible(c.now) {
		return noApp(id), true
	}
	c.app = a
	return answer{}, false
}

func noApp(id string) answer {
	return refuse(codeDoesNotExist, "app_id '%s' not found. Check the url of your request.", id)
}
