package main

import (
	"testing"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/spec"
)

func TestGivenUp(t *testing.T) {
	task := func(slot, attempt int32, at int64, st spec.TaskState) *shoalv1.Task {
		return &shoalv1.Task{Name: st.String(), Slot: slot, Attempt: attempt, CreatedMs: at, Desired: spec.DesiredRunning,
			Status: &shoalv1.TaskStatus{State: st.String()}}
	}
	failed, running, pending := spec.TaskFailed, spec.TaskRunning, spec.TaskPending
	for _, c := range []struct {
		name  string
		limit int
		tasks []*shoalv1.Task
		slot  int32 // 0: none
	}{
		{"no task", 1, nil, 0},
		{"no limit", 0, []*shoalv1.Task{task(1, 9, 1, failed)}, 0},
		{"all runs had", 2, []*shoalv1.Task{task(1, 1, 1, failed), task(1, 2, 2, failed)}, 1},
		{"listed newest first", 2, []*shoalv1.Task{task(1, 2, 2, failed), task(1, 1, 1, failed)}, 1},
		{"one run left", 3, []*shoalv1.Task{task(1, 1, 1, failed), task(1, 2, 2, failed)}, 0},
		{"last run goes on", 2, []*shoalv1.Task{task(1, 1, 1, failed), task(1, 2, 2, running)}, 0},
		{"another is to come", 1, []*shoalv1.Task{task(1, 1, 1, failed), task(1, 1, 2, pending)}, 0},
		{"counted anew after a long run", 2, []*shoalv1.Task{task(1, 2, 1, failed), task(1, 1, 2, failed)}, 0},
		{"second slot", 1, []*shoalv1.Task{task(1, 1, 1, running), task(2, 1, 1, failed)}, 2},
		{"taken away by scale", 1, []*shoalv1.Task{task(1, 1, 1, running), task(2, 1, 1, pending), task(3, 1, 1, failed)}, 0},
	} {
		got := givenUp(c.tasks, 2, c.limit)
		if got.GetSlot() != c.slot {
			t.Errorf("%s: given up is slot %d, want %d", c.name, got.GetSlot(), c.slot)
		}
	}
}
