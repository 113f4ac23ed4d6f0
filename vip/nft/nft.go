// Package nft is the VIP data path of nftables: NAT with connection tracking,
// on every kernel that has nf_tables, nf_nat and nf_conntrack.
//
// What it keeps in each overlay namespace, per address family (as nft(8) lists it):
//
//	table ip shoal-vip {
//	  map vips    { type ipv4_addr : verdict        ; elements = { 10.0.1.2 : goto vip-10.0.1.2 } }
//	  set leaving { type ipv4_addr . ipv4_addr      ; elements = { 10.0.1.2 . 10.0.1.12 } }
//	  set hairpin { type ipv4_addr . ipv4_addr      ; elements = { 10.0.1.10 . 10.0.1.10 } }
//	  chain prerouting  { type nat hook prerouting priority dstnat;
//	    meta l4proto { tcp, udp, sctp } ip daddr vmap @vips }
//	  chain postrouting { type nat hook postrouting priority srcnat;
//	    ct status dnat ip saddr . ip daddr @hairpin snat to 169.254.1.1 }
//	  chain input       { type filter hook input priority filter;
//	    meta l4proto udp  ip daddr 10.0.1.0/24 ip daddr != 10.0.1.1 reject with icmp port-unreachable
//	    sctp chunk init   ip daddr 10.0.1.0/24 ip daddr != 10.0.1.1 reject with icmp prot-unreachable }
//	  chain vip-10.0.1.2 { dnat to numgen inc mod 2 map { 0 : 10.0.1.10, 1 : 10.0.1.11 } comment "…digest…" }
//	}
//
// # Why this form
//
// Round robin has to be exact for each service, also when a client calls
// several in turn. One counter for all services (a single rule over one big
// map) would correlate them: two services called alternately would each see
// every second value. So each service has its own rule, and thereby its own
// counter, reached by one hash lookup whatever the number of services. A fixed
// number of slots that does not divide by the number of backends is uneven;
// here the modulus is the number of backends.
//
// The backends are an anonymous map inside the rule, not elements of a shared
// one. Such a map can't be changed, only be replaced with its rule, hence: a
// digest of the backends in the rule's comment says reliably what the rule does,
// which makes observing 2,000 services a matter of reading 2,000 comments. Only
// where the digest is not the wanted one is the map itself read.
//
// The new rule is put before what was there, and that is deleted only when no
// packet can be at it any more: packets see the old or the new, never neither.
// In one transaction, as it was at first, the kernel takes the old map's
// elements from packets that are at the old rule: at 40,000 new flows a second,
// one in a hundred changes refused one (see nl.RuleHandles).
//
// # Draining and removal
//
// A connection, once tracked, does not look at the rules again. So a draining
// backend just isn't in the map any more; it is remembered in the set leaving,
// because what is observed must come from the kernel: it is how the removal,
// later or by another agent process, knows that this backend may still have
// connections. A removed backend passes through leaving as well: out of the map
// and into leaving in one transaction, then its conntrack entries are deleted,
// then it leaves leaving. A crash in between is seen as a draining backend that
// nobody wants, and is finished.
//
// Deleting the entry of a TCP connection resets it: its next packet is tracked
// as new (nf_conntrack_tcp_loose), goes to another backend, and that one
// answers RST. A UDP flow continues at another backend. SCTP is not tracked from
// the middle: the next packet reaches the local stack, which aborts.
//
// A VIP that gets its first backend has the opposite problem: a UDP client that
// kept sending to it while it refused would be tracked as untranslated, and be
// refused for as long as it sends. Chain input sees to it that no such entry is
// made: a packet rejected there, where the local stack would have refused it,
// is never confirmed as a connection. (Deleting the entries when a VIP opens
// was tried: reading the conntrack table walks its every bucket, 10 ms for each
// VIP, which made loading 2,000 services take 30 s.) TCP needs no such help: a
// new SYN replaces the entry of a refused one. SCTP over IPv6 can't be rejected
// in a way that its clients understand (see refusals): there the local stack
// aborts the association, and its entry is forgotten after 10 s (nf_conntrack's
// "closed"); a client that uses the same source port again within these may be
// refused again.
//
// # One source port, used both directly and by the VIP
//
// is no collision here: both are tracked, and the kernel moves the source port
// of the second connection when the server could not tell the two apart. The
// server sees the client's address either way.
//
// # What an update costs
//
// With 2,000 services of 10 backends, on 2 processors with 6.18: one backend
// added 44 ms, one removed 48 to 60 ms with its connections (which takes a walk
// of the conntrack table), 8 to 16 ms of both the wait for packets under way;
// one of each service removed, as when a node dies, 2.9 s (with -race 4.2 s, and
// 70 s one by one); observing all 0.1 s, everything into an empty namespace 3 s.
package nft

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/reconcile"
	"github.com/shoalnet/shoal/vip"
	"github.com/shoalnet/shoal/vip/internal/kern"
)

const (
	mapVIPs    = "vips"
	setLeaving = "leaving"
	setHairpin = "hairpin"

	// formVersion is part of every comment: another form of the rules is
	// another version, and what an older agent left is rewritten.
	formVersion = 1
)

var (
	pre  = kern.Base{Name: "prerouting", Type: nftables.ChainTypeNAT, Hook: nftables.ChainHookPrerouting, Prio: nftables.ChainPriorityNATDest}
	in   = kern.Base{Name: "input", Type: nftables.ChainTypeFilter, Hook: nftables.ChainHookInput, Prio: nftables.ChainPriorityFilter}
	post = kern.Base{Name: "postrouting", Type: nftables.ChainTypeNAT, Hook: nftables.ChainHookPostrouting, Prio: nftables.ChainPriorityNATSource}
)

// Config of a Dataplane. The zero value is ready.
type Config struct {
	Log *slog.Logger // nil: slog.Default
	// Notices tell what changed since it was read. nil: everything is read in
	// every Observe.
	Notices *nl.Notices
}

// Dataplane implements vip.Dataplane. It holds no sockets, so that a namespace can
// go at any time. Its methods may be called from one goroutine at a time.
type Dataplane struct {
	log     *slog.Logger
	notices *nl.Notices
	read    map[string]*reading // by namespace
}

// reading is what was last read of a namespace, and of what.
type reading struct {
	stamp nl.Stamp
	due   time.Time   // when it is read again, noticed or not
	have  vip.Network // without what its sysctls say
}

// sweepPeriod is how long what was read counts without a notice.
const sweepPeriod = 20 * time.Second

var _ vip.Dataplane = (*Dataplane)(nil)

// New makes a Dataplane. Whether the kernel can do it is told by [Probe].
func New(cfg Config) *Dataplane {
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	return &Dataplane{log: cfg.Log, notices: cfg.Notices, read: map[string]*reading{}}
}

// Name implements vip.Dataplane.
func (*Dataplane) Name() string { return "nft" }

// Observe implements vip.Dataplane.
func (d *Dataplane) Observe(ctx context.Context, want vip.State) (vip.State, error) {
	var out vip.State
	known := map[string]bool{}
	now := time.Now()
	for _, w := range want.Networks {
		known[w.Namespace] = true
		if err := ctx.Err(); err != nil {
			return out, err
		}
		h, err := d.observe(w, now)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			h = vip.Network{ID: w.ID, Name: w.Name, Namespace: w.Namespace, Absent: true}
		case err != nil:
			return out, fmt.Errorf("network %s: %w", w.Name, err)
		}
		out.Networks = append(out.Networks, h)
	}
	maps.DeleteFunc(d.read, func(ns string, _ *reading) bool { return !known[ns] })
	return out, nil
}

// observe reads a network's namespace, or what was read of it while no notice came
// and no other was wanted.
func (d *Dataplane) observe(w vip.Network, now time.Time) (vip.Network, error) {
	stamp, ok := d.notices.At(w.Namespace, kern.Table)
	r := d.read[w.Namespace]
	delete(d.read, w.Namespace)
	fault := ""
	sysctls := func() {
		// Of these the kernel sends no notice.
		if fault = kern.ICMPFault(w); fault == "" {
			fault = kern.IdleFault()
		}
	}
	fresh := ok && r != nil && now.Before(r.due) && stamp.Since(r.stamp)&(nl.Links|nl.Addrs|nl.VIPs) == 0 && !stamp.Table(r.stamp) && r.have.Is(w)
	err := nl.Do(w.Namespace, func() error {
		sysctls()
		if fresh {
			return nil
		}
		r = &reading{stamp: stamp, due: now.Add(sweepPeriod + rand.N(sweepPeriod/2)),
			have: vip.Network{ID: w.ID, Name: w.Name, Namespace: w.Namespace, Subnets: w.Subnets, Gateways: w.Gateways}}
		return observe(w, &r.have)
	})
	if err != nil {
		return vip.Network{}, err
	}
	if ok {
		d.read[w.Namespace] = r
	}
	h := r.have
	h.Servers, h.Locals = slices.Clone(h.Servers), slices.Clone(h.Locals)
	h.Fault = cmp.Or(h.Fault, fault)
	return h, nil
}

// server gathers what is found of one VIP.
type server struct {
	vip.Server
	served bool
}

func observe(w vip.Network, h *vip.Network) error {
	found := map[netip.Addr]*server{}
	get := func(a netip.Addr) *server {
		s := found[a]
		if s == nil {
			s = &server{Server: vip.Server{VIP: a}}
			found[a] = s
		}
		return s
	}
	as, err := kern.Addrs(w)
	if err != nil {
		return err
	}
	for a := range as {
		get(a).Addressed = true
	}
	for _, f := range kern.Families(w) {
		if err := observeFamily(w, f, h, get); err != nil {
			return err
		}
	}
	for _, s := range found {
		slices.SortFunc(s.Backends, func(a, b vip.Backend) int { return a.Addr.Compare(b.Addr) })
		switch {
		case s.Fault != "":
		case !s.Addressed:
			s.Fault = "its address is missing on lo"
		case s.served && !s.Open:
			s.Fault = "its element in map vips is missing"
		case s.Open && !s.served:
			s.Fault = "its chain is missing"
		}
		h.Servers = append(h.Servers, s.Server)
	}
	slices.SortFunc(h.Servers, func(a, b vip.Server) int { return a.VIP.Compare(b.VIP) })
	slices.SortFunc(h.Locals, netip.Addr.Compare)
	return nil
}

func observeFamily(w vip.Network, f kern.Family, h *vip.Network, get func(netip.Addr) *server) error {
	chains, err := kern.Chains(f)
	if err != nil {
		return err
	}
	c := commentsOf(w, f)
	if !chains[pre.Name].Is(pre, c.pre) || !chains[in.Name].Is(in, c.in...) || !chains[post.Name].Is(post, c.post...) {
		h.Fault = "table " + kern.Table + " is missing or was changed"
	}
	if len(chains) == 0 {
		return nil
	}
	fault, err := kern.TableFault(f, chains, ours(f))
	if err != nil {
		return err
	}
	if fault != "" {
		h.Fault = fault
	}
	sets := map[string][]kern.Elem{}
	for _, name := range []string{mapVIPs, setLeaving, setHairpin} {
		es, err := kern.Elems(f, name)
		if errors.Is(err, kern.ErrNoSet) {
			h.Fault = "set " + name + " of table " + kern.Table + " is missing"
			continue
		}
		if err != nil {
			return err
		}
		sets[name] = es
	}
	for _, e := range sets[setHairpin] {
		a, b, ok := pair(e.Key, f)
		if !ok || a != b {
			h.Fault = "set " + setHairpin + " has an element that is not ours"
			continue
		}
		h.Locals = append(h.Locals, a)
	}
	for _, e := range sets[mapVIPs] {
		if a, ok := netip.AddrFromSlice(e.Key); ok {
			s := get(a)
			s.Open = true
			if e.Chain != chainOf(a) {
				s.Fault = "its element in map vips leads elsewhere"
			}
		}
	}
	leaving := map[netip.Addr][]netip.Addr{}
	for _, e := range sets[setLeaving] {
		if v, b, ok := pair(e.Key, f); ok {
			get(v)
			leaving[v] = append(leaving[v], b)
		}
	}
	for name, c := range chains {
		a, ok := vipOf(name)
		if !ok || a.Is4() == f.V6 {
			continue
		}
		s := get(a)
		s.served = true
		want, _ := w.Server(a)
		if c.Is(kern.Base{}, comment(want.Takes())) {
			for _, b := range want.Takes() {
				s.Backends = append(s.Backends, vip.Backend{Addr: b, Weight: 1})
			}
			continue
		}
		// Not as wanted, or not one of our rules any more: read the map.
		var bs []netip.Addr
		for _, r := range c.Rules {
			for _, set := range r.Sets {
				es, err := kern.Elems(f, set)
				if errors.Is(err, kern.ErrNoSet) {
					continue
				}
				if err != nil {
					return err
				}
				for _, e := range es {
					if b, ok := netip.AddrFromSlice(e.Val); ok && b.Is4() != f.V6 {
						bs = append(bs, b)
					}
				}
			}
		}
		slices.SortFunc(bs, netip.Addr.Compare)
		if !c.Is(kern.Base{}, comment(bs)) {
			s.Fault = "its chain was changed"
		}
		for _, b := range slices.Compact(bs) {
			s.Backends = append(s.Backends, vip.Backend{Addr: b, Weight: 1})
		}
	}
	for v, bs := range leaving {
		s := get(v)
		for _, b := range bs {
			if _, ok := s.Backend(b); ok {
				s.Fault = "backend " + b.String() + " both takes connections and drains"
				continue
			}
			s.Backends = append(s.Backends, vip.Backend{Addr: b})
		}
	}
	return nil
}

func pair(key []byte, f kern.Family) (a, b netip.Addr, ok bool) {
	if len(key) != int(2*f.Len) {
		return a, b, false
	}
	a, _ = netip.AddrFromSlice(key[:f.Len])
	b, ok = netip.AddrFromSlice(key[f.Len:])
	return a, b, ok
}

// chainOf names a VIP's chain. A colon is not part of nft(8)'s identifiers.
func chainOf(v netip.Addr) string { return "vip-" + strings.ReplaceAll(v.String(), ":", "_") }

func vipOf(chain string) (netip.Addr, bool) {
	s, ok := strings.CutPrefix(chain, "vip-")
	if !ok {
		return netip.Addr{}, false
	}
	a, err := netip.ParseAddr(strings.ReplaceAll(s, "_", ":"))
	return a, err == nil && a.Zone() == ""
}

// ours tells which chains belong to the table.
func ours(f kern.Family) func(string) bool {
	return func(name string) bool {
		a, ok := vipOf(name)
		return name == pre.Name || name == in.Name || name == post.Name || ok && a.Is4() != f.V6 && name == chainOf(a)
	}
}

// comment is what a VIP's rule says about itself: the digest of its backends,
// by address.
func comment(bs []netip.Addr) string {
	return "rr " + strconv.Itoa(len(bs)) + " " + kern.Digest(formVersion, bs)
}

// comments of the rules in base chains: digests of what they depend on.
type comments struct {
	pre      string
	in, post []string
}

func commentsOf(n vip.Network, f kern.Family) comments {
	c := comments{pre: "to VIPs " + kern.Digest(formVersion)}
	for _, s := range subnets(n, f) {
		for _, r := range refusals(f) {
			c.in = append(c.in, r.name+" refused "+kern.Digest(formVersion, s, n.Gateways, r, sctpINIT))
		}
	}
	if a, ok := kern.Hairpin(n, f); ok {
		c.post = []string{"hairpin as " + a.String() + " " + kern.Digest(formVersion)}
	}
	return c
}

func subnets(n vip.Network, f kern.Family) []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(n.Subnets), func(p netip.Prefix) bool { return p.Addr().Is4() == f.V6 })
}

// Apply implements vip.Dataplane.
func (d *Dataplane) Apply(ctx context.Context, op reconcile.Op) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	switch op := op.(type) {
	case vip.SetNetwork:
		return vip.NamespaceError(op.Want, nl.Do(op.Want.Namespace, func() error { return d.setNetwork(op.Want) }))
	case vip.SetServer:
		return d.ApplyAll(ctx, []reconcile.Op{op})[0]
	case vip.DelServer:
		return d.ApplyAll(ctx, []reconcile.Op{op})[0]
	}
	return fmt.Errorf("%s: unknown operation %T", op.Object(), op)
}

// ApplyAll implements reconcile.Batcher: servers of one network share
// transactions, a walk of the conntrack table and a wait for packets under way.
// When a node dies, each of its services is to be changed: of 2,000, one by one
// took over a minute.
func (d *Dataplane) ApplyAll(ctx context.Context, ops []reconcile.Op) []error {
	return kern.Batch(ctx, ops, d.Apply, setServers, delServers)
}

func (d *Dataplane) setNetwork(n vip.Network) error {
	for _, f := range kern.Families(n) {
		err := kern.WriteBase(d.log, n, func(over kern.Over) error { return setBase(n, f, over) })
		if err != nil {
			return fmt.Errorf("network %s: %w", n.Name, err)
		}
	}
	if err := errors.Join(kern.SetIdle(), kern.SetICMP(n)); err != nil {
		return fmt.Errorf("network %s: %w", n.Name, err)
	}
	var ops []vip.SetServer
	hdr := n
	hdr.Servers = nil
	for _, s := range n.Servers {
		ops = append(ops, vip.SetServer{Network: hdr, Want: s, Have: vip.Server{VIP: s.VIP}})
	}
	if len(ops) == 0 {
		return nil
	}
	return errors.Join(setServers(ops)...)
}

func setBase(n vip.Network, f kern.Family, over kern.Over) error {
	t := kern.Begin(f)
	t.Clear(f, over, ours(f))
	addr := f.Type
	two := nftables.MustConcatSetType(addr, addr)
	verdict := nftables.TypeVerdict
	vips := t.Set(mapVIPs, addr, &verdict)
	t.Set(setLeaving, two, nil)
	hairpin := t.Set(setHairpin, two, nil)
	t.Flush(hairpin)
	var es []nftables.SetElement
	for _, a := range kern.Locals(n, f) {
		es = append(es, nftables.SetElement{Key: slices.Concat(a.AsSlice(), a.AsSlice())})
	}
	t.Add(hairpin, es)

	says := commentsOf(n, f)
	c := t.BaseChain(pre)
	t.Rule(c, says.pre, slices.Concat(kern.Proto(t.Protocols(kern.Protocols...)), []expr.Any{
		f.LoadDst(1),
		&expr.Lookup{SourceRegister: 1, SetName: vips.Name, SetID: vips.ID, IsDestRegSet: true}, // register 0: the verdict
	})...)

	c = t.BaseChain(in)
	left := says.in
	for _, p := range subnets(n, f) {
		for _, r := range refusals(f) {
			es := []expr.Any{
				&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{r.proto}},
			}
			if r.proto == unix.IPPROTO_SCTP {
				es = append(es,
					&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: sctpChunk, Len: 1},
					&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{sctpINIT}})
			}
			es = append(es, f.LoadDst(1))
			for _, g := range n.Gateways {
				if g.Is4() != f.V6 {
					es = append(es, &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: g.AsSlice()})
				}
			}
			es = append(es,
				&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: f.Len, Mask: net.CIDRMask(p.Bits(), int(8*f.Len)), Xor: make([]byte, f.Len)},
				&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: p.Addr().AsSlice()},
				&expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: r.code})
			t.Rule(c, left[0], es...)
			left = left[1:]
		}
	}

	c = t.BaseChain(post)
	if a, ok := kern.Hairpin(n, f); ok {
		t.Rule(c, says.post[0],
			&expr.Ct{Register: 1, Key: expr.CtKeySTATUS},
			&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binary.NativeEndian.AppendUint32(nil, ipsDstNAT), Xor: make([]byte, 4)},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
			f.LoadSrc(f.Reg(0)), f.LoadDst(f.Reg(1)),
			&expr.Lookup{SourceRegister: f.Reg(0), SetName: hairpin.Name, SetID: hairpin.ID},
			&expr.Immediate{Register: 1, Data: a.AsSlice()},
			&expr.NAT{Type: expr.NATTypeSourceNAT, Family: uint32(f.AF), RegAddrMin: 1},
		)
	}
	return t.Commit()
}

// refusal is how chain input refuses a protocol: with a code of ICMP's
// "destination unreachable" (RFC 792, RFC 4443).
type refusal struct {
	name        string
	proto, code byte
}

// refusals of one family. UDP is refused with "port unreachable". SCTP ignores
// that, but a client that just sent INIT takes "protocol unreachable" for an
// abort (RFC 9260 section 10); ICMPv6 has no such code. All other SCTP is the
// local stack's to answer: it aborts an association that it does not know,
// which is how one ends whose backend was removed.
func refusals(f kern.Family) []refusal {
	if f.V6 {
		return []refusal{{"udp", unix.IPPROTO_UDP, 4}}
	}
	return []refusal{{"udp", unix.IPPROTO_UDP, 3}, {"sctp", unix.IPPROTO_SCTP, 2}}
}

// The first chunk's type follows the common header of SCTP; INIT is always
// alone in its packet (RFC 9260 sections 3 and 3.2).
const (
	sctpChunk = 12
	sctpINIT  = 1
)

// ipsDstNAT is IPS_DST_NAT (linux/netfilter/nf_conntrack_common.h).
const ipsDstNAT = 1 << 5

// setServers makes VIPs of one network as wanted, and returns an error for each.
// New connections are balanced as wanted on all of them before anything of the
// old is removed.
func setServers(ops []vip.SetServer) []error {
	// Addresses first: until the VIP is local, packets for it would be routed.
	errs := kern.AddAddrs(ops)
	for _, f := range kern.Families(ops[0].Network) {
		var mine []int
		for i, op := range ops {
			if op.Want.VIP.Is4() != f.V6 && errs[i] == nil {
				mine = append(mine, i)
			}
		}
		var past remains
		for k, err := range kern.Chunks(mine, func(some []int) error {
			p, t := remains{}, kern.Begin(f)
			for _, i := range some {
				if err := setServer(t, f, ops[i], &p); err != nil {
					return err
				}
			}
			if err := t.Commit(); err != nil {
				return err
			}
			past.rules, past.flows = append(past.rules, p.rules...), append(past.flows, p.flows...)
			return nil
		}) {
			errs[mine[k]] = err
		}
		if err := past.remove(f); err != nil {
			for _, i := range mine {
				errs[i] = errors.Join(errs[i], err)
			}
		}
	}
	for i, err := range errs {
		if err != nil {
			errs[i] = fmt.Errorf("%s: %w", ops[i].Object(), err)
		}
	}
	return errs
}

// remains are what is to be removed once no packet is at the old rules any
// more: these, and the flows of backends that are gone, which are in set leaving
// until then.
type remains struct {
	rules []oldRule
	flows []flow
}

type oldRule struct {
	chain  string
	handle uint64
}

func (r remains) remove(f kern.Family) error {
	if len(r.rules)+len(r.flows) == 0 {
		return nil
	}
	nl.Grace()
	if err := dropFlows(f, r.flows); err != nil {
		return err
	}
	t := kern.Begin(f)
	for _, x := range r.rules {
		t.DelRule(x.chain, x.handle)
	}
	for _, x := range r.flows {
		if err := del(t, f, t.Ref(setLeaving), x.key()); err != nil {
			return err
		}
	}
	return t.Commit()
}

// setServer adds to t what makes one VIP as wanted, and to past what is left to
// do after the commit.
func setServer(t *kern.Tx, f kern.Family, op vip.SetServer, past *remains) error {
	w := op.Want
	vips, leaving := t.Ref(mapVIPs), t.Ref(setLeaving)
	takes := w.Takes()
	if len(takes) > 0 {
		chain := chainOf(w.VIP)
		handles, err := nl.RuleHandles(uint8(f.NF), kern.Table, chain)
		if err != nil {
			return err
		}
		for _, h := range handles {
			past.rules = append(past.rules, oldRule{chain, h})
		}
		backends(t, f, t.KeepChain(chain), takes)
		if !op.Have.Open || op.Have.Fault != "" {
			// An element that leads elsewhere can't be overwritten.
			if err := del(t, f, vips, w.VIP.AsSlice()); err != nil {
				return err
			}
		}
		t.Add(vips, []nftables.SetElement{{Key: w.VIP.AsSlice(), VerdictData: &expr.Verdict{Kind: expr.VerdictGoto, Chain: chain}}})
	} else if err := closeServer(t, f, w.VIP); err != nil {
		return err
	}
	for _, b := range w.Drains() {
		t.Add(leaving, []nftables.SetElement{{Key: flow{w.VIP, b}.key()}})
	}
	for _, b := range op.Removed() {
		x := flow{w.VIP, b}
		t.Add(leaving, []nftables.SetElement{{Key: x.key()}})
		past.flows = append(past.flows, x)
	}
	for _, b := range takes {
		if x, ok := op.Have.Backend(b); ok && x.Weight > 0 && op.Have.Fault == "" {
			continue
		}
		if err := del(t, f, leaving, flow{w.VIP, b}.key()); err != nil {
			return err
		}
	}
	return nil
}

// closeServer adds to t the removal of a VIP's element, then of its chain.
func closeServer(t *kern.Tx, f kern.Family, v netip.Addr) error {
	if err := del(t, f, t.Ref(mapVIPs), v.AsSlice()); err != nil {
		return err
	}
	t.Chain(chainOf(v)) // so that deleting it can't fail
	t.DelChain(chainOf(v))
	return nil
}

// del adds the deletion of an element to t if it is there.
func del(t *kern.Tx, f kern.Family, s *nftables.Set, key []byte) error {
	ok, err := kern.Has(f, s.Name, key)
	if ok {
		t.Del(s, []nftables.SetElement{{Key: key}})
	}
	return err
}

// backends adds the rule that spreads connections over bs in turn, before the
// others of its chain (see nl.RuleHandles). Every such rule begins to count at
// slot 0, on every node and after every change, so the slots are shuffled: else
// the first connections of all nodes, which may be the ones that last, would meet
// at the lowest address.
func backends(t *kern.Tx, f kern.Family, c *nftables.Chain, bs []netip.Addr) {
	addr := f.Type
	es := make([]nftables.SetElement, len(bs))
	for i, at := range rand.Perm(len(bs)) {
		es[i] = nftables.SetElement{Key: binary.NativeEndian.AppendUint32(nil, uint32(i)), Val: bs[at].AsSlice()}
	}
	// A slot is typed as a mark: four octets in host order, which is what
	// numgen writes. (The library declares constant sets to nft(8) as being in
	// network order, so it lists slot 1 as 0x01000000.)
	m := t.Anonymous(nftables.TypeMark, &addr, es)
	t.First(c, comment(bs),
		&expr.Numgen{Register: 1, Modulus: uint32(len(bs)), Type: unix.NFT_NG_INCREMENTAL},
		&expr.Lookup{SourceRegister: 1, DestRegister: 1, IsDestRegSet: true, SetName: m.Name, SetID: m.ID},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(f.AF), RegAddrMin: 1},
	)
}

// delServers removes VIPs of one network, and returns an error for each.
func delServers(ops []vip.DelServer) []error {
	errs := make([]error, len(ops))
	for _, f := range []kern.Family{kern.V4, kern.V6} {
		var mine []int
		for i, op := range ops {
			if op.Have.VIP.Is4() != f.V6 {
				mine = append(mine, i)
			}
		}
		for k, err := range kern.Chunks(mine, func(some []int) error {
			var del []vip.DelServer
			for _, i := range some {
				del = append(del, ops[i])
			}
			return delFamily(f, del)
		}) {
			if i := mine[k]; err != nil {
				errs[i] = fmt.Errorf("%s: %w", ops[i].Object(), err)
			}
		}
	}
	return errs
}

func delFamily(f kern.Family, ops []vip.DelServer) error {
	table, err := kern.HasTable(f)
	if err != nil {
		return err
	}
	var past remains
	for _, op := range ops {
		for _, b := range op.Have.Backends {
			past.flows = append(past.flows, flow{op.Have.VIP, b.Addr})
		}
	}
	if table {
		t := kern.Begin(f)
		for _, op := range ops {
			if err := closeServer(t, f, op.Have.VIP); err != nil {
				return err
			}
		}
		if err := t.Commit(); err != nil {
			return err
		}
	}
	if err := past.remove(f); err != nil {
		return err
	}
	// The address last: while it is there, clients are refused at once.
	for _, op := range ops {
		if err := kern.DelAddr(op.Have.VIP); err != nil {
			return err
		}
	}
	return nil
}

// Probe tells whether this kernel can carry the data path, by building one VIP
// in a namespace of its own that ends with the call. The error names what is
// missing.
func Probe() error { return nl.DoNew(probe) }

func probe() error {
	n := vip.Network{Name: "probe", Subnets: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24")}}
	if err := setBase(n, kern.V4, kern.KeepChains); err != nil {
		return fmt.Errorf("kernel lacks nftables NAT (nf_tables, nft_nat, nft_ct and nft_reject modules): %w", err)
	}
	if err := kern.SetIdle(); err != nil {
		return fmt.Errorf("kernel lacks connection tracking sysctls (nf_conntrack module): %w", err)
	}
	t := kern.Begin(kern.V4)
	a := netip.MustParseAddr("10.0.0.2")
	backends(t, kern.V4, t.Chain(chainOf(a)), []netip.Addr{netip.MustParseAddr("10.0.0.3")})
	if err := t.Commit(); err != nil {
		return fmt.Errorf("kernel lacks nftables number generators (nft_numgen module): %w", err)
	}
	if err := kern.ProbeFlows(kern.V4); err != nil {
		return fmt.Errorf("kernel lacks connection tracking netlink (nf_conntrack_netlink module): %w", err)
	}
	return nil
}
