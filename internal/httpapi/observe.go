package httpapi

import (
	"context"
	"fmt"
	"net/http"
	"regexp"
	"runtime/debug"
	"strings"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-chi/chi/v5/middleware"
	"github.com/google/uuid"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/tenantry/tenantry/internal/tenant"
)

// requestInfo is what is learnt of a request on its way, for its one log line.
type requestInfo struct {
	id     string
	base   context.Context // ends when the caller goes away; has no time limit
	caller tenant.Caller
	tenant tenant.ID
	err    error
}

type infoKey struct{}

func infoOf(r *http.Request) *requestInfo { return r.Context().Value(infoKey{}).(*requestInfo) }

// actorOf names the caller for the audit log.
func actorOf(r *http.Request) tenant.Actor {
	info := infoOf(r)
	return tenant.Actor{Name: "caller:" + info.caller.TokenID, RequestID: info.id}
}

var saneRequestID = regexp.MustCompile(`^[A-Za-z0-9._:/+=@-]{1,128}$`)

// observe gives a request its id, and writes its metrics and its one log line,
// also when a handler panics.
func (s *server) observe(next http.Handler) http.Handler {
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		began := time.Now()
		info := &requestInfo{id: r.Header.Get("X-Request-Id")}
		if info.id == "" || !saneRequestID.MatchString(info.id) || isTokenLike(info.id) {
			info.id = uuid.NewString()
		}
		info.base = context.WithValue(r.Context(), infoKey{}, info)
		r = r.WithContext(info.base)
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
