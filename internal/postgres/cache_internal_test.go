package postgres

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

	"github.com/tenantry/tenantry/internal/tenant"
)

// A read that began before a change is not held after it, nor joined by who comes after
// it; one that ended before is taken out.
func TestReadsAndChanges(t *testing.T) {
	t.Parallel()
	key := cacheKey{cachedTenant, "user_1"}
	c := newCache(10, time.Minute)
	c.nextEpoch(true)

	began, end := make(chan struct{}), make(chan string)
	slow := func(done func(any, cacheEntry, bool, error)) {
		close(began)
		go func() { row := <-end; done(row, cacheEntry{row: row}, true, nil) }()
	}
	got := make(chan any)
	go func() { v, _ := c.share(t.Context(), key, slow); got <- v }()
	<-began
	c.forget(key)
	fresh := func(row string) reader {
		return func(done func(any, cacheEntry, bool, error)) { done(row, cacheEntry{row: row}, true, nil) }
	}
	if v, err := c.share(t.Context(), key, fresh("new")); v != "new" || err != nil {
		t.Errorf("who reads after a change gets %v, %v", v, err)
	}
	end <- "old"
	if v := <-got; v != "old" {
		t.Errorf("who read before the change gets %v", v)
	}
	if e, _ := c.peek(key); e.row != "new" {
		t.Errorf("after a read that began before a change, %q is held", e.row)
	}
	c.forget(key)
	if e, found := c.peek(key); found {
		t.Errorf("after a change %q is held", e.row)
	}

	// The same for a restart, after which nothing is held until the log is followed.
	began = make(chan struct{})
	go func() { v, _ := c.share(t.Context(), key, slow); got <- v }()
	<-began
	c.nextEpoch(false)
	end <- "old"
	<-got
	_, _ = c.share(t.Context(), key, fresh("new"))
	if e, found := c.peek(key); found {
		t.Errorf("while the log is not followed, %q is held", e.row)
	}
}

// An entry of an earlier epoch is never fresh, and usable for as long as its own epoch allows.
func TestEpochs(t *testing.T) {
	t.Parallel()
	c := newCache(10, time.Minute)
	forward := func(d time.Duration) { c.clock.suspend(d) }
	put := func(k cacheKey, e cacheEntry) cacheEntry {
		t.Helper()
		if _, err := c.share(t.Context(), k, func(done func(any, cacheEntry, bool, error)) { done("", e, true, nil) }); err != nil {
			t.Fatal(err)
		}
		e, found := c.peek(k)
		if !found {
			t.Fatalf("%v is not cached", k)
		}
		return e
	}
	row, caller := cacheKey{cachedTenant, "user_1"}, cacheKey{cachedCaller, "token"}
	c.nextEpoch(true)
	c.current(c.clock.now())
	first := put(row, cacheEntry{row: "first"})
	if !c.isFresh(first) || c.servesAlone() {
		t.Errorf("in its epoch an entry is fresh: %v; without a caller it serves alone: %v", c.isFresh(first), c.servesAlone())
	}
	put(caller, cacheEntry{caller: &heldCaller{}})
	forward(10 * time.Second)
	c.nextEpoch(false)
	c.nextEpoch(true)
	if age := c.age(first); age < 10*time.Second || age > time.Minute || !c.servesAlone() {
		t.Errorf("before the next epoch is followed, an entry has the age %s, and serves alone: %v", age, c.servesAlone())
	}
	c.current(c.clock.now())
	if e, _ := c.peek(row); c.isFresh(e) || !c.isUsable(e) {
		t.Errorf("in the next epoch, an entry is fresh: %v, usable: %v", c.isFresh(e), c.isUsable(e))
	}
	second := put(cacheKey{cachedTenant, "user_2"}, cacheEntry{row: "second"})
	forward(55 * time.Second)
	c.nextEpoch(true)
	if c.isUsable(first) || !c.isUsable(second) || c.servesAlone() {
		t.Errorf("after the limit of the first epoch, its entry is usable: %v, that of the second: %v; without a caller it serves alone: %v",
			c.isUsable(first), c.isUsable(second), c.servesAlone())
	}
	forward(time.Minute)
	c.nextEpoch(true)
	if c.isUsable(second) || c.held.EstimatedSize() > 0 {
		t.Errorf("after the limit of all epochs, an entry is usable: %v; %d are cached", c.isUsable(second), c.held.EstimatedSize())
	}
}

// The clock goes on while the machine is suspended, which only the wall clock sees, and never goes back.
func TestClock(t *testing.T) {
	t.Parallel()
	c := newClock()
	for _, step := range []struct {
		name       string
		wall, want time.Duration
	}{
		{"a suspension", time.Hour, time.Hour},
		{"a step back of the wall clock", -2 * time.Hour, 0},
		{"a suspension after it", time.Minute, time.Minute},
		{"a step forward", time.Second, time.Second},
	} {
		before := c.now()
		c.suspend(step.wall)
		if got := c.now() - before; got < step.want || got > step.want+30*time.Second {
			t.Errorf("with %s of %s, the clock goes on by %s; want %s", step.name, step.wall, got, step.want)
		}
	}
}

// After a suspension of the machine nothing is fresh, also if the response of a poll from before it arrives.
func TestSuspension(t *testing.T) {
	t.Parallel()
	c := newCache(10, time.Minute)
	c.nextEpoch(true)
	began := c.clock.now()
	c.current(began)
	_, err := c.share(t.Context(), cacheKey{cachedTenant, "user_1"}, func(done func(any, cacheEntry, bool, error)) { done("", cacheEntry{row: "row"}, true, nil) })
	e, found := c.peek(cacheKey{cachedTenant, "user_1"})
	if err != nil || !found || !c.isFresh(e) {
		t.Fatalf("share: %v; cached: %v, fresh: %v", err, found, c.isFresh(e))
	}
	c.clock.suspend(time.Second)
	if c.isFresh(e) {
		t.Error("after a suspension an entry is fresh before the next poll")
	}
	c.current(began)
	if c.isFresh(e) {
		t.Error("a poll from before a suspension makes an entry fresh")
	}
	c.current(c.clock.now())
	if !c.isFresh(e) {
		t.Error("after the next poll an entry is not fresh")
	}
}

// Entries that were read together are not read again in the same second.
func TestConfirmAt(t *testing.T) {
	t.Parallel()
	const n = 1000
	perSecond := map[seconds]int{}
	for range n {
		at := confirmAt(time.Hour)
		if at < 3600+45 || at > 3600+60 {
			t.Fatalf("an entry is read again after %d s", at-3600)
		}
		perSecond[at]++
	}
	for second, got := range perSecond {
		if got > n/5 {
			t.Errorf("%d of %d entries are read again in one second, after %d s", got, n, second-3600)
		}
	}
}

// What is packed comes out as it was.
func TestPacked(t *testing.T) {
	t.Parallel()
	now := time.UnixMicro(time.Now().UnixMicro())
	for _, want := range []tenant.Tenant{
		{ID: "a", State: tenant.Active, Generation: 1, Version: 1, Profile: "default", AppID: "t-1", CreatedAt: now, UpdatedAt: now},
		{ID: "b", State: tenant.Deleted, Generation: 300, Version: 1 << 40, Profile: "pro", DisplayName: "Ödön\x00", DeletionProtection: true,
			AppUserID: "somebody", Labels: map[string]string{"": "", "plan": "pro"}, CreatedAt: now.Add(-time.Hour * 1e6)},
	} {
		row := packTenant(want)
		if diff := cmp.Diff(want, unpackTenant(want.ID, row)); diff != "" {
			t.Errorf("a tenant is unpacked as another (-want +got):\n%s", diff)
		}
		if again := packTenant(unpackTenant(want.ID, row)); again != row {
			t.Errorf("a tenant is packed in two ways: %q and %q", row, again)
		}
	}
	keys := []tenant.Key{
		{ID: uuid.New(), AppID: "t-1", Name: "default", State: tenant.KeyActive, Hint: "abcd", Scopes: []string{"All"}, CreatedAt: now, ActivatedAt: now,
			Fingerprint: []byte{0, 1, 255}},
		{ID: uuid.New(), AppID: "t-1", Name: "other", State: tenant.KeyRevoked, Scopes: []string{}, CreatedAt: now, RevokedAt: now, RetiresAt: now, ExpiresAt: now,
			EndReason: tenant.EndRevoked},
	}
	if diff := cmp.Diff(keys, unpackKeys(packKeys(keys))); diff != "" {
		t.Errorf("keys are unpacked as others (-want +got):\n%s", diff)
	}
	if packKeys(nil) == "" {
		t.Error("no keys are packed as no tenant")
	}
}

// The key of a name is the one that Key finds in the database.
func TestCurrentKey(t *testing.T) {
	t.Parallel()
	at := func(s tenant.KeyState, hint string) tenant.Key {
		return tenant.Key{Name: "default", State: s, Hint: hint}
	}
	for want, keys := range map[string][]tenant.Key{
		"active":   {at(tenant.KeyRevoked, "old"), at(tenant.KeyActive, "active"), at(tenant.KeyRevoked, "new"), {Name: "other", State: tenant.KeyActive}},
		"creating": {at(tenant.KeyRevoked, "old"), at(tenant.KeyCreating, "creating"), at(tenant.KeyRetiring, "new")},
		"newest":   {at(tenant.KeyRevoked, "old"), at(tenant.KeyRetiring, "newer"), at(tenant.KeyRevoked, "newest")},
	} {
		if k, ok := currentKey(keys, "default"); !ok || k.Hint != want {
			t.Errorf("of %v, the current key is %q", keys, k.Hint)
		}
	}
	if k, ok := currentKey([]tenant.Key{{Name: "other"}}, "default"); ok {
		t.Errorf("the current key of a name that there is none of is %v", k)
	}
}

// BenchmarkHeld shows how much memory a tenant and its app take.
func BenchmarkHeld(b *testing.B) {
	c := newCache(2*b.N+1, time.Minute)
	c.nextEpoch(true)
	held := c.held
	now := time.Now()
	b.ReportAllocs()
	for range b.N {
		id := uuid.NewString()
		t := tenant.Tenant{ID: tenant.ID(id), State: tenant.Active, Generation: 1, Version: 2, Profile: "default",
			AppID: tenant.AppID("tny-" + id[:26]), CreatedAt: now, UpdatedAt: now, DisplayName: "A user"}
		held.Set(cacheKey{cachedTenant, id}, cacheEntry{row: packTenant(t)})
	}
}

// BenchmarkLookUpHeld is a look-up that is answered from memory.
func BenchmarkLookUpHeld(b *testing.B) {
	c := newCache(10_000, time.Minute)
	db := &DB{cache: c}
	db.lookups = &lookups{db: db}
	c.nextEpoch(true)
	c.current(c.clock.now() + time.Hour)
	var ids []tenant.ID
	for range 1000 {
		id := tenant.ID(uuid.NewString())
		ids = append(ids, id)
		c.held.Set(cacheKey{cachedTenant, string(id)}, cacheEntry{until: 3600, epoch: c.epochs.Load().current, row: packTenant(tenant.Tenant{ID: id, State: tenant.Active, Profile: "default",
			AppID: "tny-01jd0000000000000000000000", CreatedAt: time.Now(), UpdatedAt: time.Now()})})
	}
	rand.Shuffle(len(ids), func(i, j int) { ids[i], ids[j] = ids[j], ids[i] })
	ids = slices.Clip(ids)
	b.ReportAllocs()
	b.ResetTimer()
	for i := range b.N {
		if _, _, err := db.LookUpTenant(b.Context(), ids[i%len(ids)]); err != nil {
			b.Fatal(err)
		}
	}
}
