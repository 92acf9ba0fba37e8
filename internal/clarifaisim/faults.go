package clarifaisim

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
)

// A Fault is a rule for calls that go wrong. Of the rules that name a call, the
// first that fires is used alone. A throttled call meets no faults; a credential is
// looked at only when the call is carried out.
//
// A rule has Status, HTTP, DropBefore, DropAfter or Hang, not two of them, or
// DelayMS or LateMS alone. DelayMS goes with all of them.
type Fault struct {
	// Call is the name of a call, as "PostKeys", or "*" for every request below /v2.
	Call string `json:"call"`
	// Count is how many calls meet the fault; Probability how likely one does.
	// With neither, all do.
	Count       int     `json:"count,omitempty"`
	Probability float64 `json:"probability,omitempty"`

	// Status answers with this code in an envelope. With After it keeps the body of
	// the answer that there would have been, as MIXED_STATUS (10010) needs.
	Status int `json:"status,omitempty"`
	// MovedTo is the new id of the app for status MOVED (10050); "" makes one up.
	MovedTo string `json:"moved_to,omitempty"`
	// HTTP answers with this bare status and an HTML page, as a proxy does.
	HTTP int `json:"http,omitempty"`
	// RetryAfter is the Retry-After header of the answer of Status or HTTP.
	RetryAfter string `json:"retry_after,omitempty"`
	// After carries the call out before Status, HTTP, Hang or DelayMS; without it
	// Status, HTTP and Hang change nothing.
	After bool `json:"after,omitempty"`
	// DelayMS makes the answer, or what comes instead, slow.
	DelayMS int `json:"delay_ms,omitempty"`
	// DropBefore cuts the connection and changes nothing.
	DropBefore bool `json:"drop_before,omitempty"`
	// DropAfter carries the call out and cuts the connection.
	DropAfter bool `json:"drop_after,omitempty"`
	// Hang holds the connection until the client goes away or the simulator is
	// closed.
	Hang bool `json:"hang,omitempty"`
	// LateMS carries the call out so long after the connection was cut, was given
	// up by the client, or got the answer of Status or HTTP. Alone it cuts the
	// connection. The credential is looked at then, too.
	LateMS int `json:"late_ms,omitempty"`
}

func (f Fault) changesFirst() bool { return f.LateMS == 0 && (f.After || f.DropAfter) }

func (f Fault) drops() bool { return f.DropBefore || f.DropAfter || f.LateMS > 0 }

// kind names the fault in the log of calls.
func (f Fault) kind() string {
	var kinds []string
	for _, k := range []struct {
		name string
		set  bool
	}{
		{"delay", f.DelayMS > 0}, {"hang", f.Hang}, {"status", f.Status != 0}, {"http", f.HTTP != 0},
		{"drop_before", f.DropBefore}, {"drop_after", f.DropAfter}, {"late", f.LateMS > 0}, {"after", f.After},
	} {
		if k.set {
			kinds = append(kinds, k.name)
		}
	}
	return strings.Join(kinds, "+")
}

func (f Fault) check() error {
	ends := 0
	for _, set := range []bool{f.Status != 0, f.HTTP != 0, f.DropBefore, f.DropAfter, f.Hang} {
		if set {
			ends++
		}
	}
	switch {
	case f.Call == "":
		return errors.New(`call is missing: name one, or "*" for all`)
	case f.Call != "*" && !slices.Contains(callNames(), f.Call):
		return fmt.Errorf("there is no call %q; there are * and %s", f.Call, strings.Join(callNames(), ", "))
	case f.Count < 0:
		return fmt.Errorf("count is %d: it has to be 1 or more, or left out", f.Count)
	case f.Probability < 0 || f.Probability > 1:
		return fmt.Errorf("probability is %v: it has to be more than 0 and at most 1, or left out", f.Probability)
	case f.Count > 0 && f.Probability > 0:
		return errors.New("give count or probability, not both")
	case f.Status != 0 && (f.Status < codeSuccess || f.Status >= 100_000):
		return fmt.Errorf("status is %d: it has to be a Clarifai code, as 11005; for a bare HTTP status use http", f.Status)
	case f.HTTP != 0 && (f.HTTP < 200 || f.HTTP > 599):
		return fmt.Errorf("http is %d: it has to be 200 to 599", f.HTTP)
	case f.DelayMS < 0 || f.LateMS < 0:
		return errors.New("delay_ms and late_ms have to be 0 or more")
	case ends > 1:
		return errors.New("give one of status, http, drop_before, drop_after and hang (with http, status and hang, after makes the change first)")
	case ends == 0 && f.DelayMS == 0 && f.LateMS == 0:
		return errors.New("it does nothing: give status, http, drop_before, drop_after, hang, delay_ms or late_ms")
	case f.After && f.LateMS > 0:
		return errors.New("give after or late_ms, not both")
	case f.After && f.DropBefore:
		return errors.New("after contradicts drop_before: use drop_after")
	case f.RetryAfter != "" && f.Status == 0 && f.HTTP == 0:
		return errors.New("retry_after goes with status or http only")
	case f.MovedTo != "" && f.Status != codeMoved:
		return fmt.Errorf("moved_to goes with status %d only", codeMoved)
	}
	return nil
}

// answer is the envelope of a fault with a status.
func (f Fault) answer(c *call) answer {
	a := answer{code: f.Status}
	switch f.Status {
	case codeThrottled:
		a.details = "exceeded limit of 15 requests per second"
	case codeMoved:
		a.moved = c.movedTo(f.MovedTo)
	default:
		a.details = "a fault that the simulator was told to inject"
	}
	return a
}

// movedTo says that the app in the path has another id now; "" makes one up.
func (c *call) movedTo(id string) *redirect {
	old := c.params["app"]
	if id == "" {
		id = old + "-moved"
	}
	url := strings.Replace(c.path, "/apps/"+old, "/apps/"+id, 1)
	return &redirect{URL: url, ResourceType: "app", OldResourceID: old, NewResourceID: id}
}

// writeHTML answers as something on the way to Clarifai does.
func (f Fault) writeHTML(w http.ResponseWriter) {
	text := http.StatusText(f.HTTP)
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.WriteHeader(f.HTTP)
	if f.HTTP == http.StatusNoContent || f.HTTP == http.StatusNotModified {
		return
	}
	_, _ = fmt.Fprintf(w, "<html>\n<head><title>%d %s</title></head>\n<body><center><h1>%d %s</h1></center></body>\n</html>\n", f.HTTP, text, f.HTTP, text)
}

// SetFaults replaces the list of rules; an empty one ends all faults. An error
// leaves the list as it was.
func (s *Sim) SetFaults(faults []Fault) error {
	for i, f := range faults {
		if err := f.check(); err != nil {
			return fmt.Errorf("fault %d: %w", i+1, err)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = slices.Clone(faults)
	return nil
}

// Faults returns the rules that are left, with the counts that are left.
func (s *Sim) Faults() []Fault {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Fault{}, s.faults...)
}
