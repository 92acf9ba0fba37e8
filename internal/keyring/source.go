package keyring

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/tink-crypto/tink-go/v2/aead"

	"github.com/tenantry/tenantry/internal/tenant"
)

// A Keeper encrypts and decrypts with a key that never leaves a KMS. Its errors must
// not hold what is secret.
type Keeper interface {
	Encrypt(ctx context.Context, plaintext []byte) ([]byte, error)
	Decrypt(ctx context.Context, ciphertext []byte) ([]byte, error)
}

// A Source is where a keyset is read from: a file, or a text in its place.
type Source struct {
	Path   string
	Text   tenant.Secret // used if Path is empty
	Keeper Keeper        // that wrapped it; nil for a keyset in the clear
}

// keeperTimeout bounds one call to a KMS.
const keeperTimeout = 10 * time.Second

// Load reads the keyset. Its errors name the file and what is wrong with it, and
// never quote it. The file's mode is not looked at: secret mounts of Kubernetes are
// readable by a group.
func (s Source) Load(ctx context.Context) (*Keyring, error) {
	text, err := s.Read()
	if err != nil {
		return nil, err
	}
	return s.Parse(ctx, text)
}

// Read reads the text of the keyset, wrapped as it may be.
func (s Source) Read() ([]byte, error) {
	if s.Path == "" {
		if !s.Text.IsSet() {
			return nil, errors.New("keyset: it is empty")
		}
		return []byte(s.Text.Reveal()), nil
	}
	text, err := readFile(s.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("keyset file %s does not exist: make one with `tenantry keyset create`, or restore the one this deployment had", s.Path)
	}
	if err != nil {
		return nil, fmt.Errorf("read keyset file: %w", err) // names the path
	}
	return text, nil
}

// Parse makes a Keyring of what Read returned.
func (s Source) Parse(ctx context.Context, text []byte) (*Keyring, error) {
	seal, fingerprint, err := s.handles(ctx, text)
	if err == nil {
		var k *Keyring
		if k, err = newKeyring(seal, fingerprint); err == nil {
			return k, nil
		}
	}
	return nil, s.fault(err)
}

// fault says of which keyset err is.
func (s Source) fault(err error) error {
	if s.Path == "" {
		return fmt.Errorf("keyset: %w", err)
	}
	return fmt.Errorf("keyset file %s: %w", s.Path, err)
}

// wrappedFile is a keyset file that a KMS wrapped: what is inside is sealed by a key
// of its own, since a KMS encrypts a few hundred bytes at most, and that key by the
// KMS.
type wrappedFile struct {
	Version int    `json:"version"`
	Wrapped []byte `json:"wrapped"`
}

const wrapDomain = "tenantry keyset"

// keeperAEAD is a Keeper as Tink sees it. Tink gives it no associated data.
type keeperAEAD struct{ Keeper }

func (k keeperAEAD) EncryptWithContext(ctx context.Context, plaintext, _ []byte) ([]byte, error) {
	return k.Encrypt(ctx, plaintext)
}

func (k keeperAEAD) DecryptWithContext(ctx context.Context, ciphertext, _ []byte) ([]byte, error) {
	return k.Decrypt(ctx, ciphertext)
}

// wrap makes the text of a keyset file fit to be written: wrapped, if there is a
// Keeper.
func (s Source) wrap(ctx context.Context, text []byte) ([]byte, error) {
	if s.Keeper == nil {
		return text, nil
	}
	envelope, err := aead.NewKMSEnvelopeAEADWithContext(aead.AES256GCMKeyTemplate(), keeperAEAD{s.Keeper})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, keeperTimeout)
	defer cancel()
	file := wrappedFile{Version: fileVersion}
	if file.Wrapped, err = envelope.EncryptWithContext(ctx, text, []byte(wrapDomain)); err != nil {
		return nil, fmt.Errorf("the KMS cannot wrap it: %w", err)
	}
	wrapped, err := json.MarshalIndent(file, "", "  ")
	return append(wrapped, '\n'), err
}

// unwrap undoes wrap.
func (s Source) unwrap(ctx context.Context, text []byte) ([]byte, error) {
	var file wrappedFile
	isWrapped := json.Unmarshal(text, &file) == nil && file.Wrapped != nil
	switch {
	case s.Keeper == nil && isWrapped:
		return nil, errors.New("a KMS has wrapped it: set TENANTRY_KEYSET_KMS")
	case s.Keeper == nil:
		return text, nil
	case !isWrapped:
		return nil, errors.New("no KMS has wrapped it, though one is set: wrap it with `tenantry keyset wrap`")
	case file.Version != fileVersion:
		return nil, fmt.Errorf("its version is %d, and this program knows version %d only", file.Version, fileVersion)
	}
	envelope, err := aead.NewKMSEnvelopeAEADWithContext(aead.AES256GCMKeyTemplate(), keeperAEAD{s.Keeper})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, keeperTimeout)
	defer cancel()
	text, err = envelope.DecryptWithContext(ctx, file.Wrapped, []byte(wrapDomain))
	if err != nil {
		return nil, fmt.Errorf("the KMS cannot unwrap it: %w", err)
	}
	return text, nil
}
