package state

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/shoalnet/shoal/spec"
	"pgregory.net/rapid"
)

// change updates a service as people do.
func (c *cluster) change(id string, fn func(*spec.ServiceSpec)) {
	c.Helper()
	sp := c.s.services[id].Spec.Clone()
	fn(&sp)
	c.must(Command{UpdateService: &UpdateService{Ref: id, Spec: &sp}})
}

func env(v string) func(*spec.ServiceSpec) {
	return func(sp *spec.ServiceSpec) { sp.Task.Env = []string{"V=" + v} }
}

// versions counts what runs by its environment.
func (c *cluster) versions(id string) map[string]int {
	out := map[string]int{}
	for _, t := range c.live(id) {
		out[strings.Join(t.Spec.Env, " ")]++
	}
	return out
}

func (c *cluster) wantUpdate(id, state, message string) {
	c.Helper()
	u := c.s.services[id].Update
	if u == nil || u.State != state || !strings.Contains(u.Message, message) {
		c.Fatalf("update is %+v, want %s, %q\n%s", u, state, message, c.dump())
	}
	if ended := state == spec.UpdateCompleted || state == spec.RollbackCompleted; ended != (u.CompletedAt != 0) || u.StartedAt == 0 {
		c.Fatalf("%+v", u)
	}
}

func (c *cluster) wantVersions(id string, want map[string]int) {
	c.Helper()
	if got := c.versions(id); fmt.Sprint(got) != fmt.Sprint(want) {
		c.Fatalf("%v run, want %v\n%s", got, want, c.dump())
	}
}

// broken fails all tasks with an environment, before they run.
func (c *cluster) broken(v string) {
	for _, n := range c.nodes {
		n.fate = func(t spec.Task) spec.TaskState {
			if strings.Join(t.Spec.Env, " ") == "V="+v {
				return spec.TaskFailed
			}
			return spec.TaskRunning
		}
	}
}

func updateCluster(t tb, nodes, replicas int, fn func(*spec.ServiceSpec)) (*cluster, string) {
	c := newCluster(t)
	_, c.strict = t.(*testing.T)
	c.joinAll(nodes)
	sp := svcSpec("web", replicas)
	env("1")(&sp)
	if fn != nil {
		fn(&sp)
	}
	web := c.service(sp)
	c.settle()
	return c, web.ID
}

// watch runs rounds until nothing is left to do, and looks after each.
func (c *cluster) watch(look func()) {
	c.Helper()
	for range 3000 {
		if !c.round() {
			return
		}
		look()
	}
	c.Fatalf("no rest\n%s", c.dump())
}

func TestUpdateOrder(t *testing.T) {
	for _, order := range []string{"", spec.StartFirst, spec.StopFirst} {
		for _, par := range []int{0, 1, 2, 5} {
			c, id := updateCluster(t, 3, 4, func(sp *spec.ServiceSpec) {
				sp.Update = &spec.UpdateConfig{Parallelism: par, Order: order}
			})
			if c.s.services[id].Update != nil {
				t.Fatal("an update of a new service")
			}
			c.change(id, env("2"))
			c.wantUpdate(id, spec.Updating, "update in progress")
			least, most := 4, 0
			c.watch(func() {
				n := 0
				for _, x := range c.s.Tasks(TaskFilter{Service: id}) {
					if x.Status.State == spec.TaskRunning {
						n++
					}
				}
				least = min(least, len(c.live(id)))
				most = max(most, n)
				if order == spec.StopFirst {
					slots := map[int]int{}
					for _, x := range c.s.Tasks(TaskFilter{Service: id}) {
						if x.Status.State >= spec.TaskPreparing {
							if slots[x.Slot]++; slots[x.Slot] > 1 {
								t.Fatalf("slot %d runs twice\n%s", x.Slot, c.dump())
							}
						}
					}
				}
			})
			c.wantVersions(id, map[string]int{"V=2": 4})
			c.wantUpdate(id, spec.UpdateCompleted, "update completed")
			p := par
			if p == 0 || p > 4 {
				p = 4
			}
			switch {
			case order == spec.StopFirst && (least != 4-p || most > 4):
				t.Errorf("%s %d: %d to %d ran, want %d to 4", order, par, least, most, 4-p)
			case order != spec.StopFirst && (least != 4 || most > 4+p):
				t.Errorf("%q %d: %d to %d ran, want 4 to %d", order, par, least, most, 4+p)
			}
			if v := c.s.services[id]; v.Previous == nil || v.Previous.Task.Env[0] != "V=1" {
				t.Error("the spec of before is not kept")
			}
			c.checkReplay(len(c.log) / 2)
		}
	}
}

// TestUpdateDelay: between a slot that is done and the next the delay passes, and
// after the last the monitor.
func TestUpdateDelay(t *testing.T) {
	c, id := updateCluster(t, 1, 3, func(sp *spec.ServiceSpec) {
		sp.Update = &spec.UpdateConfig{Parallelism: 1, Delay: 10 * time.Second, Monitor: 3 * time.Second}
	})
	begin := c.now
	c.change(id, env("2"))
	c.settle()
	c.wantUpdate(id, spec.UpdateCompleted, "")
	if took := c.now - begin; took < 23_000 || took > 26_000 {
		t.Errorf("it took %d ms", took)
	}
}

func TestUpdatePaused(t *testing.T) {
	c, id := updateCluster(t, 3, 3, nil)
	c.broken("2")
	c.change(id, env("2"))
	c.settle()
	c.wantUpdate(id, spec.UpdatePaused, "update paused due to failure or early termination of task ")
	c.wantUpdate(id, spec.UpdatePaused, "--update-order stop-first")
	c.wantVersions(id, map[string]int{"V=1": 3})
	for _, x := range c.s.services[id].tasks {
		if x.Status.State.Ended() && x.Desired != spec.DesiredShutdown {
			t.Errorf("%s has %s, and is wanted %s", x.Name, x.Status.State, x.Desired)
		}
	}
	// A node that comes changes nothing of that, time neither.
	c.join("n4")
	c.now += 3_600_000
	c.settle()
	c.wantUpdate(id, spec.UpdatePaused, "")
	c.wantVersions(id, map[string]int{"V=1": 3})
	// Another update goes on with it.
	c.change(id, env("3"))
	c.settle()
	c.wantUpdate(id, spec.UpdateCompleted, "")
	c.wantVersions(id, map[string]int{"V=3": 3})
	c.checkReplay(len(c.log) / 2)
}

func TestUpdateRolledBack(t *testing.T) {
	for _, order := range []string{spec.StartFirst, spec.StopFirst} {
		c, id := updateCluster(t, 3, 3, func(sp *spec.ServiceSpec) {
			sp.Update = &spec.UpdateConfig{Parallelism: 1, Order: order, FailureAction: spec.FailureRollback}
		})
		before := c.live(id)
		c.broken("2")
		c.change(id, env("2"))
		c.settle()
		c.wantUpdate(id, spec.RollbackCompleted, "rollback completed")
		c.wantVersions(id, map[string]int{"V=1": 3})
		kept := 0
		for _, x := range c.live(id) {
			for _, b := range before {
				if b.ID == x.ID {
					kept++
				}
			}
		}
		if want := map[string]int{spec.StartFirst: 3, spec.StopFirst: 2}[order]; kept != want {
			t.Errorf("%s: %d of the old tasks still run, want %d\n%s", order, kept, want, c.dump())
		}
		if c.s.services[id].Previous != nil {
			t.Error("it could be rolled back to what is broken")
		}
	}
}

func TestUpdateContinues(t *testing.T) {
	c, id := updateCluster(t, 3, 4, func(sp *spec.ServiceSpec) {
		sp.Update = &spec.UpdateConfig{Parallelism: 1, FailureAction: spec.FailureContinue}
	})
	bad := 0
	for _, n := range c.nodes {
		n.fate = func(x spec.Task) spec.TaskState {
			if x.Slot == 1 && x.Spec.Env[0] == "V=2" && bad < 3 {
				bad++
				return spec.TaskFailed
			}
			return spec.TaskRunning
		}
	}
	c.change(id, env("2"))
	c.settle()
	c.wantUpdate(id, spec.UpdateCompleted, "")
	c.wantVersions(id, map[string]int{"V=2": 4})
}

func TestUpdateFailureRatio(t *testing.T) {
	for ratio, want := range map[float64]string{0.2: spec.UpdatePaused, 0.25: spec.UpdateCompleted, 1: spec.UpdateCompleted} {
		c, id := updateCluster(t, 2, 4, func(sp *spec.ServiceSpec) {
			sp.Update = &spec.UpdateConfig{Parallelism: 2, MaxFailureRatio: ratio}
		})
		once := false
		for _, n := range c.nodes {
			n.fate = func(x spec.Task) spec.TaskState {
				if x.Slot == 2 && x.Spec.Env[0] == "V=2" && !once {
					once = true
					return spec.TaskFailed
				}
				return spec.TaskRunning
			}
		}
		c.change(id, env("2"))
		c.settle()
		c.wantUpdate(id, want, "")
	}
}

// TestUpdateFailsLater: what fails within the monitor counts, later it doesn't.
func TestUpdateFailsLater(t *testing.T) {
	for _, late := range []bool{false, true} {
		c, id := updateCluster(t, 1, 1, func(sp *spec.ServiceSpec) {
			sp.Update = &spec.UpdateConfig{Parallelism: 1, Monitor: 10 * time.Second, FailureAction: spec.FailureRollback}
		})
		c.change(id, env("2"))
		for range 100 {
			if len(c.versions(id)) == 1 && c.versions(id)["V=2"] == 1 {
				break
			}
			c.round()
		}
		c.wantVersions(id, map[string]int{"V=2": 1})
		if c.now += 5000; late {
			c.now += 6000
			c.plan()
		}
		c.fail(c.live(id)[0])
		c.settle()
		if late {
			c.wantUpdate(id, spec.UpdateCompleted, "")
			c.wantVersions(id, map[string]int{"V=2": 1})
		} else {
			c.wantUpdate(id, spec.RollbackCompleted, "")
			c.wantVersions(id, map[string]int{"V=1": 1})
		}
	}
}

// TestMistypedConstraint: a change that can't be placed leaves what runs.
func TestMistypedConstraint(t *testing.T) {
	for _, order := range []string{spec.StartFirst, spec.StopFirst} {
		for _, host := range []bool{false, true} {
			c, id := updateCluster(t, 3, 3, func(sp *spec.ServiceSpec) {
				sp.Update = &spec.UpdateConfig{Parallelism: 2, Order: order}
				if host {
					sp.Ports = []spec.Port{{Published: 80, Target: 80, Protocol: "tcp", Mode: spec.PortHost}}
				}
			})
			c.change(id, func(sp *spec.ServiceSpec) { sp.Constraints = []string{"node.labels.dsk==ssd"} })
			c.watch(func() {
				if n := len(c.live(id)); n != 3 {
					t.Fatalf("%d replicas are left\n%s", n, c.dump())
				}
			})
			c.wantUpdate(id, spec.UpdatePaused, "no node matches constraint node.labels.dsk==ssd")
			c.change(id, func(sp *spec.ServiceSpec) { sp.Constraints = nil })
			c.settle()
			if u := c.s.services[id].Update; u != nil {
				t.Fatalf("%+v", u)
			}
			if ts := c.s.Tasks(TaskFilter{Service: id}); len(ts) != 3 {
				t.Fatal(c.dump())
			}
		}
	}
}

func TestRollback(t *testing.T) {
	c, id := updateCluster(t, 2, 2, nil)
	r := c.apply(Command{UpdateService: &UpdateService{Ref: id, Rollback: true}})
	wantErr(t, r.Err, ErrInvalid, "service web does not have a previous spec")
	c.change(id, func(sp *spec.ServiceSpec) { env("2")(sp); sp.Replicas = 3 })
	c.settle()
	c.must(Command{UpdateService: &UpdateService{Ref: id, Rollback: true}})
	c.wantUpdate(id, spec.RollbackStarted, "manually requested rollback")
	c.settle()
	c.wantUpdate(id, spec.RollbackCompleted, "rollback completed")
	c.wantVersions(id, map[string]int{"V=1": 2})
	// Twice is forward again, as in Docker.
	c.must(Command{UpdateService: &UpdateService{Ref: id, Rollback: true}})
	c.settle()
	c.wantVersions(id, map[string]int{"V=2": 3})
	c.checkReplay(len(c.log) / 2)
}

func TestForce(t *testing.T) {
	c, id := updateCluster(t, 1, 4, nil)
	before := c.live(id)
	c.join("n2")
	c.change(id, func(sp *spec.ServiceSpec) { sp.ForceUpdate++ })
	c.settle()
	c.wantUpdate(id, spec.UpdateCompleted, "")
	c.wantSpread(id, map[string]int{"n1": 2, "n2": 2})
	for _, x := range c.live(id) {
		for _, b := range before {
			if x.ID == b.ID {
				t.Errorf("%s was not replaced", x.Name)
			}
		}
	}
}

// TestLockedDrain: what can't run beside its successor does not keep its node from
// being drained.
func TestLockedDrain(t *testing.T) {
	c, id := updateCluster(t, 2, 1, nil)
	for _, n := range c.nodes {
		n.fate = func(x spec.Task) spec.TaskState {
			if len(c.live(id)) > 0 && c.live(id)[0].ID != x.ID {
				return spec.TaskFailed
			}
			return spec.TaskRunning
		}
	}
	at := c.nodes[c.live(id)[0].Node]
	c.avail(at, spec.AvailabilityDrain)
	c.settle()
	if ts := c.live(id); len(ts) != 1 || ts[0].Node == at.id {
		t.Fatal(c.dump())
	}
}

// TestRandomUpdates: whatever policy, changes and failures, there are never fewer
// replicas ready than the policy allows, and each update comes to an end.
func TestRandomUpdates(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		replicas := rapid.IntRange(1, 6).Draw(t, "replicas")
		policy := func() *spec.UpdateConfig {
			return &spec.UpdateConfig{Parallelism: rapid.IntRange(0, 4).Draw(t, "parallelism"),
				Delay:           time.Duration(rapid.SampledFrom([]int{0, 0, 1, 20}).Draw(t, "delay")) * time.Second,
				Monitor:         time.Duration(rapid.SampledFrom([]int{0, 1, 60}).Draw(t, "monitor")) * time.Second,
				MaxFailureRatio: rapid.SampledFrom([]float64{0, 0, 0.3, 1}).Draw(t, "ratio"),
				FailureAction:   rapid.SampledFrom([]string{"", spec.FailurePause, spec.FailureContinue}).Draw(t, "action"),
				Order:           rapid.SampledFrom([]string{"", spec.StartFirst, spec.StopFirst}).Draw(t, "order")}
		}
		c, id := updateCluster(t, rapid.IntRange(1, 4).Draw(t, "nodes"), replicas, func(sp *spec.ServiceSpec) {
			sp.Update, sp.Rollback = policy(), policy()
			if rapid.Bool().Draw(t, "back") {
				sp.Update.FailureAction = spec.FailureRollback
			}
		})
		bad := rapid.SliceOfDistinct(rapid.IntRange(2, 6), rapid.ID[int]).Draw(t, "bad")
		for _, n := range c.nodes {
			n.fate = func(x spec.Task) spec.TaskState {
				for _, b := range bad {
					if x.Spec.Env[0] == fmt.Sprintf("V=%d", b) {
						return spec.TaskFailed
					}
				}
				return spec.TaskRunning
			}
		}
		until := rapid.IntRange(3, 6).Draw(t, "until")
		for i := 2; i < until; i++ {
			v := c.s.services[id]
			up, back := v.Spec.Update.Policy(), v.Spec.Rollback.Policy()
			// What runs before a change that meets slots stopped for the one before is
			// no measure.
			whole := len(c.live(id)) == replicas
			c.change(id, env(fmt.Sprint(i)))
			ended, begun := false, c.real
			clocksAt := rapid.IntRange(-20, 60).Draw(t, "clocks at")
			for round := range 4000 {
				if round == clocksAt {
					c.clocks(t)
				}
				if !c.round() {
					ended = true
					break
				}
				if v.Update != nil && !v.Update.Active() {
					ended = true
					break
				}
				if n := len(c.live(id)); whole && up.Order == spec.StartFirst && back.Order == spec.StartFirst && n < replicas {
					t.Fatalf("%d of %d replicas run while they are replaced start-first\n%s", n, replicas, c.dump())
				}
				if p := up.Parallelism; whole && p > 0 && len(bad) == 0 && len(c.live(id)) < replicas-p {
					t.Fatalf("%d of %d replicas run, %d at a time may not\n%s", len(c.live(id)), replicas, p, c.dump())
				}
			}
			if u := v.Update; !ended || u == nil || u.Active() {
				t.Fatalf("the update does not end: %+v\n%s", u, c.dump())
			}
			if took := c.real - begun; took > patience {
				t.Fatalf("the update took %s\n%s", time.Duration(took)*time.Millisecond, c.dump())
			}
		}
		checkInvariants(t, c.s)
		c.checkReplay(len(c.log) / 2)
	})
}

// TestOldEndsSlowly: a replica that takes longer to stop than the update is watched for
// is no failure of its successor, whose node nobody has looked for yet.
func TestOldEndsSlowly(t *testing.T) {
	c, id := updateCluster(t, 2, 2, func(sp *spec.ServiceSpec) {
		sp.Update = &spec.UpdateConfig{Order: spec.StopFirst, Parallelism: 1, Monitor: time.Second}
	})
	c.change(id, env("2"))
	c.round()
	for _, n := range c.nodes {
		n.frozen = true
	}
	c.round()
	c.now += 5000
	for _, n := range c.nodes {
		n.frozen = false
	}
	c.settle()
	c.wantUpdate(id, spec.UpdateCompleted, "")
	c.wantVersions(id, map[string]int{"V=2": 2})
}
