package agent

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	shoalv1 "github.com/shoalnet/shoal/api/shoal/v1"
)

// nodeMemory is the memory of this machine, in bytes: sysinfo(2).
var nodeMemory = sync.OnceValue(func() uint64 {
	var si unix.Sysinfo_t
	if unix.Sysinfo(&si) != nil {
		return 0
	}
	return uint64(si.Totalram) * uint64(si.Unit)
})

// linkCounters are those of all links of a network namespace but lo.
type linkCounters struct{ rxBytes, rxPackets, txBytes, txPackets, dropped uint64 }

// readLinks reads the counters of the network namespace of a process: see
// /proc/PID/net/dev in proc(5).
func readLinks(pid int) (l linkCounters, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/dev", pid))
	if err != nil {
		return l, err
	}
	for line := range bytes.Lines(b) {
		name, rest, ok := bytes.Cut(line, []byte(":"))
		f := bytes.Fields(rest)
		if !ok || len(f) < 16 || string(bytes.TrimSpace(name)) == "lo" {
			continue
		}
		for _, c := range []struct {
			column int
			to     *uint64
		}{{0, &l.rxBytes}, {1, &l.rxPackets}, {3, &l.dropped}, {8, &l.txBytes}, {9, &l.txPackets}, {11, &l.dropped}} {
			n, err := strconv.ParseUint(string(f[c.column]), 10, 64)
			if err != nil {
				return l, fmt.Errorf("/proc/%d/net/dev: %w", pid, err)
			}
			*c.to += n
		}
	}
	return l, nil
}

// readStats reads what 'shoal stats' shows of the network namespace of a process:
// readLinks, and the connections of /proc/PID/net/tcp in proc(5).
func readStats(pid int) (*shoalv1.StatsResponse_Task, error) {
	l, err := readLinks(pid)
	if err != nil {
		return nil, err
	}
	s := &shoalv1.StatsResponse_Task{RxBytes: l.rxBytes, RxPackets: l.rxPackets, TxBytes: l.txBytes, TxPackets: l.txPackets, Dropped: l.dropped}
	for _, file := range []string{"tcp", "tcp6"} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/%s", pid, file))
		if os.IsNotExist(err) {
			continue // no IPv6
		}
		if err != nil {
			return nil, err
		}
		for line := range bytes.Lines(b) {
			if f := bytes.Fields(line); len(f) > 3 && string(f[3]) == "01" { // TCP_ESTABLISHED
				s.Connections++
			}
		}
	}
	return s, nil
}
