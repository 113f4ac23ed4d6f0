package dns

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	mdns "github.com/miekg/dns"

	"github.com/shoalnet/shoal/spec"
)

// serving starts a Server for one asker on loopback.
func serving(t testing.TB, cfg Config, a *Asker) (*Server, string) {
	t.Helper()
	s := NewServer(cfg)
	s.SetZone(emptyZone)
	addr := serve(t, s, func() *Asker { return a })
	t.Cleanup(s.Close)
	return s, addr
}

func serve(t testing.TB, s *Server, asker func() *Asker) string {
	t.Helper()
	pc, ln := sockets(t)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, asker, pc, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return pc.LocalAddr().String()
}

// sockets are UDP and TCP on one port of loopback.
func sockets(t testing.TB) (net.PacketConn, net.Listener) {
	t.Helper()
	for range 20 {
		pc, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		ln, err := net.Listen("tcp", pc.LocalAddr().String())
		if err == nil {
			return pc, ln
		}
		pc.Close()
	}
	t.Fatal("no port is free for UDP and TCP")
	return nil, nil
}

func ask(t testing.TB, addr, network, name string, qtype uint16, change ...func(*mdns.Msg)) *mdns.Msg {
	t.Helper()
	m := new(mdns.Msg)
	m.SetQuestion(mdns.Fqdn(name), qtype)
	for _, fn := range change {
		fn(m)
	}
	c := mdns.Client{Net: network, Timeout: 10 * time.Second}
	r, _, err := c.Exchange(m, addr)
	if err != nil {
		t.Fatalf("%s %s by %s: %v", name, mdns.TypeToString[qtype], network, err)
	}
	return r
}

func TestAnswers(t *testing.T) {
	s, addr := serving(t, Config{}, &Asker{Networks: both.Networks, Host: ip("192.0.2.7")})
	s.SetZone(NewZone(sample(), ZoneOptions{}))
	for _, network := range []string{"udp", "tcp"} {
		for _, tc := range []struct {
			name  string
			qtype uint16
			want  string // rcode, answers sorted, then SOA's owner if any
		}{
			{"web", mdns.TypeA, "NOERROR 10.0.1.100"},
			{"wEb", mdns.TypeA, "NOERROR 10.0.1.100"},
			{"web", mdns.TypeAAAA, "NOERROR soa web."},
			{"web", mdns.TypeMX, "NOERROR soa web."},
			{"web", mdns.TypeHTTPS, "NOERROR soa web."},
			{"web", mdns.TypeTXT, "NOERROR soa web."},
			{"web", mdns.TypeANY, "NOERROR HINFO"},
			{"tasks.web", mdns.TypeA, "NOERROR 10.0.1.11 10.0.1.12"},
			{"empty", mdns.TypeA, "NOERROR soa empty."},
			{"nosuch.shoal", mdns.TypeA, "NXDOMAIN soa shoal."},
			{"secret.other.shoal", mdns.TypeA, "NXDOMAIN soa shoal."},
			{"nosuch.app.shoal", mdns.TypeA, "NXDOMAIN soa shoal."},
			{"app.shoal", mdns.TypeA, "NOERROR soa shoal."},
			{"shoal", mdns.TypeA, "NOERROR soa shoal."},
			{"shoal", mdns.TypeSOA, "NOERROR SOA"},
			{"host.shoal.internal", mdns.TypeA, "NOERROR 192.0.2.7"},
			{"nosuch.shoal.internal", mdns.TypeA, "NXDOMAIN soa shoal.internal."},
			{"nosuch", mdns.TypeA, "SERVFAIL"}, // nobody to ask
			{"100.1.0.10.in-addr.arpa", mdns.TypePTR, "NOERROR web.app.shoal."},
			{"100.1.0.10.in-addr.arpa", mdns.TypeA, "NOERROR soa 100.1.0.10.in-addr.arpa."},
			{"200.1.0.10.in-addr.arpa", mdns.TypePTR, "NXDOMAIN soa 200.1.0.10.in-addr.arpa."},
			{"_80._tcp.web", mdns.TypeSRV, "NOERROR 80 web.app.shoal. + 10.0.1.100"},
			{"_80._tcp.web.back", mdns.TypeSRV, "NOERROR 80 web.back.shoal. + 10.0.2.100"},
			{"_5._udp.tasks.web", mdns.TypeSRV, "NOERROR 5 web.1.t1aaaaaaaaaa.app.shoal. 5 web.2.t2aaaaaaaaaa.app.shoal. + 10.0.1.11 10.0.1.12"},
			{"_80._tcp.web", mdns.TypeA, "NOERROR soa _80._tcp.web."},
			{"_80._tcp.nosuch.shoal", mdns.TypeSRV, "NXDOMAIN soa shoal."},
			{"_nosuch._tcp.web", mdns.TypeSRV, "NXDOMAIN soa _nosuch._tcp.web."},
			{"_tcp.web", mdns.TypeSRV, "NOERROR soa _tcp.web."},
			{"web.9", mdns.TypeA, "NXDOMAIN soa web.9."},
			{"c1.node2", mdns.TypeA, "NXDOMAIN soa c1.node2."},
			{"localhost", mdns.TypeA, "NOERROR 127.0.0.1"},
			{"x.localhost", mdns.TypeA, "NOERROR 127.0.0.1"},
			{"localhost", mdns.TypeMX, "NOERROR soa localhost."},
			{"11.0.0.127.in-addr.arpa", mdns.TypePTR, "NOERROR localhost."},
		} {
			r := ask(t, addr, network, tc.name, tc.qtype)
			if got := describe(r); got != tc.want {
				t.Errorf("%s %s by %s: %q, want %q", tc.name, mdns.TypeToString[tc.qtype], network, got, tc.want)
			}
			if r.Rcode != mdns.RcodeServerFailure && !r.Authoritative || !r.RecursionAvailable {
				t.Errorf("%s: aa %t ra %t", tc.name, r.Authoritative, r.RecursionAvailable)
			}
			for _, rr := range slices.Concat(r.Answer, r.Ns, r.Extra) {
				if rr.Header().Ttl > 2 {
					t.Errorf("%s: TTL %d", tc.name, rr.Header().Ttl)
				}
			}
		}
	}
}

func describe(r *mdns.Msg) string {
	out := mdns.RcodeToString[r.Rcode]
	list := func(rrs []mdns.RR) (s []string) {
		for _, rr := range rrs {
			switch rr := rr.(type) {
			case *mdns.A:
				s = append(s, rr.A.String())
			case *mdns.PTR:
				s = append(s, rr.Ptr)
			case *mdns.SRV:
				s = append(s, fmt.Sprint(rr.Port, " ", rr.Target))
			case *mdns.OPT:
			default:
				s = append(s, mdns.TypeToString[rr.Header().Rrtype])
			}
		}
		slices.Sort(s)
		return s
	}
	for _, s := range list(r.Answer) {
		out += " " + s
	}
	for _, rr := range r.Ns {
		out += " soa " + rr.Header().Name
	}
	if x := list(r.Extra); len(x) > 0 {
		out += " + " + strings.Join(x, " ")
	}
	return out
}

func TestTheNameIsAsAsked(t *testing.T) {
	s, addr := serving(t, Config{}, both)
	s.SetZone(NewZone(sample(), ZoneOptions{}))
	r := ask(t, addr, "udp", "WeB", mdns.TypeA)
	if r.Question[0].Name != "WeB." || r.Answer[0].Header().Name != "WeB." {
		t.Errorf("asked for WeB., got %v", r)
	}
}

func TestAnswersComeInRandomOrder(t *testing.T) {
	s, addr := serving(t, Config{}, both)
	s.SetZone(NewZone(sample(), ZoneOptions{}))
	first := map[string]int{}
	for range 200 {
		first[ask(t, addr, "udp", "tasks.web", mdns.TypeA).Answer[0].(*mdns.A).A.String()]++
	}
	// By chance one of two is first in fewer than 40 of 200 once in 10^18.
	if len(first) != 2 || first["10.0.1.11"] < 40 || first["10.0.1.12"] < 40 {
		t.Errorf("first answers: %v", first)
	}
}

func many(n int) *spec.View {
	v := &spec.View{Networks: []spec.Network{{ID: "net", Name: "net", Subnets: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}},
		Services: []spec.Service{{ID: "s", Spec: spec.ServiceSpec{Name: "many", Networks: []spec.NetworkAttachment{{Network: "net"}}}}}}
	for i := range n {
		id := fmt.Sprintf("t%011d", i)
		v.Endpoints = append(v.Endpoints, spec.Endpoint{Task: id, TaskName: "many." + id, Service: "s", Slot: i + 1, Network: "net", Node: "n", State: spec.EndpointActive,
			Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)})}})
	}
	v.Sort()
	return v
}

func TestTruncation(t *testing.T) {
	s, addr := serving(t, Config{}, &Asker{Networks: []string{"net"}})
	s.SetZone(NewZone(many(500), ZoneOptions{}))
	raw := func(edns uint16) *mdns.Msg {
		m := new(mdns.Msg)
		m.SetQuestion("tasks.many.", mdns.TypeA)
		if edns > 0 {
			m.SetEdns0(edns, false)
		}
		b, _ := m.Pack()
		c, err := net.Dial("udp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(10 * time.Second))
		c.Write(b)
		buf := make([]byte, 65535)
		n, err := c.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		limit := max(int(edns), 512)
		if n > min(limit, maxUDP) {
			t.Errorf("EDNS %d: an answer of %d bytes", edns, n)
		}
		r := new(mdns.Msg)
		if err := r.Unpack(buf[:n]); err != nil {
			t.Fatal(err)
		}
		if (r.IsEdns0() != nil) != (edns > 0) {
			t.Errorf("EDNS %d: answered with OPT %v", edns, r.IsEdns0())
		}
		if !r.Truncated || len(r.Answer) == 0 {
			t.Errorf("EDNS %d: truncated %t with %d answers", edns, r.Truncated, len(r.Answer))
		}
		return r
	}
	small, large := raw(0), raw(4096)
	raw(100) // below the least that anyone takes
	raw(65535)
	if len(small.Answer) >= len(large.Answer) {
		t.Errorf("%d answers in 512 bytes, %d in 4096", len(small.Answer), len(large.Answer))
	}
	if r := ask(t, addr, "tcp", "tasks.many", mdns.TypeA); len(r.Answer) != 500 || r.Truncated {
		t.Errorf("by TCP: %d answers, truncated %t", len(r.Answer), r.Truncated)
	}
	s.SetZone(NewZone(many(20), ZoneOptions{}))
	if r := ask(t, addr, "udp", "tasks.many", mdns.TypeA); len(r.Answer) != 20 || r.Truncated {
		t.Errorf("20 replicas: %d answers, truncated %t", len(r.Answer), r.Truncated)
	}
}

func TestProtocolErrors(t *testing.T) {
	s, addr := serving(t, Config{}, both)
	s.SetZone(NewZone(sample(), ZoneOptions{}))
	for name, tc := range map[string]struct {
		change func(*mdns.Msg)
		rcode  int
	}{
		"two questions":  {func(m *mdns.Msg) { m.Question = append(m.Question, m.Question[0]) }, mdns.RcodeFormatError},
		"no question":    {func(m *mdns.Msg) { m.Question = nil }, mdns.RcodeFormatError},
		"an answer":      {func(m *mdns.Msg) { m.Answer = []mdns.RR{addressRR("x.", ip("10.0.0.1"), mdns.TypeA)} }, mdns.RcodeFormatError},
		"status":         {func(m *mdns.Msg) { m.Opcode = mdns.OpcodeStatus }, mdns.RcodeNotImplemented},
		"notify":         {func(m *mdns.Msg) { m.Opcode = mdns.OpcodeNotify }, mdns.RcodeNotImplemented},
		"update":         {func(m *mdns.Msg) { m.Opcode = mdns.OpcodeUpdate }, mdns.RcodeNotImplemented},
		"EDNS version 1": {func(m *mdns.Msg) { m.SetEdns0(1232, false); m.IsEdns0().SetVersion(1) }, mdns.RcodeBadVers},
		"two OPT":        {func(m *mdns.Msg) { m.SetEdns0(1232, false); m.Extra = append(m.Extra, m.Extra[0]) }, mdns.RcodeFormatError},
		"class CH":       {func(m *mdns.Msg) { m.Question[0].Qclass = mdns.ClassCHAOS }, mdns.RcodeRefused},
		"AXFR":           {func(m *mdns.Msg) { m.Question[0].Qtype = mdns.TypeAXFR }, mdns.RcodeRefused},
		"type OPT":       {func(m *mdns.Msg) { m.Question[0].Qtype = mdns.TypeOPT }, mdns.RcodeFormatError},
	} {
		if r := ask(t, addr, "udp", "web", mdns.TypeA, tc.change); r.Rcode != tc.rcode || len(r.Answer) > 0 {
			t.Errorf("%s: %s, want %s", name, mdns.RcodeToString[r.Rcode], mdns.RcodeToString[tc.rcode])
		}
	}
	// What is broken is answered FORMERR or not at all; then the server still
	// answers.
	good, _ := new(mdns.Msg).SetQuestion("web.", mdns.TypeA).Pack()
	c, err := net.Dial("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	buf := make([]byte, 4096)
	cut := slices.Clone(good[:len(good)-3])
	c.Write(cut)
	n, err := c.Read(buf)
	if err != nil || n != 12 || buf[3]&0xf != mdns.RcodeFormatError || buf[0] != good[0] || buf[1] != good[1] {
		t.Errorf("cut short: %x, %v", buf[:n], err)
	}
	response := slices.Clone(good)
	response[2] |= 0x80
	for _, b := range [][]byte{{}, good[:5], good[:11], response} {
		c.Write(b)
	}
	c.Write(good)
	if n, err = c.Read(buf); err != nil || n < 20 || binary.BigEndian.Uint16(buf[6:]) != 1 {
		t.Errorf("after what is to be dropped: %x, %v", buf[:n], err)
	}
}

func TestTCPPipelinesAndHalfCloses(t *testing.T) {
	s, addr := serving(t, Config{}, both)
	s.SetZone(NewZone(sample(), ZoneOptions{}))
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	var out []byte
	for i := range 100 {
		m := new(mdns.Msg).SetQuestion("web.", mdns.TypeA)
		m.Id = uint16(i)
		b, _ := m.Pack()
		out = append(binary.BigEndian.AppendUint16(out, uint16(len(b))), b...)
	}
	c.Write(out)
	c.(*net.TCPConn).CloseWrite()
	in, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for len(in) > 2 {
		l := int(binary.BigEndian.Uint16(in))
		r := new(mdns.Msg)
		if err := r.Unpack(in[2 : 2+l]); err != nil || len(r.Answer) != 1 {
			t.Fatalf("answer %d: %v %v", n, err, r)
		}
		in = in[2+l:]
		n++
	}
	if n != 100 {
		t.Errorf("%d answers to 100 questions", n)
	}
}

// TestIdleConnectionsMakeRoom: a task that leaves connections open is still
// answered.
func TestIdleConnectionsMakeRoom(t *testing.T) {
	s, addr := serving(t, Config{}, both)
	s.SetZone(NewZone(sample(), ZoneOptions{}))
	conns := make([]*mdns.Conn, 0, tcpConns+50)
	for range cap(conns) {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		conns = append(conns, &mdns.Conn{Conn: c})
	}
	answered := func(c *mdns.Conn) error {
		if err := c.WriteMsg(new(mdns.Msg).SetQuestion("web.", mdns.TypeA)); err != nil {
			return err
		}
		r, err := c.ReadMsg()
		if err == nil && describe(r) != "NOERROR 10.0.1.100" {
			err = fmt.Errorf("%v", r)
		}
		return err
	}
	for _, c := range conns[50:] {
		if err := answered(c); err != nil {
			t.Fatal(err)
		}
	}
	if err := answered(conns[0]); err == nil {
		t.Error("the one that was idle for longest is still open")
	}
}

func TestWhatTheAskerSeesChangesAtOnce(t *testing.T) {
	s := NewServer(Config{})
	defer s.Close()
	s.SetZone(NewZone(sample(), ZoneOptions{}))
	var a atomic.Pointer[Asker]
	a.Store(&Asker{Networks: []string{"netC"}, NoForward: true})
	addr := serve(t, s, a.Load)
	if r := ask(t, addr, "udp", "web", mdns.TypeA); r.Rcode != mdns.RcodeNameError {
		t.Errorf("from netC: %v", r)
	}
	a.Store(&Asker{Networks: []string{"netC", "netA"}})
	if r := ask(t, addr, "udp", "web", mdns.TypeA); describe(r) != "NOERROR 10.0.1.100" {
		t.Errorf("after it joined netA: %v", r)
	}
	v := sample()
	v.Services = slices.DeleteFunc(v.Services, func(s spec.Service) bool { return s.ID == "s1" })
	s.SetZone(s.Zone().Update(v, ZoneOptions{}))
	a.Store(&Asker{Networks: []string{"netC", "netA"}, NoForward: true})
	if r := ask(t, addr, "udp", "www", mdns.TypeA); r.Rcode != mdns.RcodeNameError {
		t.Errorf("after the service went: %v", r)
	}
}

// slowly answers as quick does, by way of a message.
func slowly(s *Server, a *Asker, in []byte) []byte {
	req, rcode := parse(in)
	if rcode == drop {
		return nil
	}
	resp, up := s.answer(a, req, rcode)
	if up != nil {
		return nil
	}
	return pack(resp, udpSize(req), make([]byte, maxUDP))
}

// sameAnswer tells whether two answers differ in their order at most.
func sameAnswer(t *testing.T, a, b []byte) bool {
	t.Helper()
	text := func(b []byte) string {
		m := new(mdns.Msg)
		if err := m.Unpack(b); err != nil {
			t.Fatalf("%x: %v", b, err)
		}
		slices.SortFunc(m.Answer, func(a, b mdns.RR) int { return strings.Compare(a.String(), b.String()) })
		return m.String()
	}
	return text(a) == text(b)
}

// TestQuickSaysTheSame: the short way from question to answer leads to what the
// long one does.
func TestQuickSaysTheSame(t *testing.T) {
	v := sample()
	v.Endpoints[0].Addrs = append(v.Endpoints[0].Addrs, ip("2001:db8::11"))
	s := NewServer(Config{})
	defer s.Close()
	s.SetZone(NewZone(v, ZoneOptions{}))
	var sc scratch
	quick := 0
	for _, name := range []string{"web.", "WeB.", "tasks.web.", "tasks.Web.APP.shoal.", "empty.", "shared.", "db.", "database.", "web.2.", "web.9.", "web.node2.", "c1.", "only.",
		"nosuch.", "nosuch.shoal.", "secret.", ".", `we\.b.`, "_80._tcp.web.", "11.1.0.10.in-addr.arpa.", "web.1.t1aaaaaaaaaa.", "host.shoal.internal."} {
		for _, qtype := range []uint16{mdns.TypeA, mdns.TypeAAAA, mdns.TypeMX, mdns.TypeANY, mdns.TypePTR} {
			for i, change := range []func(*mdns.Msg){
				func(*mdns.Msg) {},
				func(m *mdns.Msg) { m.RecursionDesired, m.CheckingDisabled, m.AuthenticatedData = false, true, true },
				func(m *mdns.Msg) { m.SetEdns0(1232, true) },
				func(m *mdns.Msg) { m.SetEdns0(0, false) },
				func(m *mdns.Msg) { m.SetEdns0(1232, false); m.IsEdns0().SetVersion(1) },
				func(m *mdns.Msg) { m.Question[0].Qclass = mdns.ClassCHAOS },
				func(m *mdns.Msg) { m.Opcode = mdns.OpcodeNotify },
				func(m *mdns.Msg) { m.Response = true },
				func(m *mdns.Msg) { m.Question = append(m.Question, m.Question[0]) },
				func(m *mdns.Msg) { m.Answer = []mdns.RR{addressRR("x.", ip("10.0.0.1"), mdns.TypeA)} },
				func(m *mdns.Msg) {
					m.SetEdns0(1232, false)
					m.IsEdns0().Option = []mdns.EDNS0{&mdns.EDNS0_COOKIE{Code: mdns.EDNS0COOKIE, Cookie: "0123456789abcdef"}}
				},
			} {
				m := new(mdns.Msg).SetQuestion(name, qtype)
				change(m)
				b, err := m.Pack()
				if err != nil {
					t.Fatal(err)
				}
				got := s.Zone().quick(both, b, &sc)
				if got == nil {
					continue
				}
				quick++
				if want := slowly(s, both, b); !sameAnswer(t, got, want) {
					t.Errorf("%s %s, variant %d: %x, want %x", name, mdns.TypeToString[qtype], i, got, want)
				}
			}
		}
	}
	if quick < 100 {
		t.Errorf("only %d questions went the short way", quick)
	}
	b, _ := new(mdns.Msg).SetQuestion("web.", mdns.TypeA).Pack()
	if n := testing.AllocsPerRun(100, func() { s.Zone().quick(both, b, &sc) }); n > 1 {
		t.Errorf("%.0f allocations for an answer", n)
	}
}

// TestQuestionsWaitForTheFirstZone: an agent that starts finds questions in the
// sockets before it knows a name.
func TestQuestionsWaitForTheFirstZone(t *testing.T) {
	u := upstream(t, fails(mdns.RcodeNameError))
	s := NewServer(by(u))
	defer s.Close()
	pc, ln := sockets(t)
	addr := pc.LocalAddr().String()
	got := make(chan string, 2)
	for _, network := range []string{"udp", "tcp"} {
		c, err := net.Dial(network, addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		co := &mdns.Conn{Conn: c}
		if err := co.WriteMsg(new(mdns.Msg).SetQuestion("web.", mdns.TypeA)); err != nil {
			t.Fatal(err)
		}
		go func() {
			_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
			r, err := co.ReadMsg()
			if err != nil {
				got <- err.Error()
				return
			}
			got <- describe(r)
		}()
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, func() *Asker { return both }, pc, ln) }()
	s.SetZone(NewZone(sample(), ZoneOptions{}))
	for range 2 {
		if r := <-got; r != "NOERROR 10.0.1.100" {
			t.Errorf("asked before there was a zone: %s", r)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if u.asked() != nil {
		t.Errorf("forwarded: %v", u.asked())
	}
	// One that never gets a zone ends, too.
	s2 := NewServer(Config{})
	defer s2.Close()
	pc, ln = sockets(t)
	ctx, cancel = context.WithCancel(context.Background())
	go func() { done <- s2.Serve(ctx, func() *Asker { return both }, pc, ln) }()
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// FuzzServer: no packet makes the server fail, and what it answers can be read
// and is an answer to the packet.
func FuzzServer(f *testing.F) {
	for _, name := range []string{"web.", "tasks.web.app.shoal.", "_80._tcp.web.", "11.1.0.10.in-addr.arpa.", `a\.b\000.`, "."} {
		m := new(mdns.Msg).SetQuestion(name, mdns.TypeA)
		b, _ := m.Pack()
		f.Add(b)
		m.SetEdns0(1232, true)
		b, _ = m.Pack()
		f.Add(b)
	}
	f.Add([]byte("\x00\x01\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\xc0\x0c\x00\x01\x00\x01")) // a name that points to itself
	s := NewServer(Config{})
	f.Cleanup(s.Close)
	s.SetZone(NewZone(sample(), ZoneOptions{}))
	buf := make([]byte, maxUDP)
	var sc scratch
	f.Fuzz(func(t *testing.T, b []byte) {
		req, rcode := parse(b)
		if rcode == drop {
			return
		}
		resp, up := s.answer(both, req, rcode)
		if up != nil {
			t.Fatal("forwarded, with nobody to ask")
		}
		size := udpSize(req)
		out := pack(resp, size, buf)
		if out == nil {
			t.Fatalf("no answer to %x", b)
		}
		if quick := s.Zone().quick(both, b, &sc); quick != nil && !sameAnswer(t, quick, out) {
			t.Fatalf("%x answered with %x, and by the long way with %x", b, quick, out)
		}
		got := new(mdns.Msg)
		if err := got.Unpack(out); err != nil {
			t.Fatalf("%x answered with %x: %v", b, out, err)
		}
		if len(out) > size || got.Id != binary.BigEndian.Uint16(b) || !got.Response {
			t.Fatalf("%x answered with %x", b, out)
		}
	})
}
