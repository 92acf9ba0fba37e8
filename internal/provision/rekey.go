package provision

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/tenant"
)

// A rereading is what is known of the keyset's source.
type rereading struct {
	mu      sync.Mutex
	inUse   []byte    // hash of the text that was taken up last; guarded by mu, as all below
	refused []byte    // hash of the text that was refused last,
	again   time.Time // and when to try it again
	why     error
}

// rereadKeyset reads the keyset anew and takes it up if it is another one and fit. It
// returns why it is not. A text that was judged is not judged again at once: to read
// it may take a call to a KMS.
func (s *Service) rereadKeyset(ctx context.Context) error {
	r := &s.reread
	r.mu.Lock()
	defer r.mu.Unlock()
	text, err := s.KeysetSource.Read()
	if err != nil {
		return err
	}
	sum := sha256.Sum256(text)
	if bytes.Equal(sum[:], r.inUse) {
		return nil
	}
	if bytes.Equal(sum[:], r.refused) && time.Now().Before(r.again) {
		return r.why
	}
	if err := s.takeUpKeyset(ctx, text); err != nil {
		r.refused, r.again, r.why = sum[:], time.Now().Add(s.PATCheckBase), err
		return err
	}
	r.inUse, r.refused = sum[:], nil
	return nil
}

// takeUpKeyset puts a keyset in the place of the one in use, unless something could
// not be opened any more.
func (s *Service) takeUpKeyset(ctx context.Context, text []byte) error {
	next, err := s.KeysetSource.Parse(ctx, text)
	if err != nil {
		return err
	}
	if slices.Equal(next.SealKeys(), s.Keyring.SealKeys()) {
		return s.Keyring.Replace(next)
	}
	sealed, err := s.Store.Sealed(ctx)
	if err != nil {
		return fmt.Errorf("look which keys are needed: %w", err)
	}
	if by, ok := tenant.SealKeyOf(sealed.Probe); ok {
		sealed.By = append(sealed.By, by)
	}
	for _, id := range sealed.By {
		if s.Keyring.Opens(id) && !next.Opens(id) {
			return fmt.Errorf("it lacks the key %d, which the database still needs", id)
		}
	}
	if err := s.Keyring.Replace(next); err != nil {
		return err
	}
	s.noteKeyset()
	s.Log.Info("another keyset is in use", s.keysetFields()...)
	return nil
}

func (s *Service) keysetFields() []zap.Field {
	var ids []uint32
	var primary tenant.SealKeyID
	for _, k := range s.Keyring.SealKeys() {
		ids = append(ids, uint32(k.ID))
		if k.Primary {
			primary = k.ID
		}
	}
	return []zap.Field{zap.Uint32("primary", uint32(primary)), zap.Uint32s("keys", ids)}
}

// noteKeyset shows in the metrics which keys are in use.
func (s *Service) noteKeyset() {
	s.Metrics.keysetKeys.Reset()
	for _, k := range s.Keyring.SealKeys() {
		s.Metrics.keysetKeys.WithLabelValues(fmt.Sprint(k.ID), fmt.Sprint(k.Primary)).Set(1)
	}
}

// rereadTimeout bounds reading the keyset while something waits to be opened.
const rereadTimeout = 15 * time.Second

// watchUnknown has the keyset read anew when something is to be opened that no key
// of it sealed: a faster replica has a newer one.
func (s *Service) watchUnknown() {
	s.noteKeyset()
	if s.KeysetSource == nil {
		return
	}
	s.Keyring.OnUnknown(func() {
		ctx, cancel := context.WithTimeout(context.Background(), rereadTimeout)
		defer cancel()
		_ = s.rereadKeyset(ctx) // WatchKeyset says what is wrong
	})
}

// WatchKeyset reads the keyset anew every interval until ctx ends. Another one takes
// over once it is known that it opens all that the one in use opens and the database
// needs; until then, and if it cannot be read, the one in use stays. Each fault is
// logged once.
func (s *Service) WatchKeyset(ctx context.Context, interval time.Duration) {
	said := ""
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		err := s.rereadKeyset(ctx)
		switch {
		case err == nil:
			said = ""
		case ctx.Err() == nil && err.Error() != said:
			said = err.Error()
			s.Log.Error("the keyset cannot be taken up; the one in use stays", zap.Error(err))
		}
	}
}

const (
	resealBatch = 500
	// resealCountEvery is how often the rows that are left are counted meanwhile, unless
	// that takes long.
	resealCountEvery = 15 * time.Second
	// seldom is how many times as long as it took a count of all keys is not repeated.
	seldom = 20
	// markAnewMost bounds the apps that wait for their markers at once, so that other
	// work on held apps does not queue behind them.
	markAnewMost = 16
)

// A resealing is where Reseal stands.
type resealing struct {
	began    time.Time // zero while there is nothing to do
	counted  time.Time
	changed  int
	counting time.Duration // how long the last count took
	stuck    int           // rows of the last pass that could not be opened
	unknown  []tenant.SealKeyID
}

// Reseal seals anew by the primary what older keys of the keyset sealed, until ctx
// ends, and has the markers of tenants' apps written anew. It rests while there is
// nothing to do. Every replica does it: what one has begun any other goes on with.
func (s *Service) Reseal(ctx context.Context) error {
	var r resealing
	failing := false
	for {
		err := s.reseal(ctx, &r)
		if ctx.Err() != nil {
			return nil
		}
		switch {
		case err != nil && !failing:
			s.Log.Warn("sealing anew fails and is tried again", zap.Error(err))
		case err == nil && failing:
			s.Log.Info("sealing anew works again")
		}
		failing = err != nil
		if !sleep(ctx, s.SweepEvery*3/4+rand.N(s.SweepEvery/2)) {
			return nil
		}
	}
}

func (s *Service) reseal(ctx context.Context, r *resealing) error {
	sealed, err := s.Store.Sealed(ctx)
	if err != nil {
		return err
	}
	s.noteUnknown(r, sealed.By)
	older := s.Keyring.Older()
	var work []tenant.SealKeyID
	for _, id := range sealed.By {
		if slices.Contains(older, id) {
			work = append(work, id)
		}
	}
	if len(work) > 0 && r.began.IsZero() {
		*r = resealing{began: time.Now(), unknown: r.unknown}
		left, err := s.countLeft(ctx, r, older)
		if err != nil {
			return err
		}
		s.Log.Info("keys of tenants are being sealed anew", append(s.keysetFields(), zap.Int("left", left))...)
	}
	stuck := 0
	for _, id := range work {
		n, err := s.resealFrom(ctx, r, id, older)
		if err != nil {
			return err
		}
		stuck += n
	}
	if stuck > 0 && stuck != r.stuck {
		s.Log.Error("sealed keys cannot be opened, though the keyset has the key that sealed them: they were altered since", zap.Int("keys", stuck))
	}
	r.stuck = stuck
	if len(older) == 0 || len(work) > 0 && stuck == 0 {
		return nil // the next turn sees whether other replicas left any
	}
	if len(work) == 0 {
		if err := s.resealProbe(ctx, sealed.Probe); err != nil {
			return err
		}
		if !r.began.IsZero() {
			s.Log.Info("all keys of tenants are sealed anew", zap.Int("by_this_replica", r.changed), zap.Duration("took", time.Since(r.began)))
			s.Metrics.resealLeft.Set(0)
			*r = resealing{unknown: r.unknown}
		}
	}
	if s.SkipMarks {
		return nil
	}
	_, err = s.Store.MarkAnew(ctx, older, markAnewMost)
	return err
}

// resealFrom seals anew what one key sealed, batch by batch. It returns how many rows
// it could not open.
func (s *Service) resealFrom(ctx context.Context, r *resealing, id tenant.SealKeyID, older []tenant.SealKeyID) (stuck int, err error) {
	var after uuid.UUID
	for {
		began := time.Now()
		batch, err := s.Store.Reseal(ctx, id, after, resealBatch, func(row uuid.UUID, ciphertext []byte) []byte {
			sealed, err := s.Keyring.Reseal(row, ciphertext)
			if err != nil {
				stuck++
			}
			return sealed
		})
		if err != nil || batch.Seen == 0 {
			return stuck, err
		}
		after = batch.Last
		r.changed += batch.Changed
		if time.Since(r.counted) >= max(resealCountEvery, seldom*r.counting) {
			if _, err := s.countLeft(ctx, r, older); err != nil {
				return stuck, err
			}
		}
		// Half of the time is left to those who wait for the database.
		if !sleep(ctx, time.Since(began)) {
			return stuck, ctx.Err()
		}
	}
}

// countLeft counts what older keys sealed, for the metrics.
func (s *Service) countLeft(ctx context.Context, r *resealing, older []tenant.SealKeyID) (int, error) {
	began := time.Now()
	counts, err := s.Store.CountSealed(ctx)
	if err != nil {
		return 0, err
	}
	r.counting = time.Since(began)
	left := 0
	for _, id := range older {
		left += counts.By[id].Keys
	}
	r.counted = time.Now()
	s.Metrics.resealLeft.Set(float64(left))
	return left, nil
}

// resealProbe seals the keyset probe anew. It comes last: until then a replica that
// has the old keyset only may start, and reads the new one in its turn.
func (s *Service) resealProbe(ctx context.Context, probe []byte) error {
	sealed, err := s.Keyring.ResealProbe(probe)
	if err != nil || sealed == nil {
		return err
	}
	_, err = s.Store.ResealProbe(ctx, probe, sealed, worker)
	return err
}

// noteUnknown says once of each key that sealed something that this replica's keyset
// lacks it.
func (s *Service) noteUnknown(r *resealing, by []tenant.SealKeyID) {
	var unknown []tenant.SealKeyID
	for _, id := range by {
		if s.Keyring.Opens(id) {
			continue
		}
		unknown = append(unknown, id)
		if !slices.Contains(r.unknown, id) {
			s.Log.Error("keys of tenants are sealed by a key that this replica's keyset lacks: it must get the newest keyset",
				zap.Uint32("key_id", uint32(id)))
		}
	}
	s.Metrics.unknownKeys.Set(float64(len(unknown)))
	r.unknown = unknown
}
