package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/tenantry/tenantry/api/client"
	"github.com/tenantry/tenantry/internal/tenant"
)

type callerCmd struct {
	List   callerListCmd   `cmd:"" help:"List the callers, without their tokens."`
	Show   callerShowCmd   `cmd:"" help:"Show a caller, without its token."`
	Create callerCreateCmd `cmd:"" help:"Make a caller and print its token: it cannot be shown again."`
	Rotate callerRotateCmd `cmd:"" help:"Replace a caller's token and print the new one; both work until the overlap ends."`
	Revoke callerRevokeCmd `cmd:"" help:"Make a caller's token invalid at once."`
}

// callerFlags are those of every command about callers.
type callerFlags struct {
	apiFlags
	outputFlags
}

// callerArg names a caller.
type callerArg struct {
	ID string `arg:"" help:"The caller's id, as the list shows it: the part of its token between the underscores."`
}

// id keeps the token itself, if that was given, from being sent.
func (a callerArg) id() string {
	if t, ok := tenant.ParseToken(a.ID); ok {
		return t.ID
	}
	return a.ID
}

type callerListCmd struct{ callerFlags }

func (c callerListCmd) Run(ctx context.Context, e env) error {
	api, err := c.client(e)
	if err != nil {
		return err
	}
	now := time.Now()
	return printList(e, c.outputFlags, 0, "callers", callerHeads(), func(size int, cursor *string) (*http.Response, error) {
		return api.ListCallers(ctx, &client.ListCallersParams{Limit: &size, Cursor: cursor})
	}, func(w *table, c client.Caller) { callerRow(w, callerOf(c), now) })
}

type callerShowCmd struct {
	callerFlags
	callerArg
}

func (c callerShowCmd) Run(ctx context.Context, e env) error {
	api, err := c.client(e)
	if err != nil {
		return err
	}
	return c.print(e)(answer[client.Caller](api.GetCaller(ctx, c.id())))
}

// print prints the caller that was answered, or passes on why there is none.
func (f callerFlags) print(e env) func(answered[client.Caller], error) error {
	return func(got answered[client.Caller], err error) error {
		switch {
		case err != nil:
			return err
		case f.json():
			return printBody(e.stdout, got.body)
		}
		w := newTable(e.stdout, callerHeads()...)
		callerRow(w, callerOf(got.value), time.Now())
		return w.flush()
	}
}

type callerCreateCmd struct {
	callerFlags
	newCallerFlags
}

func (c callerCreateCmd) Run(ctx context.Context, e env) error {
	api, err := c.client(e)
	if err != nil {
		return err
	}
	n, err := c.caller(time.Now())
	if err != nil {
		return err
	}
	body := client.NewCaller{Name: n.Name, Role: client.Role(n.Role)}
	if !n.ExpiresAt.IsZero() {
		body.ExpiresAt = &n.ExpiresAt
	}
	if n.Scope.Limited() {
		labels := client.CallerLabels(n.Scope)
		body.Labels = &labels
	}
	if n.RateLimit > 0 {
		body.RateLimit = &n.RateLimit
	}
	return c.printToken(e)(answer[client.Caller](api.CreateCaller(ctx, body)))
}

// printToken prints a caller that was made: of a table only the token, so that a
// script has it alone.
func (f callerFlags) printToken(e env) func(answered[client.Caller], error) error {
	return func(made answered[client.Caller], err error) error {
		c := made.value
		switch {
		case err != nil:
			return err
		case c.Token == nil:
			return errors.New("the API answers without a token")
		case f.json():
			return printBody(e.stdout, made.body)
		}
		_, _ = fmt.Fprintf(e.stderr, "token %s of %s, role %s: keep it, it is not shown again\n", c.Id, c.Name, c.Role)
		_, err = fmt.Fprintln(e.stdout, *c.Token)
		return err
	}
}

type callerRotateCmd struct {
	callerFlags
	callerArg
	Overlap   time.Duration `default:"24h" help:"How long the old token works on, at most 720h; 0s revokes it at once."`
	ExpiresIn time.Duration `placeholder:"DURATION" help:"How long the new token is valid. Without it: as long as the old one was made for."`
}

func (c callerRotateCmd) Run(ctx context.Context, e env) error {
	api, err := c.client(e)
	if err != nil {
		return err
	}
	expires, err := expiry(time.Now(), c.ExpiresIn)
	if err != nil {
		return err
	}
	overlap := c.Overlap.String()
	body := client.CallerRotation{Overlap: &overlap}
	if !expires.IsZero() {
		body.ExpiresAt = &expires
	}
	return c.printToken(e)(answer[client.Caller](api.RotateCaller(ctx, c.id(), body)))
}

type callerRevokeCmd struct {
	callerFlags
	callerArg
}

func (c callerRevokeCmd) Run(ctx context.Context, e env) error {
	api, err := c.client(e)
	if err != nil {
		return err
	}
	return c.print(e)(answer[client.Caller](api.RevokeCaller(ctx, c.id())))
}

func callerOf(c client.Caller) tenant.Caller {
	at := func(t *time.Time) time.Time {
		if t == nil {
			return time.Time{}
		}
		return *t
	}
	is := tenant.Caller{TokenID: c.Id, Name: c.Name, Role: tenant.Role(c.Role), Scope: tenant.Scope(c.Labels), CreatedAt: c.CreatedAt,
		ExpiresAt: at(c.ExpiresAt), RevokedAt: at(c.RevokedAt), LastUsedAt: at(c.LastUsedAt), ReplacedBy: textOr(c.ReplacedBy, "")}
	if c.RateLimit != nil {
		is.RateLimit = *c.RateLimit
	}
	return is
}
