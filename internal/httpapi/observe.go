package httpapi

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/http"
	"regexp"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-chi/chi/v5/middleware"
	"github.com/google/uuid"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/tenantry/tenantry/internal/tenant"
)

// requestInfo is what is learnt of a request on its way, for its one log line. As a context it ends
// when the caller goes away, and has no time limit.
type requestInfo struct {
	context.Context

	id     string
	caller tenant.Caller
	tenant tenant.ID
	err    error
}

func (i *requestInfo) Value(key any) any {
	if key == (infoKey{}) {
		return i
	}
	return i.Context.Value(key)
}

// A limited is the context of a request that may work until end. The timer for that is set for
// those who ask whether it has ended: what is answered from memory needs none.
type limited struct {
	info requestInfo
	end  time.Time

	mu     sync.Mutex
	timed  context.Context // guarded by mu; nil until somebody asks
	cancel context.CancelFunc
}

func (l *limited) Deadline() (time.Time, bool) { return l.end, true }

func (l *limited) Done() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.timed == nil {
		l.timed, l.cancel = context.WithDeadline(&l.info, l.end)
	}
	return l.timed.Done()
}

func (l *limited) Err() error {
	if timed := l.asked(); timed != nil {
		return timed.Err()
	}
	if err := l.info.Err(); err != nil || time.Now().Before(l.end) {
		return err
	}
	return context.DeadlineExceeded
}

// Value finds the context with the timer too, of which others are made without a goroutine for each.
func (l *limited) Value(key any) any {
	if key == (infoKey{}) {
		return &l.info
	}
	if timed := l.asked(); timed != nil {
		return timed.Value(key)
	}
	return l.info.Value(key)
}

func (l *limited) asked() context.Context {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.timed
}

// done takes the timer back.
func (l *limited) done() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cancel != nil {
		l.cancel()
	}
}

type infoKey struct{}

func infoOf(r *http.Request) *requestInfo { return r.Context().Value(infoKey{}).(*requestInfo) }

// actorOf names the caller, with its scope.
func actorOf(r *http.Request) tenant.Actor {
	info := infoOf(r)
	return tenant.Actor{Name: "caller:" + info.caller.TokenID, RequestID: info.id, Within: info.caller.Scope}
}

var saneRequestID = regexp.MustCompile(`^[A-Za-z0-9._:/+=@-]{1,128}$`)

// observe gives a request its id, and writes its metrics and its one log line,
// also when a handler panics.
func (s *server) observe(next http.Handler) http.Handler {
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		began := time.Now()
		// Waiting comes on top of the limit: see waiting.
		ctx := &limited{info: requestInfo{Context: r.Context(), id: r.Header.Get("X-Request-Id")}, end: began.Add(workTimeout)}
		defer ctx.done()
		info := &ctx.info
		if info.id == "" || !saneRequestID.MatchString(info.id) || isTokenLike(info.id) {
			info.id = newRequestID()
		}
		r = r.WithContext(ctx)
		w := middleware.NewWrapResponseWriter(rw, r.ProtoMajor)
		w.Header().Set("X-Request-Id", info.id)
		defer func() {
			if v := recover(); v != nil {
				if v == http.ErrAbortHandler {
					panic(v)
				}
				s.Log.Error("a handler panicked", zap.String("request_id", info.id), zap.String("panic", fmt.Sprint(v)),
					zap.ByteString("stack", debug.Stack()))
				if w.Status() == 0 {
					s.writeProblem(w, r, fmt.Errorf("panic: %v", v))
				}
			}
			s.finish(w, r, info, time.Since(began))
		}()
		next.ServeHTTP(w, r)
	})
}

// newRequestID returns a random UUID. It is no secret: it need not come from the kernel.
func newRequestID() string {
	var id uuid.UUID
	binary.NativeEndian.PutUint64(id[:8], rand.Uint64())
	binary.NativeEndian.PutUint64(id[8:], rand.Uint64())
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80 // version 4, variant 1
	return id.String()
}

// isTokenLike keeps a token, or a key or PAT of Clarifai, that was sent in the wrong
// place, whole or as a part of it, out of the answer, the log and the audit events.
// That trace ids without hyphens look like a key is the price.
func isTokenLike(s string) bool {
	return strings.Contains(strings.ToLower(s), tenant.TokenPrefix) || clarifaiSecret.MatchString(s)
}

var clarifaiSecret = regexp.MustCompile(`[0-9A-Fa-f]{32}`)

func (s *server) finish(w middleware.WrapResponseWriter, r *http.Request, info *requestInfo, took time.Duration) {
	status := w.Status()
	if status == 0 {
		status = http.StatusOK
	}
	// The pattern and not the path: paths are without bound, and strangers' text.
	route := chi.RouteContext(r.Context()).RoutePattern()
	if route == "" || status == http.StatusNotFound && route == "/*" {
		route = "none"
	}
	method := r.Method
	if !isKnownMethod(method) {
		method = "other"
	}
	s.Metrics.count(method, route, status, took)

	level := zapcore.InfoLevel
	if status >= 500 {
		level = zapcore.ErrorLevel
	}
	line := s.Log.Check(level, "request")
	if line == nil {
		return
	}
	fields := []zap.Field{
		zap.String("request_id", info.id), zap.String("method", method), zap.String("route", route),
		zap.Int("status", status), zap.Duration("took", took), zap.Int("bytes", w.BytesWritten()),
	}
	if info.caller.TokenID != "" {
		fields = append(fields, zap.String("caller", info.caller.TokenID), zap.String("caller_name", info.caller.Name))
	}
	if info.tenant != "" {
		fields = append(fields, zap.String("tenant", string(info.tenant)))
	}
	if info.err != nil {
		fields = append(fields, zap.Error(info.err))
	}
	line.Write(fields...)
}

func isKnownMethod(m string) bool {
	switch m {
	case http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete, http.MethodOptions:
		return true
	}
	return false
}
