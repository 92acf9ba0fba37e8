package provision

import (
	"context"
	"errors"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/tenant"
)

// How demand is measured: by sign-ups in each beat of the last hour.
const (
	poolBeat  = 5 * time.Second
	poolBeats = int(time.Hour / poolBeat)
	// poolLead is how long it takes until an app that was handed out is made good: until
	// a sweep sees it, and a build has found two calls that nobody else wants.
	poolLead = 2 // beats
	// A demand counts half after poolHalfLife, and an eighth at the end of the hour.
	poolHalfLife = 20 * time.Minute
	// callsPerSignUp are those of a build, and one that marks the app.
	callsPerSignUp = CallsPerBuild + 1
)

// How fast a pool changes.
const (
	poolBuilds = 8 // at once, of a profile
	poolDrain  = 2 // apps that are taken out at a plan, at most
)

// poolTarget is how many apps of a pool shall be ready, by how many tenants signed up
// in each beat of the last hour, at so many upstream calls a second.
//
// The pool has to hold what signs up faster than Clarifai can be made to build. In a
// beat it builds c = rate × beat / calls of a sign-up, and what it builds comes the
// lead late. So at the end of each beat t the pool would have had to hold
//
//	need(t) = sign-ups in the lead before t + backlog(t - lead)
//	backlog(t) = max(0, backlog(t-1) + sign-ups in t - c)
//
// which is the most, of all stretches of time that end at t, of what came in it less
// what could be built in it. The target is the largest need of the hour, each counted
// less the longer it is ago, between the least and the most that the profile allows: it
// rises with the first beat of a burst, and falls slowly, so that the next burst finds
// it and a lull does not remove apps that are built again right after.
func poolTarget(signUps []int, rate float64, fewest, most int) int {
	built := rate * poolBeat.Seconds() / callsPerSignUp
	backlog := make([]float64, len(signUps)+1) // by the beats that have passed
	want := 0.0
	recent := 0
	for t, n := range signUps {
		backlog[t+1] = max(0, backlog[t]+float64(n)-built)
		recent += n
		if t >= poolLead {
			recent -= signUps[t-poolLead]
		}
		need := float64(recent) + backlog[max(0, t+1-poolLead)]
		ago := time.Duration(len(signUps)-1-t) * poolBeat
		want = max(want, need*math.Exp2(-ago.Seconds()/poolHalfLife.Seconds()))
	}
	return max(fewest, int(math.Ceil(min(want, float64(most)))))
}

// keepPools plans the pools that are due.
func (s *Service) keepPools(ctx context.Context) error {
	return s.Store.PlanPools(ctx, s.byName(), tenant.PoolPlan{
		Every: s.PoolEvery, Patience: s.PoolPatience, Drain: poolDrain, Beat: poolBeat, Beats: poolBeats,
		Target: func(p tenant.Profile, signUps []int) int {
			fewest, most := p.PoolBounds()
			return poolTarget(signUps, s.Rate, fewest, most)
		},
	}, worker)
}

// importBuilds is how many builds are under way at once while tenants of a profile wait
// in the background. A build waits twice for a call that nobody else wants: with as many
// as there are calls in a second some build has one to make, whenever it is free. Calls
// that are shared take more to be filled, for as many tenants as there are to have them:
// those who wait otherwise have builds of their own.
func (s *Service) importBuilds(perCall int) int {
	return min(max(poolBuilds, int(math.Ceil(s.Rate))*perCall), max(poolBuilds, s.MaxBuilds))
}

// byName are the profiles, by name.
func (s *Service) byName() []tenant.Profile {
	return slices.SortedFunc(slices.Values(s.Profiles), func(a, b tenant.Profile) int { return strings.Compare(a.Name, b.Name) })
}

// prove looks whether an app of the pool can still be handed out. A tenant may get it
// meanwhile: what is written down then finds another state, and tend looks again.
func (s *Service) prove(ctx context.Context, a tenant.App) error {
	_, dead, err := s.defaultKeyDead(ctx, a)
	switch {
	case err != nil:
		return err
	case dead:
		s.Log.Warn("pool app retired: its key is gone at Clarifai", zap.String("app", string(a.ID)))
		return s.Store.MemberDead(ctx, a, workerOf(ctx))
	}
	return s.Store.KeyProven(ctx, a)
}

// proveHeld looks whether the key that a tenant got with an app of the pool works, and
// has another made if it is gone.
func (s *Service) proveHeld(ctx context.Context, a tenant.App) error {
	key, dead, err := s.defaultKeyDead(ctx, a)
	switch {
	case err != nil:
		return err
	case dead:
		s.Log.Warn("a tenant was given an app whose key is gone; another is made", zap.String("app", string(a.ID)))
		return s.Store.RemakeHeldKey(ctx, a, key.ID, newRowID(), workerOf(ctx))
	}
	return s.Store.KeyProven(ctx, a)
}

// defaultKeyDead reports whether the key that an app was built with is gone. That the
// key is refused is not enough, for Clarifai may refuse all of them for a while: gone
// is what the operator's PAT does not find either. A key that was revoked meanwhile is
// not dead.
func (s *Service) defaultKeyDead(ctx context.Context, a tenant.App) (key tenant.SealedKey, dead bool, err error) {
	key, err = s.Store.DefaultKeyOf(ctx, a.ID)
	if errors.Is(err, tenant.NotFound) {
		return key, false, nil
	}
	if err != nil {
		return key, false, err
	}
	secret, err := s.Keyring.Open(key.ID, key.Ciphertext)
	if err != nil {
		return key, false, err
	}
	_, err = s.opens(ctx, background, secret)
	if tenant.ClassOf(err) != tenant.UpstreamNotFound {
		return key, false, err
	}
	gone := s.call(ctx, background, func(ctx context.Context) error { return s.Upstream.KeyExists(ctx, secret) })
	if tenant.ClassOf(gone) == tenant.UpstreamNotFound {
		return key, true, nil
	}
	if gone != nil {
		return key, false, gone
	}
	return key, false, err // it is there and refused: it is tried again later
}

// A PoolReason says why a pool has fewer apps ready than it shall.
type PoolReason struct {
	Code   string
	Detail string
}

// A PoolStatus is how the pool of a profile stands, and why if it is short.
type PoolStatus struct {
	tenant.Pool
	Fewest, Most int
	Reason       *PoolReason // nil if nothing is missing
}

// Pools returns how the pools stand of the profiles that this replica has, by profile.
func (s *Service) Pools(ctx context.Context) ([]PoolStatus, error) {
	upstream, _, err := s.UpstreamStatus(ctx)
	if err != nil {
		return nil, err
	}
	return s.pools(ctx, upstream)
}

func (s *Service) pools(ctx context.Context, upstream tenant.UpstreamStatus) ([]PoolStatus, error) {
	profiles := s.byName()
	names := make([]string, len(profiles))
	for i, p := range profiles {
		names[i] = p.Name
	}
	pools, load, err := s.Store.Pools(ctx, names)
	if err != nil {
		return nil, err
	}
	recovery, err := s.Store.Recovery(ctx)
	if err != nil {
		return nil, err
	}
	status := make([]PoolStatus, len(pools))
	for i, pool := range pools {
		status[i].Pool = pool
		status[i].Fewest, status[i].Most = profiles[i].PoolBounds()
		if status[i].Most == 0 {
			status[i].Target = 0 // what is left of it is handed out or removed
			continue
		}
		if pool.Ready < max(pool.Target, status[i].Fewest) {
			status[i].Reason = reasonOf(pool, profiles[i], load, recovery, upstream)
		}
	}
	return status, nil
}

func reasonOf(pool tenant.Pool, p tenant.Profile, load tenant.PoolLoad, recovery tenant.Recovery, upstream tenant.UpstreamStatus) *PoolReason {
	switch {
	case recovery.State == tenant.Stopped:
		return &PoolReason{tenant.ErrAnotherDatabase.Code, tenant.ErrAnotherDatabase.Detail}
	case upstream.Pause.Scope == tenant.PauseAll:
		return &PoolReason{upstream.Halted.Code, upstream.Halted.Detail}
	case upstream.PATRefused != nil:
		return &PoolReason{upstream.PATRefused.Code, upstream.PATRefused.Detail}
	case upstream.Pauses > 0 && upstream.PauseReason != nil:
		return &PoolReason{"upstream_paused", "upstream work is paused: " + upstream.PauseReason.Detail}
	case pool.Problem != nil:
		return &PoolReason{pool.Problem.Code, pool.Problem.Detail}
	case pool.Revision != "" && pool.Revision != p.Revision():
		return &PoolReason{"revision_changes", "the pool is kept of another revision of the profile, until no replica has that for a minute"}
	case upstream.Waiting > 0:
		return &PoolReason{"sign_ups_wait", counted(upstream.Waiting, "tenant waits", "tenants wait") + " for an app, and are built for first"}
	case upstream.Importing > 0:
		return &PoolReason{"import", "upstream budget used by import: of the apps that are being built the pool gets the first, and " +
			counted(upstream.Importing, "tenant that waits in the background", "tenants that wait in the background") + " the others"}
	}
	var busy []string
	for _, other := range []struct {
		n         int
		one, many string
	}{
		{load.Keys, "key in work", "keys in work"}, {load.Reports, "reconciliation", "reconciliations"},
		{load.Marking, "app of a tenant to be marked", "apps of tenants to be marked"}, {upstream.Purging, "app to be removed", "apps to be removed"},
	} {
		if other.n > 0 {
			busy = append(busy, counted(other.n, other.one, other.many))
		}
	}
	if len(busy) > 0 {
		return &PoolReason{"upstream_busy", "upstream calls are wanted by other work too: " + strings.Join(busy, ", ")}
	}
	return &PoolReason{"filling", "the apps that are missing are being built"}
}

func counted(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return strconv.Itoa(n) + " " + many
}
