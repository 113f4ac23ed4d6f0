package control

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/spec"
)

// TestReportsHaveABudget: a node that says something else of itself all the time fills no
// log, and keeps neither itself nor anybody else from the managers.
func TestReportsHaveABudget(t *testing.T) {
	n, w := withWorker(t)
	hostile := n.as(w.node.ID, spec.RoleWorker)
	report := func(ctx context.Context, platform string) error {
		_, err := hostile.Report(ctx, connect.NewRequest(&shoalv1.ReportRequest{Node: w.node.ID, Addr: "127.0.0.9", ControlPort: 1, GossipPort: 2, Platform: platform}))
		return err
	}
	var kept atomic.Int64
	ctx, cancel := context.WithTimeout(testCtx(t), 3*time.Second)
	defer cancel()
	began := time.Now()
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			for k := 0; ctx.Err() == nil; k++ {
				if report(ctx, fmt.Sprintf("%d-%d", i, k)) == nil {
					kept.Add(1)
				}
			}
		})
	}
	// Others are heard meanwhile, at once.
	if err := createNetwork(n, "app"); err != nil {
		t.Error(err)
	}
	wg.Wait()
	if most := int64(reportBurst + reportRate*time.Since(began).Seconds() + 1); kept.Load() > most || kept.Load() == 0 {
		t.Errorf("%d changes in %s, want %d at most", kept.Load(), time.Since(began), most)
	}
	// What says nothing new is free: it is the node's sign of life.
	var platform string
	n.mgr.fsm.read(func(s *state.State) {
		node, err := s.Node("worker")
		if err != nil {
			t.Error(err)
		}
		platform = node.Platform
	})
	for range 10 {
		if err := report(testCtx(t), platform); err != nil {
			t.Error(err)
		}
	}
}

// TestReportsAreBounded: nothing that a node says is longer than it may be, and nothing of
// another's tasks goes into the log.
func TestReportsAreBounded(t *testing.T) {
	n, w := withWorker(t)
	if err := createNetwork(n, "app"); err != nil {
		t.Fatal(err)
	}
	if _, err := n.as(w.node.ID, spec.RoleWorker).Report(testCtx(t), connect.NewRequest(&shoalv1.ReportRequest{Node: w.node.ID})); err != nil {
		t.Fatal(err)
	}
	for _, on := range []string{"node1", "worker"} {
		req := svc("on-"+on, 1, "app")
		req.Spec.Constraints = []string{"node.name==" + on}
		n.createService(req)
		eventually(t, "a task on "+on, func() (err error) {
			n.mgr.fsm.read(func(s *state.State) {
				if v, serr := s.Service("on-" + on); serr != nil || len(s.Tasks(state.TaskFilter{Service: v.ID})) == 0 {
					err = errors.New("none")
				}
			})
			return err
		})
	}
	long := strings.Repeat("é", 1<<19)
	r := &shoalv1.ReportRequest{Node: w.node.ID, Addr: "127.0.0.9", ControlPort: 1, GossipPort: 2, Platform: long, DataPath: long, ContainersWhy: long,
		Tasks: map[string]*shoalv1.TaskStatus{"none": {State: "running", Message: long}, "nil": nil}}
	own := 0
	n.mgr.fsm.read(func(s *state.State) {
		for _, x := range s.Tasks(state.TaskFilter{}) {
			r.Tasks[x.ID] = &shoalv1.TaskStatus{State: "running", Message: long, Health: long}
			if x.Node == w.node.ID {
				own++
			}
		}
	})
	if own != 1 || len(r.Tasks) != 4 {
		t.Fatalf("the worker has %d of %d", own, len(r.Tasks))
	}
	bound(r)
	cmd := &state.ReportTasks{Node: w.node.ID, Tasks: map[string]spec.TaskStatus{}}
	for id := range r.Tasks {
		cmd.Tasks[id] = spec.TaskStatus{State: spec.TaskRunning}
	}
	if n.mgr.ownTasks(cmd); len(cmd.Tasks) != own {
		t.Errorf("of %d tasks of the node %d are left", own, len(cmd.Tasks))
	}
	delete(r.Tasks, "nil") // whose state is none
	for id, x := range r.Tasks {
		if len(x.Message) > maxSaid+3 || len(x.Health) > maxWord+3 {
			t.Errorf("%s: a message of %d bytes, a health of %d", id, len(x.Message), len(x.Health))
		}
		x.Health = "" // the cluster's level does not have it
	}
	if len(r.Platform) > maxWord+3 || len(r.DataPath) > maxWord+3 || len(r.ContainersWhy) > maxSaid+3 {
		t.Errorf("%d, %d, %d bytes", len(r.Platform), len(r.DataPath), len(r.ContainersWhy))
	}
	if _, err := n.as(w.node.ID, spec.RoleWorker).Report(testCtx(t), connect.NewRequest(r)); err != nil {
		t.Error(err)
	}
}
