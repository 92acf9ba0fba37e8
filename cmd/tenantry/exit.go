package main

import (
	"errors"
	"fmt"
	"net/http"
)

// The exit codes. Programs rely on them: README.md and --help list them.
const (
	exitDone     = 0
	exitFailed   = 1
	exitUsage    = 2 // called wrongly: the same call will never do
	exitDiffers  = 3 // done, and differences or faults were found
	exitNotFound = 4
	exitRefused  = 5 // by how things stand, or to this token
	exitLater    = 6 // not done yet, or not known to be: the same call again may do
)

// exitCodes is what --help says of them.
const exitCodes = `Exit codes: 0 done; 1 failed; 2 called wrongly; 3 done, and differences or faults were found; 4 there is no such thing; 5 refused, by how things stand or to this token; 6 not done yet, or no answer: try again later.`

// errDiffers makes a command exit with 3: it did what it should, and found faults.
var errDiffers = errors.New("differences were found")

// errReported makes a command exit with 1 whose output has said why.
var errReported = errors.New("faults were found")

// A usageError is a fault of how a command was called.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// A refusedError says why something was not done that the API would have done.
type refusedError struct{ error }

// A laterError says what is under way and not done yet.
type laterError struct{ error }

// exitOf returns the code that a command exits with.
func exitOf(err error) int {
	if err == nil {
		return exitDone
	}
	if errors.Is(err, errDiffers) {
		return exitDiffers
	}
	if errors.Is(err, errNoAnswer) {
		return exitLater
	}
	if _, ok := errors.AsType[usageError](err); ok {
		return exitUsage
	}
	if _, ok := errors.AsType[refusedError](err); ok {
		return exitRefused
	}
	if _, ok := errors.AsType[laterError](err); ok {
		return exitLater
	}
	p, ok := errors.AsType[*apiProblem](err)
	switch {
	case !ok:
		return exitFailed
	case p.status >= 500 || p.status == http.StatusTooManyRequests:
		return exitLater
	}
	switch p.status {
	case http.StatusBadRequest, http.StatusRequestEntityTooLarge, http.StatusUnsupportedMediaType:
		return exitUsage
	case http.StatusNotFound:
		return exitNotFound
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusConflict, http.StatusPreconditionFailed:
		return exitRefused
	}
	return exitFailed
}
