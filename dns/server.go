package dns

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	mdns "github.com/miekg/dns"

	"github.com/shoalnet/shoal/spec"
)

// Limits of the server.
const (
	// TTL of answers from the Zone, in seconds: what an answer says may be
	// untrue a moment later, and asking again is cheap.
	TTL = 1
	// maxUDP is the largest answer sent by UDP, in bytes, however much more the
	// asker says it takes. It never crosses a link, so it needn't fit one.
	maxUDP = 4096
	// advertisedUDP is what the server says it takes (RFC 6891 section 6.2.5;
	// 1232 bytes is the value of DNS flag day 2020).
	advertisedUDP = 1232
	minUDP        = 512 // RFC 1035 section 4.2.1
	tcpIdle       = 10 * time.Second
	// tcpConns are the connections of a task at once. For another the one goes
	// that has been idle for longest (RFC 7766 section 6.2.3).
	tcpConns     = 1024
	tcpPipeline  = 64    // questions at once, per connection (RFC 7766 section 6.2.1.1)
	maxForwards  = 16384 // questions at once
	taskForwards = 8192  // of one task's
)

// Config is how a Server forwards.
type Config struct {
	// Upstreams are the resolvers of the node. It is called for each question
	// that is forwarded, and must be cheap; see [Upstreams].
	Upstreams func() []netip.AddrPort
	// Dial opens a connected socket in the namespace (name under
	// [spec.NetnsDir]) of a task that has resolvers of its own; netns is empty
	// for those of the node. nil: everything is dialled from here.
	Dial func(ctx context.Context, netns, network string, to netip.AddrPort) (net.Conn, error)
	// Stale is for how long after its end an answer may still be given when no
	// resolver answers (RFC 8767). 0: never.
	Stale time.Duration
	Log   *slog.Logger
}

// Server answers the questions of tasks.
type Server struct {
	cfg      Config
	zone     atomic.Pointer[Zone]
	ready    chan struct{} // closed with the first SetZone
	first    sync.Once
	forward  *forwarder
	forwards atomic.Int64 // questions being forwarded
	metrics  *metrics
	buffers  sync.Pool // *[]byte of maxUDP
}

// NewServer returns a Server, which must be closed. Questions wait for its first
// Zone: one who knows nothing yet must not say that there is nothing.
func NewServer(cfg Config) *Server {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Upstreams == nil {
		cfg.Upstreams = func() []netip.AddrPort { return nil }
	}
	if cfg.Dial == nil {
		cfg.Dial = func(ctx context.Context, _, network string, to netip.AddrPort) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, network, to.String())
		}
	}
	s := &Server{cfg: cfg, forward: newForwarder(cfg), ready: make(chan struct{})}
	s.metrics = newMetrics(s)
	s.forward.metrics = s.metrics
	s.buffers.New = func() any { b := make([]byte, maxUDP); return &b }
	s.zone.Store(emptyZone)
	return s
}

// Close ends what the Server does for all of its tasks: questions that are
// being forwarded. The sockets of Serve are closed by their contexts.
func (s *Server) Close() { s.forward.close() }

// SetZone makes z what the next question is answered from.
func (s *Server) SetZone(z *Zone) {
	s.zone.Store(z)
	s.first.Do(func() { close(s.ready) })
}

// Zone returns what questions are answered from.
func (s *Server) Zone() *Zone { return s.zone.Load() }

// Serve answers what comes in by pc (UDP) and ln (TCP), which it closes, until
// ctx ends. asker is called for each question, and must be cheap and never
// return nil.
func (s *Server) Serve(ctx context.Context, asker func() *Asker, pc net.PacketConn, ln net.Listener) error {
	udp, ok := pc.(*net.UDPConn)
	if !ok {
		pc.Close()
		ln.Close()
		return fmt.Errorf("name server: %T is not a UDP socket", pc)
	}
	defer udp.Close()
	fctx, give := context.WithCancel(context.WithoutCancel(ctx))
	defer give()
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	who := &asking{asker}
	defer wg.Wait()
	defer cancel()
	// At the end no further question is taken out of the socket, where the next server
	// will find it; one that was is answered: nobody will see it again.
	stop := context.AfterFunc(ctx, func() {
		_ = udp.SetReadDeadline(time.Unix(1, 0))
		ln.Close()
		time.AfterFunc(lastAnswers, give)
	})
	defer func() {
		if stop() { // the socket has failed
			ln.Close()
			give()
		}
	}()
	select {
	case <-s.ready:
	case <-ctx.Done():
		return nil
	}
	wg.Go(func() { s.serveTCP(ctx, who, ln) })
	return s.serveUDP(ctx, fctx, &wg, who, udp)
}

// lastAnswers is for how long the end of a server waits for other name servers' answers
// to what was asked before; then those who asked hear that there is none, and ask again.
const lastAnswers = 500 * time.Millisecond

// serveUDP takes questions until ctx ends; those that are forwarded go on until fctx does.
func (s *Server) serveUDP(ctx, fctx context.Context, wg *sync.WaitGroup, who *asking, udp *net.UDPConn) error {
	in := make([]byte, 65535)
	out := make([]byte, maxUDP)
	var quick scratch
	var mine atomic.Int64 // questions being forwarded
	for {
		n, from, err := udp.ReadFromUDPAddrPort(in)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			if errors.Is(err, net.ErrClosed) {
				return err
			}
			// An ICMP error for an answer to a program that has gone.
			continue
		}
		start := time.Now()
		if b := s.zone.Load().quick(who.asker(), in[:n], &quick); b != nil {
			_, _ = udp.WriteToUDPAddrPort(b, from)
			s.metrics.quick(in[:n], b, start)
			continue
		}
		req, rcode := parse(in[:n])
		if rcode == drop {
			s.metrics.dropped.Inc()
			continue
		}
		size := udpSize(req)
		resp, up := s.answer(who.asker(), req, rcode)
		if up == nil {
			if b := pack(resp, size, out); b != nil {
				_, _ = udp.WriteToUDPAddrPort(b, from)
			}
			s.metrics.replied(resp, fromCluster, start)
			continue
		}
		if s.forwards.Add(1) > maxForwards || mine.Add(1) > taskForwards {
			s.forwards.Add(-1)
			mine.Add(-1)
			resp := failure(req, mdns.RcodeServerFailure)
			if b := pack(resp, size, out); b != nil {
				_, _ = udp.WriteToUDPAddrPort(b, from)
			}
			s.metrics.replied(resp, fromCluster, start)
			continue
		}
		up.who = who
		wg.Go(func() {
			defer s.forwards.Add(-1)
			defer mine.Add(-1)
			buf := s.buffers.Get().(*[]byte)
			defer s.buffers.Put(buf)
			resp, source := s.forward.answer(fctx, up, req)
			s.metrics.replied(resp, source, start)
			if b := pack(resp, size, *buf); b != nil {
				_, _ = udp.WriteToUDPAddrPort(b, from)
			}
		})
	}
}

func (s *Server) serveTCP(ctx context.Context, who *asking, ln net.Listener) {
	var wg sync.WaitGroup
	defer wg.Wait()
	var open clients
	for ctx.Err() == nil {
		c, err := ln.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) || ctx.Err() != nil {
				return
			}
			s.cfg.Log.Debug("name server: accept", "error", err)
			select { // out of file descriptors, say
			case <-ctx.Done():
			case <-time.After(50 * time.Millisecond):
			}
			continue
		}
		cl := &client{Conn: c}
		if !open.add(cl) {
			c.Close()
			continue
		}
		wg.Go(func() {
			defer open.remove(cl)
			s.serveConn(ctx, who, cl)
		})
	}
}

// client is a TCP connection of a task's.
type client struct {
	net.Conn
	asked   atomic.Int64 // when its last question was complete, in Unix nanoseconds
	running atomic.Int32 // questions of it that are being forwarded
}

// clients are the TCP connections of a task.
type clients struct {
	mu   sync.Mutex
	open map[*client]bool
}

// add makes room for c by closing the connection that has been idle for
// longest, and returns false if all are at work.
func (cs *clients) add(c *client) bool {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if len(cs.open) >= tcpConns {
		var idle *client
		for o := range cs.open {
			if o.running.Load() == 0 && (idle == nil || o.asked.Load() < idle.asked.Load()) {
				idle = o
			}
		}
		if idle == nil {
			return false
		}
		idle.Close()
		delete(cs.open, idle)
	}
	if cs.open == nil {
		cs.open = map[*client]bool{}
	}
	c.asked.Store(time.Now().UnixNano())
	cs.open[c] = true
	return true
}

func (cs *clients) remove(c *client) {
	cs.mu.Lock()
	delete(cs.open, c)
	cs.mu.Unlock()
}

// serveConn answers the questions of one TCP connection, in the order that
// answers are known (RFC 7766 section 7).
func (s *Server) serveConn(ctx context.Context, who *asking, c *client) {
	var wg sync.WaitGroup
	defer c.Close()
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })()
	var mu sync.Mutex
	write := func(m *mdns.Msg) {
		m.Compress = true
		m.Truncate(mdns.MaxMsgSize)
		b, err := m.Pack()
		if err != nil {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		framed := append([]byte{byte(len(b) >> 8), byte(len(b))}, b...)
		if ctx.Err() == nil {
			_ = c.SetWriteDeadline(time.Now().Add(tcpIdle))
			if _, err := c.Write(framed); err != nil {
				cancel() // what comes after half an answer can't be read
			}
		}
	}
	running := make(chan struct{}, tcpPipeline)
	var head [2]byte
	for ctx.Err() == nil {
		_ = c.SetReadDeadline(time.Now().Add(tcpIdle))
		if ctx.Err() != nil {
			return
		}
		if _, err := io.ReadFull(c, head[:]); err != nil {
			// A client may shut its side down and still read its answers.
			break
		}
		b := make([]byte, int(head[0])<<8|int(head[1]))
		if _, err := io.ReadFull(c, b); err != nil {
			break
		}
		c.asked.Store(time.Now().UnixNano())
		start := time.Now()
		req, rcode := parse(b)
		if rcode == drop {
			s.metrics.dropped.Inc()
			break
		}
		resp, up := s.answer(who.asker(), req, rcode)
		if up == nil {
			write(resp)
			s.metrics.replied(resp, fromCluster, start)
			continue
		}
		select {
		case running <- struct{}{}:
		case <-ctx.Done():
			return
		}
		up.who = who
		s.forwards.Add(1)
		c.running.Add(1)
		wg.Go(func() {
			defer s.forwards.Add(-1)
			defer c.running.Add(-1)
			defer func() { <-running }()
			resp, source := s.forward.answer(ctx, up, req)
			s.metrics.replied(resp, source, start)
			write(resp)
		})
	}
	wg.Wait()
}

// drop, as an rcode: no answer at all.
const drop = -1

// parse reads a question, and says with which rcode to answer what can't be
// answered otherwise. What is no question of anyone is dropped: to answer an
// answer would make loops.
func parse(b []byte) (*mdns.Msg, int) {
	if len(b) < 12 || b[2]&0x80 != 0 {
		return nil, drop
	}
	req := new(mdns.Msg)
	opcode := int(b[2]>>3) & 0xf
	if err := req.Unpack(b); err != nil {
		// Only the header is sure.
		req = &mdns.Msg{MsgHdr: mdns.MsgHdr{Id: uint16(b[0])<<8 | uint16(b[1]), Opcode: opcode, RecursionDesired: b[2]&1 != 0}}
		if opcode != mdns.OpcodeQuery {
			return req, mdns.RcodeNotImplemented
		}
		return req, mdns.RcodeFormatError
	}
	if opcode != mdns.OpcodeQuery {
		return req, mdns.RcodeNotImplemented
	}
	if len(req.Question) != 1 || len(req.Answer) > 0 || len(req.Ns) > 0 {
		return req, mdns.RcodeFormatError
	}
	opts := 0
	for _, rr := range req.Extra {
		if o, ok := rr.(*mdns.OPT); ok {
			opts++
			if o.Hdr.Name != "." {
				return req, mdns.RcodeFormatError
			}
		}
	}
	switch q := req.Question[0]; {
	case opts > 1: // RFC 6891 section 6.1.1
		return req, mdns.RcodeFormatError
	case opts == 1 && req.IsEdns0().Version() != 0:
		return req, mdns.RcodeBadVers
	case q.Qclass != mdns.ClassINET:
		return req, mdns.RcodeRefused
	case q.Qtype == mdns.TypeAXFR || q.Qtype == mdns.TypeIXFR:
		return req, mdns.RcodeRefused
	case q.Qtype == mdns.TypeOPT || q.Qtype == mdns.TypeTSIG || q.Qtype == mdns.TypeTKEY || q.Qtype == mdns.TypeMAILA || q.Qtype == mdns.TypeMAILB || q.Qtype == 0:
		return req, mdns.RcodeFormatError
	}
	return req, mdns.RcodeSuccess
}

// udpSize is the largest answer that the asker takes by UDP, in bytes.
func udpSize(req *mdns.Msg) int {
	if o := req.IsEdns0(); o != nil {
		return min(max(int(o.UDPSize()), minUDP), maxUDP)
	}
	return minUDP
}

// pack encodes an answer into buf, cut to size with TC set if need be; nil if
// it can't be.
func pack(m *mdns.Msg, size int, buf []byte) []byte {
	m.Compress = true
	if len(m.Answer)+len(m.Ns)+len(m.Extra) > 8 {
		m.Truncate(size)
	}
	b, err := m.PackBuffer(buf[:maxUDP])
	if err != nil {
		return nil
	}
	if len(b) > size {
		m.Truncate(size)
		if b, err = m.PackBuffer(buf[:maxUDP]); err != nil || len(b) > size {
			return nil
		}
	}
	return b
}

// reply begins an answer to req, with EDNS0 where req has it.
func reply(req *mdns.Msg) *mdns.Msg {
	m := &mdns.Msg{MsgHdr: mdns.MsgHdr{Id: req.Id, Response: true, Opcode: req.Opcode, RecursionDesired: req.RecursionDesired,
		RecursionAvailable: true, CheckingDisabled: req.CheckingDisabled}}
	if len(req.Question) == 1 {
		m.Question = req.Question
	}
	if o := req.IsEdns0(); o != nil {
		m.SetEdns0(advertisedUDP, o.Do())
	}
	return m
}

// failure is an answer with nothing but an rcode.
func failure(req *mdns.Msg, rcode int) *mdns.Msg {
	m := reply(req)
	m.Rcode = rcode
	if o := m.IsEdns0(); o == nil && rcode == mdns.RcodeBadVers {
		m.SetEdns0(advertisedUDP, false)
	}
	return m
}

// answer answers from the Zone, or returns whom to ask.
func (s *Server) answer(a *Asker, req *mdns.Msg, rcode int) (*mdns.Msg, *upstreams) {
	if rcode != mdns.RcodeSuccess {
		return failure(req, rcode), nil
	}
	q := req.Question[0]
	name := strings.TrimSuffix(lower(q.Name), ".")
	m := reply(req)
	m.Authoritative = true
	if s.zone.Load().answer(a, name, q, m) {
		return m, nil
	}
	if single := name != "" && strings.IndexByte(name, '.') < 0; single {
		if a.NDots {
			return negative(m, mdns.RcodeNameError, "."), nil
		}
		// It may be a name of a network that is not known here yet: it is not for
		// others, and its absence is nothing to be remembered.
		if z := s.zone.Load(); slices.ContainsFunc(a.Networks, func(id string) bool { return z.networks[id] == nil }) {
			return failure(req, mdns.RcodeServerFailure), nil
		}
	}
	up := &upstreams{servers: a.Upstreams, netns: a.Netns}
	if len(up.servers) == 0 {
		up = &upstreams{servers: s.cfg.Upstreams()}
		if a.NoForward {
			return negative(m, mdns.RcodeNameError, "."), nil
		}
	}
	if len(up.servers) == 0 {
		return failure(req, mdns.RcodeServerFailure), nil
	}
	return nil, up
}

// answer fills m in with what the Zone says of a name, and returns false if it
// says nothing.
func (z *Zone) answer(a *Asker, name string, q mdns.Question, m *mdns.Msg) bool {
	if name == spec.HostName && a.Host.IsValid() {
		z.records(m, q, []target{{addrs: []netip.Addr{a.Host}}})
		return true
	}
	targets, exists := z.find(a, name, nil)
	if exists || len(targets) > 0 {
		z.records(m, q, targets)
		return true
	}
	if name != "" && name[0] == '_' {
		if port, base, ok := parseSRV(name); ok {
			if targets, exists := z.find(a, base, nil); exists {
				z.srv(m, q, port, targets)
				return true
			}
		}
	}
	if strings.HasSuffix(name, ".arpa") {
		if owner, ours := z.reverse(a, name); ours {
			switch {
			case owner == "":
				// An address that nobody has, or a point above the addresses.
				rcode := mdns.RcodeNameError
				if p, _ := parseReverse(name); !p.IsSingleIP() {
					rcode = mdns.RcodeSuccess
				}
				negative(m, rcode, q.Name)
			case q.Qtype == mdns.TypePTR || q.Qtype == mdns.TypeANY:
				m.Answer = append(m.Answer, &mdns.PTR{Hdr: header(q.Name, mdns.TypePTR), Ptr: owner})
			default:
				negative(m, mdns.RcodeSuccess, q.Name)
			}
			return true
		}
	}
	if inDomain(name) {
		z.domain(a, m, name, q)
		return true
	}
	if addrs, owner, ok := loopback(name); ok {
		switch {
		case owner == "":
			z.records(m, q, []target{{addrs: addrs}})
		case q.Qtype == mdns.TypePTR:
			m.Answer = append(m.Answer, &mdns.PTR{Hdr: header(q.Name, mdns.TypePTR), Ptr: owner})
		default:
			negative(m, mdns.RcodeSuccess, q.Name)
		}
		return true
	}
	if z.below(a, name) {
		rcode := mdns.RcodeNameError
		if isProtocol(name[:strings.IndexByte(name+".", '.')]) {
			rcode = mdns.RcodeSuccess // there are names below it
		}
		negative(m, rcode, q.Name)
		return true
	}
	return false
}

// domain answers for a name of the cluster's own domain that no target has.
func (z *Zone) domain(a *Asker, m *mdns.Msg, name string, q mdns.Question) {
	apex := name == Domain
	zone := Domain + "."
	if name != Domain && !strings.HasSuffix(name, "."+Domain) {
		zone = hostDomain + "."
	}
	base, _ := cutDomain(name)
	for _, id := range a.Networks {
		// NETWORK.shoal has names below it, so it exists (RFC 8020).
		if n := z.networks[id]; n != nil && n.name == base {
			negative(m, mdns.RcodeSuccess, Domain+".")
			return
		}
	}
	switch {
	case apex && q.Qtype == mdns.TypeSOA:
		m.Answer = append(m.Answer, soa(q.Name))
	case apex:
		negative(m, mdns.RcodeSuccess, zone)
	default:
		negative(m, mdns.RcodeNameError, zone)
	}
}

// records answers for a name that exists: with addresses of the type asked for,
// in random order, or with none.
func (z *Zone) records(m *mdns.Msg, q mdns.Question, targets []target) {
	switch q.Qtype {
	case mdns.TypeA, mdns.TypeAAAA:
		n := 0
		for _, t := range targets {
			n += len(t.addrs)
		}
		m.Answer = make([]mdns.RR, 0, n)
		for _, t := range targets {
			for _, ip := range t.addrs {
				if rr := addressRR(q.Name, ip, q.Qtype); rr != nil {
					m.Answer = append(m.Answer, rr)
				}
			}
		}
		rand.Shuffle(len(m.Answer), func(i, j int) { m.Answer[i], m.Answer[j] = m.Answer[j], m.Answer[i] })
	case mdns.TypeANY:
		// RFC 8482 section 4.2: a name may answer ANY with one small record.
		m.Answer = []mdns.RR{&mdns.HINFO{Hdr: header(q.Name, mdns.TypeHINFO), Cpu: "RFC8482"}}
	}
	if len(m.Answer) == 0 {
		negative(m, mdns.RcodeSuccess, q.Name)
	}
}

// srv answers for _PORT._PROTOCOL.NAME: the targets on that port, and
// their addresses (RFC 2782).
func (z *Zone) srv(m *mdns.Msg, q mdns.Question, port uint16, targets []target) {
	if q.Qtype != mdns.TypeSRV && q.Qtype != mdns.TypeANY {
		negative(m, mdns.RcodeSuccess, q.Name)
		return
	}
	rand.Shuffle(len(targets), func(i, j int) { targets[i], targets[j] = targets[j], targets[i] })
	for _, t := range targets {
		name := z.fqdn(t)
		m.Answer = append(m.Answer, &mdns.SRV{Hdr: header(q.Name, mdns.TypeSRV), Port: port, Target: name})
		for _, ip := range t.addrs {
			qtype := mdns.TypeA
			if !ip.Is4() {
				qtype = mdns.TypeAAAA
			}
			m.Extra = append(m.Extra, addressRR(name, ip, qtype))
		}
	}
	if len(m.Answer) == 0 {
		negative(m, mdns.RcodeSuccess, q.Name)
	}
}

func addressRR(name string, ip netip.Addr, qtype uint16) mdns.RR {
	switch {
	case !isOfType(ip, qtype):
		return nil
	case qtype == mdns.TypeA:
		return &mdns.A{Hdr: header(name, mdns.TypeA), A: ip.AsSlice()}
	default:
		return &mdns.AAAA{Hdr: header(name, mdns.TypeAAAA), AAAA: ip.AsSlice()}
	}
}

func header(name string, rrtype uint16) mdns.RR_Header {
	return mdns.RR_Header{Name: name, Rrtype: rrtype, Class: mdns.ClassINET, Ttl: TTL}
}

// negative makes m say that there is nothing, for as long as an answer of ours
// is good (RFC 2308 section 3: the SOA record carries it).
func negative(m *mdns.Msg, rcode int, zone string) *mdns.Msg {
	m.Rcode = rcode
	m.Ns = append(m.Ns, soa(zone))
	return m
}

func soa(zone string) *mdns.SOA {
	return &mdns.SOA{Hdr: header(zone, mdns.TypeSOA), Ns: "ns." + Domain + ".", Mbox: "hostmaster." + Domain + ".",
		Serial: 1, Refresh: 3600, Retry: 600, Expire: 86400, Minttl: TTL}
}
