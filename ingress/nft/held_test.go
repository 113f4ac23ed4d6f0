package nft

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/shoalnet/shoal/ingress"
	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/spec"
)

func listenTCP(t *testing.T, ns, addr string) net.Listener {
	t.Helper()
	var ln net.Listener
	err := nl.Do(ns, func() (err error) {
		ln, err = net.Listen("tcp", addr)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

// TestHeldPort: a program of the host keeps its port, and the state says so;
// other ports go on; and when the program lets it go, the port comes.
func TestHeldPort(t *testing.T) {
	needKernel(t)
	for _, addr := range []string{"0.0.0.0:8080", ":8080", "192.0.2.1:8080", "[::]:8080"} {
		t.Run(addr, func(t *testing.T) {
			l := newLab(t, "nft")
			n := l.nodes[0]
			ln := listenTCP(t, n.ns, addr)
			l.nodes = l.nodes[:1]
			l.state[1] = spec.EndpointActive
			if err := nl.Create(n.taskNetns()); err != nil {
				t.Fatal(err)
			}
			serve(t, n.taskNetns(), 80, "1")
			n.applyWires()
			want := ingress.Desired(n.view())
			_, err := pass(t, ingress.Target{Dataplane: n.ingress}, want)
			if err == nil || !strings.Contains(err.Error(), "port 8080/tcp is held by ") || !strings.Contains(err.Error(), fmt.Sprintf("(pid %d) on this node", os.Getpid())) {
				t.Errorf("the error is: %v", err)
			}
			// The holder gets its connections, others go on.
			go func() {
				c, err := ln.Accept()
				if err == nil {
					fmt.Fprintln(c, "holder itself")
					c.Close()
				}
			}()
			c, err := open(l.client, 0, n.addr.String(), published)
			if err != nil || c.id != "holder" {
				t.Errorf("the holder's port: %v %v", c, err)
			}
			if c != nil {
				c.Close()
			}
			expect(t, l.client, "udp4", n.addr.String(), published, []string{"1"}, client.String())
			expect(t, l.client, "tcp4", n.addr.String(), publishedNAT, []string{"1"}, n.addr.String())
			ln.Close()
			n.apply()
			expect(t, l.client, "tcp4", n.addr.String(), published, []string{"1"}, client.String())
		})
	}
}

// TestTaken: a program that manages to listen on a port of ours gets it, and
// the port is back when it ends.
func TestTaken(t *testing.T) {
	needKernel(t)
	l := newLab(t, "nft")
	l.nodes = l.nodes[:1]
	l.replicas(1)
	n := l.nodes[0]
	expect(t, l.client, "tcp4", n.addr.String(), published, []string{"1"}, client.String())
	// While the agent runs, the port is reserved; reservations refuse, too.
	for _, addr := range []string{"0.0.0.0:8080", "192.0.2.1:8080"} {
		err := nl.Do(n.ns, func() error {
			ln, err := net.Listen("tcp4", addr)
			if err == nil {
				ln.Close()
			}
			return err
		})
		if !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("port reserved, but listening on %s: %v", addr, err)
		}
	}
	err := nl.Do(n.ns, func() error {
		pc, err := net.ListenPacket("udp4", ":8080")
		if err == nil {
			pc.Close()
		}
		return err
	})
	if !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("UDP port reserved, but: %v", err)
	}
	n.ingress.Close()
	ln := listenTCP(t, n.ns, "0.0.0.0:8080")
	want := ingress.Desired(n.view())
	if _, err := pass(t, ingress.Target{Dataplane: n.ingress}, want); err == nil || !strings.Contains(err.Error(), "is held by") {
		t.Errorf("taken: %v", err)
	}
	have, err := n.ingress.Observe(context.Background(), want)
	if err != nil {
		t.Fatal(err)
	}
	if o := have.Get(ingress.Port{Published: published, Protocol: spec.TCP}.Key()); o != nil {
		t.Errorf("still programmed: %v", o)
	}
	ln.Close()
	n.apply()
	expect(t, l.client, "tcp4", n.addr.String(), published, []string{"1"}, client.String())
}

func TestParseSockets(t *testing.T) {
	const tcp = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12345 1 0000000000000000 100 0 0 10 0
   1: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12346 1 0000000000000000 100 0 0 10 0
   2: 0100007F:1F91 0100007F:1234 01 00000000:00000000 00:00000000 00000000     0        0 12347 1 0000000000000000 100 0 0 10 0
   3: 0100007F:1F92 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12348 1 0000000000000000 100 0 0 10 0
`
	ls, err := parseSockets(strings.NewReader(tcp), stateListen, true)
	if err != nil {
		t.Fatal(err)
	}
	if got := text(ls); got != "127.0.0.1 8080 12345, 0.0.0.0 22 12346, " {
		t.Error(got)
	}
	const tcp6 = `  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000000000000000000000000000:1F90 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 5 1
   1: 0000000000000000FFFF0000010200C0:1F90 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 6 1
   x
`
	ls, err = parseSockets(strings.NewReader(tcp6), stateListen, true)
	if err != nil {
		t.Fatal(err)
	}
	if got := text(ls); got != ":: 8080 5, 192.0.2.1 8080 6, " {
		t.Error(got)
	}
}

func text(ls []listener) (s string) {
	for _, l := range ls {
		s += fmt.Sprintf("%s %d %s, ", l.addr, l.port, l.inode)
	}
	return s
}
