package proc

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	goruntime "runtime"
	"runtime/debug"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/runtime"
)

// initPeerFD is a socket to the shim: its go in, an initReport out; its end is
// the shim's end.
const initPeerFD = 3

// initReport is the only word of task-init. Without an error it comes with the
// program's pid as credentials, which the kernel translates for the shim.
type initReport struct {
	Err string `json:"err,omitempty"`
}

// initMain is PID 1 of a task: DIR.
func initMain(args []string) int {
	// Mounts, capabilities and the fork itself belong to one thread.
	goruntime.LockOSThread()
	unix.CloseOnExec(initPeerFD)
	peer, err := unixConn(os.NewFile(initPeerFD, "shim"))
	if err != nil || len(args) != 1 || os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, initWord+" is for the task's shim to start")
		return 125
	}
	goruntime.GOMAXPROCS(1)
	debug.SetGCPercent(20)
	// All that can be caught is: what is passed on, and what the shim ignores
	// and the program must not inherit as ignored.
	sigs := make(chan os.Signal, 64)
	signal.Notify(sigs)
	var v struct{}
	if _, err := receive(peer, &v); err != nil {
		return 125
	}
	go func() {
		_, _ = receive(peer, &v)
		os.Exit(125) // and with PID 1 goes the namespace
	}()
	fail := func(err error, code int) int {
		_ = send(peer, initReport{Err: err.Error()})
		return code
	}
	var t runtime.Task
	if err := readJSON(filepath.Join(args[0], taskFile), &t); err != nil {
		return fail(err, 125)
	}
	keep, err := setUp(args[0], t)
	if err != nil {
		return fail(err, 125)
	}
	p, err := newProgram(t.Spec.Command, environment(t, nil, false), t.Spec.Dir, t.Spec.User)
	if err != nil {
		return fail(err, exitCodeOf(err))
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return fail(err, 125)
	}
	p.attr.Files = []uintptr{null.Fd(), 1, 2}
	pid, err := p.start()
	if err != nil {
		return fail(err, exitCodeOf(err))
	}
	null.Close()
	// A failure to send is the end of the shim, which ends this, too.
	_ = sendControl(peer, initReport{}, unix.UnixCredentials(&unix.Ucred{Pid: int32(pid)}))
	go keep()
	go func() {
		for s := range sigs {
			// SIGURG is the Go runtime's own, to preempt goroutines.
			if sig, ok := s.(syscall.Signal); ok && sig != syscall.SIGCHLD && sig != syscall.SIGURG {
				_ = syscall.Kill(pid, sig)
			}
		}
	}()
	return reap(pid)
}

// reap waits for all children, inherited ones included, until pid has ended,
// and returns its exit status as shells count. Until this process exits, nobody
// can get pid anew but a child of this namespace, after which the signals that
// could reach it come from a task that is ending anyway.
func reap(pid int) int {
	for {
		var ws syscall.WaitStatus
		got, err := syscall.Wait4(-1, &ws, 0, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			return 125
		case got == pid && ws.Signaled():
			return 128 + int(ws.Signal())
		case got == pid:
			return ws.ExitStatus()
		}
	}
}

// setUp makes the task's view of the machine, in fresh mount, PID, UTS and IPC
// namespaces. The function it returns keeps it so, and never returns.
func setUp(dir string, t runtime.Task) (keep func(), err error) {
	mount := func(src, target, fs string, flags uintptr, data string) error {
		if err := unix.Mount(src, target, fs, flags, data); err != nil {
			return fmt.Errorf("mount %s: %w", target, err)
		}
		return nil
	}
	// Slave: mounts of the host still appear and disappear here, none of ours
	// there. Private would hold on to what the host unmounts, such as the
	// network namespaces of other tasks.
	if err := mount("", "/", "", unix.MS_SLAVE|unix.MS_REC, ""); err != nil {
		return nil, err
	}
	files := []etcFile{
		{target: "/etc/resolv.conf", content: t.ResolvConf, needed: true},
		{target: "/etc/hosts", content: t.Hosts},
		{target: "/etc/hostname", content: []byte(t.Hostname + "\n")},
	}
	for i := range files {
		if err := files[i].make(dir); err != nil {
			return nil, err
		}
	}
	watch, err := newEtcWatch(files)
	if err != nil {
		return nil, err
	}
	if err := mountSys(dir); err != nil {
		return nil, err
	}
	// Shared memory and message queues by name belong to the IPC namespace in
	// the mind of who uses them (shm_open(3), mq_overview(7)).
	if exists("/dev/shm") {
		if err := mount("shm", "/dev/shm", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=1777"); err != nil {
			return nil, err
		}
	}
	if exists("/dev/mqueue") {
		_ = unix.Mount("mqueue", "/dev/mqueue", "mqueue", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "") // not in every kernel
	}
	if err := mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return nil, err
	}
	// What root may write there is the machine's, not the task's; net.* would be
	// the task's network namespace, where uid 0 needs no CAP_NET_ADMIN for it.
	// Docker makes the same paths read-only.
	for _, p := range []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"} {
		if !exists(p) {
			continue
		}
		if err := mount(p, p, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return nil, err
		}
		if err := mount("", p, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
			return nil, err
		}
	}
	if err := unix.Sethostname([]byte(t.Hostname)); err != nil {
		return nil, fmt.Errorf("set host name %q: %w", t.Hostname, err)
	}
	return watch, nil
}

// mountSys makes /sys show the network devices of the task (a sysfs is of the
// network namespace that mounts it), read-only as Docker has it. The control
// groups below it are kept if they can be made read-only, too: otherwise root
// in the task could freeze its neighbours.
func mountSys(dir string) error {
	const cgroups = "/sys/fs/cgroup"
	aside := filepath.Join(dir, "cgroup")
	kept := false
	if exists(cgroups) && os.Mkdir(aside, 0o700) == nil {
		if unix.Mount(cgroups, aside, "", unix.MS_BIND|unix.MS_REC, "") == nil {
			// mount_setattr(2), Linux 5.12.
			kept = unix.MountSetattr(unix.AT_FDCWD, aside, unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}) == nil
		}
	}
	if err := unix.Mount("sysfs", "/sys", "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC|unix.MS_RDONLY, ""); err != nil {
		return fmt.Errorf("mount /sys: %w", err)
	}
	if kept && unix.Mount(aside, cgroups, "", unix.MS_MOVE, "") == nil {
		return nil
	}
	_ = unix.Unmount(aside, unix.MNT_DETACH)
	return nil
}
