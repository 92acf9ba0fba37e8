package postgres_test

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// putEvents writes n events, one transaction each, and returns their ids.
func putEvents(t *testing.T, conn *pgx.Conn, n int) []int64 {
	t.Helper()
	rows, _ := conn.Query(t.Context(), `
		INSERT INTO audit_events (actor, action, tenant_id, app_id, key_id, request_id, upstream_request_id, detail)
		SELECT 'caller:test', 'key.revealed', 'user_' || i, 'app-' || i, gen_random_uuid(), 'req-' || i, NULL,
			jsonb_build_object('name', 'default', 'n', i, 'x', 1.50, 'nested', jsonb_build_object('b', 'Ü', 'a', NULL))
		FROM generate_series(1, $1) i RETURNING id`, n)
	ids, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	if err != nil {
		t.Fatal(err)
	}
	return ids
}

// seal seals all there is.
func seal(t *testing.T, db *postgres.DB) tenant.Sealing {
	t.Helper()
	s, err := db.SealAudit(t.Context(), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// forge runs statements as somebody who may do anything.
func forge(t *testing.T, conn *pgx.Conn, sql string, args ...any) {
	t.Helper()
	if _, err := conn.Exec(t.Context(), `SET session_replication_role = replica`); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec(t.Context(), sql, args...); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec(t.Context(), `RESET session_replication_role`); err != nil {
		t.Fatal(err)
	}
}

// faults verifies the log and returns what is found, as "event_altered 3" or
// "seal_altered 1".
func faults(t *testing.T, db *postgres.DB, first int64) ([]string, tenant.AuditCheck) {
	t.Helper()
	var found []string
	check, err := db.VerifyAudit(t.Context(), first, func(f tenant.AuditFinding) {
		of := f.EventID
		if !strings.HasPrefix(string(f.Fault), "event_") {
			of = f.Seal.Number
		} else if (f.Event == nil) != (f.Fault == tenant.EventRemoved) {
			t.Errorf("%s %d shows the event %v", f.Fault, f.EventID, f.Event)
		}
		found = append(found, fmt.Sprint(f.Fault, " ", of))
	})
	if err != nil {
		t.Fatal(err)
	}
	if check.Faults != len(found) {
		t.Errorf("%d faults are counted and %d reported", check.Faults, len(found))
	}
	return found, check
}

// move gives an event another id.
func move(from, to int) string {
	return fmt.Sprintf(`WITH gone AS (DELETE FROM audit_events WHERE id = %d RETURNING *)
		INSERT INTO audit_events (id, at, transaction_id, actor, action, tenant_id, app_id, key_id, request_id, upstream_request_id, detail) OVERRIDING SYSTEM VALUE
		SELECT %d, at, transaction_id, actor, action, tenant_id, app_id, key_id, request_id, upstream_request_id, detail FROM gone`, from, to)
}

// Whatever is done to an event or a seal behind the triggers is found and named,
// and nothing else is.
func TestVerifyAuditFinds(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		forge []string
		want  []string
	}{
		"nothing": {},
		"actor":   {[]string{`UPDATE audit_events SET actor = 'worker' WHERE id = 3`}, []string{"event_altered 3"}},
		"time":    {[]string{`UPDATE audit_events SET at = at + interval '1 microsecond' WHERE id = 3`}, []string{"event_altered 3"}},
		"a time without end": {[]string{`UPDATE audit_events SET at = 'infinity' WHERE id = 3`},
			[]string{"event_altered 3"}},
		"another month": {[]string{`UPDATE audit_events SET at = at - interval '1 year' WHERE id = 3`}, []string{"event_altered 3"}},
		"detail":        {[]string{`UPDATE audit_events SET detail = jsonb_set(detail, '{n}', '30') WHERE id = 3`}, []string{"event_altered 3"}},
		"null":          {[]string{`UPDATE audit_events SET tenant_id = NULL WHERE id = 3`}, []string{"event_altered 3"}},
		"empty for null": {[]string{`UPDATE audit_events SET upstream_request_id = '' WHERE id = 3`},
			[]string{"event_altered 3"}},
		"one column to another": {[]string{`UPDATE audit_events SET upstream_request_id = request_id, request_id = NULL WHERE id = 3`},
			[]string{"event_altered 3"}},
		"transaction": {[]string{`UPDATE audit_events SET transaction_id = '3' WHERE id = 3`}, []string{"event_altered 3"}},
		"removed":     {[]string{`DELETE FROM audit_events WHERE id IN (1, 3, 10, 11, 20)`}, []string{"event_removed 1", "event_removed 3", "event_removed 10", "event_removed 11", "event_removed 20"}},
		"all removed": {[]string{`DELETE FROM audit_events WHERE id BETWEEN 11 AND 12`, `DELETE FROM audit_events WHERE id > 20`}, []string{"event_removed 11", "event_removed 12"}},
		"swapped": {[]string{`UPDATE audit_events a
			SET tenant_id = b.tenant_id, app_id = b.app_id, key_id = b.key_id, request_id = b.request_id, detail = b.detail
			FROM audit_events b WHERE (a.id, b.id) IN ((3, 4), (4, 3))`}, []string{"event_altered 3", "event_altered 4"}},
		"moved":        {[]string{move(3, 24)}, []string{"event_removed 3"}},
		"moved within": {[]string{move(3, 6)}, []string{"event_removed 3", "event_inserted 6"}},
		"inserted into a gap": {[]string{`INSERT INTO audit_events (id, actor, action) OVERRIDING SYSTEM VALUE VALUES (6, 'a', 'b'), (0, 'a', 'b'), (-5, 'a', 'b')`},
			[]string{"event_inserted -5", "event_inserted 0", "event_inserted 6"}},
		"inserted beside": {[]string{`INSERT INTO audit_events (id, at, actor, action) OVERRIDING SYSTEM VALUE
			VALUES (3, '2000-01-01', 'a', 'b'), (3, now() + interval '1 day', 'a', 'c')`}, []string{"event_inserted 3", "event_inserted 3"}},
		"replaced": {[]string{`DELETE FROM audit_events WHERE id = 3`, `INSERT INTO audit_events (id, at, actor, action) OVERRIDING SYSTEM VALUE
			VALUES (3, '2000-01-01', 'a', 'b'), (3, now() + interval '1 day', 'a', 'c')`}, []string{"event_inserted 3", "event_altered 3"}},
		"after the last seal":       {[]string{`UPDATE audit_events SET actor = 'x' WHERE id > 20`}, nil},
		"a seal's list":             {[]string{`UPDATE audit_seals SET entries = overlay(entries placing '\x00' from 20) WHERE number = 2`}, []string{"seal_altered 2", "event_altered 8"}},
		"a seal's time":             {[]string{`UPDATE audit_seals SET sealed_at = sealed_at - interval '1 second' WHERE number = 2`}, []string{"seal_altered 2"}},
		"a seal's time without end": {[]string{`UPDATE audit_seals SET sealed_at = 'infinity' WHERE number = 2`}, []string{"seal_altered 2"}},
		"a seal's range":            {[]string{`UPDATE audit_seals SET last_id = last_id + 1 WHERE number = 3`}, []string{"seal_altered 3"}},
		"a seal's range, less":      {[]string{`UPDATE audit_seals SET last_id = 10 WHERE number = 2`}, []string{"seal_altered 2"}},
		"a seal's predecessor":      {[]string{`UPDATE audit_seals SET previous_hash = hash WHERE number = 1`}, []string{"seal_altered 1"}},
		"a seal removed":            {[]string{`DELETE FROM audit_seals WHERE number = 2`, `DELETE FROM audit_events WHERE id IN (9, 15)`}, []string{"seal_missing 2", "event_removed 15"}},
		"the first removed":         {[]string{`DELETE FROM audit_seals WHERE number < 3`}, []string{"seal_missing 1"}},
		"an event and its seal": {[]string{`UPDATE audit_events SET actor = 'x' WHERE id = 3`, `DELETE FROM audit_seals WHERE number = 1`},
			[]string{"seal_missing 1"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			url := pgtest.URL(t)
			conn, db := pgtest.Conn(t, url), pgtest.OpenURL(t, url)
			// Three seals, of the events 1-4, 8-11 and 12-20; three more events are not sealed.
			for i, n := range []int{4, 4, 9, 3} {
				if i == 1 {
					if _, err := conn.Exec(t.Context(), `SELECT nextval('audit_events_id_seq') FROM generate_series(1, 3)`); err != nil {
						t.Fatal(err)
					}
				}
				putEvents(t, conn, n)
				if i == 3 {
					break
				}
				if s := seal(t, db); s.Seals != 1 || s.Unsealed != 0 {
					t.Fatalf("sealing makes %+v; want one seal and nothing left", s)
				}
			}
			for _, sql := range c.forge {
				forge(t, conn, sql)
			}
			got, check := faults(t, db, 0)
			if !slices.Equal(got, c.want) {
				t.Errorf("found %q; want %q", got, c.want)
			}
			if check.Sealed > 17 || check.LastSeal.Number != 3 {
				t.Errorf("the check counts %+v", check)
			}
			if c.forge == nil && (check.Unsealed != 3 || check.Sealed != 17 || check.Seals != 3) {
				t.Errorf("the check counts %+v", check)
			}
		})
	}
}

// Whoever rewrites events and all seals after them is found by a seal that was kept
// elsewhere, and by nothing else.
func TestAuditSealsRewritten(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	conn, db := pgtest.Conn(t, url), pgtest.OpenURL(t, url)
	if _, err := db.AuditSeal(t.Context(), 0); err == nil {
		t.Error("there is a seal before the first")
	}
	putEvents(t, conn, 3)
	seal(t, db)
	putEvents(t, conn, 3)
	seal(t, db)
	kept, err := db.AuditSeal(t.Context(), 0)
	if err != nil || kept.Number != 2 || kept.LastID != 6 {
		t.Fatalf("the last seal is %+v, %v", kept, err)
	}

	forge(t, conn, `DELETE FROM audit_seals`)
	forge(t, conn, `UPDATE audit_events SET actor = 'x' WHERE id = 2`)
	seal(t, db)
	if got, _ := faults(t, db, 0); got != nil {
		t.Errorf("found %q in a log whose seals are all new", got)
	}
	// One new seal that covers everything, where there were two.
	if now, err := db.AuditSeal(t.Context(), 1); err != nil || bytes.Equal(now.Hash, kept.Hash) {
		t.Errorf("the seal is %+v, %v", now, err)
	}

	// A seal that is made anew alone does not fit those around it.
	putEvents(t, conn, 1)
	seal(t, db)
	putEvents(t, conn, 1)
	seal(t, db)
	s, err := db.AuditSeal(t.Context(), 2)
	if err != nil {
		t.Fatal(err)
	}
	s.SealedAt = s.SealedAt.Add(-time.Hour)
	forge(t, conn, `UPDATE audit_seals SET sealed_at = $1, hash = $2 WHERE number = 2`, s.SealedAt, s.ComputeHash())
	if got, _ := faults(t, db, 0); !slices.Equal(got, []string{"seal_unchained 3"}) {
		t.Errorf("found %q; want that seal 3 does not follow seal 2", got)
	}
}

// An event whose transaction is still running is not passed over by a seal of
// later ones, whether it is committed in the end or not.
func TestSealWaitsForRunningTransactions(t *testing.T) {
	t.Parallel()
	for end, want := range map[string]int{"COMMIT": 3, "ROLLBACK": 2} {
		t.Run(end, func(t *testing.T) {
			t.Parallel()
			url := pgtest.URL(t)
			slow, conn, db := pgtest.Conn(t, url), pgtest.Conn(t, url), pgtest.OpenURL(t, url)
			exec := func(sql string) {
				t.Helper()
				if _, err := slow.Exec(t.Context(), sql); err != nil {
					t.Fatal(err)
				}
			}
			putEvents(t, conn, 1)
			exec(`BEGIN`)
			exec(`INSERT INTO audit_events (actor, action) VALUES ('slow', 'x')`)
			putEvents(t, conn, 1)
			for range 2 {
				if s, err := db.SealAudit(t.Context(), 0); err != nil || s.Seals != 0 || s.Unsealed <= 0 {
					t.Fatalf("while a transaction runs SealAudit = %+v, %v; want no seal, and how old the oldest event is", s, err)
				}
			}
			exec(end)
			if s := seal(t, db); s.Seals != 1 || s.Unsealed != 0 {
				t.Errorf("afterwards SealAudit = %+v; want one seal", s)
			}
			got, check := faults(t, db, 0)
			if got != nil || check.Sealed != want || check.Unsealed != 0 {
				t.Errorf("found %q, %+v; want nothing, and %d sealed events", got, check, want)
			}
		})
	}
}

// Replicas that seal at once, while events come in, make one chain in which each
// event is once.
func TestSealAtOnce(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	dbs := []*postgres.DB{pgtest.OpenURL(t, url), pgtest.OpenURL(t, url), pgtest.OpenURL(t, url)}
	var writers, sealers sync.WaitGroup
	done := make(chan struct{})
	for i := range 4 {
		conn := pgtest.Conn(t, url)
		writers.Go(func() {
			for j := range 60 {
				sql := `INSERT INTO audit_events (actor, action) VALUES ('a', 'b'), ('c', 'd')`
				if (i+j)%5 == 0 { // an id without an event
					sql = `DO $$ BEGIN INSERT INTO audit_events (actor, action) VALUES ('a', 'b'); RAISE EXCEPTION 'x'; EXCEPTION WHEN raise_exception THEN NULL; END $$`
				}
				if _, err := conn.Exec(t.Context(), sql); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for _, db := range dbs {
		sealers.Go(func() {
			for {
				if _, err := db.SealAudit(t.Context(), time.Minute); err != nil {
					t.Error(err)
					return
				}
				select {
				case <-done:
					return
				default:
				}
			}
		})
	}
	writers.Wait()
	close(done)
	sealers.Wait()
	seal(t, dbs[0])
	got, check := faults(t, dbs[0], 0)
	if events := 4 * 48 * 2; got != nil || check.Sealed != events || check.Unsealed != 0 {
		t.Errorf("found %q, %+v; want nothing in %d events", got, check, events)
	}
}

// A backlog is sealed in seals of bounded size, and ids far apart cost nothing.
func TestSealBacklog(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	conn, db := pgtest.Conn(t, url), pgtest.OpenURL(t, url)
	ids := putEvents(t, conn, 20_001)
	if _, err := conn.Exec(t.Context(), `SELECT setval('audit_events_id_seq', 1::bigint << 40)`); err != nil {
		t.Fatal(err)
	}
	ids = append(ids, putEvents(t, conn, 1)...)
	if s := seal(t, db); s.Seals != 3 {
		t.Errorf("sealing makes %d seals of %d events; want 3", s.Seals, len(ids))
	}
	got, check := faults(t, db, 0)
	if got != nil || check.Sealed != len(ids) || check.LastSeal.LastID != ids[len(ids)-1] {
		t.Errorf("found %q, %d sealed events up to %d", got, check.Sealed, check.LastSeal.LastID)
	}
	// A later start says nothing of what is before it.
	forge(t, conn, `DELETE FROM audit_events WHERE id <= $1`, ids[10_000])
	if got, check := faults(t, db, 3); got != nil || check.Seals != 1 || check.Sealed != 2 {
		t.Errorf("from seal 3 on: found %q, %+v", got, check)
	}
	if got, _ := faults(t, db, 2); len(got) != 1 {
		t.Errorf("from seal 2 on: found %d; want the one event that is gone", len(got))
	}
}

// The seals hold in a database that was dumped and restored, and the chain goes on
// there.
func TestSealsSurviveDump(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	conn, db := pgtest.Conn(t, url), pgtest.OpenURL(t, url)
	putEvents(t, conn, 5)
	if _, err := conn.Exec(t.Context(), `INSERT INTO audit_events (at, actor, action, detail) VALUES ('2001-02-03 04:05:06.7', 'ü\t''', 'far',
		'{"z": 1e3, "a": 0.10, "é": "\u00e9\\ \"", "n": null, "big": 123456789012345678901234567890.5}')`); err != nil {
		t.Fatal(err)
	}
	seal(t, db)
	restored := pgtest.Restore(t, pgtest.Dump(t, url))
	conn, db = pgtest.Conn(t, restored), pgtest.OpenURL(t, restored)
	if _, err := conn.Exec(t.Context(), `ALTER DATABASE `+conn.Config().Database+` SET timezone = 'Asia/Kathmandu';
		ALTER DATABASE `+conn.Config().Database+` SET datestyle = 'German'; SET search_path = public`); err != nil {
		t.Fatal(err)
	}
	putEvents(t, conn, 2)
	if s := seal(t, db); s.Seals != 1 {
		t.Errorf("sealing in the restored database makes %+v", s)
	}
	if got, check := faults(t, db, 0); got != nil || check.Sealed != 8 || check.Seals != 2 {
		t.Errorf("found %q, %+v", got, check)
	}
}

// Each column of an event is sealed: one that is added to the table is added there.
func TestSealsCoverAllColumns(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	conn, db := pgtest.Conn(t, url), pgtest.OpenURL(t, url)
	rows, _ := conn.Query(t.Context(), `SELECT attname::text FROM pg_attribute WHERE attrelid = 'audit_events'::regclass AND attnum > 0 AND NOT attisdropped`)
	columns, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	for _, column := range columns {
		if !slices.Contains(postgres.AuditColumnNames, column) {
			t.Errorf("the column %s is not sealed", column)
		}
	}
	putEvents(t, conn, 1)
	seal(t, db)
	for _, sql := range []string{`UPDATE audit_seals SET number = 2`, `DELETE FROM audit_seals`, `TRUNCATE audit_seals`} {
		if _, err := conn.Exec(t.Context(), sql); err == nil {
			t.Errorf("%s is carried out", sql)
		}
	}
}

// No two events have one encoding.
func TestAuditDigests(t *testing.T) {
	t.Parallel()
	text := func(s string) *string { return &s }
	seen := map[tenant.AuditDigest]int{}
	columns := []string{"a", "b"}
	for i, values := range [][]*string{{nil, nil}, {text(""), nil}, {nil, text("")}, {text("x"), nil}, {nil, text("x")}, {text("x"), text("y")}, {text("xy"), text("")}, {text("y"), text("x")}} {
		d := tenant.DigestAuditEvent(columns, values)
		if j, ok := seen[d]; ok {
			t.Errorf("events %d and %d hash alike", i, j)
		}
		seen[d] = i
	}
	if tenant.DigestAuditEvent(columns[:1], []*string{text("x")}) != tenant.DigestAuditEvent(columns, []*string{text("x"), nil}) {
		t.Error("a column that is added changes the digests of events that lack it")
	}
}
