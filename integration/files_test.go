package integration

import (
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/internal/chaos"
	"github.com/shoalnet/shoal/lab"
)

// TestFilesOfANode: whatever becomes of what a node keeps while its agent, or all of it,
// is down, the node comes back: the same node, with the tasks that it had and no others,
// by name and virtual IP; nothing that was acknowledged is lost; and doctor finds nothing
// in the end. SHOAL_FILES_SEED does others, SHOAL_FILES_ROUNDS more.
func TestFilesOfANode(t *testing.T) {
	onlyNative(t)
	t.Parallel()
	seed, rounds := uint64(11), 8
	if v := os.Getenv("SHOAL_FILES_SEED"); v != "" {
		n, err := strconv.ParseUint(v, 10, 64)
		if err != nil {
			t.Fatalf("SHOAL_FILES_SEED=%s: want a number: %v", v, err)
		}
		seed = n
	}
	if v := os.Getenv("SHOAL_FILES_ROUNDS"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil {
			t.Fatalf("SHOAL_FILES_ROUNDS=%s: want a number: %v", v, err)
		}
		rounds = n
	}
	t.Logf("SHOAL_FILES_SEED=%d", seed)
	r := rand.New(rand.NewPCG(seed, 1))
	s := own(t, "files", lab.Options{Nodes: 3})
	s.ok("node1", "shoal net create app")
	s.whoami("web", 3, "--network app")
	s.ok("node1", "shoal run -d --name near --network app -- %s/whoami", bin)
	s.ok("node1", "shoal run -d --name far --network app --node node3 --restart always -- %s/whoami", bin)
	data, other := s.dataDir("node3"), s.dataDir("node2")
	for round := range rounds {
		before := s.running("web")
		far := s.task("far").ID
		// All of the node goes in one of four.
		whole := r.IntN(4) == 0
		if whole {
			if err := s.Kill(t.Context(), "node3"); err != nil {
				t.Fatal(err)
			}
		} else if err := s.KillAgent("node3"); err != nil {
			t.Fatal(err)
		}
		undo, what := s.damage(r, data, other, far)
		t.Logf("round %d: whole node %t: %s", round, whole, what)
		s.ok("node1", "shoal net create kept%d", round)
		if err := s.Start(t.Context(), "node3"); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		if undo != nil {
			s.eventually(20*time.Second, func() error {
				if d := s.on("node3", "shoal", "doctor"); d.code != 1 || !strings.Contains(d.out, "read-only") {
					return fmt.Errorf("doctor does not say that the disk is read-only: %+v", d)
				}
				return nil
			})
			if err := undo(); err != nil {
				t.Fatal(err)
			}
		}
		s.eventually(60*time.Second, func() error {
			if d := s.on("node3", "shoal", "doctor"); d.code != 0 {
				return fmt.Errorf("%s: doctor: %+v", what, d)
			}
			now := s.running("web")
			if len(now) != 3 {
				return fmt.Errorf("%s: web runs %d times", what, len(now))
			}
			f := s.task("far")
			if f.ID != far || f.Status.State != "running" {
				return fmt.Errorf("%s: far is %+v, was %s", what, f, far)
			}
			if whole {
				return nil
			}
			for _, b := range before {
				if !slices.ContainsFunc(now, func(n task) bool { return n.ID == b.ID && n.Status.PID == b.Status.PID }) {
					return fmt.Errorf("%s: %s of before does not run on: %+v", what, b.Name, now)
				}
			}
			return nil
		})
		for _, from := range []string{"near", "far"} {
			for _, to := range []string{"web", "far"} {
				if l := s.inTask(from, "-n 60 -timeout 5s http://%s/", to); l.Failed > 0 {
					t.Errorf("%s: from %s to %s: %d of %d failed: %v", what, from, to, l.Failed, l.Requests, l.Errors)
				}
			}
		}
		ls := s.ok("node3", "shoal net ls --format {{.Name}}")
		for i := range round + 1 {
			if !slices.Contains(strings.Fields(ls), fmt.Sprintf("kept%d", i)) {
				t.Errorf("%s: network kept%d is gone", what, i)
			}
		}
		s.noStrays("node3")
		if t.Failed() {
			return
		}
	}
}

// damage does something to some of the files and directories of a node, the same of the
// same numbers: task is the ID of one that it has, the others are told from it alone. undo
// is for what does not mend itself.
func (s site) damage(r *rand.Rand, data, other, task string) (undo func() error, what string) {
	s.Helper()
	if r.IntN(8) == 0 {
		remount := func(flags uintptr) error {
			return unix.Mount("", data, "", unix.MS_REMOUNT|unix.MS_BIND|flags, "")
		}
		if err := unix.Mount(data, data, "", unix.MS_BIND, ""); err != nil {
			s.Fatal(err)
		}
		s.Cleanup(func() { _ = unix.Unmount(data, unix.MNT_DETACH) })
		if err := remount(unix.MS_RDONLY); err != nil {
			s.Fatal(err)
		}
		return func() error { return remount(0) }, "the data directory is read-only"
	}
	var paths []string
	for _, top := range []string{data, filepath.Join(filepath.Dir(data), "run")} {
		err := filepath.WalkDir(top, func(p string, _ fs.DirEntry, err error) error {
			if err == nil && p != top {
				paths = append(paths, p)
			}
			return nil
		})
		if err != nil {
			s.Fatal(err)
		}
	}
	named := func(p string) string {
		return taskID.ReplaceAllStringFunc(p, func(id string) string {
			if strings.Contains(id, task) {
				return "/task"
			}
			return "/replica"
		})
	}
	slices.SortFunc(paths, func(a, b string) int { return strings.Compare(named(a), named(b)) })
	var did, names []string
	for range 1 + r.IntN(3) {
		p := paths[r.IntN(len(paths))]
		rel, _ := filepath.Rel(filepath.Dir(data), p)
		// Of a file that is kept twice one is left: with both gone, the node asks a person
		// (TestIdentity…).
		name := filepath.Base(p)
		if slices.Contains(names, name) || name == "copy" && slices.ContainsFunc(names, func(n string) bool { return strings.HasPrefix(n, "node.") }) || strings.HasPrefix(name, "node.") && slices.Contains(names, "copy") {
			continue
		}
		names = append(names, name)
		peer, _ := filepath.Rel(data, p)
		how, err := chaos.Damage(p, filepath.Join(other, peer), r)
		if err != nil {
			s.Fatal(err)
		}
		did = append(did, rel+": "+how)
	}
	return nil, strings.Join(did, "; ")
}

var taskID = regexp.MustCompile(`/[a-z2-7]{12}\b`)

// noStrays wants no more namespaces of tasks on a node than tasks that run there.
func (s site) noStrays(node string) {
	s.Helper()
	s.eventually(20*time.Second, func() error {
		out := s.ok("node1", "shoal ps -a --filter node=%s --format {{.Name}}={{.State}}", node)
		es, err := os.ReadDir("/run/netns")
		if err != nil {
			return err
		}
		var have []string
		for _, e := range es {
			if strings.HasPrefix(e.Name(), "shoal-"+s.Name+"-"+node+"-task-") {
				have = append(have, e.Name())
			}
		}
		if n := strings.Count(out, "=running"); n != len(have) {
			return fmt.Errorf("%d tasks run on %s, which has the namespaces %v:\n%s", n, node, have, out)
		}
		return nil
	})
}
