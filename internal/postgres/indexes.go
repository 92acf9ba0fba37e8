package postgres

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// replacedAuditIndexes are the indexes of the audit log that later ones have replaced.
const replacedAuditIndexes = `audit_events_tenant, audit_events_actor, audit_events_action, audit_events_app, audit_events_key, audit_events_request`

// missingAuditIndexes are the partitions' parts of indexes of the audit log that migrations have
// declared only: the name and definition of each part, its partition, and the index that it is a part of.
const missingAuditIndexes = `
	SELECT quote_ident(t.relname || replace(i.relname, 'audit_events', '')),
		regexp_replace(pg_get_indexdef(x.indexrelid), '^.* ON ONLY [^ ]+ ', ''), t.oid::regclass::text, i.oid::regclass::text
	FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid
		JOIN pg_inherits h ON h.inhparent = x.indrelid JOIN pg_class t ON t.oid = h.inhrelid
	WHERE x.indrelid = 'audit_events'::regclass AND NOT x.indisvalid AND NOT EXISTS (
		SELECT FROM pg_inherits p JOIN pg_index part ON part.indexrelid = p.inhrelid
		WHERE p.inhparent = x.indexrelid AND part.indrelid = t.oid)
	ORDER BY t.relname DESC, i.relname`

// An index of a table that is not partitioned, which migrations leave to finishMigrations.
type index struct{ name, definition string }

// keysByAge is built when all keys have their profile.
var keysByAge = index{"keys_by_profile_and_age", `keys (profile, activated_at, id) WHERE state = 'active' AND profile IS NOT NULL`}

var lateIndexes = []index{
	keysByAge,
	// What `problem=true` lists.
	{"apps_in_trouble", `apps (state, next_attempt_at) WHERE problem IS NOT NULL`},
	{"keys_in_trouble", `keys (app_id) WHERE problem IS NOT NULL AND state IN ('creating', 'revoking', 'lost')`},
	// apps_working has the apps that are removed, too.
	{"apps_building", `apps (profile, incarnation) WHERE state = 'building'`},
	{"adoptions_sealed_by", `adoptions (substring(ciphertext from 2 for 4)) WHERE ciphertext IS NOT NULL`},
	{"quarantines_sealed_by", `quarantines (substring(ciphertext from 2 for 4)) WHERE ciphertext IS NOT NULL`},
	{"reconciliation_items_open", `reconciliation_items (reconciliation_id, action, kind, state) WHERE state IN ('open', 'failed')`},
}

// replacedIndexes are the indexes that lateIndexes have replaced.
const replacedIndexes = `keys_by_age`

// finishMigrations does what would lock tables for long in a migration: it writes what older rows lack,
// builds indexes without stopping inserts, and drops those that they replace. If it is stopped, the next
// call continues.
func (db *DB) finishMigrations(ctx context.Context, report func(line string)) error {
	pooled, err := db.direct.Acquire(ctx)
	if err != nil {
		return translate("connect", err)
	}
	conn := pooled.Conn()
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)); pooled.Release() }() // with its settings
	if _, err := conn.Exec(ctx, `SET lock_timeout = 0; SET statement_timeout = 0`); err != nil {
		return translate("connect", err)
	}
	if err := finishAuditIndexes(ctx, conn, report); err != nil {
		return err
	}
	if err := backfill(ctx, conn, report); err != nil {
		return err
	}
	for _, i := range lateIndexes {
		if err := buildIndex(ctx, conn, i, report); err != nil {
			return err
		}
	}
	return translate("drop replaced indexes", execBriefly(ctx, conn, `DROP INDEX IF EXISTS `+replacedIndexes))
}

// indexState reports whether an index is built, and whether its build was stopped.
func indexState(ctx context.Context, conn *pgx.Conn, name string) (built, broken bool, err error) {
	err = conn.QueryRow(ctx, `SELECT coalesce(bool_and(indisvalid), false), coalesce(bool_or(NOT indisvalid), false) FROM pg_index WHERE indexrelid = to_regclass($1)`,
		name).Scan(&built, &broken)
	return built, broken, translate("read index "+name, err)
}

// buildIndex builds an index concurrently, unless it is built.
func buildIndex(ctx context.Context, conn *pgx.Conn, i index, report func(line string)) error {
	built, broken, err := indexState(ctx, conn, i.name)
	if err != nil || built {
		return err
	}
	if broken {
		if _, err := conn.Exec(ctx, `DROP INDEX CONCURRENTLY `+i.name); err != nil {
			return translate("drop index "+i.name, err)
		}
	}
	report("building the index " + i.name + "; this blocks nothing, and waits for transactions that are open, such as a dump's")
	_, err = conn.Exec(ctx, `CREATE INDEX CONCURRENTLY `+i.name+` ON `+i.definition)
	return translate("build index "+i.name, err)
}

// finishAuditIndexes builds the indexes of the audit log that migrations have declared.
func finishAuditIndexes(ctx context.Context, conn *pgx.Conn, report func(line string)) error {
	type part struct{ Name, Definition, Partition, Index string }
	rows, _ := conn.Query(ctx, missingAuditIndexes)
	parts, err := pgx.CollectRows(rows, pgx.RowToStructByPos[part])
	if err != nil {
		return translate("read indexes of the audit log", err)
	}
	for _, p := range parts {
		if err := buildIndex(ctx, conn, index{p.Name, p.Partition + " " + p.Definition}, report); err != nil {
			return err
		}
		if err := execBriefly(ctx, conn, fmt.Sprintf(`ALTER INDEX %s ATTACH PARTITION %s`, p.Index, p.Name)); err != nil {
			return translate("attach index "+p.Name, err)
		}
	}
	return translate("drop replaced indexes of the audit log", execBriefly(ctx, conn, `DROP INDEX IF EXISTS `+replacedAuditIndexes))
}

// execBriefly runs a statement that needs a strong lock. While the lock is not free, it retries instead
// of queueing for it: all that comes later would wait behind it.
func execBriefly(ctx context.Context, conn *pgx.Conn, sql string) error {
	for {
		_, err := conn.Exec(ctx, `BEGIN; SET LOCAL lock_timeout = '100ms'; `+sql+`; COMMIT`)
		if pg, ok := errors.AsType[*pgconn.PgError](err); !ok || pg.Code != "55P03" { // lock_not_available
			return err
		}
		if _, err := conn.Exec(ctx, `ROLLBACK`); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Second):
		}
	}
}
