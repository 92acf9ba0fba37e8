package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/tenantry/tenantry/internal/tenant"
)

// newCallerFlags describe a caller that is to be made, here or on the database.
type newCallerFlags struct {
	Name      string        `required:"" help:"Who will hold the token."`
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
	if c.Scope, err = labelsOf(f.Label); err != nil {
		return c, err
	}
	if fault, ok := errors.AsType[*tenant.Error](c.Validate(now)); ok {
		name, _, _ := strings.Cut(fault.Field, ".")
		flag := map[string]string{"labels": "label", "rate_limit": "rate-limit", "expires_at": "expires-in"}[name]
		if flag == "" {
			flag = name
		}
		return c, errors.New("--" + flag + " " + fault.Detail)
	}
	return c, nil
}

// labelsOf reads the values of a flag --label; nil is none.
func labelsOf(texts []string) (map[string]string, error) {
	var labels map[string]string
	for _, text := range texts {
		key, value, ok := strings.Cut(text, "=")
		if !ok || key == "" {
			return nil, fmt.Errorf("--label %q must read key=value", text)
		}
		if _, twice := labels[key]; twice {
			return nil, fmt.Errorf("--label %s is given twice", key)
		}
		if labels == nil {
			labels = map[string]string{}
		}
		labels[key] = value
	}
	return labels, nil
}

func expiry(now time.Time, in time.Duration) (time.Time, error) {
	switch {
	case in < 0:
		return time.Time{}, errors.New("--expires-in must not be negative")
	case in == 0:
		return time.Time{}, nil
	}
	return now.Add(in), nil
}

// callerHeads is the first row of a table of callers.
const callerHeads = "ID\tNAME\tROLE\tLABELS\tRATE\tCREATED\tEXPIRES\tLAST USED\tREVOKED\tREPLACED BY"

// printCaller prints a row under callerHeads.
func printCaller(w io.Writer, c tenant.Caller) {
	limit := "-"
	if c.RateLimit > 0 {
		limit = strconv.Itoa(c.RateLimit) + "/s"
	}
	_, _ = fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", c.TokenID, c.Name, c.Role, shownLabels(c.Scope), limit,
		shownTime(c.CreatedAt, "-"), shownTime(c.ExpiresAt, "never"), shownTime(c.LastUsedAt, "never"), shownTime(c.RevokedAt, "-"),
		textOr(&c.ReplacedBy, "-"))
}

func shownLabels(labels tenant.Scope) string {
	if len(labels) == 0 {
		return "-"
	}
	var pairs []string
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		pairs = append(pairs, k+"="+labels[k])
	}
	return strings.Join(pairs, ",")
}
