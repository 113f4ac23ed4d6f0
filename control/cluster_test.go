package control

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/hashicorp/raft"
	"go.uber.org/goleak"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/api/shoal/v1/shoalv1connect"
	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/peer"
	"github.com/shoalnet/shoal/spec"
)

// TestMain looks for goroutines left behind. HTTP/2 connections take a moment
// to notice that their peer is gone.
func TestMain(m *testing.M) {
	code := m.Run()
	if code == 0 {
		var err error
		for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
			if err = goleak.Find(); err == nil {
				break
			}
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "goroutines left behind:", err)
			code = 1
		}
	}
	os.Exit(code)
}

// testTuning is quick, but leaves a starved manager half a second. Silent nodes
// stay ready: these tests' nodes send no reports unless they say so.
var testTuning = Tuning{Heartbeat: 500 * time.Millisecond, Election: 500 * time.Millisecond, DownAfter: time.Hour, DownRegardless: time.Hour, Alive: 50 * time.Millisecond, FirstReports: 1}

// simNode is a node's control side: the listener, the forwarder, and the manager
// while it is one.
type simNode struct {
	t    *testing.T
	node spec.Node
	dir  string
	tune Tuning
	log  *slog.Logger
	sees []string      // control addresses that its forwarder knows
	wait time.Duration // of its forwarder for a leader
	ran  bool          // it was a manager before
	lost error         // why it does not vote

	ln     net.Listener
	srv    *http.Server
	fwd    *Forwarder
	mgr    *Manager
	cancel context.CancelFunc
	wg     sync.WaitGroup
	root   *peer.Root // that certifies it
	seal   []byte     // of its store
	shows  string     // role in its certificate; empty: its role
	peer   *peer.Peer
	client *http.Client                 // of its own socket
	ctl    shoalv1connect.ControlClient // through this node's own forwarder
}

// testTrust is the authority of testCluster.
var testTrust, testRoot = func() (*state.Trust, *peer.Root) {
	t, r, err := NewTrust(testCluster.ID)
	if err != nil {
		panic(err)
	}
	return t, r
}()

// credentials certifies a node, with a serial number that is newer than any list.
func credentials(t *testing.T, root *peer.Root, id, role string) *peer.Credentials {
	t.Helper()
	c, err := peer.NewCredentials()
	if err != nil {
		t.Fatal(err)
	}
	der, err := root.Sign(c.Signer().Public(), peer.Subject{ID: id, Role: role, Cluster: root.Cert.Subject.Organization[0], Serial: 1 << 40})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Set(append([][]byte{der}, root.Chain()...), [][]byte{root.Cert.Raw}); err != nil {
		t.Fatal(err)
	}
	return c
}

// as calls this node with the certificate of another.
func (n *simNode) as(id, role string) shoalv1connect.ControlClient {
	p := peer.New(peer.Config{Credentials: credentials(n.t, n.root, id, role)})
	n.t.Cleanup(p.Close)
	return shoalv1connect.NewControlClient(p.Managers(), "http://"+n.addr())
}

// newNode makes a node that is not started.
func newNode(t *testing.T, name, role string) *simNode {
	n := &simNode{t: t, dir: t.TempDir(), tune: testTuning, log: slog.New(slog.DiscardHandler), root: testRoot,
		node: spec.Node{ID: spec.NewID(), Name: name, Role: role, Availability: spec.AvailabilityActive, Addr: netip.MustParseAddr("127.0.0.1"), GossipPort: 7946}}
	t.Cleanup(n.stop)
	return n
}

// addr is its control address, once it was started.
func (n *simNode) addr() string {
	return netip.AddrPortFrom(n.node.Addr, uint16(n.node.ControlPort)).String()
}

// start opens the node's port, the same as before on a restart.
func (n *simNode) start() {
	n.t.Helper()
	var err error
	eventually(n.t, "listen on "+n.addr(), func() error {
		n.ln, err = net.Listen("tcp", n.addr())
		return err
	})
	n.node.ControlPort = n.ln.Addr().(*net.TCPAddr).Port
	n.peer = peer.New(peer.Config{Credentials: credentials(n.t, n.root, n.node.ID, cmp.Or(n.shows, n.node.Role))})
	httpConns, raftConns := n.peer.Listen(n.ln)
	n.fwd = NewForwarder(ForwarderConfig{NodeID: n.node.ID, Peer: n.peer, Managers: func() []string { return n.sees }, Wait: n.wait, Log: n.log})
	n.srv = n.peer.Server(n.fwd, slog.New(slog.DiscardHandler), func() peer.Caller { return peer.Caller{Kind: peer.Local, ID: n.node.ID} })
	srv := n.srv
	n.wg.Go(func() { _ = srv.Serve(httpConns) })
	dir, err := os.MkdirTemp("", "s") // t.TempDir may be longer than a socket's path
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { os.RemoveAll(dir) })
	socket := filepath.Join(dir, "s.sock")
	local, err := net.Listen("unix", socket)
	if err != nil {
		n.t.Fatal(err)
	}
	n.wg.Go(func() { _ = srv.Serve(local) })
	n.client = peer.UnixClient(socket)
	n.ctl = shoalv1connect.NewControlClient(n.client, "http://shoal")
	if n.node.Role != spec.RoleManager {
		return
	}
	n.mgr, err = NewManager(ManagerConfig{Node: n.node, DataDir: n.dir, Seal: n.seal, Fresh: !n.ran, Voted: n.ran, Peer: n.peer, RaftListener: raftConns, Log: n.log, Tuning: n.tune})
	var lost *StoreLostError
	if errors.As(err, &lost) {
		n.mgr, n.lost = nil, err
		return
	}
	if err != nil {
		n.t.Fatal(err)
	}
	n.ran, n.lost = true, nil
	ctx, cancel := context.WithCancel(context.Background())
	n.cancel = cancel
	m := n.mgr
	n.wg.Go(func() {
		if err := m.Run(ctx); err != nil {
			n.t.Errorf("manager %s: %v", n.node.Name, err)
		}
	})
	n.fwd.SetManager(m)
}

// stop is a sudden death as far as others can see: nothing is said to them.
func (n *simNode) stop() {
	if n.ln == nil {
		return
	}
	n.ln.Close()
	n.srv.Close()
	n.peer.Close()
	if n.cancel != nil {
		n.cancel()
	}
	n.wg.Wait()
	n.client.CloseIdleConnections()
	n.fwd.client.CloseIdleConnections()
	n.peer.Close()
	n.ln, n.cancel, n.mgr = nil, nil, nil
}

// eventually calls fn until it returns nil, for 15 s.
// patience is longer than raft's leader may wait before it tries a follower again
// that was away: 10 ms, doubled ten times (failureWait and maxFailureScale of
// hashicorp/raft's replication.go).
const patience = 40 * time.Second

func eventually(t *testing.T, what string, fn func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if err = fn(); err == nil {
			return
		}
	}
	t.Fatalf("%s: %v", what, err)
}

func testCtx(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

var testCluster = state.Cluster{ID: "testcluster1", Pools: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, SubnetSize: 24, DataPathPort: 4789}

// newCluster starts a cluster of so many managers; all know each other.
func newCluster(t *testing.T, managers int) []*simNode {
	t.Helper()
	var all []*simNode
	for i := range managers {
		n := newNode(t, fmt.Sprintf("node%d", i+1), spec.RoleManager)
		n.start()
		all = append(all, n)
	}
	if _, err := all[0].mgr.Bootstrap(testCtx(t), testCluster, testTrust); err != nil {
		t.Fatal(err)
	}
	for _, n := range all[1:] {
		join(t, all[0], n)
		eventually(t, n.node.Name+" is a voter", func() error {
			if !n.mgr.IsVoter() {
				return errors.New("no")
			}
			return nil
		})
	}
	for _, n := range all {
		for _, o := range all {
			if o != n {
				n.sees = append(n.sees, o.addr())
			}
		}
	}
	return all
}

// join asks via to take n in.
func join(t *testing.T, via, n *simNode) *shoalv1.JoinNodeResponse {
	t.Helper()
	resp, err := n.joiner(via).JoinNode(testCtx(t), connect.NewRequest(n.joinRequest()))
	if err != nil {
		t.Fatalf("join %s: %v", n.node.Name, err)
	}
	if n.node.Role == spec.RoleManager { // whoever leads hears that it is ready
		eventually(t, "report of "+n.node.Name, func() error {
			var err error
			for _, o := range append([]string{via.addr()}, via.sees...) {
				c := shoalv1connect.NewControlClient(n.fwd.client, "http://"+o)
				if _, err = c.Report(testCtx(t), connect.NewRequest(&shoalv1.ReportRequest{Node: n.node.ID, ManagerReady: true})); err == nil {
					return nil
				}
			}
			return err
		})
	}
	return resp.Msg
}

// joiner calls via as a node that has a token and no certificate.
func (n *simNode) joiner(via *simNode) shoalv1connect.ControlClient {
	c := peer.Joiner(via.addr(), testRoot.Digest())
	n.t.Cleanup(c.CloseIdleConnections)
	return shoalv1connect.NewControlClient(c, "http://"+via.addr())
}

func (n *simNode) joinRequest() *shoalv1.JoinNodeRequest {
	n.t.Helper()
	csr, err := peer.Request(n.peer.Credentials().Signer())
	if err != nil {
		n.t.Fatal(err)
	}
	return &shoalv1.JoinNodeRequest{Node: n.info(), Token: testTrust.Tokens[n.node.Role].Secret, Csr: csr}
}

func (n *simNode) info() *shoalv1.NodeInfo {
	return &shoalv1.NodeInfo{Id: n.node.ID, Name: n.node.Name, Role: n.node.Role, Addr: n.node.Addr.String(), ControlPort: int32(n.node.ControlPort), GossipPort: int32(n.node.GossipPort)}
}

// leader waits for a leader among those that run.
func leader(t *testing.T, nodes []*simNode) *simNode {
	t.Helper()
	var l *simNode
	eventually(t, "a leader", func() error {
		for _, n := range nodes {
			if n.mgr != nil && n.mgr.IsLeader() {
				l = n
				return nil
			}
		}
		return errors.New("none leads")
	})
	return l
}

func without(nodes []*simNode, n *simNode) []*simNode {
	return slices.DeleteFunc(slices.Clone(nodes), func(o *simNode) bool { return o == n })
}

func (n *simNode) snapshot() []byte {
	n.t.Helper()
	var b []byte
	var err error
	n.mgr.fsm.read(func(s *state.State) { b, err = s.Snapshot() })
	if err != nil {
		n.t.Fatal(err)
	}
	return b
}

// alike waits until all nodes' states are the same, byte for byte.
func alike(t *testing.T, nodes ...*simNode) {
	t.Helper()
	eventually(t, "equal states", func() error {
		first := nodes[0].snapshot()
		for _, n := range nodes[1:] {
			if b := n.snapshot(); !bytes.Equal(b, first) {
				return fmt.Errorf("the state of %s and %s differ:\n%s\n%s", nodes[0].node.Name, n.node.Name, first, b)
			}
		}
		return nil
	})
}

func createNetwork(n *simNode, name string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	_, err := n.ctl.CreateNetwork(ctx, connect.NewRequest(&shoalv1.CreateNetworkRequest{Name: name}))
	return err
}

func networkNames(n *simNode) ([]string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	resp, err := n.ctl.ListNetworks(ctx, connect.NewRequest(&shoalv1.ListNetworksRequest{}))
	if err != nil {
		return nil, err
	}
	var out []string
	for _, w := range resp.Msg.Networks {
		out = append(out, w.Name)
	}
	return out, nil
}

func TestClusterElectsReplicatesAndForwards(t *testing.T) {
	nodes := newCluster(t, 3)
	worker := newNode(t, "worker1", spec.RoleWorker)
	worker.start()
	join(t, nodes[2], worker) // asked of a follower, too
	worker.sees = []string{nodes[1].addr()}
	// A worker has the list of nodes, and takes no orders for the managers.
	if err := createNetwork(worker, "none"); connect.CodeOf(err) != connect.CodeFailedPrecondition || !strings.Contains(err.Error(), nodes[1].addr()) {
		t.Errorf("a user's command on a worker: %v", err)
	}
	all := nodes
	for i, n := range all {
		if err := createNetwork(n, fmt.Sprintf("net%d", i)); err != nil {
			t.Fatalf("on %s: %v", n.node.Name, err)
		}
	}
	// What one has been told is done, the next read on any other shows.
	for _, n := range all {
		got, err := networkNames(n)
		if err != nil {
			t.Fatal(err)
		}
		for i := range all {
			if name := fmt.Sprintf("net%d", i); !slices.Contains(got, name) {
				t.Errorf("%s does not list %s: %v", n.node.Name, name, got)
			}
		}
	}
	alike(t, nodes...)

	resp, err := worker.ctl.ListNodes(testCtx(t), connect.NewRequest(&shoalv1.ListNodesRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	numbers, leaders := map[int32]bool{}, 0
	for _, n := range resp.Msg.Nodes {
		numbers[n.Number] = true
		if n.Leader {
			leaders++
		}
	}
	if len(resp.Msg.Nodes) != 4 || len(numbers) != 4 || leaders != 1 {
		t.Errorf("%d nodes, %d different numbers, %d leaders: want 4, 4, 1", len(resp.Msg.Nodes), len(numbers), leaders)
	}
	if n := leader(t, nodes); n != nodes[0] {
		t.Errorf("%s leads: the first one had no reason to stop", n.node.Name)
	}
}

// TestLeaderLossKeepsAcknowledgedWrites kills the leader while writes come in
// on another node: those acknowledged are there, and writes go on.
func TestLeaderLossKeepsAcknowledgedWrites(t *testing.T) {
	nodes := newCluster(t, 3)
	old := leader(t, nodes)
	rest := without(nodes, old)
	client := rest[0]

	const total = 60
	acked := make(chan string, total)
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(acked)
		for i := range total {
			name := fmt.Sprintf("w%02d", i)
			if err := createNetwork(client, name); err == nil {
				acked <- name
			} else if connect.CodeOf(err) != connect.CodeUnavailable {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
	var done []string
	for name := range acked {
		if done = append(done, name); len(done) == 10 {
			break
		}
	}
	died := time.Now()
	old.stop()
	next, ok := <-acked // was perhaps on its way already
	for ok {
		done = append(done, next)
		next, ok = <-acked
	}
	wg.Wait()
	t.Logf("%d of %d writes were acknowledged, %s after the leader's death", len(done), total, time.Since(died).Round(time.Millisecond))
	// Of those in flight at the moment of death one may be undecided.
	if len(done) < total-2 {
		t.Errorf("only %d of %d writes were acknowledged", len(done), total)
	}
	for _, n := range rest {
		got, err := networkNames(n)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range done {
			if !slices.Contains(got, name) {
				t.Errorf("%s was acknowledged, and %s does not have it", name, n.node.Name)
			}
		}
	}
	// The dead one comes back as a follower and catches up.
	old.start()
	alike(t, nodes...)
}

// TestMinorityCommitsNothing: a manager that is left alone neither writes nor
// reads, and says why.
func TestMinorityCommitsNothing(t *testing.T) {
	nodes := newCluster(t, 3)
	l := leader(t, nodes)
	for _, n := range without(nodes, l) {
		n.stop()
	}
	eventually(t, "the leader steps down", func() error {
		if l.mgr.IsLeader() {
			return errors.New("it leads without a majority")
		}
		return nil
	})
	if _, err := l.mgr.Propose(testCtx(t), state.Command{CreateNetwork: &state.CreateNetwork{Network: spec.Network{ID: spec.NewID(), Name: "lost"}}}); connect.CodeOf(err) != connect.CodeUnavailable {
		t.Errorf("a write of the minority: %v", err)
	}
	if err := l.mgr.verify(); connect.CodeOf(err) != connect.CodeUnavailable {
		t.Errorf("a read of the minority: %v", err)
	}
}

// TestRestart takes a lone manager through restarts from its log, from a
// snapshot, and from a snapshot and the log after it.
func TestRestart(t *testing.T) {
	n := newCluster(t, 1)[0]
	restart := func(what string) {
		t.Helper()
		want := n.snapshot()
		n.stop()
		n.start()
		leader(t, []*simNode{n})
		alike(t, n)
		if got := n.snapshot(); !bytes.Equal(got, want) {
			t.Errorf("%s: the state is\n%s\nwas\n%s", what, got, want)
		}
	}
	for i := range 5 {
		if err := createNetwork(n, fmt.Sprintf("a%d", i)); err != nil {
			t.Fatal(err)
		}
	}
	restart("from the log")
	n.compact()
	restart("from a snapshot")
	if err := createNetwork(n, "b"); err != nil {
		t.Fatal(err)
	}
	restart("from a snapshot and a log")
	if got, err := networkNames(n); err != nil || !slices.Contains(got, "a4") || !slices.Contains(got, "b") {
		t.Errorf("networks after restarts: %v, %v", got, err)
	}
}

// compact makes a snapshot and drops the log before it.
func (n *simNode) compact() {
	n.t.Helper()
	err := n.mgr.raft.ReloadConfig(raft.ReloadableConfig{TrailingLogs: 1, SnapshotInterval: time.Hour, SnapshotThreshold: 1 << 20, HeartbeatTimeout: n.tune.Heartbeat, ElectionTimeout: n.tune.Election})
	if err != nil {
		n.t.Fatal(err)
	}
	if err := n.mgr.raft.Snapshot().Error(); err != nil {
		n.t.Fatal(err)
	}
}

// TestReplicationIsNotPipelined: raft's pipeline can block for good when a
// follower refuses an entry, and TestForwarderLeaderLosesItself then hung at its
// end, once in some twenty runs of a busy machine.
func TestReplicationIsNotPipelined(t *testing.T) {
	n := newCluster(t, 1)[0]
	if p, err := n.mgr.trans.AppendEntriesPipeline("other", "127.0.0.1:1"); !errors.Is(err, raft.ErrPipelineReplicationNotSupported) {
		t.Errorf("pipeline %v, %v", p, err)
	}
}

// TestFollowerFarBehindGetsSnapshot: what the others no longer have in their
// logs comes as a snapshot.
func TestFollowerFarBehindGetsSnapshot(t *testing.T) {
	nodes := newCluster(t, 3)
	l := leader(t, nodes)
	late := without(nodes, l)[0]
	late.stop()
	for i := range 8 {
		if err := createNetwork(l, fmt.Sprintf("n%d", i)); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range without(nodes, late) {
		n.compact()
	}
	late.start()
	alike(t, nodes...)
	eventually(t, "the follower has a snapshot", func() error { // noted after it is restored
		if late.mgr.raft.Stats()["last_snapshot_index"] == "0" {
			return fmt.Errorf("none, and the leader's is at %s", l.mgr.raft.Stats()["last_snapshot_index"])
		}
		return nil
	})
	// And the snapshot does it for those who wait for a change, too.
	if got, err := networkNames(late); err != nil || !slices.Contains(got, "n7") {
		t.Errorf("networks: %v, %v", got, err)
	}
}

// TestLeadershipBeginsOnce: a manager that leads already when Run begins (raft
// elects itself while the agent still starts) begins one term, not two.
func TestLeadershipBeginsOnce(t *testing.T) {
	n := newCluster(t, 1)[0]
	n.stop()
	var buf lockedBuffer
	n.log = slog.New(slog.NewTextHandler(&buf, nil))
	ln, err := net.Listen("tcp", n.addr())
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	_, r := n.peer.Listen(ln)
	m, err := NewManager(ManagerConfig{Node: n.node, DataDir: n.dir, Peer: n.peer, RaftListener: r, Log: n.log, Tuning: n.tune})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "raft elects itself", func() error {
		if m.raft.State() != raft.Leader {
			return errors.New(m.raft.State().String())
		}
		return nil
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx) }()
	eventually(t, "it leads", func() error {
		if !m.IsLeader() {
			return errors.New("no")
		}
		return nil
	})
	term, _ := m.term()
	// A second term would begin as soon as Run looks at its channel.
	for range 20 {
		if _, err := m.Propose(ctx, state.Command{UpsertNode: &state.UpsertNode{Node: n.node}}); err != nil {
			t.Error(err)
			break
		}
	}
	if now, ok := m.term(); !ok || now != term {
		t.Error("the term changed without an election")
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if k := strings.Count(buf.String(), `msg="leading the managers"`); k != 1 {
		t.Errorf("it began to lead %d times:\n%s", k, buf.String())
	}
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// TestVotersFollowRoles: raft's voters are the nodes whose role is manager.
func TestVotersFollowRoles(t *testing.T) {
	nodes := newCluster(t, 3)
	l := leader(t, nodes)
	gone := without(nodes, l)[0]
	role := spec.RoleWorker
	if _, err := l.ctl.UpdateNode(testCtx(t), connect.NewRequest(&shoalv1.UpdateNodeRequest{Ref: gone.node.Name, Role: &role})); err != nil {
		t.Fatal(err)
	}
	voters := func(want int) {
		t.Helper()
		eventually(t, fmt.Sprintf("%d voters", want), func() error {
			f := l.mgr.raft.GetConfiguration()
			if f.Error() != nil || len(f.Configuration().Servers) != want {
				return fmt.Errorf("%v", f.Configuration().Servers)
			}
			return nil
		})
	}
	voters(2)
	other := without(without(nodes, l), gone)[0]
	if _, err := l.ctl.RemoveNode(testCtx(t), connect.NewRequest(&shoalv1.RemoveNodeRequest{Ref: other.node.ID, Force: true})); err != nil {
		t.Fatal(err)
	}
	voters(1)
	// The last one can neither be removed nor made a worker.
	_, err := l.ctl.RemoveNode(testCtx(t), connect.NewRequest(&shoalv1.RemoveNodeRequest{Ref: l.node.Name, Force: true}))
	if connect.CodeOf(err) != connect.CodeFailedPrecondition || !strings.Contains(err.Error(), "last manager") {
		t.Errorf("removal of the last manager: %v", err)
	}
	_, err = l.ctl.UpdateNode(testCtx(t), connect.NewRequest(&shoalv1.UpdateNodeRequest{Ref: l.node.Name, Role: &role}))
	if connect.CodeOf(err) != connect.CodeFailedPrecondition || !strings.Contains(err.Error(), "last manager") {
		t.Errorf("the last manager made a worker: %v", err)
	}
	if err := createNetwork(l, "still"); err != nil {
		t.Error(err)
	}
}

func get(t *testing.T, c *http.Client, url string) string {
	t.Helper()
	resp, err := c.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
