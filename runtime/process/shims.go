package process

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/internal/durable"
	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/internal/proc"
	"github.com/shoalnet/shoal/runtime"
)

// A shim is known by its command line, task-shim DIR SOCKET, also when both are gone
// from the disk: it holds the task all the same. That is how tasks on the node's own
// network are found, too, which have no namespace with a name.

// mendSignal asks a shim for its socket, and the file of its output, anew. Those of
// earlier versions ignore it, as every Go program does.
const mendSignal = syscall.SIGUSR1

// shims finds the living shims of this Runtime, by task ID: those whose socket is in
// its RunDir, and whose directory is in its StateDir, or nowhere any more. What runs in
// another container, or under another root, is another's, whatever its paths are.
func (r *Runtime) shims() map[string]int {
	r.shimMu.Lock()
	defer r.shimMu.Unlock()
	if time.Since(r.shimsAt) < time.Second && r.shimPIDs != nil {
		return r.shimPIDs
	}
	r.shimPIDs, r.shimsAt = r.findShims(), time.Now()
	return r.shimPIDs
}

func (r *Runtime) findShims() map[string]int {
	out := map[string]int{}
	pids, err := proc.PIDs()
	if err != nil {
		r.log.Warn("processes can't be listed: tasks that lost their files are not found", "error", err)
		return out
	}
	self, _ := os.Readlink("/proc/self/ns/pid")
	root, _ := os.Stat("/proc/self/root/.")
	for _, pid := range pids {
		id := r.shimOf(pid)
		if id == "" {
			continue
		}
		at := "/proc/" + strconv.Itoa(pid)
		ns, err := os.Readlink(at + "/ns/pid")
		its, rerr := os.Stat(at + "/root/.")
		if err == nil && rerr == nil && ns == self && os.SameFile(its, root) {
			out[id] = pid
		}
	}
	return out
}

// shimOf is the ID of the task that a process is the shim of, by its command line; ""
// when it is none of ours.
func (r *Runtime) shimOf(pid int) string {
	args := proc.Args(pid)
	n := len(args)
	if n < 4 || args[n-3] != shimWord {
		return ""
	}
	dir, socket := args[n-2], args[n-1]
	id := filepath.Base(dir)
	if validID(id) != nil || socket != r.socket(id) {
		return ""
	}
	if _, err := os.Lstat(dir); dir != r.taskDir(id) && !errors.Is(err, os.ErrNotExist) {
		return ""
	}
	return id
}

// dial connects to a task's shim, which is asked for another socket if the one that
// it had is gone.
func (r *Runtime) dial(id string) (*net.UnixConn, error) {
	c, err := dialShim(r.socket(id))
	if err == nil || !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ECONNREFUSED) && !errors.Is(err, unix.ENOTSOCK) && !errors.Is(err, unix.EPROTOTYPE) {
		return c, err
	}
	pid, ok := r.shims()[id]
	if !ok || r.shimOf(pid) != id {
		return nil, err
	}
	r.log.Warn("a task's shim has lost its socket: asking for another", "task", id, "shim", pid)
	if serr := syscall.Kill(pid, mendSignal); serr != nil {
		return nil, err
	}
	for end := time.Now().Add(callTimeout); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if c, err = dialShim(r.socket(id)); err == nil {
			return c, nil
		}
		if r.shimOf(pid) != id {
			return nil, err
		}
	}
	// One of an earlier version: better ended than running unknown. Its program ends
	// with it.
	r.log.Error("a task's shim has lost its socket and makes no other: ending the task", "task", id, "shim", pid)
	if r.shimOf(pid) == id {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	for end := time.Now().Add(callTimeout); r.shimOf(pid) == id && time.Now().Before(end); {
		time.Sleep(5 * time.Millisecond)
	}
	return nil, err
}

// call asks a task's shim one thing.
func (r *Runtime) call(id string, req request, timeout time.Duration) (response, []*os.File, error) {
	c, err := r.dial(id)
	if err != nil {
		return response{}, nil, err
	}
	return callOn(c, req, timeout)
}

// readRecord reads what taskFile says of a task.
func (r *Runtime) readRecord(id string) (runtime.Task, error) {
	var t runtime.Task
	err := readJSON(filepath.Join(r.taskDir(id), taskFile), &t)
	if err == nil && t.ID != id {
		err = fmt.Errorf("%s is not of this task", filepath.Join(r.taskDir(id), taskFile))
	}
	return t, err
}

// recoverRecord writes a task's record again, which its shim still has.
func (r *Runtime) recoverRecord(id string) (runtime.Task, error) {
	_, files, err := r.call(id, request{Op: "record"}, callTimeout)
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	if err != nil {
		return runtime.Task{}, err
	}
	if len(files) != 1 {
		return runtime.Task{}, fmt.Errorf("shim sent %d files, want 1", len(files))
	}
	b, err := io.ReadAll(io.NewSectionReader(files[0], 0, maxLine))
	if err != nil {
		return runtime.Task{}, err
	}
	if err := durable.MkdirAll(r.taskDir(id)); err != nil {
		return runtime.Task{}, err
	}
	if err := writeBytes(filepath.Join(r.taskDir(id), taskFile), b); err != nil {
		return runtime.Task{}, err
	}
	if pid, ok := r.shims()[id]; ok && r.shimOf(pid) == id && !exists(filepath.Join(r.taskDir(id), logFile)) {
		_ = syscall.Kill(pid, mendSignal) // its output went with the directory
	}
	return r.readRecord(id)
}

// sweepNamespaces removes the namespaces of this instance's tasks in which no process is, and
// which are of no known task: what is left of tasks whose shim and record both are gone.
func (r *Runtime) sweepNamespaces() error {
	if r.cfg.Instance == "" {
		return nil
	}
	names, err := nl.List(r.cfg.Instance + "-task-")
	if err != nil || len(names) == 0 {
		return err
	}
	r.mu.Lock()
	names = slices.DeleteFunc(names, func(n string) bool {
		for _, e := range r.tasks {
			if e.status.Sandbox.Netns == n {
				return true
			}
		}
		return false
	})
	r.mu.Unlock()
	if len(names) == 0 {
		return nil
	}
	used := map[string]bool{} // namespaces with a process, as nsfs names them
	pids, err := proc.PIDs()
	if err != nil {
		return err
	}
	for _, pid := range pids {
		if l, err := os.Readlink("/proc/" + strconv.Itoa(pid) + "/ns/net"); err == nil {
			used[l] = true
		}
	}
	var errs []error
	for _, n := range names {
		fi, err := os.Stat(nl.Path(n))
		if err != nil {
			continue
		}
		if st, ok := fi.Sys().(*syscall.Stat_t); !ok || used[fmt.Sprintf("net:[%d]", st.Ino)] {
			continue
		}
		r.log.Warn("clearing away the namespace of a task that is in no file", "netns", n)
		errs = append(errs, nl.Remove(n))
	}
	return errors.Join(errs...)
}

// ---- the shim's side ----

// listen opens the shim's socket.
func (s *shim) listen() (*net.UnixListener, error) {
	if err := durable.MkdirAll(filepath.Dir(s.socket)); err != nil {
		return nil, err
	}
	_ = os.RemoveAll(s.socket) // whatever it is by now
	old := unix.Umask(0o177)
	ln, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: s.socket, Net: "unixpacket"})
	unix.Umask(old)
	if err == nil {
		ln.SetUnlinkOnClose(false) // by then the name may be another's
	}
	return ln, err
}

// accept serves a socket until it is closed.
func (s *shim) accept(ln *net.UnixListener) {
	for {
		c, err := ln.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(50 * time.Millisecond) // no more files, for now
			continue
		}
		go s.serve(c)
	}
}

// mend makes the socket and the file of the output anew for each signal: the names
// that they had are gone, or the agent would not ask.
func (s *shim) mend(ln *net.UnixListener, asked <-chan os.Signal) {
	mine, _ := os.Lstat(s.socket)
	for range asked {
		s.log.found()
		if now, err := os.Lstat(s.socket); err == nil && mine != nil && os.SameFile(now, mine) {
			continue // whoever has just connected to it must not lose that
		}
		// The agent asks again if this fails.
		if next, err := s.listen(); err == nil {
			mine, _ = os.Lstat(s.socket)
			ln.Close()
			ln = next
			go s.accept(ln)
		}
	}
}

// recordFile is a file, in memory only, with the task's record as it was read.
func (s *shim) recordFile() (*os.File, error) {
	fd, err := unix.MemfdCreate("record", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "record")
	if _, err := io.Copy(f, bytes.NewReader(s.record)); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
