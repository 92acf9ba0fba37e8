package postgres_test

import (
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/uuid"

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
	all, err := db.AuditEvents(t.Context(), postgres.AuditFilter{}, postgres.AuditPosition{}, true, 1000)
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
			for from := (postgres.AuditPosition{}); ; {
				page, err := db.AuditEvents(t.Context(), c.filter, from, oldestFirst, 3)
				if err != nil {
					t.Fatalf("%s: %v", name, err)
				}
				for _, e := range page {
					got = append(got, e.ID)
					from = postgres.AuditPosition{At: e.At, ID: e.ID}
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
