package tenant

import (
	"errors"
	"fmt"
	"time"
)

// A Kind is a sort of failure, named by what the caller can do next.
type Kind string

// The kinds of failure a caller can act on.
const (
	Invalid         Kind = "invalid"         // mend the request
	Unauthenticated Kind = "unauthenticated" // send a token that is known
	Forbidden       Kind = "forbidden"       // use a caller with another role
	NotFound        Kind = "not_found"       // there is no such thing
	Conflict        Kind = "conflict"        // the state of things forbids it
	Precondition    Kind = "precondition"    // read again, then decide
	TooLarge        Kind = "too_large"       // send less
	TooMany         Kind = "too_many"        // send fewer requests a second
	Unavailable     Kind = "unavailable"     // try again later
)

// Kinds lists every kind, so that tests can walk them.
var Kinds = []Kind{Invalid, Unauthenticated, Forbidden, NotFound, Conflict, Precondition, TooLarge, TooMany, Unavailable}

// Error makes a kind usable as the target of errors.Is.
func (k Kind) Error() string { return string(k) }

// An Error is a failure meant for the caller. Any other error that reaches the
// edge is a fault of ours and is answered without its text.
type Error struct {
	Kind       Kind
	Code       string        // stable, for programs; empty means the kind's name
	Detail     string        // shown to the caller; never holds a token or a key
	Field      string        // where in the request the fault is; may be empty
	RetryAfter time.Duration // when to try again; zero means unknown
	// State and Allowed say of a change that the tenant's state does not allow what
	// that state is, and which changes it does allow.
	State   State
	Allowed []Change
	Err     error // the cause, for the log only; may be nil
}

func (e *Error) Error() string {
	s := string(e.Kind) + ": " + e.Detail
	if e.Field != "" {
		s = string(e.Kind) + ": " + e.Field + ": " + e.Detail
	}
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

func (e *Error) Unwrap() error { return e.Err }

// Is lets callers ask errors.Is(err, tenant.NotFound).
func (e *Error) Is(target error) bool { return target == error(e.Kind) }

// Errorf returns an Error of the given kind and code. Its text is shown to the
// caller.
func Errorf(kind Kind, code, format string, args ...any) *Error {
	return &Error{Kind: kind, Code: code, Detail: fmt.Sprintf(format, args...)}
}

// invalid says what is wrong with one field of a request.
func invalid(field, format string, args ...any) *Error {
	return &Error{Kind: Invalid, Code: "invalid_" + codeOf(field), Field: field, Detail: fmt.Sprintf(format, args...)}
}

// An UpstreamError is a call to Clarifai that failed. It never holds the URL,
// the request or a secret: key URLs contain the key.
type UpstreamError struct {
	Call      string        // Clarifai's name of the call, such as PostApps
	Class     UpstreamClass // what to do about it
	Code      int           // Clarifai's status.code; 0 where the answer was no envelope
	HTTP      int           // the HTTP status; 0 where no answer came
	Detail    string        // Clarifai's description and details, shortened and scrubbed
	RequestID string        // Clarifai's req_id; may be empty
	// Moved says that the app has another id now; Detail says which.
	Moved bool
	// Unclear says that the change may have been made, or may still be made.
	Unclear bool
	// TooMuch says that the response took too long or is too large: a request for less may succeed.
	TooMuch bool
	// RetryAfter is for how long Clarifai, or a proxy, asks not to be called, up to an hour; 0 if it does not.
	RetryAfter time.Duration
}

func (e *UpstreamError) Error() string {
	s := "clarifai " + e.Call + ": " + e.Detail
	if e.Code != 0 {
		s += fmt.Sprintf(" (code %d)", e.Code)
	}
	if e.RequestID != "" {
		s += " (request " + e.RequestID + ")"
	}
	return s
}

// An UpstreamClass says what a failed call means for the work that made it.
type UpstreamClass string

// The classes of upstream failure.
const (
	UpstreamNotFound  UpstreamClass = "not_found" // no such app or key
	UpstreamDuplicate UpstreamClass = "duplicate" // the id is taken: look whose it is
	UpstreamThrottled UpstreamClass = "throttled" // too many requests
	UpstreamDown      UpstreamClass = "down"      // no answer, or a fault of theirs
	UpstreamQuota     UpstreamClass = "quota"     // the account's limits are reached
	UpstreamPAT       UpstreamClass = "pat"       // the PAT is refused
	UpstreamForbidden UpstreamClass = "forbidden" // the PAT may not do this
	UpstreamRefused   UpstreamClass = "refused"   // the request is wrong: a fault of ours or of the profile
	UpstreamAccount   UpstreamClass = "account"   // the account is blocked or unpaid: its owner must act
)

// UpstreamClasses lists every class, so that tests can walk them.
var UpstreamClasses = []UpstreamClass{UpstreamNotFound, UpstreamDuplicate, UpstreamThrottled, UpstreamDown,
	UpstreamQuota, UpstreamPAT, UpstreamForbidden, UpstreamRefused, UpstreamAccount}

// ClassOf returns the class of the upstream failure in err, or "" if there is none.
func ClassOf(err error) UpstreamClass {
	if up, ok := errors.AsType[*UpstreamError](err); ok {
		return up.Class
	}
	return ""
}
