package provision_test

import (
	"strings"
	"testing"

	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// Database, keyset and PAT must belong together; each that does not is named at
// the start.
func TestPin(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	refused := func(what, says string, o provisiontest.Options) {
		t.Helper()
		_, err := w.TryStart(o)
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("a start with %s fails with %v; want an error that says %q", what, err, says)
		}
	}
	const foreignPAT = "fedcba9876543210fedcba9876543210"
	w.AddPAT(foreignPAT, "umbrella")
	wrong, foreign := provisiontest.Options{PAT: strings.Repeat("9", 32)}, provisiontest.Options{PAT: foreignPAT}

	refused("a wrong PAT on a new database", "must learn from Clarifai whose PAT this is", wrong)
	w.Faults(map[string]any{"call": "*", "drop_before": true})
	refused("Clarifai away on a new database", "must learn from Clarifai whose PAT this is", provisiontest.Options{})
	w.Faults()
	first := w.Start(provisiontest.Options{})
	if first.PAT.Health().State != provision.PATWorks {
		t.Errorf("the PAT is %s after a good start", first.PAT.Health().State)
	}

	refused("another operator's PAT", `belongs to the Clarifai user "umbrella", and this database to "acme"`, foreign)
	keys := w.Keys
	w.Keys = provisiontest.Keyring(t)
	refused("another keyset", "keyset is not the one this database was sealed with", provisiontest.Options{})
	w.Keys = keys

	// Once the operator is known, look-ups do not need Clarifai.
	w.Faults(map[string]any{"call": "*", "drop_before": true})
	later := w.Start(provisiontest.Options{})
	if later.PAT.Health().State != provision.PATUnknown {
		t.Errorf("the PAT is %s though it could not be checked", later.PAT.Health().State)
	}
	first.Stop()
	w.Faults()
	signUp(t, later, "user_1")
	if later.PAT.Health().State != provision.PATWorks {
		t.Errorf("the PAT is %s after it was used", later.PAT.Health().State)
	}
}

// A PAT that could not be checked at the start and turns out to be another
// operator's is never used to make anything.
func TestForeignPATIsNeverUsed(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	w.Start(provisiontest.Options{Idle: true}).Stop()
	const foreignPAT = "fedcba9876543210fedcba9876543210"
	w.AddPAT(foreignPAT, "umbrella")
	w.Faults(map[string]any{"call": "*", "drop_before": true})
	r := w.Start(provisiontest.Options{PAT: foreignPAT})
	w.Faults()
	if _, _, err := r.SignUp(t.Context(), "user_1", tenant.SignUp{}, 0, caller); err != nil {
		t.Fatal(err)
	}
	provisiontest.Eventually(t, "the problem shows", func() bool {
		got, err := r.DB.Tenant(t.Context(), "user_1")
		return err == nil && got.Problem != nil && strings.Contains(got.Problem.Detail, "umbrella")
	})
	if s := w.State(); s.Apps != 0 || s.Calls["PostApps"] != 0 {
		t.Errorf("the foreign PAT was used: %+v", s)
	}
	if r.PAT.Health().State != provision.PATForeign {
		t.Errorf("the PAT is %s; want %s", r.PAT.Health().State, provision.PATForeign)
	}
}

// A start whose check of the PAT was the one call that a pause lets through ends
// the pause with it.
func TestStartEndsThePause(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	w.Start(provisiontest.Options{Idle: true}).Stop()
	exec(t, w, `UPDATE upstream_budget SET pauses = 1, epoch = epoch + 1`)
	r := w.Start(provisiontest.Options{Idle: true})
	if got, _, err := r.UpstreamStatus(t.Context()); err != nil || got.Pauses != 0 {
		t.Errorf("after a start that reached Clarifai the status is %+v, %v; want no pause", got, err)
	}
}
