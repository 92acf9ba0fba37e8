package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/tenantry/tenantry/api/client"
)

// apiFlags say where a running service is, for commands that work through it.
type apiFlags struct {
	URL       string `name:"url" env:"TENANTRY_URL" default:"http://127.0.0.1:8080" help:"Where the API is."`
	TokenFile string `env:"TENANTRY_TOKEN_FILE" placeholder:"FILE" help:"File with a token. Without it: TENANTRY_TOKEN."`
}

// answerTimeout is longer than a request is made to wait for.
const answerTimeout = 30 * time.Second

func (f apiFlags) client(e env) (*client.ClientWithResponses, error) {
	token, err := secretSetting(e, "TENANTRY_TOKEN", f.TokenFile)
	if err != nil {
		return nil, usageError{err}
	}
	if !token.IsSet() {
		return nil, usagef("the token is missing: make one with `tenantry token create` and set TENANTRY_TOKEN or TENANTRY_TOKEN_FILE")
	}
	if u, err := url.Parse(f.URL); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, usagef("TENANTRY_URL: %q must be a URL such as http://127.0.0.1:8080", f.URL)
	}
	return client.NewClientWithResponses(f.URL, client.WithToken(token.Reveal()), client.WithHTTPClient(doer{http.Client{Timeout: answerTimeout}}))
}

// errNoAnswer is of requests whose outcome is unknown.
var errNoAnswer = errors.New("the API does not answer")

// A doer tells requests without an answer from all else that fails in a command.
type doer struct{ client http.Client }

func (d doer) Do(r *http.Request) (*http.Response, error) {
	resp, err := d.client.Do(r)
	if err == nil {
		return resp, nil
	}
	if cause := r.Context().Err(); cause != nil {
		return nil, fmt.Errorf("interrupted: what was asked for may have been done, or go on: %w", cause)
	}
	return nil, fmt.Errorf("%w: %w", errNoAnswer, err)
}

// An answered is what the API answered, as it came and as the client reads it.
type answered[T any] struct {
	value  T
	body   []byte
	status int
	etag   string
}

// pending reports whether what was asked for is written down and under way.
func (a answered[T]) pending() bool { return a.status == http.StatusAccepted }

// maxAnswer bounds what is read of an answer: more than a page of a list can have.
const maxAnswer = 64 << 20

// answer reads a response: its error is an *apiProblem where the API answers with one.
func answer[T any](resp *http.Response, err error) (answered[T], error) {
	var a answered[T]
	if err != nil {
		return a, err
	}
	defer func() { _ = resp.Body.Close() }()
	a.status, a.etag = resp.StatusCode, resp.Header.Get("ETag")
	if a.body, err = io.ReadAll(io.LimitReader(resp.Body, maxAnswer)); err != nil {
		return a, fmt.Errorf("%w: %w", errNoAnswer, err)
	}
	if resp.StatusCode/100 != 2 || !strings.HasPrefix(resp.Header.Get("Content-Type"), "application/json") {
		return a, problemOf(resp, a.body)
	}
	if err := json.Unmarshal(a.body, &a.value); err != nil {
		return a, fmt.Errorf("the API's answer cannot be read: %w", err)
	}
	return a, nil
}

// An apiProblem is what the API answered instead.
type apiProblem struct {
	status     int
	retryAfter time.Duration // 0 where the answer does not say
	client.ProblemDetails
}

func (p *apiProblem) Error() string {
	if p.Detail == "" {
		return fmt.Sprintf("the API answers %d, which is no answer of Tenantry's", p.status)
	}
	text := p.Detail
	if p.Field != nil {
		text = *p.Field + ": " + text
	}
	return fmt.Sprintf("%s (%s, request %s)", text, p.Code, p.RequestId)
}

func problemOf(resp *http.Response, body []byte) error {
	p := &apiProblem{status: resp.StatusCode}
	if resp.Header.Get("Retry-After") != "" {
		p.retryAfter = retryAfter(resp)
	}
	_ = json.Unmarshal(body, &p.ProblemDetails) // what is no problem document has no detail
	return p
}
