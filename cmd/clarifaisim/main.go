// Command clarifaisim runs the simulated Clarifai alone, with its control side on
// the same address. See package clarifaisim.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kong"

	"github.com/tenantry/tenantry/internal/clarifaisim"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// With the first signal the handling ends: a second one ends the process.
	context.AfterFunc(ctx, stop)
	if err := run(ctx, os.Args[1:], os.Getenv, os.Stdout); err != nil {
		fmt.Fprintf(os.Stderr, "clarifaisim: %v\n", err)
		os.Exit(1)
	}
}

type options struct {
	Addr      string        `env:"CLARIFAISIM_ADDR" default:"127.0.0.1:8090" help:"Address to listen on; port 0 picks a free one. Keep it on a loopback address or a test network: below /_sim it shows keys to everybody."`
	AddrFile  string        `env:"CLARIFAISIM_ADDR_FILE" placeholder:"FILE" help:"File to write the base URL to, once it can be called."`
	PATFile   string        `name:"pat-file" env:"CLARIFAISIM_PAT_FILE" placeholder:"FILE" help:"File with the Personal Access Token that works. Without it, it is read from CLARIFAISIM_PAT."`
	UserID    string        `env:"CLARIFAISIM_USER_ID" default:"acme" help:"User that the token belongs to."`
	StateFile string        `env:"CLARIFAISIM_STATE_FILE" placeholder:"FILE" help:"File to keep apps and keys in between runs. It holds secrets. Without it, they are gone at the end."`
	RateLimit int           `env:"CLARIFAISIM_RATE_LIMIT" default:"15" help:"Calls that a user may make a second; 0 means any number."`
	Latency   time.Duration `env:"CLARIFAISIM_LATENCY" default:"0" help:"How long each call takes, as 100ms."`
}

const description = `A simulated Clarifai: apps, app-specific keys and inputs over REST below /v2.

  curl -H "Authorization: Key $CLARIFAISIM_PAT" http://127.0.0.1:8090/v2/users/me
  curl http://127.0.0.1:8090/_sim/state
  curl http://127.0.0.1:8090/_sim/faults -d '[{"call":"PostKeys","count":1,"drop_after":true}]'

Below /_sim: GET state, apps, keys, calls, faults, settings; POST faults, settings, reset.`

// run serves until ctx ends. getenv gives the token, and nothing else; the flags
// read the process's environment.
func run(ctx context.Context, args []string, getenv func(string) string, stdout io.Writer) (err error) {
	o, done, err := parse(args, stdout)
	if err != nil || done {
		return err
	}
	pat, err := readPAT(o.PATFile, getenv)
	if err != nil {
		return err
	}
	settings := clarifaisim.DefaultSettings()
	settings.RateLimit = o.RateLimit
	settings.LatencyMS = int(o.Latency.Milliseconds())
	// The address first: with it taken, another simulator most likely runs here.
	listener, err := net.Listen("tcp", o.Addr)
	if err != nil {
		return listenError(o.Addr, err)
	}
	sim, err := clarifaisim.New(clarifaisim.Config{
		PATs:      []clarifaisim.PAT{{Token: pat, UserID: o.UserID}},
		Settings:  &settings,
		StateFile: o.StateFile,
	})
	if err != nil {
		return errors.Join(err, listener.Close())
	}
	defer func() { err = errors.Join(err, sim.Close()) }()

	server := &http.Server{Handler: sim, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()

	url := "http://" + listener.Addr().String()
	if err := announce(o.AddrFile, url); err != nil {
		return errors.Join(err, server.Close(), notClosed(<-served))
	}
	fmt.Fprintf(stdout, "clarifaisim: ready at %s as user %s\n", url, o.UserID)

	select {
	case err := <-served:
		return fmt.Errorf("serve: %w", err)
	case <-ctx.Done():
	}
	// First what hangs on purpose, which the server would wait for.
	closeErr := sim.Close()
	stopping, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if err := server.Shutdown(stopping); err != nil {
		closeErr = errors.Join(closeErr, server.Close())
	}
	return errors.Join(closeErr, notClosed(<-served))
}

// parse reads the flags. done says that there is no more to do: help was asked for.
func parse(args []string, stdout io.Writer) (o options, done bool, err error) {
	parser, err := kong.New(&o,
		kong.Name("clarifaisim"), kong.Description(description), kong.Writers(stdout, stdout),
		kong.ConfigureHelp(kong.HelpOptions{WrapUpperBound: 110}),
		kong.Exit(func(int) { done = true }),
	)
	if err != nil {
		return o, false, err
	}
	_, err = parser.Parse(args)
	if done {
		return o, true, nil
	}
	if err != nil {
		return o, false, fmt.Errorf("%w; see clarifaisim --help", err)
	}
	return o, false, nil
}

// readPAT returns the token from the file, or from the environment if no file is
// named.
func readPAT(file string, getenv func(string) string) (string, error) {
	pat := getenv("CLARIFAISIM_PAT")
	if file != "" {
		data, err := os.ReadFile(file)
		if err != nil {
			return "", fmt.Errorf("read the token: %w", err)
		}
		pat = string(data)
	}
	if pat = strings.TrimSpace(pat); pat == "" {
		return "", errors.New("there is no token: name a file that holds one by --pat-file, or set CLARIFAISIM_PAT; any text will do")
	}
	return pat, nil
}

func listenError(addr string, err error) error {
	if errors.Is(err, syscall.EADDRINUSE) {
		return fmt.Errorf("%s is in use by another program: stop it, or choose another address by --addr (port 0 picks a free one)", addr)
	}
	return fmt.Errorf("listen: %w", err)
}

func notClosed(err error) error {
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// announce writes the URL to a file in one step, so that a reader sees all or
// nothing of it.
func announce(path, url string) error {
	if path == "" {
		return nil
	}
	file, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*.tmp")
	if err != nil {
		return fmt.Errorf("write the address: %w", err)
	}
	_, err = file.WriteString(url + "\n")
	if err := errors.Join(err, file.Close()); err != nil {
		return errors.Join(fmt.Errorf("write the address: %w", err), os.Remove(file.Name()))
	}
	if err := os.Rename(file.Name(), path); err != nil {
		return errors.Join(fmt.Errorf("write the address: %w", err), os.Remove(file.Name()))
	}
	return nil
}
