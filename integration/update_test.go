package integration

import (
	"strings"
	"testing"
)

// TestUpdatePolicies: updates in both orders, a rollback, and what is broken and goes
// back by itself, while requests come: none is lost. What can't be placed or can't run
// twice pauses, and leaves what runs.
func TestUpdatePolicies(t *testing.T) {
	onlyNative(t) // of the data path, vip's suite has it in the VM, where this takes minutes
	s := shared(t)
	s.whoami("web", 3, "--update-monitor 1s --rollback-monitor 1s --env V=1")
	s.ok("node1", "shoal run -d --name c1 -- %s/load -for 30m -rate 50 -timeout 1s http://web/", bin)
	s.ok("node1", "shoal svc update --env-add V=2 web")
	s.ok("node1", "shoal svc update --update-order stop-first --env-add V=3 web")
	s.ok("node1", "shoal svc rollback web")
	s.ok("node1", "shoal svc update --update-order start-first --update-parallelism 0 --force web")
	s.fails("node1", "service rolled back: ", "shoal svc update -q --update-failure-action rollback web -- false")
	s.fails("node1", "service update paused: ", "shoal svc update -q --constraint-add node.labels.dsk==ssd web")
	s.ok("node1", "shoal stop c1")
	l := s.parseLoad(s.ok("node1", "shoal logs c1"))
	if l.Failed > 0 || l.OK == 0 {
		t.Errorf("%d of %d requests failed: %v", l.Failed, l.Requests, l.Errors)
	}
	if got := s.ok("node1", "shoal svc inspect web --format {{.Update.State}}"); got != "paused" {
		t.Errorf("the update is %q", got)
	}
	if r := s.on("node1", "shoal", "svc", "ps", "web"); !strings.Contains(r.err, "no node matches constraint node.labels.dsk==ssd") {
		t.Errorf("svc ps does not say why it is paused: %s%s", r.out, r.err)
	}
	if n := len(s.running("web")); n != 3 {
		t.Errorf("%d replicas run", n)
	}
	s.fails("node1", "other flags may not be combined with --rollback", "shoal svc update --rollback --replicas 2 web")

	// What holds a lock fails beside its successor, and is told how.
	s.ok("node1", "shoal svc create --name db --constraint node.name==node2 -- sh -c 'exec flock -n /run/updates.lock sleep 10000'")
	s.fails("node1", "--update-order stop-first", "shoal svc update -q --env-add A=1 db")
	s.ok("node1", "shoal svc update --update-order stop-first --update-monitor 1s --env-add A=2 db")
}
