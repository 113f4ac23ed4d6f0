package overlay_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/shoalnet/shoal/overlay"
	"github.com/shoalnet/shoal/overlay/overlaytest"
	"github.com/shoalnet/shoal/spec"
)

func sample() *spec.View {
	under := spec.Underlay{Addr: netip.MustParseAddr("192.0.2.1"), VXLANPort: 4789, MTU: 1500}
	return overlaytest.Sample("shoal", under, spec.MinVNI, false)
}

// kernel is what a View makes of a kernel.
func kernel(v *spec.View) overlay.State { return overlay.Desired(v).Resolve(overlay.State{}) }

// of returns the texts of a State's objects that begin with a word.
func of(s overlay.State, word string) (out []string) {
	for _, o := range s.Objects() {
		if strings.HasPrefix(o.String(), word) {
			ns, _ := overlay.Place(o)
			out = append(out, ns+": "+o.String())
		}
	}
	return out
}

func has(t *testing.T, s overlay.State, want bool, parts ...string) {
	t.Helper()
	for _, o := range s.Objects() {
		ns, _ := overlay.Place(o)
		text := ns + ": " + o.String()
		if !slices.ContainsFunc(parts, func(p string) bool { return !strings.Contains(text, p) }) {
			if !want {
				t.Errorf("there is %s", text)
			}
			return
		}
	}
	if want {
		t.Errorf("there is nothing with %q in\n%s", parts, s)
	}
}

// TestInterfacesStay: others' coming and going changes nothing of what stays.
func TestInterfacesStay(t *testing.T) {
	v := sample()
	web := &v.Sandboxes[slices.IndexFunc(v.Sandboxes, func(s spec.Sandbox) bool { return s.Task == overlaytest.TaskWeb })]
	web.Attachments[0].Iface, web.Attachments[1].Iface = "eth0", "eth1"
	full := kernel(v)
	has(t, full, true, "task-web.1: ", "route 10.91.2.0/24", "eth0")
	has(t, full, true, "task-web.1: ", "default", "eth1")

	one := *v
	one.Sandboxes = slices.Clone(v.Sandboxes)
	i := slices.IndexFunc(one.Sandboxes, func(s spec.Sandbox) bool { return s.Task == overlaytest.TaskWeb })
	one.Sandboxes[i].Attachments = web.Attachments[1:] // off the first
	ops, _ := overlay.Diff(overlay.Desired(&one), full, time.Time{})
	for _, op := range ops {
		o := op.(overlay.Op)
		if o.Verb == overlay.Put || strings.Contains(o.String(), "eth1") {
			t.Errorf("leaving the network of eth0: %s", o)
		}
	}
	if len(ops) == 0 {
		t.Error("leaving a network does nothing")
	}
	ops, _ = overlay.Diff(full, kernel(&one), time.Time{})
	for _, op := range ops {
		if o := op.(overlay.Op); o.Verb != overlay.Put || strings.Contains(o.String(), "eth1") {
			t.Errorf("joining a network again: %s", o)
		}
	}
}

func TestWhatIsNotWiredIsSkipped(t *testing.T) {
	v := sample()
	v.Sandboxes = []spec.Sandbox{
		{Task: "tasknone2222", Name: "none", Netns: "shoal-task-none", DNSPort: 5, Attachments: []spec.Attachment{{Network: spec.NoneNetwork}}},
		{Task: "taskgone2222", Name: "gone", Netns: "shoal-task-gone", Attachments: []spec.Attachment{{Network: "nosuch", Addrs: overlaytest.Addrs("10.1.1.1")}}},
		{Task: "taskbad22222", Name: "bad", Netns: "shoal-task-bad", Attachments: []spec.Attachment{
			{Network: overlaytest.NetApp, Addrs: overlaytest.Addrs("10.91.1.1")}, // the gateway's
			{Network: overlaytest.NetApp, Addrs: overlaytest.Addrs("10.91.1.2")}, // a VIP
			{Network: overlaytest.NetApp, Addrs: overlaytest.Addrs("10.77.0.9"), Iface: "../x"},
		}},
	}
	s := overlay.Desired(v)
	for _, ns := range []string{"shoal-task-none", "shoal-task-gone", "shoal-task-bad"} {
		has(t, s, false, ns+": ", "address")
		has(t, s, false, ns+": ", "route")
		has(t, s, true, "namespace "+ns)
	}
}

func TestBridgeIsHereOnly(t *testing.T) {
	v := sample()
	v.Networks = slices.Clone(v.Networks)
	for i := range v.Networks {
		v.Networks[i].Driver, v.Networks[i].Node = spec.DriverBridge, v.Self
	}
	s := overlay.Desired(v)
	for _, word := range []string{"device vx", "fdb"} {
		if got := of(s, word); got != nil {
			t.Errorf("%s: %v", word, got)
		}
	}
	// No VXLAN is let in, and tasks are kept from the agents.
	m, _ := s.Get(overlay.Members{}.Key()).(overlay.Members)
	if m.VNIs != "" || m.Agents == "" {
		t.Errorf("members %+v", m)
	}
	has(t, s, false, "dev vx")
	has(t, s, true, "task-web.1: ", "default")
	if len(of(s, "veth")) == 0 && len(of(s, "device")) == 0 {
		t.Errorf("no devices at all:\n%s", s)
	}
}

func TestICC(t *testing.T) {
	v := sample()
	v.Networks = slices.Clone(v.Networks)
	if f := filterOf(t, overlay.Desired(v), "app"); f.Alone != "" {
		t.Errorf("tasks are alone: %q", f.Alone)
	}
	for i := range v.Networks {
		v.Networks[i].Options = map[string]string{spec.OptICC: "false"}
	}
	if f := filterOf(t, overlay.Desired(v), "app"); f.Alone != "10.91.1.1/32" {
		t.Errorf("icc=false leaves %q to tasks, want the gateway", f.Alone)
	}
}

func filterOf(t *testing.T, s overlay.State, network string) (f overlay.Filter) {
	t.Helper()
	s.Each(func(o overlay.Object) {
		if x, ok := o.(overlay.Filter); ok && strings.Contains(x.Netns, "-"+network+"-") {
			f = x
		}
	})
	return f
}

// TestMembers: all nodes, whatever is thought of them, and only when all are
// known.
func TestMembers(t *testing.T) {
	v := sample()
	v.Peers[1].Liveness = spec.PeerDead
	m, _ := overlay.Desired(v).Get(overlay.Members{}.Key()).(overlay.Members)
	if m.Peers != "192.0.2.1 192.0.2.2 192.0.2.3" || m.VNIs != "4095 4096 4097" || m.Agents != "192.0.2.1:2377 192.0.2.1:7946 192.0.2.2:2378 192.0.2.2:7946" || m.Port != 4789 || m.Table != "shoal-members" {
		t.Errorf("members %+v", m)
	}
	have := kernel(v)
	// Where gossip reaches nobody, tasks are still kept from the agents.
	alone := *v
	alone.Peers = v.Peers[:1]
	alone.Agents = []netip.AddrPort{netip.MustParseAddrPort("192.0.2.2:2378"), netip.MustParseAddrPort("192.0.2.1:7946"), netip.MustParseAddrPort("[2001:db8::2]:2377")}
	m, _ = overlay.Desired(&alone).Get(overlay.Members{}.Key()).(overlay.Members)
	if m.Agents != "192.0.2.1:2377 192.0.2.1:7946 192.0.2.2:2378" {
		t.Errorf("where gossip reaches nobody, agents are %q", m.Agents)
	}
	v.Complete, v.Peers = false, v.Peers[:1]
	part := overlay.Desired(v)
	if part.Get(overlay.Members{}.Key()) != nil {
		t.Error("members of a View that is not complete")
	}
	if ops, _ := overlay.Diff(part, have, time.Time{}); len(ops) != 0 {
		t.Errorf("a View that is not complete takes away: %v", ops)
	}
}

// TestPathMTU: what is sent to a node whose underlay carries less is as long as that,
// and nothing else is.
func TestPathMTU(t *testing.T) {
	route := func(s overlay.State, dst string) string {
		for _, x := range of(s, "route "+dst) {
			if strings.Contains(x, " dev vx") {
				return x
			}
		}
		t.Fatalf("no route to %s in\n%s", dst, s)
		return ""
	}
	for _, c := range []struct {
		self, peer, network int
		want                string // "": nothing of an MTU
	}{
		{1500, 1300, 0, " mtu lock 1250"},
		{1500, 1500, 0, ""},
		{1300, 1500, 0, ""}, // the devices' own does it
		{9000, 1500, 0, " mtu lock 1450"},
		{1500, 1300, 1250, ""},
		{1500, 1300, 1400, " mtu lock 1250"},
		{1500, 0, 0, ""}, // it does not say
		{0, 1300, 0, ""}, // nor this node
		{0, 1300, 1400, " mtu lock 1250"},
		{1500, 1, 0, " mtu lock 576"},
		{1500, -1, 0, ""},
		{1500, 625, 0, " mtu lock 576"},
		{1500, 65535, 0, ""},
		{65535, 65535, 0, ""},
	} {
		v := sample()
		v.Underlay.MTU = 0
		for i := range v.Networks {
			v.Networks[i].MTU = c.network
		}
		for i := range v.Peers {
			v.Peers[i].MTU = c.self
			if v.Peers[i].ID == overlaytest.PeerB {
				v.Peers[i].MTU = c.peer
			}
		}
		s := overlay.Desired(v)
		if got := route(s, "10.91.1.20"); !strings.HasSuffix(got, c.want) || c.want == "" && strings.Contains(got, "mtu") {
			t.Errorf("%+v: %s", c, got)
		}
		if got := route(s, "10.91.1.30"); c.self == 1500 && c.network == 0 && strings.Contains(got, "mtu") {
			t.Errorf("%+v: to another node %s", c, got)
		}
	}
	// IPv6 has no smaller packets than 1,280 bytes.
	v := overlaytest.Sample("shoal", spec.Underlay{Addr: netip.MustParseAddr("192.0.2.1"), VXLANPort: 4789, MTU: 1500}, spec.MinVNI, true)
	v.Peers[1].MTU = 1300
	s := overlay.Desired(v)
	if four, six := route(s, "10.91.1.20"), route(s, "fd91:1::20"); !strings.HasSuffix(four, " mtu lock 1250") || !strings.HasSuffix(six, " mtu lock 1280") {
		t.Errorf("%s; %s", four, six)
	}
}

// TestPath: the namespace of the probes is there while a network that spans nodes is,
// and knows every node that is not dead.
func TestPath(t *testing.T) {
	v := sample()
	s := kernel(v)
	ns := spec.OverlayNetns("shoal", spec.PathNetwork)
	has(t, s, true, ns+": ", "169.254.64.1/32")
	has(t, s, true, ns+": ", "fdb", "192.0.2.2")
	has(t, s, true, ns+": ", "fdb", "192.0.2.3")
	has(t, s, false, ns+": ", "masquerade")
	v.Peers[1].Liveness = spec.PeerDead
	has(t, kernel(v), false, ns+": ", "fdb", "192.0.2.2")
	for i := range v.Networks {
		v.Networks[i].Driver = spec.DriverBridge
	}
	has(t, kernel(v), false, ns+": ")
}

// TestAway: a dead node whose machine is there keeps its routes, unless somebody who lives
// has the address by now.
func TestAway(t *testing.T) {
	v := sample()
	i := slices.IndexFunc(v.Endpoints, func(e spec.Endpoint) bool { return e.Node == v.Peers[1].ID })
	e := v.Endpoints[i]
	addr, alive := e.Addrs[0].String(), kernel(v)
	has(t, alive, true, "route "+addr, spec.RouterAddr(v.Peers[1].Number).String())
	v.Peers[1].Liveness = spec.PeerDead
	v.Endpoints = slices.DeleteFunc(v.Endpoints, func(e spec.Endpoint) bool { return e.Node == v.Peers[1].ID })
	has(t, kernel(v), false, "route "+addr)
	v.Peers[1].Away, v.Away = true, []spec.Endpoint{e}
	has(t, kernel(v), true, "route "+addr, spec.RouterAddr(v.Peers[1].Number).String())
	other := e
	other.Node = v.Peers[2].ID
	v.Endpoints = append(v.Endpoints, other)
	v.Sort()
	has(t, kernel(v), true, "route "+addr, spec.RouterAddr(v.Peers[2].Number).String())
	has(t, kernel(v), false, "route "+addr, spec.RouterAddr(v.Peers[1].Number).String())
}

// TestTargetDiff: a Target has nothing to say again of what it had nothing to say of, and
// of nothing else.
func TestTargetDiff(t *testing.T) {
	target := overlay.NewTarget(nil)
	want := overlay.State{Complete: true}
	want.Add(overlay.Addr{Netns: "a", Dev: "lo", Prefix: netip.MustParsePrefix("10.0.0.1/32")})
	have := want.Clone()
	said := func(want, have overlay.State) int {
		ops, _ := target.Diff(want, have, time.Time{})
		return len(ops)
	}
	less := have.Clone()
	less.Remove(want.Objects()[0].Key())
	more := want.Clone()
	more.Add(overlay.Addr{Netns: "a", Dev: "lo", Prefix: netip.MustParsePrefix("10.0.0.2/32")})
	for i, c := range []struct {
		want, have overlay.State
		ops        int
	}{{want, less, 1}, {want, have, 0}, {want, have, 0}, {want, less, 1}, {want, less, 1}, {want, have, 0}, {more, have, 1}, {want, more, 1}, {want, have, 0}, {overlay.State{Complete: true}, have, 1}} {
		if n := said(c.want, c.have); n != c.ops {
			t.Errorf("%d: %d operations, want %d", i, n, c.ops)
		}
	}
}
