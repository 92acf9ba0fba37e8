package provision_test

import (
	"testing"
	"time"

	"github.com/tenantry/tenantry/internal/provision"
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
