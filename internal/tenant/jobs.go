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
