package quiet

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"
)

func setup() (*slog.Logger, *bytes.Buffer, *time.Time) {
	var out bytes.Buffer
	now := time.Unix(1000, 0)
	h := New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug}))
	h.now = func() time.Time { return now }
	return slog.New(h), &out, &now
}

func TestRepeats(t *testing.T) {
	log, out, now := setup()
	for range 1000 {
		log.Warn("a bad message", "from", "10.0.0.1")
	}
	if n := strings.Count(out.String(), "\n"); n != Same {
		t.Errorf("1000 of the same: %d lines, want %d", n, Same)
	}
	// Another object's is another line, up to a bound.
	out.Reset()
	for i := range 1000 {
		log.Error("failed", "op", i)
	}
	if n := strings.Count(out.String(), "\n"); n != Alike {
		t.Errorf("1000 alike: %d lines, want %d", n, Alike)
	}
	// What else is said passes, and so does the same later, with what was left out.
	out.Reset()
	log.Info("else")
	*now = now.Add(Window)
	log.Warn("a bad message", "from", "10.0.0.1")
	if s := out.String(); !strings.Contains(s, "else") || !strings.Contains(s, fmt.Sprintf("left_out=%d", 1000-Same)) {
		t.Errorf("later: %s", s)
	}
	out.Reset()
	log.Warn("a bad message", "from", "10.0.0.1")
	if s := out.String(); strings.Contains(s, "left_out") || s == "" {
		t.Errorf("said twice: %q", s)
	}
	// A clock that is put back keeps nobody quiet.
	out.Reset()
	*now = now.Add(-24 * time.Hour)
	log.Warn("a bad message", "from", "10.0.0.1")
	if out.Len() == 0 {
		t.Error("quiet after the clock was put back")
	}
}

func TestLoggersAndDebug(t *testing.T) {
	log, out, _ := setup()
	a, b := log.With("task", "a"), log.WithGroup("g").With("task", "b")
	for range 10 {
		a.Warn("x")
		b.Warn("x")
	}
	if n := strings.Count(out.String(), "\n"); n != 2*Same {
		t.Errorf("of two loggers: %d lines, want %d", n, 2*Same)
	}
	out.Reset()
	for range 50 {
		log.Debug("d")
	}
	if n := strings.Count(out.String(), "\n"); n != 50 {
		t.Errorf("debug: %d lines", n)
	}
}

func TestMemoryHasABound(t *testing.T) {
	log, _, _ := setup()
	h := log.Handler().(*Handler)
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for i := range 2 * maxKeys {
				log.Warn(fmt.Sprint("m", g, i))
			}
		})
	}
	wg.Wait()
	if n := len(h.seen); n > maxKeys+2 {
		t.Errorf("%d keys are kept", n)
	}
}
