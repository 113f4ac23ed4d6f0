package vxlan

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/overlay"
)

func membersTable(name string) table { return table{nftables.TableFamilyINet, name} }

// Sets of the members' table.
const (
	setPeers = "peers" // underlay addresses of nodes
	setVNIs  = "vnis"  // of our networks
	// setAgents are the addresses and ports where nodes' agents listen.
	setAgents = "agents"
)

var (
	agentType  = nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetService)
	agent6Type = nftables.MustConcatSetType(nftables.TypeIP6Addr, nftables.TypeInetService)
)

// agentKey is an element of setAgents. Each part of a concatenation begins at a
// multiple of four octets.
func agentKey(a netip.AddrPort) []byte {
	return append(binary.BigEndian.AppendUint16(a.Addr().AsSlice(), a.Port()), 0, 0)
}

func parseAgentKey(k []byte) (netip.AddrPort, bool) {
	if len(k) < 4 {
		return netip.AddrPort{}, false
	}
	a, ok := netip.AddrFromSlice(k[:len(k)-4])
	return netip.AddrPortFrom(a, binary.BigEndian.Uint16(k[len(k)-4:])), ok
}

// membersRules is the table of overlay.Members.
//
// What a task sends to the VXLAN port goes nowhere: translated, it would come
// from this node's own address, which is a member's. What else comes for one of
// our VNIs must be from a member; other VXLANs that share the port are left
// alone.
//
// Our VXLAN packets are not tracked by conntrack: their source port is a hash of
// the inner connection (RFC 7348 section 5), so that each of these would take an
// entry of the host's table, too, for as long as UDP's timeout is: at 5,000
// connections a second more than the default table holds.
//
// A task that reached an agent, its own node's or through that another's, could
// have the cluster do what it likes: agents do not authenticate callers yet. It
// is refused, not dropped: nobody is to wait for what can't be.
func membersRules(o overlay.Members) ruleset {
	way := overlay.HostPrefix + "*"
	v6 := false
	rs := ruleset{table: membersTable(o.Table)}
	peers := set{name: setPeers, key: nftables.TypeIPAddr}
	for _, p := range strings.Fields(o.Peers) {
		if a, err := netip.ParseAddr(p); err == nil {
			v6 = a.Is6()
			peers.elems = append(peers.elems, a.AsSlice())
		}
	}
	if v6 {
		peers.key = nftables.TypeIP6Addr
	}
	vnis := set{name: setVNIs, key: nftables.TypeInteger}
	for _, v := range strings.Fields(o.VNIs) {
		if n, err := strconv.ParseUint(v, 10, 24); err == nil {
			vnis.elems = append(vnis.elems, binary.BigEndian.AppendUint32(nil, uint32(n)<<8))
		}
	}
	agents := set{name: setAgents, key: agentType}
	if v6 {
		agents.key = agent6Type
	}
	for _, s := range strings.Fields(o.Agents) {
		if a, err := netip.ParseAddrPort(s); err == nil {
			agents.elems = append(agents.elems, agentKey(a))
		}
	}
	rs.sets = []set{peers, vnis, agents}
	port := udpTo(o.Port)
	tcp, udp := r(iif(way), toAgent(unix.IPPROTO_TCP, v6), because(whyAgent, reject)), r(iif(way), toAgent(unix.IPPROTO_UDP, v6), because(whyAgent, reject))
	rs.chains = []chain{
		{"input", nftables.ChainTypeFilter, nftables.ChainHookInput, prioFilter, nftables.ChainPolicyAccept, []rule{
			r(port, iif(way), because(whyTaskVXLAN, drop)),
			r(port, vniIn(setVNIs), notFrom(setPeers, v6), because(whyNoMember, drop)),
			tcp, udp,
		}},
		{"forward", nftables.ChainTypeFilter, nftables.ChainHookForward, prioFilter, nftables.ChainPolicyAccept, []rule{
			r(port, iif(way), because(whyTaskVXLAN, drop)),
			tcp, udp,
		}},
		{"untracked-in", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, prioRaw, nftables.ChainPolicyAccept, []rule{
			r(port, vniIn(setVNIs), notrack),
		}},
		{"untracked-out", nftables.ChainTypeFilter, nftables.ChainHookOutput, prioRaw, nftables.ChainPolicyAccept, []rule{
			r(port, vniIn(setVNIs), notrack),
		}},
	}
	return rs
}

// toAgent matches what goes to an agent of a node. The address is in register 8
// (NFT_REG32_00, linux/netfilter/nf_tables.h) and on, the port follows it.
func toAgent(proto byte, v6 bool) rule {
	port := uint32(8 + 1)
	if v6 {
		port = 8 + 4
	}
	x := nfproto(v6)
	return rule{text: fmt.Sprintf("%s l4proto %d daddr . dport @%s", x.text, proto, setAgents), exprs: append(x.exprs,
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{proto}},
		loadDst(v6, 8),
		&expr.Payload{DestRegister: port, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Lookup{SourceRegister: 8, SetName: setAgents},
	)}
}

// udpTo matches a UDP destination port.
func udpTo(port int) rule {
	return rule{text: fmt.Sprintf("udp dport %d", port), exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_UDP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{byte(port >> 8), byte(port)}},
	}}
}

// vniIn matches VXLAN packets by the fourth to the last word of their header:
// VNI and a reserved octet, which is masked (RFC 7348 section 5). 8 octets of
// UDP and 4 of VXLAN are before it.
func vniIn(setName string) rule {
	return rule{text: "vxlan vni @" + setName, exprs: []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 12, Len: 4},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: []byte{0xff, 0xff, 0xff, 0}, Xor: make([]byte, 4)},
		&expr.Lookup{SourceRegister: 1, SetName: setName},
	}}
}

// notFrom matches sources that are not in a set. The underlay has one family:
// what comes by the other is from no member.
func notFrom(setName string, v6 bool) rule {
	return rule{text: "saddr != @" + setName, exprs: []expr.Any{
		loadSrc(v6, 1),
		&expr.Lookup{SourceRegister: 1, SetName: setName, Invert: true},
	}}
}

// observeMembers reports the table; within the host's namespace.
func observeMembers(c *nftConn, o overlay.Members) (*overlay.Members, error) {
	fault, present, err := c.check(membersRules(o))
	if err != nil || !present {
		return nil, err
	}
	o.Fault = fault
	t := membersTable(o.Table)
	keys, _, err := c.elems(t, setPeers)
	if err != nil {
		return nil, err
	}
	var peers []string
	for _, k := range keys {
		if a, ok := netip.AddrFromSlice(k); ok {
			peers = append(peers, a.String())
		}
	}
	if keys, _, err = c.elems(t, setVNIs); err != nil {
		return nil, err
	}
	var vnis []uint32
	for _, k := range keys {
		if len(k) == 4 {
			vnis = append(vnis, binary.BigEndian.Uint32(k)>>8)
		}
	}
	if keys, _, err = c.elems(t, setAgents); err != nil {
		return nil, err
	}
	var agents []string
	for _, k := range keys {
		if a, ok := parseAgentKey(k); ok {
			agents = append(agents, a.String())
		}
	}
	o.Peers, o.VNIs, o.Agents = overlay.Join(peers), overlay.Join(vnis), overlay.Join(agents)
	return &o, nil
}
