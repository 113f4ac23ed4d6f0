package dns

import (
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"time"

	mdns "github.com/miekg/dns"

	"github.com/shoalnet/shoal/spec"
)

// large is the table that the figures of docs/PERFORMANCE.md are of.
func large(services, replicas int) *spec.View {
	v := &spec.View{Networks: []spec.Network{{ID: "net", Name: "net", Subnets: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}}}
	n := uint32(1)
	addr := func() []netip.Addr {
		n++
		return []netip.Addr{netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)})}
	}
	for i := range services {
		s := spec.Service{ID: fmt.Sprintf("s%011d", i), Spec: spec.ServiceSpec{Name: fmt.Sprintf("svc%d", i), Networks: []spec.NetworkAttachment{{Network: "net"}}},
			VIPs: []spec.VIPs{{Network: "net", Addrs: addr()}}}
		v.Services = append(v.Services, s)
		for k := range replicas {
			id := fmt.Sprintf("t%07d%04d", i, k)
			v.Endpoints = append(v.Endpoints, spec.Endpoint{Task: id, TaskName: fmt.Sprintf("svc%d.%d.%s", i, k+1, id), Hostname: fmt.Sprintf("svc%d-%d-%s", i, k+1, id),
				Service: s.ID, Slot: k + 1, Network: "net", Node: fmt.Sprintf("n%d", k), Addrs: addr(), State: spec.EndpointActive})
		}
	}
	v.Sort()
	return v
}

const benchServices, benchReplicas = 10_000, 10

func BenchmarkZoneBuild(b *testing.B) {
	v := large(benchServices, benchReplicas)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	z := NewZone(v, ZoneOptions{})
	runtime.GC()
	runtime.ReadMemStats(&after)
	runtime.KeepAlive(z)
	for b.Loop() {
		runtime.KeepAlive(NewZone(v, ZoneOptions{}))
	}
	b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/1e6, "MB/table")
}

// BenchmarkZoneUpdate is one endpoint of 100,000 that changes its state.
func BenchmarkZoneUpdate(b *testing.B) {
	a := large(benchServices, benchReplicas)
	c := *a
	c.Endpoints = slices.Clone(a.Endpoints)
	c.Endpoints[5000].State = spec.EndpointDraining
	z := NewZone(a, ZoneOptions{})
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if i%2 == 0 {
			z = z.Update(&c, ZoneOptions{})
		} else {
			z = z.Update(a, ZoneOptions{})
		}
	}
}

// BenchmarkAnswer is a question from its bytes to those of the answer.
func BenchmarkAnswer(b *testing.B) {
	s := NewServer(Config{})
	defer s.Close()
	s.SetZone(NewZone(large(benchServices, benchReplicas), ZoneOptions{}))
	a := &Asker{Networks: []string{"net"}}
	for _, name := range []string{"svc5000.", "tasks.svc5000."} {
		b.Run(name, func(b *testing.B) {
			q, _ := new(mdns.Msg).SetQuestion(name, mdns.TypeA).Pack()
			buf := make([]byte, maxUDP)
			b.ReportAllocs()
			for b.Loop() {
				req, rcode := parse(q)
				resp, _ := s.answer(a, req, rcode)
				if pack(resp, udpSize(req), buf) == nil {
					b.Fatal("no answer")
				}
			}
		})
	}
}

// BenchmarkUDP asks by a socket, with 32 questions under way. The client takes
// its share of the CPU: GOMAXPROCS=1 shows what one core gives to both.
func BenchmarkUDP(b *testing.B) {
	s, addr := serving(b, Config{}, &Asker{Networks: []string{"net"}})
	s.SetZone(NewZone(large(benchServices, benchReplicas), ZoneOptions{}))
	c, err := net.Dial("udp", addr)
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	q, _ := new(mdns.Msg).SetQuestion("svc5000.", mdns.TypeA).Pack()
	const window = 32
	in := make([]byte, 4096)
	sent := make([]time.Time, 65536)
	took := make([]time.Duration, 0, 1<<20)
	id := uint16(0)
	send := func() {
		id++
		q[0], q[1] = byte(id>>8), byte(id)
		sent[id] = time.Now()
		if _, err := c.Write(q); err != nil {
			b.Fatal(err)
		}
	}
	for range window {
		send()
	}
	start := time.Now()
	n := 0
	for b.Loop() {
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		k, err := c.Read(in)
		if err != nil || k < 12 {
			b.Fatal(err)
		}
		took = append(took, time.Since(sent[uint16(in[0])<<8|uint16(in[1])]))
		n++
		send()
	}
	b.ReportMetric(float64(n)/time.Since(start).Seconds(), "answers/s")
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
}
