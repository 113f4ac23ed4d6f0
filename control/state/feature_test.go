package state

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/shoalnet/shoal/spec"
)

func tcp(published, target uint16, mode string) spec.Port {
	return spec.Port{Published: published, Target: target, Protocol: spec.TCP, Mode: mode}
}

func (c *cluster) try(name string, replicas int, change func(*spec.ServiceSpec)) (spec.Service, error) {
	c.Helper()
	sp := svcSpec(name, replicas)
	if change != nil {
		change(&sp)
	}
	r := c.apply(Command{CreateService: &CreateService{ID: c.id("svc"), Spec: sp, Created: c.now}})
	if r.Err != nil {
		return spec.Service{}, r.Err
	}
	return *r.Service, nil
}

func (c *cluster) net(name string, change func(*spec.Network)) spec.Network {
	c.Helper()
	n := spec.Network{ID: c.id("net"), Name: name, Created: c.now}
	if change != nil {
		change(&n)
	}
	return *c.must(Command{CreateNetwork: &CreateNetwork{Network: n}}).Network
}

func wantErr(t *testing.T, err, kind error, text string) {
	t.Helper()
	if !errors.Is(err, kind) || !strings.Contains(err.Error(), text) {
		t.Errorf("got  %v\nwant %s (%v)", err, text, kind)
	}
}

func TestPublishedPorts(t *testing.T) {
	c := newCluster(t)
	ns := c.joinAll(3)
	ports := func(ps ...spec.Port) func(*spec.ServiceSpec) { return func(s *spec.ServiceSpec) { s.Ports = ps } }

	web, err := c.try("web", 1, ports(tcp(8080, 80, spec.PortIngress), tcp(0, 81, spec.PortIngress)))
	if err != nil {
		t.Fatal(err)
	}
	if web.Ports[0].Published != 8080 || web.Ports[1].Published != spec.MinDynamicPort || web.Ingress != c.s.defaultNet {
		t.Errorf("%+v", web)
	}
	// Every node hears of it, with the network, whether or not it runs a task.
	for _, n := range ns {
		a, err := c.s.AssignmentFor(n.id)
		if err != nil || len(a.Services) != 1 || len(a.Networks) != 1 {
			t.Errorf("%s: %+v, %v", n.id, a, err)
		}
	}
	_, err = c.try("other", 1, ports(tcp(8080, 80, spec.PortIngress)))
	wantErr(t, err, ErrInUse, "service other: port 8080/tcp is published by service web: choose another")
	_, err = c.try("other", 1, ports(tcp(8080, 80, spec.PortHost)))
	wantErr(t, err, ErrInUse, "service web")
	for _, own := range []struct {
		port   uint16
		proto  string
		addr   string // "": all
		reason string // "": right
	}{
		{7373, spec.TCP, "", "Shoal's own: the control port of node n1 (--control-port)"},
		{7946, spec.TCP, "", "Shoal's own: gossip of node n1 (--gossip-port)"},
		{7946, spec.UDP, "", "Shoal's own: gossip of node n1 (--gossip-port)"},
		{7946, spec.UDP, c.s.nodes[ns[1].id].Addr.String(), "Shoal's own: gossip of node n2 (--gossip-port)"},
		{4789, spec.UDP, "127.0.0.1", "Shoal's own: VXLAN (--data-path-port)"},
		{7373, spec.UDP, "", ""},
		{4789, spec.TCP, "", ""},
		{7373, spec.TCP, "127.0.0.1", ""},
	} {
		p := spec.Port{Published: own.port, Target: 80, Protocol: own.proto, Mode: spec.PortIngress}
		if own.addr != "" {
			p.Addr = netip.MustParseAddr(own.addr)
		}
		_, err := c.try(fmt.Sprintf("own%d%s%d", own.port, own.proto, len(own.addr)), 1, ports(p))
		if own.reason == "" && err != nil {
			t.Errorf("%+v: %v", own, err)
		} else if own.reason != "" {
			wantErr(t, err, ErrInUse, own.reason)
		}
	}
	if _, err = c.try("udp", 1, ports(spec.Port{Published: 8080, Target: 80, Protocol: spec.UDP, Mode: spec.PortIngress})); err != nil {
		t.Error(err)
	}
	_, err = c.try("twice", 1, ports(tcp(9, 80, spec.PortIngress), tcp(9, 81, spec.PortHost)))
	wantErr(t, err, ErrInvalid, "published twice")
	_, err = c.try("rr", 1, func(s *spec.ServiceSpec) {
		s.EndpointMode = spec.EndpointModeDNSRR
		s.Ports = []spec.Port{tcp(9, 80, spec.PortIngress)}
	})
	wantErr(t, err, ErrInvalid, "dnsrr")
	in := c.net("in", func(n *spec.Network) { n.Internal = true })
	_, err = c.try("inner", 1, func(s *spec.ServiceSpec) {
		s.Networks = []spec.NetworkAttachment{{Network: "in"}}
		s.Ports = []spec.Port{tcp(9, 80, spec.PortIngress)}
	})
	wantErr(t, err, ErrInvalid, "way out")
	both, err := c.try("both", 1, func(s *spec.ServiceSpec) {
		s.Networks = []spec.NetworkAttachment{{Network: "in"}, {Network: "default"}}
		s.Ports = []spec.Port{tcp(9, 80, spec.PortIngress)}
	})
	if err != nil || both.Ingress == in.ID {
		t.Errorf("%+v, %v", both, err)
	}

	// A dynamic number stays through updates; removed ports are free at once.
	sp := web.Spec.Clone()
	sp.Ports = []spec.Port{tcp(0, 81, spec.PortIngress), tcp(0, 82, spec.PortIngress)}
	got := *c.must(Command{UpdateService: &UpdateService{Ref: "web", Spec: &sp}}).Service
	if got.Ports[0].Published != web.Ports[1].Published || got.Ports[1].Published == got.Ports[0].Published {
		t.Errorf("%v, had %v", got.Ports, web.Ports)
	}
	c.must(Command{RemoveService: &RemoveService{Ref: "web"}})
	if _, err = c.try("other", 1, ports(tcp(8080, 80, spec.PortIngress))); err != nil {
		t.Error(err)
	}

	c.checkReplay(3, 7)
}

func TestHostPorts(t *testing.T) {
	c := newCluster(t)
	c.joinAll(3)
	if _, err := c.try("web", 4, func(s *spec.ServiceSpec) { s.Ports = []spec.Port{tcp(8080, 80, spec.PortHost)} }); err != nil {
		t.Fatal(err)
	}
	c.settle()
	nodes, pending := map[string]bool{}, ""
	for _, x := range c.s.Tasks(TaskFilter{}) {
		if x.Node == "" {
			pending = x.Status.Message
		} else if nodes[x.Node] {
			t.Errorf("two tasks with one port on node %s", x.Node)
		}
		nodes[x.Node] = true
	}
	if len(nodes) != 4 || !strings.Contains(pending, "published port taken") {
		t.Errorf("%v, pending: %s", nodes, pending)
	}
	// Another template: each task must end before its successor has the port.
	n := 3
	c.must(Command{UpdateService: &UpdateService{Ref: "web", Replicas: &n}})
	c.settle()
	v, _ := c.s.Service("web")
	sp := v.Spec.Clone()
	sp.Task.Env = []string{"V=2"}
	c.must(Command{UpdateService: &UpdateService{Ref: "web", Spec: &sp}})
	c.settle()
	for _, x := range c.s.Tasks(TaskFilter{}) {
		if x.Status.State != spec.TaskRunning || !slices.Equal(x.Spec.Env, sp.Task.Env) {
			t.Errorf("%s is %s: %s", x.Name, x.Status.State, x.Status.Message)
		}
	}
	r := c.apply(Command{CreateTask: &CreateTask{ID: c.id("task"), Name: "c1", Node: "n1", Spec: spec.TaskSpec{Command: []string{"x"}}, Ports: []spec.Port{tcp(8080, 1, spec.PortHost)}}})
	wantErr(t, r.Err, ErrInUse, "task c1: port 8080/tcp of node n1 is published by task web.")
	r = c.must(Command{CreateTask: &CreateTask{ID: c.id("task"), Name: "c1", Node: "n1", Spec: spec.TaskSpec{Command: []string{"x"}}, Ports: []spec.Port{tcp(0, 1, spec.PortHost)}}})
	if r.Task.Ports[0].Published < spec.MinDynamicPort {
		t.Error(r.Task.Ports)
	}
	_, err := c.try("mesh", 1, func(s *spec.ServiceSpec) { s.Ports = []spec.Port{tcp(r.Task.Ports[0].Published, 80, spec.PortIngress)} })
	wantErr(t, err, ErrInUse, "published by task c1")
}

// TestConnectByName: a task's name goes before the beginning of a service's ID.
func TestConnectByName(t *testing.T) {
	c := newCluster(t)
	c.joinAll(1)
	c.net("app", nil)
	back := c.net("back", nil)
	web, err := c.try("web", 1, func(s *spec.ServiceSpec) { s.Networks = []spec.NetworkAttachment{{Network: "app"}} })
	if err != nil {
		t.Fatal(err)
	}
	name := web.ID[:len(web.ID)-1] // no other service's ID begins so
	c.must(Command{CreateTask: &CreateTask{ID: c.id("task"), Name: name, Node: "n1", Spec: spec.TaskSpec{Command: []string{"x"}}, Networks: []spec.NetworkAttachment{{Network: "app"}}}})
	c.settle()
	c.must(Command{ConnectNetwork: &ConnectNetwork{Network: "back", Target: name}})
	if v, _ := c.s.Service("web"); v.On(back.ID) {
		t.Error("the service was connected instead of the task")
	}
	if x, _ := c.s.Task(name); len(x.Attachments) != 2 {
		t.Errorf("the task has %v", x.Attachments)
	}
	c.must(Command{DisconnectNetwork: &DisconnectNetwork{Network: "back", Target: name}})
	c.must(Command{ConnectNetwork: &ConnectNetwork{Network: "back", Target: web.ID[:len(web.ID)-2]}})
	if v, _ := c.s.Service("web"); !v.On(back.ID) {
		t.Error("the service is not found by the beginning of its ID")
	}
}

func TestConnect(t *testing.T) {
	c := newCluster(t)
	ns := c.joinAll(2)
	app, back := c.net("app", nil), c.net("back", nil)
	c.must(Command{CreateTask: &CreateTask{ID: c.id("task"), Name: "c1", Node: "n1", Spec: spec.TaskSpec{Command: []string{"x"}}, Networks: []spec.NetworkAttachment{{Network: "app"}}}})
	web, err := c.try("web", 2, func(s *spec.ServiceSpec) { s.Networks = []spec.NetworkAttachment{{Network: "app"}} })
	if err != nil {
		t.Fatal(err)
	}
	c.settle()
	before := c.s.Tasks(TaskFilter{})
	show := func(task string) string {
		x, err := c.s.Task(task)
		if err != nil {
			t.Fatal(err)
		}
		out := ""
		for _, a := range x.Attachments {
			out += fmt.Sprintf("%s:%s %v leaving=%t; ", a.Iface, a.Network, a.Aliases, a.Leaving != 0)
		}
		return out
	}
	at := func(iface string, n spec.Network, aliases []string, leaving bool) string {
		return fmt.Sprintf("%s:%s %v leaving=%t; ", iface, n.ID, aliases, leaving)
	}
	want := func(task, text string) {
		t.Helper()
		if got := show(task); got != text {
			t.Errorf("%s is on %s\nwant %s", task, got, text)
		}
	}
	connect := func(n, target string, aliases ...string) error {
		return c.apply(Command{ConnectNetwork: &ConnectNetwork{Network: n, Target: target, Aliases: aliases}}).Err
	}
	disconnect := func(n, target string) error {
		return c.apply(Command{DisconnectNetwork: &DisconnectNetwork{Network: n, Target: target}}).Err
	}
	if err := connect("back", "c1", "db"); err != nil {
		t.Fatal(err)
	}
	want("c1", at("eth0", app, nil, false)+at("eth1", back, []string{"db"}, false))
	wantErr(t, connect("back", "c1"), ErrExists, "task c1 is on network back already")
	// The address stays taken until the node has taken it off; the other
	// interface keeps its name.
	x, _ := c.s.Task("c1")
	ip := x.Attachments[0].Addrs
	if err := disconnect("app", "c1"); err != nil {
		t.Fatal(err)
	}
	want("c1", at("eth0", app, nil, true)+at("eth1", back, []string{"db"}, false))
	wantErr(t, connect("app", "c1"), ErrInUse, "just leaving")
	r := c.apply(Command{CreateTask: &CreateTask{ID: c.id("task"), Name: "c2", Node: "n1", Spec: spec.TaskSpec{Command: []string{"x"}}, Networks: []spec.NetworkAttachment{{Network: "app", Addrs: ip}}}})
	wantErr(t, r.Err, ErrInUse, "taken by task c1")
	c.settle()
	want("c1", at("eth1", back, []string{"db"}, false))
	if err := connect("app", "c1"); err != nil {
		t.Fatal(err)
	}
	want("c1", at("eth1", back, []string{"db"}, false)+at("eth0", app, nil, false))
	wantErr(t, disconnect("default", "c1"), ErrInvalid, "not on network default")
	wantErr(t, connect("host", "c1"), ErrInvalid, "can't enter network host")
	wantErr(t, connect("host", "web"), ErrInvalid, "can't be combined")
	wantErr(t, connect("app", "nosuch"), ErrNotFound, "no such task or service: nosuch")

	// A service, with the same tasks before and after.
	if err := connect("back", "web", "www"); err != nil {
		t.Fatal(err)
	}
	c.settle()
	v, _ := c.s.Service("web")
	if len(v.VIPs) != 2 || !slices.Equal(v.AliasesOn(back.ID), []string{"www"}) || v.VIPsOn(app.ID)[0] != web.VIPsOn(app.ID)[0] {
		t.Errorf("%+v", v)
	}
	for _, x := range c.s.Tasks(TaskFilter{Service: web.ID}) {
		want(x.Name, at("eth0", app, nil, false)+at("eth1", back, []string{"www"}, false))
	}
	wantErr(t, connect("back", before[1].Name), ErrInvalid, "connect or disconnect the service")
	if err := disconnect("app", "web"); err != nil {
		t.Fatal(err)
	}
	c.settle()
	for _, x := range c.s.Tasks(TaskFilter{Service: web.ID}) {
		want(x.Name, at("eth1", back, []string{"www"}, false))
	}
	wantErr(t, disconnect("back", "web"), ErrInvalid, "is the only one")
	var ids, now []string
	for _, x := range before {
		ids = append(ids, x.ID)
	}
	for _, x := range c.s.Tasks(TaskFilter{}) {
		now = append(now, x.ID)
	}
	if !slices.Equal(ids, now) {
		t.Errorf("tasks %v, were %v", now, ids)
	}
	_ = ns
	c.checkReplay(5, 12)
}

func TestBridgeAndBuiltIn(t *testing.T) {
	c := newCluster(t)
	ns := c.joinAll(3)
	r := c.apply(Command{CreateNetwork: &CreateNetwork{Network: spec.Network{ID: c.id("net"), Name: "br", Driver: "bridge"}}})
	wantErr(t, r.Err, ErrInvalid, "bridge is for one node")
	br := c.net("br", func(n *spec.Network) { n.Driver, n.Node = "bridge", "n2" })
	if br.Node != ns[1].id {
		t.Errorf("%+v", br)
	}
	if _, err := c.try("web", 3, func(s *spec.ServiceSpec) { s.Networks = []spec.NetworkAttachment{{Network: "br"}} }); err != nil {
		t.Fatal(err)
	}
	c.settle()
	for _, x := range c.s.Tasks(TaskFilter{}) {
		if x.Node != br.Node {
			t.Errorf("%s is on node %s", x.Name, x.Node)
		}
	}
	task := func(node, network string) Result {
		return c.apply(Command{CreateTask: &CreateTask{ID: c.id("task"), Name: fmt.Sprintf("c%d", c.ids), Node: node, Spec: spec.TaskSpec{Command: []string{"x"}}, Networks: []spec.NetworkAttachment{{Network: network}}}})
	}
	wantErr(t, task("n1", "br").Err, ErrInvalid, "network br is a bridge on node n2, and can't be used on node n1")
	if r := task("", "br"); r.Err != nil || r.Task.Node != br.Node {
		t.Errorf("%+v", r)
	}
	for _, name := range []string{"host", "none"} {
		if r := task("n1", name); r.Err != nil || r.Task.Attachments[0].Iface != "" || r.Task.Attachments[0].Addrs != nil {
			t.Errorf("%+v", r)
		}
		wantErr(t, c.apply(Command{RemoveNetwork: &RemoveNetwork{Ref: name}}).Err, ErrInvalid, "built in")
	}
	if _, err := c.try("on-host", 2, func(s *spec.ServiceSpec) { s.Networks = []spec.NetworkAttachment{{Network: "host"}} }); err != nil {
		t.Fatal(err)
	}
	_, err := c.try("mixed", 2, func(s *spec.ServiceSpec) {
		s.Networks = []spec.NetworkAttachment{{Network: "host"}, {Network: "default"}}
	})
	wantErr(t, err, ErrInvalid, "can't be combined")
	c.settle()
	c.checkReplay(4)
}

func TestNetworkOptions(t *testing.T) {
	c := newCluster(t)
	c.joinAll(1)
	n := c.net("a", func(n *spec.Network) {
		n.Options = map[string]string{spec.OptMTUDocker: "1300", spec.OptICC: "false"}
		n.Subnets = []netip.Prefix{netip.MustParsePrefix("10.5.0.0/24"), netip.MustParsePrefix("10.6.0.0/24")}
		n.IPRanges = []netip.Prefix{netip.MustParsePrefix("10.5.0.128/25")}
	})
	if n.MTU != 1300 || n.ICC() {
		t.Errorf("%+v", n)
	}
	for _, k := range []struct{ key, value, want string }{
		{"mtu", "x", "want a number of bytes"}, {"mtu", "10", "out of range"}, {"icc", "perhaps", "want true or false"}, {"colour", "red", "is unknown"},
	} {
		r := c.apply(Command{CreateNetwork: &CreateNetwork{Network: spec.Network{ID: c.id("net"), Name: "b", Options: map[string]string{k.key: k.value}}}})
		wantErr(t, r.Err, ErrInvalid, k.want)
	}
}

func TestEvents(t *testing.T) {
	c := newCluster(t)
	c.joinAll(1)
	c.s.TakeEvents()
	c.net("app", nil)
	if _, err := c.try("web", 1, nil); err != nil {
		t.Fatal(err)
	}
	c.settle()
	c.must(Command{RemoveService: &RemoveService{Ref: "web"}})
	c.settle()
	var got []string
	for _, e := range c.s.TakeEvents() {
		name, _, _ := strings.Cut(e.Name, ".")
		got = append(got, e.Type+" "+e.Action+" "+name)
	}
	want := []string{"network create app", "service create web", "task create web", "task preparing web", "task starting web", "task running web",
		"service remove web", "task stopping web", "task shutdown web"}
	if !slices.Equal(got, want) {
		t.Errorf("%q\nwant %q", got, want)
	}
	if c.s.TakeEvents() != nil {
		t.Error("events come twice")
	}
}
