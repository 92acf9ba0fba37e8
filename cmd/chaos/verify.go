package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/clarifaisim"
	"github.com/tenantry/tenantry/internal/keyring"
	"github.com/tenantry/tenantry/internal/tenant"
)

// figures are what a run comes to.
type figures struct {
	done []figure // what was injected and asked for
	zero []figure // what must be zero
	told []string // the first things that are not
}

type figure struct {
	name  string
	value int
}

func (f *figures) did(name string, n int) { f.done = append(f.done, figure{name, n}) }

// must adds a figure that must be zero, with what it counts.
func (f *figures) must(name string, found ...string) {
	f.zero = append(f.zero, figure{name, len(found)})
	for _, text := range found[:min(3, len(found))] {
		if text != "" {
			f.told = append(f.told, name+": "+text)
		}
	}
}

func (f *figures) allZero() bool {
	return !slices.ContainsFunc(f.zero, func(z figure) bool { return z.value != 0 })
}

func (f *figures) print(out io.Writer) {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', tabwriter.AlignRight)
	_, _ = fmt.Fprintln(w, "\ninjected and asked\t\t")
	for _, d := range f.done {
		_, _ = fmt.Fprintf(w, "%s\t%d\t\n", d.name, d.value)
	}
	_, _ = fmt.Fprintln(w, "\nlost, doubled or left behind\t\t")
	for _, z := range f.zero {
		_, _ = fmt.Fprintf(w, "%s\t%d\t\n", z.name, z.value)
	}
	_ = w.Flush()
	for _, text := range f.told {
		_, _ = fmt.Fprintln(out, " ", text)
	}
}

// verify waits until nothing is under way, and takes the figures from Postgres,
// from the simulator and from what callers were told. It fails if one cannot be
// taken.
func (s *stage) verify(ctx context.Context, l *load, injected map[string]int, say func(string, ...any)) (*figures, error) {
	restErr := s.rest(ctx)
	if restErr != nil {
		say("not everything has come to rest: %v", restErr)
	}
	taking, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Minute)
	defer cancel()
	s.keepCalls(taking) // before our own calls
	f := &figures{}
	for _, i := range injections {
		f.did(i.name, injected[i.name])
	}
	f.did(keysetRotated, injected[keysetRotated])
	faults := map[string]int{}
	throttled := 0
	for _, c := range s.calls {
		switch {
		case c.Fault != "":
			faults[c.Fault]++
		case c.Status == 11005:
			throttled++
		}
	}
	for _, kind := range slices.Sorted(maps.Keys(faults)) {
		f.did("upstream calls with the fault "+kind, faults[kind])
	}
	f.did("upstream calls", len(s.calls))
	f.did("upstream calls in the busiest second (14 allowed, 1 may jitter)", busiest(s.calls))
	f.did("tenants that signed up", len(l.asked))
	f.did("sign-ups and look-ups sent", int(l.requests.Load()))
	f.did("sign-ups sent again", int(l.retries.Load()))
	for _, name := range slices.Sorted(maps.Keys(l.lives.counts)) {
		f.did("tenants' "+name, l.lives.counts[name])
	}
	slices.Sort(l.waits)
	if len(l.waits) > 0 {
		f.did("ms until a tenant was active: median", int(l.waits[len(l.waits)/2].Milliseconds()))
		f.did("ms until a tenant was active: worst", int(l.waits[len(l.waits)-1].Milliseconds()))
	}

	var unsettled []string
	if restErr != nil {
		unsettled = append(unsettled, restErr.Error())
	}
	f.must("R8  work that did not come to rest", unsettled...)
	var waiting []string
	for id, done := range l.asked {
		if !done {
			waiting = append(waiting, id)
		}
	}
	f.must("R8  tenants that never became active", waiting...)
	f.must("    answers that no caller should get", l.refused...)
	f.must("    requests cut off by SIGTERM", make([]string, l.cutOff.Load())...)
	f.must("R2  answers that contradict an earlier one", l.changed...)
	if err := s.verifyMapping(taking, f, l); err != nil {
		return f, err
	}
	if err := s.verifyReads(taking, f, l); err != nil {
		return f, err
	}
	if err := s.verifyUpstream(taking, f, l); err != nil {
		return f, err
	}
	f.must("R7  seconds with more calls than the budget", overBudget(s.calls)...)
	f.must("R7  calls that Clarifai throttled by itself", make([]string, throttled)...)
	f.must("    logs of Clarifai that could not be read", make([]string, s.missed)...)
	return f, s.verifyLogs(f, l)
}

// rest waits until no row is under way and every app is marked, and lets a report
// compare both sides.
func (s *stage) rest(ctx context.Context) error {
	return await(ctx, settle, "every row is at rest", func() (bool, error) {
		conn, err := pgx.Connect(ctx, s.cluster.URL("tenantry"))
		if err != nil {
			return false, err
		}
		defer func() { _ = conn.Close(ctx) }()
		var open string
		err = conn.QueryRow(ctx, `
			SELECT coalesce(string_agg(what, ', '), '') FROM (
				SELECT count(*) || ' apps ' || state AS what FROM apps WHERE state IN ('building', 'purging') OR pending AND state = 'held' GROUP BY state
				UNION ALL SELECT count(*) || ' keys ' || k.state FROM keys k JOIN apps a ON a.id = k.app_id
					WHERE k.state IN ('creating', 'revoking') AND a.state <> 'retired' GROUP BY k.state -- a retired app stays as the crash left it
				UNION ALL SELECT count(*) || ' keys retiring' FROM keys WHERE state = 'retiring' HAVING count(*) > 0
				UNION ALL SELECT count(DISTINCT substring(ciphertext from 2 for 4)) || ' keys of the keyset in use' FROM keys
					HAVING count(DISTINCT substring(ciphertext from 2 for 4)) > 1
				UNION ALL SELECT count(*) || ' tenants ' || state FROM tenants WHERE state NOT IN ('active', 'suspended', 'deleting', 'deleted') GROUP BY state
				UNION ALL SELECT 'recovery mode is ' || recovery || ': ' || recovery_reason || ' ' || lost FROM current_incarnation WHERE recovery IS NOT NULL) AS o`).Scan(&open)
		if err == nil && open != "" {
			err = errors.New(open)
		}
		return err == nil, err
	})
}

// given says of the audit event e that a tenant was given its app by it.
const given = `(e.action = 'tenant.activated' OR e.action = 'tenant.created' AND e.detail->>'state' = 'active')`

// verifyMapping compares Postgres with what callers were told.
func (s *stage) verifyMapping(ctx context.Context, f *figures, l *load) error {
	conn, err := pgx.Connect(ctx, s.cluster.URL("tenantry"))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(ctx) }()
	held := map[string]string{} // tenant to app
	var id, app string
	rows, _ := conn.Query(ctx, `SELECT id, coalesce(app_id, '') FROM tenants`)
	if _, err := pgx.ForEachRow(rows, []any{&id, &app}, func() error { held[id] = app; return nil }); err != nil {
		return err
	}
	var lost, strangers []string
	for id, a := range l.accounts {
		if held[id] != a.app {
			lost = append(lost, fmt.Sprintf("%s was told %s, Postgres says %q", id, a.app, held[id]))
		}
	}
	for id := range held {
		if _, ok := l.asked[id]; !ok {
			strangers = append(strangers, id)
		}
	}
	f.must("R2  mappings that were acknowledged and lost", lost...)
	f.must("    tenants that nobody signed up", strangers...)
	var hits, misses int
	if err := conn.QueryRow(ctx, `SELECT coalesce(sum(hits), 0), coalesce(sum(misses), 0) FROM pools`).Scan(&hits, &misses); err != nil {
		return err
	}
	f.did("sign-ups that had an app at once, as the pool counts", hits)
	f.did("sign-ups that waited for one, as the pool counts", misses)
	for _, c := range []struct{ name, sql string }{
		{"R1  tenants of more than one app", `
			SELECT tenant_id || ' has ' || count(*) || ' apps' FROM apps WHERE tenant_id IS NOT NULL
			GROUP BY tenant_id, tenant_generation HAVING count(*) > 1`},
		{"R1  apps of the pool that were given to a tenant before", `
			SELECT a.id FROM apps a WHERE a.state IN ('building', 'ready')
				AND EXISTS (SELECT FROM audit_events e WHERE e.app_id = a.id AND ` + given + `)`},
		{"R1  apps that two tenants were told", `
			SELECT app_id FROM audit_events e WHERE ` + given + ` GROUP BY app_id HAVING count(*) > 1`},
		{"R6  tenants without just one event of creation and of activation in each generation", `
			SELECT t.id FROM tenants t WHERE
				(SELECT count(*) FROM audit_events e WHERE e.tenant_id = t.id AND e.action = 'tenant.created') <> t.generation
				OR (SELECT count(*) FROM audit_events e WHERE e.tenant_id = t.id AND ` + given + `) <> t.generation`},
		{"R6  keys that were revoked without an event", `
			SELECT k.id::text FROM keys k JOIN apps a ON a.id = k.app_id WHERE k.state = 'revoked' AND a.tenant_id IS NOT NULL
				AND NOT EXISTS (SELECT FROM audit_events e WHERE e.key_id = k.id AND e.action = 'key.revoked')`},
		{"R5  secrets of keys that were revoked", `SELECT id::text FROM keys WHERE state = 'revoked' AND ciphertext IS NOT NULL`},
	} {
		rows, _ := conn.Query(ctx, c.sql)
		found, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		f.must(c.name, found...)
	}
	var reveals int
	if err := conn.QueryRow(ctx, `SELECT count(*) FROM audit_events WHERE action = 'key.revealed'`).Scan(&reveals); err != nil {
		return err
	}
	if out, err := s.command(ctx, "audit", "verify"); err != nil {
		f.must("R6  faults of the audit log that its seals show", strings.Split(cmp.Or(out, err.Error()), "\n")...)
	} else {
		f.must("R6  faults of the audit log that its seals show")
	}
	f.must("R6  answers with a key that are not in the audit log", make([]string, max(0, int(l.answered.Load())-reveals))...)
	return nil
}

// verifyUpstream compares the simulator with Postgres, calls it with each key that
// was given out, and lets Tenantry's own report find nothing.
func (s *stage) verifyUpstream(ctx context.Context, f *figures, l *load) error {
	var settings any
	if err := s.sim(ctx, http.MethodPost, "settings", map[string]any{"rate_limit": 0, "latency_ms": 0}, &settings); err != nil {
		return err
	}
	var apps []clarifaisim.AppInfo
	if err := s.sim(ctx, http.MethodGet, "apps", nil, &apps); err != nil {
		return err
	}
	var keys []clarifaisim.KeyInfo
	if err := s.sim(ctx, http.MethodGet, "keys", nil, &keys); err != nil {
		return err
	}
	known, err := s.keyring()
	if err != nil {
		return err
	}
	conn, err := pgx.Connect(ctx, s.cluster.URL("tenantry"))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(ctx) }()
	appState, keyApp := map[string]string{}, map[string]string{}
	var id, state string
	rows, _ := conn.Query(ctx, `SELECT id, state FROM apps`)
	if _, err := pgx.ForEachRow(rows, []any{&id, &state}, func() error { appState[id] = state; return nil }); err != nil {
		return err
	}
	var fingerprint []byte
	rows, _ = conn.Query(ctx, `SELECT app_id, fingerprint FROM keys WHERE state = 'active'`)
	if _, err := pgx.ForEachRow(rows, []any{&id, &fingerprint}, func() error { keyApp[string(fingerprint)] = id; return nil }); err != nil {
		return err
	}

	var noRow, unheld, unknown, surplus, missing, spare []string
	ready, retired := 0, 0
	upstream, keysOf := map[string]bool{}, map[string]int{}
	for _, a := range apps {
		upstream[a.ID] = true
		switch state := appState[a.ID]; state {
		case "":
			if a.ID != s.control && !s.leftByHand(a.ID, state) {
				noRow = append(noRow, a.ID)
			}
		case "held", "retained":
		case "retired": // by a crash of Postgres
			retired++
		case "ready":
			if ready++; ready > s.pool {
				spare = append(spare, a.ID)
			}
		default:
			unheld = append(unheld, a.ID+" is "+state)
		}
	}
	for _, k := range keys {
		if s.leftByHand(k.AppID, appState[k.AppID]) || appState[k.AppID] == "retired" {
			continue
		}
		if keyApp[string(known.Fingerprint(tenant.NewSecret(k.ID)))] != k.AppID {
			unknown = append(unknown, "of "+k.AppID+", "+k.Description)
		}
		if keysOf[k.AppID]++; keysOf[k.AppID] > 1 {
			surplus = append(surplus, "of "+k.AppID)
		}
	}
	for id, state := range appState {
		if (state == "held" || state == "ready") && !upstream[id] {
			missing = append(missing, id)
		}
	}
	f.must("R3  apps at Clarifai without a row", noRow...)
	f.must("R3  apps at Clarifai that neither a tenant nor the pool has", unheld...)
	f.must("    apps in the pool beyond its most", spare...)
	f.must("R3  keys that work and that no row claims", unknown...)
	f.must("R3  second keys of one app", surplus...)
	f.must("R3  apps of tenants and of the pool that are gone from Clarifai", missing...)
	f.did("apps that are ready in the pool", ready)
	f.did("apps that crashes of Postgres retired", retired)
	unusable, err := s.deadMembers(ctx, conn, known)
	if err != nil {
		return err
	}
	f.must("R2  apps in the pool whose key does not open them", unusable...)

	var dead, open []string
	ids := slices.Sorted(maps.Keys(l.accounts))
	for i, id := range ids {
		a := l.accounts[id]
		if status, err := s.upload(ctx, a.app, a.key); err != nil || status != http.StatusOK {
			if err != nil {
				return err
			}
			dead = append(dead, fmt.Sprintf("%s: Clarifai answers %d", id, status))
		}
		if other := l.accounts[ids[(i+1)%len(ids)]]; len(ids) > 1 {
			status, err := s.upload(ctx, other.app, a.key)
			if err != nil {
				return err
			}
			if status == http.StatusOK {
				open = append(open, id)
			}
		}
	}
	f.must("R2  keys that were given out and do not open their app", dead...)
	f.must("R1  keys that open another tenant's app", open...)
	if err := s.verifyLives(ctx, f, l, slices.Collect(maps.Keys(upstream))); err != nil {
		return err
	}

	found, err := s.report(ctx)
	if err != nil {
		return err
	}
	f.must("R3  differences that Tenantry's own report finds", found...)
	return nil
}

// deadMembers lists the apps of the pool whose key does not open them.
func (s *stage) deadMembers(ctx context.Context, conn *pgx.Conn, known *keyring.Keyring) ([]string, error) {
	type member struct {
		App        string
		Key        uuid.UUID
		Ciphertext []byte
	}
	rows, _ := conn.Query(ctx, `
		SELECT a.id, coalesce(k.id, '00000000-0000-0000-0000-000000000000'), k.ciphertext
		FROM apps a LEFT JOIN keys k ON k.app_id = a.id AND k.state = 'active' WHERE a.state = 'ready'`)
	members, err := pgx.CollectRows(rows, pgx.RowToStructByPos[member])
	if err != nil {
		return nil, err
	}
	var dead []string
	for _, m := range members {
		if m.Ciphertext == nil {
			dead = append(dead, m.App+" has none")
			continue
		}
		secret, err := known.Open(m.Key, m.Ciphertext)
		if err != nil {
			return nil, err
		}
		status, err := s.upload(ctx, m.App, secret.Reveal())
		if err != nil {
			return nil, err
		}
		if status != http.StatusOK {
			dead = append(dead, fmt.Sprintf("%s: Clarifai answers %d", m.App, status))
		}
	}
	return dead, nil
}

// upload adds an input to an app with a key, as a tenant's backend does. A fault may keep Clarifai from responding.
func (s *stage) upload(ctx context.Context, app, key string) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, fmt.Sprintf("%s/v2/users/%s/apps/%s/inputs", s.clarifai.url, operator, app),
		strings.NewReader(`{"inputs":[{"data":{"text":{"raw":"hello"}}}]}`))
	if err != nil {
		return 0, err
	}
	req.Header.Set("Authorization", "Key "+key)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	return resp.StatusCode, resp.Body.Close()
}

// report runs a reconciliation and returns what it found.
func (s *stage) report(ctx context.Context) ([]string, error) {
	type reconciliation struct {
		ID, State string
		Items     []struct{ Kind, App_ID, Detail string }
	}
	var r reconciliation
	if err := s.ask(ctx, http.MethodPost, "/v1/reconciliations", struct{}{}, &r); err != nil {
		return nil, err
	}
	path := "/v1/reconciliations/" + r.ID + "?limit=1000"
	err := await(ctx, 2*time.Minute, "the report is done", func() (bool, error) {
		err := s.ask(ctx, http.MethodGet, path, nil, &r)
		return err == nil && r.State == "done", err
	})
	var found []string
	for _, item := range r.Items {
		found = append(found, strings.TrimSpace(item.Kind+" "+item.App_ID+" "+item.Detail))
	}
	return found, err
}

func (s *stage) keyring() (*keyring.Keyring, error) { return keyring.Load(s.file("keyset.json")) }

// verifyLogs looks for secrets in what the programs printed.
func (s *stage) verifyLogs(f *figures, l *load) error {
	secrets := map[string]string{s.token: "a token", s.admin: "a token"}
	for _, pat := range s.pats {
		secrets[pat] = "a PAT"
	}
	for id, a := range l.accounts {
		secrets[a.key] = "the key of " + id
	}
	for _, one := range l.lives.all {
		for _, a := range append(one.dead, one.account) {
			if a.key != "" {
				secrets[a.key] = "a key of " + one.id
			}
		}
	}
	var leaks []string
	for _, p := range s.running {
		log, err := os.ReadFile(p.log)
		if err != nil {
			return err
		}
		for secret, what := range secrets {
			if bytes.Contains(log, []byte(secret)) {
				leaks = append(leaks, what+" in "+p.log)
			}
		}
	}
	f.must("R5  secrets in logs", leaks...)
	return nil
}

// busiest returns the most calls that came within a second.
func busiest(calls []clarifaisim.Call) int {
	most := 0
	eachSecond(calls, func(n int, _ time.Time) { most = max(most, n) })
	return most
}

// overBudget lists the seconds with more calls than the budget has, one of jitter
// allowed for.
func overBudget(calls []clarifaisim.Call) []string {
	var over []string
	var last time.Time
	eachSecond(calls, func(n int, at time.Time) {
		if n > rate+1 && at.Sub(last) >= time.Second {
			over = append(over, fmt.Sprintf("%d calls in the second from %s", n, at.Format(time.TimeOnly)))
			last = at
		}
	})
	return over
}

// eachSecond counts the operator's calls in the second that begins with each call.
func eachSecond(calls []clarifaisim.Call, f func(n int, at time.Time)) {
	var times []time.Time
	for _, c := range calls {
		if c.UserID == operator {
			times = append(times, c.At)
		}
	}
	slices.SortFunc(times, func(a, b time.Time) int { return cmp.Compare(a.UnixNano(), b.UnixNano()) })
	end := 0
	for i, at := range times {
		for end < len(times) && times[end].Sub(at) < time.Second {
			end++
		}
		f(end-i, at)
	}
}
