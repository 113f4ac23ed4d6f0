package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
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
	t.Parallel()
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

// TestSnapshot: the only manager loses its disk. From a snapshot its machine makes
// the cluster again, the worker follows, and what ran runs on.
func TestSnapshot(t *testing.T) {
	onlyNative(t)
	t.Parallel()
	s := own(t, "snap", lab.Options{Nodes: 3, Managers: 1})
	file := filepath.Join(t.TempDir(), "cluster.snap")
	s.ok("node1", "shoal net create app")
	s.whoami("web", 1, "--network app --constraint node.name==node2")
	client := s.ok("node1", "shoal run -d --name client --node node2 --network app -- sleep 3600")
	s.fails("node2", "only managers take this command", "shoal snapshot save %s", file)
	if out := s.ok("node1", "shoal snapshot save %s", file); !strings.Contains(out, "keys of the cluster") {
		t.Errorf("save printed %q", out)
	}
	if fi, err := os.Stat(file); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi, err)
	}
	s.fails("node1", "exists", "shoal snapshot save %s", file)
	var info struct {
		Cluster                   string
		Services, Nodes, Networks int
		Managers                  []string
	}
	if err := json.Unmarshal([]byte(s.ok("node1", "shoal snapshot inspect -o json %s", file)), &info); err != nil || info.Services != 1 || info.Nodes != 3 || len(info.Managers) != 1 {
		t.Errorf("%+v, %v", info, err)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	cut := file + ".cut"
	if err := os.WriteFile(cut, b[:len(b)-100], 0o600); err != nil {
		t.Fatal(err)
	}
	s.fails("node1", "is damaged", "shoal snapshot inspect %s", cut)
	s.fails("node1", "is damaged", "shoal snapshot restore %s", cut)
	s.fails("node1", "--force", "shoal snapshot restore %s", file)
	s.fails("node2", "is a worker", "shoal snapshot restore %s", file)
	// Back to what it was, on the manager itself.
	s.ok("node1", "shoal net create later")
	s.ok("node1", "shoal snapshot restore --force %s", file)
	s.fails("node1", "later", "shoal net inspect later")
	s.ok("node1", "shoal net inspect app")
	// The disk is lost.
	if err := s.KillAgent("node1"); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(s.dataDir("node1")); err != nil {
		t.Fatal(err)
	}
	if err := s.Start(t.Context(), "node1"); err != nil {
		t.Fatal(err)
	}
	s.eventually(slow(20*time.Second), func() error {
		if r := s.on("node1", "shoal", "init", "--force-new-cluster"); r.code == 0 || !strings.Contains(r.err, "in no cluster") {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})
	s.ok("node1", "shoal snapshot restore --advertise-addr 172.30.0.1 %s", file)
	if out := s.ok("node1", "shoal info"); !strings.Contains(out, info.Cluster) {
		t.Errorf("%s", out)
	}
	s.eventually(slow(30*time.Second), func() error {
		out := s.on("node1", "shoal", "node", "ls", "--format", "{{.Name}} {{.Status}} {{.Role}}").out
		if want := "node1 ready leader\nnode2 ready worker\nnode3 ready worker\n"; out != want {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	s.eventually(slow(20*time.Second), func() error { // also by way of the manager
		for _, n := range []string{"node2", "node1"} {
			if r := s.on(n, "timeout", "8", "shoal", "exec", client, bin+"/load", "-n", "3", "http://web/"); r.code != 0 || !strings.Contains(r.out, `"failed":0`) {
				return fmt.Errorf("%s: %+v", n, r)
			}
		}
		return nil
	})
	s.ok("node1", "shoal run -d --name late --node node2 --network app -- sleep 3600")
	s.ok("node1", "shoal svc scale web=2")
	s.ok("node3", "shoal leave")
	s.ok("node3", "shoal join --token %s 172.30.0.1", s.ok("node1", "shoal token show -q manager"))
}

// TestPromoteVotes: what promote has returned of counts: the manager of before may end
// at once.
func TestPromoteVotes(t *testing.T) {
	onlyNative(t)
	t.Parallel()
	s := own(t, "prom", lab.Options{Nodes: 4, Managers: 1})
	if err := s.KillAgent("node4"); err != nil {
		t.Fatal(err)
	}
	s.eventually(slow(30*time.Second), func() error {
		if out := s.ok("node1", "shoal node ls -f name=node4 --format {{.Status}}"); out != "down" {
			return fmt.Errorf("node4 is %s", out)
		}
		return nil
	})
	s.fails("node1", "node node4 is to be a manager, and is down: it votes once it is back", "shoal node promote node4")
	s.ok("node1", "shoal node demote node4")
	if out := s.ok("node1", "shoal node promote node2 node3"); out != "node2\nnode3" {
		t.Errorf("promote prints %q", out)
	}
	// There and back is nothing that a person must act on.
	s.ok("node1", "shoal node demote node3")
	s.eventually(slow(20*time.Second), func() error {
		if _, err := os.Stat(filepath.Join(s.dataDir("node3"), "raft")); !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("node3 has its managers' log still: %v", err)
		}
		return nil
	})
	s.ok("node1", "shoal node promote node3")
	if b, err := os.ReadFile(filepath.Join(filepath.Dir(s.dataDir("node3")), "agent.log")); err != nil || strings.Contains(string(b), "level=ERROR") || !strings.Contains(string(b), "gave its managers' log up") {
		t.Errorf("the log of node3: %v\n%s", err, b)
	}
	if err := s.KillAgent("node1"); err != nil {
		t.Fatal(err)
	}
	s.ok("node2", "shoal net create after") // waits for a leader by itself
}
