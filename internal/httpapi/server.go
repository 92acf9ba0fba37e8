// Package httpapi is the HTTP edge: routes, who is calling, decoding, encoding
// and problem documents. It speaks to the engine and, for reads that no rule is
// attached to, to Postgres; never to Clarifai.
package httpapi

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-chi/chi/v5/middleware"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/tenantry/tenantry/api"
	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/tenant"
)

// A Config has the dependencies of the API.
type Config struct {
	Service *provision.Service
	DB      *postgres.DB
	Log     *zap.Logger
	Metrics *Metrics
	// ReadOnly serves only the routes of openToReaders, for which Service needs neither
	// Clarifai nor a keyring.
	ReadOnly bool
}

// Metrics are what the API measures of itself.
type Metrics struct {
	requests *prometheus.CounterVec
	seconds  *prometheus.HistogramVec

	// Those of each kind of request that there was: to find them by their labels costs more
	// than to count. They are as few as there are routes, methods and statuses.
	kinds sync.Map // requestKind → measured
}

type requestKind struct {
	method, route string
	status        int
}

type measured struct {
	requests prometheus.Counter
	seconds  prometheus.Observer
}

func (m *Metrics) count(method, route string, status int, took time.Duration) {
	kind := requestKind{method, route, status}
	of, ok := m.kinds.Load(kind)
	if !ok {
		of, _ = m.kinds.LoadOrStore(kind, measured{m.requests.WithLabelValues(method, route, strconv.Itoa(status)), m.seconds.WithLabelValues(method, route)})
	}
	of.(measured).requests.Inc()
	of.(measured).seconds.Observe(took.Seconds())
}

// NewMetrics makes the metrics and registers them.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	m := &Metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "tenantry_http_requests_total", Help: "Requests by method, route pattern and status.",
		}, []string{"method", "route", "code"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "tenantry_http_request_duration_seconds", Help: "Requests by method and route pattern, waiting included.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60},
		}, []string{"method", "route"}),
	}
	reg.MustRegister(m.requests, m.seconds)
	return m
}

type server struct {
	Config
	limiters limiters
}

// Limits on requests. The server that serves the handler sets ReadTimeout,
// MaxHeaderBytes and the like from Limit.
const (
	MaxBodyBytes   = 64 << 10
	MaxBatchBytes  = 4 << 20 // of a batch of sign-ups
	MaxBatch       = 1000    // sign-ups in one
	MaxHeaderBytes = 16 << 10
	ReadTimeout    = 10 * time.Second // of a whole request, its body included
	workTimeout    = 10 * time.Second // of a request, waiting not included
	maxWait        = 60 * time.Second
	defaultWait    = 10 * time.Second
)

// Limit sets on srv the limits against slow and oversized requests.
func Limit(srv *http.Server) {
	srv.ReadHeaderTimeout = ReadTimeout / 2
	srv.ReadTimeout = ReadTimeout
	srv.WriteTimeout = workTimeout + ReadTimeout // a request that waits sets its own
	srv.IdleTimeout = 2 * time.Minute
	srv.MaxHeaderBytes = MaxHeaderBytes
}

// New returns the handler of the public listener.
func New(c Config) http.Handler {
	s := &server{Config: c}
	r := chi.NewRouter()
	r.Use(s.observe, routeByEscapedPath, middleware.GetHead)
	r.NotFound(s.handle(func(_ http.ResponseWriter, req *http.Request) error {
		if rest, ok := strings.CutPrefix(req.URL.EscapedPath(), "/v1/tenants/"); ok && (rest == "" || rest[0] == '/') {
			_, err := tenant.ParseID("")
			return err
		}
		return tenant.Errorf(tenant.NotFound, "route_not_found", "there is no such path; GET /openapi.yaml lists those there are")
	}))
	r.MethodNotAllowed(s.handle(func(w http.ResponseWriter, req *http.Request) error {
		allowed := allowedMethods(r, req)
		w.Header().Set("Allow", allowed)
		return &statusError{http.StatusMethodNotAllowed, tenant.Errorf(tenant.Invalid, "method_not_allowed",
			"this path takes %s", allowed)}
	}))
	s.routes(r)
	return r
}

// routes mounts every route of the contract.
func (s *server) routes(r chi.Router) {
	any := tenant.Roles
	provisioner := []tenant.Role{tenant.Provisioner}
	admin := []tenant.Role{tenant.Admin}
	managers := []tenant.Role{tenant.Provisioner, tenant.Admin}

	r.Get("/openapi.yaml", s.handle(getContract))
	r.Put("/v1/tenants/{tenant_id}", s.allow(managers, s.putTenant)) // an admin only adopts
	r.Get("/v1/tenants/{tenant_id}", s.allow(any, s.getTenant))
	r.Patch("/v1/tenants/{tenant_id}", s.allow(provisioner, s.patchTenant))
	r.Delete("/v1/tenants/{tenant_id}", s.allow(managers, s.tenantChange(s.deleteTenant, "purge")))
	r.Post("/v1/tenants/{tenant_id}/suspend", s.allow(managers, s.tenantChange(s.suspendTenant)))
	r.Post("/v1/tenants/{tenant_id}/resume", s.allow(managers, s.tenantChange(s.resumeTenant)))
	r.Post("/v1/tenants/{tenant_id}/restore", s.allow(managers, s.tenantChange(s.restoreTenant)))
	r.Get("/v1/tenants", s.allow(any, s.listTenants))
	r.Post("/v1/tenants/batch", s.allow(provisioner, s.postBatch))
	r.Post("/v1/tenants/{tenant_id}/retry", s.allow(admin, s.retryTenant))
	r.Get("/v1/tenants/{tenant_id}/keys", s.allow(any, s.listKeys))
	r.Put("/v1/tenants/{tenant_id}/keys/{key_name}", s.allow(provisioner, s.putKey))
	r.Get("/v1/tenants/{tenant_id}/keys/{key_name}", s.allow(any, s.getKey))
	r.Delete("/v1/tenants/{tenant_id}/keys/{key_name}", s.allow(managers, s.deleteKey))
	r.Put("/v1/tenants/{tenant_id}/keys/{key_name}/rotations/{rotation_id}", s.allow(provisioner, s.putRotation))
	r.Get("/v1/tenants/{tenant_id}/keys/{key_name}/rotations/{rotation_id}", s.allow(any, s.getRotation))
	r.Post("/v1/tenants/{tenant_id}/keys/{key_name}/rotations/{rotation_id}/confirm", s.allow(provisioner, s.confirmRotation))
	r.Get("/v1/tenants/{tenant_id}/keys/{key_name}/secret", s.allow(provisioner, s.getKeySecret))
	r.Get("/v1/apps/{app_id}", s.allow(any, s.getAppTenant))
	r.Post("/v1/keys/identify", s.allow(any, s.identifyKey))
	r.Post("/v1/keys/quarantine", s.allow(managers, s.quarantineKey))
	r.Get("/v1/profiles", s.allow(any, s.listProfiles))
	r.Get("/v1/pool", s.allow(any, s.listPools))
	r.Get("/v1/upstream", s.allow(any, s.getUpstream))
	r.Post("/v1/upstream/pause", s.allow(admin, s.pauseUpstream))
	r.Post("/v1/upstream/resume", s.allow(admin, s.resumeUpstream))
	r.Post("/v1/reconciliations", s.allow(admin, s.postReconciliation))
	r.Get("/v1/reconciliations", s.allow(admin, s.listReconciliations))
	r.Get("/v1/reconciliations/{reconciliation_id}", s.allow(admin, s.getReconciliation))
	r.Get("/v1/recovery", s.allow(any, s.getRecovery))
	r.Post("/v1/recovery/begin", s.allow(admin, s.beginRecovery))
	r.Post("/v1/recovery/end", s.allow(admin, s.endRecovery))
	r.Post("/v1/recovery/take-over", s.allow(admin, s.takeOver))
	r.Get("/v1/recovery/findings", s.allow(admin, s.listRecoveryFindings))
	r.Get("/v1/recovery/findings/{finding}", s.allow(admin, s.getRecoveryFinding))
	r.Post("/v1/recovery/decisions", s.allow(admin, s.postDecision))
	r.Get("/v1/recovery/apps", s.allow(admin, s.listRetiredApps))
	r.Post("/v1/recovery/removals", s.allow(admin, s.removeRetired))
	readers := []tenant.Role{tenant.Admin, tenant.Viewer}
	r.Post("/v1/rotations", s.allow(admin, s.postRotations))
	r.Post("/v1/profiles/{profile_name}/applications", s.allow(admin, s.applyProfile))
	r.Get("/v1/profiles/{profile_name}/changes", s.allow(readers, s.listProfileChanges))
	r.Get("/v1/campaigns", s.allow(readers, s.listCampaigns))
	r.Get("/v1/campaigns/{campaign_id}", s.allow(readers, s.getCampaign))
	r.Post("/v1/campaigns/{campaign_id}/pause", s.allow(admin, s.campaignChange(tenant.PauseCampaign)))
	r.Post("/v1/campaigns/{campaign_id}/resume", s.allow(admin, s.campaignChange(tenant.ResumeCampaign)))
	r.Post("/v1/campaigns/{campaign_id}/stop", s.allow(admin, s.campaignChange(tenant.StopCampaign)))
	r.Get("/v1/audit", s.allow([]tenant.Role{tenant.Admin, tenant.Viewer}, s.listAudit))
	r.Post("/v1/callers", s.allow(admin, s.postCaller))
	r.Get("/v1/callers", s.allow(admin, s.listCallers))
	r.Get("/v1/callers/{caller_id}", s.allow(admin, s.getCaller))
	r.Delete("/v1/callers/{caller_id}", s.allow(admin, s.deleteCaller))
	r.Post("/v1/callers/{caller_id}/rotations", s.allow(admin, s.rotateCaller))
}

func getContract(w http.ResponseWriter, r *http.Request) error {
	if _, err := params(r); err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/yaml")
	_, _ = w.Write(api.OpenAPI)
	return nil
}

// handler is a handler whose failure is answered by one piece of code.
type handler func(w http.ResponseWriter, r *http.Request) error

func (s *server) handle(h handler) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if err := h(w, r); err != nil {
			s.writeProblem(w, r, err)
		}
	}
}

// allow knows the caller and settles once, before any work, whether its rate, its
// role and its scope allow this.
func (s *server) allow(roles []tenant.Role, h handler) http.HandlerFunc {
	return s.handle(func(w http.ResponseWriter, r *http.Request) error {
		token, err := bearerToken(r)
		if err != nil {
			return err
		}
		caller, fresh, err := s.DB.Authenticate(r.Context(), token)
		if err != nil {
			return err
		}
		if fresh.Stale() && !mayBeCached(r) {
			return postgres.ErrAway // or a revoked token would do more than look up
		}
		infoOf(r).caller = caller
		if err := s.limiters.take(w, caller, time.Now()); err != nil {
			return err
		}
		if !slices.Contains(roles, caller.Role) {
			return tenant.Errorf(tenant.Forbidden, "role_forbidden", "this takes the role %s; the token's role is %s",
				joinRoles(roles), caller.Role)
		}
		if err := s.confine(r); err != nil {
			return err
		}
		reads := r.Method == http.MethodGet || r.Method == http.MethodHead
		if s.ReadOnly && !(reads && openToReaders[chi.RouteContext(r.Context()).RoutePattern()]) {
			return errReadOnly
		}
		return h(w, r)
	})
}

// openToReaders are the routes of a read-only service, for GET and HEAD.
var openToReaders = map[string]bool{
	"/v1/tenants/{tenant_id}":                 true,
	"/v1/tenants":                             true,
	"/v1/tenants/{tenant_id}/keys":            true,
	"/v1/tenants/{tenant_id}/keys/{key_name}": true,
	"/v1/apps/{app_id}":                       true,
	"/v1/audit":                               true,
	"/v1/callers":                             true,
	"/v1/callers/{caller_id}":                 true,
}

var errReadOnly = tenant.Errorf(tenant.Forbidden, "read_only",
	"this service is read-only (TENANTRY_READ_ONLY): it serves only lookups of tenants, apps, keys, callers and the audit log")

func bearerToken(r *http.Request) (tenant.Token, error) {
	headers := r.Header.Values("Authorization")
	if len(headers) > 1 { // of which a proxy in between may have meant the other
		return tenant.Token{}, tenant.Errorf(tenant.Unauthenticated, "token_invalid",
			"there are %d Authorization headers: send one", len(headers))
	}
	header := r.Header.Get("Authorization")
	if header == "" {
		return tenant.Token{}, tenant.Errorf(tenant.Unauthenticated, "token_missing",
			"send the header Authorization: Bearer <token>")
	}
	scheme, text, _ := strings.Cut(header, " ")
	token, ok := tenant.ParseToken(strings.TrimSpace(text))
	if !strings.EqualFold(scheme, "Bearer") || !ok {
		return tenant.Token{}, tenant.Errorf(tenant.Unauthenticated, "token_invalid",
			"the Authorization header must read Bearer and a token, which starts with tnty_")
	}
	return token, nil
}

func joinRoles(roles []tenant.Role) string {
	names := make([]string, len(roles))
	for i, r := range roles {
		names[i] = string(r)
	}
	return strings.Join(names, " or ")
}

// routeByEscapedPath makes chi match the path as it was sent, so that %2F is
// part of an id and every parameter is unescaped exactly once, by pathParam.
func routeByEscapedPath(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		chi.RouteContext(r.Context()).RoutePath = r.URL.EscapedPath()
		next.ServeHTTP(w, r)
	})
}

func pathParam(r *http.Request, name string) (string, error) {
	text, err := url.PathUnescape(chi.URLParam(r, name))
	if err != nil {
		return "", &tenant.Error{Kind: tenant.Invalid, Code: "invalid_" + name, Field: name, Detail: "is not percent-encoded correctly"}
	}
	return text, nil
}

func pathTenantID(r *http.Request) (tenant.ID, error) {
	text, err := pathParam(r, "tenant_id")
	if err != nil {
		return "", err
	}
	id, err := tenant.ParseID(text)
	if err == nil {
		infoOf(r).tenant = id
	}
	return id, err
}

func allowedMethods(mux *chi.Mux, r *http.Request) string {
	var allowed []string
	for _, m := range []string{http.MethodGet, http.MethodPut, http.MethodPost, http.MethodPatch, http.MethodDelete} {
		if mux.Match(chi.NewRouteContext(), m, r.URL.EscapedPath()) {
			allowed = append(allowed, m)
			if m == http.MethodGet {
				allowed = append(allowed, http.MethodHead)
			}
		}
	}
	return strings.Join(allowed, ", ")
}

// waiting returns a request's context with wait more time, and lifts the
// server's limits on reading and writing for as long. The body must have been
// read. Without a wait the limits are as they are.
func waiting(w http.ResponseWriter, r *http.Request, wait time.Duration) (context.Context, context.CancelFunc) {
	if wait <= 0 {
		return r.Context(), func() {}
	}
	rc := http.NewResponseController(w)
	end := time.Now().Add(wait + workTimeout)
	// Unsupported only outside a server, where there are no limits to lift.
	_ = rc.SetReadDeadline(end)
	_ = rc.SetWriteDeadline(end.Add(ReadTimeout))
	ctx, cancel := context.WithDeadline(infoOf(r), end)
	return ctx, cancel
}

// isGone reports whether a request failed because its caller went away.
func isGone(r *http.Request, err error) bool {
	return errors.Is(err, context.Canceled) && infoOf(r).Err() != nil
}
