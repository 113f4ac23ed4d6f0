package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"net"
	"net/http"
	"net/netip"
	goruntime "runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"

	"github.com/shoalnet/shoal/api"
	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/api/shoal/v1/shoalv1connect"
	"github.com/shoalnet/shoal/control"
	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/dns"
	"github.com/shoalnet/shoal/gossip"
	"github.com/shoalnet/shoal/ingress"
	"github.com/shoalnet/shoal/internal/sleep"
	"github.com/shoalnet/shoal/overlay"
	"github.com/shoalnet/shoal/peer"
	"github.com/shoalnet/shoal/reconcile"
	"github.com/shoalnet/shoal/runtime"
	"github.com/shoalnet/shoal/spec"
	"github.com/shoalnet/shoal/vip"
)

// Timers of a member.
const (
	reportInterval = time.Second     // sign of life to the leader; it takes 3 s of silence for suspicion
	reportTimeout  = 2 * time.Second // one report
	streamSilence  = 5 * time.Second // of an assignment stream that sends one each second
	// meetWait is for gossip to hear of every node that is ready, after a start: a restarted
	// agent's peers hold it for suspect for a second or two.
	meetWait  = 2500 * time.Millisecond
	wireWait  = 5 * time.Second // for this node's kernel to follow the cluster, after a start: then it counts as ready all the same
	namesWait = 3 * time.Second // for all names to be known, after a start; stub resolvers ask again after 5 s
)

// member is the node's life in one cluster.
type member struct {
	cfg   Config
	ident *identity // written by the member's owner only
	log   *slog.Logger

	listener *net.TCPListener // control port
	creds    *peer.Credentials
	peer     *peer.Peer                      // this node among the others
	nodes    atomic.Pointer[nodeList]        // who is in the cluster; nil: not known yet
	fsm      atomic.Pointer[control.Manager] // manager, for those who must not wait for mu
	raft     *peer.Conns                     // raft's share of the port
	http     net.Listener                    // the API's share of it
	fwd      *control.Forwarder
	client   shoalv1connect.ControlClient // by way of fwd
	byID     *http.Client                 // calls nodes by their IDs

	g        *gossip.Gossip
	tasks    *tasks
	images   imageKeeper
	dns      *dns.Server
	waited   atomic.Bool // a View was complete, or every node has had its time to be met
	namesDue atomic.Bool // names are answered from whatever is known
	overlay  *reconcile.Loop[overlay.State, overlay.State]
	vip      *reconcile.Loop[vip.State, vip.State]
	ingress  *reconcile.Loop[ingress.State, ingress.State]

	view        atomic.Pointer[spec.View] // the last that was composed
	made        made
	composeWake chan struct{} // size 1
	changedAt   atomic.Int64  // when a loop's pass that changed the kernel ended; Unix nanoseconds
	reportWake  chan struct{} // size 1
	assignWake  chan struct{} // size 1
	certWake    chan struct{} // size 1
	saveWake    chan struct{} // size 1
	progress    *progress
	paths       *paths
	claims      *claims
	metrics     *metrics // the agent's; nil: none
	seen        seen
	flows       flows
	evicted     func(reason string) // told once when the managers no longer know this node

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	publishMu sync.Mutex  // orders SetEndpoints
	said      atomic.Bool // gossip was told of all that runs here

	// certLoop's.
	renewed  *shoalv1.RenewCertificateResponse // by what the managers said; nil: that is done with
	leftover bool                              // what it had as a manager is to be removed still

	saveMu sync.Mutex // one writer of each file at a time
	kept   kept

	mu         sync.Mutex
	manager    *control.Manager
	managerErr error  // see managerFault
	sealKey    []byte // of the managers' log; empty: not sealed, or not unlocked yet
	voted      bool   // it was a manager before this start
	remaking   bool   // the manager's store is being replaced: none may start
	stopMgr    context.CancelFunc
	mgrDone    chan struct{}
	assigned   *assignment
	fresh      bool  // assigned came from the managers since the start
	halting    bool  // its machine goes down
	cacheErr   error // why what they said before it is not known; nil: it is
	certErr    error // why the certificate or the role is not as it should be; nil: it is
	acked      map[string]spec.TaskStatus
	began      time.Time // when the agent started
	answered   time.Time // when a manager last answered, or the agent started
	follows    uint64    // index of the newest assignment that the kernel follows
}

// newMember opens the control port. Nothing is started.
func newMember(cfg Config, ident *identity, creds *peer.Credentials, log *slog.Logger) (*member, error) {
	addr := netip.AddrPortFrom(ident.Addr, uint16(ident.ControlPort))
	ln, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(addr))
	if err != nil {
		return nil, listenError("control", "tcp", addr, "--control-port", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	m := &member{cfg: cfg, ident: ident, creds: creds, log: log, listener: ln, ctx: ctx, cancel: cancel,
		composeWake: make(chan struct{}, 1), reportWake: make(chan struct{}, 1), assignWake: make(chan struct{}, 1), certWake: make(chan struct{}, 1), saveWake: make(chan struct{}, 1), progress: newProgress(), paths: newPaths(), claims: newClaims(ident.NodeID, log), acked: map[string]spec.TaskStatus{}}
	m.peer = peer.New(peer.Config{Credentials: creds, Standing: m.standing, Log: log})
	m.http, m.raft = m.peer.Listen(ln)
	m.fwd = control.NewForwarder(control.ForwarderConfig{NodeID: ident.NodeID, Peer: m.peer, Managers: m.managerAddrs, Log: log})
	m.byID = m.peer.NodesBy(m.controlAddr)
	m.kept.log = log
	// By way of the agent's own socket, as every other client: the forwarder
	// behind it finds the leader.
	m.client = shoalv1connect.NewControlClient(peer.UnixClient(cfg.Socket), "http://shoal")
	return m, nil
}

// serve starts HTTP on the control port.
func (m *member) serve(h http.Handler) {
	srv := m.peer.Server(h, m.log, nil)
	m.wg.Go(func() {
		if err := srv.Serve(m.http); err != nil && m.ctx.Err() == nil {
			m.log.Error("control port closed", "error", err)
		}
	})
	m.wg.Go(func() {
		<-m.ctx.Done()
		// Streams last as long as their peers like: they are cut.
		srv.Close()
	})
}

// startManager makes this node a manager. It is not one yet if the cluster has
// not added it.
// With fresh, it never was one; else a store that is not there is one that is lost.
func (m *member) startManager(fresh bool) (*control.Manager, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.manager != nil {
		return m.manager, nil
	}
	if !fresh && m.ident.Role != spec.RoleManager {
		return nil, errors.New("this node is no manager any more")
	}
	if m.remaking {
		return nil, errRemaking
	}
	cfg, err := m.managerConfig(fresh)
	if err != nil {
		return nil, err
	}
	mgr, err := control.NewManager(cfg)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(m.ctx)
	m.manager, m.stopMgr, m.mgrDone = mgr, cancel, make(chan struct{})
	done := m.mgrDone
	m.wg.Go(func() {
		defer close(done)
		if err := mgr.Run(ctx); err != nil && ctx.Err() == nil {
			m.log.Error("manager ended", "error", err)
		}
	})
	m.fsm.Store(mgr)
	m.fwd.SetManager(mgr)
	return mgr, nil
}

// managerConfig is what this node's manager is made of. m.mu is held.
func (m *member) managerConfig(fresh bool) (control.ManagerConfig, error) {
	if g, err := control.LockGeneration(m.cfg.DataDir); err != nil {
		return control.ManagerConfig{}, err
	} else if g > 0 && len(m.sealKey) == 0 {
		return control.ManagerConfig{}, control.LockedError{}
	}
	return control.ManagerConfig{
		Node: m.asNode(spec.RoleManager), DataDir: m.cfg.DataDir, Seal: m.sealKey, Fresh: fresh, Voted: m.voted, Peer: m.peer, RaftListener: m.raft,
		Liveness: m.liveness, HostRoutes: m.cfg.HostRoutes, Log: m.log,
	}, nil
}

// stopManager makes this node a worker; its raft data go, as it may never vote
// from them again. The mark that it has voted stays: the leader may count on it still.
func (m *member) stopManager() error {
	m.mu.Lock()
	mgr, stop, done := m.manager, m.stopMgr, m.mgrDone
	m.manager = nil
	m.mu.Unlock()
	if mgr != nil {
		m.fwd.SetManager(nil)
		m.fsm.Store(nil)
		stop()
		<-done
	}
	m.mu.Lock()
	m.sealKey = nil
	m.mu.Unlock()
	return control.GiveUp(m.cfg.DataDir)
}

// role is this node's, which the managers may change.
func (m *member) role() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.ident.Role
}

// name is this node's, which the managers may change.
func (m *member) name() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.ident.Name
}

// node is this node as the managers list it.
func (m *member) node(role string) spec.Node {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.asNode(role)
}

// asNode is node with m.mu held.
func (m *member) asNode(role string) spec.Node {
	id := m.ident
	return spec.Node{ID: id.NodeID, Name: id.Name, Number: id.Number, Role: role, Availability: spec.AvailabilityActive,
		Addr: id.Addr, ControlPort: id.ControlPort, GossipPort: id.GossipPort, DataPath: m.cfg.VIP.Name(), Platform: platform,
		Level: state.Level, Build: m.cfg.Version}
}

// start begins the node's work, once ident is complete.
func (m *member) start() error {
	m.loadAssignment()
	m.loadGiven()
	g, err := gossip.Open(gossip.Config{
		NodeID: m.ident.NodeID, Name: m.ident.Name, Number: m.ident.Number, Role: m.ident.Role, Cluster: m.ident.Cluster.ID,
		Addr: m.ident.Addr, Port: m.ident.GossipPort, ControlPort: m.ident.ControlPort, DataDir: m.cfg.DataDir, Log: m.log,
		Present: present, Keys: m.gossipKeys(), Signer: m.creds.Signer(),
	})
	if err != nil {
		return err
	}
	m.mu.Lock()
	m.g = g // the Manager and the Forwarder may run already, and look
	m.mu.Unlock()
	m.wg.Go(func() { m.due(meetWait, &m.waited, g.Recall) })
	m.wg.Go(func() { m.due(namesWait, &m.namesDue, func() {}) })
	m.dns = dns.NewServer(dns.Config{Upstreams: m.cfg.Upstreams, Dial: m.cfg.Dial, Stale: m.cfg.DNSStale, Log: m.log})
	m.tasks = &tasks{rt: m.cfg.Runtime, dns: m.dns, instance: m.cfg.Instance, hostAddr: m.ident.Addr, search: m.cfg.SearchDomains,
		log: m.log, plumbing: m, runners: map[string]*runner{}}
	m.tasks.begin(m.ctx)
	m.overlay = reconcile.New("overlay", overlay.NewTarget(m.cfg.Overlay), reconcile.Options{Log: m.log, OnPass: m.overlayPass})
	m.vip = reconcile.New("vip", vip.Target{Dataplane: m.cfg.VIP}, reconcile.Options{Log: m.log, OnPass: m.vipPass})
	m.ingress = reconcile.New("ingress", ingress.Target{Dataplane: m.cfg.Ingress}, reconcile.Options{Log: m.log, OnPass: m.ingressPass})
	m.overlay.OnObserve(func(s overlay.State) { m.seen.overlay.Store(&s) })
	m.vip.OnObserve(func(s vip.State) { m.seen.vip.Store(&s) })
	m.ingress.OnObserve(func(s ingress.State) { m.seen.ingress.Store(&s) })

	m.wg.Go(func() {
		if err := g.Run(m.ctx); err != nil && m.ctx.Err() == nil {
			m.log.Error("gossip ended", "error", err)
		}
	})
	m.trustGossip()
	m.joinKnown()
	m.wg.Go(func() { m.overlay.Run(m.ctx) })
	m.wg.Go(func() { m.vip.Run(m.ctx) })
	if m.cfg.Ingress != nil {
		m.wg.Go(func() { m.ingress.Run(m.ctx) })
	}
	if m.cfg.WatchKernel != nil {
		m.wg.Go(func() {
			m.cfg.WatchKernel(m.ctx, func(changes []overlay.Change) {
				if time.Since(time.Unix(0, m.changedAt.Load())) < ownChanges {
					sleep.For(m.ctx, lookAgain) // what changes meanwhile is told of next
				}
				for _, wake := range m.concerned(changes) {
					wake()
				}
			})
		})
	}
	m.answer() // silence begins now
	m.began = m.answered
	m.wg.Go(m.runtimeLoop)
	m.wg.Go(m.composeLoop)
	m.wg.Go(m.assignLoop)
	m.wg.Go(m.saveLoop)
	m.wg.Go(m.followLoop)
	m.wg.Go(m.reportLoop)
	m.wg.Go(m.certLoop)
	m.wg.Go(m.keepFiles)
	m.wg.Go(m.imagesLoop)
	m.wg.Go(m.pathLoop)
	m.wg.Go(m.claimLoop)
	m.wg.Go(m.keepGiven)
	return nil
}

// concerned are the Wakes of the loops that read what changed. All read what
// rtnetlink tells of the host's namespace and of networks', the overlay alone that of
// tasks'; of the nftables tables each its own, and the overlay those of strangers.
func (m *member) concerned(changes []overlay.Change) (wakes []func()) {
	var wires, balancers, ports bool
	for _, c := range changes {
		switch {
		case c.Table == vip.Table:
			balancers = true
		case c.Table == ingress.NetnsTable || c.Table == ingress.TableName(m.cfg.Instance):
			ports = true
		case c.Table != "" || strings.HasPrefix(c.Netns, m.cfg.Instance+spec.TaskNetnsInfix):
			wires = true
		default:
			wires, balancers, ports = true, true, true
		}
	}
	if wires {
		wakes = append(wakes, m.overlay.Wake)
	}
	if balancers {
		wakes = append(wakes, m.vip.Wake)
	}
	if ports {
		wakes = append(wakes, m.ingress.Wake)
	}
	return wakes
}

// due calls before and sets flag after d, and has a View composed that heeds it.
func (m *member) due(d time.Duration, flag *atomic.Bool, before func()) {
	if sleep.For(m.ctx, d) {
		before()
		flag.Store(true)
		wake(m.composeWake)
	}
}

// stop ends every goroutine of the member, and leaves tasks and kernel state.
func (m *member) stop() {
	m.cancel()
	m.listener.Close()
	m.peer.Close()
	m.wg.Wait()
	m.peer.Close() // what was dialed meanwhile
	if m.tasks != nil {
		m.tasks.wait()
		m.dns.Close()
	}
}

// managerAddrs are the control addresses of managers, most likely to live first.
func (m *member) managerAddrs() []string {
	var out []string
	add := func(a string) {
		if !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.g != nil {
		for _, p := range m.g.Snapshot().Members {
			if p.Role == spec.RoleManager && p.Liveness == spec.PeerAlive && p.Peer.ID != m.ident.NodeID {
				add(netip.AddrPortFrom(p.Addr, uint16(p.ControlPort)).String())
			}
		}
	}
	if m.assigned != nil {
		for _, n := range m.assigned.Nodes {
			if n.Role == spec.RoleManager && n.ID != m.ident.NodeID {
				add(netip.AddrPortFrom(n.Addr, uint16(n.ControlPort)).String())
			}
		}
	}
	for _, a := range m.ident.Managers {
		add(a)
	}
	return out
}

// liveness is this node's opinion of the others, for the manager on it.
func (m *member) liveness() map[string]spec.Liveness {
	out := map[string]spec.Liveness{}
	m.mu.Lock()
	g := m.g
	m.mu.Unlock()
	if g == nil {
		return out
	}
	for _, p := range g.Snapshot().Members {
		out[p.Peer.ID] = p.Liveness
	}
	return out
}

// blobs implements plumbing.
func (m *member) blobs(ctx context.Context, ids []string) ([][]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	resp, err := m.client.TaskBlobs(ctx, connect.NewRequest(&shoalv1.TaskBlobsRequest{Node: m.ident.NodeID, Ids: ids}))
	switch connect.CodeOf(err) {
	case connect.CodeNotFound, connect.CodePermissionDenied:
		if err != nil {
			return nil, fmt.Errorf("secrets and configs: %w: %w", errNotGiven, err)
		}
	}
	if err != nil {
		return nil, err
	}
	if len(resp.Msg.Blobs) != len(ids) {
		return nil, fmt.Errorf("%d secrets and configs came of %d", len(resp.Msg.Blobs), len(ids))
	}
	var out [][]byte
	for i, b := range resp.Msg.Blobs {
		if b.GetId() != ids[i] {
			return nil, fmt.Errorf("secret or config %s came in the place of %s", b.GetId(), ids[i])
		}
		out = append(out, b.GetData())
	}
	return out, nil
}

// templateContext implements plumbing.
func (m *member) templateContext(t spec.Task) (spec.TemplateContext, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.assigned != nil {
		for _, s := range m.assigned.Services {
			if s.ID == t.Service {
				return spec.NewTemplateContext(s, spec.Node{ID: m.ident.NodeID, Name: m.ident.Name}, t), nil
			}
		}
	}
	return spec.TemplateContext{}, fmt.Errorf("the templates of task %s can't be filled in: its service is not known here", t.Name)
}

// ---- composing ----

func (m *member) composeLoop() {
	for {
		select {
		case <-m.ctx.Done():
			return
		case <-m.composeWake:
		case <-m.g.Changed():
		}
		m.compose()
	}
}

func (m *member) compose() {
	var ticket uint64
	m.progress.update(func(p *progress) { ticket = p.requested })
	sandboxes, adopted := m.tasks.sandboxes()
	if adopted && !m.said.Load() {
		// The last task was adopted a moment ago, and whoever did it has not published
		// it yet: a View that is complete must not lack this node's own endpoints. Their
		// names would be said not to exist, and what is connected to them cut.
		m.publishMu.Lock()
		m.say()
		m.publishMu.Unlock()
	}
	m.mu.Lock()
	assigned := m.assigned
	m.mu.Unlock()
	snap := m.g.Snapshot()
	m.claims.begin()
	v := compose(inputs{
		self: m.ident.NodeID, instance: m.cfg.Instance, assigned: assigned, gossip: snap, sandboxes: sandboxes, adopted: adopted,
		underlay: spec.Underlay{Addr: m.ident.Addr, VXLANPort: m.ident.Cluster.DataPathPort}, first: !m.waited.Load(),
		refused: m.claims.refused, managers: &m.made.managers,
	})
	m.claims.end(v)
	if v.Complete {
		m.waited.Store(true) // who joins later is waited for by nobody
	}
	m.paths.follow(v)
	m.paths.darken(v)
	var nodes []spec.Node
	if assigned != nil {
		nodes = assigned.Nodes
	}
	was := m.view.Load()
	differs := func(v, was *spec.View) spec.Change {
		if !assigned.follows(m.made.of) {
			return spec.ChangedAll
		}
		return v.Changes(was)
	}
	// What is made of a View is kept while what it is made of does: most Views bring
	// something that is only for some.
	changed := differs(v, m.made.view)
	var wires *overlay.State
	if changed.In(overlay.Reads) {
		s := overlay.Desired(v)
		wires = &s
	}
	// Set under the progress lock, so that no pass is noted before the
	// generation it belongs to.
	m.progress.update(func(p *progress) {
		var gens generations
		if wires != nil {
			gens.overlay = m.overlay.Set(*wires)
		} else {
			gens.overlay = m.overlay.Keep()
		}
		p.routesWanted(gens.overlay, v, changed)
		shown := v
		if p.held = p.routed == nil; !p.held {
			var n int
			shown, n = hold(v, p.routed)
			p.held = n > 0
		}
		m.view.Store(shown)
		// Questions wait in their sockets for the first complete View: of names that
		// are not known yet an agent that starts would say that they don't exist.
		if v.Complete || m.namesDue.Load() {
			m.dns.SetZone(m.dns.Zone().Update(shown, dns.ZoneOptions{Nodes: nodes}))
		}
		if p.routed == nil {
			return
		}
		if differs(shown, m.made.balanced).In(vip.Reads) {
			gens.vip = m.vip.Set(vip.Desired(shown))
		} else {
			gens.vip = m.vip.Keep()
		}
		m.made.balanced = shown
		if m.cfg.Ingress != nil {
			gens.ingress = m.ingress.Set(ingress.Desired(shown))
		}
		if p.held {
			// Not all of the View is wanted yet: who waits for it waits for the
			// next, which the overlay's pass brings.
			return
		}
		p.composed, p.want = ticket, gens
		p.pending = append(p.pending, appliedRev{snap.Rev, gens})
	})
	if is := m.view.Load(); differs(is, was).In(spec.ChangedSelf | spec.ChangedServices) {
		if gone := vipsGone(was, is); len(gone) > 0 {
			m.wg.Go(func() { m.hangUp(gone) })
		}
	}
	m.made.of, m.made.view = assigned, v
}

// made is of what the loops' wants were made last. It is the composing goroutine's.
type made struct {
	of             *assignment
	managers       managers
	view, balanced *spec.View // nil: of none
}

// vipsGone are the virtual IPs, by network, that were and are no more.
func vipsGone(was, is *spec.View) map[string][]netip.Addr {
	if was == nil || !is.Complete {
		return nil
	}
	// Each View is looked at, and few have lost any: another service is asked for only
	// of what its own does not have.
	has := func(s spec.Service, network string, a netip.Addr) bool {
		return slices.ContainsFunc(s.VIPs, func(v spec.VIPs) bool { return v.Network == network && slices.Contains(v.Addrs, a) })
	}
	out := map[string][]netip.Addr{}
	for _, s := range was.Services {
		i, there := slices.BinarySearchFunc(is.Services, s.ID, func(s spec.Service, id string) int { return strings.Compare(s.ID, id) })
		for _, v := range s.VIPs {
			for _, a := range v.Addrs {
				if there && has(is.Services[i], v.Network, a) || slices.ContainsFunc(is.Services, func(s spec.Service) bool { return has(s, v.Network, a) }) {
					continue
				}
				out[v.Network] = append(out[v.Network], a)
			}
		}
	}
	return out
}

// hangUp resets the connections of this node's tasks to virtual IPs that are no more, once
// the kernel has forgotten them: what is sent on them would be answered by nobody.
func (m *member) hangUp(gone map[string][]netip.Addr) {
	ctx, cancel := context.WithTimeout(m.ctx, drainTimeout)
	defer cancel()
	_ = m.applied(ctx)
	sandboxes, _ := m.tasks.sandboxes()
	for _, sb := range sandboxes {
		var addrs []netip.Addr
		for _, a := range sb.Attachments {
			addrs = append(addrs, gone[a.Network]...)
		}
		if len(addrs) == 0 || sb.Netns == "" || m.ctx.Err() != nil {
			continue
		}
		if err := m.cfg.Runtime.Reset(m.ctx, sb.Task, addrs); err != nil && !errors.Is(err, runtime.ErrNotFound) {
			m.log.Debug("connections to a virtual IP that is gone are not reset", "task", sb.Name, "error", err)
		}
	}
}

// A change in the kernel so soon after the loops changed something is probably their
// own. They look what became of it, but not in the midst of more such work: what
// strangers did is promised to be mended within 2 s.
const (
	ownChanges = 100 * time.Millisecond
	lookAgain  = 300 * time.Millisecond
)

func (m *member) overlayPass(p reconcile.Pass) {
	if m.progress.routesMade(p.Gen) {
		wake(m.composeWake)
	}
	m.passed("overlay", p, func(g *generations) { g.overlay = p.Gen })
}

func (m *member) vipPass(p reconcile.Pass) {
	m.passed("vip", p, func(g *generations) { g.vip = p.Gen })
}

func (m *member) ingressPass(p reconcile.Pass) {
	m.passed("ingress", p, func(g *generations) { g.ingress = p.Gen })
}

// passed notes a pass of a loop. One that failed for some object counts: whoever waits
// for a drain is told of what could be done, and must not wait for a fault
// elsewhere.
func (m *member) passed(loop string, p reconcile.Pass, fn func(*generations)) {
	m.metrics.passed(loop, p)
	if p.Ops > 0 {
		m.changedAt.Store(time.Now().UnixNano())
	}
	if rev := m.progress.passed(fn); rev != 0 {
		m.g.Applied(rev)
	}
}

func wake(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// publish implements plumbing.
func (m *member) publish() {
	m.publishMu.Lock()
	m.say()
	m.publishMu.Unlock()
	wake(m.composeWake)
	wake(m.reportWake)
}

// say tells gossip what runs here, once all of it is known. publishMu is held.
func (m *member) say() {
	if m.tasks.whole() {
		m.g.SetEndpoints(m.tasks.endpoints())
		m.said.Store(true)
	}
}

// applied waits until this node's kernel follows a View made after the call.
func (m *member) applied(ctx context.Context) error {
	t := m.progress.ticket()
	wake(m.composeWake)
	var want generations
	if err := m.progress.await(ctx, func(p *progress) bool { want = p.want; return p.composed >= t }); err != nil {
		return err
	}
	return m.progress.await(ctx, func(p *progress) bool { return p.have.reached(want) })
}

// network implements plumbing.
func (m *member) network(id string) (spec.Network, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.assigned.network(id)
}

// aloneAfter is the silence of the managers after which a node replaces what ends itself:
// longer than they take to elect another leader.
const aloneAfter = 5 * time.Second

// alone implements plumbing. A report whose answer was lost may have told a manager all
// the same: what that one decided ends the task when it is heard of.
func (m *member) alone(t spec.Task, end spec.TaskStatus) (delay time.Duration, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if t.Service == "" || m.assigned == nil || time.Since(m.answered) < aloneAfter || m.acked[t.ID].State.Ended() {
		return 0, false
	}
	i := slices.IndexFunc(m.assigned.Services, func(s spec.Service) bool { return s.ID == t.Service })
	if i < 0 {
		return 0, false
	}
	sp := m.assigned.Services[i].Spec
	return sp.RestartWait(t.Attempt + 1), sp.Restarts(end.State) && (sp.RestartMax == 0 || t.Attempt < sp.RestartMax)
}

// answer notes that a manager has.
func (m *member) answer() {
	m.mu.Lock()
	m.answered = time.Now()
	m.mu.Unlock()
}

// served implements plumbing, as far as is known here.
func (m *member) served(t spec.Task) bool {
	return slices.ContainsFunc(m.g.Snapshot().Endpoints, func(e spec.Endpoint) bool {
		return e.Service == t.Service && e.Task != t.ID && e.State == spec.EndpointActive
	})
}

// settled implements plumbing.
func (m *member) settled(ctx context.Context) error {
	local := make(chan error, 1)
	go func() { local <- m.applied(ctx) }()
	missing, err := m.g.Barrier(ctx)
	if lerr := <-local; lerr != nil {
		return fmt.Errorf("this node: %w", lerr)
	}
	if err != nil && len(missing) > 0 {
		return fmt.Errorf("%w: nodes %s", err, strings.Join(missing, ", "))
	}
	return err
}

// wired implements plumbing: it waits for a pass of the overlay loop after
// which nothing of the task or its networks is failed.
func (m *member) wired(ctx context.Context, t spec.Task) error {
	prefixes := []string{"task " + t.Name + ": ", "node: ", "overlay: "}
	for _, a := range t.Attachments {
		if n, ok := m.network(a.Network); ok {
			prefixes = append(prefixes, "network "+n.Name+": ")
		}
	}
	err := untilWired(ctx, wireTimeout, m.applied, func() error {
		for _, o := range m.overlay.Failed() {
			if slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(o.Object, p) }) {
				return fmt.Errorf("%s: %s", o.Op, o.Err)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("network of task %s is not ready: %w", t.Name, err)
	}
	return nil
}

// untilWired waits until the kernel follows what is wanted and nothing of it fails. What
// has failed for the time of a patience is given up; what is only slow, on a machine that
// has much else to do, is waited for until ctx ends: to make the task anew elsewhere
// would be more such work.
func untilWired(ctx context.Context, patience time.Duration, applied func(context.Context) error, failed func() error) error {
	begun := time.Now()
	failing := begun
	for {
		actx, cancel := context.WithTimeout(ctx, patience)
		err := applied(actx)
		cancel()
		why, now := failed(), time.Now()
		if why == nil {
			failing = now
		}
		switch {
		case err == nil && why == nil:
			return nil
		case ctx.Err() != nil || now.Sub(failing) >= patience: // failing is now, if nothing fails
			if why == nil {
				why = errors.New("the node is behind with its work")
			}
			return fmt.Errorf("after %s: %w", now.Sub(begun).Round(time.Second), why)
		}
		sleep.For(ctx, 50*time.Millisecond)
	}
}

// ---- tasks ----

// runtimeLoop adopts what an earlier agent left, and then passes on what ends.
func (m *member) runtimeLoop() {
	events := m.cfg.Runtime.Events(m.ctx)
	for m.ctx.Err() == nil {
		var known []spec.Task
		m.mu.Lock()
		if m.assigned != nil {
			known = m.assigned.Tasks
		}
		m.mu.Unlock()
		if err := m.tasks.adopt(m.ctx, known); err == nil {
			break
		} else if m.ctx.Err() == nil {
			m.log.Error("running tasks can't be listed; trying again", "error", err)
			sleep.For(m.ctx, time.Second)
		}
	}
	m.mu.Lock()
	assigned, fresh := m.assigned, m.fresh
	m.mu.Unlock()
	if assigned != nil {
		m.tasks.assign(m.ident.NodeID, assigned.Tasks, fresh)
	}
	m.publish()
	for {
		select {
		case <-m.ctx.Done():
			return
		case e, ok := <-events:
			if !ok {
				return
			}
			m.tasks.event(e.ID)
		}
	}
}

func (m *member) assignLoop() {
	for m.ctx.Err() == nil {
		err := m.followAssignments()
		if m.ctx.Err() != nil {
			return
		}
		m.log.Debug("assignment stream ended", "error", err)
		if removed(err) {
			m.evicted(err.Error())
		}
		sleep.For(m.ctx, 200*time.Millisecond)
	}
}

func (m *member) followAssignments() error {
	ctx, cancel := context.WithCancel(m.ctx)
	defer cancel()
	// The stream is silent only when its connection, or its leader, is gone.
	silent := time.AfterFunc(3*streamSilence, cancel) // the forwarder may first look for a leader
	defer silent.Stop()
	stream, err := m.client.Assignments(ctx, connect.NewRequest(&shoalv1.AssignmentsRequest{Node: m.ident.NodeID, Deltas: true}))
	if err != nil {
		return err
	}
	defer stream.Close()
	first := true
	var a *assignment // as this stream told it
	for stream.Receive() {
		silent.Reset(streamSilence)
		m.answer()
		msg := stream.Msg()
		if first {
			// Another leader may not have what the last one was told.
			m.mu.Lock()
			m.acked = map[string]spec.TaskStatus{}
			m.mu.Unlock()
			wake(m.reportWake)
			first = false
		}
		if msg.Unchanged {
			continue
		}
		if a, err = toAssignment(msg, a); err != nil {
			return err
		}
		m.assign(a)
	}
	return stream.Err()
}

// toAssignment is what a message says: all of an assignment, or what changed since the
// one that the message before it said. Lists that did not change are that one's own.
func toAssignment(msg *shoalv1.AssignmentsResponse, before *assignment) (*assignment, error) {
	if msg.Since != 0 && (before == nil || before.Index != msg.Since) {
		return nil, fmt.Errorf("the managers tell what changed since index %d, which they did not tell of", msg.Since)
	}
	a := &assignment{Index: msg.Index, Level: int(msg.Level)}
	for _, t := range msg.Tasks {
		v, err := api.ToTask(t)
		if err != nil {
			return nil, err
		}
		a.Tasks = append(a.Tasks, v)
	}
	for _, n := range msg.Networks {
		v, err := api.ToNetwork(n)
		if err != nil {
			return nil, err
		}
		a.Networks = append(a.Networks, v)
	}
	for _, s := range msg.Services {
		v, err := api.ToService(s)
		if err != nil {
			return nil, err
		}
		a.Services = append(a.Services, v)
	}
	for _, n := range msg.Nodes {
		v, err := api.ToNode(n)
		if err != nil {
			return nil, err
		}
		a.Nodes = append(a.Nodes, v)
	}
	a.Trust = toTrust(msg.Trust)
	if a.told = &a.Index; msg.Since != 0 {
		a.told = before.told
		gone := make(map[string]bool, len(msg.Gone))
		for _, id := range msg.Gone {
			gone[id] = true
		}
		a.Tasks = state.Merge(before.Tasks, a.Tasks, gone, func(t spec.Task) string { return t.ID })
		a.Services = state.Merge(before.Services, a.Services, gone, func(s spec.Service) string { return s.ID })
		a.Nodes = state.Merge(before.Nodes, a.Nodes, gone, func(n spec.Node) string { return n.ID })
	}
	return a, nil
}

// followLoop tells the managers which assignment the kernel follows: whoever
// changed a service waits for it.
func (m *member) followLoop() {
	for {
		select {
		case <-m.ctx.Done():
			return
		case <-m.assignWake:
		}
		m.mu.Lock()
		index := m.assigned.Index
		m.mu.Unlock()
		if m.applied(m.ctx) != nil {
			return
		}
		m.mu.Lock()
		m.follows = index
		m.mu.Unlock()
		wake(m.reportWake)
	}
}

// assign takes a fresh assignment.
func (m *member) assign(a *assignment) {
	m.mu.Lock()
	if a.Trust == nil && m.assigned != nil {
		a.Trust = m.assigned.Trust
	}
	m.assigned, m.fresh = a, true
	m.mu.Unlock()
	m.takeNodes(a)
	wake(m.saveWake)
	m.trustGossip()
	m.joinKnown()
	for _, n := range a.Nodes {
		if n.ID == m.ident.NodeID {
			m.follow(n)
		}
	}
	if m.tasks.hasAdopted() {
		m.tasks.assign(m.ident.NodeID, a.Tasks, true)
	}
	wake(m.composeWake)
	wake(m.assignWake)
}

// follow takes up what the managers decided of this node itself: its name, and its
// number, which a node.json from elsewhere may have wrong. The role is setRole's.
func (m *member) follow(n spec.Node) {
	m.mu.Lock()
	was := *m.ident
	if m.ident.Name = n.Name; n.Number != 0 {
		m.ident.Number = n.Number
	}
	now := *m.ident
	m.mu.Unlock()
	if now.Name == was.Name && now.Number == was.Number {
		return
	}
	m.log.Info("the managers changed this node", "name", now.Name, "number", now.Number)
	m.saveIdentity()
	m.g.SetMeta(now.Name, now.Number, now.Role)
}

// joinKnown gives gossip the addresses of the cluster's nodes.
func (m *member) joinKnown() {
	save := false
	defer func() {
		if save {
			m.saveIdentity()
		}
	}()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.assigned == nil {
		return
	}
	var addrs []netip.AddrPort
	var managers []string
	for _, n := range m.assigned.Nodes {
		if n.ID == m.ident.NodeID {
			continue
		}
		addrs = append(addrs, netip.AddrPortFrom(n.Addr, uint16(n.GossipPort)))
		if n.Role == spec.RoleManager {
			managers = append(managers, netip.AddrPortFrom(n.Addr, uint16(n.ControlPort)).String())
		}
	}
	m.g.Join(addrs)
	if len(managers) > 0 && !slices.Equal(managers, m.ident.Managers) {
		m.ident.Managers = managers
		save = true
	}
}

// ---- reports ----

func (m *member) reportLoop() {
	ticker := time.NewTicker(reportInterval)
	defer ticker.Stop()
	for {
		select {
		case <-m.ctx.Done():
			return
		case <-m.reportWake:
		case <-ticker.C:
		}
		if err := m.report(); err != nil && m.ctx.Err() == nil {
			m.log.Debug("report failed", "error", err)
			if removed(err) {
				m.evicted(err.Error())
			}
			sleep.For(m.ctx, 100*time.Millisecond)
			wake(m.reportWake)
		}
	}
}

func (m *member) report() error {
	req := &shoalv1.ReportRequest{Node: m.ident.NodeID, Tasks: map[string]*shoalv1.TaskStatus{}, Addr: m.ident.Addr.String(),
		ControlPort: int32(m.ident.ControlPort), GossipPort: int32(m.ident.GossipPort), DataPath: m.cfg.VIP.Name(), Platform: platform,
		Level: state.Level, Build: m.cfg.Version, NanoCpus: int64(goruntime.NumCPU()) * 1e9, Memory: int64(min(nodeMemory(), math.MaxInt64)), EngineLabels: m.cfg.Labels}
	req.Containers, req.ContainersWhy = m.images.state()
	req.TasksKnown = m.tasks.told() // before: what it says is in what follows
	sent := m.tasks.statuses()
	failed := slices.Concat(m.vip.Failed(), m.ingress.Failed())
	m.mu.Lock()
	req.Applied, req.ManagerReady = m.follows, m.manager != nil
	req.Halting = m.halting
	// Who sends requests to a node that is ready finds its published ports there.
	req.Wiring = m.follows == 0 && time.Since(m.began) < wireWait
	if info, ok := m.creds.Info(); ok {
		req.CertificateRoot = info.Root
	}
	if ids := m.g.KeyIDs(); len(ids) > 0 {
		req.GossipKeyUsed, req.GossipKey = uint64(ids[0]), uint64(slices.Max(ids))
	}
	req.Faults = faultsOf(m.assigned, failed)
	for id := range m.acked {
		if _, ok := sent[id]; !ok {
			delete(m.acked, id)
		}
	}
	if m.assigned == nil || m.assigned.Level < 4 { // what is not told before
		for id, st := range sent {
			if st.Health = ""; m.assigned == nil || m.assigned.Level < 2 {
				st.Listened = false
			}
			sent[id] = st
		}
	}
	maps.DeleteFunc(sent, func(id string, st spec.TaskStatus) bool { return m.acked[id] == st || st.At == 0 })
	m.mu.Unlock()
	for id, st := range sent {
		req.Tasks[id] = api.TaskStatus(st)
	}
	for _, p := range m.g.Snapshot().Members {
		if p.Liveness == spec.PeerDead {
			req.DeadPeers = append(req.DeadPeers, p.Peer.ID)
		}
	}
	dark, _ := m.paths.dark()
	for _, d := range dark {
		req.DarkPeers = append(req.DarkPeers, d.id)
	}
	ctx, cancel := context.WithTimeout(m.ctx, reportTimeout)
	defer cancel()
	if _, err := m.client.Report(ctx, connect.NewRequest(req)); err != nil {
		return err
	}
	m.answer()
	m.mu.Lock()
	defer m.mu.Unlock()
	maps.Copy(m.acked, sent)
	return nil
}

// listenError explains a port that can't be listened on.
func listenError(what, proto string, addr netip.AddrPort, flag string, err error) error {
	owner := ""
	if o := portOwner(proto, addr.Port()); o != "" {
		owner = " by " + o
	}
	if errors.Is(err, errAddrInUse) {
		return fmt.Errorf("%s port %s/%s is taken%s: stop that program, or %s PORT", what, strconv.Itoa(int(addr.Port())), proto, owner, how(flag))
	}
	if errors.Is(err, errAddrNotAvail) {
		return fmt.Errorf("address %s is not one of this machine's: give one of its own with --advertise-addr", addr.Addr())
	}
	return fmt.Errorf("listen on %s %s: %w", proto, addr, err)
}

// clusterOf is the Cluster of an answer.
func clusterOf(c *shoalv1.Cluster) (state.Cluster, error) {
	if c.GetId() == "" {
		return state.Cluster{}, errors.New("the manager's answer names no cluster")
	}
	out := state.Cluster{ID: c.Id, SubnetSize: int(c.SubnetSize), DataPathPort: int(c.DataPathPort)}
	for _, p := range c.AddressPools {
		pfx, err := netip.ParsePrefix(p)
		if err != nil {
			return out, fmt.Errorf("address pool in the manager's answer: %w", err)
		}
		out.Pools = append(out.Pools, pfx)
	}
	return out, nil
}

// how says where a flag is given: the VXLAN port is the whole cluster's, and
// fixed when that is made.
func how(flag string) string {
	if flag == dataPathPortFlag {
		return "make the cluster with 'shoal init' " + flag
	}
	return "start the agent with " + flag
}

const dataPathPortFlag = "--data-path-port"
