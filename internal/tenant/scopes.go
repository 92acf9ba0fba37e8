package tenant

import (
	"fmt"
	"slices"
	"strings"
)

// The scopes that stand alone. All covers every other.
const (
	ScopeAll     = "All"
	ScopePredict = "Predict"
	ScopeSearch  = "Search"
)

// scopesOf are the verbs of each of Clarifai's resources, as its public protocol
// lists them (auth/scope/scope.proto): a scope is a resource and a verb.
var scopesOf = map[string]struct{ verbs, deprecated []string }{
	"AnnotationTracks":             {verbs: []string{"Get", "Add", "Delete"}},
	"Annotations":                  {verbs: []string{"Get", "Add", "Delete"}},
	"Apps":                         {verbs: []string{"Get", "Add", "Delete"}},
	"Artifacts":                    {verbs: []string{"Get", "Add", "Delete"}},
	"AuditLogs":                    {verbs: []string{"Get"}},
	"BulkOperation":                {verbs: []string{"Get", "Add", "Delete"}},
	"Collaborators":                {verbs: []string{"Get", "Add", "Delete"}},
	"Collectors":                   {deprecated: []string{"Get", "Add", "Delete"}},
	"ComputeClusters":              {verbs: []string{"Get", "Add", "Delete"}},
	"Concepts":                     {verbs: []string{"Get", "Add"}},
	"Datasets":                     {verbs: []string{"Get", "Add", "Delete"}},
	"Deployments":                  {verbs: []string{"Get", "Add", "Delete"}},
	"FindDuplicateAnnotationsJobs": {verbs: []string{"Get", "Delete"}, deprecated: []string{"Add"}},
	"Inputs":                       {verbs: []string{"Get", "Add", "Delete"}},
	"InstalledModuleVersions":      {deprecated: []string{"Get", "Add", "Delete"}},
	"InstanceTypes":                {verbs: []string{"Get"}},
	"Keys":                         {verbs: []string{"Get", "Add", "Delete"}},
	"LabelOrders":                  {verbs: []string{"Get", "Add", "Delete"}},
	"LogEntries":                   {verbs: []string{"Get"}},
	"Metrics":                      {verbs: []string{"Get", "Add", "Delete"}},
	"ModelExports":                 {verbs: []string{"Get", "Add"}},
	"ModelVersionPublications":     {verbs: []string{"Add", "Delete"}},
	"Models":                       {verbs: []string{"Get", "Add", "Delete", "Train", "Pull"}},
	"Modules":                      {deprecated: []string{"Get", "Add", "Delete"}},
	"Nodepools":                    {verbs: []string{"Get", "Add", "Delete"}},
	"PasswordPolicies":             {verbs: []string{"Get", "Add", "Delete"}},
	"PipelineSteps":                {verbs: []string{"Get", "Add", "Delete", "Pull"}},
	"PipelineVersionRunStatusLogs": {verbs: []string{"Get"}},
	"Pipelines":                    {verbs: []string{"Get", "Add", "Delete"}},
	"RunnerItems":                  {verbs: []string{"Get", "Add"}},
	"Runners":                      {verbs: []string{"Get", "Add", "Delete"}},
	"SavedSearch":                  {verbs: []string{"Get", "Add", "Delete"}},
	"Secrets":                      {verbs: []string{"Get", "Add", "Delete"}},
	"Tasks":                        {verbs: []string{"Get", "Add", "Delete"}},
	"Uploads":                      {verbs: []string{"Get", "Add", "Delete"}},
	"UserMetrics":                  {verbs: []string{"Get"}},
	"WorkflowMetrics":              {verbs: []string{"Add", "Delete"}, deprecated: []string{"Get"}},
	"WorkflowPublications":         {verbs: []string{"Add", "Delete"}},
	"WorkflowVersionEvaluations":   {verbs: []string{"Get", "Add"}},
	"Workflows":                    {verbs: []string{"Get", "Add", "Delete"}},
}

// needsVerbs are the verbs without which a verb of the same resource is of no use.
var needsVerbs = map[string][]string{"Add": {"Get"}, "Delete": {"Add", "Get"}}

// verbPatch is what changes needed once: it opens nothing.
const verbPatch = "Patch"

// CanonicalScope gives the two spellings of a scope, Models:Get and Models_Get,
// one form, the latter. Clarifai documents both.
func CanonicalScope(scope string) string { return strings.Replace(scope, ":", "_", 1) }

// A ScopeFault is something wrong with a list of scopes.
type ScopeFault struct {
	Index   int // in the list; -1 for the list as a whole
	Detail  string
	Warning bool // the list can be used as it is
}

// CheckScopes reports every fault of the scopes of one key: that there are none,
// that one is unknown, dead, named twice or lacks what it depends on, in either
// spelling; and, as warnings, those that are deprecated or covered by All.
func CheckScopes(scopes []string) []ScopeFault {
	if len(scopes) == 0 {
		return []ScopeFault{{Index: -1, Detail: "is empty: name at least one scope, such as " + ScopeAll}}
	}
	var faults []ScopeFault
	add := func(i int, warning bool, format string, args ...any) {
		faults = append(faults, ScopeFault{i, fmt.Sprintf(format, args...), warning})
	}
	has := map[string]bool{}
	for _, s := range scopes {
		has[CanonicalScope(s)] = true
	}
	seen := map[string]bool{}
	for i, given := range scopes {
		scope := CanonicalScope(given)
		if seen[scope] {
			add(i, false, "%s is named twice", shown(given))
			continue
		}
		seen[scope] = true
		resource, verb, _ := strings.Cut(scope, "_")
		of, known := scopesOf[resource]
		switch {
		case scope == ScopeAll:
			if len(scopes) > 1 {
				add(i, true, "%q covers every other scope", given)
			}
			continue
		case scope == ScopePredict || scope == ScopeSearch:
			continue
		case known && verb == verbPatch:
			add(i, false, "%q is dead: it opens nothing at Clarifai", given)
			continue
		case slices.Contains(of.deprecated, verb):
			add(i, true, "%q is deprecated at Clarifai", given)
		case !slices.Contains(of.verbs, verb):
			add(i, false, "%s is no scope of Clarifai's%s", shown(given), closestScope(scope))
			continue
		}
		if has[ScopeAll] {
			continue
		}
		var lacks []string
		for _, need := range needsVerbs[verb] {
			if slices.Contains(of.verbs, need) && !has[resource+"_"+need] {
				lacks = append(lacks, strings.TrimSuffix(given, verb)+need) // as it is spelt
			}
		}
		if len(lacks) > 0 {
			add(i, false, "%q needs %s beside it", given, strings.Join(lacks, " and "))
		}
	}
	return faults
}

// closestScope says which scopes somebody may have meant, as the end of a sentence.
func closestScope(scope string) string {
	for _, s := range []string{ScopeAll, ScopePredict, ScopeSearch} {
		if strings.EqualFold(s, scope) {
			return ": write " + s
		}
	}
	resource, verb, _ := strings.Cut(scope, "_")
	for r, of := range scopesOf {
		if !strings.EqualFold(r, resource) {
			continue
		}
		var names []string
		for _, v := range of.verbs {
			if strings.EqualFold(v, verb) {
				return ": write " + r + "_" + v
			}
			names = append(names, r+"_"+v)
		}
		if len(names) > 0 {
			return "; there are " + strings.Join(names, ", ")
		}
	}
	return "; they read like Models_Get, or " + ScopeAll
}
