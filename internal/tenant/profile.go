package tenant

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// Limits on what a profile may hold.
const (
	MaxExtraKeys            = MaxKeys - 1 // beside the default key
	MaxAppDescriptionLength = 256         // in characters
	MaxPool                 = 10_000
)

// KnownWorkflows are the base workflows that Clarifai's documentation names.
// Clarifai may have others.
var KnownWorkflows = []string{"Empty", "Universal", "General", "Language-Understanding"}

// A ProfileFault is something wrong with a profile.
type ProfileFault struct {
	// Field is what is at fault, as a profiles file has it: extra_keys.search.scopes[2]
	// is the third scope of the key search. Empty means the profile itself.
	Field   string
	Detail  string
	Warning bool // the profile can be used as it is
}

func (f ProfileFault) String() string {
	if f.Field == "" {
		return f.Detail
	}
	return f.Field + ": " + f.Detail
}

var (
	// What PostApps takes for an id of a workflow.
	workflowID = regexp.MustCompile(`^[A-Za-z0-9]+([-_][A-Za-z0-9]+)*$`)
	// As BCP 47 has them, without its rarer forms.
	language = regexp.MustCompile(`^[a-z]{2,3}(-[A-Za-z0-9]{2,8})*$`)
)

// Check reports every fault of p.
func (p Profile) Check() []ProfileFault {
	var faults []ProfileFault
	fault := func(field, format string, args ...any) {
		faults = append(faults, ProfileFault{Field: field, Detail: fmt.Sprintf(format, args...)})
	}
	scopes := func(field string, list []string) {
		for _, f := range CheckScopes(list) {
			at := field
			if f.Index >= 0 {
				at = fmt.Sprintf("%s[%d]", field, f.Index)
			}
			faults = append(faults, ProfileFault{at, f.Detail, f.Warning})
		}
	}
	if !ValidProfileName(p.Name) {
		fault("", "the name %s must have 1 to 63 characters of a-z, 0-9 and hyphens, and begin and end with a letter or digit", shown(p.Name))
	}
	switch {
	case !workflowID.MatchString(p.BaseWorkflow):
		fault("base_workflow", "%s cannot be the id of a workflow: name one such as Empty", shown(p.BaseWorkflow))
	case !slices.Contains(KnownWorkflows, p.BaseWorkflow):
		faults = append(faults, ProfileFault{"base_workflow", fmt.Sprintf(
			"%q is none of the workflows that Clarifai's documentation names (%s): if clarifai/main has none of this id, no app can be made",
			p.BaseWorkflow, strings.Join(KnownWorkflows, ", ")), true})
	}
	scopes("key_scopes", p.KeyScopes)
	seen := map[string]bool{DefaultKey: true}
	for _, k := range p.ExtraKeys {
		field := extraKeyField(k.Name)
		switch {
		case k.Name == DefaultKey:
			fault(field, "the key %q is made in any case, with key_scopes: give an extra key another name", DefaultKey)
		case seen[k.Name]:
			fault(field, "there are two keys of this name")
		case !profileName.MatchString(k.Name):
			fault(field, "the name %s must have 1 to 63 characters of a-z, 0-9 and hyphens, and begin and end with a letter or digit", shown(k.Name))
		}
		seen[k.Name] = true
		scopes(field+".scopes", k.Scopes)
	}
	if len(p.ExtraKeys) > MaxExtraKeys {
		fault("extra_keys", "there are %d: at most %d are allowed", len(p.ExtraKeys), MaxExtraKeys)
	}
	if len(p.AllowedScopes) > 0 {
		scopes("allowed_scopes", p.AllowedScopes)
	}
	if p.Language != "" && !language.MatchString(p.Language) {
		fault("language", "%s is no language code such as en or zh-TW", shown(p.Language))
	}
	if err, ok := validText("app_description", p.AppDescription, MaxAppDescriptionLength).(*Error); ok {
		fault("app_description", "%s", err.Detail)
	}
	if !slices.Contains([]ShowTenant{ShowNothing, ShowTenantID, ShowTenantHash}, p.ShowTenant) {
		fault("show_tenant", "%s must be none, %s or %s", shown(string(p.ShowTenant)), ShowTenantID, ShowTenantHash)
	}
	if p.Retention < 0 {
		fault("retention", "%s must be more than 0", p.Retention)
	}
	if p.MaxKeyAge < 0 {
		fault("max_key_age", "%s must be more than 0", p.MaxKeyAge)
	}
	for _, n := range []struct {
		field string
		n     int
	}{{"pool.min", p.PoolMin}, {"pool.max", p.PoolMax}} {
		if n.n < 0 || n.n > MaxPool {
			fault(n.field, "%d must be from 0 to %d", n.n, MaxPool)
		}
	}
	if p.PoolMax > 0 && p.PoolMin > p.PoolMax {
		fault("pool", "min %d is more than max %d", p.PoolMin, p.PoolMax)
	}
	return faults
}

// extraKeyField is the path of an extra key. A name that may hold anything is quoted.
func extraKeyField(name string) string {
	if !profileName.MatchString(name) {
		name = shown(name)
	}
	return "extra_keys." + name
}

// DefaultAppDescription is the description of apps whose profile gives none.
const DefaultAppDescription = "Managed by Tenantry"

// Description is what an app of the profile is described as upstream; shown, unless
// empty, is what it shows of its tenant.
func (p Profile) Description(shown string) string {
	text := p.AppDescription
	if text == "" {
		text = DefaultAppDescription
	}
	if shown != "" {
		text += " (tenant " + shown + ")"
	}
	return text
}

// A TenantCount is the number of tenants of one profile, revision and state.
type TenantCount struct {
	Profile    string
	Revision   string // of the profile, that their apps have; empty for tenants without an app
	State      State
	Background bool // signed up by an import
	Tenants    int
}

// A RevisionCount is the number of tenants with apps of one revision of a profile.
type RevisionCount struct {
	Revision string
	Tenants  int
}
