package httpapi

import (
	"encoding/hex"
	"net/http"
	"regexp"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/tenantry/tenantry/internal/postgres"
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
	RetiresAt   time.Time       `json:"retires_at,omitzero"`
	// Fingerprint is a keyed hash of the secret, for identify.
	Fingerprint string           `json:"fingerprint,omitempty"`
	EndReason   tenant.EndReason `json:"end_reason,omitempty"`
	Problem     *tenant.Problem  `json:"problem,omitempty"`
}

func keyBodyOf(k tenant.Key) keyBody {
	return keyBody{ID: k.ID, Name: k.Name, State: k.State, Hint: k.Hint, Scopes: k.Scopes, CreatedAt: k.CreatedAt.UTC(),
		ActivatedAt: k.ActivatedAt.UTC(), ExpiresAt: k.ExpiresAt.UTC(), RevokedAt: k.RevokedAt.UTC(), RetiresAt: k.RetiresAt.UTC(),
		Fingerprint: hex.EncodeToString(k.Fingerprint), EndReason: k.EndReason, Problem: k.Problem}
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
	var keys []tenant.Key
	if refusesCached(r) {
		keys, err = s.DB.Keys(r.Context(), id)
	} else {
		var fresh postgres.Freshness
		keys, fresh, err = s.DB.LookUpKeys(r.Context(), id)
		tellAge(w, fresh)
	}
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
	return respond(w, http.StatusOK, credentialsOf(key, secret))
}

// plausibleName reports whether text from a path can name an app or a key; what
// cannot, Postgres need not see.
func plausibleName(text string) bool { return nameText.MatchString(text) }

var nameText = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}$`)

type identifyBody struct {
	Key         string       `json:"key"`
	Fingerprint string       `json:"fingerprint"`
	AppID       tenant.AppID `json:"app_id"`
}

type identifiedBody struct {
	TenantID tenant.ID       `json:"tenant_id,omitempty"`
	AppID    tenant.AppID    `json:"app_id"`
	AppState tenant.AppState `json:"app_state"`
	Key      *agedKeyBody    `json:"key,omitempty"`  // that was asked for
	Keys     []agedKeyBody   `json:"keys,omitempty"` // of the app that was asked for
}

// agedKeyBody is a key and for how many seconds it has worked, or did.
type agedKeyBody struct {
	keyBody
	AgeSeconds int64 `json:"age_seconds"`
}

func agedKey(k tenant.Key, now time.Time) agedKeyBody {
	b := agedKeyBody{keyBody: keyBodyOf(k)}
	end := now
	if !k.RevokedAt.IsZero() {
		end = k.RevokedAt
	}
	if !k.ActivatedAt.IsZero() {
		b.AgeSeconds = max(0, int64(end.Sub(k.ActivatedAt)/time.Second))
	}
	return b
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
	if err := decodeBody(w, r, &body, holdsSecret, "key", "fingerprint", "app_id"); err != nil {
		return err
	}
	var secret tenant.Secret
	var what tenant.Suspect
	given := 0
	if body.Fingerprint != "" {
		given++
		sum, err := hex.DecodeString(body.Fingerprint)
		if err != nil || len(sum) != fingerprintSize {
			return invalid("fingerprint", "must have %d hexadecimal digits", 2*fingerprintSize)
		}
		what.Fingerprint = sum
	}
	if body.AppID != "" {
		given++
		if !plausibleName(string(body.AppID)) {
			return tenant.Errorf(tenant.NotFound, "app_not_found", "there is no such app")
		}
		what.AppID = body.AppID
	}
	if body.Key != "" || given == 0 {
		given++
		var err error
		if secret, err = leakedSecret(body.Key); err != nil {
			return err
		}
	}
	if given > 1 {
		return invalid("body", "must have one of key, fingerprint and app_id, and no more")
	}
	found, err := s.Service.Identify(r.Context(), secret, what, actorOf(r))
	if err != nil {
		return err
	}
	infoOf(r).tenant = found.TenantID
	b := identifiedBody{TenantID: found.TenantID, AppID: found.AppID, AppState: found.AppState}
	for _, k := range found.Keys {
		b.Keys = append(b.Keys, agedKey(k, found.At))
	}
	if what.AppID == "" {
		b.Key, b.Keys = &b.Keys[0], nil
	}
	return respond(w, http.StatusOK, b)
}

const fingerprintSize = 32

// leakedSecret reads the field key of a body.
func leakedSecret(text string) (tenant.Secret, error) {
	key := leakedKey(text)
	if n := len(key); n == 0 || n > maxLeakLength {
		return tenant.Secret{}, invalid("key", "must have 1 to %d bytes, and has %d", maxLeakLength, n)
	}
	return tenant.NewSecret(key), nil
}
