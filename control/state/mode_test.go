package state

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/shoalnet/shoal/spec"
	"pgregory.net/rapid"
)

func globalSpec(name string) spec.ServiceSpec {
	sp := svcSpec(name, 0)
	sp.Mode = spec.ModeGlobal
	return sp
}

func (c *cluster) label(n *simNode, key, value string) {
	c.Helper()
	c.must(Command{UpdateNode: &UpdateNode{Ref: n.id, SetLabels: map[string]string{key: value}}})
}

// toggle cuts a node off, or has it back with all that it ran.
func (c *cluster) toggle(n *simNode) {
	c.Helper()
	if n.up {
		c.down(n)
		return
	}
	c.back(n)
	c.reportAll(n)
}

// availability draws one.
func availability(t *rapid.T) string {
	return rapid.SampledFrom([]string{spec.AvailabilityActive, spec.AvailabilityPause, spec.AvailabilityDrain}).Draw(t, "availability")
}

func (c *cluster) wantDesired(id string, want int) {
	c.Helper()
	if got := c.s.Desired(id); got != want {
		c.Fatalf("desired are %d, want %d\n%s", got, want, c.dump())
	}
}

// TestGlobal: one task on each node, which comes and goes with it.
func TestGlobal(t *testing.T) {
	c := newCluster(t)
	ns := c.joinAll(3)
	mon := c.service(globalSpec("mon"))
	c.settle()
	c.wantSpread(mon.ID, map[string]int{"n1": 1, "n2": 1, "n3": 1})
	c.wantDesired(mon.ID, 3)
	for _, x := range c.live(mon.ID) {
		if n := c.s.nodes[x.Node]; x.Slot != n.Number || x.Name != "mon."+n.ID+"."+x.ID {
			t.Errorf("task %s in slot %d of node %d", x.Name, x.Slot, n.Number)
		}
	}
	n4 := c.join("n4")
	c.settle()
	c.wantSpread(mon.ID, map[string]int{"n1": 1, "n2": 1, "n3": 1, "n4": 1})

	c.avail(ns[0], spec.AvailabilityDrain)
	c.settle()
	c.wantSpread(mon.ID, map[string]int{"n2": 1, "n3": 1, "n4": 1})
	c.wantDesired(mon.ID, 3)
	c.avail(ns[0], spec.AvailabilityActive)
	c.settle()
	c.wantSpread(mon.ID, map[string]int{"n1": 1, "n2": 1, "n3": 1, "n4": 1})

	// A node that is away keeps its own: nobody takes it over, and what still runs
	// there when it is back goes on.
	was := c.s.TasksOfNode(n4.id)[0].ID
	c.down(n4)
	c.settle()
	c.wantSpread(mon.ID, map[string]int{"n1": 1, "n2": 1, "n3": 1})
	c.wantDesired(mon.ID, 3)
	c.back(n4)
	c.reportAll(n4)
	c.settle()
	c.wantSpread(mon.ID, map[string]int{"n1": 1, "n2": 1, "n3": 1, "n4": 1})
	if ts := c.s.TasksOfNode(n4.id); len(ts) != 1 || ts[0].ID != was {
		t.Errorf("what ran on n4 was replaced\n%s", c.dump())
	}

	// One that ends is begun again where it was; on a paused node, what runs stays.
	c.fail(c.s.TasksOfNode(ns[1].id)[0])
	c.settle()
	c.wantSpread(mon.ID, map[string]int{"n1": 1, "n2": 1, "n3": 1, "n4": 1})
	c.avail(ns[2], spec.AvailabilityPause)
	c.join("n5")
	c.settle()
	c.wantSpread(mon.ID, map[string]int{"n1": 1, "n2": 1, "n3": 1, "n4": 1, "n5": 1})
	c.wantDesired(mon.ID, 5)

	// The constraints say which.
	c.label(ns[0], "disk", "ssd")
	c.label(n4, "disk", "ssd")
	c.change(mon.ID, func(sp *spec.ServiceSpec) { sp.Constraints = []string{"node.labels.disk==ssd"} })
	c.settle()
	c.wantSpread(mon.ID, map[string]int{"n1": 1, "n4": 1})
	c.wantDesired(mon.ID, 2)
	c.wantUpdate(mon.ID, spec.UpdateCompleted, "")

	two := 2
	if r := c.apply(Command{UpdateService: &UpdateService{Ref: "mon", Replicas: &two}}); !errors.Is(r.Err, ErrInvalid) || !strings.Contains(r.Err.Error(), "mode global") {
		t.Errorf("scaled: %v", r.Err)
	}
	sp := svcSpec("mon", 2)
	if r := c.apply(Command{UpdateService: &UpdateService{Ref: "mon", Spec: &sp}}); !errors.Is(r.Err, ErrInvalid) || !strings.Contains(r.Err.Error(), "mode") {
		t.Errorf("made replicated: %v", r.Err)
	}
	bad := globalSpec("bad")
	bad.Replicas = 1
	if r := c.apply(Command{CreateService: &CreateService{ID: c.id("svc"), Spec: bad}}); !errors.Is(r.Err, ErrInvalid) {
		t.Errorf("global with replicas: %v", r.Err)
	}
	checkInvariants(t, c.s)
	c.checkReplay(len(c.log) - 5)
}

// TestGlobalUpdate: node after node, never without; what can't be updated now, later.
func TestGlobalUpdate(t *testing.T) {
	c := newCluster(t)
	ns := c.joinAll(4)
	sp := globalSpec("mon")
	env("1")(&sp)
	mon := c.service(sp)
	c.settle()
	c.avail(ns[3], spec.AvailabilityPause)
	c.change(mon.ID, env("2"))
	c.watch(func() {
		for _, n := range ns {
			runs := 0
			for _, x := range c.s.TasksOfNode(n.id) {
				if x.Status.State == spec.TaskRunning {
					runs++
				}
			}
			if runs == 0 {
				t.Fatalf("%s has none that runs\n%s", n.id, c.dump())
			}
		}
	})
	c.wantVersions(mon.ID, map[string]int{"V=1": 1, "V=2": 3})
	c.wantUpdate(mon.ID, spec.UpdateCompleted, "")
	c.avail(ns[3], spec.AvailabilityActive)
	c.settle()
	c.wantVersions(mon.ID, map[string]int{"V=2": 4})

	// A mistyped constraint takes nothing away.
	c.change(mon.ID, func(sp *spec.ServiceSpec) {
		sp.Constraints = []string{"node.labels.dsk==ssd"}
		env("3")(sp)
	})
	c.settle()
	c.wantUpdate(mon.ID, spec.UpdatePaused, "no node matches constraint node.labels.dsk==ssd")
	c.wantVersions(mon.ID, map[string]int{"V=2": 4})
	c.change(mon.ID, func(sp *spec.ServiceSpec) { sp.Constraints = nil })
	c.settle()
	c.wantVersions(mon.ID, map[string]int{"V=3": 4})

	// Broken, and rolled back.
	c.broken("4")
	c.change(mon.ID, func(sp *spec.ServiceSpec) {
		env("4")(sp)
		sp.Update = &spec.UpdateConfig{Parallelism: 1, FailureAction: spec.FailureRollback}
	})
	c.settle()
	c.wantUpdate(mon.ID, spec.RollbackCompleted, "")
	c.wantVersions(mon.ID, map[string]int{"V=3": 4})

	// A port of the node: the old one is stopped for the new one.
	c.change(mon.ID, func(sp *spec.ServiceSpec) {
		env("5")(sp)
		sp.Ports = []spec.Port{{Published: 8080, Target: 80, Protocol: "tcp", Mode: spec.PortHost}}
	})
	c.settle()
	c.change(mon.ID, env("6"))
	c.settle()
	c.wantUpdate(mon.ID, spec.UpdateCompleted, "")
	c.wantVersions(mon.ID, map[string]int{"V=6": 4})
	checkInvariants(t, c.s)
	c.checkReplay(len(c.log) - 5)
}

// TestGlobalNodeLeaves: a node that is removed takes its slot with it, and one that
// joins after it gets its own.
func TestGlobalNodeLeaves(t *testing.T) {
	c := newCluster(t)
	ns := c.joinAll(3)
	mon := c.service(globalSpec("mon"))
	c.settle()
	c.down(ns[1])
	c.settle()
	c.must(Command{RemoveNode: &RemoveNode{Ref: ns[1].id}})
	delete(c.nodes, ns[1].id)
	c.settle()
	c.wantSpread(mon.ID, map[string]int{"n1": 1, "n3": 1})
	c.wantDesired(mon.ID, 2)
	for _, x := range c.s.Tasks(TaskFilter{Service: mon.ID}) {
		if x.Node == ns[1].id {
			t.Errorf("%s is of a node that is gone", x.Name)
		}
	}
	c.join("n9")
	c.settle()
	c.wantSpread(mon.ID, map[string]int{"n1": 1, "n3": 1, "n9": 1})
	checkInvariants(t, c.s)
}

// TestSpreadPreference: as many replicas in each zone, and in each rack of it.
func TestSpreadPreference(t *testing.T) {
	c := newCluster(t)
	ns := c.joinAll(5)
	for i, zr := range [][2]string{{"a", "1"}, {"a", "1"}, {"a", "2"}, {"b", "1"}, {"", ""}} {
		if zr[0] != "" {
			c.label(ns[i], "zone", zr[0])
			c.label(ns[i], "rack", zr[1])
		}
	}
	sp := svcSpec("web", 9)
	sp.Spread = []string{"node.labels.zone", "node.labels.rack"}
	web := c.service(sp)
	c.settle()
	// Three in each of the zones a, b and none; in a, two in one rack and one in the other.
	got := c.spread(web.ID)
	rack1 := got["n1"] + got["n2"]
	if got["n4"] != 3 || got["n5"] != 3 || rack1+got["n3"] != 3 || rack1 < 1 || rack1 > 2 {
		t.Fatalf("%v\n%s", got, c.dump())
	}
	c.scale("web", 3)
	c.settle()
	if got = c.spread(web.ID); got["n4"] != 1 || got["n5"] != 1 {
		t.Fatalf("after scaling down: %v\n%s", got, c.dump())
	}
	bad := svcSpec("bad", 1)
	bad.Spread = []string{"node.hostname"}
	if r := c.apply(Command{CreateService: &CreateService{ID: c.id("svc"), Spec: bad}}); !errors.Is(r.Err, ErrInvalid) || !strings.Contains(r.Err.Error(), "spread=node.labels.") {
		t.Error(r.Err)
	}
	checkInvariants(t, c.s)
}

// TestMaxPerNode: what finds no place says why, and an update goes on in the places
// that there are.
func TestMaxPerNode(t *testing.T) {
	c := newCluster(t)
	ns := c.joinAll(2)
	sp := svcSpec("web", 5)
	env("1")(&sp)
	sp.MaxPerNode = 2
	web := c.service(sp)
	c.settle()
	c.wantSpread(web.ID, map[string]int{"n1": 2, "n2": 2})
	pending := 0
	for _, x := range c.s.Tasks(TaskFilter{Service: web.ID}) {
		if x.Node == "" {
			pending++
			if !strings.Contains(x.Status.Message, "2 nodes: 2 with as many replicas as it may have") {
				t.Error(x.Status.Message)
			}
		}
	}
	if pending != 1 {
		t.Fatalf("%d are pending\n%s", pending, c.dump())
	}
	c.scale("web", 4)
	c.settle()
	c.change(web.ID, env("2"))
	c.watch(func() {
		for _, n := range ns {
			if k := c.spread(web.ID)[c.s.nodes[n.id].Name]; k > 2 {
				t.Fatalf("%d on %s\n%s", k, n.id, c.dump())
			}
		}
	})
	c.wantUpdate(web.ID, spec.UpdateCompleted, "")
	c.wantVersions(web.ID, map[string]int{"V=2": 4})
	c.join("n3")
	c.scale("web", 5)
	c.settle()
	c.wantSpread(web.ID, map[string]int{"n1": 2, "n2": 2, "n3": 1})
	checkInvariants(t, c.s)
}

// TestReservations: no node promises more than it has, whoever asks; what finds no
// place says why, and an update goes on in the places that there are.
func TestReservations(t *testing.T) {
	c := newCluster(t)
	ns := c.joinAll(2)
	for _, n := range ns {
		x, _ := c.s.Node(n.id)
		x.NanoCPUs, x.Memory = 2e9, 1<<30
		c.must(Command{UpsertNode: &UpsertNode{Node: x}})
	}
	sp := svcSpec("web", 5)
	env("1")(&sp)
	sp.Task.Resources.ReserveMemory = 400 << 20
	web := c.service(sp)
	c.settle()
	c.wantSpread(web.ID, map[string]int{"n1": 2, "n2": 2})
	why := ""
	for _, x := range c.s.Tasks(TaskFilter{Service: web.ID}) {
		if x.Node == "" {
			why = x.Status.Message
		}
	}
	if why != "2 nodes: 2 with less CPU or memory left than is to be reserved" {
		t.Errorf("%q\n%s", why, c.dump())
	}
	c.scale("web", 4)
	c.settle()
	c.change(web.ID, env("2"))
	c.settle()
	c.wantUpdate(web.ID, spec.UpdateCompleted, "")
	c.wantVersions(web.ID, map[string]int{"V=2": 4})
	c.wantSpread(web.ID, map[string]int{"n1": 2, "n2": 2})

	// CPUs are counted apart, and over all services.
	for i, want := range []int{2, 0} {
		cpu := svcSpec(fmt.Sprintf("cpu%d", i), 3)
		cpu.Task.Resources.ReserveNanoCPUs = 15e8
		v := c.service(cpu)
		c.settle()
		if got := len(c.live(v.ID)); got != want {
			t.Errorf("%s: %d run, want %d\n%s", cpu.Name, got, want, c.dump())
		}
	}
	most := svcSpec("most", 1)
	most.Task.Resources.ReserveMemory = 1 << 62
	v := c.service(most)
	c.settle()
	if got := len(c.live(v.ID)); got != 0 {
		t.Errorf("%d run of a service that wants more than there is", got)
	}
	// A node that comes has room.
	c.join("n3")
	c.settle()
	if got := len(c.live(v.ID)); got != 1 {
		t.Errorf("a node that does not say what it has gets %d, want 1", got)
	}
	checkInvariants(t, c.s)
	c.checkReplay(len(c.log) - 5)
}

// TestRebalance: what moved away when a node died comes back, no more than that, and
// never fewer run.
func TestRebalance(t *testing.T) {
	c := newCluster(t)
	ns := c.joinAll(3)
	web := c.service(svcSpec("web", 6))
	c.settle()
	c.down(ns[2])
	c.settle()
	c.back(ns[2])
	c.settle()
	c.wantSpread(web.ID, map[string]int{"n1": 3, "n2": 3})
	was := map[string]bool{}
	for _, x := range c.live(web.ID) {
		was[x.ID] = true
	}
	rebalance := func() error {
		return c.apply(Command{UpdateService: &UpdateService{Ref: "web", Rebalance: true}}).Err
	}
	if err := rebalance(); err != nil {
		t.Fatal(err)
	}
	if n := c.s.Stale(web.ID); n != 2 {
		t.Fatalf("%d are to be replaced, want 2\n%s", n, c.dump())
	}
	c.watch(func() {
		if n := len(c.live(web.ID)); n < 6 {
			t.Fatalf("%d run\n%s", n, c.dump())
		}
	})
	c.wantSpread(web.ID, map[string]int{"n1": 2, "n2": 2, "n3": 2})
	moved := 0
	for _, x := range c.live(web.ID) {
		if !was[x.ID] {
			moved++
		}
	}
	if moved != 2 {
		t.Errorf("%d were replaced, want 2", moved)
	}
	if err := rebalance(); err != nil || c.s.Stale(web.ID) != 0 {
		t.Errorf("again: %v, %d to be replaced", err, c.s.Stale(web.ID))
	}
	c.settle()
	c.broken("2")
	c.change(web.ID, env("2"))
	if err := rebalance(); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "is being updated") {
		t.Error(err)
	}
	c.settle()
	if err := rebalance(); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "is paused") {
		t.Error(err)
	}
	c.service(globalSpec("mon"))
	if r := c.apply(Command{UpdateService: &UpdateService{Ref: "mon", Rebalance: true}}); !errors.Is(r.Err, ErrInvalid) {
		t.Error(r.Err)
	}
	checkInvariants(t, c.s)
	c.checkReplay(len(c.log) - 10)
}

// TestRebalanceSpread: zones first, then nodes, as for a service that is made anew.
func TestRebalanceSpread(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := newCluster(t)
		c.strict = false
		zones := rapid.IntRange(1, 3).Draw(t, "zones")
		ns := c.joinAll(rapid.IntRange(1, 6).Draw(t, "nodes"))
		zoneOf := map[string]int{}
		for _, n := range ns {
			z := rapid.IntRange(1, zones).Draw(t, "zone")
			zoneOf[n.id] = z
			c.label(n, "zone", fmt.Sprint(z))
		}
		sp := svcSpec("web", rapid.IntRange(0, 10).Draw(t, "replicas"))
		if rapid.Bool().Draw(t, "spread") {
			sp.Spread = []string{"node.labels.zone"}
		}
		web := c.service(sp)
		c.settle()
		for range rapid.IntRange(0, 3).Draw(t, "outages") {
			n := rapid.SampledFrom(ns).Draw(t, "node")
			c.down(n)
			c.settle()
			c.back(n)
			c.settle()
		}
		c.must(Command{UpdateService: &UpdateService{Ref: "web", Rebalance: true}})
		c.settle()
		if got := len(c.live(web.ID)); got != sp.Replicas {
			t.Fatalf("%d of %d run\n%s", got, sp.Replicas, c.dump())
		}
		byNode, byZone := map[string]int{}, map[int]int{}
		for _, n := range ns {
			byNode[n.id], byZone[zoneOf[n.id]] = 0, 0
		}
		for _, x := range c.live(web.ID) {
			byNode[x.Node]++
			byZone[zoneOf[x.Node]]++
		}
		for _, a := range ns {
			for _, b := range ns {
				za, zb := zoneOf[a.id], zoneOf[b.id]
				if len(sp.Spread) > 0 && byZone[za]-byZone[zb] > 1 || (len(sp.Spread) == 0 || za == zb) && byNode[a.id]-byNode[b.id] > 1 {
					t.Fatalf("zones %v, nodes %v\n%s", byZone, byNode, c.dump())
				}
			}
		}
		checkInvariants(t, c.s)
		c.checkReplay(len(c.log) / 2)
	})
}

// TestRestartCondition: of which ends a task is replaced.
func TestRestartCondition(t *testing.T) {
	for _, tc := range []struct {
		condition string
		end       spec.TaskState
		again     bool
	}{
		{"", spec.TaskComplete, true},
		{spec.RestartAny, spec.TaskFailed, true},
		{spec.RestartOnFailure, spec.TaskFailed, true},
		{spec.RestartOnFailure, spec.TaskRejected, true},
		{spec.RestartOnFailure, spec.TaskComplete, false},
		{spec.RestartNone, spec.TaskFailed, false},
		{spec.RestartNone, spec.TaskComplete, false},
	} {
		c := newCluster(t)
		c.joinAll(2)
		sp := svcSpec("web", 2)
		sp.RestartCondition = tc.condition
		web := c.service(sp)
		c.settle()
		x := c.live(web.ID)[0]
		n := c.nodes[x.Node]
		n.tasks[x.ID] = spec.TaskStatus{State: tc.end, At: c.now}
		c.must(Command{ReportTasks: &ReportTasks{Node: n.id, Tasks: map[string]spec.TaskStatus{x.ID: n.tasks[x.ID]}, Now: c.now}})
		c.settle()
		if got := len(c.live(web.ID)) == 2; got != tc.again {
			t.Errorf("%q, %s: runs again: %v\n%s", tc.condition, tc.end, got, c.dump())
		}
		// A change of the service starts all anew, and comes to its end.
		c.change(web.ID, env("2"))
		c.settle()
		if got := len(c.live(web.ID)); got != 2 {
			t.Errorf("%q, %s: %d run after a change\n%s", tc.condition, tc.end, got, c.dump())
		}
		c.wantUpdate(web.ID, spec.UpdateCompleted, "")
		checkInvariants(t, c.s)
	}
}

// TestRestartWindow: a run that lasts as long as the window is a success.
func TestRestartWindow(t *testing.T) {
	for _, lasts := range []time.Duration{30 * time.Second, 2 * time.Minute} {
		c := newCluster(t)
		c.joinAll(1)
		sp := svcSpec("web", 1)
		sp.RestartMax, sp.RestartWindow = 2, time.Minute
		web := c.service(sp)
		for range 5 {
			c.settle()
			if ts := c.live(web.ID); len(ts) == 1 {
				c.now += lasts.Milliseconds()
				c.fail(ts[0])
			}
		}
		c.settle()
		if runs := len(c.live(web.ID)) == 1; runs != (lasts > time.Minute) {
			t.Errorf("after runs of %s it runs: %v\n%s", lasts, runs, c.dump())
		}
	}
}

// TestRandomGlobal: whatever nodes do, in the end each that is there has one.
func TestRandomGlobal(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := newCluster(t)
		c.strict = false
		c.joinAll(rapid.IntRange(1, 5).Draw(t, "nodes"))
		sp := globalSpec("mon")
		if rapid.Bool().Draw(t, "stop first") {
			sp.Update = &spec.UpdateConfig{Order: spec.StopFirst, Parallelism: rapid.IntRange(0, 2).Draw(t, "parallelism")}
		}
		mon := c.service(sp)
		for i := range rapid.IntRange(1, 15).Draw(t, "changes") {
			n := rapid.SampledFrom(c.sorted()).Draw(t, "node")
			switch rapid.IntRange(0, 7).Draw(t, "change") {
			case 7:
				c.clocks(t)
			case 0:
				c.avail(n, availability(t))
			case 1:
				c.toggle(n)
			case 2:
				c.change(mon.ID, env(fmt.Sprint(i)))
			case 3:
				c.label(n, "disk", rapid.SampledFrom([]string{"ssd", "hdd"}).Draw(t, "disk"))
			case 4:
				c.change(mon.ID, func(sp *spec.ServiceSpec) {
					sp.Constraints = rapid.SampledFrom([][]string{nil, {"node.labels.disk==ssd"}, {"node.labels.disk!=ssd"}}).Draw(t, "constraints")
				})
			case 5:
				if len(c.nodes) < 7 {
					c.join(fmt.Sprintf("x%d", i))
				}
			case 6:
				if ts := c.live(mon.ID); len(ts) > 0 && c.nodes[ts[0].Node].up {
					c.fail(ts[0])
				}
			}
			for range rapid.IntRange(0, 8).Draw(t, "rounds") {
				c.round()
			}
		}
		for _, n := range c.sorted() {
			if !n.up {
				c.toggle(n)
			}
			if c.s.nodes[n.id].Availability == spec.AvailabilityPause {
				c.avail(n, spec.AvailabilityActive)
			}
		}
		c.change(mon.ID, func(sp *spec.ServiceSpec) { sp.Constraints = nil })
		c.settle()
		want := map[string]int{}
		for _, n := range c.nodes {
			if c.s.nodes[n.id].Availability == spec.AvailabilityActive {
				want[c.s.nodes[n.id].Name] = 1
			}
		}
		if got := c.spread(mon.ID); fmt.Sprint(got) != fmt.Sprint(want) || c.s.Desired(mon.ID) != len(want) {
			t.Fatalf("runs on %v, want %v, desired %d\n%s", got, want, c.s.Desired(mon.ID), c.dump())
		}
		if all := c.s.Tasks(TaskFilter{Service: mon.ID}); len(all) != len(want) {
			t.Fatalf("%d have not ended, want %d\n%s", len(all), len(want), c.dump())
		}
		if u := c.s.services[mon.ID].Update; u != nil && u.Active() {
			t.Fatalf("the update does not end: %+v\n%s", u, c.dump())
		}
		checkInvariants(t, c.s)
		c.checkReplay(len(c.log) / 2)
	})
}
