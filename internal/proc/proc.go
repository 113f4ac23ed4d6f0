// Package proc reads what every process may read of the others: proc(5).
package proc

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// PIDs are the IDs of all processes that this one sees, in no order that means
// anything. One may have ended by the time that it is looked at.
func PIDs() ([]int, error) {
	es, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, e := range es {
		if p, err := strconv.Atoi(e.Name()); err == nil {
			pids = append(pids, p)
		}
	}
	return pids, nil
}

// Args are the words of a process's command line (proc_pid_cmdline(5)); none of one that
// has ended, or is the kernel's.
func Args(pid int) []string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || len(b) == 0 {
		return nil
	}
	return strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")
}
