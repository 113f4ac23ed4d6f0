package state

import (
	"slices"

	"github.com/shoalnet/shoal/spec"
)

// A job's slots are run to their end, once for each template: with every change of it,
// or --force, all begin anew. A slot is done when its newest task of this template has
// completed.

// replicatedJob has as many slots as replicas, of which some at most run at once.
type replicatedJob struct{ replicated }

// shrink gives up the last slots: what the others have done is done.
func (replicatedJob) shrink(p *planner, sv *servicePlan) {
	for i := len(p.slots) - 1; i >= 0 && p.slots[i].slot > sv.v.Spec.Replicas && !p.full(); i-- {
		p.remove(sv, &p.slots[i])
	}
}

func (replicatedJob) room(v *service, slot int) bool { return slot <= v.Spec.Replicas }

func (j replicatedJob) needs(_ *State, v *service, slot int) bool { return j.room(v, slot) }

// job plans for a job: what is of an earlier template ends, and what has not completed
// runs, as many at once as may.
func (p *planner) job(sv *servicePlan) {
	v := sv.v
	limit, active := v.concurrency(len(p.nodes)), 0
	for _, t := range v.tasks { // also those that are just ending
		if !t.Status.State.Ended() && !p.lost[t] {
			active++
		}
	}
	for i := range p.slots {
		sp := &p.slots[i]
		if p.full() {
			return
		}
		if sp.gone || sp.asleep {
			continue
		}
		for _, t := range sp.drop {
			p.stop(t, "")
		}
		if sp.stale != nil {
			p.stop(sp.stale, "")
		}
		switch {
		case sp.best != nil && sp.best.Node == "":
			sp.stale = nil // it does not hold its successor up
			p.place(sv, sp)
		case sp.best == nil && sp.stale == nil && active < limit:
			if attempt, at, ok := p.restart(v, sp.last); ok {
				p.create(sv, sp.slot, attempt, at, sp.last)
				active++
			}
		}
	}
	if v.Spec.Global() {
		sv.mode.grow(p, sv)
		return
	}
	for slot := 1; slot <= v.Spec.Replicas && active < limit && !p.full(); slot++ {
		if !p.active(slot) {
			p.create(sv, slot, 0, 0, nil)
			active++
		}
	}
}

// concurrency is how many tasks of a job may run at once.
func (v *service) concurrency(nodes int) int {
	switch {
	case v.Spec.Global():
		return nodes
	case v.Spec.MaxConcurrent > 0:
		return min(v.Spec.MaxConcurrent, v.Spec.Replicas)
	}
	return v.Spec.Replicas
}

// Completed tells how many of a job's slots are done, and how many there are to do;
// zeros of a service that is none.
func (s *State) Completed(serviceID string) (done, total int) {
	v := s.services[serviceID]
	if v == nil || !v.Spec.Job() {
		return 0, 0
	}
	last := -1
	for _, t := range v.tasks {
		if t.Slot != last && t.done(v) {
			done, last = done+1, t.Slot
		}
	}
	if !v.Spec.Global() {
		return done, v.Spec.Replicas
	}
	// What is done on a node that is away stays done.
	open := 0
	for _, n := range s.homes(v) {
		if !slices.ContainsFunc(v.slot(n.Number), func(t *task) bool { return t.done(v) }) {
			open++
		}
	}
	return done, done + open
}

// done tells whether a task has completed its slot of a job.
func (t *task) done(v *service) bool {
	return t.rev == v.rev && t.Desired == spec.DesiredRunning && t.Status.State == spec.TaskComplete
}
