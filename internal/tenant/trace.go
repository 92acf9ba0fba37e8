package tenant

import (
	"context"
	"sync/atomic"
)

type upstreamTraceKey struct{}

// WithUpstreamTrace returns a context that remembers the request id of the last
// upstream call that was made with it.
func WithUpstreamTrace(ctx context.Context) context.Context {
	return context.WithValue(ctx, upstreamTraceKey{}, new(atomic.Value))
}

// NoteUpstreamRequest is for the upstream client: it tells the trace of ctx, if
// there is one, Clarifai's id of the call that was just answered, or "".
func NoteUpstreamRequest(ctx context.Context, id string) {
	if trace, ok := ctx.Value(upstreamTraceKey{}).(*atomic.Value); ok {
		trace.Store(id)
	}
}

// LastUpstreamRequest returns the request id of the last call made with ctx; empty
// if there was none, it was not answered, or ctx has no trace.
func LastUpstreamRequest(ctx context.Context) string {
	trace, ok := ctx.Value(upstreamTraceKey{}).(*atomic.Value)
	if !ok {
		return ""
	}
	id, _ := trace.Load().(string)
	return id
}
