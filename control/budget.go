package control

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/time/rate"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/spec"
)

// Budget of the reports of a node that change something, each of which goes through raft
// and then to all managers' disks. An agent that has hundreds of tasks to start folds what
// it has to say while it waits; only one that is not ours goes on at more than this.
const (
	reportRate  = 20 // a second
	reportBurst = 200
	reportWait  = 5 * time.Second // that what is over it is held up, before it is refused
)

// spend takes one change from a node's budget, and waits until there is one.
func (m *Manager) spend(ctx context.Context, node string) error {
	m.mu.Lock()
	if m.reports == nil {
		m.mu.Unlock()
		return errNotLeader()
	}
	l := m.reports[node]
	if l == nil {
		l = rate.NewLimiter(reportRate, reportBurst)
		m.reports[node] = l
	}
	m.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, reportWait)
	defer cancel()
	if err := l.Wait(ctx); err != nil {
		return connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("node %s reports more than %d changes a second: report less often", node, reportRate))
	}
	return nil
}

// Bounds, in bytes, of what a node says that is kept as it is.
const (
	maxSaid = 1 << 10 // of a task's message, and why it has no containers; the state keeps no more
	maxWord = 64      // of a platform, a data path or a health
)

// clip is s, of so many bytes at most.
func clip(s string, most int) string {
	return strings.ToValidUTF8(s[:min(len(s), most)], "")
}

// cut is s, clipped and marked so if it is longer; the state marks it as cut, too.
func cut(s string, most int) string {
	if len(s) <= most {
		return s
	}
	return clip(s, most) + "…"
}

// bound cuts the words and messages of a report to the length that they may have.
func bound(r *shoalv1.ReportRequest) {
	r.Platform, r.DataPath, r.ContainersWhy = cut(r.Platform, maxWord), cut(r.DataPath, maxWord), cut(r.ContainersWhy, maxSaid)
	for _, t := range r.Tasks {
		if t != nil {
			t.Message, t.Health = cut(t.Message, maxSaid), cut(t.Health, maxWord)
		}
	}
}

// ownTasks takes what is not of the node's own tasks out of what it says. The state would
// drop it; the log would keep it.
func (m *Manager) ownTasks(c *state.ReportTasks) {
	m.fsm.read(func(st *state.State) {
		maps.DeleteFunc(c.Tasks, func(id string, _ spec.TaskStatus) bool { return !st.RunsOn(id, c.Node) })
	})
}
