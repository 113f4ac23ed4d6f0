package control

import (
	"context"
	"fmt"
	"maps"

	"connectrpc.com/connect"

	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/spec"
)

// runs notes the feature level of a node's build.
func (m *Manager) runs(id string, level int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.levels == nil || m.levels[id] == level {
		return
	}
	m.levels[id] = level
	wake(m.wakeVoters)
}

// heard is what nodes have said of their level to this leader. From level 1 on it is
// in the log, too, and what is there counts.
func (m *Manager) heard(level int) map[string]int {
	if level > 0 {
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.levels)
}

// raiseLevel raises the cluster's level to the lowest of its managers.
func (m *Manager) raiseLevel(ctx context.Context) {
	var level, to int
	m.fsm.read(func(s *state.State) {
		if _, ok := s.Cluster(); !ok {
			return
		}
		level, to = s.Level(), state.Level
		for heard := m.heard(level); to > level && len(s.Behind(to, heard)) > 0; to-- {
		}
	})
	if to <= level {
		return
	}
	if _, err := m.Propose(ctx, state.Command{RaiseLevel: &state.RaiseLevel{Level: to}}); err != nil {
		if ctx.Err() == nil {
			m.log.Warn("the cluster's feature level can't be raised; trying again", "level", to, "error", err)
		}
		return
	}
	m.log.Info("the cluster's feature level was raised", "level", to, "was", level, "brings", state.Levels[to])
}

// allowed refuses a command that needs more of the managers than all of them have. It
// returns the level that the command is to be judged by.
func (m *Manager) allowed(c state.Command) (int, error) {
	switch {
	case c.InitCluster != nil:
		return max(c.InitCluster.Level, 1), nil
	case c.RaiseLevel != nil:
		// By the rules of before: it is what changes them.
		return m.level(), nil
	}
	var level, needs int
	var what string
	var behind state.Laggards
	m.fsm.read(func(s *state.State) {
		if level = s.Level(); level >= state.Level {
			return
		}
		if needs, what = c.Need(); needs > level {
			behind = s.Behind(needs, m.heard(level))
		}
	})
	if needs <= level {
		return level, nil
	}
	waits := "which it is about to reach: try again in a moment"
	if len(behind) > 0 {
		waits = "as " + behind.String() + ": upgrade shoal there"
	}
	return 0, connect.NewError(connect.CodeFailedPrecondition, &levelError{fmt.Errorf("%s needs all managers at feature level %d, and the cluster is at level %d, %s", what, needs, level, waits)})
}

// levelError is a refusal that an upgrade of managers ends.
type levelError struct{ error }

// Is makes it an ErrLevel.
func (*levelError) Is(target error) bool { return target == state.ErrLevel }

// level is the cluster's feature level, as this manager has it.
func (m *Manager) level() (level int) {
	m.fsm.read(func(s *state.State) { level = s.Level() })
	return level
}

// withLevel is n with what a report or a request to join says of its build, as far as
// the log may have that yet.
func (m *Manager) withLevel(n spec.Node, level int32, build string) spec.Node {
	if m.level() < 1 {
		n.Level, n.Build = 0, ""
		return n
	}
	n.Level, n.Build = int(min(max(level, 0), maxLevel)), build[:min(len(build), maxBuild)]
	return n
}

// withCapacity is the same of what the node has, and of the labels of its agent: those
// that no agent would be started with are nothing.
func (m *Manager) withCapacity(n spec.Node, nanoCPUs, memory int64, labels map[string]string) spec.Node {
	if m.level() < 2 {
		n.NanoCPUs, n.Memory, n.EngineLabels = 0, 0, nil
		return n
	}
	n.NanoCPUs, n.Memory, n.EngineLabels = max(nanoCPUs, 0), max(memory, 0), labels
	if spec.ValidateEngineLabels(labels) != nil {
		n.EngineLabels = nil
	}
	return n
}

// Bounds of what a node says of its build.
const (
	maxLevel = 1 << 20
	maxBuild = 128 // bytes
)
