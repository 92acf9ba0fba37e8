package postgres

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"

	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/tenant"
)

// The change log is the audit log: who changes a tenant, an app, a key or a caller
// writes an event of it in the same transaction. A follower in each replica reads the
// events by their ids, which are given out in order and committed in any. Thus an id
// that is passed over may be one of a transaction that is still running, or of one
// that came to nothing.
//
// A transaction locks the audit log before it draws the id of an event, and until it ends. So once an
// id is missing from what was read, every transaction that may still write it is among those that
// hold such a lock now. When all of these have ended, the next read has the event, or it will
// never exist.
//
// What is visible is acted on at once, whatever else runs: a long transaction of
// somebody else delays nothing but the forgetting of gaps.

// changeChannel wakes the followers. It says nothing about what has changed.
const changeChannel = "tenantry_changes"

const (
	// pollEvery is how often a follower looks without being woken, and pollCooldown how
	// soon again at most.
	pollEvery    = 100 * time.Millisecond
	pollCooldown = 20 * time.Millisecond
	// pollTimeout bounds one look.
	pollTimeout = 2 * time.Second
	// refollow is how long to wait before following again after the connection broke.
	refollow = 200 * time.Millisecond
	// More events, or gaps between them, than a follower keeps up with are not followed
	// one by one: the whole cache becomes stale instead.
	mostEvents = 20_000
	mostGaps   = 10_000
)

// changed takes out of memory what a transaction that has committed has changed of a
// tenant, and wakes the followers. The app is one that became the tenant's; it may be
// empty, and so may the tenant.
func (db *DB) changed(id tenant.ID, app tenant.AppID) {
	if id != "" {
		db.cache.forget(cacheKey{cachedTenant, string(id)}, cacheKey{cachedKeys, string(id)})
	}
	if app != "" {
		db.cache.forget(cacheKey{cachedApp, string(app)})
	}
	db.wakeFollowers()
}

// changedCallers is changed for callers.
func (db *DB) changedCallers(tokenIDs ...string) {
	for _, id := range tokenIDs {
		db.cache.forget(cacheKey{cachedCaller, id})
	}
	db.wakeFollowers()
}

// wakeFollowers has the followers of all replicas look soon. Nobody waits for it.
func (db *DB) wakeFollowers() {
	select {
	case db.unsent <- struct{}{}:
	default: // it will be sent
	}
}

// Follow keeps what is held in memory as the database is, until ctx ends, and wakes the
// replicas that do the same. It survives the loss of its connection.
func (db *DB) Follow(ctx context.Context, log *zap.Logger) error {
	done := make(chan struct{})
	go func() {
		defer close(done)
		db.sendWakeUps(ctx)
	}()
	if db.cache.entries > 0 {
		db.follows.Store(true)
		db.follow(ctx, log)
		db.follows.Store(false)
	}
	<-done
	db.cache.nextEpoch(false)
	return nil
}

// sendWakeUps wakes the followers after changes, once for all in a short time: a
// notification in the transactions themselves would make them wait for each other.
func (db *DB) sendWakeUps(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-db.unsent:
		}
		sending, cancel := context.WithTimeout(ctx, pollTimeout)
		// One that is lost costs the followers a moment. They are not to wait for a flush
		// either.
		_, _ = db.pool.Exec(sending, `SELECT set_config('synchronous_commit', 'off', true), pg_notify('`+changeChannel+`', '')`)
		cancel()
		select {
		case <-ctx.Done():
			return
		case <-time.After(pollCooldown):
		}
	}
}

func (db *DB) follow(ctx context.Context, log *zap.Logger) {
	f := &follower{db: db, log: log}
	for broken := false; ; {
		err := f.once(ctx, func() {
			if broken {
				log.Info("following the change log again")
			}
			broken = false
		})
		if ctx.Err() != nil {
			return
		}
		if !broken {
			log.Warn("cannot follow the change log; look-ups go to the database until it can be followed again", zap.Error(err))
		}
		broken = true
		select {
		case <-ctx.Done():
			return
		case <-time.After(refollow):
		}
	}
}

// A follower is how far the change log was followed, across connections.
type follower struct {
	db  *DB
	log *zap.Logger

	begun bool
	of    history
	last  int64 // the highest id that was seen
	// The events that were read last, and when. If one of these is missing, the database was
	// rolled back.
	recent []readEvent
	// The ids below last that were not seen.
	gaps map[int64]*gap
}

// A gap is missing ids that were noticed at the same time.
type gap struct {
	writers []string // the transactions that may write events of these ids
	ended   bool     // all of them, before the last read began
}

// A readEvent is an event that a follower has read.
type readEvent struct {
	id int64
	at time.Duration // of the cache's clock
}

// maxRecent is the maximum number of events that a follower remembers as evidence, and recentFor
// the maximum time: partitions of the log may be dropped, but not within an hour.
const (
	maxRecent = 1000
	recentFor = time.Hour
)

// A history is what a database must not have another of, for what was read of it to
// hold: a server that was put in its place, or started on what was restored, may lack
// transactions, also some that were read before the follower has seen their events.
type history struct {
	system   int64
	timeline string
	started  time.Time // the server
	// incarnation is the incarnation in which events were read.
	incarnation uuid.UUID
}

// errNotFollowed means that the log cannot be followed from the last position. A lostEvent is the
// reason: the database does not have this event any more.
var errNotFollowed = errors.New("the change log does not go on where it was followed to")

type lostEvent int64

func (e lostEvent) Error() string {
	return fmt.Sprintf("the database does not have the event %d any more", int64(e))
}

// once follows the log over one connection.
func (f *follower) once(ctx context.Context, following func()) error {
	conn, err := f.db.sessions.connect(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	if err := f.meet(ctx, conn); err != nil {
		return err
	}
	for {
		if !f.begun {
			if err := f.begin(ctx, conn); err != nil {
				return err
			}
		}
		looked := time.Now()
		err := f.poll(ctx, conn)
		if lost, ok := errors.AsType[lostEvent](err); ok {
			if err := f.rolledBack(ctx, lost); err != nil {
				return err
			}
			continue
		}
		if errors.Is(err, errNotFollowed) {
			f.log.Warn("cache is stale: the change log cannot be followed from the last position", zap.Error(err))
			f.restart()
			continue
		}
		if err != nil {
			return err
		}
		following()
		if err := f.rest(ctx, conn, looked); err != nil {
			return err
		}
	}
}

// rest waits until it is time to look again.
func (f *follower) rest(ctx context.Context, conn *pgx.Conn, looked time.Time) error {
	waiting, cancel := context.WithDeadline(ctx, looked.Add(pollEvery))
	defer cancel()
	_, err := conn.WaitForNotification(waiting)
	if err != nil && waiting.Err() == nil {
		return err
	}
	select {
	case <-time.After(time.Until(looked.Add(pollCooldown))):
	case <-ctx.Done():
	}
	return ctx.Err()
}

// rolledBack records in the database that an event which was read is missing, and invalidates the
// cache.
func (f *follower) rolledBack(ctx context.Context, lost lostEvent) error {
	f.log.Error("database rolled back: an audit event that this replica has read is missing", zap.Int64("event", int64(lost)))
	ctx, cancel := context.WithTimeout(ctx, 5*pollTimeout)
	defer cancel()
	if err := f.db.reportLoss(ctx, f.of.incarnation, int64(lost)); err != nil {
		return err
	}
	f.restart()
	return nil
}

// restart makes the whole cache stale: nothing is cached until begin.
func (f *follower) restart() {
	f.begun, f.recent = false, nil
	f.db.cache.nextEpoch(false)
}

// meet looks whether a connection leads to the database that was followed before, and
// listens on it.
func (f *follower) meet(ctx context.Context, conn *pgx.Conn) error {
	ctx, cancel := context.WithTimeout(ctx, pollTimeout)
	defer cancel()
	var now history
	// The name of the log file has the timeline at once; the control file has it only
	// after the first checkpoint.
	if err := conn.QueryRow(ctx, `
		SELECT (SELECT system_identifier FROM pg_control_system()), left(pg_walfile_name(pg_current_wal_lsn()), 8), pg_postmaster_start_time()`).
		Scan(&now.system, &now.timeline, &now.started); err != nil {
		return err
	}
	if lost, err := f.missing(ctx, conn); err != nil {
		return err
	} else if lost > 0 {
		if err := f.rolledBack(ctx, lost); err != nil {
			return err
		}
	}
	if f.begun && (now.system != f.of.system || now.timeline != f.of.timeline || !now.started.Equal(f.of.started)) {
		f.log.Warn("cache is stale: the database was restarted, restored or failed over")
		f.restart()
	}
	now.incarnation = f.of.incarnation
	f.of = now
	for _, sql := range []string{
		// To plan the poll anew costs more than the poll, and a month that was empty when it
		// was planned may not be so for long: by the order of the ids it reads what is new only.
		`SET plan_cache_mode = force_generic_plan`, `SET enable_seqscan = off`, `SET enable_bitmapscan = off`, `SET enable_sort = off`, `SET jit = off`,
		`LISTEN ` + changeChannel,
	} {
		if _, err := conn.Exec(ctx, sql); err != nil {
			return err
		}
	}
	return nil
}

// missing returns a recently read event that the database does not have any more.
func (f *follower) missing(ctx context.Context, conn *pgx.Conn) (lostEvent, error) {
	var ids []int64
	now := f.db.cache.clock.now()
	for _, e := range f.recent {
		if now-e.at < recentFor {
			ids = append(ids, e.id)
		}
	}
	if len(ids) == 0 {
		return 0, nil
	}
	var lost lostEvent
	err := conn.QueryRow(ctx, `
		SELECT coalesce(max(id), 0) FROM unnest($1::bigint[]) AS read (id) WHERE NOT EXISTS (SELECT FROM audit_events e WHERE e.id = read.id)`, ids).Scan(&lost)
	return lost, err
}

// begin starts to follow from the newest event, once no transaction can add an event
// before it any more.
func (f *follower) begin(ctx context.Context, conn *pgx.Conn) error {
	reading, cancel := context.WithTimeout(ctx, pollTimeout)
	defer cancel()
	f.last, f.gaps = 0, map[int64]*gap{}
	if err := conn.QueryRow(reading, `SELECT id FROM current_incarnation`).Scan(&f.of.incarnation); err != nil {
		return err
	}
	err := conn.QueryRow(reading, `SELECT id FROM audit_events ORDER BY id DESC LIMIT 1`).Scan(&f.last)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return err
	}
	before, err := auditWriters(reading, conn)
	for len(before) > 0 && err == nil {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pollCooldown):
		}
		before, err = f.stillWriting(ctx, conn, before)
	}
	if err != nil {
		return err
	}
	f.db.cache.nextEpoch(true)
	f.begun = true
	if f.last > 0 {
		f.recent = []readEvent{{f.last, f.db.cache.clock.now()}}
	}
	return nil
}

func (f *follower) stillWriting(ctx context.Context, conn *pgx.Conn, before []string) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, pollTimeout)
	defer cancel()
	running, err := auditWritersOf(ctx, conn, before)
	if err != nil || !running {
		return nil, err
	}
	return before, nil
}

// newEventsSQL reads the events from the last one on, and those of the gaps: all in one
// snapshot. The last one is read again, to see that it is still there.
const newEventsSQL = `
	SELECT i.id, e.id, coalesce(e.tenant_id, ''), coalesce(e.app_id, ''), coalesce(e.token_id, '')
	FROM current_incarnation i LEFT JOIN (
		(SELECT id, tenant_id, app_id, CASE WHEN action LIKE 'token.%' THEN detail->>'token_id' END AS token_id
		FROM audit_events WHERE id >= $1 ORDER BY id LIMIT $3)
		UNION ALL
		(SELECT id, tenant_id, app_id, CASE WHEN action LIKE 'token.%' THEN detail->>'token_id' END
		FROM audit_events WHERE id = ANY ($2) ORDER BY id LIMIT $3)
	) e ON true`

// poll takes out of memory what has changed since the last poll.
func (f *follower) poll(ctx context.Context, conn *pgx.Conn) error {
	ctx, cancel := context.WithTimeout(ctx, pollTimeout)
	defer cancel()
	gaps := make([]int64, 0, len(f.gaps))
	looked := map[*gap]bool{}
	for id, g := range f.gaps {
		gaps = append(gaps, id)
		if looked[g] {
			continue
		}
		looked[g] = true
		running, err := auditWritersOf(ctx, conn, g.writers)
		if err != nil {
			return err
		}
		g.ended = !running
	}
	began := f.db.cache.clock.now()
	rows, err := conn.Query(ctx, newEventsSQL, f.last, gaps, mostEvents)
	if err != nil {
		return err
	}
	defer rows.Close()
	var incarnation uuid.UUID
	newest := f.last
	seen := map[int64]bool{}
	var keys []cacheKey
	for rows.Next() {
		var id *int64
		var of tenant.ID
		var app tenant.AppID
		var token string
		if err := rows.Scan(&incarnation, &id, &of, &app, &token); err != nil {
			return err
		}
		if id == nil { // there are no events
			continue
		}
		newest, seen[*id] = max(newest, *id), true
		if *id == f.last {
			continue
		}
		if of != "" {
			keys = append(keys, cacheKey{cachedTenant, string(of)}, cacheKey{cachedKeys, string(of)})
		}
		if app != "" {
			keys = append(keys, cacheKey{cachedApp, string(app)})
		}
		if token != "" {
			keys = append(keys, cacheKey{cachedCaller, token})
		}
	}
	if err := rows.Err(); err != nil {
		return err
	}
	switch {
	case f.last > 0 && !seen[f.last] && len(f.recent) > 0 && began-f.recent[len(f.recent)-1].at < recentFor:
		return lostEvent(f.last)
	case f.last > 0 && !seen[f.last]:
		return errNotFollowed
	case len(seen) >= mostEvents || newest-f.last > mostEvents || len(f.gaps) > mostGaps:
		return errNotFollowed
	}
	f.db.cache.forget(keys...)
	for id := range seen {
		if id != f.last {
			f.recent = append(f.recent, readEvent{id, began})
		}
	}
	f.recent = f.recent[max(0, len(f.recent)-maxRecent):]
	for id, g := range f.gaps {
		if seen[id] || g.ended {
			delete(f.gaps, id)
		}
	}
	if err := f.noticeGaps(ctx, conn, newest, seen); err != nil {
		return err
	}
	f.last = newest
	f.db.compared.Store(&incarnation)
	f.db.cache.gaps.Store(int64(len(f.gaps)))
	f.db.cache.current(began)
	return nil
}

// noticeGaps records the ids up to newest that were not seen.
func (f *follower) noticeGaps(ctx context.Context, conn *pgx.Conn, newest int64, seen map[int64]bool) (err error) {
	var g *gap
	for id := f.last + 1; id < newest; id++ {
		if seen[id] {
			continue
		}
		if g == nil {
			g = &gap{}
			if g.writers, err = auditWriters(ctx, conn); err != nil {
				return err
			}
		}
		f.gaps[id] = g
	}
	return nil
}

// CacheStats are what is told of the rows that are held in memory.
type CacheStats struct {
	Hits, Misses, Stale uint64
	Entries             int
	Trusted             bool
	Gaps                int // events that may still come before others that were seen
	// Behind is for how long it is not known whether what is held has changed; negative
	// while that was never known.
	Behind time.Duration
}

// AnswersAlone reports whether lookups can be served from the cache while the database is unreachable.
// It may read the whole cache.
func (db *DB) AnswersAlone() bool { return db.cache.servesAlone() }

// CacheStats reads what is told of the rows that are held in memory.
func (db *DB) CacheStats() CacheStats {
	c := db.cache
	s := CacheStats{Gaps: int(c.gaps.Load()), Hits: c.hits.Load(), Misses: c.misses.Load(), Stale: c.stale.Load(), Trusted: c.trusted(), Behind: -1}
	if c.entries > 0 {
		s.Entries = c.held.EstimatedSize()
	}
	if c.polledAt.Load() != never {
		s.Behind = c.sincePoll()
	}
	return s
}
