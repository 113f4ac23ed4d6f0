package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/lab"
	"github.com/shoalnet/shoal/spec"
)

// network is what net inspect shows.
func (s site) network(name string) (n spec.Network) {
	s.Helper()
	var all []struct {
		spec.Network
		Created time.Time `json:"created"` // as people read it, not as it is kept
	}
	if err := json.Unmarshal([]byte(s.ok("node1", "shoal net inspect -o json %s", name)), &all); err != nil || len(all) != 1 {
		s.Fatalf("net inspect %s: %v", name, err)
	}
	return all[0].Network
}

// TestNoWayBetweenNetworks: two networks don't reach each other, by no way that a task may
// try; a task on both reaches both.
func TestNoWayBetweenNetworks(t *testing.T) {
	onlyNative(t)
	s := shared(t)
	s.ok("node1", "shoal net create a")
	s.ok("node1", "shoal net create b")
	s.whoami("webb", 2, "--network b --constraint node.name!=node3")
	s.ok("node1", "shoal run -d --name here --network b -- %s/whoami", bin)
	s.ok("node2", "shoal run -d --name there --network b -- %s/whoami", bin)
	s.ok("node1", "shoal run -d --name c --network a -- sleep 10000")
	s.ok("node2", "shoal run -d --name a2 --network a -- sleep 10000")
	s.ok("node1", "shoal run -d --name both --network a --network b -- sleep 10000")
	vip := s.ok("node1", "shoal svc ls --filter name=webb --format {{.VirtualIP}}")
	targets := []string{vip, s.task("here").Attachments[0].Addrs[0], s.task("there").Attachments[0].Addrs[0], s.network("b").Gateways[0].String()}
	for _, a := range targets[:3] {
		if r := s.on("node1", "shoal", "exec", "both", "curl", "-s", "-m", slowSecs(5), "http://"+a+"/"); r.code != 0 {
			t.Errorf("a task on both networks does not reach %s: exit status %d", a, r.code)
		}
	}
	for _, a := range targets {
		if r := s.on("node1", "shoal", "exec", "c", "curl", "-s", "-m", slowSecs(2), "http://"+a+"/"); r.code == 0 {
			t.Errorf("a task of network a reaches %s of network b", a)
		}
		if r := s.on("node1", "curl", "-s", "-m", slowSecs(2), "http://"+a+"/"); r.code == 0 {
			t.Errorf("the node reaches %s of network b", a)
		}
	}
	if r := s.on("node1", "shoal", "exec", "c", "getent", "hosts", "webb"); r.code == 0 {
		t.Errorf("network a knows a name of network b: %s", r.out)
	}
	// The way out of one network, taken by hand, is no way into another.
	host, _ := s.network("b").Egress()
	_, inner := s.network("b").Egress()
	for _, via := range []string{host.String(), inner.String()} {
		s.on("node1", "shoal", "exec", "c", "ping", "-c1", "-W1", via)
		if r := s.on("node1", "shoal", "exec", "c", "curl", "-s", "-m", slowSecs(2), "http://"+via+"/"); r.code == 0 {
			t.Errorf("a task of network a reaches %s", via)
		}
	}
	s.awayFromAgents("c")

	// What goes between the nodes takes no entry of their conntrack tables. There
	// may be some of before their rules were made.
	for _, n := range nodes[:2] {
		s.on(n, "conntrack", "-D", "-p", "udp", "--orig-port-dst", "4789")
	}
	s.ok("node1", "shoal exec c ping -c 3 -i 0.2 -W %s %s", slowSecs(5), s.task("a2").Attachments[0].Addrs[0])
	for _, n := range nodes[:2] {
		if got := s.ok(n, "conntrack -L -p udp --orig-port-dst 4789"); got != "" {
			t.Errorf("%s tracks VXLAN packets: %s", n, got)
		}
	}
}

// awayFromAgents: agents do what they are asked, so a task is not to ask them,
// its own node's or another's. What else listens on a node it may reach, as in
// Docker.
func (s site) awayFromAgents(task string) {
	s.Helper()
	for _, n := range s.Nodes() {
		addr := n.Addr.String()
		for _, port := range []string{"2377", "7946"} {
			if r := s.on("node1", "nc", "-z", "-w2", addr, port); r.code != 0 {
				s.Errorf("the node itself does not reach the agent at %s:%s: exit status %d", addr, port, r.code)
			}
			start := time.Now()
			if r := s.on("node1", "shoal", "exec", task, "nc", "-z", "-w20", addr, port); r.code == 0 {
				s.Errorf("a task reaches the agent at %s:%s", addr, port)
			} else if time.Since(start) > 15*time.Second {
				s.Errorf("a task waits for the agent at %s:%s: it should be refused", addr, port)
			}
		}
		srv := exec.Command("ip", "netns", "exec", n.Netns, filepath.Join(bin, "whoami"), "-http", addr+":8099", "-udp", "", "-tcp", "")
		if err := srv.Start(); err != nil {
			s.Fatal(err)
		}
		s.eventually(slow(10*time.Second), func() error {
			if r := s.on("node1", "shoal", "exec", task, "curl", "-s", "-m", slowSecs(2), "http://"+addr+":8099/"); r.code != 0 {
				return fmt.Errorf("a task does not reach a service of %s: exit status %d", n.Name, r.code)
			}
			return nil
		})
		_ = srv.Process.Kill()
		_ = srv.Wait()
	}
}

func slowSecs(n int) string { return fmt.Sprint(int(slow(time.Duration(n) * time.Second).Seconds())) }

// ovns is a network's namespace on a node.
func (s site) ovns(node, network string) string {
	s.Helper()
	ns, err := nl.List("shoal-" + s.Name + "-" + node + "-net-" + network + "-")
	if err != nil || len(ns) != 1 {
		s.Fatalf("namespaces of network %s on %s: %v %v", network, node, ns, err)
	}
	return ns[0]
}

// testdata is the path of a script for tasks, which are elsewhere.
func testdata(t *testing.T, name string) string {
	t.Helper()
	path, err := filepath.Abs(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// TestForgedPackets: of a task with raw sockets, and of a machine that is no
// member. That the same packets arrive when nothing is wrong with them shows
// that the test could fail.
func TestForgedPackets(t *testing.T) {
	onlyNative(t)
	s := shared(t)
	s.ok("node1", "shoal net create a")
	s.ok("node1", "shoal net create b")
	s.ok("node1", "shoal run -d --name evil --network a -- sleep 10000")
	s.forgedPackets()
}

// forgedPackets has task evil, on node1 and network a, try to be another, and to reach
// network b.
func (s site) forgedPackets() {
	s.Helper()
	t := s.T
	script := testdata(t, "spoof.py")
	heard := filepath.Join(t.TempDir(), "heard")
	if err := os.Chmod(filepath.Dir(heard), 0o777); err != nil {
		t.Fatal(err)
	}
	s.ok("node2", "shoal run -d --name victim --network a --network b -- python3 %s listen %s", script, heard)
	s.ok("node1", "shoal run -d --name good --network a --network b -- sleep 10000")
	a, b := s.task("victim").Attachments[0].Addrs[0], s.task("victim").Attachments[1].Addrs[0]
	evil, good := s.task("evil").Attachments[0].Addrs[0], s.task("good").Attachments[0].Addrs[0]
	goodB := s.task("good").Attachments[1].Addrs[0]
	vni := fmt.Sprint(s.network("b").VNI)
	var node2 struct{ Number int }
	var all []struct{ Number int }
	if err := json.Unmarshal([]byte(s.ok("node1", "shoal node inspect -o json node2")), &all); err != nil || len(all) != 1 {
		t.Fatalf("node inspect: %v", err)
	}
	node2.Number = all[0].Number
	mac := spec.VTEPMAC(node2.Number).String()
	under := s.addrOf("node2")
	has := func(text string) bool {
		b, _ := os.ReadFile(heard)
		return slices.ContainsFunc(strings.Split(string(b), "\n"), func(l string) bool { return strings.HasPrefix(l, text+" ") })
	}
	s.eventually(10*time.Second, func() error {
		_, err := os.Stat(heard)
		return err
	})
	// until sends, again and again, until it is heard.
	until := func(text string, send func()) {
		t.Helper()
		s.eventually(10*time.Second, func() error {
			send()
			if !has(text) {
				return fmt.Errorf("%q does not arrive", text)
			}
			return nil
		})
	}
	send := func(task, line string, args ...any) {
		s.on("node1", append([]string{"shoal", "exec", task, "python3", script}, words(fmt.Sprintf(line, args...))...)...)
	}
	until("own-address", func() { send("evil", "source %s %s own-address", evil, a) })
	send("evil", "source %s %s stolen-address", good, a)
	send("evil", "source %s %s foreign-address", goodB, a)
	send("evil", "source %s %s gateway-address", s.network("a").Gateways[0], a)
	// The end of what another task sends: its beginning completes it.
	until("fragments-of-a-task", func() { send("good", "fragment %s %s 01 fragments-of-a-task", good, a) })
	send("evil", "fragment %s %s 1 stolen-fragment", good, a)
	send("good", "fragment %s %s 0 stolen-fragment", good, a)
	// Into network b by its VNI: from a task, by its own node and straight to
	// the other; from a machine that is no member.
	for _, node := range []string{under, s.addrOf("node1")} {
		send("evil", "vxlan %s %s %s 4789 %s %s task-vxlan", vni, mac, node, goodB, b)
	}
	if err := nl.Do("shoal-"+s.Name+"-underlay", func() error { return nil }); err != nil {
		t.Fatal(err)
	}
	if out, err := s.client("python3", script, "vxlan", vni, mac, under, "4789", goodB, b, "outsider-vxlan"); err != nil {
		t.Fatalf("vxlan from outside: %v %s", err, out)
	}
	until("member-vxlan", func() {
		s.ok("node1", "python3 %s vxlan %s %s %s 4789 %s %s member-vxlan", script, vni, mac, under, goodB, b)
	})
	// What was sent before has long arrived, if it did.
	until("last", func() { send("evil", "source %s %s last", evil, a) })
	for _, text := range []string{"stolen-address", "foreign-address", "gateway-address", "stolen-fragment", "task-vxlan", "outsider-vxlan"} {
		if has(text) {
			t.Errorf("%s arrives", text)
		}
	}
}

// TestNobodySaysWhatIsTooBig: a task that tells its network's router that what
// the router sent to another task was too big would have it send that one small
// packets only, whoever they come from, for ten minutes.
func TestNobodySaysWhatIsTooBig(t *testing.T) {
	onlyNative(t)
	s := shared(t)
	script := testdata(t, "spoof.py")
	s.ok("node1", "shoal net create a")
	s.ok("node1", "shoal net create --opt icc=false alone")
	s.whoami("web", 1, "--network a --network alone")
	for _, network := range []string{"a", "alone"} {
		victim, evil := "victim-"+network, "evil-"+network
		for _, name := range []string{victim, evil} {
			s.ok("node1", "shoal run -d --name %s --network %s -- sleep 10000", name, network)
		}
		to, from := s.task(victim).Attachments[0].Addrs[0], s.task(evil).Attachments[0].Addrs[0]
		ns := s.ovns("node1", network)
		known := func() string {
			out, err := exec.Command("ip", "-n", ns, "route", "get", to).CombinedOutput()
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			return string(out)
		}
		vip := strings.Fields(s.ok("node1", "shoal exec %s getent hosts web", evil))[0]
		for _, router := range []string{"169.254.1.1", s.network(network).Gateways[0].String(), vip} {
			s.ok("node1", "shoal exec %s python3 %s toobig %s %s %s", evil, script, from, router, to)
			if got := known(); strings.Contains(got, "mtu") {
				t.Errorf("network %s: told by %s as the sender, the router goes by it: %s", network, router, got)
			}
		}
	}
}

// TestPortsAreNotTaken: the way out lends a task its node's address, but not the
// ports where the node, or a published port, is spoken to. A task that sends
// from one of these to where a client will come from would be given what that
// client sends, as the answer.
func TestPortsAreNotTaken(t *testing.T) {
	onlyNative(t)
	s := shared(t)
	script := testdata(t, "spoof.py")
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	s.ok("node1", "shoal net create a")
	s.ok("node1", "shoal net create b")
	s.whoami("web", 1, "--network b -p 8140:9000/udp -p 40140:9000/udp")
	s.whoami("loc", 1, "--network b --constraint node.name==node1 -p published=8141,target=9000,protocol=udp,mode=host")
	under := s.addrOf("node1")
	cases := []struct {
		network, what string
		port, ttl     int
		open          bool
	}{
		{"a", "a published port of another network", 8140, 64, true},
		{"a", "a high published port of another network", 40140, 64, true},
		{"a", "a host's port of another network", 8141, 64, true},
		// It gets no further than the ovns, whose own table must not have it.
		{"b", "a host's port of its network", 8141, 2, true},
		{"a", "gossip", 7946, 64, false},
		{"a", "control", 2377, 64, false},
		{"a", "VXLAN", 4789, 64, false},
	}
	heard := func(i int) string { return filepath.Join(dir, fmt.Sprint(i)) }
	for i, x := range cases {
		s.ok("node1", "shoal run -d --name t%d --network %s -- python3 %s shadow %d %s %d %d %s", i, x.network, script, x.port, outsideAddr, 41000+i, x.ttl, heard(i))
	}
	for i := range cases {
		s.eventually(slow(10*time.Second), func() error {
			_, err := os.Stat(heard(i))
			return err
		})
	}
	var all sync.WaitGroup
	for i, x := range cases {
		all.Go(func() {
			out, err := s.client("sh", "-c", fmt.Sprintf("echo secret | nc -u -p %d -w 1 %s %d", 41000+i, under, x.port))
			if b, _ := os.ReadFile(heard(i)); len(b) > 0 {
				t.Errorf("a task of network %s hears what a client sends to %s: %s", x.network, x.what, b)
			} else if x.open && out == "" {
				t.Errorf("%s does not answer: %v", x.what, err)
			}
		})
	}
	all.Wait()
}

// TestMadeUpNeighbours: the kernel has room for 1,024 neighbours that it had to
// ask for, of all namespaces together. A task that filled it would have the node
// find no other machine any more.
func TestMadeUpNeighbours(t *testing.T) {
	onlyNative(t)
	s := shared(t)
	script := testdata(t, "neigh.py")
	s.ok("node1", "shoal net create --subnet 10.79.0.0/24 --subnet fd00:79::/64 six")
	s.ok("node1", "shoal run -d --name evil --network six -- sleep 10000")
	s.ok("node2", "shoal run -d --name other --network six -- sleep 10000")
	var six string
	for _, a := range s.task("evil").Attachments[0].Addrs {
		if strings.Contains(a, ":") {
			six = a
		}
	}
	s.ok("node1", "shoal exec evil python3 %s 20 %s", script, six)
	// What it sent before has been seen by now.
	for _, a := range s.task("other").Attachments[0].Addrs {
		s.ok("node1", "shoal exec evil ping -c 1 -W 5 %s", a)
	}
	out, err := exec.Command("ip", "-n", s.ovns("node1", "six"), "neigh").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range strings.Split(string(out), "\n") {
		if strings.HasPrefix(l, "11.0.0.") || strings.HasPrefix(l, "fe80::b:") {
			t.Errorf("a task made its network remember %s", l)
		}
	}
}

// TestNoWayAroundRules: a packet whose checksum the network card is to put where
// the sender says is another one behind the card than before every rule; and
// AF_VSOCK sockets are of no network namespace. Tasks have neither.
func TestNoWayAroundRules(t *testing.T) {
	onlyNative(t)
	s := shared(t)
	script := testdata(t, "around.py")
	s.ok("node1", "shoal net create a")
	s.ok("node1", "shoal run -d --name evil --network a -- sleep 10000")
	for _, how := range []string{"run --rm --network a --", "exec evil"} {
		if got := s.ok("node1", "shoal %s python3 %s", how, script); got != "raw sockets: yes\nvirtio headers: EPERM\nvirtio header size: EPERM\nXDP: EPERM\nio_uring: ENOSYS\nvsock: EPERM" {
			t.Errorf("%s: %s", how, got)
		}
	}
}

// TestContainersAreConfined: what tasks of the node try in vain, a container tries as
// root and as another user; and it sees nothing of the agents', of containerd's and of
// other containers' files, even with the node's whole file system mounted.
func TestContainersAreConfined(t *testing.T) {
	onlyNative(t)
	t.Parallel()
	busybox := needContainers(t)
	s := own(t, "confined", lab.Options{Nodes: 2, Managers: 2, Containers: true})
	box := build(t, "amd64", map[string]string{"bin/busybox": busybox, "bin/sh": busybox}, map[string]any{"Entrypoint": []string{"/bin/busybox", "sleep", "10000"}, "StopSignal": "SIGKILL"})
	s.ok("node1", "shoal image load -i %s", box.archive(t, "box:1"))
	s.ok("node1", "shoal net create a")
	s.ok("node1", "shoal net create b")
	// With the node's programs, for the attacks.
	tools := ""
	for _, d := range []string{"/usr", "/lib", "/lib64", "/etc/alternatives", filepath.Dir(testdata(t, "spoof.py"))} {
		tools += fmt.Sprintf(" -v %s:%s:ro", d, d)
	}
	s.ok("node1", "shoal run -d --name evil --network a%s box:1", tools)
	s.ok("node1", "shoal run -d --name user -u 1000:1000 --network a%s box:1", tools)
	s.forgedPackets()
	for _, task := range []string{"evil", "user"} {
		s.awayFromAgents(task)
		targets := append([]string{s.network("b").Gateways[0].String()}, s.task("victim").Attachments[1].Addrs...)
		for _, a := range append(targets, s.task("good").Attachments[1].Addrs...) {
			if r := s.on("node1", "shoal", "exec", task, "ping", "-c1", "-W1", a); r.code == 0 {
				t.Errorf("%s, on network a, reaches %s of network b", task, a)
			}
		}
		if r := s.on("node1", "shoal", "exec", task, "getent", "hosts", "good.b"); r.code == 0 {
			t.Errorf("%s knows a name of network b: %s", task, r.out)
		}
	}
	around := testdata(t, "around.py")
	if got := s.ok("node1", "shoal exec evil python3 %s", around); got != "raw sockets: yes\nvirtio headers: EPERM\nvirtio header size: EPERM\nXDP: EPERM\nio_uring: ENOSYS\nvsock: EPERM" {
		t.Errorf("as root: %s", got)
	}
	if r := s.on("node1", "shoal", "exec", "user", "python3", around); r.code == 0 || !strings.Contains(r.err, "Operation not permitted") {
		t.Errorf("as another user, raw sockets: %s %s", r.out, r.err)
	}

	sh := func(flags, script string) result {
		return s.on("node1", append(append([]string{"shoal", "run", "--rm", "--network", "a"}, strings.Fields(flags)...), "--entrypoint", "/bin/sh", "box:1", "-c", script)...)
	}
	// Files: with all of the node in it, its agents and their containerd are not.
	if got := sh("-v /:/host", "ls -A /host"+s.Dir); got.code != 0 || got.out != "" {
		t.Errorf("a container with the node's / sees of the agents': %q %s", got.out, got.err)
	}
	for _, dir := range []string{s.Dir, s.Nodes()[0].Dir + "/data", s.Nodes()[0].Socket, filepath.Join(s.Dir, "containerd/sock")} {
		if got := sh("-v "+dir+":/x", "ls /x"); got.code != 125 || !strings.Contains(got.err, "hidden from tasks") {
			t.Errorf("%s in a container: exit status %d, %q, %s", dir, got.code, got.out, got.err)
		}
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(s.Nodes()[0].Dir, link); err != nil {
		t.Fatal(err)
	}
	if got := sh("-v "+link+":/x", "ls /x"); got.code != 125 || !strings.Contains(got.err, "hidden from tasks") {
		t.Errorf("by a symbolic link: exit status %d, %q, %s", got.code, got.out, got.err)
	}
	// The kernel.
	for what, script := range map[string]string{
		"other processes": "test $(ls -d /proc/[0-9]* | wc -l) -gt 5",
		"mounts":          "mkdir /tmp/m && mount -t tmpfs none /tmp/m",
		"a disk":          "mknod /tmp/d b 254 0 && head -c 1 /tmp/d",
		"sysctls":         "echo 1 > /proc/sys/kernel/sysrq",
		"control groups":  "mkdir /sys/fs/cgroup/memory/x",
		"user namespaces": "unshare -U true",
	} {
		for _, user := range []string{"", "-u 1000"} {
			if got := sh(user, script); got.code == 0 {
				t.Errorf("a container (%s) has %s: %s", user, what, got.out)
			}
		}
	}
}
