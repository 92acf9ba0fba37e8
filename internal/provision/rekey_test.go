package provision_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/keyring"
	"github.com/tenantry/tenantry/internal/postgres"
	"github.com/tenantry/tenantry/internal/postgres/pgtest"
	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

func rotateKeyset(t testing.TB, path string, prepare bool) tenant.SealKeyID {
	t.Helper()
	key, err := keyring.Source{Path: path}.Rotate(t.Context(), prepare)
	if err != nil {
		t.Fatal(err)
	}
	return key.ID
}

func loadKeyset(t testing.TB, path string) *keyring.Keyring {
	t.Helper()
	k, err := keyring.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func primaryOf(t testing.TB, k *keyring.Keyring) tenant.SealKeyID {
	t.Helper()
	for _, key := range k.SealKeys() {
		if key.Primary {
			return key.ID
		}
	}
	t.Fatal("there is no primary")
	return 0
}

// copyKeyset gives another machine the keyset file as it is now, in one piece.
func copyKeyset(t testing.TB, from, to string) {
	t.Helper()
	text, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to+".new", text, 0o600)
	}
	if err == nil {
		err = os.Rename(to+".new", to)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// uses waits until a replica has a key, as its primary if it shall be.
func uses(t testing.TB, r *provisiontest.Replica, id tenant.SealKeyID, primary bool) {
	t.Helper()
	provisiontest.Eventually(t, fmt.Sprintf("the replica uses the key %d", id), func() bool {
		return r.Keyring.Opens(id) && (!primary || primaryOf(t, r.Keyring) == id)
	})
}

// rekeyed waits until nothing in the database is sealed by another key.
func rekeyed(t testing.TB, db *postgres.DB, id tenant.SealKeyID) {
	t.Helper()
	var counts tenant.SealedCounts
	defer func() {
		if t.Failed() {
			t.Logf("sealed by keys: %+v", counts)
		}
	}()
	provisiontest.Eventually(t, fmt.Sprintf("all is sealed by the key %d", id), func() bool {
		var err error
		counts, err = db.CountSealed(t.Context())
		return err == nil && len(counts.By) == 1 && counts.By[id].Probe && counts.UnknownMarkers == 0
	})
}

// The keyset is rotated while two replicas, on machines that get the file one after
// the other, sign tenants up and reveal keys: nothing fails, and in the end nothing
// needs the old key.
func TestRotateWhileServing(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	second := filepath.Join(t.TempDir(), "keyset.json")
	copyKeyset(t, w.Keyset, second)
	old := primaryOf(t, w.Keys)
	a := w.Start(provisiontest.Options{Keyset: w.Keyset})
	b := w.Start(provisiontest.Options{Keyset: second})

	ctx, stop := context.WithCancel(t.Context())
	var signedUp, revealed atomic.Int64
	var work sync.WaitGroup
	for i, r := range []*provisiontest.Replica{a, b} {
		other := []*provisiontest.Replica{b, a}[i]
		work.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				id := tenant.ID(fmt.Sprintf("user_%d_%d", i, n))
				got, _, err := r.SignUp(t.Context(), id, tenant.SignUp{}, long, caller)
				if err != nil || got.State != tenant.Active {
					t.Errorf("sign up %s: %v, %s", id, err, got.State)
					return
				}
				signedUp.Add(1)
				for _, of := range []tenant.ID{id, tenant.ID(fmt.Sprintf("user_%d_%d", i, n/2))} {
					if _, secret, err := other.Reveal(t.Context(), of, tenant.DefaultKey, caller); err != nil || !secret.IsSet() {
						t.Errorf("reveal %s: %v", of, err)
						return
					}
					revealed.Add(1)
				}
			}
		})
	}
	defer work.Wait()
	defer stop()
	goesOn := func(when string) {
		t.Helper()
		ups, reveals := signedUp.Load(), revealed.Load()
		provisiontest.Eventually(t, "sign-ups and reveals go on "+when, func() bool {
			return t.Failed() || signedUp.Load() >= ups+6 && revealed.Load() >= reveals+6
		})
	}

	goesOn("before the rotation")
	next := rotateKeyset(t, w.Keyset, true)
	uses(t, a, next, false)
	goesOn("while one replica has the new key")
	copyKeyset(t, w.Keyset, second)
	uses(t, b, next, false)
	if got := rotateKeyset(t, w.Keyset, false); got != next {
		t.Errorf("the key %d is the primary; want the prepared one, %d", got, next)
	}
	uses(t, a, next, true)
	goesOn("while one replica seals by the new key")
	// The one seals anew what the other seals by the old key, and not the other way.
	if counts, err := a.DB.CountSealed(t.Context()); err != nil || counts.By[next].Keys == 0 {
		t.Errorf("the new key has sealed %+v, %v", counts.By[next], err)
	}
	copyKeyset(t, w.Keyset, second)
	uses(t, b, next, true)
	goesOn("after the rotation")
	stop()
	work.Wait()
	rekeyed(t, a.DB, next)
	for _, r := range []*provisiontest.Replica{a, b} {
		if r.Logs.FilterMessage("sealing anew fails and is tried again").Len() > 0 {
			t.Error("sealing anew failed")
		}
	}

	// The old key goes.
	if _, err := w.TryStart(provisiontest.Options{}); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("old copy of the one this database is sealed with: it lacks the key %d", next)) {
		t.Errorf("a replica starts with an old keyset: %v", err)
	}
	if needs, err := a.DB.RemoveSealKey(t.Context(), old, admin); err != nil || !needs.By[old].None() {
		t.Fatalf("the old key is needed by %+v, %v", needs.By[old], err)
	}
	if err := (keyring.Source{Path: w.Keyset}).Remove(t.Context(), old, func(*keyring.Keyring) error { return nil }); err != nil {
		t.Fatal(err)
	}
	copyKeyset(t, w.Keyset, second)
	for _, r := range []*provisiontest.Replica{a, b} {
		provisiontest.Eventually(t, "the replica has forgotten the old key", func() bool { return !r.Keyring.Opens(old) })
		for i := range 2 {
			got, err := r.Tenant(t.Context(), tenant.ID(fmt.Sprintf("user_%d_0", i)), 0)
			if err != nil || !keyWorks(t, w, r, got) {
				t.Errorf("the key of %s does not work any more: %v", got.ID, err)
			}
		}
	}
	rest(t, w)
	for _, app := range w.Sim.Apps() {
		if err := w.Keys.Replace(loadKeyset(t, w.Keyset)); err != nil {
			t.Fatal(err)
		}
		if of := ownerAt(w, app); !strings.HasPrefix(string(of), "user_") {
			t.Errorf("the marker of %s names %q", app.ID, of)
		}
	}
}

// What a faster replica has sealed by a new key is opened as soon as the file is
// there, without waiting for the next look at it; until then it is to be tried again.
func TestUnknownKey(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	second := filepath.Join(t.TempDir(), "keyset.json")
	copyKeyset(t, w.Keyset, second)
	fast := w.Start(provisiontest.Options{Keyset: w.Keyset})
	slow := w.Start(provisiontest.Options{Keyset: second, Unwatched: true})
	next := rotateKeyset(t, w.Keyset, false)
	uses(t, fast, next, true)
	got := signUp(t, fast, "user_1")
	rekeyed(t, fast.DB, next)
	if _, _, err := slow.Reveal(t.Context(), "user_1", tenant.DefaultKey, caller); !errors.Is(err, tenant.Unavailable) {
		t.Errorf("a replica that lacks the key answers %v; want that it is tried again", err)
	}
	provisiontest.Eventually(t, "the replica says that it lacks a key", func() bool {
		return slow.Logs.FilterField(zap.Uint32("key_id", uint32(next))).Len() > 0
	})
	copyKeyset(t, w.Keyset, second)
	if !keyWorks(t, w, slow, got) {
		t.Error("the key does not work")
	}
}

// A keyset that would lose something is not taken up, and said to be so once.
func TestKeysetRefused(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	path := filepath.Join(t.TempDir(), "keyset.json")
	copyKeyset(t, w.Keyset, path)
	first := primaryOf(t, w.Keys)
	next := rotateKeyset(t, path, false)
	r := w.Start(provisiontest.Options{Keyset: path, Adjust: func(c *provision.Config) { c.PATCheckBase = 1 }})
	got := signUp(t, r, "user_1")
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	broken, foreign := filepath.Join(t.TempDir(), "broken"), filepath.Join(t.TempDir(), "foreign")
	if err := os.WriteFile(broken, good[:len(good)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	if err := keyring.Create(foreign); err != nil {
		t.Fatal(err)
	}
	// Has all keys that are needed, and fingerprints otherwise.
	otherPrints := filepath.Join(t.TempDir(), "prints")
	graft(t, path, foreign, otherPrints)
	const refused = "the keyset cannot be taken up; the one in use stays"
	for what, c := range map[string]struct{ path, says string }{
		"broken":                         {broken, "not JSON"},
		"of another deployment":          {foreign, "lacks the key"},
		"of other fingerprints":          {otherPrints, "fingerprint"},
		"an older one without a new key": {w.Keyset, fmt.Sprintf("lacks the key %d", next)},
	} {
		before := r.Logs.FilterMessage(refused).Len()
		copyKeyset(t, c.path, path)
		provisiontest.Eventually(t, "a keyset is refused that is "+what, func() bool {
			logs := r.Logs.FilterMessage(refused).All()
			return len(logs) > before && strings.Contains(fmt.Sprint(logs[len(logs)-1].ContextMap()["error"]), c.says)
		})
		if !keyWorks(t, w, r, got) || !r.Keyring.Opens(first) || primaryOf(t, r.Keyring) != next {
			t.Errorf("the keyset in use does not stay, with a file that is %s", what)
		}
		if n := r.Logs.FilterMessage(refused).Len(); n != before+1 {
			t.Errorf("a file that is %s is logged %d times; want once", what, n-before)
		}
	}
	if err := os.WriteFile(path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	third := rotateKeyset(t, path, false)
	uses(t, r, third, true)
	for _, l := range r.Logs.All() {
		if strings.Contains(fmt.Sprint(l.Message, l.ContextMap()), `"value"`) {
			t.Errorf("a keyset is in the log: %s", l.Message)
		}
	}
}

// graft makes a keyset file that seals as one and fingerprints as another.
func graft(t *testing.T, seals, fingerprints, to string) {
	t.Helper()
	var parts [2]map[string]any
	for i, path := range []string{seals, fingerprints} {
		text, err := os.ReadFile(path)
		if err == nil {
			err = json.Unmarshal(text, &parts[i])
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	parts[0]["fingerprint"] = parts[1]["fingerprint"]
	text, err := json.Marshal(parts[0])
	if err == nil {
		err = os.WriteFile(to, text, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// A replica stops in the middle; another goes on with what is left, and what cannot
// be opened stays as it is and keeps nothing up.
func TestResealGoesOn(t *testing.T) {
	t.Parallel()
	w := provisiontest.New(t)
	r := w.Start(provisiontest.Options{Keyset: w.Keyset})
	old := primaryOf(t, r.Keyring)
	signUp(t, r, "user_1")
	marked(t, w)
	r.Stop()
	const rows = 2000
	sealedRows(t, w, rows)
	next := rotateKeyset(t, w.Keyset, false)
	conn := pgtest.Conn(t, w.URL)
	left := func() (n int) {
		t.Helper()
		if err := conn.QueryRow(t.Context(), `SELECT count(*) FROM keys WHERE substring(ciphertext from 2 for 4) = $1`, old.Bytes()).Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}

	ctx, cancel := context.WithCancel(t.Context())
	first := w.Start(provisiontest.Options{Keyset: w.Keyset, Idle: true, Store: func(s provision.Store) provision.Store {
		return watchedStore{s, func() {
			if n := left(); n > 0 && n < rows {
				cancel()
			}
		}}
	}})
	if err := first.Reseal(ctx); err != nil {
		t.Fatal(err)
	}
	half := left()
	if half == 0 || half >= rows {
		t.Fatalf("%d of %d keys are left; want it stopped in the middle", half, rows)
	}
	// One was altered.
	exec(t, w, `UPDATE keys SET ciphertext = substring(ciphertext from 1 for 10) || 'x'::bytea
		WHERE id = (SELECT id FROM keys WHERE substring(ciphertext from 2 for 4) = $1 LIMIT 1)`, old.Bytes())

	second := w.Start(provisiontest.Options{Keyset: w.Keyset})
	provisiontest.Eventually(t, "all keys but one are sealed anew", func() bool { return left() == 1 })
	provisiontest.Eventually(t, "the one that cannot be opened is logged", func() bool {
		return second.Logs.FilterMessageSnippet("were altered since").FilterField(zap.Int("keys", 1)).Len() == 1
	})
	if needs, err := second.DB.RemoveSealKey(t.Context(), old, admin); err != nil || needs.By[old].Keys != 1 {
		t.Errorf("the old key is needed by %+v, %v; want the one that is left", needs.By[old], err)
	}
	exec(t, w, `DELETE FROM keys WHERE substring(ciphertext from 2 for 4) = $1`, old.Bytes())
	rekeyed(t, second.DB, next)
	provisiontest.Eventually(t, "the end is logged", func() bool {
		return second.Logs.FilterMessage("all keys of tenants are sealed anew").Len() == 1
	})
	opened(t, w, loadKeyset(t, w.Keyset))
}

// sealedRows puts keys of one app that the world's keyring has sealed.
func sealedRows(t testing.TB, w *provisiontest.World, n int) {
	t.Helper()
	conn := pgtest.Conn(t, w.URL)
	if _, err := conn.Exec(t.Context(), `INSERT INTO apps (id, profile, profile_revision, state, made_at, ready_at, tenant_id, tenant_generation, marked_at, marker_key_id)
		VALUES ('t-many', 'other', 'x', 'retained', now(), now(), 'many', 1, now(), -1)`); err != nil {
		t.Fatal(err)
	}
	i := 0
	_, err := conn.CopyFrom(t.Context(), pgx.Identifier{"keys"},
		[]string{"id", "app_id", "name", "state", "scopes", "ciphertext", "fingerprint", "hint", "activated_at"},
		pgx.CopyFromFunc(func() ([]any, error) {
			if i++; i > n {
				return nil, nil
			}
			id, err := uuid.NewV7()
			if err != nil {
				return nil, err
			}
			secret := tenant.NewSecret(fmt.Sprintf("%032x", i))
			sealed, err := w.Keys.Seal(id, secret)
			return []any{id, "t-many", fmt.Sprint("key-", i), "active", []string{"All"}, sealed, w.Keys.Fingerprint(secret), w.Keys.Hint(secret), time.Now()}, err
		}))
	if err != nil {
		t.Fatal(err)
	}
}

// opened checks that a keyring opens every sealed key of the database, and that it is
// the key that its fingerprint says.
func opened(t testing.TB, w *provisiontest.World, k *keyring.Keyring) {
	t.Helper()
	rows, _ := connOf(t, w).Query(t.Context(), `SELECT id, ciphertext, fingerprint FROM keys WHERE ciphertext IS NOT NULL`)
	var id uuid.UUID
	var ciphertext, fingerprint []byte
	if _, err := pgx.ForEachRow(rows, []any{&id, &ciphertext, &fingerprint}, func() error {
		secret, err := k.Open(id, ciphertext)
		if err != nil {
			return fmt.Errorf("open %s: %w", id, err)
		}
		if !bytes.Equal(k.Fingerprint(secret), fingerprint) {
			return fmt.Errorf("the row %s has the secret of another", id)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// BenchmarkReseal seals 100,000 keys anew: by the store alone, batch after batch, and
// as a replica does it, which leaves the database half of the time.
func BenchmarkReseal(b *testing.B) {
	const rows = 100_000
	for _, name := range []string{"store", "replica"} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				w := provisiontest.New(b)
				r := w.Start(provisiontest.Options{Keyset: w.Keyset, Idle: true, Unwatched: true})
				old := primaryOf(b, r.Keyring)
				sealedRows(b, w, rows)
				if _, err := pgtest.Conn(b, w.URL).Exec(b.Context(), `VACUUM ANALYZE keys`); err != nil {
					b.Fatal(err)
				}
				rotateKeyset(b, w.Keyset, false)
				if err := r.Keyring.Replace(loadKeyset(b, w.Keyset)); err != nil {
					b.Fatal(err)
				}
				peak := watchHeap()
				began := time.Now()
				b.StartTimer()
				if name == "store" {
					for after, done := uuid.Nil, false; !done; {
						batch, err := r.DB.Reseal(b.Context(), old, after, 500, func(id uuid.UUID, ciphertext []byte) []byte {
							sealed, err := r.Keyring.Reseal(id, ciphertext)
							if err != nil {
								b.Error(err)
							}
							return sealed
						})
						if err != nil {
							b.Fatal(err)
						}
						after, done = batch.Last, batch.Seen == 0
					}
				} else {
					ctx, cancel := context.WithCancel(b.Context())
					ended := make(chan error, 1)
					go func() { ended <- r.Reseal(ctx) }()
					provisiontest.Eventually(b, "all is sealed anew", func() bool {
						return r.Logs.FilterMessage("all keys of tenants are sealed anew").Len() == 1
					})
					cancel()
					if err := <-ended; err != nil {
						b.Fatal(err)
					}
				}
				b.StopTimer()
				b.ReportMetric(rows/time.Since(began).Seconds(), "rows/s")
				b.ReportMetric(peak(), "peak-heap-MB")
				opened(b, w, r.Keyring)
				if s, err := r.DB.Sealed(b.Context()); err != nil || len(s.By) != 1 || s.By[0] == old {
					b.Errorf("sealed by %v, %v", s.By, err)
				}
				b.StartTimer()
			}
		})
	}
}

// watchHeap watches the heap until the function is called that it returns, which
// gives its greatest size in MB.
func watchHeap() (peak func() float64) {
	runtime.GC()
	stop, done := make(chan struct{}), make(chan struct{})
	var most uint64
	go func() {
		defer close(done)
		tick := time.NewTicker(10 * time.Millisecond)
		defer tick.Stop()
		for {
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			most = max(most, m.HeapAlloc)
			select {
			case <-stop:
				return
			case <-tick.C:
			}
		}
	}()
	return func() float64 { close(stop); <-done; return float64(most) / (1 << 20) }
}
