package control

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"connectrpc.com/connect"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/spec"
)

func (n *simNode) level() int {
	level := 0
	n.mgr.fsm.read(func(s *state.State) { level = s.Level() })
	return level
}

// says reports of a node that its build has a level.
func says(t *testing.T, to, n *simNode, level int32) {
	t.Helper()
	_, err := to.as(n.node.ID, n.node.Role).Report(testCtx(t), connect.NewRequest(&shoalv1.ReportRequest{Node: n.node.ID, ManagerReady: true,
		Addr: n.node.Addr.String(), ControlPort: int32(n.node.ControlPort), GossipPort: int32(n.node.GossipPort), Level: level, Build: fmt.Sprintf("v%d", level)}))
	if err != nil {
		t.Fatalf("report of %s: %v", n.node.Name, err)
	}
}

// TestFeatureLevel: the level is that of the manager that has least, it goes up when
// the last one has more, and until then nothing of it is in the log.
func TestFeatureLevel(t *testing.T) {
	t.Parallel()
	all := newCluster(t, 3) // of builds that know no levels
	l := leader(t, all)
	others := without(all, l)
	says(t, l, l, state.Level)
	says(t, l, others[0], state.Level)
	says(t, l, others[1], 0)

	// A new field is refused, by name of who is in the way, and is not logged.
	before := l.snapshot()
	n := l.node
	n.Level = 1
	_, err := l.mgr.Propose(testCtx(t), state.Command{UpsertNode: &state.UpsertNode{Node: n}})
	if want := fmt.Sprintf("upsert_node.node.level needs all managers at feature level 1, and the cluster is at level 0, as %s runs a version without levels, or has not said yet: upgrade shoal there", others[1].node.Name); !errors.Is(err, state.ErrLevel) || !strings.Contains(err.Error(), want) || connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("%v\nwant %s", err, want)
	}
	if after := l.snapshot(); !bytes.Equal(before, after) || bytes.Contains(after, []byte(`"level"`)) || bytes.Contains(after, []byte(`"build"`)) {
		t.Errorf("the log has what not all managers can read:\n%s", after)
	}
	if l.level() != 0 {
		t.Fatalf("level %d while a manager has 0", l.level())
	}

	// The last one is upgraded.
	says(t, l, others[1], state.Level)
	eventually(t, "the cluster's level goes up", func() error {
		for _, n := range all {
			if n.level() != state.Level {
				return fmt.Errorf("%s has %d", n.node.Name, n.level())
			}
		}
		return nil
	})
	for _, n := range all {
		says(t, l, n, state.Level)
	}
	alike(t, all...)
	resp, err := l.ctl.ListNodes(testCtx(t), connect.NewRequest(&shoalv1.ListNodesRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range resp.Msg.Nodes {
		if !n.Voter {
			t.Errorf("%s is not said to vote", n.Name)
		}
		if n.Level != state.Level || n.Build != fmt.Sprintf("v%d", state.Level) {
			t.Errorf("%v", n)
		}
	}

	// It does not go down again, and one that has less does not come in, as what
	// it would not understand is in the log from now on.
	says(t, l, others[1], 0)
	for _, role := range []string{spec.RoleManager, spec.RoleWorker} {
		old := newNode(t, "old-"+role, role)
		old.start()
		_, err := old.joiner(l).JoinNode(testCtx(t), connect.NewRequest(old.joinRequest()))
		if err == nil || connect.CodeOf(err) != connect.CodeFailedPrecondition || !strings.Contains(err.Error(), fmt.Sprintf("node old-%s can't join: the cluster is at feature level %d, and its shoal has level 0: install a shoal of level %d or newer on it", role, state.Level, state.Level)) {
			t.Errorf("an old %s joins: %v", role, err)
		}
	}
	for _, n := range all {
		n.stop()
	}
	for _, n := range all {
		n.start()
	}
	if l = leader(t, all); l.level() != state.Level {
		t.Errorf("after a restart level %d", l.level())
	}
}

// TestFirstLevel: a cluster is made at the level of its first manager, and what joins
// with the same is taken in.
func TestFirstLevel(t *testing.T) {
	t.Parallel()
	a := newNode(t, "node1", spec.RoleManager)
	a.node.Level, a.node.Build = state.Level, "v1"
	a.start()
	if _, err := a.mgr.Bootstrap(testCtx(t), testCluster, testTrust); err != nil {
		t.Fatal(err)
	}
	if a.level() != state.Level {
		t.Errorf("level %d", a.level())
	}
	w := newNode(t, "node2", spec.RoleWorker)
	w.start()
	req := w.joinRequest()
	req.Node.Level, req.Node.Build = 1<<30, strings.Repeat("x", 1000)
	resp, err := w.joiner(a).JoinNode(testCtx(t), connect.NewRequest(req))
	if err != nil {
		t.Fatal(err)
	}
	if n := resp.Msg.Node; n.Level != maxLevel || len(n.Build) != maxBuild {
		t.Errorf("what a node says of its build is not bounded: %d, %d bytes", n.Level, len(n.Build))
	}
}
