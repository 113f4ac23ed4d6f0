package control

import (
	"context"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/spec"
)

// watch opens a stream, and returns what waits for a message that is as wanted.
func (n *simNode) watch(t *testing.T, req *shoalv1.WatchRequest) (until func(what string, ok func(*shoalv1.WatchResponse) bool), end func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(testCtx(t), 10*time.Second)
	t.Cleanup(cancel)
	s, err := n.ctl.Watch(ctx, connect.NewRequest(req))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	until = func(what string, ok func(*shoalv1.WatchResponse) bool) {
		t.Helper()
		for {
			if !s.Receive() {
				t.Fatalf("%s: %v", what, s.Err())
			}
			if ok(s.Msg()) {
				return
			}
		}
	}
	return until, func() error {
		for s.Receive() {
		}
		return s.Err()
	}
}

// TestWatch: a stream tells of each change of what it is about, be it the managers', a
// task's, or that a node's kernel follows.
func TestWatch(t *testing.T) {
	n, w := withWorker(t)
	if err := createNetwork(n, "app"); err != nil {
		t.Fatal(err)
	}
	req := svc("web", 1, "app")
	req.Spec.Constraints = []string{"node.name==node1"}
	req.Spec.Ports = []*shoalv1.Port{{Published: 8080, Target: 80, Protocol: spec.TCP, Mode: spec.PortIngress}}
	web := n.createService(req)
	n.createService(svc("other", 1, "app"))
	until, _ := n.watch(t, &shoalv1.WatchRequest{Services: []string{web.Id}})
	var version uint64
	until("its task is made", func(r *shoalv1.WatchResponse) bool {
		if len(r.Services) != 1 || r.Services[0].Id != web.Id {
			t.Fatalf("services: %v", r.Services)
		}
		version = r.Services[0].Version
		return len(r.Tasks) == 1 && r.Tasks[0].Service == web.Id && len(r.Services[0].Behind) == 2
	})
	n.report(n.node.ID, func(*shoalv1.Task) *shoalv1.TaskStatus { return &shoalv1.TaskStatus{State: "running", Pid: 4711} })
	until("it runs", func(r *shoalv1.WatchResponse) bool {
		version = r.Services[0].Version
		return r.Services[0].Running == 1 && r.Tasks[0].GetStatus().GetState() == "running"
	})
	says := func(id string, r *shoalv1.ReportRequest) {
		t.Helper()
		r.Node = id
		if _, err := n.as(id, spec.RoleWorker).Report(testCtx(t), connect.NewRequest(r)); err != nil {
			t.Fatal(err)
		}
	}
	says(w.node.ID, &shoalv1.ReportRequest{Applied: version})
	until("the worker follows", func(r *shoalv1.WatchResponse) bool {
		return strings.Join(r.Services[0].Behind, " ") == "node1"
	})
	says(w.node.ID, &shoalv1.ReportRequest{Applied: version, Faults: []*shoalv1.ReportRequest_Fault{{Object: web.Id, Message: "port taken"}}})
	until("a fault", func(r *shoalv1.WatchResponse) bool {
		return len(r.Services[0].Faults) == 1 && r.Services[0].Faults[0].Message == "port taken"
	})
	if _, err := n.ctl.RemoveService(testCtx(t), connect.NewRequest(&shoalv1.RemoveServiceRequest{Ref: web.Id})); err != nil {
		t.Fatal(err)
	}
	until("it is gone", func(r *shoalv1.WatchResponse) bool { return len(r.Services) == 0 })
}

// TestWatchOfTasks: of tasks that were asked for by themselves, until they are gone.
func TestWatchOfTasks(t *testing.T) {
	n := newCluster(t, 1)[0]
	made, err := n.ctl.CreateTask(testCtx(t), connect.NewRequest(&shoalv1.CreateTaskRequest{Name: "one", Node: "node1", Spec: &shoalv1.TaskSpec{Command: []string{"true"}}}))
	if err != nil {
		t.Fatal(err)
	}
	id := made.Msg.Task.Id
	until, _ := n.watch(t, &shoalv1.WatchRequest{Tasks: []string{id, "one", "nosuch"}})
	until("it is there once", func(r *shoalv1.WatchResponse) bool {
		if len(r.Tasks) != 1 || r.Tasks[0].Id != id {
			t.Fatalf("%v", r.Tasks)
		}
		return true
	})
	if _, err := n.ctl.StopTask(testCtx(t), connect.NewRequest(&shoalv1.StopTaskRequest{Ref: id, Remove: true})); err != nil {
		t.Fatal(err)
	}
	n.report(n.node.ID, func(*shoalv1.Task) *shoalv1.TaskStatus {
		return &shoalv1.TaskStatus{State: "shutdown", Released: true}
	})
	until("it is gone", func(r *shoalv1.WatchResponse) bool { return len(r.Tasks) == 0 })
	for _, bad := range []*shoalv1.WatchRequest{{}, {Tasks: make([]string, maxWatched+1)}} {
		s, err := n.ctl.Watch(testCtx(t), connect.NewRequest(bad))
		if err != nil {
			t.Fatal(err)
		}
		for s.Receive() {
		}
		if connect.CodeOf(s.Err()) != connect.CodeInvalidArgument {
			t.Errorf("%d tasks: %v", len(bad.Tasks), s.Err())
		}
		s.Close()
	}
}

// TestWatchEndsWithTheTerm: who watches is sent to the next leader.
func TestWatchEndsWithTheTerm(t *testing.T) {
	nodes := newCluster(t, 3)
	l := leader(t, nodes)
	f := without(nodes, l)[0]
	until, end := f.watch(t, &shoalv1.WatchRequest{Services: []string{"none"}})
	until("nothing", func(r *shoalv1.WatchResponse) bool { return len(r.Services) == 0 })
	if err := l.mgr.raft.LeadershipTransfer().Error(); err != nil {
		t.Fatal(err)
	}
	if err := end(); connect.CodeOf(err) != connect.CodeUnavailable {
		t.Errorf("the stream of an old leader ends with %v", err)
	}
}
