package overlay

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	"github.com/shoalnet/shoal/spec"
)

// RouteProtocol marks our routes (rtnetlink(7), rtm_protocol): 83, the letter S.
// Values above RTPROT_STATIC (4) are for user space; 83 is in none of iproute2's
// rt_protos files.
const RouteProtocol = 83

// Metrics. Endpoints have the metric of their attachment's place, 0 for eth0;
// a subnet's unreachable route yields to whatever else someone adds for it.
const MetricUnreachable = 1 << 24

// Names of devices and tables.
const (
	VXLANDev    = "vx"            // in the ovns
	OutDev      = "out"           // in the ovns: its end of the way out
	PortPrefix  = "shp"           // and the task's ID: the ovns's end of a task's veth
	HostPrefix  = "sho"           // and the network's ID: the host's end of the way out
	TempPrefix  = "sht"           // a device being made; left behind by a crash
	VIPLabel    = "lo:vip"        // label of package vip's IPv4 addresses there
	Label       = "lo:shoal"      // label of our IPv4 addresses on lo (ip-address(8))
	FilterTable = "shoal-overlay" // nftables table, family inet, in the ovns
	TaskTable   = "shoal"         // nftables table, family ip, in the task's namespace
)

// DNSAddr is where a task's resolv.conf points, as in Docker.
var DNSAddr = spec.DNSAddr

// LinkMAC is the address of the ovns's end of every task's veth. Each veth is a
// link of its own, so that one address serves all.
const LinkMAC = "02:53:68:ff:ff:fe"

// LinkGateway6 is spec.LinkGateway's like for IPv6.
var LinkGateway6 = netip.MustParseAddr("fe80::1")

// Object is one thing in the kernel. Every implementation is a comparable
// struct, so that == tells whether two are the same in every respect. "Netns"
// is the name of the namespace the object is in, "" the host's.
type Object interface {
	// Key identifies the object whatever its properties; it is comparable.
	Key() any
	// String describes it with its properties.
	String() string

	rank() int      // objects of a lower rank are needed by those of a higher
	place() string  // namespace
	device() string // device that it vanishes with; "" none
	label() string  // identifies it within its owner, for people
	order() string  // among those of the same rank and place
}

// Ranks, in the order of making.
const (
	rankNode = iota
	rankNamespace
	rankSysctl
	rankFilter
	rankDevice
	rankDeviceSysctl
	rankAddr
	rankNeigh
	rankLinkRoute // needs nothing but its device
	rankRoute
	rankStray
)

// Underlay is the presence of the underlay's local address on some link.
type Underlay struct{ Addr netip.Addr }

// Forwarding is what the ways out need of the host's namespace: IP forwarding,
// and the nftables table of the given name.
type Forwarding struct {
	Table string
	Fault string // observed only: what is wrong with it
}

// Namespace is a network's ovns.
type Namespace struct {
	Netns   string
	Network string // ID
}

// Sandbox is the presence of a task's namespace. It is made by the runtime;
// where it is absent, nothing of the task can be wired.
type Sandbox struct {
	Netns string
	Task  string // ID
	Fault string // observed only: what is wrong with its loopback device
}

// Sysctl is one setting.
type Sysctl struct {
	Netns, Dev string // Dev: the device it belongs to; "": none
	Name       string // with dots, such as net.ipv4.ip_forward
	Value      string
}

// Filter is the nftables table of an ovns: spoof protection, forwarding and
// masquerade.
type Filter struct {
	Netns   string
	Subnets string // Prefixes(…) of the network
	Out     bool   // has a way out
	// Alone: tasks can't reach each other; of the subnets only these addresses,
	// Prefixes(…) of the gateways, are for them. "": they can.
	Alone string
	Fault string // observed only
}

// Members is the nftables table of the host's namespace that lets VXLAN packets
// in only from nodes of the cluster, and none out of a task: the VXLAN device
// itself takes any packet with its VNI, whoever sent it (RFC 7348 section 7).
// It also keeps tasks from the nodes' agents, who trust each other.
type Members struct {
	Table string
	Port  int    // UDP
	Peers string // addresses of the nodes, see [Join]
	VNIs  string // of the networks here: packets of others' VXLANs are not ours to judge
	// Agents are the addresses and ports where nodes' agents listen, see [Join].
	Agents string
	Fault  string // observed only
}

// Guard lets packets with source Addr in from Dev; others are dropped.
type Guard struct {
	Netns, Dev string
	Addr       netip.Addr
}

// VXLAN is the vxlan device of an ovns.
type VXLAN struct {
	Netns   string
	Network string     // ID
	VNI     uint32     // RFC 7348
	Local   netip.Addr // source address of its packets
	Port    int        // UDP
	MAC     string
	MTU     int    // bytes; wanted: 0 for the underlay's less the overhead
	Fault   string // observed only: mendable in place
	Broken  bool   // observed only: must be made anew
}

// Egress is the veth pair between an ovns and the host's namespace.
type Egress struct {
	Netns   string
	Network string // ID
	Dev     string // the host's end
	MTU     int
	Fault   string
	Broken  bool
}

// Port is the veth pair between an ovns and a task's namespace.
type Port struct {
	Netns     string
	Dev       string // the ovns's end
	Network   string // ID
	Task      string // ID
	TaskNetns string // wanted; observed only of wanted ports
	Eth       string // the task's end
	MAC       string // of the task's end
	MTU       int
	Fault     string
	Broken    bool
}

// Addr is an address of a device.
type Addr struct {
	Netns, Dev string
	Prefix     netip.Prefix
}

// Neigh is a permanent neighbour.
type Neigh struct {
	Netns, Dev string
	Addr       netip.Addr
	MAC        string
}

// FDB is a forwarding entry of the vxlan device: packets for MAC go to Dst.
type FDB struct {
	Netns string
	MAC   string
	Dst   netip.Addr
}

// Route is a route with our protocol number in the main table.
type Route struct {
	Netns  string
	Dst    netip.Prefix
	Metric int
	Type   string     // "" unicast, "unreachable"
	Via    netip.Addr // next hop; zero: on the link
	Dev    string     // empty if unreachable
	Src    netip.Addr // preferred source; zero: the kernel's choice
	Onlink bool       // Via need not be reachable by another route
	MTU    int        // bytes, that packets on it may have; 0: the device's
}

// Redirect sends a task's questions to 127.0.0.11:53 to Port of 127.0.0.11.
type Redirect struct {
	Netns string
	Port  uint16
	Fault string // observed only
}

// Stray is a device of ours that is half-made, or that someone renamed (observed
// only).
type Stray struct{ Netns, Dev string }

// Oddity (observed only) is something in one of our namespaces that is none of the
// other objects and not as the kernel leaves it: a rule, a route, an address, an
// nftables table that nobody wants, or one of the kernel's own that is missing. To
// delete it is to put it right.
type Oddity struct{ Netns, Kind, What string }

// Remark (observed only) is something in the way that is not ours to change.
type Remark struct{ Netns, What string }

type (
	oddityKey     struct{ o Oddity }
	remarkKey     struct{ o Remark }
	underlayKey   struct{}
	forwardingKey struct{}
	membersKey    struct{}
	namespaceKey  struct{ netns string }
	sandboxKey    struct{ netns string }
	sysctlKey     struct{ netns, name string }
	filterKey     struct{ netns string }
	guardKey      struct {
		netns, dev string
		addr       netip.Addr
	}
	deviceKey struct{ netns, dev string }
	addrKey   struct {
		netns, dev string
		prefix     netip.Prefix
	}
	neighKey struct {
		netns, dev string
		addr       netip.Addr
	}
	fdbKey   struct{ netns, mac string }
	routeKey struct {
		netns  string
		dst    netip.Prefix
		metric int
	}
	redirectKey struct{ netns string }
	strayKey    struct{ netns, dev string }
)

// Key implements Object.
func (Underlay) Key() any { return underlayKey{} }

// Key implements Object.
func (Forwarding) Key() any { return forwardingKey{} }

// Key implements Object.
func (Members) Key() any { return membersKey{} }

// Key implements Object.
func (o Namespace) Key() any { return namespaceKey{o.Netns} }

// Key implements Object.
func (o Sandbox) Key() any { return sandboxKey{o.Netns} }

// Key implements Object.
func (o Sysctl) Key() any { return sysctlKey{o.Netns, o.Name} }

// Key implements Object.
func (o Filter) Key() any { return filterKey{o.Netns} }

// Key implements Object.
func (o Guard) Key() any { return guardKey{o.Netns, o.Dev, o.Addr} }

// Key implements Object.
func (o VXLAN) Key() any { return deviceKey{o.Netns, VXLANDev} }

// Key implements Object: the way out is known by its end in the host's
// namespace, where it must go even if the ovns went first.
func (o Egress) Key() any { return deviceKey{"", o.Dev} }

// Key implements Object.
func (o Port) Key() any { return deviceKey{o.Netns, o.Dev} }

// Key implements Object.
func (o Addr) Key() any { return addrKey{o.Netns, o.Dev, o.Prefix} }

// Key implements Object.
func (o Neigh) Key() any { return neighKey{o.Netns, o.Dev, o.Addr} }

// Key implements Object.
func (o FDB) Key() any { return fdbKey{o.Netns, o.MAC} }

// Key implements Object.
func (o Route) Key() any { return routeKey{o.Netns, o.Dst, o.Metric} }

// Key implements Object.
func (o Redirect) Key() any { return redirectKey{o.Netns} }

// Key implements Object.
func (o Stray) Key() any { return strayKey{o.Netns, o.Dev} }

// Key implements Object.
func (o Oddity) Key() any { return oddityKey{o} }

// Key implements Object.
func (o Remark) Key() any { return remarkKey{o} }

func (Oddity) rank() int        { return rankStray }
func (o Oddity) place() string  { return o.Netns }
func (Oddity) device() string   { return "" }
func (o Oddity) label() string  { return "stray " + o.Kind + " " + o.What }
func (o Oddity) order() string  { return o.Kind + " " + o.What }
func (o Oddity) String() string { return o.Kind + " " + o.What }

func (Remark) rank() int        { return rankStray }
func (o Remark) place() string  { return o.Netns }
func (Remark) device() string   { return "" }
func (o Remark) label() string  { return "remark " + o.What }
func (o Remark) order() string  { return o.What }
func (o Remark) String() string { return o.What }

func (Underlay) rank() int   { return rankNode }
func (Forwarding) rank() int { return rankNode }
func (Members) rank() int    { return rankNode }
func (Namespace) rank() int  { return rankNamespace }
func (Sandbox) rank() int    { return rankNamespace }
func (o Sysctl) rank() int {
	if o.Dev != "" {
		return rankDeviceSysctl
	}
	return rankSysctl
}
func (Filter) rank() int { return rankFilter }
func (Guard) rank() int  { return rankDeviceSysctl }
func (VXLAN) rank() int  { return rankDevice }
func (Egress) rank() int { return rankDevice }
func (Port) rank() int   { return rankDevice }
func (Addr) rank() int   { return rankAddr }
func (Neigh) rank() int  { return rankNeigh }
func (FDB) rank() int    { return rankNeigh }
func (o Route) rank() int {
	if o.Via.IsValid() {
		return rankRoute
	}
	return rankLinkRoute
}
func (Redirect) rank() int { return rankFilter }
func (Stray) rank() int    { return rankStray }

func (Underlay) place() string    { return "" }
func (Forwarding) place() string  { return "" }
func (Members) place() string     { return "" }
func (o Namespace) place() string { return o.Netns }
func (o Sandbox) place() string   { return o.Netns }
func (o Sysctl) place() string    { return o.Netns }
func (o Filter) place() string    { return o.Netns }
func (o Guard) place() string     { return o.Netns }
func (o VXLAN) place() string     { return o.Netns }
func (o Egress) place() string    { return o.Netns }
func (o Port) place() string      { return o.Netns }
func (o Addr) place() string      { return o.Netns }
func (o Neigh) place() string     { return o.Netns }
func (o FDB) place() string       { return o.Netns }
func (o Route) place() string     { return o.Netns }
func (o Redirect) place() string  { return o.Netns }
func (o Stray) place() string     { return o.Netns }

func (Underlay) device() string   { return "" }
func (Forwarding) device() string { return "" }
func (Members) device() string    { return "" }
func (Namespace) device() string  { return "" }
func (Sandbox) device() string    { return "" }
func (o Sysctl) device() string   { return o.Dev }
func (Filter) device() string     { return "" }
func (Guard) device() string      { return "" }
func (VXLAN) device() string      { return "" }
func (Egress) device() string     { return "" }
func (Port) device() string       { return "" }
func (o Addr) device() string     { return o.Dev }
func (o Neigh) device() string    { return o.Dev }
func (FDB) device() string        { return VXLANDev }
func (o Route) device() string    { return o.Dev }
func (Redirect) device() string   { return "" }
func (Stray) device() string      { return "" }

// The labels sort causes before what fails because of them ("device" before
// "fdb" and "route"): the first failed object is the one that a user is told of.

func (o Underlay) label() string   { return "underlay address " + o.Addr.String() }
func (o Forwarding) label() string { return "forwarding" }
func (o Members) label() string    { return "members" }
func (o Namespace) label() string  { return "a namespace" }
func (o Sandbox) label() string    { return "a namespace" }
func (o Sysctl) label() string     { return "sysctl " + o.Name }
func (o Filter) label() string     { return "filter" }
func (o Guard) label() string      { return "guard " + o.Addr.String() + " on " + o.Dev }
func (o VXLAN) label() string      { return "device " + VXLANDev }
func (o Egress) label() string     { return "device " + OutDev }
func (o Port) label() string       { return "device " + cmp.Or(o.Eth, o.Dev) }
func (o Addr) label() string       { return "ip " + o.Prefix.String() + " on " + o.Dev }
func (o Neigh) label() string      { return "neighbour " + o.Addr.String() + " on " + o.Dev }
func (o FDB) label() string        { return "fdb " + o.MAC }
func (o Route) label() string {
	s := "route " + dst(o.Dst)
	if o.Metric != 0 {
		s += fmt.Sprintf(" metric %d", o.Metric)
	}
	return s
}
func (o Redirect) label() string { return "name server redirect" }
func (o Stray) label() string    { return "stray device " + o.Dev }

func (o Underlay) order() string   { return "" }
func (o Forwarding) order() string { return "" }
func (o Members) order() string    { return "members" }
func (o Namespace) order() string  { return "" }
func (o Sandbox) order() string    { return "" }
func (o Sysctl) order() string     { return o.Name }
func (o Filter) order() string     { return "" }
func (o Guard) order() string      { return o.Dev + " " + o.Addr.String() }
func (o VXLAN) order() string      { return "" }
func (o Egress) order() string     { return "out" }
func (o Port) order() string       { return o.Dev }
func (o Addr) order() string       { return o.Dev + " " + o.Prefix.String() }
func (o Neigh) order() string      { return o.Dev + " " + o.Addr.String() }
func (o FDB) order() string        { return o.MAC }
func (o Route) order() string      { return fmt.Sprintf("%s %d", o.Dst, o.Metric) }
func (o Redirect) order() string   { return "redirect" }
func (o Stray) order() string      { return o.Dev }

func (o Underlay) String() string { return "underlay address " + o.Addr.String() }
func (o Forwarding) String() string {
	return "forwarding with table " + o.Table + fault(o.Fault)
}
func (o Members) String() string {
	return fmt.Sprintf("table %s of VXLAN members on UDP port %d: %s; VNIs %s; agents at %s%s", o.Table, o.Port, o.Peers, o.VNIs, o.Agents, fault(o.Fault))
}
func (o Namespace) String() string {
	return fmt.Sprintf("namespace %s of network %s", o.Netns, o.Network)
}
func (o Sandbox) String() string {
	return fmt.Sprintf("namespace %s of task %s%s", o.Netns, o.Task, fault(o.Fault))
}
func (o Sysctl) String() string { return "sysctl " + o.Name + "=" + o.Value }
func (o Filter) String() string {
	s := fmt.Sprintf("filter for %s", o.Subnets)
	if o.Out {
		s += " with a way out"
	}
	return s + fault(o.Fault)
}
func (o Guard) String() string { return fmt.Sprintf("guard %s on %s", o.Addr, o.Dev) }
func (o VXLAN) String() string {
	return fmt.Sprintf("device %s vxlan id %d local %s dstport %d mac %s mtu %s of network %s%s%s", VXLANDev, o.VNI, o.Local, o.Port, o.MAC, mtu(o.MTU), o.Network, fault(o.Fault), broken(o.Broken))
}
func (o Egress) String() string {
	return fmt.Sprintf("device %s veth %s on the host mtu %s of network %s%s%s", OutDev, o.Dev, mtu(o.MTU), o.Network, fault(o.Fault), broken(o.Broken))
}
func (o Port) String() string {
	return fmt.Sprintf("device %s veth %s in %s mac %s mtu %s of task %s on network %s%s%s", o.Dev, o.Eth, o.TaskNetns, o.MAC, mtu(o.MTU), o.Task, o.Network, fault(o.Fault), broken(o.Broken))
}
func (o Addr) String() string  { return fmt.Sprintf("address %s on %s", o.Prefix, o.Dev) }
func (o Neigh) String() string { return fmt.Sprintf("neighbour %s on %s is %s", o.Addr, o.Dev, o.MAC) }
func (o FDB) String() string   { return fmt.Sprintf("fdb %s to %s", o.MAC, o.Dst) }
func (o Route) String() string {
	var b strings.Builder
	b.WriteString("route ")
	if o.Type != "" {
		b.WriteString(o.Type + " ")
	}
	b.WriteString(dst(o.Dst))
	if o.Via.IsValid() {
		b.WriteString(" via " + o.Via.String())
	}
	if o.Dev != "" {
		b.WriteString(" dev " + o.Dev)
	}
	if o.Onlink {
		b.WriteString(" onlink")
	}
	if o.Src.IsValid() {
		b.WriteString(" src " + o.Src.String())
	}
	if o.Metric != 0 {
		fmt.Fprintf(&b, " metric %d", o.Metric)
	}
	if o.MTU != 0 {
		fmt.Fprintf(&b, " mtu lock %d", o.MTU)
	}
	return b.String()
}
func (o Redirect) String() string {
	return fmt.Sprintf("redirect of %s:53 to port %d%s", DNSAddr, o.Port, fault(o.Fault))
}
func (o Stray) String() string { return "stray device " + o.Dev }

func dst(p netip.Prefix) string {
	switch {
	case p.Bits() == 0 && p.Addr().Is4():
		return "default"
	case p.Bits() == 0:
		return "default6"
	}
	return p.String()
}

func mtu(n int) string {
	if n == 0 {
		return "auto"
	}
	return fmt.Sprint(n)
}

func fault(s string) string {
	if s == "" {
		return ""
	}
	return " (" + s + ")"
}

func broken(b bool) string {
	if b {
		return " (broken)"
	}
	return ""
}

// Join is a list as a field of an object, which must be comparable: sorted, each
// once, separated by spaces.
func Join[T cmp.Ordered](in []T) string {
	out := slices.Compact(slices.Sorted(slices.Values(in)))
	return strings.Trim(fmt.Sprint(out), "[]")
}

// Prefixes joins prefixes, in order, to what Filter.Subnets holds.
func Prefixes(ps []netip.Prefix) string {
	ps = slices.Clone(ps)
	slices.SortFunc(ps, func(a, b netip.Prefix) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
	})
	var ss []string
	for _, p := range ps {
		ss = append(ss, p.String())
	}
	return strings.Join(ss, " ")
}

// ParsePrefixes is the inverse of Prefixes. What is no prefix is left out.
func ParsePrefixes(s string) []netip.Prefix {
	var out []netip.Prefix
	for f := range strings.FieldsSeq(s) {
		if p, err := netip.ParsePrefix(f); err == nil {
			out = append(out, p)
		}
	}
	return out
}

// Devices lists the (namespace, device) pairs that a device object consists of.
func Devices(o Object) [][2]string {
	switch o := o.(type) {
	case VXLAN:
		return [][2]string{{o.Netns, VXLANDev}}
	case Egress:
		return [][2]string{{o.Netns, OutDev}, {"", o.Dev}}
	case Port:
		return [][2]string{{o.Netns, o.Dev}, {o.TaskNetns, o.Eth}}
	}
	return nil
}

// Place returns the namespace that o is in, and the device that it vanishes
// with ("" none).
func Place(o Object) (netns, dev string) { return o.place(), o.device() }

// State is a set of objects: wanted ([Desired]) or observed
// ([Dataplane.Observe]). It is a value to read, never to change.
type State struct {
	// Complete (wanted only): what is not in this State does not exist and
	// may be removed from the kernel. See spec.View.Complete.
	Complete bool
	// UnderlayMTU is the MTU of the link that has the underlay address, in
	// bytes. Wanted: 0 means as observed. Observed: 0 means no link has it.
	UnderlayMTU int
	// Overhead is what VXLAN adds to a packet, in bytes (wanted only).
	Overhead int
	// Owners (wanted only) names whose a namespace is: "network app",
	// "task web.1". PortOwners does for ports, by their device in the ovns.
	Owners     map[string]string
	PortOwners map[string]string

	objects map[any]Object
}

// Add puts an object in, in place of one with the same key.
func (s *State) Add(o Object) {
	if s.objects == nil {
		s.objects = map[any]Object{}
	}
	s.objects[o.Key()] = o
}

// Remove takes an object out.
func (s *State) Remove(key any) { delete(s.objects, key) }

// Get returns the object with a key, or nil.
func (s State) Get(key any) Object { return s.objects[key] }

// Is tells whether two are one set of objects, not only alike.
func (s State) Is(o State) bool {
	return s.plain() == o.plain() && reflect.ValueOf(s.objects).UnsafePointer() == reflect.ValueOf(o.objects).UnsafePointer()
}

func (s State) plain() [3]any { return [3]any{s.Complete, s.UnderlayMTU, s.Overhead} }

// Alike tells whether two say the same of the kernel.
func (s State) Alike(o State) bool {
	return s.plain() == o.plain() && maps.Equal(s.objects, o.objects)
}

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

// Each calls fn for each object, in no particular order.
func (s State) Each(fn func(Object)) {
	for _, o := range s.objects {
		fn(o)
	}
}

// Clone returns a copy whose set of objects can be changed.
func (s State) Clone() State {
	m := make(map[any]Object, len(s.objects))
	for k, o := range s.objects {
		m[k] = o
	}
	s.objects = m
	return s
}

// sortObjects sorts in the order of making. The texts that decide within a rank
// are made once: there may be thousands of routes.
func sortObjects(os []Object) {
	type item struct {
		o           Object
		rank        int
		place, text string
	}
	items := make([]item, len(os))
	for i, o := range os {
		items[i] = item{o, o.rank(), o.place(), o.order()}
	}
	slices.SortFunc(items, func(a, b item) int {
		return cmp.Or(cmp.Compare(a.rank, b.rank), strings.Compare(a.place, b.place), strings.Compare(a.text, b.text))
	})
	for i := range items {
		os[i] = items[i].o
	}
}

// String lists the objects by namespace, one a line, for people and tests.
func (s State) String() string {
	by := map[string][]Object{}
	for _, o := range s.Objects() {
		by[o.place()] = append(by[o.place()], o)
	}
	places := make([]string, 0, len(by))
	for p := range by {
		places = append(places, p)
	}
	slices.Sort(places)
	var b strings.Builder
	for _, p := range places {
		if p == "" {
			b.WriteString("host\n")
		} else {
			b.WriteString(strings.TrimSpace(p+"  "+s.Owners[p]) + "\n")
		}
		for _, o := range by[p] {
			b.WriteString("  " + o.String() + "\n")
		}
	}
	return b.String()
}
