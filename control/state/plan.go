package state

import (
	"cmp"
	"crypto/sha256"
	"encoding/base32"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/shoalnet/shoal/spec"
)

// planner is one run of Plan.
type planner struct {
	s     *State
	now   int64
	ops   []ScheduleOp
	next  int64
	nodes []*node // by ID
	idx   map[string]int
	total []int // tasks by node; made when first needed
	lost  map[*task]bool
	room  map[string]*room // by network; made when first needed
	// claimed are the ports (mode host) of what this plan puts on a node.
	claimed map[int][]spec.Port
	slots   []slotPlan // of the service at hand; kept for its memory
}

type room struct {
	free int
	err  error // why none is
}

func newPlanner(s *State, now int64) *planner {
	p := &planner{s: s, now: now, idx: make(map[string]int, len(s.nodes)), lost: map[*task]bool{}, room: map[string]*room{}, claimed: map[int][]spec.Port{}}
	for i, id := range slices.Sorted(maps.Keys(s.nodes)) {
		p.nodes = append(p.nodes, s.nodes[id])
		p.idx[id] = i
	}
	return p
}

func (p *planner) op(o ScheduleOp) { p.ops = append(p.ops, o) }

func (p *planner) full() bool { return len(p.ops) >= maxOps }

// again asks for another plan at the given time.
func (p *planner) again(at int64) {
	if p.next == 0 || at < p.next {
		p.next = at
	}
}

// loseTasks marks what runs on nodes that are down.
func (p *planner) loseTasks() {
	for _, n := range p.nodes {
		if n.Status != spec.NodeDown {
			continue
		}
		var ts []*task
		for _, t := range n.tasks {
			if !t.Status.State.Ended() {
				ts = append(ts, t)
			}
		}
		slices.SortFunc(ts, func(a, b *task) int { return cmp.Compare(a.seq, b.seq) })
		for _, t := range ts {
			p.lost[t] = true
			p.op(ScheduleOp{Kind: OpLost, Task: t.ID, Version: t.Version})
		}
	}
}

// servicePlan is what is known of the service at hand.
type servicePlan struct {
	v       *service // nil: of a standalone task
	rules   []rule
	ports   []spec.Port // that a task publishes on its node
	fits    []bool      // by node: meets the rules; nil: there are none
	counts  []int       // by node: tasks that will stay; made when first needed
	fails   []int       // by node: recent failures
	unmet   string      // a rule that no node meets
	ready   bool        // counts and fails are made
	started int         // slots on their way to the current template
}

// slotPlan is what is known of one active slot.
type slotPlan struct {
	slot  int
	best  *task   // the one that is to stay
	stale *task   // the best of those that are to be replaced
	drop  []*task // others that run or will
	last  *task   // the newest that has ended and was not replaced
	over  []*task // all that have ended and are still wanted
	gone  bool    // scaled down
	// ending: a task that was stopped has not let go of its addresses yet, which
	// the slot's next one may be waiting for
	ending bool
}

func (p *planner) service(v *service) {
	sv := &servicePlan{v: v}
	sv.rules, sv.ports = p.s.taskRules(v.Spec.Constraints, v.Spec.Networks, v.Spec.Task.Image, specLevel(v.Spec)), HostPorts(v.Service)
	p.match(sv)
	p.slots = p.slots[:0]
	for i := 0; i < len(v.tasks); {
		sp := slotPlan{slot: v.tasks[i].Slot}
		active := false
		for ; i < len(v.tasks) && v.tasks[i].Slot == sp.slot; i++ {
			t := v.tasks[i]
			if t.Desired != spec.DesiredRunning {
				sp.ending = sp.ending || (t.holds() && t.Status.State != spec.TaskLost)
				continue
			}
			active = true
			if t.Status.State.Ended() || (len(p.lost) > 0 && p.lost[t]) {
				sp.last = t
				if t.Status.State.Ended() {
					sp.over = append(sp.over, t)
				}
				continue
			}
			keep := &sp.best
			if t.rev != v.rev || !p.stays(sv, t) {
				keep = &sp.stale
			}
			if *keep == nil {
				*keep = t
			} else if rank(t) > rank(*keep) {
				sp.drop = append(sp.drop, *keep)
				*keep = t
			} else {
				sp.drop = append(sp.drop, t)
			}
		}
		if active {
			p.slots = append(p.slots, sp)
		}
	}
	if k := len(p.slots) - v.Spec.Replicas; k > 0 {
		p.scaleDown(sv, k)
	}
	for i := range p.slots {
		if sp := &p.slots[i]; !sp.gone && p.underway(v, sp) {
			sv.started++
		}
	}
	// Slots that have nothing but what must go come last: whether one may begin
	// depends on what the others are about.
	for _, only := range []bool{false, true} {
		for i := range p.slots {
			if p.full() {
				return
			}
			if sp := &p.slots[i]; !sp.gone && (sp.best == nil && sp.stale != nil) == only {
				p.slot(sv, sp)
			}
		}
	}
	// New slots take the lowest free numbers.
	slot, at := 1, 0
	for k := len(p.slots); k < v.Spec.Replicas && !p.full(); k++ {
		for at < len(p.slots) && p.slots[at].slot == slot {
			at++
			slot++
		}
		p.create(sv, slot, 0, 0, nil)
		slot++
	}
}

// rank orders the tasks of a slot by how much they are worth keeping.
func rank(t *task) int {
	switch t.Status.State {
	case spec.TaskRunning:
		return 100
	case spec.TaskStopping:
		return 0
	}
	return 1 + int(t.Status.State)
}

func running(t *task) bool { return t != nil && t.Status.State == spec.TaskRunning }

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

func (p *planner) stop(t *task, by string) {
	p.op(ScheduleOp{Kind: OpStop, Task: t.ID, Version: t.Version, By: by})
}

// restart tells whether and from when on an ended task is to be replaced.
func (p *planner) restart(v *service, last *task) (attempt int, at int64, ok bool) {
	switch {
	case last.rev != v.rev:
		return 0, 0, true
	case last.Status.State == spec.TaskLost || last.was != 0 || p.lost[last]:
		return last.Attempt, 0, true // the node's end, not the program's
	}
	attempt = last.Attempt + 1
	if last.started > 0 && last.ended-last.started >= longRun {
		attempt = 1
	}
	if v.Spec.RestartMax > 0 && attempt > v.Spec.RestartMax {
		return 0, 0, false
	}
	delay := restartDelay(v, attempt)
	// The end was noted by the clock of a leader, perhaps another one's, that may have
	// been hours ahead: nobody waits longer than the delay itself.
	return attempt, min(last.ended+delay, p.now+delay), true
}

// recent tells whether a failure counts against its node. One that lies ahead was noted
// by a clock that was wrong.
func recent(now, ended int64) bool { return ended <= now && now-ended < failWindow }

// restartDelay is the wait before a restart, in milliseconds.
func restartDelay(v *service, attempt int) int64 {
	delay := v.Spec.RestartDelay.Milliseconds()
	if delay <= 0 {
		delay = restartFirst
	}
	for i := 1; i < attempt && delay < restartMost; i++ {
		delay = min(2*delay, restartMost)
	}
	return delay
}

// waits tells whether a pending task has to wait for its time. A time that is further
// away than its delay is of a clock that was ahead, and no reason to wait.
func (p *planner) waits(v *service, t *task) bool {
	return t.NotBefore > p.now && t.NotBefore-p.now <= restartDelay(v, t.Attempt)
}

// create makes a task for a slot, with a node if it may start now and one fits.
func (p *planner) create(sv *servicePlan, slot, attempt int, at int64, last *task) {
	o := ScheduleOp{Kind: OpCreate, Task: p.newID(sv.v, slot), Service: sv.v.ID, ServiceVersion: sv.v.Version, Slot: slot, Attempt: attempt}
	if at > p.now {
		o.NotBefore = at
		o.Message = fmt.Sprintf("restart %d in %s", attempt, milliseconds(at-p.now))
		if last != nil && last.Status.Message != "" {
			// The reason first: the rest may be cut off.
			o.Message = last.Status.Message + "; " + o.Message
		}
		p.again(at)
	} else if i, why := p.find(sv); i >= 0 {
		o.Node = p.nodes[i].ID
	} else {
		o.Message = why
	}
	p.op(o)
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

// find picks a node for one more task of a service, and counts it there. Without
// one it returns -1 and why.
func (p *planner) find(sv *servicePlan) (int, string) {
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
	sv.started++
	if len(sv.ports) > 0 {
		p.claimed[i] = append(p.claimed[i], sv.ports...)
	}
	return i, ""
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
	sv.fits = make([]bool, len(p.nodes))
	left := len(p.nodes)
	for i := range sv.fits {
		sv.fits[i] = true
	}
	for _, r := range sv.rules {
		for i, n := range p.nodes {
			if sv.fits[i] && !r.fits(n.Node) {
				sv.fits[i] = false
				left--
			}
		}
		if left == 0 {
			sv.unmet = r.name
			return
		}
	}
}

// stays tells whether a task may stay on its node.
func (p *planner) stays(sv *servicePlan, t *task) bool {
	if t.Node == "" {
		return true
	}
	i, ok := p.idx[t.Node]
	return ok && keeps(p.nodes[i]) && (sv.fits == nil || sv.fits[i])
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
	for _, t := range sv.v.tasks {
		i, ok := p.idx[t.Node]
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

// pick chooses a node for one more task: fewest tasks of the service (nil: none),
// then fewest in all, then the lowest ID. Without one it returns -1 and why.
func (p *planner) pick(sv *servicePlan) (int, string) {
	p.prepare(sv)
	best := -1
	var bestKey [3]int
	for i, n := range p.nodes {
		if !assignable(n) || (sv != nil && sv.fits != nil && !sv.fits[i]) || p.portTaken(sv, i) != "" {
			continue
		}
		key := [3]int{2: p.total[i]}
		if sv != nil {
			key[1] = sv.counts[i]
			if sv.fails[i] >= failMost {
				key[0] = 1
			}
		}
		if best < 0 || slices.Compare(key[:], bestKey[:]) < 0 {
			best, bestKey = i, key
		}
	}
	if best >= 0 {
		return best, ""
	}
	return -1, p.nowhere(sv)
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
		if owner := p.nodes[i].portHolder(p.s, port, nil); owner != "" {
			return owner
		}
	}
	return ""
}

// standalone is what pick needs to know of a task on its own.
func (p *planner) standalone(nets []spec.NetworkAttachment, ports []spec.Port, t spec.TaskSpec) *servicePlan {
	level, _ := NeedOf(t)
	sv := &servicePlan{rules: p.s.taskRules(nil, nets, t.Image, level), ports: ports}
	p.match(sv)
	return sv
}

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
		if sv != nil && sv.fits != nil && !sv.fits[i] {
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
		case n.Availability == spec.AvailabilityActive:
			counts["with its published port taken"]++
		default:
			counts["paused"]++
		}
	}
	var parts []string
	for _, k := range []string{"down", "not heard of yet", "drained", "paused", "with its published port taken"} {
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

// newID makes an ID that is new, and the same for the same state.
func (p *planner) newID(v *service, slot int) string {
	h := sha256.Sum256(fmt.Appendf(nil, "%s/%s/%d/%d/%d", p.s.cluster.ID, v.ID, slot, p.s.index, len(p.ops)))
	return strings.ToLower(base32.StdEncoding.EncodeToString(h[:10]))[:spec.IDLen]
}

func milliseconds(ms int64) string {
	if ms < 1000 {
		return fmt.Sprintf("%d ms", ms)
	}
	return fmt.Sprintf("%.1f s", float64(ms)/1000)
}
