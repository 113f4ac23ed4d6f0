package process

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/runtime"
)

// inMachine runs a test again in a process whose /etc is a copy, to be changed as
// a node's programs do. It returns false in the process that has done so.
func inMachine(t *testing.T) bool {
	t.Helper()
	needRoot(t)
	const mark = "SHOAL_TEST_MACHINE"
	if os.Getenv(mark) != "" {
		run := func(args ...string) {
			if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
				t.Fatalf("%v: %v: %s", args, err, out)
			}
		}
		run("mount", "--make-rprivate", "/")
		etc := t.TempDir()
		run("mount", "-t", "tmpfs", "tmpfs", etc)
		t.Cleanup(func() { _ = unix.Unmount("/etc", unix.MNT_DETACH); _ = unix.Unmount(etc, unix.MNT_DETACH) })
		run("cp", "-a", "/etc/.", etc)
		// Whatever this machine has in its place.
		if err := os.Remove(filepath.Join(etc, "resolv.conf")); err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		for _, n := range []string{"resolv.conf", "hosts", "hostname"} {
			if err := os.WriteFile(filepath.Join(etc, n), []byte("of the node\n"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		run("mount", "--bind", etc, "/etc")
		return true
	}
	exe, err := os.Executable() // by name: /proc/self/exe would be of this mount namespace
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "-test.run", "^"+t.Name()+"$", "-test.v", "-test.timeout", "2m")
	cmd.Env = append(os.Environ(), mark+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Fatalf("%v\n%s", err, out)
	}
	return false
}

// replaceFile puts another file in the place of one, as programs do that want no
// reader to find half of it.
func replaceFile(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path+".new", []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// own is what a task has in its own files.
func (f *fixture) own(k runtime.Task) string {
	got, _ := f.sh(k, "cat /etc/resolv.conf /etc/hosts /etc/hostname")
	return got
}

// What the node's programs do to the node's files changes nothing for a task that
// runs, at no moment, nor for one that starts later; and what the task does to its
// own changes nothing for the node.
func TestNodeReplacesItsFiles(t *testing.T) {
	if !inMachine(t) {
		return
	}
	f := setup(t)
	k := f.running("sleep", "1000")
	want := f.own(k)
	if !strings.Contains(want, "127.0.0.11") || !strings.Contains(want, "10.1.2.3\tme") || !strings.Contains(want, k.Hostname) {
		t.Fatalf("a task's files: %q", want)
	}
	same := func(after string) {
		t.Helper()
		if got := f.own(k); got != want {
			t.Errorf("after %s a task finds %q, want %q", after, got, want)
		}
		later := f.running("sleep", "1000")
		if got := f.own(later); !strings.Contains(got, "127.0.0.11") || !strings.Contains(got, later.Hostname) {
			t.Errorf("after %s a new task finds %q", after, got)
		}
		if err := f.Remove(f.ctx(), later.ID); err != nil {
			t.Error(err)
		}
	}
	files := []string{"/etc/resolv.conf", "/etc/hosts", "/etc/hostname"}
	each := func(fn func(string)) {
		for _, n := range files {
			fn(n)
		}
	}
	// No moment without: the program itself looks while the node does it again and again.
	watch := f.running("sh", "-c", "while grep -q 127.0.0.11 /etc/resolv.conf; do :; done; echo lost")
	for range 200 {
		each(func(n string) { replaceFile(t, n, "of the node\n") })
	}
	if got := f.output(watch); got != "" {
		t.Errorf("while the node replaced its files a task's program says %q", got)
	}
	same("replacing")
	each(func(n string) { _ = os.Rename(n, n+".bak") })
	same("renaming")
	each(func(n string) { _ = os.Symlink("/run/elsewhere", n) })
	same("putting links to nothing there")
	each(func(n string) { _ = os.Remove(n) })
	same("removing")
	each(func(n string) { _ = os.Mkdir(n, 0o755) })
	same("putting directories there")
	each(func(n string) { _ = os.Remove(n); _ = os.WriteFile(n, []byte("of the node\n"), 0o644) })

	// Hosts of a network that comes later still reach the task.
	if err := f.SetHosts(f.ctx(), k.ID, "other", nil); err != nil {
		t.Fatal(err)
	}

	// All else in /etc is the node's, and what changes there is seen.
	f.eventually("a new user of the node is known in the task", func() bool {
		replaceFile(t, "/etc/passwd", "root:x:0:0::/root:/bin/sh\nnewcomer:x:4711:4711::/:/bin/sh\n")
		got, _ := f.sh(k, "grep -c newcomer /etc/passwd; echo $?")
		return strings.HasPrefix(got, "1")
	})
	if _, code := f.sh(k, "echo mine > /etc/of-the-task && echo mine > /etc/passwd"); code != 0 {
		t.Error("a task can't write in its /etc")
	}
	if _, err := os.Stat("/etc/of-the-task"); err == nil {
		t.Error("what a task writes in /etc is the node's")
	}
	if b, _ := os.ReadFile("/etc/passwd"); !strings.Contains(string(b), "newcomer") {
		t.Errorf("a task changed the node's /etc/passwd: %q", b)
	}
	if len(f.Faults()) > 0 {
		t.Errorf("faults: %v", f.Faults())
	}
}

// A mount in the node's /etc is there for its tasks, too.
func TestMountsInEtc(t *testing.T) {
	if !inMachine(t) {
		return
	}
	f := setup(t)
	for _, d := range []string{"/etc/sub dir", "/etc/plain"} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mount("tmpfs", "/etc/sub dir", "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Unmount("/etc/sub dir", unix.MNT_DETACH) }()
	if err := os.WriteFile("/etc/sub dir/mounted", []byte("yes"), 0o644); err != nil {
		t.Fatal(err)
	}
	// As in a container, where these are mounts of its own.
	if err := os.WriteFile("/etc/plain/resolv", []byte("of the container\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("/etc/plain/resolv", "/etc/resolv.conf", "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Unmount("/etc/resolv.conf", unix.MNT_DETACH) }()
	k := f.running("sleep", "1000")
	if got, code := f.sh(k, "cat '/etc/sub dir/mounted'"); code != 0 || got != "yes" {
		t.Errorf("a mount in /etc: %q, exit status %d", got, code)
	}
	if got, _ := f.sh(k, "cat /etc/resolv.conf"); !strings.Contains(got, "127.0.0.11") {
		t.Errorf("resolv.conf: %q", got)
	}
}

// A task that has lost a file or sees what it should not gets it back: one of an
// older agent, one in the node's own namespace, and any when a directory that is
// hidden goes and comes.
func TestMountsComeBack(t *testing.T) {
	if !inMachine(t) {
		return
	}
	f := setup(t)
	own := t.TempDir()
	hidden := filepath.Join(own, "agent")
	if err := os.Mkdir(hidden, 0o755); err != nil {
		t.Fatal(err)
	}
	f.hidden = []string{hidden}
	f.restart()
	k := f.running("sleep", "1000")
	host := f.task("sleep", "1000")
	host.Netns = ""
	if _, err := f.Create(f.ctx(), host); err != nil {
		t.Fatal(err)
	}
	if err := f.Start(f.ctx(), host.ID); err != nil {
		t.Fatal(err)
	}
	// As an older agent's: without an /etc of its own.
	old := f.running("sleep", "1000")
	f.eventually("the task runs", func() bool { return f.status(old).State == runtime.Running })
	f.mu.Lock()
	pid := f.tasks[old.ID].initPID
	f.mu.Unlock()
	in := func(script string) {
		t.Helper()
		if out, err := exec.Command("nsenter", "-t", strconv.Itoa(pid), "-m", "-p", "sh", "-ec", script).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", script, err, out)
		}
	}
	in("umount /etc/resolv.conf /etc/hosts /etc/hostname /etc")
	check := func(what string) {
		t.Helper()
		f.eventually(what, func() bool {
			return strings.Contains(f.own(old), "127.0.0.11") && strings.Contains(f.own(old), "10.1.2.3\tme") &&
				strings.Contains(f.own(host), host.Hostname)
		})
	}
	replaceFile(t, "/etc/hosts", "of the node\n")
	check("the files of a task are back")
	for _, n := range []string{"/etc/resolv.conf", "/etc/hostname", "/etc/hosts"} {
		replaceFile(t, n, "of the node\n")
	}
	check("the files of a task are back after they were replaced")
	if err := os.Remove("/etc/resolv.conf"); err != nil {
		t.Fatal(err)
	}
	check("the files of a task are back after one was removed")

	if err := os.Remove(hidden); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(hidden, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(hidden, "secret"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, x := range []runtime.Task{k, host, old} {
		f.eventually("the agent's directory is hidden again", func() bool {
			_, code := f.sh(x, "test -e "+hidden+"/secret")
			return code != 0
		})
	}

	// What can't be given back is said: here the agent has lost the file, too.
	if got := f.Faults(); len(got) > 0 {
		t.Errorf("faults: %v", got)
	}
	in("mkdir -p /tmp/x; mount -t tmpfs -o ro tmpfs /etc")
	f.eventually("a task without a place for its files is reported", func() bool {
		replaceFile(t, "/etc/hosts", "of the node\n")
		return strings.Contains(f.Faults()[old.Name], "resolv.conf")
	})
	in("umount /etc")
	f.eventually("and no more when it is mended", func() bool {
		replaceFile(t, "/etc/hosts", "of the node\n")
		time.Sleep(10 * time.Millisecond)
		return len(f.Faults()) == 0
	})
}
