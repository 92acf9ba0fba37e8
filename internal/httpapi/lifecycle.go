package httpapi

import (
	"encoding/json"
	"net/http"
	"strings"
	"time"

	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/tenant"
)

// tenantChange serves what changes a tenant: it answers 202 until the change has taken
// effect, and 200 from then on.
func (s *server) tenantChange(change func(r *http.Request, id tenant.ID, wait time.Duration) (tenant.Tenant, error), query ...string) handler {
	return func(w http.ResponseWriter, r *http.Request) error {
		id, err := pathTenantID(r)
		if err != nil {
			return err
		}
		if _, err := params(r, query...); err != nil {
			return err
		}
		if err := decodeBody(w, r, &struct{}{}, mayBeEmpty); err != nil {
			return err
		}
		prefer := parsePrefer(r.Header.Values("Prefer"), 0)
		ctx, cancel := waiting(w, r, prefer.wait)
		defer cancel()
		t, err := change(r.WithContext(ctx), id, prefer.wait)
		if err != nil {
			return err
		}
		status := http.StatusOK
		if !t.Settled() {
			status = http.StatusAccepted
			setRetryAfter(w, retryProvisioning)
			w.Header().Set("Location", pathOf(id))
		}
		w.Header().Set("ETag", etagOf(t))
		applied(w, prefer)
		return respond(w, status, s.tenantBody(t))
	}
}

// applied says which preference was honoured.
func applied(w http.ResponseWriter, p preference) {
	if p.applied != "" {
		w.Header().Set("Preference-Applied", p.applied)
	}
}

func (s *server) suspendTenant(r *http.Request, id tenant.ID, wait time.Duration) (tenant.Tenant, error) {
	return s.Service.Suspend(r.Context(), id, wait, actorOf(r))
}

func (s *server) resumeTenant(r *http.Request, id tenant.ID, wait time.Duration) (tenant.Tenant, error) {
	return s.Service.Resume(r.Context(), id, wait, actorOf(r))
}

func (s *server) restoreTenant(r *http.Request, id tenant.ID, wait time.Duration) (tenant.Tenant, error) {
	return s.Service.Restore(r.Context(), id, wait, actorOf(r))
}

func (s *server) deleteTenant(r *http.Request, id tenant.ID, wait time.Duration) (tenant.Tenant, error) {
	purge := r.URL.Query().Get("purge") // params has read the query
	switch {
	case r.URL.Query().Has("purge") && purge != "now":
		return tenant.Tenant{}, invalid("purge", "must be now, or left out")
	case purge != "" && infoOf(r).caller.Role != tenant.Admin:
		return tenant.Tenant{}, tenant.Errorf(tenant.Forbidden, "role_forbidden", "purge=now takes the role admin; the token's role is %s", infoOf(r).caller.Role)
	}
	return s.Service.Delete(r.Context(), id, purge != "", wait, actorOf(r))
}

type patchBody struct {
	DisplayName        json.RawMessage `json:"display_name"`
	Labels             json.RawMessage `json:"labels"`
	DeletionProtection json.RawMessage `json:"deletion_protection"`
}

// patch reads a merge patch: what is null goes back to its default.
func (b patchBody) patch() (tenant.Patch, error) {
	var p tenant.Patch
	isNull := func(raw json.RawMessage) bool { return string(raw) == "null" }
	if b.DisplayName != nil {
		p.DisplayName = new(string)
		if err := json.Unmarshal(b.DisplayName, p.DisplayName); err != nil {
			return p, invalid("display_name", "must be a string, or null")
		}
	}
	if b.DeletionProtection != nil {
		p.DeletionProtection = new(bool)
		if err := json.Unmarshal(b.DeletionProtection, p.DeletionProtection); err != nil {
			return p, invalid("deletion_protection", "must be true, false or null")
		}
	}
	if p.ClearLabels = isNull(b.Labels); b.Labels != nil && !p.ClearLabels {
		if err := json.Unmarshal(b.Labels, &p.Labels); err != nil {
			return p, invalid("labels", "must be an object of strings and nulls, or null")
		}
	}
	return p, nil
}

func (s *server) patchTenant(w http.ResponseWriter, r *http.Request) error {
	id, err := pathTenantID(r)
	if err != nil {
		return err
	}
	if _, err := params(r); err != nil {
		return err
	}
	var body patchBody
	if err := decodeBody(w, r, &body, mergePatch, "display_name", "labels", "deletion_protection"); err != nil {
		return err
	}
	p, err := body.patch()
	if err != nil {
		return err
	}
	ifMatch := r.Header.Values("If-Match")
	t, err := s.Service.Update(r.Context(), id, p, func(t tenant.Tenant) bool {
		return len(ifMatch) == 0 || matchesVersion(ifMatch, t)
	}, actorOf(r))
	if err != nil {
		return err
	}
	w.Header().Set("ETag", etagOf(t))
	return respond(w, http.StatusOK, s.tenantBody(t))
}

// matchesVersion reports whether an If-Match names the version of t. What an ETag says
// beyond that cannot be changed by a patch, and is not compared.
func matchesVersion(headers []string, t tenant.Tenant) bool {
	bare := t
	bare.Problem, bare.State = nil, tenant.Active
	want := etagOf(bare)
	for i, h := range headers {
		for _, item := range strings.Split(h, ",") {
			item = strings.TrimSpace(item)
			if item == "*" && i == 0 && len(headers) == 1 {
				return true
			}
			parts := strings.Split(strings.Trim(item, `"`), ".")
			if len(parts) >= 2 && strings.HasPrefix(item, `"`) && `"`+strings.Join(parts[:2], ".")+`"` == want {
				return true
			}
		}
	}
	return false
}

func pathKeyName(r *http.Request) (string, error) {
	text, err := pathParam(r, "key_name")
	if err != nil {
		return "", err
	}
	return tenant.ParseKeyName(text)
}

// keyWithSecret is a key as it is answered to who has asked for it to be made.
type keyWithSecret struct {
	keyBody
	Credentials *credentialsBody `json:"credentials,omitempty"`
}

func (s *server) credentials(r *http.Request, id tenant.ID, k tenant.Key) (*credentialsBody, error) {
	secret, ok, err := s.Service.RevealNew(r.Context(), id, k, actorOf(r))
	if err != nil || !ok {
		return nil, err
	}
	return credentialsOf(k, secret), nil
}

type putKeyBody struct {
	Scopes    []string `json:"scopes"`
	ExpiresAt *string  `json:"expires_at"`
}

func (s *server) putKey(w http.ResponseWriter, r *http.Request) error {
	id, err := pathTenantID(r)
	if err != nil {
		return err
	}
	name, err := pathKeyName(r)
	if err != nil {
		return err
	}
	if _, err := params(r); err != nil {
		return err
	}
	var body putKeyBody
	if err := decodeBody(w, r, &body, mayBeEmpty, "scopes", "expires_at"); err != nil {
		return err
	}
	spec := tenant.KeySpec{Name: name, Scopes: body.Scopes}
	if spec.ExpiresAt, err = timeField("expires_at", body.ExpiresAt); err != nil {
		return err
	}
	prefer := parsePrefer(r.Header.Values("Prefer"), defaultWait)
	ctx, cancel := waiting(w, r, prefer.wait)
	defer cancel()
	r = r.WithContext(ctx)
	key, created, err := s.Service.AddKey(ctx, id, spec, prefer.wait, actorOf(r))
	if err != nil {
		return err
	}
	b := keyWithSecret{keyBody: keyBodyOf(key)}
	status := http.StatusOK
	switch {
	case key.State == tenant.KeyCreating:
		status = http.StatusAccepted
		setRetryAfter(w, retryProvisioning)
	case created:
		status = http.StatusCreated
	}
	switch b.Credentials, err = s.credentials(r, id, key); {
	case unrevealed(created, err):
		status = http.StatusAccepted
		setRetryAfter(w, retryProvisioning)
	case err != nil:
		return err
	}
	w.Header().Set("Cache-Control", "no-store")
	if status != http.StatusOK {
		w.Header().Set("Location", pathOf(id)+"/keys/"+name)
	}
	applied(w, prefer)
	return respond(w, status, b)
}

func (s *server) getKey(w http.ResponseWriter, r *http.Request) error {
	id, err := pathTenantID(r)
	if err != nil {
		return err
	}
	name, err := pathKeyName(r)
	if err != nil {
		return err
	}
	if _, err := params(r); err != nil {
		return err
	}
	var key tenant.Key
	if refusesCached(r) {
		key, err = s.DB.Key(r.Context(), id, name)
	} else {
		var fresh postgres.Freshness
		key, fresh, err = s.DB.LookUpKey(r.Context(), id, name)
		tellAge(w, fresh)
	}
	if err != nil {
		return err
	}
	return respond(w, http.StatusOK, keyBodyOf(key))
}

func (s *server) deleteKey(w http.ResponseWriter, r *http.Request) error {
	id, err := pathTenantID(r)
	if err != nil {
		return err
	}
	name, err := pathKeyName(r)
	if err != nil {
		return err
	}
	if _, err := params(r); err != nil {
		return err
	}
	if err := decodeBody(w, r, &struct{}{}, mayBeEmpty); err != nil {
		return err
	}
	prefer := parsePrefer(r.Header.Values("Prefer"), 0)
	ctx, cancel := waiting(w, r, prefer.wait)
	defer cancel()
	key, err := s.Service.RevokeKey(ctx, id, name, prefer.wait, actorOf(r))
	if err != nil {
		return err
	}
	status := http.StatusOK
	if key.State == tenant.KeyRevoking {
		status = http.StatusAccepted
		setRetryAfter(w, retryProvisioning)
		w.Header().Set("Location", pathOf(id)+"/keys/"+name)
	}
	applied(w, prefer)
	return respond(w, status, keyBodyOf(key))
}

type rotationBody struct {
	ID             string               `json:"id"`
	TenantID       tenant.ID            `json:"tenant_id"`
	KeyName        string               `json:"key_name"`
	State          tenant.RotationState `json:"state"`
	OverlapSeconds int64                `json:"overlap_seconds"`
	RetiresAt      time.Time            `json:"retires_at,omitzero"` // of the old key, while both work
	NewKey         keyBody              `json:"new_key"`
	OldKey         keyBody              `json:"old_key"`
	Problem        *tenant.Problem      `json:"problem,omitempty"`
	Credentials    *credentialsBody     `json:"credentials,omitempty"` // of the new key, once it works and while it is the current one
}

func rotationBodyOf(r tenant.Rotation) rotationBody {
	return rotationBody{ID: r.ID, TenantID: r.TenantID, KeyName: r.KeyName, State: r.State, OverlapSeconds: int64(r.Overlap / time.Second),
		RetiresAt: r.Old.RetiresAt.UTC(), NewKey: keyBodyOf(r.New), OldKey: keyBodyOf(r.Old), Problem: r.New.Problem}
}

// pathRotation reads the path of a rotation.
func pathRotation(r *http.Request) (id tenant.ID, name, rotation string, err error) {
	if id, err = pathTenantID(r); err != nil {
		return id, "", "", err
	}
	if name, err = pathKeyName(r); err != nil {
		return id, "", "", err
	}
	if rotation, err = pathParam(r, "rotation_id"); err != nil {
		return id, "", "", err
	}
	return id, name, rotation, tenant.NewRotation{ID: rotation}.Validate()
}

func (s *server) putRotation(w http.ResponseWriter, r *http.Request) error {
	id, name, rotation, err := pathRotation(r)
	if err != nil {
		return err
	}
	if _, err := params(r); err != nil {
		return err
	}
	var body struct {
		Overlap json.RawMessage `json:"overlap"`
	}
	if err := decodeBody(w, r, &body, mayBeEmpty, "overlap"); err != nil {
		return err
	}
	n := tenant.NewRotation{ID: rotation, KeyName: name, Priority: tenant.Interactive}
	if n.Overlap, err = durationField("overlap", body.Overlap); err != nil {
		return err
	}
	prefer := parsePrefer(r.Header.Values("Prefer"), defaultWait)
	ctx, cancel := waiting(w, r, prefer.wait)
	defer cancel()
	r = r.WithContext(ctx)
	rot, created, err := s.Service.Rotate(ctx, id, n, prefer.wait, actorOf(r))
	if err != nil {
		return err
	}
	applied(w, prefer)
	return s.respondRotation(w, r, rot, created)
}

// respondRotation answers with a rotation: with its new key for callers who may see it.
func (s *server) respondRotation(w http.ResponseWriter, r *http.Request, rot tenant.Rotation, created bool) error {
	b := rotationBodyOf(rot)
	var err error
	if infoOf(r).caller.Role == tenant.Provisioner {
		b.Credentials, err = s.credentials(r, rot.TenantID, rot.New)
	}
	status := http.StatusOK
	switch {
	case err != nil && !unrevealed(created, err):
		return err
	case err != nil, rot.State == tenant.RotationCreating && r.Method == http.MethodPut:
		status = http.StatusAccepted
		setRetryAfter(w, retryProvisioning)
	case created:
		status = http.StatusCreated
	}
	if status != http.StatusOK {
		w.Header().Set("Location", pathOf(rot.TenantID)+"/keys/"+rot.KeyName+"/rotations/"+rot.ID)
	}
	w.Header().Set("Cache-Control", "no-store")
	return respond(w, status, b)
}

func (s *server) getRotation(w http.ResponseWriter, r *http.Request) error {
	id, name, rotation, err := pathRotation(r)
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
	ctx, cancel := waiting(w, r, wait)
	defer cancel()
	rot, err := s.Service.Rotation(ctx, id, name, rotation, wait)
	if err != nil {
		return err
	}
	return s.respondRotation(w, r.WithContext(ctx), rot, false)
}

func (s *server) confirmRotation(w http.ResponseWriter, r *http.Request) error {
	id, name, rotation, err := pathRotation(r)
	if err != nil {
		return err
	}
	if _, err := params(r); err != nil {
		return err
	}
	if err := decodeBody(w, r, &struct{}{}, mayBeEmpty); err != nil {
		return err
	}
	rot, err := s.Service.ConfirmRotation(r.Context(), id, name, rotation, actorOf(r))
	if err != nil {
		return err
	}
	return respond(w, http.StatusOK, rotationBodyOf(rot))
}

type quarantineBody struct {
	TenantID  tenant.ID    `json:"tenant_id,omitempty"`
	AppID     tenant.AppID `json:"app_id"`
	Key       keyBody      `json:"key"`                 // that leaked
	Successor *keyBody     `json:"successor,omitempty"` // that takes its place
}

func (s *server) quarantineKey(w http.ResponseWriter, r *http.Request) error {
	if _, err := params(r); err != nil {
		return err
	}
	var body struct {
		Key string `json:"key"`
	}
	if err := decodeBody(w, r, &body, holdsSecret, "key"); err != nil {
		return err
	}
	leaked, err := leakedSecret(body.Key)
	if err != nil {
		return err
	}
	prefer := parsePrefer(r.Header.Values("Prefer"), defaultWait)
	ctx, cancel := waiting(w, r, prefer.wait)
	defer cancel()
	q, err := s.Service.Quarantine(ctx, leaked, prefer.wait, actorOf(r))
	if err != nil {
		return err
	}
	infoOf(r).tenant = q.TenantID
	b := quarantineBody{TenantID: q.TenantID, AppID: q.Key.AppID, Key: keyBodyOf(q.Key)}
	status := http.StatusOK
	if q.Successor.State != "" {
		k := keyBodyOf(q.Successor)
		b.Successor = &k
	}
	if q.Key.State == tenant.KeyRevoking || q.Successor.State == tenant.KeyCreating {
		status = http.StatusAccepted
		setRetryAfter(w, retryProvisioning)
		if q.TenantID != "" {
			w.Header().Set("Location", pathOf(q.TenantID)+"/keys")
		}
	}
	applied(w, prefer)
	return respond(w, status, b)
}
