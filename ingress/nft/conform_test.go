package nft

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/shoalnet/shoal/ingress"
	"github.com/shoalnet/shoal/ingress/ingresstest"
	"github.com/shoalnet/shoal/overlay"
	"github.com/shoalnet/shoal/spec"
)

// world is one machine with the overlay's part made.
type world struct {
	t *testing.T
	n *node
}

func (w world) Dataplane() ingress.Dataplane {
	d := New(Config{Instance: w.n.instance, HostNetns: w.n.ns, Notices: notices(w.t, w.n.ns)})
	w.t.Cleanup(d.Close)
	return d
}

func (w world) View() *spec.View {
	return ingresstest.Sample(w.n.instance, spec.Underlay{Addr: w.n.addr, VXLANPort: 4789}, spec.MinVNI+9)
}

func (w world) Hold(port uint16, protocol string) func() {
	ln := listenTCP(w.t, w.n.ns, fmt.Sprintf(":%d", port))
	return func() { ln.Close() }
}

// in runs a command in an object's namespace.
func (w world) in(o ingress.Object, line string, args ...any) {
	w.t.Helper()
	ns := ingress.NetnsOf(o)
	if ns == "" {
		ns = w.n.ns
	}
	run(w.t, "ip netns exec "+ns+" "+line, args...)
}

// Break deletes an object with the tools that a person would use.
func (w world) Break(o ingress.Object) bool {
	table := ingress.TableName(w.n.instance)
	switch o := o.(type) {
	case ingress.HostTable:
		w.in(o, "nft delete table ip %s", table)
	case ingress.Localnet:
		w.in(o, "sysctl -qw net.ipv4.conf.%s.route_localnet=0", o.Dev)
	case ingress.Route:
		w.in(o, "ip route del %s dev %s", o.Addr, o.Dev)
	case ingress.Private:
		w.in(o, "nft delete element ip %s private { %s }", table, o.Addr)
	case ingress.Port:
		el, _ := portElems(o)
		k := fmt.Sprintf("%s . %d", o.Protocol, o.Published)
		if o.Addr.IsValid() {
			k = o.Addr.String() + " . " + k
		}
		w.in(o, "nft delete element ip %s %s { %s }", table, el.set, k)
	case ingress.Table:
		w.in(o, "nft flush chain ip %s marks", ingress.NetnsTable)
	case ingress.Node:
		w.in(o, "ip rule del fwmark %#x", nodeMark(o.Number))
	case ingress.Entry:
		w.in(o, "nft delete element ip %s published { %s . %s . %d }", ingress.NetnsTable, o.To.Addr(), o.Protocol, o.To.Port())
	case ingress.Local:
		w.in(o, "nft flush chain ip %s %s", ingress.NetnsTable, localChain(o))
	default:
		return false
	}
	return true
}

func (w world) Empty(t *testing.T) {
	t.Helper()
	var all strings.Builder
	names := []string{w.n.ns}
	for _, way := range ingress.Desired(w.View()).Ways {
		names = append(names, way.Netns)
	}
	for _, ns := range names {
		all.WriteString(run(t, "ip netns exec %s nft list tables", ns))
		all.WriteString(run(t, "ip -n %s rule", ns))
		all.WriteString(run(t, "ip -n %s route show table all proto %d", ns, ingress.RouteProtocol))
	}
	for l := range strings.Lines(all.String()) {
		if strings.Contains(l, "-ingress") || strings.Contains(l, "fwmark") || strings.Contains(l, "10.93.") || strings.Contains(l, "169.254.6") {
			t.Errorf("left: %s", l)
		}
	}
}

func newWorld(t *testing.T) world {
	l := newLab(t, "nft")
	w := world{t, l.nodes[0]}
	v := w.View()
	v.Sandboxes = nil
	converge(t, overlay.NewTarget(w.n.overlay), overlay.Desired(v))
	return w
}

func TestKernelConforms(t *testing.T) {
	needKernel(t)
	ingresstest.Run(t, func(t *testing.T) ingresstest.World { return newWorld(t) })
}

// TestBroken: damage of every kind is seen and mended.
func TestBroken(t *testing.T) {
	needKernel(t)
	w := newWorld(t)
	want := ingress.Desired(w.View())
	d := w.Dataplane()
	host, ovns := ingress.HostTable{}, ingress.Table{Netns: want.Ways[0].Netns}
	table := ingress.TableName(w.n.instance)
	if _, err := ingresstest.Pass(t, d, want); err != nil {
		t.Fatal(err)
	}
	// nft(8) aborts over what it can't show, whatever it was asked.
	w.in(host, "nft list ruleset")
	w.in(ovns, "nft list ruleset")
	for _, c := range []struct {
		in   ingress.Object
		line string
	}{
		{host, "nft flush ruleset"},
		{ovns, "nft flush ruleset"},
		{host, "nft flush chain ip " + table + " prerouting"},
		{host, "nft insert rule ip " + table + " output accept"},
		{host, "nft add table ip " + table + " { flags dormant ; }"},
		{host, "nft add chain ip " + table + " odd { type filter hook prerouting priority -400 ; policy drop ; }"},
		{host, "nft chain ip " + table + " private { policy drop ; }"},
		{ovns, "nft add table ip " + ingress.NetnsTable + " { flags dormant ; }"},
		{ovns, "nft add chain ip " + ingress.NetnsTable + " local-odd { type filter hook prerouting priority -400 ; policy drop ; }"},
		{host, "nft add element ip " + table + " nat { tcp . 99 }"},
		{host, "nft add element ip " + table + " ports { tcp . 99 : 10.93.1.9 . 1 }"},
		{host, "nft delete element ip " + table + " nat { sctp . 8081 }"},
		{host, "nft flush map ip " + table + " ports"},
		{host, "ip route flush proto 84"},
		{host, "ip route del unreachable 10.93.1.2 metric 16777216"},
		{host, "sysctl -qw net.netfilter.nf_conntrack_tcp_timeout_established=600"},
		{ovns, "nft delete table ip " + ingress.NetnsTable},
		{ovns, "nft flush map ip " + ingress.NetnsTable + " nodes"},
		{ovns, "nft flush map ip " + ingress.NetnsTable + " zones"},
		{ovns, "nft flush map ip " + ingress.NetnsTable + " local"},
		{ovns, "nft flush set ip " + ingress.NetnsTable + " published"},
		{ovns, "nft flush chain ip " + ingress.NetnsTable + " zones"},
		{ovns, "ip rule flush"},
		{ovns, "ip route flush table 1399324674"}, // ingress.TableBase + 2
	} {
		if strings.Contains(c.line, "ip rule flush") {
			// It takes the main table's rule along.
			c.line = fmt.Sprintf("ip rule del fwmark %#x", nodeMark(300))
		}
		w.in(c.in, "%s", c.line)
		if len(ingresstest.Plan(t, d, want)) == 0 && !strings.Contains(c.line, "route flush table") {
			t.Errorf("%s: not noticed", c.line)
		}
		for range 2 {
			if _, err := ingresstest.Pass(t, d, want); err != nil {
				t.Fatalf("%s: %v", c.line, err)
			}
		}
		if ops := ingresstest.Plan(t, d, want); len(ops) != 0 {
			t.Fatalf("%s: left %v", c.line, ops)
		}
	}
}

// TestForeign: what is not ours stays.
func TestForeign(t *testing.T) {
	needKernel(t)
	w := newWorld(t)
	d := w.Dataplane()
	v := w.View()
	run(t, "ip netns exec %s nft add table ip filter ; add chain ip filter FORWARD { type filter hook forward priority 0 ; policy accept ; } ; add table ip shoal-else ; add chain ip shoal-else x", w.n.ns)
	run(t, "ip -n %s route add 10.93.9.0/24 dev u0", w.n.ns)
	ls := func() string {
		return run(t, "ip netns exec %s nft list table ip filter", w.n.ns) + run(t, "ip netns exec %s nft list table ip shoal-else", w.n.ns) + run(t, "ip -n %s route show 10.93.9.0/24", w.n.ns)
	}
	before := ls()
	for range 2 {
		if _, err := ingresstest.Pass(t, d, ingress.Desired(v)); err != nil {
			t.Fatal(err)
		}
		v.Services, v.Sandboxes = nil, nil
	}
	if after := ls(); after != before {
		t.Errorf("a stranger's objects were\n%s\nand are\n%s", before, after)
	}
	// A route of another's where ours should be.
	run(t, "ip -n %s route add 10.93.1.2 dev u0", w.n.ns)
	_, err := ingresstest.Pass(t, d, ingress.Desired(w.View()))
	if err == nil || !strings.Contains(err.Error(), "not Shoal's") {
		t.Errorf("a stranger's route: %v", err)
	}
}

func TestElements(t *testing.T) {
	for _, a := range []netip.Addr{{}, netip.MustParseAddr("192.0.2.1")} {
		b, proto, port, ok := parseKey(key(a, spec.UDP, 8080))
		if b != a || proto != spec.UDP || port != 8080 || !ok {
			t.Error(b, proto, port, ok)
		}
	}
	to := netip.MustParseAddrPort("10.0.0.1:80")
	if got := parseTarget(target(to)); got != to {
		t.Error(got)
	}
	for _, b := range [][]byte{nil, {1}, make([]byte, 7), make([]byte, 13)} {
		if _, _, _, ok := parseKey(b); ok {
			t.Errorf("%v is a key", b)
		}
	}
}
