package state

import "slices"

// rebalance marks replicas as to be replaced, fewest first, so that the updater, by
// the service's policy, brings them to where a service that is made anew would have
// them. What moved away when a node died does not come back by itself.
func (s *State) rebalance(v *service) error {
	switch u := v.Update; {
	case v.Spec.Job():
		return failf(ErrInvalid, "service %s can't be rebalanced: it is a job, whose tasks run to their end where they are", v.Spec.Name)
	case v.Spec.Global():
		return failf(ErrInvalid, "service %s can't be rebalanced: it is of mode global, with one task on each node", v.Spec.Name)
	case u.Active():
		return failf(ErrInvalid, "service %s is being updated: rebalance it when that has come to its end", v.Spec.Name)
	case u.Paused():
		return failf(ErrInvalid, "the update of service %s is paused: update it or roll it back first", v.Spec.Name)
	}
	p := newPlanner(s, 0)
	sv := p.known(v)
	p.prepare(sv)
	at := make([][]*task, len(p.nodes)) // what may move, by node, the last slots last
	for _, t := range v.tasks {
		if i, ok := p.idx[t.Node]; ok && t.rev == v.rev && t.Live() && !p.lost[t] && p.stays(sv, t) {
			at[i] = append(at[i], t)
		}
	}
	// Group by group of the outermost preference, then within each, at last node by node.
	each := make([]int, len(p.nodes))
	for i := range each {
		each[i] = i
	}
	above := make([]int, len(p.nodes)) // all in one
	for _, g := range append(slices.Clone(sv.groups), each) {
		for p.move(sv, at, above, g) {
		}
		above = g
	}
	v.Update = nil // it is over, and what is done now is by the policy for updates
	return nil
}

// move marks one task of the fullest of the groups g that are of one group above, to
// go to the emptiest; false if that is nowhere worth it.
func (p *planner) move(sv *servicePlan, at [][]*task, above, g []int) bool {
	type end struct{ node, crowd int }
	most, least := map[int]end{}, map[int]end{} // by the group above
	sizes := crowd(g, sv.counts)
	for i := range p.nodes {
		c := sizes[g[i]]
		if m, ok := most[above[i]]; len(at[i]) > 0 && (!ok || c > m.crowd || c == m.crowd && sv.counts[i] > sv.counts[m.node]) {
			most[above[i]] = end{i, c}
		}
		if !p.takes(sv, i) {
			continue
		}
		if l, ok := least[above[i]]; !ok || c < l.crowd || c == l.crowd && sv.counts[i] < sv.counts[l.node] {
			least[above[i]] = end{i, c}
		}
	}
	for i := range p.nodes {
		from, ok := most[above[i]]
		to, ok2 := least[above[i]]
		if !ok || !ok2 || from.crowd-to.crowd <= 1 {
			continue
		}
		last := len(at[from.node]) - 1
		at[from.node][last].rev = 0
		at[from.node] = at[from.node][:last]
		sv.counts[from.node]--
		sv.counts[to.node]++
		p.promise(sv, to.node)
		return true
	}
	return false
}
