package clarifaisim

import (
	"slices"
	"strings"
)

// scopeVerbs are the verbs of each resource that has scopes, old ones too.
var scopeVerbs = map[string][]string{
	"Inputs": {"Add", "Get", "Delete", "Patch"}, "Concepts": {"Add", "Get", "Patch"},
	"Models": {"Add", "Get", "Delete", "Train", "Pull", "Patch"}, "ModelExports": {"Get", "Add"},
	"Workflows": {"Add", "Get", "Delete", "Patch"}, "WorkflowMetrics": {"Add", "Get", "Delete"},
	"Annotations": {"Add", "Get", "Delete", "Patch"}, "Apps": {"Add", "Get", "Delete"},
	"Keys": {"Add", "Get", "Delete"}, "Collaborators": {"Get", "Add", "Delete"},
	"Metrics": {"Get", "Add", "Delete"}, "Tasks": {"Add", "Get", "Delete"},
	"PasswordPolicies": {"Add", "Get", "Delete"}, "LabelOrders": {"Get", "Add", "Delete"},
	"FindDuplicateAnnotationsJobs": {"Add", "Get", "Delete"}, "Datasets": {"Get", "Add", "Delete"},
	"SavedSearch": {"Get", "Add", "Delete"}, "ModelVersionPublications": {"Add", "Delete"},
	"WorkflowPublications": {"Add", "Delete"}, "BulkOperation": {"Add", "Get", "Delete"},
	"Uploads": {"Get", "Add", "Delete"}, "Runners": {"Get", "Add", "Delete"}, "RunnerItems": {"Get", "Add"},
	"Nodepools": {"Get", "Add", "Delete"}, "ComputeClusters": {"Get", "Add", "Delete"},
	"Deployments": {"Get", "Add", "Delete"}, "InstanceTypes": {"Get"}, "AuditLogs": {"Get"}, "LogEntries": {"Get"},
	"WorkflowVersionEvaluations": {"Get", "Add"}, "Pipelines": {"Get", "Add", "Delete"},
	"PipelineSteps": {"Get", "Add", "Pull", "Delete"}, "Secrets": {"Get", "Add", "Delete"}, "UserMetrics": {"Get"},
	"AnnotationTracks": {"Get", "Add", "Delete"}, "Artifacts": {"Get", "Add", "Delete"},
	"PipelineVersionRunStatusLogs": {"Get"},
	"Collectors":                   {"Add", "Get", "Delete"}, "Modules": {"Add", "Get", "Delete"},
	"InstalledModuleVersions": {"Add", "Get", "Delete"},
}

// sameScope gives the two spellings of a scope, Models:Get and Models_Get, one form.
func sameScope(scope string) string { return strings.Replace(scope, ":", "_", 1) }

func knownScope(scope string) bool {
	switch scope {
	case "All", "Predict", "Search":
		return true
	}
	resource, verb, ok := strings.Cut(sameScope(scope), "_")
	return ok && slices.Contains(scopeVerbs[resource], verb)
}

// missingScopes returns those of need that have does not cover.
func missingScopes(have, need []string) []string {
	granted := make(map[string]bool, len(have))
	for _, s := range have {
		granted[sameScope(s)] = true
	}
	if granted["All"] {
		return nil
	}
	var missing []string
	for _, s := range need {
		if !granted[s] {
			missing = append(missing, s)
		}
	}
	return missing
}
