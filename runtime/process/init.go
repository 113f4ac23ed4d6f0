package process

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"os/user"
	"path/filepath"
	goruntime "runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/runtime"
	"github.com/shoalnet/shoal/runtime/cgroup"
	"github.com/shoalnet/shoal/spec"
)

// defaultPath is Docker's.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// initMain is PID 1 of a task: DIR CGROUP…. File 3 takes the error of a start; it is
// closed when the program runs. File 4 has a byte when it is to, and ends with the shim.
func initMain(args []string) int {
	// Mounts, capabilities and the fork itself belong to one thread.
	goruntime.LockOSThread()
	report := os.NewFile(3, "report")
	fail := func(err error, code int) int {
		_, _ = report.WriteString(err.Error())
		return code
	}
	var cg [3]int // version, files and own ones of the control group: cgroup.Restore
	if len(args) != 1+len(cg) || os.Getpid() != 1 {
		return fail(errors.New("task-init is for the task's shim to start"), 125)
	}
	for i := range cg {
		cg[i], _ = strconv.Atoi(args[1+i])
	}
	group := cgroup.Restore(cg[0], 5, cg[1], cg[2])
	sigs := make(chan os.Signal, 64)
	signal.Notify(sigs)
	signal.Ignore(syscall.SIGTTIN, syscall.SIGTTOU)
	gate := os.NewFile(4, "gate")
	if n, _ := gate.Read(make([]byte, 1)); n == 0 {
		return fail(errors.New("the task's shim is gone"), 125)
	}
	gate.Close()
	var rec record
	if err := readJSON(filepath.Join(args[0], taskFile), &rec); err != nil {
		return fail(err, 125)
	}
	t := rec.Task
	if err := setOOMScore(t.Spec.Resources.OOMScoreAdj); err != nil {
		return fail(err, 125)
	}
	if err := setUp(args[0], rec); err != nil {
		return fail(err, 125)
	}
	p, err := newProgram(t.Spec.Command, environment(t, nil), t.Spec.Dir, t.Spec.User)
	if err != nil {
		return fail(err, exitCodeOf(err))
	}
	if err := errors.Join(dropCapabilities(capabilitySet(keptCapabilities)), filterCalls()); err != nil {
		return fail(err, 125)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return fail(err, 125)
	}
	unix.CloseOnExec(int(report.Fd()))
	p.attr.Files = []uintptr{null.Fd(), 1, 2}
	if t.Spec.Stdin || t.Spec.TTY {
		p.attr.Files[0] = 0
	}
	p.attr.Sys.Setsid = true
	p.attr.Sys.Setctty = t.Spec.TTY
	pid, err := group.Fork(p.path, p.argv, p.attr)
	if err != nil {
		err = p.explain(err)
		return fail(err, exitCodeOf(err))
	}
	group.Close()
	if !t.Spec.TTY {
		// The program's alone: who writes to it hears when it is closed.
		_ = unix.Dup3(int(null.Fd()), 0, unix.O_CLOEXEC)
	}
	report.Close()
	// The output is the program's alone now: when it ends, its readers must see
	// the end even while this process still reaps.
	for s := range sigs {
		if s != syscall.SIGCHLD {
			if sig, ok := s.(syscall.Signal); ok && sig != syscall.SIGURG { // the Go runtime sends itself SIGURG
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
			if got == pid {
				if ws.Signaled() {
					return 128 + int(ws.Signal())
				}
				return ws.ExitStatus()
			}
		}
	}
	return 125
}

// setUp makes the task's view of the machine. It runs in fresh mount, PID, UTS
// and IPC namespaces.
func setUp(dir string, t record) error {
	mount := func(src, target, fs string, flags uintptr) error {
		if err := unix.Mount(src, target, fs, flags, ""); err != nil {
			return fmt.Errorf("mount %s: %w", target, err)
		}
		return nil
	}
	// Slave: mounts of the host still appear here, none of ours there.
	if err := mount("", "/", "", unix.MS_SLAVE|unix.MS_REC); err != nil {
		return err
	}
	content := etcFiles(t.Task)
	if t.Netns != "" {
		// Where that can't be had (no overlayfs in the kernel, or /etc is on two of
		// them already) the agent looks after what is mounted below: keepMounts.
		_ = ownEtc(dir, covered(t.Netns))
	}
	for _, name := range covered(t.Netns) {
		if err := bindFile(dir, "/etc/"+name, content[name]); err != nil {
			return err
		}
	}
	// sysfs shows the network devices of the namespace it is mounted in
	// (sysfs(5)). The control groups below it are kept.
	if t.Netns != "" {
		cgroups := filepath.Join(dir, "cgroup")
		kept := os.Mkdir(cgroups, 0o700) == nil && unix.Mount("/sys/fs/cgroup", cgroups, "", unix.MS_BIND|unix.MS_REC, "") == nil
		if unix.Mount("sysfs", "/sys", "sysfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC|unix.MS_RDONLY, "") == nil && kept {
			_ = unix.Mount(cgroups, "/sys/fs/cgroup", "", unix.MS_MOVE, "")
		}
	}
	// To be read only, as Docker has it: who may write there can freeze other
	// tasks or change the node's devices. Without mount_setattr (Linux 5.12), or
	// where /sys is no mount, there is nothing to do it with, or to.
	err := unix.MountSetattr(unix.AT_FDCWD, "/sys", unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	if err != nil && !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("make /sys read-only: %w", err)
	}
	if err := mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC); err != nil {
		return err
	}
	// What root may write there is the machine's, not the task's. Docker makes
	// the same paths read-only.
	for _, p := range []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"} {
		if err := unix.Mount(p, p, "", unix.MS_BIND|unix.MS_REC, ""); errors.Is(err, unix.ENOENT) {
			continue
		} else if err != nil {
			return fmt.Errorf("mount %s: %w", p, err)
		}
		if err := unix.Mount("", p, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
			return fmt.Errorf("make %s read-only: %w", p, err)
		}
	}
	if err := bindBlobs(t); err != nil {
		return err
	}
	for _, d := range t.Hidden {
		if err := hide(d); err != nil {
			return err
		}
	}
	if err := unix.Sethostname([]byte(t.Hostname)); err != nil {
		return fmt.Errorf("set host name %q: %w", t.Hostname, err)
	}
	return nil
}

// bindFile puts content in the place of a file, for this task only. A link is
// followed, as /etc/resolv.conf often is one.
func bindFile(dir, target string, content []byte) error {
	src := filepath.Join(dir, filepath.Base(target))
	if err := writeEtc(src, content); err != nil {
		return err
	}
	real, err := filepath.EvalSymlinks(target)
	if errors.Is(err, os.ErrNotExist) {
		if target != "/etc/resolv.conf" {
			return nil
		}
		if _, lerr := os.Lstat(target); lerr == nil {
			return fmt.Errorf("%s is a link to a file that does not exist: start the service that makes it, or replace the link by a file", target)
		}
		// A machine without one resolves no names: an empty file changes nothing.
		f, err := os.OpenFile(target, os.O_CREATE|os.O_RDONLY, 0o644)
		if err != nil {
			return fmt.Errorf("%s: %w", target, err)
		}
		f.Close()
		real = target
	} else if err != nil {
		return fmt.Errorf("%s: %w", target, err)
	}
	if err := unix.Mount(src, real, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount %s: %w", target, err)
	}
	return nil
}

// keptCapabilities are Docker's default set. Notably absent: CAP_NET_ADMIN and
// CAP_SYS_ADMIN, with which a task could undo its network.
var keptCapabilities = []uintptr{
	unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_FSETID, unix.CAP_FOWNER, unix.CAP_MKNOD, unix.CAP_NET_RAW, unix.CAP_SETGID,
	unix.CAP_SETUID, unix.CAP_SETFCAP, unix.CAP_SETPCAP, unix.CAP_NET_BIND_SERVICE, unix.CAP_SYS_CHROOT, unix.CAP_KILL, unix.CAP_AUDIT_WRITE,
}

// capabilitySet is a set of capabilities as the kernel shows it.
func capabilitySet(caps []uintptr) (set uint64) {
	for _, c := range caps {
		set |= 1 << c
	}
	return set
}

// boundingSet is what a process and its children can have.
func boundingSet(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, fmt.Errorf("the task has ended: %w", err)
	}
	for l := range strings.Lines(string(b)) {
		if set, ok := strings.CutPrefix(l, "CapBnd:"); ok {
			return strconv.ParseUint(strings.TrimSpace(set), 16, 64)
		}
	}
	return 0, fmt.Errorf("process %d has no bounding set", pid)
}

// dropCapabilities limits what this thread's children can have: what is not in
// the bounding set does not survive an exec (capabilities(7)).
func dropCapabilities(keep uint64) error {
	for c := uintptr(0); c <= 63; c++ {
		if keep&(1<<c) != 0 {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil {
			if errors.Is(err, unix.EINVAL) {
				break // beyond the kernel's last
			}
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	return nil
}

// environment of a task's program, or of a command in the task.
func environment(t runtime.Task, more []string) []string {
	env := []string{"PATH=" + defaultPath, "HOSTNAME=" + t.Hostname}
	env = append(env, t.Spec.Env...)
	return append(env, more...)
}

func lookupEnv(env []string, key string) (string, bool) {
	for i := len(env) - 1; i >= 0; i-- {
		if v, ok := strings.CutPrefix(env[i], key+"="); ok {
			return v, true
		}
	}
	return "", false
}

// program is what is to be executed.
type program struct {
	name, path string
	argv       []string
	attr       *syscall.ProcAttr
}

// newProgram resolves user, directory and path as they are in this process's
// view of the machine.
func newProgram(command, env []string, dir, usr string) (*program, error) {
	command, env, dir, usr = spec.Raws(command), spec.Raws(env), spec.Raw(dir), spec.Raw(usr)
	if len(command) == 0 {
		return nil, errors.New("no command")
	}
	if dir == "" {
		dir = "/"
	}
	cred, home, err := credential(usr)
	if err != nil {
		return nil, err
	}
	if _, ok := lookupEnv(env, "HOME"); !ok {
		env = append(env, "HOME="+home)
	}
	if fi, err := os.Stat(dir); err != nil || !fi.IsDir() {
		return nil, fmt.Errorf("working directory %s is not there", dir)
	}
	path, _ := lookupEnv(env, "PATH")
	p := &program{name: command[0], argv: command}
	p.path, err = lookPath(command[0], path, dir)
	if err != nil {
		return nil, p.explain(err)
	}
	p.attr = &syscall.ProcAttr{Dir: dir, Env: dedup(env), Sys: &syscall.SysProcAttr{Credential: cred}}
	return p, nil
}

// dedup keeps the last value of each variable.
func dedup(env []string) []string {
	last := map[string]int{}
	for i, e := range env {
		k, _, _ := strings.Cut(e, "=")
		last[k] = i
	}
	var out []string
	for i, e := range env {
		if k, _, _ := strings.Cut(e, "="); last[k] == i {
			out = append(out, e)
		}
	}
	return out
}

// errNotFound and errNotExecutable become the exit statuses 127 and 126 that
// shells and Docker use.
var (
	errNotFound      = errors.New("executable file not found in $PATH")
	errNotExecutable = errors.New("permission denied")
)

func exitCodeOf(err error) int {
	switch {
	case errors.Is(err, errNotFound), errors.Is(err, os.ErrNotExist):
		return 127
	case errors.Is(err, errNotExecutable), errors.Is(err, os.ErrPermission), errors.Is(err, syscall.ENOEXEC), errors.Is(err, syscall.EISDIR):
		return 126
	}
	return 125
}

func (p *program) explain(err error) error { return fmt.Errorf("exec %s: %w", p.name, err) }

// lookPath is execvp(3)'s search.
func lookPath(name, path, dir string) (string, error) {
	check := func(f string) error {
		fi, err := os.Stat(f)
		switch {
		case err != nil:
			return err
		case fi.IsDir():
			return syscall.EISDIR
		case fi.Mode()&0o111 == 0:
			return errNotExecutable
		}
		return nil
	}
	if strings.Contains(name, "/") {
		f := name
		if !filepath.IsAbs(f) {
			f = filepath.Join(dir, f)
		}
		var pe *os.PathError
		if err := check(f); errors.As(err, &pe) {
			return "", pe.Err
		} else if err != nil {
			return "", err
		}
		return name, nil
	}
	var denied error
	for _, d := range filepath.SplitList(path) {
		if d == "" {
			d = "."
		}
		f := filepath.Join(d, name)
		if !filepath.IsAbs(f) {
			f = filepath.Join(dir, f)
		}
		switch err := check(f); {
		case err == nil:
			return f, nil
		case errors.Is(err, errNotExecutable):
			denied = err
		}
	}
	if denied != nil {
		return "", denied
	}
	return "", errNotFound
}

// credential resolves USER[:GROUP], names or numbers. Nil is this process's
// own, which is root.
func credential(s string) (*syscall.Credential, string, error) {
	if s == "" {
		return nil, "/root", nil
	}
	name, group, hasGroup := strings.Cut(s, ":")
	c := &syscall.Credential{}
	home := "/"
	u, err := user.Lookup(name)
	if err != nil {
		u, err = user.LookupId(name)
	}
	if err == nil {
		home = u.HomeDir
		uid, _ := strconv.ParseUint(u.Uid, 10, 32)
		gid, _ := strconv.ParseUint(u.Gid, 10, 32)
		c.Uid, c.Gid = uint32(uid), uint32(gid)
		if ids, err := u.GroupIds(); err == nil && !hasGroup {
			for _, id := range ids {
				if n, err := strconv.ParseUint(id, 10, 32); err == nil {
					c.Groups = append(c.Groups, uint32(n))
				}
			}
		}
	} else {
		n, perr := strconv.ParseUint(name, 10, 32)
		if perr != nil {
			return nil, "", fmt.Errorf("user %q is not known on this node", name)
		}
		c.Uid = uint32(n)
	}
	if hasGroup {
		gid := group
		if g, err := user.LookupGroup(group); err == nil {
			gid = g.Gid
		}
		n, err := strconv.ParseUint(gid, 10, 32)
		if err != nil {
			return nil, "", fmt.Errorf("group %q is not known on this node", group)
		}
		c.Gid = uint32(n)
	}
	return c, home, nil
}

// addGroups gives a program further groups, names or numbers, whoever its user is.
func (p *program) addGroups(groups []string) error {
	for _, name := range groups {
		gid := name
		if g, err := user.LookupGroup(name); err == nil {
			gid = g.Gid
		}
		n, err := strconv.ParseUint(gid, 10, 32)
		if err != nil {
			return fmt.Errorf("group %q is not known to the task", name)
		}
		if p.attr.Sys.Credential == nil {
			p.attr.Sys.Credential = &syscall.Credential{}
		}
		p.attr.Sys.Credential.Groups = append(p.attr.Sys.Credential.Groups, uint32(n))
	}
	return nil
}

// ---- exec ----

// execArgs is what the agent tells task-exec, as one line of JSON on file 3.
type execArgs struct {
	Dir     string   `json:"dir"` // the task's
	InitPID int      `json:"init_pid"`
	Command []string `json:"command"`
	Env     []string `json:"env"`
	WorkDir string   `json:"work_dir"`
	User    string   `json:"user"`
	TTY     bool     `json:"tty"`
	Detach  bool     `json:"detach"`
}

// execMain enters a task's namespaces and runs a command there.
func execMain([]string) int {
	// setns(2) is about the thread, and so is what the fork inherits.
	goruntime.LockOSThread()
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, err)
		return exitCodeOf(err)
	}
	var a execArgs
	in := os.NewFile(3, "args")
	unix.CloseOnExec(3)
	if err := readLine(in, &a); err != nil {
		return fail(fmt.Errorf("task-exec is for the agent's use: %w", err))
	}
	var rec record
	if err := readJSON(filepath.Join(a.Dir, taskFile), &rec); err != nil {
		return fail(err)
	}
	t := rec.Task
	group, err := cgroup.Open(rec.Cgroup)
	if err != nil {
		return fail(err)
	}
	// To the end: a command is given the numbers of its files, which the garbage
	// collector closes with the last that holds them.
	defer group.Close()
	if err := setOOMScore(t.Spec.Resources.OOMScoreAdj); err != nil {
		return fail(err)
	}
	// A container has other capabilities than a program of the node, and its commands have
	// those, as in Docker: no more with --cap-drop, no fewer with --cap-add.
	caps := capabilitySet(keptCapabilities)
	if t.Executor != "" {
		if caps, err = boundingSet(a.InitPID); err != nil {
			return fail(err)
		}
	}
	sigs := make(chan os.Signal, 64)
	signal.Notify(sigs)
	if err := enter(a.InitPID); err != nil {
		return fail(err)
	}
	usr := a.User
	if usr == "" {
		usr = t.Spec.User
	}
	dir := a.WorkDir
	if dir == "" {
		dir = t.Spec.Dir
	}
	p, err := newProgram(a.Command, environment(t, a.Env), dir, usr)
	if err != nil {
		return fail(err)
	}
	if err := p.addGroups(t.Spec.Groups); err != nil {
		return fail(err)
	}
	keeps := caps
	if !a.Detach { // what the keeper needs for its own part
		keeps |= capabilitySet(keptCapabilities)
	}
	if err := errors.Join(dropCapabilities(keeps), filterCalls()); err != nil {
		return fail(err)
	}
	p.attr.Files = []uintptr{0, 1, 2}
	p.attr.Sys.Setsid = true
	if a.Detach {
		p.path, p.argv = "/proc/self/exe", append([]string{"shoal", detachWord, p.path}, p.argv...)
	} else {
		// The keeper is none of the task's processes: it has the group for the command.
		files, n := group.Opened()
		k, err := json.Marshal(keep{Credential: p.attr.Sys.Credential, Capabilities: caps, TTY: a.TTY, CgroupVersion: group.Version(), CgroupFiles: len(files), CgroupOwn: n})
		if err != nil {
			return fail(err)
		}
		p.path, p.argv = "/proc/self/exe", append([]string{"shoal", keepWord, string(k), p.path}, p.argv...)
		p.attr.Files = append(p.attr.Files, in.Fd())
		for _, f := range files {
			p.attr.Files = append(p.attr.Files, f.Fd())
		}
		p.attr.Sys.Credential, group = nil, nil
	}
	pid, err := group.Fork(p.path, p.argv, p.attr)
	if err != nil {
		return fail(p.explain(err))
	}
	// The agent holds the other end of file 3 for as long as it wants the
	// command. (A parent-death signal can't cross into the PID namespace: syscall's
	// check for a parent that died meanwhile takes its parent's pid 0 for that.)
	go func() {
		_, _ = in.Read(make([]byte, 1))
		if !a.Detach {
			time.Sleep(2 * keepPatience) // the keeper's part; unless somebody has stopped it
		}
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}()
	done := make(chan syscall.WaitStatus, 1)
	go func() {
		var ws syscall.WaitStatus
		for {
			if _, err := syscall.Wait4(pid, &ws, 0, nil); err != syscall.EINTR {
				done <- ws
				return
			}
		}
	}()
	for {
		select {
		case s := <-sigs:
			if sig, ok := s.(syscall.Signal); ok && sig != syscall.SIGCHLD && sig != syscall.SIGURG {
				_ = syscall.Kill(pid, sig)
			}
		case ws := <-done:
			if ws.Signaled() {
				return 128 + int(ws.Signal())
			}
			return ws.ExitStatus()
		}
	}
}

// detachMain starts a command and leaves it to the task's init. task-exec itself
// could not: a process from outside of the PID namespace leaves its children to
// an init out there (find_new_reaper in kernel/exit.c).
func detachMain(args []string) int {
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, err)
		return exitCodeOf(err)
	}
	if len(args) < 2 {
		return fail(errors.New(detachWord + " is for the agent's use"))
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return fail(err)
	}
	attr := &syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{null.Fd(), null.Fd(), null.Fd()}, Sys: &syscall.SysProcAttr{Setsid: true}}
	if _, err := syscall.ForkExec(args[0], args[1:], attr); err != nil {
		return fail((&program{name: args[1]}).explain(err))
	}
	return 0
}

// enter moves this thread into the namespaces of a process.
func enter(pid int) error {
	fds := map[string]int{}
	kinds := []struct {
		name string
		flag int
	}{{"pid", unix.CLONE_NEWPID}, {"net", unix.CLONE_NEWNET}, {"uts", unix.CLONE_NEWUTS}, {"ipc", unix.CLONE_NEWIPC}, {"mnt", unix.CLONE_NEWNS}}
	for _, k := range kinds {
		fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/%s", pid, k.name), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("the task has ended: %w", err)
		}
		fds[k.name] = fd
	}
	// To enter a mount namespace is to be at its root, which the task need not
	// be: its agent may live in a chroot.
	root, err := unix.Open(fmt.Sprintf("/proc/%d/root", pid), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("the task has ended: root directory: %w", err)
	}
	defer unix.Close(root)
	// A thread that shares its working directory can't change its mount
	// namespace (setns(2)).
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	for _, k := range kinds {
		if err := unix.Setns(fds[k.name], k.flag); err != nil {
			return fmt.Errorf("enter the task's %s namespace: %w", k.name, err)
		}
		unix.Close(fds[k.name])
	}
	if err := unix.Fchdir(root); err != nil {
		return fmt.Errorf("enter the task's root directory: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("enter the task's root directory: %w", err)
	}
	return unix.Chdir("/")
}
