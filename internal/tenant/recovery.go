package tenant

import (
	"strconv"
	"time"

	"github.com/google/uuid"
)

// A RecoveryState is a state of recovery mode.
type RecoveryState string

// The states. NotRecovering is the normal one.
const (
	NotRecovering RecoveryState = ""
	Watching      RecoveryState = "watching"   // it is not known yet whether another database is in use
	Recovering    RecoveryState = "recovering" // no other database is in use, and transactions were lost
	Stopped       RecoveryState = "stopped"    // another database is in use: no upstream work is done here
)

// A Recovery is the current incarnation of the database and its recovery mode.
type Recovery struct {
	Incarnation uuid.UUID
	BeganAt     time.Time // of the incarnation
	State       RecoveryState
	Since       time.Time // of recovery mode; zero while there is none
	Reason      string    // why the incarnation began
	Lost        string    // what shows that transactions were lost; empty if nothing does
	WatchUntil  time.Time // when the watch ends if the control record is not renewed; zero unless Watching
	// Record is the control record as the watch last read it; the zero value means none.
	Record         ControlRecord
	ControlSeenAt  time.Time // when the control record was last known to exist; zero for never
	ControlProblem *Problem  // why the record cannot be read or written; nil if it can
	Report         uuid.UUID // the newest that began in this recovery mode, otherwise the newest that is done; zero for none
	ReportDone     bool      // Report is done
	Undecided      int       // findings of Report that wait for a decision
	Waiting        RecoveryWaiting
}

// Active reports whether the database is in recovery mode.
func (r Recovery) Active() bool { return r.State != NotRecovering }

// A Beat is the state of recovery at a pass of a replica's sweep.
type Beat struct {
	Recovery
	ControlDue bool          // the control record must be read
	Retiring   bool          // apps of earlier incarnations must still be marked as retired
	Pause      UpstreamPause // by an operator
	// ClockStep is by how much the clock of the database was found to be set back; times were corrected.
	ClockStep time.Duration
}

// RecoveryWaiting counts the work that waits for the end of recovery mode.
type RecoveryWaiting struct {
	Removals, Campaigns, Keys int
}

// A ControlRecord is the metadata of one app of the account. It tells a restart of the
// database from a rollback and from a copy. All fields are strings: Clarifai's JSON numbers
// are floating point.
type ControlRecord struct {
	Incarnation string `json:"incarnation"`
	Replica     string `json:"replica"` // that wrote it
	Seq         string `json:"seq"`     // grows with each renewal
	Event       string `json:"event"`   // the newest audit event when it was written
	Stopped     string `json:"stopped"` // "true" if the last replica has stopped
}

// EventID is the audit event that the record names; 0 for none.
func (c ControlRecord) EventID() int64 { return number(c.Event) }

// SeqNumber is Seq as a number.
func (c ControlRecord) SeqNumber() int64 { return number(c.Seq) }

func number(s string) int64 {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// ControlID is the id of the app whose metadata is the control record: up to 23 characters.
func ControlID(prefix, deployment string) AppID { return AppID(prefix + "-c" + deployment) }

// A ControlTurn is the permission to read and write the control record.
type ControlTurn struct {
	Recovery
	Replica uuid.UUID // that has the turn
	Seq     int64     // of this turn, committed
	Event   int64     // the newest audit event
}

// A RetiredApp is an app of an earlier incarnation that no tenant is known to hold.
type RetiredApp struct {
	ID          AppID
	Profile     string
	Incarnation uuid.UUID
	CreatedAt   time.Time
	HasKey      bool   // a key of the app is known
	Inputs      *int64 // number of inputs in the last report; nil if Clarifai did not say
}

// A RetiredFilter selects retired apps: one by its id, or all that were begun before a time. The zero
// filter selects all.
type RetiredFilter struct {
	AppID  AppID
	Before time.Time
}

// RetiredCount counts retired apps.
type RetiredCount struct {
	Count          int
	Oldest, Newest time.Time // zero if there are none
}

// ErrAnotherDatabase is returned for requests that need upstream work while another
// database renews the control record.
var ErrAnotherDatabase = &Error{Kind: Unavailable, Code: "another_database", RetryAfter: time.Minute,
	Detail: "another database of this deployment is in use, so this one does no work at Clarifai; see `tenantry recover show`"}

// ErrRecoveryUnknown is returned instead of "not found" in recovery mode, since a row may have been
// lost.
var ErrRecoveryUnknown = &Error{Kind: Conflict, Code: "recovery_unknown",
	Detail: "the database is in recovery mode and does not know this id, which may have been lost; `tenantry recover show` lists the findings"}
