package vxlan

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"

	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/spec"
)

// Prober asks the namespaces of spec.PathNetwork on other nodes for an echo. It is
// for one goroutine.
type Prober struct {
	fd       int
	netns    string
	dev, ino uint64 // of the namespace that the socket is in
	id       uint16 // of its echoes, among those of all sockets of the namespace
}

// ErrGone: the namespace of a Prober was removed, or made anew. The Prober has to be
// closed soon: its socket would keep the old one, whose VXLAN device has the VNI.
var ErrGone = errors.New("the namespace is another by now")

// OpenProber opens a raw ICMP socket in a namespace.
func OpenProber(netns string) (*Prober, error) {
	p := &Prober{fd: -1, netns: netns, id: uint16(rand.Uint32())}
	err := nl.Do(netns, func() error {
		var st unix.Stat_t
		if err := unix.Stat("/proc/thread-self/ns/net", &st); err != nil {
			return err
		}
		p.dev, p.ino = uint64(st.Dev), st.Ino
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		// ICMP_FILTER (linux/icmp.h): bits of the types that are not for us; 0 is
		// echo reply's.
		if err := unix.SetsockoptInt(fd, unix.SOL_RAW, 1, -2); err != nil {
			unix.Close(fd)
			return os.NewSyscallError("setsockopt", err)
		}
		p.fd = fd
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("probe of the data path in namespace %s: %w", netns, err)
	}
	return p, nil
}

// Check returns ErrGone if the namespace of the Prober is not that of its name.
func (p *Prober) Check() error {
	var st unix.Stat_t
	if err := unix.Stat(spec.NetnsDir+"/"+p.netns, &st); err != nil || uint64(st.Dev) != p.dev || st.Ino != p.ino {
		return ErrGone
	}
	return nil
}

// Send asks a node, by its router's address, for an echo.
func (p *Prober) Send(to netip.Addr, seq uint16) error {
	if !to.Is4() {
		return fmt.Errorf("no IPv4 address: %s", to)
	}
	return os.NewSyscallError("sendto", unix.Sendto(p.fd, echo(p.id, seq), unix.MSG_DONTWAIT, &unix.SockaddrInet4{Addr: to.As4()}))
}

// Read tells of the echoes that have come since, and waits for none.
func (p *Prober) Read(echoed func(from netip.Addr, seq uint16)) error {
	b := make([]byte, 256)
	for {
		n, from, err := unix.Recvfrom(p.fd, b, unix.MSG_DONTWAIT)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return nil
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return os.NewSyscallError("recvfrom", err)
		}
		if from, ok := from.(*unix.SockaddrInet4); ok {
			if seq, ok := echoReply(b[:n], p.id); ok {
				echoed(netip.AddrFrom4(from.Addr), seq)
			}
		}
	}
}

// Close closes the socket.
func (p *Prober) Close() error { return unix.Close(p.fd) }

// echo is an ICMP echo request (RFC 792).
func echo(id, seq uint16) []byte {
	b := append([]byte{8, 0, 0, 0, byte(id >> 8), byte(id), byte(seq >> 8), byte(seq)}, "shoal path"...)
	var sum uint32
	for i := 0; i < len(b); i += 2 {
		sum += uint32(b[i])<<8 | uint32(b[i+1])
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(b[2:], ^uint16(sum))
	return b
}

// echoReply reads what a raw socket got: the IPv4 header comes first (raw(7)).
func echoReply(b []byte, id uint16) (seq uint16, ok bool) {
	if len(b) < 20 {
		return 0, false
	}
	head := int(b[0]&15) * 4
	if head < 20 || len(b) < head+8 {
		return 0, false
	}
	b = b[head:]
	if b[0] != 0 || binary.BigEndian.Uint16(b[4:]) != id {
		return 0, false
	}
	return binary.BigEndian.Uint16(b[6:]), true
}
