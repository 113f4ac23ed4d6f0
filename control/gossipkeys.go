package control

import (
	"context"
	"crypto/rand"
	"slices"
	"time"

	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/internal/sleep"
	"github.com/shoalnet/shoal/spec"
)

// The keys of gossip are changed in steps, each of which every node that is ready
// has confirmed (by its reports) before the next:
//
//	current*, next     what there is at rest; * is what is sealed with
//	current, next*     use: all have next, so all can open what is sealed with it
//	next*, a new one   remove and install: all seal with next, so nobody needs current
//
// They are changed when the current one is older than gossipKeyAge, and when a
// node was removed (state.Trust.Exposed): then next, which the removed node has
// seen too, is first replaced by a fresh one. A node that is down keeps nobody
// waiting. When it is back it hears of the keys from the managers, over TLS.

// gossipKeyAge is how long a key is used: half of what random nonces bear in a
// cluster of 1,000 nodes (see gossip/seal.go), and what Swarm takes.
const gossipKeyAge = 12 * time.Hour

// gossipInterval is how often it is looked whether a step is due.
const gossipInterval = 500 * time.Millisecond

// gossipSeen is what a node's last report said of its keys.
type gossipSeen struct {
	newest, used uint64 // generations
}

func newGossipKey(generation uint64) state.GossipKey {
	k := make([]byte, 32)
	_, _ = rand.Read(k) // never fails
	return state.GossipKey{Generation: generation, Key: k}
}

// nextKeys is the next step, if one may be taken now. It is pure but for fresh.
func nextKeys(t *state.Trust, nodes []spec.Node, seen map[string]gossipSeen, now time.Time, fresh func(generation uint64) state.GossipKey) ([]state.GossipKey, bool) {
	i := slices.IndexFunc(t.Gossip, func(k state.GossipKey) bool { return k.Primary })
	if i < 0 {
		return nil, false
	}
	current, newest := t.Gossip[i], t.Gossip[len(t.Gossip)-1]
	all := func(ok func(gossipSeen) bool) bool {
		return !slices.ContainsFunc(nodes, func(n spec.Node) bool { return n.Status == spec.NodeReady && !ok(seen[n.ID]) })
	}
	exposed := current.Generation <= t.Exposed
	age := now.Sub(time.UnixMilli(current.Since))
	switch {
	case newest.Generation == current.Generation:
		if !all(func(s gossipSeen) bool { return s.used == current.Generation }) {
			return nil, false
		}
		return []state.GossipKey{current, fresh(newest.Generation + 1)}, true
	case exposed && newest.Generation <= t.Exposed:
		return []state.GossipKey{current, fresh(newest.Generation + 1)}, true
	case exposed || age > gossipKeyAge:
		if !all(func(s gossipSeen) bool { return s.newest == newest.Generation }) {
			return nil, false
		}
		current.Primary, newest.Primary, newest.Since = false, true, now.UnixMilli()
		return []state.GossipKey{current, newest}, true
	}
	return nil, false
}

// keepGossipKeys takes the steps that are due.
func (m *Manager) keepGossipKeys(ctx context.Context) {
	for {
		sleep.For(ctx, gossipInterval)
		if ctx.Err() != nil {
			return
		}
		var t *state.Trust
		var nodes []spec.Node
		m.fsm.read(func(st *state.State) { t, nodes = st.Trust(), st.Nodes() })
		if t == nil {
			continue
		}
		m.mu.Lock()
		next, ok := nextKeys(t, nodes, m.gossipSeen, time.Now(), newGossipKey)
		m.mu.Unlock()
		if !ok {
			continue
		}
		was := t.Gossip[len(t.Gossip)-1].Generation
		m.log.Info("the keys of gossip change", "newest", next[len(next)-1].Generation, "of_a_removed_node", t.Exposed)
		if _, err := m.Propose(ctx, state.Command{SetGossipKeys: &state.SetGossipKeys{Was: was, Keys: next}}); err != nil && ctx.Err() == nil {
			m.log.Warn("the keys of gossip can't be changed; trying again", "error", err)
		}
	}
}

// sees notes which keys a node has.
func (m *Manager) sees(id string, s gossipSeen) {
	m.mu.Lock()
	if m.gossipSeen != nil {
		m.gossipSeen[id] = s
	}
	m.mu.Unlock()
}
