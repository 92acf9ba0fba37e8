package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/tenantry/tenantry/api/client"
)

type recoverCmd struct {
	Show     recoverShowCmd     `cmd:"" help:"Show recovery mode, the work that waits for its end, and the findings that wait for a decision, with the effect of each choice."`
	Begin    recoverBeginCmd    `cmd:"" help:"Begin recovery mode after a change that Tenantry cannot notice, such as a reverted machine or rows changed by hand. Retires the pools."`
	Decide   recoverDecideCmd   `cmd:"" help:"Decide a finding, or all findings of a kind, and wait until the decision is carried out. Exit code 1 if it fails, 3 if it is skipped."`
	Remove   recoverRemoveCmd   `cmd:"" help:"Remove retired apps: one by its id, or all that were begun before a date. Asks for the id, or for the number of apps."`
	TakeOver recoverTakeOverCmd `cmd:"" help:"Make this database the one in use, instead of the other database. Asks for the id of the deployment."`
	End      recoverEndCmd      `cmd:"" help:"End recovery mode. Waiting work continues. Asks for the id of the deployment while findings are undecided or no report is done."`
}

// recovery reads which incarnation of the database is in use, and its recovery mode.
func recovery(ctx context.Context, api *client.ClientWithResponses) (answered[client.Recovery], error) {
	return answer[client.Recovery](api.GetRecovery(ctx))
}

func printRecovery(e env, r client.Recovery) error {
	now := time.Now()
	w := newTable(e.stdout)
	w.row("recovery mode", since(string(r.State), r.Since, now))
	w.row("incarnation", fmt.Sprintf("%s, began %s", r.Incarnation, exactly(&r.BeganAt, now)))
	w.row("reason", textOr(&r.Reason, "first start"))
	if r.State != client.RecoveryStateNone {
		w.row("lost", textOr(r.Lost, "nothing known"))
		w.row("ends when", textOr(r.EndsWhen, ""))
		if r.WatchUntil != nil {
			w.row("watches until", exactly(r.WatchUntil, now))
		}
		w.row("waiting work", shownWaiting(r))
	}
	w.row("undecided findings", r.UndecidedFindings)
	seen := "not written yet"
	if r.ControlSeenAt != nil {
		seen = "seen " + ago(r.ControlSeenAt, now)
	}
	if r.ControlProblem != nil {
		seen += "; " + shownProblem(r.ControlProblem, now)
	}
	w.row("control record", r.ControlApp+", "+seen)
	w.row("retired apps", shownRetired(r.RetiredApps, now))
	w.row("deployment", r.Deployment)
	if r.State == client.RecoveryStateStopped {
		defer func() {
			_, _ = fmt.Fprintln(e.stderr, "if this database is a copy, stop this service, or run it with TENANTRY_READ_ONLY=true; see docs/recovery.md")
		}()
	}
	return w.flush()
}

func shownWaiting(r client.Recovery) string {
	return fmt.Sprintf("removals: %d, campaigns: %d, keys to be created: %d", r.Waiting.Removals, r.Waiting.Campaigns, r.Waiting.Keys)
}

func shownRetired(r client.RetiredCount, now time.Time) string {
	if r.Count == 0 {
		return "0"
	}
	return fmt.Sprintf("%d, the oldest begun or found %s", r.Count, ago(r.Oldest, now))
}

type recoverShowCmd struct {
	apiFlags
	outputFlags
	Kind    *string `enum:"app_unknown,app_forgotten,app_differs,app_gone,purge_contested,key_unknown,key_contested,key_gone,key_pending" placeholder:"KIND" help:"Only findings of this kind: ${enum}."`
	Retired bool    `help:"List the retired apps, newest first, instead of findings."`
	Limit   int     `default:"100" help:"Maximum number of findings or apps to print; 0 prints all."`
}

func (c recoverShowCmd) Run(ctx context.Context, e env) error {
	api, err := c.client(e)
	if err != nil {
		return err
	}
	is, err := recovery(ctx, api)
	if err != nil {
		return err
	}
	if !c.json() {
		if err := errors.Join(printRecovery(e, is.value), newline(e)); err != nil {
			return err
		}
	}
	if c.Retired {
		apps, more, err := listed(c.Limit, func(size int, cursor *string) ([]client.RetiredApp, *string, error) {
			page, err := answer[client.RetiredApps](api.ListRetiredApps(ctx, &client.ListRetiredAppsParams{Limit: &size, Cursor: cursor}))
			return page.value.Apps, page.value.NextCursor, err
		})
		if err != nil {
			return err
		}
		if c.json() {
			return printJSON(e.stdout, map[string]any{"recovery": json.RawMessage(is.body), "apps": apps})
		}
		return c.printApps(e, apps, more)
	}
	found, more, err := listed(c.Limit, func(size int, cursor *string) ([]client.RecoveryFinding, *string, error) {
		page, err := answer[client.RecoveryFindings](api.ListRecoveryFindings(ctx, &client.ListRecoveryFindingsParams{Limit: &size, Cursor: cursor, Kind: (*client.FindingKind)(c.Kind)}))
		return page.value.Findings, page.value.NextCursor, err
	})
	if err != nil {
		return err
	}
	if c.json() {
		return printJSON(e.stdout, map[string]any{"recovery": json.RawMessage(is.body), "findings": found})
	}
	missing, err := missingReport(ctx, api, is.value)
	if err != nil {
		return err
	}
	return c.printFindings(e, found, more, missing)
}

// missingReport says why findings may be missing; empty if a report of this recovery is done, or if
// the database is not in recovery mode.
func missingReport(ctx context.Context, api *client.ClientWithResponses, r client.Recovery) (string, error) {
	if r.State == client.RecoveryStateNone || r.ReportDone {
		return "", nil
	}
	if r.ReportId != nil {
		report, err := answer[client.Reconciliation](api.GetReconciliation(ctx, *r.ReportId, nil))
		if err != nil {
			return "", err
		}
		if report.value.State != client.ReconciliationStateDone {
			return fmt.Sprintf("the report is running, and more findings may follow (%s)", progressOf(&report.value)), nil
		}
	}
	return "no report is done since recovery mode began: it is not known yet what was lost", nil
}

func newline(e env) error { _, err := fmt.Fprintln(e.stdout); return err }

// listed reads up to limit items of a list of the API, 0 being all, and reports whether there are
// more.
func listed[T any](limit int, ask func(size int, cursor *string) ([]T, *string, error)) (items []T, more bool, err error) {
	if limit < 0 {
		return nil, false, usagef("--limit must not be negative")
	}
	items = []T{}
	for cursor := (*string)(nil); ; {
		size := pageSize
		if limit > 0 {
			size = min(size, limit-len(items))
		}
		var page []T
		if page, cursor, err = ask(size, cursor); err != nil {
			return nil, false, err
		}
		items = append(items, page...)
		if cursor == nil || limit > 0 && len(items) >= limit {
			return items, cursor != nil, nil
		}
	}
}

func (c recoverShowCmd) printApps(e env, apps []client.RetiredApp, more bool) error {
	now := time.Now()
	w := newTable(e.stdout, "APP", "PROFILE", "BEGUN OR FOUND", "KEY", "INPUTS")
	for _, a := range apps {
		w.row(a.Id, a.Profile, exactly(&a.CreatedAt, now), yesNo(a.HasKey), shownInputs(a.Inputs))
	}
	if err := w.flush(); err != nil {
		return err
	}
	if len(apps) > 0 {
		_, _ = fmt.Fprintln(e.stderr, "each start of Postgres retires the pool; this is normal. A retired app may belong to a lost tenant: it is never handed out, and the tenant gets it back by adoption with the app's key")
	}
	sayMore(e, more)
	return nil
}

func sayMore(e env, more bool) {
	if more {
		_, _ = fmt.Fprintln(e.stderr, "there are more: --limit 0 prints all")
	}
}

func shownInputs(n *int64) string {
	if n == nil {
		return "unknown"
	}
	return fmt.Sprint(*n)
}

// printFindings prints findings, and the choices of each of their kinds. Missing says why there may
// be more findings later; empty if the report is done.
func (c recoverShowCmd) printFindings(e env, found []client.RecoveryFinding, more bool, missing string) error {
	if err := printFound(e, found); err != nil {
		return err
	}
	sayMore(e, more)
	shown := map[client.FindingKind]bool{}
	w := newTable(e.stdout, "\nKIND", "CHOICE", "ASKS FOR", "EFFECT")
	for _, f := range found {
		if f.State != client.FindingStateOpen || shown[f.Kind] {
			continue
		}
		shown[f.Kind] = true
		for _, choice := range f.Choices {
			asks := ""
			if choice.Confirm != nil {
				asks = "the typed id"
			}
			w.row(f.Kind, choice.Choice, asks, choice.Effect)
		}
	}
	if err := w.flush(); err != nil {
		return err
	}
	switch {
	case missing != "":
		_, _ = fmt.Fprintln(e.stderr, missing)
	case len(found) == 0:
		_, _ = fmt.Fprintln(e.stderr, "no finding waits for a decision")
	case len(shown) > 0:
		_, _ = fmt.Fprintln(e.stderr, "to decide: tenantry recover decide NUMBER CHOICE")
	}
	return nil
}

func printFound(e env, found []client.RecoveryFinding) error {
	w := newTable(e.stdout, "NUMBER", "KIND", "STATE", "APP", "TENANT", "KEY", "DETAIL")
	for _, f := range found {
		key := ""
		if f.KeyId != nil {
			key = f.KeyId.String()
		}
		w.row(f.Number, f.Kind, shownState(f), textOr(f.AppId, ""), textOr(f.TenantId, ""), key, textOr(f.Note, textOr(f.Detail, "")))
	}
	return w.flush()
}

// shownState is the state of a finding, with what was decided.
func shownState(f client.RecoveryFinding) string {
	if f.State == client.FindingStateOpen || f.Action == nil {
		return string(f.State)
	}
	return fmt.Sprintf("%s (%s)", f.State, *f.Action)
}

type recoverBeginCmd struct {
	apiFlags
	outputFlags
	Reason string `required:"" placeholder:"TEXT" help:"Why the database is behind; kept in the audit log."`
}

func (c recoverBeginCmd) Run(ctx context.Context, e env) error {
	api, err := c.client(e)
	if err != nil {
		return err
	}
	return c.print(e)(answer[client.Recovery](api.BeginRecovery(ctx, client.RecoveryBegin{Reason: c.Reason})))
}

// print prints the recovery that a command returned.
func (o outputFlags) print(e env) func(answered[client.Recovery], error) error {
	return func(is answered[client.Recovery], err error) error {
		switch {
		case err != nil:
			return err
		case o.json():
			return printBody(e.stdout, is.body)
		}
		return printRecovery(e, is.value)
	}
}

type recoverEndCmd struct {
	apiFlags
	outputFlags
}

func (recoverEndCmd) Help() string {
	return `Recovery mode ends by itself after the report that leaves no finding undecided. This command ends it earlier: removals, campaigns, rotation by age and the creation of keys continue at once, for tenants that may have changed since the backup, too.

While findings are undecided, or no report is done, the command prints what waits, and asks for the id of the deployment, on a terminal or as a line of stdin.`
}

func (c recoverEndCmd) Run(ctx context.Context, e env) error {
	api, err := c.client(e)
	if err != nil {
		return err
	}
	is, err := recovery(ctx, api)
	if err != nil {
		return err
	}
	var body client.RecoveryEnd
	if r := is.value; r.State == client.RecoveryStateRecovering && (!r.ReportDone || r.UndecidedFindings > 0) {
		missing, err := missingReport(ctx, api, r)
		if err != nil {
			return err
		}
		w := newTable(e.stderr)
		w.row("report", cmp.Or(missing, "done"))
		w.row("undecided findings", r.UndecidedFindings)
		w.row("waiting work", shownWaiting(r))
		if err := w.flush(); err != nil {
			return err
		}
		typed, err := e.typed("the waiting work continues at once, and changes that were lost are not taken into account", r.Deployment)
		if err != nil {
			return err
		}
		body.Confirm = &typed
	}
	return c.print(e)(answer[client.Recovery](api.EndRecovery(ctx, body)))
}

type recoverTakeOverCmd struct {
	apiFlags
	outputFlags
}

func (recoverTakeOverCmd) Help() string {
	return `Asks for the id of the deployment, on a terminal or as a line of stdin.

Check first that the other database is the one to give up. If it is still in use, it stops within minutes. Changes that only the other database has acknowledged (sign-ups, suspensions, deletions) are missing in this database.`
}

func (c recoverTakeOverCmd) Run(ctx context.Context, e env) error {
	api, err := c.client(e)
	if err != nil {
		return err
	}
	is, err := recovery(ctx, api)
	if err != nil {
		return err
	}
	typed, err := e.typed("this database becomes the one in use, and the other database stops. Changes that only the other database has acknowledged are missing here", is.value.Deployment)
	if err != nil {
		return err
	}
	return c.print(e)(answer[client.Recovery](api.TakeOver(ctx, client.TakeOverRequest{Confirm: typed})))
}

type recoverRemoveCmd struct {
	apiFlags
	App    string `arg:"" optional:"" help:"The id of a retired app."`
	Before string `placeholder:"DATE" help:"All retired apps that were begun, or found by a report, before this date, such as 2026-01-31 (midnight UTC) or 2026-01-31T12:00:00Z."`
}

func (recoverRemoveCmd) Help() string {
	return `Asks for the id of the app, or with --before for the number of apps, on a terminal or as a line of stdin.

An app that is named by its id is removed whatever it contains. With --before, an app that has inputs, an ownership tag that names a tenant, or an unknown key stays retired: the log and the audit log say why.`
}

func (c recoverRemoveCmd) Run(ctx context.Context, e env) error {
	if (c.App == "") == (c.Before == "") {
		return usagef("give the id of a retired app, or --before, and not both")
	}
	body, question, word := client.RemovalRequest{AppId: given(c.App)}, fmt.Sprintf("the app %s is removed for good, with its data and all its keys. It may belong to a lost tenant", c.App), c.App
	api, err := c.client(e)
	if err != nil {
		return err
	}
	if c.Before != "" {
		at, err := parseDate(c.Before)
		if err != nil {
			return err
		}
		body.Before = &at
		count, err := c.preview(ctx, e, api, body)
		if err != nil || count == 0 {
			return err
		}
		question, word = "these apps are removed for good, except apps that turn out to be in use", strconv.Itoa(count)
	}
	typed, err := e.typed(question, word)
	if err != nil {
		return err
	}
	body.Confirm = &typed
	if _, err := answer[client.Removal](api.RemoveRetiredApps(ctx, body)); err != nil {
		return err
	}
	_, err = fmt.Fprintln(e.stderr, "the removal has begun, and continues in the background")
	return err
}

// parseDate reads a day, which begins at midnight UTC, or a time.
func parseDate(text string) (time.Time, error) {
	at, err := time.Parse(time.DateOnly, text)
	if err != nil {
		at, err = time.Parse(time.RFC3339, text)
	}
	if err != nil {
		return at, usagef("--before %q must be a date such as 2026-01-31, or a time such as 2026-01-31T12:00:00Z", text)
	}
	return at, nil
}

// preview prints what a removal would remove, and returns how many apps.
func (c recoverRemoveCmd) preview(ctx context.Context, e env, api *client.ClientWithResponses, body client.RemovalRequest) (int, error) {
	would, err := answer[client.Removal](api.RemoveRetiredApps(ctx, body))
	if err != nil {
		return 0, err
	}
	if would.value.Count == 0 {
		_, err := fmt.Fprintf(e.stderr, "no retired app was begun or found before %s\n", shownTime(*body.Before, ""))
		return 0, err
	}
	apps, _, err := listed(0, func(size int, cursor *string) ([]client.RetiredApp, *string, error) {
		page, err := answer[client.RetiredApps](api.ListRetiredApps(ctx, &client.ListRetiredAppsParams{Limit: &size, Cursor: cursor}))
		return page.value.Apps, page.value.NextCursor, err
	})
	if err != nil {
		return 0, err
	}
	var empty, full, unknown int
	for _, a := range apps {
		switch {
		case !a.CreatedAt.Before(*body.Before):
		case a.Inputs == nil:
			unknown++
		case *a.Inputs == 0:
			empty++
		default:
			full++
		}
	}
	now := time.Now()
	w := newTable(e.stdout)
	w.row("retired apps", would.value.Count)
	w.row("oldest begun or found", exactly(would.value.Oldest, now))
	w.row("newest begun or found", exactly(would.value.Newest, now))
	w.row("without inputs", empty)
	w.row("with inputs", fmt.Sprintf("%d (not removed)", full))
	w.row("inputs unknown", unknown)
	return would.value.Count, w.flush()
}

type recoverDecideCmd struct {
	apiFlags
	outputFlags
	waitFlags
	Kind    *string `enum:"app_unknown,app_forgotten,app_differs,app_gone,purge_contested,key_unknown,key_contested,key_gone,key_pending" placeholder:"KIND" help:"Decide all findings of this kind that wait for a decision, instead of one: ${enum}."`
	Finding string  `arg:"" help:"The number of the finding. With --kind, leave it out."`
	Choice  string  `arg:"" optional:"" help:"What to do: recover show lists the choices and their effects."`
}

func (recoverDecideCmd) Help() string {
	return `A worker checks Clarifai again before it carries out a decision. A choice that can do harm is allowed for one finding at a time, and asks for the id of the tenant or app, on a terminal or as a line of stdin.

  tenantry recover decide 17 keep                     # one finding
  tenantry recover decide --kind app_unknown adopt    # all of a kind`
}

func (c recoverDecideCmd) Run(ctx context.Context, e env) error {
	if err := c.check(); err != nil {
		return err
	}
	api, err := c.client(e)
	if err != nil {
		return err
	}
	if c.Kind != nil {
		if c.Choice != "" {
			return usagef("give the number of a finding, or --kind, and not both")
		}
		return c.decideKind(ctx, e, api, client.FindingKind(*c.Kind), client.DecisionChoice(c.Finding))
	}
	number, err := strconv.ParseInt(c.Finding, 10, 64)
	switch {
	case err != nil || number < 1:
		return usagef("%q is not the number of a finding: tenantry recover show lists them", c.Finding)
	case c.Choice == "":
		return usagef("the choice is missing: tenantry recover show lists the choices and their effects")
	}
	return c.decideOne(ctx, e, api, number, client.DecisionChoice(c.Choice))
}

func (c recoverDecideCmd) decideOne(ctx context.Context, e env, api *client.ClientWithResponses, number int64, choice client.DecisionChoice) error {
	found, err := answer[client.RecoveryFinding](api.GetRecoveryFinding(ctx, number))
	if err != nil {
		return err
	}
	i := slices.IndexFunc(found.value.Choices, func(is client.Choice) bool { return is.Choice == choice })
	if i < 0 {
		var names []string
		for _, is := range found.value.Choices {
			names = append(names, string(is.Choice))
		}
		return usagef("%q is not a choice for %s; the choices are: %s", choice, found.value.Kind, textOr(given(strings.Join(names, ", ")), "none"))
	}
	body := client.DecisionRequest{Finding: &number, Choice: choice}
	if word := found.value.Choices[i].Confirm; word != nil {
		typed, err := e.typed(fmt.Sprintf("%s of the app %s: %s", found.value.Kind, textOr(found.value.AppId, "-"), strings.TrimSuffix(found.value.Choices[i].Effect, ".")), *word)
		if err != nil {
			return err
		}
		body.Confirm = &typed
	}
	if _, err := answer[client.Decided](api.Decide(ctx, body)); err != nil {
		return err
	}
	look := func(*int) (answered[client.RecoveryFinding], error) {
		return answer[client.RecoveryFinding](api.GetRecoveryFinding(ctx, number))
	}
	first, err := look(nil)
	if err != nil {
		return err
	}
	last, err := follow(ctx, e, c.waitFlags, first, func(f client.RecoveryFinding) (bool, error) {
		return f.State != client.FindingStateDecided, nil
	}, func(client.RecoveryFinding) string {
		return fmt.Sprintf("finding %d is decided, and not carried out yet", number)
	}, look)
	if c.json() {
		return errors.Join(printBody(e.stdout, last.body), err, outcomeOf(last.value.State))
	}
	return errors.Join(printFound(e, []client.RecoveryFinding{last.value}), err, outcomeOf(last.value.State))
}

// outcomeOf returns the error of a command whose finding ended in state. The output has said why.
func outcomeOf(state client.FindingState) error {
	switch state {
	case client.FindingStateFailed:
		return errReported
	case client.FindingStateSkipped:
		return errDiffers
	}
	return nil
}

func (c recoverDecideCmd) decideKind(ctx context.Context, e env, api *client.ClientWithResponses, kind client.FindingKind, choice client.DecisionChoice) error {
	is, err := recovery(ctx, api)
	if err != nil {
		return err
	}
	decided, err := answer[client.Decided](api.Decide(ctx, client.DecisionRequest{Kind: &kind, Choice: choice}))
	if err != nil {
		return err
	}
	items := []client.Finding{}
	if decided.value.Decided > 0 && is.value.ReportId != nil {
		if items, err = c.carriedOut(ctx, e, api, *is.value.ReportId); err != nil {
			return err
		}
		items = slices.DeleteFunc(items, func(f client.Finding) bool {
			return f.Kind != kind || f.Action == nil || string(*f.Action) != string(choice)
		})
	}
	counts := map[client.FindingState]int{}
	w := newTable(e.stdout, "STATE", "APP", "TENANT", "KEY", "WHY")
	for _, f := range items {
		if counts[f.State]++; f.State == client.FindingStateDone || c.json() {
			continue
		}
		key := ""
		if f.KeyId != nil {
			key = f.KeyId.String()
		}
		w.row(f.State, textOr(f.AppId, ""), textOr(f.TenantId, ""), key, textOr(f.Note, ""))
	}
	if err = w.flush(); c.json() {
		err = printJSON(e.stdout, items)
	}
	_, _ = fmt.Fprintf(e.stderr, "decided now: %d; of the findings %s with the choice %s, done: %d, skipped: %d, failed: %d, not carried out yet: %d\n",
		decided.value.Decided, kind, choice, counts[client.FindingStateDone], counts[client.FindingStateSkipped], counts[client.FindingStateFailed], counts[client.FindingStateDecided])
	switch {
	case err != nil:
		return err
	case counts[client.FindingStateFailed] > 0:
		return errReported
	case counts[client.FindingStateSkipped] > 0:
		return errDiffers
	}
	return nil
}

// carriedOut waits until all decisions about a report are carried out, and returns the findings of
// that report. A newer report begins then, and its list would not have these findings.
func (c recoverDecideCmd) carriedOut(ctx context.Context, e env, api *client.ClientWithResponses, report uuid.UUID) ([]client.Finding, error) {
	look := func(*int) (answered[client.Reconciliation], error) {
		one := 1
		return answer[client.Reconciliation](api.GetReconciliation(ctx, report, &client.GetReconciliationParams{Limit: &one}))
	}
	first, err := look(nil)
	if err != nil {
		return nil, err
	}
	if _, err := follow(ctx, e, c.waitFlags, first, func(r client.Reconciliation) (bool, error) {
		return r.Outcomes["decided"] == 0, nil
	}, func(r client.Reconciliation) string {
		return fmt.Sprintf("%d decisions are not carried out yet", r.Outcomes["decided"])
	}, look); err != nil {
		return nil, err
	}
	r := reconciler{api: api, e: e}
	rec, err := r.get(ctx, report, nil)
	if err != nil {
		return nil, err
	}
	return r.items(ctx, rec)
}
