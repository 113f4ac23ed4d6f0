// Package nft is ingress.Dataplane in the Linux kernel: nftables, routes and
// rules in the host's namespace and in the overlay namespaces.
//
// # How ours is told from others'
//
//	nftables   a table of our own in each namespace
//	route      protocol 84 (ingress.RouteProtocol)
//	rule       in an ovns, protocol 84
//	sysctl     route_localnet of a device of the overlay
//
// # Reserved ports
//
// A published port is reserved by a socket that is bound and neither listens
// nor receives, so that no program starts to listen on a port whose packets it
// would never see. That is a courtesy: where it can't be had, the port works
// all the same, and the listener is noticed by the next Observe. Close releases
// the ports.
package nft

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/ingress"
	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/reconcile"
	"github.com/shoalnet/shoal/spec"
)

// Config of a Dataplane.
type Config struct {
	Instance string       // see spec.View.Instance
	Log      *slog.Logger // nil: slog.Default
	// HostNetns is the name of the namespace that stands for the host's; ""
	// is this process's own, which is what an agent uses.
	HostNetns string
	// Notices tell what changed since it was read. nil: everything is read in
	// every Observe.
	Notices *nl.Notices
}

// Dataplane implements ingress.Dataplane. Its methods may be called from one
// goroutine at a time, but for Blocked.
type Dataplane struct {
	cfg      Config
	log      *slog.Logger
	table    string                         // in the host's namespace
	reserved map[reservation]map[int]string // sockets with their inodes
	names    map[string]string              // of programs by their socket's inode
	read     map[string]*reading            // of namespaces, "" the host's table
}

// reading is what was last read of a namespace's table and routes, and of what.
type reading struct {
	stamp nl.Stamp
	due   time.Time // when it is read again, noticed or not
	want  ingress.State
	have  ingress.State
}

// sweepPeriod is how long what was read counts without a notice.
const sweepPeriod = 20 * time.Second

// reread calls read, or gives what it gave last while no notice of a kind came,
// nor of the table, and want is the same. have gets what is there.
func (d *Dataplane) reread(netns, table string, kinds nl.Kind, want ingress.State, have *ingress.State, read func(have *ingress.State) error) error {
	name := netns
	if name == "" {
		name = d.cfg.HostNetns
	}
	stamp, ok := d.cfg.Notices.At(name, table)
	r, now := d.read[netns], time.Now()
	if !ok || r == nil || now.After(r.due) || stamp.Since(r.stamp)&kinds != 0 || stamp.Table(r.stamp) || !r.want.Equal(want) {
		delete(d.read, netns)
		r = &reading{stamp: stamp, due: now.Add(sweepPeriod + rand.N(sweepPeriod/2)), want: want}
		if err := read(&r.have); err != nil {
			return err
		}
		if ok {
			d.read[netns] = r
		}
	}
	r.have.Each(have.Add)
	return nil
}

var _ ingress.Dataplane = (*Dataplane)(nil)

// New makes a Dataplane. Whether the kernel can do it is told by [Probe].
func New(cfg Config) *Dataplane {
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	return &Dataplane{cfg: cfg, log: cfg.Log, table: ingress.TableName(cfg.Instance),
		reserved: map[reservation]map[int]string{}, names: map[string]string{}, read: map[string]*reading{}}
}

// Close releases the reserved ports. The Dataplane can be used again.
func (d *Dataplane) Close() {
	for k := range d.reserved {
		d.release(k)
	}
}

// do runs fn in an object's namespace.
func (d *Dataplane) do(netns string, fn func() error) error {
	if netns == "" {
		netns = d.cfg.HostNetns
	}
	return nl.Do(netns, fn)
}

// ---- reading ----

// Observe implements ingress.Dataplane.
func (d *Dataplane) Observe(ctx context.Context, want ingress.State) (ingress.State, error) {
	var have ingress.State
	places := map[string]*ingress.State{"": {}}
	for _, w := range want.Ways {
		places[w.Netns] = &ingress.State{}
	}
	want.Each(func(o ingress.Object) {
		if p := places[ingress.NetnsOf(o)]; p != nil {
			p.Add(o)
		}
	})
	err := d.do("", func() error { return d.observeHost(want, *places[""], &have) })
	if err != nil {
		return have, fmt.Errorf("the host's namespace: %w", err)
	}
	maps.DeleteFunc(d.read, func(ns string, _ *reading) bool { return places[ns] == nil })
	for _, w := range want.Ways {
		if err := ctx.Err(); err != nil {
			return have, err
		}
		err := d.reread(w.Netns, ingress.NetnsTable, nl.Links|nl.Addrs|nl.Routes|nl.Policies, *places[w.Netns], &have, func(have *ingress.State) error {
			return d.do(w.Netns, func() error { return observeNetns(w.Netns, want, have) })
		})
		if errors.Is(err, fs.ErrNotExist) {
			continue // and so is all that would be in it
		}
		if err != nil {
			return have, fmt.Errorf("network %s: %w", w.Network, err)
		}
	}
	return have, nil
}

// observeHost reads the host's namespace; here are the objects wanted in it.
func (d *Dataplane) observeHost(want, here ingress.State, have *ingress.State) error {
	if err := d.observeHolders(want, have); err != nil {
		return err
	}
	if err := observeRoutes(want, have); err != nil {
		return err
	}
	for _, w := range want.Ways {
		v, err := nl.Sysctl(localnetKey(w.Dev))
		if err == nil && v == "1" {
			have.Add(ingress.Localnet{Dev: w.Dev})
		}
	}
	err := d.reread("", d.table, 0, here, have, func(have *ingress.State) error { return d.observeTable(here, have) })
	if err != nil {
		return err
	}
	// Of this one the kernel sends no notice.
	if o, ok := have.Get(ingress.HostTable{}.Key()).(ingress.HostTable); ok && o.Fault == "" {
		o.Fault = timeoutFault()
		have.Add(o)
	}
	return nil
}

// observeTable reads the host's table.
func (d *Dataplane) observeTable(want ingress.State, have *ingress.State) error {
	c, err := reader()
	if err != nil {
		return err
	}
	defer c.CloseLasting()
	chains, err := chainsOf(c, d.table)
	if err != nil || len(chains) == 0 {
		return err
	}
	o := ingress.HostTable{Name: d.table}
	if w, ok := want.Get(o.Key()).(ingress.HostTable); ok {
		o = w
	}
	if o.Fault, err = hostRules(o).check(c, chains); err != nil {
		return err
	}
	have.Add(o)
	private, err := elems(c, d.table, setPrivate)
	if err != nil {
		return err
	}
	for _, e := range private {
		if a, ok := netip.AddrFromSlice(e.key); ok {
			have.Add(ingress.Private{Addr: a})
		}
	}
	for _, sets := range [][2]string{{mapPorts, setNAT}, {mapAddrPorts, setAddrNAT}} {
		ports, err := elems(c, d.table, sets[0])
		if err != nil {
			return err
		}
		nat, err := elems(c, d.table, sets[1])
		if err != nil {
			return err
		}
		for k, e := range nat {
			if _, ok := ports[k]; !ok {
				ports[k] = elem{key: e.key} // an element without its port
			}
		}
		for k, e := range ports {
			a, proto, published, ok := parseKey(e.key)
			if !ok {
				continue
			}
			_, natted := nat[k]
			have.Add(ingress.Port{Addr: a, Published: published, Protocol: proto, To: parseTarget(e.val), NAT: natted})
		}
	}
	return nil
}

func observeNetns(ns string, want ingress.State, have *ingress.State) error {
	if err := observeNodeRoutes(ns, have); err != nil {
		return err
	}
	c, err := reader()
	if err != nil {
		return err
	}
	defer c.CloseLasting()
	chains, err := chainsOf(c, ingress.NetnsTable)
	if err != nil {
		return err
	}
	nodes := map[int]int{} // how many of a node's parts there are, 4 being all
	have.Each(func(o ingress.Object) {
		if n, ok := o.(ingress.Node); ok && n.Netns == ns {
			nodes[n.Number] = routeParts(n)
		}
	})
	if len(chains) > 0 {
		o := ingress.Table{Netns: ns}
		if w, ok := want.Get(o.Key()).(ingress.Table); ok {
			o = w
		}
		if o.Fault, err = netnsRules(o).check(c, chains); err != nil {
			return err
		}
		have.Add(o)
		for _, name := range []string{mapNodes, mapZones} {
			es, err := elems(c, ingress.NetnsTable, name)
			if err != nil {
				return err
			}
			for _, e := range es {
				number, ok := nodeOf(e.key)
				if !ok {
					continue
				}
				nodes[number] += 0
				for _, w := range nodeElems(ingress.Node{Number: number}) {
					if w.set == name && string(w.val) == string(e.val) {
						nodes[number]++
					}
				}
			}
		}
		published, err := elems(c, ingress.NetnsTable, setPublished)
		if err != nil {
			return err
		}
		for _, e := range published {
			if a, proto, port, ok := parseKey(e.key); ok && a.IsValid() {
				have.Add(ingress.Entry{Netns: ns, Protocol: proto, To: netip.AddrPortFrom(a, port)})
			}
		}
		if err := observeLocals(c, ns, chains, want, have); err != nil {
			return err
		}
	}
	for number, n := range nodes {
		o := ingress.Node{Netns: ns, Number: number}
		if x, ok := have.Get(o.Key()).(ingress.Node); ok {
			o.MTU = x.MTU
		}
		if n != 4 {
			o.Fault = "parts are missing"
		}
		have.Add(o)
	}
	return nil
}

// nodeOf is the inverse of spec.VTEPMAC.
func nodeOf(mac []byte) (int, bool) {
	if len(mac) != 6 || !slices.Equal(mac[:3], spec.VTEPMAC(0)[:3]) {
		return 0, false
	}
	return int(mac[3])<<16 | int(mac[4])<<8 | int(mac[5]), true
}

func observeLocals(c *nftables.Conn, ns string, chains map[string]*nftables.Chain, want ingress.State, have *ingress.State) error {
	es, err := elems(c, ingress.NetnsTable, mapLocal)
	if err != nil {
		return err
	}
	all, err := comments(ingress.NetnsTable)
	if err != nil {
		return err
	}
	seen := map[any]bool{}
	add := func(proto string, slot uint16, elemThere bool, ch *nftables.Chain) {
		o := ingress.Local{Netns: ns, Protocol: proto, Slot: slot}
		if seen[o.Key()] {
			return
		}
		seen[o.Key()] = true
		if w, ok := want.Get(o.Key()).(ingress.Local); ok {
			o = w
		}
		switch {
		case !elemThere:
			o.Fault = "its element in map " + mapLocal + " is missing"
		case ch == nil:
			o.Fault = "its chain is missing"
		case ch.Hooknum != nil:
			o.Fault = "its chain has a hook"
		case !slices.Equal(all[ch.Name], localComments(o, false)):
			o.Fault = "its backends are others"
		}
		have.Add(o)
	}
	for _, e := range es {
		_, proto, slot, ok := parseKey(e.key)
		if !ok {
			continue
		}
		o := ingress.Local{Protocol: proto, Slot: slot}
		add(proto, slot, e.chain == localChain(o), chains[localChain(o)])
	}
	for name, ch := range chains {
		if proto, slot, ok := parseLocalChain(name); ok {
			add(proto, slot, false, ch)
		}
	}
	return nil
}

// localComments are those of the rules of a balancer's chain. One without
// backends has a rule that does nothing, to tell what is draining. pending says
// that connections of removed backends are still to be reset.
func localComments(o ingress.Local, pending bool) []string {
	return []string{"local " + digest(version, o.Backends, o.Draining, o.Target, pending)}
}

// ---- writing ----

// Apply implements ingress.Dataplane.
func (d *Dataplane) Apply(ctx context.Context, rop reconcile.Op) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	op, ok := rop.(ingress.Op)
	if !ok {
		return fmt.Errorf("operation %s is not the ingress's", rop)
	}
	if op.Verb == ingress.Refuse {
		return fmt.Errorf("%s on this node: stop that program, or publish another port", op.Target)
	}
	netns := ingress.NetnsOf(op.Target)
	err := d.do(netns, func() error {
		if len(op.More) > 0 && d.many(op) == nil {
			return nil
		}
		var errs []error
		for _, o := range op.Each() {
			if op.Verb == ingress.Delete {
				errs = append(errs, d.del(o))
			} else {
				errs = append(errs, d.put(o))
			}
		}
		return errors.Join(errs...)
	})
	if errors.Is(err, fs.ErrNotExist) && op.Verb == ingress.Delete || op.Verb == ingress.Delete && nl.Absent(err) {
		return nil
	}
	return err
}

// many does in a few transactions, and one look at the connections, what would
// take one of each for every object.
func (d *Dataplane) many(op ingress.Op) error {
	var ports []ingress.Port
	var there, gone []elem
	table := d.table
	for _, o := range op.Each() {
		switch o := o.(type) {
		case ingress.Port:
			ports = append(ports, o)
			el, nat := portElems(o)
			switch {
			case op.Verb == ingress.Delete:
				el.val = []byte{}
				gone = append(gone, el, nat)
			case o.NAT:
				there = append(there, nat, el)
			default:
				there, gone = append(there, el), append(gone, nat)
			}
		case ingress.Entry:
			table = ingress.NetnsTable
			el := entryElem(o)
			if op.Verb == ingress.Delete {
				gone = append(gone, el)
			} else {
				there = append(there, el)
			}
		default:
			return fmt.Errorf("%s is not one of many", o)
		}
	}
	for es := range slices.Chunk(there, batch) {
		if err := put(table, es...); err != nil {
			return err
		}
	}
	for es := range slices.Chunk(gone, batch) {
		if err := remove(table, es...); err != nil {
			return err
		}
	}
	if op.Verb == ingress.Delete {
		return dropPort(ports...)
	}
	return dropUntranslated(ports...)
}

// batch is how many elements share a transaction: all are answered at once.
const batch = 500

func entryElem(o ingress.Entry) elem {
	return elem{set: setPublished, key: key(o.To.Addr(), o.Protocol, o.To.Port())}
}

func (d *Dataplane) put(o ingress.Object) error {
	switch o := o.(type) {
	case ingress.HostTable:
		if err := setTimeout(); err != nil {
			return err
		}
		o.Fault = ""
		return hostRules(o).write()
	case ingress.Localnet:
		err := nl.SetSysctl(localnetKey(o.Dev), "1")
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("device %s does not exist yet", o.Dev)
		}
		return err
	case ingress.Route:
		return putRoute(o)
	case ingress.Private:
		return put(d.table, elem{set: setPrivate, key: o.Addr.AsSlice()})
	case ingress.Port:
		el, nat := portElems(o)
		var err error
		if o.NAT {
			err = put(d.table, nat, el)
		} else {
			err = errors.Join(put(d.table, el), remove(d.table, nat))
		}
		if err != nil {
			return err
		}
		return dropUntranslated(o)
	case ingress.Table:
		return netnsRules(o).write()
	case ingress.Node:
		if err := put(ingress.NetnsTable, nodeElems(o)...); err != nil {
			return err
		}
		return putNode(o)
	case ingress.Entry:
		return put(ingress.NetnsTable, entryElem(o))
	case ingress.Local:
		return putLocal(o)
	}
	return fmt.Errorf("%s can't be put", o)
}

func (d *Dataplane) del(o ingress.Object) error {
	switch o := o.(type) {
	case ingress.HostTable:
		return delTable(d.table)
	case ingress.Localnet:
		return nl.SetSysctl(localnetKey(o.Dev), "0")
	case ingress.Route:
		return delRoute(o)
	case ingress.Private:
		return remove(d.table, elem{set: setPrivate, key: o.Addr.AsSlice()})
	case ingress.Port:
		el, nat := portElems(o)
		el.val = []byte{}
		if err := remove(d.table, el, nat); err != nil {
			return err
		}
		return dropPort(o)
	case ingress.Table:
		return delTable(ingress.NetnsTable)
	case ingress.Node:
		es := nodeElems(o)
		return errors.Join(delNode(o), remove(ingress.NetnsTable, es...))
	case ingress.Entry:
		return remove(ingress.NetnsTable, entryElem(o))
	case ingress.Local:
		return delLocal(o)
	}
	return fmt.Errorf("%s can't be deleted", o)
}

func localnetKey(dev string) string { return "net.ipv4.conf." + dev + ".route_localnet" }

// minEstablished is the least idle time of a TCP connection, in seconds: the
// first keepalive comes after 7200 s (tcp_keepalive_time, tcp(7)), and nine more
// 75 s apart. The kernel's own default is five days.
const (
	minEstablished = 7200 + 10*75
	timeoutKey     = "net.netfilter.nf_conntrack_tcp_timeout_established"
)

// timeoutFault says when connections of published ports would be forgotten
// before their keepalive. Where nothing is tracked yet, the setting may not exist.
func timeoutFault() string {
	v, err := nl.Sysctl(timeoutKey)
	if n, aerr := strconv.Atoi(v); err == nil && aerr == nil && n < minEstablished {
		return "sysctl " + timeoutKey + " is " + v
	}
	return ""
}

func setTimeout() error {
	if timeoutFault() == "" {
		return nil
	}
	return nl.SetSysctl(timeoutKey, strconv.Itoa(minEstablished))
}

// putLocal writes a balancer's chain, and resets what is connected to tasks
// that it has no more. If that is cut short, the comment tells.
func putLocal(o ingress.Local) error {
	o.Fault = ""
	if err := writeLocal(o, true); err != nil {
		return err
	}
	keep := map[netip.Addr]bool{}
	for _, a := range append(ingress.Addrs(o.Backends), ingress.Addrs(o.Draining)...) {
		keep[a] = true
	}
	if err := dropLocal(o, keep); err != nil {
		return err
	}
	return writeLocal(o, false)
}

func writeLocal(o ingress.Local, pending bool) error {
	c, err := tx()
	if err != nil {
		return err
	}
	t := &nftables.Table{Family: nftables.TableFamilyIPv4, Name: ingress.NetnsTable}
	old, err := nl.RuleHandles(unix.NFPROTO_IPV4, ingress.NetnsTable, localChain(o))
	if err != nil {
		return err
	}
	ch := c.AddChain(&nftables.Chain{Table: t, Name: localChain(o)})
	var exprs []expr.Any
	if bs := ingress.Addrs(o.Backends); len(bs) > 0 {
		m := &nftables.Set{Table: t, ID: 1, Name: "__map%d", Anonymous: true, Constant: true, IsMap: true,
			KeyType: nftables.TypeMark, DataType: nftables.TypeIPAddr, Size: uint32(len(bs))}
		if err := c.AddSet(m, nil); err != nil {
			return err
		}
		// The library refuses elements for an anonymous set after its
		// creation; the kernel does so only once a rule uses it.
		open := *m
		open.Anonymous = false
		var es []nftables.SetElement
		for i, a := range bs {
			es = append(es, nftables.SetElement{Key: u32(uint32(i)), Val: a.AsSlice()})
		}
		if err := c.SetAddElements(&open, es); err != nil {
			return err
		}
		exprs = []expr.Any{
			&expr.Numgen{Register: 1, Modulus: uint32(len(bs)), Type: unix.NFT_NG_INCREMENTAL},
			&expr.Lookup{SourceRegister: 1, DestRegister: 1, IsDestRegSet: true, SetName: m.Name, SetID: m.ID},
			&expr.Immediate{Register: 2, Data: []byte{byte(o.Target >> 8), byte(o.Target)}},
			&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1, RegProtoMin: 2},
		}
	} else {
		exprs = ret.exprs
	}
	c.InsertRule(&nftables.Rule{Table: t, Chain: ch, Exprs: exprs,
		UserData: userdata.AppendString(nil, userdata.TypeComment, localComments(o, pending)[0])})
	if err := c.Flush(); err != nil {
		return fmt.Errorf("write chain %s: %w", localChain(o), err)
	}
	if err := put(ingress.NetnsTable, elem{set: mapLocal, key: key(netip.Addr{}, o.Protocol, o.Slot), chain: localChain(o)}); err != nil || len(old) == 0 {
		return err
	}
	// Only now, so that no connection finds neither: see nl.RuleHandles.
	nl.Grace()
	for _, h := range old {
		if err := c.DelRule(&nftables.Rule{Table: t, Chain: ch, Handle: h}); err != nil {
			return fmt.Errorf("chain %s: %w", localChain(o), err)
		}
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("delete the old rules of chain %s: %w", localChain(o), err)
	}
	return nil
}

func delLocal(o ingress.Local) error {
	if err := remove(ingress.NetnsTable, elem{set: mapLocal, key: key(netip.Addr{}, o.Protocol, o.Slot), chain: localChain(o)}); err != nil {
		return err
	}
	if err := dropLocal(o, nil); err != nil {
		return err
	}
	c, err := tx()
	if err != nil {
		return err
	}
	t := &nftables.Table{Family: nftables.TableFamilyIPv4, Name: ingress.NetnsTable}
	c.AddTable(t)
	ch := c.AddChain(&nftables.Chain{Table: t, Name: localChain(o)}) // so that deleting it succeeds
	c.FlushChain(ch)
	c.DelChain(ch)
	if err := c.Flush(); err != nil {
		return fmt.Errorf("delete chain %s: %w", localChain(o), err)
	}
	return nil
}

// ---- the whole ----

// Cleanup removes everything of an instance from the host's namespace. What is
// in overlay namespaces goes with them: see vxlan.Cleanup.
func Cleanup(instance string) error {
	d := New(Config{Instance: instance})
	defer d.Close()
	return d.Cleanup()
}

// Cleanup removes everything of the Dataplane's instance, as the function of
// that name does.
func (d *Dataplane) Cleanup() error {
	d.Close()
	return d.do("", func() error { return errors.Join(delTable(d.table), delRoutes()) })
}

// Probe tells whether this kernel can carry the data path, by building it in a
// namespace of its own that ends with the call. The error names what is missing.
func Probe() error {
	return nl.DoNew(probe)
}

func probe() error {
	if err := hostRules(ingress.HostTable{Name: "shoal-ingress-probe"}).write(); err != nil {
		return fmt.Errorf("kernel lacks nftables address translation for published ports (nft_fib_ipv4, nft_ct, nft_nat, nft_masq and nft_reject modules): %w", err)
	}
	t := ingress.Table{Subnets: "10.0.0.0/24", Out: netip.MustParseAddr("169.254.176.1")}
	if err := netnsRules(t).write(); err != nil {
		return fmt.Errorf("kernel lacks nftables marks and zones for published ports (nft_ct and CONFIG_NF_CONNTRACK_MARK, CONFIG_NF_CONNTRACK_ZONES): %w", err)
	}
	if err := writeLocal(ingress.Local{Protocol: spec.TCP, Slot: 1, Target: 1, Backends: "10.0.0.2"}, false); err != nil {
		return fmt.Errorf("kernel lacks nftables number generators (nft_numgen module): %w", err)
	}
	return nil
}
