package cluster_test

import (
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"testing"

	"github.com/tenantry/tenantry/internal/tenant"
	"github.com/tenantry/tenantry/test/cluster"
)

// Separate paths say whether a replica can serve writes and lookups, whatever is wrong with its database.
func TestReadiness(t *testing.T) {
	t.Parallel()
	c := cluster.New(t, cluster.Options{Env: map[string]string{"TENANTRY_POOL_MAX": "0"}})
	cached := c.StartReplica(cluster.ReplicaOptions{Proxy: c.NewProxy(c.Primary)})
	empty := c.StartReplica(cluster.ReplicaOptions{Proxy: c.NewProxy(c.Primary)})
	cached.SignUp("one")
	readOnly := c.StartReplica(cluster.ReplicaOptions{Env: map[string]string{"TENANTRY_READ_ONLY": "true", "CLARIFAI_PAT": ""}})
	states := func(r *cluster.Replica) string {
		var got [3]int
		for i, path := range []string{"/readyz", "/readyz/writes", "/readyz/lookups"} {
			resp, err := http.Get(r.InternalURL + path)
			if err != nil {
				return err.Error()
			}
			_ = resp.Body.Close()
			got[i] = resp.StatusCode
		}
		return fmt.Sprint(got)
	}
	const all, lookups, none = "[200 200 200]", "[200 503 200]", "[503 503 503]"
	want := func(what string, wanted map[*cluster.Replica]string) {
		t.Helper()
		for r, state := range wanted {
			c.Eventually(fmt.Sprint(what, ", ", r.Name, " has the states ", state), func() bool { return states(r) == state })
		}
	}
	lookUp := func() {
		t.Helper()
		c.Eventually("a lookup is served from the cache", func() bool {
			hits := metric(t, cached, "tenantry_cache_hits_total")
			return cached.Call(http.MethodGet, "/v1/tenants/one", nil, tenant.Viewer).Status == http.StatusOK && metric(t, cached, "tenantry_cache_hits_total") > hits
		})
	}
	lookUp()
	want("at first", map[*cluster.Replica]string{cached: all, empty: all, readOnly: lookups})

	cached.Proxy.BlackHole()
	empty.Proxy.BlackHole()
	want("while the database hangs", map[*cluster.Replica]string{cached: lookups, empty: none, readOnly: lookups})
	cached.Proxy.Forward()
	empty.Proxy.Forward()
	want("afterwards", map[*cluster.Replica]string{cached: all, empty: all})

	lookUp()
	cached.Proxy.Refuse()
	empty.Proxy.Refuse()
	want("while connections are refused", map[*cluster.Replica]string{cached: lookups, empty: none})
	cached.Proxy.Forward()
	empty.Proxy.Forward()
	want("afterwards", map[*cluster.Replica]string{cached: all, empty: all})

	setReadOnly := func(to string) {
		t.Helper()
		c.Primary.Exec(`BEGIN READ WRITE; ALTER DATABASE ` + cluster.Database + ` SET default_transaction_read_only = ` + to + `; COMMIT`)
	}
	setReadOnly("on")
	cached.Proxy.Cut()
	empty.Proxy.Cut()
	want("while the database is read-only", map[*cluster.Replica]string{cached: lookups, empty: lookups, readOnly: lookups})
	setReadOnly("off") // the sessions stay read-only, and no caller writes
	want("afterwards", map[*cluster.Replica]string{cached: all, empty: all})
}

// With several hosts in its URL, a replica finds the primary, and never reads from a standby.
func TestSeveralHosts(t *testing.T) {
	c := cluster.New(t, cluster.Options{Standbys: 1})
	standby := c.Standbys[0]
	primary, err := url.Parse(c.Primary.URL(cluster.Database))
	if err != nil {
		t.Fatal(err)
	}
	primary.Host = standby.Addr() + "," + c.Primary.Addr()
	several := c.StartReplica(cluster.ReplicaOptions{Env: map[string]string{"DATABASE_URL": primary.String()}})
	several.SignUp("one")
	alone := c.NewReplica(cluster.ReplicaOptions{Env: map[string]string{"DATABASE_URL": standby.URL(cluster.Database)}})
	alone.Launch()
	alone.WaitLog("the server is a standby", 1)
	if alone.Ready() {
		t.Error("a replica is ready that can reach only a standby")
	}
	c.Primary.Stop()
	standby.Promote()
	several.SignUp("two")
}

// metric reads a metric without labels.
func metric(t *testing.T, r *cluster.Replica, name string) float64 {
	t.Helper()
	resp, err := http.Get(r.InternalURL + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(body)) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			v, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			if err != nil {
				t.Fatal(err)
			}
			return v
		}
	}
	t.Fatalf("there is no metric %s", name)
	return 0
}
