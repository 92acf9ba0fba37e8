package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/tenantry/tenantry/api/client"
	"github.com/tenantry/tenantry/internal/tenant"
)

type adoptCmd struct {
	apiFlags
	outputFlags
	File        string        `arg:"" help:"CSV with the header tenant_id,app_id[,user_id][,key][,profile][,display_name], or a JSON object of these fields in each line."`
	DryRun      bool          `xor:"do" help:"Make all checks and change nothing, as without --yes."`
	Yes         bool          `xor:"do" help:"Really do it."`
	Format      string        `default:"auto" enum:"auto,csv,ndjson" help:"csv or ndjson; auto goes by the name: .csv, or .ndjson, .jsonl and .json."`
	Profile     string        `placeholder:"PROFILE" help:"Of the lines that name none. Without it: default."`
	Concurrency int           `default:"8" help:"Lines at once, 1 to 64."`
	Timeout     time.Duration `default:"5m" help:"How long to wait for one line. The service goes on with it; the same file can be given again."`
}

// maxAdoptFile is more than any file of apps has; it bounds what is read at all.
const maxAdoptFile = 256 << 20

// How a line can end.
const (
	adoptDone     = "done"
	adoptWas      = "unchanged" // it was done before
	adoptPossible = "possible"
	adoptFailed   = "failed"
	adoptUnderWay = "under_way"
	adoptUntried  = "not_started"
)

// An adoptEnd is how a line ended.
type adoptEnd struct {
	Line   int          `json:"line"`
	ID     tenant.ID    `json:"tenant_id,omitempty"`
	AppID  tenant.AppID `json:"app_id,omitempty"`
	State  string       `json:"state"`
	Code   string       `json:"code,omitempty"`
	Detail string       `json:"detail,omitempty"`
}

func (c adoptCmd) Run(ctx context.Context, e env) error {
	if c.Concurrency < 1 || c.Concurrency > 64 {
		return usagef("--concurrency must be from 1 to 64")
	}
	if c.Timeout <= 0 {
		return usagef("--timeout must be more than 0s")
	}
	rows, err := c.read()
	if err != nil {
		return fmt.Errorf("%s: %w", c.File, err)
	}
	if twice := duplicatesIn(rows); len(twice) > 0 {
		return fmt.Errorf("%s: nothing was begun, for it is not clear what is meant:\n%s", c.File, strings.Join(twice, "\n"))
	}
	api, err := c.client(e)
	if err != nil {
		return err
	}
	ends, err := c.adoptAll(ctx, api, rows, e.progress())
	if err != nil {
		return err
	}
	return c.report(e, ends)
}

func (c adoptCmd) read() ([]adoptRow, error) {
	format := c.Format
	if format == "auto" {
		switch strings.ToLower(filepath.Ext(c.File)) {
		case ".csv":
			format = "csv"
		case ".ndjson", ".jsonl", ".json":
			format = "ndjson"
		default:
			return nil, errors.New("its name does not say what it is: give --format csv or --format ndjson")
		}
	}
	f, err := os.Open(c.File)
	if err != nil {
		return nil, errors.Unwrap(err) // the name is said already
	}
	defer func() { _ = f.Close() }()
	data, err := io.ReadAll(io.LimitReader(f, maxAdoptFile+1))
	if err != nil {
		return nil, errors.Unwrap(err)
	}
	if len(data) > maxAdoptFile {
		return nil, fmt.Errorf("has more than %d bytes", maxAdoptFile)
	}
	return parseAdoptFile(format, data)
}

// adoptAll sends all lines that can be sent. An error is one that every line would meet;
// those that are left are then not begun.
func (c adoptCmd) adoptAll(ctx context.Context, api *client.ClientWithResponses, rows []adoptRow, bar *progress) ([]adoptEnd, error) {
	defer bar.end()
	ends := make([]adoptEnd, len(rows))
	for i, row := range rows {
		ends[i] = adoptEnd{Line: row.Line, ID: row.ID, AppID: row.What.AppID, State: adoptUntried}
		if row.Fault != "" {
			ends[i] = adoptEnd{Line: row.Line, ID: row.ID, State: adoptFailed, Code: "invalid_line", Detail: row.Fault}
		}
	}
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	next := make(chan int)
	var workers sync.WaitGroup
	var mu sync.Mutex
	ended := 0 // guarded by mu, as is bar
	for range c.Concurrency {
		workers.Go(func() {
			for i := range next {
				if err := c.adoptOne(ctx, api, rows[i], &ends[i]); err != nil {
					stop(err)
				}
				mu.Lock()
				ended++
				bar.show(ended, len(rows), "lines")
				mu.Unlock()
			}
		})
	}
	for i := range rows {
		if rows[i].Fault != "" {
			continue
		}
		select {
		case next <- i:
			continue
		case <-ctx.Done():
		}
		break
	}
	close(next)
	workers.Wait()
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		return nil, cause
	}
	return ends, nil
}

// adoptWait is how long the service is asked to wait: less than the client does.
const adoptWait = 20 * time.Second

// maxSilence is how often in a row a service may not answer before it counts as away.
const maxSilence = 5

// adoptOne sends a line until it is known how it ends. An error is one that every line
// would meet.
func (c adoptCmd) adoptOne(ctx context.Context, api *client.ClientWithResponses, row adoptRow, end *adoptEnd) error {
	ctx, cancel := context.WithTimeout(ctx, c.Timeout)
	defer cancel()
	body, prefer := c.request(row), fmt.Sprintf("wait=%d", int(min(adoptWait, c.Timeout).Seconds()))
	for silent := 0; ; {
		put, err := api.PutTenantWithResponse(ctx, string(row.ID), &client.PutTenantParams{Prefer: &prefer}, body)
		pause := 2 * time.Second
		switch {
		case err != nil && ctx.Err() != nil: // what was answered before stands
			if end.State == adoptUntried {
				end.State, end.Code, end.Detail = adoptUnderWay, "no_answer", "the service has not answered yet"
			}
			return nil
		case err != nil:
			if silent++; silent == maxSilence {
				return err
			}
			end.State, end.Code, end.Detail = adoptUnderWay, "no_answer", "the service does not answer"
		case put.StatusCode() == http.StatusUnauthorized, put.StatusCode() == http.StatusForbidden:
			return problemOf(put.HTTPResponse, put.Body)
		case put.StatusCode() < 300:
			silent = 0
			if end.read(put) {
				return nil
			}
			pause = retryAfter(put.HTTPResponse)
		default:
			silent = 0
			p := problemAt(put.HTTPResponse, put.Body)
			end.State, end.Code, end.Detail = adoptFailed, p.Code, p.Detail
			if p.Field != nil {
				end.Detail = *p.Field + " " + end.Detail
			}
			if put.StatusCode() < 500 && put.StatusCode() != http.StatusTooManyRequests {
				return nil
			}
			end.State = adoptUnderWay // it may be
			pause = retryAfter(put.HTTPResponse)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
	}
}

func (c adoptCmd) request(row adoptRow) client.SignUp {
	dry := !c.Yes
	body := client.SignUp{Adopt: &client.Adopt{AppId: string(row.What.AppID), DryRun: &dry}}
	if row.What.UserID != "" {
		owner := string(row.What.UserID)
		body.Adopt.UserId = &owner
	}
	if row.What.Key.IsSet() {
		key := row.What.Key.Reveal()
		body.Adopt.Key = &key
	}
	if row.Profile == "" {
		row.Profile = c.Profile
	}
	if row.Profile != "" {
		body.Profile = &row.Profile
	}
	if row.Name != "" {
		body.DisplayName = &row.Name
	}
	return body
}

// read reads an answer that is no refusal, and reports whether the line has ended.
func (end *adoptEnd) read(put *client.PutTenantResponse) (ended bool) {
	began := end.State == adoptUnderWay // by this line, as far as can be told
	end.Code, end.Detail = "", ""
	problem := func(p *client.Problem) {
		if p != nil {
			end.Code, end.Detail = p.Code, p.Detail
		}
	}
	switch {
	case put.JSON201 != nil:
		end.State = adoptDone
		return true
	case put.JSON202 != nil:
		end.State = adoptUnderWay
		problem(put.JSON202.Problem)
		if put.JSON202.Adoption != nil && put.JSON202.Adoption.Problem != nil {
			problem(put.JSON202.Adoption.Problem)
		}
		return false
	case put.JSON200 == nil || put.JSON200.Adoption == nil:
		end.State, end.Code, end.Detail = adoptFailed, "unexpected_answer", "the API's answer is none of Tenantry's"
		return true
	}
	switch a := put.JSON200.Adoption; a.State {
	case client.AdoptionStateDone:
		if end.State = adoptWas; began {
			end.State = adoptDone
		}
	case client.AdoptionStatePossible:
		end.State = adoptPossible
	default:
		end.State = adoptFailed
		problem(a.Problem)
	}
	return true
}

func problemAt(resp *http.Response, body []byte) *apiProblem {
	p, ok := errors.AsType[*apiProblem](problemOf(resp, body))
	if !ok || p.Code == "" {
		return &apiProblem{ProblemDetails: client.ProblemDetails{Code: "no_answer", Detail: fmt.Sprintf("the API answers %d, which is no answer of Tenantry's", resp.StatusCode)}}
	}
	return p
}

// retryAfter is when the service wants to be asked again.
func retryAfter(resp *http.Response) time.Duration {
	n, err := strconv.Atoi(resp.Header.Get("Retry-After"))
	if err != nil || n < 1 {
		n = 1
	}
	return min(time.Duration(n)*time.Second, 30*time.Second)
}

// report prints how the lines ended. It returns errReported unless all of them ended well.
func (c adoptCmd) report(e env, ends []adoptEnd) error {
	counts := map[string]int{}
	for _, end := range ends {
		counts[end.State]++
	}
	bad := counts[adoptFailed] + counts[adoptUnderWay] + counts[adoptUntried]
	if c.json() {
		if err := printJSON(e.stdout, map[string]any{"dry_run": !c.Yes, "lines": ends, "counts": counts}); err != nil {
			return err
		}
	} else if bad > 0 {
		if err := printAdoptEnds(e.stdout, ends); err != nil {
			return err
		}
	}
	var parts []string
	for _, s := range []struct{ state, text string }{
		{adoptPossible, "can be adopted"}, {adoptDone, "adopted"}, {adoptWas, "were adopted before"}, {adoptFailed, "failed"},
		{adoptUnderWay, "are under way: give the file again"}, {adoptUntried, "were not begun"},
	} {
		if n := counts[s.state]; n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, s.text))
		}
	}
	_, _ = fmt.Fprintf(e.stderr, "of %d: %s\n", len(ends), strings.Join(parts, ", "))
	if !c.Yes {
		_, _ = fmt.Fprintln(e.stderr, "nothing was changed; to adopt them: --yes")
	}
	if bad > 0 {
		return errReported
	}
	return nil
}

func printAdoptEnds(to io.Writer, ends []adoptEnd) error {
	t := newTable(to, "LINE", "TENANT", "APP", "STATE", "WHY")
	for _, end := range ends {
		switch end.State {
		case adoptDone, adoptWas, adoptPossible:
			continue
		}
		why := end.Detail
		if end.Code != "" {
			why = end.Code + ": " + why
		}
		t.row(end.Line, end.ID, end.AppID, end.State, why)
	}
	return t.flush()
}
