package httpapi_test

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/tenantry/tenantry/internal/httpapi"
	"github.com/tenantry/tenantry/internal/provision"
	"github.com/tenantry/tenantry/internal/provision/provisiontest"
	"github.com/tenantry/tenantry/internal/tenant"
)

// BenchmarkSignUpThatBuilds measures what Tenantry adds to the two upstream calls
// of a sign-up: own-ms is the median of the whole less their latency.
func BenchmarkSignUpThatBuilds(b *testing.B) {
	const latency = 100 * time.Millisecond
	w := provisiontest.New(b)
	w.Settings(map[string]any{"latency_ms": latency.Milliseconds()})
	r := w.Start(provisiontest.Options{Adjust: func(c *provision.Config) { c.SweepEvery = time.Second }})
	srv := httptest.NewServer(httpapi.New(httpapi.Config{Service: r.Service, DB: r.DB, Log: zap.NewNop(), Metrics: httpapi.NewMetrics(r.Reg)}))
	b.Cleanup(srv.Close)
	token, text := tenant.NewToken()
	if _, err := r.DB.AddCaller(b.Context(), token, tenant.NewCaller{Name: "bench", Role: tenant.Provisioner}, tenant.Actor{Name: "bench"}); err != nil {
		b.Fatal(err)
	}
	var own []time.Duration
	for i := 0; b.Loop(); i++ {
		req, err := http.NewRequestWithContext(b.Context(), http.MethodPut, fmt.Sprint(srv.URL, "/v1/tenants/user_", i), strings.NewReader(""))
		if err != nil {
			b.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+text.Reveal())
		began := time.Now()
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			b.Fatal(err)
		}
		_ = resp.Body.Close()
		own = append(own, time.Since(began)-2*latency)
		if resp.StatusCode != http.StatusCreated {
			b.Fatalf("sign-up answers %s", resp.Status)
		}
	}
	slices.Sort(own)
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	b.ReportMetric(ms(own[len(own)/2]), "own-ms")
	b.ReportMetric(ms(own[len(own)*99/100]), "own-p99-ms")
}

// A sink is a response that nobody reads.
type sink struct {
	header http.Header
	status int
	bytes  int
}

func (s *sink) Header() http.Header              { return s.header }
func (s *sink) WriteHeader(status int)           { s.status = status }
func (s *sink) Write(b []byte) (int, error)      { s.bytes += len(b); return len(b), nil }
func (s *sink) SetReadDeadline(time.Time) error  { return nil }
func (s *sink) SetWriteDeadline(time.Time) error { return nil }

// serveInto answers req into a sink that is as good as new, and reports whether it was
// answered so.
func serveInto(b *testing.B, s *sink, h http.Handler, req *http.Request, status int) {
	clear(s.header)
	s.status, s.bytes = http.StatusOK, 0
	h.ServeHTTP(s, req)
	if s.status != status {
		b.Fatalf("%s %s answers %d", req.Method, req.URL.Path, s.status)
	}
}

// discarded is the log as serve writes it, to nowhere.
func discarded() *zap.Logger {
	cfg := zap.NewProductionEncoderConfig()
	cfg.EncodeTime, cfg.EncodeDuration = zapcore.ISO8601TimeEncoder, zapcore.StringDurationEncoder
	return zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(cfg), zapcore.AddSync(io.Discard), zapcore.InfoLevel))
}

func request(b *testing.B, method, path, token string, headers ...string) *http.Request {
	req := httptest.NewRequestWithContext(b.Context(), method, path, nil)
	req.Header.Set("Authorization", "Bearer "+token)
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	return req
}

// A benched is an API, and a caller of it, without a network in between.
type benched struct {
	world   *provisiontest.World
	replica *provisiontest.Replica
	handler http.Handler
	token   string
}

func newBenched(b *testing.B) benched {
	w := provisiontest.New(b)
	r := w.Start(provisiontest.Options{})
	token, text := tenant.NewToken()
	if _, err := r.DB.AddCaller(b.Context(), token, tenant.NewCaller{Name: "bench", Role: tenant.Provisioner}, tenant.Actor{Name: "bench"}); err != nil {
		b.Fatal(err)
	}
	return benched{w, r, httpapi.New(httpapi.Config{Service: r.Service, DB: r.DB, Log: discarded(), Metrics: httpapi.NewMetrics(r.Reg)}), text.Reveal()}
}

// BenchmarkLookUp is what a look-up costs the handler, with the log that serve writes:
// plain, and with the header that sends it to Postgres, whose round trips are in the time.
func BenchmarkLookUp(b *testing.B) {
	s := newBenched(b)
	out := &sink{header: http.Header{}}
	serveInto(b, out, s.handler, request(b, http.MethodPut, "/v1/tenants/user_1", s.token, "Prefer", "wait=30"), http.StatusCreated)
	for name, headers := range map[string][]string{"plain": nil, "uncached": {"Cache-Control", "no-cache"}} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			req := request(b, http.MethodGet, "/v1/tenants/user_1", s.token, headers...)
			for b.Loop() {
				serveInto(b, out, s.handler, req, http.StatusOK)
			}
		})
	}
}

// BenchmarkSignUpPooled is what a sign-up costs that finds a ready app, the round trip to
// Postgres included. Commits need not reach a disk here.
func BenchmarkSignUpPooled(b *testing.B) {
	s := newBenched(b)
	conn, err := pgx.Connect(b.Context(), s.world.URL.Reveal())
	if err != nil {
		b.Fatal(err)
	}
	out := &sink{header: http.Header{}}
	const chunk = 1000
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if i%chunk == 0 {
			b.StopTimer()
			s.fillPool(b, conn, i, chunk)
			b.StartTimer()
		}
		serveInto(b, out, s.handler, request(b, http.MethodPut, fmt.Sprint("/v1/tenants/user_", i), s.token), http.StatusCreated)
	}
}

// fillPool makes n ready apps, in the database only.
func (s benched) fillPool(b *testing.B, conn *pgx.Conn, from, n int) {
	app := func(i int) string { return fmt.Sprint("ready-", from+i) }
	now := time.Now()
	_, err := conn.CopyFrom(b.Context(), pgx.Identifier{"apps"},
		[]string{"id", "profile", "profile_revision", "state", "made_at", "ready_at", "proven_at"},
		pgx.CopyFromSlice(n, func(i int) ([]any, error) {
			return []any{app(i), tenant.DefaultProfile, "any", "ready", now, now, now}, nil
		}))
	if err != nil {
		b.Fatal(err)
	}
	if _, err := conn.CopyFrom(b.Context(), pgx.Identifier{"keys"},
		[]string{"id", "app_id", "name", "state", "scopes", "ciphertext", "fingerprint", "activated_at"},
		pgx.CopyFromSlice(n, func(i int) ([]any, error) {
			text := make([]byte, 16)
			_, _ = rand.Read(text) // never fails
			id, secret := uuid.New(), tenant.NewSecret(hex.EncodeToString(text))
			sealed, err := s.world.Keys.Seal(id, secret)
			return []any{id, app(i), tenant.DefaultKey, "active", []string{tenant.ScopeAll}, sealed, s.world.Keys.Fingerprint(secret), now}, err
		})); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkLayers peels a look-up: each line has one layer more than the one before. What
// BenchmarkLookUp/plain takes beyond the last is the caller's token and the look-up itself.
func BenchmarkLayers(b *testing.B) {
	now := time.Now()
	found := tenant.Tenant{ID: "user_1", Generation: 1, State: tenant.Active, AppID: "tny-01m850r4k8f8q1gfz296qn3hgc", Version: 2, CreatedAt: now, UpdatedAt: now}
	found.Profile, found.DisplayName, found.Labels = tenant.DefaultProfile, "Ada", map[string]string{"plan": "pro"}
	for i, name := range httpapi.Layers {
		b.Run(fmt.Sprint(i+1, " ", name), func(b *testing.B) {
			b.ReportAllocs()
			h := httpapi.Peeled(i+1, discarded(), found)
			out, req := &sink{header: http.Header{}}, request(b, http.MethodGet, "/v1/tenants/user_1", "none")
			for b.Loop() {
				serveInto(b, out, h, req, http.StatusOK)
			}
		})
	}
}
