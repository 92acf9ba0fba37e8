package postgres_test

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/postgres/pgtest"
)

// Each filter selects what it says, and paging meets each event once, in either
// order, also where many have one time.
func TestAuditEvents(t *testing.T) {
	t.Parallel()
	url := pgtest.URL(t)
	conn, db := pgtest.Conn(t, url), pgtest.OpenURL(t, url)
	key := uuid.MustParse("01890000-0000-7000-8000-000000000001")
	noon := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	if _, err := conn.Exec(t.Context(), `
		INSERT INTO audit_events (at, actor, action, tenant_id, app_id, key_id, request_id)
		SELECT $1::timestamptz + (i / 4) * interval '20 days', 'actor_' || i % 2, 'action_' || i % 3, 'tenant_' || i % 4, nullif('app_' || i % 5, 'app_0'),
			CASE WHEN i % 6 = 0 THEN $2::uuid END, 'request_' || i % 7
		FROM generate_series(0, 39) i`, noon, key); err != nil {
		t.Fatal(err)
	}
	all, err := db.AuditEvents(t.Context(), postgres.AuditFilter{}, 0, true, 1000)
	if err != nil || len(all) != 40 || !all[0].At.Equal(noon) || all[0].KeyID != key || string(all[0].Detail) != "{}" || all[1].AppID != "app_1" {
		t.Fatalf("there are %d events, %v: %+v", len(all), err, all[0])
	}
	for name, c := range map[string]struct {
		filter postgres.AuditFilter
		is     func(i int) bool
	}{
		"all":            {postgres.AuditFilter{}, func(int) bool { return true }},
		"tenant":         {postgres.AuditFilter{TenantID: "tenant_1"}, func(i int) bool { return i%4 == 1 }},
		"app":            {postgres.AuditFilter{AppID: "app_2"}, func(i int) bool { return i%5 == 2 }},
		"key":            {postgres.AuditFilter{KeyID: key}, func(i int) bool { return i%6 == 0 }},
		"actor":          {postgres.AuditFilter{Actor: "actor_1"}, func(i int) bool { return i%2 == 1 }},
		"action":         {postgres.AuditFilter{Action: "action_2"}, func(i int) bool { return i%3 == 2 }},
		"request":        {postgres.AuditFilter{RequestID: "request_3"}, func(i int) bool { return i%7 == 3 }},
		"actor, action":  {postgres.AuditFilter{Actor: "actor_1", Action: "action_2"}, func(i int) bool { return i%6 == 5 }},
		"after":          {postgres.AuditFilter{After: noon.AddDate(0, 0, 20)}, func(i int) bool { return i >= 4 }},
		"before":         {postgres.AuditFilter{Before: noon.AddDate(0, 0, 20)}, func(i int) bool { return i < 4 }},
		"action, before": {postgres.AuditFilter{Action: "action_0", Before: noon.AddDate(0, 0, 61)}, func(i int) bool { return i%3 == 0 && i < 16 }},
	} {
		for _, oldestFirst := range []bool{true, false} {
			var want, got []int64
			for i := range all {
				if c.is(i) {
					want = append(want, all[i].ID)
				}
			}
			if !oldestFirst {
				slices.Reverse(want)
			}
			for from := int64(0); ; {
				page, err := db.AuditEvents(t.Context(), c.filter, from, oldestFirst, 3)
				if err != nil {
					t.Fatalf("%s: %v", name, err)
				}
				for _, e := range page {
					got = append(got, e.ID)
					from = e.ID
				}
				if len(page) < 3 {
					break
				}
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s, oldest first %v: %s", name, oldestFirst, diff)
			}
		}
	}
}

// The oldest first, an event is listed once no event with a lower id can appear: an id that is missing ends
// the list only as long as a transaction may have it.
func TestAuditEventsAreFinal(t *testing.T) {
	t.Parallel()
	const keep, drop = `INSERT INTO audit_events (actor, action) VALUES ('a', 'a')`, `SELECT nextval('audit_events_id_seq')`
	for name, c := range map[string]struct {
		before []string // is done first
		open   []string // by a transaction that is open, after before
		after  []string // is done then
		sealed bool
		want   []int64 // while the transaction is open
		end    []int64 // once it has ended
	}{
		"no transaction":           {before: []string{keep, drop, keep}, want: []int64{1, 3}, end: []int64{1, 3}},
		"lower id":                 {before: []string{keep}, open: []string{keep}, after: []string{keep, keep}, want: []int64{1}, end: []int64{1, 2, 3, 4}},
		"no id yet":                {open: []string{`LOCK TABLE audit_events IN ROW EXCLUSIVE MODE`}, after: []string{keep, keep}, want: []int64{1, 2}, end: []int64{1, 2}},
		"no id yet, and another":   {open: []string{`LOCK TABLE audit_events IN ROW EXCLUSIVE MODE`}, after: []string{keep, drop, keep}, want: []int64{1}, end: []int64{1, 3}},
		"a reader":                 {before: []string{keep, drop, keep}, open: []string{`SELECT count(*) FROM audit_events`}, want: []int64{1, 3}, end: []int64{1, 3}},
		"what is sealed":           {before: []string{keep, drop, keep}, sealed: true, open: []string{keep}, after: []string{keep}, want: []int64{1, 3}, end: []int64{1, 3, 4, 5}},
		"what a jump has left out": {before: []string{keep, `SELECT setval('audit_events_id_seq', 1000001)`, keep}, want: []int64{1, 1000002}, end: []int64{1, 1000002}},
		"nothing":                  {open: []string{keep}, end: []int64{1}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			url := pgtest.URL(t)
			conn, db := pgtest.Conn(t, url), pgtest.OpenURL(t, url)
			tx, err := pgtest.Conn(t, url).Begin(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			run := func(q interface {
				Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
			}, statements []string) {
				t.Helper()
				for _, sql := range statements {
					if _, err := q.Exec(t.Context(), sql); err != nil {
						t.Fatal(err)
					}
				}
			}
			listed := func(limit int) (ids []int64) {
				t.Helper()
				for from := int64(0); ; {
					page, err := db.AuditEvents(t.Context(), postgres.AuditFilter{}, from, true, limit)
					if err != nil {
						t.Fatal(err)
					}
					for _, e := range page {
						ids, from = append(ids, e.ID), e.ID
					}
					if len(page) < limit {
						return ids
					}
				}
			}
			run(conn, []string{`ALTER SEQUENCE audit_events_id_seq RESTART`})
			run(conn, c.before)
			if c.sealed {
				if s, err := db.SealAudit(t.Context(), time.Second); err != nil || s.Seals != 1 {
					t.Fatalf("sealed %+v, %v", s, err)
				}
			}
			run(tx, c.open)
			run(conn, c.after)
			if got := listed(100); !slices.Equal(got, c.want) {
				t.Errorf("while a transaction is open: %d; want %d", got, c.want)
			}
			if err := tx.Commit(t.Context()); err != nil {
				t.Fatal(err)
			}
			for _, limit := range []int{1, 2, 100} {
				if got := listed(limit); !slices.Equal(got, c.end) {
					t.Errorf("after its end, %d a page: %d; want %d", limit, got, c.end)
				}
			}
		})
	}
}

// A reader that continues from the last event gets each event exactly once and in order, whatever
// order transactions commit in.
func TestAuditEventsFollowed(t *testing.T) {
	t.Parallel()
	const writers, each = 4, 60
	url := pgtest.URL(t)
	db := pgtest.OpenURL(t, url)
	var writing sync.WaitGroup
	for w := range writers {
		conn := pgtest.Conn(t, url)
		writing.Go(func() {
			for i := range each {
				err := pgx.BeginFunc(t.Context(), conn, func(tx pgx.Tx) error {
					if _, err := tx.Exec(t.Context(), `INSERT INTO audit_events (actor, action) SELECT 'writer', 'a' FROM generate_series(1, $1::int)`, 1+(w+i)%3); err != nil {
						return err
					}
					if _, err := tx.Exec(t.Context(), `SELECT count(*) FROM generate_series(1, $1::int)`, (w+i)%4*20_000); err != nil { // some take longer
						return err
					}
					if (w+i)%5 == 0 {
						return errUndo
					}
					return nil
				})
				if err != nil && !errors.Is(err, errUndo) {
					t.Error(err)
				}
			}
		})
	}
	written := make(chan struct{})
	go func() { writing.Wait(); close(written) }()
	var got []int64
	for last, ended := int64(0), false; ; {
		page, err := db.AuditEvents(t.Context(), postgres.AuditFilter{Actor: "writer"}, last, true, 20)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range page {
			got, last = append(got, e.ID), e.ID
		}
		if ended && len(page) < 20 {
			break
		}
		select {
		case <-written:
			ended = true
		default:
		}
	}
	rows, _ := pgtest.Conn(t, url).Query(t.Context(), `SELECT id FROM audit_events WHERE actor = 'writer' ORDER BY id`)
	want, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("followed %d events of %d, %v; want each once: %s", len(got), len(want), err, cmp.Diff(want, got))
	}
}

var errUndo = errors.New("undo")

// The events of one key, app or request do not make the next one more expensive.
func TestAuditEventsCostTheSame(t *testing.T) {
	t.Parallel()
	conn := pgtest.Conn(t, pgtest.URL(t))
	const insert = `INSERT INTO audit_events (actor, action, tenant_id, app_id, key_id, request_id)
		SELECT 'caller:token', 'key.revealed', 'user', 'app', '01890000-0000-7000-8000-000000000001', 'request' FROM generate_series(1, $1::int)`
	explained := func() int {
		t.Helper()
		var plan []byte
		if err := conn.QueryRow(t.Context(), `EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) `+insert, pgx.QueryExecModeExec, 1).Scan(&plan); err != nil {
			t.Fatal(err)
		}
		var out []struct {
			Plan struct {
				Hit  int `json:"Shared Hit Blocks"`
				Read int `json:"Shared Read Blocks"`
			}
		}
		if err := json.Unmarshal(plan, &out); err != nil || len(out) != 1 {
			t.Fatalf("%v: %s", err, plan)
		}
		return out[0].Plan.Hit + out[0].Plan.Read
	}
	pages := func() int { // the least: others may have the catalogs read again
		t.Helper()
		return min(explained(), explained(), explained())
	}
	few := pages()
	if _, err := conn.Exec(t.Context(), insert, 25_000); err != nil {
		t.Fatal(err)
	}
	if many := pages(); many > few+30 {
		t.Errorf("an event reads %d pages after 25,000 of the same key, and %d before; want as many", many, few)
	}
}
