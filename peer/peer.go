package peer

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Protocols, as ALPN has them (RFC 7301). Who names none of them, like the
// health check of an outer load balancer, is a stranger whatever it shows.
const (
	ProtoAPI  = "shoal-api"
	ProtoRaft = "shoal-raft"
	protoHTTP = "http/1.1"
)

// Bounds of what others may make this node keep.
const (
	handshakeTimeout = 5 * time.Second
	// strangerLife is for how long a caller without a certificate may keep a
	// connection: asking for a certificate takes the managers some time.
	strangerLife = 40 * time.Second
	// pendingPerSource bounds the connections of one address (IPv6: one /64)
	// that have not shown a certificate, pendingTotal those of all.
	pendingPerSource = 64
	pendingTotal     = 2048
	// connsPerNode bounds those of one node.
	connsPerNode = 128
	// acceptWait is how long an accepted connection waits for who serves it.
	acceptWait = 5 * time.Second
	// acceptRetry is the wait after an Accept that failed for a passing reason,
	// like too many open files (accept(2): EMFILE, ENFILE, ENOBUFS).
	acceptRetry = 50 * time.Millisecond
)

// Config is what a Peer needs.
type Config struct {
	Credentials *Credentials
	// Standing is the node list; nil: none, certificates count as they are.
	Standing Standing
	Log      *slog.Logger
}

// Peer is this node among the others: all connections between nodes, both ways,
// are made here.
type Peer struct {
	cfg Config

	mu      sync.Mutex
	conns   map[*Conn]struct{}    // all that are open
	perNode map[string]int        // of them, accepted ones by node ID
	pending map[netip.Prefix]int  // accepted ones without a certificate, by source
	waiting int                   // sum of pending
	calls   map[string]int        // being answered, by node ID or source
	tries   map[netip.Prefix]*try // of strangers that gave wrong tokens

	counters counters
}

// counters are read by Stats.
type counters struct {
	handshakes, refused, shed, denied, tokens atomic.Uint64
}

// Stats count since the start.
type Stats struct {
	Handshakes uint64 // that ended well, accepted ones
	Refused    uint64 // accepted connections whose handshake or certificate was no good
	Shed       uint64 // accepted connections that were one too many
	Denied     uint64 // calls that their caller may not make
	Tokens     uint64 // wrong join tokens
	Open       int    // connections now, both ways
	Pending    int    // of them, accepted ones without a certificate
}

// New makes a Peer.
func New(cfg Config) *Peer {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Peer{cfg: cfg, conns: map[*Conn]struct{}{}, perNode: map[string]int{}, pending: map[netip.Prefix]int{}, calls: map[string]int{}, tries: map[netip.Prefix]*try{}}
}

// Stats returns what was counted.
func (p *Peer) Stats() Stats {
	p.mu.Lock()
	defer p.mu.Unlock()
	return Stats{Handshakes: p.counters.handshakes.Load(), Refused: p.counters.refused.Load(), Shed: p.counters.shed.Load(),
		Denied: p.counters.denied.Load(), Tokens: p.counters.tokens.Load(), Open: len(p.conns), Pending: p.waiting}
}

// Credentials are this node's.
func (p *Peer) Credentials() *Credentials { return p.cfg.Credentials }

// Conn is a connection whose other end is known. It is no *tls.Conn to those who
// look for one: net/http speaks HTTP/2 over it as over any.
type Conn struct {
	net.Conn // TLS
	p        *Peer
	caller   Caller
	accepted bool
	source   netip.Prefix // of an accepted one that counts as pending
	once     sync.Once
}

// Caller is who is at the other end, by certificate and node list as they were
// when the connection was made.
func (c *Conn) Caller() Caller { return c.caller }

// Close implements net.Conn.
func (c *Conn) Close() error {
	c.once.Do(func() {
		c.p.mu.Lock()
		defer c.p.mu.Unlock()
		delete(c.p.conns, c)
		if !c.accepted {
			return
		}
		if c.source.IsValid() {
			c.p.release(c.source)
		} else if c.p.perNode[c.caller.ID]--; c.p.perNode[c.caller.ID] <= 0 {
			delete(c.p.perNode, c.caller.ID)
		}
	})
	return c.Conn.Close()
}

// release takes back what reserve gave. p.mu is held.
func (p *Peer) release(source netip.Prefix) {
	p.waiting--
	if p.pending[source]--; p.pending[source] <= 0 {
		delete(p.pending, source)
	}
}

func (p *Peer) reserve(source netip.Prefix) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pending[source] >= pendingPerSource || p.waiting >= pendingTotal {
		return false
	}
	p.pending[source]++
	p.waiting++
	return true
}

// sourceOf is what counts as one source: an address, or the /64 that a machine
// with IPv6 has to itself.
func sourceOf(a net.Addr) netip.Prefix {
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 32)
	}
	return prefixOf(ap.Addr())
}

func prefixOf(ip netip.Addr) netip.Prefix {
	ip = ip.Unmap().WithZone("")
	bits := 64
	if ip.Is4() {
		bits = 32
	}
	pfx, err := ip.Prefix(bits)
	if err != nil {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 32)
	}
	return pfx
}

func addrOf(a net.Addr) netip.Addr {
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return netip.Addr{}
	}
	return ap.Addr().Unmap()
}

// tlsConfig is the same in both directions. Sessions are not resumed: each
// connection is judged by the certificates and the node list of its own time.
func (p *Peer) tlsConfig(protos ...string) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             protos,
		SessionTicketsDisabled: true,
		ClientAuth:             tls.RequestClientCert, // checked by VerifyConnection
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return p.cfg.Credentials.certificate() },
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return p.cfg.Credentials.certificate()
		},
	}
}

// identify tells who showed these certificates.
func (p *Peer) identify(certs []*x509.Certificate) (Caller, error) {
	c, err := p.cfg.Credentials.verify(certs)
	if err != nil {
		return c, err
	}
	return p.cfg.Standing.judge(c)
}

// Listen serves a listener: it returns the connections of the API and those of
// raft. Closing ln ends both; closing one of them ends only its own Accept, and
// its connections are refused from then on.
func (p *Peer) Listen(ln net.Listener) (api, raft *Conns) {
	done := make(chan struct{})
	mk := func() *Conns {
		return &Conns{addr: ln.Addr(), ch: make(chan net.Conn), done: done, closed: make(chan struct{})}
	}
	api, raft = mk(), mk()
	go func() { // ends with ln
		defer close(done)
		for {
			c, err := ln.Accept()
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				time.Sleep(acceptRetry)
				continue
			}
			source := sourceOf(c.RemoteAddr())
			if !p.reserve(source) {
				p.counters.shed.Add(1)
				if t, ok := c.(*net.TCPConn); ok {
					_ = t.SetLinger(0) // nothing of it is kept
				}
				c.Close()
				continue
			}
			go p.greet(c, source, api, raft) // ends by its timeouts, or with ln
		}
	}()
	return api, raft
}

// greet finds out who calls, and for what.
func (p *Peer) greet(raw net.Conn, source netip.Prefix, api, raft *Conns) {
	known := make(chan struct{})
	go func() {
		select {
		case <-api.done: // nobody will accept it
			raw.Close()
		case <-known:
		}
	}()
	c, proto, err := p.accept(raw, source)
	close(known)
	if err != nil {
		p.counters.refused.Add(1)
		p.cfg.Log.Debug("a connection was refused", "from", raw.RemoteAddr(), "error", err)
		raw.Close()
		return
	}
	p.counters.handshakes.Add(1)
	if proto == ProtoRaft {
		raft.give(c)
		return
	}
	api.give(c)
}

func (p *Peer) accept(raw net.Conn, source netip.Prefix) (_ *Conn, proto string, err error) {
	defer func() {
		if err != nil {
			p.mu.Lock()
			p.release(source)
			p.mu.Unlock()
		}
	}()
	caller := Caller{Kind: Stranger, Addr: addrOf(raw.RemoteAddr())}
	cfg := p.tlsConfig(ProtoAPI, ProtoRaft, protoHTTP)
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		if cs.NegotiatedProtocol != ProtoAPI && cs.NegotiatedProtocol != ProtoRaft {
			return nil // a stranger
		}
		if len(cs.PeerCertificates) == 0 {
			if cs.NegotiatedProtocol == ProtoRaft {
				return errors.New("raft is spoken with a certificate only")
			}
			return nil
		}
		who, err := p.cfg.Credentials.verify(cs.PeerCertificates)
		if err != nil {
			return err
		}
		if who, err = p.cfg.Standing.judge(who); err != nil {
			if cs.NegotiatedProtocol == ProtoRaft {
				return err
			}
			who.Kind = Removed // it is told so by the guard
		}
		who.Addr = caller.Addr
		caller = who
		if cs.NegotiatedProtocol == ProtoRaft && who.Kind != Manager {
			return fmt.Errorf("%s may not speak raft", who)
		}
		return nil
	}
	conn := tls.Server(raw, cfg)
	// The whole of a handshake has this time, however slowly it comes.
	_ = raw.SetDeadline(time.Now().Add(handshakeTimeout))
	ctx, cancel := context.WithTimeout(context.Background(), handshakeTimeout)
	defer cancel()
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, "", err
	}
	_ = raw.SetDeadline(time.Time{})
	c := &Conn{Conn: conn, p: p, caller: caller, accepted: true}
	p.mu.Lock()
	defer p.mu.Unlock()
	if caller.Kind == Stranger || caller.Kind == Removed {
		c.source = source
		p.conns[c] = struct{}{}
		// HTTP sets deadlines of its own: this one can't be moved.
		t := time.AfterFunc(strangerLife, func() { raw.Close() })
		c.Conn = &mortal{conn, t}
		return c, "", nil
	}
	if p.perNode[caller.ID] >= connsPerNode {
		return nil, "", fmt.Errorf("%s has %d connections already", caller, connsPerNode)
	}
	p.release(source)
	p.perNode[caller.ID]++
	p.conns[c] = struct{}{}
	return c, conn.ConnectionState().NegotiatedProtocol, nil
}

// mortal is a connection that ends at a set time.
type mortal struct {
	net.Conn
	end *time.Timer
}

func (m *mortal) Close() error {
	m.end.Stop()
	return m.Conn.Close()
}

// Dial connects to another node. accept, which may be nil, tells whether who
// answers is who is wanted.
func (p *Peer) Dial(ctx context.Context, addr, proto string, accept func(Caller) error) (*Conn, error) {
	var caller Caller
	cfg := p.tlsConfig(proto)
	cfg.InsecureSkipVerify = true // not by name: by VerifyConnection
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		who, err := p.identify(cs.PeerCertificates)
		if err != nil {
			return err
		}
		if accept != nil {
			if err := accept(who); err != nil {
				return err
			}
		}
		caller = who
		return nil
	}
	conn, err := dialTLS(ctx, addr, cfg)
	if err != nil {
		return nil, err
	}
	caller.Addr = addrOf(conn.RemoteAddr())
	c := &Conn{Conn: conn, p: p, caller: caller}
	p.mu.Lock()
	p.conns[c] = struct{}{}
	p.mu.Unlock()
	return c, nil
}

func dialTLS(ctx context.Context, addr string, cfg *tls.Config) (*tls.Conn, error) {
	d := net.Dialer{Timeout: dialTimeout}
	raw, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	conn := tls.Client(raw, cfg)
	if err := conn.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, &HandshakeError{addr, err}
	}
	if got := conn.ConnectionState().NegotiatedProtocol; got != cfg.NextProtos[0] {
		raw.Close()
		return nil, &HandshakeError{addr, fmt.Errorf("it does not speak %s", cfg.NextProtos[0])}
	}
	return conn, nil
}

// dialTimeout is for a TCP connection to another node.
const dialTimeout = 2 * time.Second

// HandshakeError is a connection on which the other end did not turn out to be
// who it should be, or did not agree with this one. Nothing was sent.
type HandshakeError struct {
	Addr string
	Err  error
}

func (e *HandshakeError) Error() string { return fmt.Sprintf("handshake with %s: %v", e.Addr, e.Err) }

// Unwrap returns the reason.
func (e *HandshakeError) Unwrap() error { return e.Err }

// IsRefusal tells whether err is of two nodes that reach each other and don't know
// each other by their certificates: this one's verdict, or the other's, which comes
// after the handshake (RFC 8446, section 4.4.2.4). A connection that was cut, or hangs,
// is none: the other's agent ends, or stands still.
func IsRefusal(err error) bool {
	var ne net.Error
	if errors.As(err, &ne) && ne.Timeout() || errors.Is(err, context.Canceled) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, net.ErrClosed) {
		return false
	}
	var he *HandshakeError
	var alert tls.AlertError
	var op *net.OpError
	return errors.As(err, &he) || errors.As(err, &alert) || errors.As(err, &op) && op.Op == "remote error"
}

// IsManager accepts managers only; see [Peer.Dial].
func IsManager(c Caller) error {
	if c.Kind != Manager {
		return fmt.Errorf("%s is no manager", c)
	}
	return nil
}

// IsNode accepts one node only.
func IsNode(id string) func(Caller) error {
	return func(c Caller) error {
		if c.ID != id {
			return fmt.Errorf("%s answers, not node %s", c, id)
		}
		return nil
	}
}

// Again judges a caller by the node list of now.
func (p *Peer) Again(c Caller) (Caller, error) { return p.cfg.Standing.judge(c) }

// Recheck closes the connections of those who are no longer on the node list, or
// are on it with a lesser role than they had. Call it when the list has changed.
// What they call is refused from that moment on; the connections themselves last a
// little longer, so that a node which leaves gets to know that it has.
func (p *Peer) Recheck() {
	p.mu.Lock()
	all := make([]*Conn, 0, len(p.conns))
	for c := range p.conns {
		all = append(all, c)
	}
	p.mu.Unlock()
	for _, c := range all {
		now, err := p.Again(c.caller)
		if err != nil && c.caller.Kind != Removed || err == nil && now.Kind != c.caller.Kind && c.caller.Kind != Worker {
			p.cfg.Log.Debug("a connection ends", "with", c.caller.String(), "reason", orWorker(err))
			time.AfterFunc(recheckGrace, func() { c.Close() })
		}
	}
}

// recheckGrace is for answers that are on their way.
const recheckGrace = 500 * time.Millisecond

func orWorker(err error) string {
	if err != nil {
		return err.Error()
	}
	return "it is a worker now"
}

// Close closes all connections that are open.
func (p *Peer) Close() {
	p.mu.Lock()
	all := make([]*Conn, 0, len(p.conns))
	for c := range p.conns {
		all = append(all, c)
	}
	p.mu.Unlock()
	for _, c := range all {
		c.Close()
	}
}

// Conns is one share of a listener.
type Conns struct {
	addr   net.Addr
	ch     chan net.Conn
	done   chan struct{} // the whole listener ended
	once   sync.Once
	closed chan struct{} // this share was closed
}

func (l *Conns) give(c net.Conn) {
	t := time.NewTimer(acceptWait)
	defer t.Stop()
	select {
	case l.ch <- c:
		return
	case <-l.done:
	case <-l.closed:
	case <-t.C:
	}
	c.Close()
}

// Accept implements net.Listener. The connections are of type *Conn.
func (l *Conns) Accept() (net.Conn, error) {
	select {
	case c := <-l.ch:
		return c, nil
	case <-l.done:
	case <-l.closed:
	}
	return nil, &net.OpError{Op: "accept", Net: "tcp", Addr: l.addr, Err: net.ErrClosed}
}

// Close implements net.Listener.
func (l *Conns) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

// Addr implements net.Listener.
func (l *Conns) Addr() net.Addr { return l.addr }

// Borrow returns a listener on the same connections that can be closed by
// itself: raft closes its listener, and a node may become a manager again.
func (l *Conns) Borrow() net.Listener {
	return &Conns{addr: l.addr, ch: l.ch, done: l.done, closed: make(chan struct{})}
}

// Redial closes the connections that this node made: by them others know it as
// what its certificate said at the time.
func (p *Peer) Redial() {
	p.mu.Lock()
	var all []*Conn
	for c := range p.conns {
		if !c.accepted {
			all = append(all, c)
		}
	}
	p.mu.Unlock()
	for _, c := range all {
		c.Close()
	}
}
