// Package clarifai talks to Clarifai as the operator: JSON over HTTP, time
// limits, and what an answer, or its absence, means.
//
// Each method makes exactly one HTTP request. It repeats nothing and follows no
// redirect: the caller accounts for every request, and knows better when to try
// again. Every error is a *tenant.UpstreamError and holds neither a URL nor a
// secret.
package clarifai

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"github.com/tenantry/tenantry/internal/tenant"
)

// A Config is what a Client is made of.
type Config struct {
	// BaseURL is where Clarifai is, such as https://api.clarifai.com; /v2 is
	// added to it. Proxies named by the environment are used for https only: there
	// they see the host and nothing else.
	BaseURL string
	// PAT returns the operator's Personal Access Token. It is asked at each call,
	// so that the PAT can be replaced while the client is in use.
	PAT func() tenant.Secret
	// Timeout bounds one call from the dial to the last byte of the answer; zero
	// means 5 s.
	Timeout time.Duration
	// Observe is told of each call that was begun: Clarifai's name of it, "ok" or
	// the class of its failure, and how long it took. It may be nil.
	Observe func(call, outcome string, took time.Duration)
	// UserAgent names the program; empty means "tenantry".
	UserAgent string
}

// A Client calls Clarifai. It is safe for use by many goroutines.
type Client struct {
	base      url.URL
	pat       func() tenant.Secret
	timeout   time.Duration
	observe   func(call, outcome string, took time.Duration)
	userAgent string
	transport *http.Transport
	operator  tenant.UserID
}

// Limits that no honest answer reaches.
const (
	maxHeader  = 64 << 10
	maxAnswer  = 1 << 20
	maxItem    = 64 << 10 // of an answer that shows several
	maxListing = 16 << 20
)

// New makes a Client that can ask Whoami only: see As.
func New(c Config) (*Client, error) {
	base, err := parseBase(c.BaseURL)
	if err != nil {
		return nil, err
	}
	if c.PAT == nil {
		return nil, errors.New("clarifai: the config has no PAT")
	}
	if c.Timeout < 0 {
		return nil, fmt.Errorf("clarifai: timeout %s is negative", c.Timeout)
	}
	if c.Timeout == 0 {
		c.Timeout = 5 * time.Second
	}
	if c.Observe == nil {
		c.Observe = func(string, string, time.Duration) {}
	}
	if c.UserAgent == "" {
		c.UserAgent = "tenantry"
	}
	return &Client{base: *base, pat: c.PAT, timeout: c.Timeout, observe: c.Observe, userAgent: c.UserAgent,
		transport: newTransport(base.Scheme, c.Timeout)}, nil
}

func parseBase(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" ||
		u.User != nil || u.RawQuery != "" || u.ForceQuery || u.Fragment != "" {
		// The text may hold a password and is not shown.
		return nil, errors.New("clarifai: the base URL must be absolute, http or https, without user, query and fragment, such as https://api.clarifai.com")
	}
	u.Path, u.RawPath = strings.TrimRight(u.Path, "/"), strings.TrimRight(u.RawPath, "/")
	if strings.HasSuffix(u.Path, "/v2") {
		return nil, errors.New("clarifai: the base URL must end before /v2")
	}
	return u, nil
}

func newTransport(scheme string, timeout time.Duration) *http.Transport {
	t := &http.Transport{
		// A dial goes on for a while when the call that began it has given up, so
		// it has limits of its own.
		DialContext:            (&net.Dialer{Timeout: timeout, KeepAlive: 15 * time.Second}).DialContext,
		TLSHandshakeTimeout:    timeout,
		MaxConnsPerHost:        128, // more than the calls that a hanging Clarifai holds up within one timeout
		MaxIdleConns:           32,
		MaxIdleConnsPerHost:    32,
		IdleConnTimeout:        30 * time.Second, // less than the 60 s after which load balancers hang up
		MaxResponseHeaderBytes: maxHeader,
	}
	// One call on a connection at a time: what is cut off is one call, and what
	// net/http repeats is known (see request.body).
	t.Protocols = new(http.Protocols)
	t.Protocols.SetHTTP1(true)
	if scheme == "https" {
		t.Proxy = http.ProxyFromEnvironment
	}
	return t
}

// As returns a client whose calls are about the apps and keys of operator. It
// shares its connections with c.
func (c *Client) As(operator tenant.UserID) *Client {
	as := *c
	as.operator = operator
	return &as
}

// Close closes the connections that no call is using.
func (c *Client) Close() { c.transport.CloseIdleConnections() }

// A request is one call.
type request struct {
	call   string // Clarifai's name of it
	method string
	path   []string // the elements below /v2, not escaped
	query  url.Values
	body   any // encoded as JSON; nil for none
	limit  int64
	// key is the key that the path names, if any: nothing may show it.
	key tenant.Secret
	// pat is the PAT to use instead of the one in use, if it is set.
	pat tenant.Secret
	// also is a status code that is a success too; 0 for none.
	also int
	// items is how many things the call makes; 0 where it makes none.
	items int
}

// changes reports whether the call changes something upstream.
func (r request) changes() bool { return r.method != http.MethodGet }

// do makes the one HTTP request of a call. Read takes what it needs from the
// answer and says what makes it unusable, or "".
func (c *Client) do(ctx context.Context, r request, read func(answer) string) error {
	pat := r.pat
	if !pat.IsSet() {
		pat = c.pat()
	}
	out, fault := c.newRequest(r, pat)
	if fault != nil {
		return fault
	}
	if ctx.Err() != nil {
		return &tenant.UpstreamError{Call: r.call, Class: tenant.UpstreamDown, Detail: "not called: the caller gave up first"}
	}
	began := time.Now()
	secrets := []tenant.Secret{pat, r.key}
	err := c.exchange(ctx, r, out, func(a answer) string {
		tenant.NoteUpstreamRequest(ctx, cleanRequestID(a.requestID, secrets))
		return read(a)
	})
	if err == nil {
		c.observe(r.call, "ok", time.Since(began))
		return nil
	}
	err.Call, err.Detail = r.call, clean(err.Detail, secrets)
	err.RequestID = cleanRequestID(err.RequestID, secrets)
	tenant.NoteUpstreamRequest(ctx, err.RequestID)
	if r.items > 1 && err.HTTP != 0 && err.Class != tenant.UpstreamThrottled {
		err.Unclear = true // what refuses one of them may come after others were made
	}
	err.Unclear = err.Unclear && r.changes()
	c.observe(r.call, string(err.Class), time.Since(began))
	return err
}

// CheckPAT reports whether a PAT can be sent at all.
func CheckPAT(pat tenant.Secret) error {
	if !printable(pat.Reveal()) {
		return errors.New("the PAT has white space or other characters that no PAT has")
	}
	return nil
}

// newRequest builds the HTTP request, or says why the call cannot be made.
func (c *Client) newRequest(r request, pat tenant.Secret) (*http.Request, *tenant.UpstreamError) {
	fault := func(class tenant.UpstreamClass, detail string) (*http.Request, *tenant.UpstreamError) {
		return nil, &tenant.UpstreamError{Call: r.call, Class: class, Detail: "not called: " + detail}
	}
	if !pat.IsSet() || pat.Reveal() == "" {
		return fault(tenant.UpstreamPAT, "there is no PAT")
	}
	if err := CheckPAT(pat); err != nil {
		return fault(tenant.UpstreamPAT, err.Error())
	}
	u := c.base
	u.Path, u.RawPath = u.Path+"/v2", u.EscapedPath()+"/v2"
	for _, element := range r.path {
		// Dots would name another resource, for Clarifai or a proxy on the way.
		if element == "" || element == "." || element == ".." {
			return fault(tenant.UpstreamRefused, "an id in the path is empty or made of dots, or no operator is set")
		}
		u.Path += "/" + element
		u.RawPath += "/" + url.PathEscape(element)
	}
	u.RawQuery = r.query.Encode()

	out := &http.Request{Method: r.method, URL: &u, Host: u.Host, Header: http.Header{}}
	switch {
	case r.body != nil:
		text, err := json.Marshal(r.body)
		if err != nil {
			return fault(tenant.UpstreamRefused, "the request cannot be encoded")
		}
		out.Body, out.ContentLength = io.NopCloser(bytes.NewReader(text)), int64(len(text))
		// For net/http to begin anew if a kept connection turns out to be closed
		// before the first byte went out.
		out.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(text)), nil }
		out.Header.Set("Content-Type", "application/json")
	case r.method == http.MethodGet:
		// Without it net/http would send a GET again when a kept connection is cut
		// after the request went out. Nothing of it is sent.
		out.Body = onceOnly{}
	}
	out.Header.Set("Authorization", "Key "+pat.Reveal())
	out.Header.Set("Accept", "application/json")
	out.Header.Set("User-Agent", c.userAgent)
	out.Header.Set("X-Clarifai-Request-Id-Prefix", "tenantry")
	return out, nil
}

// onceOnly is an empty body that cannot be rewound. net/http repeats no request
// that has one.
type onceOnly struct{}

func (onceOnly) Read([]byte) (int, error) { return 0, io.EOF }
func (onceOnly) Close() error             { return nil }

// exchange sends the request and reads the answer. It uses the transport and not
// an http.Client, which follows redirects and puts the URL, and so a key, into its
// errors. Unclear is set on what it returns as for a call that changes something.
func (c *Client) exchange(ctx context.Context, r request, out *http.Request, read func(answer) string) *tenant.UpstreamError {
	// From here on until it gets a connection, no byte of the request is out. If
	// net/http asks for another connection, it knows that none is.
	var sent atomic.Bool
	limited, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	traced := httptrace.WithClientTrace(limited, &httptrace.ClientTrace{
		GetConn: func(string) { sent.Store(false) },
		GotConn: func(httptrace.GotConnInfo) { sent.Store(true) },
	})
	silence := func(status int, err error) *tenant.UpstreamError {
		why := c.whyNoAnswer(ctx, limited, err)
		return &tenant.UpstreamError{Class: tenant.UpstreamDown, HTTP: status, Unclear: sent.Load(),
			TooMuch: sent.Load() && why == noAnswerInTime, Detail: why}
	}
	resp, err := c.transport.RoundTrip(out.WithContext(traced))
	if err != nil {
		return silence(0, err)
	}
	defer resp.Body.Close() //nolint:errcheck // it was only read
	body, err := io.ReadAll(io.LimitReader(resp.Body, r.limit+1))
	if err != nil {
		return silence(resp.StatusCode, err)
	}
	if int64(len(body)) > r.limit {
		return &tenant.UpstreamError{Class: tenant.UpstreamDown, HTTP: resp.StatusCode, Unclear: true, TooMuch: true,
			Detail: fmt.Sprintf("the answer has more than %d bytes", r.limit)}
	}
	a := parseAnswer(resp.StatusCode, resp.Header, body)
	if failed := a.failure(r.call, r.also); failed != nil {
		return failed
	}
	if fault := read(a); fault != "" {
		return &tenant.UpstreamError{Class: tenant.UpstreamDown, HTTP: a.http, Code: a.status.code, RequestID: a.requestID,
			Unclear: true, Detail: "the answer cannot be used: " + fault}
	}
	return nil
}

const noAnswerInTime = "no answer within the time limit"

// whyNoAnswer says what cut a call off. Of errors it quotes those only whose text
// is known to hold addresses and names and nothing of the request, the answer or
// the proxy's credentials.
func (c *Client) whyNoAnswer(caller, limited context.Context, err error) string {
	switch {
	case errors.Is(caller.Err(), context.Canceled):
		return "the caller gave up waiting for the answer"
	case caller.Err() != nil, limited.Err() != nil:
		return noAnswerInTime
	}
	if e, ok := errors.AsType[*net.OpError](err); ok {
		return "no answer: " + e.Error()
	}
	if e, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return "no answer: " + e.Error()
	}
	if e, ok := errors.AsType[tls.RecordHeaderError](err); ok {
		return "no answer: " + e.Error()
	}
	if e, ok := errors.AsType[net.Error](err); ok && e.Timeout() { // of the handshake
		return noAnswerInTime
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return "the connection was closed before the answer was complete"
	}
	return "the connection broke, a proxy refused it, or what came was not HTTP"
}
