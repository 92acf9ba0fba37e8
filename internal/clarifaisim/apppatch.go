package clarifaisim

import (
	"encoding/json"
	"fmt"
	"strings"
)

// metadataAction says how the metadata of a patch meets those of the app. The
// zero value means overwrite.
type metadataAction struct {
	Op                      string `json:"op"`
	MergeConflictResolution string `json:"merge_conflict_resolution"`
	Path                    string `json:"path"`
}

func (s *Sim) patchApp(c *call) answer {
	var req struct {
		App            *appFields     `json:"app"`
		Action         string         `json:"action"`
		MetadataAction metadataAction `json:"metadata_action"`
	}
	if refusal, refused := c.decode(&req); refused {
		return refusal
	}
	if req.App == nil {
		return refuse(codeInvalidRequest, "there is no app in the request")
	}
	req.App.ID = c.app.App.ID // the path says which
	patched, refusal, refused := s.patch(c, []*appFields{req.App}, req.Action, req.MetadataAction)
	if refused {
		return refusal
	}
	return ok(member{"app", patched[0]})
}

func (s *Sim) patchApps(c *call) answer {
	var req struct {
		Apps           []*appFields   `json:"apps"`
		Action         string         `json:"action"`
		MetadataAction metadataAction `json:"metadata_action"`
	}
	if refusal, refused := c.decode(&req); refused {
		return refusal
	}
	patched, refusal, refused := s.patch(c, req.Apps, req.Action, req.MetadataAction)
	if refused {
		return refusal
	}
	return ok(member{"apps", patched})
}

// patch changes all apps or none. An empty field of a patch is one that is not
// patched.
func (s *Sim) patch(c *call, patches []*appFields, action string, metadata metadataAction) (patched []appFields, refusal answer, refused bool) {
	if len(patches) == 0 {
		return nil, refuse(codeInvalidRequest, "there is no app in the request"), true
	}
	if action != "overwrite" && action != "remove" {
		return nil, refuse(codeInvalidRequest, "action has to be overwrite or remove"), true
	}
	var changes []change
	seen := make(map[string]bool)
	for _, p := range patches {
		if p == nil || seen[p.ID] {
			return nil, refuse(codeInvalidRequest, "an app of the request is empty or there twice"), true
		}
		seen[p.ID] = true
		a, ok := s.world.apps[appRef{c.user, p.ID}]
		if !ok {
			return nil, noApp(p.ID), true
		}
		if err := p.check(); err != nil {
			return nil, refuse(codeInvalidRequest, "%v", err), true
		}
		next := a.App
		if action == "remove" {
			if p.Image == nil {
				return nil, refuse(codeInvalidRequest, "remove can be used for the image only"), true
			}
			next.Image = nil
		} else if err := next.overwrite(p, metadata); err != nil {
			return nil, refuse(codeInvalidRequest, "%v", err), true
		}
		next.ModifiedAt = c.now
		patched = append(patched, next)
		changes = append(changes, change{PutApp: &app{App: next, VisibleAt: a.VisibleAt, DeleteAt: a.DeleteAt}})
	}
	if s.commit(changes...) != nil {
		return nil, s.saveFailed(), true
	}
	return patched, answer{}, false
}

// overwrite takes the fields of p that are set.
func (f *appFields) overwrite(p *appFields, action metadataAction) error {
	for _, field := range []struct{ to, from *string }{
		{&f.Name, &p.Name}, {&f.DefaultLanguage, &p.DefaultLanguage}, {&f.DefaultWorkflowID, &p.DefaultWorkflowID},
		{&f.Description, &p.Description}, {&f.DataTierID, &p.DataTierID}, {&f.Notes, &p.Notes},
	} {
		if *field.from != "" {
			*field.to = *field.from
		}
	}
	for _, field := range []struct{ to, from *json.RawMessage }{{&f.Image, &p.Image}, {&f.DefaultWorkflow, &p.DefaultWorkflow}} {
		if *field.from != nil {
			*field.to = *field.from
		}
	}
	if p.SampleMS != 0 {
		f.SampleMS = p.SampleMS
	}
	if p.Visibility != nil {
		f.Visibility = p.Visibility
	}
	if p.IsTemplate != nil {
		f.IsTemplate = p.IsTemplate
	}
	return f.patchMetadata(p, action)
}

// patchMetadata does what is needed of metadata_action: the three operations, at
// the root or at a path of object fields.
func (f *appFields) patchMetadata(p *appFields, action metadataAction) error {
	if p.Metadata == nil && action.Op != "delete" {
		return nil
	}
	root := f.metadata()
	var path []string
	if action.Path != "" {
		path = strings.Split(action.Path, ".")
	}
	value := p.metadata()
	switch action.Op {
	case "", "overwrite":
		root = setAt(root, path, value)
	case "merge":
		keep := false
		switch action.MergeConflictResolution {
		case "", "overwrite":
		case "do_nothing":
			keep = true
		default:
			return fmt.Errorf("the simulator has no merge_conflict_resolution %q", action.MergeConflictResolution)
		}
		at, _ := getAt(root, path).(map[string]any)
		root = setAt(root, path, merge(at, value, keep))
	case "delete":
		if len(path) == 0 {
			root = nil
			break
		}
		if parent, ok := getAt(root, path[:len(path)-1]).(map[string]any); ok {
			delete(parent, path[len(path)-1])
		}
	default:
		return fmt.Errorf("metadata_action.op has to be overwrite, merge or delete")
	}
	f.Metadata = nil
	if len(root) == 0 {
		return nil
	}
	raw, err := json.Marshal(root)
	f.Metadata = raw
	return err
}

func getAt(root map[string]any, path []string) any {
	var at any = root
	for _, name := range path {
		m, ok := at.(map[string]any)
		if !ok {
			return nil
		}
		at = m[name]
	}
	return at
}

// setAt returns root with value at path; what is on the way and no object is
// replaced.
func setAt(root map[string]any, path []string, value map[string]any) map[string]any {
	if len(path) == 0 {
		return value
	}
	if root == nil {
		root = map[string]any{}
	}
	next, _ := root[path[0]].(map[string]any)
	root[path[0]] = setAt(next, path[1:], value)
	return root
}

// merge puts the fields of from into a copy of into, object by object. keep says
// that what is there already stays.
func merge(into, from map[string]any, keep bool) map[string]any {
	merged := make(map[string]any, len(into)+len(from))
	for name, v := range into {
		merged[name] = v
	}
	for name, v := range from {
		old, taken := merged[name]
		oldObject, ok1 := old.(map[string]any)
		newObject, ok2 := v.(map[string]any)
		switch {
		case ok1 && ok2:
			merged[name] = merge(oldObject, newObject, keep)
		case !taken || !keep:
			merged[name] = v
		}
	}
	return merged
}

// patchAppsIDs gives an app another id. Its keys go on opening it; the old id is
// unknown from then on.
func (s *Sim) patchAppsIDs(c *call) answer {
	var req struct {
		IDs []struct {
			ID    string `json:"id"`
			NewID string `json:"new_id"`
		} `json:"ids"`
		Action string `json:"action"`
	}
	if refusal, refused := c.decode(&req); refused {
		return refusal
	}
	if len(req.IDs) != 1 || req.Action != "overwrite" {
		return refuse(codeInvalidRequest, "exactly one id can be changed at a time, by the action overwrite")
	}
	from, to := req.IDs[0].ID, req.IDs[0].NewID
	c.log.AppID = from
	a, found := s.world.apps[appRef{c.user, from}]
	if !found || a.beingDeleted() {
		return noApp(from)
	}
	if err := s.checkAppID(to); err != nil {
		return refuse(codeInvalidRequest, "%v", err)
	}
	if _, taken := s.world.apps[appRef{c.user, to}]; taken {
		return s.duplicate(to)
	}
	if s.commit(change{RenameApp: &appRename{a.ref(), to, c.now}}) != nil {
		return s.saveFailed()
	}
	return ok(member{"apps", []appFields{a.App}})
}
