package gossip

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// A barrier asks every living peer to answer once its data plane follows this
// node's record up to a sequence. The question is repeated until answered, so
// neither it nor the answer needs a reliable way. A peer that lacks the record
// fetches it.

// waiterKey names a barrier of another node.
type waiterKey struct {
	node string
	id   uint64
}

// waiter is a barrier of another node that this one has not passed yet.
type waiter struct {
	epoch, seq uint64
	rev        uint64 // of the first Snapshot known to have it; 0: not here yet
	addr       netip.AddrPort
	end        time.Time
}

// barrier is one of this node.
type barrier struct {
	left map[string]bool // peers that have not answered
	wake chan struct{}
}

type peerAck struct {
	to peerAddr
	id uint64
}

const (
	barrierRetryMin = 25 * time.Millisecond
	barrierRetryMax = 200 * time.Millisecond
)

// Barrier waits until every peer that is not dead has applied all changes that
// this node has made so far, as its consumer reports by Applied. When ctx ends
// first, it returns the peers that have not, sorted, and an error. A peer that
// dies or leaves meanwhile is not waited for. This node's own data plane is the
// caller's to watch.
func (g *Gossip) Barrier(ctx context.Context) (missing []string, err error) {
	b := &barrier{left: map[string]bool{}, wake: make(chan struct{}, 1)}
	id := g.newID()
	g.mu.Lock()
	self := g.recs[g.cfg.NodeID]
	m := message{header: g.header(msgBarrier), id: id, epoch: self.epoch, seq: self.seq}
	for _, p := range g.living() {
		b.left[p.id] = true
	}
	g.acks[id] = b
	g.mu.Unlock()
	defer func() {
		g.mu.Lock()
		delete(g.acks, id)
		g.mu.Unlock()
	}()
	if m.seq == 0 {
		return nil, nil // nothing was ever said
	}
	run := g.running()
	if run == nil {
		run = context.Background()
	}
	msg := m.encode()
	wait := barrierRetryMin
	retry := time.NewTimer(0)
	defer retry.Stop()
	for {
		ask := false
		var cause error
		select {
		case <-ctx.Done():
			cause = ctx.Err()
		case <-run.Done():
			cause = run.Err()
		case <-b.wake:
		case <-retry.C:
			ask = true
		}
		var to []peerAddr
		g.mu.Lock()
		for p := range b.left {
			addr, ok := g.addrOf(p)
			if !ok {
				delete(b.left, p)
				continue
			}
			to = append(to, peerAddr{p, addr})
		}
		g.mu.Unlock()
		if len(to) == 0 {
			return nil, nil
		}
		if cause != nil {
			for _, p := range to {
				missing = append(missing, p.id)
			}
			slices.Sort(missing)
			return missing, fmt.Errorf("gossip: %d of the other nodes have not confirmed: %w", len(missing), cause)
		}
		if ask {
			for _, p := range to {
				g.packet(p.id, p.addr, msg)
			}
			retry.Reset(wait)
			wait = min(2*wait, barrierRetryMax)
		}
	}
}

func (g *Gossip) onBarrier(m *message) {
	key := waiterKey{m.from, m.id}
	g.mu.Lock()
	if g.waiters[key] == nil && len(g.waiters) >= waitersMax {
		g.mu.Unlock()
		g.stats.dropped.Add(1)
		return
	}
	if g.waiters[key] == nil {
		g.waiters[key] = &waiter{epoch: m.epoch, seq: m.seq, addr: m.addr, end: time.Now().Add(waiterAge)}
	}
	ready := g.release(m.from)
	r := g.recs[m.from]
	behind := r == nil || r.newer(m.epoch, m.seq)
	var w want
	if behind {
		w = want{node: m.from}
		if r != nil {
			w.epoch, w.seq = r.epoch, r.seq
			behind = !r.repairing
			r.repairing = true
		}
	}
	g.mu.Unlock()
	g.sendAcks(ready)
	if behind {
		g.spawn(func(ctx context.Context) {
			fctx, cancel := context.WithTimeout(ctx, g.tune.FetchTimeout)
			defer cancel()
			g.stats.repairs.Add(1)
			err := g.fetch(fctx, peerAddr{m.from, m.addr}, []want{w}, true)
			g.mu.Lock()
			if r := g.recs[m.from]; r != nil {
				r.repairing = false
			}
			g.mu.Unlock()
			if err != nil && ctx.Err() == nil {
				g.log.Debug("fetch for a barrier failed", "from", m.from, "error", err)
			}
		})
	}
}

// release takes out the waiters of a node that are satisfied now. Under mu.
func (g *Gossip) release(node string) (ready []peerAck) {
	r := g.recs[node]
	if r == nil || len(g.waiters) == 0 {
		return nil
	}
	for k, w := range g.waiters {
		if k.node != node || r.newer(w.epoch, w.seq) {
			continue
		}
		if w.rev == 0 {
			w.rev = r.rev // later changes of the record don't matter
		}
		if w.rev <= g.applied {
			ready = append(ready, peerAck{peerAddr{k.node, w.addr}, k.id})
			delete(g.waiters, k)
		}
	}
	return ready
}

func (g *Gossip) sendAcks(acks []peerAck) {
	for _, a := range acks {
		m := message{header: g.header(msgBarrierAck), id: a.id}
		g.packet(a.to.id, a.to.addr, m.encode())
	}
}

func (g *Gossip) onBarrierAck(m *message) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if b := g.acks[m.id]; b != nil && b.left[m.from] {
		delete(b.left, m.from)
		poke(b.wake)
	} else {
		g.stats.stray.Add(1)
	}
}

// Applied reports that the consumer's data plane follows the Snapshot with
// this Rev, or a newer one.
func (g *Gossip) Applied(rev uint64) {
	g.mu.Lock()
	var ready []peerAck
	if rev = min(rev, g.rev); rev > g.applied {
		g.applied = rev
		nodes := map[string]bool{}
		for k := range g.waiters {
			nodes[k.node] = true
		}
		for n := range nodes {
			ready = append(ready, g.release(n)...)
		}
	}
	g.mu.Unlock()
	g.sendAcks(ready)
}
