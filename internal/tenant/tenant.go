// Package tenant holds Tenantry's nouns: tenants, their apps and keys, the
// states they pass through, what makes them valid, and the failures a caller
// can act on. It depends on no other room.
package tenant

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"io"
	"maps"
	"slices"
	"strings"
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

// Settled reports whether a tenant stays as it is until somebody asks for a change,
// or its retention ends.
func (t Tenant) Settled() bool {
	switch t.State {
	case Active, Suspended, Deleted:
		return true
	}
	return t.State == Deleting && t.KeysDead && t.PurgeAfter.After(time.Now())
}

// An AppState is where an app stands: see the design, section 5.
type AppState string

// The states of an app.
const (
	AppBuilding AppState = "building"
	AppReady    AppState = "ready"
	AppHeld     AppState = "held"
	AppRetained AppState = "retained"
	AppRetired  AppState = "retired" // of an earlier incarnation, and no tenant is known to hold it
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
	AppID       AppID  // empty while State is Provisioning or Deleted
	AppUserID   UserID // whose the app is upstream; empty for the operator's own
	DisplayName string
	Labels      map[string]string
	// DeletionProtection refuses the deletion of the tenant.
	DeletionProtection bool
	// PurgeAfter is when the app of a tenant that is Deleting is removed, and KeysDead
	// says that none of its keys works any more; both are zero in other states.
	PurgeAfter time.Time
	KeysDead   bool
	Problem    *Problem // nil when nothing is wrong
	Version    int64    // grows with every stored change
	CreatedAt  time.Time
	UpdatedAt  time.Time
}

// A Problem says why something does not move, and when it is tried again. Read from JSON, it has no
// NextAttemptAt that has passed: the attempt is due, or something else holds it up.
type Problem struct {
	Code              string    `json:"code"`
	Detail            string    `json:"detail"`
	UpstreamCode      int       `json:"upstream_code,omitempty"`
	UpstreamRequestID string    `json:"upstream_request_id,omitempty"`
	Since             time.Time `json:"since"`
	NextAttemptAt     time.Time `json:"next_attempt_at,omitzero"`
}

// UnmarshalJSON reads a problem as it is stored.
func (p *Problem) UnmarshalJSON(text []byte) error {
	type stored Problem
	if err := json.Unmarshal(text, (*stored)(p)); err != nil {
		return err
	}
	if !p.NextAttemptAt.After(time.Now()) {
		p.NextAttemptAt = time.Time{}
	}
	return nil
}

// An App is an app that a worker has leased: one that is building or purging, that
// is held and pending, or that has been ready for long.
type App struct {
	ID       AppID
	Profile  string
	Revision string // of the profile that the app was made of, or is to be
	State    AppState
	Attempts int      // tries that failed since the last step forward
	Problem  *Problem // why the last try failed

	// LeasedUntil is the lease, and its fencing token: an update by a worker
	// names it, and finds no row once another worker took the lease.
	LeasedUntil time.Time
	// Made says that the app is known to exist upstream.
	Made bool
	// Wanted says that a tenant waits for such an app, and WantedLater that one does in
	// the background.
	Wanted, WantedLater bool
	// ForPool says that it is built for the pool, or for who waits in the background: a
	// tenant that waits has a build of its own.
	ForPool bool
	// PoolRevision is of what revision of its profile such an app is wanted; empty if no
	// pool is kept.
	PoolRevision string
	// Unproven says that a tenant got it, and that nobody has looked for long whether
	// its key works.
	Unproven bool
	// InDoubt says that, before this lease, a call was begun that may have made
	// the app, and that its outcome was never recorded.
	InDoubt bool
	// Tenant and Generation are whose the app is; zero for one that nobody holds.
	Tenant     ID
	Generation int
	// UserID is whose the app is upstream; empty for the operator's own.
	UserID UserID
	// Marked says that the app's marker upstream names its tenant.
	Marked bool
	// PurgeAfter is when the app of a deleted tenant is removed. TaggedPurgeAfter is the time in
	// its ownership tag, as last written. With Tagging the tag may have TaggingPurgeAfter instead,
	// since the outcome of writing it is unknown. Zero is no removal.
	PurgeAfter, TaggedPurgeAfter, TaggingPurgeAfter time.Time
	Tagging                                         bool
	// EndUnknownKeys says that a command ended the tenant's keys, and that keys at Clarifai with
	// our ownership tag and without a row must be ended too.
	EndUnknownKeys bool
	// RemovalConfirmed says that a person named the app for removal.
	RemovalConfirmed bool
	// MarkerKey is which key of the keyset sealed the tenant in the marker that was
	// just written; nil where none was.
	MarkerKey *SealKeyID
	// HasExtraKeys says that its tenant got the further keys of its profile, if there
	// are any.
	HasExtraKeys bool
	// Creating is the key that is being made for an app that is building; its ID is
	// zero when there is none.
	Creating CreatingKey
}

// A CreatingKey is a key whose making has begun.
type CreatingKey struct {
	ID      uuid.UUID
	InDoubt bool // a call that may have made it was begun, its outcome never recorded
}

// A LeasedKey is a key that a worker has leased: one that is creating for an app
// that a tenant holds, or one that is revoking.
type LeasedKey struct {
	ID         uuid.UUID
	AppID      AppID
	AppUserID  UserID // whose the app is upstream; empty for the operator's own
	Name       string
	State      KeyState
	Scopes     []string
	Priority   Priority
	Ciphertext []byte // nil for a key whose secret was never learnt
	// InDoubt says that a call that may have made the key was begun, InDoubtFor ago,
	// and that its outcome was never recorded.
	InDoubt     bool
	InDoubtFor  time.Duration
	Fingerprint []byte
	Age         time.Duration // since it was created or became active
	// UnconfirmedFor is the time since its end was first expected and could not be confirmed; 0 if it
	// never was.
	UnconfirmedFor time.Duration
	Attempts       int
	Problem        *Problem
	LeasedUntil    time.Time // as App.LeasedUntil
	// Current says that this incarnation of the database began the key's app.
	Current bool
	// Replaces is the key that this one replaces in a rotation; zero for none.
	Replaces uuid.UUID
	// ByCampaign says that a campaign replaces it: no caller asked for this key.
	ByCampaign bool
}

// A Key is one of a tenant's keys, without its secret.
type Key struct {
	ID          uuid.UUID
	AppID       AppID
	Name        string
	State       KeyState
	Hint        string // the last four characters of the secret
	Scopes      []string
	CreatedAt   time.Time
	ActivatedAt time.Time // zero before the key worked
	RevokedAt   time.Time // zero while the key may work
	ExpiresAt   time.Time // zero means never
	RetiresAt   time.Time // when a key that a rotation replaced stops working; zero for others
	Fingerprint []byte    // nil while the secret is not known
	EndReason   EndReason // why the key works no longer or shall not; empty while it shall
	Problem     *Problem  // why it is not as it shall be; nil when nothing is wrong
}

// A SealedKey is a secret as Postgres holds it.
type SealedKey struct {
	ID          uuid.UUID
	Ciphertext  []byte // sealed for ID
	Fingerprint []byte // keyed hash: tells a leaked string's key
	Hint        string
}

// A Profile is a template for tenants.
type Profile struct {
	Name         string
	BaseWorkflow string   // id of a workflow of clarifai/main, or Empty
	KeyScopes    []string // of the key named DefaultKey, as Clarifai spells them
	ExtraKeys    []KeyTemplate
	// AllowedScopes bounds the scopes of keys that callers add. Empty means what
	// KeyScopes and ExtraKeys have together; All allows any.
	AllowedScopes []string

	Language       string // default language of the apps, such as en; empty leaves it to Clarifai
	AppDescription string // of the apps upstream; empty means one of Tenantry's own
	ShowTenant     ShowTenant

	Retention time.Duration // how long the app of a deleted tenant is kept; 0 means DefaultRetention
	MaxKeyAge time.Duration // after which a key is rotated by itself; 0 means never
	PoolMin   int           // ready apps: see PoolBounds
	PoolMax   int
}

// A KeyTemplate is a key that each tenant of a profile gets beside the default one.
type KeyTemplate struct {
	Name   string
	Scopes []string
}

// DefaultRetention is how long the app of a deleted tenant is kept where its profile
// does not say.
const DefaultRetention = 7 * 24 * time.Hour

// ShowTenant says what of the tenant the description of its app upstream shows.
type ShowTenant string

// What of the tenant is shown. The empty ShowTenant shows nothing.
const (
	ShowNothing    ShowTenant = ""
	ShowTenantID   ShowTenant = "id"
	ShowTenantHash ShowTenant = "hash" // keyed: tells tenants apart, and names none
)

// Revision names what p makes of an app and its keys: two profiles that build alike
// share it. How long things are kept, how old they get and how many wait in the
// pool is no part of it.
//
// It is stored with every app: a profile that sets no more than the workflow and the
// key scopes keeps the revision that it had before there was more to set.
func (p Profile) Revision() string {
	h := sha256.New()
	hashText(h, p.BaseWorkflow)
	hashTexts(h, p.KeyScopes)
	for _, part := range []struct{ name, text string }{
		{"language", p.Language}, {"description", p.AppDescription}, {"show tenant", string(p.ShowTenant)},
	} {
		if part.text != "" {
			hashPart(h, part.name, part.text)
		}
	}
	keys := slices.Clone(p.ExtraKeys)
	slices.SortStableFunc(keys, func(a, b KeyTemplate) int { return strings.Compare(a.Name, b.Name) })
	for _, k := range keys {
		hashPart(h, "key", k.Name)
		hashTexts(h, k.Scopes)
	}
	return hexPrefix(h.Sum(nil))
}

func hashTexts(w io.Writer, texts []string) {
	for _, s := range texts {
		hashText(w, s)
	}
}

// hashPart ends the list before it with what is the length of no text.
func hashPart(w io.Writer, name, text string) {
	_, _ = w.Write(bytes.Repeat([]byte{0xff}, 8))
	hashText(w, name)
	hashText(w, text)
}

// A SignUp is what a caller asks for when it puts a tenant. Nil fields were
// left out: they take the default at the first sign-up and are not compared
// at the next.
type SignUp struct {
	Profile     *string
	DisplayName *string
	Labels      map[string]string
	// Replace begins the next generation of a tenant that is being deleted.
	Replace bool
	// Within is the scope of who asks: the tenant gets its labels.
	Within Scope
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

// Attributes are what a sign-up says of a tenant and a caller may change later.
type Attributes struct {
	DisplayName string
	Labels      map[string]string
}

// Attributes returns what s asks for, with defaults for what it left out.
func (s SignUp) Attributes() Attributes {
	a := Attributes{Labels: s.Within.Complete(s.Labels)}
	if s.DisplayName != nil {
		a.DisplayName = *s.DisplayName
	}
	return a
}

// AttributesHashSize is the length of a hash of attributes, in bytes.
const AttributesHashSize = 2 * sha256.Size

// Hash names a, so that a sign-up that is sent again is recognised after its
// attributes were changed. Its two halves of 32 bytes are SHA-256 of the
// display name and of the labels: a sign-up may leave either out.
func (a Attributes) Hash() []byte {
	name := sha256.New()
	hashText(name, a.DisplayName)
	labels := sha256.New()
	for _, k := range slices.Sorted(maps.Keys(a.Labels)) {
		hashText(labels, k)
		hashText(labels, a.Labels[k])
	}
	return append(name.Sum(nil), labels.Sum(nil)...)
}

// Differs lists the fields in which s asks for something other than t has and
// than first, the hash of t's first sign-up, had. Fields left out never differ.
func (s SignUp) Differs(t Tenant, first []byte) []string {
	var fields []string
	if s.Profile != nil && *s.Profile != t.Profile {
		fields = append(fields, "profile")
	}
	asked := s.Attributes()
	hash, half := asked.Hash(), sha256.Size
	if s.DisplayName != nil && *s.DisplayName != t.DisplayName && !bytes.Equal(hash[:half], first[:half]) {
		fields = append(fields, "display_name")
	}
	if s.Labels != nil && !maps.Equal(asked.Labels, t.Labels) && !bytes.Equal(hash[half:], first[half:]) {
		fields = append(fields, "labels")
	}
	return fields
}

// hashText writes s with its length, so that no two lists of texts hash alike.
func hashText(w io.Writer, s string) {
	var n [8]byte
	binary.BigEndian.PutUint64(n[:], uint64(len(s)))
	_, _ = w.Write(n[:])
	_, _ = w.Write([]byte(s))
}
