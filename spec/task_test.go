package spec

import (
	"syscall"
	"testing"
)

func TestParseSignal(t *testing.T) {
	for in, want := range map[string]syscall.Signal{"": 15, "SIGINT": 2, "int": 2, "9": 9, "USR1": 10} {
		if got, err := ParseSignal(in); err != nil || got != want {
			t.Errorf("%q: %v, %v", in, got, err)
		}
	}
	for _, in := range []string{"x", "0", "99", "-1"} {
		if _, err := ParseSignal(in); err == nil {
			t.Errorf("%q is accepted", in)
		}
	}
}
