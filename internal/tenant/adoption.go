package tenant

import (
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/uuid"
)

// An AdoptRequest asks to take over an app that was made by hand.
type AdoptRequest struct {
	AppID AppID
	// UserID is whose the app is upstream. Empty, or the operator, is the operator's
	// own; another's is one that is shared with the operator.
	UserID UserID
	Key    Secret // that opens the app; unset if one is to be made
	DryRun bool   // look, and change nothing
	// ByAdmin says that an admin adopts. An admin needs no key as a proof that an app of Tenantry
	// belongs to the tenant.
	ByAdmin bool
}

// Limits on what an adoption names, in bytes.
const (
	MaxAppIDLength  = 64
	MaxUserIDLength = 128
	MaxKeyLength    = 512
)

// Validate checks what can be checked without asking Clarifai. It never repeats the
// key.
func (a AdoptRequest) Validate() error {
	if err := validUpstreamID("adopt.app_id", string(a.AppID), MaxAppIDLength); err != nil {
		return err
	}
	if a.UserID != "" {
		if err := validUpstreamID("adopt.user_id", string(a.UserID), MaxUserIDLength); err != nil {
			return err
		}
		if a.UserID == "me" {
			return invalid("adopt.user_id", "must be the id of a Clarifai user, not the alias %q", "me")
		}
	}
	if !a.Key.IsSet() {
		return nil
	}
	switch key := a.Key.Reveal(); {
	case key == "" || len(key) > MaxKeyLength:
		return invalid("adopt.key", "must have 1 to %d characters, or be left out", MaxKeyLength)
	case strings.ContainsFunc(key, func(r rune) bool { return r <= ' ' || r > '~' }):
		return invalid("adopt.key", "has white space or other characters that no key has")
	case strings.Contains(key, "*"):
		return invalid("adopt.key", "has asterisks: it looks like a key as a listing masks it")
	}
	return nil
}

// validUpstreamID keeps what is stored, shown and put into paths from being anything
// but an id. Which ids Clarifai allows is for Clarifai to say.
func validUpstreamID(field, s string, most int) error {
	switch {
	case s == "":
		return invalid(field, "is missing or empty")
	case len(s) > most:
		return invalid(field, "has %d bytes: at most %d are allowed", len(s), most)
	case !utf8.ValidString(s):
		return invalid(field, "is not valid UTF-8")
	case s == "." || s == "..":
		return invalid(field, "must not be %q", s)
	case strings.ContainsFunc(s, func(r rune) bool { return r == '/' || unicode.IsSpace(r) || !unicode.IsPrint(r) }):
		return invalid(field, "has a slash, white space or a character that cannot be printed")
	}
	return nil
}

// An AdoptionState is where an adoption stands. One that is done has no state: the
// tenant is there.
type AdoptionState string

// The states of an adoption.
const (
	AdoptionChecking AdoptionState = "checking"
	AdoptionPossible AdoptionState = "possible" // what a dry run ends with
	AdoptionRefused  AdoptionState = "refused"
)

// A NewAdoption is an adoption as it is written.
type NewAdoption struct {
	ID         uuid.UUID // and of the row of the key
	TenantID   ID
	AppID      AppID
	AppUserID  UserID // empty for the operator's own
	Key        SealedKey
	Profile    string
	Attributes Attributes
	DryRun     bool
	ByAdmin    bool // as AdoptRequest.ByAdmin
}

// An Adoption is one as it stands.
type Adoption struct {
	ID        uuid.UUID
	TenantID  ID
	AppID     AppID
	AppUserID UserID
	DryRun    bool
	State     AdoptionState
	Problem   *Problem // why it is refused, or what holds it up
	CreatedAt time.Time
}

// A LeasedAdoption is an adoption that a worker has leased.
type LeasedAdoption struct {
	Adoption
	Profile     string
	Ciphertext  []byte // of the key that was given, sealed for ID; nil for none
	RequestedBy Actor
	ByAdmin     bool // as AdoptRequest.ByAdmin
	Reserved    bool // the app is reserved for this adoption, which may have written the ownership tag
	Attempts    int
	LeasedUntil time.Time // as App.LeasedUntil
}

// A BegunAdoption is what came of asking for an adoption: it is under way or ended, or
// there is nothing to do.
type BegunAdoption struct {
	Adoption Adoption // its ID is zero where the tenant has what is asked for
	Tenant   Tenant   // that is there already; its ID is empty for none
}

// ErrTenantTaken is answered for the adoption of an app by a tenant that has another, or
// waits for one.
func ErrTenantTaken(id ID, app AppID, state State) *Error {
	has := "waits for an app of its own"
	if app != "" {
		has = "has the app " + string(app)
	}
	e := Errorf(Conflict, "adopt_tenant_taken", "the tenant %s is there already, is %s and %s", id, state, has)
	e.State, e.Allowed = state, state.Allows()
	return e
}

// AdoptedRevision is the profile revision of an app that was not built of any.
const AdoptedRevision = "adopted"

// An OpenedApp is what a key says of itself: the app that it opens, and what it may do
// there.
type OpenedApp struct {
	AppID  AppID
	UserID UserID // whose the app is; may be empty
	Scopes []string
}

// ErrNotOurs is answered for a change of keys that Clarifai allows only to the owner of
// the app: of one that is shared with the operator, keys can be neither made nor
// deleted.
func ErrNotOurs(owner UserID) *Error {
	return Errorf(Conflict, "key_not_ours",
		"the app belongs to the Clarifai user %s and is shared with the operator: Clarifai lets only %s make and delete keys of it; "+
			"to replace its key, adopt the app again with another that %s has made", owner, owner, owner)
}
