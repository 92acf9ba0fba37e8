package clarifaisim

import (
	"maps"
	"sync"
	"time"
)

// A Call is one request to Clarifai, as the log has it. It holds no secret.
type Call struct {
	// At is when the request came in.
	At   time.Time `json:"at"`
	Call string    `json:"call"`
	// UserID is the user whose credential was used, AppID the app that the request
	// was about; "" where that cannot be said.
	UserID string `json:"user_id"`
	AppID  string `json:"app_id"`
	// Status is the code and HTTP the HTTP code that was sent; 0 if none was, or
	// none yet.
	Status int `json:"status"`
	HTTP   int `json:"http"`
	// Fault says which fault was injected, as "drop_after".
	Fault string `json:"fault,omitempty"`
}

// A callLog remembers the last calls and counts all of them.
type callLog struct {
	max int

	mu     sync.Mutex
	ring   []Call
	next   int // number of calls since the last reset
	epoch  int // counts resets
	byName map[string]int
}

// A ticket finds a call that was added, as long as the log remembers it.
type ticket struct{ epoch, n int }

func (l *callLog) add(c Call) ticket {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.byName == nil {
		l.byName = make(map[string]int)
	}
	l.byName[c.Call]++
	if len(l.ring) < l.max {
		l.ring = append(l.ring, c)
	} else {
		l.ring[l.next%l.max] = c
	}
	l.next++
	return ticket{l.epoch, l.next - 1}
}

// update replaces what a call came to.
func (l *callLog) update(t ticket, c Call) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if t.epoch == l.epoch && t.n >= l.next-len(l.ring) {
		l.ring[t.n%l.max] = c
	}
}

func (l *callLog) all() []Call {
	l.mu.Lock()
	defer l.mu.Unlock()
	calls := make([]Call, 0, len(l.ring))
	oldest := l.next % l.max
	if l.next < l.max {
		oldest = 0
	}
	calls = append(calls, l.ring[oldest:]...)
	return append(calls, l.ring[:oldest]...)
}

func (l *callLog) counts() map[string]int {
	l.mu.Lock()
	defer l.mu.Unlock()
	counts := make(map[string]int, len(l.byName))
	maps.Copy(counts, l.byName)
	return counts
}

func (l *callLog) reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ring, l.next, l.byName = nil, 0, nil
	l.epoch++
}
