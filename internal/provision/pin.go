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
	Whoami(ctx context.Context) (tenant.UserID, error)
}

// Pin makes sure that the database, the keyset and the PAT belong together, and
// returns what they belong to. The first start on a database writes it down and
// needs Clarifai for that; a later one starts without Clarifai too, and the
// first upstream call is preceded by the check of the PAT: verified says whether
// the PAT was checked. Its one call stays within the rate, in calls a second.
func Pin(ctx context.Context, store Store, upstream Whoami, rate float64, keys *keyring.Keyring, log *zap.Logger) (d tenant.Deployment, verified bool, err error) {
	d, err = store.Deployment(ctx)
	switch {
	case errors.Is(err, tenant.NotFound):
		operator, err := whoami(ctx, store, upstream, rate)
		if err != nil {
			return d, false, fmt.Errorf("the first start on a database must learn from Clarifai whose PAT this is: %w", err)
		}
		probe, err := keys.Probe()
		if err != nil {
			return d, false, fmt.Errorf("seal the keyset probe: %w", err)
		}
		d, err = store.PinDeployment(ctx, tenant.Deployment{ID: keys.DeploymentID(operator), Operator: operator, KeysetProbe: probe})
		if err != nil {
			return d, false, err
		}
		// Another replica may have been first, with another PAT.
		return d, true, errors.Join(checkKeyset(d, keys), checkOperator(d, operator))
	case err != nil:
		return d, false, err
	}
	if err := checkKeyset(d, keys); err != nil {
		return d, false, err
	}
	operator, err := whoami(ctx, store, upstream, rate)
	if err != nil {
		log.Error("the PAT could not be checked; look-ups are served, and it is checked again before Clarifai is used", zap.Error(err))
		return d, false, nil
	}
	return d, true, checkOperator(d, operator)
}

// pinPatience is how long a start waits for its turn to call Clarifai.
const pinPatience = 5 * time.Second

func whoami(ctx context.Context, store Store, upstream Whoami, rate float64) (tenant.UserID, error) {
	if err := takeSlot(ctx, store, rate, pinPatience); err != nil {
		return "", err
	}
	return upstream.Whoami(ctx)
}

func checkKeyset(d tenant.Deployment, keys *keyring.Keyring) error {
	if err := keys.Check(d.KeysetProbe); err != nil {
		return err
	}
	if keys.DeploymentID(d.Operator) != d.ID {
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
