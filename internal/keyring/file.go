package keyring

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/tink-crypto/tink-go/v2/aead"
	"github.com/tink-crypto/tink-go/v2/insecurecleartextkeyset"
	"github.com/tink-crypto/tink-go/v2/keyset"
	"github.com/tink-crypto/tink-go/v2/prf"

	"github.com/tenantry/tenantry/internal/tenant"
)

// keysetFile is the file that holds both keysets. Each is a cleartext Tink
// keyset in JSON, which Tink's own tools read too.
type keysetFile struct {
	Version     int             `json:"version"`
	Seal        json.RawMessage `json:"seal"`
	Fingerprint json.RawMessage `json:"fingerprint"`
}

const (
	fileVersion = 1
	maxFileSize = 1 << 20
)

// Create makes a new keyset file that only its owner can read. It never
// replaces a file: what a lost keyset sealed is lost. When it returns nil the
// file is on disk; when it fails it leaves no file of its own behind. The folder
// must exist.
func Create(path string) error { return Source{Path: path}.Create(context.Background()) }

// Create is Create for a keyset that may be wrapped.
func (s Source) Create(ctx context.Context) error {
	text, err := generate()
	if err == nil {
		text, err = s.wrap(ctx, text)
	}
	if err != nil {
		return fmt.Errorf("make keyset: %w", err)
	}
	path := s.Path
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("keyset file %s is there already and is not replaced: the keys it sealed could not be opened any more", path)
	}
	if err != nil {
		return fmt.Errorf("create keyset file: %w", err)
	}
	_, err = f.Write(text)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = syncFolder(filepath.Dir(path))
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write keyset file: %w", err), os.Remove(path))
	}
	return nil
}

// syncFolder makes the name of a new file survive a power cut.
func syncFolder(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// generate makes the text of a keyset file with a new key in each keyset.
func generate() ([]byte, error) {
	seal, err := keyset.NewHandle(aead.AES256GCMKeyTemplate())
	if err != nil {
		return nil, err
	}
	fingerprint, err := keyset.NewHandle(prf.HMACSHA256PRFKeyTemplate())
	if err != nil {
		return nil, err
	}
	return marshal(seal, fingerprint)
}

// marshal makes the text of a keyset file.
func marshal(seal, fingerprint *keyset.Handle) ([]byte, error) {
	file := keysetFile{Version: fileVersion}
	for _, part := range []struct {
		keys *keyset.Handle
		text *json.RawMessage
	}{{seal, &file.Seal}, {fingerprint, &file.Fingerprint}} {
		var b bytes.Buffer
		if err := insecurecleartextkeyset.Write(part.keys, keyset.NewJSONWriter(&b)); err != nil {
			return nil, err
		}
		*part.text = b.Bytes()
	}
	text, err := json.MarshalIndent(file, "", "  ")
	return append(text, '\n'), err
}

// Load reads a keyset file in the clear: see Source.
func Load(path string) (*Keyring, error) { return Source{Path: path}.Load(context.Background()) }

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // nothing was written
	return io.ReadAll(io.LimitReader(f, maxFileSize+1))
}

// Parse reads the text of a keyset in the clear, as a secret store hands it out. Its
// errors never quote it.
func Parse(text tenant.Secret) (*Keyring, error) {
	return Source{Text: text}.Load(context.Background())
}

// handles reads the two keysets of a file.
func (s Source) handles(ctx context.Context, text []byte) (seal, fingerprint *keyset.Handle, err error) {
	switch {
	case len(text) > maxFileSize:
		return nil, nil, fmt.Errorf("it has more than %d bytes and cannot be a keyset", maxFileSize)
	case len(bytes.TrimSpace(text)) == 0:
		return nil, nil, errors.New("it is empty")
	}
	if text, err = s.unwrap(ctx, text); err != nil {
		return nil, nil, err
	}
	var file keysetFile
	if err := json.Unmarshal(text, &file); err != nil {
		// The decoder's error may quote the text.
		if syntax, ok := errors.AsType[*json.SyntaxError](err); ok {
			return nil, nil, fmt.Errorf("it is not JSON: a fault at byte %d", syntax.Offset)
		}
		return nil, nil, errors.New(`it is not a JSON object with "version", "seal" and "fingerprint"`)
	}
	if file.Version != fileVersion {
		return nil, nil, fmt.Errorf("its version is %d, and this program knows version %d only", file.Version, fileVersion)
	}
	seal, err = readKeyset("seal", file.Seal)
	if err != nil {
		return nil, nil, err
	}
	fingerprint, err = readKeyset("fingerprint", file.Fingerprint)
	return seal, fingerprint, err
}
