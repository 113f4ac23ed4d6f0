package main

import (
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
	"github.com/shoalnet/shoal/spec"
)

func TestHealthFlags(t *testing.T) {
	have := &shoalv1.HealthCheck{Command: "old", IntervalMs: 5000, Retries: 2}
	for _, tc := range []struct {
		name string
		h    healthFlags
		have *shoalv1.HealthCheck
		want *shoalv1.HealthCheck
		err  string
	}{
		{name: "none given"},
		{name: "none given, one is there", have: have, want: have},
		{name: "a command", h: healthFlags{HealthCheck: spec.HealthCheck{Command: "x", Timeout: time.Second}}, want: &shoalv1.HealthCheck{Command: "x", TimeoutMs: 1000}},
		{name: "one thing changes", h: healthFlags{HealthCheck: spec.HealthCheck{Interval: time.Second}}, have: have, want: &shoalv1.HealthCheck{Command: "old", IntervalMs: 1000, Retries: 2}},
		{name: "taken away", h: healthFlags{none: true}, have: have},
		{name: "both", h: healthFlags{none: true, HealthCheck: spec.HealthCheck{Command: "x"}}, err: "--no-healthcheck goes with no other"},
		{name: "no command", h: healthFlags{HealthCheck: spec.HealthCheck{Retries: 2}}, err: "give one with --health-cmd"},
		{name: "too short", h: healthFlags{HealthCheck: spec.HealthCheck{Command: "x", Interval: time.Microsecond}}, err: "interval 1µs is too short"},
		{name: "negative", h: healthFlags{HealthCheck: spec.HealthCheck{Command: "x", Retries: -1}}, err: "-1 retries"},
	} {
		got, err := tc.h.apply(tc.have)
		if (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) {
			t.Errorf("%s: %v, want %q", tc.name, err, tc.err)
			continue
		}
		if err == nil && !proto.Equal(got, tc.want) {
			t.Errorf("%s: %v, want %v", tc.name, got, tc.want)
		}
	}
}

// TestUnhealthy: run -d waits for a health check as long as that may take, and no
// longer.
func TestUnhealthy(t *testing.T) {
	begun := time.Now()
	task := func(state spec.TaskState, msg string, h *shoalv1.HealthCheck) *shoalv1.Task {
		return &shoalv1.Task{Spec: &shoalv1.TaskSpec{Health: h}, Status: &shoalv1.TaskStatus{State: state.String(), Message: msg}}
	}
	fast := &shoalv1.HealthCheck{Command: "false", IntervalMs: 1000, Retries: 2, StartPeriodMs: 3000, TimeoutMs: 1000}
	for _, k := range []struct {
		t     *shoalv1.Task
		since time.Time
		after time.Duration
		want  string
	}{
		{task(spec.TaskStarting, "unhealthy: exit status 1", fast), begun, 0, "exit status 1"},
		{task(spec.TaskStarting, "unhealthy: exit status 1", nil), begun, 0, "exit status 1"}, // of its image
		{task(spec.TaskStarting, "not healthy yet: exit status 1", fast), begun, 15 * time.Second, ""},
		{task(spec.TaskStarting, "not healthy yet: exit status 1", fast), begun, 17 * time.Second, "not healthy yet: exit status 1"},
		{task(spec.TaskStarting, "", fast), begun, 17 * time.Second, "its health check has not succeeded in 16s"},
		{task(spec.TaskStarting, "", fast), time.Time{}, 17 * time.Second, ""},
		{task(spec.TaskStarting, "", nil), begun, time.Hour, ""},
		{task(spec.TaskPreparing, "pulling", fast), begun, time.Hour, ""},
		{task(spec.TaskRunning, "unhealthy: exit status 1", fast), begun, time.Hour, ""},
	} {
		if got := unhealthy(k.t, k.since, begun.Add(k.after)); got != k.want {
			t.Errorf("%v after %s: %q, want %q", k.t, k.after, got, k.want)
		}
	}
}
