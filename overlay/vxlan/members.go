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
	setPeers  = "peers"  // underlay addresses of nodes
	setVNIs   = "vnis"   // of our networks
	setAgents = "agents" // ports of nodes' agents
)

// membersRules is the table of overlay.Members.
//
// What a task sends to the VXLAN port goes nowhere: translated, it would come
// from this node's own address, which is a member's. What else comes for one of
// our VNIs must be from a member; other VXLANs that share the port are left
// alone.
//
// What a task sends to an agent, this node's or another's, is refused for the
// same reason: it would come from a node.
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
	agents := set{name: setAgents, key: nftables.TypeInetService}
	for _, a := range strings.Fields(o.Agents) {
		if n, err := strconv.ParseUint(a, 10, 16); err == nil {
			agents.elems = append(agents.elems, binary.BigEndian.AppendUint16(nil, uint16(n)))
		}
	}
	rs.sets = []set{peers, vnis, agents}
	port := udpTo(o.Port)
	rs.chains = []chain{
		{"input", nftables.ChainTypeFilter, nftables.ChainHookInput, prioFilter, nftables.ChainPolicyAccept, []rule{
			r(port, iif(way), drop),
			r(iif(way), portIn(setAgents, unix.IPPROTO_TCP), prohibit),
			r(iif(way), portIn(setAgents, unix.IPPROTO_UDP), prohibit),
			r(port, vniIn(setVNIs), notFrom(setPeers, v6), drop),
		}},
		{"forward", nftables.ChainTypeFilter, nftables.ChainHookForward, prioFilter, nftables.ChainPolicyAccept, []rule{
			r(port, iif(way), drop),
			r(iif(way), to(setPeers, v6), portIn(setAgents, unix.IPPROTO_TCP), prohibit),
			r(iif(way), to(setPeers, v6), portIn(setAgents, unix.IPPROTO_UDP), prohibit),
		}},
	}
	return rs
}

// prohibit refuses a packet and says so, for the sender to fail at once.
var prohibit = rule{"reject admin-prohibited", []expr.Any{
	&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED},
}}

// portIn matches a destination port of TCP or UDP that is in a set.
func portIn(setName string, proto byte) rule {
	return rule{fmt.Sprintf("l4proto %d dport @%s", proto, setName), []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{proto}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Lookup{SourceRegister: 1, SetName: setName},
	}}
}

// to matches destinations that are in the set of nodes, which has one family.
func to(setName string, v6 bool) rule {
	x := nfproto(v6)
	return rule{x.text + " daddr @" + setName, append(x.exprs,
		loadDst(v6, 1),
		&expr.Lookup{SourceRegister: 1, SetName: setName},
	)}
}

// udpTo matches a UDP destination port.
func udpTo(port int) rule {
	return rule{fmt.Sprintf("udp dport %d", port), []expr.Any{
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
	return rule{"vxlan vni @" + setName, []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 12, Len: 4},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: []byte{0xff, 0xff, 0xff, 0}, Xor: make([]byte, 4)},
		&expr.Lookup{SourceRegister: 1, SetName: setName},
	}}
}

// notFrom matches sources that are not in a set. The underlay has one family:
// what comes by the other is from no member.
func notFrom(setName string, v6 bool) rule {
	return rule{"saddr != @" + setName, []expr.Any{
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
	var agents []uint16
	for _, k := range keys {
		if len(k) == 2 {
			agents = append(agents, binary.BigEndian.Uint16(k))
		}
	}
	o.Peers, o.VNIs, o.Agents = overlay.Join(peers), overlay.Join(vnis), overlay.Join(agents)
	return &o, nil
}
