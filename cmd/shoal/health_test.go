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
