package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/shoalnet/shoal/internal/sleep"
	"github.com/shoalnet/shoal/runtime"
	"github.com/shoalnet/shoal/spec"
)

// Bounds of the look after a program that runs.
const (
	// A look costs about 0.3 ms of processor, and a node may have hundreds of
	// replicas.
	listenInterval = time.Second            // between looks at whether it still listens
	doubtInterval  = 200 * time.Millisecond // while it does not
	slowAfter      = time.Minute            // without ever: looked at as rarely as one that does
	deafAfter      = 700 * time.Millisecond // without: shorter gaps are a server that accepts one at a time
	adoptCheck     = 2 * time.Second        // for the first health check of a task that was found running
	maxCheckOutput = 200                    // bytes of a check's output that are shown
)

const notListening = "not listening: takes no new connections"

// fitness is what is known of a program that runs. It is guarded by tasks.mu.
type fitness struct {
	quiet bool   // nothing of it has been open to be reached yet, as far as this agent knows
	idle  bool   // and it has had its time: it runs all the same
	heard bool   // it has listened as only servers do
	deaf  string // it has listened and does not now; ""
	ill   string // its health check fails, or has not passed yet; ""
	dead  string // its health check has failed for too long, or it listens too late; ""
}

// health is what the health check says, in Docker's words; "" without one.
func (f fitness) health(t spec.Task) string {
	switch {
	case t.Spec.Health == nil:
		return ""
	case f.ill == "":
		return spec.HealthHealthy
	case strings.HasPrefix(f.ill, spec.Unhealthy):
		return spec.HealthUnhealthy
	}
	return spec.HealthStarting
}

// firstFitness is what is known of a program that an earlier agent started, or
// that is yet to be: it is as well as its health check says now, if it has one, and
// in a VIP if it listens now.
func (r *runner) firstFitness(ctx context.Context, t spec.Task, netns, running bool) fitness {
	var f fitness
	if t.Service != "" && netns {
		// In the node's own namespace others listen, too, and nobody is balanced to.
		f.quiet = true
		if running {
			f.heard = t.Status.Listened
			up, err := r.rt.Listening(ctx, r.id, false)
			switch {
			case err != nil || up.Serves > 0 || !f.heard && len(up.Maybe) > 0:
				f.quiet = false
			case f.heard: // it may have connections
				f.quiet, f.deaf = false, notListening
			default:
				f.idle = t.Status.State == spec.TaskRunning
			}
		}
	}
	if h := t.Spec.Health; h != nil {
		f.ill = "not healthy yet"
		if running {
			now := h.WithDefaults()
			now.Timeout = min(now.Timeout, adoptCheck)
			if r.check(ctx, now) == nil {
				f.ill = ""
			}
		}
	}
	return f
}

// judge changes the fitness and wakes the runner when that makes a difference.
func (r *runner) judge(fn func(*fitness)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	was := r.fit
	if fn(&r.fit); r.fit != was {
		r.kick()
	}
}

// tell makes known how the program is: to the other nodes, whether it takes new
// connections, and to the managers. Connections that it has are its own affair.
//
// To run and to be in a VIP are two things. A replica is in one while its program
// listens; it runs when it listens, or has for readyTimeout not, as workers never
// do. One that takes the place of a replica that listens runs only when it listens:
// the other is stopped then.
//
// A replica that listens is said to run once every node's balancer has it: what
// waits for that, a person or an update about to stop another, may count on it.
func (r *runner) tell(ctx context.Context, st runtime.Status) {
	r.mu.Lock()
	f := r.fit
	why := cmp.Or(f.ill, f.deaf)
	first := r.status.State != spec.TaskRunning
	// Before the first time there are no connections to keep.
	fresh := r.endpoint == nil || *r.endpoint == spec.EndpointStarting || *r.endpoint == spec.EndpointIdle
	ep, state := spec.EndpointActive, spec.TaskRunning
	switch {
	case why != "":
		if ep = spec.EndpointDraining; fresh {
			ep = spec.EndpointStarting
		}
		if first {
			state = spec.TaskStarting
		}
	case r.task.ListenWithin > 0 && first && r.looks() && !f.heard:
		ep, state = spec.EndpointStarting, spec.TaskStarting
		if f.idle || !f.quiet {
			why = fmt.Sprintf("does not listen yet, as the one did that it replaces: has %s", r.task.ListenWithin)
		}
	case f.quiet:
		ep = spec.EndpointStarting
		switch {
		case f.idle:
			ep, why = spec.EndpointIdle, "listens on no port: takes no connections"
		case first:
			state = spec.TaskStarting
		}
	}
	if st.Note != "" {
		why = strings.TrimPrefix(why+"; "+st.Note, "; ")
	}
	listened, health := r.status.Listened || f.heard, f.health(r.task)
	moved := r.endpoint == nil || *r.endpoint != ep
	same := !moved && r.status.State == state && r.status.Message == why && r.status.Listened == listened && r.status.Health == health
	r.mu.Unlock()
	if same {
		return
	}
	r.set(func() {
		r.endpoint = &ep
		r.status.PID = st.PID
	})
	if moved && ep == spec.EndpointActive {
		if err := r.whileWanted(ctx, takeTimeout, r.plumbing.settled); err != nil && r.unwanted() == "" && ctx.Err() == nil {
			r.log.Warn("a task is running that not every node is known to balance to", "task", r.name(), "missing", err)
		}
		if st, err := r.programState(ctx); ctx.Err() != nil || err == nil && st.State == runtime.Exited {
			return // watch sees to what comes next
		}
	}
	r.mu.Lock()
	r.status.Listened, r.status.Health = listened, health
	r.mu.Unlock()
	r.state(state, why)
}

// looks tells whether anybody looks where the program listens. tasks.mu is held.
func (r *runner) looks() bool { return r.task.Service != "" && r.sandbox != nil }

// lookAfter follows the fitness of a program that runs until ctx ends.
func (r *runner) lookAfter(ctx context.Context) {
	r.mu.Lock()
	t, looks := r.task, r.looks()
	r.mu.Unlock()
	var wg sync.WaitGroup
	if looks {
		wg.Go(func() { r.watchListening(ctx, t) })
	}
	if t.Spec.Health != nil {
		wg.Go(func() { r.watchHealth(ctx, t.Service != "", t.Spec.Health.WithDefaults()) })
	}
	wg.Wait()
}

// watchListening puts a replica into the balancers when it listens, which Swarm
// does before (1 request refused in each rolling update of PEERS.md), and takes one
// that no longer does out: what they would send it is refused. One that does not
// within a time, 0: for ever, is given up.
//
// Where others take connections, a new one has time to open all its sockets; where none
// does, any is better than none.
func (r *runner) watchListening(ctx context.Context, t spec.Task) {
	within := t.ListenWithin
	r.mu.Lock()
	open, heard := !r.fit.quiet, r.fit.heard
	in := open && r.fit.deaf == "" // it is in the balancers, as far as this goes
	r.mu.Unlock()
	begun := time.Now()
	run := begun // as far as that is known of a program that an earlier agent started
	if st, err := r.programState(ctx); err == nil {
		run = run.Add(-min(st.Age(), readyTimeout))
	}
	var deaf time.Time
	ports := held{all: open}
	var opens opening
	soon := readyFirst
	others := !in && r.plumbing.served(t)
	for {
		up, err := r.rt.Listening(ctx, r.id, !in && others)
		if ctx.Err() != nil {
			return
		}
		now := time.Now()
		idle := now.Sub(run) >= readyTimeout
		maybe := ports.look(up.Maybe, now)
		wait := listenInterval
		serves := err == nil && up.Serves > 0
		if !serves {
			opens = opening{}
		}
		switch {
		case serves && !in && others && !opens.done(up.Serves, now):
			wait = readyInterval
		case serves, err != nil && !open && idle:
			// Where that can't be known, time must do.
			open, heard, deaf, in = true, true, time.Time{}, true
			r.judge(func(f *fitness) { f.quiet, f.idle, f.heard, f.deaf = false, false, true, "" })
		case err != nil: // not known
			wait = doubtInterval
		case maybe && !heard:
			open, deaf, in = true, time.Time{}, true
			r.judge(func(f *fitness) { f.quiet, f.idle, f.deaf = false, false, "" })
		case !open:
			// Most listen within milliseconds of their start.
			wait, soon = soon, min(2*soon, readyInterval)
			if idle {
				wait = doubtInterval
				r.judge(func(f *fitness) { f.idle = true })
			}
			if within <= 0 && now.Sub(begun) > slowAfter {
				wait = listenInterval
			}
		case deaf.IsZero():
			deaf, wait = now, doubtInterval
		default:
			if wait = doubtInterval; now.Sub(deaf) >= deafAfter {
				in, others = false, r.plumbing.served(t)
				r.judge(func(f *fitness) { f.deaf = notListening })
			}
		}
		if within > 0 && !heard {
			if now.Sub(begun) >= within {
				r.judge(func(f *fitness) {
					f.dead = fmt.Sprintf("has not listened within %s, as the one does that it was to replace", within)
				})
			}
			wait = min(wait, doubtInterval)
		}
		if !sleep.For(ctx, wait) {
			return
		}
	}
}

// opening tells when a program has opened what it serves: one socket after another, and
// the first may not be the one that its clients call.
type opening struct {
	n            int
	first, since time.Time // since there is any, since there are n
}

// openTime is how long no further socket has come of a program that has opened them all.
// They are a few system calls apart; a program that needs longer between its ports has a
// health check.
const openTime = 100 * time.Millisecond

// done takes how many there are now. It does not wait longer for a program that opens
// and closes all the time than for one that opens none.
func (o *opening) done(n int, now time.Time) bool {
	if o.n == 0 {
		o.first = now
	}
	if o.n != n {
		o.n, o.since = n, now
	}
	return now.Sub(o.since) >= openTime || now.Sub(o.first) >= readyTimeout
}

// held tells ports that a server keeps from those that a client has for as long as
// it waits for an answer: a server's is the same in every look.
type held struct {
	all   bool // those of the first look have been there for long
	since map[uint16]time.Time
}

// look takes up what is there now, and tells whether a port has been for readyTimeout.
func (h *held) look(ports []uint16, now time.Time) bool {
	long := false
	next := make(map[uint16]time.Time, len(ports))
	for _, p := range ports {
		since, ok := h.since[p]
		if !ok {
			if since = now; h.all {
				since = time.Time{}
			}
		}
		next[p] = since
		long = long || now.Sub(since) >= readyTimeout
	}
	h.all, h.since = false, next
	return long
}

// watchHealth runs the health check. A replica that stays unhealthy is given up,
// as in Swarm, for another to be started; a task of its own is not.
func (r *runner) watchHealth(ctx context.Context, replica bool, h spec.HealthCheck) {
	r.mu.Lock()
	well := r.fit.ill == ""
	r.mu.Unlock()
	begun := time.Now()
	if st, err := r.programState(ctx); err == nil {
		begun = begun.Add(-st.Age())
	}
	for fails := 0; ; {
		err := r.check(ctx, h)
		if ctx.Err() != nil {
			return
		}
		wait := h.Interval
		switch {
		case err == nil:
			well, fails = true, 0
			r.judge(func(f *fitness) { f.ill = "" })
		case well:
			if fails++; fails >= h.Retries {
				r.unhealthy(replica, err)
			}
		case time.Since(begun) >= h.Patience():
			r.unhealthy(replica, err)
		default:
			r.judge(func(f *fitness) { f.ill = "not healthy yet: " + err.Error() })
			wait = h.StartInterval
		}
		if !sleep.For(ctx, wait) {
			return
		}
	}
}

func (r *runner) unhealthy(replica bool, err error) {
	r.judge(func(f *fitness) {
		f.ill = spec.Unhealthy + err.Error()
		if replica {
			f.dead = f.ill
		}
	})
}

// check runs the health check once; nil is healthy.
func (r *runner) check(ctx context.Context, h spec.HealthCheck) error {
	cctx, cancel := context.WithTimeout(ctx, h.Timeout)
	defer cancel()
	var out firstBytes
	p, err := r.rt.Exec(cctx, r.id, runtime.ExecSpec{Command: healthCommand(h), Stdout: &out, Stderr: &out})
	if err != nil {
		return fmt.Errorf("the check can't be run: %w", err)
	}
	code, err := p.Wait()
	switch {
	case errors.Is(cctx.Err(), context.DeadlineExceeded):
		return fmt.Errorf("the check took longer than %s", h.Timeout)
	case err != nil:
		return fmt.Errorf("the check can't be run: %w", err)
	case code != 0:
		return errors.New(strings.TrimRight(fmt.Sprintf("exit status %d: %s", code, out.String()), ": "))
	}
	return nil
}

// firstBytes keeps the beginning of what is written, for one line of a message.
// Both streams of a command may write at once.
type firstBytes struct {
	mu sync.Mutex
	b  []byte
}

func (f *firstBytes) Write(b []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.b = append(f.b, b[:min(len(b), maxCheckOutput-len(f.b))]...)
	return len(b), nil
}

func (f *firstBytes) String() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return strings.Join(strings.Fields(strings.ToValidUTF8(string(f.b), "")), " ")
}
