package httpapi

import (
	"net/http"
	"regexp"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/tenantry/tenantry/internal/tenant"
)

type keyBody struct {
	ID          uuid.UUID       `json:"id"`
	Name        string          `json:"name"`
	State       tenant.KeyState `json:"state"`
	Hint        string          `json:"hint"`
	Scopes      []string        `json:"scopes"`
	CreatedAt   time.Time       `json:"created_at"`
	ActivatedAt time.Time       `json:"activated_at,omitzero"`
	ExpiresAt   time.Time       `json:"expires_at,omitzero"`
	RevokedAt   time.Time       `json:"revoked_at,omitzero"`
}

func keyBodyOf(k tenant.Key) keyBody {
	return keyBody{ID: k.ID, Name: k.Name, State: k.State, Hint: k.Hint, Scopes: k.Scopes, CreatedAt: k.CreatedAt.UTC(),
		ActivatedAt: k.ActivatedAt.UTC(), ExpiresAt: k.ExpiresAt.UTC(), RevokedAt: k.RevokedAt.UTC()}
}

type keyListBody struct {
	Keys []keyBody `json:"keys"`
}

func (s *server) listKeys(w http.ResponseWriter, r *http.Request) error {
	id, err := pathTenantID(r)
	if err != nil {
		return err
	}
	if _, err := params(r); err != nil {
		return err
	}
	keys, err := s.DB.Keys(r.Context(), id)
	if err != nil {
		return err
	}
	body := keyListBody{Keys: []keyBody{}}
	for _, k := range keys {
		body.Keys = append(body.Keys, keyBodyOf(k))
	}
	return respond(w, http.StatusOK, body)
}

func (s *server) getKeySecret(w http.ResponseWriter, r *http.Request) error {
	id, err := pathTenantID(r)
	if err != nil {
		return err
	}
	name, err := pathParam(r, "key_name")
	if err != nil {
		return err
	}
	if _, err := params(r); err != nil {
		return err
	}
	if !plausibleName(name) {
		return tenant.Errorf(tenant.NotFound, "key_not_found", "there is no such key")
	}
	key, secret, err := s.Service.Reveal(r.Context(), id, name, actorOf(r))
	if err != nil {
		return err
	}
	w.Header().Set("Cache-Control", "no-store")
	return respond(w, http.StatusOK, credentialsBody{Name: key.Name, Key: secret.Reveal(), Scopes: key.Scopes})
}

// plausibleName reports whether text from a path can name an app or a key; what
// cannot, Postgres need not see.
func plausibleName(text string) bool { return nameText.MatchString(text) }

var nameText = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)

type identifyBody struct {
	Key string `json:"key"`
}

type identifiedBody struct {
	TenantID tenant.ID    `json:"tenant_id,omitempty"`
	AppID    tenant.AppID `json:"app_id"`
	Key      keyBody      `json:"key"`
}

const maxLeakLength = 512

// leakedKey is the key in a string as it is found: a line of a file, or the value
// of an Authorization header at Clarifai.
func leakedKey(text string) string {
	text = strings.TrimSpace(text)
	if scheme, rest, ok := strings.Cut(text, " "); ok && strings.EqualFold(scheme, "Key") {
		return strings.TrimSpace(rest)
	}
	return text
}

func (s *server) identifyKey(w http.ResponseWriter, r *http.Request) error {
	if _, err := params(r); err != nil {
		return err
	}
	var body identifyBody
	if err := decodeBody(w, r, &body, holdsSecret, "key"); err != nil {
		return err
	}
	key := leakedKey(body.Key)
	if n := len(key); n == 0 || n > maxLeakLength {
		return invalid("key", "must have 1 to %d bytes, and has %d", maxLeakLength, n)
	}
	found, err := s.Service.Identify(r.Context(), tenant.NewSecret(key), actorOf(r))
	if err != nil {
		return err
	}
	if sees, err := s.seesTenant(r, found.TenantID); err != nil {
		return err
	} else if !sees {
		return tenant.Errorf(tenant.NotFound, "key_not_found", "there is no such key")
	}
	infoOf(r).tenant = found.TenantID
	return respond(w, http.StatusOK, identifiedBody{TenantID: found.TenantID, AppID: found.Key.AppID, Key: keyBodyOf(found.Key)})
}
