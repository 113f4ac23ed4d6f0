package gossip

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/shoalnet/shoal/spec"
)

// quick is tuning that makes failures cheap to play through; the ratios are
// those of the defaults.
var quick = Tuning{
	ProbeInterval: 240 * time.Millisecond, ProbeTimeout: 100 * time.Millisecond, GossipInterval: 40 * time.Millisecond, PushPullInterval: 2 * time.Second,
	PingInterval: 100 * time.Millisecond, DigestInterval: 400 * time.Millisecond, FetchTimeout: time.Second,
	RejoinInterval: 200 * time.Millisecond, RejoinMax: time.Second, SyncWait: time.Second, TombstoneMax: 3,
}

// Whatever happens to a cluster, once it has rest all views are equal to what
// the owners set. A seed replays the script, not the interleaving.
func TestEventuallyAllViewsAreEqual(t *testing.T) {
	runs := 6
	if testing.Short() {
		runs = 2
	}
	// GOSSIP_SEED=n plays one script again; GOSSIP_RUNS=n plays more.
	if n, err := strconv.Atoi(os.Getenv("GOSSIP_RUNS")); err == nil {
		runs = n
	}
	seed := int(time.Now().UnixNano() % 1_000_000_000)
	if n, err := strconv.Atoi(os.Getenv("GOSSIP_SEED")); err == nil {
		seed, runs = n, 1
	}
	for run := range runs {
		t.Run(fmt.Sprint("seed=", seed+run), func(t *testing.T) {
			playScript(t, rapid.Custom(drawScript).Example(seed+run))
		})
	}
}

type step struct {
	op   string
	node int
	arg  int
	list []int
}

func (s step) String() string { return fmt.Sprintf("%s %d %d %v", s.op, s.node, s.arg, s.list) }

const scriptNodes = 6

func drawScript(t *rapid.T) []step {
	ops := []string{"set", "set", "set", "set", "set", "state", "remove", "remove", "partition", "heal", "cut", "kill", "start", "start", "restart", "restart", "wipe", "move", "loss", "delay", "leave", "rest"}
	return rapid.SliceOfN(rapid.Custom(func(t *rapid.T) step {
		return step{rapid.SampledFrom(ops).Draw(t, "op"), rapid.IntRange(1, scriptNodes).Draw(t, "node"), rapid.IntRange(0, 9).Draw(t, "arg"),
			rapid.SliceOfNDistinct(rapid.IntRange(1, scriptNodes), 1, 4, rapid.ID[int]).Draw(t, "list")}
	}), 30, 60).Draw(t, "script")
}

func playScript(t *testing.T, script []step) {
	c := newCluster(t, quick)
	c.grow(scriptNodes)
	var done []string
	defer func() {
		if t.Failed() {
			t.Logf("script:\n%s", strings.Join(done, "\n"))
		}
	}()
	moves := 0
	set := func(n *node, change func(map[string]spec.Endpoint)) {
		n.mu.Lock()
		eps := map[string]spec.Endpoint{}
		for k, v := range n.want {
			eps[k] = v
		}
		n.mu.Unlock()
		change(eps)
		var list []spec.Endpoint
		for _, ep := range eps {
			list = append(list, ep)
		}
		n.putAll(list)
	}
	restart := func(i int, addr bool) {
		at := c.node(i).Addr()
		n := c.node(i)
		n.mu.Lock()
		want := n.want
		n.mu.Unlock()
		c.kill(i)
		if addr {
			moves++
			at = nodeAddr(1000 + moves)
		}
		n = c.startAt(i, at, addrs(1, 2)...)
		set(n, func(eps map[string]spec.Endpoint) {
			for k, v := range want {
				eps[k] = v
			}
		})
	}
	begin := time.Now()
	for _, s := range script {
		done = append(done, fmt.Sprintf("%s %s", time.Since(begin).Round(time.Millisecond), s))
		n := c.node(s.node)
		switch s.op {
		case "start":
			if n == nil {
				c.start(s.node, addrs(1, 2, 3)...).put(s.arg)
			}
			continue
		case "partition":
			c.net.Partition(addrs(s.list...))
			continue
		case "cut":
			if s.list[0] != s.node {
				c.net.Cut(nodeAddr(s.node), nodeAddr(s.list[0]))
			}
			continue
		case "heal":
			c.net.Heal()
			continue
		case "loss":
			c.net.SetLoss(float64(s.arg) / 30)
			continue
		case "delay":
			c.net.SetDelay(time.Duration(s.arg) * 2 * time.Millisecond)
			continue
		case "rest":
			time.Sleep(time.Duration(s.arg) * 150 * time.Millisecond)
			continue
		}
		if n == nil {
			continue
		}
		switch s.op {
		case "set":
			set(n, func(eps map[string]spec.Endpoint) {
				for k := range s.arg {
					ep := endpoint(s.node, k*s.list[0], spec.EndpointActive)
					eps[ep.Key()] = ep
				}
			})
		case "state":
			set(n, func(eps map[string]spec.Endpoint) {
				for k, ep := range eps {
					ep.State = spec.EndpointState(s.arg % 3)
					eps[k] = ep
				}
			})
		case "remove":
			set(n, func(eps map[string]spec.Endpoint) {
				for k := range eps {
					if len(k)%2 == s.arg%2 || s.arg > 5 {
						delete(eps, k)
					}
				}
			})
		case "kill":
			if len(c.all()) > 2 {
				c.kill(s.node)
			}
		case "restart":
			restart(s.node, false)
		case "move":
			restart(s.node, true)
		case "wipe": // its disk is lost
			n.mu.Lock()
			want := n.want
			n.mu.Unlock()
			at := n.Addr()
			c.kill(s.node)
			c.wipe(s.node)
			n = c.startAt(s.node, at, addrs(1, 2, 3, 4, 5, 6)...)
			set(n, func(eps map[string]spec.Endpoint) {
				for k, v := range want {
					eps[k] = v
				}
				if s.arg > 5 {
					clear(eps)
				}
			})
		case "leave":
			if len(c.all()) > 2 {
				ctx, cancel := timeout(t, 300*time.Millisecond)
				n.Leave(ctx)
				cancel()
				c.kill(s.node)
			}
		}
	}
	done = append(done, fmt.Sprintf("%s end", time.Since(begin).Round(time.Millisecond)))
	c.net.Heal()
	c.net.SetLoss(0)
	c.net.SetDelay(0)
	// Nodes that joined by addresses of others that have moved since may know
	// nobody: the managers tell each the addresses of all.
	for _, n := range c.all() {
		for _, o := range c.all() {
			n.Join(addrPorts(o.Addr()))
		}
	}
	d := c.eventually(30*time.Second, "all views equal", c.agreed)
	t.Logf("%d steps in %s, agreed after %s", len(script), time.Since(begin).Round(time.Millisecond), d.Round(time.Millisecond))
	for _, n := range c.all() {
		if s := n.Stats(); s.Malformed+s.Rejected > 0 {
			t.Errorf("%s: %+v", nodeID(n.i), s)
		}
	}
}
