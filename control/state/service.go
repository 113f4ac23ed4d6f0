package state

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"

	"github.com/shoalnet/shoal/spec"
)

// history is how many ended tasks of a slot are remembered besides the newest:
// Docker's default task history limit.
const history = 5

func (s *State) createService(c *CreateService) Result {
	if err := s.checkID("service", c.ID); err != nil {
		return Result{Err: err}
	}
	sp, err := s.serviceSpec(c.Spec)
	if err != nil {
		return Result{Err: err}
	}
	if _, ok := s.svcNames[sp.Name]; ok {
		return Result{Err: failf(ErrExists, "service %s exists already", sp.Name)}
	}
	if err := s.checkServiceName(sp.Name); err != nil {
		return Result{Err: err}
	}
	if err := s.checkServiceNames(sp, spec.ServiceSpec{}); err != nil {
		return Result{Err: err}
	}
	ending := 0
	for _, v := range s.removed {
		if s.sameName(v.Spec.Name, sp.Name) {
			// A lost task may never report; it must not keep the name for ever.
			for _, t := range v.tasks {
				if t.holds() && t.Status.State != spec.TaskLost {
					ending++
				}
			}
		}
	}
	if ending > 0 {
		return Result{Err: failf(ErrEnding, "service %s is being removed: %d of its tasks have not ended yet: try again in a moment", sp.Name, ending)}
	}
	v := &service{Service: spec.Service{ID: c.ID, Spec: sp, Version: s.index, Created: c.Created}, rev: s.index}
	var u undo
	if v.VIPs, err = s.vips(v.Service, sp, &u); err != nil {
		u.run()
		return Result{Err: err}
	}
	ports, ingress, err := s.ports(v.Service, sp)
	if err != nil {
		u.run()
		return Result{Err: err}
	}
	s.services[v.ID] = v
	s.svcNames[sp.Name] = v.ID
	s.setPorts(v, ports, ingress)
	s.touch(sp.Networks)
	s.event("service", "create", v.ID, sp.Name)
	out := v.Service
	return Result{Service: &out}
}

// serviceSpec returns what s makes of a spec: complete, valid, with network IDs.
func (s *State) serviceSpec(in spec.ServiceSpec) (spec.ServiceSpec, error) {
	sp := in.Clone()
	sp.EndpointMode = cmp.Or(sp.EndpointMode, spec.EndpointModeVIP)
	if err := sp.Validate(); err != nil {
		return sp, failf(ErrInvalid, "%w", err)
	}
	if sp.RestartDelay < 0 || sp.RestartMax < 0 {
		return sp, failf(ErrInvalid, "service %s: restart delay and restart limit can't be negative", sp.Name)
	}
	var err error
	if sp.Task, err = s.resolveBlobs(sp.Task); err != nil {
		return sp, fmt.Errorf("service %s: %w", sp.Name, err)
	}
	if sp.Networks, err = s.resolve(sp.Networks); err != nil {
		return sp, failf(ErrInvalid, "service %s: %w", sp.Name, err)
	}
	if pins := s.pinned(sp.Networks); len(pins) > 1 && slices.ContainsFunc(pins, func(w *network) bool { return w.Node != pins[0].Node }) {
		return sp, failf(ErrInvalid, "service %s: networks %s and %s are bridges on different nodes", sp.Name, pins[0].Name, pins[1].Name)
	}
	for _, a := range sp.Networks {
		if len(a.Addrs) > 0 && sp.EndpointMode == spec.EndpointModeDNSRR {
			return sp, failf(ErrInvalid, "service %s: endpoint mode %s has no virtual addresses, but %s is asked for", sp.Name, spec.EndpointModeDNSRR, a.Addrs[0])
		}
	}
	return sp, nil
}

// vips allocates what sp needs, keeping what old has where that still fits.
func (s *State) vips(old spec.Service, sp spec.ServiceSpec, u *undo) ([]spec.VIPs, error) {
	holder := "service " + sp.Name
	kept := map[string]bool{}
	fits := func(v spec.VIPs) bool {
		i := slices.IndexFunc(sp.Networks, func(a spec.NetworkAttachment) bool { return a.Network == v.Network })
		return i >= 0 && sp.EndpointMode == spec.EndpointModeVIP &&
			!slices.ContainsFunc(sp.Networks[i].Addrs, func(a netip.Addr) bool { return !slices.Contains(v.Addrs, a) })
	}
	for _, v := range old.VIPs {
		if kept[v.Network] = fits(v); kept[v.Network] {
			continue
		}
		s.release(v.Network, v.Addrs, holder)
		u.add(func() { s.retake(v.Network, v.Addrs, holder) })
	}
	if sp.EndpointMode != spec.EndpointModeVIP {
		return nil, nil
	}
	var out []spec.VIPs
	for _, a := range sp.Networks {
		if !s.networks[a.Network].Wired() {
			continue
		}
		addrs := old.VIPsOn(a.Network)
		if !kept[a.Network] {
			var err error
			if addrs, err = s.networks[a.Network].allocate(a.Addrs, holder, u); err != nil {
				return nil, fmt.Errorf("service %s: virtual address: %w", sp.Name, err)
			}
		}
		out = append(out, spec.VIPs{Network: a.Network, Addrs: addrs})
	}
	return out, nil
}

// retake puts back what release took.
func (s *State) retake(network string, addrs []netip.Addr, holder string) error {
	n := s.networks[network]
	if n == nil {
		return fmt.Errorf("%s has an address on network %s, which does not exist", holder, network)
	}
	for _, a := range addrs {
		i := slices.IndexFunc(n.Subnets, func(p netip.Prefix) bool { return p.Contains(a) })
		if i < 0 {
			return fmt.Errorf("%s has the address %s, which is not in network %s", holder, a, n.Name)
		}
		if err := n.spaces[i].Take(a, holder); err != nil {
			return err
		}
	}
	return nil
}

// touch notes that the services on networks have changed.
func (s *State) touch(as []spec.NetworkAttachment) {
	for _, a := range as {
		if n := s.networks[a.Network]; n != nil {
			n.changed = s.index
		}
	}
}

func (s *State) updateService(c *UpdateService) Result {
	v, err := s.service(c.Ref)
	if err != nil {
		return Result{Err: err}
	}
	if c.Version != 0 && c.Version != v.Version {
		return Result{Err: failf(ErrConflict, "service %s was changed by someone else meanwhile: look at it and try again", v.Spec.Name)}
	}
	if c.Rebalance {
		if err := s.rebalance(v); err != nil {
			return Result{Err: err}
		}
		s.event("service", "update", v.ID, v.Spec.Name)
		out := v.Service
		return Result{Service: &out}
	}
	next := v.Spec
	if c.Spec != nil {
		next = c.Spec.Clone()
		if next.Name == "" {
			next.Name = v.Spec.Name
		}
		if next.Name != v.Spec.Name {
			return Result{Err: failf(ErrInvalid, "service %s can't be renamed to %s: create another", v.Spec.Name, next.Name)}
		}
	}
	if c.Replicas != nil {
		if v.Spec.Global() {
			return Result{Err: failf(ErrInvalid, "service %s can't be scaled: it is of mode %s, with one task on each node", v.Spec.Name, v.Spec.Mode)}
		}
		next.Replicas = *c.Replicas
	}
	if c.Rollback {
		if v.Previous == nil {
			return Result{Err: failf(ErrInvalid, "service %s does not have a previous spec", v.Spec.Name)}
		}
		next = v.Previous.Clone()
	}
	if next.Global() != v.Spec.Global() || next.Job() != v.Spec.Job() {
		return Result{Err: failf(ErrInvalid, "service %s: the mode of a service can't be changed: create another", v.Spec.Name)}
	}
	if err := s.respec(v, next, c.Now); err != nil {
		return Result{Err: err}
	}
	if c.Rollback && s.rules >= 2 {
		v.Update = &spec.UpdateStatus{State: spec.RollbackStarted, StartedAt: c.Now, Since: s.since(), Message: "manually requested rollback"}
	}
	s.event("service", "update", v.ID, v.Spec.Name)
	out := v.Service
	return Result{Service: &out}
}

// respec gives a service another spec, or changes nothing.
func (s *State) respec(v *service, next spec.ServiceSpec, now int64) error {
	sp, err := s.serviceSpec(next)
	if err != nil {
		return err
	}
	if err := s.checkServiceNames(sp, v.Spec); err != nil {
		return err
	}
	for _, as := range [][]spec.NetworkAttachment{v.Spec.Networks, sp.Networks} {
		if n := s.networks[as[0].Network]; !n.Wired() && sp.Networks[0].Network != v.Spec.Networks[0].Network {
			return failf(ErrInvalid, "service %s: a running service can't enter or leave network %s: create another", sp.Name, n.Name)
		}
	}
	var u undo
	vips, err := s.vips(v.Service, sp, &u)
	if err != nil {
		u.run()
		return err
	}
	ports, ingress, err := s.ports(v.Service, sp)
	if err == nil {
		err = s.rewireAll(v, sp, &u)
	}
	if err != nil {
		u.run()
		return err
	}
	old, rev := v.Spec, v.rev
	if !sameTemplate(old, sp) {
		v.rev = s.index
		if v.Previous != nil && v.prevRev != 0 && sameTemplate(*v.Previous, sp) {
			v.rev = v.prevRev // what runs of it may stay
		}
	}
	s.touch(v.Spec.Networks)
	s.touch(sp.Networks)
	v.Spec, v.VIPs, v.Version = sp, vips, s.index
	s.setPorts(v, ports, ingress)
	if s.rules >= 2 {
		v.Previous, v.prevRev, v.Update = &old, rev, nil
		if s.dirty(v) && !sp.Job() { // a job begins anew
			v.Update = &spec.UpdateStatus{State: spec.Updating, StartedAt: now, Since: s.since(), Message: "update in progress"}
		}
	}
	return nil
}

// dirty tells whether a service has tasks that are to be replaced.
func (s *State) dirty(v *service) bool {
	return slices.ContainsFunc(v.tasks, func(t *task) bool {
		return t.Desired == spec.DesiredRunning && (t.rev != v.rev || t.Live() && !s.stays(v, t))
	})
}

// sameTemplate tells whether tasks made from a are as tasks made from b.
// Networks are not part of it: tasks change them while they run.
func sameTemplate(a, b spec.ServiceSpec) bool {
	key := func(x spec.ServiceSpec) []byte {
		out, _ := json.Marshal(x.Task) // plain values: can't fail
		return out
	}
	if a.ForceUpdate != b.ForceUpdate {
		return false
	}
	return bytes.Equal(key(a), key(b))
}

// rewireAll brings the tasks of a service to the networks of sp.
func (s *State) rewireAll(v *service, sp spec.ServiceSpec, u *undo) error {
	want := taskNetworks(sp)
	for _, t := range v.tasks {
		if t.holds() && t.Live() {
			if err := s.rewire(t, want, u); err != nil {
				return fmt.Errorf("service %s: %w", sp.Name, err)
			}
		}
	}
	return nil
}

func (s *State) removeService(c *RemoveService) Result {
	v, err := s.service(c.Ref)
	if err != nil {
		return Result{Err: err}
	}
	out := v.Service
	v.removed = true
	v.Version = s.index
	delete(s.svcNames, v.Spec.Name)
	s.removed[v.ID] = v
	s.setPorts(v, nil, "")
	s.event("service", "remove", v.ID, v.Spec.Name)
	s.touch(v.Spec.Networks)
	for _, t := range slices.Clone(v.tasks) {
		s.end(t, spec.DesiredRemove)
	}
	s.finish(v)
	return Result{Service: &out}
}

// finish forgets a removed service whose last task is gone, and frees its VIPs.
func (s *State) finish(v *service) {
	if !v.removed || len(v.tasks) > 0 {
		return
	}
	for _, a := range v.VIPs {
		s.release(a.Network, a.Addrs, v.holder())
	}
	delete(s.services, v.ID)
	s.depart(v.ID)
	delete(s.removed, v.ID)
}

// slot returns the tasks of a slot, oldest first.
func (v *service) slot(slot int) []*task {
	find := func(slot int) int {
		i, _ := slices.BinarySearchFunc(v.tasks, slot, func(t *task, slot int) int { return cmp.Compare(t.Slot, slot) })
		return i
	}
	return v.tasks[find(slot):find(slot+1)]
}

// active counts the slots that have a task that is desired to run.
func (v *service) active() int {
	n, last := 0, -1
	for _, t := range v.tasks {
		if t.Slot != last && t.Desired == spec.DesiredRunning {
			n, last = n+1, t.Slot
		}
	}
	return n
}

// trim forgets the oldest released tasks of a slot beyond its history.
func (s *State) trim(v *service, slot int) {
	var old []*task
	for _, t := range v.slot(slot) {
		if t.Status.State.Ended() && !t.holds() {
			old = append(old, t)
		}
	}
	for len(old) > history {
		s.forget(old[0])
		old = old[1:]
	}
}
