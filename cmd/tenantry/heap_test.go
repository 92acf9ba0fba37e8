package main

import "testing"

func TestGarbage(t *testing.T) {
	t.Parallel()
	const mb = 1 << 20
	for _, c := range []struct {
		name                          string
		live, perSecond, before, want uint64
	}{
		{"starting", 5 * mb, 60 * mb, 0, 16 * mb},
		{"small and soon busy", 5 * mb, 60 * mb, 16 * mb, 32 * mb},
		{"small and idle", 5 * mb, 1 * mb, 128 * mb, 16 * mb},
		{"small and busy", 5 * mb, 60 * mb, 128 * mb, 60 * mb},
		{"small and very busy", 5 * mb, 900 * mb, 128 * mb, 128 * mb},
		{"middling and idle", 100 * mb, 0, 128 * mb, 50 * mb},
		{"middling and busy", 100 * mb, 900 * mb, 128 * mb, 128 * mb},
		{"large and idle", 600 * mb, 0, 128 * mb, 300 * mb},
		{"large and busy", 600 * mb, 900 * mb, 128 * mb, 300 * mb},
	} {
		if got := garbage(c.live, c.perSecond, c.before); got != c.want {
			t.Errorf("%s: %d MB of garbage may lie about, not %d", c.name, got/mb, c.want/mb)
		}
	}
}
