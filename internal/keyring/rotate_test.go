package keyring_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/uuid"
	"gocloud.dev/secrets/localsecrets"

	"github.com/tenantry/tenantry/internal/keyring"
	"github.com/tenantry/tenantry/internal/tenant"
)

func rotate(t testing.TB, path string, prepare bool) keyring.SealKey {
	t.Helper()
	key, err := keyring.Source{Path: path}.Rotate(t.Context(), prepare)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func primary(t testing.TB, k *keyring.Keyring) tenant.SealKeyID {
	t.Helper()
	for _, key := range k.SealKeys() {
		if key.Primary {
			return key.ID
		}
	}
	t.Fatal("there is no primary")
	return 0
}

// sealedBy seals something and returns which key did.
func sealedBy(t testing.TB, k *keyring.Keyring) tenant.SealKeyID {
	t.Helper()
	sealed, err := k.Seal(uuid.New(), tenant.NewSecret(secretText))
	if err != nil {
		t.Fatal(err)
	}
	by, ok := tenant.SealKeyOf(sealed)
	if !ok {
		t.Fatal("what was sealed does not say by which key")
	}
	return by
}

func alone(t testing.TB, path string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(entries) != 1 {
		t.Errorf("beside the keyset file there are %v, %v", entries, err)
	}
}

func TestRotate(t *testing.T) {
	t.Parallel()
	path := newFile(t)
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	k := load(t, path)
	old, id := primary(t, k), uuid.New()
	sealed, err := k.Seal(id, tenant.NewSecret(secretText))
	if err != nil {
		t.Fatal(err)
	}
	probe, err := k.Probe()
	if err != nil {
		t.Fatal(err)
	}

	prepared := rotate(t, path, true)
	if again := rotate(t, path, true); again.ID != prepared.ID {
		t.Errorf("preparing twice makes the keys %d and %d; want one", prepared.ID, again.ID)
	}
	k = load(t, path)
	if by := sealedBy(t, k); by != old || !k.Opens(prepared.ID) || len(k.Older()) != 0 {
		t.Errorf("with the key %d prepared, %d seals and the older ones are %v; want %d and none", prepared.ID, by, k.Older(), old)
	}
	if now := rotate(t, path, false); now.ID != prepared.ID {
		t.Errorf("rotate makes the key %d the primary; want the prepared one, %d", now.ID, prepared.ID)
	}
	third := rotate(t, path, false)
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("the file's mode is %v, %v; want that it had", info.Mode(), err)
	}
	alone(t, path)

	next := load(t, path)
	if by := sealedBy(t, next); by != third.ID {
		t.Errorf("the key %d seals; want %d", by, third.ID)
	}
	if got, err := next.Open(id, sealed); err != nil || got.Reveal() != secretText {
		t.Errorf("what an old key sealed is not opened: %v", err)
	}
	if older := next.Older(); len(older) != 2 || older[0] != old || older[1] != prepared.ID {
		t.Errorf("the older keys are %v; want %d and %d", older, old, prepared.ID)
	}
	if next.DeploymentID("acme") != k.DeploymentID("acme") || !bytes.Equal(next.Fingerprint(tenant.NewSecret("x")), k.Fingerprint(tenant.NewSecret("x"))) {
		t.Error("a rotation changes fingerprints")
	}

	anew, err := next.Reseal(id, sealed)
	if by, _ := tenant.SealKeyOf(anew); err != nil || by != third.ID {
		t.Fatalf("sealed anew by %d, %v; want %d", by, err, third.ID)
	}
	if got, err := next.Open(id, anew); err != nil || got.Reveal() != secretText {
		t.Errorf("what was sealed anew is not opened: %v", err)
	}
	if more, err := next.Reseal(id, anew); more != nil || err != nil {
		t.Errorf("what the primary sealed is sealed anew: %v", err)
	}
	if back, err := k.Reseal(id, anew); back != nil || err != nil {
		t.Errorf("an older keyset seals back what a newer one sealed: %v", err)
	}
	if other, err := next.Reseal(uuid.New(), sealed); other != nil || err == nil {
		t.Error("what another row's key is was sealed anew")
	}
	probe, err = next.ResealProbe(probe)
	if err != nil || next.Check(probe) != nil {
		t.Errorf("the probe cannot be sealed anew: %v", err)
	}
	if err := load(t, newFile(t)).Check(probe); err == nil {
		t.Error("another keyset passes for this one")
	}
	owner, err := next.SealOwner("app", tenant.AppOwner{Tenant: "user_1"})
	if by := keyring.SealedOwnerBy(owner); err != nil || by == nil || *by != third.ID {
		t.Errorf("the owner was sealed by %v, %v", by, err)
	}
}

// A keyring in use takes another keyset up; what it cannot open has it look for one.
func TestReplace(t *testing.T) {
	t.Parallel()
	path := newFile(t)
	k := load(t, path)
	if err := k.Replace(load(t, newFile(t))); err == nil {
		t.Error("a keyset with other fingerprints is taken up")
	}
	rotate(t, path, false)
	id := uuid.New()
	sealed, err := load(t, path).Seal(id, tenant.NewSecret(secretText))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := k.Open(id, sealed); !errors.Is(err, tenant.Unavailable) {
		t.Errorf("what a newer keyset sealed is answered %v; want that it is tried again", err)
	}
	asked := 0
	k.OnUnknown(func() {
		asked++
		if err := k.Replace(load(t, path)); err != nil {
			t.Error(err)
		}
	})
	if got, err := k.Open(id, sealed); err != nil || got.Reveal() != secretText || asked != 1 {
		t.Errorf("it opens nothing after it has asked %d times: %v", asked, err)
	}
}

func TestRemove(t *testing.T) {
	t.Parallel()
	path := newFile(t)
	source := keyring.Source{Path: path}
	old := primary(t, load(t, path))
	fine := func(*keyring.Keyring) error { return nil }
	if err := source.Remove(t.Context(), old, fine); err == nil || !strings.Contains(err.Error(), "primary") {
		t.Errorf("the primary is removed: %v", err)
	}
	if err := source.Remove(t.Context(), old+1, fine); err == nil || !strings.Contains(err.Error(), "no key") {
		t.Errorf("a key that is not there is removed: %v", err)
	}
	rotate(t, path, false)
	before := readFile(t, path)
	needed := errors.New("it is needed")
	if err := source.Remove(t.Context(), old, func(*keyring.Keyring) error { return needed }); !errors.Is(err, needed) || readFile(t, path) != before {
		t.Errorf("a key that is needed: %v; want the file as it was", err)
	}
	if err := source.Remove(t.Context(), old, fine); err != nil || load(t, path).Opens(old) {
		t.Errorf("the key is not removed: %v", err)
	}
	alone(t, path)
}

// No two commands at once lose a key that one of them added.
func TestRotateAtOnce(t *testing.T) {
	t.Parallel()
	path := newFile(t)
	var wg sync.WaitGroup
	var mu sync.Mutex
	var made []tenant.SealKeyID
	for range 20 {
		wg.Go(func() {
			key, err := keyring.Source{Path: path}.Rotate(t.Context(), false)
			if err != nil {
				if !strings.Contains(err.Error(), "another command") {
					t.Error(err)
				}
				return
			}
			mu.Lock()
			defer mu.Unlock()
			made = append(made, key.ID)
		})
	}
	wg.Wait()
	k := load(t, path)
	for _, id := range made {
		if !k.Opens(id) {
			t.Errorf("the key %d was made and is lost", id)
		}
	}
	if len(made) == 0 || len(k.SealKeys()) != len(made)+1 {
		t.Errorf("%d keys were made, and there are %d", len(made), len(k.SealKeys()))
	}
	alone(t, path)
}

// A link stays a link, and a file is never half written.
func TestRotateKeepsTheFile(t *testing.T) {
	t.Parallel()
	path := newFile(t)
	link := filepath.Join(t.TempDir(), "link.json")
	if err := os.Symlink(path, link); err != nil {
		t.Fatal(err)
	}
	rotate(t, link, false)
	if info, err := os.Lstat(link); err != nil || info.Mode()&os.ModeSymlink == 0 || len(load(t, path).SealKeys()) != 2 {
		t.Errorf("the link is %v, %v, of %d keys", info.Mode(), err, len(load(t, path).SealKeys()))
	}
	before := readFile(t, path)
	away := keyring.Source{Path: path, Keeper: brokenKeeper{}}
	if _, err := away.Rotate(t.Context(), false); err == nil || readFile(t, path) != before {
		t.Errorf("a rotation that fails, %v, changes the file", err)
	}
	if err := away.Wrap(t.Context()); err == nil || readFile(t, path) != before {
		t.Errorf("a wrapping that fails, %v, changes the file", err)
	}
	alone(t, path)
}

type brokenKeeper struct{}

func (brokenKeeper) Encrypt(context.Context, []byte) ([]byte, error) {
	return nil, errors.New("it is away")
}
func (brokenKeeper) Decrypt(context.Context, []byte) ([]byte, error) {
	return nil, errors.New("it is away")
}

func TestWrapped(t *testing.T) {
	t.Parallel()
	secret, err := localsecrets.NewRandomKey()
	if err != nil {
		t.Fatal(err)
	}
	keeper := localsecrets.NewKeeper(secret)
	defer func() { _ = keeper.Close() }()
	path := filepath.Join(t.TempDir(), "keyset.json")
	source := keyring.Source{Path: path, Keeper: keeper}
	if err := source.Create(t.Context()); err != nil {
		t.Fatal(err)
	}
	if text := readFile(t, path); strings.Contains(text, "primaryKeyId") || !strings.Contains(text, `"wrapped"`) {
		t.Errorf("the file reads %s", text)
	}
	if _, err := source.Rotate(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	k, err := source.Load(t.Context())
	if err != nil || len(k.SealKeys()) != 2 {
		t.Fatalf("the keyset is not read: %v", err)
	}
	other, err := localsecrets.NewRandomKey()
	if err != nil {
		t.Fatal(err)
	}
	otherKeeper := localsecrets.NewKeeper(other)
	defer func() { _ = otherKeeper.Close() }()
	open := newFile(t)
	for name, c := range map[string]struct {
		source keyring.Source
		says   string
	}{
		"another KMS":      {keyring.Source{Path: path, Keeper: otherKeeper}, "cannot unwrap"},
		"no KMS":           {keyring.Source{Path: path}, "TENANTRY_KEYSET_KMS"},
		"in the clear":     {keyring.Source{Path: open, Keeper: keeper}, "tenantry keyset wrap"},
		"KMS that is away": {keyring.Source{Path: path, Keeper: brokenKeeper{}}, "it is away"},
	} {
		if _, err := c.source.Load(t.Context()); err == nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), c.source.Path) {
			t.Errorf("%s: %v; want %q and the file", name, err, c.says)
		}
	}
	was := load(t, open)
	wrapped := keyring.Source{Path: open, Keeper: keeper}
	if err := wrapped.Wrap(t.Context()); err != nil {
		t.Fatal(err)
	}
	if k, err := wrapped.Load(t.Context()); err != nil || k.DeploymentID("acme") != was.DeploymentID("acme") {
		t.Errorf("the wrapped keyset is another one, %v", err)
	}
}
