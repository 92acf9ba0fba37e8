package tenant_test

import (
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tenantry/tenantry/internal/tenant"
)

func TestScope(t *testing.T) {
	t.Parallel()
	type labels = map[string]string
	text := func(s string) *string { return &s }
	a := tenant.Scope{"product": "a", "empty": ""}
	for _, c := range []struct {
		scope  tenant.Scope
		labels labels
		want   bool
	}{
		{nil, nil, true}, {nil, labels{"x": "y"}, true}, {a, nil, false}, {a, labels{"product": "a"}, false}, // a label that is missing is not empty
		{a, labels{"product": "a", "empty": ""}, true}, {a, labels{"product": "a", "empty": "", "x": "y"}, true}, {a, labels{"product": "b", "empty": ""}, false},
	} {
		if got := c.scope.Covers(c.labels); got != c.want {
			t.Errorf("%v covers %v: %v; want %v", c.scope, c.labels, got, c.want)
		}
	}
	if got := a.Complete(labels{"x": "y"}); !cmp.Equal(got, labels{"product": "a", "empty": "", "x": "y"}) {
		t.Errorf("Complete = %v", got)
	}
	forbidden := func(err error, field string) bool {
		e, ok := errors.AsType[*tenant.Error](err)
		return ok && errors.Is(err, tenant.Forbidden) && e.Field == field
	}
	if err := a.CheckLabels(labels{"product": "b"}); !forbidden(err, "labels.product") {
		t.Errorf("labels that contradict: %v", err)
	}
	if err := a.CheckLabels(labels{"product": "a", "x": "y"}); err != nil {
		t.Errorf("labels that do not contradict: %v", err)
	}
	one := tenant.Scope{"product": "a"}
	for _, c := range []struct {
		patch   map[string]*string
		allowed bool
	}{
		{nil, false}, {map[string]*string{}, true}, {map[string]*string{"x": nil}, true}, {map[string]*string{"product": text("a")}, true},
		{map[string]*string{"product": nil}, false}, {map[string]*string{"product": text("b")}, false},
	} {
		if err := one.CheckPatch(c.patch); c.allowed && err != nil || !c.allowed && !forbidden(err, "labels.product") {
			t.Errorf("the patch %v: %v; allowed: %v", c.patch, err, c.allowed)
		}
		if err := (tenant.Scope{}).CheckPatch(c.patch); err != nil {
			t.Errorf("the patch %v of one who is not limited: %v", c.patch, err)
		}
	}
}

// A sign-up within a scope is compared as any other: what is left out is not.
func TestSignUpWithin(t *testing.T) {
	t.Parallel()
	type labels = map[string]string
	scope := tenant.Scope{"product": "a"}
	first := tenant.SignUp{Labels: labels{"plan": "pro"}, Within: scope}
	if got := first.Attributes().Labels; !cmp.Equal(got, labels{"plan": "pro", "product": "a"}) {
		t.Fatalf("the tenant gets the labels %v", got)
	}
	hash := first.Attributes().Hash()
	there := tenant.Tenant{Labels: labels{"plan": "free", "product": "a"}}
	for name, c := range map[string]struct {
		up      tenant.SignUp
		differs bool
	}{
		"the same":             {first, false},
		"no labels":            {tenant.SignUp{Within: scope}, false},
		"scope spelled out":    {tenant.SignUp{Labels: labels{"plan": "pro", "product": "a"}, Within: scope}, false},
		"as it is now":         {tenant.SignUp{Labels: labels{"plan": "free"}, Within: scope}, false},
		"others":               {tenant.SignUp{Labels: labels{"plan": "max"}, Within: scope}, true},
		"only those of scope":  {tenant.SignUp{Labels: labels{}, Within: scope}, true},
		"one who is unlimited": {tenant.SignUp{Labels: labels{"plan": "pro"}}, true},
	} {
		if got := c.up.Differs(there, hash); (len(got) > 0) != c.differs {
			t.Errorf("%s: differs in %v; want a difference: %v", name, got, c.differs)
		}
	}
	full := tenant.SignUp{Labels: labels{}, Within: scope}
	for i := range tenant.MaxLabels {
		full.Labels[string(rune('a'+i))] = ""
	}
	if err := full.Validate(); !errors.Is(err, tenant.Invalid) {
		t.Errorf("more labels than a tenant may have: %v", err)
	}
}

func TestNewCaller(t *testing.T) {
	t.Parallel()
	now := time.Now()
	good := tenant.NewCaller{Name: "n", Role: tenant.Viewer}
	for field, change := range map[string]func(*tenant.NewCaller){
		"":           func(c *tenant.NewCaller) { c.ExpiresAt, c.RateLimit = now.Add(time.Second), tenant.MaxRateLimit },
		"name":       func(c *tenant.NewCaller) { c.Name = "a\x1b[31m" },
		"role":       func(c *tenant.NewCaller) { c.Role = "root" },
		"expires_at": func(c *tenant.NewCaller) { c.ExpiresAt = now },
		"rate_limit": func(c *tenant.NewCaller) { c.RateLimit = tenant.MaxRateLimit + 1 },
		"labels":     func(c *tenant.NewCaller) { c.Scope = tenant.Scope{" ": "x"} },
	} {
		c := good
		change(&c)
		err := c.Validate(now)
		if e, ok := errors.AsType[*tenant.Error](err); (field == "") != (err == nil) || ok && e.Field != field {
			t.Errorf("%s: Validate = %v", field, err)
		}
	}
	if err := (tenant.NewCaller{Name: "n", Role: tenant.Viewer, ExpiresAt: time.Date(9999, 12, 31, 23, 0, 0, 0, time.FixedZone("", -7200))}).Validate(now); err == nil {
		t.Error("a time that JSON cannot show is taken")
	}
	for overlap, ok := range map[time.Duration]bool{0: true, tenant.MaxTokenOverlap: true, -1: false, tenant.MaxTokenOverlap + 1: false} {
		if err := (tenant.TokenRotation{Overlap: overlap}).Validate(now); (err == nil) != ok {
			t.Errorf("an overlap of %s: %v", overlap, err)
		}
	}
}
