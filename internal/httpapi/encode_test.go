package httpapi_test

import (
	"testing"
	"time"

	"github.com/tenantry/tenantry/internal/httpapi"
	"github.com/tenantry/tenantry/internal/tenant"
)

// What is appended is what encoding/json writes.
func FuzzEncode(f *testing.F) {
	f.Add("user_42", "active", "Ada", "plan", "pro", "tier", "1", "tny-1", "acme", int64(1_700_000_000_123_456_000), "", false)
	f.Add("user_42", "provisioning", "", "", "", "", "", "", "", int64(0), "Y3Vyc29y", true)
	f.Add("ü", "active", "Zoë \u2028 <&>", "a", "\"", "b", "\\", "x", "\x7f", int64(-62_135_596_800_000_000_0), "<", true)
	f.Add("a\nb", "deleting", "\xff", "z", "1", "a", "2", "x", "", int64(1), "", false)
	f.Fuzz(func(t *testing.T, id, state, display, name, value, otherName, other, app, owner string, at int64, next string, protected bool) {
		one := tenant.Tenant{ID: tenant.ID(id), State: tenant.State(state), Generation: 3, AppID: tenant.AppID(app), AppUserID: tenant.UserID(owner),
			CreatedAt: time.Unix(0, at), UpdatedAt: time.Unix(at/1000, at%1000)}
		one.Profile, one.DisplayName, one.DeletionProtection = "default", display, protected
		one.Labels = map[string]string{name: value}
		two := one
		two.Labels = map[string]string{name: value, otherName: other, "k": "v"}
		two.Problem = nil
		for _, tenants := range [][]tenant.Tenant{nil, {one}, {two, one}, {{ID: "bare"}, two}} {
			got, want, _ := httpapi.Encoded(tenants, next)
			for i := range got {
				if got[i] != want[i] {
					t.Errorf("written\n%s encoding/json has\n%s", got[i], want[i])
				}
			}
		}
	})
}

// The usual bodies are appended, and those with a part that is rare are not.
func TestEncode(t *testing.T) {
	t.Parallel()
	if httpapi.TenantFields != 14 {
		t.Errorf("the body of a tenant has %d fields: see that appendJSON writes all of them, or refuses the body", httpapi.TenantFields)
	}
	usual := tenant.Tenant{ID: "user_42", State: tenant.Active, Generation: 1, AppID: "tny-1", AppUserID: "acme", CreatedAt: time.Now(), UpdatedAt: time.Now()}
	usual.Labels = map[string]string{"plan": "pro"}
	trouble, leaving, foreign := usual, usual, usual
	trouble.Problem = &tenant.Problem{Code: "quota_reached"}
	leaving.State = tenant.Deleting
	foreign.DisplayName = "Zoë"
	for name, c := range map[string]struct {
		tenant tenant.Tenant
		quick  bool
	}{"usual": {usual, true}, "with a problem": {trouble, false}, "deleting": {leaving, false}, "beyond ASCII": {foreign, false}} {
		got, want, quick := httpapi.Encoded([]tenant.Tenant{c.tenant}, "")
		for i := range got {
			if got[i] != want[i] || quick[i] != c.quick {
				t.Errorf("%s: appended: %t; written\n%s encoding/json has\n%s", name, quick[i], got[i], want[i])
			}
		}
	}
}
