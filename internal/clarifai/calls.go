package clarifai

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
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
		ExtraInfo       *struct {
			Counts *struct {
				Inputs int `json:"inputs"`
			} `json:"counts"`
		} `json:"extra_info,omitempty"`
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

// inputs is the number of inputs in the app; nil if Clarifai does not say.
func (a appJSON) inputs() *int {
	if a.ExtraInfo == nil || a.ExtraInfo.Counts == nil {
		return nil
	}
	return &a.ExtraInfo.Counts.Inputs
}

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
	return c.CreateApps(ctx, []tenant.NewApp{app})
}

// CreateApps makes apps by one call. How a call for several fails in part is not
// documented: if it may have been carried out and does not name each of them, the error
// is Unclear, of whatever class it is, and any of them may have been made.
func (c *Client) CreateApps(ctx context.Context, apps []tenant.NewApp) error {
	body := make([]appJSON, len(apps))
	missing := make(map[string]bool, len(apps))
	for i, app := range apps {
		metadata, err := json.Marshal(map[string]tenant.Marker{markerField: app.Marker})
		if err != nil {
			return &tenant.UpstreamError{Call: callPostApps, Class: tenant.UpstreamRefused, Detail: "not called: the marker cannot be encoded"}
		}
		body[i] = appJSON{
			ID:              string(app.ID),
			DefaultLanguage: app.Language,
			Description:     app.Description,
			DefaultWorkflow: &workflowJSON{ID: app.BaseWorkflow, UserID: "clarifai", AppID: "main"},
			Metadata:        metadata,
		}
		missing[body[i].ID] = true
	}
	return c.do(ctx, request{call: callPostApps, method: http.MethodPost, path: c.path("apps"), limit: answerOf(len(apps)),
		body: map[string][]appJSON{"apps": body}, items: len(apps)},
		func(a answer) string {
			var got struct {
				Apps []appJSON `json:"apps"`
			}
			const fault = "it does not name each app that was to be made, and no other"
			if !a.decode(&got) || len(got.Apps) != len(apps) {
				return fault
			}
			for _, app := range got.Apps {
				delete(missing, app.ID)
			}
			if len(missing) > 0 {
				return fault
			}
			return ""
		})
}

// answerOf is the limit of an answer that shows so many apps or keys.
func answerOf(items int) int64 { return maxAnswer + int64(items-1)*maxItem }

// App looks an app up. It reports tenant.UpstreamNotFound if there is none of
// that id; not for one that was given another id, which is tenant.UpstreamRefused.
func (c *Client) App(ctx context.Context, id tenant.AppID) (tenant.UpstreamApp, error) {
	return c.AppOf(ctx, c.operator, id)
}

// AppOf is App for an app of another user, that is shared with the operator; an empty
// owner is the operator.
func (c *Client) AppOf(ctx context.Context, owner tenant.UserID, id tenant.AppID) (tenant.UpstreamApp, error) {
	var app tenant.UpstreamApp
	err := c.do(ctx, request{call: "GetApp", method: http.MethodGet, limit: maxAnswer, query: url.Values{"additional_fields": {"counts"}},
		path: []string{"users", string(cmp.Or(owner, c.operator)), "apps", string(id)}},
		func(a answer) string {
			var got struct {
				App appJSON `json:"app"`
			}
			if !a.decode(&got) || got.App.ID != string(id) {
				return "it does not name the app that was asked for"
			}
			app = tenant.UpstreamApp{ID: id, UserID: tenant.UserID(got.App.UserID), Marker: readMarker(got.App.Metadata), Inputs: got.App.inputs()}
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
	secrets, err := c.CreateKeys(ctx, []tenant.NewKey{key})
	if err != nil {
		return tenant.Secret{}, err
	}
	return secrets[0], nil
}

// CreateKeys makes keys by one call and returns their secrets in the order of keys. Of
// several it errs as CreateApps does, and returns none.
func (c *Client) CreateKeys(ctx context.Context, keys []tenant.NewKey) ([]tenant.Secret, error) {
	body := make([]keyJSON, len(keys))
	place := make(map[string]int, len(keys)) // of a marker
	for i, key := range keys {
		body[i] = keyJSON{Description: key.Marker.String(), Scopes: key.Scopes,
			Apps: []appJSON{{ID: string(key.AppID), UserID: string(c.operator)}}}
		place[body[i].Description] = i
	}
	secrets := make([]tenant.Secret, len(keys))
	err := c.do(ctx, request{call: "PostKeys", method: http.MethodPost, path: c.path("keys"), limit: answerOf(len(keys)),
		body: map[string][]keyJSON{"keys": body}, items: len(keys)},
		func(a answer) string {
			var got struct {
				Keys []keyJSON `json:"keys"`
			}
			if !a.decode(&got) || len(got.Keys) != len(keys) {
				return "it does not hold each key that was to be made, and no other"
			}
			for _, made := range got.Keys {
				if made.Description == "" && len(keys) == 1 {
					made.Description = body[0].Description
				}
				i, known := place[made.Description]
				// Of several, each has to say which it is: a tenant's key must open the tenant's app.
				says := len(keys) == 1 || len(made.Apps) == 1
				switch {
				case !known, !says, len(made.Apps) > 0 && made.Apps[0].ID != string(keys[i].AppID):
					return "it holds another key than the one that was to be made"
				case !usableKey(made.ID):
					return "it holds no usable key"
				}
				secrets[i] = tenant.NewSecret(made.ID)
				delete(place, made.Description)
			}
			return ""
		})
	if err != nil {
		return nil, err
	}
	return secrets, nil
}

// Apps returns one page of the operator's apps, newest first. If apps are removed
// between two pages, the list skips others.
func (c *Client) Apps(ctx context.Context, p tenant.Page) ([]tenant.UpstreamApp, error) {
	query := pageQuery(p)
	query.Set("sort_by_created_at", "true")
	query.Set("sort_ascending", "false")
	if p.Counts {
		query.Set("additional_fields", "counts")
	}
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
				apps[i] = tenant.UpstreamApp{ID: tenant.AppID(app.ID), UserID: tenant.UserID(app.UserID), Marker: readMarker(app.Metadata), Inputs: app.inputs()}
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

// ChangeApp changes what an app was made of and leaves the rest of it alone. It reports
// tenant.UpstreamNotFound if there is no such app.
func (c *Client) ChangeApp(ctx context.Context, id tenant.AppID, change tenant.AppChange) error {
	app := appJSON{ID: string(id), DefaultLanguage: change.Language, Description: change.Description}
	if change.BaseWorkflow != "" {
		app.DefaultWorkflow = &workflowJSON{ID: change.BaseWorkflow, UserID: "clarifai", AppID: "main"}
	}
	body := map[string]any{"app": app, "action": "overwrite"}
	return c.do(ctx, request{call: "PatchApp", method: http.MethodPatch, path: c.path("apps", string(id)), body: body, limit: maxAnswer}, nothing)
}

// AppKeys returns one page of an app's keys, counted from 1; a page after the last
// is empty. It reports tenant.UpstreamNotFound if there is no such app.
func (c *Client) AppKeys(ctx context.Context, id tenant.AppID, page int) ([]tenant.UpstreamKey, error) {
	return c.listKeys(ctx, request{call: "ListAppKeys", path: c.path("apps", string(id), "keys"), query: pageQuery(tenant.Page{Number: page, Size: perPage})})
}

// Keys returns one page of the app-specific keys of all the operator's apps, as
// Apps does.
func (c *Client) Keys(ctx context.Context, p tenant.Page) ([]tenant.UpstreamKey, error) {
	query := pageQuery(p)
	query.Set("type", "app_specific_key")
	return c.listKeys(ctx, request{call: "ListKeys", path: c.path("keys"), query: query})
}

func pageQuery(p tenant.Page) url.Values {
	return url.Values{"page": {strconv.Itoa(p.Number)}, "per_page": {strconv.Itoa(p.Size)}}
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

// Opens asks with an app-specific key which app it opens and what it may do there; the
// operator's PAT takes no part. It reports tenant.UpstreamNotFound for a key that Clarifai
// does not know, or no longer.
func (c *Client) Opens(ctx context.Context, key tenant.Secret) (tenant.OpenedApp, error) {
	var opened tenant.OpenedApp
	if !key.IsSet() {
		return opened, &tenant.UpstreamError{Call: "MyScopes", Class: tenant.UpstreamRefused, Detail: "not called: there is no key"}
	}
	err := c.do(ctx, request{call: "MyScopes", method: http.MethodGet, path: []string{"myscopes"}, limit: maxAnswer, pat: key, key: key},
		func(a answer) string {
			var got struct {
				Scopes []string `json:"scopes"`
				App    appJSON  `json:"app"`
			}
			if !a.decode(&got) {
				return "it does not say what the key may do"
			}
			opened = tenant.OpenedApp{AppID: tenant.AppID(got.App.ID), UserID: tenant.UserID(got.App.UserID), Scopes: append([]string{}, got.Scopes...)}
			return ""
		})
	// What Clarifai says of the credential here it says of the key, and nothing of the PAT.
	if up, ok := errors.AsType[*tenant.UpstreamError](err); ok && up.Class == tenant.UpstreamPAT {
		up.Class = tenant.UpstreamForbidden
		if slices.Contains(deadKeyCodes, up.Code) {
			up.Class = tenant.UpstreamNotFound
		}
	}
	return opened, err
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
