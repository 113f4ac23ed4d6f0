package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/term"

	"github.com/shoalnet/shoal/agent"
	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/client"
	"github.com/shoalnet/shoal/internal/sleep"
	"github.com/shoalnet/shoal/spec"
)

// ownTerminal is standard input if it is a terminal; needed tells that it must
// be.
func (c *cli) ownTerminal(needed bool) (*os.File, error) {
	in, ok := c.in.(*os.File)
	if ok && term.IsTerminal(int(in.Fd())) {
		return in, nil
	}
	if needed {
		return nil, fmt.Errorf("-t needs a terminal, and standard input is none: leave -t out")
	}
	return nil, nil
}

// lostError says that a session's connection was cut.
type lostError struct{ err error }

func (e *lostError) Error() string {
	return "the connection to the agent was lost"
}

// session is a command's, or an attached program's, input, signals and size of the
// terminal, over one connection after the other.
type session struct {
	c     *cli
	node  string
	start *shoalv1.ExecRequest_Start

	mu      sync.Mutex
	stream  *connect.BidiStreamForClient[shoalv1.ExecRequest, shoalv1.ExecResponse]
	changed chan struct{} // closed when stream is another
	ctx     context.Context
	seen    [2]int64  // bytes of output and of error output that were passed on
	at      time.Time // when the last were
}

// send sends on the connection that there is; an error is that of a cut one.
func (s *session) send(r *shoalv1.ExecRequest) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stream == nil {
		return io.EOF
	}
	return s.stream.Send(r)
}

// sendSure waits for another connection when that one is cut; false when none comes.
func (s *session) sendSure(r *shoalv1.ExecRequest) bool {
	for {
		s.mu.Lock()
		changed := s.changed
		s.mu.Unlock()
		if s.send(r) == nil {
			return true
		}
		select {
		case <-changed:
		case <-s.ctx.Done():
			return false
		}
	}
}

// use makes stream the session's.
func (s *session) use(stream *connect.BidiStreamForClient[shoalv1.ExecRequest, shoalv1.ExecResponse]) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stream = stream
	close(s.changed)
	s.changed = make(chan struct{})
}

// exec runs one command over the Node API, or attaches to a task's program. A
// connection that is cut is a *lostError.
func (c *cli) exec(ctx context.Context, node string, start *shoalv1.ExecRequest_Start) error {
	s, end, err := c.session(ctx, node, start, true)
	if err != nil {
		return err
	}
	defer end()
	return s.once(c.out, c.err)
}

// session prepares the terminal and begins to read input and signals; end undoes it.
// Without proxy, signals are this program's own.
func (c *cli) session(ctx context.Context, node string, start *shoalv1.ExecRequest_Start, proxy bool) (s *session, end func(), err error) {
	if proxy {
		ctx = context.WithoutCancel(ctx) // signals are the command's
	}
	ctx, cancel := context.WithCancel(ctx)
	s = &session{c: c, node: node, start: start, ctx: ctx, changed: make(chan struct{})}
	end = cancel
	in, err := c.ownTerminal(start.Stdin && start.Tty)
	if err != nil {
		cancel()
		return nil, nil, err
	}
	if start.Tty {
		if in != nil {
			if start.Stdin {
				old, err := term.MakeRaw(int(in.Fd()))
				if err != nil {
					cancel()
					return nil, nil, err
				}
				end = func() {
					cancel()
					_ = term.Restore(int(in.Fd()), old)
				}
			}
			s.size(in)
		}
		start.Env = append([]string{"TERM=" + cmp.Or(os.Getenv("TERM"), "xterm")}, start.Env...)
	}
	if start.Stdin {
		go func() { // ends with the process: a read of standard input can't be cut short
			buf := make([]byte, 32<<10)
			for {
				n, err := c.in.Read(buf)
				if n > 0 && !s.sendSure(&shoalv1.ExecRequest{Msg: &shoalv1.ExecRequest_Stdin{Stdin: buf[:n]}}) {
					return
				}
				if err != nil {
					s.sendSure(&shoalv1.ExecRequest{Msg: &shoalv1.ExecRequest_StdinEof{StdinEof: true}})
					return
				}
			}
		}()
	}
	sigs := make(chan os.Signal, 8)
	signal.Notify(sigs, syscall.SIGWINCH)
	if proxy {
		signal.Notify(sigs, syscall.SIGINT, syscall.SIGTERM)
	}
	if start.Attach && proxy {
		signal.Notify(sigs, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2)
	}
	stop := end
	end = func() {
		signal.Stop(sigs)
		stop()
	}
	go func() { // ends with ctx
		for {
			select {
			case <-ctx.Done():
				return
			case sig := <-sigs:
				if sig == syscall.SIGWINCH {
					if in != nil && start.Tty && s.size(in) {
						_ = s.send(&shoalv1.ExecRequest{Msg: &shoalv1.ExecRequest_Resize_{Resize: &shoalv1.ExecRequest_Resize{Rows: start.Rows, Cols: start.Cols}}})
					}
					continue
				}
				// A person's second one is for this program, where nobody takes the first.
				if s.send(&shoalv1.ExecRequest{Msg: &shoalv1.ExecRequest_Signal{Signal: int32(sig.(syscall.Signal))}}) != nil {
					signal.Reset(sig)
				}
			}
		}
	}()
	return s, end, nil
}

// size takes the terminal's size for the start of the next connection.
func (s *session) size(in *os.File) bool {
	w, h, err := term.GetSize(int(in.Fd()))
	if err == nil {
		s.start.Rows, s.start.Cols = int32(h), int32(w)
	}
	return err == nil
}

// once connects, and passes output on until the command ends or the connection is
// cut, which is a *lostError.
func (s *session) once(out, errs io.Writer) error {
	c := s.c
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	stream := c.node().Exec(ctx)
	stream.RequestHeader().Set(agent.NodeHeader, s.node)
	if err := stream.Send(&shoalv1.ExecRequest{Msg: &shoalv1.ExecRequest_Start_{Start: s.start}}); err != nil && !errors.Is(err, io.EOF) {
		if e := c.api().Explain(err); e != err {
			return e // there is no agent
		}
		return &lostError{err}
	}
	s.use(stream)
	defer s.use(nil)
	for {
		msg, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			return &lostError{errors.New("the node ended the session without an exit status")}
		}
		if err != nil {
			m := client.Message(err)
			switch e := c.api().Explain(err); {
			case e != err:
				return e
			case client.Away(err):
				return &lostError{err}
			case s.start.Attach:
			case strings.Contains(m, "executable file not found"), strings.Contains(m, "no such file"):
				return &exitError{code: 127, err: err}
			case strings.Contains(m, "permission denied"):
				return &exitError{code: 126, err: err}
			}
			return err
		}
		switch v := msg.Msg.(type) {
		case *shoalv1.ExecResponse_Stdout:
			if _, err := out.Write(v.Stdout); err != nil {
				return err
			}
			s.seen[0] += int64(len(v.Stdout))
		case *shoalv1.ExecResponse_Stderr:
			if _, err := errs.Write(v.Stderr); err != nil {
				return err
			}
			s.seen[1] += int64(len(v.Stderr))
		case *shoalv1.ExecResponse_ExitCode:
			return exitStatus(int(v.ExitCode))
		}
		s.at = time.Now()
	}
}

func exitStatus(code int) error {
	if code != 0 {
		return &exitError{code: code}
	}
	return nil
}

// attend is the foreground of a task's new run: its output and exit status, its input if
// stdin, and this program's signals if proxy.
func (c *cli) attend(ctx context.Context, t *shoalv1.Task, stdin, proxy bool) error {
	start := &shoalv1.ExecRequest_Start{Task: t.Id, Attach: true, Stdin: stdin, Tty: t.Spec.Tty, Run: t.Run}
	s, end, err := c.session(ctx, t.Node, start, proxy)
	if err != nil {
		return err
	}
	err = s.attended(t)
	end()
	// Its name and its addresses are free when this returns.
	if t.Spec.AutoRemove {
		_ = c.removeTask(ctx, t.Id)
	}
	for limit := time.Now().Add(5 * time.Second); time.Now().Before(limit); {
		ts, lerr := c.tasks(context.WithoutCancel(ctx), &shoalv1.ListTasksRequest{Refs: []string{t.Id}, All: true})
		if lerr != nil || len(ts) == 0 || !t.Spec.AutoRemove && ended(ts[0]) {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	return err
}

// attended follows a task's program to its end, over the ends of agents.
func (s *session) attended(t *shoalv1.Task) error {
	err := s.once(s.c.out, s.c.err)
	var lost *lostError
	if errors.As(err, &lost) {
		if t.Spec.Tty {
			// What it wrote meanwhile is lost to the screen.
			err = s.again(t, s.c.out, s.c.err)
		} else {
			err = s.rest(t)
		}
	}
	var exit *exitError
	if err == nil || errors.As(err, &exit) {
		return err
	}
	if connect.CodeOf(err) != connect.CodeFailedPrecondition {
		return fmt.Errorf("%s: task %s may go on: see 'shoal ps -a'", client.Message(err), t.Name)
	}
	exit = &exitError{code: 125, err: err}
	var failed *connect.Error
	if errors.As(err, &failed) {
		if n, aerr := strconv.Atoi(failed.Meta().Get(agent.ExitHeader)); aerr == nil && n != 0 {
			exit.code = n
		}
	}
	return exit
}

// again connects anew until the task has ended, or is gone.
func (s *session) again(t *shoalv1.Task, out, errs io.Writer) error {
	said := out == io.Discard // who follows the output says it
	for since := time.Now(); s.ctx.Err() == nil; {
		err := s.once(out, errs)
		var exit *exitError
		if err == nil || errors.As(err, &exit) {
			return err
		}
		if st := s.ended(t); st != nil {
			return outcome(t, st)
		}
		if s.at.After(since) {
			since, said = time.Now(), out == io.Discard
		}
		if time.Since(since) > 3*time.Second && !said {
			fmt.Fprintf(s.c.err, "shoal: task %s: %s: waiting\r\n", t.Name, client.Silence(err))
			said = true
		}
		sleep.For(s.ctx, 200*time.Millisecond)
	}
	return s.ctx.Err()
}

// skipLimit is how much output is skipped byte by byte: of more, a task's files may
// not have the beginning any more.
const skipLimit = 16 << 20

// rest passes on what is left of the output of a task whose session was cut, from
// what its node keeps of it: exactly behind what was passed on before. Input and
// signals go by a session as before.
func (s *session) rest(t *shoalv1.Task) error {
	skip := s.seen
	o := client.LogOptions{Follow: true}
	if skip[0]+skip[1] > skipLimit {
		o.Since, skip = s.at, [2]int64{}
		fmt.Fprintln(s.c.err, "shoal: the session was cut: some of the output may be missing here, and is in 'shoal logs "+t.Name+"'")
	}
	// The end of the session is not the end of the output: a task that is removed by
	// itself stays until it is read (and removed by who began it).
	s.start.Rest = true
	result := make(chan error, 1)
	go func() { result <- s.again(t, io.Discard, io.Discard) }() // ends with the task or s.ctx
	err := s.c.api().TaskLogs(s.ctx, t, o, client.LogSink{
		Line: func(_ *shoalv1.Task, m *shoalv1.LogsResponse) {
			b, i, w := pieceOf(m.Line), 0, s.c.out
			if m.Stderr {
				i, w = 1, s.c.err
			}
			n := min(skip[i], int64(len(b)))
			skip[i] -= n
			_, _ = w.Write(b[n:])
		},
		Note: func(t *shoalv1.Task, text string) { fmt.Fprintf(s.c.err, "shoal: task %s: %s\n", t.Name, text) },
	})
	if err != nil {
		return err
	}
	select {
	case err := <-result:
		return err
	case <-time.After(5 * time.Second):
	}
	if st := s.ended(t); st != nil {
		return outcome(t, st)
	}
	return <-result
}

// pieceOf is a line of a task's output with its newline; a piece of a line that is
// too long for one has none.
func pieceOf(line []byte) []byte {
	if len(line) >= spec.MaxLogLine {
		return line
	}
	return append(line, '\n')
}

// ended is the status of a task that has ended, nil while it has not, or that is not
// known. One that nobody knows any more is lost.
func (s *session) ended(t *shoalv1.Task) *shoalv1.TaskStatus {
	ctx, cancel := context.WithTimeout(s.ctx, 10*time.Second)
	defer cancel()
	here := func() *shoalv1.Task {
		req := connect.NewRequest(&shoalv1.TasksRequest{})
		req.Header().Set(agent.NodeHeader, t.Node)
		resp, err := s.c.node().Tasks(ctx, req)
		if err != nil {
			return nil
		}
		i := slices.IndexFunc(resp.Msg.Tasks, func(o *shoalv1.Task) bool { return o.Id == t.Id })
		if i < 0 {
			return nil
		}
		return resp.Msg.Tasks[i]
	}
	if o := here(); o != nil {
		if ended(o) && o.Run >= t.Run {
			return o.Status
		}
		return nil
	}
	ts, err := s.c.tasks(ctx, &shoalv1.ListTasksRequest{Refs: []string{t.Id}, All: true})
	switch {
	case err != nil && connect.CodeOf(err) == connect.CodeNotFound:
		if o := here(); o != nil && ended(o) {
			return o.Status // its node keeps it for a moment
		}
		return &shoalv1.TaskStatus{State: spec.TaskLost.String(), Message: "it has ended and is removed: its exit status is not known"}
	case err == nil && len(ts) == 1 && ended(ts[0]) && ts[0].Status.GetRun() >= t.Run:
		return ts[0].Status
	}
	return nil
}

// outcome is the exit of a task whose end was learned from its status.
func outcome(t *shoalv1.Task, st *shoalv1.TaskStatus) error {
	if st.State == spec.TaskLost.String() || st.State == spec.TaskFailed.String() && st.ExitCode == 0 {
		return &exitError{code: 125, err: fmt.Errorf("task %s %s: %s", t.Name, st.State, st.Message)}
	}
	return exitStatus(int(st.ExitCode))
}

// quoted is a command as a shell takes it.
func quoted(words []string) string {
	out := make([]string, len(words))
	for i, w := range words {
		out[i] = w
		if w == "" || strings.ContainsAny(w, " \t\n'\"\\$`|&;<>()*?[]{}~#!") {
			out[i] = "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
		}
	}
	return strings.Join(out, " ")
}
