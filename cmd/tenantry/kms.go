package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"
	"time"

	"gocloud.dev/gcerrors"
	"gocloud.dev/secrets"
	_ "gocloud.dev/secrets/awskms"
	_ "gocloud.dev/secrets/azurekeyvault"
	_ "gocloud.dev/secrets/gcpkms"
	_ "gocloud.dev/secrets/hashivault"
	_ "gocloud.dev/secrets/localsecrets"

	"github.com/tenantry/tenantry/internal/keyring"
)

// kmsFlags say which KMS wraps the keyset. The URL of a local key is the key itself.
type kmsFlags struct {
	KeysetKMSFile string `name:"keyset-kms-file" env:"TENANTRY_KEYSET_KMS_FILE" placeholder:"FILE" help:"File with the URL of the key of a KMS that wraps the keyset: awskms://, gcpkms://, azurekeyvault://, hashivault:// or base64key://. Without it: TENANTRY_KEYSET_KMS. Without either the keyset is in the clear."`
}

// localKey is the scheme of a URL that is a key.
const localKey = "base64key"

var kmsSchemes = []string{"awskms", "gcpkms", "azurekeyvault", "hashivault", localKey}

// keeper opens what wraps the keyset, or returns nil if nothing does. Its errors, and
// those of the keeper, never repeat the URL.
func (f kmsFlags) keeper(ctx context.Context, e env) (keyring.Keeper, error) {
	secret, err := secretSetting(e, "TENANTRY_KEYSET_KMS", f.KeysetKMSFile)
	if err != nil || !secret.IsSet() {
		return nil, err
	}
	name := variableOf("TENANTRY_KEYSET_KMS", f.KeysetKMSFile)
	u, err := url.Parse(secret.Reveal())
	switch {
	case err != nil || !slices.Contains(kmsSchemes, u.Scheme):
		return nil, fmt.Errorf("%s: it must be a URL that begins with one of %s://", name, strings.Join(kmsSchemes, "://, "))
	case u.Scheme == localKey && u.Host == "": // would mean a key that is forgotten at the end
		return nil, fmt.Errorf("%s: base64key:// must be followed by 32 bytes in base64, as `openssl rand -base64 32 | tr +/ -_` makes them", name)
	}
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	k := kmsKeeper{url: secret.Reveal(), local: u.Scheme == localKey}
	if k.Keeper, err = secrets.OpenKeeper(ctx, secret.Reveal()); err != nil {
		return nil, fmt.Errorf("%s: %w", name, k.scrubbed(err))
	}
	return k, nil
}

// A kmsKeeper is a keeper whose errors are fit for a log.
type kmsKeeper struct {
	*secrets.Keeper
	url   string
	local bool
}

func (k kmsKeeper) Encrypt(ctx context.Context, plaintext []byte) ([]byte, error) {
	out, err := k.Keeper.Encrypt(ctx, plaintext)
	return out, k.scrubbed(err)
}

func (k kmsKeeper) Decrypt(ctx context.Context, ciphertext []byte) ([]byte, error) {
	out, err := k.Keeper.Decrypt(ctx, ciphertext)
	return out, k.scrubbed(err)
}

// String keeps the URL out of whatever k is printed in.
func (kmsKeeper) String() string { return "[kms]" }

// GoString does as String.
func (k kmsKeeper) GoString() string { return k.String() }

func (k kmsKeeper) scrubbed(err error) error {
	switch {
	case err == nil:
		return nil
	case k.local:
		return errors.New("the local key is not 32 bytes in base64, or not the one that wrapped the keyset")
	}
	_, rest, _ := strings.Cut(k.url, "://")
	text := strings.NewReplacer(k.url, "[url]", rest, "[url]").Replace(err.Error())
	return fmt.Errorf("%s (%s)", strings.Join(strings.Fields(text), " "), gcerrors.Code(err))
}

func closeKeeper(k keyring.Keeper) {
	if c, ok := k.(io.Closer); ok {
		_ = c.Close()
	}
}
