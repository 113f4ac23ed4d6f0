package dns

import (
	"context"
	"fmt"
	"net"
	"runtime"
	"slices"
	"testing"
	"time"

	mdns "github.com/miekg/dns"

	"github.com/shoalnet/shoal/dns/dnstest"
	"github.com/shoalnet/shoal/spec"
)

// large is the table that the figures are of.
func large() *spec.View { return dnstest.Large(dnstest.Services, dnstest.Replicas) }

func BenchmarkZoneBuild(b *testing.B) {
	v := large()
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
	a := large()
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
	s.SetZone(NewZone(large(), ZoneOptions{}))
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
		b.Run("short-way/"+name, func(b *testing.B) {
			q, _ := new(mdns.Msg).SetQuestion(name, mdns.TypeA).Pack()
			var sc scratch
			b.ReportAllocs()
			for b.Loop() {
				if s.Zone().quick(a, q, &sc) == nil {
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
	s.SetZone(NewZone(large(), ZoneOptions{}))
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

// BenchmarkBesideAFlood is a task's question while another asks, three times a second, for
// 3,000 names of others at once, of which each takes a resolver 20 ms. Resolver and
// tasks take their share of the CPU.
func BenchmarkBesideAFlood(b *testing.B) {
	for what, name := range map[string]string{"own": "svc50.", "foreign": "mine.example."} {
		b.Run(what, func(b *testing.B) { besideAFlood(b, name) })
	}
}

func besideAFlood(b *testing.B, name string) {
	u := upstream(b, func(w mdns.ResponseWriter, r *mdns.Msg) {
		time.Sleep(20 * time.Millisecond)
		says("192.0.2.1", 0)(w, r)
	})
	s, addr := serving(b, by(u), &Asker{Networks: []string{"net"}})
	s.SetZone(NewZone(dnstest.Large(100, 3), ZoneOptions{}))
	flood := serve(b, s, func() *Asker { return &Asker{Networks: []string{"net"}} })
	c, err := net.Dial("udp", addr)
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	f, err := net.Dial("udp", flood)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	done := make(chan struct{})
	ctx, stop := context.WithCancel(b.Context())
	defer func() {
		stop()
		<-done
	}()
	go func() { // all at once, as a program does that crawls
		defer close(done)
		for i := 0; ctx.Err() == nil; time.Sleep(300 * time.Millisecond) {
			for range 3000 {
				i++
				q, _ := new(mdns.Msg).SetQuestion(fmt.Sprintf("n%d.example.", i), mdns.TypeA).Pack()
				_, _ = f.Write(q)
			}
		}
	}()
	q, _ := new(mdns.Msg).SetQuestion(name, mdns.TypeA).Pack()
	in := make([]byte, 4096)
	var took []time.Duration
	for b.Loop() {
		begun := time.Now()
		if _, err := c.Write(q); err != nil {
			b.Fatal(err)
		}
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := c.Read(in); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(begun))
		time.Sleep(time.Millisecond)
	}
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-µs")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-µs")
}
