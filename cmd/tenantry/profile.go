package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/tenantry/tenantry/api/client"
	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/tenant"
)

type profileCmd struct {
	Check profileCheckCmd `cmd:"" help:"Check a profiles file and print each fault with its line; exit code 1 if it cannot be used."`
	List  profileListCmd  `cmd:"" help:"List the profiles of a running service, and how many tenants are on which revision. Roles: all."`
	Apply profileApplyCmd `cmd:"" help:"Bring the tenants of a profile of a running service to its current revision, or list what that would change. Role: admin; for a dry run, viewer."`
}

type profileCheckCmd struct {
	databaseFlags
	File string `arg:"" help:"The file. If DATABASE_URL or --database-url-file is given too: whether it has every profile that tenants are on."`
}

func (c profileCheckCmd) Run(ctx context.Context, e env) error {
	file, err := readProfiles(c.File)
	if err != nil {
		return err
	}
	given := c.DatabaseURLFile != "" || strings.TrimSpace(e.get("DATABASE_URL")) != ""
	if given && len(file.Profiles) > 0 {
		db, err := c.open(ctx, e)
		if err != nil {
			return err
		}
		defer db.Close()
		missing, err := missingProfiles(ctx, db, file.Profiles)
		if err != nil {
			return err
		}
		for _, text := range missing {
			file.Faults = append(file.Faults, tenant.ProfileLine{Line: file.Line, Detail: text})
		}
	}
	for _, f := range file.Faults {
		if _, err := fmt.Fprintln(e.stdout, f.In(c.File)); err != nil {
			return err
		}
	}
	if file.Faulty() {
		return errReported
	}
	compared := "not compared with the tenants: no database is given"
	if given {
		compared = "every profile that tenants are on is there"
	}
	_, err = fmt.Fprintf(e.stderr, "%s can be used: profiles: %s; %s\n", c.File, strings.Join(namesOf(file.Profiles), ", "), compared)
	return err
}

func namesOf(profiles []tenant.Profile) []string {
	var names []string
	for _, p := range profiles {
		names = append(names, p.Name)
	}
	return names
}

// maxFile is more than any profiles file may have; it bounds what is read at all.
const maxFile = 2 << 20

func readProfiles(path string) (tenant.ProfilesFile, error) {
	info, err := os.Stat(path)
	if err == nil && info.Size() > maxFile {
		err = fmt.Errorf("%s has %d bytes, which is no profiles file", path, info.Size())
	}
	if err != nil {
		return tenant.ProfilesFile{}, err
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return tenant.ProfilesFile{}, err
	}
	return tenant.ParseProfiles(text), nil
}

// missingProfiles says of each profile that live tenants are on and that is not
// among profiles what is to be done.
func missingProfiles(ctx context.Context, db *postgres.DB, profiles []tenant.Profile) ([]string, error) {
	live, err := db.LiveProfiles(ctx)
	var texts []string
	for _, name := range provision.MissingProfiles(live, profiles) {
		texts = append(texts, fmt.Sprintf("there is no profile %q, and tenants are on it: put it back, or delete them first (GET /v1/tenants?profile=%s)", name, name))
	}
	return texts, err
}

type profileListCmd struct {
	apiFlags
	outputFlags
}

func (c profileListCmd) Run(ctx context.Context, e env) error {
	api, err := c.client(e)
	if err != nil {
		return err
	}
	got, err := answer[client.ProfileList](api.ListProfiles(ctx))
	if err != nil {
		return err
	}
	if c.json() {
		return printBody(e.stdout, got.body)
	}
	w := newTable(e.stdout, "NAME", "REVISION", "TENANTS", "WAITING", "ON OLDER REVISIONS", "WORKFLOW", "KEYS", "RETENTION", "KEY AGE", "POOL")
	for _, p := range got.value.Profiles {
		older := []string{}
		for _, o := range p.Tenants.Older {
			older = append(older, fmt.Sprintf("%d (%s)", o.Tenants, o.Revision))
		}
		keys := []string{tenant.DefaultKey}
		for _, k := range p.ExtraKeys {
			keys = append(keys, k.Name)
		}
		age := ""
		if p.MaxKeyAgeSeconds != nil {
			age = shownAge(*p.MaxKeyAgeSeconds)
		}
		w.row(p.Name, p.Revision, p.Tenants.Total, p.Tenants.Waiting, strings.Join(older, ", "), p.BaseWorkflow, strings.Join(keys, ", "),
			shownAge(p.RetentionSeconds), age, fmt.Sprintf("%d-%d", p.Pool.Min, p.Pool.Max))
	}
	return w.flush()
}

// shownAge writes a time as a profiles file has it.
func shownAge(seconds int) string {
	const day = 24 * 60 * 60
	if seconds > 0 && seconds%day == 0 {
		return fmt.Sprintf("%dd", seconds/day)
	}
	return (time.Duration(seconds) * time.Second).String()
}

type profileApplyCmd struct {
	campaignFlags
	watchFlag
	Name   string `arg:"" help:"The profile."`
	DryRun bool   `xor:"do" help:"Change nothing, and list what would change."`
	Yes    bool   `xor:"do" help:"Change it: without this flag nothing is changed either, and the command fails if something would be."`
}

func (c profileApplyCmd) Run(ctx context.Context, e env) error {
	api, err := c.client(e)
	if err != nil {
		return err
	}
	if !c.Yes {
		tenants, err := c.dryRun(ctx, e, api)
		if err == nil && tenants > 0 && !c.DryRun {
			err = usagef("nothing was changed: to change %d tenants, give --yes", tenants)
		}
		return err
	}
	began, err := api.ApplyProfileWithResponse(ctx, c.Name)
	if err != nil {
		return err
	}
	if began.JSON202 == nil {
		return problemOf(began.HTTPResponse, began.Body)
	}
	return c.follow(ctx, e, api, began.JSON202, c.Watch)
}

// dryRun lists what would change, and returns of how many tenants.
func (c profileApplyCmd) dryRun(ctx context.Context, e env, api *client.ClientWithResponses) (int, error) {
	all := []client.TenantChanges{}
	limit := 1000
	for cursor := (*string)(nil); ; {
		page, err := api.ListProfileChangesWithResponse(ctx, c.Name, &client.ListProfileChangesParams{Limit: &limit, Cursor: cursor})
		if err != nil {
			return 0, err
		}
		if page.JSON200 == nil {
			return 0, problemOf(page.HTTPResponse, page.Body)
		}
		all = append(all, page.JSON200.Tenants...)
		if cursor = page.JSON200.NextCursor; cursor == nil {
			break
		}
	}
	tenants := 0
	for _, t := range all {
		if t.Skipped == nil {
			tenants++
		}
	}
	if c.json() {
		return tenants, printJSON(e.stdout, all)
	}
	w := newTable(e.stdout, "TENANT", "APP", "WHAT", "KEY", "FROM", "TO")
	for _, t := range all {
		if t.Skipped != nil {
			w.row(t.TenantId, t.AppId, "skipped", "", "", *t.Skipped)
			continue
		}
		for _, change := range t.Changes {
			w.row(t.TenantId, t.AppId, change.What, textOr(change.KeyName, ""), textOr(change.From, ""), change.To)
		}
		if len(t.Changes) == 0 {
			w.row(t.TenantId, t.AppId, "revision", "", "", "")
		}
	}
	if err := w.flush(); err != nil {
		return tenants, err
	}
	_, err := fmt.Fprintf(e.stderr, "tenants that would change: %d, skipped: %d\n", tenants, len(all)-tenants)
	return tenants, err
}
