package tenant

import (
	"slices"
	"time"
)

// MaxRateLimit bounds the rate limit of a caller, in requests a second.
const MaxRateLimit = 10000

// A NewCaller is a caller as it is asked for.
type NewCaller struct {
	Name      string
	Role      Role
	ExpiresAt time.Time // zero means never
	Scope     Scope
	RateLimit int // as Caller.RateLimit
}

// Validate checks the caller, as of now.
func (c NewCaller) Validate(now time.Time) error {
	if err := ValidateCallerName(c.Name); err != nil {
		return err
	}
	if !slices.Contains(Roles, c.Role) {
		return invalid("role", "must be viewer, provisioner or admin")
	}
	if err := validExpiry(c.ExpiresAt, now); err != nil {
		return err
	}
	if c.RateLimit < 0 || c.RateLimit > MaxRateLimit {
		return invalid("rate_limit", "must be from 1 to %d requests a second", MaxRateLimit)
	}
	return ValidateLabels(c.Scope)
}

// The bounds of the overlap of a caller's two tokens.
const (
	DefaultTokenOverlap = 24 * time.Hour
	MaxTokenOverlap     = 30 * 24 * time.Hour
)

// A TokenRotation replaces the token of a caller.
type TokenRotation struct {
	Overlap time.Duration // how long the old token works; 0 revokes it at once
	// ExpiresAt is of the new token. Zero means: as long from now as the old one was
	// made for.
	ExpiresAt time.Time
}

// Validate checks the rotation, as of now.
func (r TokenRotation) Validate(now time.Time) error {
	if r.Overlap < 0 || r.Overlap > MaxTokenOverlap {
		return invalid("overlap", "is %s, and must be from 0s to %s", r.Overlap, MaxTokenOverlap)
	}
	return validExpiry(r.ExpiresAt, now)
}

func validExpiry(at, now time.Time) error {
	const field = "expires_at"
	switch {
	case at.IsZero():
		return nil
	case !at.After(now):
		return invalid(field, "has passed: give a time that is to come, or leave it out")
	case at.UTC().Year() > 9999: // which JSON cannot show
		return invalid(field, "must be in a year up to 9999")
	}
	return nil
}
