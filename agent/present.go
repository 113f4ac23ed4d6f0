package agent

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"syscall"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
)

// present implements gossip.Config's Present. It asks for a TCP connection, and for an
// echo: a machine on which no agent works may answer but one of them. Its kernel refuses
// the connection where nobody listens, and leaves it without an answer where an agent
// that hangs or has too much to do takes none; echoes are filtered in some networks.
func present(ctx context.Context, addr netip.AddrPort) bool {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	asks := []func(context.Context, netip.AddrPort) bool{connects, echoes}
	answers := make(chan bool, len(asks))
	for _, ask := range asks {
		go func() { answers <- ask(ctx, addr) }()
	}
	there := false
	for range asks {
		if <-answers {
			there = true
			cancel() // the other one ends
		}
	}
	return there
}

// connects tells whether a TCP connection to addr is taken or refused.
func connects(ctx context.Context, addr netip.AddrPort) bool {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", addr.String())
	if err == nil {
		c.Close()
		return true
	}
	return errors.Is(err, syscall.ECONNREFUSED)
}

// echoes tells whether an echo comes from addr (RFC 792, RFC 4443) while ctx goes on.
func echoes(ctx context.Context, addr netip.AddrPort) bool {
	network, proto := "ip4:icmp", 1 // IANA's protocol numbers
	request, reply := icmp.Type(ipv4.ICMPTypeEcho), icmp.Type(ipv4.ICMPTypeEchoReply)
	if addr.Addr().Is6() {
		network, proto = "ip6:ipv6-icmp", 58
		request, reply = ipv6.ICMPTypeEchoRequest, ipv6.ICMPTypeEchoReply
	}
	c, err := icmp.ListenPacket(network, "")
	if err != nil {
		return false // no right to ask
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { _ = c.SetReadDeadline(time.Unix(1, 0)) })()
	id, seq := rand.IntN(1<<16), rand.IntN(1<<16)
	ask, err := (&icmp.Message{Type: request, Body: &icmp.Echo{ID: id, Seq: seq}}).Marshal(nil) // IPv6's checksum is the kernel's to set
	if err != nil {
		return false
	}
	if _, err := c.WriteTo(ask, &net.IPAddr{IP: addr.Addr().AsSlice(), Zone: addr.Addr().Zone()}); err != nil {
		return false
	}
	b := make([]byte, 1500)
	for ctx.Err() == nil {
		n, from, err := c.ReadFrom(b)
		if err != nil {
			return false
		}
		ip, ok := from.(*net.IPAddr)
		if !ok || !ip.IP.Equal(addr.Addr().AsSlice()) {
			continue
		}
		m, err := icmp.ParseMessage(proto, b[:n])
		if err != nil || m.Type != reply {
			continue
		}
		if e, ok := m.Body.(*icmp.Echo); ok && e.ID == id && e.Seq == seq {
			return true
		}
	}
	return false
}
