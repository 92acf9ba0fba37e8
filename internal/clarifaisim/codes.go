package clarifaisim

import "net/http"

// Status codes that the simulator itself answers with.
const (
	codeSuccess          = 10000
	codeMixed            = 10010
	codeMoved            = 10050
	codeAccepted         = 10070
	codeThrottled        = 11005
	codeExceedsLimits    = 11006
	codeScopes           = 11007
	codeKeyInvalid       = 11008
	codeKeyNotFound      = 11009
	codeBadFormat        = 11100
	codeDoesNotExist     = 11101
	codeInvalidRequest   = 11102
	codeMethodNotAllowed = 11103
	codeDuplicate        = 40010
	codeTooLarge         = 40033
	codeInternal         = 98004
)

// A statusCode is what goes with a code. HTTP codes are partly guesses: see
// Settings.HTTPCodes.
type statusCode struct {
	code        int
	description string
	http        int
}

// statusCodes are in ascending order.
var statusCodes = []statusCode{
	{codeSuccess, "Ok", http.StatusOK},
	{codeMixed, "Mixed Success", http.StatusMultiStatus},
	{10020, "Failure", http.StatusInternalServerError},
	{10030, "Try the request again", http.StatusServiceUnavailable},
	{10040, "Not implemented", http.StatusNotImplemented},
	{codeMoved, "Resource moved", http.StatusTemporaryRedirect},
	{codeAccepted, "Accepted", http.StatusAccepted},
	{11000, "Account or plan issue", http.StatusPaymentRequired},
	{11001, "Invalid token", http.StatusUnauthorized},
	{11002, "Invalid authentication credentials", http.StatusUnauthorized},
	{11003, "Hourly limit exceeded", http.StatusTooManyRequests},
	{11004, "Monthly limit exceeded", http.StatusTooManyRequests},
	{codeThrottled, "Making too many requests", http.StatusTooManyRequests},
	{codeExceedsLimits, "Account limits exceeded", http.StatusPaymentRequired},
	{codeScopes, "API key has insufficient permissions", http.StatusForbidden},
	{codeKeyInvalid, "Invalid API key or Invalid API key/application pair", http.StatusUnauthorized},
	{codeKeyNotFound, "API key not found", http.StatusUnauthorized},
	{codeBadFormat, "Bad request format", http.StatusBadRequest},
	{codeDoesNotExist, "Resource does not exist", http.StatusNotFound},
	{codeInvalidRequest, "Invalid request", http.StatusBadRequest},
	{codeMethodNotAllowed, "Request method not allowed", http.StatusMethodNotAllowed},
	{11104, "No GDPR consent", http.StatusForbidden},
	{11200, "Authentication method is disabled", http.StatusUnauthorized},
	{39997, "This type of request is disabled for maintenance, try again in a few hours", http.StatusServiceUnavailable},
	{codeDuplicate, "Object has a duplicate ID; another object with same ID already exist.", http.StatusBadRequest},
	{40011, "Database timeout", http.StatusInternalServerError},
	{40012, "Database rows", http.StatusInternalServerError},
	{40013, "Database deadlock", http.StatusInternalServerError},
	{40014, "Database task failed", http.StatusInternalServerError},
	{40015, "Too many database connections", http.StatusInternalServerError},
	{40016, "Too many database clients", http.StatusInternalServerError},
	{40017, "The request violates a constraint", http.StatusInternalServerError},
	{40021, "Database request cancelled", http.StatusInternalServerError},
	{40030, "Server is too busy", http.StatusServiceUnavailable},
	{40031, "Server is unavailable", http.StatusServiceUnavailable},
	{40032, "Request has timed out", http.StatusGatewayTimeout},
	{codeTooLarge, "Message size exceeded", http.StatusRequestEntityTooLarge},
	{40034, "External connection error", http.StatusServiceUnavailable},
	{40035, "Request cancelled", http.StatusServiceUnavailable},
	{40036, "Unknown method", http.StatusNotFound},
	{43040, "Cluster internal failure", http.StatusInternalServerError},
	{46006, "User is flagged", http.StatusForbidden},
	{62002, "Blocked by a feature flag", http.StatusForbidden},
	{65000, "Not authorised at the identity provider", http.StatusUnauthorized},
	{69000, "Invalid billing information", http.StatusPaymentRequired},
	{69001, "Missing billing tokens", http.StatusPaymentRequired},
	{codeInternal, "Internal server issue", http.StatusInternalServerError},
	{98005, "Internal fetching issue", http.StatusInternalServerError},
	{98006, "Internal database issue", http.StatusInternalServerError},
	{98008, "Internal cancellation", http.StatusInternalServerError},
	{98009, "Internal timeout", http.StatusInternalServerError},
	{98011, "Internal panic", http.StatusInternalServerError},
	{98014, "Internal resource exhausted", http.StatusInternalServerError},
	{99001, "Connection issue, uncategorized", http.StatusInternalServerError},
	{99009, "Internal issue, uncategorized", http.StatusInternalServerError},
}

var statusByCode = func() map[int]statusCode {
	m := make(map[int]statusCode, len(statusCodes))
	for _, s := range statusCodes {
		m[s.code] = s
	}
	return m
}()

// isFailure reports whether a code can stand for a failure, known or not.
func isFailure(code int) bool {
	return code > codeSuccess && code < 100_000 && code != codeAccepted
}

// httpFor returns the HTTP code of a status code; 500 for one that is not known.
func (s Settings) httpFor(code int) int {
	if h, ok := s.HTTPCodes[code]; ok {
		return h
	}
	if known, ok := statusByCode[code]; ok {
		return known.http
	}
	return http.StatusInternalServerError
}
