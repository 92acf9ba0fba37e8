package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/tenant"
)

type migrateCmd struct {
	Up     migrateUpCmd     `cmd:"" help:"Bring the schema to this binary's version, and say what that blocks. Leaves a newer schema on which this binary can serve as it is. Any number of replicas may run it at once."`
	Down   migrateDownCmd   `cmd:"" help:"Take migrations back. Loses the data they hold."`
	Status migrateStatusCmd `cmd:"" help:"Show how the schema stands; exit code 1 if this binary cannot serve on it."`
}

type migrateUpCmd struct {
	databaseFlags
}

func (c migrateUpCmd) Run(ctx context.Context, e env) error {
	_, direct, err := c.urls(e)
	if err != nil {
		return err
	}
	return postgres.MigrateUpAndReport(ctx, direct, func(line string) { _, _ = fmt.Fprintln(e.stderr, line) })
}

type migrateDownCmd struct {
	databaseFlags
	Steps int  `default:"1" help:"How many migrations to take back."`
	Yes   bool `help:"Really do it."`
}

func (c migrateDownCmd) Run(ctx context.Context, e env) error {
	_, direct, err := c.urls(e)
	if err != nil {
		return err
	}
	if c.Steps < 1 {
		return usagef("--steps must be 1 or more")
	}
	if !c.Yes {
		return usagef("this loses the data that the migrations hold: say --yes if you mean it")
	}
	return postgres.MigrateDown(ctx, direct, c.Steps)
}

type migrateStatusCmd struct {
	databaseFlags
}

func (c migrateStatusCmd) Run(ctx context.Context, e env) error {
	db, err := c.open(ctx, e)
	if err != nil {
		return err
	}
	defer db.Close()
	s, err := db.Schema(ctx)
	if err != nil {
		return err
	}
	_, _ = fmt.Fprintf(e.stdout, "schema version %d, this binary's %d\n", s.Version, s.Known)
	return s.Err()
}

// open opens the database for a command that serves no requests.
func (f databaseFlags) open(ctx context.Context, e env) (*postgres.DB, error) {
	_, direct, err := f.urls(e)
	if err != nil {
		return nil, err
	}
	return postgres.Open(ctx, postgres.Config{URL: direct, MaxConns: 2, Standby: true})
}

type tokenCmd struct {
	Create tokenCreateCmd `cmd:"" help:"Make a token and print it: it cannot be shown again."`
	List   tokenListCmd   `cmd:"" help:"List the tokens, without their secrets."`
	Revoke tokenRevokeCmd `cmd:"" help:"Make a token invalid at once."`
}

// operator is who changes things on the command line.
var operator = tenant.Actor{Name: "operator"}

type tokenCreateCmd struct {
	databaseFlags
	newCallerFlags
}

func (c tokenCreateCmd) Run(ctx context.Context, e env) error {
	caller, err := c.caller(time.Now())
	if err != nil {
		return err
	}
	db, err := c.open(ctx, e)
	if err != nil {
		return err
	}
	defer db.Close()
	token, text := tenant.NewToken()
	if _, err := db.AddCaller(ctx, token, caller, operator); err != nil {
		return err
	}
	_, _ = fmt.Fprintf(e.stderr, "token %s of %s, role %s: keep it, it is not shown again\n", token.ID, c.Name, c.Role)
	_, err = fmt.Fprintln(e.stdout, text.Reveal())
	return err
}

type tokenListCmd struct {
	databaseFlags
}

func (c tokenListCmd) Run(ctx context.Context, e env) error {
	db, err := c.open(ctx, e)
	if err != nil {
		return err
	}
	defer db.Close()
	callers, err := db.Callers(ctx, "", 0)
	if err != nil {
		return err
	}
	now := time.Now()
	w := newTable(e.stdout, callerHeads()...)
	for _, t := range callers {
		callerRow(w, t, now)
	}
	return w.flush()
}

type tokenRevokeCmd struct {
	databaseFlags
	ID string `arg:"" help:"The token's id, as the list shows it: the part between the underscores."`
}

func (c tokenRevokeCmd) Run(ctx context.Context, e env) error {
	id := c.ID
	if t, ok := tenant.ParseToken(id); ok { // the whole token was given
		id = t.ID
	}
	db, err := c.open(ctx, e)
	if err != nil {
		return err
	}
	defer db.Close()
	caller, err := db.RevokeCaller(ctx, id, operator)
	if errors.Is(err, tenant.NotFound) {
		return errors.New("there is no token of this id: `tenantry token list` shows those there are")
	}
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(e.stderr, "token %s of %s is revoked since %s\n", caller.TokenID, caller.Name, shownTime(caller.RevokedAt, "-"))
	return err
}

type healthcheckCmd struct {
	InternalURL string `env:"TENANTRY_INTERNAL_URL" default:"http://127.0.0.1:8081" help:"Where the internal listener is."`
}

func (c healthcheckCmd) Run(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(c.InternalURL, "/")+"/livez", nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("the service answers %s", resp.Status)
	}
	return nil
}

type versionCmd struct{}

func (versionCmd) Run(e env) error {
	_, err := fmt.Fprintln(e.stdout, version())
	return err
}

// release is set at link time: -X main.release=v1.2.3.
var release string

func version() string {
	if release != "" {
		return release
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return "devel-" + s.Value[:min(12, len(s.Value))]
		}
	}
	return "devel"
}

// writeAddrFile tells scripts where the service listens, in one piece.
func writeAddrFile(path, publicURL, internalURL string) error {
	text := "TENANTRY_URL=" + publicURL + "\nTENANTRY_INTERNAL_URL=" + internalURL + "\n"
	if err := os.WriteFile(path+".new", []byte(text), 0o644); err != nil {
		return fmt.Errorf("write the address file: %w", err)
	}
	return os.Rename(path+".new", path)
}
