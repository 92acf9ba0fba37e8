package postgres

import (
	"encoding/binary"
	"math"
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/tenantry/tenantry/internal/tenant"
)

// Rows are packed into one text each: a million of them are kept, and the garbage
// collector need not look into a text.

type packer []byte

func (p *packer) number(n int64) { *p = binary.AppendVarint(*p, n) }

func (p *packer) text(s string) {
	p.number(int64(len(s)))
	*p = append(*p, s...)
}

// noTime is packed for the zero time, which has no count of microseconds.
const noTime = math.MinInt64

func (p *packer) time(t time.Time) {
	if t.IsZero() {
		p.number(noTime)
		return
	}
	p.number(t.UnixMicro())
}

// An unpacker reads what a packer has written, in the same order. The texts that it
// returns are parts of the packed one.
type unpacker string

func (u *unpacker) number() int64 {
	// As binary.Varint, which takes no string.
	var x uint64
	for i := 0; i < len(*u); i++ {
		b := (*u)[i]
		x |= uint64(b&0x7f) << (7 * i)
		if b < 0x80 {
			*u = (*u)[i+1:]
			return int64(x>>1) ^ -int64(x&1)
		}
	}
	panic("a packed row is cut off")
}

func (u *unpacker) text() string {
	n := u.number()
	s := (*u)[:n]
	*u = (*u)[n:]
	return string(s)
}

func (u *unpacker) time() time.Time {
	n := u.number()
	if n == noTime {
		return time.Time{}
	}
	return time.UnixMicro(n)
}

func oneOrZero(b bool) int64 {
	if b {
		return 1
	}
	return 0
}

// packTenant packs all of a tenant but its id, which is its key, and what is shown only
// of tenants that change.
func packTenant(t tenant.Tenant) string {
	p := make(packer, 0, 160)
	p.number(int64(slices.Index(tenant.States, t.State)))
	p.number(int64(t.Generation))
	p.number(t.Version)
	p.number(oneOrZero(t.DeletionProtection))
	p.text(t.Profile)
	p.text(string(t.AppID))
	p.text(string(t.AppUserID))
	p.text(t.DisplayName)
	p.time(t.CreatedAt)
	p.time(t.UpdatedAt)
	names := make([]string, 0, len(t.Labels))
	for name := range t.Labels {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		p.text(name)
		p.text(t.Labels[name])
	}
	return string(p)
}

func unpackTenant(id tenant.ID, row string) tenant.Tenant {
	u := unpacker(row)
	t := tenant.Tenant{ID: id}
	t.State = tenant.States[u.number()]
	t.Generation = int(u.number())
	t.Version = u.number()
	t.DeletionProtection = u.number() == 1
	t.Profile = u.text()
	t.AppID = tenant.AppID(u.text())
	t.AppUserID = tenant.UserID(u.text())
	t.DisplayName = u.text()
	t.CreatedAt = u.time()
	t.UpdatedAt = u.time()
	for u != "" {
		if t.Labels == nil {
			t.Labels = map[string]string{}
		}
		name := u.text()
		t.Labels[name] = u.text()
	}
	return t
}

// packKeys packs keys that have no problem.
func packKeys(keys []tenant.Key) string {
	var p packer
	p.number(int64(len(keys))) // so that no list is the empty text
	for _, k := range keys {
		p = append(p, k.ID[:]...)
		p.text(string(k.AppID))
		p.text(k.Name)
		p.text(string(k.State))
		p.text(k.Hint)
		p.number(int64(len(k.Scopes)))
		for _, s := range k.Scopes {
			p.text(s)
		}
		for _, t := range []time.Time{k.CreatedAt, k.ActivatedAt, k.RevokedAt, k.ExpiresAt, k.RetiresAt} {
			p.time(t)
		}
		p.text(string(k.Fingerprint))
		p.text(string(k.EndReason))
	}
	return string(p)
}

func unpackKeys(row string) []tenant.Key {
	u := unpacker(row)
	keys := make([]tenant.Key, u.number())
	for i := range keys {
		k := &keys[i]
		copy(k.ID[:], u[:len(uuid.UUID{})])
		u = u[len(uuid.UUID{}):]
		k.AppID = tenant.AppID(u.text())
		k.Name = u.text()
		k.State = tenant.KeyState(u.text())
		k.Hint = u.text()
		k.Scopes = make([]string, u.number())
		for j := range k.Scopes {
			k.Scopes[j] = u.text()
		}
		for _, t := range []*time.Time{&k.CreatedAt, &k.ActivatedAt, &k.RevokedAt, &k.ExpiresAt, &k.RetiresAt} {
			*t = u.time()
		}
		if sum := u.text(); sum != "" {
			k.Fingerprint = []byte(sum)
		}
		k.EndReason = tenant.EndReason(u.text())
	}
	return keys
}
