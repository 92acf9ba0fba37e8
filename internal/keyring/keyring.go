// Package keyring seals and opens the keys of tenants, and fingerprints them, so
// that Postgres holds neither their text nor anything it could be guessed from.
package keyring

import (
	"bytes"
	"encoding/base32"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/google/uuid"
	"github.com/tink-crypto/tink-go/v2/aead"
	"github.com/tink-crypto/tink-go/v2/insecurecleartextkeyset"
	"github.com/tink-crypto/tink-go/v2/keyset"
	"github.com/tink-crypto/tink-go/v2/prf"
	"github.com/tink-crypto/tink-go/v2/tink"

	"github.com/tenantry/tenantry/internal/tenant"
)

// A Keyring holds two keysets: one seals, and its keys may be replaced over time,
// also while it is in use; the other fingerprints, and never changes, since what it
// derives is stored and compared. A Keyring is safe for use by many goroutines.
type Keyring struct {
	sealing     atomic.Pointer[sealing]
	fingerprint prf.PRF
	onUnknown   atomic.Pointer[func()]
}

// A sealing is the keyset that seals, as it stands. It never changes.
type sealing struct {
	tink.AEAD
	keys []SealKey
}

// What the fingerprint key is applied to begins with what it is for, so that no
// fingerprint of a key can equal or reveal a derived name.
const (
	keyDomain        = "tenantry key\x00"
	deploymentDomain = "tenantry deployment\x00"
	patDomain        = "tenantry pat\x00"
	tenantDomain     = "tenantry tenant\x00"
)

// The probe's associated data differs in length from every key id: a probe cannot
// pass for a sealed key, nor the other way round.
const (
	probeDomain = "tenantry keyset probe"
	probeText   = "tenantry"
	// So does the owner's: an app id is no 16 bytes with this before it.
	ownerDomain = "tenantry app owner\x00"
)

const fingerprintSize = 32

// String keeps key material out of whatever a Keyring is printed in.
func (*Keyring) String() string { return "[keyring]" }

// GoString does as String.
func (k *Keyring) GoString() string { return k.String() }

// Seal encrypts the secret of the key row keyID. Only Open for the same row
// reads it: a ciphertext that is moved to another row is worth nothing there.
func (k *Keyring) Seal(keyID uuid.UUID, secret tenant.Secret) ([]byte, error) {
	if !secret.IsSet() {
		return nil, errors.New("seal key: there is no secret")
	}
	ciphertext, err := k.sealing.Load().Encrypt([]byte(secret.Reveal()), keyID[:])
	if err != nil {
		return nil, fmt.Errorf("seal key: %w", err)
	}
	return ciphertext, nil
}

// Open decrypts what Seal made for the key row keyID, with this keyset or an
// earlier one whose keys this keyset still holds. It reports tenant.Unavailable for
// what a key sealed that this keyset does not hold, even after it was read anew.
func (k *Keyring) Open(keyID uuid.UUID, ciphertext []byte) (tenant.Secret, error) {
	text, err := k.open(ciphertext, keyID[:])
	if isUnknown(err) {
		return tenant.Secret{}, err
	}
	if err != nil {
		// Which of them it was, no cipher can tell.
		return tenant.Secret{}, errors.New("open sealed key: it was sealed by another keyset or for another key, or was altered since")
	}
	return tenant.NewSecret(string(text)), nil
}

// SealOwner encrypts whom the app id was given to, for the app's marker upstream.
func (k *Keyring) SealOwner(id tenant.AppID, owner tenant.AppOwner) (string, error) {
	text, err := json.Marshal(owner)
	if err != nil {
		return "", fmt.Errorf("seal owner: %w", err)
	}
	ciphertext, err := k.sealing.Load().Encrypt(text, []byte(ownerDomain+string(id)))
	if err != nil {
		return "", fmt.Errorf("seal owner: %w", err)
	}
	return base64.RawURLEncoding.EncodeToString(ciphertext), nil
}

// OpenOwner decrypts what SealOwner made for the same app.
func (k *Keyring) OpenOwner(id tenant.AppID, sealed string) (tenant.AppOwner, error) {
	var owner tenant.AppOwner
	ciphertext, err := base64.RawURLEncoding.DecodeString(sealed)
	if err == nil {
		var text []byte
		if text, err = k.open(ciphertext, []byte(ownerDomain+string(id))); err == nil {
			err = json.Unmarshal(text, &owner)
		}
	}
	if err != nil {
		return owner, errors.New("open sealed owner: it was sealed by another keyset or for another app, or was altered since")
	}
	return owner, nil
}

// Fingerprint returns 32 bytes that stand for secret: always the same with this
// keyset, others with any other. Without the keyset a guess cannot be checked.
func (k *Keyring) Fingerprint(secret tenant.Secret) []byte {
	return k.derive(keyDomain + secret.Reveal())
}

// PATFingerprint returns 32 bytes that stand for a PAT, as Fingerprint does for a
// key.
func (k *Keyring) PATFingerprint(pat tenant.Secret) []byte {
	return k.derive(patDomain + pat.Reveal())
}

// Hint returns the last four characters of secret, for people to tell keys
// apart. A secret of fewer than 16 characters has none: it would give too much of
// it away.
func (k *Keyring) Hint(secret tenant.Secret) string {
	text := []rune(secret.Reveal())
	if len(text) < 16 {
		return ""
	}
	return string(text[len(text)-4:])
}

// crockford is base32 in lower case without letters that are mistaken for digits.
var crockford = base32.NewEncoding("0123456789abcdefghjkmnpqrstvwxyz").WithPadding(base32.NoPadding)

// DeploymentID returns the name of operator's deployment with this keyset, 16
// characters of 0-9 a-z. It depends on nothing else: a deployment whose database
// was lost finds the apps it marked again.
func (k *Keyring) DeploymentID(operator tenant.UserID) string {
	return crockford.EncodeToString(k.derive(deploymentDomain + string(operator))[:10])
}

// TenantHash returns 16 hexadecimal digits that stand for a tenant where its id is
// not to be seen. Whoever lacks the keyset cannot check a guess at the id.
func (k *Keyring) TenantHash(id tenant.ID) string {
	return hex.EncodeToString(k.derive(tenantDomain + string(id))[:8])
}

// derive cannot fail: an HMAC has no input it refuses, and newKeyring saw it work.
func (k *Keyring) derive(input string) []byte {
	sum, err := k.fingerprint.ComputePRF([]byte(input), fingerprintSize)
	if err != nil {
		panic("keyring: fingerprint: " + err.Error())
	}
	return sum
}

// Probe seals a known text, for the database to keep: see Check.
func (k *Keyring) Probe() ([]byte, error) {
	probe, err := k.sealing.Load().Encrypt([]byte(probeText), []byte(probeDomain))
	if err != nil {
		return nil, fmt.Errorf("seal probe: %w", err)
	}
	return probe, nil
}

// Check reports whether k opens what the keyring that made probe sealed.
func (k *Keyring) Check(probe []byte) error {
	text, err := k.open(probe, []byte(probeDomain))
	if err != nil || !bytes.Equal(text, []byte(probeText)) {
		return errors.New("the keyset is not the one this database was sealed with")
	}
	return nil
}

func newKeyring(seal, fingerprint *keyset.Handle) (*Keyring, error) {
	cipher, err := aead.New(seal)
	if err != nil {
		return nil, errors.New(`"seal" is not a keyset that this program can seal with: it must hold AEAD keys such as AES256-GCM`)
	}
	prfs, err := prf.NewPRFSet(fingerprint)
	if err != nil {
		return nil, errors.New(`"fingerprint" is not a keyset that this program can fingerprint with: it must hold one HMAC-SHA256 PRF key`)
	}
	k := &Keyring{fingerprint: prfs.PRFs[prfs.PrimaryID]}
	k.sealing.Store(&sealing{AEAD: cipher, keys: sealKeys(seal)})
	// One key only: a second, made primary some day, would silently change every
	// fingerprint and the deployment's name.
	if len(prfs.PRFs) != 1 || k.fingerprint == nil {
		return nil, fmt.Errorf(`"fingerprint" has %d keys and must have one: it never changes`, len(prfs.PRFs))
	}
	if _, err := k.fingerprint.ComputePRF(nil, fingerprintSize); err != nil {
		return nil, fmt.Errorf(`"fingerprint" has a key that gives less than %d bytes: it must be an HMAC-SHA256 PRF key`, fingerprintSize)
	}
	return k, nil
}

// readKeyset reads a cleartext keyset of Tink. Tink's own error would quote what
// it could not read, and is dropped.
func readKeyset(name string, text []byte) (*keyset.Handle, error) {
	if len(text) == 0 || string(text) == "null" {
		return nil, fmt.Errorf("%q is missing", name)
	}
	h, err := insecurecleartextkeyset.Read(keyset.NewJSONReader(bytes.NewReader(text)))
	if err != nil {
		return nil, fmt.Errorf("%q is not a cleartext Tink keyset with an enabled primary key", name)
	}
	return h, nil
}
