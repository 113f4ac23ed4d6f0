package ingress

import (
	"crypto/sha256"
	"encoding/base32"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/shoalnet/shoal/spec"
)

// Desired returns what the View asks of this node's kernel. It is pure, total
// (nonsense is left out, never a panic) and deterministic.
func Desired(v *spec.View) State {
	s := State{owners: map[any]string{}}
	self, ok := v.Peer(v.Self)
	if !ok || self.Number < 1 || self.Number > spec.MaxNodes {
		return s // and nothing is to be removed
	}
	s.Complete = v.Complete
	b := &builder{v: v, State: &s, nets: map[string]*network{}, slots: map[localKey]bool{}}
	for _, n := range v.Networks {
		if n.Internal || !slices.ContainsFunc(n.Subnets, func(p netip.Prefix) bool { return p.Addr().Is4() }) {
			continue // no way out
		}
		host, out := n.Egress()
		nn := &network{Network: n, ns: spec.OverlayNetns(v.Instance, n), dev: HostDev(n.ID), host: host, out: out}
		b.nets[n.ID] = nn
		s.Ways = append(s.Ways, Way{Network: n.Name, Netns: nn.ns, Dev: nn.dev})
	}
	slices.SortFunc(s.Ways, func(a, b Way) int { return strings.Compare(a.Netns, b.Netns) })
	// Ports of services first: they are the cluster's, and a clash is the
	// managers' to prevent.
	for _, svc := range v.Services {
		b.service(svc)
	}
	for _, sb := range v.Sandboxes {
		b.sandbox(sb)
	}
	return s
}

type network struct {
	spec.Network
	ns, dev   string
	host, out netip.Addr
}

type builder struct {
	v *spec.View
	*State
	nets  map[string]*network // by ID
	slots map[localKey]bool
}

func (b *builder) service(svc spec.Service) {
	n := b.nets[svc.Ingress]
	if n == nil {
		return
	}
	for _, p := range svc.Ports {
		if p.Published == 0 || p.Validate() != nil {
			continue
		}
		owner := "service " + svc.Spec.Name
		switch p.Mode {
		case spec.PortIngress:
			i := slices.IndexFunc(svc.VIPsOn(n.ID), func(a netip.Addr) bool { return a.Is4() && n.Contains(a) })
			if i < 0 {
				continue
			}
			vip := svc.VIPsOn(n.ID)[i]
			if !b.port(n, owner, p, netip.AddrPortFrom(vip, p.Target)) {
				continue
			}
			b.Add(Route{Addr: vip, Via: n.out, Dev: n.dev})
			b.Add(Private{Addr: vip})
			b.nodes(n)
		case spec.PortLocal:
			takes, drains := localBackends(b.v, svc.ID, n.Network)
			b.local(n, owner, p, takes, drains)
		}
	}
}

// sandbox publishes what leads to one task.
func (b *builder) sandbox(sb spec.Sandbox) {
	if len(sb.Ports) == 0 {
		return
	}
	n, addr, ok := b.defaultRoute(sb)
	if !ok {
		return
	}
	drains := slices.ContainsFunc(b.v.Endpoints, func(e spec.Endpoint) bool {
		return e.Task == sb.Task && e.Network == n.ID && e.Node == b.v.Self && e.State == spec.EndpointDraining
	})
	for _, p := range sb.Ports {
		if p.Published == 0 || p.Validate() != nil {
			continue
		}
		if drains {
			b.local(n, "task "+sb.Name, p, nil, []netip.Addr{addr})
		} else {
			b.local(n, "task "+sb.Name, p, []netip.Addr{addr}, nil)
		}
	}
}

// defaultRoute finds where a task's default route is: on its first network that
// has a way out.
func (b *builder) defaultRoute(sb spec.Sandbox) (*network, netip.Addr, bool) {
	for _, a := range sb.Attachments {
		n := b.nets[a.Network]
		if n == nil {
			continue
		}
		for _, x := range a.Addrs {
			if x.Is4() && n.Contains(x) && !n.IsGateway(x) {
				return n, x, true
			}
		}
	}
	return nil, netip.Addr{}, false
}

// port adds one published port, unless another has it.
func (b *builder) port(n *network, owner string, p spec.Port, to netip.AddrPort) bool {
	o := Port{Addr: p.Addr, Published: p.Published, Protocol: p.Protocol, To: to, NAT: p.NAT}
	if b.Get(o.Key()) != nil {
		return false
	}
	b.Add(o)
	b.owners[o.Key()] = owner
	node := b.v.Underlay.Addr
	if !node.Is4() {
		node = netip.Addr{}
	}
	b.Add(HostTable{Name: TableName(b.v.Instance), Node: node})
	b.Add(Localnet{n.dev})
	var subnets []string
	for _, s := range n.Subnets {
		if s.Addr().Is4() {
			subnets = append(subnets, s.String())
		}
	}
	b.Add(Table{Netns: n.ns, Subnets: strings.Join(subnets, " "), Out: n.out})
	b.Add(Entry{Netns: n.ns, Protocol: p.Protocol, To: to})
	return true
}

// local adds a published port with a balancer of this node's tasks.
func (b *builder) local(n *network, owner string, p spec.Port, takes, drains []netip.Addr) {
	// The ovns's port is the published one, but for ports that are published
	// twice, with different host addresses.
	k := localKey{n.ns, p.Protocol, p.Published}
	for b.slots[k] {
		if k.slot--; k.slot == 0 {
			k.slot = 65535
		}
		if k.slot == p.Published {
			return
		}
	}
	if !b.port(n, owner, p, netip.AddrPortFrom(n.out, k.slot)) {
		return
	}
	b.slots[k] = true
	b.Add(Local{Netns: n.ns, Protocol: p.Protocol, Slot: k.slot, Target: p.Target, Backends: join(takes), Draining: join(drains)})
}

// nodes adds the nodes that replies may have to go to.
func (b *builder) nodes(n *network) {
	for _, p := range b.v.Peers {
		if p.ID != b.v.Self && p.Routed() && p.Number >= 1 && p.Number <= spec.MaxNodes {
			b.Add(Node{Netns: n.ns, Number: p.Number, MTU: b.v.PathMTU(n.Network, p, false)})
		}
	}
}

// localBackends lists the IPv4 addresses of a service's endpoints on this node
// that take connections, and of those that only keep them.
func localBackends(v *spec.View, service string, n spec.Network) (takes, drains []netip.Addr) {
	state := map[netip.Addr]spec.EndpointState{}
	for _, e := range v.Endpoints {
		if e.Node != v.Self || e.Service != service || e.Network != n.ID {
			continue
		}
		for _, a := range e.Addrs {
			if !a.Is4() || !n.Contains(a) || n.IsGateway(a) {
				continue
			}
			// Of an old record beside its successor the more willing counts.
			if old, ok := state[a]; !ok || old != spec.EndpointActive {
				state[a] = e.State
			}
		}
	}
	for _, a := range slices.SortedFunc(maps.Keys(state), netip.Addr.Compare) {
		switch state[a] {
		case spec.EndpointActive:
			takes = append(takes, a)
		case spec.EndpointDraining:
			drains = append(drains, a)
		}
	}
	return takes, drains
}

// Health tells how many replicas on this node take connections of a port that
// is published with mode local; ok is false if there is no such port. An
// external load balancer asks for it, to choose nodes.
func Health(v *spec.View, published uint16, protocol string) (localReplicas int, ok bool) {
	for _, svc := range v.Services {
		for _, p := range svc.Ports {
			if p.Mode != spec.PortLocal || p.Published != published || p.Protocol != protocol {
				continue
			}
			ok = true
			if n, found := v.Network(svc.Ingress); found {
				takes, _ := localBackends(v, svc.ID, n)
				localReplicas = max(localReplicas, len(takes))
			}
		}
	}
	return localReplicas, ok
}

func join(as []netip.Addr) string {
	ss := make([]string, len(as))
	for i, a := range as {
		ss[i] = a.String()
	}
	return strings.Join(ss, " ")
}

// TableName is the name of an agent's nftables table in the host's namespace.
func TableName(instance string) string {
	if !strings.HasPrefix(instance, "shoal") {
		instance = "shoal-" + instance
	}
	return instance + "-ingress"
}

// DevPrefix begins the names of the host's ends of networks' ways out. It, and
// HostDev, agree with package overlay, which makes them (a test sees to it).
const DevPrefix = "sho"

// HostDev is the host's end of a network's way out.
func HostDev(id string) string {
	plain := len(id) == spec.IDLen && !strings.ContainsFunc(id, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= '0' && r <= '9')
	})
	if !plain {
		h := sha256.Sum256([]byte(id))
		id = strings.ToLower(base32.StdEncoding.EncodeToString(h[:]))[:spec.IDLen]
	}
	return DevPrefix + id
}

// Devices in the ovns, as package overlay names them.
const (
	OutDev   = "out"
	VXLANDev = "vx"
)
