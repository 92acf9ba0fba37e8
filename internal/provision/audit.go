package provision

import (
	"context"
	"math/rand/v2"
	"time"

	"go.uber.org/zap"
)

// sealPatience is how long one turn at sealing waits for the transactions that may
// still add events to what is to be sealed.
const sealPatience = 10 * time.Second

// SealAudit seals the audit log, turn by turn until ctx ends. Every replica does;
// one at a time makes a seal.
func (s *Service) SealAudit(ctx context.Context) error {
	failing := false
	for {
		turn, cancel := context.WithTimeout(ctx, 6*sealPatience)
		sealing, err := s.Store.SealAudit(turn, sealPatience)
		cancel()
		if ctx.Err() != nil {
			return nil
		}
		switch {
		case err != nil && !failing:
			s.Log.Warn("the audit log cannot be sealed; it is tried again at every turn", zap.Error(err))
		case err == nil && failing:
			s.Log.Info("the audit log is sealed again")
		}
		if failing = err != nil; !failing {
			s.Metrics.sealedUpTo.Set(float64(time.Now().Add(-sealing.Unsealed).UnixMilli()) / 1000)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(s.SealEvery*3/4 + rand.N(s.SealEvery/2)):
		}
	}
}
