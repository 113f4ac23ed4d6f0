package nft

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/ingress"
	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/overlay"
	"github.com/shoalnet/shoal/overlay/vxlan"
	"github.com/shoalnet/shoal/reconcile"
	"github.com/shoalnet/shoal/spec"
	"github.com/shoalnet/shoal/vip"
	"github.com/shoalnet/shoal/vip/ipvs"
	vipnft "github.com/shoalnet/shoal/vip/nft"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// soon bounds what must happen at once, wide enough for an emulated machine.
const soon = 10 * time.Second

func strict() bool { return os.Getenv("SHOAL_TEST_STRICT") == "1" }

func needKernel(t *testing.T) {
	t.Helper()
	why := ""
	if os.Geteuid() != 0 {
		why = "needs root"
	}
	for _, tool := range []string{"ip", "nft"} {
		if _, err := exec.LookPath(tool); why == "" && err != nil {
			why = "needs the program " + tool
		}
	}
	if why == "" {
		if err := errors.Join(vxlan.Probe(), Probe()); err != nil {
			why = err.Error()
		}
	}
	switch {
	case why == "":
	case strict():
		t.Fatal(why)
	default:
		t.Skip(why)
	}
}

func run(t testing.TB, line string, args ...any) string {
	t.Helper()
	w := strings.Fields(fmt.Sprintf(line, args...))
	out, err := exec.Command(w[0], w[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(w, " "), err, out)
	}
	return string(out)
}

func addNetns(t testing.TB, name string) {
	t.Helper()
	if err := nl.Create(name); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := nl.Remove(name); err != nil {
			t.Error(err)
		}
	})
}

// Addresses of the lab. Its subnets are what nobody has on a wire here.
var (
	vip4   = netip.MustParseAddr("10.92.1.2")
	client = netip.MustParseAddr("192.0.2.100")
)

const (
	appID, webID  = "netapp222222", "svcweb222222"
	published     = 8080 // mode ingress, to 80
	publishedNAT  = 8081 // the same with NAT
	publishedHere = 8082 // mode local
	publishedHost = 8083 // mode host
	publishedLo   = 8084 // mode ingress, of 127.0.0.1 only
)

// node is a namespace that stands for a machine with an agent.
type node struct {
	l        *lab
	number   int
	id       string
	ns       string // the host's namespace
	instance string
	addr     netip.Addr
	overlay  *vxlan.Dataplane
	vip      vip.Dataplane
	ingress  *Dataplane
}

func (n *node) String() string { return fmt.Sprintf("node %d", n.number) }

// lab is three nodes and a client on one wire. Each node may have a replica of
// service web.
type lab struct {
	t       testing.TB
	prefix  string
	client  string // namespace
	nodes   []*node
	state   map[int]spec.EndpointState // of the replica on each node; absent: none
	ports   []spec.Port
	noPorts bool
}

func newLab(t *testing.T, datapath string) *lab {
	l := &lab{t: t, prefix: "ing" + spec.NewID()[:5], state: map[int]spec.EndpointState{}}
	l.ports = []spec.Port{
		{Published: published, Target: 80, Protocol: spec.TCP, Mode: spec.PortIngress},
		{Published: published, Target: 80, Protocol: spec.UDP, Mode: spec.PortIngress},
		{Published: publishedNAT, Target: 80, Protocol: spec.TCP, Mode: spec.PortIngress, NAT: true},
		{Published: publishedHere, Target: 80, Protocol: spec.TCP, Mode: spec.PortLocal},
		{Published: publishedHere, Target: 80, Protocol: spec.UDP, Mode: spec.PortLocal},
		{Published: publishedHere, Target: 80, Protocol: spec.SCTP, Mode: spec.PortLocal},
		{Published: publishedLo, Target: 80, Protocol: spec.TCP, Mode: spec.PortIngress, Addr: netip.MustParseAddr("127.0.0.1")},
	}
	bridge := l.prefix + "br"
	addNetns(t, bridge)
	run(t, "ip -n %s link add br0 type bridge", bridge)
	run(t, "ip -n %s link set br0 up", bridge)
	wire := func(ns string, i int, a netip.Addr) {
		addNetns(t, ns)
		run(t, "ip -n %s link add u0 type veth peer p%d netns %s", ns, i, bridge)
		run(t, "ip -n %s addr add %s/24 dev u0", ns, a)
		run(t, "ip -n %s link set u0 up", ns)
		run(t, "ip -n %s link set p%d master br0 up", bridge, i)
	}
	l.client = l.prefix + "c"
	wire(l.client, 100, client)
	for i := 1; i <= 3; i++ {
		n := &node{l: l, number: i, id: fmt.Sprintf("node%08d", i), ns: fmt.Sprintf("%sh%d", l.prefix, i), instance: fmt.Sprintf("%sn%d", l.prefix, i),
			addr: netip.AddrFrom4([4]byte{192, 0, 2, byte(i)})}
		wire(n.ns, i, n.addr)
		// A host that drops what comes by a way it would not answer by.
		run(t, "ip netns exec %s sysctl -qw net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.u0.rp_filter=1 net.ipv4.conf.default.rp_filter=1", n.ns)
		n.overlay = vxlan.New(vxlan.Config{Instance: n.instance, HostNetns: n.ns})
		n.ingress = New(Config{Instance: n.instance, HostNetns: n.ns, Notices: notices(t, n.ns)})
		switch datapath {
		case "nft":
			n.vip = vipnft.New(vipnft.Config{})
		case "ipvs":
			n.vip = ipvs.New(ipvs.Config{})
		}
		l.nodes = append(l.nodes, n)
		t.Cleanup(func() {
			n.ingress.Close()
			if err := errors.Join(n.ingress.Cleanup(), n.overlay.Cleanup()); err != nil {
				t.Error(err)
			}
			names, _ := nl.List(n.instance + "-")
			for _, ns := range names {
				if err := nl.Remove(ns); err != nil {
					t.Error(err)
				}
			}
		})
	}
	t.Cleanup(func() {
		if !t.Failed() || os.Getenv("SHOAL_TEST_DUMP") == "" {
			return
		}
		for _, n := range l.nodes {
			for _, ns := range []string{n.ns, n.ovns()} {
				for _, c := range []string{"nft list ruleset", "ip rule", "ip route show table all", "ip neigh", "conntrack -L"} {
					out, _ := exec.Command("ip", append([]string{"netns", "exec", ns}, strings.Fields(c)...)...).CombinedOutput()
					t.Logf("%s: %s:\n%s", ns, c, out)
				}
			}
		}
	})
	return l
}

func (l *lab) network() spec.Network {
	return spec.Network{ID: appID, Name: "app", Driver: spec.DriverOverlay, VNI: spec.MinVNI + 7,
		Subnets: []netip.Prefix{netip.MustParsePrefix("10.92.1.0/24")}, Gateways: []netip.Addr{netip.MustParseAddr("10.92.1.1")}}
}

func (n *node) ovns() string { return spec.OverlayNetns(n.instance, n.l.network()) }

func (n *node) taskAddr() netip.Addr { return netip.AddrFrom4([4]byte{10, 92, 1, byte(10 + n.number)}) }

func (n *node) taskNetns() string { return n.instance + "-task" }

// view is what n's agent would compose.
func (n *node) view() *spec.View {
	l := n.l
	v := &spec.View{Self: n.id, Instance: n.instance, Complete: true, Underlay: spec.Underlay{Addr: n.addr, VXLANPort: 4789}}
	v.Networks = []spec.Network{l.network()}
	svc := spec.Service{ID: webID, Spec: spec.ServiceSpec{Name: "web", EndpointMode: spec.EndpointModeVIP,
		Networks: []spec.NetworkAttachment{{Network: appID}}}, VIPs: []spec.VIPs{{Network: appID, Addrs: []netip.Addr{vip4}}}, Ingress: appID}
	if !l.noPorts {
		svc.Ports = l.ports
	}
	v.Services = []spec.Service{svc}
	for _, p := range l.nodes {
		v.Peers = append(v.Peers, spec.Peer{ID: p.id, Name: p.String(), Number: p.number, Addr: p.addr})
		st, ok := l.state[p.number]
		if !ok {
			continue
		}
		task := fmt.Sprintf("task%08d", p.number)
		v.Endpoints = append(v.Endpoints, spec.Endpoint{Task: task, Service: webID, Network: appID, Addrs: []netip.Addr{p.taskAddr()}, State: st, Node: p.id})
		if p == n {
			b := spec.Sandbox{Task: task, Name: fmt.Sprintf("web.%d", p.number), Netns: p.taskNetns(),
				Attachments: []spec.Attachment{{Network: appID, Addrs: []netip.Addr{p.taskAddr()}}}}
			if !l.noPorts {
				b.Ports = []spec.Port{{Published: publishedHost, Target: 80, Protocol: spec.TCP, Mode: spec.PortHost},
					{Published: publishedHost, Target: 80, Protocol: spec.UDP, Mode: spec.PortHost}}
			}
			v.Sandboxes = append(v.Sandboxes, b)
		}
	}
	v.Sort()
	return v
}

// pass observes, diffs and applies once, and tells how much there was to do.
func pass[S any](t testing.TB, target reconcile.Target[S, S], want S) (int, error) {
	t.Helper()
	ctx := context.Background()
	have, err := target.Observe(ctx, want)
	if err != nil {
		t.Fatalf("observe: %v", err)
	}
	ops, _ := target.Diff(want, have, time.Now())
	var errs []error
	for _, op := range ops {
		if err := target.Apply(ctx, op); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", op, err))
		}
	}
	return len(ops), errors.Join(errs...)
}

func converge[S any](t testing.TB, target reconcile.Target[S, S], want S) {
	t.Helper()
	var err error
	for range 5 {
		var n int
		if n, err = pass(t, target, want); err == nil && n == 0 {
			return
		}
	}
	have, _ := target.Observe(context.Background(), want)
	ops, _ := target.Diff(want, have, time.Now())
	t.Fatalf("no convergence: %v: left %v", err, ops)
}

// replicas sets which nodes have an active replica, and applies it.
func (l *lab) replicas(numbers ...int) {
	l.t.Helper()
	for _, n := range l.nodes {
		if !slices.Contains(numbers, n.number) {
			delete(l.state, n.number)
			continue
		}
		if _, ok := l.state[n.number]; !ok {
			if _, err := os.Stat(nl.Path(n.taskNetns())); err != nil {
				if err := nl.Create(n.taskNetns()); err != nil {
					l.t.Fatal(err)
				}
				serve(l.t, n.taskNetns(), 80, fmt.Sprint(n.number))
			}
		}
		l.state[n.number] = spec.EndpointActive
	}
	l.apply()
}

func (l *lab) apply() {
	l.t.Helper()
	for _, n := range l.nodes {
		n.apply()
	}
}

func (n *node) apply() {
	n.l.t.Helper()
	n.applyWires()
	converge(n.l.t, ingress.Target{Dataplane: n.ingress}, ingress.Desired(n.view()))
}

// applyWires applies all but the ingress.
func (n *node) applyWires() {
	n.l.t.Helper()
	v := n.view()
	converge(n.l.t, overlay.NewTarget(n.overlay), overlay.Desired(v))
	converge(n.l.t, vip.Target{Dataplane: n.vip}, vip.Desired(v))
}

// ---- servers and clients ----

// serve answers in ns until the test ends: over TCP with a line "ID client" and
// then everything it receives, over UDP each datagram with "ID client data".
func serve(t testing.TB, ns string, port int, id string) {
	t.Helper()
	var ln net.Listener
	var pc net.PacketConn
	err := nl.Do(ns, func() (err error) {
		if ln, err = net.Listen("tcp4", fmt.Sprintf(":%d", port)); err != nil {
			return err
		}
		pc, err = net.ListenPacket("udp4", fmt.Sprintf(":%d", port))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	open := map[net.Conn]bool{}
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			open[c] = true
			mu.Unlock()
			wg.Go(func() {
				fmt.Fprintf(c, "%s %s\n", id, hostOf(c.RemoteAddr()))
				_, _ = io.Copy(c, c)
				c.Close()
			})
		}
	})
	wg.Go(func() {
		b := make([]byte, 2048)
		for {
			n, from, err := pc.ReadFrom(b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				_, _ = pc.WriteTo(fmt.Appendf(nil, "%s %s %s", id, hostOf(from), b[:n]), from)
			}
		}
	})
	t.Cleanup(func() {
		ln.Close()
		pc.Close()
		mu.Lock()
		for c := range open {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
}

func hostOf(a net.Addr) string {
	p, _ := netip.ParseAddrPort(a.String())
	return p.Addr().Unmap().String()
}

// dial connects from a namespace; from is the source port, 0 for any.
func dial(ns, network string, from int, to string, port int) (net.Conn, error) {
	d := net.Dialer{Timeout: soon, Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) })
	}}
	if from != 0 {
		if d.LocalAddr = (&net.TCPAddr{Port: from}); network == "udp4" {
			d.LocalAddr = &net.UDPAddr{Port: from}
		}
	}
	var c net.Conn
	err := nl.Do(ns, func() (err error) {
		c, err = d.Dial(network, net.JoinHostPort(to, fmt.Sprint(port)))
		return err
	})
	return c, err
}

type tcpConn struct {
	net.Conn
	r      *bufio.Reader
	id     string // of the server
	client string // as the server sees it
}

func (c *tcpConn) echo(what string) error {
	_ = c.SetDeadline(time.Now().Add(soon))
	if _, err := fmt.Fprintln(c, what); err != nil {
		return err
	}
	got, err := c.r.ReadString('\n')
	if err == nil && got != what+"\n" {
		err = fmt.Errorf("got %q", got)
	}
	return err
}

func open(ns string, from int, to string, port int) (*tcpConn, error) {
	c, err := dial(ns, "tcp4", from, to, port)
	if err != nil {
		return nil, err
	}
	_ = c.SetDeadline(time.Now().Add(soon))
	x := &tcpConn{Conn: c, r: bufio.NewReader(c)}
	line, err := x.r.ReadString('\n')
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("connected, but: %w", err)
	}
	x.id, x.client, _ = strings.Cut(strings.TrimSpace(line), " ")
	return x, nil
}

// ask asks once and returns who answered, and the client's address it saw.
func ask(ns, network string, to string, port int) (id, from string, err error) {
	if network == "tcp4" {
		c, err := open(ns, 0, to, port)
		if err != nil {
			return "", "", err
		}
		defer c.Close()
		if err := c.echo("hello"); err != nil {
			return "", "", err
		}
		return c.id, c.client, nil
	}
	c, err := dial(ns, network, 0, to, port)
	if err != nil {
		return "", "", err
	}
	defer c.Close()
	return exchange(c, "hello")
}

func exchange(c net.Conn, what string) (id, from string, err error) {
	_ = c.SetDeadline(time.Now().Add(soon))
	if _, err := io.WriteString(c, what); err != nil {
		return "", "", err
	}
	b := make([]byte, 2048)
	n, err := c.Read(b)
	if err != nil {
		return "", "", err
	}
	f := strings.Fields(string(b[:n]))
	if len(f) != 3 || f[2] != what {
		return "", "", fmt.Errorf("got %q", b[:n])
	}
	return f[0], f[1], nil
}

// expect asks a few times and checks who answers and whom they see.
func expect(t testing.TB, ns, network, to string, port int, ids []string, from string) {
	t.Helper()
	seen := map[string]int{}
	for range 2 * len(ids) {
		id, client, err := ask(ns, network, to, port)
		if err != nil {
			t.Fatalf("%s %s:%d: %v", network, to, port, err)
		}
		if client != from {
			t.Fatalf("%s %s:%d: the server sees %s, not %s", network, to, port, client, from)
		}
		seen[id]++
	}
	for _, id := range ids {
		if seen[id] == 0 {
			t.Fatalf("%s %s:%d: answered by %v, not by %v", network, to, port, seen, ids)
		}
	}
	if len(seen) != len(ids) {
		t.Fatalf("%s %s:%d: answered by %v, not by %v", network, to, port, seen, ids)
	}
}

// refused checks that a port refuses at once.
func refused(t testing.TB, ns, network, to string, port int) {
	t.Helper()
	start := time.Now()
	_, _, err := ask(ns, network, to, port)
	if !errors.Is(err, syscall.ECONNREFUSED) {
		t.Fatalf("%s %s:%d: not refused: %v", network, to, port, err)
	}
	if d := time.Since(start); d > soon/2 {
		t.Fatalf("%s %s:%d: refused after %s", network, to, port, d)
	}
}

// refusedSCTP checks what a client without SCTP in its kernel can: that an
// INIT is answered by "protocol unreachable", the only refusal by ICMP that SCTP
// takes for one (RFC 9260 section 10).
func refusedSCTP(t testing.TB, ns string, to netip.Addr, port int) {
	t.Helper()
	p := make([]byte, 32) // common header (RFC 9260 section 3), INIT (3.3.2)
	binary.BigEndian.PutUint16(p, 40000)
	binary.BigEndian.PutUint16(p[2:], uint16(port))
	p[12] = 1
	binary.BigEndian.PutUint16(p[14:], 20)
	for at, v := range map[int]uint32{16: 1, 20: 1 << 16, 24: 1<<16 | 1, 28: 1} {
		binary.BigEndian.PutUint32(p[at:], v)
	}
	binary.LittleEndian.PutUint32(p[8:], crc32.Checksum(p, crc32.MakeTable(crc32.Castagnoli)))
	var c net.Conn
	err := nl.Do(ns, func() (err error) {
		c, err = net.Dial("ip4:132", to.String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(soon))
	if _, err := c.Write(p); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 100)); !errors.Is(err, unix.ENOPROTOOPT) {
		t.Errorf("SCTP %s:%d: not refused: %v", to, port, err)
	}
}

// notices are the kernel's, as an agent in a namespace hears them.
func notices(t testing.TB, host string) *nl.Notices {
	t.Helper()
	n, err := nl.Listen(host, overlay.VIPLabel)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.Close)
	return n
}
