// Package reconcile is the one loop that every data plane package runs:
// observe the kernel, diff it against what is wanted, apply, and again.
//
// A [Target] says what these three mean. The [Loop] owns when they happen:
//
//   - at once when [Loop.Set] brings another want, or [Loop.Wake] a notice
//     that the kernel changed; wakes that come during a pass fold into one
//     further pass. A want that says what the last one said ([Comparer]), which the
//     kernel follows, needs none;
//   - on a timer otherwise, because nobody tells us of every change: the
//     period is [Options.Period], stretched so that observing takes at most
//     one part in twenty of the time;
//   - when a Diff names a moment at which it will have something to do.
//
// A failed operation never stops a pass. Its object is retried with backoff
// (100 ms doubling to 10 s), while all others go on; operations on an object
// that backs off are left out until it is due. [Loop.Status] tells the state of
// every object the loop has touched.
//
// Have is always what Observe read in this pass, never what an earlier Apply
// meant to do, so a restart, a crash half way and a stranger's "ip link del"
// are one path.
package reconcile

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"
)

// Op is one idempotent change to one object. Deleting what is absent and
// adding what is there in the same form succeed.
type Op interface {
	// Object names what the operation changes, for status and backoff, such
	// as "network app: route 10.0.1.5/32".
	Object() string
	// String is the operation as a reader of a log wants it.
	String() string
}

// Remarker is an Op that may be no change but a remark on its object: something
// that is in the way and not ours to change. It is not applied, keeps nothing
// waiting, and is in [Loop.Remarks] as long as passes bring it.
type Remarker interface {
	// Remark is the text for a person, "" of an operation to be applied.
	Remark() string
}

// Target is what a data plane package brings. W is the wanted state, H the
// state read from the kernel. Its methods are called from one goroutine.
type Target[W, H any] interface {
	// Observe reads the kernel. It reports only what is marked as ours. With
	// an error the H may be partial and is not diffed.
	Observe(ctx context.Context, want W) (H, error)
	// Diff is pure. The operations come in the order to apply them: what
	// others need first, make before break, deletes last. A non-zero next is
	// when Diff would say more although nothing changed (the end of a drain).
	Diff(want W, have H, now time.Time) (ops []Op, next time.Time)
	// Apply carries one operation out.
	Apply(ctx context.Context, op Op) error
}

// Batcher is a Target whose operations cost less together than one by one.
type Batcher interface {
	// ApplyAll carries operations on different objects out, in their order, and
	// returns what Apply would have returned for each.
	ApplyAll(ctx context.Context, ops []Op) []error
}

// Comparer is a Target that tells whether two wants ask for the same.
type Comparer[W any] interface {
	Same(a, b W) bool
}

// Options of a Loop. The zero value is ready.
type Options struct {
	Period time.Duration // between passes that nothing asked for; 0: DefaultPeriod
	Log    *slog.Logger  // nil: slog.Default
	// OnPass, if set, is called after each pass from the loop's goroutine.
	OnPass func(Pass)
}

// DefaultPeriod keeps the promise that an object deleted by hand is back within
// two seconds even when no notice came.
const DefaultPeriod = time.Second

const (
	backoffMin = 100 * time.Millisecond
	backoffMax = 10 * time.Second
	// cryAfter is for how long an object fails before the log calls it an error:
	// some seven tries.
	cryAfter  = 10 * time.Second
	costShare = 20 // observing takes at most 1/costShare of the time
)

// Pass tells what one pass did.
type Pass struct {
	Gen uint64 // of the newest Set that this pass worked on
	// Spared: nothing was observed, as the kernel was seen or made to be so by the last
	// pass, and nobody has told of a change since.
	Spared  bool
	Ops     int   // applied without error
	Held    int   // left out: their object backs off
	Err     error // of Observe, and of every failed operation, joined
	Elapsed time.Duration
}

// Clean tells whether the kernel is as the want of generation Gen says.
func (p Pass) Clean() bool { return p.Err == nil && p.Held == 0 }

// Phase of an object.
type Phase string

// Phases.
const (
	Done   Phase = "done"
	Failed Phase = "error"
)

// ObjectStatus is the last thing that happened to an object.
type ObjectStatus struct {
	Object string    `json:"object"`
	Phase  Phase     `json:"phase"`
	Op     string    `json:"op"`
	Since  time.Time `json:"since"` // when the phase last changed
	Err    string    `json:"error,omitempty"`
	Tries  int       `json:"tries,omitempty"` // failures in a row
}

type object struct {
	ObjectStatus
	retryAt time.Time
	delay   time.Duration
	cried   bool // that it keeps failing was said
}

// Loop runs one Target. Make it with New, start it with Run.
type Loop[W, H any] struct {
	name   string
	target Target[W, H]
	opt    Options
	log    *slog.Logger
	wake   chan struct{}
	looks  chan func(context.Context)
	seen   func(H)

	mu      sync.Mutex
	want    W
	wants   uint64 // how many there were
	gen     uint64
	told    bool   // by Wake, since the last pass began
	worked  W      // what the newest pass worked on
	workedN uint64 // and which of the wants that was
	applied uint64 // newest generation that a clean pass worked on
	last    Pass
	objects map[string]*object
	remarks []string
}

// New makes a loop; name is for the log.
func New[W, H any](name string, t Target[W, H], opt Options) *Loop[W, H] {
	if opt.Period <= 0 {
		opt.Period = DefaultPeriod
	}
	if opt.Log == nil {
		opt.Log = slog.Default()
	}
	return &Loop[W, H]{name: name, target: t, opt: opt, log: opt.Log.With("reconciler", name),
		wake: make(chan struct{}, 1), looks: make(chan func(context.Context)), objects: map[string]*object{}}
}

// OnObserve has fn called with what each pass has observed, which fn must not
// change, from the loop's goroutine. Call it before Run.
func (l *Loop[W, H]) OnObserve(fn func(have H)) { l.seen = fn }

// Set replaces what is wanted and wakes the loop. It returns the generation to
// look for in Pass.Gen and Applied.
func (l *Loop[W, H]) Set(want W) uint64 {
	return l.ask(func() {
		l.want = want
		l.wants++
	})
}

// Keep is Set of what is wanted already, without a comparison. There was a Set.
func (l *Loop[W, H]) Keep() uint64 { return l.ask(func() {}) }

// ask begins a generation, of what change makes of the want.
func (l *Loop[W, H]) ask(change func()) uint64 {
	l.mu.Lock()
	change()
	l.gen++
	gen := l.gen
	l.mu.Unlock()
	l.stir()
	return gen
}

// Wake asks for a pass soon: the kernel may have changed. It never blocks.
func (l *Loop[W, H]) Wake() {
	l.mu.Lock()
	l.told = true
	l.mu.Unlock()
	l.stir()
}

func (l *Loop[W, H]) stir() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// Applied is the newest generation that the kernel was seen or made to match.
func (l *Loop[W, H]) Applied() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.applied
}

// Last is what the newest pass did.
func (l *Loop[W, H]) Last() Pass {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.last
}

// Status lists the objects touched so far, failed ones first, then by name.
// An object that was deleted without error is forgotten after a minute.
func (l *Loop[W, H]) Status() []ObjectStatus {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make([]ObjectStatus, 0, len(l.objects))
	for _, o := range l.objects {
		out = append(out, o.ObjectStatus)
	}
	slices.SortFunc(out, func(a, b ObjectStatus) int {
		if a.Phase != b.Phase {
			if a.Phase == Failed {
				return -1
			}
			return 1
		}
		return cmp.Compare(a.Object, b.Object)
	})
	return out
}

// Failed lists the objects whose last operation failed, by name.
func (l *Loop[W, H]) Failed() []ObjectStatus {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []ObjectStatus
	for _, o := range l.objects {
		if o.Phase == Failed {
			out = append(out, o.ObjectStatus)
		}
	}
	slices.SortFunc(out, func(a, b ObjectStatus) int { return cmp.Compare(a.Object, b.Object) })
	return out
}

// Remarks lists what the newest pass found in the way, see [Remarker].
func (l *Loop[W, H]) Remarks() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.remarks)
}

// heed takes the remarks out of ops.
func (l *Loop[W, H]) heed(ops []Op) []Op {
	var out []Op
	var said []string
	for _, op := range ops {
		if r, ok := op.(Remarker); ok && r.Remark() != "" {
			said = append(said, r.Remark())
		} else {
			out = append(out, op)
		}
	}
	l.mu.Lock()
	old := l.remarks
	l.remarks = said
	l.mu.Unlock()
	for _, s := range said {
		if !slices.Contains(old, s) {
			l.log.Warn("something is in the way", "what", s)
		}
	}
	return out
}

// Run works until ctx ends, and returns when no pass is under way. The first
// pass waits for the first Set.
func (l *Loop[W, H]) Run(ctx context.Context) {
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case look := <-l.looks:
			look(ctx)
			continue
		case <-l.wake:
			if l.spared() {
				continue // the timer goes on
			}
		case <-timer.C:
		}
		timer.Reset(l.pass(ctx))
	}
}

// Look observes the kernel between two passes, for someone who wants to see it
// as it is. It waits for the pass under way, if any, and until ctx ends when the
// loop does not run.
func (l *Loop[W, H]) Look(ctx context.Context) (have H, err error) {
	done := make(chan struct{})
	look := func(run context.Context) {
		defer close(done)
		l.mu.Lock()
		want := l.want
		l.mu.Unlock()
		have, err = l.target.Observe(run, want)
	}
	select {
	case l.looks <- look:
		<-done // the loop has it and comes to its end
		return have, err
	case <-ctx.Done():
		return have, ctx.Err()
	}
}

// spared tells whether no pass is needed for what is wanted by now.
func (l *Loop[W, H]) spared() bool {
	c, ok := l.target.(Comparer[W])
	l.mu.Lock()
	want, gen := l.want, l.gen
	// After a clean pass applied is what it worked on, or what was spared one since.
	kept := l.workedN == l.wants
	settled := !l.told && l.last.Clean() && l.applied != 0 && l.applied == l.last.Gen
	if !settled || gen == l.applied || !ok && !kept {
		l.mu.Unlock()
		// The newest want may have been worked on by the pass that was beginning as this
		// wake came.
		return settled && gen == l.applied
	}
	worked, n := l.worked, l.wants
	l.mu.Unlock()
	if !kept && !c.Same(worked, want) {
		return false
	}
	l.mu.Lock()
	l.last.Gen, l.applied = gen, gen
	l.worked, l.workedN = want, n
	l.mu.Unlock()
	if l.opt.OnPass != nil {
		l.opt.OnPass(Pass{Gen: gen, Spared: true})
	}
	return true
}

// pass runs once and returns the time until the next.
func (l *Loop[W, H]) pass(ctx context.Context) time.Duration {
	l.mu.Lock()
	want, gen := l.want, l.gen
	l.told, l.worked, l.workedN = false, want, l.wants
	l.mu.Unlock()
	if gen == 0 {
		return l.opt.Period
	}
	start := time.Now()
	p := Pass{Gen: gen}
	have, err := l.target.Observe(ctx, want)
	observed := time.Since(start)
	wait := max(l.opt.Period, costShare*observed)
	if ctx.Err() != nil {
		return wait
	}
	if err != nil {
		p.Err = fmt.Errorf("observe: %w", err)
		wait = min(wait, l.note(l.name+": observe", "observe", err, start))
	} else {
		l.clear(l.name + ": observe")
		if l.seen != nil {
			l.seen(have)
		}
		ops, next := l.target.Diff(want, have, start)
		ops = l.heed(ops)
		if !next.IsZero() {
			wait = min(wait, max(0, time.Until(next)))
		}
		var errs []error
		for len(ops) > 0 {
			n := l.batch(ops)
			var due []Op
			for _, op := range ops[:n] {
				if until, held := l.held(op.Object(), start); held {
					p.Held++
					wait = min(wait, until)
					continue
				}
				due = append(due, op)
			}
			ops = ops[n:]
			if ctx.Err() != nil {
				return wait
			}
			for i, err := range l.apply(ctx, due) {
				op := due[i]
				if err != nil && ctx.Err() != nil {
					return wait
				}
				if delay := l.note(op.Object(), op.String(), err, time.Now()); err != nil {
					errs = append(errs, fmt.Errorf("%s: %w", op, err))
					wait = min(wait, delay)
				} else {
					p.Ops++
				}
			}
		}
		p.Err = errors.Join(errs...)
	}
	p.Elapsed = time.Since(start)
	l.mu.Lock()
	l.last = p
	if p.Clean() {
		l.applied = gen
		for k, o := range l.objects {
			// What a clean pass did not need to touch is in order again, or
			// no longer wanted.
			if o.Phase == Failed && o.Since.Before(start) {
				delete(l.objects, k)
			} else if o.Phase == Done && time.Since(o.Since) > time.Minute {
				delete(l.objects, k)
			}
		}
	}
	l.mu.Unlock()
	if l.opt.OnPass != nil {
		l.opt.OnPass(p)
	}
	return max(wait, time.Millisecond)
}

// batch is how many of ops to apply at once: with a [Batcher], as many as are on
// different objects, because what is done to one later depends on how it went
// before.
func (l *Loop[W, H]) batch(ops []Op) int {
	if _, ok := l.target.(Batcher); !ok {
		return 1
	}
	in := map[string]bool{}
	for i, op := range ops {
		if in[op.Object()] {
			return i
		}
		in[op.Object()] = true
	}
	return len(ops)
}

func (l *Loop[W, H]) apply(ctx context.Context, ops []Op) []error {
	if len(ops) == 0 {
		return nil
	}
	if b, ok := l.target.(Batcher); ok {
		return b.ApplyAll(ctx, ops)
	}
	return []error{l.target.Apply(ctx, ops[0])}
}

// held tells whether an object is backing off, and for how much longer.
func (l *Loop[W, H]) held(name string, now time.Time) (time.Duration, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	o := l.objects[name]
	if o == nil || o.Phase != Failed || !now.Before(o.retryAt) {
		return 0, false
	}
	return o.retryAt.Sub(now), true
}

func (l *Loop[W, H]) clear(name string) {
	l.mu.Lock()
	delete(l.objects, name)
	l.mu.Unlock()
}

// note records the outcome of an operation and returns the delay before its
// retry.
func (l *Loop[W, H]) note(name, op string, err error, now time.Time) time.Duration {
	l.mu.Lock()
	o := l.objects[name]
	if o == nil {
		o = &object{ObjectStatus: ObjectStatus{Object: name}}
		l.objects[name] = o
	}
	phase := Done
	if err != nil {
		phase = Failed
	}
	changed := o.Phase != phase
	if changed {
		o.Phase, o.Since = phase, now
	}
	o.Op = op
	if err == nil {
		o.Err, o.Tries, o.delay = "", 0, 0
	} else {
		o.Tries++
		o.delay = min(max(2*o.delay, backoffMin), backoffMax)
		o.retryAt = now.Add(o.delay)
		changed = changed || o.Err != err.Error()
		o.Err = err.Error()
	}
	// What mends itself in the next tries is nothing for a person to act on.
	cry := err != nil && !o.cried && now.Sub(o.Since) >= cryAfter
	o.cried = err != nil && (o.cried || cry)
	delay, tries := o.delay, o.Tries
	l.mu.Unlock()
	switch {
	case err == nil:
		l.log.Debug("applied", "op", op)
	case cry:
		l.log.Error("operation keeps failing", "op", op, "error", err, "retry_in", delay, "tries", tries)
	case changed:
		l.log.Warn("operation failed", "op", op, "error", err, "retry_in", delay)
	default:
		l.log.Debug("operation failed again", "op", op, "error", err, "retry_in", delay, "tries", tries)
	}
	return delay
}
