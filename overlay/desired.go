package overlay

import (
	"cmp"
	"crypto/sha256"
	"encoding/base32"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/shoalnet/shoal/spec"
)

// Reads are the parts of a View that Desired is made of: an endpoint's state counts only
// where two nodes claim one address.
const Reads = spec.ChangedSelf | spec.ChangedPeers | spec.ChangedNetworks | spec.ChangedServices | spec.ChangedEndpoints | spec.ChangedDrains | spec.ChangedSandboxes

// Desired returns what the View asks of this node's kernel. It is pure.
//
// A View that does not know this node's own number or address yet asks for
// nothing, and for nothing to be removed.
func Desired(v *spec.View) State {
	s := State{Overhead: spec.VXLANOverhead(v.Underlay.Addr), UnderlayMTU: v.Underlay.MTU, Owners: map[string]string{}, PortOwners: map[string]string{}}
	self, ok := v.Peer(v.Self)
	if !ok || self.Number < 1 || self.Number > spec.MaxNodes || !v.Underlay.Addr.IsValid() {
		return s
	}
	s.Complete = v.Complete
	s.Owners[""] = "node"
	if len(v.Networks) > 0 {
		s.Add(Underlay{v.Underlay.Addr})
	}
	nets := map[string]*network{}
	for _, n := range v.Networks {
		nets[n.ID] = s.network(v, self, n)
	}
	s.path(v, self)
	for _, b := range v.Sandboxes {
		s.sandbox(b, nets)
	}
	for _, n := range v.Networks {
		s.remotes(v, nets[n.ID])
	}
	s.members(v)
	return s
}

// members lets in what comes from nodes of the cluster. While the View is not
// complete some of them may be missing in it, and what was let in stays.
func (s *State) members(v *spec.View) {
	var vnis []uint32
	for _, n := range v.Networks {
		if n.Driver != spec.DriverBridge {
			vnis = append(vnis, n.VNI)
		}
	}
	if len(vnis) > 0 {
		vnis = append(vnis, spec.PathNetwork.VNI)
	}
	if !v.Complete || len(v.Networks) == 0 {
		return
	}
	var peers, agents []string
	for _, p := range v.Peers {
		// Dead or not: it is for gossip to say whom to send to.
		if p.Addr.IsValid() && p.Addr.Is4() == v.Underlay.Addr.Is4() {
			peers = append(peers, p.Addr.String())
			for _, port := range []int{p.ControlPort, p.GossipPort} {
				if port > 0 && port <= 65535 {
					agents = append(agents, netip.AddrPortFrom(p.Addr, uint16(port)).String())
				}
			}
		}
	}
	for _, a := range v.Agents {
		if a.Addr().Is4() == v.Underlay.Addr.Is4() {
			agents = append(agents, a.String())
		}
	}
	s.Add(Members{Table: MembersTable(v.Instance), Port: v.Underlay.VXLANPort, Peers: Join(peers), VNIs: Join(vnis), Agents: Join(agents)})
}

// network is what the parts of Desired share about one network.
type network struct {
	spec.Network
	ns     string
	mtu    int
	taken  map[netip.Addr]bool // local endpoints, VIPs and gateways
	hasV6  bool
	hostIf string
}

func (n *network) gateway(v6 bool) netip.Addr {
	for _, g := range n.Gateways {
		if g.Is6() == v6 {
			return g
		}
	}
	return netip.Addr{}
}

// network adds what a network needs whoever is on it.
func (s *State) network(v *spec.View, self spec.Peer, sn spec.Network) *network {
	n := &network{Network: sn, ns: spec.OverlayNetns(v.Instance, sn), mtu: sn.MTU, taken: map[netip.Addr]bool{},
		hostIf: ifName(HostPrefix, sn.ID)}
	n.hasV6 = slices.ContainsFunc(n.Subnets, func(p netip.Prefix) bool { return p.Addr().Is6() })
	hasV4 := slices.ContainsFunc(n.Subnets, func(p netip.Prefix) bool { return p.Addr().Is4() })
	out := !n.Internal && hasV4
	s.Owners[n.ns] = "network " + n.Name

	s.Add(Namespace{n.ns, n.ID})
	filter := Filter{Netns: n.ns, Subnets: Prefixes(n.Subnets), Out: out}
	if !sn.ICC() {
		var gws []netip.Prefix
		for _, g := range n.Gateways {
			gws = append(gws, host(g))
		}
		filter.Alone = Prefixes(gws)
	}
	s.Add(filter)
	set := func(dev, name, value string) { s.Add(Sysctl{n.ns, dev, name, value}) }
	set("", "net.ipv4.ip_forward", "1")
	for _, conf := range []string{"all", "default"} {
		set("", "net.ipv4.conf."+conf+".send_redirects", "0")
		set("", "net.ipv4.conf."+conf+".rp_filter", "0")
		// All of these are the host's in a new namespace. A task could send around
		// the guards (RFC 791's source routes), have its neighbours learnt, or be
		// answered for addresses that are another's.
		for _, x := range []string{"accept_source_route", "arp_accept", "proxy_arp"} {
			set("", "net.ipv4.conf."+conf+"."+x, "0")
		}
		if n.hasV6 {
			set("", "net.ipv6.conf."+conf+".disable_ipv6", "0")
			set("", "net.ipv6.conf."+conf+".forwarding", "1")
		} else {
			set("", "net.ipv6.conf."+conf+".disable_ipv6", "1")
		}
	}

	if sn.Driver != spec.DriverBridge {
		s.Add(VXLAN{Netns: n.ns, Network: n.ID, VNI: n.VNI, Local: v.Underlay.Addr, Port: v.Underlay.VXLANPort,
			MAC: spec.VTEPMAC(self.Number).String(), MTU: n.mtu})
		s.devSysctls(n.ns, VXLANDev)
		// Errors that another node's ovns reports come from the gateway address,
		// which is a local address here as well.
		set(VXLANDev, "net.ipv4.conf."+VXLANDev+".accept_local", "1")
	}
	for _, g := range n.Gateways {
		n.taken[g] = true
		s.Add(Addr{n.ns, "lo", host(g)})
	}
	for _, p := range n.Subnets {
		s.Add(Route{Netns: n.ns, Dst: p, Metric: MetricUnreachable, Type: "unreachable"})
	}
	for _, svc := range v.Services {
		for _, a := range svc.VIPsOn(n.ID) {
			n.taken[a] = true
		}
	}

	if out {
		s.Add(Forwarding{Table: HostTable(v.Instance)})
		hostAddr, ovAddr := n.Egress()
		s.Add(Egress{Netns: n.ns, Network: n.ID, Dev: n.hostIf, MTU: n.mtu})
		s.devSysctls(n.ns, OutDev)
		s.Add(Sysctl{"", n.hostIf, "net.ipv4.conf." + n.hostIf + ".forwarding", "1"})
		s.Add(Sysctl{"", n.hostIf, "net.ipv6.conf." + n.hostIf + ".disable_ipv6", "1"})
		s.Add(Addr{"", n.hostIf, netip.PrefixFrom(hostAddr, 31)})
		s.Add(Addr{n.ns, OutDev, netip.PrefixFrom(ovAddr, 31)})
		s.Add(Route{Netns: n.ns, Dst: netip.PrefixFrom(netip.IPv4Unspecified(), 0), Via: hostAddr, Dev: OutDev, Onlink: true})
	}
	return n
}

// devSysctls adds the settings of one device of an ovns. New devices take them
// from "default"; here is who looks after them later.
func (s *State) devSysctls(ns, dev string) {
	s.Add(Sysctl{ns, dev, "net.ipv4.conf." + dev + ".send_redirects", "0"})
	s.Add(Sysctl{ns, dev, "net.ipv4.conf." + dev + ".rp_filter", "0"})
	// Not shown by ip_forward, which sets them all once.
	s.Add(Sysctl{ns, dev, "net.ipv4.conf." + dev + ".forwarding", "1"})
}

// sandbox adds the wires of one task.
func (s *State) sandbox(b spec.Sandbox, nets map[string]*network) {
	owner := "task " + b.Name
	s.Owners[b.Netns] = owner
	s.Add(Sandbox{Netns: b.Netns, Task: b.Task})
	if b.DNSPort != 0 {
		s.Add(Redirect{Netns: b.Netns, Port: b.DNSPort})
	}
	dev := ifName(PortPrefix, b.Task)
	s.PortOwners[dev] = owner
	hasDefault := false
	seen := map[string]bool{}
	for i, a := range b.Attachments {
		n := nets[a.Network]
		addrs := slices.DeleteFunc(slices.Clone(a.Addrs), func(x netip.Addr) bool {
			return n == nil || !n.Contains(x) || n.taken[x]
		})
		if n == nil || seen[a.Network] || len(addrs) == 0 {
			continue
		}
		seen[a.Network] = true
		eth, number := iface(a, i)
		mac := endpointMAC(addrs[0])
		s.Add(Port{Netns: n.ns, Dev: dev, Network: n.ID, Task: b.Task, TaskNetns: b.Netns, Eth: eth, MAC: mac, MTU: n.mtu})
		s.devSysctls(n.ns, dev)
		// The task knows its next hop's address, and who asks for it is remembered:
		// in a table of 1,024 neighbours that all namespaces share.
		s.Add(Sysctl{n.ns, dev, "net.ipv4.conf." + dev + ".arp_ignore", "8"})
		v4, v6 := false, false
		for _, x := range addrs {
			n.taken[x] = true
			gw, ethMetric, ovMetric := spec.LinkGateway, number, 0
			v4, v6 = v4 || x.Is4(), v6 || x.Is6()
			if x.Is6() {
				gw, ethMetric, ovMetric = LinkGateway6, metric6+number, metric6
			}
			s.Add(Guard{n.ns, dev, x})
			s.Add(Addr{n.ns, dev, gwPrefix(gw)})
			s.Add(Neigh{n.ns, dev, x, mac})
			s.Add(Route{Netns: n.ns, Dst: host(x), Metric: ovMetric, Dev: dev, Src: n.gateway(x.Is6())})

			if x.Is6() {
				s.Add(Sysctl{b.Netns, eth, "net.ipv6.conf." + eth + ".disable_ipv6", "0"})
			}
			s.Add(Addr{b.Netns, eth, host(x)})
			s.Add(Neigh{b.Netns, eth, gw, LinkMAC})
			if x.Is4() {
				s.Add(Route{Netns: b.Netns, Dst: host(gw), Metric: ethMetric, Dev: eth})
			}
			for _, p := range n.Subnets {
				if p.Addr().Is4() == x.Is4() {
					s.addFirst(Route{Netns: b.Netns, Dst: p, Metric: ethMetric, Via: gw, Dev: eth, Src: x})
				}
			}
			if x.Is4() && !n.Internal && !hasDefault {
				hasDefault = true
				s.Add(Route{Netns: b.Netns, Dst: netip.PrefixFrom(netip.IPv4Unspecified(), 0), Metric: ethMetric, Via: gw, Dev: eth, Src: x})
			}
		}
	}
}

// iface is an attachment's device in the task, and its number, which orders the
// task's routes by their metrics. Both stay when other networks come and go.
func iface(a spec.Attachment, i int) (name string, number int) {
	if digits, ok := strings.CutPrefix(a.Iface, "eth"); ok {
		if n, err := strconv.ParseUint(digits, 10, 16); err == nil {
			return a.Iface, int(n)
		}
	}
	return fmt.Sprintf("eth%d", i), i
}

// addFirst adds o unless its key is taken: of several addresses of one
// attachment the first is the preferred source.
func (s *State) addFirst(o Object) {
	if s.objects[o.Key()] == nil {
		s.Add(o)
	}
}

// metric6 is the kernel's default metric of IPv6 routes (IP6_RT_PRIO_USER,
// linux/ipv6_route.h); 0 stands for it in requests, but not in answers.
const metric6 = 1024

// remotes adds the routes to a network's endpoints on other nodes, and these
// nodes as next hops. Addresses that a local task has, or that aren't an
// endpoint's to have, are left out, whatever gossip says.
func (s *State) remotes(v *spec.View, n *network) {
	if n.Driver == spec.DriverBridge {
		return // it is nowhere else
	}
	type claim struct {
		e spec.Endpoint
		p spec.Peer
	}
	claims := map[netip.Addr]claim{}
	for i := range len(v.Endpoints) + len(v.Away) {
		var e spec.Endpoint
		if i < len(v.Endpoints) {
			e = v.Endpoints[i]
		} else {
			e = v.Away[i-len(v.Endpoints)]
		}
		if e.Network != n.ID || e.Node == v.Self {
			continue
		}
		p, ok := v.Peer(e.Node)
		if !ok || !p.Routed() || p.Number < 1 || p.Number > spec.MaxNodes ||
			!p.Addr.IsValid() || p.Addr.Is4() != v.Underlay.Addr.Is4() {
			continue
		}
		for _, a := range e.Addrs {
			if !n.Contains(a) || n.taken[a] {
				continue
			}
			if c, ok := claims[a]; ok && !better(p, e, c.p, c.e) {
				continue
			}
			claims[a] = claim{e, p}
		}
	}
	if published(v, n.ID) {
		// Replies to a client go back to the node where it entered, which need
		// not have an endpoint.
		for _, p := range v.Peers {
			if p.ID != v.Self && p.Routed() && p.Number >= 1 && p.Number <= spec.MaxNodes &&
				p.Addr.IsValid() && p.Addr.Is4() == v.Underlay.Addr.Is4() {
				mac := spec.VTEPMAC(p.Number).String()
				s.Add(Neigh{n.ns, VXLANDev, spec.RouterAddr(p.Number), mac})
				s.Add(FDB{n.ns, mac, p.Addr})
			}
		}
	}
	for _, a := range slices.SortedFunc(maps.Keys(claims), netip.Addr.Compare) {
		p := claims[a].p
		router, metric := spec.RouterAddr(p.Number), 0
		if a.Is6() {
			router, metric = router6(p.Number), metric6
		}
		mac := spec.VTEPMAC(p.Number).String()
		s.Add(Neigh{n.ns, VXLANDev, router, mac})
		s.Add(FDB{n.ns, mac, p.Addr})
		s.Add(Route{Netns: n.ns, Dst: host(a), Metric: metric, Via: router, Dev: VXLANDev, Src: n.gateway(a.Is6()), Onlink: true,
			MTU: v.PathMTU(n.Network, p, a.Is6())})
	}
}

// PathOwner is who the objects of spec.PathNetwork are for.
const PathOwner = "probes of the data path"

// path adds the namespace by which nodes probe the data path, while there is any:
// each has its router's address there, which the kernel answers for.
func (s *State) path(v *spec.View, self spec.Peer) {
	if !slices.ContainsFunc(v.Networks, func(n spec.Network) bool { return n.Driver != spec.DriverBridge }) {
		return
	}
	n := s.network(v, self, spec.PathNetwork)
	s.Owners[n.ns] = PathOwner
	me := spec.RouterAddr(self.Number)
	s.Add(Addr{n.ns, "lo", host(me)})
	s.Add(Route{Netns: n.ns, Dst: spec.RouterPrefix, Dev: VXLANDev, Src: me})
	for _, p := range v.Peers {
		if p.ID != v.Self && p.Routed() && p.Number >= 1 && p.Number <= spec.MaxNodes && p.Number != self.Number &&
			p.Addr.IsValid() && p.Addr.Is4() == v.Underlay.Addr.Is4() {
			mac := spec.VTEPMAC(p.Number).String()
			s.Add(Neigh{n.ns, VXLANDev, spec.RouterAddr(p.Number), mac})
			s.Add(FDB{n.ns, mac, p.Addr})
		}
	}
}

// published tells whether a published port of every node leads to a network.
func published(v *spec.View, network string) bool {
	return slices.ContainsFunc(v.Services, func(s spec.Service) bool {
		return s.Ingress == network && slices.ContainsFunc(s.Ports, func(p spec.Port) bool { return p.Mode == spec.PortIngress })
	})
}

// better tells whether, of two nodes that claim the same address, p with e is
// to be believed rather than q with f. One of them is behind: better the one
// that answers, then the one whose task isn't on its way out.
func better(p spec.Peer, e spec.Endpoint, q spec.Peer, f spec.Endpoint) bool {
	return cmp.Or(cmp.Compare(p.Liveness, q.Liveness), cmp.Compare(drains(e), drains(f)), strings.Compare(e.Key(), f.Key())) < 0
}

func drains(e spec.Endpoint) int {
	if e.State == spec.EndpointDraining {
		return 1
	}
	return 0
}

// router6 is spec.RouterAddr's like for IPv6: link-local, in a range of ours.
func router6(number int) netip.Addr {
	return netip.AddrFrom16([16]byte{0xfe, 0x80, 8: 0x53, 9: 0x68, 14: byte(number >> 8), 15: byte(number)})
}

func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

func gwPrefix(a netip.Addr) netip.Prefix {
	if a.Is6() {
		return netip.PrefixFrom(a, 64)
	}
	return host(a)
}

// endpointMAC is a locally administered unicast address (IEEE 802) that carries
// the last four octets of the endpoint's address, so that it is stable.
func endpointMAC(a netip.Addr) string {
	b := a.AsSlice()
	b = b[len(b)-4:]
	return net.HardwareAddr{0x06, 0x53, b[0], b[1], b[2], b[3]}.String()
}

// ifName is prefix and ID as a device name, at most 15 characters (IFNAMSIZ
// less the final NUL). An ID not made by spec.NewID is hashed.
func ifName(prefix, id string) string {
	plain := len(id) == spec.IDLen && !strings.ContainsFunc(id, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= '0' && r <= '9')
	})
	if !plain {
		h := sha256.Sum256([]byte(id))
		id = strings.ToLower(base32.StdEncoding.EncodeToString(h[:]))[:spec.IDLen]
	}
	return prefix + id
}

// HostTable is the name of an agent's nftables table in the host's namespace.
func HostTable(instance string) string {
	if !strings.HasPrefix(instance, "shoal") {
		instance = "shoal-" + instance
	}
	return instance + "-egress"
}

// MembersTable is the name of an agent's nftables table of VXLAN members, in the
// host's namespace.
func MembersTable(instance string) string {
	return strings.TrimSuffix(HostTable(instance), "-egress") + "-members"
}

// IsRouter tells whether a is the router address of some node.
func IsRouter(a netip.Addr) bool {
	if a.Is4() {
		return spec.RouterPrefix.Contains(a)
	}
	b, r := a.As16(), router6(0).As16()
	return slices.Equal(b[:14], r[:14])
}

// IsVTEPMAC tells whether m is spec.VTEPMAC of some node.
func IsVTEPMAC(m net.HardwareAddr) bool {
	return len(m) == 6 && slices.Equal(m[:3], spec.VTEPMAC(0)[:3])
}
