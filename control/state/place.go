package state

import (
	"fmt"
	"slices"
	"strings"

	"github.com/shoalnet/shoal/spec"
)

// find picks a node for one more task of a service, for a slot, and counts it there.
// Without one it returns -1 and why.
func (p *planner) find(sv *servicePlan, slot int) (int, string) {
	sv.home = sv.mode.home(p, slot)
	if r := p.addressless(sv.v); r != nil {
		return -1, r.Error()
	}
	i, why := p.pick(sv)
	if i < 0 {
		return -1, why
	}
	for _, a := range sv.v.Spec.Networks {
		p.room[a.Network].free--
	}
	sv.counts[i]++
	p.total[i]++
	p.promise(sv, i)
	if len(sv.ports) > 0 {
		p.claimed[i] = append(p.claimed[i], sv.ports...)
	}
	return i, ""
}

// promise counts one more task of a service against what bounds a node's.
func (p *planner) promise(sv *servicePlan, i int) {
	if sv.here != nil {
		sv.here[i]++
	}
	if p.reserved != nil {
		p.reserved[i].add(reservationOf(sv.v.Spec.Task.Resources))
	}
}

// addressless tells why a network of the service has no address for another
// task; nil if all have.
func (p *planner) addressless(v *service) error {
	for _, a := range v.Spec.Networks {
		r := p.room[a.Network]
		if r == nil {
			r = &room{}
			r.free, r.err = p.s.networks[a.Network].room()
			p.room[a.Network] = r
		}
		if r.free <= 0 {
			if r.err == nil {
				// This plan took the last one.
				n := p.s.networks[a.Network]
				r.err = fmt.Errorf("network %s: no address is free in %s", n.Name, joinPrefixes(n.Subnets))
			}
			return r.err
		}
	}
	return nil
}

// match finds the nodes that meet the rules.
func (p *planner) match(sv *servicePlan) {
	if len(sv.rules) == 0 {
		return
	}
	sv.fits, sv.stay = make([]bool, len(p.nodes)), make([]bool, len(p.nodes))
	for i := range sv.fits {
		sv.fits[i], sv.stay[i] = true, true
	}
	left := len(p.nodes)
	for _, r := range sv.rules {
		for i, n := range p.nodes {
			if r.fits(n.Node) {
				continue
			}
			if sv.fits[i] {
				sv.fits[i] = false
				left--
			}
			sv.stay[i] = sv.stay[i] && r.lapses
		}
		if left == 0 && sv.unmet == "" {
			sv.unmet = r.name
		}
	}
}

// stays tells whether a task may stay on its node.
func (p *planner) stays(sv *servicePlan, t *task) bool {
	if t.Node == "" {
		return true
	}
	i, ok := p.idx[t.Node]
	return ok && keeps(p.nodes[i]) && (sv.stay == nil || sv.stay[i])
}

// prepare counts tasks by node.
func (p *planner) prepare(sv *servicePlan) {
	if p.total == nil {
		p.total = make([]int, len(p.nodes))
		for i, n := range p.nodes {
			for _, t := range n.tasks {
				if t.Live() && !p.lost[t] {
					p.total[i]++
				}
			}
		}
	}
	if sv == nil || sv.ready {
		return
	}
	sv.ready = true
	sv.counts, sv.fails = make([]int, len(p.nodes)), make([]int, len(p.nodes))
	if sv.v == nil {
		return
	}
	if sv.v.Spec.MaxPerNode > 0 {
		sv.here = make([]int, len(p.nodes))
	}
	p.group(sv)
	for _, t := range sv.v.tasks {
		i, ok := p.idx[t.Node]
		if ok && sv.here != nil && t.Live() {
			sv.here[i]++
		}
		switch {
		case !ok || t.rev != sv.v.rev:
		case t.Live() && !p.lost[t] && p.stays(sv, t):
			sv.counts[i]++
		case t.was != 0: // it ended with its node
		case (t.Status.State == spec.TaskFailed || t.Status.State == spec.TaskRejected) && recent(p.now, t.ended):
			sv.fails[i]++
		}
	}
}

// group finds out which nodes have the same values of the labels that a service is
// spread over: those of one value of the second are of one value of the first.
func (p *planner) group(sv *servicePlan) {
	if sv.groups != nil {
		return
	}
	above := make([]int, len(p.nodes)) // by node: its group of the preference before
	for _, d := range sv.v.Spec.Spread {
		type value struct {
			above int
			text  string
		}
		ids := map[value]int{}
		g := make([]int, len(p.nodes))
		for i, n := range p.nodes {
			v := value{above[i], n.Label(d)}
			if _, ok := ids[v]; !ok {
				ids[v] = len(ids)
			}
			g[i] = ids[v]
		}
		sv.groups, above = append(sv.groups, g), g
	}
}

// crowds are, by preference and group, how many of the tasks that are counted by node
// are there.
func (sv *servicePlan) crowds(counts []int) crowds {
	c := crowds{groups: sv.groups, sizes: make([][]int, len(sv.groups))}
	for l, g := range sv.groups {
		c.sizes[l] = crowd(g, counts)
	}
	return c
}

type crowds struct{ groups, sizes [][]int }

// of appends the sizes of a node's groups, the outermost first.
func (c crowds) of(key []int, i int) []int {
	for l, g := range c.groups {
		key = append(key, c.sizes[l][g[i]])
	}
	return key
}

// crowd is how many of the tasks that are counted by node are in each group.
func crowd(g, counts []int) []int {
	sizes := make([]int, len(g))
	for i, n := range counts {
		sizes[g[i]] += n
	}
	return sizes
}

// pick chooses a node for one more task: fewest tasks of the service (nil: none) in
// its groups, fewest on itself, then fewest in all, then the lowest ID. Without one it
// returns -1 and why.
func (p *planner) pick(sv *servicePlan) (int, string) {
	p.prepare(sv)
	best := -1
	var key, bestKey []int
	var in crowds
	if sv != nil {
		in = sv.crowds(sv.counts)
	}
	for i := range p.nodes {
		if !p.takes(sv, i) {
			continue
		}
		key = key[:0]
		if sv != nil {
			failing := 0
			if sv.fails[i] >= failMost {
				failing = 1
			}
			key = append(in.of(append(key, failing), i), sv.counts[i])
		}
		key = append(key, p.total[i])
		if best < 0 || slices.Compare(key, bestKey) < 0 {
			best, bestKey = i, slices.Clone(key)
		}
	}
	if best >= 0 {
		return best, ""
	}
	return -1, p.nowhere(sv)
}

// takes tells whether one more task of a service may go to a node; with nil, any task.
func (p *planner) takes(sv *servicePlan, i int) bool {
	return assignable(p.nodes[i]) && (sv == nil || sv.fits == nil || sv.fits[i]) && !p.elsewhere(sv, i) &&
		p.portTaken(sv, i) == "" && !p.enough(sv, i) && !p.short(sv, i)
}

// elsewhere tells whether the slot at hand belongs to another node.
func (p *planner) elsewhere(sv *servicePlan, i int) bool {
	return sv != nil && sv.home != anywhere && sv.home != i
}

// enough tells whether a node has as many tasks of the service as it may.
func (p *planner) enough(sv *servicePlan, i int) bool {
	if sv == nil || sv.here == nil {
		return false
	}
	n := sv.here[i]
	if sv.without != nil && sv.without.Node == p.nodes[i].ID && sv.without.Live() {
		n--
	}
	return n >= sv.v.Spec.MaxPerNode
}

// short tells whether a node has less CPU or memory left, of what it has and has not
// promised to others, than a task of the service is promised. A node that does not say
// what it has is taken to have enough.
func (p *planner) short(sv *servicePlan, i int) bool {
	if sv == nil || sv.v == nil {
		return false
	}
	need := reservationOf(sv.v.Spec.Task.Resources)
	if need == (reservation{}) {
		return false
	}
	if p.reserved == nil {
		p.reserved = make([]reservation, len(p.nodes))
		for j, n := range p.nodes {
			for _, t := range n.tasks {
				if t.Live() && !p.lost[t] {
					p.reserved[j].add(reservationOf(t.Spec.Resources))
				}
			}
		}
	}
	n, r := p.nodes[i], p.reserved[i]
	if w := sv.without; w != nil && w.Node == n.ID && w.Live() {
		held := reservationOf(w.Spec.Resources)
		r.nanoCPUs -= held.nanoCPUs
		r.memory -= held.memory
	}
	// In this order, as a sum may be more than there are numbers for.
	return n.NanoCPUs > 0 && need.nanoCPUs > n.NanoCPUs-r.nanoCPUs || n.Memory > 0 && need.memory > n.Memory-r.memory
}

// portTaken names who has a port, on the node of an index, that a task of the
// service needs there; "" when nobody has.
func (p *planner) portTaken(sv *servicePlan, i int) string {
	if sv == nil {
		return ""
	}
	for _, port := range sv.ports {
		if slices.ContainsFunc(p.claimed[i], port.Clashes) {
			return "a task that is being placed"
		}
		if owner := p.nodes[i].portHolder(p.s, port, sv.without); owner != "" {
			return owner
		}
	}
	return ""
}

// standalone is what pick needs to know of a task on its own.
func (p *planner) standalone(nets []spec.NetworkAttachment, ports []spec.Port, t spec.TaskSpec) *servicePlan {
	level, _ := NeedOf(t)
	sv := &servicePlan{rules: p.s.taskRules(nil, nets, t.Image, level), ports: ports, home: anywhere}
	p.match(sv)
	return sv
}

// What is said of nodes at --replicas-max-per-node, and without what --reserve-cpu and
// --reserve-memory want.
const (
	fullNode  = "with as many replicas as it may have"
	shortNode = "with less CPU or memory left than is to be reserved"
)

// nowhere tells why no node fits.
func (p *planner) nowhere(sv *servicePlan) string {
	if len(p.nodes) == 0 {
		return "the cluster has no nodes"
	}
	if sv != nil && sv.unmet != "" {
		if sv.unmet == containerRule {
			return fmt.Sprintf("no node runs containers: none of the %d nodes has a container runtime: install containerd and runc on some", len(p.nodes))
		}
		if len(sv.rules) == 1 {
			return "no node matches constraint " + sv.unmet
		}
		var names []string
		for _, r := range sv.rules {
			names = append(names, r.name)
		}
		return "no node matches all constraints: " + strings.Join(names, ", ")
	}
	match, counts := 0, map[string]int{}
	for i, n := range p.nodes {
		if sv != nil && sv.fits != nil && !sv.fits[i] || p.elsewhere(sv, i) {
			continue
		}
		match++
		switch {
		case n.Status == spec.NodeDown:
			counts["down"]++
		case n.Status != spec.NodeReady:
			counts["not heard of yet"]++
		case n.Availability == spec.AvailabilityDrain:
			counts["drained"]++
		case n.Availability == spec.AvailabilityActive && p.portTaken(sv, i) == "" && p.enough(sv, i):
			counts[fullNode]++
		case n.Availability == spec.AvailabilityActive && p.portTaken(sv, i) == "" && p.short(sv, i):
			counts[shortNode]++
		case n.Availability == spec.AvailabilityActive:
			counts["with its published port taken"]++
		default:
			counts["paused"]++
		}
	}
	var parts []string
	for _, k := range []string{"down", "not heard of yet", "drained", "paused", "with its published port taken", fullNode, shortNode} {
		if counts[k] > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", counts[k], k))
		}
	}
	what := "nodes"
	if match == 1 {
		what = "node"
	}
	if match < len(p.nodes) {
		what += " that match"
		if match == 1 {
			what += "es"
		}
		what += " the constraints"
	}
	return fmt.Sprintf("%d %s: %s", match, what, strings.Join(parts, ", "))
}
