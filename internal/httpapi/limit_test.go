package httpapi_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tenantry/tenantry/internal/httpapi"
)

// The context of a request ends with its time, with its caller and with itself, whether or not
// somebody asked before, and so do those that are made of it.
func TestLimited(t *testing.T) {
	t.Parallel()
	for _, asked := range []bool{false, true} {
		for name, c := range map[string]struct {
			end  func(leave, done func())
			want error
		}{
			"its time":   {func(func(), func()) { time.Sleep(httpapi.WorkTimeout) }, context.DeadlineExceeded},
			"its caller": {func(leave, _ func()) { leave() }, context.Canceled},
			"nothing":    {func(func(), func()) { time.Sleep(httpapi.WorkTimeout - time.Second) }, nil},
		} {
			synctest.Test(t, func(t *testing.T) {
				base, leave := context.WithCancel(context.Background())
				defer leave()
				ctx, done := httpapi.Limited(base)
				defer done()
				if end, ok := ctx.Deadline(); !ok || time.Until(end) != httpapi.WorkTimeout {
					t.Errorf("it ends at %s, %t", end, ok)
				}
				child := context.Context(nil)
				if asked {
					var cancel context.CancelFunc
					child, cancel = context.WithCancel(ctx)
					defer cancel()
				}
				c.end(leave, done)
				synctest.Wait()
				if err := ctx.Err(); !errors.Is(err, c.want) {
					t.Errorf("after %s, asked before: %t, it has %v", name, asked, err)
				}
				if child != nil && !errors.Is(child.Err(), c.want) {
					t.Errorf("after %s its child has %v", name, child.Err())
				}
				select {
				case <-ctx.Done():
					if c.want == nil {
						t.Error("it is done before its time")
					}
				default:
					if c.want != nil {
						t.Errorf("after %s, asked before: %t, it is not done", name, asked)
					}
				}
			})
		}
	}
	synctest.Test(t, func(t *testing.T) {
		ctx, done := httpapi.Limited(t.Context())
		over := ctx.Done()
		done()
		<-over
		if err := ctx.Err(); !errors.Is(err, context.Canceled) {
			t.Errorf("after its request it has %v", err)
		}
	})
}
