package state

import (
	"fmt"
	"slices"
	"strconv"

	"github.com/shoalnet/shoal/spec"
)

// attach gives t an address and an interface on a network.
func (s *State) attach(t *task, a spec.NetworkAttachment, u *undo) (spec.Attachment, error) {
	w := s.networks[a.Network]
	if w == nil {
		return spec.Attachment{}, &NotFoundError{"network", a.Network}
	}
	out := spec.Attachment{Network: w.ID, Aliases: slices.Clone(a.Aliases)}
	if !w.Wired() {
		return out, nil
	}
	addrs, err := w.allocate(a.Addrs, t.holder(), u)
	if err != nil {
		return out, err
	}
	out.Addrs, out.Fixed = addrs, s.rules >= 3 && t.Service == "" && len(a.Addrs) > 0
	return out, nil
}

// freeIface is the first of eth0, eth1, … that no attachment has.
func freeIface(as []spec.Attachment) string {
	for i := 0; ; i++ {
		name := "eth" + strconv.Itoa(i)
		if !slices.ContainsFunc(as, func(a spec.Attachment) bool { return a.Iface == name }) {
			return name
		}
	}
}

// rewire brings a task's attachments to what is wanted, without touching those
// that stay. What leaves keeps its address until the node has taken it off.
func (s *State) rewire(t *task, want []spec.NetworkAttachment, u *undo) error {
	as := spec.CloneAttachments(t.Attachments)
	changed := false
	for i := range as {
		a := &as[i]
		k := slices.IndexFunc(want, func(w spec.NetworkAttachment) bool { return w.Network == a.Network })
		switch {
		case a.Leaving != 0:
		case k < 0:
			a.Leaving, changed = s.index, true
		case !slices.Equal(a.Aliases, want[k].Aliases):
			a.Aliases, changed = slices.Clone(want[k].Aliases), true
		}
	}
	for _, w := range want {
		i := slices.IndexFunc(as, func(a spec.Attachment) bool { return a.Network == w.Network })
		if i >= 0 && as[i].Leaving == 0 {
			continue
		}
		if i >= 0 {
			return failf(ErrInUse, "task %s is just leaving network %s: try again in a moment", t.Name, s.networks[w.Network].Name)
		}
		a, err := s.attach(t, w, u)
		if err != nil {
			return err
		}
		if s.networks[w.Network].Wired() {
			a.Iface, a.Joined = freeIface(as), s.index
		}
		as, changed = append(as, a), true
	}
	if !changed {
		return nil
	}
	old, version := t.Attachments, t.Version
	u.add(func() { t.Attachments, t.Version = old, version })
	t.Attachments = as
	s.touchTask(t)
	return nil
}

// unwire forgets the attachments that the task's node has taken off.
func (s *State) unwire(t *task) {
	left := t.Attachments[:0:0]
	for _, a := range t.Attachments {
		if a.Leaving != 0 && a.Leaving <= t.Status.Wired {
			s.release(a.Network, a.Addrs, t.holder())
			continue
		}
		left = append(left, a)
	}
	if len(left) != len(t.Attachments) {
		t.Attachments = left
		s.touchTask(t)
	}
}

// wants are the attachments that t has and keeps, as a wish.
func (t *task) wants() []spec.NetworkAttachment {
	var out []spec.NetworkAttachment
	for _, a := range t.Attachments {
		if a.Leaving == 0 {
			out = append(out, spec.NetworkAttachment{Network: a.Network, Aliases: a.Aliases})
		}
	}
	return out
}

// target finds what a ref of connect or disconnect names: by its ID, by its name,
// of a service first, or by the beginning of its ID.
func (s *State) target(ref string) (*service, *task, error) {
	_, isName := s.svcNames[ref]
	_, isTask := s.taskNames[ref]
	if s.tasks[ref] != nil && s.idFirst(isName || isTask) {
		isName, isTask = false, true
	}
	v, err := s.service(ref)
	if err == nil && (isName || !isTask) {
		return v, nil, nil
	}
	t, terr := s.task(ref)
	if terr != nil {
		return nil, nil, &NotFoundError{"task or service", ref}
	}
	if t.Service != "" {
		return nil, nil, failf(ErrInvalid, "task %s is of service %s: connect or disconnect the service", t.Name, s.services[t.Service].Spec.Name)
	}
	if !t.Live() {
		return nil, nil, failf(ErrInvalid, "task %s does not run: it is %s", t.Name, t.Status.State)
	}
	return nil, t, nil
}

func (s *State) connectNetwork(c *ConnectNetwork) Result {
	n, err := s.network(c.Network)
	if err != nil {
		return Result{Err: err}
	}
	v, t, err := s.target(c.Target)
	if err != nil {
		return Result{Err: err}
	}
	add := spec.NetworkAttachment{Network: n.ID, Aliases: c.Aliases, Addrs: c.Addrs}
	if v != nil {
		if v.On(n.ID) {
			return Result{Err: failf(ErrExists, "service %s is on network %s already", v.Spec.Name, n.Name)}
		}
		sp := v.Spec.Clone()
		sp.Networks = append(sp.Networks, add)
		r := s.updateService(&UpdateService{Ref: v.ID, Spec: &sp})
		if r.Err == nil {
			s.event("network", "connect", n.ID, n.Name, "service", v.Spec.Name)
		}
		return r
	}
	if !n.Wired() {
		return Result{Err: failf(ErrInvalid, "task %s can't enter network %s while it runs: run another one", t.Name, n.Name)}
	}
	if slices.ContainsFunc(t.Attachments, func(a spec.Attachment) bool { return a.Network == n.ID && a.Leaving == 0 }) {
		return Result{Err: failf(ErrExists, "task %s is on network %s already", t.Name, n.Name)}
	}
	want, err := s.resolve(append(t.wants(), add))
	if err == nil {
		err = s.checkNames(add.Names(), nil)
	}
	if err == nil {
		err = s.checkTaskClash(t.Name, []spec.NetworkAttachment{add})
	}
	if err == nil {
		err = s.onNode(t.Name, s.nodes[t.Node], want)
	}
	if err != nil {
		return Result{Err: err}
	}
	var u undo
	if err := s.rewire(t, want, &u); err != nil {
		u.run()
		return Result{Err: fmt.Errorf("task %s: %w", t.Name, err)}
	}
	s.event("network", "connect", n.ID, n.Name, "task", t.Name)
	out := t.Task
	return Result{Task: &out}
}

func (s *State) disconnectNetwork(c *DisconnectNetwork) Result {
	n, err := s.network(c.Network)
	if err != nil {
		return Result{Err: err}
	}
	v, t, err := s.target(c.Target)
	if err != nil {
		return Result{Err: err}
	}
	if v != nil {
		if !v.On(n.ID) {
			return Result{Err: failf(ErrInvalid, "service %s is not on network %s", v.Spec.Name, n.Name)}
		}
		sp := v.Spec.Clone()
		sp.Networks = slices.DeleteFunc(sp.Networks, func(a spec.NetworkAttachment) bool { return a.Network == n.ID })
		if len(sp.Networks) == 0 {
			return Result{Err: failf(ErrInvalid, "network %s is the only one of service %s: connect another first", n.Name, v.Spec.Name)}
		}
		r := s.updateService(&UpdateService{Ref: v.ID, Spec: &sp})
		if r.Err == nil {
			s.event("network", "disconnect", n.ID, n.Name, "service", v.Spec.Name)
		}
		return r
	}
	if !slices.ContainsFunc(t.Attachments, func(a spec.Attachment) bool { return a.Network == n.ID && a.Leaving == 0 }) {
		return Result{Err: failf(ErrInvalid, "task %s is not on network %s", t.Name, n.Name)}
	}
	if !n.Wired() {
		return Result{Err: failf(ErrInvalid, "task %s can't leave network %s: run another one", t.Name, n.Name)}
	}
	want := slices.DeleteFunc(t.wants(), func(a spec.NetworkAttachment) bool { return a.Network == n.ID })
	var u undo
	if err := s.rewire(t, want, &u); err != nil {
		u.run()
		return Result{Err: err}
	}
	s.event("network", "disconnect", n.ID, n.Name, "task", t.Name)
	out := t.Task
	return Result{Task: &out}
}

// onNode refuses networks of driver bridge that are on another node than n.
func (s *State) onNode(what string, n *node, nets []spec.NetworkAttachment) error {
	for _, a := range nets {
		w := s.networks[a.Network]
		if w.Driver == spec.DriverBridge && w.Node != n.ID {
			return failf(ErrInvalid, "task %s: network %s is a bridge on node %s, and can't be used on node %s", what, w.Name, s.nodeName(w.Node), n.Name)
		}
	}
	return nil
}

func (s *State) nodeName(id string) string {
	if n := s.nodes[id]; n != nil {
		return n.Name
	}
	return id
}

// pinned are those of the networks that are on one node only.
func (s *State) pinned(nets []spec.NetworkAttachment) []*network {
	var out []*network
	for _, a := range nets {
		if w := s.networks[a.Network]; w != nil && w.Driver == spec.DriverBridge {
			out = append(out, w)
		}
	}
	return out
}
