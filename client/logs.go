package client

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"connectrpc.com/connect"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/internal/sleep"
	"github.com/shoalnet/shoal/peer"
	"github.com/shoalnet/shoal/spec"
)

// LogOptions choose what of the output is passed on.
type LogOptions struct {
	Follow bool  // go on as more comes
	Tail   int32 // only the last lines of each task; 0: all, -1: none
	// Since and Until are the moments of the first line and of the last, which ends
	// Follow; zero: any.
	Since, Until time.Time
}

// LogSink takes output. Calls come one at a time.
type LogSink struct {
	// Line is one line of a task; AtNs, Stderr and Line of it are set.
	Line func(t *shoalv1.Task, m *shoalv1.LogsResponse)
	// Note is what is to be said of the output, a task's or (t nil) all.
	Note func(t *shoalv1.Task, text string)
}

const (
	logRetry   = 200 * time.Millisecond // between tries of what may come back
	logSpeak   = 3 * time.Second        // of silence before it is said what is waited for
	logComing  = 10 * time.Second       // for the output of a task that its node is about to make
	logPoll    = 400 * time.Millisecond // between looks for further tasks of a service; each keeps its last five
	logStreams = 16                     // of ended tasks read at once
)

// ErrOutputGone says that a task is not there any more, and its output neither.
var ErrOutputGone = errors.New("the task was removed, and its output with it")

// TaskLogs passes the output of one task on, from its beginning or as o has it. An
// agent that is gone for a while ends nothing: it goes on behind the last line.
// With Follow it returns, without an error, when the task has ended or is removed,
// and does not give up by itself as long as the managers say that the task lives.
func (c *Client) TaskLogs(ctx context.Context, t *shoalv1.Task, o LogOptions, s LogSink) error {
	msg := &shoalv1.LogsRequest{Task: t.Id, Follow: o.Follow, Tail: o.Tail, SinceNs: nanos(o.Since), UntilNs: nanos(o.Until)}
	var lost time.Time      // since when nothing comes that should
	var forgotten time.Time // since when it is known that the managers have forgotten the task
	shown, said := false, false
	for {
		heard, err := false, error(nil)
		if t.Node == "" {
			err = connect.NewError(connect.CodeNotFound, fmt.Errorf("task %s is on no node yet", t.Name))
		} else {
			heard, err = c.logStream(ctx, t, msg, s)
		}
		if err == nil || ctx.Err() != nil {
			return ctx.Err()
		}
		if shown = shown || heard; heard || lost.IsZero() {
			lost, said = time.Now(), false
		}
		missing := connect.CodeOf(err) == connect.CodeNotFound
		if !missing && !away(err) {
			return c.Explain(err)
		}
		now, ferr := c.fate(ctx, t.Id)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case ferr == nil && now == nil && !missing && (forgotten.IsZero() || time.Since(forgotten) < logComing):
			// Forgotten by the managers; its node, which has not answered yet, keeps the
			// output of what is removed by itself for a moment. That is counted from when
			// this is known: who knew it may have stood still, and the node with him.
			if forgotten.IsZero() {
				forgotten = time.Now()
			}
		case ferr == nil && now == nil: // forgotten: so is its output
			if shown || o.Follow {
				return nil
			}
			return fmt.Errorf("task %s: %w", t.Name, ErrOutputGone)
		case ferr == nil && Ended(now):
			if missing {
				if shown || o.Follow {
					return nil
				}
				return connect.NewError(connect.CodeNotFound, fmt.Errorf("output of task %s: its node has none of it any more", t.Name))
			}
			if now.GetStatus().GetState() == spec.TaskLost.String() || !o.Follow && !localCut(err) {
				return c.Explain(err) // its node is down
			}
		case ferr == nil:
			t.Node = now.Node // it may have been on none
		case !away(ferr):
			return ferr
		}
		quiet := time.Since(lost)
		if !o.Follow && (quiet > logComing || !missing && !localCut(err)) {
			return c.Explain(err)
		}
		if !o.Until.IsZero() && time.Now().After(o.Until) {
			return nil
		}
		if quiet > logSpeak && !said && !missing {
			s.Note(t, Silence(err)+": waiting for its output")
			said = true
		}
		if !sleep.For(ctx, logRetry) {
			return ctx.Err()
		}
	}
}

// logStream is one call for the output; nil when that has ended. msg is left such
// that the next goes on behind what came.
func (c *Client) logStream(ctx context.Context, t *shoalv1.Task, msg *shoalv1.LogsRequest, s LogSink) (heard bool, err error) {
	req := connect.NewRequest(msg)
	req.Header().Set(peer.NodeHeader, t.Node)
	stream, err := c.Node.Logs(ctx, req)
	if err != nil {
		return false, err
	}
	defer stream.Close()
	for stream.Receive() {
		heard = true
		switch m := stream.Msg(); {
		case m.Ended:
			return true, nil
		case m.Begin:
			msg.SinceNs, msg.Tail = max(m.AtNs, msg.SinceNs), 0
		case m.Note != "":
			s.Note(t, m.Note)
		default:
			msg.SinceNs, msg.Tail = m.AtNs+1, 0
			s.Line(t, m)
		}
	}
	return heard, cmp.Or(stream.Err(), error(connect.NewError(connect.CodeUnavailable, errors.New("the agent ended the output"))))
}

// fate is what the managers know of a task now: nil when they don't know it.
func (c *Client) fate(ctx context.Context, id string) (*shoalv1.Task, error) {
	ts, err := c.Tasks(ctx, &shoalv1.ListTasksRequest{Refs: []string{id}, All: true})
	if connect.CodeOf(err) == connect.CodeNotFound && err != nil || err == nil && len(ts) == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return ts[0], nil
}

// ServiceLogs passes the output of all of a service's tasks on. With Follow it takes
// up the tasks that come, and ends when the service is removed, which it says.
func (c *Client) ServiceLogs(ctx context.Context, id, name string, o LogOptions, s LogSink) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var mu sync.Mutex
	sink := LogSink{
		Line: func(t *shoalv1.Task, m *shoalv1.LogsResponse) { mu.Lock(); defer mu.Unlock(); s.Line(t, m) },
		Note: func(t *shoalv1.Task, text string) { mu.Lock(); defer mu.Unlock(); s.Note(t, text) },
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	var firstErr error
	few := make(chan struct{}, logStreams)
	begun := map[string]bool{}
	grace := time.Duration(0)
	first := true
	var lost time.Time
	for said := false; ; {
		tasks, err := c.Tasks(ctx, &shoalv1.ListTasksRequest{Service: id, All: true})
		switch {
		case ctx.Err() != nil:
			wg.Wait()
			return ctx.Err()
		case err != nil && connect.CodeOf(err) == connect.CodeNotFound:
			if first {
				return err
			}
			// What its tasks say as they stop is passed on.
			done := make(chan struct{})
			go func() { wg.Wait(); close(done) }()
			select {
			case <-done:
			case <-ctx.Done():
			case <-time.After(grace + logComing):
			}
			cancel()
			wg.Wait()
			sink.Note(nil, fmt.Sprintf("service %s was removed: nothing follows", name))
			return nil
		case err != nil && (first || !away(err)):
			return err
		case err != nil:
			if lost.IsZero() {
				lost = time.Now()
			}
			if time.Since(lost) > logSpeak && !said {
				sink.Note(nil, "service "+name+": "+Silence(err)+": waiting")
				said = true
			}
		default:
			lost, said = time.Time{}, false
		}
		for _, t := range tasks {
			over := Ended(t)
			if begun[t.Id] || t.Node == "" {
				continue
			}
			begun[t.Id] = true
			grace = max(grace, time.Duration(t.GetSpec().GetStopGraceMs())*time.Millisecond)
			to := o
			if !first {
				to.Tail = 0 // it has begun since
			}
			to.Follow = o.Follow && !over
			wg.Go(func() {
				if over || !o.Follow {
					few <- struct{}{}
					defer func() { <-few }()
				}
				err := c.TaskLogs(ctx, t, to, sink)
				// A task that its node has forgotten, or whose node is down, has no
				// output to show; the others have.
				if code := connect.CodeOf(err); err == nil || ctx.Err() != nil || errors.Is(err, ErrOutputGone) || code == connect.CodeNotFound {
					return
				} else if o.Follow || away(err) {
					sink.Note(t, "its output can't be read: "+Message(err))
					return
				}
				mu.Lock()
				defer mu.Unlock()
				firstErr = cmp.Or(firstErr, err)
			})
		}
		first = false
		if !o.Follow || !o.Until.IsZero() && time.Now().After(o.Until) {
			wg.Wait()
			mu.Lock()
			defer mu.Unlock()
			return firstErr
		}
		if !sleep.For(ctx, logPoll) {
			wg.Wait()
			return ctx.Err()
		}
	}
}

// FindAnywhere looks for a task on the nodes that answer: one that the managers have
// just forgotten is on its own for a moment more.
func (c *Client) FindAnywhere(ctx context.Context, ref string) *shoalv1.Task {
	nodes, _, err := c.Nodes(ctx)
	if err != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	found := make(chan *shoalv1.Task, len(nodes))
	for _, n := range nodes {
		go func() { // ends with ctx
			if n.Status != spec.NodeReady {
				found <- nil
				return
			}
			req := connect.NewRequest(&shoalv1.TasksRequest{})
			req.Header().Set(peer.NodeHeader, n.Id)
			resp, err := c.Node.Tasks(ctx, req)
			if err != nil {
				found <- nil
				return
			}
			t, err := PickTask(resp.Msg.Tasks, ref)
			if err != nil {
				t = nil
			}
			found <- t
		}()
	}
	for range nodes {
		if t := <-found; t != nil {
			return t
		}
	}
	return nil
}

func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return max(t.UnixNano(), 1)
}

// localCut tells whether an error is of the connection to the agent rather than an
// answer of it. The caller's context has not ended.
func localCut(err error) bool {
	if err == nil || connect.IsWireError(err) {
		return false
	}
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		return true // in the middle of an answer
	}
	switch connect.CodeOf(err) {
	case connect.CodeUnavailable, connect.CodeUnknown, connect.CodeInternal, connect.CodeAborted, connect.CodeCanceled:
		return true
	}
	return false
}

// away tells whether an error says that an agent is not to be reached now.
func away(err error) bool { return connect.CodeOf(err) == connect.CodeUnavailable || localCut(err) }

// Silence says in words who does not answer, of an error for which Away is true.
func Silence(err error) string {
	if localCut(err) {
		return "the agent does not answer"
	}
	return Message(err)
}

// Message is an error as a person reads it: an API error without its code.
func Message(err error) string {
	var ce *connect.Error
	if errors.As(err, &ce) {
		return ce.Message()
	}
	return err.Error()
}
