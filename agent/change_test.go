package agent

import (
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"testing"

	"github.com/shoalnet/shoal/overlay"
	"github.com/shoalnet/shoal/spec"
	"github.com/shoalnet/shoal/vip"
)

// changes are what may become of a View, by name; each returns false if there is nothing
// to change.
var changes = map[string]func(r *rand.Rand, v *spec.View){
	"complete":   func(_ *rand.Rand, v *spec.View) { v.Complete = !v.Complete },
	"underlay":   func(_ *rand.Rand, v *spec.View) { v.Underlay.MTU++ },
	"peer alive": func(r *rand.Rand, v *spec.View) { one(r, v.Peers).Liveness = spec.Liveness(r.IntN(3)) },
	"peer dark":  func(r *rand.Rand, v *spec.View) { p := one(r, v.Peers); p.Dark = !p.Dark },
	"peer away":  func(r *rand.Rand, v *spec.View) { p := one(r, v.Peers); p.Away = !p.Away },
	"peer MTU":   func(r *rand.Rand, v *spec.View) { one(r, v.Peers).MTU = 1300 + r.IntN(200) },
	"peer moves": func(r *rand.Rand, v *spec.View) { one(r, v.Peers).Addr = addrOf(172, 30, r.IntN(250)) },
	"peer goes":  func(r *rand.Rand, v *spec.View) { v.Peers = slices.Delete(v.Peers, len(v.Peers)-1, len(v.Peers)) },
	"agents": func(_ *rand.Rand, v *spec.View) {
		v.Agents = append(v.Agents, netip.MustParseAddrPort("172.30.0.9:2377"))
	},
	"network goes": func(r *rand.Rand, v *spec.View) { v.Networks = v.Networks[1:] },
	"network changes": func(r *rand.Rand, v *spec.View) {
		n := one(r, v.Networks)
		n.Internal, n.Version = !n.Internal, n.Version+1
	},
	"service goes": func(r *rand.Rand, v *spec.View) { v.Services = v.Services[1:] },
	"VIP": func(r *rand.Rand, v *spec.View) {
		s := one(r, v.Services)
		s.VIPs[0].Addrs, s.Version = []netip.Addr{addrOf(10, 1, 200+r.IntN(50))}, s.Version+1
	},
	"port": func(r *rand.Rand, v *spec.View) {
		s := one(r, v.Services)
		s.Ingress, s.Ports, s.Version = s.VIPs[0].Network, []spec.Port{{Published: 80, Target: 80, Protocol: spec.TCP, Mode: spec.PortIngress}}, s.Version+1
	},
	"endpoint state": func(r *rand.Rand, v *spec.View) {
		one(r, v.Endpoints).State = spec.EndpointState(r.IntN(spec.EndpointStates))
	},
	"endpoint moves":   func(r *rand.Rand, v *spec.View) { one(r, v.Endpoints).Node = one(r, v.Peers).ID },
	"endpoint address": func(r *rand.Rand, v *spec.View) { one(r, v.Endpoints).Addrs = []netip.Addr{addrOf(10, 1, r.IntN(30))} },
	"endpoint goes":    func(r *rand.Rand, v *spec.View) { v.Endpoints = v.Endpoints[1:] },
	"endpoint away": func(r *rand.Rand, v *spec.View) {
		v.Away, v.Endpoints = append(v.Away, v.Endpoints[0]), v.Endpoints[1:]
	},
	"sandbox goes": func(_ *rand.Rand, v *spec.View) { v.Sandboxes = v.Sandboxes[1:] },
	"sandbox":      func(r *rand.Rand, v *spec.View) { one(r, v.Sandboxes).DNSPort++ },
	"sandbox moves": func(r *rand.Rand, v *spec.View) {
		one(r, v.Sandboxes).Attachments[0].Addrs = []netip.Addr{addrOf(10, 1, 40)}
	},
	"nothing": func(*rand.Rand, *spec.View) {},
}

func one[T any](r *rand.Rand, of []T) *T { return &of[r.IntN(len(of))] }

func addrOf(a, b, c int) netip.Addr { return netip.AddrFrom4([4]byte{byte(a), byte(b), 0, byte(c)}) }

// viewOf is a View with some of everything. Two nodes may claim one address in it.
func viewOf(r *rand.Rand) *spec.View {
	v := &spec.View{Self: "n1", Instance: "shoal", Complete: true, Underlay: spec.Underlay{Addr: addrOf(172, 30, 1), VXLANPort: 4789, MTU: 1500}}
	for i, id := range []string{"n1", "n2", "n3", "n4"} {
		v.Peers = append(v.Peers, spec.Peer{ID: id, Name: id, Number: i + 1, Addr: addrOf(172, 30, i+1), ControlPort: 2377, GossipPort: 7946, Answers: true})
	}
	for i, id := range []string{"a", "b"} {
		v.Networks = append(v.Networks, spec.Network{ID: id, Name: id, Driver: spec.DriverOverlay, VNI: uint32(4096 + i), Version: 1, MTU: 1450,
			Subnets: []netip.Prefix{netip.PrefixFrom(addrOf(10, i+1, 0), 24)}, Gateways: []netip.Addr{addrOf(10, i+1, 1)}})
	}
	for i, id := range []string{"s1", "s2", "s3"} {
		net := v.Networks[i%2]
		v.Services = append(v.Services, spec.Service{ID: id, Version: 1, VIPs: []spec.VIPs{{Network: net.ID, Addrs: []netip.Addr{addrOf(10, i%2+1, 100+i)}}},
			Spec: spec.ServiceSpec{Name: id, EndpointMode: spec.EndpointModeVIP, Networks: []spec.NetworkAttachment{{Network: net.ID}}}})
	}
	for i, id := range []string{"t1", "t2", "t3", "t4", "t5"} {
		e := spec.Endpoint{Task: id, TaskName: id, Service: v.Services[i%3].ID, Network: v.Networks[i%3%2].ID, Node: one(r, v.Peers).ID,
			Addrs: []netip.Addr{addrOf(10, i%3%2+1, 2+r.IntN(4))}, State: spec.EndpointState(r.IntN(spec.EndpointStates))}
		v.Endpoints = append(v.Endpoints, e)
		v.Sandboxes = append(v.Sandboxes, spec.Sandbox{Task: id, Name: id, Netns: "ns-" + id, DNSPort: 1000, Attachments: []spec.Attachment{{Network: e.Network, Addrs: e.Addrs, Iface: "eth0"}}})
	}
	return v
}

// clone copies what changes touch.
func clone(v *spec.View) *spec.View {
	c := *v
	c.Peers, c.Agents, c.Networks, c.Services = slices.Clone(v.Peers), slices.Clone(v.Agents), slices.Clone(v.Networks), slices.Clone(v.Services)
	c.Endpoints, c.Away, c.Sandboxes = slices.Clone(v.Endpoints), slices.Clone(v.Away), slices.Clone(v.Sandboxes)
	for i := range c.Services {
		c.Services[i].VIPs = slices.Clone(c.Services[i].VIPs)
	}
	for i := range c.Sandboxes {
		c.Sandboxes[i].Attachments = slices.Clone(c.Sandboxes[i].Attachments)
	}
	return &c
}

// TestWhatIsKeptIsAsWanted: where nothing differs that a loop's want is made of, what
// would be made of the later View is the same.
func TestWhatIsKeptIsAsWanted(t *testing.T) {
	kept := map[string]int{}
	for name, change := range changes {
		for seed := range uint64(300) {
			r := rand.New(rand.NewPCG(seed, 1))
			was := viewOf(r)
			v := clone(was)
			change(r, v)
			c := v.Changes(was)
			if same := reflect.DeepEqual(v, was); same != (c == 0) {
				t.Fatalf("%s, seed %d: same %t, changes %b", name, seed, same, c)
			}
			if !c.In(overlay.Reads) {
				kept["overlay"]++
				if !reflect.DeepEqual(overlay.Desired(v), overlay.Desired(was)) {
					t.Errorf("%s, seed %d: the overlay's want differs, and the changes %b are said not to count", name, seed, c)
				}
			}
			if !c.In(vip.Reads) {
				kept["vip"]++
				if !reflect.DeepEqual(vip.Desired(v), vip.Desired(was)) {
					t.Errorf("%s, seed %d: the balancers' want differs, and the changes %b are said not to count", name, seed, c)
				}
			}
		}
	}
	if kept["overlay"] < 300 || kept["vip"] < 600 {
		t.Errorf("kept %v: nothing is saved", kept)
	}
	if c := viewOf(rand.New(rand.NewPCG(1, 1))).Changes(nil); c != spec.ChangedAll {
		t.Errorf("since no View: %b", c)
	}
}

// TestAssignmentsFollow: what is made of a View is kept only while all that is new came
// as changes to what the View before was made of.
func TestAssignmentsFollow(t *testing.T) {
	whole := func() *assignment { a := &assignment{Index: 1}; a.told = &a.Index; return a }
	a, other := whole(), whole()
	next := &assignment{Index: 2, told: a.told}
	cached := &assignment{Index: 1}
	for _, c := range []struct {
		a, before *assignment
		want      bool
	}{{a, a, true}, {next, a, true}, {other, a, false}, {a, nil, false}, {nil, nil, false}, {cached, cached, true}, {&assignment{Index: 1}, cached, false}, {a, cached, false}} {
		if got := c.a.follows(c.before); got != c.want {
			t.Errorf("%+v after %+v: %t", c.a, c.before, got)
		}
	}
}
