package tenant

import (
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
)

// A Campaign takes many tenants through one change, in the background: it rotates the
// keys that a filter selects, or brings the apps of a profile to one revision of it.
// What is newer than the campaign is left alone, so that nothing is taken twice.
type Campaign struct {
	ID      uuid.UUID
	Kind    CampaignKind
	State   CampaignState
	Filter  KeyFilter     // only Profile is set to bring apps to a revision
	Overlap time.Duration // of its rotations

	Revision string // that apps are brought to,
	Shape    Shape  // and what it makes of them

	CreatedBy string
	CreatedAt time.Time
	EndedAt   time.Time // when nothing of it was under way any more; zero until then

	Counted bool // Total is known
	Total   int  // keys or apps; at the end those that were there when their turn came
	Done    int
	Skipped int
	Failed  int
	// UnderWay counts the rotations that have begun and whose new key does not work yet.
	UnderWay int
	Walked   bool // every key or app has had its turn

	Attempts    int // tries in a row that failed
	Problem     *Problem
	Halted      bool      // Problem holds up all work, so that nobody knows when this ends
	LeasedUntil time.Time // as App.LeasedUntil
}

// Left is how many keys or apps are still to be taken, as far as is known.
func (c Campaign) Left() int { return max(0, c.Total-c.Done-c.Skipped-c.Failed) }

// Ended reports whether nothing of c is done any more.
func (c Campaign) Ended() bool { return !c.EndedAt.IsZero() }

// A CampaignKind says what a campaign does.
type CampaignKind string

// The kinds of campaign.
const (
	RotateKeys  CampaignKind = "rotate"
	ConformApps CampaignKind = "conform"
)

// CampaignKinds lists every kind of campaign.
var CampaignKinds = []CampaignKind{RotateKeys, ConformApps}

// A CampaignState is where a campaign stands. What has begun is finished in any state.
type CampaignState string

// The states of a campaign.
const (
	CampaignRunning CampaignState = "running"
	CampaignPaused  CampaignState = "paused"
	CampaignStopped CampaignState = "stopped"
	CampaignDone    CampaignState = "done"
)

// CampaignStates lists every state of a campaign.
var CampaignStates = []CampaignState{CampaignRunning, CampaignPaused, CampaignStopped, CampaignDone}

// A CampaignChange is what a caller asks of a campaign.
type CampaignChange string

// The changes of a campaign.
const (
	PauseCampaign  CampaignChange = "pause"
	ResumeCampaign CampaignChange = "resume"
	StopCampaign   CampaignChange = "stop"
)

var campaignChanges = map[CampaignChange]struct {
	from []CampaignState
	to   CampaignState
}{
	PauseCampaign:  {[]CampaignState{CampaignRunning}, CampaignPaused},
	ResumeCampaign: {[]CampaignState{CampaignPaused}, CampaignRunning},
	StopCampaign:   {[]CampaignState{CampaignRunning, CampaignPaused}, CampaignStopped},
}

// Check returns the state that c leads to from s, which is s itself if c has been made
// already. The error is a Conflict that says what s allows.
func (c CampaignChange) Check(s CampaignState) (CampaignState, error) {
	change := campaignChanges[c]
	if s == change.to || slices.Contains(change.from, s) {
		return change.to, nil
	}
	var allowed []string
	for _, other := range []CampaignChange{PauseCampaign, ResumeCampaign, StopCampaign} {
		if slices.Contains(campaignChanges[other].from, s) {
			allowed = append(allowed, string(other))
		}
	}
	return s, Errorf(Conflict, "campaign_state_forbids", "the campaign is %s, which does not allow %q; it allows: %s", s, c, orNone(allowed))
}

// A KeyFilter selects active keys. Zero fields select all; All says that this is meant.
type KeyFilter struct {
	Profile   string            `json:"profile,omitempty"`
	Labels    map[string]string `json:"labels,omitempty"` // of the tenant, all of them
	KeyName   string            `json:"key_name,omitempty"`
	OlderThan time.Duration     `json:"older_than,omitempty"` // when the campaign began
	All       bool              `json:"all,omitempty"`
}

// Validate reports Invalid unless f either has conditions or says that it has none.
func (f KeyFilter) Validate() error {
	conditions := f.Profile != "" || len(f.Labels) > 0 || f.KeyName != "" || f.OlderThan != 0
	switch {
	case f.OlderThan < 0:
		return invalid("older_than", "is %s, and must be more than 0s", f.OlderThan)
	case f.All && conditions:
		return invalid("all", "goes with no other condition: all keys are rotated, or those that the conditions select")
	case !f.All && !conditions:
		return invalid("all", "is missing: name a profile, labels, a key_name or older_than, or send \"all\": true to rotate every key")
	}
	if f.KeyName != "" {
		if _, err := ParseKeyName(f.KeyName); err != nil {
			return err
		}
	}
	return SignUp{Labels: f.Labels}.Validate()
}

// Fields names the conditions of f without the values of labels, for the audit log.
func (f KeyFilter) Fields() map[string]any {
	fields := map[string]any{}
	if f.Profile != "" {
		fields["profile"] = f.Profile
	}
	if f.KeyName != "" {
		fields["key_name"] = f.KeyName
	}
	if f.OlderThan != 0 {
		fields["older_than_seconds"] = f.OlderThan.Seconds()
	}
	if f.All {
		fields["all"] = true
	}
	var labels []string
	for name := range f.Labels {
		labels = append(labels, name)
	}
	if slices.Sort(labels); len(labels) > 0 {
		fields["labels"] = labels
	}
	return fields
}

// A NewCampaign is a campaign as it is asked for.
type NewCampaign struct {
	ID       uuid.UUID
	Kind     CampaignKind
	Filter   KeyFilter
	Overlap  time.Duration // of rotations
	Revision string        // to bring apps to; it has been noted
}

// A CampaignItem is a key or an app of a campaign that is under way, was skipped or has
// failed.
type CampaignItem struct {
	Number   int64
	TenantID ID
	AppID    AppID
	KeyName  string // empty for an app
	State    CampaignItemState
	Problem  *Problem
}

// A CampaignItemState is where an item stands.
type CampaignItemState string

// The states of an item.
const (
	ItemUnderWay CampaignItemState = "under_way"
	ItemSkipped  CampaignItemState = "skipped"
	ItemFailed   CampaignItemState = "failed"
)

// CampaignItemStates lists every state of an item.
var CampaignItemStates = []CampaignItemState{ItemUnderWay, ItemSkipped, ItemFailed}

// A Settling is what a look at the rotations of a campaign found.
type Settling struct {
	Campaign
	Done, Skipped, Failed int // since the look before
}

// Shape is what one revision of a profile makes of an app and its keys.
type Shape struct {
	BaseWorkflow   string        `json:"base_workflow"`
	Language       string        `json:"language,omitempty"`
	AppDescription string        `json:"app_description"`
	ShowTenant     ShowTenant    `json:"show_tenant,omitempty"`
	Keys           []KeyTemplate `json:"keys"` // the default one first
}

// Shape returns what p makes of an app and its keys.
func (p Profile) Shape() Shape {
	return Shape{BaseWorkflow: p.BaseWorkflow, Language: p.Language, AppDescription: p.Description(""), ShowTenant: p.ShowTenant,
		Keys: append([]KeyTemplate{{Name: DefaultKey, Scopes: p.KeyScopes}}, p.ExtraKeys...)}
}

func (s Shape) describes() string {
	if s.ShowTenant == ShowNothing {
		return s.AppDescription
	}
	return s.AppDescription + " (tenant by " + string(s.ShowTenant) + ")"
}

// A Misfit is an app that is not of a revision of its profile.
type Misfit struct {
	TenantID ID
	State    State // of the tenant
	AppID    AppID
	Revision string // that it is of,
	Was      *Shape // and what that made of it; nil if that is not known
	Keys     []MisfitKey
}

// A MisfitKey is any key that an app has or had.
type MisfitKey struct {
	ID         uuid.UUID
	Name       string
	State      KeyState
	Scopes     []string
	Ciphertext []byte // nil unless it works
}

// An AppChange is what changes of an app upstream. Empty fields stay as they are.
type AppChange struct {
	BaseWorkflow string
	Language     string
	Description  string
}

// A ShapeChange is one thing that is to be changed so that an app is of a revision.
type ShapeChange struct {
	What     ShapeChangeKind
	KeyName  string
	From, To string // From is empty where it is not known, and for a key that is added
}

// A ShapeChangeKind says what is changed.
type ShapeChangeKind string

// The kinds of change of shape.
const (
	ChangesWorkflow    ShapeChangeKind = "base_workflow"
	ChangesLanguage    ShapeChangeKind = "language"
	ChangesDescription ShapeChangeKind = "app_description"
	ChangesScopes      ShapeChangeKind = "key_scopes"
	AddsKey            ShapeChangeKind = "key_added"
)

// ShapeChangeKinds lists every kind of change of shape.
var ShapeChangeKinds = []ShapeChangeKind{ChangesWorkflow, ChangesLanguage, ChangesDescription, ChangesScopes, AddsKey}

// Changes lists what is to be changed so that m is of the shape to. Keys whose names
// the shape does not have are left alone.
func (m Misfit) Changes(to Shape) []ShapeChange {
	var changes []ShapeChange
	was := Shape{}
	if m.Was != nil {
		was = *m.Was
	}
	if was.BaseWorkflow != to.BaseWorkflow {
		changes = append(changes, ShapeChange{What: ChangesWorkflow, From: was.BaseWorkflow, To: to.BaseWorkflow})
	}
	// A language that an app has cannot be taken away: Clarifai takes an empty one for
	// one that was left out.
	if to.Language != "" && was.Language != to.Language {
		changes = append(changes, ShapeChange{What: ChangesLanguage, From: was.Language, To: to.Language})
	}
	if m.Was == nil || was.describes() != to.describes() {
		from := ""
		if m.Was != nil {
			from = was.describes()
		}
		changes = append(changes, ShapeChange{What: ChangesDescription, From: from, To: to.describes()})
	}
	for _, t := range to.Keys {
		scopes := strings.Join(t.Scopes, ", ")
		there := false
		for _, k := range m.Keys {
			if k.Name != t.Name {
				continue
			}
			there = true
			if k.Live() && !SameScopes(k.Scopes, t.Scopes) {
				changes = append(changes, ShapeChange{What: ChangesScopes, KeyName: k.Name, From: strings.Join(k.Scopes, ", "), To: scopes})
			}
		}
		// One that was revoked is not made again: somebody wanted it gone.
		if !there {
			changes = append(changes, ShapeChange{What: AddsKey, KeyName: t.Name, To: scopes})
		}
	}
	return slices.Compact(changes)
}

// Live reports whether k works or is being made.
func (k MisfitKey) Live() bool {
	return k.State == KeyCreating || k.State == KeyActive || k.State == KeyRetiring
}

// ToRescope returns a key that works and has other scopes than the shape to gives it,
// and the scopes that it gives.
func (m Misfit) ToRescope(to Shape) (key MisfitKey, scopes []string, ok bool) {
	for _, t := range to.Keys {
		for _, k := range m.Keys {
			if k.Name == t.Name && k.Live() && k.State != KeyCreating && !SameScopes(k.Scopes, t.Scopes) {
				return k, t.Scopes, true
			}
		}
	}
	return key, nil, false
}

// Rescoped sets the scopes of a key.
func (m *Misfit) Rescoped(id uuid.UUID, scopes []string) {
	for i := range m.Keys {
		if m.Keys[i].ID == id {
			m.Keys[i].Scopes = scopes
		}
	}
}

// Blocked returns why m cannot be brought to the shape to now; nil if it can.
func (m Misfit) Blocked(to Shape) *Error {
	if _, err := ChangeKey.Check(m.State); err != nil {
		return Errorf(Conflict, "state_forbids", "the tenant is %s", m.State)
	}
	names := map[string]bool{}
	for _, k := range m.Keys {
		if k.Live() {
			names[k.Name] = true
		}
	}
	for _, c := range m.Changes(to) {
		switch c.What {
		case AddsKey:
			names[c.KeyName] = true
			if len(names) > MaxKeys {
				return Errorf(Conflict, "too_many_keys", "with %s the tenant would have keys of %d names; at most %d are allowed", c.KeyName, len(names), MaxKeys)
			}
		case ChangesScopes:
			for _, k := range m.Keys {
				if k.Name == c.KeyName && k.State == KeyCreating {
					return Errorf(Conflict, "key_creating", "the key %s is being made: apply the profile again when it works", k.Name)
				}
			}
		}
	}
	return nil
}
