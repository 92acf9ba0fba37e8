package tenant

import (
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
	// BuildID names the app that is built if none is ready; MaxBuilds bounds how
	// many apps of the profile are built at once.
	BuildID   AppID
	MaxBuilds int
}

// A SignedUp is what came of a sign-up.
type SignedUp struct {
	Tenant Tenant
	// Created says that this sign-up made the tenant, rather than found it.
	Created bool
	// FirstHash is the hash of the attributes of the first sign-up.
	FirstHash []byte
}

// A NewKeyRow is the intent to make a key.
type NewKeyRow struct {
	ID     uuid.UUID
	Name   string
	Scopes []string
}

// A BuildEnd is the last step of a build.
type BuildEnd struct {
	Key     SealedKey
	Profile Profile
	// NextBuilds names the apps to be built next if tenants still wait; at most
	// MaxBuilds are built at once.
	NextBuilds []AppID
	MaxBuilds  int
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

// A Slot is a place in the order of upstream calls of all replicas together.
type Slot struct {
	// Granted says that the call may be made, once Wait has passed. Otherwise
	// nothing was reserved, and Wait is when to ask again.
	Granted bool
	Wait    time.Duration
}

// An IdentifiedKey is whose key a string is.
type IdentifiedKey struct {
	Key      Key
	TenantID ID // empty while the key's app waits in the pool
}
