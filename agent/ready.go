package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/shoalnet/shoal/runtime"
	"github.com/shoalnet/shoal/spec"
)

// Bounds of the look after a program that runs.
const (
	// A look costs about 0.3 ms of processor, and a node may have hundreds of
	// replicas.
	listenInterval = time.Second            // between looks at whether it still listens
	doubtInterval  = 200 * time.Millisecond // while it does not
	deafAfter      = 700 * time.Millisecond // without: shorter gaps are a server that accepts one at a time
	adoptCheck     = 2 * time.Second        // for the first health check of a task that was found running
	maxCheckOutput = 200                    // bytes of a check's output that are shown
)

// fitness is what is known of a program that runs. It is guarded by tasks.mu.
type fitness struct {
	deaf string // it has listened and does not now; ""
	ill  string // its health check fails, or has not passed yet; ""
	dead string // its health check has failed for too long; ""
}

// awaitReady returns when the program listens, has ended, is unwanted, or has
// had its time: a replica enters a VIP when it can answer, which Swarm's does
// before (1 request refused in each rolling update of PEERS.md), while a
// program that never listens is not kept waiting for long.
func (r *runner) awaitReady(ctx context.Context) {
	deadline := time.Now().Add(readyTimeout)
	for time.Now().Before(deadline) && r.unwanted() == "" {
		if st, err := r.programState(ctx); err != nil || st.State != runtime.Running {
			return
		}
		if up, err := r.rt.Listening(ctx, r.id); err == nil && up {
			return
		}
		if !sleep(ctx, readyInterval) {
			return
		}
	}
}

// firstFitness is what is known of a program that an earlier agent started, or
// that is yet to be: it is as well as its health check says now, if it has one.
func (r *runner) firstFitness(ctx context.Context, h *spec.HealthCheck, running bool) fitness {
	if h == nil {
		return fitness{}
	}
	if running {
		now := h.WithDefaults()
		now.Timeout = min(now.Timeout, adoptCheck)
		if r.check(ctx, now) == nil {
			return fitness{}
		}
	}
	return fitness{ill: "not healthy yet"}
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
// A replica is said to run once every node's balancer has it: what waits for that,
// a person or an update about to stop another, may count on it.
func (r *runner) tell(ctx context.Context, pid int) {
	r.mu.Lock()
	why := cmp.Or(r.fit.ill, r.fit.deaf)
	first := r.status.State != spec.TaskRunning
	ep, state := spec.EndpointActive, spec.TaskRunning
	if why != "" {
		// Before the first time there are none.
		if ep = spec.EndpointDraining; r.endpoint != nil && *r.endpoint == spec.EndpointStarting {
			ep = spec.EndpointStarting
		}
		if first {
			state = spec.TaskStarting
		}
	}
	moved := r.endpoint == nil || *r.endpoint != ep
	same := !moved && r.status.State == state && r.status.Message == why
	r.mu.Unlock()
	if same {
		return
	}
	r.set(func() {
		r.endpoint = &ep
		r.status.PID = pid
	})
	if moved && ep == spec.EndpointActive {
		if err := r.whileWanted(ctx, takeTimeout, r.plumbing.settled); err != nil && r.unwanted() == "" && ctx.Err() == nil {
			r.log.Warn("a task is running that not every node is known to balance to", "task", r.task.Name, "missing", err)
		}
		if st, err := r.programState(ctx); ctx.Err() != nil || err == nil && st.State == runtime.Exited {
			return // watch sees to what comes next
		}
	}
	r.state(state, why)
}

// lookAfter follows the fitness of a program that runs until ctx ends.
func (r *runner) lookAfter(ctx context.Context) {
	r.mu.Lock()
	t, ns := r.task, r.sandbox != nil
	r.mu.Unlock()
	var wg sync.WaitGroup
	// In the node's own namespace others listen, too.
	if t.Service != "" && ns {
		wg.Go(func() { r.watchListening(ctx) })
	}
	if t.Spec.Health != nil {
		wg.Go(func() { r.watchHealth(ctx, t.Service != "", t.Spec.Health.WithDefaults()) })
	}
	wg.Wait()
}

// watchListening takes a replica that has listened, and no longer does, out of
// the balancers: what they would send it is refused.
func (r *runner) watchListening(ctx context.Context) {
	listened := false
	var since time.Time
	for {
		up, err := r.rt.Listening(ctx, r.id)
		wait := listenInterval
		switch {
		case err != nil: // not known
		case up:
			listened, since = true, time.Time{}
			r.judge(func(f *fitness) { f.deaf = "" })
		case !listened:
		case since.IsZero():
			since, wait = time.Now(), doubtInterval
		default:
			if wait = doubtInterval; time.Since(since) >= deafAfter {
				r.judge(func(f *fitness) { f.deaf = "not listening: takes no new connections" })
			}
		}
		if !sleep(ctx, wait) {
			return
		}
	}
}

// watchHealth runs the health check. A replica that stays unhealthy is given up,
// as in Swarm, for another to be started; a task of its own is not.
func (r *runner) watchHealth(ctx context.Context, replica bool, h spec.HealthCheck) {
	r.mu.Lock()
	well := r.fit.ill == ""
	r.mu.Unlock()
	begun := time.Now()
	if st, err := r.programState(ctx); err == nil && !st.StartedAt.IsZero() {
		begun = st.StartedAt
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
		if !sleep(ctx, wait) {
			return
		}
	}
}

func (r *runner) unhealthy(replica bool, err error) {
	r.judge(func(f *fitness) {
		f.ill = "unhealthy: " + err.Error()
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
