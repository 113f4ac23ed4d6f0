package gossip

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/memberlist"
)

// sockets is the real memberlist.Transport: one UDP and one TCP socket on one
// address. Against memberlist.NetTransport it starts no goroutine before
// start, dials from the address it listens on (so that a firewall rule or a
// multi-homed host sees one address), and allocates what a packet needs
// instead of 64 KiB for each.
type sockets struct {
	addr    netip.AddrPort
	tcp     *net.TCPListener
	udp     *net.UDPConn
	packets chan *memberlist.Packet
	streams chan net.Conn
	ctx     context.Context // ends with Shutdown, and dials under way with it
	end     context.CancelFunc
	wg      sync.WaitGroup
}

// bind opens both sockets on one port.
func bind(addr netip.Addr, port int) (*sockets, error) {
	for try := 0; ; try++ {
		s, err := bindOnce(addr, port)
		// A free TCP port may be taken in UDP; there are others.
		if err != nil && port == 0 && try < 10 && errors.Is(err, syscall.EADDRINUSE) {
			continue
		}
		return s, err
	}
}

func bindOnce(addr netip.Addr, port int) (*sockets, error) {
	at := netip.AddrPortFrom(addr, uint16(port))
	tcp, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(at))
	if err != nil {
		return nil, bindError("tcp", at, err)
	}
	at = netip.AddrPortFrom(addr, uint16(tcp.Addr().(*net.TCPAddr).Port))
	udp, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
	if err != nil {
		tcp.Close()
		return nil, bindError("udp", at, err)
	}
	// A burst of deltas should find room; the kernel caps it at
	// net.core.rmem_max (socket(7)), which is no reason to fail.
	_ = udp.SetReadBuffer(2 << 20)
	ctx, end := context.WithCancel(context.Background())
	return &sockets{addr: at, tcp: tcp, udp: udp, packets: make(chan *memberlist.Packet, 64), streams: make(chan net.Conn), ctx: ctx, end: end}, nil
}

func bindError(proto string, at netip.AddrPort, err error) error {
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Errorf("gossip port %d/%s on %s is taken by another program: stop it, or choose another port with --gossip-port: %w", at.Port(), proto, at.Addr(), err)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return fmt.Errorf("gossip can't listen on %s: no interface of this machine has the address %s: choose another with --advertise-addr: %w", at, at.Addr(), err)
	case errors.Is(err, syscall.EACCES):
		return fmt.Errorf("gossip may not listen on port %d/%s: choose one above 1023 with --gossip-port: %w", at.Port(), proto, err)
	}
	return fmt.Errorf("gossip can't listen on %s/%s: %w", at, proto, err)
}

func (s *sockets) start() {
	s.wg.Add(2)
	go s.accept()
	go s.receive()
}

func (s *sockets) accept() {
	defer s.wg.Done()
	for {
		conn, err := s.tcp.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			// Out of file descriptors, most likely; it may pass.
			select {
			case <-s.ctx.Done():
				return
			case <-time.After(50 * time.Millisecond):
			}
			continue
		}
		select {
		case s.streams <- conn:
		case <-s.ctx.Done():
			conn.Close()
			return
		}
	}
}

func (s *sockets) receive() {
	defer s.wg.Done()
	buf := make([]byte, 64<<10)
	for {
		n, from, err := s.udp.ReadFromUDP(buf)
		now := time.Now()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			select { // an ICMP error of an earlier packet, perhaps
			case <-s.ctx.Done():
				return
			case <-time.After(time.Millisecond):
			}
			continue
		}
		if n == 0 {
			continue
		}
		p := &memberlist.Packet{Buf: append([]byte(nil), buf[:n]...), From: from, Timestamp: now}
		select {
		case s.packets <- p:
		case <-s.ctx.Done():
			return
		}
	}
}

// FinalAdvertiseAddr implements memberlist.Transport.
func (s *sockets) FinalAdvertiseAddr(string, int) (net.IP, int, error) {
	return s.addr.Addr().AsSlice(), int(s.addr.Port()), nil
}

// WriteTo implements memberlist.Transport.
func (s *sockets) WriteTo(b []byte, addr string) (time.Time, error) {
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		return time.Time{}, err
	}
	_, err = s.udp.WriteToUDPAddrPort(b, to)
	return time.Now(), err
}

// PacketCh implements memberlist.Transport.
func (s *sockets) PacketCh() <-chan *memberlist.Packet { return s.packets }

// DialTimeout implements memberlist.Transport.
func (s *sockets) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(s.ctx, timeout)
	defer cancel()
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(s.addr.Addr(), 0))}
	return d.DialContext(ctx, "tcp", addr)
}

// StreamCh implements memberlist.Transport.
func (s *sockets) StreamCh() <-chan net.Conn { return s.streams }

// Shutdown implements memberlist.Transport.
func (s *sockets) Shutdown() error {
	s.end()
	s.tcp.Close()
	s.udp.Close()
	s.wg.Wait()
	return nil
}

// tracked wraps a transport so that every stream has a deadline and none
// outlives Shutdown; memberlist itself waits for neither. All that goes through
// it is sealed, and what comes passes the wall.
type tracked struct {
	memberlist.Transport
	wall    *wall
	streams chan net.Conn
	in      chan *memberlist.Packet
	packets atomic.Uint64 // bytes sent in packets

	mu     sync.Mutex
	conns  map[*trackedConn]struct{}
	closed bool
	done   chan struct{}
	wg     sync.WaitGroup
}

func track(t memberlist.Transport, w *wall) *tracked {
	tr := &tracked{Transport: t, wall: w, streams: make(chan net.Conn), in: make(chan *memberlist.Packet, 256),
		conns: map[*trackedConn]struct{}{}, done: make(chan struct{})}
	tr.wg.Add(2)
	go tr.relay()
	go tr.relayPackets()
	return tr
}

func (t *tracked) relayPackets() {
	defer t.wg.Done()
	for {
		select {
		case <-t.done:
			return
		case p := <-t.Transport.PacketCh():
			b := t.wall.packet(p.Buf, p.From)
			if b == nil {
				continue
			}
			p.Buf = b
			select {
			case t.in <- p:
			case <-t.done:
				return
			}
		}
	}
}

// inject hands memberlist a message of this node's own.
func (t *tracked) inject(b []byte) {
	select {
	case t.in <- &memberlist.Packet{Buf: b, From: net.UDPAddrFromAddrPort(t.wall.g.addr), Timestamp: time.Now()}:
	case <-t.done:
	}
}

// PacketCh implements memberlist.Transport.
func (t *tracked) PacketCh() <-chan *memberlist.Packet { return t.in }

func (t *tracked) relay() {
	defer t.wg.Done()
	for {
		select {
		case <-t.done:
			return
		case c := <-t.Transport.StreamCh():
			t.mu.Lock()
			open := len(t.conns)
			t.mu.Unlock()
			if !t.wall.enter(ipOf(c.RemoteAddr()), open) {
				c.Close()
				continue
			}
			conn, err := t.add(c)
			if err != nil {
				continue
			}
			select {
			case t.streams <- &sealed{trackedConn: conn, w: t.wall}:
			case <-t.done:
				return
			}
		}
	}
}

type trackedConn struct {
	net.Conn
	t *tracked
}

func (c *trackedConn) Close() error {
	c.t.mu.Lock()
	delete(c.t.conns, c)
	c.t.mu.Unlock()
	return c.Conn.Close()
}

func (t *tracked) add(c net.Conn) (*trackedConn, error) {
	if err := c.SetDeadline(time.Now().Add(streamTimeout)); err != nil {
		c.Close()
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		c.Close()
		return nil, net.ErrClosed
	}
	tc := &trackedConn{c, t}
	t.conns[tc] = struct{}{}
	return tc, nil
}

func (t *tracked) WriteTo(b []byte, addr string) (time.Time, error) {
	s := t.wall.g.sealer
	b = s.sealFrame(make([]byte, 0, len(b)+sealOverhead), b, s.packet)
	t.packets.Add(uint64(len(b)))
	return t.Transport.WriteTo(b, addr)
}

// WriteToAddress implements memberlist.NodeAwareTransport.
func (t *tracked) WriteToAddress(b []byte, a memberlist.Address) (time.Time, error) {
	return t.WriteTo(b, a.Addr)
}

func (t *tracked) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	c, err := t.Transport.DialTimeout(addr, min(timeout, dialTimeout))
	if err != nil {
		return nil, err
	}
	conn, err := t.add(c)
	if err != nil {
		return nil, err
	}
	return &sealed{trackedConn: conn, w: t.wall, dialed: true}, nil
}

// DialAddressTimeout implements memberlist.NodeAwareTransport.
func (t *tracked) DialAddressTimeout(a memberlist.Address, timeout time.Duration) (net.Conn, error) {
	return t.DialTimeout(a.Addr, timeout)
}

func (t *tracked) StreamCh() <-chan net.Conn { return t.streams }

func (t *tracked) Shutdown() error {
	t.mu.Lock()
	if t.closed {
		t.mu.Unlock()
		return nil
	}
	t.closed = true
	conns := make([]*trackedConn, 0, len(t.conns))
	for c := range t.conns {
		conns = append(conns, c)
	}
	close(t.done)
	t.mu.Unlock()
	for _, c := range conns {
		c.Close()
	}
	err := t.Transport.Shutdown()
	t.wg.Wait()
	return err
}
