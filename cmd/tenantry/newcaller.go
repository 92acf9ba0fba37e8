package main

import (
	"errors"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/tenantry/tenantry/internal/tenant"
)

// newCallerFlags describe a caller that is to be made, here or on the database.
type newCallerFlags struct {
	Name      string        `required:"" placeholder:"NAME" help:"Who will hold the token."`
	Role      tenant.Role   `required:"" enum:"viewer,provisioner,admin" help:"What it may do: ${enum}."`
	ExpiresIn time.Duration `placeholder:"DURATION" help:"How long it is valid, such as 2160h. Without it: until it is revoked."`
	Label     []string      `sep:"none" placeholder:"KEY=VALUE" help:"Limit it to tenants that have this label; may be given several times: all of them."`
	RateLimit int           `placeholder:"N" help:"How many requests a second it may make, of each replica. Without it: any."`
}

// caller returns what the flags describe.
func (f newCallerFlags) caller(now time.Time) (tenant.NewCaller, error) {
	c := tenant.NewCaller{Name: f.Name, Role: f.Role, RateLimit: f.RateLimit}
	var err error
	if c.ExpiresAt, err = expiry(now, f.ExpiresIn); err != nil {
		return c, err
	}
	labels, err := parseLabels(f.Label)
	if err != nil {
		return c, err
	}
	c.Scope = tenant.Scope(labels)
	if fault, ok := errors.AsType[*tenant.Error](c.Validate(now)); ok {
		name, _, _ := strings.Cut(fault.Field, ".")
		flag := map[string]string{"labels": "label", "rate_limit": "rate-limit", "expires_at": "expires-in"}[name]
		if flag == "" {
			flag = name
		}
		return c, usagef("--%s %s", flag, fault.Detail)
	}
	return c, nil
}

func expiry(now time.Time, in time.Duration) (time.Time, error) {
	switch {
	case in < 0:
		return time.Time{}, usagef("--expires-in must not be negative")
	case in == 0:
		return time.Time{}, nil
	}
	return now.Add(in), nil
}

func callerHeads() []string {
	return []string{"ID", "NAME", "ROLE", "LABELS", "RATE", "CREATED", "EXPIRES", "LAST USED", "REVOKED", "REPLACED BY"}
}

// callerRow prints a row under callerHeads.
func callerRow(w *table, c tenant.Caller, now time.Time) {
	limit := ""
	if c.RateLimit > 0 {
		limit = strconv.Itoa(c.RateLimit) + "/s"
	}
	w.row(c.TokenID, c.Name, c.Role, shownLabels(c.Scope), limit, ago(&c.CreatedAt, now), orNever(ago(&c.ExpiresAt, now)),
		orNever(ago(&c.LastUsedAt, now)), ago(&c.RevokedAt, now), c.ReplacedBy)
}

// shownLabels writes labels as flags take them.
func shownLabels(labels tenant.Scope) string {
	var pairs []string
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		pairs = append(pairs, k+"="+labels[k])
	}
	return strings.Join(pairs, ",")
}
