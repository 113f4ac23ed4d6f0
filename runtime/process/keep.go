package process

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	goruntime "runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/internal/proc"
	"github.com/shoalnet/shoal/runtime/cgroup"
)

// keep is what task-keep is told besides the command.
type keep struct {
	Credential *syscall.Credential `json:"credential,omitempty"`
	// Capabilities are the most that the command can have; the keeper may have more.
	Capabilities uint64 `json:"capabilities"`
	TTY          bool   `json:"tty,omitempty"`
	// The files of the command's control group (cgroup.Restore), from file 4 on.
	CgroupVersion int `json:"cgroup_version,omitempty"`
	CgroupFiles   int `json:"cgroup_files,omitempty"`
	CgroupOwn     int `json:"cgroup_own,omitempty"`
}

// keepPatience bounds the killing of a command's processes.
const keepPatience = 5 * time.Second

// keepMain runs a command inside of the task's namespaces and, when whoever wants
// it is gone (the other end of file 3 is closed), kills it with all that comes from
// it: KEEP PATH ARGV.... As a child subreaper (prctl(2)) it becomes the parent of
// each process whose own has ended, also of one in a session of its own, so that
// nothing escapes. task-exec could not be that: it is not in the PID namespace.
// What a command that has ended by itself leaves behind goes on, as in Docker.
func keepMain(args []string) int {
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, err)
		return exitCodeOf(err)
	}
	var k keep
	if len(args) < 3 {
		return fail(errors.New(keepWord + " is for the agent's use"))
	}
	if err := json.Unmarshal([]byte(args[0]), &k); err != nil {
		return fail(err)
	}
	unix.CloseOnExec(3)
	goruntime.LockOSThread() // for the fork
	group := cgroup.Restore(k.CgroupVersion, 4, k.CgroupFiles, k.CgroupOwn)
	sigs := make(chan os.Signal, 64)
	signal.Notify(sigs)
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fail(fmt.Errorf("subreaper: %w", err))
	}
	if err := dropCapabilities(k.Capabilities); err != nil { // this thread's, of which the command comes
		return fail(err)
	}
	attr := &syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{0, 1, 2}, Sys: &syscall.SysProcAttr{Setsid: true, Setctty: k.TTY, Credential: k.Credential}}
	pid, err := group.Fork(args[1], args[2:], attr)
	if err != nil {
		return fail((&program{name: args[2]}).explain(err))
	}
	group.Close()
	// The output is the command's alone: when all that writes to it has ended, its
	// readers see the end.
	if null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0); err == nil {
		for fd := range 3 {
			_ = unix.Dup3(int(null.Fd()), fd, 0)
		}
	}
	left := make(chan struct{})
	go func() {
		_, _ = os.NewFile(3, "wanted").Read(make([]byte, 1))
		close(left)
	}()
	for {
		select {
		case <-left:
			killChildren()
			return 128 + int(syscall.SIGKILL)
		case s := <-sigs:
			if sig, ok := s.(syscall.Signal); ok && sig != syscall.SIGCHLD {
				if sig != syscall.SIGURG {
					_ = syscall.Kill(pid, sig)
				}
				continue
			}
			for {
				var ws syscall.WaitStatus
				got, err := syscall.Wait4(-1, &ws, syscall.WNOHANG, nil)
				if err == syscall.EINTR {
					continue
				}
				if err != nil || got <= 0 {
					break
				}
				if got == pid && ws.Signaled() {
					return 128 + int(ws.Signal())
				} else if got == pid {
					return ws.ExitStatus()
				}
			}
		}
	}
}

// killChildren kills the children of this process, and theirs, which become its
// own then, until none is left.
func killChildren() {
	self := os.Getpid()
	for deadline := time.Now().Add(keepPatience); time.Now().Before(deadline); {
		pids, err := proc.PIDs()
		if err != nil {
			return
		}
		for _, p := range pids {
			if parentOf(p) == self {
				_ = syscall.Kill(p, syscall.SIGKILL)
			}
		}
		for {
			got, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil)
			if err == syscall.ECHILD {
				return
			}
			if err != syscall.EINTR && (err != nil || got <= 0) {
				break
			}
		}
		time.Sleep(time.Millisecond)
	}
}
