package tenant

import (
	"strings"
	"time"

	"github.com/google/uuid"
)

// A Marker is what Tenantry writes into the metadata of every app it makes, to
// know it again.
type Marker struct {
	Deployment string `json:"deployment"`
	App        AppID  `json:"app"`
	Profile    string `json:"profile,omitempty"`
	// Tenant is the sealed id and generation of the tenant that the app was given
	// to; empty until then.
	Tenant string `json:"tenant,omitempty"`
	// Incarnation is the incarnation of the database that last wrote the tag.
	Incarnation string `json:"incarnation,omitempty"`
	// PurgeAfter is when the app of a deleted tenant is removed; empty otherwise. It is always
	// written, since Clarifai merges metadata.
	PurgeAfter string `json:"purge_after"`
	// Control is set in the one app whose metadata is the control record.
	Control *ControlRecord `json:"control,omitempty"`
}

// PurgeTag formats a time for Marker.PurgeAfter; the zero time is empty.
func PurgeTag(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Truncate(time.Microsecond).Format(time.RFC3339Nano)
}

// Owns reports whether m marks the app id as made by a deployment.
func (m *Marker) Owns(deployment string, id AppID) bool {
	return m != nil && m.Deployment == deployment && m.App == id
}

// An AppOwner is the tenant that an app was given to, as the app's marker keeps it
// sealed.
type AppOwner struct {
	Tenant     ID     `json:"tenant"`
	Generation int    `json:"generation"`
	Profile    string `json:"profile"`
}

// An UpstreamApp is an app as Clarifai shows it.
type UpstreamApp struct {
	ID     AppID
	UserID UserID
	Marker *Marker // nil when the app has none: it is not ours
	Inputs *int    // nil if Clarifai does not say
}

// A PauseScope says which work at Clarifai an operator has paused.
type PauseScope string

// The scopes of a pause by an operator.
const (
	PauseAll      PauseScope = "all"
	PauseRemovals PauseScope = "removals" // of apps; keys still end
)

// PauseScopes lists the scopes.
var PauseScopes = []PauseScope{PauseAll, PauseRemovals}

// The codes of the problems of work that an operator has paused.
const (
	WorkPaused     = "upstream_paused"
	RemovalsPaused = "removals_paused"
)

// An UpstreamPause is a pause of work at Clarifai by an operator. It has no end of its own.
type UpstreamPause struct {
	Scope  PauseScope `json:"scope"` // empty if nothing is paused
	Reason string     `json:"reason"`
	By     string     `json:"paused_by"` // as Actor.Name
	Since  time.Time  `json:"since"`     // of the scope
}

// A Page is a page of a listing, counted from 1. A page after the last is empty.
type Page struct {
	Number, Size int
	Counts       bool // of apps: ask for the number of their inputs
}

// A NewApp is an app to be made at Clarifai.
type NewApp struct {
	ID           AppID
	BaseWorkflow string // id of a workflow of clarifai/main, or Empty
	Language     string // empty leaves it to Clarifai
	Description  string
	Marker       Marker
}

// An UpstreamKey is a key as Clarifai lists it.
type UpstreamKey struct {
	// Secret is unset where the listing masks ids: the key cannot be addressed.
	Secret      Secret
	AppID       AppID // empty where the listing does not say
	Description string
	Scopes      []string
}

// A NewKey is an app-specific key to be made at Clarifai.
type NewKey struct {
	AppID  AppID
	Scopes []string
	Marker KeyMarker
}

// A KeyMarker is the description Tenantry gives every key it makes: the only
// place at Clarifai where a key can be told by something other than its secret.
type KeyMarker struct {
	Deployment string
	KeyID      uuid.UUID
}

const keyMarkerPrefix = "tenantry"

// String returns the marker as it stands in a key's description.
func (m KeyMarker) String() string {
	return keyMarkerPrefix + ":" + m.Deployment + ":" + m.KeyID.String()
}

// ParseKeyMarker reads the marker in a key's description. It reports false for
// the description of a key that Tenantry did not make.
func ParseKeyMarker(description string) (KeyMarker, bool) {
	parts := strings.Split(description, ":")
	if len(parts) != 3 || parts[0] != keyMarkerPrefix {
		return KeyMarker{}, false
	}
	id, err := uuid.Parse(parts[2])
	if err != nil {
		return KeyMarker{}, false
	}
	return KeyMarker{Deployment: parts[1], KeyID: id}, true
}
