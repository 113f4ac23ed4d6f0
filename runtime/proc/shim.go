package proc

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	goruntime "runtime"
	"runtime/debug"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/runtime"
)

// Words by which this binary is told to be one of the helpers.
const (
	shimWord = "task-shim"
	initWord = "task-init"
	execWord = "task-exec"
)

// Dispatch runs a helper if the arguments name one. It is called first thing in
// main, and in TestMain of tests that run tasks, before anything that only the
// program itself needs.
func Dispatch(args []string) (handled bool, exitCode int) {
	if len(args) < 2 {
		return false, 0
	}
	switch args[1] {
	case shimWord:
		return true, shimMain(args[2:])
	case initWord:
		return true, initMain(args[2:])
	case execWord:
		return true, execMain(args[2:])
	}
	return false, 0
}

// Files that a shim is started with.
const (
	shimPeerFD = 3 // a socket to who started it: ready out, anything or the end in
	shimLockFD = 4 // the locked lock file
)

// ready is the shim's first and only word to who started it.
type ready struct {
	Err     string `json:"err,omitempty"`
	DNSPort uint16 `json:"dns_port,omitempty"`
}

// shim is the state of one shim process.
type shim struct {
	dir  string
	task runtime.Task

	udp *net.UDPConn
	tcp *net.TCPListener
	log *logWriter

	start   func() error  // at most once; later calls get the first's result
	started chan struct{} // closed when the program runs or could not be started
	done    chan struct{} // closed when the program has ended

	mu      sync.Mutex
	status  runtime.Status
	begun   bool // start was called
	closing bool // no start any more
	init    procID
	process *os.Process   // init
	changed chan struct{} // closed and replaced at each change of status
}

// shimMain is the shim process: DIR SOCKET. It is in the task's network
// namespace from its start.
func shimMain(args []string) int {
	unix.CloseOnExec(shimPeerFD)
	unix.CloseOnExec(shimLockFD)
	peer, err := unixConn(os.NewFile(shimPeerFD, "peer"))
	if err != nil || len(args) != 2 {
		fmt.Fprintln(os.Stderr, shimWord+" is for the agent's use")
		return 1
	}
	// The file is never closed but by this process's end. That is its use.
	lock := os.NewFile(shimLockFD, "lock")
	defer goruntime.KeepAlive(lock)
	// One shim per task: it must be small more than fast.
	goruntime.GOMAXPROCS(1)
	debug.SetGCPercent(20)
	// Nothing but its socket ends a shim: not the terminal, nor a group's signal.
	signal.Ignore(syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGPIPE)
	s, ln, err := newShim(args[0], args[1])
	if err != nil {
		_ = send(peer, ready{Err: err.Error()})
		return 1
	}
	if err := send(peer, ready{DNSPort: s.status.Sandbox.DNSPort}); err != nil {
		_ = os.Remove(args[1])
		return 1
	}
	// Whoever started this writes shim.json, then closes the socket. If it dies
	// before that there is no task, and nobody else would end this process.
	var none struct{}
	_, _ = receive(peer, &none)
	peer.Close()
	if !exists(filepath.Join(s.dir, shimFile)) {
		_ = os.Remove(args[1])
		return 1
	}
	for {
		c, err := ln.AcceptUnix()
		if err != nil {
			time.Sleep(10 * time.Millisecond) // out of files, say: the task goes on
			continue
		}
		go s.serve(c)
	}
}

func newShim(dir, socket string) (*shim, *net.UnixListener, error) {
	s := &shim{dir: dir, changed: make(chan struct{}), started: make(chan struct{}), done: make(chan struct{})}
	s.start = sync.OnceValue(s.run)
	if err := readJSON(filepath.Join(dir, taskFile), &s.task); err != nil {
		return nil, nil, err
	}
	// As Docker has it since 20.10: in a namespace of its own a task may use
	// low ports and ICMP sockets without privileges (ip(7), icmp(7)).
	for _, kv := range [][2]string{{"net.ipv4.ip_unprivileged_port_start", "0"}, {"net.ipv4.ping_group_range", "0\t2147483647"}} {
		if err := nl.SetSysctl(kv[0], kv[1]); err != nil {
			return nil, nil, err
		}
	}
	if err := s.openDNS(); err != nil {
		return nil, nil, err
	}
	var err error
	if s.log, err = newLogWriter(dir, maxLogSize); err != nil {
		return nil, nil, err
	}
	port := uint16(s.udp.LocalAddr().(*net.UDPAddr).Port)
	s.status = runtime.Status{ID: s.task.ID, Name: s.task.Name, State: runtime.Created, Sandbox: runtime.Sandbox{Netns: s.task.Netns, DNSPort: port}}
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, nil, err
	}
	var ln *net.UnixListener
	unix.Umask(0o077) // of this process for good: what it makes is root's only
	err = withShortPath(socket, func(short string) error {
		ln, err = net.ListenUnix("unixpacket", &net.UnixAddr{Name: short, Net: "unixpacket"})
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	ln.SetUnlinkOnClose(false) // its short path may not last
	return s, ln, nil
}

// openDNS opens the name server's sockets: one port, UDP and TCP, on the
// address that Docker made known. The redirection of port 53 is the overlay's.
func (s *shim) openDNS() error {
	ip := net.IPv4(127, 0, 0, 11)
	var err error
	for range 20 {
		if s.udp, err = net.ListenUDP("udp4", &net.UDPAddr{IP: ip}); err != nil {
			return fmt.Errorf("name server socket: %w", err)
		}
		port := s.udp.LocalAddr().(*net.UDPAddr).Port
		if s.tcp, err = net.ListenTCP("tcp4", &net.TCPAddr{IP: ip, Port: port}); err == nil {
			return nil
		}
		s.udp.Close()
	}
	return fmt.Errorf("name server socket: %w", err)
}

// state is what requests are answered with.
func (s *shim) state() (response, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return response{Status: s.status, Init: s.init}, s.changed
}

func (s *shim) set(fn func(*runtime.Status)) {
	s.mu.Lock()
	fn(&s.status)
	close(s.changed)
	s.changed = make(chan struct{})
	s.mu.Unlock()
}

func (s *shim) serve(c *net.UnixConn) {
	defer c.Close()
	var req request
	files, err := receive(c, &req)
	for _, f := range files {
		f.Close()
	}
	if err != nil {
		return
	}
	answer := func(err error, fds ...int) {
		r, _ := s.state()
		if err != nil {
			r.Err = err.Error()
		}
		_ = send(c, r, fds...)
	}
	switch req.Op {
	case opStatus:
		answer(nil)
	case opStart:
		answer(s.start())
	case opStop:
		s.stop(syscall.Signal(req.Signal), req.Grace)
		answer(nil)
	case opWatch:
		s.watch(c)
	case opDNS:
		u, err1 := s.udp.File()
		t, err2 := s.tcp.File()
		if err := errors.Join(err1, err2); err != nil {
			answer(err)
			return
		}
		answer(nil, int(u.Fd()), int(t.Fd()))
		u.Close()
		t.Close()
	case opShutdown:
		s.shutdown()
		answer(nil)
		os.Exit(0)
	default:
		answer(fmt.Errorf("unknown operation %q", req.Op))
	}
}

// watch sends the status now and at each change, until the other end goes.
func (s *shim) watch(c *net.UnixConn) {
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		var v struct{}
		_, _ = receive(c, &v)
	}()
	for {
		r, changed := s.state()
		if send(c, r) != nil {
			return
		}
		select {
		case <-changed:
		case <-gone:
			return
		}
	}
}

// run starts the program and returns when it runs, or could not be started.
func (s *shim) run() error {
	result := make(chan error, 1)
	go func() {
		// PR_SET_PDEATHSIG is about the parent's thread, not its process
		// (prctl(2)): the one that forks must stay until the child has ended.
		goruntime.LockOSThread()
		s.runInit(result)
	}()
	return <-result
}

// runInit forks task-init, reports on result that the program runs or why not,
// and waits for the end.
func (s *shim) runInit(result chan<- error) {
	st, err := s.forkInit()
	if err != nil {
		s.finish(exitStatus{code: 125, err: err.Error()})
		close(s.started)
		result <- err
		return
	}
	msg, pid, rerr := st.report()
	if rerr == nil && msg.Err == "" {
		s.set(func(st *runtime.Status) {
			st.State, st.PID, st.StartedAt = runtime.Running, pid, time.Now()
		})
		close(s.started)
		result <- nil
		s.finish(st.wait(s.log))
		return
	}
	end := st.wait(s.log)
	switch {
	case rerr == nil:
		end.err = msg.Err
	case end.code == 128+int(syscall.SIGKILL):
		end.err = "it was stopped before its program ran"
	default:
		end.err = fmt.Sprintf("task-init ended with status %d before it ran the program: %v", end.code, rerr)
	}
	s.finish(end)
	close(s.started)
	result <- errors.New(end.err)
}

type exitStatus struct {
	code int
	err  string
}

// finish keeps and tells the end of the task.
func (s *shim) finish(end exitStatus) {
	r, _ := s.state()
	final := r.Status
	final.State, final.PID, final.ExitCode, final.Err, final.ExitedAt = runtime.Exited, 0, end.code, end.err, time.Now()
	if len(final.Err) > 4096 {
		final.Err = final.Err[:4096]
	}
	if err := writeJSON(filepath.Join(s.dir, exitFile), final); err != nil {
		// Told while this process lives, and lost with it.
		fmt.Fprintln(os.Stderr, "exit status can't be kept:", err)
	}
	s.set(func(st *runtime.Status) { *st = final })
	close(s.done)
}

// initProcess is a task-init that was forked.
type initProcess struct {
	cmd  *exec.Cmd
	peer *net.UnixConn // its end ends task-init, too
	out  [2]*os.File   // what the program writes
}

// forkInit makes the task's PID 1. The caller's thread must stay.
func (s *shim) forkInit() (_ *initProcess, err error) {
	var opened []*os.File
	defer func() {
		for _, f := range opened {
			f.Close()
		}
	}()
	p := &initProcess{}
	var w [2]*os.File
	for i := range 2 {
		if p.out[i], w[i], err = os.Pipe(); err != nil {
			return nil, err
		}
		opened = append(opened, p.out[i], w[i])
	}
	peer, child, err := socketPair()
	if err != nil {
		return nil, err
	}
	opened = append(opened, child)
	p.peer = peer
	// To learn the program's pid as it is numbered here.
	if err := setPassCred(peer); err != nil {
		peer.Close()
		return nil, err
	}
	p.cmd = exec.Command("/proc/self/exe", initWord, s.dir)
	p.cmd.Dir = "/"
	p.cmd.Stdout, p.cmd.Stderr = w[0], w[1]
	p.cmd.ExtraFiles = []*os.File{child}
	p.cmd.Env = []string{}
	p.cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
		Pdeathsig:  syscall.SIGKILL,
		Setsid:     true,
	}
	s.mu.Lock()
	s.begun = true
	if s.closing {
		err = errors.New("the task is being removed")
	} else if err = p.cmd.Start(); err == nil {
		s.process = p.cmd.Process
		if s.init, err = identify(p.cmd.Process.Pid); err == nil {
			err = writeJSON(filepath.Join(s.dir, runFile), runRecord{Init: s.init})
		}
		if err == nil {
			// Not before it is on disk does task-init do anything.
			err = send(peer, struct{}{})
		}
		if err != nil {
			_ = p.cmd.Process.Kill()
			_ = p.cmd.Wait()
		}
	}
	s.mu.Unlock()
	if err != nil {
		peer.Close()
		return nil, fmt.Errorf("start task-init: %w", err)
	}
	opened = []*os.File{child, w[0], w[1]}
	return p, nil
}

func setPassCred(c *net.UnixConn) error {
	rc, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	if err := rc.Control(func(fd uintptr) { serr = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1) }); err != nil {
		return err
	}
	return serr
}

// report reads task-init's word: an error that kept the program from running,
// or its pid.
func (p *initProcess) report() (initReport, int, error) {
	var msg initReport
	files, pid, err := receiveFrom(p.peer, &msg, maxMessage)
	for _, f := range files {
		f.Close()
	}
	return msg, pid, err
}

// wait returns when the task has ended: every process of it.
func (p *initProcess) wait(log *logWriter) exitStatus {
	var logs sync.WaitGroup
	logs.Go(func() { log.copy(p.out[0], false) })
	logs.Go(func() { log.copy(p.out[1], true) })
	err := p.cmd.Wait()
	p.peer.Close()
	// The kernel has killed the rest of the PID namespace, so the pipes end.
	logs.Wait()
	log.flush()
	var ee *exec.ExitError
	switch {
	case err == nil:
		return exitStatus{}
	case errors.As(err, &ee):
		if ws, ok := ee.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			return exitStatus{code: 128 + int(ws.Signal())}
		}
		return exitStatus{code: ee.ExitCode()}
	}
	return exitStatus{code: 255, err: err.Error()}
}

// stop signals the program, kills the task after grace, and waits for its end.
func (s *shim) stop(sig syscall.Signal, grace time.Duration) {
	s.mu.Lock()
	begun := s.begun
	s.mu.Unlock()
	if !begun {
		return
	}
	if sig != syscall.SIGKILL && grace > 0 {
		t := time.NewTimer(grace)
		defer t.Stop()
		select {
		case <-s.started:
			s.signalInit(sig) // which passes it on to the program
			select {
			case <-s.done:
				return
			case <-t.C:
			}
		case <-t.C:
		}
	}
	s.signalInit(syscall.SIGKILL) // PID 1 takes its namespace with it
	<-s.done
}

// signalInit signals task-init, if it still is. os.Process makes sure that it
// is no other process that got its pid.
func (s *shim) signalInit(sig syscall.Signal) {
	s.mu.Lock()
	p := s.process
	s.mu.Unlock()
	if p != nil {
		_ = p.Signal(sig)
	}
}

// shutdown kills the task, and keeps how it ended.
func (s *shim) shutdown() {
	s.mu.Lock()
	s.closing = true
	begun, exited := s.begun, s.status.State == runtime.Exited
	s.mu.Unlock()
	switch {
	case begun:
		s.stop(syscall.SIGKILL, 0)
	case !exited:
		s.finish(exitStatus{err: "it was not started"})
	}
	s.log.close()
}

// readReady is the other side of a shim's start.
func readReady(c *net.UnixConn) (ready, error) {
	var rd ready
	_, err := receive(c, &rd)
	if err == nil && rd.Err != "" {
		err = errors.New(rd.Err)
	}
	return rd, err
}
