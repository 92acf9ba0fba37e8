package httpapi

import (
	"errors"
	"net/http"
	"strings"

	"github.com/go-chi/chi/v5"

	"github.com/tenantry/tenantry/internal/tenant"
)

// openToLimited are the routes without a tenant in their path that a caller who is
// limited to some tenants may use. All others are closed to such callers, so that a
// new route tells them nothing until it is written here: its handler keeps to
// scopeOf, or tells of no tenant.
var openToLimited = map[string]bool{
	"GET /v1/tenants":        true,
	"POST /v1/tenants/batch": true,
	"GET /v1/apps/{app_id}":  true,
	"POST /v1/keys/identify": true,
	"GET /v1/upstream":       true,
}

// signUpRoute is the one route that may name a tenant that is not there yet.
const signUpRoute = "PUT /v1/tenants/{tenant_id}"

// scopeOf returns which tenants the caller of r may see and change.
func scopeOf(r *http.Request) tenant.Scope { return infoOf(r).caller.Scope }

// confine keeps a limited caller to its tenants, whatever the route is: it settles
// before any work that the tenant in the path is one of them, and answers for all
// others as if they were not there. Labels may change after that: a command is limited by
// the transaction that carries it out, which has the scope in its tenant.Actor.
func (s *server) confine(r *http.Request) error {
	scope := scopeOf(r)
	if !scope.Limited() {
		return nil
	}
	method := r.Method
	if method == http.MethodHead {
		method = http.MethodGet
	}
	pattern := chi.RouteContext(r.Context()).RoutePattern()
	route := method + " " + pattern
	if !strings.Contains(pattern, "{tenant_id}") {
		if openToLimited[route] {
			return nil
		}
		return tenant.Errorf(tenant.Forbidden, "caller_limited", "this takes a token that is not limited to tenants with given labels")
	}
	id, err := pathTenantID(r)
	if err != nil {
		return err
	}
	labels, err := s.labelsOf(r, id)
	if route == signUpRoute && errors.Is(err, tenant.NotFound) {
		return nil
	}
	if err != nil && !errors.Is(err, tenant.NotFound) {
		return err
	}
	if err != nil || !scope.Covers(labels) {
		return tenant.ErrOutside
	}
	return nil
}

// labelsOf reads the labels of a tenant: from Postgres for what is to be changed or
// revealed.
func (s *server) labelsOf(r *http.Request, id tenant.ID) (map[string]string, error) {
	if mayBeCached(r) {
		return s.DB.LookUpLabels(r.Context(), id)
	}
	return s.DB.TenantLabels(r.Context(), id)
}
