package gossip

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/shoalnet/shoal/internal/sleep"
	"github.com/shoalnet/shoal/spec"
)

// Member is a node as this node's gossip knows it.
type Member struct {
	spec.Peer
	Role string
	// Epoch and Seq are of the newest record held; 0 before the first.
	Epoch, Seq uint64
}

// Snapshot is what a node knows at one moment. It is never changed once made;
// what it refers to must not be either.
type Snapshot struct {
	// Rev goes up with each change.
	Rev uint64
	// Members by ID, this node included. A node that left is not among them, a
	// dead one is, until it is forgotten.
	Members []Member
	// Endpoints of members that are not dead, by Key, then Node.
	Endpoints []spec.Endpoint
	// Away are those of members whose machine is there and whose agent has been gone for
	// longer than it may be (spec.Peer.Away), in the same order.
	Away []spec.Endpoint
	// Synced: what is missing here does not exist, as far as any peer that can
	// be reached knows.
	Synced bool
}

// ErrLeft is returned by what needs a member after Leave.
var ErrLeft = errors.New("gossip: this node has left the cluster")

// Gossip is one node's part in the gossip. Make it with Open, start it with
// Run. All methods may be called concurrently, before and during Run.
type Gossip struct {
	cfg    Config
	tune   Tuning
	log    *slog.Logger
	folder string   // of what has to outlive the process
	socks  *sockets // nil with Config.Transport
	addr   netip.AddrPort
	maxUDP int // largest message that fits a packet beside the framing

	changed chan struct{}
	rejoin  chan struct{} // wakes the rejoin loop
	metas   chan struct{} // wakes the loop that advertises metadata
	ids     atomic.Uint64 // of requests; begins at random
	stats   counters

	life struct {
		sync.Mutex
		ctx context.Context // of Run; nil before and after
		wg  sync.WaitGroup
		ran bool
	}
	ml    atomic.Pointer[memberlist.Memberlist]
	tr    atomic.Pointer[tracked]
	nodes atomic.Int64 // living members and this node, for the queues
	own   memberlist.TransmitLimitedQueue
	relay memberlist.TransmitLimitedQueue

	reliable chan struct{} // tokens for TCP sends
	serving  chan struct{} // tokens for fetches served
	fetching chan struct{} // tokens for fetches made
	waiting  atomic.Int64  // TCP sends waiting or under way

	revNow atomic.Uint64 // = rev
	snap   atomic.Pointer[Snapshot]

	dir    atomic.Pointer[directory] // nil: the managers have said nothing yet
	key    atomic.Pointer[crypto.Signer]
	sealer *sealer
	wall   *wall

	// publishMu orders the deltas of this node as they are sent.
	publishMu sync.Mutex
	saveMu    sync.Mutex // one writer of the folder at a time, and what it wrote last:
	keptRev   uint64
	keptSum   uint64 // digestSum of the records in the file; 0: of none

	mu      sync.Mutex
	meta    meta
	metaRaw []byte // meta, signed
	name    string
	number  int
	role    string
	rev     uint64
	applied uint64 // newest revision the consumer reported
	synced  bool
	syncing int  // first exchanges under way
	left    bool // Leave was called
	recs    map[string]*record
	members map[string]*member // without this node
	banned  map[string]ban
	peers   map[netip.AddrPort]*peer
	digests map[uint64]time.Time // exchanges begun, by ID, with their end
	fetches map[uint64]*fetch
	waiters map[waiterKey]*waiter
	acks    map[uint64]*barrier
	dirty   bool // peers differ from the file
	// remembered: from the file, and not recalled yet
	remembered map[string]keptRecord
	// epochDue: the epoch differs from the file
	epochDue bool

	diskErr atomic.Pointer[error] // see DiskErr
}

// ban hides a node that was forgotten although it still talks.
type ban struct {
	epoch uint64 // up to this
	at    time.Time
}

// Open binds the sockets and takes up a new boot epoch. The error of a taken
// port says so. Whoever opens must Run or Close.
func Open(cfg Config) (*Gossip, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	g := &Gossip{
		cfg: cfg, tune: cfg.Tuning.withDefaults(), log: cfg.Log.With("component", "gossip"),
		folder:  filepath.Join(cfg.DataDir, "gossip"),
		changed: make(chan struct{}, 1), rejoin: make(chan struct{}, 1), metas: make(chan struct{}, 1),
		reliable: make(chan struct{}, reliableParallel), serving: make(chan struct{}, serveMax), fetching: make(chan struct{}, fetchMax),
		name: cfg.Name, number: cfg.Number, role: cfg.Role,
		rev:     1,
		recs:    map[string]*record{},
		members: map[string]*member{},
		banned:  map[string]ban{},
		peers:   map[netip.AddrPort]*peer{},
		digests: map[uint64]time.Time{},
		fetches: map[uint64]*fetch{},
		waiters: map[waiterKey]*waiter{},
		acks:    map[uint64]*barrier{},
	}
	seal, err := newSealer(cfg.Cluster, cfg.Keys)
	if err != nil {
		return nil, err
	}
	g.sealer, g.wall = seal, newWall(g)
	g.key.Store(&cfg.Signer)
	g.revNow.Store(g.rev)
	g.ids.Store(rand.Uint64())
	g.nodes.Store(1)
	g.own = memberlist.TransmitLimitedQueue{NumNodes: g.numNodes, RetransmitMult: 3}
	// In a small cluster every node has had the delta directly, and relaying
	// only covers for lost packets.
	g.relay = memberlist.TransmitLimitedQueue{NumNodes: g.numNodes, RetransmitMult: 2}
	// memberlist frames a packet's content with a checksum (5 bytes) and a
	// compound header (2, and 3 for each message); see its net.go.
	g.maxUDP = g.tune.UDPSize - sealOverhead - 5 - 2 - 3

	if cfg.Transport == nil {
		socks, err := bind(cfg.Addr, cfg.Port)
		if err != nil {
			return nil, err
		}
		g.socks, g.addr = socks, socks.addr
	} else {
		ip, port, err := cfg.Transport.FinalAdvertiseAddr(cfg.Addr.String(), cfg.Port)
		if err != nil {
			return nil, fmt.Errorf("gossip: transport: %w", err)
		}
		addr, _ := netip.AddrFromSlice(ip)
		g.addr = netip.AddrPortFrom(addr.Unmap(), uint16(port))
	}
	// A disk that takes nothing is no reason not to take part: with an epoch that a
	// former process had, the first peer that knows its record makes us move on.
	epoch, err := nextEpoch(g.folder, 0, g.log)
	if g.epochDue = err != nil; g.epochDue {
		g.noteDisk(err)
	}
	self := newRecord(cfg.NodeID)
	self.epoch = epoch
	g.recs[cfg.NodeID] = self
	// Past what a former process signed at this epoch, if the disk has lost that there
	// was one: a clock that has gone back as well is outgrowMeta's.
	g.meta.epoch, g.meta.seq = epoch, uint64(max(0, time.Now().UnixMilli()))
	if err := g.resignMeta(); err != nil {
		g.Close()
		return nil, err
	}
	peers, err := loadPeers(g.folder)
	if err != nil {
		g.log.Warn("peer list can't be read; waiting to be told of peers", "error", err)
	}
	for _, p := range peers {
		g.addPeer(p.Addr, p.Node)
	}
	g.dirty = false
	if g.remembered, err = loadRecords(g.folder); err != nil {
		g.log.Warn("what other nodes said last can't be read; waiting to hear of them", "error", err)
	}
	return g, nil
}

// Close frees the sockets of a Gossip that was never run.
func (g *Gossip) Close() {
	g.life.Lock()
	ran := g.life.ran
	g.life.ran = true
	g.life.Unlock()
	if !ran && g.socks != nil {
		g.socks.Shutdown()
	}
}

// Addr is where this node listens and what it advertises.
func (g *Gossip) Addr() netip.AddrPort { return g.addr }

func (g *Gossip) numNodes() int { return int(g.nodes.Load()) }

func (g *Gossip) newID() uint64 { return g.ids.Add(1) }

func (g *Gossip) header(t msgType) header {
	return header{typ: t, from: g.cfg.NodeID, addr: g.addr}
}

// Run takes part in the gossip until ctx ends; it can be called once. When it
// returns, the sockets are closed and every goroutine of this package has
// ended; memberlist's own, which it gives no means to wait for, end within a
// probe interval and do nothing more. A node that is to leave for good calls
// Leave first; without, the others see it fail.
func (g *Gossip) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g.life.Lock()
	if g.life.ran {
		g.life.Unlock()
		return errors.New("gossip: run twice, or after Close")
	}
	g.life.ran, g.life.ctx = true, ctx
	g.life.Unlock()

	var inner memberlist.Transport = g.cfg.Transport
	if g.socks != nil {
		g.socks.start()
		inner = g.socks
	}
	tr := track(inner, g.wall)
	g.tr.Store(tr)
	logger, sink := newLogger(g.log)
	conf := g.memberlistConfig(tr)
	conf.Logger = logger
	ml, err := memberlist.Create(conf)
	if err == nil {
		g.ml.Store(ml)
		g.spawn(g.rejoinLoop)
		g.spawn(g.detectLoop)
		g.spawn(g.digestLoop)
		g.spawn(g.syncLoop)
		g.spawn(g.metaLoop)
		g.spawn(g.janitorLoop)
		g.spawn(g.keepLoop)
		<-ctx.Done()
	} else {
		err = fmt.Errorf("gossip: start memberlist: %w", err)
	}

	// From here on spawn refuses.
	g.life.Lock()
	g.life.ctx = nil
	g.life.Unlock()
	cancel()
	if ml != nil {
		ml.Shutdown()
	} else {
		tr.Shutdown()
	}
	g.life.wg.Wait()
	sink.closed.Store(true)
	g.savePeers()
	g.keep()
	return err
}

func (g *Gossip) memberlistConfig(tr memberlist.Transport) *memberlist.Config {
	c := memberlist.DefaultLANConfig()
	c.Name = g.cfg.NodeID
	c.Transport = tr // which seals, see seal.go
	c.BindAddr, c.AdvertiseAddr = g.addr.Addr().String(), g.addr.Addr().String()
	c.BindPort, c.AdvertisePort = int(g.addr.Port()), int(g.addr.Port())
	c.ProbeInterval, c.ProbeTimeout = g.tune.ProbeInterval, g.tune.ProbeTimeout
	c.SuspicionMult, c.SuspicionMaxTimeoutMult = g.tune.SuspicionMult, g.tune.SuspicionMaxMult
	// A node that doubts itself slows its probes down up to 4 times, not 8:
	// at 8 a survivor of a large failure takes half a minute to see the next.
	c.AwarenessMaxMultiplier = 4
	c.GossipInterval = g.tune.GossipInterval
	c.PushPullInterval = g.tune.PushPullInterval
	c.TCPTimeout = streamTimeout
	c.UDPBufferSize = g.tune.UDPSize - sealOverhead - 5
	// The dead are gossiped to, so that one wrongly declared dead hears of it
	// and refutes; after that the rejoin loop has the care of them.
	c.GossipToTheDeadTime = 30 * time.Second
	// A dead node's ID may come back with another address. Not at once: a
	// packet with its former address may still be under way.
	c.DeadNodeReclaimTime = time.Second
	// LZW costs more time than it saves bytes on messages of this size, and the
	// wall refuses it.
	c.EnableCompression = false
	d := &delegate{g}
	c.Delegate, c.Events = d, d
	return c
}

// running is the context of Run, nil when it does not run.
func (g *Gossip) running() context.Context {
	g.life.Lock()
	defer g.life.Unlock()
	return g.life.ctx
}

// spawn starts a goroutine that Run waits for. It refuses, and returns false,
// when Run does not run.
func (g *Gossip) spawn(fn func(ctx context.Context)) bool {
	g.life.Lock()
	defer g.life.Unlock()
	ctx := g.life.ctx
	if ctx == nil {
		return false
	}
	g.life.wg.Add(1)
	go func() {
		defer g.life.wg.Done()
		fn(ctx)
	}()
	return true
}

// jitter spreads d by ±20 %, so that nodes don't act in step.
func jitter(d time.Duration) time.Duration {
	return time.Duration(float64(d) * (0.8 + 0.4*rand.Float64()))
}

func poke(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

// bump makes a new revision and wakes the consumer. Under mu.
func (g *Gossip) bump() uint64 {
	g.rev++
	g.revNow.Store(g.rev)
	poke(g.changed)
	return g.rev
}

// Changed wakes the one consumer after changes; several fold into one wake.
func (g *Gossip) Changed() <-chan struct{} { return g.changed }

// Snapshot is what this node knows now. It is made on demand and shared.
func (g *Gossip) Snapshot() *Snapshot {
	if s := g.snap.Load(); s != nil && s.Rev == g.revNow.Load() {
		return s
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if s := g.snap.Load(); s != nil && s.Rev == g.rev {
		return s
	}
	s := g.build()
	g.snap.Store(s)
	return s
}

// build makes the Snapshot. Under mu.
func (g *Gossip) build() *Snapshot {
	s := &Snapshot{Rev: g.rev, Synced: g.synced, Members: make([]Member, 0, len(g.members)+1)}
	self := g.recs[g.cfg.NodeID]
	s.Members = append(s.Members, Member{
		Peer: spec.Peer{ID: g.cfg.NodeID, Name: g.name, Number: g.number, Addr: g.addr.Addr(),
			ControlPort: g.cfg.ControlPort, GossipPort: int(g.addr.Port()), MTU: g.meta.path.mtu, Answers: g.meta.path.answers},
		Role: g.role, Epoch: self.epoch, Seq: self.seq,
	})
	shown, away := []*record{self}, []*record(nil)
	dir := g.dir.Load()
	for id, m := range g.members {
		if !m.shown() || dir == nil {
			continue
		}
		info, ok := dir.nodes[id]
		if !ok {
			continue
		}
		out := Member{
			Peer: spec.Peer{ID: id, Name: info.Name, Number: info.Number, Addr: m.addr.Addr(), Liveness: m.liveness(),
				ControlPort: info.ControlPort, GossipPort: int(m.addr.Port()), MTU: m.path.mtu, Answers: m.path.answers, Away: m.away},
			Role: info.Role,
		}
		if r := g.recs[id]; r != nil {
			out.Epoch, out.Seq = r.epoch, r.seq
			switch {
			case out.Liveness != spec.PeerDead:
				shown = append(shown, r)
			case m.away:
				away = append(away, r)
			}
		}
		s.Members = append(s.Members, out)
	}
	slices.SortFunc(s.Members, func(a, b Member) int { return strings.Compare(a.Peer.ID, b.Peer.ID) })

	s.Endpoints, s.Away = endpoints(shown), endpoints(away)
	return s
}

// endpoints are those of records, by Key, then Node.
func endpoints(records []*record) []spec.Endpoint {
	type keyed struct {
		key string
		e   *entry
	}
	n := 0
	for _, r := range records {
		n += len(r.entries)
	}
	all := make([]keyed, 0, n)
	for _, r := range records {
		for key, e := range r.entries {
			if !e.gone {
				all = append(all, keyed{key, e})
			}
		}
	}
	slices.SortFunc(all, func(a, b keyed) int {
		if c := strings.Compare(a.key, b.key); c != 0 {
			return c
		}
		return strings.Compare(a.e.ep.Node, b.e.ep.Node)
	})
	out := make([]spec.Endpoint, len(all))
	for i, k := range all {
		out[i] = k.e.ep
	}
	return out
}

// SetEndpoints replaces this node's own set. It returns once the change is on
// its way to the others. Nothing is said before the first call of a process,
// so call it as soon as the set is known, even if it is empty: until then the
// others go by what the process before said.
func (g *Gossip) SetEndpoints(eps []spec.Endpoint) {
	want := make(map[string]spec.Endpoint, len(eps))
	for _, ep := range eps {
		if err := encodable(ep); err != nil {
			g.stats.rejected.Add(1)
			g.log.Error("endpoint can't be made known", "error", err)
			continue
		}
		if want[ep.Key()] = ep; len(want) > maxEntries {
			delete(want, ep.Key())
			g.stats.rejected.Add(1)
			g.log.Error("too many endpoints on this node: some can't be made known", "most", maxEntries)
		}
	}
	g.publishMu.Lock()
	defer g.publishMu.Unlock()
	g.mu.Lock()
	if g.left {
		g.mu.Unlock()
		return
	}
	d := g.writeOwn(want, false)
	g.mu.Unlock()
	if d != nil {
		g.publish(d, false)
	}
}

// writeOwn changes this node's record. Under mu.
func (g *Gossip) writeOwn(want map[string]spec.Endpoint, left bool) *delta {
	now := time.Now()
	self := g.recs[g.cfg.NodeID]
	d := self.write(want, left, now)
	if d == nil {
		return nil
	}
	g.signRecord(d)
	self.prune(now, g.tune.TombstoneMax, g.tune.TombstoneAge)
	self.rev = g.bump()
	g.stats.ownChanges.Add(uint64(len(d.changes)))
	return d
}

// checkSelf looks at what this node has signed, as another holds it. If it is
// newer than what this process wrote, or as new and different, a former process
// wrote it and the epoch on disk was lost: this process moves past it. It returns
// what to publish then. Under mu.
func (g *Gossip) checkSelf(d *delta) *delta {
	self := g.recs[g.cfg.NodeID]
	differs := self.seq > 0 && d.epoch == self.epoch && d.seq == self.seq && d.state != self.state
	if !self.newer(d.epoch, d.seq) && !differs || g.left {
		return nil
	}
	next, err := nextEpoch(g.folder, d.epoch, g.log)
	if g.epochDue = err != nil; g.epochDue {
		g.noteDisk(err)
	}
	g.log.Warn("another node holds a newer record of this one; moving past it", "epoch", self.epoch, "theirs", d.epoch, "now", next)
	g.stats.epochBumps.Add(1)
	self.epoch = next
	g.meta.epoch = max(g.meta.epoch, next)
	poke(g.metas)
	if self.seq == 0 {
		return nil
	}
	self.rev = g.bump()
	own := self.since(0, 0, true)
	g.signRecord(own)
	return own
}

// outgrowMeta is checkSelf for metadata: whoever has heard what a former process signed
// last takes what this one says for old, and it for dead, until it moves past that.
func (g *Gossip) outgrowMeta(epoch, seq uint64) {
	g.mu.Lock()
	newer := epoch > g.meta.epoch || epoch == g.meta.epoch && seq > g.meta.seq
	if newer {
		g.meta.epoch, g.meta.seq = epoch, seq
	}
	g.mu.Unlock()
	if newer {
		g.renewMeta()
	}
}

// onMeta hears from a node that has refused this one's metadata for older than what
// it has heard before.
func (g *Gossip) onMeta(raw []byte) {
	m, err := g.openMeta(g.cfg.NodeID, raw)
	if err != nil {
		g.stats.forged.Add(1)
		return
	}
	g.outgrowMeta(m.epoch, m.seq)
}

// Join adds addresses to the durable peer list. Those that no living member has
// are tried for ever, in the background. It never blocks on the network.
func (g *Gossip) Join(addrs []netip.AddrPort) {
	g.mu.Lock()
	for _, a := range addrs {
		g.addPeer(a, "")
	}
	g.mu.Unlock()
	g.savePeers()
	poke(g.rejoin)
}

// SetMeta changes what this node's own Snapshot says of it; the others go by the
// managers.
func (g *Gossip) SetMeta(name string, number int, role string) {
	g.mu.Lock()
	if g.name != name || g.number != number || g.role != role {
		g.name, g.number, g.role = name, number, role
		g.bump()
	}
	g.mu.Unlock()
}

// SetPath changes what the others know of this node's end of the data path: see
// spec.Peer's MTU and Answers.
func (g *Gossip) SetPath(mtu int, answers bool) {
	g.mu.Lock()
	said := path{mtu, answers}
	same := g.meta.path == said
	if !same {
		g.meta.path = said
		g.bump()
	}
	g.mu.Unlock()
	if !same {
		g.renewMeta()
	}
}

// resignMeta signs this node's metadata anew, for more incarnations or with
// another content or key.
func (g *Gossip) resignMeta() error {
	bound := g.wall.vouch()
	g.mu.Lock()
	defer g.mu.Unlock()
	m := g.meta
	m.seq, m.maxInc = m.seq+1, bound
	raw, err := g.sealMeta(m)
	if err != nil {
		return err
	}
	g.meta, g.metaRaw = m, raw
	return nil
}

// renewMeta has the metadata signed and told anew, soon.
func (g *Gossip) renewMeta() { poke(g.metas) }

// metaEvery bounds how often metadata is told anew, and with it how fast others
// can drive a node's incarnation up: by vouched each time, that is for a year and
// more until it would wrap.
const metaEvery = 200 * time.Millisecond

// metaLoop advertises changed metadata; memberlist blocks for it.
func (g *Gossip) metaLoop(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-g.metas:
		}
		if err := g.resignMeta(); err != nil {
			g.log.Error("this node's metadata can't be signed", "error", err)
			continue
		}
		// The update is in memberlist's queue even if nobody took it in time.
		err := g.ml.Load().UpdateNode(10 * time.Millisecond)
		g.wall.advanced()
		if err != nil {
			g.log.Debug("metadata not taken by anybody yet", "error", err)
		}
		if !sleep.For(ctx, metaEvery) {
			return
		}
	}
}

// Forget drops all state of a node that the managers have removed: its
// endpoints, its place among the members, its address. Should it still talk, it
// stays hidden until it comes with a higher epoch.
func (g *Gossip) Forget(nodeID string) {
	if nodeID == g.cfg.NodeID {
		return
	}
	g.mu.Lock()
	now := time.Now()
	m, r := g.members[nodeID], g.recs[nodeID]
	if m == nil && r == nil {
		g.mu.Unlock()
		return
	}
	b := ban{at: now}
	if r != nil {
		b.epoch = r.epoch
	}
	if m != nil && m.up || r != nil {
		g.banned[nodeID] = b
	}
	for a, p := range g.peers {
		if p.node == nodeID || m != nil && p.node == "" && a == m.addr {
			delete(g.peers, a)
			g.dirty = true
		}
	}
	delete(g.recs, nodeID)
	if m != nil {
		if m.up {
			m.forgotten = true // memberlist will not introduce it again
		} else {
			delete(g.members, nodeID)
		}
	}
	g.bump()
	g.mu.Unlock()
	g.savePeers()
}

// Leave withdraws this node's endpoints and tells the others that it goes.
// They drop it at once, instead of holding it for failed. ctx bounds the time
// it may take; Run must still be ended afterwards.
func (g *Gossip) Leave(ctx context.Context) error {
	g.publishMu.Lock()
	g.mu.Lock()
	if g.left {
		g.mu.Unlock()
		g.publishMu.Unlock()
		return nil
	}
	d := g.writeOwn(nil, true)
	g.left = true
	g.mu.Unlock()
	var err error
	if d != nil {
		err = g.publish(d, true).wait(ctx)
	}
	g.publishMu.Unlock()
	ml := g.ml.Load()
	if ml == nil || g.running() == nil {
		return nil
	}
	timeout := 5 * time.Second
	if end, ok := ctx.Deadline(); ok {
		timeout = max(time.Millisecond, min(timeout, time.Until(end)))
	}
	if lerr := ml.Leave(timeout); lerr != nil {
		err = errors.Join(err, lerr)
	}
	if err != nil {
		return fmt.Errorf("gossip: leave: %w", err)
	}
	return nil
}
