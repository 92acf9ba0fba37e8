package tenant

import (
	"time"

	"github.com/google/uuid"
)

// Jobs say which row to look at and nothing more: what is to be done stands in
// the row. A job that comes twice, late or never does no harm.

// AppJob asks a worker to look at an app: see App.
type AppJob struct {
	AppID AppID `json:"app_id"`
}

// Kind names the job in the queue.
func (AppJob) Kind() string { return "app" }

// KeyJob asks a worker to look at a key: see LeasedKey.
type KeyJob struct {
	KeyID uuid.UUID `json:"key_id"`
}

// Kind names the job in the queue.
func (KeyJob) Kind() string { return "key" }

// ReconciliationJob asks a worker to go on with a reconciliation.
type ReconciliationJob struct {
	ReconciliationID uuid.UUID `json:"reconciliation_id"`
}

// Kind names the job in the queue.
func (ReconciliationJob) Kind() string { return "reconciliation" }

// CampaignJob asks a worker to go on with a campaign.
type CampaignJob struct {
	CampaignID uuid.UUID `json:"campaign_id"`
}

// Kind names the job in the queue.
func (CampaignJob) Kind() string { return "campaign" }

// AdoptionJob asks a worker to look at an adoption: see LeasedAdoption.
type AdoptionJob struct {
	AdoptionID uuid.UUID `json:"adoption_id"`
}

// Kind names the job in the queue.
func (AdoptionJob) Kind() string { return "adoption" }

// The queues of jobs, and how soon after one another the first two are looked into.
// Each has workers of its own: a key that shall die waits for no sign-up.
const (
	QueueUrgent         = "urgent"      // keys in the urgent lane
	QueueInteractive    = "interactive" // a tenant may be waiting
	QueueBackground     = "background"
	InteractiveCooldown = 5 * time.Millisecond
)

// A WorkKind is a kind of rows that workers look at.
type WorkKind string

// The kinds of work.
const (
	BuildWork          WorkKind = "builds"  // of apps that a tenant waits for
	TagWork            WorkKind = "tags"    // and unknown keys, which a caller waits for
	KeyWork            WorkKind = "keys"    // to be created or revoked
	ReconciliationWork WorkKind = "reports" // and repairs
	AdoptionWork       WorkKind = "adoptions"
	CampaignWork       WorkKind = "campaigns"
	BackgroundWork     WorkKind = "background" // pool, tags of imports, removals, proofs
)

// WorkKinds lists every kind of work.
var WorkKinds = []WorkKind{BuildWork, TagWork, KeyWork, ReconciliationWork, AdoptionWork, CampaignWork, BackgroundWork}
