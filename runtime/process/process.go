package process

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/creack/pty"

	"github.com/shoalnet/shoal/internal/durable"
	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/runtime"
	"github.com/shoalnet/shoal/spec"
)

// Config of a Runtime.
type Config struct {
	StateDir string   // a directory per task; survives a reboot
	RunDir   string   // sockets; need not. Its path must be short (unix(7): 108 bytes)
	Exe      []string // how to start a helper; empty: this program
	// Cgroup is the parent of the tasks' control groups, below cgroup.Root; empty:
	// they have none.
	Cgroup string
	// Executors run what is in a sandbox when the task names one, by name.
	Executors map[string]runtime.Executor
	// Instance is what the names of this agent's namespaces begin with (see
	// spec.TaskNetns); empty: those of lost tasks are not looked for.
	Instance string
	Hidden   []string // directories of the node that tasks find empty; one that does not exist is no error
	Log      *slog.Logger
}

// Runtime implements runtime.Runtime.
type Runtime struct {
	cfg    Config
	log    *slog.Logger
	ctx    context.Context // of the watchers
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu     sync.Mutex
	tasks  map[string]*entry
	queue  []runtime.Event
	queued chan struct{} // size 1
	swept  sync.Once

	mountsDue chan struct{} // size 1: tasks were adopted

	shimMu   sync.Mutex
	shimPIDs map[string]int // see shims
	shimsAt  time.Time
}

// entry is what is known of a task.
type entry struct {
	status   runtime.Status
	initPID  int
	shim     *os.Process   // when it is this process's child, to be waited for
	watched  chan struct{} // closed when the shim's end is known
	foreign  bool          // an executor runs the program, in a file system of its own
	minded   bool          // its executor is asked for the program's end
	fault    string        // what the task has lost, see mendMounts
	attached int           // how often somebody attached to it
	looker   looker
}

const callTimeout = 10 * time.Second

// New makes a Runtime on the given directories, which may have tasks.
func New(cfg Config) (*Runtime, error) {
	if len(cfg.Exe) == 0 {
		exe, err := os.Executable()
		if err != nil {
			return nil, fmt.Errorf("own executable: %w", err)
		}
		cfg.Exe = []string{exe}
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	for _, d := range []string{cfg.StateDir, cfg.RunDir} {
		if err := durable.MkdirAll(d); err != nil {
			return nil, fmt.Errorf("directory for tasks: %w", err)
		}
	}
	if n := len(cfg.RunDir) + len("/abcdefghijkl.sock"); n > 107 {
		return nil, fmt.Errorf("run directory %s is too long for a unix socket in it: use one shorter by %d characters", cfg.RunDir, n-107)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &Runtime{cfg: cfg, log: cfg.Log, ctx: ctx, cancel: cancel, tasks: map[string]*entry{}, queued: make(chan struct{}, 1), mountsDue: make(chan struct{}, 1)}
	r.wg.Go(r.keepMounts)
	return r, nil
}

// Close implements runtime.Runtime.
func (r *Runtime) Close() error {
	r.cancel()
	r.wg.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.tasks {
		e.looker.close()
	}
	return nil
}

func validID(id string) error {
	if id == "" || strings.ContainsAny(id, "/. ") || len(id) > 40 {
		return fmt.Errorf("task ID %q is not one of ours", id)
	}
	return nil
}

// Create implements runtime.Runtime.
func (r *Runtime) Create(ctx context.Context, t runtime.Task) (_ runtime.Sandbox, err error) {
	if err := validID(t.ID); err != nil {
		return runtime.Sandbox{}, err
	}
	if st, err := r.Status(ctx, t.ID); err == nil {
		return st.Sandbox, nil
	}
	dir := r.taskDir(t.ID)
	if err := errors.Join(durable.MkdirAll(dir), keepOutput(dir)); err != nil {
		return runtime.Sandbox{}, fmt.Errorf("task %s: %w", t.Name, err)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("task %s: %w", t.Name, err)
			if cerr := r.sweep(t.ID, t.Netns); cerr != nil {
				err = fmt.Errorf("%w (and not all of it could be undone: %w)", err, cerr)
			}
		}
	}()
	// The record comes first: it names all that is made after it.
	if err := writeJSON(filepath.Join(dir, taskFile), record{t, r.cfg.Hidden, r.cgroup(t.ID), r.blobDir(t)}); err != nil {
		return runtime.Sandbox{}, err
	}
	if err := r.makeCgroup(t); err != nil {
		return runtime.Sandbox{}, err
	}
	if err := r.writeBlobs(t); err != nil {
		return runtime.Sandbox{}, err
	}
	if t.Executor != "" {
		if _, err := r.executor(t.Executor); err != nil {
			return runtime.Sandbox{}, err
		}
		if err := r.writeFiles(t); err != nil {
			return runtime.Sandbox{}, err
		}
	}
	if t.Netns != "" {
		if err := nl.Create(t.Netns); err != nil {
			return runtime.Sandbox{}, err
		}
	}
	rd, shim, err := r.startShim(ctx, t)
	if err != nil {
		return runtime.Sandbox{}, err
	}
	sb := runtime.Sandbox{Netns: t.Netns, DNSPort: rd.DNSPort}
	r.watch(&entry{status: runtime.Status{ID: t.ID, Name: t.Name, State: runtime.Created, Sandbox: sb, Data: t.Data}, shim: shim, foreign: t.Executor != ""})
	return sb, nil
}

// keepOutput removes all but the output from a task's directory: what an earlier run of it
// left, which may be anything by now.
func keepOutput(dir string) error {
	es, err := os.ReadDir(dir)
	errs := []error{err}
	for _, e := range es {
		if n := e.Name(); n != logFile && !strings.HasPrefix(n, logFile+".") && n != shimLog {
			errs = append(errs, os.RemoveAll(filepath.Join(dir, n)))
		}
	}
	return errors.Join(errs...)
}

// startShim starts the shim in the task's namespace and waits until it serves.
func (r *Runtime) startShim(ctx context.Context, t runtime.Task) (rd ready, p *os.Process, err error) {
	dir := r.taskDir(t.ID)
	pr, pw, err := os.Pipe()
	if err != nil {
		return rd, nil, err
	}
	defer pr.Close()
	errLog, err := durable.Append(filepath.Join(dir, shimLog))
	if err != nil {
		pw.Close()
		return rd, nil, err
	}
	defer errLog.Close()
	args := append(slices.Clone(r.cfg.Exe[1:]), shimWord, dir, r.socket(t.ID))
	cmd := exec.Command(r.cfg.Exe[0], args...)
	cmd.Dir = "/"
	cmd.Stderr = errLog
	cmd.ExtraFiles = []*os.File{pw}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	// A child is born in the namespace of the thread that forks it.
	err = nl.Do(t.Netns, cmd.Start)
	pw.Close()
	if err != nil {
		return rd, nil, fmt.Errorf("start shim: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { pr.SetReadDeadline(time.Now()) })
	defer stop()
	_ = pr.SetReadDeadline(time.Now().Add(callTimeout))
	b, err := readAll(pr, 4096)
	if err == nil {
		err = json.Unmarshal(b, &rd)
	}
	if err == nil && rd.Err != "" {
		err = errors.New(rd.Err)
	}
	if err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return rd, nil, fmt.Errorf("shim: %w", err)
	}
	return rd, cmd.Process, nil
}

// watch registers a task and follows its shim until that ends.
func (r *Runtime) watch(e *entry) {
	e.watched = make(chan struct{})
	id := e.status.ID
	r.mu.Lock()
	r.tasks[id] = e
	r.mu.Unlock()
	r.wg.Go(func() {
		defer close(e.watched)
		r.follow(id, e)
	})
}

func (r *Runtime) follow(id string, e *entry) {
	for {
		r.followOnce(id, e)
		if r.ctx.Err() != nil {
			return
		}
		// Of a shim that has ended, the task's end is on disk; one that lives has only
		// lost this connection.
		r.mu.Lock()
		over := e.status.State == runtime.Exited
		r.mu.Unlock()
		if over || exists(filepath.Join(r.taskDir(id), exitFile)) || !r.shimLives(id) {
			break
		}
		select {
		case <-r.ctx.Done():
			return
		case <-time.After(100 * time.Millisecond):
		}
	}
	if e.shim != nil {
		_, _ = e.shim.Wait() // it is ending: the socket was the last of it
	}
	// The shim is gone. Unless it kept how the task ended, it died before it.
	r.update(e, func() { r.conclude(e) })
}

// followOnce passes on what a task's shim says until the connection ends.
func (r *Runtime) followOnce(id string, e *entry) {
	c, err := r.dial(id)
	if err != nil {
		return
	}
	defer c.Close()
	stop := context.AfterFunc(r.ctx, func() { c.Close() })
	defer stop()
	if send(c, request{Op: "watch"}) != nil {
		return
	}
	for {
		var resp response
		if _, err := receive(c, &resp); err != nil {
			return
		}
		r.update(e, func() {
			data := e.status.Data
			e.status, e.initPID = resp.Status, resp.InitPID
			e.status.Data = data
		})
	}
}

// shimLives tells whether a task's shim is there now.
func (r *Runtime) shimLives(id string) bool {
	pid, ok := r.shims()[id]
	return ok && r.shimOf(pid) == id
}

// conclude sets the status of a task without a shim.
func (r *Runtime) conclude(e *entry) {
	var final runtime.Status
	if err := readJSON(filepath.Join(r.taskDir(e.status.ID), exitFile), &final); err == nil && final.ID == e.status.ID && final.State == runtime.Exited {
		final.Data = e.status.Data
		e.status = final
		return
	}
	if e.status.State != runtime.Exited {
		e.status.State, e.status.PID, e.status.ExitCode, e.status.ExitedAt = runtime.Exited, 0, 137, time.Now()
		e.status.Err = "the task's shim is gone: it was killed, or the machine was restarted"
		_ = writeJSON(filepath.Join(r.taskDir(e.status.ID), exitFile), e.status)
	}
}

func (r *Runtime) update(e *entry, fn func()) {
	r.mu.Lock()
	fn()
	r.queue = append(r.queue, runtime.Event{ID: e.status.ID})
	r.mu.Unlock()
	select {
	case r.queued <- struct{}{}:
	default:
	}
}

// Events implements runtime.Runtime.
func (r *Runtime) Events(ctx context.Context) <-chan runtime.Event {
	out := make(chan runtime.Event)
	r.wg.Go(func() {
		defer close(out)
		for {
			select {
			case <-ctx.Done():
				return
			case <-r.ctx.Done():
				return
			case <-r.queued:
			}
			r.mu.Lock()
			batch := r.queue
			r.queue = nil
			r.mu.Unlock()
			for _, e := range batch {
				select {
				case out <- e:
				case <-ctx.Done():
					return
				case <-r.ctx.Done():
					return
				}
			}
		}
	})
	return out
}

// Status implements runtime.Runtime.
func (r *Runtime) Status(_ context.Context, id string) (runtime.Status, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e := r.tasks[id]
	if e == nil {
		return runtime.Status{}, fmt.Errorf("%w: %s", runtime.ErrNotFound, id)
	}
	return e.status, nil
}

// List implements runtime.Runtime.
func (r *Runtime) List(ctx context.Context) ([]runtime.Status, error) {
	dirs, err := os.ReadDir(r.cfg.StateDir)
	if err != nil {
		return nil, fmt.Errorf("list tasks: %w", err)
	}
	ids := slices.Collect(maps.Keys(r.shims()))
	for _, d := range dirs {
		ids = append(ids, d.Name())
	}
	slices.Sort(ids)
	for _, id := range slices.Compact(ids) {
		if validID(id) != nil {
			continue
		}
		if _, err := r.Status(ctx, id); err == nil {
			continue
		}
		if err := r.adopt(id); err != nil {
			return nil, err
		}
	}
	r.swept.Do(func() {
		if err := r.sweepNamespaces(); err != nil {
			r.log.Warn("the namespaces of lost tasks can't be cleared away", "error", err)
		}
		r.sweepExecutors()
		r.sweepCgroups()
	})
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []runtime.Status
	for _, e := range r.tasks {
		out = append(out, e.status)
	}
	slices.SortFunc(out, func(a, b runtime.Status) int { return strings.Compare(a.ID, b.ID) })
	return out, nil
}

// adopt takes over a task that another process made, or clears away one that it
// had not finished making.
func (r *Runtime) adopt(id string) error {
	dir := r.taskDir(id)
	t, err := r.readRecord(id)
	if err != nil {
		// Its shim, if it has one, knows what the file said.
		was := err
		if t, err = r.recoverRecord(id); err == nil {
			r.log.Warn("the record of a task was lost, and is written again as its shim has it", "task", t.Name, "id", id, "error", was)
		} else {
			netns := r.netnsOf(id)
			if resp, err := r.peek(id); err == nil {
				netns = resp.Status.Sandbox.Netns
			}
			r.log.Warn("clearing away a task whose record is damaged, or was never written", "task", id, "netns", netns, "error", was)
			return r.sweep(id, netns)
		}
	}
	e := &entry{status: runtime.Status{ID: id, Name: t.Name, State: runtime.Created, Sandbox: runtime.Sandbox{Netns: t.Netns}, Data: t.Data}, foreign: t.Executor != ""}
	resp, err := r.peek(id)
	if err == nil {
		e.status, e.initPID = resp.Status, resp.InitPID
		e.status.Data = t.Data
		r.watch(e)
		if x, err := r.executor(t.Executor); err != nil {
			return fmt.Errorf("task %s: %w", t.Name, err)
		} else if x != nil && e.status.State == runtime.Running {
			r.mind(e, x)
		} else if x == nil {
			if err := r.mendFiles(t); err != nil {
				r.log.Warn("the files that a task has in /etc are gone from its directory, and can't be written again", "task", t.Name, "error", err)
			}
		}
		select {
		case r.mountsDue <- struct{}{}:
		default:
		}
		return nil
	}
	if !exists(filepath.Join(dir, exitFile)) && !exists(r.socket(id)) && !exists(filepath.Join(dir, logFile)) {
		r.log.Warn("clearing away a task whose shim was never started", "task", t.Name)
		return r.sweep(id, t.Netns)
	}
	r.conclude(e)
	e.watched = make(chan struct{})
	close(e.watched)
	r.mu.Lock()
	r.tasks[id] = e
	r.mu.Unlock()
	return nil
}

// netnsOf finds a task's namespace by its name, which ends in the task's ID, or the
// beginning of that (spec.TaskNetns); empty: it has none, or more than one may be.
func (r *Runtime) netnsOf(id string) string {
	if r.cfg.Instance == "" || len(id) < 6 {
		return ""
	}
	names, err := nl.List(r.cfg.Instance + "-task-")
	if err != nil {
		return ""
	}
	names = slices.DeleteFunc(names, func(n string) bool {
		return !strings.HasSuffix(n, "-"+id[:6]) && !strings.HasSuffix(n, id)
	})
	if len(names) != 1 {
		return ""
	}
	return names[0]
}

// peek asks a shim for its status.
func (r *Runtime) peek(id string) (response, error) {
	resp, err := r.peekOnce(id)
	if err != nil && r.shimLives(id) {
		resp, err = r.peekOnce(id) // its socket was just being made anew
	}
	return resp, err
}

func (r *Runtime) peekOnce(id string) (response, error) {
	c, err := r.dial(id)
	if err != nil {
		return response{}, err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(callTimeout))
	if err := send(c, request{Op: "watch"}); err != nil {
		return response{}, err
	}
	var resp response
	_, err = receive(c, &resp)
	return resp, err
}

// Start implements runtime.Runtime.
func (r *Runtime) Start(ctx context.Context, id string) error {
	if _, err := r.Status(ctx, id); err != nil {
		return err
	}
	if _, x, err := r.box(id); err != nil {
		return err
	} else if x != nil {
		return r.startForeign(ctx, id)
	}
	resp, _, err := r.call(id, request{Op: "start"}, 0)
	// What the answer says is true now, before the watcher hears of it: also that
	// the program has ended, and how, when it could not be executed.
	r.mu.Lock()
	defer r.mu.Unlock()
	if e := r.tasks[id]; e != nil && e.status.State == runtime.Created && resp.Status.ID == id {
		data := e.status.Data
		e.status, e.initPID = resp.Status, resp.InitPID
		e.status.Data = data
	}
	return err
}

// addressee reads a signal, and tells whether the task that it is for runs.
func (r *Runtime) addressee(ctx context.Context, id, signal string) (sig syscall.Signal, runs bool, err error) {
	if sig, err = spec.ParseSignal(signal); err != nil {
		return 0, false, err
	}
	st, err := r.Status(ctx, id)
	return sig, err == nil && st.State == runtime.Running, err
}

// Signal implements runtime.Runtime.
func (r *Runtime) Signal(ctx context.Context, id, signal string) error {
	sig, runs, err := r.addressee(ctx, id, signal)
	if err != nil {
		return err
	}
	if !runs {
		return errors.New("its program does not run")
	}
	_, _, err = r.call(id, request{Op: "signal", Signal: int(sig)}, callTimeout)
	return err
}

// Stop implements runtime.Runtime.
func (r *Runtime) Stop(ctx context.Context, id, signal string, grace time.Duration) error {
	sig, runs, err := r.addressee(ctx, id, signal)
	if err != nil {
		return err
	}
	if !runs {
		return nil
	}
	if _, x, err := r.box(id); err != nil {
		return err
	} else if x != nil {
		return r.stopForeign(ctx, id, x, sig, grace)
	}
	// The shim counts the grace; this process may end meanwhile.
	done := make(chan error, 1)
	c, err := r.dial(id)
	if err != nil {
		return r.settle(ctx, id)
	}
	defer c.Close()
	go func() {
		if err := send(c, request{Op: "stop", Signal: int(sig), Grace: grace}); err != nil {
			done <- nil // the shim has ended, and with it the task
			return
		}
		var resp response
		_, _ = receive(c, &resp)
		done <- nil
	}()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-done:
		return r.settle(ctx, id)
	}
}

// Halt implements runtime.Runtime.
func (r *Runtime) Halt(ctx context.Context, id, signal string, grace time.Duration) error {
	// A shim of an earlier version does not know of it; nor can one that is gone say more.
	if _, _, err := r.call(id, request{Op: "halt"}, callTimeout); err != nil {
		r.log.Debug("the end of a task will be taken for its own", "task", id, "error", err)
	}
	return r.Stop(ctx, id, signal, grace)
}

// settle waits until this process knows of a task's end.
func (r *Runtime) settle(ctx context.Context, id string) error {
	for deadline := time.Now().Add(callTimeout); ; {
		st, err := r.Status(ctx, id)
		if err != nil || st.State == runtime.Exited {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("task %s: its shim does not tell of its end", st.Name)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// Release implements runtime.Runtime.
func (r *Runtime) Release(ctx context.Context, id string) error {
	st, err := r.Status(ctx, id)
	if errors.Is(err, runtime.ErrNotFound) {
		return nil
	}
	if err := r.releaseForeign(ctx, id); err != nil {
		return err
	}
	r.mu.Lock()
	e := r.tasks[id]
	r.mu.Unlock()
	if st.State == runtime.Created && !exists(filepath.Join(r.taskDir(id), exitFile)) {
		// It never ran: that is how it ended.
		r.mu.Lock()
		final := e.status
		r.mu.Unlock()
		final.State, final.ExitedAt, final.Err = runtime.Exited, time.Now(), "it was not started"
		if err := writeJSON(filepath.Join(r.taskDir(id), exitFile), final); err != nil {
			return fmt.Errorf("task %s: %w", st.Name, err)
		}
	}
	if _, _, err := r.call(id, request{Op: "shutdown"}, 0); err == nil || e.watched != nil {
		select {
		case <-e.watched:
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(callTimeout):
			return fmt.Errorf("task %s: its shim does not end", st.Name)
		}
	}
	e.looker.close()
	if err := os.RemoveAll(r.socket(id)); err != nil {
		return err
	}
	if err := errors.Join(r.removeBlobs(id), r.removeCgroup(id)); err != nil {
		return fmt.Errorf("task %s: %w", st.Name, err)
	}
	if st.Sandbox.Netns == "" {
		return nil
	}
	return nl.Remove(st.Sandbox.Netns)
}

// Renew implements runtime.Runtime.
func (r *Runtime) Renew(ctx context.Context, id string) error {
	st, err := r.Status(ctx, id)
	if errors.Is(err, runtime.ErrNotFound) {
		return nil
	}
	if st.State != runtime.Exited {
		return fmt.Errorf("task %s is %s: only one that has ended can be made anew", st.Name, st.State)
	}
	// First what it is known by: a task without either has been cut down in between, and
	// has ended, for the next agent.
	r.mu.Lock()
	delete(r.tasks, id)
	r.mu.Unlock()
	if err := os.Remove(filepath.Join(r.taskDir(id), exitFile)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("task %s: %w", st.Name, err)
	}
	return nil
}

// Remove implements runtime.Runtime.
func (r *Runtime) Remove(ctx context.Context, id string) error {
	if err := validID(id); err != nil {
		return err
	}
	if _, err := r.Status(ctx, id); errors.Is(err, runtime.ErrNotFound) {
		if !exists(r.taskDir(id)) {
			return nil
		}
		if err := r.adopt(id); err != nil {
			return err
		}
	}
	if err := r.Release(ctx, id); err != nil {
		return err
	}
	if _, err := r.ofExecutor(id, func(x runtime.Executor) error { return x.Remove(ctx, id) }); err != nil {
		return err
	}
	if err := os.RemoveAll(r.taskDir(id)); err != nil {
		return fmt.Errorf("remove task %s: %w", id, err)
	}
	r.mu.Lock()
	delete(r.tasks, id)
	r.mu.Unlock()
	return nil
}

// sweep removes what a Create that did not finish left.
func (r *Runtime) sweep(id, netns string) error {
	errs := []error{}
	if _, _, err := r.call(id, request{Op: "shutdown"}, callTimeout); err == nil {
		r.log.Debug("ended the shim of an unfinished task", "task", id)
	}
	errs = append(errs, os.RemoveAll(r.socket(id)), r.removeBlobs(id), r.removeCgroup(id))
	if netns != "" {
		errs = append(errs, nl.Remove(netns))
	}
	return errors.Join(append(errs, os.RemoveAll(r.taskDir(id)))...)
}

// DNSSockets implements runtime.Runtime.
func (r *Runtime) DNSSockets(ctx context.Context, id string) (net.PacketConn, net.Listener, error) {
	if _, err := r.Status(ctx, id); err != nil {
		return nil, nil, err
	}
	_, files, err := r.call(id, request{Op: "dns"}, callTimeout)
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	if err != nil {
		return nil, nil, err
	}
	if len(files) != 2 {
		return nil, nil, fmt.Errorf("shim sent %d sockets, want 2", len(files))
	}
	pc, err := net.FilePacketConn(files[0])
	if err != nil {
		return nil, nil, err
	}
	ln, err := net.FileListener(files[1])
	if err != nil {
		pc.Close()
		return nil, nil, err
	}
	return pc, ln, nil
}

// Listening implements runtime.Runtime.
func (r *Runtime) Listening(ctx context.Context, id string, all bool) (runtime.Sockets, error) {
	r.mu.Lock()
	e := r.tasks[id]
	initPID, pid, ns := 0, 0, ""
	if e != nil {
		initPID, pid, ns = e.initPID, e.status.PID, e.status.Sandbox.Netns
	}
	r.mu.Unlock()
	if initPID == 0 || pid != 0 && e.looker.stopped(pid) {
		return runtime.Sockets{}, nil
	}
	if !all && e.looker.servesTCP(ns) {
		return runtime.Sockets{Serves: 1}, nil
	}
	var up nl.Sockets
	err := nl.Do(ns, func() (err error) {
		up, err = nl.Listening(all)
		return err
	})
	return runtime.Sockets{Serves: up.Serves, Maybe: up.Maybe}, err
}

// Reset implements runtime.Runtime.
func (r *Runtime) Reset(_ context.Context, id string, addrs []netip.Addr) error {
	r.mu.Lock()
	e := r.tasks[id]
	ns := ""
	if e != nil {
		ns = e.status.Sandbox.Netns
	}
	r.mu.Unlock()
	if e == nil {
		return runtime.ErrNotFound
	}
	if ns == "" {
		return nil // the node's own: none of its addresses is the task's
	}
	return nl.Do(ns, func() error {
		_, err := nl.ResetTCP(addrs)
		return err
	})
}

// looker asks a task's namespace whether its program serves, which is done each second of
// each replica.
type looker struct {
	mu   sync.Mutex
	diag *nl.Diag
	over bool // the namespace is to go
	// stat is /proc/PID/stat of the process pid: to find and open it costs more than to
	// read it. It tells of that process only, or of none (ESRCH), whoever has its ID.
	stat *os.File
	pid  int
}

// stopped is stopped of a task's program.
func (l *looker) stopped(pid int) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.over {
		return false
	}
	if l.stat == nil || l.pid != pid {
		if l.stat != nil {
			l.stat.Close()
		}
		var err error
		if l.stat, err = os.Open(fmt.Sprintf("/proc/%d/stat", pid)); err != nil {
			l.stat = nil
			return false
		}
		l.pid = pid
	}
	var b [512]byte                // the name is 15 bytes long at most, the state follows it
	n, _ := l.stat.ReadAt(b[:], 0) // io.EOF comes with what there is
	if st, _ := parseStat(b[:n]); st != 'T' {
		return false
	}
	return stopped(pid)
}

// servesTCP tells whether a TCP socket accepts connections from elsewhere in a namespace;
// false also when that can't be known this way.
func (l *looker) servesTCP(ns string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.over || ns == "" {
		return false
	}
	if l.diag == nil {
		d, err := nl.OpenDiag(ns)
		if err != nil {
			return false
		}
		l.diag = d
	}
	serves, err := l.diag.ServesTCP()
	if err != nil { // what came of it is not to be taken for the next answer
		l.diag.Close()
		l.diag = nil
	}
	return serves && err == nil
}

// close lets the namespace go.
func (l *looker) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.over = true; l.diag != nil {
		l.diag.Close()
		l.diag = nil
	}
	if l.stat != nil {
		l.stat.Close()
		l.stat = nil
	}
}

// stopped tells whether a process and all that come from it are stopped by a
// signal (proc(5): state T): it accepts connections only as far as the kernel
// does.
func stopped(pid int) bool {
	st, _ := procStat(pid)
	if st != 'T' {
		return false
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return true
	}
	for _, f := range strings.Fields(string(b)) {
		if child, err := strconv.Atoi(f); err == nil && !stopped(child) {
			return false
		}
	}
	return true
}

// ---- exec ----

type process struct {
	cmd  *exec.Cmd
	tty  *os.File
	done chan struct{}
	code int
	err  error
}

// Exec implements runtime.Runtime.
func (r *Runtime) Exec(ctx context.Context, id string, s runtime.ExecSpec) (runtime.Process, error) {
	st, err := r.Status(ctx, id)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	initPID := r.tasks[id].initPID
	r.mu.Unlock()
	if st.State != runtime.Running || initPID == 0 {
		return nil, fmt.Errorf("task %s is not running: it is %s", st.Name, st.State)
	}
	if len(s.Command) == 0 {
		return nil, errors.New("no command")
	}
	refresh(initPID) // the command's user may be new on the node
	args, err := json.Marshal(execArgs{Dir: r.taskDir(id), InitPID: initPID, Command: s.Command, Env: s.Env, WorkDir: s.Dir, User: s.User, TTY: s.TTY && !s.Detach, Detach: s.Detach})
	if err != nil {
		return nil, err
	}
	pr, pw, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer pr.Close()
	cmd := exec.CommandContext(ctx, r.cfg.Exe[0], append(slices.Clone(r.cfg.Exe[1:]), execWord)...)
	cmd.ExtraFiles = []*os.File{pr}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Cancel = pw.Close // task-exec kills the command, then ends
	p := &process{cmd: cmd, done: make(chan struct{})}
	var slave *os.File
	if s.TTY {
		if p.tty, slave, err = pty.Open(); err != nil {
			pw.Close()
			return nil, fmt.Errorf("terminal: %w", err)
		}
		defer slave.Close()
		if s.Rows > 0 && s.Cols > 0 {
			_ = pty.Setsize(p.tty, &pty.Winsize{Rows: s.Rows, Cols: s.Cols})
		}
		cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	}
	var outs []*output
	if !s.TTY {
		for _, o := range []struct {
			to   io.Writer
			file *io.Writer
		}{{s.Stdout, &cmd.Stdout}, {s.Stderr, &cmd.Stderr}} {
			if o.to == nil {
				continue
			}
			r, w, err := os.Pipe()
			if err != nil {
				pw.Close()
				for _, o := range outs {
					o.r.Close()
				}
				return nil, err
			}
			defer w.Close()
			*o.file = w
			outs = append(outs, &output{r: r, w: o.to})
		}
	}
	// Standard input is copied by hand: exec's own copy makes Wait wait for an
	// input that nobody ends.
	var stdin io.WriteCloser
	if !s.TTY && s.Stdin != nil {
		if stdin, err = cmd.StdinPipe(); err != nil {
			pw.Close()
			return nil, err
		}
	}
	if err := cmd.Start(); err != nil {
		pw.Close()
		for _, o := range outs {
			o.r.Close()
		}
		if p.tty != nil {
			p.tty.Close()
		}
		return nil, err
	}
	if _, err := pw.Write(append(args, '\n')); err != nil {
		_ = cmd.Process.Kill()
	}
	if stdin != nil {
		go func() { // ends when the command, or the caller's input, does
			_, _ = io.Copy(stdin, s.Stdin)
			endInput(s.Stdin)
			stdin.Close()
		}()
	}
	var copies sync.WaitGroup
	for _, o := range outs {
		copies.Go(o.copy)
	}
	copied := make(chan struct{})
	close(copied)
	if p.tty != nil {
		copied = make(chan struct{})
		go func() {
			defer close(copied)
			_, _ = io.Copy(s.Stdout, p.tty) // EIO when the last holder closes
		}()
		if s.Stdin != nil {
			go func() { _, _ = io.Copy(p.tty, s.Stdin) }()
		}
	}
	r.wg.Go(func() {
		defer close(p.done)
		err := cmd.Wait()
		pw.Close()
		for _, o := range outs {
			o.end()
		}
		copies.Wait()
		if p.tty != nil {
			select {
			case <-copied:
			case <-time.After(leftBehind):
			}
			p.tty.Close()
		}
		var ee *exec.ExitError
		switch {
		case err == nil:
			p.code = cmd.ProcessState.ExitCode()
		case errors.As(err, &ee):
			if p.code = ee.ExitCode(); p.code < 0 {
				p.code = 128 + int(ee.Sys().(syscall.WaitStatus).Signal())
			}
		default:
			p.err = err
		}
	})
	return p, nil
}

// leftBehind is how long the output of a command that has ended may be held open
// by what it left behind.
const leftBehind = 2 * time.Second

// output carries what a command writes. When the command has ended, all that it
// wrote is passed on, however slow the receiver is; what it left behind is not
// waited for.
type output struct {
	r *os.File
	w io.Writer
}

func (o *output) copy() {
	defer o.r.Close()
	buf := make([]byte, 32<<10)
	rest := 1 << 20 // more than a pipe holds: pipe(7)
	for {
		n, err := o.r.Read(buf)
		if n > 0 {
			if _, werr := o.w.Write(buf[:n]); werr != nil {
				return
			}
		}
		if errors.Is(err, os.ErrDeadlineExceeded) && rest > 0 {
			// The time was perhaps the receiver's: what is there now counts.
			_ = o.r.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
			if n, err = o.r.Read(buf[:min(len(buf), rest)]); n > 0 {
				if _, werr := o.w.Write(buf[:n]); werr != nil {
					return
				}
				rest -= n
				continue
			}
		}
		if err != nil {
			return
		}
	}
}

// end tells that the command has ended.
func (o *output) end() { _ = o.r.SetReadDeadline(time.Now().Add(leftBehind)) }

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

func (p *process) Signal(sig int) error { return p.cmd.Process.Signal(syscall.Signal(sig)) }

var _ runtime.Runtime = (*Runtime)(nil)
