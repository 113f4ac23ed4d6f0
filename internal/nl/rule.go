package nl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	vnl "github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// RawExpr is an nftables expression that google/nftables can't write: it embeds
// an expr.Any that is nil. A rule with one is added by [AddRule].
type RawExpr interface {
	expr.Any
	// Raw is the body of NFTA_LIST_ELEM (linux/netfilter/nf_tables.h).
	Raw() ([]byte, error)
}

// IsRaw tells whether a rule has a [RawExpr].
func IsRaw(exprs []expr.Any) bool {
	return slices.ContainsFunc(exprs, func(e expr.Any) bool { _, ok := e.(RawExpr); return ok })
}

// EncodeExpr is the body of NFTA_LIST_ELEM of an expression by its name and attributes.
func EncodeExpr(name string, attrs []netlink.Attribute) ([]byte, error) {
	data, err := netlink.MarshalAttributes(attrs)
	if err != nil {
		return nil, err
	}
	return netlink.MarshalAttributes([]netlink.Attribute{
		{Type: unix.NFTA_EXPR_NAME, Data: []byte(name + "\x00")},
		{Type: unix.NLA_F_NESTED | unix.NFTA_EXPR_DATA, Data: data},
	})
}

// masqPorts is a masquerade to the ports from that in register Min to that in
// register Max. google/nftables writes either the ports or the flags, and without
// these the kernel ignores the ports.
type masqPorts struct {
	expr.Any        // none
	Min, Max uint32 // registers
	Random   bool   // any port of these, not the sender's own where it is among them and free
}

// Raw implements RawExpr.
func (m masqPorts) Raw() ([]byte, error) {
	be := func(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }
	flags := uint32(unix.NF_NAT_RANGE_PROTO_SPECIFIED)
	if m.Random {
		flags |= unix.NF_NAT_RANGE_PROTO_RANDOM_FULLY
	}
	return EncodeExpr("masq", []netlink.Attribute{
		{Type: unix.NFTA_MASQ_FLAGS, Data: be(flags)},
		{Type: unix.NFTA_MASQ_REG_PROTO_MIN, Data: be(m.Min)},
		{Type: unix.NFTA_MASQ_REG_PROTO_MAX, Data: be(m.Max)},
	})
}

// MasqHigh masquerades to the ports from 32768 on, where Linux's own begin
// (net.ipv4.ip_local_port_range). It takes a register and the one after it.
func MasqHigh(register uint32, random bool) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: register, Data: []byte{0x80, 0}},
		&expr.Immediate{Register: register + 1, Data: []byte{0xff, 0xff}},
		masqPorts{Min: register, Max: register + 1, Random: random},
	}
}

// Rule is an nftables rule to be added by [AddRule].
type Rule struct {
	Family       uint8 // NFPROTO_…
	Table, Chain string
	Exprs        []expr.Any
	UserData     []byte
	First        bool // before the other rules of its chain, not after them
}

// encodeExprs is the body of NFTA_RULE_EXPRESSIONS.
func encodeExprs(family uint8, exprs []expr.Any) ([]byte, error) {
	var list []netlink.Attribute
	for _, e := range exprs {
		var b []byte
		var err error
		if raw, ok := e.(RawExpr); ok {
			b, err = raw.Raw()
		} else {
			b, err = expr.Marshal(family, e)
		}
		if err != nil {
			return nil, err
		}
		list = append(list, netlink.Attribute{Type: unix.NLA_F_NESTED | unix.NFTA_LIST_ELEM, Data: b})
	}
	return netlink.MarshalAttributes(list)
}

// AddRule adds a rule to a chain that exists, in a transaction of its own. Unlike
// google/nftables it knows each [RawExpr].
func AddRule(r Rule) error {
	exprs, err := encodeExprs(r.Family, r.Exprs)
	if err != nil {
		return err
	}
	body, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: unix.NFTA_RULE_TABLE, Data: []byte(r.Table + "\x00")},
		{Type: unix.NFTA_RULE_CHAIN, Data: []byte(r.Chain + "\x00")},
		{Type: unix.NLA_F_NESTED | unix.NFTA_RULE_EXPRESSIONS, Data: exprs},
		{Type: unix.NFTA_RULE_USERDATA, Data: r.UserData},
	})
	if err != nil {
		return err
	}
	flags := netlink.Request | netlink.Acknowledge | netlink.Create
	if !r.First {
		flags |= netlink.Append
	}
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return err
	}
	defer c.Close()
	// nfgenmsg: family, version, resource (linux/netfilter/nfnetlink.h).
	batch := []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, unix.NFNL_SUBSYS_NFTABLES}
	rule := append([]byte{r.Family, unix.NFNETLINK_V0, 0, 0}, body...)
	if _, err := c.SendMessages([]netlink.Message{
		{Header: netlink.Header{Type: unix.NFNL_MSG_BATCH_BEGIN, Flags: netlink.Request}, Data: batch},
		{Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWRULE, Flags: flags}, Data: rule},
		{Header: netlink.Header{Type: unix.NFNL_MSG_BATCH_END, Flags: netlink.Request}, Data: batch},
	}); err != nil {
		return err
	}
	_, err = c.Receive() // the acknowledgement, or the error
	return err
}

// Rules lists the attributes (NFTA_RULE_…) of a table's rules, in the calling
// thread's namespace; of one chain's, unless chain is empty. There are none if the
// table or the chain is absent. family is NFPROTO_….
func Rules(family uint8, table, chain string) ([][]netlink.Attribute, error) {
	what := table
	if chain != "" {
		what += ", chain " + chain
	}
	msgs, err := Dump(func() ([][]byte, error) {
		req := vnl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP)
		req.AddData(&vnl.Nfgenmsg{NfgenFamily: family, Version: unix.NFNETLINK_V0})
		req.AddData(vnl.NewRtAttr(unix.NFTA_RULE_TABLE, vnl.ZeroTerminated(table)))
		if chain != "" {
			req.AddData(vnl.NewRtAttr(unix.NFTA_RULE_CHAIN, vnl.ZeroTerminated(chain)))
		}
		return req.Execute(unix.NETLINK_NETFILTER, 0)
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list nftables rules of %s: %w", what, err)
	}
	var out [][]netlink.Attribute
	for _, m := range msgs {
		as, err := netlink.UnmarshalAttributes(m[min(vnl.SizeofNfgenmsg, len(m)):])
		if err != nil {
			return nil, fmt.Errorf("list nftables rules of %s: %w", what, err)
		}
		for i := range as {
			as[i].Type &= AttrTypeMask
		}
		out = append(out, as)
	}
	return out, nil
}

// AttrTypeMask is NLA_TYPE_MASK of linux/netlink.h.
const AttrTypeMask = 0x3fff

// RuleHandles lists the handles of a chain's rules, as Rules would.
//
// A rule with a map of its own can't be replaced in one transaction without a
// gap. Packets that are at the old rule keep to it, but the kernel takes the
// map's elements from them as soon as the new generation begins
// (nft_map_deactivate in net/netfilter/nf_tables_api.c): for less than a
// microsecond they find no element, and the rule does not match. So the new
// rule is put before the old ones, which are deleted by their handles, after a
// [Grace], when no packet can be at them any more.
func RuleHandles(family uint8, table, chain string) ([]uint64, error) {
	rules, err := Rules(family, table, chain)
	var out []uint64
	for _, as := range rules {
		for _, a := range as {
			if a.Type == unix.NFTA_RULE_HANDLE && len(a.Data) == 8 {
				out = append(out, binary.BigEndian.Uint64(a.Data))
			}
		}
	}
	return out, err
}

// Grace returns when every packet that was in the kernel's hands at the call has
// left its netfilter hook: the hooks run in RCU read-side critical sections, and
// membarrier(2) waits for all of these on every processor, 8 to 16 ms. A
// kernel without the call (CONFIG_MEMBARRIER, or nohz_full is in use) is not
// waited for: what it guards against takes less than a microsecond there.
func Grace() {
	_, _, _ = unix.Syscall(unix.SYS_MEMBARRIER, membarrierGlobal, 0, 0)
}

// membarrierGlobal is MEMBARRIER_CMD_GLOBAL of linux/membarrier.h.
const membarrierGlobal = 1
