package process

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/runtime"
)

// mountsPeriod is how often the runtime looks whether the node's /etc has changed,
// or a directory in which one is that tasks find empty; sweepEvery of these are
// between two looks at every mount of every task whatever seems to have changed.
const (
	mountsPeriod = time.Second
	sweepEvery   = 10
)

// keepMounts sees to it that running tasks have their own files and none of the
// agent's, until the runtime is closed. With an /etc of their own (see ownEtc)
// only the hidden directories can be taken from them; tasks of older agents, tasks in
// the node's own namespace, and all on a kernel without overlays, can lose any.
func (r *Runtime) keepMounts() {
	tick := time.NewTicker(mountsPeriod)
	defer tick.Stop()
	var seen stamp
	said := false
	for n := 0; ; n++ {
		select {
		case <-r.ctx.Done():
			return
		case <-tick.C:
		case <-r.mountsDue:
			n = 0
		}
		tasks := r.inhabited()
		if len(tasks) == 0 {
			seen = nil
			continue
		}
		etc := seen.changed("/etc", r.cfg.Hidden)
		if etc {
			seen = takeStamp("/etc", r.cfg.Hidden)
		}
		if !etc && n%sweepEvery != 0 {
			continue
		}
		for _, t := range tasks {
			if r.ctx.Err() != nil {
				return
			}
			if etc && !refresh(t.initPID) && t.netns != "" && !said {
				said = true
				r.log.Info("tasks share this node's /etc, because they were started by an older version, or the kernel has no overlayfs: their own resolv.conf and hosts are given back within seconds when the node replaces its own", "task", t.name)
			}
			r.mendMounts(t)
		}
	}
}

// inhabitant is a running task as keepMounts needs it.
type inhabitant struct {
	id, name, netns string
	initPID         int
	e               *entry
}

func (r *Runtime) inhabited() []inhabitant {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []inhabitant
	for id, e := range r.tasks {
		if e.status.State == runtime.Running && e.initPID > 0 && !e.foreign {
			out = append(out, inhabitant{id, e.status.Name, e.status.Sandbox.Netns, e.initPID, e})
		}
	}
	return out
}

// stamp is when each directory of a tree, and each directory that has one of the
// hidden ones, last had an entry come or go.
type stamp map[string]changedAt

type changedAt struct {
	dev, ino uint64
	ctime    unix.Timespec
}

func at(dir string) changedAt {
	var st unix.Stat_t
	if unix.Stat(dir, &st) != nil {
		return changedAt{}
	}
	return changedAt{uint64(st.Dev), st.Ino, st.Ctim}
}

func takeStamp(tree string, hidden []string) stamp {
	s := stamp{}
	_ = filepath.WalkDir(tree, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			s[p] = at(p)
		}
		return nil
	})
	for _, h := range hidden {
		// Not its own time: the agent's files come and go in there.
		c := at(h)
		c.ctime = unix.Timespec{}
		s[h] = c
	}
	return s
}

func (s stamp) changed(tree string, hidden []string) bool {
	if s == nil {
		return true
	}
	for p, was := range s {
		is := at(p)
		if slices.Contains(hidden, p) {
			is.ctime = unix.Timespec{}
		}
		if is != was {
			return true
		}
	}
	return false
}

// refresh has the overlay at a task's /etc look again at what the node has there.
// It tells whether there is one.
func refresh(initPID int) bool {
	path := fmt.Sprintf("/proc/%d/root/etc", initPID)
	var st unix.Statfs_t
	if unix.Statfs(path, &st) != nil || st.Type != unix.OVERLAYFS_SUPER_MAGIC {
		return false
	}
	// Only of the root of a mount (fspick(2)), so that a node whose own root is an
	// overlay is left alone.
	fd, err := unix.Fspick(unix.AT_FDCWD, path, unix.FSPICK_CLOEXEC)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	return unix.FsconfigReconfigure(fd) == nil
}

// missing lists the files that a task should have of its own and has not, and the
// directories that it should not see and does.
func (r *Runtime) missing(t inhabitant) (files, dirs []string, err error) {
	root, err := unix.Open(fmt.Sprintf("/proc/%d/root", t.initPID), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	defer unix.Close(root)
	stat := func(path string) (st unix.Stat_t, ok bool) {
		// Links lead to where they do in the task.
		fd, err := unix.Openat2(root, path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT})
		if err != nil {
			return st, false
		}
		defer unix.Close(fd)
		return st, unix.Fstat(fd, &st) == nil
	}
	for _, name := range covered(t.netns) {
		var own unix.Stat_t
		if unix.Stat(filepath.Join(r.taskDir(t.id), name), &own) != nil {
			continue
		}
		has, ok := stat("/etc/" + name)
		if !ok && name != "resolv.conf" {
			continue // the node need not have one: then there is nothing to put it on
		}
		if !ok || has.Dev != own.Dev || has.Ino != own.Ino {
			files = append(files, name)
		}
	}
	for _, d := range r.cfg.Hidden {
		var own unix.Stat_t
		if unix.Stat(d, &own) != nil {
			continue
		}
		if has, ok := stat(d); ok && has.Dev == own.Dev && has.Ino == own.Ino {
			dirs = append(dirs, d)
		}
	}
	return files, dirs, nil
}

// mendMounts gives a task back what it has lost, or says so in its status.
func (r *Runtime) mendMounts(t inhabitant) {
	files, dirs, err := r.missing(t)
	if err != nil {
		return // it is ending
	}
	fault := ""
	if lost := append(slices.Clone(files), dirs...); len(lost) > 0 {
		if err := r.mountAgain(t, files, dirs); err != nil {
			if files, dirs, serr := r.missing(t); serr != nil || len(files)+len(dirs) == 0 {
				return // it is ending
			}
			fault = fmt.Sprintf("the node's %s took the place of the task's own: %v: restart the task", strings.Join(lost, ", "), err)
		} else {
			r.log.Info("gave a task back what the node's programs had replaced", "task", t.name, "files", strings.Join(lost, ", "))
		}
	}
	r.mu.Lock()
	t.e.fault = fault
	r.mu.Unlock()
}

// Faults implements runtime.Runtime.
func (r *Runtime) Faults() map[string]string {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := map[string]string{}
	for _, e := range r.tasks {
		if e.fault != "" && e.status.State == runtime.Running {
			out[e.status.Name] = e.fault
		}
	}
	return out
}

// mendArgs is what the runtime tells task-mend, as one line of JSON on file 3.
// The files follow, as mounts that are at no place yet.
type mendArgs struct {
	InitPID int      `json:"init_pid"`
	Files   []string `json:"files,omitempty"`  // below /etc
	Hidden  []string `json:"hidden,omitempty"` // directories
}

const mendWait = 10 * time.Second

func (r *Runtime) mountAgain(t inhabitant, files, dirs []string) error {
	ctx, cancel := context.WithTimeout(r.ctx, mendWait)
	defer cancel()
	args, err := json.Marshal(mendArgs{InitPID: t.initPID, Files: files, Hidden: dirs})
	if err != nil {
		return err
	}
	pr, pw, err := os.Pipe()
	if err != nil {
		return err
	}
	defer pr.Close()
	cmd := exec.CommandContext(ctx, r.cfg.Exe[0], append(slices.Clone(r.cfg.Exe[1:]), mendWord)...)
	cmd.ExtraFiles = []*os.File{pr}
	for _, n := range files {
		// The task can't see its directory: it is one of those that are hidden.
		fd, err := unix.OpenTree(unix.AT_FDCWD, filepath.Join(r.taskDir(t.id), n), unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		if err != nil {
			pw.Close()
			return fmt.Errorf("%s: %w", n, err)
		}
		f := os.NewFile(uintptr(fd), n)
		defer f.Close()
		cmd.ExtraFiles = append(cmd.ExtraFiles, f)
	}
	// Less than a pipe holds, so that it needs nobody to read.
	_, err = pw.Write(append(args, '\n'))
	pw.Close()
	if err != nil {
		return err
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	out, err := cmd.CombinedOutput()
	if s := strings.TrimSpace(string(out)); s != "" {
		return errors.New(s)
	}
	return err
}

// mountOver mounts a file that is at no place yet on another. Nothing can be mounted on one
// that was deleted (dont_mount in vfs_unlink): a mount of such a file goes before.
func mountOver(fd int, path string) error {
	over := func() error {
		return unix.MoveMount(fd, "", unix.AT_FDCWD, path, unix.MOVE_MOUNT_F_EMPTY_PATH)
	}
	err := over()
	var st unix.Stat_t
	if errors.Is(err, unix.ENOENT) && unix.Stat(path, &st) == nil && st.Nlink == 0 {
		if err = unix.Unmount(path, unix.MNT_DETACH); err == nil {
			err = over()
		}
	}
	return err
}

// mendMain enters a task's namespaces and mounts what it has lost there.
func mendMain([]string) int {
	goruntime.LockOSThread()
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	var a mendArgs
	if err := readLine(os.NewFile(3, "args"), &a); err != nil {
		return fail(fmt.Errorf("%s is for the agent's use: %w", mendWord, err))
	}
	if err := enter(a.InitPID); err != nil {
		return fail(err)
	}
	var errs []error
	for i, n := range a.Files {
		target := "/etc/" + n
		real, err := filepath.EvalSymlinks(target)
		if errors.Is(err, os.ErrNotExist) {
			// The node has none any more, where the task's is to be mounted.
			var f *os.File
			if f, err = os.OpenFile(target, os.O_CREATE|os.O_RDONLY, 0o644); err == nil {
				f.Close()
				real, err = filepath.EvalSymlinks(target)
			}
		}
		if err == nil {
			err = mountOver(4+i, real)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("mount %s: %w", target, err))
		}
	}
	for _, d := range a.Hidden {
		errs = append(errs, hide(d))
	}
	if err := errors.Join(errs...); err != nil {
		return fail(err)
	}
	return 0
}
