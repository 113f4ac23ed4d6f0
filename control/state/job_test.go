package state

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/shoalnet/shoal/spec"
	"pgregory.net/rapid"
)

func jobSpec(name string, replicas, concurrent int) spec.ServiceSpec {
	sp := svcSpec(name, replicas)
	sp.Mode, sp.MaxConcurrent = spec.ModeReplicatedJob, concurrent
	return sp
}

// fates has all nodes' programs end as fate says.
func (c *cluster) fates(fate func(spec.Task) spec.TaskState) {
	for _, n := range c.nodes {
		n.fate = fate
	}
}

func completes(spec.Task) spec.TaskState { return spec.TaskComplete }
func runs(spec.Task) spec.TaskState      { return spec.TaskRunning }

func (c *cluster) wantDone(id string, done, total int) {
	c.Helper()
	if d, n := c.s.Completed(id); d != done || n != total {
		c.Fatalf("%d of %d are done, want %d of %d\n%s", d, n, done, total, c.dump())
	}
}

// atOnce counts the tasks of a service that have a node and have not ended.
func (c *cluster) atOnce(id string) (n int) {
	for _, t := range c.s.Tasks(TaskFilter{Service: id}) {
		if t.Node != "" && !t.Status.State.Ended() {
			n++
		}
	}
	return n
}

func TestReplicatedJob(t *testing.T) {
	c := newCluster(t)
	c.joinAll(3)
	sp := jobSpec("job", 5, 2)
	env("1")(&sp)
	job := c.service(sp)
	c.fates(completes)
	c.watch(func() {
		if n := c.atOnce(job.ID); n > 2 {
			t.Fatalf("%d at once\n%s", n, c.dump())
		}
	})
	c.wantDone(job.ID, 5, 5)
	c.wantDesired(job.ID, 0)

	// More of them, fewer, and labels: what is done is done.
	made := len(c.s.Tasks(TaskFilter{Service: job.ID, All: true}))
	c.change(job.ID, func(sp *spec.ServiceSpec) { sp.Labels = map[string]string{"a": "b"} })
	c.scale("job", 7)
	c.settle()
	c.wantDone(job.ID, 7, 7)
	if n := len(c.s.Tasks(TaskFilter{Service: job.ID, All: true})); n != made+2 {
		t.Errorf("%d tasks were made for 2 more", n-made)
	}
	c.scale("job", 3)
	c.settle()
	c.wantDone(job.ID, 3, 3)

	// Another template begins anew, and ends what runs of the one before.
	c.fates(runs)
	c.change(job.ID, env("2"))
	c.settle()
	c.wantDone(job.ID, 0, 3)
	c.wantVersions(job.ID, map[string]int{"V=2": 2})
	c.wantDesired(job.ID, 2)
	c.change(job.ID, env("3"))
	c.settle()
	c.wantVersions(job.ID, map[string]int{"V=3": 2})
	if u := c.s.services[job.ID].Update; u != nil {
		t.Errorf("update %+v", u)
	}
	c.fates(completes)
	c.settle()
	c.wantDone(job.ID, 3, 3)
	c.change(job.ID, func(sp *spec.ServiceSpec) { sp.ForceUpdate++ })
	c.wantDone(job.ID, 0, 3)
	c.settle()
	c.wantDone(job.ID, 3, 3)

	// A node that is drained, or dies, has its own done elsewhere.
	c.fates(runs)
	c.change(job.ID, env("4"))
	c.settle()
	ran := c.live(job.ID)
	c.avail(c.nodes[ran[0].Node], spec.AvailabilityDrain)
	c.down(c.nodes[ran[1].Node])
	c.settle()
	if ts := c.live(job.ID); len(ts) != 2 || ts[0].Node != ts[1].Node {
		t.Fatal(c.dump())
	}
	c.fates(completes)
	c.settle()
	c.wantDone(job.ID, 3, 3)

	for _, bad := range []func(*spec.ServiceSpec){
		func(sp *spec.ServiceSpec) { sp.RestartCondition = spec.RestartAny },
		func(sp *spec.ServiceSpec) { sp.Update = &spec.UpdateConfig{Parallelism: 1} },
		func(sp *spec.ServiceSpec) { sp.MaxConcurrent = -1 },
		func(sp *spec.ServiceSpec) { sp.Mode = "" },
	} {
		sp := jobSpec("bad", 3, 2)
		bad(&sp)
		if r := c.apply(Command{CreateService: &CreateService{ID: c.id("svc"), Spec: sp}}); !errors.Is(r.Err, ErrInvalid) {
			t.Errorf("%+v is accepted: %v", sp, r.Err)
		}
	}
	if r := c.apply(Command{UpdateService: &UpdateService{Ref: "job", Rebalance: true}}); !errors.Is(r.Err, ErrInvalid) || !strings.Contains(r.Err.Error(), "job") {
		t.Error(r.Err)
	}
	checkInvariants(t, c.s)
	c.checkReplay(len(c.log) - 5)
}

// TestJobFails: a failed run is tried again, as the restart policy says.
func TestJobFails(t *testing.T) {
	for _, tc := range []struct {
		condition string
		max       int
		done      int
		runs      int
	}{
		{"", 0, 3, 5},
		{spec.RestartOnFailure, 1, 2, 4},
		{spec.RestartNone, 0, 2, 3},
	} {
		c := newCluster(t)
		c.joinAll(2)
		sp := jobSpec("job", 3, 0)
		sp.RestartCondition, sp.RestartMax = tc.condition, tc.max
		job := c.service(sp)
		tries := map[string]bool{}
		c.fates(func(x spec.Task) spec.TaskState {
			if x.Slot == 2 && x.Attempt < 2 {
				tries[x.ID] = true
				return spec.TaskFailed
			}
			tries[x.ID] = true
			return spec.TaskComplete
		})
		c.settle()
		c.wantDone(job.ID, tc.done, 3)
		if len(tries) != tc.runs {
			t.Errorf("%+v: %d runs\n%s", tc, len(tries), c.dump())
		}
	}
}

// TestGlobalJob: once on each node, also on one that comes later.
func TestGlobalJob(t *testing.T) {
	c := newCluster(t)
	ns := c.joinAll(3)
	sp := svcSpec("job", 0)
	sp.Mode = spec.ModeGlobalJob
	env("1")(&sp)
	job := c.service(sp)
	c.fates(completes)
	c.settle()
	c.wantDone(job.ID, 3, 3)
	n4 := c.join("n4")
	n4.fate = completes
	c.settle()
	c.wantDone(job.ID, 4, 4)
	c.down(ns[0])
	c.settle()
	c.wantDone(job.ID, 4, 4)
	c.change(job.ID, env("2"))
	c.settle()
	c.wantDone(job.ID, 3, 3)
	c.back(ns[0])
	c.reportAll(ns[0])
	c.settle()
	c.wantDone(job.ID, 4, 4)
	if r := c.apply(Command{UpdateService: &UpdateService{Ref: "job", Replicas: new(int)}}); !errors.Is(r.Err, ErrInvalid) {
		t.Error(r.Err)
	}
	checkInvariants(t, c.s)
	c.checkReplay(len(c.log) - 5)
}

// TestRandomJobs: whatever happens to nodes and programs, in the end all is done, and
// never more at once than may be.
func TestRandomJobs(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := newCluster(t)
		c.strict = false
		c.joinAll(rapid.IntRange(1, 4).Draw(t, "nodes"))
		most := rapid.IntRange(0, 4).Draw(t, "at once")
		replicas := rapid.IntRange(0, 8).Draw(t, "replicas")
		job := c.service(jobSpec("job", replicas, most))
		look := func() {
			if n := c.atOnce(job.ID); most > 0 && n > most {
				t.Fatalf("%d at once, %d may be\n%s", n, most, c.dump())
			}
		}
		changed := false
		for i := range rapid.IntRange(1, 15).Draw(t, "changes") {
			n := rapid.SampledFrom(c.sorted()).Draw(t, "node")
			switch rapid.IntRange(0, 6).Draw(t, "change") {
			case 6:
				c.clocks(t)
			case 0:
				c.avail(n, availability(t))
			case 1:
				c.toggle(n)
				changed = true // what is taken back may be one more than are let run
			case 2:
				c.change(job.ID, env(fmt.Sprint(i)))
			case 3:
				replicas = rapid.IntRange(0, 8).Draw(t, "to")
				c.scale(job.ID, replicas)
			case 4:
				c.fates(rapid.SampledFrom([]func(spec.Task) spec.TaskState{completes, runs}).Draw(t, "fate"))
			case 5:
				if ts := c.live(job.ID); len(ts) > 0 && c.nodes[ts[0].Node].up {
					c.fail(ts[0])
				}
			}
			for range rapid.IntRange(0, 8).Draw(t, "rounds") {
				c.round()
				if !changed {
					look()
				}
			}
		}
		for _, n := range c.sorted() {
			if !n.up {
				c.toggle(n)
			}
			c.avail(n, spec.AvailabilityActive)
		}
		c.fates(completes)
		c.settle()
		if done, total := c.s.Completed(job.ID); done != replicas || total != replicas || c.s.Desired(job.ID) != 0 {
			t.Fatalf("%d of %d are done, want %d\n%s", done, total, replicas, c.dump())
		}
		if all := c.s.Tasks(TaskFilter{Service: job.ID}); c.atOnce(job.ID) != 0 {
			t.Fatalf("%d have not ended\n%s", len(all), c.dump())
		}
		checkInvariants(t, c.s)
		c.checkReplay(len(c.log) / 2)
	})
}

// TestJobOfARemovedNode: what was done on a node that is removed stays done, whether the
// node went down first or was forced out, and had let go of its task or not.
func TestJobOfARemovedNode(t *testing.T) {
	for _, released := range []bool{true, false} {
		for _, down := range []bool{true, false} {
			c := newCluster(t)
			ns := c.joinAll(3)
			job := c.service(jobSpec("job", 6, 0))
			c.fates(completes)
			if released {
				c.settle()
			} else {
				for d, n := c.s.Completed(job.ID); d < n; d, n = c.s.Completed(job.ID) {
					c.round()
				}
			}
			if down {
				c.down(ns[1])
				c.plan()
			}
			c.must(Command{RemoveNode: &RemoveNode{Ref: ns[1].id, Force: true}})
			delete(c.nodes, ns[1].id)
			c.settle()
			c.wantDone(job.ID, 6, 6)
			c.join("n4").fate = completes
			c.settle()
			c.wantDone(job.ID, 6, 6)
			if all := c.s.Tasks(TaskFilter{Service: job.ID, All: true}); len(all) != 6 {
				t.Errorf("released %v, down %v: %d tasks for 6 slots\n%s", released, down, len(all), c.dump())
			}
			checkInvariants(t, c.s)
			c.checkReplay(len(c.log) - 3)
		}
	}
}
