package state

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/shoalnet/shoal/spec"
)

// own makes a standalone task on a node, and runs it.
func (c *cluster) own(name, node string, addrs ...netip.Addr) *task {
	c.Helper()
	nets := []spec.NetworkAttachment{{Network: "app", Addrs: addrs}}
	r := c.must(Command{CreateTask: &CreateTask{ID: c.id("task"), Name: name, Node: node, Spec: spec.TaskSpec{Command: []string{"x"}}, Networks: nets, Created: c.now}})
	c.settle()
	return c.s.tasks[r.Task.ID]
}

// TestStartAgain: a task that was stopped runs again under its ID with its address; one
// that another has by now is replaced, unless it was asked for.
func TestStartAgain(t *testing.T) {
	c := newCluster(t)
	n := c.join("n1")
	c.network("app", "10.7.0.0/29") // .1 is the gateway
	x := c.own("c1", n.id)
	was := x.Attachments[0].Addrs[0]
	start := func(ref string, run int, restart bool) Result {
		return c.apply(Command{StartTask: &StartTask{Ref: ref, Run: run, Restart: restart, Now: c.now}})
	}
	if r := start("c1", 1, false); r.Err != nil || x.Run != 0 {
		t.Fatalf("start of one that runs: %v, run %d", r.Err, x.Run)
	}
	c.must(Command{StopTask: &StopTask{Ref: "c1"}})
	c.settle()
	if x.holds() || x.Status.State != spec.TaskShutdown {
		t.Fatalf("%+v", x.Task)
	}
	if r := start("c1", 3, false); !errors.Is(r.Err, ErrConflict) {
		t.Fatalf("a run that can't be the next: %v", r.Err)
	}
	for range 2 { // the second is the same, asked twice
		if r := start("c1", 1, false); r.Err != nil {
			t.Fatal(r.Err)
		}
	}
	c.settle()
	if x.Run != 1 || x.Status.Run != 1 || x.Status.State != spec.TaskRunning || x.Attachments[0].Addrs[0] != was {
		t.Fatalf("address %s before, then %+v", was, x.Task)
	}

	// Late word of the run before changes nothing, nor does one that can't be.
	for _, run := range []int{0, maxRun + 1} {
		c.must(Command{ReportTasks: &ReportTasks{Node: n.id, Tasks: map[string]spec.TaskStatus{x.ID: {State: spec.TaskFailed, Run: run, Released: true}}, Now: c.now}})
		if x.Status.State != spec.TaskRunning || !x.holds() {
			t.Fatalf("after word of run %d: %+v", run, x.Task)
		}
	}

	// A restart goes through the end of the run before, and keeps the address all along.
	started := x.started
	if r := start("c1", 2, true); r.Err != nil {
		t.Fatal(r.Err)
	}
	for x.Status.Run != 2 {
		if !x.holds() {
			t.Fatalf("released between two runs: %+v", x.Task)
		}
		c.now += 1000
		c.step(n)
	}
	c.settle()
	if x.Status.State != spec.TaskRunning || x.started == started {
		t.Fatalf("%+v started %d, %d", x.Task, started, x.started)
	}

	// Its address has gone to another, which asked for it.
	c.must(Command{StopTask: &StopTask{Ref: "c1"}})
	c.settle()
	y := c.own("c2", n.id, was)
	if r := start("c1", 3, false); r.Err != nil {
		t.Fatal(r.Err)
	}
	c.settle()
	if got := x.Attachments[0].Addrs[0]; got == was || x.Status.State != spec.TaskRunning {
		t.Fatalf("%+v", x.Task)
	}
	c.must(Command{StopTask: &StopTask{Ref: "c2"}})
	c.settle()
	c.own("c3", n.id, was)
	if r := start("c2", 1, false); r.Err == nil || !strings.Contains(r.Err.Error(), was.String()) || y.Run != 0 {
		t.Fatalf("an address that was asked for, and is another's: %v", r.Err)
	}

	// What can't be started.
	c.service(svcSpec("web", 1, "app"))
	c.settle()
	replica := c.live(c.s.Services()[0].ID)[0]
	grace := -time.Second
	for _, k := range []struct {
		cmd  StartTask
		want string
	}{
		{StartTask{Ref: replica.ID, Run: 1, Restart: true}, "svc update --force web"},
		{StartTask{Ref: "nosuch", Run: 1}, "nosuch"},
		{StartTask{Ref: "c1", Run: 4, Restart: true, Stopping: &spec.Stopping{Signal: "SIGFOO", Grace: &grace}}, "SIGFOO"},
	} {
		if r := c.apply(Command{StartTask: &k.cmd}); r.Err == nil || !strings.Contains(r.Err.Error(), k.want) {
			t.Errorf("%+v: %v", k.cmd, r.Err)
		}
	}
	c.down(n)
	if r := start("c1", 4, true); r.Err == nil || !strings.Contains(r.Err.Error(), "node n1 is down") {
		t.Errorf("on a node that is down: %v", r.Err)
	}
}

// TestStartWithoutItsNetwork: what a stopped task needs may be gone, or another's.
func TestStartWithoutItsNetwork(t *testing.T) {
	c := newCluster(t)
	n := c.join("n1")
	c.network("app", "")
	x := c.own("c1", n.id)
	c.must(Command{StopTask: &StopTask{Ref: "c1"}})
	c.settle()
	c.service(svcSpec("c1", 0, "app"))
	if r := c.apply(Command{StartTask: &StartTask{Ref: x.ID, Run: 1}}); !errors.Is(r.Err, ErrExists) {
		t.Errorf("a service has its name: %v", r.Err)
	}
	c.must(Command{RemoveService: &RemoveService{Ref: "c1"}})
	c.must(Command{RemoveNetwork: &RemoveNetwork{Ref: "app"}})
	if r := c.apply(Command{StartTask: &StartTask{Ref: "c1", Run: 1}}); r.Err == nil || !strings.Contains(r.Err.Error(), "is removed") {
		t.Errorf("its network is gone: %v", r.Err)
	}
}

// TestRenameTask: a task keeps its ID and addresses under another name.
func TestRenameTask(t *testing.T) {
	c := newCluster(t)
	n := c.join("n1")
	c.network("app", "")
	x := c.own("c1", n.id)
	c.own("c2", n.id)
	c.service(svcSpec("web", 1, "app"))
	c.settle()
	replica := c.live(c.s.Services()[0].ID)[0]
	for _, k := range []struct{ ref, to, want string }{
		{"c1", "c1", "already"}, {"c1", "c2", "is taken"}, {"c1", "C2", "upper and lower"}, {"c1", "web", "service web"},
		{"c1", "a b", "a b"}, {"c1", "", "name"}, {"c1", "10.0.0.1", "10.0.0.1"}, {"nosuch", "x", "nosuch"}, {replica.Name, "x", "replica of service web"},
	} {
		if r := c.apply(Command{RenameTask: &RenameTask{Ref: k.ref, Name: k.to}}); r.Err == nil || !strings.Contains(r.Err.Error(), k.want) {
			t.Errorf("%s to %q: %v", k.ref, k.to, r.Err)
		}
	}
	for _, to := range []string{"C1", "other"} {
		c.must(Command{RenameTask: &RenameTask{Ref: x.ID, Name: to}})
		if got, err := c.s.Task(to); err != nil || got.ID != x.ID {
			t.Errorf("%s: %v", to, err)
		}
	}
	c.must(Command{StopTask: &StopTask{Ref: "other"}})
	c.settle()
	c.must(Command{RenameTask: &RenameTask{Ref: "other", Name: "c1"}})
	c.must(Command{StartTask: &StartTask{Ref: "c1", Run: 1, Now: c.now}})
	c.settle()
	if x.Status.State != spec.TaskRunning {
		t.Errorf("%+v", x.Task)
	}
}
