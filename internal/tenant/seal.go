package tenant

import (
	"encoding/binary"

	"github.com/google/uuid"
)

// A SealKeyID names one of the keys of the keyset that seals. What a key sealed
// names it in the four bytes after the first.
type SealKeyID uint32

// SealKeyOf returns which key sealed a ciphertext. It reports false for one that
// does not say: keys without a prefix of Tink's leave no trace.
func SealKeyOf(ciphertext []byte) (SealKeyID, bool) {
	if len(ciphertext) < 5 || ciphertext[0] > 1 {
		return 0, false
	}
	return SealKeyID(binary.BigEndian.Uint32(ciphertext[1:5])), true
}

// Bytes are the four bytes of id in what it sealed.
func (id SealKeyID) Bytes() []byte { return binary.BigEndian.AppendUint32(nil, uint32(id)) }

// Sealed says which keys the database needs.
type Sealed struct {
	By    []SealKeyID // each key that sealed a tenant's key
	Probe []byte      // the keyset probe; nil on a database that no service has started on yet
}

// A SealedCount is how much of what the database knows one key sealed.
type SealedCount struct {
	Keys     int  // keys of tenants
	Held     int  // markers of apps that tenants hold
	Retained int  // markers of apps whose tenants were deleted
	Probe    bool // the keyset probe
}

// None reports whether the key is not needed.
func (c SealedCount) None() bool { return c == SealedCount{} }

// SealedCounts are the counts of each key that sealed something.
type SealedCounts struct {
	By map[SealKeyID]SealedCount
	// UnknownMarkers are the markers of which it is not known which key sealed them.
	UnknownMarkers int
}

// Resealed is what became of one batch of sealed keys.
type Resealed struct {
	Seen, Changed int
	Last          uuid.UUID // the last row seen, from which the next batch goes on
}
