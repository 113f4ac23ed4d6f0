package state

import (
	"cmp"
	"fmt"
	"maps"
	"slices"

	"github.com/shoalnet/shoal/spec"
)

// ports returns the ports of sp with numbers, and the network they lead to.
// Numbers that old got for the same port stay.
func (s *State) ports(old spec.Service, sp spec.ServiceSpec) (out []spec.Port, ingress string, err error) {
	if len(sp.Ports) == 0 {
		return nil, "", nil
	}
	mesh := slices.ContainsFunc(sp.Ports, func(p spec.Port) bool { return p.Mode != spec.PortHost })
	wayOut := false
	for _, a := range sp.Networks {
		n := s.networks[a.Network]
		if !n.Wired() || n.Internal {
			continue
		}
		wayOut = true
		if mesh && ingress == "" && n.Driver == spec.DriverOverlay {
			ingress = n.ID
		}
	}
	switch {
	case !wayOut:
		return nil, "", failf(ErrInvalid, "service %s: published ports need a network with a way out, but it is on internal networks, host or none only: add another with --network", sp.Name)
	case mesh && ingress == "":
		return nil, "", failf(ErrInvalid, "service %s: ports of mode ingress and local need an overlay network that is not internal: add one with --network, or publish with mode=host", sp.Name)
	}
	out = slices.Clone(sp.Ports)
	// First those that were asked for, so that no dynamic one takes them.
	for i, p := range out {
		if p.Published != 0 {
			if owner := s.portOwner(p, old.ID, out[:i]); owner != "" {
				return nil, "", failf(ErrInUse, "service %s: port %d/%s is %s: choose another", sp.Name, p.Published, p.Protocol, owner)
			}
		}
	}
	for i, p := range out {
		if p.Published != 0 {
			continue
		}
		if kept := s.keptPort(old, p, out); kept != 0 {
			out[i].Published = kept
			continue
		}
		for n := uint16(spec.MinDynamicPort); n <= spec.MaxDynamicPort; n++ {
			p.Published = n
			if s.portOwner(p, old.ID, nil) == "" && !slices.ContainsFunc(out, p.Clashes) {
				break
			}
			p.Published = 0
		}
		if p.Published == 0 {
			return nil, "", failf(ErrExhausted, "service %s: all ports from %d to %d are published: give a number", sp.Name, spec.MinDynamicPort, spec.MaxDynamicPort)
		}
		out[i] = p
	}
	return out, ingress, nil
}

// keptPort is the number that old's dynamic port like p has; 0: none.
func (s *State) keptPort(old spec.Service, p spec.Port, taken []spec.Port) uint16 {
	for i, q := range old.Spec.Ports {
		if i < len(old.Ports) && q == p {
			q.Published = old.Ports[i].Published
			if !slices.ContainsFunc(taken, q.Clashes) {
				return q.Published
			}
		}
	}
	return 0
}

// portOwner tells who has a port that p can't be beside, but for the service
// self: "published by NAME", "Shoal's own: …". Two ports of mode host clash only
// where their tasks meet, which the scheduler sees to.
func (s *State) portOwner(p spec.Port, self string, own []spec.Port) string {
	if slices.ContainsFunc(own, p.Clashes) {
		return "published by itself"
	}
	// A node that comes later with such a port is no reason to refuse every
	// change of a service that has it: that node says that the port is held.
	if v := s.services[self]; v == nil || !slices.ContainsFunc(v.Ports, p.Clashes) {
		if what := s.shoalPort(p); what != "" {
			return "Shoal's own: " + what
		}
	}
	for _, name := range slices.Sorted(maps.Keys(s.svcNames)) {
		v := s.services[s.svcNames[name]]
		for _, q := range v.Ports {
			if v.ID != self && p.Clashes(q) && (p.Mode != spec.PortHost || q.Mode != spec.PortHost) {
				return "published by service " + name
			}
		}
	}
	if p.Mode == spec.PortHost {
		return ""
	}
	var holders []*task
	for _, t := range s.tasks {
		if t.Service == "" && t.holds() && slices.ContainsFunc(t.Ports, p.Clashes) {
			holders = append(holders, t)
		}
	}
	if len(holders) == 0 {
		return ""
	}
	slices.SortFunc(holders, func(a, b *task) int { return cmp.Compare(a.seq, b.seq) })
	return "published by task " + holders[0].Name
}

// shoalPort tells what Shoal itself needs a port for, on whatever node.
func (s *State) shoalPort(p spec.Port) string {
	if c := s.cluster; c != nil && p.Protocol == spec.UDP && int(p.Published) == c.DataPathPort {
		return "VXLAN (--data-path-port)"
	}
	for _, id := range slices.Sorted(maps.Keys(s.nodes)) {
		n := s.nodes[id]
		own := spec.Port{Published: p.Published, Protocol: p.Protocol, Addr: n.Addr} // both listen at this address only
		switch {
		case !p.Clashes(own):
		case int(p.Published) == n.GossipPort && p.Protocol != spec.SCTP:
			return "gossip of node " + n.Name + " (--gossip-port)"
		case int(p.Published) == n.ControlPort && p.Protocol == spec.TCP:
			return "the control port of node " + n.Name + " (--control-port)"
		}
	}
	return ""
}

// taskPorts returns the ports of a standalone task on n with numbers.
func (s *State) taskPorts(name string, n *node, ports []spec.Port, nets []spec.NetworkAttachment) ([]spec.Port, error) {
	if len(ports) == 0 {
		return nil, nil
	}
	if err := spec.ValidatePorts(ports); err != nil {
		return nil, failf(ErrInvalid, "task %s: %w", name, err)
	}
	if !slices.ContainsFunc(nets, func(a spec.NetworkAttachment) bool {
		w := s.networks[a.Network]
		return w.Wired() && !w.Internal
	}) {
		return nil, failf(ErrInvalid, "task %s: published ports need a network with a way out: add one with --network", name)
	}
	out := slices.Clone(ports)
	free := func(p spec.Port) string {
		if owner := s.portOwner(p, "", nil); owner != "" {
			return owner
		}
		if owner := n.portHolder(s, p, nil); owner != "" {
			return "published by " + owner
		}
		return ""
	}
	for i, p := range out {
		if p.Mode != spec.PortHost {
			return nil, failf(ErrInvalid, "task %s: port %d: mode %s is for services: a task publishes on its own node (mode host)", name, p.Published, p.Mode)
		}
		if p.Published != 0 {
			if owner := free(p); owner != "" {
				return nil, failf(ErrInUse, "task %s: port %d/%s of node %s is %s: choose another", name, p.Published, p.Protocol, n.Name, owner)
			}
			continue
		}
		for k := uint16(spec.MinDynamicPort); k <= spec.MaxDynamicPort; k++ {
			p.Published = k
			if free(p) == "" && !slices.ContainsFunc(out, p.Clashes) {
				break
			}
			p.Published = 0
		}
		if p.Published == 0 {
			return nil, failf(ErrExhausted, "task %s: all ports from %d to %d are published on node %s: give a number", name, spec.MinDynamicPort, spec.MaxDynamicPort, n.Name)
		}
		out[i] = p
	}
	return out, nil
}

// portHolder names the task on n, other than except, that publishes a port there
// (mode host) that p can't be beside.
func (n *node) portHolder(s *State, p spec.Port, except *task) string {
	var found *task
	for _, t := range n.tasks {
		if t == except || !t.holds() || t.Status.State.Ended() || (found != nil && found.seq < t.seq) {
			continue
		}
		if slices.ContainsFunc(s.hostPorts(t), p.Clashes) {
			found = t
		}
	}
	if found == nil {
		return ""
	}
	return "task " + found.Name
}

// hostPorts are the ports that a task publishes on its own node: its own, and
// those of mode host of its service.
func (s *State) hostPorts(t *task) []spec.Port {
	v := s.services[t.Service]
	if v == nil {
		return t.Ports
	}
	return HostPorts(v.Service)
}

// HostPorts are the ports of a service that its tasks publish on their own
// nodes.
func HostPorts(v spec.Service) []spec.Port {
	var out []spec.Port
	for _, p := range v.Ports {
		if p.Mode == spec.PortHost {
			out = append(out, p)
		}
	}
	return out
}

// setPorts gives a service its ports, and notes what every node must hear of.
func (s *State) setPorts(v *service, ports []spec.Port, ingress string) {
	if len(v.Ports) > 0 || len(ports) > 0 {
		s.changed = s.index
	}
	v.Ports, v.Ingress = ports, ingress
	if ingress != "" {
		s.published[v.ID] = v
	} else {
		delete(s.published, v.ID)
	}
}

// checkPorts is for a restored service.
func checkPorts(v spec.Service) error {
	if len(v.Ports) != len(v.Spec.Ports) {
		return fmt.Errorf("service %s has %d of its %d ports", v.Spec.Name, len(v.Ports), len(v.Spec.Ports))
	}
	return nil
}
