package tenant

import "maps"

// A Scope limits a caller to the tenants that have all of its labels, as where one
// Tenantry serves several products. The empty Scope is no limit.
type Scope map[string]string

// Limited reports whether s leaves any tenant out.
func (s Scope) Limited() bool { return len(s) > 0 }

// Covers reports whether a tenant that has labels is within s.
func (s Scope) Covers(labels map[string]string) bool {
	for k, v := range s {
		if got, ok := labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}

// ErrOutside is returned to a limited caller for a tenant outside its scope, and for one that does not
// exist.
var ErrOutside = Errorf(NotFound, "tenant_not_found", "there is no such tenant among those that the token is limited to")

// Complete returns labels with those of s.
func (s Scope) Complete(labels map[string]string) map[string]string {
	all := make(map[string]string, len(labels)+len(s))
	maps.Copy(all, labels)
	maps.Copy(all, s)
	return all
}

// CheckLabels reports Forbidden if a sign-up's labels contradict s. Those of s that
// are left out do not: Complete adds them.
func (s Scope) CheckLabels(labels map[string]string) error {
	for k, v := range labels {
		if want, ok := s[k]; ok && v != want {
			return s.forbidden(k)
		}
	}
	return nil
}

// CheckPatch reports Forbidden if a merge patch of the labels of a tenant within s
// would take the tenant out of it. A nil value removes a label, and a nil patch
// removes all.
func (s Scope) CheckPatch(patch map[string]*string) error {
	for k, want := range s {
		v, ok := patch[k]
		if patch == nil || ok && (v == nil || *v != want) {
			return s.forbidden(k)
		}
	}
	return nil
}

func (s Scope) forbidden(key string) error {
	return &Error{Kind: Forbidden, Code: "label_forbidden", Field: "labels." + key,
		Detail: "must be " + shown(s[key]) + ": the token is limited to tenants that have this label"}
}
