package tenant_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tenantry/tenantry/internal/tenant"
)

func TestCheckScopes(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		scopes string // by comma
		want   []string
	}{
		{"All", nil},
		{"Predict,Apps_Get,Models_Get,Concepts_Get", nil},
		{"Predict,Apps:Get,Models:Get", nil},
		{"Inputs_Add,Inputs_Get,Search", nil},
		{"Inputs_Add,Inputs:Get", nil},
		{"Inputs_Delete,Inputs_Add,Inputs_Get", nil},
		{"Models_Train,Models_Pull", nil},
		// Of these resources nothing that is not deprecated could be needed.
		{"ModelVersionPublications_Add", nil},
		{"WorkflowMetrics_Add", nil},
		{"", []string{"-1 is empty: name at least one scope, such as All"}},
		{"Inputs_Add", []string{`0 "Inputs_Add" needs Inputs_Get beside it`}},
		{"Predict,Inputs:Delete", []string{`1 "Inputs:Delete" needs Inputs:Add and Inputs:Get beside it`}},
		{"Inputs_Delete,Inputs_Get", []string{`0 "Inputs_Delete" needs Inputs_Add beside it`}},
		{"WorkflowMetrics_Delete", []string{`0 "WorkflowMetrics_Delete" needs WorkflowMetrics_Add beside it`}},
		{"Models_Patch", []string{`0 "Models_Patch" is dead: it opens nothing at Clarifai`}},
		{"Collectors_Add", []string{`0 warning "Collectors_Add" is deprecated at Clarifai`}},
		{"FindDuplicateAnnotationsJobs_Add", []string{`0 warning "FindDuplicateAnnotationsJobs_Add" is deprecated at Clarifai`,
			`0 "FindDuplicateAnnotationsJobs_Add" needs FindDuplicateAnnotationsJobs_Get beside it`}},
		{"All,Predict", []string{`0 warning "All" covers every other scope`}},
		{"Inputs_Add,All", []string{`1 warning "All" covers every other scope`}},
		{"Models_Get,Models:Get", []string{`1 "Models:Get" is named twice`}},
		{"all", []string{`0 "all" is no scope of Clarifai's: write All`}},
		{"models_get", []string{`0 "models_get" is no scope of Clarifai's: write Models_Get`}},
		{"InstanceTypes_Add", []string{`0 "InstanceTypes_Add" is no scope of Clarifai's; there are InstanceTypes_Get`}},
		{"Modles_Get", []string{`0 "Modles_Get" is no scope of Clarifai's; they read like Models_Get, or All`}},
		{"Modles_Patch", []string{`0 "Modles_Patch" is no scope of Clarifai's; they read like Models_Get, or All`}},
		{"Models", []string{`0 "Models" is no scope of Clarifai's; there are Models_Get, Models_Add, Models_Delete, Models_Train, Models_Pull`}},
		{"Models_Get_", []string{`0 "Models_Get_" is no scope of Clarifai's; there are Models_Get, Models_Add, Models_Delete, Models_Train, Models_Pull`}},
		{" ", []string{`0 " " is no scope of Clarifai's; they read like Models_Get, or All`}},
	} {
		var scopes, got []string
		if c.scopes != "" {
			scopes = strings.Split(c.scopes, ",")
		}
		for _, f := range tenant.CheckScopes(scopes) {
			detail := f.Detail
			if f.Warning {
				detail = "warning " + detail
			}
			got = append(got, fmt.Sprint(f.Index, " ", detail))
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("CheckScopes(%q) (- want, + got):\n%s", c.scopes, diff)
		}
	}
}

// Stored with every app: a later version must give the same.
func TestProfileRevisionStays(t *testing.T) {
	t.Parallel()
	for want, p := range map[string]tenant.Profile{
		"1dbfbfd41a3b": {Name: "default", BaseWorkflow: "Empty", KeyScopes: []string{"All"}},
		"26274a855324": {Name: "narrow", BaseWorkflow: "General", KeyScopes: []string{"Predict", "Apps_Get"}},
	} {
		if got := p.Revision(); got != want {
			t.Errorf("the revision of %s is %s, was %s", p.Name, got, want)
		}
	}
}

func TestProfileRevisionCoversWhatIsBuilt(t *testing.T) {
	t.Parallel()
	base := tenant.Profile{Name: "default", BaseWorkflow: "Empty", KeyScopes: []string{"All"}}
	key := func(name string, scopes ...string) tenant.KeyTemplate {
		return tenant.KeyTemplate{Name: name, Scopes: scopes}
	}
	seen := map[string]string{base.Revision(): "the base"}
	for name, change := range map[string]func(*tenant.Profile){
		"workflow":    func(p *tenant.Profile) { p.BaseWorkflow = "General" },
		"scopes":      func(p *tenant.Profile) { p.KeyScopes = []string{"Predict"} },
		"language":    func(p *tenant.Profile) { p.Language = "en" },
		"description": func(p *tenant.Profile) { p.AppDescription = "en" },
		"id shown":    func(p *tenant.Profile) { p.ShowTenant = tenant.ShowTenantID },
		"hash shown":  func(p *tenant.Profile) { p.ShowTenant = tenant.ShowTenantHash },
		"key":         func(p *tenant.Profile) { p.ExtraKeys = []tenant.KeyTemplate{key("a", "All")} },
		"key's scope": func(p *tenant.Profile) { p.ExtraKeys = []tenant.KeyTemplate{key("a", "Search")} },
		"key's name":  func(p *tenant.Profile) { p.ExtraKeys = []tenant.KeyTemplate{key("b", "All")} },
		"two keys":    func(p *tenant.Profile) { p.ExtraKeys = []tenant.KeyTemplate{key("a", "All"), key("b", "All")} },
		"key of two":  func(p *tenant.Profile) { p.ExtraKeys = []tenant.KeyTemplate{key("a", "All", "key", "b", "All")} },
		"no scopes":   func(p *tenant.Profile) { p.KeyScopes = nil },
		"as scopes":   func(p *tenant.Profile) { p.KeyScopes = []string{"All", "language", "en"} },
	} {
		p := base
		change(&p)
		if other, taken := seen[p.Revision()]; taken {
			t.Errorf("%s and %s have one revision", name, other)
		}
		seen[p.Revision()] = name
	}
	same := base
	same.Name, same.Retention, same.MaxKeyAge, same.PoolMin, same.PoolMax = "other", time.Hour, time.Hour, 1, 2
	same.AllowedScopes = []string{"Predict"}
	if same.Revision() != base.Revision() {
		t.Error("what shapes no app is part of the revision")
	}
	ab, ba := base, base
	ab.ExtraKeys = []tenant.KeyTemplate{key("a", "All"), key("b", "Predict")}
	ba.ExtraKeys = []tenant.KeyTemplate{key("b", "Predict"), key("a", "All")}
	if ab.Revision() != ba.Revision() {
		t.Error("the order of the extra keys is part of the revision")
	}
	if ba.ExtraKeys[0].Name != "b" {
		t.Error("Revision changes the profile")
	}
}

func TestProfileCheck(t *testing.T) {
	t.Parallel()
	for field, change := range map[string]func(*tenant.Profile){
		"":                  func(p *tenant.Profile) { p.Name = "No" },
		"base_workflow":     func(p *tenant.Profile) { p.BaseWorkflow = "a b" },
		"key_scopes":        func(p *tenant.Profile) { p.KeyScopes = nil },
		"key_scopes[1]":     func(p *tenant.Profile) { p.KeyScopes = []string{"Predict", "Nothing"} },
		"allowed_scopes[0]": func(p *tenant.Profile) { p.AllowedScopes = []string{"Nothing"} },
		"extra_keys.default": func(p *tenant.Profile) {
			p.ExtraKeys = []tenant.KeyTemplate{{Name: "default", Scopes: []string{"All"}}}
		},
		`extra_keys."A"`: func(p *tenant.Profile) { p.ExtraKeys = []tenant.KeyTemplate{{Name: "A", Scopes: []string{"All"}}} },
		"extra_keys.a": func(p *tenant.Profile) {
			k := tenant.KeyTemplate{Name: "a", Scopes: []string{"All"}}
			p.ExtraKeys = []tenant.KeyTemplate{k, k}
		},
		"extra_keys.search.scopes":   func(p *tenant.Profile) { p.ExtraKeys = []tenant.KeyTemplate{{Name: "search"}} },
		"extra_keys.x.scopes[0]":     func(p *tenant.Profile) { p.ExtraKeys = []tenant.KeyTemplate{{Name: "x", Scopes: []string{"Keys_Add"}}} },
		"language":                   func(p *tenant.Profile) { p.Language = "English" },
		"app_description":            func(p *tenant.Profile) { p.AppDescription = "a\nb" },
		"show_tenant":                func(p *tenant.Profile) { p.ShowTenant = "name" },
		"retention":                  func(p *tenant.Profile) { p.Retention = -1 },
		"max_key_age":                func(p *tenant.Profile) { p.MaxKeyAge = -1 },
		"pool.min":                   func(p *tenant.Profile) { p.PoolMin = -1 },
		"pool.max":                   func(p *tenant.Profile) { p.PoolMax = tenant.MaxPool + 1 },
		"pool":                       func(p *tenant.Profile) { p.PoolMin, p.PoolMax = 2, 1 },
		"base_workflow (as warning)": func(p *tenant.Profile) { p.BaseWorkflow = "Mine" },
	} {
		p := tenant.Profile{Name: "default", BaseWorkflow: "Empty", KeyScopes: []string{"All"}, PoolMin: 5, Language: "zh-TW",
			ShowTenant: tenant.ShowTenantHash, ExtraKeys: []tenant.KeyTemplate{{Name: "a", Scopes: []string{"Predict"}}}}
		if faults := p.Check(); len(faults) > 0 {
			t.Fatalf("a good profile has the faults %v", faults)
		}
		change(&p)
		var got []string
		for _, f := range p.Check() {
			at := f.Field
			if f.Warning {
				at += " (as warning)"
			}
			got = append(got, at)
		}
		if !slices.Equal(got, []string{field}) {
			t.Errorf("faults at %q; want one at %q", got, field)
		}
	}
}

func TestProfileDescription(t *testing.T) {
	t.Parallel()
	p := tenant.Profile{}
	if got := p.Description(""); got != "Managed by Tenantry" {
		t.Errorf("an app is described as %q", got)
	}
	p.AppDescription = "Acme's"
	if got := p.Description("user_42"); got != "Acme's (tenant user_42)" {
		t.Errorf("an app is described as %q", got)
	}
}

const goodProfiles = `# What tenants get.
x-scopes: &read [Apps_Get, Models:Get]
profiles:
  default: &default
    key_scopes: [All]
  pro:
    <<: *default
    base_workflow: Language-Understanding
    language: en
    app_description: "Made for: Acme"
    extra_keys:
      search:
        scopes: *read
      predict: {scopes: [Predict, Apps_Get]}
    allowed_scopes: [Predict, Search]
    show_tenant: hash
    retention: 1d12h
    max_key_age: 90d
    pool: {min: 2, max: 20}
  "free-2": {<<: [*default, {language: de}], key_scopes: *read, show_tenant: none, pool: {min: 3}, retention: 45m}
`

func TestParseProfiles(t *testing.T) {
	t.Parallel()
	got := tenant.ParseProfiles([]byte(strings.ReplaceAll(goodProfiles, "\n", "\r\n")))
	want := tenant.ProfilesFile{Line: 3, Profiles: []tenant.Profile{
		{Name: "default", BaseWorkflow: "Empty", KeyScopes: []string{"All"}, PoolMin: tenant.DefaultPoolMin, PoolMax: tenant.DefaultPoolMax},
		{Name: "pro", BaseWorkflow: "Language-Understanding", KeyScopes: []string{"All"}, Language: "en", AppDescription: "Made for: Acme",
			ExtraKeys: []tenant.KeyTemplate{{Name: "search", Scopes: []string{"Apps_Get", "Models:Get"}},
				{Name: "predict", Scopes: []string{"Predict", "Apps_Get"}}},
			AllowedScopes: []string{"Predict", "Search"}, ShowTenant: tenant.ShowTenantHash,
			Retention: 36 * time.Hour, MaxKeyAge: 90 * 24 * time.Hour, PoolMin: 2, PoolMax: 20},
		{Name: "free-2", BaseWorkflow: "Empty", KeyScopes: []string{"Apps_Get", "Models:Get"}, Language: "de",
			PoolMin: 3, PoolMax: tenant.DefaultPoolMax, Retention: 45 * time.Minute},
	}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("ParseProfiles (- want, + got):\n%s", diff)
	}
}

// Each bad file is reported whole, with the line of each fault.
func TestFaultyProfiles(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ text, want string }{
		"empty":        {"", "1: the file is empty: it must have a field profiles"},
		"comments":     {"# nothing\n\n", "1: the file is empty: it must have a field profiles"},
		"null":         {"\n~\n", `2: the file must be a mapping of fields, and is empty`},
		"list":         {"- a\n", "1: the file must be a mapping of fields, and is a list"},
		"other fields": {"profile:\n  default: {key_scopes: [All]}\n", "1: the file has no field profiles\n1: there is no field \"profile\" here: the one field is profiles"},
		"no profiles":  {"\nprofiles:\n", "2: profiles must have a field for each profile, by its name, and is empty"},
		"no default": {"profiles:\n  pro: {key_scopes: [All]}\n",
			`1: there is no profile named "default": sign-ups that name none take it`},
		"syntax":         {"profiles:\n  default:\n    key_scopes: [All\n    language: en\n", "3: not YAML, here or below: did not find expected ',' or ']'"},
		"mapping":        {"profiles:\n  default:\n    key_scopes: [All]\n   language: en\n", "2: not YAML, here or below: did not find expected key"},
		"colon":          {"profiles:\n  default: a: b\n", "2: not YAML: mapping values are not allowed in this context"},
		"latin-1":        {"profiles:\n  default:\n    app_description: caf\xe9\n", "3: not YAML: it is not UTF-8"},
		"control":        {"profiles:\n  default: \x01\n", "1: not YAML: control characters are not allowed"},
		"tabs":           {"profiles:\n\tdefault: {}\n", "2: not YAML: found character that cannot start any token"},
		"unknown anchor": {"profiles:\n  default: *none\n", "2: not YAML: unknown anchor 'none' referenced"},
		"any name": {"profiles:\n  default:\n    key_scopes: [All]\n    extra_keys: {\"a\\nb\": {scopes: []}}\n", `
4: profile "default": extra_keys."a\nb".scopes: is empty: name at least one scope, such as All
4: profile "default": extra_keys."a\nb": the name "a\nb" must have 1 to 63 characters of a-z, 0-9 and hyphens, and begin and end with a letter or digit`},
		"two documents": {"profiles: {default: {key_scopes: [All]}}\n---\nprofiles: {}\n", "2: a second document begins: a profiles file has one"},
		"unknown fields": {"profiles:\n  default:\n    key_scopes: [All]\n    lang: en\n    pool: {most: 1}\n    extra_keys:\n      a:\n        scopes: [All]\n        age: 1\n", `
4: profile "default" has no field "lang"; there are base_workflow, language, app_description, key_scopes, extra_keys, allowed_scopes, show_tenant, retention, max_key_age, pool
5: profile "default": pool has no field "most"; there are min and max
9: profile "default": extra_keys.a has no field "age"; there is scopes`},
		"twice": {"profiles:\n  default:\n    key_scopes: [All]\n    language: en\n    language: de\n  default:\n    key_scopes: [All]\nprofiles: {}\n", `
5: profile "default" has "language" twice: it is in line 4 too
6: profiles has "default" twice: it is in line 2 too
8: the file has "profiles" twice: it is in line 1 too`},
		"names": {"profiles:\n  default: {key_scopes: [All]}\n  Pro: {key_scopes: [All]}\n  a b: {key_scopes: [All]}\n  ? [a]\n  : {}\n", `
3: profile "Pro": the name "Pro" must have 1 to 63 characters of a-z, 0-9 and hyphens, and begin and end with a letter or digit
4: profile "a b": the name "a b" must have 1 to 63 characters of a-z, 0-9 and hyphens, and begin and end with a letter or digit
5: the name of a field of profiles must be text`},
		"types": {`profiles:
  default:
    base_workflow: [Empty]
    language: 12
    app_description: {a: b}
    key_scopes: All
    extra_keys: [a]
    allowed_scopes:
    show_tenant: true
    retention: [7d]
    max_key_age: soon
    pool: 7
  pro:
    key_scopes: [All, 3, [x]]
    extra_keys:
      a: [All]
      b:
        scopes:
          - Predict
          -
    pool: {min: many, max: 1.5}
    language: ""
  free:
`, `
3: profile "default": base_workflow: must be text, and is a list
4: profile "default": language: must be text, and is "12": put it in quotes
5: profile "default": app_description: must be text, and is a mapping
6: profile "default": key_scopes: must be a list of texts, and is "All"
7: profile "default": extra_keys must be a mapping of fields, and is a list
8: profile "default": allowed_scopes: must be a list of texts, and is empty
9: profile "default": show_tenant: must be text, and is "true": put it in quotes
10: profile "default": retention: must be a time such as 7d or 12h, and is a list
11: profile "default": max_key_age: must be a time such as 7d or 12h, and is "soon"
12: profile "default": pool must be a mapping of fields, and is "7"
14: warning: profile "pro": key_scopes[0]: "All" covers every other scope
14: profile "pro": key_scopes[1]: must be text, and is "3": put it in quotes
14: profile "pro": key_scopes[2]: must be text, and is a list
16: profile "pro": extra_keys.a must be a mapping of fields, and is a list
20: profile "pro": extra_keys.b.scopes[1]: is empty: leave it out, or give it a text
21: profile "pro": pool.max: must be a whole number, and is "1.5"
21: profile "pro": pool.min: must be a whole number, and is "many"
22: profile "pro": language: is empty: leave it out, or give it a text
23: profile "free" must be a mapping of fields, and is empty`},
		"times": {`profiles:
  default:
    key_scopes: [All]
    retention: 0
    max_key_age: 59m
  a: {key_scopes: [All], retention: -7d, max_key_age: 36501d}
  b: {key_scopes: [All], retention: 7, max_key_age: 0d}
  c: {key_scopes: [All], retention: -7h, max_key_age: 7d-1h}
`, `
4: profile "default": retention: must be more than 0: leave it out for what holds without it
5: profile "default": max_key_age: "59m" must be at least 1h0m0s
6: profile "a": max_key_age: "36501d" must be from 0 to 36500d
6: profile "a": retention: must be a time such as 7d or 12h, and is "-7d"
7: profile "b": max_key_age: must be more than 0: leave it out for what holds without it
7: profile "b": retention: must be a time such as 7d or 12h, and is "7"
8: profile "c": max_key_age: "7d-1h" must be from 0 to 36500d
8: profile "c": retention: "-7h" must be from 0 to 36500d`},
		"values": {`profiles:
  default:
    base_workflow: My-Flow
    language: English
    show_tenant: name
    key_scopes:
      - Inputs_Add
      - Models_Patch
      - Collectors_Get
      - Modles_Get
    extra_keys:
      default: {scopes: [All]}
      UP: {scopes: [Predict]}
      up: {scopes: [Predict]}
      up: {scopes: [Search]}
      none: {}
    allowed_scopes: []
    pool: {min: 3, max: 2}
  pro:
    language: en
    pool: {min: 1, max: 0}
  free: {key_scopes: [], pool: {min: -1}}
`, `
3: warning: profile "default": base_workflow: "My-Flow" is none of the workflows that Clarifai's documentation names (Empty, Universal, General, Language-Understanding): if clarifai/main has none of this id, no app can be made
4: profile "default": language: "English" is no language code such as en or zh-TW
5: profile "default": show_tenant: "name" must be none, id or hash
7: profile "default": key_scopes[0]: "Inputs_Add" needs Inputs_Get beside it
8: profile "default": key_scopes[1]: "Models_Patch" is dead: it opens nothing at Clarifai
9: warning: profile "default": key_scopes[2]: "Collectors_Get" is deprecated at Clarifai
10: profile "default": key_scopes[3]: "Modles_Get" is no scope of Clarifai's; they read like Models_Get, or All
12: profile "default": extra_keys.default: the key "default" is made in any case, with key_scopes: give an extra key another name
13: profile "default": extra_keys."UP": the name "UP" must have 1 to 63 characters of a-z, 0-9 and hyphens, and begin and end with a letter or digit
15: profile "default": extra_keys has "up" twice: it is in line 14 too
16: profile "default": extra_keys.none.scopes: is empty: name at least one scope, such as All
17: profile "default": allowed_scopes: is empty: leave it out to allow the scopes of key_scopes and extra_keys
18: profile "default": pool: min 3 is more than max 2
19: profile "pro": key_scopes: is empty: name at least one scope, such as All
21: profile "pro": pool: min 1 is more than max 0
22: profile "free": key_scopes: is empty: name at least one scope, such as All
22: profile "free": pool.min: -1 must be from 0 to 10000`},
		"anchors": {`profiles:
  default: &a
    key_scopes: [Predict]
    colour: red
  pro:
    <<: *a
  free: &f
    <<: [*a, *f, 7]
    key_scopes: [Nothing]
  last:
    <<: {<<: *f}
`, `
4: profile "default" has no field "colour"; there are base_workflow, language, app_description, key_scopes, extra_keys, allowed_scopes, show_tenant, retention, max_key_age, pool
4: profile "free" has no field "colour"; there are base_workflow, language, app_description, key_scopes, extra_keys, allowed_scopes, show_tenant, retention, max_key_age, pool
4: profile "last" has no field "colour"; there are base_workflow, language, app_description, key_scopes, extra_keys, allowed_scopes, show_tenant, retention, max_key_age, pool
4: profile "pro" has no field "colour"; there are base_workflow, language, app_description, key_scopes, extra_keys, allowed_scopes, show_tenant, retention, max_key_age, pool
8: what profile "free" merges must be a mapping of fields, and is "7"
8: what profile "last" merges must be a mapping of fields, and is "7"
9: profile "free": key_scopes[0]: "Nothing" is no scope of Clarifai's; they read like Models_Get, or All
9: profile "last": key_scopes[0]: "Nothing" is no scope of Clarifai's; they read like Models_Get, or All`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := tenant.ParseProfiles([]byte(c.text))
			var got []string
			for _, l := range f.Faults {
				got = append(got, strings.TrimPrefix(l.In("FILE"), "FILE:"))
			}
			if diff := cmp.Diff(strings.Split(strings.TrimSpace(c.want), "\n"), got); diff != "" {
				t.Errorf("faults (- want, + got):\n%s", diff)
			}
			if !f.Faulty() {
				t.Error("the file can be used")
			}
		})
	}
}

func FuzzParseProfiles(f *testing.F) {
	f.Add([]byte(goodProfiles))
	for _, text := range []string{"", "a: &a [*a]", "profiles: &p {<<: *p, default: *p}", "profiles:\n  default: {key_scopes: [All]}\n---\n", "? ? a\n: b", "\ufeffprofiles: !!map {}",
		"profiles: {default: {key_scopes: &s [*s], pool: {min: 0x1F, max: 1_000}, retention: 99999d99999h}}", "profiles: {a: {<<: [&b {<<: *b}, *b]}}"} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		file := tenant.ParseProfiles(text)
		last := 1 + strings.Count(string(text), "\n")
		for _, l := range file.Faults {
			if l.Line < 1 || l.Line > last || l.Detail == "" || strings.ContainsAny(l.Detail, "\n\r") {
				t.Errorf("the fault %+v of a file of %d lines", l, last)
			}
		}
		if file.Faulty() {
			return
		}
		names := map[string]bool{}
		for _, p := range file.Profiles {
			names[p.Name] = true
			for _, fault := range p.Check() {
				if !fault.Warning {
					t.Errorf("a profile with the fault %v passes", fault)
				}
			}
		}
		if !names[tenant.DefaultProfile] || len(names) != len(file.Profiles) {
			t.Errorf("the profiles are %v of %d", names, len(file.Profiles))
		}
	})
}

func TestPoolBounds(t *testing.T) {
	t.Parallel()
	for text, want := range map[string][2]int{
		"":                         {2, 20},
		"pool: {}":                 {2, 20},
		"pool: {min: 3}":           {3, 20},
		"pool: {min: 30}":          {30, 30},
		"pool: {min: 0}":           {0, 20},
		"pool: {max: 5}":           {2, 5},
		"pool: {max: 1}":           {1, 1},
		"pool: {max: 0}":           {0, 0},
		"pool: {min: 0, max: 0}":   {0, 0},
		"pool: {min: 20, max: 20}": {20, 20},
	} {
		file := tenant.ParseProfiles([]byte("profiles:\n  default:\n    key_scopes: [All]\n    " + text + "\n"))
		if file.Faulty() || len(file.Profiles) != 1 {
			t.Fatalf("%q has the faults %v", text, file.Faults)
		}
		if fewest, most := file.Profiles[0].PoolBounds(); fewest != want[0] || most != want[1] {
			t.Errorf("%q is a pool of %d to %d; want %v", text, fewest, most, want)
		}
	}
}
