package nl

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"

	vnl "github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Socket states as the kernel numbers them (include/net/tcp_states.h); a UDP
// socket that is not connected is in tcpClose. Those of SCTP are the same numbers
// (include/net/sctp/constants.h, SCTP_SS_LISTENING).
const (
	tcpTimeWait = 6
	tcpClose    = 7
	tcpListen   = 10
)

// Sockets are those of a namespace that accept traffic from elsewhere.
type Sockets struct {
	Serves int      // how many are such as only servers have, see Listening
	Maybe  []uint16 // UDP ports out of net.ipv4.ip_local_port_range, ascending: a client's look the same
}

// diagRequest is struct inet_diag_req_v2 (linux/inet_diag.h): every socket of a family
// and protocol in one of some states, or the one with an ID.
type diagRequest struct {
	family, protocol uint8
	states           uint32 // bit n: state n
	id               []byte // struct inet_diag_sockid
}

const sizeofDiagRequest = 56

func (r diagRequest) Len() int { return sizeofDiagRequest }

func (r diagRequest) Serialize() []byte {
	b := make([]byte, sizeofDiagRequest)
	b[0], b[1] = r.family, r.protocol
	binary.NativeEndian.PutUint32(b[4:], r.states)
	copy(b[8:], r.id)
	return b
}

// Listening tells which sockets of the calling thread's namespace accept traffic
// that comes from elsewhere: TCP and SCTP sockets that listen, UDP sockets that are
// bound and not connected, on more than loopback. Unless it is to find all, those of
// the first kind that there is are enough, which costs less. Use it within Do. It asks
// sock_diag(7), whose cost is that of the listening sockets alone, where
// /proc/net/tcp walks every connection; the latter it reads where the kernel has no
// inet_diag, and the list of SCTP's, as to ask for these would load its module.
func Listening(all bool) (Sockets, error) {
	out, err := listeningByDiag(all)
	if errors.Is(err, errors.ErrUnsupported) {
		out, err = listeningByProc(all)
	}
	if err == nil && (all || out.Serves == 0) {
		n := 0
		n, err = procFile("sctp/eps", sctpListens)
		out.Serves += n
	}
	return out, err
}

// Diag asks for the sockets of one namespace by a socket that it keeps there: to go there
// costs more than the answer.
type Diag struct {
	socket *vnl.SocketHandle
	heard  *diagRequest // a socket that listened when it was last asked; nil: none is known
}

// OpenDiag opens one in a named namespace, which lives until Close.
func OpenDiag(name string) (*Diag, error) {
	var s *vnl.NetlinkSocket
	err := Do(name, func() (err error) {
		s, err = vnl.GetNetlinkSocketAt(netns.None(), netns.None(), unix.NETLINK_INET_DIAG)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("netlink socket: %w", err)
	}
	if err := errors.Join(s.SetSendTimeout(&vnl.SocketTimeoutTv), s.SetReceiveTimeout(&vnl.SocketTimeoutTv)); err != nil {
		s.Close()
		return nil, fmt.Errorf("netlink socket: %w", err)
	}
	return &Diag{socket: &vnl.SocketHandle{Socket: s}}, nil
}

// Close lets the namespace go.
func (d *Diag) Close() { d.socket.Close() }

// ServesTCP tells whether a TCP socket listens there on more than loopback, as Listening
// counts them. The one that did last time is looked up first: for a list of all the kernel
// walks the listening sockets of every namespace (inet_diag_dump_icsk), in some 100 µs.
func (d *Diag) ServesTCP() (bool, error) {
	if d.heard != nil && d.heard.listens(d.socket) {
		return true, nil
	}
	d.heard = nil
	for _, r := range tcpListening {
		as, err := r.sources(d.socket)
		if err != nil {
			return false, err
		}
		if i := slices.IndexFunc(as, fromElsewhere); i >= 0 {
			d.heard = &diagRequest{r.family, r.protocol, r.states, listener(as[i])}
			return true, nil
		}
	}
	return false, nil
}

// listener is the struct inet_diag_sockid of whatever socket listens at an address.
func listener(at netip.AddrPort) []byte {
	id := make([]byte, sizeofSockID)
	binary.BigEndian.PutUint16(id, at.Port())
	copy(id[diagSourceAddr-4:], at.Addr().AsSlice())
	binary.NativeEndian.PutUint64(id[sizeofSockID-8:], math.MaxUint64) // INET_DIAG_NOCOOKIE, twice
	return id
}

// listens tells whether the socket of an ID is there, listens, and is where the ID says.
func (r diagRequest) listens(by *vnl.SocketHandle) bool {
	req := vnl.NewNetlinkRequest(vnl.SOCK_DIAG_BY_FAMILY, 0)
	req.Sockets = map[int]*vnl.SocketHandle{unix.NETLINK_INET_DIAG: by}
	req.AddData(r)
	found := false
	err := req.ExecuteIter(unix.NETLINK_INET_DIAG, vnl.SOCK_DIAG_BY_FAMILY, func(msg []byte) bool {
		const end = diagSourceAddr + 16
		found = len(msg) >= end && msg[0] == r.family && msg[1] == tcpListen &&
			bytes.Equal(msg[diagSourcePort:diagSourcePort+2], r.id[:2]) && bytes.Equal(msg[diagSourceAddr:end], r.id[diagSourceAddr-4:end-4])
		return true
	})
	return err == nil && found
}

// fromElsewhere tells whether what is sent to an address need not come from the same
// machine.
func fromElsewhere(a netip.AddrPort) bool { return a.IsValid() && !a.Addr().Unmap().IsLoopback() }

// add counts one socket in.
func (s *Sockets) add(udp bool, a netip.AddrPort, first, last uint16) {
	switch p := a.Port(); {
	case !fromElsewhere(a):
	case udp && first <= p && p <= last:
		if i, found := slices.BinarySearch(s.Maybe, p); !found {
			s.Maybe = slices.Insert(s.Maybe, i, p)
		}
	default:
		s.Serves++
	}
}

// clientPorts is the range out of which the kernel binds sockets that asked for no
// port; its own (ip-sysctl.rst) where that can't be read.
func clientPorts() (first, last uint16) {
	if s, err := Sysctl("net.ipv4.ip_local_port_range"); err == nil {
		if _, err := fmt.Sscan(s, &first, &last); err == nil {
			return first, last
		}
	}
	return 32768, 60999
}

var (
	tcpListening = []diagRequest{{unix.AF_INET, unix.IPPROTO_TCP, 1 << tcpListen, nil}, {unix.AF_INET6, unix.IPPROTO_TCP, 1 << tcpListen, nil}}
	udpBound     = []diagRequest{{unix.AF_INET, unix.IPPROTO_UDP, 1 << tcpClose, nil}, {unix.AF_INET6, unix.IPPROTO_UDP, 1 << tcpClose, nil}}
)

// sources lists the local addresses of the sockets that a request is about, by a socket
// that is there or, with nil, by one in the calling thread's namespace.
func (r diagRequest) sources(by *vnl.SocketHandle) ([]netip.AddrPort, error) {
	as, err := Dump(func() (as []netip.AddrPort, err error) { // perhaps more than once
		req := vnl.NewNetlinkRequest(vnl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
		if by != nil {
			req.Sockets = map[int]*vnl.SocketHandle{unix.NETLINK_INET_DIAG: by}
		}
		req.AddData(r)
		err = req.ExecuteIter(unix.NETLINK_INET_DIAG, vnl.SOCK_DIAG_BY_FAMILY, func(msg []byte) bool {
			as = append(as, diagSource(msg))
			return true
		})
		return as, err
	})
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EPROTONOSUPPORT) {
		err = fmt.Errorf("%w: %w", err, errors.ErrUnsupported)
	}
	if err != nil {
		return nil, fmt.Errorf("list listening sockets: %w", err)
	}
	return as, nil
}

func listeningByDiag(all bool) (Sockets, error) {
	var out Sockets
	for _, r := range tcpListening {
		as, err := r.sources(nil)
		if err != nil {
			return out, err
		}
		for _, a := range as {
			out.add(false, a, 0, 0)
		}
		if out.Serves > 0 && !all {
			return out, nil
		}
	}
	first, last := clientPorts()
	for _, r := range udpBound {
		as, err := r.sources(nil)
		if err != nil {
			return out, err
		}
		for _, a := range as {
			out.add(true, a, first, last)
		}
		if out.Serves > 0 && !all {
			return out, nil
		}
	}
	return out, nil
}

// Where a struct inet_diag_msg has what: family, state, timer and retransmissions take
// an octet each, two ports two each.
const (
	diagSourcePort = 4
	diagSourceAddr = 8
	diagRemoteAddr = 24
)

// diagAddr reads one of the addresses of a struct inet_diag_msg.
func diagAddr(msg []byte, at int) netip.Addr {
	if len(msg) < at+16 {
		return netip.Addr{}
	}
	n := 16
	if msg[0] == unix.AF_INET {
		n = 4
	}
	a, _ := netip.AddrFromSlice(msg[at : at+n])
	return a
}

// diagSource reads the local address of a struct inet_diag_msg.
func diagSource(msg []byte) netip.AddrPort {
	a := diagAddr(msg, diagSourceAddr)
	if !a.IsValid() {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(a, binary.BigEndian.Uint16(msg[diagSourcePort:]))
}

// sizeofSockID is that of struct inet_diag_sockid, which follows the first four octets
// of a struct inet_diag_msg.
const sizeofSockID = 48

// ResetTCP ends the connections that sockets of the calling thread's namespace have at
// or to some addresses, as ss -K does: their programs and whoever is at the other end hear of
// a reset (SOCK_DESTROY, sock_diag(7)). It returns how many; errors.ErrUnsupported where
// the kernel can't (CONFIG_INET_DIAG_DESTROY). Use it within Do.
func ResetTCP(addrs []netip.Addr) (n int, err error) {
	const connected = (1<<13 - 1) &^ (1<<tcpTimeWait | 1<<tcpClose | 1<<tcpListen | 1) // TCP_ESTABLISHED is 1, TCP_NEW_SYN_RECV 12
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {                      // a socket of IPv6 may have IPv4's
		ids, err := Dump(func() (ids [][]byte, err error) {
			req := vnl.NewNetlinkRequest(vnl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
			req.AddData(diagRequest{family: family, protocol: unix.IPPROTO_TCP, states: connected})
			err = req.ExecuteIter(unix.NETLINK_INET_DIAG, vnl.SOCK_DIAG_BY_FAMILY, func(msg []byte) bool {
				from, to := diagAddr(msg, diagSourceAddr), diagAddr(msg, diagRemoteAddr)
				if len(msg) >= 4+sizeofSockID && (slices.Contains(addrs, from.Unmap()) || slices.Contains(addrs, to.Unmap())) {
					ids = append(ids, slices.Clone(msg[4:4+sizeofSockID]))
				}
				return true
			})
			return ids, err
		})
		if err != nil {
			return n, fmt.Errorf("list connections: %w", diagError(err))
		}
		for _, id := range ids {
			req := vnl.NewNetlinkRequest(vnl.SOCK_DESTROY, unix.NLM_F_ACK)
			req.AddData(diagRequest{family: family, protocol: unix.IPPROTO_TCP, states: connected, id: id})
			switch _, err := req.Execute(unix.NETLINK_INET_DIAG, 0); {
			case err == nil:
				n++
			case errors.Is(err, unix.ENOENT): // it has ended
			default:
				return n, fmt.Errorf("reset a connection: %w", diagError(err))
			}
		}
	}
	return n, nil
}

// diagError is err, and errors.ErrUnsupported where that is what it comes to.
func diagError(err error) error {
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT) {
		return fmt.Errorf("%w: %w", err, errors.ErrUnsupported)
	}
	return err
}

// procFile reads a file of the calling thread's network namespace (proc(5)); one
// that is not there holds nothing.
func procFile[T any](name string, read func(io.Reader) (T, error)) (T, error) {
	f, err := os.Open("/proc/thread-self/net/" + name)
	if err != nil {
		var none T
		if errors.Is(err, os.ErrNotExist) {
			err = nil
		}
		return none, err
	}
	defer f.Close()
	return read(f)
}

// listeningByProc is listeningByDiag on a kernel without inet_diag.
func listeningByProc(all bool) (Sockets, error) {
	var out Sockets
	first, last := clientPorts()
	for _, f := range []struct {
		name  string
		udp   bool
		state string
	}{{"tcp", false, "0A"}, {"tcp6", false, "0A"}, {"udp", true, "07"}, {"udp6", true, "07"}} {
		as, err := procFile(f.name, func(r io.Reader) ([]netip.AddrPort, error) { return procSources(r, f.state) })
		if err != nil {
			return out, fmt.Errorf("list listening sockets: %w", err)
		}
		for _, a := range as {
			out.add(f.udp, a, first, last)
		}
		if out.Serves > 0 && !all {
			break
		}
	}
	return out, nil
}

// procSources lists the local addresses of the sockets in a state, in hexadecimal.
func procSources(r io.Reader, state string) ([]netip.AddrPort, error) {
	var out []netip.AddrPort
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		fs := strings.Fields(sc.Text())
		if len(fs) < 4 || fs[3] != state {
			continue
		}
		addr, port, _ := strings.Cut(fs[1], ":")
		b, err := hex.DecodeString(addr)
		p, perr := strconv.ParseUint(port, 16, 16)
		if err != nil || perr != nil || len(b)%4 != 0 {
			continue
		}
		// Addresses are in host order, four bytes at a time.
		for i := 0; i < len(b); i += 4 {
			binary.NativeEndian.PutUint32(b[i:], binary.BigEndian.Uint32(b[i:]))
		}
		if a, ok := netip.AddrFromSlice(b); ok {
			out = append(out, netip.AddrPortFrom(a, uint16(p)))
		}
	}
	return out, sc.Err()
}

// sctpListens counts in /proc/net/sctp/eps the endpoints that listen on more than
// loopback. Its columns are ENDPT SOCK STY SST HBKT LPORT UID INODE LADDRS, the
// last one address after the other (net/sctp/proc.c).
func sctpListens(r io.Reader) (n int, err error) {
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		fs := strings.Fields(sc.Text())
		if len(fs) < 9 || fs[3] != strconv.Itoa(tcpListen) {
			continue
		}
		if slices.ContainsFunc(fs[8:], func(s string) bool {
			a, err := netip.ParseAddr(strings.Trim(s, "*="))
			return err == nil && !a.Unmap().IsLoopback()
		}) {
			n++
		}
	}
	return n, sc.Err()
}
