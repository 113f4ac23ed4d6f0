package dns

import (
	"context"
	"sync"
)

// turns lets few questions at a time go on, those of different tasks by turns: the
// thousands that one task may ask at once would have every processor to themselves,
// before the questions of others, and before those that are answered here.
type turns struct {
	mu   sync.Mutex
	free int
	ring []*queue // of tasks that wait, the next in turn first
	of   map[*asking]*queue
}

// asking is who asks: the server of one task. Its address is its identity.
type asking struct{ asker func() *Asker }

// queue is what waits of one task, the oldest first.
type queue struct {
	who     *asking
	waiting []*turn
}

type turn struct {
	given chan struct{} // closed when it is this one's turn
	gone  bool          // it waits no more; guarded by turns.mu
}

func newTurns(n int) *turns { return &turns{free: n, of: map[*asking]*queue{}} }

// take waits for a turn, which has to be given back. Nobody has one after an error,
// which is ctx's.
func (t *turns) take(ctx context.Context, who *asking) error {
	t.mu.Lock()
	if t.free > 0 {
		t.free--
		t.mu.Unlock()
		return nil
	}
	q := t.of[who]
	if q == nil {
		q = &queue{who: who}
		t.of[who] = q
		t.ring = append(t.ring, q)
	}
	w := &turn{given: make(chan struct{})}
	q.waiting = append(q.waiting, w)
	t.mu.Unlock()
	select {
	case <-w.given:
		return nil
	case <-ctx.Done():
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	select {
	case <-w.given:
		t.next()
	default:
		w.gone = true
	}
	return ctx.Err()
}

// try takes a turn if one is to be had now.
func (t *turns) try() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.free == 0 {
		return false
	}
	t.free--
	return true
}

// give passes a turn on.
func (t *turns) give() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.next()
}

// next is give with t.mu held.
func (t *turns) next() {
	for len(t.ring) > 0 {
		q := t.ring[0]
		t.ring[0] = nil
		t.ring = t.ring[1:]
		for len(q.waiting) > 0 {
			w := q.waiting[0]
			q.waiting[0] = nil
			if q.waiting = q.waiting[1:]; !w.gone {
				close(w.given)
				if len(q.waiting) > 0 {
					t.ring = append(t.ring, q)
				} else {
					delete(t.of, q.who)
				}
				return
			}
		}
		delete(t.of, q.who)
	}
	t.free++
}
