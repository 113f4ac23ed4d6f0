package gossip

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"

	"github.com/shoalnet/shoal/spec"
)

// nowhere is a transport that is never used.
type nowhere struct{ memberlist.Transport }

func (nowhere) FinalAdvertiseAddr(string, int) (net.IP, int, error) {
	return nodeAddr(1).Addr().AsSlice(), 7946, nil
}

func liveness(n *node, i int) string {
	for _, m := range n.Snapshot().Members {
		if m.Peer.ID == nodeID(i) {
			return m.Liveness.String()
		}
	}
	return "absent"
}

func endpointsOf(n *node, i int) (count int) {
	for _, ep := range n.Snapshot().Endpoints {
		if ep.Node == nodeID(i) {
			count++
		}
	}
	return count
}

// expect gives a condition: all nodes but i see i in a state with so many
// endpoints.
func (c *cluster) expect(i int, state string, endpoints int) func() string {
	return func() string {
		for _, n := range c.all() {
			if n.i == i {
				continue
			}
			if got := liveness(n, i); got != state {
				return fmt.Sprintf("%s sees %s %s, not %s", nodeID(n.i), nodeID(i), got, state)
			}
			if got := endpointsOf(n, i); got != endpoints {
				return fmt.Sprintf("%s sees %d endpoints of %s, not %d", nodeID(n.i), got, nodeID(i), endpoints)
			}
		}
		return ""
	}
}

func TestChangeIsKnownInMilliseconds(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.grow(10)
	var all []time.Duration
	for k := range 40 {
		c.node(k%10+1).put(k, k+1)
		all = append(all, c.eventually(5*time.Second, "change", c.agreed))
	}
	slices.Sort(all)
	t.Logf("known to all 10: median %s, 9th decile %s, worst %s", all[20], all[36], all[39])
	if all[20] > 100*time.Millisecond {
		t.Errorf("the median is %s: that is a gossip interval", all[20])
	}
	for _, n := range c.all() {
		// Dropped is not among them: on a machine that is busy with other things,
		// questions wait behind the checking of signatures, and are asked again.
		if s := n.Stats(); s.Malformed+s.Mismatches+s.EpochBumps+s.Rejected > 0 {
			t.Errorf("%s: %+v", nodeID(n.i), s)
		}
	}
}

func TestLossAndReorder(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.grow(6)
	c.net.SetLoss(0.3)
	c.net.SetDelay(20 * time.Millisecond)
	for k := range 60 {
		n := c.node(k%6 + 1)
		n.put(k, k+1, k+2)
		time.Sleep(5 * time.Millisecond)
	}
	d := c.eventually(20*time.Second, "all changes known with 30 % loss", func() string {
		// Liveness may waver with such loss; the tables must not.
		for _, n := range c.all() {
			for _, o := range c.all() {
				if got := endpointsOf(n, o.i); got != 3 {
					return fmt.Sprintf("%s sees %d endpoints of %s", nodeID(n.i), got, nodeID(o.i))
				}
			}
		}
		return ""
	})
	var gaps uint64
	for _, n := range c.all() {
		gaps += n.Stats().Gaps
	}
	t.Logf("after %s, with %d gaps", d, gaps)
	if gaps == 0 {
		t.Error("no delta came out of order: the test tests nothing")
	}
	c.net.SetLoss(0)
	c.eventually(20*time.Second, "agreed after the loss", c.agreed)
}

func TestBigTable(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.grow(3)
	var eps []spec.Endpoint
	for k := range 5000 {
		eps = append(eps, endpoint(1, k, spec.EndpointActive))
	}
	c.node(1).putAll(eps)
	t.Logf("5000 endpoints known after %s", c.eventually(20*time.Second, "big change", c.agreed))
	if c.node(1).Stats().Oversize == 0 {
		t.Error("no delta was too large for a packet")
	}
	start := time.Now()
	c.start(4, addrs(2)...).put(1)
	c.eventually(20*time.Second, "newcomer has it all", c.agreed)
	t.Logf("newcomer has all after %s", time.Since(start))
	b := (&delegate{c.node(1).Gossip}).LocalState(false)
	if len(b) > 4*64+64 {
		t.Errorf("push/pull carries %d bytes for 4 nodes", len(b))
	}
	c.node(1).putAll(eps[:10])
	c.eventually(20*time.Second, "4990 withdrawn", c.agreed)
}

func TestPartitionAndHeal(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.grow(5)
	c.net.Partition(addrs(1, 2), addrs(3, 4, 5))
	d := c.eventually(20*time.Second, "sides see each other dead", func() string {
		for _, n := range c.all() {
			for _, o := range c.all() {
				if same := (n.i < 3) == (o.i < 3); !same && (liveness(n, o.i) != "dead" || endpointsOf(n, o.i) != 0) {
					return fmt.Sprintf("%s sees %s %s", nodeID(n.i), nodeID(o.i), liveness(n, o.i))
				} else if same && (liveness(n, o.i) != "alive" || endpointsOf(n, o.i) != 1) {
					return fmt.Sprintf("%s sees its friend %s %s", nodeID(n.i), nodeID(o.i), liveness(n, o.i))
				}
			}
		}
		return ""
	})
	t.Logf("dead after %s", d)
	for _, n := range c.all() {
		n.put(7, 8)
	}
	c.net.Heal()
	t.Logf("agreed after %s", c.eventually(20*time.Second, "heals", c.agreed))
}

// memberlist forgets the dead after GossipToTheDeadTime; we must not.
func TestHealAfterMemberlistForgot(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 40 s")
	}
	c := newCluster(t, Tuning{})
	c.grow(3)
	c.net.Partition(addrs(1))
	c.eventually(20*time.Second, "dead", c.expect(1, "dead", 0))
	time.Sleep(34 * time.Second)
	c.node(1).put(3)
	c.net.Heal()
	t.Logf("agreed after %s", c.eventually(20*time.Second, "heals", c.agreed))
}

func TestSuspectIsFastAndKeepsEndpoints(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.grow(4)
	c.net.Partition(addrs(4))
	d := c.eventually(5*time.Second, "suspect", c.expect(4, "suspect", 1))
	t.Logf("suspect after %s", d)
	c.net.Heal()
	c.eventually(5*time.Second, "alive again", c.agreed)
}

func TestDeadThenBackRestoresAll(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.grow(4)
	c.net.Partition(addrs(4))
	t.Logf("dead after %s", c.eventually(15*time.Second, "dead", c.expect(4, "dead", 0)))
	c.net.Heal()
	t.Logf("back after %s", c.eventually(15*time.Second, "back", c.agreed))
}

// Deaths of many at once are found side by side, by one survivor as well: the last of
// them not long after the first.
func TestManyDieAtOnce(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.grow(8)
	n := c.node(1)
	var first time.Duration
	start := time.Now()
	c.net.Partition(addrs(1))
	c.eventually(60*time.Second, "all dead", func() string {
		dead := 0
		for i := 2; i <= 8; i++ {
			if liveness(n, i) == "dead" && endpointsOf(n, i) == 0 {
				dead++
			}
		}
		if dead > 0 && first == 0 {
			first = time.Since(start)
		}
		if dead < 7 {
			return fmt.Sprintf("%d of 7 are dead", dead)
		}
		return ""
	})
	last := time.Since(start)
	t.Logf("the first dead after %s, the last after %s", first, last)
	if last > 3*first/2 {
		t.Errorf("dead one after the other: the first after %s, the last after %s", first, last)
	}
	c.net.Heal()
	c.eventually(15*time.Second, "back", c.agreed)
}

// A node that one other does not reach is accused by it once, and says itself that it is
// there, by way of the rest.
func TestAccusedByOne(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.grow(4)
	c.net.Cut(nodeAddr(1), nodeAddr(4))
	c.net.Cut(nodeAddr(4), nodeAddr(1))
	n := c.node(1)
	c.eventually(10*time.Second, "accused", func() string {
		if n.Stats().Accused == 0 {
			return "not yet"
		}
		return ""
	})
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		for i := 1; i <= 3; i++ {
			if l, e := liveness(c.node(i), 4), endpointsOf(c.node(i), 4); l == "dead" || e != 1 {
				t.Fatalf("node %d has node 4 for %s, with %d endpoints", i, l, e)
			}
		}
	}
	if got := n.Stats().Accused; got > 2 { // one may be of a moment without a processor
		t.Errorf("accused %d times in five seconds", got)
	}
	c.net.Heal()
	c.eventually(5*time.Second, "all well", c.agreed)
}

// memberlist's verdict alone does not take a node's endpoints away while it
// answers.
func TestDeadButAnsweringIsHeld(t *testing.T) {
	c := newCluster(t, Tuning{RejoinInterval: time.Hour})
	c.grow(3)
	n := c.node(1)
	d := &delegate{n.Gossip}
	other := &memberlist.Node{Name: nodeID(2), Addr: nodeAddr(2).Addr().AsSlice(), Port: 7946, Meta: c.node(2).metaRaw}
	d.NotifyLeave(other)
	c.eventually(2*time.Second, "asked itself", func() string {
		if e := endpointsOf(n, 2); e != 1 {
			t.Fatalf("held node has %d endpoints", e)
		}
		if l := liveness(n, 2); l != "alive" {
			return l
		}
		return ""
	})
	for end := time.Now().Add(time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if l, e := liveness(n, 2), endpointsOf(n, 2); l != "alive" || e != 1 {
			t.Fatalf("held node is %s with %d endpoints", l, e)
		}
	}
	if n.Stats().Held != 1 {
		t.Error("not counted")
	}
	c.net.Cut(nodeAddr(2), nodeAddr(1))
	c.eventually(3*time.Second, "dead once it is silent", func() string {
		if l, e := liveness(n, 2), endpointsOf(n, 2); l != "dead" || e != 0 {
			return l
		}
		return ""
	})
	c.net.Heal()
	d.NotifyJoin(other)
	c.eventually(3*time.Second, "restored", c.agreed)
}

// A node whose machine is there without its agent keeps its endpoints, as
// suspect, until the machine is gone, the agent is back, or its time is up.
func TestAnAgentWithoutWhichTheMachineGoesOn(t *testing.T) {
	var there atomic.Bool
	there.Store(true)
	for _, tc := range []struct {
		name string
		end  func(c *cluster)
		want string
		n    int
	}{
		{"machine gone", func(*cluster) { there.Store(false) }, "dead", 0},
		{"agent back", func(c *cluster) { c.start(3, nodeAddr(1)); c.node(3).SetEndpoints(nil) }, "alive", 0},
		{"time up", func(*cluster) {}, "dead", 0},
	} {
		there.Store(true)
		tune := Tuning{OrphanAge: time.Hour}
		if tc.name == "time up" {
			tune.OrphanAge = 3 * time.Second
		}
		c := newCluster(t, tune)
		c.present = func(_ context.Context, a netip.AddrPort) bool { return a == nodeAddr(3) && there.Load() }
		c.grow(3)
		c.kill(3)
		// Long enough for memberlist to give it up: another without a machine is.
		c.eventually(15*time.Second, "orphaned", func() string {
			for _, n := range c.all() {
				n.Gossip.mu.Lock()
				m := n.members[nodeID(3)]
				up, orphan := m.up, m.orphaned
				n.Gossip.mu.Unlock()
				if up || !orphan {
					return fmt.Sprintf("%s: up %t, orphaned %t", nodeID(n.i), up, orphan)
				}
			}
			return ""
		})
		if msg := c.expect(3, "suspect", 1)(); msg != "" && tc.name != "time up" {
			t.Errorf("%s: %s", tc.name, msg)
		}
		tc.end(c)
		c.eventually(20*time.Second, tc.name, c.expect(3, tc.want, tc.n))
		away := func(want int) func() string {
			return func() string {
				for _, n := range c.all() {
					s := n.Snapshot()
					i := slices.IndexFunc(s.Members, func(m Member) bool { return m.ID == nodeID(3) })
					if m := s.Members[i]; m.Away != (want > 0) || len(s.Away) != want {
						return fmt.Sprintf("%s: away %t, with %d endpoints", nodeID(n.i), m.Away, len(s.Away))
					}
				}
				return ""
			}
		}
		if tc.name == "time up" {
			c.eventually(3*time.Second, "away", away(1))
			there.Store(false)
		}
		c.eventually(20*time.Second, "not away", away(0))
		c.close()
	}
}

// A machine that misses a look, or all but one in a row, is not dead for that: it is busy.
func TestAMachineThatMissesALook(t *testing.T) {
	c := newCluster(t, Tuning{OrphanAge: time.Hour})
	var looks atomic.Int64
	c.present = func(_ context.Context, a netip.AddrPort) bool {
		return looks.Add(1)%4 == 0
	}
	c.grow(2)
	c.kill(2)
	n := c.node(1)
	c.eventually(15*time.Second, "orphaned", func() string {
		n.Gossip.mu.Lock()
		defer n.Gossip.mu.Unlock()
		if m := n.members[nodeID(2)]; m.up || !m.orphaned {
			return fmt.Sprintf("up %t, orphaned %t", m.up, m.orphaned)
		}
		return ""
	})
	was := looks.Load()
	for looks.Load() < was+12 {
		if msg := c.expect(2, "suspect", 1)(); msg != "" {
			t.Fatalf("after %d looks: %s", looks.Load()-was, msg)
		}
		time.Sleep(10 * time.Millisecond)
	}
	c.start(2, nodeAddr(1)).put(1)
	c.eventually(15*time.Second, "back", c.expect(2, "alive", 1))
	c.eventually(15*time.Second, "nobody looks any more", func() string {
		n.Gossip.mu.Lock()
		defer n.Gossip.mu.Unlock()
		if n.members[nodeID(2)].looking {
			return "somebody looks"
		}
		return ""
	})
}

func TestRestartKeepsEndpointsUntilItSpeaks(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.grow(4)
	c.kill(3)
	n := c.start(3) // finds the others by its peer list
	c.eventually(10*time.Second, "synced", func() string {
		if s := n.Snapshot(); !s.Synced || len(members(s, spec.PeerAlive)) != 4 {
			return "not yet"
		}
		return ""
	})
	if got := n.Snapshot(); got.Members[2].Epoch != 2 {
		t.Errorf("epoch is %d after one restart", got.Members[2].Epoch)
	}
	for range 50 {
		if wrong := c.expect(3, "alive", 1)(); wrong != "" && !strings.Contains(wrong, "suspect") {
			t.Fatalf("before it said anything: %s", wrong)
		}
		time.Sleep(10 * time.Millisecond)
	}
	n.put(5, 6)
	d := c.eventually(10*time.Second, "replaced", c.agreed)
	t.Logf("replaced after %s", d)
	c.kill(3)
	c.start(3).put()
	c.eventually(10*time.Second, "emptied", c.agreed)
}

func TestEpochLost(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.grow(3)
	for range 3 {
		c.kill(2)
		c.start(2, addrs(1)...).put(1, 2, 3)
		c.eventually(10*time.Second, "restart", c.agreed)
	}
	c.kill(2)
	if err := os.RemoveAll(filepath.Join(c.dir, nodeID(2), "gossip")); err != nil {
		t.Fatal(err)
	}
	n := c.start(2, addrs(1)...)
	n.put(9)
	c.eventually(10*time.Second, "epoch moved past the lost one", c.agreed)
	if s := n.Stats(); s.EpochBumps == 0 {
		t.Error("no bump")
	}
	if e := n.Snapshot().Members[1].Epoch; e < 5 {
		t.Errorf("epoch is %d", e)
	}
	b, err := os.ReadFile(filepath.Join(c.dir, nodeID(2), "gossip", "epoch"))
	if err != nil || strings.TrimSpace(string(b)) != fmt.Sprint(n.Snapshot().Members[1].Epoch) {
		t.Errorf("epoch on disk is %q, %v", b, err)
	}
}

// The disk was lost, and the new process is at the same epoch, with less metadata
// signed than the one before: to the others all that it says of itself is old.
func TestMetadataLost(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.grow(3)
	n := c.node(2)
	for mtu := 1400; mtu < 1405; mtu++ {
		n.SetPath(mtu, true)
		c.eventually(10*time.Second, "metadata", func() string {
			for _, o := range []int{1, 3} {
				for _, m := range c.node(o).Snapshot().Members {
					if m.Peer.ID == nodeID(2) && m.Peer.MTU != mtu {
						return fmt.Sprintf("node %d has MTU %d, want %d", o, m.Peer.MTU, mtu)
					}
				}
			}
			return ""
		})
	}
	c.kill(2)
	c.wipe(2)
	c.eventually(20*time.Second, "dead", func() string {
		for _, o := range []int{1, 3} {
			if got := members(c.node(o).Snapshot(), spec.PeerDead); len(got) != 1 {
				return fmt.Sprintf("node %d holds %v for dead", o, got)
			}
		}
		return ""
	})
	n = c.start(2, addrs(1, 3)...)
	n.put(1, 2, 3)
	n.put(1, 2)
	n.put(1)
	c.eventually(20*time.Second, "alive again", c.agreed)
}

// The disk was lost and the new process happens to be at the same epoch and
// sequence, with other content.
func TestEpochLostSamePlace(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.grow(3)
	c.kill(2)
	if err := os.RemoveAll(filepath.Join(c.dir, nodeID(2), "gossip")); err != nil {
		t.Fatal(err)
	}
	c.start(2, addrs(1)...).put(9)
	c.eventually(10*time.Second, "different content is noticed", c.agreed)
}

// The disk was lost, and the new process is past where the one before was, at the same
// epoch: what takes a reader from there to here does not lead there from what he has.
func TestEpochLostAndOvertaken(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.grow(3)
	c.kill(2)
	if err := os.RemoveAll(filepath.Join(c.dir, nodeID(2), "gossip")); err != nil {
		t.Fatal(err)
	}
	// The others hear only its digest: what it says while it is alone they miss.
	c.net.Partition(addrs(2))
	n := c.start(2)
	for i := range 10 {
		n.put(i + 20)
	}
	if seq := n.Snapshot().Members[0].Seq; seq < 10 {
		t.Fatalf("it is at %d, which is not past what the others have", seq)
	}
	c.net.Heal()
	n.Join(addrPorts(nodeAddr(1)))
	c.eventually(20*time.Second, "all of it is asked for", c.agreed)
}

func TestAddressChange(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.grow(4)
	c.kill(2)
	at := netip.MustParseAddrPort("10.0.9.9:7000")
	c.startAt(2, at).put(4)
	d := c.eventually(30*time.Second, "back at another address", func() string {
		if wrong := c.agreed(); wrong != "" {
			return wrong
		}
		for _, n := range c.all() {
			for _, m := range n.Snapshot().Members {
				if m.Peer.ID == nodeID(2) && (m.Addr != at.Addr() || m.GossipPort != 7000) {
					return nodeID(n.i) + " has the old address"
				}
			}
		}
		return ""
	})
	t.Logf("after %s", d)
}

func TestLeave(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.grow(4)
	n := c.node(4)
	start := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- n.Leave(ctx) }()
	d := c.eventually(3*time.Second, "gone", c.expect(4, "absent", 0))
	if err := <-done; err != nil {
		t.Errorf("leave: %v", err)
	}
	t.Logf("gone after %s, Leave took %s", d, time.Since(start))
	if d > time.Second {
		t.Errorf("it took %s", d)
	}
	if err := n.Leave(ctx); err != nil {
		t.Errorf("leaving again: %v", err)
	}
	n.put(1) // says nothing any more
	c.kill(4)
	for end := time.Now().Add(2500 * time.Millisecond); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if wrong := c.expect(4, "absent", 0)(); wrong != "" {
			t.Fatalf("after it left: %s", wrong)
		}
	}
	c.start(4, addrs(1)...).put(2)
	c.eventually(10*time.Second, "back", c.agreed)
}

func TestForget(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.grow(4)
	c.kill(4)
	c.eventually(15*time.Second, "dead", c.expect(4, "dead", 0))
	for _, n := range c.all() {
		n.Forget(nodeID(4))
		n.Forget("nobody")
	}
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if wrong := c.expect(4, "absent", 0)(); wrong != "" {
			t.Fatalf("after it was forgotten: %s", wrong)
		}
	}
	b, err := os.ReadFile(filepath.Join(c.dir, nodeID(1), "gossip", "peers.json"))
	if err != nil || strings.Contains(string(b), nodeAddr(4).String()) || !strings.Contains(string(b), nodeAddr(2).String()) {
		t.Errorf("peer list: %s, %v", b, err)
	}
}

func TestForgetOneThatStillTalks(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.grow(3)
	for _, n := range c.all() {
		n.Forget(nodeID(3)) // of itself: nothing
	}
	c.node(3).put(1, 2)
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if wrong := c.expect(3, "absent", 0)(); wrong != "" {
			t.Fatalf("after it was forgotten: %s", wrong)
		}
	}
	c.kill(3)
	c.start(3).put(5)
	c.eventually(20*time.Second, "back with a higher epoch", c.agreed)
}

func TestBarrier(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.grow(5)
	n := c.node(1)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c.node(3).setHold(true)
	c.node(5).setHold(true)
	ep := endpoint(1, 1, spec.EndpointDraining)
	n.putAll([]spec.Endpoint{ep})

	short, end := context.WithTimeout(ctx, 400*time.Millisecond)
	defer end()
	missing, err := n.Barrier(short)
	if !slices.Equal(missing, []string{nodeID(3), nodeID(5)}) || !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("with two that don't apply: %v, %v", missing, err)
	}

	// One applies, one dies: the barrier ends.
	type result struct {
		missing []string
		err     error
	}
	done := make(chan result, 1)
	go func() {
		missing, err := n.Barrier(ctx)
		done <- result{missing, err}
	}()
	select {
	case r := <-done:
		t.Fatalf("passed without them: %v", r)
	case <-time.After(100 * time.Millisecond):
	}
	c.node(3).setHold(false)
	c.kill(5)
	if r := <-done; r.err != nil || r.missing != nil {
		t.Fatalf("after one applied and one died: %v", r)
	}

	var all []time.Duration
	for k := range 30 {
		n.put(k)
		start := time.Now()
		if missing, err := n.Barrier(ctx); err != nil {
			t.Fatalf("barrier: %v, %v", missing, err)
		}
		all = append(all, time.Since(start))
		// Passed means: everybody's snapshot has it.
		if wrong := c.expect(1, "alive", 1)(); wrong != "" {
			t.Fatalf("after the barrier: %s", wrong)
		}
	}
	slices.Sort(all)
	t.Logf("set and acknowledged by 3: median %s, worst %s", all[15], all[29])
}

func TestBarrierAgainstLoss(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.grow(4)
	c.net.SetLoss(0.4)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for k := range 10 {
		n := c.node(k%4 + 1)
		n.put(k)
		if missing, err := n.Barrier(ctx); err != nil {
			t.Fatalf("barrier %d: %v, %v", k, missing, err)
		}
		for _, o := range c.all() {
			if got := endpointsOf(o, n.i); got != 1 && liveness(o, n.i) != "dead" {
				t.Fatalf("%s has %d endpoints", nodeID(o.i), got)
			}
		}
	}
}

// A peer that changes all the time must not keep another's barrier waiting.
func TestBarrierUnderChurn(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.grow(3)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := 1; i <= 3; i++ {
		wg.Go(func() {
			for k := 0; ; k++ {
				select {
				case <-stop:
					return
				case <-time.After(time.Millisecond):
					c.node(i).put(k, k+1)
				}
			}
		})
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	for range 20 {
		if missing, err := c.node(1).Barrier(ctx); err != nil {
			t.Errorf("barrier: %v, %v", missing, err)
			break
		}
	}
	close(stop)
	wg.Wait()
	c.eventually(10*time.Second, "agreed", c.agreed)
}

func TestBarrierAlone(t *testing.T) {
	c := newCluster(t, Tuning{})
	n := c.start(1)
	n.put(1)
	if missing, err := n.Barrier(t.Context()); missing != nil || err != nil {
		t.Errorf("alone: %v, %v", missing, err)
	}
}

func TestSynced(t *testing.T) {
	c := newCluster(t, Tuning{})
	n := c.start(1)
	if n.Snapshot().Synced {
		t.Error("synced before it ran")
	}
	t.Logf("alone: %s", c.eventually(time.Second, "synced without peers", c.agreed))
	off := newCluster(t, Tuning{})
	off.assign(77, nodeAddr(77), newSigner().Public())
	n = off.start(2)
	d := c.eventually(10*time.Second, "synced without reachable peers", func() string {
		if !n.Snapshot().Synced {
			return "no"
		}
		return ""
	})
	t.Logf("no peer answers: %s", d)
	if d < 2500*time.Millisecond {
		t.Errorf("synced after %s although it has a peer", d)
	}
	// With a peer: synced means complete.
	var eps []spec.Endpoint
	for k := range 3000 {
		eps = append(eps, endpoint(1, k, spec.EndpointActive))
	}
	c.node(1).putAll(eps)
	n = c.start(3, addrs(1)...)
	c.eventually(5*time.Second, "synced", func() string {
		s := n.Snapshot()
		if !s.Synced {
			return "no"
		}
		if len(s.Endpoints) != 3000 {
			t.Fatalf("synced with %d of 3000 endpoints", len(s.Endpoints))
		}
		return ""
	})
}

func TestOtherClusterIsNotHeard(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.grow(2)
	tr, err := c.net.Bind(nodeAddr(9))
	if err != nil {
		t.Fatal(err)
	}
	g, err := Open(Config{NodeID: nodeID(9), Name: "n9", Number: 9, Cluster: "othercluster", Addr: nodeAddr(9).Addr(), Port: 7946, DataDir: t.TempDir(), Log: c.log, Transport: tr,
		Keys: c.ring, Signer: c.signer(9)})
	if err != nil {
		t.Fatal(err)
	}
	c.assign(9, nodeAddr(9), c.signer(9).Public())
	g.SetDirectory(c.directory())
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	g.Join(addrs(1, 2))
	c.node(1).Join(addrs(9))
	g.SetEndpoints([]spec.Endpoint{endpoint(9, 1, spec.EndpointActive)})
	time.Sleep(2 * time.Second)
	if wrong := c.agreed(); wrong != "" {
		t.Error(wrong)
	}
	if s := g.Snapshot(); len(s.Members) != 1 {
		t.Errorf("it sees %v", s.Members)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// Who a node is, the managers say.
func TestDirectoryNamesTheMembers(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.grow(3)
	c.node(2).SetMeta("n2", 42, spec.RoleManager)
	c.mu.Lock()
	info := c.says[nodeID(2)]
	info.Number, info.Role, info.Name = 42, spec.RoleManager, "n2"
	c.says[nodeID(2)] = info
	c.mu.Unlock()
	c.tell()
	for _, n := range c.all() {
		m := n.Snapshot().Members[1]
		want := Member{Peer: spec.Peer{ID: nodeID(2), Name: "n2", Number: 42, Addr: nodeAddr(2).Addr(), ControlPort: 7947, GossipPort: 7946}, Role: spec.RoleManager, Epoch: 1, Seq: m.Seq}
		if m != want {
			t.Errorf("%s has %+v", nodeID(n.i), m)
		}
	}
}

func TestSnapshotIsSharedSortedAndImmutable(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.grow(3)
	n := c.node(1)
	a := n.Snapshot()
	if b := n.Snapshot(); a != b {
		t.Error("made twice for one revision")
	}
	eps := []spec.Endpoint{endpoint(1, 5, spec.EndpointActive), endpoint(1, 2, spec.EndpointActive)}
	n.SetEndpoints(eps)
	eps[0].Addrs[0] = netip.MustParseAddr("192.0.2.1") // the caller's own
	b := n.Snapshot()
	if b.Rev <= a.Rev || len(a.Endpoints) != 3 {
		t.Errorf("revision %d after %d; the old one has %d endpoints", b.Rev, a.Rev, len(a.Endpoints))
	}
	if !slices.IsSortedFunc(b.Endpoints, func(x, y spec.Endpoint) int { return strings.Compare(x.Key(), y.Key()) }) {
		t.Error("endpoints are not sorted")
	}
	for _, ep := range b.Endpoints {
		if ep.Addrs[0] == eps[0].Addrs[0] {
			t.Error("the caller's slice is used")
		}
	}
	rev := n.Snapshot().Rev
	n.SetEndpoints([]spec.Endpoint{endpoint(1, 2, spec.EndpointActive), endpoint(1, 5, spec.EndpointActive)})
	if now := n.Snapshot(); now.Rev != rev && now.Members[0].Seq != b.Members[0].Seq {
		t.Error("setting the same again made a change")
	}
}

func TestRejectedEndpointDoesNotStopOthers(t *testing.T) {
	c := newCluster(t, Tuning{})
	n := c.start(1)
	bad := endpoint(1, 1, spec.EndpointActive)
	bad.Hostname = strings.Repeat("x", maxString+1)
	n.SetEndpoints([]spec.Endpoint{bad, endpoint(1, 2, spec.EndpointActive)})
	if s := n.Snapshot(); len(s.Endpoints) != 1 || n.Stats().Rejected != 1 {
		t.Errorf("%d endpoints, %d rejected", len(s.Endpoints), n.Stats().Rejected)
	}
}

func TestMalformedIsCountedAndDropped(t *testing.T) {
	c := newCluster(t, Tuning{})
	c.grow(2)
	d := &delegate{c.node(1).Gossip}
	for _, b := range [][]byte{nil, {0}, {wireVersion}, {wireVersion, byte(msgDelta)}, []byte("garbage of some length")} {
		d.NotifyMsg(b)
		d.MergeRemoteState(b, true)
	}
	if s := c.node(1).Stats(); s.Malformed != 6 || s.Foreign != 4 {
		t.Errorf("%d malformed, %d foreign", s.Malformed, s.Foreign)
	}
	if wrong := c.agreed(); wrong != "" {
		t.Error(wrong)
	}
}

// With every processor busy for seconds, under the race detector, nobody is
// declared dead.
func TestNoFalseDeathOnABusyMachine(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 10 s")
	}
	c := newCluster(t, Tuning{})
	var dead atomic.Int64
	c.log = slog.New(deathCounter{slog.DiscardHandler, &dead})
	c.grow(7)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 * runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			x := 0
			for {
				select {
				case <-stop:
					return
				default:
					for i := range 100000 {
						x += i
					}
				}
			}
		})
	}
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		for i := 1; i <= 7; i++ {
			c.node(i).put(int(time.Now().UnixMilli()) & 255)
		}
	}
	close(stop)
	wg.Wait()
	c.eventually(10*time.Second, "agreed", c.agreed)
	var lost, pings uint64
	for _, n := range c.all() {
		lost, pings = lost+n.Stats().PingsLost, pings+n.Stats().Pings
	}
	t.Logf("%d of %d pings lost, %d deaths", lost, pings, dead.Load())
	if n := dead.Load(); n > 0 {
		t.Errorf("%d times a living node was declared dead", n)
	}
}

type deathCounter struct {
	slog.Handler
	n *atomic.Int64
}

func (d deathCounter) Enabled(context.Context, slog.Level) bool { return true }
func (d deathCounter) WithAttrs([]slog.Attr) slog.Handler       { return d }
func (d deathCounter) Handle(_ context.Context, r slog.Record) error {
	if r.Message == "node is dead" {
		d.n.Add(1)
	}
	return nil
}

func Test25Nodes(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 15 s")
	}
	// Each pings all others: with the usual intervals the detectors of 25 nodes
	// alone are more than one processor does under the race detector.
	c := newCluster(t, Tuning{PingInterval: time.Second, ProbeInterval: 2 * time.Second, ProbeTimeout: 900 * time.Millisecond})
	start := time.Now()
	c.grow(25)
	t.Logf("25 nodes agree after %s", time.Since(start))
	var all []time.Duration
	for k := range 20 {
		for i := 1; i <= 5; i++ {
			c.node((k*5+i)%25+1).put(k, k+i)
		}
		all = append(all, c.eventually(time.Minute, "changes", c.agreed))
	}
	slices.Sort(all)
	t.Logf("5 changes at a time known to all: median %s, worst %s", all[10], all[19])
	start = time.Now()
	c.kill(13)
	c.kill(17)
	c.eventually(time.Minute, "two dead", func() string {
		for _, n := range c.all() {
			if liveness(n, 13) != "dead" || liveness(n, 17) != "dead" {
				return nodeID(n.i) + " holds them alive"
			}
		}
		return ""
	})
	t.Logf("two dead after %s", time.Since(start))
	c.start(13).put(1)
	c.start(17).put(1)
	c.eventually(time.Minute, "back", c.agreed)
}

// Beyond DirectPeers changes reach the rest by rumour and digest.
func TestMoreThanDirectPeers(t *testing.T) {
	c := newCluster(t, Tuning{DirectPeers: 2})
	c.grow(9)
	var all []time.Duration
	for k := range 10 {
		c.node(k%9 + 1).put(k)
		all = append(all, c.eventually(10*time.Second, "change", c.agreed))
	}
	slices.Sort(all)
	t.Logf("median %s, worst %s", all[5], all[9])
}

// A digest too large for a packet goes as a sum first.
func TestDigestSum(t *testing.T) {
	c := newCluster(t, Tuning{UDPSize: 450, DirectPeers: 1, GossipInterval: time.Hour, PushPullInterval: time.Hour, DigestInterval: 100 * time.Millisecond})
	for i := 1; i <= 8; i++ {
		c.start(i, addrs(1)...).put(1, 2)
	}
	// No gossip: metadata and members come by joins only.
	for i := 1; i <= 8; i++ {
		c.node(i).Join(addrs(1, 2, 3, 4, 5, 6, 7, 8))
	}
	c.eventually(20*time.Second, "formed", c.agreed)
	for k := range 5 {
		c.node(k+1).put(k, 10, 11, 12)
		c.eventually(20*time.Second, "digests alone carry it", c.agreed)
	}
}

func TestRunTwiceAndClose(t *testing.T) {
	c := newCluster(t, Tuning{})
	n := c.start(1)
	c.eventually(time.Second, "runs", c.agreed)
	if err := n.Run(t.Context()); err == nil {
		t.Error("ran twice")
	}
	g, err := Open(Config{NodeID: "x", Cluster: "c", Addr: netip.MustParseAddr("127.0.0.1"), DataDir: t.TempDir(), Keys: testRing, Signer: newSigner()})
	if err != nil {
		t.Fatal(err)
	}
	at := g.Addr()
	g.Close()
	g.Close()
	if err := g.Run(t.Context()); err == nil {
		t.Error("ran after Close")
	}
	ln, err := net.Listen("tcp", at.String())
	if err != nil {
		t.Errorf("the port is still taken after Close: %v", err)
	} else {
		ln.Close()
	}
}

// Every method may be called in any state.
func TestMethodsWithoutRun(t *testing.T) {
	g, err := Open(Config{NodeID: "x", Name: "x", Cluster: "c", Addr: netip.MustParseAddr("127.0.0.1"), DataDir: t.TempDir(), Keys: testRing, Signer: newSigner()})
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	g.Join(addrs(1, 2))
	g.SetEndpoints([]spec.Endpoint{endpoint(1, 1, spec.EndpointActive)})
	g.SetMeta("n3", 3, spec.RoleManager)
	g.Forget("y")
	g.Applied(99)
	if m, err := g.Barrier(t.Context()); m != nil || err != nil {
		t.Errorf("barrier: %v, %v", m, err)
	}
	if s := g.Snapshot(); len(s.Members) != 1 || len(s.Endpoints) != 1 || s.Members[0].Number != 3 {
		t.Errorf("%+v", s)
	}
	g.Stats()
	if err := g.Leave(t.Context()); err != nil {
		t.Errorf("leave: %v", err)
	}
}
