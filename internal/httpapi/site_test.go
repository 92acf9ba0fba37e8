package httpapi_test

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/legacy"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/tenantry/tenantry/api"
	"github.com/tenantry/tenantry/internal/httpapi"
	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// A site is a running API, each of whose answers is held against the contract.
type site struct {
	t        *testing.T
	world    *provisiontest.World
	replica  *provisiontest.Replica
	handler  http.Handler
	url      string
	logs     *observer.ObservedLogs
	contract routers.Router
	tokens   map[tenant.Role]string
}

func newSite(t *testing.T) *site {
	t.Helper()
	w := provisiontest.New(t)
	return newSiteOn(t, w, w.Start(provisiontest.Options{}))
}

func newSiteOn(t *testing.T, w *provisiontest.World, r *provisiontest.Replica) *site {
	t.Helper()
	core, logs := observer.New(zapcore.DebugLevel)
	s := &site{t: t, world: w, replica: r, logs: logs, contract: loadContract(t), tokens: map[tenant.Role]string{}}
	s.handler = httpapi.New(httpapi.Config{Service: r.Service, DB: r.DB, Log: zap.New(core), Metrics: httpapi.NewMetrics(r.Reg)})
	srv := httptest.NewUnstartedServer(s.handler)
	httpapi.Limit(srv.Config)
	srv.Start()
	t.Cleanup(srv.Close)
	s.url = srv.URL
	for _, role := range tenant.Roles {
		token, text := tenant.NewToken()
		if _, err := r.DB.AddCaller(t.Context(), token, tenant.NewCaller{Name: string(role), Role: role}, tenant.Actor{Name: "test"}); err != nil {
			t.Fatal(err)
		}
		s.tokens[role] = text.Reveal()
	}
	return s
}

func loadContract(t *testing.T) routers.Router {
	t.Helper()
	doc := contractDoc(t)
	doc.Servers = nil
	router, err := legacy.NewRouter(doc)
	if err != nil {
		t.Fatal(err)
	}
	return router
}

func contractDoc(t *testing.T) *openapi3.T {
	t.Helper()
	doc, err := openapi3.NewLoader().LoadFromData(api.OpenAPI)
	if err != nil {
		t.Fatal(err)
	}
	if err := doc.Validate(t.Context()); err != nil {
		t.Fatalf("openapi.yaml: %v", err)
	}
	return doc
}

// An answer is what the API said.
type answer struct {
	status int
	header http.Header
	body   []byte
}

func (a answer) decode(t *testing.T) map[string]any {
	t.Helper()
	var v map[string]any
	if err := json.Unmarshal(a.body, &v); err != nil {
		t.Fatalf("the body is no JSON object: %v: %s", err, a.body)
	}
	return v
}

// at returns a value in the body by the names that lead to it.
func (a answer) at(t *testing.T, names ...string) any {
	t.Helper()
	var v any = a.decode(t)
	for _, n := range names {
		m, _ := v.(map[string]any)
		v = m[n]
	}
	return v
}

// call sends a request as a role, and checks the answer against the contract.
// Headers are name, value pairs.
func (s *site) call(role tenant.Role, method, path, body string, headers ...string) answer {
	s.t.Helper()
	a, err := s.try(role, method, path, body, headers...)
	if err != nil {
		s.t.Fatalf("%s %s: %v", method, path, err)
	}
	return a
}

func (s *site) try(role tenant.Role, method, path, body string, headers ...string) (answer, error) {
	s.t.Helper()
	req, err := http.NewRequestWithContext(s.t.Context(), method, s.url+path, strings.NewReader(body))
	if err != nil {
		return answer{}, err
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	if role != "" {
		req.Header.Set("Authorization", "Bearer "+s.tokens[role])
	}
	for i := 0; i+1 < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer func() { _ = resp.Body.Close() }()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		return answer{}, err
	}
	s.holdAgainstContract(req, resp, raw)
	return answer{resp.StatusCode, resp.Header, raw}, nil
}

func (s *site) holdAgainstContract(req *http.Request, resp *http.Response, body []byte) {
	s.t.Helper()
	find := req
	if req.Method == http.MethodHead { // is GET without a body, and not described apart
		find = req.Clone(req.Context())
		find.Method = http.MethodGet
	}
	route, params, err := s.contract.FindRoute(find)
	if err != nil {
		if resp.StatusCode != http.StatusNotFound && resp.StatusCode != http.StatusMethodNotAllowed && resp.StatusCode != http.StatusBadRequest {
			s.t.Errorf("%s %s answers %d and is not in the contract: %v", req.Method, req.URL.Path, resp.StatusCode, err)
		}
		return
	}
	input := &openapi3filter.ResponseValidationInput{
		RequestValidationInput: &openapi3filter.RequestValidationInput{Request: find, PathParams: params, Route: route,
			Options: &openapi3filter.Options{AuthenticationFunc: openapi3filter.NoopAuthenticationFunc}},
		Status: resp.StatusCode, Header: resp.Header, Body: io.NopCloser(bytes.NewReader(body)),
		Options: &openapi3filter.Options{IncludeResponseStatus: true, MultiError: true, ExcludeResponseBody: req.Method == http.MethodHead},
	}
	if err := openapi3filter.ValidateResponse(s.t.Context(), input); err != nil {
		s.t.Errorf("%s %s answers %d, which breaks the contract: %v\n%s", req.Method, route.Path, resp.StatusCode, err, body)
	}
}
