package provision

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/tenantry/tenantry/internal/tenant"
)

// newApp is the app that a profile asks for.
func newApp(p tenant.Profile, marker tenant.Marker) tenant.NewApp {
	return tenant.NewApp{ID: marker.App, BaseWorkflow: p.BaseWorkflow, Language: p.Language, Description: p.Description(""), Marker: marker}
}

// descriptionOf is the description of a held app that shows its tenant, or "" if the
// profile shows nothing of it.
func (s *Service) descriptionOf(a tenant.App) string {
	p := s.profiles[a.Profile]
	switch p.ShowTenant {
	case tenant.ShowTenantID:
		return p.Description(string(a.Tenant))
	case tenant.ShowTenantHash:
		return p.Description(s.Keyring.TenantHash(a.Tenant))
	}
	return ""
}

// A ProfileUse is a profile and the tenants that are on it.
type ProfileUse struct {
	tenant.Profile
	Waiting int                    // tenants that have no app yet
	Current int                    // tenants whose app was made of this revision
	Older   []tenant.RevisionCount // and those of other revisions, the most tenants first
}

// ProfileUses returns every profile, by name, with the number of its tenants, and when they were counted.
func (s *Service) ProfileUses(ctx context.Context) ([]ProfileUse, time.Time, error) {
	at := time.Now()
	counts, err := s.Store.TenantCounts(ctx)
	if err != nil {
		return nil, at, err
	}
	uses := make([]ProfileUse, 0, len(s.Profiles))
	for _, p := range s.Profiles {
		u, revision := ProfileUse{Profile: p}, p.Revision()
		older := map[string]int{}
		for _, c := range counts {
			switch {
			case c.Profile != p.Name || c.State == tenant.Deleted:
			case c.Revision == "":
				u.Waiting += c.Tenants
			case c.Revision == revision:
				u.Current += c.Tenants
			default:
				older[c.Revision] += c.Tenants
			}
		}
		for r, n := range older {
			u.Older = append(u.Older, tenant.RevisionCount{Revision: r, Tenants: n})
		}
		slices.SortFunc(u.Older, func(a, b tenant.RevisionCount) int {
			return cmp.Or(cmp.Compare(b.Tenants, a.Tenants), strings.Compare(a.Revision, b.Revision))
		})
		uses = append(uses, u)
	}
	slices.SortFunc(uses, func(a, b ProfileUse) int { return strings.Compare(a.Name, b.Name) })
	return uses, at, nil
}

// checkProfiles reports every fault of the profiles: a list of *ConfigError.
func checkProfiles(profiles []tenant.Profile) []error {
	var faults []error
	seen := map[string]bool{}
	for _, p := range profiles {
		if seen[p.Name] {
			faults = append(faults, &ConfigError{Field: "Profiles", Detail: fmt.Sprintf("there are two profiles named %q", p.Name)})
		}
		seen[p.Name] = true
		for _, f := range p.Check() {
			if !f.Warning {
				faults = append(faults, &ConfigError{Field: f.Field, Detail: fmt.Sprintf("profile %q: %v", p.Name, f)})
			}
		}
	}
	if !seen[tenant.DefaultProfile] {
		faults = append(faults, &ConfigError{Field: "Profiles", Detail: fmt.Sprintf("there is no profile named %q", tenant.DefaultProfile)})
	}
	return faults
}

// MissingProfiles returns the names of live that no profile has.
func MissingProfiles(live []string, profiles []tenant.Profile) []string {
	var missing []string
	for _, name := range live {
		if !slices.ContainsFunc(profiles, func(p tenant.Profile) bool { return p.Name == name }) {
			missing = append(missing, name)
		}
	}
	return missing
}
