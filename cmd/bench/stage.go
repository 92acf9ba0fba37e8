package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/keyring"
	"github.com/tenantry/tenantry/internal/localpg"
	"github.com/tenantry/tenantry/internal/tenant"
)

const (
	operator = "acme"
	patience = time.Minute // with what should take a second or two
)

// A stage is everything that runs.
type stage struct {
	dir, bin string
	cluster  *localpg.Cluster
	clarifai *program
	tenantry *program
	pat      string
	token    string // of a provisioner
	conn     *pgx.Conn
	keys     *keyring.Keyring
	made     int // ready apps so far
}

// A program is one of the others.
type program struct {
	url  string
	log  string
	cmd  *exec.Cmd
	done <-chan struct{}
}

// start starts a program of ours, and waits until it answers at path.
func (s *stage) start(ctx context.Context, name, path string, env []string, args ...string) (*program, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	addr := l.Addr().String()
	_ = l.Close()
	p := &program{url: "http://" + addr, log: filepath.Join(s.dir, name+".log"),
		cmd: exec.Command(filepath.Join(s.bin, name), append(args, "--addr", addr)...)}
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() { _ = log.Close() }()
	p.cmd.Env, p.cmd.Stdout, p.cmd.Stderr = env, log, log
	if p.done, err = localpg.StartChild(p.cmd); err != nil {
		return nil, fmt.Errorf("%w (`make build` puts the programs beside this one)", err)
	}
	err = await(ctx, name+" answers; its log is "+p.log, func() (bool, error) {
		select {
		case <-p.done:
			return false, fmt.Errorf("it has ended: %s", p.cmd.ProcessState)
		default:
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.url+path, nil)
		if err != nil {
			return false, err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return false, err
		}
		_ = resp.Body.Close()
		return resp.StatusCode == http.StatusOK || resp.StatusCode == http.StatusUnauthorized, nil
	})
	return p, err
}

// await waits until ok, and says what it last heard if it waits in vain.
func await(ctx context.Context, what string, ok func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		done, err := ok()
		if done {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("waited in vain: %s", what), err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// raise starts everything, and waits until sign-ups are served. What it returns is to
// be struck also where it fails.
func raise(ctx context.Context, dir string) (*stage, error) {
	s := &stage{dir: dir}
	self, err := os.Executable()
	if err != nil {
		return s, err
	}
	s.bin = filepath.Dir(self)
	secret := make([]byte, 16)
	_, _ = rand.Read(secret) // never fails
	s.pat = hex.EncodeToString(secret)
	// Not a throwaway: a sign-up that is answered is on disk. All that is read fits into
	// the buffers, of Tenantry as of pgbench.
	if s.cluster, err = localpg.Open(ctx, localpg.Config{Dir: filepath.Join(dir, "postgres"),
		Settings: []string{"max_connections=250", "shared_buffers=512MB"}}); err != nil {
		return s, err
	}
	for _, name := range []string{"tenantry", "pgbench"} {
		if err := s.cluster.CreateDatabase(ctx, name); err != nil {
			return s, err
		}
	}
	if s.clarifai, err = s.start(ctx, "clarifaisim", "/_sim/state", []string{"CLARIFAISIM_PAT=" + s.pat},
		"--user-id", operator, "--rate-limit", "0", "--latency", "50ms"); err != nil {
		return s, err
	}
	keyset := filepath.Join(dir, "keyset.json")
	env := []string{"DATABASE_URL=" + s.cluster.URL("tenantry"), "CLARIFAI_PAT=" + s.pat, "CLARIFAI_API_BASE=" + s.clarifai.url,
		"TENANTRY_KEYSET_FILE=" + keyset}
	command := func(args ...string) (string, error) {
		cmd := exec.CommandContext(ctx, filepath.Join(s.bin, "tenantry"), args...)
		var stderr bytes.Buffer
		cmd.Env, cmd.Stderr = env, &stderr
		out, err := cmd.Output()
		if err != nil {
			err = fmt.Errorf("tenantry %s: %w: %s", args[0], err, stderr.Bytes())
		}
		return strings.TrimSpace(string(out)), err
	}
	for _, args := range [][]string{{"keyset", "create"}, {"migrate", "up"}} {
		if _, err := command(args...); err != nil {
			return s, err
		}
	}
	if s.token, err = command("token", "create", "--name", "bench", "--role", "provisioner"); err != nil {
		return s, err
	}
	if s.keys, err = keyring.Load(keyset); err != nil {
		return s, err
	}
	if s.tenantry, err = s.start(ctx, "tenantry", "/v1/upstream", env, "serve", "--internal-addr", "127.0.0.1:0"); err != nil {
		return s, err
	}
	if s.conn, err = pgx.Connect(ctx, s.cluster.URL("tenantry")); err != nil {
		return s, err
	}
	return s, await(ctx, "the fence of the new database is down, and its pool is planned", func() (bool, error) {
		var up struct{ Fence *struct{} }
		answer, err := s.get(ctx, "/v1/upstream")
		if err == nil {
			err = json.Unmarshal(answer, &up)
		}
		if err != nil || up.Fence != nil {
			return false, err
		}
		var planned bool
		err = s.conn.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pools WHERE profile = $1)`, tenant.DefaultProfile).Scan(&planned)
		return planned, err
	})
}

// strike stops everything.
func (s *stage) strike() error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if s.conn != nil {
		_ = s.conn.Close(ctx)
	}
	for _, p := range []*program{s.tenantry, s.clarifai} {
		if p != nil && p.done != nil {
			_ = p.cmd.Process.Kill()
			<-p.done
		}
	}
	if s.cluster == nil {
		return nil
	}
	return errors.Join(s.cluster.Stop(ctx), s.cluster.Remove())
}

func (s *stage) get(ctx context.Context, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.tenantry.url+path, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+s.token)
	return answerOf(req)
}

func answerOf(req *http.Request) ([]byte, error) {
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode >= 300 {
		err = fmt.Errorf("%s %s answers %s: %s", req.Method, req.URL.Path, resp.Status, body)
	}
	return body, err
}

// fill makes the tenants that are looked up, and the tables of pgbench.
func (s *stage) fill(ctx context.Context, pgbench string) error {
	hash := tenant.Attributes{}.Hash()
	longAgo := time.Now().Add(-24 * time.Hour) // not demand that the pool is planned for
	app := func(i int) string { return appPrefix + numbered(i) }
	if err := s.copyApps(ctx, tenants, app, func(i int) []any {
		return []any{app(i), tenant.DefaultProfile, "held", longAgo, longAgo, longAgo, longAgo, tenantID(i), 1}
	}); err != nil {
		return err
	}
	if _, err := s.conn.CopyFrom(ctx, pgx.Identifier{"tenants"},
		[]string{"id", "profile", "state", "state_since", "app_id", "attributes_hash", "created_at"},
		pgx.CopyFromSlice(tenants, func(i int) ([]any, error) {
			return []any{tenantID(i), tenant.DefaultProfile, "active", longAgo, app(i), hash, longAgo.Add(time.Duration(i) * time.Microsecond)}, nil
		})); err != nil {
		return err
	}
	if _, err := s.conn.Exec(ctx, `VACUUM ANALYZE`); err != nil {
		return err
	}
	_, err := s.runPgbench(ctx, pgbench, "-i", "-q", "-s", "5")
	return err
}

// copyApps copies n apps with a key each.
func (s *stage) copyApps(ctx context.Context, n int, app func(int) string, values func(int) []any) error {
	var revision string // of the pool: the apps are as Tenantry would make them
	if err := s.conn.QueryRow(ctx, `SELECT revision FROM pools WHERE profile = $1`, tenant.DefaultProfile).Scan(&revision); err != nil {
		return err
	}
	if _, err := s.conn.CopyFrom(ctx, pgx.Identifier{"apps"},
		[]string{"id", "profile", "state", "made_at", "ready_at", "proven_at", "marked_at", "tenant_id", "tenant_generation", "profile_revision"},
		pgx.CopyFromSlice(n, func(i int) ([]any, error) { return append(values(i), revision), nil })); err != nil {
		return err
	}
	_, err := s.conn.CopyFrom(ctx, pgx.Identifier{"keys"},
		[]string{"id", "app_id", "name", "state", "scopes", "ciphertext", "fingerprint", "hint", "activated_at"},
		pgx.CopyFromSlice(n, func(i int) ([]any, error) {
			id, err := uuid.NewV7()
			if err != nil {
				return nil, err
			}
			text := make([]byte, 16)
			_, _ = rand.Read(text)
			secret := tenant.NewSecret(hex.EncodeToString(text))
			sealed, err := s.keys.Seal(id, secret)
			return []any{id, app(i), tenant.DefaultKey, "active", []string{tenant.ScopeAll}, sealed, s.keys.Fingerprint(secret),
				s.keys.Hint(secret), time.Now()}, err
		}))
	return err
}

// fillPool makes apps until so many are ready. They are put where a build would have
// left them, since builds keep to the rate of calls to Clarifai.
func (s *stage) fillPool(ctx context.Context, ready int) error {
	var there int
	if err := s.conn.QueryRow(ctx, `SELECT count(*) FROM apps WHERE state = 'ready'`).Scan(&there); err != nil {
		return err
	}
	n := max(0, ready-there)
	app := func(i int) string { return fmt.Sprint("ready-", numbered(s.made+i)) }
	const atOnce = 1000
	for from := 0; from < n; from += atOnce {
		var apps []any
		for i := from; i < min(n, from+atOnce); i++ {
			apps = append(apps, map[string]string{"id": app(i)})
		}
		body, err := json.Marshal(map[string]any{"apps": apps})
		if err != nil {
			return err
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.clarifai.url+"/v2/users/"+operator+"/apps", bytes.NewReader(body))
		if err != nil {
			return err
		}
		req.Header.Set("Authorization", "Key "+s.pat)
		if _, err := answerOf(req); err != nil {
			return err
		}
	}
	now := time.Now()
	if err := s.copyApps(ctx, n, app, func(i int) []any {
		return []any{app(i), tenant.DefaultProfile, "ready", now, now, now, nil, nil, nil}
	}); err != nil {
		return err
	}
	s.made += n
	_, err := s.conn.Exec(ctx, `ANALYZE apps, keys`)
	return err
}

// allPooled reports whether no sign-up had to wait for an app to be built.
func (s *stage) allPooled(ctx context.Context) error {
	var waited, ready int
	if err := s.conn.QueryRow(ctx, `SELECT (SELECT count(*) FROM tenants WHERE state <> 'active' OR state_since <> created_at AND id LIKE 'new%'),
		(SELECT count(*) FROM apps WHERE state = 'ready')`).Scan(&waited, &ready); err != nil {
		return err
	}
	if waited > 0 || ready == 0 {
		return fmt.Errorf("%d sign-ups found no ready app, %d are left: that is no measure of pooled ones", waited, ready)
	}
	return nil
}

// withCPU adds to a measurement what Tenantry and Postgres used of the processors
// meanwhile.
func (s *stage) withCPU(measure func() (sample, error)) (sample, error) {
	tenantry, postgres := s.tenantry.cmd.Process.Pid, s.cluster.PID()
	tenantryBefore, postgresBefore := cpuOf(tenantry), cpuOf(postgres)
	got, err := measure()
	got.tenantryCPU, got.postgresCPU = cpuOf(tenantry)-tenantryBefore, cpuOf(postgres)-postgresBefore
	return got, err
}

// cpuOf is how long a process and its children have run, also those that have ended,
// or 0 where there is no /proc to say so.
func cpuOf(pid int) time.Duration {
	files, _ := filepath.Glob("/proc/[0-9]*/stat") // the pattern is in order
	ticks := 0
	for _, file := range files {
		raw, err := os.ReadFile(file)
		if err != nil { // it has just ended, and counts for its parent
			continue
		}
		head, rest, _ := strings.Cut(string(raw), " (")
		rest = rest[strings.LastIndex(rest, ")")+1:] // the name before may hold anything
		fields := strings.Fields(rest)
		own := head == strconv.Itoa(pid)
		if len(fields) < 15 || !own && fields[1] != strconv.Itoa(pid) {
			continue
		}
		times := fields[11:13] // in user and kernel mode
		if own {
			times = fields[11:15] // and of children that were waited for
		}
		for _, text := range times {
			n, _ := strconv.Atoi(text)
			ticks += n
		}
	}
	return time.Duration(ticks) * 10 * time.Millisecond // a hundred a second, on every Linux that Go runs on
}
