package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/shoalnet/shoal/lab"
)

// TestAMachineGoesDown: one that is shut down or rebooted loses no request, its tasks are
// stopped as a person would stop them, and those with a restart policy are back with it.
func TestAMachineGoesDown(t *testing.T) {
	onlyNative(t)
	t.Parallel()
	dir := t.TempDir()
	down := filepath.Join(dir, "down")
	// As systemctl(1) answers is-system-running.
	if err := os.WriteFile(filepath.Join(dir, "systemctl"), []byte("#!/bin/sh\n[ -e "+down+" ] && echo stopping && exit 1\necho running\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	busybox := needContainers(t)
	s := own(t, "halt", lab.Options{Containers: true, AgentEnv: []string{"PATH=" + dir + ":" + os.Getenv("PATH")}})
	s.ok("node1", "shoal net create app")
	s.whoami("web", 3, "--network app")
	s.ok("node1", "shoal run -d --name c1 --network app -- sleep 10000")
	// A job's program that makes an end of it at the signal has not done its job; one of its
	// own is to be there again.
	s.ok("node1", "shoal svc create -q -d --name job --mode replicated-job --constraint node.hostname==node2 -- sh -c %s", `'trap "exit 0" TERM; sleep 10000 & wait'`)
	s.ok("node1", "shoal run -d --name db --node node2 --restart always --stop-signal SIGUSR1 -- sh -c %s",
		`'trap "sleep 1; echo flushed >> `+dir+`/db; exit 0" USR1; echo began >> `+dir+`/db; while :; do sleep 0.1; done'`)
	image := build(t, "amd64", map[string]string{"bin/busybox": busybox, "bin/sh": busybox}, map[string]any{"Entrypoint": []string{"/bin/busybox", "sh", "-c"}, "Env": []string{"PATH=/bin"}}).archive(t, "box:1")
	s.ok("node1", "shoal image load -i %s --node node2", image)
	s.ok("node1", "shoal run -d --name box --node node2 --restart always --stop-signal SIGUSR1 -v %s:/out --pull never box:1 %s", dir,
		`'trap "busybox sleep 1; echo flushed >> /out/box; exit 0" USR1; echo began >> /out/box; while :; do busybox sleep 0.1; done'`)
	wrote := func(want string) {
		t.Helper()
		for _, name := range []string{"db", "box"} {
			s.eventually(30*time.Second, func() error {
				if b, _ := os.ReadFile(filepath.Join(dir, name)); string(b) != want {
					return fmt.Errorf("%s wrote %q, want %q", name, b, want)
				}
				return nil
			})
		}
	}
	wrote("began\n")
	s.eventually(30*time.Second, func() error {
		if got := s.running("job"); len(got) != 1 {
			return fmt.Errorf("job: %+v", got)
		}
		return nil
	})
	l := s.under("c1", 12, func() {
		if err := os.WriteFile(down, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		s.endAgent("node2", 60*time.Second)
		wrote("began\nflushed\n")
		if got := s.ok("node1", "shoal node ls --filter name=node2 --format %s", "'{{.Status}} {{.Message}}'"); got != "down its machine goes down" {
			t.Errorf("node2 is %s", got)
		}
		s.eventually(60*time.Second, func() error {
			got := s.running("web")
			if len(got) != 3 || slices.ContainsFunc(got, func(x task) bool { return x.NodeName == "node2" }) {
				return fmt.Errorf("web is not whole without node2: %+v", got)
			}
			return nil
		})
		if err := s.Kill(t.Context(), "node2"); err != nil {
			t.Fatal(err)
		}
	})
	if l.Failed != 0 {
		t.Errorf("a machine that is shut down: %d of %d failed: %v", l.Failed, l.Requests, l.Errors)
	}
	t.Logf("a machine that is shut down: %d of %d failed", l.Failed, l.Requests)
	if err := os.Remove(down); err != nil {
		t.Fatal(err)
	}
	if err := s.Start(t.Context(), "node2"); err != nil {
		t.Fatal(err)
	}
	wrote("began\nflushed\nbegan\n")
	s.eventually(60*time.Second, func() error {
		if got := s.ok("node1", "shoal svc ls --filter name=job --format {{.Replicas}}"); !strings.HasPrefix(got, "1/1 (0/1 completed)") {
			return fmt.Errorf("the job: %s", got)
		}
		return nil
	})
}
