package proc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/shoalnet/shoal/internal/nl"
	"github.com/shoalnet/shoal/runtime"
)

// Config of a Runtime.
type Config struct {
	StateDir string   // a directory per task; survives a reboot
	RunDir   string   // the shims' sockets; need not survive. Empty: StateDir
	Exe      []string // how to start a helper, which Dispatch gets; empty: this program
	Log      *slog.Logger
}

// Runtime implements runtime.Runtime. There may be one per StateDir at a time.
type Runtime struct {
	cfg     Config
	log     *slog.Logger
	cgroups cgroups
	ctx     context.Context // of the watchers
	cancel  context.CancelFunc
	wg      sync.WaitGroup

	mu     sync.Mutex
	closed bool
	tasks  map[string]*entry
	locks  map[string]*sync.Mutex // one per ID that is being made, adopted or removed
	queue  map[string]bool        // IDs of tasks that changed
	queued chan struct{}          // size 1
}

// entry is what is known of a task. Its status and init belong to Runtime.mu.
type entry struct {
	id, name, netns string
	shim            *os.Process   // when it is this process's child, to be waited for
	gone            chan struct{} // closed when the shim's end is known, and how the task ended

	status runtime.Status
	init   procID
}

// callTimeout bounds what a shim does at once.
const callTimeout = 10 * time.Second

var errClosed = errors.New("the runtime is closed")

// New makes a Runtime on the given directories, which may have tasks.
func New(cfg Config) (*Runtime, error) {
	if len(cfg.Exe) == 0 {
		// Still the right one after the file was replaced.
		cfg.Exe = []string{"/proc/self/exe"}
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	if cfg.RunDir == "" {
		cfg.RunDir = cfg.StateDir
	}
	for _, d := range []*string{&cfg.StateDir, &cfg.RunDir} {
		abs, err := filepath.Abs(*d) // shims run in /
		if err != nil {
			return nil, fmt.Errorf("directory for tasks: %w", err)
		}
		if err := os.MkdirAll(abs, 0o700); err != nil {
			return nil, fmt.Errorf("directory for tasks: %w", err)
		}
		*d = abs
	}
	ctx, cancel := context.WithCancel(context.Background())
	return &Runtime{cfg: cfg, log: cfg.Log, cgroups: findCgroups(), ctx: ctx, cancel: cancel,
		tasks: map[string]*entry{}, locks: map[string]*sync.Mutex{}, queue: map[string]bool{}, queued: make(chan struct{}, 1)}, nil
}

// Close implements runtime.Runtime. Commands of Exec are hung up.
func (r *Runtime) Close() error {
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.cancel()
	r.wg.Wait()
	return nil
}

// begin counts a goroutine in, which then owes r.wg.Done, unless it is too late.
func (r *Runtime) begin() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return false
	}
	r.wg.Add(1)
	return true
}

// validID guards the file system: an ID becomes a name there.
func validID(id string) error {
	if id == "" || strings.ContainsAny(id, "/. \x00") || len(id) > 40 {
		return fmt.Errorf("task ID %q is not one of ours", id)
	}
	return nil
}

// taskDir is where a task's files are.
func (r *Runtime) taskDir(id string) string { return filepath.Join(r.cfg.StateDir, id) }

// socket of a task's shim.
func (r *Runtime) socket(id string) string { return filepath.Join(r.cfg.RunDir, id+".sock") }

// lock makes one at a time of what makes, adopts and removes a task.
func (r *Runtime) lock(id string) (unlock func()) {
	r.mu.Lock()
	m := r.locks[id]
	if m == nil {
		m = &sync.Mutex{}
		r.locks[id] = m
	}
	r.mu.Unlock()
	m.Lock()
	return m.Unlock
}

// known returns a task that this Runtime has made or adopted.
func (r *Runtime) known(id string) *entry {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.tasks[id]
}

// get returns a task, adopted if need be.
func (r *Runtime) get(id string) (*entry, error) {
	if err := validID(id); err != nil {
		return nil, err
	}
	if e := r.known(id); e != nil {
		return e, nil
	}
	defer r.lock(id)()
	return r.getLocked(id)
}

func (r *Runtime) getLocked(id string) (*entry, error) {
	e := r.known(id)
	if e == nil && exists(r.taskDir(id)) {
		var err error
		if e, err = r.adopt(id); err != nil {
			return nil, err
		}
	}
	if e == nil {
		return nil, fmt.Errorf("%w: %s", runtime.ErrNotFound, id)
	}
	return e, nil
}

// Create implements runtime.Runtime.
func (r *Runtime) Create(ctx context.Context, t runtime.Task) (runtime.Sandbox, error) {
	if err := validID(t.ID); err != nil {
		return runtime.Sandbox{}, err
	}
	if t.Netns == "" || strings.ContainsAny(t.Netns, "/\x00") || t.Netns == "." || t.Netns == ".." {
		return runtime.Sandbox{}, fmt.Errorf("task %s: %q can't name a network namespace", t.Name, t.Netns)
	}
	defer r.lock(t.ID)()
	e, err := r.getLocked(t.ID)
	if err == nil {
		r.mu.Lock()
		defer r.mu.Unlock()
		return e.status.Sandbox, nil
	}
	if !errors.Is(err, runtime.ErrNotFound) {
		return runtime.Sandbox{}, err
	}
	sb, err := r.create(ctx, t)
	if err != nil {
		err = fmt.Errorf("task %s: %w", t.Name, err)
		if cerr := r.sweep(t.ID, t.Netns); cerr != nil {
			err = fmt.Errorf("%w (and not all of it could be undone: %w)", err, cerr)
		}
	}
	return sb, err
}

func (r *Runtime) create(ctx context.Context, t runtime.Task) (sb runtime.Sandbox, err error) {
	dir := r.taskDir(t.ID)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return sb, err
	}
	// The record comes first: it names all that is made after it.
	if err := writeJSON(filepath.Join(dir, taskFile), t); err != nil {
		return sb, err
	}
	if err := nl.Create(t.Netns); err != nil {
		return sb, err
	}
	cmd, peer, err := r.startShim(t)
	if err != nil {
		return sb, err
	}
	defer peer.Close() // which tells the shim that shim.json is there, or never will be
	defer func() {
		if err != nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	}()
	stop := context.AfterFunc(ctx, func() { peer.Close() })
	_ = peer.SetReadDeadline(time.Now().Add(callTimeout))
	rd, err := readReady(peer)
	if !stop() && ctx.Err() != nil {
		return sb, ctx.Err()
	}
	if err != nil {
		return sb, fmt.Errorf("shim: %w%s", err, lastWords(dir))
	}
	if err := r.cgroups.enter(t.ID, cmd.Process.Pid); err != nil {
		r.log.Debug("the task gets no control group", "task", t.Name, "error", err)
	}
	id, err := identify(cmd.Process.Pid)
	if err != nil {
		return sb, fmt.Errorf("shim: %w", err)
	}
	if err := writeJSON(filepath.Join(dir, shimFile), shimRecord{Shim: id, DNSPort: rd.DNSPort}); err != nil {
		return sb, err
	}
	sb = runtime.Sandbox{Netns: t.Netns, DNSPort: rd.DNSPort}
	e := &entry{id: t.ID, name: t.Name, netns: t.Netns, shim: cmd.Process, status: runtime.Status{ID: t.ID, Name: t.Name, State: runtime.Created, Sandbox: sb, Data: t.Data}}
	if !r.register(e) {
		return sb, errClosed
	}
	return sb, nil
}

// startShim starts the shim in the task's network namespace.
func (r *Runtime) startShim(t runtime.Task) (*exec.Cmd, *net.UnixConn, error) {
	dir := r.taskDir(t.ID)
	peer, child, err := socketPair()
	if err != nil {
		return nil, nil, err
	}
	defer child.Close()
	files := []*os.File{child} // shimPeerFD, shimLockFD
	lock, err := openLock(dir)
	if err == nil {
		defer lock.Close() // the shim's copy goes on holding it
		files = append(files, lock)
		err = syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	}
	if err != nil {
		peer.Close()
		return nil, nil, fmt.Errorf("lock: %w", err)
	}
	words, err := os.OpenFile(filepath.Join(dir, shimLogFile), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		peer.Close()
		return nil, nil, err
	}
	defer words.Close()
	cmd := exec.Command(r.cfg.Exe[0], append(slices.Clone(r.cfg.Exe[1:]), shimWord, dir, r.socket(t.ID))...)
	cmd.Dir = "/"
	cmd.Stderr = words
	cmd.ExtraFiles = files
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	// A child is born in the namespaces of the thread that forks it.
	if err := nl.Do(t.Netns, cmd.Start); err != nil {
		peer.Close()
		return nil, nil, fmt.Errorf("start shim: %w", err)
	}
	return cmd, peer, nil
}

// lastWords returns what a shim that crashed said first.
func lastWords(dir string) string {
	b, err := os.ReadFile(filepath.Join(dir, shimLogFile))
	line, _, _ := strings.Cut(strings.TrimSpace(string(b)), "\n")
	if err != nil || line == "" {
		return ""
	}
	return ": " + line[:min(len(line), 200)]
}

// register makes a task known and follows its shim until that ends.
func (r *Runtime) register(e *entry) bool {
	if !r.begin() {
		return false
	}
	e.gone = make(chan struct{})
	r.mu.Lock()
	r.tasks[e.id] = e
	r.mu.Unlock()
	go func() {
		defer r.wg.Done()
		r.follow(e)
	}()
	return true
}

// follow takes in what a shim tells. It returns when the shim has ended, or
// this Runtime is closed.
func (r *Runtime) follow(e *entry) {
	for {
		err := r.listen(e)
		if r.ctx.Err() != nil {
			return
		}
		// The end of the connection is not yet that of the shim: this process
		// may be out of files, say. The lock tells.
		if lockFree(r.taskDir(e.id), time.Second) {
			break
		}
		r.log.Warn("connection to a task's shim is lost; trying again", "task", e.name, "error", err)
		if !r.pause(100 * time.Millisecond) {
			return
		}
	}
	if e.shim != nil {
		_, _ = e.shim.Wait() // locks go in the course of its end
	}
	r.conclude(e)
	close(e.gone)
}

func (r *Runtime) pause(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-r.ctx.Done():
		return false
	}
}

// listen watches a shim until the connection ends.
func (r *Runtime) listen(e *entry) error {
	c, err := dialShim(r.socket(e.id))
	if err != nil {
		return err
	}
	defer c.Close()
	stop := context.AfterFunc(r.ctx, func() { c.Close() })
	defer stop()
	if err := send(c, request{Op: opWatch}); err != nil {
		return err
	}
	for {
		var resp response
		files, err := receive(c, &resp)
		for _, f := range files {
			f.Close()
		}
		if err != nil {
			return err
		}
		r.take(e, resp)
	}
}

// take sets a task's status to what its shim says.
func (r *Runtime) take(e *entry, resp response) {
	r.update(e, func() {
		// An older answer may come by another connection after a newer one.
		if rank(resp.Status.State) < rank(e.status.State) {
			return
		}
		data := e.status.Data
		e.status, e.init = resp.Status, resp.Init
		e.status.Data = data
	})
}

func rank(s runtime.State) int {
	return slices.Index([]runtime.State{runtime.Created, runtime.Running, runtime.Exited}, s)
}

// conclude sets the status of a task whose shim has ended. Unless the shim kept
// how the task ended, it died before it, and so did the task, or it does now.
func (r *Runtime) conclude(e *entry) {
	dir := r.taskDir(e.id)
	var errs []error
	var run runRecord
	if err := readJSON(filepath.Join(dir, runFile), &run); err == nil {
		errs = append(errs, run.Init.kill(callTimeout))
	}
	errs = append(errs, r.cgroups.remove(e.id))
	if err := errors.Join(errs...); err != nil {
		r.log.Error("not all of a task could be ended", "task", e.name, "error", err)
	}
	var final runtime.Status
	if err := readJSON(filepath.Join(dir, exitFile), &final); err != nil {
		r.mu.Lock()
		final = e.status
		r.mu.Unlock()
		if final.State != runtime.Exited { // else the shim told, but could not write it
			final.State, final.PID, final.ExitCode, final.ExitedAt = runtime.Exited, 0, 128+int(syscall.SIGKILL), time.Now()
			final.Err = "the task's shim was killed, and the task with it" + lastWords(dir)
			var rec shimRecord
			if err := readJSON(filepath.Join(dir, shimFile), &rec); err == nil && rec.Shim.Boot != bootID() {
				final.Err = "the machine was restarted"
			}
		}
		kept := final
		kept.Data = nil // in task.json
		if err := writeJSON(filepath.Join(dir, exitFile), kept); err != nil && !errors.Is(err, os.ErrNotExist) {
			r.log.Error("the end of a task can't be kept", "task", final.Name, "error", err)
		}
	}
	r.update(e, func() {
		final.Data = e.status.Data
		e.status = final
	})
}

// update changes a task's status and has Events tell of it.
func (r *Runtime) update(e *entry, fn func()) {
	r.mu.Lock()
	fn()
	r.queue[e.id] = true
	r.mu.Unlock()
	select {
	case r.queued <- struct{}{}:
	default:
	}
}

// Events implements runtime.Runtime. Changes of one task that nobody has taken
// yet are one event.
func (r *Runtime) Events(ctx context.Context) <-chan runtime.Event {
	out := make(chan runtime.Event)
	if !r.begin() {
		close(out)
		return out
	}
	go func() {
		defer r.wg.Done()
		defer close(out)
		for {
			r.mu.Lock()
			ids := slices.Sorted(maps.Keys(r.queue))
			clear(r.queue)
			r.mu.Unlock()
			for _, id := range ids {
				select {
				case out <- runtime.Event{ID: id}:
				case <-ctx.Done():
					return
				case <-r.ctx.Done():
					return
				}
			}
			select {
			case <-ctx.Done():
				return
			case <-r.ctx.Done():
				return
			case <-r.queued:
			}
		}
	}()
	return out
}

// Status implements runtime.Runtime.
func (r *Runtime) Status(_ context.Context, id string) (runtime.Status, error) {
	e, err := r.get(id)
	if err != nil {
		return runtime.Status{}, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return e.status, nil
}

// List implements runtime.Runtime. It goes on past a task that can't be
// adopted, and returns the others with the error.
func (r *Runtime) List(ctx context.Context) ([]runtime.Status, error) {
	dirs, err := os.ReadDir(r.cfg.StateDir)
	if err != nil {
		return nil, fmt.Errorf("list tasks: %w", err)
	}
	var errs []error
	for _, d := range dirs {
		if validID(d.Name()) != nil || !d.IsDir() {
			continue
		}
		if _, err := r.get(d.Name()); err != nil && !errors.Is(err, runtime.ErrNotFound) {
			errs = append(errs, err)
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []runtime.Status
	for _, id := range slices.Sorted(maps.Keys(r.tasks)) {
		out = append(out, r.tasks[id].status)
	}
	return out, errors.Join(errs...)
}

// adopt takes over a task that another process made, or clears away one that it
// had not finished making: then both results are nil. The caller has the lock.
func (r *Runtime) adopt(id string) (*entry, error) {
	dir := r.taskDir(id)
	var t runtime.Task
	terr := readJSON(filepath.Join(dir, taskFile), &t)
	var rec shimRecord
	if err := errors.Join(terr, readJSON(filepath.Join(dir, shimFile), &rec)); err != nil {
		r.log.Warn("clearing away a task that was never quite made", "task", id, "reason", err)
		return nil, r.sweep(id, t.Netns)
	}
	e := &entry{id: id, name: t.Name, netns: t.Netns, status: runtime.Status{ID: id, Name: t.Name, State: runtime.Created,
		Sandbox: runtime.Sandbox{Netns: t.Netns, DNSPort: rec.DNSPort}, Data: t.Data}}
	ctx, cancel := context.WithTimeout(r.ctx, callTimeout)
	defer cancel()
	var resp response
	var err error
	for lockHeld(dir) {
		// A shim that lives serves. The first moments excepted: the lock is
		// also held for an instant by whoever forks or asks.
		if resp, _, err = call(ctx, r.socket(id), request{Op: opStatus}); err == nil {
			r.take(e, resp)
			if !r.register(e) {
				return nil, errClosed
			}
			return e, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("task %s: its shim (process %d) does not answer: %w", t.Name, rec.Shim.PID, err)
		case <-time.After(5 * time.Millisecond):
		}
	}
	e.gone = make(chan struct{})
	close(e.gone)
	r.conclude(e)
	r.mu.Lock()
	r.tasks[id] = e
	r.mu.Unlock()
	return e, nil
}

// Start implements runtime.Runtime. A task that was started is not started
// again: the answer is that of the first time.
func (r *Runtime) Start(ctx context.Context, id string) error {
	e, err := r.get(id)
	if err != nil {
		return err
	}
	resp, _, err := call(ctx, r.socket(id), request{Op: opStart})
	if err != nil {
		return err
	}
	// What the answer says is true now, before the watcher hears of it.
	r.take(e, resp)
	return nil
}

// Stop implements runtime.Runtime. The shim counts the grace; this process may
// end meanwhile.
func (r *Runtime) Stop(ctx context.Context, id, signal string, grace time.Duration) error {
	sig, err := ParseSignal(signal)
	if err != nil {
		return err
	}
	e, err := r.get(id)
	if err != nil {
		return err
	}
	r.mu.Lock()
	exited := e.status.State == runtime.Exited
	r.mu.Unlock()
	if exited {
		return nil
	}
	resp, _, err := call(ctx, r.socket(id), request{Op: opStop, Signal: int(sig), Grace: grace})
	if err == nil {
		r.take(e, resp)
		return nil
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	// If the shim has died the task has ended, too, as was asked for.
	select {
	case <-e.gone:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(callTimeout):
		return fmt.Errorf("stop task %s: %w", e.name, err)
	}
}

// Release implements runtime.Runtime.
func (r *Runtime) Release(ctx context.Context, id string) error {
	if err := validID(id); err != nil {
		return err
	}
	defer r.lock(id)()
	return r.release(ctx, id)
}

func (r *Runtime) release(ctx context.Context, id string) error {
	e, err := r.getLocked(id)
	if errors.Is(err, runtime.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := r.endShim(ctx, e); err != nil {
		return fmt.Errorf("task %s: %w", e.name, err)
	}
	if err := os.Remove(r.socket(id)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("task %s: %w", e.name, err)
	}
	if err := r.cgroups.remove(id); err != nil {
		return fmt.Errorf("task %s: %w", e.name, err)
	}
	return nl.Remove(e.netns)
}

// endShim ends a task's shim and all of the task, and waits for it.
func (r *Runtime) endShim(ctx context.Context, e *entry) error {
	select {
	case <-e.gone:
		return nil
	default:
	}
	cctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	_, _, err := call(cctx, r.socket(e.id), request{Op: opShutdown})
	if err == nil {
		select {
		case <-e.gone:
			return nil
		case <-cctx.Done():
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	// It does not do as it is told, or is being killed by somebody else.
	var rec shimRecord
	if err := readJSON(filepath.Join(r.taskDir(e.id), shimFile), &rec); err != nil {
		return err
	}
	if err := rec.Shim.kill(callTimeout); err != nil {
		return err
	}
	select {
	case <-e.gone:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(2 * callTimeout):
		return errors.New("its shim does not end")
	case <-r.ctx.Done():
		return errClosed
	}
}

// Remove implements runtime.Runtime.
func (r *Runtime) Remove(ctx context.Context, id string) error {
	if err := validID(id); err != nil {
		return err
	}
	defer r.lock(id)()
	if err := r.release(ctx, id); err != nil {
		return err
	}
	if err := os.RemoveAll(r.taskDir(id)); err != nil {
		return fmt.Errorf("remove task %s: %w", id, err)
	}
	r.mu.Lock()
	delete(r.tasks, id)
	delete(r.queue, id)
	delete(r.locks, id) // IDs are not used again; a late comer finds nothing under a new lock
	r.mu.Unlock()
	return nil
}

// sweep removes what a Create that did not finish left. Its shim ends by
// itself, because nobody completes it.
func (r *Runtime) sweep(id, netns string) error {
	dir := r.taskDir(id)
	if !lockFree(dir, callTimeout) {
		return fmt.Errorf("task %s: the shim of an unfinished task does not end", id)
	}
	var errs []error
	if err := os.Remove(r.socket(id)); err != nil && !errors.Is(err, os.ErrNotExist) {
		errs = append(errs, err)
	}
	errs = append(errs, r.cgroups.remove(id))
	if netns != "" {
		errs = append(errs, nl.Remove(netns))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("task %s: %w", id, err) // the record stays, to try again by
	}
	return os.RemoveAll(dir)
}

// DNSSockets implements runtime.Runtime.
func (r *Runtime) DNSSockets(ctx context.Context, id string) (net.PacketConn, net.Listener, error) {
	if _, err := r.get(id); err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	_, files, err := call(ctx, r.socket(id), request{Op: opDNS})
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
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

var _ runtime.Runtime = (*Runtime)(nil)
