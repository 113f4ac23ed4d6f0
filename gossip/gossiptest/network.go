// Package gossiptest is a network in memory for tests of gossip: nodes on it
// can be cut off, partitioned, slowed down, and lose packets.
//
// It behaves like the real thing where it matters and memberlist's own
// MockTransport does not: a packet to a full or absent receiver is dropped and
// never blocks the sender; a link may be cut in one direction; a stream over a
// cut link stalls until its deadline; a closed node is unreachable at once, and
// its address can be bound again.
package gossiptest

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
)

// Network connects transports. The zero value is not usable; see NewNetwork.
type Network struct {
	mu    sync.Mutex
	rng   *rand.Rand
	nodes map[netip.AddrPort]*Transport
	// cut holds directed links that are down.
	cut   map[[2]netip.AddrPort]bool
	group map[netip.AddrPort]int // of a partition; nodes not named are in 0
	loss  float64
	delay time.Duration
	stats Stats
}

// Stats counts packets.
type Stats struct {
	Sent, Lost, Overflowed uint64
	Streams                uint64
}

// NewNetwork makes a network without faults; seed is for losses and delays.
func NewNetwork(seed uint64) *Network {
	return &Network{rng: rand.New(rand.NewPCG(seed, 0)), nodes: map[netip.AddrPort]*Transport{}, cut: map[[2]netip.AddrPort]bool{}, group: map[netip.AddrPort]int{}}
}

// Bind puts a node on the network. It fails if the address is in use.
func (n *Network) Bind(addr netip.AddrPort) (*Transport, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.nodes[addr] != nil {
		return nil, fmt.Errorf("gossiptest: %s is in use", addr)
	}
	t := &Transport{net: n, addr: addr, packets: make(chan *memberlist.Packet, 4096), streams: make(chan net.Conn), done: make(chan struct{})}
	n.nodes[addr] = t
	return t, nil
}

// Partition splits the network: nodes reach only those of their group. Nodes
// that are not named form one more group. It replaces an earlier partition.
func (n *Network) Partition(groups ...[]netip.AddrPort) {
	n.mu.Lock()
	defer n.mu.Unlock()
	clear(n.group)
	for i, g := range groups {
		for _, a := range g {
			n.group[a] = i + 1
		}
	}
}

// Cut takes the link from one node to another down, in this direction.
func (n *Network) Cut(from, to netip.AddrPort) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cut[[2]netip.AddrPort{from, to}] = true
}

// Heal ends every partition and cut.
func (n *Network) Heal() {
	n.mu.Lock()
	defer n.mu.Unlock()
	clear(n.cut)
	clear(n.group)
}

// SetLoss makes this share of packets, 0 to 1, vanish. Streams lose nothing.
func (n *Network) SetLoss(share float64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.loss = share
}

// SetDelay makes each packet take a random time up to max, so that they come
// out of order.
func (n *Network) SetDelay(max time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.delay = max
}

// Stats returns the counters.
func (n *Network) Stats() Stats {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.stats
}

// open tells whether from reaches to. Under mu.
func (n *Network) open(from, to netip.AddrPort) bool {
	return n.group[from] == n.group[to] && !n.cut[[2]netip.AddrPort{from, to}]
}

func (n *Network) isOpen(from, to netip.AddrPort) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.open(from, to)
}

func (n *Network) deliver(from, to netip.AddrPort, b []byte) {
	n.mu.Lock()
	defer n.mu.Unlock()
	t := n.nodes[to]
	if t == nil || !n.open(from, to) {
		n.stats.Lost++
		return
	}
	select {
	case t.packets <- &memberlist.Packet{Buf: b, From: net.UDPAddrFromAddrPort(from), Timestamp: time.Now()}:
	default:
		n.stats.Overflowed++
	}
}

// Transport is a node's place on a Network. It is a memberlist.Transport.
type Transport struct {
	net     *Network
	addr    netip.AddrPort
	packets chan *memberlist.Packet
	streams chan net.Conn
	done    chan struct{}
	once    sync.Once
}

var _ memberlist.Transport = (*Transport)(nil)

// FinalAdvertiseAddr implements memberlist.Transport.
func (t *Transport) FinalAdvertiseAddr(string, int) (net.IP, int, error) {
	return t.addr.Addr().AsSlice(), int(t.addr.Port()), nil
}

// WriteTo implements memberlist.Transport. Like UDP it reports no loss.
func (t *Transport) WriteTo(b []byte, addr string) (time.Time, error) {
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		return time.Time{}, err
	}
	select {
	case <-t.done:
		return time.Time{}, net.ErrClosed
	default:
	}
	n := t.net
	n.mu.Lock()
	n.stats.Sent++
	lost := n.rng.Float64() < n.loss
	if lost {
		n.stats.Lost++
	}
	var delay time.Duration
	if n.delay > 0 {
		delay = time.Duration(n.rng.Int64N(int64(n.delay)))
	}
	n.mu.Unlock()
	now := time.Now()
	if lost {
		return now, nil
	}
	b = append([]byte(nil), b...)
	if delay > 0 {
		time.AfterFunc(delay, func() { n.deliver(t.addr, to, b) })
	} else {
		n.deliver(t.addr, to, b)
	}
	return now, nil
}

// PacketCh implements memberlist.Transport.
func (t *Transport) PacketCh() <-chan *memberlist.Packet { return t.packets }

// StreamCh implements memberlist.Transport.
func (t *Transport) StreamCh() <-chan net.Conn { return t.streams }

// DialTimeout implements memberlist.Transport. Over a cut link it takes its
// whole timeout; to an address without a node it is refused at once.
func (t *Transport) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		return nil, err
	}
	opErr := func(err error) error {
		return &net.OpError{Op: "dial", Net: "tcp", Addr: net.TCPAddrFromAddrPort(to), Err: err}
	}
	n := t.net
	n.mu.Lock()
	n.stats.Streams++
	peer := n.nodes[to]
	ok := n.open(t.addr, to) && n.open(to, t.addr)
	n.mu.Unlock()
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	if ok && peer == nil {
		return nil, opErr(errors.New("connection refused"))
	}
	if !ok {
		select {
		case <-timer.C:
			return nil, opErr(os.ErrDeadlineExceeded)
		case <-t.done:
			return nil, opErr(net.ErrClosed)
		}
	}
	a, b := net.Pipe()
	mine := &conn{Conn: a, net: n, from: t.addr, to: to, closed: make(chan struct{})}
	theirs := &conn{Conn: b, net: n, from: to, to: t.addr, closed: make(chan struct{})}
	select {
	case peer.streams <- theirs:
		return mine, nil
	case <-timer.C:
		err = os.ErrDeadlineExceeded
	case <-peer.done:
		err = errors.New("connection refused")
	case <-t.done:
		err = net.ErrClosed
	}
	a.Close()
	b.Close()
	return nil, opErr(err)
}

// Shutdown implements memberlist.Transport: the node is off the network.
func (t *Transport) Shutdown() error {
	t.once.Do(func() {
		close(t.done)
		t.net.mu.Lock()
		delete(t.net.nodes, t.addr)
		t.net.mu.Unlock()
	})
	return nil
}

// conn is one end of a stream.
type conn struct {
	net.Conn
	net      *Network
	from, to netip.AddrPort

	closed chan struct{}
	once   sync.Once

	mu       sync.Mutex
	deadline time.Time
}

func (c *conn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

func (c *conn) LocalAddr() net.Addr  { return net.TCPAddrFromAddrPort(c.from) }
func (c *conn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.to) }

func (c *conn) SetDeadline(t time.Time) error {
	c.mu.Lock()
	c.deadline = t
	c.mu.Unlock()
	return c.Conn.SetDeadline(t)
}

func (c *conn) SetWriteDeadline(t time.Time) error {
	c.mu.Lock()
	c.deadline = t
	c.mu.Unlock()
	return c.Conn.SetWriteDeadline(t)
}

// Write stalls while the link is cut, as retransmissions would.
func (c *conn) Write(b []byte) (int, error) {
	for !c.net.isOpen(c.from, c.to) || !c.net.isOpen(c.to, c.from) {
		c.mu.Lock()
		end := c.deadline
		c.mu.Unlock()
		if !end.IsZero() && time.Now().After(end) {
			return 0, os.ErrDeadlineExceeded
		}
		select {
		case <-c.closed:
			return 0, net.ErrClosed
		case <-time.After(5 * time.Millisecond):
		}
	}
	return c.Conn.Write(b)
}
