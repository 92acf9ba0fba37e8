package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/tenantry/tenantry/api/client"
)

type reconcileCmd struct {
	apiFlags
	outputFlags
	Repair string `placeholder:"TOKEN" help:"Carry out the report with this token. Each item is checked again first. Items that wait for a decision are not touched (see recover show). Not allowed in recovery mode."`
	JSON   bool   `name:"json" hidden:"" help:"The same as --output json."`
}

func (c reconcileCmd) Run(ctx context.Context, e env) error {
	api, err := c.client(e)
	if err != nil {
		return err
	}
	r := reconciler{api: api, e: e}
	done, err := r.run(ctx, client.ReconciliationRequest{Repair: given(c.Repair)})
	if err != nil {
		return err
	}
	items, err := r.items(ctx, done)
	if err != nil {
		return err
	}
	if c.JSON || c.json() {
		done.Items, done.NextCursor = &items, nil
		err = printJSON(e.stdout, done)
	} else {
		err = r.print(ctx, done, items)
	}
	if err == nil && differs(items) {
		err = errDiffers
	}
	return err
}

// differs reports whether a finding is left that asks for an act, of a repair or
// of a person.
func differs(items []client.Finding) bool {
	return slices.ContainsFunc(items, func(f client.Finding) bool {
		return (f.State == client.FindingStateOpen || f.State == client.FindingStateFailed) && f.Kind != client.KeyUnmanaged
	})
}

// A reconciler follows reconciliations over the API.
type reconciler struct {
	api *client.ClientWithResponses
	e   env
}

func (r reconciler) say(format string, args ...any) {
	_, _ = fmt.Fprintf(r.e.stderr, format+"\n", args...)
}

// run starts a reconciliation and waits for its end.
func (r reconciler) run(ctx context.Context, req client.ReconciliationRequest) (*client.Reconciliation, error) {
	began, err := r.api.StartReconciliationWithResponse(ctx, req)
	if err != nil {
		return nil, err
	}
	rec := began.JSON202
	switch {
	case rec != nil:
		r.say("%s %s has begun", rec.Kind, rec.Id)
	case req.Repair == nil && began.ApplicationproblemJSON409 != nil:
		// A report begins by itself daily, and in recovery mode.
		if rec, err = r.running(ctx); err != nil {
			return nil, err
		}
	}
	if rec == nil {
		return nil, problemOf(began.HTTPResponse, began.Body)
	}
	shown := ""
	bar := r.e.progress()
	defer bar.end()
	for rec.State != client.ReconciliationStateDone {
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%s %s goes on without this command", rec.Kind, rec.Id)
		case <-time.After(pollPause):
		}
		// The service may be restarting, and the work goes on elsewhere.
		next, err := r.get(ctx, rec.Id, nil)
		if err != nil && !passing(err) && ctx.Err() == nil {
			return nil, err
		}
		line := "the service does not answer; waiting"
		if err == nil {
			rec, line = next, progressOf(next)
		}
		switch done, total := repaired(rec); {
		case bar.visible():
			bar.show(done, total, line)
		case line != shown:
			r.say("  %s", line)
			shown = line
		}
	}
	return rec, nil
}

// repaired is how many items of a repair have an outcome, and how many there are; a
// report does not know how many it will see.
func repaired(rec *client.Reconciliation) (done, total int) {
	if rec.Kind != client.ReconciliationKindRepair {
		return 0, 0
	}
	for _, n := range rec.Outcomes {
		total += n
	}
	return total - rec.Outcomes["open"], total
}

// running returns the report that runs already, or nil.
func (r reconciler) running(ctx context.Context) (*client.Reconciliation, error) {
	limit := 1
	list, err := r.api.ListReconciliationsWithResponse(ctx, &client.ListReconciliationsParams{Limit: &limit})
	if err != nil {
		return nil, err
	}
	if list.JSON200 == nil {
		return nil, problemOf(list.HTTPResponse, list.Body)
	}
	for _, rec := range list.JSON200.Reconciliations {
		if rec.Kind == client.ReconciliationKindReport {
			r.say("%s %s runs already, and is followed", rec.Kind, rec.Id)
			return r.get(ctx, rec.Id, nil)
		}
	}
	return nil, nil
}

func progressOf(rec *client.Reconciliation) string {
	text := fmt.Sprintf("%s: %d apps, %d keys seen", rec.Phase, rec.Progress.AppsSeen, rec.Progress.KeysSeen)
	if rec.Kind == client.ReconciliationKindRepair {
		text = fmt.Sprintf("%s: %d open, %d done, %d skipped, %d failed", rec.Phase,
			rec.Outcomes["open"], rec.Outcomes["done"], rec.Outcomes["skipped"], rec.Outcomes["failed"])
	}
	if rec.Problem != nil && rec.State != client.ReconciliationStateDone {
		text += "; waits: " + rec.Problem.Detail
	}
	return text
}

func (r reconciler) get(ctx context.Context, id uuid.UUID, cursor *string) (*client.Reconciliation, error) {
	limit := 1000
	got, err := r.api.GetReconciliationWithResponse(ctx, id, &client.GetReconciliationParams{Limit: &limit, Cursor: cursor})
	if err != nil {
		return nil, err
	}
	if got.JSON200 == nil {
		return nil, problemOf(got.HTTPResponse, got.Body)
	}
	return got.JSON200, nil
}

func (r reconciler) items(ctx context.Context, rec *client.Reconciliation) ([]client.Finding, error) {
	var items []client.Finding
	for {
		if rec.Items != nil {
			items = append(items, *rec.Items...)
		}
		if rec.NextCursor == nil {
			return items, nil
		}
		var err error
		if rec, err = r.get(ctx, rec.Id, rec.NextCursor); err != nil {
			return nil, err
		}
	}
}

func (r reconciler) print(ctx context.Context, rec *client.Reconciliation, items []client.Finding) error {
	w := newTable(r.e.stdout, "FOUND", "REPAIR", "STATE", "APP", "KEY", "TENANT", "DETAIL")
	actions, undecided := 0, 0
	for _, f := range items {
		action, key := "by hand", ""
		if f.Action != nil {
			action = string(*f.Action)
			switch {
			case f.State != client.FindingStateOpen:
			case *f.Action == client.FindingActionDecide:
				undecided++
			default:
				actions++
			}
		}
		if f.KeyId != nil {
			key = f.KeyId.String()
		}
		w.row(f.Kind, action, f.State, textOr(f.AppId, ""), key, textOr(f.TenantId, ""), cmp.Or(textOr(f.Note, ""), textOr(f.Detail, "")))
	}
	if err := w.flush(); err != nil {
		return err
	}
	if rec.Kind != client.ReconciliationKindReport {
		return nil
	}
	r.say("apps seen: %d, keys seen: %d, apps that are not Tenantry's: %d, differences: %d",
		rec.Progress.AppsSeen, rec.Progress.KeysSeen, rec.Counts["app_foreign"], len(items))
	if undecided > 0 {
		r.say("%d of them wait for a decision: tenantry recover show lists the choices", undecided)
	}
	if actions == 0 {
		return nil
	}
	up, err := answer[client.Upstream](r.api.GetUpstream(ctx))
	switch {
	case err != nil:
		return err
	case up.value.Recovery != nil:
		r.say("%d of them can be repaired once recovery mode has ended", actions)
	default:
		r.say("to repair %d of them: tenantry reconcile --repair %s", actions, *rec.Token)
	}
	return nil
}
