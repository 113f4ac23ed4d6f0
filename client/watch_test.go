package client

import (
	"context"
	"errors"
	"testing"
	"time"

	"connectrpc.com/connect"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/api/shoal/v1/shoalv1connect"
	"github.com/shoalnet/shoal/internal/sleep"
	"github.com/shoalnet/shoal/spec"
)

// Watch tells at each change of the tasks asked for, as a leader does that knows it.
func (a *watchedAgent) Watch(ctx context.Context, req *connect.Request[shoalv1.WatchRequest], stream *connect.ServerStream[shoalv1.WatchResponse]) error {
	if !a.knows {
		return a.fakeAgent.Watch(ctx, req, stream)
	}
	for sent := ""; ; {
		resp, err := a.ListTasks(ctx, connect.NewRequest(&shoalv1.ListTasksRequest{Refs: req.Msg.Tasks}))
		now := &shoalv1.WatchResponse{}
		if err == nil {
			now.Tasks = resp.Msg.Tasks
		}
		if s := now.String() + "."; s != sent {
			if err := stream.Send(now); err != nil {
				return err
			}
			sent = s
		}
		if !sleep.For(ctx, 2*time.Millisecond) {
			return ctx.Err()
		}
	}
}

// TestWatcher: it tells how things are and become, over the end of an agent, and of
// leaders that are only to be asked.
func TestWatcher(t *testing.T) {
	for _, knows := range []bool{true, false} {
		f := newFakeAgentAs(t, func(a *fakeAgent) shoalv1connect.ControlHandler { return &watchedAgent{a, knows} })
		f.put("t1", "", spec.TaskStarting)
		w := New(f.socket).Watch(&shoalv1.WatchRequest{Tasks: []string{"t1"}})
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		away := 0
		until := func(want string) {
			t.Helper()
			for {
				now, err := w.Next(ctx)
				if Away(err) {
					away++
					sleep.For(ctx, 10*time.Millisecond)
					continue
				}
				if err != nil {
					t.Fatalf("knows %t: %v, want %q", knows, err, want)
				}
				is := ""
				if len(now.Tasks) == 1 {
					is = now.Tasks[0].Status.State
				}
				if is == want {
					return
				}
			}
		}
		until("starting")
		f.put("t1", "", spec.TaskRunning)
		until("running")
		f.stop()
		f.start()
		f.do(func() { delete(f.tasks, "t1") })
		until("")
		if knows && away == 0 {
			t.Error("the end of a stream was not told")
		}
		cancel()
		if now, err := w.Next(ctx); !errors.Is(err, context.Canceled) || now == nil {
			t.Errorf("knows %t, after the end: %v, %v", knows, now, err)
		}
		w.Close()
	}
}

// watchedAgent is a fakeAgent whose leader may be of a version that has Watch.
type watchedAgent struct {
	*fakeAgent
	knows bool
}
