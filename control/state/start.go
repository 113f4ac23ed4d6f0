package state

import (
	"fmt"
	"slices"

	"github.com/shoalnet/shoal/spec"
)

// ownTask finds a standalone task that is not being removed; of a service's it says what
// to do instead.
func (s *State) ownTask(ref, instead string) (*task, error) {
	t, err := s.task(ref)
	if err != nil {
		return nil, err
	}
	if v := s.services[t.Service]; v != nil {
		return nil, failf(ErrInvalid, "task %s is a replica of service %s: %s", t.Name, v.Spec.Name, fmt.Sprintf(instead, v.Spec.Name))
	}
	if t.Desired == spec.DesiredRemove {
		return nil, fmt.Errorf("%w (task %s is being removed)", &NotFoundError{"task", ref}, t.Name)
	}
	return t, nil
}

func (s *State) startTask(c *StartTask) Result {
	t, err := s.ownTask(c.Ref, "the service starts it; use 'shoal svc update --force %s' for new replicas")
	if err != nil {
		return Result{Err: err}
	}
	live := t.Live()
	if live && !c.Restart || c.Run <= t.Run {
		out := t.Task
		return Result{Task: &out}
	}
	if c.Run != t.Run+1 {
		return Result{Err: failf(ErrConflict, "task %s has been started %d times: start %d of it can't be the next", t.Name, t.Run, c.Run)}
	}
	if c.Stopping != nil {
		if err := c.Stopping.Validate(); err != nil {
			return Result{Err: failf(ErrInvalid, "task %s: %w", t.Name, err)}
		}
	}
	n := s.nodes[t.Node]
	if n == nil {
		return Result{Err: failf(ErrInvalid, "task %s: its node is gone: make another with 'shoal run'", t.Name)}
	}
	if n.Status == spec.NodeDown {
		return Result{Err: failf(ErrInvalid, "task %s: node %s is down", t.Name, n.Name)}
	}
	if n.Level < 3 {
		return Result{Err: failf(ErrLevel, "task %s: node %s has level %d, and can't start a task again: upgrade shoal there", t.Name, n.Name, n.Level)}
	}
	if !live {
		if err := s.regain(t, n); err != nil {
			return Result{Err: err}
		}
	}
	t.Run, t.Desired, t.Spec.Attach, t.Stopping = c.Run, spec.DesiredRunning, c.Attach, c.Stopping
	if !live {
		t.Status = spec.TaskStatus{State: spec.TaskAssigned, At: c.Now, Run: t.Run, Wired: t.Status.Wired}
		t.started, t.ended, t.was = 0, 0, 0
	}
	s.touchTask(t)
	if c.Restart {
		s.taskEvent(t, "restart")
	} else {
		s.taskEvent(t, "start")
	}
	out := t.Task
	return Result{Task: &out}
}

// regain gives a task that has ended what it had: its ports, and when it was released,
// its addresses, or others if they are another's by now and were not asked for. It changes
// nothing if it fails.
func (s *State) regain(t *task, n *node) error {
	if t.holds() { // but for its ports, which an ended task leaves to others
		ports, err := s.taskPorts(t.Name, n, t.Ports, t.wants())
		if err == nil {
			t.Ports = ports
		}
		return err
	}
	nets := t.wants()
	for i, a := range nets {
		if s.networks[a.Network] == nil {
			return failf(ErrInvalid, "task %s: a network that it was on (%s) is removed: make another task with 'shoal run'", t.Name, a.Network)
		}
		k := slices.IndexFunc(t.Attachments, func(h spec.Attachment) bool { return h.Network == a.Network && h.Leaving == 0 })
		nets[i].Addrs = t.Attachments[k].Addrs
	}
	if err := s.checkTaskClash(t.Name, nets); err != nil {
		return fmt.Errorf("task %s: %w", t.Name, err)
	}
	if err := s.onNode(t.Name, n, nets); err != nil {
		return err
	}
	ports, err := s.taskPorts(t.Name, n, t.Ports, nets)
	if err != nil {
		return err
	}
	var u undo
	var as []spec.Attachment
	for _, had := range t.Attachments {
		i := slices.IndexFunc(nets, func(a spec.NetworkAttachment) bool { return a.Network == had.Network })
		if had.Leaving != 0 || i < 0 {
			continue
		}
		var mark undo
		got, err := s.attach(t, nets[i], &mark)
		if err != nil && !had.Fixed {
			mark.run()
			mark, nets[i].Addrs = undo{}, nil
			got, err = s.attach(t, nets[i], &mark)
		}
		u.add(mark.run)
		if err != nil {
			u.run()
			return fmt.Errorf("task %s: %w", t.Name, err)
		}
		had.Addrs, had.Joined = got.Addrs, 0
		as = append(as, had)
	}
	t.Attachments, t.Ports = as, ports
	return nil
}

func (s *State) renameTask(c *RenameTask) Result {
	t, err := s.ownTask(c.Ref, "replicas are named after it, and it keeps its name: make service %s anew for another")
	if err != nil {
		return Result{Err: err}
	}
	if err := spec.ValidateName("task", c.Name); err != nil {
		return Result{Err: failf(ErrInvalid, "%w", err)}
	}
	if c.Name == t.Name {
		return Result{Err: failf(ErrInvalid, "task %s has that name already", t.Name)}
	}
	if id, ok := s.taskNames[c.Name]; ok {
		return Result{Err: failf(ErrExists, "name %s is taken by task %s: remove it with 'shoal rm %s'", c.Name, id, c.Name)}
	}
	s.unnameTask(t) // its own name, but for its case, is free for it
	err = s.checkTaskName(c.Name)
	s.nameTask(t)
	if err != nil {
		return Result{Err: err}
	}
	if t.holds() {
		if err := s.checkTaskClash(c.Name, t.wants()); err != nil {
			return Result{Err: fmt.Errorf("task %s: %w", c.Name, err)}
		}
		// Addresses are held by name.
		for _, a := range t.Attachments {
			s.release(a.Network, a.Addrs, t.holder())
		}
	}
	s.unnameTask(t)
	was := t.Name
	t.Name = c.Name
	s.nameTask(t)
	if t.holds() {
		for _, a := range t.Attachments {
			_ = s.retake(a.Network, a.Addrs, t.holder()) // they were its own a moment ago
		}
	}
	s.touchTask(t)
	s.event("task", "rename", t.ID, t.Name, "was", was, "node", s.nodeName(t.Node))
	out := t.Task
	return Result{Task: &out}
}
