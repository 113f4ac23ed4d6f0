package state

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/shoalnet/shoal/spec"
)

// OpKind is what a ScheduleOp does.
type OpKind string

// Kinds of operation.
const (
	OpCreate OpKind = "create" // a task in a slot; with Node it is assigned at once, else pending
	OpAssign OpKind = "assign" // a pending task to Node
	OpWait   OpKind = "wait"   // note in Message why a task is pending
	OpStop   OpKind = "stop"   // shut a task down; with By, only while that one runs
	OpRemove OpKind = "remove" // end and forget all tasks of a slot: scaled down
	OpLost   OpKind = "lost"   // a task whose node is down
	OpUpdate OpKind = "update" // a service's update to State
)

// ScheduleOp is one decision of [Plan]. The versions are those that it was
// decided on: it is skipped when they are others by the time it is applied.
type ScheduleOp struct {
	Kind           OpKind `json:"kind"`
	Task           string `json:"task,omitempty"` // ID; create: the new one's
	Version        uint64 `json:"version,omitempty"`
	Service        string `json:"service,omitempty"` // ID
	ServiceVersion uint64 `json:"service_version,omitempty"`
	Slot           int    `json:"slot,omitempty"`
	Node           string `json:"node,omitempty"`       // ID
	NotBefore      int64  `json:"not_before,omitempty"` // Unix milliseconds
	Attempt        int    `json:"attempt,omitempty"`
	By             string `json:"by,omitempty"` // ID of the task that replaces Task
	Message        string `json:"message,omitempty"`
	State          string `json:"state,omitempty" level:"2"` // of an update
}

// String is for logs.
func (o ScheduleOp) String() string {
	switch o.Kind {
	case OpCreate:
		return fmt.Sprintf("create task %s for slot %d of service %s on node %q", o.Task, o.Slot, o.Service, o.Node)
	case OpRemove:
		return fmt.Sprintf("remove slot %d of service %s", o.Slot, o.Service)
	case OpUpdate:
		return fmt.Sprintf("update of service %s is %s", o.Service, o.State)
	case OpAssign:
		return fmt.Sprintf("assign task %s to node %s", o.Task, o.Node)
	}
	return fmt.Sprintf("%s task %s", o.Kind, o.Task)
}

func (s *State) schedule(c *Schedule) Result {
	var r Result
	for _, op := range c.Ops {
		if s.scheduleOp(op, c.Now) {
			r.Applied++
		} else {
			r.Skipped++
		}
	}
	return r
}

// scheduleOp carries out one operation, or returns false and changes nothing.
func (s *State) scheduleOp(op ScheduleOp, now int64) bool {
	switch op.Kind {
	case OpCreate, OpRemove, OpUpdate:
		v := s.services[op.Service]
		if v == nil || v.removed || v.Version != op.ServiceVersion {
			return false
		}
		if op.Kind == OpUpdate {
			return s.turnUpdate(v, op, now)
		}
		if op.Slot < 1 {
			return false
		}
		if op.Kind == OpRemove {
			return s.removeSlot(v, op.Slot)
		}
		return s.createReplica(v, op, now)
	}
	t := s.tasks[op.Task]
	if t == nil || t.Version != op.Version {
		return false
	}
	switch op.Kind {
	case OpAssign:
		v, n := s.services[t.Service], s.nodes[op.Node]
		if v == nil || v.Spec.Global() && s.numbers[t.Slot] != op.Node {
			return false
		}
		if t.Node != "" || t.Desired != spec.DesiredRunning || !assignable(n) || s.assign(t, n, taskNetworks(v.Spec)) != nil {
			return false
		}
		t.Status = spec.TaskStatus{State: spec.TaskAssigned, At: now}
		t.NotBefore = 0 // it is over; the node's clock may be another
		t.Version = s.index
		n.tasks[t.ID] = t
		n.changed = s.index
		s.supersede(v, t)
		return true
	case OpWait:
		if t.Node != "" {
			return false
		}
		t.Status.Message, t.Version = op.Message, s.index
		return true
	case OpStop:
		if op.By != "" {
			if by := s.tasks[op.By]; by == nil || by == t || !by.Live() || by.Status.State != spec.TaskRunning {
				return false
			}
		}
		if t.Desired != spec.DesiredRunning {
			return false
		}
		s.end(t, spec.DesiredShutdown)
		return true
	case OpLost:
		n := s.nodes[t.Node]
		if n == nil || n.Status != spec.NodeDown || t.Status.State.Ended() {
			return false
		}
		s.lose(t, now)
		return true
	}
	return false
}

// taskNetworks are the networks of a service's tasks. The addresses asked for
// there are VIPs.
func taskNetworks(sp spec.ServiceSpec) []spec.NetworkAttachment {
	as := slices.Clone(sp.Networks)
	for i := range as {
		as[i].Addrs = nil
	}
	return as
}

func (s *State) createReplica(v *service, op ScheduleOp, now int64) bool {
	slotActive := false
	for _, t := range v.slot(op.Slot) {
		slotActive = slotActive || t.Desired == spec.DesiredRunning
		if t.Live() && t.rev == v.rev && s.stays(v, t) {
			return false // there is one already
		}
	}
	if !slotActive && !modeOf(v.Spec).room(v, op.Slot) {
		return false
	}
	n := s.nodes[op.Node]
	name := fmt.Sprintf("%s.%d.%s", v.Spec.Name, op.Slot, op.Task)
	if v.Spec.Global() {
		home := s.nodes[s.numbers[op.Slot]]
		if !keeps(home) || n != nil && n != home {
			return false
		}
		name = fmt.Sprintf("%s.%s.%s", v.Spec.Name, home.ID, op.Task)
	}
	if s.checkID("task", op.Task) != nil || (op.Node != "" && !assignable(n)) {
		return false
	}
	t := &task{seq: s.seq + 1, rev: v.rev, Task: spec.Task{ID: op.Task, Name: name,
		Service: v.ID, Slot: op.Slot, Spec: v.Spec.Task, Desired: spec.DesiredRunning, Version: s.index, Created: now,
		NotBefore: op.NotBefore, Attempt: op.Attempt, Status: spec.TaskStatus{State: spec.TaskPending, Message: op.Message, At: now}}}
	if _, taken := s.taskNames[t.Name]; taken {
		return false
	}
	if v.replacesListener(op.Slot) {
		t.ListenWithin = v.Spec.ListenWithin()
	}
	for _, a := range v.Spec.Networks {
		t.Attachments = append(t.Attachments, spec.Attachment{Network: a.Network, Aliases: a.Aliases})
	}
	if op.Node != "" {
		if s.assign(t, n, taskNetworks(v.Spec)) != nil {
			return false
		}
		t.Status, t.NotBefore = spec.TaskStatus{State: spec.TaskAssigned, At: now}, 0
	}
	s.seq++
	s.put(t)
	s.taskEvent(t, "create")
	s.supersede(v, t)
	s.trim(v, t.Slot)
	return true
}

// replacesListener tells whether a new task of a slot takes the place of one that
// listens, or did until it was stopped for the new one's sake: of a task of another
// template the place is open until one of this template has run.
func (v *service) replacesListener(slot int) bool {
	had, ran := false, false
	for _, o := range v.slot(slot) {
		if o.Live() && running(o) && o.Status.Listened {
			return true
		}
		had = had || o.rev != v.rev && o.Status.Listened
		ran = ran || o.rev == v.rev && o.started != 0
	}
	return had && !ran
}

// supersede ends the wish to run of a slot's tasks that have ended, now that t
// takes their place. A lost one may be taken back while t has no node.
func (s *State) supersede(v *service, t *task) {
	for _, o := range slices.Clone(v.slot(t.Slot)) {
		if o != t && o.Desired == spec.DesiredRunning && o.Status.State.Ended() && (o.Status.State != spec.TaskLost || t.Node != "" || o.Status.Released) {
			s.end(o, spec.DesiredShutdown)
		}
	}
}

// removeSlot ends and forgets what is in a slot, if there are more slots than
// replicas, or the node that it belongs to is not to have it.
func (s *State) removeSlot(v *service, slot int) bool {
	ts := slices.Clone(v.slot(slot))
	if !slices.ContainsFunc(ts, func(t *task) bool { return t.Desired == spec.DesiredRunning }) {
		return false
	}
	if modeOf(v.Spec).needs(s, v, slot) {
		return false
	}
	for _, t := range ts {
		s.end(t, spec.DesiredRemove)
	}
	return true
}

// failWindow and failMost: a node on which a service's tasks failed failMost
// times within failWindow milliseconds gets another only when no other node
// fits. Without it a node on which they can't run attracts every one of them,
// as it always has the fewest.
const (
	failWindow = 5 * 60 * 1000
	failMost   = 5
)

// longRun is a run that counts as a success, in milliseconds.
const longRun = 10_000

// maxOps bounds a plan; the rest comes with the next one.
const maxOps = 1000

// Plan decides what the cluster should do next to have what it should have. It
// is pure: the leader puts the operations into a [Schedule] command, with the
// same now, and plans again when that, or anything else, was applied. next is
// when (Unix milliseconds) Plan would say more though nothing changed, 0 if never.
func Plan(s *State, now int64) (ops []ScheduleOp, next int64) {
	if s.cluster == nil {
		return nil, 0
	}
	p := newPlanner(s, now)
	p.loseTasks()
	// By age: whoever was there first gets the last address.
	vs := make([]*service, 0, len(s.services))
	for _, v := range s.services {
		if !v.removed {
			vs = append(vs, v)
		}
	}
	slices.SortFunc(vs, func(a, b *service) int { return cmp.Or(cmp.Compare(a.Created, b.Created), cmp.Compare(a.ID, b.ID)) })
	for _, v := range vs {
		if p.full() {
			break
		}
		p.service(v)
	}
	if p.full() {
		p.again(now)
	}
	return p.ops, p.next
}
