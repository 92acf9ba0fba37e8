package httpapi_test

import (
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/tenantry/tenantry/internal/httpapi"
	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// No PAT, key or token is found in a log, an answer that is not meant to hold it,
// a metric, a job, an audit event or anywhere else in the database, whatever
// happened to the sign-ups.
func TestNothingLeaks(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{})
	s := newSiteOn(t, w, r)
	secrets := &vault{secrets: map[string]string{provisiontest.PAT: "PAT"}}
	for role, token := range s.tokens {
		secrets.add("token of "+string(role), token)
		secrets.add("secret of the token of "+string(role), token[strings.LastIndex(token, "_")+1:])
	}
	var answers []string // those that may not hold a secret

	faults := []map[string]any{
		{"drop_before": true}, {"drop_after": true}, {"http": 502}, {"http": 502, "after": true}, {"hang": true}, {"hang": true, "after": true},
		{"status": 11005}, {"status": 11006}, {"status": 11008}, {"status": 11102}, {"status": 98004, "after": true}, {"status": 10010, "after": true}, {"status": 10050},
	}
	n := 0
	for _, call := range []string{"PostApps", "GetApp", "PostKeys", "ListAppKeys", "DeleteKey", "DeleteApp"} {
		for _, f := range faults {
			n++
			rule := map[string]any{"call": call, "count": 1}
			// A key call has to be in doubt for the others to be made at all.
			rules := []map[string]any{rule}
			if call != "PostApps" && call != "PostKeys" {
				rules = append(rules, map[string]any{"call": "PostKeys", "count": 1, "drop_before": true, "late_ms": 50},
					map[string]any{"call": "PostApps", "count": 1, "drop_after": true})
			}
			for k, v := range f {
				rule[k] = v
			}
			w.Settings(map[string]any{"masked_keys": n%2 == 0})
			w.Faults(rules...)
			path := fmt.Sprintf("/v1/tenants/user_%d", n)
			s.call(tenant.Provisioner, "PUT", path, `{"display_name":"Ada","labels":{"plan":"pro"}}`, "Prefer", "wait=30")
			for _, k := range w.AppKeys() {
				secrets.add("key at Clarifai", k.ID)
			}
			for _, get := range []string{path, path + "/keys", "/v1/upstream"} {
				answers = append(answers, string(s.call(tenant.Viewer, "GET", get, "").body))
			}
		}
	}
	w.Faults()
	put := s.call(tenant.Provisioner, "PUT", "/v1/tenants/user_1", "")
	key := fmt.Sprint(put.at(t, "credentials", "key"))
	secrets.add("key in credentials", key)
	app := fmt.Sprint(put.at(t, "app", "id"))
	for _, a := range []answer{
		s.call(tenant.Viewer, "POST", "/v1/keys/identify", `{"key":"`+key+`"}`),
		s.call(tenant.Viewer, "POST", "/v1/keys/identify", `{"key":"`+key+`","`+key+`":1}`),
		s.call(tenant.Viewer, "POST", "/v1/keys/identify", `{"key":["`+key+`"]}`),
		s.call(tenant.Viewer, "POST", "/v1/keys/identify", `"`+key+`"`),
		s.call(tenant.Viewer, "GET", "/v1/apps/"+app, ""),
		s.call(tenant.Viewer, "GET", "/v1/tenants?limit=1000", ""),
		s.call("", "GET", "/v1/upstream", "", "Authorization", "Bearer "+s.tokens[tenant.Admin]+"x"),
		s.call("", "GET", "/v1/upstream", "", "Authorization", "Basic "+s.tokens[tenant.Admin]),
		s.call("", "GET", "/v1/upstream", "", "X-Request-Id", s.tokens[tenant.Admin]),
		s.call(tenant.Viewer, "GET", "/v1/tenants/user_1", "", "X-Request-Id", "a"+s.tokens[tenant.Admin]),
		s.call(tenant.Viewer, "GET", "/v1/tenants/user_1", "", "X-Request-Id", key),
		s.call(tenant.Provisioner, "PUT", "/v1/tenants/user_1?"+key+"=1", `{"`+key+`":1}`, "X-Request-Id", "pat:"+provisiontest.PAT),
		s.call(tenant.Provisioner, "PUT", "/v1/tenants/user_1", `{"`+key+`":1}`, "Prefer", key, "If-None-Match", key),
		s.call(tenant.Viewer, "GET", "/v1/tenants/user_1/keys/default/secret", ""),
	} {
		answers = append(answers, string(a.body), fmt.Sprint(a.header))
	}

	// The whole life of a tenant and of its keys.
	const user = "/v1/tenants/user_1"
	for i, act := range []struct {
		role               tenant.Role
		method, path, body string
		shows              bool
	}{
		{tenant.Provisioner, "PUT", user + "/keys/more", `{"scopes":["Predict"]}`, true},
		{tenant.Provisioner, "PUT", user + "/keys/default/rotations/r1", `{"overlap":"1h"}`, true},
		{tenant.Viewer, "GET", user + "/keys/default/rotations/r1", "", false},
		{tenant.Admin, "POST", "/v1/keys/quarantine", `{"key":"` + key + `"}`, false},
		{tenant.Admin, "POST", "/v1/keys/quarantine", `{"` + key + `":"` + key + `"}`, false},
		{tenant.Provisioner, "DELETE", user + "/keys/more", "", false},
		{tenant.Provisioner, "POST", user + "/suspend", "", false},
		{tenant.Provisioner, "POST", user + "/resume", "", false},
		{tenant.Provisioner, "DELETE", user, "", false},
		{tenant.Provisioner, "POST", user + "/restore", "", false},
		{tenant.Provisioner, "PATCH", user, `{"` + key + `":1}`, false},
	} {
		if i%2 == 0 {
			w.Faults(map[string]any{"call": "PostKeys", "count": 1, "drop_after": true}, map[string]any{"call": "DeleteKey", "count": 1, "drop_after": true})
		}
		a := s.call(act.role, act.method, act.path, act.body, "Prefer", "wait=30")
		for _, k := range w.AppKeys() {
			secrets.add("key at Clarifai", k.ID)
		}
		if !act.shows {
			answers = append(answers, string(a.body), fmt.Sprint(a.header))
		}
	}

	// Apps that are taken over, with keys that are and are not taken.
	for i, c := range []struct{ body, call string }{
		{`"app_id":"hand-made","key":"%s"`, "GetApp"}, {`"app_id":"hand-made","key":"%s"`, "MyScopes"}, {`"app_id":"hand-made","key":"%s"`, "GetKey"},
		{`"app_id":"other","key":"%s"`, ""}, {`"app_id":"hand-made","%s":1`, ""}, {`"app_id":"hand-made","key":["%s"]`, ""},
		{`"app_id":"hand-made","user_id":"%s"`, ""}, {`"app_id":"hand-made","key":"%s","dry_run":true`, ""},
	} {
		for j, f := range faults {
			if i > 2 && j > 0 {
				break
			}
			user, id := fmt.Sprintf("/v1/tenants/adopter_%d_%d", i, j), fmt.Sprintf("hand-made-%d-%d", i, j)
			w.Faults()
			given := w.AppByHand(provisiontest.PAT, tenant.AppID(id), nil).Reveal()
			secrets.add("key that was given", given)
			if c.call != "" {
				rule := map[string]any{"call": c.call, "count": 1}
				for k, v := range f {
					rule[k] = v
				}
				w.Faults(rule)
			}
			body := fmt.Sprintf(strings.Replace(c.body, "hand-made", id, 1), given)
			a := s.call(tenant.Provisioner, "PUT", user, `{"adopt":{`+body+`}}`, "Prefer", "wait=30")
			if a.status >= 400 || a.at(t, "credentials") == nil {
				answers = append(answers, string(a.body), fmt.Sprint(a.header))
			}
		}
	}
	w.Faults()

	for _, a := range answers {
		secrets.search(t, "an answer", a)
	}
	for _, line := range append(r.Logs.All(), s.logs.All()...) {
		secrets.search(t, "the log", line.Message+fmt.Sprint(line.ContextMap()))
	}
	internal := httptest.NewServer(httpapi.NewInternal(r.Reg, nil))
	defer internal.Close()
	resp, err := http.Get(internal.URL + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	raw, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	secrets.search(t, "the metrics", string(raw))
	tables := dump(t, w.URL)
	for table, text := range tables {
		secrets.search(t, "table "+table, text)
	}
	if len(tables["audit_events"]) < 1000 || len(tables["keys"]) < 1000 || len(secrets.secrets) < n {
		t.Errorf("the search saw too little to mean anything: %d keys, %d bytes of audit", len(secrets.secrets), len(tables["audit_events"]))
	}
}

// A vault is what must not be found.
type vault struct {
	secrets map[string]string // name by secret
}

func (v *vault) add(name, secret string) {
	if secret != "" && secret != "<nil>" {
		v.secrets[secret] = name
	}
}

// search looks for each secret, plain and in the encodings that bytes are shown
// in.
func (v *vault) search(t *testing.T, where, text string) {
	t.Helper()
	for secret, name := range v.secrets {
		for _, form := range []string{secret, hex.EncodeToString([]byte(secret)), base64.StdEncoding.EncodeToString([]byte(secret))} {
			if i := strings.Index(text, form); i >= 0 {
				t.Errorf("%s holds the %s: …%s…", where, name, text[max(0, i-60):min(len(text), i+20)])
			}
		}
	}
}

// dump reads every row of every table as text.
func dump(t *testing.T, url tenant.Secret) map[string]string {
	t.Helper()
	conn := pgtest.Conn(t, url)
	rows, _ := conn.Query(t.Context(), `SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p')`)
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	tables := map[string]string{}
	for _, name := range names {
		var text string
		err := conn.QueryRow(t.Context(), `SELECT coalesce(string_agg(t::text, E'\n'), '') FROM `+pgx.Identifier{name}.Sanitize()+` t`).Scan(&text)
		if err != nil {
			t.Fatal(err)
		}
		tables[name] = text
	}
	return tables
}
