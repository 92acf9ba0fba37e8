// Command tenantry gives every end-user of a SaaS product a Clarifai app and an
// app-specific key of their own. See the README.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kong"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// With the first signal the handling ends: a second one ends the process.
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, env{args: os.Args[1:], get: os.Getenv, stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, terminal: isTerminal}))
}

// env is what the process gets from outside. Nothing else reads it.
type env struct {
	args           []string
	get            func(string) string
	stdin          io.Reader // nil where there is none
	stdout, stderr io.Writer
	terminal       func(stream any) bool // nil where no stream is one
}

// cli is the command line.
type cli struct {
	Serve       serveCmd       `cmd:"" help:"Run the service: the API, the workers, and an internal listener for probes and metrics."`
	Migrate     migrateCmd     `cmd:"" help:"Bring the database's schema up to date, take it back, or show how it stands."`
	Tenant      tenantCmd      `cmd:"" help:"Sign tenants up, look them up, change, suspend and delete them."`
	Key         keyCmd         `cmd:"" help:"List, show, add, rotate and revoke the keys of tenants; find out whose a key is."`
	App         appCmd         `cmd:"" help:"Say which tenant an app was given to. Roles: all."`
	Upstream    upstreamCmd    `cmd:"" help:"Show how Clarifai and the work for it stand; pause and resume that work in an incident."`
	Pool        poolCmd        `cmd:"" help:"Show the pools of ready apps, and why a pool is below its target. Roles: all."`
	Token       tokenCmd       `cmd:"" help:"Make, list and revoke the tokens of callers. Works on the database, so that the first token needs no token."`
	Caller      callerCmd      `cmd:"" help:"Make, list, rotate and revoke the tokens of callers, through a running service. Role: admin."`
	Profile     profileCmd     `cmd:"" help:"Check a profiles file; list and apply the profiles of a running service."`
	Adopt       adoptCmd       `cmd:"" help:"Take over apps that were made by hand, as a file says, through a running service. A dry run without --yes. Roles: provisioner, admin."`
	Import      importCmd      `cmd:"" help:"Sign up the users that a product has already, as a file says, through a running service; run again, it goes on where it was. Role: provisioner."`
	Rotation    rotationCmd    `cmd:"" help:"Rotate the keys of many tenants, through a running service, and follow, pause and stop such campaigns."`
	Reconcile   reconcileCmd   `cmd:"" help:"Compare Clarifai with the database, and repair what differs, through a running service. Exit code 3 if something differs. Role: admin."`
	Recover     recoverCmd     `cmd:"" help:"After a restart, failover, restore or copy of the database: show what was lost, and decide what to do. Role: admin."`
	Audit       auditCmd       `cmd:"" help:"List the events of the audit log, and check that none was altered, removed or inserted."`
	Keyset      keysetCmd      `cmd:"" help:"Make the keyset that seals the keys of tenants, and replace its keys."`
	Healthcheck healthcheckCmd `cmd:"" help:"Ask a running service whether it lives; for container health checks."`
	Completion  completionCmd  `cmd:"" help:"Print a script that completes the command line in a shell."`
	Version     versionCmd     `cmd:"" help:"Print the version."`
}

const description = `Tenantry gives every end-user of a SaaS product (a tenant) a Clarifai app and an app-specific key of their own.

Every setting is a flag and an environment variable; an empty variable counts as not set. Secrets are given by file or by environment, never by flag:

  DATABASE_URL  or DATABASE_URL_FILE     postgres://user:password@host:5432/database
  DATABASE_DIRECT_URL  or ..._FILE       the same past a pooler in transaction mode, if there is one
  CLARIFAI_PAT  or CLARIFAI_PAT_FILE     the operator's Personal Access Token
  TENANTRY_KEYSET  or ..._FILE           from "tenantry keyset create"; lose it, and the sealed keys are lost
  TENANTRY_KEYSET_KMS  or ..._FILE       URL of the key of a KMS that wraps the keyset, if one does

To begin: tenantry keyset create, tenantry migrate up, tenantry token create, tenantry serve. The commands about tenants, keys and callers work through a running service: TENANTRY_URL, and TENANTRY_TOKEN or TENANTRY_TOKEN_FILE.

` + exitCodes

// run runs one command and returns the exit code.
func run(ctx context.Context, e env) int {
	var c cli
	settings := newConverter()
	exit := -1
	parser, err := kong.New(&c, append(settings.options(),
		kong.Name("tenantry"),
		kong.Description(description),
		kong.Writers(e.stdout, e.stderr),
		kong.Exit(func(code int) { exit = code; panic(errExit) }),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true, WrapUpperBound: 110}),
		kong.BindTo(ctx, (*context.Context)(nil)),
		kong.Bind(e),
	)...)
	if err != nil {
		panic(err) // the command line itself is wrong: every test would see it
	}
	defer func() {
		if v := recover(); v != nil && v != errExit {
			panic(v)
		}
	}()
	if len(e.args) == 0 {
		printUsage(e.stderr, parser.Model)
		return exitUsage
	}
	if e.args[0] == completeWord {
		_ = complete(e.stdout, parser.Model, e.args[1:]) // the shell went away
		return exitDone
	}
	k, err := parser.Parse(e.args)
	if err != nil {
		_, _ = fmt.Fprintf(e.stderr, "tenantry: %s\nrun `tenantry --help`\n", secretText.ReplaceAllString(err.Error(), "[redacted]"))
		return exitUsage
	}
	if exit >= 0 {
		return exit
	}
	if faults := settings.of(k.Flags()); len(faults) > 0 {
		if k.Command() == "serve" { // whose other settings may have faults too
			p, err := c.Serve.check(e, func(string, string, time.Duration) {})
			if p.upstream != nil {
				p.upstream.Close()
			}
			if err != nil {
				faults = append(faults, err)
			}
		}
		printFault(e.stderr, errors.Join(faults...))
		return exitUsage
	}
	err = k.Run()
	if err != nil && !errors.Is(err, errDiffers) && !errors.Is(err, errReported) { // whose output has said it
		printFault(e.stderr, err)
	}
	return exitOf(err)
}

// secretText is what a key or a token looks like, which somebody gave as an argument.
var secretText = regexp.MustCompile(`[0-9a-fA-F]{32,}|tnty_\w+`)

// errExit unwinds from kong's --help, which would end the process.
var errExit = errors.New("exit")

// printUsage prints the commands to a person who named none.
func printUsage(w io.Writer, app *kong.Application) {
	_, _ = fmt.Fprintln(w, "usage: tenantry <command> [flags]")
	_, _ = fmt.Fprintln(w)
	for _, c := range app.Children {
		does, _, _ := strings.Cut(c.Help, ". ")
		_, _ = fmt.Fprintf(w, "  %-12s %s\n", c.Name, strings.TrimSuffix(does, "."))
	}
	_, _ = fmt.Fprintln(w, "\nrun `tenantry --help`, or `tenantry <command> --help`")
}

// printFault prints a failure to a person: several ones a line each.
func printFault(w io.Writer, err error) {
	var faults []string
	for line := range strings.SplitSeq(err.Error(), "\n") {
		rest, continued := strings.CutPrefix(line, "\t") // as the driver's errors do
		switch {
		case !continued || len(faults) == 0:
			faults = append(faults, line)
		case !strings.Contains(faults[len(faults)-1], rest):
			faults[len(faults)-1] += " " + rest
		}
	}
	if len(faults) == 1 {
		_, _ = fmt.Fprintln(w, "tenantry:", faults[0])
		return
	}
	_, _ = fmt.Fprintln(w, "tenantry:")
	for _, f := range faults {
		_, _ = fmt.Fprintln(w, "  -", f)
	}
}
