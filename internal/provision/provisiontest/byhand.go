package provisiontest

import (
	"bytes"
	"encoding/json"
	"net/http"

	"github.com/tenantry/tenantry/internal/tenant"
)

// Ask calls Clarifai by hand, as whose the PAT is, and returns the id of the first key
// that it answers, if any: its secret.
func (w *World) Ask(pat, method, path string, body any) (key string) {
	w.t.Helper()
	raw, err := json.Marshal(body)
	if err != nil {
		w.t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(w.t.Context(), method, w.Clarifai+"/v2/users/me"+path, bytes.NewReader(raw))
	if err != nil {
		w.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Key "+pat)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		w.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	var got struct {
		Keys []struct {
			ID string `json:"id"`
		} `json:"keys"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&got); err != nil || resp.StatusCode != http.StatusOK {
		w.t.Fatalf("%s by hand answers %s, %v", method, resp.Status, err)
	}
	if len(got.Keys) > 0 {
		key = got.Keys[0].ID
	}
	return key
}

// AppByHand makes an app as a SaaS does that has no Tenantry, with metadata of its own,
// and a key of it.
func (w *World) AppByHand(pat string, id tenant.AppID, metadata map[string]any) tenant.Secret {
	w.t.Helper()
	w.Ask(pat, http.MethodPost, "/apps", map[string]any{"apps": []any{map[string]any{"id": id, "description": "by hand", "metadata": metadata}}})
	return w.KeyByHand(pat, id)
}

// KeyByHand makes a key of an app, with a description that is no marker.
func (w *World) KeyByHand(pat string, id tenant.AppID) tenant.Secret {
	w.t.Helper()
	return tenant.NewSecret(w.Ask(pat, http.MethodPost, "/keys", map[string]any{"keys": []any{
		map[string]any{"description": "by hand", "scopes": []string{"All"}, "apps": []any{map[string]any{"id": id}}}}}))
}

// TheirPAT is the PAT of Them, another Clarifai user than the operator.
const (
	TheirPAT = "b0bb0bb0bb0bb0bb0bb0bb0bb0bb0bb0"
	Them     = tenant.UserID("bob")
)

// Shared has another user make an app and share it with the operator, and returns a key
// of it.
func (w *World) Shared(id tenant.AppID) tenant.Secret {
	w.t.Helper()
	w.AddPAT(TheirPAT, string(Them))
	key := w.AppByHand(TheirPAT, id, nil)
	w.Settings(map[string]any{"shares": []any{map[string]any{"user_id": Them, "app_id": id, "with": Operator}}})
	return key
}
