package httpapi_test

import (
	"encoding/json"
	"net/http"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// poolOptions have the default profile keep two to five apps ready, and another none.
func poolOptions(o provisiontest.Options) provisiontest.Options {
	o.Adjust = func(c *provision.Config) {
		c.Profiles[0].PoolMin, c.Profiles[0].PoolMax = 2, 5
		c.PoolEvery = 50 * time.Millisecond
	}
	return o
}

// defaultPool reads the pool of the default profile.
func (s *site) defaultPool() map[string]any {
	s.t.Helper()
	got := s.call(tenant.Viewer, "GET", "/v1/pool", "")
	var body struct{ Pools []map[string]any }
	if err := json.Unmarshal(got.body, &body); err != nil || got.status != http.StatusOK || len(body.Pools) != 2 {
		s.t.Fatalf("GET /v1/pool answers %d %s, %v", got.status, got.body, err)
	}
	if off := body.Pools[1]; off["profile"] != "narrow" || off["max"] != 0.0 || off["reason"] != nil {
		s.t.Errorf("the pool that is turned off is %v", off)
	}
	return body.Pools[0]
}

func (s *site) poolReason(want string) {
	s.t.Helper()
	var last map[string]any
	defer func() {
		if s.t.Failed() {
			s.t.Logf("the pool is %v", last)
		}
	}()
	provisiontest.Eventually(s.t, "the reason is "+want, func() bool {
		last = s.defaultPool()
		reason, _ := last["reason"].(map[string]any)
		return reason["code"] == want && reason["detail"] != ""
	})
}

func TestPool(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	s := newSiteOn(t, w, w.Start(poolOptions(provisiontest.Options{})))
	provisiontest.Eventually(t, "the pool is full", func() bool { return s.defaultPool()["reason"] == nil && s.defaultPool()["ready"] == 2.0 })
	for _, id := range []string{"user_1", "user_2", "user_3"} {
		if got := s.call(tenant.Provisioner, "PUT", "/v1/tenants/"+id, "", "Prefer", "wait=30"); got.status != http.StatusCreated {
			t.Fatalf("sign-up answers %d %s", got.status, got.body)
		}
	}
	var got map[string]any
	provisiontest.Eventually(t, "the pool has grown", func() bool {
		got = s.defaultPool()
		hour, _ := got["last_hour"].(map[string]any)
		return got["ready"] == got["target"] && got["building"] == 0.0 && hour["sign_ups"] == 3.0
	})
	if hour := got["last_hour"].(map[string]any); hour["hits"].(float64)+hour["misses"].(float64) != 3 || hour["hits"].(float64) < 2 {
		t.Errorf("the last hour is %v; want two hits at least", hour)
	}
	planned, err := time.Parse(time.RFC3339, got["planned_at"].(string))
	if err != nil || time.Since(planned) > time.Minute {
		t.Errorf("it was planned at %v, %v", got["planned_at"], err)
	}
	delete(got, "planned_at")
	delete(got, "last_hour")
	want := map[string]any{"profile": "default", "min": 2.0, "max": 5.0, "target": 3.0, "ready": 3.0, "outdated": 0.0, "retired": 0.0,
		"building": 0.0, "waiting_tenants": 0.0, "importing_tenants": 0.0}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the pool (- want, + got):\n%s", diff)
	}
}

func TestPoolSaysWhyItIsShort(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	idle := newSiteOn(t, w, w.Start(poolOptions(provisiontest.Options{Idle: true})))
	idle.poolReason("filling")
	conn := pgtest.Conn(t, w.URL)
	exec := func(sql string) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	for code, c := range map[string]struct{ on, off string }{
		"another_database":     {provisiontest.SetRecovery(tenant.Stopped), provisiontest.SetRecovery(tenant.NotRecovering)},
		"upstream_paused":      {`UPDATE upstream_budget SET pauses = 1, pause_reason = '{"code": "upstream_unavailable", "detail": "a test"}'`, `UPDATE upstream_budget SET pauses = 0`},
		"upstream_busy":        {`INSERT INTO apps (id, profile, profile_revision, state) VALUES ('t-x', 'default', 'x', 'purging')`, `UPDATE apps SET state = 'deleted'`},
		"import":               {`INSERT INTO tenants (id, profile, attributes_hash, background) VALUES ('imported', 'default', sha256('') || sha256(''), true)`, `DELETE FROM tenants`},
		"revision_changes":     {`INSERT INTO pools VALUES ('default', 'other', 2, now(), NULL, 0, 0, 0)`, `DELETE FROM pools`},
		"upstream_pat_refused": {`INSERT INTO apps (id, profile, profile_revision, problem) VALUES ('t-y', 'default', 'x', '{"code": "upstream_pat_refused", "detail": "a test"}')`, `UPDATE apps SET state = 'deleted', problem = NULL`},
	} {
		exec(c.on)
		idle.poolReason(code)
		exec(c.off)
		idle.poolReason("filling")
	}
	idle.call(tenant.Provisioner, "PUT", "/v1/tenants/user_1", "", "Prefer", "respond-async")
	idle.poolReason("sign_ups_wait")

	w.Faults(map[string]any{"call": "PostApps", "status": 11006})
	newSiteOn(t, w, w.Start(poolOptions(provisiontest.Options{}))).poolReason("upstream_quota")
}
