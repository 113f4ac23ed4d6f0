package state

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/shoalnet/shoal/spec"
	"pgregory.net/rapid"
)

// TestRandomCommands applies random commands, valid and not, to a cluster whose
// networks are so small that they run out, while nodes run tasks, fail, vanish
// and return. The invariants are checked after each command.
func TestRandomCommands(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := newClusterOf(t, 28, "10.0.0.0/26", "10.9.0.0/28")
		for i := range rapid.IntRange(1, 3).Draw(t, "nodes") {
			c.join(fmt.Sprintf("n%d", i))
		}
		some := func(t *rapid.T, label string, from []string) string {
			if len(from) == 0 || rapid.IntRange(0, 15).Draw(t, label+" odd") == 15 {
				return rapid.SampledFrom([]string{"", "nosuch", "net", "svc", "tas", "nod"}).Draw(t, label)
			}
			return rapid.SampledFrom(from).Draw(t, label)
		}
		keys := func(m any) []string {
			switch m := m.(type) {
			case map[string]*network:
				return slices.Sorted(maps.Keys(m))
			case map[string]*service:
				return slices.Sorted(maps.Keys(m))
			case map[string]*task:
				return slices.Sorted(maps.Keys(m))
			case map[string]*node:
				return slices.Sorted(maps.Keys(m))
			}
			panic("unknown")
		}
		attach := func(t *rapid.T) []spec.NetworkAttachment {
			var out []spec.NetworkAttachment
			for range rapid.IntRange(0, 2).Draw(t, "attachments") {
				a := spec.NetworkAttachment{Network: some(t, "network", keys(c.s.networks))}
				if n := c.s.networks[a.Network]; n != nil && n.Wired() && rapid.IntRange(0, 4).Draw(t, "static") == 4 {
					b := n.Subnets[0].Addr().As4()
					b[3] += byte(rapid.IntRange(0, 17).Draw(t, "host"))
					a.Addrs = []netip.Addr{netip.AddrFrom4(b)}
				}
				if rapid.IntRange(0, 5).Draw(t, "alias") == 5 {
					a.Aliases = []string{"db"}
				}
				out = append(out, a)
			}
			return out
		}
		port := func(t *rapid.T, mode string) spec.Port {
			return spec.Port{Published: uint16(rapid.SampledFrom([]int{0, 80, 81}).Draw(t, "port")), Target: 80, Protocol: "tcp", Mode: mode}
		}
		draw := func(t *rapid.T) spec.ServiceSpec {
			sp := svcSpec(rapid.SampledFrom([]string{"web", "db", "api"}).Draw(t, "name"), rapid.IntRange(0, 6).Draw(t, "replicas"))
			sp.Networks = attach(t)
			sp.EndpointMode = rapid.SampledFrom([]string{"", "vip", "dnsrr"}).Draw(t, "mode")
			sp.RestartMax = rapid.SampledFrom([]int{0, 0, 0, 1, 2}).Draw(t, "max")
			switch rapid.IntRange(0, 30).Draw(t, "odd") {
			case 30:
				sp.Name = ""
			case 29:
				sp.Replicas = -1
			case 28:
				sp.EndpointMode = "bad"
			case 27:
				sp.Constraints = []string{"bad"}
				return sp
			}
			for range rapid.SampledFrom([]int{0, 0, 1, 2}).Draw(t, "ports") {
				sp.Ports = append(sp.Ports, port(t, rapid.SampledFrom([]string{"ingress", "host", "local"}).Draw(t, "port mode")))
			}
			sp.Task.Env = rapid.SampledFrom([][]string{nil, {"V=1"}, {"V=2"}}).Draw(t, "env")
			sp.Constraints = rapid.SampledFrom([][]string{nil, nil, nil, {"node.name==n0"}, {"node.name!=n1"}, {"node.labels.x==y"}}).Draw(t, "constraint")
			return sp
		}
		node := func(t *rapid.T) *simNode {
			all := c.sorted()
			if len(all) == 0 {
				return c.join("n9")
			}
			return rapid.SampledFrom(all).Draw(t, "node")
		}
		t.Repeat(map[string]func(*rapid.T){
			"network": func(t *rapid.T) {
				n := spec.Network{ID: c.id("net"), Name: rapid.SampledFrom([]string{"app", "back", "x y"}).Draw(t, "name")}
				switch rapid.IntRange(0, 5).Draw(t, "kind") {
				case 0:
					n.Driver, n.Node = "bridge", some(t, "of node", keys(c.s.nodes))
				case 1:
					n.Internal = true
				}
				if s := rapid.SampledFrom([]string{"", "", "10.7.0.0/29", "10.0.0.0/24", "10.9.0.4/30", "10.7.0.1/24"}).Draw(t, "subnet"); s != "" {
					n.Subnets = []netip.Prefix{netip.MustParsePrefix(s)}
				}
				c.apply(Command{CreateNetwork: &CreateNetwork{Network: n, HostRoutes: []netip.Prefix{netip.MustParsePrefix("10.0.0.32/28")}}})
			},
			"connect": func(t *rapid.T) {
				n, ref := some(t, "net", keys(c.s.networks)), some(t, "target", append(keys(c.s.services), keys(c.s.tasks)...))
				if rapid.Bool().Draw(t, "on") {
					c.apply(Command{ConnectNetwork: &ConnectNetwork{Network: n, Target: ref}})
				} else {
					c.apply(Command{DisconnectNetwork: &DisconnectNetwork{Network: n, Target: ref}})
				}
			},
			"rmNetwork": func(t *rapid.T) {
				c.apply(Command{RemoveNetwork: &RemoveNetwork{Ref: some(t, "ref", keys(c.s.networks))}})
			},
			"service": func(t *rapid.T) {
				c.apply(Command{CreateService: &CreateService{ID: c.id("svc"), Spec: draw(t), Created: c.now}})
			},
			"update": func(t *rapid.T) {
				u := &UpdateService{Ref: some(t, "ref", keys(c.s.services))}
				if rapid.Bool().Draw(t, "spec") {
					sp := draw(t)
					if v := c.s.services[u.Ref]; v != nil {
						sp.Name = v.Spec.Name
					}
					u.Spec = &sp
				} else {
					n := rapid.IntRange(0, 8).Draw(t, "scale")
					u.Replicas = &n
				}
				c.apply(Command{UpdateService: u})
			},
			"rmService": func(t *rapid.T) {
				c.apply(Command{RemoveService: &RemoveService{Ref: some(t, "ref", keys(c.s.services))}})
			},
			"task": func(t *rapid.T) {
				var ports []spec.Port
				if rapid.IntRange(0, 3).Draw(t, "publish") == 0 {
					ports = append(ports, port(t, "host"))
				}
				c.apply(Command{CreateTask: &CreateTask{Ports: ports, ID: c.id("task"), Name: rapid.SampledFrom([]string{"c1", "c2", "c3"}).Draw(t, "name"),
					Node: some(t, "node", keys(c.s.nodes)), Spec: spec.TaskSpec{Command: []string{"x"}}, Networks: attach(t), Created: c.now}})
			},
			"stop": func(t *rapid.T) {
				c.apply(Command{StopTask: &StopTask{Ref: some(t, "ref", keys(c.s.tasks)), Remove: rapid.Bool().Draw(t, "rm")}})
			},
			"start": func(t *rapid.T) {
				ref := some(t, "ref", keys(c.s.tasks))
				run := rapid.IntRange(0, 2).Draw(t, "run")
				if x := c.s.tasks[ref]; x != nil {
					run += x.Run
				}
				c.apply(Command{StartTask: &StartTask{Ref: ref, Run: run, Restart: rapid.Bool().Draw(t, "restart"), Now: c.now}})
			},
			"rename": func(t *rapid.T) {
				c.apply(Command{RenameTask: &RenameTask{Ref: some(t, "ref", keys(c.s.tasks)), Name: rapid.SampledFrom([]string{"c1", "c2", "C3", "web"}).Draw(t, "name")}})
			},
			"join": func(t *rapid.T) {
				if len(c.nodes) < 4 {
					c.join(fmt.Sprintf("m%d", c.ids))
				}
			},
			"rejoin": func(t *rapid.T) {
				n := node(t)
				c.apply(Command{UpsertNode: &UpsertNode{Node: simSpec(n.id, rapid.SampledFrom([]string{"n0", "n1", c.s.nodes[n.id].Name}).Draw(t, "name"), "", rapid.IntRange(1, 9).Draw(t, "addr"))}})
			},
			"down": func(t *rapid.T) { c.down(node(t)) },
			"back": func(t *rapid.T) { c.back(node(t)) },
			"report": func(t *rapid.T) {
				n := node(t)
				c.reportAll(n)
			},
			"badReport": func(t *rapid.T) {
				st := spec.TaskStatus{State: spec.TaskState(rapid.IntRange(0, int(spec.TaskLost)).Draw(t, "state")), Released: rapid.Bool().Draw(t, "released")}
				id := some(t, "task", keys(c.s.tasks))
				if st.Released { // the node lets go of it: its simulated self, too
					for _, n := range c.nodes {
						delete(n.tasks, id)
					}
				}
				c.apply(Command{ReportTasks: &ReportTasks{Node: some(t, "node", keys(c.s.nodes)), Tasks: map[string]spec.TaskStatus{id: st}, Now: c.now}})
			},
			"avail": func(t *rapid.T) {
				c.avail(node(t), rapid.SampledFrom([]string{"active", "active", "pause", "drain"}).Draw(t, "avail"))
			},
			"rmNode": func(t *rapid.T) {
				n := node(t)
				if r := c.apply(Command{RemoveNode: &RemoveNode{Ref: n.id, Force: rapid.Bool().Draw(t, "force")}}); r.Err == nil {
					delete(c.nodes, n.id)
				}
			},
			"stale": func(t *rapid.T) { // a plan that comes late
				ops, _ := Plan(c.s, c.now)
				for _, n := range c.sorted() {
					c.step(n)
				}
				if len(ops) > 0 {
					c.must(Command{Schedule: &Schedule{Now: c.now, Ops: append(ops, ops...)}})
				}
			},
			"rounds": func(t *rapid.T) {
				for range rapid.IntRange(1, 15).Draw(t, "n") {
					c.round()
				}
			},
			"fate": func(t *rapid.T) {
				f := rapid.SampledFrom([]spec.TaskState{spec.TaskRunning, spec.TaskRunning, spec.TaskFailed, spec.TaskComplete, spec.TaskRejected}).Draw(t, "fate")
				node(t).fate = func(spec.Task) spec.TaskState { return f }
			},
			"rounds2": func(t *rapid.T) { // more often than the rest
				for range 8 {
					c.round()
				}
			},
			"role": func(t *rapid.T) {
				role := rapid.SampledFrom([]string{spec.RoleManager, spec.RoleWorker}).Draw(t, "role")
				c.apply(Command{UpdateNode: &UpdateNode{Ref: node(t).id, Role: &role}})
			},
			"save":   c.save,
			"anew":   c.anew,
			"clocks": c.clocks,
			"time":   func(t *rapid.T) { c.pass(rapid.Int64Range(1, 60_000).Draw(t, "ms")) },
		})
		if len(c.log) > 0 {
			c.checkReplay(rapid.IntRange(1, len(c.log)).Draw(t, "cut"))
		}

		// Whatever it has been through, a cluster whose nodes all return and
		// stop failing comes to rest with what was asked for.
		for _, n := range c.sorted() {
			n.fate = nil
			c.back(n)
			c.avail(n, spec.AvailabilityActive)
		}
		for _, n := range c.s.Nodes() {
			if c.nodes[n.ID] == nil { // a lost manager: what it had is given back with it
				c.must(Command{RemoveNode: &RemoveNode{Ref: n.ID}})
			}
		}
		for _, v := range c.s.Services() {
			sp := v.Spec.Clone()
			sp.Constraints, sp.RestartMax, sp.Task.Env, sp.Replicas = nil, 0, []string{"V=3"}, min(sp.Replicas, 1)
			c.must(Command{UpdateService: &UpdateService{Ref: v.ID, Spec: &sp}})
		}
		for _, x := range c.s.Tasks(TaskFilter{All: true}) {
			if x.Service == "" && x.Desired != spec.DesiredRemove {
				c.must(Command{StopTask: &StopTask{Ref: x.ID, Remove: true}})
			}
		}
		c.settle()
		for _, v := range c.s.Services() {
			full := false
			for _, a := range v.Spec.Networks {
				free, _ := c.s.networks[a.Network].room()
				full = full || free == 0
			}
			for _, w := range c.s.pinned(v.Spec.Networks) {
				full = full || c.s.nodes[w.Node] == nil // for ever
			}
			ports := map[uint16]int{} // tasks of mode host that want the one node there may be
			for _, o := range c.s.Services() {
				for _, p := range HostPorts(o) {
					ports[p.Published]++
				}
			}
			for _, p := range HostPorts(v) {
				full = full || ports[p.Published] > 1
			}
			if got := len(c.live(v.ID)); got != v.Spec.Replicas && !full && len(c.nodes) > 0 {
				t.Fatalf("service %s has %d of %d replicas\n%s", v.Spec.Name, got, v.Spec.Replicas, c.dump())
			}
		}
		for _, x := range c.s.Tasks(TaskFilter{All: true}) {
			if x.Desired == spec.DesiredRemove || (x.Service == "" && x.Node != "") {
				t.Fatalf("task %s is still there\n%s", x.Name, c.dump())
			}
		}
	})
}

// TestConverge: with all nodes eligible, services get exactly their replicas,
// spread evenly, whatever scaling, updates and failures came before.
func TestConverge(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := newCluster(t)
		c.strict = false
		nodes := c.joinAll(rapid.IntRange(1, 6).Draw(t, "nodes"))
		var svcs []spec.Service
		for i := range rapid.IntRange(1, 4).Draw(t, "services") {
			svcs = append(svcs, c.service(svcSpec(fmt.Sprintf("s%d", i), rapid.IntRange(0, 12).Draw(t, "replicas"))))
		}
		for i := range rapid.IntRange(1, 12).Draw(t, "changes") {
			v := rapid.SampledFrom(svcs).Draw(t, "service")
			switch rapid.IntRange(0, 4).Draw(t, "change") {
			case 4:
				c.clocks(t)
			case 0, 1:
				c.scale(v.ID, rapid.IntRange(0, 14).Draw(t, "to"))
			case 2:
				sp := c.s.services[v.ID].Spec.Clone()
				sp.Task.Env = []string{fmt.Sprintf("V=%d", i)}
				c.must(Command{UpdateService: &UpdateService{Ref: v.ID, Spec: &sp}})
			case 3: // one task dies, after a long run: no node gets a bad name
				c.pass(10 * failWindow)
				if ts := c.live(v.ID); len(ts) > 0 {
					x := rapid.SampledFrom(ts).Draw(t, "victim")
					n := c.nodes[x.Node]
					n.tasks[x.ID] = spec.TaskStatus{State: spec.TaskFailed, ExitCode: 1}
					c.reportAll(n)
				}
			}
			for range rapid.IntRange(0, 12).Draw(t, "rounds") {
				c.round()
			}
		}
		c.settle()
		checkInvariants(t, c.s)
		for _, v := range svcs {
			want := c.s.services[v.ID].Spec.Replicas
			ts := c.live(v.ID)
			if len(ts) != want || c.s.Running(v.ID) != want {
				t.Fatalf("%s has %d replicas, want %d\n%s", v.Spec.Name, len(ts), want, c.dump())
			}
			if all := c.s.Tasks(TaskFilter{Service: v.ID}); len(all) != want {
				t.Fatalf("%s has %d tasks that have not ended, want %d\n%s", v.Spec.Name, len(all), want, c.dump())
			}
			counts := map[string]int{}
			for _, n := range nodes {
				counts[n.id] = 0
			}
			slots := map[int]bool{}
			for _, x := range ts {
				counts[x.Node]++
				if slots[x.Slot] {
					t.Fatalf("slot %d runs twice", x.Slot)
				}
				slots[x.Slot] = true
			}
			l := slices.Sorted(maps.Values(counts))
			if l[len(l)-1]-l[0] > 1 {
				t.Fatalf("%s is spread %v\n%s", v.Spec.Name, l, c.dump())
			}
		}
		c.checkReplay(len(c.log) / 2)
	})
}

// FuzzCommand: whatever decodes is applied without a panic, and keeps the
// invariants; what was refused changed nothing.
func FuzzCommand(f *testing.F) {
	c := newCluster(f)
	c.join("n1")
	c.service(svcSpec("web", 2))
	c.must(Command{CreateTask: &CreateTask{ID: "task00000001", Name: "c1", Spec: spec.TaskSpec{Command: []string{"x"}, StopGrace: time.Second}}})
	c.settle()
	c.scale("web", 1)
	c.plan()
	for _, b := range c.log {
		f.Add(b)
	}
	f.Add([]byte(`{"remove_node":{"ref":"n1","force":true}}`))
	f.Add([]byte(`{"create_network":{"network":{"id":"x","name":"y","driver":"","subnets":["10.3.0.0/24","fd00::/64"],"gateways":["10.3.0.9"],"vni":0,"version":0,"created":0}}}`))
	f.Add([]byte(`{"init_cluster":{}} x`))
	base := c.snapshot()
	f.Fuzz(func(t *testing.T, b []byte) {
		cmd, err := Decode(b)
		if err != nil {
			return
		}
		if _, err := Encode(cmd); err != nil {
			t.Fatalf("decoded, but can't be encoded: %v", err)
		}
		s, err := Restore(base)
		if err != nil {
			t.Fatal(err)
		}
		r := s.Apply(s.index+1, cmd)
		if r.Err != nil {
			s.index--
			if after, _ := s.Snapshot(); string(after) != string(base) {
				t.Fatalf("refused (%v), but changed to %s", r.Err, after)
			}
		}
		checkInvariants(t, s)
		ops, _ := Plan(s, 2_000_000)
		s.Apply(s.index+1, Command{Schedule: &Schedule{Now: 2_000_000, Ops: ops}})
		checkInvariants(t, s)
		snap, err := s.Snapshot()
		if err != nil {
			t.Fatal(err)
		}
		again, err := Restore(snap)
		if err != nil {
			t.Fatalf("%v\n%s", err, snap)
		}
		if b2, _ := again.Snapshot(); string(b2) != string(snap) {
			t.Fatalf("restored\n%s\nfrom\n%s", b2, snap)
		}
		New().Apply(1, cmd)
	})
}

// FuzzRestore: a damaged snapshot is refused or consistent, never a panic.
func FuzzRestore(f *testing.F) {
	c := newCluster(f)
	c.join("n1")
	c.service(svcSpec("web", 2))
	c.settle()
	f.Add(c.snapshot())
	f.Add([]byte(`{"version":2}`))
	f.Add([]byte(`{"version":1,"last_subnet":"","last_vni":0,"last_number":0,"seq":0,"networks":null,"services":null,"nodes":null,"tasks":null}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := Restore(b)
		if err != nil {
			return
		}
		Plan(s, 1)
		if _, err := s.Snapshot(); err != nil {
			t.Fatal(err)
		}
	})
}
