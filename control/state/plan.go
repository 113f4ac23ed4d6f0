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
	s        *State
	now      int64
	ops      []ScheduleOp
	next     int64
	nodes    []*node // by ID
	idx      map[string]int
	total    []int // tasks by node; made when first needed
	lost     map[*task]bool
	room     map[string]*room // by network; made when first needed
	reserved []reservation    // by node; made when first needed
	// claimed are the ports (mode host) of what this plan puts on a node.
	claimed map[int][]spec.Port
	slots   []slotPlan // of the service at hand; kept for its memory
}

// reservation is what tasks are promised of their node.
type reservation struct{ nanoCPUs, memory int64 }

func (r *reservation) add(o reservation) {
	r.nanoCPUs += o.nanoCPUs
	r.memory += o.memory
}

func reservationOf(r spec.Resources) reservation {
	return reservation{r.ReserveNanoCPUs, r.ReserveMemory}
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

// remove gives a slot up.
func (p *planner) remove(sv *servicePlan, sp *slotPlan) {
	sp.gone = true
	p.op(ScheduleOp{Kind: OpRemove, Service: sv.v.ID, ServiceVersion: sv.v.Version, Slot: sp.slot})
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
	stay    []bool      // by node: meets those that don't lapse; nil: there are no rules
	counts  []int       // by node: tasks that will stay; made when first needed
	fails   []int       // by node: recent failures
	unmet   string      // a rule that no node meets
	ready   bool        // counts and fails are made
	started int         // slots on their way to the current template
	up      updater
	missing bool  // there are to be more slots
	without *task // pick looks as if this one were gone
	mode    mode
	home    int     // of the slot that pick looks for a node for, see mode
	here    []int   // by node: tasks that have not ended; made with counts, where they are limited
	groups  [][]int // by preference and node, numbers less than there are nodes: which value of its label a node has
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
	begun  bool // counted as being replaced
	failed bool // its replacement failed, in the eyes of the update
	asleep bool // its node is away, or takes nothing: nothing is decided for it
}

// service plans for one service: its mode decides which slots there are, the updater
// what runs in each.
func (p *planner) service(v *service) {
	sv := p.known(v)
	p.gather(sv)
	sv.mode.shrink(p, sv)
	for i := range p.slots {
		p.slots[i].asleep = sv.mode.asleep(p, &p.slots[i])
	}
	if v.Spec.Job() {
		p.job(sv)
		return
	}
	sv.missing = sv.mode.missing(p, sv)
	if p.update(sv) {
		sv.mode.grow(p, sv)
	}
}

// known is what a service's rules make of the nodes.
func (p *planner) known(v *service) *servicePlan {
	sv := &servicePlan{v: v, mode: modeOf(v.Spec), home: anywhere}
	sv.rules, sv.ports = p.s.rulesOf(v), HostPorts(v.Service)
	p.match(sv)
	return sv
}

// gather finds the active slots, and what is in them.
func (p *planner) gather(sv *servicePlan) {
	v := sv.v
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

func (p *planner) stop(t *task, by string) {
	p.op(ScheduleOp{Kind: OpStop, Task: t.ID, Version: t.Version, By: by})
}

// restart tells whether and from when on an ended task is to be replaced.
func (p *planner) restart(v *service, last *task) (attempt int, at int64, ok bool) {
	switch {
	case last.rev != v.rev:
		return 0, 0, true
	case !v.Spec.Restarts(last.Status.State):
		return 0, 0, false
	case last.Status.State == spec.TaskLost || last.was != 0 || p.lost[last]:
		return last.Attempt, 0, true // the node's end, not the program's
	}
	attempt = last.Attempt + 1
	if last.started > 0 && last.ended-last.started >= v.successAfter() {
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

// successAfter is how long a run lasts that counts as a success, in milliseconds.
func (v *service) successAfter() int64 {
	if w := v.Spec.RestartWindow.Milliseconds(); w > 0 {
		return w
	}
	return longRun
}

// recent tells whether a failure counts against its node. One that lies ahead was noted
// by a clock that was wrong.
func recent(now, ended int64) bool { return ended <= now && now-ended < failWindow }

// restartDelay is the wait before a restart, in milliseconds.
func restartDelay(v *service, attempt int) int64 {
	return v.Spec.RestartWait(attempt).Milliseconds()
}

// waits tells whether a pending task has to wait for its time. A time that is further
// away than its delay is of a clock that was ahead, and no reason to wait.
func (p *planner) waits(v *service, t *task) bool {
	return t.NotBefore > p.now && t.NotBefore-p.now <= restartDelay(v, t.Attempt)
}

// creation is the operation that makes a task for a slot.
func (p *planner) creation(sv *servicePlan, slot, attempt int) ScheduleOp {
	return ScheduleOp{Kind: OpCreate, Task: p.newID(sv.v, slot), Service: sv.v.ID, ServiceVersion: sv.v.Version, Slot: slot, Attempt: attempt}
}

// create makes a task for a slot, with a node if it may start now and one fits; it
// tells whether one does.
func (p *planner) create(sv *servicePlan, slot, attempt int, at int64, last *task) bool {
	o := p.creation(sv, slot, attempt)
	if at > p.now {
		o.NotBefore = at
		o.Message = fmt.Sprintf("restart %d in %s", attempt, milliseconds(at-p.now))
		if last != nil && last.Status.Message != "" {
			// The reason first: the rest may be cut off.
			o.Message = last.Status.Message + "; " + o.Message
		}
		p.again(at)
	} else if i, why := p.find(sv, slot); i >= 0 {
		o.Node = p.nodes[i].ID
	} else {
		o.Message = why
	}
	p.op(o)
	return o.Node != ""
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
