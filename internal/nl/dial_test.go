package nl

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

func TestDial(t *testing.T) {
	needRoot(t)
	name := namespace(t, "dial")
	var ln net.Listener
	var pc net.PacketConn
	err := Do(name, func() (err error) {
		if ln, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			return err
		}
		if pc, err = net.ListenPacket("udp", "[::1]:0"); err != nil {
			return err
		}
		// Where everything is sent to nobody.
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "void", Flags: net.FlagUp}, PeerName: "end"}); err != nil {
			return err
		}
		l, err := netlink.LinkByName("void")
		if err != nil {
			return err
		}
		a, err := netlink.ParseAddr("192.0.2.1/24")
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(l, a); err != nil {
			return err
		}
		end, err := netlink.LinkByName("end")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(end); err != nil {
			return err
		}
		return netlink.NeighAdd(&netlink.Neigh{LinkIndex: l.Attrs().Index, State: netlink.NUD_PERMANENT, IP: net.IPv4(192, 0, 2, 9), HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 9}})
	})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	defer pc.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()

	c, err := Dial(ctx, name, "tcp", netip.MustParseAddrPort(ln.Addr().String()))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	server, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	if _, err := server.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if n, err := c.Read(make([]byte, 9)); n != 1 || err != nil {
		t.Errorf("tcp: read %d, %v", n, err)
	}

	u, err := Dial(ctx, name, "udp", netip.MustParseAddrPort(pc.LocalAddr().String()))
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	if _, ok := u.(*net.UDPConn); !ok {
		t.Errorf("udp: a %T", u)
	}
	if _, err := u.Write([]byte("yz")); err != nil {
		t.Fatal(err)
	}
	if n, _, err := pc.ReadFrom(make([]byte, 9)); n != 2 || err != nil {
		t.Errorf("udp: read %d, %v", n, err)
	}

	closed := netip.MustParseAddrPort(ln.Addr().String())
	ln.Close()
	if c, err := Dial(ctx, name, "tcp", closed); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("nobody listens: %v, %v", c, err)
	}
	if c, err := Dial(ctx, name, "tcp", netip.MustParseAddrPort("203.0.113.1:53")); !errors.Is(err, syscall.ENETUNREACH) {
		t.Errorf("no route: %v, %v", c, err)
	}
	short, cancelShort := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancelShort()
	if c, err := Dial(short, name, "tcp", netip.MustParseAddrPort("192.0.2.9:53")); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("no answer: %v, %v", c, err)
	}
	if c, err := Dial(ctx, "shoalnl-no-such", "udp", closed); err == nil {
		c.Close()
		t.Error("in a namespace that does not exist")
	}
}
