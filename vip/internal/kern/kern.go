// Package kern is what vip/ipvs and vip/nft share of the kernel: VIP addresses
// on the loopback device, and reading and writing one nftables table.
//
// # Reading nftables
//
// google/nftables decodes every expression of every rule, and can only list the
// rules of one chain at a time. With 2,000 services there are 2,000 chains, so
// this package dumps the rules of a whole table in one request and decodes no
// more than chain, comment and the names of the sets that are looked up. That
// suffices because a rule can't be changed, only replaced, and whoever replaces
// it also replaces its comment: each rule of ours carries in its comment a
// digest of what it does, so reading the digest is reading the rule.
//
// # Writing nftables
//
// A [Tx] is one transaction: all or nothing, also for packets, but for a rule with
// a map of its own that is deleted (see nl.RuleHandles). It is built with
// google/nftables; the two things it adds are element lists of any length (one
// netlink attribute holds 64 KiB, so long lists go in several messages of the
// same transaction) and set IDs of its own (the library draws them from an
// unguarded package variable).
//
// All functions work in the network namespace of the calling thread: call them
// within nl.Do.
package kern

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/spec"
	"github.com/shoalnet/shoal/vip"
)

// Table is the name of the nftables table that is ours, in families ip and ip6.
const Table = vip.Table

// Label marks an IPv4 address on lo as a VIP of ours (ip-address(8), label).
const Label = "lo:vip"

// Transport protocols that are balanced; everything else, ping above all, is
// answered by the namespace itself.
var Protocols = []byte{unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_SCTP}

// Family is what differs between IPv4 and IPv6.
type Family struct {
	V6   bool
	AF   uint8 // AF_INET, AF_INET6
	NF   nftables.TableFamily
	Type nftables.SetDatatype // of an address
	Len  uint32               // of an address, octets
	Src  uint32               // offset of the source address in the IP header
	Dst  uint32               // offset of the destination address
	Hdr  uint32               // length of an IP header without options
	Next uint32               // offset of the protocol number in it
	ICMP byte                 // protocol number of ICMP
}

// The two families.
var (
	V4 = Family{false, unix.AF_INET, nftables.TableFamilyIPv4, nftables.TypeIPAddr, 4, 12, 16, 20, 9, unix.IPPROTO_ICMP}
	V6 = Family{true, unix.AF_INET6, nftables.TableFamilyIPv6, nftables.TypeIP6Addr, 16, 8, 24, 40, 6, unix.IPPROTO_ICMPV6}
)

// Of returns the family of an address.
func Of(a netip.Addr) Family {
	if a.Is4() {
		return V4
	}
	return V6
}

// Families lists those that a network has subnets of.
func Families(n vip.Network) []Family {
	var out []Family
	if slices.ContainsFunc(n.Subnets, func(p netip.Prefix) bool { return p.Addr().Is4() }) {
		out = append(out, V4)
	}
	if slices.ContainsFunc(n.Subnets, func(p netip.Prefix) bool { return p.Addr().Is6() }) {
		out = append(out, V6)
	}
	return out
}

// Hairpin is the address that a backend sees as its client when it is balanced
// to itself: the link's gateway, and for IPv6, where a link-local address can
// not be translated to and fro, the network's gateway.
func Hairpin(n vip.Network, f Family) (netip.Addr, bool) {
	if !f.V6 {
		return spec.LinkGateway, true
	}
	for _, g := range n.Gateways {
		if g.Is6() {
			return g, true
		}
	}
	return netip.Addr{}, false
}

// Locals lists the network's local endpoints of one family.
func Locals(n vip.Network, f Family) []netip.Addr {
	var out []netip.Addr
	for _, a := range n.Locals {
		if a.Is4() != f.V6 {
			out = append(out, a)
		}
	}
	return out
}

// Addrs reads which VIPs are addresses of lo. A VIP of ours is an IPv4 address
// with our label, or an IPv6 address (those have no label) in the network's
// subnet that is not its gateway.
func Addrs(n vip.Network) (map[netip.Addr]bool, error) {
	list, err := nl.LoAddrs(unix.AF_UNSPEC)
	if err != nil {
		return nil, fmt.Errorf("network %s: list addresses of lo: %w", n.Name, err)
	}
	out := map[netip.Addr]bool{}
	for _, a := range list {
		if ip := a.Addr(); a.IsSingleIP() && (a.Label == Label || ip.Is6() && n.Contains(ip)) {
			out[ip] = true
		}
	}
	return out, nil
}

func loAddr(a netip.Addr) *netlink.Addr {
	out := &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}}
	if a.Is4() {
		// Scope host: never picked as the source of the namespace's own
		// packets, such as ICMP errors (ip-address(8)). It changes nothing
		// about being a local destination.
		out.Label, out.Scope = Label, unix.RT_SCOPE_HOST
	} else {
		out.Flags = unix.IFA_F_NODAD
		out.PreferedLft, out.ValidLft = 0, 0
	}
	return out
}

// AddAddrs makes the VIPs of ops local addresses, those that were not seen to be, and
// returns an error for each. It succeeds for one that is a local address already. What
// is there is listed once, and only where one is there already: a look for each VIP
// would cost by their square.
func AddAddrs(ops []vip.SetServer) []error {
	errs := make([]error, len(ops))
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		for i, op := range ops {
			errs[i] = fmt.Errorf("vip %s: lo: %w", op.Want.VIP, err)
		}
		return errs
	}
	have := sync.OnceValues(labelled)
	for i, op := range ops {
		a := op.Want.VIP
		if op.Have.Addressed {
			continue
		}
		switch err := netlink.AddrAdd(lo, loAddr(a)); {
		case nl.Exists(err) && a.Is4():
			ours, err := have()
			if err != nil {
				errs[i] = fmt.Errorf("vip %s: %w", a, err)
			} else if !ours[a] {
				errs[i] = fmt.Errorf("vip %s: lo has this address already, and it is not ours (no label %s)", a, Label)
			}
		case err != nil && !nl.Exists(err):
			errs[i] = fmt.Errorf("vip %s: add address to lo: %w", a, err)
		}
	}
	return errs
}

// labelled lists the IPv4 addresses of lo that have our label.
func labelled() (map[netip.Addr]bool, error) {
	list, err := nl.LoAddrs(unix.AF_INET)
	if err != nil {
		return nil, fmt.Errorf("list addresses of lo: %w", err)
	}
	out := map[netip.Addr]bool{}
	for _, a := range list {
		if a.Label == Label {
			out[a.Addr()] = true
		}
	}
	return out, nil
}

// DelAddr takes a VIP from lo. It succeeds when it is not there.
func DelAddr(a netip.Addr) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("vip %s: lo: %w", a, err)
	}
	// With the label given, the kernel deletes no address that lacks it
	// (inet_rtm_deladdr).
	if err := netlink.AddrDel(lo, loAddr(a)); err != nil && !nl.Absent(err) {
		return fmt.Errorf("vip %s: remove address from lo: %w", a, err)
	}
	return nil
}

// Absent tells whether err says that the object was not there. IPVS says ESRCH
// for a service and ENOENT for a destination.
func Absent(err error) bool { return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) }

// Expressions. Registers: each 16-octet register n is also four of 4 octets,
// numbered from NFT_REG32_00 + 4(n-1) (linux/netfilter/nf_tables.h).

// Reg is the register of the i-th part of a concatenation of addresses.
func (f Family) Reg(i int) uint32 {
	if f.V6 {
		return uint32(unix.NFT_REG_1 + i)
	}
	return uint32(unix.NFT_REG32_00 + i)
}

// LoadSrc, LoadDst load an address of the IP header.
func (f Family) LoadSrc(reg uint32) expr.Any { return f.load(reg, f.Src) }

// LoadDst loads the destination address.
func (f Family) LoadDst(reg uint32) expr.Any { return f.load(reg, f.Dst) }

func (f Family) load(reg, off uint32) expr.Any {
	return &expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: off, Len: f.Len}
}

// StoreSrc writes the source address and corrects the checksums.
func (f Family) StoreSrc(reg uint32) expr.Any { return f.store(reg, f.Src) }

// StoreDst writes the destination address and corrects the checksums.
func (f Family) StoreDst(reg uint32) expr.Any { return f.store(reg, f.Dst) }

func (f Family) store(reg, off uint32) expr.Any {
	e := &expr.Payload{OperationType: expr.PayloadWrite, SourceRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: off,
		Len: f.Len, CsumFlags: unix.NFT_PAYLOAD_L4CSUM_PSEUDOHDR}
	if !f.V6 {
		e.CsumType, e.CsumOffset = expr.CsumTypeInet, 10 // of the IPv4 header itself, RFC 791
	}
	return e
}

// Proto matches the protocols of a set made with [Tx.Protocols].
func Proto(s *nftables.Set) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Lookup{SourceRegister: 1, SetName: s.Name, SetID: s.ID},
	}
}
