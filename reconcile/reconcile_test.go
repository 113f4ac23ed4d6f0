package reconcile

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is a kernel with named objects; broken ones can't be applied.
type world struct {
	mu       sync.Mutex
	have     map[string]bool
	broken   map[string]bool
	observe  error
	attempts map[string]int
	drainEnd time.Time
}

type op struct {
	name string
	add  bool
}

func (o op) Object() string { return o.name }
func (o op) String() string { return fmt.Sprintf("set %s=%t", o.name, o.add) }

func newWorld() *world {
	return &world{have: map[string]bool{}, broken: map[string]bool{}, attempts: map[string]int{}}
}

func (w *world) Observe(context.Context, []string) ([]string, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []string
	for n := range w.have {
		out = append(out, n)
	}
	return out, w.observe
}

func (w *world) Diff(want, have []string, now time.Time) (ops []Op, next time.Time) {
	for _, n := range want {
		if !slices.Contains(have, n) {
			ops = append(ops, op{n, true})
		}
	}
	for _, n := range have {
		if !slices.Contains(want, n) {
			if end := w.drainEnd; now.Before(end) {
				next = end
				continue
			}
			ops = append(ops, op{n, false})
		}
	}
	return ops, next
}

func (w *world) Apply(_ context.Context, o Op) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	x := o.(op)
	w.attempts[x.name]++
	if w.broken[x.name] {
		return errors.New("no such device")
	}
	if x.add {
		w.have[x.name] = true
	} else {
		delete(w.have, x.name)
	}
	return nil
}

func (w *world) do(fn func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	fn()
}

func (w *world) names() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []string
	for n := range w.have {
		out = append(out, n)
	}
	slices.Sort(out)
	return out
}

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if cond() {
			return
		}
	}
	t.Fatalf("never: %s", what)
}

// start runs a loop until the test ends.
func start(t *testing.T, w *world, opt Options) *Loop[[]string, []string] {
	t.Helper()
	opt.Log = slog.New(slog.DiscardHandler)
	l := New("test", w, opt)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		l.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return l
}

func TestNothingHappensBeforeTheFirstSet(t *testing.T) {
	w := newWorld()
	w.have["foreign"] = true
	l := start(t, w, Options{Period: time.Millisecond})
	l.Wake()
	passes := l.Last()
	if passes.Gen != 0 || len(w.names()) != 1 {
		t.Fatalf("a pass ran before Set: %+v, have %v", passes, w.names())
	}
	l.Set(nil)
	eventually(t, "the unwanted object goes", func() bool { return len(w.names()) == 0 })
}

func TestConvergesAndRepairs(t *testing.T) {
	w := newWorld()
	l := start(t, w, Options{Period: 5 * time.Millisecond})
	gen := l.Set([]string{"a", "b"})
	eventually(t, "a and b exist", func() bool { return slices.Equal(w.names(), []string{"a", "b"}) })
	eventually(t, "the generation is applied", func() bool { return l.Applied() == gen })
	w.do(func() { delete(w.have, "a") })
	eventually(t, "a is back, with no notice", func() bool { return slices.Equal(w.names(), []string{"a", "b"}) })
	l.Set([]string{"b", "c"})
	eventually(t, "c replaced a", func() bool { return slices.Equal(w.names(), []string{"b", "c"}) })
}

func TestOneFailureStopsNothingElse(t *testing.T) {
	w := newWorld()
	w.broken["bad"] = true
	l := start(t, w, Options{Period: time.Hour})
	gen := l.Set([]string{"a", "bad", "z"})
	eventually(t, "a and z exist", func() bool { return slices.Equal(w.names(), []string{"a", "z"}) })
	eventually(t, "bad is retried without a wake", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.attempts["bad"] >= 3
	})
	if l.Applied() >= gen {
		t.Error("a generation with a failed object counts as applied")
	}
	st := l.Status()
	if len(st) != 3 || st[0].Object != "bad" || st[0].Phase != Failed || st[0].Err != "no such device" || st[0].Tries < 2 {
		t.Errorf("status = %+v", st)
	}
	w.do(func() { delete(w.broken, "bad") })
	eventually(t, "bad exists at last", func() bool { return len(w.names()) == 3 })
	eventually(t, "the generation is applied", func() bool { return l.Applied() == gen })
	for _, o := range l.Status() {
		if o.Phase != Done {
			t.Errorf("still %+v", o)
		}
	}
}

func TestBackoffHoldsOnlyTheFailedObject(t *testing.T) {
	w := newWorld()
	w.broken["bad"] = true
	var mu sync.Mutex
	held := 0
	l := start(t, w, Options{Period: time.Hour, OnPass: func(p Pass) {
		mu.Lock()
		held += p.Held
		mu.Unlock()
	}})
	l.Set([]string{"bad"})
	eventually(t, "bad failed a few times", func() bool {
		w.mu.Lock()
		defer w.mu.Unlock()
		return w.attempts["bad"] >= 2
	})
	// A wake while bad backs off works on the rest and leaves bad alone.
	w.do(func() { w.attempts["bad"] = 0 })
	l.Set([]string{"bad", "new"})
	eventually(t, "new exists", func() bool { return slices.Equal(w.names(), []string{"new"}) })
	mu.Lock()
	defer mu.Unlock()
	if held == 0 {
		t.Error("no operation was ever held back")
	}
}

// batcher is a world that applies many operations at once.
type batcher struct {
	*world
	mu    sync.Mutex
	sizes []int
}

func (b *batcher) ApplyAll(ctx context.Context, ops []Op) []error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.sizes = append(b.sizes, len(ops))
	var errs []error
	for _, o := range ops {
		errs = append(errs, b.Apply(ctx, o))
	}
	return errs
}

// Diff does everything to z, and to nothing else, twice.
func (b *batcher) Diff(want, have []string, now time.Time) ([]Op, time.Time) {
	ops, next := b.world.Diff(want, have, now)
	for _, o := range ops {
		if o.Object() == (op{"z", true}).Object() {
			ops = append(ops, o)
		}
	}
	return ops, next
}

func TestBatch(t *testing.T) {
	b := &batcher{world: newWorld()}
	b.broken["bad"] = true
	b.broken["z"] = true
	l := New("test", b, Options{Period: time.Hour, Log: slog.New(slog.DiscardHandler)})
	l.Set([]string{"a", "b", "bad", "c", "z"})
	l.pass(t.Context())
	// The second operation on z waits for the first, and is held back as that failed.
	if p := l.Last(); !slices.Equal(b.sizes, []int{5}) || p.Ops != 3 || p.Held != 1 || p.Err == nil {
		t.Errorf("applied in batches of %v: %+v", b.sizes, p)
	}
	if got := b.names(); !slices.Equal(got, []string{"a", "b", "c"}) {
		t.Errorf("have %v", got)
	}
	var failed []string
	for _, o := range l.Failed() {
		failed = append(failed, o.Object)
	}
	if !slices.Equal(failed, []string{"bad", "z"}) {
		t.Errorf("failed: %v", failed)
	}
	b.broken = map[string]bool{}
	b.sizes = nil
	time.Sleep(backoffMin)
	l.pass(t.Context())
	if p := l.Last(); !slices.Equal(b.sizes, []int{2, 1}) || p.Ops != 3 || !p.Clean() {
		t.Errorf("applied in batches of %v: %+v", b.sizes, p)
	}
}

func TestFailedObjectThatIsNoLongerWantedIsForgotten(t *testing.T) {
	w := newWorld()
	w.broken["bad"] = true
	l := start(t, w, Options{Period: time.Millisecond})
	l.Set([]string{"bad"})
	eventually(t, "bad is reported", func() bool { return len(l.Status()) == 1 })
	l.Set(nil)
	eventually(t, "bad is forgotten", func() bool { return len(l.Status()) == 0 })
}

func TestObserveErrorIsRetriedAndReported(t *testing.T) {
	w := newWorld()
	w.observe = errors.New("no permission")
	l := start(t, w, Options{Period: time.Hour})
	l.Set([]string{"a"})
	eventually(t, "the error is in the status", func() bool {
		st := l.Status()
		return len(st) == 1 && st[0].Err == "no permission"
	})
	if len(w.names()) != 0 {
		t.Error("applied a diff against an observation that failed")
	}
	w.do(func() { w.observe = nil })
	eventually(t, "a exists", func() bool { return len(w.names()) == 1 })
	eventually(t, "the status is clean", func() bool {
		st := l.Status()
		return len(st) == 1 && st[0].Object == "a" && st[0].Phase == Done
	})
}

func TestDiffNamesItsNextMoment(t *testing.T) {
	w := newWorld()
	w.have["old"] = true
	w.drainEnd = time.Now().Add(50 * time.Millisecond)
	l := start(t, w, Options{Period: time.Hour})
	l.Set(nil)
	eventually(t, "old goes when its drain ends", func() bool { return len(w.names()) == 0 })
	if time.Now().Before(w.drainEnd) {
		t.Error("old went before its time")
	}
}

// same is a world whose wants can be compared, and that counts how often it is read.
type same struct {
	*world
	observed, compared int
}

func (s *same) Same(a, b []string) bool {
	s.do(func() { s.compared++ })
	return slices.Equal(a, b)
}

func (s *same) Observe(ctx context.Context, want []string) ([]string, error) {
	s.do(func() { s.observed++ })
	return s.world.Observe(ctx, want)
}

// TestTheSameWantNeedsNoPass: what the kernel was seen to follow is not read again for
// a want that asks for the same, unless something may have changed it since.
func TestTheSameWantNeedsNoPass(t *testing.T) {
	w := &same{world: newWorld()}
	var mu sync.Mutex
	var passes []Pass
	l := New("test", w, Options{Period: time.Hour, Log: slog.New(slog.DiscardHandler), OnPass: func(p Pass) {
		mu.Lock()
		passes = append(passes, p)
		mu.Unlock()
	}})
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { l.Run(ctx) })
	defer func() {
		cancel()
		wg.Wait()
	}()
	// set has a want applied, and returns what its pass said and how often the kernel
	// was read by then.
	set := func(want ...string) (Pass, int) {
		t.Helper()
		var gen uint64
		if want == nil {
			gen = l.Keep()
		} else {
			gen = l.Set(want)
		}
		eventually(t, "a pass for the want", func() bool { return l.Last().Gen == gen })
		var last Pass
		eventually(t, "the pass is told of", func() bool {
			mu.Lock()
			defer mu.Unlock()
			last = passes[len(passes)-1]
			return last.Gen == gen
		})
		n := 0
		w.do(func() { n = w.observed })
		return last, n
	}
	if p, n := set("a"); p.Spared || n != 1 {
		t.Fatalf("the first: %+v, read %d times", p, n)
	}
	for range 3 {
		if p, n := set("a"); !p.Spared || n != 1 || l.Applied() != p.Gen {
			t.Fatalf("the same again: %+v, applied %d, read %d times", p, l.Applied(), n)
		}
	}
	if p, n := set(); !p.Spared || n != 1 || l.Applied() != p.Gen {
		t.Fatalf("kept: %+v, applied %d, read %d times", p, l.Applied(), n)
	}
	w.do(func() {
		if w.compared != 3 {
			t.Errorf("compared %d times for three wants; what is kept needs none", w.compared)
		}
	})
	if p, n := set("a", "b"); p.Spared || n != 2 || !slices.Equal(w.names(), []string{"a", "b"}) {
		t.Fatalf("another: %+v, read %d times, have %v", p, n, w.names())
	}
	// The kernel may have changed.
	w.do(func() { delete(w.have, "b") })
	l.Wake()
	eventually(t, "b is back", func() bool { return len(w.names()) == 2 })
	if p, n := set("a", "b"); !p.Spared || n != 3 {
		t.Fatalf("after a notice was heeded: %+v, read %d times", p, n)
	}
	// What failed is not applied by being asked for again.
	w.do(func() { w.broken["c"] = true })
	if p, _ := set("c"); p.Clean() {
		t.Fatalf("a broken one: %+v", p)
	}
	for _, again := range [][]string{{"c"}, nil} {
		if p, _ := set(again...); p.Spared || p.Clean() || l.Applied() == p.Gen {
			t.Fatalf("a broken one again: %+v, applied %d", p, l.Applied())
		}
	}
}

// TestAWakeThatAPassHasHeeded: a want that came as a pass was beginning is that pass's,
// and its wake, which is heard afterwards, asks for nothing.
func TestAWakeThatAPassHasHeeded(t *testing.T) {
	w := &same{world: newWorld()}
	told := 0
	l := New("test", w, Options{Period: time.Hour, Log: slog.New(slog.DiscardHandler), OnPass: func(Pass) { told++ }})
	gen := l.Set([]string{"a"})
	l.pass(t.Context())
	if !l.spared() || told != 1 || l.Applied() != gen {
		t.Errorf("a second pass: told of %d, applied %d of %d", told, l.Applied(), gen)
	}
	l.Wake()
	if l.spared() {
		t.Error("no pass for a notice")
	}
	l.pass(t.Context())
	w.do(func() { w.broken["b"] = true })
	l.Set([]string{"b"})
	l.pass(t.Context())
	if l.spared() {
		t.Error("no pass for what failed")
	}
}
