package clarifaisim

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"slices"
	"time"

	"github.com/go-chi/chi/v5"
)

// maxBody is the largest request body in bytes.
const maxBody = 4 << 20

// A call is one request to Clarifai on its way.
type call struct {
	*endpoint
	requestID string
	secret    string // what came behind "Key", "" if nothing did
	params    map[string]string
	query     url.Values
	path      string
	body      []byte
	log       Call
	ticket    ticket

	// Set by authorise.
	now  time.Time
	user string // the owner of what the call is about
	key  *key   // the app-specific key that was used, nil for a PAT
	pat  PAT
	app  *app // the app that the path or the key names, if one does
}

// handler returns what serves an endpoint: log, throttle, latency and faults, and
// in the middle of them the call itself.
func (s *Sim) handler(e *endpoint) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		c := s.begin(e, r)
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
		if err != nil {
			if tooLarge := (*http.MaxBytesError)(nil); !errors.As(err, &tooLarge) {
				panic(http.ErrAbortHandler) // the client is gone
			}
			s.answer(w, c, refuse(codeTooLarge, "the body has more than %d bytes", maxBody))
			return
		}
		c.body = body
		settings, throttled := s.admit(c)
		if throttled {
			s.answer(w, c, refuse(codeThrottled, "exceeded limit of %d requests per second", settings.RateLimit))
			return
		}
		s.wait(r.Context(), settings.LatencyMS)
		if fault, hit := s.nextFault(c.name); hit {
			s.inject(w, r, c, fault)
			return
		}
		s.answer(w, c, s.perform(c))
	}
}

// begin notes the arrival of a request.
func (s *Sim) begin(e *endpoint, r *http.Request) *call {
	c := &call{
		endpoint:  e,
		requestID: newRequestID(r),
		secret:    secretOf(r),
		params:    make(map[string]string),
		query:     r.URL.Query(),
		path:      r.URL.EscapedPath(),
		log:       Call{At: s.now().UTC(), Call: e.name},
	}
	route := chi.RouteContext(r.Context())
	for i, name := range route.URLParams.Keys {
		// EscapedPath is a valid escape, so that it can be undone.
		c.params[name], _ = url.PathUnescape(route.URLParams.Values[i])
	}
	c.log.AppID = c.params["app"]
	c.ticket = s.calls.add(c.log)
	return c
}

// answer sends an envelope and notes it.
func (s *Sim) answer(w http.ResponseWriter, c *call, a answer) {
	settings := s.Settings()
	c.log.Status = a.code
	c.log.HTTP = settings.httpFor(a.code)
	s.calls.update(c.ticket, c.log) // before the client can look at the log
	a.write(w, c, settings)
}

// admit returns the settings that the call began under, and whether its user made
// as many calls in the last second as he may.
func (s *Sim) admit(c *call) (_ Settings, throttled bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if pat, ok := s.pats[c.secret]; ok {
		c.log.UserID = pat.UserID
	} else if k, ok := s.world.keys[c.secret]; ok {
		c.log.UserID, c.log.AppID = k.UserID, k.AppID
	}
	s.calls.update(c.ticket, c.log)
	settings := s.settings.clone()
	if settings.RateLimit == 0 || c.log.UserID == "" || c.auth == noAuth {
		return settings, false
	}
	now := s.now()
	recent := slices.DeleteFunc(s.accepted[c.log.UserID], func(t time.Time) bool { return now.Sub(t) >= time.Second })
	throttled = len(recent) >= settings.RateLimit
	if !throttled {
		recent = append(recent, now)
	}
	s.accepted[c.log.UserID] = recent
	return settings, throttled
}

// perform carries a call out.
func (s *Sim) perform(c *call) answer {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.performLocked(c)
}

func (s *Sim) performLocked(c *call) answer {
	c.now = s.tick()
	if refusal, refused := s.authorise(c); refused {
		return refusal
	}
	if c.app != nil {
		c.log.AppID = c.app.App.ID
	}
	return c.do(s, c)
}

// wait lets time pass. It does not return if the client goes away or the
// simulator is closed meanwhile.
func (s *Sim) wait(ctx context.Context, ms int) {
	if ms == 0 {
		return
	}
	timer := time.NewTimer(time.Duration(ms) * time.Millisecond)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
		panic(http.ErrAbortHandler)
	case <-s.closing.Done():
		panic(http.ErrAbortHandler)
	}
}

// nextFault returns the first rule that fires for a call, and uses it up.
func (s *Sim) nextFault(call string) (Fault, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, f := range s.faults {
		switch {
		case f.Call != "*" && f.Call != call:
			continue
		case f.Probability > 0 && rand.Float64() >= f.Probability:
			continue
		case f.Count == 1:
			s.faults = slices.Delete(slices.Clone(s.faults), i, i+1)
		case f.Count > 1:
			s.faults = slices.Clone(s.faults)
			s.faults[i].Count--
		}
		return f, true
	}
	return Fault{}, false
}

// inject answers a call as a fault says, or not at all.
func (s *Sim) inject(w http.ResponseWriter, r *http.Request, c *call, f Fault) {
	c.log.Fault = f.kind()
	s.calls.update(c.ticket, c.log)
	if f.LateMS > 0 {
		defer s.performLate(c, f.LateMS) // also when the connection is cut by a panic
	}
	var done answer
	if f.changesFirst() {
		done = s.perform(c)
		s.calls.update(c.ticket, c.log)
	}
	s.wait(r.Context(), f.DelayMS)
	if f.RetryAfter != "" {
		w.Header().Set("Retry-After", f.RetryAfter)
	}
	switch {
	case f.Hang:
		select {
		case <-r.Context().Done():
		case <-s.closing.Done():
		}
		panic(http.ErrAbortHandler)
	case f.Status != 0:
		a := f.answer(c)
		a.body = done.body
		s.answer(w, c, a)
	case f.HTTP != 0:
		c.log.HTTP = f.HTTP
		s.calls.update(c.ticket, c.log)
		f.writeHTML(w)
	case f.drops():
		cut(w)
	case f.changesFirst():
		s.answer(w, c, done)
	default:
		s.answer(w, c, s.perform(c))
	}
}

// performLate carries a call out some time after its request ended. What it comes
// to is seen by nobody.
func (s *Sim) performLate(c *call, ms int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing.Err() != nil {
		return
	}
	epoch := s.epoch
	s.lateWork.Go(func() {
		timer := time.NewTimer(time.Duration(ms) * time.Millisecond)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-s.closing.Done():
			return
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.epoch == epoch {
			s.performLocked(c)
		}
	})
}

// cut ends the connection so that the client sees it reset, without an answer.
func cut(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler) // cuts it too, if less roughly
	}
	under := conn
	if t, ok := conn.(interface{ NetConn() net.Conn }); ok {
		under = t.NetConn()
	}
	if tcp, ok := under.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = conn.Close()
}
