package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"text/tabwriter"

	"github.com/tenantry/tenantry/internal/keyring"
	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/tenant"
)

type keysetCmd struct {
	Create keysetCreateCmd `cmd:"" help:"Make a keyset file, mode 0600. Back it up apart from the database: without it no sealed key can be opened."`
	Rotate keysetRotateCmd `cmd:"" help:"Make a new key the primary, which seals; the others go on opening. In two steps, where replicas do not see a new file at once: first with --prepare, which only adds the key; once every replica has it (tenantry_keyset_key in their metrics, or the log), without."`
	Status keysetStatusCmd `cmd:"" help:"Show the keys of the keyset, and how much of what the database knows each of them sealed."`
	Remove keysetRemoveCmd `cmd:"" help:"Take a key out of the keyset. Refused while the database needs it. A backup of the database that needs it cannot be used without it: keep the old keyset as long as the backups."`
	Wrap   keysetWrapCmd   `cmd:"" help:"Have a KMS wrap a keyset file that is in the clear. Start the replicas anew with TENANTRY_KEYSET_KMS afterwards."`
}

// keysetFlags say where the keyset is.
type keysetFlags struct {
	KeysetFile string `required:"" env:"TENANTRY_KEYSET_FILE" placeholder:"FILE" help:"File with the keyset."`
	kmsFlags
}

// source opens the KMS, if one wraps the keyset: see closeKeeper.
func (f keysetFlags) source(ctx context.Context, e env) (keyring.Source, error) {
	keeper, err := f.keeper(ctx, e)
	return keyring.Source{Path: f.KeysetFile, Keeper: keeper}, err
}

type keysetCreateCmd struct {
	KeysetFile string `required:"" env:"TENANTRY_KEYSET_FILE" placeholder:"FILE" help:"The file to make; it must not exist."`
	kmsFlags
}

func (c keysetCreateCmd) Run(ctx context.Context, e env) error {
	source, err := keysetFlags(c).source(ctx, e)
	if err != nil {
		return err
	}
	defer closeKeeper(source.Keeper)
	if err := source.Create(ctx); err != nil {
		return err
	}
	_, err = fmt.Fprintf(e.stderr, "made %s: back it up, apart from the database\n", c.KeysetFile)
	return err
}

type keysetRotateCmd struct {
	keysetFlags
	Prepare bool `help:"Only add the key; the next rotate makes it the primary."`
}

func (c keysetRotateCmd) Run(ctx context.Context, e env) error {
	source, err := c.source(ctx, e)
	if err != nil {
		return err
	}
	defer closeKeeper(source.Keeper)
	key, err := source.Rotate(ctx, c.Prepare)
	if err != nil {
		return err
	}
	if c.Prepare {
		_, err = fmt.Fprintf(e.stderr, "the key %d is in %s and seals nothing yet: back the file up, let every replica have it, then run rotate again without --prepare\n", key.ID, c.KeysetFile)
		return err
	}
	_, err = fmt.Fprintf(e.stderr, "the key %d is the primary of %s: back the file up, and let every replica have it; they seal anew what the older keys sealed\n", key.ID, c.KeysetFile)
	return err
}

type keysetStatusCmd struct {
	databaseFlags
	keysetFlags
}

func (c keysetStatusCmd) Run(ctx context.Context, e env) error {
	source, keys, err := c.load(ctx, e)
	if err != nil {
		return err
	}
	defer closeKeeper(source.Keeper)
	db, err := c.open(ctx, e)
	if err != nil {
		return err
	}
	defer db.Close()
	counts, err := db.CountSealed(ctx)
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(e.stdout, 0, 8, 2, ' ', 0)
	_, _ = fmt.Fprintln(w, "KEY\tSTATE\tKEYS\tMARKERS\tRETAINED\tPROBE")
	row := func(id tenant.SealKeyID, state string) {
		n := counts.By[id]
		probe := "-"
		if n.Probe {
			probe = "yes"
		}
		_, _ = fmt.Fprintf(w, "%d\t%s\t%d\t%d\t%d\t%s\n", id, state, n.Keys, n.Held, n.Retained, probe)
		delete(counts.By, id)
	}
	state := "old"
	for _, k := range keys.SealKeys() {
		switch {
		case k.Primary:
			row(k.ID, "primary")
			state = "prepared"
		case !k.Enabled:
			row(k.ID, "disabled")
		default:
			row(k.ID, state)
		}
	}
	for id := range counts.By {
		row(id, "missing")
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if counts.UnknownMarkers > 0 {
		_, err = fmt.Fprintf(e.stdout, "%d markers were sealed by a key that was not noted\n", counts.UnknownMarkers)
	}
	return err
}

func (c keysetFlags) load(ctx context.Context, e env) (keyring.Source, *keyring.Keyring, error) {
	source, err := c.source(ctx, e)
	if err != nil {
		return source, nil, err
	}
	keys, err := source.Load(ctx)
	return source, keys, err
}

type keysetRemoveCmd struct {
	databaseFlags
	keysetFlags
	KeyID uint32 `required:"" placeholder:"N" help:"The key's id, as status shows it."`
}

func (c keysetRemoveCmd) Run(ctx context.Context, e env) error {
	source, err := c.source(ctx, e)
	if err != nil {
		return err
	}
	defer closeKeeper(source.Keeper)
	db, err := c.open(ctx, e)
	if err != nil {
		return err
	}
	defer db.Close()
	id := tenant.SealKeyID(c.KeyID)
	err = source.Remove(ctx, id, func(keys *keyring.Keyring) error { return notNeeded(ctx, db, keys, id) })
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(e.stderr, "the key %d is no longer in %s: let every replica have the file; keep an old copy as long as backups of the database from before\n", id, c.KeysetFile)
	return err
}

// notNeeded makes sure that a database needs a key of its keyset no longer, nor ever
// will.
func notNeeded(ctx context.Context, db *postgres.DB, keys *keyring.Keyring, id tenant.SealKeyID) error {
	d, err := db.Deployment(ctx)
	if errors.Is(err, tenant.NotFound) {
		return errors.New("no service has started on this database yet: it does not say what needs the key")
	}
	if err != nil {
		return err
	}
	// Another deployment's database would say that nothing needs the key.
	if keys.DeploymentID(d.Operator) != d.ID {
		return errors.New("this database was set up with another keyset")
	}
	if err := keys.Check(d.KeysetProbe); err != nil {
		return err
	}
	needs, err := db.RemoveSealKey(ctx, id, operator)
	if err != nil {
		return err
	}
	n := needs.By[id]
	if n.None() && needs.UnknownMarkers == 0 {
		return nil
	}
	var where []string
	for _, part := range []struct {
		n    int
		what string
	}{
		{n.Keys, "%d keys of tenants (they are sealed anew by the running replicas)"},
		{n.Held, "the markers of %d apps (they are written anew, one call to Clarifai each)"},
		{n.Retained, "the markers of %d apps of deleted tenants (until they are purged)"},
		{needs.UnknownMarkers, "perhaps %d markers that were written before it was noted which key sealed them (they are written anew after a rotation)"},
	} {
		if part.n > 0 {
			where = append(where, fmt.Sprintf(part.what, part.n))
		}
	}
	if n.Probe {
		where = append(where, "the keyset probe (sealed anew after the last key)")
	}
	return fmt.Errorf("the key %d is needed, by %s", id, strings.Join(where, ", "))
}

type keysetWrapCmd struct {
	keysetFlags
}

func (c keysetWrapCmd) Run(ctx context.Context, e env) error {
	source, err := c.source(ctx, e)
	if err != nil {
		return err
	}
	if source.Keeper == nil {
		return errors.New("which KMS shall wrap it? Set TENANTRY_KEYSET_KMS or --keyset-kms-file")
	}
	defer closeKeeper(source.Keeper)
	if err := source.Wrap(ctx); err != nil {
		return err
	}
	_, err = fmt.Fprintf(e.stderr, "%s is wrapped: without its KMS it cannot be read; copies in the clear are yours to remove\n", c.KeysetFile)
	return err
}
