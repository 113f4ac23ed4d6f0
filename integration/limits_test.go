package integration

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/shoalnet/shoal/lab"
)

// What a task may take is kept by the kernel, with either version of control groups
// (this machine's may be 1; the guest's is 2), said where it ends it, and nothing is
// left of it.
func TestLimits(t *testing.T) {
	s := own(t, "lim", lab.Options{Nodes: 1})
	s.ok("node1", "shoal net create app")
	s.ok("node1", "shoal svc create --name web --network app --replicas 2 --limit-cpu 0.5 --limit-memory 64m --limit-pids 20 -- sh -c 'while :; do sleep 1; done'")
	type row struct {
		Name        string   `json:"name"`
		CPU         *float64 `json:"cpu_percent"`
		Memory      *uint64  `json:"memory_bytes"`
		MemoryLimit uint64   `json:"memory_limit_bytes"`
		Pids        *uint64  `json:"pids"`
		PidsLimit   uint64   `json:"pids_limit"`
	}
	stats := func(of string) (rows []row) {
		t.Helper()
		if err := json.Unmarshal([]byte(s.ok("node1", "shoal stats --no-stream -o json %s", of)), &rows); err != nil {
			t.Fatal(err)
		}
		return rows
	}
	rows := stats("web")
	if len(rows) != 2 {
		t.Fatalf("stats: %+v", rows)
	}
	for _, r := range rows {
		if r.CPU == nil || r.Memory == nil || *r.Memory == 0 || r.MemoryLimit != 64<<20 || r.Pids == nil || *r.Pids < 1 || r.PidsLimit != 20 {
			t.Errorf("%+v", r)
		}
	}
	// A limit can be changed, and taken away.
	s.ok("node1", "shoal svc update --limit-memory 128m --limit-pids -1 web")
	for _, r := range stats("web") {
		if r.MemoryLimit != 128<<20 || r.PidsLimit != 0 {
			t.Errorf("after the update: %+v", r)
		}
	}
	if got := s.ok("node1", "shoal svc inspect web"); !strings.Contains(got, "134217728") {
		t.Errorf("inspect doesn't tell the limit:\n%s", got)
	}

	// Ended by the kernel, and said.
	if r := s.on("node1", "shoal", "run", "--name", "hog", "--memory", "20m", "--", "sh", "-c", `x=$(head -c 134217728 /dev/zero | tr '\0' x); echo ${#x}`); r.code == 0 || !strings.Contains(r.err, "out of memory") {
		t.Errorf("a hog: exit status %d, %q", r.code, r.err)
	}
	if got := s.ok("node1", "shoal ps -a"); !strings.Contains(got, "out of memory") || !strings.Contains(got, "20MiB") {
		t.Errorf("ps doesn't tell why:\n%s", got)
	}
	s.eventually(10*time.Second, func() error {
		if got := s.on("node1", "timeout", "2", "shoal", "events", "--since", "10m"); !strings.Contains(got.out, "out of memory") {
			return fmt.Errorf("events don't tell why:\n%s%s", got.out, got.err)
		}
		return nil
	})
	// A fork bomb ends at its own limit, and its neighbours' programs go on.
	s.ok("node1", "shoal run -d --name bomb --pids-limit 30 -- sh -c 'sleep 2; while :; do sleep 60 & done'") // it is known to run first
	s.eventually(20*time.Second, func() error {
		if r := stats("bomb"); len(r) == 1 && r[0].Pids != nil && *r[0].Pids > 30 {
			t.Fatalf("beyond its limit: %+v", r)
		}
		if got := s.on("node1", "shoal", "exec", "bomb", "true"); got.code == 0 {
			return fmt.Errorf("the bomb has not come to its limit: %+v", stats("bomb"))
		}
		return nil
	})
	s.ok("node1", "shoal exec web.1 true")

	for flag, want := range map[string]string{"--memory 1m": "at least 6m", "--cpus 0": "", "--cpus 0.001": "0.01", "--cpus two": "number of CPUs", "--pids-limit -2": "-1 for no limit",
		"--memory-swap 1g": "--memory", "--memory 1g --memory-swap 10m": "counts both", "--cpuset-cpus a": "0-2,5", "--oom-score-adj 2000": "1000"} {
		if want != "" {
			s.fails("node1", want, "shoal run %s -- true", flag)
		} else {
			s.ok("node1", "shoal run --rm %s -- true", flag)
		}
	}
	s.ok("node1", "shoal rm -f hog bomb")
	s.ok("node1", "shoal svc rm web")
	s.eventually(30*time.Second, func() error {
		if got := s.on("node1", "sh", "-c", "find /sys/fs/cgroup -path '*/shoal/"+s.Nodes()[0].Netns+"/*' -type d"); got.out != "" {
			return fmt.Errorf("control groups left behind:\n%s", got.out)
		}
		return nil
	})
}
