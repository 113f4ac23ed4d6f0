package spec

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
)

// Network drivers.
const (
	DriverOverlay = "overlay"
	DriverBridge  = "bridge" // on one node only: see Network.Node
	DriverHost    = "host"   // the built-in network host: the node's own namespace
	DriverNull    = "null"   // the built-in network none: loopback only
)

// DefaultNetwork is the name of the overlay network made at init, which a task
// or service without --network joins.
const DefaultNetwork = "default"

// Names, and IDs, of the built-in networks without addresses, as in Docker. A
// task on one of them is on no other.
const (
	HostNetwork = "host"
	NoneNetwork = "none"
)

// Keys of Network.Options. The second of each pair is Docker's for a bridge.
const (
	OptMTU       = "mtu" // bytes; taken into Network.MTU at creation
	OptMTUDocker = "com.docker.network.driver.mtu"
	OptICC       = "icc" // "false": tasks of the network can't reach each other
	OptICCDocker = "com.docker.network.bridge.enable_icc"
)

// VNI range. A network's VNI also numbers its way out of a node (see
// [Network.Egress]), which bounds the count of networks of a cluster.
const (
	MinVNI = 4096
	MaxVNI = MinVNI + egressPairs - 1
)

// MTU bounds: RFC 791 requires every host to take 576 octets; 65535 is the
// largest IPv4 packet.
const (
	MinMTU = 576
	MaxMTU = 65535
)

// Network is one isolated overlay: intent and allocation, kept in raft.
type Network struct {
	ID       string            `json:"id"`
	Name     string            `json:"name"`
	Driver   string            `json:"driver"`
	Labels   map[string]string `json:"labels,omitempty"`
	Subnets  []netip.Prefix    `json:"subnets"`             // one per family or more, masked
	Gateways []netip.Addr      `json:"gateways"`            // Gateways[i] lies in Subnets[i]
	IPRanges []netip.Prefix    `json:"ip_ranges,omitempty"` // where given, addresses are allocated only from these
	VNI      uint32            `json:"vni"`                 // 24 bits, RFC 7348
	MTU      int               `json:"mtu,omitempty"`       // bytes; 0: underlay − overhead
	Internal bool              `json:"internal,omitempty"`  // no way out
	Options  map[string]string `json:"options,omitempty"`
	Node     string            `json:"node,omitempty"` // DriverBridge: ID of the only node it is on
	Version  uint64            `json:"version"`        // raft index of the last change
	Created  int64             `json:"created"`        // Unix milliseconds, set by the proposer
}

// Clone returns a deep copy.
func (n Network) Clone() Network {
	n.Labels, n.Options = maps.Clone(n.Labels), maps.Clone(n.Options)
	n.Subnets, n.Gateways, n.IPRanges = slices.Clone(n.Subnets), slices.Clone(n.Gateways), slices.Clone(n.IPRanges)
	return n
}

// Validate reports the first thing wrong with a complete network.
func (n Network) Validate() error {
	if err := ValidateName("network", n.Name); err != nil {
		return err
	}
	switch n.Driver {
	case DriverOverlay:
	case DriverBridge:
		if n.Node == "" {
			return fmt.Errorf("network %s: driver %s needs the node that it is on", n.Name, n.Driver)
		}
	case DriverHost, DriverNull:
		if len(n.Subnets) > 0 {
			return fmt.Errorf("network %s: driver %s has no subnets", n.Name, n.Driver)
		}
		return nil
	default:
		return fmt.Errorf("network %s: driver %q is unknown: use %s or %s", n.Name, n.Driver, DriverOverlay, DriverBridge)
	}
	if err := ValidateOptions(n.Options); err != nil {
		return fmt.Errorf("network %s: %w", n.Name, err)
	}
	if len(n.Subnets) == 0 || len(n.Subnets) != len(n.Gateways) {
		return fmt.Errorf("network %s: %d subnets and %d gateways: want one gateway for each of one or more subnets", n.Name, len(n.Subnets), len(n.Gateways))
	}
	for i, s := range n.Subnets {
		if err := ValidateSubnet(s); err != nil {
			return fmt.Errorf("network %s: %w", n.Name, err)
		}
		if !s.Contains(n.Gateways[i]) {
			return fmt.Errorf("network %s: gateway %s is not in subnet %s", n.Name, n.Gateways[i], s)
		}
		for _, t := range n.Subnets[:i] {
			if s.Overlaps(t) {
				return fmt.Errorf("network %s: subnets %s and %s overlap", n.Name, t, s)
			}
		}
	}
	if n.VNI < MinVNI || n.VNI > MaxVNI {
		return fmt.Errorf("network %s: VNI %d is out of range: use %d to %d", n.Name, n.VNI, MinVNI, MaxVNI)
	}
	return ValidateMTU(n.MTU)
}

// ValidateSubnet reports why s can't be a network's subnet: it must be masked,
// hold at least four addresses, at most 2^24, and be ordinary unicast space.
// 2^24 is the room for a service mark (see [Network.VIPMark]).
func ValidateSubnet(s netip.Prefix) error {
	if !s.IsValid() {
		return fmt.Errorf("subnet is not an address and a prefix length like 10.1.0.0/24")
	}
	if s != s.Masked() {
		return fmt.Errorf("subnet %s has host bits set: did you mean %s", s, s.Masked())
	}
	a := s.Addr()
	if host := a.BitLen() - s.Bits(); host < 2 || (a.Is4() && host > 24) {
		return fmt.Errorf("subnet %s: use a prefix length from /8 to /30", s)
	}
	if a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() || a.IsLinkLocalUnicast() || a.Is4In6() ||
		(a.Is4() && (a.As4()[0] >= 224 || a.As4()[0] == 0)) {
		return fmt.Errorf("subnet %s is reserved address space: use a private range, such as one in 10.0.0.0/8", s)
	}
	return nil
}

// ValidateMTU reports why mtu (bytes, 0 for automatic) can't be a network's MTU.
func ValidateMTU(mtu int) error {
	if mtu != 0 && (mtu < MinMTU || mtu > MaxMTU) {
		return fmt.Errorf("MTU %d is out of range: use %d to %d bytes, or 0 for the underlay's MTU less the VXLAN overhead", mtu, MinMTU, MaxMTU)
	}
	return nil
}

// ValidateOptions reports the first driver option that is unknown or has a
// value that it can't have.
func ValidateOptions(opts map[string]string) error {
	for _, k := range slices.Sorted(maps.Keys(opts)) {
		switch v := opts[k]; k {
		case OptMTU, OptMTUDocker:
			n, err := strconv.Atoi(v)
			if err != nil {
				return fmt.Errorf("option %s=%s: want a number of bytes", k, v)
			}
			if err := ValidateMTU(n); err != nil {
				return fmt.Errorf("option %s: %w", k, err)
			}
		case OptICC, OptICCDocker:
			if _, err := strconv.ParseBool(v); err != nil {
				return fmt.Errorf("option %s=%s: want true or false", k, v)
			}
		default:
			return fmt.Errorf("option %q is unknown: use %s or %s", k, OptMTU, OptICC)
		}
	}
	for _, pair := range [][2]string{{OptMTU, OptMTUDocker}, {OptICC, OptICCDocker}} {
		a, ok := opts[pair[0]]
		b, both := opts[pair[1]]
		x, _ := strconv.ParseBool(a)
		y, _ := strconv.ParseBool(b)
		if ok && both && (pair[0] == OptICC && x != y || pair[0] == OptMTU && a != b) {
			return fmt.Errorf("options %s=%s and %s=%s are the same, with different values: give one of them", pair[0], a, pair[1], b)
		}
	}
	return nil
}

// ICC tells whether tasks of the network may reach each other ("inter-container
// communication" in Docker).
func (n Network) ICC() bool {
	for _, k := range []string{OptICC, OptICCDocker} {
		if b, err := strconv.ParseBool(n.Options[k]); err == nil && !b {
			return false
		}
	}
	return true
}

// Wired tells whether tasks get an interface on the network: not on the
// built-in networks host and none.
func (n Network) Wired() bool { return n.Driver != DriverHost && n.Driver != DriverNull }

// Contains tells whether a lies in one of the network's subnets.
func (n Network) Contains(a netip.Addr) bool {
	return slices.ContainsFunc(n.Subnets, func(p netip.Prefix) bool { return p.Contains(a) })
}

// IsGateway tells whether a is one of the network's gateway addresses.
func (n Network) IsGateway(a netip.Addr) bool { return slices.Contains(n.Gateways, a) }

// VIPMarkBase and VIPMarkMask frame the firewall marks of virtual services in
// an overlay namespace; [NodeMarkBase] lies outside of them.
const (
	VIPMarkBase  uint32 = 0x10000000
	NodeMarkBase uint32 = 0x20000000
	MarkKindMask uint32 = 0xf0000000
)

// VIPMark is the firewall mark that stands for vip in this network's overlay
// namespaces: the subnet's index (4 bits) and the host part (24 bits).
// Being derived, it is the same on every node and needs no allocation. It
// returns false when vip is in none of the subnets.
func (n Network) VIPMark(vip netip.Addr) (uint32, bool) {
	for i, s := range n.Subnets {
		if !s.Contains(vip) || i > 15 {
			continue
		}
		b := vip.AsSlice()
		base := s.Addr().AsSlice()
		var host uint32
		for k := len(b) - 3; k < len(b); k++ {
			host = host<<8 | uint32(b[k]^base[k])
		}
		return VIPMarkBase | uint32(i)<<24 | host, true
	}
	return 0, false
}

// Egress addresses: one /31 (RFC 3021) per network for the veth between a
// network's overlay namespace and the host's namespace. They are link-local,
// never leave the node, and stay clear of 169.254.169.254, where clouds serve
// metadata.
const (
	egressPairs = 10240
)

// egressBase is the first egress pair; the pairs end at 169.254.255.255.
var egressBase = netip.MustParseAddr("169.254.176.0")

// EgressPrefix covers every egress pair, plus nothing of the addresses that
// nodes' routers use.
var EgressPrefixes = []netip.Prefix{netip.MustParsePrefix("169.254.176.0/20"), netip.MustParsePrefix("169.254.192.0/18")}

// Egress returns the addresses of the veth pair to the host's namespace: host
// end and overlay end of a /31.
func (n Network) Egress() (host, overlay netip.Addr) {
	off := (n.VNI - MinVNI) % egressPairs * 2
	return addToV4(egressBase, off), addToV4(egressBase, off+1)
}

func addToV4(a netip.Addr, n uint32) netip.Addr {
	b := a.As4()
	v := uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
	v += n
	return netip.AddrFrom4([4]byte{byte(v >> 24), byte(v >> 16), byte(v >> 8), byte(v)})
}

// LinkGateway is the next hop of every task: the overlay namespace's end of
// the task's veth. The same address serves every veth.
var LinkGateway = netip.MustParseAddr("169.254.1.1")
