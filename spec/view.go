package spec

import (
	"net"
	"net/netip"
	"slices"
	"strings"
)

// Liveness of a peer as this node sees it.
type Liveness int

const (
	PeerAlive   Liveness = iota
	PeerSuspect          // probes fail; takes no new connections where others can
	PeerDead             // its endpoints are out of every VIP and name, and unless it is Away of every route
)

func (l Liveness) String() string {
	return [...]string{"alive", "suspect", "dead"}[l]
}

// Peer is a node as gossip knows it.
type Peer struct {
	ID       string
	Name     string
	Number   int        // see Node.Number
	Addr     netip.Addr // where VXLAN packets for it go
	Liveness Liveness
	// ControlPort (TCP) and GossipPort (TCP and UDP) are where its agent
	// listens, at Addr.
	ControlPort, GossipPort int
	// MTU is that of the link that has Addr, as the node says, in bytes; 0: it
	// does not say.
	MTU int
	// Answers: it has a namespace that answers probes of the data path
	// ([PathNetwork]).
	Answers bool
	// Away: it is dead for want of an agent, and its machine is there: what its tasks have
	// begun, and what they begin by what their kernel knows, is answered, though nothing
	// is sent to them by a VIP or a name. Not gossiped.
	Away bool
	// Dark: it does not answer those of this node, by the data path, though it
	// should: what VXLAN carries there or back is lost. Not gossiped.
	Dark bool
}

// Routed tells whether there are routes to the peer, and to its endpoints.
func (p Peer) Routed() bool { return p.Liveness != PeerDead || p.Away }

// PathNetwork is the network that the nodes have among themselves, on which they
// probe the data path: each has its RouterAddr on it. Its VNI is below those of
// networks, which begin at 4096.
var PathNetwork = Network{ID: "shoalpath222", Name: "path", Driver: DriverOverlay, VNI: 4095, Internal: true, Subnets: []netip.Prefix{RouterPrefix}}

// RouterAddr is the next hop that stands for the node in every overlay
// namespace: 169.254.64.0 + Number, outside every subnet, so that no address
// of a network is spent on a node. It is never put on a wire.
func RouterAddr(number int) netip.Addr {
	return addToV4(netip.AddrFrom4([4]byte{169, 254, 64, 0}), uint32(number))
}

// RouterPrefix covers every RouterAddr.
var RouterPrefix = netip.MustParsePrefix("169.254.64.0/18")

// VTEPMAC is the node's VXLAN device address, the same in every network: a
// locally administered unicast address (IEEE 802, second bit of the first
// octet) that carries the node's number.
func VTEPMAC(number int) net.HardwareAddr {
	return net.HardwareAddr{0x02, 0x53, 0x68, byte(number >> 16), byte(number >> 8), byte(number)}
}

// EndpointState tells what may reach an endpoint.
type EndpointState int

const (
	EndpointStarting EndpointState = iota // routed and named by its task name; takes no service traffic yet
	EndpointActive                        // takes everything
	EndpointDraining                      // keeps its connections, takes no new ones
	EndpointIdle                          // its program runs and listens nowhere: named where no other is, takes no service traffic
)

// EndpointStates is how many there are.
const EndpointStates = int(EndpointIdle) + 1

func (s EndpointState) String() string {
	return [...]string{"starting", "active", "draining", "idle"}[s]
}

// Endpoint is one task on one network, as its node gossips it. Only that node
// ever writes it.
type Endpoint struct {
	Task     string        `json:"task"`
	TaskName string        `json:"task_name"`
	Hostname string        `json:"hostname,omitempty"`
	Service  string        `json:"service,omitempty"` // ID
	Slot     int           `json:"slot,omitempty"`
	Network  string        `json:"network"` // ID
	Addrs    []netip.Addr  `json:"addrs"`
	Aliases  []string      `json:"aliases,omitempty"`
	State    EndpointState `json:"state"`
	Node     string        `json:"-"` // set by the reader, from whose record it is
}

// Key identifies an endpoint within the cluster.
func (e Endpoint) Key() string { return e.Task + "/" + e.Network }

// Equal compares all fields.
func (e Endpoint) Equal(o Endpoint) bool { return e.State == o.State && e.equalButState(&o) }

func (e *Endpoint) equalButState(o *Endpoint) bool {
	return e.Task == o.Task && e.TaskName == o.TaskName && e.Hostname == o.Hostname && e.Service == o.Service &&
		e.Slot == o.Slot && e.Network == o.Network && e.Node == o.Node &&
		slices.Equal(e.Addrs, o.Addrs) && slices.Equal(e.Aliases, o.Aliases)
}

// Sandbox is a task on this node whose namespace is to be wired.
type Sandbox struct {
	Task        string
	Name        string
	Netns       string       // name under NetnsDir
	Attachments []Attachment // in interface order: eth0, eth1, …
	Ports       []Port       // published on this node, straight to the task (PortHost)
	DNSPort     uint16       // 127.0.0.11:53 in the task is redirected to 127.0.0.11:DNSPort; 0: not
}

// Underlay is how this node reaches the others.
type Underlay struct {
	Addr      netip.Addr // local address of VXLAN packets
	VXLANPort int        // UDP
	MTU       int        // bytes, of the link that has Addr; 0: found by the overlay
}

// NetnsDir holds the namespaces that "ip netns" knows (ip-netns(8)).
const NetnsDir = "/run/netns"

// View is everything one node's data plane needs, at one moment. It is never
// changed once made; a later moment is another View.
type View struct {
	// Self is this node's ID; its own Peer is among Peers.
	Self string
	// Instance prefixes what this agent names in places it shares with other
	// agents of the same machine (network namespaces): "shoal" on a machine
	// with one agent, "shoal-node1" in a lab.
	Instance string
	// Complete: control and gossip have each reported once, so that what is
	// not in the View does not exist and may be removed from the kernel.
	Complete bool
	Underlay Underlay

	Peers []Peer // by ID
	// Agents are where nodes' agents listen as the managers have it: gossip may
	// know only some of the nodes.
	Agents []netip.AddrPort
	// Networks are those this node takes part in, by ID: because a task here is
	// on them, or because a published port leads there (Service.Ingress).
	Networks  []Network
	Services  []Service  // those on Networks, by ID
	Endpoints []Endpoint // those on Networks, of peers that aren't dead, by Key
	Away      []Endpoint // those of peers that are Away, in the order of Endpoints: they have routes, and nothing else
	Sandboxes []Sandbox  // by Task
}

// Peer returns a peer by ID.
func (v *View) Peer(id string) (Peer, bool) {
	i, ok := slices.BinarySearchFunc(v.Peers, id, func(p Peer, id string) int { return strings.Compare(p.ID, id) })
	if !ok {
		return Peer{}, false
	}
	return v.Peers[i], true
}

// Network returns a network by ID.
func (v *View) Network(id string) (Network, bool) {
	i, ok := slices.BinarySearchFunc(v.Networks, id, func(n Network, id string) int { return strings.Compare(n.ID, id) })
	if !ok {
		return Network{}, false
	}
	return v.Networks[i], true
}

// VXLAN's overhead in bytes: an inner Ethernet header (14), VXLAN (8), UDP (8)
// and the outer IP header, 20 or 40 (RFC 7348, section 5).
const (
	VXLANOverhead4 = 50
	VXLANOverhead6 = 70
)

// VXLANOverhead is what VXLAN adds to a packet between nodes that have addresses
// of a's family, in bytes.
func VXLANOverhead(a netip.Addr) int {
	if a.Is6() {
		return VXLANOverhead6
	}
	return VXLANOverhead4
}

// minMTU6 is what every link of IPv6 carries (RFC 8200).
const minMTU6 = 1280

// PathMTU is what the way to a node carries of a network's packets, in bytes, where
// that is less than what this node's devices of the network do; else 0. Nothing on
// the way tells of what is too long for the other's underlay: so whoever sends it has
// to be told here. What a node says of itself is bounded: it concerns what is
// sent to it only.
func (v *View) PathMTU(n Network, p Peer, v6 bool) int {
	if p.MTU <= 0 {
		return 0
	}
	over := VXLANOverhead(v.Underlay.Addr)
	own := n.MTU
	if own == 0 {
		self, _ := v.Peer(v.Self)
		under := v.Underlay.MTU
		if under == 0 {
			under = self.MTU
		}
		if under == 0 {
			return 0
		}
		own = under - over
	}
	mtu := max(p.MTU-over, MinMTU)
	if v6 {
		mtu = max(mtu, minMTU6)
	}
	if mtu >= own {
		return 0
	}
	return mtu
}

// Sort puts every list in its documented order. The maker of a View calls it
// once, before anyone else sees it.
func (v *View) Sort() {
	SortNetworks(v.Networks)
	SortServices(v.Services)
	v.SortHere()
}

// SortNetworks puts networks in the order of a View.
func SortNetworks(ns []Network) {
	slices.SortFunc(ns, func(a, b Network) int { return strings.Compare(a.ID, b.ID) })
}

// SortServices puts services in the order of a View.
func SortServices(ss []Service) {
	slices.SortFunc(ss, func(a, b Service) int { return strings.Compare(a.ID, b.ID) })
}

// SortHere is Sort of all but the networks and services.
func (v *View) SortHere() {
	slices.SortFunc(v.Peers, func(a, b Peer) int { return strings.Compare(a.ID, b.ID) })
	for _, list := range [][]Endpoint{v.Endpoints, v.Away} {
		slices.SortFunc(list, func(a, b Endpoint) int {
			// As their Keys, which are not made: a View may have 100,000.
			if c := strings.Compare(a.Task, b.Task); c != 0 {
				return c
			}
			return strings.Compare(a.Network, b.Network)
		})
	}
	slices.SortFunc(v.Sandboxes, func(a, b Sandbox) int { return strings.Compare(a.Task, b.Task) })
}

// OverlayNetns is the name of a network's overlay namespace on a node whose
// agent has the given instance name: "shoal-net-app-k3v9x2".
func OverlayNetns(instance string, n Network) string {
	return instance + "-net-" + n.Name + "-" + short(n.ID)
}

// TaskNetnsInfix follows the instance's name in the names of tasks' namespaces.
const TaskNetnsInfix = "-task-"

// TaskNetns is the name of a task's namespace: "shoal-task-web.1.k3v9x2m1p0qa".
func TaskNetns(instance string, t Task) string {
	if strings.Contains(t.Name, t.ID) {
		return instance + TaskNetnsInfix + t.Name
	}
	return instance + TaskNetnsInfix + t.Name + "-" + short(t.ID)
}

func short(id string) string { return id[:min(6, len(id))] }
