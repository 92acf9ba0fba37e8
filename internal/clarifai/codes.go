package clarifai

import (
	"net/http"

	"github.com/tenantry/tenantry/internal/tenant"
)

// Status codes that the client looks at by itself.
const (
	codeSuccess        = 10000
	codeMoved          = 10050
	codeAccepted       = 10070
	codeInvalidRequest = 11102
)

// deadKeyCodes say of an app-specific key that it opens nothing.
var deadKeyCodes = []int{11001, 11002, 11008, 11009}

// tooMuchCodes say that Clarifai's own time or size limit ended the call: DATABASE_STATEMENT_TIMEOUT,
// RPC_REQUEST_TIMEOUT, RPC_MAX_MESSAGE_SIZE_EXCEEDED and INTERNAL_UNEXPECTED_TIMEOUT.
var tooMuchCodes = []int{40011, 40032, 40033, 98009}

// A meaning is what a status code says about a call that failed.
type meaning struct {
	class tenant.UpstreamClass
	// unclear says that Clarifai may have failed after it made the change.
	unclear bool
}

// codes says what Clarifai's status codes mean. Descriptions at Clarifai are
// sparse; where a code could be sent after a change was made, we take it so.
var codes = []struct {
	code int
	name string
	meaning
}{
	{10010, "MIXED_STATUS", meaning{tenant.UpstreamDown, true}},
	{10020, "FAILURE", meaning{tenant.UpstreamDown, true}},
	{10030, "TRY_AGAIN", meaning{tenant.UpstreamDown, true}},
	{10040, "NOT_IMPLEMENTED", meaning{tenant.UpstreamRefused, false}},
	// Renamed by somebody: it exists, and so do its keys. To take it for gone would
	// end a removal that never happened.
	{codeMoved, "MOVED", meaning{tenant.UpstreamRefused, false}},
	// A success for the calls that say so, and for others a promise only.
	{codeAccepted, "ACCEPTED", meaning{tenant.UpstreamDown, true}},

	{11000, "CONN_ACCOUNT_ISSUES", meaning{tenant.UpstreamAccount, false}},
	{11001, "CONN_TOKEN_INVALID", meaning{tenant.UpstreamPAT, false}},
	{11002, "CONN_CREDENTIALS_INVALID", meaning{tenant.UpstreamPAT, false}},
	{11003, "CONN_EXCEED_HOURLY_LIMIT", meaning{tenant.UpstreamThrottled, false}},
	{11004, "CONN_EXCEED_MONTHLY_LIMIT", meaning{tenant.UpstreamQuota, false}},
	{11005, "CONN_THROTTLED", meaning{tenant.UpstreamThrottled, false}},
	{11006, "CONN_EXCEEDS_LIMITS", meaning{tenant.UpstreamQuota, false}},
	{11007, "CONN_INSUFFICIENT_SCOPES", meaning{tenant.UpstreamForbidden, false}},
	{11008, "CONN_KEY_INVALID", meaning{tenant.UpstreamPAT, false}},
	{11009, "CONN_KEY_NOT_FOUND", meaning{tenant.UpstreamPAT, false}},
	{11100, "CONN_BAD_REQUEST_FORMAT", meaning{tenant.UpstreamRefused, false}},
	{11101, "CONN_DOES_NOT_EXIST", meaning{tenant.UpstreamNotFound, false}},
	{codeInvalidRequest, "CONN_INVALID_REQUEST", meaning{tenant.UpstreamRefused, false}},
	{11103, "CONN_METHOD_NOT_ALLOWED", meaning{tenant.UpstreamRefused, false}},
	{11104, "CONN_NO_GDPR_CONSENT", meaning{tenant.UpstreamAccount, false}},
	{11200, "CONN_AUTH_METHOD_DISABLED", meaning{tenant.UpstreamPAT, false}},

	// The base workflow of a profile.
	{22102, "WORKFLOW_DOES_NOT_EXIST", meaning{tenant.UpstreamRefused, false}},
	{22103, "WORKFLOW_PERMISSION_DENIED", meaning{tenant.UpstreamRefused, false}},
	{22104, "WORKFLOW_INVALID_ARGUMENT", meaning{tenant.UpstreamRefused, false}},

	{39997, "REQUEST_DISABLED_FOR_MAINTENANCE", meaning{tenant.UpstreamDown, false}},

	{40010, "DATABASE_DUPLICATE_KEY", meaning{tenant.UpstreamDuplicate, false}},
	{40011, "DATABASE_STATEMENT_TIMEOUT", meaning{tenant.UpstreamDown, true}},
	{40012, "DATABASE_INVALID_ROWS_AFFECTED", meaning{tenant.UpstreamDown, true}},
	{40013, "DATABASE_DEADLOCK_DETECTED", meaning{tenant.UpstreamDown, true}},
	{40014, "DATABASE_FAIL_TASK", meaning{tenant.UpstreamDown, true}},
	{40015, "DATABASE_FAIL_TO_GET_CONNECTIONS", meaning{tenant.UpstreamDown, true}},
	{40016, "DATABASE_TOO_MANY_CLIENTS", meaning{tenant.UpstreamDown, true}},
	{40017, "DATABASE_CONSTRAINT_VIOLATED", meaning{tenant.UpstreamRefused, false}},
	{40021, "DATABASE_CANCELED", meaning{tenant.UpstreamDown, true}},
	{40030, "RPC_REQUEST_QUEUE_FULL", meaning{tenant.UpstreamDown, true}},
	{40031, "RPC_SERVER_UNAVAILABLE", meaning{tenant.UpstreamDown, true}},
	{40032, "RPC_REQUEST_TIMEOUT", meaning{tenant.UpstreamDown, true}},
	{40033, "RPC_MAX_MESSAGE_SIZE_EXCEEDED", meaning{tenant.UpstreamRefused, false}},
	{40034, "EXTERNAL_CONNECTION_ERROR", meaning{tenant.UpstreamDown, true}},
	{40035, "RPC_CANCELED", meaning{tenant.UpstreamDown, true}},
	{40036, "RPC_UNKNOWN_METHOD", meaning{tenant.UpstreamRefused, false}},
	{40037, "REQUEST_CANCELED_BY_USER", meaning{tenant.UpstreamDown, true}},
	{43040, "CLUSTER_INTERNAL_FAILURE", meaning{tenant.UpstreamDown, true}},

	{46006, "USER_FLAGGED", meaning{tenant.UpstreamAccount, false}},
	{62002, "FEATUREFLAG_BLOCKED", meaning{tenant.UpstreamAccount, false}},
	{65000, "AUTH_MISSING_IDP_ASSOC", meaning{tenant.UpstreamPAT, false}},
	{69000, "BILLING_INVALID_INFO", meaning{tenant.UpstreamAccount, false}},
	{69001, "BILLING_MISSING_TOKENS", meaning{tenant.UpstreamAccount, false}},

	{98004, "INTERNAL_SERVER_ISSUE", meaning{tenant.UpstreamDown, true}},
	{98005, "INTERNAL_FETCHING_ISSUE", meaning{tenant.UpstreamDown, true}},
	{98006, "INTERNAL_DATABASE_ISSUE", meaning{tenant.UpstreamDown, true}},
	{98008, "INTERNAL_CONTEXT_CANCELED", meaning{tenant.UpstreamDown, true}},
	{98009, "INTERNAL_UNEXPECTED_TIMEOUT", meaning{tenant.UpstreamDown, true}},
	{98011, "INTERNAL_UNEXPECTED_PANIC", meaning{tenant.UpstreamDown, true}},
	{98014, "INTERNAL_RESOURCE_EXHAUSTED", meaning{tenant.UpstreamDown, true}},
	{99001, "CONN_UNCATEGORIZED", meaning{tenant.UpstreamDown, true}},
	{99009, "INTERNAL_UNCATEGORIZED", meaning{tenant.UpstreamDown, true}},
}

var meanings, codesByName = indexCodes()

func indexCodes() (map[int]meaning, map[string]int) {
	byCode, byName := map[int]meaning{}, map[string]int{"SUCCESS": codeSuccess}
	for _, c := range codes {
		byCode[c.code], byName[c.name] = c.meaning, c.code
	}
	return byCode, byName
}

// meaningOf returns what a status code means. A code that is not in the table, or 0
// for a name that is not, means what the HTTP status says: the envelope shows that
// Clarifai itself set it. There is no "not found" among these: what is taken for gone
// is forgotten, and a guess is not enough for that.
func meaningOf(code, httpStatus int) meaning {
	if m, ok := meanings[code]; ok {
		return m
	}
	if code >= 98000 && code < 100000 { // internal faults, whatever the HTTP status
		return meaning{tenant.UpstreamDown, true}
	}
	switch {
	case httpStatus == http.StatusTooManyRequests:
		return meaning{tenant.UpstreamThrottled, false}
	case httpStatus == http.StatusUnauthorized:
		return meaning{tenant.UpstreamPAT, false}
	case httpStatus == http.StatusPaymentRequired:
		return meaning{tenant.UpstreamAccount, false}
	case httpStatus == http.StatusForbidden:
		return meaning{tenant.UpstreamForbidden, false}
	case httpStatus >= 400 && httpStatus < 500:
		return meaning{tenant.UpstreamRefused, false}
	}
	return meaning{tenant.UpstreamDown, true}
}
