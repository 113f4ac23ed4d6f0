package integration

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/shoalnet/shoal/lab"
)

// TestSessionsOutlastAgent: an agent that is killed and started anew, or stalls, ends
// no session that can go on, costs no line and doubles none.
func TestSessionsOutlastAgent(t *testing.T) {
	onlyNative(t)
	t.Parallel()
	s := own(t, "outlast", lab.Options{Nodes: 2, Managers: 1})
	count := func(n, code int) []string {
		return []string{"sh", "-c", fmt.Sprintf("i=0; while [ $i -lt %d ]; do i=$((i+1)); echo $i; sleep 0.1; done; exit %d", n, code)}
	}
	var wg sync.WaitGroup
	results := map[string]*result{}
	begin := func(name, input string, args ...string) {
		r := &result{}
		results[name] = r
		wg.Go(func() { *r = s.in(input, "node1", args...) })
	}
	s.ok("node1", "shoal svc create -q --name chat -- sh -c 'while :; do echo x; sleep 0.2; done'")
	s.ok("node1", "shoal run -d --name base -- sleep 600")
	begin("here", "", append(words("shoal run --rm --name here --"), count(100, 3)...)...)
	begin("there", "", append(words("shoal run --rm --node node2 --name there --"), count(100, 4)...)...)
	begin("short", "", words("shoal run --rm --name short -- sh -c 'sleep 4; echo done; exit 5'")...)
	begin("exec", "", words("shoal exec base sleep 600")...)
	heard := filepath.Join(t.TempDir(), "heard")
	begin("logs", "", "sh", "-c", "shoal svc logs -f --tail 0 --raw chat > "+heard+"; code=$?; cat "+heard+"; exit $code")
	s.eventually(slow(20*time.Second), func() error {
		if got := s.on("node1", "shoal", "ps", "-q", "-f", "state=running").out; len(strings.Fields(got)) != 5 {
			return fmt.Errorf("running: %q", got)
		}
		return nil
	})
	begin("create", "", words("shoal svc create -q --name late --replicas 2 -- sh -c 'sleep 3; exec sleep 600'")...)
	time.Sleep(time.Second)
	if err := s.KillAgent("node1"); err != nil {
		t.Fatal(err)
	}
	time.Sleep(4 * time.Second) // short ends meanwhile
	if err := s.Start(t.Context(), "node1"); err != nil {
		t.Fatal(err)
	}
	s.eventually(slow(40*time.Second), func() error {
		if r := s.on("node1", "shoal", "svc", "ls", "-q"); len(strings.Fields(r.out)) != 2 {
			return fmt.Errorf("services: %q %s", r.out, r.err)
		}
		return nil
	})
	// And one that stalls on both nodes at once.
	var pids []int
	for _, n := range s.Nodes() {
		pids = append(pids, n.PID)
		_ = syscall.Kill(n.PID, syscall.SIGSTOP)
	}
	time.Sleep(8 * time.Second)
	for _, p := range pids {
		_ = syscall.Kill(p, syscall.SIGCONT)
	}
	// A service that is removed takes its output with it: it is followed again before that.
	s.eventually(slow(20*time.Second), func() error {
		b, err := os.ReadFile(heard)
		if n := bytes.Count(b, []byte("\n")); err == nil && n < 30 {
			err = fmt.Errorf("svc logs -f has shown %d lines of some 70", n)
		}
		return err
	})
	s.eventually(slow(40*time.Second), func() error {
		if r := s.on("node1", "shoal", "svc", "rm", "chat"); r.code != 0 && !strings.Contains(r.err, "no such") {
			return fmt.Errorf("svc rm: %s", r.err)
		}
		return nil
	})
	wg.Wait()
	numbers := ""
	for i := range 100 {
		numbers += fmt.Sprintln(i + 1)
	}
	for name, want := range map[string]result{"here": {out: numbers, code: 3}, "there": {out: numbers, code: 4}, "short": {out: "done\n", code: 5}} {
		if r := results[name]; r.out != want.out || r.code != want.code {
			t.Errorf("%s: exit status %d, want %d; output %q; %s", name, r.code, want.code, r.out, r.err)
		}
	}
	if r := results["exec"]; r.code != 1 || !strings.Contains(r.err, "run it again: shoal ") || !strings.HasSuffix(strings.TrimSpace(r.err), "exec base sleep 600") {
		t.Errorf("exec: %d, %s", r.code, r.err)
	}
	if r := results["create"]; r.code != 0 || strings.Count(r.out, "\n") != 1 {
		t.Errorf("svc create: %d, %q, %s", r.code, r.out, r.err)
	}
	if r := results["logs"]; r.code != 0 || len(r.out) < 20 || !strings.Contains(r.err, "service chat was removed") {
		t.Errorf("svc logs -f: %d, %d bytes, %s", r.code, len(r.out), r.err)
	}
}
