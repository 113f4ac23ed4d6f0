package gossip

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/netip"
	"sync"

	"github.com/hashicorp/memberlist"
)

// This file gets messages out. Nothing here is called under Gossip.mu, except
// where it says so.

// target is a copy of what memberlist needs to address a node.
func target(id string, addr netip.AddrPort) *memberlist.Node {
	// PMax 5 says that the peer understands checksums; every node here runs a
	// memberlist that does.
	return &memberlist.Node{Name: id, Addr: addr.Addr().AsSlice(), Port: addr.Port(), PMax: memberlist.ProtocolVersionMax}
}

// packet sends a message in one UDP packet; false if it does not fit one or
// could not be sent.
func (g *Gossip) packet(id string, addr netip.AddrPort, msg []byte) bool {
	ml := g.ml.Load()
	if ml == nil || len(msg) > g.maxUDP {
		return false
	}
	if err := ml.SendBestEffort(target(id, addr), msg); err != nil {
		g.stats.sendErrors.Add(1)
		return false
	}
	return true
}

// stream sends a message over TCP and returns when it is written.
func (g *Gossip) stream(ctx context.Context, id string, addr netip.AddrPort, msg []byte) error {
	ml := g.ml.Load()
	if ml == nil {
		return errors.New("gossip: not running")
	}
	if g.waiting.Add(1) > reliableMax {
		g.waiting.Add(-1)
		g.stats.dropped.Add(1)
		return errors.New("gossip: too many messages wait to be sent")
	}
	defer g.waiting.Add(-1)
	select {
	case g.reliable <- struct{}{}:
		defer func() { <-g.reliable }()
	case <-ctx.Done():
		return ctx.Err()
	}
	if err := ml.SendReliable(target(id, addr), msg); err != nil {
		g.stats.sendErrors.Add(1)
		return err
	}
	return nil
}

// send takes a packet if the message fits one and a stream otherwise.
func (g *Gossip) send(id string, addr netip.AddrPort, msg []byte) {
	if len(msg) <= g.maxUDP {
		g.packet(id, addr, msg)
		return
	}
	if !g.spawn(func(ctx context.Context) { g.stream(ctx, id, addr, msg) }) {
		g.stats.dropped.Add(1)
	}
}

type peerAddr struct {
	id   string
	addr netip.AddrPort
}

// living lists the members that are not dead, in random order. Under mu.
func (g *Gossip) living() []peerAddr {
	out := make([]peerAddr, 0, len(g.members))
	for id, m := range g.members {
		if m.reachable() {
			out = append(out, peerAddr{id, m.addr})
		}
	}
	rand.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	return out
}

// sends is a group of reliable sends under way.
type sends struct {
	wg  sync.WaitGroup
	mu  sync.Mutex
	err error
}

func (s *sends) wait(ctx context.Context) error {
	done := make(chan struct{})
	go func() {
		s.wg.Wait()
		close(done)
	}()
	select {
	case <-done:
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// publish sends a delta of this node to the others: at once to each, or to a
// random part of many, and as a rumour. Under publishMu. With reliably set it
// goes over TCP as well, and the result can be waited for.
func (g *Gossip) publish(d *delta, reliably bool) *sends {
	s := &sends{}
	if g.ml.Load() == nil {
		return s
	}
	m := message{header: g.header(msgDelta), deltas: []*delta{d}}
	msg := m.encode()
	g.mu.Lock()
	to := g.living()
	g.mu.Unlock()
	to = to[:min(len(to), g.tune.DirectPeers)]
	fits := len(msg) <= g.maxUDP
	if !fits {
		g.stats.oversize.Add(1)
	}
	for _, p := range to {
		if fits {
			g.packet(p.id, p.addr, msg)
		}
		if !fits || reliably {
			s.wg.Add(1)
			ok := g.spawn(func(ctx context.Context) {
				defer s.wg.Done()
				if err := g.stream(ctx, p.id, p.addr, msg); err != nil {
					s.mu.Lock()
					s.err = errors.Join(s.err, err)
					s.mu.Unlock()
				}
			})
			if !ok {
				s.wg.Done()
			}
		}
	}
	if fits {
		g.enqueue(&g.own, msg)
	}
	return s
}

// rumour is one message of a queue.
type rumour []byte

func (r rumour) Invalidates(memberlist.Broadcast) bool { return false }
func (r rumour) Message() []byte                       { return r }
func (r rumour) Finished()                             {}

// UniqueBroadcast tells the queue not to look for what this one replaces.
func (r rumour) UniqueBroadcast() {}

// enqueue adds a message that fits a packet to a rumour queue.
func (g *Gossip) enqueue(q *memberlist.TransmitLimitedQueue, msg []byte) {
	if g.nodes.Load() < 2 {
		return
	}
	q.QueueBroadcast(rumour(msg))
	if n := q.NumQueued(); n > queueMax {
		g.stats.dropped.Add(uint64(n - queueMax))
		q.Prune(queueMax)
	}
}

// repeat queues a delta of another node that taught this one something.
func (g *Gossip) repeat(body []byte) {
	msg := append(appendHeader(nil, g.header(msgDelta)), body...)
	if len(msg) > g.maxUDP {
		g.stats.oversize.Add(1)
		return
	}
	g.enqueue(&g.relay, msg)
}
