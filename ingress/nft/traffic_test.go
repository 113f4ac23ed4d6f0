package nft

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/shoalnet/shoal/ingress"
	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/overlay"
	"github.com/shoalnet/shoal/spec"
	"github.com/shoalnet/shoal/vip/ipvs"
	"github.com/shoalnet/shoal/vip/viptest"
)

// each runs a test with each VIP data path that the kernel has.
func each(t *testing.T, fn func(t *testing.T, l *lab)) {
	needKernel(t)
	for _, path := range []string{"nft", "ipvs"} {
		t.Run(path, func(t *testing.T) {
			if path == "ipvs" {
				if err := ipvs.Probe(); err != nil {
					t.Skipf("missing: %v", err)
				}
			}
			fn(t, newLab(t, path))
		})
	}
}

var both = []string{"tcp4", "udp4"}

func TestIngress(t *testing.T) {
	each(t, func(t *testing.T, l *lab) {
		for _, replicas := range [][]int{{1}, {2}, {1, 2, 3}} {
			l.replicas(replicas...)
			var ids []string
			for _, r := range replicas {
				ids = append(ids, fmt.Sprint(r))
			}
			for _, n := range l.nodes {
				for _, network := range both {
					// From outside, from the node itself, and from a task.
					expect(t, l.client, network, n.addr.String(), published, ids, client.String())
					expect(t, n.ns, network, n.addr.String(), published, ids, n.addr.String())
					expect(t, n.ns, network, "127.0.0.1", published, ids, n.addr.String())
				}
				expect(t, l.client, "tcp4", n.addr.String(), publishedNAT, ids, n.addr.String())
				expect(t, n.ns, "tcp4", "127.0.0.1", publishedLo, ids, n.addr.String())
				refused(t, l.client, "tcp4", n.addr.String(), publishedLo)
				refused(t, n.ns, "tcp4", n.addr.String(), publishedLo)
			}
		}
		for _, n := range l.nodes {
			for _, m := range l.nodes {
				expect(t, n.taskNetns(), "tcp4", m.addr.String(), published, []string{"1", "2", "3"}, n.addr.String())
			}
			// The way out is still there.
			serveOnce(t, l, n)
		}
	})
}

// serveOnce checks that a task reaches the client, as its node.
func serveOnce(t *testing.T, l *lab, n *node) {
	t.Helper()
	port := 9000 + n.number
	serve(t, l.client, port, "out")
	expect(t, n.taskNetns(), "tcp4", client.String(), port, []string{"out"}, n.addr.String())
}

// TestSamePort: one client uses one source port for connections to all nodes.
func TestSamePort(t *testing.T) {
	each(t, func(t *testing.T, l *lab) {
		l.replicas(2)
		for _, from := range []int{33333, 45678} {
			for round := range 2 {
				var conns []*tcpConn
				for _, n := range l.nodes {
					c, err := open(l.client, from+round, n.addr.String(), published)
					if err != nil {
						t.Fatalf("%s: %v", n, err)
					}
					defer c.Close()
					conns = append(conns, c)
				}
				for i, c := range conns {
					if c.client != client.String() {
						t.Errorf("by %s: the server sees %s", l.nodes[i], c.client)
					}
					for k := range 3 {
						if err := c.echo(fmt.Sprint(i, k)); err != nil {
							t.Errorf("by %s: %v", l.nodes[i], err)
						}
					}
				}
			}
			var udps []net.Conn
			for _, n := range l.nodes {
				c, err := dial(l.client, "udp4", from, n.addr.String(), published)
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				udps = append(udps, c)
			}
			for k := range 2 {
				for i, c := range udps {
					if _, from, err := exchange(c, fmt.Sprintf("data%d%d", i, k)); err != nil || from != client.String() {
						t.Errorf("UDP by %s: %s %v", l.nodes[i], from, err)
					}
				}
			}
		}
	})
}

func TestBulk(t *testing.T) {
	each(t, func(t *testing.T, l *lab) {
		l.replicas(2)
		for _, n := range l.nodes {
			c, err := open(l.client, 0, n.addr.String(), published)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if err := c.echo(strings.Repeat("x", 1<<20)); err != nil {
				t.Errorf("by %s: %v", n, err)
			}
		}
	})
}

func TestLocalAndHost(t *testing.T) {
	each(t, func(t *testing.T, l *lab) {
		l.replicas(1, 2)
		for _, network := range both {
			for _, n := range l.nodes[:2] {
				id := []string{fmt.Sprint(n.number)}
				for _, port := range []int{publishedHere, publishedHost} {
					expect(t, l.client, network, n.addr.String(), port, id, client.String())
					expect(t, n.ns, network, n.addr.String(), port, id, n.addr.String())
					expect(t, n.ns, network, "127.0.0.1", port, id, n.addr.String())
				}
			}
			for _, port := range []int{publishedHere, publishedHost} {
				refused(t, l.client, network, l.nodes[2].addr.String(), port)
				refused(t, l.nodes[2].ns, network, "127.0.0.1", port)
			}
		}
		refusedSCTP(t, l.client, l.nodes[2].addr, publishedHere)
		// Draining keeps connections and takes no new ones; removal resets.
		for _, port := range []int{publishedHere, publishedHost} {
			l.replicas(1, 2)
			n := l.nodes[1]
			c, err := open(l.client, 0, n.addr.String(), port)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			u, err := dial(l.client, "udp4", 0, n.addr.String(), port)
			if err != nil {
				t.Fatal(err)
			}
			defer u.Close()
			if _, _, err := exchange(u, "before"); err != nil {
				t.Fatal(err)
			}
			l.state[2] = spec.EndpointDraining
			l.apply()
			refused(t, l.client, "tcp4", n.addr.String(), port)
			refused(t, l.client, "udp4", n.addr.String(), port)
			if err := c.echo("still here"); err != nil {
				t.Errorf("port %d: draining: %v", port, err)
			}
			if _, _, err := exchange(u, "still"); err != nil {
				t.Errorf("port %d: draining UDP: %v", port, err)
			}
			// A client that keeps sending while it is refused is served again.
			l.replicas(1)
			if err := c.echo("gone"); err == nil {
				t.Errorf("port %d: the connection outlives its task", port)
			}
			if _, _, err := exchange(u, "gone"); err == nil {
				t.Errorf("port %d: the UDP flow outlives its task", port)
			}
			l.replicas(1, 2)
			if err := again(u); err != nil {
				t.Errorf("port %d: UDP after the task is back: %v", port, err)
			}
		}
	})
}

// TestLocalHasNoGap: while the tasks of a node change, no packet to its port
// finds none.
func TestLocalHasNoGap(t *testing.T) {
	needKernel(t)
	l := newLab(t, "nft")
	l.replicas(1)
	n := l.nodes[0]
	run(t, "ip netns exec %s nft add table ip nogap ; add chain ip nogap forward { type filter hook forward priority 0 ; } ; add rule ip nogap forward meta l4proto udp drop", n.ovns())
	o := ingress.Local{Protocol: spec.UDP, Target: 80}
	err := nl.Do(n.ovns(), func() error {
		c, err := reader()
		if err != nil {
			return err
		}
		defer c.CloseLasting()
		chains, err := chainsOf(c, ingress.NetnsTable)
		for name := range chains {
			if proto, slot, ok := parseLocalChain(name); ok && proto == o.Protocol {
				o.Slot = slot
			}
		}
		return err
	})
	if err != nil || o.Slot == 0 {
		t.Fatalf("no balancer of %s: %v", o.Protocol, err)
	}
	const changes = 50
	sent, refused := viptest.Flows(t, l.client, netip.AddrPortFrom(n.addr, publishedHere), func() {
		for i := range changes {
			o.Backends = []string{"10.92.1.11", "10.92.1.11 10.92.1.12"}[i%2]
			if err := nl.Do(n.ovns(), func() error { return putLocal(o) }); err != nil {
				t.Error(err)
			}
		}
	})
	t.Logf("%d flows during %d changes, %d refused", sent, changes, refused)
	if refused > 0 || sent < changes {
		t.Errorf("%d of %d flows were refused", refused, sent)
	}
	l.apply()
}

// TestAnotherVersion: while an agent with other rules replaces what stands, of
// each table on the way, no packet to a published port finds none.
func TestAnotherVersion(t *testing.T) {
	each(t, func(t *testing.T, l *lab) {
		l.replicas(1, 2)
		n := l.nodes[0]
		defer func() { version = formVersion }()
		replace := func(changes int, tables ...[2]string) {
			for i := range changes {
				version = formVersion + 1 + i
				for _, x := range tables {
					run(t, "ip netns exec %s nft add rule %s counter", x[0], x[1])
				}
				n.apply()
			}
		}
		host := [][2]string{{n.ns, "ip " + ingress.TableName(n.instance) + " prerouting"},
			{n.ns, "inet " + overlay.MembersTable(n.instance) + " input"}, {n.ns, "inet " + overlay.HostTable(n.instance) + " forward"}}
		// Dropped behind the host's rules, or each would be a connection to keep.
		run(t, "ip netns exec %s nft add table ip nogap ; add chain ip nogap forward { type filter hook forward priority 0 ; } ; add rule ip nogap forward meta l4proto udp drop", n.ns)
		sent, no := viptest.Flows(t, l.client, netip.AddrPortFrom(n.addr, published), func() { replace(10, host...) })
		t.Logf("%d flows, %d refused", sent, no)
		if no > 0 || sent < 100 {
			t.Errorf("%d of %d flows were refused", no, sent)
		}
		run(t, "ip netns exec %s nft delete table ip nogap", n.ns)
		stop := make(chan struct{})
		var wg sync.WaitGroup
		var tried, failed atomic.Int64
		var why atomic.Value
		for range 2 {
			wg.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					tried.Add(1)
					if c, err := open(l.client, 0, n.addr.String(), published); err != nil {
						failed.Add(1)
						why.Store(err.Error())
					} else {
						// With a reset, or a slow machine runs out of the client's ports.
						if tc, ok := c.Conn.(*net.TCPConn); ok {
							_ = tc.SetLinger(0)
						}
						c.Close()
					}
				}
			})
		}
		replace(6, append(host, [2]string{n.ovns(), "ip shoal-ingress marks"}, [2]string{n.ovns(), "inet shoal-overlay forward"}, [2]string{n.ovns(), "ip shoal-vip postrouting"})...)
		close(stop)
		wg.Wait()
		t.Logf("%d connections, %d failed", tried.Load(), failed.Load())
		if failed.Load() > 0 || tried.Load() < 20 {
			t.Errorf("%d of %d connections failed: %v", failed.Load(), tried.Load(), why.Load())
		}
		version = formVersion
		l.apply()
		for _, n := range l.nodes {
			expect(t, l.client, "tcp4", n.addr.String(), published, []string{"1", "2"}, client.String())
			expect(t, l.client, "tcp4", n.addr.String(), publishedNAT, []string{"1", "2"}, n.addr.String())
		}
	})
}

// again exchanges a datagram, disregarding errors that earlier ones left.
func again(c net.Conn) (err error) {
	for range 3 {
		if _, _, err = exchange(c, "again"); err == nil {
			return nil
		}
	}
	return err
}

func TestNoBackend(t *testing.T) {
	each(t, func(t *testing.T, l *lab) {
		l.replicas()
		for _, n := range l.nodes {
			for _, network := range both {
				refused(t, l.client, network, n.addr.String(), published)
				refused(t, n.ns, network, "127.0.0.1", published)
			}
		}
		u, err := dial(l.client, "udp4", 0, l.nodes[0].addr.String(), published)
		if err != nil {
			t.Fatal(err)
		}
		defer u.Close()
		if _, _, err := exchange(u, "nobody"); err == nil {
			t.Error("UDP without a backend is answered")
		}
		l.replicas(2)
		if err := again(u); err != nil {
			t.Errorf("UDP once there is a backend: %v", err)
		}
	})
}

func TestRemoval(t *testing.T) {
	each(t, func(t *testing.T, l *lab) {
		l.replicas(1, 2)
		c, err := open(l.client, 0, l.nodes[0].addr.String(), published)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		// Draining: the connection goes on.
		for i := range l.state {
			l.state[i] = spec.EndpointDraining
		}
		l.apply()
		if err := c.echo("draining"); err != nil {
			t.Errorf("draining: %v", err)
		}
		refused(t, l.client, "tcp4", l.nodes[0].addr.String(), published)
		l.replicas(1, 2)
		if err := c.echo("back"); err != nil {
			t.Errorf("back: %v", err)
		}
		l.noPorts = true
		l.apply()
		if err := c.echo("removed"); err == nil {
			t.Error("a connection outlives its port")
		}
		for _, n := range l.nodes {
			for _, port := range []int{published, publishedHere, publishedHost} {
				for _, network := range both {
					refused(t, l.client, network, n.addr.String(), port)
				}
			}
			if rules := run(t, "ip netns exec %s nft list ruleset", n.ns); strings.Contains(rules, "-ingress") {
				t.Errorf("%s: table left:\n%s", n, rules)
			}
			if routes := run(t, "ip -n %s route", n.ns); strings.Contains(routes, "proto 84") || strings.Contains(routes, vip4.String()) {
				t.Errorf("%s: routes left:\n%s", n, routes)
			}
			if rules := run(t, "ip netns exec %s nft list ruleset", n.ovns()); strings.Contains(rules, "shoal-ingress") {
				t.Errorf("%s: table left in the ovns:\n%s", n, rules)
			}
			if rules := run(t, "ip -n %s rule", n.ovns()); strings.Contains(rules, "fwmark") {
				t.Errorf("%s: rules left in the ovns:\n%s", n, rules)
			}
		}
	})
}

// TestPrivate: a VIP is reached by its published ports only.
func TestPrivate(t *testing.T) {
	each(t, func(t *testing.T, l *lab) {
		l.replicas(1)
		n := l.nodes[0]
		refused(t, n.ns, "tcp4", vip4.String(), 80)
		// A neighbour on the wire that routes to the VIP by the node.
		run(t, "ip -n %s route add %s via %s", l.client, vip4, n.addr)
		err := nl.Do(l.client, func() error {
			c, err := net.DialTimeout("tcp4", vip4.String()+":80", 300*time.Millisecond)
			if err == nil {
				c.Close()
			}
			return err
		})
		if err == nil {
			t.Error("the VIP is reached from the wire")
		}
	})
}

// TestBeside: other tables of the host, and damage to ours, don't show.
func TestBeside(t *testing.T) {
	each(t, func(t *testing.T, l *lab) {
		l.replicas(2)
		n := l.nodes[0]
		// One that hides every client, after ours.
		run(t, "ip netns exec %s nft add table ip other ; add chain ip other post { type nat hook postrouting priority 100 ; } ; add rule ip other post masquerade", n.ns)
		// One that has another idea of the port.
		run(t, "ip netns exec %s nft add chain ip other pre { type nat hook prerouting priority -100 ; } ; add rule ip other pre tcp dport 8080 dnat to 192.0.2.77:1", n.ns)
		for _, network := range both {
			expect(t, l.client, network, n.addr.String(), published, []string{"2"}, client.String())
		}
		c, err := open(l.client, 0, n.addr.String(), published)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		run(t, "ip netns exec %s nft delete table ip shoal-%s-ingress", n.ns, n.instance)
		run(t, "ip netns exec %s nft delete table ip shoal-ingress", n.ovns())
		run(t, "ip netns exec %s nft delete table ip shoal-ingress", l.nodes[1].ovns())
		run(t, "ip -n %s route del %s", n.ns, vip4)
		l.apply()
		if err := c.echo("still here"); err != nil {
			t.Errorf("a connection does not outlive damage that was mended: %v", err)
		}
		expect(t, l.client, "tcp4", n.addr.String(), published, []string{"2"}, client.String())
		// The overlay's devices, and with them the routes.
		run(t, "ip -n %s link del out", n.ovns())
		l.apply()
		expect(t, l.client, "tcp4", n.addr.String(), published, []string{"2"}, client.String())
	})
}

// TestMany: what many ports cost.
func TestMany(t *testing.T) {
	needKernel(t)
	l := newLab(t, "nft")
	l.nodes = l.nodes[:1]
	n := l.nodes[0]
	l.ports = nil
	for i := range 300 {
		l.ports = append(l.ports, spec.Port{Published: uint16(20000 + i), Target: 80, Protocol: spec.TCP, Mode: spec.PortIngress})
	}
	n.applyWires()
	start := time.Now()
	n.apply()
	made := time.Since(start)
	start = time.Now()
	n.apply()
	t.Logf("300 ports: made in %s, three passes without change %s", made, time.Since(start))
	l.replicas(1)
	expect(t, l.client, "tcp4", n.addr.String(), 20299, []string{"1"}, client.String())
}
