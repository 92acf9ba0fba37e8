package tenant

import "time"

// Work is a row that is due: of an app, a key, an adoption, a reconciliation or a campaign. There is
// no other queue. Work that is done twice, late or by another replica does no harm.

// A Priority says which work goes first, and how far ahead its upstream calls may reserve permits. Its
// numbers are stored in the database.
type Priority int

// The priorities, the highest first. A lower one delays a higher one by no more than its reach.
const (
	// Incident is for a key that leaked, and its successor.
	Incident Priority = iota
	// Interactive is for what a caller waits for.
	Interactive
	// Bulk is for what many callers or one command for many tenants requested, and for keys that end
	// by themselves.
	Bulk
	// Background is for what nobody waits for.
	Background

	Priorities = int(Background) + 1
)

// Reach returns how far ahead a call of this priority may reserve a permit.
func (p Priority) Reach() time.Duration {
	return [Priorities]time.Duration{3 * time.Second, time.Second, 300 * time.Millisecond, 0}[p]
}

// MostInteractive is how many keys of one caller are worked on as Interactive at once. Further ones are
// Bulk, so that a caller who revokes thousands of keys delays nobody.
const MostInteractive = 20

// A WorkKind is a kind of rows that workers lease.
type WorkKind string

// The kinds of work.
const (
	AppWork            WorkKind = "app" // to be built, tagged, proven or removed
	KeyWork            WorkKind = "key" // to be created or revoked
	AdoptionWork       WorkKind = "adoption"
	ReconciliationWork WorkKind = "reconciliation"
	CampaignWork       WorkKind = "campaign"
)

// WorkKinds are all kinds of work.
var WorkKinds = []WorkKind{AppWork, KeyWork, AdoptionWork, ReconciliationWork, CampaignWork}

// DueWork is a row that is due. ID is the text of the row's id. Share names with whom its work takes turns:
// the shares of a priority get as many turns as one another, however much work each has.
type DueWork struct {
	ID       string
	Priority Priority
	Share    string
}

// A Lease is a worker's claim to a row until a time. Whatever the worker records is refused once another
// worker has the row.
type Lease struct {
	Kind  WorkKind
	ID    string
	Until time.Time
}

// Lease returns the lease of a leased app.
func (a App) Lease() Lease { return Lease{AppWork, string(a.ID), a.LeasedUntil} }

// Lease returns the lease of the key.
func (k LeasedKey) Lease() Lease { return Lease{KeyWork, k.ID.String(), k.LeasedUntil} }

// Lease returns the lease of the adoption.
func (a LeasedAdoption) Lease() Lease { return Lease{AdoptionWork, a.ID.String(), a.LeasedUntil} }

// Lease returns the lease of a leased reconciliation.
func (r Reconciliation) Lease() Lease { return Lease{ReconciliationWork, r.ID.String(), r.LeasedUntil} }

// Lease returns the lease of a leased campaign.
func (c Campaign) Lease() Lease { return Lease{CampaignWork, c.ID.String(), c.LeasedUntil} }
