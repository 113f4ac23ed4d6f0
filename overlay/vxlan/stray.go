package vxlan

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/overlay"
)

// What is in our namespaces though nobody wants it, and what the kernel itself
// should have there and has not.
//
// Inside an ovns and a task's namespace everything is Shoal's: a task lacks the
// capability to change its network. So a rule, a route in whatever table, an address,
// a queueing discipline, a program on a device or an nftables table that none
// of Shoal's packages makes is taken away, and the rules and the entries of table
// local that the kernel made are made again. Devices of others stay (one may be a
// card of the machine) and are reported.
//
// Package vip has addresses labelled lo:vip, and IPv6 addresses of the network,
// on lo; package ingress rules and tables by its protocol. Both have nftables tables
// that begin with "shoal". They look after these by themselves.

// What package ingress marks its rules and routes with in an ovns; its
// RouteProtocol, RulePriority and TableBase.
const (
	ingressProtocol = 84
	ingressPriority = 1000
	ingressTables   = 0x53680000
)

// fix puts one oddity right.
type fix func(d *Dataplane, s *space) error

// oddities is what of a namespace is not as it should be, with what is to be done.
type oddities map[overlay.Oddity]fix

func (x oddities) add(ns, kind, what string, f fix) {
	x[overlay.Oddity{Netns: ns, Kind: kind, What: what}] = f
}

// mendOddity puts an oddity right, as it was last observed.
func (d *Dataplane) mendOddity(o overlay.Oddity) error {
	p := d.places[o.Netns]
	if p == nil {
		return nil
	}
	f := p.odd[o]
	if f == nil {
		return nil
	}
	s, err := d.in(o.Netns)
	if err != nil {
		return err
	}
	if err := f(d, s); err != nil && !nl.Absent(err) {
		return fmt.Errorf("%s: %w", o, err)
	}
	p.again |= nl.AllKinds
	return nil
}

// readStrays reads what only strays are looked for in.
func (d *Dataplane) readStrays(w *wants, p *place, s *space, changed nl.Kind) error {
	inside := w.network != "" || w.task != ""
	if changed&nl.Policies != 0 {
		p.rules, p.ruled = nil, nil
		for _, f := range []int{unix.AF_INET, unix.AF_INET6} {
			list, err := nl.Dump(func() ([]netlink.Rule, error) { return s.h.RuleList(f) })
			if f == unix.AF_INET6 && (errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP)) {
				continue // a kernel without
			}
			if err != nil {
				return fmt.Errorf("list rules: %w", err)
			}
			for i := range list {
				list[i].Family = f
			}
			p.rules, p.ruled = append(p.rules, list...), append(p.ruled, f)
		}
	}
	if changed&(nl.Qdiscs|nl.Links) != 0 {
		list, err := nl.Dump(func() ([]netlink.Qdisc, error) { return s.h.QdiscList(nil) })
		if err != nil {
			return fmt.Errorf("list queueing disciplines: %w", err)
		}
		p.qdiscs = list
	}
	if inside && changed&nl.Routes != 0 {
		p.others, p.local = nil, map[netip.Addr]map[int]bool{}
		for _, f := range []int{unix.AF_INET, unix.AF_INET6} {
			list, err := nl.Dump(func() ([]netlink.Route, error) {
				return s.h.RouteListFiltered(f, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
			})
			if f == unix.AF_INET6 && (errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP)) {
				continue
			}
			if err != nil {
				return fmt.Errorf("list routes: %w", err)
			}
			for _, r := range list {
				r.Family = f
				if r.Table == unix.RT_TABLE_LOCAL && r.Type == unix.RTN_LOCAL {
					a := prefixOf(r).Addr()
					if p.local[a] == nil {
						p.local[a] = map[int]bool{}
					}
					p.local[a][r.LinkIndex] = true
				}
				if !(r.Table == unix.RT_TABLE_MAIN && r.Protocol == overlay.RouteProtocol) {
					p.others = append(p.others, r)
				}
			}
		}
	}
	return nil
}

// readTables lists the nftables tables that none of Shoal's packages has in such a
// namespace; within do.
func readTables(c *nftConn, w *wants) ([]table, error) {
	all, err := c.c.ListTables()
	if err != nil {
		return nil, fmt.Errorf("list nftables tables: %w", err)
	}
	var out []table
	for _, t := range all {
		if ours := w.network != "" && strings.HasPrefix(t.Name, "shoal-") || w.task != "" && t.Name == overlay.TaskTable; !ours {
			out = append(out, table{t.Family, t.Name})
		}
	}
	return out, nil
}

// fallback are devices that some modules of the kernel put in every namespace
// (net.core.fb_tunnels_only_for_init_net); they are down.
var fallback = []string{"tunl0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "sit0", "ip6tnl0", "ip6gre0"}

// reportStrays adds what was read to what there is.
func (d *Dataplane) reportStrays(have *overlay.State, w *wants, p *place) {
	p.odd = oddities{}
	if w.network != "" || w.task != "" {
		p.oddRules(w)
		p.oddRoutes(w)
		p.oddAddrs(w)
		for _, t := range p.alien {
			p.odd.add(w.ns, "nftables table", fmt.Sprintf("%s %s", familyName(t.family), t.name), func(d *Dataplane, _ *space) error {
				return d.do(w.ns, func() error { return delTable(t) })
			})
		}
		for name, l := range p.links {
			a := l.Attrs()
			if a.Flags&net.FlagLoopback != 0 || oursLink(l) || w.names(name) || slices.Contains(fallback, name) && a.Flags&net.FlagUp == 0 {
				continue
			}
			have.Add(overlay.Remark{Netns: w.ns, What: fmt.Sprintf("device %s is not Shoal's: remove it with 'ip -n %s link del %s', or take it back with 'ip -n %s link set %s netns 1'", name, w.ns, name, w.ns, name)})
		}
	} else {
		d.reportHost(have, w, p)
	}
	p.oddDevices(w)
	for o := range p.odd {
		have.Add(o)
	}
}

// names tells whether a device of that name is wanted.
func (w *wants) names(dev string) bool {
	if w.devs == nil {
		w.devs = map[string]bool{}
		for _, o := range w.objects {
			if _, on := overlay.Place(o); on != "" {
				w.devs[on] = true
			}
			for _, x := range overlay.Devices(o) {
				if x[0] == w.ns {
					w.devs[x[1]] = true
				}
			}
		}
	}
	return w.devs[dev]
}

// defaultRules are those that the kernel makes with a namespace (fib_rules of
// net/ipv4/fib_rules.c and net/ipv6/fib6_rules.c): priority and table.
var defaultRules = map[int]map[int]int{
	unix.AF_INET:  {0: unix.RT_TABLE_LOCAL, 32766: unix.RT_TABLE_MAIN, 32767: unix.RT_TABLE_DEFAULT},
	unix.AF_INET6: {0: unix.RT_TABLE_LOCAL, 32766: unix.RT_TABLE_MAIN},
}

// plain tells whether a rule is for every packet.
func plain(r netlink.Rule) bool {
	return r.Src == nil && r.Dst == nil && r.Mark == 0 && (r.Mask == nil || *r.Mask == 0) && r.Tos == 0 && r.TunID == 0 && r.Goto <= 0 && r.Flow <= 0 &&
		r.IifName == "" && r.OifName == "" && r.SuppressIfgroup < 0 && r.SuppressPrefixlen < 0 && !r.Invert && r.Dport == nil && r.Sport == nil &&
		r.IPProto == 0 && r.UIDRange == nil && (r.Type == 0 || r.Type == unix.RTN_UNICAST)
}

func (p *place) oddRules(w *wants) {
	missing := map[int]map[int]int{}
	for _, f := range p.ruled {
		missing[f] = maps.Clone(defaultRules[f])
	}
	for _, r := range p.rules {
		prio := max(r.Priority, 0) // the library leaves out what the kernel does
		if t, ok := missing[r.Family][prio]; ok && r.Table == t && plain(r) {
			delete(missing[r.Family], prio)
			continue
		}
		if w.network != "" && r.Protocol == ingressProtocol && prio == ingressPriority && r.Table&^0xffff == ingressTables {
			continue
		}
		p.odd.add(w.ns, "rule", fmt.Sprintf("%s, of IPv%d", r, version(r.Family)), func(_ *Dataplane, s *space) error {
			r.Priority = prio
			return s.h.RuleDel(&r)
		})
	}
	for f, rules := range missing {
		for prio, t := range rules {
			p.odd.add(w.ns, "missing rule", fmt.Sprintf("%d: from all table %d, of IPv%d", prio, t, version(f)), func(_ *Dataplane, s *space) error {
				r := netlink.NewRule()
				r.Family, r.Priority, r.Table, r.Protocol = f, prio, t, unix.RTPROT_KERNEL
				if err := s.h.RuleAdd(r); err != nil && !nl.Exists(err) {
					return err
				}
				return nil
			})
		}
	}
}

func version(family int) int {
	if family == unix.AF_INET6 {
		return 6
	}
	return 4
}

// oddRoutes finds routes that nobody wants, and entries of table local that an
// address should have. What the kernel adds with an address is known by that.
func (p *place) oddRoutes(w *wants) {
	addrs := index(p.addrs)
	for _, r := range p.others {
		if w.network != "" && r.Protocol == ingressProtocol && r.Table&^0xffff == ingressTables || p.kernels(r, addrs) {
			continue
		}
		typ := ""
		if r.Type != unix.RTN_UNICAST {
			typ = fmt.Sprintf(", type %d", r.Type)
		}
		p.odd.add(w.ns, "route", fmt.Sprintf("%s via %v dev %s table %d protocol %d metric %d%s", prefixOf(r), r.Gw, p.name(r.LinkIndex), r.Table, r.Protocol, r.Priority, typ),
			func(_ *Dataplane, s *space) error {
				if r.Dst == nil {
					r.Dst = ipNet(prefixOf(r))
				}
				return s.h.RouteDel(&r)
			})
	}
	now, lacking := time.Now(), map[netip.Addr]time.Time{}
	defer func() { p.lacking = lacking }()
	for _, x := range p.addrs {
		a, l := addrOf(x.IP), p.byIndex[x.LinkIndex]
		if l == nil || l.Attrs().Flags&net.FlagUp == 0 || a.Is6() && (a.IsLinkLocalUnicast() && x.Flags&unix.IFA_F_NODAD == 0 || x.Flags&(unix.IFA_F_TENTATIVE|unix.IFA_F_DADFAILED) != 0) {
			continue
		}
		// Of 127.0.0.1 what the kernel has for the whole of it, which needs that for
		// the one address to be there first.
		dsts := []netip.Prefix{netip.PrefixFrom(a, a.BitLen())}
		if a.Is4() && a.IsLoopback() {
			dsts = append(dsts, loopback.Masked())
		}
		if !slices.ContainsFunc(dsts, func(dst netip.Prefix) bool { return !p.hasLocal(dst.Addr(), x.LinkIndex) }) {
			continue
		}
		if a.Is6() {
			// The kernel adds these some time after the address, by a workqueue.
			since, ok := lacking[a]
			if was, known := p.lacking[a]; known && !ok {
				since = was
			} else if !ok {
				since = now
			}
			if lacking[a] = since; now.Sub(since) < settle6 {
				continue
			}
		}
		p.odd.add(w.ns, "missing route", fmt.Sprintf("local %s dev %s", a, l.Attrs().Name), func(_ *Dataplane, s *space) error {
			for _, dst := range dsts {
				r := &netlink.Route{Dst: ipNet(dst), LinkIndex: x.LinkIndex, Type: unix.RTN_LOCAL, Protocol: unix.RTPROT_KERNEL, Table: unix.RT_TABLE_LOCAL, Family: family(a)}
				if a.Is4() {
					r.Scope, r.Src = unix.RT_SCOPE_HOST, a.AsSlice()
				}
				// All of a network's ports have the same address: one entry each.
				if err := s.h.RouteAppend(r); err != nil && !nl.Exists(err) {
					return err
				}
			}
			return nil
		})
	}
	// lo has what the kernel gives it when it is set up. (A task's 127.0.0.1 is
	// Sandbox's.)
	lo := p.link("lo")
	if lo == nil || lo.Attrs().Flags&net.FlagUp == 0 {
		return
	}
	want := loopback
	if w.task != "" {
		if want = netip.PrefixFrom(netip.IPv6Loopback(), 128); !w.v6 {
			return
		}
	}
	if slices.ContainsFunc(p.addrs, func(x netlink.Addr) bool { return addrOf(x.IP) == want.Addr() }) {
		return
	}
	p.odd.add(w.ns, "missing address", want.String()+" on lo", func(_ *Dataplane, s *space) error {
		x := &netlink.Addr{IPNet: ipNet(want), Scope: unix.RT_SCOPE_HOST}
		if want.Addr().Is6() {
			x.Flags = unix.IFA_F_NODAD
		} else {
			x.Broadcast = net.IPv4zero
		}
		if err := s.h.AddrAdd(lo, x); err != nil && !nl.Exists(err) {
			return err
		}
		return nil
	})
}

// settle6 is for how long an IPv6 address may be without its entry in table local.
const settle6 = time.Second

// hasLocal tells whether table local has an address. Of IPv6 the device is lo in
// some kernels.
func (p *place) hasLocal(a netip.Addr, dev int) bool {
	return p.local[a][dev] || a.Is6() && !a.IsLinkLocalUnicast() && len(p.local[a]) > 0
}

// addrIndex finds addresses by themselves and by their networks: there may be
// thousands, of VIPs.
type addrIndex struct {
	by   map[netip.Addr][]netlink.Addr
	nets map[netip.Prefix][]netlink.Addr
}

func index(addrs []netlink.Addr) addrIndex {
	x := addrIndex{map[netip.Addr][]netlink.Addr{}, map[netip.Prefix][]netlink.Addr{}}
	for _, a := range addrs {
		bits, _ := a.Mask.Size()
		ip := addrOf(a.IP)
		net := netip.PrefixFrom(ip, bits).Masked()
		x.by[ip], x.nets[net] = append(x.by[ip], a), append(x.nets[net], a)
	}
	return x
}

// near are the addresses that a route of the kernel's may come from.
func (x addrIndex) near(r netlink.Route) []netlink.Addr {
	dst := prefixOf(r)
	switch {
	case r.Table == unix.RT_TABLE_MAIN:
		return x.nets[dst]
	case r.Type == unix.RTN_LOCAL && dst.Bits() == dst.Addr().BitLen():
		return x.by[dst.Addr()]
	case r.Type == unix.RTN_LOCAL:
		return x.nets[dst]
	}
	var out []netlink.Addr // broadcasts: addresses of networks that are more than one
	for n, as := range x.nets {
		if n.Bits() < 31 && n.Contains(dst.Addr()) {
			out = append(out, as...)
		}
	}
	return out
}

// kernels tells whether a route is one that the kernel makes by itself.
func (p *place) kernels(r netlink.Route, addrs addrIndex) bool {
	if r.Protocol != unix.RTPROT_KERNEL || r.Gw != nil || len(r.MultiPath) > 0 || r.Table != unix.RT_TABLE_LOCAL && r.Table != unix.RT_TABLE_MAIN {
		return false
	}
	dst := prefixOf(r)
	if r.Family == unix.AF_INET6 && (dst.Addr().IsMulticast() || dst.Addr().IsLinkLocalUnicast() || dst.Addr().IsLoopback() || r.Type == unix.RTN_ANYCAST ||
		dst.Bits() == 0 && r.Type == unix.RTN_UNREACHABLE) {
		return true
	}
	return slices.ContainsFunc(addrs.near(r), func(x netlink.Addr) bool {
		bits, _ := x.Mask.Size()
		a := netip.PrefixFrom(addrOf(x.IP), bits)
		// Of IPv6 the device is lo in some kernels.
		if a.Addr().Is4() != dst.Addr().Is4() || a.Addr().Is4() && x.LinkIndex != r.LinkIndex {
			return false
		}
		switch {
		case r.Table == unix.RT_TABLE_MAIN:
			return r.Type == unix.RTN_UNICAST && dst == a.Masked()
		case r.Type == unix.RTN_LOCAL:
			return dst == netip.PrefixFrom(a.Addr(), a.Addr().BitLen()) || a.Addr().IsLoopback() && dst == a.Masked()
		}
		return r.Type == unix.RTN_BROADCAST && a.Bits() < 31 && a.Contains(dst.Addr())
	})
}

func (p *place) oddAddrs(w *wants) {
	var subnets []netip.Prefix
	wanted := map[overlay.Addr]bool{}
	for _, o := range w.objects {
		switch o := o.(type) {
		case overlay.Filter:
			subnets = overlay.ParsePrefixes(o.Subnets)
		case overlay.Addr:
			wanted[o] = true
		}
	}
	for _, x := range p.addrs {
		bits, _ := x.Mask.Size()
		a := overlay.Addr{Netns: w.ns, Dev: p.name(x.LinkIndex), Prefix: netip.PrefixFrom(addrOf(x.IP), bits)}
		ip := a.Prefix.Addr()
		switch {
		case a.Prefix == loopback && a.Dev == "lo", ip.IsLoopback() && ip.Is6():
			continue
		case ip.Is6() && ip.IsLinkLocalUnicast() && x.Flags&unix.IFA_F_PERMANENT != 0 && x.Scope == unix.RT_SCOPE_LINK && bits == 64 && w.names(a.Dev):
			continue // the kernel's own
		case w.network != "" && a.Dev == "lo" && (x.Label == overlay.Label || x.Label == overlay.VIPLabel):
			continue // reported as such, or package vip's
		case w.network != "" && a.Dev == "lo" && ip.Is6() && slices.ContainsFunc(subnets, func(s netip.Prefix) bool { return s.Contains(ip) }):
			continue
		case wanted[a]:
			continue
		case a.Dev != "lo" && p.byIndex[x.LinkIndex] != nil && oursLink(p.byIndex[x.LinkIndex]) && !w.names(a.Dev):
			continue // of a device that goes with it
		}
		p.odd.add(w.ns, "address", fmt.Sprintf("%s on %s", a.Prefix, a.Dev), func(_ *Dataplane, s *space) error {
			return s.h.AddrDel(nil, &netlink.Addr{IPNet: ipNet(a.Prefix), LinkIndex: x.LinkIndex, Label: x.Label})
		})
	}
}

// oddDevices finds what was attached to devices of ours.
func (p *place) oddDevices(w *wants) {
	inside := w.network != "" || w.task != ""
	for _, l := range p.links {
		a := l.Attrs()
		if a.Flags&net.FlagLoopback == 0 && !oursLink(l) || a.Flags&net.FlagLoopback != 0 && !inside {
			continue
		}
		if a.MasterIndex != 0 {
			p.odd.add(w.ns, "device", a.Name+" belongs to a bridge, bond or VRF", func(_ *Dataplane, s *space) error { return s.h.LinkSetNoMaster(l) })
		}
		if a.RawFlags&unix.IFF_NOARP != 0 && a.Flags&net.FlagLoopback == 0 {
			p.odd.add(w.ns, "device", a.Name+" has ARP switched off", func(_ *Dataplane, s *space) error { return s.h.LinkSetARPOn(l) })
		}
		if a.Xdp != nil && a.Xdp.Attached {
			p.odd.add(w.ns, "device", a.Name+" has an XDP program", func(d *Dataplane, _ *space) error {
				return d.do(w.ns, func() error { return netlink.LinkSetXdpFd(l, -1) })
			})
		}
		for _, q := range p.qdiscs {
			// What the kernel attaches by itself has the handle 0.
			if qa := q.Attrs(); qa.LinkIndex == a.Index && qa.Handle != 0 && (qa.Parent == netlink.HANDLE_ROOT || qa.Parent == netlink.HANDLE_INGRESS) {
				p.odd.add(w.ns, "queueing discipline", q.Type()+" on "+a.Name, func(_ *Dataplane, s *space) error { return s.h.QdiscDel(q) })
			}
		}
	}
}

// reportHost tells what on the host keeps packets from their way and is not ours.
func (d *Dataplane) reportHost(have *overlay.State, w *wants, p *place) {
	if !slices.ContainsFunc(w.objects, func(o overlay.Object) bool { _, ok := o.(overlay.Forwarding); return ok }) {
		return
	}
	missing := map[int]int{}
	for prio, t := range defaultRules[unix.AF_INET] {
		if t != unix.RT_TABLE_DEFAULT {
			missing[t] = prio
		}
	}
	for _, r := range p.rules {
		if r.Family == unix.AF_INET {
			delete(missing, r.Table)
		}
	}
	for t, prio := range missing {
		have.Add(overlay.Remark{What: fmt.Sprintf("no rule leads to routing table %d: put it back with 'ip rule add priority %d table %d'", t, prio, t)})
	}
	for _, dev := range p.unforwarded {
		have.Add(overlay.Remark{What: fmt.Sprintf("net.ipv4.conf.%s.forwarding is 0, so that answers to tasks and requests to published ports that come by %s are dropped: set it to 1", dev, dev)})
	}
}

// readUnforwarded lists the host's devices that have addresses and don't forward;
// within do.
func readUnforwarded(p *place) []string {
	if v, err := nl.Sysctl(ipForward); err != nil || v != "1" {
		return nil // not switched on yet; that sets them all
	}
	var out []string
	for name, l := range p.links {
		a := l.Attrs()
		if a.Flags&net.FlagLoopback != 0 || a.Flags&net.FlagUp == 0 || oursLink(l) || !slices.ContainsFunc(p.addrs, func(x netlink.Addr) bool {
			return x.LinkIndex == a.Index && x.IP.To4() != nil && !x.IP.IsLinkLocalUnicast()
		}) {
			continue
		}
		// Not by nl.Sysctl: there may be a dot in the name.
		if b, err := os.ReadFile("/proc/sys/net/ipv4/conf/" + name + "/forwarding"); err == nil && strings.TrimSpace(string(b)) == "0" {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

func familyName(f nftables.TableFamily) string {
	switch f {
	case nftables.TableFamilyINet:
		return "inet"
	case nftables.TableFamilyIPv4:
		return "ip"
	case nftables.TableFamilyIPv6:
		return "ip6"
	case nftables.TableFamilyARP:
		return "arp"
	case nftables.TableFamilyBridge:
		return "bridge"
	case nftables.TableFamilyNetdev:
		return "netdev"
	}
	return fmt.Sprint(f)
}
