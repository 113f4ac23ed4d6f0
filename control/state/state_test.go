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

func ptr[T any](v T) *T { return &v }

func addrs(s ...string) (out []netip.Addr) {
	for _, a := range s {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

// run makes a standalone task.
func (c *cluster) run(name, node string, nets ...spec.NetworkAttachment) Result {
	c.Helper()
	return c.apply(Command{CreateTask: &CreateTask{ID: c.id("task"), Name: name, Node: node, Spec: spec.TaskSpec{Command: []string{"x"}}, Networks: nets, Created: c.now}})
}

func TestRefusals(t *testing.T) {
	c := newCluster(t, "10.0.0.0/22")
	n1, n2 := c.join("n1"), c.join("n2")
	app := c.network("app", "10.5.0.0/29")
	c.service(svcSpec("web", 2, "app"))
	c.settle()
	c1 := c.run("c1", "n1").Task
	c.down(n2)
	hosts := []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("172.16.0.0/12")}
	net := func(n spec.Network) Command {
		n.ID = "netnew000000"
		return Command{CreateNetwork: &CreateNetwork{Network: n, HostRoutes: hosts}}
	}
	sub := func(name string, s ...string) Command {
		n := spec.Network{Name: name}
		for _, p := range s {
			n.Subnets = append(n.Subnets, netip.MustParsePrefix(p))
		}
		return net(n)
	}
	svc := func(sp spec.ServiceSpec) Command {
		return Command{CreateService: &CreateService{ID: "svcnew000000", Spec: sp}}
	}
	vip := func(a ...string) spec.ServiceSpec {
		sp := svcSpec("db", 1, "app")
		sp.Networks[0].Addrs = addrs(a...)
		return sp
	}
	task := func(name, node string, nets ...spec.NetworkAttachment) Command {
		return Command{CreateTask: &CreateTask{ID: "tasknew00000", Name: name, Node: node, Spec: spec.TaskSpec{Command: []string{"x"}}, Networks: nets}}
	}
	dnsrr := vip("10.5.0.5")
	dnsrr.EndpointMode = spec.EndpointModeDNSRR
	webVIP := c.s.services[c.s.svcNames["web"]].VIPs[0].Addrs[0].String()
	for _, k := range []struct {
		cmd  Command
		kind error
		want string
	}{
		{Command{}, ErrInvalid, "command: want exactly one kind"},
		{Command{InitCluster: &InitCluster{}}, ErrExists, "there is a cluster already: clusteraaaaa"},
		{sub("app"), ErrExists, "network app exists already"},
		{sub("a b"), ErrInvalid, `network name "a b": use letters, digits, '-', '_' and '.', beginning and ending with a letter or digit`},
		{sub("b", "10.5.0.4/30"), ErrInvalid, "network b: subnet 10.5.0.4/30 overlaps 10.5.0.0/29 of network app: choose another with --subnet, or leave it out to have one chosen"},
		{sub("b", "172.20.0.0/16"), ErrInvalid, "network b: subnet 172.20.0.0/16 overlaps the host's route to 172.16.0.0/12: tasks would cut the host off from it: choose another with --subnet, or leave it out to have one chosen"},
		{sub("b", "192.168.0.0/24"), ErrInvalid, "network b: subnet 192.168.0.0/24 overlaps 192.168.0.1/32, which is reserved (address of node n1): choose another"},
		{sub("b", "10.7.0.1/24"), ErrInvalid, "network b: subnet 10.7.0.1/24 has host bits set: did you mean 10.7.0.0/24"},
		{sub("b", "10.7.0.0/24", "10.7.0.128/25"), ErrInvalid, "network b: subnets 10.7.0.0/24 and 10.7.0.128/25 overlap"},
		{net(spec.Network{Name: "b", Driver: "macvlan"}), ErrInvalid, `network b: driver "macvlan" is unknown: use overlay or bridge`},
		{net(spec.Network{Name: "b", VNI: app.VNI}), ErrInUse, fmt.Sprintf("network b: VNI %d is taken by network app", app.VNI)},
		{net(spec.Network{Name: "b", Gateways: addrs("10.7.0.1")}), ErrInvalid, "network b: a gateway needs a subnet: give --subnet"},
		{net(spec.Network{Name: "b", Subnets: []netip.Prefix{netip.MustParsePrefix("10.7.0.0/24")}, Gateways: addrs("10.7.0.255")}), ErrInvalid, "network b: gateway 10.7.0.255 is the network or broadcast address of 10.7.0.0/24"},
		{net(spec.Network{Name: "b", IPRanges: []netip.Prefix{netip.MustParsePrefix("10.9.0.0/28")}, Subnets: []netip.Prefix{netip.MustParsePrefix("10.7.0.0/24")}}), ErrInvalid, "network b: ip ranges [10.9.0.0/28]: each must lie in one of the subnets [10.7.0.0/24]"},
		{Command{RemoveNetwork: &RemoveNetwork{"nosuch"}}, ErrNotFound, "no such network: nosuch: 'shoal net ls' lists all of them"},
		{Command{RemoveNetwork: &RemoveNetwork{"default"}}, ErrInvalid, "network default is the cluster's default network and can't be removed"},
		{Command{RemoveNetwork: &RemoveNetwork{"app"}}, ErrInUse, "network app is used by service web: remove these first"},
		{Command{RemoveNetwork: &RemoveNetwork{"net"}}, ErrInvalid, "network net is ambiguous: it may be net000000001, net000000004: give more of the ID"},
		{svc(svcSpec("web", 1)), ErrExists, "service web exists already"},
		{svc(svcSpec("db", 1, "nosuch")), ErrNotFound, "service db: no such network: nosuch: 'shoal net ls' lists all of them"},
		{svc(svcSpec("db", 1, "app", app.ID)), ErrInvalid, "service db: network app is given twice"},
		{svc(svcSpec("web.app", 1)), ErrInvalid, "service name \"web.app\" has a dot: use letters, digits, '-' and '_'; web.app may be an alias of it: --network name=NETWORK,alias=web.app"},
		{svc(svcSpec("db", -1)), ErrInvalid, "service db: -1 replicas is out of range: use 0 to 65535"},
		{svc(vip(webVIP)), ErrInUse, "service db: virtual address: network app: address " + webVIP + " is taken by service web"},
		{svc(vip("10.5.0.1")), ErrInUse, "service db: virtual address: network app: address 10.5.0.1 is taken by the gateway"},
		{svc(vip("10.5.1.9")), ErrInvalid, "service db: virtual address: network app: address 10.5.1.9 is not in its subnets (10.5.0.0/29)"},
		{svc(vip("10.5.0.5", "10.5.0.6")), ErrInvalid, "service db: virtual address: network app: address 10.5.0.6: only one of each family can be asked for"},
		{svc(dnsrr), ErrInvalid, "service db: endpoint mode dnsrr has no virtual addresses, but 10.5.0.5 is asked for"},
		{Command{UpdateService: &UpdateService{Ref: "web", Version: 1}}, ErrConflict, "service web was changed by someone else meanwhile: look at it and try again"},
		{Command{UpdateService: &UpdateService{Ref: "web", Spec: ptr(svcSpec("w", 1))}}, ErrInvalid, "service web can't be renamed to w: create another"},
		{Command{RemoveService: &RemoveService{"nosuch"}}, ErrNotFound, "no such service: nosuch: 'shoal svc ls' lists all of them"},
		{task("c1", "n1"), ErrExists, "name c1 is taken by task " + c1.ID + " on node n1: remove it with 'shoal rm c1'"},
		{task("c2", "n2"), ErrInvalid, "task c2: node n2 is down"},
		{task("c2", "n3"), ErrNotFound, "no such node: n3: 'shoal node ls' lists all of them"},
		{task("c2", "n1", spec.NetworkAttachment{Network: "nosuch"}), ErrNotFound, "task c2: no such network: nosuch: 'shoal net ls' lists all of them"},
		{task("c2", "n1", spec.NetworkAttachment{Network: "default", Addrs: c1.Attachments[0].Addrs}), ErrInUse,
			"task c2: network default: address " + c1.Attachments[0].Addrs[0].String() + " is taken by task c1"},
		{Command{StopTask: &StopTask{Ref: "nosuch"}}, ErrNotFound, "no such task: nosuch: 'shoal ps -a' lists all of them"},
		{Command{UpsertNode: &UpsertNode{simSpec("other", "n1", "", 9)}}, ErrExists, "node name n1 is taken by node " + n1.id + " at 192.168.0.1: start the agent with another --node-name, or remove that node"},
		{Command{UpsertNode: &UpsertNode{simSpec(c1.ID, "n9", "", 9)}}, ErrExists, "ID " + c1.ID + " is taken by a task"},
		{Command{UpsertNode: &UpsertNode{spec.Node{ID: "x", Name: "n9"}}}, ErrInvalid, "node n9: address invalid IP can't be advertised"},
		{Command{UpdateNode: &UpdateNode{Ref: "n1", Availability: ptr("off")}}, ErrInvalid, `node n1: availability "off": use active, pause or drain`},
		{Command{UpdateNode: &UpdateNode{Ref: "n1", Role: ptr("worker")}}, ErrInvalid, "node n1 is the last manager and can't be made a worker: make another node a manager first"},
		{Command{RemoveNode: &RemoveNode{Ref: "n1", Force: true}}, ErrInvalid, "node n1 is the last manager and can't be removed: make another node a manager first"},
		{Command{RemoveNode: &RemoveNode{Ref: "nosuch"}}, ErrNotFound, "no such node: nosuch: 'shoal node ls' lists all of them"},
		{Command{ReportTasks: &ReportTasks{Node: "nosuch"}}, ErrNotFound, "no such node: nosuch: 'shoal node ls' lists all of them"},
		{Command{SetNodeStatus: &SetNodeStatus{[]NodeStatus{{ID: n1.id, Status: "odd"}}}}, ErrInvalid, `node status "odd": use ready, down or unknown`},
	} {
		before := c.snapshot()
		r := c.s.Apply(c.s.index, k.cmd)
		if r.Err == nil || r.Err.Error() != k.want || !errors.Is(r.Err, k.kind) {
			t.Errorf("%s: got  %v\nwant %s (%v)", k.cmd.Kind(), r.Err, k.want, k.kind)
		}
		if string(before) != string(c.snapshot()) {
			t.Fatalf("%s was refused and changed the state", k.cmd.Kind())
		}
	}
	if r := New().Apply(1, sub("x")); r.Err == nil || r.Err.Error() != "there is no cluster yet: make one with shoal init" {
		t.Error(r.Err)
	}
	// The pool has 10.0.0.0/24 … 10.0.3.0/24, of which default has the first.
	for i := range 3 {
		c.network(fmt.Sprintf("more%d", i), "")
	}
	r := c.apply(sub("one-too-many"))
	if want := "network one-too-many: no free /24 subnet in pool 10.0.0.0/22: 4 are taken by networks, and 0 host routes or reserved ranges lie in it: remove networks, or give a --subnet outside of the pool"; r.Err == nil || r.Err.Error() != want || !errors.Is(r.Err, ErrExhausted) {
		t.Errorf("got  %v\nwant %s", r.Err, want)
	}
}

func TestInitRefusals(t *testing.T) {
	for _, k := range []struct {
		cl   Cluster
		host string
		want string
	}{
		{Cluster{}, "", "cluster ID is empty"},
		{Cluster{ID: "c", DataPathPort: 70000}, "", "data path port 70000: use 1 to 65535"},
		{Cluster{ID: "c", SubnetSize: 7}, "", "subnet size 7: use a prefix length from 8 to 30"},
		{Cluster{ID: "c"}, "10.0.0.0/8", "network default: no free /24 subnet in pool 10.0.0.0/8: 0 are taken by networks, and 1 host routes or reserved ranges lie in it: remove networks, or give a --subnet outside of the pool"},
	} {
		s := New()
		in := &InitCluster{Cluster: k.cl, DefaultNetwork: "net"}
		if k.host != "" {
			in.HostRoutes = []netip.Prefix{netip.MustParsePrefix(k.host)}
		}
		if r := s.Apply(1, Command{InitCluster: in}); r.Err == nil || r.Err.Error() != k.want {
			t.Errorf("got  %v\nwant %s", r.Err, k.want)
		}
		if _, ok := s.Cluster(); ok || len(s.networks) > 0 {
			t.Error("a refused init left something")
		}
	}
}

// Networks skip host routes, go on behind the last one, and dual stack works.
func TestNetworks(t *testing.T) {
	s := New()
	r := s.Apply(1, Command{InitCluster: &InitCluster{Cluster: Cluster{ID: "c"}, DefaultNetwork: "net0",
		HostRoutes: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24"), netip.MustParsePrefix("0.0.0.0/0")}}})
	if r.Err != nil || r.Network.Subnets[0].String() != "10.0.1.0/24" || r.Network.Gateways[0].String() != "10.0.1.1" || r.Network.VNI != spec.MinVNI {
		t.Fatal(r.Err, r.Network)
	}
	cl, _ := s.Cluster()
	if cl.SubnetSize != 24 || cl.DataPathPort != 4789 || cl.Pools[0].String() != "10.0.0.0/8" {
		t.Fatal(cl)
	}
	mk := func(i uint64, n spec.Network) spec.Network {
		n.ID = n.Name
		r := s.Apply(i, Command{CreateNetwork: &CreateNetwork{Network: n}})
		if r.Err != nil {
			t.Fatal(r.Err)
		}
		return *r.Network
	}
	a := mk(2, spec.Network{Name: "a"})
	if r := s.Apply(3, Command{RemoveNetwork: &RemoveNetwork{"a"}}); r.Err != nil {
		t.Fatal(r.Err)
	}
	b := mk(4, spec.Network{Name: "b"})
	if a.Subnets[0].String() != "10.0.2.0/24" || b.Subnets[0].String() != "10.0.3.0/24" || b.VNI != a.VNI+1 {
		t.Fatal(a, b)
	}
	dual := mk(5, spec.Network{Name: "dual", IPRanges: []netip.Prefix{netip.MustParsePrefix("10.9.0.64/26")},
		Subnets: []netip.Prefix{netip.MustParsePrefix("10.9.0.0/24"), netip.MustParsePrefix("fd00:9::/64")}})
	if !slices.Equal(dual.Gateways, addrs("10.9.0.1", "fd00:9::1")) {
		t.Fatal(dual.Gateways)
	}
	r = s.Apply(6, Command{CreateService: &CreateService{ID: "svc", Spec: svcSpec("web", 1, "dual")}})
	if r.Err != nil || !slices.Equal(r.Service.VIPs[0].Addrs, addrs("10.9.0.64", "fd00:9::2")) {
		t.Fatal(r.Err, r.Service)
	}
	checkInvariants(t, s)
}

// Ping-pong of a VIP's life: kept by updates that do not concern it, honoured
// when asked for, reserved after removal until the last task is released.
func TestVIPs(t *testing.T) {
	c := newCluster(t)
	n1, n2 := c.join("n1"), c.join("n2")
	c.network("app", "10.5.0.0/24")
	c.network("back", "10.6.0.0/24")
	web := c.service(svcSpec("web", 2, "app"))
	first := web.VIPs[0].Addrs[0]
	update := func(sp spec.ServiceSpec) spec.Service {
		return *c.must(Command{UpdateService: &UpdateService{Ref: "web", Spec: &sp}}).Service
	}
	if v := update(svcSpec("web", 2, "back", "app")); v.VIPs[1].Addrs[0] != first || len(v.VIPs) != 2 {
		t.Fatal(v.VIPs)
	}
	sp := svcSpec("web", 2, "app")
	sp.Networks[0].Addrs = addrs("10.5.0.77")
	if v := update(sp); v.VIPs[0].Addrs[0] != sp.Networks[0].Addrs[0] || len(v.VIPs) != 1 {
		t.Fatal(v.VIPs)
	}
	sp.EndpointMode, sp.Networks[0].Addrs = spec.EndpointModeDNSRR, nil
	if v := update(sp); len(v.VIPs) != 0 {
		t.Fatal(v.VIPs)
	}
	sp.EndpointMode, sp.Networks[0].Addrs = spec.EndpointModeVIP, addrs("10.5.0.77")
	update(sp)
	c.settle()

	c.must(Command{RemoveService: &RemoveService{"web"}})
	if _, err := c.s.Service("web"); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
	if a, _ := c.s.AssignmentFor(n1.id); len(a.Services) != 0 || len(a.Networks) != 1 {
		t.Fatal(a)
	}
	asked := svcSpec("other", 1, "app")
	asked.Networks[0].Addrs = addrs("10.5.0.77")
	taken := func() error {
		s, err := Restore(c.snapshot())
		if err != nil {
			t.Fatal(err)
		}
		return s.Apply(s.index+1, Command{CreateService: &CreateService{ID: "svcother0000", Spec: asked}}).Err
	}
	same := func() error {
		s, err := Restore(c.snapshot())
		if err != nil {
			t.Fatal(err)
		}
		return s.Apply(s.index+1, Command{CreateService: &CreateService{ID: "svcother0000", Spec: svcSpec("web", 1)}}).Err
	}
	if err := taken(); !errors.Is(err, ErrInUse) {
		t.Fatal(err)
	}
	if err := same(); !errors.Is(err, ErrInUse) || err.Error() != "service web is being removed: 2 of its tasks have not ended yet: try again in a moment" {
		t.Fatal(err)
	}
	if r := c.apply(Command{RemoveNetwork: &RemoveNetwork{"app"}}); !errors.Is(r.Err, ErrInUse) || !strings.Contains(r.Err.Error(), "(ending)") {
		t.Fatal(r.Err)
	}
	n2.frozen = true
	c.settle()
	if err := taken(); !errors.Is(err, ErrInUse) {
		t.Fatal(err)
	}
	// A lost task keeps the VIP, but not the name.
	c.down(n2)
	c.settle()
	if err := taken(); !errors.Is(err, ErrInUse) {
		t.Fatal(err)
	}
	if err := same(); err != nil {
		t.Fatal(err)
	}
	n2.frozen = false
	c.back(n2)
	c.settle()
	if err := taken(); err != nil {
		t.Fatal(err)
	}
	if len(c.s.services) != 0 || len(c.s.tasks) != 0 {
		t.Fatal(c.dump())
	}
	c.must(Command{RemoveNetwork: &RemoveNetwork{"app"}})
	c.checkReplay(len(c.log)/2, len(c.log)-4)
}

func TestStandalone(t *testing.T) {
	c := newCluster(t)
	n1 := c.join("n1")
	n2 := c.join("n2")
	r := c.run("c1", "n2", spec.NetworkAttachment{Network: "default", Addrs: addrs("10.0.0.50"), Aliases: []string{"db"}})
	if r.Err != nil || r.Task.Node != n2.id || r.Task.Attachments[0].Addrs[0].String() != "10.0.0.50" || r.Task.Status.State != spec.TaskAssigned {
		t.Fatal(r.Err, r.Task)
	}
	if r := c.run("c2", ""); r.Err != nil || r.Task.Node != n1.id { // n1 has fewer
		t.Fatal(r.Err, r.Task)
	}
	c.settle()
	// Its node is lost: it is marked, not moved, and taken back.
	c.down(n2)
	c.settle()
	x, _ := c.s.Task("c1")
	if x.Status.State != spec.TaskLost || x.Status.Message != "node n2 is down" || x.Node != n2.id || x.Status.Released {
		t.Fatal(x)
	}
	c.back(n2)
	if x, _ := c.s.Task("c1"); x.Status.State != spec.TaskRunning {
		t.Fatal(x)
	}
	// It ends by itself: its record and name stay, its address is free.
	n2.tasks[x.ID] = spec.TaskStatus{State: spec.TaskFailed, ExitCode: 3, Message: "exit status 3"}
	c.reportAll(n2)
	if x, _ := c.s.Task("c1"); x.Status.Released {
		t.Fatal("released before its node said so")
	}
	c.settle()
	x, _ = c.s.Task("c1")
	if x.Status.State != spec.TaskFailed || x.Status.ExitCode != 3 || !x.Status.Released || x.Desired != spec.DesiredRunning {
		t.Fatal(x)
	}
	if a, _ := c.s.AssignmentFor(n2.id); len(a.Tasks) != 1 || len(a.Networks) != 0 {
		t.Fatal("its output must stay, its network not", a)
	}
	if len(c.s.Tasks(TaskFilter{})) != 1 || len(c.s.Tasks(TaskFilter{All: true})) != 2 {
		t.Fatal(c.dump())
	}
	c.must(Command{StopTask: &StopTask{Ref: "c1", Remove: true}})
	if _, err := c.s.Task("c1"); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
	// Removed while it runs: the name is free at once, the address is not.
	c2, _ := c.s.Task("c2")
	c.must(Command{StopTask: &StopTask{Ref: "c2", Remove: true}})
	if r := c.run("c2", "n2", spec.NetworkAttachment{Network: "default", Addrs: c2.Attachments[0].Addrs}); !errors.Is(r.Err, ErrInUse) {
		t.Fatal(r.Err)
	}
	if r := c.run("c2", "n2"); r.Err != nil || r.Task.Attachments[0].Addrs[0] == c2.Attachments[0].Addrs[0] {
		t.Fatal(r.Err)
	}
	c.settle()
	if _, err := c.s.Task(c2.ID); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
	c.checkReplay(len(c.log) / 2)
}

func TestNodes(t *testing.T) {
	c := newCluster(t)
	n1, n2 := c.join("n1"), c.join("n2")
	c.must(Command{UpdateNode: &UpdateNode{Ref: "n2", SetLabels: map[string]string{"disk": "ssd", "x": "y"}, RemoveLabels: []string{"none"}}})
	c.must(Command{UpdateNode: &UpdateNode{Ref: "n2", RemoveLabels: []string{"x"}}})
	// A rejoin takes the address and keeps what managers own.
	again := simSpec(n2.id, "n2", spec.RoleManager, 200)
	again.Labels = map[string]string{"z": "z"}
	r := c.must(Command{UpsertNode: &UpsertNode{again}})
	if n := r.Node; n.Number != 2 || n.Addr != again.Addr || n.Role != spec.RoleWorker || n.Labels["disk"] != "ssd" || len(n.Labels) != 1 {
		t.Fatal(n)
	}
	idx := c.s.AssignmentIndex(n1.id)
	c.must(Command{UpsertNode: &UpsertNode{again}}) // nothing new
	c.status(n2, spec.NodeReady)
	if c.s.AssignmentIndex(n1.id) != idx {
		t.Fatal("assignments changed for nothing")
	}
	// A successor may take the name of a node that is down.
	c.down(n2)
	r = c.must(Command{UpsertNode: &UpsertNode{simSpec("nodesucc0000", "n2", "", 3)}})
	if n, err := c.s.Node("n2"); err != nil || n.ID != "nodesucc0000" || n.Number != 3 {
		t.Fatal(n, err)
	}
	c.back(n2)
	var amb *AmbiguousError
	if _, err := c.s.Node("n2"); !errors.As(err, &amb) || len(amb.Matches) != 2 {
		t.Fatal(err)
	}
	if r := c.apply(Command{RemoveNode: &RemoveNode{Ref: n2.id}}); !errors.Is(r.Err, ErrInUse) || r.Err.Error() != "node n2 is ready, not down: stop its agent or let it leave first, or use --force" {
		t.Fatal(r.Err)
	}
	c.must(Command{RemoveNode: &RemoveNode{Ref: n2.id, Force: true}})
	// Its number is not the next.
	if n := c.must(Command{UpsertNode: &UpsertNode{simSpec("nodefour0000", "n4", "", 4)}}).Node; n.Number != 4 {
		t.Fatal(n.Number)
	}
	if n, err := c.s.Node("nodef"); err != nil || n.Name != "n4" {
		t.Fatal(n, err)
	}
	if len(c.s.Nodes()) != 3 || c.s.AssignmentIndex("nosuch") != 0 {
		t.Fatal(c.s.Nodes())
	}
	c.checkReplay(3)
}

func TestCodec(t *testing.T) {
	for _, k := range []struct{ in, want string }{
		{`{}`, "command: want exactly one kind"},
		{`{"schedule":{"now":1,"ops":[]},"stop_task":{"ref":"a"}}`, "command: want exactly one kind"},
		{`{"stop_task":{"ref":"a","later":1}}`, `decode command: json: unknown field "later"`},
		{`{"stop_task":{"ref":"a"}} {}`, "decode command: data after its end"},
		{`nonsense`, "decode command: invalid character 'o' in literal null (expecting 'u')"},
		{strings.Repeat(" ", MaxCommand+1), "command is 4194305 bytes long: the longest allowed is 4194304"},
	} {
		if _, err := Decode([]byte(k.in)); err == nil || err.Error() != k.want || !errors.Is(err, ErrInvalid) {
			t.Errorf("got  %v\nwant %s", err, k.want)
		}
	}
	if _, err := Encode(Command{}); err == nil {
		t.Error("an empty command was encoded")
	}
	for _, k := range []struct{ in, want string }{
		{`{"version":9}`, "restore the cluster's state: snapshot has version 9, this Shoal reads 1: use the Shoal that wrote it"},
		{`x`, "restore the cluster's state: invalid character 'x' looking for beginning of value"},
	} {
		if _, err := Restore([]byte(k.in)); err == nil || err.Error() != k.want {
			t.Errorf("got  %v\nwant %s", err, k.want)
		}
	}
}

// What readers return is never written to.
func TestReadersShareNothingThatChanges(t *testing.T) {
	c := newCluster(t)
	n := c.join("n1")
	c.service(svcSpec("web", 3))
	c.settle()
	before, _ := c.s.AssignmentFor(n.id)
	text := fmt.Sprintf("%+v %+v %+v", before, c.s.Services(), c.s.Tasks(TaskFilter{All: true}))
	tasks, svcs := c.s.Tasks(TaskFilter{All: true}), c.s.Services()
	sp := svcSpec("web", 1)
	sp.Task.Env = []string{"A=b"}
	c.must(Command{UpdateService: &UpdateService{Ref: "web", Spec: &sp}})
	c.must(Command{UpdateNode: &UpdateNode{Ref: "n1", SetLabels: map[string]string{"a": "b"}}})
	c.settle()
	c.must(Command{RemoveService: &RemoveService{"web"}})
	c.settle()
	if now := fmt.Sprintf("%+v %+v %+v", before, svcs, tasks); now != text {
		t.Fatalf("changed from\n%s\nto\n%s", text, now)
	}
}

// TestGave: a node has of a task, its addresses and names what the managers gave it,
// while they are that task's.
func TestGave(t *testing.T) {
	c := newCluster(t)
	n1, n2 := c.join("n1"), c.join("n2")
	r := c.run("c1", "n2", spec.NetworkAttachment{Network: "default", Aliases: []string{"db"}})
	if r.Err != nil {
		t.Fatal(r.Err)
	}
	x := r.Task
	e := spec.Endpoint{Node: n2.id, Task: x.ID, TaskName: "c1", Network: x.Attachments[0].Network, Addrs: x.Attachments[0].Addrs, Aliases: []string{"db"}, Hostname: "any", State: spec.EndpointActive}
	none := e
	none.Aliases = nil
	for _, e := range []spec.Endpoint{e, none} {
		if !c.s.Gave(e) {
			t.Errorf("%+v was not given", e)
		}
	}
	for what, change := range map[string]func(*spec.Endpoint){
		"another node": func(e *spec.Endpoint) { e.Node = n1.id }, "no task": func(e *spec.Endpoint) { e.Task = "x" }, "another name": func(e *spec.Endpoint) { e.TaskName = "c2" },
		"a service": func(e *spec.Endpoint) { e.Service = "web" }, "another network": func(e *spec.Endpoint) { e.Network = "x" }, "no address": func(e *spec.Endpoint) { e.Addrs = nil },
		"another address": func(e *spec.Endpoint) { e.Addrs = addrs("10.0.0.77") }, "one address more": func(e *spec.Endpoint) { e.Addrs = append(addrs("10.0.0.77"), e.Addrs...) },
		"another alias": func(e *spec.Endpoint) { e.Aliases = []string{"db", "web"} },
	} {
		f := e
		if change(&f); c.s.Gave(f) {
			t.Errorf("%s: it was given", what)
		}
	}
	c.down(n2)
	if c.settle(); !c.s.Gave(e) {
		t.Error("a node that is down may be alive for others: what it has is its own")
	}
	c.back(n2)
	c.must(Command{StopTask: &StopTask{Ref: "c1", Remove: true}})
	if !c.s.Gave(e) {
		t.Error("a task that ends has its address until it is released")
	}
	if c.settle(); c.s.Gave(e) {
		t.Error("what was released is given still")
	}
}
