package postgres

import (
	"context"
	"encoding/binary"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/tenant"
)

// sealedBy is which key of the keyset sealed a key's row: see tenant.SealKeyID.
const sealedBy = `substring(ciphertext from 2 for 4)`

// Sealed reads which keys of the keyset the database needs. It reads one entry of the
// index for each, however many rows there are.
func (db *DB) Sealed(ctx context.Context) (tenant.Sealed, error) {
	var s tenant.Sealed
	var by [][]byte
	// ids selects the ids of the keys that sealed rows of a table.
	ids := func(table string) string {
		return `(WITH RECURSIVE ids AS (
			(SELECT ` + sealedBy + ` AS id FROM ` + table + ` WHERE ciphertext IS NOT NULL ORDER BY 1 LIMIT 1)
			UNION ALL
			SELECT (SELECT ` + sealedBy + ` FROM ` + table + ` WHERE ciphertext IS NOT NULL AND ` + sealedBy + ` > ids.id ORDER BY 1 LIMIT 1)
			FROM ids WHERE ids.id IS NOT NULL
		) SELECT id FROM ids WHERE id IS NOT NULL)`
	}
	err := db.pool.QueryRow(ctx, `
		SELECT array(`+ids("keys")+` UNION `+ids("adoptions")+` UNION `+ids("quarantines")+`), (SELECT keyset_probe FROM deployment)`).Scan(&by, &s.Probe)
	for _, id := range by {
		if len(id) == 4 {
			s.By = append(s.By, tenant.SealKeyID(binary.BigEndian.Uint32(id)))
		}
	}
	return s, translate("look which keys sealed", err)
}

// Reseal seals anew what the key by sealed, of at most that many rows after a row.
// Seal is given a row's id and ciphertext and returns the new one, or nil to leave
// the row as it is. Rows that somebody is at are passed over.
func (db *DB) Reseal(ctx context.Context, by tenant.SealKeyID, after uuid.UUID, most int, seal func(id uuid.UUID, ciphertext []byte) []byte) (tenant.Resealed, error) {
	var r tenant.Resealed
	err := db.inTx(ctx, func(tx pgx.Tx) error {
		r = tenant.Resealed{}
		rows, _ := tx.Query(ctx, `
			SELECT id, ciphertext FROM keys
			WHERE ciphertext IS NOT NULL AND `+sealedBy+` = $1 AND id > $2
			ORDER BY id LIMIT $3 FOR NO KEY UPDATE SKIP LOCKED`, by.Bytes(), after, most)
		var ids []uuid.UUID
		var olds, news [][]byte
		var old []byte
		if _, err := pgx.ForEachRow(rows, []any{&r.Last, &old}, func() error {
			r.Seen++
			if sealed := seal(r.Last, old); sealed != nil {
				ids, olds, news = append(ids, r.Last), append(olds, old), append(news, sealed)
			}
			old = nil // it is kept
			return nil
		}); err != nil || len(ids) == 0 {
			return err
		}
		tag, err := tx.Exec(ctx, `
			UPDATE keys k SET ciphertext = n.new
			FROM unnest($1::uuid[], $2::bytea[], $3::bytea[]) AS n (id, old, new)
			WHERE k.id = n.id AND k.ciphertext = n.old`, ids, olds, news)
		r.Changed = int(tag.RowsAffected())
		return err
	})
	return r, translate("seal keys anew", err)
}

// ResealProbe puts another probe in the place of the keyset's, unless it has changed
// meanwhile.
func (db *DB) ResealProbe(ctx context.Context, old, sealed []byte, actor tenant.Actor) (bool, error) {
	by, _ := tenant.SealKeyOf(sealed)
	tag, err := db.pool.Exec(ctx, `
		WITH resealed AS (UPDATE deployment SET keyset_probe = $2 WHERE keyset_probe = $1 RETURNING 1)
		INSERT INTO audit_events (actor, action, detail)
		SELECT $3, 'keyset.resealed', jsonb_build_object('key_id', $4::bigint) FROM resealed`, old, sealed, actor.Name, int64(by))
	return tag.RowsAffected() == 1, translate("seal keyset probe anew", err)
}

// MarkAnew gives held apps to the workers that write markers, whose marker one of
// the keys by sealed, or no one knows which. It keeps at most that many held apps
// pending, whatever for. It returns how many it gave.
func (db *DB) MarkAnew(ctx context.Context, by []tenant.SealKeyID, most int) (int, error) {
	// One condition at a time: with both the planner may read all held apps for the few that are left.
	const left = `$2 - (SELECT count(*) FROM (SELECT FROM apps WHERE state = 'held' AND pending LIMIT $2) busy)`
	tag, err := db.pool.Exec(ctx, `
		WITH older AS MATERIALIZED (
			SELECT id FROM apps WHERE state = 'held' AND marked_at IS NOT NULL AND marker_key_id = ANY ($1::bigint[]) ORDER BY marker_key_id
			LIMIT greatest(0, `+left+`) FOR UPDATE SKIP LOCKED
		), unknown AS MATERIALIZED (
			SELECT id FROM apps WHERE state = 'held' AND marked_at IS NOT NULL AND marker_key_id IS NULL
			LIMIT greatest(0, `+left+` - (SELECT count(*) FROM older)) FOR UPDATE SKIP LOCKED
		)
		UPDATE apps SET pending = true, marked_at = NULL, next_attempt_at = now()
		WHERE id = ANY (ARRAY(SELECT id FROM older UNION ALL SELECT id FROM unknown)) AND marked_at IS NOT NULL`, planForValues, bigints(by), most)
	return int(tag.RowsAffected()), translate("have apps marked anew", err)
}

func bigints(ids []tenant.SealKeyID) []int64 {
	out := make([]int64, len(ids))
	for i, id := range ids {
		out[i] = int64(id)
	}
	return out
}

// CountSealed counts what each key of the keyset sealed.
func (db *DB) CountSealed(ctx context.Context) (tenant.SealedCounts, error) {
	c, err := countSealed(ctx, db.pool)
	return c, translate("count what keys sealed", err)
}

type sender interface {
	SendBatch(ctx context.Context, b *pgx.Batch) pgx.BatchResults
}

func countSealed(ctx context.Context, q sender) (tenant.SealedCounts, error) {
	c := tenant.SealedCounts{By: map[tenant.SealKeyID]tenant.SealedCount{}}
	add := func(id tenant.SealKeyID, change func(*tenant.SealedCount)) {
		of := c.By[id]
		change(&of)
		c.By[id] = of
	}
	batch := &pgx.Batch{}
	batch.Queue(`
		SELECT by, sum(n) FROM (
			SELECT ` + sealedBy + ` AS by, count(*) AS n FROM keys WHERE ciphertext IS NOT NULL GROUP BY 1
			UNION ALL SELECT ` + sealedBy + `, count(*) FROM adoptions WHERE ciphertext IS NOT NULL GROUP BY 1
			UNION ALL SELECT ` + sealedBy + `, count(*) FROM quarantines WHERE ciphertext IS NOT NULL GROUP BY 1) sealed
		GROUP BY by`).
		Query(func(rows pgx.Rows) error {
			var id []byte
			var n int
			_, err := pgx.ForEachRow(rows, []any{&id, &n}, func() error {
				if len(id) == 4 {
					add(tenant.SealKeyID(binary.BigEndian.Uint32(id)), func(of *tenant.SealedCount) { of.Keys = n })
				}
				return nil
			})
			return err
		})
	// A marker that is being written anew is the old one until it is known to be
	// written.
	batch.Queue(`
		SELECT marker_key_id, state, count(*) FROM apps
		WHERE state IN ('held', 'retained') AND coalesce(marker_key_id, 0) >= 0
			AND (marked_at IS NOT NULL OR marker_key_id IS NOT NULL)
		GROUP BY 1, 2`).
		Query(func(rows pgx.Rows) error {
			var id *int64
			var state tenant.AppState
			var n int
			_, err := pgx.ForEachRow(rows, []any{&id, &state, &n}, func() error {
				switch {
				case id == nil:
					c.UnknownMarkers += n
				case state == tenant.AppHeld:
					add(tenant.SealKeyID(*id), func(of *tenant.SealedCount) { of.Held = n })
				default:
					add(tenant.SealKeyID(*id), func(of *tenant.SealedCount) { of.Retained = n })
				}
				return nil
			})
			return err
		})
	batch.Queue(`SELECT keyset_probe FROM deployment`).Query(func(rows pgx.Rows) error {
		var probe []byte
		_, err := pgx.ForEachRow(rows, []any{&probe}, func() error {
			if id, ok := tenant.SealKeyOf(probe); ok {
				add(id, func(of *tenant.SealedCount) { of.Probe = true })
			}
			return nil
		})
		return err
	})
	return c, q.SendBatch(ctx, batch).Close()
}

// RemoveSealKey writes down that nothing may be sealed any more by a key of the
// keyset, if nothing needs it: from then on it can be taken out of the keyset. It
// returns what needs it, and has changed nothing if anything does.
func (db *DB) RemoveSealKey(ctx context.Context, id tenant.SealKeyID, actor tenant.Actor) (needs tenant.SealedCounts, err error) {
	err = db.inTx(ctx, func(tx pgx.Tx) error {
		// Who writes now may be sealing by the key; who comes later is refused.
		if _, err := tx.Exec(ctx, `SET LOCAL lock_timeout = '10s'`); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `SELECT pg_advisory_xact_lock(hashtext('seal keys'), 0)`); err != nil {
			return err
		}
		if needs, err = countSealed(ctx, tx); err != nil || !needs.By[id].None() || needs.UnknownMarkers > 0 {
			return err
		}
		_, err := tx.Exec(ctx, `
			WITH removed AS (
				INSERT INTO removed_seal_keys (key_id) VALUES ($1) ON CONFLICT DO NOTHING RETURNING 1)
			INSERT INTO audit_events (actor, request_id, action, detail)
			SELECT $2, nullif($3, ''), 'keyset.key_removed', jsonb_build_object('key_id', $4::bigint) FROM removed`,
			id.Bytes(), actor.Name, actor.RequestID, int64(id))
		return err
	})
	return needs, translate("remove seal key", err)
}
