package vip

import (
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/shoalnet/shoal/spec"
)

// State is every virtual server of one node: wanted ([Desired]) or observed
// ([Dataplane.Observe]). It is a value to read, never to change.
type State struct {
	// Complete (wanted only): what is not in this State does not exist and
	// may be removed from the kernel. See spec.View.Complete.
	Complete bool
	Networks []Network // by ID
}

// Network is the virtual servers of one network, in the network's overlay
// namespace on this node.
type Network struct {
	ID, Name  string
	Namespace string         // name under spec.NetnsDir
	Subnets   []netip.Prefix // of spec.Network, in its order
	Gateways  []netip.Addr   // of spec.Network, in its order
	// Locals are the addresses of the network's endpoints on this node that have
	// started, in order: those that may be balanced to themselves (hairpin).
	Locals  []netip.Addr
	Servers []Server // by VIP
	// Orphans (wanted only) are the addresses, in order, of endpoints whose
	// service is not in the View any more: it was removed, and its tasks are
	// on their way out. See [Diff].
	Orphans []netip.Addr
	// Claimed (wanted only) are the addresses, in order, of all endpoints.
	Claimed []netip.Addr

	// Absent (observed only): the namespace does not exist.
	Absent bool
	// Fault (observed only) says what is wrong with the part that all servers
	// of the namespace share; empty when it is as it should be.
	Fault string
}

// Server is one virtual address of one service.
type Server struct {
	VIP  netip.Addr
	Mark uint32 // spec.Network.VIPMark
	// Service and Name are the ID and the name of the service (wanted only).
	Service, Name string
	Backends      []Backend // by address

	// Addressed (observed only): the VIP is an address of lo, and ours.
	Addressed bool
	// Open (observed only): new connections are balanced, not refused.
	Open bool
	// Fault (observed only) says what of the server is missing or wrong
	// although its backends may be right; empty when nothing is.
	Fault string
}

// Backend is where a Server's connections go.
type Backend struct {
	Addr   netip.Addr
	Weight int // 1: takes new connections; 0: keeps those it has
}

func (s Server) same(o Server) bool {
	return s.VIP == o.VIP && s.Mark == o.Mark && s.Service == o.Service && s.Name == o.Name && s.Addressed == o.Addressed && s.Open == o.Open && s.Fault == o.Fault &&
		slices.Equal(s.Backends, o.Backends)
}

// Takes lists the addresses of the backends that take new connections.
func (s Server) Takes() []netip.Addr {
	var out []netip.Addr
	for _, b := range s.Backends {
		if b.Weight > 0 {
			out = append(out, b.Addr)
		}
	}
	return out
}

// Drains lists the addresses of the backends that only keep connections.
func (s Server) Drains() []netip.Addr {
	var out []netip.Addr
	for _, b := range s.Backends {
		if b.Weight <= 0 {
			out = append(out, b.Addr)
		}
	}
	return out
}

// Backend returns the backend with an address.
func (s Server) Backend(a netip.Addr) (Backend, bool) {
	for _, b := range s.Backends {
		if b.Addr == a {
			return b, true
		}
	}
	return Backend{}, false
}

// Network returns a network by ID.
func (s State) Network(id string) (Network, bool) {
	i, ok := slices.BinarySearchFunc(s.Networks, id, func(n Network, id string) int { return strings.Compare(n.ID, id) })
	if !ok {
		return Network{}, false
	}
	return s.Networks[i], true
}

// Server returns a server by VIP.
func (n Network) Server(vip netip.Addr) (Server, bool) {
	i, ok := slices.BinarySearchFunc(n.Servers, vip, func(s Server, a netip.Addr) int { return s.VIP.Compare(a) })
	if !ok {
		return Server{}, false
	}
	return n.Servers[i], true
}

// Is tells whether two are one network: what is wanted, or found, of it may differ.
func (n Network) Is(o Network) bool {
	return n.ID == o.ID && n.Name == o.Name && n.Namespace == o.Namespace && slices.Equal(n.Subnets, o.Subnets) && slices.Equal(n.Gateways, o.Gateways)
}

// header is n without its servers, which is what operations carry along.
func (n Network) header() Network {
	n.Servers, n.Orphans, n.Claimed = nil, nil, nil
	return n
}

// VIPOf is the inverse of spec.Network.VIPMark for this network.
func (n Network) VIPOf(mark uint32) (netip.Addr, bool) {
	i := int(mark >> 24 & 15)
	if mark&spec.MarkKindMask != spec.VIPMarkBase || i >= len(n.Subnets) {
		return netip.Addr{}, false
	}
	b := n.Subnets[i].Addr().AsSlice()
	for k, sh := len(b)-3, 16; sh >= 0; k, sh = k+1, sh-8 {
		b[k] ^= byte(mark >> sh)
	}
	a, ok := netip.AddrFromSlice(b)
	return a, ok && n.Subnets[i].Contains(a)
}

// MarkOf is spec.Network.VIPMark for this network.
func (n Network) MarkOf(a netip.Addr) (uint32, bool) {
	return spec.Network{Subnets: n.Subnets}.VIPMark(a)
}

// Contains tells whether a lies in one of the network's subnets and is not a
// gateway: whether it can be a VIP or a backend.
func (n Network) Contains(a netip.Addr) bool {
	return !slices.Contains(n.Gateways, a) && slices.ContainsFunc(n.Subnets, func(p netip.Prefix) bool { return p.Contains(a) })
}

// Reads are the parts of a View that Desired is made of.
const Reads = spec.ChangedSelf | spec.ChangedPeers | spec.ChangedNetworks | spec.ChangedServices | spec.ChangedEndpoints | spec.ChangedStates

// Desired is the State that v asks for. It is pure, total (a View holds what
// others gossiped; nonsense in it is left out, never a panic) and
// deterministic.
//
// A backend of a VIP is an endpoint of the service on the VIP's network, with
// an address of the VIP's family:
//
//   - active, on an alive node: weight 1;
//   - active, on a suspected node (or one that is not known yet): weight 0 if
//     the VIP has a backend of the first kind, else 1;
//   - active, on a node that this one does not reach by the data path: weight 0 if
//     the VIP has a backend of the first two kinds, else 1;
//   - draining: weight 0;
//   - starting, or on a dead node: not a backend.
//
// If two endpoints claim one address (an old record beside its successor), the
// more willing one counts.
func Desired(v *spec.View) State {
	st := State{Complete: v.Complete}
	for _, n := range v.Networks {
		st.Networks = append(st.Networks, desiredNetwork(v, n))
	}
	slices.SortFunc(st.Networks, func(a, b Network) int { return strings.Compare(a.ID, b.ID) })
	return st
}

// will is how much an endpoint wants new connections.
type will int

const (
	drains will = iota
	unreached
	suspected
	takes
)

func desiredNetwork(v *spec.View, n spec.Network) Network {
	out := Network{ID: n.ID, Name: n.Name, Namespace: spec.OverlayNetns(v.Instance, n),
		Subnets: slices.Clone(n.Subnets), Gateways: slices.Clone(n.Gateways)}

	vips, services := map[netip.Addr]bool{}, map[string]bool{}
	for _, s := range v.Services {
		services[s.ID] = true
		if s.Spec.EndpointMode != spec.EndpointModeVIP {
			continue
		}
		for _, a := range s.VIPsOn(n.ID) {
			vips[a] = true
		}
	}

	wills := map[string]map[netip.Addr]will{} // by service ID
	locals, orphans, claimed := map[netip.Addr]bool{}, map[netip.Addr]bool{}, map[netip.Addr]bool{}
	for _, e := range v.Endpoints {
		if e.Network != n.ID {
			continue
		}
		var w will
		switch p, known := v.Peer(e.Node); {
		case e.State == spec.EndpointDraining:
			w = drains
		case e.Node == v.Self:
			w = takes
		case p.Dark:
			w = unreached
		case known && p.Liveness == spec.PeerAlive:
			w = takes
		default:
			w = suspected
		}
		p, known := v.Peer(e.Node)
		dead := known && p.Liveness == spec.PeerDead && e.Node != v.Self
		for _, a := range e.Addrs {
			if !n.Contains(a) || n.IsGateway(a) || vips[a] {
				continue
			}
			claimed[a] = true
			if e.Node == v.Self && e.State != spec.EndpointStarting {
				locals[a] = true
			}
			if e.Service == "" || dead || (e.State != spec.EndpointActive && e.State != spec.EndpointDraining) {
				continue
			}
			if !services[e.Service] {
				orphans[a] = true
				continue
			}
			m := wills[e.Service]
			if m == nil {
				m = map[netip.Addr]will{}
				wills[e.Service] = m
			}
			if have, ok := m[a]; !ok || have < w {
				m[a] = w
			}
		}
	}
	out.Locals = slices.SortedFunc(maps.Keys(locals), netip.Addr.Compare)
	out.Claimed = slices.SortedFunc(maps.Keys(claimed), netip.Addr.Compare)
	out.Orphans = slices.SortedFunc(maps.Keys(orphans), netip.Addr.Compare)

	taken := map[netip.Addr]bool{}
	for _, s := range v.Services {
		if s.Spec.EndpointMode != spec.EndpointModeVIP {
			continue
		}
		for _, a := range s.VIPsOn(n.ID) {
			mark, ok := n.VIPMark(a)
			if !ok || n.IsGateway(a) || taken[a] {
				continue
			}
			taken[a] = true
			out.Servers = append(out.Servers, Server{VIP: a, Mark: mark, Service: s.ID, Name: s.Spec.Name,
				Backends: backends(wills[s.ID], a.Is4())})
		}
	}
	slices.SortFunc(out.Servers, func(a, b Server) int { return a.VIP.Compare(b.VIP) })
	return out
}

func backends(wills map[netip.Addr]will, is4 bool) []Backend {
	best := drains
	for a, w := range wills {
		if a.Is4() == is4 {
			best = max(best, w)
		}
	}
	var out []Backend
	for a, w := range wills {
		if a.Is4() != is4 {
			continue
		}
		b := Backend{Addr: a}
		if w != drains && w == best {
			b.Weight = 1
		}
		out = append(out, b)
	}
	slices.SortFunc(out, func(a, b Backend) int { return a.Addr.Compare(b.Addr) })
	return out
}
