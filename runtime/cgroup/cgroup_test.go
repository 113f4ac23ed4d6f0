package cgroup

import (
	"errors"
	"os"
	"os/exec"
	goruntime "runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/shoalnet/shoal/spec"
)

func TestLacks(t *testing.T) {
	all := spec.Resources{NanoCPUs: 1e9, Memory: 1 << 30, Pids: 10}
	for _, tc := range []struct {
		s    Support
		r    spec.Resources
		want string
	}{
		{Support{Version: 2}, all, ""},
		{Support{}, all, "CPU memory processes"},
		{Support{}, spec.Resources{}, ""},
		{Support{Version: 1, Missing: []string{"memory"}}, all, "memory"},
		{Support{Version: 1, Missing: []string{"memory"}}, spec.Resources{CPUShares: 2}, ""},
	} {
		if got := strings.Join(tc.s.Lacks(tc.r), " "); got != tc.want {
			t.Errorf("%+v of %+v: %q, want %q", tc.s, tc.r, got, tc.want)
		}
	}
}

func TestNotOurs(t *testing.T) {
	for _, p := range []string{"", "/", "/shoal", "/system.slice/x", "/shoalx/y"} {
		if Remove(p) == nil {
			t.Errorf("%q was taken for one of ours", p)
		}
	}
}

// What is forked into a group is in it from its birth, with its limits, and this
// process is not.
func TestGroup(t *testing.T) {
	if os.Getuid() != 0 || Supported().Version == 0 {
		t.Skip("needs root, and control groups: " + Supported().String())
	}
	parent := Root + "/test-" + spec.NewID()
	path := parent + "/" + spec.NewID()
	t.Cleanup(func() {
		if err := Clear(parent); err != nil {
			t.Error(err)
		}
		if got := List(parent); got != nil {
			t.Errorf("left behind: %v", got)
		}
		if _, err := Read(parent); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the parent is still there: %v", err)
		}
	})
	if err := Create(path, spec.Resources{Memory: 64 << 20, NanoCPUs: 25e7, Pids: 7}); err != nil {
		t.Fatal(err)
	}
	if err := Create(path, spec.Resources{Memory: 32 << 20, NanoCPUs: 25e7, Pids: 5}); err != nil {
		t.Fatalf("again, with other limits: %v", err)
	}
	u, err := Read(path)
	if err != nil || u.MemoryLimit != 32<<20 || u.PidsLimit != 5 || u.Pids != 0 {
		t.Fatalf("limits: %+v, %v", u, err)
	}
	g, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	sh, err := exec.LookPath("sh")
	if err != nil {
		t.Fatal(err)
	}
	run := func(script string) syscall.WaitStatus {
		goruntime.LockOSThread()
		defer goruntime.UnlockOSThread()
		null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer null.Close()
		pid, err := g.Fork(sh, []string{"sh", "-c", script}, &syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{null.Fd(), null.Fd(), null.Fd()}, Sys: &syscall.SysProcAttr{}})
		if err != nil {
			t.Fatal(err)
		}
		var ws syscall.WaitStatus
		for {
			if _, err := syscall.Wait4(pid, &ws, 0, nil); err != syscall.EINTR {
				return ws
			}
		}
	}
	empty := func() {
		t.Helper()
		for limit := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			if u, _ := Read(path); u.Pids == 0 {
				break
			} else if time.Now().After(limit) {
				t.Fatalf("what was forked does not end: %+v", u)
			}
		}
	}
	if ws := run("grep -q " + path + " /proc/self/cgroup"); ws.ExitStatus() != 0 {
		t.Errorf("the child is not in its group: %v", ws)
	}
	if b, _ := os.ReadFile("/proc/thread-self/cgroup"); strings.Contains(string(b), path) {
		t.Errorf("this thread is still in it: %s", b)
	}
	// dash: "Cannot fork".
	if ws := run("sleep 2 & sleep 2 & sleep 2 & sleep 2 & sleep 2 & sleep 2 & echo all"); ws.ExitStatus() == 0 {
		t.Error("more processes than the limit could be made")
	}
	empty()
	// 128 MiB in one string.
	run("x=$(head -c 134217728 /dev/zero | tr '\\0' x); echo ${#x}")
	if u, _ := Read(path); u.OOMKills == 0 || u.CPU == 0 {
		t.Errorf("nothing was killed at the limit of memory, or no time counted: %+v", u)
	}
	empty() // what the shell left
}
