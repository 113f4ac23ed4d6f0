package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/shoalnet/shoal/lab"
)

// TestBadInput: one clear line, an exit status that is not 0, nothing half-made.
func TestBadInput(t *testing.T) {
	onlyNative(t)
	s := shared(t)
	s.ok("node1", "shoal net create --subnet 10.77.0.0/24 app")
	s.whoami("web", 1, "--network app --vip 10.77.0.80")
	s.ok("node1", "shoal run -d --name c1 --network app --ip 10.77.0.90 -- sleep 1000")
	state := func() string {
		return s.ok("node1", "shoal net ls -q") + s.ok("node1", "shoal svc ls -q") + s.ok("node1", "shoal ps -aq")
	}
	before := state()
	for line, want := range map[string]string{
		// Names that are unknown, or taken.
		"net rm nosuch":                                   "nosuch",
		"net inspect nosuch":                              "nosuch",
		"svc rm nosuch":                                   "nosuch",
		"svc scale nosuch=2":                              "nosuch",
		"svc inspect nosuch":                              "nosuch",
		"svc ps nosuch":                                   "nosuch",
		"svc logs nosuch":                                 "nosuch",
		"exec nosuch true":                                "nosuch",
		"stop nosuch":                                     "nosuch",
		"node inspect nosuch":                             "nosuch",
		"node update --availability drain no":             "no",
		"net create app":                                  "app",
		"svc create --name web -- sleep 1":                "web",
		"run -d --name c1 -- sleep 1":                     "c1",
		"svc create --network nosuch --name x -- sleep 1": "nosuch",
		"run -d --network nosuch --name x -- sleep 1":     "nosuch",
		"run -d --node nosuch --name x -- sleep 1":        "nosuch",
		"net rm app":                                      "web",
		"net rm host":                                     "host",
		// Subnets and addresses.
		"net create --subnet 10.77.0.128/25 x":                       "app",
		"net create --subnet 10.78.0.1/24 x":                         "10.78.0.0/24",
		"net create --subnet 172.30.0.0/16 x":                        "172.30.0.0/24",
		"net create --subnet 10.78.0.0/31 x":                         "/30",
		"net create --subnet 999.1.0.0/24 x":                         "999.1.0.0/24",
		"net create --subnet 127.0.0.0/24 x":                         "reserved",
		"net create --subnet 10.78.0.0/24 --gateway 10.79.0.1 x":     "10.79.0.1",
		"net create --subnet 10.78.0.0/24 --ip-range 10.79.0.0/25 x": "10.79.0.0/25",
		"net create --opt mtu=12 x":                                  "576",
		"net create --opt nosuch=1 x":                                "nosuch",
		"net create --driver macvlan x":                              "macvlan",
		"net create 'a b'":                                           "a b",
		"svc create --network app --vip 10.77.0.80 --name x -- true": "web",
		"svc create --network app --vip 10.76.0.80 --name x -- true": "10.76.0.80",
		"run -d --network app --ip 10.77.0.90 --name x -- true":      "c1",
		"run -d --network app --ip 10.77.0.1 --name x -- true":       "10.77.0.1",
		"net connect --ip 10.77.0.80 app c1":                         "app",
		"net disconnect default c1":                                  "default",
		// Numbers.
		"svc scale web=-1":                             "-1",
		"svc scale web=100000":                         "65535",
		"svc scale web=many":                           "many",
		"svc scale web":                                "=",
		"svc create --replicas -1 --name x -- true":    "-1",
		"svc create --replicas 70000 --name x -- true": "65535",
		"svc create -p 99999:80 --name x -- true":      "99999",
		"svc create --endpoint-mode odd --name x -- y": "odd",
		"svc create --constraint x --name x -- true":   "==",
		"svc create --name x":                          "command",
		"svc create --hostname a..b --name x -- true":  "a..b",
		"svc create -e =x --name x -- true":            "=x",
		"svc create --env-file /nosuch --name x -- y":  "/nosuch",
		"svc create --dns nosuch --name x -- true":     "nosuch",
		"svc create --mode odd --name x -- true":       "mode",
		"svc nosuch":                                   "nosuch",
		"nosuch":                                       "nosuch",
	} {
		s.fails("node2", want, "shoal %s", line)
	}
	if now := state(); now != before {
		t.Errorf("half-made things are left:\n%s\nbefore:\n%s", now, before)
	}
}

// agentCmd is an agent of node1 of a lab without agents of its own... it runs
// until it ends by itself or the test kills it.
func (s site) agentFails(want string, args ...string) {
	s.Helper()
	dir := s.TempDir()
	all := append([]string{"shoal", "agent", "--node-name", "x", "--instance", "shoal-x", "--data-dir", dir + "/data", "--run-dir", dir + "/run", "--socket", dir + "/sock"}, args...)
	done := make(chan result, 1)
	go func() { done <- s.on("node1", append([]string{"timeout", "20"}, all...)...) }()
	r := <-done
	if r.code == 0 || r.code == 124 || !strings.Contains(r.err, want) {
		s.Errorf("agent %v: exit status %d, %q, want a failure with %q", args, r.code, r.err, want)
	}
}

func TestAgentRefuses(t *testing.T) {
	onlyNative(t)
	t.Parallel()
	s := own(t, "itagentin", lab.Options{Nodes: 2, NoInit: true})
	socket := s.Nodes()[0].Socket
	// A second agent on the same state.
	s.agentFails("data", "--data-dir", filepath.Join(s.Nodes()[0].Dir, "data"))
	s.agentFails("agent", "--socket", socket)
	s.agentFails("odd", "--data-path", "odd")
	s.agentFails("ipvs", "--data-path", "ipvs")
	s.agentFails("70000", "--control-port", "70000")
	// Not root.
	cmd := exec.Command("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", filepath.Join(bin, "shoal"), "agent", "--data-dir", "/tmp/nosuch-shoal")
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "root") {
		t.Errorf("agent as nobody: %v: %s", err, out)
	}
	// Ports that others have.
	for port, kind := range map[string]string{"2377": "-tcp", "7946": "-udp", "4789": "-udp"} {
		args := []string{"lab", "exec", "--name", s.Name, "node1", "--", filepath.Join(bin, "whoami"), "-http", "", "-udp", "", "-tcp", ""}
		args = append(args, kind, ":"+port)
		holder := exec.Command(filepath.Join(bin, "shoal"), args...)
		if err := holder.Start(); err != nil {
			t.Fatal(err)
		}
		s.eventually(10*time.Second, func() error {
			if out := s.ok("node1", "ss -Hlntu"); !strings.Contains(out, ":"+port) {
				return fmt.Errorf("port %s is not taken yet: %s", port, out)
			}
			return nil
		})
		s.fails("node1", port, "shoal init --advertise-addr 172.30.0.1")
		s.fails("node1", "no cluster", "shoal node ls")
		_ = holder.Process.Signal(syscall.SIGTERM)
		_ = holder.Wait()
	}
	s.fails("node1", "192.0.2.99", "shoal init --advertise-addr 192.0.2.99")
	s.fails("node1", "nosuch0", "shoal init --advertise-addr nosuch0")
	s.fails("node1", "10.0.0.0/33", "shoal init --default-addr-pool 10.0.0.0/33")
	s.ok("node1", "shoal init --advertise-addr 172.30.0.1")
	s.fails("node1", "already", "shoal init --advertise-addr 172.30.0.1")
	s.fails("node2", "shoal token show", "shoal join 172.30.0.1")
	s.fails("node2", "Docker Swarm", "shoal join --token SWMTKN-1-a-b 172.30.0.1")
	token := s.ok("node1", "shoal token show -q worker")
	s.fails("node2", "cut or changed", "shoal join --token %s 172.30.0.1", token[:len(token)-1])
	s.fails("node2", "172.30.0.77", "shoal join --token %s 172.30.0.77", token)
	s.fails("node2", "172.30.0.2", "shoal join --token %s 172.30.0.2", token)
	s.ok("node2", "shoal init --advertise-addr 172.30.0.2") // a cluster of its own
	s.fails("node2", "already", "shoal join --token %s 172.30.0.1", token)

	// An interface that has the name of one of ours is left alone, and named.
	s.ok("node1", "shoal net create app")
	id := s.ok("node1", "shoal net ls -q --filter name=app")
	s.ok("node1", "ip link add sho%s type veth peer name other0", id)
	// While it is tried the doctor names it; when it is given up nobody wants the
	// network on this node any more.
	tried := make(chan struct{})
	go func() {
		defer close(tried)
		if r := s.on("node1", "shoal", "run", "-d", "--name", "c1", "--network", "app", "--", "sleep", "1000"); r.code == 0 || !strings.Contains(r.err, "sho"+id) {
			t.Errorf("a task on a network that can't be made: exit status %d, %q", r.code, r.err)
		}
	}()
	s.eventually(15*time.Second, func() error {
		if r := s.on("node1", "shoal", "doctor"); !strings.Contains(r.out, "sho"+id) {
			return fmt.Errorf("doctor does not name sho%s: %s", id, r.out)
		}
		return nil
	})
	<-tried
	if got := s.ok("node1", "ip -d link show sho%s", id); !strings.Contains(got, "other0") {
		t.Errorf("the foreign interface: %s", got)
	}
	s.ok("node1", "ip link del sho%s", id)
	s.eventually(20*time.Second, func() error {
		if r := s.on("node1", "shoal", "run", "-d", "--name", "c2", "--network", "app", "--", "sleep", "1000"); r.code != 0 && !strings.Contains(r.err, "c2") {
			return fmt.Errorf("%s", r.err)
		}
		if x := s.task("c2"); x.Status.State != "running" {
			return fmt.Errorf("c2 is %s", x.Status.State)
		}
		return nil
	})
}

// TestLabDownLeavesNothing of its own, and everything else.
func TestLabDownLeavesNothing(t *testing.T) {
	onlyNative(t)
	s := up(t, lab.Options{Nodes: 2, Name: labName("itdown")})
	s.ok("node1", "shoal net create app")
	s.whoami("web", 2, "--network app -p 8080:80")
	dir := filepath.Dir(s.Nodes()[0].Dir)
	cmd := exec.Command(filepath.Join(bin, "shoal"), "lab", "down", "--name", s.Name)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("lab down: %v: %s", err, out)
	}
	if out, _ := exec.Command("ip", "netns", "list").Output(); strings.Contains(string(out), "shoal-"+s.Name+"-") {
		t.Errorf("namespaces are left: %s", out)
	}
	if out, _ := exec.Command("pgrep", "-af", s.Name).Output(); strings.Contains(string(out), "shoal agent") || strings.Contains(string(out), "whoami") {
		t.Errorf("processes are left: %s", out)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("%s is left", dir)
	}
	if out, _ := exec.Command("ip", "-o", "link").Output(); strings.Contains(string(out), ": sho") {
		t.Errorf("links are left: %s", out)
	}
}
