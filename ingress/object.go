package ingress

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/shoalnet/shoal/spec"
)

// Names, numbers and priorities.
const (
	NetnsTable = "shoal-ingress" // nftables table, family ip, in the ovns

	// RouteProtocol marks our routes and rules (rtnetlink(7), rtm_protocol):
	// one above the overlay's, which leaves what is not its own alone.
	RouteProtocol = 84
	// TableBase and a node's number is the routing table of replies to it.
	TableBase = 0x53680000
	// RulePriority is of the rules that lead there: after the local table's
	// (0), before the main table's (32766, ip-rule(8)).
	RulePriority = 1000
	// MetricUnreachable is of the route that a VIP falls back to.
	MetricUnreachable = 1 << 24
)

// Object is one thing in the kernel, or a few that are meaningless without each
// other. Every implementation is a comparable struct. Netns is the name of the
// ovns it is in; those without are in the host's namespace. Fault is observed
// only: it says what is wrong though the object is there.
type Object interface {
	// Key identifies the object whatever its properties; it is comparable.
	Key() any
	// String describes it with its properties.
	String() string

	rank() int     // objects of a lower rank are needed by those of a higher
	place() string // namespace
	label() string // identifies it within its owner, for people
}

const (
	rankTable = iota
	rankSetting
	rankPart
	rankPort
)

// HostTable is the nftables table of the host's namespace, without elements,
// and the timeout of its idle connections.
type HostTable struct {
	Name string
	// Node is what servers see of clients that have no address of their own to
	// show: programs that call 127.0.0.1, tasks of this node, and ports
	// published with NAT. Zero: the host's end of the way out.
	Node  netip.Addr
	Fault string
}

// Localnet lets packets from 127.0.0.1 leave by a way out
// (net.ipv4.conf.DEV.route_localnet), where they get another source.
type Localnet struct{ Dev string }

// Route leads a VIP to its network's ovns, and to nowhere while that is gone.
type Route struct {
	Addr netip.Addr
	Via  netip.Addr
	Dev  string
}

// Private keeps the host's programs from a VIP, but for published ports.
type Private struct{ Addr netip.Addr }

// Port is a published port: an element of the host's table.
type Port struct {
	Addr      netip.Addr // of the host; zero: all
	Published uint16
	Protocol  string
	To        netip.AddrPort
	NAT       bool
}

// Holder (observed only) is a program of the host that has a port, so that it
// can't be published here.
type Holder struct {
	Addr      netip.Addr // as in Port
	Published uint16
	Protocol  string
	By        string // "nginx (pid 123)"
}

// Table is the nftables table of an ovns, without elements.
type Table struct {
	Netns   string
	Subnets string     // IPv4, separated by spaces
	Out     netip.Addr // the ovns's address on its way out
	Fault   string
}

// Node is another node as a place to send replies to: mark, zone, rule, route.
type Node struct {
	Netns  string
	Number int
	MTU    int // bytes, that packets to it may have; 0: the device's
	Fault  string
}

// Entry lets the host's translated packets to To into the network.
type Entry struct {
	Netns    string
	Protocol string
	To       netip.AddrPort
}

// Local balances what the host sends to port Slot of the ovns over tasks of this
// node. Backends and Draining are sorted addresses, separated by spaces; without
// backends new connections are refused.
type Local struct {
	Netns              string
	Protocol           string
	Slot, Target       uint16
	Backends, Draining string
	Fault              string
}

type (
	hostTableKey struct{}
	localnetKey  struct{ dev string }
	routeKey     struct{ addr netip.Addr }
	privateKey   struct{ addr netip.Addr }
	portKey      struct {
		addr      netip.Addr
		published uint16
		protocol  string
	}
	holderKey struct{ portKey }
	tableKey  struct{ netns string }
	nodeKey   struct {
		netns  string
		number int
	}
	entryKey struct {
		netns, protocol string
		to              netip.AddrPort
	}
	localKey struct {
		netns, protocol string
		slot            uint16
	}
)

// Key implements Object.
func (HostTable) Key() any { return hostTableKey{} }

// Key implements Object.
func (o Localnet) Key() any { return localnetKey{o.Dev} }

// Key implements Object.
func (o Route) Key() any { return routeKey{o.Addr} }

// Key implements Object.
func (o Private) Key() any { return privateKey{o.Addr} }

// Key implements Object.
func (o Port) Key() any { return portKey{o.Addr, o.Published, o.Protocol} }

// Key implements Object.
func (o Holder) Key() any { return holderKey{portKey{o.Addr, o.Published, o.Protocol}} }

// Key implements Object.
func (o Table) Key() any { return tableKey{o.Netns} }

// Key implements Object.
func (o Node) Key() any { return nodeKey{o.Netns, o.Number} }

// Key implements Object.
func (o Entry) Key() any { return entryKey{o.Netns, o.Protocol, o.To} }

// Key implements Object.
func (o Local) Key() any { return localKey{o.Netns, o.Protocol, o.Slot} }

func (HostTable) rank() int { return rankTable }
func (Localnet) rank() int  { return rankSetting }
func (Route) rank() int     { return rankPart }
func (Private) rank() int   { return rankPart }
func (Port) rank() int      { return rankPort }
func (Holder) rank() int    { return rankPort }
func (Table) rank() int     { return rankTable }
func (Node) rank() int      { return rankPart }
func (Entry) rank() int     { return rankPart }
func (Local) rank() int     { return rankPart }

func (HostTable) place() string { return "" }
func (Localnet) place() string  { return "" }
func (Route) place() string     { return "" }
func (Private) place() string   { return "" }
func (Port) place() string      { return "" }
func (Holder) place() string    { return "" }
func (o Table) place() string   { return o.Netns }
func (o Node) place() string    { return o.Netns }
func (o Entry) place() string   { return o.Netns }
func (o Local) place() string   { return o.Netns }

func (HostTable) label() string  { return "ingress table" }
func (o Localnet) label() string { return "route_localnet of " + o.Dev }
func (o Route) label() string    { return "host route " + o.Addr.String() }
func (o Private) label() string  { return "private " + o.Addr.String() }
func (o Port) label() string     { return "port " + portName(o.Addr, o.Published, o.Protocol) }
func (o Holder) label() string {
	return "port " + portName(o.Addr, o.Published, o.Protocol) + " is free"
}
func (Table) label() string   { return "ingress table" }
func (o Node) label() string  { return fmt.Sprintf("replies to node %d", o.Number) }
func (o Entry) label() string { return "entry " + o.To.String() + "/" + o.Protocol }
func (o Local) label() string { return fmt.Sprintf("local balancer %d/%s", o.Slot, o.Protocol) }

func portName(a netip.Addr, published uint16, protocol string) string {
	if a.IsValid() {
		return fmt.Sprintf("%s/%s", netip.AddrPortFrom(a, published), protocol)
	}
	return fmt.Sprintf("%d/%s", published, protocol)
}

func (o HostTable) String() string {
	s := "table " + o.Name
	if o.Node.IsValid() {
		s += ", this node is " + o.Node.String()
	}
	return s + fault(o.Fault)
}
func (o Localnet) String() string { return "route_localnet of " + o.Dev }
func (o Route) String() string {
	return fmt.Sprintf("host route %s via %s dev %s", o.Addr, o.Via, o.Dev)
}
func (o Private) String() string { return "private " + o.Addr.String() }
func (o Port) String() string {
	s := fmt.Sprintf("port %s to %s", portName(o.Addr, o.Published, o.Protocol), o.To)
	if o.NAT {
		s += " with NAT"
	}
	return s
}
func (o Holder) String() string {
	return fmt.Sprintf("port %s is held by %s", portName(o.Addr, o.Published, o.Protocol), o.By)
}
func (o Table) String() string {
	return fmt.Sprintf("table %s for %s, own address %s%s", NetnsTable, o.Subnets, o.Out, fault(o.Fault))
}
func (o Node) String() string {
	s := fmt.Sprintf("replies to node %d via %s", o.Number, spec.RouterAddr(o.Number))
	if o.MTU != 0 {
		s += fmt.Sprintf(" mtu %d", o.MTU)
	}
	return s + fault(o.Fault)
}
func (o Entry) String() string { return o.label() }
func (o Local) String() string {
	s := fmt.Sprintf("%s to %s port %d", o.label(), cmp.Or(o.Backends, "nothing"), o.Target)
	if o.Draining != "" {
		s += ", draining " + o.Draining
	}
	return s + fault(o.Fault)
}

func fault(s string) string {
	if s == "" {
		return ""
	}
	return " (" + s + ")"
}

// Addrs is the inverse of the lists in Local. What is no address is left out.
func Addrs(s string) []netip.Addr {
	var out []netip.Addr
	for f := range strings.FieldsSeq(s) {
		if a, err := netip.ParseAddr(f); err == nil {
			out = append(out, a)
		}
	}
	return out
}

// Prefixes is Table.Subnets as a list.
func (o Table) Prefixes() []netip.Prefix {
	var out []netip.Prefix
	for f := range strings.FieldsSeq(o.Subnets) {
		if p, err := netip.ParsePrefix(f); err == nil {
			out = append(out, p)
		}
	}
	return out
}

// NetnsOf returns the ovns that o is in; "" is the host's namespace.
func NetnsOf(o Object) string { return o.place() }

// Way is a network's way out on this node, as package overlay makes it.
type Way struct {
	Network string // name
	Netns   string
	Dev     string // the host's end
}

// State is a set of objects: wanted ([Desired]) or observed
// ([Dataplane.Observe]). It is a value to read, never to change.
type State struct {
	// Complete (wanted only): what is not in this State does not exist and
	// may be removed from the kernel. See spec.View.Complete.
	Complete bool
	// Ways (wanted only) are the places to look for what is not wanted any
	// more: one for each network with a way out, by Netns.
	Ways []Way

	owners  map[any]string // wanted only, of ports: "service web"
	objects map[any]Object
}

// Add puts an object in, in place of one with the same key.
func (s *State) Add(o Object) {
	if s.objects == nil {
		s.objects = map[any]Object{}
	}
	s.objects[o.Key()] = o
}

// Equal tells whether two States have the same objects.
func (s State) Equal(o State) bool { return maps.Equal(s.objects, o.objects) }

// Remove takes an object out.
func (s *State) Remove(key any) { delete(s.objects, key) }

// Get returns the object with a key, or nil.
func (s State) Get(key any) Object { return s.objects[key] }

// Len is the number of objects.
func (s State) Len() int { return len(s.objects) }

// Objects lists the objects in the order of making.
func (s State) Objects() []Object {
	out := make([]Object, 0, len(s.objects))
	for _, o := range s.objects {
		out = append(out, o)
	}
	sortObjects(out)
	return out
}

// sortObjects sorts in the order of making. The texts that decide within a rank
// are made once: there may be thousands of ports.
func sortObjects(os []Object) {
	type item struct {
		o           Object
		rank        int
		place, text string
	}
	items := make([]item, len(os))
	for i, o := range os {
		items[i] = item{o, o.rank(), o.place(), o.String()}
	}
	slices.SortFunc(items, func(a, b item) int {
		return cmp.Or(cmp.Compare(a.rank, b.rank), strings.Compare(a.place, b.place), strings.Compare(a.text, b.text))
	})
	for i := range items {
		os[i] = items[i].o
	}
}

// Each calls fn for each object, in no particular order.
func (s State) Each(fn func(Object)) {
	for _, o := range s.objects {
		fn(o)
	}
}

// owner names whose object o is.
func (s State) owner(o Object) string {
	switch x := o.(type) {
	case Port:
		if n, ok := s.owners[x.Key()]; ok {
			return n
		}
	case Holder:
		if n, ok := s.owners[x.Key().(holderKey).portKey]; ok {
			return n
		}
	}
	for _, w := range s.Ways {
		switch x := o.(type) {
		case Localnet:
			if x.Dev == w.Dev {
				return "network " + w.Network
			}
		case Route:
			if x.Dev == w.Dev {
				return "network " + w.Network
			}
		}
		if o.place() == w.Netns {
			return "network " + w.Network
		}
	}
	return "node"
}

// String lists the objects by namespace, one a line, for people and tests.
func (s State) String() string {
	by := map[string][]string{}
	for _, o := range s.Objects() {
		by[o.place()] = append(by[o.place()], "  "+o.String()+"\n")
	}
	places := make([]string, 0, len(by))
	for p := range by {
		places = append(places, p)
	}
	slices.Sort(places)
	var b strings.Builder
	for _, p := range places {
		b.WriteString(cmp.Or(p, "host") + "\n" + strings.Join(by[p], ""))
	}
	return b.String()
}
