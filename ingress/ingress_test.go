package ingress_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/shoalnet/shoal/ingress"
	"github.com/shoalnet/shoal/ingress/ingresstest"
	"github.com/shoalnet/shoal/overlay"
	"github.com/shoalnet/shoal/spec"
)

func sample() *spec.View {
	return ingresstest.Sample("shoal", spec.Underlay{Addr: netip.MustParseAddr("192.0.2.1"), VXLANPort: 4789}, spec.MinVNI)
}

const all = `host
  table shoal-ingress, this node is 192.0.2.1
  route_localnet of shonetapp444444
  host route 10.93.1.2 via 169.254.176.1 dev shonetapp444444
  private 10.93.1.2
  port 127.0.0.1:8082/tcp to 10.93.1.2:82 with NAT
  port 8080/tcp to 10.93.1.2:80
  port 8080/udp to 10.93.1.2:80
  port 8081/sctp to 10.93.1.2:81 with NAT
  port 8083/tcp to 169.254.176.1:8083
  port 8084/tcp to 169.254.176.1:8084
shoal-net-app-netapp
  table shoal-ingress for 10.93.1.0/24, own address 169.254.176.1
  entry 10.93.1.2:80/tcp
  entry 10.93.1.2:80/udp
  entry 10.93.1.2:81/sctp
  entry 10.93.1.2:82/tcp
  entry 169.254.176.1:8083/tcp
  entry 169.254.176.1:8084/tcp
  local balancer 8083/tcp to 10.93.1.10 10.93.1.11 port 83, draining 10.93.1.12
  local balancer 8084/tcp to 10.93.1.10 port 84
  replies to node 2 via 169.254.64.2
  replies to node 300 via 169.254.65.44 mtu 1350
`

func TestDesired(t *testing.T) {
	for name, c := range map[string]struct {
		change func(v *spec.View)
		want   string // the whole; or, with + and -, the lines that come and go
	}{
		"all":          {func(*spec.View) {}, all},
		"unknown self": {func(v *spec.View) { v.Self = "x" }, ""},
		"no ports":     {func(v *spec.View) { v.Services[0].Ports, v.Sandboxes = nil, nil }, ""},
		"no network": {func(v *spec.View) {
			v.Networks = nil
		}, ""},
		"no VIP": {func(v *spec.View) {
			v.Services[0].VIPs = nil
			v.Sandboxes = nil
			v.Services[0].Ports = v.Services[0].Ports[:3]
		}, ""},
		"internal": {func(v *spec.View) {
			v.Networks[0].Internal = true
		}, ""},
		"IPv6 underlay": {func(v *spec.View) { v.Underlay.Addr = netip.MustParseAddr("2001:db8::1") },
			"-  table shoal-ingress, this node is 192.0.2.1\n+  table shoal-ingress\n" +
				"-  replies to node 300 via 169.254.65.44 mtu 1350\n+  replies to node 300 via 169.254.65.44 mtu 1330\n"},
		"host mode drains": {func(v *spec.View) { v.Endpoints[0].State = spec.EndpointDraining },
			"-  local balancer 8084/tcp to 10.93.1.10 port 84\n+  local balancer 8084/tcp to nothing port 84, draining 10.93.1.10\n" +
				"-  local balancer 8083/tcp to 10.93.1.10 10.93.1.11 port 83, draining 10.93.1.12\n" +
				"+  local balancer 8083/tcp to 10.93.1.11 port 83, draining 10.93.1.10 10.93.1.12\n"},
		"no local replica": {func(v *spec.View) { v.Endpoints = v.Endpoints[4:] },
			"-  local balancer 8083/tcp to 10.93.1.10 10.93.1.11 port 83, draining 10.93.1.12\n+  local balancer 8083/tcp to nothing port 83\n"},
		"same port twice": {func(v *spec.View) {
			v.Sandboxes[0].Ports[0].Published, v.Sandboxes[0].Ports[0].Addr = 8083, netip.MustParseAddr("192.0.2.1")
		}, "-  port 8084/tcp to 169.254.176.1:8084\n-  entry 169.254.176.1:8084/tcp\n-  local balancer 8084/tcp to 10.93.1.10 port 84\n" +
			"+  port 192.0.2.1:8083/tcp to 169.254.176.1:8082\n+  entry 169.254.176.1:8082/tcp\n+  local balancer 8082/tcp to 10.93.1.10 port 84\n"},
		"taken by a service": {func(v *spec.View) { v.Sandboxes[0].Ports[0].Published = 8080 },
			"-  port 8084/tcp to 169.254.176.1:8084\n-  entry 169.254.176.1:8084/tcp\n-  local balancer 8084/tcp to 10.93.1.10 port 84\n"},
		"nonsense": {func(v *spec.View) {
			v.Services[0].Ports = append(v.Services[0].Ports, spec.Port{Target: 1, Protocol: spec.TCP, Mode: spec.PortIngress},
				spec.Port{Published: 7, Target: 1, Protocol: "x", Mode: spec.PortIngress}, spec.Port{Published: 8, Protocol: spec.TCP, Mode: spec.PortLocal})
			v.Peers[1].Number = 1 << 20
			v.Endpoints = append(v.Endpoints, spec.Endpoint{Service: "svcweb444444", Network: ingresstest.NetApp, Node: v.Self,
				State: spec.EndpointActive, Addrs: []netip.Addr{{}, netip.MustParseAddr("1.2.3.4"), netip.MustParseAddr("10.93.1.1")}})
		}, "-  replies to node 2 via 169.254.64.2\n"},
	} {
		t.Run(name, func(t *testing.T) {
			v := sample()
			c.change(v)
			got, want := ingress.Desired(v).String(), c.want
			if strings.HasPrefix(want, "+") || strings.HasPrefix(want, "-") {
				got, want = delta(all, got), sorted(c.want)
			}
			if got != want {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
		})
	}
}

// delta lists the lines that go and come.
func delta(a, b string) string {
	in := func(s, l string) bool { return strings.Contains("\n"+s, "\n"+l) }
	var out []string
	for l := range strings.Lines(a) {
		if !in(b, l) {
			out = append(out, "-"+l)
		}
	}
	for l := range strings.Lines(b) {
		if !in(a, l) {
			out = append(out, "+"+l)
		}
	}
	return sorted(strings.Join(out, ""))
}

func sorted(s string) string {
	return strings.Join(slices.Sorted(strings.Lines(s)), "")
}

// TestNames: what package overlay names is named alike here.
func TestNames(t *testing.T) {
	v := sample()
	v.Networks[1].ID, v.Networks[1].Internal = "Not An ID", false
	v.Sort()
	o := overlay.Desired(v)
	devs := map[string]bool{}
	o.Each(func(x overlay.Object) {
		if e, ok := x.(overlay.Egress); ok {
			devs[e.Netns+" "+e.Dev] = true
		}
	})
	ways := ingress.Desired(v).Ways
	if len(ways) != 2 || len(devs) != 2 {
		t.Fatal(ways, devs)
	}
	for _, w := range ways {
		if !devs[w.Netns+" "+w.Dev] {
			t.Errorf("%v is not among the overlay's %v", w, devs)
		}
	}
	if ingress.OutDev != overlay.OutDev || ingress.VXLANDev != overlay.VXLANDev || ingress.DevPrefix != overlay.HostPrefix || ingress.RouteProtocol == overlay.RouteProtocol {
		t.Error("constants differ")
	}
}

func TestHealth(t *testing.T) {
	v := sample()
	for _, c := range []struct {
		port  uint16
		proto string
		n     int
		ok    bool
	}{{8083, spec.TCP, 2, true}, {8083, spec.UDP, 0, false}, {8080, spec.TCP, 0, false}, {1, spec.TCP, 0, false}} {
		if n, ok := ingress.Health(v, c.port, c.proto); n != c.n || ok != c.ok {
			t.Errorf("%d/%s: %d %v", c.port, c.proto, n, ok)
		}
	}
	v.Networks = nil
	if n, ok := ingress.Health(v, 8083, spec.TCP); n != 0 || !ok {
		t.Error(n, ok)
	}
}

func TestDiff(t *testing.T) {
	want := ingress.Desired(sample())
	ops, next := ingress.Diff(want, ingress.State{}, time.Time{})
	if len(ops) != want.Len() || !next.IsZero() {
		t.Fatalf("%d operations for %d objects", len(ops), want.Len())
	}
	order := ""
	for _, op := range ops {
		order += op.Object() + "\n"
	}
	at := func(s string) int {
		i := strings.Index(order, s+"\n")
		if i < 0 {
			t.Errorf("%q is not among\n%s", s, order)
		}
		return i
	}
	// Tables, then what they and the routes need, then ports.
	if !(at("node: ingress table") < at("network app: host route 10.93.1.2") &&
		at("network app: ingress table") < at("network app: replies to node 2") &&
		at("network app: host route 10.93.1.2") < at("service web: port 8080/tcp") &&
		at("network app: local balancer 8083/tcp") < at("service web: port 8083/tcp") &&
		at("network app: entry 10.93.1.2:80/tcp") < at("service web: port 8080/tcp") && at("task web.1: port 8084/tcp") > 0) {
		t.Errorf("order:\n%s", order)
	}
	if ops, _ := ingress.Diff(want, want, time.Time{}); len(ops) != 0 {
		t.Errorf("no difference: %v", ops)
	}
}
