package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"time"
)

// How often a batch of tenants is signed up at once, and of how many: as many as get
// their apps in what sign-ups leave of the budget. Of hurryEvery of them one is signed up
// by itself before its turn.
const (
	batchEvery = 8 * time.Second
	batchSize  = 4
	hurryEvery = 10
)

// importMany signs one batch of tenants up after the other.
func (l *load) importMany(ctx context.Context, r *rand.Rand) {
	var all sync.WaitGroup
	defer all.Wait()
	ticker := time.NewTicker(batchEvery)
	defer ticker.Stop()
	for n := 0; ; n += batchSize {
		ones := make([]*life, batchSize)
		for i := range ones {
			ones[i] = l.begin(r, fmt.Sprintf("imported_%05d", n+i))
		}
		mine := rand.New(rand.NewPCG(r.Uint64(), 8))
		all.Go(func() { l.importBatch(ctx, mine, ones) })
		select {
		case <-ctx.Done():
			return
		case <-l.stop:
			return
		case <-ticker.C:
		}
	}
}

// importBatch repeats a batch until all of its tenants are active, as the README says, and
// then learns their keys. Once it is acknowledged that needs no caller; it is the way to
// see it.
func (l *load) importBatch(ctx context.Context, r *rand.Rand, ones []*life) {
	var items []string
	for _, one := range ones {
		items = append(items, fmt.Sprintf(`{"id":%q,"labels":{"imported":"yes"}}`, one.id))
	}
	body := `{"tenants":[` + strings.Join(items, ",") + `]}`
	acknowledged := false
	for waiting := true; waiting; {
		var answer struct {
			Results []struct {
				ID     string
				Status int
				Tenant struct{ State string }
			}
		}
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, l.to[r.IntN(len(l.to))].url+"/v1/tenants/batch", strings.NewReader(body))
		if err != nil {
			l.refuse("a batch: %v", err)
			return
		}
		req.Header.Set("Authorization", "Bearer "+l.s.token)
		l.requests.Add(1)
		status, raw, err := l.send(req)
		switch {
		case err != nil || status >= 500:
		case status != http.StatusOK || json.Unmarshal(raw, &answer) != nil || len(answer.Results) != len(ones):
			l.refuse("a batch is answered %d %.300s", status, raw)
			return
		default:
			waiting = false
			for i, result := range answer.Results {
				if result.ID != ones[i].id || result.Status != http.StatusOK && result.Status != http.StatusAccepted {
					l.refuse("%s in a batch is answered %.300s", ones[i].id, raw)
					return
				}
				waiting = waiting || result.Tenant.State != "active"
			}
			if !acknowledged && r.IntN(hurryEvery) < len(ones) {
				ones[r.IntN(len(ones))].put(ctx, "", "")
			}
			acknowledged = true
		}
		if !waiting {
			break
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(500*time.Millisecond + time.Duration(r.Int64N(int64(2*time.Second)))):
		}
	}
	for _, one := range ones {
		if !one.put(ctx, "", "") {
			return
		}
		one.arrives()
		l.count("imports")
	}
}
