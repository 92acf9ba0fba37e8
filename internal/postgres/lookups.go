package postgres

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/tenant"
)

// plainColumns is all there is to say of a tenant that is not under way: the rest of
// tenantColumns is null then, and dear to make ready even where it is not evaluated.
const plainColumns = `t.id, t.generation, t.state, t.profile, coalesce(t.app_id, ''), coalesce(t.app_user_id, ''), t.display_name, t.labels,
	t.deletion_protection, t.problem, t.version, t.created_at, t.updated_at`

func scanPlain(row pgx.CollectableRow) (tenant.Tenant, error) {
	var t tenant.Tenant
	var labels []byte
	err := row.Scan(&t.ID, &t.Generation, &t.State, &t.Profile, &t.AppID, &t.AppUserID, &t.DisplayName, &labels,
		&t.DeletionProtection, &t.Problem, &t.Version, &t.CreatedAt, &t.UpdatedAt)
	if err != nil {
		return t, err
	}
	if string(labels) == "{}" {
		t.Labels = map[string]string{}
		return t, nil
	}
	return t, json.Unmarshal(labels, &t.Labels)
}

// isPlain reports whether plainColumns say all of a tenant in a state.
func isPlain(s tenant.State) bool { return s == tenant.Active || s == tenant.Deleted }

// A lookedUp is a tenant as it was read.
type lookedUp struct {
	tenant tenant.Tenant
	// lasts says that nothing that is shown of it can change without an event.
	lasts bool
	err   error
}

// A wanted is a look-up of a tenant, and who waits for it.
type wanted struct {
	id  tenant.ID
	end func(lookedUp)
}

// Who comes while a statement looks tenants up shares the next one, which begins when that
// one ends: the more come, the fewer statements each of them costs. A second one begins
// before if there are enough for it, so that Postgres need not wait for us. One that
// takes longer than slowStatement is waited for no more, while there are fewer than
// mostStatements.
const (
	enough         = 12
	slowStatement  = 5 * time.Millisecond
	mostStatements = 4
)

// mostTenants is how many tenants one statement looks up.
const mostTenants = 500

// lookups share statements between those who look tenants up at the same time.
type lookups struct {
	db    *DB
	group sync.WaitGroup

	mu      sync.Mutex
	running int       // guarded by mu
	began   time.Time // when the newest of these statements began; guarded by mu
	waiting []wanted  // guarded by mu
}

// add looks a tenant up, in a statement that begins later than now.
func (l *lookups) add(w wanted) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.waiting = append(l.waiting, w)
	switch {
	case l.running == 0 || l.running == 1 && len(l.waiting) >= enough:
		l.start()
	case len(l.waiting) == 1:
		time.AfterFunc(slowStatement, l.relieve)
	}
}

// relieve begins another statement if there are some who wait for a slow one.
func (l *lookups) relieve() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.waiting) > 0 && l.running < mostStatements && time.Since(l.began) >= slowStatement {
		l.start()
	}
}

// start is called with mu held.
func (l *lookups) start() {
	l.running++
	l.began = time.Now()
	l.group.Go(l.run)
}

func (l *lookups) run() {
	for {
		batch := l.next()
		if len(batch) == 0 {
			return
		}
		l.read(batch)
	}
}

// next takes those who wait, or ends one of those that run.
func (l *lookups) next() []wanted {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := min(len(l.waiting), mostTenants)
	if n == 0 {
		l.running--
		return nil
	}
	batch := slices.Clone(l.waiting[:n])
	l.waiting = slices.Delete(l.waiting, 0, n)
	l.began = time.Now()
	return batch
}

func (l *lookups) read(batch []wanted) {
	ctx, cancel := context.WithTimeout(context.Background(), lookupTimeout)
	defer cancel()
	if len(batch) == 1 {
		batch[0].end(l.db.lookUpOne(ctx, batch[0].id))
		return
	}
	found, err := l.db.lookUpSome(ctx, batch)
	for _, w := range batch {
		switch t, ok := found[w.id]; {
		case err != nil:
			w.end(lookedUp{err: err})
		case !ok:
			w.end(lookedUp{err: errNotFound("tenant")})
		default:
			w.end(t)
		}
	}
}

func (db *DB) lookUpOne(ctx context.Context, id tenant.ID) lookedUp {
	rows, _ := db.pool.Query(ctx, `SELECT `+plainColumns+` FROM tenants t WHERE t.id = $1`, id)
	t, err := pgx.CollectExactlyOneRow(rows, scanPlain)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return lookedUp{err: errNotFound("tenant")}
	case err != nil:
		return lookedUp{err: translate("read tenant", err)}
	case isPlain(t.State):
		return lookedUp{tenant: t, lasts: t.Problem == nil}
	}
	moving, err := db.lookUpMoving(ctx, []tenant.ID{id})
	if err != nil {
		return lookedUp{err: err}
	}
	return moving[id] // tenants are never deleted from the table
}

func (db *DB) lookUpSome(ctx context.Context, batch []wanted) (map[tenant.ID]lookedUp, error) {
	ids := make([]tenant.ID, len(batch))
	for i, w := range batch {
		ids[i] = w.id
	}
	rows, _ := db.pool.Query(ctx, `SELECT `+plainColumns+` FROM tenants t WHERE t.id = ANY ($1)`, ids)
	tenants, err := pgx.CollectRows(rows, scanPlain)
	if err != nil {
		return nil, translate("read tenants", err)
	}
	found := make(map[tenant.ID]lookedUp, len(tenants))
	var moving []tenant.ID
	for _, t := range tenants {
		if isPlain(t.State) {
			found[t.ID] = lookedUp{tenant: t, lasts: t.Problem == nil}
		} else {
			moving = append(moving, t.ID)
		}
	}
	if len(moving) == 0 {
		return found, nil
	}
	more, err := db.lookUpMoving(ctx, moving)
	for id, t := range more {
		found[id] = t
	}
	return found, err
}

// lookUpMoving reads all of tenants that were found under way.
func (db *DB) lookUpMoving(ctx context.Context, ids []tenant.ID) (map[tenant.ID]lookedUp, error) {
	rows, _ := db.pool.Query(ctx, `
		SELECT `+tenantColumns+`, EXISTS (SELECT FROM keys k WHERE k.app_id = t.app_id AND k.state IN ('creating', 'revoking', 'lost'))
		FROM tenants t WHERE t.id = ANY ($1)`, ids)
	found := make(map[tenant.ID]lookedUp, len(ids))
	_, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (struct{}, error) {
		var t tenant.Tenant
		var unsettled bool
		fields, done := tenantFields(&t)
		err := row.Scan(append(fields, &unsettled)...)
		done()
		lasts := t.Problem == nil && (isPlain(t.State) || t.State == tenant.Suspended && !unsettled)
		found[t.ID] = lookedUp{tenant: t, lasts: lasts}
		return struct{}{}, err
	})
	return found, translate("read tenants", err)
}

// tenantReader reads a tenant in a statement that others may share, none of which has
// begun before.
func (db *DB) tenantReader(id tenant.ID) reader {
	return func(end func(any, cacheEntry, bool, error)) {
		db.lookups.add(wanted{id, func(r lookedUp) {
			switch {
			case errors.Is(r.err, tenant.NotFound):
				end(r.tenant, cacheEntry{}, true, r.err)
			case r.err == nil && r.lasts:
				end(r.tenant, cacheEntry{row: packTenant(r.tenant)}, true, nil)
			default:
				end(r.tenant, cacheEntry{}, false, r.err)
			}
		}})
	}
}

// Tenant reads one tenant. It reports tenant.NotFound for an id that never
// signed up.
func (db *DB) Tenant(ctx context.Context, id tenant.ID) (tenant.Tenant, error) {
	t, err := typed[tenant.Tenant](alone(ctx, func(end func(any, cacheEntry, bool, error)) {
		db.lookups.add(wanted{id, func(r lookedUp) { end(r.tenant, cacheEntry{}, false, r.err) }})
	}))
	if err == nil {
		db.cache.notices(t)
	}
	return t, err
}

// TenantOfApp reads the tenant that was given the app, now or before. It
// reports tenant.NotFound for an app that is unknown or was given to nobody.
func (db *DB) TenantOfApp(ctx context.Context, id tenant.AppID) (tenant.Tenant, error) {
	rows, _ := db.pool.Query(ctx, `
		SELECT `+plainColumns+` FROM apps a JOIN tenants t ON t.id = a.tenant_id WHERE a.id = $1`, id)
	t, err := pgx.CollectExactlyOneRow(rows, scanPlain)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return t, errNotFound("app")
	case err != nil:
		return t, translate("read tenant", err)
	case !isPlain(t.State):
		return db.Tenant(ctx, t.ID)
	}
	db.cache.notices(t)
	return t, nil
}

// ownerOf reads which tenant was given an app, now or before.
func (db *DB) ownerOf(ctx context.Context, id tenant.AppID) (tenant.ID, error) {
	var owner tenant.ID
	err := db.pool.QueryRow(ctx, `SELECT tenant_id FROM apps WHERE id = $1 AND tenant_id IS NOT NULL`, id).Scan(&owner)
	if errors.Is(err, pgx.ErrNoRows) {
		return "", errNotFound("app")
	}
	return owner, translate("read app", err)
}
