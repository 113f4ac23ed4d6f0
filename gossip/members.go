package gossip

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/shoalnet/shoal/internal/sleep"
	"github.com/shoalnet/shoal/spec"
)

// member is another node as far as memberlist and our pings tell.
type member struct {
	addr netip.AddrPort

	assigned bool // the managers say it is a node

	up   bool // memberlist holds it alive or suspect
	left bool // it said so itself
	// holding: memberlist holds it dead, but it has not missed our pings.
	holding bool
	// orphaned: memberlist holds it dead, and its machine is there; only its
	// agent is not.
	orphaned  bool
	until     time.Time // orphaned: when its agent has been away for too long
	away      bool      // it has, and the machine is still there: dead all the same
	looking   bool      // lookLoop looks whether its machine is there
	unseen    int       // looks in a row that its machine did not answer
	forgotten bool      // hidden, see Forget
	fails     int       // pings in a row without answer
	answers   bool      // the last ping was answered
	suspect   bool      // fails reached Tuning.SuspectAfter
	pinging   bool
	since     time.Time // of the last change of up or left
	path      path      // as it last said
}

func (m *member) reachable() bool {
	return (m.up || m.holding || m.orphaned) && !m.left && !m.forgotten && m.assigned
}

func (m *member) shown() bool { return m.assigned && !m.left && !m.forgotten }

func (m *member) liveness() spec.Liveness {
	switch {
	case !m.reachable():
		return spec.PeerDead
	case m.suspect, !m.up && !(m.holding && m.answers):
		// What a node hears itself beats what others say: anybody with the
		// cluster's key can say that a node is dead.
		return spec.PeerSuspect
	}
	return spec.PeerAlive
}

// count refreshes the number of nodes for the queues. Under mu.
func (g *Gossip) count() {
	n := int64(1)
	for _, m := range g.members {
		if m.reachable() {
			n++
		}
	}
	g.nodes.Store(n)
}

// delegate is what memberlist calls. Events come under its node lock.
type delegate struct{ g *Gossip }

// NodeMeta implements memberlist.Delegate.
func (d *delegate) NodeMeta(limit int) []byte {
	d.g.mu.Lock()
	defer d.g.mu.Unlock()
	if len(d.g.metaRaw) > limit { // some 110 bytes, of 512
		return nil
	}
	return d.g.metaRaw
}

// NotifyMsg implements memberlist.Delegate.
func (d *delegate) NotifyMsg(b []byte) {
	if d.g.running() != nil {
		d.g.receive(b)
	}
}

// GetBroadcasts implements memberlist.Delegate: own rumours first.
func (d *delegate) GetBroadcasts(overhead, limit int) [][]byte {
	out := d.g.own.GetBroadcasts(overhead, limit)
	for _, m := range out {
		limit -= overhead + len(m)
	}
	if limit > overhead {
		out = append(out, d.g.relay.GetBroadcasts(overhead, limit)...)
	}
	d.g.stats.rumours.Add(uint64(len(out)))
	return out
}

// LocalState implements memberlist.Delegate.
func (d *delegate) LocalState(bool) []byte {
	d.g.mu.Lock()
	m := message{header: d.g.header(msgState), digest: d.g.digest()}
	d.g.mu.Unlock()
	return m.encode()
}

// MergeRemoteState implements memberlist.Delegate.
func (d *delegate) MergeRemoteState(b []byte, _ bool) {
	if d.g.running() != nil {
		d.g.receive(b)
	}
}

// NotifyJoin implements memberlist.EventDelegate: a new member, or one that
// was dead or had left.
func (d *delegate) NotifyJoin(n *memberlist.Node) { d.g.memberUp(n, true) }

// NotifyUpdate implements memberlist.EventDelegate: other metadata.
func (d *delegate) NotifyUpdate(n *memberlist.Node) { d.g.memberUp(n, false) }

// NotifyLeave implements memberlist.EventDelegate: dead, or left; it does not
// tell which.
func (d *delegate) NotifyLeave(n *memberlist.Node) { d.g.memberDown(n.Name) }

func (g *Gossip) memberUp(n *memberlist.Node, join bool) {
	if n.Name == g.cfg.NodeID || g.running() == nil {
		return
	}
	ip, ok := netip.AddrFromSlice(n.Addr)
	if !ok || len(n.Name) > maxID {
		g.stats.malformed.Add(1)
		return
	}
	addr := netip.AddrPortFrom(ip.Unmap(), n.Port)
	said := g.wall.said(n.Name, n.Meta)
	g.mu.Lock()
	m := g.members[n.Name]
	if m == nil {
		m = &member{}
		g.members[n.Name] = m
	}
	before := *m
	m.addr, m.assigned, m.path = addr, g.assigned(n.Name), said
	m.up, m.holding, m.orphaned, m.away = true, false, false, false
	if join {
		// Only the node itself can come back from having left.
		m.left, m.fails, m.suspect, m.answers, m.since = false, 0, false, false, time.Now()
		if r := g.recs[n.Name]; r != nil && r.left && !before.up {
			r.leftAt = time.Time{}
		}
	}
	if _, banned := g.banned[n.Name]; banned {
		m.forgotten = true
	}
	if m.assigned {
		g.addPeer(addr, n.Name)
	}
	g.count()
	g.bump()
	greet := join && len(g.members) <= g.tune.DirectPeers
	g.mu.Unlock()
	if join {
		g.log.Info("node is a member", "node", n.Name, "addr", addr)
	}
	if greet {
		id := n.Name
		g.spawn(func(context.Context) { g.greet(id, addr) })
	}
}

// greet tells a new member how far this node's record is. Who joins fetches all
// records from the one it joins by; the others would hear of the newcomer's, if
// it spoke before it joined, only from a digest.
func (g *Gossip) greet(id string, addr netip.AddrPort) {
	g.mu.Lock()
	mine := g.recs[g.cfg.NodeID].digest()
	g.mu.Unlock()
	if mine.seq > 0 {
		m := message{header: g.header(msgHave), digest: []digestItem{mine}}
		g.packet(id, addr, m.encode())
	}
}

func (g *Gossip) memberDown(id string) {
	if id == g.cfg.NodeID || g.running() == nil {
		return
	}
	g.mu.Lock()
	m := g.members[id]
	if m == nil {
		g.mu.Unlock()
		return
	}
	m.up, m.since = false, time.Now()
	m.holding = !m.suspect && !m.left && !m.forgotten && m.assigned
	if !m.holding && !m.left && !m.forgotten && m.assigned {
		g.orphan(id, m)
	}
	if m.forgotten || !m.assigned {
		delete(g.members, id)
	}
	if p := g.peers[m.addr]; p != nil {
		p.due()
	}
	left, holding, asked := m.left || !m.assigned, m.holding, m.orphaned
	g.count()
	g.bump()
	g.mu.Unlock()
	switch {
	case left, asked:
	case holding:
		g.stats.held.Add(1)
		g.log.Warn("the cluster holds a node for dead that still answers this one", "node", id)
	default:
		g.log.Warn("node is dead", "node", id)
	}
	poke(g.rejoin)
}

// orphan holds a node for suspect, whose agent is away, for as long as its machine is
// there. Under mu.
func (g *Gossip) orphan(id string, m *member) {
	m.orphaned, m.until = g.look(id, m) && m.unseen < g.tune.LookMisses, time.Now().Add(g.tune.OrphanAge)
}

// look sees to it that somebody looks whether the machine of a suspected node is there.
// Under mu.
func (g *Gossip) look(id string, m *member) bool {
	if g.cfg.Present == nil {
		return false
	}
	if !m.looking {
		m.unseen = 0
		m.looking = g.spawn(func(ctx context.Context) { g.lookLoop(ctx, id, m) })
	}
	return m.looking
}

// lookLoop looks whether the machine of a node that does not answer is there, again and
// again until the node is not suspect any more, or its machine was not seen. It begins
// with the suspicion, so that enough was seen, or not seen, when memberlist is sure that
// there is no agent.
func (g *Gossip) lookLoop(ctx context.Context, id string, m *member) {
	for told := false; ; {
		g.mu.Lock()
		addr := m.addr
		g.mu.Unlock()
		start := time.Now()
		dctx, cancel := context.WithTimeout(ctx, g.tune.LookInterval)
		present := g.cfg.Present(dctx, addr)
		cancel()
		took := time.Since(start)
		if ctx.Err() != nil {
			return
		}
		g.mu.Lock()
		if g.members[id] != m {
			g.mu.Unlock()
			return
		}
		switch {
		case present:
			m.unseen = 0
		case m.addr == addr && took <= g.tune.LookInterval+stalled: // else the lateness is this process's
			m.unseen++
		}
		tell := present && m.orphaned && !told
		gone := m.unseen >= g.tune.LookMisses || m.left || m.forgotten
		dead, lost := m.orphaned && (gone || time.Now().After(m.until)), m.away && gone
		if dead || lost {
			m.orphaned, m.away = false, !gone
			g.count()
			g.bump()
		}
		m.looking = m.orphaned || m.away || m.suspect && (m.up || m.holding)
		looking, wait := m.looking, g.tune.LookInterval
		if m.away && m.unseen == 0 {
			wait *= awayRest // nothing but routes depends on it
		}
		g.mu.Unlock()
		switch {
		case dead:
			g.log.Warn("node is dead", "node", id, "its machine is there", !gone)
			poke(g.rejoin)
		case tell:
			told = true
			g.log.Warn("a node's agent is gone, its machine is not: it is held for suspect", "node", id)
		}
		if !looking || !sleep.For(ctx, wait-took) {
			return
		}
	}
}

// detectLoop pings peers more often than memberlist probes them, so that a
// silent one is suspect after half a second.
//
// memberlist.Ping blocks for ProbeTimeout at most and leaves only a timer of
// ProbeInterval behind. It has one fault to allow for: with an error of its
// own socket, not the peer's, it fails at once; such an error says nothing of
// the peer and is not counted.
func (g *Gossip) detectLoop(ctx context.Context) {
	tick := time.NewTicker(g.tune.PingInterval)
	defer tick.Stop()
	last := time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := time.Now()
		late := now.Sub(last) - g.tune.PingInterval
		last = now
		for _, p := range g.pingRound() {
			g.spawn(func(context.Context) { g.ping(p.id, p.addr, late > stalled) })
		}
	}
}

// pingRound chooses whom to ping, and marks them: all, or in a large cluster
// those in doubt and some at random.
func (g *Gossip) pingRound() []peerAddr {
	g.mu.Lock()
	defer g.mu.Unlock()
	var sure, doubt []peerAddr
	for id, m := range g.members {
		switch {
		case !m.reachable() || m.pinging:
		case m.fails > 0 || m.holding:
			doubt = append(doubt, peerAddr{id, m.addr})
		default:
			sure = append(sure, peerAddr{id, m.addr})
		}
	}
	rand.Shuffle(len(sure), func(i, j int) { sure[i], sure[j] = sure[j], sure[i] })
	round := append(doubt, sure[:min(len(sure), max(0, g.tune.DirectPeers-len(doubt)))]...)
	for _, p := range round {
		g.members[p.id].pinging = true
	}
	return round
}

func (g *Gossip) ping(id string, addr netip.AddrPort, stalledNow bool) {
	start := time.Now()
	_, err := g.ml.Load().Ping(id, net.UDPAddrFromAddrPort(addr))
	took := time.Since(start)
	g.stats.pings.Add(1)
	var silent memberlist.NoPingResponseError
	accuse := false
	g.mu.Lock()
	defer func() {
		g.mu.Unlock()
		if accuse {
			g.wall.accuse(id)
		}
	}()
	m := g.members[id]
	if m == nil {
		return
	}
	m.pinging = false
	if m.addr != addr {
		return
	}
	before := m.liveness()
	switch {
	case err == nil:
		m.fails, m.suspect, m.answers = 0, false, true
	case !errors.As(err, &silent):
		g.stats.sendErrors.Add(1)
	default:
		g.stats.pingsLost.Add(1)
		// A timeout noticed late is this process's lateness.
		if stalledNow || took > g.tune.ProbeTimeout+stalled {
			break
		}
		m.answers = false
		m.fails++
		accuse = m.fails == g.tune.AccuseAfter && m.up && m.reachable()
		if m.fails >= g.tune.SuspectAfter {
			if m.suspect = true; m.holding {
				m.holding = false
				g.orphan(id, m)
			} else if m.reachable() {
				g.look(id, m)
			}
		}
	}
	if after := m.liveness(); after != before {
		g.count()
		g.bump()
		g.log.Info("node is "+after.String(), "node", id, "was", before.String())
	}
}

// janitorLoop drops what has become old.
func (g *Gossip) janitorLoop(ctx context.Context) {
	var told time.Time
	for sleep.For(ctx, jitter(time.Second)) {
		g.mu.Lock()
		g.tidy(time.Now())
		dirty := g.dirty || g.epochDue
		g.mu.Unlock()
		if dirty {
			g.savePeers()
		}
		if now := time.Now(); now.Sub(told) >= tellEvery && g.wall.tell() {
			told = now
		}
	}
}

// tidy does the janitor's work. Under mu.
func (g *Gossip) tidy(now time.Time) {
	changed := false
	for id, m := range g.members {
		switch {
		case m.left && now.Sub(m.since) > leftKept,
			!m.reachable() && !m.up && now.Sub(m.since) > g.tune.ForgetAfter:
			delete(g.members, id)
			delete(g.recs, id)
			changed = true
		}
	}
	for id, r := range g.recs {
		if id != g.cfg.NodeID && g.members[id] == nil && now.Sub(r.touched) > strangerAge {
			delete(g.recs, id)
			continue
		}
		r.prune(now, g.tune.TombstoneMax, g.tune.TombstoneAge)
	}
	for id, b := range g.banned {
		if now.Sub(b.at) > g.tune.ForgetAfter {
			delete(g.banned, id)
		}
	}
	for id, end := range g.digests {
		if now.After(end) {
			delete(g.digests, id)
		}
	}
	for k, w := range g.waiters {
		if now.After(w.end) {
			delete(g.waiters, k)
		}
	}
	if changed {
		g.bump()
	}
}

// ---- the durable peer list ----

// peer is an address that is or was a node's.
type peer struct {
	node   string // its ID, once known
	next   time.Time
	delay  time.Duration
	trying bool
}

// due makes the next attempt soon.
func (p *peer) due() { p.next, p.delay = time.Time{}, 0 }

// addPeer adds an address, or notes whose it is. Under mu.
func (g *Gossip) addPeer(a netip.AddrPort, node string) {
	a = netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
	if !a.IsValid() || a.Port() == 0 || a.Addr().IsUnspecified() || a == g.addr {
		return
	}
	p := g.peers[a]
	if p == nil {
		p = &peer{}
		g.peers[a] = p
		g.dirty = true
	}
	if node == "" || p.node == node {
		return
	}
	p.node = node
	g.dirty = true
	for b, q := range g.peers { // it has moved
		if b != a && q.node == node {
			delete(g.peers, b)
		}
	}
}

// savePeers keeps the peer list, and the epoch where that is due. The janitor
// calls again while the disk takes neither.
func (g *Gossip) savePeers() {
	g.saveMu.Lock()
	defer g.saveMu.Unlock()
	g.mu.Lock()
	peers, epoch := g.dirty, uint64(0)
	if g.epochDue {
		epoch = g.recs[g.cfg.NodeID].epoch
	}
	if !peers && epoch == 0 {
		g.mu.Unlock()
		return
	}
	g.dirty, g.epochDue = false, false
	list := make([]peerRecord, 0, len(g.peers))
	for a, p := range g.peers {
		list = append(list, peerRecord{Addr: a, Node: p.node})
	}
	g.mu.Unlock()
	var epochErr, peersErr error
	if epoch != 0 {
		epochErr = storeEpoch(g.folder, epoch)
	}
	if peers {
		slices.SortFunc(list, func(a, b peerRecord) int { return a.Addr.Compare(b.Addr) })
		peersErr = savePeers(g.folder, list)
	}
	err := errors.Join(epochErr, peersErr)
	g.noteDisk(err)
	if err != nil {
		g.mu.Lock()
		g.dirty = g.dirty || peersErr != nil
		g.epochDue = g.epochDue || epochErr != nil
		g.mu.Unlock()
	}
}

// noteDisk keeps what the disk last refused, and says so once.
func (g *Gossip) noteDisk(err error) {
	var p *error
	if err != nil {
		p = &err
	}
	switch was := g.diskErr.Swap(p); {
	case p != nil && was == nil:
		g.log.Warn("what gossip has to remember can't be kept; trying again", "error", err)
	case p == nil && was != nil:
		g.log.Info("what gossip has to remember is kept again")
	}
}

// DiskErr is why the boot epoch or the peer list can't be kept now; nil when they
// are.
func (g *Gossip) DiskErr() error {
	if p := g.diskErr.Load(); p != nil {
		return *p
	}
	return nil
}

// rejoinParallel bounds attempts at a time.
const rejoinParallel = 8

// rejoinLoop tries the addresses that no living member has.
func (g *Gossip) rejoinLoop(ctx context.Context) {
	for {
		now := time.Now()
		for _, a := range g.rejoinRound(now) {
			if !g.spawn(func(context.Context) { g.tryJoin(a) }) {
				return
			}
		}
		t := time.NewTimer(g.tune.RejoinInterval / 4)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		case <-g.rejoin:
			t.Stop()
		}
	}
}

func (g *Gossip) rejoinRound(now time.Time) []netip.AddrPort {
	g.mu.Lock()
	defer g.mu.Unlock()
	// Before the managers have said who the nodes are, nothing that a peer says is
	// believed.
	if g.left || g.dir.Load() == nil {
		return nil
	}
	alive := make(map[netip.AddrPort]bool, len(g.members))
	for _, m := range g.members {
		if m.up && !m.left {
			alive[m.addr] = true
		}
	}
	var due []netip.AddrPort
	lost, trying := 0, 0
	for a, p := range g.peers {
		if alive[a] {
			continue
		}
		lost++
		if p.trying {
			trying++
		} else if !p.next.After(now) {
			due = append(due, a)
		}
	}
	limit := max(g.tune.RejoinMax, time.Duration(lost)*g.tune.RejoinInterval/3)
	rand.Shuffle(len(due), func(i, j int) { due[i], due[j] = due[j], due[i] })
	due = due[:min(len(due), max(0, rejoinParallel-trying))]
	for _, a := range due {
		p := g.peers[a]
		p.trying = true
		p.delay = min(max(2*p.delay, g.tune.RejoinInterval), limit)
		p.next = now.Add(jitter(p.delay))
	}
	return due
}

func (g *Gossip) tryJoin(a netip.AddrPort) {
	g.stats.rejoins.Add(1)
	_, err := g.ml.Load().Join([]string{a.String()})
	if err != nil {
		g.log.Debug("peer can't be joined", "addr", a, "error", err)
	}
	g.mu.Lock()
	if p := g.peers[a]; p != nil {
		p.trying = false
	}
	g.mu.Unlock()
}
