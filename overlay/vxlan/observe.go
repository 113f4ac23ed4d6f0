package vxlan

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/overlay"
	"github.com/shoalnet/shoal/spec"
)

// snap is what was read of one namespace's devices and addresses.
type snap struct {
	links   map[string]netlink.Link
	byIndex map[int]netlink.Link
	addrs   []netlink.Addr
}

func (s *snap) name(index int) string {
	if l := s.byIndex[index]; l != nil {
		return l.Attrs().Name
	}
	return ""
}

// link returns a device by name, or nil; also of a namespace that is absent.
func (s *snap) link(name string) netlink.Link {
	if s == nil {
		return nil
	}
	return s.links[name]
}

// wants is what is wanted in one namespace.
type wants struct {
	ns      string
	objects []overlay.Object
	network string                  // ID; empty: not an ovns
	task    string                  // ID; empty: not a task's
	v6      bool                    // some of it is IPv6
	devs    map[string]bool         // see names
	set     map[overlay.Object]bool // objects, once asked for; see same
}

// same tells whether two ask for the same of one namespace.
func (w *wants) same(o *wants) bool {
	if w.network != o.network || w.task != o.task || w.v6 != o.v6 || len(w.objects) != len(o.objects) {
		return false
	}
	if w.set == nil {
		w.set = make(map[overlay.Object]bool, len(w.objects))
		for _, x := range w.objects {
			w.set[x] = true
		}
	}
	return !slices.ContainsFunc(o.objects, func(x overlay.Object) bool { return !w.set[x] })
}

// has tells whether something with a key is wanted.
func (w *wants) has(key any) bool {
	return slices.ContainsFunc(w.objects, func(o overlay.Object) bool { return o.Key() == key })
}

// seen is what the last Observe made of what it read.
type seen struct {
	want, have overlay.State
	rest       overlay.State // of have, what is looked at each time
}

// Observe implements overlay.Dataplane. Where nothing was read anew, what it returns is
// what it returned last (see [overlay.State.Is]).
func (d *Dataplane) Observe(ctx context.Context, want overlay.State) (overlay.State, error) {
	d.hangUp()
	last := d.seen
	d.seen = nil
	anew := last == nil || !want.Is(last.want)
	places := d.group(want)
	snaps := map[string]*snap{}
	now := time.Now()
	for ns, w := range places {
		if err := ctx.Err(); err != nil {
			return overlay.State{}, err
		}
		p, err := d.read(w, now)
		switch {
		case ns != "" && errors.Is(err, fs.ErrNotExist):
			d.forgetPlace(ns)
			anew = true
			continue // absent, and so is all that would be in it
		case err != nil:
			d.forgetPlace(ns)
			return overlay.State{}, err
		}
		anew = anew || p.fresh || ns != "" && !p.knows(w)
		snaps[ns] = &p.snap
	}
	for ns := range d.places {
		if places[ns] == nil {
			d.forgetPlace(ns)
		}
	}
	host := d.places[""]
	var rest overlay.State
	d.tell(&rest, places[""], host)
	host.told.of = places[""]
	if err := d.observeHost(&rest, want, host); err != nil {
		return overlay.State{}, err
	}
	if err := d.observeUnwanted(&rest, places); err != nil {
		return overlay.State{}, err
	}
	if !anew && rest.Alike(last.rest) {
		d.seen = last
		return last.have, nil
	}
	have := overlay.State{UnderlayMTU: rest.UnderlayMTU}
	for ns, w := range places {
		if p := d.places[ns]; ns != "" && p != nil {
			d.report(&have, w, p)
		}
	}
	d.observeDevices(&have, want, snaps)
	rest.Each(have.Add)
	d.seen = &seen{want, have, rest}
	return have, nil
}

// group sorts what is wanted by namespaces. Of one of which the same is wanted as
// before it is the same wants.
func (d *Dataplane) group(want overlay.State) map[string]*wants {
	if d.grouped.places != nil && want.Is(d.grouped.want) {
		return d.grouped.places
	}
	places := map[string]*wants{"": {}}
	want.Each(func(o overlay.Object) {
		ns, _ := overlay.Place(o)
		w := places[ns]
		if w == nil {
			w = &wants{ns: ns}
			places[ns] = w
		}
		w.objects = append(w.objects, o)
		switch o := o.(type) {
		case overlay.Namespace:
			w.network = o.Network
		case overlay.Sandbox:
			w.task = o.Task
		case overlay.Addr:
			w.v6 = w.v6 || o.Prefix.Addr().Is6()
		case overlay.Route:
			w.v6 = w.v6 || o.Dst.Addr().Is6()
		}
	})
	for ns, w := range places {
		if was := d.grouped.places[ns]; was != nil && was.same(w) {
			places[ns] = was
		}
	}
	d.grouped.want, d.grouped.places = want, places
	return places
}

// knows tells whether what was told last of a namespace of Shoal's stands.
func (p *place) knows(w *wants) bool { return !p.fresh && p.told.of == w && len(p.lacking) == 0 }

// report adds what was read of a namespace of Shoal's, all but its devices: as it was told
// last where neither that nor what is wanted has changed.
func (d *Dataplane) report(have *overlay.State, w *wants, p *place) {
	if !p.knows(w) {
		var s overlay.State
		d.tell(&s, w, p)
		p.told.of, p.told.objects = w, p.told.objects[:0]
		s.Each(func(o overlay.Object) { p.told.objects = append(p.told.objects, o) })
	}
	for _, o := range p.told.objects {
		have.Add(o)
	}
}

// tell is report without what was told last.
func (d *Dataplane) tell(have *overlay.State, w *wants, p *place) {
	reportAddrs(have, w, p)
	if w.network != "" || w.task != "" {
		if w.network != "" {
			if lo := p.link("lo"); lo != nil && lo.Attrs().Alias == d.namespaceMark(w.network) && lo.Attrs().Flags&net.FlagUp != 0 {
				have.Add(overlay.Namespace{Netns: w.ns, Network: w.network})
			}
		} else {
			have.Add(observeSandbox(w, &p.snap))
		}
		reportNeighs(have, w, p)
		reportRoutes(have, w, p)
	}
	d.reportStrays(have, w, p)
	for _, o := range w.objects {
		switch o := o.(type) {
		case overlay.Sysctl:
			if p.holds[o] {
				have.Add(o)
			}
		case overlay.Filter:
			if p.filter.is == nil {
				continue
			}
			have.Add(*p.filter.is)
			for _, g := range p.filter.whole {
				have.Add(g.in(w.ns))
			}
			for _, g := range p.filter.parts {
				// Wanted: to be put, so not there. Not wanted: to be deleted.
				if !w.has(g.in(w.ns).Key()) {
					have.Add(g.in(w.ns))
				}
			}
		case overlay.Redirect:
			if p.redirect.is != nil {
				have.Add(*p.redirect.is)
			}
		}
	}
}

// observeSandbox reports a task's namespace, and its loopback device.
func observeSandbox(w *wants, sn *snap) overlay.Sandbox {
	o := overlay.Sandbox{Netns: w.ns, Task: w.task}
	lo := sn.link("lo")
	if lo == nil {
		return o
	}
	has := slices.ContainsFunc(sn.addrs, func(a netlink.Addr) bool {
		return a.LinkIndex == lo.Attrs().Index && a.IP.Equal(loopback.Addr().AsSlice())
	})
	switch {
	case lo.Attrs().Flags&net.FlagUp == 0:
		o.Fault = "lo is down"
	case !has:
		o.Fault = "lo lacks " + loopback.String()
	}
	return o
}

func reportAddrs(have *overlay.State, w *wants, p *place) {
	there := map[overlay.Addr]bool{}
	for _, a := range p.addrs {
		bits, _ := a.Mask.Size()
		o := overlay.Addr{Netns: w.ns, Dev: p.name(a.LinkIndex), Prefix: netip.PrefixFrom(addrOf(a.IP), bits)}
		there[o] = true
		if a.Label == overlay.Label && w.network != "" {
			have.Add(o)
		}
	}
	for _, o := range w.objects {
		if a, ok := o.(overlay.Addr); ok && there[a] && (!hasLink(a) || p.linked[a]) {
			have.Add(a)
		}
	}
}

// connected tells whether the route to the link is there that the kernel adds
// with an address. Not of a device that is down, whose routes come with it.
func (s *space) connected(o overlay.Addr, l netlink.Link) (bool, error) {
	if l == nil || l.Attrs().Flags&net.FlagUp == 0 {
		return true, nil
	}
	other := o.Prefix.Masked().Addr()
	if other == o.Prefix.Addr() {
		other = other.Next()
	}
	// The question costs nothing; reading all the host's routes may be dear.
	if r, err := s.h.RouteGet(other.AsSlice()); err == nil && len(r) == 1 && r[0].LinkIndex == l.Attrs().Index {
		return true, nil
	}
	list, err := nl.Dump(func() ([]netlink.Route, error) {
		return s.h.RouteListFiltered(unix.AF_INET, &netlink.Route{LinkIndex: l.Attrs().Index}, netlink.RT_FILTER_OIF)
	})
	return slices.ContainsFunc(list, func(r netlink.Route) bool { return prefixOf(r) == o.Prefix.Masked() }), err
}

func reportNeighs(have *overlay.State, w *wants, p *place) {
	wanted := map[any]bool{}
	for _, o := range w.objects {
		switch o := o.(type) {
		case overlay.Neigh, overlay.FDB:
			wanted[o.Key()] = true
		}
	}
	for _, list := range p.neighs {
		for _, n := range list {
			l := p.byIndex[n.LinkIndex]
			if n.State != netlink.NUD_PERMANENT || l == nil || !oursLink(l) {
				continue
			}
			o := overlay.Neigh{Netns: w.ns, Dev: l.Attrs().Name, Addr: addrOf(n.IP), MAC: n.HardwareAddr.String()}
			switch {
			case wanted[o.Key()]:
			case w.network == "": // in the task's namespace: its own affair
				continue
			}
			have.Add(o)
		}
	}
	for _, n := range p.fdb {
		o := overlay.FDB{Netns: w.ns, MAC: n.HardwareAddr.String(), Dst: addrOf(n.IP)}
		if !wanted[o.Key()] && !overlay.IsVTEPMAC(n.HardwareAddr) {
			continue
		}
		if n.State&netlink.NUD_PERMANENT == 0 || n.VNI != 0 {
			o.Dst = netip.Addr{} // would age out, or goes elsewhere: to be set again
		}
		have.Add(o)
	}
}

// prefixOf is a route's destination. The kernel leaves it out of a default
// route, the library may or may not fill it in.
func prefixOf(r netlink.Route) netip.Prefix {
	if r.Dst == nil {
		if r.Family == unix.AF_INET6 {
			return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
		}
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	bits, _ := r.Dst.Mask.Size()
	a, _ := netip.AddrFromSlice(r.Dst.IP)
	if r.Family == unix.AF_INET {
		a = a.Unmap()
	}
	return netip.PrefixFrom(a, bits)
}

func reportRoutes(have *overlay.State, w *wants, p *place) {
	for _, list := range p.routes {
		for _, r := range list {
			o := overlay.Route{Netns: w.ns, Dst: prefixOf(r), Metric: r.Priority, Onlink: r.Flags&int(netlink.FLAG_ONLINK) != 0, MTU: r.MTU}
			if r.MTU != 0 && !r.MTULock {
				o.MTU = -1
			}
			switch r.Type {
			case unix.RTN_UNICAST:
				o.Dev = p.name(r.LinkIndex)
			case unix.RTN_UNREACHABLE: // IPv6 says "dev lo" here
				o.Type = "unreachable"
			default:
				o.Type = fmt.Sprintf("type-%d", r.Type)
			}
			if len(r.MultiPath) > 0 {
				o.Type = "multipath"
			}
			if r.Gw != nil {
				o.Via = addrOf(r.Gw)
			}
			if r.Src != nil {
				o.Src = addrOf(r.Src)
			}
			have.Add(o)
		}
	}
}

// oursLink tells whether a device is marked as ours. lo, which marks a
// namespace, is not.
func oursLink(l netlink.Link) bool {
	a := l.Attrs()
	if a.Flags&net.FlagLoopback != 0 {
		return false
	}
	_, _, port := parsePortMark(a.Alias)
	return port || strings.HasPrefix(a.Alias, networkMarkPrefix) ||
		// Under its temporary name, and not marked yet.
		a.Alias == "" && strings.HasPrefix(a.Name, overlay.TempPrefix) && (l.Type() == "veth" || l.Type() == "vxlan")
}

// observeDevices reports the devices of all namespaces, pairs as one.
func (d *Dataplane) observeDevices(have *overlay.State, want overlay.State, snaps map[string]*snap) {
	host := snaps[""]
	byHostDev := map[string]overlay.Egress{} // wanted
	ports := map[[2]string]overlay.Port{}    // wanted
	var ovns []overlay.Namespace
	want.Each(func(o overlay.Object) {
		switch o := o.(type) {
		case overlay.Namespace:
			ovns = append(ovns, o)
		case overlay.Egress:
			byHostDev[o.Dev] = o
		case overlay.Port:
			ports[[2]string{o.Netns, o.Dev}] = o
		}
	})
	for _, n := range ovns {
		sn := snaps[n.Netns]
		if sn == nil {
			continue
		}
		for name, l := range sn.links {
			if w, ok := ports[[2]string{n.Netns, name}]; ok && !oursLink(l) {
				if far := snaps[w.TaskNetns].link(w.Eth); far != nil && far.Attrs().Alias == portMark(w.Task, w.Network) && paired(l, far) {
					w.MTU, w.Fault = l.Attrs().MTU, "device "+name+" has lost its alias"
					have.Add(w)
					continue
				}
			}
			if name == overlay.VXLANDev && l.Type() == "vxlan" && !oursLink(l) {
				o := observeVXLAN(n, l)
				o.Network, o.Fault = n.Network, "has lost its alias"
				have.Add(o)
				continue
			}
			if !oursLink(l) {
				continue
			}
			task, network, isPort := parsePortMark(l.Attrs().Alias)
			switch {
			case strings.HasPrefix(name, overlay.TempPrefix):
				have.Add(overlay.Stray{Netns: n.Netns, Dev: name})
			case name == overlay.VXLANDev:
				have.Add(observeVXLAN(n, l))
			case !isPort && name != overlay.OutDev:
				have.Add(overlay.Stray{Netns: n.Netns, Dev: name})
			case isPort:
				p := overlay.Port{Netns: n.Netns, Dev: name, Network: network, Task: task, MTU: l.Attrs().MTU, Broken: true}
				if w, ok := ports[[2]string{n.Netns, name}]; ok {
					p.TaskNetns, p.Eth = w.TaskNetns, w.Eth
					if far := snaps[w.TaskNetns].link(w.Eth); far != nil && paired(l, far) {
						p.MAC, p.Broken = far.Attrs().HardwareAddr.String(), false
						p.MTU, p.Fault = pairState(l, far, overlay.LinkMAC)
						if far.Attrs().Alias != l.Attrs().Alias {
							p.Fault = "device " + w.Eth + " has lost its alias"
						}
					}
				}
				have.Add(p)
			}
		}
	}
	for name, l := range host.links {
		if w, ok := byHostDev[name]; ok && !strings.HasPrefix(l.Attrs().Alias, networkMarkPrefix) {
			if near := snaps[w.Netns].link(overlay.OutDev); near != nil && near.Attrs().Alias == networkMark(w.Network) && paired(near, l) {
				w.MTU, w.Fault = l.Attrs().MTU, "device "+name+" has lost its alias"
				have.Add(w)
			}
			continue
		}
		if !strings.HasPrefix(name, overlay.HostPrefix) || !strings.HasPrefix(l.Attrs().Alias, networkMarkPrefix) {
			continue
		}
		e := overlay.Egress{Network: strings.TrimPrefix(l.Attrs().Alias, networkMarkPrefix), Dev: name, MTU: l.Attrs().MTU, Broken: true}
		if w, ok := byHostDev[name]; ok {
			e.Netns = w.Netns
			if near := snaps[w.Netns].link(overlay.OutDev); near != nil && paired(near, l) {
				e.Broken = false
				e.MTU, e.Fault = pairState(near, l, "")
				if near.Attrs().Alias != l.Attrs().Alias {
					e.Fault = "device " + overlay.OutDev + " has lost its alias"
				}
			}
		}
		have.Add(e)
	}
}

// paired tells whether two devices are the ends of one veth pair: each names
// the other's index as its link (IFLA_LINK).
func paired(a, b netlink.Link) bool {
	return a.Type() == "veth" && b.Type() == "veth" &&
		a.Attrs().ParentIndex == b.Attrs().Index && b.Attrs().ParentIndex == a.Attrs().Index
}

// pairState tells a pair's MTU (-1 when the ends differ) and what is to be mended.
func pairState(near, far netlink.Link, nearMAC string) (mtu int, fault string) {
	mtu = near.Attrs().MTU
	if far.Attrs().MTU != mtu {
		mtu = -1
	}
	switch {
	case near.Attrs().Flags&net.FlagUp == 0:
		fault = near.Attrs().Name + " is down"
	case far.Attrs().Flags&net.FlagUp == 0:
		fault = far.Attrs().Name + " is down"
	case nearMAC != "" && near.Attrs().HardwareAddr.String() != nearMAC:
		fault = near.Attrs().Name + " has another address"
	}
	return mtu, fault
}

func observeVXLAN(n overlay.Namespace, l netlink.Link) overlay.VXLAN {
	a := l.Attrs()
	o := overlay.VXLAN{Netns: n.Netns, Network: strings.TrimPrefix(a.Alias, networkMarkPrefix), MAC: a.HardwareAddr.String(), MTU: a.MTU}
	v, ok := l.(*netlink.Vxlan)
	if !ok {
		o.Broken = true
		return o
	}
	o.VNI, o.Port, o.Local = uint32(v.VxlanId), v.Port, addrOf(v.SrcAddr)
	// Learning would let any packet from the underlay move a node's MAC.
	o.Broken = v.Learning || v.FlowBased || v.Proxy || v.RSC || v.L2miss || v.L3miss || v.TTL != 0 || v.TOS != 0 || len(v.Group) > 0 || v.VtepDevIndex != 0
	if a.Flags&net.FlagUp == 0 {
		o.Fault = "down"
	}
	return o
}

// observeHost reports what is one for the whole node.
func (d *Dataplane) observeHost(have *overlay.State, want overlay.State, host *place) error {
	for _, a := range host.addrs {
		if want.Get(overlay.Underlay{}.Key()) == (overlay.Underlay{Addr: addrOf(a.IP)}) {
			have.Add(overlay.Underlay{Addr: addrOf(a.IP)})
			if l := host.byIndex[a.LinkIndex]; l != nil {
				have.UnderlayMTU = l.Attrs().MTU
			}
		}
	}
	d.underlay.Store(int64(have.UnderlayMTU))
	// One that is not wanted is looked for as well, to be removed.
	o, _ := want.Get(overlay.Members{}.Key()).(overlay.Members)
	o.Table = overlay.MembersTable(d.cfg.Instance)
	forwarding, members, err := d.readHost(host, o)
	if err != nil {
		return err
	}
	if forwarding != nil {
		have.Add(*forwarding)
	}
	if members != nil {
		have.Add(*members)
	}
	return nil
}

// observeUnwanted reports the namespaces of this instance that are not wanted.
func (d *Dataplane) observeUnwanted(have *overlay.State, places map[string]*wants) error {
	names, err := nl.List(d.netnsPrefix())
	if err != nil {
		return err
	}
	d.keepOwners(names)
	for _, ns := range names {
		if places[ns] != nil {
			continue
		}
		id, ours, err := d.ownerOf(ns)
		if err != nil {
			return err
		}
		if ours {
			have.Add(overlay.Namespace{Netns: ns, Network: id})
		}
	}
	return nil
}

func (d *Dataplane) netnsPrefix() string {
	return strings.TrimSuffix(spec.OverlayNetns(d.cfg.Instance, spec.Network{}), "-")
}

// whoseNamespace tells whether a namespace with a name of ours is ours, and of
// which network: lo's alias says so.
func (d *Dataplane) whoseNamespace(ns string) (network string, ours bool, err error) {
	s, err := d.dial(ns)
	if errors.Is(err, fs.ErrNotExist) {
		return "", false, nil
	}
	if err != nil {
		return "", false, err
	}
	defer s.h.Close()
	links, err := nl.Dump(s.h.LinkList)
	if err != nil {
		return "", false, fmt.Errorf("list devices of %s: %w", ns, err)
	}
	i := slices.IndexFunc(links, func(l netlink.Link) bool { return l.Attrs().Name == "lo" })
	if i < 0 {
		return "", false, nil
	}
	alias := links[i].Attrs().Alias
	if id, ok := strings.CutPrefix(alias, d.instanceMark()); ok {
		return id, true, nil
	}
	return "", false, nil
}
