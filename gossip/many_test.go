package gossip

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/spec"
)

// TestManyNodes: with every record signed and every packet sealed a change is known to 99
// of 100 nodes within two seconds, and a node that dies to all, however many nodes there
// are. The nodes are real, and have the usual timers; time is not, so that a machine on
// which they would starve tells the same. SHOAL_GOSSIP_NODES=1000 asks for as many: half
// an hour.
func TestManyNodes(t *testing.T) {
	nodes := 40
	if s := os.Getenv("SHOAL_GOSSIP_NODES"); s != "" {
		var err error
		if nodes, err = strconv.Atoi(s); err != nil || nodes < 5 {
			t.Fatalf("SHOAL_GOSSIP_NODES=%s: want a number, of five or more", s)
		}
	}
	synctest.Test(t, func(t *testing.T) { manyNodes(t, nodes) })
}

func manyNodes(t *testing.T, nodes int) {
	// Time stands still once this ends, and memberlist's last goroutines wait for it.
	t.Cleanup(func() { time.Sleep(10 * time.Second) })
	c := newCluster(t, Tuning{})
	c.net.SetDelay(2 * time.Millisecond)
	c.net.SetLoss(0.01)
	var mu sync.Mutex
	want, at := "", time.Time{} // the endpoint that was set last, and when
	var took []time.Duration
	known := map[int]bool{}
	// seen notes when a node's data plane hears of it.
	seen := func(n *node) {
		s := n.Snapshot()
		mu.Lock()
		defer mu.Unlock()
		if want == "" || known[n.i] {
			return
		}
		if _, ok := slices.BinarySearchFunc(s.Endpoints, want, func(ep spec.Endpoint, key string) int { return strings.Compare(ep.Key(), key) }); ok {
			known[n.i] = true
			took = append(took, time.Since(at))
		}
	}
	begun := time.Now()
	wall := cpuClock()
	c.startAll(nodes, seen)
	c.eventually(5*time.Minute, "cluster forms", func() string {
		for _, n := range c.all() {
			if s := n.Snapshot(); !s.Synced || len(s.Endpoints) != nodes || len(members(s, spec.PeerAlive)) != nodes {
				return fmt.Sprintf("%s: synced %t, %d endpoints, %d alive", nodeID(n.i), s.Synced, len(s.Endpoints), len(members(s, spec.PeerAlive)))
			}
		}
		return ""
	})
	t.Logf("%d nodes know each other after %s, %s of CPU", nodes, time.Since(begun), cpuClock()-wall)

	const changes = 20
	wall = cpuClock()
	for k := range changes {
		n := c.node(1 + k*nodes/changes)
		ep := endpoint(n.i, k+2, spec.EndpointActive)
		ep.Node = nodeID(n.i)
		mu.Lock()
		want, at = ep.Key(), time.Now()
		clear(known)
		mu.Unlock()
		n.put(1, k+2)
		c.eventually(time.Minute, "a change", func() string {
			mu.Lock()
			defer mu.Unlock()
			if len(known) < nodes {
				return fmt.Sprintf("%d of %d nodes know of it", len(known), nodes)
			}
			return ""
		})
	}
	slices.Sort(took)
	of := func(part float64) time.Duration { return took[min(int(part*float64(len(took))), len(took)-1)] }
	t.Logf("%d changes, each known to half of the nodes after %s, to 99 %% after %s, to all after %s; %s of CPU", changes, of(0.5), of(0.99), took[len(took)-1], cpuClock()-wall)
	if of(0.99) > 2*time.Second {
		t.Errorf("a change is known to 99 %% of the nodes after %s, want 2 s at most", of(0.99))
	}

	dead := nodes / 2
	begun, wall = time.Now(), cpuClock()
	c.kill(dead)
	c.eventually(time.Minute, "a node dies", func() string {
		for _, n := range c.all() {
			if l := liveness(n, dead); l != "dead" {
				return fmt.Sprintf("%s holds it %s", nodeID(n.i), l)
			}
		}
		return ""
	})
	t.Logf("a dead node is known to all after %s, %s of CPU", time.Since(begun), cpuClock()-wall)
	// One packet of a hundred is lost: somebody is always suspect somewhere, and nobody dead.
	suspect := 0
	for _, n := range c.all() {
		s := n.Snapshot()
		suspect += len(members(s, spec.PeerSuspect))
		if got := members(s, spec.PeerDead); len(s.Members) != nodes || len(got) != 1 {
			t.Errorf("%s has %d members, of whom %v are dead, want %d and one", nodeID(n.i), len(s.Members), got, nodes)
		}
	}
	t.Logf("%d of %d times one node holds another for suspect", suspect, nodes*nodes)
}

// cpuClock is the processor time that this process has had.
func cpuClock() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &t); err != nil {
		return 0
	}
	return time.Duration(t.Nano()).Round(time.Millisecond)
}
