package client

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/spec"
)

// heard collects output.
type heard struct {
	mu          sync.Mutex
	lines, says []string
}

func (h *heard) sink() LogSink {
	return LogSink{
		Line: func(t *shoalv1.Task, m *shoalv1.LogsResponse) {
			h.mu.Lock()
			defer h.mu.Unlock()
			h.lines = append(h.lines, t.Id+":"+string(m.Line))
		},
		Note: func(_ *shoalv1.Task, s string) {
			h.mu.Lock()
			defer h.mu.Unlock()
			h.says = append(h.says, s)
		},
	}
}

func (h *heard) of(task string) (out []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, l := range h.lines {
		if s, ok := strings.CutPrefix(l, task+":"); ok {
			out = append(out, s)
		}
	}
	return out
}

func until(t *testing.T, what string, fn func() bool) {
	t.Helper()
	for limit := time.Now().Add(20 * time.Second); !fn(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatal("not in time: ", what)
		}
	}
}

func numbers(from, to int) (out []string) {
	for i := from; i < to; i++ {
		out = append(out, fmt.Sprint(i))
	}
	return out
}

// TestServiceLogsFollow: tasks that come by scale, crash loop and update are taken
// up, from their first line, and the end of the service, not of its tasks, is the end.
func TestServiceLogsFollow(t *testing.T) {
	a := newFakeAgent(t)
	a.services["s"] = &shoalv1.Service{Id: "s"}
	a.put("t1", "s", spec.TaskRunning, "0")
	a.put("old", "s", spec.TaskFailed, "x", "y")
	h := &heard{}
	done := make(chan error, 1)
	go func() {
		done <- New(a.socket).ServiceLogs(t.Context(), "s", "web", LogOptions{Follow: true, Tail: -1}, h.sink())
	}()
	time.Sleep(50 * time.Millisecond)
	until(t, "the line after the start", func() bool { // none is shown of what was there
		a.do(func() { a.lines["t1"] = append(a.lines["t1"], "new") })
		return slices.Contains(h.of("t1"), "new")
	})
	if got := h.of("t1"); slices.Contains(got, "0") || len(h.of("old")) > 0 {
		t.Errorf("with tail 0: %q, %q", got, h.of("old"))
	}
	// One after the other ends: nothing runs for a while.
	a.put("t1", "s", spec.TaskFailed)
	for i := range 4 {
		id := fmt.Sprint("crash", i)
		a.put(id, "s", spec.TaskFailed, "a", "b")
		until(t, "output of "+id, func() bool { return slices.Equal(h.of(id), []string{"a", "b"}) })
	}
	a.put("t2", "s", spec.TaskRunning, "first")
	until(t, "output of t2", func() bool { return slices.Equal(h.of("t2"), []string{"first"}) })
	select {
	case err := <-done:
		t.Fatalf("it ended by itself: %v", err)
	default:
	}
	a.do(func() { delete(a.services, "s") })
	a.do(func() { a.lines["t2"] = append(a.lines["t2"], "bye"); a.over["t2"] = true; delete(a.tasks, "t2") })
	if err := <-done; err != nil {
		t.Error(err)
	}
	if got := h.of("t2"); !slices.Equal(got, []string{"first", "bye"}) {
		t.Errorf("the last words of a task: %q", got)
	}
	if !slices.Contains(h.says, "service web was removed: nothing follows") {
		t.Errorf("said: %q", h.says)
	}
}

// TestLogsOutlastAgent: an agent that is killed and started anew, again and again,
// costs no line and doubles none.
func TestLogsOutlastAgent(t *testing.T) {
	for _, tail := range []int32{0, -1, 3} {
		a := newFakeAgent(t)
		a.put("t1", "", spec.TaskRunning, numbers(0, 10)...)
		h := &heard{}
		done := make(chan error, 1)
		c := New(a.socket)
		go func() {
			done <- c.TaskLogs(t.Context(), a.tasks["t1"], LogOptions{Follow: true, Tail: tail}, h.sink())
		}()
		if tail < 0 {
			// The fake shows all but what was there at the start.
			time.Sleep(300 * time.Millisecond)
		}
		for i := range 3 {
			a.do(func() { a.lines["t1"] = append(a.lines["t1"], numbers(10+3*i, 13+3*i)...) })
			if i == 1 {
				until(t, "the line before", func() bool { return slices.Contains(h.of("t1"), "15") })
			}
			a.stop()
			a.do(func() { a.lines["t1"] = append(a.lines["t1"], fmt.Sprint("gap", i)) })
			time.Sleep(20 * time.Millisecond)
			a.start()
			until(t, "what came meanwhile", func() bool { return slices.Contains(h.of("t1"), fmt.Sprint("gap", i)) })
			a.do(func() { // numbers go on behind the gap's line
				l := a.lines["t1"]
				a.lines["t1"] = l
			})
		}
		a.put("t1", "", spec.TaskComplete, "last")
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		a.do(func() {
			got, want := h.of("t1"), a.lines["t1"]
			if tail < 0 {
				want = want[10:]
			}
			if !slices.Equal(got, want) {
				t.Errorf("tail %d: got %q, want %q", tail, got, want)
			}
		})
	}
}

// TestLogsOfComingTask: a task that has no node yet, or whose node has not heard of
// it, is waited for; one that is gone is an error that says so.
func TestLogsOfComingTask(t *testing.T) {
	a := newFakeAgent(t)
	a.put("t1", "s", spec.TaskAssigned)
	a.do(func() { delete(a.lines, "t1"); a.tasks["t1"].Node = "" })
	h := &heard{}
	done := make(chan error, 1)
	c := New(a.socket)
	go func() {
		done <- c.TaskLogs(t.Context(), &shoalv1.Task{Id: "t1", Name: "web.1"}, LogOptions{}, h.sink())
	}()
	time.Sleep(300 * time.Millisecond)
	a.put("t1", "s", spec.TaskRunning, "there")
	if err := <-done; err != nil || !slices.Equal(h.of("t1"), []string{"there"}) {
		t.Errorf("%v, %q", err, h.of("t1"))
	}
	err := c.TaskLogs(t.Context(), &shoalv1.Task{Id: "nosuch", Name: "web.1", Node: "n1"}, LogOptions{}, h.sink())
	if !errors.Is(err, ErrOutputGone) {
		t.Error(err)
	}
	// One that ended before its node kept anything.
	a.put("t2", "s", spec.TaskFailed)
	a.do(func() { delete(a.lines, "t2") })
	if err := c.TaskLogs(t.Context(), &shoalv1.Task{Id: "t2", Name: "web.1", Node: "n1"}, LogOptions{}, h.sink()); err == nil || !strings.Contains(err.Error(), "none of it any more") {
		t.Error(err)
	}
	// Removed while it is followed, by a node that forgets it without a word.
	a.put("t3", "", spec.TaskRunning, "a")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	go func() {
		done <- c.TaskLogs(ctx, &shoalv1.Task{Id: "t3", Name: "t3", Node: "n1"}, LogOptions{Follow: true}, h.sink())
	}()
	until(t, "its line", func() bool { return len(h.of("t3")) == 1 })
	a.do(func() { delete(a.tasks, "t3"); delete(a.lines, "t3") })
	a.stop()
	a.start()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestLastWordsOutlastTheirTask: a node keeps the output of a task that the managers
// have forgotten for a moment, also one that does not answer at first.
func TestLastWordsOutlastTheirTask(t *testing.T) {
	a := newFakeAgent(t)
	a.put("t1", "", spec.TaskComplete, "done")
	a.do(func() { delete(a.tasks, "t1"); a.away = 2 })
	h := &heard{}
	if err := New(a.socket).TaskLogs(t.Context(), &shoalv1.Task{Id: "t1", Name: "t1", Node: "n1"}, LogOptions{Follow: true}, h.sink()); err != nil {
		t.Error(err)
	}
	if got := h.of("t1"); !slices.Equal(got, []string{"done"}) {
		t.Errorf("got %q, want its last line", got)
	}
}

// TestLastWordsAfterALongSilence: that the managers have forgotten a task is learned only
// when the agents, which stood still, go on: then its node is asked once more.
func TestLastWordsAfterALongSilence(t *testing.T) {
	a := newFakeAgent(t)
	a.put("t1", "", spec.TaskComplete, "done")
	a.do(func() { delete(a.tasks, "t1"); a.away = 1; a.still = logComing + 100*time.Millisecond })
	h := &heard{}
	if err := New(a.socket).TaskLogs(t.Context(), &shoalv1.Task{Id: "t1", Name: "t1", Node: "n1"}, LogOptions{Follow: true}, h.sink()); err != nil {
		t.Error(err)
	}
	if got := h.of("t1"); !slices.Equal(got, []string{"done"}) {
		t.Errorf("got %q, want its last line", got)
	}
}
