package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/netip"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/hashicorp/raft"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/peer"
	"github.com/shoalnet/shoal/spec"
)

// TestSane draws every number that a raft peer sends from its extremes: none of
// ours gets near the highest, and each would be for ever.
func TestSane(t *testing.T) {
	const own = 7
	for _, n := range []uint64{0, 1, own, own + 1000, own + maxTermJump + 1, math.MaxUint64 - 1, math.MaxUint64} {
		term := n <= own+maxTermJump
		index := n <= maxIndex
		for msg, ok := range map[any]bool{
			&raft.AppendEntriesRequest{Term: n}:                                              term,
			&raft.AppendEntriesRequest{Term: own, PrevLogEntry: n}:                           index,
			&raft.AppendEntriesRequest{Term: own, PrevLogTerm: n}:                            index,
			&raft.AppendEntriesRequest{Term: own, LeaderCommitIndex: n}:                      index,
			&raft.AppendEntriesRequest{Term: own, Entries: []*raft.Log{{Index: n}}}:          n == 1,
			&raft.AppendEntriesRequest{Term: own, Entries: []*raft.Log{{Index: 1, Term: n}}}: n <= own,
			&raft.AppendEntriesResponse{Term: n}:                                             term,
			&raft.AppendEntriesResponse{Term: own, LastLog: n}:                               index,
			&raft.RequestVoteRequest{Term: n}:                                                term,
			&raft.RequestVoteRequest{Term: own, LastLogIndex: n}:                             index,
			&raft.RequestVoteRequest{Term: own, LastLogTerm: n}:                              index,
			&raft.RequestVoteResponse{Term: n}:                                               term,
			&raft.RequestPreVoteRequest{Term: n}:                                             term,
			&raft.RequestPreVoteRequest{Term: own, LastLogIndex: n}:                          index,
			&raft.RequestPreVoteResponse{Term: n}:                                            term,
			&raft.InstallSnapshotRequest{Term: n}:                                            term,
			&raft.InstallSnapshotRequest{Term: own, LastLogIndex: n}:                         index,
			&raft.InstallSnapshotRequest{Term: own, LastLogTerm: n}:                          index,
			&raft.InstallSnapshotRequest{Term: own, ConfigurationIndex: n}:                   index,
			&raft.InstallSnapshotRequest{Term: own, Size: int64(n)}:                          n <= maxSnapshot,
			&raft.InstallSnapshotResponse{Term: n}:                                           term,
		} {
			if err := sane(msg, own); (err == nil) != ok {
				t.Errorf("%+v: %v", msg, err)
			}
		}
	}
	if err := sane(&raft.AppendEntriesRequest{Term: own, Entries: []*raft.Log{nil}}, own); err == nil {
		t.Error("an entry that is none is taken")
	}
}

// attacker speaks raft with the certificate of some node.
func attacker(t *testing.T, id, role string) *raft.NetworkTransport {
	p := peer.New(peer.Config{Credentials: credentials(t, testRoot, id, role)})
	tr := newNetworkTransport(&dialLayer{peer: p, addr: raft.ServerAddress("127.0.0.1:1"), done: make(chan struct{})}, raftLogger(newNode(t, "x", spec.RoleWorker).log))
	t.Cleanup(func() {
		tr.Close()
		tr.CloseStreams()
		p.Close()
	})
	return tr
}

// TestRaftAttacks: who is no manager, is none of raft's configuration, claims to
// be another, or names an absurd term, changes nothing: the leader leads on, in
// the same term.
func TestRaftAttacks(t *testing.T) {
	nodes := newCluster(t, 3)
	l := leader(t, nodes)
	f := without(nodes, l)[0]
	term := l.mgr.raft.CurrentTerm()
	header := func(id string) raft.RPCHeader {
		return raft.RPCHeader{ProtocolVersion: raft.ProtocolVersionMax, ID: []byte(id), Addr: []byte(l.addr())}
	}
	outside := spec.NewID()
	for name, k := range map[string]struct {
		id, role, says string
		term           uint64
	}{
		"a worker":                        {outside, spec.RoleWorker, outside, term + 1},
		"a manager outside of the others": {outside, spec.RoleManager, outside, term + 1},
		"one that claims to be another":   {outside, spec.RoleManager, l.node.ID, term + 1},
		"the highest term":                {l.node.ID, spec.RoleManager, l.node.ID, math.MaxUint64},
		"an absurd term":                  {l.node.ID, spec.RoleManager, l.node.ID, term + maxTermJump + 10},
	} {
		tr := attacker(t, k.id, k.role)
		to := named(raft.ServerID(f.node.ID), raft.ServerAddress(f.addr()))
		fid := raft.ServerID(f.node.ID)
		for call, err := range map[string]error{
			"vote":     tr.RequestVote(fid, to, &raft.RequestVoteRequest{RPCHeader: header(k.says), Term: k.term, LastLogIndex: 1 << 40, LastLogTerm: k.term, LeadershipTransfer: true}, &raft.RequestVoteResponse{}),
			"pre-vote": tr.RequestPreVote(fid, to, &raft.RequestPreVoteRequest{RPCHeader: header(k.says), Term: k.term, LastLogIndex: 1 << 40, LastLogTerm: k.term}, &raft.RequestPreVoteResponse{}),
			"entries":  tr.AppendEntries(fid, to, &raft.AppendEntriesRequest{RPCHeader: header(k.says), Term: k.term, PrevLogEntry: 0}, &raft.AppendEntriesResponse{}),
			"snapshot": tr.InstallSnapshot(fid, to, &raft.InstallSnapshotRequest{RPCHeader: header(k.says), SnapshotVersion: raft.SnapshotVersionMax, Term: k.term, Size: 5}, &raft.InstallSnapshotResponse{}, strings.NewReader("hello")),
		} {
			if err == nil {
				t.Errorf("%s: %s was answered", name, call)
			}
		}
		if k.id == outside {
			if err := tr.TimeoutNow(fid, to, &raft.TimeoutNowRequest{RPCHeader: header(k.says)}, &raft.TimeoutNowResponse{}); err == nil {
				t.Errorf("%s: a transfer of leadership was answered", name)
			}
		}
	}
	if err := createNetwork(f, "after"); err != nil {
		t.Errorf("after the attacks: %v", err)
	}
	if now := l.mgr.raft.CurrentTerm(); now != term || !l.mgr.IsLeader() {
		t.Errorf("term %d, was %d; leads: %v", now, term, l.mgr.IsLeader())
	}
}

// TestAnsweredTerm: an answer with an absurd term deposes nobody, either.
func TestAnsweredTerm(t *testing.T) {
	tr := &transport{term: func() uint64 { return 3 }}
	if err := tr.answered(&raft.AppendEntriesResponse{Term: math.MaxUint64}, nil); err == nil {
		t.Error("taken")
	}
	if err := tr.answered(&raft.AppendEntriesResponse{Term: 4}, nil); err != nil {
		t.Error(err)
	}
	if err := tr.answered(&raft.AppendEntriesResponse{}, errors.New("x")); err == nil {
		t.Error("an error is lost")
	}
}

// TestJoinTokens: who may join, as what, and what others are told.
func TestJoinTokens(t *testing.T) {
	n := newCluster(t, 1)[0]
	ctx := testCtx(t)
	rotate := func(role string) string {
		t.Helper()
		r, err := n.ctl.RotateToken(ctx, connect.NewRequest(&shoalv1.RotateTokenRequest{Role: role}))
		if err != nil {
			t.Fatal(err)
		}
		tok, err := peer.ParseToken(r.Msg.Token)
		if err != nil || tok.Digest != testRoot.Digest() {
			t.Fatalf("%v, %v", tok, err)
		}
		return tok.Secret
	}
	old := testTrust.Tokens[spec.RoleWorker].Secret
	now := rotate(spec.RoleWorker)
	w := newNode(t, "worker", spec.RoleWorker)
	w.start()
	try := func(change func(*shoalv1.JoinNodeRequest)) (*shoalv1.JoinNodeResponse, error) {
		r := w.joinRequest()
		r.Node.Role, r.Token = "", now
		change(r)
		resp, err := w.joiner(n).JoinNode(ctx, connect.NewRequest(r))
		if err != nil {
			return nil, err
		}
		return resp.Msg, nil
	}
	for name, k := range map[string]struct {
		change func(*shoalv1.JoinNodeRequest)
		code   connect.Code
		want   string
	}{
		"no token":            {func(r *shoalv1.JoinNodeRequest) { r.Token = "" }, connect.CodePermissionDenied, "no join token is given"},
		"a wrong one":         {func(r *shoalv1.JoinNodeRequest) { r.Token = peer.NewSecret() }, connect.CodePermissionDenied, "token is wrong"},
		"a rotated one":       {func(r *shoalv1.JoinNodeRequest) { r.Token = old }, connect.CodePermissionDenied, "was rotated"},
		"one of another role": {func(r *shoalv1.JoinNodeRequest) { r.Node.Role = spec.RoleManager }, connect.CodeInvalidArgument, "for a worker, not for a manager"},
		"no request":          {func(r *shoalv1.JoinNodeRequest) { r.Csr = nil }, connect.CodeInvalidArgument, "request for a certificate"},
		"a node that is there": {func(r *shoalv1.JoinNodeRequest) {
			r.Node.Id = n.node.ID
			r.Node.Name = n.node.Name
		}, connect.CodeAlreadyExists, "with another key"},
	} {
		if _, err := try(k.change); connect.CodeOf(err) != k.code || !strings.Contains(err.Error(), k.want) {
			t.Errorf("%s: %v, want %q", name, err, k.want)
		}
	}
	nodes, err := n.ctl.ListNodes(ctx, connect.NewRequest(&shoalv1.ListNodesRequest{}))
	if err != nil || len(nodes.Msg.Nodes) != 1 {
		t.Errorf("after refused joins: %v, %v", nodes, err)
	}
	resp, err := try(func(*shoalv1.JoinNodeRequest) {})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.peer.Credentials().Set(resp.Certificate.Chain, resp.Certificate.Roots); err != nil {
		t.Fatal(err)
	}
	info, _ := w.peer.Credentials().Info()
	if info.ID != w.node.ID || info.Role != spec.RoleWorker || info.Cluster != testCluster.ID || info.Serial == 0 || resp.Trust.GetSigns() != testRoot.Digest() || len(resp.Trust.GetGossipKeys()) < 2 {
		t.Errorf("%+v, %v", info, resp.Trust)
	}
	// Its answer was lost: it asks again, and is the same node.
	again, err := try(func(*shoalv1.JoinNodeRequest) {})
	if err != nil || again.Node.Number != resp.Node.Number {
		t.Errorf("again: %v, %v", again, err)
	}

	// Guessing is limited, for whoever guesses.
	var limited error
	for range 50 {
		if _, err = try(func(r *shoalv1.JoinNodeRequest) { r.Token = peer.NewSecret() }); connect.CodeOf(err) == connect.CodeResourceExhausted {
			limited = err
		}
	}
	if limited == nil || !strings.Contains(limited.Error(), "too many wrong join tokens came from 127.0.0.1") {
		t.Errorf("50 wrong tokens: %v", err)
	}
}

// TestNobodySpeaksForAnother, with whatever certificate.
func TestNobodySpeaksForAnother(t *testing.T) {
	n := newCluster(t, 1)[0]
	w := newNode(t, "worker", spec.RoleWorker)
	w.start()
	join(t, n, w)
	req := svc("web", 1)
	req.Spec.Constraints = []string{"node.name==node1"}
	n.createService(req)
	n.awaitTasks(1, "web")
	ctx := testCtx(t)
	var task string
	n.mgr.fsm.read(func(s *state.State) {
		for _, x := range s.Tasks(state.TaskFilter{}) {
			task = x.ID
		}
	})
	for _, role := range []string{spec.RoleWorker, spec.RoleManager} {
		c := n.as(w.node.ID, role)
		for what, err := range map[string]error{
			"report": func() error {
				_, err := c.Report(ctx, connect.NewRequest(&shoalv1.ReportRequest{Node: n.node.ID}))
				return err
			}(),
			"assignments": func() error {
				s, err := c.Assignments(ctx, connect.NewRequest(&shoalv1.AssignmentsRequest{Node: n.node.ID}))
				if err != nil {
					return err
				}
				defer s.Close()
				s.Receive()
				return s.Err()
			}(),
			"renewal": func() error {
				_, err := c.RenewCertificate(ctx, connect.NewRequest(&shoalv1.RenewCertificateRequest{Node: n.node.ID}))
				return err
			}(),
			"leave": func() error {
				_, err := c.LeaveNode(ctx, connect.NewRequest(&shoalv1.LeaveNodeRequest{Node: n.node.ID}))
				return err
			}(),
			"questions about endpoints": func() error {
				_, err := c.CheckEndpoints(ctx, connect.NewRequest(&shoalv1.CheckEndpointsRequest{Node: n.node.ID}))
				return err
			}(),
			"a name instead": func() error {
				_, err := c.LeaveNode(ctx, connect.NewRequest(&shoalv1.LeaveNodeRequest{Node: "node1"}))
				return err
			}(),
			"nobody": func() error {
				_, err := c.LeaveNode(ctx, connect.NewRequest(&shoalv1.LeaveNodeRequest{}))
				return err
			}(),
		} {
			if connect.CodeOf(err) != connect.CodePermissionDenied {
				t.Errorf("%s with the certificate of another %s: %v", what, role, err)
			}
		}
	}
	// As itself, of a task that is another's: nothing comes of it.
	_, err := n.as(w.node.ID, spec.RoleWorker).Report(ctx, connect.NewRequest(&shoalv1.ReportRequest{Node: w.node.ID,
		Tasks: map[string]*shoalv1.TaskStatus{task: {State: "failed", AtMs: time.Now().UnixMilli()}}}))
	if err != nil {
		t.Error(err)
	}
	var x spec.Task
	n.mgr.fsm.read(func(s *state.State) {
		if x, err = s.Task(task); err != nil || x.Status.State == spec.TaskFailed {
			t.Errorf("another node's task: %+v, %v", x.Status, err)
		}
	})
	// What it says of that task in gossip the others ask about.
	claim := func(node, addr string) *shoalv1.CheckEndpointsRequest_Claim {
		return &shoalv1.CheckEndpointsRequest_Claim{Node: node, Task: x.ID, TaskName: x.Name, Service: x.Service, Network: x.Attachments[0].Network, Addrs: []string{addr}}
	}
	addr := x.Attachments[0].Addrs[0].String()
	resp, err := n.as(w.node.ID, spec.RoleWorker).CheckEndpoints(ctx, connect.NewRequest(&shoalv1.CheckEndpointsRequest{Node: w.node.ID,
		Claims: []*shoalv1.CheckEndpointsRequest_Claim{claim(w.node.ID, addr), claim(n.node.ID, addr), claim(n.node.ID, "10.0.0.99"), nil}}))
	if err != nil || fmt.Sprint(resp.Msg.Wrong) != "[0 2 3]" {
		t.Errorf("%v, %v", resp, err)
	}
	_, err = n.as(w.node.ID, spec.RoleWorker).CheckEndpoints(ctx, connect.NewRequest(&shoalv1.CheckEndpointsRequest{Node: w.node.ID, Claims: []*shoalv1.CheckEndpointsRequest_Claim{claim(n.node.ID, "x")}}))
	if connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Error(err)
	}
}

// TestChangeOfRoot: the old root goes once every node that lives shows a
// certificate by the new one, not before, and not only when it was given one.
func TestChangeOfRoot(t *testing.T) {
	nodes := newCluster(t, 1)
	n := nodes[0]
	w, dead := newNode(t, "worker", spec.RoleWorker), newNode(t, "dead", spec.RoleWorker)
	for _, x := range []*simNode{w, dead} {
		x.start()
		join(t, n, x)
	}
	ctx := testCtx(t)
	down := &state.SetNodeStatus{Nodes: []state.NodeStatus{{ID: dead.node.ID, Status: spec.NodeDown}}}
	if _, err := n.mgr.Propose(ctx, state.Command{SetNodeStatus: down}); err != nil {
		t.Fatal(err)
	}
	r, err := n.ctl.RotateCA(ctx, connect.NewRequest(&shoalv1.RotateCARequest{}))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.ctl.RotateCA(ctx, connect.NewRequest(&shoalv1.RotateCARequest{})); connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("a second change: %v", err)
	}
	show := func() *shoalv1.ShowCAResponse {
		t.Helper()
		s, err := n.ctl.ShowCA(ctx, connect.NewRequest(&shoalv1.ShowCARequest{}))
		if err != nil {
			t.Fatal(err)
		}
		return s.Msg
	}
	if s := show(); len(s.Waiting) != 2 || len(s.Lost) != 1 || s.Lost[0] != "dead" || s.Old == nil || s.Root.Digest != r.Msg.Digest {
		t.Errorf("%v", s)
	}
	renew := func(x *simNode) {
		t.Helper()
		c := n.as(x.node.ID, x.node.Role)
		resp, err := c.RenewCertificate(ctx, connect.NewRequest(&shoalv1.RenewCertificateRequest{Node: x.node.ID}))
		if err != nil {
			t.Fatal(err)
		}
		if x != n && len(resp.Msg.Certificate.Roots) != 2 {
			t.Errorf("%d roots", len(resp.Msg.Certificate.Roots))
		}
	}
	renew(w)
	renew(n)
	if s := show(); len(s.Waiting) != 2 { // nobody shows what he was given
		t.Errorf("%v", s)
	}
	for _, x := range []*simNode{w, n} {
		if s := show(); s.Old == nil {
			t.Errorf("the old root went before %s moved", x.node.Name)
		}
		if _, err := n.as(x.node.ID, x.node.Role).Report(ctx, connect.NewRequest(&shoalv1.ReportRequest{Node: x.node.ID, CertificateRoot: r.Msg.Digest, ManagerReady: x == n})); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "the old root goes", func() error {
		if show().Old != nil {
			return errors.New("it is there")
		}
		return nil
	})
	if _, err := n.mgr.Propose(context.Background(), state.Command{DropRoot: &state.DropRoot{Digest: r.Msg.Digest}}); err == nil {
		t.Error("the last root was dropped")
	}
}

// TestStandingWithoutNodes: a manager that has carried out only the log's first command
// has no node list, and takes the first node, whose certificate is older, for no removed one.
func TestStandingWithoutNodes(t *testing.T) {
	m := &Manager{fsm: newFSM(slog.New(slog.DiscardHandler))}
	standing := func(id, role string, index uint64) {
		t.Helper()
		if r, i := m.Standing(id); r != role || i != index {
			t.Errorf("%s: role %q at %d, want %q at %d", id, r, i, role, index)
		}
	}
	apply := func(index uint64, c state.Command) {
		t.Helper()
		if r := m.fsm.st.Apply(index, c.Stamped(state.Level)); r.Err != nil {
			t.Fatal(r.Err)
		}
	}
	standing("first", "", 0)
	apply(4, state.Command{InitCluster: &state.InitCluster{Cluster: testCluster, DefaultNetwork: "defaultnet00", Trust: testTrust}})
	standing("first", "", 0)
	apply(5, state.Command{UpsertNode: &state.UpsertNode{Node: spec.Node{ID: "first", Name: "node1", Addr: netip.MustParseAddr("192.0.2.1"), ControlPort: 2377, GossipPort: 7946, Role: spec.RoleManager}}})
	standing("first", spec.RoleManager, 5)
	standing("gone", "", 5)
}
