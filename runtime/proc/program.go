package proc

import (
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/runtime"
)

// defaultPath is Docker's.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// keptCapabilities are Docker's default set. Notably absent: CAP_NET_ADMIN and
// CAP_SYS_ADMIN, with which a task could undo its network.
var keptCapabilities = []uintptr{
	unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_FSETID, unix.CAP_FOWNER, unix.CAP_MKNOD, unix.CAP_NET_RAW, unix.CAP_SETGID,
	unix.CAP_SETUID, unix.CAP_SETFCAP, unix.CAP_SETPCAP, unix.CAP_NET_BIND_SERVICE, unix.CAP_SYS_CHROOT, unix.CAP_KILL, unix.CAP_AUDIT_WRITE,
}

// dropCapabilities limits what this thread's children can have to Docker's
// set: what is not in the bounding set does not survive an exec, and neither
// the inheritable nor the ambient set adds to it (capabilities(7); Docker's
// inheritable set is empty since CVE-2022-24769). The thread itself keeps what
// it has.
func dropCapabilities() error {
	keep := map[uintptr]bool{}
	for _, c := range keptCapabilities {
		keep[c] = true
	}
	for c := uintptr(0); c <= 63; c++ {
		if keep[c] {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0); err != nil {
			if errors.Is(err, unix.EINVAL) {
				break // beyond the kernel's last
			}
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("clear ambient capabilities: %w", err)
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	data[0].Inheritable, data[1].Inheritable = 0, 0
	if err := unix.Capset(&hdr, &data[0]); err != nil {
		return fmt.Errorf("clear inheritable capabilities: %w", err)
	}
	return nil
}

// environment of a task's program, or of a command in the task: Docker's
// variables, and what is asked for.
func environment(t runtime.Task, more []string, tty bool) []string {
	env := []string{"PATH=" + defaultPath, "HOSTNAME=" + t.Hostname}
	if tty {
		env = append(env, "TERM=xterm")
	}
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
	if !filepath.IsAbs(dir) {
		return nil, fmt.Errorf("working directory %s: use an absolute path", dir)
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
	p.attr = &syscall.ProcAttr{Dir: dir, Env: dedup(env), Sys: &syscall.SysProcAttr{Credential: cred, Setsid: true}}
	return p, nil
}

// start forks and executes the program, with Docker's capabilities, and returns
// its pid in this process's numbering. The thread must be locked, and is not
// good for anything else afterwards.
func (p *program) start() (int, error) {
	// What the program can open by name (/dev/stdout) it must be allowed to:
	// pipes and terminals are given to its user, as runc does.
	for _, fd := range p.attr.Files {
		giveTo(int(fd), int(p.attr.Sys.Credential.Uid))
	}
	if err := dropCapabilities(); err != nil {
		return 0, err
	}
	pid, err := syscall.ForkExec(p.path, p.argv, p.attr)
	if err != nil {
		return 0, p.explain(err)
	}
	return pid, nil
}

// giveTo changes the owner of a pipe or a terminal. Files stay their owner's.
func giveTo(fd, uid int) {
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil || int(st.Uid) == uid {
		return
	}
	// Terminals of devpts have majors 136 to 143 (Documentation/admin-guide/devices.txt).
	major := unix.Major(st.Rdev)
	if st.Mode&unix.S_IFMT == unix.S_IFIFO || st.Mode&unix.S_IFMT == unix.S_IFCHR && major >= 136 && major <= 143 {
		_ = unix.Fchown(fd, uid, -1)
	}
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

// credential resolves USER[:GROUP], names or numbers, as they are on this
// node; empty is root. A group that is named is the only one.
func credential(s string) (_ *syscall.Credential, home string, _ error) {
	if s == "" {
		s = "0"
	}
	name, group, hasGroup := strings.Cut(s, ":")
	if name == "" || hasGroup && group == "" {
		return nil, "", fmt.Errorf("user %q: want USER or USER:GROUP", s)
	}
	c, home := &syscall.Credential{}, "/"
	u, err := user.Lookup(name)
	if err != nil {
		u, err = user.LookupId(name)
	}
	if err == nil {
		uid, err1 := parseID(u.Uid)
		gid, err2 := parseID(u.Gid)
		if err := errors.Join(err1, err2); err != nil {
			return nil, "", fmt.Errorf("user %q: %w", name, err)
		}
		c.Uid, c.Gid, home = uid, gid, u.HomeDir
		if ids, err := u.GroupIds(); err == nil && !hasGroup {
			for _, s := range ids {
				if id, err := parseID(s); err == nil {
					c.Groups = append(c.Groups, id)
				}
			}
		}
	} else if c.Uid, err = parseID(name); err != nil {
		return nil, "", fmt.Errorf("user %q is not known on this node", name)
	}
	if hasGroup {
		if g, err := user.LookupGroup(group); err == nil {
			group = g.Gid
		}
		if c.Gid, err = parseID(group); err != nil {
			return nil, "", fmt.Errorf("group %q is not known on this node", group)
		}
	}
	return c, home, nil
}

// parseID reads a user or group number. The highest means "no change" to
// setresuid(2), and would leave root.
func parseID(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 32)
	if err == nil && n == 1<<32-1 {
		err = errors.New("4294967295 is no user")
	}
	return uint32(n), err
}

// ParseSignal reads SIGTERM, TERM or 15.
func ParseSignal(s string) (syscall.Signal, error) {
	if s == "" {
		return syscall.SIGTERM, nil
	}
	if n, err := strconv.Atoi(s); err == nil && n > 0 && n < 65 {
		return syscall.Signal(n), nil
	}
	name := strings.ToUpper(s)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	if n := unix.SignalNum(name); n != 0 {
		return n, nil
	}
	return 0, fmt.Errorf("signal %q is unknown: use a name like SIGTERM or a number", s)
}
