package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"

	"github.com/tenantry/tenantry/internal/tenant"
)

const (
	tenantPrefix = "there_"
	appPrefix    = "there-"
	// knownSecret and a number are a tenant's key: so that one can be sent without a list of
	// them.
	knownSecret = "5ec2e75ec2e75ec2e75ec2e7"
	// cohort is how many tenants share a label.
	cohort = 1000
	// bulk is from how many tenants on the indexes are made after the rows.
	bulk = 100_000
)

func secretOf(i int) tenant.Secret { return tenant.NewSecret(knownSecret + numbered(i)) }

// populate copies n tenants into an empty database, each with its app and its key, and an
// audit event for each tenth. Each is as Tenantry would have made it a day ago or more, and
// the schema is as it was.
func (r *replica) populate(ctx context.Context, n int) error {
	before, err := r.indexes(ctx)
	if err != nil {
		return err
	}
	var later []string // the indexes that no constraint holds
	if n >= bulk {
		for name, definition := range before {
			if definition.free {
				later = append(later, definition.sql)
				if _, err := r.conn.Exec(ctx, `DROP INDEX IF EXISTS `+name); err != nil {
					return err
				}
			}
		}
	}
	if err := r.copyTenants(ctx, n); err != nil {
		return err
	}
	// With what else there is in the cluster, within the memory of a small machine.
	if _, err := r.conn.Exec(ctx, `SET maintenance_work_mem = '512MB'`); err != nil {
		return err
	}
	for _, sql := range append(later, `VACUUM (FREEZE, ANALYZE)`, `CHECKPOINT`) {
		if _, err := r.conn.Exec(ctx, sql); err != nil {
			return fmt.Errorf("%s: %w", sql, err)
		}
	}
	after, err := r.indexes(ctx)
	if err == nil && !maps.Equal(before, after) {
		err = errors.New("the indexes are not those that the migrations made")
	}
	return err
}

// An index is how one is made, and whether it can be without a constraint.
type index struct {
	sql  string
	free bool
}

// indexes are those of our tables; of partitions only what their parents have, which is
// said to be on the parent alone as long as a partition lacks it.
func (r *replica) indexes(ctx context.Context) (map[string]index, error) {
	rows, _ := r.conn.Query(ctx, `
		SELECT i.indexrelid::regclass::text, CASE WHEN i.indisvalid THEN replace(pg_get_indexdef(i.indexrelid), ' ON ONLY ', ' ON ') ELSE 'not valid' END,
			NOT EXISTS (SELECT FROM pg_constraint c WHERE c.conindid = i.indexrelid)
		FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
		WHERE i.indrelid IN ('tenants'::regclass, 'apps'::regclass, 'keys'::regclass, 'audit_events'::regclass) AND NOT c.relispartition`)
	all := map[string]index{}
	var name string
	var i index
	_, err := pgx.ForEachRow(rows, []any{&name, &i.sql, &i.free}, func() error { all[name] = i; return nil })
	return all, err
}

// copyTenants copies all tables at once.
func (r *replica) copyTenants(ctx context.Context, n int) error {
	revision, err := r.revision(ctx)
	if err != nil {
		return err
	}
	hash := tenant.Attributes{}.Hash()
	app := func(i int) string { return appPrefix + numbered(i) }
	longAgo := time.Now().Add(-25 * time.Hour) // not demand that the pool is planned for
	at := func(i int) time.Time { return longAgo.Add(time.Duration(i-n) * time.Millisecond) }
	group, ctx := errgroup.WithContext(ctx)
	copyAll := func(n int, table string, columns []string, row func(i int) ([]any, error)) {
		group.Go(func() error {
			conn, err := pgx.Connect(ctx, r.stage.cluster.URL(r.name))
			if err != nil {
				return err
			}
			defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
			// What refers to a row may come before it, and the triggers have nothing to say of new rows.
			if _, err := conn.Exec(ctx, `SET session_replication_role = replica`); err != nil {
				return err
			}
			if _, err = conn.CopyFrom(ctx, pgx.Identifier{table}, columns, pgx.CopyFromSlice(n, row)); err != nil {
				return fmt.Errorf("copy %s: %w", table, err)
			}
			return nil
		})
	}
	copyAll(n, "apps", append(appColumns, "created_at", "updated_at"), func(i int) ([]any, error) {
		return []any{app(i), tenant.DefaultProfile, revision, "held", at(i), at(i), at(i), at(i), tenantPrefix + numbered(i), 1, at(i), at(i)}, nil
	})
	copyAll(n, "keys", keyColumns, func(i int) ([]any, error) { return r.keyRow(app(i), secretOf(i), at(i)) })
	copyAll(n, "tenants", []string{"id", "profile", "state", "state_since", "app_id", "display_name", "labels", "attributes_hash", "created_at", "updated_at"},
		func(i int) ([]any, error) {
			labels := fmt.Appendf(nil, `{"plan":%q,"cohort":%q}`, []string{"free", "pro"}[i%2], numbered(i/cohort))
			return []any{tenantPrefix + numbered(i), tenant.DefaultProfile, "active", at(i), app(i), "User " + numbered(i), labels, hash, at(i), at(i)}, nil
		})
	copyAll(n/10, "audit_events", []string{"at", "actor", "action", "tenant_id", "app_id", "detail"}, func(i int) ([]any, error) {
		return []any{at(10 * i), "bench", "tenant.activated", tenantPrefix + numbered(10*i), app(10 * i), []byte(`{"generation":1}`)}, nil
	})
	return group.Wait()
}

// revision is that of the pool: the apps are as Tenantry would make them.
func (r *replica) revision(ctx context.Context) (revision string, err error) {
	err = r.conn.QueryRow(ctx, `SELECT revision FROM pools WHERE profile = $1`, tenant.DefaultProfile).Scan(&revision)
	return revision, err
}

var (
	appColumns = slices.Clip([]string{"id", "profile", "profile_revision", "state", "made_at", "ready_at", "proven_at", "marked_at", "tenant_id", "tenant_generation"})
	keyColumns = []string{"id", "app_id", "name", "state", "scopes", "ciphertext", "fingerprint", "hint", "activated_at"}
)

func (r *replica) keyRow(app string, secret tenant.Secret, at time.Time) ([]any, error) {
	id, err := uuid.NewV7()
	if err != nil {
		return nil, err
	}
	keys := r.stage.keys
	sealed, err := keys.Seal(id, secret)
	return []any{id, app, tenant.DefaultKey, "active", []string{tenant.ScopeAll}, sealed, keys.Fingerprint(secret), keys.Hint(secret), at}, err
}

// fillPool makes apps until so many are ready. They are put where a build would have
// left them, since builds keep to the rate of calls to Clarifai.
func (r *replica) fillPool(ctx context.Context, ready int) error {
	var there int
	if err := r.conn.QueryRow(ctx, `SELECT count(*) FROM apps WHERE state = 'ready'`).Scan(&there); err != nil {
		return err
	}
	n := max(0, ready-there)
	app := func(i int) string { return fmt.Sprintf("ready-%d-%s", r.number, numbered(r.made+i)) }
	const atOnce = 1000
	for from := 0; from < n; from += atOnce {
		var apps []any
		for i := from; i < min(n, from+atOnce); i++ {
			apps = append(apps, map[string]string{"id": app(i)})
		}
		body, err := json.Marshal(map[string]any{"apps": apps})
		if err != nil {
			return err
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, r.clarifai.url+"/v2/users/"+operator+"/apps", bytes.NewReader(body))
		if err != nil {
			return err
		}
		req.Header.Set("Authorization", "Key "+r.stage.pat)
		if _, err := answerOf(req); err != nil {
			return err
		}
	}
	revision, err := r.revision(ctx)
	if err != nil {
		return err
	}
	now := time.Now()
	if _, err := r.conn.CopyFrom(ctx, pgx.Identifier{"apps"}, appColumns, pgx.CopyFromSlice(n, func(i int) ([]any, error) {
		return []any{app(i), tenant.DefaultProfile, revision, "ready", now, now, now, nil, nil, nil}, nil
	})); err != nil {
		return err
	}
	if _, err := r.conn.CopyFrom(ctx, pgx.Identifier{"keys"}, keyColumns, pgx.CopyFromSlice(n, func(i int) ([]any, error) {
		text := make([]byte, 16)
		_, _ = rand.Read(text) // never fails
		return r.keyRow(app(i), tenant.NewSecret(hex.EncodeToString(text)), now)
	})); err != nil {
		return err
	}
	r.made += n
	_, err = r.conn.Exec(ctx, `ANALYZE apps, keys`)
	return err
}

// allPooled reports whether no sign-up whose tenant's id begins with prefix had to wait for
// an app to be built: each was made and activated in one transaction, in which nobody calls
// Clarifai.
func (r *replica) allPooled(ctx context.Context, prefix string) error {
	var waited, ready int
	if err := r.conn.QueryRow(ctx, `SELECT (SELECT count(*) FROM tenants
			WHERE id >= $1 AND id < $1 || '~' AND (state <> 'active' OR state_since <> created_at)),
		(SELECT count(*) FROM (SELECT FROM apps WHERE state = 'ready' LIMIT 1) ready)`, prefix).Scan(&waited, &ready); err != nil {
		return err
	}
	if waited > 0 || ready == 0 {
		return fmt.Errorf("%d sign-ups found no ready app, %d are left: that is no measure of pooled ones", waited, ready)
	}
	return nil
}
