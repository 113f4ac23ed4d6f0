package control

import (
	"context"
	"sync"
	"time"

	"connectrpc.com/connect"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/control/state"
)

// eventLog remembers the last events, for those who watch. Every manager keeps
// its own, of what it has applied since its start.
type eventLog struct {
	mu      sync.Mutex
	first   uint64 // number of ring[0]
	ring    []*shoalv1.Event
	changed bell
}

// eventMemory is how many events are remembered.
const eventMemory = 1024

func newEventLog() *eventLog { return &eventLog{changed: make(bell)} }

func (l *eventLog) add(at time.Time, events []state.Event) {
	if len(events) == 0 {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range events {
		l.ring = append(l.ring, &shoalv1.Event{AtMs: at.UnixMilli(), Type: e.Type, Action: e.Action, Id: e.ID, Name: e.Name, Attributes: e.Attributes})
	}
	if over := len(l.ring) - eventMemory; over > 0 {
		l.ring = append([]*shoalv1.Event(nil), l.ring[over:]...)
		l.first += uint64(over)
	}
	l.changed.ring()
}

// from returns the events from a number on, the number after the last, and what
// is closed when there are more.
func (l *eventLog) from(n uint64) ([]*shoalv1.Event, uint64, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	end := l.first + uint64(len(l.ring))
	n = min(max(n, l.first), end)
	return append([]*shoalv1.Event(nil), l.ring[n-l.first:]...), end, l.changed
}

// Events streams what happens, until the client has enough or another manager
// leads.
func (s *service) Events(ctx context.Context, req *connect.Request[shoalv1.EventsRequest], stream *connect.ServerStream[shoalv1.Event]) error {
	term, err := s.m.sureTerm()
	if err != nil {
		return err
	}
	_, next, _ := s.m.fsm.events.from(0)
	if req.Msg.SinceMs > 0 {
		next = 0
	}
	// The header tells the client that nothing from now on is missed.
	if err := stream.Send(nil); err != nil {
		return err
	}
	until := req.Msg.UntilMs
	var over <-chan time.Time
	if until > 0 {
		t := time.NewTimer(time.Until(time.UnixMilli(until)))
		defer t.Stop()
		over = t.C
	}
	for {
		events, after, changed := s.m.fsm.events.from(next)
		for _, e := range events {
			if e.AtMs < req.Msg.SinceMs || until > 0 && e.AtMs > until {
				continue
			}
			if err := stream.Send(e); err != nil {
				return err
			}
		}
		next = after
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-term.Done():
			return errNotLeader()
		case <-over:
			// What came up to that moment is all there now.
			if after, end, _ := s.m.fsm.events.from(next); len(after) == 0 || end == next {
				return nil
			}
			closed := make(chan time.Time)
			close(closed)
			over = closed
		case <-changed:
		}
	}
}
