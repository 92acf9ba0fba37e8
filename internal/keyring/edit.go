package keyring

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/tink-crypto/tink-go/v2/aead"
	"github.com/tink-crypto/tink-go/v2/keyset"

	"github.com/tenantry/tenantry/internal/tenant"
)

// Rotate makes a new key the primary of the keyset file, and returns it. A key that
// was added by an earlier call with prepare is taken for it. With prepare the key is
// only added, so that every replica can open what it will seal; one that is there
// already is returned as it is. Old keys stay and open.
//
// The file is replaced in one piece: whatever happens, it is the old one or the new
// one, with the mode and the owner it had.
func (s Source) Rotate(ctx context.Context, prepare bool) (SealKey, error) {
	var id uint32
	err := s.edit(ctx, func(m *keyset.Manager, keys []SealKey) (changed bool, err error) {
		prepared := false
		if last := keys[len(keys)-1]; last.Enabled && last.Named && !last.Primary {
			id, prepared = uint32(last.ID), true
		}
		if prepared && prepare {
			return false, nil
		}
		if !prepared {
			if id, err = m.Add(aead.AES256GCMKeyTemplate()); err != nil {
				return false, err
			}
		}
		if !prepare {
			err = m.SetPrimary(id)
		}
		return true, err
	})
	return SealKey{ID: tenant.SealKeyID(id), Primary: !prepare, Enabled: true, Named: true}, err
}

// Remove takes a key out of the keyset file, after check has said that nothing needs
// it; the file is replaced as by Rotate. It refuses the primary.
func (s Source) Remove(ctx context.Context, id tenant.SealKeyID, check func(*Keyring) error) error {
	return s.edit(ctx, func(m *keyset.Manager, keys []SealKey) (bool, error) {
		for _, k := range keys {
			switch {
			case k.ID != id:
				continue
			case k.Primary:
				return false, fmt.Errorf("the key %d is the primary, which seals: `tenantry keyset rotate` makes another", id)
			case !k.Named:
				return false, fmt.Errorf("what the key %d sealed does not say so, and cannot be looked for: it cannot be removed safely", id)
			}
			whole, err := s.Load(ctx)
			if err == nil {
				err = check(whole)
			}
			if err != nil {
				return false, err
			}
			return true, m.Delete(uint32(id))
		}
		return false, fmt.Errorf("there is no key %d in %s: `tenantry keyset status` shows those there are", id, s.Path)
	})
}

// Wrap has the Keeper wrap a keyset file that is in the clear; the file is replaced
// as by Rotate.
func (s Source) Wrap(ctx context.Context) error {
	return s.replace(func(text []byte) ([]byte, error) {
		in := Source{Path: s.Path}
		seal, fingerprint, err := in.handles(ctx, text)
		if err != nil {
			return nil, in.fault(err)
		}
		if text, err = marshal(seal, fingerprint); err != nil {
			return nil, err
		}
		return s.wrap(ctx, text)
	})
}

// edit changes the keyset that seals.
func (s Source) edit(ctx context.Context, change func(*keyset.Manager, []SealKey) (changed bool, err error)) error {
	return s.replace(func(text []byte) ([]byte, error) {
		seal, fingerprint, err := s.handles(ctx, text)
		if err != nil {
			return nil, s.fault(err)
		}
		m := keyset.NewManagerFromHandle(seal)
		changed, err := change(m, sealKeys(seal))
		if err != nil || !changed {
			return nil, err
		}
		if seal, err = m.Handle(); err != nil {
			return nil, err
		}
		if _, err := newKeyring(seal, fingerprint); err != nil { // not to write what nobody can read
			return nil, err
		}
		if text, err = marshal(seal, fingerprint); err != nil {
			return nil, err
		}
		return s.wrap(ctx, text)
	})
}

// replace puts another text in the place of the file's, unless it is nil. Meanwhile
// the file is locked: two changes at once would lose the key that one of them added.
func (s Source) replace(change func(text []byte) ([]byte, error)) error {
	if s.Path == "" {
		return errors.New("a keyset is changed in its file: --keyset-file or TENANTRY_KEYSET_FILE must name it")
	}
	path, err := filepath.EvalSymlinks(s.Path) // not to put a file where a link was
	if err != nil {
		return fmt.Errorf("keyset file: %w", err)
	}
	old, err := lockFile(path)
	if err != nil {
		return err
	}
	defer old.Close() //nolint:errcheck // nothing was written
	text, err := readFile(path)
	if err != nil {
		return fmt.Errorf("read keyset file: %w", err)
	}
	if text, err = change(text); err != nil || text == nil {
		return err
	}
	info, err := old.Stat()
	if err != nil {
		return fmt.Errorf("keyset file: %w", err)
	}
	next, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("write keyset file: %w", err)
	}
	_, err = next.Write(text)
	if err == nil {
		err = keepOwner(next, info)
	}
	if err == nil { // after the owner, whose change may take rights away
		err = next.Chmod(info.Mode().Perm())
	}
	err = errors.Join(err, next.Sync(), next.Close())
	if err == nil {
		err = os.Rename(next.Name(), path)
	}
	if err != nil {
		if gone := os.Remove(next.Name()); !errors.Is(gone, fs.ErrNotExist) {
			err = errors.Join(err, gone)
		}
		return fmt.Errorf("write keyset file: %w", err)
	}
	if err := syncFolder(filepath.Dir(path)); err != nil {
		return fmt.Errorf("keyset file %s is replaced, and might be the old one again after a power cut: %w", path, err)
	}
	return nil
}
