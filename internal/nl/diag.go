package nl

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	vnl "github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Socket states as the kernel numbers them (include/net/tcp_states.h); a UDP
// socket that is not connected is in tcpClose.
const (
	tcpClose  = 7
	tcpListen = 10
)

// diagRequest is struct inet_diag_req_v2 (linux/inet_diag.h) without an ID:
// every socket of a family and protocol in one state.
type diagRequest struct {
	family, protocol uint8
	state            uint
}

const sizeofDiagRequest = 56

func (r diagRequest) Len() int { return sizeofDiagRequest }

func (r diagRequest) Serialize() []byte {
	b := make([]byte, sizeofDiagRequest)
	b[0], b[1] = r.family, r.protocol
	binary.NativeEndian.PutUint32(b[4:], 1<<r.state)
	return b
}

// Listening tells whether a socket of the calling thread's namespace accepts
// traffic that comes from elsewhere: a TCP socket that listens or a UDP socket
// that is bound and not connected, on more than loopback. Use it within Do. It
// asks sock_diag(7), whose cost is that of the listening sockets alone, where
// /proc/net/tcp walks every connection. An error satisfies
// errors.Is(err, errors.ErrUnsupported) where the kernel has no inet_diag.
func Listening() (bool, error) {
	for _, r := range []diagRequest{
		{unix.AF_INET, unix.IPPROTO_TCP, tcpListen}, {unix.AF_INET6, unix.IPPROTO_TCP, tcpListen},
		{unix.AF_INET, unix.IPPROTO_UDP, tcpClose}, {unix.AF_INET6, unix.IPPROTO_UDP, tcpClose},
	} {
		found := false
		_, err := Dump(func() (struct{}, error) {
			req := vnl.NewNetlinkRequest(vnl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
			req.AddData(r)
			return struct{}{}, req.ExecuteIter(unix.NETLINK_INET_DIAG, vnl.SOCK_DIAG_BY_FAMILY, func(msg []byte) bool {
				a, ok := diagSource(msg)
				found = found || ok && !a.IsLoopback()
				return true
			})
		})
		switch {
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EPROTONOSUPPORT):
			return false, fmt.Errorf("list listening sockets: %w: %w", err, errors.ErrUnsupported)
		case err != nil:
			return false, fmt.Errorf("list listening sockets: %w", err)
		case found:
			return true, nil
		}
	}
	return false, nil
}

// diagSource reads the local address of a struct inet_diag_msg: family, state,
// timer and retransmissions take an octet each, two ports two each.
func diagSource(msg []byte) (netip.Addr, bool) {
	const at = 8
	if len(msg) < at+16 {
		return netip.Addr{}, false
	}
	n := 16
	if msg[0] == unix.AF_INET {
		n = 4
	}
	a, ok := netip.AddrFromSlice(msg[at : at+n])
	return a.Unmap(), ok
}
