package state

import "github.com/shoalnet/shoal/spec"

// mode is the strategy of a service: which slots it has.
type mode interface {
	// shrink gives up the slots that are too many.
	shrink(p *planner, sv *servicePlan)
	// missing tells whether grow would make any.
	missing(p *planner, sv *servicePlan) bool
	// grow makes those that are missing.
	grow(p *planner, sv *servicePlan)
}

func modeOf(spec.ServiceSpec) mode { return replicated{} }

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

// scaleDown removes k slots, such that the rest can be spread evenly. Slots whose
// task has no place yet, or must give its place to another anyway, can still go
// anywhere: they are removed first while enough of them are left to fill the
// other nodes up. Else it is the turn of the node with most.
func (p *planner) scaleDown(sv *servicePlan, k int) {
	p.prepare(nil)
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
	for ; k > 0 && !p.full(); k-- {
		most := -1
		for i := range p.nodes {
			c := len(byNode[i])
			if most < 0 || c > len(byNode[most]) || (c == len(byNode[most]) && p.total[i] >= p.total[most]) {
				most = i
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
			p.total[most]--
		}
		p.slots[victim].gone = true
		p.op(ScheduleOp{Kind: OpRemove, Service: sv.v.ID, ServiceVersion: sv.v.Version, Slot: p.slots[victim].slot})
	}
}
