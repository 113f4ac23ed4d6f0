package agent

import (
	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/control/state"
)

// levels tells of the cluster's feature level, and which managers keep it below that
// of this build.
func (m *member) levels(resp *shoalv1.InfoResponse) {
	m.mu.Lock()
	a := m.assigned
	m.mu.Unlock()
	if a == nil {
		return
	}
	resp.ClusterLevel = int32(a.Level)
	if a.Level >= state.Level {
		return
	}
	for _, l := range state.BehindOf(a.Nodes, state.Level, nil, nil) {
		resp.Waiting = append(resp.Waiting, state.Laggards{l}.String())
	}
}
