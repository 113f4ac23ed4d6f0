package process

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	goruntime "runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/internal/proc"
	"github.com/shoalnet/shoal/runtime"
	"github.com/shoalnet/shoal/runtime/cgroup"
)

// Words by which this binary is told to be one of the helpers.
const (
	shimWord   = "task-shim"
	initWord   = "task-init"
	execWord   = "task-exec"
	detachWord = "task-detach"
	keepWord   = "task-keep"
	mendWord   = "task-mend"
	copyWord   = "task-copy"
)

// Dispatch runs a helper if the arguments name one. It is called first thing in
// main, before anything that only the program itself needs.
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
	case mendWord:
		return true, mendMain(args[2:])
	case detachWord:
		return true, detachMain(args[2:])
	case keepWord:
		return true, keepMain(args[2:])
	case copyWord:
		return true, copyMain(args[2:])
	}
	return false, 0
}

// Files of a task's directory.
const (
	taskFile = "task.json"
	exitFile = "exit.json"
	logFile  = "output.log"
	shimLog  = "shim.log"
)

// readyFD is where the shim reports to who started it: a ready, as JSON.
const readyFD = 3

type ready struct {
	Err     string `json:"err,omitempty"`
	DNSPort uint16 `json:"dns_port,omitempty"`
}

// shim is the state of one shim process.
type shim struct {
	dir    string
	socket string
	task   runtime.Task
	record []byte // taskFile, as it was read
	cgroup string // the task's

	udp *net.UDPConn
	tcp *net.TCPListener
	log *logWriter

	programIn *os.File // the program's end of its standard input or terminal, until it runs
	stdin     *os.File // the other end, open until the caller has no more
	tty       *os.File // the other end of the terminal
	attached  chan struct{}
	once      sync.Once
	out, err  sink

	begin     chan struct{} // closed when the program is to run
	beginOnce sync.Once
	begun     chan struct{} // closed when it does, or can't
	beginErr  error         // why it can't

	mu      sync.Mutex
	foreign *foreign         // of a task whose program an executor runs
	early   []syscall.Signal // that came before the program ran
	status  runtime.Status
	initPID int
	halted  bool          // its machine goes down
	changed chan struct{} // closed and replaced at each change of status
	done    chan struct{} // closed when the program has ended
}

// shimMain is the shim process: DIR SOCKET. It is in the task's network
// namespace from its start.
func shimMain(args []string) int {
	report := os.NewFile(readyFD, "ready")
	fail := func(err error) int {
		b, _ := json.Marshal(ready{Err: err.Error()})
		_, _ = report.Write(b)
		return 1
	}
	if len(args) != 2 {
		return fail(errors.New("task-shim is for the agent's use"))
	}
	// One shim per task: it must be small more than fast.
	goruntime.GOMAXPROCS(1)
	debug.SetGCPercent(20)
	// Nothing but its socket ends a shim, and its machine: not the terminal, nor a group's signal.
	signal.Ignore(syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGPIPE)
	ending := make(chan os.Signal, 1)
	signal.Notify(ending, syscall.SIGTERM)
	s := &shim{dir: args[0], socket: args[1], changed: make(chan struct{}), done: make(chan struct{}), attached: make(chan struct{}), begin: make(chan struct{}), begun: make(chan struct{})}
	var rec record
	var err error
	if s.record, err = os.ReadFile(filepath.Join(s.dir, taskFile)); err == nil {
		err = json.Unmarshal(s.record, &rec)
	}
	if err != nil {
		return fail(err)
	}
	s.task, s.cgroup = rec.Task, rec.Cgroup
	port := uint16(0)
	if s.task.Netns != "" {
		// As Docker has it since 20.10: in a namespace of its own a task may use
		// low ports and ICMP sockets without privileges (ip(7), icmp(7)).
		for k, v := range map[string]string{"net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ping_group_range": "0\t2147483647"} {
			if err := nl.SetSysctl(k, v); err != nil {
				return fail(err)
			}
		}
		if err := s.openDNS(); err != nil {
			return fail(err)
		}
		port = uint16(s.udp.LocalAddr().(*net.UDPAddr).Port)
	}
	if s.log, err = newLogWriter(filepath.Join(s.dir, logFile), s.task.Spec.Log, s.losing); err != nil {
		return fail(err)
	}
	s.status = runtime.Status{ID: s.task.ID, Name: s.task.Name, State: runtime.Created, Sandbox: runtime.Sandbox{Netns: s.task.Netns, DNSPort: port}}
	open := s.openInput
	if s.task.Executor != "" {
		open = s.openStreams
	}
	if err := open(); err != nil {
		return fail(err)
	}
	mend := make(chan os.Signal, 1)
	signal.Notify(mend, mendSignal)
	ln, err := s.listen()
	if err != nil {
		return fail(err)
	}
	b, _ := json.Marshal(ready{DNSPort: port})
	_, _ = report.Write(b)
	report.Close()
	if s.foreign == nil {
		go s.program()
	}
	go s.accept(ln)
	go s.halt(ending)
	s.mend(ln, mend)
	return 1
}

// haltGrace is what a program has to end when its machine does: Docker's stop timeout.
const haltGrace = 10 * time.Second

// halt ends the program and the shim when the machine is going down: systemd signals
// whatever is left then, and waits 90 s for it to end (systemd-shutdown(8)).
func (s *shim) halt(ending <-chan os.Signal) {
	for range ending {
		if b, _ := os.ReadFile("/proc/1/comm"); !shutsDown(string(b)) {
			continue
		}
		if s.task.Executor == "" { // else it is containerd's, which is signalled, too
			s.goesDown()
			s.stop(syscall.SIGTERM, haltGrace)
		}
		os.Exit(0)
	}
}

// goesDown has the program's end, from now on, be its machine's: one that makes an orderly
// end of it at the signal has not completed what it was to do.
func (s *shim) goesDown() {
	s.mu.Lock()
	s.halted = true
	s.mu.Unlock()
}

// shutsDown tells by the name of PID 1 whether it ends what is left: systemd has executed
// systemd-shutdown in its place, of whose name comm has 15 bytes (proc_pid_comm(5)).
func shutsDown(comm string) bool { return strings.TrimSpace(comm) == "systemd-shutdow" }

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
		growBuffer(s.udp)
		if s.tcp, err = net.ListenTCP("tcp4", &net.TCPAddr{IP: ip, Port: port}); err == nil {
			return nil
		}
		s.udp.Close()
	}
	return fmt.Errorf("name server socket: %w", err)
}

// growBuffer makes room for the questions of thousands at once, or of the time
// until the next agent: the kernel counts some 800 bytes for each (socket(7):
// SO_RCVBUFFORCE needs CAP_NET_ADMIN; without it the default must do).
func growBuffer(c *net.UDPConn) {
	if rc, err := c.SyscallConn(); err == nil {
		_ = rc.Control(func(fd uintptr) { _ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20) })
	}
}

func (s *shim) serve(c *net.UnixConn) {
	defer c.Close()
	var req request
	if _, err := receive(c, &req); err != nil {
		return
	}
	answer := func(err error, fds ...int) {
		s.mu.Lock()
		r := response{Status: s.status, InitPID: s.initPID, ShimPID: os.Getpid()}
		s.mu.Unlock()
		if err != nil {
			r.Err = err.Error()
		}
		_ = send(c, r, fds...)
	}
	switch req.Op {
	case "start":
		answer(s.start())
	case "await":
		s.await()
		answer(nil)
	case "started":
		if s.foreign == nil {
			answer(errors.New("the task's program is the shim's own"))
			return
		}
		s.runs(req.PID)
		answer(nil)
	case "ended":
		if s.foreign == nil {
			answer(errors.New("the task's program is the shim's own"))
			return
		}
		s.ended(req.Code, req.Err)
		answer(nil)
	case "stop":
		s.stop(syscall.Signal(req.Signal), req.Grace)
		answer(nil)
	case "halt":
		s.goesDown()
		answer(nil)
	case "signal":
		s.signal(syscall.Signal(req.Signal))
		answer(nil)
	case "attach":
		s.attach(answer)
	case "close-input":
		s.closeInput()
		answer(nil)
	case "watch":
		s.watch(c)
	case "dns":
		if s.udp == nil {
			answer(errors.New("a task in the node's own namespace has no name server"))
			return
		}
		u, err1 := s.udp.File()
		t, err2 := s.tcp.File()
		if err := errors.Join(err1, err2); err != nil {
			answer(err)
			return
		}
		answer(nil, int(u.Fd()), int(t.Fd()))
		u.Close()
		t.Close()
	case "record":
		f, err := s.recordFile()
		if err != nil {
			answer(err)
			return
		}
		answer(nil, int(f.Fd()))
		f.Close()
	case "shutdown":
		if s.foreign == nil {
			s.stop(syscall.SIGKILL, 0)
		}
		answer(nil)
		os.Exit(0)
	default:
		answer(fmt.Errorf("unknown operation %q", req.Op))
	}
}

// watch sends the status now and at each change.
func (s *shim) watch(c *net.UnixConn) {
	for {
		s.mu.Lock()
		r, ch := response{Status: s.status, InitPID: s.initPID, ShimPID: os.Getpid()}, s.changed
		s.mu.Unlock()
		if send(c, r) != nil {
			return
		}
		<-ch
	}
}

func (s *shim) set(fn func(*runtime.Status)) {
	s.mu.Lock()
	fn(&s.status)
	close(s.changed)
	s.changed = make(chan struct{})
	s.mu.Unlock()
}

// losing notes why output is being lost, nil: it is kept again.
func (s *shim) losing(why error) {
	s.set(func(st *runtime.Status) {
		if st.Note = ""; why != nil {
			st.Note = "its output is being lost: " + why.Error()
		}
	})
}

// start runs the program.
func (s *shim) start() error {
	s.mu.Lock()
	st := s.status.State
	s.mu.Unlock()
	if s.foreign != nil {
		return errors.New("the task's program is its executor's to start")
	}
	if st != runtime.Created {
		return nil // the agent asks again after a restart
	}
	if s.task.Spec.Attach {
		select {
		case <-s.attached:
		case <-time.After(attachWait):
		}
	}
	s.beginOnce.Do(func() { close(s.begin) })
	<-s.begun
	return s.beginErr
}

// program runs the program once it is to, and sees to its end. The thread that forks
// must live as long as the child: a parent-death signal is about the thread (prctl(2),
// PR_SET_PDEATHSIG), so one goroutine keeps it from fork to wait.
func (s *shim) program() {
	goruntime.LockOSThread()
	told := false
	err := s.runInit(func() {
		told = true
		close(s.begun)
	})
	if !told {
		<-s.begin
		s.beginErr = err
		close(s.begun)
	}
}

// runInit starts task-init, has it go on when the program is to run, tells that it does,
// and waits for the end. An error means that the program did not start. To start this
// binary takes longer than all that task-init does, so that is done while the agent
// wires the task.
func (s *shim) runInit(started func()) error {
	// Opened out here: in the task's own mount namespace a file that is open for
	// writing would keep its /sys from being made read-only.
	group, err := cgroup.Open(s.cgroup)
	if err != nil {
		return err
	}
	defer group.Close()
	files, own := group.Opened()
	errR, errW, err := os.Pipe()
	if err != nil {
		return err
	}
	defer errR.Close()
	gateR, gateW, err := os.Pipe()
	if err != nil {
		return err
	}
	defer gateW.Close()
	outR, outW, err := os.Pipe()
	if err != nil {
		return err
	}
	logErrR, logErrW, err := os.Pipe()
	if err != nil {
		return err
	}
	cmd := exec.Command("/proc/self/exe", initWord, s.dir, strconv.Itoa(group.Version()), strconv.Itoa(len(files)), strconv.Itoa(own))
	cmd.Stdout, cmd.Stderr = outW, logErrW
	if s.programIn != nil {
		cmd.Stdin = s.programIn
	}
	if s.tty != nil {
		cmd.Stdout, cmd.Stderr = s.programIn, s.programIn
	}
	cmd.ExtraFiles = append([]*os.File{errW, gateR}, files...)
	cmd.Env = []string{}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
		Pdeathsig:  syscall.SIGKILL,
		Setsid:     true,
	}
	err = cmd.Start()
	errW.Close()
	gateR.Close()
	outW.Close()
	logErrW.Close()
	if s.programIn != nil {
		s.programIn.Close()
	}
	if s.tty != nil {
		outR.Close()
		outR = s.tty
	}
	if err != nil {
		outR.Close()
		logErrR.Close()
		return fmt.Errorf("start task: %w", err)
	}
	var logs sync.WaitGroup
	logs.Go(func() { s.log.copy(outR, io.TeeReader(outR, &s.out), false) })
	logs.Go(func() { s.log.copy(logErrR, io.TeeReader(logErrR, &s.err), true) })
	<-s.begin
	_, _ = gateW.Write([]byte{1})
	gateW.Close()
	// init closes the pipe without a word once the program is executed.
	msg, _ := readAll(errR, 4096)
	startErr := string(msg)
	if startErr == "" {
		pid := childOf(cmd.Process.Pid)
		s.mu.Lock()
		s.initPID = cmd.Process.Pid
		early := s.early
		s.mu.Unlock()
		s.set(func(st *runtime.Status) {
			st.State, st.PID = runtime.Running, pid
			st.Begin()
		})
		for _, sig := range early {
			s.signal(sig)
		}
		started()
	}
	err = cmd.Wait()
	code := 0
	var ee *exec.ExitError
	if errors.As(err, &ee) {
		if ws := ee.Sys().(syscall.WaitStatus); ws.Signaled() {
			code = 128 + int(ws.Signal())
		} else {
			code = ws.ExitStatus()
		}
	} else if err != nil {
		code = 255
	}
	s.finish(&logs, code, startErr)
	if startErr != "" {
		return errors.New(startErr)
	}
	return nil
}

// finish takes the rest of the output, and keeps and tells how the program ended;
// startErr is why it did not start.
func (s *shim) finish(logs *sync.WaitGroup, code int, startErr string) {
	// The kernel has killed the rest of the PID namespace, so the pipes end. Who
	// is attached and slow must not hold that up.
	s.out.finish()
	s.err.finish()
	logs.Wait()
	s.out.close()
	s.err.close()
	s.log.flush()
	var final runtime.Status
	s.mu.Lock()
	final = s.status
	if s.halted && startErr == "" {
		startErr = "stopped with its machine"
	}
	s.mu.Unlock()
	if startErr == "" {
		startErr = outOfMemory(s.cgroup, code)
	}
	final.State, final.PID, final.ExitCode, final.ExitedAt, final.Err, final.Note = runtime.Exited, 0, code, time.Now(), startErr, ""
	if err := writeJSON(filepath.Join(s.dir, exitFile), final); err != nil {
		final.Err = strings.TrimPrefix(final.Err+"; exit status could not be kept: "+err.Error(), "; ")
	}
	s.set(func(st *runtime.Status) { *st = final })
	close(s.done)
}

// stop signals the program, kills the task after grace, and waits for its end.
func (s *shim) stop(sig syscall.Signal, grace time.Duration) {
	s.mu.Lock()
	st, initPID := s.status, s.initPID
	s.mu.Unlock()
	if st.State != runtime.Running {
		return
	}
	if sig != syscall.SIGKILL && grace > 0 {
		if st.PID > 0 {
			_ = syscall.Kill(st.PID, sig)
		}
		t := time.NewTimer(grace)
		defer t.Stop()
		select {
		case <-s.done:
			return
		case <-t.C:
		}
	}
	// PID 1 takes its namespace with it (pid_namespaces(7)). The pid can't have
	// been given to another: runInit has not waited for it before done.
	select {
	case <-s.done:
	default:
		_ = syscall.Kill(initPID, syscall.SIGKILL)
	}
	<-s.done
}

// childOf finds the only child of a process. The program may have ended
// already: then it is 0.
func childOf(pid int) int {
	// By thread (proc_pid_task(5)), where the kernel has CONFIG_PROC_CHILDREN: to look
	// at all processes of the node takes milliseconds.
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, l := range lists {
		b, _ := os.ReadFile(l)
		if child, err := strconv.Atoi(string(bytes.TrimSpace(b))); err == nil {
			return child
		}
	}
	pids, err := proc.PIDs()
	if err != nil {
		return 0
	}
	for _, p := range pids {
		if parentOf(p) == pid {
			return p
		}
	}
	return 0
}

// parentOf is a process's parent; 0 when it is gone.
func parentOf(pid int) int {
	_, parent := procStat(pid)
	return parent
}

// procStat reads a process's state and parent (proc(5): the third and fourth
// field of stat, after the name in parentheses); zeros when it is gone.
func procStat(pid int) (state byte, parent int) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, 0
	}
	return parseStat(b)
}

// parseStat reads the beginning of what procStat is about.
func parseStat(b []byte) (state byte, parent int) {
	i := bytes.LastIndexByte(b, ')')
	if i < 0 || len(b) < i+3 || b[i+1] != ' ' {
		return 0, 0
	}
	ppid, _, _ := bytes.Cut(b[min(len(b), i+4):], []byte{' '})
	parent, _ = strconv.Atoi(string(ppid))
	return b[i+2], parent
}
