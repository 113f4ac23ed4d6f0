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
			t.Logf("%s:\n%s", c, out[:min(len(out), 3000)])
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
	serveStream(t, ln, id)
	var wg sync.WaitGroup
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
		pc.Close()
		wg.Wait()
	})
}

// serveStream answers each connection with a line "ID client", and then with
// everything it receives, until the test ends.
func serveStream(t *testing.T, ln net.Listener, id string) {
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
	t.Cleanup(func() {
		ln.Close()
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
	if network == "sctp" {
		return dialSCTP(ns, from, to, port)
	}
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

// tcp is an open connection, of TCP or of SCTP.
type tcp struct {
	net.Conn
	r      *bufio.Reader
	id     string // of the server
	client string // as the server sees it
}

func open(ns string, from int, to netip.Addr) (*tcp, error) { return openWith(ns, "tcp", from, to) }

func openWith(ns, network string, from int, to netip.Addr) (*tcp, error) {
	c, err := dial(ns, network, from, to, port)
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
		{"fair", 8, testFair, false},
		{"refuse", 2, testRefuse, true},
		{"drain", 4, testDrain, false},
		{"abrupt", 4, testAbrupt, true},
		{"udp", 4, testUDP, false},
		{"flips", 4, testFlips, false},
		{"no_gap", 4, testNoGap, false},
		{"one_source_port", 2, testOnePort, true},
		{"path_mtu", 2, testPMTU, true},
		{"sctp", 4, testSCTP, true},
	} {
		t.Run(x.name, func(t *testing.T) { x.fn(t, newLab(t, h, x.n, false)) })
		if x.v6 && (x.name == "balance" || x.name == "sctp" || !testing.Short()) {
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

// testFair: a client that calls services in strict turn gets all replicas of
// each. With one counter for all services it would reach half of them.
func testFair(t *testing.T, l *lab) {
	l.service(2, 101, 102, 103)
	l.service(3, 104, 105, 106)
	l.service(4, 101, 102, 103, 104, 105, 106, 107)
	l.converge()
	// fair demands that the busiest of n replicas has at most 1.3 times what
	// the idlest has.
	fair := func(what string, count map[string]int, n int) {
		t.Helper()
		least, most := 1<<30, 0
		for _, c := range count {
			least, most = min(least, c), max(most, c)
		}
		if len(count) != n || 10*most > 13*least {
			t.Errorf("%s: %v: want %d replicas with a ratio of at most 1.3", what, count, n)
		}
		t.Logf("%s: least %d, most %d", what, least, most)
	}
	call := func(v int, count map[string]int) {
		t.Helper()
		id, _, err := who(l.client(), l.at(v))
		if err != nil {
			t.Fatal(err)
		}
		count[id]++
	}
	a, b := map[string]int{}, map[string]int{}
	for range 300 {
		call(2, a)
		call(3, b)
	}
	fair("300 calls of A, by turns with B", a, 3)
	fair("300 calls of B, by turns with A", b, 3)
	c := map[string]int{}
	for range 600 {
		call(4, c)
	}
	fair("600 calls of 7 replicas", c, 7)
	// Each balancer begins anywhere, not all with the same replica. That 16
	// random ones agree has a probability of 3^-15, one in 14 million.
	first := map[string]int{}
	for range 16 {
		l.service(5)
		l.pass()
		l.service(5, 101, 102, 103)
		l.pass()
		call(5, first)
	}
	if len(first) < 2 {
		t.Errorf("the first connection of 16 balancers went to %v", first)
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
	// The last backends, with the service: see vip.DelServer.
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
	// The very next datagram goes to a live backend. The answers to the noise
	// come first; nothing is sent twice.
	u.SetDeadline(time.Now().Add(soon))
	if _, err := u.Write([]byte("moved")); err != nil {
		t.Fatal(err)
	}
	for b := make([]byte, 2048); ; {
		n, err := u.Read(b)
		if err != nil {
			t.Fatalf("udp after its backend went: %v", err)
		}
		if got, data, _ := strings.Cut(string(b[:n]), " "); strings.HasSuffix(data, " moved") {
			if got == id {
				t.Errorf("still at %s", got)
			}
			break
		}
	}
	// And refused when there is none left, and served again.
	l.service(2)
	l.converge()
	start := time.Now()
	_, _, _, err = ask(u, "hello", soon)
	refused(t, "udp after the last backend went", start, err, l.h)
	l.service(2, 101)
	l.converge()
	if got, _, _, err := ask(u, "hello", soon); err != nil || got != "1" {
		t.Errorf("udp after a backend came back: server %q, error %v", got, err)
	}
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

// testNoGap: while the backends change, not one packet finds the VIP without any.
func testNoGap(t *testing.T, l *lab) {
	l.service(2, 101, 102, 103)
	l.converge()
	// Behind the balancer, so that nothing is ever confirmed as a connection, and
	// each datagram is balanced anew.
	In(t, l.world.ns(), "nft add table ip nogap ; add chain ip nogap forward { type filter hook forward priority 0 ; } ; "+
		"add rule ip nogap forward meta l4proto udp drop")
	changes := 150
	if !l.h.Native {
		changes = 10
	}
	sets := [][]int{{101, -102, 103}, {-101, 102, -103}, {101, 102, 103}}
	sent, refused := Flows(t, l.client(), netip.AddrPortFrom(l.at(2), port), func() {
		for i := range changes {
			l.service(2, sets[i%len(sets)]...)
			l.pass()
		}
	})
	t.Logf("%d flows during %d changes of the backends, %d refused", sent, changes, refused)
	if refused > 0 || sent < int64(changes) {
		t.Errorf("%d of %d flows were refused", refused, sent)
	}
	l.settled()
}

// Flows sends as many UDP flows of one datagram as it can from ns while fn runs,
// and counts those that were refused. A gap in what balances them may be less
// than a microsecond, so it takes very many; of UDP, because the refusal of a
// datagram is there when the call that sent it returns.
func Flows(t testing.TB, ns string, to netip.AddrPort, fn func()) (sent, refused int64) {
	flow := func() error {
		s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(s)
		if err := unix.Connect(s, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}); err != nil {
			return err
		}
		if _, err := unix.Write(s, []byte("hello")); err != nil {
			return err
		}
		if _, err := unix.Read(s, make([]byte, 64)); !errors.Is(err, unix.EAGAIN) {
			return err
		}
		return nil
	}
	var n, no atomic.Int64
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			err := nl.Do(ns, func() error {
				for ctx.Err() == nil {
					switch err := flow(); {
					case errors.Is(err, unix.ECONNREFUSED):
						no.Add(1)
					case err != nil:
						return err
					}
					n.Add(1)
				}
				return nil
			})
			if err != nil {
				t.Errorf("flow to %s: %v", to, err)
			}
		})
	}
	fn()
	cancel()
	wg.Wait()
	return n.Load(), no.Load()
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
	// Many at once, of all upper bits that ephemeral ports have.
	each := 100
	if !l.h.Native {
		each = 20
	}
	var slowest time.Duration
	failed := 0
	for i := range each {
		p := 32800 + i*(60999-32800)/each
		a, err := open(l.client(), p, backend)
		if err != nil {
			t.Fatalf("port %d to %s: %v", p, backend, err)
		}
		start := time.Now()
		b, err := open(l.client(), p, vip)
		slowest = max(slowest, time.Since(start))
		if err == nil {
			err = errors.Join(b.echo("second"), a.echo("first"))
			b.Conn.(*net.TCPConn).SetLinger(0)
			b.Close()
		}
		if err != nil {
			failed++
			t.Errorf("port %d to %s while it is used to %s: %v", p, vip, backend, err)
		}
		a.Conn.(*net.TCPConn).SetLinger(0)
		a.Close()
	}
	t.Logf("%d ports used both directly and by the VIP at once: %d failed, slowest second connection %v", each, failed, slowest)
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
	// In one write much more than a segment takes: a client slower than its
	// server would send small writes in packets of their own, which all pass.
	const size, chunk = 320 << 10, 32 << 10
	wg.Go(func() {
		b := []byte(strings.Repeat("x", chunk))
		for range size / chunk {
			if _, err := c.Write(b); err != nil {
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

func sockaddr(a netip.Addr, port int) (af int, sa unix.Sockaddr) {
	if a.Is4() {
		return unix.AF_INET, &unix.SockaddrInet4{Port: port, Addr: a.As4()}
	}
	return unix.AF_INET6, &unix.SockaddrInet6{Port: port, Addr: a.As16()}
}

// sctpSocket makes an SCTP socket in ns, bound to one address, so that it does
// not offer its peer others (SCTP is multi-homed, RFC 9260 section 5.1.2).
func sctpSocket(ns string, a netip.Addr, port int) (fd int, err error) {
	af, sa := sockaddr(a, port)
	err = nl.Do(ns, func() (err error) {
		fd, err = unix.Socket(af, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
		return err
	})
	if err != nil {
		return -1, fmt.Errorf("sctp socket: %w", err)
	}
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if err := unix.Bind(fd, sa); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("sctp bind to %s port %d: %w", a, port, err)
	}
	return fd, nil
}

// dialSCTP is dial for SCTP, which net does not know. It takes a socket that is
// made elsewhere for TCP, which does for reading, writing and closing.
func dialSCTP(ns string, from int, to netip.Addr, port int) (net.Conn, error) {
	local, err := addrOf(ns, to.Is4())
	if err != nil {
		return nil, err
	}
	fd, err := sctpSocket(ns, local, from)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "sctp")
	defer f.Close()
	// Not in one call that blocks: a signal of Go's scheduler would end it (connect(2), EINTR).
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, err
	}
	_, sa := sockaddr(to, port)
	err = unix.Connect(fd, sa)
	for end := time.Now().Add(soon); errors.Is(err, unix.EINPROGRESS) || errors.Is(err, unix.EINTR); {
		n, perr := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, int(max(0, time.Until(end).Milliseconds())))
		switch {
		case perr != nil: // EINTR
			err = perr
		case n == 0:
			err = unix.ETIMEDOUT
		default:
			var code int
			if code, err = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); err == nil && code != 0 {
				err = unix.Errno(code)
			}
			if err == unix.ENOPROTOOPT { // as connect(2) has it when it blocks: net/sctp/socket.c, sctp_wait_for_connect
				err = unix.ECONNREFUSED
			}
		}
	}
	if err != nil {
		return nil, fmt.Errorf("sctp connect to %s: %w", to, err)
	}
	return net.FileConn(f)
}

// addrOf is the address of eth0 in an endpoint's namespace.
func addrOf(ns string, is4 bool) (netip.Addr, error) {
	var out netip.Addr
	err := nl.Do(ns, func() error {
		dev, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		as, err := dev.Addrs()
		for _, a := range as {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is4() == is4 && !p.Addr().IsLinkLocalUnicast() {
				out = p.Addr()
			}
		}
		return err
	})
	if err == nil && !out.IsValid() {
		err = fmt.Errorf("namespace %s has no address", ns)
	}
	return out, err
}

func serveSCTP(t *testing.T, ns string, a netip.Addr, id string) {
	t.Helper()
	fd, err := sctpSocket(ns, a, port)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "sctp")
	defer f.Close()
	if err := unix.Listen(fd, 32); err != nil {
		t.Fatal(err)
	}
	ln, err := net.FileListener(f)
	if err != nil {
		t.Fatal(err)
	}
	serveStream(t, ln, id)
}

// testSCTP: what TCP and UDP are tested for, with associations of SCTP.
func testSCTP(t *testing.T, l *lab) {
	exec.Command("modprobe", "sctp").Run()
	if fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_SCTP); err != nil {
		if os.Getenv("SHOAL_TEST_VM") == "1" {
			t.Fatalf("SHOAL_TEST_VM=1 and there is no SCTP: %v", err)
		}
		t.Skipf("runs in the VM (needs SCTP): %v", err)
	} else {
		unix.Close(fd)
	}
	for i := 1; i <= 3; i++ {
		serveSCTP(t, l.ns[i], l.at(100+i), strconv.Itoa(i))
	}
	dials := func(ns string, v int) (*tcp, error) { return openWith(ns, "sctp", 0, l.at(v)) }
	must := func(ns string, v int) *tcp {
		t.Helper()
		c, err := dials(ns, v)
		if err != nil {
			t.Fatalf("sctp to %s: %v", l.at(v), err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	refuses := func(what string, v int) {
		t.Helper()
		start := time.Now()
		c, err := dials(l.client(), v)
		if err == nil {
			c.Close()
		}
		refused(t, "sctp to "+what, start, err, l.h)
	}
	l.service(2, 101, 102, 103)
	l.service(3)
	l.service(4, -103)
	l.converge()
	refuses("a VIP without a backend", 3)
	refuses("a VIP whose backends drain", 4)

	me := l.at(104).String()
	live, count := map[string]*tcp{}, map[string]int{}
	for range 6 {
		c := must(l.client(), 2)
		live[c.id] = c
		if c.client != me {
			t.Errorf("server %s sees client %s, want %s", c.id, c.client, me)
		}
		count[c.id]++
	}
	if count["1"] != 2 || count["2"] != 2 || count["3"] != 2 {
		t.Fatalf("6 SCTP associations went to %v, want 2 each", count)
	}
	// Hairpin.
	seen := map[string]bool{}
	for range 3 {
		c := must(l.ns[1], 2)
		if want := map[bool]string{true: l.hairpin(), false: l.at(101).String()}[c.id == "1"]; c.client != want {
			t.Errorf("server %s sees client %s, want %s", c.id, c.client, want)
		}
		seen[c.id] = true
	}
	if len(seen) != 3 {
		t.Errorf("3 associations of a backend went to %v", seen)
	}
	check := func(ids ...string) {
		t.Helper()
		for _, id := range ids {
			if err := live[id].echo("hello"); err != nil {
				t.Errorf("association with %s: %v", id, err)
			}
		}
	}
	l.service(2, -101, 102, 103)
	l.converge()
	check("1", "2", "3")
	for range 4 {
		if c := must(l.client(), 2); c.id == "1" {
			t.Error("a new association reached a draining backend")
		}
	}
	l.service(2, 102, 103)
	l.converge()
	if err := live["1"].echo("gone"); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("association with a removed backend: %v, want it aborted", err)
	}
	check("2", "3")
	l.service(2)
	l.converge()
	refuses("a VIP that lost its last backend", 2)
}
