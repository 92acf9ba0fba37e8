package tenant

import (
	"bytes"
	"errors"
	"time"

	"github.com/google/uuid"
)

// What follows passes between the engine, which decides, and the store, which
// writes.

// A Deployment is which operator and keyset a database belongs to.
type Deployment struct {
	ID          string // 16 characters of 0-9 a-z; stands in every marker upstream
	Operator    UserID
	KeysetProbe []byte // a known text sealed by the keyset in use
}

// A NewTenant is a sign-up as it is written.
type NewTenant struct {
	ID         ID
	Profile    Profile
	Attributes Attributes
	// Again begins the next generation of a tenant that is deleted or being deleted.
	Again bool
	// BuildID names the app that is built if none is ready.
	BuildID AppID
	Limits  BuildLimits
}

// A SignedUp is what came of a sign-up.
type SignedUp struct {
	Tenant Tenant
	// Created says that this sign-up made the tenant, rather than found it.
	Created bool
	// FirstHash is the hash of the attributes of the first sign-up.
	FirstHash []byte
	// Revealed is the tenant's default key, sealed, of a tenant that this sign-up made and
	// that had an app at once: it has been audited as shown. Nil otherwise.
	Revealed *RevealedKey
}

// A NewBatch is sign-ups of many tenants at once, which wait in the background for their
// apps: until nobody else does, and the pools are full.
type NewBatch struct {
	Tenants []NewTenant // no two of one id; BuildID and Limits are not used
	// LeaveDeleted begins no next generation of a tenant that is deleted.
	LeaveDeleted bool
	// DryRun changes nothing. Created then says of a tenant that it would be made; one
	// that never was there has no fields set.
	DryRun bool
}

// A RevealedKey is a key with its sealed secret, of which an event says that it was shown.
type RevealedKey struct {
	Key        Key
	Ciphertext []byte
}

// FirstUnknown reports whether the tenant was adopted, and its first sign-up is not
// known.
func (s SignedUp) FirstUnknown() bool {
	return !bytes.ContainsFunc(s.FirstHash, func(r rune) bool { return r != 0 })
}

// A NewKeyRow is the intent to make a key.
type NewKeyRow struct {
	ID     uuid.UUID
	Name   string
	Scopes []string
}

// A BuildEnd is the last step of a build.
type BuildEnd struct {
	Key  SealedKey
	Next NextBuilds // of the profile of the build
}

// BuildLimits are how many builds of a profile run at once.
type BuildLimits struct {
	Waiting int // for waiting tenants
	Pool    int // for the pool
	// While tenants wait in the background, Import applies instead of Pool, or up to SharedImport if that
	// many wait.
	Import, SharedImport int
}

// NextBuilds says which builds of a profile may begin, if they are needed: one for each id.
type NextBuilds struct {
	Profile Profile
	IDs     []AppID
	Limits  BuildLimits
}

// A Setback is a try that failed.
type Setback struct {
	Problem Problem       // its NextAttemptAt is set by the store
	Delay   time.Duration // until the next try
	// Settled says that the failed call certainly made nothing, neither then nor
	// later: the row is not in doubt because of it.
	Settled bool
	// Counts says that the try counts for the back-off.
	Counts bool
}

// ErrLeaseLost is answered to a worker whose row was taken by another, or moved
// on: what the worker meant to write no longer holds.
var ErrLeaseLost = errors.New("the row's lease was lost")

// A SlotRequest asks for a place in the order of upstream calls.
type SlotRequest struct {
	PerSecond float64       // the rate of all replicas together
	Patience  time.Duration // how far ahead the place may be
	PAT       []byte        // fingerprint of the PAT that the call is made with
	// ChecksPAT says that the call asks whether the PAT is still refused: others
	// are not made with a PAT that is.
	ChecksPAT bool
	// Control says that the call reads or writes the control record. A stopped database makes
	// such calls, too.
	Control bool
	// Removes says that the call removes an app. An operator can pause such calls alone.
	Removes bool
	// ProbeTimeout is when a probe that nobody has heard of again counts as failed.
	ProbeTimeout time.Duration
}

// A Slot is a place in the order of upstream calls of all replicas together.
type Slot struct {
	// Granted says that the call may be made, once Wait has passed. Otherwise
	// nothing was reserved, and Wait is when to ask again.
	Granted bool
	Wait    time.Duration
	// ServerTime is how much of the time that the answer took was spent before
	// Wait was reckoned.
	ServerTime time.Duration
	// Epoch counts the pauses before the slot. A pause voids what was reserved.
	Epoch int64
	// Probe says that this is the one call that tries whether Clarifai is back.
	Probe bool
	// Shaky says that the calls before this one failed: a success is news.
	Shaky bool
	// PATRefused says that the slot is not granted since the PAT is refused.
	PATRefused bool
}

// An UpstreamFailure is a call that Clarifai failed, throttled or did not answer.
type UpstreamFailure struct {
	Epoch     int64   // of the call's slot
	Problem   Problem // why all upstream work pauses, if it comes to that
	Pauses    bool    // this failure alone is reason enough
	TripAfter int     // so many failures in a row are
	// PauseBase is the first pause. Each that follows without a success between is
	// twice as long, up to PauseCap.
	PauseBase, PauseCap time.Duration
	// Pause is the length of the pause that Clarifai asks for; 0 if it does not.
	Pause time.Duration
}

// An UpstreamStatus is what the database knows of the work upstream.
type UpstreamStatus struct {
	Pause        UpstreamPause // by an operator
	Halted       *Problem      // why no work is done at all; nil while it is
	NextSlotIn   time.Duration // until the next free call; 0 means now
	Pauses       int           // in a row; 0 while calls flow
	PausedUntil  time.Time     // when one call tries whether Clarifai is back; zero while calls flow
	PauseReason  *Problem
	PATRefused   *Problem  // why the PAT is not used; nil while it is
	Waiting      int       // tenants that wait for an app, counted up to 10,000 of each profile
	OldestSince  time.Time // since when the oldest of them waits; zero if none
	Importing    int       // tenants beside those that wait for one in the background
	Building     int       // apps being built; this and what follows is counted up to 10,000
	Revoking     int       // keys being revoked
	Purging      int       // apps being removed
	LastProblem  *Problem
	DatabaseTime time.Time
}

// An Identified is whose a key or an app is.
type Identified struct {
	TenantID ID // empty while the app waits in the pool
	AppID    AppID
	AppState AppState
	Keys     []Key     // the one that was asked for, or all of the app's
	At       time.Time // when it was looked up, by the database's clock
}
