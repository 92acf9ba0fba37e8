package postgres

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/tenant"
)

// sealSize bounds the events of one seal, and so the memory that sealing takes;
// sealsATurn the seals of one call.
const (
	sealSize   = 10_000
	sealsATurn = 100
)

// auditColumns are all columns of an event, each as a text that Postgres prints
// alike on every cluster and for every session.
var auditColumns = []struct{ name, text string }{
	{"id", `id::text`},
	{"at", `CASE WHEN isfinite(at) THEN (extract(epoch FROM at) * 1000000)::bigint::text ELSE at::text END`},
	{"transaction_id", `transaction_id::text`},
	{"actor", `actor`},
	{"action", `action`},
	{"tenant_id", `tenant_id`},
	{"app_id", `app_id`},
	{"key_id", `key_id::text`},
	{"request_id", `request_id`},
	{"upstream_request_id", `upstream_request_id`},
	{"detail", `detail::text`},
}

var auditColumnNames, auditTexts = func() (names []string, texts string) {
	var columns []string
	for _, c := range auditColumns {
		names, columns = append(names, c.name), append(columns, c.text)
	}
	return names, strings.Join(columns, ", ")
}()

// An auditText is an event as it is digested.
type auditText struct {
	id     int64
	values []*string
}

func scanAuditText(row pgx.CollectableRow) (auditText, error) {
	e := auditText{values: make([]*string, len(auditColumns))}
	fields := []any{&e.id}
	for i := range e.values {
		fields = append(fields, &e.values[i])
	}
	err := row.Scan(fields...)
	return e, err
}

func (e auditText) digest() tenant.AuditDigest {
	return tenant.DigestAuditEvent(auditColumnNames, e.values)
}

// event returns e as people read it. What a forger has left unreadable is zero.
func (e auditText) event() *tenant.AuditEvent {
	text := map[string]string{}
	for i, v := range e.values {
		if v != nil {
			text[auditColumnNames[i]] = *v
		}
	}
	micros, _ := strconv.ParseInt(text["at"], 10, 64)
	key, _ := uuid.Parse(text["key_id"])
	return &tenant.AuditEvent{ID: e.id, At: time.UnixMicro(micros).UTC(), Actor: text["actor"], Action: text["action"],
		TenantID: tenant.ID(text["tenant_id"]), AppID: tenant.AppID(text["app_id"]), KeyID: key, RequestID: text["request_id"],
		UpstreamRequestID: text["upstream_request_id"], Detail: json.RawMessage(text["detail"])}
}

// A time that a forger has moved beyond all times is read as another, so that the
// seal's hash is found wrong.
const sealColumns = `number, after_id, last_id, entries, previous_hash, hash, CASE WHEN isfinite(sealed_at) THEN sealed_at ELSE 'epoch' END`

func scanSeal(row pgx.CollectableRow) (tenant.AuditSeal, error) {
	var s tenant.AuditSeal
	err := row.Scan(&s.Number, &s.AfterID, &s.LastID, &s.Entries, &s.PreviousHash, &s.Hash, &s.SealedAt)
	return s, err
}

// lastSealed is the last event that a seal covers.
const lastSealed = `coalesce((SELECT last_id FROM audit_seals ORDER BY number DESC LIMIT 1), 0)`

// SealAudit seals the events that no seal covers yet and whose order is final,
// oldest first, a million at most, or as many as there is time for. It waits for
// patience at most for the transactions that may still add events between them; what
// it could not seal is left to the next turn.
func (db *DB) SealAudit(ctx context.Context, patience time.Duration) (tenant.Sealing, error) {
	var s tenant.Sealing
	last, err := db.finalAudit(ctx, patience)
	for more := err == nil && last > 0; more && err == nil && s.Seals < sealsATurn && !endsSoon(ctx); {
		if more, err = db.sealNext(ctx, last); more && err == nil {
			s.Seals++
		}
	}
	if err != nil {
		return s, translate("seal audit log", err)
	}
	err = db.pool.QueryRow(ctx, `
		SELECT greatest(clock_timestamp() - at, '0') FROM audit_events WHERE id > `+lastSealed+` AND isfinite(at)
		ORDER BY id LIMIT 1`).Scan(&s.Unsealed)
	if errors.Is(err, pgx.ErrNoRows) {
		err = nil
	}
	return s, translate("look for events that are not sealed", err)
}

// endsSoon reports whether ctx ends before another seal is sure to be made and told of.
func endsSoon(ctx context.Context) bool {
	end, ok := ctx.Deadline()
	return ok && time.Until(end) < 15*time.Second
}

// finalAudit returns the last event such that no transaction can add one with a
// lower id any more, or 0 if nothing is to be sealed or patience ran out.
func (db *DB) finalAudit(ctx context.Context, patience time.Duration) (int64, error) {
	var sealed int64
	if err := db.pool.QueryRow(ctx, `SELECT `+lastSealed).Scan(&sealed); err != nil {
		return 0, err
	}
	newest, final, err := db.newestAudit(ctx, sealed, patience)
	if err != nil || !final || newest == sealed {
		return 0, err
	}
	return newest, nil
}

// newestAudit returns the newest event after the event after, or after if there is none. It also reports
// whether that event is final: no transaction can add an event with a lower id. It waits up to
// patience for the event to become final.
//
// Ids are given out in order and committed in any. Whoever inserts an event takes
// a lock on the table before the id is drawn and keeps it until the event can be
// seen. So once an event is seen, every event with a lower id is there already or
// belongs to one of those who hold that lock now. Transaction ids would not do:
// a transaction may draw its event's id before it has one of its own.
func (db *DB) newestAudit(ctx context.Context, after int64, patience time.Duration) (newest int64, final bool, err error) {
	newest = after
	err = db.pool.QueryRow(ctx, `SELECT id FROM audit_events WHERE id > $1 ORDER BY id DESC LIMIT 1`, after).Scan(&newest)
	if errors.Is(err, pgx.ErrNoRows) {
		return after, true, nil
	}
	if err != nil {
		return 0, false, err
	}
	before, err := auditWriters(ctx, db.pool)
	if err != nil {
		return 0, false, err
	}
	end := time.Now().Add(patience)
	for pause := time.Duration(0); len(before) > 0; {
		running, err := auditWritersOf(ctx, db.pool, before)
		if err != nil {
			return 0, false, err
		}
		if !running {
			break
		}
		if !time.Now().Before(end) {
			return newest, false, nil
		}
		pause = min(pause+5*time.Millisecond, 100*time.Millisecond)
		select {
		case <-ctx.Done():
			return 0, false, ctx.Err()
		case <-time.After(pause):
		}
	}
	return newest, true, nil
}

const auditWriterLocks = `FROM pg_locks WHERE locktype = 'relation' AND relation = 'audit_events'::regclass
	AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) AND mode = 'RowExclusiveLock' AND granted`

// auditWriters lists the transactions that may have drawn an event's id and not ended.
func auditWriters(ctx context.Context, q querier) (writers []string, err error) {
	err = q.QueryRow(ctx, `SELECT coalesce(array_agg(DISTINCT virtualtransaction), '{}') `+auditWriterLocks).Scan(&writers)
	return writers, err
}

// auditWritersOf reports whether one of these transactions is still running.
func auditWritersOf(ctx context.Context, q querier, before []string) (running bool, err error) {
	err = q.QueryRow(ctx, `SELECT EXISTS (SELECT `+auditWriterLocks+` AND virtualtransaction = ANY($1))`, before).Scan(&running)
	return running, err
}

// sealNext seals the oldest events that no seal covers, up to last. It reports
// false if there are none or another replica is at it.
func (db *DB) sealNext(ctx context.Context, last int64) (made bool, err error) {
	err = db.inTx(ctx, func(tx pgx.Tx) error {
		var alone bool
		s := tenant.AuditSeal{}
		if err := tx.QueryRow(ctx, `SELECT pg_try_advisory_xact_lock(hashtext('seal audit')), clock_timestamp()`).Scan(&alone, &s.SealedAt); err != nil || !alone {
			return err
		}
		before, err := readSeal(ctx, tx, `ORDER BY number DESC LIMIT 1`)
		switch {
		case errors.Is(err, pgx.ErrNoRows):
			before.Hash = tenant.NoAuditSeal
		case err != nil:
			return err
		}
		rows, _ := tx.Query(ctx, `SELECT id, `+auditTexts+` FROM audit_events WHERE id > $1 AND id <= $2 ORDER BY audit_events.id, audit_events.at LIMIT $3`,
			before.LastID, last, sealSize)
		events, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (tenant.AuditSealEntry, error) {
			e, err := scanAuditText(row)
			return tenant.AuditSealEntry{ID: e.id, Digest: e.digest()}, err
		})
		if err != nil || len(events) == 0 {
			return err
		}
		for _, e := range events {
			s.Entries = tenant.AppendAuditSealEntry(s.Entries, e)
		}
		s.Number, s.AfterID, s.LastID, s.PreviousHash = before.Number+1, before.LastID, events[len(events)-1].ID, before.Hash
		s.Hash = s.ComputeHash()
		_, err = tx.Exec(ctx, `
			INSERT INTO audit_seals (number, after_id, last_id, entries, previous_hash, hash, sealed_at) VALUES ($1, $2, $3, $4, $5, $6, $7)`,
			s.Number, s.AfterID, s.LastID, s.Entries, s.PreviousHash, s.Hash, s.SealedAt)
		made = err == nil
		return err
	})
	return made && err == nil, err
}

func readSeal(ctx context.Context, q interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}, which string, args ...any) (tenant.AuditSeal, error) {
	rows, _ := q.Query(ctx, `SELECT `+sealColumns+` FROM audit_seals `+which, args...)
	return pgx.CollectExactlyOneRow(rows, scanSeal)
}

// AuditSeal reads a seal by its number; 0 means the last. It reports
// tenant.NotFound if there is none.
func (db *DB) AuditSeal(ctx context.Context, number int64) (tenant.AuditSeal, error) {
	s, err := readSeal(ctx, db.pool, `WHERE $1::bigint IN (0, number) ORDER BY number DESC LIMIT 1`, number)
	if errors.Is(err, pgx.ErrNoRows) {
		return s, errNotFound("seal")
	}
	return s, translate("read seal", err)
}

// VerifyAudit compares the audit log with its seals, from seal number first on, and
// tells report of each fault as it is found. It holds one seal and one event at a
// time, and two connections.
func (db *DB) VerifyAudit(ctx context.Context, first int64, report func(tenant.AuditFinding)) (tenant.AuditCheck, error) {
	check, err := db.verifyAudit(ctx, first, report)
	return check, translate("verify audit log", err)
}

func (db *DB) verifyAudit(ctx context.Context, first int64, report func(tenant.AuditFinding)) (tenant.AuditCheck, error) {
	// The seals are read as of a moment before the events are: what they cover was
	// there by then.
	seals, err := db.direct.Query(ctx, `SELECT `+sealColumns+` FROM audit_seals WHERE number >= $1 ORDER BY number`, first)
	if err != nil {
		return tenant.AuditCheck{}, err
	}
	defer seals.Close()
	events, err := db.direct.Query(ctx, `SELECT id, `+auditTexts+` FROM audit_events
		WHERE $1::bigint <= 1 OR id > (SELECT after_id FROM audit_seals WHERE number = $1) ORDER BY audit_events.id, audit_events.at`, first)
	if err != nil {
		return tenant.AuditCheck{}, err
	}
	defer events.Close()
	v := verifier{events: events, report: report}
	if err := v.next(); err != nil {
		return v.check, err
	}
	before := tenant.AuditSeal{Number: max(first, 1) - 1, Hash: tenant.NoAuditSeal}
	// Unknown means that what the seal before covered is not known.
	for unknown := first > 1; seals.Next(); {
		s, err := scanSeal(seals)
		if err != nil {
			return v.check, err
		}
		intact := s.Intact()
		switch {
		case s.Number > before.Number+1:
			v.found(tenant.AuditFinding{Fault: tenant.SealMissing, Seal: tenant.AuditSeal{Number: before.Number + 1}, UpTo: s.Number - 1})
			unknown = true
		case !unknown && intact && (s.AfterID != before.LastID || !bytes.Equal(s.PreviousHash, before.Hash)):
			v.found(tenant.AuditFinding{Fault: tenant.SealUnchained, Seal: s})
		}
		if !intact {
			v.found(tenant.AuditFinding{Fault: tenant.SealAltered, Seal: s})
		}
		if err := v.compare(s, unknown, intact); err != nil {
			return v.check, err
		}
		before, unknown = s, !intact
	}
	if err := seals.Err(); err != nil {
		return v.check, err
	}
	for v.more {
		v.check.Unsealed++
		if err := v.next(); err != nil {
			return v.check, err
		}
	}
	return v.check, nil
}

// A verifier goes through seals and events side by side, in the order of the ids.
type verifier struct {
	events pgx.Rows
	event  auditText // the next, if more
	more   bool
	report func(tenant.AuditFinding)
	check  tenant.AuditCheck
}

func (v *verifier) next() (err error) {
	if v.more = v.events.Next(); v.more {
		v.event, err = scanAuditText(v.events)
		return err
	}
	return v.events.Err()
}

func (v *verifier) found(f tenant.AuditFinding) {
	v.check.Faults++
	v.report(f)
}

func (v *verifier) foundEvent(s tenant.AuditSeal, fault tenant.AuditFault, e auditText) {
	v.found(tenant.AuditFinding{Fault: fault, Seal: s, EventID: e.id, Event: e.event()})
}

// compare holds the events up to the end of a seal against it. Unknown says that
// nothing can be said of events from before its range; of one that is not intact,
// that holds for all events that it does not name.
func (v *verifier) compare(s tenant.AuditSeal, unknown, intact bool) error {
	v.check.Seals, v.check.LastSeal, v.check.Sealed = v.check.Seals+1, s, v.check.Sealed+s.Len()
	for v.more && v.event.id <= s.AfterID {
		if !unknown && intact {
			v.foundEvent(s, tenant.EventInserted, v.event)
		}
		if err := v.next(); err != nil {
			return err
		}
	}
	for i := 0; i < s.Len() || v.more && v.event.id <= s.LastID; {
		// An id stands for one event, unless somebody saw to it that it does not.
		var id int64
		switch {
		case i == s.Len():
			id = v.event.id
		case !v.more:
			id = s.Entry(i).ID
		default:
			id = min(v.event.id, s.Entry(i).ID)
		}
		var sealed []tenant.AuditDigest
		for ; i < s.Len() && s.Entry(i).ID == id; i++ {
			sealed = append(sealed, s.Entry(i).Digest)
		}
		var others []auditText // that are not as sealed: each is altered or inserted
		for most := len(sealed); v.more && v.event.id == id; {
			k := slices.Index(sealed, v.event.digest())
			switch {
			case k >= 0:
				sealed = slices.Delete(sealed, k, k+1)
			case len(others) < most:
				others = append(others, v.event)
			case intact:
				v.foundEvent(s, tenant.EventInserted, v.event)
			}
			if err := v.next(); err != nil {
				return err
			}
		}
		for _, e := range others {
			if len(sealed) == 0 { // the one that is as sealed came after it
				v.foundEvent(s, tenant.EventInserted, e)
				continue
			}
			sealed = sealed[1:]
			v.foundEvent(s, tenant.EventAltered, e)
		}
		for range sealed {
			v.found(tenant.AuditFinding{Fault: tenant.EventRemoved, Seal: s, EventID: id})
		}
	}
	return nil
}
