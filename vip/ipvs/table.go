package ipvs

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/vip"
	"github.com/shoalnet/shoal/vip/internal/kern"
)

const (
	mapMarks  = "marks"
	setServed = "served"
	mapSelf   = "self"
	mapBack   = "back"

	// formVersion is part of every comment: another form of the rules is
	// another version, and what an older agent left is rewritten.
	formVersion = 1
)

// chain is one chain as it should be. Jumped-to chains have a base of only a
// name and come before those that jump.
type chain struct {
	base  kern.Base
	rules []rule
}

type rule struct {
	says string
	// exprs builds the rule's expressions; sets of the rule's own are added
	// to the transaction.
	exprs func(t *kern.Tx) []expr.Any
}

func (c chain) comments() []string {
	out := make([]string, len(c.rules))
	for i, r := range c.rules {
		out[i] = r.comment()
	}
	return out
}

func (r rule) comment() string { return r.says + " " + kern.Digest(formVersion, r.says) }

// form is every chain of the table for one network and family.
func form(n vip.Network, f kern.Family) []chain {
	as, ok := kern.Hairpin(n, f)
	return []chain{
		{kern.Base{Name: "to-vip"}, flips(f, true)},
		{kern.Base{Name: "from-vip"}, flips(f, false)},
		{kern.Base{Name: "prerouting", Type: nftables.ChainTypeFilter, Hook: nftables.ChainHookPrerouting, Prio: nftables.ChainPriorityMangle},
			slices.Concat(hairpinBack(f, as, ok), []rule{
				{"client ports apart", func(t *kern.Tx) []expr.Any {
					s := t.Ref(setServed)
					return []expr.Any{f.LoadDst(1), &expr.Lookup{SourceRegister: 1, SetName: s.Name},
						&expr.Verdict{Kind: expr.VerdictJump, Chain: "to-vip"}}
				}},
				{"mark VIPs", func(t *kern.Tx) []expr.Any {
					return slices.Concat(kern.Proto(t.Protocols(kern.Protocols...)), []expr.Any{
						f.LoadDst(1),
						&expr.Lookup{SourceRegister: 1, DestRegister: 1, IsDestRegSet: true, SetName: mapMarks},
						&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1},
					})
				}},
			})},
		{kern.Base{Name: "postrouting", Type: nftables.ChainTypeFilter, Hook: nftables.ChainHookPostrouting, Prio: nftables.ChainPriorityNATSource},
			[]rule{
				{"hairpin", func(t *kern.Tx) []expr.Any {
					return slices.Concat(kern.Proto(t.Protocols(kern.Protocols...)), []expr.Any{
						f.LoadSrc(f.Reg(0)), f.LoadDst(f.Reg(1)),
						&expr.Lookup{SourceRegister: f.Reg(0), DestRegister: 1, IsDestRegSet: true, SetName: mapSelf},
						f.StoreSrc(1),
					})
				}},
				{"client ports back", func(t *kern.Tx) []expr.Any {
					return []expr.Any{f.LoadSrc(1), &expr.Lookup{SourceRegister: 1, SetName: setServed},
						&expr.Verdict{Kind: expr.VerdictJump, Chain: "from-vip"}}
				}},
			}},
	}
}

// ours tells which chains belong to the table.
func ours(form []chain) func(string) bool {
	return func(name string) bool {
		return slices.ContainsFunc(form, func(c chain) bool { return c.base.Name == name })
	}
}

func hairpinBack(f kern.Family, as netip.Addr, ok bool) []rule {
	if !ok {
		return nil
	}
	return []rule{{"hairpin back from " + as.String(), func(t *kern.Tx) []expr.Any {
		return slices.Concat(
			[]expr.Any{f.LoadDst(1), &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: as.AsSlice()}},
			kern.Proto(t.Protocols(kern.Protocols...)),
			[]expr.Any{
				f.LoadSrc(1),
				&expr.Lookup{SourceRegister: 1, DestRegister: 1, IsDestRegSet: true, SetName: mapBack},
				f.StoreDst(1),
			})
	}}}
}

// Offsets: RFC 9293 (TCP), RFC 768 (UDP), RFC 792 and 4443 (ICMP).
const (
	tcpCsum  = 16
	udpCsum  = 6
	icmpCsum = 2
	icmpHdr  = 8 // the quoted packet begins here
)

// flips are the rules that flip the client's port: in packets to a VIP the
// source port, and in ICMP errors the destination port of the packet they
// quote, which came from the VIP; in packets from a VIP the other way round.
func flips(f kern.Family, toVIP bool) []rule {
	port, quoted := uint32(0), uint32(2)
	if !toVIP {
		port, quoted = 2, 0
	}
	csum := func(off uint32, zero bool) []expr.Any {
		op := expr.CmpOpNeq
		if zero {
			op = expr.CmpOpEq
		}
		return []expr.Any{th(2, off, 2), &expr.Cmp{Op: op, Register: 2, Data: []byte{0, 0}}}
	}
	is := func(p byte) []expr.Any {
		return []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 2}, &expr.Cmp{Op: expr.CmpOpEq, Register: 2, Data: []byte{p}}}
	}
	out := []rule{
		{fmt.Sprintf("tcp port at %d", port), func(*kern.Tx) []expr.Any {
			return slices.Concat(is(unix.IPPROTO_TCP), flip(port, true, tcpCsum))
		}},
		// A UDP checksum of zero means none (RFC 768), and must stay zero.
		{fmt.Sprintf("udp port at %d", port), func(*kern.Tx) []expr.Any {
			return slices.Concat(is(unix.IPPROTO_UDP), csum(udpCsum, false), flip(port, true, udpCsum))
		}},
		{fmt.Sprintf("udp port at %d, no checksum", port), func(*kern.Tx) []expr.Any {
			return slices.Concat(is(unix.IPPROTO_UDP), csum(udpCsum, true), flip(port, false, 0))
		}},
	}
	errs, version, mask := []byte{3, 11, 12}, byte(0x45), byte(0xff) // unreachable, time exceeded, parameter problem; no options
	if f.V6 {
		errs, version, mask = []byte{1, 2, 3, 4}, 0x60, 0xf0 // and packet too big
	}
	out = append(out, rule{fmt.Sprintf("quoted port at %d", quoted), func(t *kern.Tx) []expr.Any {
		types := t.Anonymous(nftables.TypeICMPType, nil, keys(errs...))
		protos := t.Protocols(unix.IPPROTO_TCP, unix.IPPROTO_UDP)
		return slices.Concat(is(f.ICMP), []expr.Any{
			th(2, 0, 1), &expr.Lookup{SourceRegister: 2, SetName: types.Name, SetID: types.ID},
			th(2, icmpHdr, 1),
			&expr.Bitwise{SourceRegister: 2, DestRegister: 2, Len: 1, Mask: []byte{mask}, Xor: []byte{0}},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 2, Data: []byte{version}},
			th(2, icmpHdr+f.Next, 1), &expr.Lookup{SourceRegister: 2, SetName: protos.Name, SetID: protos.ID},
		}, flip(icmpHdr+f.Hdr+quoted, true, icmpCsum))
	}})
	return out
}

func keys(bs ...byte) []nftables.SetElement {
	var out []nftables.SetElement
	for _, b := range bs {
		out = append(out, nftables.SetElement{Key: []byte{b}})
	}
	return out
}

func th(reg, off, n uint32) expr.Any {
	return &expr.Payload{DestRegister: reg, Base: expr.PayloadBaseTransportHeader, Offset: off, Len: n}
}

// flipMask is the bits of a port that are flipped. All zero or all one, they
// stay.
const flipMask = 0xf000

// Flip is what the chains do to a client's port.
func Flip(port uint16) uint16 {
	if top := port & flipMask; top == 0 || top == flipMask {
		return port
	}
	return port ^ flipMask
}

func flip(off uint32, csum bool, csumOff uint32) []expr.Any {
	m := binary.BigEndian.AppendUint16(nil, flipMask)
	zero := []byte{0, 0}
	w := &expr.Payload{OperationType: expr.PayloadWrite, SourceRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: off, Len: 2}
	if csum {
		w.CsumType, w.CsumOffset = expr.CsumTypeInet, csumOff
	}
	return []expr.Any{
		th(1, off, 2),
		&expr.Bitwise{SourceRegister: 1, DestRegister: 2, Len: 2, Mask: m, Xor: zero},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 2, Data: zero},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 2, Data: m},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 2, Mask: []byte{0xff, 0xff}, Xor: m},
		w,
	}
}

// setBase makes the table of one family with all but what servers need.
func setBase(n vip.Network, f kern.Family, over kern.Over) error {
	t := kern.Begin(f)
	chains := form(n, f)
	t.Clear(f, over, ours(chains))
	addr, mark := f.Type, nftables.TypeMark
	t.Set(mapMarks, addr, &mark)
	t.Set(setServed, addr, nil)
	self := t.Set(mapSelf, nftables.MustConcatSetType(addr, addr), &addr)
	back := t.Set(mapBack, addr, &addr)
	for _, c := range chains {
		if c.base.Hook == nil {
			t.Chain(c.base.Name) // must exist before a rule jumps to it
		}
	}
	for _, c := range chains {
		var nc *nftables.Chain
		if c.base.Hook == nil {
			nc = t.Chain(c.base.Name)
		} else {
			nc = t.BaseChain(c.base)
		}
		for _, r := range c.rules {
			t.Rule(nc, r.comment(), r.exprs(t)...)
		}
	}
	t.Flush(self)
	t.Flush(back)
	if as, ok := kern.Hairpin(n, f); ok {
		var se, be []nftables.SetElement
		for _, a := range kern.Locals(n, f) {
			se = append(se, nftables.SetElement{Key: slices.Concat(a.AsSlice(), a.AsSlice()), Val: as.AsSlice()})
			be = append(be, nftables.SetElement{Key: a.AsSlice(), Val: a.AsSlice()})
		}
		t.Add(self, se)
		t.Add(back, be)
	}
	return t.Commit()
}
