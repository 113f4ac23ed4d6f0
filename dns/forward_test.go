package dns

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	mdns "github.com/miekg/dns"
)

// resolver is an upstream on loopback that counts what it is asked.
type resolver struct {
	addr     netip.AddrPort
	udp, tcp atomic.Int64
	mu       sync.Mutex
	names    []string // as spelt
}

// asked are the names that it was asked for, as spelt.
func (r *resolver) asked() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.names)
}

// upstream starts a resolver that answers by fn; nil: not at all.
func upstream(t testing.TB, fn func(w mdns.ResponseWriter, r *mdns.Msg)) *resolver {
	t.Helper()
	return upstreamAt(t, "127.0.0.1", fn)
}

func upstreamAt(t testing.TB, host string, fn func(w mdns.ResponseWriter, r *mdns.Msg)) *resolver {
	t.Helper()
	pc, ln := socketsAt(t, host)
	u := &resolver{addr: netip.MustParseAddrPort(pc.LocalAddr().String())}
	h := mdns.HandlerFunc(func(w mdns.ResponseWriter, r *mdns.Msg) {
		if _, ok := w.RemoteAddr().(*net.UDPAddr); ok {
			u.udp.Add(1)
		} else {
			u.tcp.Add(1)
		}
		u.mu.Lock()
		u.names = append(u.names, r.Question[0].Name)
		u.mu.Unlock()
		if fn != nil {
			fn(w, r)
		}
	})
	var wg sync.WaitGroup
	for _, srv := range []*mdns.Server{{PacketConn: pc, Handler: h}, {Listener: ln, Handler: h}} {
		started := make(chan struct{})
		srv.NotifyStartedFunc = func() { close(started) }
		wg.Go(func() { _ = srv.ActivateAndServe() })
		<-started
		t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			defer cancel()
			_ = srv.ShutdownContext(ctx)
		})
	}
	t.Cleanup(func() { pc.Close(); ln.Close() })
	return u
}

// says answers every A question with an address.
func says(addr string, ttl uint32) func(mdns.ResponseWriter, *mdns.Msg) {
	return func(w mdns.ResponseWriter, r *mdns.Msg) {
		m := new(mdns.Msg).SetReply(r)
		m.Answer = []mdns.RR{&mdns.A{Hdr: mdns.RR_Header{Name: r.Question[0].Name, Rrtype: mdns.TypeA, Class: mdns.ClassINET, Ttl: ttl}, A: net.ParseIP(addr)}}
		_ = w.WriteMsg(m)
	}
}

func fails(rcode int) func(mdns.ResponseWriter, *mdns.Msg) {
	return func(w mdns.ResponseWriter, r *mdns.Msg) {
		_ = w.WriteMsg(new(mdns.Msg).SetRcode(r, rcode))
	}
}

// by makes a Config that forwards to resolvers.
func by(rs ...*resolver) Config {
	var out []netip.AddrPort
	for _, r := range rs {
		out = append(out, r.addr)
	}
	return Config{Upstreams: func() []netip.AddrPort { return out }}
}

func TestForwardsAndCaches(t *testing.T) {
	u := upstream(t, says("192.0.2.1", 300))
	_, addr := serving(t, by(u), both)
	for i, network := range []string{"udp", "tcp", "udp"} {
		name := []string{"example.com", "EXAMPLE.com", "example.COM"}[i]
		r := ask(t, addr, network, name, mdns.TypeA)
		if describe(r) != "NOERROR 192.0.2.1" || r.Answer[0].Header().Name != name+"." || r.Question[0].Name != name+"." {
			t.Errorf("%s by %s: %v", name, network, r)
		}
		if ttl := r.Answer[0].Header().Ttl; ttl > 300 || ttl < 250 {
			t.Errorf("TTL %d", ttl)
		}
		if r.Authoritative {
			t.Error("a forwarded answer says that it is authoritative")
		}
	}
	if n := u.udp.Load() + u.tcp.Load(); n != 1 {
		t.Errorf("the resolver was asked %d times, want 1", n)
	}
	// Another type, DO or CD is another question.
	ask(t, addr, "udp", "example.com", mdns.TypeAAAA)
	ask(t, addr, "udp", "example.com", mdns.TypeA, func(m *mdns.Msg) { m.SetEdns0(1232, true) })
	ask(t, addr, "udp", "example.com", mdns.TypeA, func(m *mdns.Msg) { m.CheckingDisabled = true })
	if n := u.udp.Load(); n != 4 {
		t.Errorf("the resolver was asked %d times, want 4", n)
	}
}

// TestATTLOfZeroIsNotKept: nor is one with its first bit set, which counts as
// zero (RFC 2181 section 8).
func TestATTLOfZeroIsNotKept(t *testing.T) {
	for _, ttl := range []uint32{0, 1 << 31} {
		u := upstream(t, says("192.0.2.1", ttl))
		_, addr := serving(t, by(u), both)
		ask(t, addr, "udp", "example.com", mdns.TypeA)
		ask(t, addr, "udp", "example.com", mdns.TypeA)
		if n := u.udp.Load(); n != 2 {
			t.Errorf("TTL %d: asked %d times, want 2", ttl, n)
		}
	}
}

// TestAResolverWithoutEDNS: such as some small routers have.
func TestAResolverWithoutEDNS(t *testing.T) {
	for _, tc := range []struct{ rcode, questions int }{{mdns.RcodeFormatError, 1}, {mdns.RcodeFormatError, 0}, {mdns.RcodeNotImplemented, 1}} {
		u := upstream(t, func(w mdns.ResponseWriter, r *mdns.Msg) {
			if r.IsEdns0() != nil {
				m := new(mdns.Msg).SetRcode(r, tc.rcode)
				m.Question = m.Question[:tc.questions]
				_ = w.WriteMsg(m)
				return
			}
			says("192.0.2.1", 300)(w, r)
		})
		_, addr := serving(t, by(u), both)
		for _, name := range []string{"a.example", "b.example"} {
			if r := ask(t, addr, "udp", name, mdns.TypeA, func(m *mdns.Msg) { m.SetEdns0(1232, false) }); describe(r) != "NOERROR 192.0.2.1" || r.IsEdns0() == nil {
				t.Errorf("%+v: %v", tc, r)
			}
		}
		// The second without EDNS0 at once.
		if n := u.udp.Load(); n != 3 {
			t.Errorf("%+v: asked %d times, want 3", tc, n)
		}
	}
	// One that rejects the question itself is not asked for ever.
	u := upstream(t, fails(mdns.RcodeFormatError))
	_, addr := serving(t, by(u), both)
	if r := ask(t, addr, "udp", "a.example", mdns.TypeA); r.Rcode != mdns.RcodeFormatError || u.udp.Load() != 2 {
		t.Errorf("asked %d times: %v", u.udp.Load(), r)
	}
}

func TestADIsForWhoAsksForIt(t *testing.T) {
	u := upstream(t, func(w mdns.ResponseWriter, r *mdns.Msg) {
		m := new(mdns.Msg).SetReply(r)
		m.AuthenticatedData = r.AuthenticatedData
		m.Answer = []mdns.RR{addressRR(r.Question[0].Name, ip("192.0.2.1"), mdns.TypeA)}
		_ = w.WriteMsg(m)
	})
	_, addr := serving(t, by(u), both)
	for _, want := range []bool{false, true} {
		if r := ask(t, addr, "udp", "example.com", mdns.TypeA, func(m *mdns.Msg) { m.AuthenticatedData = want }); r.AuthenticatedData != want {
			t.Errorf("asked with AD %t, got %t", want, r.AuthenticatedData)
		}
	}
}

// TestWhatIsNoAnswerIsNotPassedOn: records of other names, and what was between
// the resolver and us.
func TestWhatIsNoAnswerIsNotPassedOn(t *testing.T) {
	u := upstream(t, func(w mdns.ResponseWriter, r *mdns.Msg) {
		m := new(mdns.Msg).SetReply(r)
		cname := func(from, to string) mdns.RR {
			return &mdns.CNAME{Hdr: mdns.RR_Header{Name: from, Rrtype: mdns.TypeCNAME, Class: 1, Ttl: 60}, Target: to}
		}
		m.Answer = []mdns.RR{
			addressRR("evil.example.", ip("203.0.113.1"), mdns.TypeA),
			cname("b.example.", "C.example."), cname(r.Question[0].Name, "b.example."), // out of order
			addressRR("web.", ip("203.0.113.2"), mdns.TypeA),
		}
		for i := range 60 { // more than fits
			m.Answer = append(m.Answer, addressRR("c.example.", netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}), mdns.TypeA))
		}
		m.Extra = []mdns.RR{addressRR("web.", ip("203.0.113.3"), mdns.TypeA),
			&mdns.TSIG{Hdr: mdns.RR_Header{Name: "key.", Rrtype: mdns.TypeTSIG, Class: mdns.ClassANY}, Algorithm: mdns.HmacSHA256, MACSize: 0, TimeSigned: 1}}
		b, err := m.Pack()
		if err != nil {
			t.Error(err)
		}
		_, _ = w.Write(b)
	})
	_, addr := serving(t, by(u), both)
	r := ask(t, addr, "tcp", "a.example", mdns.TypeA)
	if got := describe(r); strings.Contains(got, "203.0.113") || strings.Contains(got, "TSIG") || len(r.Answer) != 62 {
		t.Errorf("%d records: %s", len(r.Answer), got)
	}
	if r := ask(t, addr, "udp", "a.example", mdns.TypeA); !r.Truncated || len(r.Answer) < 10 {
		t.Errorf("by UDP: %v", r)
	}
}

// TestCutShortIsBetterThanNothing: the resolver's TCP hangs.
func TestCutShortIsBetterThanNothing(t *testing.T) {
	u := upstream(t, func(w mdns.ResponseWriter, r *mdns.Msg) {
		if _, ok := w.RemoteAddr().(*net.UDPAddr); ok {
			m := new(mdns.Msg).SetReply(r)
			m.Truncated = true
			m.Answer = []mdns.RR{addressRR(r.Question[0].Name, ip("192.0.2.1"), mdns.TypeA)}
			_ = w.WriteMsg(m)
		}
	})
	_, addr := serving(t, by(u), both)
	if r := ask(t, addr, "udp", "big.example", mdns.TypeA); !r.Truncated || describe(r) != "NOERROR 192.0.2.1" {
		t.Errorf("%v", r)
	}
}

func TestNegativeAnswersAreKeptAsTheSOASays(t *testing.T) {
	negativeAnswer := func(rcode int, withSOA bool) func(mdns.ResponseWriter, *mdns.Msg) {
		return func(w mdns.ResponseWriter, r *mdns.Msg) {
			m := new(mdns.Msg).SetRcode(r, rcode)
			if withSOA {
				m.Ns = []mdns.RR{&mdns.SOA{Hdr: mdns.RR_Header{Name: "com.", Rrtype: mdns.TypeSOA, Class: 1, Ttl: 900}, Ns: "a.", Mbox: "b.", Minttl: 60}}
			}
			_ = w.WriteMsg(m)
		}
	}
	for _, tc := range []struct {
		rcode int
		soa   bool
		asked int64
	}{{mdns.RcodeNameError, true, 1}, {mdns.RcodeSuccess, true, 1}, {mdns.RcodeNameError, false, 2}, {mdns.RcodeServerFailure, false, 2}} {
		u := upstream(t, negativeAnswer(tc.rcode, tc.soa))
		_, addr := serving(t, by(u), both)
		for range 2 {
			r := ask(t, addr, "udp", "example.com", mdns.TypeA)
			if r.Rcode != tc.rcode {
				t.Errorf("%+v: %v", tc, r)
			}
			// What is told may be kept by others: as long as it is kept here.
			for _, rr := range r.Ns {
				if ttl := rr.Header().Ttl; ttl > 60 {
					t.Errorf("%+v: the SOA record is good for %d s", tc, ttl)
				}
			}
		}
		if n := u.udp.Load(); n != tc.asked {
			t.Errorf("%+v: asked %d times", tc, n)
		}
	}
}

// TestADeadResolverCostsLittle: the second is asked long before the 5 s of a
// stub resolver, and from then on first.
func TestADeadResolverCostsLittle(t *testing.T) {
	for name, dead := range map[string]*resolver{
		"silent":   upstream(t, nil),
		"refusing": {addr: closedPort(t)},
		"failing":  upstream(t, fails(mdns.RcodeServerFailure)),
		"refused":  upstream(t, fails(mdns.RcodeRefused)),
	} {
		live := upstream(t, says("192.0.2.2", 300))
		_, addr := serving(t, by(dead, live), both)
		start := time.Now()
		for i := range 5 {
			if r := ask(t, addr, "udp", fmt.Sprintf("n%d.example.com", i), mdns.TypeA); describe(r) != "NOERROR 192.0.2.2" {
				t.Errorf("%s: %v", name, r)
			}
		}
		// Each alone would take 4.5 s.
		if took := time.Since(start); took > 4*time.Second {
			t.Errorf("%s: five questions took %s", name, took)
		}
	}
}

// TestResolversOverIPv6: one where nobody listens, then one that answers, by
// TCP, too.
func TestResolversOverIPv6(t *testing.T) {
	pc, ln := socketsAt(t, "::1")
	closed := &resolver{addr: netip.MustParseAddrPort(pc.LocalAddr().String())}
	pc.Close()
	ln.Close()
	live := upstreamAt(t, "::1", func(w mdns.ResponseWriter, r *mdns.Msg) {
		if _, ok := w.RemoteAddr().(*net.UDPAddr); ok {
			m := new(mdns.Msg).SetReply(r)
			m.Truncated = true
			_ = w.WriteMsg(m)
			return
		}
		says("192.0.2.6", 300)(w, r)
	})
	_, addr := serving(t, by(closed, live), both)
	if r := ask(t, addr, "udp", "example.com", mdns.TypeA); describe(r) != "NOERROR 192.0.2.6" || live.tcp.Load() != 1 {
		t.Errorf("%d times by TCP: %v", live.tcp.Load(), r)
	}
}

func closedPort(t testing.TB) netip.AddrPort {
	pc, ln := sockets(t)
	defer pc.Close()
	defer ln.Close()
	return netip.MustParseAddrPort(pc.LocalAddr().String())
}

func TestNobodyAnswers(t *testing.T) {
	_, addr := serving(t, by(&resolver{addr: closedPort(t)}, &resolver{addr: closedPort(t)}), both)
	start := time.Now()
	if r := ask(t, addr, "udp", "example.com", mdns.TypeA); r.Rcode != mdns.RcodeServerFailure {
		t.Errorf("%v", r)
	}
	if took := time.Since(start); took > 3*time.Second {
		t.Errorf("refused by all, answered after %s", took)
	}
}

func TestNothingOfOursLeaks(t *testing.T) {
	u := upstream(t, says("192.0.2.66", 300))
	s, addr := serving(t, by(u), both)
	s.SetZone(NewZone(sample(), ZoneOptions{}))
	for _, name := range []string{"web", "web.app", "tasks.web", "empty", "c1", "database", "x.shoal", "web.nosuch.shoal", "shoal", "x.shoal.internal",
		"200.1.0.10.in-addr.arpa", "11.3.0.10.in-addr.arpa", "_1._tcp.web", "WEB.SHOAL", "_nosuch._tcp.web", "_http._nosuch.web.shoal", "_tcp.web", "web.3", "web.9", "web.9.app",
		"web.9.node2", "c1.node2", "c1.node3.example.com", "c1.node2.app", "tasks.c1", "tasks.c1.app", "localhost", "a.localhost", "11.0.0.127.in-addr.arpa"} {
		for _, qtype := range []uint16{mdns.TypeA, mdns.TypeAAAA, mdns.TypeMX, mdns.TypeANY, mdns.TypePTR, mdns.TypeSRV, mdns.TypeSOA, mdns.TypeNS, mdns.TypeDS} {
			ask(t, addr, "udp", name, qtype)
		}
	}
	if u.udp.Load() != 0 {
		t.Errorf("leaked: %v", u.asked())
	}
	ask(t, addr, "udp", "nosuch", mdns.TypeA)
	if u.udp.Load() != 1 {
		t.Error("a name that nobody has was not forwarded")
	}
	// A service may be called like a top-level domain, a network, too.
	for i, name := range []string{"host.web", "nosuch.app", "secret.other", "8.8.8.8", "9.nosuch", "_sip._tcp.example.com", "nosuch.node2"} {
		ask(t, addr, "udp", name, mdns.TypeA)
		if u.udp.Load() != int64(i+2) {
			t.Errorf("%s was not forwarded", name)
		}
	}
	// What may be a name of a network that is not known yet is for nobody else.
	late := serve(t, s, func() *Asker { return &Asker{Networks: []string{"netA", "netZ"}} })
	n := u.udp.Load()
	if r := ask(t, late, "udp", "coming", mdns.TypeA); r.Rcode != mdns.RcodeServerFailure || u.udp.Load() != n {
		t.Errorf("with a network to come: %v, forwarded %d", r, u.udp.Load()-n)
	}
	if r := ask(t, late, "udp", "web", mdns.TypeA); describe(r) != "NOERROR 10.0.1.100" {
		t.Errorf("with a network to come: %v", r)
	}
}

func TestInternalAndNDots(t *testing.T) {
	u := upstream(t, says("192.0.2.66", 300))
	own := upstream(t, says("192.0.2.77", 300))
	s := NewServer(by(u))
	defer s.Close()
	s.SetZone(NewZone(sample(), ZoneOptions{}))
	internal := serve(t, s, func() *Asker { return &Asker{Networks: []string{"netA"}, NoForward: true} })
	if r := ask(t, internal, "udp", "example.com", mdns.TypeA); r.Rcode != mdns.RcodeNameError {
		t.Errorf("internal: %v", r)
	}
	if r := ask(t, internal, "udp", "web", mdns.TypeA); describe(r) != "NOERROR 10.0.1.100" {
		t.Errorf("internal: %v", r)
	}
	ndots := serve(t, s, func() *Asker { return &Asker{Networks: []string{"netA"}, NDots: true} })
	if r := ask(t, ndots, "udp", "nosuch", mdns.TypeA); r.Rcode != mdns.RcodeNameError {
		t.Errorf("ndots: %v", r)
	}
	if u.udp.Load() != 0 {
		t.Errorf("forwarded: %v", u.asked())
	}
	mine := serve(t, s, func() *Asker {
		return &Asker{Networks: []string{"netA"}, NoForward: true, Upstreams: []netip.AddrPort{own.addr}, Netns: "x"}
	})
	if r := ask(t, mine, "udp", "example.com", mdns.TypeA); describe(r) != "NOERROR 192.0.2.77" || u.udp.Load() != 0 {
		t.Errorf("own resolver: %v", r)
	}
	// Another's answers are not in its cache.
	theirs := serve(t, s, func() *Asker { return &Asker{} })
	if r := ask(t, theirs, "udp", "example.com", mdns.TypeA); describe(r) != "NOERROR 192.0.2.66" {
		t.Errorf("node's resolver: %v", r)
	}
}

func TestTheNamespaceOfOwnResolversIsUsed(t *testing.T) {
	u := upstream(t, says("192.0.2.66", 300))
	cfg := by(u)
	var seen atomic.Value
	cfg.Dial = func(ctx context.Context, netns, network string, to netip.AddrPort) (net.Conn, error) {
		seen.Store(netns)
		var d net.Dialer
		return d.DialContext(ctx, network, to.String())
	}
	_, addr := serving(t, cfg, &Asker{Upstreams: []netip.AddrPort{u.addr}, Netns: "task7"})
	ask(t, addr, "udp", "example.com", mdns.TypeA)
	if seen.Load() != "task7" {
		t.Errorf("dialled in %v", seen.Load())
	}
}

func TestForgedAnswers(t *testing.T) {
	forge := func(change func(m *mdns.Msg)) func(mdns.ResponseWriter, *mdns.Msg) {
		return func(w mdns.ResponseWriter, r *mdns.Msg) {
			if _, ok := w.RemoteAddr().(*net.UDPAddr); ok {
				m := new(mdns.Msg).SetReply(r)
				m.Answer = []mdns.RR{addressRR(r.Question[0].Name, ip("203.0.113.66"), mdns.TypeA)}
				change(m)
				for range maxForged {
					_ = w.WriteMsg(m)
				}
				return
			}
			says("192.0.2.1", 300)(w, r)
		}
	}
	for name, change := range map[string]func(*mdns.Msg){
		"another ID":   func(m *mdns.Msg) { m.Id++ },
		"another name": func(m *mdns.Msg) { m.Question[0].Name = "evil." + m.Question[0].Name },
		"another type": func(m *mdns.Msg) { m.Question[0].Qtype = mdns.TypeTXT },
		"another case": func(m *mdns.Msg) { m.Question[0].Name = flip(m.Question[0].Name) },
		"a question":   func(m *mdns.Msg) { m.Response = false },
	} {
		u := upstream(t, forge(change))
		_, addr := serving(t, by(u), both)
		if r := ask(t, addr, "udp", "example.com", mdns.TypeA); describe(r) != "NOERROR 192.0.2.1" {
			t.Errorf("%s: %v", name, r)
		}
		if u.tcp.Load() != 1 {
			t.Errorf("%s: asked %d times by TCP", name, u.tcp.Load())
		}
	}
}

func flip(s string) string {
	return strings.Map(func(r rune) rune {
		if r|0x20 >= 'a' && r|0x20 <= 'z' {
			return r ^ 0x20
		}
		return r
	}, s)
}

func TestIDsAndCaseAreRandom(t *testing.T) {
	ids := map[uint16]bool{}
	var mu sync.Mutex
	u := upstream(t, func(w mdns.ResponseWriter, r *mdns.Msg) {
		mu.Lock()
		ids[r.Id] = true
		mu.Unlock()
		says("192.0.2.1", 0)(w, r)
	})
	_, addr := serving(t, by(u), both)
	for range 50 {
		ask(t, addr, "udp", "abcdefghijklmnop.example", mdns.TypeA)
	}
	spelt := map[string]bool{}
	for _, n := range u.asked() {
		spelt[n] = true
	}
	mu.Lock()
	defer mu.Unlock()
	if len(ids) < 45 || len(spelt) < 45 {
		t.Errorf("50 questions with %d IDs and %d spellings", len(ids), len(spelt))
	}
}

func TestTruncatedIsAskedByTCP(t *testing.T) {
	u := upstream(t, func(w mdns.ResponseWriter, r *mdns.Msg) {
		if _, ok := w.RemoteAddr().(*net.UDPAddr); ok {
			m := new(mdns.Msg).SetReply(r)
			m.Truncated = true
			_ = w.WriteMsg(m)
			return
		}
		m := new(mdns.Msg).SetReply(r)
		for i := range 200 {
			m.Answer = append(m.Answer, &mdns.A{Hdr: mdns.RR_Header{Name: r.Question[0].Name, Rrtype: mdns.TypeA, Class: 1, Ttl: 60}, A: net.IPv4(192, 0, 2, byte(i))})
		}
		_ = w.WriteMsg(m)
	})
	_, addr := serving(t, by(u), both)
	if r := ask(t, addr, "tcp", "big.example", mdns.TypeA); len(r.Answer) != 200 {
		t.Errorf("%d answers", len(r.Answer))
	}
	r := ask(t, addr, "udp", "big.example", mdns.TypeA)
	if !r.Truncated || len(r.Answer) == 0 {
		t.Errorf("by UDP: truncated %t, %d answers", r.Truncated, len(r.Answer))
	}
	if u.tcp.Load() != 1 {
		t.Errorf("asked %d times by TCP", u.tcp.Load())
	}
}

// TestThousandsAtOnce: questions for one name are one question, those for many
// are in parallel.
func TestThousandsAtOnce(t *testing.T) {
	release := make(chan struct{})
	u := upstream(t, func(w mdns.ResponseWriter, r *mdns.Msg) {
		<-release
		says("192.0.2.1", 300)(w, r)
	})
	s := NewServer(by(u))
	defer s.Close()
	const n = 2000
	var wg sync.WaitGroup
	var good atomic.Int64
	for i := range n {
		wg.Go(func() {
			name := "same.example."
			if i%2 == 0 {
				name = fmt.Sprintf("n%d.example.", i%400)
			}
			req := new(mdns.Msg).SetQuestion(name, mdns.TypeA)
			_, up := s.answer(both, req, mdns.RcodeSuccess)
			if r, _ := s.forward.answer(context.Background(), up, req); describe(r) == "NOERROR 192.0.2.1" && r.Id == req.Id {
				good.Add(1)
			}
		})
	}
	close(release)
	wg.Wait()
	if good.Load() != n {
		t.Errorf("%d of %d answered", good.Load(), n)
	}
	same := 0
	for _, name := range u.asked() {
		if strings.EqualFold(name, "same.example.") {
			same++
		}
	}
	// Once, and again only what a busy machine made it resend.
	if same > 3 {
		t.Errorf("one name was asked for %d times", same)
	}
}

func TestStaleAnswersOnlyIfAsked(t *testing.T) {
	for _, stale := range []time.Duration{0, time.Hour} {
		var dead atomic.Bool
		u := upstream(t, func(w mdns.ResponseWriter, r *mdns.Msg) {
			if dead.Load() {
				fails(mdns.RcodeServerFailure)(w, r)
				return
			}
			says("192.0.2.1", 300)(w, r)
		})
		cfg := by(u)
		cfg.Stale = stale
		s, addr := serving(t, cfg, both)
		ask(t, addr, "udp", "example.com", mdns.TypeA)
		for _, k := range s.forward.cache.Keys() {
			c, _ := s.forward.cache.Peek(k)
			old := *c
			old.expires = time.Now().Add(-time.Second)
			s.forward.cache.Add(k, &old)
		}
		dead.Store(true)
		want := "SERVFAIL"
		if stale > 0 {
			want = "NOERROR 192.0.2.1"
		}
		for range 2 {
			if r := ask(t, addr, "udp", "example.com", mdns.TypeA); describe(r) != want || stale > 0 && r.Answer[0].Header().Ttl != staleTTL {
				t.Errorf("stale %s: %v", stale, r)
			}
		}
		// Having failed, it is not asked again for a while where there is an answer.
		asked := int64(3)
		if stale > 0 {
			asked = 2
		}
		if n := u.udp.Load(); n != asked {
			t.Errorf("stale %s: asked %d times, want %d", stale, n, asked)
		}
		// No longer than was asked for.
		for _, k := range s.forward.cache.Keys() {
			c, _ := s.forward.cache.Peek(k)
			old := *c
			old.expires = time.Now().Add(-stale - time.Second)
			s.forward.cache.Add(k, &old)
		}
		if r := ask(t, addr, "udp", "example.com", mdns.TypeA); r.Rcode != mdns.RcodeServerFailure {
			t.Errorf("stale %s, too old: %v", stale, r)
		}
	}
}

// TestAStaleAnswerIsNotWaitedFor: it comes before the end of the question.
func TestAStaleAnswerIsNotWaitedFor(t *testing.T) {
	var dead atomic.Bool
	u := upstream(t, func(w mdns.ResponseWriter, r *mdns.Msg) {
		if !dead.Load() {
			says("192.0.2.1", 300)(w, r)
		}
	})
	cfg := by(u)
	cfg.Stale = time.Hour
	s, addr := serving(t, cfg, both)
	ask(t, addr, "udp", "example.com", mdns.TypeA)
	for _, k := range s.forward.cache.Keys() {
		c, _ := s.forward.cache.Peek(k)
		old := *c
		old.expires = time.Now().Add(-time.Second)
		s.forward.cache.Add(k, &old)
	}
	dead.Store(true)
	m := new(mdns.Msg).SetQuestion("example.com.", mdns.TypeA)
	c := mdns.Client{Timeout: forwardTimeout - time.Second}
	if r, _, err := c.Exchange(m, addr); err != nil || describe(r) != "NOERROR 192.0.2.1" {
		t.Errorf("%v, %v", r, err)
	}
}

func TestUpstreamsFollowsTheFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "resolv.conf")
	if got := Upstreams(path)(); got != nil {
		t.Errorf("absent: %v", got)
	}
	write := func(s string) {
		if err := os.WriteFile(path, []byte(s), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("# x\nnameserver 192.0.2.1\nnameserver bad\nsearch a\nnameserver 2001:db8::1\nnameserver 192.0.2.1\n;nameserver 192.0.2.3\n")
	up := Upstreams(path)
	if got := fmt.Sprint(up()); got != "[192.0.2.1:53 [2001:db8::1]:53]" {
		t.Errorf("%s", got)
	}
	write("nameserver 192.0.2.9\n")
	for deadline := time.Now().Add(20 * time.Second); fmt.Sprint(up()) != "[192.0.2.9:53]"; {
		if time.Now().After(deadline) {
			t.Fatalf("the new file is not seen: %v", up())
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// FuzzResolver: nothing that a resolver sends makes the server fail.
func FuzzResolver(f *testing.F) {
	m := new(mdns.Msg).SetQuestion("example.com.", mdns.TypeA)
	m.Response = true
	m.Answer = []mdns.RR{addressRR("example.com.", ip("192.0.2.1"), mdns.TypeA)}
	b, _ := m.Pack()
	f.Add(b)
	f.Add(b[:20])
	f.Add([]byte{})
	fw := newForwarder(Config{})
	fw.metrics = newMetrics(&Server{forward: fw})
	f.Cleanup(fw.close)
	f.Fuzz(func(t *testing.T, b []byte) {
		client, server := net.Pipe()
		defer server.Close()
		fw.cfg.Dial = func(context.Context, string, string, netip.AddrPort) (net.Conn, error) { return client, nil }
		go func() {
			buf := make([]byte, 512)
			n, err := server.Read(buf)
			if err != nil || n < 2 {
				return
			}
			reply := append([]byte{}, b...)
			copy(reply, buf[:2]) // its ID, so that the rest is looked at
			_, _ = server.Write(reply)
			server.Close()
		}()
		got, err := fw.exchangeBy(context.Background(), "udp", serverKey{}, mdns.Question{Name: "example.com.", Qtype: mdns.TypeA, Qclass: 1}, flags{})
		if err == nil {
			c := &cached{msg: got, stored: time.Now()}
			_ = lifetime(got)
			req := new(mdns.Msg).SetQuestion("example.com.", mdns.TypeA)
			_ = pack(c.reply(req, time.Now(), 0), 512, make([]byte, maxUDP))
		}
	})
}
