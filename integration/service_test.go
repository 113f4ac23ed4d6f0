package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

var nodes = []string{"node1", "node2", "node3"}

// clients runs a task on each node, c1 to c3.
func (s site) clients(network string) {
	s.Helper()
	for i, n := range nodes {
		s.ok(n, "shoal run -d --name c%d --network %s -- sleep 10000", i+1, network)
	}
}

func keys[V any](m map[string]V) []string {
	out := make([]string, 0, len(m))
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

// requests are those of a test of fairness: in the emulated machine each takes
// a tenth of a second.
func requests() int {
	if inVM {
		return 30
	}
	return 300
}

// TestFirstLight is the promise: from every node, by every protocol, no request
// fails, every replica has its share, and servers see the client.
func TestFirstLight(t *testing.T) {
	s := shared(t)
	s.ok("node1", "shoal net create app")
	s.whoami("web", 3, "--network app")
	s.clients("app")
	onNode := map[string]bool{}
	for _, x := range s.running("web") {
		onNode[x.NodeName] = true
	}
	if len(onNode) != 3 {
		t.Errorf("three replicas on nodes %v", keys(onNode))
	}
	for i := range nodes {
		c := fmt.Sprintf("c%d", i+1)
		own := s.task(c).Attachments[0].Addrs[0]
		for _, url := range []string{"http://web/", "tcp://web:9000", "udp://web:9000"} {
			l := s.inTask(c, "-n %d -timeout %s %s", requests(), slow(2*time.Second), url)
			s.fair(c+" "+url, l, 3)
			if got := keys(l.Clients); !slices.Equal(got, []string{own}) {
				t.Errorf("%s %s: servers saw %v, the client is %s", c, url, got, own)
			}
		}
	}
	// A replica that calls its own service reaches all of them, itself too.
	for _, x := range s.running("web") {
		l := s.inTask(x.Name, "-n %d -timeout %s http://web/", requests()/5, slow(2*time.Second))
		s.fair("from replica "+x.Name, l, 3)
	}
	if inVM {
		return // the rest is vip's suite's there
	}
	// Two services in turn: neither takes the other's turns.
	s.whoami("other", 3, "--network app")
	for range (requests() + 59) / 60 {
		for _, svc := range []string{"web", "other"} {
			s.fair("by turns: "+svc, s.inTask("c1", "-n %d -timeout %s http://%s/", requests()/5, slow(2*time.Second), svc), 3)
		}
	}
}

func TestNoBackendIsRefusedAtOnce(t *testing.T) {
	onlyNative(t) // vip's and ingress' suites have it in the VM
	s := shared(t)
	s.ok("node1", "shoal net create app")
	s.whoami("web", 2, "--network app")
	s.ok("node1", "shoal run -d --name c1 --network app -- sleep 10000")
	s.fair("before", s.inTask("c1", "-n 20 -timeout %s http://web/", slow(2*time.Second)), 2)
	s.ok("node1", "shoal svc scale web=0")
	for url, want := range map[string]string{"http://web/": "connection refused", "tcp://web:9000": "connection refused", "udp://web:9000": "connection refused"} {
		l := s.inTask("c1", "-n 5 -timeout %s %s", slow(5*time.Second), url)
		if l.OK != 0 || l.Errors[want] != 5 {
			t.Errorf("%s without a replica: %d answered, errors %v", url, l.OK, l.Errors)
		}
	}
	s.ok("node1", "shoal svc scale web=2")
	s.fair("after", s.inTask("c1", "-n 20 -timeout %s http://web/", slow(2*time.Second)), 2)
}

// under runs a load from a task, does something after it has begun, and returns
// what became of it.
func (s site) under(task string, secs int, do func()) load {
	s.Helper()
	cmd := exec.Command(filepath.Join(bin, "shoal"), "lab", "exec", "--name", s.Name, "node1", "--", "shoal", "exec", task, filepath.Join(bin, "load"),
		"-rate", map[bool]string{false: "50", true: "10"}[inVM], "-for", slow(time.Duration(secs)*time.Second).String(), "-timeout", slow(time.Second).String(), "http://web/")
	var out strings.Builder
	cmd.Stdout = &out
	if err := cmd.Start(); err != nil {
		s.Fatal(err)
	}
	time.Sleep(time.Second) // so that some of the load is before
	do()
	if err := cmd.Wait(); err != nil {
		s.Fatalf("load: %v", err)
	}
	return s.parseLoad(out.String())
}

func (s site) awaitRunning(service string, n int) {
	s.Helper()
	s.eventually(slow(30*time.Second), func() error {
		if got := len(s.running(service)); got != n {
			return fmt.Errorf("%d tasks of %s run, want %d", got, service, n)
		}
		return nil
	})
}

func TestScaleUnderLoadLosesNothing(t *testing.T) {
	onlyNative(t) // of the data path, vip's suite has it in the VM
	s := shared(t)
	s.ok("node1", "shoal net create app")
	s.whoami("web", 3, "--network app")
	s.ok("node1", "shoal run -d --name c1 --network app -- sleep 10000")
	l := s.under("c1", 8, func() {
		s.ok("node1", "shoal svc scale web=1")
		s.ok("node2", "shoal svc scale web=4")
	})
	if l.Failed != 0 || l.OK < 50 {
		t.Errorf("%d of %d failed: %v", l.Failed, l.Requests, l.Errors)
	}
	s.awaitRunning("web", 4)
	s.fair("after", s.inTask("c1", "-n 80 -timeout %s http://web/", slow(2*time.Second)), 4)
}

// TestAnUpdateWaitsForTheNewToListen where the old one did: servers that take their
// time cost no request, and one that never does replaces nothing.
func TestAnUpdateWaitsForTheNewToListen(t *testing.T) {
	onlyNative(t) // of the data path, vip's suite has it in the VM
	s := shared(t)
	s.ok("node1", "shoal net create app")
	s.whoami("web", 2, "--network app")
	s.ok("node1", "shoal run -d --name c1 --network app -- sleep 10000")
	before := s.running("web")
	l := s.under("c1", 16, func() {
		s.ok("node1", "shoal svc update --quiet web -- sh -c 'sleep 5; exec %s/whoami'", bin)
	})
	if l.Failed != 0 || l.OK < 50 {
		t.Errorf("%d of %d failed: %v", l.Failed, l.Requests, l.Errors)
	}
	after := s.running("web")
	if len(after) != 2 || slices.ContainsFunc(after, func(x task) bool { return slices.ContainsFunc(before, func(y task) bool { return x.ID == y.ID }) }) {
		t.Errorf("running before %v, after %v", before, after)
	}
	s.fair("after", s.inTask("c1", "-n 20 -timeout %s http://web/", slow(2*time.Second)), 2)

	s.ok("node1", "shoal svc update --detach --listen-timeout 2s web -- sleep 10000")
	s.eventually(slow(30*time.Second), func() error {
		if out := s.ok("node1", "shoal svc ps --no-trunc web"); !strings.Contains(out, "has not listened within 2s") {
			return errors.New(out)
		}
		return nil
	})
	s.fair("beside one that does not listen", s.inTask("c1", "-n 20 -timeout %s http://web/", slow(2*time.Second)), 2)
}

func TestDrainUnderLoadLosesNothing(t *testing.T) {
	onlyNative(t) // of the data path, vip's suite has it in the VM
	s := shared(t)
	s.ok("node1", "shoal net create app")
	s.whoami("web", 3, "--network app")
	s.ok("node1", "shoal run -d --name c1 --network app -- sleep 10000")
	t.Cleanup(func() { s.ok("node1", "shoal node update --availability active node2") })
	l := s.under("c1", 6, func() {
		s.ok("node1", "shoal node update --availability drain node2")
		s.eventually(slow(20*time.Second), func() error {
			for _, x := range s.running("web") {
				if x.NodeName == "node2" {
					return fmt.Errorf("%s is still on node2", x.Name)
				}
			}
			return nil
		})
	})
	if l.Failed != 0 {
		t.Errorf("%d of %d failed: %v", l.Failed, l.Requests, l.Errors)
	}
	s.awaitRunning("web", 3)
}

// TestAKilledReplicaIsReplaced: the requests that it had are lost, and no more
// than those of the moment that it takes to notice.
func TestAKilledReplicaIsReplaced(t *testing.T) {
	s := shared(t)
	s.ok("node1", "shoal net create app")
	s.whoami("web", 3, "--network app")
	s.ok("node1", "shoal run -d --name c1 --network app -- sleep 10000")
	victim := s.running("web")[0]
	secs := 6
	if inVM {
		secs = 2 // of eight
	}
	l := s.under("c1", secs, func() {
		if err := syscall.Kill(victim.Status.PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		s.eventually(slow(20*time.Second), func() error {
			if slices.ContainsFunc(s.running("web"), func(x task) bool { return x.ID == victim.ID }) {
				return fmt.Errorf("%s is still said to run", victim.Name)
			}
			return nil
		})
	})
	// A second's worth at most, on a machine that may be busy.
	if l.Failed > 50 {
		t.Errorf("%d of %d failed: %v", l.Failed, l.Requests, l.Errors)
	}
	t.Logf("killed replica: %d of %d failed", l.Failed, l.Requests)
	s.awaitRunning("web", 3)
	s.fair("after", s.inTask("c1", "-n 90 -timeout %s http://web/", slow(2*time.Second)), 3)
}

func TestAServerMayHavePort53(t *testing.T) {
	onlyNative(t)
	s := shared(t)
	s.ok("node1", "shoal net create app")
	s.ok("node1", "shoal svc create --name dns --network app -- %s/whoami -http 0.0.0.0:80 -udp 0.0.0.0:53 -tcp 0.0.0.0:53", bin)
	s.ok("node2", "shoal run -d --name c --network app -- sleep 1000")
	s.fair("udp", s.inTask("c", "-n 20 udp://dns:53"), 1)
	s.fair("tcp", s.inTask("c", "-n 20 tcp://dns:53"), 1)
	// And still resolves names itself.
	x := s.running("dns")[0]
	s.fair("its own resolver", s.inTask(x.Name, "-n 5 http://dns/"), 1)
}

func TestLogsAreKept(t *testing.T) {
	onlyNative(t)
	s := shared(t)
	s.ok("node1", "shoal svc create --detach --name chatter --replicas 2 -- sh -c 'echo out $HOSTNAME; echo err >&2; sleep 1000'")
	s.awaitRunning("chatter", 2)
	s.eventually(slow(10*time.Second), func() error {
		r := s.on("node3", "shoal", "svc", "logs", "chatter")
		all := r.out + r.err
		if strings.Count(all, "out ") != 2 || strings.Count(all, "err") != 2 {
			return fmt.Errorf("logs: %q", all)
		}
		return nil
	})
}

// TestANodeDiesAndComesBack: its replicas are replaced, nothing is sent to them
// any more, and when it is back nothing of them runs there.
func TestANodeDiesAndComesBack(t *testing.T) {
	onlyNative(t) // in the VM it takes 88 to 208 s of the package's nine minutes
	t.Parallel()
	s := own(t, "itnode", labOptions())
	s.ok("node1", "shoal net create app")
	s.whoami("web", 3, "--network app")
	s.ok("node1", "shoal run -d --name c1 --network app -- sleep 10000")
	s.ok("node3", "shoal run -d --name lost --network app -- sleep 10000")
	lost := map[string]bool{}
	for _, x := range s.running("web") {
		if x.NodeName == "node3" {
			lost[strings.ReplaceAll(x.Name, ".", "-")] = true
		}
	}
	secs := 12
	if inVM {
		secs = 4 // of eight
	}
	l := s.under("c1", secs, func() {
		if err := s.Kill(t.Context(), "node3"); err != nil {
			t.Fatal(err)
		}
	})
	t.Logf("killed node: %d of %d failed, the last %.1f s after the start", l.Failed, l.Requests, l.LastFailure)
	s.eventually(slow(40*time.Second), func() error {
		xs := s.running("web")
		if len(xs) != 3 || slices.ContainsFunc(xs, func(x task) bool { return x.NodeName == "node3" }) {
			return fmt.Errorf("replicas: %+v", xs)
		}
		return nil
	})
	after := s.inTask("c1", "-n 90 -timeout %s http://web/", slow(2*time.Second))
	s.fair("after", after, 3)
	for h := range after.Hosts {
		if lost[h] {
			t.Errorf("the dead %s answered", h)
		}
	}
	if got := s.ok("node1", "shoal node ls --format {{.Name}}={{.Status}}"); !strings.Contains(got, "node3=down") {
		t.Errorf("nodes: %s", got)
	}

	if err := s.Start(t.Context(), "node3"); err != nil {
		t.Fatal(err)
	}
	s.eventually(slow(40*time.Second), func() error {
		if got := s.ok("node1", "shoal node ls --format {{.Name}}={{.Status}}"); !strings.Contains(got, "node3=ready") {
			return fmt.Errorf("nodes: %s", got)
		}
		if ns := s.ok("node3", "ip netns list"); strings.Contains(ns, "shoal-"+s.Name+"-node3-task-web") {
			return fmt.Errorf("dead tasks are left: %s", ns)
		}
		return nil
	})
	s.ok("node3", "shoal run -d --name c3 --network app -- sleep 10000")
	s.fair("from the node that came back", s.inTask("c3", "-n 90 -timeout %s http://web/", slow(2*time.Second)), 3)
}

// TestAnAgentDies: tasks and their connections go on without it, it adopts them
// when it is back, and nothing leaks.
func TestAnAgentDies(t *testing.T) {
	onlyNative(t) // of the data path, vip's suite has it in the VM
	t.Parallel()
	s := own(t, "itagent", labOptions())
	s.ok("node1", "shoal net create app")
	s.whoami("web", 3, "--network app")
	s.ok("node1", "shoal run -d --name c1 --network app -- sleep 10000")
	// Names, asked for all the time: they wait for the next agent, which must not
	// answer before it knows them. What it does not know it would ask elsewhere.
	s.ok("node2", "shoal run -d --name asker --network app -- "+
		"sh -c 'for n in web tasks.web asker; do while :; do dig +short +time=5 +tries=5 $n | grep -q ^10 || echo lost $n; sleep 0.1; done & done; wait'")

	// All at once, and one is back before the others: it hears nothing of them, for longer
	// than it waits for that.
	s.ok("node1", "shoal run -d --name keeper --node node1 --network app -- python3 %s web 9000 3", testdata(t, "keep.py"))
	s.eventually(slow(10*time.Second), func() error {
		if got := s.ok("node1", "shoal logs keeper"); got != "connected" {
			return fmt.Errorf("keeper says %q", got)
		}
		return nil
	})
	time.Sleep(slow(1500 * time.Millisecond)) // what was heard is on the disk after a second
	for _, n := range s.Nodes() {
		if err := s.KillAgent(n.Name); err != nil {
			t.Fatal(err)
		}
	}
	for i, n := range s.Nodes() {
		if err := s.Start(t.Context(), n.Name); err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			time.Sleep(5 * time.Second) // in which nothing is to happen
		}
	}
	s.eventually(slow(30*time.Second), func() error {
		if got := s.ok("node1", "shoal node ls --format {{.Name}}={{.Status}}"); strings.Count(got, "=ready") != 3 {
			return fmt.Errorf("nodes: %s", got)
		}
		return nil
	})
	if got := s.ok("node1", "shoal logs keeper"); got != "connected" {
		t.Errorf("connections between tasks of nodes without agents: %s", got)
	}
	s.ok("node1", "shoal rm -f keeper")

	conn := s.line("c1", "web", 9000)
	defer conn.close()
	conn.say("before")
	spaces := s.namespaces()
	pids := func() (out []string) {
		for _, x := range s.running("web") {
			out = append(out, fmt.Sprint(x.ID, x.Status.PID))
		}
		slices.Sort(out)
		return out
	}
	before := pids()
	// One hangs, and so takes no connections any more; nor does one refuse them. What it
	// had made goes on, and those behind it must be let answer: by its address, since
	// names wait.
	vip := strings.Fields(s.ok("node1", "shoal exec c1 getent hosts web"))[0]
	s.ok("node1", "shoal run -d --name across --node node2 --network app -- %s/load -n 270 -rate 30 -timeout %s http://%s/", bin, slow(3*time.Second), vip)
	s.ok("node2", "nft 'add table inet deaf; add chain inet deaf in { type filter hook input priority -300; }; add rule inet deaf in tcp dport { 2377, 7946 } drop'")
	if err := syscall.Kill(s.Nodes()[1].PID, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	// Whether shares are even depends on when a node turns suspect, and so takes
	// nothing new as long as another can: what counts is that none fails, also once it
	// is held to have no agent.
	if l := s.inTask("c1", "-n 240 -rate 30 -timeout %s http://web/", slow(2*time.Second)); l.Failed > 0 || l.OK != 240 {
		t.Errorf("beside an agent that hangs: %+v", l)
	}
	if err := s.KillAgent("node3"); err != nil { // node1 carries the connection's client end
		t.Fatal(err)
	}
	conn.say("without agents on two nodes")
	if l := s.inTask("c1", "-n 60 -timeout %s http://web/", slow(2*time.Second)); l.Failed > 0 || l.OK != 60 {
		t.Errorf("without agents: %+v", l)
	}
	if err := s.KillAgent("node2"); err != nil {
		t.Fatal(err)
	}
	s.ok("node2", "nft delete table inet deaf")
	for _, n := range []string{"node2", "node3"} {
		if err := s.Start(t.Context(), n); err != nil {
			t.Fatal(err)
		}
	}
	s.eventually(slow(30*time.Second), func() error {
		if got := s.ok("node1", "shoal node ls --format {{.Name}}={{.Status}}"); strings.Count(got, "=ready") != 3 {
			return fmt.Errorf("nodes: %s", got)
		}
		if got := pids(); !slices.Equal(got, before) {
			return fmt.Errorf("tasks were %v, are %v", before, got)
		}
		return nil
	})
	conn.say("after")
	across := func() {
		t.Helper()
		s.eventually(slow(30*time.Second), func() error {
			var l load
			r := s.on("node1", "shoal", "logs", "across")
			if err := json.Unmarshal([]byte(r.out), &l); err != nil {
				return fmt.Errorf("%w: %+v", err, r)
			}
			if l.Failed > 0 || l.OK == 0 {
				t.Errorf("from behind an agent that is away: %+v", l)
			}
			return nil
		})
		s.ok("node1", "shoal rm -f across")
	}
	across()
	// Managers may find a node ready before the client's finds it beyond suspicion.
	s.eventually(slow(10*time.Second), func() error {
		if l := s.inTask("c1", "-n 30 -timeout %s http://web/", slow(2*time.Second)); len(l.Hosts) != 3 {
			return fmt.Errorf("after: %d servers of 3: %v", len(l.Hosts), l.Hosts)
		}
		return nil
	})
	s.fair("after", s.inTask("c1", "-n 60 -timeout %s http://web/", slow(2*time.Second)), 3)
	s.eventually(slow(10*time.Second), func() error {
		if got := s.namespaces(); got != spaces {
			return fmt.Errorf("namespaces were\n%s\nare\n%s", spaces, got)
		}
		return nil
	})

	// At any moment: while a service comes up and another goes.
	for i := range 4 {
		name := fmt.Sprintf("x%d", i)
		s.ok("node1", "shoal svc create --detach --name %s --replicas 3 --network app -- %s/whoami", name, bin)
		time.Sleep(time.Duration(i) * slow(150*time.Millisecond)) // the moment is what varies
		if err := s.KillAgent("node2"); err != nil {
			t.Fatal(err)
		}
		if err := s.Start(t.Context(), "node2"); err != nil {
			t.Fatal(err)
		}
		s.awaitRunning(name, 3)
		s.fair(name, s.inTask("c1", "-n 60 -timeout %s http://%s/", slow(2*time.Second), name), 3)
		s.ok("node1", "shoal svc rm %s", name)
	}
	if got := s.ok("node2", "shoal logs asker"); got != "" {
		t.Errorf("names while agents died: %s", got)
	}

	// For so long that the others give it up: nothing is sent there any more, and what comes
	// from there is answered.
	var there []string
	for _, x := range s.running("web") {
		if x.NodeName == "node2" {
			there = append(there, x.Name)
		}
	}
	s.ok("node1", "shoal run -d --name across --node node2 --network app -- %s/load -n 540 -rate 30 -timeout %s http://%s/", bin, slow(3*time.Second), vip)
	if err := s.KillAgent("node2"); err != nil {
		t.Fatal(err)
	}
	s.eventually(slow(30*time.Second), func() error {
		if log, err := os.ReadFile(filepath.Join(s.Nodes()[0].Dir, "agent.log")); err != nil || !strings.Contains(string(log), `"its machine is there"=true`) {
			return fmt.Errorf("node1 does not hold node2 for dead: %v", err)
		}
		return nil
	})
	l := s.inTask("c1", "-n 60 -timeout %s http://web/", slow(2*time.Second))
	for _, x := range there {
		if n := l.Hosts[strings.ReplaceAll(x, ".", "-")]; n > 0 {
			t.Errorf("%d requests went to %s", n, x)
		}
	}
	if l.Failed > 0 {
		t.Errorf("beside a node that is given up, which had %v: %+v", there, l)
	}
	time.Sleep(slow(3 * time.Second)) // in which nothing is to happen
	if err := s.Start(t.Context(), "node2"); err != nil {
		t.Fatal(err)
	}
	across()
	s.eventually(slow(30*time.Second), func() error { // a replica was made elsewhere
		if got := s.namespaces(); strings.Count(got, "\n") != strings.Count(spaces, "\n") {
			return fmt.Errorf("namespaces were\n%s\nare\n%s", spaces, got)
		}
		return nil
	})
}

// namespaces are those of the lab.
func (s site) namespaces() string {
	s.Helper()
	var out []string
	for l := range strings.Lines(lines(s.ok("node1", "ip netns list"))) {
		if strings.HasPrefix(l, "shoal-"+s.Name+"-") {
			out = append(out, strings.TrimSpace(l))
		}
	}
	return strings.Join(out, "\n")
}

// lines sorts lines, without the ids that "ip netns list" adds.
func lines(in string) string {
	var out []string
	for l := range strings.Lines(in) {
		if f := strings.Fields(l); len(f) > 0 {
			out = append(out, f[0])
		}
	}
	slices.Sort(out)
	return strings.Join(out, "\n")
}

// TestDeletedObjectsComeBack deletes what the agent made, object by object, as
// a person might, beside things that are not ours.
func TestDeletedObjectsComeBack(t *testing.T) {
	onlyNative(t) // vip's suite deletes what IPVS holds
	s := shared(t)
	s.ok("node1", "shoal net create app")
	s.whoami("web", 3, "--network app --publish 8080:80")
	s.ok("node1", "shoal run -d --name c1 --network app -- sleep 10000")
	s.fair("before", s.inTask("c1", "-n 30 -timeout %s http://web/", slow(2*time.Second)), 3)
	ovns, taskns := s.ovns("node1", "app"), ""
	for _, n := range strings.Fields(lines(s.ok("node1", "ip netns list"))) {
		if strings.HasPrefix(n, "shoal-"+s.Name+"-node1-task-c1") {
			taskns = n
		}
	}
	in := func(ns, line string, args ...any) string { return s.ok("node1", "ip netns exec "+ns+" "+line, args...) }
	in(ovns, "ip link add foreign0 type veth peer name foreign1")
	in(ovns, "ip addr add 192.0.2.1/24 dev foreign0")
	in(ovns, "ip link set foreign0 up")
	in(ovns, "nft add table ip foreign")
	in(ovns, "ip route add 198.51.100.0/24 dev foreign0")
	// A device may be somebody's: it stays, and the doctor names it. Rules and routes
	// in here decide where packets go, which is ours to say.
	s.eventually(slow(10*time.Second), func() error {
		if r := s.on("node1", "ip", "netns", "exec", ovns, "nft", "list", "table", "ip", "foreign"); r.code == 0 {
			return fmt.Errorf("a foreign table is still there: %s", r.out)
		}
		if got := in(ovns, "ip route show 198.51.100.0/24"); got != "" {
			return fmt.Errorf("a foreign route is still there: %s", got)
		}
		if r := s.on("node1", "shoal", "doctor"); !strings.Contains(r.out, "foreign0") {
			return fmt.Errorf("the doctor does not name foreign0: %s", r.out)
		}
		return nil
	})
	var remote string // another node's endpoint
	for _, x := range s.running("web") {
		if x.NodeName == "node2" {
			remote = x.Attachments[0].Addrs[0]
		}
	}
	route := s.ok("node1", "ip netns exec %s ip route show %s", ovns, remote)
	via := strings.Fields(route)[2]
	veth := ""
	for l := range strings.Lines(in(ovns, "ip -o route show")) {
		if f := strings.Fields(l); f[0] == s.task("c1").Attachments[0].Addrs[0] {
			veth = f[slices.Index(f, "dev")+1]
		}
	}
	vip := s.ok("node1", "shoal svc ls --filter name=web --format {{.VirtualIP}}")
	rules := []string{}
	for l := range strings.Lines(in(ovns, "nft list tables")) {
		if f := strings.Fields(l); strings.HasPrefix(f[2], "shoal") {
			rules = append(rules, fmt.Sprintf("ip netns exec %s nft delete table %s %s", ovns, f[1], f[2]))
			rules = append(rules, fmt.Sprintf("ip netns exec %s nft flush table %s %s", ovns, f[1], f[2]))
		}
	}
	deletions := append([]string{
		"ip netns exec " + ovns + " ip link del vx",
		"ip netns exec " + ovns + " ip route del " + remote,
		"ip netns exec " + ovns + " ip neigh del " + via + " dev vx",
		"ip netns exec " + ovns + " ip link del " + veth,
		"ip netns exec " + ovns + " ip addr del " + vip + "/32 dev lo",
		"ip netns exec " + ovns + " ip link del out",
		"ip netns exec " + ovns + " ip link set vx down",
		"ip netns exec " + taskns + " ip route del default",
		"ip netns exec " + taskns + " ip link del eth0",
		"nft delete table ip shoal-" + s.Name + "-node1-ingress",
	}, rules...)
	whole := func() string {
		out := in(ovns, "sh -c 'ip -br link; ip -br addr show lo; ip route show table all; ip neigh show nud permanent; nft list chains; ip -n %s -br addr; ip -n %s route'", taskns, taskns) +
			s.ok("node1", "nft list chains")
		// Without what is another each time: MAC addresses, the peers' numbers.
		out = regexp.MustCompile(`@if\d+|([0-9a-f]{2}:){5}[0-9a-f]{2} <.*>|inet6? fe80\S*`).ReplaceAllString(out, "")
		ls := strings.Split(out, "\n")
		for i := range ls { // addresses of lo, on one line
			f := strings.Fields(ls[i])
			slices.Sort(f)
			ls[i] = strings.Join(f, " ")
		}
		slices.Sort(ls)
		return strings.Join(ls, "\n")
	}
	before := whole()
	for _, d := range deletions {
		s.ok("node1", "%s", d)
		s.eventually(slow(10*time.Second), func() error {
			if now := whole(); now != before {
				return fmt.Errorf("after %s: missing %q, new %q", d, missing(before, now), missing(now, before))
			}
			return nil
		})
		s.eventually(slow(10*time.Second), func() error {
			l := s.inTask("c1", "-n 12 -timeout %s http://web/", slow(time.Second))
			if l.Failed > 0 || len(l.Hosts) != 3 {
				return fmt.Errorf("after %s: %+v", d, l)
			}
			for _, n := range nodes {
				if r := s.on(n, filepath.Join(bin, "load"), "-n", "6", "-timeout", slow(time.Second).String(), "http://127.0.0.1:8080/"); r.code != 0 || s.parseLoad(r.out).Failed > 0 {
					return fmt.Errorf("after %s: published port on %s: %s", d, n, r.out)
				}
			}
			return nil
		})
	}
	if got := in(ovns, "ip link show foreign0"); got == "" {
		t.Error("a device that is not ours is gone")
	}
	in(ovns, "ip link del foreign0")
}

// missing are the lines of a that b has not.
func missing(a, b string) (out []string) {
	have := strings.Split(b, "\n")
	for l := range strings.SplitSeq(a, "\n") {
		if !slices.Contains(have, l) {
			out = append(out, l)
		}
	}
	return out
}

// TestPartition: each side keeps serving what it has, and both are one again
// after it heals.
func TestPartition(t *testing.T) {
	onlyNative(t)
	t.Parallel()
	s := own(t, "itpart", labOptions())
	s.ok("node1", "shoal net create app")
	s.whoami("web", 3, "--network app")
	s.clients("app")
	if err := s.Partition([]string{"node1", "node2"}, []string{"node3"}); err != nil {
		t.Fatal(err)
	}
	// The majority replaces what it can't reach; the minority serves what it has.
	s.eventually(40*time.Second, func() error {
		xs := s.running("web")
		if n := len(slices.DeleteFunc(xs, func(x task) bool { return x.NodeName == "node3" })); n != 3 {
			return fmt.Errorf("%d replicas on the majority's side", n)
		}
		return nil
	})
	s.fair("majority", s.inTask("c1", "-n 60 http://web/"), 3)
	s.eventually(20*time.Second, func() error {
		r := s.on("node3", "shoal", "exec", "c3", filepath.Join(bin, "load"), "-n", "20", "http://web/")
		var l load
		if err := json.Unmarshal([]byte(r.out), &l); err != nil || l.Failed > 0 || l.OK == 0 {
			return fmt.Errorf("minority: %s%s", r.out, r.err)
		}
		return nil
	})
	if err := s.Heal(); err != nil {
		t.Fatal(err)
	}
	s.eventually(40*time.Second, func() error {
		if got := s.ok("node1", "shoal node ls --format {{.Name}}={{.Status}}"); strings.Count(got, "=ready") != 3 {
			return fmt.Errorf("nodes: %s", got)
		}
		if n := len(s.running("web")); n != 3 {
			return fmt.Errorf("%d replicas", n)
		}
		for _, c := range []string{"c1", "c2", "c3"} {
			r := s.on("node1", "shoal", "exec", c, filepath.Join(bin, "load"), "-n", "30", "http://web/")
			if r.code != 0 {
				return fmt.Errorf("%s: %s", c, r.err)
			}
			if l := s.parseLoad(r.out); l.Failed > 0 || len(l.Hosts) != 3 {
				return fmt.Errorf("%s: %+v", c, l)
			}
		}
		return nil
	})
}

// leader is the name of the managers' leader.
func (s site) leader() string {
	s.Helper()
	for l := range strings.Lines(s.ok("node1", "shoal node ls --format '{{.Name}} {{.Role}}'")) {
		if f := strings.Fields(l); len(f) > 1 && strings.EqualFold(f[1], "leader") {
			return f[0]
		}
	}
	s.Fatalf("no leader: %s", s.ok("node1", "shoal node ls"))
	return ""
}

func TestALeaderDies(t *testing.T) {
	onlyNative(t)
	t.Parallel()
	s := own(t, "itlead", labOptions())
	s.whoami("web", 2, "")
	leader := s.leader()
	if err := s.Kill(t.Context(), leader); err != nil {
		t.Fatal(err)
	}
	other := nodes[0]
	if other == leader {
		other = nodes[1]
	}
	s.eventually(40*time.Second, func() error {
		if r := s.on(other, "shoal", "net", "create", "late"); r.code != 0 && !strings.Contains(r.err, "exists") {
			return fmt.Errorf("%s", r.err)
		}
		return nil
	})
	s.ok(other, "shoal svc create --name late --replicas 2 --network late -- %s/whoami", bin)
}

// TestLeave: a node that leaves keeps nothing of ours, and what was there before.
func TestLeave(t *testing.T) {
	onlyNative(t)
	t.Parallel()
	s := own(t, "itleave", labOptions())
	s.ok("node3", "ip link add keep0 type veth peer name keep1")
	s.ok("node3", "nft add table ip keep")
	before := s.ok("node3", "ip -o link") + s.ok("node3", "nft list ruleset")
	s.ok("node1", "shoal net create app")
	s.whoami("web", 3, "--network app --publish 8080:80")
	s.ok("node3", "shoal leave")
	s.awaitRunning("web", 3)
	for _, x := range s.running("web") {
		if x.NodeName == "node3" {
			t.Errorf("%s runs on a node that left", x.Name)
		}
	}
	for _, ns := range strings.Fields(lines(s.ok("node1", "ip netns list"))) {
		if strings.HasPrefix(ns, "shoal-"+s.Name+"-node3-") {
			t.Errorf("namespace %s is left", ns)
		}
	}
	rules := s.ok("node3", "nft list ruleset")
	if strings.Contains(rules, "shoal") || !strings.Contains(rules, "table ip keep") {
		t.Errorf("rules after leave:\n%s\nbefore:\n%s", rules, before)
	}
	if links := s.ok("node3", "ip -o link"); strings.Contains(links, ": sho") || !strings.Contains(links, "keep0") {
		t.Errorf("links after leave:\n%s", links)
	}
	s.eventually(20*time.Second, func() error {
		if got := s.ok("node1", "shoal node ls --format {{.Name}}"); strings.Contains(got, "node3") {
			return fmt.Errorf("nodes: %s", got)
		}
		return nil
	})
	token := s.ok("node1", "shoal token show -q worker")
	s.ok("node3", "shoal join --token %s 172.30.0.1", token) // and may come back
	s.ok("node1", "shoal svc scale web=6")
	s.awaitRunning("web", 6)
}
