package integration

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestModes: a global service has one task on each node, whatever becomes of the
// nodes; preferences and limits say where replicas go, and conditions when they are
// replaced.
func TestModes(t *testing.T) {
	onlyNative(t)
	s := shared(t)
	s.ok("node1", "shoal net create app")
	s.ok("node1", "shoal svc create --name web --mode global --network app --update-monitor 1s --env 'ME={{.Task.Slot}}' -- %s/whoami", bin)
	s.ok("node1", "shoal run -d --name c --network app -- sleep 10000")
	shown := func(want string) {
		t.Helper()
		s.eventually(slow(20*time.Second), func() error {
			if got := s.ok("node1", "shoal svc ls -f mode=global --format '{{.Name}} {{.Mode}} {{.Replicas}}'"); got != "web global "+want {
				return fmt.Errorf("svc ls: %q, want %s", got, want)
			}
			return nil
		})
	}
	on := func(name string) (out []string) {
		for _, x := range s.running(name) {
			out = append(out, x.NodeName)
		}
		slices.Sort(out)
		return out
	}
	shown("3/3")
	if got := on("web"); !slices.Equal(got, []string{"node1", "node2", "node3"}) {
		t.Errorf("on %v", got)
	}
	for _, x := range s.running("web") {
		if id := s.ok("node1", "shoal node ls -f name=%s -q", x.NodeName); !strings.HasPrefix(x.Name, "web."+id+".") {
			t.Errorf("%s of node %s", x.Name, id)
		}
	}
	s.fair("all nodes", s.inTask("c", "-n 60 http://web/"), 3)
	l := s.under("c", 8, func() {
		s.ok("node1", "shoal svc update --env-add V=2 web")
		s.ok("node1", "shoal node update --availability drain node2")
		shown("2/2")
		s.ok("node1", "shoal node update --availability active node2")
		shown("3/3")
	})
	if l.Failed > 0 || l.OK == 0 {
		t.Errorf("%d of %d requests failed: %v", l.Failed, l.Requests, l.Errors)
	}
	s.fails("node1", "mode global", "shoal svc scale web=2")
	s.fails("node1", "replicas can only be used with mode replicated or replicated-job", "shoal svc create --mode global --replicas 2 -- true")
	s.fails("node1", "replicas can only be used with mode replicated", "shoal svc update --replicas 2 web")
	s.fails("node1", "use replicated, global, replicated-job or global-job", "shoal svc create --mode daemon -- true")

	for n, z := range map[string]string{"node1": "a", "node2": "b", "node3": "b"} {
		s.ok("node1", "shoal node update --label-add zone=%s %s", z, n)
		if got := s.ok("node1", "shoal node ls --filter node.label=zone=%s --filter membership=accepted --format {{.Hostname}}", z); !strings.Contains(got, n) {
			t.Errorf("nodes in zone %s are %s, without %s", z, got, n)
		}
		t.Cleanup(func() { s.on("node1", "shoal", "node", "update", "--label-rm", "zone", n) })
	}
	s.whoami("pool", 4, "--network app --placement-pref spread=node.labels.zone")
	if got := on("pool"); !slices.Equal(got, []string{"node1", "node1", "node2", "node3"}) {
		t.Errorf("spread over zones: %v", got)
	}
	// All away from node1, which then comes back.
	s.ok("node1", "shoal node update --availability drain node1")
	s.eventually(slow(20*time.Second), func() error {
		if got := on("pool"); len(got) != 4 || slices.Contains(got, "node1") {
			return fmt.Errorf("on %v", got)
		}
		return nil
	})
	s.ok("node1", "shoal node update --availability active node1")
	s.ok("node1", "shoal svc rebalance pool")
	if got := on("pool"); !slices.Equal(got, []string{"node1", "node1", "node2", "node3"}) {
		t.Errorf("rebalanced: %v", got)
	}
	s.fails("node1", "mode global", "shoal svc rebalance web")
	s.ok("node1", "shoal svc create -d --name few --replicas 4 --replicas-max-per-node 1 --network app -- sleep 10000")
	s.eventually(slow(20*time.Second), func() error {
		r := s.ok("node1", "shoal svc ps few --no-trunc")
		if len(s.running("few")) != 3 || !strings.Contains(r, "with as many replicas as it may have") {
			return fmt.Errorf("%s", r)
		}
		return nil
	})
	s.ok("node1", "shoal svc create -d --name much --reserve-cpu 4000 -- sleep 10000")
	s.ok("node1", "shoal svc create -d --name other --constraint node.platform.os!=linux -- sleep 10000")
	s.ok("node1", "shoal svc create -q --name same --constraint node.platform.os==linux --reserve-memory 16m -- sleep 10000")
	for name, why := range map[string]string{"much": "3 with less CPU or memory left than is to be reserved", "other": "no node matches constraint node.platform.os!=linux"} {
		s.eventually(slow(20*time.Second), func() error {
			if got := s.ok("node1", "shoal svc ps --no-trunc %s", name); !strings.Contains(got, why) {
				return fmt.Errorf("%s", got)
			}
			return nil
		})
	}

	// Jobs: each slot once, some at a time; a failed run again; anew with --force.
	s.ok("node1", "shoal svc create --name batch --mode replicated-job --replicas 4 --max-concurrent 2 --restart-delay 10ms --env 'N={{.Task.Slot}}' -- "+
		"sh -c 'echo run $N; test $N != 2 || test -e /dev/shm/%s || { touch /dev/shm/%s; exit 1; }'", s.Name, s.Name)
	t.Cleanup(func() { _ = os.Remove("/dev/shm/" + s.Name) })
	if got := s.ok("node1", "shoal svc ls -f mode=replicated-job --format '{{.Name}} {{.Replicas}}'"); got != "batch 0/0 (4/4 completed)" {
		t.Errorf("after the job: %q", got)
	}
	if got := strings.Fields(s.ok("node1", "shoal svc ps --all -q batch")); len(got) != 5 {
		t.Errorf("%d tasks were made, want 5", len(got))
	}
	s.ok("node1", "shoal svc update --force batch")
	if got := s.ok("node1", "shoal svc logs --raw batch"); strings.Count(got, "run 1") != 2 || strings.Count(got, "run 2") != 3 {
		t.Errorf("logs: %s", got)
	}
	s.ok("node1", "shoal svc create --name sweep --mode global-job -- true")
	if got := s.ok("node1", "shoal svc ls -f name=sweep --format '{{.Mode}} {{.Replicas}}'"); got != "global-job 0/0 (3/3 completed)" {
		t.Errorf("after the job on each node: %q", got)
	}
	s.fails("node1", "run to their end", "shoal svc create --mode global-job --restart-condition any -- true")
	s.fails("node1", "is for mode replicated-job", "shoal svc create --max-concurrent 2 -- true")

	s.ok("node1", "shoal svc create --name once --restart-condition none -- true")
	s.ok("node1", "shoal svc create --name twice --restart-condition on-failure --restart-delay 10ms -- sh -c 'test -e /dev/shm/twice || { touch /dev/shm/twice; exit 1; }'")
	s.fails("node1", "--restart-condition none", "shoal svc create -q --name never --restart-condition none -- false")
	for name, runs := range map[string]int{"once": 1, "never": 1} {
		if got := strings.Fields(s.ok("node1", "shoal svc ps --all -q %s", name)); len(got) != runs {
			t.Errorf("%s was run %d times", name, len(got))
		}
	}
	s.fails("node1", "use any, on-failure or none", "shoal svc create --restart-condition often -- true")
	s.fails("node1", "spread=node.labels.KEY", "shoal svc create --placement-pref binpack=cpu -- true")
}
