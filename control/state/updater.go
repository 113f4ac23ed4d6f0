package state

import (
	"fmt"
	"slices"

	"github.com/shoalnet/shoal/spec"
)

// updater is the update of one service as this plan finds it.
type updater struct {
	spec.UpdateConfig
	st *spec.UpdateStatus // nil: none was begun
	// over: this plan has ended it or turned it back, and the next one sees to the rest
	over bool
}

// lockTries is how often the replacement of a task on a node that gives its tasks away
// may fail beside it, before that one is stopped first: it may hold what the other
// needs.
const lockTries = 3

// policy is how the tasks of a service are replaced now.
func policy(v *service) spec.UpdateConfig {
	if v.Update.Back() {
		return v.Spec.Rollback.Policy()
	}
	return v.Spec.Update.Policy()
}

// update brings every slot to the current template, as far as it may go now. It
// returns false when the plan is full, or the service must be looked at anew.
func (p *planner) update(sv *servicePlan) bool {
	sv.up = updater{UpdateConfig: policy(sv.v), st: sv.v.Update}
	if sv.up.st.Active() {
		if p.judge(sv); sv.up.over {
			return false
		}
	}
	for i := range p.slots {
		if sp := &p.slots[i]; !sp.gone && !sp.asleep && p.underway(sv, sp) {
			sv.begin(sp)
		}
	}
	// Slots that have nothing but what must go come last: whether one may begin
	// depends on what the others are about.
	for _, only := range []bool{false, true} {
		for i := range p.slots {
			if p.full() {
				return false
			}
			if sp := &p.slots[i]; !sp.gone && !sp.asleep && (sp.best == nil && sp.stale != nil) == only {
				p.slot(sv, sp)
			}
		}
	}
	return true
}

// begin counts a slot as being replaced.
func (sv *servicePlan) begin(sp *slotPlan) {
	if !sp.begun {
		sp.begun = true
		sv.started++
	}
}

// mayBegin tells whether another slot may be replaced.
func (sv *servicePlan) mayBegin(sp *slotPlan) bool {
	return sp.begun || (!sv.up.st.Paused() && (sv.up.Parallelism == 0 || sv.started < sv.up.Parallelism))
}

// paused is the state in which the update waits for somebody, and how that begins.
func (u *updater) paused() (state, message string) {
	if u.st.Back() {
		return spec.RollbackPaused, "rollback paused"
	}
	return spec.UpdatePaused, "update paused"
}

// ofUpdate tells whether a task was made by the update that is on.
func (u *updater) ofUpdate(v *service, t *task) bool {
	if t == nil || t.rev != v.rev {
		return false
	}
	if u.st.Since > 0 {
		return t.seq > u.st.Since
	}
	return t.Created >= u.st.StartedAt
}

// past tells whether d, ms, have passed since at, and until when they have not. Another
// leader may have written at, by another clock: what is further ahead than d is no time to
// wait for.
func (p *planner) past(at, d int64) (until int64, past bool) {
	return at + d, p.now > at+d || at > p.now+d
}

// since is what an update that begins now notes.
func (s *State) since() uint64 {
	if s.rules < 4 {
		return 0
	}
	return s.seq
}

// failure is a task of the update that failed in a slot, or found no place; nil: none
// has. A slot counts once.
func (p *planner) failure(sv *servicePlan, sp *slotPlan) (t *task, unplaced bool) {
	monitor := sv.up.Monitor.Milliseconds()
	for _, t := range sv.v.slot(sp.slot) {
		if !sv.up.ofUpdate(sv.v, t) || t.was != 0 || p.lost[t] {
			continue
		}
		switch t.Status.State {
		case spec.TaskFailed, spec.TaskRejected, spec.TaskComplete:
			if t.started == 0 || t.ended-t.started <= monitor {
				return t, false
			}
		case spec.TaskPending:
			if t != sp.best || sp.ending || t.Status.Message == afterOld || p.waits(sv.v, t) {
				continue // nobody has looked for its node yet
			}
			until, past := p.past(max(t.Created, t.NotBefore), monitor)
			if past {
				return t, true
			}
			p.again(until + 1)
		}
	}
	return nil, false
}

// judge counts the failures of an update, and ends it when there are too many, or
// nothing is left to do.
func (p *planner) judge(sv *servicePlan) {
	u, v := &sv.up, sv.v
	var first *task
	var firstSlot *slotPlan
	unplaced := false
	failed, slots, open := 0, 0, 0
	last, replaced := u.st.StartedAt, false
	for i := range p.slots {
		sp := &p.slots[i]
		if sp.gone || sp.asleep {
			continue
		}
		slots++
		t, noPlace := p.failure(sv, sp)
		if t != nil {
			if failed++; first == nil {
				first, firstSlot, unplaced = t, sp, noPlace
			}
			sp.failed = true
		}
		if u.ofUpdate(v, sp.best) && running(sp.best) {
			if !replaced {
				last = 0
			}
			last, replaced = max(last, sp.best.started), true // when the newest came up
		}
		if t == nil && (!running(sp.best) || sp.stale != nil) && !p.givenUp(sv, sp) {
			open++
		}
	}
	if failed > 0 && u.FailureAction != spec.FailureContinue && float64(failed) > u.MaxFailureRatio*float64(slots) {
		state, what := u.paused()
		if !u.st.Back() && u.FailureAction == spec.FailureRollback && v.Previous != nil {
			state, what = spec.RollbackStarted, "update rolled back"
		}
		p.turn(sv, state, what+because(u, firstSlot, first, unplaced))
		return
	}
	if sv.unmet != "" && sv.v.Spec.Global() && slots > 0 {
		// What runs stays, as it does of a service with replicas.
		state, what := u.paused()
		p.turn(sv, state, what+": "+p.nowhere(sv))
		return
	}
	// What is missing comes after this: a mode may have more slots than there are now.
	if open > 0 || sv.missing {
		return
	}
	if replaced || failed > 0 {
		if until, past := p.past(last, u.Monitor.Milliseconds()); !past {
			p.again(until + 1)
			return
		}
	}
	state, msg := spec.UpdateCompleted, "update completed"
	if u.st.Back() {
		state, msg = spec.RollbackCompleted, "rollback completed"
	}
	if failed > 0 {
		msg += fmt.Sprintf(", but for %d of %d replicas", failed, slots) + because(u, firstSlot, first, unplaced)
	}
	p.turn(sv, state, msg)
}

func (p *planner) turn(sv *servicePlan, state, message string) {
	p.op(ScheduleOp{Kind: OpUpdate, Service: sv.v.ID, ServiceVersion: sv.v.Version, State: state, Message: message})
	sv.up.over = true
}

// because is what went wrong with a task, in Docker's words as far as those go.
func because(u *updater, sp *slotPlan, t *task, unplaced bool) string {
	if unplaced {
		return fmt.Sprintf(": task %s has no node: %s", t.Name, t.Status.Message)
	}
	out := " due to failure or early termination of task " + t.ID
	if t.Status.Message != "" {
		out += ": " + t.Status.Message
	}
	if running(sp.stale) && u.Order == spec.StartFirst {
		out += "; the replica that it replaces runs on: if two can't run at once, use --update-order stop-first"
	}
	return out
}

// underway tells whether a slot is on its way to run a task of the current
// template. One that waits for a node, with nothing to replace, is not: it would
// hold up the others for ever. Nor is one whose replacement has failed, as far as the
// update goes on over that.
func (p *planner) underway(sv *servicePlan, sp *slotPlan) bool {
	v := sv.v
	if sp.failed {
		return false
	}
	if sp.best != nil {
		if running(sp.best) && sv.up.st.Active() && sv.up.ofUpdate(v, sp.best) {
			// The delay is between a slot that is done and the next.
			if until, past := p.past(sp.best.started, sv.up.Delay.Milliseconds()); !past && p.now < until {
				p.again(until)
				return true
			}
		}
		return !running(sp.best) && (sp.stale != nil || sp.ending || sp.best.Node != "" || p.waits(v, sp.best))
	}
	return sp.last != nil && sp.last.rev == v.rev && sp.last.Status.State != spec.TaskLost && !p.lost[sp.last] && !p.givenUp(sv, sp)
}

// givenUp tells whether nothing runs in a slot, nor will until somebody changes the
// service.
func (p *planner) givenUp(sv *servicePlan, sp *slotPlan) bool {
	if sp.best != nil || sp.stale != nil || sp.last == nil {
		return false
	}
	_, _, ok := p.restart(sv.v, sp.last)
	return !ok
}

// slot decides for one active slot.
func (p *planner) slot(sv *servicePlan, sp *slotPlan) {
	switch {
	case running(sp.best):
		if sp.stale != nil {
			sp.drop = append(sp.drop, sp.stale)
		}
		// Also what ended by itself, or with its node, while its successor started: no
		// other is made that would take its place.
		for _, t := range append(sp.drop, sp.over...) {
			p.stop(t, sp.best.ID)
		}
	case sp.best != nil:
		for _, t := range sp.drop {
			p.stop(t, "")
		}
		if sp.stale != nil && !running(sp.stale) && (sp.best.Node != "" || sp.stale.Node == "") {
			p.stop(sp.stale, "") // neither runs: no use in the older
			sp.stale = nil
		}
		if sp.best.Node == "" {
			p.place(sv, sp)
		}
	case sp.stale != nil:
		for _, t := range sp.drop {
			p.stop(t, "")
		}
		p.replace(sv, sp)
	default:
		if attempt, at, ok := p.restart(sv.v, sp.last); ok {
			p.createIn(sv, sp, attempt, at)
		}
	}
}

// replace begins, or goes on, to replace the task of a slot that has no other.
func (p *planner) replace(sv *servicePlan, sp *slotPlan) {
	attempt, at, ok := 0, int64(0), true
	leave := !p.leaves(sp.stale) // it may run on where it is until it has a successor
	if sp.last != nil && sp.last.rev == sv.v.rev {
		if leave && running(sp.stale) && sv.up.st.Paused() {
			// Nobody wants what failed to run before somebody changes the service again.
			for _, t := range sp.over {
				p.stop(t, sp.stale.ID)
			}
			return
		}
		if attempt, at, ok = p.restart(sv.v, sp.last); !leave && running(sp.stale) && attempt > lockTries {
			p.stop(sp.stale, "")
		}
	} else if leave && running(sp.stale) {
		if !sv.mayBegin(sp) {
			return
		}
		sv.begin(sp)
	}
	if !ok {
		return
	}
	if sv.up.Order == spec.StopFirst && running(sp.stale) {
		p.createAfter(sv, sp, attempt, at)
		return
	}
	p.createIn(sv, sp, attempt, at)
}

// createIn makes a task for a slot that is there.
func (p *planner) createIn(sv *servicePlan, sp *slotPlan, attempt int, at int64) {
	if p.create(sv, sp.slot, attempt, at, sp.last) {
		sv.begin(sp)
	}
}

// leaves tells whether a task has to leave its node whatever becomes of its service.
func (p *planner) leaves(t *task) bool {
	if t.Node == "" {
		return false
	}
	i, ok := p.idx[t.Node]
	return !ok || !keeps(p.nodes[i])
}

// afterOld is why a task waits whose slot stops first.
const afterOld = "waits for the end of the replica that it replaces"

// createAfter makes a task that waits for the end of the one that it replaces.
func (p *planner) createAfter(sv *servicePlan, sp *slotPlan, attempt int, at int64) {
	o := p.creation(sv, sp.slot, attempt)
	o.Message = afterOld
	if at > p.now {
		o.NotBefore = at
		p.again(at)
	} else if why := p.nowhereBut(sv, sp); why != "" && !p.leaves(sp.stale) {
		o.Message = why
	} else {
		defer p.stop(sp.stale, "")
	}
	p.op(o)
}

// nowhereBut tells why no node has room for the successor of a slot's old task, were
// that gone; empty: one has.
func (p *planner) nowhereBut(sv *servicePlan, sp *slotPlan) string {
	sv.without, sv.home = sp.stale, sv.mode.home(p, sp.slot)
	defer func() { sv.without = nil }()
	i, why := p.pick(sv)
	if i >= 0 {
		return ""
	}
	return why
}

// place finds a node for a pending task. Where that is impossible while a task
// that must go still runs, that one is stopped first.
func (p *planner) place(sv *servicePlan, sp *slotPlan) {
	t := sp.best
	if running(sp.stale) && !p.leaves(sp.stale) && sv.up.st.Paused() {
		p.stop(t, "") // the old one has the slot until somebody changes the service again
		return
	}
	if p.waits(sv.v, t) {
		p.again(t.NotBefore)
		return
	}
	wait := func(why string) {
		if t.Status.Message != why {
			p.op(ScheduleOp{Kind: OpWait, Task: t.ID, Version: t.Version, Message: why})
		}
	}
	if sv.up.Order == spec.StopFirst {
		switch {
		case running(sp.stale):
			why := p.nowhereBut(sv, sp)
			if why != "" && !p.leaves(sp.stale) {
				wait(why)
				return
			}
			p.stop(sp.stale, "")
			wait(afterOld)
			return
		case sp.ending:
			wait(afterOld)
			return
		}
	}
	i, why := p.find(sv, sp.slot)
	if i >= 0 {
		p.op(ScheduleOp{Kind: OpAssign, Task: t.ID, Version: t.Version, Node: p.nodes[i].ID})
		sv.begin(sp)
		return
	}
	wait(why)
	if sp.stale == nil {
		return
	}
	// The new one may need what the old one has: a port of the node, an address, room.
	// Who changed nodes' labels wants the tasks away; who changed the service has perhaps
	// mistyped, and keeps what runs.
	if p.leaves(sp.stale) || (!sv.up.st.Active() && !p.stays(sv, sp.stale)) || p.nowhereBut(sv, sp) == "" {
		p.stop(sp.stale, "")
	}
}

// turnUpdate carries out what judge decided.
func (s *State) turnUpdate(v *service, op ScheduleOp, now int64) bool {
	if !v.Update.Active() {
		return false
	}
	allowed := []string{spec.UpdatePaused, spec.UpdateCompleted, spec.RollbackStarted}
	if v.Update.Back() {
		allowed = []string{spec.RollbackPaused, spec.RollbackCompleted}
	}
	if !slices.Contains(allowed, op.State) {
		return false
	}
	was := v.Update
	next := &spec.UpdateStatus{State: op.State, StartedAt: was.StartedAt, Since: was.Since, Message: op.Message}
	switch op.State {
	case spec.UpdateCompleted, spec.RollbackCompleted:
		next.CompletedAt = now
	case spec.RollbackStarted:
		next.StartedAt, next.Since = now, s.since()
		if err := s.rollBack(v, now); err != nil {
			next.State, next.StartedAt, next.Since = spec.UpdatePaused, was.StartedAt, was.Since
			next.Message += fmt.Sprintf("; it can't be rolled back: %v", err)
		}
	}
	s.event("service", "update", v.ID, v.Spec.Name, "updatestate.old", was.State, "updatestate.new", next.State)
	v.Update = next
	return true
}

// rollBack gives a service the spec of before, once: from there it goes no further
// back by itself.
func (s *State) rollBack(v *service, now int64) error {
	if v.Previous == nil {
		return failf(ErrInvalid, "service %s does not have a previous spec", v.Spec.Name)
	}
	if err := s.respec(v, v.Previous.Clone(), now); err != nil {
		return err
	}
	v.Previous, v.prevRev = nil, 0
	return nil
}
