package provision

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"

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

// This replica counts tenants by their revision, which reads all of them (measured: 4 s
// for a million), at most once in countEvery, and no longer than maxCount.
const (
	countEvery = 15 * time.Second
	maxCount   = 5 * time.Minute
)

// seldom is how many times as long as it took what reads all tenants is not done again.
const seldom = 20

// A profileCount is a count of the tenants by revision, made at most once at a time
// and once in countEvery, or more seldom if it takes long.
type profileCount struct {
	flight singleflight.Group

	mu     sync.Mutex
	counts []tenant.RevisionCount // guarded by mu, as are the next two
	at     time.Time              // that they are of
	until  time.Time              // they serve
}

// ProfileUses returns every profile, by name, with how many tenants were on it at the
// time that it returns: 15 s ago, or seldom times as long as the count took, at most.
func (s *Service) ProfileUses(ctx context.Context) ([]ProfileUse, time.Time, error) {
	counts, at, err := s.countByRevision(ctx)
	if err != nil {
		return nil, at, err
	}
	uses := make([]ProfileUse, 0, len(s.Profiles))
	for _, p := range s.Profiles {
		u, revision := ProfileUse{Profile: p}, p.Revision()
		for _, c := range counts {
			switch {
			case c.Profile != p.Name:
			case c.Revision == "":
				u.Waiting = c.Tenants
			case c.Revision == revision:
				u.Current = c.Tenants
			default:
				u.Older = append(u.Older, c)
			}
		}
		slices.SortStableFunc(u.Older, func(a, b tenant.RevisionCount) int { return cmp.Compare(b.Tenants, a.Tenants) })
		uses = append(uses, u)
	}
	slices.SortFunc(uses, func(a, b ProfileUse) int { return strings.Compare(a.Name, b.Name) })
	return uses, at, nil
}

func (s *Service) countByRevision(ctx context.Context) ([]tenant.RevisionCount, time.Time, error) {
	c := &s.byRevision
	last := func() ([]tenant.RevisionCount, time.Time, bool) {
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.counts, c.at, time.Now().Before(c.until)
	}
	if counts, at, fresh := last(); fresh {
		return counts, at, nil
	}
	// For all who ask meanwhile: the first of them may go away.
	end := context.WithoutCancel(ctx)
	counted := c.flight.DoChan("", func() (any, error) {
		if _, _, fresh := last(); fresh {
			return nil, nil
		}
		end, cancel := context.WithTimeout(end, maxCount)
		defer cancel()
		at := time.Now()
		counts, err := s.Store.CountByRevision(end)
		if err == nil {
			c.mu.Lock()
			// From its end, so that a count that outlasts a request serves the next one.
			c.counts, c.at, c.until = counts, at, time.Now().Add(max(countEvery, seldom*time.Since(at)))
			c.mu.Unlock()
		}
		return nil, err
	})
	select {
	case <-ctx.Done():
		return nil, time.Time{}, ctx.Err()
	case r := <-counted:
		counts, at, _ := last()
		return counts, at, r.Err
	}
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
