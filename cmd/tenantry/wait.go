package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"
)

// waitFlags say how long a command waits for what it has asked for.
type waitFlags struct {
	Wait   time.Duration `default:"1m" help:"How long to wait until it has taken effect; exit code 6 if it has not. It goes on all the same."`
	NoWait bool          `help:"Do not wait."`
}

func (f waitFlags) check() error {
	if f.Wait < 0 {
		return usagef("--wait must not be negative")
	}
	return nil
}

func (f waitFlags) limit() time.Duration {
	if f.NoWait {
		return 0
	}
	return f.Wait
}

// maxWait is how long one request is made to wait: less than answerTimeout.
const maxWait = 20 * time.Second

// seconds of waiting that a request asks for when left is left.
func seconds(left time.Duration) int { return int(min(left, maxWait) / time.Second) }

// prefer is the header of the first request.
func (f waitFlags) prefer() *string {
	text := "respond-async"
	if n := seconds(f.limit()); n > 0 {
		text = fmt.Sprintf("wait=%d", n)
	}
	return &text
}

// pollPause lies between two looks at what does not wait by itself.
const pollPause = 500 * time.Millisecond

// follow looks again until what a command asked for has taken effect, which settled
// says of an answer; what of the answer says what it is that is not so yet, and what
// holds it up. The error is a laterError if the time is over; with NoWait there is none.
func follow[T any](ctx context.Context, e env, f waitFlags, first answered[T], settled func(T) (bool, error), what func(T) string,
	look func(seconds *int) (answered[T], error)) (answered[T], error) {
	last := first
	deadline := time.Now().Add(f.limit())
	line := e.progress()
	defer line.end()
	for {
		done, err := settled(last.value)
		if done || err != nil || f.limit() == 0 {
			return last, err
		}
		left := time.Until(deadline)
		if left <= 0 {
			return last, laterError{fmt.Errorf("%s; it goes on without this command", what(last.value))}
		}
		line.show(0, 0, what(last.value))
		n := seconds(left)
		asked := time.Now()
		next, err := look(&n)
		switch {
		case ctx.Err() != nil:
			return last, fmt.Errorf("%s; it goes on without this command", what(last.value))
		case err == nil:
			last = next
		case !passing(err):
			return last, err
		default:
			line.show(0, 0, "the service does not answer; waiting")
		}
		// What waited has waited; what answered at once shall not be asked all the time.
		if pause := min(pollPause-time.Since(asked), time.Until(deadline)); pause > 0 {
			select {
			case <-ctx.Done():
			case <-time.After(pause):
			}
		}
	}
}

// passing reports whether a failure is one of a service that restarts or is busy, while
// what it was asked for goes on.
func passing(err error) bool {
	p, ok := errors.AsType[*apiProblem](err)
	return errors.Is(err, errNoAnswer) || ok && (p.status >= 500 || p.status == http.StatusTooManyRequests)
}
