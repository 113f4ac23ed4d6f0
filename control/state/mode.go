package state

import (
	"cmp"
	"slices"

	"github.com/shoalnet/shoal/spec"
)

// mode is the strategy of a service: which slots it has.
type mode interface {
	// shrink gives up the slots that are too many.
	shrink(p *planner, sv *servicePlan)
	// missing tells whether grow would make any.
	missing(p *planner, sv *servicePlan) bool
	// grow makes those that are missing.
	grow(p *planner, sv *servicePlan)
	// home is the index of the node that a slot belongs to, anywhere of none, or
	// nowhere, if that node is no more.
	home(p *planner, slot int) int
	// asleep tells whether a slot is left as it is: its node is away, or takes nothing.
	asleep(p *planner, sp *slotPlan) bool

	// What carries a plan out asks again, as things may have changed.

	// room tells whether a service may have a slot besides those that it has.
	room(v *service, slot int) bool
	// needs tells whether a service needs a slot that it has.
	needs(s *State, v *service, slot int) bool
}

// What home may be besides a node.
const (
	anywhere = -1
	nowhere  = -2
)

func modeOf(sp spec.ServiceSpec) mode {
	switch {
	case sp.Global():
		return global{}
	case sp.Job():
		return replicatedJob{}
	}
	return replicated{}
}

// replicated services have as many slots as replicas, wherever there is room.
type replicated struct{}

func (replicated) shrink(p *planner, sv *servicePlan) {
	if k := len(p.slots) - sv.v.Spec.Replicas; k > 0 {
		p.scaleDown(sv, k)
	}
}

func (replicated) missing(p *planner, sv *servicePlan) bool { return len(p.slots) < sv.v.Spec.Replicas }

// grow gives new slots the lowest free numbers.
func (replicated) grow(p *planner, sv *servicePlan) {
	slot, at := 1, 0
	for k := len(p.slots); k < sv.v.Spec.Replicas && !p.full(); k++ {
		for at < len(p.slots) && p.slots[at].slot == slot {
			at++
			slot++
		}
		p.create(sv, slot, 0, 0, nil)
		slot++
	}
}

func (replicated) home(*planner, int) int { return anywhere }

func (replicated) asleep(*planner, *slotPlan) bool { return false }

func (replicated) room(v *service, _ int) bool { return v.active() < v.Spec.Replicas }

func (replicated) needs(_ *State, v *service, _ int) bool { return v.active() <= v.Spec.Replicas }

// global services have a slot on each node that their rules allow, with the node's
// number. A node that is away keeps its slot, for what may still run there; one that
// gives its tasks away, or that the rules no longer allow, loses it.
type global struct{}

// keeping tells whether a node keeps its slot. Those of rules that no node meets any
// more keep what they have, as services with replicas do: the rule may be mistyped.
func (global) keeping(n *node, met, anyMet bool) bool { return keeps(n) && (met || !anyMet) }

func (g global) shrink(p *planner, sv *servicePlan) {
	for i := range p.slots {
		if p.full() {
			return
		}
		sp := &p.slots[i]
		if at := g.home(p, sp.slot); at < 0 || !g.keeping(p.nodes[at], sv.stay == nil || sv.stay[at], sv.unmet == "") {
			p.remove(sv, sp)
		}
	}
}

func (global) missing(p *planner, sv *servicePlan) bool {
	return slices.ContainsFunc(p.nodes, func(n *node) bool { return p.lacks(sv, n) })
}

func (global) grow(p *planner, sv *servicePlan) {
	for _, n := range p.nodes {
		if p.full() {
			return
		}
		if p.lacks(sv, n) {
			p.create(sv, n.Number, 0, 0, nil)
		}
	}
}

// lacks tells whether a node is to get a slot of a global service.
func (p *planner) lacks(sv *servicePlan, n *node) bool {
	return assignable(n) && (sv.fits == nil || sv.fits[p.idx[n.ID]]) &&
		!p.active(n.Number)
}

// active tells whether a slot of the service at hand is: they are in the order of
// their numbers.
func (p *planner) active(slot int) bool {
	_, found := slices.BinarySearchFunc(p.slots, slot, func(sp slotPlan, slot int) int { return cmp.Compare(sp.slot, slot) })
	return found
}

func (global) home(p *planner, slot int) int {
	if i, ok := p.idx[p.s.numbers[slot]]; ok {
		return i
	}
	return nowhere
}

func (g global) asleep(p *planner, sp *slotPlan) bool {
	i := g.home(p, sp.slot)
	return i < 0 || !assignable(p.nodes[i])
}

func (global) room(*service, int) bool { return true }

func (g global) needs(s *State, v *service, slot int) bool {
	n := s.nodes[s.numbers[slot]]
	if n == nil {
		return false
	}
	rules, anyMet := s.rulesOf(v), false
	for _, o := range s.nodes {
		anyMet = anyMet || allow(rules, o.Node)
	}
	return g.keeping(n, allow(rules, n.Node), anyMet)
}

// Desired is how many tasks a service should have now: its replicas, or one on each node
// that is there for it; of a job, as many as may run at once of those that are not done.
func (s *State) Desired(serviceID string) int {
	v := s.services[serviceID]
	if v == nil {
		return 0
	}
	if v.Spec.Job() {
		done, total := s.Completed(serviceID)
		return min(v.concurrency(len(s.nodes)), total-done)
	}
	if !v.Spec.Global() {
		return v.Spec.Replicas
	}
	return len(s.homes(v))
}

// homes are the nodes that are there for a global service.
func (s *State) homes(v *service) (out []*node) {
	rules := s.rulesOf(v)
	lasting := slices.DeleteFunc(slices.Clone(rules), func(r rule) bool { return r.lapses })
	for _, n := range s.nodes {
		runs := slices.ContainsFunc(v.slot(n.Number), func(t *task) bool { return t.Live() && t.Desired == spec.DesiredRunning })
		if n.Status == spec.NodeReady && keeps(n) && (runs && allow(lasting, n.Node) || assignable(n) && allow(rules, n.Node)) {
			out = append(out, n)
		}
	}
	return out
}

// scaleDown removes k slots, such that the rest can be spread evenly. Slots whose
// task has no place yet, or must give its place to another anyway, can still go
// anywhere: they are removed first while enough of them are left to fill the
// other nodes up. Else it is the turn of the node with most.
func (p *planner) scaleDown(sv *servicePlan, k int) {
	p.prepare(nil)
	p.group(sv)
	byNode := make([][]int, len(p.nodes)) // indices into slots, ascending
	var free, stale []int
	for i := range p.slots {
		switch sp := &p.slots[i]; {
		case sp.best != nil && sp.best.Node != "":
			at := p.idx[sp.best.Node]
			byNode[at] = append(byNode[at], i)
		case running(sp.stale):
			stale = append(stale, i)
		default:
			free = append(free, i)
		}
	}
	free = append(stale, free...) // taken from the end: those that run go last
	counts := make([]int, len(byNode))
	for i, l := range byNode {
		counts[i] = len(l)
	}
	for ; k > 0 && !p.full(); k-- {
		most := -1
		var key, mostKey []int
		crowds := sv.crowds(counts)
		for i := range p.nodes {
			if key = append(crowds.of(key[:0], i), counts[i], p.total[i]); most < 0 || slices.Compare(key, mostKey) >= 0 {
				most, mostKey = i, slices.Clone(key)
			}
		}
		even := len(free) > 0
		if even && most >= 0 {
			gap := 0 // what it takes to bring every node within one of the fullest
			for i, n := range p.nodes {
				if assignable(n) && (sv.fits == nil || sv.fits[i]) {
					gap += max(0, len(byNode[most])-1-len(byNode[i]))
				}
			}
			even = gap < len(free)
		}
		var victim int
		if even || most < 0 || len(byNode[most]) == 0 {
			victim, free = free[len(free)-1], free[:len(free)-1]
		} else {
			l := byNode[most]
			victim, byNode[most] = l[len(l)-1], l[:len(l)-1]
			counts[most]--
			p.total[most]--
		}
		p.remove(sv, &p.slots[victim])
	}
}
