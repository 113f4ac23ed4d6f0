// Package proc reads what every process may read of the others: proc(5).
package proc

import (
	"os"
	"strconv"
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
