package container

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/shoalnet/shoal/runtime"
	"github.com/shoalnet/shoal/spec"
)

// command is a program that runs beside a task's own.
type command struct {
	e    *Executor
	p    client.Process
	done chan struct{}
	code int
	err  error
}

// drainTime is how long the output of a command that has ended may be held open by
// what it left behind.
const drainTime = 2 * time.Second

// Exec implements runtime.Executor.
func (e *Executor) Exec(ctx context.Context, b runtime.Box, s runtime.ExecSpec) (runtime.Process, error) {
	t, err := e.task(ctx, b.ID)
	if err != nil {
		return nil, err
	}
	// The command outlives nothing that it needs: what ends it is below.
	cctx := namespaces.WithNamespace(context.WithoutCancel(ctx), e.cfg.Namespace)
	ctr, err := e.load(ctx, b.ID)
	if err != nil {
		return nil, err
	}
	osp, err := ctr.Spec(cctx)
	if err != nil {
		return nil, e.unavailable(err)
	}
	proc, err := e.process(cctx, ctr, osp, b, s)
	if err != nil {
		return nil, &StartError{Code: 126, Err: err}
	}
	dir, err := e.execDir()
	if err != nil {
		return nil, err
	}
	var p client.Process
	started := make(chan struct{}) // p is set, if it ever will be
	defer close(started)
	creator := cio.NullIO
	if !s.Detach {
		out, eout := s.Stdout, s.Stderr
		if out == nil {
			out = discard
		}
		if eout == nil {
			eout = discard
		}
		var in io.Reader
		if s.Stdin != nil {
			// containerd's shim holds the input open for whoever comes next, until it
			// is told that nobody does.
			in = &inputEnd{Reader: s.Stdin, fn: func() {
				<-started
				if p != nil {
					_ = p.CloseIO(cctx, client.WithStdinCloser)
				}
			}}
		}
		opts := []cio.Opt{cio.WithFIFODir(dir), cio.WithStreams(in, out, eout)}
		if s.TTY {
			opts = []cio.Opt{cio.WithFIFODir(dir), cio.WithStreams(in, out, nil), cio.WithTerminal}
		}
		creator = cio.NewCreator(opts...)
	}
	id := "exec-" + spec.NewID()
	p, err = t.Exec(cctx, id, proc, creator)
	if err != nil {
		return nil, startError(e.unavailable(err))
	}
	discardProcess := func() {
		dctx, cancel := context.WithTimeout(cctx, rpcTimeout)
		defer cancel()
		_, _ = p.Delete(dctx, client.WithProcessKill)
	}
	ended, err := p.Wait(cctx)
	if err == nil {
		err = p.Start(cctx)
	}
	if err != nil {
		discardProcess()
		return nil, startError(e.unavailable(err))
	}
	c := &command{e: e, p: p, done: make(chan struct{})}
	if s.TTY && s.Rows > 0 && s.Cols > 0 {
		_ = p.Resize(cctx, uint32(s.Cols), uint32(s.Rows))
	}
	if s.Detach {
		close(c.done)
		go func() { // ends with the command, or with containerd's connection
			<-ended
			discardProcess()
		}()
		return c, nil
	}
	go func() { // ends with the command, which the caller's context ends
		defer close(c.done)
		stop := context.AfterFunc(ctx, func() { killTree(int(p.Pid())) })
		defer stop()
		st := <-ended
		code, _, err := st.Result()
		if err != nil {
			c.err = e.unavailable(err)
		}
		c.code = int(code)
		// All that it wrote is passed on; what it left behind is not waited for.
		copied := make(chan struct{})
		go func() {
			p.IO().Wait()
			close(copied)
		}()
		select {
		case <-copied:
		case <-time.After(drainTime):
			p.IO().Cancel()
		}
		discardProcess()
	}()
	return c, nil
}

// process is the OCI process of a command: the container's own, but for what the
// caller says.
func (e *Executor) process(ctx context.Context, ctr client.Container, osp *oci.Spec, b runtime.Box, s runtime.ExecSpec) (*specs.Process, error) {
	p := *osp.Process
	p.Args, p.Terminal = s.Command, s.TTY
	p.Env = mergeEnv(p.Env, s.Env)
	if s.Dir != "" {
		p.Cwd = s.Dir
	}
	if s.User != "" {
		info, err := ctr.Info(ctx)
		if err != nil {
			return nil, e.unavailable(err)
		}
		cp := *osp
		proc := p
		cp.Process = &proc
		c, cctx, err := e.conn(ctx)
		if err != nil {
			return nil, err
		}
		cp.Process.User = specs.User{}
		if err := withUser(s.User, nil)(cctx, c, &info, &cp); err != nil {
			return nil, err
		}
		p = *cp.Process
	}
	return &p, nil
}

func mergeEnv(base, more []string) []string {
	out := append([]string{}, base...)
	for _, kv := range more {
		k, _, _ := strings.Cut(kv, "=")
		replaced := false
		for i := range out {
			if strings.HasPrefix(out[i], k+"=") {
				out[i], replaced = kv, true
			}
		}
		if !replaced {
			out = append(out, kv)
		}
	}
	return out
}

// killTree kills a process and what comes from it. Processes are stopped first, so
// that none makes another meanwhile.
func killTree(pid int) {
	if pid <= 0 {
		return
	}
	seen := map[int]bool{}
	var walk func(int)
	walk = func(pid int) {
		if seen[pid] || len(seen) > 1<<16 {
			return
		}
		seen[pid] = true
		_ = syscall.Kill(pid, syscall.SIGSTOP)
		es, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		if err != nil {
			return
		}
		for _, t := range es {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%s/children", pid, t.Name()))
			if err != nil {
				continue
			}
			for _, f := range strings.Fields(string(b)) {
				if n, err := strconv.Atoi(f); err == nil {
					walk(n)
				}
			}
		}
	}
	walk(pid)
	for p := range seen {
		_ = syscall.Kill(p, syscall.SIGKILL)
	}
}

// Wait implements runtime.Process.
func (c *command) Wait() (int, error) {
	<-c.done
	return c.code, c.err
}

// Resize implements runtime.Process.
func (c *command) Resize(rows, cols uint16) error {
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(context.Background(), c.e.cfg.Namespace), rpcTimeout)
	defer cancel()
	return c.p.Resize(ctx, uint32(cols), uint32(rows))
}

// Signal implements runtime.Process.
func (c *command) Signal(sig int) error {
	ctx, cancel := context.WithTimeout(namespaces.WithNamespace(context.Background(), c.e.cfg.Namespace), rpcTimeout)
	defer cancel()
	return c.p.Kill(ctx, syscall.Signal(sig))
}

// inputEnd tells of the end of what it reads.
type inputEnd struct {
	io.Reader
	once sync.Once
	fn   func()
}

func (r *inputEnd) Read(b []byte) (int, error) {
	n, err := r.Reader.Read(b)
	if err != nil && !errors.Is(err, io.ErrShortBuffer) {
		r.once.Do(r.fn)
	}
	return n, err
}
