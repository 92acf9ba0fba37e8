package postgres

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// Calls that come while as many are under way as may be go together, each gets its own
// answer, and one that has gone is left out.
func TestShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		var mu sync.Mutex
		var runs [][]int
		s := &shared[int, int]{run: func(_ context.Context, calls []int) ([]int, error) {
			mu.Lock()
			runs = append(runs, calls)
			mu.Unlock()
			<-release
			out := make([]int, len(calls))
			for i, c := range calls {
				out[i] = 10 * c
			}
			return out, nil
		}}
		ctx, leave := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		ask := func(ctx context.Context, i int, want error) {
			wg.Go(func() {
				if got, err := s.do(ctx, i); !errors.Is(err, want) || err == nil && got != 10*i {
					t.Errorf("do(%d) = %d, %v; want %d, %v", i, got, err, 10*i, want)
				}
			})
			synctest.Wait()
		}
		for i := range sharedAtOnce {
			ask(t.Context(), i, nil)
		}
		ask(ctx, 100, context.Canceled)
		for i := range sharedMost + 1 {
			ask(t.Context(), 200+i, nil)
		}
		leave()
		synctest.Wait()
		if len(runs) != sharedAtOnce {
			t.Errorf("%d runs are under way; want %d", len(runs), sharedAtOnce)
		}
		close(release)
		wg.Wait()
		var sizes []int
		for _, r := range runs {
			sizes = append(sizes, len(r))
			if slices.Contains(r, 100) {
				t.Error("the call was run that had gone")
			}
		}
		slices.Sort(sizes)
		want := append(slices.Repeat([]int{1}, sharedAtOnce), 2, sharedMost-1)
		if !slices.Equal(sizes, want) {
			t.Errorf("the calls went in runs of %v; want %v", sizes, want)
		}
		synctest.Wait() // for the goroutines that looked for more calls
		// Alone again: at once, and nothing is left running.
		if got, err := s.do(t.Context(), 7); got != 70 || err != nil || s.running != 0 {
			t.Errorf("do = %d, %v with %d running; want 70 with none", got, err, s.running)
		}
	})
}

// A panic takes no place away, nor do results that are too few.
func TestSharedPanics(t *testing.T) {
	t.Parallel()
	fault := "panic: a fault of ours"
	s := &shared[int, int]{run: func(_ context.Context, calls []int) ([]int, error) {
		switch fault {
		case "panic: a fault of ours":
			panic("a fault of ours")
		case "0 results for 1 calls":
			return nil, nil
		}
		return calls, nil
	}}
	for _, fault = range []string{fault, "0 results for 1 calls"} {
		for range sharedAtOnce {
			if _, err := s.do(t.Context(), 1); err == nil || !strings.Contains(err.Error(), fault) {
				t.Errorf("do: %v; want %s", err, fault)
			}
		}
	}
	fault = ""
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if got, err := s.do(ctx, 2); got != 2 || err != nil {
		t.Errorf("after panics, do returns %d, %v", got, err)
	}
}
