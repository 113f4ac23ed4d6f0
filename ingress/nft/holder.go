package nft

import (
	"bufio"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/ingress"
	"github.com/shoalnet/shoal/spec"
)

// listener is a socket that takes what comes for its port.
type listener struct {
	addr  netip.Addr // unspecified: all
	port  uint16
	inode string
}

// States of sockets in /proc/net (linux/net/tcp_states.h). A UDP socket that is
// connected takes from its peer only.
const (
	stateListen = "0A"
	stateClose  = "07"
)

// listeners lists the listeners of a protocol in the calling thread's namespace.
func listeners(proto string) ([]listener, error) {
	var out []listener
	if proto == spec.SCTP {
		return sctpListeners()
	}
	state := map[string]string{spec.TCP: stateListen, spec.UDP: stateClose}[proto]
	for _, file := range []string{proto, proto + "6"} {
		f, err := os.Open("/proc/thread-self/net/" + file)
		if errors.Is(err, fs.ErrNotExist) {
			continue // no IPv6
		}
		if err != nil {
			return nil, fmt.Errorf("list listening sockets: %w", err)
		}
		// Listening TCP sockets come first (tcp_seq_next in net/ipv4/tcp_ipv4.c);
		// there may be very many others.
		ls, err := parseSockets(f, state, proto == spec.TCP)
		f.Close()
		if err != nil {
			return nil, fmt.Errorf("list listening sockets: %w", err)
		}
		out = append(out, ls...)
	}
	return out, nil
}

// parseSockets reads a file of /proc/net (proc_net_tcp(5)): those of one state,
// only up to the first of another state if first is set.
func parseSockets(r io.Reader, state string, first bool) ([]listener, error) {
	var out []listener
	sc := bufio.NewScanner(r)
	for n := 0; sc.Scan(); n++ {
		f := strings.Fields(sc.Text())
		if n == 0 || len(f) < 10 {
			continue
		}
		if f[3] != state {
			if first {
				break
			}
			continue
		}
		a, port, ok := parseSockAddr(f[1])
		if ok {
			out = append(out, listener{a, port, f[9]})
		}
	}
	return out, sc.Err()
}

// parseSockAddr reads an address as the kernel prints it: words of four octets
// in host order, a colon, the port.
func parseSockAddr(s string) (netip.Addr, uint16, bool) {
	h, p, ok := strings.Cut(s, ":")
	b, err := hex.DecodeString(h)
	port, perr := strconv.ParseUint(p, 16, 16)
	if !ok || err != nil || perr != nil || len(b)%4 != 0 {
		return netip.Addr{}, 0, false
	}
	if native.Uint16([]byte{1, 0}) == 1 { // little endian
		for i := 0; i < len(b); i += 4 {
			slices.Reverse(b[i : i+4])
		}
	}
	a, ok := netip.AddrFromSlice(b)
	return a.Unmap(), uint16(port), ok
}

// sctpListeners reads /proc/net/sctp/eps: the port is the sixth column, the
// inode the eighth, and addresses follow. The file has no word on which sockets
// listen; one that is bound counts.
func sctpListeners() ([]listener, error) {
	b, err := os.ReadFile("/proc/thread-self/net/sctp/eps")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list SCTP sockets: %w", err)
	}
	var out []listener
	for l := range strings.Lines(string(b)) {
		f := strings.Fields(l)
		if len(f) < 8 {
			continue
		}
		if port, err := strconv.ParseUint(f[5], 10, 16); err == nil {
			out = append(out, listener{netip.IPv4Unspecified(), uint16(port), f[7]})
		}
	}
	return out, nil
}

// reservation names a port of the host.
type reservation struct {
	addr      netip.Addr
	published uint16
	protocol  string
}

// observeHolders reports who has wanted ports, and reserves those that nobody
// has.
func (d *Dataplane) observeHolders(want ingress.State, have *ingress.State) error {
	mine := map[string]bool{}
	for _, socks := range d.reserved {
		for _, inode := range socks {
			mine[inode] = true
		}
	}
	wanted := map[reservation]bool{}
	held := map[string]bool{}                 // inodes
	all := map[string]map[uint16][]listener{} // by protocol and port
	for _, o := range want.Objects() {
		p, ok := o.(ingress.Port)
		if !ok {
			continue
		}
		k := reservation{p.Addr, p.Published, p.Protocol}
		wanted[k] = true
		if all[p.Protocol] == nil {
			found, err := listeners(p.Protocol)
			if err != nil {
				return err
			}
			by := map[uint16][]listener{}
			for _, l := range found {
				by[l.port] = append(by[l.port], l)
			}
			all[p.Protocol] = by
		}
		ls := all[p.Protocol][p.Published]
		i := slices.IndexFunc(ls, func(l listener) bool { return !mine[l.inode] && l.takes(p) })
		if i < 0 {
			d.reserve(k)
			continue
		}
		held[ls[i].inode] = true
		d.release(k)
		have.Add(ingress.Holder{Addr: p.Addr, Published: p.Published, Protocol: p.Protocol, By: d.program(ls[i].inode)})
	}
	for k := range d.reserved {
		if !wanted[k] {
			d.release(k)
		}
	}
	for inode := range d.names {
		if !held[inode] {
			delete(d.names, inode)
		}
	}
	return nil
}

// takes tells whether a listener would lose packets to p.
func (l listener) takes(p ingress.Port) bool {
	switch {
	case l.addr.Is4():
		return l.addr.IsUnspecified() || !p.Addr.IsValid() || l.addr == p.Addr
	case !l.addr.IsUnspecified():
		return false // an IPv6 address
	}
	// [::] takes IPv4 as well, unless it is set to IPv6 only, which shows only
	// in that IPv4 can still be bound to.
	if p.Protocol == spec.SCTP {
		return true
	}
	fd, err := bind(reservation{p.Addr, p.Published, p.Protocol})
	if err == nil {
		unix.Close(fd)
	}
	return errors.Is(err, unix.EADDRINUSE)
}

// bind makes a socket that has a port, and takes nothing.
func bind(k reservation) (int, error) {
	typ, proto := unix.SOCK_STREAM, unix.IPPROTO_TCP
	if k.protocol == spec.UDP {
		typ, proto = unix.SOCK_DGRAM, unix.IPPROTO_UDP
	}
	fd, err := unix.Socket(unix.AF_INET, typ|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto)
	if err != nil {
		return -1, err
	}
	sa := &unix.SockaddrInet4{Port: int(k.published)}
	if k.addr.Is4() {
		sa.Addr = k.addr.As4()
	}
	err = unix.Bind(fd, sa)
	if err == nil && k.protocol == spec.UDP {
		// A bound UDP socket would swallow what comes while the port refuses.
		// One that is connected, to itself, takes from its peer only.
		sa.Addr = [4]byte(net.IPv4(127, 0, 0, 1).To4())
		if k.addr.Is4() {
			sa.Addr = k.addr.As4()
		}
		err = unix.Connect(fd, sa)
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// maxReserved bounds the sockets: the agent needs its file descriptors (often
// 1,024, or a few thousand) for more than the ports of somebody's range.
const maxReserved = 500

// reserve takes a port for us, if it can be had.
func (d *Dataplane) reserve(k reservation) {
	if k.protocol == spec.SCTP || len(d.reserved[k]) > 0 || len(d.reserved) >= maxReserved {
		return
	}
	fd, err := bind(k)
	if err != nil {
		return
	}
	var st unix.Stat_t
	inode := ""
	if unix.Fstat(fd, &st) == nil {
		inode = strconv.FormatUint(st.Ino, 10)
	}
	d.reserved[k] = map[int]string{fd: inode}
}

func (d *Dataplane) release(k reservation) {
	for fd := range d.reserved[k] {
		unix.Close(fd)
	}
	delete(d.reserved, k)
}

// program names the program that has a socket.
func (d *Dataplane) program(inode string) string {
	if n, ok := d.names[inode]; ok {
		return n
	}
	name := "another program"
	link := "socket:[" + inode + "]"
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, fd := range fds {
		if l, err := os.Readlink(fd); err == nil && l == link {
			pid := strings.Split(fd, "/")[2]
			comm, _ := os.ReadFile("/proc/" + pid + "/comm")
			name = fmt.Sprintf("%s (pid %s)", strings.TrimSpace(string(comm)), pid)
			break
		}
	}
	d.names[inode] = name
	return name
}
