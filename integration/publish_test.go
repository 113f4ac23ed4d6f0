package integration

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// addrOf is a node's address on the underlay.
func (s site) addrOf(node string) string {
	for _, n := range s.Nodes() {
		if n.Name == node {
			return n.Addr.String()
		}
	}
	s.Fatalf("no node %s", node)
	return ""
}

// client runs a command outside of the cluster, at 172.30.0.254.
func (s site) client(args ...string) (string, error) {
	cmd := exec.Command("ip", append([]string{"netns", "exec", "shoal-" + s.Name + "-underlay"}, args...)...)
	out, err := cmd.Output()
	return strings.TrimSpace(string(out)), err
}

// outsideLoad asks from outside.
func (s site) outsideLoad(args ...string) load {
	s.Helper()
	out, err := s.client(append([]string{filepath.Join(bin, "load"), "-timeout", slow(2 * time.Second).String()}, args...)...)
	if err != nil {
		s.Fatalf("load %v: %v", args, err)
	}
	return s.parseLoad(out)
}

const outsideAddr = "172.30.0.254"

// TestPublishedPort: every node answers, with a replica or without, and servers
// see the outside client.
func TestPublishedPort(t *testing.T) {
	s := shared(t)
	s.ok("node1", "shoal net create app")
	s.whoami("web", 3, "--network app -p 8080:80 -p 9000:9000/udp --publish published=9001,target=9000")
	s.whoami("one", 1, "--network app -p 8081:80 -p published=8082,target=80,nat=true -p published=8083,target=9000,protocol=udp,nat=true")
	s.clients("app")
	few := fmt.Sprint(requests() / 10)
	entries := nodes
	if inVM {
		entries = nodes[1:2]
	}
	for _, n := range entries {
		a := s.addrOf(n)
		for url, servers := range map[string]int{"http://" + a + ":8080/": 3, "udp://" + a + ":9000": 3, "tcp://" + a + ":9001": 3, "http://" + a + ":8081/": 1} {
			l := s.outsideLoad("-n", fmt.Sprint(requests()/10*3), url)
			s.fair(url, l, servers)
			if got := keys(l.Clients); !slices.Equal(got, []string{outsideAddr}) {
				t.Errorf("%s: servers saw %v, the client is %s", url, got, outsideAddr)
			}
		}
		for _, url := range []string{"http://" + a + ":8082/", "udp://" + a + ":8083"} {
			l := s.outsideLoad("-n", few, url)
			s.fair(url, l, 1)
			if _, ok := l.Clients[outsideAddr]; ok {
				t.Errorf("nat=true: %s: servers saw %v", url, l.Clients)
			}
		}
		// From the node itself.
		for _, url := range []string{"http://127.0.0.1:8080/", "http://" + a + ":8080/", "udp://127.0.0.1:9000", "udp://" + a + ":9000", "http://localhost:8081/"} {
			l := s.parseLoad(s.ok(n, "%s/load -n %s -timeout %s %s", bin, few, slow(2*time.Second), url))
			if l.Failed > 0 || fmt.Sprint(l.OK) != few {
				t.Errorf("%s itself: %s: %+v", n, url, l)
			}
		}
	}
	// From a node to another, and from a task by way of its own and another node.
	s.fair("node to node", s.parseLoad(s.ok("node1", "%s/load -n 30 http://%s:8080/", bin, s.addrOf("node2"))), 3)
	for _, n := range entries {
		s.fair("a task by "+n, s.inTask("c1", "-n 9 -timeout %s http://%s:8080/", slow(2*time.Second), s.addrOf(n)), 3)
	}
	// While its replicas are scaled, and without any.
	s.ok("node1", "shoal svc scale web=0")
	for _, n := range nodes {
		l := s.outsideLoad("-n", "3", "http://"+s.addrOf(n)+":8080/")
		if l.OK != 0 || l.Errors["connection refused"] != 3 {
			t.Errorf("%s without a replica: %+v", n, l)
		}
	}
	s.ok("node1", "shoal svc scale web=2")
	for _, n := range entries {
		s.fair("again", s.outsideLoad("-n", "10", "http://"+s.addrOf(n)+":8080/"), 2)
	}
	s.ok("node1", "shoal svc rm web")
	s.eventually(slow(10*time.Second), func() error {
		l := s.outsideLoad("-n", "1", "http://"+s.addrOf("node2")+":8080/")
		if l.Errors["connection refused"] != 1 {
			return fmt.Errorf("after rm: %+v", l)
		}
		return nil
	})
}

func TestPublishModes(t *testing.T) {
	onlyNative(t)
	s := shared(t)
	s.ok("node1", "shoal net create app")
	s.whoami("loc", 1, "--network app --constraint node.name==node2 -p published=8090,target=80,mode=local")
	s.whoami("hst", 1, "--network app --constraint node.name==node3 -p published=8091,target=80,mode=host")
	s.ok("node1", "shoal run -d --name solo --network app -p 8092:80 -- %s/whoami", bin)
	s.ok("node1", "shoal run -d --name private --network app -p 127.0.0.1:8093:80 -- %s/whoami", bin)
	for port, node := range map[string]string{"8090": "node2", "8091": "node3", "8092": "node1"} {
		for _, n := range nodes {
			l := s.outsideLoad("-n", "6", "http://"+s.addrOf(n)+":"+port+"/")
			if n == node {
				s.fair(port, l, 1)
				if l.Clients[outsideAddr] != 6 {
					t.Errorf("port %s: servers saw %v", port, l.Clients)
				}
			} else if l.OK > 0 || l.Errors["connection refused"] != 6 {
				t.Errorf("port %s on %s: %+v", port, n, l)
			}
		}
	}
	for n, want := range map[string]string{"node1": "503", "node2": "200", "node3": "503"} {
		if got, _ := s.client("curl", "-sk", "-o", "/dev/null", "-w", "%{http_code}", "https://"+s.addrOf(n)+":2377/health/8090"); got != want {
			t.Errorf("health of port 8090 on %s: %s, want %s", n, got, want)
		}
	}
	if got, _ := s.client("curl", "-sk", "-o", "/dev/null", "-w", "%{http_code}", "https://"+s.addrOf("node1")+":2377/health/1"); got != "404" {
		t.Errorf("health of a port that is not published: %s", got)
	}
	if l := s.outsideLoad("-n", "2", "http://"+s.addrOf("node1")+":8093/"); l.OK > 0 {
		t.Errorf("127.0.0.1:8093 is reached from outside")
	}
	if l := s.parseLoad(s.ok("node1", "%s/load -n 3 http://127.0.0.1:8093/", bin)); l.OK != 3 {
		t.Errorf("127.0.0.1:8093 from the node: %+v", l)
	}
	if got := s.ok("node1", "shoal port solo"); !strings.Contains(got, "80/tcp") || !strings.Contains(got, "8092") {
		t.Errorf("port solo: %q", got)
	}
	if got := s.ok("node3", "shoal port loc"); !strings.Contains(got, "8090") {
		t.Errorf("port loc: %q", got)
	}
	if got := s.ok("node1", "shoal svc ls --filter name=loc"); !strings.Contains(got, "8090") {
		t.Errorf("svc ls: %s", got)
	}
}

func TestPublishChangesAndConflicts(t *testing.T) {
	onlyNative(t)
	s := shared(t)
	s.ok("node1", "shoal net create app")
	s.whoami("web", 2, "--network app -p 8100-8102:9000-9002 -p 80")
	dyn := s.ok("node1", "shoal port web 80/tcp")
	port := dyn[strings.LastIndexByte(dyn, ':')+1:]
	s.fair("dynamic port "+dyn, s.outsideLoad("-n", "20", "http://"+s.addrOf("node3")+":"+port+"/"), 2)
	s.fair("range", s.outsideLoad("-n", "20", "tcp://"+s.addrOf("node3")+":8100"), 2)
	s.fails("node2", "web", "shoal svc create --name thief --network app -p 8100:80 -- %s/whoami", bin)
	if got := s.ok("node1", "shoal svc ls -q --filter name=thief"); got != "" {
		t.Errorf("a refused service was made: %s", got)
	}
	pid := s.running("web")[0].ID
	s.ok("node1", "shoal svc update --publish-add 8110:80 --publish-rm 8100 web")
	s.fair("added", s.outsideLoad("-n", "20", "http://"+s.addrOf("node2")+":8110/"), 2)
	if l := s.outsideLoad("-n", "2", "tcp://"+s.addrOf("node2")+":8100"); l.OK > 0 {
		t.Error("a removed port answers")
	}
	if !slices.ContainsFunc(s.running("web"), func(x task) bool { return x.ID == pid }) {
		t.Error("a change of ports restarted the tasks")
	}
	for line, want := range map[string]string{
		"-p 0:0":                                 "target",
		"-p 70000:80":                            "70000",
		"-p 80:80/icmp":                          "icmp",
		"-p published=80,target=80,mode=odd":     "odd",
		"-p 8000-8001:80-85":                     "range",
		"-p nonsense":                            "nonsense",
		"-p 300.1.1.1:80:80":                     "300.1.1.1",
		"-p published=80,target=80,wrong=1":      "wrong",
		"-p 8200:80 -p 8200:81":                  "8200",
		"-p published=8201,target=80,mode=local": "", // right
	} {
		if want == "" {
			s.ok("node1", "shoal svc create --detach --name right --network app %s -- sleep 10", line)
			continue
		}
		s.fails("node1", want, "shoal svc create --detach --name wrong --network app %s -- sleep 10", line)
	}
}

// TestAForeignProgramKeepsItsPort on its node; the others go on.
func TestAForeignProgramKeepsItsPort(t *testing.T) {
	onlyNative(t)
	s := shared(t)
	holder := exec.Command(filepath.Join(bin, "shoal"), "lab", "exec", "--name", s.Name, "node2", "--", filepath.Join(bin, "whoami"), "-http", ":8120", "-udp", "", "-tcp", "")
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = holder.Process.Signal(syscall.SIGTERM)
		_ = holder.Wait()
	})
	s.eventually(10*time.Second, func() error {
		l := s.outsideLoad("-n", "1", "http://"+s.addrOf("node2")+":8120/")
		if l.OK != 1 {
			return fmt.Errorf("%+v", l)
		}
		return nil
	})
	s.ok("node1", "shoal net create app")
	s.whoami("web", 2, "--network app -p 8120:80")
	// Whoever manages the service is told, on whatever node: when it is made, and as
	// long as it is so.
	warning := "warning: node2: port 8120/tcp is held by whoami (pid "
	if r := s.on("node1", "shoal", "svc", "update", "--publish-add", "8121:80", "web"); r.code != 0 || strings.Count(r.err, warning) != 1 {
		t.Errorf("svc update: exit status %d: %s%s", r.code, r.out, r.err)
	}
	if r := s.on("node3", "shoal", "svc", "ps", "web"); r.code != 0 || !strings.Contains(r.err, warning) || strings.Contains(r.out, "warning") {
		t.Errorf("svc ps: exit status %d: %s%s", r.code, r.out, r.err)
	}
	if r := s.on("node2", "shoal", "run", "-d", "--name", "c2", "--network", "app", "-p", "8120:80", "--", "sleep", "1000"); r.code == 0 || !strings.Contains(r.err, "8120") {
		t.Errorf("run: exit status %d: %s%s", r.code, r.out, r.err)
	}
	s.fair("another node", s.outsideLoad("-n", "20", "http://"+s.addrOf("node1")+":8120/"), 2)
	if l := s.outsideLoad("-n", "4", "http://"+s.addrOf("node2")+":8120/"); l.OK != 4 || len(l.Hosts) != 1 {
		t.Errorf("the foreign program's port: %+v", l)
	}
	s.eventually(10*time.Second, func() error {
		if r := s.on("node2", "shoal", "doctor"); !strings.Contains(r.out+r.err, "whoami") {
			return fmt.Errorf("doctor does not name the program: %s%s", r.out, r.err)
		}
		return nil
	})
	_ = holder.Process.Signal(syscall.SIGTERM)
	_ = holder.Wait()
	s.eventually(10*time.Second, func() error {
		if r := s.on("node1", "shoal", "svc", "ps", "web"); r.code != 0 || r.err != "" {
			return fmt.Errorf("the program has let go, and svc ps says %s%s", r.out, r.err)
		}
		if l := s.outsideLoad("-n", "4", "http://"+s.addrOf("node2")+":8120/"); l.OK != 4 || len(l.Hosts) != 2 {
			return fmt.Errorf("the port that is free again: %+v", l)
		}
		return nil
	})
}

// TestADownloadAndManyConnections go through a node that runs no replica.
func TestADownloadAndManyConnections(t *testing.T) {
	onlyNative(t)
	s := shared(t)
	s.ok("node1", "shoal net create app")
	s.whoami("web", 1, "--network app --constraint node.name==node1 -p 8130:80 -p 8131:9000")
	const size = 200 << 20
	got, err := s.client("curl", "-s", "-o", "/dev/null", "-m", "120", "-w", "%{size_download}", fmt.Sprintf("http://%s:8130/bytes/%d", s.addrOf("node3"), size))
	if err != nil || got != fmt.Sprint(size) {
		t.Errorf("200 MB by node3: %s, %v", got, err)
	}
	l := s.outsideLoad("-n", "5000", "-rate", "2500", "http://"+s.addrOf("node3")+":8130/")
	if l.Failed > 0 || l.OK != 5000 {
		t.Errorf("5,000 connections: %d failed: %v", l.Failed, l.Errors)
	}
}
