package gossip

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// Directory is what the managers say of the cluster's nodes. Gossip believes
// nobody else about who is a node and where; it adds only whether they live and
// what they run.
type Directory struct {
	// Nodes by ID.
	Nodes map[string]NodeInfo
}

// NodeInfo is one node of a Directory.
type NodeInfo struct {
	Name, Role              string
	Number                  int
	Addr                    netip.Addr
	ControlPort, GossipPort int
	// Keys are the public keys that the node's statements may be signed with:
	// that of its certificate and, while that changes, the one before.
	// ed25519.PublicKey or *ecdsa.PublicKey of P-256.
	Keys []crypto.PublicKey
}

func (n NodeInfo) at() netip.AddrPort {
	return netip.AddrPortFrom(n.Addr.Unmap(), uint16(n.GossipPort))
}

// directory is a Directory made ready for looking up. It is never changed.
type directory struct {
	nodes map[string]NodeInfo
	ips   map[netip.Addr]bool
	ats   map[netip.AddrPort]string
}

func newDirectory(d Directory) *directory {
	out := &directory{nodes: make(map[string]NodeInfo, len(d.Nodes)), ips: make(map[netip.Addr]bool, len(d.Nodes)), ats: make(map[netip.AddrPort]string, len(d.Nodes))}
	for id, n := range d.Nodes {
		out.nodes[id] = n
		out.ips[n.Addr.Unmap()] = true
		out.ats[n.at()] = id
	}
	return out
}

// keysOf are the keys of a node; of this one its own, too, which the managers
// may not have told yet.
func (g *Gossip) keysOf(node string) []crypto.PublicKey {
	var keys []crypto.PublicKey
	if d := g.dir.Load(); d != nil {
		keys = d.nodes[node].Keys
	}
	if node == g.cfg.NodeID {
		keys = append(keys[:len(keys):len(keys)], g.signer().Public())
	}
	return keys
}

// assigned tells whether the managers know a node.
func (g *Gossip) assigned(node string) bool {
	if node == g.cfg.NodeID {
		return true
	}
	d := g.dir.Load()
	if d == nil {
		return false
	}
	_, ok := d.nodes[node]
	return ok
}

// ---- signatures ----

// maxSig is the longest signature: of P-256 in ASN.1; Ed25519's has 64 bytes.
const maxSig = 72

// sign signs msg with an Ed25519 or P-256 key.
func sign(s crypto.Signer, msg []byte) ([]byte, error) {
	switch s.Public().(type) {
	case ed25519.PublicKey:
		return s.Sign(rand.Reader, msg, crypto.Hash(0))
	case *ecdsa.PublicKey:
		h := sha256.Sum256(msg)
		return s.Sign(rand.Reader, h[:], crypto.SHA256)
	}
	return nil, fmt.Errorf("gossip: keys of type %T can't sign: want Ed25519 or P-256", s.Public())
}

// verified tells which of the keys has signed msg.
func verified(keys []crypto.PublicKey, msg, sig []byte) (crypto.PublicKey, bool) {
	var digest [32]byte
	hashed := false
	for _, k := range keys {
		switch k := k.(type) {
		case ed25519.PublicKey:
			if len(k) == ed25519.PublicKeySize && ed25519.Verify(k, msg, sig) {
				return k, true
			}
		case *ecdsa.PublicKey:
			if k.Curve != elliptic.P256() {
				continue
			}
			if !hashed {
				digest, hashed = sha256.Sum256(msg), true
			}
			if ecdsa.VerifyASN1(k, digest[:], sig) {
				return k, true
			}
		}
	}
	return nil, false
}

// samePublic compares two public keys.
func samePublic(a, b crypto.PublicKey) bool {
	e, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && e.Equal(b)
}

// checkSigner refuses what can't sign.
func checkSigner(s crypto.Signer) error {
	if s == nil {
		return errors.New("gossip: no key to sign with")
	}
	switch k := s.Public().(type) {
	case ed25519.PublicKey:
		return nil
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P256() {
			return nil
		}
	}
	return fmt.Errorf("gossip: keys of type %T can't sign: want Ed25519 or P-256", s.Public())
}

// text begins what is signed, so that no signature stands for anything but what
// it was made for, nor in another cluster, nor for another node.
func (g *Gossip) text(purpose, node string) []byte {
	b := append(make([]byte, 0, 256), purpose...)
	b = append(b, 0)
	b = appendString(b, g.cfg.Cluster)
	return appendString(b, node)
}

// recordText is what the signature of a record is over: (cluster, node, epoch,
// sequence, content).
func (g *Gossip) recordText(d *delta) []byte {
	b := g.text("shoal gossip record", d.node)
	b = binary.BigEndian.AppendUint64(b, d.epoch)
	b = binary.BigEndian.AppendUint64(b, d.seq)
	b = appendBool(b, d.left)
	return append(b, d.state[:]...)
}

// metaText is what the signature of a node's metadata is over.
func (g *Gossip) metaText(node string, body []byte) []byte {
	return append(g.text("shoal gossip member", node), body...)
}

func (g *Gossip) signer() crypto.Signer { return *g.key.Load() }

// signRecord signs a delta of this node. Under mu.
func (g *Gossip) signRecord(d *delta) {
	sig, err := sign(g.signer(), g.recordText(d))
	if err != nil { // not of keys in memory
		g.log.Error("this node's endpoints can't be signed, so nobody will hear of them", "error", err)
	}
	d.sig = sig
	r := g.recs[g.cfg.NodeID]
	r.sig, r.state, r.key = sig, d.state, g.signer().Public()
}

// ---- epochs ----

// maxEpochAhead bounds the epoch of a record: Unix seconds now, and an hour. An
// epoch counts the starts of an agent, so none is ever near that; whoever has a
// node's key and takes it to the bound has it back in the node's reach a moment
// later, as the bound goes on. (Were epochs times, a node whose clock is a day
// ahead would be refused for a day.)
const maxEpochAhead = time.Hour

func epochLimit(now time.Time) uint64 {
	return uint64(max(0, now.Add(maxEpochAhead).Unix()))
}

// verdict of what a peer says.
type verdict int

const (
	valid   verdict = iota
	strange         // of a node that the managers don't know (yet)
	future          // of an epoch that can't be
	forged          // not signed by its node
)

// judge checks all of a delta but whether its changes lead to what is signed,
// which record.apply does. It is called without mu.
func (g *Gossip) judge(d *delta) verdict {
	if !g.assigned(d.node) {
		g.stats.unassigned.Add(1)
		return strange
	}
	if d.epoch > epochLimit(time.Now()) {
		g.stats.future.Add(1)
		return future
	}
	key, ok := verified(g.keysOf(d.node), g.recordText(d), d.sig)
	g.stats.verified.Add(1)
	if !ok {
		g.stats.forged.Add(1)
		return forged
	}
	d.key = key
	return valid
}

// SetDirectory replaces what the managers say of the nodes. Who is not in it is
// not heard any more, and forgotten; until the first call nobody is heard at
// all.
func (g *Gossip) SetDirectory(in Directory) {
	d := newDirectory(in)
	old := g.dir.Swap(d)
	var ask []peerAddr
	g.wall.forget(d)
	g.mu.Lock()
	for id, n := range d.nodes {
		if id == g.cfg.NodeID {
			continue
		}
		g.addPeer(n.at(), id)
		r := g.recs[id]
		if r == nil || r.key == nil || r.outdated {
			continue
		}
		if !hasKey(n.Keys, r.key) {
			// What it signed with a key that is no longer its own gives way to
			// anything that it signs with the new one. It is not dropped: the
			// node has not spoken yet, and its tasks go on.
			r.outdated = true
			if m := g.members[id]; m != nil && m.reachable() {
				ask = append(ask, peerAddr{id, m.addr})
			}
		}
	}
	for id, m := range g.members {
		_, ok := d.nodes[id]
		if m.assigned = ok; !ok && !m.up {
			delete(g.members, id)
		}
	}
	for id := range g.recs {
		if _, ok := d.nodes[id]; !ok && id != g.cfg.NodeID {
			delete(g.recs, id)
		}
	}
	for a, p := range g.peers {
		if _, ok := d.ats[a]; !ok {
			delete(g.peers, a) // a former address, or a former node's
			g.dirty = true
		} else if old == nil || old.ats[a] == "" {
			p.due()
		}
	}
	g.count()
	g.bump()
	g.mu.Unlock()
	poke(g.rejoin)
	for _, p := range ask {
		g.spawn(func(ctx context.Context) { g.exchange(ctx, p, false) })
	}
}

func hasKey(keys []crypto.PublicKey, k crypto.PublicKey) bool {
	for _, o := range keys {
		if samePublic(o, k) {
			return true
		}
	}
	return false
}

// SetSigner changes the key that this node signs with. The managers must have
// told the others of it, or tell them soon: until then nobody takes what it says.
func (g *Gossip) SetSigner(s crypto.Signer) error {
	if err := checkSigner(s); err != nil {
		return err
	}
	g.publishMu.Lock()
	g.mu.Lock()
	if samePublic(s.Public(), g.signer().Public()) {
		g.mu.Unlock()
		g.publishMu.Unlock()
		return nil
	}
	g.key.Store(&s)
	var d *delta
	if self := g.recs[g.cfg.NodeID]; self.seq > 0 && !g.left {
		// The same content, signed anew: one more in sequence, so that it is news.
		self.seq++
		self.rev = g.bump()
		d = self.since(0, 0, true)
		g.signRecord(d)
	}
	g.mu.Unlock()
	if d != nil {
		g.publish(d, false)
	}
	g.publishMu.Unlock()
	g.renewMeta()
	return nil
}

// SetKeys replaces the keyring.
func (g *Gossip) SetKeys(k Keyring) error {
	r, err := newRing(k)
	if err != nil {
		return err
	}
	g.sealer.ring.Store(r)
	return nil
}

// KeyIDs are the IDs of the keys that this node holds, the one in use first.
func (g *Gossip) KeyIDs() []uint32 {
	r := g.sealer.ring.Load()
	ids := []uint32{r.use}
	for id := range r.open {
		if id != r.use {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids[1:])
	return ids
}
