package agent

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"

	"github.com/shoalnet/shoal/gossip"
	"github.com/shoalnet/shoal/spec"
)

// assignment is what the managers last told this node. It is also what is
// cached on disk.
type assignment struct {
	Index    uint64         `json:"index"` // of the managers' log; 0: they have told no more than Trust, at init or join
	Tasks    []spec.Task    `json:"tasks"`
	Networks []spec.Network `json:"networks"`
	Services []spec.Service `json:"services"`
	Nodes    []spec.Node    `json:"nodes"`
	Trust    *trust         `json:"trust,omitempty"` // nil: as before
	Level    int            `json:"level,omitempty"` // feature level of the cluster
	// told is of the one that came whole, which this one was made from by what changed;
	// nil: of the disk. Until another comes whole a Version has one content.
	told *uint64
}

// follows tells whether nothing but changes was told between two assignments.
func (a *assignment) follows(before *assignment) bool {
	return a != nil && before != nil && (a == before || a.told != nil && a.told == before.told)
}

// known tells that the managers have said what there is to be: without, an empty
// list says nothing.
func (a *assignment) known() bool { return a != nil && a.Index > 0 }

func (a *assignment) network(id string) (spec.Network, bool) {
	if a != nil {
		for _, n := range a.Networks {
			if n.ID == id {
				return n, true
			}
		}
	}
	return spec.Network{}, false
}

// hostPorts are the ports that tasks publish on their own node, by task: a task's
// own, and those of its service.
func (a *assignment) hostPorts() map[string][]spec.Port {
	if a == nil {
		return nil
	}
	services := map[string][]spec.Port{}
	for i := range a.Services {
		s := &a.Services[i]
		for _, p := range s.Ports {
			if p.Mode == spec.PortHost {
				services[s.ID] = append(services[s.ID], p)
			}
		}
	}
	out := map[string][]spec.Port{}
	for i := range a.Tasks {
		t := &a.Tasks[i]
		if ports := slices.Concat(t.Ports, services[t.Service]); len(ports) > 0 {
			out[t.ID] = ports
		}
	}
	return out
}

// inputs of a View: one field per source.
type inputs struct {
	self     string
	instance string
	underlay spec.Underlay
	assigned *assignment      // nil: managers have not reported, and nothing is cached
	gossip   *gossip.Snapshot // nil: not started
	// sandboxes here; adopted tells that those of an earlier agent are among them
	sandboxes []spec.Sandbox
	adopted   bool
	// first: no View was complete yet, and there is time to meet the other nodes
	first bool
	// refused tells of endpoints that are another's to have; nil: none are.
	refused func(spec.Endpoint) bool
	// managers is kept from View to View, of one caller; nil: by nobody.
	managers *managers
}

// managers are the parts of a View that come from an assignment alone. The services are
// most of a View: they are copied once for each assignment, and not for each View.
type managers struct {
	of       *assignment
	present  map[string]bool
	networks []spec.Network
	services []spec.Service
	agents   []netip.AddrPort
}

func (k *managers) take(a *assignment, present map[string]bool) {
	if k.of == a && maps.Equal(k.present, present) {
		return
	}
	*k = managers{of: a, present: present}
	for _, n := range a.Networks {
		if present[n.ID] && n.Wired() {
			k.networks = append(k.networks, n)
		}
	}
	for _, n := range a.Nodes {
		for _, port := range []int{n.ControlPort, n.GossipPort} {
			if n.Addr.IsValid() && port > 0 && port <= 65535 {
				k.agents = append(k.agents, netip.AddrPortFrom(n.Addr, uint16(port)))
			}
		}
	}
	k.services = make([]spec.Service, 0, len(a.Services))
	for i := range a.Services {
		if slices.ContainsFunc(a.Services[i].Spec.Networks, func(n spec.NetworkAttachment) bool { return present[n.Network] }) {
			k.services = append(k.services, a.Services[i])
		}
	}
	spec.SortNetworks(k.networks)
	spec.SortServices(k.services)
}

// met tells whether gossip has heard of every node that the managers call ready: the
// peer by which it came back in may not have named one that it suspects just then, as
// after an upgrade of that one, and what runs there would be missing.
func (in inputs) met() bool {
	for _, n := range in.assigned.Nodes {
		if n.ID != in.self && n.Status == spec.NodeReady && !slices.ContainsFunc(in.gossip.Members, func(m gossip.Member) bool {
			return m.Peer.ID == n.ID && (m.Epoch > 0 || m.Liveness == spec.PeerDead)
		}) {
			return false
		}
	}
	return true
}

// compose joins the sources into a View. It is pure.
//
// A network is present on this node while a task of it is meant to run here or
// has a sandbox here: before the first task starts, so that its wiring is there
// in time, and until the last is unwired. Also while a published port leads to
// it, which every node answers.
func compose(in inputs) *spec.View {
	v := &spec.View{
		Self:     in.self,
		Instance: in.instance,
		Underlay: in.underlay,
		Complete: in.assigned.known() && in.gossip != nil && in.gossip.Synced && in.adopted && (!in.first || in.met()),
	}
	present := map[string]bool{}
	for _, s := range in.sandboxes {
		for _, a := range s.Attachments {
			present[a.Network] = true
		}
	}
	if in.assigned != nil {
		for i := range in.assigned.Tasks {
			t := &in.assigned.Tasks[i]
			if t.Node == in.self && t.Live() {
				for _, a := range t.Attachments {
					present[a.Network] = true
				}
			}
		}
		for i := range in.assigned.Services {
			s := &in.assigned.Services[i]
			if slices.ContainsFunc(s.Ports, func(p spec.Port) bool { return p.Mode != spec.PortHost }) {
				// A bridge is on its own node only.
				if n, ok := in.assigned.network(s.Ingress); ok && (n.Node == "" || n.Node == in.self) {
					present[n.ID] = true
				}
			}
		}
		k := cmp.Or(in.managers, &managers{})
		k.take(in.assigned, present)
		v.Networks, v.Services, v.Agents = k.networks, k.services, k.agents
	}
	if in.gossip != nil {
		v.Peers = peers(in)
		// Counted first: there may be 100,000, all of them ours or next to none.
		n := 0
		for i := range in.gossip.Endpoints {
			if present[in.gossip.Endpoints[i].Network] {
				n++
			}
		}
		v.Endpoints = slices.Grow(v.Endpoints, n)
		for _, e := range in.gossip.Endpoints {
			if present[e.Network] && (in.refused == nil || !in.refused(e)) {
				v.Endpoints = append(v.Endpoints, e)
			}
		}
		for _, e := range in.gossip.Away {
			if present[e.Network] && (in.refused == nil || !in.refused(e)) {
				v.Away = append(v.Away, e)
			}
		}
	}
	// A sandbox is wired only to networks that are known; the rest of it waits.
	hostPorts := in.assigned.hostPorts()
	for _, s := range in.sandboxes {
		known := !slices.ContainsFunc(s.Attachments, func(a spec.Attachment) bool {
			_, ok := in.assigned.network(a.Network)
			return !ok
		})
		if known {
			s.Ports = hostPorts[s.Task]
			v.Sandboxes = append(v.Sandboxes, s)
		}
	}
	v.SortHere()
	return v
}

// peers are the nodes that the managers have, each as alive as gossip says; one
// that gossip has not heard of is as good as dead. A member that the managers
// don't have is none: nobody gets a place among the nodes by saying so.
func peers(in inputs) []spec.Peer {
	heard := make(map[string]spec.Peer, len(in.gossip.Members))
	for _, m := range in.gossip.Members {
		heard[m.Peer.ID] = m.Peer
	}
	var out []spec.Peer
	if in.assigned != nil {
		for _, n := range in.assigned.Nodes {
			p := spec.Peer{ID: n.ID, Name: n.Name, Number: n.Number, Addr: n.Addr, Liveness: spec.PeerDead, ControlPort: n.ControlPort, GossipPort: n.GossipPort}
			if h, ok := heard[n.ID]; ok {
				p.Liveness, p.MTU, p.Answers, p.Away = h.Liveness, h.MTU, h.Answers, h.Away
			}
			out = append(out, p)
		}
	}
	if h, ok := heard[in.self]; ok && !slices.ContainsFunc(out, func(p spec.Peer) bool { return p.ID == in.self }) {
		out = append(out, h)
	}
	return out
}

// hold returns v with the active endpoints that have no routes yet as if they
// were starting: named and routed, and not chosen by a balancer. A node that
// comes back brings endpoints that are active from the first moment, while this
// node's routes to them are being made. Networks that are being made are left
// out altogether: there is nothing yet to put a virtual IP in.
func hold(v *spec.View, made routes) (out *spec.View, held int) {
	if slices.ContainsFunc(v.Networks, func(n spec.Network) bool { return !made[routeKey{network: n.ID}] }) {
		c := *v
		c.Networks = slices.DeleteFunc(slices.Clone(v.Networks), func(n spec.Network) bool { return !made[routeKey{network: n.ID}] })
		held = len(v.Networks) - len(c.Networks)
		v = &c
	}
	cloned := false
	for i, e := range v.Endpoints {
		if e.State != spec.EndpointActive || made[routeOf(e)] {
			continue
		}
		if !cloned {
			c := *v
			c.Endpoints = slices.Clone(v.Endpoints)
			v, cloned = &c, true
		}
		v.Endpoints[i].State = spec.EndpointStarting
		held++
	}
	return v, held
}

// routeKey is what a route to an endpoint is made of. The addresses that a task
// has on a network come and go together: one stands for all.
type routeKey struct {
	network, task, node string
	addr                netip.Addr
}

func routeOf(e spec.Endpoint) routeKey {
	k := routeKey{network: e.Network, task: e.Task, node: e.Node}
	if len(e.Addrs) > 0 {
		k.addr = e.Addrs[0]
	}
	return k
}

// routes are the endpoints that the overlay has routes to, and the networks that
// it has made (without a task).
type routes map[routeKey]bool

func routesOf(v *spec.View) routes {
	r := make(routes, len(v.Endpoints)+len(v.Networks))
	for _, n := range v.Networks {
		r[routeKey{network: n.ID}] = true
	}
	for _, e := range v.Endpoints {
		r[routeOf(e)] = true
	}
	return r
}

// and drops from r what is not in o.
func (r routes) and(o routes) {
	for k := range r {
		if !o[k] {
			delete(r, k)
		}
	}
}
