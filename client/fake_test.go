package client

import (
	"context"
	"errors"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/api/shoal/v1/shoalv1connect"
	"github.com/shoalnet/shoal/internal/sleep"
	"github.com/shoalnet/shoal/spec"
)

// fakeAgent answers at a socket as an agent does, of tasks and services that a test
// makes. Its end and its start anew cut connections as a real one's do.
type fakeAgent struct {
	shoalv1connect.UnimplementedControlHandler
	shoalv1connect.UnimplementedNodeHandler
	t      *testing.T
	socket string
	srv    *http.Server

	leader shoalv1connect.ControlHandler

	mu       sync.Mutex
	services map[string]*shoalv1.Service
	tasks    map[string]*shoalv1.Task
	lines    map[string][]string // of a task; absent: its node does not have it
	over     map[string]bool     // the task has no more
	away     int                 // so many calls for output find no node
	still    time.Duration       // it stands still for so long when it is next asked for tasks
	creates  int
	cut      func() // called while a service is made, once it is
}

func newFakeAgent(t *testing.T) *fakeAgent {
	return newFakeAgentAs(t, func(a *fakeAgent) shoalv1connect.ControlHandler { return a })
}

// newFakeAgentAs makes one whose leader is another.
func newFakeAgentAs(t *testing.T, leader func(*fakeAgent) shoalv1connect.ControlHandler) *fakeAgent {
	a := &fakeAgent{t: t, socket: filepath.Join(t.TempDir(), "s"), services: map[string]*shoalv1.Service{}, tasks: map[string]*shoalv1.Task{}, lines: map[string][]string{}, over: map[string]bool{}}
	a.leader = leader(a)
	a.start()
	t.Cleanup(a.stop)
	return a
}

func (a *fakeAgent) start() {
	ln, err := net.Listen("unix", a.socket)
	if err != nil {
		a.t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(shoalv1connect.NewControlHandler(a.leader))
	mux.Handle(shoalv1connect.NewNodeHandler(a))
	p := new(http.Protocols)
	p.SetUnencryptedHTTP2(true)
	srv := &http.Server{Handler: mux, Protocols: p}
	a.mu.Lock()
	a.srv = srv
	a.mu.Unlock()
	go func() { _ = srv.Serve(ln) }() // ends with stop
}

// stop ends it as kill -9 does: every connection is cut.
func (a *fakeAgent) stop() {
	a.mu.Lock()
	srv := a.srv
	a.mu.Unlock()
	srv.Close()
}

// do changes what there is.
func (a *fakeAgent) do(fn func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	fn()
}

func (a *fakeAgent) put(id, service string, state spec.TaskState, lines ...string) {
	a.do(func() {
		a.tasks[id] = &shoalv1.Task{Id: id, Name: "name-" + id, Service: service, Node: "n1", Spec: &shoalv1.TaskSpec{}, Status: &shoalv1.TaskStatus{State: state.String()}}
		a.lines[id] = append(a.lines[id], lines...)
		a.over[id] = state.Ended()
	})
}

func (a *fakeAgent) ListTasks(ctx context.Context, req *connect.Request[shoalv1.ListTasksRequest]) (*connect.Response[shoalv1.ListTasksResponse], error) {
	a.mu.Lock()
	still := a.still
	a.still = 0
	a.mu.Unlock()
	sleep.For(ctx, still)
	a.mu.Lock()
	defer a.mu.Unlock()
	if s := req.Msg.Service; s != "" && a.services[s] == nil {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("no such service"))
	}
	resp := &shoalv1.ListTasksResponse{}
	for id, t := range a.tasks {
		if s := req.Msg.Service; (s == "" || t.Service == s) && (len(req.Msg.Refs) == 0 || slices.Contains(req.Msg.Refs, id)) {
			resp.Tasks = append(resp.Tasks, t)
		}
	}
	if len(req.Msg.Refs) > 0 && len(resp.Tasks) == 0 {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("no such task"))
	}
	return connect.NewResponse(resp), nil
}

func (a *fakeAgent) Logs(ctx context.Context, req *connect.Request[shoalv1.LogsRequest], stream *connect.ServerStream[shoalv1.LogsResponse]) error {
	id := req.Msg.Task
	a.mu.Lock()
	_, ok := a.lines[id]
	away := a.away > 0
	if away {
		a.away--
	}
	next := 0
	if req.Msg.Tail < 0 {
		next = len(a.lines[id])
	}
	a.mu.Unlock()
	if away {
		return connect.NewError(connect.CodeUnavailable, errors.New("node n1 does not answer"))
	}
	if !ok {
		return connect.NewError(connect.CodeNotFound, errors.New("task is not on this node"))
	}
	if req.Msg.Tail < 0 {
		if err := stream.Send(&shoalv1.LogsResponse{Begin: true, AtNs: int64(next)*1000 + 1}); err != nil {
			return err
		}
	}
	for {
		a.mu.Lock()
		lines, over := a.lines[id], a.over[id]
		a.mu.Unlock()
		for ; next < len(lines); next++ {
			at := int64(next)*1000 + 1000 // the time of a line is its number
			if at < req.Msg.SinceNs {
				continue
			}
			if err := stream.Send(&shoalv1.LogsResponse{AtNs: at, Line: []byte(lines[next])}); err != nil {
				return err
			}
		}
		if over || !req.Msg.Follow {
			return stream.Send(&shoalv1.LogsResponse{Ended: true})
		}
		if !sleep.For(ctx, 5*time.Millisecond) {
			return ctx.Err()
		}
	}
}
