package clarifaisim

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"

	"github.com/google/uuid"
)

// An answer is what a call comes to, before it is put into an envelope.
type answer struct {
	code    int
	details string
	body    []member
	// status overrides what the envelope says, and the HTTP code with it: for
	// GetStatusCode, whose answer is the envelope.
	status *statusCode
	// moved is set for codeMoved.
	moved *redirect
}

// A member is a field of an answer next to its status.
type member struct {
	name  string
	value any
}

// A redirect says where a thing went.
type redirect struct {
	URL           string `json:"url"`
	ResourceType  string `json:"resource_type"`
	OldResourceID string `json:"old_resource_id"`
	NewResourceID string `json:"new_resource_id"`
}

func ok(body ...member) answer { return answer{code: codeSuccess, body: body} }

func refuse(code int, format string, args ...any) answer {
	return answer{code: code, details: fmt.Sprintf(format, args...)}
}

// status is the status of an envelope.
type status struct {
	Code           int       `json:"code"`
	Description    string    `json:"description,omitempty"`
	Details        string    `json:"details,omitempty"`
	RequestID      string    `json:"req_id,omitempty"`
	RedirectInfo   *redirect `json:"redirect_info,omitempty"`
	HTTPStatusCode int       `json:"http_status_code,omitempty"`
}

// write sends an answer and returns its HTTP code.
func (a answer) write(w http.ResponseWriter, c *call, settings Settings) int {
	st := status{
		Code: a.code, Description: statusByCode[a.code].description, Details: a.details,
		RequestID: c.requestID, HTTPStatusCode: settings.httpFor(a.code),
	}
	httpCode := st.HTTPStatusCode
	if a.status != nil {
		st.Code, st.Description, st.HTTPStatusCode = a.status.code, a.status.description, settings.httpFor(a.status.code)
	}
	if a.moved != nil {
		st.RedirectInfo = a.moved
		w.Header().Set("Location", a.moved.URL)
	}
	body, err := encode(st, a.members(c.list))
	if err != nil {
		// All that is answered is made of plain fields and of JSON that was checked.
		panic(fmt.Sprintf("clarifaisim: %s cannot be answered: %v", c.name, err))
	}
	w.Header().Set("Content-Type", "application/json; charset=UTF-8")
	w.Header().Set("Grpc-Metadata-Content-Type", "application/grpc")
	w.Header().Set("X-Clarifai-Request-Id", c.requestID)
	w.WriteHeader(httpCode)
	_, _ = w.Write(body)
	return httpCode
}

// members returns the body with the list of the call, which is there even if it is
// empty or the call failed.
func (a answer) members(list string) []member {
	if list == "" {
		return a.body
	}
	for _, m := range a.body {
		if m.name == list {
			return a.body
		}
	}
	return append([]member{{list, []any{}}}, a.body...)
}

// encode writes an object with the status in front, as Clarifai does.
func encode(st status, body []member) ([]byte, error) {
	var buf bytes.Buffer
	for i, m := range append([]member{{"status", st}}, body...) {
		value, err := json.Marshal(m.value)
		if err != nil {
			return nil, fmt.Errorf("encode %s: %w", m.name, err)
		}
		sep := ","
		if i == 0 {
			sep = "{"
		}
		fmt.Fprintf(&buf, "%s%q:%s", sep, m.name, value)
	}
	buf.WriteString("}\n")
	return buf.Bytes(), nil
}

// newRequestID returns 32 hexadecimal digits behind the prefix that the client
// asked for.
func newRequestID(r *http.Request) string {
	id := strings.ReplaceAll(uuid.NewString(), "-", "")
	prefix := r.Header.Get("X-Clarifai-Request-Id-Prefix")
	if prefix == "" || len(prefix) > 128 {
		return id
	}
	return prefix + "-" + id
}
