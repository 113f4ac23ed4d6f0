package client

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/internal/sleep"
	"github.com/shoalnet/shoal/peer"
	"github.com/shoalnet/shoal/spec"
)

const (
	// patience is how long an agent that has answered before is waited for.
	patience = time.Minute
	reAsk    = 100 * time.Millisecond
)

// A CutError says that the agent, or the leader behind it, was lost while it worked
// on a change: it was made or not.
type CutError struct{ Err error }

func (e *CutError) Error() string {
	return fmt.Sprintf("the agent was lost while it worked on this (%s): see whether the change was made", Message(e.Err))
}

func (e *CutError) Unwrap() error { return e.Err }

// isCut tells whether it is unknown what came of a call.
func isCut(err error) bool {
	var cut *CutError
	var ce *connect.Error
	return errors.As(err, &cut) || errors.As(err, &ce) && ce.Meta().Get(peer.UnknownHeader) != ""
}

// again makes calls outlast an agent that is started anew: those that are repeated
// without harm, and those that were not sent. An agent that has not answered yet is
// not waited for.
type again struct{ answered *atomic.Bool }

func (g again) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		for since := time.Now(); ; {
			resp, err := next(ctx, req)
			if err == nil || connect.IsWireError(err) {
				g.answered.Store(true)
				return resp, err
			}
			if ctx.Err() != nil || !localCut(err) || !g.answered.Load() {
				return resp, err
			}
			if !neverSent(err) && !repeatable(req.Spec().Procedure) {
				return nil, connect.NewError(connect.CodeUnavailable, &CutError{err})
			}
			if time.Since(since) > patience || !sleep.For(ctx, reAsk) {
				return resp, err
			}
		}
	}
}

func (g again) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

func (g again) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return next
}

// neverSent tells that there was nobody to send a call to, for the moment.
func neverSent(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "dial" && !errors.Is(err, syscall.EACCES)
}

// repeatable are calls that only read, or that say the same when made twice.
func repeatable(procedure string) bool {
	verb := peer.Verb(procedure)
	for _, p := range []string{"List", "Show", "Info", "Doctor", "Tasks", "Stats", "Kernel", "Wait", "ImageList", "ImageInspect", "ImageResolve", "VolumeList", "Top"} {
		if strings.HasPrefix(verb, p) {
			return true
		}
	}
	return false
}

// Away tells whether an error says that an agent, or a leader, is not to be reached
// now, which may pass.
func Away(err error) bool { return err != nil && away(err) }

// sure makes a call, which may be made twice, until something answers that knows what
// came of it; cut tells that it was not the first.
func sure[T any](ctx context.Context, call func() (T, error)) (v T, cut bool, err error) {
	for since := time.Now(); ; {
		v, err = call()
		if !isCut(err) && (!cut || !Away(err)) {
			return v, cut, err
		}
		cut = true
		if time.Since(since) > patience || !sleep.For(ctx, reAsk) {
			return v, cut, err
		}
	}
}

// unknown is the error of a change of which it could not be learned whether it was
// made, after all patience or as the user had enough. look finds what it would have
// made.
func (c *Client) unknown(ctx context.Context, err error, what, see string, look func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	lerr := look(ctx)
	switch {
	case lerr == nil:
		return fmt.Errorf("%s: %s exists: see '%s'", Message(err), what, see)
	case connect.CodeOf(lerr) == connect.CodeNotFound:
		return fmt.Errorf("%s: %s was not made", Message(err), what)
	}
	return fmt.Errorf("%s: whether %s exists is not known: see '%s' when the agent is back", Message(err), what, see)
}

// create makes an object, once, whatever happens to the agent meanwhile: the ID in
// its request is its own, whichever call of it is the one that is heard.
func create[T any](ctx context.Context, c *Client, what, see string, call func() (*connect.Response[T], error), look func(context.Context) error) (*T, error) {
	resp, cut, err := sure(ctx, call)
	if err == nil {
		return resp.Msg, nil
	}
	if cut && (isCut(err) || Away(err)) || ctx.Err() != nil {
		err = c.unknown(ctx, err, what, see, look)
	}
	return nil, err
}

// CreateService makes a service, once, whatever happens to the agent meanwhile.
func (c *Client) CreateService(ctx context.Context, s *shoalv1.ServiceSpec) (*shoalv1.Service, error) {
	id := spec.NewID()
	made, err := create(ctx, c, "service "+s.GetName(), "shoal svc ps "+s.GetName(), func() (*connect.Response[shoalv1.CreateServiceResponse], error) {
		return c.Control.CreateService(ctx, connect.NewRequest(&shoalv1.CreateServiceRequest{Spec: s, Id: id}))
	}, func(ctx context.Context) error {
		_, err := c.Services(ctx, id)
		return err
	})
	return made.GetService(), err
}

// CreateTask is CreateService for a task.
func (c *Client) CreateTask(ctx context.Context, req *shoalv1.CreateTaskRequest) (*shoalv1.Task, error) {
	req.Id = spec.NewID()
	made, err := create(ctx, c, "task "+cmp.Or(req.Name, req.Id), "shoal ps -a", func() (*connect.Response[shoalv1.CreateTaskResponse], error) {
		return c.Control.CreateTask(ctx, connect.NewRequest(req))
	}, func(ctx context.Context) error {
		_, err := c.Tasks(ctx, &shoalv1.ListTasksRequest{Refs: []string{req.Id}, All: true})
		return err
	})
	return made.GetTask(), err
}

// CreateNetwork is CreateService for a network.
func (c *Client) CreateNetwork(ctx context.Context, req *shoalv1.CreateNetworkRequest) (*shoalv1.Network, error) {
	req.Id = spec.NewID()
	made, err := create(ctx, c, "network "+req.Name, "shoal net ls", func() (*connect.Response[shoalv1.CreateNetworkResponse], error) {
		return c.Control.CreateNetwork(ctx, connect.NewRequest(req))
	}, func(ctx context.Context) error {
		_, _, err := c.Networks(ctx, req.Id)
		return err
	})
	return made.GetNetwork(), err
}

// UpdateService changes a service. Of a change whose answer was lost, which another
// try finds made, it is the answer.
func (c *Client) UpdateService(ctx context.Context, req *shoalv1.UpdateServiceRequest) (*shoalv1.Service, error) {
	resp, cut, err := sure(ctx, func() (*connect.Response[shoalv1.UpdateServiceResponse], error) {
		return c.Control.UpdateService(ctx, connect.NewRequest(req))
	})
	if err == nil {
		return resp.Msg.Service, nil
	}
	if !cut {
		return nil, err
	}
	if now, lerr := c.Services(ctx, req.Ref); lerr == nil && len(now) == 1 && connect.CodeOf(err) == connect.CodeAborted && now[0].Version > req.Version {
		want := proto.CloneOf(req.Spec)
		if req.Replicas != nil && want != nil {
			want.Replicas = *req.Replicas
		}
		if proto.Equal(now[0].Spec, want) {
			return now[0], nil
		}
		return nil, fmt.Errorf("the agent was lost while it changed service %s, which has been changed, by this or by another: see 'shoal svc inspect %s'", req.Ref, req.Ref)
	}
	return nil, err
}

// remove makes a call that takes something away. What is gone after a call whose
// answer was lost was taken away by that.
func remove[T any](ctx context.Context, call func() (T, error)) error {
	_, cut, err := sure(ctx, call)
	if cut && connect.CodeOf(err) == connect.CodeNotFound {
		return nil
	}
	return err
}

// RemoveService removes a service. One that is gone after a call whose answer was
// lost was removed by that.
func (c *Client) RemoveService(ctx context.Context, ref string) error {
	return remove(ctx, func() (*connect.Response[shoalv1.RemoveServiceResponse], error) {
		return c.Control.RemoveService(ctx, connect.NewRequest(&shoalv1.RemoveServiceRequest{Ref: ref}))
	})
}

// StartTask has a task run again. It may be asked for twice: the run in the request is made
// once.
func (c *Client) StartTask(ctx context.Context, req *shoalv1.StartTaskRequest) (*shoalv1.Task, error) {
	resp, _, err := sure(ctx, func() (*connect.Response[shoalv1.StartTaskResponse], error) {
		return c.Control.StartTask(ctx, connect.NewRequest(req))
	})
	if err != nil {
		return nil, err
	}
	return resp.Msg.Task, nil
}

// RenameTask gives a task another name. One that has it after a call whose answer was lost
// has it by that.
func (c *Client) RenameTask(ctx context.Context, id, name string) error {
	_, cut, err := sure(ctx, func() (*connect.Response[shoalv1.RenameTaskResponse], error) {
		return c.Control.RenameTask(ctx, connect.NewRequest(&shoalv1.RenameTaskRequest{Ref: id, Name: name}))
	})
	if err != nil && cut {
		if ts, lerr := c.Tasks(ctx, &shoalv1.ListTasksRequest{Refs: []string{id}, All: true}); lerr == nil && len(ts) == 1 && ts[0].Name == name {
			return nil
		}
	}
	return err
}

// StopTask asks for a task's end. See RemoveService.
func (c *Client) StopTask(ctx context.Context, req *shoalv1.StopTaskRequest) error {
	return remove(ctx, func() (*connect.Response[shoalv1.StopTaskResponse], error) {
		return c.Control.StopTask(ctx, connect.NewRequest(req))
	})
}
