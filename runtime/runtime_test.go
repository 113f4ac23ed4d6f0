package runtime

import (
	"testing"
	"time"
)

// TestAge: the machine's clock may be set while a program runs, or lie in its record.
func TestAge(t *testing.T) {
	var s Status
	if got := s.Age(); got != 0 {
		t.Errorf("of none: %s", got)
	}
	s.Begin()
	if s.Booted <= 0 {
		t.Fatal("this machine does not say for how long it has been up")
	}
	s.Booted -= min(s.Booted-1, 7*time.Second)
	for _, set := range []time.Duration{0, -24 * time.Hour, 24 * time.Hour} {
		o := s
		o.StartedAt = o.StartedAt.Add(set)
		if got := o.Age(); got < min(6*time.Second, s.Booted) || got > time.Minute {
			t.Errorf("with the clock set by %s: %s, want 7s", set, got)
		}
	}
	// As a shim of before has it, which knows the clock only.
	if got := (Status{StartedAt: time.Now().Add(-time.Hour)}).Age(); got < time.Hour || got > 2*time.Hour {
		t.Errorf("by the clock: %s, want an hour", got)
	}
	for _, o := range []Status{{StartedAt: time.Now().Add(time.Hour)}, {Booted: 1<<63 - 1}} {
		if got := o.Age(); got != 0 {
			t.Errorf("of one that starts in the future: %s", got)
		}
	}
}
