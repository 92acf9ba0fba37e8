package clarifai

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/tenantry/tenantry/internal/tenant"
)

// The shapes of what is sent and answered, as far as they are needed.
type (
	userJSON struct {
		ID string `json:"id"`
	}
	workflowJSON struct {
		ID     string `json:"id"`
		UserID string `json:"user_id"`
		AppID  string `json:"app_id"`
	}
	appJSON struct {
		ID              string          `json:"id"`
		UserID          string          `json:"user_id,omitempty"`
		DefaultLanguage string          `json:"default_language,omitempty"`
		Description     string          `json:"description,omitempty"`
		DefaultWorkflow *workflowJSON   `json:"default_workflow,omitempty"`
		Metadata        json.RawMessage `json:"metadata,omitempty"`
	}
	keyJSON struct {
		ID          string    `json:"id,omitempty"` // the secret
		Description string    `json:"description,omitempty"`
		Scopes      []string  `json:"scopes,omitempty"`
		Apps        []appJSON `json:"apps,omitempty"`
	}
)

// markerField is where the marker stands in an app's metadata.
const markerField = "tenantry"

// perPage is the most that Clarifai gives at once.
const perPage = 1000

// Whoami returns the user that a PAT belongs to; an unset one means the PAT in use.
func (c *Client) Whoami(ctx context.Context, pat tenant.Secret) (tenant.UserID, error) {
	var id tenant.UserID
	err := c.do(ctx, request{call: "GetUser", method: http.MethodGet, path: []string{"users", "me"}, limit: maxAnswer, pat: pat},
		func(a answer) string {
			var got struct {
				User userJSON `json:"user"`
			}
			if !a.decode(&got) || !plausibleUserID(got.User.ID) {
				return "it names no user"
			}
			id = tenant.UserID(got.User.ID)
			return ""
		})
	return id, err
}

// plausibleUserID keeps what is stored, shown and put into paths from being
// anything but an id. "me" would be an alias of whoever asks.
func plausibleUserID(id string) bool {
	return id != "" && id != "me" && id != "." && id != ".." && len(id) <= 256 && utf8.ValidString(id) &&
		!strings.ContainsFunc(id, func(r rune) bool { return r == '/' || unicode.IsSpace(r) || unicode.IsControl(r) })
}

// CreateApp makes an app with its marker. It reports tenant.UpstreamDuplicate if
// the id is taken, by an earlier call of ours or by somebody else.
func (c *Client) CreateApp(ctx context.Context, app tenant.NewApp) error {
	metadata, err := json.Marshal(map[string]tenant.Marker{markerField: app.Marker})
	if err != nil {
		return &tenant.UpstreamError{Call: callPostApps, Class: tenant.UpstreamRefused, Detail: "not called: the marker cannot be encoded"}
	}
	// One app a call: how a batch fails in part is not documented.
	body := map[string][]appJSON{"apps": {{
		ID:              string(app.ID),
		DefaultLanguage: app.Language,
		Description:     app.Description,
		DefaultWorkflow: &workflowJSON{ID: app.BaseWorkflow, UserID: "clarifai", AppID: "main"},
		Metadata:        metadata,
	}}}
	return c.do(ctx, request{call: callPostApps, method: http.MethodPost, path: c.path("apps"), body: body, limit: maxAnswer},
		func(a answer) string {
			var got struct {
				Apps []appJSON `json:"apps"`
			}
			if !a.decode(&got) || len(got.Apps) != 1 || got.Apps[0].ID != string(app.ID) {
				return "it does not name the one app that was to be made"
			}
			return ""
		})
}

// App looks an app up. It reports tenant.UpstreamNotFound if there is none of
// that id; not for one that was given another id, which is tenant.UpstreamRefused.
func (c *Client) App(ctx context.Context, id tenant.AppID) (tenant.UpstreamApp, error) {
	var app tenant.UpstreamApp
	err := c.do(ctx, request{call: callGetApp, method: http.MethodGet, path: c.path("apps", string(id)), limit: maxAnswer},
		func(a answer) string {
			var got struct {
				App appJSON `json:"app"`
			}
			if !a.decode(&got) || got.App.ID != string(id) {
				return "it does not name the app that was asked for"
			}
			app = tenant.UpstreamApp{ID: id, UserID: tenant.UserID(got.App.UserID), Marker: readMarker(got.App.Metadata)}
			return ""
		})
	return app, err
}

// readMarker returns nil for the metadata of an app that is not ours.
func readMarker(metadata json.RawMessage) *tenant.Marker {
	var m map[string]json.RawMessage
	if json.Unmarshal(metadata, &m) != nil {
		return nil
	}
	var marker tenant.Marker
	if json.Unmarshal(m[markerField], &marker) != nil || marker.Deployment == "" {
		return nil
	}
	return &marker
}

// DeleteApp removes an app, and its keys with it. It may be gone only some time
// after this returns: look with App. It reports tenant.UpstreamNotFound if there
// is no such app.
func (c *Client) DeleteApp(ctx context.Context, id tenant.AppID) error {
	return c.do(ctx, request{call: "DeleteApp", method: http.MethodDelete, path: c.path("apps", string(id)), limit: maxAnswer, also: codeAccepted}, nothing)
}

func nothing(answer) string { return "" }

// CreateKey makes an app-specific key with its marker, and returns its secret.
// There is nothing to address a key by whose answer was lost: when the error is
// Unclear, look for the marker with AppKeys.
func (c *Client) CreateKey(ctx context.Context, key tenant.NewKey) (tenant.Secret, error) {
	marker := key.Marker.String()
	body := map[string][]keyJSON{"keys": {{
		Description: marker,
		Scopes:      key.Scopes,
		Apps:        []appJSON{{ID: string(key.AppID), UserID: string(c.operator)}},
	}}}
	var secret tenant.Secret
	err := c.do(ctx, request{call: "PostKeys", method: http.MethodPost, path: c.path("keys"), body: body, limit: maxAnswer},
		func(a answer) string {
			var got struct {
				Keys []keyJSON `json:"keys"`
			}
			if !a.decode(&got) || len(got.Keys) != 1 {
				return "it does not hold the one key that was to be made"
			}
			made := got.Keys[0]
			switch {
			case made.Description != "" && made.Description != marker, len(made.Apps) > 0 && made.Apps[0].ID != string(key.AppID):
				return "it holds another key than the one that was to be made"
			case !usableKey(made.ID):
				return "it holds no usable key"
			}
			secret = tenant.NewSecret(made.ID)
			return ""
		})
	return secret, err
}

// Apps returns one page of the operator's apps, oldest first, counted from 1; a page
// after the last is empty. Apps that are removed meanwhile make it pass others over.
func (c *Client) Apps(ctx context.Context, page int) ([]tenant.UpstreamApp, error) {
	query := pageQuery(page)
	query.Set("sort_by_created_at", "true")
	query.Set("sort_ascending", "true")
	var apps []tenant.UpstreamApp
	err := c.do(ctx, request{call: "ListApps", method: http.MethodGet, path: c.path("apps"), query: query, limit: maxListing},
		func(a answer) string {
			var got struct {
				Apps []appJSON `json:"apps"`
			}
			if !a.decode(&got) {
				return "it holds no list of apps"
			}
			if len(got.Apps) > perPage {
				return fmt.Sprintf("it holds %d apps, more than a page", len(got.Apps))
			}
			apps = make([]tenant.UpstreamApp, len(got.Apps))
			for i, app := range got.Apps {
				apps[i] = tenant.UpstreamApp{ID: tenant.AppID(app.ID), UserID: tenant.UserID(app.UserID), Marker: readMarker(app.Metadata)}
			}
			return ""
		})
	return apps, err
}

// MarkApp writes a marker into an app's metadata and leaves the rest of it alone, and
// replaces the app's description unless the one given is empty. It reports tenant.UpstreamNotFound if there is no such app.
func (c *Client) MarkApp(ctx context.Context, id tenant.AppID, marker tenant.Marker, description string) error {
	metadata, err := json.Marshal(map[string]tenant.Marker{markerField: marker})
	if err != nil {
		return &tenant.UpstreamError{Call: "PatchApp", Class: tenant.UpstreamRefused, Detail: "not called: the marker cannot be encoded"}
	}
	body := map[string]any{
		"app":             appJSON{ID: string(id), Description: description, Metadata: metadata},
		"action":          "overwrite",
		"metadata_action": map[string]string{"op": "merge"},
	}
	return c.do(ctx, request{call: "PatchApp", method: http.MethodPatch, path: c.path("apps", string(id)), body: body, limit: maxAnswer}, nothing)
}

// AppKeys returns one page of an app's keys, counted from 1; a page after the last
// is empty. It reports tenant.UpstreamNotFound if there is no such app.
func (c *Client) AppKeys(ctx context.Context, id tenant.AppID, page int) ([]tenant.UpstreamKey, error) {
	return c.listKeys(ctx, request{call: "ListAppKeys", path: c.path("apps", string(id), "keys"), query: pageQuery(page)})
}

// Keys returns one page of the app-specific keys of all the operator's apps, as
// Apps does.
func (c *Client) Keys(ctx context.Context, page int) ([]tenant.UpstreamKey, error) {
	query := pageQuery(page)
	query.Set("type", "app_specific_key")
	return c.listKeys(ctx, request{call: "ListKeys", path: c.path("keys"), query: query})
}

func pageQuery(page int) url.Values {
	return url.Values{"page": {strconv.Itoa(page)}, "per_page": {strconv.Itoa(perPage)}}
}

func (c *Client) listKeys(ctx context.Context, r request) ([]tenant.UpstreamKey, error) {
	r.method, r.limit = http.MethodGet, maxListing
	var keys []tenant.UpstreamKey
	err := c.do(ctx, r, func(a answer) string {
		var got struct {
			Keys []keyJSON `json:"keys"`
		}
		if !a.decode(&got) {
			return "it holds no list of keys"
		}
		if len(got.Keys) > perPage {
			return fmt.Sprintf("it holds %d keys, more than a page", len(got.Keys))
		}
		keys = make([]tenant.UpstreamKey, len(got.Keys))
		for i, k := range got.Keys {
			keys[i] = tenant.UpstreamKey{Description: k.Description, Scopes: k.Scopes}
			if len(k.Apps) == 1 {
				keys[i].AppID = tenant.AppID(k.Apps[0].ID)
			}
			if !masked(k.ID) {
				keys[i].Secret = tenant.NewSecret(k.ID)
			}
		}
		return ""
	})
	return keys, err
}

// KeyExists reports whether a key is there. It reports tenant.UpstreamNotFound if
// it is not.
func (c *Client) KeyExists(ctx context.Context, key tenant.Secret) error {
	if !key.IsSet() {
		return &tenant.UpstreamError{Call: "GetKey", Class: tenant.UpstreamRefused, Detail: "not called: there is no key"}
	}
	return c.do(ctx, request{call: "GetKey", method: http.MethodGet, path: c.path("keys", key.Reveal()), limit: maxAnswer, key: key}, nothing)
}

// KeyOpens reports whether a key opens its app, by a look at the app with that key
// instead of the PAT; a key whose scopes do not allow the look opens it too. It reports
// tenant.UpstreamNotFound if Clarifai refuses the key, or if there is no such app.
func (c *Client) KeyOpens(ctx context.Context, app tenant.AppID, key tenant.Secret) error {
	if !key.IsSet() || !usableKey(key.Reveal()) {
		return &tenant.UpstreamError{Call: callGetApp, Class: tenant.UpstreamRefused, Detail: "not called: there is no usable key"}
	}
	err := c.do(ctx, request{call: callGetApp, method: http.MethodGet, path: c.path("apps", string(app)), limit: maxAnswer, pat: key, byKey: true}, nothing)
	if tenant.ClassOf(err) == tenant.UpstreamForbidden {
		return nil
	}
	return err
}

// SetKeyScopes replaces the scopes of a key. It reports tenant.UpstreamNotFound if
// there is no such key.
func (c *Client) SetKeyScopes(ctx context.Context, key tenant.Secret, scopes []string) error {
	if !key.IsSet() {
		return &tenant.UpstreamError{Call: "PatchKeys", Class: tenant.UpstreamRefused, Detail: "not called: there is no key"}
	}
	body := map[string]any{"keys": []keyJSON{{ID: key.Reveal(), Scopes: scopes}}, "action": "overwrite"}
	return c.do(ctx, request{call: "PatchKeys", method: http.MethodPatch, path: c.path("keys"), body: body, limit: maxAnswer, key: key}, nothing)
}

// DeleteKey removes a key: it works no longer. It reports tenant.UpstreamNotFound
// if there is no such key.
func (c *Client) DeleteKey(ctx context.Context, key tenant.Secret) error {
	if !key.IsSet() {
		return &tenant.UpstreamError{Call: callDeleteKey, Class: tenant.UpstreamRefused, Detail: "not called: there is no key"}
	}
	return c.do(ctx, request{call: callDeleteKey, method: http.MethodDelete, path: c.path("keys", key.Reveal()), limit: maxAnswer, key: key}, nothing)
}

const (
	callGetApp    = "GetApp"
	callPostApps  = "PostApps"
	callDeleteKey = "DeleteKey"
)

func (c *Client) path(elements ...string) []string {
	return append([]string{"users", string(c.operator)}, elements...)
}

// usableKey reports whether id can be a new key's secret: its form is not
// documented, so whatever can be sent in a header passes.
func usableKey(id string) bool {
	return id != "" && len(id) <= 1024 && printable(id) && !strings.Contains(id, "*")
}

var readableKey = regexp.MustCompile(`^[A-Za-z0-9_-]{16,}$`)

// masked reports whether a listing shows something other than a key's secret. It
// errs on the side of masked: a key taken for masked costs a new one, a mask taken
// for a key would be handed to a tenant.
func masked(id string) bool {
	if len(id) > 1024 || !readableKey.MatchString(id) {
		return true
	}
	// Some masks are made of letters: xxxxxxxxxxxx1a2b.
	run := 1
	for i := 1; i < len(id); i++ {
		if id[i] != id[i-1] {
			run = 0
		}
		if run++; run == 8 {
			return true
		}
	}
	return false
}

// printable reports whether s is made of visible ASCII: what a header and a path
// can hold.
func printable(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' })
}
