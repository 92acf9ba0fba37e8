package httpapi

import (
	"cmp"
	"encoding/json"
	"net/http"
	"strings"

	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/tenant"
)

// adoptionDone is the state that an answer gives an adoption that was carried out.
const adoptionDone tenant.AdoptionState = "done"

type adoptionBody struct {
	State    tenant.AdoptionState `json:"state"`
	DryRun   bool                 `json:"dry_run"`
	TenantID tenant.ID            `json:"tenant_id"`
	App      appBody              `json:"app"`
	Problem  *tenant.Problem      `json:"problem,omitempty"`
}

// adoptionAnswer is what is answered while there is no tenant.
type adoptionAnswer struct {
	Adoption adoptionBody `json:"adoption"`
}

// adoptFields are the fields of the object adopt.
var adoptFields = []string{"app_id", "user_id", "key", "dry_run"}

// parseAdopt reads the object adopt. Nothing of it is repeated in errors: a key may stand
// anywhere in it.
func parseAdopt(raw json.RawMessage) (tenant.AdoptRequest, error) {
	var a tenant.AdoptRequest
	var fields map[string]json.RawMessage
	if json.Unmarshal(raw, &fields) != nil {
		return a, invalid("adopt", "must be an object")
	}
	known := 0
	for _, name := range adoptFields {
		value, given := fields[name]
		if !given {
			continue
		}
		known++
		if name == "dry_run" {
			if json.Unmarshal(value, &a.DryRun) != nil {
				return a, invalid("adopt.dry_run", "must be true or false")
			}
			continue
		}
		var text string
		if json.Unmarshal(value, &text) != nil {
			return a, invalid("adopt."+name, "must be a string")
		}
		switch {
		case name == "key":
			a.Key = tenant.NewSecret(text)
		case text == "":
			return a, invalid("adopt."+name, "is empty")
		case name == "app_id":
			a.AppID = tenant.AppID(text)
		default:
			a.UserID = tenant.UserID(text)
		}
	}
	if known < len(fields) {
		return a, invalid("adopt", "has a field that this request does not know; there are: %s", strings.Join(adoptFields, ", "))
	}
	return a, a.Validate()
}

// adoptTenant serves a sign-up that takes over an app.
func (s *server) adoptTenant(w http.ResponseWriter, r *http.Request, id tenant.ID, raw json.RawMessage, up tenant.SignUp) error {
	// The account's apps that no tenant has are nobody's by label.
	if scopeOf(r).Limited() {
		return tenant.Errorf(tenant.Forbidden, "caller_limited", "to adopt an app takes a token that is not limited to tenants with given labels")
	}
	what, err := parseAdopt(raw)
	if err != nil {
		return err
	}
	what.ByAdmin = infoOf(r).caller.Role == tenant.Admin
	prefer := parsePrefer(r.Header.Values("Prefer"), defaultWait)
	ctx, cancel := waiting(w, r, prefer.wait)
	defer cancel()
	a, err := s.Service.Adopt(ctx, id, what, up, prefer.wait, actorOf(r))
	if err != nil {
		return err
	}
	w.Header().Set("Cache-Control", "no-store")
	applied(w, prefer)
	if a.Done && !what.DryRun {
		b := s.tenantBody(a.Tenant)
		b.Adoption = s.adoptionBody(a)
		return s.respondSignedUp(w, r.WithContext(ctx), a.Tenant, b, a.Created)
	}
	status := http.StatusOK
	if !a.Done && a.Adoption.State == tenant.AdoptionChecking {
		status = http.StatusAccepted
		setRetryAfter(w, retryProvisioning)
		w.Header().Set("Location", pathOf(id))
	}
	return respond(w, status, adoptionAnswer{*s.adoptionBody(a)})
}

func (s *server) adoptionBody(a provision.Adopted) *adoptionBody {
	if a.Done && a.Adoption.State != tenant.AdoptionRefused {
		return &adoptionBody{State: adoptionDone, TenantID: a.Tenant.ID, App: s.appBody(a.Tenant.AppID, a.Tenant.AppUserID)}
	}
	return &adoptionBody{State: a.Adoption.State, DryRun: a.Adoption.DryRun, TenantID: a.Adoption.TenantID,
		App: s.appBody(a.Adoption.AppID, a.Adoption.AppUserID), Problem: a.Adoption.Problem}
}

func (s *server) appBody(id tenant.AppID, owner tenant.UserID) appBody {
	return appBody{ID: id, UserID: cmp.Or(owner, s.Service.Deployment.Operator)}
}
