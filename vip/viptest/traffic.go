package viptest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/internal/nl"
)

// port is where every server of the suite listens, in every protocol.
const port = 8080

// soon bounds what must happen at once, wide enough for an emulated machine
// and still less than any timeout of the kernel that would hide a loss (TCP
// sends a lost SYN again after 1 s; see atOnce).
const soon = 8 * time.Second

// lab is a world with endpoints that have namespaces of their own, wired to
// the overlay namespace as the overlay wires tasks. Endpoint i has address
// addr(100+i); 1 to n-1 are servers, n is only a client.
type lab struct {
	*world
	ns []string // of endpoints, from 1
}

func newLab(t *testing.T, h Harness, n int, v6 bool) *lab {
	l := &lab{world: newWorld(t, h), ns: []string{""}}
	if v6 {
		l.dual()
	}
	l.up()
	o := l.world.ns()
	for i := 1; i <= n; i++ {
		ns := fmt.Sprintf("%s-e%d", l.view.Instance, i)
		if err := nl.Create(ns); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { RemoveNamespace(t, ns) })
		l.ns = append(l.ns, ns)
		a := addr(100 + i).String()
		dev := fmt.Sprintf("v%d", i)
		Sh(t, "ip -n "+o+" link add "+dev+" type veth peer name eth0 netns "+ns)
		Sh(t, "ip -n "+o+" link set "+dev+" up")
		Sh(t, "ip -n "+ns+" link set eth0 up")
		Sh(t, "ip -n "+o+" addr add 169.254.1.1/32 dev "+dev)
		Sh(t, "ip -n "+ns+" addr add "+a+"/32 dev eth0")
		Sh(t, "ip -n "+o+" route add "+a+"/32 dev "+dev)
		Sh(t, "ip -n "+ns+" route add 169.254.1.1 dev eth0 scope link")
		Sh(t, "ip -n "+ns+" route add "+subnet.String()+" via 169.254.1.1 src "+a)
		if v6 {
			a := addr6(100 + i).String()
			Sh(t, "ip -n "+o+" addr add fe80::1/64 dev "+dev+" nodad")
			Sh(t, "ip -n "+ns+" addr add "+a+"/128 dev eth0 nodad")
			Sh(t, "ip -n "+o+" route add "+a+"/128 dev "+dev)
			Sh(t, "ip -n "+ns+" route add "+subnet6.String()+" via fe80::1 dev eth0 src "+a)
		}
	}
	for i := 1; i < n; i++ {
		serve(t, l.ns[i], strconv.Itoa(i))
	}
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		for _, c := range []string{"nft list ruleset", "ipvsadm -L -n", "ipvsadm -L -c -n", "conntrack -L"} {
			out, _ := exec.Command("ip", append([]string{"netns", "exec", o}, strings.Fields(c)...)...).CombinedOutput()
			t.Logf("%s:\n%s", c, out[:min(len(out), 6000)])
		}
	})
	return l
}

// hairpin is what a server sees as its client when that is itself.
func (l *lab) hairpin() string {
	if l.v6 {
		return addr6(1).String()
	}
	return "169.254.1.1"
}

// client is the namespace that serves nothing.
func (l *lab) client() string { return l.ns[len(l.ns)-1] }

// serve answers in ns until the test ends: over TCP with a line "ID client"
// and then everything it receives, over UDP each datagram with "ID client data".
func serve(t *testing.T, ns, id string) {
	t.Helper()
	var ln net.Listener
	var pc net.PacketConn
	err := nl.Do(ns, func() (err error) {
		if ln, err = net.Listen("tcp", fmt.Sprintf(":%d", port)); err != nil {
			return err
		}
		pc, err = net.ListenPacket("udp", fmt.Sprintf(":%d", port))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	open := map[net.Conn]bool{}
	closed := false
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			if closed {
				c.Close()
			} else {
				open[c] = true
				wg.Go(func() {
					fmt.Fprintf(c, "%s %s\n", id, host(c.RemoteAddr()))
					io.Copy(c, c)
					c.Close()
					mu.Lock()
					delete(open, c)
					mu.Unlock()
				})
			}
			mu.Unlock()
		}
	})
	wg.Go(func() {
		b := make([]byte, 2048)
		for {
			n, from, err := pc.ReadFrom(b)
			if err != nil {
				if errors.Is(err, net.ErrClosed) {
					return
				}
				continue // an ICMP error of an earlier answer
			}
			pc.WriteTo(fmt.Appendf(nil, "%s %s %s", id, host(from), b[:n]), from)
		}
	})
	t.Cleanup(func() {
		ln.Close()
		pc.Close()
		mu.Lock()
		closed = true
		for c := range open {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
}

func host(a net.Addr) string {
	p, _ := netip.ParseAddrPort(a.String())
	return p.Addr().Unmap().String()
}

// dial connects from a namespace; from is the source port, 0 for any.
func dial(ns, network string, from int, to netip.Addr, port int) (net.Conn, error) {
	d := net.Dialer{Timeout: soon, Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
	}}
	if from != 0 {
		if d.LocalAddr = (&net.TCPAddr{Port: from}); network == "udp" {
			d.LocalAddr = &net.UDPAddr{Port: from}
		}
	}
	var c net.Conn
	err := nl.Do(ns, func() (err error) {
		c, err = d.Dial(network, netip.AddrPortFrom(to, uint16(port)).String())
		return err
	})
	return c, err
}

// tcp is an open connection.
type tcp struct {
	net.Conn
	r      *bufio.Reader
	id     string // of the server
	client string // as the server sees it
}

func open(ns string, from int, to netip.Addr) (*tcp, error) {
	c, err := dial(ns, "tcp", from, to, port)
	if err != nil {
		return nil, err
	}
	x := &tcp{Conn: c, r: bufio.NewReader(c)}
	c.SetDeadline(time.Now().Add(soon))
	s, err := x.r.ReadString('\n')
	if err != nil {
		c.Close()
		return nil, err
	}
	x.id, x.client, _ = strings.Cut(strings.TrimSpace(s), " ")
	return x, nil
}

func mustOpen(t *testing.T, ns string, from int, to netip.Addr) *tcp {
	t.Helper()
	c, err := open(ns, from, to)
	if err != nil {
		t.Fatalf("connect to %s: %v", to, err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// echo tells whether the connection still carries data.
func (c *tcp) echo(s string) error { return c.echoWithin(s, soon) }

func (c *tcp) echoWithin(s string, d time.Duration) error {
	c.SetDeadline(time.Now().Add(d))
	if _, err := c.Write([]byte(s + "\n")); err != nil {
		return err
	}
	got, err := c.r.ReadString('\n')
	if err == nil && got != s+"\n" {
		return fmt.Errorf("echo of %q is %q", s, got)
	}
	return err
}

// who makes one short connection. It ends with a reset, so that neither side
// keeps TIME_WAIT.
func who(ns string, to netip.Addr) (id, client string, err error) {
	c, err := open(ns, 0, to)
	if err != nil {
		return "", "", err
	}
	c.Conn.(*net.TCPConn).SetLinger(0)
	c.Close()
	return c.id, c.client, nil
}

// ask sends one datagram on a connected socket and returns the answer's parts.
func ask(c net.Conn, what string, wait time.Duration) (id, client, data string, err error) {
	c.SetDeadline(time.Now().Add(wait))
	if _, err := c.Write([]byte(what)); err != nil {
		return "", "", "", err
	}
	b := make([]byte, 2048)
	n, err := c.Read(b)
	if err != nil {
		return "", "", "", err
	}
	w := strings.SplitN(string(b[:n]), " ", 3)
	if len(w) != 3 {
		return "", "", "", fmt.Errorf("answer %q", b[:n])
	}
	return w[0], w[1], w[2], nil
}

// refused demands that err is a refusal, not a timeout.
func refused(t *testing.T, what string, start time.Time, err error, h Harness) {
	t.Helper()
	d := time.Since(start)
	if !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("%s: %v after %v, want it refused", what, err, d)
	} else if h.Native && d > 500*time.Millisecond {
		t.Errorf("%s: refused only after %v", what, d)
	}
}

// eventually waits for a condition.
func eventually(t *testing.T, what string, fn func() error) {
	t.Helper()
	end := time.Now().Add(2 * soon)
	for {
		err := fn()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func runTraffic(t *testing.T, h Harness) {
	for _, x := range []struct {
		name string
		n    int
		fn   func(*testing.T, *lab)
		v6   bool // also over IPv6
	}{
		{"balance", 4, testBalance, true},
		{"refuse", 2, testRefuse, true},
		{"drain", 4, testDrain, false},
		{"abrupt", 4, testAbrupt, true},
		{"udp", 4, testUDP, false},
		{"flips", 4, testFlips, false},
		{"one_source_port", 2, testOnePort, true},
		{"path_mtu", 2, testPMTU, true},
		{"sctp", 3, testSCTP, false},
	} {
		t.Run(x.name, func(t *testing.T) { x.fn(t, newLab(t, h, x.n, false)) })
		if x.v6 && (x.name == "balance" || !testing.Short()) {
			t.Run(x.name+"_ipv6", func(t *testing.T) { x.fn(t, newLab(t, h, x.n, true)) })
		}
	}
}

func testBalance(t *testing.T, l *lab) {
	l.service(2, 101, 102, 103)
	l.service(3, 101, 102, 103)
	l.converge()
	me := l.at(104).String()
	// Two services called in turn: each must be balanced by itself.
	count := map[int]map[string]int{2: {}, 3: {}}
	each := 50
	if testing.Short() {
		each = 15
	}
	for range 3 * each {
		for _, v := range []int{2, 3} {
			id, client, err := who(l.client(), l.at(v))
			if err != nil {
				t.Fatal(err)
			}
			if client != me {
				t.Errorf("server %s sees client %s, want %s", id, client, me)
			}
			count[v][id]++
		}
	}
	for v, c := range count {
		if c["1"] != each || c["2"] != each || c["3"] != each {
			t.Errorf("%d connections to %s went to %v, want %d each", 3*each, l.at(v), c, each)
		}
	}
	c := map[string]int{}
	for i := range 30 {
		// Ports of our own choice: the same one twice would be the same flow.
		u, err := dial(l.client(), "udp", 34000+i, l.at(2), port)
		if err != nil {
			t.Fatal(err)
		}
		id, client, data, err := ask(u, "hello", soon)
		u.Close()
		if err != nil || client != me || data != "hello" {
			t.Fatalf("udp: server %q, client %q, data %q, error %v", id, client, data, err)
		}
		c[id]++
	}
	if c["1"] != 10 || c["2"] != 10 || c["3"] != 10 {
		t.Errorf("30 UDP flows went to %v, want 10 each", c)
	}
	// Hairpin: a backend calls its own service.
	c = map[string]int{}
	for range 9 {
		id, client, err := who(l.ns[1], l.at(2))
		if err != nil {
			t.Fatalf("a backend calls its own service (so far %v): %v", c, err)
		}
		want := l.at(101).String()
		if id == "1" {
			want = l.hairpin()
		}
		if client != want {
			t.Errorf("server %s sees client %s, want %s", id, client, want)
		}
		c[id]++
	}
	if c["1"] != 3 || c["2"] != 3 || c["3"] != 3 {
		t.Errorf("9 connections of a backend went to %v, want 3 each", c)
	}
	for range 6 {
		u, err := dial(l.ns[1], "udp", 0, l.at(2), port)
		if err != nil {
			t.Fatal(err)
		}
		if id, _, _, err := ask(u, "hello", soon); err != nil {
			t.Errorf("udp of a backend to its own service: %v (server %s)", err, id)
		}
		u.Close()
	}
	In(t, l.client(), "ping -c 1 -W 5 "+l.at(2).String())
	// A restarted agent finds everything as it should be.
	live := mustOpen(t, l.client(), 0, l.at(2))
	l.dp = l.h.New(t)
	l.settled()
	if err := live.echo("still here"); err != nil {
		t.Error(err)
	}
}

func testRefuse(t *testing.T, l *lab) {
	l.service(2)
	l.service(3, 101)
	l.service(4, -101)
	l.converge()
	for v, p := range map[int]int{2: port, 3: port + 1, 4: port} {
		start := time.Now()
		_, err := dial(l.client(), "tcp", 0, l.at(v), p)
		refused(t, fmt.Sprintf("tcp to %s:%d", l.at(v), p), start, err, l.h)
		u, err := dial(l.client(), "udp", 0, l.at(v), p)
		if err != nil {
			t.Fatal(err)
		}
		start = time.Now()
		_, _, _, err = ask(u, "hello", soon)
		refused(t, fmt.Sprintf("udp to %s:%d", l.at(v), p), start, err, l.h)
		u.Close()
		In(t, l.client(), "ping -c 1 -W 5 "+l.at(v).String())
	}
	// A UDP client that keeps sending is served once there is a backend.
	u, err := dial(l.client(), "udp", 0, l.at(2), port)
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	for range 5 {
		start := time.Now()
		_, _, _, err = ask(u, "hello", soon)
		refused(t, "udp", start, err, l.h)
	}
	l.service(3)
	l.service(2, 101)
	l.converge()
	eventually(t, "udp after the first backend came", func() error {
		_, _, _, err := ask(u, "hello", time.Second)
		return err
	})
	// And a service that loses its last backend refuses, at once.
	l.service(2)
	l.converge()
	start := time.Now()
	_, err = dial(l.client(), "tcp", 0, l.at(2), port)
	refused(t, "tcp after the last backend went", start, err, l.h)
	l.remove(2)
	l.converge()
}

func testDrain(t *testing.T, l *lab) {
	l.service(2, 101, 102, 103)
	l.converge()
	live := map[string]*tcp{}
	for range 3 {
		c := mustOpen(t, l.client(), 0, l.at(2))
		live[c.id] = c
	}
	if len(live) != 3 {
		t.Fatalf("3 connections reached %v", live)
	}
	udp := map[string]net.Conn{}
	for range 3 {
		u, err := dial(l.client(), "udp", 0, l.at(2), port)
		if err != nil {
			t.Fatal(err)
		}
		defer u.Close()
		id, _, _, err := ask(u, "hello", soon)
		if err != nil {
			t.Fatal(err)
		}
		udp[id] = u
	}
	check := func(ids ...string) {
		t.Helper()
		for _, id := range ids {
			if err := live[id].echo("drain"); err != nil {
				t.Errorf("connection to %s: %v", id, err)
			}
			if got, _, _, err := ask(udp[id], "drain", soon); err != nil || got != id {
				t.Errorf("udp flow to %s went to %s: %v", id, got, err)
			}
		}
	}
	l.service(2, -101, 102, 103)
	l.converge()
	check("1", "2", "3")
	for range 10 {
		if id, _, err := who(l.client(), l.at(2)); err != nil || id == "1" {
			t.Errorf("new connection while 1 drains: server %s, error %v", id, err)
		}
	}
	l.service(2, -101, -102, -103)
	l.converge()
	check("1", "2", "3")
	start := time.Now()
	_, err := dial(l.client(), "tcp", 0, l.at(2), port)
	refused(t, "tcp while all drain", start, err, l.h)
	// Back again.
	l.service(2, 101, -102, -103)
	l.converge()
	check("1", "2", "3")
	if id, _, err := who(l.client(), l.at(2)); err != nil || id != "1" {
		t.Errorf("new connection when 1 is back: server %s, error %v", id, err)
	}
	// The service is removed, its tasks are still stopping.
	full := l.view
	l.service(2, -101, -102, -103)
	eps := l.view.Endpoints
	l.remove(2)
	l.view.Endpoints = eps
	l.converge()
	check("1", "2", "3")
	start = time.Now()
	_, err = dial(l.client(), "tcp", 0, l.at(2), port)
	refused(t, "tcp to a removed service", start, err, l.h)
	l.view = full
	l.converge()
	check("1", "2", "3")
	// Gone: what is left is reset; the others go on.
	l.service(2, 101, -103)
	l.converge()
	if err := live["2"].echo("gone"); err == nil {
		t.Error("the connection to a removed backend lives")
	} else if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the connection to a removed backend hangs instead of being reset")
	}
	check("1", "3")
}

func testAbrupt(t *testing.T, l *lab) {
	l.service(2, 101, 102, 103)
	l.service(3, 103)
	l.converge()
	live := map[string]*tcp{}
	for range 3 {
		c := mustOpen(t, l.client(), 0, l.at(2))
		live[c.id] = c
	}
	other := mustOpen(t, l.client(), 0, l.at(3))
	direct := mustOpen(t, l.client(), 0, l.at(103))
	l.service(2, 101, 102)
	l.converge()
	if err := live["3"].echo("gone"); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("connection to a removed backend: %v, want a reset", err)
	}
	for _, id := range []string{"1", "2"} {
		if err := live[id].echo("stays"); err != nil {
			t.Errorf("connection to %s: %v", id, err)
		}
	}
	// The same backend elsewhere is untouched.
	for _, c := range []*tcp{other, direct} {
		if err := c.echo("stays"); err != nil {
			t.Errorf("connection to another VIP of the backend, or to itself: %v", err)
		}
	}
	// The last backends, with the service.
	l.remove(2)
	l.converge()
	if err := live["1"].echoWithin("gone", 2*time.Second); err == nil {
		t.Error("a connection to a removed service lives although its backends are gone")
	}
}

func testUDP(t *testing.T, l *lab) {
	l.service(2, 101, 102)
	l.converge()
	u, err := dial(l.client(), "udp", 0, l.at(2), port)
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	id, _, _, err := ask(u, "hello", soon)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if again, _, _, err := ask(u, "hello", soon); err != nil || again != id {
			t.Fatalf("one flow reached %s, then %s: %v", id, again, err)
		}
	}
	// The flow's backend goes while the client keeps sending.
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		for ctx.Err() == nil {
			u.Write([]byte("noise"))
			time.Sleep(2 * time.Millisecond)
		}
	})
	stays := 101
	if id == "1" {
		stays = 102
	}
	l.service(2, stays)
	l.converge()
	cancel()
	wg.Wait()
	eventually(t, "udp after its backend went", func() error {
		got, _, data, err := ask(u, "moved", time.Second)
		if err == nil && (got == id || data != "moved") {
			return fmt.Errorf("still at %s (%s)", got, data)
		}
		return err
	})
}

func testFlips(t *testing.T, l *lab) {
	l.service(2, 101, 102, 103)
	l.converge()
	var done, failed atomic.Int64
	var first atomic.Value
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for ctx.Err() == nil {
				if _, _, err := who(l.client(), l.at(2)); err != nil {
					failed.Add(1)
					first.CompareAndSwap(nil, err.Error())
				}
				done.Add(1)
			}
		})
	}
	flips := 80
	if !l.h.Native {
		flips = 10
	}
	sets := [][]int{{101, -102, 103}, {-101, 102, 103}, {101, 102, -103}, {101, -102, -103}, {-101, -102, 103}, {101, 102, 103}}
	start := time.Now()
	for i := range flips {
		l.service(2, sets[i%len(sets)]...)
		l.pass()
		n := done.Load()
		for end := time.Now().Add(2 * soon); done.Load() < n+20 && time.Now().Before(end); {
			time.Sleep(time.Millisecond)
		}
	}
	d := time.Since(start)
	cancel()
	wg.Wait()
	t.Logf("%d connections during %d changes of the backends in %v (%.0f/s), %d failed", done.Load(), flips, d.Round(time.Millisecond),
		float64(done.Load())/d.Seconds(), failed.Load())
	if failed.Load() > 0 || done.Load() < int64(flips) {
		t.Errorf("%d of %d connections failed, the first with %v", failed.Load(), done.Load(), first.Load())
	}
	l.settled()
}

// testOnePort: a client uses one source port for a connection to a backend and
// for one to the VIP with that backend. To a server that sees the client's own
// address these could be one connection.
func testOnePort(t *testing.T, l *lab) {
	l.service(2, 101)
	l.converge()
	vip, backend := l.at(2), l.at(101)
	for i, order := range [][2]netip.Addr{{backend, vip}, {vip, backend}} {
		p := 40000 + 7000*i // two values of the port's upper bits
		a := mustOpen(t, l.client(), p, order[0])
		b, err := open(l.client(), p, order[1])
		if err != nil {
			t.Errorf("port %d to %s while it is used to %s: %v", p, order[1], order[0], err)
			continue
		}
		for range 3 {
			if err := a.echo("first"); err != nil {
				t.Errorf("connection to %s: %v", order[0], err)
			}
			if err := b.echo("second"); err != nil {
				t.Errorf("connection to %s: %v", order[1], err)
			}
		}
		b.Close()
		if err := a.echo("after the other's end"); err != nil {
			t.Errorf("connection to %s: %v", order[0], err)
		}
	}
	// One after the other: the first one's end must not be in the second's way.
	p := 45000
	for i, to := range []netip.Addr{vip, backend, vip, backend} {
		start := time.Now()
		c, err := open(l.client(), p, to)
		if err != nil {
			t.Errorf("connection %d of port %d, to %s: %v", i, p, to, err)
			break
		}
		if d := time.Since(start); l.h.Native && d > 500*time.Millisecond {
			t.Errorf("connection %d of port %d, to %s: took %v", i, p, to, d)
		}
		// The server ends it, so that the client's port is free again.
		c.Conn.(*net.TCPConn).CloseWrite()
		io.Copy(io.Discard, c.r)
		c.Conn.(*net.TCPConn).SetLinger(0)
		c.Close()
	}
	// UDP: one socket asks both; each answer comes from whom was asked.
	var pc net.PacketConn
	if err := nl.Do(l.client(), func() (err error) { pc, err = net.ListenPacket("udp", ":41000"); return err }); err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	b := make([]byte, 2048)
	for i, to := range []netip.Addr{vip, backend, vip, backend} {
		pc.SetDeadline(time.Now().Add(soon))
		pc.WriteTo([]byte("hello"), net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, port)))
		n, from, err := pc.ReadFrom(b)
		if err != nil || host(from) != to.String() {
			t.Errorf("udp %d: asked %s, answered by %v (%q): %v", i, to, from, b[:n], err)
		}
	}
}

// testPMTU: the way from the balancer to the backend is narrower than what
// both ends know of, so the client depends on an ICMP error that quotes its
// packet as it sent it.
func testPMTU(t *testing.T, l *lab) {
	l.service(2, 101)
	l.converge()
	Sh(t, "ip -n "+l.world.ns()+" link set v1 mtu 1300")
	c := mustOpen(t, l.client(), 43210, l.at(2))
	c.SetDeadline(time.Now().Add(3 * soon))
	var wg sync.WaitGroup
	const size = 300 << 10
	wg.Go(func() {
		line := strings.Repeat("x", 1023) + "\n"
		for range size / 1024 {
			if _, err := c.Write([]byte(line)); err != nil {
				t.Errorf("write: %v", err)
				return
			}
		}
	})
	// The server's own packets are as large as its link allows; the test's
	// narrow link takes no larger ones from it either.
	Sh(t, "ip -n "+l.ns[1]+" link set eth0 mtu 1300")
	n, err := io.CopyN(io.Discard, c.r, size)
	wg.Wait()
	if err != nil {
		t.Errorf("after %d of %d octets: %v", n, size, err)
	}
	if out := Sh(t, "ip -n "+l.client()+" route get "+l.at(2).String()+" from "+l.at(102).String()); !strings.Contains(out, "mtu 1300") {
		t.Errorf("the client did not learn the path's MTU: %s", out)
	}
}

// testSCTP: one association through the VIP to each backend.
func testSCTP(t *testing.T, l *lab) {
	exec.Command("modprobe", "sctp").Run()
	if fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_SCTP); err != nil {
		t.Skipf("missing: SCTP in this kernel (sctp module): %v", err)
	} else {
		unix.Close(fd)
	}
	l.service(2, 101, 102)
	l.converge()
	sock := func(ns string) int {
		var fd int
		err := nl.Do(ns, func() (err error) {
			fd, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		tv := unix.NsecToTimeval(soon.Nanoseconds())
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv)
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &tv)
		return fd
	}
	var wg sync.WaitGroup
	for i := 1; i <= 2; i++ {
		fd := sock(l.ns[i])
		if err := errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Port: port}), unix.Listen(fd, 8)); err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			defer unix.Close(fd)
			for range 2 {
				c, from, err := unix.Accept(fd)
				if err != nil {
					return
				}
				a := netip.AddrFrom4(from.(*unix.SockaddrInet4).Addr)
				unix.Write(c, fmt.Appendf(nil, "%d %s", i, a))
				unix.Close(c)
			}
		})
	}
	count := map[string]int{}
	for range 4 {
		fd := sock(l.client())
		err := unix.Connect(fd, &unix.SockaddrInet4{Port: port, Addr: addr(2).As4()})
		b := make([]byte, 100)
		n := 0
		if err == nil {
			n, err = unix.Read(fd, b)
		}
		unix.Close(fd)
		if err != nil {
			t.Errorf("sctp to the VIP: %v", err)
			break
		}
		count[string(b[:n])]++
	}
	wg.Wait()
	me := addr(103).String()
	if count["1 "+me] != 2 || count["2 "+me] != 2 {
		t.Errorf("4 SCTP associations: %v, want 2 with each server, from %s", count, me)
	}
}
