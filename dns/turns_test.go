package dns

import (
	"context"
	"slices"
	"sync"
	"testing"
	"time"
)

// waits tells how many wait for a turn.
func (t *turns) waits() (n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, q := range t.ring {
		n += len(q.waiting)
	}
	return n
}

// TestTurns: of two tasks that wait each has every second turn, however many the one has
// waiting, and who came first of one task is first.
func TestTurns(t *testing.T) {
	tu := newTurns(1)
	a, b := new(asking), new(asking)
	if err := tu.take(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var order []string
	var wg sync.WaitGroup
	for i, x := range []struct {
		who  *asking
		name string
	}{{a, "a1"}, {a, "a2"}, {a, "a3"}, {a, "a4"}, {b, "b1"}, {b, "b2"}} {
		wg.Go(func() {
			if err := tu.take(t.Context(), x.who); err != nil {
				t.Error(err)
			}
			mu.Lock()
			order = append(order, x.name)
			mu.Unlock()
			tu.give()
		})
		for end := time.Now().Add(10 * time.Second); tu.waits() != i+1; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s does not wait", x.name)
			}
		}
	}
	tu.give()
	wg.Wait()
	if want := []string{"a1", "b1", "a2", "b2", "a3", "a4"}; !slices.Equal(order, want) {
		t.Errorf("turns: %v, want %v", order, want)
	}
	if tu.free != 1 || len(tu.ring) != 0 || len(tu.of) != 0 {
		t.Errorf("left: %d free, %d in the ring, %d known", tu.free, len(tu.ring), len(tu.of))
	}
}

// TestTurnsOfThoseWhoLeave are others': none is lost, none is there twice.
func TestTurnsOfThoseWhoLeave(t *testing.T) {
	tu := newTurns(2)
	var wg sync.WaitGroup
	var mu sync.Mutex
	at, most := 0, 0
	for i := range 8 {
		who := new(asking)
		for j := range 50 {
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), time.Duration((i*50+j)%7)*time.Millisecond)
				defer cancel()
				if tu.take(ctx, who) != nil {
					return
				}
				mu.Lock()
				at++
				most = max(most, at)
				mu.Unlock()
				time.Sleep(100 * time.Microsecond)
				mu.Lock()
				at--
				mu.Unlock()
				tu.give()
			})
		}
	}
	wg.Wait()
	if most > 2 {
		t.Errorf("%d at once, want 2", most)
	}
	if tu.free != 2 || len(tu.ring) != 0 || len(tu.of) != 0 {
		t.Errorf("left: %d free, %d in the ring, %d known", tu.free, len(tu.ring), len(tu.of))
	}
}
