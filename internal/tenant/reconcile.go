package tenant

import (
	"time"

	"github.com/google/uuid"
)

// A Reconciliation compares Clarifai with Postgres: a report changes nothing, a
// repair carries out what a report found.
type Reconciliation struct {
	ID          uuid.UUID
	Kind        ReconciliationKind
	AdoptOnly   bool      // the repair takes in what is unknown, and does nothing else
	ReportID    uuid.UUID // that a repair carries out; zero for a report
	RequestedBy string
	Done        bool
	Phase       ReconciliationPhase
	Page        int // of the list that is being read
	AppsSeen    int
	KeysSeen    int
	ForeignApps int    // of the account, without our marker: counted, never touched
	Token       string // names a report that is done to the repair that is to follow
	Attempts    int
	Problem     *Problem
	CreatedAt   time.Time
	FinishedAt  time.Time // zero until it is done
	LeasedUntil time.Time // as App.LeasedUntil
}

// A ReconciliationKind is report or repair.
type ReconciliationKind string

// The kinds of reconciliation.
const (
	Report ReconciliationKind = "report"
	Repair ReconciliationKind = "repair"
)

// A ReconciliationPhase is what a reconciliation is at.
type ReconciliationPhase string

// The phases, in their order; a repair has the last two.
const (
	ListingApps ReconciliationPhase = "apps"
	ListingKeys ReconciliationPhase = "keys"
	Comparing   ReconciliationPhase = "compare"
	Confirming  ReconciliationPhase = "confirm" // what was not listed is looked for
	Repairing   ReconciliationPhase = "repair"
	Ending      ReconciliationPhase = "end"
)

// A FindingKind says in what Clarifai and Postgres differ.
type FindingKind string

// The kinds of finding.
const (
	FoundAppUnknown   FindingKind = "app_unknown"   // our marker, no row: the database is behind
	FoundAppForgotten FindingKind = "app_forgotten" // the marker names a tenant, the row none: the database is behind
	FoundAppDiffers   FindingKind = "app_differs"   // marker and row name two tenants
	FoundAppAlive     FindingKind = "app_alive"     // the row says that it was removed
	FoundAppGone      FindingKind = "app_gone"      // the row says that it is there
	FoundAppRenamed   FindingKind = "app_renamed"   // it has another id than the one it was made with
	FoundAppUnmarked  FindingKind = "app_unmarked"  // it has lost its marker
	FoundAppSuspect   FindingKind = "app_suspect"   // from before a restore, and held back
	FoundKeyUnknown   FindingKind = "key_unknown"   // our marker, no row: the database is behind
	FoundKeyAlive     FindingKind = "key_alive"     // the row says that it was revoked or lost
	FoundKeyGone      FindingKind = "key_gone"      // the row says that it works
	FoundKeyLost      FindingKind = "key_lost"      // may work and cannot be addressed: an operator must remove it
	FoundKeyDrifted   FindingKind = "key_drifted"   // other scopes than the row's
	FoundKeyUnmanaged FindingKind = "key_unmanaged" // on an app of ours, and not of our making
	FoundInDoubt      FindingKind = "in_doubt"      // a call's outcome has been unknown for long; workers are at it
)

// FindingKinds lists every kind of finding.
var FindingKinds = []FindingKind{FoundAppUnknown, FoundAppForgotten, FoundAppDiffers, FoundAppAlive, FoundAppGone, FoundAppRenamed, FoundAppUnmarked,
	FoundAppSuspect, FoundKeyUnknown, FoundKeyAlive, FoundKeyGone, FoundKeyLost, FoundKeyDrifted, FoundKeyUnmanaged, FoundInDoubt}

// A RepairAction is what a repair does about a finding.
type RepairAction string

// The actions of a repair. The empty action is for people.
const (
	Adopt   RepairAction = "adopt"   // write down what is there upstream
	Remove  RepairAction = "remove"  // an app whose row says that it is gone
	Revoke  RepairAction = "revoke"  // a key whose row says that it is revoked
	Rebuild RepairAction = "rebuild" // another app for a tenant whose app is gone
	Forget  RepairAction = "forget"  // an app of the pool that is gone
	Remake  RepairAction = "remake"  // another key for one that is gone
	Rescope RepairAction = "rescope" // the row's scopes
	Mark    RepairAction = "mark"    // the marker that is missing
	Release RepairAction = "release" // hand out what was held back
)

// A Finding is one difference.
type Finding struct {
	Number   int64
	Kind     FindingKind
	Action   RepairAction
	AppID    AppID
	KeyID    uuid.UUID // zero if the finding is about no key
	TenantID ID
	Detail   string
	State    FindingState
	Note     string // how a repair ended
}

// A FindingState is where a finding stands.
type FindingState string

// The states of a finding.
const (
	FindingDoubted FindingState = "doubted" // not in the listing; to be looked for
	FindingOpen    FindingState = "open"
	FindingDone    FindingState = "done"
	FindingSkipped FindingState = "skipped" // it was so no longer when it was to be repaired
	FindingFailed  FindingState = "failed"
)

// FindingStates lists every state that is shown: what is doubted is no finding yet.
var FindingStates = []FindingState{FindingOpen, FindingDone, FindingSkipped, FindingFailed}

// A ListedApp is an app as a reconciliation keeps it.
type ListedApp struct {
	ID     AppID
	Marker AppID // the id in our marker; empty for an app without it
	Owner  AppOwner
}

// A ListedKey is a key as a reconciliation keeps it.
type ListedKey struct {
	AppID       AppID
	KeyID       uuid.UUID // in our marker; zero for a key without it
	Fingerprint []byte    // nil where the listing is masked
	Scopes      []string
}

// An AdoptedApp is an app upstream that the database does not know, or knows less
// of, as it is taken in.
type AdoptedApp struct {
	ID      AppID
	Profile string
	Owner   AppOwner // zero for an app that no tenant is known to have
	Keys    []AdoptedKey
	// NewKey is the row of the key that is made if none of Keys can be used.
	NewKey NewKeyRow
}

// An AdoptedKey is a key upstream that is taken in; without a ciphertext it cannot
// be addressed.
type AdoptedKey struct {
	SealedKey
	Scopes []string
}

// A Fence is up while the database may be behind Clarifai, as after a restore.
type Fence struct {
	Since  time.Time // zero while it is down
	Reason string
	Behind bool // Clarifai was seen to hold what the database does not know
}

// Up reports whether the fence is up.
func (f Fence) Up() bool { return !f.Since.IsZero() }
