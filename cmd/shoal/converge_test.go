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
		got := givenUp(c.tasks, 2, &shoalv1.ServiceSpec{RestartMax: int32(c.limit)})
		if got.GetSlot() != c.slot {
			t.Errorf("%s: given up is slot %d, want %d", c.name, got.GetSlot(), c.slot)
		}
	}
}

func TestCompleted(t *testing.T) {
	task := func(slot int32, at int64, st spec.TaskState) *shoalv1.Task {
		return &shoalv1.Task{Slot: slot, CreatedMs: at, Desired: spec.DesiredRunning, Status: &shoalv1.TaskStatus{State: st.String()}}
	}
	tasks := []*shoalv1.Task{task(1, 1, spec.TaskComplete), task(2, 1, spec.TaskComplete), task(2, 2, spec.TaskRunning), task(3, 1, spec.TaskFailed)}
	for condition, want := range map[string]struct {
		complete int
		givenUp  int32
	}{"": {}, spec.RestartAny: {}, spec.RestartOnFailure: {1, 0}, spec.RestartNone: {1, 3}} {
		sp := &shoalv1.ServiceSpec{RestartCondition: condition}
		if n, g := completed(tasks, sp), givenUp(tasks, 3, sp).GetSlot(); n != want.complete || g != want.givenUp {
			t.Errorf("%q: %d complete, slot %d given up, want %+v", condition, n, g, want)
		}
	}
}

// TestDesired: of a replicated service the spec says it, whatever a leader of an older
// version leaves out.
func TestDesired(t *testing.T) {
	for want, s := range map[int]*shoalv1.Service{
		3: {Spec: &shoalv1.ServiceSpec{Replicas: 3}},
		2: {Spec: &shoalv1.ServiceSpec{Replicas: 2}, Desired: 2},
		4: {Spec: &shoalv1.ServiceSpec{Mode: spec.ModeGlobal}, Desired: 4},
		1: {Spec: &shoalv1.ServiceSpec{Mode: spec.ModeReplicatedJob, Replicas: 9}, Desired: 1},
	} {
		if got := desired(s); got != want {
			t.Errorf("%v: %d, want %d", s, got, want)
		}
	}
}
