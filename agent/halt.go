package agent

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/shoalnet/shoal/internal/sleep"
	"github.com/shoalnet/shoal/runtime"
	"github.com/shoalnet/shoal/spec"
)

// haltTime bounds how long a machine that goes down waits for its tasks: their drain, and
// the longest stop grace that people give databases.
const haltTime = 5 * time.Minute

// haltDrain bounds how long it waits for the other nodes to let go of them. It is shorter
// than drainTimeout: the others may be going down as well, and answer no more.
const haltDrain = 10 * time.Second

// halt ends what runs here because the machine goes down, as a person would have it who
// stops each task: out of every balancer first, then with its own signal and grace.
func (m *member) halt() {
	if m.tasks == nil {
		return // it has not begun
	}
	m.log.Info("the machine goes down: its tasks are taken out of the balancers, and stopped")
	ctx, cancel := context.WithTimeout(m.ctx, haltTime)
	defer cancel()
	m.mu.Lock()
	m.halting = true
	m.mu.Unlock()
	wake(m.reportWake) // the managers replace at once what they can
	m.tasks.halt(ctx)
}

// halt takes the tasks out of every balancer and ends their programs. Nobody is told of
// these ends now; the next agent finds that they were the machine's.
func (m *tasks) halt(ctx context.Context) {
	m.freeze()
	var named, served bool
	m.mu.Lock()
	runners := make([]*runner, 0, len(m.runners))
	for _, r := range m.runners {
		runners = append(runners, r)
		if r.endpoint == nil {
			continue
		}
		named = true
		served = served || r.serves()
		draining := spec.EndpointDraining
		r.endpoint = &draining
	}
	m.mu.Unlock()
	if named {
		m.plumbing.publish()
		dctx, cancel := context.WithTimeout(ctx, haltDrain)
		err := m.plumbing.settled(dctx)
		cancel()
		switch {
		case err != nil:
			m.log.Warn("stopping tasks that not every node is known to have drained", "error", err)
		case served:
			sleep.For(ctx, inFlight)
		}
	}
	var wg sync.WaitGroup
	for _, r := range runners {
		wg.Go(func() {
			m.mu.Lock()
			signal, grace := r.task.StopWith()
			m.mu.Unlock()
			if err := m.rt.Halt(ctx, r.id, signal, grace); err != nil && !errors.Is(err, runtime.ErrNotFound) {
				m.log.Warn("a task can't be stopped before the machine is", "task", r.name(), "error", err)
			}
		})
	}
	wg.Wait()
}
