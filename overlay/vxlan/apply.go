package vxlan

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/overlay"
)

// ---- namespaces ----

// putNamespace makes an ovns and marks it.
func (d *Dataplane) putNamespace(o overlay.Namespace) error {
	d.drop(o.Netns)
	if err := nl.Create(o.Netns); err != nil {
		return err
	}
	s, err := d.in(o.Netns)
	if err != nil {
		return err
	}
	lo, err := s.h.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("lo of namespace %s: %w", o.Netns, err)
	}
	switch mark, alias := d.namespaceMark(o.Network), lo.Attrs().Alias; {
	case alias == mark:
	case !strings.HasPrefix(alias, "shoal ") || !strings.Contains(alias, " network "):
		// New, or somebody has written over the mark.
		if err := s.h.LinkSetAlias(lo, mark); err != nil {
			return fmt.Errorf("mark namespace %s: %w", o.Netns, err)
		}
	default:
		return fmt.Errorf("namespace %s exists and belongs to another: %q: remove it with 'ip netns del %s', or give this agent another --instance", o.Netns, lo.Attrs().Alias, o.Netns)
	}
	// A namespace whose maker died early, or whose lo was set down by hand.
	if err := s.h.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set lo of namespace %s up: %w", o.Netns, err)
	}
	return nil
}

// delNamespace removes an ovns. Its devices go first and by name, because the
// kernel takes a namespace apart in its own time, and not while a process or a
// socket is in it; a new vxlan device of the same VNI would have to wait.
func (d *Dataplane) delNamespace(netns string) error {
	s, err := d.in(netns)
	if errors.Is(err, fs.ErrNotExist) {
		return nl.Remove(netns)
	}
	if err != nil {
		return err
	}
	links, err := nl.Dump(s.h.LinkList)
	if err != nil {
		return fmt.Errorf("list devices of namespace %s: %w", netns, err)
	}
	for _, l := range links {
		if oursLink(l) {
			if err := s.h.LinkDel(l); err != nil && !nl.Absent(err) {
				return fmt.Errorf("delete device %s of namespace %s: %w", l.Attrs().Name, netns, err)
			}
		}
	}
	d.drop(netns)
	return nl.Remove(netns)
}

// putSandbox mends the loopback device of a task's namespace, on which its name
// server is. The namespace itself is the runtime's.
func (d *Dataplane) putSandbox(o overlay.Sandbox) error {
	s, err := d.in(o.Netns)
	if errors.Is(err, fs.ErrNotExist) { // observed absent, and not come since
		return fmt.Errorf("the task's network namespace %s does not exist: the task has ended, or someone deleted it", o.Netns)
	}
	if err != nil {
		return err
	}
	lo, err := s.h.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("lo of namespace %s: %w", o.Netns, err)
	}
	if err := s.h.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set lo of namespace %s up: %w", o.Netns, err)
	}
	a := &netlink.Addr{IPNet: ipNet(loopback), LinkIndex: lo.Attrs().Index, Scope: unix.RT_SCOPE_HOST, Broadcast: net.IPv4zero}
	if err := s.h.AddrAdd(nil, a); err != nil && !nl.Exists(err) {
		return fmt.Errorf("add address %s to lo of namespace %s: %w", loopback, o.Netns, err)
	}
	return nil
}

// loopback is lo's address, which the kernel adds when it is first set up.
var loopback = netip.MustParsePrefix("127.0.0.1/8")

// ---- devices ----

// delLink deletes a device. A veth's other end goes with it.
func (d *Dataplane) delLink(netns, name string) error {
	s, err := d.in(netns)
	if err != nil {
		return err
	}
	d.forget()
	l, err := s.h.LinkByName(name)
	if err != nil {
		return err
	}
	if err := s.h.LinkDel(l); err != nil {
		return fmt.Errorf("delete device %s: %w", name, err)
	}
	return nil
}

// forget forgets the indexes of devices: some are about to change.
func (d *Dataplane) forget() {
	for _, s := range d.open {
		clear(s.index)
	}
}

// link returns a device by name; nil if there is none.
func (s *space) link(name string) (netlink.Link, error) {
	l, err := s.h.LinkByName(name)
	if nl.Absent(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("device %s: %w", name, err)
	}
	return l, nil
}

// clearWay deletes a left over temporary device, and the device itself when it
// is ours and to be replaced. It returns the device that remains; one that is
// not ours is an error.
func (s *space) clearWay(name, temp, mark string, replace bool) (netlink.Link, error) {
	l, err := s.link(temp)
	if err != nil {
		return nil, err
	}
	if l != nil {
		if err := s.h.LinkDel(l); err != nil && !nl.Absent(err) {
			return nil, fmt.Errorf("delete half-made device %s: %w", temp, err)
		}
	}
	if l, err = s.link(name); err != nil || l == nil {
		return nil, err
	}
	if a := l.Attrs().Alias; a != mark && !(replace && oursLink(l)) {
		if !s.own || oursLink(l) || l.Type() != "veth" && l.Type() != "vxlan" {
			return nil, s.foreign(name)
		}
		// In a namespace of ours, of the kind that we make there: somebody has
		// written over the mark.
		if err := s.h.LinkSetAlias(l, mark); err != nil {
			return nil, fmt.Errorf("set alias of device %s: %w", name, err)
		}
	}
	if !replace {
		return l, nil
	}
	if err := s.h.LinkDel(l); err != nil && !nl.Absent(err) {
		return nil, fmt.Errorf("delete device %s: %w", name, err)
	}
	return nil, nil
}

// foreign is the error that a device not ours has a name we need.
func (s *space) foreign(name string) error {
	where, cmd := "namespace "+s.name, "ip -n "+s.name+" link"
	if s.name == "" {
		where, cmd = "the host's namespace", "ip link"
	}
	return fmt.Errorf("%s has a device %s that is not Shoal's (it lacks Shoal's alias): remove it with '%s del %s', or rename it", where, name, cmd, name)
}

// finish marks a device that was made under a temporary name and renames it.
func (s *space) finish(temp, name, mark string) (netlink.Link, error) {
	l, err := s.h.LinkByName(temp)
	if err != nil {
		return nil, fmt.Errorf("device %s: %w", temp, err)
	}
	if err := s.h.LinkSetAlias(l, mark); err != nil {
		return nil, fmt.Errorf("set alias of device %s: %w", temp, err)
	}
	if err := s.h.LinkSetName(l, name); err != nil {
		return nil, fmt.Errorf("rename device %s to %s: %w", temp, name, err)
	}
	return s.h.LinkByName(name)
}

// mend sets MTU and address and takes the device up, as far as needed.
func (s *space) mend(l netlink.Link, mtu int, mac string) error {
	a := l.Attrs()
	if a.MTU != mtu {
		if err := s.h.LinkSetMTU(l, mtu); err != nil {
			return fmt.Errorf("set MTU of device %s to %d: %w", a.Name, mtu, err)
		}
	}
	if mac != "" && a.HardwareAddr.String() != mac {
		hw, err := net.ParseMAC(mac)
		if err != nil {
			return err
		}
		if err := s.h.LinkSetHardwareAddr(l, hw); err != nil {
			return fmt.Errorf("set address of device %s to %s: %w", a.Name, mac, err)
		}
	}
	if a.Flags&net.FlagUp == 0 {
		if err := s.h.LinkSetUp(l); err != nil {
			return fmt.Errorf("set device %s up: %w", a.Name, err)
		}
	}
	return nil
}

func attrs(name string, mtu int, mac string) netlink.LinkAttrs {
	a := netlink.NewLinkAttrs()
	a.Name, a.MTU = name, mtu
	a.HardwareAddr, _ = net.ParseMAC(mac)
	return a
}

// clashWait bounds the wait for the kernel to take apart a namespace that had a
// vxlan device of the same VNI.
const clashWait = 500 * time.Millisecond

func (d *Dataplane) putVXLAN(ctx context.Context, o overlay.VXLAN, replace bool) error {
	ov, err := d.in(o.Netns)
	if err != nil {
		return err
	}
	d.forget()
	temp := overlay.TempPrefix + "-vx"
	l, err := ov.clearWay(overlay.VXLANDev, temp, networkMark(o.Network), replace)
	if err != nil {
		return err
	}
	if l == nil {
		if err := d.makeVXLAN(ctx, o, temp); err != nil {
			return err
		}
		if l, err = ov.finish(temp, overlay.VXLANDev, networkMark(o.Network)); err != nil {
			return err
		}
	}
	err = ov.mend(l, o.MTU, o.MAC)
	if errors.Is(err, unix.EADDRINUSE) {
		return fmt.Errorf("UDP port %d is in use by another program: stop it, or choose another port for the cluster with --data-path-port: %w", o.Port, err)
	}
	return err
}

// makeVXLAN makes the device from the host's namespace, where its UDP socket
// stays, in the ovns.
func (d *Dataplane) makeVXLAN(ctx context.Context, o overlay.VXLAN, name string) error {
	host, err := d.in("")
	if err != nil {
		return err
	}
	f, err := nl.Open(o.Netns)
	if err != nil {
		return err
	}
	defer f.Close()
	a := attrs(name, o.MTU, o.MAC)
	a.Namespace = netlink.NsFd(int(f))
	dev := &netlink.Vxlan{LinkAttrs: a, VxlanId: int(o.VNI), SrcAddr: o.Local.AsSlice(), Port: o.Port, Learning: false}
	for deadline := time.Now().Add(clashWait); ; {
		err = host.h.LinkAdd(dev)
		if !errors.Is(err, unix.EEXIST) || time.Now().After(deadline) {
			break
		}
		if derr := d.delMisplaced(o); derr != nil {
			return derr
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EEXIST):
		return fmt.Errorf("VNI %d on UDP port %d is in use by another VXLAN device%s: remove that device, or choose another port for the cluster with --data-path-port: %w", o.VNI, o.Port, d.whose(o), err)
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("make device vx: the kernel has no VXLAN: load the module with 'modprobe vxlan': %w", err)
	}
	return fmt.Errorf("make device vx: %w", err)
}

// delMisplaced deletes vxlan devices of a network that are not where they should
// be, because someone renamed or moved them: they hold the network's VNI.
func (d *Dataplane) delMisplaced(o overlay.VXLAN) error {
	for _, ns := range []string{"", o.Netns} {
		s, err := d.in(ns)
		if err != nil {
			return err
		}
		links, err := nl.Dump(s.h.LinkList)
		if err != nil {
			return fmt.Errorf("list devices: %w", err)
		}
		for _, l := range links {
			a := l.Attrs()
			if l.Type() != "vxlan" || a.Alias != networkMark(o.Network) || ns == o.Netns && a.Name == overlay.VXLANDev {
				continue
			}
			if err := s.h.LinkDel(l); err != nil && !nl.Absent(err) {
				return fmt.Errorf("delete device %s, which was renamed or moved: %w", a.Name, err)
			}
		}
	}
	return nil
}

// whose looks for the device that has a VNI and port, in the host's namespace
// and the named ones.
func (d *Dataplane) whose(o overlay.VXLAN) string {
	names, _ := nl.List("")
	for _, ns := range append([]string{""}, names...) {
		s, err := d.dial(ns)
		if err != nil {
			continue
		}
		links, err := nl.Dump(s.h.LinkList)
		s.h.Close()
		if err != nil {
			continue
		}
		for _, l := range links {
			if v, ok := l.(*netlink.Vxlan); ok && v.VxlanId == int(o.VNI) && v.Port == o.Port && ns != o.Netns {
				if ns == "" {
					return " (" + v.Name + ")"
				}
				return fmt.Sprintf(" (perhaps %s in namespace %s)", v.Name, ns)
			}
		}
	}
	return ""
}

// pair is a veth pair: one end in an ovns, the other elsewhere.
type pair struct {
	ns, dev, temp, mac string // the ovns's end
	peerNs, peer       string // the other end
	peerMAC            string
	mtu                int
	mark               string
}

// putPair makes or mends a veth pair.
func (d *Dataplane) putPair(p pair, replace bool) error {
	ov, err := d.in(p.ns)
	if err != nil {
		return err
	}
	far, err := d.in(p.peerNs)
	if err != nil {
		return err
	}
	d.forget()
	l, err := ov.clearWay(p.dev, p.temp, p.mark, replace)
	if err != nil {
		return err
	}
	if l != nil {
		// Its other end may have been renamed or moved: then it goes with it.
		other, err := far.link(p.peer)
		if err != nil {
			return err
		}
		if other == nil {
			if err := ov.h.LinkDel(l); err != nil && !nl.Absent(err) {
				return fmt.Errorf("delete device %s, which has lost its other end: %w", p.dev, err)
			}
			l = nil
		}
	}
	if replace {
		// The other end may be left from a pair whose near end was renamed.
		if _, err := far.clearWay(p.peer, p.temp, p.mark, true); err != nil {
			return err
		}
	}
	if l == nil {
		if other, err := far.link(p.peer); err != nil {
			return err
		} else if other != nil {
			if other.Attrs().Alias != p.mark {
				return far.foreign(p.peer)
			}
			// Ours, but its near end is not where it should be.
			if err := far.h.LinkDel(other); err != nil && !nl.Absent(err) {
				return fmt.Errorf("delete device %s: %w", p.peer, err)
			}
		}
		f, err := nl.Open(d.real(p.peerNs))
		if err != nil {
			return err
		}
		defer f.Close()
		v := netlink.NewVeth(attrs(p.temp, p.mtu, p.mac))
		v.PeerName, v.PeerMTU, v.PeerNamespace = p.peer, uint32(p.mtu), netlink.NsFd(int(f))
		v.PeerHardwareAddr, _ = net.ParseMAC(p.peerMAC)
		if err := ov.h.LinkAdd(v); err != nil {
			return fmt.Errorf("make veth pair %s and %s: %w", p.dev, p.peer, err)
		}
		other, err := far.h.LinkByName(p.peer)
		if err != nil {
			return fmt.Errorf("device %s: %w", p.peer, err)
		}
		if err := far.h.LinkSetAlias(other, p.mark); err != nil {
			return fmt.Errorf("set alias of device %s: %w", p.peer, err)
		}
		if l, err = ov.finish(p.temp, p.dev, p.mark); err != nil {
			return err
		}
	}
	other, err := far.link(p.peer)
	if err != nil {
		return err
	}
	if other == nil {
		return fmt.Errorf("%s, the other end of %s, is missing", p.peer, p.dev)
	}
	if other.Attrs().Alias != p.mark {
		if !paired(l, other) {
			return far.foreign(p.peer)
		}
		if err := far.h.LinkSetAlias(other, p.mark); err != nil {
			return fmt.Errorf("set alias of device %s: %w", p.peer, err)
		}
	}
	if err := far.mend(other, p.mtu, p.peerMAC); err != nil {
		return err
	}
	return ov.mend(l, p.mtu, p.mac)
}

func (d *Dataplane) putEgress(o overlay.Egress, replace bool) error {
	return d.putPair(pair{ns: o.Netns, dev: overlay.OutDev, temp: overlay.TempPrefix + "-out", peerNs: "", peer: o.Dev,
		mtu: o.MTU, mark: networkMark(o.Network)}, replace)
}

func (d *Dataplane) putPort(o overlay.Port, replace bool) error {
	return d.putPair(pair{ns: o.Netns, dev: o.Dev, temp: overlay.TempPrefix + o.Dev[len(overlay.PortPrefix):], mac: overlay.LinkMAC,
		peerNs: o.TaskNetns, peer: o.Eth, peerMAC: o.MAC, mtu: o.MTU, mark: portMark(o.Task, o.Network)}, replace)
}

// ---- addresses, neighbours, routes ----

func kernelAddr(o overlay.Addr, index int) *netlink.Addr {
	a := &netlink.Addr{IPNet: ipNet(o.Prefix), LinkIndex: index, Broadcast: net.IPv4zero} // 0.0.0.0: none
	switch {
	case o.Prefix.Addr().Is6():
		a.Flags = unix.IFA_F_NODAD // nobody else can have it
	case o.Dev == "lo":
		a.Label = overlay.Label
	}
	return a
}

func (d *Dataplane) putAddr(o overlay.Addr) error {
	s, err := d.in(o.Netns)
	if err != nil {
		return err
	}
	i, err := s.dev(o.Dev)
	if err != nil {
		return err
	}
	err = s.h.AddrAdd(nil, kernelAddr(o, i))
	if nl.Exists(err) && hasLink(o) {
		// It was there, and what the kernel adds with it was not.
		err = s.h.RouteReplace(&netlink.Route{Dst: ipNet(o.Prefix.Masked()), LinkIndex: i, Scope: netlink.SCOPE_LINK, Protocol: unix.RTPROT_KERNEL,
			Src: o.Prefix.Addr().AsSlice(), Table: unix.RT_TABLE_MAIN, Family: unix.AF_INET})
	}
	if err != nil && !nl.Exists(err) {
		return fmt.Errorf("add address %s to %s: %w", o.Prefix, o.Dev, err)
	}
	return nil
}

// hasLink tells whether the kernel adds a route to a link with an address.
func hasLink(o overlay.Addr) bool { return o.Prefix.Addr().Is4() && o.Prefix.Bits() < 32 }

func kernelNeigh(o overlay.Neigh, index int) *netlink.Neigh {
	mac, _ := net.ParseMAC(o.MAC)
	return &netlink.Neigh{LinkIndex: index, Family: family(o.Addr), State: netlink.NUD_PERMANENT, IP: o.Addr.AsSlice(), HardwareAddr: mac}
}

func (d *Dataplane) putNeigh(o overlay.Neigh) error {
	s, err := d.in(o.Netns)
	if err != nil {
		return err
	}
	i, err := s.dev(o.Dev)
	if err != nil {
		return err
	}
	if err := s.h.NeighSet(kernelNeigh(o, i)); err != nil {
		return fmt.Errorf("set neighbour %s of %s: %w", o.Addr, o.Dev, err)
	}
	return nil
}

func kernelFDB(o overlay.FDB, index int) *netlink.Neigh {
	mac, _ := net.ParseMAC(o.MAC)
	return &netlink.Neigh{LinkIndex: index, Family: unix.AF_BRIDGE, State: netlink.NUD_PERMANENT, Flags: netlink.NTF_SELF,
		IP: o.Dst.AsSlice(), HardwareAddr: mac}
}

func (d *Dataplane) putFDB(o overlay.FDB) error {
	s, err := d.in(o.Netns)
	if err != nil {
		return err
	}
	i, err := s.dev(overlay.VXLANDev)
	if err != nil {
		return err
	}
	if err := s.h.NeighSet(kernelFDB(o, i)); err != nil {
		return fmt.Errorf("set forwarding entry %s to %s: %w", o.MAC, o.Dst, err)
	}
	return nil
}

// kernelRoute is a route as the kernel is told of it.
func (s *space) kernelRoute(o overlay.Route) (*netlink.Route, error) {
	r := &netlink.Route{Dst: ipNet(o.Dst), Priority: o.Metric, Protocol: overlay.RouteProtocol, Family: family(o.Dst.Addr()), Table: unix.RT_TABLE_MAIN}
	if o.Type == "unreachable" {
		r.Type = unix.RTN_UNREACHABLE
	}
	if o.Dev != "" {
		i, err := s.dev(o.Dev)
		if err != nil {
			return nil, err
		}
		r.LinkIndex = i
		if !o.Via.IsValid() && o.Dst.Addr().Is4() {
			r.Scope = netlink.SCOPE_LINK
		}
	}
	if o.Via.IsValid() {
		r.Gw = o.Via.AsSlice()
	}
	if o.Src.IsValid() {
		r.Src = o.Src.AsSlice()
	}
	if o.Onlink {
		r.Flags = int(netlink.FLAG_ONLINK)
	}
	// Locked: IPv6 heeds it for what is forwarded only then (ip6_dst_mtu_maybe_forward
	// in net/ip6_route.h).
	r.MTU, r.MTULock = o.MTU, o.MTU > 0
	return r, nil
}

// putRoute adds a route, in place of one with the same destination and metric,
// whose ever that is: routes are only put in namespaces that are ours or a
// task's, and "ip route replace" by hand, without our protocol number, has the
// same effect on the task as deleting ours.
func (d *Dataplane) putRoute(o overlay.Route) error {
	s, err := d.in(o.Netns)
	if err != nil {
		return err
	}
	r, err := s.kernelRoute(o)
	if err != nil {
		return err
	}
	if err := s.h.RouteReplace(r); err != nil {
		return fmt.Errorf("set %s: %w", o, err)
	}
	return nil
}
