// Package tenant holds Tenantry's nouns: tenants, their apps and keys, the
// states they pass through, what makes them valid, and the failures a caller
// can act on. It depends on no other room.
package tenant

import (
	"crypto/sha256"
	"encoding/binary"
	"maps"
	"slices"
	"time"

	"github.com/google/uuid"
)

// An ID names a tenant. The SaaS chooses it; it is compared byte by byte.
// ParseID says which strings are IDs.
type ID string

// An AppID is the id of an app at Clarifai. It says nothing about the tenant.
type AppID string

// A UserID is a Clarifai user or organisation: the operator that owns the apps.
type UserID string

// A State is where a tenant stands in its life.
type State string

// The states of a tenant.
const (
	Provisioning State = "provisioning" // waits for an app; holds none
	Active       State = "active"       // holds an app with a key that works
	Suspending   State = "suspending"
	Suspended    State = "suspended" // no key works upstream; app and data stay
	Resuming     State = "resuming"
	Deleting     State = "deleting" // keys dead or dying, app retained
	Purging      State = "purging"  // no way back
	Deleted      State = "deleted"
)

// States lists every tenant state, in the order of a life.
var States = []State{Provisioning, Active, Suspending, Suspended, Resuming, Deleting, Purging, Deleted}

// Final reports whether a tenant stays in s until somebody asks for a change.
func (s State) Final() bool {
	return s == Active || s == Suspended || s == Deleted
}

// An AppState is where an app stands: see the design, section 5.
type AppState string

// The states of an app.
const (
	AppBuilding AppState = "building"
	AppReady    AppState = "ready"
	AppHeld     AppState = "held"
	AppRetained AppState = "retained"
	AppPurging  AppState = "purging"
	AppDeleted  AppState = "deleted"
)

// A KeyState is where a key stands: see the design, section 5.
type KeyState string

// The states of a key.
const (
	KeyCreating KeyState = "creating"
	KeyActive   KeyState = "active"
	KeyRetiring KeyState = "retiring"
	KeyRevoking KeyState = "revoking"
	KeyRevoked  KeyState = "revoked"
	KeyLost     KeyState = "lost" // may live upstream and cannot be addressed
)

// DefaultKey is the name of the key that every app is built with.
const DefaultKey = "default"

// A Tenant is one end-user of the SaaS product and the app it holds.
type Tenant struct {
	ID          ID
	Generation  int // counts sign-ups of one id; an app belongs to one generation
	State       State
	Profile     string
	AppID       AppID // empty while State is Provisioning or Deleted
	DisplayName string
	Labels      map[string]string
	Problem     *Problem // nil when nothing is wrong
	Version     int64    // grows with every stored change
	CreatedAt   time.Time
	UpdatedAt   time.Time
}

// A Problem says why something does not move, and when it is tried again.
type Problem struct {
	Code              string    `json:"code"`
	Detail            string    `json:"detail"`
	UpstreamCode      int       `json:"upstream_code,omitempty"`
	UpstreamRequestID string    `json:"upstream_request_id,omitempty"`
	Since             time.Time `json:"since"`
	NextAttemptAt     time.Time `json:"next_attempt_at,omitzero"`
}

// An App is a row of the apps table as a worker sees it.
type App struct {
	ID       AppID
	Profile  string
	State    AppState
	Attempts int // tries that failed since the last step forward

	// InDoubt says that a call that may have made or removed the app upstream
	// was begun and its outcome was never recorded.
	InDoubt bool
	// Made says that the app is known to exist upstream.
	Made bool
}

// A Key is a row of the keys table, without its secret.
type Key struct {
	ID          uuid.UUID
	AppID       AppID
	Name        string
	State       KeyState
	Hint        string // the last four characters of the secret
	Scopes      []string
	InDoubt     bool // as App.InDoubt
	Attempts    int
	CreatedAt   time.Time
	ActivatedAt time.Time // zero before the key worked
	RevokedAt   time.Time // zero while the key may work
	ExpiresAt   time.Time // zero means never
}

// A SealedKey is a key with its secret as Postgres holds it.
type SealedKey struct {
	Key
	Ciphertext []byte // opened by the keyring with the key's id
}

// A Profile is a template for tenants.
type Profile struct {
	Name         string
	BaseWorkflow string   // id of a workflow of clarifai/main, or Empty
	KeyScopes    []string // as Clarifai spells them
}

// Revision names the content of p: two profiles that build alike share it.
func (p Profile) Revision() string {
	h := sha256.New()
	hashText(h, p.BaseWorkflow)
	for _, s := range p.KeyScopes {
		hashText(h, s)
	}
	return hexPrefix(h.Sum(nil))
}

// A SignUp is what a caller asks for when it puts a tenant. Nil fields were
// left out: they take the default at the first sign-up and are not compared
// at the next.
type SignUp struct {
	Profile     *string
	DisplayName *string
	Labels      map[string]string
}

// DefaultProfile is the profile of a sign-up that names none.
const DefaultProfile = "default"

// ProfileName returns the profile that s asks for.
func (s SignUp) ProfileName() string {
	if s.Profile == nil {
		return DefaultProfile
	}
	return *s.Profile
}

// AttributesHash names the attributes a tenant was signed up with, so that the
// same sign-up is recognised after the attributes were changed.
func AttributesHash(displayName string, labels map[string]string) []byte {
	h := sha256.New()
	hashText(h, displayName)
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		hashText(h, k)
		hashText(h, labels[k])
	}
	return h.Sum(nil)
}

type writer interface{ Write([]byte) (int, error) }

// hashText writes s with its length, so that no two lists of texts hash alike.
func hashText(w writer, s string) {
	var n [8]byte
	binary.BigEndian.PutUint64(n[:], uint64(len(s)))
	_, _ = w.Write(n[:])
	_, _ = w.Write([]byte(s))
}
