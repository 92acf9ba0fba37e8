package provision

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/keyring"
	"github.com/tenantry/tenantry/internal/tenant"
)

// Whoami is the part of Upstream that names the operator.
type Whoami interface {
	Whoami(ctx context.Context, pat tenant.Secret) (tenant.UserID, error)
}

// Pin makes sure that the database, the keyset and the PAT belong together, and
// returns what they belong to. The first start on a database writes it down and
// needs Clarifai for that; a later one starts without Clarifai too, and the
// first upstream call is preceded by the check of the PAT. Its one call stays
// within the rate, in calls a second.
func Pin(ctx context.Context, store Store, upstream Whoami, pat *PAT, rate float64, keys *keyring.Keyring, log *zap.Logger) (d tenant.Deployment, err error) {
	d, err = store.Deployment(ctx)
	switch {
	case errors.Is(err, tenant.NotFound):
		operator, err := whoami(ctx, store, upstream, pat, rate)
		if err != nil {
			return d, fmt.Errorf("the first start on a database must learn from Clarifai whose PAT this is: %w", err)
		}
		probe, err := keys.Probe()
		if err != nil {
			return d, fmt.Errorf("seal the keyset probe: %w", err)
		}
		d, err = store.PinDeployment(ctx, tenant.Deployment{ID: keys.DeploymentID(operator), Operator: operator, KeysetProbe: probe})
		if err != nil {
			return d, err
		}
		// Another replica may have been first, with another PAT.
		return d, errors.Join(checkKeyset(d, keys), verified(d, operator, pat))
	case err != nil:
		return d, err
	}
	if err := checkKeyset(d, keys); err != nil {
		return d, err
	}
	operator, err := whoami(ctx, store, upstream, pat, rate)
	if err != nil {
		log.Error("the PAT could not be checked; look-ups are served, and it is checked again before Clarifai is used", zap.Error(err))
		return d, nil
	}
	return d, verified(d, operator, pat)
}

// verified notes that the PAT is the operator's, or reports that it is not.
func verified(d tenant.Deployment, operator tenant.UserID, pat *PAT) error {
	err := checkOperator(d, operator)
	if err == nil {
		_, fingerprint, _ := pat.current()
		pat.found(fingerprint, PATWorks)
	}
	return err
}

// pinPatience is how long a start waits for its turn to call Clarifai.
const pinPatience = 5 * time.Second

func whoami(ctx context.Context, store Store, upstream Whoami, pat *PAT, rate float64) (tenant.UserID, error) {
	secret, fingerprint, _ := pat.current()
	for end := time.Now().Add(pinPatience); ; {
		slot, due, err := reserve(ctx, store, tenant.SlotRequest{PerSecond: rate, Patience: time.Until(end),
			PAT: fingerprint, ChecksPAT: true, Control: true, ProbeTimeout: pinPatience})
		switch {
		case err != nil:
			return "", err
		case !due.IsZero():
			operator, err := upstream.Whoami(ctx, secret)
			// A probe that is kept to oneself leaves the fleet waiting for the next.
			up := asUpstream(err)
			if slot.Probe && (err == nil || up != nil && up.Class != tenant.UpstreamDown && up.Class != tenant.UpstreamThrottled) {
				_, failed := store.UpstreamWorks(ctx, slot.Epoch)
				err = errors.Join(err, failed)
			}
			return operator, err
		case !slot.Granted || time.Now().After(end):
			return "", &deferred{wait: slot.Wait}
		}
	}
}

func checkKeyset(d tenant.Deployment, keys *keyring.Keyring) error {
	same := keys.DeploymentID(d.Operator) == d.ID
	if err := keys.Check(d.KeysetProbe); err != nil {
		if id, ok := tenant.SealKeyOf(d.KeysetProbe); ok && same && !keys.Opens(id) {
			return fmt.Errorf("the keyset is an old copy of the one this database is sealed with: it lacks the key %d", id)
		}
		return err
	}
	if !same {
		return errors.New("the fingerprint keyset is not the one this database was set up with")
	}
	return nil
}

func checkOperator(d tenant.Deployment, operator tenant.UserID) error {
	if operator != d.Operator {
		return fmt.Errorf("the PAT belongs to the Clarifai user %q, and this database to %q: use a PAT of %q, or another database",
			operator, d.Operator, d.Operator)
	}
	return nil
}
