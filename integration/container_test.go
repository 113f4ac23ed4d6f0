package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	shimapi "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/ttrpc"

	"github.com/shoalnet/shoal/internal/imagefile"
	"github.com/shoalnet/shoal/lab"
)

// anImage is an image of one layer.
type anImage struct{ imagefile.Image }

func marshal(t *testing.T, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// build makes an image of static programs: a file for each path in it.
func build(t *testing.T, arch string, files map[string]string, config map[string]any) anImage {
	t.Helper()
	var layer []imagefile.File
	for _, d := range []string{"bin", "etc", "dev", "proc", "sys", "data"} {
		layer = append(layer, imagefile.File{Name: d, Mode: 0o755})
	}
	layer = append(layer, imagefile.File{Name: "tmp", Mode: 0o1777},
		imagefile.File{Name: "etc/passwd", Mode: 0o644, Data: []byte("root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1000::/:/bin/sh\n")},
		imagefile.File{Name: "etc/group", Mode: 0o644, Data: []byte("root:x:0:\nweb:x:1000:\nextra:x:2000:\n")},
		imagefile.File{Name: "data/seed", Mode: 0o644, Data: []byte("from the image\n")})
	for to, from := range files {
		b, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		layer = append(layer, imagefile.File{Name: to, Mode: 0o755, Data: b})
	}
	i, err := imagefile.New(arch, config, layer...)
	if err != nil {
		t.Fatal(err)
	}
	return anImage{i}
}

// archive writes an image as docker save does, and returns the file's path.
func (i anImage) archive(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image.tar")
	b, err := i.Archive(name)
	if err == nil {
		err = os.WriteFile(path, b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// needContainers fails a test where containers can't be had, and returns a static
// busybox.
func needContainers(t *testing.T, programs ...string) (busybox string) {
	t.Helper()
	for _, p := range append([]string{"containerd", "runc", "busybox"}, programs...) {
		if _, err := exec.LookPath(p); err != nil {
			t.Fatalf("%s is not installed: run scripts/setup test", p)
		}
	}
	busybox, _ = exec.LookPath("busybox")
	return busybox
}

// containersLeft is what the lab's containerd has of tasks, as it says itself, when it
// should have nothing.
func (s site) containersLeft() error {
	for _, n := range s.Nodes() {
		for _, what := range [][]string{{"containers", "ls", "-q"}, {"tasks", "ls", "-q"}} {
			if out, err := s.ctr(n.Netns, what...); err != nil || out != "" {
				return fmt.Errorf("%s: %s are left: %s (%v)", n.Name, what[0], out, err)
			}
		}
		if out, err := s.ctr(n.Netns, "snapshots", "ls"); err != nil || strings.Contains(out, "shoal-") {
			return fmt.Errorf("%s: file systems are left: %s (%v)", n.Name, out, err)
		}
	}
	return nil
}

// TestContainers: services and tasks from images, as users of Docker type them.
func TestContainers(t *testing.T) {
	onlyNative(t)
	t.Parallel()
	busybox := needContainers(t)
	s := own(t, "ct", lab.Options{Nodes: 2, Containers: true})
	web := build(t, "amd64", map[string]string{"whoami": bin + "/whoami", "bin/busybox": busybox, "bin/sh": busybox},
		map[string]any{"Entrypoint": []string{"/whoami"}, "Env": []string{"A=image", "B=image"}, "WorkingDir": "/tmp", "Volumes": map[string]any{"/data": map[string]any{}}, "StopSignal": "SIGTERM"}).archive(t, "web:1")
	for _, n := range []string{"node1", "node2"} {
		if got := s.ok("node1", "shoal image load -i %s --node %s", web, n); !strings.Contains(got, "web:1") {
			t.Fatalf("image load: %s", got)
		}
	}
	s.ok("node1", "shoal net create app")
	s.ok("node1", "shoal svc create --name web --replicas 2 --network app web:1")
	for range 4 {
		if got := s.ok("node1", "shoal run --rm --network app --entrypoint /bin/busybox web:1 wget -qO- http://web/"); !strings.Contains(got, "web-") {
			t.Errorf("by name: %s", got)
		}
	}

	// What a container sees, and its exit status.
	for _, c := range []struct{ cmd, want string }{
		{"--env B=user --entrypoint /bin/busybox web:1 sh -c 'echo $A $B; pwd'", "image user\n/tmp"},
		{"-u web --group-add extra --entrypoint /bin/busybox web:1 id", "uid=1000(web) gid=1000(web) groups=1000(web),2000(extra)"},
		{"--hostname h1 --entrypoint /bin/busybox web:1 hostname", "h1"},
		{"--read-only --entrypoint /bin/busybox web:1 sh -c 'touch /x || echo refused'", "refused"},
		{"--tmpfs /mnt:size=1m --entrypoint /bin/busybox web:1 sh -c 'grep -c /mnt /proc/mounts'", "1"},
		{"-v data1:/data --entrypoint /bin/busybox web:1 sh -c 'cat /data/seed; echo more > /data/x'", "from the image"},
		{"-v data1:/data:ro --entrypoint /bin/busybox web:1 cat /data/x", "more"},
		{"--sysctl net.ipv4.ip_default_ttl=42 --entrypoint /bin/busybox web:1 cat /proc/sys/net/ipv4/ip_default_ttl", "42"},
		{"--ulimit nofile=77 --entrypoint /bin/busybox web:1 sh -c 'ulimit -n'", "77"},
		{"--cap-drop ALL --entrypoint /bin/busybox web:1 grep CapEff /proc/self/status", "CapEff:\t0000000000000000"},
		{"--entrypoint /bin/busybox web:1 grep ^nameserver /etc/resolv.conf", "nameserver 127.0.0.11"},
		{"--init --entrypoint /bin/busybox web:1 sh -c 'echo $$'", ""},
	} {
		if got := s.ok("node1", "shoal run --rm --network app %s", c.cmd); !strings.Contains(got, c.want) {
			t.Errorf("run %s: %q, want %q", c.cmd, got, c.want)
		}
	}
	if r := s.in("hello\n", "node1", "shoal", "run", "--rm", "-i", "--network", "app", "--entrypoint", "/bin/busybox", "web:1", "cat"); r.code != 0 || r.out != "hello\n" {
		t.Errorf("input: %d, %q, %q", r.code, r.out, r.err)
	}
	for _, c := range []struct {
		code int
		want string
		args string
	}{
		{3, "", "--entrypoint /bin/busybox web:1 sh -c 'exit 3'"},
		{127, "/bin/nope", "--entrypoint /bin/nope web:1"},
		{125, "not to be pulled", "--pull never nosuch:1"},
		{2, "--", "/bin/sleep 3"},
		{2, "small letters", "Web:1"},
	} {
		if r := s.on("node1", "sh", "-c", "shoal run --rm --network app "+c.args); r.code != c.code || !strings.Contains(r.err, c.want) {
			t.Errorf("run %s: exit status %d, %q; want %d, %q", c.args, r.code, r.err, c.code, c.want)
		}
	}
	if got := s.ok("node1", "shoal exec -e C=3 -u web -w /data web.1 /bin/busybox sh -c 'id -u; pwd; echo $C'"); got != "1000\n/data\n3" {
		t.Errorf("exec: %q", got)
	}
	if r := s.on("node1", "shoal", "exec", "web.1", "/bin/nope"); r.code != 127 {
		t.Errorf("exec of nothing: %d, %s", r.code, r.err)
	}

	// A command has what the container has of capabilities and groups, however it is run.
	s.ok("node1", "shoal run -d --name caps --cap-drop ALL --cap-add NET_ADMIN -u web --group-add extra --entrypoint /bin/busybox web:1 sleep 1000")
	const status = "/bin/busybox grep -E ^(CapBnd|Groups): /proc/self/status"
	for _, user := range []string{"", "-u web:web", "-u 0"} {
		got := s.ok("node1", "shoal exec %s caps %s", user, status)
		if groups, bnd, _ := strings.Cut(got, "\n"); !slices.Contains(strings.Fields(groups), "2000") || !strings.HasSuffix(bnd, "\t0000000000001000") {
			t.Errorf("exec %s: %q, want NET_ADMIN alone and group 2000", user, got)
		}
	}
	s.ok("node1", "shoal exec -d caps /bin/busybox sh -c '/bin/busybox grep CapBnd /proc/self/status > /tmp/detached'")
	s.eventually(10*time.Second, func() error {
		if got := s.on("node1", words("shoal exec caps /bin/busybox cat /tmp/detached")...).out; !strings.HasSuffix(got, "\t0000000000001000\n") {
			return fmt.Errorf("exec -d: %q, want NET_ADMIN alone", got)
		}
		return nil
	})
	s.ok("node1", "shoal rm -f caps")

	// -P: what the image and --expose name, but for what is published anyway; an image that
	// the node has not yet is fetched, or is not there.
	exposing := build(t, "amd64", map[string]string{"whoami": bin + "/whoami"},
		map[string]any{"Entrypoint": []string{"/whoami"}, "ExposedPorts": map[string]any{"80/tcp": map[string]any{}, "81/tcp": map[string]any{}, "53/udp": map[string]any{}}}).archive(t, "exposing:1")
	s.ok("node1", "shoal image load -i %s --node node2", exposing)
	s.ok("node1", "shoal run -d --name all -P -p 8081:81 --expose 90 --node node2 --pull never exposing:1")
	ports := regexp.MustCompile(`^53/udp -> 0\.0\.0\.0:\d+ \(host\)\n80/tcp -> 0\.0\.0\.0:(\d+) \(host\)\n81/tcp -> 0\.0\.0\.0:8081 \(host\)\n90/tcp -> 0\.0\.0\.0:\d+ \(host\)$`)
	published := s.ok("node1", "shoal port all")
	if at := ports.FindStringSubmatch(published); at == nil {
		t.Errorf("published of all: %q", published)
	} else {
		s.eventually(10*time.Second, func() error {
			if r := s.on("node1", "curl", "-s", "-m", "5", "http://"+s.Nodes()[1].Addr.String()+":"+at[1]+"/"); !strings.Contains(r.out, "all") {
				return fmt.Errorf("at its port: %+v", r)
			}
			return nil
		})
	}
	s.ok("node1", "shoal rm -f all")
	s.fails("node1", "no such image: exposing:1", "shoal run -P --pull never exposing:1")

	// Another platform, and a program of the node for an image.
	s.ok("node1", "shoal run --rm --platform linux/amd64 --entrypoint /bin/busybox web:1 true")
	s.fails("node1", "--platform linux/s390x: node node2 is linux/amd64, and runs no other", "shoal run --rm --platform linux/s390x --node node2 web:1")
	other := build(t, "s390x", map[string]string{"whoami": bin + "/whoami"}, map[string]any{"Entrypoint": []string{"/whoami"}}).archive(t, "other:1")
	if r := s.on("node1", "shoal", "image", "load", "-i", other); r.code == 0 || !strings.Contains(r.err, "platform") {
		t.Errorf("image of another platform: %d, %s", r.code, r.err)
	}

	// The agent is killed: containers go on, are adopted, and end in order.
	s.ok("node1", "shoal svc update --env-add C=new web")
	n := s.Nodes()[0]
	_ = syscall.Kill(n.PID, syscall.SIGKILL)
	s.eventually(10*time.Second, func() error {
		if n := s.Nodes()[0]; n.Running() {
			return fmt.Errorf("agent %d still runs", n.PID)
		}
		return nil
	})
	if err := s.Start(t.Context(), "node1"); err != nil {
		t.Fatal(err)
	}
	s.eventually(60*time.Second, func() error {
		if r := s.on("node1", "shoal", "svc", "ls", "--format", "{{.Replicas}}"); !strings.Contains(r.out, "2/2") {
			return fmt.Errorf("%s %s", r.out, r.err)
		}
		return nil
	})
	s.ok("node1", "shoal run --rm --network app --entrypoint /bin/busybox web:1 wget -qO- http://web/")
	s.ok("node1", "shoal svc rm web")
	s.eventually(30*time.Second, s.containersLeft)
	if got := s.ok("node1", "shoal volume ls -q"); got != "data1" {
		t.Errorf("volumes left: %q, want data1 alone", got)
	}
}

// bundle is containerd's directory of a container's task, or one beside it with a prefix.
func (s site) bundle(id, prefix string) string {
	s.Helper()
	bundles, err := filepath.Glob(filepath.Join(s.Dir, "containerd/state/io.containerd.runtime.v2.task/*", id))
	if err != nil || len(bundles) != 1 {
		s.Fatalf("the bundle of %s: %q %v", id, bundles, err)
	}
	return filepath.Join(filepath.Dir(bundles[0]), prefix+id)
}

// takeAway ends a container's program and has its shim forget it, behind containerd's back.
func (s site) takeAway(id string) {
	s.Helper()
	address, err := os.ReadFile(filepath.Join(s.bundle(id, ""), "address"))
	if err != nil {
		s.Fatal(err)
	}
	conn, err := net.Dial("unix", strings.TrimPrefix(strings.TrimSpace(string(address)), "unix://"))
	if err != nil {
		s.Fatal(err)
	}
	c := ttrpc.NewClient(conn)
	defer c.Close()
	shim := shimapi.NewTTRPCTaskClient(c)
	ctx, cancel := context.WithTimeout(s.Context(), 30*time.Second)
	defer cancel()
	if _, err := shim.Kill(ctx, &shimapi.KillRequest{ID: id, Signal: uint32(syscall.SIGKILL), All: true}); err != nil {
		s.Fatal(err)
	}
	if _, err := shim.Wait(ctx, &shimapi.WaitRequest{ID: id}); err != nil {
		s.Fatal(err)
	}
	if _, err := shim.Delete(ctx, &shimapi.DeleteRequest{ID: id}); err != nil {
		s.Fatal(err)
	}
}

// TestContainerFilesStay: a container that was stopped, crashed, or whose agent was killed
// meanwhile goes on with its files when it is started again, as in Docker, and they can be
// copied while it does not run. Removed, it leaves nothing.
func TestContainerFilesStay(t *testing.T) {
	onlyNative(t)
	t.Parallel()
	busybox := needContainers(t)
	s := own(t, "cs", lab.Options{Nodes: 2, Containers: true})
	image := build(t, "amd64", map[string]string{"bin/busybox": busybox, "bin/sh": busybox},
		map[string]any{"Entrypoint": []string{"/bin/busybox", "sh", "-c"}, "Env": []string{"PATH=/bin"}, "Volumes": map[string]any{"/data": map[string]any{}}}).archive(t, "box:1")
	for _, n := range []string{"node1", "node2"} {
		s.ok("node1", "shoal image load -i %s --node %s", image, n)
	}
	const program = `'for f in /log /data/log /named/log; do echo run >> $f; done; exec /bin/busybox sleep 1000'`
	s.ok("node1", "shoal run -d --name c --node node2 -v named:/named --tmpfs /mem --pull never box:1 %s", program)
	runs := func(want int) {
		t.Helper()
		for _, f := range []string{"/log", "/data/log", "/named/log"} {
			s.eventually(10*time.Second, func() error {
				if got := s.ok("node1", "shoal exec c /bin/busybox cat %s", f); got != strings.TrimSpace(strings.Repeat("run\n", want)) {
					return fmt.Errorf("%s: %q, want %d lines", f, got, want)
				}
				return nil
			})
		}
	}
	runs(1)
	// More than is on its way at once when nobody takes it.
	s.ok("node1", "shoal exec c /bin/busybox sh -c '/bin/busybox head -c 67108864 /dev/zero > /big'")
	s.ok("node1", "shoal stop -t 1 c")
	dir := t.TempDir()
	for _, f := range []string{"/log", "/data/log", "/named/log"} {
		s.ok("node1", "shoal cp c:%s %s/out", f, dir)
		if b, err := os.ReadFile(filepath.Join(dir, "out")); err != nil || string(b) != "run\n" {
			t.Errorf("%s of the stopped container: %q, %v", f, b, err)
		}
	}
	s.ok("node1", "shoal cp %s/out c:/in", dir)
	s.ok("node1", "shoal cp %s/out c:/data/in", dir)
	s.fails("node1", "no such file", "shoal cp c:/nope %s/x", dir)
	s.fails("node1", "c", "shoal volume rm --node node2 named")
	s.fails("node1", "c", "shoal image rm --node node2 box:1")
	// Who copies, and takes no more of it, keeps nobody from starting it.
	out, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	var errs bytes.Buffer
	copying, _, err := s.Command(t.Context(), "node1", "shoal", "cp", "c:/", "-")
	if err != nil {
		t.Fatal(err)
	}
	copying.Stdout, copying.Stderr = w, &errs
	if err := copying.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	s.ok("node1", "shoal start c")
	go func() { _, _ = io.Copy(io.Discard, out) }()
	if err := copying.Wait(); err == nil || !strings.Contains(errs.String(), "it is started again") {
		t.Errorf("the copy of a container that was started: %v, %s", err, errs.String())
	}
	runs(2)
	if got := s.ok("node1", "shoal exec c /bin/busybox cat /in /data/in"); got != "run\nrun" {
		t.Errorf("what was copied into the stopped container: %q", got)
	}
	s.ok("node1", "shoal restart -t 1 c")
	runs(3)

	// Nothing of it depends on who is alive meanwhile.
	s.ok("node1", "shoal stop -t 1 c")
	if err := s.KillAgent("node2"); err != nil {
		t.Fatal(err)
	}
	if err := s.KillContainerd(); err != nil {
		t.Fatal(err)
	}
	if err := s.StartContainerd(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.Start(t.Context(), "node2"); err != nil {
		t.Fatal(err)
	}
	s.eventually(30*time.Second, func() error {
		if r := s.on("node1", "shoal", "start", "c"); r.code != 0 {
			return fmt.Errorf("%s", r.err)
		}
		return nil
	})
	runs(4)

	// containerd was killed while it took a program away: its shim has done so, and is there
	// still, as containerd then has it that the program is; and once more while it removed
	// the directory, which it does under a hidden name.
	hidden := s.bundle(s.task("c").ID, ".")
	if err := errors.Join(os.Mkdir(hidden, 0o700), os.WriteFile(filepath.Join(hidden, "config.json"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if err := s.KillAgent("node2"); err != nil {
		t.Fatal(err)
	}
	s.takeAway(s.task("c").ID)
	if err := s.Start(t.Context(), "node2"); err != nil {
		t.Fatal(err)
	}
	s.eventually(30*time.Second, func() error {
		if x := s.task("c"); x.Status.State != "failed" {
			return fmt.Errorf("whose program was taken away: %+v", x.Status)
		}
		return nil
	})
	s.ok("node1", "shoal start c")
	runs(5)

	// One that crashes has what it wrote before; a replica, and one of run --rm, does not.
	s.ok("node1", `shoal run -d --name again --node node2 --restart on-failure --pull never box:1 'echo run >> /log; [ $(/bin/busybox wc -l < /log) -ge 3 ]'`)
	s.eventually(30*time.Second, func() error {
		if x := s.task("again"); x.Status.State != "complete" {
			return fmt.Errorf("%+v", x.Status)
		}
		return nil
	})
	s.ok("node1", "shoal cp again:/log %s/out", dir)
	if b, err := os.ReadFile(filepath.Join(dir, "out")); err != nil || string(b) != "run\nrun\nrun\n" {
		t.Errorf("of one that crashed twice: %q, %v", b, err)
	}
	s.ok("node1", "shoal svc create --name web --pull never box:1 %s", `'echo run >> /log; exec /bin/busybox sleep 1000'`)
	first := s.running("web")[0]
	s.ok("node1", "shoal svc update --force web")
	if got := s.ok("node1", "shoal exec web.1 /bin/busybox cat /log"); got != "run" {
		t.Errorf("a new replica begins with %q", got)
	}
	s.fails("node1", "its files are not kept", "shoal cp %s:/log %s/x", first.ID, dir)
	s.ok("node1", "shoal svc rm web")

	s.ok("node1", "shoal rm -f c again")
	s.eventually(30*time.Second, func() error {
		if err := s.containersLeft(); err != nil {
			return err
		}
		if got := s.ok("node1", "shoal volume ls --node node2 -q"); got != "named" {
			return fmt.Errorf("volumes: %q, want named alone", got)
		}
		return nil
	})
	s.ok("node1", "shoal volume rm --node node2 named")
}
