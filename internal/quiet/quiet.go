// Package quiet is a slog.Handler that folds what is said again and again, so that
// no stream of bad packets, and no object that fails in every pass, fills a disk
// or hides what else happened.
package quiet

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"time"
)

const (
	// Window is the time that repeats are counted in.
	Window = 10 * time.Second
	// Same is how many records with the same message and attributes pass in a
	// window, Alike how many with the same message.
	Same, Alike = 3, 20

	maxKeys = 4096 // beyond, all is forgotten: memory has a bound, the log may say a little more
)

// Handler passes records on to another handler. The first after a time in which
// some were left out says how many, as the attribute "left_out". Debug records all
// pass: who asks for them wants them.
type Handler struct {
	next slog.Handler
	// With says what loggers made by With and WithGroup add: part of what is the same.
	with string
	*state
}

type state struct {
	now func() time.Time

	mu   sync.Mutex
	seen map[string]*window
}

type window struct {
	since   time.Time
	n, over int
}

// New makes a Handler in front of another.
func New(next slog.Handler) *Handler {
	return &Handler{next: next, state: &state{now: time.Now, seen: map[string]*window{}}}
}

// Enabled implements slog.Handler.
func (h *Handler) Enabled(ctx context.Context, l slog.Level) bool { return h.next.Enabled(ctx, l) }

// WithAttrs implements slog.Handler.
func (h *Handler) WithAttrs(as []slog.Attr) slog.Handler {
	var b strings.Builder
	for _, a := range as {
		b.WriteString(" " + a.String())
	}
	return &Handler{h.next.WithAttrs(as), h.with + b.String(), h.state}
}

// WithGroup implements slog.Handler.
func (h *Handler) WithGroup(name string) slog.Handler {
	return &Handler{h.next.WithGroup(name), h.with + " " + name + ":", h.state}
}

// Handle implements slog.Handler.
func (h *Handler) Handle(ctx context.Context, r slog.Record) error {
	if r.Level < slog.LevelInfo {
		return h.next.Handle(ctx, r)
	}
	alike := r.Level.String() + " " + r.Message
	var b strings.Builder
	b.WriteString(alike + "\x00" + h.with)
	r.Attrs(func(a slog.Attr) bool {
		b.WriteString(" " + a.String())
		return true
	})
	h.mu.Lock()
	now := h.now()
	if len(h.seen) > maxKeys {
		clear(h.seen)
	}
	over, ok := h.pass(b.String(), now, Same)
	if ok {
		// One that is left out for the message's sake counts there only.
		var more int
		more, ok = h.pass(alike, now, Alike)
		over += more
	}
	h.mu.Unlock()
	if !ok {
		return nil
	}
	if over > 0 {
		r = r.Clone()
		r.AddAttrs(slog.Int("left_out", over))
	}
	return h.next.Handle(ctx, r)
}

// pass counts one record. It tells whether it is among the first of its window,
// and how many of the window before were not.
func (s *state) pass(key string, now time.Time, most int) (over int, ok bool) {
	w := s.seen[key]
	if w == nil || now.Sub(w.since) >= Window || now.Before(w.since) {
		if w != nil {
			over = w.over
		}
		s.seen[key] = &window{since: now, n: 1}
		return over, true
	}
	if w.n++; w.n > most {
		w.over++
		return 0, false
	}
	return 0, true
}
