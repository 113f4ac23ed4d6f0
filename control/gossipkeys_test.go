package control

import (
	"fmt"
	"testing"
	"time"

	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/spec"
)

// Each step waits for every node that is ready; a removed node's keys are gone
// at the end, and no step takes away a key that somebody still seals with.
func TestGossipKeysChangeStepByStep(t *testing.T) {
	now := time.Now()
	tr := &state.Trust{Gossip: []state.GossipKey{newGossipKey(1), newGossipKey(2)}}
	tr.Gossip[0].Primary, tr.Gossip[0].Since = true, now.UnixMilli()
	nodes := []spec.Node{{ID: "a", Status: spec.NodeReady}, {ID: "b", Status: spec.NodeReady}, {ID: "c", Status: spec.NodeDown}}
	seen := map[string]gossipSeen{}
	show := func() (s string) {
		for _, k := range tr.Gossip {
			if s += fmt.Sprint(" ", k.Generation); k.Primary {
				s += "*"
			}
		}
		return s
	}
	step := func() bool {
		next, ok := nextKeys(tr, nodes, seen, now, newGossipKey)
		if ok {
			tr.Gossip = next
		}
		return ok
	}
	// confirm has a node take up what there is now.
	confirm := func(id string) {
		s := gossipSeen{newest: tr.Gossip[len(tr.Gossip)-1].Generation}
		for _, k := range tr.Gossip {
			if k.Primary {
				s.used = k.Generation
			}
		}
		seen[id] = s
	}
	waits := func(want string) {
		t.Helper()
		if step() || show() != want {
			t.Fatalf("went on to%s, want%s", show(), want)
		}
	}
	goes := func(want string) {
		t.Helper()
		if !step() || show() != want {
			t.Fatalf("at%s, want%s", show(), want)
		}
	}
	confirm("a")
	confirm("b")
	waits(" 1* 2")
	now = now.Add(gossipKeyAge + time.Minute)
	goes(" 1 2*")
	waits(" 1 2*")
	confirm("a")
	waits(" 1 2*")
	confirm("b")
	goes(" 2* 3")
	confirm("a")
	confirm("b")
	waits(" 2* 3")
	// Node c, which knew 2 and 3, is removed.
	tr.Exposed, nodes = 3, nodes[:2]
	goes(" 2* 4")
	confirm("a")
	waits(" 2* 4")
	confirm("b")
	goes(" 2 4*")
	confirm("a")
	confirm("b")
	goes(" 4* 5")
	confirm("a")
	confirm("b")
	waits(" 4* 5")
}
