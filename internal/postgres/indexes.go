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

// finishAuditIndexes builds the indexes of the audit log that migrations have declared, without stopping
// inserts, and drops those that they replace. If it is stopped, the next call continues.
func (db *DB) finishAuditIndexes(ctx context.Context, report func(line string)) error {
	pooled, err := db.direct.Acquire(ctx)
	if err != nil {
		return translate("connect", err)
	}
	conn := pooled.Conn()
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)); pooled.Release() }() // with its settings
	if _, err := conn.Exec(ctx, `SET lock_timeout = 0; SET statement_timeout = 0`); err != nil {
		return translate("connect", err)
	}
	type part struct{ Name, Definition, Partition, Index string }
	rows, _ := conn.Query(ctx, missingAuditIndexes)
	parts, err := pgx.CollectRows(rows, pgx.RowToStructByPos[part])
	if err != nil {
		return translate("read indexes of the audit log", err)
	}
	if len(parts) > 0 {
		report(fmt.Sprintf("building indexes of the audit log (%d); this blocks nothing, and waits for transactions that are open, such as a dump's", len(parts)))
	}
	for _, p := range parts {
		var built, broken bool // broken: the build was stopped
		if err := conn.QueryRow(ctx, `SELECT coalesce(bool_and(indisvalid), false), coalesce(bool_or(NOT indisvalid), false) FROM pg_index WHERE indexrelid = to_regclass($1)`,
			p.Name).Scan(&built, &broken); err != nil {
			return translate("read index "+p.Name, err)
		}
		if broken {
			if _, err := conn.Exec(ctx, `DROP INDEX CONCURRENTLY `+p.Name); err != nil {
				return translate("drop index "+p.Name, err)
			}
		}
		if !built {
			if _, err := conn.Exec(ctx, fmt.Sprintf(`CREATE INDEX CONCURRENTLY %s ON %s %s`, p.Name, p.Partition, p.Definition)); err != nil {
				return translate("build index "+p.Name, err)
			}
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
