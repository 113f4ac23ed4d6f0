package vip_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/shoalnet/shoal/reconcile"
	"github.com/shoalnet/shoal/spec"
	"github.com/shoalnet/shoal/vip"
	"github.com/shoalnet/shoal/vip/viptest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	netA = spec.Network{ID: "aaa", Name: "app", Driver: spec.DriverOverlay, VNI: spec.MinVNI,
		Subnets:  []netip.Prefix{netip.MustParsePrefix("10.0.1.0/24"), netip.MustParsePrefix("fd00:1::/64")},
		Gateways: []netip.Addr{netip.MustParseAddr("10.0.1.1"), netip.MustParseAddr("fd00:1::1")}}
	netB = spec.Network{ID: "bbb", Name: "db", Driver: spec.DriverOverlay, VNI: spec.MinVNI + 1,
		Subnets: []netip.Prefix{netip.MustParsePrefix("10.0.2.0/24")}, Gateways: []netip.Addr{netip.MustParseAddr("10.0.2.1")}}
)

func ip(s string) netip.Addr { return netip.MustParseAddr(s) }

// text is a State as lines, for tables.
func text(s vip.State) string {
	var b strings.Builder
	for _, n := range s.Networks {
		fmt.Fprintf(&b, "%s %s local=%v orphans=%v\n", n.Name, n.Namespace, n.Locals, n.Orphans)
		for _, v := range n.Servers {
			fmt.Fprintf(&b, "  %s %#x %s %v\n", v.VIP, v.Mark, v.Name, v.Backends)
		}
	}
	return b.String()
}

func svc(id, mode string, vips ...spec.VIPs) spec.Service {
	return spec.Service{ID: id, Spec: spec.ServiceSpec{Name: id, EndpointMode: mode}, VIPs: vips}
}

func ep(task, service, network, node string, st spec.EndpointState, addrs ...string) spec.Endpoint {
	e := spec.Endpoint{Task: task, Service: service, Network: network, Node: node, State: st}
	for _, a := range addrs {
		e.Addrs = append(e.Addrs, ip(a))
	}
	return e
}

func TestDesired(t *testing.T) {
	peers := []spec.Peer{{ID: "n1"}, {ID: "n2"}, {ID: "n3", Liveness: spec.PeerSuspect}, {ID: "n4", Liveness: spec.PeerDead},
		{ID: "n5", Dark: true}, {ID: "n6", Dark: true, Liveness: spec.PeerSuspect}}
	web := svc("web", spec.EndpointModeVIP, spec.VIPs{Network: "aaa", Addrs: []netip.Addr{ip("10.0.1.2"), ip("fd00:1::2")}})
	for _, c := range []struct {
		name string
		view spec.View
		want string
	}{
		{"empty", spec.View{Networks: []spec.Network{netA}}, "app i-net-app-aaa local=[] orphans=[]\n"},
		{"weights and families", spec.View{Networks: []spec.Network{netA}, Services: []spec.Service{web}, Endpoints: []spec.Endpoint{
			ep("t1", "web", "aaa", "n1", spec.EndpointActive, "10.0.1.11", "fd00:1::11"),
			ep("t2", "web", "aaa", "n2", spec.EndpointDraining, "10.0.1.12"),
			ep("t3", "web", "aaa", "n3", spec.EndpointActive, "10.0.1.13"),
			ep("t4", "web", "aaa", "n4", spec.EndpointActive, "10.0.1.14"),
			ep("t5", "web", "aaa", "n1", spec.EndpointStarting, "10.0.1.15"),
			ep("t6", "web", "bbb", "n1", spec.EndpointActive, "10.0.2.16"),
			ep("t7", "", "aaa", "n1", spec.EndpointActive, "10.0.1.17"),
		}}, "app i-net-app-aaa local=[10.0.1.11 10.0.1.17 fd00:1::11] orphans=[]\n" +
			"  10.0.1.2 0x10000002 web [{10.0.1.11 1} {10.0.1.12 0} {10.0.1.13 0}]\n" +
			"  fd00:1::2 0x11000002 web [{fd00:1::11 1}]\n"},
		{"only suspects", spec.View{Networks: []spec.Network{netA}, Services: []spec.Service{web}, Endpoints: []spec.Endpoint{
			ep("t1", "web", "aaa", "n3", spec.EndpointActive, "10.0.1.11"),
			ep("t2", "web", "aaa", "n9", spec.EndpointActive, "10.0.1.12"),
			ep("t3", "web", "aaa", "n1", spec.EndpointDraining, "10.0.1.13"),
		}}, "app i-net-app-aaa local=[10.0.1.13] orphans=[]\n" +
			"  10.0.1.2 0x10000002 web [{10.0.1.11 1} {10.0.1.12 1} {10.0.1.13 0}]\n  fd00:1::2 0x11000002 web []\n"},
		{"a node that is not reached is avoided", spec.View{Networks: []spec.Network{netA}, Services: []spec.Service{web}, Endpoints: []spec.Endpoint{
			ep("t1", "web", "aaa", "n2", spec.EndpointActive, "10.0.1.11"),
			ep("t2", "web", "aaa", "n5", spec.EndpointActive, "10.0.1.12", "fd00:1::12"),
			ep("t3", "web", "aaa", "n6", spec.EndpointDraining, "fd00:1::13"),
		}}, "app i-net-app-aaa local=[] orphans=[]\n" +
			"  10.0.1.2 0x10000002 web [{10.0.1.11 1} {10.0.1.12 0}]\n  fd00:1::2 0x11000002 web [{fd00:1::12 1} {fd00:1::13 0}]\n"},
		{"and more so than one that is suspected", spec.View{Networks: []spec.Network{netA}, Services: []spec.Service{web}, Endpoints: []spec.Endpoint{
			ep("t1", "web", "aaa", "n3", spec.EndpointActive, "10.0.1.11"),
			ep("t2", "web", "aaa", "n5", spec.EndpointActive, "10.0.1.12", "fd00:1::12"),
			ep("t3", "web", "aaa", "n6", spec.EndpointActive, "fd00:1::13"),
		}}, "app i-net-app-aaa local=[] orphans=[]\n" +
			"  10.0.1.2 0x10000002 web [{10.0.1.11 1} {10.0.1.12 0}]\n  fd00:1::2 0x11000002 web [{fd00:1::12 1} {fd00:1::13 1}]\n"},
		{"one family's suspects are not the other's", spec.View{Networks: []spec.Network{netA}, Services: []spec.Service{web}, Endpoints: []spec.Endpoint{
			ep("t1", "web", "aaa", "n1", spec.EndpointActive, "10.0.1.11"),
			ep("t2", "web", "aaa", "n3", spec.EndpointActive, "10.0.1.12", "fd00:1::12"),
		}}, "app i-net-app-aaa local=[10.0.1.11] orphans=[]\n" +
			"  10.0.1.2 0x10000002 web [{10.0.1.11 1} {10.0.1.12 0}]\n  fd00:1::2 0x11000002 web [{fd00:1::12 1}]\n"},
		{"dnsrr, orphans, nonsense", spec.View{Networks: []spec.Network{netA, netB}, Services: []spec.Service{
			svc("rr", spec.EndpointModeDNSRR, spec.VIPs{Network: "aaa", Addrs: []netip.Addr{ip("10.0.1.3")}}),
			svc("a", spec.EndpointModeVIP, spec.VIPs{Network: "aaa", Addrs: []netip.Addr{ip("10.0.1.4"), ip("10.9.9.9"), ip("10.0.1.1"), {}}}),
			svc("b", spec.EndpointModeVIP, spec.VIPs{Network: "aaa", Addrs: []netip.Addr{ip("10.0.1.4")}}),
		}, Endpoints: []spec.Endpoint{
			ep("t1", "a", "aaa", "n1", spec.EndpointActive, "10.0.1.1", "10.0.1.4", "10.7.7.7"),
			{Task: "t2", Service: "a", Network: "aaa", Node: "n1", State: 77, Addrs: []netip.Addr{{}, ip("10.0.1.20")}},
			ep("t3", "gone", "aaa", "n2", spec.EndpointDraining, "10.0.1.30"),
			ep("t4", "a", "aaa", "n1", spec.EndpointDraining, "10.0.1.40"),
			ep("t5", "a", "aaa", "n2", spec.EndpointActive, "10.0.1.40"),
		}}, "app i-net-app-aaa local=[10.0.1.20 10.0.1.40] orphans=[10.0.1.30]\n  10.0.1.4 0x10000004 a [{10.0.1.40 1}]\n" +
			"db i-net-db-bbb local=[] orphans=[]\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.view.Self, c.view.Instance, c.view.Peers = "n1", "i", peers
			c.view.Sort()
			if got := text(vip.Desired(&c.view)); got != c.want {
				t.Errorf("got\n%swant\n%s", got, c.want)
			}
		})
	}
}

// drawView draws a View, not always a sane one.
func drawView(t *rapid.T, label string) *spec.View {
	v := &spec.View{Self: "n1", Instance: "i", Complete: rapid.IntRange(0, 3).Draw(t, label+" complete") > 0}
	for i := 1; i <= 4; i++ {
		v.Peers = append(v.Peers, spec.Peer{ID: fmt.Sprintf("n%d", i), Liveness: spec.Liveness(rapid.IntRange(0, 2).Draw(t, "liveness")),
			Dark: i > 1 && rapid.Bool().Draw(t, "dark")})
	}
	v.Networks = []spec.Network{netA, netB}[:rapid.IntRange(0, 2).Draw(t, "networks")]
	at := func(host int) []netip.Addr {
		return []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 1, byte(host)}), netip.AddrFrom4([4]byte{10, 0, 2, byte(host)}),
			netip.AddrFrom16([16]byte{0: 0xfd, 3: 1, 15: byte(host)})}
	}
	for i := range rapid.IntRange(0, 4).Draw(t, "services") {
		vs := at(rapid.IntRange(0, 8).Draw(t, "vip"))
		v.Services = append(v.Services, svc(fmt.Sprintf("s%d", i), rapid.SampledFrom([]string{"vip", "vip", "vip", "dnsrr"}).Draw(t, "mode"),
			spec.VIPs{Network: "aaa", Addrs: []netip.Addr{vs[0], vs[2]}}, spec.VIPs{Network: "bbb", Addrs: vs[1:2]}))
	}
	for i := range rapid.IntRange(0, 12).Draw(t, "endpoints") {
		as := at(rapid.IntRange(0, 24).Draw(t, "addr"))
		e := spec.Endpoint{Task: fmt.Sprintf("t%d", i), Service: rapid.SampledFrom([]string{"s0", "s1", "s2", "s3", ""}).Draw(t, "service"),
			Node:  fmt.Sprintf("n%d", rapid.IntRange(1, 5).Draw(t, "node")),
			State: spec.EndpointState(rapid.IntRange(0, 2).Draw(t, "state"))}
		if e.Network = rapid.SampledFrom([]string{"aaa", "bbb"}).Draw(t, "network"); e.Network == "aaa" {
			e.Addrs = []netip.Addr{as[0], as[2]}
		} else {
			e.Addrs = as[1:2]
		}
		v.Endpoints = append(v.Endpoints, e)
	}
	v.Sort()
	return v
}

func TestDesiredProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		v := drawView(t, "v")
		st := vip.Desired(v)
		if again := vip.Desired(v); !reflect.DeepEqual(st, again) {
			t.Fatalf("not deterministic:\n%s%s", text(st), text(again))
		}
		for _, n := range st.Networks {
			for _, s := range n.Servers {
				if a, ok := n.VIPOf(s.Mark); !ok || a != s.VIP {
					t.Fatalf("mark %#x of %s is that of %s", s.Mark, s.VIP, a)
				}
				// Never emptied on gossip alone.
				active := false
				for _, e := range v.Endpoints {
					p, known := v.Peer(e.Node)
					dead := known && p.Liveness == spec.PeerDead && e.Node != v.Self
					for _, a := range e.Addrs {
						if e.Service == s.Service && e.Network == n.ID && e.State == spec.EndpointActive && !dead {
							_, is := s.Backend(a)
							active = active || is
						}
					}
				}
				if active != (len(s.Takes()) > 0) {
					t.Fatalf("%s: has active endpoints: %v, takes connections: %v", s.VIP, active, s.Takes())
				}
			}
		}
	})
}

func apply(t *rapid.T, f *viptest.Fake, ops []reconcile.Op) {
	for _, op := range ops {
		if err := f.Apply(context.Background(), op); err != nil {
			t.Fatalf("%s: %v", op, err)
		}
	}
}

func diff(t *rapid.T, f *viptest.Fake, want vip.State) []reconcile.Op {
	have, err := f.Observe(context.Background(), want)
	if err != nil {
		t.Fatal(err)
	}
	ops, next := vip.Diff(want, have, time.Unix(0, 0))
	if !next.IsZero() {
		t.Fatalf("next is %v", next)
	}
	for _, op := range ops {
		if !strings.HasPrefix(op.Object(), "network app: ") && !strings.HasPrefix(op.Object(), "network db: ") {
			t.Fatalf("object %q", op.Object())
		}
		if !strings.HasPrefix(op.String(), op.Object()) {
			t.Fatalf("operation %q of object %q", op, op.Object())
		}
	}
	return ops
}

// TestDiffProperties: from any state, through any prefix of a pass and any
// damage, one complete pass leads to what is wanted; a second has nothing to do;
// an incomplete view removes nothing.
func TestDiffProperties(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		f := &viptest.Fake{}
		for _, ns := range []string{"i-net-app-aaa", "i-net-db-bbb"} {
			f.AddNamespace(ns)
		}
		for i := range rapid.IntRange(1, 4).Draw(t, "views") {
			want := vip.Desired(drawView(t, fmt.Sprintf("v%d", i)))
			ops := diff(t, f, want)
			seen := map[string]bool{}
			for _, op := range ops {
				if seen[op.Object()] {
					t.Fatalf("two operations on %s", op.Object())
				}
				seen[op.Object()] = true
			}
			if n := rapid.IntRange(0, len(ops)).Draw(t, "cut"); n < len(ops) {
				apply(t, f, ops[:n])
				if rapid.Bool().Draw(t, "damage") && len(want.Networks) > 0 && len(want.Networks[0].Servers) > 0 {
					n := want.Networks[0]
					f.Break(n.Namespace, rapid.SampledFrom([]string{viptest.BreakTable, viptest.BreakAddress, viptest.BreakElement,
						viptest.BreakServer, viptest.BreakBackend}).Draw(t, "what"), n.Servers[0].VIP)
				}
				ops = diff(t, f, want)
			}
			before := f.Dump()
			apply(t, f, ops)
			if left := diff(t, f, want); len(left) > 0 {
				t.Fatalf("after a pass, left to do: %v\nwant\n%sbefore\n%sis\n%s", left, text(want), before, f.Dump())
			}
			apply(t, f, ops) // again, to no effect
			if left := diff(t, f, want); len(left) > 0 {
				t.Fatalf("after the same operations twice, left to do: %v", left)
			}
			if !want.Complete {
				is := f.Dump()
				for _, l := range strings.Split(before, "\n") {
					// What is a VIP is no backend.
					if a, ok := strings.CutPrefix(strings.TrimSpace(l), "backend "); ok && strings.Contains(is, "server "+strings.Fields(a)[0]+" ") {
						continue
					}
					if k, _, _ := strings.Cut(strings.TrimSpace(l), " weight"); !strings.Contains(l, "server") && !strings.Contains(l, "namespace") && !strings.Contains(is, k) {
						t.Fatalf("an incomplete view removed %q:\n%s", l, is)
					}
				}
				continue
			}
			have, _ := f.Observe(context.Background(), want)
			for i, n := range want.Networks {
				for _, s := range n.Servers {
					hs, ok := have.Networks[i].Server(s.VIP)
					if !ok || !slices.Equal(hs.Backends, s.Backends) || hs.Open != (len(s.Takes()) > 0) {
						t.Fatalf("%s is %+v, want %+v", s.VIP, hs, s)
					}
				}
				for _, s := range have.Networks[i].Servers {
					if _, ok := n.Server(s.VIP); ok {
						continue
					}
					for _, b := range s.Backends {
						if !slices.Contains(n.Orphans, b.Addr) || b.Weight != 0 {
							t.Fatalf("server %s of no service has backend %v", s.VIP, b)
						}
					}
				}
			}
		}
	})
}

// TestAnAddressBecomesAVIP: a backend of before whose address is a service's by now is
// none, though the View that says so is not complete. A server that was to be made anew
// with it failed for as long as that lasted.
func TestAnAddressBecomesAVIP(t *testing.T) {
	v := &spec.View{Self: "n1", Instance: "i", Peers: []spec.Peer{{ID: "n1"}}, Networks: []spec.Network{netB},
		Services: []spec.Service{svc("a", "vip", spec.VIPs{Network: "bbb", Addrs: []netip.Addr{ip("10.0.2.4")}}), svc("b", "vip", spec.VIPs{Network: "bbb", Addrs: []netip.Addr{ip("10.0.2.7")}})}}
	old := []vip.Backend{{Addr: ip("10.0.2.7"), Weight: 1}, {Addr: ip("10.0.2.8"), Weight: 1}}
	ops, _ := vip.Diff(vip.Desired(v), vip.State{Networks: []vip.Network{{ID: "bbb", Servers: []vip.Server{{VIP: ip("10.0.2.4"), Backends: old, Open: true}}}}}, time.Time{})
	var got []string
	for _, op := range ops {
		got = append(got, op.String())
	}
	want := []string{"network db: vip 10.0.2.4: service a, backends 10.0.2.8", "network db: vip 10.0.2.7: service b, backends none"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// TestOrder: what others need comes first, deletions last.
func TestOrder(t *testing.T) {
	v := &spec.View{Self: "n1", Instance: "i", Complete: true, Peers: []spec.Peer{{ID: "n1"}}, Networks: []spec.Network{netB},
		Services:  []spec.Service{svc("web", "vip", spec.VIPs{Network: "bbb", Addrs: []netip.Addr{ip("10.0.2.2")}})},
		Endpoints: []spec.Endpoint{ep("t1", "web", "bbb", "n1", spec.EndpointActive, "10.0.2.9"), ep("t2", "web", "bbb", "n1", spec.EndpointDraining, "10.0.2.10")}}
	have := vip.State{Networks: []vip.Network{{ID: "bbb", Fault: "table is missing", Servers: []vip.Server{
		{VIP: ip("10.0.2.2"), Backends: []vip.Backend{{Addr: ip("10.0.2.8"), Weight: 1}}, Open: true, Fault: "address is missing"}, {VIP: ip("10.0.2.3")}}}}}
	ops, _ := vip.Diff(vip.Desired(v), have, time.Time{})
	var got []string
	for _, op := range ops {
		got = append(got, op.String())
	}
	want := []string{
		"network db: vip table: set, hairpin of 10.0.2.9 10.0.2.10 (table is missing)",
		"network db: vip 10.0.2.2: service web, backends 10.0.2.9 10.0.2.10(drain) (address is missing)",
		"network db: vip 10.0.2.3: remove",
	}
	if !slices.Equal(got, want) {
		t.Errorf("operations\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if r := ops[1].(vip.SetServer).Removed(); !slices.Equal(r, []netip.Addr{ip("10.0.2.8")}) {
		t.Errorf("removed %v", r)
	}
}

// TestLoop runs the fake under the real loop, with faults.
func TestLoop(t *testing.T) {
	f := &viptest.Fake{}
	f.AddNamespace("i-net-app-aaa")
	fails := 3
	f.Fail = func(op reconcile.Op) error {
		if s, ok := op.(vip.SetServer); ok && s.Want.VIP == ip("10.0.1.2") && fails > 0 {
			fails--
			return errors.New("boom")
		}
		return nil
	}
	passes := make(chan reconcile.Pass, 1000)
	l := reconcile.New("vip", vip.Target{Dataplane: f}, reconcile.Options{OnPass: func(p reconcile.Pass) { passes <- p }})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { l.Run(ctx); close(done) }()
	defer func() { cancel(); <-done }()
	wait := func(gen uint64) {
		t.Helper()
		for end := time.After(20 * time.Second); l.Applied() < gen; {
			select {
			case <-passes:
			case <-end:
				t.Fatalf("generation %d was not applied; status %+v", gen, l.Status())
			}
		}
	}
	v := &spec.View{Self: "n1", Instance: "i", Complete: true, Peers: []spec.Peer{{ID: "n1"}}, Networks: []spec.Network{netA}}
	wait(l.Set(vip.Desired(v)))
	v2 := *v
	v2.Services = []spec.Service{svc("web", "vip", spec.VIPs{Network: "aaa", Addrs: []netip.Addr{ip("10.0.1.2")}}),
		svc("api", "vip", spec.VIPs{Network: "aaa", Addrs: []netip.Addr{ip("10.0.1.3")}})}
	v2.Sort()
	wait(l.Set(vip.Desired(&v2)))
	if fails != 0 || strings.Count(f.Dump(), "server") != 2 {
		t.Errorf("%d failures left, state\n%s", fails, f.Dump())
	}
}
