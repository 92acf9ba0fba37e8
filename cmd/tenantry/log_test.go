package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/zap"
)

// lines remembers each write, and fails those that it is told to.
type lines struct {
	mu     sync.Mutex
	writes []string
	fail   bool
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fail {
		return 0, errors.New("the disk is full")
	}
	l.writes = append(l.writes, string(b))
	return len(b), nil
}

func (l *lines) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.writes)
}

func TestLog(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		out := &lines{}
		log, flush := serveCmd{LogLevel: "info", LogFormat: "json"}.logger(env{stderr: out})
		log.Info("one")
		log.Named("part").With(zap.Int("n", 2)).Info("two")
		if n := out.count(); n != 0 {
			t.Errorf("%d writes for two lines that may wait", n)
		}
		time.Sleep(2 * logDelay)
		if n := out.count(); n != 1 {
			t.Errorf("%d writes once the two lines had waited", n)
		}
		log.Info("three")
		log.With(zap.Int("n", 4)).Warn("four")
		if n := out.count(); n != 2 {
			t.Errorf("%d writes when a warning had come", n)
		}
		long := strings.Repeat("x", logSize)
		log.Info(long)
		if n := out.count(); n != 3 {
			t.Errorf("%d writes when the buffer was full", n)
		}
		out.mu.Lock()
		out.fail = true
		out.mu.Unlock()
		log.Warn("lost")
		out.mu.Lock()
		out.fail = false
		out.mu.Unlock()
		log.Info("five")
		flush()
		for i, want := range []string{"one two", "three four", long, "five"} {
			for _, word := range strings.Fields(want) {
				if i >= out.count() || !strings.Contains(out.writes[i], `"msg":"`+word+`"`) {
					t.Errorf("write %d of %d lacks %.20q", i+1, out.count(), word)
				}
			}
		}
		if all := strings.Join(out.writes, ""); bytes.Count([]byte(all), []byte("\n")) != 6 || strings.Contains(all, "lost") {
			t.Errorf("the log is %.500s", all)
		}
	})
}

// BenchmarkLog writes lines as of requests to a file, each by a system call and late.
func BenchmarkLog(b *testing.B) {
	for _, late := range []bool{false, true} {
		b.Run(fmt.Sprint("late=", late), func(b *testing.B) {
			f, err := os.Create(filepath.Join(b.TempDir(), "log"))
			if err != nil {
				b.Fatal(err)
			}
			defer func() { _ = f.Close() }()
			log, flush := serveCmd{LogLevel: "info", LogFormat: "json"}.logger(env{stderr: f})
			defer flush()
			for b.Loop() {
				log.Info("request", zap.String("request_id", "7f1b1d0e-8f57-4d21-a38b-4e0c1d4d3a52"), zap.String("route", "/v1/tenants/{tenant_id}"), zap.Int("status", 200))
				if !late {
					flush()
				}
			}
		})
	}
}
