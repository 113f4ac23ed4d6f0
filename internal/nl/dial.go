package nl

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Dial opens a connected socket, "udp" or "tcp", that is in the named namespace
// ("" is this process's own). A socket stays in the namespace that it was made
// in, so only that takes a thread: connections are waited for outside, and
// thousands to where nobody answers are no thousands of threads.
func Dial(ctx context.Context, name, network string, to netip.AddrPort) (net.Conn, error) {
	if name == "" {
		var d net.Dialer
		return d.DialContext(ctx, network, to.String())
	}
	kind := unix.SOCK_DGRAM
	switch network {
	case "udp":
	case "tcp":
		kind = unix.SOCK_STREAM
	default:
		return nil, fmt.Errorf("dial %s: network %q: use udp or tcp", to, network)
	}
	var f *os.File
	err := Do(name, func() error {
		family, sa, err := sockaddr(to)
		if err != nil {
			return err
		}
		fd, err := unix.Socket(family, kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return os.NewSyscallError("socket", err)
		}
		if err := unix.Connect(fd, sa); err != nil && !errors.Is(err, unix.EINPROGRESS) {
			unix.Close(fd)
			return os.NewSyscallError("connect", err)
		}
		f = os.NewFile(uintptr(fd), network)
		return nil
	})
	if err == nil {
		defer f.Close()
		if kind == unix.SOCK_STREAM {
			err = connected(ctx, f)
		}
	}
	if err == nil {
		var c net.Conn
		if c, err = net.FileConn(f); err == nil {
			return c, nil
		}
	}
	return nil, fmt.Errorf("dial %s %s in namespace %s: %w", network, to, name, err)
}

// connected waits until a connection is made or has failed.
func connected(ctx context.Context, f *os.File) error {
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = f.SetDeadline(time.Unix(1, 0)) })()
	var result error
	err = rc.Write(func(fd uintptr) bool {
		errno, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		switch {
		case err != nil:
			result = os.NewSyscallError("getsockopt", err)
			return true
		case errno != 0:
			result = os.NewSyscallError("connect", unix.Errno(errno))
			return true
		}
		_, err = unix.Getpeername(int(fd))
		return err == nil // else ENOTCONN: not yet
	})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return errors.Join(result, err)
}

// sockaddr is called where the zone of a link-local address has its meaning.
func sockaddr(to netip.AddrPort) (family int, sa unix.Sockaddr, err error) {
	a := to.Addr().Unmap()
	if a.Is4() {
		return unix.AF_INET, &unix.SockaddrInet4{Port: int(to.Port()), Addr: a.As4()}, nil
	}
	s := &unix.SockaddrInet6{Port: int(to.Port()), Addr: a.As16()}
	if z := a.Zone(); z != "" {
		i, err := net.InterfaceByName(z)
		if err != nil {
			return 0, nil, fmt.Errorf("zone of %s: %w", a, err)
		}
		s.ZoneId = uint32(i.Index)
	}
	return unix.AF_INET6, s, nil
}
