package process

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/runtime"
	"github.com/shoalnet/shoal/spec"
)

// What an executor runs is in the sandbox of a shim like any task's program, but
// is no child of the shim's: the agent tells the shim when it runs and how it
// ended, and its streams come by FIFOs whose other ends the shim holds. So the
// output is kept, and who attaches is served, whatever becomes of the agent.

// ---- in the shim ----

// fifos of a task's directory.
const (
	fifoDir = "io"
	fifoIn  = "stdin"
	fifoOut = "stdout"
	fifoErr = "stderr"
)

// foreign is what the shim holds of a program that is not its child.
type foreign struct {
	logs    sync.WaitGroup
	readers []*os.File // ends of output
	held    []*os.File // other ends, that keep a FIFO open while the program's are not
	once    sync.Once
}

// openStreams makes the FIFOs of a program that an executor runs, and begins to
// read them.
func (s *shim) openStreams() error {
	dir := filepath.Join(s.dir, fifoDir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	f := &foreign{}
	open := func(name string, flags int) (*os.File, error) {
		p := filepath.Join(dir, name)
		if err := unix.Mkfifo(p, 0o600); err != nil && !errors.Is(err, os.ErrExist) {
			return nil, fmt.Errorf("stream %s: %w", name, err)
		}
		fd, err := unix.Open(p, flags|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("stream %s: %w", name, err)
		}
		return os.NewFile(uintptr(fd), name), nil
	}
	for _, o := range []struct {
		name   string
		sink   *sink
		stderr bool
	}{{fifoOut, &s.out, false}, {fifoErr, &s.err, true}} {
		if o.stderr && s.task.Spec.TTY {
			continue
		}
		r, err := open(o.name, unix.O_RDONLY)
		if err != nil {
			return err
		}
		w, err := open(o.name, unix.O_WRONLY) // a reader sees no end while this is open
		if err != nil {
			return err
		}
		f.readers, f.held = append(f.readers, r), append(f.held, w)
		f.logs.Go(func() { s.log.copy(r, io.TeeReader(r, o.sink), o.stderr) })
	}
	if s.task.Spec.Stdin {
		r, err := open(fifoIn, unix.O_RDONLY)
		if err != nil {
			return err
		}
		if s.stdin, err = open(fifoIn, unix.O_WRONLY); err != nil {
			return err
		}
		f.held = append(f.held, r)
	}
	s.foreign = f
	return nil
}

// await lets whoever is to attach come first, for a moment.
func (s *shim) await() {
	if !s.task.Spec.Attach {
		return
	}
	select {
	case <-s.attached:
	case <-time.After(attachWait):
	}
}

// runs takes note that the executor has started the program.
func (s *shim) runs(pid int) {
	s.mu.Lock()
	created := s.status.State == runtime.Created
	if created {
		s.initPID = pid
	}
	early := s.early
	s.mu.Unlock()
	if !created {
		return
	}
	s.set(func(st *runtime.Status) {
		st.State, st.PID = runtime.Running, pid
		st.Begin()
	})
	for _, sig := range early {
		s.signal(sig)
	}
}

// ended takes note of how the program ended, or why it did not start. The first
// who says it is right.
func (s *shim) ended(code int, why string) {
	s.foreign.once.Do(func() {
		for _, f := range s.foreign.held {
			f.Close()
		}
		for _, r := range s.foreign.readers {
			_ = r.SetReadDeadline(time.Now().Add(leftBehind))
		}
		s.finish(&s.foreign.logs, code, why)
	})
}

// ---- in the agent ----

// executor returns what runs a task; nil: the shim itself.
func (r *Runtime) executor(name string) (runtime.Executor, error) {
	if name == "" {
		return nil, nil
	}
	x := r.cfg.Executors[name]
	if x == nil {
		return nil, fmt.Errorf("this agent has no executor %q: it runs programs of the node only", name)
	}
	return x, nil
}

// box is a task's sandbox as its executor sees it.
func (r *Runtime) box(id string) (runtime.Box, runtime.Executor, error) {
	var t runtime.Task
	if err := readJSON(filepath.Join(r.taskDir(id), taskFile), &t); err != nil {
		return runtime.Box{}, nil, err
	}
	x, err := r.executor(t.Executor)
	if err != nil || x == nil {
		return runtime.Box{Task: t}, nil, err
	}
	dir := r.taskDir(id)
	b := runtime.Box{Task: t, Dir: dir, Cgroup: r.cgroup(id), Stdout: filepath.Join(dir, fifoDir, fifoOut)}
	b.Blobs = r.blobDir(t)
	if !t.Spec.TTY {
		b.Stderr = filepath.Join(dir, fifoDir, fifoErr)
	}
	if t.Spec.Stdin {
		b.Stdin = filepath.Join(dir, fifoDir, fifoIn)
	}
	return b, x, nil
}

// writeFiles puts what a container has in /etc into the task's directory.
func (r *Runtime) writeFiles(t runtime.Task) error {
	for name, b := range etcFiles(t) {
		if err := writeEtc(filepath.Join(r.taskDir(t.ID), name), b); err != nil {
			return err
		}
	}
	return nil
}

// Prepare implements runtime.Runtime.
func (r *Runtime) Prepare(ctx context.Context, t runtime.Task, progress func(string)) (spec.TaskSpec, error) {
	x, err := r.executor(t.Executor)
	if err != nil || x == nil {
		return t.Spec, err
	}
	return x.Prepare(ctx, t, progress)
}

// exitCoder is an error that knows the exit status of what did not come to run.
type exitCoder interface{ ExitCode() int }

// startForeign starts a task's program by its executor.
func (r *Runtime) startForeign(ctx context.Context, id string) error {
	b, x, err := r.box(id)
	if err != nil {
		return err
	}
	if _, _, err := r.call(id, request{Op: "await"}, attachWait+callTimeout); err != nil {
		return err
	}
	pid, err := x.Start(ctx, b)
	if err != nil {
		if ctx.Err() != nil {
			return err // the next agent goes on
		}
		code := 125
		var ec exitCoder
		if errors.As(err, &ec) {
			code = ec.ExitCode()
		}
		if _, _, serr := r.call(id, request{Op: "ended", Code: code, Err: err.Error()}, callTimeout); serr == nil {
			_ = r.settle(ctx, id)
		}
		return err
	}
	resp, _, err := r.call(id, request{Op: "started", PID: pid}, callTimeout)
	if err != nil {
		return err
	}
	r.mu.Lock()
	e := r.tasks[id]
	if e != nil && e.status.State == runtime.Created && resp.Status.ID == id {
		data := e.status.Data
		e.status, e.initPID = resp.Status, resp.InitPID
		e.status.Data = data
	}
	r.mu.Unlock()
	r.mind(e, x)
	return nil
}

// closeInput tells the executor that no input follows, once the program runs: the
// input of who attached before may have ended by then.
func (r *Runtime) closeInput(x runtime.Executor, id string) {
	for {
		st, err := r.Status(r.ctx, id)
		if err != nil || st.State == runtime.Exited {
			return
		}
		if st.State == runtime.Running {
			if err := x.CloseInput(r.ctx, id); !errors.Is(err, runtime.ErrUnavailable) {
				return
			}
		}
		select {
		case <-r.ctx.Done():
			return
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// mindRetry is the longest wait between tries to hear of a program's end from an
// executor that does not answer.
const mindRetry = 2 * time.Second

// mind tells the shim how the program ends. There is one for each task that runs.
func (r *Runtime) mind(e *entry, x runtime.Executor) {
	if e == nil {
		return
	}
	r.mu.Lock()
	id, minded := e.status.ID, e.minded
	e.minded = true
	r.mu.Unlock()
	if minded {
		return
	}
	r.wg.Go(func() {
		for wait := 50 * time.Millisecond; ; wait = min(2*wait, mindRetry) {
			out, err := x.Wait(r.ctx, id)
			if r.ctx.Err() != nil {
				return
			}
			if errors.Is(err, runtime.ErrNotFound) {
				out, err = runtime.Outcome{Code: 137, Err: "the container is gone: it was removed from outside, or the machine was restarted"}, nil
			}
			if err == nil {
				_, _, _ = r.call(id, request{Op: "ended", Code: out.Code, Err: out.Err}, callTimeout+leftBehind)
				return
			}
			r.log.Debug("the end of a task can't be waited for now; trying again", "task", id, "error", err)
			select {
			case <-r.ctx.Done():
				return
			case <-e.watched: // its shim is gone
				return
			case <-time.After(wait):
			}
		}
	})
}

// stopForeign is Stop for a task with an executor. This process counts the grace:
// if it ends meanwhile, the next one is asked again.
func (r *Runtime) stopForeign(ctx context.Context, id string, x runtime.Executor, sig syscall.Signal, grace time.Duration) error {
	signal := func(sig syscall.Signal, all bool) error {
		for limit := time.Now().Add(grace + callTimeout); ; {
			err := x.Signal(ctx, id, sig, all)
			if err == nil || errors.Is(err, runtime.ErrNotFound) || !errors.Is(err, runtime.ErrUnavailable) || time.Now().After(limit) {
				return err
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(200 * time.Millisecond):
			}
			if st, err := r.Status(ctx, id); err != nil || st.State == runtime.Exited {
				return err
			}
		}
	}
	if sig != syscall.SIGKILL && grace > 0 {
		if err := signal(sig, false); err != nil && !errors.Is(err, runtime.ErrNotFound) {
			return err
		}
		for limit := time.Now().Add(grace); time.Now().Before(limit); {
			st, err := r.Status(ctx, id)
			if err != nil || st.State == runtime.Exited {
				return err
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(5 * time.Millisecond):
			}
		}
	}
	if err := signal(syscall.SIGKILL, true); err != nil && !errors.Is(err, runtime.ErrNotFound) {
		return err
	}
	return r.settle(ctx, id)
}

// ofExecutor has the executor of a task, if it has one, do something to what it has of it.
func (r *Runtime) ofExecutor(id string, do func(runtime.Executor) error) (bool, error) {
	_, x, err := r.box(id)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil // it was never made
	}
	if err != nil || x == nil {
		return false, err
	}
	if err := do(x); err != nil {
		return true, fmt.Errorf("task %s: %w", id, err)
	}
	return true, nil
}

// releaseForeign ends what the executor has of a task, and sees to it that the shim
// knows.
func (r *Runtime) releaseForeign(ctx context.Context, id string) error {
	if has, err := r.ofExecutor(id, func(x runtime.Executor) error { return x.Release(ctx, id) }); err != nil || !has {
		return err
	}
	if st, err := r.Status(ctx, id); err == nil && st.State == runtime.Running {
		_, _, _ = r.call(id, request{Op: "ended", Code: 137}, callTimeout+leftBehind)
	}
	return nil
}

// sweepExecutors removes what executors have of tasks that no record names: what
// an agent left that was killed, or whose data directory is gone.
func (r *Runtime) sweepExecutors() {
	for name, x := range r.cfg.Executors {
		r.wg.Go(func() {
			for wait := time.Second; ; wait = min(2*wait, time.Minute) {
				err := r.sweepExecutor(x)
				if err == nil {
					return
				}
				if !errors.Is(err, runtime.ErrUnavailable) {
					r.log.Warn("what earlier tasks left can't be cleared away; trying again", "executor", name, "error", err)
				}
				select {
				case <-r.ctx.Done():
					return
				case <-time.After(wait):
				}
			}
		})
	}
}

func (r *Runtime) sweepExecutor(x runtime.Executor) error {
	if err := x.Sweep(r.ctx); err != nil {
		return err
	}
	ids, err := x.List(r.ctx)
	if err != nil {
		return err
	}
	for _, id := range ids {
		if validID(id) == nil && exists(filepath.Join(r.taskDir(id), taskFile)) {
			continue
		}
		r.log.Info("clearing away what an earlier task left", "task", id)
		if err := x.Remove(r.ctx, id); err != nil {
			return err
		}
	}
	return nil
}
