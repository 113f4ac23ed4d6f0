package gossip

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"log/slog"
	"os"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/shoalnet/shoal/spec"
)

var discard = slog.New(slog.DiscardHandler)

// lone is a node that does not run.
func lone(t testing.TB) *Gossip {
	g, err := Open(Config{NodeID: "self", Name: "self", Cluster: "c", Addr: nodeAddr(1).Addr(), DataDir: t.TempDir(), Transport: nowhere{}, Keys: testRing, Signer: newSigner(), Log: discard})
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func tempDir(t *rapid.T) string {
	dir, err := os.MkdirTemp("", "gossip")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func ringOf(use uint32, ids ...uint32) Keyring {
	k := Keyring{Use: use}
	for _, id := range ids {
		k.Keys = append(k.Keys, Key{ID: id, Secret: bytes.Repeat([]byte{byte(id)}, KeySize)})
	}
	return k
}

// The three steps of a change of keys, each taken by one node after the other:
// nobody misses anything. Who is not told is out.
func TestKeysAreChangedUnderWay(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.ring = ringOf(1, 1)
	c.grow(4)
	left := c.node(4)
	k := 0
	for _, ring := range []Keyring{ringOf(1, 1, 2), ringOf(2, 1, 2), ringOf(2, 2)} {
		for _, i := range []int{1, 2, 3} {
			if err := c.node(i).SetKeys(ring); err != nil {
				t.Fatal(err)
			}
			for _, j := range []int{1, 2, 3} {
				k++
				n := c.node(j)
				n.put(k)
				c.eventually(5*time.Second, "known in the middle of it", func() string {
					for _, o := range []int{1, 2, 3} {
						s := c.node(o).Snapshot()
						for _, ep := range s.Endpoints {
							if ep.Node == nodeID(j) && ep.Slot != k {
								return fmt.Sprintf("%s has %d of %s", nodeID(o), ep.Slot, nodeID(j))
							}
						}
					}
					return ""
				})
			}
		}
	}
	c.eventually(20*time.Second, "the fourth is out", func() string {
		for _, i := range []int{1, 2, 3} {
			if l := liveness(c.node(i), 4); l != "dead" {
				return nodeID(i) + " sees it " + l
			}
		}
		return ""
	})
	if err := left.SetKeys(ringOf(2, 2)); err != nil {
		t.Fatal(err)
	}
	c.eventually(20*time.Second, "the fourth is back", c.agreed)
	if got := fmt.Sprint(left.Stats().Keys); got != "[2]" {
		t.Errorf("keys %s", got)
	}
	for _, bad := range []Keyring{{}, ringOf(3, 1, 2), ringOf(1, 1, 1), ringOf(1, 1, 2, 3, 4)} {
		if err := left.SetKeys(bad); err == nil {
			t.Errorf("%+v was taken", bad)
		}
	}
}

// A node that the managers remove is out at once, with its endpoints; if they
// take it back, so is what it says.
func TestRemovedIsOutAtOnce(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.grow(3)
	c.unassign(3)
	for _, i := range []int{1, 2} {
		if l, e := liveness(c.node(i), 3), endpointsOf(c.node(i), 3); l != "absent" || e != 0 {
			t.Fatalf("node %d sees it %s with %d endpoints", i, l, e)
		}
	}
	c.node(3).put(7, 8)
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		for _, i := range []int{1, 2} {
			if l, e := liveness(c.node(i), 3), endpointsOf(c.node(i), 3); l != "absent" || e != 0 {
				t.Fatalf("node %d sees it %s with %d endpoints", i, l, e)
			}
		}
	}
	c.assign(3, nodeAddr(3), c.signer(3).Public())
	c.eventually(20*time.Second, "back", c.agreed)
}

// The managers may tell of a node after it speaks: nothing is lost.
func TestLateDirectory(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.grow(3)
	old := c.directory()
	n := c.start(4, addrs(1)...)
	for _, i := range []int{1, 2, 3} {
		c.node(i).SetDirectory(old)
	}
	n.put(1, 2, 3)
	time.Sleep(500 * time.Millisecond)
	for _, i := range []int{1, 2, 3} {
		if l := liveness(c.node(i), 4); l != "absent" {
			t.Fatalf("node %d sees one that the managers have not told of %s", i, l)
		}
	}
	c.tell()
	d := c.eventually(5*time.Second, "known", c.agreed)
	t.Logf("known %s after the managers told of it", d)
}

// A node's certificate gets another key. Whichever comes first, the managers'
// word of it or what is signed with it, its endpoints are never lost.
func TestKeyOfANodeChanges(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.grow(3)
	for k, first := range []string{"managers", "node", "both known"} {
		old := c.signer(3)
		next, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		c.mu.Lock()
		c.keys[3] = next
		c.mu.Unlock()
		sign := func() {
			if err := c.node(3).SetSigner(next); err != nil {
				t.Fatal(err)
			}
		}
		switch first {
		case "managers":
			c.assign(3, nodeAddr(3), next.Public())
			if e := endpointsOf(c.node(1), 3); e == 0 {
				t.Fatal("endpoints were lost")
			}
			sign()
		case "node":
			sign()
			time.Sleep(100 * time.Millisecond)
			c.assign(3, nodeAddr(3), next.Public())
		default:
			c.assign(3, nodeAddr(3), old.Public(), next.Public())
			sign()
			c.eventually(5*time.Second, "signed anew", c.agreed)
			c.assign(3, nodeAddr(3), next.Public())
		}
		c.node(3).put(10+k, 20+k)
		c.eventually(10*time.Second, first+" first", c.agreed)
	}
	if err := c.node(3).SetSigner(nil); err == nil {
		t.Error("no key was taken for one")
	}
}

// An epoch on disk that nobody would take is not used, and one that the others
// hold, taken to the bound by who has the key, is outgrown.
func TestBadEpochHeals(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.grow(2)
	a := c.attacker(t, 3)
	limit := epochLimit(time.Now()) - 5
	a.packet(1, a.user(a.record(nodeID(3), limit, 1<<61)))
	// Node 1 holds no member of that ID, and keeps the record for it.
	c.eventually(5*time.Second, "held", func() string {
		n := c.node(1)
		n.Gossip.mu.Lock()
		defer n.Gossip.mu.Unlock()
		if r := n.recs[nodeID(3)]; r == nil || r.epoch != limit {
			return "not yet"
		}
		return ""
	})
	a.tr.Shutdown()
	n := c.start(3, addrs(1, 2)...)
	n.put(5)
	c.eventually(20*time.Second, "outgrown", c.agreed)
	if e := n.Snapshot().Members[2].Epoch; e <= limit {
		t.Errorf("epoch %d", e)
	}
}

// Fields that a later version adds, states and flags that this one does not know:
// what it understands holds, and it passes on the rest.
func TestLaterVersionsAreUnderstood(t *testing.T) {
	raw := append(appendContent(nil, endpoint(1, 1, spec.EndpointActive), false), "a field of the next version"...)
	d := &delta{node: "x", epoch: 1, seq: 3, full: true, sig: []byte{1}, changes: []change{newChange(2, endpoint(1, 2, 9), false), {seq: 3, raw: raw}}}
	m := message{header: header{typ: msgDelta, from: "x", addr: nodeAddr(1)}, deltas: []*delta{d}}
	got, err := decode(append(m.encode(), "and more"...))
	if err != nil {
		t.Fatal(err)
	}
	r := newRecord("x")
	got.deltas[0].state = r.stateAfter(got.deltas[0])
	if out := r.apply(got.deltas[0], time.Now(), false); out != applied {
		t.Fatal(out)
	}
	if ep := r.entries[endpoint(1, 2, 0).Key()].ep; ep.State != spec.EndpointStarting {
		t.Errorf("a state that is not known counts as %s", ep.State)
	}
	if ep := r.entries[endpoint(1, 1, 0).Key()].ep; ep.State != spec.EndpointActive || ep.Slot != 1 {
		t.Errorf("%+v", ep)
	}
	on := r.since(0, 0, true)
	if !bytes.Equal(on.changes[1].raw, raw) {
		t.Error("what is not known was not passed on")
	}
	again, err := decode((&message{header: m.header, deltas: []*delta{on}}).encode())
	if err != nil || again.deltas[0].changes[1].sum != got.deltas[0].changes[1].sum {
		t.Errorf("passed on, it is another: %v", err)
	}
}
