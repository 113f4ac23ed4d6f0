package nl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// ErrOtherForm tells that a table can't become what is wanted while it stands.
var ErrOtherForm = errors.New("it has sets of another type, or is dormant")

// RuleTable is an nftables table to be written by [RuleTable.Replace].
type RuleTable struct {
	Family nftables.TableFamily
	Name   string
	Sets   []*nftables.Set // named ones; Table and ID are not read
	// Elements are those that sets of these names are to have, and no others. Of
	// sets that are not in it the elements stay as they are.
	Elements map[string][]nftables.SetElement
	Chains   []RuleChain
	// Keep tells which chains that are not in Chains stay as they are; nil: none.
	Keep func(name string) bool
}

// RuleChain is a chain of a [RuleTable].
type RuleChain struct {
	Name   string
	Type   nftables.ChainType
	Hook   *nftables.ChainHook // nil: it is jumped to
	Prio   int32
	Policy nftables.ChainPolicy
	Rules  []TableRule
}

// TableRule is a rule of a [RuleChain]; Exprs may have a [RawExpr].
type TableRule struct {
	Exprs    []expr.Any
	UserData []byte
}

// Replace makes a table of the calling thread's namespace as t says, while packets
// pass: at each hook they meet all of the old rules or all of the new, and sets keep
// their elements all the while. To delete the table and make it anew, even in one
// transaction, leaves packets for an instant without what its maps hold (see
// [RuleHandles]), and without elements for as long as it takes to put them again.
//
// Rules with a map of their own have to be replaced in another way. A set can't
// change its type: for that the error is [ErrOtherForm], and nothing was changed.
// So a version that wants another type gives the set another name.
func (t RuleTable) Replace() error {
	c, err := nftables.New(nftables.WithSockOptions(func(c *netlink.Conn) error {
		return errors.Join(c.SetWriteBuffer(4<<20), c.SetReadBuffer(4<<20))
	}))
	if err != nil {
		return fmt.Errorf("nftables socket: %w", err)
	}
	table := &nftables.Table{Family: t.Family, Name: t.Name}
	have, err := t.read(c)
	if err != nil {
		return err
	}
	if have.dormant {
		return ErrOtherForm
	}
	old, err := sets(c, table, have.there)
	if err != nil {
		return err
	}
	c.AddTable(table)
	for i, s := range t.Sets {
		ks := *s
		ks.Table, ks.ID = table, uint32(i+1)
		if o := old[s.Name]; o == nil {
			if err := c.AddSet(&ks, nil); err != nil {
				return fmt.Errorf("nftables table %s: set %s: %w", t.Name, s.Name, err)
			}
		} else if !sameType(o, &ks) {
			return ErrOtherForm
		}
		es, ok := t.Elements[s.Name]
		if !ok {
			continue
		}
		if old[s.Name] != nil {
			c.FlushSet(&ks)
		}
		for some := range slices.Chunk(es, 500) {
			if err := c.SetAddElements(&ks, some); err != nil {
				return fmt.Errorf("nftables table %s: set %s: %w", t.Name, s.Name, err)
			}
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("write sets of nftables table %s: %w", t.Name, err)
	}
	if err := t.writeChains(have.chains); err != nil {
		return fmt.Errorf("write nftables table %s: %w", t.Name, err)
	}
	// What only the old rules looked at. Something else's use of it is no reason
	// to fail.
	for name, s := range old {
		if !s.Anonymous && !slices.ContainsFunc(t.Sets, func(x *nftables.Set) bool { return x.Name == name }) {
			c.DelSet(&nftables.Set{Table: table, Name: name})
			_ = c.Flush()
		}
	}
	return nil
}

type tableState struct {
	there, dormant bool
	chains         []*nftables.Chain
}

func (t RuleTable) read(c *nftables.Conn) (tableState, error) {
	var out tableState
	tables, err := c.ListTablesOfFamily(t.Family)
	if err != nil {
		return out, fmt.Errorf("list nftables tables: %w", err)
	}
	for _, x := range tables {
		if x.Name == t.Name {
			out.there = true
			// The library leaves the flags in network order.
			out.dormant = binary.BigEndian.Uint32(binary.NativeEndian.AppendUint32(nil, x.Flags))&unix.NFT_TABLE_F_DORMANT != 0
		}
	}
	chains, err := c.ListChainsOfTableFamily(t.Family)
	if err != nil {
		return out, fmt.Errorf("list nftables chains: %w", err)
	}
	for _, x := range chains {
		if x.Table.Name == t.Name {
			out.chains = append(out.chains, x)
		}
	}
	return out, nil
}

func sets(c *nftables.Conn, table *nftables.Table, there bool) (map[string]*nftables.Set, error) {
	out := map[string]*nftables.Set{}
	if !there {
		return out, nil
	}
	list, err := c.GetSets(table)
	if err != nil {
		return nil, fmt.Errorf("list nftables sets of %s: %w", table.Name, err)
	}
	for _, s := range list {
		out[s.Name] = s
	}
	return out, nil
}

func sameType(a, b *nftables.Set) bool {
	if a.IsMap != b.IsMap || a.KeyType.GetNFTMagic() != b.KeyType.GetNFTMagic() || a.KeyType.Bytes != b.KeyType.Bytes ||
		a.Interval != b.Interval || a.HasTimeout != b.HasTimeout || a.Constant != b.Constant {
		return false
	}
	return !a.IsMap || a.DataType.GetNFTMagic() == b.DataType.GetNFTMagic() && a.DataType.Bytes == b.DataType.Bytes
}

// writeChains replaces chains and rules in one transaction.
func (t RuleTable) writeChains(have []*nftables.Chain) error {
	b := &ruleBatch{family: uint8(t.Family), table: t.Name}
	wanted := func(name string) *RuleChain {
		for i := range t.Chains {
			if t.Chains[i].Name == name {
				return &t.Chains[i]
			}
		}
		return nil
	}
	var gone []string
	for _, h := range have {
		w := wanted(h.Name)
		if w == nil && t.Keep != nil && t.Keep(h.Name) {
			continue
		}
		b.add(unix.NFT_MSG_DELRULE, 0, b.chain(h.Name)...) // all of the chain's
		if w == nil || !w.like(h) {
			gone = append(gone, h.Name)
		}
	}
	for _, name := range gone {
		b.add(unix.NFT_MSG_DELCHAIN, 0, b.name(name)...)
	}
	for _, ch := range t.Chains {
		as := b.name(ch.Name)
		if ch.Hook != nil {
			hook, err := netlink.MarshalAttributes([]netlink.Attribute{
				{Type: unix.NFTA_HOOK_HOOKNUM, Data: be32(uint32(*ch.Hook))},
				{Type: unix.NFTA_HOOK_PRIORITY, Data: be32(uint32(ch.Prio))},
			})
			if err != nil {
				return err
			}
			as = append(as,
				netlink.Attribute{Type: unix.NLA_F_NESTED | unix.NFTA_CHAIN_HOOK, Data: hook},
				netlink.Attribute{Type: unix.NFTA_CHAIN_POLICY, Data: be32(uint32(ch.Policy))},
				netlink.Attribute{Type: unix.NFTA_CHAIN_TYPE, Data: []byte(string(ch.Type) + "\x00")})
		}
		b.add(unix.NFT_MSG_NEWCHAIN, netlink.Create, as...)
	}
	for _, ch := range t.Chains {
		for i, r := range ch.Rules {
			exprs, err := encodeExprs(b.family, r.Exprs)
			if err != nil {
				return fmt.Errorf("chain %s, rule %d: %w", ch.Name, i, err)
			}
			b.add(unix.NFT_MSG_NEWRULE, netlink.Create|netlink.Append, append(b.chain(ch.Name),
				netlink.Attribute{Type: unix.NLA_F_NESTED | unix.NFTA_RULE_EXPRESSIONS, Data: exprs},
				netlink.Attribute{Type: unix.NFTA_RULE_USERDATA, Data: r.UserData})...)
		}
	}
	return b.send()
}

// like tells whether a chain that is there can become c.
func (c RuleChain) like(h *nftables.Chain) bool {
	if c.Hook == nil || h.Hooknum == nil {
		return c.Hook == nil && h.Hooknum == nil
	}
	return h.Type == c.Type && *h.Hooknum == *c.Hook && h.Priority != nil && int32(*h.Priority) == c.Prio
}

// ruleBatch is one transaction.
type ruleBatch struct {
	family uint8
	table  string
	msgs   []netlink.Message
	err    error
}

func (b *ruleBatch) name(chain string) []netlink.Attribute {
	return []netlink.Attribute{
		{Type: unix.NFTA_CHAIN_TABLE, Data: []byte(b.table + "\x00")},
		{Type: unix.NFTA_CHAIN_NAME, Data: []byte(chain + "\x00")},
	}
}

func (b *ruleBatch) chain(chain string) []netlink.Attribute {
	return []netlink.Attribute{
		{Type: unix.NFTA_RULE_TABLE, Data: []byte(b.table + "\x00")},
		{Type: unix.NFTA_RULE_CHAIN, Data: []byte(chain + "\x00")},
	}
}

func (b *ruleBatch) add(msg int, flags netlink.HeaderFlags, as ...netlink.Attribute) {
	body, err := netlink.MarshalAttributes(as)
	if b.err == nil {
		b.err = err
	}
	b.msgs = append(b.msgs, netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | msg), Flags: netlink.Request | flags},
		// nfgenmsg: family, version, resource (linux/netfilter/nfnetlink.h).
		Data: append([]byte{b.family, unix.NFNETLINK_V0, 0, 0}, body...),
	})
}

func (b *ruleBatch) send() error {
	if b.err != nil || len(b.msgs) == 0 {
		return b.err
	}
	// The kernel answers what fails, and this, in order: the first answer tells.
	b.msgs[len(b.msgs)-1].Header.Flags |= netlink.Acknowledge
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := errors.Join(c.SetWriteBuffer(4<<20), c.SetReadBuffer(4<<20)); err != nil {
		return err
	}
	mark := []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, unix.NFNL_SUBSYS_NFTABLES}
	batch := append([]netlink.Message{{Header: netlink.Header{Type: unix.NFNL_MSG_BATCH_BEGIN, Flags: netlink.Request}, Data: mark}}, b.msgs...)
	batch = append(batch, netlink.Message{Header: netlink.Header{Type: unix.NFNL_MSG_BATCH_END, Flags: netlink.Request}, Data: mark})
	if _, err := c.SendMessages(batch); err != nil {
		return err
	}
	_, err = c.Receive()
	return err
}

func be32(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }
