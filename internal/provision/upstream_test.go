package provision_test

import (
	"context"
	"testing"
	"time"

	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// Every way in which Clarifai can fail is said in words of its own.
func TestEveryUpstreamFailureHasWords(t *testing.T) {
	t.Parallel()
	for _, c := range tenant.UpstreamClasses {
		if !provision.HasProblem(c) {
			t.Errorf("the class %s has no problem to show", c)
		}
	}
	if provision.HasProblem("unheard of") {
		t.Error("a class that does not exist has a problem to show")
	}
}

// A call for the control record is made in a stopped database even if its first permit is too old.
func TestLateCallForControlRecord(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{Idle: true})
	exec(t, w, provisiontest.SetRecovery(tenant.Stopped))
	called := false
	if err := r.SendLate(t.Context(), func(context.Context) error { called = true; return nil }); err != nil || !called {
		t.Errorf("the call is made: %t; %v", called, err)
	}
}

// Back-off doubles up to its cap, never ends and never overflows.
func TestBackoff(t *testing.T) {
	t.Parallel()
	for _, attempts := range []int{0, 1, 3, 10, 29, 30, 64, 1 << 30} {
		want := 30 * time.Second
		if attempts < 5 {
			want = time.Second << attempts
		}
		for range 100 {
			if got := provision.Backoff(time.Second, 30*time.Second, attempts); got > want || got < want*3/4 {
				t.Fatalf("after %d attempts the wait is %s; want %s less up to a quarter", attempts, got, want)
			}
		}
	}
}
