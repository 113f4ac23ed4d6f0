package control

import (
	"testing"
	"time"

	"github.com/shoalnet/shoal/spec"
)

// TestJudge goes through what the leader makes of silence. Nodes are named
// a (the leader itself), b, c …; all are ready unless the case says otherwise.
func TestJudge(t *testing.T) {
	tune := Tuning{DownAfter: 3 * time.Second, DownRegardless: 15 * time.Second}
	now := time.Unix(1000, 0)
	for _, k := range []struct {
		name   string
		nodes  string       // one letter each
		down   string       // of them
		silent map[rune]int // seconds; else 0
		dead   string       // to gossip
		halt   string       // say that their machine goes down
		want   map[rune]string
	}{
		{name: "all speak", nodes: "abc"},
		{name: "silent, and dead to gossip", nodes: "abc", silent: map[rune]int{'b': 4}, dead: "b", want: map[rune]string{'b': spec.NodeDown}},
		{name: "silent, but alive to gossip", nodes: "abc", silent: map[rune]int{'b': 14}},
		{name: "dead to gossip, but speaks", nodes: "abc", dead: "b"},
		{name: "silent for long", nodes: "abc", silent: map[rune]int{'b': 16}, want: map[rune]string{'b': spec.NodeDown}},
		{name: "just at the limits", nodes: "abc", silent: map[rune]int{'b': 3, 'c': 15}, dead: "b"},
		{name: "down already", nodes: "abc", down: "b", silent: map[rune]int{'b': 60}, dead: "b"},
		{name: "down, and only a report makes it ready", nodes: "abc", down: "b"},
		{name: "the leader itself is ready, whatever it heard of itself", nodes: "abc", down: "a", silent: map[rune]int{'a': 99}, dead: "a", want: map[rune]string{'a': spec.NodeReady}},
		{name: "its machine goes down", nodes: "abc", halt: "b", want: map[rune]string{'b': spec.NodeDown}},
		{name: "so does the leader's, which leads on", nodes: "abc", halt: "a"},
		{name: "it does, and is down", nodes: "abc", down: "b", halt: "b", silent: map[rune]int{'b': 16}, dead: "b"},
		{name: "all machines go down", nodes: "abcd", halt: "abcd", want: map[rune]string{'b': spec.NodeDown, 'c': spec.NodeDown, 'd': spec.NodeDown}},
		{name: "most look dead: rather this one is cut off", nodes: "abcd", silent: map[rune]int{'b': 4, 'c': 4, 'd': 4}, dead: "bcd"},
		{name: "most are silent for long", nodes: "abcd", silent: map[rune]int{'b': 16, 'c': 16, 'd': 4}, dead: "bcd",
			want: map[rune]string{'b': spec.NodeDown, 'c': spec.NodeDown}},
		{name: "half of them", nodes: "abcd", silent: map[rune]int{'b': 4, 'c': 4}, dead: "bc", want: map[rune]string{'b': spec.NodeDown, 'c': spec.NodeDown}},
		{name: "both others of three: no majority would be left to ask", nodes: "abc", silent: map[rune]int{'b': 4, 'c': 4}, dead: "bc",
			want: map[rune]string{'b': spec.NodeDown, 'c': spec.NodeDown}},
	} {
		t.Run(k.name, func(t *testing.T) {
			var nodes []spec.Node
			for _, r := range k.nodes {
				nodes = append(nodes, spec.Node{ID: string(r), Status: spec.NodeReady})
			}
			live := map[string]spec.Liveness{}
			for _, r := range k.dead {
				live[string(r)] = spec.PeerDead
			}
			halting := map[string]bool{}
			for _, r := range k.halt {
				halting[string(r)] = true
			}
			for i := range nodes {
				for _, r := range k.down {
					if nodes[i].ID == string(r) {
						nodes[i].Status = spec.NodeDown
					}
				}
			}
			seen := func(id string) time.Time { return now.Add(-time.Duration(k.silent[rune(id[0])]) * time.Second) }
			got := map[rune]string{}
			for _, c := range judge(nodes, "a", seen, live, halting, now, tune) {
				got[rune(c.ID[0])] = c.Status
				if (c.Status == spec.NodeDown) != (c.Message != "") {
					t.Errorf("%s is %s with message %q", c.ID, c.Status, c.Message)
				}
			}
			if len(got) != len(k.want) {
				t.Errorf("changes %v, want %v", got, k.want)
			}
			for id, s := range k.want {
				if got[id] != s {
					t.Errorf("%c becomes %q, want %q", id, got[id], s)
				}
			}
		})
	}
}
