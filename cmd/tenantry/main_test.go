package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/tenantry/tenantry/internal/localpg"
	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

func TestMain(m *testing.M) {
	if os.Getenv(asCommand) != "" {
		main()
	}
	pgtest.Main(m)
}

// A buffer may be written and read at once.
type buffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}
func (b *buffer) String() string { b.mu.Lock(); defer b.mu.Unlock(); return b.buf.String() }

// A process is one run of tenantry.
type process struct {
	t              *testing.T
	stdout, stderr buffer
	stop           context.CancelFunc
	exit           chan int
	url, internal  string
}

func start(t *testing.T, vars map[string]string, args ...string) *process {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	if len(args) > 0 && args[0] == "serve" {
		defaults := []string{"serve", "--shutdown-delay", "0s"}
		if !slices.Contains(args, "--profiles-file") { // tests count the apps of tenants
			defaults = append(defaults, "--pool-max", "0")
		}
		args = append(defaults, args[1:]...)
	}
	p := &process{t: t, stop: cancel, exit: make(chan int, 1)}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		p.exit <- run(ctx, env{args: args, get: func(k string) string { return vars[k] }, stdout: &p.stdout, stderr: &p.stderr})
	}()
	// Otherwise its last writes could disturb the next test on the same database.
	t.Cleanup(func() { cancel(); <-ended })
	return p
}

// command runs a command to its end.
func command(t *testing.T, vars map[string]string, args ...string) (exit int, stdout, stderr string) {
	t.Helper()
	p := start(t, vars, args...)
	exit = <-p.exit
	return exit, p.stdout.String(), p.stderr.String()
}

func must(t *testing.T, vars map[string]string, args ...string) string {
	t.Helper()
	exit, stdout, stderr := command(t, vars, args...)
	if exit != 0 {
		t.Fatalf("tenantry %v exits with %d: %s", args, exit, stderr)
	}
	return stdout
}

// fails runs a command that must fail, and say each of the texts.
func fails(t *testing.T, vars map[string]string, args []string, says ...string) {
	t.Helper()
	exit, _, stderr := command(t, vars, args...)
	for _, s := range says {
		if exit == 0 || !strings.Contains(stderr, s) {
			t.Errorf("tenantry %v exits with %d and says\n%s\nwant a failure that says %q", args, exit, stderr, s)
		}
	}
	if strings.Contains(stderr, "hunter2") || strings.Contains(stderr, provisiontest.PAT) {
		t.Errorf("tenantry %v shows a secret: %s", args, stderr)
	}
}

// settings are what serve needs: kong reads the process's environment, so those
// that are no secrets are flags.
func settings(t *testing.T, databaseURL, clarifai string) (vars map[string]string, flags []string, addrFile string) {
	t.Helper()
	dir := t.TempDir()
	keyset := filepath.Join(dir, "keyset.json")
	addrFile = filepath.Join(dir, "addr")
	vars = map[string]string{"DATABASE_URL": databaseURL, "CLARIFAI_PAT": provisiontest.PAT}
	must(t, vars, "keyset", "create", "--keyset-file", keyset)
	return vars, []string{"serve", "--keyset-file", keyset, "--addr", "127.0.0.1:0", "--internal-addr", "127.0.0.1:0",
		"--addr-file", addrFile, "--clarifai-api-base", clarifai, "--upstream-rate", "1000"}, addrFile
}

func (p *process) listening(addrFile string) {
	p.t.Helper()
	provisiontest.Eventually(p.t, "serve listens", func() bool {
		raw, err := os.ReadFile(addrFile)
		for line := range strings.SplitSeq(string(raw), "\n") {
			name, value, _ := strings.Cut(line, "=")
			switch name {
			case "TENANTRY_URL":
				p.url = value
			case "TENANTRY_INTERNAL_URL":
				p.internal = value
			}
		}
		return err == nil && p.url != "" && p.internal != ""
	})
}

func (p *process) ready() {
	p.t.Helper()
	provisiontest.Eventually(p.t, "serve is ready", func() bool {
		status, _ := p.get(p.internal + "/readyz")
		return status == http.StatusOK
	})
}

func (p *process) get(url string) (int, string) {
	p.t.Helper()
	return p.request(http.MethodGet, url, "")
}

// metric reads a metric without labels.
func (p *process) metric(name string) float64 {
	p.t.Helper()
	_, text := p.get(p.internal + "/metrics")
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			v, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			if err != nil {
				p.t.Fatal(err)
			}
			return v
		}
	}
	p.t.Fatalf("there is no metric %s", name)
	return 0
}

// request sends a request; headers are name, value pairs.
func (p *process) request(method, url, token string, headers ...string) (int, string) {
	p.t.Helper()
	req, err := http.NewRequestWithContext(p.t.Context(), method, url, nil)
	if err != nil {
		p.t.Fatal(err)
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	for i := 0; i+1 < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer func() { _ = resp.Body.Close() }()
	raw, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, string(raw)
}

// From an empty database to a tenant, and to the end, as an operator does it.
func TestEndToEnd(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	url := pgtest.EmptyURL(t).Reveal()
	vars, serve, addrFile := settings(t, url, w.Clarifai)

	fails(t, vars, serve, "run `tenantry migrate up`")
	fails(t, vars, []string{"migrate", "status"}, "run `tenantry migrate up`")
	must(t, vars, "migrate", "up")
	must(t, vars, "migrate", "up")
	if out := must(t, vars, "migrate", "status"); !strings.Contains(out, "schema version") {
		t.Errorf("migrate status prints %q", out)
	}
	token := strings.TrimSpace(must(t, vars, "token", "create", "--name", "saas", "--role", "provisioner"))
	if !strings.HasPrefix(token, "tnty_") || strings.ContainsAny(token, "\n ") {
		t.Fatalf("token create prints %q; want a token and nothing else", token)
	}
	if out := must(t, vars, "token", "list"); !strings.Contains(out, "saas") || strings.Contains(out, token) {
		t.Errorf("token list prints %q", out)
	}

	p := start(t, vars, serve...)
	p.listening(addrFile)
	p.ready()
	if status, body := p.request(http.MethodPut, p.url+"/v1/tenants/user_42", token); status != http.StatusCreated || !strings.Contains(body, `"credentials"`) {
		t.Errorf("sign-up answers %d %s", status, body)
	}
	if status, body := p.request(http.MethodGet, p.url+"/v1/tenants/user_42", token); status != http.StatusOK || !strings.Contains(body, `"active"`) {
		t.Errorf("look-up answers %d %s", status, body)
	}
	if status, body := p.get(p.internal + "/livez"); status != http.StatusOK {
		t.Errorf("/livez answers %d %s", status, body)
	}
	must(t, vars, "healthcheck", "--internal-url", p.internal)
	for _, name := range []string{
		`tenantry_http_requests_total{code="201",method="PUT",route="/v1/tenants/{tenant_id}"} 1`,
		`tenantry_upstream_calls_total{call="PostApps",outcome="ok"} `,
		`tenantry_work_total{kind="app",outcome="done"} `,
		`tenantry_build_duration_seconds_count `, `tenantry_tenants{state="active"}`, `go_goroutines`,
		`tenantry_recovery_mode{state="watching"} 0`, `tenantry_recovery_undecided_findings 0`, `tenantry_control_record_failing 0`, `tenantry_upstream_paused 0`, `tenantry_upstream_pat_refused 0`,
		`tenantry_report_timestamp_seconds 0`, `tenantry_audit_sealed_timestamp_seconds 1`,
	} {
		provisiontest.Eventually(t, "the metrics have "+name, func() bool {
			_, metrics := p.get(p.internal + "/metrics")
			return strings.Contains(metrics, name)
		})
	}
	if status, _ := p.get(p.url + "/metrics"); status != http.StatusNotFound {
		t.Errorf("/metrics on the public listener answers %d", status)
	}

	reconcileByCommand(t, w, vars, p.url)
	for _, name := range []string{`tenantry_report_findings{kind="app_unknown"} 0`, `tenantry_report_timestamp_seconds 1`} {
		provisiontest.Eventually(t, "the metrics have "+name, func() bool {
			_, metrics := p.get(p.internal + "/metrics")
			return strings.Contains(metrics, name)
		})
	}

	must(t, vars, "token", "revoke", strings.Split(token, "_")[1])
	provisiontest.Eventually(t, "a token that was revoked in the database is refused", func() bool { // the replica reads of it
		status, _ := p.request(http.MethodGet, p.url+"/v1/tenants/user_42", token)
		return status == http.StatusUnauthorized
	})
	p.stop()
	if exit := <-p.exit; exit != 0 {
		t.Errorf("serve exits with %d: %s", exit, p.stderr.String())
	}
	if status, _ := p.get(p.url + "/v1/upstream"); status != 0 {
		t.Errorf("the API still answers %d", status)
	}
	for _, secret := range []string{token, provisiontest.PAT, w.AppKeys()[0].ID} {
		if strings.Contains(p.stderr.String(), secret) {
			t.Errorf("a secret is in the log")
		}
	}
	fails(t, vars, []string{"healthcheck", "--internal-url", p.internal}, "refused")
	fails(t, vars, []string{"migrate", "down"}, "--yes")
	must(t, vars, "migrate", "down", "--yes", "--steps", "100")
	fails(t, vars, []string{"migrate", "status"}, "run `tenantry migrate up`")
}

// An older image whose migration job finds a newer schema, as in a rollback.
func TestMigrateUpOnNewerSchema(t *testing.T) {
	t.Parallel()
	url := pgtest.EmptyURL(t)
	vars := map[string]string{"DATABASE_URL": url.Reveal()}
	if exit, _, log := command(t, vars, "migrate", "up"); exit != 0 || !strings.Contains(log, "creates the schema") {
		t.Errorf("migrate up of a new database exits with %d: %s", exit, log)
	}
	must(t, vars, "migrate", "down", "--yes")
	if exit, _, log := command(t, vars, "migrate", "up"); exit != 0 || !strings.Contains(log, fmt.Sprintf("migration %d (", postgres.KnownSchema())) || !strings.Contains(log, ") blocks ") {
		t.Errorf("migrate up exits with %d and does not say what it blocks: %s", exit, log)
	}
	conn := pgtest.Conn(t, url)
	exec := func(sql string) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	exec(`UPDATE schema_migrations SET version = version + 1`)
	if exit, _, log := command(t, vars, "migrate", "up"); exit != 0 || !strings.Contains(log, "this binary can serve on it") {
		t.Errorf("migrate up on a newer schema exits with %d: %s", exit, log)
	}
	exec(fmt.Sprintf(`CREATE OR REPLACE FUNCTION tenantry_oldest_code() RETURNS integer LANGUAGE sql IMMUTABLE AS 'SELECT %d'`, postgres.KnownSchema()+1))
	fails(t, vars, []string{"migrate", "up"}, "run a newer tenantry", "tenantry migrate down")
}

// reconcileByCommand finds a key that is gone and has it made again.
func reconcileByCommand(t *testing.T, w *provisiontest.World, vars map[string]string, url string) {
	t.Helper()
	with := maps.Clone(vars)
	fails(t, with, []string{"reconcile", "--url", url}, "tenantry token create")
	with["TENANTRY_TOKEN"] = strings.TrimSpace(must(t, vars, "token", "create", "--name", "ops", "--role", "viewer"))
	fails(t, with, []string{"reconcile", "--url", url}, "role admin", "role_forbidden")
	with["TENANTRY_TOKEN"] = strings.TrimSpace(must(t, vars, "token", "create", "--name", "ops", "--role", "admin"))
	fails(t, with, []string{"reconcile", "--url", "nowhere"}, "TENANTRY_URL")
	fails(t, with, []string{"reconcile", "--url", url, "--repair", "rec_1"}, "no report of this token")
	if exit, out, log := command(t, with, "reconcile", "--url", url); exit != 0 || out != "" || !strings.Contains(log, "differences: 0") {
		t.Errorf("reconcile exits with %d and prints %q, %q", exit, out, log)
	}

	removeByHand(t, w, "/keys/"+w.AppKeys()[0].ID)
	exit, out, log := command(t, with, "reconcile", "--url", url)
	if exit != 3 || !strings.Contains(out, "key_gone") || !strings.Contains(out, "user_42") {
		t.Errorf("reconcile exits with %d and prints\n%s%s", exit, out, log)
	}
	_, token, _ := strings.Cut(log, "--repair ")
	token = strings.TrimSpace(token)
	if exit, out, log := command(t, with, "reconcile", "--url", url, "--repair", token); exit != 0 || !strings.Contains(out, "done") {
		t.Errorf("the repair exits with %d and prints\n%s%s", exit, out, log)
	}
	var report struct {
		Kind  string           `json:"kind"`
		Items []map[string]any `json:"items"`
	}
	provisiontest.Eventually(t, "the key is made again", func() bool { return len(w.AppKeys()) == 1 })
	exit, out, log = command(t, with, "reconcile", "--url", url, "--json")
	if err := json.Unmarshal([]byte(out), &report); err != nil || exit != 0 || report.Kind != "report" || len(report.Items) != 0 {
		t.Errorf("reconcile --json exits with %d and prints\n%s%s", exit, out, log)
	}
}

// removeByHand removes something from Clarifai behind Tenantry's back.
func removeByHand(t *testing.T, w *provisiontest.World, path string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodDelete, w.Clarifai+"/v2/users/"+string(provisiontest.Operator)+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Key "+provisiontest.PAT)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("DELETE %s answers %s", path, resp.Status)
	}
}

// A request that waits when the service is told to stop is answered, not cut off.
func TestStopAnswersThoseWhoWait(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	w.Faults(map[string]any{"call": "PostApps", "drop_before": true})
	vars, serve, addrFile := settings(t, w.URL.Reveal(), w.Clarifai)
	token := strings.TrimSpace(must(t, vars, "token", "create", "--name", "saas", "--role", "provisioner"))
	p := start(t, vars, append(serve, "--shutdown-timeout", "5s")...)
	p.listening(addrFile)
	p.ready()
	answered := make(chan string, 1)
	go func() {
		status, body := p.request(http.MethodPut, p.url+"/v1/tenants/user_1", token, "Prefer", "wait=60")
		answered <- fmt.Sprint(status, " ", body)
	}()
	provisiontest.Eventually(t, "the build is tried", func() bool { return w.State().Calls["PostApps"] > 0 })
	p.stop()
	if got := <-answered; !strings.HasPrefix(got, "202 ") {
		t.Errorf("the request is answered %s; want 202", got)
	}
	if exit := <-p.exit; exit != 0 {
		t.Errorf("serve exits with %d: %s", exit, p.stderr.String())
	}
}

// After SIGTERM no request fails: for TENANTRY_SHUTDOWN_DELAY requests are served, and each response
// closes its connection, so that the client's next request goes to another replica.
func TestSignal(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	vars, serve, addrFile := settings(t, w.URL.Reveal(), w.Clarifai)
	token := strings.TrimSpace(must(t, vars, "token", "create", "--name", "saas", "--role", "provisioner"))
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, append(serve, "--pool-max", "0", "--shutdown-delay", "3s")...)
	log := &buffer{}
	cmd.Env, cmd.Stderr = append(os.Environ(), asCommand+"=1"), log
	for name, value := range vars {
		cmd.Env = append(cmd.Env, name+"="+value)
	}
	done, err := localpg.StartChild(cmd)
	if err != nil {
		t.Fatal(err)
	}
	p := &process{t: t}
	p.listening(addrFile)
	p.ready()
	if status, body := p.request(http.MethodPut, p.url+"/v1/tenants/user_1", token, "Prefer", "wait=30"); status != http.StatusCreated {
		t.Fatalf("sign-up returns %d %s", status, body)
	}

	var clients sync.WaitGroup
	var requests atomic.Int64
	ending := make(chan struct{}) // closed once the replica is not ready
	for range 40 {
		clients.Go(func() {
			client := &http.Client{Transport: &http.Transport{MaxConnsPerHost: 1}}
			for last := false; !last; requests.Add(1) {
				select {
				case <-ending:
					last = true
				default:
				}
				// A request with a body is not repeated by the client when its connection breaks.
				req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, p.url+"/v1/tenants/user_1", strings.NewReader("{}"))
				if err != nil {
					t.Error(err)
					return
				}
				req.Header.Set("Authorization", "Bearer "+token)
				req.Header.Set("Content-Type", "application/json")
				resp, err := client.Do(req)
				if err != nil {
					t.Error(err)
					return
				}
				_, _ = io.Copy(io.Discard, resp.Body)
				_ = resp.Body.Close()
				if resp.StatusCode != http.StatusOK || last && !resp.Close {
					t.Errorf("a request returns %s, and closes its connection: %v", resp.Status, resp.Close)
				}
			}
		})
	}
	provisiontest.Eventually(t, "all clients send requests", func() bool { return requests.Load() > 200 })
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	provisiontest.Eventually(t, "the replica is not ready", func() bool {
		status, body := p.get(p.internal + "/readyz")
		return status == http.StatusServiceUnavailable && strings.Contains(body, "shutting down")
	})
	close(ending)
	clients.Wait()
	<-done
	if code := cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("serve exits with %d: %s", code, log.String())
	}
}

// The first build waits for the control record. If it cannot be read at first, it is read again
// soon, not at its next renewal a minute later.
func TestFirstSignUpWhenControlFails(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	w.Faults(map[string]any{"call": "GetApp", "http": 503})
	vars, serve, addrFile := settings(t, w.URL.Reveal(), w.Clarifai)
	token := strings.TrimSpace(must(t, vars, "token", "create", "--name", "saas", "--role", "provisioner"))
	p := start(t, vars, serve...)
	p.listening(addrFile)
	p.ready()
	provisiontest.Eventually(t, "the control record is asked for", func() bool { return w.State().Calls["GetApp"] > 0 })
	w.Faults()
	if status, body := p.request(http.MethodPut, p.url+"/v1/tenants/user_1", token, "Prefer", "wait=30"); status != http.StatusCreated {
		t.Errorf("sign-up answers %d %s", status, body)
	}
}

// The database may be away at the start and in between: requests are told so, and
// all goes on by itself.
func TestDatabaseAway(t *testing.T) {
	t.Parallel()
	cluster, stop, err := localpg.ForTests(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	w := provisiontest.New(t)
	if err := cluster.CreateDatabase(t.Context(), "tenantry"); err != nil {
		t.Fatal(err)
	}
	vars, serve, addrFile := settings(t, cluster.URL("tenantry"), w.Clarifai)
	must(t, vars, "migrate", "up")
	token := strings.TrimSpace(must(t, vars, "token", "create", "--name", "saas", "--role", "provisioner"))
	halt := func() {
		t.Helper()
		if err := cluster.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	resume := func() {
		t.Helper()
		if err := cluster.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	away := func(p *process, code string, ready int) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, p.url+"/v1/tenants/user_2", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+token)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		var body struct{ Code, Detail string }
		if err := json.NewDecoder(resp.Body).Decode(&body); err != nil || resp.StatusCode != http.StatusServiceUnavailable ||
			resp.Header.Get("Retry-After") == "" || body.Code != code {
			t.Errorf("without a database a sign-up answers %d %v %+v, %v; want 503 %s", resp.StatusCode, resp.Header, body, err, code)
		}
		provisiontest.Eventually(t, fmt.Sprint("/readyz returns ", ready, " and says why"), func() bool {
			status, text := p.get(p.internal + "/readyz")
			return status == ready && strings.Contains(text, "the database cannot be reached")
		})
		if status, text := p.get(p.internal + "/readyz/writes"); status != http.StatusServiceUnavailable {
			t.Errorf("/readyz/writes returns %d %s", status, text)
		}
		if status, _ := p.get(p.internal + "/livez"); status != http.StatusOK {
			t.Errorf("/livez answers %d", status)
		}
	}

	halt()
	fails(t, vars, []string{"token", "list"}, "database cannot be reached")
	p := start(t, vars, serve...)
	p.listening(addrFile)
	away(p, "starting", http.StatusServiceUnavailable)
	resume()
	p.ready()
	if status, body := p.request(http.MethodPut, p.url+"/v1/tenants/user_1", token); status != http.StatusCreated {
		t.Fatalf("sign-up answers %d %s", status, body)
	}
	// Once the log is followed beyond the sign-up, what is held of it stays.
	signedUp := time.Now()
	provisiontest.Eventually(t, "the change log is followed beyond the sign-up", func() bool {
		behind := p.metric("tenantry_cache_behind_seconds")
		return behind >= 0 && behind < time.Since(signedUp).Seconds()
	})
	provisiontest.Eventually(t, "a look-up is answered from memory", func() bool {
		hits := p.metric("tenantry_cache_hits_total")
		if status, body := p.request(http.MethodGet, p.url+"/v1/tenants/user_1", token); status != http.StatusOK {
			t.Fatalf("a look-up answers %d %s", status, body)
		}
		return p.metric("tenantry_cache_hits_total") > hits
	})
	halt()
	// Look-ups of what is in memory go on.
	away(p, "database_unavailable", http.StatusOK)
	if status, body := p.request(http.MethodGet, p.url+"/v1/tenants/user_1", token); status != http.StatusOK {
		t.Errorf("without a database a look-up answers %d %s", status, body)
	}
	resume()
	p.ready()
	provisiontest.Eventually(t, "sign-ups work again", func() bool {
		status, _ := p.request(http.MethodPut, p.url+"/v1/tenants/user_2", token)
		return status == http.StatusCreated || status == http.StatusOK
	})
	if s := w.State(); s.Apps != 2 {
		t.Errorf("the simulator holds %d apps; want 2", s.Apps)
	}
	p.stop()
	if exit := <-p.exit; exit != 0 {
		t.Errorf("serve exits with %d: %s", exit, p.stderr.String())
	}
}

// A name may not hide in a list or a log, nor change how it is shown.
func TestTokenNames(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"", " ", "a\nb", "a\tb", "a\x1b[31mb", "a\u202eb", strings.Repeat("é", 129)} {
		fails(t, map[string]string{"DATABASE_URL": "postgres://nobody@127.0.0.1:1/none"},
			[]string{"token", "create", "--role", "viewer", "--name", name}, "tenantry: --name ")
	}
	fails(t, map[string]string{"DATABASE_URL": "postgres://nobody@127.0.0.1:1/none"},
		[]string{"token", "create", "--role", "viewer", "--name", strings.Repeat("é", 128)}, "database cannot be reached")
}

// Every fault of the settings is reported at once, and no secret with them.
func TestFaultsOfSettings(t *testing.T) {
	t.Parallel()
	fails(t, nil, []string{"serve", "--addr", "nowhere", "--internal-addr", ":65536", "--shutdown-delay", "-1s", "--shutdown-timeout", "0s", "--app-prefix", "TOO-LONG", "--upstream-rate", "0", "--clarifai-api-base", "ftp:x",
		"--workers", "0", "--items-per-call", "101", "--cache-entries", "-1", "--max-stale", "-1s", "--recovery-watch", "10ms", "--pool-min", "-1", "--key-scopes", "Everything", "--base-workflow", "a b", "--upstream-timeout", "1m"},
		"\n  - the database is not named: set DATABASE_URL", "\n  - TENANTRY_ADDR: ", "\n  - TENANTRY_INTERNAL_ADDR: the port of \":65536\"", "tenantry keyset create", "CLARIFAI_PAT",
		"\n  - TENANTRY_APP_PREFIX: app prefix", "\n  - TENANTRY_UPSTREAM_RATE: upstream rate", "\n  - CLARIFAI_API_BASE: ",
		"\n  - TENANTRY_WORKERS: ", "\n  - TENANTRY_ITEMS_PER_CALL: 101 must be", "\n  - TENANTRY_POOL_MIN: ", "\n  - TENANTRY_KEY_SCOPES: ", "\n  - TENANTRY_BASE_WORKFLOW: ", "\n  - TENANTRY_UPSTREAM_TIMEOUT: upstream timeout",
		"\n  - TENANTRY_CACHE_ENTRIES: ", "\n  - TENANTRY_MAX_STALE: ", "\n  - TENANTRY_RECOVERY_WATCH: 10ms must be at least 1s", "\n  - TENANTRY_SHUTDOWN_DELAY: ", "\n  - TENANTRY_SHUTDOWN_TIMEOUT: ")
	for _, addr := range []string{":http", ":-1", "127.0.0.1:99999", "[::1]:"} {
		fails(t, nil, []string{"serve", "--addr", addr}, "TENANTRY_ADDR: ")
	}
	fails(t, nil, []string{"serve", "--upstream-rate", "NaN"}, "TENANTRY_UPSTREAM_RATE: upstream rate NaN")
	dir := t.TempDir()
	empty := filepath.Join(dir, "empty")
	if err := os.WriteFile(empty, []byte(" \n"), 0o600); err != nil {
		t.Fatal(err)
	}
	fails(t, map[string]string{"DATABASE_URL": "postgres://u:hunter2@h:port/d"},
		[]string{"serve", "--clarifai-pat-file", filepath.Join(dir, "none"), "--keyset-file", empty},
		"DATABASE_URL: not a Postgres connection string", "CLARIFAI_PAT_FILE", "none")
	fails(t, map[string]string{"DATABASE_URL": "postgres://u:hunter2@h/d", "CLARIFAI_PAT": provisiontest.PAT, "TENANTRY_KEYSET": "hunter2",
		"DATABASE_DIRECT_URL": "postgres://u:hunter2@h/d"},
		[]string{"serve", "--clarifai-pat-file", empty, "--keyset-file", empty, "--database-direct-url-file", empty},
		"both CLARIFAI_PAT and CLARIFAI_PAT_FILE", "both TENANTRY_KEYSET and TENANTRY_KEYSET_FILE",
		"both DATABASE_DIRECT_URL and DATABASE_DIRECT_URL_FILE")
	fails(t, map[string]string{"DATABASE_URL": "postgres://u:hunter2@h/d"}, []string{"migrate", "status", "--database-url-file", empty},
		"both DATABASE_URL and DATABASE_URL_FILE")
	badURL := filepath.Join(dir, "url")
	if err := os.WriteFile(badURL, []byte("postgres://u:12/hunter2@h/d\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	fails(t, nil, []string{"token", "list", "--database-url-file", badURL}, "DATABASE_URL_FILE: not a Postgres connection string")
	if exit, _, stderr := command(t, nil, "serve", "--clarifai-pat", "x"); exit != 2 || !strings.Contains(stderr, "unknown flag") {
		t.Errorf("a secret can be given by flag: exit %d, %s", exit, stderr)
	}
}

// Settings that cannot be converted are reported at once too, with the faults of
// the others; an empty variable counts as not set. Not parallel: kong reads the
// environment of the process.
func TestUnconvertibleSettings(t *testing.T) {
	for name, value := range map[string]string{"TENANTRY_WORKERS": "many", "TENANTRY_UPSTREAM_TIMEOUT": "5", "TENANTRY_UPSTREAM_RATE": "fast",
		"TENANTRY_DATABASE_MAX_CONNS": "3e9", "TENANTRY_LOG_LEVEL": "loud", "TENANTRY_MARK_TENANTS": "perhaps"} {
		t.Setenv(name, value)
	}
	for _, name := range []string{"CLARIFAI_API_BASE", "TENANTRY_ADDR", "TENANTRY_SHUTDOWN_TIMEOUT", "TENANTRY_KEYSET_FILE", "TENANTRY_LOG_FORMAT"} {
		t.Setenv(name, "")
	}
	args := []string{"serve", "--app-prefix", "TOO-LONG", "--shutdown-delay", "long"}
	fails(t, nil, args, `  - TENANTRY_WORKERS: "many" must be a whole number`+"\n", `  - TENANTRY_UPSTREAM_TIMEOUT: "5" must be a duration such as 5s or 1m30s`+"\n",
		`  - TENANTRY_UPSTREAM_RATE: "fast" must be a number`+"\n", `  - TENANTRY_DATABASE_MAX_CONNS: "3e9" must be a whole number`+"\n",
		`  - TENANTRY_LOG_LEVEL: "loud" must be one of debug, info, warn, error`+"\n", `  - TENANTRY_SHUTDOWN_DELAY: "long" must be a duration`,
		`  - TENANTRY_MARK_TENANTS: "perhaps" must be true or false`+"\n",
		"  - TENANTRY_APP_PREFIX: ", "  - the operator's PAT is missing")
	exit, _, stderr := command(t, nil, args...)
	for _, s := range []string{"API_BASE", "TENANTRY_ADDR", "TENANTRY_SHUTDOWN_TIMEOUT", "TENANTRY_LOG_FORMAT", "from 1 to 1000", "from 2 to 1000"} {
		if strings.Contains(stderr, s) {
			t.Errorf("exit %d: the faults name %q, which is none:\n%s", exit, s, stderr)
		}
	}
	must(t, nil, "version") // the settings of serve are none of its business
	fails(t, nil, []string{"token", "create", "--name", "x", "--role", "viewer", "--expires-in", "soon"}, `--expires-in: "soon" must be a duration`)
	if exit, _, stderr := command(t, nil, "serve", "--workers"); exit != 2 || !strings.Contains(stderr, "--workers") {
		t.Errorf("a flag without its value: exit %d, %s", exit, stderr)
	}
}

func TestPortTaken(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	vars, serve, _ := settings(t, w.URL.Reveal(), w.Clarifai)
	fails(t, vars, append(serve, "--addr", taken.Addr().String()), "TENANTRY_ADDR", "address already in use")
}

// The first start on a database waits for Clarifai, as it waits for the database.
func TestFirstStartWithoutClarifai(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	w.Faults(map[string]any{"call": "*", "http": 503})
	vars, serve, addrFile := settings(t, w.URL.Reveal(), w.Clarifai)
	p := start(t, vars, serve...)
	p.listening(addrFile)
	provisiontest.Eventually(t, "it waits", func() bool { return strings.Contains(p.stderr.String(), "waiting for Clarifai") })
	w.Faults()
	p.ready()
}

// Keyset and PAT are found wrong at the start and not at the first tenant.
func TestWrongKeysetAndPAT(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	vars, serve, addrFile := settings(t, w.URL.Reveal(), w.Clarifai)
	p := start(t, vars, serve...)
	p.listening(addrFile)
	p.ready()
	p.stop()
	<-p.exit

	_, otherServe, _ := settings(t, w.URL.Reveal(), w.Clarifai)
	fails(t, vars, otherServe, "keyset is not the one this database was sealed with")
	w.AddPAT("fedcba9876543210fedcba9876543210", "umbrella")
	vars["CLARIFAI_PAT"] = "fedcba9876543210fedcba9876543210"
	fails(t, vars, serve, `the PAT belongs to the Clarifai user "umbrella"`)
	fails(t, vars, []string{"keyset", "create", "--keyset-file", serve[2]}, "is there already")
}

func TestHelp(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"--help"}, {"serve", "--help"}, {"token", "create", "--help"}} {
		exit, stdout, _ := command(t, nil, args...)
		if exit != 0 || !strings.Contains(stdout, "Usage: tenantry") {
			t.Errorf("tenantry %v exits with %d and prints %s", args, exit, stdout)
		}
	}
	_, stdout, _ := command(t, nil, "serve", "--help")
	for _, s := range []string{"TENANTRY_ADDR", "CLARIFAI_PAT_FILE", "TENANTRY_UPSTREAM_RATE", "14"} {
		if !strings.Contains(stdout, s) {
			t.Errorf("serve --help does not mention %s", s)
		}
	}
	if exit, stdout, _ := command(t, nil, "version"); exit != 0 || strings.TrimSpace(stdout) == "" {
		t.Errorf("version exits with %d and prints %q", exit, stdout)
	}
	if exit, stdout, stderr := command(t, nil); exit != 2 || stdout != "" || !strings.HasPrefix(stderr, "usage: tenantry <command>") ||
		!strings.Contains(stderr, "  migrate ") || strings.Count(stderr, "\n") > 25 {
		t.Errorf("without a command it exits with %d and prints %q %s", exit, stdout, stderr)
	}
	if exit, _, stderr := command(t, nil, "frobnicate"); exit != 2 || !strings.Contains(stderr, "--help") {
		t.Errorf("an unknown command exits with %d and says %s", exit, stderr)
	}
}

// Each setting alone is missing, empty or invalid, and all others are valid.
func TestOneFaultOfSettings(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	vars, serve, _ := settings(t, w.URL.Reveal(), w.Clarifai)
	dir := t.TempDir()
	files := map[string]string{"empty": "", "blank": " \n", "bad": "hunter2 hunter2\n", "binary": "\x00\xff"}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	file := func(name string) string { return filepath.Join(dir, name) }
	const noPAT = "tenantry: the operator's PAT is missing: set CLARIFAI_PAT or CLARIFAI_PAT_FILE\n"
	for _, c := range []struct {
		name, value string // of a variable; no name: none changes
		flags       []string
		says        string
	}{
		{"CLARIFAI_PAT", "", nil, noPAT},
		{"CLARIFAI_PAT", " ", nil, "CLARIFAI_PAT"},
		{"CLARIFAI_PAT", "hunter2 hunter2", nil, "CLARIFAI_PAT"},
		{"CLARIFAI_PAT", "", []string{"--clarifai-pat-file", file("none")}, "CLARIFAI_PAT_FILE"},
		{"CLARIFAI_PAT", "", []string{"--clarifai-pat-file", file("empty")}, "CLARIFAI_PAT_FILE"},
		{"CLARIFAI_PAT", "", []string{"--clarifai-pat-file", file("blank")}, "CLARIFAI_PAT_FILE"},
		{"CLARIFAI_PAT", "", []string{"--clarifai-pat-file", file("bad")}, "CLARIFAI_PAT_FILE"},
		{"CLARIFAI_PAT", "", []string{"--clarifai-pat-file", file("binary")}, "CLARIFAI_PAT_FILE"},
		{"CLARIFAI_PAT", "", []string{"--clarifai-pat-file", dir}, "CLARIFAI_PAT_FILE"},
		{"DATABASE_URL", "", nil, "tenantry: the database is not named: set DATABASE_URL"},
		{"DATABASE_URL", " ", nil, "DATABASE_URL"},
		{"DATABASE_URL", "mysql://u:hunter2@h/d", nil, "DATABASE_URL: not a Postgres connection string"},
		{"DATABASE_URL", "", []string{"--database-url-file", file("none")}, "DATABASE_URL_FILE"},
		{"DATABASE_URL", "", []string{"--database-url-file", file("empty")}, "DATABASE_URL_FILE"},
		{"DATABASE_URL", "", []string{"--database-url-file", file("bad")}, "DATABASE_URL_FILE"},
		{"DATABASE_URL", "", []string{"--database-url-file", file("binary")}, "DATABASE_URL_FILE"},
		{"DATABASE_DIRECT_URL", "hunter2", nil, "DATABASE_DIRECT_URL"},
		{"", "", []string{"--database-direct-url-file", file("empty")}, "DATABASE_DIRECT_URL_FILE"},
		{"", "", []string{"--keyset-file", ""}, "the keyset is missing"},
		{"", "", []string{"--keyset-file", file("none")}, "none"},
		{"", "", []string{"--keyset-file", file("empty")}, "empty"},
		{"", "", []string{"--keyset-file", file("bad")}, "bad"},
		{"", "", []string{"--keyset-file", file("binary")}, "binary"},
		{"", "", []string{"--keyset-file", dir}, dir},
		{"TENANTRY_KEYSET_KMS", "hunter2", nil, "TENANTRY_KEYSET_KMS"},
		{"", "", []string{"--profiles-file", file("none")}, "TENANTRY_PROFILES_FILE"},
		{"", "", []string{"--profiles-file", file("empty")}, "TENANTRY_PROFILES_FILE"},
		{"", "", []string{"--profiles-file", file("binary")}, "TENANTRY_PROFILES_FILE"},
		{"", "", []string{"--clarifai-api-base", "clarifai"}, "CLARIFAI_API_BASE"},
		{"", "", []string{"--addr", "nowhere"}, "TENANTRY_ADDR"},
		{"", "", []string{"--addr-file", filepath.Join(dir, "none", "file")}, "none"},
	} {
		t.Run(fmt.Sprintf("%s=%q %q", c.name, c.value, c.flags), func(t *testing.T) {
			t.Parallel()
			with := maps.Clone(vars)
			if c.name != "" {
				with[c.name] = c.value
			}
			fails(t, with, append(slices.Clone(serve), c.flags...), c.says)
		})
	}
}

// On a copy of the database a read-only service serves lookups only, without PAT and keyset.
func TestReadOnly(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	url := pgtest.URL(t)
	vars, serve, addrFile := settings(t, url.Reveal(), w.Clarifai)
	token := strings.TrimSpace(must(t, vars, "token", "create", "--name", "saas", "--role", "provisioner"))
	reading := []string{"serve", "--read-only", "--addr", "127.0.0.1:0", "--internal-addr", "127.0.0.1:0", "--addr-file", addrFile}
	without := maps.Clone(vars)
	delete(without, "CLARIFAI_PAT")
	fails(t, without, reading, "TENANTRY_READ_ONLY: no service has run on this database yet")

	p := start(t, vars, serve...)
	p.listening(addrFile)
	p.ready()
	if status, body := p.request(http.MethodPut, p.url+"/v1/tenants/user_1", token, "Prefer", "wait=30"); status != http.StatusCreated {
		t.Fatalf("sign-up returns %d %s", status, body)
	}
	p.stop()
	<-p.exit

	fails(t, vars, reading, "TENANTRY_READ_ONLY: a PAT is set", "unset CLARIFAI_PAT and CLARIFAI_PAT_FILE")
	fails(t, without, append(reading, "--clarifai-pat-file", serve[2]), "TENANTRY_READ_ONLY: a PAT is set")
	copied := maps.Clone(without)
	copied["DATABASE_URL"] = pgtest.Restore(t, pgtest.Dump(t, url)).Reveal()
	calls, files := w.State().Calls, incarnations(t, copied["DATABASE_URL"])
	p = start(t, copied, reading...)
	p.listening(addrFile)
	p.ready()
	if status, body := p.get(p.internal + "/readyz"); status != http.StatusOK || !strings.Contains(body, "read-only: lookups only") {
		t.Errorf("/readyz returns %d %s", status, body)
	}
	if status, body := p.request(http.MethodGet, p.url+"/v1/tenants/user_1", token); status != http.StatusOK || !strings.Contains(body, `"active"`) {
		t.Errorf("a lookup returns %d %s", status, body)
	}
	for _, c := range [][2]string{{http.MethodPut, "/v1/tenants/user_2"}, {http.MethodGet, "/v1/tenants/user_1/keys/default/secret"}, {http.MethodGet, "/v1/upstream"}} {
		if status, body := p.request(c[0], p.url+c[1], token); status != http.StatusForbidden || !strings.Contains(body, `"read_only"`) {
			t.Errorf("%s %s returns %d %s", c[0], c[1], status, body)
		}
	}
	p.stop() // each loop works once when it starts, and the process waits for its loops
	if exit := <-p.exit; exit != 0 {
		t.Errorf("serve exits with %d: %s", exit, p.stderr.String())
	}
	if after := w.State().Calls; !maps.Equal(after, calls) {
		t.Errorf("calls to Clarifai: %v, before %v", after, calls)
	}
	if after := incarnations(t, copied["DATABASE_URL"]); after != files {
		t.Errorf("%d incarnations, before %d", after, files)
	}
}

func incarnations(t *testing.T, url string) (n int) {
	t.Helper()
	if err := pgtest.Conn(t, tenant.NewSecret(url)).QueryRow(t.Context(), `SELECT count(*) FROM incarnations`).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}
