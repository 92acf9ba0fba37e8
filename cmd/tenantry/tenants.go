package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/tenantry/tenantry/api/client"
	"github.com/tenantry/tenantry/internal/tenant"
)

type tenantCmd struct {
	List    tenantListCmd    `cmd:"" help:"List tenants, oldest first. Roles: all."`
	Show    tenantShowCmd    `cmd:"" help:"Show a tenant: its app, its state, and what is wrong with it. Roles: all."`
	Create  tenantCreateCmd  `cmd:"" help:"Sign a tenant up, or find it: an app and a key of its own. Role: provisioner."`
	Update  tenantUpdateCmd  `cmd:"" help:"Change a tenant's display name, labels or deletion protection. Role: provisioner."`
	Suspend tenantSuspendCmd `cmd:"" help:"Revoke every key of a tenant; its app and data stay. Roles: provisioner, admin."`
	Resume  tenantResumeCmd  `cmd:"" help:"Make the keys of a suspended tenant anew. Roles: provisioner, admin."`
	Delete  tenantDeleteCmd  `cmd:"" help:"Revoke every key of a tenant now, and remove its app when its retention ends. Roles: provisioner, admin."`
	Restore tenantRestoreCmd `cmd:"" help:"Take a deletion back, as long as the app is there. Roles: provisioner, admin."`
	Retry   tenantRetryCmd   `cmd:"" help:"Try now what waits for its next attempt. Role: admin."`
}

// tenantFlags are those of every command about one tenant.
type tenantFlags struct {
	apiFlags
	outputFlags
	ID string `arg:"" name:"tenant" help:"The tenant's id."`
}

type tenantAnswer = answered[client.Tenant]

func (f tenantFlags) print(e env, a tenantAnswer) error {
	if f.json() {
		return printBody(e.stdout, a.body)
	}
	return printTenant(e, a.value)
}

func printTenant(e env, t client.Tenant) error {
	now := time.Now()
	w := newTable(e.stdout)
	w.row("tenant", t.Id)
	w.row("state", tenantState(t))
	if t.App != nil {
		w.row("app", t.App.Id+" of "+t.App.UserId)
	} else {
		w.row("app", "")
	}
	w.row("profile", t.Profile)
	w.row("display name", t.DisplayName)
	w.row("labels", shownLabels(tenant.Scope(t.Labels)))
	w.row("deletion protection", yesNo(t.DeletionProtection))
	w.row("generation", t.Generation)
	w.row("created", exactly(&t.CreatedAt, now))
	w.row("updated", exactly(&t.UpdatedAt, now))
	if t.Deletion != nil {
		w.row("app is removed", exactly(&t.Deletion.PurgeAfter, now))
	}
	if t.Problem != nil {
		w.row("problem", shownProblem(t.Problem, now))
	}
	return w.flush()
}

func yesNo(is bool) string {
	if is {
		return "yes"
	}
	return "no"
}

// tenantState is a tenant's state, with what its name does not say.
func tenantState(t client.Tenant) string {
	if t.Deletion != nil && t.Deletion.KeysRevoked && t.State == client.TenantState(tenant.Deleting) {
		return "deleting, and none of its keys works"
	}
	return string(t.State)
}

func shownProblem(p *client.Problem, now time.Time) string {
	text := p.Code + ": " + p.Detail
	if p.UpstreamCode != nil {
		text += fmt.Sprintf(" (Clarifai's code %d, request %s)", *p.UpstreamCode, textOr(p.UpstreamRequestId, "unknown"))
	}
	text += "; since " + exactly(&p.Since, now)
	if p.NextAttemptAt != nil {
		text += "; tried again " + ago(p.NextAttemptAt, now)
	}
	return text
}

func problemCode(p *client.Problem) string {
	if p == nil {
		return ""
	}
	return p.Code
}

type tenantListCmd struct {
	apiFlags
	outputFlags
	State   *string   `enum:"provisioning,active,suspending,suspended,resuming,deleting,purging,deleted" placeholder:"STATE" help:"Only tenants in this state: ${enum}."`
	Profile string    `placeholder:"NAME" help:"Only tenants of this profile."`
	Label   []string  `sep:"none" placeholder:"KEY=VALUE" help:"Only tenants that have this label; may be given several times: all of them."`
	Prefix  string    `placeholder:"TEXT" help:"Only tenants whose id begins so."`
	After   time.Time `placeholder:"TIME" format:"2006-01-02T15:04:05Z07:00" help:"Only tenants created from then on, such as 2026-01-31T12:00:00Z."`
	Before  time.Time `placeholder:"TIME" format:"2006-01-02T15:04:05Z07:00" help:"Only tenants created before then."`
	Problem *bool     `negatable:"" help:"Only tenants with a problem, or only those without."`
	Limit   int       `default:"100" help:"Most tenants to print; 0 means all."`
}

func (c tenantListCmd) Run(ctx context.Context, e env) error {
	api, err := c.client(e)
	if err != nil {
		return err
	}
	ask := client.ListTenantsParams{State: (*client.TenantState)(c.State), Profile: given(c.Profile), IdPrefix: given(c.Prefix),
		CreatedAfter: given(c.After), CreatedBefore: given(c.Before), Problem: c.Problem}
	if len(c.Label) > 0 {
		if _, err := parseLabels(c.Label); err != nil {
			return err
		}
		ask.Label = &c.Label
	}
	now := time.Now()
	heads := []string{"TENANT", "STATE", "PROFILE", "APP", "DISPLAY NAME", "LABELS", "CREATED", "PROBLEM"}
	return printList(e, c.outputFlags, c.Limit, "tenants", heads, func(size int, cursor *string) (*http.Response, error) {
		ask.Limit, ask.Cursor = &size, cursor
		return api.ListTenants(ctx, &ask)
	}, func(w *table, t client.Tenant) {
		app := ""
		if t.App != nil {
			app = t.App.Id
		}
		w.row(t.Id, t.State, t.Profile, app, t.DisplayName, shownLabels(tenant.Scope(t.Labels)), ago(&t.CreatedAt, now), problemCode(t.Problem))
	})
}

type tenantShowCmd struct{ tenantFlags }

func (c tenantShowCmd) Run(ctx context.Context, e env) error {
	api, err := c.client(e)
	if err != nil {
		return err
	}
	t, err := answer[client.Tenant](api.GetTenant(ctx, c.ID, nil))
	if err != nil {
		return err
	}
	return c.print(e, t)
}

// tenantChangeFlags are those of commands that change a tenant and wait.
type tenantChangeFlags struct {
	tenantFlags
	waitFlags
}

// change asks for a change and waits until the tenant is in one of the states.
func (f tenantChangeFlags) change(ctx context.Context, e env, ask func(api *client.ClientWithResponses) (*http.Response, error), states ...tenant.State) error {
	if err := f.check(); err != nil {
		return err
	}
	api, err := f.client(e)
	if err != nil {
		return err
	}
	first, err := answer[client.Tenant](ask(api))
	if err != nil {
		return err
	}
	settled := func(t client.Tenant) (bool, error) { return f.settled(t, states) }
	if !first.pending() { // it stays as it is, whatever that is
		settled = func(client.Tenant) (bool, error) { return true, nil }
	}
	return f.wait(ctx, e, api, first, settled)
}

// settled reports whether a tenant has come to one of the states. The error says that
// it has come to rest elsewhere: somebody else has changed it.
func (f tenantChangeFlags) settled(t client.Tenant, states []tenant.State) (bool, error) {
	state := tenant.State(t.State)
	if slices.Contains(states, state) {
		return state != tenant.Deleting || t.Deletion != nil && t.Deletion.KeysRevoked, nil
	}
	if state == tenant.Active || state == tenant.Suspended || state == tenant.Deleted {
		return false, refusedError{fmt.Errorf("tenant %s is %s: it was changed by another command meanwhile", t.Id, state)}
	}
	return false, nil
}

// wait follows a tenant and prints how it came out, also where it did not come out.
func (f tenantChangeFlags) wait(ctx context.Context, e env, api *client.ClientWithResponses, first tenantAnswer, settled func(client.Tenant) (bool, error)) error {
	last, err := follow(ctx, e, f.waitFlags, first, settled, func(t client.Tenant) string {
		text := fmt.Sprintf("tenant %s is still %s", t.Id, t.State)
		if t.Problem != nil {
			text += " (" + shownProblem(t.Problem, time.Now()) + ")"
		}
		return text
	}, func(seconds *int) (tenantAnswer, error) {
		return answer[client.Tenant](api.GetTenant(ctx, f.ID, &client.GetTenantParams{Wait: seconds}))
	})
	return errors.Join(f.print(e, last), err)
}

type tenantCreateCmd struct {
	tenantChangeFlags
	Profile     string   `placeholder:"NAME" help:"The profile to build it from. Without it: default."`
	DisplayName string   `placeholder:"TEXT" help:"A name for people."`
	Label       []string `sep:"none" placeholder:"KEY=VALUE" help:"A label; may be given several times."`
	Replace     bool     `help:"If the tenant of this id is being deleted, begin its next generation at once."`
}

func (c tenantCreateCmd) Run(ctx context.Context, e env) error {
	if err := c.check(); err != nil {
		return err
	}
	labels, err := parseLabels(c.Label)
	if err != nil {
		return err
	}
	api, err := c.client(e)
	if err != nil {
		return err
	}
	body := client.SignUp{Profile: given(c.Profile), DisplayName: given(c.DisplayName)}
	if labels != nil {
		body.Labels = (*client.Labels)(&labels)
	}
	ask := client.PutTenantParams{}
	if c.Replace {
		replace := client.PutTenantParamsOnDeleting("replace")
		ask.OnDeleting = &replace
	}
	put := func(prefer *string) (tenantAnswer, error) {
		ask.Prefer = prefer
		return answer[client.Tenant](api.PutTenant(ctx, c.ID, &ask, body))
	}
	first, err := put(c.prefer())
	if err != nil {
		return err
	}
	// The same PUT again, which finds the tenant: its answer has the key.
	last, err := follow(ctx, e, c.waitFlags, first, func(t client.Tenant) (bool, error) {
		return t.State != client.TenantState(tenant.Provisioning), nil
	}, func(t client.Tenant) string {
		text := fmt.Sprintf("tenant %s is signed up, and its app is still being built", t.Id)
		if t.Problem != nil {
			text += " (" + shownProblem(t.Problem, time.Now()) + ")"
		}
		return text
	}, func(seconds *int) (tenantAnswer, error) {
		prefer := fmt.Sprintf("wait=%d", *seconds)
		return put(&prefer)
	})
	if printed := c.print(e, last); printed != nil || err != nil {
		return errors.Join(printed, err)
	}
	if last.value.Credentials != nil && !c.json() {
		_, _ = fmt.Fprintf(e.stderr, "its key: tenantry key reveal %s %s\n", c.ID, last.value.Credentials.Name)
	}
	return nil
}

// parseLabels reads KEY=VALUE pairs; nil where there are none.
func parseLabels(pairs []string) (map[string]string, error) {
	var labels map[string]string
	for _, text := range pairs {
		key, value, ok := strings.Cut(text, "=")
		if !ok || key == "" {
			return nil, usagef("--label %q must read key=value", text)
		}
		if _, twice := labels[key]; twice {
			return nil, usagef("--label %s is given twice", key)
		}
		if labels == nil {
			labels = map[string]string{}
		}
		labels[key] = value
	}
	return labels, nil
}

type tenantUpdateCmd struct {
	tenantFlags
	DisplayName        *string  `placeholder:"TEXT" help:"The new name; \"\" takes it away."`
	Label              []string `sep:"none" placeholder:"KEY=VALUE" help:"Set this label; may be given several times."`
	RemoveLabel        []string `sep:"none" placeholder:"KEY" help:"Take this label away; may be given several times."`
	DeletionProtection *bool    `negatable:"" help:"Refuse to delete the tenant, or allow it."`
	Force              bool     `help:"Change it even if somebody else changes it at the same time."`
}

func (c tenantUpdateCmd) Run(ctx context.Context, e env) error {
	set, err := parseLabels(c.Label)
	if err != nil {
		return err
	}
	patch := client.TenantPatch{DisplayName: c.DisplayName, DeletionProtection: c.DeletionProtection}
	labels := map[string]*string{}
	for key, value := range set {
		labels[key] = &value
	}
	for _, key := range c.RemoveLabel {
		if _, both := labels[key]; both {
			return usagef("the label %s is both given and removed", key)
		}
		labels[key] = nil
	}
	if len(labels) > 0 {
		patch.Labels = &labels
	}
	if patch == (client.TenantPatch{}) {
		return usagef("there is nothing to change: give --display-name, --label, --remove-label or --[no-]deletion-protection")
	}
	api, err := c.client(e)
	if err != nil {
		return err
	}
	var ask client.PatchTenantParams
	if !c.Force {
		t, err := answer[client.Tenant](api.GetTenant(ctx, c.ID, nil))
		if err != nil {
			return err
		}
		ask.IfMatch = &t.etag
	}
	t, err := answer[client.Tenant](api.PatchTenant(ctx, c.ID, &ask, patch))
	if err != nil {
		return err
	}
	return c.print(e, t)
}

type tenantSuspendCmd struct{ tenantChangeFlags }

func (c tenantSuspendCmd) Run(ctx context.Context, e env) error {
	return c.change(ctx, e, func(api *client.ClientWithResponses) (*http.Response, error) {
		return api.SuspendTenant(ctx, c.ID, &client.SuspendTenantParams{Prefer: c.prefer()})
	}, tenant.Suspended)
}

type tenantResumeCmd struct{ tenantChangeFlags }

func (c tenantResumeCmd) Run(ctx context.Context, e env) error {
	return c.change(ctx, e, func(api *client.ClientWithResponses) (*http.Response, error) {
		return api.ResumeTenant(ctx, c.ID, &client.ResumeTenantParams{Prefer: c.prefer()})
	}, tenant.Active)
}

type tenantRestoreCmd struct{ tenantChangeFlags }

func (c tenantRestoreCmd) Run(ctx context.Context, e env) error {
	return c.change(ctx, e, func(api *client.ClientWithResponses) (*http.Response, error) {
		return api.RestoreTenant(ctx, c.ID, &client.RestoreTenantParams{Prefer: c.prefer()})
	}, tenant.Active)
}

type tenantDeleteCmd struct {
	tenantChangeFlags
	Purge bool `help:"Remove the app and all its data now, instead of when its retention ends. Asks first. Role: admin."`
	Yes   bool `help:"Purge without asking."`
}

func (c tenantDeleteCmd) Run(ctx context.Context, e env) error {
	ask, states := client.DeleteTenantParams{}, []tenant.State{tenant.Deleting, tenant.Purging, tenant.Deleted}
	if c.Purge {
		if err := e.confirm(c.Yes, fmt.Sprintf("the app of tenant %s is removed with all its data, and there is no way back", c.ID), c.ID); err != nil {
			return err
		}
		now := client.DeleteTenantParamsPurge("now")
		ask.Purge, states = &now, []tenant.State{tenant.Deleted}
	}
	return c.change(ctx, e, func(api *client.ClientWithResponses) (*http.Response, error) {
		ask.Prefer = c.prefer()
		return api.DeleteTenant(ctx, c.ID, &ask)
	}, states...)
}

type tenantRetryCmd struct{ tenantChangeFlags }

func (c tenantRetryCmd) Run(ctx context.Context, e env) error {
	if err := c.check(); err != nil {
		return err
	}
	api, err := c.client(e)
	if err != nil {
		return err
	}
	first, err := answer[client.Tenant](api.RetryTenant(ctx, c.ID))
	if err != nil {
		return err
	}
	return c.wait(ctx, e, api, first, func(t client.Tenant) (bool, error) {
		switch tenant.State(t.State) {
		case tenant.Active, tenant.Suspended, tenant.Deleted:
			return t.Problem == nil, nil
		case tenant.Deleting:
			return t.Problem == nil && t.Deletion != nil && t.Deletion.KeysRevoked, nil
		}
		return false, nil
	})
}

type appCmd struct {
	apiFlags
	outputFlags
	ID string `arg:"" name:"app" help:"The app's id at Clarifai."`
}

func (c appCmd) Run(ctx context.Context, e env) error {
	api, err := c.client(e)
	if err != nil {
		return err
	}
	t, err := answer[client.Tenant](api.GetAppTenant(ctx, c.ID, nil))
	if err != nil {
		return err
	}
	return tenantFlags{outputFlags: c.outputFlags}.print(e, t)
}

type poolCmd struct {
	apiFlags
	outputFlags
}

// mostRetired is how many retired apps of a profile the API counts.
const mostRetired = 1000

func (c poolCmd) Run(ctx context.Context, e env) error {
	api, err := c.client(e)
	if err != nil {
		return err
	}
	retired := false
	heads := []string{"PROFILE", "READY", "TARGET", "MIN", "MAX", "BUILDING", "OUTDATED", "RETIRED", "WAITING", "WHY NOT FULL"}
	err = printList(e, c.outputFlags, 0, "pools", heads, func(int, *string) (*http.Response, error) { return api.ListPools(ctx) }, func(w *table, p client.Pool) {
		why, old := "", fmt.Sprint(p.Retired)
		if p.Reason != nil {
			why = p.Reason.Code + ": " + p.Reason.Detail
		}
		if p.Retired >= mostRetired {
			old += " or more"
		}
		retired = retired || p.Retired > 0
		w.row(p.Profile, p.Ready, p.Target, p.Min, p.Max, p.Building, p.Outdated, old, p.WaitingTenants, why)
	})
	if retired && err == nil {
		_, _ = fmt.Fprintln(e.stderr, "retired: each start of Postgres retires the pool, and another pool is built; this is normal. Retired apps are never handed out, "+
			"and count against the account's quota: tenantry recover show --retired lists them")
	}
	return err
}

func since(text string, at *time.Time, now time.Time) string {
	if at == nil {
		return text
	}
	return text + ", since " + exactly(at, now)
}
