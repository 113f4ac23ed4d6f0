package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/shoalnet/shoal/lab"
)

// TestAManagerLosesItsStore: while its agent was down, a manager's raft directory
// went. It says so, does not vote, joins the managers anew by itself, and what was
// acknowledged outlives the leader. A promotion after a demotion goes the same way.
func TestAManagerLosesItsStore(t *testing.T) {
	onlyNative(t)
	t.Parallel()
	s := own(t, "store", lab.Options{Nodes: 3})
	s.ok("node1", "shoal net create before")
	victim := "node2"
	var dir string
	for _, n := range s.Nodes() {
		if n.Name == victim {
			dir = filepath.Join(n.Dir, "data")
		}
	}
	for _, damage := range []func() error{
		func() error { return os.RemoveAll(filepath.Join(dir, "raft")) },
		func() error { return os.Truncate(filepath.Join(dir, "raft", "log.db"), 0) },
	} {
		if err := s.KillAgent(victim); err != nil {
			t.Fatal(err)
		}
		if err := damage(); err != nil {
			t.Fatal(err)
		}
		if err := s.Start(t.Context(), victim); err != nil {
			t.Fatal(err)
		}
		s.eventually(slow(20*time.Second), func() error {
			if r := s.on(victim, "shoal", "doctor"); r.code != 0 || !strings.Contains(r.out, "kept in") {
				return fmt.Errorf("%+v", r)
			}
			if _, err := os.Stat(filepath.Join(dir, "raft", "log.db")); err != nil {
				return err
			}
			return nil
		})
	}
	// It mended by itself: nothing that a person must act on.
	if b, err := os.ReadFile(filepath.Join(filepath.Dir(dir), "agent.log")); err != nil || strings.Contains(string(b), "level=ERROR") || !strings.Contains(string(b), "is lost (the file is empty)") {
		t.Errorf("the log of %s: %v\n%s", victim, err, b)
	}
	s.ok("node1", "shoal node update --role worker node3")
	s.ok("node1", "shoal node update --role manager node3")
	// It votes again once it has a manager's certificate and the leader has added it.
	s.eventually(slow(30*time.Second), func() error {
		b, err := os.ReadFile(filepath.Join(s.Dir, "node1", "agent.log"))
		if err != nil {
			return err
		}
		if n := len(regexp.MustCompile(`adding a manager to raft.* node=node3`).FindAll(b, -1)); n < 2 {
			return fmt.Errorf("node3 was added to raft %d times, want 2", n)
		}
		if r := s.on("node3", "shoal", "net", "ls"); r.code != 0 {
			return fmt.Errorf("node3 is no manager yet: %s", r.err)
		}
		return nil
	})
	s.ok("node1", "shoal net create after")
	// All three vote: any two are enough.
	if err := s.KillAgent("node1"); err != nil {
		t.Fatal(err)
	}
	s.eventually(slow(30*time.Second), func() error {
		r := s.on(victim, "shoal", "net", "ls")
		if r.code != 0 || !strings.Contains(r.out, "before") || !strings.Contains(r.out, "after") {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})
	// With the store of the only manager that is left, there is nobody to ask.
	if err := s.KillAgent(victim); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(dir, "raft")); err != nil {
		t.Fatal(err)
	}
	if err := s.Start(t.Context(), victim); err != nil {
		t.Fatal(err)
	}
	s.eventually(slow(20*time.Second), func() error {
		info, doctor := s.on(victim, "shoal", "info"), s.on(victim, "shoal", "doctor")
		if !strings.Contains(info.out, "is lost (the file is gone)") || !strings.Contains(doctor.out, "is lost (the file is gone)") || doctor.code != 1 {
			return fmt.Errorf("%+v\n%+v", info, doctor)
		}
		return nil
	})
	if err := s.Start(t.Context(), "node1"); err != nil {
		t.Fatal(err)
	}
	s.eventually(slow(30*time.Second), func() error {
		if r := s.on(victim, "shoal", "doctor"); r.code != 0 {
			return fmt.Errorf("%+v", r)
		}
		if r := s.on(victim, "shoal", "net", "ls"); !strings.Contains(r.out, "after") {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})
}

// TestANodeIsRenamed: by the managers, everywhere, and it keeps the new name, whatever
// its agent is started with.
func TestANodeIsRenamed(t *testing.T) {
	onlyNative(t)
	t.Parallel()
	s := own(t, "rename", lab.Options{Nodes: 2})
	s.fails("node1", "node name NODE2 is taken by node", "shoal node update --name NODE2 node1")
	s.fails("node1", `node name "a b"`, "shoal node update --name 'a b' node1")
	s.ok("node1", "shoal node update --name far node2")
	for _, again := range []bool{false, true} {
		if again { // the lab starts it with --node-name node2
			if err := s.KillAgent("node2"); err != nil {
				t.Fatal(err)
			}
			if err := s.Start(t.Context(), "node2"); err != nil {
				t.Fatal(err)
			}
		}
		for _, n := range []string{"node1", "node2"} {
			s.eventually(slow(15*time.Second), func() error {
				ls, ps := s.on(n, "shoal", "node", "ls", "--format", "{{.Name}} {{.Status}}"), s.on(n, "shoal", "doctor")
				if !strings.Contains(ls.out, "far ready") || strings.Contains(ls.out, "node2") || ps.code != 0 {
					return fmt.Errorf("%+v\n%+v", ls, ps)
				}
				return nil
			})
		}
		s.eventually(slow(15*time.Second), func() error {
			if info := s.on("node2", "shoal", "info"); !strings.Contains(info.out, "far") {
				return fmt.Errorf("%+v", info)
			}
			return nil
		})
	}
	s.ok("node1", "shoal node update --name node2 far") // and back
}
