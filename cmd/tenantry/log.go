package main

import (
	"io"
	"sync"
	"time"

	"go.uber.org/zap/zapcore"
)

const (
	// logDelay is how long a line below a warning may lie in memory, where a process that is
	// killed loses it: a system call for the line of each request is a good part of what one
	// costs that is answered from memory.
	logDelay = 100 * time.Millisecond
	logSize  = 64 << 10 // of the buffer, from which on nothing waits
)

// A lateWriter writes several lines at once. It is safe for use by many goroutines. A write that
// fails loses its lines, and no later ones: zap's BufferedWriteSyncer would write nothing any more.
type lateWriter struct {
	to io.Writer

	mu    sync.Mutex
	lines []byte // guarded by mu
	due   bool   // a flush is coming; guarded by mu
}

func (w *lateWriter) Write(line []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.lines = append(w.lines, line...)
	switch {
	case len(w.lines) >= logSize:
		w.flushLocked()
	case !w.due:
		w.due = true
		time.AfterFunc(logDelay, w.flush)
	}
	return len(line), nil
}

// Sync is nothing: what is in the file system's hands survives this process.
func (w *lateWriter) Sync() error { return nil }

func (w *lateWriter) flush() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.due = false
	w.flushLocked()
}

func (w *lateWriter) flushLocked() {
	if len(w.lines) > 0 {
		_, _ = w.to.Write(w.lines) // there is nowhere to complain to
		w.lines = w.lines[:0]
	}
}

// A promptCore writes warnings, and all that came before them, at once.
type promptCore struct {
	zapcore.Core
	out *lateWriter
}

func (c promptCore) With(fields []zapcore.Field) zapcore.Core {
	return promptCore{c.Core.With(fields), c.out}
}

func (c promptCore) Check(e zapcore.Entry, to *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return to.AddCore(e, c)
	}
	return to
}

func (c promptCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	err := c.Core.Write(e, fields)
	if e.Level >= zapcore.WarnLevel {
		c.out.flush()
	}
	return err
}
