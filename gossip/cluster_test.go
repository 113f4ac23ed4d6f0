package gossip

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/shoalnet/shoal/gossip/gossiptest"
	"github.com/shoalnet/shoal/spec"
)

// TestMain looks for goroutines left behind. memberlist's own last ones end up
// to a slowed-down probe interval (4 × 0.5 s) after Shutdown.
func TestMain(m *testing.M) {
	code := m.Run()
	if code == 0 {
		var err error
		for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
			if err = goleak.Find(); err == nil {
				break
			}
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "goroutines left behind:", err)
			code = 1
		}
	}
	os.Exit(code)
}

// tb is what testing.T and rapid.T have in common.
type tb interface {
	Helper()
	Fatalf(string, ...any)
	Errorf(string, ...any)
	Logf(string, ...any)
}

// cluster is some nodes on a network in memory.
type cluster struct {
	tb
	net   *gossiptest.Network
	dir   string
	tune  Tuning
	mu    sync.Mutex
	nodes map[int]*node
	log   *slog.Logger
	ring  Keyring
	keys  map[int]crypto.Signer
	says  map[string]NodeInfo // what the managers say
	// present, if set, is Config.Present of every node.
	present func(context.Context, netip.AddrPort) bool
}

// node is one process of a node.
type node struct {
	*Gossip
	i      int
	cancel context.CancelFunc
	done   chan struct{}
	stop   chan struct{} // ends the consumer
	gone   chan struct{} // it has ended

	mu   sync.Mutex
	want map[string]spec.Endpoint // what was last set
	set  bool
	// hold keeps the consumer from reporting Applied.
	hold bool
}

func nodeID(i int) string { return fmt.Sprintf("node%02d", i) }

// testRing is a keyring of one key.
var testRing = Keyring{Use: 1, Keys: []Key{{ID: 1, Secret: bytes.Repeat([]byte{7}, KeySize)}}}

func newSigner() crypto.Signer {
	_, k, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		panic(err)
	}
	return k
}

// signer is node i's key.
func (c *cluster) signer(i int) crypto.Signer {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.keys[i] == nil {
		c.keys[i] = newSigner()
	}
	return c.keys[i]
}

// assign has the managers tell all nodes that node i is at an address, with
// these keys.
func (c *cluster) assign(i int, at netip.AddrPort, keys ...crypto.PublicKey) {
	c.mu.Lock()
	c.says[nodeID(i)] = NodeInfo{Name: "n" + fmt.Sprint(i), Role: spec.RoleWorker, Number: i, Addr: at.Addr(), ControlPort: 7947, GossipPort: int(at.Port()), Keys: keys}
	c.mu.Unlock()
	c.tell()
}

// unassign has the managers remove node i.
func (c *cluster) unassign(i int) {
	c.mu.Lock()
	delete(c.says, nodeID(i))
	c.mu.Unlock()
	c.tell()
}

func (c *cluster) directory() Directory {
	c.mu.Lock()
	defer c.mu.Unlock()
	return Directory{Nodes: maps.Clone(c.says)}
}

func (c *cluster) tell() {
	d := c.directory()
	for _, n := range c.all() {
		n.SetDirectory(d)
	}
}

func nodeAddr(i int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 7946)
}

func addrs(is ...int) (out []netip.AddrPort) {
	for _, i := range is {
		out = append(out, nodeAddr(i))
	}
	return out
}

// newCluster makes a cluster without nodes. It is closed by t's cleanup.
func newCluster(t testing.TB, tune Tuning) *cluster {
	c := &cluster{tb: t, net: gossiptest.NewNetwork(1), dir: t.TempDir(), tune: tune, nodes: map[int]*node{}, ring: testRing, keys: map[int]crypto.Signer{}, says: map[string]NodeInfo{}}
	c.log = slog.New(slog.DiscardHandler)
	if os.Getenv("GOSSIP_LOG") != "" {
		c.log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelInfo}))
	}
	t.Cleanup(c.close)
	return c
}

func (c *cluster) close() {
	c.net.Heal()
	var wg sync.WaitGroup
	for _, n := range c.all() {
		wg.Go(func() { c.kill(n.i) })
	}
	wg.Wait()
}

func (c *cluster) all() []*node {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []*node
	for _, n := range c.nodes {
		out = append(out, n)
	}
	slices.SortFunc(out, func(a, b *node) int { return a.i - b.i })
	return out
}

func (c *cluster) node(i int) *node {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.nodes[i]
}

// start runs node i at its usual address, or at another.
func (c *cluster) start(i int, join ...netip.AddrPort) *node {
	return c.startAt(i, nodeAddr(i), join...)
}

func (c *cluster) startAt(i int, at netip.AddrPort, join ...netip.AddrPort) *node {
	c.Helper()
	n := c.run(i, at, nil)
	c.assign(i, at, c.signer(i).Public())
	if len(join) > 0 {
		n.Join(join)
	}
	return n
}

// startAll runs nodes 1 to n at once, each with one endpoint and with all of them in
// its directory, as those of a cluster that was there before are. seen is called with
// each change that a node hears of.
func (c *cluster) startAll(n int, seen func(*node)) {
	c.Helper()
	c.mu.Lock()
	for i := 1; i <= n; i++ {
		c.keys[i] = newSigner()
		at := nodeAddr(i)
		c.says[nodeID(i)] = NodeInfo{Name: "n" + fmt.Sprint(i), Role: spec.RoleWorker, Number: i, Addr: at.Addr(), ControlPort: 7947, GossipPort: int(at.Port()), Keys: []crypto.PublicKey{c.keys[i].Public()}}
	}
	c.mu.Unlock()
	d := c.directory()
	for i := 1; i <= n; i++ {
		nd := c.run(i, nodeAddr(i), seen)
		nd.SetDirectory(d)
		nd.put(1)
		nd.Join(addrs(1))
	}
}

// run runs node i, of which the managers have not told yet.
func (c *cluster) run(i int, at netip.AddrPort, seen func(*node)) *node {
	c.Helper()
	tr, err := c.net.Bind(at)
	if err != nil {
		c.Fatalf("bind: %v", err)
	}
	g, err := Open(Config{
		NodeID: nodeID(i), Name: "n" + fmt.Sprint(i), Number: i, Role: spec.RoleWorker, Cluster: "testcluster", Addr: at.Addr(), Port: int(at.Port()),
		Keys: c.ring, Signer: c.signer(i),
		ControlPort: 7947, DataDir: filepath.Join(c.dir, nodeID(i)), Log: c.log.With("on", nodeID(i)), Transport: tr, Tuning: c.tune, Present: c.present,
	})
	if err != nil {
		c.Fatalf("open: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	n := &node{Gossip: g, i: i, cancel: cancel, done: make(chan struct{}), stop: make(chan struct{}), gone: make(chan struct{})}
	go func() {
		defer close(n.done)
		if err := g.Run(ctx); err != nil {
			c.Errorf("run: %v", err)
		}
	}()
	go n.consume(seen)
	c.mu.Lock()
	c.nodes[i] = n
	c.mu.Unlock()
	return n
}

// consume plays the data plane.
func (n *node) consume(seen func(*node)) {
	defer close(n.gone)
	for {
		select {
		case <-n.stop:
			return
		case <-n.Changed():
			n.apply()
			if seen != nil {
				seen(n)
			}
		}
	}
}

func (n *node) apply() {
	// One at a time with setHold: a consumer that saw no hold, and was then
	// not scheduled, must not report what came after the hold.
	n.mu.Lock()
	defer n.mu.Unlock()
	if s := n.Snapshot(); !n.hold {
		n.Applied(s.Rev)
	}
}

func (n *node) setHold(v bool) {
	n.mu.Lock()
	n.hold = v
	n.mu.Unlock()
	n.apply()
}

// kill ends node i as a crash would: nothing is said.
func (c *cluster) kill(i int) {
	c.mu.Lock()
	n := c.nodes[i]
	delete(c.nodes, i)
	c.mu.Unlock()
	n.cancel()
	<-n.done
	close(n.stop)
	<-n.gone
}

func endpoint(i, k int, state spec.EndpointState) spec.Endpoint {
	return spec.Endpoint{
		Task: fmt.Sprintf("task%02d%06d", i, k), TaskName: fmt.Sprintf("web.%d.task%02d%06d", k, i, k), Service: "svcsvcsvcsvc", Slot: k, Network: "netnetnetnet",
		Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, byte(i), byte(k >> 8), byte(k)})}, State: state,
	}
}

// put sets endpoints k of this node to active, all others are withdrawn.
func (n *node) put(ks ...int) {
	var eps []spec.Endpoint
	for _, k := range ks {
		eps = append(eps, endpoint(n.i, k, spec.EndpointActive))
	}
	n.putAll(eps)
}

func (n *node) putAll(eps []spec.Endpoint) {
	n.mu.Lock()
	n.want, n.set = map[string]spec.Endpoint{}, true
	for _, ep := range eps {
		ep.Node = nodeID(n.i)
		n.want[ep.Key()] = ep
	}
	n.mu.Unlock()
	n.SetEndpoints(eps)
}

// eventually waits for a condition; check returns what is still wrong, or "".
func (c *cluster) eventually(within time.Duration, what string, check func() string) time.Duration {
	c.Helper()
	start := time.Now()
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		wrong := check()
		if wrong == "" {
			return time.Since(start)
		}
		if time.Since(start) > within {
			c.Logf("%s", c.dump())
			c.Fatalf("%s: not within %s: %s", what, within, wrong)
		}
		time.Sleep(wait)
	}
}

func (c *cluster) dump() string {
	var b strings.Builder
	for _, n := range c.all() {
		s := n.Snapshot()
		fmt.Fprintf(&b, "%s rev %d synced %v:", nodeID(n.i), s.Rev, s.Synced)
		for _, m := range s.Members {
			fmt.Fprintf(&b, " %s=%s@%d.%d", m.Peer.ID, m.Liveness, m.Epoch, m.Seq)
		}
		fmt.Fprintf(&b, "; %d endpoints; %+v\n", len(s.Endpoints), n.Stats())
	}
	return b.String()
}

// members are the IDs a snapshot has in the given state.
func members(s *Snapshot, l spec.Liveness) (ids []string) {
	for _, m := range s.Members {
		if m.Liveness == l {
			ids = append(ids, m.Peer.ID)
		}
	}
	return ids
}

func (c *cluster) ids() (ids []string) {
	for _, n := range c.all() {
		ids = append(ids, nodeID(n.i))
	}
	return ids
}

// agreed tells what is wrong unless every node sees all running ones alive,
// nobody else, and exactly what each has set.
func (c *cluster) agreed() string {
	ids := c.ids()
	var want []spec.Endpoint
	for _, n := range c.all() {
		n.mu.Lock()
		for _, ep := range n.want {
			want = append(want, ep)
		}
		n.mu.Unlock()
	}
	slices.SortFunc(want, func(a, b spec.Endpoint) int { return strings.Compare(a.Key(), b.Key()) })
	for _, n := range c.all() {
		s := n.Snapshot()
		if !s.Synced {
			return nodeID(n.i) + " is not synced"
		}
		if got := members(s, spec.PeerAlive); !slices.Equal(got, ids) {
			return fmt.Sprintf("%s sees alive %v, not %v", nodeID(n.i), got, ids)
		}
		if !slices.EqualFunc(s.Endpoints, want, spec.Endpoint.Equal) {
			return fmt.Sprintf("%s has %d endpoints, not the %d right ones", nodeID(n.i), len(s.Endpoints), len(want))
		}
	}
	return ""
}

// grow starts nodes 1 to n, all joining the first, and waits until they agree.
func (c *cluster) grow(n int) {
	c.Helper()
	for i := 1; i <= n; i++ {
		nd := c.start(i, addrs(1)...)
		nd.put(1)
	}
	c.eventually(20*time.Second, "cluster forms", c.agreed)
}

// wipe loses the disk of node i.
func (c *cluster) wipe(i int) {
	if err := os.RemoveAll(filepath.Join(c.dir, nodeID(i), "gossip")); err != nil {
		c.Fatalf("wipe: %v", err)
	}
}

func timeout(t testing.TB, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(t.Context(), d)
}

func addrPorts(as ...netip.AddrPort) []netip.AddrPort { return as }
