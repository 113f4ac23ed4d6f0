package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"os"
	goruntime "runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/shoalnet/shoal/api"
	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/internal/sleep"
	"github.com/shoalnet/shoal/peer"
	"github.com/shoalnet/shoal/runtime"
	"github.com/shoalnet/shoal/spec"
)

// NodeHeader is peer's.
const NodeHeader = peer.NodeHeader

// ExitHeader, of an error of Exec, is the exit status of what did not come to
// run.
const ExitHeader = "Shoal-Exit-Status"

// routeToNode passes calls for another node on to it.
func (a *Agent) routeToNode(local http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		target := r.Header.Get(NodeHeader)
		m, err := a.need(r.Context())
		if err != nil {
			_ = connect.NewErrorWriter().Write(w, r, err)
			return
		}
		if target == "" || target == m.ident.NodeID {
			local.ServeHTTP(w, r)
			return
		}
		if c := peer.CallerFrom(r.Context()); c.Kind != peer.Local {
			// It would be made in this node's name.
			_ = connect.NewErrorWriter().Write(w, r, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("this is node %s, not node %s, which is to be asked itself", m.ident.NodeID, target)))
			return
		}
		if _, err := m.controlAddr(target); err != nil {
			_ = connect.NewErrorWriter().Write(w, r, connect.NewError(connect.CodeUnavailable, err))
			return
		}
		proxy := &httputil.ReverseProxy{
			Transport:     m.byID.Transport,
			FlushInterval: -1, // streams
			Rewrite: func(p *httputil.ProxyRequest) {
				p.Out.URL.Scheme, p.Out.URL.Host = "http", target
			},
			ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
				_ = connect.NewErrorWriter().Write(w, r, connect.NewError(connect.CodeUnavailable, fmt.Errorf("node %s does not answer: %w", target, err)))
			},
		}
		proxy.ServeHTTP(w, r)
	})
}

// controlAddr finds where a node listens, by gossip or the last assignment.
func (m *member) controlAddr(id string) (string, error) {
	for _, p := range m.g.Snapshot().Members {
		if p.Peer.ID == id {
			if p.Liveness == spec.PeerDead {
				return "", fmt.Errorf("node %s is down", p.Name)
			}
			return netip.AddrPortFrom(p.Addr, uint16(p.ControlPort)).String(), nil
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.assigned != nil {
		for _, n := range m.assigned.Nodes {
			if n.ID == id {
				return net.JoinHostPort(n.Addr.String(), strconv.Itoa(n.ControlPort)), nil
			}
		}
	}
	return "", fmt.Errorf("node %s is not known here", id)
}

// nodeAPI serves what concerns this node's tasks.
type nodeAPI struct{ *Agent }

func (a *nodeAPI) task(ctx context.Context, id string) (*member, spec.Task, error) {
	m, err := a.need(ctx)
	if err != nil {
		return nil, spec.Task{}, err
	}
	if err := a.adopted(ctx, m); err != nil {
		return nil, spec.Task{}, err
	}
	t, _, ok := m.tasks.find(id)
	if !ok {
		return nil, spec.Task{}, connect.NewError(connect.CodeNotFound, fmt.Errorf("task %s is not on node %s", id, m.name()))
	}
	return m, t, nil
}

// adopted waits until the tasks of an earlier agent are known: before, a task that is
// not found may be there.
func (a *nodeAPI) adopted(ctx context.Context, m *member) error {
	for limit := time.Now().Add(startWait); !m.tasks.hasAdopted(); {
		if time.Now().After(limit) || m.ctx.Err() != nil || !sleep.For(ctx, 10*time.Millisecond) {
			return connect.NewError(connect.CodeUnavailable, fmt.Errorf("the agent of node %s does not know its tasks yet: see its log", m.ident.Name))
		}
	}
	return nil
}

// Exec runs a command inside a task.
func (a *nodeAPI) Exec(ctx context.Context, stream *connect.BidiStream[shoalv1.ExecRequest, shoalv1.ExecResponse]) error {
	first, err := stream.Receive()
	if err != nil {
		return err
	}
	start := first.GetStart()
	if start == nil {
		return invalid("exec: the first message is not a start")
	}
	if len(start.Command) == 0 && !start.Attach {
		return invalid("exec: no command is given")
	}
	var m *member
	var t spec.Task
	if start.Attach {
		m, t, err = a.comingTask(ctx, start.Task, int(start.Run))
	} else {
		m, t, err = a.task(ctx, start.Task)
	}
	if err != nil {
		return err
	}
	var sendMu sync.Mutex
	send := func(r *shoalv1.ExecResponse) error {
		sendMu.Lock()
		defer sendMu.Unlock()
		return stream.Send(r)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stdinR, stdinW := io.Pipe()
	defer stdinR.Close()
	es := runtime.ExecSpec{Command: start.Command, Env: start.Env, Dir: start.Dir, User: start.User, TTY: start.Tty,
		Rows: uint16(start.Rows), Cols: uint16(start.Cols),
		Stdout: writerFunc(func(b []byte) error {
			return send(&shoalv1.ExecResponse{Msg: &shoalv1.ExecResponse_Stdout{Stdout: b}})
		}),
		Stderr: writerFunc(func(b []byte) error {
			return send(&shoalv1.ExecResponse{Msg: &shoalv1.ExecResponse_Stderr{Stderr: b}})
		}),
	}
	if start.Stdin {
		es.Stdin = stdinR
	}
	es.Detach = start.Detach
	var proc runtime.Process
	if start.Attach {
		proc, err = m.cfg.Runtime.Attach(ctx, t.ID, runtime.AttachSpec{Rows: es.Rows, Cols: es.Cols, Stdin: es.Stdin, Stdout: es.Stdout, Stderr: es.Stderr})
	} else {
		proc, err = m.cfg.Runtime.Exec(ctx, t.ID, es)
	}
	if err != nil {
		return connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("exec in task %s: %w", t.Name, err))
	}
	// Ends with the stream, which ends when this handler returns.
	go func() {
		defer stdinW.Close()
		for {
			msg, err := stream.Receive()
			if err != nil {
				if !errors.Is(err, io.EOF) {
					// The client is gone: so goes its command. Or this agent ends, which
					// is not the end of an attached program's input.
					stdinW.CloseWithError(err)
					cancel()
				}
				return
			}
			switch v := msg.Msg.(type) {
			case *shoalv1.ExecRequest_Stdin:
				if start.Stdin {
					// A command that no longer reads is no error of the client's.
					_, _ = stdinW.Write(v.Stdin)
				}
			case *shoalv1.ExecRequest_StdinEof:
				stdinW.Close()
			case *shoalv1.ExecRequest_Resize_:
				_ = proc.Resize(uint16(v.Resize.Rows), uint16(v.Resize.Cols))
			case *shoalv1.ExecRequest_Signal:
				_ = proc.Signal(int(v.Signal))
			}
		}
	}()
	code, err := proc.Wait()
	if start.Attach && !start.Rest && ctx.Err() == nil && !errors.Is(err, runtime.ErrClosing) {
		m.tasks.hear(t.ID)
	}
	if errors.Is(err, runtime.ErrClosing) {
		return connect.NewError(connect.CodeUnavailable, fmt.Errorf("task %s: %w", t.Name, err))
	}
	if err != nil && start.Attach {
		if _, st, ok := m.tasks.find(t.ID); ok && st.Message != "" {
			err = errors.New(st.Message) // why it did not come to run
		}
		failed := connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("task %s: %w", t.Name, err))
		failed.Meta().Set(ExitHeader, strconv.Itoa(code))
		return failed
	}
	if err != nil {
		return connect.NewError(connect.CodeInternal, fmt.Errorf("exec in task %s: %w", t.Name, err))
	}
	return send(&shoalv1.ExecResponse{Msg: &shoalv1.ExecResponse_ExitCode{ExitCode: int32(code)}})
}

// comingTask is task for one that was only just made, or started again: it waits until
// the sandbox of that run is there.
func (a *nodeAPI) comingTask(ctx context.Context, id string, run int) (*member, spec.Task, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	limit := time.Now().Add(wireTimeout)
	for {
		m, t, err := a.task(ctx, id)
		if m == nil && err != nil && connect.CodeOf(err) != connect.CodeNotFound {
			return nil, t, err
		}
		if err == nil && t.Run >= run {
			_, rerr := m.cfg.Runtime.Status(ctx, id)
			if rerr == nil {
				return m, t, nil
			}
			if _, st, ok := m.tasks.find(id); ok && st.State.Ended() {
				failed := connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("task %s: %s", t.Name, cmp.Or(st.Message, st.State.String())))
				failed.Meta().Set(ExitHeader, "125")
				return nil, t, failed
			} else if ok && t.Spec.Image != "" && st.State <= spec.TaskPreparing {
				// Its image may take long; what bounds that is the pull's own.
				limit = time.Now().Add(wireTimeout)
			}
		}
		if !sleep.For(ctx, readyInterval) || time.Now().After(limit) {
			if err == nil {
				err = connect.NewError(connect.CodeUnavailable, fmt.Errorf("task %s is not made after %s: see 'shoal ps -a'", t.Name, wireTimeout))
			}
			return nil, t, err
		}
	}
}

type writerFunc func([]byte) error

func (f writerFunc) Write(b []byte) (int, error) {
	if err := f(b); err != nil {
		return 0, err
	}
	return len(b), nil
}

// Logs streams a task's output.
func (a *nodeAPI) Logs(ctx context.Context, req *connect.Request[shoalv1.LogsRequest], stream *connect.ServerStream[shoalv1.LogsResponse]) error {
	m, t, err := a.task(ctx, req.Msg.Task)
	if err != nil {
		return err
	}
	r := req.Msg
	o := runtime.LogOptions{Follow: r.Follow, Tail: int(r.Tail), Since: unixNano(r.SinceNs), Until: unixNano(r.UntilNs)}
	if o.Tail < 0 {
		// Where a caller that is cut off before the first line goes on.
		if err := stream.Send(&shoalv1.LogsResponse{Begin: true, AtNs: time.Now().UnixNano()}); err != nil {
			return err
		}
	}
	for wait := readyInterval; ; {
		made := true
		for line, err := range m.cfg.Runtime.Logs(ctx, t.ID, o) {
			if err == nil {
				if line.Note == "" {
					o.Since, wait = line.Time.Add(1), readyInterval
				}
				err = stream.Send(&shoalv1.LogsResponse{Stderr: line.Stderr, AtMs: line.Time.UnixMilli(), AtNs: line.Time.UnixNano(), Line: line.Line, Note: line.Note})
				if err != nil {
					return err
				}
				continue
			}
			if ctx.Err() != nil || errors.Is(err, runtime.ErrClosing) {
				return connect.NewError(connect.CodeUnavailable, fmt.Errorf("output of task %s: %w", t.Name, runtime.ErrClosing))
			}
			if made = !errors.Is(err, runtime.ErrNotFound) && !errors.Is(err, os.ErrNotExist); made {
				return connect.NewError(connect.CodeInternal, fmt.Errorf("output of task %s: %w", t.Name, err))
			}
		}
		// A task that is about to be made has no output yet.
		_, st, ok := m.tasks.find(t.ID)
		if !r.Follow || !ok || st.State.Ended() || !o.Until.IsZero() && time.Now().After(o.Until) {
			return stream.Send(&shoalv1.LogsResponse{Ended: true})
		}
		if made {
			// Its program has ended: the task is about to, or starts it again.
			o.Tail, wait = 0, min(2*wait, time.Second)
		}
		if !sleep.For(ctx, wait) || m.ctx.Err() != nil {
			return connect.NewError(connect.CodeUnavailable, fmt.Errorf("output of task %s: %w", t.Name, runtime.ErrClosing))
		}
	}
}

func unixNano(ns int64) time.Time {
	if ns == 0 {
		return time.Time{}
	}
	return time.Unix(0, ns)
}

// Stats counts what the node's tasks have sent and received, or what its rules dropped.
func (a *nodeAPI) Stats(ctx context.Context, req *connect.Request[shoalv1.StatsRequest]) (*connect.Response[shoalv1.StatsResponse], error) {
	m, err := a.need(ctx)
	if err != nil {
		return nil, err
	}
	resp := &shoalv1.StatsResponse{Node: m.name()}
	if req.Msg.Drops {
		by, err := m.drops(ctx)
		if err != nil {
			return nil, connect.NewError(connect.CodeInternal, fmt.Errorf("node %s: %w", m.name(), err))
		}
		for k, d := range by {
			resp.Drops = append(resp.Drops, &shoalv1.StatsResponse_Drop{Network: k.network, Reason: k.reason, Packets: d.Packets, Bytes: d.Bytes})
		}
		slices.SortFunc(resp.Drops, func(a, b *shoalv1.StatsResponse_Drop) int {
			return cmp.Or(strings.Compare(a.Network, b.Network), strings.Compare(a.Reason, b.Reason))
		})
		return connect.NewResponse(resp), nil
	}
	for id, st := range m.tasks.statuses() {
		t, _, ok := m.tasks.find(id)
		if !ok || st.PID == 0 || len(req.Msg.Tasks) > 0 && !slices.Contains(req.Msg.Tasks, id) {
			continue
		}
		s, err := readStats(st.PID)
		if err != nil {
			continue // it has just ended
		}
		s.Id, s.Name = id, t.Name
		if u, err := a.cfg.Runtime.Usage(ctx, id); err == nil {
			cpu := uint64(u.CPU)
			s.CpuNs, s.Memory, s.MemoryLimit, s.Pids, s.PidsLimit, s.ReadBytes, s.WriteBytes = &cpu, &u.Memory, u.MemoryLimit, &u.Pids, u.PidsLimit, u.ReadBytes, u.WriteBytes
		}
		s.NodeMemory, s.NodeCpus = nodeMemory(), uint32(goruntime.NumCPU())
		resp.Tasks = append(resp.Tasks, s)
	}
	slices.SortFunc(resp.Tasks, func(a, b *shoalv1.StatsResponse_Task) int { return strings.Compare(a.Name, b.Name) })
	return connect.NewResponse(resp), nil
}

// Tasks are those of this node.
func (a *nodeAPI) Tasks(ctx context.Context, _ *connect.Request[shoalv1.TasksRequest]) (*connect.Response[shoalv1.TasksResponse], error) {
	m, err := a.need(ctx)
	if err != nil {
		return nil, err
	}
	if err := a.adopted(ctx, m); err != nil {
		return nil, err
	}
	resp := &shoalv1.TasksResponse{}
	for id, st := range m.tasks.statuses() {
		if t, _, ok := m.tasks.find(id); ok {
			t.Status = st
			resp.Tasks = append(resp.Tasks, api.Task(t))
		}
	}
	return connect.NewResponse(resp), nil
}

// Kernel tells what the kernel holds of virtual IPs, read now.
func (a *nodeAPI) Kernel(ctx context.Context, req *connect.Request[shoalv1.KernelRequest]) (*connect.Response[shoalv1.KernelResponse], error) {
	m, err := a.need(ctx)
	if err != nil {
		return nil, err
	}
	have, err := m.vip.Look(ctx)
	if err != nil {
		return nil, connect.NewError(connect.CodeInternal, fmt.Errorf("virtual IPs of node %s can't be read: %w", m.name(), err))
	}
	owners := map[string]string{} // network and VIP → service
	m.mu.Lock()
	if m.assigned != nil {
		for _, s := range m.assigned.Services {
			for _, v := range s.VIPs {
				for _, ip := range v.Addrs {
					owners[v.Network+" "+ip.String()] = s.ID
				}
			}
		}
	}
	m.mu.Unlock()
	resp := &shoalv1.KernelResponse{Node: m.name(), DataPath: m.cfg.VIP.Name()}
	for _, n := range have.Networks {
		for _, s := range n.Servers {
			owner := owners[n.ID+" "+s.VIP.String()]
			if req.Msg.Service != "" && owner != req.Msg.Service {
				continue
			}
			out := &shoalv1.KernelResponse_Server{Service: owner, Network: n.ID, Vip: s.VIP.String(), Open: s.Open}
			for _, b := range s.Backends {
				out.Backends = append(out.Backends, &shoalv1.KernelResponse_Backend{Addr: b.Addr.String(), Weight: int32(b.Weight), Connections: -1})
			}
			resp.Servers = append(resp.Servers, out)
		}
	}
	return connect.NewResponse(resp), nil
}

// Wait answers when the task has ended.
func (a *nodeAPI) Wait(ctx context.Context, req *connect.Request[shoalv1.WaitRequest]) (*connect.Response[shoalv1.WaitResponse], error) {
	m, _, err := a.task(ctx, req.Msg.Task)
	if err != nil {
		return nil, err
	}
	for {
		_, st, ok := m.tasks.find(req.Msg.Task)
		if !ok || st.State.Ended() {
			m.tasks.hear(req.Msg.Task)
			return connect.NewResponse(&shoalv1.WaitResponse{Status: api.TaskStatus(st)}), nil
		}
		if err := m.tasks.changed(ctx, req.Msg.Task, st); err != nil {
			return nil, err
		}
	}
}

// changed waits until a task's status is no longer the given one.
func (m *tasks) changed(ctx context.Context, id string, was spec.TaskStatus) error {
	for {
		_, st, ok := m.find(id)
		if !ok || st != was {
			return nil
		}
		if !sleep.For(ctx, 20*time.Millisecond) {
			return ctx.Err()
		}
	}
}
