package httpapi_test

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/tenantry/tenantry/internal/httpapi"
	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// audit lists events, as their actions and the tenants they are about.
func (s *site) audit(query string) (events []map[string]any, shown []string, next string) {
	s.t.Helper()
	got := s.call(tenant.Viewer, "GET", "/v1/audit?"+query, "")
	if got.status != http.StatusOK {
		s.t.Fatalf("GET /v1/audit?%s answers %d %s", query, got.status, got.body)
	}
	for _, item := range got.at(s.t, "events").([]any) {
		e := item.(map[string]any)
		events = append(events, e)
		shown = append(shown, fmt.Sprint(e["action"], " ", e["tenant_id"]))
	}
	next, _ = got.at(s.t, "next_cursor").(string)
	return events, shown, next
}

// What a tenant's sign-up did is found by each thing that it was about, with who
// asked, in which request, and Clarifai's request behind it.
func TestAudit(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	put := s.call(tenant.Provisioner, "PUT", "/v1/tenants/user_1", "", "Prefer", "wait=30", "X-Request-Id", "first-request")
	if put.status != http.StatusCreated {
		t.Fatalf("PUT answers %d %s", put.status, put.body)
	}
	s.call(tenant.Provisioner, "PUT", "/v1/tenants/user_2", "", "Prefer", "wait=30")
	key := fmt.Sprint(put.at(t, "credentials", "key"))

	want := []string{"tenant.created user_1", "tenant.activated user_1", "key.revealed user_1"}
	events, shown, _ := s.audit("tenant=user_1&order=asc")
	if !slices.Equal(shown, want) {
		t.Fatalf("the events of the tenant are %q; want %q", shown, want)
	}
	slices.Reverse(want)
	if _, shown, _ := s.audit("tenant=user_1"); !slices.Equal(shown, want) {
		t.Errorf("newest first they are %q", shown)
	}
	created, activated, revealed := events[0], events[1], events[2]
	if created["request_id"] != "first-request" || created["detail"].(map[string]any)["profile"] != "default" || created["upstream_request_id"] != nil ||
		!strings.HasPrefix(fmt.Sprint(created["actor"]), "caller:") {
		t.Errorf("tenant.created is %v", created)
	}
	if activated["actor"] != "worker" || !strings.HasPrefix(fmt.Sprint(activated["upstream_request_id"]), "tenantry") || activated["app_id"] != put.at(t, "app", "id") {
		t.Errorf("tenant.activated is %v; want the worker and the last call of the build", activated)
	}
	if revealed["actor"] != created["actor"] || revealed["request_id"] != "first-request" || revealed["key_id"] == nil {
		t.Errorf("key.revealed is %v", revealed)
	}
	if text := fmt.Sprint(events); strings.Contains(text, key) {
		t.Error("a key is in the audit log")
	}
	at := func(e map[string]any) string { return url.QueryEscape(fmt.Sprint(e["at"])) }
	for query, want := range map[string][]string{
		"app=" + fmt.Sprint(activated["app_id"]):       {"key.revealed user_1", "tenant.activated user_1"},
		"key_id=" + fmt.Sprint(revealed["key_id"]):     {"key.revealed user_1"},
		"request_id=first-request":                     {"key.revealed user_1", "tenant.created user_1"},
		"action=tenant.created":                        {"tenant.created user_2", "tenant.created user_1"},
		"actor=worker":                                 {"tenant.activated user_2", "tenant.activated user_1"},
		"action=tenant.created&actor=worker":           nil,
		"tenant=user_1&action=key.revealed&order=desc": {"key.revealed user_1"},
		"tenant=user_1&before=" + at(activated):        {"tenant.created user_1"},
		"tenant=user_1&after=" + at(activated):         {"key.revealed user_1", "tenant.activated user_1"},
		"tenant=nobody":                                nil,
		"actor=" + url.QueryEscape(fmt.Sprint(created["actor"])) + "&tenant=user_2": {"key.revealed user_2", "tenant.created user_2"},
	} {
		if _, shown, _ := s.audit(query); !slices.Equal(shown, want) {
			t.Errorf("?%s selects %q; want %q", query, shown, want)
		}
	}

	for _, order := range []string{"asc", "desc"} {
		_, all, none := s.audit("order=" + order)
		var paged []string
		pages := 0
		for cursor := ""; pages == 0 || cursor != ""; pages++ {
			query := "limit=2&order=" + order
			if cursor != "" {
				query += "&cursor=" + cursor
			}
			_, shown, next := s.audit(query)
			paged, cursor = append(paged, shown...), next
		}
		if none != "" || !slices.Equal(paged, all) || pages != (len(all)+1)/2 {
			t.Errorf("in %s the %d pages hold %q; want %q", order, pages, paged, all)
		}
	}
}

// A client that pages in ascending order gets each event exactly once, also one that a transaction
// adds behind the last page, with an earlier time and a lower id than events that were committed before.
func TestAuditLosesNoLateEvent(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	insert := func(q interface {
		Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
	}, action string) {
		t.Helper()
		if _, err := q.Exec(t.Context(), `INSERT INTO audit_events (actor, action) VALUES ('late', $1)`, action); err != nil {
			t.Fatal(err)
		}
	}
	conn := pgtest.Conn(t, s.world.URL)
	tx, err := pgtest.Conn(t, s.world.URL).Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	insert(conn, "1")
	insert(tx, "2")
	insert(conn, "3")
	insert(conn, "4")

	var got []string
	cursor := ""
	page := func() (more bool) {
		query := "actor=late&order=asc&limit=1"
		if cursor != "" {
			query += "&cursor=" + cursor
		}
		events, _, next := s.audit(query)
		for _, e := range events {
			got = append(got, fmt.Sprint(e["action"]))
		}
		if next != "" {
			cursor = next
		} else if len(events) > 0 {
			cursor = fmt.Sprintf("%.0f", events[len(events)-1]["id"])
		}
		return next != ""
	}
	for page() {
	}
	if slices.Contains(got, "3") || slices.Contains(got, "4") {
		t.Errorf("while the second event may still appear, the list has %q; want none after it", got)
	}
	if _, all, _ := s.audit("actor=late"); len(all) != 3 {
		t.Errorf("the newest events are %q; want the 3 that are committed", all)
	}
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	for page() {
	}
	if want := []string{"1", "2", "3", "4"}; !slices.Equal(got, want) {
		t.Errorf("the pages have %q; want %q", got, want)
	}
}

func TestAuditIsForViewersAndAdmins(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	for role, want := range map[tenant.Role]int{tenant.Viewer: 200, tenant.Admin: 200, tenant.Provisioner: 403} {
		if got := s.call(role, "GET", "/v1/audit", ""); got.status != want {
			t.Errorf("GET /v1/audit as %s answers %d; want %d", role, got.status, want)
		}
	}
	for query, says := range map[string]string{
		"key_id=x": "key_id must be a UUID", "key_id=00000000-0000-0000-0000-000000000000": "key_id must be a UUID", "after=now": "2026-01-31T12:00:00Z",
		"before=": "before is empty", "tenant=": "tenant is empty", "order=up": "asc or desc", "limit=0": "from 1 to 1000",
		"cursor=zzz": "next_cursor", "cursor=0": "the id of an event", "tenant_id=x": "there are: tenant, app,", "actor=a&actor=b": "2 times", "action=%00": "zero byte",
	} {
		got := s.call(tenant.Admin, "GET", "/v1/audit?"+query, "")
		if text := fmt.Sprint(got.at(t, "field"), " ", got.at(t, "detail")); got.status != http.StatusBadRequest || !strings.Contains(text, says) {
			t.Errorf("?%s answers %d %s; want 400 that says %q", query, got.status, got.body, says)
		}
	}
}

func FuzzAuditCursor(f *testing.F) {
	for _, s := range []string{"42", "", "0", "-1", "+1", "007", "9223372036854775808"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if id, err := httpapi.ParseAuditCursor(s); err == nil && (id < 1 || strconv.FormatInt(id, 10) != s) {
			t.Errorf("cursor %q reads as %d", s, id)
		}
	})
}
