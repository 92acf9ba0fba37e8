// Package client is a typed client of Tenantry's API, generated from
// openapi.yaml. Use NewClientWithResponses, with WithToken among its options.
package client

import (
	"context"
	"net/http"
)

// WithToken makes a client send token with every request.
func WithToken(token string) ClientOption {
	return WithRequestEditorFn(func(_ context.Context, r *http.Request) error {
		r.Header.Set("Authorization", "Bearer "+token)
		return nil
	})
}
