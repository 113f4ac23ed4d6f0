package vxlan

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/overlay"
	"github.com/shoalnet/shoal/spec"
)

// formVersion is part of every rule's comment: another form of the rules is
// another version, and what an older agent left is rewritten.
const formVersion = 1

// table names one nftables table.
type table struct {
	family nftables.TableFamily
	name   string
}

var (
	filterTable   = table{nftables.TableFamilyINet, overlay.FilterTable}
	redirectTable = table{nftables.TableFamilyIPv4, overlay.TaskTable}
)

// ruleset is the whole of a table. Writing it replaces all rules in one
// transaction; packets see the old ones or the new.
type ruleset struct {
	table
	sets   []set
	chains []chain
}

type set struct {
	name  string
	key   nftables.SetDatatype
	elems [][]byte
}

type chain struct {
	name   string
	typ    nftables.ChainType
	hook   *nftables.ChainHook
	prio   int32
	policy nftables.ChainPolicy
	rules  []rule
}

// rule is a rule with its text as nft(8) would have it, for the digest.
type rule struct {
	text  string
	exprs []expr.Any
	why   string // it drops or refuses, and counts: see because
}

// digest is what all comments of the rule set carry.
func (r ruleset) digest() string {
	h := sha256.New()
	fmt.Fprintln(h, formVersion, r.family, r.name)
	for _, s := range r.sets {
		fmt.Fprintln(h, "set", s.name, s.key.Name)
	}
	for _, c := range r.chains {
		fmt.Fprintln(h, "chain", c.name, c.typ, *c.hook, c.prio, c.policy)
		for _, x := range c.rules {
			fmt.Fprintln(h, x.text)
		}
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}

func comment(digest string, c chain, i int) string {
	says := "shoal " + digest + " " + c.name + " " + strconv.Itoa(i)
	if why := c.rules[i].why; why != "" {
		says += reasonMark + why
	}
	return says
}

// nftConn reads nftables in the calling thread's namespace, through one socket.
type nftConn struct {
	c      *nftables.Conn
	chains map[nftables.TableFamily][]*nftables.Chain
}

func dialNFT() (*nftConn, error) {
	c, err := nftables.New(nftables.AsLasting(), nftables.WithSockOptions(sockOptions))
	if err != nil {
		return nil, fmt.Errorf("nftables socket: %w", err)
	}
	return &nftConn{c: c, chains: map[nftables.TableFamily][]*nftables.Chain{}}, nil
}

func (n *nftConn) close() { _ = n.c.CloseLasting() }

// sockOptions make room for the answers to each message of a transaction, which
// come all at once.
func sockOptions(c *netlink.Conn) error {
	if err := c.SetWriteBuffer(4 << 20); err != nil {
		return err
	}
	return c.SetReadBuffer(4 << 20)
}

// list returns the chains of a table.
func (n *nftConn) list(t table) ([]*nftables.Chain, error) {
	all, ok := n.chains[t.family]
	if !ok {
		var err error
		if all, err = n.c.ListChainsOfTableFamily(t.family); err != nil {
			return nil, fmt.Errorf("list nftables chains: %w", err)
		}
		n.chains[t.family] = all
	}
	var out []*nftables.Chain
	for _, c := range all {
		if c.Table.Name == t.name {
			out = append(out, c)
		}
	}
	return out, nil
}

// dormant is NFT_TABLE_F_DORMANT of linux/netfilter/nf_tables.h: no chain of the
// table is asked. It comes in network order, which the library takes for its own.
var dormant = native.Uint32([]byte{0, 0, 0, 1})

// check tells what is wrong with the table; present is whether it has any chain.
func (n *nftConn) check(r ruleset) (fault string, present bool, err error) {
	chains, err := n.list(r.table)
	if err != nil || len(chains) == 0 {
		return "absent", false, err
	}
	tables, err := n.c.ListTablesOfFamily(r.family)
	if err != nil {
		return "", true, fmt.Errorf("list nftables tables: %w", err)
	}
	if slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == r.name && t.Flags&dormant != 0 }) {
		return "is dormant", true, nil
	}
	if len(chains) != len(r.chains) {
		return "has other chains", true, nil
	}
	t, err := n.c.ListTableOfFamily(r.name, r.family)
	if err != nil {
		return "", true, fmt.Errorf("look up nftables table %s: %w", r.name, err)
	}
	// The library leaves the flags in network order.
	if binary.BigEndian.Uint32(binary.NativeEndian.AppendUint32(nil, t.Flags))&unix.NFT_TABLE_F_DORMANT != 0 {
		return "is dormant", true, nil
	}
	digest := r.digest()
	for _, want := range r.chains {
		var have *nftables.Chain
		for _, c := range chains {
			if c.Name == want.name {
				have = c
			}
		}
		if have == nil {
			return "chain " + want.name + " is missing", true, nil
		}
		if have.Type != want.typ || have.Hooknum == nil || *have.Hooknum != *want.hook || have.Priority == nil ||
			int32(*have.Priority) != want.prio || have.Policy == nil || *have.Policy != want.policy {
			return "chain " + want.name + " has another hook or policy", true, nil
		}
		rules, err := n.c.GetRules(&nftables.Table{Family: r.family, Name: r.name}, have)
		if err != nil {
			return "", true, fmt.Errorf("list nftables rules of %s: %w", r.name, err)
		}
		if len(rules) != len(want.rules) {
			return "chain " + want.name + " has other rules", true, nil
		}
		for i, x := range rules {
			if c, _ := userdata.GetString(x.UserData, userdata.TypeComment); c != comment(digest, want, i) {
				return "chain " + want.name + " has other rules", true, nil
			}
		}
	}
	return "", true, nil
}

// elems reads the keys of a set; ok is false when the set does not exist.
func (n *nftConn) elems(t table, name string) (keys [][]byte, ok bool, err error) {
	tab := &nftables.Table{Family: t.family, Name: t.name}
	sets, err := n.c.GetSets(tab)
	if err != nil {
		return nil, false, fmt.Errorf("list nftables sets of %s: %w", t.name, err)
	}
	for _, s := range sets {
		if s.Name != name {
			continue
		}
		es, err := n.c.GetSetElements(s)
		if err != nil {
			return nil, false, fmt.Errorf("list nftables set %s: %w", name, err)
		}
		for _, e := range es {
			keys = append(keys, e.Key)
		}
		return keys, true, nil
	}
	return nil, false, nil
}

// tx opens a connection that sends what is buffered in one transaction. Sets
// carry IDs of our own: the library's come from a variable of its package that
// nothing guards, and other parts of the agent use nftables at the same time.
func tx() (*nftables.Conn, error) {
	c, err := nftables.New(nftables.WithSockOptions(sockOptions))
	if err != nil {
		return nil, fmt.Errorf("nftables socket: %w", err)
	}
	return c, nil
}

// write makes the table, or makes one that stands into it without a gap. The
// elements of a set that the rule set has none for stay as they are.
func (r ruleset) write() error {
	digest := r.digest()
	t := nl.RuleTable{Family: r.family, Name: r.name, Elements: map[string][]nftables.SetElement{}}
	for _, s := range r.sets {
		t.Sets = append(t.Sets, &nftables.Set{Name: s.name, KeyType: s.key})
		t.Elements[s.name] = elements(s.elems)
	}
	for _, ch := range r.chains {
		c := nl.RuleChain{Name: ch.name, Type: ch.typ, Hook: ch.hook, Prio: ch.prio, Policy: ch.policy}
		for i, x := range ch.rules {
			c.Rules = append(c.Rules, nl.TableRule{Exprs: x.exprs, UserData: userdata.AppendString(nil, userdata.TypeComment, comment(digest, ch, i))})
		}
		t.Chains = append(t.Chains, c)
	}
	err := t.Replace()
	if err != nil && !errors.Is(err, unix.EPERM) {
		// What stands is none of ours, in whatever form.
		if derr := delTable(r.table); derr != nil {
			return errors.Join(err, derr)
		}
		err = t.Replace()
	}
	return err
}

func elements(keys [][]byte) []nftables.SetElement {
	out := make([]nftables.SetElement, len(keys))
	for i, k := range keys {
		out[i].Key = k
	}
	return out
}

// delTable deletes a table; one that is absent is no error.
func delTable(t table) error {
	c, err := tx()
	if err != nil {
		return err
	}
	kt := &nftables.Table{Family: t.family, Name: t.name}
	c.AddTable(kt)
	c.DelTable(kt)
	if err := c.Flush(); err != nil {
		return fmt.Errorf("delete nftables table %s: %w", t.name, err)
	}
	return nil
}

// ---- expressions ----

// r joins matches and statements to a rule.
func r(parts ...rule) rule {
	var out rule
	for _, p := range parts {
		out.text += p.text + " "
		out.exprs = append(out.exprs, p.exprs...)
		out.why += p.why
	}
	return out
}

// ifname matches a device's name; one ending in * by its beginning.
func ifname(in bool, name string, eq bool) rule {
	key, word := expr.MetaKeyOIFNAME, "oifname"
	if in {
		key, word = expr.MetaKeyIIFNAME, "iifname"
	}
	op, text := expr.CmpOpEq, ""
	if !eq {
		op, text = expr.CmpOpNeq, "!= "
	}
	data := ifKey(name)
	if p, ok := strings.CutSuffix(name, "*"); ok {
		data = []byte(p) // nft(8): a wildcard compares only so much
	}
	return rule{text: fmt.Sprintf("%s %s%q", word, text, name), exprs: []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: op, Register: 1, Data: data},
	}}
}

func iif(name string) rule    { return ifname(true, name, true) }
func iifNot(name string) rule { return ifname(true, name, false) }
func oif(name string) rule    { return ifname(false, name, true) }
func oifNot(name string) rule { return ifname(false, name, false) }

// ifKey is a device's name as a set's key: IFNAMSIZ octets.
func ifKey(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

func nfproto(v6 bool) rule {
	p, name := byte(unix.NFPROTO_IPV4), "ipv4"
	if v6 {
		p, name = unix.NFPROTO_IPV6, "ipv6"
	}
	return rule{text: "meta nfproto " + name, exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{p}},
	}}
}

// loadSrc loads the source address of the IP header (RFC 791, RFC 8200).
func loadSrc(v6 bool, reg uint32) expr.Any {
	off, length := uint32(12), uint32(4)
	if v6 {
		off, length = 8, 16
	}
	return &expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: off, Len: length}
}

// loadDst loads the destination address.
func loadDst(v6 bool, reg uint32) expr.Any {
	off, length := uint32(16), uint32(4)
	if v6 {
		off, length = 24, 16
	}
	return &expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: off, Len: length}
}

// saddr matches sources in a prefix, daddr destinations.
func saddr(p netip.Prefix) rule { return addrIn("saddr", loadSrc(p.Addr().Is6(), 1), p) }
func daddr(p netip.Prefix) rule { return addrIn("daddr", loadDst(p.Addr().Is6(), 1), p) }

func addrIn(what string, load expr.Any, p netip.Prefix) rule {
	v6 := p.Addr().Is6()
	length := uint32(p.Addr().BitLen() / 8)
	x := nfproto(v6)
	return rule{text: x.text + " " + what + " " + p.String(), exprs: append(x.exprs,
		load,
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: length, Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen()), Xor: make([]byte, length)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: p.Masked().Addr().AsSlice()},
	)}
}

// saddrIn matches sources that are in a set.
func saddrIn(setName string) rule {
	x := nfproto(false)
	return rule{text: x.text + " saddr @" + setName, exprs: append(x.exprs,
		loadSrc(false, 1),
		&expr.Lookup{SourceRegister: 1, SetName: setName},
	)}
}

// unguarded matches packets whose (device, source) is not in a set. Register 1
// has the name's 16 octets, the address follows it in register 2.
func unguarded(v6 bool, setName string) rule {
	x := nfproto(v6)
	return rule{text: x.text + " iifname . saddr != @" + setName, exprs: append(x.exprs,
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
		loadSrc(v6, 2),
		&expr.Lookup{SourceRegister: 1, SetName: setName, Invert: true},
	)}
}

// ifIn matches packets from (or to) a device that is in a set.
func ifIn(in bool, setName string) rule {
	key, word := expr.MetaKeyOIFNAME, "oifname"
	if in {
		key, word = expr.MetaKeyIIFNAME, "iifname"
	}
	return rule{text: word + " @" + setName, exprs: []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Lookup{SourceRegister: 1, SetName: setName},
	}}
}

// ct matches when a conntrack property has one of the given bits.
func ct(text string, key expr.CtKey, bits uint32) rule {
	b := make([]byte, 4)
	native.PutUint32(b, bits)
	return rule{text: text, exprs: []expr.Any{
		&expr.Ct{Key: key, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: b, Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}}
}

// published matches packets that package ingress marked: those of published
// ports, which have foreign addresses.
func published() rule {
	u32 := func(v uint32) []byte { return native.AppendUint32(nil, v) }
	return rule{text: "meta mark of a node", exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: u32(spec.MarkKindMask), Xor: u32(0)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: u32(spec.NodeMarkBase)},
	}}
}

// ipsDstNAT is IPS_DST_NAT of linux/netfilter/nf_conntrack_common.h.
const ipsDstNAT = 1 << 5

func ctEstablished() rule {
	return ct("ct state established,related", expr.CtKeySTATE, expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED)
}
func ctDNAT() rule { return ct("ct status dnat", expr.CtKeySTATUS, ipsDstNAT) }

var (
	accept = rule{text: "accept", exprs: []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}}
	drop   = rule{text: "drop", exprs: []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}}}
	// reject says "administratively prohibited" by ICMP, of either family.
	reject  = rule{text: "reject with icmpx admin-prohibited", exprs: []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED}}}
	notrack = rule{text: "notrack", exprs: []expr.Any{&expr.Notrack{}}}
	masq    = rule{text: "masquerade", exprs: []expr.Any{&expr.Masq{}}}
	// masqPorts leaves a task none of the ports below the ephemeral ones. A task chooses the port that it sends from,
	// and a plain masquerade keeps it: one that sends from the port of an agent,
	// or from a published port, to where a client's next connection will come
	// from, would have what that client sends translated to itself, as the answer.
	masqPorts = rule{text: "masquerade to :32768-65535", exprs: nl.MasqHigh(1, false)}
)

// tooBig matches what says that a packet was too big: ICMP's destination
// unreachable, fragmentation needed (RFC 792), or ICMPv6's packet too big (RFC 4443).
func tooBig(v6 bool) rule {
	x, proto, head := nfproto(v6), byte(unix.IPPROTO_ICMP), []byte{3, 4}
	if v6 {
		proto, head = unix.IPPROTO_ICMPV6, []byte{2}
	}
	return rule{text: fmt.Sprint(x.text, " icmp ", head), exprs: append(x.exprs,
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{proto}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Len: uint32(len(head))},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: head},
	)}
}

const (
	prioFragment = -450 // NF_IP_PRI_RAW_BEFORE_DEFRAG
	prioRaw      = -300 // NF_IP_PRI_RAW, linux/netfilter_ipv4.h, and so on
	prioMangle   = -150
	prioFilter   = 0
	prioSrcNAT   = 100
	prioSelf     = 200 // after IPVS, which takes the errors of its connections here at 98 and 99
	prioAfterNAT = 300
	prioDstNAT   = -100
)

// ---- the ovns ----

const (
	setGuard  = "guard"
	setGuard6 = "guard6"
	setLocals = "locals"
)

var (
	guardType  = nftables.MustConcatSetType(nftables.TypeIFName, nftables.TypeIPAddr)
	guard6Type = nftables.MustConcatSetType(nftables.TypeIFName, nftables.TypeIP6Addr)
)

var unspecified6 = netip.PrefixFrom(netip.IPv6Unspecified(), 128)

// linkLocal6 is RFC 4291's. Each such address is a neighbour on the task's device.
var linkLocal6 = netip.MustParsePrefix("fe80::/10")

// filterRules is the table of an ovns.
//
// The chain "source" drops what a task sends with an address that isn't its
// own, before conntrack or a VIP can see it, each fragment before it is joined
// with another task's to a packet that comes from that one's device; and what it
// sends to link-local IPv6 addresses, which the ovns would ask for and remember.
// "entry" does so for what other nodes send with an address that isn't of the
// network, but for replies.
// "forward" lets through what is within the network, and between a local task
// and the way out. Both let through what package ingress marked as belonging to
// a published port. "leak" stops what conntrack would not translate, such as the
// late RST of a forgotten connection, from leaving with a task's own address.
//
// "self" has the ovns itself believe nobody that a packet was too big. It makes
// no connections. What it says to others, a task could quote as its answer to
// another task (icmp_err in net/ipv4/icmp.c asks for no more), and it would
// forward to that one nothing larger for ten minutes (net.ipv4.route.mtu_expires).
// Errors of connections, VIPs' among them, are forwarded.
//
// An internal network's table uses no conntrack, so that its packets need not
// be tracked where the VIP data path doesn't.
func filterRules(o overlay.Filter) ruleset {
	task := overlay.PortPrefix + "*"
	vx, out := overlay.VXLANDev, overlay.OutDev
	entry := []rule{r(iifNot(vx), accept)}
	for _, p := range overlay.ParsePrefixes(o.Subnets) {
		entry = append(entry, r(saddr(p), accept))
	}
	if o.Out {
		entry = append(entry, r(published(), accept), r(ctEstablished(), accept))
	}
	entry = append(entry, r(because(whyForeign, drop)))
	forward := []rule{
		r(iif(task), oif(task), accept),
		r(iif(task), oif(vx), accept),
		r(iif(vx), oif(task), accept),
	}
	rs := ruleset{table: filterTable,
		sets: []set{{name: setGuard, key: guardType}, {name: setGuard6, key: guard6Type}, {name: setLocals, key: nftables.TypeIPAddr}},
	}
	if o.Out {
		forward = append(forward,
			r(iif(task), oif(out), accept),
			r(iif(out), oif(task), ctEstablished(), accept),
			r(published(), accept),
		)
	}
	forward = append(forward, r(because(whyForward, drop))) // as the policy, but counted
	source := []rule{
		r(iif(task), unguarded(false, setGuard), because(whySpoofed, drop)),
		// The task's kernel says such things by itself, as it does to each link.
		r(iif(task), saddr(linkLocal6), because(whyNeighbour, drop)),
		r(iif(task), saddr(unspecified6), because(whyNeighbour, drop)),
		r(iif(task), unguarded(true, setGuard6), because(whySpoofed, drop)),
		r(iif(task), daddr(linkLocal6), because(whyNeighbour, drop)),
	}
	if o.Alone != "" {
		// Each node stops its own tasks, before a VIP can see them. What a
		// published port's client sent comes from elsewhere, and goes elsewhere.
		for _, p := range overlay.ParsePrefixes(o.Alone) {
			source = append(source, r(iif(task), daddr(p), accept))
		}
		for _, p := range overlay.ParsePrefixes(o.Subnets) {
			source = append(source, r(iif(task), daddr(p), because(whyAlone, drop)))
		}
	}
	rs.chains = []chain{
		{"source", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, prioFragment, nftables.ChainPolicyAccept, source},
		{"entry", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, prioMangle - 1, nftables.ChainPolicyAccept, entry},
		{"forward", nftables.ChainTypeFilter, nftables.ChainHookForward, prioFilter, nftables.ChainPolicyDrop, forward},
		{"self", nftables.ChainTypeFilter, nftables.ChainHookInput, prioSelf, nftables.ChainPolicyAccept, []rule{
			r(tooBig(false), because(whyTooBig, drop)),
			r(tooBig(true), because(whyTooBig, drop)),
		}},
	}
	if o.Out {
		rs.chains = append(rs.chains,
			chain{"way-out", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, prioSrcNAT, nftables.ChainPolicyAccept, []rule{
				r(oif(out), nfproto(false), masqPorts),
				r(oif(out), nfproto(false), masq),
			}},
			chain{"leak", nftables.ChainTypeFilter, nftables.ChainHookPostrouting, prioAfterNAT, nftables.ChainPolicyAccept, []rule{
				r(oif(out), saddrIn(setLocals), because(whyLeak, drop)),
			}})
	}
	return rs
}

// readFilter reads an ovns's table and the guards in it; is is nil where it is
// absent. Where the table is wrong its guards still count: writing it anew keeps
// them.
func readFilter(c *nftConn, o overlay.Filter) (is *overlay.Filter, whole, parts []guard, err error) {
	fault, present, err := c.check(filterRules(o))
	if err != nil || !present {
		return nil, nil, nil, err
	}
	o.Fault = fault
	whole, parts, complete, err := readGuards(c)
	if !complete && o.Fault == "" {
		o.Fault = "sets are missing"
	}
	return &o, whole, parts, err
}

// readGuards reads the guards. One that is not in all the sets that it belongs in
// is in parts.
func readGuards(c *nftConn) (whole, parts []guard, complete bool, err error) {
	locals := map[netip.Addr]bool{}
	keys, ok, err := c.elems(filterTable, setLocals)
	if err != nil || !ok {
		return nil, nil, false, err
	}
	for _, k := range keys {
		if a, ok := netip.AddrFromSlice(k); ok {
			locals[a] = true
		}
	}
	guarded := map[netip.Addr]bool{}
	for _, name := range []string{setGuard, setGuard6} {
		keys, ok, err := c.elems(filterTable, name)
		if err != nil || !ok {
			return nil, nil, false, err
		}
		for _, k := range keys {
			if len(k) < unix.IFNAMSIZ {
				continue
			}
			dev, _, _ := bytes.Cut(k[:unix.IFNAMSIZ], []byte{0})
			a, ok := netip.AddrFromSlice(k[unix.IFNAMSIZ:])
			if !ok {
				continue
			}
			guarded[a] = true
			if g := (guard{string(dev), a}); a.Is4() && !locals[a] {
				parts = append(parts, g)
			} else {
				whole = append(whole, g)
			}
		}
	}
	for a := range locals {
		if !guarded[a] {
			parts = append(parts, guard{"", a})
		}
	}
	return whole, parts, true, nil
}

// guard is what the sets say of one address.
type guard struct {
	dev  string
	addr netip.Addr
}

func (g guard) in(netns string) overlay.Guard {
	return overlay.Guard{Netns: netns, Dev: g.dev, Addr: g.addr}
}

// putFilter writes the table with the guards it has.
func putFilter(o overlay.Filter) error {
	rs := filterRules(o)
	c, err := dialNFT()
	if err != nil {
		return err
	}
	defer c.close()
	chains, err := c.list(filterTable)
	if err != nil {
		return err
	}
	if len(chains) > 0 {
		whole, _, _, err := readGuards(c)
		if err != nil {
			return err
		}
		for _, g := range whole {
			for i := range rs.sets {
				if k := guardKey(g.in(o.Netns), rs.sets[i].name); k != nil {
					rs.sets[i].elems = append(rs.sets[i].elems, k)
				}
			}
		}
	}
	return rs.write()
}

// guardKey is a guard's element of a set, nil if it has none in that.
func guardKey(g overlay.Guard, setName string) []byte {
	switch {
	case setName == setGuard && g.Addr.Is4(), setName == setGuard6 && g.Addr.Is6():
		return append(ifKey(g.Dev), g.Addr.AsSlice()...)
	case setName == setLocals && g.Addr.Is4():
		return g.Addr.AsSlice()
	}
	return nil
}

func guardSets() []*nftables.Set {
	t := &nftables.Table{Family: filterTable.family, Name: filterTable.name}
	return []*nftables.Set{
		{Table: t, Name: setGuard, KeyType: guardType},
		{Table: t, Name: setGuard6, KeyType: guard6Type},
		{Table: t, Name: setLocals, KeyType: nftables.TypeIPAddr},
	}
}

// putGuard adds a guard to its sets; one that is there is no error.
func putGuard(o overlay.Guard) error {
	c, err := tx()
	if err != nil {
		return err
	}
	for _, s := range guardSets() {
		if k := guardKey(o, s.Name); k != nil {
			if err := c.SetAddElements(s, elements([][]byte{k})); err != nil {
				return fmt.Errorf("%s: %w", o, err)
			}
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("add %s: %w", o, err)
	}
	return nil
}

// delGuard removes a guard. Its address leaves the locals as well, unless
// another device has it by now.
func delGuard(o overlay.Guard) error {
	r, err := dialNFT()
	if err != nil {
		return err
	}
	defer r.close()
	keys, ok, err := r.elems(filterTable, setGuard)
	if err != nil || !ok {
		return err
	}
	elsewhere := false
	for _, k := range keys {
		if len(k) > unix.IFNAMSIZ && bytes.Equal(k[unix.IFNAMSIZ:], o.Addr.AsSlice()) && !bytes.Equal(k, guardKey(o, setGuard)) {
			elsewhere = true
		}
	}
	c, err := tx()
	if err != nil {
		return err
	}
	locals, _, err := r.elems(filterTable, setLocals)
	if err != nil {
		return err
	}
	for _, s := range guardSets() {
		k := guardKey(o, s.Name)
		// Deleting what a set lacks would fail the transaction.
		there := keys
		if s.Name == setLocals {
			there = locals
		}
		if k == nil || s.Name == setLocals && elsewhere ||
			s.Name != setGuard6 && !slices.ContainsFunc(there, func(x []byte) bool { return bytes.Equal(x, k) }) {
			continue
		}
		if err := c.SetDeleteElements(s, elements([][]byte{k})); err != nil {
			return fmt.Errorf("%s: %w", o, err)
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("delete %s: %w", o, err)
	}
	return nil
}

// ---- the task ----

// redirectRules sends what a task asks 127.0.0.11:53 to the port where its
// resolver listens, so that the task itself can have port 53 on all addresses.
//
// To translate an address the kernel tracks connections, all that the namespace
// has. Those that are not loopback's are translated by nobody in here: they are
// spared it, which is an eighth of the cost of a short connection. (IPv6 is not
// tracked, as nothing asks for it.)
func redirectRules(port uint16) ruleset {
	var rules []rule
	for _, proto := range []struct {
		name string
		num  byte
	}{{"udp", unix.IPPROTO_UDP}, {"tcp", unix.IPPROTO_TCP}} {
		rules = append(rules, rule{
			text: fmt.Sprintf("ip daddr %s %s dport 53 dnat to %s:%d", overlay.DNSAddr, proto.name, overlay.DNSAddr, port),
			exprs: []expr.Any{
				&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 4},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: overlay.DNSAddr.AsSlice()},
				&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{proto.num}},
				&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0, 53}},
				&expr.Immediate{Register: 1, Data: overlay.DNSAddr.AsSlice()},
				&expr.Immediate{Register: 2, Data: []byte{byte(port >> 8), byte(port)}},
				&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1, RegProtoMin: 2},
			},
		})
	}
	return ruleset{table: redirectTable, chains: []chain{
		{"output", nftables.ChainTypeNAT, nftables.ChainHookOutput, prioDstNAT, nftables.ChainPolicyAccept, rules},
		{"untracked-in", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, prioRaw, nftables.ChainPolicyAccept, []rule{r(iifNot("lo"), notrack)}},
		{"untracked-out", nftables.ChainTypeFilter, nftables.ChainHookOutput, prioRaw, nftables.ChainPolicyAccept, []rule{r(oifNot("lo"), notrack)}},
	}}
}

func observeRedirect(c *nftConn, o overlay.Redirect) (*overlay.Redirect, error) {
	fault, present, err := c.check(redirectRules(o.Port))
	if err != nil || !present {
		return nil, err
	}
	o.Fault = fault
	return &o, nil
}

func putRedirect(o overlay.Redirect) error { return redirectRules(o.Port).write() }
