package vxlan

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/overlay"
)

// place is what was last read of one namespace.
type place struct {
	snap
	stamps map[string]nl.Stamp // by nftables table
	due    time.Time           // when all is read again, noticed or not
	valid  bool                // stamps mean something
	again  nl.Kind             // to be read whatever the stamps say
	vips   bool                // some have come since addresses were read, see readRoute
	fresh  bool                // some of it was read just now, or of settings is another than before
	told   struct {            // what was made of it last; see report
		of      *wants
		objects []overlay.Object
	}

	v6     bool // neighs and routes are of both families
	ours   bool // neighs and routes were read at all
	neighs [][]netlink.Neigh
	fdb    []netlink.Neigh
	routes [][]netlink.Route
	// linked are the addresses whose connected route is there.
	linked map[overlay.Addr]bool

	holds  map[overlay.Sysctl]bool
	files  map[string]*os.File // of sysctls, by their names
	filter struct {
		of           overlay.Filter
		is           *overlay.Filter // nil: absent
		whole, parts []guard
	}
	redirect struct {
		of overlay.Redirect
		is *overlay.Redirect
	}
	// See stray.go.
	rules   []netlink.Rule
	lacking map[netip.Addr]time.Time // IPv6 addresses without their entry there, since when
	ruled   []int                    // families that have rules
	qdiscs  []netlink.Qdisc
	others  []netlink.Route             // but ours of the main table
	local   map[netip.Addr]map[int]bool // entries of table local, by device
	alien   []table                     // nftables tables that are not Shoal's
	odd     oddities
	// Of the host's namespace only.
	unforwarded []string
	forwarding  *overlay.Forwarding
	members     struct {
		of overlay.Members
		is *overlay.Members
	}
}

// forgetPlace forgets what was read of a namespace.
func (d *Dataplane) forgetPlace(ns string) {
	if p := d.places[ns]; p != nil {
		p.closeFiles()
		delete(d.places, ns)
	}
}

func (p *place) closeFiles() {
	for _, f := range p.files {
		f.Close()
	}
	clear(p.files)
}

// readAgain notes what is to be read again after an operation. The kernel tells of
// an IPv6 address that was added some time later, by a workqueue
// (addrconf_dad_work in net/ipv6/addrconf.c).
func (d *Dataplane) readAgain(o overlay.Object) {
	again := func(ns string, k nl.Kind) {
		if p := d.places[ns]; p != nil {
			p.again |= k
		}
	}
	if a, ok := o.(overlay.Addr); ok {
		again(a.Netns, nl.Addrs)
	}
	for _, dev := range overlay.Devices(o) {
		again(dev[0], nl.Links)
	}
}

// sweepPeriod is how long what was read counts without a notice, plus up to half
// of it, so that not all namespaces are read in one pass.
const sweepPeriod = 20 * time.Second

// tables are the nftables tables that are read in a namespace.
func (d *Dataplane) tables(w *wants) []string {
	switch {
	case w.ns == "":
		return []string{overlay.HostTable(d.cfg.Instance), overlay.MembersTable(d.cfg.Instance)}
	case w.network != "":
		return []string{overlay.FilterTable}
	}
	return []string{overlay.TaskTable}
}

// read brings what is known of a namespace up to date.
func (d *Dataplane) read(w *wants, now time.Time) (*place, error) {
	p := d.places[w.ns]
	if p == nil {
		p = &place{holds: map[overlay.Sysctl]bool{}, files: map[string]*os.File{}, linked: map[overlay.Addr]bool{}}
		d.places[w.ns] = p
	}
	changed, nft := nl.AllKinds, map[string]bool{}
	stamps, valid, alien := map[string]nl.Stamp{}, true, false
	for _, t := range d.tables(w) {
		s, ok := d.cfg.Notices.At(d.real(w.ns), t)
		stamps[t], valid = s, valid && ok
		alien = alien || !ok || !p.valid || !now.Before(p.due) || s.Others(p.stamps[t])
		nft[t] = true
		if ok && p.valid && now.Before(p.due) {
			changed = s.Since(p.stamps[t])
			nft[t] = s.Table(p.stamps[t])
		}
	}
	if changed == nl.AllKinds {
		p.due = now.Add(sweepPeriod + rand.N(sweepPeriod/2))
		p.closeFiles() // the name may be another namespace's by now
	}
	p.valid, p.fresh = false, false // until all has gone well
	changed |= p.again
	p.again = 0
	ours := w.network != "" || w.task != ""
	if ours && !p.ours || w.v6 && !p.v6 {
		changed |= nl.Routes | nl.Neighs | nl.Policies
	}
	if err := d.readRoute(w, p, changed, ours); err != nil {
		return nil, err
	}
	if err := d.readInside(w, p, nft, alien && ours, changed); err != nil {
		return nil, err
	}
	p.stamps, p.valid = stamps, valid
	return p, nil
}

// readRoute reads what rtnetlink tells. What goes with a device goes without a
// notice of its own, and so do routes with their source address.
func (d *Dataplane) readRoute(w *wants, p *place, changed nl.Kind, ours bool) error {
	where := w.ns
	if where == "" {
		where = "the host"
	}
	if changed&nl.Links != 0 {
		changed |= nl.Addrs | nl.Neighs
	}
	// VIPs that come are package vip's. Nothing is read for them, but neither addresses
	// nor routes without the other: what the kernel adds with an address is known by it.
	p.vips = p.vips || changed&nl.VIPs != 0
	if p.vips && changed&nl.Routes != 0 {
		changed |= nl.Addrs
	}
	if changed&nl.Addrs != 0 {
		changed |= nl.Routes
	}
	if changed&nl.Routes != 0 {
		clear(p.linked)
	}
	var links []overlay.Addr // to be looked up
	for _, o := range w.objects {
		if a, ok := o.(overlay.Addr); ok && hasLink(a) {
			if _, known := p.linked[a]; !known {
				links = append(links, a)
			}
		}
	}
	if changed&(nl.Links|nl.Addrs|nl.Routes|nl.Neighs|nl.Policies|nl.Qdiscs) == 0 && len(links) == 0 {
		return nil
	}
	p.fresh = true
	s, err := d.dial(w.ns)
	if err != nil {
		return err
	}
	defer s.h.Close()
	if changed&nl.Links != 0 {
		list, err := nl.Dump(s.h.LinkList)
		if err != nil {
			return fmt.Errorf("list devices of %s: %w", where, err)
		}
		p.links, p.byIndex = map[string]netlink.Link{}, map[int]netlink.Link{}
		for _, l := range list {
			p.links[l.Attrs().Name], p.byIndex[l.Attrs().Index] = l, l
		}
	}
	if changed&nl.Addrs != 0 {
		if p.addrs, err = nl.Dump(func() ([]netlink.Addr, error) { return s.h.AddrList(nil, unix.AF_UNSPEC) }); err != nil {
			return fmt.Errorf("list addresses of %s: %w", where, err)
		}
		p.vips = false
	}
	for _, a := range links {
		if p.linked[a], err = s.connected(a, p.link(a.Dev)); err != nil {
			return fmt.Errorf("routes of %s: %w", where, err)
		}
	}
	if err := d.readStrays(w, p, s, changed); err != nil {
		return fmt.Errorf("%s: %w", where, err)
	}
	p.ours = ours
	if !ours {
		return nil
	}
	families := []int{unix.AF_INET}
	if w.v6 {
		families = append(families, unix.AF_INET6)
	}
	if changed&nl.Neighs != 0 {
		p.neighs, p.fdb = nil, nil
		for _, f := range families {
			list, err := nl.Dump(func() ([]netlink.Neigh, error) { return s.h.NeighList(0, f) })
			if err != nil {
				return fmt.Errorf("list neighbours of %s: %w", where, err)
			}
			p.neighs = append(p.neighs, list)
		}
		if vx := p.link(overlay.VXLANDev); w.network != "" && vx != nil && oursLink(vx) {
			if p.fdb, err = nl.Dump(func() ([]netlink.Neigh, error) { return s.h.NeighList(vx.Attrs().Index, unix.AF_BRIDGE) }); err != nil {
				return fmt.Errorf("list the forwarding entries of %s: %w", where, err)
			}
		}
	}
	if changed&nl.Routes != 0 {
		p.routes = nil
		for _, f := range families {
			list, err := nl.Dump(func() ([]netlink.Route, error) {
				return s.h.RouteListFiltered(f, &netlink.Route{Protocol: overlay.RouteProtocol}, netlink.RT_FILTER_PROTOCOL)
			})
			if err != nil {
				return fmt.Errorf("list routes of %s: %w", where, err)
			}
			p.routes = append(p.routes, list)
		}
	}
	p.v6 = w.v6
	return nil
}

// readInside reads what takes being in the namespace: sysctls that are not open
// yet, and nftables. Where all of it is known nobody goes there.
func (d *Dataplane) readInside(w *wants, p *place, nft map[string]bool, alien bool, changed nl.Kind) error {
	var work []func(*nftConn) error
	var shut []overlay.Sysctl
	if p.told.of != w {
		clear(p.holds)
	}
	open := map[string]bool{ipForward: w.ns == ""} // the host's is readHost's
	for _, o := range w.objects {
		switch o := o.(type) {
		case overlay.Sysctl:
			open[o.Name] = true
			if v, ok := p.sysctl(o.Name); ok {
				was, known := p.holds[o]
				p.holds[o] = v == o.Value
				p.fresh = p.fresh || !known || was != p.holds[o]
			} else {
				shut = append(shut, o)
			}
		case overlay.Filter:
			if nft[overlay.FilterTable] || p.filter.of != o {
				work = append(work, func(c *nftConn) (err error) {
					p.filter.of = o
					p.filter.is, p.filter.whole, p.filter.parts, err = readFilter(c, o)
					return err
				})
			}
		case overlay.Redirect:
			if nft[overlay.TaskTable] || p.redirect.of != o {
				work = append(work, func(c *nftConn) (err error) {
					p.redirect.of = o
					p.redirect.is, err = observeRedirect(c, o)
					return err
				})
			}
		}
	}
	for name, f := range p.files {
		if !open[name] {
			f.Close()
			delete(p.files, name)
		}
	}
	if w.ns == "" {
		if nft[overlay.HostTable(d.cfg.Instance)] {
			work = append(work, func(c *nftConn) (err error) {
				p.forwarding, err = d.readForwarding(c)
				return err
			})
		}
		if nft[overlay.MembersTable(d.cfg.Instance)] {
			p.members.of = overlay.Members{} // to be read by readHost
		}
	}
	if alien {
		work = append(work, func(c *nftConn) (err error) {
			p.alien, err = readTables(c, w)
			return err
		})
	}
	unforwarded := w.ns == "" && changed&(nl.Netconf|nl.Links|nl.Addrs) != 0
	if len(work) == 0 && len(shut) == 0 && !unforwarded {
		return nil
	}
	p.fresh = true
	err := d.do(w.ns, func() error {
		if unforwarded {
			p.unforwarded = readUnforwarded(p)
		}
		for _, o := range shut {
			var err error
			if p.holds[o], err = p.openSysctl(o); err != nil {
				return err
			}
		}
		if len(work) == 0 {
			return nil
		}
		c, err := dialNFT()
		if err != nil {
			return err
		}
		defer c.close()
		for _, fn := range work {
			if err := fn(c); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		where := w.ns
		if where == "" {
			where = "the host"
		}
		return fmt.Errorf("%s: %w", where, err)
	}
	return err
}

// openSysctl reads a setting and keeps its file: what is opened in a namespace
// shows that one's settings wherever it is read (proc_sys_lookup in
// fs/proc/proc_sysctl.c). Within do.
func (p *place) openSysctl(o overlay.Sysctl) (bool, error) {
	if f, err := nl.OpenSysctl(o.Name); err == nil {
		p.files[o.Name] = f
		if v, ok := p.sysctl(o.Name); ok {
			return v == o.Value, nil
		}
	}
	return sysctlHolds(o)
}

// sysctl reads a setting through the file that is open. One whose device is gone
// can't be read any more (ENOENT), also when another of that name has come.
func (p *place) sysctl(name string) (string, bool) {
	f := p.files[name]
	if f == nil {
		return "", false
	}
	var b [64]byte
	n, _ := f.ReadAt(b[:], 0)
	if n == 0 || n == len(b) { // io.EOF comes with what there is
		f.Close()
		delete(p.files, name)
		return "", false
	}
	return strings.TrimSpace(string(b[:n])), true
}

// readHost brings what is known of the host's namespace alone up to date.
func (d *Dataplane) readHost(p *place, want overlay.Members) (*overlay.Forwarding, *overlay.Members, error) {
	if p.members.of != want {
		err := d.do("", func() error {
			c, err := dialNFT()
			if err != nil {
				return err
			}
			defer c.close()
			p.members.is, err = observeMembers(c, want)
			return err
		})
		if err != nil {
			return nil, nil, err
		}
		p.members.of = want
	}
	if p.forwarding == nil {
		return nil, p.members.is, nil
	}
	forwarding := *p.forwarding
	v, ok := p.sysctl(ipForward)
	if !ok {
		err := d.do("", func() (err error) {
			if f, err := nl.OpenSysctl(ipForward); err == nil {
				p.files[ipForward] = f
			}
			v, err = nl.Sysctl(ipForward)
			return err
		})
		if err != nil {
			return nil, nil, err
		}
	}
	if v != "1" {
		forwarding.Fault = ipForward + " is " + v
	}
	return &forwarding, p.members.is, nil
}

// owner is whose a namespace is that nobody wants.
type owner struct {
	stamp   nl.Stamp
	network string
	ours    bool
}

// ownerOf is whoseNamespace, asked again only after a notice.
func (d *Dataplane) ownerOf(ns string) (network string, ours bool, err error) {
	s, ok := d.cfg.Notices.At(ns, "")
	if o, known := d.unwanted[ns]; ok && known && s.Since(o.stamp)&nl.Links == 0 {
		return o.network, o.ours, nil
	}
	network, ours, err = d.whoseNamespace(ns)
	delete(d.unwanted, ns)
	if err == nil && ok {
		d.unwanted[ns] = owner{s, network, ours}
	}
	return network, ours, err
}

// keepOwners forgets whose the namespaces are that are not listed.
func (d *Dataplane) keepOwners(names []string) {
	for ns := range d.unwanted {
		if !slices.Contains(names, ns) {
			delete(d.unwanted, ns)
		}
	}
}
