package clarifaisim

import (
	"bytes"
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
)

// appFields are the fields of an app, in requests, answers and the state file. In
// requests those that the server sets are ignored.
type appFields struct {
	ID                string          `json:"id,omitempty"`
	Name              string          `json:"name,omitempty"`
	DefaultLanguage   string          `json:"default_language,omitempty"`
	DefaultWorkflowID string          `json:"default_workflow_id,omitempty"`
	UserID            string          `json:"user_id,omitempty"`
	CreatedAt         time.Time       `json:"created_at,omitzero"`
	ModifiedAt        time.Time       `json:"modified_at,omitzero"`
	Metadata          json.RawMessage `json:"metadata,omitempty"`
	Description       string          `json:"description,omitempty"`
	SampleMS          uint32          `json:"sample_ms,omitempty"`
	Visibility        *visibility     `json:"visibility,omitempty"`
	DataTierID        string          `json:"data_tier_id,omitempty"`
	Notes             string          `json:"notes,omitempty"`
	Image             json.RawMessage `json:"image,omitempty"`
	DefaultWorkflow   json.RawMessage `json:"default_workflow,omitempty"`
	ExtraInfo         *appExtraInfo   `json:"extra_info,omitempty"` // in answers, on request
	IsTemplate        *bool           `json:"is_template,omitempty"`
}

type visibility struct {
	Gettable gettable `json:"gettable"`
}

// gettable is an enum: a number in answers, a number or a name in requests.
type gettable int

const gettablePrivate gettable = 10

func (g *gettable) UnmarshalJSON(data []byte) error {
	switch string(data) {
	case "10", `"PRIVATE"`:
		*g = gettablePrivate
	case "30", `"ORG"`:
		*g = 30
	case "50", `"PUBLIC"`:
		*g = 50
	default:
		return fmt.Errorf("gettable cannot be %.20s", data)
	}
	return nil
}

type appExtraInfo struct {
	Counts struct {
		Inputs int `json:"inputs,omitempty"`
	} `json:"counts"`
}

func (f appFields) metadata() map[string]any {
	m := map[string]any{}
	if len(f.Metadata) > 0 {
		_ = json.Unmarshal(f.Metadata, &m) // it was checked when it came
	}
	return m
}

// maxNotes is the longest App.notes in bytes.
const maxNotes = 64 << 10

// check looks at what a request holds, and brings free JSON to a short form.
func (f *appFields) check() error {
	for name, raw := range map[string]*json.RawMessage{"metadata": &f.Metadata, "image": &f.Image, "default_workflow": &f.DefaultWorkflow} {
		short, err := object(*raw)
		if err != nil {
			return fmt.Errorf("%s has to be an object", name)
		}
		*raw = short
	}
	if len(f.Notes) > maxNotes {
		return fmt.Errorf("notes has to be at most %d bytes", maxNotes)
	}
	return nil
}

// object returns an object without white space, and nil for null and for nothing.
func object(raw json.RawMessage) (json.RawMessage, error) {
	if len(raw) == 0 || string(raw) == "null" {
		return nil, nil
	}
	if raw[0] != '{' {
		return nil, fmt.Errorf("not an object")
	}
	var buf bytes.Buffer
	if err := json.Compact(&buf, raw); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}

var appID = regexp.MustCompile(`^[A-Za-z0-9]+([-_][A-Za-z0-9]+)*$`)

func (s *Sim) checkAppID(id string) error {
	switch {
	case !appID.MatchString(id):
		return fmt.Errorf("'id' must consist of alphanumeric strings, separated by single hyphens or underscores")
	case len(id) > s.settings.MaxIDLength:
		return fmt.Errorf("'id' must have at most %d characters", s.settings.MaxIDLength)
	}
	return nil
}

// duplicate answers an app id that is taken.
func (s *Sim) duplicate(id string) answer {
	if s.settings.DuplicateCode == codeInvalidRequest {
		return refuse(codeInvalidRequest, "app with id '%s' already exist", id)
	}
	return refuse(codeDuplicate, "app_id '%s'", id)
}

func (s *Sim) saveFailed() answer {
	return refuse(codeInternal, "the simulator cannot save its state")
}

// postApps makes the apps of the request.
func (s *Sim) postApps(c *call) answer {
	var req struct {
		Apps []*appFields `json:"apps"`
	}
	if refusal, refused := c.decode(&req); refused {
		return refusal
	}
	if len(req.Apps) == 0 || slices.Contains(req.Apps, nil) {
		return refuse(codeInvalidRequest, "there is no app in the request")
	}
	c.log.AppID = req.Apps[0].ID
	taken := make(map[string]bool)
	return postSeveral(s, "apps", req.Apps, func(f *appFields) (made appFields, changes []change, refusal answer, refused bool) {
		changes, refusal, refused = s.newApp(c, f, taken)
		return *f, changes, refusal, refused
	})
}

// newApp checks an app that is to be made beside those that are taken, and completes it.
func (s *Sim) newApp(c *call, f *appFields, taken map[string]bool) (changes []change, refusal answer, refused bool) {
	if f.ID == "" {
		f.ID = newSecret()[:min(32, s.settings.MaxIDLength)]
	}
	if err := f.check(); err != nil {
		return nil, refuse(codeInvalidRequest, "%v", err), true
	}
	if err := s.checkAppID(f.ID); err != nil {
		return nil, refuse(codeInvalidRequest, "%v", err), true
	}
	if _, ok := s.world.apps[appRef{c.user, f.ID}]; ok || taken[f.ID] {
		return nil, s.duplicate(f.ID), true
	}
	if quota := s.settings.AppQuota; quota > 0 && s.world.perUser[c.user]+len(taken) >= quota {
		return nil, refuse(codeExceedsLimits, "the account may have %d apps", quota), true
	}
	taken[f.ID] = true
	f.UserID, f.CreatedAt, f.ModifiedAt, f.ExtraInfo = c.user, c.now, c.now, nil
	if f.Visibility == nil {
		f.Visibility = &visibility{gettablePrivate}
	}
	if f.DefaultWorkflow == nil {
		f.DefaultWorkflow = json.RawMessage(`{"id":"Universal","user_id":"clarifai","app_id":"main"}`)
	}
	changes = append(changes, change{PutApp: &app{App: *f, VisibleAt: s.visibleFrom(c.now)}})
	if s.settings.FirstKey {
		changes = append(changes, change{PutKey: &key{
			ID: newSecret(), UserID: c.user, AppID: f.ID, Description: "first key of the app", Scopes: []string{"All"},
			CreatedAt: c.now, VisibleAt: s.visibleFrom(c.now),
		}})
	}
	return changes, answer{}, false
}

// postSeveral makes the items of a request, each by what prepare says, as the settings
// have it where one of several fails.
func postSeveral[F, M any](s *Sim, list string, items []F, prepare func(F) (made M, changes []change, refusal answer, refused bool)) answer {
	several := len(items) > 1
	if several && s.settings.SeveralItems == SeveralRefused {
		return refuse(codeInvalidRequest, "there is more than one item in the request")
	}
	all := make([]M, 0, len(items))
	var changes []change
	var failure *answer
	for i, f := range items {
		made, needs, refusal, refused := prepare(f)
		if several && i+1 == s.settings.FailingItem {
			refusal, refused = refuse(codeInternal, "item %d of the request fails, as the simulator was told", i+1), true
		}
		if !refused {
			all, changes = append(all, made), append(changes, needs...)
			continue
		}
		if !several || s.settings.SeveralItems == SeveralAll {
			return refusal
		}
		failure = &refusal
		if s.settings.SeveralItems == SeveralFirst {
			break
		}
	}
	if s.commit(changes...) != nil {
		return s.saveFailed()
	}
	switch {
	case failure == nil:
		return ok(member{list, all})
	case s.settings.SeveralItems == SeveralFirst:
		return *failure
	}
	return answer{code: codeMixed, details: failure.details, body: []member{{list, all}}}
}

func (s *Sim) visibleFrom(now time.Time) time.Time {
	if s.settings.ConsistencyDelayMS == 0 {
		return time.Time{}
	}
	return now.Add(time.Duration(s.settings.ConsistencyDelayMS) * time.Millisecond)
}

// newSecret returns 32 hexadecimal digits.
func newSecret() string { return strings.ReplaceAll(uuid.NewString(), "-", "") }

func (s *Sim) getApp(c *call) answer {
	return ok(member{"app", c.app.answered(c.wantsCounts())})
}

// wantsCounts reports whether additional_fields asks for the counts of an app.
func (c *call) wantsCounts() bool {
	for _, v := range c.query["additional_fields"] {
		for field := range strings.SplitSeq(v, ",") {
			if field == "all" || field == "counts" {
				return true
			}
		}
	}
	return false
}

func (a *app) answered(counts bool) appFields {
	f := a.App
	if counts {
		f.ExtraInfo = &appExtraInfo{}
		f.ExtraInfo.Counts.Inputs = len(a.inputs)
	}
	return f
}

// deleteApp deletes at once, or announces that it will.
func (s *Sim) deleteApp(c *call) answer {
	if s.settings.AsyncDeleteMS == 0 {
		ref := c.app.ref()
		if s.commit(change{DropApp: &ref}) != nil {
			return s.saveFailed()
		}
		return ok()
	}
	if c.app.beingDeleted() {
		return answer{code: codeAccepted}
	}
	going := &app{App: c.app.App, VisibleAt: c.app.VisibleAt}
	going.DeleteAt = c.now.Add(time.Duration(s.settings.AsyncDeleteMS) * time.Millisecond)
	changes := []change{{PutApp: going}}
	for id := range c.app.keys {
		changes = append(changes, change{DropKey: id})
	}
	if s.commit(changes...) != nil {
		return s.saveFailed()
	}
	return answer{code: codeAccepted}
}
