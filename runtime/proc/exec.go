package proc

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/runtime"
)

// execPeerFD is task-exec's socket to the agent: execArgs in, then
// execControls; its end means that nobody wants the command any more.
const execPeerFD = 3

type execArgs struct {
	Dir     string   `json:"dir"` // the task's directory
	Init    procID   `json:"init"`
	Cgroup  string   `json:"cgroup,omitempty"`
	Command []string `json:"command"`
	Env     []string `json:"env,omitempty"`
	WorkDir string   `json:"work_dir,omitempty"`
	User    string   `json:"user,omitempty"`
	TTY     bool     `json:"tty,omitempty"`
}

type execControl struct {
	Signal int `json:"signal"`
}

// hangupGrace is the time between SIGHUP and SIGKILL for a command whose
// caller has gone. It is shorter than the agent's patience, execWaitDelay.
const (
	hangupGrace   = 500 * time.Millisecond
	execWaitDelay = 3 * time.Second
)

// execMain enters a task's namespaces and runs a command there, as a child:
// only children enter a PID namespace (setns(2)).
func execMain([]string) int {
	// The namespaces are this thread's. Other goroutines stay outside, and see
	// the host's /proc.
	goruntime.LockOSThread()
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, err)
		return exitCodeOf(err)
	}
	unix.CloseOnExec(execPeerFD)
	var a execArgs
	peer, err := unixConn(os.NewFile(execPeerFD, "agent"))
	if err == nil {
		_, _, err = receiveFrom(peer, &a, maxExecMessage)
	}
	if err != nil {
		return fail(fmt.Errorf("%s is for the agent's use: %w", execWord, err))
	}
	sigs := make(chan os.Signal, 64)
	signal.Notify(sigs) // none ends this process before its command
	var t runtime.Task
	if err := readJSON(filepath.Join(a.Dir, taskFile), &t); err != nil {
		return fail(err)
	}
	if a.Cgroup != "" {
		_ = joinCgroup(a.Cgroup, 0)
	}
	if err := enter(a.Init); err != nil {
		return fail(err)
	}
	if a.User == "" {
		a.User = t.Spec.User
	}
	if a.WorkDir == "" {
		a.WorkDir = t.Spec.Dir
	}
	p, err := newProgram(a.Command, environment(t, a.Env, a.TTY), a.WorkDir, a.User)
	if err != nil {
		return fail(err)
	}
	p.attr.Files = []uintptr{0, 1, 2}
	p.attr.Sys.Setctty = a.TTY
	// No Pdeathsig: syscall's check for a parent that died before it was set
	// compares parents' pids, and across PID namespaces the parent's is 0.
	pid, err := p.start()
	if errors.Is(err, unix.ENOMEM) {
		err = errTaskEnded // fork(2): PID 1 of the namespace has ended
	}
	if err != nil {
		return fail(err)
	}
	var mu sync.Mutex
	ended := false
	killTree := func(sig syscall.Signal) {
		mu.Lock()
		defer mu.Unlock()
		if !ended { // and so the pid is still the command's
			for _, p := range tree(pid) {
				_ = syscall.Kill(p, sig)
			}
		}
	}
	go func() {
		for {
			var c execControl
			if _, err := receive(peer, &c); err != nil {
				killTree(syscall.SIGHUP)
				time.Sleep(hangupGrace)
				killTree(syscall.SIGKILL)
				return
			}
			mu.Lock()
			if !ended {
				_ = syscall.Kill(pid, syscall.Signal(c.Signal))
			}
			mu.Unlock()
		}
	}()
	for {
		// Not reaped before ended is set: see killTree.
		var info unix.Siginfo
		if err := unix.Waitid(unix.P_PID, pid, &info, unix.WEXITED|unix.WNOWAIT, nil); errors.Is(err, unix.EINTR) {
			continue
		}
		mu.Lock()
		defer mu.Unlock()
		ended = true
		var ws syscall.WaitStatus
		if _, err := syscall.Wait4(pid, &ws, 0, nil); err != nil {
			return fail(err)
		}
		if ws.Signaled() {
			return 128 + int(ws.Signal())
		}
		return ws.ExitStatus()
	}
}

// tree lists a process, its descendants and the other processes of its session:
// a command's background jobs have lost their parents but not their session.
func tree(root int) []int {
	es, err := os.ReadDir("/proc")
	if err != nil {
		return []int{root}
	}
	children := map[int][]int{}
	out := []int{root}
	in := map[int]bool{root: true}
	for _, e := range es {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		st, err := readStat(pid)
		if err != nil {
			continue
		}
		children[st.ppid] = append(children[st.ppid], pid)
		if st.session == root && !in[pid] {
			in[pid] = true
			out = append(out, pid)
		}
	}
	for i := 0; i < len(out); i++ {
		for _, c := range children[out[i]] {
			if !in[c] {
				in[c] = true
				out = append(out, c)
			}
		}
	}
	return out
}

var errTaskEnded = errors.New("the task has ended")

// enter moves this thread into the namespaces of a task's PID 1.
func enter(id procID) error {
	// The directory stays that of one process, whoever gets the pid later.
	d, err := unix.Open("/proc/"+strconv.Itoa(id.PID), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return errTaskEnded
	}
	defer unix.Close(d)
	if now, err := identifyAt(d, id.PID); err != nil || now != id {
		return errTaskEnded
	}
	kinds := []struct {
		name string
		flag int
		fd   int
	}{{"pid", unix.CLONE_NEWPID, -1}, {"net", unix.CLONE_NEWNET, -1}, {"uts", unix.CLONE_NEWUTS, -1}, {"ipc", unix.CLONE_NEWIPC, -1}, {"mnt", unix.CLONE_NEWNS, -1}}
	for i, k := range kinds {
		if kinds[i].fd, err = unix.Openat(d, "ns/"+k.name, unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
			return errTaskEnded
		}
		defer unix.Close(kinds[i].fd)
	}
	// A thread that shares its working directory can't change its mount
	// namespace (setns(2)).
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	for _, k := range kinds {
		if err := unix.Setns(k.fd, k.flag); err != nil {
			return fmt.Errorf("enter the task's %s namespace: %w", k.name, err)
		}
	}
	return nil
}

// identifyAt is identify for an open /proc/PID.
func identifyAt(dir, pid int) (procID, error) {
	fd, err := unix.Openat(dir, "stat", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return procID{}, err
	}
	f := os.NewFile(uintptr(fd), "stat")
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil {
		return procID{}, err
	}
	st, err := parseStat(b)
	return procID{PID: pid, Start: st.start, Boot: bootID()}, err
}

// process is a command that runs, as the agent sees it.
type process struct {
	peer *net.UnixConn
	tty  *os.File
	done chan struct{}
	code int
	err  error
}

// Exec implements runtime.Runtime. When ctx ends, the command and what it
// started get SIGHUP, and half a second later SIGKILL.
//
// A Stdin that never ends holds one goroutine until it does, as with os/exec:
// callers close what they pass once Wait has returned.
func (r *Runtime) Exec(ctx context.Context, id string, s runtime.ExecSpec) (runtime.Process, error) {
	e, err := r.get(id)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	st, initID := e.status, e.init
	r.mu.Unlock()
	if st.State != runtime.Running || initID.PID == 0 {
		return nil, fmt.Errorf("task %s is not running: it is %s", st.Name, st.State)
	}
	if len(s.Command) == 0 || s.Command[0] == "" {
		return nil, errors.New("no command is given")
	}
	peer, child, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer child.Close()
	ctx, cancel := context.WithCancel(ctx)
	stopClose := context.AfterFunc(r.ctx, cancel)
	cmd := exec.CommandContext(ctx, r.cfg.Exe[0], append(slices.Clone(r.cfg.Exe[1:]), execWord)...)
	cmd.Dir = "/"
	cmd.ExtraFiles = []*os.File{child}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Cancel = peer.Close // task-exec does the rest
	// Output may be held open by what the command left behind.
	cmd.WaitDelay = execWaitDelay
	p := &process{peer: peer, done: make(chan struct{})}
	release := func() {
		stopClose()
		cancel()
		peer.Close()
		if p.tty != nil {
			p.tty.Close()
		}
	}
	var stdin io.WriteCloser
	if s.TTY {
		var slave *os.File
		if p.tty, slave, err = pty.Open(); err != nil {
			release()
			return nil, fmt.Errorf("terminal: %w", err)
		}
		defer slave.Close()
		if s.Rows > 0 && s.Cols > 0 {
			_ = pty.Setsize(p.tty, &pty.Winsize{Rows: s.Rows, Cols: s.Cols})
		}
		cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	} else {
		cmd.Stdout, cmd.Stderr = s.Stdout, s.Stderr
		// Standard input is copied by hand: exec's own copy makes Wait wait for
		// an input that nobody ends.
		if s.Stdin != nil {
			if stdin, err = cmd.StdinPipe(); err != nil {
				release()
				return nil, err
			}
		}
	}
	args := execArgs{Dir: r.taskDir(id), Init: initID, Cgroup: r.cgroups.path(id), Command: s.Command, Env: s.Env, WorkDir: s.Dir, User: s.User, TTY: s.TTY}
	if err := send(peer, args); err != nil {
		release()
		return nil, fmt.Errorf("exec %s: %w", s.Command[0], err)
	}
	if !r.begin() {
		release()
		return nil, errClosed
	}
	if err := cmd.Start(); err != nil {
		r.wg.Done()
		release()
		return nil, fmt.Errorf("exec %s: %w", s.Command[0], err)
	}
	if stdin != nil {
		go func() { // ends when the command, or the caller's input, does
			_, _ = io.Copy(stdin, s.Stdin)
			stdin.Close()
		}()
	}
	copied := make(chan struct{})
	if p.tty != nil {
		out := s.Stdout
		if out == nil {
			out = io.Discard
		}
		go func() {
			defer close(copied)
			_, _ = io.Copy(out, p.tty) // EIO when the last holder closes
		}()
		if s.Stdin != nil {
			go func() {
				_, _ = io.Copy(p.tty, s.Stdin)
				// What a user at a terminal does to end the input: ^D, VEOF.
				_, _ = p.tty.Write([]byte{4})
			}()
		}
	} else {
		close(copied)
	}
	go func() {
		defer r.wg.Done()
		defer close(p.done)
		err := cmd.Wait()
		if p.tty != nil {
			t := time.NewTimer(execWaitDelay)
			select {
			case <-copied:
			case <-t.C:
			}
			t.Stop()
		}
		release() // ends the copies, too
		<-copied
		// The error may also be that of the caller's Stdout, or that output was
		// still open: the exit status says more.
		if cmd.ProcessState == nil {
			p.err = err
		} else if p.code = cmd.ProcessState.ExitCode(); p.code < 0 {
			p.code = 128 + int(cmd.ProcessState.Sys().(syscall.WaitStatus).Signal())
		}
	}()
	return p, nil
}

func (p *process) Wait() (int, error) {
	<-p.done
	return p.code, p.err
}

func (p *process) Resize(rows, cols uint16) error {
	if p.tty == nil {
		return errors.New("the command has no terminal")
	}
	return pty.Setsize(p.tty, &pty.Winsize{Rows: rows, Cols: cols})
}

// Signal signals the command. One that has ended is no error.
func (p *process) Signal(sig int) error {
	if sig <= 0 || sig > 64 {
		return fmt.Errorf("signal %d is unknown", sig)
	}
	select {
	case <-p.done:
		return nil
	default:
	}
	if err := send(p.peer, execControl{Signal: sig}); err != nil && !errors.Is(err, unix.EPIPE) && !errors.Is(err, net.ErrClosed) {
		return fmt.Errorf("signal the command: %w", err)
	}
	return nil
}
