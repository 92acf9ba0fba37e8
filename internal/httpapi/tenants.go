package httpapi

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/tenant"
)

type tenantBody struct {
	ID          tenant.ID         `json:"id"`
	State       tenant.State      `json:"state"`
	Profile     string            `json:"profile"`
	App         *appBody          `json:"app,omitempty"`
	DisplayName string            `json:"display_name"`
	Labels      map[string]string `json:"labels"`
	// DeletionProtection refuses the deletion.
	DeletionProtection bool             `json:"deletion_protection"`
	Deletion           *deletionBody    `json:"deletion,omitempty"`
	Generation         int              `json:"generation"`
	CreatedAt          time.Time        `json:"created_at"`
	UpdatedAt          time.Time        `json:"updated_at"`
	Problem            *tenant.Problem  `json:"problem,omitempty"`
	Credentials        *credentialsBody `json:"credentials,omitempty"`
	Adoption           *adoptionBody    `json:"adoption,omitempty"` // of a sign-up that took an app over
}

// deletionBody says of a tenant that is deleting how far that is.
type deletionBody struct {
	PurgeAfter  time.Time `json:"purge_after"`
	KeysRevoked bool      `json:"keys_revoked"`
}

type appBody struct {
	ID     tenant.AppID  `json:"id"`
	UserID tenant.UserID `json:"user_id"`
}

// credentialsBody holds a secret in the clear: it is made for one answer.
type credentialsBody struct {
	Name   string   `json:"name"`
	Key    string   `json:"key"`
	Scopes []string `json:"scopes"`
}

func (s *server) tenantBody(t tenant.Tenant) tenantBody {
	b := tenantBody{ID: t.ID, State: t.State, Profile: t.Profile, DisplayName: t.DisplayName, Labels: t.Labels,
		DeletionProtection: t.DeletionProtection, Generation: t.Generation, CreatedAt: t.CreatedAt.UTC(), UpdatedAt: t.UpdatedAt.UTC(), Problem: t.Problem}
	if b.Labels == nil {
		b.Labels = map[string]string{}
	}
	if t.AppID != "" {
		app := s.appBody(t.AppID, t.AppUserID)
		b.App = &app
	}
	if t.State == tenant.Deleting {
		b.Deletion = &deletionBody{PurgeAfter: t.PurgeAfter.UTC(), KeysRevoked: t.KeysDead}
	}
	return b
}

// etagOf names what is shown of a tenant: its version, and what comes and goes without
// a new one, as the problem of a tenant that waits.
func etagOf(t tenant.Tenant) string {
	if t.Problem == nil && t.State != tenant.Deleting {
		return `"` + strconv.Itoa(t.Generation) + "." + strconv.FormatInt(t.Version, 10) + `"`
	}
	var problem tenant.Problem
	if t.Problem != nil {
		problem = *t.Problem
	}
	h := fnv.New32a()
	_, _ = fmt.Fprintf(h, "%+v %v %v", problem, t.KeysDead, t.PurgeAfter.UnixMicro())
	return fmt.Sprintf(`"%d.%d.%08x"`, t.Generation, t.Version, h.Sum32())
}

func pathOf(id tenant.ID) string { return "/v1/tenants/" + url.PathEscape(string(id)) }

type signUpBody struct {
	Profile     *string           `json:"profile"`
	DisplayName *string           `json:"display_name"`
	Labels      map[string]string `json:"labels"`
	Adopt       json.RawMessage   `json:"adopt"`
}

// retryProvisioning is when to ask again for a tenant that is under way.
const retryProvisioning = time.Second

func (s *server) putTenant(w http.ResponseWriter, r *http.Request) error {
	id, err := pathTenantID(r)
	if err != nil {
		return err
	}
	q, err := params(r, "on_deleting")
	if err != nil {
		return err
	}
	replace := q.Get("on_deleting")
	if q.Has("on_deleting") && replace != "replace" {
		return invalid("on_deleting", "must be replace, or left out")
	}
	var body signUpBody
	if err := decodeBody(w, r, &body, mayBeEmpty, "profile", "display_name", "labels", "adopt"); err != nil {
		return err
	}
	up := tenant.SignUp{Profile: body.Profile, DisplayName: body.DisplayName, Labels: body.Labels, Replace: replace != ""}
	if body.Adopt != nil {
		if replace != "" {
			return invalid("on_deleting", "cannot be combined with adopt: purge the tenant first")
		}
		return s.adoptTenant(w, r, id, body.Adopt, up)
	}
	if infoOf(r).caller.Role != tenant.Provisioner {
		return tenant.Errorf(tenant.Forbidden, "role_forbidden", "requires role provisioner; this token has role %s, which may only adopt", infoOf(r).caller.Role)
	}
	prefer := parsePrefer(r.Header.Values("Prefer"), defaultWait)
	ctx, cancel := waiting(w, r, prefer.wait)
	defer cancel()
	got, err := s.Service.SignUp(ctx, id, up, prefer.wait, actorOf(r))
	if err != nil {
		return err
	}
	w.Header().Set("Cache-Control", "no-store")
	applied(w, prefer)
	b := s.tenantBody(got.Tenant)
	if got.Secret.IsSet() {
		b.Credentials = credentialsOf(got.Key, got.Secret)
	}
	return s.respondSignedUp(w, r.WithContext(ctx), got.Tenant, b, got.Created)
}

func credentialsOf(key tenant.Key, secret tenant.Secret) *credentialsBody {
	return &credentialsBody{Name: key.Name, Key: secret.Reveal(), Scopes: key.Scopes}
}

// respondSignedUp answers a sign-up with b, the body of t, to which it adds the
// credentials of an active tenant, unless b has them already or the caller is an admin.
func (s *server) respondSignedUp(w http.ResponseWriter, r *http.Request, t tenant.Tenant, b tenantBody, created bool) error {
	status := http.StatusOK
	switch {
	case t.State == tenant.Active:
		if created {
			status = http.StatusCreated
		}
		if b.Credentials == nil && infoOf(r).caller.Role == tenant.Provisioner { // an admin sees no keys
			key, secret, err := s.Service.Reveal(r.Context(), t.ID, tenant.DefaultKey, actorOf(r))
			switch {
			case errors.Is(err, tenant.NotFound): // it has been revoked: the tenant is there all the same
			case unrevealed(created, err):
				status = http.StatusAccepted
				setRetryAfter(w, retryProvisioning)
			case err != nil:
				return err
			default:
				b.Credentials = credentialsOf(key, secret)
			}
		}
	case !t.Settled():
		status = http.StatusAccepted
		setRetryAfter(w, retryProvisioning)
	}
	w.Header().Set("ETag", etagOf(t))
	if status != http.StatusOK {
		w.Header().Set("Location", pathOf(t.ID))
	}
	return respond(w, status, b)
}

// unrevealed reports whether the key of what a request has created cannot be shown now, for lack of the
// database. The change is committed: the answer is 202, and the same request again shows the key.
func unrevealed(created bool, err error) bool {
	e, ok := errors.AsType[*tenant.Error](err)
	return created && ok && e.Code == "database_unavailable"
}

func (s *server) getTenant(w http.ResponseWriter, r *http.Request) error {
	id, err := pathTenantID(r)
	if err != nil {
		return err
	}
	q, err := params(r, "wait")
	if err != nil {
		return err
	}
	wait, err := waitParam(q)
	if err != nil {
		return err
	}
	var t tenant.Tenant
	switch {
	case wait > 0:
		ctx, cancel := waiting(w, r, wait)
		defer cancel()
		t, err = s.Service.Tenant(ctx, id, wait)
	case q.Has("wait") || refusesCached(r):
		t, err = s.DB.Tenant(r.Context(), id)
	default:
		var fresh postgres.Freshness
		t, fresh, err = s.DB.LookUpTenant(r.Context(), id)
		tellAge(w, fresh)
	}
	if err != nil {
		return err
	}
	return s.respondTenant(w, r, t)
}

func (s *server) respondTenant(w http.ResponseWriter, r *http.Request, t tenant.Tenant) error {
	etag := etagOf(t)
	w.Header().Set("ETag", etag)
	if matches(r.Header.Values("If-None-Match"), etag) {
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	return respond(w, http.StatusOK, s.tenantBody(t))
}

// matches reports whether an If-None-Match names etag. One that is not as RFC 9110
// has it names nothing: the answer is then in full, which is never wrong.
func matches(headers []string, etag string) bool {
	if len(headers) == 0 {
		return false
	}
	header := strings.Join(headers, ",")
	if strings.TrimSpace(header) == "*" {
		return true
	}
	found := false
	for header != "" {
		header = strings.TrimLeft(header, " \t,") // of empty items, too
		if header == "" {
			break
		}
		tag := entityTag.FindStringSubmatch(header)
		if tag == nil {
			return false
		}
		found = found || tag[1] == etag
		header = header[len(tag[0]):]
	}
	return found
}

// entityTag is a tag at the beginning of a list, up to its comma.
var entityTag = regexp.MustCompile(`^(?:W/)?("[\x21\x23-\x7e\x80-\x{10ffff}]*")[ \t]*(?:,|$)`)

type tenantListBody struct {
	Tenants    []tenantBody `json:"tenants"`
	NextCursor string       `json:"next_cursor,omitempty"`
}

func (s *server) listTenants(w http.ResponseWriter, r *http.Request) error {
	l, err := parseListQuery(r)
	if err != nil {
		return err
	}
	l.filter.Within = scopeOf(r)
	// One more than is asked for tells whether there is another page.
	tenants, err := s.DB.Tenants(r.Context(), l.filter, l.after, l.limit+1)
	if err != nil {
		return err
	}
	body := tenantListBody{Tenants: []tenantBody{}}
	if len(tenants) > l.limit {
		tenants = tenants[:l.limit]
		last := tenants[l.limit-1]
		body.NextCursor = formatCursor(postgres.Position{CreatedAt: last.CreatedAt, ID: last.ID})
	}
	for _, t := range tenants {
		body.Tenants = append(body.Tenants, s.tenantBody(t))
	}
	return respond(w, http.StatusOK, body)
}

func (s *server) getAppTenant(w http.ResponseWriter, r *http.Request) error {
	id, err := pathParam(r, "app_id")
	if err != nil {
		return err
	}
	if _, err := params(r); err != nil {
		return err
	}
	if !plausibleName(id) {
		return tenant.Errorf(tenant.NotFound, "app_not_found", "there is no such app")
	}
	var t tenant.Tenant
	if refusesCached(r) {
		t, err = s.DB.TenantOfApp(r.Context(), tenant.AppID(id))
	} else {
		var fresh postgres.Freshness
		t, fresh, err = s.DB.LookUpTenantOfApp(r.Context(), tenant.AppID(id))
		tellAge(w, fresh)
	}
	if err != nil {
		return err
	}
	if !scopeOf(r).Covers(t.Labels) {
		return tenant.Errorf(tenant.NotFound, "app_not_found", "there is no such app")
	}
	infoOf(r).tenant = t.ID
	return s.respondTenant(w, r, t)
}

func (s *server) retryTenant(w http.ResponseWriter, r *http.Request) error {
	id, err := pathTenantID(r)
	if err != nil {
		return err
	}
	if _, err := params(r); err != nil {
		return err
	}
	if err := decodeBody(w, r, &struct{}{}, mayBeEmpty); err != nil {
		return err
	}
	t, err := s.Service.Retry(r.Context(), id, actorOf(r))
	if err != nil {
		return err
	}
	w.Header().Set("ETag", etagOf(t))
	w.Header().Set("Location", pathOf(id))
	setRetryAfter(w, retryProvisioning)
	return respond(w, http.StatusAccepted, s.tenantBody(t))
}
