package state

import (
	"testing"
	"time"

	"github.com/shoalnet/shoal/spec"
)

// TestClocksOfLeaders: a leader's clock may be an hour or a day off, either way, and
// another leads next: a failed slot waits no longer than its delay, and at last it is
// filled.
func TestClocksOfLeaders(t *testing.T) {
	const delay = 30 * time.Second
	for _, off := range []time.Duration{-24 * time.Hour, -time.Hour, -time.Minute, 0, time.Minute, time.Hour, 24 * time.Hour} {
		for _, planned := range []bool{false, true} { // by the first leader, before it was lost
			c := newCluster(t, "10.0.0.0/8")
			c.now = (100 * 24 * time.Hour).Milliseconds()
			n := c.joinAll(1)[0]
			sp := svcSpec("web", 1)
			sp.RestartDelay = delay
			v := c.service(sp)
			c.settle()
			right := c.now
			c.now += off.Milliseconds()
			n.fate = func(spec.Task) spec.TaskState { return spec.TaskFailed }
			for id, st := range n.tasks {
				st.State = spec.TaskFailed
				n.tasks[id] = st
			}
			c.reportAll(n)
			n.fate = nil
			if planned {
				c.plan()
			}
			// The next leader's clock is right.
			c.now = right
			end := right + delay.Milliseconds() + 1000
			for len(c.live(v.ID)) == 0 && c.now <= end {
				if !c.round() {
					break
				}
			}
			if len(c.live(v.ID)) != 1 || c.now > end {
				t.Errorf("a clock %s off, planned %v: after %s the slot is empty\n%s", off, planned, time.Duration(c.now-right)*time.Millisecond, c.dump())
			}
		}
	}
}
