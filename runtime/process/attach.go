package process

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"github.com/shoalnet/shoal/runtime"
)

const (
	// attachWait is how long a program waits for who is to attach to it.
	attachWait = 5 * time.Second
	// inputWait is how long a program's input stays open that a caller left without a
	// word: it may be this process that ends.
	inputWait = 3 * time.Second
	// sinkRoom is what a pipe takes of the output of a program that has ended,
	// however slow its reader is: more than was on its way then.
	sinkRoom = 512 << 10
)

// ---- in the shim ----

// sink passes output on to who is attached. Write never fails: output goes to
// the task's log, whoever is gone.
type sink struct {
	mu sync.Mutex
	w  *os.File
}

func (s *sink) Write(b []byte) (int, error) {
	s.mu.Lock()
	w := s.w
	s.mu.Unlock()
	if w != nil {
		// It blocks while the other end is slow, and the program with it.
		if _, err := w.Write(b); err != nil {
			s.use(w, nil)
		}
	}
	return len(b), nil
}

// use puts w in the place of old, or of whatever is there.
func (s *sink) use(old, w *os.File) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if old != nil && s.w != old {
		return
	}
	if s.w != nil {
		s.w.Close()
	}
	s.w = w
}

func (s *sink) close() { s.use(nil, nil) }

// finish makes room for the rest of the output, for its reader to take when it
// likes.
func (s *sink) finish() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.w == nil {
		return
	}
	if rc, err := s.w.SyscallConn(); err == nil {
		_ = rc.Control(func(fd uintptr) { _, _ = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, sinkRoom) })
	}
	_ = s.w.SetWriteDeadline(time.Now().Add(2 * time.Second))
}

// openInput makes the program's standard input, or its terminal.
func (s *shim) openInput() (err error) {
	switch {
	case s.task.Spec.TTY:
		if s.tty, s.programIn, err = pty.Open(); err != nil {
			return fmt.Errorf("terminal: %w", err)
		}
	case s.task.Spec.Stdin:
		var fds [2]int
		if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
			return fmt.Errorf("standard input: %w", err)
		}
		// Only who writes may be told to come back later: programs don't expect
		// that of their standard input.
		if err := unix.SetNonblock(fds[1], true); err != nil {
			return err
		}
		s.programIn, s.stdin = os.NewFile(uintptr(fds[0]), "stdin"), os.NewFile(uintptr(fds[1]), "stdin")
	}
	return nil
}

// attach hands over the ends of pipes that carry the output, and the end of the
// program's standard input or its terminal. Standard input stays open here for who
// comes next, until closeInput.
func (s *shim) attach(answer func(error, ...int)) {
	s.mu.Lock()
	ended := s.status.State == runtime.Exited
	s.mu.Unlock()
	if ended {
		answer(errors.New("the task has ended"))
		return
	}
	var fds []int
	for _, k := range []*sink{&s.out, &s.err} {
		var p [2]int
		if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
			answer(err)
			return
		}
		k.use(nil, os.NewFile(uintptr(p[1]), "attached"))
		defer unix.Close(p[0])
		fds = append(fds, p[0])
	}
	s.mu.Lock()
	in, tty := s.stdin, s.tty
	if s.foreign != nil && s.task.Spec.TTY {
		in, tty = nil, s.stdin
	}
	s.mu.Unlock()
	send := func(uintptr) { answer(nil, fds...) }
	if in != nil {
		tty = in
	}
	if tty == nil {
		send(0)
	} else if rc, err := tty.SyscallConn(); err != nil {
		answer(err)
	} else if err := rc.Control(func(fd uintptr) {
		fds = append(fds, int(fd))
		send(fd)
	}); err != nil {
		answer(err)
	}
	s.once.Do(func() { close(s.attached) })
}

// closeInput ends the program's input, which stays open over the ends of agents.
func (s *shim) closeInput() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stdin != nil && !s.task.Spec.TTY {
		s.stdin.Close()
		s.stdin = nil
	}
}

// signal signals the program, or keeps the signal until it runs.
func (s *shim) signal(sig syscall.Signal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.status.State == runtime.Created:
		s.early = append(s.early, sig)
	case s.status.State == runtime.Running && s.status.PID > 0:
		_ = syscall.Kill(s.status.PID, sig)
	}
}

// ---- in the agent ----

// attachment is a connection to a task's program.
type attachment struct {
	r    *Runtime
	id   string
	tty  *os.File
	x    runtime.Executor // of a task that has one
	done chan struct{}
	code int
	err  error
}

// Attach implements runtime.Runtime.
func (r *Runtime) Attach(ctx context.Context, id string, s runtime.AttachSpec) (runtime.Process, error) {
	if _, err := r.Status(ctx, id); err != nil {
		return nil, err
	}
	var t runtime.Task
	if err := readJSON(r.taskDir(id)+"/"+taskFile, &t); err != nil {
		return nil, err
	}
	x, err := r.executor(t.Executor)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	e, nth := r.tasks[id], 0
	if e != nil {
		e.attached++
		nth = e.attached
	}
	r.mu.Unlock()
	if e == nil {
		return nil, runtime.ErrNotFound
	}
	_, files, err := r.call(id, request{Op: "attach"}, callTimeout)
	if err == nil && len(files) < 2 {
		err = fmt.Errorf("shim sent %d files, want 2 or more", len(files))
	}
	if err != nil {
		for _, f := range files {
			f.Close()
		}
		return nil, err
	}
	a := &attachment{r: r, id: id, x: x, done: make(chan struct{})}
	var in *os.File
	if len(files) > 2 {
		if in = files[2]; t.Spec.TTY {
			a.tty = in
			if s.Rows > 0 && s.Cols > 0 && x == nil {
				_ = a.Resize(s.Rows, s.Cols)
			}
		}
	}
	hangUp := func() {
		for _, f := range files {
			f.Close()
		}
	}
	// noMore ends the program's input, unless somebody attached since.
	noMore := func() {
		r.mu.Lock()
		mine := e.attached == nth
		r.mu.Unlock()
		if in == nil || a.tty != nil || !mine {
			return
		}
		_, _, _ = r.call(id, request{Op: "close-input"}, callTimeout)
		if x != nil {
			r.closeInput(x, id)
		}
	}
	stop := context.AfterFunc(ctx, func() {
		hangUp()
		// This process ends, or the caller is gone, perhaps to come back.
		select {
		case <-r.ctx.Done():
		case <-time.After(inputWait):
			noMore()
		}
	})
	stopToo := context.AfterFunc(r.ctx, hangUp)
	if in != nil {
		go func() { // ends with the caller's input, or with what is written to
			var err error
			if s.Stdin != nil && t.Spec.Stdin {
				_, err = io.Copy(in, s.Stdin)
				endInput(s.Stdin)
			}
			if a.tty == nil {
				in.Close()
				if err == nil {
					noMore()
				}
			}
		}()
	}
	if x != nil && t.Spec.TTY && s.Rows > 0 && s.Cols > 0 {
		// Its terminal is made when it starts, which may be yet to come.
		go func() {
			for range 100 {
				if a.Resize(s.Rows, s.Cols) == nil {
					return
				}
				select {
				case <-ctx.Done():
					return
				case <-a.done:
					return
				case <-time.After(50 * time.Millisecond):
				}
			}
		}()
	}
	var copies sync.WaitGroup
	for i, w := range []io.Writer{s.Stdout, s.Stderr} {
		copies.Go(func() {
			// What can't be passed on is read all the same: the program goes on.
			if _, err := io.Copy(w, files[i]); err != nil {
				_, _ = io.Copy(io.Discard, files[i])
			}
		})
	}
	r.wg.Go(func() {
		defer close(a.done)
		copies.Wait()
		a.code, a.err = r.outcome(ctx, e)
		stop()
		stopToo()
		hangUp()
	})
	return a, nil
}

// outcome waits for the end of a task, whose output has ended.
func (r *Runtime) outcome(ctx context.Context, e *entry) (int, error) {
	for {
		r.mu.Lock()
		st := e.status
		r.mu.Unlock()
		if st.State == runtime.Exited {
			if st.Err != "" {
				return st.ExitCode, errors.New(st.Err)
			}
			return st.ExitCode, nil
		}
		select {
		case <-ctx.Done():
			return 0, ctx.Err()
		case <-r.ctx.Done():
			return 0, runtime.ErrClosing
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// endInput tells who writes the other end of an input that nobody reads it any
// more.
func endInput(r io.Reader) {
	if c, ok := r.(io.Closer); ok {
		c.Close()
	}
}

func (a *attachment) Wait() (int, error) {
	<-a.done
	return a.code, a.err
}

func (a *attachment) Resize(rows, cols uint16) error {
	if a.x != nil {
		return a.x.Resize(a.r.ctx, a.id, rows, cols)
	}
	if a.tty == nil {
		return errors.New("the task has no terminal")
	}
	return pty.Setsize(a.tty, &pty.Winsize{Rows: rows, Cols: cols})
}

func (a *attachment) Signal(sig int) error {
	_, _, err := a.r.call(a.id, request{Op: "signal", Signal: sig}, callTimeout)
	return err
}
