package nl

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/bits"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Kind is a sort of thing in a network namespace that the kernel sends notices
// of. Kinds are bits.
type Kind uint8

// Kinds.
const (
	Links    Kind = 1 << iota
	Addrs         // of both families
	Routes        // of both families, in every table
	Neighs        // and entries of a vxlan device's or bridge's FDB
	Policies      // of routing policy
	Qdiscs        // and classes and filters
	Netconf       // forwarding, rp_filter and so on, as far as RTM_NEWNETCONF tells
	VIPs          // that came, see Listen; those that go are Addrs and Routes
	kinds    = iota
)

// AllKinds is every Kind.
const AllKinds Kind = 1<<kinds - 1

// Notices tells what changed in network namespaces since it was last read, so
// that reading what did not change can be spared.
//
// One socket of rtnetlink and one of nf_tables hear of every namespace that has
// an ID in the host's (netlink(7), NETLINK_LISTEN_ALL_NSID, Linux 4.2): no
// socket is kept in any of them, which would keep a namespace alive after its
// name is gone.
//
// The kernel queues a notice before the call that caused it returns. So a reader
// takes a [Stamp] first and reads then: whatever changes after the stamp was
// taken differs from it later. Notices that are lost (ENOBUFS) count as changes
// of everything. Sysctls send none, but for Netconf's.
//
// A nil *Notices says of everything that it changed.
type Notices struct {
	host  string // name of the namespace that stands for the host's
	label string // of VIPs

	mu     sync.Mutex
	route  *socket
	nft    *socket
	buf    []byte
	names  map[string]*space
	ids    map[int32]*space
	lost   uint64
	closed bool
	stir   func(c Change, device bool) // see Run
}

// Change is where something changed: in a namespace, "" the host's, an nftables table
// there, or what rtnetlink tells of (Table ""). After notices were lost, which may have
// told of anything, it is the zero one.
type Change struct{ Netns, Table string }

// space is a namespace that is followed.
type space struct {
	name   string
	file   fileID
	id     int32 // -1: the host's
	epoch  uint64
	kinds  [kinds]uint64
	vip    [4]byte // the newest of VIPs
	tables map[string]*tableNotices
}

// tableNotices counts what happened to one nftables table, of whatever family.
type tableNotices struct {
	all   uint64            // anything
	form  uint64            // the table itself, or that a chain, set, object or flowtable came or went
	parts map[string]uint64 // rules by "chain NAME", elements by "set NAME"
}

type fileID struct{ dev, ino uint64 }

type socket struct {
	fd int
	f  *os.File
}

// noticeBuffer is the sockets' receive buffer in bytes. An nftables transaction
// of 10,000 elements sends that many notices, some hundred bytes each.
const noticeBuffer = 8 << 20

var routeGroups = []int{
	unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH, unix.RTNLGRP_TC,
	unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV4_NETCONF,
	unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV6_RULE, unix.RTNLGRP_IPV6_NETCONF,
}

// Listen opens the sockets in the host's namespace ("" is this process's own). A new
// IPv4 address of lo with label vips, all of it, and what the kernel adds with it to
// table local are of kind VIPs: they are many, and not every reader's.
func Listen(host, vips string) (*Notices, error) {
	n := &Notices{host: host, label: vips, buf: make([]byte, 1<<16), names: map[string]*space{}, ids: map[int32]*space{}}
	err := Do(host, func() error {
		var err error
		if n.route, err = listen(unix.NETLINK_ROUTE, routeGroups); err != nil {
			return err
		}
		n.nft, err = listen(unix.NETLINK_NETFILTER, []int{unix.NFNLGRP_NFTABLES})
		return err
	})
	if err != nil {
		n.Close()
		return nil, fmt.Errorf("listen to the kernel's notices: %w", err)
	}
	return n, nil
}

func listen(proto int, groups []int) (*socket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	err = func() error {
		if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
			return os.NewSyscallError("bind", err)
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_LISTEN_ALL_NSID, 1); err != nil {
			return os.NewSyscallError("setsockopt NETLINK_LISTEN_ALL_NSID", err)
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, noticeBuffer); err != nil {
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, noticeBuffer)
		}
		for _, g := range groups {
			if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, g); err != nil {
				return os.NewSyscallError(fmt.Sprintf("setsockopt NETLINK_ADD_MEMBERSHIP %d", g), err)
			}
		}
		return nil
	}()
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return &socket{fd, os.NewFile(uintptr(fd), "netlink")}, nil
}

// Close closes the sockets. From then on everything counts as changed.
func (n *Notices) Close() {
	if n == nil {
		return
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.closed = true
	for _, s := range []*socket{n.route, n.nft} {
		if s != nil {
			s.f.Close()
		}
	}
}

// Stamp is a moment in a namespace's life. The zero Stamp is before everything.
type Stamp struct {
	file        fileID
	lost, epoch uint64
	kinds       [kinds]uint64
	table       uint64
	form        uint64
	parts       map[string]uint64
	others      uint64
}

// At takes a stamp of a namespace by its name ("" the host's), and of an
// nftables table in it, of whatever family ("": of none). ok is false where
// nothing can be known: then everything is to be read every time.
func (n *Notices) At(netns, table string) (s Stamp, ok bool) {
	if n == nil {
		return Stamp{}, false
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return Stamp{}, false
	}
	sp, err := n.follow(netns)
	if err != nil {
		return Stamp{}, false
	}
	n.drain()
	s = Stamp{file: sp.file, lost: n.lost, epoch: sp.epoch, kinds: sp.kinds}
	for name, t := range sp.tables {
		if name != table {
			s.others += t.form
		}
	}
	if table != "" {
		if t := sp.tables[table]; t != nil {
			s.table, s.form, s.parts = t.all, t.form, maps.Clone(t.parts)
		}
	}
	return s, true
}

// Since tells of which kinds something changed between an earlier stamp and s.
func (s Stamp) Since(before Stamp) Kind {
	if !s.comparable(before) {
		return AllKinds
	}
	var out Kind
	for i := range s.kinds {
		if s.kinds[i] != before.kinds[i] {
			out |= 1 << i
		}
	}
	return out
}

// Table tells whether anything of the stamps' table changed.
func (s Stamp) Table(before Stamp) bool { return !s.comparable(before) || s.table != before.table }

// Others tells whether a table other than the stamps' came, went, or got other
// chains or sets.
func (s Stamp) Others(before Stamp) bool { return !s.comparable(before) || s.others != before.others }

// TableForm tells whether the stamps' table itself changed, or any chain or set came
// or went, or nothing more exact is known.
func (s Stamp) TableForm(before Stamp) bool { return !s.comparable(before) || s.form != before.form }

// Rules tells whether the rules of a chain of the stamps' table changed.
func (s Stamp) Rules(before Stamp, chain string) bool { return s.part(before, "chain "+chain) }

// Elems tells whether the elements of a set of the stamps' table changed.
func (s Stamp) Elems(before Stamp, set string) bool { return s.part(before, "set "+set) }

func (s Stamp) part(before Stamp, name string) bool {
	return !s.comparable(before) || s.parts[name] != before.parts[name]
}

func (s Stamp) comparable(before Stamp) bool {
	return before.epoch != 0 && s.file == before.file && s.lost == before.lost && s.epoch == before.epoch
}

// follow makes sure that a namespace's notices are heard. n.mu is held.
func (n *Notices) follow(netns string) (*space, error) {
	if netns == n.host {
		netns = ""
	}
	name := netns
	if netns == "" {
		name = n.host
	}
	var file fileID
	if name != "" { // a name may come to stand for another namespace, this process's own never does
		var st unix.Stat_t
		if err := unix.Stat(Path(name), &st); err != nil {
			n.forget(netns)
			return nil, err
		}
		file = fileID{uint64(st.Dev), st.Ino}
	}
	if sp := n.names[netns]; sp != nil {
		if sp.file == file {
			return sp, nil
		}
		n.forget(netns)
	}
	id := int32(-1)
	if netns != "" {
		var err error
		if id, err = n.number(netns); err != nil {
			return nil, err
		}
	}
	sp := &space{name: netns, file: file, id: id, epoch: epoch.Add(1), tables: map[string]*tableNotices{}}
	if old := n.ids[id]; old != nil {
		delete(n.names, old.name)
	}
	n.names[netns], n.ids[id] = sp, sp
	return sp, nil
}

// epoch numbers namespaces as they are followed, from 1.
var epoch atomic.Uint64

// forget ends following a namespace. n.mu is held.
func (n *Notices) forget(netns string) {
	if sp := n.names[netns]; sp != nil {
		delete(n.names, netns)
		if n.ids[sp.id] == sp {
			delete(n.ids, sp.id)
		}
	}
}

// number returns the ID of a namespace in the host's. One that has none is given
// one; a veth pair between the two gives one, too.
func (n *Notices) number(netns string) (id int32, err error) {
	f, err := Open(netns)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	err = Do(n.host, func() error {
		for try := 0; ; try++ {
			got, err := netlink.GetNetNsIdByFd(int(f))
			if err == nil && got >= 0 {
				id = int32(got)
				return nil
			}
			if err != nil && !errors.Is(err, unix.ENOENT) || try == 3 {
				return fmt.Errorf("ID of network namespace %s: got %d: %w", netns, got, err)
			}
			if err := netlink.SetNetNsIdByFd(int(f), -1); err != nil && !errors.Is(err, unix.EEXIST) {
				return fmt.Errorf("give network namespace %s an ID: %w", netns, err)
			}
		}
	})
	return id, err
}

// drain takes in all notices that have come. n.mu is held.
func (n *Notices) drain() {
	n.take(n.route.fd, n.routeNotice)
	n.take(n.nft.fd, n.nftNotice)
}

func (n *Notices) take(fd int, notice func(*space, uint16, []byte)) {
	var oob [128]byte
	for {
		size, oobn, flags, _, err := unix.Recvmsg(fd, n.buf, oob[:], unix.MSG_DONTWAIT)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return
		case errors.Is(err, unix.ENOBUFS):
			n.lost++
			n.stirred(Change{}, true)
			continue
		case err != nil:
			n.lost++
			return
		case flags&unix.MSG_TRUNC != 0:
			n.lost++
		}
		sp := n.ids[nsid(oob[:oobn])]
		if sp == nil {
			continue // a namespace that is nothing to us
		}
		for b := n.buf[:size]; len(b) >= unix.SizeofNlMsghdr; {
			l := int(binary.NativeEndian.Uint32(b))
			if l < unix.SizeofNlMsghdr || l > len(b) {
				break
			}
			notice(sp, binary.NativeEndian.Uint16(b[4:]), b[unix.SizeofNlMsghdr:l])
			b = b[min(len(b), (l+3)&^3):]
		}
	}
}

// nsid reads which namespace a notice is of; -1: the socket's own.
func nsid(oob []byte) int32 {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return -1
	}
	for _, m := range msgs {
		if m.Header.Level == unix.SOL_NETLINK && m.Header.Type == unix.NETLINK_LISTEN_ALL_NSID && len(m.Data) >= 4 {
			return int32(binary.NativeEndian.Uint32(m.Data))
		}
	}
	return -1
}

func (n *Notices) routeNotice(sp *space, typ uint16, body []byte) {
	var k Kind
	switch typ {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		k = Links
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		k = Addrs
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		k = Routes
	case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
		k = Neighs
	case unix.RTM_NEWRULE, unix.RTM_DELRULE:
		k = Policies
	case unix.RTM_NEWQDISC, unix.RTM_DELQDISC, unix.RTM_NEWTCLASS, unix.RTM_DELTCLASS, unix.RTM_NEWTFILTER, unix.RTM_DELTFILTER:
		k = Qdiscs
	case unix.RTM_NEWNETCONF, unix.RTM_DELNETCONF:
		k = Netconf
	default:
		return
	}
	if sp.id != -1 && n.ofVIP(sp, typ, body) {
		k = VIPs
	}
	sp.kinds[bits.TrailingZeros8(uint8(k))]++
	// The host's own routes and neighbours are the host's affair.
	if sp.id != -1 || k != Routes && k != Neighs {
		n.stirred(Change{Netns: sp.name}, k == Links)
	}
}

// ofVIP tells whether a notice is of a VIP that came. The kernel tells of an address
// before it adds to table local what comes with it (__inet_insert_ifa in
// net/ipv4/devinet.c). The messages are ifaddrmsg (rtnetlink(7)) with its label in
// attribute 3, and rtmsg with its destination in attribute 1.
func (n *Notices) ofVIP(sp *space, typ uint16, body []byte) bool {
	const lo, host, whole = 1, unix.RT_SCOPE_HOST, 32
	switch {
	case typ == unix.RTM_NEWADDR && len(body) >= unix.SizeofIfAddrmsg && n.label != "":
		if body[0] != unix.AF_INET || body[1] != whole || body[3] != host || binary.NativeEndian.Uint32(body[4:]) != lo ||
			attr(body[unix.SizeofIfAddrmsg:], unix.IFA_LABEL) != n.label {
			return false
		}
		return copy(sp.vip[:], attrBytes(body[unix.SizeofIfAddrmsg:], unix.IFA_LOCAL)) == len(sp.vip)
	case typ == unix.RTM_NEWROUTE && len(body) >= unix.SizeofRtMsg:
		return body[0] == unix.AF_INET && body[1] == whole && body[4] == unix.RT_TABLE_LOCAL && body[5] == unix.RTPROT_KERNEL && body[6] == host &&
			body[7] == unix.RTN_LOCAL && sp.vip != [4]byte{} && string(attrBytes(body[unix.SizeofRtMsg:], unix.RTA_DST)) == string(sp.vip[:])
	}
	return false
}

// nftNotice reads the table, and the chain or set, that a notice is of. In all
// messages of nf_tables but for the generation's, attribute 1 is the table's
// name; 2 is a rule's chain and an element's set (linux/netfilter/nf_tables.h).
func (n *Notices) nftNotice(sp *space, typ uint16, body []byte) {
	if typ>>8 != unix.NFNL_SUBSYS_NFTABLES || typ&0xff == unix.NFT_MSG_NEWGEN || len(body) < 4 {
		return
	}
	table, part := attr(body[4:], 1), ""
	switch typ & 0xff {
	case unix.NFT_MSG_NEWRULE, unix.NFT_MSG_DELRULE:
		part = "chain " + attr(body[4:], 2)
	case unix.NFT_MSG_NEWSETELEM, unix.NFT_MSG_DELSETELEM:
		part = "set " + attr(body[4:], 2)
	}
	t := sp.tables[table]
	if t == nil {
		t = &tableNotices{parts: map[string]uint64{}}
		sp.tables[table] = t
	}
	t.all++
	switch {
	case part == "" || len(t.parts) >= 1<<16:
		t.form++
		clear(t.parts)
	default:
		t.parts[part]++
	}
	if sp.id != -1 || strings.HasPrefix(table, "shoal") {
		n.stirred(Change{sp.name, table}, false)
	}
}

// attr is the text of the first attribute of a type, "" where there is none.
func attr(b []byte, typ uint16) string { return strings.TrimRight(string(attrBytes(b, typ)), "\x00") }

// attrBytes is what the first attribute of a type holds, nil where there is none.
func attrBytes(b []byte, typ uint16) []byte {
	for len(b) >= unix.SizeofNlAttr {
		l := int(binary.NativeEndian.Uint16(b))
		if l < unix.SizeofNlAttr || l > len(b) {
			return nil
		}
		if binary.NativeEndian.Uint16(b[2:])&nlaTypeMask == typ {
			return b[unix.SizeofNlAttr:l]
		}
		b = b[min(len(b), (l+3)&^3):]
	}
	return nil
}

func (n *Notices) stirred(c Change, device bool) {
	if n.stir != nil {
		n.stir(c, device)
	}
}

// How long Run waits for more of the same before it tells of a change: what makes a
// network sends some hundred notices. Most are of what their reader has just done itself,
// and is to look at once more; that is not urgent, and takes nothing away from what is
// being done there. Devices come and go with what others do.
const (
	settleTime = 20 * time.Millisecond // of devices
	echoTime   = 250 * time.Millisecond
)

// Run calls wake some milliseconds after changes in the namespaces that are
// followed, with where they were, until ctx ends. Of the host's namespace these are changes of links,
// addresses, rules, settings and of tables that begin with "shoal".
func (n *Notices) Run(ctx context.Context, wake func([]Change)) error {
	moved, devices := make(chan struct{}, 1), make(chan struct{}, 1)
	where := map[Change]bool{} // under n.mu
	n.mu.Lock()
	n.stir = func(c Change, device bool) {
		where[c] = true
		ch := moved
		if device {
			ch = devices
		}
		select {
		case ch <- struct{}{}:
		default:
		}
	}
	n.mu.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	errs := make(chan error, 2)
	for _, s := range []*socket{n.route, n.nft} {
		wg.Go(func() {
			if err := n.listen(ctx, s); err != nil {
				errs <- err
				cancel()
			}
		})
	}
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	var due time.Time // when the timer is, if it has begun
	within := func(d time.Duration) {
		if at := time.Now().Add(d); due.IsZero() || at.Before(due) {
			due = at
			timer.Reset(d)
		}
	}
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-moved:
			within(echoTime)
		case <-devices:
			within(settleTime)
		case <-timer.C:
			due = time.Time{}
			n.mu.Lock()
			all := slices.Collect(maps.Keys(where))
			clear(where)
			n.mu.Unlock()
			if len(all) > 0 { // else what came was told of with what was before
				wake(all)
			}
		}
	}
	cancel()
	wg.Wait()
	n.mu.Lock()
	n.stir = nil
	n.mu.Unlock()
	select {
	case err := <-errs:
		return fmt.Errorf("listen to the kernel's notices: %w", err)
	default:
		return nil
	}
}

// listen waits for notices at one socket, and takes in what comes.
func (n *Notices) listen(ctx context.Context, s *socket) error {
	rc, err := s.f.SyscallConn()
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = s.f.SetReadDeadline(time.Unix(1, 0)) })()
	_ = s.f.SetReadDeadline(time.Time{})
	err = rc.Read(func(uintptr) bool {
		n.mu.Lock()
		if !n.closed {
			n.drain()
		}
		n.mu.Unlock()
		return ctx.Err() != nil
	})
	runtime.KeepAlive(s)
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// nlaTypeMask is NLA_TYPE_MASK of linux/netlink.h: without the flags "nested"
// and "in network order".
const nlaTypeMask = 1<<14 - 1
