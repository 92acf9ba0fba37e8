package provision_test

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tenantry/tenantry/internal/provision"
)

// recorded reads sign-ups in each beat; n*m stands for m beats of n. They were not taken
// from anybody's service, but made up as such days go.
func recorded(t *testing.T, name string) []int {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", "signups", name+".txt"))
	if err != nil {
		t.Fatal(err)
	}
	var beats []int
	_, numbers, _ := strings.Cut(string(text), "\n") // the first line says what it is
	for _, word := range strings.Fields(numbers) {
		number, times, _ := strings.Cut(word, "*")
		n, err := strconv.Atoi(number)
		if err != nil {
			t.Fatal(err)
		}
		m := 1
		if times != "" {
			if m, err = strconv.Atoi(times); err != nil {
				t.Fatal(err)
			}
		}
		for range m {
			beats = append(beats, n)
		}
	}
	return beats
}

// A poolRun is what came of a pool.
type poolRun struct {
	signUps, misses, builds, drained, mostReady int
	lastBuild                                   int   // the beat that it began in
	targets                                     []int // at each beat
	ready                                       []int // at the end of each beat
}

// keepPool keeps a pool of a Clarifai that takes so many calls a second, as the engine
// does: who waits comes first, what is left of the calls builds for the pool.
func keepPool(signUps []int, rate float64, target func(lastHour []int) int) poolRun {
	const waiterTakes, poolTakes = 1, 2 // beats
	const planEvery = int(15 * time.Second / provision.PoolBeat)
	const patience = int(10 * time.Minute / provision.PoolBeat)
	var r poolRun
	past := make([]int, provision.PoolBeats)
	done := map[int]int{} // builds by the beat in which they end
	ready, waiting, buildingFor, buildingPool, above, want := 0, 0, 0, 0, 0, target(past)
	poolDone := map[int]int{}
	calls := 0.0
	for t, n := range signUps {
		ready += done[t] + poolDone[t]
		buildingFor -= done[t]
		buildingPool -= poolDone[t]
		served := min(ready, waiting)
		ready, waiting = ready-served, waiting-served
		hits := min(ready, n)
		ready, waiting = ready-hits, waiting+n-hits
		r.signUps += n
		r.misses += n - hits
		past = append(past[1:], n)
		if t%planEvery == 0 {
			want = target(past)
			if ready <= want {
				above = t
			} else if t-above > patience {
				out := min(ready-want, provision.PoolDrain)
				ready -= out
				r.drained += out
			}
		}
		calls = min(calls, 0) + rate*provision.PoolBeat.Seconds()
		for calls >= provision.CallsPerSignUp && waiting > buildingFor {
			calls -= provision.CallsPerSignUp
			buildingFor++
			r.builds++
			done[t+waiterTakes]++
		}
		for calls >= provision.CallsPerSignUp && want+waiting > ready+buildingFor+buildingPool && buildingPool < provision.PoolBuilds {
			calls -= provision.CallsPerSignUp
			buildingPool++
			r.builds++
			poolDone[t+poolTakes]++
			r.lastBuild = t
		}
		r.mostReady = max(r.mostReady, ready)
		r.targets = append(r.targets, want)
		r.ready = append(r.ready, ready)
	}
	return r
}

func TestPoolTargetOnRecordedSignUps(t *testing.T) {
	t.Parallel()
	const rate, fewest = 14, 2
	minute := int(time.Minute / provision.PoolBeat)
	for _, c := range []struct {
		name  string
		most  int
		check func(t *testing.T, signUps []int, follows, fixed poolRun)
	}{
		{"steady", 20, func(t *testing.T, _ []int, follows, fixed poolRun) {
			if follows.misses*50 > follows.signUps || fixed.misses*10 < fixed.signUps {
				t.Errorf("%d of %d sign-ups miss, and %d at a target that stays: want no more than 2 %%, and that it is needed",
					follows.misses, follows.signUps, fixed.misses)
			}
			if follows.drained != 0 {
				t.Errorf("%d apps are removed while sign-ups go on as before", follows.drained)
			}
		}},
		{"launch", 400, func(t *testing.T, signUps []int, follows, _ poolRun) {
			if at := 62 * minute; follows.targets[at] < follows.targets[59*minute]+100 {
				t.Errorf("a minute into the launch the target is %d", follows.targets[at])
			}
			// An hour later a newspaper writes of it: what the launch was too fast for.
			again := append([]int{}, signUps...)
			again[130*minute] += 200
			target := func(hour []int) int { return provision.PoolTarget(hour, rate, fewest, 400) }
			if more := keepPool(again, rate, target).misses - follows.misses; more > 0 {
				t.Errorf("%d of 200 sign-ups at once miss, an hour after the launch", more)
			}
		}},
		{"nightly", 40, func(t *testing.T, _ []int, follows, fixed poolRun) {
			if first := 2 * 30; follows.misses > first || fixed.misses*10 < 9*fixed.signUps {
				t.Errorf("%d of %d sign-ups miss, and %d at a target that stays: want the first of each night",
					follows.misses, follows.signUps, fixed.misses)
			}
		}},
		{"silence", 20, func(t *testing.T, signUps []int, follows, _ poolRun) {
			end := len(signUps) - 1
			if follows.targets[end] != fewest || follows.ready[end] != fewest {
				t.Errorf("after hours of silence the target is %d and %d are ready; want %d", follows.targets[end], follows.ready[end], fewest)
			}
			if follows.lastBuild > 40*minute {
				t.Errorf("a build begins %d minutes into the silence", follows.lastBuild/minute-30)
			}
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			signUps := recorded(t, c.name)
			follows := keepPool(signUps, rate, func(hour []int) int { return provision.PoolTarget(hour, rate, fewest, c.most) })
			fixed := keepPool(signUps, rate, func([]int) int { return fewest })
			for at, target := range follows.targets {
				if target < fewest || target > c.most {
					t.Fatalf("at beat %d the target is %d; want %d to %d", at, target, fewest, c.most)
				}
			}
			if follows.misses > fixed.misses {
				t.Errorf("%d sign-ups miss, and %d at a target that stays", follows.misses, fixed.misses)
			}
			// What is built and not signed up to is in the pool, or was once too much.
			if most := follows.signUps + c.most + follows.drained; follows.builds > most || follows.drained > 2*c.most {
				t.Errorf("%d apps are built for %d sign-ups, and %d removed", follows.builds, follows.signUps, follows.drained)
			}
			c.check(t, signUps, follows, fixed)
		})
	}
}

// The slower Clarifai may be called, the more has to be ready.
func TestPoolTargetByRate(t *testing.T) {
	t.Parallel()
	hour := recorded(t, "launch")[20*12 : 20*12+provision.PoolBeats]
	last := 0
	for _, rate := range []float64{1000, 100, 30, 14, 5, 1, 0.1} {
		target := provision.PoolTarget(hour, rate, 0, 1_000_000)
		if target < last {
			t.Errorf("at %v calls a second the target is %d, and %d at more", rate, target, last)
		}
		last = target
	}
	if quiet := provision.PoolTarget(make([]int, provision.PoolBeats), 14, 3, 20); quiet != 3 {
		t.Errorf("without sign-ups the target is %d; want the least", quiet)
	}
}
