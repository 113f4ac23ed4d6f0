package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/hashicorp/raft"
	"golang.org/x/time/rate"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/api/shoal/v1/shoalv1connect"
	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/internal/sleep"
	"github.com/shoalnet/shoal/peer"
	"github.com/shoalnet/shoal/spec"
)

// Tuning are a manager's timers; the zero value is for a LAN.
type Tuning struct {
	// Raft's: a follower that hears nothing for Heartbeat stands for election,
	// which takes up to Election. 0: 750 ms each.
	Heartbeat, Election time.Duration
	// Silence of a node before it is down: when gossip agrees, and regardless.
	// 0: 3 s and 15 s.
	DownAfter, DownRegardless time.Duration
	// Sign of life on assignment streams. 0: 1 s.
	Alive time.Duration
	// For how long a new leader waits for the nodes to say how their tasks are before it
	// says so itself. 0: 2.5 s.
	FirstReports time.Duration
}

func (t *Tuning) defaults() {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	// Long enough that a manager which is starved for half a second on a busy
	// machine costs no election, short enough that a dead leader costs 1.5 s.
	def(&t.Heartbeat, 750*time.Millisecond)
	def(&t.Election, 750*time.Millisecond)
	def(&t.DownAfter, 3*time.Second)
	def(&t.DownRegardless, 15*time.Second)
	def(&t.Alive, time.Second)
	def(&t.FirstReports, 2500*time.Millisecond)
}

// ManagerConfig is what a Manager needs.
type ManagerConfig struct {
	Node    spec.Node // this one: ID, name, address, control port
	DataDir string    // raft's files are in RaftDir(DataDir)
	// Fresh: this node never was a voter, so that a new store is no lost one. It has
	// a new ID, and the directory none of an earlier life.
	Fresh bool
	// Voted: it is known to have been a manager, whatever the directory shows.
	Voted bool
	// Seal is the key that raft's files are sealed with; empty: they are not. See
	// lock.go.
	Seal []byte
	// Peer is this node among the others, RaftListener raft's share of its port.
	Peer         *peer.Peer
	RaftListener *peer.Conns
	// Liveness is what this node's gossip holds of the others, by ID.
	Liveness func() map[string]spec.Liveness
	// HostRoutes are prefixes that this machine reaches elsewhere: no new
	// subnet may overlap one.
	HostRoutes func() []netip.Prefix
	Log        *slog.Logger
	Tuning     Tuning
}

// RaftDir is where a manager keeps raft's log and snapshots.
func RaftDir(dataDir string) string { return filepath.Join(dataDir, "raft") }

// Manager is one member of the raft cluster.
type Manager struct {
	cfg   ManagerConfig
	log   *slog.Logger
	fsm   *fsm
	raft  *raft.Raft
	store *store
	trans *transport

	mu         sync.Mutex
	leadership context.Context // of the current term as leader; nil: not leader, or not ready
	verified   time.Time       // when leadership was last confirmed by a majority
	lastSeen   map[string]time.Time
	told       map[string]bool                           // nodes that have said how all their tasks are
	began      time.Time                                 // of the leadership
	applied    map[string]uint64                         // by node: index of the newest assignment that it follows
	tidings    bell                                      // of news
	faults     map[string][]*shoalv1.ReportRequest_Fault // by node: what it last said it can't do
	gossipSeen map[string]gossipSeen                     // by node: which keys of gossip it has
	shows      map[string]string                         // by node: digest of its certificate's root
	ready      map[string]bool                           // by node: its raft runs, and may be counted on
	levels     map[string]int                            // by node: feature level of its build
	adding     string                                    // node that is in raft's configuration, or about to be, before that is committed
	dark       map[string][]string                       // by node: those that do not answer it over VXLAN
	reports    map[string]*rate.Limiter                  // by node: its budget of reports; nil: it has never led
	halting    map[string]bool                           // by node: its machine goes down
	wakeNodes  chan struct{}                             // size 1
	wakeVoters chan struct{}                             // size 1
}

const (
	snapshotsKept  = 2
	proposeTimeout = 5 * time.Second  // until raft takes a proposal, and of a change of its voters
	commitTimeout  = 20 * time.Second // and until it has agreed: longer than a leader keeps its office without a majority
	logCached      = 512              // entries of raft's log that are kept in memory
)

// NewManager opens raft, which waits to be added by a leader, or for Bootstrap, when
// it has no configuration yet. Its error is a *StoreLostError when this node may not
// vote from what it has; see store.go.
func NewManager(cfg ManagerConfig) (*Manager, error) {
	cfg.Tuning.defaults()
	if cfg.Liveness == nil {
		cfg.Liveness = func() map[string]spec.Liveness { return nil }
	}
	if cfg.HostRoutes == nil {
		cfg.HostRoutes = func() []netip.Prefix { return nil }
	}
	m := &Manager{cfg: cfg, log: cfg.Log, fsm: newFSM(cfg.Log), lastSeen: map[string]time.Time{}, applied: map[string]uint64{}, tidings: make(bell), wakeNodes: make(chan struct{}, 1), wakeVoters: make(chan struct{}, 1)}
	var err error
	if m.store, err = openStore(cfg); err != nil {
		return nil, err
	}
	logger := raftLogger(cfg.Log)
	ready := make(chan struct{})
	m.trans = newTransport(cfg.RaftListener.Borrow(), cfg.Peer, m.address(), logger, m.admit, func() uint64 {
		select {
		case <-ready:
			return m.raft.CurrentTerm()
		default:
			return maxIndex // not known yet: raft may call before it is made
		}
	}, ready)
	rc := raft.DefaultConfig()
	rc.LocalID = raft.ServerID(cfg.Node.ID)
	rc.HeartbeatTimeout, rc.ElectionTimeout = cfg.Tuning.Heartbeat, cfg.Tuning.Election
	rc.LeaderLeaseTimeout = cfg.Tuning.Heartbeat * 2 / 3
	// How late followers learn, with nothing else to be told, that an entry is
	// committed. Only the leader answers anybody, and an entry of its own tells a
	// follower of all before it; each of these messages is paid for by every follower,
	// idle or not.
	rc.CommitTimeout = 200 * time.Millisecond
	rc.SnapshotThreshold, rc.SnapshotInterval = 8192, 2*time.Minute
	rc.Logger = logger
	// What is replicated was just written: it is not read from the disk again.
	cached, err := raft.NewLogCache(logCached, m.store)
	if err != nil {
		m.trans.Close()
		m.store.Close()
		return nil, fmt.Errorf("start raft: %w", err)
	}
	var snaps raft.SnapshotStore = m.store.snaps
	if m.store.seal != nil {
		snaps = &sealedSnaps{snaps, m.store.seal}
	}
	m.raft, err = raft.NewRaft(rc, m.fsm, cached, m.store, snaps, m.trans)
	if err != nil {
		m.trans.Close()
		m.store.Close()
		if why := m.fsm.unread(); why != nil {
			err = fmt.Errorf("%w: %w", err, why)
		}
		return nil, fmt.Errorf("start raft: %w", err)
	}
	close(ready)
	return m, nil
}

// admit tells whether a caller may speak raft with this manager: with a
// manager's certificate, while the node list has it as one, and while it is in
// raft's configuration. A call without a command is the connection itself.
//
// A manager that was away may find that all others were replaced meanwhile, and
// its configuration names none of them. So, while it hears of no leader, it lets
// one that the node list does not rule out bring it up to date, which a vote or
// a transfer of leadership does not. Once it hears of that one, it goes on with it:
// else each heartbeat that is let in would shut out the entries that are behind.
func (m *Manager) admit(c peer.Caller, cmd any) error {
	c, err := m.cfg.Peer.Again(c)
	if err != nil {
		return err
	}
	if err := peer.IsManager(c); err != nil || cmd == nil {
		return err
	}
	servers := m.raft.GetConfiguration().Configuration().Servers
	if len(servers) == 0 || slices.ContainsFunc(servers, func(s raft.Server) bool { return string(s.ID) == c.ID }) {
		return nil
	}
	alone := m.raft.State() != raft.Leader && time.Since(m.raft.LastContact()) > m.cfg.Tuning.Heartbeat
	_, leader := m.raft.LeaderWithID()
	switch cmd.(type) {
	case *raft.AppendEntriesRequest, *raft.InstallSnapshotRequest:
		if alone || string(leader) == c.ID && m.raft.State() != raft.Leader {
			return nil
		}
	}
	return fmt.Errorf("%s is not in raft's configuration", c)
}

// UnlockKey is the cluster's, as far as this manager has it; "" without one.
func (m *Manager) UnlockKey() (key string, generation uint64) {
	m.fsm.read(func(st *state.State) { key, generation = st.UnlockKey() })
	return key, generation
}

// Standing is what the managers' node list says, as far as this manager has it;
// see [peer.Standing]. Without a node it is none: a new manager is there when it has
// carried out the log's first command, which makes the cluster, and not yet the next,
// by which the first node is in it. That one was told it was removed, and left.
func (m *Manager) Standing(id string) (role string, index uint64) {
	m.fsm.read(func(st *state.State) {
		if st.HasNodes() {
			role, index = st.RoleOf(id), st.Index()
		}
	})
	return role, index
}

func (m *Manager) address() raft.ServerAddress {
	return raft.ServerAddress(net.JoinHostPort(m.cfg.Node.Addr.String(), strconv.Itoa(m.cfg.Node.ControlPort)))
}

func raftAddress(n spec.Node) raft.ServerAddress {
	return raft.ServerAddress(netip.AddrPortFrom(n.Addr, uint16(n.ControlPort)).String())
}

// Bootstrap makes this manager the first of a new cluster. Run must be running.
func (m *Manager) Bootstrap(ctx context.Context, c state.Cluster, trust *state.Trust) (spec.Node, error) {
	err := m.raft.BootstrapCluster(raft.Configuration{Servers: []raft.Server{{ID: raft.ServerID(m.cfg.Node.ID), Address: m.address()}}}).Error()
	if err != nil {
		return spec.Node{}, fmt.Errorf("make the cluster: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for !m.IsLeader() {
		select {
		case <-ctx.Done():
			return spec.Node{}, fmt.Errorf("make the cluster: raft elected no leader: %w", ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
	if _, err := m.Propose(ctx, state.Command{InitCluster: &state.InitCluster{Cluster: c, DefaultNetwork: spec.NewID(), HostRoutes: m.cfg.HostRoutes(), Trust: trust, Level: m.cfg.Node.Level}}); err != nil {
		return spec.Node{}, err
	}
	n := m.cfg.Node
	n.Created = time.Now().UnixMilli()
	if info, ok := m.cfg.Peer.Credentials().Info(); ok {
		n.PublicKey, n.CertEnd, n.CertRoot = m.cfg.Peer.Credentials().PublicKey(), info.Until.UnixMilli(), info.Root
	}
	r, err := m.Propose(ctx, state.Command{UpsertNode: &state.UpsertNode{Node: n}})
	if err != nil {
		return spec.Node{}, err
	}
	return *r.Node, nil
}

// Run leads while this manager is the leader, and shuts raft down when ctx ends.
func (m *Manager) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	lead := func() context.CancelFunc {
		lctx, cancel := context.WithCancel(ctx)
		wg.Go(func() { m.lead(lctx) })
		return cancel
	}
	stop := func() {}
	defer func() {
		stop()
		wg.Wait()
		m.store.end()
		if err := m.raft.Shutdown().Error(); err != nil {
			m.log.Error("raft did not shut down in order", "error", err)
		}
		m.trans.Close()
		m.store.Close()
	}()
	var marked mark
	tick := time.NewTicker(markInterval)
	defer tick.Stop()
	defer func() { m.keepMark(marked) }()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			marked = m.keepMark(marked)
		case leader, ok := <-m.raft.LeaderCh(): // keeps the latest notice for whoever comes late
			if !ok {
				return nil
			}
			stop()
			wg.Wait()
			stop = func() {}
			if leader {
				stop = lead()
			}
		}
	}
}

// Stuck is why this manager applies nothing more of the log, a *StuckError; nil when it
// does.
func (m *Manager) Stuck() error { return m.fsm.standing() }

// lead is one term as leader.
func (m *Manager) lead(ctx context.Context) {
	// Everything that earlier terms committed must be applied before anybody
	// is answered.
	for {
		err := m.raft.Barrier(proposeTimeout).Error()
		if err == nil {
			break
		}
		if ctx.Err() != nil || m.raft.State() != raft.Leader {
			return
		}
		m.log.Debug("waiting for the log to be applied", "error", err)
	}
	if ctx.Err() != nil {
		return
	}
	if err := m.Stuck(); err != nil {
		// Another may be able to.
		m.log.Warn("this manager was elected, and can't lead", "error", err)
		for ctx.Err() == nil && m.raft.State() == raft.Leader {
			if err := m.raft.LeadershipTransfer().Error(); err != nil {
				sleep.For(ctx, m.cfg.Tuning.Election)
			}
		}
		return
	}
	now := time.Now()
	m.mu.Lock()
	m.leadership, m.verified, m.began, m.told = ctx, now, now, map[string]bool{}
	m.lastSeen, m.applied, m.faults, m.ready, m.shows = map[string]time.Time{}, map[string]uint64{}, map[string][]*shoalv1.ReportRequest_Fault{}, map[string]bool{}, map[string]string{}
	m.gossipSeen, m.levels = map[string]gossipSeen{}, map[string]int{}
	m.dark = map[string][]string{}
	m.reports, m.halting = map[string]*rate.Limiter{}, nil
	m.mu.Unlock()
	m.log.Info("leading the managers")
	defer func() {
		m.mu.Lock()
		m.leadership = nil
		m.mu.Unlock()
		m.log.Info("no longer leading the managers")
	}()
	var wg sync.WaitGroup
	wg.Go(func() { m.schedule(ctx) })
	wg.Go(func() { m.monitor(ctx, now) })
	wg.Go(func() { m.keepVoters(ctx) })
	wg.Go(func() { m.keepGossipKeys(ctx) })
	wg.Go(func() { m.keepRoots(ctx) })
	wg.Wait()
}

// IsVoter tells whether this manager is in raft's configuration.
func (m *Manager) IsVoter() bool { return m.votes(m.cfg.Node.ID) }

// Counted tells whether a node is in raft's configuration to stay, as this leader
// knows it: raft has a configuration from when it is proposed, and a leader that ends
// before a majority has it may take the node's vote along.
func (m *Manager) Counted(id string) bool {
	if !m.votes(id) { // asked first: what is added meanwhile is noted before it is seen there
		return false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.adding != id
}

// votes tells whether a node is in raft's configuration.
func (m *Manager) votes(id string) bool {
	return slices.ContainsFunc(m.raft.GetConfiguration().Configuration().Servers, func(s raft.Server) bool { return string(s.ID) == id })
}

// Leader is the leader's node ID and control address; empty while unknown.
func (m *Manager) Leader() (id, addr string) {
	a, i := m.raft.LeaderWithID()
	return string(i), string(a)
}

// IsLeader tells whether this manager leads and has applied all that was
// committed before.
func (m *Manager) IsLeader() bool {
	_, ok := m.term()
	return ok
}

func (m *Manager) term() (context.Context, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.leadership, m.leadership != nil
}

// sureTerm is term once a majority has confirmed it, for a stream that ends with it.
func (m *Manager) sureTerm() (context.Context, error) {
	if err := m.verify(); err != nil {
		return nil, err
	}
	term, ok := m.term()
	if !ok {
		return nil, errNotLeader()
	}
	return term, nil
}

// errNotLeader answers what only the leader can do. The Forwarder takes the
// header as leave to ask another.
func errNotLeader() error {
	err := connect.NewError(connect.CodeUnavailable, errors.New("this manager does not lead the cluster now"))
	err.Meta().Set(notLeaderHeader, "1")
	return err
}

// errLeftOpen answers when nobody knows whether a change will have been made. The
// Forwarder takes the header as leave to make the call again where that does no harm.
func errLeftOpen(why error) error {
	err := connect.NewError(connect.CodeUnavailable, fmt.Errorf("the managers did not agree in time, the change may or may not have been made: %w", why))
	err.Meta().Set(leftOpenHeader, "1")
	return err
}

// settle waits until raft has decided, for a time.
func settle(ctx context.Context, f raft.Future, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	decided := make(chan error, 1)
	go func() { decided <- f.Error() }() // raft answers when it is applied, when the leader falls, or when it ends
	select {
	case err := <-decided:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Propose puts a command through raft and returns what the state made of it.
func (m *Manager) Propose(ctx context.Context, c state.Command) (state.Result, error) {
	if !m.IsLeader() {
		return state.Result{}, errNotLeader()
	}
	level, err := m.allowed(c)
	if err != nil {
		return state.Result{}, err
	}
	b, err := state.Encode(c.Stamped(level))
	if err != nil {
		return state.Result{}, rpcError(err)
	}
	timeout := proposeTimeout
	if d, ok := ctx.Deadline(); ok {
		timeout = min(timeout, time.Until(d))
	}
	f := m.raft.Apply(b, max(timeout, time.Millisecond))
	switch err := settle(ctx, f, commitTimeout); {
	case errors.Is(err, raft.ErrNotLeader), errors.Is(err, raft.ErrLeadershipTransferInProgress):
		return state.Result{}, errNotLeader()
	case errors.Is(err, raft.ErrEnqueueTimeout):
		return state.Result{}, connect.NewError(connect.CodeUnavailable, fmt.Errorf("the managers have more to do than they can: nothing was changed, try again in a moment: %w", err))
	case err != nil:
		return state.Result{}, errLeftOpen(err)
	}
	r, ok := f.Response().(state.Result)
	if !ok {
		return r, connect.NewError(connect.CodeInternal, fmt.Errorf("unexpected answer of the state machine: %T", f.Response()))
	}
	if r.Err != nil {
		return r, rpcError(r.Err)
	}
	return r, nil
}

// verify makes sure that this manager still leads before a read. A confirmation
// holds for half of the time in which no other could have been elected.
func (m *Manager) verify() error {
	if !m.IsLeader() {
		return errNotLeader()
	}
	m.mu.Lock()
	fresh := time.Since(m.verified) < m.cfg.Tuning.Heartbeat/3
	m.mu.Unlock()
	if fresh {
		return nil
	}
	at := time.Now()
	if err := m.raft.VerifyLeader().Error(); err != nil {
		return errNotLeader()
	}
	m.mu.Lock()
	m.verified = at
	m.mu.Unlock()
	return nil
}

// rpcError gives a refusal its RPC code.
func rpcError(err error) error {
	code := connect.CodeInternal
	for _, k := range []struct {
		kind error
		code connect.Code
	}{
		{state.ErrNotFound, connect.CodeNotFound}, {state.ErrExists, connect.CodeAlreadyExists}, {state.ErrInUse, connect.CodeFailedPrecondition},
		{state.ErrInvalid, connect.CodeInvalidArgument}, {state.ErrExhausted, connect.CodeResourceExhausted}, {state.ErrConflict, connect.CodeAborted}, {state.ErrLevel, connect.CodeFailedPrecondition},
	} {
		if errors.Is(err, k.kind) {
			code = k.code
		}
	}
	return connect.NewError(code, err)
}

// Handler serves the Control service. On a manager that does not lead every call
// fails with CodeUnavailable.
func (m *Manager) Handler() http.Handler {
	_, h := shoalv1connect.NewControlHandler(&service{m}, peer.CompressLarge(), connect.WithReadMaxBytes(state.MaxCommand), connect.WithInterceptors(peer.Owner{}, known{m}))
	return h
}
