package postgres

import (
	"context"
	"crypto/subtle"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/maypok86/otter/v2"

	"github.com/tenantry/tenantry/internal/tenant"
)

// The cache holds what look-ups read, in a compact form: tenants, which tenant an
// app was given to, the keys of tenants, and callers; of tenants, their keys and apps
// also that there are none. It holds no secret.
//
// Who follows the change log (see follower) takes out of it what has changed, and says
// up to when nothing else had. That is believed for trustFor; afterwards every
// read goes to Postgres until the log is followed again. What a method of this DB has
// changed is taken out before the method returns.
//
// Only what cannot change without an event of the change log is held: a tenant that
// changes shows problems of other rows, which come and go without one. SQL by hand writes no
// events, so an entry is fresh for confirmFor at most; then it is read again before it is served as fresh.
//
// When the log can no longer be followed from the last position, as after a failover, the next epoch
// begins. Entries of earlier epochs are never fresh again: a lookup replaces them by what it reads. While
// Postgres is unreachable they are served as stale, up to maxStale after the last poll of their epoch.
// This includes what a rollback has removed from the database: it was right at that time, which is what
// the Age of a stale response says. To drop it would leave nothing to serve in the next outage, in
// which nobody can know better.

// trustFor bounds for how long the cache may be behind Postgres.
const trustFor = 250 * time.Millisecond

// confirmFor is the maximum time for which an entry is fresh after the read that it is from.
const confirmFor = time.Minute

const (
	// patience is how long a read that could be answered from the cache, though it is
	// not trusted, waits for Postgres.
	patience = time.Second
	// lookupTimeout bounds a look-up that others may wait for, too: it does not end
	// with the request that began it.
	lookupTimeout = 10 * time.Second
)

type cacheKind uint8

const (
	cachedTenant cacheKind = iota
	cachedApp              // whose it is
	cachedKeys             // of a tenant
	cachedCaller
	cacheKinds // their number
)

type cacheKey struct {
	kind cacheKind
	id   string
}

// A cacheEntry is what is held of one key. Of a caller it is the caller; of all
// others a row, whose empty text says that there is nothing of the id.
type cacheEntry struct {
	row    string
	caller *heldCaller
	// until is when the entry must be read again before it is fresh: of a caller set by its reader, of a row by
	// cache.end.
	until seconds
	epoch uint32 // set by cache.end
}

// Seconds are a time of the cache's clock. They keep entries at four words: with five, a lookup takes a fifth longer.
type seconds uint32

// A heldCaller is a caller whose token was found valid.
type heldCaller struct {
	tenant.Caller
	hash []byte
}

// A cache is safe for use by many goroutines.
type cache struct {
	entries  int
	maxStale time.Duration
	clock    *clock

	held *otter.Cache[cacheKey, cacheEntry] // nil without entries
	// epochs is replaced as a whole, by those who hold mu.
	epochs atomic.Pointer[epochs]
	// When the last poll of the change log began after which no entry of this epoch is outdated; never
	// before the first.
	polledAt atomic.Int64
	// When Postgres may be asked again for cached entries of a kind, after a read of that kind has failed; 0 if none has.
	asksAt [cacheKinds]atomic.Int64

	hits, misses, stale atomic.Uint64
	gaps                atomic.Int64

	mu sync.Mutex
	// open says that what is read may be held, since its changes are followed.
	open  bool               // guarded by mu
	fills map[cacheKey]*fill // guarded by mu
}

const never = int64(-1) << 62

// epochs says when entries were last known to be right.
type epochs struct {
	current uint32
	past    map[uint32]time.Duration // time of the clock of the last poll; only those within maxStale
}

// A fill is one read of Postgres for all who miss a key meanwhile. One that has begun
// before a change of its key is taken out of cache.fills: nobody joins it any more, and
// what it finds is not held.
type fill struct {
	began  time.Duration // of the cache's clock
	done   chan struct{}
	result any // set before done is closed
	err    error
}

func newCache(entries int, maxStale time.Duration) *cache {
	c := &cache{entries: entries, maxStale: maxStale, clock: newClock(), fills: map[cacheKey]*fill{}}
	c.polledAt.Store(never)
	c.epochs.Store(&epochs{})
	if entries > 0 {
		c.held = otter.Must(&otter.Options[cacheKey, cacheEntry]{MaximumSize: entries})
	}
	return c
}

// trusted reports whether the cache is behind Postgres by no more than trustFor.
func (c *cache) trusted() bool { return c.trustedAt(c.clock.now()) }

func (c *cache) trustedAt(now time.Duration) bool {
	return c.entries > 0 && c.sincePollAt(now) <= trustFor
}

// sincePoll is for how long it is not known whether what is held has changed.
func (c *cache) sincePoll() time.Duration { return c.sincePollAt(c.clock.now()) }

func (c *cache) sincePollAt(now time.Duration) time.Duration {
	at := c.polledAt.Load()
	if at == never {
		return time.Duration(1<<63 - 1)
	}
	return now - time.Duration(at)
}

// confirmAt is when an entry of a read that began at a time of the clock must be read again. It is random, so that
// entries which were read together are not read again together.
func confirmAt(began time.Duration) seconds {
	return seconds((began + confirmFor - rand.N(confirmFor/4)) / time.Second)
}

// isFresh reports whether an entry was read within confirmFor, and is behind Postgres by no more than trustFor
// if all changes write events.
func (c *cache) isFresh(e cacheEntry) bool {
	now := c.clock.now()
	// In this order: the epoch changes before the first poll in it.
	return now < time.Duration(e.until)*time.Second && c.trustedAt(now) && e.epoch == c.epochs.Load().current
}

// age is how long it has not been known whether an entry is still right.
func (c *cache) age(e cacheEntry) time.Duration {
	for {
		epochs := c.epochs.Load()
		age := c.sincePoll()
		if e.epoch != epochs.current {
			age = time.Duration(1<<63 - 1)
			if polled, ok := epochs.past[e.epoch]; ok {
				age = c.clock.now() - polled
			}
		}
		if c.epochs.Load() == epochs {
			return age
		}
	}
}

// isUsable reports whether an entry may be served while Postgres is unreachable.
func (c *cache) isUsable(e cacheEntry) bool { return c.age(e) <= c.maxStale }

// servesAlone reports whether a lookup could be served while Postgres is unreachable: this needs the entry
// of a caller, and that of a row.
func (c *cache) servesAlone() bool {
	if c.entries == 0 {
		return false
	}
	var caller, row bool
	for k, e := range c.held.All() {
		if !c.isUsable(e) {
			continue
		}
		switch {
		case k.kind != cachedCaller:
			row = true
		case !e.caller.endsWithin(0):
			caller = true
		}
		if caller && row {
			return true
		}
	}
	return false
}

// asks reports whether Postgres shall be asked for a cached entry of a kind, which it is not while
// that would only make everybody wait: after a failure one reader tries, now and then.
func (c *cache) asks(k cacheKind) bool {
	at := c.asksAt[k].Load()
	if at == 0 {
		return true
	}
	now := c.clock.now()
	return now >= time.Duration(at) && c.asksAt[k].CompareAndSwap(at, int64(now+patience))
}

func (c *cache) peek(k cacheKey) (cacheEntry, bool) {
	if c.entries == 0 {
		return cacheEntry{}, false
	}
	return c.held.GetIfPresent(k)
}

// forget takes keys out, also those that are being read.
func (c *cache) forget(keys ...cacheKey) {
	if c.entries == 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, k := range keys {
		delete(c.fills, k)
		c.held.Invalidate(k)
	}
}

// nextEpoch makes all entries stale. Unless open, nothing is cached until it is called again.
func (c *cache) nextEpoch(open bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open = open
	clear(c.fills)
	was, now := c.epochs.Load(), c.clock.now()
	next := &epochs{current: was.current + 1, past: map[uint32]time.Duration{}}
	for epoch, polled := range was.past {
		if now-polled <= c.maxStale {
			next.past[epoch] = polled
		}
	}
	if polled := c.polledAt.Load(); polled != never {
		next.past[was.current] = time.Duration(polled)
	}
	c.epochs.Store(next)
	c.polledAt.Store(never)
	if c.entries > 0 && len(next.past) == 0 {
		c.held.InvalidateAll()
	}
}

// current records that nothing that had changed when a poll began, at that time
// of the clock, is held.
func (c *cache) current(began time.Duration) {
	if !c.trusted() { // an outage has ended
		for k := range c.asksAt {
			c.asksAt[k].Store(0)
		}
	}
	c.polledAt.Store(int64(began))
}

// A reader begins to read what is at a key, and calls end once, from any goroutine.
// What it finds is held if keep is true.
type reader func(end func(result any, e cacheEntry, keep bool, err error))

// share reads what is at a key: one read for all who ask at the same time and after
// the same changes.
func (c *cache) share(ctx context.Context, k cacheKey, read reader) (any, error) {
	c.mu.Lock()
	f := c.fills[k]
	begins := f == nil
	if begins {
		f = &fill{began: c.clock.now(), done: make(chan struct{})}
		c.fills[k] = f
	}
	c.mu.Unlock()
	if begins {
		read(func(result any, e cacheEntry, keep bool, err error) { c.end(k, f, result, e, keep, err) })
	}
	select {
	case <-f.done:
		return f.result, f.err
	case <-ctx.Done():
		return nil, translate("look up", ctx.Err())
	}
}

func (c *cache) end(k cacheKey, f *fill, result any, e cacheEntry, keep bool, err error) {
	f.result, f.err = result, err
	c.mu.Lock()
	if c.fills[k] == f { // it has not changed since the read began
		delete(c.fills, k)
		switch {
		case c.entries == 0:
		case keep && c.open:
			e.epoch = c.epochs.Load().current
			if e.caller == nil {
				e.until = confirmAt(f.began)
			}
			c.held.Set(k, e)
		case !keep && err == nil && k.kind != cachedCaller: // the entry is outdated
			c.held.Invalidate(k)
		}
	}
	c.mu.Unlock()
	close(f.done)
}

// compare invalidates the entry of a key if Postgres has returned something else for it, which is not
// cached: the entry would be served as stale.
func (c *cache) compare(k cacheKey, read cacheEntry, keep bool, err error) {
	if e, found := c.peek(k); found && (keep && e.row != read.row || !keep && err == nil) {
		c.forget(k)
	}
}

// A Freshness says how old an answer may be. The zero Freshness is as good as Postgres'
// own.
type Freshness struct {
	// Age is for how long it is not known whether the answer is still right. It is zero
	// unless Postgres cannot be reached.
	Age time.Duration
}

// Stale reports whether the answer may be wrong.
func (f Freshness) Stale() bool { return f.Age > 0 }

// lookUp answers what is at a key: from memory while that is trusted, or else from
// Postgres, or else, if Postgres cannot be reached, from memory after all.
func lookUp[T any](ctx context.Context, c *cache, k cacheKey, decode func(cacheEntry) (T, error), read reader) (T, Freshness, error) {
	e, found := c.peek(k)
	if found && c.isFresh(e) {
		c.hits.Add(1)
		t, err := decode(e)
		return t, Freshness{}, err
	}
	c.misses.Add(1)
	ask := func(ctx context.Context) (T, error) {
		if c.trusted() {
			return typed[T](c.share(ctx, k, read))
		}
		// Alone: to share a read that has begun before is to be behind by as much.
		return typed[T](alone(ctx, func(end func(any, cacheEntry, bool, error)) {
			read(func(result any, e cacheEntry, keep bool, err error) {
				c.compare(k, e, keep, err)
				end(result, e, keep, err)
			})
		}))
	}
	return insist(ctx, c, k, ask, decode)
}

// insist asks Postgres, and falls back on what is held of a key if Postgres cannot be
// reached.
func insist[T any](ctx context.Context, c *cache, k cacheKey, ask func(context.Context) (T, error), decode func(cacheEntry) (T, error)) (T, Freshness, error) {
	if e, found := c.peek(k); !found || !c.isUsable(e) {
		t, err := ask(ctx)
		return t, Freshness{}, err
	}
	away := error(ErrAway)
	if c.asks(k.kind) {
		asking, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		t, err := ask(asking)
		if err == nil || !errors.Is(err, tenant.Unavailable) {
			c.asksAt[k.kind].Store(0)
			return t, Freshness{}, err
		}
		if ctx.Err() != nil {
			return t, Freshness{}, err
		}
		away = err
		wait := patience
		if asking.Err() == nil && c.trusted() { // a connection that the last failover has cut; the next reader gets another one
			wait = pollEvery
		}
		c.asksAt[k.kind].Store(int64(c.clock.now() + wait))
	}
	// Anew: the log may have been followed meanwhile, and have taken it out.
	e, found := c.peek(k)
	age := c.age(e)
	if !found || age > c.maxStale {
		var none T
		return none, Freshness{}, away
	}
	c.stale.Add(1)
	t, err := decode(e)
	return t, Freshness{Age: age}, err
}

// ErrAway is answered while Postgres cannot be reached, and is not asked again.
var ErrAway = &tenant.Error{Kind: tenant.Unavailable, Code: "database_unavailable",
	Detail: "the database cannot be reached; try again", RetryAfter: 2 * time.Second}

// alone reads for one caller, which gets what it is at the end; the context may end
// before.
func alone(ctx context.Context, read reader) (any, error) {
	type end struct {
		result any
		err    error
	}
	ends := make(chan end, 1)
	read(func(result any, _ cacheEntry, _ bool, err error) { ends <- end{result, err} })
	select {
	case e := <-ends:
		return e.result, e.err
	case <-ctx.Done():
		return nil, translate("look up", ctx.Err())
	}
}

func typed[T any](result any, err error) (T, error) {
	if err != nil {
		var none T
		return none, err
	}
	return result.(T), nil
}

// inBackground makes a reader of a function that returns when it has read.
func (db *DB) inBackground(read func(ctx context.Context) (result any, e cacheEntry, keep bool, err error)) reader {
	return func(end func(any, cacheEntry, bool, error)) {
		db.lookups.group.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), lookupTimeout)
			defer cancel()
			end(read(ctx))
		})
	}
}

// LookUpTenant is Tenant, answered from memory where that is right.
func (db *DB) LookUpTenant(ctx context.Context, id tenant.ID) (tenant.Tenant, Freshness, error) {
	return lookUp(ctx, db.cache, cacheKey{cachedTenant, string(id)}, func(e cacheEntry) (tenant.Tenant, error) {
		if e.row == "" {
			return tenant.Tenant{}, errNotFound("tenant")
		}
		return unpackTenant(id, e.row), nil
	}, db.tenantReader(id))
}

// LookUpLabels is TenantLabels, answered from memory where that is right.
func (db *DB) LookUpLabels(ctx context.Context, id tenant.ID) (map[string]string, error) {
	t, _, err := db.LookUpTenant(ctx, id)
	return t.Labels, err
}

// LookUpTenantOfApp is TenantOfApp, answered from memory where that is right.
func (db *DB) LookUpTenantOfApp(ctx context.Context, app tenant.AppID) (tenant.Tenant, Freshness, error) {
	// Whose an app is never changes once it is somebody's.
	owner, first, err := lookUp(ctx, db.cache, cacheKey{cachedApp, string(app)}, func(e cacheEntry) (tenant.ID, error) {
		if e.row == "" {
			return "", errNotFound("app")
		}
		return tenant.ID(e.row), nil
	}, db.inBackground(func(ctx context.Context) (any, cacheEntry, bool, error) {
		owner, err := db.ownerOf(ctx, app)
		return owner, cacheEntry{row: string(owner)}, err == nil || errors.Is(err, tenant.NotFound), err
	}))
	if err != nil {
		return tenant.Tenant{}, first, err
	}
	t, second, err := db.LookUpTenant(ctx, owner)
	return t, Freshness{max(first.Age, second.Age)}, err
}

// LookUpKeys is Keys, answered from memory where that is right.
func (db *DB) LookUpKeys(ctx context.Context, id tenant.ID) ([]tenant.Key, Freshness, error) {
	return lookUp(ctx, db.cache, cacheKey{cachedKeys, string(id)}, func(e cacheEntry) ([]tenant.Key, error) {
		if e.row == "" {
			return nil, errNotFound("tenant")
		}
		return unpackKeys(e.row), nil
	}, db.inBackground(func(ctx context.Context) (any, cacheEntry, bool, error) {
		keys, err := db.Keys(ctx, id)
		if errors.Is(err, tenant.NotFound) {
			return keys, cacheEntry{}, true, err
		}
		if err != nil || !lasting(keys) {
			return keys, cacheEntry{}, false, err
		}
		return keys, cacheEntry{row: packKeys(keys)}, true, nil
	}))
}

// LookUpKey is Key, answered from memory where that is right.
func (db *DB) LookUpKey(ctx context.Context, id tenant.ID, name string) (tenant.Key, Freshness, error) {
	keys, fresh, err := db.LookUpKeys(ctx, id)
	if err != nil {
		return tenant.Key{}, fresh, err
	}
	k, ok := currentKey(keys, name)
	if !ok {
		return k, fresh, errNotFound("key")
	}
	return k, fresh, nil
}

// lasting reports whether nothing that is shown of keys can change without an event. A
// key that is being made or revoked has problems that come and go.
func lasting(keys []tenant.Key) bool {
	for _, k := range keys {
		switch k.State {
		case tenant.KeyActive, tenant.KeyRetiring, tenant.KeyRevoked:
			if k.Problem == nil {
				continue
			}
		}
		return false
	}
	return true
}

// currentKey is the key of a name as Key has it, of keys as Keys orders them.
func currentKey(keys []tenant.Key, name string) (found tenant.Key, ok bool) {
	rank := func(k tenant.Key) int {
		switch k.State {
		case tenant.KeyActive:
			return 2
		case tenant.KeyCreating:
			return 1
		}
		return 0
	}
	for _, k := range keys {
		if k.Name == name && (!ok || rank(k) >= rank(found)) { // the last of the same rank is the newest
			found, ok = k, true
		}
	}
	return found, ok
}

// authenticated is how a read of a caller ended for a token of a hash.
type authenticated struct {
	caller tenant.Caller
	hash   []byte
	err    error
}

// expiryDoubt is for how long before its end Postgres is asked whether a token has
// expired: the clocks of two machines differ.
const expiryDoubt = time.Minute

// Authenticate returns the caller that holds token, from memory where that is right. It
// reports tenant.Unauthenticated for a token that is unknown, revoked or expired, and
// notes the use, exact to a minute. While Postgres cannot be reached, a token that was
// valid is taken for as long as what else is held; the Freshness says so.
func (db *DB) Authenticate(ctx context.Context, token tenant.Token) (tenant.Caller, Freshness, error) {
	c, k := db.cache, cacheKey{cachedCaller, token.ID}
	decode := func(e cacheEntry) (tenant.Caller, error) {
		if e.caller == nil || subtle.ConstantTimeCompare(e.caller.hash, token.Hash) != 1 || e.caller.endsWithin(0) {
			return tenant.Caller{}, errToken
		}
		return e.caller.Caller, nil
	}
	ask := func(ctx context.Context) (tenant.Caller, error) {
		if !c.trusted() {
			return db.authenticate(ctx, token)
		}
		got, err := typed[authenticated](c.share(ctx, k, db.callerReader(token)))
		if err != nil {
			return tenant.Caller{}, err
		}
		if subtle.ConstantTimeCompare(got.hash, token.Hash) != 1 { // another token of this id was asked for
			return db.authenticate(ctx, token)
		}
		return got.caller, got.err
	}
	e, _ := c.peek(k)
	caller, err := decode(e)
	switch {
	case err != nil:
		caller, err = ask(ctx)
		return caller, Freshness{}, err
	case c.isFresh(e) && !e.caller.endsWithin(expiryDoubt):
		return caller, Freshness{}, nil
	}
	caller, fresh, err := insist(ctx, c, k, ask, decode)
	if errors.Is(err, tenant.Unauthenticated) { // it was revoked, and the log may not say so in this epoch
		c.forget(k)
	}
	return caller, fresh, err
}

// endsWithin reports whether a token has expired, or does within d.
func (h *heldCaller) endsWithin(d time.Duration) bool {
	return !h.ExpiresAt.IsZero() && !time.Now().Add(d).Before(h.ExpiresAt)
}

func (db *DB) callerReader(token tenant.Token) reader {
	return db.inBackground(func(ctx context.Context) (any, cacheEntry, bool, error) {
		began := db.cache.clock.now()
		caller, unnoted, err := db.readCaller(ctx, token)
		// The next read notes the use of the token.
		e := cacheEntry{caller: &heldCaller{Caller: caller, hash: token.Hash}, until: confirmAt(began - unnoted)}
		return authenticated{caller, token.Hash, err}, e, err == nil, nil
	})
}

// notices takes out what is seen to be other than Postgres has it: who has waited for a
// change finds it when it looks again, also if the log tells of it later.
func (c *cache) notices(t tenant.Tenant) {
	if e, found := c.peek(cacheKey{cachedTenant, string(t.ID)}); found && (e.row == "" || packTenant(t) != e.row) {
		c.forget(cacheKey{cachedTenant, string(t.ID)}, cacheKey{cachedKeys, string(t.ID)})
	}
	if t.AppID == "" {
		return
	}
	if e, found := c.peek(cacheKey{cachedApp, string(t.AppID)}); found && e.row == "" {
		c.forget(cacheKey{cachedApp, string(t.AppID)})
	}
}
