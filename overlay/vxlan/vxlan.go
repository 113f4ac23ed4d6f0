// Package vxlan is overlay.Dataplane in the Linux kernel: network namespaces,
// VXLAN and veth devices, routes, neighbours and nftables.
//
// # How ours is told from others'
//
//	namespace   name INSTANCE-net-…, and lo's alias "shoal INSTANCE network ID"
//	device      alias "shoal network ID" or "shoal task ID network ID"
//	route       protocol 83 (overlay.RouteProtocol), or in the place of one that is wanted
//	address     label lo:shoal; on a device of ours, being wanted
//	neighbour   permanent and on a device of ours; on vx only routers of nodes
//	fdb         on vx, with a MAC of a node
//	nftables    a table of our own
//
// An alias can't be given to a device as it is made (the kernel ignores
// IFLA_IFALIAS then), so a device is made under a temporary name in the ovns,
// marked, and renamed last: what has its final name has its mark. A veth's other
// end may carry its final name earlier, because it goes with the temporary one.
//
// # Reading
//
// What was read of a namespace is kept, and each kind of thing in it (devices,
// addresses, routes, neighbours, each nftables table) is read again, with one dump,
// when the kernel sent a notice of it ([nl.Notices]), and after half a minute without
// one. Settings, of which the kernel tells only some, are read in each pass, by
// files that are kept open: a read is about a microsecond. What was made of all that
// is kept as well, as long as the same is wanted. So a pass costs what changed, and
// little for what is there.
//
// nftables rules carry a digest of the whole rule set in their comments: a rule
// can't be changed in place, so that reading the comments is reading the rules
// (vip/internal/kern found this first).
//
// Sockets are opened anew for each reading, since a namespace may have been deleted
// and made again under its name, and a socket keeps the old one alive. Those that
// Apply opened are closed by the next Observe, or by Close.
package vxlan

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/overlay"
	"github.com/shoalnet/shoal/reconcile"
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

// Dataplane implements overlay.Dataplane. Its methods may be called from one
// goroutine at a time, but for Watch.
type Dataplane struct {
	cfg  Config
	log  *slog.Logger
	open map[string]*space // by namespace, those Apply has opened
	// places is what was read of namespaces, unwanted what of those that nobody
	// wants, by name.
	places   map[string]*place
	unwanted map[string]owner
	// grouped is the last want, sorted; see group.
	grouped struct {
		want   overlay.State
		places map[string]*wants
	}
	seen *seen // nil: nothing, or an error
	// routed is what the host's table was last seen to say (see forwarding):
	// only for the case that someone flushes all nftables rules.
	routed *[]string
	// underlay is the MTU of the link that has the node's address, as last seen.
	underlay atomic.Int64
}

// UnderlayMTU is the MTU in bytes of the link that has the node's underlay address,
// as it was last seen; 0: there is none. It may be called from any goroutine.
func (d *Dataplane) UnderlayMTU() int { return int(d.underlay.Load()) }

var _ overlay.Dataplane = (*Dataplane)(nil)

// New makes a Dataplane. Whether the kernel can do it is told by [Probe].
func New(cfg Config) *Dataplane {
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	return &Dataplane{cfg: cfg, log: cfg.Log, open: map[string]*space{}, places: map[string]*place{}, unwanted: map[string]owner{}}
}

// Close closes the sockets that the last Apply calls left open, and forgets what
// was read. The Dataplane can be used again.
func (d *Dataplane) Close() {
	d.hangUp()
	for ns := range d.places {
		d.forgetPlace(ns)
	}
	clear(d.unwanted)
	d.seen = nil
}

// hangUp closes the sockets that the last Apply calls left open.
func (d *Dataplane) hangUp() {
	for _, s := range d.open {
		s.h.Close()
	}
	clear(d.open)
}

// space is a namespace with a socket in it.
type space struct {
	name  string // as in overlay objects: "" the host's
	h     *netlink.Handle
	index map[string]int // of devices, as far as asked for
	own   bool           // an ovns
}

// real is the name, under spec.NetnsDir, of an object's namespace.
func (d *Dataplane) real(netns string) string {
	if netns == "" {
		return d.cfg.HostNetns
	}
	return netns
}

// dial opens a socket in a namespace.
func (d *Dataplane) dial(netns string) (*space, error) {
	f, err := nl.Open(d.real(netns))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	h, err := netlink.NewHandleAt(f, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("network namespace %s: netlink socket: %w", netns, err)
	}
	// A batch of dumps of thousands of routes must fit (netlink(7): ENOBUFS).
	_ = h.SetSocketReceiveBufferSize(4<<20, true)
	return &space{name: netns, h: h, index: map[string]int{}}, nil
}

// in returns the open socket of a namespace, for Apply.
func (d *Dataplane) in(netns string) (*space, error) {
	if s := d.open[netns]; s != nil {
		return s, nil
	}
	s, err := d.dial(netns)
	if err != nil {
		return nil, err
	}
	s.own = strings.HasPrefix(netns, d.netnsPrefix())
	d.open[netns] = s
	return s, nil
}

// drop closes the open socket of a namespace, if any.
func (d *Dataplane) drop(netns string) {
	if s := d.open[netns]; s != nil {
		s.h.Close()
		delete(d.open, netns)
	}
}

// do runs fn in a namespace.
func (d *Dataplane) do(netns string, fn func() error) error { return nl.Do(d.real(netns), fn) }

// errNoDevice: an object is to be put on a device that does not exist.
var errNoDevice = errors.New("device does not exist")

// dev returns the index of a device.
func (s *space) dev(name string) (int, error) {
	if i, ok := s.index[name]; ok {
		return i, nil
	}
	l, err := s.h.LinkByName(name)
	if nl.Absent(err) {
		return 0, fmt.Errorf("%s: %w", name, errNoDevice)
	}
	if err != nil {
		return 0, fmt.Errorf("device %s: %w", name, err)
	}
	s.index[name] = l.Attrs().Index
	return l.Attrs().Index, nil
}

// absent tells whether what an operation is about can't be there, because its
// namespace or device is not.
func absent(err error) bool {
	return nl.Absent(err) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, errNoDevice)
}

// Marks.

func (d *Dataplane) namespaceMark(network string) string {
	return d.instanceMark() + network
}

func (d *Dataplane) instanceMark() string { return "shoal " + d.cfg.Instance + " network " }

const networkMarkPrefix = "shoal network "

func networkMark(id string) string { return networkMarkPrefix + id }

func portMark(task, network string) string { return "shoal task " + task + " network " + network }

// parsePortMark is the inverse of portMark.
func parsePortMark(alias string) (task, network string, ok bool) {
	f := strings.Fields(alias)
	if len(f) != 5 || f[0] != "shoal" || f[1] != "task" || f[3] != "network" {
		return "", "", false
	}
	return f[2], f[4], true
}

// Conversions.

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func addrOf(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

func family(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// Apply implements overlay.Dataplane.
func (d *Dataplane) Apply(ctx context.Context, rop reconcile.Op) error {
	op, ok := rop.(overlay.Op)
	if !ok {
		return fmt.Errorf("operation %s is not the overlay's", rop)
	}
	d.readAgain(op.Target)
	if op.Verb == overlay.Delete {
		err := d.del(op)
		if absent(err) {
			return nil
		}
		return err
	}
	return d.put(ctx, op)
}

func (d *Dataplane) put(ctx context.Context, op overlay.Op) error {
	switch o := op.Target.(type) {
	case overlay.Underlay:
		return fmt.Errorf("no device of this machine has the address %s that this node advertises: give it back, or leave the cluster and join again with another --advertise-addr", o.Addr)
	case overlay.Sandbox:
		return d.putSandbox(o)
	case overlay.Forwarding:
		return d.putForwarding(o)
	case overlay.Members:
		return d.do("", membersRules(o).write)
	case overlay.Namespace:
		return d.putNamespace(o)
	case overlay.Sysctl:
		return d.do(o.Netns, func() error { return setSysctl(o) })
	case overlay.Filter:
		return d.do(o.Netns, func() error { return putFilter(o) })
	case overlay.Redirect:
		return d.do(o.Netns, func() error { return putRedirect(o) })
	case overlay.Guard:
		return d.do(o.Netns, func() error { return putGuard(o) })
	case overlay.VXLAN:
		return d.putVXLAN(ctx, o, op.Replace)
	case overlay.Egress:
		return d.putEgress(o, op.Replace)
	case overlay.Port:
		return d.putPort(o, op.Replace)
	case overlay.Addr:
		return d.putAddr(o)
	case overlay.Neigh:
		return d.putNeigh(o)
	case overlay.FDB:
		return d.putFDB(o)
	case overlay.Route:
		return d.putRoute(o)
	}
	return fmt.Errorf("%s can't be put", op.Target)
}

func (d *Dataplane) del(op overlay.Op) error {
	switch o := op.Target.(type) {
	case overlay.Underlay, overlay.Sandbox, overlay.Sysctl:
		return nil
	case overlay.Forwarding:
		return d.delForwarding(o)
	case overlay.Members:
		return d.do("", func() error { return delTable(membersTable(o.Table)) })
	case overlay.Namespace:
		return d.delNamespace(o.Netns)
	case overlay.Filter:
		return d.do(o.Netns, func() error { return delTable(filterTable) })
	case overlay.Redirect:
		return d.do(o.Netns, func() error { return delTable(redirectTable) })
	case overlay.Guard:
		return d.do(o.Netns, func() error { return delGuard(o) })
	case overlay.VXLAN:
		return d.delLink(o.Netns, overlay.VXLANDev)
	case overlay.Egress:
		return d.delLink("", o.Dev)
	case overlay.Port:
		return d.delLink(o.Netns, o.Dev)
	case overlay.Oddity:
		return d.mendOddity(o)
	case overlay.Stray:
		return d.delLink(o.Netns, o.Dev)
	case overlay.Addr:
		s, err := d.in(o.Netns)
		if err != nil {
			return err
		}
		i, err := s.dev(o.Dev)
		if err != nil {
			return err
		}
		return s.h.AddrDel(nil, kernelAddr(o, i))
	case overlay.Neigh:
		s, err := d.in(o.Netns)
		if err != nil {
			return err
		}
		i, err := s.dev(o.Dev)
		if err != nil {
			return err
		}
		return s.h.NeighDel(kernelNeigh(o, i))
	case overlay.FDB:
		s, err := d.in(o.Netns)
		if err != nil {
			return err
		}
		i, err := s.dev(overlay.VXLANDev)
		if err != nil {
			return err
		}
		return s.h.NeighDel(kernelFDB(o, i))
	case overlay.Route:
		s, err := d.in(o.Netns)
		if err != nil {
			return err
		}
		r, err := s.kernelRoute(o)
		if err != nil {
			return err
		}
		// Only one with our protocol is deleted: it is part of the request.
		return s.h.RouteDel(r)
	}
	return fmt.Errorf("%s can't be deleted", op.Target)
}
