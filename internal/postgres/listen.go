package postgres

import (
	"context"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/tenantry/tenantry/internal/tenant"
)

// tenantChannel carries the ids of tenants that changed state, between replicas.
const tenantChannel = "tenantry_tenants"

// relisten is how long to wait before listening again after the connection broke.
const relisten = time.Second

// A hub passes on, inside this process, which tenants changed.
type hub struct {
	mu      sync.Mutex
	waiters map[tenant.ID]map[chan struct{}]struct{} // guarded by mu
}

func newHub() *hub { return &hub{waiters: map[tenant.ID]map[chan struct{}]struct{}{}} }

// Watch returns a channel that receives when the tenant may have changed, and a
// func that ends the watching. Changes in quick succession are one receive, and
// a receive may come without a change: the row says what is so. A wake-up can
// be lost while the connection that listens is away, so look at the row now and
// then all the same.
func (db *DB) Watch(id tenant.ID) (changed <-chan struct{}, stop func()) {
	h, ch := db.hub, make(chan struct{}, 1)
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.waiters[id] == nil {
		h.waiters[id] = map[chan struct{}]struct{}{}
	}
	h.waiters[id][ch] = struct{}{}
	return ch, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.waiters[id], ch)
		if len(h.waiters[id]) == 0 {
			delete(h.waiters, id)
		}
	}
}

func (h *hub) wake(id tenant.ID) {
	h.mu.Lock()
	defer h.mu.Unlock()
	wake(h.waiters[id])
}

func (h *hub) wakeAll() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, waiters := range h.waiters {
		wake(waiters)
	}
}

func wake(waiters map[chan struct{}]struct{}) {
	for ch := range waiters {
		select {
		case ch <- struct{}{}:
		default: // it has a wake-up waiting already
		}
	}
}

// Listen passes changes made by any replica on to those who Watch, until ctx
// ends. It survives the loss of its connection.
func (db *DB) Listen(ctx context.Context, log *zap.Logger) error {
	for broken := false; ; {
		err := db.listenOnce(ctx, func() {
			if broken {
				log.Info("listening for changes again")
			}
			broken = false
			// What changed while nobody listened is unknown.
			db.hub.wakeAll()
		})
		if ctx.Err() != nil {
			return nil
		}
		if !broken {
			log.Warn("lost the connection that listens for changes; waiting requests look for themselves", zap.Error(err))
		}
		broken = true
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(relisten):
		}
	}
}

func (db *DB) listenOnce(ctx context.Context, listening func()) error {
	// A connection of its own: one that listens must not go back to a pool.
	conn, err := db.sessions.connect(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	if _, err := conn.Exec(ctx, `LISTEN `+tenantChannel); err != nil {
		return err
	}
	listening()
	for {
		n, err := conn.WaitForNotification(ctx)
		if err != nil {
			return err
		}
		db.hub.wake(tenant.ID(n.Payload))
	}
}
