package tenant

import (
	"slices"
	"time"

	"github.com/google/uuid"
)

// A Reconciliation compares Clarifai with Postgres: a report changes nothing, a
// repair carries out what a report found.
type Reconciliation struct {
	ID          uuid.UUID
	Kind        ReconciliationKind
	Decisions   bool      // the repair carries out decisions about findings, and does nothing else
	ReportID    uuid.UUID // that a repair carries out; zero for a report
	RequestedBy string
	Done        bool
	Phase       ReconciliationPhase
	Page        int // of the list that is being read
	PerPage     int // entries of a page; smaller after a page that was too slow or too large
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
	FoundAppUnknown   FindingKind = "app_unknown"     // our ownership tag, no row: the database is behind
	FoundAppForgotten FindingKind = "app_forgotten"   // the tag names a tenant, the row none: the database is behind
	FoundAppDiffers   FindingKind = "app_differs"     // tag and row name two tenants
	FoundAppAlive     FindingKind = "app_alive"       // the row says that it was removed
	FoundAppGone      FindingKind = "app_gone"        // the row says that it is there
	FoundAppRenamed   FindingKind = "app_renamed"     // it has another id than the one it was made with
	FoundAppUnmarked  FindingKind = "app_unmarked"    // it has lost its tag
	FoundPurge        FindingKind = "purge_contested" // an app is to be removed, and its tag or an unknown key says that it may be in use
	FoundKeyUnknown   FindingKind = "key_unknown"     // our ownership tag, no row: the database is behind
	FoundKeyContested FindingKind = "key_contested"   // the same, and the rows say that the tenant is suspended or deleting
	FoundKeyAlive     FindingKind = "key_alive"       // the row says that it was revoked or lost
	FoundKeyGone      FindingKind = "key_gone"        // the row says that it works
	FoundKeyPending   FindingKind = "key_pending"     // requested before a loss and not created yet, for a tenant without a live key
	FoundKeyLost      FindingKind = "key_lost"        // may work and cannot be addressed: an operator must remove it
	FoundKeyDrifted   FindingKind = "key_drifted"     // other scopes than the row's
	FoundKeyUnmanaged FindingKind = "key_unmanaged"   // on an app of ours, and not of our making
	FoundInDoubt      FindingKind = "in_doubt"        // a call's outcome has been unknown for long; workers retry
)

// FindingKinds lists every kind of finding.
var FindingKinds = []FindingKind{FoundAppUnknown, FoundAppForgotten, FoundAppDiffers, FoundAppAlive, FoundAppGone, FoundAppRenamed, FoundAppUnmarked,
	FoundPurge, FoundKeyUnknown, FoundKeyContested, FoundKeyAlive, FoundKeyGone, FoundKeyPending, FoundKeyLost, FoundKeyDrifted, FoundKeyUnmanaged, FoundInDoubt}

// A RepairAction is what a repair does about a finding.
type RepairAction string

// The actions that a report proposes for a repair. Without an action, a person must fix the difference.
const (
	Remove  RepairAction = "remove"  // an app whose row says that it is gone
	Revoke  RepairAction = "revoke"  // a key whose row says that it is revoked
	Rebuild RepairAction = "rebuild" // another app for a tenant whose app is gone
	Forget  RepairAction = "forget"  // an app of the pool that is gone
	Remake  RepairAction = "remake"  // another key for one that is gone
	Rescope RepairAction = "rescope" // the row's scopes
	Mark    RepairAction = "mark"    // the marker that is missing
	// Decide means that the finding waits for a decision: see Choices.
	Decide RepairAction = "decide"
)

// The choices of a decision. A decided finding has its choice as its action.
const (
	Keep            RepairAction = "keep"       // leave things as they are
	Adopt           RepairAction = "adopt"      // record what Clarifai has
	EndUnknownKey   RepairAction = "end-key"    // an unknown key
	MakeKey         RepairAction = "new-key"    // in place of a dead key
	SuspendTenant   RepairAction = "suspend"    // the tenant, which may have been suspended before the loss
	ResumeTenant    RepairAction = "resume"     // the tenant, with the key that was found
	MakeApp         RepairAction = "new-app"    // in place of an app that is gone
	RestoreTenant   RepairAction = "restore"    // the tenant whose app was about to be removed
	RemoveContested RepairAction = "remove-app" // although the app may be in use
	OverwriteTag    RepairAction = "overwrite"  // the tenant in the app's ownership tag
)

// AppContested is the code of the problem of a tenant whose app has another tenant's ownership tag.
const AppContested = "app_contested"

// A Choice is one possible decision about a finding.
type Choice struct {
	Name   RepairAction
	Effect string // a sentence
	// Typed says that the choice can do harm: the person who makes it must type the id of the
	// finding's tenant, or of its app if the finding names no tenant.
	Typed bool
}

// Choices lists what can be decided about findings of a kind that wait for a decision.
func (k FindingKind) Choices() []Choice {
	keep := Choice{Name: Keep, Effect: "Leaves app, keys and rows as they are. Later reports do not ask again."}
	switch k {
	case FoundAppUnknown, FoundAppForgotten:
		return []Choice{
			{Name: Adopt, Effect: "The tenant that the ownership tag names gets the app back, with the live keys that are found. If no live key is found, the tenant is suspended."}, keep}
	case FoundAppDiffers:
		return []Choice{
			keep,
			{Name: SuspendTenant, Typed: true, Effect: "Suspends the tenant that the rows name: all keys of the app are revoked, also those that the tenant in the ownership tag may use. App and data stay."},
			{Name: OverwriteTag, Typed: true, Effect: "The tenant that the rows name keeps the app, and its key is shown again. If the ownership tag was right, two tenants share the app."}}
	case FoundKeyUnknown:
		return []Choice{
			{Name: Adopt, Effect: "The key becomes a key of the tenant, and replaces a dead key in the rows."},
			keep,
			{Name: EndUnknownKey, Typed: true, Effect: "Revokes the key. If the tenant uses it, the tenant has no access until it gets another key."}}
	case FoundKeyContested:
		return []Choice{
			{Name: ResumeTenant, Effect: "The tenant is active again, with this key."},
			{Name: EndUnknownKey, Effect: "Revokes the key. The tenant keeps the state that the rows have."}, keep}
	case FoundKeyGone:
		return []Choice{
			{Name: SuspendTenant, Effect: "Suspends the tenant, which may have been suspended before the loss. `resume` creates new keys."}, keep,
			{Name: MakeKey, Typed: true, Effect: "Creates a new key. If the tenant had been suspended, it has access again."}}
	case FoundKeyPending: // not keep: without a decision the key is created when recovery mode ends
		return []Choice{
			{Name: SuspendTenant, Effect: "Suspends the tenant, which may have been suspended before the loss. `resume` creates new keys."},
			{Name: MakeKey, Typed: true, Effect: "Creates the key. If the tenant had been suspended, it has access again."}}
	case FoundAppGone:
		return []Choice{keep,
			{Name: MakeApp, Typed: true, Effect: "The tenant gets a new, empty app. If the tenant had been deleted, it exists again."}}
	case FoundPurge:
		return []Choice{
			{Name: RestoreTenant, Effect: "Suspends the tenant instead of removing its app: app and data stay, and `resume` creates new keys."}, keep,
			{Name: RemoveContested, Typed: true, Effect: "Removes the app with its data and all its keys, for good."}}
	}
	return nil
}

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
	FindingDecided FindingState = "decided" // the decision waits to be carried out
	FindingDone    FindingState = "done"
	FindingSkipped FindingState = "skipped" // it was so no longer when it was to be repaired
	FindingFailed  FindingState = "failed"
)

// FindingStates lists every state that is shown: what is doubted is no finding yet.
var FindingStates = []FindingState{FindingOpen, FindingDecided, FindingDone, FindingSkipped, FindingFailed}

// A ListedApp is an app as a reconciliation keeps it.
type ListedApp struct {
	ID     AppID
	Marker AppID // the id in our marker; empty for an app without it
	Owner  AppOwner
	Inputs *int // in the app; nil where the listing does not say
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
	Owner   AppOwner // the tenant that the ownership tag names
	Keys    []AdoptedKey
	// PurgeAfter is when the app is removed, by its ownership tag; zero if it is not.
	PurgeAfter time.Time
	// NewKey is the row of the key that its tenant resumes with if none of Keys can be used.
	NewKey NewKeyRow
}

// HasLiveKey reports whether one of the keys can be used.
func (a AdoptedApp) HasLiveKey() bool {
	return slices.ContainsFunc(a.Keys, func(k AdoptedKey) bool { return k.Ciphertext != nil })
}

// An AdoptedKey is a key upstream that is taken in; without a ciphertext it cannot
// be addressed.
type AdoptedKey struct {
	SealedKey
	Scopes []string
}
