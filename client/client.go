// Package client is what Shoal's command line does with the API beyond one call:
// it finds what a person names, waits until a change is in effect, and goes on
// when the agent at the other end of the socket, or the leader, changes.
package client

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"

	"connectrpc.com/connect"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/api/shoal/v1/shoalv1connect"
	"github.com/shoalnet/shoal/peer"
	"github.com/shoalnet/shoal/spec"
)

// Client speaks with the agent of a node by its unix socket.
type Client struct {
	Socket  string
	Control shoalv1connect.ControlClient
	Node    shoalv1connect.NodeClient
	Local   shoalv1connect.LocalClient
}

// New makes a client of the agent at a socket. It makes no connection yet.
func New(socket string) *Client {
	h, o := peer.UnixClient(socket), connect.WithInterceptors(explain{socket}, again{new(atomic.Bool)})
	return &Client{socket, shoalv1connect.NewControlClient(h, "http://shoal", o), shoalv1connect.NewNodeClient(h, "http://shoal", o), shoalv1connect.NewLocalClient(h, "http://shoal", o)}
}

// Explain says what to do when no agent answers; other errors stay as they are.
// Calls explain theirs by themselves, streams don't.
func (c *Client) Explain(err error) error { return explain{c.Socket}.err(err) }

// explain says what to do when no agent answers.
type explain struct{ socket string }

func (e explain) err(err error) error {
	var op *net.OpError
	if !errors.As(err, &op) || op.Op != "dial" {
		return err
	}
	switch {
	case errors.Is(err, syscall.EACCES):
		return fmt.Errorf("no permission to use %s: run as root, or as a member of the socket's group", e.socket)
	case errors.Is(err, syscall.ENOENT), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("no agent answers at %s: start it with 'systemctl start shoal' or 'shoal agent', or name its socket with --socket or $SHOAL_SOCKET", e.socket)
	}
	return err
}

func (e explain) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		resp, err := next(ctx, req)
		return resp, e.err(err)
	}
}

func (e explain) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}

func (e explain) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return next
}

// Names maps IDs to names.
type Names map[string]string

// Of is the name of an ID, or the ID where none is known.
func (n Names) Of(id string) string { return cmp.Or(n[id], id) }

// Nodes are all nodes, or those that refs name, and the names of those.
func (c *Client) Nodes(ctx context.Context, refs ...string) ([]*shoalv1.NodeInfo, Names, error) {
	resp, err := c.Control.ListNodes(ctx, connect.NewRequest(&shoalv1.ListNodesRequest{Refs: refs}))
	if err != nil {
		return nil, nil, err
	}
	m := Names{}
	for _, n := range resp.Msg.Nodes {
		m[n.Id] = n.Name
	}
	return resp.Msg.Nodes, m, nil
}

// Networks are all networks, or those that refs name, and the names of those.
func (c *Client) Networks(ctx context.Context, refs ...string) ([]*shoalv1.Network, Names, error) {
	resp, err := c.Control.ListNetworks(ctx, connect.NewRequest(&shoalv1.ListNetworksRequest{Refs: refs}))
	if err != nil {
		return nil, nil, err
	}
	m := Names{}
	for _, n := range resp.Msg.Networks {
		m[n.Id] = n.Name
	}
	return resp.Msg.Networks, m, nil
}

// Services are all services, or those that refs name.
func (c *Client) Services(ctx context.Context, refs ...string) ([]*shoalv1.Service, error) {
	resp, err := c.Control.ListServices(ctx, connect.NewRequest(&shoalv1.ListServicesRequest{Refs: refs}))
	if err != nil {
		return nil, err
	}
	return resp.Msg.Services, nil
}

// Tasks are those asked for.
func (c *Client) Tasks(ctx context.Context, req *shoalv1.ListTasksRequest) ([]*shoalv1.Task, error) {
	resp, err := c.Control.ListTasks(ctx, connect.NewRequest(req))
	if err != nil {
		return nil, err
	}
	return resp.Msg.Tasks, nil
}

// Task finds one task as a person names it: its name, its ID or the beginning
// of it, or SERVICE.SLOT for the newest task there. One that runs goes before
// one that has ended.
func (c *Client) Task(ctx context.Context, ref string) (*shoalv1.Task, error) {
	all, err := c.Tasks(ctx, &shoalv1.ListTasksRequest{All: true})
	if err != nil {
		return nil, err
	}
	return PickTask(all, ref)
}

// RunningTask is Task for what its node can do without the managers: of a task
// on this node they are not asked.
func (c *Client) RunningTask(ctx context.Context, ref string) (*shoalv1.Task, error) {
	resp, err := c.Node.Tasks(ctx, connect.NewRequest(&shoalv1.TasksRequest{}))
	if err != nil {
		return c.Task(ctx, ref)
	}
	here := slices.DeleteFunc(resp.Msg.Tasks, Ended)
	if i := slices.IndexFunc(here, func(t *shoalv1.Task) bool { return t.Id == ref }); i >= 0 {
		return here[i], nil
	}
	if i := slices.IndexFunc(here, func(t *shoalv1.Task) bool { return t.Name == ref }); i >= 0 && len(ref) != spec.IDLen {
		return here[i], nil // and no other has it as its ID
	}
	t, err := c.Task(ctx, ref)
	if connect.CodeOf(err) == connect.CodeUnavailable {
		if t, herr := PickTask(here, ref); herr == nil {
			return t, nil
		}
	}
	return t, err
}

// ErrNotFound is that no task has a name or an ID.
var ErrNotFound = errors.New("no such task")

// PickTask is Task among some.
func PickTask(all []*shoalv1.Task, ref string) (*shoalv1.Task, error) {
	rank := func(t *shoalv1.Task) int {
		switch {
		case t.Id == ref:
			return 5
		case t.Name == ref:
			return 4
		case strings.HasPrefix(t.Name, ref+".") && strings.Count(ref, ".") > 0 && t.Service != "":
			return 3
		case len(ref) >= 3 && strings.HasPrefix(t.Id, ref):
			return 2
		}
		return 0
	}
	var best *shoalv1.Task
	ambiguous := false
	for _, t := range all {
		r := rank(t)
		if r == 0 {
			continue
		}
		if best == nil {
			best = t
			continue
		}
		live, bestLive := !Ended(t), !Ended(best)
		switch b := rank(best); {
		case r != b:
			if r > b {
				best, ambiguous = t, false
			}
		case live != bestLive:
			if live {
				best = t
			}
		case r == 2:
			ambiguous = true
		case t.CreatedMs > best.CreatedMs:
			best = t
		}
	}
	if best == nil {
		return nil, fmt.Errorf("%w: %s: 'shoal ps -a' lists all of them", ErrNotFound, ref)
	}
	if ambiguous {
		return nil, fmt.Errorf("%q is the beginning of several tasks' IDs: give more of it", ref)
	}
	return best, nil
}

// Ended tells whether a task no longer runs.
func Ended(t *shoalv1.Task) bool {
	s, err := spec.ParseTaskState(t.GetStatus().GetState())
	return err == nil && s.Ended()
}

// Match tells how well what a person typed names a thing.
type Match int

// Matches, the better ones greater: an ID goes before a name, and both before the
// beginning of an ID, whatever kind of thing it is of.
const (
	NotMeant Match = iota
	MeantByPrefix
	MeantByName
	MeantByID
)

// Meant tells how ref names the thing of an ID and a name, which a lookup by ref has
// brought.
func Meant(ref, id, name string) Match {
	switch {
	case ref == id:
		return MeantByID
	case strings.HasPrefix(id, ref) && !strings.EqualFold(ref, name):
		return MeantByPrefix
	}
	return MeantByName
}

// ServiceOrTask finds what ref names, as the managers do where either may be meant: a
// service before a task that it names as well. One of the two is returned. The error
// names what was not found.
func (c *Client) ServiceOrTask(ctx context.Context, ref string) (*shoalv1.Service, *shoalv1.Task, error) {
	var asService, asTask Match
	svcs, err := c.Services(ctx, ref)
	if err == nil && len(svcs) == 1 {
		asService = Meant(ref, svcs[0].Id, svcs[0].GetSpec().GetName())
	}
	t, terr := c.Task(ctx, ref)
	if terr == nil {
		asTask = Meant(ref, t.Id, t.Name)
	}
	switch best := max(asService, asTask); {
	case err != nil && connect.CodeOf(err) != connect.CodeNotFound && best < MeantByName:
		return nil, nil, err
	case terr != nil && !errors.Is(terr, ErrNotFound) && best < MeantByName:
		return nil, nil, terr
	case best == NotMeant:
		return nil, nil, fmt.Errorf("no such service or task: %s", ref)
	case asService == best:
		return svcs[0], nil, nil
	}
	return nil, t, nil
}
