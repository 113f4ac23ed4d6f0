package nft

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/ingress"
	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/spec"
)

// Priorities: linux/netfilter_ipv4.h, less where we must come first.
const (
	prioRaw    = -300
	prioMark   = -152 // after conntrack (-200), before the overlay's entry chain (-151)
	prioMangle = -150
	prioDstNAT = -100 - 5
	prioFilter = 0
	prioSrcNAT = 100 - 5
	prioAway   = 100
)

// ---- expressions ----

// r joins matches and statements to a rule.
func r(parts ...rule) rule {
	var out rule
	for _, p := range parts {
		out.text += p.text + " "
		out.exprs = append(out.exprs, p.exprs...)
	}
	return out
}

// ifname matches a device's name; one ending in * by its beginning.
func ifname(key expr.MetaKey, word, name string, op expr.CmpOp) rule {
	data := make([]byte, unix.IFNAMSIZ)
	copy(data, name)
	if n := len(name); name[n-1] == '*' {
		data = []byte(name[:n-1])
	}
	return rule{text: fmt.Sprint(word, " ", op, " ", name), exprs: []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: op, Register: 1, Data: data},
	}}
}

func iif(name string) rule    { return ifname(expr.MetaKeyIIFNAME, "iifname", name, expr.CmpOpEq) }
func oif(name string) rule    { return ifname(expr.MetaKeyOIFNAME, "oifname", name, expr.CmpOpEq) }
func oifNot(name string) rule { return ifname(expr.MetaKeyOIFNAME, "oifname", name, expr.CmpOpNeq) }

// Offsets in the IPv4 header (RFC 791).
const (
	srcOff = 12
	dstOff = 16
)

func loadAddr(off, reg uint32) expr.Any {
	return &expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: off, Len: 4}
}

func th(reg, off, n uint32) expr.Any {
	return &expr.Payload{DestRegister: reg, Base: expr.PayloadBaseTransportHeader, Offset: off, Len: n}
}

// reg is the i-th 4-octet register from register 1 on, for concatenations.
func reg(i uint32) uint32 { return unix.NFT_REG32_00 + i }

func inPrefix(word string, off uint32, p netip.Prefix, op expr.CmpOp) rule {
	return rule{text: fmt.Sprint(word, " ", op, " ", p), exprs: []expr.Any{
		loadAddr(off, 1),
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: net.CIDRMask(p.Bits(), 32), Xor: make([]byte, 4)},
		&expr.Cmp{Op: op, Register: 1, Data: p.Masked().Addr().AsSlice()},
	}}
}

func saddr(p netip.Prefix) rule { return inPrefix("saddr", srcOff, p, expr.CmpOpEq) }
func daddr(p netip.Prefix) rule { return inPrefix("daddr", dstOff, p, expr.CmpOpEq) }

func notIn(word string, off uint32, ps []netip.Prefix) rule {
	var out []rule
	for _, p := range ps {
		out = append(out, inPrefix(word, off, p, expr.CmpOpNeq))
	}
	return r(out...)
}

func daddrIn(set string) rule {
	return rule{text: "daddr @" + set, exprs: []expr.Any{loadAddr(dstOff, 1), &expr.Lookup{SourceRegister: 1, SetName: set}}}
}

// fibLocal matches packets to addresses of this machine; fibNotLocal others.
func fibType(op expr.CmpOp) rule {
	return rule{text: fmt.Sprint("fib daddr type ", op, " local"), exprs: []expr.Any{
		&expr.Fib{Register: 1, ResultADDRTYPE: true, FlagDADDR: true},
		&expr.Cmp{Op: op, Register: 1, Data: native.AppendUint32(nil, unix.RTN_LOCAL)},
	}}
}

// portKey loads what the maps of ports have as a key: with addr, the
// destination address first. orig takes it from the tracked connection as it
// was before translation.
func portKey(addr, orig bool) rule {
	out := rule{text: fmt.Sprint("port key ", addr, orig)}
	i := uint32(0)
	if addr {
		if orig {
			out.exprs = append(out.exprs, ctOrig{key: unix.NFT_CT_DST_IP, reg: reg(0)})
		} else {
			out.exprs = append(out.exprs, loadAddr(dstOff, reg(0)))
		}
		i++
	}
	out.exprs = append(out.exprs, &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg(i)})
	if orig {
		out.exprs = append(out.exprs, ctOrig{key: unix.NFT_CT_PROTO_DST, reg: reg(i + 1)})
	} else {
		out.exprs = append(out.exprs, th(reg(i+1), 2, 2))
	}
	return out
}

func lookup(set string) rule {
	return rule{text: "@" + set, exprs: []expr.Any{&expr.Lookup{SourceRegister: 1, SetName: set}}}
}

// dnatMap translates to what a map has: an address and a port.
func dnatMap(set string) rule {
	return rule{text: "dnat map @" + set, exprs: []expr.Any{
		&expr.Lookup{SourceRegister: 1, DestRegister: reg(0), IsDestRegSet: true, SetName: set},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: reg(0), RegProtoMin: reg(1)},
	}}
}

// portTaken matches a source port that is a published one; masqElsewhere takes
// another. The overlay's masquerade, which comes later, keeps tasks' source ports
// above 32767, and a port may be published there.
var (
	portTaken = rule{text: "source port in @" + mapPorts, exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg(0)},
		th(reg(1), 0, 2),
		// A lookup in a map needs a place for what it finds.
		&expr.Lookup{SourceRegister: reg(0), DestRegister: reg(0), IsDestRegSet: true, SetName: mapPorts},
	}}
	masqElsewhere = rule{text: "masquerade to :32768-65535 fully-random", exprs: nl.MasqHigh(2, true)}
)

// snatNode lets the server see this node.
func snatNode(node netip.Addr) rule {
	if !node.IsValid() {
		return rule{text: "masquerade", exprs: []expr.Any{&expr.Masq{}}}
	}
	return rule{text: "snat to " + node.String(), exprs: []expr.Any{
		&expr.Immediate{Register: 1, Data: node.AsSlice()},
		&expr.NAT{Type: expr.NATTypeSourceNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1},
	}}
}

func u32(v uint32) []byte { return native.AppendUint32(nil, v) }

// ctBits matches when some of the bits are set (or, with eq, when none is).
func ctBits(text string, key expr.CtKey, bits uint32, op expr.CmpOp) rule {
	return rule{text: fmt.Sprint(text, " ", op), exprs: []expr.Any{
		&expr.Ct{Key: key, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: u32(bits), Xor: u32(0)},
		&expr.Cmp{Op: op, Register: 1, Data: u32(0)},
	}}
}

// ipsDstNAT is IPS_DST_NAT of linux/netfilter/nf_conntrack_common.h.
const ipsDstNAT = 1 << 5

var (
	ctNotDNAT = ctBits("ct status dnat", expr.CtKeySTATUS, ipsDstNAT, expr.CmpOpEq)
	ctNew     = ctBits("ct state new", expr.CtKeySTATE, expr.CtStateBitNEW, expr.CmpOpNeq)
	// ctOfNobody: neither a reply nor otherwise part of a connection that is
	// known here. IPVS does not have its connections tracked.
	ctOfNobody  = ctBits("ct state new,invalid,untracked", expr.CtKeySTATE, expr.CtStateBitNEW|expr.CtStateBitINVALID|expr.CtStateBitUNTRACKED, expr.CmpOpNeq)
	ctUntracked = ctBits("ct state untracked", expr.CtKeySTATE, expr.CtStateBitUNTRACKED, expr.CmpOpNeq)
	ctOriginal  = ctDirection(0)
	ctReply     = ctDirection(1)
	ctOurs      = rule{text: "ct mark of a node", exprs: []expr.Any{
		&expr.Ct{Key: expr.CtKeyMARK, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: u32(spec.MarkKindMask), Xor: u32(0)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: u32(spec.NodeMarkBase)},
	}}
	markHere = rule{text: "meta mark set here", exprs: []expr.Any{
		&expr.Immediate{Register: 1, Data: u32(spec.NodeMarkBase)},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1},
	}}
	markReply = rule{text: "meta mark set ct mark", exprs: []expr.Any{
		&expr.Ct{Key: expr.CtKeyMARK, Register: 1},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1},
	}}
	ctMarkHere = rule{text: "ct mark set here", exprs: []expr.Any{
		&expr.Immediate{Register: 1, Data: u32(spec.NodeMarkBase)},
		&expr.Ct{Key: expr.CtKeyMARK, Register: 1, SourceRegister: true},
	}}
	drop   = rule{text: "drop", exprs: []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}}}
	ret    = rule{text: "return", exprs: []expr.Any{&expr.Verdict{Kind: expr.VerdictReturn}}}
	reject = rule{text: "reject", exprs: []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: 3}}} // port unreachable, RFC 792
	// SCTP ignores "port unreachable". A client that just sent INIT, always alone
	// in its packet, takes "protocol unreachable" for an abort (RFC 9260 sections
	// 3 and 10); what else is sent is the local stack's to abort.
	rejectINIT = rule{text: "sctp chunk INIT reject with protocol unreachable", exprs: []expr.Any{
		th(1, 12, 1), &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{1}},
		&expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: 2},
	}}
)

func ctDirection(d byte) rule {
	return rule{text: fmt.Sprint("ct direction ", d), exprs: []expr.Any{
		&expr.Ct{Key: expr.CtKeyDIRECTION, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{d}},
	}}
}

func l4proto(p byte) rule {
	return rule{text: fmt.Sprint("l4proto ", p), exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{p}},
	}}
}

// fromMAC looks the sender's MAC up in a map, into register 1.
func fromMAC(set string) rule {
	return rule{text: "ether saddr map @" + set, exprs: []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseLLHeader, Offset: 6, Len: 6},
		&expr.Lookup{SourceRegister: 1, DestRegister: 1, IsDestRegSet: true, SetName: set},
	}}
}

func goTo(kind expr.VerdictKind, name string) rule {
	return rule{text: fmt.Sprint("verdict ", kind, " ", name), exprs: []expr.Any{&expr.Verdict{Kind: kind, Chain: name}}}
}

// ---- the host ----

const (
	mapPorts     = "ports"
	mapAddrPorts = "addr-ports"
	setNAT       = "nat"
	setAddrNAT   = "addr-nat"
	setPrivate   = "private"
)

var (
	portType     = nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService)
	addrPortType = nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetProto, nftables.TypeInetService)
	targetType   = nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeInetService)
)

var loopback = netip.MustParsePrefix("127.0.0.0/8")

// hostRules is the table of the host's namespace.
//
// Locally made connections to 127.0.0.1 are translated as they leave, never on
// arrival: a neighbour on the wire could send to 127.0.0.1 as well, which the
// kernel refuses only after prerouting. "loopback" refuses it for the devices
// where route_localnet lifts that.
func hostRules(o ingress.HostTable) ruleset {
	way := ingress.DevPrefix + "*"
	translate := []rule{
		r(fibType(expr.CmpOpNeq), ret),
		r(portKey(true, false), dnatMap(mapAddrPorts)),
		r(portKey(false, false), dnatMap(mapPorts)),
	}
	var post []rule
	for _, p := range spec.EgressPrefixes {
		post = append(post, r(oifNot(way), saddr(p), portTaken, masqElsewhere))
	}
	post = append(post,
		r(oifNot(way), ret),
		r(ctNotDNAT, ret),
		r(saddr(loopback), snatNode(o.Node)),
	)
	for _, p := range spec.EgressPrefixes {
		post = append(post, r(saddr(p), snatNode(o.Node)))
	}
	post = append(post,
		r(portKey(true, true), lookup(setAddrNAT), snatNode(o.Node)),
		r(portKey(false, true), lookup(setNAT), snatNode(o.Node)),
		// Pins the client's address: whoever comes later finds it translated.
		rule{text: "snat to saddr", exprs: []expr.Any{
			loadAddr(srcOff, 1),
			&expr.NAT{Type: expr.NATTypeSourceNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1},
		}},
	)
	return ruleset{
		name: o.Name,
		sets: []set{
			{mapPorts, portType, &targetType},
			{mapAddrPorts, addrPortType, &targetType},
			{setNAT, portType, nil},
			{setAddrNAT, addrPortType, nil},
			{setPrivate, nftables.TypeIPAddr, nil},
		},
		chains: []chain{
			{"loopback", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, prioRaw, []rule{r(iif(way), daddr(loopback), drop)}},
			{"prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, prioDstNAT, append([]rule{r(daddr(loopback), ret)}, translate...)},
			{"output", nftables.ChainTypeNAT, nftables.ChainHookOutput, prioDstNAT, translate},
			{"private", nftables.ChainTypeFilter, nftables.ChainHookOutput, prioFilter, []rule{
				r(oif(way), daddrIn(setPrivate), ctNotDNAT, reject),
			}},
			{"postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, prioSrcNAT, post},
		},
	}
}

func be16(p uint16) []byte { return []byte{byte(p >> 8), byte(p), 0, 0} }

func protoNum(p string) byte {
	switch p {
	case spec.TCP:
		return unix.IPPROTO_TCP
	case spec.UDP:
		return unix.IPPROTO_UDP
	case spec.SCTP:
		return unix.IPPROTO_SCTP
	}
	return 0
}

func protoName(p byte) string {
	for _, n := range []string{spec.TCP, spec.UDP, spec.SCTP} {
		if protoNum(n) == p {
			return n
		}
	}
	return ""
}

// key is an element's key: protocol and port, before them the address if any.
func key(a netip.Addr, proto string, port uint16) []byte {
	var out []byte
	if a.IsValid() {
		out = a.AsSlice()
	}
	return append(append(out, protoNum(proto), 0, 0, 0), be16(port)...)
}

func parseKey(b []byte) (a netip.Addr, proto string, port uint16, ok bool) {
	if len(b) == 12 {
		a, _ = netip.AddrFromSlice(b[:4])
		b = b[4:]
	}
	if len(b) != 8 {
		return a, "", 0, false
	}
	return a, protoName(b[0]), binary.BigEndian.Uint16(b[4:]), true
}

func target(to netip.AddrPort) []byte { return append(to.Addr().AsSlice(), be16(to.Port())...) }

func parseTarget(b []byte) netip.AddrPort {
	if len(b) != 8 {
		return netip.AddrPort{}
	}
	a, _ := netip.AddrFromSlice(b[:4])
	return netip.AddrPortFrom(a, binary.BigEndian.Uint16(b[4:]))
}

// portElems are a port's elements.
func portElems(o ingress.Port) (el elem, nat elem) {
	k := key(o.Addr, o.Protocol, o.Published)
	el, nat = elem{set: mapPorts, key: k, val: target(o.To)}, elem{set: setNAT, key: k}
	if o.Addr.IsValid() {
		el.set, nat.set = mapAddrPorts, setAddrNAT
	}
	return el, nat
}

// ---- the ovns ----

const (
	mapNodes     = "nodes"
	mapZones     = "zones"
	setPublished = "published"
	mapLocal     = "local"
)

// netnsRules is the table of an ovns.
//
// "marks" tells apart, by connection mark: connections that the host sent here
// (mark of node 0), and those that another node sent here (its mark). The packet
// mark, which the overlay's filter accepts, is node 0's in the original
// direction; replies have the connection's, and are routed by it.
//
// With IPVS nothing of a connection is tracked on its entry node. Its replies
// from other nodes are known by where they come from and lead; these, and the
// packets that they answer, are what "away" and "back" flip ports of.
func netnsRules(o ingress.Table) ruleset {
	vx, out := ingress.VXLANDev, ingress.OutDev
	nets := o.Prefixes()
	foreignSrc, foreignDst := notIn("saddr", srcOff, nets), notIn("daddr", dstOff, nets)
	var mark, away []rule
	for _, p := range nets {
		mark = append(mark, r(iif(vx), foreignSrc, daddr(p), ctNew, fromMAC(mapNodes),
			rule{text: "ct mark set", exprs: []expr.Any{&expr.Ct{Key: expr.CtKeyMARK, Register: 1, SourceRegister: true}}}))
	}
	mark = append(mark,
		r(iif(out), ctNew, portKey(true, false), lookup(setPublished), ctMarkHere),
		r(ctOriginal, ctOurs, markHere),
		r(ctReply, ctOurs, markReply),
	)
	for _, p := range nets {
		mark = append(mark, r(iif(vx), saddr(p), foreignDst, ctOfNobody, markHere, goTo(expr.VerdictJump, "flip-back")))
		away = append(away, r(oif(vx), foreignSrc, daddr(p), ctUntracked, goTo(expr.VerdictJump, "flip-away")))
	}
	zone := r(iif(vx), foreignSrc, fromMAC(mapZones), rule{text: "ct original zone set", exprs: []expr.Any{
		ctOrig{key: unix.NFT_CT_ZONE, reg: 1, set: true}}})
	verdict := nftables.TypeVerdict
	refuse := []rule{
		r(iif(out), daddr(netip.PrefixFrom(o.Out, 32)), l4proto(unix.IPPROTO_UDP), reject),
		r(iif(out), daddr(netip.PrefixFrom(o.Out, 32)), l4proto(unix.IPPROTO_SCTP), rejectINIT),
	}
	return ruleset{
		name: ingress.NetnsTable,
		sets: []set{
			{mapNodes, nftables.TypeEtherAddr, &nftables.TypeMark},
			{mapZones, nftables.TypeEtherAddr, &nftables.TypeMark},
			{setPublished, addrPortType, nil},
			{mapLocal, portType, &verdict},
		},
		chains: []chain{
			{"flip-away", "", nil, 0, flips(0)},
			{"flip-back", "", nil, 0, flips(2)},
			{"zones", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, prioRaw, []rule{zone}},
			{"marks", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, prioMark, mark},
			// Errors that this node reports of a connection, to where it entered.
			{"errors", nftables.ChainTypeRoute, nftables.ChainHookOutput, prioMangle, []rule{r(ctReply, ctOurs, markReply)}},
			{"local-tasks", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, prioDstNAT, []rule{
				r(iif(out), daddr(netip.PrefixFrom(o.Out, 32)), portKey(false, false), rule{text: "vmap @local", exprs: []expr.Any{
					&expr.Lookup{SourceRegister: 1, IsDestRegSet: true, SetName: mapLocal}, // register 0: the verdict
				}}),
			}},
			// A packet rejected here is never confirmed as a connection, so that
			// a UDP client that keeps sending is balanced once there is a backend.
			{"refuse", nftables.ChainTypeFilter, nftables.ChainHookInput, prioFilter, refuse},
			{"away", nftables.ChainTypeFilter, nftables.ChainHookPostrouting, prioAway, away},
		},
	}
}

// Offsets: RFC 9293 (TCP), RFC 768 (UDP), RFC 792 (ICMP).
const (
	tcpCsum  = 16
	udpCsum  = 6
	icmpCsum = 2
	icmpHdr  = 8 // the quoted packet begins here
	ipHdr    = 20
	ipProto  = 9
)

// flips are the rules that flip the highest bit of the client's port: at offset
// port of TCP and UDP headers, and in ICMP errors at the other port of the
// packet they quote. Ports whose upper four bits are all zero but perhaps that
// one stay, so that none becomes 0 or a privileged one.
func flips(port uint32) []rule {
	csum := func(op expr.CmpOp) rule {
		return rule{text: fmt.Sprint("udp checksum ", op), exprs: []expr.Any{th(2, udpCsum, 2), &expr.Cmp{Op: op, Register: 2, Data: []byte{0, 0}}}}
	}
	out := []rule{
		r(l4proto(unix.IPPROTO_TCP), flip(port, tcpCsum)),
		// A checksum of zero means none, and must stay zero.
		r(l4proto(unix.IPPROTO_UDP), csum(expr.CmpOpNeq), flip(port, udpCsum)),
		r(l4proto(unix.IPPROTO_UDP), csum(expr.CmpOpEq), flip(port, 0)),
	}
	for _, typ := range []byte{3, 11, 12} { // unreachable, time exceeded, parameter problem
		for _, p := range []byte{unix.IPPROTO_TCP, unix.IPPROTO_UDP} {
			out = append(out, r(l4proto(unix.IPPROTO_ICMP), rule{text: fmt.Sprint("icmp type ", typ, " quotes ", p), exprs: []expr.Any{
				th(2, 0, 1), &expr.Cmp{Op: expr.CmpOpEq, Register: 2, Data: []byte{typ}},
				th(2, icmpHdr, 1), &expr.Cmp{Op: expr.CmpOpEq, Register: 2, Data: []byte{0x45}}, // IPv4 without options
				th(2, icmpHdr+ipProto, 1), &expr.Cmp{Op: expr.CmpOpEq, Register: 2, Data: []byte{p}},
			}}, flip(icmpHdr+ipHdr+2-port, icmpCsum)))
		}
	}
	return out
}

func flip(off, csum uint32) rule {
	w := &expr.Payload{OperationType: expr.PayloadWrite, SourceRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: off, Len: 2}
	if csum != 0 {
		w.CsumType, w.CsumOffset = expr.CsumTypeInet, csum
	}
	return rule{text: fmt.Sprint("flip port at ", off, " checksum at ", csum), exprs: []expr.Any{
		th(1, off, 2),
		&expr.Bitwise{SourceRegister: 1, DestRegister: 2, Len: 2, Mask: []byte{0x70, 0}, Xor: []byte{0, 0}},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 2, Data: []byte{0, 0}},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 2, Mask: []byte{0xff, 0xff}, Xor: []byte{0x80, 0}},
		w,
	}}
}

// nodeElems are a node's elements.
func nodeElems(o ingress.Node) []elem {
	mac := slices.Concat([]byte(spec.VTEPMAC(o.Number)))
	// conntrack zones are 16 bits wide, and loaded from the beginning of the
	// register.
	zone := append(native.AppendUint16(nil, uint16(o.Number)), 0, 0)
	return []elem{
		{set: mapNodes, key: mac, val: u32(nodeMark(o.Number))},
		{set: mapZones, key: mac, val: zone},
	}
}

func nodeMark(number int) uint32 { return spec.NodeMarkBase | uint32(number) }

func localChain(o ingress.Local) string { return fmt.Sprintf("local-%s-%d", o.Protocol, o.Slot) }

// parseLocalChain is the inverse of localChain.
func parseLocalChain(name string) (proto string, slot uint16, ok bool) {
	f := strings.Split(name, "-")
	if len(f) != 3 || f[0] != "local" || protoNum(f[1]) == 0 {
		return "", 0, false
	}
	n, err := strconv.ParseUint(f[2], 10, 16)
	return f[1], uint16(n), err == nil && name == localChain(ingress.Local{Protocol: f[1], Slot: uint16(n)})
}
