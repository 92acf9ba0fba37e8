package keyring

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/tink-crypto/tink-go/v2/keyset"
	tinkpb "github.com/tink-crypto/tink-go/v2/proto/tink_go_proto"

	"github.com/tenantry/tenantry/internal/tenant"
)

// A SealKey is one of the keys that seal, without what it is made of. A keyset
// lists its keys in the order in which they were added.
type SealKey struct {
	ID      tenant.SealKeyID
	Primary bool // it seals; all that are enabled open
	Enabled bool
	// Named says that what the key sealed says so.
	Named bool
}

func sealKeys(h *keyset.Handle) []SealKey {
	info := h.KeysetInfo()
	var keys []SealKey
	for _, k := range info.GetKeyInfo() {
		keys = append(keys, SealKey{
			ID:      tenant.SealKeyID(k.GetKeyId()),
			Primary: k.GetKeyId() == info.GetPrimaryKeyId(),
			Enabled: k.GetStatus() == tinkpb.KeyStatusType_ENABLED,
			Named:   k.GetOutputPrefixType() != tinkpb.OutputPrefixType_RAW,
		})
	}
	return keys
}

func (s *sealing) primary() int {
	for i, k := range s.keys {
		if k.Primary {
			return i
		}
	}
	return -1 // Tink reads no keyset without one
}

// opens reports whether what the key id sealed can be opened.
func (s *sealing) opens(id tenant.SealKeyID) bool {
	for _, k := range s.keys {
		if k.ID == id && k.Enabled {
			return true
		}
	}
	return false
}

// older returns the keys whose work the primary takes over: those that were added
// before it. A key that was added later is some day's primary, and another replica's
// already: were it taken over too, the two would re-seal each other's work for ever.
func (s *sealing) older() []tenant.SealKeyID {
	p := s.primary()
	if p < 0 || !s.keys[p].Named {
		return nil
	}
	var ids []tenant.SealKeyID
	for _, k := range s.keys[:p] {
		if k.Enabled && k.Named {
			ids = append(ids, k.ID)
		}
	}
	return ids
}

func (s *sealing) isOlder(id tenant.SealKeyID) bool {
	for _, o := range s.older() {
		if o == id {
			return true
		}
	}
	return false
}

// SealKeys lists the keys that seal and open, in the order they were added in.
func (k *Keyring) SealKeys() []SealKey { return append([]SealKey(nil), k.sealing.Load().keys...) }

// Opens reports whether k holds the key id.
func (k *Keyring) Opens(id tenant.SealKeyID) bool { return k.sealing.Load().opens(id) }

// Older lists the keys that were added before the primary: what they sealed is to be
// sealed anew.
func (k *Keyring) Older() []tenant.SealKeyID { return k.sealing.Load().older() }

// errUnknown is the failure to open what a key sealed that the keyset lacks.
func errUnknown(id tenant.SealKeyID) error {
	return &tenant.Error{Kind: tenant.Unavailable, Code: "keyset_behind", RetryAfter: 2 * time.Second,
		Detail: "this replica has not read the newest keyset yet; try again",
		Err:    fmt.Errorf("it was sealed by the key %d, which the keyset does not hold", id)}
}

func isUnknown(err error) bool {
	e, ok := errors.AsType[*tenant.Error](err)
	return ok && e.Code == "keyset_behind"
}

// OnUnknown has f called when something is to be opened that a key sealed which k
// does not hold; afterwards it is tried once more. F may call Replace.
func (k *Keyring) OnUnknown(f func()) { k.onUnknown.Store(&f) }

func (k *Keyring) open(ciphertext, associated []byte) ([]byte, error) {
	for again := false; ; again = true {
		s := k.sealing.Load()
		text, err := s.Decrypt(ciphertext, associated)
		id, named := tenant.SealKeyOf(ciphertext)
		if err == nil || !named || s.opens(id) {
			return text, err
		}
		f := k.onUnknown.Load()
		if again || f == nil {
			return nil, errUnknown(id)
		}
		(*f)()
	}
}

// Reseal seals anew, by the primary, what an older key sealed for the key row keyID.
// It returns nil for what is to stay as it is: see Older.
func (k *Keyring) Reseal(keyID uuid.UUID, ciphertext []byte) ([]byte, error) {
	return k.sealing.Load().reseal(ciphertext, keyID[:])
}

// ResealProbe is Reseal for a probe.
func (k *Keyring) ResealProbe(probe []byte) ([]byte, error) {
	return k.sealing.Load().reseal(probe, []byte(probeDomain))
}

func (s *sealing) reseal(ciphertext, associated []byte) ([]byte, error) {
	id, ok := tenant.SealKeyOf(ciphertext)
	if !ok || !s.isOlder(id) {
		return nil, nil
	}
	text, err := s.Decrypt(ciphertext, associated)
	if err != nil {
		return nil, fmt.Errorf("open what the key %d sealed: it was altered since, or is another row's", id)
	}
	sealed, err := s.Encrypt(text, associated)
	if err != nil {
		return nil, fmt.Errorf("seal anew: %w", err)
	}
	return sealed, nil
}

// SealedOwnerBy returns which key sealed what SealOwner made, or nil if it does not
// say.
func SealedOwnerBy(sealed string) *tenant.SealKeyID {
	ciphertext, err := base64.RawURLEncoding.DecodeString(sealed)
	if err != nil {
		return nil
	}
	id, ok := tenant.SealKeyOf(ciphertext)
	if !ok {
		return nil
	}
	return &id
}

// Replace puts the sealing keyset of next in the place of k's, while k is in use. It
// refuses a keyring that fingerprints otherwise.
func (k *Keyring) Replace(next *Keyring) error {
	if !bytes.Equal(k.derive("tenantry same\x00"), next.derive("tenantry same\x00")) {
		return errors.New("its fingerprint keyset is another one: that never changes")
	}
	k.sealing.Store(next.sealing.Load())
	return nil
}
