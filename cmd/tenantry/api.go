package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"time"

	"github.com/tenantry/tenantry/api/client"
)

// apiFlags say where a running service is, for commands that work through it.
type apiFlags struct {
	URL       string `name:"url" env:"TENANTRY_URL" default:"http://127.0.0.1:8080" help:"Where the API is."`
	TokenFile string `env:"TENANTRY_TOKEN_FILE" placeholder:"FILE" help:"File with a token. Without it: TENANTRY_TOKEN."`
}

func (f apiFlags) client(e env) (*client.ClientWithResponses, error) {
	token, err := secretSetting(e, "TENANTRY_TOKEN", f.TokenFile)
	if err != nil {
		return nil, err
	}
	if !token.IsSet() {
		return nil, errors.New("the token is missing: make one with `tenantry token create` and set TENANTRY_TOKEN or TENANTRY_TOKEN_FILE")
	}
	if u, err := url.Parse(f.URL); err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, fmt.Errorf("TENANTRY_URL: %q must be a URL such as http://127.0.0.1:8080", f.URL)
	}
	return client.NewClientWithResponses(f.URL, client.WithToken(token.Reveal()),
		client.WithHTTPClient(&http.Client{Timeout: 30 * time.Second}))
}

// An apiProblem is what the API answered instead.
type apiProblem struct {
	status int
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
	_ = json.Unmarshal(body, &p.ProblemDetails) // what is no problem document has no detail
	return p
}
