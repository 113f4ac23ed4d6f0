package state

import "github.com/shoalnet/shoal/spec"

// update brings every slot to the current template, as far as it may go now. It
// returns false when the plan is full.
func (p *planner) update(sv *servicePlan) bool {
	for i := range p.slots {
		if sp := &p.slots[i]; !sp.gone && p.underway(sv.v, sp) {
			sv.started++
		}
	}
	// Slots that have nothing but what must go come last: whether one may begin
	// depends on what the others are about.
	for _, only := range []bool{false, true} {
		for i := range p.slots {
			if p.full() {
				return false
			}
			if sp := &p.slots[i]; !sp.gone && (sp.best == nil && sp.stale != nil) == only {
				p.slot(sv, sp)
			}
		}
	}
	return true
}

// underway tells whether a slot is on its way to run a task of the current
// template. One that waits for a node, with nothing to replace, is not: it would
// hold up the others for ever.
func (p *planner) underway(v *service, sp *slotPlan) bool {
	if sp.best != nil {
		return !running(sp.best) && (sp.stale != nil || sp.ending || sp.best.Node != "" || p.waits(v, sp.best))
	}
	return sp.last != nil && sp.last.rev == v.rev && sp.last.Status.State != spec.TaskLost && !p.lost[sp.last]
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
		attempt, at, ok := 0, int64(0), true
		if sp.last != nil && sp.last.rev == sv.v.rev {
			attempt, at, ok = p.restart(sv.v, sp.last)
		} else if running(sp.stale) && p.stays(sv, sp.stale) {
			// One slot at a time gives its place to another template.
			if sv.started > 0 {
				return
			}
			sv.started++
		}
		if ok {
			p.create(sv, sp.slot, attempt, at, sp.last)
		}
	default:
		if attempt, at, ok := p.restart(sv.v, sp.last); ok {
			p.create(sv, sp.slot, attempt, at, sp.last)
		}
	}
}

// place finds a node for a pending task. Where that is impossible while a task
// that must go still runs, that one is stopped first.
func (p *planner) place(sv *servicePlan, sp *slotPlan) {
	t := sp.best
	if p.waits(sv.v, t) {
		p.again(t.NotBefore)
		return
	}
	i, why := p.find(sv)
	if i >= 0 {
		p.op(ScheduleOp{Kind: OpAssign, Task: t.ID, Version: t.Version, Node: p.nodes[i].ID})
		return
	}
	if t.Status.Message != why {
		p.op(ScheduleOp{Kind: OpWait, Task: t.ID, Version: t.Version, Message: why})
	}
	if sp.stale != nil && (!p.stays(sv, sp.stale) || p.addressless(sv.v) != nil || len(sv.ports) > 0) {
		p.stop(sp.stale, "")
	}
}
