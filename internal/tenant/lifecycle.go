package tenant

import (
	"encoding/hex"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
)

// A Change is what a caller asks of a tenant that is there.
type Change string

// The changes. Replace is a sign-up of an id whose tenant is deleted or being
// deleted.
const (
	Suspend   Change = "suspend"
	Resume    Change = "resume"
	Delete    Change = "delete"
	Purge     Change = "purge"
	Restore   Change = "restore"
	Replace   Change = "replace"
	ChangeKey Change = "change_keys"
)

// Changes lists every change.
var Changes = []Change{Suspend, Resume, Delete, Purge, Restore, Replace, ChangeKey}

// A transition is the states in which a change can be asked for, and those in which
// it has been made or is under way: to ask again changes nothing.
var transitions = map[Change]struct{ from, done []State }{
	Suspend:   {[]State{Active, Resuming}, []State{Suspending, Suspended}},
	Resume:    {[]State{Suspended, Suspending}, []State{Resuming, Active}},
	Delete:    {[]State{Provisioning, Active, Suspending, Suspended, Resuming}, []State{Deleting, Purging, Deleted}},
	Purge:     {[]State{Provisioning, Active, Suspending, Suspended, Resuming, Deleting}, []State{Purging, Deleted}},
	Restore:   {[]State{Deleting}, []State{Resuming, Active}},
	Replace:   {[]State{Deleting, Purging, Deleted}, nil},
	ChangeKey: {[]State{Active}, nil},
}

// Allows returns the changes that can be asked for in s.
func (s State) Allows() []Change {
	var allowed []Change
	for _, c := range Changes {
		if slices.Contains(transitions[c].from, s) {
			allowed = append(allowed, c)
		}
	}
	return allowed
}

// Check reports whether a tenant in state s can be changed by c. Done says that c
// has been made already, or is under way. Otherwise the error is a Conflict that
// says what s allows.
func (c Change) Check(s State) (done bool, err error) {
	t := transitions[c]
	switch {
	case slices.Contains(t.from, s):
		return false, nil
	case slices.Contains(t.done, s):
		return true, nil
	}
	allowed := s.Allows()
	names := make([]string, len(allowed))
	for i, a := range allowed {
		names[i] = string(a)
	}
	e := Errorf(Conflict, "state_forbids", "the tenant is %s, which does not allow %q; it allows: %s", s, c, orNone(names))
	e.State, e.Allowed = s, allowed
	return false, e
}

func orNone(names []string) string {
	if len(names) == 0 {
		return "nothing"
	}
	return strings.Join(names, ", ")
}

// An EndReason says why a key works no longer.
type EndReason string

// The reasons.
const (
	EndRevoked     EndReason = "revoked" // a caller asked for it
	EndRotated     EndReason = "rotated"
	EndExpired     EndReason = "expired"
	EndSuspended   EndReason = "suspended"
	EndDeleted     EndReason = "deleted" // its tenant was
	EndQuarantined EndReason = "quarantined"
	EndDead        EndReason = "dead"    // the key that it was to replace is dead
	EndUnclear     EndReason = "unclear" // the answer of the call that made it was lost
)

// MaxKeys is how many keys of different names a tenant can have.
const MaxKeys = 16

// A KeySpec is what a caller asks for when it puts a key. Nil and zero fields were
// left out: they take the default, and are not compared with a key that is there.
type KeySpec struct {
	Name      string
	Scopes    []string
	ExpiresAt time.Time
}

// ParseKeyName returns s, or an Invalid error: a key's name has 1 to 63 characters of
// a-z, 0-9 and hyphens, and neither begins nor ends with a hyphen.
func ParseKeyName(s string) (string, error) {
	if !profileName.MatchString(s) {
		return "", invalid("key_name", "must have 1 to 63 characters of a-z, 0-9 and hyphens, and not begin or end with a hyphen")
	}
	return s, nil
}

const maxScopes, maxScopeLength = 64, 128

// Validate checks what can be checked without knowing the profile.
func (k KeySpec) Validate(now time.Time) error {
	if k.Scopes != nil && len(k.Scopes) == 0 {
		return invalid("scopes", "is empty: name at least one scope, or leave it out")
	}
	if len(k.Scopes) > maxScopes {
		return invalid("scopes", "has %d scopes: at most %d are allowed", len(k.Scopes), maxScopes)
	}
	for i, scope := range k.Scopes {
		if scope == "" || len(scope) > maxScopeLength || strings.ContainsFunc(scope, func(r rune) bool { return r <= ' ' || r > '~' }) {
			return invalid("scopes", "has at position %d something that cannot be a scope", i)
		}
		if slices.Contains(k.Scopes[:i], scope) {
			return invalid("scopes", "names %s twice", shown(scope))
		}
	}
	if !k.ExpiresAt.IsZero() && !k.ExpiresAt.After(now) {
		return invalid("expires_at", "is in the past: it is %s now", now.UTC().Format(time.RFC3339))
	}
	return nil
}

// MayHave reports whether keys of p may have scope; which scopes they may have, if
// not.
func (p Profile) MayHave(scope string) (ok bool, allowed []string) {
	allowed = p.AllowedScopes
	if len(allowed) == 0 {
		allowed = slices.Clone(p.KeyScopes)
		for _, k := range p.ExtraKeys {
			allowed = append(allowed, k.Scopes...)
		}
		slices.Sort(allowed)
		allowed = slices.Compact(allowed)
	}
	same := func(a string) bool { return a == "All" || SameScope(a, scope) }
	return slices.ContainsFunc(allowed, same), allowed
}

// SameScope reports whether two scopes are the same: Clarifai's documents print
// Models:Get for what its definitions call Models_Get.
func SameScope(a, b string) bool {
	return strings.ReplaceAll(a, ":", "_") == strings.ReplaceAll(b, ":", "_")
}

// SameScopes reports whether two lists hold the same scopes, in any order.
func SameScopes(a, b []string) bool {
	in := func(list []string) func(string) bool {
		return func(s string) bool {
			return slices.ContainsFunc(list, func(other string) bool { return SameScope(s, other) })
		}
	}
	missing := func(from, of []string) bool {
		has := in(from)
		return slices.ContainsFunc(of, func(s string) bool { return !has(s) })
	}
	return !missing(a, b) && !missing(b, a)
}

// A Rotation replaces a key by another of the same name. Both work until the overlap
// ends.
type Rotation struct {
	ID       string // of the caller's choice
	TenantID ID
	KeyName  string
	State    RotationState
	Overlap  time.Duration
	New, Old Key
}

// A RotationState is where a rotation stands.
type RotationState string

// The states of a rotation.
const (
	RotationCreating    RotationState = "creating"    // the new key does not work yet, the old one does
	RotationOverlapping RotationState = "overlapping" // both work
	RotationDone        RotationState = "done"        // the old one works no longer, or is being revoked
	RotationCancelled   RotationState = "cancelled"   // the new key was revoked before it worked
)

// RotationStates lists every state of a rotation.
var RotationStates = []RotationState{RotationCreating, RotationOverlapping, RotationDone, RotationCancelled}

// StateOfRotation says where a rotation stands, by its two keys.
func StateOfRotation(next, old Key) RotationState {
	switch {
	case next.State == KeyCreating:
		return RotationCreating
	case next.ActivatedAt.IsZero():
		return RotationCancelled
	case old.State == KeyRetiring:
		return RotationOverlapping
	}
	return RotationDone
}

// The bounds of a rotation's overlap.
const (
	DefaultOverlap = 24 * time.Hour
	MaxOverlap     = 30 * 24 * time.Hour
)

// A NewRotation is a rotation as it is asked for.
type NewRotation struct {
	ID      string
	KeyName string
	KeyID   uuid.UUID // of the row of the new key
	// Overlap nil takes the default, and is not compared with a rotation that is
	// there.
	Overlap  *time.Duration
	Priority Priority
}

var rotationID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

// Validate checks the rotation.
func (r NewRotation) Validate() error {
	if !rotationID.MatchString(r.ID) {
		return invalid("rotation_id", "must have 1 to 64 characters of A-Z a-z 0-9 . _ - and begin with a letter or digit")
	}
	if r.Overlap != nil {
		return ValidOverlap(*r.Overlap)
	}
	return nil
}

// ValidOverlap reports Invalid for an overlap that no rotation can have.
func ValidOverlap(d time.Duration) error {
	if d < 0 || d > MaxOverlap {
		return invalid("overlap", "is %s, and must be from 0s to %s", d, MaxOverlap)
	}
	return nil
}

// A Patch changes attributes of a tenant. Nil fields stay as they are; a nil label
// is removed.
type Patch struct {
	DisplayName        *string
	Labels             map[string]*string
	ClearLabels        bool // before Labels are set
	DeletionProtection *bool
	// Within is the scope of who asks: the tenant keeps its labels.
	Within Scope
}

// Apply returns the attributes of a tenant after p, or an Invalid error.
func (p Patch) Apply(t Tenant) (Attributes, error) {
	if p.ClearLabels || p.Labels != nil {
		if err := p.Within.CheckPatch(p.Labels); err != nil {
			return Attributes{}, err
		}
	}
	a := Attributes{DisplayName: t.DisplayName, Labels: map[string]string{}}
	if p.DisplayName != nil {
		a.DisplayName = *p.DisplayName
	}
	if !p.ClearLabels {
		for k, v := range t.Labels {
			a.Labels[k] = v
		}
	}
	for k, v := range p.Labels {
		if v == nil {
			delete(a.Labels, k)
		} else {
			a.Labels[k] = *v
		}
	}
	return a, SignUp{DisplayName: &a.DisplayName, Labels: a.Labels}.Validate()
}

// Fields lists what p changes, for the audit log: names and no values.
func (p Patch) Fields() []string {
	var fields []string
	if p.DisplayName != nil {
		fields = append(fields, "display_name")
	}
	if p.ClearLabels {
		fields = append(fields, "labels")
	}
	for k := range p.Labels {
		fields = append(fields, "labels."+k)
	}
	if p.DeletionProtection != nil {
		fields = append(fields, fmt.Sprintf("deletion_protection=%t", *p.DeletionProtection))
	}
	slices.Sort(fields)
	return fields
}

// A Suspect is what may have leaked: one of a key's fingerprint, or an app.
type Suspect struct {
	Fingerprint []byte
	AppID       AppID
}

// An UnknownKey is a leaked key that has no row. A worker asks Clarifai, with the key itself, which
// app it opens.
type UnknownKey struct {
	ID          uuid.UUID
	Ciphertext  []byte
	Fingerprint []byte
	State       UnknownKeyState
	RequestedBy Actor
	Attempts    int
	Problem     *Problem // why it was refused, or why the last attempt failed
	LeasedUntil time.Time
}

// An UnknownKeyState is the state of the quarantine of an unknown key.
type UnknownKeyState string

// The states. Done means that the key has a row, and is being revoked.
const (
	UnknownChecking UnknownKeyState = "checking"
	UnknownDone     UnknownKeyState = "done"
	UnknownRefused  UnknownKeyState = "refused"
)

// UnknownKeyChannel is the id that notifies requests which wait for the quarantine of an unknown
// key. It cannot be a tenant, since tenant ids have no slash.
func UnknownKeyChannel(fingerprint []byte) ID {
	return ID("/quarantine/" + hex.EncodeToString(fingerprint))
}

// A Quarantine is what was done about a leaked key.
type Quarantine struct {
	TenantID ID // empty for a key of the pool
	Key      Key
	// Successor is the key that takes its place; its ID is zero if it has none.
	Successor Key
}
