package client

import (
	"context"
	"errors"
	"time"

	"connectrpc.com/connect"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/internal/sleep"
)

const (
	// watchTick is how often [Watcher.Next] returns although it was told nothing new: who
	// waits has bounds of its own to look at.
	watchTick = 500 * time.Millisecond
	// watchSilence is without a word from the leader, who has one every second.
	watchSilence = 5 * time.Second
	// watchPoll is between questions to a leader of a version that is not to be watched.
	watchPoll = 50 * time.Millisecond
)

// Watcher follows how some services, with all of their tasks, and tasks are. It is for
// one goroutine. Make it with [Client.Watch], end it with Close.
type Watcher struct {
	c      *Client
	req    *shoalv1.WatchRequest
	last   *shoalv1.WatchResponse // nil: nothing was told yet
	heard  time.Time
	polls  bool
	told   chan watched // of the stream that is open; nil: none is
	cancel context.CancelFunc
}

type watched struct {
	resp *shoalv1.WatchResponse
	err  error
}

// Watch makes a Watcher. It asks nobody yet.
func (c *Client) Watch(req *shoalv1.WatchRequest) *Watcher { return &Watcher{c: c, req: req} }

// Close ends the stream, if one is open.
func (w *Watcher) Close() {
	if w.cancel != nil {
		w.cancel()
		w.cancel, w.told = nil, nil
	}
}

// Next waits until something is otherwise than it last returned, but not long, and
// returns how it is: what is no more is left out. With an error for which [Away] is true
// it may be called again. When ctx ends it returns its error and what was told last.
func (w *Watcher) Next(ctx context.Context) (*shoalv1.WatchResponse, error) {
	if w.polls {
		if w.last != nil && !sleep.For(ctx, watchPoll) {
			return w.last, ctx.Err()
		}
		return w.ask(ctx)
	}
	if w.told == nil {
		w.open(ctx)
	}
	var tick <-chan time.Time
	if w.last != nil {
		tick = time.After(watchTick)
	}
	silence := time.NewTimer(watchSilence - time.Since(w.heard))
	defer silence.Stop()
	select {
	case <-ctx.Done():
		return w.last, ctx.Err()
	case m := <-w.told:
		w.heard = time.Now()
		if m.err == nil {
			w.last = m.resp
			return w.last, nil
		}
		w.Close()
		if ctx.Err() != nil {
			return w.last, ctx.Err()
		}
		if Away(m.err) {
			return w.last, m.err
		}
		// A leader of before there was Watch. What else is wrong is said of questions, too.
		w.polls = true
		return w.ask(ctx)
	case <-silence.C:
		w.Close()
		return w.ask(ctx)
	case <-tick:
		return w.last, nil
	}
}

// open begins a stream. What it brings is taken over as fast as it comes, the newest
// only: each message is all of it.
func (w *Watcher) open(ctx context.Context) {
	ctx, w.cancel = context.WithCancel(ctx)
	told := make(chan watched, 1)
	w.told, w.heard = told, time.Now()
	put := func(m watched) {
		select {
		case <-told:
		default:
		}
		told <- m // room: nobody else puts
	}
	go func() { // ends with ctx
		stream, err := w.c.Control.Watch(ctx, connect.NewRequest(w.req))
		if err != nil {
			put(watched{err: w.c.Explain(err)})
			return
		}
		defer stream.Close()
		for stream.Receive() {
			put(watched{resp: stream.Msg()})
		}
		if err = stream.Err(); err == nil {
			err = connect.NewError(connect.CodeUnavailable, errors.New("the managers' leader ended the watch"))
		}
		put(watched{err: w.c.Explain(err)})
	}()
}

// ask is a watch of one look.
func (w *Watcher) ask(ctx context.Context) (*shoalv1.WatchResponse, error) {
	now := &shoalv1.WatchResponse{}
	err := func() error {
		gone := func(err error) bool { return err != nil && connect.CodeOf(err) == connect.CodeNotFound }
		for _, ref := range w.req.Services {
			ss, err := w.c.Services(ctx, ref)
			if gone(err) {
				continue
			}
			if err != nil {
				return err
			}
			now.Services = append(now.Services, ss...)
			ts, err := w.c.Tasks(ctx, &shoalv1.ListTasksRequest{Service: ref, All: true})
			if err != nil && !gone(err) {
				return err
			}
			now.Tasks = append(now.Tasks, ts...)
		}
		for _, ref := range w.req.Tasks {
			ts, err := w.c.Tasks(ctx, &shoalv1.ListTasksRequest{Refs: []string{ref}, All: true})
			if err != nil && !gone(err) {
				return err
			}
			now.Tasks = append(now.Tasks, ts...)
		}
		return nil
	}()
	w.heard = time.Now()
	if err != nil {
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return w.last, err
	}
	w.last = now
	return now, nil
}
