package control

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/control/state"
	"github.com/shoalnet/shoal/internal/sleep"
	"github.com/shoalnet/shoal/spec"
)

const (
	maxWatched = 1000 // objects of one stream
	// Looking at what is watched takes one part in watchShare of a processor at most: in
	// a cluster of a thousand nodes there is something new all the time.
	watchShare = 5
)

// Watch streams how some services and tasks are, until the client has enough or another
// manager leads. What changes again while it is told is told as it is then.
func (s *service) Watch(ctx context.Context, req *connect.Request[shoalv1.WatchRequest], stream *connect.ServerStream[shoalv1.WatchResponse]) error {
	if n := len(req.Msg.Services) + len(req.Msg.Tasks); n == 0 || n > maxWatched {
		return invalid(fmt.Errorf("watch: name services or tasks, %d at most", maxWatched))
	}
	term, err := s.m.sureTerm()
	if err != nil {
		return err
	}
	if err := s.m.awaitReports(ctx); err != nil {
		return err
	}
	alive := time.NewTicker(s.m.cfg.Tuning.Alive)
	defer alive.Stop()
	var sent []byte
	for again := true; ; {
		changed, news := s.m.fsm.next(), s.m.news()
		began := time.Now()
		var now *shoalv1.WatchResponse
		if err := s.read(func(st *state.State) (err error) {
			now, err = s.watched(st, req.Msg)
			return err
		}); err != nil {
			return err
		}
		b, err := proto.MarshalOptions{Deterministic: true}.Marshal(now)
		if err != nil {
			return err
		}
		if again || !bytes.Equal(b, sent) {
			if err := stream.Send(now); err != nil {
				return err
			}
			sent = b
		}
		if !sleep.For(ctx, (watchShare-1)*time.Since(began)) {
			return ctx.Err()
		}
		again = false
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-term.Done():
			return errNotLeader()
		case <-changed:
		case <-news:
		case <-alive.C:
			again = true
		}
	}
}

// watched is what there is of what is asked for. Its error is that a name is ambiguous.
func (s *service) watched(st *state.State, req *shoalv1.WatchRequest) (*shoalv1.WatchResponse, error) {
	out := &shoalv1.WatchResponse{}
	faults := s.m.faultsByObject(st)
	there := func(err error) (bool, error) {
		if errors.Is(err, state.ErrNotFound) {
			return false, nil
		}
		return err == nil, err
	}
	listed := map[string]bool{}
	add := func(ts ...spec.Task) {
		for _, t := range ts {
			if !listed[t.ID] {
				listed[t.ID] = true
				out.Tasks = append(out.Tasks, taskInfo(t, faults))
			}
		}
	}
	for _, ref := range req.Services {
		v, err := st.Service(ref)
		if ok, err := there(err); err != nil {
			return nil, err
		} else if ok {
			out.Services = append(out.Services, s.serviceInfo(st, v, faults))
			add(st.Tasks(state.TaskFilter{Service: v.ID, All: true})...)
		}
	}
	for _, ref := range req.Tasks {
		t, err := st.Task(ref)
		if ok, err := there(err); err != nil {
			return nil, err
		} else if ok {
			add(t)
		}
	}
	return out, nil
}
