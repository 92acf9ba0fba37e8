package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/tenantry/tenantry/api/client"
)

type importCmd struct {
	apiFlags
	outputFlags
	File        string `arg:"" help:"CSV with the header id[,profile][,display_name][,labels.KEY]…, or a JSON object {id, profile, display_name, labels} in each line; - is stdin."`
	DryRun      bool   `xor:"do" help:"Check the file, look what of it is there, and change nothing."`
	Yes         bool   `xor:"do" help:"Do not ask."`
	Format      string `default:"auto" enum:"auto,csv,ndjson" help:"csv or ndjson; auto goes by the first character."`
	Profile     string `placeholder:"PROFILE" help:"Of the lines that name none. Without it: default."`
	Concurrency int    `default:"4" help:"Batches that are sent at once, 1 to 64."`
	Batch       int    `default:"250" help:"Users in a batch, 1 to 1000."`
	Failed      string `placeholder:"FILE" help:"Write the lines that failed to this file, with the reason in a column or field named error. Once corrected it can be imported."`
	Again       bool   `help:"Sign up anew those who were deleted. Without it such lines are refused: a file may be older than a deletion."`
	NoWait      bool   `help:"End when the service has taken all of them, and do not wait until they have their apps."`
}

// Help is what --help says beside the flags.
func (importCmd) Help() string {
	return `The whole file is checked before anything is sent. The users are then written down in batches, which takes minutes, and get their apps one after another, at the rate of the upstream budget and behind everybody who signs up meanwhile. That goes on without this command. It can be ended at any time and run again with the same file: it goes on where it was, and keeps no state of its own.`
}

const (
	// maxImportFaults is how many faults are shown.
	maxImportFaults = 20
	// maxBatchBytes bounds a batch: less than the service takes.
	maxBatchBytes = 2 << 20
	// importPatience is for how long a service may not answer, as while it is restarted.
	importPatience = 10 * time.Minute
	// importNews is how often the progress is printed where there is no terminal.
	importNews = 10 * time.Second
)

// An importRun is one run of the command.
type importRun struct {
	importCmd
	e    env
	api  *client.ClientWithResponses
	file *os.File
	bar  *progress
	said time.Time // when the progress was shown last

	format  string
	columns []string
	users   int

	mu      sync.Mutex // guards what follows, and bar and said
	sent    int        // users that the service has answered for
	counts  importCounts
	waiting map[int]int // by batch, of those that have any: users without their apps
	bad     []uint64    // a bit for each user that failed, by its place in the file
	shown   []importFailure
	failed  *failedFile
}

type importCounts struct {
	Users   int `json:"users"`
	Created int `json:"created"`
	There   int `json:"there"` // were there before
	Active  int `json:"active"`
	Waiting int `json:"waiting"`
	Failed  int `json:"failed"`
}

// An importFailure is why a line failed.
type importFailure struct {
	Line   int    `json:"line"`
	ID     string `json:"id"`
	Code   string `json:"code"`
	Detail string `json:"detail"`
}

func (c importCmd) Run(ctx context.Context, e env) error {
	if c.Concurrency < 1 || c.Concurrency > 64 {
		return usagef("--concurrency must be from 1 to 64")
	}
	if c.Batch < 1 || c.Batch > 1000 {
		return usagef("--batch must be from 1 to 1000")
	}
	api, err := c.client(e)
	if err != nil {
		return err
	}
	file, done, err := c.open(e)
	if err != nil {
		return fmt.Errorf("%s: %w", c.File, err)
	}
	defer done()
	r := &importRun{importCmd: c, e: e, api: api, file: file, bar: e.progress()}
	defer r.bar.end()
	if err := r.check(); err != nil {
		return fmt.Errorf("%s: %w", c.File, err)
	}
	u, err := answer[client.Upstream](api.GetUpstream(ctx))
	if err != nil {
		return err
	}
	r.counts.Created = r.users // as far as is known
	if c.DryRun || !c.Yes && e.onTerminal(e.stdin) {
		if err := r.send(ctx, true); err != nil && ctx.Err() != nil {
			return errors.New("interrupted: nothing was changed")
		} else if err != nil {
			return err
		}
		r.bar.end()
	}
	if c.DryRun {
		return r.report(u.value)
	}
	plan := r.plan(u.value)
	if err := e.confirm(c.Yes, plan, "import"); err != nil {
		return err
	}
	if c.Yes {
		_, _ = fmt.Fprintln(e.stderr, plan)
	}
	return r.run(ctx)
}

// open opens the file, or a copy of stdin, which is read more than once.
func (c importCmd) open(e env) (file *os.File, done func(), err error) {
	if c.File != "-" {
		f, err := os.Open(c.File)
		if err != nil {
			return nil, nil, errors.Unwrap(err) // the name is said already
		}
		return f, func() { _ = f.Close() }, nil
	}
	if e.stdin == nil {
		return nil, nil, usagef("there is no stdin")
	}
	f, err := os.CreateTemp("", "tenantry-import-*")
	if err != nil {
		return nil, nil, err
	}
	done = func() { _ = f.Close(); _ = os.Remove(f.Name()) }
	if _, err := io.Copy(f, e.stdin); err != nil {
		done()
		return nil, nil, err
	}
	return f, done, nil
}

// rows calls f for each row of the file, from its beginning.
func (r *importRun) rows(f func(place int, row importRow) error) error {
	if _, err := r.file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	in, err := newImportReader(r.file, r.Format)
	if err != nil {
		return err
	}
	r.format, r.columns = in.format, in.columns
	for place := 0; ; place++ {
		row, err := in.next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if row.Item.Profile == nil && r.Profile != "" {
			row.Item.Profile = &r.Profile
		}
		if err := f(place, row); err != nil {
			return err
		}
	}
}

// check reads the whole file and says what is wrong with it.
func (r *importRun) check() error {
	faults, most := []string{}, 0
	fault := func(line int, text string) {
		if most++; most <= maxImportFaults {
			faults = append(faults, fmt.Sprintf("line %d: %s", line, plain(text)))
		}
	}
	// Of an id its hash alone is held: files may have millions.
	lines := map[[16]byte]int32{}
	err := r.rows(func(place int, row importRow) error {
		r.users++
		if row.Fault != "" {
			fault(row.Line, row.Fault)
			return nil
		}
		hash := sha256.Sum256([]byte(row.Item.ID))
		id := [16]byte(hash[:])
		if first, twice := lines[id]; twice {
			fault(row.Line, fmt.Sprintf("names the user %q, as line %d does", row.Item.ID, first))
			return nil
		}
		lines[id] = int32(row.Line)
		return nil
	})
	switch {
	case err != nil:
		return err
	case r.users == 0:
		return errors.New("names no users")
	case most > maxImportFaults:
		faults = append(faults, fmt.Sprintf("and %s more", grouped(most-maxImportFaults)))
	}
	if most > 0 {
		return fmt.Errorf("nothing was begun, for it has faults:\n%s", strings.Join(faults, "\n"))
	}
	return nil
}

// plan says what is about to happen, and how long it takes.
func (r *importRun) plan(u client.Upstream) string {
	rate := float64(u.Budget.RequestsPerSecond)
	n := r.counts.Created
	text := grouped(r.users) + " users"
	if r.users == 1 {
		text = "1 user"
	}
	if r.counts.There+r.counts.Failed > 0 {
		text += fmt.Sprintf(": %s are there, %s would be refused, %s are new", grouped(r.counts.There), grouped(r.counts.Failed), grouped(n))
	}
	if n += r.counts.Waiting; n > 0 {
		text += fmt.Sprintf("; an app and a key each are 2 calls, at %g a second: about %s", rate, roughly(callsTake(2*n, rate)))
		if most := u.Budget.ItemsPerCall; most > 1 {
			text += fmt.Sprintf(", or down to %s where one call makes up to %d apps or keys", roughly(callsTake(2*(n+most-1)/most, rate)), most)
		}
	}
	before := u.Queue.WaitingTenants + u.Queue.ImportingTenants - r.counts.Waiting
	switch {
	case before > 0 && r.sent == 0:
		text += fmt.Sprintf("; %s tenants wait already, those of this file among them if it was begun before", grouped(before))
	case before > 0:
		text += fmt.Sprintf("; %s tenants wait already, which takes %s before that", grouped(before), roughly(callsTake(2*before, rate)))
	}
	if n > 0 {
		text += fmt.Sprintf("; tagging the apps with their tenants takes 2 calls each, and ends about %s later", roughly(callsTake(2*n, rate)))
	}
	if halted(u) {
		text += "; no work is done at Clarifai now"
		if u.Problem != nil {
			text += ": " + u.Problem.Detail
		}
	}
	if u.Recovery != nil && u.Recovery.State == client.UpstreamRecoveryStateStopped {
		text += "; another database of this deployment is in use, and no tenant gets an app here: see tenantry recover show"
	}
	return text
}

func callsTake(calls int, rate float64) time.Duration {
	return time.Duration(float64(calls) / rate * float64(time.Second))
}

func (r *importRun) run(ctx context.Context) error {
	if r.Failed != "" {
		r.failed = &failedFile{path: r.Failed}
		defer r.failed.discard()
	}
	err := r.send(ctx, false)
	if err == nil && !r.NoWait {
		err = r.follow(ctx)
	}
	r.bar.end()
	if r.failed != nil {
		if failed := r.failed.keep(); failed != nil {
			err = errors.Join(err, fmt.Errorf("%s: %w", r.Failed, failed))
		}
	}
	if err != nil {
		return r.ended(ctx, err)
	}
	return r.report(client.Upstream{})
}

// ended says how far an import came that ends early.
func (r *importRun) ended(ctx context.Context, err error) error {
	r.bar.end()
	if r.sent == 0 && ctx.Err() == nil {
		return err
	}
	_ = r.printFailures()
	how := fmt.Sprintf("%s of %s users are written down", grouped(r.counts.Created+r.counts.There), grouped(r.users))
	if r.counts.Waiting > 0 {
		how += ", and get their apps without this command"
	}
	again := "run it again with the same file to go on"
	if ctx.Err() != nil {
		return laterError{fmt.Errorf("interrupted: %s; %s", how, again)}
	}
	return fmt.Errorf("%w\n%s; %s", err, how, again)
}

// An importBatch is users that are sent together.
type importBatch struct {
	number int
	first  int // the place of the first in the file
	rows   []importRow
	items  []json.RawMessage
}

// batches calls f for the batches of the file, which are the same each time.
func (r *importRun) batches(f func(b importBatch) error) error {
	var b importBatch
	size := 0
	flush := func() error {
		if len(b.rows) == 0 {
			return nil
		}
		err := f(b)
		b, size = importBatch{number: b.number + 1, first: b.first + len(b.rows)}, 0
		return err
	}
	err := r.rows(func(place int, row importRow) error {
		if row.Fault != "" || place >= r.users {
			return fmt.Errorf("line %d: the file was changed meanwhile", row.Line)
		}
		item, err := json.Marshal(row.Item)
		if err != nil {
			return err
		}
		if len(b.rows) == r.Batch || size+len(item) > maxBatchBytes {
			if err := flush(); err != nil {
				return err
			}
		}
		b.rows, b.items, size = append(b.rows, row), append(b.items, item), size+len(item)+1
		return nil
	})
	if err != nil {
		return err
	}
	return flush()
}

// send sends all users, or has the service say of all what it would do.
func (r *importRun) send(ctx context.Context, dryRun bool) error {
	r.sent, r.counts, r.waiting, r.bad, r.shown = 0, importCounts{Users: r.users}, map[int]int{}, make([]uint64, r.users/64+1), nil
	what := "users are taken"
	if dryRun {
		what = "users are looked for"
	}
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	next := make(chan importBatch)
	var workers sync.WaitGroup
	for range r.Concurrency {
		workers.Go(func() {
			for b := range next {
				results, err := r.ask(ctx, b, dryRun)
				sent := 0
				if err == nil {
					sent, err = r.took(b, results)
				}
				if err != nil {
					stop(err)
					continue
				}
				r.show(sent, what)
			}
		})
	}
	err := r.batches(func(b importBatch) error {
		select {
		case next <- b:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	})
	close(next)
	workers.Wait()
	if err == nil {
		err = context.Cause(ctx)
	}
	return err
}

// ask sends a batch until it is answered.
func (r *importRun) ask(ctx context.Context, b importBatch, dryRun bool) ([]client.BatchResult, error) {
	request := map[string]any{"tenants": b.items, "dry_run": dryRun}
	if !r.Again {
		request["on_deleted"] = "refuse"
	}
	body, err := json.Marshal(request)
	if err != nil {
		return nil, err
	}
	since, pause := time.Now(), time.Second
	for {
		got, err := answer[client.BatchAnswer](r.api.SignUpBatchWithBody(ctx, "application/json", bytes.NewReader(body)))
		switch {
		case err == nil && len(got.value.Results) == len(b.rows):
			return got.value.Results, nil
		case err == nil:
			return nil, errors.New("the API's answer is none to what was sent")
		case ctx.Err() != nil || !passing(err) || time.Since(since) > importPatience:
			return nil, err
		}
		wait := pause
		if p, ok := errors.AsType[*apiProblem](err); ok {
			wait = max(wait, p.retryAfter)
			if p.status == http.StatusTooManyRequests { // which is no trouble
				wait = max(p.retryAfter, 100*time.Millisecond)
				since = time.Now()
			}
		}
		r.show(-1, "the service is busy or does not answer; waiting")
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(wait):
		}
		pause = min(2*pause, 30*time.Second)
	}
}

// took writes down how the users of a batch ended, and returns of how many that is known.
func (r *importRun) took(b importBatch, results []client.BatchResult) (sent int, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.sent += len(b.rows)
	waiting := 0
	for i, result := range results {
		switch {
		case result.Status >= 300:
			if err := r.fail(b, i, result); err != nil {
				return r.sent, err
			}
			continue
		case result.Created:
			r.counts.Created++
		default:
			r.counts.There++
		}
		switch {
		case result.Status == http.StatusOK:
			r.counts.Active++
		case result.Tenant != nil:
			waiting++
		}
	}
	if waiting > 0 {
		r.waiting[b.number] = waiting
		r.counts.Waiting += waiting
	}
	return r.sent, nil
}

// fail writes down that a user failed. r.mu is held.
func (r *importRun) fail(b importBatch, i int, result client.BatchResult) error {
	place := b.first + i
	r.bad[place/64] |= 1 << (place % 64)
	r.counts.Failed++
	failure := importFailure{Line: b.rows[i].Line, ID: b.rows[i].Item.ID, Code: "tenant_deleted", Detail: "it was deleted meanwhile"}
	if p := result.Problem; p != nil {
		failure.Code, failure.Detail = p.Code, p.Detail
		if p.Field != nil {
			if _, field, ok := strings.Cut(*p.Field, "]."); ok { // what is before it counts within the batch
				failure.Detail = field + " " + failure.Detail
			}
		}
	}
	if len(r.shown) < maxImportFaults {
		r.shown = append(r.shown, failure)
	}
	if r.failed != nil {
		return r.failed.add(r.format, r.columns, b.rows[i], failure.Code+": "+failure.Detail)
	}
	return nil
}

func (r *importRun) isBad(place int) bool { return r.bad[place/64]&(1<<(place%64)) != 0 }

// follow waits until the users have their apps. They get them in the order in which they
// were sent: the oldest batch that lacks some is asked for again, and when it lacks none
// the next. What is behind it is estimated by how many tenants wait in all.
func (r *importRun) follow(ctx context.Context) error {
	began, activeThen := time.Now(), r.counts.Active
	return r.batches(func(b importBatch) error {
		for r.waiting[b.number] > 0 {
			u, err := answer[client.Upstream](r.api.GetUpstream(ctx))
			pause := importNews
			if err == nil {
				rate := float64(u.value.Budget.RequestsPerSecond)
				left := min(r.counts.Waiting, u.value.Queue.ImportingTenants+u.value.Queue.WaitingTenants)
				r.show(r.users-r.counts.Failed-left, r.pace(u.value, left, time.Since(began), r.users-r.counts.Failed-left-activeThen))
				pause = min(max(callsTake(2*min(left, r.waiting[b.number]), rate), pollPause), importNews)
			} else if ctx.Err() != nil || !passing(err) {
				return err
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(pause):
			}
			results, err := r.ask(ctx, b, true) // who was deleted meanwhile is not to begin again
			if err != nil {
				return err
			}
			if err := r.look(b, results); err != nil {
				return err
			}
		}
		return nil
	})
}

// look writes down how the users of a batch stand that was sent before.
func (r *importRun) look(b importBatch, results []client.BatchResult) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	waiting, failed := 0, 0
	for i, result := range results {
		switch {
		case r.isBad(b.first + i):
		case result.Status >= 300 || result.Created: // it was deleted while it waited
			if err := r.fail(b, i, result); err != nil {
				return err
			}
			failed++
		case result.Status != http.StatusOK:
			waiting++
		}
	}
	ended := r.waiting[b.number] - waiting
	r.counts.Waiting = max(0, r.counts.Waiting-ended)
	r.counts.Active += max(0, ended-failed)
	r.waiting[b.number] = waiting
	return nil
}

// pace says how fast it goes, and for how long.
func (r *importRun) pace(u client.Upstream, left int, passed time.Duration, served int) string {
	rate := float64(u.Budget.RequestsPerSecond)
	text := "have their apps"
	if passed > time.Second && served > 0 {
		text += fmt.Sprintf(", %.1f/s", float64(served)/passed.Seconds())
	}
	if halted(u) {
		text += "; paused"
		if u.Problem != nil {
			text += ": " + u.Problem.Detail
		}
		return text
	}
	text += ", "
	if u.Budget.ItemsPerCall > 1 {
		text += "at most "
	}
	return text + "about " + roughly(callsTake(2*(left+u.Queue.WaitingTenants), rate)) + " to go"
}

// halted reports whether no work is in progress at Clarifai, so that the remaining time is unknown.
func halted(u client.Upstream) bool { return u.Queue.EtaSeconds == nil }

// show shows how far it is; done of less than 0 means that it is not known anew.
func (r *importRun) show(done int, text string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.bar.visible() {
		total := r.users
		if done < 0 {
			done, total = 0, 0
		}
		r.bar.show(done, total, text)
		return
	}
	if time.Since(r.said) < importNews {
		return
	}
	if !r.said.IsZero() || done < 0 { // a short one says nothing before its end
		if done >= 0 {
			text = fmt.Sprintf("%s of %s %s", grouped(done), grouped(r.users), text)
		}
		_, _ = fmt.Fprintln(r.e.stderr, text)
	}
	r.said = time.Now()
}

// report prints how it ended. Its error says so too.
func (r *importRun) report(u client.Upstream) error {
	c := r.counts
	if r.json() {
		out := map[string]any{"dry_run": r.DryRun, "counts": c, "failures": append([]importFailure{}, r.shown...)}
		if err := printJSON(r.e.stdout, out); err != nil {
			return err
		}
	} else if err := r.printFailures(); err != nil {
		return err
	}
	var parts []string
	add := func(n int, text string) {
		if n > 0 {
			parts = append(parts, grouped(n)+" "+text)
		}
	}
	if r.DryRun {
		add(c.Created, "would be signed up")
		add(c.There, "are there")
		add(c.Failed, "would be refused")
	} else {
		add(c.Created, "signed up")
		add(c.There, "were there")
		add(c.Failed, "failed")
		add(c.Waiting, "wait for their apps, and get them without this command")
	}
	_, _ = fmt.Fprintf(r.e.stderr, "of %s: %s\n", grouped(c.Users), strings.Join(parts, ", "))
	if r.DryRun {
		_, _ = fmt.Fprintf(r.e.stderr, "nothing was changed; %s\n", r.plan(u))
	}
	if c.Failed > 0 {
		return errDiffers
	}
	return nil
}

func (r *importRun) printFailures() error {
	slices.SortFunc(r.shown, func(a, b importFailure) int { return a.Line - b.Line }) // batches end in any order
	t := newTable(r.e.stderr, "LINE", "TENANT", "WHY")
	for _, f := range r.shown {
		t.row(f.Line, f.ID, f.Code+": "+f.Detail)
	}
	if err := t.flush(); err != nil {
		return err
	}
	if more := r.counts.Failed - len(r.shown); more > 0 {
		_, _ = fmt.Fprintf(r.e.stderr, "and %s more; --failed FILE has all\n", grouped(more))
	}
	return nil
}

// A failedFile takes the lines that failed. It is in its place once it is whole: it may
// replace the file that is imported.
type failedFile struct {
	path string
	file *os.File // nil before the first
	csv  *csvWriter
}

func (f *failedFile) add(format string, columns []string, row importRow, why string) error {
	if f.file == nil {
		var err error
		if f.file, err = os.CreateTemp(filepath.Dir(f.path), "."+filepath.Base(f.path)+"-*"); err != nil {
			return err
		}
		if format == "csv" {
			f.csv = newCSVWriter(f.file, columns)
		}
	}
	if f.csv != nil {
		return f.csv.row(columns, row.record, why)
	}
	line, err := json.Marshal(struct {
		importItem
		Error string `json:"error"`
	}{row.Item, why})
	if err != nil {
		return err
	}
	_, err = f.file.Write(append(line, '\n'))
	return err
}

// keep puts the file in its place, if a line failed.
func (f *failedFile) keep() error {
	if f.file == nil {
		return nil
	}
	if f.csv != nil {
		if err := f.csv.flush(); err != nil {
			return err
		}
	}
	name := f.file.Name()
	if err := errors.Join(f.file.Close(), os.Rename(name, f.path)); err != nil {
		return err
	}
	f.file = nil
	return nil
}

// discard removes what was not kept.
func (f *failedFile) discard() {
	if f.file != nil {
		_ = f.file.Close()
		_ = os.Remove(f.file.Name())
	}
}

// grouped is a number as people read it.
func grouped(n int) string {
	text := strconv.Itoa(n)
	for i := len(text) - 3; i > 0 && text[i-1] != '-'; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}

// roughly is a duration to the minute, for people.
func roughly(d time.Duration) string {
	if d < time.Minute {
		return fmt.Sprintf("%ds", max(1, int(d.Round(time.Second).Seconds())))
	}
	return strings.TrimSuffix(d.Round(time.Minute).String(), "0s")
}
