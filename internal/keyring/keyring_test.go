package keyring_test

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/uuid"
	"github.com/tink-crypto/tink-go/v2/aead"
	"github.com/tink-crypto/tink-go/v2/daead"
	"github.com/tink-crypto/tink-go/v2/insecurecleartextkeyset"
	"github.com/tink-crypto/tink-go/v2/keyset"
	"github.com/tink-crypto/tink-go/v2/prf"
	tinkpb "github.com/tink-crypto/tink-go/v2/proto/tink_go_proto"
	"pgregory.net/rapid"

	"github.com/tenantry/tenantry/internal/keyring"
	"github.com/tenantry/tenantry/internal/tenant"
)

const secretText = "0123456789abcdef0123456789abcdef"

func newFile(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "keyset.json")
	if err := keyring.Create(path); err != nil {
		t.Fatal(err)
	}
	return path
}

func load(t testing.TB, path string) *keyring.Keyring {
	t.Helper()
	k, err := keyring.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func readFile(t testing.TB, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestSealOpen(t *testing.T) {
	t.Parallel()
	path := newFile(t)
	k, secret, id := load(t, path), tenant.NewSecret(secretText), uuid.New()
	sealed, err := k.Seal(id, secret)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(sealed, []byte(secretText)) {
		t.Fatal("the ciphertext holds the secret")
	}
	again, err := k.Seal(id, secret)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(sealed, again) {
		t.Error("sealing the same secret twice gave the same ciphertext")
	}
	fromSecret, err := keyring.Parse(tenant.NewSecret(readFile(t, path)))
	if err != nil {
		t.Fatal(err)
	}
	for name, k := range map[string]*keyring.Keyring{"same": k, "loaded again": load(t, path), "parsed": fromSecret} {
		got, err := k.Open(id, sealed)
		if err != nil || got.Reveal() != secretText {
			t.Errorf("%s: Open gave %v", name, err)
		}
	}

	refuse := func(why string, k *keyring.Keyring, id uuid.UUID, sealed []byte) {
		t.Helper()
		got, err := k.Open(id, sealed)
		if err == nil || got.IsSet() {
			t.Errorf("%s: Open gave a secret: %v", why, err)
		} else if strings.Contains(err.Error(), secretText) {
			t.Errorf("%s: the error holds the secret: %v", why, err)
		}
	}
	refuse("another row's id", k, uuid.New(), sealed)
	refuse("another keyset", load(t, newFile(t)), id, sealed)
	refuse("no ciphertext", k, id, nil)
	refuse("truncated", k, id, sealed[:len(sealed)-1])
	for i := range sealed {
		altered := bytes.Clone(sealed)
		altered[i] ^= 1
		refuse(fmt.Sprintf("byte %d altered", i), k, id, altered)
	}
	if _, err := k.Seal(id, tenant.Secret{}); err == nil {
		t.Error("Seal took an unset secret")
	}
	probe, err := k.Probe()
	if err != nil {
		t.Fatal(err)
	}
	refuse("a probe", k, id, probe)
}

func TestSealOpenProperty(t *testing.T) {
	t.Parallel()
	k := load(t, newFile(t))
	rapid.Check(t, func(t *rapid.T) {
		text := rapid.String().Draw(t, "secret")
		id := uuid.UUID(rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "row"))
		other := uuid.UUID(rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "other row"))
		sealed, err := k.Seal(id, tenant.NewSecret(text))
		if err != nil {
			t.Fatal(err)
		}
		got, err := k.Open(id, sealed)
		if err != nil || got.Reveal() != text {
			t.Fatalf("Open did not give back what was sealed: %v", err)
		}
		if _, err := k.Open(other, sealed); err == nil && other != id {
			t.Fatal("another row opened it")
		}
		if hint := k.Hint(tenant.NewSecret(text)); !strings.HasSuffix(text, hint) || 4*utf8.RuneCountInString(hint) > utf8.RuneCountInString(text) {
			t.Fatalf("hint %q of %q", hint, text)
		}
	})
}

// A keyset that was rotated opens what it sealed before, and seals with its new key.
func TestRotatedKeyset(t *testing.T) {
	t.Parallel()
	path := newFile(t)
	before, id := load(t, path), uuid.New()
	sealed, err := before.Seal(id, tenant.NewSecret(secretText))
	if err != nil {
		t.Fatal(err)
	}
	probe, err := before.Probe()
	if err != nil {
		t.Fatal(err)
	}

	var file map[string]json.RawMessage
	if err := json.Unmarshal([]byte(readFile(t, path)), &file); err != nil {
		t.Fatal(err)
	}
	h, err := insecurecleartextkeyset.Read(keyset.NewJSONReader(bytes.NewReader(file["seal"])))
	if err != nil {
		t.Fatal(err)
	}
	manager := keyset.NewManagerFromHandle(h)
	newID, err := manager.Add(aead.AES256GCMKeyTemplate())
	if err != nil {
		t.Fatal(err)
	}
	if err := manager.SetPrimary(newID); err != nil {
		t.Fatal(err)
	}
	rotated, err := manager.Handle()
	if err != nil {
		t.Fatal(err)
	}
	file["seal"] = keysetJSON(t, rotated)
	after := parse(t, file)

	got, err := after.Open(id, sealed)
	if err != nil || got.Reveal() != secretText {
		t.Errorf("the rotated keyset does not open an old ciphertext: %v", err)
	}
	if err := after.Check(probe); err != nil {
		t.Errorf("the rotated keyset does not open an old probe: %v", err)
	}
	sealed, err = after.Seal(id, tenant.NewSecret(secretText))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := before.Open(id, sealed); err == nil {
		t.Error("the rotated keyset still seals with its old key")
	}
	if !bytes.Equal(before.Fingerprint(tenant.NewSecret(secretText)), after.Fingerprint(tenant.NewSecret(secretText))) {
		t.Error("rotating the sealing keys changed a fingerprint")
	}
}

func keysetJSON(t testing.TB, h *keyset.Handle) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := insecurecleartextkeyset.Write(h, keyset.NewJSONWriter(&b)); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func newKeyset(t testing.TB, template *tinkpb.KeyTemplate) []byte {
	t.Helper()
	h, err := keyset.NewHandle(template)
	if err != nil {
		t.Fatal(err)
	}
	return keysetJSON(t, h)
}

func fileText(t testing.TB, file map[string]json.RawMessage) string {
	t.Helper()
	text, err := json.Marshal(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func parse(t testing.TB, file map[string]json.RawMessage) *keyring.Keyring {
	t.Helper()
	k, err := keyring.Parse(tenant.NewSecret(fileText(t, file)))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestFingerprint(t *testing.T) {
	t.Parallel()
	path := newFile(t)
	k, again, other := load(t, path), load(t, path), load(t, newFile(t))
	secret := tenant.NewSecret(secretText)
	print1 := k.Fingerprint(secret)
	if len(print1) != 32 {
		t.Errorf("a fingerprint has %d bytes, want 32", len(print1))
	}
	if !bytes.Equal(print1, again.Fingerprint(secret)) {
		t.Error("the fingerprint changed with the next Load")
	}
	if bytes.Equal(print1, other.Fingerprint(secret)) {
		t.Error("two keysets give one fingerprint")
	}
	if bytes.Equal(print1, k.Fingerprint(tenant.NewSecret(secretText+"0"))) {
		t.Error("two secrets have one fingerprint")
	}
}

// What a given keyset makes is stored, in Postgres and at Clarifai: a later
// version of this package must derive the same and open what this one sealed.
func TestStoredValuesStay(t *testing.T) {
	t.Parallel()
	text := readFile(t, filepath.Join("testdata", "keyset.json"))
	k, err := keyring.Parse(tenant.NewSecret(text))
	if err != nil {
		t.Fatal(err)
	}
	const wantPrint, wantID = "39fac866ee380c24af542faa496b86c45fd9c835fb1e6a97d94ca5be6f83b264", "6zbsym8t7ysrgw5y"
	const wantHash = "0b625756ebe4effc"
	if got := fmt.Sprintf("%x", k.Fingerprint(tenant.NewSecret(secretText))); got != wantPrint {
		t.Errorf("fingerprint is %s, was %s", got, wantPrint)
	}
	if got := k.DeploymentID("acme"); got != wantID {
		t.Errorf("deployment id is %s, was %s", got, wantID)
	}
	if got := k.TenantHash("user_42"); got != wantHash {
		t.Errorf("the hash of a tenant is %s, was %s", got, wantHash)
	}
	sealed, err := hex.DecodeString("016a975a83086ccdb2a4fda227d68f13075b9071c9bd62fba9ce115dede6269cbc1e5df92cc6015ed8a7251c358dc5c9ff86a827283b8be36610c754840a1c7ed9")
	if err != nil {
		t.Fatal(err)
	}
	got, err := k.Open(uuid.MustParse("0190a000-0000-7000-8000-000000000001"), sealed)
	if err != nil || got.Reveal() != secretText {
		t.Errorf("a stored ciphertext no longer opens: %v", err)
	}
}

func TestDeploymentID(t *testing.T) {
	t.Parallel()
	path := newFile(t)
	k := load(t, path)
	id := k.DeploymentID("acme")
	if !regexp.MustCompile(`^[0-9a-z]{16}$`).MatchString(id) {
		t.Errorf("deployment id is %q, want 16 of 0-9 a-z", id)
	}
	if got := load(t, path).DeploymentID("acme"); got != id {
		t.Errorf("the next Load calls the deployment %q, was %q", got, id)
	}
	if k.DeploymentID("other") == id {
		t.Error("two operators have one deployment id")
	}
	if load(t, newFile(t)).DeploymentID("acme") == id {
		t.Error("two keysets have one deployment id")
	}
}

func TestHint(t *testing.T) {
	t.Parallel()
	k := load(t, newFile(t))
	for text, want := range map[string]string{
		"":                  "",
		"abcd":              "",
		"0123456789abcde":   "",
		"0123456789abcdef":  "cdef",
		secretText:          "cdef",
		"ääääääääääääääääö": "äääö",
	} {
		if got := k.Hint(tenant.NewSecret(text)); got != want {
			t.Errorf("Hint(%q) = %q, want %q", text, got, want)
		}
	}
}

func TestProbe(t *testing.T) {
	t.Parallel()
	path := newFile(t)
	k := load(t, path)
	probe, err := k.Probe()
	if err != nil {
		t.Fatal(err)
	}
	if err := load(t, path).Check(probe); err != nil {
		t.Errorf("the keyset does not know its own probe: %v", err)
	}
	const want = "the keyset is not the one this database was sealed with"
	altered := bytes.Clone(probe)
	altered[len(altered)-1] ^= 1
	key, err := k.Seal(uuid.New(), tenant.NewSecret("tenantry"))
	if err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{
		"another keyset": load(t, newFile(t)).Check(probe),
		"altered":        k.Check(altered),
		"nothing":        k.Check(nil),
		"a sealed key":   k.Check(key),
	} {
		if err == nil || err.Error() != want {
			t.Errorf("%s: Check gave %v, want %q", name, err, want)
		}
	}
}

func TestCreate(t *testing.T) {
	t.Parallel()
	path := newFile(t)
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode() != 0o600 {
		t.Errorf("mode is %v, want 0600", info.Mode())
	}

	before := readFile(t, path)
	if err := keyring.Create(path); err == nil || !strings.Contains(err.Error(), path+" is there already and is not replaced") {
		t.Errorf("a second Create gave %v", err)
	}
	if readFile(t, path) != before {
		t.Error("a second Create changed the file")
	}
	if err := keyring.Create(filepath.Join(t.TempDir(), "missing", "keyset.json")); err == nil || !strings.Contains(err.Error(), "no such file or directory") {
		t.Errorf("Create in a missing folder gave %v", err)
	}
	// Not through a link either: it might point anywhere.
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(filepath.Join(t.TempDir(), "target"), link); err != nil {
		t.Fatal(err)
	}
	if err := keyring.Create(link); err == nil {
		t.Error("Create followed a dangling link")
	}
}

func TestFaultyFiles(t *testing.T) {
	t.Parallel()
	const marked = "MARKED0123456789"
	seal, fingerprint := newKeyset(t, aead.AES256GCMKeyTemplate()), newKeyset(t, prf.HMACSHA256PRFKeyTemplate())
	file := func(version string, seal, fingerprint []byte) string {
		f := map[string]json.RawMessage{"version": json.RawMessage(version)}
		if seal != nil {
			f["seal"] = seal
		}
		if fingerprint != nil {
			f["fingerprint"] = fingerprint
		}
		return fileText(t, f)
	}
	if _, err := keyring.Parse(tenant.NewSecret(file("1", seal, fingerprint))); err != nil {
		t.Fatalf("the file that the faulty ones are made from: %v", err)
	}
	twoKeys := func() []byte {
		m := keyset.NewManager()
		for range 2 {
			id, err := m.Add(prf.HMACSHA256PRFKeyTemplate())
			if err != nil {
				t.Fatal(err)
			}
			if err := m.SetPrimary(id); err != nil {
				t.Fatal(err)
			}
		}
		h, err := m.Handle()
		if err != nil {
			t.Fatal(err)
		}
		return keysetJSON(t, h)
	}

	for _, test := range []struct{ name, text, want string }{
		{"empty", "", "it is empty"},
		{"blank", " \n", "it is empty"},
		{"not JSON", marked, "it is not JSON: a fault at byte 1"},
		{"cut off", file("1", seal, fingerprint)[:100], "it is not JSON"},
		{"two documents", file("1", seal, fingerprint) + "{}", "it is not JSON"},
		{"a list", `["` + marked + `"]`, "it is not a JSON object"},
		{"a version in quotes", file(`"`+marked+`"`, seal, fingerprint), "it is not a JSON object"},
		{"no version", "{}", "its version is 0"},
		{"another version", file("2", seal, fingerprint), "its version is 2, and this program knows version 1 only"},
		{"no seal", file("1", nil, fingerprint), `"seal" is missing`},
		{"no fingerprint", file("1", seal, nil), `"fingerprint" is missing`},
		{"null", file("1", []byte("null"), fingerprint), `"seal" is missing`},
		{"seal is text", file("1", []byte(`"`+marked+`"`), fingerprint), `"seal" is not a cleartext Tink keyset`},
		{"seal has odd fields", file("1", []byte(`{"`+marked+`":1}`), fingerprint), `"seal" is not a cleartext Tink keyset`},
		{"seal has no keys", file("1", []byte(`{}`), fingerprint), `"seal" is not a cleartext Tink keyset`},
		{"seal cannot seal", file("1", fingerprint, fingerprint), `"seal" is not a keyset that this program can seal with`},
		{"seal is deterministic", file("1", newKeyset(t, daead.AESSIVKeyTemplate()), fingerprint), `"seal" is not a keyset that this program can seal with`},
		{"fingerprint is no PRF", file("1", seal, seal), `"fingerprint" is not a keyset that this program can fingerprint with`},
		{"fingerprint is short", file("1", seal, newKeyset(t, prf.AESCMACPRFKeyTemplate())), `gives less than 32 bytes`},
		{"fingerprint has two keys", file("1", seal, twoKeys()), `"fingerprint" has 2 keys and must have one`},
		{"far too long", strings.Repeat(" ", 1<<20) + marked, "cannot be a keyset"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "keyset.json")
			if err := os.WriteFile(path, []byte(test.text), 0o600); err != nil {
				t.Fatal(err)
			}
			_, loadErr := keyring.Load(path)
			_, parseErr := keyring.Parse(tenant.NewSecret(test.text))
			for _, err := range []error{loadErr, parseErr} {
				if err == nil || !strings.Contains(err.Error(), test.want) {
					t.Fatalf("got %v, want an error with %q", err, test.want)
				}
				if strings.Contains(err.Error(), marked[:6]) {
					t.Errorf("the error quotes the file: %v", err)
				}
			}
			if !strings.Contains(loadErr.Error(), path) {
				t.Errorf("Load's error does not name the file: %v", loadErr)
			}
		})
	}

	missing := filepath.Join(t.TempDir(), "keyset.json")
	if _, err := keyring.Load(missing); err == nil || !strings.Contains(err.Error(), missing+" does not exist") {
		t.Errorf("Load of a missing file gave %v", err)
	}
	if _, err := keyring.Load(t.TempDir()); err == nil || !strings.Contains(err.Error(), "is a directory") {
		t.Errorf("Load of a folder gave %v", err)
	}
	if _, err := keyring.Parse(tenant.Secret{}); err == nil {
		t.Error("Parse took an unset secret")
	}
}

func TestPrintedKeyring(t *testing.T) {
	t.Parallel()
	k := load(t, newFile(t))
	for _, format := range []string{"%v", "%+v", "%#v", "%s"} {
		if got := fmt.Sprintf(format, k); got != "[keyring]" {
			t.Errorf("%s prints %s", format, got)
		}
	}
}
