package integration

import (
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
)

// switchRun runs a command in the namespace of the lab's switch, by which all
// packets between nodes pass.
func (s site) switchRun(args ...string) {
	s.Helper()
	cmd := exec.Command("ip", append([]string{"netns", "exec", "shoal-" + s.Name + "-underlay"}, args...)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		s.Fatalf("%v: %v\n%s", args, err, out)
	}
}

// TestAPathThatIsDead: of two nodes only what VXLAN carries is lost, in one direction.
// Both live, by all else. Requests go where they can, and doctor names the two; and
// so it is when one of them has a smaller MTU.
func TestAPathThatIsDead(t *testing.T) {
	onlyNative(t) // the View decides, and what it says of peers vip's suite has in the VM
	t.Parallel()
	s := own(t, "pa", labOptions())
	s.ok("node1", "shoal net create app")
	s.whoami("web", 3, "--network app -p 8080:80")
	s.whoami("far", 1, "--network app --constraint node.name==node2")
	s.ok("node3", "shoal run -d --name c1 --network app -- sleep 1d")
	for _, n := range nodes {
		s.eventually(slow(20*time.Second), func() error {
			if r := s.on(n, "shoal", "doctor"); !strings.Contains(r.out, "are probed over VXLAN, and answer") {
				return fmt.Errorf("%s", r.out)
			}
			return nil
		})
	}
	ask := func(what string, servers int) {
		s.Helper()
		s.fair(what+": by VIP", s.inTask("c1", "-n 40 -timeout %s http://web/", slow(time.Second)), servers)
		for n, want := range map[string]int{"node1": 3, "node3": servers} {
			s.fair(what+": by the port of "+n, s.outsideLoad("-n", "30", "http://"+s.addrOf(n)+":8080/"), want)
		}
	}
	ask("before", 3)
	s.switchRun("nft", "add table bridge pathtest")
	s.switchRun("nft", "add chain bridge pathtest f { type filter hook forward priority 0; }")
	s.switchRun("nft", fmt.Sprintf("add rule bridge pathtest f ip saddr %s ip daddr %s udp dport 4789 drop", s.addrOf("node2"), s.addrOf("node3")))
	t0 := time.Now()
	for n, other := range map[string]string{"node2": "node3", "node3": "node2"} {
		s.eventually(slow(15*time.Second), func() error {
			r := s.on(n, "shoal", "doctor")
			if r.code != 1 || !strings.Contains(r.out, other) || !strings.Contains(r.out, "4789/udp") {
				return fmt.Errorf("doctor on %s, exit status %d:\n%s", n, r.code, r.out)
			}
			return nil
		})
	}
	t.Logf("noticed after %s", time.Since(t0))
	s.eventually(slow(10*time.Second), func() error {
		out := s.ok("node1", "shoal node ls")
		for n, other := range map[string]string{"node2": "node3", "node3": "node2"} {
			if !slices.ContainsFunc(strings.Split(out, "\n"), func(l string) bool {
				return strings.Contains(l, n) && strings.Contains(l, "no data path to "+other) && strings.Contains(l, "open 4789/udp")
			}) {
				return fmt.Errorf("node ls:\n%s", out)
			}
		}
		return nil
	})
	if r := s.on("node1", "shoal", "doctor"); r.code != 0 {
		t.Errorf("node1 has nothing to do with it: doctor\n%s", r.out)
	}
	ask("while it is dead", 2)
	// What is only there is asked there all the same, and not refused.
	if l := s.inTask("c1", "-n 1 -timeout 300ms http://far/"); l.Failed != 1 || l.Errors["connection refused"] > 0 {
		t.Errorf("a service behind the dead path: %+v", l)
	}
	s.switchRun("nft", "delete table bridge pathtest")
	s.eventually(slow(15*time.Second), func() error {
		for _, n := range nodes {
			if r := s.on(n, "shoal", "doctor"); r.code != 0 {
				return fmt.Errorf("doctor on %s:\n%s", n, r.out)
			}
		}
		return nil
	})
	ask("after", 3)

	// node2's underlay carries less from now on, by both ends of its cable.
	s.ok("node2", "ip link set eth0 mtu 1300")
	s.switchRun("ip", "link", "set", "node2", "mtu", "1300")
	s.eventually(slow(10*time.Second), func() error {
		for _, n := range []string{"node1", "node3"} {
			ovns := s.ovns(n, "app")
			if out := s.ok(n, "ip netns exec %s ip route", ovns); !strings.Contains(out, "mtu lock 1250") {
				return fmt.Errorf("routes on %s:\n%s", n, out)
			}
		}
		return nil
	})
	// A datagram, and its way from and to another node.
	s.ok("node2", "shoal run -d --name echo --network app -- python3 %s/integration/testdata/udp.py serve", repo)
	for _, size := range []string{"1400", "8000"} {
		// The first may be lost: by it the sender learns.
		if out := s.ok("node1", "shoal exec c1 python3 %s/integration/testdata/udp.py ask echo %s", repo, size); out != size {
			t.Errorf("datagram of %s bytes: %q", size, out)
		}
		if r := s.on("node1", "shoal", "exec", "c1", "ping", "-c", "3", "-W", "2", "-s", size, "echo"); !strings.Contains(r.out, "bytes from ") {
			t.Errorf("echo of %s bytes: %s%s", size, r.out, r.err)
		}
	}
	s.fair("with less MTU", s.inTask("c1", "-n 30 http://web/"), 3)
	s.ok("node2", "ip link set eth0 mtu 1500")
	s.switchRun("ip", "link", "set", "node2", "mtu", "1500")
	s.eventually(slow(10*time.Second), func() error {
		ovns := s.ovns("node1", "app")
		if out := s.ok("node1", "ip netns exec %s ip route", ovns); strings.Contains(out, "mtu") {
			return fmt.Errorf("routes on node1:\n%s", out)
		}
		return nil
	})
}
