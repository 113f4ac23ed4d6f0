package control

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/internal/durable"
	"github.com/shoalnet/shoal/spec"
)

func (n *simNode) recoverConfig() ManagerConfig {
	return ManagerConfig{Node: n.node, DataDir: n.dir, Seal: n.seal, Voted: true, Log: n.log}
}

// TestRecover: of three managers one is left. It leads alone with all that it had,
// again after a restart, and a second time; the indices are beyond all that the
// lost ones could commit; and they are none of the cluster any more.
func TestRecover(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, 3)
	l := leader(t, nodes)
	for i := range 3 {
		if _, err := l.mgr.Propose(testCtx(t), state.Command{CreateNetwork: &state.CreateNetwork{Network: spec.Network{ID: spec.NewID(), Name: fmt.Sprintf("net%d", i), Created: 1}}}); err != nil {
			t.Fatal(err)
		}
		if i == 1 {
			if err := l.mgr.raft.Snapshot().Error(); err != nil {
				t.Fatal(err)
			}
		}
	}
	networks := 0
	l.mgr.fsm.read(func(st *state.State) { networks = len(st.Networks()) })
	for _, n := range nodes {
		n.stop()
	}
	before := uint64(0)
	for round := range 2 {
		r, err := Recover(l.recoverConfig())
		if err != nil {
			t.Fatal(err)
		}
		if want := 2 * (1 - round); len(r.Lost) != want || r.Index <= before {
			t.Errorf("round %d: %+v, want %d lost, an index beyond %d", round, r, want, before)
		}
		before = r.Index
		if _, err := os.Stat(LostPath(l.dir)); err != nil {
			t.Error(err)
		}
		for range 2 { // it holds
			l.start()
			eventually(t, "leads alone", func() error {
				if !l.mgr.IsLeader() {
					return errors.New("does not lead")
				}
				return nil
			})
			if got := voters(t, l); !slices.Equal(got, []string{l.node.ID}) {
				t.Errorf("voters %v", got)
			}
			l.mgr.fsm.read(func(st *state.State) {
				if len(st.Networks()) != networks || st.Index() < (r.Index>>20+1)<<20 {
					t.Errorf("index %d, %d networks, not %d", st.Index(), len(st.Networks()), networks)
				}
				for _, n := range nodes {
					if n == l {
						continue
					}
					if role := st.RoleOf(n.node.ID); role != "" {
						t.Errorf("%s still counts as a %s", n.node.Name, role)
					}
					if m, err := st.Node(n.node.ID); err != nil || m.Status != spec.NodeDown || m.Role == spec.RoleManager {
						t.Errorf("%+v, %v", m, err)
					}
				}
			})
			if _, err := l.mgr.Propose(testCtx(t), state.Command{CreateNetwork: &state.CreateNetwork{Network: spec.Network{ID: spec.NewID(), Name: "new", Created: 1}}}); err != nil {
				t.Fatal(err)
			}
			if _, err := l.mgr.Propose(testCtx(t), state.Command{RemoveNetwork: &state.RemoveNetwork{Ref: "new"}}); err != nil {
				t.Fatal(err)
			}
			l.stop()
		}
	}
}

// TestRecoverRefuses: nothing is changed where nothing can be recovered, and what a
// cut-short try left behind does not matter.
func TestRecoverRefuses(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t, 1)
	n := nodes[0]
	n.stop()
	cfg := n.recoverConfig()
	other := cfg
	other.Node.ID = spec.NewID()
	if _, err := Recover(other); err == nil {
		t.Error("the store of another node was taken")
	}
	// Cut short before and after the exchange: a store without a mark, and rubbish.
	rubbish := RaftDir(n.dir) + durable.Suffix
	if err := errors.Join(os.Remove(MarkPath(n.dir)), os.MkdirAll(rubbish, 0o700), os.WriteFile(filepath.Join(rubbish, "log.db"), []byte("x"), 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := Recover(cfg); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(MarkPath(n.dir)); err != nil {
		t.Fatal(err)
	}
	if _, err := Recover(cfg); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(RaftDir(n.dir)); err != nil {
		t.Fatal(err)
	}
	var lost *StoreLostError
	if _, err := Recover(cfg); !errors.As(err, &lost) {
		t.Errorf("%v", err)
	}
}

// TestRecoverSealed: a sealed store is replaced by a sealed one.
func TestRecoverSealed(t *testing.T) {
	t.Parallel()
	n := newNode(t, "node1", spec.RoleManager)
	n.seal = NewSealKey()
	n.start()
	if _, err := n.mgr.Bootstrap(testCtx(t), testCluster, testTrust); err != nil {
		t.Fatal(err)
	}
	n.stop()
	cfg := n.recoverConfig()
	cfg.Seal = nil
	if _, err := Recover(cfg); err == nil {
		t.Error("recovered without the key")
	}
	if _, err := Recover(n.recoverConfig()); err != nil {
		t.Fatal(err)
	}
	n.start()
	eventually(t, "leads", func() error {
		if !n.mgr.IsLeader() {
			return errors.New("does not lead")
		}
		return nil
	})
}
