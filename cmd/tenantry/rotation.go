package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/tenantry/tenantry/api/client"
)

type rotationCmd struct {
	Start  rotationStartCmd  `cmd:"" help:"Begin to rotate the keys that the filters select, or count them with --dry-run. Role: admin."`
	List   rotationListCmd   `cmd:"" help:"List campaigns, newest first: rotations, and profiles being applied. Roles: admin, viewer."`
	Show   rotationShowCmd   `cmd:"" help:"Show how a campaign stands, and what of it is under way, was skipped and has failed. Roles: admin, viewer."`
	Pause  rotationPauseCmd  `cmd:"" help:"Let a campaign begin nothing more until it is resumed. Role: admin."`
	Resume rotationResumeCmd `cmd:"" help:"Let a campaign that is paused go on. Role: admin."`
	Stop   rotationStopCmd   `cmd:"" help:"Let a campaign begin nothing more, for good. What has begun is finished. Role: admin."`
}

// campaignFlags are those of every command about campaigns.
type campaignFlags struct {
	apiFlags
	outputFlags
}

type watchFlag struct {
	Watch bool `help:"Show the progress until it has ended. Exit code 3 if something was skipped or has failed."`
}

type rotationStartCmd struct {
	campaignFlags
	watchFlag
	Profile   string   `placeholder:"NAME" help:"Only keys of tenants of this profile."`
	Label     []string `sep:"none" placeholder:"KEY=VALUE" help:"Only keys of tenants that have this label; may be given several times: all of them."`
	KeyName   string   `placeholder:"NAME" help:"Only keys of this name."`
	OlderThan string   `placeholder:"AGE" help:"Only keys that are older, such as 90d."`
	All       bool     `help:"Every key of every tenant."`
	Overlap   string   `default:"24h" help:"How long the old secrets work on, at most 30d; 0s revokes each as soon as the new one works."`
	DryRun    bool     `help:"Change nothing, and print how many keys would be rotated."`
}

func (c rotationStartCmd) Run(ctx context.Context, e env) error {
	api, err := c.client(e)
	if err != nil {
		return err
	}
	body := client.RotationsRequest{Profile: given(c.Profile), KeyName: given(c.KeyName), All: given(c.All), DryRun: given(c.DryRun)}
	labels, err := parseLabels(c.Label)
	if err != nil {
		return err
	}
	if labels != nil {
		body.Labels = (*client.Labels)(&labels)
	}
	if body.Overlap, err = duration(c.Overlap); err != nil {
		return err
	}
	if c.OlderThan != "" {
		if body.OlderThan, err = duration(c.OlderThan); err != nil {
			return err
		}
	}
	began, err := api.StartRotationsWithResponse(ctx, body)
	switch {
	case err != nil:
		return err
	case began.JSON200 != nil && c.json():
		return printJSON(e.stdout, began.JSON200)
	case began.JSON200 != nil:
		_, err := fmt.Fprintf(e.stdout, "keys that would be rotated: %d\n", began.JSON200.Keys)
		return err
	case began.JSON202 == nil:
		return problemOf(began.HTTPResponse, began.Body)
	}
	return c.follow(ctx, e, api, began.JSON202, c.Watch)
}

func duration(text string) (*client.Duration, error) {
	var d client.Duration
	err := d.FromDuration1(text)
	return &d, err
}

// follow prints a campaign, once it has ended if watched.
func (f campaignFlags) follow(ctx context.Context, e env, api *client.ClientWithResponses, c *client.Campaign, watch bool) error {
	if !watch {
		return f.print(e, c, nil)
	}
	bar, shown := e.progress(), ""
	defer bar.end()
	for c.EndedAt == nil {
		select {
		case <-ctx.Done():
			return fmt.Errorf("the campaign %s goes on without this command", c.Id)
		case <-time.After(500 * time.Millisecond):
		}
		// The service may be restarting, and the work goes on elsewhere.
		next, _, err := campaign(ctx, api, c.Id, 1)
		if p, ok := errors.AsType[*apiProblem](err); ok && p.status < 500 && p.status != http.StatusTooManyRequests {
			return err
		}
		line := "the service does not answer; waiting"
		if err == nil {
			c, line = next, campaignLine(next)
		}
		switch total := c.Counts.Total; {
		case bar.visible() && total != nil:
			bar.show(c.Counts.Done+c.Counts.Skipped+c.Counts.Failed, *total, line)
		case bar.visible():
			bar.show(0, 0, line)
		case line != shown:
			_, _ = fmt.Fprintln(e.stderr, line)
			shown = line
		}
	}
	bar.end()
	c, items, err := campaign(ctx, api, c.Id, 0)
	if err != nil {
		return err
	}
	if err := f.print(e, c, items); err != nil {
		return err
	}
	if c.Counts.Skipped+c.Counts.Failed > 0 {
		return errDiffers
	}
	return nil
}

// campaign reads a campaign with up to most items; 0 means all.
func campaign(ctx context.Context, api *client.ClientWithResponses, id uuid.UUID, most int) (*client.Campaign, []client.CampaignItem, error) {
	limit := 1000
	if most > 0 {
		limit = min(limit, most)
	}
	items := []client.CampaignItem{}
	for cursor := (*string)(nil); ; {
		got, err := api.GetCampaignWithResponse(ctx, id, &client.GetCampaignParams{Limit: &limit, Cursor: cursor})
		if err != nil {
			return nil, nil, err
		}
		if got.JSON200 == nil {
			return nil, nil, problemOf(got.HTTPResponse, got.Body)
		}
		if got.JSON200.Items != nil {
			items = append(items, *got.JSON200.Items...)
		}
		if cursor = got.JSON200.NextCursor; cursor == nil || most > 0 && len(items) >= most {
			return got.JSON200, items, nil
		}
	}
}

func campaignLine(c *client.Campaign) string {
	text := fmt.Sprintf("%s: %d of %s done, %d under way, %d skipped, %d failed", c.State, c.Counts.Done, campaignTotal(c), c.Counts.UnderWay, c.Counts.Skipped, c.Counts.Failed)
	if c.EtaSeconds != nil && *c.EtaSeconds > 0 {
		text += ", about " + (time.Duration(*c.EtaSeconds) * time.Second).String() + " to go"
	}
	if c.Problem != nil {
		text += "; waits: " + c.Problem.Detail
	}
	return text
}

func campaignTotal(c *client.Campaign) string {
	if c.Counts.Total == nil {
		return "?"
	}
	return fmt.Sprint(*c.Counts.Total)
}

func (f campaignFlags) print(e env, c *client.Campaign, items []client.CampaignItem) error {
	if f.json() {
		c.NextCursor = nil
		if len(items) > 0 {
			c.Items = &items
		}
		return printJSON(e.stdout, c)
	}
	if err := printCampaigns(e.stdout, []client.Campaign{*c}); err != nil || len(items) == 0 {
		return err
	}
	_, _ = fmt.Fprintln(e.stdout)
	w := newTable(e.stdout, "TENANT", "APP", "KEY", "STATE", "PROBLEM")
	for _, i := range items {
		problem := ""
		if i.Problem != nil {
			problem = i.Problem.Code + ": " + i.Problem.Detail
		}
		w.row(i.TenantId, i.AppId, textOr(i.KeyName, ""), i.State, problem)
	}
	return w.flush()
}

func printCampaigns(to io.Writer, campaigns []client.Campaign) error {
	w := newTable(to, "ID", "KIND", "STATE", "OF", "TOTAL", "DONE", "UNDER WAY", "SKIPPED", "FAILED", "ETA", "BEGUN", "BY")
	for _, c := range campaigns {
		eta := ""
		if c.EtaSeconds != nil {
			eta = (time.Duration(*c.EtaSeconds) * time.Second).String()
		}
		w.row(c.Id, c.Kind, c.State, shownFilter(c.Filter), campaignTotal(&c), c.Counts.Done, c.Counts.UnderWay, c.Counts.Skipped,
			c.Counts.Failed, eta, ago(&c.CreatedAt, time.Now()), c.CreatedBy)
	}
	return w.flush()
}

func shownFilter(f client.KeyFilter) string {
	var parts []string
	add := func(name string, text *string) {
		if text != nil {
			parts = append(parts, name+"="+*text)
		}
	}
	add("profile", f.Profile)
	add("key", f.KeyName)
	if f.OlderThanSeconds != nil {
		parts = append(parts, "older than "+shownAge(*f.OlderThanSeconds))
	}
	if f.Labels != nil {
		for k, v := range *f.Labels {
			parts = append(parts, k+"="+v)
		}
	}
	if len(parts) == 0 {
		return "all"
	}
	slices.Sort(parts)
	return strings.Join(parts, ", ")
}

type rotationListCmd struct {
	campaignFlags
	Limit int `default:"20" help:"Most campaigns to print, from 1 to 1000."`
}

func (c rotationListCmd) Run(ctx context.Context, e env) error {
	api, err := c.client(e)
	if err != nil {
		return err
	}
	got, err := api.ListCampaignsWithResponse(ctx, &client.ListCampaignsParams{Limit: &c.Limit})
	switch {
	case err != nil:
		return err
	case got.JSON200 == nil:
		return problemOf(got.HTTPResponse, got.Body)
	case c.json():
		return printJSON(e.stdout, got.JSON200.Campaigns)
	}
	return printCampaigns(e.stdout, got.JSON200.Campaigns)
}

// campaignArg names a campaign.
type campaignArg struct {
	ID uuid.UUID `arg:"" help:"The campaign's id."`
}

type rotationShowCmd struct {
	campaignFlags
	watchFlag
	campaignArg
}

func (c rotationShowCmd) Run(ctx context.Context, e env) error {
	api, err := c.client(e)
	if err != nil {
		return err
	}
	is, items, err := campaign(ctx, api, c.ID, 0)
	if err != nil {
		return err
	}
	if c.Watch {
		return c.follow(ctx, e, api, is, true)
	}
	return c.print(e, is, items)
}

type rotationPauseCmd struct {
	campaignFlags
	campaignArg
}

func (c rotationPauseCmd) Run(ctx context.Context, e env) error {
	api, err := c.client(e)
	if err != nil {
		return err
	}
	got, err := api.PauseCampaignWithResponse(ctx, c.ID)
	if err != nil {
		return err
	}
	return c.printChanged(e, got.JSON200, got.HTTPResponse, got.Body)
}

type rotationResumeCmd struct {
	campaignFlags
	campaignArg
}

func (c rotationResumeCmd) Run(ctx context.Context, e env) error {
	api, err := c.client(e)
	if err != nil {
		return err
	}
	got, err := api.ResumeCampaignWithResponse(ctx, c.ID)
	if err != nil {
		return err
	}
	return c.printChanged(e, got.JSON200, got.HTTPResponse, got.Body)
}

type rotationStopCmd struct {
	campaignFlags
	campaignArg
}

func (c rotationStopCmd) Run(ctx context.Context, e env) error {
	api, err := c.client(e)
	if err != nil {
		return err
	}
	got, err := api.StopCampaignWithResponse(ctx, c.ID)
	if err != nil {
		return err
	}
	return c.printChanged(e, got.JSON200, got.HTTPResponse, got.Body)
}

// printChanged prints a campaign, or returns why it was not changed.
func (f campaignFlags) printChanged(e env, c *client.Campaign, resp *http.Response, body []byte) error {
	if c == nil {
		return problemOf(resp, body)
	}
	return f.print(e, c, nil)
}
