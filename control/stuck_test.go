package control

import (
	"errors"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/shoalnet/shoal/control/state"
)

// TestUnreadableEntry: a manager that meets an entry of a newer version applies
// nothing from there on, keeps what it needs to read it again, does not answer as
// the leader, and says why; also after a restart.
func TestUnreadableEntry(t *testing.T) {
	t.Parallel()
	for name, entry := range map[string]string{
		"kind":  `{"made_in_the_future":{}}`,
		"field": `{"remove_network":{"ref":"a","gently":true}}`,
		"rules": `{"rules":1000,"remove_network":{"ref":"a"}}`,
	} {
		t.Run(name, func(t *testing.T) {
			n := newCluster(t, 1)[0]
			leader(t, []*simNode{n})
			if err := n.mgr.raft.Apply([]byte(entry), time.Second).Error(); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				var stuck *StuckError
				eventually(t, "stuck", func() error {
					if err := n.mgr.Stuck(); !errors.As(err, &stuck) {
						return errors.New("it goes on")
					}
					return nil
				})
				if err := n.mgr.raft.Snapshot().Error(); err == nil {
					t.Error("the entry was put away into a snapshot")
				}
				if r, ok := n.mgr.fsm.Apply(&raft.Log{Index: stuck.Index + 1, Data: []byte(`{"remove_network":{"ref":"a"}}`)}).(state.Result); !ok || !errors.As(r.Err, &stuck) {
					t.Errorf("a later entry was applied: %v", r.Err)
				}
				n.stop()
				n.start()
				eventually(t, "does not lead", func() error {
					if n.mgr.Stuck() == nil {
						return errors.New("it goes on")
					}
					return nil
				})
				if n.mgr.IsLeader() {
					t.Error("it leads")
				}
			}
			n.stop()
			if _, err := Recover(n.recoverConfig()); err == nil {
				t.Error("the cluster was made anew without the entry")
			}
		})
	}
}
