package proc

import (
	"os"
	"slices"
	"testing"
)

func TestPIDs(t *testing.T) {
	pids, err := PIDs()
	if err != nil || !slices.Contains(pids, os.Getpid()) || slices.ContainsFunc(pids, func(p int) bool { return p < 1 }) {
		t.Errorf("%v, %v", pids, err)
	}
}

func TestArgs(t *testing.T) {
	if got := Args(os.Getpid()); !slices.Equal(got, os.Args) {
		t.Errorf("%q, want %q", got, os.Args)
	}
	if got := Args(1 << 30); got != nil {
		t.Errorf("of none: %q", got)
	}
}
