package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestHealth: a virtual IP leads to a replica from the first success of its
// health check on, and no longer once the program hangs.
func TestHealth(t *testing.T) {
	onlyNative(t)
	s := shared(t)
	s.ok("node1", "shoal net create app")
	s.ok("node1", "shoal run -d --name c1 --network app -- sleep 10000")
	well := filepath.Join(t.TempDir(), "well")
	s.ok("node1", "shoal svc create -d --name web --replicas 2 --network app --health-cmd 'test -e %s' --health-interval 100ms --health-retries 2 --health-start-period 1m -- %s", well, filepath.Join(bin, "whoami"))
	starting := func() error {
		var said []string
		for _, x := range s.tasks("web") {
			said = append(said, x.Status.State+": "+x.Status.Message)
		}
		if text := strings.Join(said, "\n"); strings.Count(text, "starting: not healthy yet: exit status 1") != 2 {
			return fmt.Errorf("two replicas that are not healthy yet say:\n%s", text)
		}
		return nil
	}
	s.eventually(slow(20*time.Second), starting)
	health := func(want string) func() error {
		return func() error {
			if got := s.ok("node2", "shoal ps --filter health=%s -q", want); len(strings.Fields(got)) != 2 {
				return fmt.Errorf("%s are %q, want two", want, got)
			}
			if got := s.ok("node2", "shoal inspect -f {{.State.Health.Status}} web.1"); got != want {
				return fmt.Errorf("inspect: %q, want %q", got, want)
			}
			return nil
		}
	}
	s.eventually(slow(10*time.Second), health("starting"))
	if l := s.inTask("c1", "-n 4 -timeout 5s http://web/"); l.Errors["connection refused"] != 4 {
		t.Errorf("no replica is healthy yet: %d answered, errors %v", l.OK, l.Errors)
	}
	if err := os.WriteFile(well, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	s.awaitRunning("web", 2)
	s.eventually(slow(10*time.Second), health("healthy"))
	if got := s.ok("node1", "shoal ps --filter name=web.1 --format '{{.Status}} {{.Health}}'"); !strings.HasPrefix(got, "Up ") || !strings.HasSuffix(got, " (healthy) healthy") {
		t.Errorf("ps: %q", got)
	}
	s.fair("healthy", s.inTask("c1", "-n 20 -timeout 2s http://web/"), 2)
	if err := os.Remove(well); err != nil {
		t.Fatal(err)
	}
	s.eventually(slow(20*time.Second), func() error {
		if got := s.ok("node1", "shoal events --since 10m --until 0s --filter type=task"); strings.Count(got, "health_status: unhealthy") < 1 || strings.Count(got, "health_status: healthy") < 2 {
			return fmt.Errorf("events: %s", got)
		}
		for _, x := range s.tasks("web") {
			if x.Status.State == "failed" && strings.HasPrefix(x.Status.Message, "unhealthy: exit status 1") {
				return nil
			}
		}
		return fmt.Errorf("no replica failed for being unhealthy")
	})

	// Without a check: one that hangs takes no new connections, and is back.
	s.ok("node1", "shoal svc update --no-healthcheck web")
	s.awaitRunning("web", 2)
	hung := s.running("web")[0]
	if err := syscall.Kill(hung.Status.PID, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	s.eventually(slow(20*time.Second), func() error {
		for _, x := range s.running("web") {
			if x.ID == hung.ID && strings.HasPrefix(x.Status.Message, "not listening") {
				return nil
			}
		}
		return fmt.Errorf("nobody noticed that %s hangs", hung.Name)
	})
	s.fair("one hangs", s.inTask("c1", "-n 20 -timeout 2s http://web/"), 1)
	if err := syscall.Kill(hung.Status.PID, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	s.eventually(slow(20*time.Second), func() error {
		if l := s.inTask("c1", "-n 20 -timeout 2s http://web/"); len(l.Hosts) != 2 || l.Failed != 0 {
			return fmt.Errorf("hosts %v, failed %d", l.Hosts, l.Failed)
		}
		return nil
	})
}
