package state

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/shoalnet/shoal/spec"
)

func (c *cluster) wantSpread(svc string, want map[string]int) {
	c.Helper()
	if got := c.spread(svc); !maps.Equal(got, want) {
		c.Fatalf("spread is %v, want %v\n%s", got, want, c.dump())
	}
}

// fail ends a task as its node would.
func (c *cluster) fail(t spec.Task) {
	c.Helper()
	n := c.nodes[t.Node]
	n.tasks[t.ID] = spec.TaskStatus{State: spec.TaskFailed, ExitCode: 1, Message: "exit status 1", At: c.now}
	c.must(Command{ReportTasks: &ReportTasks{Node: n.id, Tasks: map[string]spec.TaskStatus{t.ID: n.tasks[t.ID]}, Now: c.now}})
}

func TestSpreadAndScale(t *testing.T) {
	c := newCluster(t)
	c.joinAll(3)
	web := c.service(svcSpec("web", 5))
	c.settle()
	c.wantSpread(web.ID, map[string]int{"n1": 2, "n2": 2, "n3": 1})
	// The total decides among equals: n3 has fewest.
	db := c.service(svcSpec("db", 1))
	c.settle()
	c.wantSpread(db.ID, map[string]int{"n3": 1})
	c.scale("web", 3)
	c.settle()
	c.wantSpread(web.ID, map[string]int{"n1": 1, "n2": 1, "n3": 1})
	if len(c.s.Tasks(TaskFilter{Service: web.ID, All: true})) != 3 {
		t.Fatal("what was scaled down is still remembered\n" + c.dump())
	}
	c.scale("web", 0)
	c.settle()
	c.wantSpread(web.ID, map[string]int{})
	c.scale("web", 2)
	c.settle()
	if ts := c.live(web.ID); len(ts) != 2 || ts[0].Slot != 1 || ts[1].Slot != 2 || ts[0].Name != "web.1."+ts[0].ID {
		t.Fatal(c.dump())
	}
}

// TestNodeDown: lost tasks are replaced at once, their addresses stay theirs;
// the returned node is told to stop them.
func TestNodeDown(t *testing.T) {
	c := newCluster(t)
	ns := c.joinAll(3)
	web := c.service(svcSpec("web", 3))
	c.settle()
	lost := c.s.TasksOfNode(ns[2].id)[0]
	c.down(ns[2])
	ops, _ := c.plan()
	if len(ops) != 2 || ops[0].Kind != OpLost || ops[1].Kind != OpCreate || ops[1].Node == "" || ops[1].Slot != lost.Slot {
		t.Fatal(ops)
	}
	c.settle()
	c.wantSpread(web.ID, map[string]int{"n1": 2, "n2": 1})
	x, _ := c.s.Task(lost.ID)
	if x.Status.State != spec.TaskLost || x.Desired != spec.DesiredShutdown || x.Status.Released {
		t.Fatal(x)
	}
	c.back(ns[2])
	c.reportAll(ns[2]) // it still runs: no revival
	x, _ = c.s.Task(lost.ID)
	if x.Status.State != spec.TaskLost || x.Desired != spec.DesiredShutdown {
		t.Fatal(x)
	}
	c.settle()
	x, _ = c.s.Task(lost.ID)
	if x.Status.State != spec.TaskShutdown || !x.Status.Released {
		t.Fatal(x)
	}
	c.wantSpread(web.ID, map[string]int{"n1": 2, "n2": 1}) // no rebalancing
	c.checkReplay(len(c.log) - 5)
}

// TestOldEndsWhileNewStarts: what is to be replaced ends by itself, with its node or
// alone, while the new one starts. When that runs, the old one is wanted no more: a
// node that comes back with it lets go of it.
func TestOldEndsWhileNewStarts(t *testing.T) {
	for _, with := range []string{"node", "program"} {
		c := newCluster(t)
		ns := c.joinAll(2)
		web := c.service(svcSpec("web", 1))
		c.settle()
		old := c.live(web.ID)[0]
		from, to := ns[0], ns[1]
		if old.Node != from.id {
			from, to = to, from
		}
		c.avail(from, spec.AvailabilityPause)
		to.frozen = true
		sp := svcSpec("web", 1)
		sp.Task.Env = []string{"V=2"}
		c.must(Command{UpdateService: &UpdateService{Ref: "web", Spec: &sp}})
		c.settle()
		if ts := c.s.TasksOfNode(to.id); len(ts) != 1 || len(c.live(web.ID)) != 1 {
			t.Fatal(c.dump())
		}
		if with == "node" {
			c.down(from)
		} else {
			c.fail(old)
		}
		c.settle()
		to.frozen = false
		c.settle()
		if with == "node" {
			c.back(from)
			c.reportAll(from)
		}
		c.settle()
		if x, err := c.s.Task(old.ID); err == nil && (x.Desired != spec.DesiredShutdown || !x.Status.State.Ended() || !x.Status.Released) {
			t.Errorf("with its %s: %+v\n%s", with, x, c.dump())
		}
		c.wantSpread(web.ID, map[string]int{c.s.nodes[to.id].Name: 1})
		c.checkReplay(len(c.log) - 3)
	}
}

// TestRevival: a lost task whose replacement found no place is taken back.
func TestRevival(t *testing.T) {
	for _, byReport := range []bool{false, true} {
		c := newCluster(t)
		c.join("n1")
		n2 := c.join("n2")
		sp := svcSpec("web", 2)
		sp.Constraints = []string{"node.name==n2"}
		web := c.service(sp)
		c.settle()
		first := c.live(web.ID)
		c.down(n2)
		c.settle()
		if ts := c.s.Tasks(TaskFilter{Service: web.ID}); len(ts) != 2 || ts[0].Status.State != spec.TaskPending || ts[0].Status.Message != "1 node that matches the constraints: 1 down" {
			t.Fatal(c.dump())
		}
		n2.up = true
		if byReport {
			c.reportAll(n2) // before the managers know it as ready
		}
		c.status(n2, spec.NodeReady)
		c.settle()
		got := c.live(web.ID)
		if len(got) != 2 || got[0].ID != first[0].ID || got[1].ID != first[1].ID || len(c.s.Tasks(TaskFilter{Service: web.ID, All: true})) != 2 {
			t.Fatal(c.dump())
		}
	}
}

func TestNodeRemoved(t *testing.T) {
	c := newCluster(t)
	c.join("n1")
	n2 := c.join("n2")
	web := c.service(svcSpec("web", 2))
	c.run("c1", "n2")
	c.settle()
	c.must(Command{RemoveNode: &RemoveNode{Ref: "n2", Force: true}})
	delete(c.nodes, n2.id)
	if _, err := c.s.Task("c1"); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
	c.settle()
	c.wantSpread(web.ID, map[string]int{"n1": 2})
	if _, err := c.s.AssignmentFor(n2.id); !errors.Is(err, ErrNotFound) {
		t.Fatal(err)
	}
	c.checkReplay(len(c.log) - 3)
}

// TestRestartDelay: 100 ms, doubling to 30 s, from the start after a long run.
func TestRestartDelay(t *testing.T) {
	c := newCluster(t)
	c.join("n1")
	web := c.service(svcSpec("web", 1))
	c.settle()
	var delays []int64
	for i := range 12 {
		x := c.live(web.ID)[0]
		if i == 10 {
			c.now += longRun
		}
		c.fail(x)
		ended := c.now
		ops, next := c.plan()
		if len(ops) != 1 || ops[0].Kind != OpCreate || ops[0].Node != "" || ops[0].NotBefore != next {
			t.Fatal(ops, next)
		}
		delays = append(delays, next-ended)
		if p := c.s.Tasks(TaskFilter{Service: web.ID}); len(p) != 1 || p[0].Attempt != ops[0].Attempt {
			t.Fatal(c.dump())
		} else if i == 0 && p[0].Status.Message != "exit status 1; restart 1 in 100 ms" {
			t.Fatal(p[0].Status.Message)
		}
		c.now = next - 1
		if ops, again := c.plan(); len(ops) != 0 || again != next {
			t.Fatal(ops, again)
		}
		c.settle()
	}
	want := []int64{100, 200, 400, 800, 1600, 3200, 6400, 12800, 25600, 30000, 100, 200}
	if !slices.Equal(delays, want) {
		t.Fatalf("delays %v, want %v", delays, want)
	}
	if n := len(c.s.Tasks(TaskFilter{Service: web.ID, All: true})); n != 1+history {
		t.Fatalf("%d tasks are remembered\n%s", n, c.dump())
	}
}

func TestRestartMax(t *testing.T) {
	c := newCluster(t)
	n := c.join("n1")
	n.fate = func(spec.Task) spec.TaskState { return spec.TaskFailed }
	sp := svcSpec("web", 1)
	sp.RestartMax = 2
	web := c.service(sp)
	c.settle()
	if n := len(c.s.Tasks(TaskFilter{Service: web.ID, All: true})); n != 3 {
		t.Fatalf("%d runs, want the first and two more\n%s", n, c.dump())
	}
	// Another template is another chance.
	n.fate = nil
	sp.Task.Env = []string{"FIXED=1"}
	c.must(Command{UpdateService: &UpdateService{Ref: "web", Spec: &sp}})
	c.settle()
	c.wantSpread(web.ID, map[string]int{"n1": 1})
}

// TestBadNode: a node where a service always fails does not attract its tasks.
func TestBadNode(t *testing.T) {
	c := newCluster(t)
	ns := c.joinAll(2)
	ns[0].fate = func(spec.Task) spec.TaskState { return spec.TaskRejected }
	web := c.service(svcSpec("web", 4))
	c.settle()
	c.wantSpread(web.ID, map[string]int{"n2": 4})
}

// reboot starts a node anew: what ran there is gone, and reported to have failed.
func (c *cluster) reboot(n *simNode) {
	c.Helper()
	for id, st := range n.tasks {
		if !st.State.Ended() {
			n.tasks[id] = spec.TaskStatus{State: spec.TaskFailed, ExitCode: -1, Message: "the machine was restarted", At: c.now}
		}
	}
	c.back(n)
	c.reportAll(n)
	c.settle()
}

// TestDeathOfNodeIsNoFailure: tasks that ended with their nodes count neither
// against these nor as restarts, whatever the nodes say of them afterwards.
func TestDeathOfNodeIsNoFailure(t *testing.T) {
	c := newCluster(t)
	ns := c.joinAll(3)
	web := c.service(svcSpec("web", 6))
	c.settle()
	for _, i := range []int{1, 2, 1, 2, 1, 2} {
		c.now += 10_000
		c.down(ns[i])
		c.settle()
		c.reboot(ns[i])
	}
	c.scale("web", 9)
	c.settle()
	if got := c.spread(web.ID); got["n2"] != 3 || got["n3"] != 3 {
		t.Fatalf("spread is %v\n%s", got, c.dump())
	}

	// With no other node the task is revived before its node has told of its end:
	// that is no restart either, of which there may be none.
	one := newCluster(t)
	n := one.join("n1")
	sp := svcSpec("web", 1)
	sp.RestartMax = 1
	one.service(sp)
	one.settle()
	for range 3 {
		one.now += 1000
		one.down(n)
		one.settle()
		one.reboot(n)
		if ts := one.s.Tasks(TaskFilter{}); len(ts) != 1 || ts[0].Status.State != spec.TaskRunning {
			t.Fatal(one.dump())
		}
	}

	// Failures of the program count again once its node has said that it lives.
	for left := 1; left >= 0; left-- {
		one.fail(one.s.Tasks(TaskFilter{})[0])
		one.settle()
		if got := len(one.s.Tasks(TaskFilter{})); got != left {
			t.Fatalf("%d tasks, want %d\n%s", got, left, one.dump())
		}
	}
}

// TestRollingUpdate: never fewer than all replicas run, never more than one
// slot is under way, and an update that does not work stops at the first.
func TestRollingUpdate(t *testing.T) {
	c := newCluster(t)
	ns := c.joinAll(3)
	web := c.service(svcSpec("web", 6))
	c.settle()
	sp := svcSpec("web", 6)
	sp.Task.Env = []string{"V=2"}
	c.must(Command{UpdateService: &UpdateService{Ref: "web", Spec: &sp}})
	for i := 0; c.round(); i++ {
		if n := len(c.live(web.ID)); n < 6 || n > 7 || i > 500 {
			t.Fatalf("%d replicas run\n%s", n, c.dump())
		}
	}
	for _, x := range c.live(web.ID) {
		if x.Spec.Env == nil {
			t.Fatal(c.dump())
		}
	}
	c.wantSpread(web.ID, map[string]int{"n1": 2, "n2": 2, "n3": 2})

	for _, n := range ns {
		n.fate = func(x spec.Task) spec.TaskState {
			if x.Spec.Env[0] == "V=3" {
				return spec.TaskFailed
			}
			return spec.TaskRunning
		}
	}
	sp.Task.Env = []string{"V=3"}
	c.must(Command{UpdateService: &UpdateService{Ref: "web", Spec: &sp}})
	for range 200 {
		c.round()
		if n := len(c.live(web.ID)); n != 6 {
			t.Fatalf("%d replicas run\n%s", n, c.dump())
		}
	}
	slots := map[int]bool{}
	for _, x := range c.s.Tasks(TaskFilter{Service: web.ID, All: true}) {
		if x.Spec.Env != nil && x.Spec.Env[0] == "V=3" {
			slots[x.Slot] = true
		}
	}
	if len(slots) != 1 {
		t.Fatalf("a broken update reached slots %v", slots)
	}
	// Back to what worked.
	sp.Task.Env = []string{"V=2"}
	c.must(Command{UpdateService: &UpdateService{Ref: "web", Spec: &sp}})
	c.settle()
	c.wantSpread(web.ID, map[string]int{"n1": 2, "n2": 2, "n3": 2})
}

// TestUpdateWithoutRoom: where no address is free, a task is stopped before its
// successor starts, one at a time.
func TestUpdateWithoutRoom(t *testing.T) {
	c := newCluster(t)
	c.join("n1")
	c.network("small", "10.5.0.0/29") // 6 addresses: gateway, VIP, 4 tasks
	web := c.service(svcSpec("web", 4, "small"))
	c.settle()
	sp := svcSpec("web", 4, "small")
	sp.Task.Env = []string{"V=2"}
	c.must(Command{UpdateService: &UpdateService{Ref: "web", Spec: &sp}})
	for c.round() {
		if n := len(c.live(web.ID)); n < 3 {
			t.Fatalf("%d replicas run\n%s", n, c.dump())
		}
	}
	for _, x := range c.live(web.ID) {
		if x.Spec.Env == nil {
			t.Fatal(c.dump())
		}
	}
	if n := len(c.live(web.ID)); n != 4 {
		t.Fatal(c.dump())
	}
	// One more has no address, and says so.
	c.scale("web", 5)
	c.settle()
	ts := c.s.Tasks(TaskFilter{Service: web.ID})
	want := "network small: subnet 10.5.0.0/29 has no free address: all 5 are in use: remove tasks or services from the network, or create one with a larger subnet"
	if x := ts[len(ts)-1]; x.Status.State != spec.TaskPending || x.Status.Message != want {
		t.Fatal(c.dump())
	}
	c.scale("web", 4)
	c.settle()
}

// TestDrain moves a node's tasks start-first, and empties it also when they have
// nowhere to go.
func TestDrain(t *testing.T) {
	c := newCluster(t)
	ns := c.joinAll(3)
	web := c.service(svcSpec("web", 6))
	c.run("c1", "n1")
	c.settle()
	c.avail(ns[0], spec.AvailabilityDrain)
	for c.round() {
		if n := len(c.live(web.ID)); n < 6 {
			t.Fatalf("%d replicas run\n%s", n, c.dump())
		}
	}
	c.wantSpread(web.ID, map[string]int{"n2": 3, "n3": 3})
	if x, _ := c.s.Task("c1"); x.Status.State != spec.TaskRunning {
		t.Fatal("a standalone task was moved", x)
	}
	c.avail(ns[1], spec.AvailabilityDrain)
	c.avail(ns[2], spec.AvailabilityDrain)
	c.settle()
	c.wantSpread(web.ID, map[string]int{})
	if ts := c.s.Tasks(TaskFilter{Service: web.ID}); len(ts) != 6 || ts[0].Status.Message != "3 nodes: 3 drained" {
		t.Fatal(c.dump())
	}
	c.avail(ns[0], spec.AvailabilityActive)
	c.settle()
	c.wantSpread(web.ID, map[string]int{"n1": 6})
}

func TestPendingMessages(t *testing.T) {
	c := newCluster(t)
	message := func(constraints ...string) string {
		t.Helper()
		sp := svcSpec(fmt.Sprintf("s%d", c.ids), 1)
		sp.Constraints = constraints
		v := c.service(sp)
		c.settle()
		ts := c.s.Tasks(TaskFilter{Service: v.ID})
		if len(ts) != 1 {
			t.Fatal(c.dump())
		}
		if ts[0].Status.State != spec.TaskPending {
			return ts[0].Status.State.String()
		}
		return ts[0].Status.Message
	}
	check := func(want string, constraints ...string) {
		t.Helper()
		if got := message(constraints...); got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
	check("the cluster has no nodes")
	ns := c.joinAll(4)
	check("running")
	check("no node matches constraint node.name==x", "node.name==x")
	check("no node matches all constraints: node.name==n1, node.role==worker", "node.name==n1", "node.role==worker")
	c.down(ns[0])
	c.avail(ns[1], spec.AvailabilityPause)
	c.avail(ns[2], spec.AvailabilityPause)
	check("running")
	check("1 node that matches the constraints: 1 paused", "node.name==n2")
	check("3 nodes that match the constraints: 1 down, 2 paused", "node.name!=n4")
	c.status(ns[3], spec.NodeUnknown)
	check("4 nodes: 1 down, 1 not heard of yet, 2 paused")
	// Each of them starts when its node is there.
	c.status(ns[3], spec.NodeReady)
	c.avail(ns[1], spec.AvailabilityActive)
	c.settle()
	for _, x := range c.s.Tasks(TaskFilter{}) {
		if x.Status.State == spec.TaskPending && x.Status.Message != "no node matches constraint node.name==x" &&
			x.Status.Message != "no node matches all constraints: node.name==n1, node.role==worker" {
			t.Error(x.Name, x.Status)
		}
	}
}

// TestConstraintChange moves tasks that no longer may stay, without touching the
// others.
func TestConstraintChange(t *testing.T) {
	c := newCluster(t)
	c.joinAll(3)
	web := c.service(svcSpec("web", 3))
	c.settle()
	before := c.live(web.ID)
	sp := svcSpec("web", 3)
	sp.Constraints = []string{"node.name!=n3"}
	c.must(Command{UpdateService: &UpdateService{Ref: "web", Spec: &sp}})
	c.settle()
	c.wantSpread(web.ID, map[string]int{"n1": 2, "n2": 1})
	kept := 0
	for _, x := range c.live(web.ID) {
		if slices.ContainsFunc(before, func(b spec.Task) bool { return b.ID == x.ID }) {
			kept++
		}
	}
	if kept != 2 {
		t.Fatalf("%d tasks were kept, want 2", kept)
	}
}

// TestContainerdAway: a node whose containerd does not answer gets no container more, and
// keeps those that it has: they go on.
func TestContainerdAway(t *testing.T) {
	c := newCluster(t)
	var first *simNode
	can := func(name string, n *simNode, k int, yes bool) {
		in := simSpec(n.id, name, spec.RoleWorker, k)
		in.Containers = yes
		c.must(Command{UpsertNode: &UpsertNode{Node: in}})
	}
	for i, n := range c.joinAll(3) {
		if i == 0 {
			first = n
		}
		can(fmt.Sprintf("n%d", i+1), n, i+1, i < 2)
	}
	image := func(sp spec.ServiceSpec) spec.ServiceSpec {
		sp.Task = spec.TaskSpec{Container: spec.Container{Image: "docker.io/library/web:1"}}
		return sp
	}
	web, mon := c.service(image(svcSpec("web", 4))), c.service(image(globalSpec("mon")))
	c.settle()
	c.wantSpread(web.ID, map[string]int{"n1": 2, "n2": 2})
	before := append(c.live(web.ID), c.live(mon.ID)...)
	can("n1", first, 1, false)
	c.settle()
	for _, b := range before {
		if x, err := c.s.Task(b.ID); err != nil || x.Desired != spec.DesiredRunning || x.Status.State != spec.TaskRunning {
			t.Errorf("%s did not stay: %s, %s", b.Name, x.Desired, x.Status.State)
		}
	}
	c.wantDesired(mon.ID, 2)
	c.scale("web", 6)
	c.settle()
	c.wantSpread(web.ID, map[string]int{"n1": 2, "n2": 4})
}

// TestStopReplica: a stopped replica is replaced, as in Swarm.
func TestStopReplica(t *testing.T) {
	c := newCluster(t)
	c.join("n1")
	web := c.service(svcSpec("web", 2))
	c.settle()
	x := c.live(web.ID)[0]
	c.must(Command{StopTask: &StopTask{Ref: x.Name}})
	c.settle()
	if ts := c.live(web.ID); len(ts) != 2 || ts[0].ID == x.ID || ts[0].Slot != x.Slot {
		t.Fatal(c.dump())
	}
	if o, _ := c.s.Task(x.ID); o.Status.State != spec.TaskShutdown || !o.Status.Released {
		t.Fatal(o)
	}
}

// TestReports: what a node may say, and what is made of it.
func TestReports(t *testing.T) {
	type st = spec.TaskStatus
	for _, k := range []struct {
		name    string
		reports []st
		want    st
	}{
		{"forward", []st{{State: spec.TaskPreparing}, {State: spec.TaskRunning, PID: 7}}, st{State: spec.TaskRunning, PID: 7}},
		{"not back", []st{{State: spec.TaskRunning}, {State: spec.TaskPreparing}}, st{State: spec.TaskRunning}},
		{"back, where its node makes it anew", []st{{State: spec.TaskRunning, PID: 7, At: 5}, {State: spec.TaskPreparing, At: 6}}, st{State: spec.TaskPreparing}},
		{"back, where the node's first word is later", []st{{State: spec.TaskRunning, PID: 7, At: 5}, {State: spec.TaskStarting, At: 6}}, st{State: spec.TaskStarting}},
		{"not back by an old word", []st{{State: spec.TaskRunning, PID: 7, At: 5}, {State: spec.TaskPreparing, At: 4}}, st{State: spec.TaskRunning, PID: 7}},
		{"not back with the same program", []st{{State: spec.TaskRunning, PID: 7, At: 5}, {State: spec.TaskStarting, PID: 7, At: 6}}, st{State: spec.TaskRunning, PID: 7}},
		{"not back while it stops", []st{{State: spec.TaskStopping, PID: 7, At: 5}, {State: spec.TaskStarting, At: 6}}, st{State: spec.TaskStopping, PID: 7}},
		{"same state, other message", []st{{State: spec.TaskStopping, Message: "draining"}, {State: spec.TaskStopping, Message: "x"}}, st{State: spec.TaskStopping, Message: "x"}},
		{"the end is final", []st{{State: spec.TaskComplete}, {State: spec.TaskFailed}}, st{State: spec.TaskComplete}},
		{"release keeps the end", []st{{State: spec.TaskFailed, ExitCode: 9, Message: "m"}, {State: spec.TaskShutdown, Released: true}}, st{State: spec.TaskFailed, ExitCode: 9, Message: "m", Released: true}},
		{"release without an end", []st{{State: spec.TaskRunning, PID: 3}, {State: spec.TaskRunning, PID: 3, Released: true}}, st{State: spec.TaskFailed, Released: true}},
		{"nothing after release", []st{{State: spec.TaskFailed, Released: true}, {State: spec.TaskFailed, Message: "late"}}, st{State: spec.TaskFailed, Released: true}},
		{"managers' states", []st{{State: spec.TaskLost}, {State: spec.TaskNew}, {State: -4}, {State: 99}}, st{State: spec.TaskAssigned}},
	} {
		t.Run(k.name, func(t *testing.T) {
			c := newCluster(t)
			n := c.join("n1")
			x := c.run("c1", "n1").Task
			k.want.At = 0
			for _, r := range k.reports {
				// By hand: states that have no name can't be encoded.
				c.s.Apply(c.s.index+1, Command{ReportTasks: &ReportTasks{Node: n.id, Tasks: map[string]st{x.ID: r, "unknown": r}, Now: c.now}})
			}
			got, err := c.s.Task("c1")
			got.Status.At = 0
			if err != nil || got.Status != k.want {
				t.Fatalf("got %+v, want %+v", got.Status, k.want)
			}
			checkInvariants(t, c.s)
		})
	}
	c := newCluster(t)
	c.join("n1")
	n2 := c.join("n2")
	x := c.run("c1", "n1").Task
	c.must(Command{ReportTasks: &ReportTasks{Node: n2.id, Tasks: map[string]st{x.ID: {State: spec.TaskFailed, Released: true}}}})
	if got, _ := c.s.Task("c1"); got.Status.State != spec.TaskAssigned {
		t.Fatal("another node's report was taken")
	}
}

// bench is a cluster of services × replicas on nodes, at rest.
func bench(b *testing.B, services, replicas, nodes int) *cluster {
	c := newClusterOf(b, 16)
	c.strict = false
	c.joinAll(nodes)
	for i := range services {
		c.service(svcSpec(fmt.Sprintf("svc%d", i), replicas))
	}
	c.settle()
	c.log = nil
	return c
}

func BenchmarkPlanAtRest(b *testing.B) {
	c := bench(b, 1000, 10, 100)
	for b.Loop() {
		if ops, _ := Plan(c.s, c.now); len(ops) != 0 {
			b.Fatal(ops)
		}
	}
}

// BenchmarkPlanNodeDown loses 100 tasks and places their successors.
func BenchmarkPlanNodeDown(b *testing.B) {
	c := bench(b, 1000, 10, 100)
	c.down(c.sorted()[50])
	for b.Loop() {
		if ops, _ := Plan(c.s, c.now); len(ops) != 200 {
			b.Fatal(len(ops))
		}
	}
}

// BenchmarkPlanFromNothing plans (and applies) 10,000 tasks, in plans of maxOps.
func BenchmarkPlanFromNothing(b *testing.B) {
	c := newClusterOf(b, 16)
	c.strict = false
	c.joinAll(100)
	for i := range 1000 {
		c.service(svcSpec(fmt.Sprintf("svc%d", i), 10))
	}
	snap := c.snapshot()
	for b.Loop() {
		s, err := Restore(snap)
		if err != nil {
			b.Fatal(err)
		}
		n := 0
		for {
			ops, _ := Plan(s, c.now)
			if len(ops) == 0 {
				break
			}
			n += s.Apply(s.index+1, Command{Schedule: &Schedule{Now: c.now, Ops: ops}}).Applied
		}
		if n != 10000 {
			b.Fatal(n)
		}
	}
}

func BenchmarkReport(b *testing.B) {
	c := bench(b, 1000, 10, 100)
	n := c.sorted()[0]
	i := 0
	for b.Loop() {
		i++
		for id, st := range n.tasks {
			st.Message = fmt.Sprint(i)
			n.tasks[id] = st
		}
		c.s.Apply(c.s.index+1, Command{ReportTasks: &ReportTasks{Node: n.id, Tasks: n.tasks, Now: c.now}})
	}
}

func BenchmarkSnapshotRestore(b *testing.B) {
	c := bench(b, 1000, 10, 100)
	for b.Loop() {
		snap := c.snapshot()
		b.SetBytes(int64(len(snap)))
		if _, err := Restore(snap); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkAssignment(b *testing.B) {
	c := bench(b, 1000, 10, 100)
	id := c.sorted()[0].id
	b.Run("index", func(b *testing.B) {
		for b.Loop() {
			c.s.AssignmentIndex(id)
		}
	})
	b.Run("whole", func(b *testing.B) {
		for b.Loop() {
			if _, err := c.s.AssignmentFor(id); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// TestSuccessorMustListen: a task that takes the place of one that listens has to
// listen, too, within the service's limit; one that takes nobody's place need not.
func TestSuccessorMustListen(t *testing.T) {
	c := newCluster(t)
	ns := c.joinAll(2)
	web := c.service(svcSpec("web", 1))
	c.settle()
	only := func() spec.Task {
		t.Helper()
		var out []spec.Task
		for _, k := range c.s.Tasks(TaskFilter{Service: web.ID}) {
			if k.Desired == spec.DesiredRunning && !k.Status.State.Ended() {
				out = append(out, k)
			}
		}
		if len(out) == 0 {
			t.Fatal(c.dump())
		}
		slices.SortFunc(out, func(a, b spec.Task) int { return cmp.Compare(a.Status.State, b.Status.State) })
		return out[0] // the one that is on its way, if there is one
	}
	listen := func(k spec.Task) {
		t.Helper()
		n := c.nodes[k.Node]
		st := n.tasks[k.ID]
		st.Listened, st.At = true, c.now
		n.tasks[k.ID] = st
		c.must(Command{ReportTasks: &ReportTasks{Node: n.id, Tasks: map[string]spec.TaskStatus{k.ID: st}, Now: c.now}})
	}
	update := func(change func(*spec.ServiceSpec)) {
		t.Helper()
		v, err := c.s.Service("web")
		if err != nil {
			t.Fatal(err)
		}
		sp := v.Spec.Clone()
		change(&sp)
		c.must(Command{UpdateService: &UpdateService{Ref: "web", Spec: &sp}})
	}
	want := func(what string, within time.Duration) spec.Task {
		t.Helper()
		k := only()
		if k.ListenWithin != within {
			t.Errorf("%s: listens within %s, want %s\n%s", what, k.ListenWithin, within, c.dump())
		}
		return k
	}
	first := want("the first", 0)
	// A worker that is updated.
	update(func(sp *spec.ServiceSpec) { sp.Task.Command = []string{"b"} })
	c.settle()
	second := want("after one that never listened", 0)
	if second.ID == first.ID {
		t.Fatal("it was not updated")
	}
	// A server.
	listen(second)
	update(func(sp *spec.ServiceSpec) { sp.Task.Command = []string{"c"} })
	c.plan()
	if k := want("after one that listens", spec.DefaultListenTimeout); k.ID == second.ID {
		t.Fatal(c.dump())
	}
	c.settle()
	third := only()
	listen(third)
	// It has run: one that is started in its place after its end need not.
	c.fail(third)
	c.settle()
	fourth := want("restarted", 0)
	listen(fourth)
	// One that moves to another node.
	c.avail(c.nodes[fourth.Node], spec.AvailabilityDrain)
	c.plan()
	want("moved", spec.DefaultListenTimeout)
	c.settle()
	for _, n := range ns {
		c.avail(n, spec.AvailabilityActive)
	}
	// Its own limit, a health check's patience, and none.
	for _, k := range []struct {
		limit  time.Duration
		health *spec.HealthCheck
		want   time.Duration
	}{
		{7 * time.Second, nil, 7 * time.Second},
		{7 * time.Second, &spec.HealthCheck{Command: "x", StartPeriod: time.Hour, Interval: time.Second, Timeout: time.Second, Retries: 1}, time.Hour + time.Second},
		{spec.NoListenTimeout, nil, 0},
	} {
		listen(only())
		update(func(sp *spec.ServiceSpec) {
			sp.ListenTimeout, sp.Task.Health, sp.Task.Command = k.limit, k.health, append(sp.Task.Command, "x")
		})
		c.plan()
		got := only().ListenWithin
		if k.health != nil {
			k.want = k.health.WithDefaults().Patience()
		}
		if got != k.want {
			t.Errorf("limit %s: %s, want %s", k.limit, got, k.want)
		}
		c.settle()
	}
}

// TestNodeRemovedWithHistory: a node is removed on which a replica has crashed again and
// again. What is freed there has older tasks of the slot forgotten, on the same node.
func TestNodeRemovedWithHistory(t *testing.T) {
	c := newCluster(t)
	ns := c.joinAll(2)
	sp := svcSpec("web", 4)
	sp.Constraints = []string{"node.name==n2"}
	c.service(sp)
	c.settle()
	ns[1].fate = func(spec.Task) spec.TaskState { return spec.TaskFailed }
	for range 30 {
		c.round()
		// At any moment, each on a copy.
		s, err := Restore(c.snapshot())
		if err != nil {
			t.Fatal(err)
		}
		if r := s.Apply(s.index+1, Command{RemoveNode: &RemoveNode{Ref: "n2", Force: true}}.Stamped(Level)); r.Err != nil {
			t.Fatal(r.Err)
		}
		checkInvariants(c, s)
	}
}
