package agent

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/shoalnet/shoal/runtime"
	"github.com/shoalnet/shoal/spec"
)

// quickly is a health check that loses no time.
func quickly(retries int) *spec.HealthCheck {
	return &spec.HealthCheck{Command: "x", Interval: time.Millisecond, StartInterval: time.Millisecond, StartPeriod: time.Hour, Retries: retries}
}

func replica(h *spec.HealthCheck) spec.Task {
	return newTask("t1", func(t *spec.Task) { t.Service, t.Slot, t.Spec.Health = "web", 1, h })
}

// sick makes the health check fail, or pass with "".
func (b *bench) sick(id, how string) {
	if err := b.task(id, func(t *fakeTask) { t.sick = how }); err != nil {
		b.t.Error(err)
	}
}

func (b *bench) listens(id string, up bool) {
	if err := b.task(id, func(t *fakeTask) { t.listening = up }); err != nil {
		b.t.Error(err)
	}
}

// looked waits until two looks at whether the program listens have begun: the
// first has been judged.
func (b *bench) looked(id string) {
	b.t.Helper()
	at := -1
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		done := false
		_ = b.task(id, func(t *fakeTask) {
			if at < 0 {
				at = t.looks
			}
			done = t.looks >= at+2
		})
		if done {
			return
		}
	}
	b.t.Fatal("nobody looks whether the program listens")
}

// TestReplicaWaitsForItsHealthCheck: it takes traffic from the first success on,
// and is given up when the check fails for too long.
func TestReplicaWaitsForItsHealthCheck(t *testing.T) {
	b := newBench(t)
	open := b.gate("start t1")
	b.give(true, replica(quickly(3)))
	b.await("start t1")
	b.sick("t1", "warming up")
	b.listens("t1", true)
	open()
	b.await("t1: starting not healthy yet: exit status 1: warming up")
	b.never("t1 endpoint: app active", "t1: running")
	b.sick("t1", "")
	b.await("t1: running")
	if l := b.lines(); slices.Index(l, "t1 endpoint: app active") < 0 {
		t.Errorf("it runs and takes no traffic:\n%s", strings.Join(l, "\n"))
	}

	b.forget()
	b.sick("t1", "no database")
	b.expect("t1 endpoint: app draining", "t1: stopping draining", "settled", "t1: stopping", "stop t1 SIGTERM 10s", "t1 endpoint:",
		"t1: failed unhealthy: exit status 1: no database", "release t1", "t1: failed unhealthy: exit status 1: no database released")
}

// TestReplicaThatNeverGetsHealthyIsGivenUp after as long as the checks of Docker
// would take.
func TestReplicaThatNeverGetsHealthyIsGivenUp(t *testing.T) {
	b := newBench(t)
	h := quickly(2)
	h.StartPeriod = 0
	open := b.gate("start t1")
	b.give(true, replica(h))
	b.await("start t1")
	b.sick("t1", "no")
	open()
	b.await("t1: failed unhealthy: exit status 1: no released")
	b.never("t1 endpoint: app active", "t1: running")
}

// TestUnhealthyTaskOfItsOwn: nobody would start another.
func TestUnhealthyTaskOfItsOwn(t *testing.T) {
	b := newBench(t)
	b.give(true, newTask("t1", func(t *spec.Task) { t.Spec.Health = quickly(1) }))
	b.await("t1: running")
	b.sick("t1", "dizzy")
	b.await("t1: running unhealthy: exit status 1: dizzy")
	b.await("t1 endpoint: app draining")
	b.forget()
	b.sick("t1", "")
	b.expect("t1 endpoint: app active", "settled", "t1: running")
}

// TestReplicaThatNoLongerListens takes no new connections, keeps those that it
// has, and is back when it listens.
func TestReplicaThatNoLongerListens(t *testing.T) {
	b := newBench(t)
	b.give(true, replica(nil))
	b.await("start t1")
	b.listens("t1", true)
	b.await("t1: running")
	b.looked("t1")
	b.forget()
	b.listens("t1", false)
	b.expect("t1 endpoint: app draining", "t1: running not listening: takes no new connections")
	b.forget()
	b.listens("t1", true)
	b.expect("t1 endpoint: app active", "settled", "t1: running")
}

// TestAdoptedReplicaIsAsHealthyAsItIs: what was healthy stays in its balancers
// without a gap, what is not is not put there.
func TestAdoptedReplicaIsAsHealthyAsItIs(t *testing.T) {
	for _, well := range []bool{true, false} {
		task := replica(quickly(1))
		b := newBench(t, found(task, runtime.Running, 0))
		b.listens("t1", true)
		if !well {
			b.sick("t1", "no")
		}
		if err := b.adopt(b.ctx, nil); err != nil {
			t.Fatal(err)
		}
		if well {
			b.await("t1: running")
			b.never("t1 endpoint: app draining", "t1 endpoint: app starting")
		} else {
			b.await("t1 endpoint: app draining")
			b.never("t1 endpoint: app active", "t1: running")
		}
		b.cancel()
	}
}

// TestAClockThatIsSet hastens no end: what an adopted replica has of its start period is
// by how long it has run, not by the node's clock.
func TestAClockThatIsSet(t *testing.T) {
	h := quickly(1)
	h.StartPeriod = time.Minute
	task := replica(h)
	run := found(task, runtime.Running, 0)
	run.Begin()
	run.StartedAt = run.StartedAt.Add(-time.Hour)
	b := newBench(t, run)
	b.sick("t1", "warming up")
	if err := b.adopt(b.ctx, nil); err != nil {
		t.Fatal(err)
	}
	b.await("t1: starting not healthy yet: exit status 1: warming up")
	b.never("t1: stopping draining")
}

// TestReplicaIsInAVIPWhileItListens: to run is another thing, which takes time only.
func TestReplicaIsInAVIPWhileItListens(t *testing.T) {
	b := newBench(t)
	b.give(true, replica(nil))
	b.await("t1 endpoint: app idle")
	b.await("t1: running listens on no port: takes no connections")
	b.never("t1 endpoint: app active")
	if st := b.statuses()["t1"]; st.Listened {
		t.Errorf("%+v: it has not listened", st)
	}
	b.listens("t1", true)
	b.await("t1 endpoint: app active")
	b.await("t1: running")
	if st := b.statuses()["t1"]; !st.Listened {
		t.Errorf("%+v: it has listened", st)
	}
}

// TestReplicaOfOneThatListensMustListen before it is said to run, whatever else it
// opens, and has failed if it does not.
func TestReplicaOfOneThatListensMustListen(t *testing.T) {
	successor := func(within time.Duration) spec.Task {
		task := replica(nil)
		task.ListenWithin = within
		return task
	}
	t.Run("it does", func(t *testing.T) {
		b := newBench(t)
		open := b.gate("start t1")
		b.give(true, successor(time.Hour))
		b.await("start t1")
		if err := b.task("t1", func(t *fakeTask) { t.maybe = []uint16{40000} }); err != nil {
			t.Fatal(err)
		}
		open()
		b.await("t1: starting does not listen yet, as the one did that it replaces: has 1h0m0s")
		b.never("t1 endpoint: app active", "t1: running")
		b.listens("t1", true)
		b.await("t1: running")
	})
	t.Run("it does not", func(t *testing.T) {
		b := newBench(t)
		b.give(true, successor(time.Millisecond))
		b.await("t1: failed has not listened within 1ms, as the one does that it was to replace released")
		b.never("t1 endpoint: app active", "t1: running")
	})
	t.Run("it has", func(t *testing.T) { // as its agent of before said
		task := successor(time.Millisecond)
		task.Status = spec.TaskStatus{State: spec.TaskRunning, PID: 4711, Listened: true}
		b := newBench(t, found(task, runtime.Running, 0))
		if err := b.adopt(b.ctx, nil); err != nil {
			t.Fatal(err)
		}
		b.await("t1 endpoint: app draining")
		b.looked("t1")
		b.listens("t1", true)
		b.await("t1 endpoint: app active")
	})
}

// TestAdoptedWorkerStaysNamed: one that runs without listening is not on its way up
// again because the agent is.
func TestAdoptedWorkerStaysNamed(t *testing.T) {
	task := replica(nil)
	task.Status = spec.TaskStatus{State: spec.TaskRunning, PID: 4711}
	b := newBench(t, found(task, runtime.Running, 0))
	if err := b.adopt(b.ctx, nil); err != nil {
		t.Fatal(err)
	}
	b.await("t1 endpoint: app idle")
	b.looked("t1")
	b.never("t1 endpoint: app starting", "t1 endpoint: app active", "t1 endpoint: app draining")
}

// TestReplicaOpensAllItsSockets before it takes the connections of others that do.
func TestReplicaOpensAllItsSockets(t *testing.T) {
	for _, others := range []bool{true, false} {
		b := newBench(t)
		b.others = others
		open := b.gate("start t1")
		b.give(true, replica(nil))
		b.await("start t1")
		if err := b.task("t1", func(t *fakeTask) { t.listening, t.opening = true, 20 }); err != nil {
			t.Fatal(err)
		}
		open()
		b.await("t1 endpoint: app active")
		_ = b.task("t1", func(f *fakeTask) {
			if (f.opening == 0) != others {
				t.Errorf("others %t: it is in the balancers with %d sockets to open", others, f.opening)
			}
		})
		b.cancel()
	}
}

// TestOpening: a program that opens one socket after another is waited for until it has
// opened no more for a moment; one that never comes to an end of it, not for ever.
func TestOpening(t *testing.T) {
	at := time.Unix(1000, 0)
	var o opening
	for i, step := range []struct {
		n     int
		after time.Duration
		want  bool
	}{{1, 0, false}, {1, openTime - 1, false}, {2, 1, false}, {3, openTime - 1, false}, {3, openTime - 1, false}, {3, 1, true}} {
		at = at.Add(step.after)
		if got := o.done(step.n, at); got != step.want {
			t.Errorf("step %d: %t", i, got)
		}
	}
	o = opening{}
	n := 0
	for begun := at; !o.done(1+n%2, at); n++ {
		if at = at.Add(openTime / 2); at.Sub(begun) > readyTimeout {
			t.Fatal("it waits for ever")
		}
	}
	if n < int(readyTimeout/(openTime/2)) {
		t.Errorf("it was taken for open after %d looks", n)
	}
}

// TestHeldPorts: a server's UDP port stays, a client's goes.
func TestHeldPorts(t *testing.T) {
	at := func(d time.Duration) time.Time { return time.Unix(1000, 0).Add(d) }
	var h held
	for i, step := range []struct {
		ports []uint16
		want  bool
	}{{nil, false}, {[]uint16{40000}, false}, {[]uint16{40001}, false}, {[]uint16{40001, 40002}, false}, {[]uint16{40001}, true}, {nil, false}, {[]uint16{40001}, false}} {
		if got := h.look(step.ports, at(time.Duration(i)*readyTimeout/2)); got != step.want {
			t.Errorf("look %d: %t", i, got)
		}
	}
	if h := (held{all: true}); !h.look([]uint16{40000}, at(0)) {
		t.Error("what was there before is taken for new")
	}
}
