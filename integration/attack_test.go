package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/lab"
	"github.com/shoalnet/shoal/peer"
	"github.com/shoalnet/shoal/spec"
)

// usage is what an agent takes of its machine.
type usage struct {
	rss, peak  int // MB; the peak since the last look
	open, most int // file descriptors now, and at most since the last look
	files      int // MB of its data directory and its log
}

// watch samples what agents use until stop, and tells.
func (s site) watch(names ...string) (stop func() map[string]usage) {
	out := map[string]usage{}
	done := make(chan struct{})
	var wg sync.WaitGroup
	var mu sync.Mutex
	for _, n := range s.Nodes() {
		if !slices.Contains(names, n.Name) {
			continue
		}
		proc := fmt.Sprintf("/proc/%d/", n.PID)
		look := func() {
			b, _ := os.ReadFile(proc + "status")
			mb := func(field string) int {
				_, rest, _ := strings.Cut(string(b), field+":")
				kb, _ := strconv.Atoi(strings.Fields(rest + " 0")[0])
				return kb >> 10
			}
			fds, _ := os.ReadDir(proc + "fd")
			mu.Lock()
			defer mu.Unlock()
			u := out[n.Name]
			u.rss, u.peak, u.open, u.most = mb("VmRSS"), mb("VmHWM"), len(fds), max(u.most, len(fds))
			out[n.Name] = u
		}
		if err := os.WriteFile(proc+"clear_refs", []byte("5"), 0); err != nil { // VmHWM begins anew (proc(5))
			s.Fatal(err)
		}
		wg.Go(func() {
			for {
				look()
				select {
				case <-done:
					look()
					size := int64(0)
					_ = filepath.WalkDir(n.Dir, func(_ string, d fs.DirEntry, err error) error {
						if err == nil && d.Type().IsRegular() {
							if fi, err := d.Info(); err == nil {
								size += fi.Size()
							}
						}
						return nil
					})
					mu.Lock()
					defer mu.Unlock()
					u := out[n.Name]
					u.files = int(size >> 20)
					out[n.Name] = u
					return
				case <-time.After(200 * time.Millisecond):
				}
			}
		})
	}
	return func() map[string]usage {
		close(done)
		wg.Wait()
		return out
	}
}

// record begins to write down what passes the underlay to agents.
func (s site) record(file string) (end func()) {
	s.Helper()
	cmd := exec.Command("tcpdump", "-i", "br0", "--immediate-mode", "-B", "16384", "-U", "-s", "0", "-w", file, "port", "7946", "or", "port", "2377")
	if err := nl.Do("shoal-"+s.Name+"-underlay", cmd.Start); err != nil {
		s.Fatal(err)
	}
	s.eventually(slow(10*time.Second), func() error {
		if fi, err := os.Stat(file); err != nil || fi.Size() == 0 {
			return fmt.Errorf("tcpdump does not write: %v", err)
		}
		return nil
	})
	return func() { _ = cmd.Process.Signal(syscall.SIGTERM); _ = cmd.Wait() }
}

// metric is the sum of a metric of an agent over all labels, or those given.
func (s site) metric(node, name string) float64 {
	s.Helper()
	i := slices.IndexFunc(s.NodeList, func(n lab.Node) bool { return n.Name == node })
	sum := 0.0
	for l := range strings.Lines(s.ok(node, "curl -s --unix-socket %s http://x/metrics", s.NodeList[i].Socket)) {
		if f := strings.Fields(l); len(f) == 2 && (f[0] == name || strings.HasPrefix(f[0], name+"{")) {
			v, _ := strconv.ParseFloat(f[1], 64)
			sum += v
		}
	}
	return sum
}

// TestUnderAttack: somebody on the underlay who is no node, and somebody with a worker's
// disk at that worker's address (and with a manager's key, for raft), do all at once what
// they can: recorded traffic is sent again, gossip is forged, terms and counts have no
// end, connections are begun and not ended. Nobody gets in, nobody speaks for another,
// what the agents take is bounded, and meanwhile no request fails.
func TestUnderAttack(t *testing.T) {
	onlyNative(t)
	t.Parallel()
	if _, err := exec.LookPath("tcpdump"); err != nil {
		t.Fatal("tcpdump is missing: scripts/setup test installs it")
	}
	s := own(t, "attack", lab.Options{Nodes: 4, Managers: 3})
	managers := []string{"node1", "node2", "node3"}
	s.ok("node1", "shoal net create app")
	s.whoami("web", 3, "--network app --constraint node.role==manager")
	s.ok("node1", "shoal run -d --name client --node node1 --network app -- sleep 1d")

	// Recorded are a service that is gone afterwards, and an agent that starts.
	pcap := filepath.Join(t.TempDir(), "pcap")
	end := s.record(pcap)
	s.whoami("gone", 1, "--network app --constraint node.name==node2")
	s.inTask("client", "-n 3 http://gone/")
	s.restart("node3")
	s.ok("node1", "shoal svc rm gone")
	end()

	// The worker's disk, and that of a manager, are read; the worker is dead.
	if err := s.KillAgent("node4"); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(s.dataDir("node4"), "assignment.json"))
	if err != nil {
		t.Fatal(err)
	}
	var disk struct {
		Cluster, Node string
		Nodes         []spec.Node
		Trust         struct{ Gossip []state.GossipKey }
	}
	if err := json.Unmarshal(b, &disk); err != nil || len(disk.Trust.Gossip) == 0 || len(disk.Nodes) != 4 {
		t.Fatalf("assignment.json of node4: %v: %s", err, b)
	}
	stranger := loot{Pcap: pcap, Addr: lab.Outside}
	var ids = map[string]string{}
	for _, n := range disk.Nodes {
		ids[n.Name] = n.ID
		if n.Role == spec.RoleManager {
			stranger.Targets = append(stranger.Targets, n.Addr)
		}
	}
	web, network := s.running("web"), s.network("app")
	svc, client := web[0].Service, s.task("client").Attachments[0].Addrs[0]
	addr := func(a string) []netip.Addr { return []netip.Addr{netip.MustParseAddr(a)} }
	thief := stranger
	thief.Addr, thief.Self, thief.Cluster, thief.Nodes, thief.Keys, thief.Victim, thief.Dir = netip.MustParseAddr(s.addrOf("node4")), disk.Node, disk.Cluster, disk.Nodes, disk.Trust.Gossip, ids["node2"], t.TempDir()
	thief.Node, thief.Manager = peer.Path(s.dataDir("node4")), peer.Path(s.dataDir("node3"))
	ep := func(task, name, service, at string) spec.Endpoint {
		return spec.Endpoint{Task: task, TaskName: name, Service: service, Slot: 1, Network: network.ID, Addrs: addr(at), State: spec.EndpointActive}
	}
	thief.Endpoints = []spec.Endpoint{
		ep("evilevilevil", "web.4.evilevilevil", svc, nextTo(network.Subnets[0].String(), 200)), // one more replica
		ep(web[0].ID, web[0].Name, svc, web[0].Attachments[0].Addrs[0]),                         // one of another node
		ep("evilevilevi2", "web", "", nextTo(network.Subnets[0].String(), 201)),                 // a task of the service's name
	}

	before := s.ok("node1", "shoal node ls -f role=manager --format '{{.ID}} {{.Name}}'")
	nets := s.ok("node1", "shoal net ls -q")
	watched := []string{"node1", "node3"} // the other one is started anew
	idle := s.watch(watched...)
	was := idle()
	term := s.metric("node1", "shoal_raft_term")
	stop := s.watch(watched...)
	endStranger := s.attacker("shoal-"+s.Name+"-underlay", stranger)
	endThief := s.attacker("shoal-"+s.Name+"-node4", thief)

	asked := make(chan load, 1)
	go func() {
		r := s.on("node1", "shoal", "exec", "client", bin+"/load", "-n", "10000", "-rate", "600", "-timeout", "5s", "http://web/")
		var l load
		if err := json.Unmarshal([]byte(r.out), &l); err != nil {
			t.Errorf("load: %+v", r)
		}
		asked <- l
	}()
	denied := 0.0
	s.eventually(slow(time.Minute), func() error { // the cluster does as it is told meanwhile
		denied = max(denied, s.metric("node1", "shoal_endpoints_not_given"))
		if denied < 3 {
			return fmt.Errorf("what node4 was not given is %g endpoints", denied)
		}
		return nil
	})
	s.ok("node2", "shoal svc create -q --name meanwhile --replicas 2 --network app --constraint node.role==manager -- %s/whoami", bin)
	s.ok("node2", "shoal svc rm meanwhile")
	s.eventually(slow(10*time.Second), func() error {
		if out, err := s.client("python3", testdata(t, "spoof.py"), "vxlan", fmt.Sprint(network.VNI), spec.VTEPMAC(1).String(), s.addrOf("node1"), "4789",
			web[0].Attachments[0].Addrs[0], client, "forged"); err != nil {
			return fmt.Errorf("vxlan: %w %s", err, out)
		}
		if s.metric("node1", `shoal_dropped_packets_total{network="(host)",reason="vxlan-not-member"}`) == 0 {
			return errors.New("VXLAN of who is no member was not dropped")
		}
		return nil
	})

	// What was recorded is as old for an agent that has just started, and remembers none.
	s.restartAgent("node2")
	s.eventually(slow(time.Minute), func() error { // it had all of it once, and again
		if s.metric("node2", `shoal_gossip_refused_total{reason="replay"}`) == 0 {
			return errors.New("what was recorded was not sent again")
		}
		return nil
	})

	l := <-asked
	if l.Failed > 0 || l.OK < 10000 || len(l.Hosts) != 3 {
		t.Errorf("%d of %d requests failed (%v), %d servers: %v; begun at %s and %v seconds", l.Failed, l.Requests, l.Errors, len(l.Hosts), l.Hosts, l.Started.Format("15:04:05.000"), l.Failures)
	}
	// The worker is removed: what its disk had is worth nothing from now on.
	s.ok("node1", "shoal node rm --force node4")
	s.eventually(slow(10*time.Second), func() error {
		if n := s.metric("node1", "shoal_endpoints_not_given"); n > 0 {
			return fmt.Errorf("of a removed node %g endpoints are heard, and denied", n)
		}
		return nil
	})
	did := map[string]map[string]int{"stranger": endStranger(), "thief": endThief()}
	used := stop()
	for who, counts := range did {
		t.Logf("the %s: %v", who, counts)
		for what, n := range counts {
			if strings.Contains(what, "ANSWERED") {
				t.Errorf("the %s got in %d times: %s", who, n, what)
			}
		}
	}
	for _, what := range []string{"recorded streams", "half-open handshakes", "stranger's slow body", "stranger's big header"} {
		for who, counts := range did {
			if counts[what] == 0 {
				t.Errorf("the %s never came to %s", who, what)
			}
		}
	}
	for _, what := range []string{"datagrams of others, recorded", "datagrams of others, made up", "gossip streams of a stranger"} {
		if did["stranger"][what] == 0 {
			t.Errorf("the stranger never came to %s", what)
		}
	}
	for _, what := range []string{"calls as another node", "calls of a user", "unbounded assignments", "big messages", "a worker's raft", "raft in absurd terms", "forged gossip", "forged streams", "streams without an end"} {
		if did["thief"][what] == 0 {
			t.Errorf("the thief never came to %s", what)
		}
	}
	for _, n := range watched {
		a, b := was[n], used[n]
		t.Logf("%s: memory %d MB, at most %d under attack; descriptors %d, at most %d; files %d MB, then %d", n, a.rss, b.peak, a.open, b.most, a.files, b.files)
		if b.peak > a.rss+200 {
			t.Errorf("%s: memory grew from %d to %d MB", n, a.rss, b.peak)
		}
		if b.most > a.open+600 {
			t.Errorf("%s: descriptors grew from %d to %d", n, a.open, b.most)
		}
		if b.files > a.files+64 {
			t.Errorf("%s: files grew from %d to %d MB", n, a.files, b.files)
		}
	}
	for _, reason := range []string{"source", "seal", "replay", "kind", "shape", "stranger", "claim"} {
		if n := s.metric("node1", `shoal_gossip_refused_total{reason="`+reason+`"}`); n == 0 {
			t.Errorf("nothing was refused for its %s", reason)
		}
	}
	// Each election makes one more, and a machine with too much to do may see some: what
	// was sent is over 4e18.
	if now := s.metric("node1", "shoal_raft_term"); now > term+1000 {
		t.Errorf("raft's term is %g, was %g", now, term)
	}

	// All is as before.
	s.eventually(slow(30*time.Second), func() error {
		if got := s.ok("node1", "shoal node ls --format '{{.ID}} {{.Name}}'"); got != before {
			return fmt.Errorf("nodes are\n%s\nwere\n%s", got, before)
		}
		if got := s.ok("node1", "shoal net ls -q"); got != nets {
			return fmt.Errorf("networks are\n%s\nwere\n%s", got, nets)
		}
		for _, n := range managers {
			if got := s.ok(n, "shoal node ls -f name=%s --format {{.Status}}", n); got != "ready" {
				return fmt.Errorf("%s is %s", n, got)
			}
			if r := s.on(n, "shoal", "doctor"); r.code != 0 {
				return fmt.Errorf("doctor on %s: %s", n, r.out)
			}
		}
		for _, name := range []string{"gone", "evil", "web.4.evilevilevil"} {
			if r := s.on("node1", "shoal", "exec", "client", "getent", "hosts", name); r.code == 0 {
				return fmt.Errorf("%s is %s", name, r.out)
			}
		}
		return nil
	})
	s.fair("after it", s.inTask("client", "-n 60 http://web/"), 3)
}
