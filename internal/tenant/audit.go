package tenant

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"time"

	"github.com/google/uuid"
)

// An AuditEvent is one entry of the audit log. What it is not about is zero.
type AuditEvent struct {
	ID                int64
	At                time.Time
	Actor             string
	Action            string
	TenantID          ID
	AppID             AppID
	KeyID             uuid.UUID
	RequestID         string          // of the API request that it comes of
	UpstreamRequestID string          // Clarifai's, of the call before it
	Detail            json.RawMessage // an object
}

// An AuditDigest tells whether an event is as it was.
type AuditDigest [16]byte

// DigestAuditEvent hashes the columns of an event. A nil value is NULL, and hashes
// as if there were no such column: a column that is added later leaves the digests
// of older events as they are.
func DigestAuditEvent(columns []string, values []*string) AuditDigest {
	h := sha256.New()
	hashText(h, "tenantry audit event")
	for i, name := range columns {
		if values[i] != nil {
			hashText(h, name)
			hashText(h, *values[i])
		}
	}
	return AuditDigest(h.Sum(nil)[:len(AuditDigest{})])
}

// An AuditSealEntry is what a seal says of one event.
type AuditSealEntry struct {
	ID     int64
	Digest AuditDigest
}

// An AuditSeal covers the events after AfterID up to LastID. A hash names it with
// all seals before it.
type AuditSeal struct {
	Number       int64 // from 1, without gaps
	AfterID      int64 // the LastID of the seal before
	LastID       int64
	Entries      []byte // see AppendAuditSealEntry
	PreviousHash []byte // of the seal before; NoAuditSeal in the first
	Hash         []byte
	SealedAt     time.Time // exact to a microsecond
}

// NoAuditSeal stands for the hash of the seal before the first.
var NoAuditSeal = make([]byte, sha256.Size)

const auditSealEntrySize = 8 + len(AuditDigest{})

// AppendAuditSealEntry adds an entry to those of a seal. They go by id.
func AppendAuditSealEntry(entries []byte, e AuditSealEntry) []byte {
	entries = binary.BigEndian.AppendUint64(entries, uint64(e.ID))
	return append(entries, e.Digest[:]...)
}

// Len returns how many events s covers.
func (s AuditSeal) Len() int { return len(s.Entries) / auditSealEntrySize }

// Entry returns what s says of one of its Len events.
func (s AuditSeal) Entry(i int) AuditSealEntry {
	e := s.Entries[i*auditSealEntrySize:][:auditSealEntrySize]
	return AuditSealEntry{ID: int64(binary.BigEndian.Uint64(e)), Digest: AuditDigest(e[8:])}
}

// ComputeHash returns what the hash of s must be.
func (s AuditSeal) ComputeHash() []byte {
	h := sha256.New()
	hashText(h, "tenantry audit seal")
	for _, n := range []int64{s.Number, s.AfterID, s.LastID, s.SealedAt.UnixMicro()} {
		_ = binary.Write(h, binary.BigEndian, n) // a hash takes everything
	}
	hashText(h, string(s.PreviousHash))
	hashText(h, string(s.Entries))
	return h.Sum(nil)
}

// Intact reports whether s is as it was made. It says nothing of the seals before.
func (s AuditSeal) Intact() bool { return bytes.Equal(s.Hash, s.ComputeHash()) }

// Sealing is what came of one turn at sealing.
type Sealing struct {
	Seals int // made
	// Unsealed is the age of the oldest event that no seal covers; 0 if there is none.
	Unsealed time.Duration
}

// An AuditFault is how the audit log differs from what was sealed.
type AuditFault string

// The faults of an audit log.
const (
	EventAltered  AuditFault = "event_altered"
	EventRemoved  AuditFault = "event_removed"
	EventInserted AuditFault = "event_inserted" // after its place in the order was sealed
	SealAltered   AuditFault = "seal_altered"
	SealMissing   AuditFault = "seal_missing"
	SealUnchained AuditFault = "seal_unchained" // it does not follow the seal before it
)

// An AuditFinding is one fault of the audit log.
type AuditFinding struct {
	Fault AuditFault
	Seal  AuditSeal // that covers it, or that it is about; only its Number if it is missing
	// UpTo is, of seals that are missing, the last one's number.
	UpTo int64
	// EventID and Event are the event; Event is as it stands, and nil if it is gone.
	EventID int64
	Event   *AuditEvent
}

// An AuditCheck counts what was looked at.
type AuditCheck struct {
	Seals    int
	Sealed   int       // events that seals cover
	Faults   int       // findings
	LastSeal AuditSeal // zero if there is none
	Unsealed int       // events that no seal covers yet
}
