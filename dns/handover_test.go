package dns

import (
	"context"
	"fmt"
	"net"
	"testing"
	"time"

	mdns "github.com/miekg/dns"
)

// TestHandover: of the questions that come while one server ends and the next takes
// its sockets over, as agents do that are started anew, none is lost: whoever asked
// would wait for seconds before it asks again.
func TestHandover(t *testing.T) {
	pc, ln := sockets(t)
	defer pc.Close()
	defer ln.Close()
	udp, tcp := pc.(*net.UDPConn), ln.(*net.TCPListener)
	// copies are of the same sockets, as an agent gets them from a task's shim.
	copies := func() (net.PacketConn, net.Listener) {
		u, err := udp.File()
		if err != nil {
			t.Fatal(err)
		}
		defer u.Close()
		l, err := tcp.File()
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		p2, err := net.FilePacketConn(u)
		if err != nil {
			t.Fatal(err)
		}
		l2, err := net.FileListener(l)
		if err != nil {
			t.Fatal(err)
		}
		return p2, l2
	}
	begin := func() (end func()) {
		s := NewServer(Config{})
		s.SetZone(NewZone(sample(), ZoneOptions{}))
		p, l := copies()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- s.Serve(ctx, func() *Asker { return both }, p, l) }()
		return func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Serve: %v", err)
			}
			s.Close()
		}
	}
	c, err := net.Dial("udp", pc.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	const asked = 3000
	sent := make(chan error, 1)
	go func() {
		for i := range asked {
			m := new(mdns.Msg).SetQuestion("web.", mdns.TypeA)
			m.Id = uint16(i)
			b, err := m.Pack()
			if err == nil {
				_, err = c.Write(b)
			}
			if err != nil {
				sent <- err
				return
			}
			time.Sleep(100 * time.Microsecond)
		}
		sent <- nil
	}()
	answered := make(chan error, 1)
	go func() {
		seen := map[uint16]bool{}
		buf := make([]byte, 1<<16)
		for len(seen) < asked {
			_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
			n, err := c.Read(buf)
			m := new(mdns.Msg)
			if err == nil {
				err = m.Unpack(buf[:n])
			}
			if err != nil {
				answered <- fmt.Errorf("%d of %d questions were answered: %w", len(seen), asked, err)
				return
			}
			seen[m.Id] = true
		}
		answered <- nil
	}()
	end := begin()
	for {
		select {
		case err := <-answered:
			end()
			if err != nil {
				t.Error(err)
			}
			if err := <-sent; err != nil {
				t.Error(err)
			}
			return
		case <-time.After(time.Millisecond):
			end()
			end = begin()
		}
	}
}
