package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/shoalnet/shoal/lab"
)

// TestForceNewCluster: two of three managers are lost. Services serve; the one that
// is left makes the cluster anew, the worker follows it, and the lost ones are out,
// also when both of them come back, which is a majority of what they know.
func TestForceNewCluster(t *testing.T) {
	onlyNative(t)
	s := own(t, "anew", lab.Options{Nodes: 4, Managers: 3})
	s.fails("node4", "is a worker", "shoal init --force-new-cluster")
	s.fails("node2", "managers have a leader", "shoal init --force-new-cluster")
	s.fails("node2", "can't be given with --force-new-cluster", "shoal init --force-new-cluster --autolock")
	s.ok("node1", "shoal net create app")
	s.whoami("web", 2, "--network app --constraint node.name!=node1 --constraint node.name!=node3")
	client := s.ok("node1", "shoal run -d --name client --node node4 --network app -- sleep 3600")
	token := s.ok("node1", "shoal token show -q manager")
	asked := make(chan load, 1)
	go func() {
		// By the client's own node: no manager may be needed.
		r := s.on("node4", "shoal", "exec", client, bin+"/load", "-for", "15s", "-rate", "20", "http://web/")
		var l load
		if err := json.Unmarshal([]byte(r.out), &l); err != nil {
			t.Errorf("load: %+v", r)
		}
		asked <- l
	}()
	for _, n := range []string{"node1", "node3"} {
		if err := s.Kill(t.Context(), n); err != nil {
			t.Fatal(err)
		}
	}
	s.fails("node2", "no manager leads", "shoal net ls")
	out := s.ok("node2", "shoal init --force-new-cluster")
	if !strings.Contains(out, "node1, node3") {
		t.Errorf("init printed %q", out)
	}
	s.eventually(slow(10*time.Second), func() error {
		out := s.on("node2", "shoal", "node", "ls", "--format", "{{.Name}} {{.Status}} {{.Role}}").out
		if want := "node1 down worker\nnode2 ready leader\nnode3 down worker\nnode4 ready worker\n"; out != want {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	s.fails("node2", "was lost", "shoal node promote node3")
	// The worker follows.
	s.ok("node2", "shoal svc scale web=3")
	s.ok("node2", "shoal run -d --name late --node node4 --network app -- sleep 3600")
	if l := <-asked; l.Failed > 0 || l.OK == 0 {
		t.Errorf("%d of %d requests failed: %v", l.Failed, l.Requests, l.Errors)
	}
	if _, err := os.Stat(s.dataDir("node2") + "/raft.lost"); err != nil {
		t.Error(err)
	}
	// What the survivor has now outlives its agent.
	if err := s.KillAgent("node2"); err != nil {
		t.Fatal(err)
	}
	if err := s.Start(t.Context(), "node2"); err != nil {
		t.Fatal(err)
	}
	s.ok("node2", "shoal svc inspect web")
	// Both come back. Whatever they think, nobody listens.
	for _, n := range []string{"node1", "node3"} {
		if err := s.Start(t.Context(), n); err != nil {
			t.Fatal(err)
		}
	}
	s.ok("node2", "shoal net create after")
	s.eventually(slow(30*time.Second), func() error {
		out := s.on("node2", "shoal", "node", "ls", "--format", "{{.Name}} {{.Status}} {{.Role}}").out
		if want := "node1 down worker\nnode2 ready leader\nnode3 down worker\nnode4 ready worker\n"; out != want {
			return fmt.Errorf("%s", out)
		}
		if r := s.on("node4", "shoal", "node", "ls"); r.code != 0 || strings.Count(r.out, "down") != 2 {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})
	s.ok("node2", "shoal node rm node1 node3")
	for _, n := range []string{"node3", "node1"} {
		s.eventually(slow(30*time.Second), func() error { // told so, they leave by themselves
			if r := s.on(n, "shoal", "net", "ls"); !strings.Contains(r.err, "in no cluster") {
				return fmt.Errorf("%+v", r)
			}
			return nil
		})
		s.ok(n, "shoal join --token %s 172.30.0.2", token)
		s.ok(n, "shoal net inspect after")
	}
	// A majority again: the one that is left first may go.
	if err := s.KillAgent("node2"); err != nil {
		t.Fatal(err)
	}
	s.eventually(slow(30*time.Second), func() error {
		if r := s.on("node3", "shoal", "net", "inspect", "after"); r.code != 0 {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})
}
