package gossip

import (
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/shoalnet/shoal/spec"
)

// BenchmarkChangeToAllSnapshots measures from SetEndpoints on one node until
// every node's Snapshot has the change.
func BenchmarkChangeToAllSnapshots(b *testing.B) {
	for _, n := range []int{3, 10, 25} {
		for _, table := range []int{0, 1000} {
			b.Run(fmt.Sprintf("nodes=%d/endpoints=%d", n, table), func(b *testing.B) {
				c := newCluster(b, Tuning{})
				c.grow(n)
				base := []spec.Endpoint{}
				for k := range table {
					base = append(base, endpoint(1, 1000+k, spec.EndpointActive))
				}
				k := 0
				one := func() {
					k++
					c.node(1).putAll(append(base[:len(base):len(base)], endpoint(1, k%1000, spec.EndpointActive)))
					seq := c.node(1).Snapshot().Members[0].Seq
					for _, o := range c.all() {
						for o.Snapshot().Members[0].Seq < seq {
							runtime.Gosched()
						}
					}
				}
				one()
				for b.Loop() {
					one()
				}
			})
		}
	}
}

// BenchmarkSnapshot makes one of 10,000 endpoints on 100 nodes.
func BenchmarkSnapshot(b *testing.B) {
	g, err := Open(Config{NodeID: "self", Cluster: "c", Addr: nodeAddr(1).Addr(), DataDir: b.TempDir(), Transport: nowhere{}, Keys: testRing, Signer: newSigner()})
	if err != nil {
		b.Fatal(err)
	}
	dir := Directory{Nodes: map[string]NodeInfo{}}
	for i := range 100 {
		dir.Nodes[nodeID(i)] = NodeInfo{Addr: nodeAddr(i).Addr(), GossipPort: 7946}
	}
	g.SetDirectory(dir)
	for i := range 100 {
		id := nodeID(i)
		g.members[id] = &member{up: true, assigned: true}
		d := &delta{node: id, epoch: 1, seq: 100, full: true}
		for k := range 100 {
			d.changes = append(d.changes, newChange(uint64(k+1), endpoint(i, k, spec.EndpointActive), false))
		}
		d.state = newRecord(id).stateAfter(d)
		g.accept(d, time.Now(), false)
	}
	for b.Loop() {
		g.mu.Lock()
		g.bump()
		g.mu.Unlock()
		if got := len(g.Snapshot().Endpoints); got != 10000 {
			b.Fatal(got)
		}
	}
}
