package state

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/shoalnet/shoal/spec"
)

// maxRun bounds what a node may say of the number of a task's runs.
const maxRun = 1 << 30

// maxMessage bounds what a node may say of a task, in bytes.
const maxMessage = 1024

// put adds a task to the state and all indices.
func (s *State) put(t *task) {
	s.tasks[t.ID] = t
	if t.Service != "" || t.Desired != spec.DesiredRemove {
		s.nameTask(t)
	}
	if v := s.services[t.Service]; v != nil {
		i, _ := slices.BinarySearchFunc(v.tasks, t, func(a, b *task) int {
			return cmp.Or(cmp.Compare(a.Slot, b.Slot), cmp.Compare(a.seq, b.seq))
		})
		v.tasks = slices.Insert(v.tasks, i, t)
	}
	if n := s.nodes[t.Node]; n != nil {
		n.tasks[t.ID] = t
		n.changed = s.index
	}
}

// forget removes a task, which must not hold addresses, from state and indices.
func (s *State) forget(t *task) {
	delete(s.tasks, t.ID)
	s.depart(t.ID)
	s.unnameTask(t)
	if v := s.services[t.Service]; v != nil {
		if i := slices.Index(v.tasks, t); i >= 0 {
			v.tasks = slices.Delete(v.tasks, i, i+1)
		}
	}
	if n := s.nodes[t.Node]; n != nil {
		delete(n.tasks, t.ID)
		n.changed = s.index
	}
}

// touchTask notes a change that the task's node must hear of.
func (s *State) touchTask(t *task) {
	t.Version = s.index
	if n := s.nodes[t.Node]; n != nil {
		n.changed = s.index
	}
}

// end sets the desired state of a task to shutdown or remove, and forgets it
// where nobody is left to act on that.
func (s *State) end(t *task, desired string) {
	if t.Desired == spec.DesiredRemove {
		desired = spec.DesiredRemove
	}
	if t.Node == "" || (desired == spec.DesiredRemove && !t.holds()) {
		// No node ever had it, or its node has released it.
		s.forget(t)
		return
	}
	if t.Desired == desired {
		return
	}
	t.Desired = desired
	if t.Service == "" && desired == spec.DesiredRemove {
		s.unnameTask(t)
	}
	s.touchTask(t)
}

// assign gives a task its node and addresses, or changes nothing.
func (s *State) assign(t *task, n *node, asked []spec.NetworkAttachment) error {
	var u undo
	var as []spec.Attachment
	for _, a := range asked {
		at, err := s.attach(t, a, &u)
		if err != nil {
			u.run()
			return err
		}
		if s.networks[a.Network].Wired() {
			at.Iface = freeIface(as)
		}
		as = append(as, at)
	}
	t.Attachments = as
	t.Node = n.ID
	return nil
}

func (s *State) createTask(c *CreateTask) Result {
	if err := s.checkID("task", c.ID); err != nil {
		return Result{Err: err}
	}
	if err := spec.ValidateName("task", c.Name); err != nil {
		return Result{Err: failf(ErrInvalid, "%w", err)}
	}
	if err := c.Spec.Validate(); err != nil {
		return Result{Err: failf(ErrInvalid, "task %s: %w", c.Name, err)}
	}
	if h := c.Spec.Hostname; h != "" { // of services only it may be a template
		if err := spec.ValidateHostname(h); err != nil {
			return Result{Err: failf(ErrInvalid, "task %s: %w", c.Name, err)}
		}
	}
	if id, ok := s.taskNames[c.Name]; ok {
		t, where := s.tasks[id], ""
		if n := s.nodes[t.Node]; n != nil {
			where = " on node " + n.Name
		}
		return Result{Err: failf(ErrExists, "name %s is taken by task %s%s: remove it with 'shoal rm %s'", c.Name, id, where, c.Name)}
	}
	if err := s.checkTaskName(c.Name); err != nil {
		return Result{Err: err}
	}
	ts, err := s.resolveBlobs(c.Spec)
	if err != nil {
		return Result{Err: fmt.Errorf("task %s: %w", c.Name, err)}
	}
	nets, err := s.resolve(c.Networks)
	if err == nil {
		err = s.checkNames(c.Spec.Names(), nil)
	}
	if err == nil {
		err = s.checkTaskClash(c.Name, nets)
	}
	if err != nil {
		return Result{Err: fmt.Errorf("task %s: %w", c.Name, err)}
	}
	var n *node
	if c.Node == "" {
		p := newPlanner(s, c.Created)
		i, why := p.pick(p.standalone(nets, c.Ports, c.Spec))
		if i < 0 {
			return Result{Err: failf(ErrInvalid, "task %s: no node can run it: %s", c.Name, why)}
		}
		n = p.nodes[i]
	} else if n, err = s.node(c.Node); err != nil {
		return Result{Err: err}
	}
	if n.Status == spec.NodeDown {
		return Result{Err: failf(ErrInvalid, "task %s: node %s is down", c.Name, n.Name)}
	}
	if err := s.onNode(c.Name, n, nets); err != nil {
		return Result{Err: err}
	}
	ports, err := s.taskPorts(c.Name, n, c.Ports, nets)
	if err != nil {
		return Result{Err: err}
	}
	t := &task{seq: s.seq + 1, Task: spec.Task{ID: c.ID, Ports: ports, Name: c.Name, Spec: ts, Desired: spec.DesiredRunning,
		Status: spec.TaskStatus{State: spec.TaskAssigned, At: c.Created}, Version: s.index, Created: c.Created}}
	if err := s.assign(t, n, nets); err != nil {
		return Result{Err: fmt.Errorf("task %s: %w", c.Name, err)}
	}
	s.seq++
	s.put(t)
	s.taskEvent(t, "create")
	out := t.Task
	return Result{Task: &out}
}

func (s *State) stopTask(c *StopTask) Result {
	t, err := s.task(c.Ref)
	if err != nil {
		return Result{Err: err}
	}
	desired := spec.DesiredShutdown
	if c.Remove {
		// Of two that remove it one has, and is waiting for its end.
		if t.Desired == spec.DesiredRemove {
			return Result{Err: fmt.Errorf("%w (task %s is being removed already)", &NotFoundError{"task", c.Ref}, t.Name)}
		}
		desired = spec.DesiredRemove
	}
	if c.Stopping != nil {
		if err := c.Stopping.Validate(); err != nil {
			return Result{Err: failf(ErrInvalid, "task %s: %w", t.Name, err)}
		}
	}
	if t.Desired != desired {
		t.Stopping = c.Stopping
	}
	s.end(t, desired)
	out := t.Task
	out.Desired = desired
	if v := s.services[t.Service]; v != nil {
		s.finish(v)
	}
	return Result{Task: &out}
}

func (s *State) reportTasks(c *ReportTasks) Result {
	n := s.nodes[c.Node]
	if n == nil {
		return Result{Err: &NotFoundError{"node", c.Node}}
	}
	for _, id := range slices.Sorted(maps.Keys(c.Tasks)) {
		if t := s.tasks[id]; t != nil && t.Node == n.ID {
			s.report(t, c.Tasks[id], c.Now)
		}
	}
	return Result{}
}

// report takes up what a task's node says. States only move forward, but for
// two: a lost task that runs on and has no successor is taken back, and one whose
// node was started anew is, in the words of that node, being made again.
//
// What a node says of a task that was lost with it is no news of the program: as
// long as was is set, its end is the node's. The first word that it lives clears it.
func (s *State) report(t *task, st spec.TaskStatus, now int64) {
	cur := t.Status
	if cur.Released || st.State < spec.TaskPreparing || st.State >= spec.TaskLost {
		return
	}
	// The end of a run is no news where the next one is asked for: what the task holds
	// is that one's.
	if st.Run < cur.Run || st.Run < t.Run && (st.State.Ended() || st.Released) || st.Run > maxRun {
		return
	}
	if st.Run > t.Run { // managers whose state is an old one's again hear of it
		t.Run, t.heard = st.Run, s.index
		if n := s.nodes[t.Node]; n != nil {
			n.changed = s.index
		}
	}
	if st.Released && !st.State.Ended() {
		if st.State = spec.TaskFailed; t.Desired != spec.DesiredRunning {
			st.State = spec.TaskShutdown
		}
	}
	if len(st.Message) > maxMessage {
		st.Message = strings.ToValidUTF8(st.Message[:maxMessage], "") + "…"
	}
	switch {
	case cur.State == spec.TaskLost && st.State.Ended():
	case cur.State == spec.TaskLost:
		if !s.revivable(t) {
			return
		}
		t.ended = 0
		s.touchTask(t)
	case st.Run > cur.Run:
		t.started, t.ended, t.was = 0, 0, 0
	case cur.State.Ended() && st.State != cur.State:
		if !st.Released {
			return
		}
		cur.Released, cur.PID = true, 0
		st = cur
	case again(cur, st):
	case st.State < cur.State || st == cur:
		return
	}
	if st.State >= spec.TaskStarting && !st.State.Ended() {
		t.was = 0
	}
	st.Wired = max(st.Wired, cur.Wired)
	st.Listened = st.Listened || cur.Listened
	t.Status, t.Version = st, s.index
	if st.State != cur.State {
		s.taskEvent(t, st.State.String())
	}
	if st.Health != cur.Health && st.Health != "" {
		s.taskEvent(t, "health_status: "+st.Health) // Docker's word
	}
	s.unwire(t)
	if st.State == spec.TaskRunning && t.started == 0 {
		t.started = now
	}
	if st.State.Ended() && t.ended == 0 {
		t.ended = now
	}
	if st.Released {
		t.Status.Released = false
		s.free(t)
	}
}

// again tells whether a node makes a task anew that ran: it was started anew
// itself, and its runtime has nothing of the task any more. Its clock tells such
// word from an older one that comes late. An agent that is started anew finds the
// program, which is still the one with this PID, and does not say so of it.
func again(cur, st spec.TaskStatus) bool {
	return cur.State == spec.TaskRunning && st.At > cur.At && st.PID != cur.PID &&
		(st.State == spec.TaskPreparing || st.State == spec.TaskStarting)
}

// free gives the task's addresses back: its node has released it, or is gone.
func (s *State) free(t *task) {
	if t.holds() {
		for _, a := range t.Attachments {
			s.release(a.Network, a.Addrs, t.holder())
		}
	}
	t.Status.Released, t.Status.PID = true, 0
	s.touchTask(t)
	v := s.services[t.Service]
	// One that failed before it was known to run is left for who made it to see
	// why, and to remove.
	autoRemove := v == nil && t.Spec.AutoRemove && (t.started != 0 || t.Status.State != spec.TaskFailed)
	if t.Desired == spec.DesiredRemove || autoRemove {
		s.forget(t)
	} else if v != nil {
		s.trim(v, t.Slot)
	}
	if v != nil {
		s.finish(v)
	}
}

// revivable tells whether a lost task is still the one that its slot wants.
func (s *State) revivable(t *task) bool {
	if t.Desired != spec.DesiredRunning {
		return false
	}
	v := s.services[t.Service]
	if v == nil {
		return true
	}
	for _, o := range v.slot(t.Slot) {
		if o != t && o.Live() && o.Node != "" {
			return false
		}
	}
	return true
}

// lose marks a task of a node that is down.
func (s *State) lose(t *task, now int64) {
	t.was, t.ended = t.Status.State, now
	t.Status.State, t.Status.Message = spec.TaskLost, "its node is down"
	defer s.taskEvent(t, spec.TaskLost.String())
	if n := s.nodes[t.Node]; n != nil {
		t.Status.Message = "node " + n.Name + " is down"
	}
	t.Version = s.index
}

// Gave tells whether the managers gave an endpoint to the node that says it has it: the
// task, on that network, with its addresses and names.
func (s *State) Gave(e spec.Endpoint) bool {
	t := s.tasks[e.Task]
	if t == nil || !t.holds() || t.Node != e.Node || t.Name != e.TaskName || t.Service != e.Service {
		return false
	}
	return slices.ContainsFunc(t.Attachments, func(a spec.Attachment) bool {
		return a.Network == e.Network && slices.Equal(a.Addrs, e.Addrs) &&
			!slices.ContainsFunc(e.Aliases, func(x string) bool { return !slices.Contains(a.Aliases, x) })
	})
}
