package integration

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/shoalnet/shoal/lab"
)

// TestNoRequestIsLost: whatever an operator does to a service, its nodes and their
// managers in good order, and a leader that dies, costs none of the requests that come
// meanwhile: by virtual IP and by published port, on connections of their own and on
// ones that are kept.
func TestNoRequestIsLost(t *testing.T) {
	onlyNative(t)
	t.Parallel()
	s := own(t, "zero", lab.Options{Nodes: 4, Managers: 3})
	s.ok("node1", "shoal net create app")
	s.whoami("web", 3, "--network app -p 8080:80 --constraint node.role==manager --update-monitor 1s --rollback-monitor 1s --env V=1")
	loads := map[string]string{
		"vip":       "--network app -- %s/load http://web/",
		"vipkept":   "--network app -- %s/load -keepalive http://web/",
		"port":      "--network host -- %s/load http://172.30.0.1:8080/",
		"portkept":  "--network host -- %s/load -keepalive http://172.30.0.1:8080/",
		"otherport": "--network host -- %s/load http://172.30.0.4:8080/", // of a node without a replica
	}
	for name, args := range loads {
		args = strings.Replace(args, "/load", "/load -for 20m -timeout 2s -rate 25", 1)
		s.ok("node1", "shoal run -d --name %s --node node4 "+args, name, bin)
	}
	var steps []string
	step := func(command string) {
		t.Helper()
		begun := time.Now()
		s.ok("node1", "%s", command)
		steps = append(steps, fmt.Sprintf("%s to %s: %s", begun.UTC().Format("15:04:05.000"), time.Now().UTC().Format("15:04:05.000"), command))
	}
	step("shoal svc scale web=6")
	step("shoal svc scale web=2")
	step("shoal svc scale web=3")
	step("shoal svc update --env-add V=2 web")
	step("shoal svc update --update-order stop-first --env-add V=3 web")
	step("shoal svc rollback web")
	step("shoal svc update --update-order start-first --update-parallelism 0 --force web")
	step("shoal node update --availability drain node2")
	s.eventually(slow(20*time.Second), func() error {
		for _, x := range s.running("web") {
			if x.NodeName == "node2" {
				return fmt.Errorf("%s is still on node2", x.Name)
			}
		}
		return nil
	})
	step("shoal node update --availability active node2")
	step("shoal svc rebalance web")
	s.awaitRunning("web", 3)

	leader := s.leader()
	steps = append(steps, time.Now().UTC().Format("15:04:05.000")+": the agent of leader "+leader+" dies")
	if err := s.KillAgent(leader); err != nil {
		t.Fatal(err)
	}
	other := "node2"
	if leader == other {
		other = "node3"
	}
	s.ok(other, "shoal svc scale -d web=4")
	if err := s.Start(t.Context(), leader); err != nil {
		t.Fatal(err)
	}
	steps = append(steps, time.Now().UTC().Format("15:04:05.000")+": and is back")
	s.awaitRunning("web", 4)
	s.restart("node1", "node2", "node3", "node4")
	steps = append(steps, time.Now().UTC().Format("15:04:05.000")+": all agents have been started anew, one after the other")

	for name := range loads {
		s.ok("node1", "shoal stop %s", name)
		out := s.ok("node1", "shoal logs %s", name)
		if l := s.parseLoad(out); l.Failed > 0 || l.OK < 100 {
			t.Errorf("%s: %d of %d requests failed: %v\n%s\n%s", name, l.Failed, l.Requests, l.Errors, out, strings.Join(steps, "\n"))
		} else {
			t.Logf("%s: %d requests", name, l.OK)
		}
	}
}
