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
