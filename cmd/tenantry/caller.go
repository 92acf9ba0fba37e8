package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"text/tabwriter"
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
	Output string `default:"table" enum:"table,json" help:"How to print: table or json."`
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
	all := []client.Caller{}
	limit := 1000
	for cursor := (*string)(nil); ; {
		page, err := api.ListCallersWithResponse(ctx, &client.ListCallersParams{Limit: &limit, Cursor: cursor})
		if err != nil {
			return err
		}
		if page.JSON200 == nil {
			return problemOf(page.HTTPResponse, page.Body)
		}
		all = append(all, page.JSON200.Callers...)
		if cursor = page.JSON200.NextCursor; cursor == nil {
			break
		}
	}
	if c.Output == "json" {
		return printJSON(e.stdout, all)
	}
	return printCallers(e.stdout, all)
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
	got, err := api.GetCallerWithResponse(ctx, c.id())
	if err != nil {
		return err
	}
	return c.print(e, got.JSON200, func() error { return problemOf(got.HTTPResponse, got.Body) })
}

// print prints one caller, or returns why there is none.
func (f callerFlags) print(e env, c *client.Caller, problem func() error) error {
	switch {
	case c == nil:
		return problem()
	case f.Output == "json":
		return printJSON(e.stdout, c)
	}
	return printCallers(e.stdout, []client.Caller{*c})
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
	made, err := api.CreateCallerWithResponse(ctx, body)
	if err != nil {
		return err
	}
	return c.printToken(e, made.JSON201, func() error { return problemOf(made.HTTPResponse, made.Body) })
}

// printToken prints a caller that was made: of a table only the token, so that a
// script has it alone.
func (f callerFlags) printToken(e env, c *client.Caller, problem func() error) error {
	switch {
	case c == nil:
		return problem()
	case c.Token == nil:
		return errors.New("the API answers without a token")
	case f.Output == "json":
		return printJSON(e.stdout, c)
	}
	_, _ = fmt.Fprintf(e.stderr, "token %s of %s, role %s: keep it, it is not shown again\n", c.Id, c.Name, c.Role)
	_, err := fmt.Fprintln(e.stdout, *c.Token)
	return err
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
	made, err := api.RotateCallerWithResponse(ctx, c.id(), body)
	if err != nil {
		return err
	}
	return c.printToken(e, made.JSON201, func() error { return problemOf(made.HTTPResponse, made.Body) })
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
	got, err := api.RevokeCallerWithResponse(ctx, c.id())
	if err != nil {
		return err
	}
	return c.print(e, got.JSON200, func() error { return problemOf(got.HTTPResponse, got.Body) })
}

func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

func printCallers(to io.Writer, callers []client.Caller) error {
	w := tabwriter.NewWriter(to, 0, 8, 2, ' ', 0)
	_, _ = fmt.Fprintln(w, callerHeads)
	at := func(t *time.Time) time.Time {
		if t == nil {
			return time.Time{}
		}
		return *t
	}
	for _, c := range callers {
		row := tenant.Caller{TokenID: c.Id, Name: c.Name, Role: tenant.Role(c.Role), Scope: tenant.Scope(c.Labels), CreatedAt: c.CreatedAt,
			ExpiresAt: at(c.ExpiresAt), RevokedAt: at(c.RevokedAt), LastUsedAt: at(c.LastUsedAt), ReplacedBy: textOr(c.ReplacedBy, "")}
		if c.RateLimit != nil {
			row.RateLimit = *c.RateLimit
		}
		printCaller(w, row)
	}
	return w.Flush()
}
