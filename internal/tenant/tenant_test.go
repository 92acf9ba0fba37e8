package tenant_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/uuid"

	"github.com/tenantry/tenantry/internal/tenant"
)

func TestParseID(t *testing.T) {
	t.Parallel()
	for _, id := range []string{"u", "user_42", "Ünïcode-用户", "a@b.example", "...", "a%2Fb", strings.Repeat("é", 128)} {
		if got, err := tenant.ParseID(id); err != nil || string(got) != id {
			t.Errorf("ParseID(%q) = %q, %v; want it as it is", id, got, err)
		}
	}
	for id, says := range map[string]string{
		"":                       "is empty",
		strings.Repeat("x", 129): "has 129 characters",
		".":                      `must not be "."`,
		"..":                     `must not be ".."`,
		"a/b":                    "slash at byte 1",
		"a b":                    "white space at byte 1",
		"a\u00a0b":               "white space at byte 1",
		"a\tb":                   "white space at byte 1",
		"a\x00b":                 "control character at byte 1",
		"a\u0085":                "white space at byte 1",
		"a\x7f":                  "control character at byte 1",
		"a\xff":                  "not valid UTF-8",
	} {
		_, err := tenant.ParseID(id)
		if !errors.Is(err, tenant.Invalid) || !strings.Contains(err.Error(), says) {
			t.Errorf("ParseID(%q) = %v; want an Invalid error that says %q", id, err, says)
		}
	}
}

func FuzzParseID(f *testing.F) {
	for _, s := range []string{"", ".", "user_42", "a/b", "a\x00", "\xff", "é", strings.Repeat("x", 200)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := tenant.ParseID(s)
		if err != nil {
			if !errors.Is(err, tenant.Invalid) || strings.ContainsRune(err.Error(), 0) {
				t.Errorf("ParseID(%q) fails with %q; want a clean Invalid error", s, err)
			}
			return
		}
		if string(id) != s || !utf8.ValidString(s) || strings.ContainsAny(s, "/ \x00\n\r\t") || utf8.RuneCountInString(s) > tenant.MaxIDLength {
			t.Errorf("ParseID(%q) takes it", s)
		}
	})
}

func TestSignUpValidate(t *testing.T) {
	t.Parallel()
	text := func(s string) *string { return &s }
	many := map[string]string{}
	for i := range tenant.MaxLabels + 1 {
		many[fmt.Sprint("k", i)] = ""
	}
	for name, c := range map[string]struct {
		up   tenant.SignUp
		says string // empty: valid
	}{
		"nothing":         {tenant.SignUp{}, ""},
		"all":             {tenant.SignUp{DisplayName: text("Ada Lovelace"), Labels: map[string]string{"plan": "pro", "a.b/c-d": "ü"}}, ""},
		"long name":       {tenant.SignUp{DisplayName: text(strings.Repeat("é", 257))}, "display_name: has 257 characters"},
		"zero byte":       {tenant.SignUp{DisplayName: text("a\x00")}, "display_name: has a control character at byte 1"},
		"too many labels": {tenant.SignUp{Labels: many}, "labels: has 17 labels"},
		"empty key":       {tenant.SignUp{Labels: map[string]string{"": "x"}}, `labels: key ""`},
		"bad key":         {tenant.SignUp{Labels: map[string]string{"a b": "x"}}, `labels: key "a b"`},
		"long key":        {tenant.SignUp{Labels: map[string]string{strings.Repeat("k", 64): "x"}}, "labels: key"},
		"bad value":       {tenant.SignUp{Labels: map[string]string{"plan": "a\nb"}}, "labels.plan: has a control character"},
		"long value":      {tenant.SignUp{Labels: map[string]string{"plan": strings.Repeat("v", 257)}}, "labels.plan: has 257 characters"},
	} {
		err := c.up.Validate()
		if c.says == "" && err != nil || c.says != "" && (!errors.Is(err, tenant.Invalid) || !strings.Contains(err.Error(), c.says)) {
			t.Errorf("%s: Validate() = %v; want %q", name, err, c.says)
		}
	}
}

// A sign-up that is sent again agrees with what there is if it equals the first
// sign-up or the attributes of now, field by field; what is left out is not
// compared.
func TestSignUpDiffers(t *testing.T) {
	t.Parallel()
	text := func(s string) *string { return &s }
	first := tenant.Attributes{DisplayName: "Ada", Labels: map[string]string{"plan": "pro"}}
	now := tenant.Tenant{Profile: "default", DisplayName: "Ada L.", Labels: map[string]string{"plan": "free", "vip": "yes"}}
	for _, c := range []struct {
		up   tenant.SignUp
		want string
	}{
		{tenant.SignUp{}, ""},
		{tenant.SignUp{Profile: text("default"), DisplayName: text("Ada"), Labels: map[string]string{"plan": "pro"}}, ""},
		{tenant.SignUp{DisplayName: text("Ada L."), Labels: map[string]string{"vip": "yes", "plan": "free"}}, ""},
		{tenant.SignUp{DisplayName: text("Ada"), Labels: map[string]string{"vip": "yes", "plan": "free"}}, ""},
		{tenant.SignUp{DisplayName: text("Bob")}, "display_name"},
		{tenant.SignUp{DisplayName: text("")}, "display_name"},
		{tenant.SignUp{Labels: map[string]string{}}, "labels"},
		{tenant.SignUp{Labels: map[string]string{"plan": "free"}}, "labels"},
		{tenant.SignUp{Profile: text("other"), DisplayName: text("Bob"), Labels: map[string]string{"a": "b"}}, "profile display_name labels"},
	} {
		if got := strings.Join(c.up.Differs(now, first.Hash()), " "); got != c.want {
			t.Errorf("%+v differs in %q; want %q", c.up, got, c.want)
		}
	}
}

// The hash must not take one set of labels for another.
func TestAttributesHash(t *testing.T) {
	t.Parallel()
	seen := map[string]int{}
	for i, a := range []tenant.Attributes{
		{}, {DisplayName: "a"}, {Labels: map[string]string{"a": ""}}, {Labels: map[string]string{"a": "b"}},
		{Labels: map[string]string{"ab": ""}}, {Labels: map[string]string{"a": "b", "c": "d"}}, {Labels: map[string]string{"a": "bcd"}},
	} {
		h := string(a.Hash())
		if j, ok := seen[h]; ok {
			t.Errorf("attributes %d and %d hash alike", i, j)
		}
		seen[h] = i
	}
}

func TestSecretIsNeverPrinted(t *testing.T) {
	t.Parallel()
	const text = "5ecret-5ecret"
	holder := struct {
		Name   string
		secret tenant.Secret
		Open   tenant.Secret
		ptr    *tenant.Secret
	}{"x", tenant.NewSecret(text), tenant.NewSecret(text), new(tenant.NewSecret(text))}
	encoded, err := json.Marshal(holder)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []string{
		fmt.Sprint(holder), fmt.Sprintf("%v %+v %#v %s", holder, holder, holder, holder.Open), fmt.Sprintf("%q", holder.Open),
		fmt.Sprintf("%#v %x %v", holder.Open, holder.Open, *holder.ptr), string(encoded),
		fmt.Sprint(map[string]any{"k": holder.secret}), fmt.Errorf("wrap %v", holder.secret).Error(),
	} {
		if strings.Contains(s, text) || strings.Contains(s, fmt.Sprintf("%x", text)) {
			t.Errorf("the secret is in %q", s)
		}
	}
	if got := holder.Open.Reveal(); got != text {
		t.Errorf("Reveal() = %q; want %q", got, text)
	}
	if (tenant.Secret{}).IsSet() || !holder.Open.IsSet() {
		t.Error("IsSet is wrong")
	}
}

func TestToken(t *testing.T) {
	t.Parallel()
	token, text := tenant.NewToken()
	s := text.Reveal()
	if !strings.HasPrefix(s, "tnty_") || strings.Contains(s, string(token.Hash)) {
		t.Errorf("a token's text is %q", s)
	}
	got, ok := tenant.ParseToken(s)
	if !ok || got.ID != token.ID || string(got.Hash) != string(token.Hash) {
		t.Errorf("ParseToken of a token = %v, %v; want %v", got, ok, token)
	}
	other, _ := tenant.NewToken()
	if other.ID == token.ID || string(other.Hash) == string(token.Hash) {
		t.Error("two tokens are alike")
	}
	for _, bad := range []string{"", "tnty_", s[:len(s)-1], s + "x", strings.ToUpper(s), "x" + s, strings.Replace(s, "_", "-", 2), s[:30] + "ü" + s[32:]} {
		if _, ok := tenant.ParseToken(bad); ok {
			t.Errorf("ParseToken(%q) takes it", bad)
		}
	}
}

func TestKeyMarker(t *testing.T) {
	t.Parallel()
	m := tenant.KeyMarker{Deployment: "0123456789abcdef", KeyID: uuid.Must(uuid.NewV7())}
	if got, ok := tenant.ParseKeyMarker(m.String()); !ok || got != m {
		t.Errorf("ParseKeyMarker(%q) = %v, %v", m, got, ok)
	}
	for _, other := range []string{"", "All permissions", "tenantry:x", "tenantry:x:y", "other:x:" + m.KeyID.String(), m.String() + ":z"} {
		if _, ok := tenant.ParseKeyMarker(other); ok {
			t.Errorf("ParseKeyMarker(%q) takes it", other)
		}
	}
}

func TestProfileRevision(t *testing.T) {
	t.Parallel()
	p := tenant.Profile{Name: "default", BaseWorkflow: "Empty", KeyScopes: []string{"All"}}
	renamed, scoped, flow := p, p, p
	renamed.Name = "other"
	scoped.KeyScopes = []string{"Predict"}
	flow.BaseWorkflow = "General"
	if p.Revision() != renamed.Revision() {
		t.Error("the name is part of the revision")
	}
	if p.Revision() == scoped.Revision() || p.Revision() == flow.Revision() {
		t.Error("a profile that builds otherwise has the same revision")
	}
}
