package gossip

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/shoalnet/shoal/internal/sleep"
)

// receive handles one message. It is called from memberlist's packet loop and
// must not block.
func (g *Gossip) receive(b []byte) {
	m, err := decode(b)
	if errors.Is(err, errForeign) {
		g.stats.foreign.Add(1)
		return
	}
	if err != nil {
		g.stats.malformed.Add(1)
		return
	}
	if m.from == g.cfg.NodeID {
		// Our own rumours don't come back under our name; this is another node
		// that took our ID, or an address that is reused.
		g.stats.malformed.Add(1)
		return
	}
	// An answer goes only where the managers say that the asker is.
	if d := g.dir.Load(); d == nil || d.ats[m.addr] != m.from {
		g.stats.unassigned.Add(1)
		return
	}
	g.stats.received.Add(1)
	switch m.typ {
	case msgDelta:
		g.onDelta(m)
	case msgState, msgHave, msgDigest, msgDigestSum, msgDigestRep:
		g.onDigest(m)
	case msgFetch:
		g.onFetch(m)
	case msgFetchReply:
		g.onFetchReply(m)
	case msgBarrier:
		g.onBarrier(m)
	case msgBarrierAck:
		g.onBarrierAck(m)
	case msgMeta:
		g.onMeta(m.meta)
	}
}

// accept takes one delta of another node, which judge has found valid. own is
// what to publish if it shows that this node's record is behind. Under mu.
func (g *Gossip) accept(d *delta, now time.Time, force bool) (out outcome, own *delta) {
	if d.node == g.cfg.NodeID {
		return stale, g.checkSelf(d)
	}
	if !g.assigned(d.node) || g.hidden(d.node, d.epoch) {
		return stale, nil
	}
	r := g.recs[d.node]
	if r == nil {
		if g.members[d.node] == nil && len(g.recs) > len(g.members)+strangersMax {
			g.stats.dropped.Add(1)
			return stale, nil
		}
		r = newRecord(d.node)
		r.touched = now
		g.recs[d.node] = r
	}
	wasLeft := r.left
	switch out = r.apply(d, now, force); out {
	case stale:
		return out, nil
	case gap:
		r.park(d)
		return out, nil
	case broken:
		g.stats.forged.Add(1)
		return out, nil
	}
	r.unpark(now)
	r.prune(now, g.tune.TombstoneMax, g.tune.TombstoneAge)
	r.rev = g.bump()
	if m := g.members[d.node]; m != nil && r.left != m.left && (r.left || wasLeft) {
		m.left, m.since = r.left, now
		if m.left {
			m.holding = false
			g.log.Info("node has left", "node", d.node)
			for a, p := range g.peers { // if it comes back, it will call
				if p.node == d.node {
					delete(g.peers, a)
					g.dirty = true
				}
			}
		}
		g.count()
	}
	return out, nil
}

// hidden tells whether what a node of this epoch says is not to be heard,
// because it was forgotten; a higher epoch ends that. Under mu.
func (g *Gossip) hidden(node string, epoch uint64) bool {
	b, ok := g.banned[node]
	if !ok {
		return false
	}
	if epoch <= b.epoch {
		return true
	}
	delete(g.banned, node)
	if m := g.members[node]; m != nil && m.forgotten {
		m.forgotten = false
		g.addPeer(m.addr, node)
		g.count()
		g.bump()
	}
	return false
}

func (g *Gossip) onDelta(m *message) {
	d := m.deltas[0]
	// Most deltas come more than once: only what is news is verified.
	g.mu.Lock()
	r := g.recs[d.node]
	known := r != nil && !r.newer(d.epoch, d.seq)
	g.mu.Unlock()
	if known {
		g.stats.stale.Add(1)
		return
	}
	if g.judge(d) != valid {
		return
	}
	g.mu.Lock()
	out, own := g.accept(d, time.Now(), false)
	var ready []peerAck
	repair := false
	switch r := g.recs[d.node]; out {
	case applied:
		g.stats.deltas.Add(1)
		ready = g.release(d.node)
	case gap:
		g.stats.gaps.Add(1)
		repair = !r.repairing
		r.repairing = true
	case stale:
		g.stats.stale.Add(1)
	case broken:
		g.askOwner(r)
	}
	g.mu.Unlock()
	g.sendAcks(ready)
	g.republish(own)
	if out == applied {
		g.repeat(m.body)
	}
	if repair {
		from := peerAddr{m.from, m.addr}
		if !g.spawn(func(ctx context.Context) { g.repair(ctx, d.node, from, g.tune.GapWait) }) {
			g.mu.Lock()
			if r := g.recs[d.node]; r != nil {
				r.repairing = false
			}
			g.mu.Unlock()
		}
	}
}

// republish sends this node's record after its epoch has moved.
func (g *Gossip) republish(d *delta) {
	if d == nil {
		return
	}
	g.spawn(func(context.Context) {
		g.publishMu.Lock()
		defer g.publishMu.Unlock()
		g.publish(d, false)
	})
}

// repair fetches what a node's record lacks, from the node itself, else from
// whoever had more. What fails is left to the digests.
func (g *Gossip) repair(ctx context.Context, node string, from peerAddr, wait time.Duration) {
	defer func() {
		g.mu.Lock()
		if r := g.recs[node]; r != nil {
			r.repairing = false
		}
		g.mu.Unlock()
	}()
	if !sleep.For(ctx, wait) {
		return
	}
	for try := range 4 {
		g.mu.Lock()
		r := g.recs[node]
		if r == nil || len(r.parked) == 0 {
			g.mu.Unlock()
			return
		}
		to := from
		if m := g.members[node]; m != nil && m.reachable() && !m.suspect && try%2 == 0 {
			to = peerAddr{node, m.addr}
		}
		w := want{node: node, epoch: r.epoch, seq: r.seq}
		g.mu.Unlock()
		g.stats.repairs.Add(1)
		fctx, cancel := context.WithTimeout(ctx, g.tune.FetchTimeout/3)
		err := g.fetch(fctx, to, []want{w}, false)
		cancel()
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			g.log.Debug("repair failed", "node", node, "from", to.id, "error", err)
		}
	}
	// What is still parked can't be completed; the digests will.
	g.mu.Lock()
	if r := g.recs[node]; r != nil {
		g.stats.dropped.Add(uint64(len(r.parked)))
		r.parked = nil
	}
	g.mu.Unlock()
}

// askOwner fetches a record anew from its node, the only one who knows. Under mu.
func (g *Gossip) askOwner(r *record) {
	addr, ok := g.addrOf(r.node)
	if !ok || r.repairing {
		return
	}
	r.repairing = true
	owner, w := peerAddr{r.node, addr}, want{node: r.node, epoch: r.epoch, seq: r.seq, full: true}
	if !g.spawn(func(ctx context.Context) { g.mend(ctx, owner, w) }) {
		r.repairing = false
	}
}

// mend replaces a record that differs from its owner's.
func (g *Gossip) mend(ctx context.Context, owner peerAddr, w want) {
	fctx, cancel := context.WithTimeout(ctx, g.tune.FetchTimeout)
	defer cancel()
	err := g.fetch(fctx, owner, []want{w}, true)
	g.mu.Lock()
	if r := g.recs[w.node]; r != nil {
		r.repairing = false
	}
	g.mu.Unlock()
	if err != nil && ctx.Err() == nil {
		g.log.Debug("record not mended", "node", w.node, "error", err)
	}
}

// ---- digests ----

// digest lists the records that others may lack: of nodes that are not dead,
// and for a while of those that left. Under mu.
func (g *Gossip) digest() []digestItem {
	items := make([]digestItem, 0, len(g.recs))
	now := time.Now()
	for id, r := range g.recs {
		if r.seq == 0 || r.outdated {
			continue
		}
		if id != g.cfg.NodeID {
			m := g.members[id]
			// A record that says "left" of a node that is back is of a
			// former process, and would make others think it gone.
			if m == nil || r.left == m.reachable() || r.left && now.Sub(r.leftAt) > leftShown {
				continue
			}
		}
		items = append(items, r.digest())
	}
	sortDigest(items)
	return items
}

// compare finds where this node is behind a peer's digest, where the peer is,
// and whose records differ although they should not. Under mu.
func (g *Gossip) compare(from string, theirs []digestItem) (behind []want, ahead []digestItem, own *delta) {
	behind, ahead, own = g.compareEach(from, theirs)
	seen := make(map[string]bool, len(theirs))
	for _, it := range theirs {
		seen[it.node] = true
	}
	for _, it := range g.digest() {
		if !seen[it.node] {
			ahead = append(ahead, it)
		}
	}
	return behind, ahead, own
}

// compareEach is compare for the records named only. Under mu.
func (g *Gossip) compareEach(from string, theirs []digestItem) (behind []want, ahead []digestItem, own *delta) {
	limit := epochLimit(time.Now())
	for _, it := range theirs {
		if it.epoch > limit {
			g.stats.future.Add(1)
			continue
		}
		if it.node == g.cfg.NodeID {
			self := g.recs[it.node]
			if self.newer(it.epoch, it.seq) || self.seq > 0 && self.epoch == it.epoch && self.seq == it.seq && it.hash != short(self.state) {
				// Whoever says so has to show what this node signed.
				behind = append(behind, want{node: it.node, full: true})
			} else if self.seq > 0 && (self.epoch != it.epoch || self.seq != it.seq) {
				ahead = append(ahead, self.digest())
			}
			continue
		}
		if !g.assigned(it.node) || g.hidden(it.node, it.epoch) {
			continue
		}
		r := g.recs[it.node]
		switch {
		case r == nil:
			behind = append(behind, want{node: it.node})
		case r.outdated:
			behind = append(behind, want{node: it.node, full: true})
		case r.newer(it.epoch, it.seq):
			behind = append(behind, want{node: it.node, epoch: r.epoch, seq: r.seq})
		case r.epoch != it.epoch || r.seq != it.seq:
			if r.seq > 0 {
				ahead = append(ahead, r.digest())
			}
		case short(r.state) != it.hash:
			g.stats.mismatches.Add(1)
			g.log.Debug("two records of one node differ at the same sequence", "node", it.node, "epoch", it.epoch, "seq", it.seq, "with", from)
			w := want{node: it.node, epoch: r.epoch, seq: r.seq, full: true}
			if from == it.node {
				behind = append(behind, w)
			} else {
				g.askOwner(r)
			}
		}
	}
	return behind, ahead, own
}

// knows tells whether the sender is a living member here, at that address.
// Under mu.
func (g *Gossip) knows(m *message) bool {
	p := g.members[m.from]
	return p != nil && p.up && p.addr == m.addr
}

func (g *Gossip) onDigest(m *message) {
	from := peerAddr{m.from, m.addr}
	rep := message{header: g.header(msgDigestRep), id: m.id}
	var answer, differ, rejoin bool
	var behind []want
	var own *delta
	g.mu.Lock()
	switch m.typ {
	case msgDigestSum:
		mine := g.digest()
		differ = digestSum(mine) != m.sum || uint64(len(mine)) != m.count
		rep.unknown = !g.knows(m)
		answer = !differ || rep.unknown
	case msgDigest:
		behind, rep.digest, own = g.compare(m.from, m.digest)
		rep.unknown = !g.knows(m)
		answer = true
	case msgDigestRep:
		if _, ok := g.digests[m.id]; !ok {
			g.stats.stray.Add(1)
			g.mu.Unlock()
			return
		}
		delete(g.digests, m.id)
		// The reply names only records of which we have less.
		behind, _, own = g.compareEach(m.from, m.digest)
		rejoin = m.unknown && !g.left
	case msgState, msgHave:
		behind, _, own = g.compareEach(m.from, m.digest)
	}
	// A peer that does not know us may know nobody yet.
	first := !g.synced && (m.typ == msgState || m.typ == msgDigest && !rep.unknown || m.typ == msgDigestRep && !m.unknown)
	if first {
		g.syncing++
	}
	g.stats.digests.Add(1)
	g.mu.Unlock()

	g.republish(own)
	if answer {
		g.send(from.id, from.addr, rep.encode())
	}
	if differ {
		// The whole digest, as a question of our own, makes each side fetch
		// what it lacks.
		g.spawn(func(ctx context.Context) { g.exchange(ctx, from, false) })
	}
	if rejoin {
		// The peer does not hold us for alive: it shall hear it from us.
		g.mu.Lock()
		p := g.peers[from.addr]
		try := p != nil && !p.trying
		if try {
			p.trying = true
		}
		g.mu.Unlock()
		if try && !g.spawn(func(context.Context) { g.tryJoin(from.addr) }) {
			return
		}
	}
	switch {
	case len(behind) > 0:
		ok := g.spawn(func(ctx context.Context) {
			fctx, cancel := context.WithTimeout(ctx, g.tune.FetchTimeout)
			defer cancel()
			err := g.fetch(fctx, from, behind, true)
			if err != nil && ctx.Err() == nil {
				g.log.Debug("fetch failed", "from", from.id, "error", err)
			}
			if first {
				g.synchronised(err == nil)
			}
		})
		if !ok && first {
			g.synchronised(false)
		}
	case first:
		g.synchronised(true)
	}
}

// synchronised ends a first exchange.
func (g *Gossip) synchronised(ok bool) {
	g.mu.Lock()
	g.syncing--
	if ok && !g.synced {
		g.synced = true
		g.bump()
	}
	g.mu.Unlock()
}

// syncLoop makes a node without reachable peers synced.
func (g *Gossip) syncLoop(ctx context.Context) {
	start := time.Now()
	for sleep.For(ctx, 20*time.Millisecond) {
		age := time.Since(start)
		g.mu.Lock()
		alone := len(g.peers) == 0 && age > joinGrace
		waited := age > g.tune.SyncWait && (g.syncing == 0 || age > syncMax)
		if !g.synced && (alone || waited) {
			g.synced = true
			g.bump()
			if waited {
				g.log.Warn("no peer has answered; going on alone", "peers", len(g.peers))
			}
		}
		done := g.synced
		g.mu.Unlock()
		if done {
			return
		}
	}
}

// digestLoop compares with a random peer every now and then; more often before
// the first time has succeeded.
func (g *Gossip) digestLoop(ctx context.Context) {
	for {
		g.mu.Lock()
		wait := g.tune.DigestInterval
		if !g.synced {
			wait /= 8
		}
		g.mu.Unlock()
		if !sleep.For(ctx, jitter(wait)) {
			return
		}
		g.mu.Lock()
		peers := g.living()
		left := g.left
		g.mu.Unlock()
		if len(peers) > 0 && !left {
			g.exchange(ctx, peers[0], true)
		}
	}
}

// exchange asks one peer to compare: with the whole digest if it fits a packet
// or the sum is known to differ, else with a sum.
func (g *Gossip) exchange(ctx context.Context, to peerAddr, short bool) {
	m := message{header: g.header(msgDigest), id: g.newID()}
	g.mu.Lock()
	m.digest = g.digest()
	g.digests[m.id] = time.Now().Add(g.tune.FetchTimeout)
	g.mu.Unlock()
	msg := m.encode()
	if short && len(msg) > g.maxUDP {
		m.typ, m.count, m.sum = msgDigestSum, uint64(len(m.digest)), digestSum(m.digest)
		msg = m.encode()
	}
	if len(msg) <= g.maxUDP {
		g.packet(to.id, to.addr, msg)
	} else if err := g.stream(ctx, to.id, to.addr, msg); err != nil && ctx.Err() == nil {
		g.log.Debug("digest not sent", "to", to.id, "error", err)
	}
}

// ---- fetches ----

// fetch is one request under way.
type fetch struct {
	from   string
	chunks [][]*delta // by index; nil: not here yet
	have   int
	total  int // 0: unknown
	size   int // bytes of the chunks
	done   chan struct{}
}

var errBusy = errors.New("gossip: too many fetches under way")

// fetch asks a peer for records and applies what it answers.
func (g *Gossip) fetch(ctx context.Context, from peerAddr, wants []want, try bool) error {
	if try {
		select {
		case g.fetching <- struct{}{}:
		case <-ctx.Done():
			g.stats.dropped.Add(1)
			return errBusy
		}
		defer func() { <-g.fetching }()
	}
	f := &fetch{from: from.id, done: make(chan struct{})}
	m := message{header: g.header(msgFetch), id: g.newID(), wants: wants}
	g.mu.Lock()
	g.fetches[m.id] = f
	g.mu.Unlock()
	defer func() {
		g.mu.Lock()
		delete(g.fetches, m.id)
		g.mu.Unlock()
	}()
	g.stats.fetches.Add(1)
	if err := g.stream(ctx, from.id, from.addr, m.encode()); err != nil {
		g.stats.fetchErrors.Add(1)
		return fmt.Errorf("ask %s: %w", from.id, err)
	}
	select {
	case <-ctx.Done():
		g.stats.fetchErrors.Add(1)
		return fmt.Errorf("answer of %s: %w", from.id, ctx.Err())
	case <-f.done:
	}
	force, asked := map[string]bool{}, map[string]bool{}
	for _, w := range wants {
		asked[w.node] = true
		force[w.node] = w.full && w.node == from.id
	}
	// Verified without the lock: it is a tenth of a millisecond each.
	deltas := slices.DeleteFunc(joinReply(f.chunks), func(d *delta) bool { return !asked[d.node] || g.judge(d) != valid })
	now := time.Now()
	var ready []peerAck
	var own *delta
	g.mu.Lock()
	for _, d := range deltas {
		out, o := g.accept(d, now, force[d.node])
		if o != nil {
			own = o
		}
		if out == applied {
			g.stats.fetched.Add(1)
			ready = append(ready, g.release(d.node)...)
		}
		if out == broken { // what is here is none of its states: all of it, then
			g.askOwner(g.recs[d.node])
		}
	}
	g.mu.Unlock()
	g.sendAcks(ready)
	g.republish(own)
	return nil
}

func (g *Gossip) onFetch(m *message) {
	select {
	case g.serving <- struct{}{}:
	default:
		g.stats.dropped.Add(1)
		return
	}
	ok := g.spawn(func(ctx context.Context) {
		defer func() { <-g.serving }()
		g.serve(ctx, m.id, peerAddr{m.from, m.addr}, m.wants)
	})
	if !ok {
		<-g.serving
	}
}

func (g *Gossip) serve(ctx context.Context, id uint64, to peerAddr, wants []want) {
	var deltas []*delta
	g.mu.Lock()
	for _, w := range wants {
		if r := g.recs[w.node]; r != nil && !g.hidden(w.node, r.epoch) {
			if d := r.since(w.epoch, w.seq, w.full); d != nil {
				deltas = append(deltas, d)
			}
		}
	}
	g.mu.Unlock()
	g.stats.served.Add(1)
	for _, msg := range cutReply(g.header(msgFetchReply), id, deltas, chunkSize) {
		if err := g.stream(ctx, to.id, to.addr, msg); err != nil {
			if ctx.Err() == nil {
				g.log.Debug("fetch not answered", "by", to.id, "error", err)
			}
			return
		}
	}
}

func (g *Gossip) onFetchReply(m *message) {
	g.mu.Lock()
	defer g.mu.Unlock()
	f := g.fetches[m.id]
	if f == nil || f.from != m.from {
		g.stats.stray.Add(1)
		return
	}
	i := int(m.index)
	for len(f.chunks) <= i {
		f.chunks = append(f.chunks, nil)
	}
	if f.chunks[i] != nil {
		return
	}
	if f.size += len(m.body); f.size > fetchBytesMax {
		g.stats.dropped.Add(1)
		delete(g.fetches, m.id)
		return
	}
	if m.deltas == nil {
		m.deltas = []*delta{}
	}
	f.chunks[i] = m.deltas
	f.have++
	if m.last {
		f.total = i + 1
	}
	if f.total > 0 && f.have == f.total && len(f.chunks) == f.total {
		close(f.done)
		delete(g.fetches, m.id)
	}
}

// addrOf is where a member listens. Under mu.
func (g *Gossip) addrOf(id string) (netip.AddrPort, bool) {
	if m := g.members[id]; m != nil && m.reachable() {
		return m.addr, true
	}
	return netip.AddrPort{}, false
}
