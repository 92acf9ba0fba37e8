package localpg

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	embedded "github.com/fergusstrange/embedded-postgres"
)

// oldest is the oldest Postgres that Tenantry runs on.
const oldest = 15

// ErrNoPostgres says that there is no Postgres of the right age here, and that
// none could be had.
var ErrNoPostgres = errors.New("there is no Postgres 15 or newer here: install it (Debian: apt-get install postgresql; macOS: brew install postgresql@17), or set PG_BINDIR to the folder of its initdb")

// Binaries are the server programs of one Postgres.
type Binaries struct {
	Dir   string // has initdb and postgres
	Major int
}

// FindOrFetch finds the server programs, or gets them: on Debian, as root, from
// the distribution, else by a download. Say is told of what takes long.
func FindOrFetch(ctx context.Context, say func(string)) (Binaries, error) {
	b, err := Find(ctx)
	if !errors.Is(err, ErrNoPostgres) {
		return b, err
	}
	// The tests of several packages come here at once: one of them installs.
	unlock, err := lockInstallation()
	if err != nil {
		return b, err
	}
	defer unlock()
	if b, err = Find(ctx); !errors.Is(err, ErrNoPostgres) {
		return b, err
	}
	if os.Getuid() == 0 {
		if _, aptErr := exec.LookPath("apt-get"); aptErr == nil {
			say("installing the distribution's Postgres")
			if err := install(ctx); err != nil {
				return b, fmt.Errorf("%w (installing it failed: %v)", ErrNoPostgres, err)
			}
			return Find(ctx)
		}
		return b, err // what is downloaded refuses root too, and starts at once
	}
	say("downloading Postgres")
	if err := download(); err != nil {
		return b, fmt.Errorf("%w (downloading it failed: %v)", ErrNoPostgres, err)
	}
	return Find(ctx)
}

// lockInstallation waits until no other process of ours installs Postgres. The
// lock ends with the process, however that ends.
func lockInstallation() (unlock func(), err error) {
	path := filepath.Join(os.TempDir(), fmt.Sprintf("tenantry-install-%d.lock", os.Getuid()))
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		_ = f.Close()
		return nil, err
	}
	return func() { _ = f.Close() }, nil
}

// Find looks for the server programs: in PG_BINDIR, which must have them if it is
// set, then in PATH and the usual places, the newest first.
func Find(ctx context.Context) (Binaries, error) {
	if dir := os.Getenv("PG_BINDIR"); dir != "" {
		b, err := look(ctx, dir)
		if err != nil {
			return b, fmt.Errorf("PG_BINDIR: %w", err)
		}
		return b, nil
	}
	var found []Binaries
	for _, dir := range places() {
		if b, err := look(ctx, dir); err == nil {
			found = append(found, b)
		}
	}
	if len(found) == 0 {
		return Binaries{}, ErrNoPostgres
	}
	return slices.MaxFunc(found, func(a, b Binaries) int { return a.Major - b.Major }), nil
}

func places() []string {
	dirs := filepath.SplitList(os.Getenv("PATH"))
	for _, pattern := range []string{
		"/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin", // Debian, Red Hat
		"/opt/homebrew/opt/postgresql*/bin", "/usr/local/opt/postgresql*/bin", // Homebrew
		"/Applications/Postgres.app/Contents/Versions/*/bin",
		filepath.Join(downloads(), "bin"),
	} {
		matches, _ := filepath.Glob(pattern)
		dirs = append(dirs, matches...)
	}
	return dirs
}

var versionText = regexp.MustCompile(`\(PostgreSQL\) (\d+)`)

func look(ctx context.Context, dir string) (Binaries, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return Binaries{}, err
	}
	for _, name := range []string{"initdb", "postgres"} {
		if _, err := exec.LookPath(filepath.Join(dir, name)); err != nil {
			return Binaries{}, fmt.Errorf("%s has no %s", dir, name)
		}
	}
	out, err := exec.CommandContext(ctx, filepath.Join(dir, "postgres"), "--version").Output()
	if err != nil {
		return Binaries{}, fmt.Errorf("%s does not run: %w", filepath.Join(dir, "postgres"), err)
	}
	m := versionText.FindSubmatch(out)
	if m == nil {
		return Binaries{}, fmt.Errorf("%s says it is %q, which is no Postgres", filepath.Join(dir, "postgres"), strings.TrimSpace(string(out)))
	}
	major, err := strconv.Atoi(string(m[1]))
	if err != nil || major < oldest {
		return Binaries{}, fmt.Errorf("%s is Postgres %s; at least %d is needed", dir, m[1], oldest)
	}
	// A folder of links may hold some of the programs only.
	if real, err := filepath.EvalSymlinks(filepath.Join(dir, "postgres")); err == nil {
		if _, err := exec.LookPath(filepath.Join(filepath.Dir(real), "initdb")); err == nil {
			dir = filepath.Dir(real)
		}
	}
	return Binaries{Dir: dir, Major: major}, nil
}

// install installs Debian's Postgres without the cluster that the package would
// make and start.
func install(ctx context.Context) error {
	apt := func(args ...string) error {
		cmd := exec.CommandContext(ctx, "apt-get", append([]string{"-o", "DPkg::Lock::Timeout=300"}, args...)...)
		cmd.Env = append(os.Environ(), "DEBIAN_FRONTEND=noninteractive")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("apt-get %s: %w: %s", strings.Join(args, " "), err, tail(out))
		}
		return nil
	}
	if err := apt("update"); err != nil {
		return err
	}
	if err := apt("install", "-y", "--no-install-recommends", "postgresql-common"); err != nil {
		return err
	}
	undo, err := makeNoCluster("/etc/postgresql-common/createcluster.conf")
	if err != nil {
		return err
	}
	defer undo()
	return apt("install", "-y", "--no-install-recommends", "postgresql")
}

// makeNoCluster tells Debian's packages to make no cluster, until undo.
func makeNoCluster(conf string) (undo func(), err error) {
	before, err := os.ReadFile(conf)
	if err != nil {
		return nil, err
	}
	var after strings.Builder
	for lines := bufio.NewScanner(strings.NewReader(string(before))); lines.Scan(); {
		if !strings.HasPrefix(strings.TrimSpace(lines.Text()), "create_main_cluster") {
			after.WriteString(lines.Text() + "\n")
		}
	}
	after.WriteString("create_main_cluster = false\n")
	if err := os.WriteFile(conf, []byte(after.String()), 0o644); err != nil {
		return nil, err
	}
	return func() { _ = os.WriteFile(conf, before, 0o644) }, nil
}

// downloads is where a downloaded Postgres is kept.
func downloads() string {
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = os.TempDir()
	}
	return filepath.Join(cache, "tenantry", "postgres-"+runtime.GOARCH)
}

// download gets the programs by way of embedded-postgres, which only downloads
// when it starts a server.
func download() error {
	runtimeDir, err := os.MkdirTemp("", "tenantry-postgres-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(runtimeDir) }()
	port, err := freePort()
	if err != nil {
		return err
	}
	var log strings.Builder
	pg := embedded.NewDatabase(embedded.DefaultConfig().Version(embedded.V17).Port(uint32(port)).
		BinariesPath(downloads()).RuntimePath(runtimeDir).Logger(&log))
	if err := pg.Start(); err != nil {
		return err
	}
	return pg.Stop()
}
