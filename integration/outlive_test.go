package integration

import (
	"bufio"
	"errors"
	"fmt"
	"math/rand"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/internal/proc"
	"github.com/shoalnet/shoal/lab"
	"github.com/shoalnet/shoal/runtime/volume"
)

// ctr asks the lab's containerd itself, in a node's namespace of it.
func (s site) ctr(namespace string, args ...string) (string, error) {
	out, err := exec.Command("ctr", append([]string{"-a", filepath.Join(s.Dir, "containerd/sock"), "-n", namespace}, args...)...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("ctr %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out)), nil
}

// leftovers is what is left of tasks on the lab's nodes, when none should be.
func (s site) leftovers() error {
	for _, n := range s.Nodes() {
		for _, what := range []struct {
			name string
			args []string
			with string // only these lines count
		}{
			{"containers", []string{"containers", "ls", "-q"}, ""}, {"programs", []string{"tasks", "ls", "-q"}, ""},
			{"leases", []string{"leases", "ls", "-q"}, ""}, {"downloads", []string{"content", "active"}, ""},
			{"snapshots", []string{"snapshots", "ls"}, " Active"}, {"views", []string{"snapshots", "ls"}, " View"},
		} {
			out, err := s.ctr(n.Netns, what.args...)
			if err != nil {
				return err
			}
			lines := strings.Split(out, "\n")
			if what.name == "downloads" {
				lines = lines[1:] // the head of a table
			}
			lines = slices.DeleteFunc(lines, func(l string) bool { return l == "" || !strings.Contains(l, what.with) })
			if len(lines) > 0 {
				return fmt.Errorf("%s: %s are left: %q", n.Name, what.name, lines)
			}
		}
		for _, glob := range []string{filepath.Join("/run/containerd/runc", n.Netns, "*"), filepath.Join(s.Dir, "containerd/state/io.containerd.runtime.v2.task", n.Netns, "*"),
			filepath.Join(n.Dir, "data/tasks/*"), filepath.Join(n.Dir, "run/tasks/*"), filepath.Join(n.Dir, "run/mounts/*"), filepath.Join(n.Dir, "run/exec/*"), filepath.Join(n.Dir, "data/volumes/*")} {
			if left, _ := filepath.Glob(glob); len(left) > 0 {
				return fmt.Errorf("%s: left behind: %s", n.Name, left)
			}
		}
		if ns, err := nl.List(n.Netns + "-task-"); err != nil || len(ns) > 0 {
			return fmt.Errorf("%s: namespaces are left: %v %v", n.Name, ns, err)
		}
		pids, err := proc.PIDs()
		if err != nil {
			return err
		}
		for _, pid := range pids {
			args := proc.Args(pid)
			if slices.Contains(args, "task-shim") && strings.Contains(strings.Join(args, " "), n.Dir+"/") || len(args) > 0 && strings.Contains(args[0], "containerd-shim") && slices.Contains(args, n.Netns) {
				return fmt.Errorf("%s: a shim is left: %q", n.Name, args)
			}
		}
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for _, l := range strings.Split(string(b), "\n") {
		if strings.Contains(l, " "+s.Dir+"/") {
			return fmt.Errorf("a mount is left: %s", l)
		}
	}
	return nil
}

// TestImagesGoAndDisksFill: what no task uses goes after the time that is set, but for what
// a person has fetched; a full disk is a clear note, and the node goes on.
func TestImagesGoAndDisksFill(t *testing.T) {
	onlyNative(t)
	t.Parallel()
	r := withRegistry(t, "fill", lab.Options{Nodes: 1, AgentArgs: []string{"--image-ttl", "1s"}})
	// containerd's files on a small disk.
	if err := r.KillContainerd(); err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(r.Dir, "containerd/root")
	if err := syscall.Mount("tmpfs", root, "tmpfs", 0, "size=24m"); err != nil {
		t.Fatal(err)
	}
	if err := r.StartContainerd(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.push(web(t, "amd64", "one"), "one", "1")
	r.push(web(t, "amd64", "two"), "two", "1")
	junk := filepath.Join(t.TempDir(), "junk")
	b := make([]byte, 30<<20)
	_, _ = rand.New(rand.NewSource(1)).Read(b)
	if err := os.WriteFile(junk, b, 0o600); err != nil {
		t.Fatal(err)
	}
	r.push(build(t, "amd64", map[string]string{"junk": junk}, map[string]any{"Entrypoint": []string{"/junk"}}), "big", "1")

	kept := r.ok("node1", "shoal image pull %s/two:1", plain)
	r.ok("node1", "shoal net create app")
	r.ok("node1", "shoal svc create --name one --network app %s/one:1", plain)
	r.ok("node1", "shoal svc create -d --name big --network app --restart-delay 1h %s/big:1", plain)
	r.eventually(60*time.Second, func() error {
		notes := r.notes("big.")
		if !slices.ContainsFunc(notes, func(n string) bool {
			return strings.HasPrefix(n, "node1: node node1: image "+plain+"/big:1: the disk of containerd is full")
		}) {
			return fmt.Errorf("notes of an image that has no room: %q", notes)
		}
		return nil
	})
	r.ok("node1", "shoal svc rm big")
	// What was half fetched is not in the way of others, and who ran goes on.
	r.push(web(t, "amd64", "three"), "three", "1")
	if got := r.ok("node1", "shoal run --rm --network app --entrypoint /bin/busybox %s/three:1 wget -qO- http://one/", plain); got != "version one" {
		t.Errorf("after the disk was full: %q", got)
	}
	r.ok("node1", "shoal svc rm one")
	r.eventually(60*time.Second, func() error {
		if got := r.ok("node1", "shoal image ls --digests"); strings.Count(got, "\n") != 1 || !strings.Contains(got, kept[strings.Index(kept, "@")+1:]) {
			return fmt.Errorf("images: %s, want %s alone", got, kept)
		}
		ns := r.Nodes()[0].Netns
		snaps, err := r.ctr(ns, "snapshots", "ls")
		if err != nil {
			return err
		}
		blobs, err := r.ctr(ns, "content", "ls", "-q")
		if err != nil {
			return err
		}
		// One layer, and its manifest, configuration and content.
		if strings.Count(snaps, "\n") != 1 || strings.Count(blobs, "\n") != 2 {
			return fmt.Errorf("left are snapshots %q and blobs %q", snaps, blobs)
		}
		return nil
	})
}

// TestContainersOutliveKills: agents and containerd are killed at any moment, while
// images are fetched, containers made and removed. What ran goes on, what was wanted
// comes to be, and in the end nothing is left.
func TestContainersOutliveKills(t *testing.T) {
	onlyNative(t)
	t.Parallel()
	r := withRegistry(t, "outlive", lab.Options{Nodes: 2, Managers: 1})
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewSource(seed))
	busybox := needContainers(t)
	// What is in each makes it another image, and its fetching take a while.
	image := func(i int) anImage {
		junk := filepath.Join(t.TempDir(), "junk")
		b := make([]byte, 2<<20)
		_, _ = rnd.Read(b)
		if err := os.WriteFile(junk, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return build(t, "amd64", map[string]string{"whoami": bin + "/whoami", "bin/busybox": busybox, "junk": junk},
			map[string]any{"Entrypoint": []string{"/whoami"}, "Volumes": map[string]any{"/data": map[string]any{}}, "StopSignal": "SIGKILL"})
	}
	r.push(image(0), "app", "0")
	r.ok("node1", "shoal net create app")
	r.ok("node1", "shoal svc create --name keep --replicas 2 --network app %s/app:0", plain)
	r.ok("node1", "shoal run -d --name client --network app -- sleep 10000")
	pids := map[string]int{}
	for _, k := range r.running("keep") {
		pids[k.ID] = k.Status.PID
	}
	vip := r.ok("node1", "shoal svc ls --filter name=keep --format {{.VirtualIP}}")
	nss, err := nl.List("shoal-" + r.Name + "-node1-task-client-")
	if err != nil || len(nss) != 1 {
		t.Fatalf("the client's namespace: %v %v", nss, err)
	}
	conn, err := nl.Dial(t.Context(), nss[0], "tcp", netip.MustParseAddrPort(vip+":9000"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	answers := bufio.NewScanner(conn)
	say := func(text string) {
		t.Helper()
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := fmt.Fprintln(conn, text); err != nil || !answers.Scan() || !strings.Contains(answers.Text(), text) {
			t.Fatalf("said %q on a connection from before the kills, heard %q (%v, %v)", text, answers.Text(), err, answers.Err())
		}
	}
	say("before")

	// What agents that were killed at the worst moments leave, for certain.
	for _, n := range r.Nodes() {
		if _, err := r.ctr(n.Netns, "leases", "create", "--id", "of-one-that-was-killed"); err != nil {
			t.Fatal(err)
		}
		if _, _, err := (&volume.Store{Dir: filepath.Join(n.Dir, "data/volumes")}).Create("of-one-that-was-killed", nil, "gonegonegone"); err != nil {
			t.Fatal(err)
		}
		at := filepath.Join(n.Dir, "run/mounts/of-one-that-was-killed")
		if err := errors.Join(os.Mkdir(at, 0o700), syscall.Mount("tmpfs", at, "tmpfs", 0, "")); err != nil {
			t.Fatal(err)
		}
	}

	agent := func(node string) {
		if err := r.KillAgent(node); err != nil {
			t.Fatal(err)
		}
	}
	revive := func(node string) {
		if err := r.Start(t.Context(), node); err != nil {
			t.Fatal(err)
		}
	}
	kinds := rnd.Perm(5)
	rounds := len(kinds)
	for i := 1; i <= rounds; i++ {
		r.push(image(i), "app", fmt.Sprint(i))
		name := fmt.Sprintf("w%d", i)
		r.ok("node1", "shoal svc create -d --name %s --replicas 4 --network app %s/app:%d", name, plain, i)
		if i > 2 {
			r.ok("node1", "shoal svc rm w%d", i-2)
		}
		time.Sleep(time.Duration(rnd.Intn(900)) * time.Millisecond) // the moment is what chance has it
		switch what := kinds[i-1]; what {
		case 0, 1:
			node := []string{"node1", "node2"}[what]
			agent(node)
			revive(node)
		case 2:
			if err := r.KillContainerd(); err != nil {
				t.Fatal(err)
			}
			if err := r.StartContainerd(t.Context()); err != nil {
				t.Fatal(err)
			}
		case 3:
			agent("node1")
			agent("node2")
			revive("node1")
			time.Sleep(time.Duration(rnd.Intn(4000)) * time.Millisecond) // for longer than it is waited for, at times
			revive("node2")
		default:
			node := []string{"node1", "node2"}[rnd.Intn(2)]
			agent(node)
			if err := r.KillContainerd(); err != nil {
				t.Fatal(err)
			}
			revive(node) // and containerd
		}
		say(fmt.Sprint("round ", i))
	}
	for i := rounds - 1; i <= rounds; i++ {
		r.eventually(60*time.Second, func() error {
			if got := r.on("node1", "shoal", "svc", "ls", "--filter", fmt.Sprintf("name=w%d", i), "--format", "{{.Replicas}}"); got.out != "4/4\n" {
				return fmt.Errorf("w%d: %s %s", i, got.out, got.err)
			}
			return nil
		})
	}
	say("after")
	for _, k := range r.running("keep") {
		if pids[k.ID] != k.Status.PID {
			t.Errorf("%s is another program than before the kills: %d, was of %v", k.Name, k.Status.PID, pids)
		}
	}

	// All machines lose their power, and come back.
	if err := r.PowerOff(t.Context()); err != nil {
		t.Fatal(err)
	}
	revive("node1")
	revive("node2")
	r.eventually(60*time.Second, func() error {
		if got := r.on("node1", "shoal", "svc", "ls", "--format", "{{.Name}} {{.Replicas}}"); got.out != fmt.Sprintf("keep 2/2\nw%d 4/4\nw%d 4/4\n", rounds-1, rounds) {
			return fmt.Errorf("after a loss of power: %s %s", got.out, got.err)
		}
		return nil
	})
	if got := r.ok("node1", "shoal run --rm --network app --entrypoint /bin/busybox %s/app:0 wget -qO- http://keep/", plain); !strings.Contains(got, "keep-") {
		t.Errorf("after a loss of power, by name: %s", got)
	}

	// A node that leaves takes what is its own, and nothing of who else uses containerd.
	if _, err := r.ctr("others", "images", "import", image(9).archive(t, "docker.io/library/others:1")); err != nil {
		t.Fatal(err)
	}
	if _, err := r.ctr("others", "run", "-d", "docker.io/library/others:1", "theirs"); err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = r.ctr("others", "tasks", "rm", "-f", "theirs") }()
	r.ok("node1", "shoal svc rm keep w%d w%d", rounds-1, rounds)
	r.ok("node1", "shoal svc create --name last --mode global --network app %s/app:0", plain)
	r.ok("node2", "shoal leave")
	r.ok("node1", "shoal svc rm last")
	r.ok("node1", "shoal rm -f client")
	if got, err := r.ctr("others", "tasks", "ls"); err != nil || !strings.Contains(got, "RUNNING") {
		t.Errorf("who else uses containerd has lost something: %s %v", got, err)
	}
	if _, err := r.ctr("others", "tasks", "rm", "-f", "theirs"); err != nil {
		t.Fatal(err)
	}
	r.eventually(60*time.Second, r.leftovers)
}
